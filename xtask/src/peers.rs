//! The foreign programs that tests, demo and bench measure themselves against, and the packages that bring them.
//!
//! Nobody here wrote them; that is their worth. On a machine where this is root, what is missing is installed.

use crate::util::{self, Error, Result};

/// Programs and Debian's packages for them: the first that has it, for packages change from release to release.
const PEERS: &[(&str, &[&str])] = &[
    ("nbdkit", &["nbdkit"]),
    ("nbdinfo", &["libnbd-bin"]),
    ("nbdcopy", &["libnbd-bin"]),
    // Some releases have it in a package of its own.
    ("nbdfuse", &["libnbd-bin", "nbdfuse"]),
    ("nbdsh", &["python3-libnbd"]),
    ("python3", &["python3"]),
    ("nbd-server", &["nbd-server"]),
    ("nbd-client", &["nbd-client"]),
    ("fio", &["fio"]),
    ("qemu-img", &["qemu-utils"]),
    ("qemu-io", &["qemu-utils"]),
    ("qemu-nbd", &["qemu-utils"]),
    // Debian 13 and backports have it in qemu-utils, Debian 12 does not.
    ("qemu-storage-daemon", &["qemu-utils", "qemu-system-common"]),
    // Shows system calls, has them fail, and kills at one.
    ("strace", &["strace"]),
    // What the fault harness makes its file systems and networks with.
    ("mkfs.ext4", &["e2fsprogs"]),
    ("ip", &["iproute2"]),
    // Tells what is in the page cache. Debian 11 has it in util-linux.
    ("fincore", &["util-linux-extra", "util-linux"]),
    ("qemu-system-x86_64", &["qemu-system-x86"]),
    // The service manager's own program that opens sockets and passes them on.
    ("systemd-socket-activate", &["systemd"]),
];

/// Sees to it that every peer is here: installs what is missing, as root. The error names the packages, or the
/// programs that no package brought.
pub(crate) fn install(operation: &str) -> Result<()> {
    let choices = PEERS.iter().map(|peer| peer.1.len()).max().unwrap_or_default();
    // Twice: a package may push out one that was here. Debian 12's qemu-system-x86 does that to a qemu-utils of a later
    // release.
    for choice in (0..choices).chain(0..choices) {
        let packages = packages(choice, is_here);
        if !packages.is_empty() {
            util::apt_install(operation, &util::missing_packages(operation, &packages)?)?;
        }
    }
    let missing: Vec<&str> = PEERS.iter().map(|peer| peer.0).filter(|program| !is_here(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(operation, missing.join(" "), "not here, though every package for it is installed"))
}

fn is_here(program: &str) -> bool {
    util::find_program(program).is_some()
}

/// The packages, each once, of this choice (0 is the first) for programs that are not here.
fn packages(choice: usize, is_here: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let missing = PEERS.iter().filter(|peer| !is_here(peer.0));
    let mut packages: Vec<&str> = missing.filter_map(|peer| peer.1.get(choice)).copied().collect();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_package_is_named_once() {
        assert_eq!(packages(0, |_| true), Vec::<&str>::new());
        assert_eq!(packages(0, |program| program != "qemu-io"), ["qemu-utils"]);
        let all = "nbdkit libnbd-bin python3-libnbd python3 nbd-server nbd-client fio qemu-utils strace e2fsprogs \
                   iproute2 util-linux-extra qemu-system-x86 systemd";
        assert_eq!(packages(0, |_| false).join(" "), all);
    }

    #[test]
    fn the_second_choice_is_for_what_the_first_did_not_bring() {
        assert_eq!(packages(1, |program| program != "qemu-io"), Vec::<&str>::new());
        assert_eq!(packages(1, |program| program != "qemu-storage-daemon"), ["qemu-system-common"]);
        assert_eq!(packages(1, |program| program != "nbdfuse"), ["nbdfuse"]);
    }
}
