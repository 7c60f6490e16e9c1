//! A guest that is moved while it runs: a Linux in QEMU with a writer inside that remembers and measures
//! (initramfs/guest/src/live.rs), and the QEMU that it moves to.
//!
//! `vm_guest`, `demo_live` and `bench_guest` have it here: what it boots from, what its disks hang on, what it says of
//! itself. Who moves it is their business.

use crate::cpio::Entry;
use crate::demo_host::Scratch;
use crate::kernel::{self, Kernel};
use crate::qmp::Qmp;
use crate::util::{Error, Result};
use crate::vm_machine::{Blueprint, Lines, Machine};
use crate::{build, clock, initramfs};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Writes of the guest a second.
pub(crate) const RATE: u64 = 500;
/// A file in the guest that its init serves to nobody: its command must be one that does not end.
const IDLE: &str = "/etc/idle";
/// How long the guest may take until it has written so much more.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is asked.
const LOOK: Duration = Duration::from_millis(50);

/// What guests are made of.
pub(crate) struct Nursery {
    /// The init that guests boot with, and what the hosts run.
    pub(crate) executable: PathBuf,
    pub(crate) scratch: Arc<Scratch>,
    kernel: Kernel,
    image: PathBuf,
    clock: PathBuf,
}

/// What a disk of a guest hangs on.
pub(crate) enum Backing<'a> {
    /// An export of this name at a Unix socket.
    Export(&'a Path, &'a str),
    /// The same, which QEMU must not write to: it asks before it starts.
    ReadOnly(&'a Path, &'a str),
    /// An image that QEMU opens itself.
    File(&'a Path),
}

/// One QEMU, in which a guest lives or will live.
pub(crate) struct Body {
    pub(crate) machine: Machine,
    pub(crate) qmp: Qmp,
    inside: Lines,
}

/// What a guest says of itself.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Report {
    /// Its words.
    pub(crate) said: String,
    /// Writes that were acknowledged since it lives.
    pub(crate) writes: u64,
    /// Its longest pause between two of them since it was told to mark, by the host's clock.
    pub(crate) pause: Duration,
}

impl Nursery {
    /// Prepares everything.
    pub(crate) fn open(scratch: &Arc<Scratch>, executable: &Path) -> Result<Arc<Self>> {
        let kernel = kernel::find(None)?;
        let inside = build::static_program("testguest")?;
        let inside = fs::read(&inside).map_err(|error| Error::new("guest", inside.display(), error))?;
        let image = scratch.path("guest.cpio");
        let more = [("/bin/testguest", Entry::File(inside, 0o755)), (IDLE, Entry::File(vec![0; 4096], 0o644))];
        let packed = initramfs::pack(executable, &kernel, &["manifest", "manifest.guest"], &more)?;
        initramfs::write(&image, &packed)?;
        let clock = scratch.path("clock.nbd");
        clock::serve(&clock)?;
        let (executable, scratch) = (executable.to_owned(), Arc::clone(scratch));
        Ok(Arc::new(Self { executable, scratch, kernel, image, clock }))
    }

    /// Where the QEMU of this name has a second port for QMP, for whoever drives it.
    pub(crate) fn driver(&self, name: &str) -> PathBuf {
        self.scratch.path(&format!("{name}.driver"))
    }

    /// Switches a QEMU on. Its disks are /dev/vda and so on, the clock is the last; it has an empty CD-ROM drive too.
    /// `waits`: it waits for a guest to come instead of booting one.
    pub(crate) fn start(&self, name: &str, disks: &[Backing<'_>], waits: bool) -> Result<Body> {
        let clock = Backing::ReadOnly(&self.clock, "clock");
        let mut more = Vec::new();
        let mut add = |option: &str, value: String| more.extend([option.to_owned(), value]);
        for (number, disk) in disks.iter().chain([&clock]).enumerate() {
            let (node, mark) = match disk {
                Backing::Export(door, export) => (nbd(door, export), ""),
                Backing::ReadOnly(door, export) => (nbd(door, export), ",read-only=on"),
                Backing::File(path) => (format!("driver=file,filename={}", path.display()), ""),
            };
            add("-blockdev", format!("{node},node-name=n{number},discard=unmap,auto-read-only=off{mark}"));
            add("-blockdev", format!("driver=raw,node-name=d{number},file=n{number},discard=unmap{mark}"));
            add("-device", format!("virtio-blk-pci,drive=d{number},werror=stop,rerror=stop"));
        }
        add("-device", "virtio-scsi-pci".to_owned());
        add("-device", "scsi-cd,id=cd0".to_owned());
        let port = self.scratch.path(&format!("{name}.inside"));
        let driver = self.driver(name);
        add("-device", "virtio-serial-pci".to_owned());
        add("-chardev", format!("socket,id=inside,path={},server=on,wait=off", port.display()));
        add("-device", "virtserialport,chardev=inside,name=test".to_owned());
        add("-qmp", format!("unix:{},server=on,wait=off", driver.display()));
        if waits {
            more.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        }
        let append =
            format!("blockferry.start=/bin/testguest -- export {IDLE} --read-only --nbd unix:///run/idle.sock");
        let blueprint = Blueprint { name, kernel: &self.kernel.image, image: &self.image, append: &append, more };
        let machine = Machine::start(&self.scratch, &blueprint)?;
        let qmp = machine.qmp()?;
        let inside = Lines::open(&port).map_err(|error| machine.wrong(&format!("the guest's port: {error}")))?;
        Ok(Body { machine, qmp, inside })
    }
}

fn nbd(door: &Path, export: &str) -> String {
    let door = door.display();
    format!(
        "driver=nbd,server.type=unix,server.path={door},export={export},reconnect-delay=60,open-timeout=30,\
         cache.direct=on"
    )
}

impl Body {
    /// A line to the guest inside; its answer without `ok`.
    pub(crate) fn tell(&mut self, line: &str) -> Result<String> {
        self.machine.tell(&mut self.inside, line)
    }

    /// Boots done, the writer inside begins. The first disk is written to, the last (the clock) tells the time.
    pub(crate) fn live(&mut self, disks: usize) -> Result<()> {
        let clock = (b'a'..).nth(disks).map_or('z', char::from);
        self.tell(&format!("live /dev/vda /dev/vd{clock} {RATE}")).map(drop)
    }

    /// What it has seen so far.
    pub(crate) fn report(&mut self) -> Result<Report> {
        let said = self.tell("report")?;
        let (writes, pause_us) = (field(&said, "writes")?, field(&said, "pause_us")?);
        Ok(Report { writes, pause: Duration::from_micros(pause_us), said })
    }

    /// Waits until it has written so much more.
    pub(crate) fn writes_on(&mut self, writes: u64) -> Result<()> {
        let wanted = self.report()?.writes + writes;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report()?;
            if report.writes >= wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.machine.wrong(&format!("the guest does not write on: {}", report.said)));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Has it compare its whole disk with what it remembers; an error unless every block is right. Its words.
    pub(crate) fn check(&mut self) -> Result<String> {
        let said = self.tell("check")?;
        if field(&said, "lost")? + field(&said, "wrong")? > 0 {
            return Err(self.machine.wrong(&format!("the guest's disk: {said}")));
        }
        Ok(said)
    }
}

/// `name=N` in an answer of the guest.
pub(crate) fn field(said: &str, name: &str) -> Result<u64> {
    let value = said.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).ok_or_else(|| Error::new("guest", name, format!("not in '{said}'")))
}
