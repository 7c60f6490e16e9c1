//! Guests in a real QEMU, memory, devices and disk, moved by `--vmm qmp:`; and everything that may fail on the way.
//!
//! The guests are firmware without a system to boot: what is looked at is where a QEMU runs, stands, or is gone, who
//! owns the disk, and that both are the same host. What a guest itself sees of it is `cargo xtask vm guest`.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockferry::vmm::qmp::Qmp;
use tempfile::TempDir;

use crate::chance::Chance;
use crate::harness::{Program, peer, scratch, until};
use crate::host::{Host, Migration, blockferry};
use crate::json::Json;
use crate::migrations::assert_same;
use crate::relay::{Relay, Then, Trap, message};
use crate::writer::Ledger;

mod inside;

const SIZE: u64 = 16 << 20;
/// Mebibytes of a guest's memory.
const MEMORY: &str = "48";
/// Bytes of it that are not zero: they have to move.
const FULL: usize = 8 << 20;
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
        until("a QEMU's monitor", || {
            assert!(program.ended().is_none(), "QEMU has ended");
            monitor.exists().then_some(())
        });
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
        let mut last = String::new();
        until(&format!("QEMU {wanted}"), || {
            last = self.state();
            (last == wanted).then_some(())
        });
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
        Self::with_memory(seed, MEMORY)
    }

    /// The destination's QEMU has so much memory.
    fn with_memory(seed: u64, memory: &str) -> Option<Self> {
        peer("qemu-system-x86_64")?;
        let folder = scratch();
        let ledger = Ledger::format(&folder.path().join("a.img"), SIZE, seed, 60);
        let (a, b) = (host(folder.path(), "a"), host(folder.path(), "b"));
        a.ask(&["claim"]).well();
        let memory_image = folder.path().join("memory");
        std::fs::write(&memory_image, Chance::new(seed).bytes(FULL)).unwrap();
        let loader = format!("loader,file={},addr=0x1000000,force-raw=on", memory_image.display());
        let mut guest = Qemu::start(folder.path(), &a, "a", MEMORY, &["-device", &loader])?;
        let mut waiting = Qemu::start(folder.path(), &b, "b", memory, &["-incoming", "defer", "-S"])?;
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

    fn image(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.img"))
    }

    /// The migration came to nothing, and the guest runs where it was.
    fn stays(&mut self, migration: Migration, cause: &str) {
        let ended = migration.wait();
        ended.aborted();
        let told = ended.done().get("cause").text().to_owned();
        assert!(told.contains(cause), "{told}");
        self.guest.until_state("running");
        self.a.until_state("owner");
        self.ledger.verify_file(&self.image("a")).assert_whole();
        let other = self.waiting.state();
        assert_ne!(other, "running", "two guests run");
    }

    /// The guest is at the destination, alone.
    fn arrived(&mut self) {
        self.waiting.until_state("running");
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
    scene.guest = Qemu::start(scene.folder.path(), &scene.a, "a", MEMORY, &["-incoming", "defer", "-S"]).unwrap();
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
}

#[test]
fn cancelled_while_the_state_moves_and_again() {
    let Some(mut scene) = Scene::new(3) else { return };
    let migration = scene.migrate_slowly();
    scene.a.ask(&["cancel"]).well();
    scene.stays(migration, "cancel");
    scene.waiting.until_state("gone");
    // A second try, with another QEMU there, works.
    scene.waiting = Qemu::start(scene.folder.path(), &scene.b, "b", MEMORY, &["-incoming", "defer", "-S"]).unwrap();
    scene.waiting.until_state("inmigrate");
    scene.a.start_migrate(&scene.relay.address, &["--overwrite"]).wait().well();
    scene.arrived();
}

#[test]
fn the_destination_s_vmm_dies_while_the_state_moves() {
    let Some(mut scene) = Scene::new(4) else { return };
    let migration = scene.migrate_slowly();
    scene.waiting.program.kill();
    scene.stays(migration, "");
}

#[test]
fn the_destination_dies_while_the_state_moves() {
    let Some(mut scene) = Scene::new(5) else { return };
    let migration = scene.migrate_slowly();
    scene.b.program.kill();
    scene.stays(migration, "");
}

#[test]
fn the_network_goes_away_while_the_state_moves() {
    let Some(mut scene) = Scene::new(6) else { return };
    let migration = scene.migrate_slowly();
    scene.relay.refuse();
    scene.relay.cut_all();
    scene.stays(migration, "");
}

#[test]
fn a_state_that_does_not_load() {
    let Some(mut scene) = Scene::with_memory(7, "64") else { return };
    let migration = scene.migrate();
    scene.stays(migration, "");
}

#[test]
fn a_vmm_that_runs_before_it_may_ends_the_attempt() {
    let Some(mut scene) = Scene::new(8) else { return };
    let migration = scene.migrate_slowly();
    scene.waiting.tell("cont");
    scene.a.ask(&["set", "--bandwidth", "0"]).well();
    scene.stays(migration, "runs before it was handed over");
    scene.waiting.until_state("gone");
}

/// Both VMMs are done, and the source cannot hear that the destination's is.
#[test]
fn the_link_is_lost_when_both_are_done() {
    for (seed, then) in [(9, Then::CutAndRefuse), (10, Then::Stall)] {
        let Some(mut scene) = Scene::new(seed) else { return };
        scene.relay.set_trap(Trap { message: message::STATE_QUESTION, passes: false, then });
        let migration = scene.migrate();
        scene.relay.until_sprung();
        scene.stays(migration, "");
    }
}

/// M2, M3: the destination is sealed, the source does not hear it: the attempt ends, and only then the guest goes on.
#[test]
fn sealed_is_not_heard() {
    let Some(mut scene) = Scene::new(11) else { return };
    scene.relay.set_trap(Trap { message: message::SEALED, passes: false, then: Then::CutAndRefuse });
    let migration = scene.migrate();
    scene.relay.until_sprung();
    scene.stays(migration, "");
    // The sealed host asks its source, hears "not given", and ends the VMM that has loaded an old guest (M11).
    scene.waiting.until_state("gone");
    scene.b.until_state("incoming");
}

/// After GIVEN the source's guest never runs again; the destination's does when GO has come.
#[test]
fn go_is_lost_and_repeated_even_to_another_process() {
    for (seed, restart) in [(12, false), (13, true)] {
        let Some(mut scene) = Scene::new(seed) else { return };
        scene.relay.set_trap(Trap { message: message::GO, passes: false, then: Then::CutAndRefuse });
        let migration = scene.migrate();
        scene.relay.until_sprung();
        if restart {
            scene.b.program.kill();
            scene.b = host(scene.folder.path(), "b");
            scene.relay.lead_to(&scene.b.listen);
        }
        let ended = migration.wait();
        // A sealed host asks its source by itself, which may be before the command has lost its patience.
        assert!(matches!(ended.code, Some(0 | 4 | 5)), "{}", ended.stderr);
        assert_ne!(scene.guest.state(), "running");
        scene.relay.heal();
        scene.b.until_state("owner");
        scene.arrived();
        assert_ne!(scene.guest.state(), "running");
    }
}

#[test]
fn what_cannot_go_well_is_refused_before_the_first_byte() {
    let Some(mut scene) = Scene::new(14) else { return };
    // Its VMM runs already.
    let folder = scene.folder.path().to_owned();
    scene.waiting.program.kill();
    let gone = scene.a.migrate(&scene.b.listen, &[]);
    assert_eq!(gone.code, Some(1), "{gone:?}");
    assert!(gone.stderr.contains("the VMM at ") && gone.stderr.ends_with("nothing has changed\n"), "{gone:?}");
    scene.waiting = Qemu::start(&folder, &scene.b, "b", MEMORY, &["-S"]).unwrap();
    scene.waiting.until_state("prelaunch");
    let busy = scene.a.migrate(&scene.b.listen, &[]);
    assert_eq!(busy.code, Some(1), "{busy:?}");
    assert!(busy.stderr.contains("it is 'prelaunch' and waits for no guest"), "{busy:?}");
    // A destination without a driver, and a source without a guest.
    let plain = Host::start(&folder, "c", &[&format!("vda,file={}", folder.join("c.img").display())]);
    let lacks = scene.a.migrate(&plain.listen, &[]);
    assert_eq!(lacks.code, Some(1), "{lacks:?}");
    assert!(lacks.stderr.contains("moves the guest's state, and here is --vmm none"), "{lacks:?}");
    scene.guest.program.kill();
    let nobody = scene.a.migrate(&plain.listen, &[]);
    assert_eq!(nobody.code, Some(1), "{nobody:?}");
    assert!(nobody.stderr.contains("migrate: g1: the VMM at "), "{nobody:?}");
}
