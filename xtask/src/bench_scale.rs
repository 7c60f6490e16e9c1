//! How the cost of a migration grows: with the size of a disk, with the number of disks, with the number of guests on a
//! host. The data is the same everywhere; what grows is what it is spread over.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::demo_host::{self, Host, Program};
use crate::util::{self, Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Data of all guests and disks together, in MiB.
const DATA_MIB: u64 = 512;
/// How long one migration may take.
const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const COLUMNS: &[Column] = &[
    Column { key: "resident_source_mib", title: "MiB, from", digits: 2 },
    Column { key: "resident_destination_mib", title: "MiB, to", digits: 2 },
    Column { key: "idle_mib", title: "MiB, idle", digits: 2 },
    Column { key: "cpu_s_per_gib", title: "CPU s/GiB", digits: 2 },
    Column { key: "switchover_ms", title: "switch, ms", digits: 1 },
    Column { key: "seconds", title: "s", digits: 2 },
];
type Numbers = [f64; 6];

/// What is spread: guests, disks of each, and the size of each disk in MiB.
#[derive(Clone, Copy)]
struct Shape {
    guests: u64,
    disks: u64,
    size_mib: u64,
}

const fn shape(guests: u64, disks: u64, size_mib: u64) -> Shape {
    Shape { guests, disks, size_mib }
}

const SHAPES: [(&str, Shape); 11] = [
    ("one disk of  1 GiB", shape(1, 1, 1024)),
    ("one disk of  4 GiB", shape(1, 1, 4 * 1024)),
    ("one disk of  16 GiB", shape(1, 1, 16 * 1024)),
    ("one disk of  64 GiB", shape(1, 1, 64 * 1024)),
    ("disks of 1 GiB  1", shape(1, 1, 1024)),
    ("disks of 1 GiB  4", shape(1, 4, 1024)),
    ("disks of 1 GiB  16", shape(1, 16, 1024)),
    ("guests at once, 1 GiB each  1", shape(1, 1, 1024)),
    ("guests at once, 1 GiB each  4", shape(4, 1, 1024)),
    ("guests at once, 1 GiB each  16", shape(16, 1, 1024)),
    ("guests at once, 1 GiB each  64", shape(64, 1, 1024)),
];

/// Measures.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let mut results: Vec<Vec<Numbers>> = SHAPES.iter().map(|_| Vec::new()).collect();
    for _ in 0..runs {
        for ((_, shape), results) in SHAPES.iter().zip(&mut results) {
            results.push(once(bench, *shape)?);
        }
    }
    let rows = SHAPES.iter().zip(&results).map(|((name, _), results)| {
        let middle = |place: usize| median(&results.iter().map(|numbers| numbers[place]).collect::<Vec<_>>());
        ((*name).to_owned(), (0..COLUMNS.len()).map(middle).collect())
    });
    let notes = vec![
        format!("{DATA_MIB} MiB of data in all, spread evenly; --verify none; CPU: of all processes, per GiB of data"),
        "MiB: resident at most, of the largest process on each side; idle: a process that has not migrated yet"
            .to_owned(),
        "switch: the longest of a run; s: until the last guest had moved".to_owned(),
    ];
    let title = format!("How cost grows: migrations over TCP ({runs} runs, medians)");
    Ok(Table { title, columns: COLUMNS, rows: rows.collect(), notes })
}

/// One guest on both hosts.
struct Pair {
    source: Host,
    destination: Host,
    images: Vec<PathBuf>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        for image in &self.images {
            let _ = std::fs::remove_file(image);
        }
    }
}

fn once(bench: &Bench, shape: Shape) -> Result<Numbers> {
    let data_mib = DATA_MIB / (shape.guests * shape.disks);
    let pairs: Vec<Pair> =
        (0..shape.guests).map(|guest| start(bench, guest, shape, data_mib)).collect::<Result<_>>()?;
    let programs = || pairs.iter().flat_map(|pair| [&pair.source.program, &pair.destination.program]);
    let idle = programs().map(Program::resident_max).max().unwrap_or(0);
    let before: f64 = programs().map(Program::cpu_s).sum();
    let began = std::time::Instant::now();
    thread::scope(|scope| {
        let movers: Vec<_> = pairs.iter().map(|pair| scope.spawn(|| migrate(pair))).collect();
        let ended = movers
            .into_iter()
            .map(|mover| mover.join().unwrap_or_else(|_| Err(Error::new("bench", "scale", "a thread has panicked"))));
        ended.collect::<Result<Vec<()>>>()
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu_s = programs().map(Program::cpu_s).sum::<f64>() - before;
    let mut switchover_us = 0;
    for pair in &pairs {
        switchover_us = switchover_us.max(demo_host::number(&pair.source.done()?, "switchover_us").unwrap_or(0));
    }
    let most = |side: fn(&Pair) -> &Program| {
        let bytes = pairs.iter().map(|pair| side(pair).resident_max()).max().unwrap_or(0);
        real(bytes) / real(MIB)
    };
    let gib = real(DATA_MIB) / 1024.0;
    Ok([
        most(|pair| &pair.source.program),
        most(|pair| &pair.destination.program),
        real(idle) / real(MIB),
        cpu_s / gib,
        real(switchover_us) / 1000.0,
        seconds,
    ])
}

fn start(bench: &Bench, guest: u64, shape: Shape, data_mib: u64) -> Result<Pair> {
    let mut images = Vec::new();
    let (mut from, mut to) = (Vec::new(), Vec::new());
    for disk in 0..shape.disks {
        let [a, b] = ["a", "b"].map(|side| bench.scratch.path(&format!("scale-{guest}-{disk}-{side}.raw")));
        make(&a, shape.size_mib, data_mib).map_err(|error| Error::new("bench", a.display(), error))?;
        from.push(format!("vd{disk},file={}", a.display()));
        to.push(format!("vd{disk},file={},size={}M", b.display(), shape.size_mib));
        images.extend([a, b]);
    }
    let host =
        |name: String, disks: &[String]| Host::start(&bench.scratch, &bench.executable, &name, disks, &bench.log);
    let (source, destination) = (host(format!("A{guest}"), &from)?, host(format!("B{guest}"), &to)?);
    source.ask("claim", &[])?;
    Ok(Pair { source, destination, images })
}

/// A sparse image with so many MiB of data, in pieces of 1 MiB that lie evenly over it.
fn make(path: &Path, size_mib: u64, data_mib: u64) -> std::io::Result<()> {
    let _ = std::fs::remove_file(path);
    let file = File::create_new(path)?;
    file.set_len(size_mib * MIB)?;
    let step = size_mib / data_mib;
    let mut piece: Vec<u8> = (0..MIB).map(|at| (at % 251).to_le_bytes()[0]).collect();
    for number in 0..data_mib {
        piece[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all_at(&piece, number * step * MIB)?;
    }
    file.sync_all()
}

fn migrate(pair: &Pair) -> Result<()> {
    let mut migrate = pair.source.command("migrate", &[&pair.destination.migration, "--json", "--verify", "none"]);
    let said = util::capture("bench", &mut migrate, LIMIT)?;
    if said.status.success() { Ok(()) } else { Err(Error::new("bench", "migrate", said.stderr)) }
}
