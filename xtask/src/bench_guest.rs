//! A real guest that is moved while it writes, by us, by QEMU alone, and by QEMU alone with a shared disk: what the guest
//! says of it.
//!
//! The numbers are the guest's own: it measures its longest pause, and after each move compares its whole disk with its
//! memory. A block that is not as it remembers ends the bench with an error.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::{count, ms, real};
use crate::live::{Backing, Body, Nursery};
use crate::native;
use crate::util::{Error, Result};
use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

/// Size of the guest's disk, in MiB; half of it is stamped, the other holes.
const DISK_MIB: u64 = 256;
/// Writes before each move, and after it.
const BEFORE: u64 = 250;
const AFTER: u64 = 250;
const COLUMNS: &[Column] = &[
    Column { key: "pause_ms", title: "pause, ms", digits: 1 },
    Column { key: "pause_best_ms", title: "best", digits: 1 },
    Column { key: "pause_worst_ms", title: "worst", digits: 1 },
    Column { key: "total_s", title: "total, s", digits: 2 },
    Column { key: "sent_mib", title: "sent, MiB", digits: 1 },
    Column { key: "writes", title: "writes", digits: 0 },
    Column { key: "lost", title: "lost", digits: 0 },
];
const MIB: f64 = 1024.0 * 1024.0;

/// One move.
struct Run {
    pause_ms: f64,
    total_s: f64,
    sent_mib: f64,
}

/// All moves of one kind.
struct Moves {
    runs: Vec<Run>,
    /// Writes that the guest was told are done.
    writes: u64,
}

/// Measures.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let nursery = Nursery::open(&bench.scratch, &bench.executable)?;
    let mut rows = Vec::new();
    let mut add = |name: &str, moves: &Moves| {
        let column = |of: &dyn Fn(&Run) -> f64| moves.runs.iter().map(of).collect::<Vec<_>>();
        let pauses = column(&|run| run.pause_ms);
        let numbers = vec![
            median(&pauses),
            pauses.iter().copied().reduce(f64::min),
            pauses.iter().copied().reduce(f64::max),
            median(&column(&|run| run.total_s)),
            median(&column(&|run| run.sent_mib)),
            Some(real(moves.writes)),
            Some(0.0),
        ];
        rows.push((name.to_owned(), numbers));
    };
    add("QEMU alone, blockdev-mirror", &by_qemu(bench, &nursery, runs, false)?);
    add("QEMU alone, shared disk (no copy)", &by_qemu(bench, &nursery, runs, true)?);
    let notes = vec![
        "pause: the guest's longest time between two acknowledged writes, by the host's clock; the median of all moves"
            .to_owned(),
        "lost: blocks that are not as the guest remembers, of all its disk, looked up after each move".to_owned(),
        "sent: disk and state; total: from the order until the guest runs".to_owned(),
    ];
    let title =
        format!("{runs} live migrations of a Linux guest of 128 MiB, {DISK_MIB} MiB of disk, 500 random writes a second");
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

/// QEMU's own way, to and fro.
fn by_qemu(bench: &Bench, nursery: &Nursery, runs: usize, is_shared: bool) -> Result<Moves> {
    let names: [&str; 2] = if is_shared { ["s.raw", "s.raw"] } else { ["n-a.raw", "n-b.raw"] };
    let images = names.map(|name| bench.scratch.path(name));
    let start = |side: usize, waits| nursery.start(["A", "B"][side], &[Backing::File(&images[side])], waits);
    images.iter().try_for_each(empty)?;
    let mut here = start(0, false)?;
    here.live(1)?;
    moves(here, runs, |here, side| {
        if !is_shared {
            empty(&images[side])?;
        }
        let mut there = start(side, true)?;
        let began = Instant::now();
        here.tell("mark")?;
        let sent = match is_shared {
            true => native::with_shared_disk(here, &mut there)?,
            false => native::with_disk(here, &mut there)?,
        };
        Ok((there, sent, began.elapsed().as_secs_f64()))
    })
}

/// Moves a guest so many times, each time to the side with the number that `step` gets, and has it look at its disk.
fn moves(
    mut here: Body,
    runs: usize,
    mut step: impl FnMut(&mut Body, usize) -> Result<(Body, u64, f64)>,
) -> Result<Moves> {
    let mut done = Vec::new();
    for number in 0..runs {
        here.writes_on(BEFORE)?;
        let (there, sent, total_s) = step(&mut here, (number + 1) % 2)?;
        here = there;
        here.writes_on(AFTER)?;
        let report = here.report()?;
        here.check()?;
        done.push(Run { pause_ms: report.pause.as_secs_f64() * 1000.0, total_s, sent_mib: real(sent) / MIB });
    }
    Ok(Moves { writes: here.report()?.writes, runs: done })
}

/// An image of the disk's size, all holes.
fn empty(path: &PathBuf) -> Result<()> {
    let made = File::create(path).and_then(|file| file.set_len(DISK_MIB << 20));
    made.map_err(|error| Error::new("bench", path.display(), error))
}
