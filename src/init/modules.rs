//! The kernel modules that the image brings: the list of them, and loading them in its order. The steward calls it.
//!
//! A module that cannot be loaded is a line in the log and not an end: whoever needs it will say so better.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;

use super::report;

/// Where the list is: a module's path in each line, then its parameters if there are any. `#` begins a comment.
const LIST: &str = "/etc/blockferry/modules";

/// A line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Module<'a> {
    path: &'a str,
    parameters: &'a str,
}

/// Loads what the list names; a machine without a list needs none.
pub(super) fn load() {
    let Ok(list) = fs::read(LIST) else {
        return report::debug(format_args!("{LIST}: no modules to load"));
    };
    let list = String::from_utf8_lossy(&list);
    for module in list.lines().filter_map(module) {
        match insert(&module) {
            Ok(()) => report::debug(format_args!("module {}: loaded", module.path)),
            Err(cause) => report::warning(format_args!("module {}: {cause}", module.path)),
        }
    }
}

/// Reads a line.
fn module(line: &str) -> Option<Module<'_>> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (!path.is_empty()).then(|| Module { path, parameters: parameters.trim_start() })
}

/// Gives a module to the kernel. One that is there already is as good.
fn insert(module: &Module<'_>) -> Result<(), String> {
    if !Path::new(module.path).is_absolute() {
        return Err("is no absolute path".to_owned());
    }
    let file = File::open(module.path).map_err(|error| crate::error::reason(&error))?;
    let parameters = CString::new(module.parameters).map_err(|_| "its parameters contain a NUL byte".to_owned())?;
    match rustix::system::finit_module(&file, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(crate::error::reason(&error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_paths_and_parameters() {
        let list =
            "# what virtio needs\n/lib/virtio.ko\n\n  /lib/nbd.ko  nbds_max=4 max_part=0 # few\n \t\n#/lib/x.ko\n";
        let found: Vec<Module<'_>> = list.lines().filter_map(module).collect();
        let plain = Module { path: "/lib/virtio.ko", parameters: "" };
        assert_eq!(found, [plain, Module { path: "/lib/nbd.ko", parameters: "nbds_max=4 max_part=0" }]);
    }

    #[test]
    fn what_is_no_module_is_a_cause() {
        let insert = |path| insert(&Module { path, parameters: "" }).expect_err("no module");
        assert_eq!(insert("virtio.ko"), "is no absolute path");
        assert_eq!(insert("/no/such/module.ko"), "No such file or directory");
        // Not a module: whatever the kernel says (it may say that this process may not ask), it is one line.
        assert!(!insert("/proc/self/cmdline").contains('\n'));
    }
}
