//! A device `/dev/nbdN`: its name, what `/sys` says of it, and writing its page cache back.
//!
//! Used by `attach.rs` and by the command line. A free device is never opened here: opening one makes the kernel take
//! it for used. Nothing here changes a byte of a device, but syncing lets the kernel write what others have written.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
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

    /// Who else has it or a partition of it, as far as can be seen from here.
    #[must_use]
    pub(super) fn user(self) -> Option<User> {
        let parts = self.parts();
        let process = || process_with_one_of(&parts.iter().filter_map(Part::numbers).collect::<Vec<_>>());
        let claimed = || parts.iter().find(|part| part.is_claimed()).map(Part::claim);
        parts.iter().find_map(Part::stands_on_it).or_else(process).or_else(claimed)
    }

    /// What stands on it or on a partition of it, a [`User::Kernel`]: what is seen to, and who has claimed it and is no
    /// process.
    #[must_use]
    pub(super) fn stands_on_it(self) -> Option<User> {
        let parts = self.parts();
        parts.iter().find_map(Part::stands_on_it).or_else(|| {
            let claimed = parts.iter().find(|part| part.is_claimed())?;
            let numbers: Vec<String> = parts.iter().filter_map(Part::numbers).collect();
            process_with_one_of(&numbers).is_none().then(|| claimed.claim())
        })
    }

    /// The device as a whole, and its partitions: each has a page cache of its own.
    fn parts(self) -> Vec<Part> {
        let whole = format!("nbd{}", self.0);
        let place = PathBuf::from(format!("/sys/block/{whole}"));
        let mut names = names_in(&place);
        names.retain(|name| name.strip_prefix(&whole).is_some_and(|rest| rest.starts_with('p')));
        let partition = |name: String| Part { sys: place.join(&name), name, is_partition: true };
        let mut parts = vec![Part { sys: place.clone(), name: whole.clone(), is_partition: false }];
        parts.extend(names.into_iter().map(partition));
        parts
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

    /// Starts to write back what the page cache holds of it, and to flush it, on a thread of its own for each part:
    /// however long that takes, nobody has to wait for it longer than he likes. All at once: each ends with a flush,
    /// and the disk makes one of those that wait for it together.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub(super) fn sync(self) -> Result<Sync> {
        let (done, result) = channel();
        let parts = self.parts();
        let left = Cell::new(parts.len());
        for part in parts {
            let done = done.clone();
            let thread = std::thread::Builder::new().name(format!("sync {}", part.name)).stack_size(CONNECTION_STACK);
            thread.spawn(move || {
                // Nobody may be waiting any more.
                let _ = done.send(part.sync());
            })?;
        }
        Ok(Sync { device: self, left, result })
    }

    /// All devices that the driver has now.
    pub(super) fn all() -> Vec<Self> {
        let names = names_in(Path::new("/sys/block")).into_iter();
        let mut devices: Vec<Self> = names.filter_map(|name| Self::parse(&format!("/dev/{name}")).ok()).collect();
        devices.sort_unstable();
        devices
    }
}

/// Who has a device besides us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum User {
    /// A process has it open, and can be made still: its number, and its name.
    Process(String),
    /// A file system or another device is on it, and has a page cache of its own: on which part.
    Kernel(String),
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(process) => write!(f, "process {process}"),
            Self::Kernel(what) => write!(f, "the kernel: {what}"),
        }
    }
}

/// The whole of a device, or a partition.
#[derive(Debug)]
struct Part {
    name: String,
    sys: PathBuf,
    is_partition: bool,
}

impl Part {
    fn path(&self) -> PathBuf {
        PathBuf::from("/dev").join(&self.name)
    }

    /// Its numbers, as `/sys` writes them.
    fn numbers(&self) -> Option<String> {
        Some(fs::read_to_string(self.sys.join("dev")).ok()?.trim_end().to_owned())
    }

    /// A file system or another device on it.
    fn stands_on_it(&self) -> Option<User> {
        let path = self.path();
        let shown = path.display();
        let holders = names_in(&self.sys.join("holders"));
        // Loop devices hold nothing that they are made of.
        let file = |name: &String| fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
        let mut loops = names_in(Path::new("/sys/block"));
        loops.retain(|name| file(name).is_ok_and(|file| Path::new(file.trim_end()) == path));
        if let Some(over) = holders.first().or(loops.first()) {
            return Some(User::Kernel(format!("/dev/{over} is made of {shown}")));
        }
        let text = |place: &str| fs::read_to_string(place).unwrap_or_default();
        let numbers = self.numbers();
        let source = path.to_str();
        let mounts = text("/proc/self/mountinfo");
        let is_mounted = mounts.lines().any(|line| {
            let mut words = line.split(' ');
            // Some file systems have numbers of their own; then their source says it.
            numbers.is_some() && words.nth(2) == numbers.as_deref()
                || words.skip_while(|word| *word != "-").nth(2) == source
        });
        let is_swap = || text("/proc/swaps").lines().any(|line| line.split([' ', '\t']).next() == source);
        (is_mounted || is_swap()).then(|| User::Kernel(format!("{shown} is mounted")))
    }

    fn claim(&self) -> User {
        User::Kernel(format!("{} is claimed", self.path().display()))
    }

    /// Somebody has claimed it for himself: who stands on it, where that cannot be seen from here, or a program.
    fn is_claimed(&self) -> bool {
        let claim = rustix::fs::open(self.path(), OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty());
        claim.is_err_and(|error| error == Errno::BUSY)
    }

    /// Writes its page cache back. An fd of its own each time: it reports the errors that nobody has been told yet
    /// (D9).
    fn sync(&self) -> Result<()> {
        match fs::File::open(self.path()) {
            // A partition that has no node, or has just gone, is nobody's: the last to close it has written it back.
            Err(error)
                if self.is_partition
                    && (error.kind() == ErrorKind::NotFound || Errno::from_io_error(&error) == Some(Errno::NXIO)) =>
            {
                Ok(())
            }
            file => file.and_then(|file| file.sync_all()),
        }
    }
}

/// The names in a directory of `/sys` or `/proc`, as far as they can be read.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// A process of this host that serves `guest`, though it may not answer.
pub(super) fn process_that_serves(guest: &str) -> Option<String> {
    let me = std::process::id().to_string();
    names_in(Path::new("/proc")).into_iter().filter(|name| *name != me).find(|process| {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.contains(&&b"serve"[..]) && words.contains(&guest.as_bytes())
    })
}

/// A process that has a block device of such numbers open.
fn process_with_one_of(numbers: &[String]) -> Option<User> {
    let me = std::process::id().to_string();
    let mut others = names_in(Path::new("/proc"));
    others.retain(|name| *name != me && name.bytes().all(|digit| digit.is_ascii_digit()));
    let process = others.iter().find(|process| has_open(process, numbers))?;
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    Some(User::Process(format!("{process} ({})", name.trim_end())))
}

/// Whether a process has a block device of such numbers open.
fn has_open(process: &str, numbers: &[String]) -> bool {
    // Processes come and go, and some are hidden from us.
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    files.filter_map(|entry| Some(entry.ok()?.path())).any(|path| {
        // Not asking the file systems behind: one that hangs would hang us.
        let looked = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        looked.is_ok_and(|file| {
            FileType::from_raw_mode(file.stx_mode.into()) == FileType::BlockDevice
                && numbers.contains(&format!("{}:{}", file.stx_rdev_major, file.stx_rdev_minor))
        })
    })
}

/// A sync that is under way.
#[derive(Debug)]
pub(super) struct Sync {
    /// Of what.
    pub(super) device: Device,
    /// How many parts have not ended.
    left: Cell<usize>,
    result: Receiver<Result<()>>,
}

impl Sync {
    /// Waits for its end until `deadline`; [`ErrorKind::TimedOut`] if that passes: it goes on all the same, and can be
    /// waited for again.
    pub(super) fn wait(&self, deadline: Instant) -> Result<()> {
        while self.left.get() > 0 {
            match self.result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(result) => result?,
                Err(RecvTimeoutError::Timeout) => return Err(ErrorKind::TimedOut.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(Error::other("the thread that syncs is gone")),
            }
            self.left.set(self.left.get() - 1);
        }
        Ok(())
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

    /// Gives a loop device back.
    struct Loop(String);

    impl Loop {
        fn over(file: &Path) -> Option<Self> {
            let made = std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
            let name = String::from_utf8(made.stdout).ok()?.trim().strip_prefix("/dev/")?.to_owned();
            Some(Self(name))
        }

        fn part(&self) -> Part {
            Part { name: self.0.clone(), sys: Path::new("/sys/block").join(&self.0), is_partition: false }
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup").arg("-d").arg(format!("/dev/{}", self.0)).status();
        }
    }

    #[test]
    fn a_device_on_the_device_is_a_user_that_no_process_can_still() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let file = dir.path().join("disk");
        fs::write(&file, vec![0; 1 << 20]).expect("written");
        let Some(below) = Loop::over(&file) else { return eprintln!("SKIP: no loop device") };
        assert_eq!(below.part().stands_on_it(), None);
        let missing = Part { name: "nbd0p99".to_owned(), sys: PathBuf::new(), is_partition: true };
        [below.part(), missing].iter().try_for_each(Part::sync).expect("synced");
        let above = Loop::over(&below.part().path()).expect("as the one below");
        let said = format!("/dev/{} is made of /dev/{}", above.0, below.0);
        assert_eq!(below.part().stands_on_it(), Some(User::Kernel(said)));
        drop(above);
        assert_eq!(below.part().stands_on_it(), None);
        let numbers = [below.part().numbers().expect("it is there")];
        assert_eq!(process_with_one_of(&numbers), None);
        let mut other = std::process::Command::new("sleep");
        let opened = fs::File::open(below.part().path()).expect("opened");
        let mut other = other.arg("20").stdin(opened).spawn().expect("started");
        let user = process_with_one_of(&numbers);
        other.kill().expect("it runs");
        other.wait().expect("it has ended");
        assert_eq!(user, Some(User::Process(format!("{} (sleep)", other.id()))));
        // As root, where this may mount.
        let mounted = std::process::Command::new("mkfs.ext4").arg("-q").arg(below.part().path()).status();
        let there = dir.path().join("there");
        fs::create_dir(&there).expect("made");
        let mount = |program, argument: &Path| std::process::Command::new(program).arg(argument).arg(&there).status();
        if mounted.is_ok_and(|done| done.success())
            && mount("mount", &below.part().path()).is_ok_and(|done| done.success())
        {
            let found = (below.part().stands_on_it(), below.part().is_claimed());
            std::process::Command::new("umount").arg(&there).status().expect("it runs");
            assert_eq!(found, (Some(User::Kernel(format!("/dev/{} is mounted", below.0))), true));
        }
        assert!(!below.part().is_claimed());
    }

    #[test]
    fn a_device_that_is_not_there_is_nobodys() {
        let device = Device(NBD_DEVICES_MAX - 1);
        assert_eq!(device.backend(), None);
        assert_eq!(device.check_node(), Err("No such file or directory".to_owned()));
    }
}
