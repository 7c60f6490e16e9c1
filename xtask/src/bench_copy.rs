//! The live mirror beside QEMU's: the same disk, the same guest that writes all the while, over TCP.
//!
//! The time is from the order to the end: for us, until the destination owns; for two qemu-storage-daemons, which own
//! nothing, until `blockdev-mirror` is ready. A mirror that is not ready in time is ended.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::demo_guest::Guest;
use crate::demo_host::{self, Program};
use crate::demo_image;
use crate::storage_daemon::{self, Daemons, PEER};
use crate::util::{self, Error, Result};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Size of the disk, in MiB; half of it is holes.
const DISK_MIB: usize = 1024;
/// How long the guest writes before the copy begins.
const BEFORE: Duration = Duration::from_millis(500);
/// How long a copy may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Who was given up so many times is not tried again.
const GIVEN_UP_MAX: u32 = 2;
const COLUMNS: &[Column] = &[
    Column { key: "seconds", title: "s", digits: 2 },
    Column { key: "cpu_s_per_gib", title: "CPU s/GiB", digits: 2 },
    Column { key: "resident_source_mib", title: "MiB, from", digits: 1 },
    Column { key: "resident_destination_mib", title: "MiB, to", digits: 1 },
    Column { key: "latency_ms", title: "write, ms", digits: 2 },
    Column { key: "latency_99_ms", title: "99 %, ms", digits: 2 },
    Column { key: "time_ratio", title: "x s", digits: 2 },
    Column { key: "cpu_ratio", title: "x CPU", digits: 2 },
];
const MIB: f64 = 1024.0 * 1024.0;

/// Who copies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copier {
    Blockferry,
    /// QEMU, with this `copy-mode`.
    Qemu(&'static str),
}

/// Seconds, CPU seconds per GiB, memory of both sides, write latency: median and the one that 99 of 100 keep.
type Numbers = [f64; 6];

/// Measures ours, and QEMU's if it is here.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let mut copiers = vec![("blockferry, until it owns", Copier::Blockferry)];
    let mut notes = vec![
        "MiB: resident at most; write: the guest's latency meanwhile; x: blockferry's number over this one's"
            .to_owned(),
    ];
    if util::find_program(PEER).is_some() {
        copiers.push(("storage daemon, background, until ready", Copier::Qemu("background")));
        copiers.push(("storage daemon, write-blocking, until ready", Copier::Qemu("write-blocking")));
    } else {
        notes.push(format!("{PEER}: not installed, so there is nothing to compare with"));
    }
    let mut results: Vec<Vec<Numbers>> = vec![Vec::new(); copiers.len()];
    let mut given_up = vec![0; copiers.len()];
    for _ in 0..runs {
        for (place, ((_, copier), results)) in copiers.iter().zip(&mut results).enumerate() {
            // Who is never ready is not waited for in every run.
            if given_up[place] < GIVEN_UP_MAX {
                match once(bench, *copier)? {
                    Some(numbers) => results.push(numbers),
                    None => given_up[place] += 1,
                }
            }
        }
    }
    for ((name, _), times) in copiers.iter().zip(given_up).filter(|(_, times)| *times > 0) {
        notes.push(format!("{name}: not ready in {} s, given up: {times} times", LIMIT.as_secs()));
    }
    let medians: Vec<Vec<Option<f64>>> = results
        .iter()
        .map(|results| {
            (0..6).map(|place| median(&results.iter().map(|numbers| numbers[place]).collect::<Vec<_>>())).collect()
        })
        .collect();
    let ours = medians[0].clone();
    let rows = copiers.iter().zip(medians).map(|((name, _), mut numbers)| {
        let over = |place: usize, numbers: &[Option<f64>]| Some(ours[place]? / numbers[place]?);
        let ratios = [over(0, &numbers), over(1, &numbers)];
        numbers.extend(ratios);
        ((*name).to_owned(), numbers)
    });
    let title = format!("Live mirror of 1 GiB, half holes, over TCP, under 500 writes a second ({runs} runs, medians)");
    Ok(Table { title, columns: COLUMNS, rows: rows.collect(), notes })
}

/// One copy; `None` if it does not come to its end.
fn once(bench: &Bench, copier: Copier) -> Result<Option<Numbers>> {
    let images = storage_daemon::fresh(bench, ["copy-a.raw", "copy-b.raw"], DISK_MIB)?;
    match copier {
        Copier::Blockferry => ours(bench, &images).map(Some),
        Copier::Qemu(mode) => theirs(bench, &images, mode),
    }
}

fn ours(bench: &Bench, images: &[PathBuf; 2]) -> Result<Numbers> {
    let [source, destination] = bench.hosts(images)?;
    let mut seconds = None;
    let copy = || {
        let mut migrate = source.command("migrate", &[&destination.migration, "--json"]);
        let said = util::capture("bench", &mut migrate, LIMIT)?;
        if !said.status.success() {
            return Err(Error::new("bench", "migrate", said.stderr));
        }
        seconds = demo_host::number(&source.done()?, "total_ms").map(|ms| real(ms) / 1000.0);
        Ok(true)
    };
    let doors = [source.door.as_path(), destination.door.as_path()];
    let numbers = measure(images, doors, [&source.program, &destination.program], copy)?;
    let mut numbers = numbers.ok_or_else(|| Error::new("bench", "migrate", "not done"))?;
    numbers[0] = seconds.unwrap_or(numbers[0]);
    Ok(numbers)
}

fn theirs(bench: &Bench, images: &[PathBuf; 2], mode: &str) -> Result<Option<Numbers>> {
    let Daemons { source, destination, door, monitor } = &mut Daemons::start(bench, images)?;
    let copy = || {
        let deadline = Instant::now() + LIMIT;
        monitor.mirror(mode)?;
        loop {
            let ready = monitor.is_ready()?;
            if ready || Instant::now() > deadline {
                return Ok(ready);
            }
            thread::sleep(Duration::from_millis(5));
        }
    };
    // The guest stays where it is.
    measure(images, [door, door], [source, destination], copy)
}

/// Runs `copy` under a guest, and measures it; `None` if it says that it did not come to its end.
fn measure(
    images: &[PathBuf; 2],
    [from, to]: [&Path; 2],
    sides: [&Program; 2],
    copy: impl FnOnce() -> Result<bool>,
) -> Result<Option<Numbers>> {
    let died = |cause: String| Error::new("bench", "the guest", cause);
    let guest = Guest::start(from, to, "vda").map_err(died)?;
    thread::sleep(BEFORE);
    let before = sides.map(Program::cpu_s);
    let began = Instant::now();
    let copied = copy()?;
    let ended = Instant::now();
    let after = sides.map(Program::cpu_s);
    let history = guest.stop().map_err(died)?;
    let held = demo_image::allocated(&images[0]).map_err(|error| Error::new("bench", "disk image", error))?;
    let gib = real(held) / MIB / 1024.0;
    let cpu_s = after[0] + after[1] - before[0] - before[1];
    let [source, destination] = sides.map(|program| real(program.resident_max()) / MIB);
    let (median, most) = history.latency(began, ended);
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let seconds = ended.duration_since(began).as_secs_f64();
    Ok(copied.then_some([seconds, cpu_s / gib, source, destination, ms(median), ms(most)]))
}
