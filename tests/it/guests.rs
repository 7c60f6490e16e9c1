//! Guests in a real QEMU, memory, devices and disk, moved by `--vmm qmp:`. What may fail on the way is in
//! `failures.rs`; `inside.rs` has the same where everything goes through one connection.
//!
//! The guests are firmware without a system to boot: what is looked at is where a QEMU runs, stands, or is gone, who
//! owns the disk, and that both are the same host. What a guest itself sees of it is `cargo xtask vm guest`.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockferry::vmm::qmp::{Qmp, Status};
use tempfile::TempDir;

use crate::chance::Chance;
use crate::harness::{Program, peer, scratch, until};
use crate::host::{Host, Migration, blockferry};
use crate::json::Json;
use crate::migrations::assert_same;
use crate::relay::{Kind, Relay, Then, Trap, message};
use crate::writer::Ledger;

mod failures;
mod inside;

const SIZE: u64 = 16 << 20;
/// Mebibytes of a guest's memory.
const MEMORY: &str = "48";
/// Bytes of it that are not zero: they have to move.
const FULL: usize = 8 << 20;
/// What a QEMU is told that waits for a guest.
const WAITS: [&str; 3] = ["-incoming", "defer", "-S"];
/// Bytes a second at which they take some seconds.
const SLOW: &str = "1000000";

/// A QEMU with its disk on a host's guest door, a monitor for blockferry and one for the test.
struct Qemu {
    program: Program,
    monitor: PathBuf,
}

impl Qemu {
    fn start(folder: &Path, host: &Host, name: &str, memory: &str, arguments: &[&str]) -> Option<Self> {
        let program = peer("qemu-system-x86_64")?;
        let place = |what: &str| folder.join(format!("{name}.{what}"));
        let door = host.door.to_string();
        let door = door.strip_prefix("unix://").unwrap();
        let monitor = place("monitor");
        let mut command = Command::new(program);
        command.args(["-accel", "tcg", "-M", "q35", "-m", memory, "-nodefaults", "-display", "none"]);
        for path in [place("qmp"), monitor.clone()] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        command.arg("-blockdev").arg(format!(
            "driver=nbd,node-name=n0,server.type=unix,server.path={door},export=vda,reconnect-delay=60,\
             open-timeout=30,discard=unmap,cache.direct=on,auto-read-only=off"
        ));
        command.args(["-blockdev", "driver=raw,node-name=d0,file=n0,discard=unmap,cache.direct=on"]);
        command.args(["-device", "virtio-blk-pci,drive=d0,werror=stop,rerror=stop"]).args(arguments);
        let mut program = Program::start(command.stderr(Stdio::null()));
        program.until_listens(&monitor);
        Some(Self { program, monitor })
    }

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn tell(&self, command: &str) {
        let mut qmp = Qmp::connect(&self.monitor, Self::deadline()).unwrap();
        qmp.execute(command, "", Self::deadline()).unwrap();
    }

    /// QEMU's word for how its guest is; `gone` when there is no QEMU any more.
    fn state(&mut self) -> String {
        let asked = Qmp::connect(&self.monitor, Self::deadline()).and_then(|mut qmp| qmp.run_state(Self::deadline()));
        match asked {
            Ok(state) => state.word,
            Err(_) if self.program.ended().is_some() => "gone".to_owned(),
            Err(cause) => cause,
        }
    }

    fn until_state(&mut self, wanted: &str) {
        until(&format!("QEMU {wanted}"), || (self.state() == wanted).then_some(()));
    }

    /// How its migration is.
    fn migration(&self) -> Result<Status, String> {
        let deadline = Instant::now() + Duration::from_secs(1);
        Ok(Qmp::connect(&self.monitor, deadline)?.migration(deadline)?.0)
    }

    /// Waits until its guest stands and only the last of its state is left to send.
    fn until_pre_switchover(&self) {
        until("QEMU in pre-switchover", || (self.migration() == Ok(Status::PreSwitchover)).then_some(()));
    }

    /// Waits until the last of the state is on its way. QEMU does not answer then while nobody takes it.
    fn until_device(&self) {
        until("QEMU in device", || matches!(self.migration(), Ok(Status::Device) | Err(_)).then_some(()));
    }
}

/// Two hosts with a QEMU each, and a relay between them.
struct Scene {
    a: Host,
    b: Host,
    guest: Qemu,
    waiting: Qemu,
    relay: Relay,
    ledger: Ledger,
    folder: TempDir,
}

/// How a host is started: its state outlives its process.
fn host(folder: &Path, name: &'static str) -> Host {
    let (vmm, disk) = (folder.join(format!("{name}.qmp")), folder.join(format!("{name}.img")));
    let disk = format!("vda,file={},size={SIZE}", disk.display());
    Host::lasting_with(blockferry(), folder, name, &["--disk", &disk, "--vmm", &format!("qmp:{}", vmm.display())])
}

impl Scene {
    fn new(seed: u64) -> Option<Self> {
        Self::with_memory(seed, MEMORY, FULL)
    }

    /// The destination's QEMU has so much memory, and so many bytes of the guest's are not zero.
    fn with_memory(seed: u64, memory: &str, full: usize) -> Option<Self> {
        peer("qemu-system-x86_64")?;
        let folder = scratch();
        let ledger = Ledger::format(&folder.path().join("a.img"), SIZE, seed, 60);
        let (a, b) = (host(folder.path(), "a"), host(folder.path(), "b"));
        a.ask(&["claim"]).well();
        let memory_image = folder.path().join("memory");
        std::fs::write(&memory_image, Chance::new(seed).bytes(full)).unwrap();
        let loader = format!("loader,file={},addr=0x1000000,force-raw=on", memory_image.display());
        let mut guest = Qemu::start(folder.path(), &a, "a", MEMORY, &["-device", &loader])?;
        let mut waiting = Qemu::start(folder.path(), &b, "b", memory, &WAITS)?;
        guest.until_state("running");
        waiting.until_state("inmigrate");
        let relay = Relay::to(&b.listen);
        Some(Self { a, b, guest, waiting, relay, ledger, folder })
    }

    fn migrate(&self) -> Migration {
        self.a.start_migrate(&self.relay.address, &["--downtime-limit", "1000"])
    }

    /// A migration whose state is on its way, slowly.
    fn migrate_slowly(&self) -> Migration {
        self.migrate_slowly_to(&self.relay.address, &[])
    }

    fn migrate_slowly_to(&self, to: &str, options: &[&str]) -> Migration {
        let migration = self.a.start_migrate(to, &[&["--hold"], options].concat());
        migration.until_held();
        self.a.ask(&["set", "--bandwidth", SLOW]).well();
        self.a.ask(&["switch"]).well();
        migration.until_line("the state", |line| {
            line.get("type").text() == "progress"
                && line.get("phase").text() == "state"
                && line.get("state_bytes").number() > 0
        });
        migration
    }

    /// A migration whose guest stands, in `pre-switchover`: what is left of its disk to say does not get through. Most
    /// of its memory is still to be sent.
    fn migrate_until_it_stands(&self) -> Migration {
        // What could be sent within a minute, QEMU leaves for the time when the guest stands.
        let migration = self.a.start_migrate(&self.relay.address, &["--hold", "--downtime-limit", "60000"]);
        migration.until_held();
        self.a.ask(&["set", "--bandwidth", SLOW]).well();
        self.relay.set_trap(Trap { message: message::STATE, passes: true, then: Then::StallKind(Kind::Data) });
        self.a.ask(&["switch"]).well();
        self.guest.until_pre_switchover();
        migration
    }

    fn image(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.img"))
    }

    /// The migration came to nothing, and the guest runs where it was.
    fn stays(&mut self, migration: Migration, cause: &str) {
        self.stays_as(migration, "running", cause);
    }

    /// The same for a guest that is `state`.
    fn stays_as(&mut self, migration: Migration, state: &str, cause: &str) {
        let ended = migration.wait();
        ended.aborted();
        let told = ended.done().get("cause").text().to_owned();
        assert!(told.contains(cause), "{told}");
        assert!(!told.contains("; and "), "its VMM did not let it go on: {told}");
        self.guest.until_state(state);
        self.a.until_state("owner");
        self.ledger.verify_file(&self.image("a")).assert_whole();
        let other = self.waiting.state();
        assert_ne!(other, "running", "two guests run");
    }

    /// A later attempt works, with another QEMU there.
    fn moves_later(&mut self, state: &str) {
        self.waiting.program.kill();
        self.waiting = Qemu::start(self.folder.path(), &self.b, "b", MEMORY, &WAITS).unwrap();
        self.waiting.until_state("inmigrate");
        self.a.migrate(&self.b.listen, &["--overwrite", "--downtime-limit", "1000"]).well();
        self.arrived_as(state);
        self.guest.until_state("gone");
    }

    /// The guest is at the destination, alone.
    fn arrived(&mut self) {
        self.arrived_as("running");
    }

    /// The same for a guest that is `state`.
    fn arrived_as(&mut self, state: &str) {
        self.waiting.until_state(state);
        assert_eq!((self.a.state().as_str(), self.b.state().as_str()), ("given", "owner"));
        assert_same(&self.image("a"), &self.image("b"));
        self.ledger.verify_file(&self.image("b")).assert_whole();
    }
}

#[test]
fn a_guest_moves_there_and_back() {
    let Some(mut scene) = Scene::new(1) else { return };
    let ended = scene.migrate().wait();
    ended.well();
    let done = ended.done();
    assert!(done.get("state_bytes").number() > 100_000, "{done:?}");
    assert!(done.get("pause_us").number() >= done.get("switchover_us").number() / 2, "{done:?}");
    scene.arrived();
    scene.guest.until_state("gone");
    // Back: the QEMU that waits there opens its disk when PREPARE has opened the door to it.
    scene.guest = Qemu::start(scene.folder.path(), &scene.a, "a", MEMORY, &WAITS).unwrap();
    let back = scene.b.start_migrate(&scene.a.listen, &["--copy-storage-inc"]).wait();
    back.well();
    assert_eq!(back.done().get("sent_bytes").number(), 0, "nothing was written there");
    scene.guest.until_state("running");
    scene.waiting.until_state("gone");
    assert_eq!((scene.a.state().as_str(), scene.b.state().as_str()), ("owner", "given"));
}

#[test]
fn a_guest_that_was_paused_stays_paused_on_both() {
    let Some(mut scene) = Scene::new(2) else { return };
    scene.guest.tell("stop");
    scene.guest.until_state("paused");
    let ended = scene.migrate().wait();
    ended.well();
    assert!(matches!(ended.done().get("pause_us"), Json::Null), "nobody saw how long it stood");
    assert_eq!(scene.waiting.state(), "paused");
    scene.guest.until_state("gone");
    scene.waiting.tell("cont");
    scene.arrived();
    // Its monitor is free again: it can leave.
    scene.guest = Qemu::start(scene.folder.path(), &scene.a, "a", MEMORY, &WAITS).unwrap();
    scene.b.start_migrate(&scene.a.listen, &["--copy-storage-inc"]).wait().well();
    scene.guest.until_state("running");
}
