//! What a thin host has mounted: the kernel's own file systems, and what its command line names. Keeper and steward
//! call it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::parameters::Mount;
use super::report;
use crate::error::{Problem, reason};
use crate::limits::{INIT_DEVICE_WAIT, RETRY_PAUSE};

/// Type, place and options of the kernel's own, in their order.
const OWN: [(&str, &str, MountFlags); 5] = [
    ("proc", "/proc", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC)),
    ("sysfs", "/sys", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC)),
    ("devtmpfs", "/dev", MountFlags::NOSUID),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV)),
    ("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV)),
];

/// Mounts the kernel's own. Says nothing, there is nowhere yet to say it; what is mounted already is as good. Returns
/// what could not be mounted.
pub(super) fn own() -> Vec<(&'static str, Errno)> {
    let mut failed = Vec::new();
    for (kind, place, flags) in OWN {
        let _ = fs::create_dir_all(place);
        match mount(kind, place, kind, flags, None) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => failed.push((place, error)),
        }
    }
    failed
}

/// Waits for the device and mounts it.
pub(super) fn wanted(wanted: &Mount) -> Result<(), Problem> {
    let Mount { device, directory, kind, read_only } = wanted;
    let refuse = |cause: String| Problem::fatal("init", format_args!("mount {device} at {directory}"), cause);
    let deadline = Instant::now() + INIT_DEVICE_WAIT;
    while device.starts_with('/') && !Path::new(device).exists() {
        if Instant::now() >= deadline {
            return Err(refuse(format!("did not appear within {} s", INIT_DEVICE_WAIT.as_secs())));
        }
        thread::sleep(RETRY_PAUSE);
    }
    fs::create_dir_all(directory).map_err(|error| refuse(reason(&error)))?;
    let access = if *read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = MountFlags::NOSUID | MountFlags::NODEV | access;
    mount(device, directory, kind, flags, None).map_err(|error| refuse(reason(&error.into())))
}

/// Takes the wanted mounts away again, the last one first; what is in use becomes read-only instead.
pub(super) fn release(mounts: &[Mount]) {
    for Mount { directory, .. } in mounts.iter().rev() {
        let gone = unmount(directory, UnmountFlags::empty());
        let done = gone.or_else(|_| mount_remount(directory, MountFlags::RDONLY, ""));
        if let Err(error) = done {
            report::warning(format_args!("unmount {directory}: {}", reason(&error.into())));
        }
    }
}
