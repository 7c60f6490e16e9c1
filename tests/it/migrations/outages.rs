//! Lost and silent connections: how soon they are noticed, what is shown meanwhile, and what is sent again.

use std::time::{Duration, Instant};

use super::faults::Scene;
use super::{MIB, Pair, assert_same};
use crate::harness::{throughout, until_within};
use crate::host::{Ended, PATIENCE};
use crate::json::Json;
use crate::relay::{Kind, Relay, Then, Trap, message};

/// `LINK_SILENCE_MAX` and one PING, with time for a machine that has other things to do.
const NOTICED: Duration = Duration::from_secs(9);

/// How long the destination has been out of reach, if it is.
fn lost(line: &Json) -> Option<Duration> {
    let lost = || line.get("lost_ms");
    (line.get("type").text() == "progress" && *lost() != Json::Null).then(|| Duration::from_millis(lost().number()))
}

/// The longest time out of reach that was shown.
fn longest_lost(ended: &Ended) -> Duration {
    ended.lines.iter().filter_map(lost).max().unwrap_or_default()
}

#[test]
fn what_is_sent_again_is_counted_exactly() {
    // Nobody writes: each byte of data is needed once, and what is sent beyond that is sent again.
    let calm = |seed| Pair::new(48 * MIB, seed, 60);
    let pair = calm(91);
    let whole = pair.a.start_migrate(&pair.b.listen, &[]).wait();
    whole.well();
    assert_eq!(whole.done().get("resent_bytes").number(), 0);

    let pair = calm(91);
    let relay = Relay::to(&pair.b.listen);
    let migration = pair.a.start_migrate(&relay.address, &["--bandwidth", "20M"]);
    let mut hoarded = 0;
    for _ in 0..2 {
        let carried = relay.carried();
        relay.until_carried(carried + 2 * MIB);
        relay.hoard();
        until_within(PATIENCE, "hoarded writes", || (relay.hoarded() as u64 > hoarded + 2 * MIB).then_some(()));
        // What was hoarded before it was cut counts on.
        hoarded = relay.hoarded() as u64;
        relay.cut_all();
    }
    let ended = migration.wait();
    ended.well();
    assert_same(&pair.at_a(), &pair.at_b());
    let (sent, resent) = (ended.done().get("sent_bytes").number(), ended.done().get("resent_bytes").number());
    eprintln!("{hoarded} bytes were lost on the way, {resent} of {sent} were sent again");
    assert_eq!(sent - resent, whole.done().get("sent_bytes").number());
    // At least what stood in the relay (with its requests' heads), and never more than two windows.
    assert!((hoarded - MIB / 8..=2 * 32 * MIB).contains(&resent), "{resent}");
    let disks = ended.lines.iter().rev().find(|line| line.get("type").text() == "progress").expect("shown");
    assert_eq!(disks.get("disks").items()[0].get("resent_bytes").number(), resent);
}

#[test]
fn connections_that_fall_silent_are_noticed_in_seconds_and_opened_again() {
    let scene = Scene::begin(92, &["--bandwidth", "4M"]);
    scene.relay.until_carried(4 * MIB);
    let before = scene.relay.accepted();
    let began = Instant::now();
    scene.relay.silence_open(Kind::Data);
    scene.relay.silence_open(Kind::Phases);
    let line = scene.migration.until_line("a lost destination", |line| lost(line).is_some());
    assert!(began.elapsed() < NOTICED, "noticed after {:?}", began.elapsed());
    assert_eq!(line.get("lost_cause").text(), "the destination is silent");
    assert!(lost(&line) >= Some(Duration::from_secs(5)), "counted from when it was asked: {line:?}");
    until_within(PATIENCE, "new connections", || (scene.relay.accepted() >= before + 2).then_some(()));
    assert!(began.elapsed() < NOTICED, "mended after {:?}", began.elapsed());
    scene.arrives();
}

/// The destination has been asked for a fence, and its answer never comes: that is a dead link like any other, and no
/// slow disk.
#[test]
fn a_link_that_falls_silent_during_a_fence_is_dialled_again_in_seconds() {
    for (seed, passes) in [(93, true), (94, false)] {
        let scene = Scene::begin(seed, &["--bandwidth", "4M"]);
        scene.relay.until_carried(4 * MIB);
        let before = scene.relay.accepted();
        scene.relay.set_trap(Trap { message: message::FENCE, passes, then: Then::Stall });
        assert!(scene.relay.cut_one(Some(Kind::Data), 0));
        scene.relay.until_sprung();
        let began = Instant::now();
        until_within(PATIENCE, "new connections", || (scene.relay.accepted() >= before + 2).then_some(()));
        assert!(began.elapsed() < NOTICED, "mended after {:?}", began.elapsed());
        scene.arrives();
    }
}

#[test]
fn a_silent_link_is_waited_for_and_a_cancel_ends_that_at_once() {
    let scene = Scene::begin(95, &["--bandwidth", "10M"]);
    scene.relay.until_carried(4 * MIB);
    scene.relay.fall_silent();
    let first = scene.migration.until_line("a lost destination", |line| lost(line).is_some());
    // The time goes on while nothing else happens, and so does the guest.
    let later = lost(&first).map(|lost| lost + Duration::from_secs(2));
    scene.writer.until_more(200);
    scene.migration.until_line("time going on", |line| lost(line) >= later);
    let began = Instant::now();
    scene.pair.a.ask(&["cancel"]).well();
    let _ = scene.stays("cancelled by the user");
    eprintln!("cancelled while reconnecting: over after {:?}", began.elapsed());
    // LOST_PATIENCE, then the writer's last words and the comparison of the disks.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn a_link_that_is_silent_for_a_while_is_found_again_by_itself() {
    let scene = Scene::begin(96, &["--bandwidth", "4M"]);
    scene.relay.until_carried(4 * MIB);
    scene.relay.fall_silent();
    scene.migration.until_line("a lost destination", |line| lost(line).is_some());
    throughout(Duration::from_secs(4), || assert_eq!(scene.pair.a.state(), "owner"));
    let began = Instant::now();
    scene.relay.heal();
    scene.migration.until_turn("copying again", |line| lost(line).is_none());
    eprintln!("found again {:?} after the link was back", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    scene.arrives();
}

#[test]
fn the_time_goes_on_while_the_destination_prepares() {
    let pair = Pair::new(8 * MIB, 97, 60);
    let relay = Relay::to(&pair.b.listen);
    relay.delay(Duration::from_millis(400));
    let ended = pair.a.start_migrate(&relay.address, &["--downtime-limit", "10000"]).wait();
    ended.well();
    let prepare = ended.lines.iter().filter(|line| line.get("type").text() == "progress");
    let prepare = prepare.filter(|line| line.get("phase").text() == "prepare");
    let last = prepare.map(|line| line.get("elapsed_ms").number()).max().expect("shown");
    assert!(last >= 400, "{last} ms were shown at most");
    assert_eq!(longest_lost(&ended), Duration::ZERO, "a distant destination is not a lost one");
}
