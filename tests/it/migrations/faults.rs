//! Migrations over bad networks, and with hosts that die in the middle.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use super::load::{drawn, seeds};
use super::{MIB, Pair, file};
use crate::harness::{throughout, until_within};
use crate::host::{Host, Migration, PATIENCE, Watch, address, exactly_one_takes};
use crate::migrations::assert_same;
use crate::relay::{Kind, Relay, Then, Trap, message};
use crate::writer::{Dice, Ledger, Load, Mix, OnLoss, Writer};

/// A guest that writes the same places again and again.
fn busy(seed: u64) -> Load {
    Load { seed, connections: 2, depth: 8, mix: Mix::ALL, rate: 400, on_loss: OnLoss::Stop }
}

/// A pair with a relay between them, a guest that writes, and a migration that has begun to copy.
pub(super) struct Scene {
    pub(super) pair: Pair,
    pub(super) relay: Relay,
    pub(super) writer: Writer,
    watch: Watch,
    pub(super) migration: Migration,
}

impl Scene {
    pub(super) fn begin(seed: u64, options: &[&str]) -> Self {
        let mut pair = Pair::new(64 * MIB, seed, 60);
        let relay = Relay::to(&pair.b.listen);
        let writer = Writer::start(busy(seed), pair.ledger(), "vda", &[&pair.a.door]);
        writer.until_more(50);
        let watch = Watch::start(&pair.a, &pair.b);
        let migration = pair.a.start_migrate(&relay.address, &[options, &["--downtime-limit", "1000"]].concat());
        Self { pair, relay, writer, watch, migration }
    }

    /// It ends well, with every write.
    pub(super) fn arrives(self) -> (Pair, Relay, Ledger) {
        // What had to be hit has been hit. It may be over by now.
        let _ = self.pair.a.ask(&["set", "--bandwidth", "0"]);
        self.migration.wait().well();
        let ledger = self.writer.finish();
        self.watch.finish();
        assert_same(&self.pair.at_a(), &self.pair.at_b());
        self.pair.arrived(&ledger);
        (self.pair, self.relay, ledger)
    }

    /// It is aborted, with this cause, and the guest writes on.
    pub(super) fn stays(self, cause: &str) -> (Pair, Relay, Ledger) {
        let ended = self.migration.wait();
        ended.aborted();
        let told = ended.done().get("cause").text();
        assert!(told.contains(cause), "{told}");
        self.writer.until_more(50);
        let ledger = self.writer.finish();
        self.watch.finish();
        ledger.verify_file(&self.pair.at_a()).assert_whole();
        (self.pair, self.relay, ledger)
    }
}

/// What is mostly waiting is done side by side: each of these takes as long as somebody's patience.
#[test]
fn whoever_is_gone_for_long_is_waited_for_and_no_longer() {
    let cases: [(&str, fn()); 3] = [
        ("a link that stays gone", a_link_that_stays_gone_ends_the_migration_and_the_source_goes_on),
        ("a destination is killed", a_destination_that_is_killed_leaves_the_guest_alone),
        ("given into a dead link", a_guest_that_is_given_into_a_dead_link_arrives_when_the_link_is_back),
    ];
    thread::scope(|scope| {
        for (name, case) in cases {
            // A panic says the thread's name.
            thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, case).expect("a thread");
        }
    });
}

// ---- connections are cut -----------------------------------------------------------------------------------------

#[test]
fn connections_cut_at_random_lose_no_write() {
    let (mut cuts, mut arrived, mut aborted) = (0, 0, 0);
    for seed in seeds(4) {
        let (load, size, _) = drawn(seed, OnLoss::Stop);
        let load = Load { rate: 600, ..load };
        let mut pair = Pair::new(size.min(96 * MIB), seed, 60);
        let relay = Relay::to(&pair.b.listen);
        let writer = Writer::start(load, pair.ledger(), "vda", &[&pair.a.door]);
        let watch = Watch::start(&pair.a, &pair.b);
        let connections = (1 + seed % 4).to_string();
        let options = ["--bandwidth", "40M", "--downtime-limit", "1000", "--connections", &connections];
        let mut migration = pair.a.start_migrate(&relay.address, &options);
        let mut dice = Dice::new(seed);
        for _ in 0..8 {
            let goal = relay.carried() + MIB / 2 + dice.below(4 * MIB);
            until_within(PATIENCE, "bytes carried", || (migration.is_over() || relay.carried() >= goal).then_some(()));
            cuts += u32::from(relay.cut_one(None, dice.roll()));
            if dice.below(3) == 0 {
                // A second one while the first is being recovered from.
                cuts += u32::from(relay.cut_one(None, dice.roll()));
            }
        }
        let ended = migration.wait();
        if ended.code == Some(3) {
            aborted += 1;
            writer.until_more(20);
            let ledger = writer.finish();
            watch.finish();
            ended.aborted();
            eprintln!("seed {seed}: {}", ended.stderr.trim_end());
            pair.stayed(&ledger);
        } else {
            ended.well();
            arrived += 1;
            let ledger = writer.finish();
            watch.finish();
            assert_same(&pair.at_a(), &pair.at_b());
            pair.arrived(&ledger);
        }
    }
    eprintln!("{cuts} cuts: {arrived} migrations arrived, {aborted} were aborted");
    assert!(cuts >= 20);
}

#[test]
fn a_lost_connection_of_either_kind_is_opened_again() {
    for (seed, kind) in [(41, Kind::Phases), (42, Kind::Data), (43, Kind::Phases), (44, Kind::Data)] {
        let scene = Scene::begin(seed, &["--bandwidth", "10M", "--connections", "2"]);
        scene.relay.until_open(Kind::Data, 2);
        scene.relay.until_carried(4 * MIB);
        if seed > 42 {
            // And while that is being done, the destination's answer to the fence is lost.
            scene.relay.set_trap(Trap { message: message::FENCED, passes: false, then: Then::Cut });
        }
        assert!(scene.relay.cut_one(Some(kind), 0));
        scene.arrives();
    }
}

#[test]
fn a_link_that_is_lost_as_soon_as_the_destination_is_prepared_is_dialled_again() {
    let pair = Pair::new(16 * MIB, 40, 60);
    let relay = Relay::to(&pair.b.listen);
    relay.set_trap(Trap { message: message::PREPARED, passes: true, then: Then::Cut });
    pair.a.migrate(&relay.address, &[]).well();
    assert_same(&pair.at_a(), &pair.at_b());
}

#[test]
fn a_link_that_is_gone_for_a_moment_is_no_reason_to_give_up() {
    let scene = Scene::begin(45, &["--bandwidth", "10M"]);
    scene.relay.until_carried(4 * MIB);
    scene.relay.refuse();
    scene.relay.cut_all();
    throughout(Duration::from_secs(2), || assert_eq!(scene.pair.a.state(), "owner"));
    scene.relay.heal();
    scene.arrives();
}

#[test]
fn a_slow_and_distant_link_only_takes_longer() {
    let scene = Scene::begin(46, &[]);
    scene.relay.delay(Duration::from_millis(20));
    scene.relay.throttle(40 * MIB);
    scene.arrives();
}

fn a_link_that_stays_gone_ends_the_migration_and_the_source_goes_on() {
    let scene = Scene::begin(47, &["--bandwidth", "10M"]);
    scene.relay.until_carried(4 * MIB);
    scene.relay.refuse();
    scene.relay.cut_all();
    let (pair, relay, ledger) = scene.stays("the destination is lost: ");
    relay.heal();
    // What is left at the destination is its own, and it is received anew.
    pair.b.until_state("receiving");
    assert_eq!(pair.a.migrate(&relay.address, &[]).code, Some(0), "{}", pair.b.log());
    pair.arrived(&ledger);
}

// ---- late delivery -----------------------------------------------------------------------------------------------

/// D4: what a lost connection still carries arrives after the same places were copied again with newer data.
#[test]
fn what_an_old_connection_delivers_late_changes_nothing() {
    let mut late = 0;
    for seed in [51, 52, 53] {
        let scene = Scene::begin(seed, &["--hold", "--connections", "2"]);
        scene.migration.until_held();
        scene.relay.hoard();
        until_within(PATIENCE, "hoarded writes", || (scene.relay.hoarded() > MIB as usize).then_some(()));
        let hoarded = scene.relay.hoarded();
        let before = scene.relay.accepted();
        scene.relay.cut_hoarding_from_source();
        if seed != 51 {
            // New connections are open, and have carried the same places with what the guest wrote since.
            until_within(PATIENCE, "new connections", || (scene.relay.accepted() >= before + 2).then_some(()));
            let carried = scene.relay.carried();
            scene.relay.until_carried(carried + MIB);
        }
        scene.relay.deliver_late();
        late += hoarded;
        scene.writer.until_more(200);
        scene.pair.a.ask(&["switch"]).well();
        scene.arrives();
    }
    eprintln!("{late} bytes were delivered late");
}

// ---- the hand-over -----------------------------------------------------------------------------------------------

fn at_the_hand_over(seed: u64, message: u8, passes: bool, then: Then) -> Scene {
    let scene = Scene::begin(seed, &["--hold"]);
    scene.migration.until_held();
    scene.relay.set_trap(Trap { message, passes, then });
    scene.pair.a.ask(&["switch"]).well();
    scene.relay.until_sprung();
    scene
}

#[test]
fn a_hand_over_survives_the_loss_of_any_of_its_messages() {
    let messages = [message::SEAL, message::SEALED, message::GO, message::RUNNING];
    let each = messages.into_iter().flat_map(|message| [(message, false), (message, true)]);
    for (seed, (message, passes)) in (61..).zip(each) {
        for then in [Then::Cut, Then::CutAndRefuse] {
            let scene = at_the_hand_over(seed, message, passes, then);
            if then == Then::CutAndRefuse {
                throughout(Duration::from_millis(300), || {});
                scene.relay.heal();
            }
            let (pair, ..) = scene.arrives();
            assert!(pair.a.status().get("next").text().ends_with("where it arrived"), "GO is answered");
        }
    }
}

#[test]
fn a_link_lost_before_sealed_is_heard_leaves_the_guest_here_and_its_destination_is_unsealed_later() {
    let scene = at_the_hand_over(71, message::SEALED, false, Then::CutAndRefuse);
    let (pair, relay, ledger) = scene.stays("");
    assert_eq!(pair.b.state(), "sealed");
    let refused = pair.a.migrate(&pair.b.listen, &[]);
    assert_eq!(refused.code, Some(1), "nobody else is offered it before it is unsealed: {refused:?}");
    relay.heal();
    pair.b.until_state("incoming");
    pair.a.until_state("owner");
    pair.a.migrate(&pair.b.listen, &["--overwrite"]).well();
    pair.arrived(&ledger);
}

fn a_guest_that_is_given_into_a_dead_link_arrives_when_the_link_is_back() {
    let scene = at_the_hand_over(72, message::GO, false, Then::CutAndRefuse);
    let late = scene.pair.a.ask(&["cancel"]);
    late.refused(1, "blockferry: cancel: g1: the guest is given away");
    let Scene { pair, relay, writer, watch, migration } = scene;
    assert_eq!((pair.a.state().as_str(), pair.b.state().as_str()), ("given", "sealed"));
    assert!(pair.b.try_write("vda", 0).is_err(), "it has not heard that it owns");
    // The way from A to B stays dead. The sealed host asks A by itself, at the address in A's hello (M10).
    migration.wait().well();
    let ledger = writer.finish();
    pair.b.until_state("owner");
    relay.heal();
    until_within(PATIENCE, "an answer to GO", || {
        pair.a.status().get("next").text().ends_with("where it arrived").then_some(())
    });
    watch.finish();
    pair.arrived(&ledger);
}

#[test]
fn a_cancel_while_sealed_is_not_yet_known_leaves_the_guest_here() {
    let scene = at_the_hand_over(73, message::SEALED, false, Then::CutAndRefuse);
    scene.pair.a.ask(&["cancel"]).well();
    let (pair, relay, ledger) = scene.stays("cancelled by the user");
    relay.heal();
    pair.b.until_state("incoming");
    pair.a.until_state("owner");
    pair.stayed(&ledger);
}

/// Follows the guest until the migration is over: how often it stood still for more than a second, and how long at
/// most.
fn standstill(writer: &Writer, migration: &mut Migration) -> (u32, Duration) {
    let (mut last, mut seen, mut stops, mut longest) = (Instant::now(), writer.acknowledged(), 0, Duration::ZERO);
    until_within(Duration::from_secs(150), "end of migrate", || {
        let now = writer.acknowledged();
        if now != seen || migration.is_over() {
            longest = longest.max(last.elapsed());
            stops += u32::from(last.elapsed() > Duration::from_secs(1));
            (last, seen) = (Instant::now(), now);
        }
        migration.is_over().then_some(())
    });
    (stops, longest)
}

/// D6: whatever the link does before SEALED, the guest waits for a bounded time and goes on.
#[test]
fn a_link_that_dies_at_the_hand_over_stops_the_guest_for_a_bounded_time() {
    // The final pass may take 5 s and SEALED 10 s; the rest is for a machine whose disk and cores have other work.
    let limit = Duration::from_secs(20);
    let silent = |relay: &Relay, _: &Host| relay.fall_silent();
    let silent_and_cut = |relay: &Relay, a: &Host| {
        relay.fall_silent();
        until_within(PATIENCE, "a quiesced guest", || {
            (a.status().get("disks").items()[0].get("gate").text() == "quiesced").then_some(())
        });
        relay.cut_all();
    };
    let at_seal = |relay: &Relay, _: &Host| {
        relay.set_trap(Trap { message: message::SEAL, passes: true, then: Then::CutAndSilence });
    };
    type Blow = fn(&Relay, &Host);
    let blows: [(&str, Blow, bool); 3] =
        [("silent", silent, false), ("silent and cut", silent_and_cut, false), ("silent at SEAL", at_seal, true)];
    thread::scope(|scope| {
        for (seed, (what, blow, before)) in (74..).zip(blows) {
            scope.spawn(move || {
                let scene = Scene::begin(seed, &["--hold"]);
                scene.migration.until_held();
                if before {
                    blow(&scene.relay, &scene.pair.a);
                } else {
                    // A long way: nothing has been handed over yet when the blow falls.
                    scene.relay.delay(Duration::from_millis(400));
                }
                scene.pair.a.ask(&["switch"]).well();
                if !before {
                    blow(&scene.relay, &scene.pair.a);
                }
                let Scene { pair, relay: _relay, writer, watch, mut migration } = scene;
                let (stops, longest) = thread::scope(|scope| {
                    let guest = scope.spawn(|| standstill(&writer, &mut migration));
                    // Where the guest goes on, the migration waits for the link for as long as RECONNECT_MAX.
                    until_within(PATIENCE, "a guest that goes on", || {
                        let held = pair.a.status().get("disks").items()[0].get("gate").text() == "quiesced";
                        let lost = pair.a.log().contains("; reconnecting") && !held;
                        (lost || guest.is_finished()).then_some(())
                    });
                    if !guest.is_finished() {
                        let _ = pair.a.ask(&["cancel"]);
                    }
                    guest.join().expect("no panic")
                });
                eprintln!("{what}: the guest stood still {stops} times, at most {longest:?}");
                migration.wait().aborted();
                writer.until_more(20);
                assert!(longest < limit, "{what}: the guest waited for {longest:?}");
                let ledger = writer.finish();
                watch.finish();
                ledger.verify_file(&pair.at_a()).assert_whole();
            });
        }
    });
}

#[test]
fn data_connections_that_fall_silent_at_the_hand_over_are_given_up_for_new_ones() {
    let scene = Scene::begin(78, &["--hold"]);
    scene.migration.until_held();
    scene.relay.silence_open(Kind::Data);
    scene.pair.a.ask(&["switch"]).well();
    let Scene { pair, relay, writer, watch, mut migration } = scene;
    let (stops, longest) = standstill(&writer, &mut migration);
    eprintln!("silent data connections: the guest stood still {stops} times, at most {longest:?}");
    assert!(stops <= 2 && longest < Duration::from_secs(8), "{stops} times, {longest:?}");
    Scene { pair, relay, writer, watch, migration }.arrives();
}

#[test]
fn a_go_that_is_not_answered_is_said_again_over_a_new_connection() {
    for (seed, passes) in [(79, false), (80, true)] {
        let scene = at_the_hand_over(seed, message::GO, passes, Then::Stall);
        let (pair, ..) = scene.arrives();
        assert!(pair.a.status().get("next").text().ends_with("where it arrived"), "GO is answered");
    }
}

// ---- hosts die ---------------------------------------------------------------------------------------------------

#[test]
fn a_destination_that_is_killed_and_comes_back_is_not_trusted() {
    let scene = Scene::begin(81, &["--bandwidth", "20M"]);
    scene.relay.until_carried(8 * MIB);
    let Scene { mut pair, relay, writer, watch, migration } = scene;
    relay.refuse();
    pair.b.program.kill();
    pair.b = Host::start(pair.folder.path(), "b", &[&file("vda", &pair.at_b())]);
    relay.lead_to(&pair.b.listen);
    relay.heal();
    let scene = Scene { pair, relay, writer, watch, migration };
    let (pair, relay, ledger) = scene.stays("the destination has been restarted");
    let refused = pair.a.migrate(&relay.address, &[]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains(
            "b.img is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs); nothing has \
             changed"
        ),
        "{refused:?}"
    );
    pair.a.migrate(&relay.address, &["--overwrite"]).well();
    pair.arrived(&ledger);
}

fn a_destination_that_is_killed_leaves_the_guest_alone() {
    let mut scene = Scene::begin(82, &["--bandwidth", "20M"]);
    scene.relay.until_carried(8 * MIB);
    scene.pair.b.program.kill();
    let (mut pair, _, ledger) = scene.stays("the destination is lost: ");
    pair.b = Host::start(pair.folder.path(), "b", &[&file("vda", &pair.at_b())]);
    pair.stayed(&ledger);
}

#[test]
fn a_source_that_is_killed_leaves_a_destination_that_owns_nothing() {
    let mut pair = Pair::new(64 * MIB, 83, 60);
    let writer = Writer::start(busy(83), pair.ledger(), "vda", &[&pair.a.door]);
    let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "20M"]);
    migration.until_sent(8 * MIB);
    pair.a.program.kill();
    let ended = migration.wait();
    assert_eq!(ended.code, Some(5), "its end is not known: {}", ended.stderr);
    let ledger = writer.finish();
    assert_eq!(pair.b.state(), "receiving");
    let refused = pair.b.try_write("vda", 0).expect_err("owns nothing");
    assert!(refused.contains("EPERM"), "{refused}");

    // It is the owner again by its record, and what the attempt left at the destination is emptied for the next one.
    pair.a = Host::start(pair.folder.path(), "a", &[&file("vda", &pair.at_a())]);
    assert_eq!(pair.a.state(), "owner");
    ledger.verify_door(pair.a.open("vda").expect("served")).assert_whole();
    pair.a.migrate(&pair.b.listen, &[]).well();
    pair.arrived(&ledger);
}

// ---- the guest's own connection ----------------------------------------------------------------------------------

/// D11: a guest whose connections break all the time sends again what was not answered, and keeps every write, also
/// while its disk moves.
#[test]
fn a_guest_that_reconnects_loses_no_write() {
    for seed in [91, 92] {
        let mut pair = Pair::new(64 * MIB, seed, 50);
        let (here, there) = (Relay::to(&pair.a.tcp_door), Relay::to(&pair.b.tcp_door));
        let load = Load { seed, connections: 3, depth: 32, mix: Mix::ALL, rate: 0, on_loss: OnLoss::Reconnect };
        let doors = [address(&here.address), address(&there.address)];
        let writer = Writer::start(load, pair.ledger(), "vda", &[&doors[0], &doors[1]]);
        let mut dice = Dice::new(seed);
        let mut cuts = 0;
        let mut cut = |relay: &Relay| {
            writer.until_more(50);
            cuts += u32::from(relay.cut_one(None, dice.roll()));
        };
        (0..10).for_each(|_| cut(&here));
        let migration = pair.a.start_migrate(&pair.b.listen, &["--downtime-limit", "2000"]);
        (0..5).for_each(|_| cut(&here));
        migration.wait().well();
        (0..10).for_each(|_| cut(&there));
        writer.until_more(100);
        let (reconnected, ledger) = (writer.reconnected(), writer.finish());
        eprintln!("{cuts} cuts, {reconnected} connections opened again, {} acknowledged", ledger.acknowledged());
        assert!(reconnected >= u64::from(cuts));
        pair.arrived(&ledger);
    }
}

#[test]
fn two_owners_would_be_seen() {
    // The watch and the last look can fail: two hosts that were both claimed.
    let folder = crate::harness::scratch();
    let hosts = ["a", "b"].map(|name| {
        let path = folder.path().join(name);
        drop(Ledger::format(&path, MIB, 1, 0));
        Host::owner(folder.path(), if name == "a" { "a" } else { "b" }, &[&file("vda", &path)])
    });
    assert!(Watch::start(&hosts[0], &hosts[1]).sees_two_owners());
    let look = || exactly_one_takes("vda", 0, &hosts[0], &hosts[1]);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(look)).is_err(), "two owners were not seen");
}

#[test]
fn a_disk_whose_file_was_removed_is_saved_by_moving_it_and_not_into_another_such_file() {
    let mut pair = Pair::new(8 * MIB, 35, 50);
    let ledger = pair.ledger();
    fs::remove_file(pair.at_a()).expect("removed by mistake");
    let c = pair.folder.path().join("c.img");
    File::create(&c).and_then(|file| file.set_len(8 * MIB)).expect("made");
    let nowhere = Host::start(pair.folder.path(), "c", &[&file("vda", &c)]);
    fs::remove_file(&c).expect("removed there too");
    let line = format!(
        "blockferry: migrate: g1: refused by the destination: disk vda: {} its file has been removed; \
         nothing has changed",
        c.display()
    );
    pair.a.migrate(&nowhere.listen, &[]).refused(1, &line);
    pair.a.migrate(&pair.b.listen, &[]).well();
    pair.arrived(&ledger);
    let log = pair.a.log();
    assert!(log.contains("disk vda: its file has been removed: it is gone when this process ends"), "{log}");
}
