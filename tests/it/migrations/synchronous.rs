//! Guests that write faster than the link carries, and links that fail while guest writes wait for them (D7).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{MIB, Pair, assert_same, file};
use crate::harness::{scratch, throughout};
use crate::host::{Host, exactly_one_takes};
use crate::json::Json;
use crate::relay::Relay;
use crate::writer::{Ledger, Load, Mix, OnLoss, Writer};

/// What a link carries here, in bytes a second: a fraction of what the guests write.
const LINK: u64 = 8 * MIB;
/// `SYNCHRONOUS_WAIT_MAX`, and what a machine that has other things to do may add.
const LONGEST: Duration = Duration::from_millis(2000 + 700);

fn is_synchronous(line: &Json) -> bool {
    line.get("type").text() == "progress" && *line.get("synchronous") != Json::Null
}

fn as_fast_as_it_can(seed: u64, depth: usize) -> Load {
    Load { seed, connections: 2, depth, mix: Mix::WRITES, rate: 0, on_loss: OnLoss::Stop }
}

#[test]
fn d7_a_guest_that_is_faster_than_the_link_moves_in_auto_and_is_told_why() {
    let mut pair = Pair::new(16 * MIB, 111, 50);
    let writer = Writer::start(as_fast_as_it_can(111, 16), pair.ledger(), "vda", &[&pair.a.door, &pair.b.door]);
    let relay = Relay::to(&pair.b.listen);
    relay.throttle(LINK);
    let migration = pair.a.start_migrate(&relay.address, &["--synchronous", "auto", "--verify", "none"]);
    let line = migration.until_line("synchronous", is_synchronous);
    let rates = line.get("synchronous");
    // Of one moment each: a granule that is dirty already cannot become so again.
    assert!(rates.get("dirty_rate_bytes").number() * 2 >= rates.get("rate_bytes").number(), "{line:?}");
    let ended = migration.wait();
    ended.well();
    let ledger = writer.finish();
    eprintln!(
        "{} writes, {} ms, switchover {} us, {line:?}",
        ledger.acknowledged(),
        ended.done().get("total_ms").number(),
        ended.done().get("switchover_us").number()
    );
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
}

/// Two disks whose guests are each faster than the link, over NBD and inside the one connection of the stream path.
#[test]
fn d7_two_disks_move_together_over_either_transport() {
    for (seed, transport) in [(114, "nbd"), (116, "stream")] {
        let folder = scratch();
        let at = |name: &str| folder.path().join(name);
        let names = ["vda", "vdb"];
        let ledgers = [seed, seed + 1].map(|seed| Ledger::format(&at(&format!("a.{seed}")), 8 * MIB, seed, 50));
        let disks = |host: &str| {
            let places = [seed, seed + 1].map(|seed| at(&format!("{host}.{seed}")));
            [file(names[0], &places[0]), file(names[1], &places[1])]
        };
        let (of_a, of_b) = (disks("a"), disks("b"));
        let a = Host::owner(folder.path(), "a", &[&of_a[0], &of_a[1]]);
        let b = Host::start(folder.path(), "b", &[&of_b[0], &of_b[1]]);
        let mut ledgers = ledgers.into_iter();
        let writers = names.map(|name| {
            let load = as_fast_as_it_can(seed, 8);
            Writer::start(load, ledgers.next().expect("one each"), name, &[&a.door, &b.door])
        });
        let relay = Relay::to(&b.listen);
        relay.throttle(LINK);
        let options = ["--synchronous", "auto", "--verify", "none", "--transport", transport];
        let migration = a.start_migrate(&relay.address, &options);
        migration.until_line("synchronous", is_synchronous);
        migration.wait().well();
        for (writer, (name, number)) in writers.into_iter().zip(names.into_iter().zip([seed, seed + 1])) {
            let ledger = writer.finish();
            assert_same(&at(&format!("a.{number}")), &at(&format!("b.{number}")));
            ledger.verify_file(&at(&format!("b.{number}"))).assert_whole();
            exactly_one_takes(name, 0, &b, &a);
        }
    }
}

#[test]
fn d7_the_same_guest_does_not_move_in_never_and_is_told_both_rates() {
    let mut pair = Pair::new(16 * MIB, 112, 50);
    let writer = Writer::start(as_fast_as_it_can(112, 16), pair.ledger(), "vda", &[&pair.a.door]);
    let relay = Relay::to(&pair.b.listen);
    relay.throttle(LINK);
    let migration = pair.a.start_migrate(&relay.address, &["--synchronous", "never", "--verify", "none"]);
    migration.until_line("not converging", |line| {
        line.get("type").text() == "progress" && line.get("convergence").text() == "guest is faster"
    });
    throughout(Duration::from_secs(5), || assert_eq!(pair.a.state(), "owner"));
    pair.a.ask(&["cancel"]).well();
    let ended = migration.wait();
    ended.aborted();
    assert!(!ended.lines.iter().any(is_synchronous));
    pair.stayed(&writer.finish());
}

#[test]
fn d7_no_guest_write_waits_longer_than_the_limit_for_a_link_that_is_silent_or_cut() {
    let pair = Pair::new(16 * MIB, 113, 50);
    let relay = Relay::to(&pair.b.listen);
    let migration = pair.a.start_migrate(&relay.address, &["--synchronous", "always", "--hold", "--verify", "none"]);
    migration.until_held();
    migration.until_line("synchronous", is_synchronous);
    let over = AtomicBool::new(false);
    let pass = |ms| throughout(Duration::from_millis(ms), || assert_eq!(pair.a.state(), "owner"));
    let (longest, writes) = thread::scope(|scope| {
        let guests: Vec<_> = (0..4u64)
            .map(|number| {
                let mut client = pair.a.open("vda").expect("served");
                let over = &over;
                scope.spawn(move || {
                    let (mut longest, mut writes) = (Duration::ZERO, 0u64);
                    while !over.load(Ordering::Acquire) {
                        let began = Instant::now();
                        let offset = (number * 1000 + writes % 900) * 4096;
                        client.write_all(offset, &[number as u8 + 1; 4096]).expect("answered");
                        longest = longest.max(began.elapsed());
                        writes += 1;
                    }
                    (longest, writes)
                })
            })
            .collect();
        pass(300);
        relay.fall_silent();
        pass(4000);
        relay.heal();
        migration.until_turn("held again", |line| line.get("held").is_true() && *line.get("lost_ms") == Json::Null);
        relay.cut_all();
        pass(500);
        over.store(true, Ordering::Release);
        let ended = guests.into_iter().map(|guest| guest.join().expect("no panic"));
        ended.fold((Duration::ZERO, 0), |(longest, sum), (one, writes)| (longest.max(one), sum + writes))
    });
    eprintln!("{writes} writes, the longest took {longest:?}");
    assert!(longest > Duration::from_millis(500), "they did wait: {longest:?}");
    assert!(longest < LONGEST, "{longest:?}");
    pair.a.ask(&["switch"]).well();
    migration.wait().well();
    assert_same(&pair.at_a(), &pair.at_b());
}
