//! Two blockferry processes, and a live guest on one of them that `migrate` moves to the other, and back: the same two
//! processes all the time, a fresh QEMU that waits on the receiving side each time.
//!
//! `vm_guest`, `demo_live` and `bench_guest` call it. The guest has four disks: one that moves, one that is read-only,
//! one that is shared and that QEMU opens itself (the clock), and an empty CD-ROM drive.

use crate::demo_host::{self, Host};
use crate::live::{Backing, Body, Nursery};
use crate::native;
use crate::util::{self, Error, Result};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Size of the disk that nobody may write to.
pub(crate) const TOOLS: u64 = 16 << 20;
/// What [`Pair::moves`] must be.
pub(crate) const MOVES: &str = "vda: moves, vdb: read-only, vdc: external, sr0: no source";
/// How long a migration may take.
const MIGRATION: Duration = Duration::from_secs(120);
/// How often a state is asked for.
const LOOK: Duration = Duration::from_millis(20);
/// How the two sides are called.
pub(crate) const SIDES: [&str; 2] = ["A", "B"];

/// Two hosts and a guest.
pub(crate) struct Pair {
    nursery: Arc<Nursery>,
    pub(crate) hosts: [Host; 2],
    /// The moving disk's image on each side.
    images: [PathBuf; 2],
    /// Where the guest is, and the QEMU it is in.
    pub(crate) side: usize,
    pub(crate) here: Body,
}

/// A move that was made.
pub(crate) struct Moved {
    /// The migration's own account, a JSON object.
    pub(crate) done: String,
    /// From the order to its end.
    pub(crate) took: Duration,
}

impl Pair {
    /// Starts both hosts, the first of which owns the guest's disks, and the guest there. Its moving disk is a file of
    /// zeroes of this size, and the writer in it runs when this returns.
    ///
    /// `driven`: each host drives its own QEMU; otherwise the caller does.
    pub(crate) fn start(nursery: &Arc<Nursery>, size: u64, driven: bool, log: &Path) -> Result<Self> {
        let nursery = Arc::clone(nursery);
        let (scratch, executable) = (&nursery.scratch, &nursery.executable);
        let images = SIDES.map(|side| scratch.path(&format!("{side}-vda.raw")));
        let tools = scratch.path("tools.raw");
        for (path, size) in [(&images[0], size), (&tools, TOOLS)] {
            let made = File::create(path).and_then(|file| file.set_len(size));
            made.map_err(|error| Error::new("guest", path.display(), error))?;
        }
        let host = |side: usize| {
            let disks = [
                format!("vda,file={},size={size}", images[side].display()),
                format!("vdb,file={},ro", tools.display()),
                "vdc,external,shared".to_owned(),
                "sr0".to_owned(),
            ];
            let driver = match driven {
                true => format!("qmp:{}", nursery.driver(SIDES[side]).display()),
                false => "none".to_owned(),
            };
            Host::start_with(scratch, executable, SIDES[side], &disks, &["--vmm", &driver], log)
        };
        let hosts = [host(0)?, host(1)?];
        hosts[0].ask("claim", &[])?;
        let mut here = body(&nursery, &hosts[0], SIDES[0], false)?;
        here.live(2)?;
        Ok(Self { nursery, hosts, images, side: 0, here })
    }

    /// Moves the guest to the other side, each host driving its own QEMU; `shown`: with the progress on this process's
    /// stdout.
    pub(crate) fn migrate(&mut self, options: &[&str], shown: bool) -> Result<Moved> {
        let other = 1 - self.side;
        self.here.tell("mark")?;
        let early = self.early(other)?;
        let arguments = [&[self.hosts[other].migration.as_str()], options].concat();
        let mut command = self.hosts[self.side].command("migrate", &arguments);
        let began = Instant::now();
        let output = move || {
            if shown {
                return util::run("migrate", &mut command, MIGRATION, util::Output::Shown).map(drop);
            }
            let said = util::capture("migrate", &mut command, MIGRATION)?;
            let wrong = || Error::new("migrate", said.status, &said.stderr);
            if said.status.success() { Ok(()) } else { Err(wrong()) }
        };
        let order = thread::spawn(output);
        let there = self.late(other, early, || !order.is_finished());
        let ended = order.join().map_err(|_| Error::new("migrate", "the thread", "panicked"))?;
        let took = began.elapsed();
        // Without the one the other cannot go well, and is only the consequence.
        let there = there?;
        ended?;
        self.arrive(there, took)
    }

    /// The same where no host drives a QEMU: the disks are held until the guest's memory and
    /// devices have moved by QEMU's own migration and it stands still on both sides; then they are handed over, and it
    /// goes on.
    pub(crate) fn migrate_by_hand(&mut self, options: &[&str]) -> Result<Moved> {
        let other = 1 - self.side;
        self.here.tell("mark")?;
        let early = self.early(other)?;
        let began = Instant::now();
        let held = [&[self.hosts[other].migration.as_str(), "--hold", "--detach"], options].concat();
        let source = &self.hosts[self.side];
        source.ask("migrate", &held)?;
        let mut there = self.late(other, early, || true)?;
        self.wait_for(self.side, "converged", |status| status.contains("\"converged\":true"))?;
        native::memory_and_devices(&mut self.here, &mut there)?;
        source.ask("switch", &[])?;
        let done = self.wait_for(self.side, "done", |status| status.contains("{\"type\":\"done\""))?;
        if demo_host::text(&done, "owner") != Some("destination") {
            return Err(there.machine.wrong(&format!("switch: {done}")));
        }
        there.qmp.ask("cont")?;
        let took = began.elapsed();
        self.here.qmp.ask("quit")?;
        self.arrive(there, took)
    }

    /// The QEMU that waits for the guest, if its disks can be opened before the migration begins: a host that gave the
    /// guest away shows them only when it gets it back.
    fn early(&self, other: usize) -> Result<Option<Body>> {
        if self.state(other)? == "given" {
            return Ok(None);
        }
        body(&self.nursery, &self.hosts[other], SIDES[other], true).map(Some)
    }

    /// The QEMU that waits for the guest; started now, as soon as it can be, if it was not before.
    fn late(&self, other: usize, early: Option<Body>, goes_on: impl Fn() -> bool) -> Result<Body> {
        if let Some(early) = early {
            return Ok(early);
        }
        self.wait_for(other, "receiving", |status| {
            // An order that has failed is its own error.
            !goes_on() || demo_host::text(status, "state").is_some_and(|state| state != "given")
        })?;
        body(&self.nursery, &self.hosts[other], SIDES[other], true)
    }

    /// The guest has moved.
    fn arrive(&mut self, there: Body, took: Duration) -> Result<Moved> {
        let done = self.hosts[self.side].done()?;
        let mut left = std::mem::replace(&mut self.here, there);
        self.side = 1 - self.side;
        left.machine.quits()?;
        Ok(Moved { done, took })
    }

    /// Waits until a host's status is as wanted; returns it.
    fn wait_for(&self, side: usize, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + MIGRATION;
        loop {
            let status = self.hosts[side].ask("status", &["--json"])?;
            if is_so(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(Error::new("guest", format!("never {what}"), status));
            }
            thread::sleep(LOOK);
        }
    }

    /// What a host says of its record: the state's name.
    pub(crate) fn state(&self, side: usize) -> Result<String> {
        let status = self.hosts[side].ask("status", &["--json"])?;
        Ok(demo_host::text(&status, "state").unwrap_or_default().to_owned())
    }

    /// Which disks move and which stay, and why, in the host's own words: `NAME: moves` or `NAME: REASON`, with commas.
    pub(crate) fn moves(&self) -> Result<String> {
        let status = self.hosts[self.side].ask("status", &["--json"])?;
        let disks = status.split_once("\"disks\":[").map_or("", |(_, rest)| rest);
        let each = disks.split("{\"name\":\"").skip(1).map(|disk| {
            let name = disk.split('"').next().unwrap_or_default();
            format!("{name}: {}", demo_host::text(disk, "stays").unwrap_or("moves"))
        });
        Ok(each.collect::<Vec<_>>().join(", "))
    }

    /// Bytes that the moving disk's image really takes on a side.
    pub(crate) fn allocated(&self, side: usize) -> Result<u64> {
        let path = &self.images[side];
        let facts = std::fs::metadata(path).map_err(|error| Error::new("guest", path.display(), error))?;
        Ok(facts.blocks() * 512)
    }
}

/// A QEMU on a host's guest door.
fn body(nursery: &Nursery, host: &Host, side: &str, waits: bool) -> Result<Body> {
    let disks = [Backing::Export(&host.door, "vda"), Backing::ReadOnly(&host.door, "vdb")];
    nursery.start(side, &disks, waits)
}

/// What the guest's own account must be of the disks that it has, in the words of `disks`.
pub(crate) fn disks_inside(size: u64) -> String {
    format!("sr0=empty vda={size} vdb={TOOLS},ro vdc={},ro", crate::clock::SIZE)
}
