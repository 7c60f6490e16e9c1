//! What a guest's write waits, in each mode of the mirror, and beside two qemu-storage-daemons: 500 random writes of
//! 4 KiB a second, over a Unix socket, while the disk is mirrored over TCP.
//!
//! A *mode* is a span of one guest's life: not mirrored, the bulk pass with no limit and at half the rate that it had
//! then, the passes after it when no write waits for the mirror and when every one does (`--synchronous`). Ratios are
//! against the same server when it mirrors nothing.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::demo_guest::{Guest, History};
use crate::demo_host::{Host, number, text};
use crate::storage_daemon::{self, Daemons, PEER};
use crate::util::{self, Error, Result};
use std::thread;
use std::time::{Duration, Instant};

/// Size of the disk, in MiB; half of it is holes.
const DISK_MIB: usize = 2048;
/// How long a mode without an end of its own is watched.
const SPAN: Duration = Duration::from_secs(3);
/// How long a bulk pass may take until whoever makes it is given up.
const LIMIT: Duration = Duration::from_secs(20);
/// How often is looked whether a bulk pass is over.
const LOOK: Duration = Duration::from_millis(20);
const COLUMNS: &[Column] = &[
    Column { key: "median_ms", title: "median, ms", digits: 3 },
    Column { key: "latency_99_ms", title: "99 %, ms", digits: 3 },
    Column { key: "median_ratio", title: "x median", digits: 2 },
    Column { key: "latency_99_ratio", title: "x 99 %", digits: 2 },
    Column { key: "writes", title: "writes", digits: 0 },
];
const OURS: [&str; 5] =
    ["not mirrored", "bulk pass, no limit", "passes, never", "bulk pass, half that rate", "passes, always"];
const THEIRS: [&str; 5] =
    ["not mirrored", "background, copying", "background, ready", "write-blocking, copying", "write-blocking, ready"];

/// When a mode began and ended; `None`: it was not reached.
type Span = Option<(Instant, Instant)>;
/// Median, the latency that 99 of 100 keep, in ms, and how many writes.
type Numbers = [f64; 3];

/// Measures ours, and QEMU's if it is here.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let mut notes = vec![
        "passes: after the bulk pass; never, always: --synchronous; x: this one's over its own server's, not mirrored"
            .to_owned(),
        "medians over runs of each run's median and of what 99 of 100 writes keep".to_owned(),
    ];
    let has_peer = util::find_program(PEER).is_some();
    if !has_peer {
        notes.push(format!("{PEER}: not installed, so there is nothing to compare with"));
    }
    let [mut ours, mut theirs]: [[Vec<Numbers>; 5]; 2] = Default::default();
    for _ in 0..runs {
        let keep = |all: &mut [Vec<Numbers>; 5], run: [Option<Numbers>; 5]| {
            all.iter_mut().zip(run).for_each(|(all, numbers)| all.extend(numbers));
        };
        keep(&mut ours, by_us(bench)?);
        if has_peer {
            keep(&mut theirs, by_qemu(bench)?);
        }
    }
    let mut rows = Vec::new();
    for (who, modes, all) in [("blockferry", OURS, &ours), ("storage daemon", THEIRS, &theirs)] {
        let middle =
            |mode: &[Numbers], place: usize| median(&mode.iter().map(|numbers| numbers[place]).collect::<Vec<_>>());
        for (name, mode) in modes.iter().zip(all).filter(|(_, mode)| !mode.is_empty()) {
            let ratio = |place| Some(middle(mode, place)? / middle(&all[0], place)?);
            let numbers = vec![middle(mode, 0), middle(mode, 1), ratio(0), ratio(1), middle(mode, 2)];
            rows.push((format!("{who}, {name}"), numbers));
        }
    }
    let title = format!("A guest's 4 KiB writes, 500 a second, on a disk of 2 GiB, half holes ({runs} runs)");
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

/// All modes of ours, one after the other.
fn by_us(bench: &Bench) -> Result<[Option<Numbers>; 5]> {
    let images = storage_daemon::fresh(bench, ["latency-a.raw", "latency-b.raw"], DISK_MIB)?;
    let [source, destination] = bench.hosts(&images)?;
    let guest = Guest::start(&source.door, &source.door, "vda").map_err(died)?;
    let quiet = rest();
    let begin = |more: &[&str]| {
        let usual = [destination.migration.as_str(), "--hold", "--detach", "--verify", "none", "--overwrite"];
        source.ask("migrate", &[&usual, more].concat()).map(drop)
    };
    begin(&["--synchronous", "never"])?;
    let (free, sent) = bulk_pass(&source)?;
    let never = passes(&source)?;
    cancel(&source)?;
    let rate = free.map(|(began, ended)| real(sent) / ended.duration_since(began).as_secs_f64() / 2.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
    let rate = (rate.unwrap_or(0.0) as u64).to_string();
    begin(&["--synchronous", "always", "--bandwidth", &rate])?;
    let (half, _) = bulk_pass(&source)?;
    let always = passes(&source)?;
    cancel(&source)?;
    let history = guest.stop().map_err(died)?;
    Ok([quiet, free, never, half, always].map(|span| numbers(&history, span)))
}

/// Waits for the end of the bulk pass: when it was, and the bytes that were sent.
fn bulk_pass(source: &Host) -> Result<(Span, u64)> {
    let mut began = None;
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let status = progress(source)?;
        let now = Instant::now();
        match text(&status, "phase") {
            Some("prepare") => {}
            Some("bulk pass") => {
                began.get_or_insert(now);
            }
            _ => return Ok((began.map(|began| (began, now)), number(&status, "sent_bytes").unwrap_or(0))),
        }
        thread::sleep(LOOK);
    }
    Err(Error::new("bench", "latency", "the bulk pass does not end"))
}

/// Waits until the mirror has converged, and for a span more.
fn passes(source: &Host) -> Result<Span> {
    let deadline = Instant::now() + LIMIT;
    while !progress(source)?.contains("\"held\":true") {
        if Instant::now() > deadline {
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
    Ok(rest())
}

fn cancel(source: &Host) -> Result<()> {
    source.ask("cancel", &[])?;
    let deadline = Instant::now() + LIMIT;
    while !source.ask("status", &["--json"])?.contains("\"migration\":\"ended\"") {
        if Instant::now() > deadline {
            return Err(Error::new("bench", "latency", "a cancelled migration does not end"));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// The object that tells how far a migration is.
fn progress(source: &Host) -> Result<String> {
    let status = source.ask("status", &["--json"])?;
    let line = status.lines().find(|line| line.starts_with("{\"type\":\"progress\""));
    line.map(str::to_owned).ok_or_else(|| Error::new("bench", "latency", format!("no migration runs: {status}")))
}

/// All modes of QEMU's.
fn by_qemu(bench: &Bench) -> Result<[Option<Numbers>; 5]> {
    let images = storage_daemon::fresh(bench, ["latency-a.raw", "latency-b.raw"], DISK_MIB)?;
    let Daemons { door, monitor, .. } = &mut Daemons::start(bench, &images)?;
    let guest = Guest::start(door, door, "vda").map_err(died)?;
    let mut spans = vec![rest()];
    for mode in ["background", "write-blocking"] {
        let began = Instant::now();
        monitor.mirror(mode)?;
        let mut is_ready = false;
        while !is_ready && began.elapsed() < LIMIT {
            thread::sleep(LOOK);
            is_ready = monitor.is_ready()?;
        }
        spans.push(Some((began, Instant::now())));
        spans.push(is_ready.then(rest).flatten());
        monitor.cancel()?;
    }
    let history = guest.stop().map_err(died)?;
    Ok(std::array::from_fn(|place| numbers(&history, spans.get(place).copied().flatten())))
}

/// Watches what goes on for a while.
fn rest() -> Span {
    let began = Instant::now();
    thread::sleep(SPAN);
    Some((began, Instant::now()))
}

fn numbers(history: &History, span: Span) -> Option<Numbers> {
    let (began, ended) = span?;
    let writes = history.acknowledged.iter().filter(|write| write.at >= began && write.at < ended).count();
    let (median, most) = history.latency(began, ended);
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    (writes > 0).then(|| [ms(median), ms(most), real(writes as u64)])
}

fn died(cause: String) -> Error {
    Error::new("bench", "the guest", cause)
}
