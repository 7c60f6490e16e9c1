//! The bare chain: a file is read, goes through a socket and is written into a new file, with no protocol and nothing
//! that could be left out. Whoever copies over a socket pays this; the other benches are held against it.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::util::{Error, Result};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

const KIB: usize = 1024;
/// Size of the file; all of it is data, in the page cache.
const FILE_BYTES: usize = 512 * KIB * KIB;
/// What is measured.
const KINDS: [Kind; 7] = [
    Kind { tcp: false, piece: 256 * KIB, durable: false },
    Kind { tcp: false, piece: 512 * KIB, durable: false },
    Kind { tcp: false, piece: 1024 * KIB, durable: false },
    Kind { tcp: true, piece: 256 * KIB, durable: false },
    Kind { tcp: true, piece: 512 * KIB, durable: false },
    Kind { tcp: true, piece: 1024 * KIB, durable: false },
    Kind { tcp: true, piece: 256 * KIB, durable: true },
];
const COLUMNS: &[Column] = &[
    Column { key: "cpu_s_per_gib", title: "CPU s/GiB", digits: 3 },
    Column { key: "mib_per_s", title: "MiB/s", digits: 0 },
];

/// One kind of chain.
#[derive(Clone, Copy)]
struct Kind {
    tcp: bool,
    /// Bytes of each read and write.
    piece: usize,
    /// The new file is synced at the end, as a copy must be that somebody relies on.
    durable: bool,
}

/// What one run cost.
struct Cost {
    cpu_s_per_gib: f64,
    mib_per_s: f64,
}

/// Measures all kinds.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let source = bench.scratch.path("chain.raw");
    let made = fs::write(&source, vec![0x5a; FILE_BYTES]).and_then(|()| File::open(&source)?.sync_all());
    made.map_err(|error| Error::new("bench", source.display(), error))?;
    let mut rows = Vec::new();
    for kind in KINDS {
        let costs = several(bench, &source, kind, runs)?;
        let of = |number: fn(&Cost) -> f64| median(&costs.iter().map(number).collect::<Vec<_>>());
        let socket = if kind.tcp { "TCP" } else { "Unix socket" };
        let end = if kind.durable { ", then fsync" } else { "" };
        let name = format!("{socket}, {} KiB{end}", kind.piece / KIB);
        rows.push((name, vec![of(|cost| cost.cpu_s_per_gib), of(|cost| cost.mib_per_s)]));
    }
    let title = format!("The bare chain: read, socket, write into a new file ({runs} runs, medians)");
    // Nobody needs it any more.
    let _ = fs::remove_file(source);
    Ok(Table { title, columns: COLUMNS, rows, notes: Vec::new() })
}

/// What the others are held against, in CPU seconds per GiB: the cheapest kind over TCP, and the one with the fsync.
pub(crate) fn reference(bench: &Bench) -> Result<[f64; 2]> {
    let table = run(bench, 3)?;
    let of = |durable| {
        let rows = table.rows.iter().zip(KINDS).filter(|(_, kind)| kind.tcp && kind.durable == durable);
        rows.filter_map(|(row, _)| row.1[0]).fold(f64::INFINITY, f64::min)
    };
    Ok([of(false), of(true)])
}

fn several(bench: &Bench, source: &Path, kind: Kind, runs: usize) -> Result<Vec<Cost>> {
    let target = bench.scratch.path("chain-copy.raw");
    let one = || {
        let cost = once(source, &target, kind);
        fs::remove_file(&target)?;
        cost
    };
    (0..runs).map(|_| one().map_err(|error| Error::new("bench", "chain", error))).collect()
}

fn once(source: &Path, target: &Path, kind: Kind) -> io::Result<Cost> {
    let (from, to) = (File::open(source)?, File::create_new(target)?);
    let began = Instant::now();
    let cpu_ns = if kind.tcp {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let out = TcpStream::connect(listener.local_addr()?)?;
        let (into, _) = listener.accept()?;
        both(from, out, into, to, kind)?
    } else {
        let (out, into) = UnixStream::pair()?;
        both(from, out, into, to, kind)?
    };
    let gib = real(FILE_BYTES as u64) / real(1 << 30);
    let seconds = began.elapsed().as_secs_f64();
    Ok(Cost { cpu_s_per_gib: real(cpu_ns) / 1e9 / gib, mib_per_s: gib * 1024.0 / seconds })
}

/// Both ends, each on a thread of its own. Returns the CPU time of both, in nanoseconds.
fn both(
    from: File,
    out: impl Write + Send + 'static,
    into: impl Read + Send + 'static,
    to: File,
    kind: Kind,
) -> io::Result<u64> {
    let sender = thread::spawn(move || pump(from, out, kind.piece));
    let receiver = thread::spawn(move || {
        let before = cpu_ns();
        pump(into, &to, kind.piece)?;
        if kind.durable {
            to.sync_all()?;
        }
        Ok(cpu_ns() - before)
    });
    let panicked = |_| io::Error::other("a thread has panicked");
    let received: io::Result<u64> = receiver.join().map_err(panicked)?;
    Ok(sender.join().map_err(panicked)?? + received?)
}

/// Moves everything from one to the other. Returns the thread's CPU time.
fn pump(mut from: impl Read, mut to: impl Write, piece: usize) -> io::Result<u64> {
    let before = cpu_ns();
    let mut buffer = vec![0; piece];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(cpu_ns() - before);
        }
        to.write_all(&buffer[..length])?;
    }
}

/// The CPU time of this thread so far.
fn cpu_ns() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}
