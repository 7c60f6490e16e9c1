//! A device `/dev/nbdN`: its name, what `/sys` says of it, and writing its page cache back.
//!
//! Used by `attach.rs` and by the command line. A free device is never opened here: opening one makes the kernel take
//! it for used. Nothing here changes a byte of a device, but syncing lets the kernel write what others have written.

use std::fmt;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, statx};
use rustix::io::Errno;

use crate::error::reason;
use crate::limits::{CONNECTION_STACK, NBD_DEVICES_MAX};

/// N of `/dev/nbdN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device(u32);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/nbd{}", self.0)
    }
}

impl Device {
    /// Reads `/dev/nbdN`.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(path: &str) -> std::result::Result<Self, String> {
        let number =
            path.strip_prefix("/dev/nbd").and_then(|digits| digits.parse().ok().filter(|n: &u32| *n < NBD_DEVICES_MAX));
        // One spelling for each device: no plus sign, no zeroes in front.
        let device = number.map(Self).filter(|device| device.to_string() == path);
        device.ok_or_else(|| {
            format!("not a device of the kernel's nbd driver: /dev/nbdN, N from 0 to {}", NBD_DEVICES_MAX - 1)
        })
    }

    /// Its number.
    #[must_use]
    pub fn index(self) -> u32 {
        self.0
    }

    fn path(self) -> PathBuf {
        PathBuf::from(self.to_string())
    }

    fn attribute(self, name: &str) -> Option<String> {
        let text = fs::read_to_string(format!("/sys/block/nbd{}/{name}", self.0)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    /// Whether the node in `/dev` is this device of the driver: a wrong node would sync something else.
    ///
    /// # Errors
    /// One line: what is wrong.
    pub(super) fn check_node(self) -> std::result::Result<(), String> {
        let node = fs::metadata(self.path()).map_err(|error| reason(&error))?;
        if !node.file_type().is_block_device() {
            return Err("is not a block device".to_owned());
        }
        let (major, minor) = (rustix::fs::major(node.rdev()), rustix::fs::minor(node.rdev()));
        match self.attribute("dev") {
            Some(numbers) if numbers == format!("{major}:{minor}") => Ok(()),
            Some(numbers) => Err(format!("is device {major}:{minor}, and the driver's is {numbers}")),
            None => Err(format!("the kernel has no nbd{} (modprobe nbd nbds_max=N)", self.0)),
        }
    }

    /// What the one who connected it has said it is; `None`: it is not connected, or not by a blockferry, or the kernel
    /// is older than 5.14 and does not remember it.
    #[must_use]
    pub fn backend(self) -> Option<String> {
        self.attribute("backend").filter(|name| !name.is_empty())
    }

    /// Who else has it, as far as can be seen from here: a mount or the like, or a process that has it open.
    #[must_use]
    pub(super) fn user(self) -> Option<String> {
        let claim = rustix::fs::open(self.path(), OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty());
        if claim.is_err_and(|error| error == Errno::BUSY) {
            return Some("the kernel: it is mounted, or part of another device".to_owned());
        }
        let numbers = self.attribute("dev")?;
        let processes = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let me = std::process::id().to_string();
        let mut others = processes.filter(|name| *name != me && name.bytes().all(|digit| digit.is_ascii_digit()));
        let process = others.find(|process| has_open(process, &numbers))?;
        let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
        Some(format!("process {process} ({})", name.trim_end()))
    }

    /// How long the driver waits for an answer before it looks whether the connection has been replaced since: what was
    /// sent over a connection that died is sent again after that. Without it the kernel takes 30 s. It is no time-out:
    /// nothing fails by it.
    pub(super) fn set_look(self, milliseconds: u128) {
        let path = format!("/sys/block/nbd{}/queue/io_timeout", self.0);
        if let Err(error) = fs::write(path, milliseconds.to_string()) {
            log::info!("attach: {self}: io_timeout: {}", reason(&error));
        }
    }

    /// Starts to write back what the page cache holds of it, and to flush it, on a thread of its own: however long that
    /// takes, nobody has to wait for it longer than he likes.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub(super) fn sync(self) -> Result<Sync> {
        let (done, result) = channel();
        let thread = std::thread::Builder::new().name(format!("sync nbd{}", self.0)).stack_size(CONNECTION_STACK);
        thread.spawn(move || {
            // An fd of its own each time: it reports the errors that nobody has been told yet (D9).
            let synced = fs::File::open(self.path()).and_then(|file| file.sync_all());
            // Nobody may be waiting any more.
            let _ = done.send(synced);
        })?;
        Ok(Sync { device: self, result })
    }

    /// All devices that the driver has now.
    pub(super) fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut devices: Vec<Self> = names.filter_map(|name| Self::parse(&format!("/dev/{name}")).ok()).collect();
        devices.sort_unstable();
        devices
    }
}

/// Whether a process has the block device of these numbers open.
fn has_open(process: &str, numbers: &str) -> bool {
    // Processes come and go, and some are hidden from us.
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    files.filter_map(|entry| Some(entry.ok()?.path())).any(|path| {
        // Not asking the file systems behind: one that hangs would hang us.
        let looked = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        looked.is_ok_and(|file| {
            FileType::from_raw_mode(file.stx_mode.into()) == FileType::BlockDevice
                && format!("{}:{}", file.stx_rdev_major, file.stx_rdev_minor) == numbers
        })
    })
}

/// A sync that is under way.
#[derive(Debug)]
pub(super) struct Sync {
    /// Of what.
    pub(super) device: Device,
    result: Receiver<Result<()>>,
}

impl Sync {
    /// Waits for its end until `deadline`; [`ErrorKind::TimedOut`] if that passes: it goes on all the same, and can be
    /// waited for again.
    pub(super) fn wait(&self, deadline: Instant) -> Result<()> {
        match self.result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(Error::other("the thread that syncs is gone")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_one_spelling() {
        for (path, index) in [("/dev/nbd0", 0), ("/dev/nbd15", 15), ("/dev/nbd255", 255)] {
            let device = Device::parse(path).expect(path);
            assert_eq!((device.index(), device.to_string().as_str()), (index, path));
        }
        for path in [
            "",
            "nbd0",
            "/dev/nbd",
            "/dev/nbd00",
            "/dev/nbd+1",
            "/dev/nbd0p1",
            "/dev/nbd-1",
            "/dev/sda",
            "/dev/nbd 1",
            "/dev/nbd4294967296",
        ] {
            let cause = Device::parse(path).expect_err(path);
            assert!(cause.starts_with("not a device of the kernel's nbd driver: /dev/nbdN, N from 0 to "), "{cause}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_nobodys() {
        let device = Device(NBD_DEVICES_MAX - 1);
        assert_eq!(device.backend(), None);
        assert_eq!(device.check_node(), Err("No such file or directory".to_owned()));
    }
}
