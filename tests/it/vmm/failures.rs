//! What may fail while a guest's state moves: before GIVEN the guest always runs on at the source, none of it runs at
//! the destination, and a later migration works.

use super::{Pair, Qemu, peer};

/// QEMU at the destination is gone, or never had anything of the guest.
fn nothing_is_left(there: &mut Qemu) {
    if there.program.ended().is_none() {
        let status = there.status();
        assert!(["inmigrate", ""].contains(&status.as_str()), "the destination's QEMU is {status}");
    }
}

#[test]
fn active_and_cancelled() {
    let Some(mut pair) = Pair::start() else { return };
    let migration = pair.slowly();
    pair.a.ask(&["cancel"]).well();
    migration.wait().aborted();
    nothing_is_left(&mut pair.there);
    pair.stayed("running");
}

#[test]
fn active_and_the_destinations_qemu_dies() {
    let Some(mut pair) = Pair::start() else { return };
    let migration = pair.slowly();
    pair.there.program.kill();
    migration.wait().aborted();
    pair.stayed("running");
}

#[test]
fn active_and_somebody_cancels_at_the_monitor() {
    let Some(mut pair) = Pair::start() else { return };
    let migration = pair.slowly();
    pair.here.tell("\"migrate_cancel\"");
    migration.wait().aborted();
    nothing_is_left(&mut pair.there);
    pair.stayed("running");
}

#[test]
fn active_and_the_destinations_process_dies() {
    let Some(mut pair) = Pair::start() else { return };
    let migration = pair.slowly();
    pair.b.program.kill();
    migration.wait().aborted();
    pair.here.until_status("running");
    assert_eq!(pair.a.state(), "owner");
    // Its stream was cut off, and QEMU ends by itself.
    pair.there.program.wait();
}

#[test]
fn m11_a_guest_that_runs_early_at_the_destination_ends_the_attempt() {
    let Some(mut pair) = Pair::start() else { return };
    let migration = pair.slowly();
    // As if it had not been started with -S: it runs as soon as it is loaded.
    pair.there.tell("\"cont\"");
    pair.a.ask(&["set", "--bandwidth", "0"]).well();
    migration.wait().aborted();
    nothing_is_left(&mut pair.there);
    pair.stayed("running");
}

#[test]
fn a_paused_guest_stays_paused_when_the_attempt_fails() {
    let Some(pair) = Pair::start() else { return };
    pair.here.tell("\"stop\"");
    pair.here.until_status("paused");
    let migration = pair.slowly();
    pair.a.ask(&["cancel"]).well();
    migration.wait().aborted();
    pair.stayed("paused");
}

#[test]
fn a_qemu_that_waits_for_no_guest_refuses_before_anything_moves() {
    let Some(mut pair) = Pair::start() else { return };
    pair.there.program.kill();
    let qemu = peer("qemu-system-x86_64").expect("it was there");
    pair.there = Qemu::start(&qemu, pair.folder.path(), "b", false);
    let refused = pair.a.migrate(&pair.b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("-incoming defer"), "{refused:?}");
    pair.stayed("running");
}
