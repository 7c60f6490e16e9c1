//! `cargo xtask demo --guest`: a Linux guest that writes without a pause moves from one host process to another,
//! memory, devices and disk, and back; after each move it compares its whole disk with its memory and says what it
//! saw.
//!
//! Everything is real: the executable that ships, QEMU, Debian's kernel, loopback TCP. What is shown as the guest's
//! is what the writer inside says, which came along with its memory.

use crate::build;
use crate::demo::{count, heading, line, ms, row, size};
use crate::demo_host::{GUEST, Scratch, number};
use crate::live::{Nursery, field};
use crate::live_pair::{MOVES, Moved, Pair, SIDES, TOOLS, disks_inside};
use crate::util::{self, Error, Result};
use std::time::Duration;

/// Size of the disk that moves; half of it is stamped, the other holes.
const DISK: u64 = 256 << 20;
/// Writes before a move and after it.
const BEFORE: u64 = 500;
const AFTER: u64 = 500;

/// Shows it.
pub(crate) fn run() -> Result<()> {
    let executable = build::static_executable()?.place;
    let scratch = Scratch::new("demo")?;
    let nursery = Nursery::open(&scratch, &executable)?;
    let mut pair = Pair::start(&nursery, DISK, true, &util::fresh_log("demo")?)?;
    introduce(&mut pair)?;
    let mut wrong = Vec::new();
    for options in [&[][..], &["--copy-storage-inc"]] {
        pair.here.writes_on(BEFORE)?;
        let there = &pair.hosts[1 - pair.side].migration;
        println!("\n$ blockferry migrate {}", [&[GUEST, there], options].concat().join(" "));
        let moved = pair.migrate(options, true)?;
        pair.here.writes_on(AFTER)?;
        show(&mut pair, &moved, &mut wrong)?;
    }
    println!();
    match wrong.as_slice() {
        [] => {
            println!("The guest lost nothing, and there was one owner at a time.");
            Ok(())
        }
        wrong => Err(Error::new("demo", "the guest", wrong.join("; "))),
    }
}

fn introduce(pair: &mut Pair) -> Result<()> {
    println!();
    heading("A running Linux guest moves from host A to host B, and back");
    for (name, host) in SIDES.iter().zip(&pair.hosts) {
        line(&format!("host {name}"), format!("process {}, {}", host.program.id(), host.migration));
    }
    line("disk vda", format!("moves     {}, half of it data", size(DISK)));
    line("disk vdb", format!("stays     {}, read-only", size(TOOLS)));
    line("disk vdc", "stays     shared, opened by QEMU itself: tells the guest the host's time");
    line("drive sr0", "stays     an empty CD-ROM drive");
    line("guest", "Linux, 128 MiB; writes 4 KiB somewhere in vda 500 times a second, flushes 10 times, never stops");
    let seen = pair.here.tell("disks")?;
    line("it sees", &seen);
    if seen == disks_inside(DISK) { Ok(()) } else { Err(Error::new("demo", "the guest's disks", seen)) }
}

/// What the guest says after a move, and what the hosts say.
fn show(pair: &mut Pair, moved: &Moved, wrong: &mut Vec<String>) -> Result<()> {
    let report = pair.here.report()?;
    let checked = pair.here.tell("check")?;
    let seen = pair.here.tell("disks")?;
    let [lost, bad, blocks, written] =
        [field(&checked, "lost")?, field(&checked, "wrong")?, field(&checked, "blocks")?, field(&checked, "written")?];
    let own_clock = Duration::from_micros(field(&report.said, "own_clock_us")?);
    heading(&format!("What the guest says, now at {}", SIDES[pair.side]));
    line("its words", &report.said);
    line("", &checked);
    row("writes acknowledged", count(report.writes), "since it was started");
    row(
        "lost",
        count(lost + bad),
        format!("of {} blocks compared, {} written once or more", count(blocks), count(written)),
    );
    row("longest pause", ms(report.pause), "between two acknowledged writes, by the host's clock");
    row("by its own clock", ms(own_clock), "which stood still while the guest did");
    heading("What it cost");
    let said = |key| number(&moved.done, key).unwrap_or(0);
    row("total time", format!("{:.2} s", moved.took.as_secs_f64()), "from the order until it runs there");
    row("sent", size(said("sent_bytes")), format!("of the disk, in {} passes", said("passes")));
    row("", size(said("state_bytes")), "of memory and devices");
    row("stood still", ms(Duration::from_micros(said("pause_us"))), "the hosts' own account of the pause");
    row("already there", size(said("equal_bytes")), "and not sent");
    row("space on disk", size(pair.allocated(pair.side)?), format!("at {}: holes are holes", SIDES[pair.side]));
    heading("What moved, and who owns it now");
    let moves = pair.moves()?;
    line("disks", &moves);
    let [new, old] = [pair.state(pair.side)?, pair.state(1 - pair.side)?];
    line(&format!("host {}", SIDES[pair.side]), &new);
    line(&format!("host {}", SIDES[1 - pair.side]), &old);
    if lost + bad > 0 {
        wrong.push(format!("at {}: {checked}", SIDES[pair.side]));
    }
    if moves != MOVES || said("sent_bytes") > DISK || seen != disks_inside(DISK) {
        wrong.push(format!("more than the first disk moved: {moves}; {} bytes; {seen}", said("sent_bytes")));
    }
    if (new.as_str(), old.as_str()) != ("owner", "given") {
        wrong.push(format!("who owns: {new} and {old}"));
    }
    Ok(())
}
