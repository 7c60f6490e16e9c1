//! Migrations under load: whatever a guest was told is written is at the destination afterwards.

use std::process::Command;

use super::Pair;
use crate::harness::peer;
use crate::host::{PATIENCE, Watch, run};
use crate::migrations::{MIB, assert_same};
use crate::writer::{Dice, Load, Mix, OnLoss, Writer};

/// How often the seeded tests go through their seeds: `BLOCKFERRY_ROUNDS`, for whoever has time.
pub(super) fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let rounds = std::env::var("BLOCKFERRY_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    1..=count * rounds
}

/// A guest and a disk as a seed says.
pub(super) fn drawn(seed: u64, on_loss: OnLoss) -> (Load, u64, u64) {
    let mut dice = Dice::new(seed);
    let size = [64 * MIB, 96 * MIB + 3 * 512, 128 * MIB + 4096, 64 * MIB + 512, 192 * MIB]
        [usize::try_from(seed % 5).expect("small")];
    let depth = [1, 4, 16, 32][usize::try_from(dice.below(4)).expect("small")];
    let mix = [Mix::WRITES, Mix::ALL, Mix::ZEROES][usize::try_from(dice.below(3)).expect("small")];
    // As fast as it can on a small disk, which the mirror copies within the allowed downtime in any case.
    let rate = if size < 96 * MIB && seed % 2 == 1 { 0 } else { 1500 };
    let full = [0, 30, 100][usize::try_from(dice.below(3)).expect("small")];
    (Load { seed, connections: 1 + seed % 4, depth, mix, rate, on_loss }, size, full)
}

fn moves_under_load(seed: u64) {
    let on_loss = if seed.is_multiple_of(2) { OnLoss::Reconnect } else { OnLoss::Stop };
    let (load, size, full) = drawn(seed, on_loss);
    let mut pair = Pair::new(size, seed, full);
    let writer = Writer::start(load, pair.ledger(), "vda", &[&pair.a.door, &pair.b.door]);
    writer.until_more(200);
    let watch = Watch::start(&pair.a, &pair.b);
    let connections = (1 + seed % 3).to_string();
    let ended =
        pair.a.start_migrate(&pair.b.listen, &["--connections", &connections, "--downtime-limit", "1000"]).wait();
    ended.well();
    if on_loss == OnLoss::Reconnect {
        // The guest has moved with its disk, with what was not answered.
        writer.until_more(200);
    }
    let ledger = writer.finish();
    watch.finish();
    let done = ended.done();
    eprintln!(
        "seed {seed}: {load:?}, {size} bytes: {} acknowledged, {} passes, {} bytes sent, switchover {} us",
        ledger.acknowledged(),
        done.get("passes").number(),
        done.get("sent_bytes").number(),
        done.get("switchover_us").number(),
    );
    if on_loss == OnLoss::Stop {
        assert_same(&pair.at_a(), &pair.at_b());
    }
    pair.arrived(&ledger);
}

#[test]
fn no_acknowledged_write_is_lost_under_load() {
    seeds(6).for_each(moves_under_load);
}

#[test]
fn what_fio_wrote_while_its_disk_moved_verifies_at_the_destination() {
    let Some(fio) = peer("fio") else { return };
    let pair = Pair::new(64 * MIB, 21, 40);
    let job = |door: &str, more: &[&str]| {
        let mut command = Command::new(&fio);
        command.current_dir(pair.folder.path());
        command.args(["--name=guest", "--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-16k", "--bs_unaligned=0"]);
        command.args(["--size=48M", "--iodepth=16", "--randseed=77", "--verify=crc32c", "--verify_fatal=1"]);
        command.arg(format!("--uri=nbd+unix:///vda?socket={}", door.trim_start_matches("unix://"))).args(more);
        command
    };
    let (here, there) = (pair.a.door.to_string(), pair.b.door.to_string());
    let migration = std::thread::scope(|scope| {
        let guest = scope.spawn(|| run(&mut job(&here, &["--do_verify=0", "--rate_iops=2500"]), PATIENCE));
        let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
        migration.until_held();
        guest.join().expect("no panic").well();
        migration
    });
    pair.a.ask(&["switch"]).well();
    migration.wait().well();
    run(&mut job(&there, &["--verify_only"]), PATIENCE).well();
    assert_same(&pair.at_a(), &pair.at_b());
}
