//! The kernel that virtual machines boot, and its modules: Debian's kernel for clouds, unpacked below `target/` and
//! never installed; or any other that is there as a file.
//!
//! `initramfs` and `vm` call it. A package is downloaded once: what is unpacked stays.

use crate::util::{self, Error, QUESTION, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The meta package; it depends on the present one.
const META: &str = "linux-image-cloud-amd64";
/// How long the download may take.
const DOWNLOAD: Duration = Duration::from_secs(300);

/// A kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The bootable file.
    pub(crate) image: PathBuf,
    /// Its version, as `uname -r` says it.
    pub(crate) version: String,
    /// The paths of its modules, by their names.
    modules: BTreeMap<String, PathBuf>,
    /// The names of those that need not be loaded because they are in it.
    builtin: Vec<String>,
}

/// Debian's kernel, or the one in `image`: its modules are below `../lib/modules` of its folder, or below
/// `/lib/modules`.
pub(crate) fn find(image: Option<&Path>) -> Result<Kernel> {
    let image = match image {
        Some(image) => image.to_owned(),
        None => debian()?,
    };
    let fail = |cause: &dyn std::fmt::Display| Error::new("kernel", image.display(), cause);
    let bytes = fs::read(&image).map_err(|error| fail(&error))?;
    let version = version(&bytes).map_err(|cause| fail(&cause))?;
    let beside = image.parent().and_then(Path::parent).map(|root| root.join("lib/modules"));
    let places = beside.into_iter().chain([PathBuf::from("/lib/modules")]).map(|place| place.join(&version));
    let folder = places.into_iter().find(|folder| folder.is_dir());
    let folder = folder.ok_or_else(|| fail(&format!("no modules of {version} beside it or in /lib/modules")))?;
    let mut modules = BTreeMap::new();
    for path in files_below(&folder)? {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) {
            modules.insert(plain(name), path.clone());
        }
    }
    let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let names = builtin.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
    let builtin = names.map(plain).collect();
    Ok(Kernel { image, version, modules, builtin })
}

impl Kernel {
    /// The modules that `wanted` needs, itself last, each after what it depends on: names and contents. Empty: it is
    /// built in.
    pub(crate) fn module(&self, wanted: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        self.collect(&plain(wanted), &mut found, 0)?;
        Ok(found)
    }

    fn collect(&self, name: &str, found: &mut Vec<(String, Vec<u8>)>, depth: usize) -> Result<()> {
        let fail = |cause: &dyn std::fmt::Display| Error::new("kernel", format!("module {name}"), cause);
        if self.builtin.iter().any(|builtin| builtin == name) || found.iter().any(|(known, _)| known == name) {
            return Ok(());
        }
        if depth > 16 {
            return Err(fail(&"depends on itself"));
        }
        let path = self.modules.get(name).ok_or_else(|| fail(&format!("{} has none (as .ko)", self.version)))?;
        let bytes = fs::read(path).map_err(|error| fail(&error))?;
        for dependency in depends(&bytes) {
            self.collect(&dependency, found, depth + 1)?;
        }
        found.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// Files and modules write the same name with `-` and with `_`.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module says that it depends on: `depends=a,b` between two NULs of its section of facts. Nothing is there that
/// depmod would know better: it reads the same.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(plain).collect()
}

/// The version in the head of a bzImage (the kernel's documentation, x86/boot: `kernel_version`).
fn version(image: &[u8]) -> std::result::Result<String, &'static str> {
    const MALFORMED: &str = "not a bzImage";
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(MALFORMED);
    }
    let pointer: [u8; 2] = image.get(0x20e..0x210).and_then(|bytes| bytes.try_into().ok()).ok_or(MALFORMED)?;
    let text = image.get(usize::from(u16::from_le_bytes(pointer)) + 0x200..).ok_or(MALFORMED)?;
    let end = text.iter().take(256).position(|byte| matches!(byte, 0 | b' ')).ok_or(MALFORMED)?;
    let version = std::str::from_utf8(&text[..end]).map_err(|_| MALFORMED)?;
    if version.is_empty() || version.contains('/') { Err(MALFORMED) } else { Ok(version.to_owned()) }
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let failed = |error: std::io::Error| Error::new("kernel", path.display(), error);
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Links lead to the sources that it was built from.
            if entry.file_type().map_err(failed)?.is_dir() {
                left.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Debian's present kernel: unpacked below `target/xtask/kernel/` if it is not there yet. Without apt's lists one that
/// is there is good enough.
fn debian() -> Result<PathBuf> {
    let shelf = util::target_dir()?.join("xtask/kernel");
    let package = match package() {
        Ok(package) => package,
        Err(error) => return newest(&shelf).ok_or(error),
    };
    let folder = shelf.join(&package);
    if let Some(image) = image_in(&folder) {
        return Ok(image);
    }
    download(&package, &folder)?;
    image_in(&folder).ok_or_else(|| Error::new("kernel", package, "has no boot/vmlinuz-*"))
}

fn image_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder.join("boot")).ok()?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
}

fn newest(shelf: &Path) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = fs::read_dir(shelf).ok()?.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    folders.iter().rev().find_map(|folder| image_in(folder))
}

/// The package that the meta package stands for; apt's lists are fetched if they are not there.
fn package() -> Result<String> {
    let look_up = || -> Result<Option<String>> {
        let said = util::capture("kernel", Command::new("apt-cache").args(["depends", META]), QUESTION)?;
        Ok(dependency(&said.stdout))
    };
    if let Some(package) = look_up()? {
        return Ok(package);
    }
    if util::is_root() {
        util::apt_update("kernel")?;
    }
    look_up()?.ok_or_else(|| Error::new("kernel", META, "apt knows no package for it: apt-get update"))
}

/// The first real kernel among what `apt-cache depends` prints.
fn dependency(said: &str) -> Option<String> {
    let depends = said.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.map(str::trim).find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

/// Downloads a package (apt checks its signature) and unpacks it as `folder`, which appears when it is complete.
fn download(package: &str, folder: &Path) -> Result<()> {
    let partial = folder.with_extension("partial");
    let failed = |error: std::io::Error| Error::new("kernel", partial.display(), error);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(failed)?;
    }
    fs::create_dir_all(&partial).map_err(failed)?;
    println!("xtask: kernel: downloading {package}");
    let log = util::fresh_log("kernel")?;
    let mut apt = Command::new("apt-get");
    apt.current_dir(&partial).args(["-o", "Acquire::Retries=3", "download", package]);
    util::run("kernel", &mut apt, DOWNLOAD, util::Output::Log(&log))?;
    let packages = files_below(&partial)?;
    let [deb] = packages.as_slice() else {
        return Err(Error::new("kernel", package, "apt-get download brought no package"));
    };
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.arg("--extract").arg(deb).arg(&partial);
    util::run("kernel", &mut dpkg, QUESTION, util::Output::Log(&log))?;
    fs::remove_file(deb).map_err(failed)?;
    fs::rename(&partial, folder).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        let module = b"\x7fELF...\0license=GPL\0depends=virtio-ring,virtio\0name=virtio_blk\0";
        assert_eq!(depends(module), ["virtio_ring", "virtio"]);
        assert_eq!(depends(b"\0depends=\0name=virtio\0"), Vec::<String>::new());
        assert_eq!(depends(b"nothing"), Vec::<String>::new());
    }

    #[test]
    fn the_version_is_in_the_head() {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x312].copy_from_slice(b"6.1.0-56-cloud (x)");
        assert_eq!(version(&image), Ok("6.1.0-56-cloud".to_owned()));
        for length in [0, 0x205, 0x20f, 0x2ff] {
            assert_eq!(version(&image[..length]), Err("not a bzImage"), "{length}");
        }
        image[0x300] = 0;
        assert_eq!(version(&image), Err("not a bzImage"));
    }

    #[test]
    fn the_meta_package_names_the_real_one() {
        let said = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Suggests: x\n";
        assert_eq!(dependency(said).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(dependency("N: Unable to locate package"), None);
    }

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let folder = std::env::temp_dir().join(format!("xtask-modules-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let module = |name: &str, depends: &str| {
            let path = folder.join(format!("{name}.ko"));
            fs::write(&path, format!("\0depends={depends}\0")).expect("written");
            (name.to_owned(), path)
        };
        let modules =
            [module("a", "b,c,builtin"), module("b", "c"), module("c", ""), module("x", "y"), module("y", "x")];
        let kernel = Kernel {
            image: PathBuf::new(),
            version: "1".to_owned(),
            modules: BTreeMap::from(modules),
            builtin: vec!["builtin".to_owned()],
        };
        let names = |name: &str| -> Vec<String> {
            kernel.module(name).expect("modules").into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names("a"), ["c", "b", "a"]);
        assert_eq!(names("builtin"), Vec::<String>::new());
        let error = |name: &str| kernel.module(name).expect_err("not there").to_string();
        assert_eq!(error("z"), "kernel: module z: 1 has none (as .ko)");
        assert!(error("x").ends_with("depends on itself"));
        fs::remove_dir_all(&folder).expect("removed");
    }
}
