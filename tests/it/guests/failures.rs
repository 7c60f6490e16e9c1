//! What may fail while a guest's state moves, in the order of the table in `docs/vmm.md`: before GIVEN the guest always
//! goes on at the source and none of it runs at the destination.

use super::*;
use crate::harness::throughout;

/// Bytes of memory that no buffer between two QEMUs holds: sockets grow to some MiB.
const MORE_THAN_FITS: usize = 28 << 20;
/// The state does not move for longer than a driver bears.
const STALLED: &str = "the guest's state does not move";

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
    assert!(busy.stderr.contains("-incoming defer"), "{busy:?}");
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

#[test]
fn cancelled_while_the_state_moves() {
    let Some(mut scene) = Scene::new(3) else { return };
    let migration = scene.migrate_slowly();
    scene.a.ask(&["cancel"]).well();
    scene.stays(migration, "cancel");
    scene.waiting.until_state("gone");
    scene.moves_later("running");
}

#[test]
fn somebody_cancels_at_the_monitor_while_the_state_moves() {
    let Some(mut scene) = Scene::new(15) else { return };
    let migration = scene.migrate_slowly();
    scene.guest.tell("migrate_cancel");
    scene.stays(migration, "the state does not go");
    scene.moves_later("running");
}

#[test]
fn the_destination_s_vmm_dies_while_the_state_moves() {
    let Some(mut scene) = Scene::new(4) else { return };
    let migration = scene.migrate_slowly();
    scene.waiting.program.kill();
    scene.stays(migration, "");
    scene.moves_later("running");
}

#[test]
fn the_destination_dies_while_the_state_moves() {
    let Some(mut scene) = Scene::new(5) else { return };
    let migration = scene.migrate_slowly();
    scene.b.program.kill();
    scene.stays(migration, "");
    // Its stream was cut off, and QEMU ends by itself.
    scene.waiting.until_state("gone");
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
fn m11_a_vmm_that_runs_before_it_may_ends_the_attempt() {
    let Some(mut scene) = Scene::new(8) else { return };
    let migration = scene.migrate_slowly();
    // As if it had not been started with -S: it runs as soon as it is loaded.
    scene.waiting.tell("cont");
    scene.a.ask(&["set", "--bandwidth", "0"]).well();
    scene.stays(migration, "runs before it was handed over");
    scene.waiting.until_state("gone");
    scene.moves_later("running");
}

#[test]
fn a_guest_that_was_paused_stays_paused_whatever_comes_of_it() {
    let Some(mut scene) = Scene::new(2) else { return };
    scene.guest.tell("stop");
    scene.guest.until_state("paused");
    let migration = scene.migrate_slowly();
    scene.a.ask(&["cancel"]).well();
    scene.stays_as(migration, "paused", "cancel");
    scene.moves_later("paused");
}

/// The guest stands, and whoever was to take it is gone. QEMU does not notice.
#[test]
fn the_destination_is_lost_in_pre_switchover() {
    let Some(mut scene) = Scene::new(16) else { return };
    let migration = scene.migrate_until_it_stands();
    scene.b.program.kill();
    let lost = Instant::now();
    scene.guest.until_state("running");
    assert!(lost.elapsed() < Duration::from_secs(15), "it stood for {:?}", lost.elapsed());
    scene.stays(migration, "");
    scene.waiting.until_state("gone");
}

#[test]
fn the_network_is_lost_in_pre_switchover() {
    let Some(mut scene) = Scene::new(17) else { return };
    let migration = scene.migrate_until_it_stands();
    scene.relay.refuse();
    scene.relay.cut_all();
    let lost = Instant::now();
    scene.guest.until_state("running");
    assert!(lost.elapsed() < Duration::from_secs(15), "it stood for {:?}", lost.elapsed());
    scene.stays(migration, "");
    scene.relay.heal();
    scene.moves_later("running");
}

/// Whoever would have let the guest go on is dead: the next process of that host does.
#[test]
fn the_source_dies_in_pre_switchover() {
    for paused in [false, true] {
        let Some(mut scene) = Scene::new(23) else { return };
        if paused {
            scene.guest.tell("stop");
            scene.guest.until_state("paused");
        }
        let migration = scene.migrate_until_it_stands();
        scene.a.program.kill();
        drop(migration);
        assert_eq!(scene.guest.migration(), Ok(Status::PreSwitchover), "QEMU does not notice");
        scene.a = host(scene.folder.path(), "a");
        until("QEMU whose migration has ended", || (scene.guest.migration() == Ok(Status::Failed)).then_some(()));
        // QEMU's word for a guest that was paused before it was about to leave.
        scene.guest.until_state(if paused { "postmigrate" } else { "running" });
        assert_eq!(scene.a.state(), "owner");
        if paused {
            let refused = scene.a.migrate(&scene.relay.address, &[]);
            assert!(refused.code == Some(1) && refused.stderr.contains("'cont' at its monitor"), "{refused:?}");
            scene.guest.tell("cont");
        }
        scene.moves_later("running");
    }
}

/// The same when both VMMs are done and the guest was offered: who owns is settled first.
#[test]
fn the_source_dies_when_both_are_done() {
    let Some(mut scene) = Scene::new(24) else { return };
    scene.relay.set_trap(Trap { message: message::SEAL, passes: false, then: Then::CutAndRefuse });
    let migration = scene.migrate();
    scene.relay.until_sprung();
    scene.a.program.kill();
    drop(migration);
    assert_eq!(scene.guest.state(), "postmigrate");
    scene.a = host(scene.folder.path(), "a");
    // The destination may have been sealed: until it says that it is not, the guest stands.
    throughout(Duration::from_secs(2), || assert_ne!(scene.guest.state(), "running"));
    scene.relay.heal();
    scene.guest.until_state("running");
    scene.a.until_state("owner");
    scene.waiting.until_state("gone");
    scene.moves_later("running");
}

#[test]
fn cancelled_in_pre_switchover() {
    let Some(mut scene) = Scene::new(18) else { return };
    let migration = scene.migrate_until_it_stands();
    scene.a.ask(&["cancel"]).well();
    scene.stays(migration, "cancel");
    scene.relay.heal();
    scene.moves_later("running");
}

/// Nobody takes the last of the state: QEMU's monitor hangs until the state's socket is closed.
#[test]
fn the_last_of_the_state_stalls() {
    let Some(mut scene) = Scene::with_memory(19, MEMORY, MORE_THAN_FITS) else { return };
    let migration = scene.migrate_until_it_stands();
    scene.relay.silence_open(Kind::State);
    scene.relay.speak(Kind::Data);
    until("QEMU whose monitor hangs", || scene.guest.migration().err());
    scene.stays(migration, STALLED);
    scene.relay.heal();
    scene.moves_later("running");
}

#[test]
fn the_last_of_the_state_is_cut_off() {
    // With most of the memory still to be sent, and with what fits into a socket.
    for (seed, full) in [(20, MORE_THAN_FITS), (21, FULL / 4)] {
        let Some(mut scene) = Scene::with_memory(seed, MEMORY, full) else { return };
        let migration = scene.migrate_until_it_stands();
        scene.relay.silence_open(Kind::State);
        scene.relay.speak(Kind::Data);
        scene.guest.until_device();
        assert!(scene.relay.cut_one(Some(Kind::State), 0), "it has a connection of its own");
        let cut = Instant::now();
        scene.guest.until_state("running");
        assert!(cut.elapsed() < Duration::from_secs(15), "it stood for {:?}", cut.elapsed());
        // Either of the two VMM's sockets is the first to be noticed: its own word, or the relay's.
        scene.stays(migration, "state");
        scene.moves_later("running");
    }
}

#[test]
fn a_state_that_does_not_load() {
    let Some(mut scene) = Scene::with_memory(7, "64", FULL) else { return };
    let migration = scene.migrate();
    scene.stays(migration, "");
    scene.moves_later("running");
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
        // Nobody could tell the destination. The next attempt ends the VMM that has loaded the guest, and says so.
        scene.relay.heal();
        let refused = scene.a.migrate(&scene.relay.address, &["--overwrite"]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        scene.waiting.until_state("gone");
        scene.moves_later("running");
    }
}

/// The source is gone for good, and the operator says who owns: what was loaded here runs.
#[test]
fn a_sealed_guest_that_is_taken_over_runs() {
    let Some(mut scene) = Scene::new(22) else { return };
    scene.relay.set_trap(Trap { message: message::GO, passes: false, then: Then::CutAndRefuse });
    let migration = scene.migrate();
    scene.relay.until_sprung();
    scene.a.program.kill();
    scene.guest.program.kill();
    drop(migration);
    scene.b.until_state("sealed");
    scene.waiting.until_state("paused");
    scene.b.ask(&["recover", "--take-ownership"]).well();
    scene.b.until_state("owner");
    scene.waiting.until_state("running");
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
