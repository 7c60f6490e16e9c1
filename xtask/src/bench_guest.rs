//! A real guest that is moved while it writes, by us, by QEMU alone, and by QEMU alone with a shared disk: what the
//! guest says of it.
//!
//! The numbers are the guest's own: it measures its longest pause, and after each move compares its whole disk with
//! its memory. A block that is not as it remembers ends the bench with an error.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::demo_host::number;
use crate::live::{Backing, Body, Nursery};
use crate::live_pair::Pair;
use crate::native;
use crate::util::{Error, Result};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
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
    add("blockferry", &by_us(bench, &nursery, runs)?);
    add("QEMU alone, blockdev-mirror", &by_qemu(bench, &nursery, runs, false)?);
    add("QEMU alone, shared disk (no copy)", &by_qemu(bench, &nursery, runs, true)?);
    let notes = vec![
        "pause: the guest's longest time between two acknowledged writes, by the host's clock; the median of all moves"
            .to_owned(),
        "lost: blocks that are not as the guest remembers, of all its disk, looked up after each move".to_owned(),
        "sent: disk and state; total: from the order until the guest runs".to_owned(),
    ];
    let title = format!(
        "{runs} live migrations of a Linux guest of 128 MiB, {DISK_MIB} MiB of disk, 500 random writes a second"
    );
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

/// Our way, to and fro.
fn by_us(bench: &Bench, nursery: &Arc<Nursery>, runs: usize) -> Result<Moves> {
    let mut pair = Pair::start(nursery, DISK_MIB << 20, true, &bench.log)?;
    let mut done = Vec::new();
    for _ in 0..runs {
        pair.here.writes_on(BEFORE)?;
        let moved = pair.migrate(&["--overwrite"], false)?;
        let sent = ["sent_bytes", "state_bytes"].map(|key| number(&moved.done, key).unwrap_or(0)).iter().sum();
        done.push(arrived(&mut pair.here, sent, moved.took.as_secs_f64())?);
    }
    Ok(Moves { writes: pair.here.report()?.writes, runs: done })
}

/// QEMU's own way, to and fro.
fn by_qemu(bench: &Bench, nursery: &Nursery, runs: usize, is_shared: bool) -> Result<Moves> {
    let names: [&str; 2] = if is_shared { ["s.raw", "s.raw"] } else { ["n-a.raw", "n-b.raw"] };
    let images = names.map(|name| bench.scratch.path(name));
    let start = |side: usize, waits| nursery.start(["A", "B"][side], &[Backing::File(&images[side])], waits);
    images.iter().try_for_each(empty)?;
    let mut here = start(0, false)?;
    here.live(1)?;
    let mut done = Vec::new();
    for number in 1..=runs {
        let side = number % 2;
        here.writes_on(BEFORE)?;
        if !is_shared {
            empty(&images[side])?;
        }
        let mut there = start(side, true)?;
        here.tell("mark")?;
        let began = Instant::now();
        let sent = match is_shared {
            true => native::with_shared_disk(&mut here, &mut there)?,
            false => native::with_disk(&mut here, &mut there)?,
        };
        let total_s = began.elapsed().as_secs_f64();
        here = there;
        done.push(arrived(&mut here, sent, total_s)?);
    }
    Ok(Moves { writes: here.report()?.writes, runs: done })
}

/// The guest has been moved: it goes on, says what it saw, and looks at its disk.
fn arrived(here: &mut Body, sent: u64, total_s: f64) -> Result<Run> {
    here.writes_on(AFTER)?;
    let report = here.report()?;
    here.check()?;
    Ok(Run { pause_ms: report.pause.as_secs_f64() * 1000.0, total_s, sent_mib: real(sent) / MIB })
}

/// An image of the disk's size, all holes.
fn empty(path: &PathBuf) -> Result<()> {
    let made = File::create(path).and_then(|file| file.set_len(DISK_MIB << 20));
    made.map_err(|error| Error::new("bench", path.display(), error))
}
