//! What stands under a host of a round: file systems that can be full, read-only or lose their power, and disks that
//! fail. All of it is made by the round, as root, and goes away with it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::harness::{Program, output, peer, scratch, until};

/// Makes the names of what is not in the round's own folders differ.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A name that nothing else on this machine has.
pub(super) fn unique(what: &str) -> String {
    format!("bf{what}{}x{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed))
}

/// Runs a command that must go well.
pub(super) fn done(command: &mut Command) -> Result<(), String> {
    let output = output(command);
    if output.status.success() {
        return Ok(());
    }
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} {}: {}", command.get_program().to_string_lossy(), words.join(" "), said.trim_end()))
}

/// Why no file system can be made here, if none can.
pub(super) fn no_mounts() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = WHY.get_or_init(|| {
        for program in ["mkfs.ext4", "mount", "umount"] {
            if peer(program).is_none() {
                return Some(format!("{program} missing"));
            }
        }
        let folder = scratch();
        Volume::make(&folder.path().join("mount"), 1, false).err()
    });
    why.as_deref()
}

/// An ext4 in a file behind a loop device. Nothing reaches the file before it is synced, for minutes.
#[derive(Debug)]
pub(super) struct Volume {
    mount: PathBuf,
    backing: PathBuf,
    /// A tmpfs around the file that is smaller than the file says it is.
    thin: Option<PathBuf>,
    snapshots: u32,
}

impl Volume {
    /// Makes and mounts one of `mib` MiB. Without a journal it may be small.
    pub(super) fn make(mount: &Path, mib: u64, journal: bool) -> Result<Self, String> {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { memory } else { mount.parent().unwrap_or(memory) };
        Self::make_in(mount, folder, None, mib, journal)
    }

    /// The same on storage that has less room than it promises: writes are taken in, and fail when they are synced.
    pub(super) fn make_thin(mount: &Path, mib: u64, really_mib: u64) -> Result<Self, String> {
        let thin = mount.with_extension("thin");
        fs::create_dir_all(&thin).map_err(|error| error.to_string())?;
        done(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={really_mib}m"), "none"]).arg(&thin))?;
        Self::make_in(mount, &thin.clone(), Some(thin), mib, true)
    }

    fn make_in(mount: &Path, folder: &Path, thin: Option<PathBuf>, mib: u64, journal: bool) -> Result<Self, String> {
        let said = |error: std::io::Error| error.to_string();
        let backing = folder.join(unique("vol"));
        // From here on it is taken down again, whatever happens.
        let volume = Self { mount: mount.to_owned(), backing, thin, snapshots: 0 };
        fs::create_dir_all(mount).map_err(said)?;
        File::create(&volume.backing).and_then(|file| file.set_len(mib << 20)).map_err(said)?;
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.env("PATH", sbin());
        mkfs.args(["-q", "-F", "-m", "0", "-N", "64", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"]);
        mkfs.args(if journal { ["-J", "size=4"] } else { ["-O", "^has_journal"] });
        done(mkfs.arg(&volume.backing))?;
        volume.mount(journal)?;
        Ok(volume)
    }

    fn mount(&self, journal: bool) -> Result<(), String> {
        // The journal is written when somebody syncs, and not by the clock.
        let options = if journal { "loop,commit=300,data=ordered" } else { "loop" };
        done(Command::new("mount").args(["-o", options]).arg(&self.backing).arg(&self.mount))
    }

    /// Takes the power away: what has not reached the device is lost, and the file system is mounted again as it would
    /// be after the next boot. Nobody may use it now.
    pub(super) fn lose_power(&mut self) -> Result<(), String> {
        self.snapshots += 1;
        let left = self.backing.with_extension(self.snapshots.to_string());
        done(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(&self.backing).arg(&left))?;
        // What the page cache still holds goes to the file that nobody looks at any more.
        done(Command::new("umount").arg(&self.mount))?;
        fs::remove_file(&self.backing).map_err(|error| error.to_string())?;
        self.backing = left;
        self.mount(true)
    }

    /// Fills it to the last byte.
    pub(super) fn fill(&self) -> Result<(), String> {
        fill(&self.mount)
    }

    /// Makes room again.
    pub(super) fn empty(&self) {
        let _ = fs::remove_file(self.mount.join(FILLER));
    }

    /// Lets nothing be written any more, or again.
    pub(super) fn remount(&self, how: &str) -> Result<(), String> {
        done(Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&self.mount))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = output(Command::new("umount").args(["-q", "-l"]).arg(&self.mount));
        let _ = fs::remove_file(&self.backing);
        if let Some(thin) = &self.thin {
            let _ = output(Command::new("umount").args(["-q", "-l"]).arg(thin));
        }
    }
}

const FILLER: &str = "filler";

fn fill(folder: &Path) -> Result<(), String> {
    let mut file = File::create(folder.join(FILLER)).map_err(|error| error.to_string())?;
    for size in [1 << 20, 4096, 512, 1] {
        let bytes = vec![1; size];
        while file.write_all(&bytes).is_ok() {}
    }
    // What was only promised is taken now.
    let _ = file.sync_all();
    Ok(())
}

fn sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A file whose reads or writes fail while a trigger is there: nbdkit's error filter behind FUSE.
#[derive(Debug)]
pub(super) struct Failing {
    /// What is given to `serve`.
    pub(super) path: PathBuf,
    trigger: PathBuf,
    program: Program,
}

/// Which requests fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fails {
    Reads,
    Writes,
}

/// Why there is no such file here, if there is none.
pub(super) fn no_failing() -> Option<&'static str> {
    if peer("nbdfuse").is_none() {
        Some("nbdfuse missing")
    } else if peer("nbdkit").is_none() {
        Some("nbdkit missing")
    } else if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        Some("no /dev/fuse")
    } else {
        None
    }
}

impl Failing {
    /// Puts a file in front of `image`, which exists. About `percent` of its requests fail once they are told to.
    pub(super) fn before(image: &Path, fails: Fails, percent: u64) -> Result<Self, String> {
        let size = image.metadata().map_err(|error| error.to_string())?.len();
        let (path, trigger) = (image.with_extension("fuse"), image.with_extension("fails"));
        File::create(&path).map_err(|error| error.to_string())?;
        let what = if fails == Fails::Reads { "pread" } else { "pwrite" };
        let mut command = Command::new("nbdfuse");
        command.arg(&path).args(["[", "nbdkit", "--exit-with-parent", "--filter=error", "file"]).arg(image);
        command.arg("error=EIO").arg(format!("error-{what}-rate={percent}%"));
        command.arg(format!("error-{what}-file={}", trigger.display())).arg("]");
        let program = Program::start(&mut command);
        let failing = Self { path, trigger, program };
        until("file of nbdfuse", || failing.path.metadata().is_ok_and(|now| now.len() == size).then_some(()));
        Ok(failing)
    }

    /// From now on requests fail.
    pub(super) fn fail(&self) -> Result<(), String> {
        File::create(&self.trigger).map(drop).map_err(|error| error.to_string())
    }

    /// From now on they do not.
    pub(super) fn heal(&self) {
        let _ = fs::remove_file(&self.trigger);
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = output(Command::new("umount").args(["-q", "-l"]).arg(&self.path));
        self.program.kill();
    }
}

/// Why no process can have clocks of its own here. (Only those that count from the boot: the time of day is the whole
/// machine's.)
pub(super) fn no_clocks() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = WHY.get_or_init(|| {
        if peer("unshare").is_none() {
            return Some("unshare missing".to_owned());
        }
        done(Command::new("unshare").args(["--time", "--monotonic=1000", "--boottime=1000", "true"])).err()
    });
    why.as_deref()
}

/// Two network namespaces with a cable between them.
#[derive(Debug)]
pub(super) struct Cable {
    names: [String; 2],
    /// The address of each end.
    pub(super) ends: [&'static str; 2],
}

/// Why there are none here, if there are none.
pub(super) fn no_namespaces() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = WHY.get_or_init(|| if peer("ip").is_none() { Some("ip missing".to_owned()) } else { Cable::lay().err() });
    why.as_deref()
}

impl Cable {
    pub(super) fn lay() -> Result<Self, String> {
        let name = unique("");
        let cable = Self { names: ["a", "b"].map(|end| format!("{name}{end}")), ends: ["10.83.0.1", "10.83.0.2"] };
        let ip = |words: &str| done(Command::new("ip").env("PATH", sbin()).args(words.split(' ')));
        for name in &cable.names {
            ip(&format!("netns add {name}"))?;
        }
        let [a, b] = &cable.names;
        ip(&format!("-n {a} link add cable type veth peer name cable netns {b}"))?;
        for (name, end) in cable.names.iter().zip(cable.ends) {
            ip(&format!("-n {name} address add {end}/24 dev cable"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set cable up"))?;
        }
        Ok(cable)
    }

    /// What a command begins with that runs at this end.
    pub(super) fn at(&self, end: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.names[end]].map(str::to_owned).to_vec()
    }

    /// Pulls it out, or puts it in again.
    pub(super) fn pull(&self, out: bool) -> Result<(), String> {
        let how = if out { "down" } else { "up" };
        done(Command::new("ip").env("PATH", sbin()).args(["-n", &self.names[0], "link", "set", "cable", how]))
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = output(Command::new("ip").env("PATH", sbin()).args(["netns", "del", name]));
        }
    }
}

mod tests {
    use super::*;

    #[test]
    fn a_power_loss_takes_what_was_not_synced_and_leaves_what_was() {
        if let Some(why) = no_mounts() {
            return eprintln!("SKIP: {why}");
        }
        let folder = scratch();
        let mount = folder.path().join("mount");
        let mut volume = Volume::make(&mount, 16, true).expect("a volume");
        let [synced, cached] = ["synced", "cached"].map(|name| mount.join(name));
        let sync_all = |path: &Path| File::open(path).and_then(|file| file.sync_all()).expect("a sync");
        for path in [&synced, &cached] {
            fs::write(path, "old").expect("written");
            sync_all(path);
        }
        sync_all(&mount);
        fs::write(&synced, "new").expect("written");
        sync_all(&synced);
        let mut file = File::options().write(true).open(&cached).expect("opened");
        file.write_all(b"new").expect("written");
        drop(file);
        // Visible, and not durable: a rename without a sync of the folder.
        let renamed = mount.join("renamed");
        fs::write(mount.join("temporary"), "whole").expect("written");
        sync_all(&mount.join("temporary"));
        fs::rename(mount.join("temporary"), &renamed).expect("renamed");
        assert_eq!(fs::read_to_string(&cached).expect("there"), "new", "visible before");
        volume.lose_power().expect("mounted again");
        assert_eq!(fs::read_to_string(&synced).expect("there"), "new");
        assert_eq!(fs::read_to_string(&cached).expect("there"), "old");
        assert!(!renamed.exists() && mount.join("temporary").exists(), "the rename was not durable");
    }

    #[test]
    fn storage_that_promises_too_much_fails_at_the_sync() {
        if let Some(why) = no_mounts() {
            return eprintln!("SKIP: {why}");
        }
        let folder = scratch();
        let mount = folder.path().join("mount");
        let _volume = Volume::make_thin(&mount, 64, 16).expect("a volume");
        let mut file = File::create(mount.join("file")).expect("created");
        file.write_all(&vec![1; 32 << 20]).expect("taken in");
        file.sync_all().expect_err("there is no room for it");
    }

    #[test]
    fn a_file_fails_when_it_is_told_to() {
        if let Some(why) = no_failing() {
            return eprintln!("SKIP: {why}");
        }
        use std::os::unix::fs::FileExt as _;
        let folder = scratch();
        let image = folder.path().join("image");
        File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
        let failing = Failing::before(&image, Fails::Writes, 100).expect("a file");
        let file = File::options().write(true).open(&failing.path).expect("opened");
        file.write_all_at(&[7; 512], 0).expect("written");
        failing.fail().expect("told");
        file.write_all_at(&[8; 512], 0).expect_err("fails");
        failing.heal();
        file.write_all_at(&[9; 512], 512).expect("written");
        drop(file);
        assert_eq!(fs::read(&image).expect("an image")[..513], [&[7; 512][..], &[9]].concat());
    }
}
