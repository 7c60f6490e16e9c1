//! Copies that are compared before they are sent, and verified before they are handed over.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::load::{drawn, seeds};
use super::{MIB, Pair, calm, file};
use crate::harness::until_within;
use crate::host::{Host, PATIENCE, Watch};
use crate::json::Json;
use crate::migrations::assert_same;
use crate::relay::{Kind, Relay};
use crate::writer::{Dice, Ledger, Load, Mix, OnLoss, Writer};

/// Changes one byte of an image behind the back of whoever has it open.
fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("an image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], offset).expect("written");
}

/// A byte that is data.
fn some_data(path: &Path) -> u64 {
    let file = File::open(path).expect("an image");
    let mut bytes = vec![0; MIB as usize];
    let size = file.metadata().expect("its size").len();
    (0..size / MIB)
        .find_map(|mebibyte| {
            file.read_exact_at(&mut bytes, mebibyte * MIB).expect("read");
            bytes.iter().position(|byte| *byte != 0).map(|at| mebibyte * MIB + at as u64)
        })
        .expect("there is data")
}

/// Kills a side's process and starts another one on the same disks and records.
fn restart(pair: &mut Pair, name: &'static str) {
    let disk = file("vda", &if name == "a" { pair.at_a() } else { pair.at_b() });
    let host = if name == "a" { &mut pair.a } else { &mut pair.b };
    host.program.kill();
    *host = Host::start(pair.folder.path(), name, &[&disk]);
}

fn receipt(host: &Host) -> (bool, String, u64, String, String) {
    let status = host.status();
    let receipt = status.get("receipt");
    (
        receipt.get("gave").is_true(),
        receipt.get("verify").text().to_owned(),
        receipt.get("verified_bytes").number(),
        receipt.get("root").text().to_owned(),
        receipt.get("attempt").text().to_owned(),
    )
}

#[test]
fn d14_a_byte_that_changes_at_the_destination_ends_the_migration_and_the_region_is_named() {
    // Copied and verified; then the byte changes, and then the guest writes beside it.
    let mut pair = Pair::new(64 * MIB, 71, 50);
    let ledger = pair.ledger();
    let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
    migration.until_held();
    let at = some_data(&pair.at_a());
    flip(&pair.at_b(), at);
    let region = at / 65536 * 65536;
    // The guest writes to a granule of this region that does not hold the byte, what it held before: that granule is
    // copied again, and the region verified again.
    let beside = if at % 65536 < 4096 { region + 8192 } else { region };
    let mut same = vec![0; 4096];
    File::open(pair.at_a()).expect("an image").read_exact_at(&mut same, beside).expect("read");
    let mut guest = pair.a.open("vda").expect("served");
    guest.write_all(beside, &same).expect("written");
    let ended = migration.wait();
    ended.aborted();
    let cause =
        format!("verify: disk vda, 65536 bytes at {region}: the destination holds something else than was sent");
    assert!(ended.stderr.contains(&cause), "{}", ended.stderr);
    assert!(pair.b.log().contains(&cause), "the destination's user is told, too: {}", pair.b.log());
    pair.stayed(&ledger);
}

#[test]
fn d14_a_byte_that_changes_behind_the_copy_is_found_before_the_hand_over_unless_nothing_is_verified() {
    for (verify, found) in [("written", true), ("full", true), ("none", false)] {
        let mut pair = Pair::new(64 * MIB, 72, 100);
        let ledger = pair.ledger();
        let at = some_data(&pair.at_a());
        // Slow enough that the byte changes while most of the disk is yet to come.
        let options = ["--verify", verify, "--bandwidth", "20M"];
        let migration = pair.a.start_migrate(&pair.b.listen, &options);
        migration.until_sent(4 * MIB);
        // Over and over, as a broken disk might: at least once between the copy and its verification, or after it.
        until_within(PATIENCE, "the byte arrives", || {
            let mut byte = [0];
            File::open(pair.at_b()).expect("an image").read_exact_at(&mut byte, at).expect("read");
            (byte[0] != 0).then_some(())
        });
        flip(&pair.at_b(), at);
        // Whatever was verified already is verified again when it is written again.
        let mut guest = pair.a.open("vda").expect("served");
        let (region, mut same) = (at / 65536 * 65536, vec![0; 4096]);
        let beside = if at % 65536 < 4096 { region + 8192 } else { region };
        File::open(pair.at_a()).expect("an image").read_exact_at(&mut same, beside).expect("read");
        guest.write_all(beside, &same).expect("written");
        drop(guest);
        let _ = pair.a.ask(&["set", "--bandwidth", "0"]);
        let ended = migration.wait();
        if found {
            ended.aborted();
            assert!(ended.stderr.contains(&format!("bytes at {region}: the destination holds")), "{}", ended.stderr);
            pair.stayed(&ledger);
        } else {
            ended.well();
            assert_eq!(ended.done().get("verify").text(), "none");
            let mut byte = [[0], [0]];
            for (path, byte) in [pair.at_a(), pair.at_b()].iter().zip(&mut byte) {
                File::open(path).expect("an image").read_exact_at(byte, at).expect("read");
            }
            assert_eq!(byte[0][0] ^ byte[1][0], 0x40, "nobody looked");
        }
    }
}

#[test]
fn a_verified_copy_has_the_same_receipt_on_both_sides_also_after_a_restart() {
    for (verify, bytes) in [("full", 64 * MIB + 512), ("written", 0), ("none", 0)] {
        let mut pair = Pair::new(64 * MIB + 512, 73, 30);
        let ledger = pair.ledger();
        let ended = pair.a.migrate(&pair.b.listen, &["--verify", verify]);
        let line = ended.well();
        let words = if verify == "none" { "nothing was verified" } else { ", root " };
        assert!(line.contains(words), "{line}");
        until_within(PATIENCE, "a receipt", || matches!(pair.b.status().get("receipt"), Json::Fields(_)).then_some(()));
        let (source, destination) = (receipt(&pair.a), receipt(&pair.b));
        assert_eq!((source.0, destination.0), (true, false));
        assert_eq!(
            (&source.1, source.2, &source.3, &source.4),
            (&destination.1, destination.2, &destination.3, &destination.4)
        );
        assert_eq!(source.1, verify);
        match verify {
            "full" => assert_eq!(source.2, bytes),
            "written" => assert!(source.2 > 0 && source.2 < 64 * MIB && source.3.len() == 64),
            _ => assert_eq!(source.2, 0),
        }
        let said = pair.b.ask(&["who-owns"]).well();
        assert!(said.contains("receipt: got from host "), "{said}");
        pair.arrived(&ledger);
        restart(&mut pair, "a");
        restart(&mut pair, "b");
        assert_eq!((receipt(&pair.a), receipt(&pair.b)), (source, destination));
    }
}

#[test]
fn d12_an_older_copy_is_compared_and_only_what_differs_is_sent() {
    for verify in ["written", "none"] {
        let mut pair = Pair::new(128 * MIB, 74, 60);
        let ledger = pair.ledger();
        std::fs::copy(pair.at_a(), pair.at_b()).expect("copied");
        restart(&mut pair, "b");
        // Four regions differ.
        for mebibyte in [1, 17, 40, 99] {
            flip(&pair.at_b(), mebibyte * MIB + 5000);
        }
        let refused = pair.a.migrate(&pair.b.listen, &[]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.contains("--copy-storage-inc sends only what differs"), "{refused:?}");
        let ended = pair.a.start_migrate(&pair.b.listen, &["--copy-storage-inc", "--verify", verify]).wait();
        ended.well();
        let done = ended.done();
        assert!(done.get("sent_bytes").number() + done.get("zero_bytes").number() <= 4 * 65536, "{done:?}");
        assert!(done.get("equal_bytes").number() >= 128 * MIB - 4 * 65536, "{done:?}");
        if verify == "written" {
            assert_eq!(done.get("verified_bytes").number(), 128 * MIB, "what was found equal is verified");
        }
        assert_same(&pair.at_a(), &pair.at_b());
        pair.arrived(&ledger);
    }
}

#[test]
fn d12_a_guest_that_writes_while_its_disk_is_compared_loses_nothing() {
    for seed in seeds(3) {
        let (load, size, full) = drawn(seed + 70, OnLoss::Stop);
        let mut pair = Pair::new(size, seed, full);
        std::fs::copy(pair.at_a(), pair.at_b()).expect("copied");
        restart(&mut pair, "b");
        let relay = Relay::to(&pair.b.listen);
        let writer = Writer::start(Load { rate: 1500, ..load }, pair.ledger(), "vda", &[&pair.a.door]);
        writer.until_more(200);
        let watch = Watch::start(&pair.a, &pair.b);
        let options = ["--copy-storage-inc", "--downtime-limit", "1000"];
        let mut migration = pair.a.start_migrate(&relay.address, &options);
        let mut dice = Dice::new(seed);
        for _ in 0..3 {
            let goal = relay.carried() + 8192 + dice.below(64 * 1024);
            until_within(PATIENCE, "bytes carried", || (migration.is_over() || relay.carried() >= goal).then_some(()));
            relay.cut_one(Some(Kind::Phases), dice.roll());
        }
        let ended = migration.wait();
        let ledger = writer.finish();
        watch.finish();
        // A cut may fall on SEAL, and then the attempt may end: nothing is lost either way.
        if ended.code == Some(0) {
            assert_same(&pair.at_a(), &pair.at_b());
            pair.arrived(&ledger);
        } else {
            ended.aborted();
            ledger.verify_file(&pair.at_a()).assert_whole();
        }
    }
}

#[test]
fn d12_what_a_dead_source_had_sent_is_not_sent_again() {
    let mut pair = Pair::new(96 * MIB, 75, 100);
    let ledger = pair.ledger();
    // Made by the operator, so that it is not the attempt's to remove.
    File::create(pair.at_b()).expect("made").set_len(96 * MIB).expect("sized");
    restart(&mut pair, "b");
    let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "24M"]);
    migration.until_sent(32 * MIB);
    restart(&mut pair, "a");
    drop(migration);
    let ended = pair.a.start_migrate(&pair.b.listen, &["--copy-storage-inc"]).wait();
    ended.well();
    let done = ended.done();
    let (sent, equal) = (done.get("sent_bytes").number(), done.get("equal_bytes").number());
    assert!(equal >= 30 * MIB, "{done:?}");
    assert!(sent + done.get("zero_bytes").number() <= 96 * MIB - 30 * MIB, "{done:?}");
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
}

#[test]
fn d14_no_write_is_lost_whatever_is_verified() {
    for (seed, verify) in [(81, "none"), (82, "written"), (83, "full")] {
        let mut pair = Pair::new(96 * MIB, seed, 50);
        let load = Load { seed, connections: 2, depth: 8, mix: Mix::ALL, rate: 2000, on_loss: OnLoss::Stop };
        let writer = Writer::start(load, pair.ledger(), "vda", &[&pair.a.door]);
        writer.until_more(200);
        let watch = Watch::start(&pair.a, &pair.b);
        let options = ["--verify", verify, "--downtime-limit", "1000"];
        let ended = pair.a.start_migrate(&pair.b.listen, &options).wait();
        ended.well();
        let ledger = writer.finish();
        watch.finish();
        eprintln!("{verify}: {:?}", ended.done());
        assert_same(&pair.at_a(), &pair.at_b());
        pair.arrived(&ledger);
    }
}

#[test]
fn d14_connections_that_are_cut_do_not_make_a_right_copy_look_wrong() {
    for seed in seeds(3) {
        let mut pair = Pair::new(64 * MIB, seed + 90, 80);
        let relay = Relay::to(&pair.b.listen);
        let writer = Writer::start(calm(seed), pair.ledger(), "vda", &[&pair.a.door]);
        let options = ["--bandwidth", "40M", "--downtime-limit", "1000", "--hold"];
        let mut migration = pair.a.start_migrate(&relay.address, &options);
        let mut dice = Dice::new(seed);
        for _ in 0..10 {
            let goal = relay.carried() + dice.below(2 * MIB);
            until_within(PATIENCE, "bytes carried", || (migration.is_over() || relay.carried() >= goal).then_some(()));
            relay.cut_one(None, dice.roll());
        }
        migration.until_held();
        pair.a.ask(&["switch"]).well();
        migration.wait().well();
        let ledger: Ledger = writer.finish();
        assert_same(&pair.at_a(), &pair.at_b());
        pair.arrived(&ledger);
    }
}
