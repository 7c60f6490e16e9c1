//! The same where everything has to go through one connection: the guest's state travels with its disks.

use rustix::process::{Pid, Signal, kill_process};

use super::*;
use crate::harness::pause;
use crate::host::{PATIENCE, executable};

const STREAM: [&str; 3] = ["--transport", "stream", "--json"];

/// The capability of whoever takes a state inside the phase connection.
const STATE: u64 = 1 << 3;

/// A way to a host by a command that leaves its number, a line each time it is run, in a file.
fn through(folder: &Path, host: &Host) -> (String, PathBuf) {
    let runs = folder.join("runs");
    let _ = std::fs::remove_file(&runs);
    let accept = format!("{} accept g1 --control {}", executable().display(), host.control());
    (format!("exec:sh -c 'echo $$>>{};exec {accept}'", runs.display()), runs)
}

/// The numbers of the commands that were run.
fn runs(file: &Path) -> Vec<Pid> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| Pid::from_raw(line.parse().unwrap()).unwrap()).collect()
}

/// Whether it was said that the state moves, with some of it gone.
fn moves(line: &Json) -> bool {
    line.get("phase").text() == "state" && line.get("state_bytes").number() > 0
}

impl Scene {
    fn stream(&self, options: &[&str]) -> Migration {
        self.a.start_migrate(&self.relay.address, &[&STREAM[..2], options].concat())
    }
}

#[test]
fn a_command_carries_a_guest_there_and_back_and_is_run_once() {
    let Some(mut scene) = Scene::new(31) else { return };
    let (to, file) = through(scene.folder.path(), &scene.b);
    let ended = scene.a.start_migrate(&to, &["--downtime-limit", "1000"]).wait();
    ended.well();
    assert!(ended.done().get("state_bytes").number() > 100_000, "{:?}", ended.done());
    scene.arrived();
    assert_eq!(runs(&file).len(), 1, "one connection");
    scene.guest.until_state("gone");
    scene.guest = Qemu::start(scene.folder.path(), &scene.a, "a", MEMORY, &WAITS).unwrap();
    let (to, file) = through(scene.folder.path(), &scene.a);
    scene.b.start_migrate(&to, &["--copy-storage-inc", "--downtime-limit", "1000"]).wait().well();
    scene.guest.until_state("running");
    scene.waiting.until_state("gone");
    assert_eq!((scene.a.state().as_str(), scene.b.state().as_str()), ("owner", "given"));
    assert_eq!(runs(&file).len(), 1, "one connection");
}

#[test]
fn a_stream_over_tcp_is_one_connection_and_an_older_destination_gets_two() {
    for (seed, hidden, connections) in [(32, 0, 1), (33, STATE, 2)] {
        let Some(mut scene) = Scene::new(seed) else { return };
        scene.relay.hide(hidden);
        scene.stream(&["--downtime-limit", "1000"]).wait().well();
        scene.arrived();
        assert_eq!(scene.relay.accepted(), connections);
        scene.guest.until_state("gone");
    }
}

#[test]
fn the_command_is_killed_while_the_state_moves() {
    let Some(mut scene) = Scene::new(34) else { return };
    let (to, file) = through(scene.folder.path(), &scene.b);
    let migration = scene.migrate_slowly_to(&to, &[]);
    let began = Instant::now();
    kill_process(runs(&file)[0], Signal::KILL).unwrap();
    scene.stays(migration, "the peer closed the connection (sh: killed by signal 9)");
    assert!(began.elapsed() < Duration::from_secs(20), "the state was lost with it: {:?}", began.elapsed());
    scene.waiting.until_state("gone");
    // A second try, with another QEMU there, works.
    scene.waiting = Qemu::start(scene.folder.path(), &scene.b, "b", MEMORY, &WAITS).unwrap();
    scene.waiting.until_state("inmigrate");
    scene.b.until_state("incoming");
    scene.a.start_migrate(&to, &["--overwrite"]).wait().well();
    scene.arrived();
}

/// Both VMMs are done, and the source cannot hear that the destination's is.
#[test]
fn the_connection_is_lost_when_both_are_done() {
    for (seed, then) in [(35, Then::CutAndRefuse), (36, Then::Stall)] {
        let Some(mut scene) = Scene::new(seed) else { return };
        scene.relay.set_trap(Trap { message: message::STATE_QUESTION, passes: false, then });
        let migration = scene.stream(&[]);
        scene.relay.until_sprung();
        scene.stays(migration, "");
    }
}

/// The destination has said "loaded", and then nothing comes through any more: the guest stands, and is not kept
/// waiting for as long as somebody dials.
#[test]
fn nothing_is_mended_while_the_guest_stands() {
    for (seed, stream) in [(40, false), (41, true)] {
        let Some(mut scene) = Scene::new(seed) else { return };
        scene.relay.set_trap(Trap { message: message::STATE_IS, passes: true, then: Then::CutAndRefuse });
        let migration = if stream { scene.stream(&[]) } else { scene.migrate() };
        scene.relay.until_sprung();
        let sprung = Instant::now();
        scene.guest.until_state("running");
        assert!(sprung.elapsed() < Duration::from_secs(15), "it stood for {:?}", sprung.elapsed());
        // The guest was offered: whether anybody has it, only the destination can say (M5).
        scene.relay.heal();
        scene.stays(migration, "");
    }
}

/// What comes after "loaded" may come over another connection.
#[test]
fn seal_is_lost_and_said_again_over_another_connection() {
    let Some(mut scene) = Scene::new(37) else { return };
    scene.relay.set_trap(Trap { message: message::SEAL, passes: false, then: Then::Cut });
    let migration = scene.stream(&[]);
    scene.relay.until_sprung();
    migration.wait().well();
    scene.arrived();
}

#[test]
fn cancelled_or_without_a_vmm_there_while_the_state_moves_the_connection_lives() {
    let Some(mut scene) = Scene::new(38) else { return };
    let migration = scene.migrate_slowly_to(&scene.relay.address, &STREAM[..2]);
    scene.a.ask(&["cancel"]).well();
    scene.stays(migration, "cancel");
    scene.waiting.until_state("gone");
    scene.b.until_state("incoming");

    scene.waiting = Qemu::start(scene.folder.path(), &scene.b, "b", MEMORY, &WAITS).unwrap();
    scene.waiting.until_state("inmigrate");
    let migration = scene.migrate_slowly_to(&scene.relay.address, &["--transport", "stream", "--overwrite"]);
    let before = scene.relay.accepted();
    scene.waiting.program.kill();
    scene.stays(migration, "");
    assert_eq!(scene.relay.accepted(), before, "said, and answered, inside the connection");
}

/// The destination's VMM takes nothing for a while: its guest waits, and the disks of it do not.
#[test]
fn a_vmm_that_takes_nothing_holds_nobody_up() {
    let Some(mut scene) = Scene::new(39) else { return };
    let migration = scene.migrate_slowly_to(&scene.relay.address, &STREAM[..2]);
    let waiting = Pid::from_raw(i32::try_from(scene.waiting.program.id()).unwrap()).unwrap();
    kill_process(waiting, Signal::STOP).unwrap();
    scene.a.ask(&["set", "--bandwidth", "0"]).well();
    // What fits, fits; then the state stands still.
    let mut last = 0;
    loop {
        let line = migration.until_turn("the state", moves);
        let now = line.get("state_bytes").number();
        if now == last {
            break;
        }
        last = now;
        pause(Duration::from_millis(500));
    }
    // A sector that nobody looks at, in the last granule of the disk.
    let offset = SIZE - 512;
    scene.a.try_write("vda", offset).unwrap();
    until_at(&scene.image("b"), offset, 0x5a);
    kill_process(waiting, Signal::CONT).unwrap();
    migration.wait().well();
    scene.waiting.until_state("running");
    assert_same(&scene.image("a"), &scene.image("b"));
}

/// Waits until an image holds a sector of such bytes.
fn until_at(image: &Path, offset: u64, byte: u8) {
    use std::os::unix::fs::FileExt as _;
    crate::harness::until_within(PATIENCE, "a block at the destination", || {
        let mut sector = [0; 512];
        std::fs::File::open(image).ok()?.read_exact_at(&mut sector, offset).ok()?;
        sector.iter().all(|at| *at == byte).then_some(())
    });
}
