//! The live mirror beside QEMU's: the same disk, the same guest that writes all the while, over TCP.
//!
//! The time is from the order to the end: for us, until the destination owns; for two qemu-storage-daemons, which own
//! nothing, until `blockdev-mirror` is ready. A mirror that is not ready in time is ended.

use crate::bench::{Bench, Column, Table, median};
use crate::demo::real;
use crate::demo_guest::Guest;
use crate::demo_host::{self, Host, Program};
use crate::demo_image;
use crate::util::{self, Error, Result};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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
/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
const PEER: &str = "qemu-storage-daemon";
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
    let images = ["copy-a.raw", "copy-b.raw"].map(|name| bench.scratch.path(name));
    for image in &images {
        // From the run before.
        let _ = fs::remove_file(image);
    }
    let fault = |error: std::io::Error| Error::new("bench", "disk image", error);
    demo_image::make(&images[0], DISK_MIB).map_err(fault)?;
    match copier {
        Copier::Blockferry => ours(bench, &images).map(Some),
        Copier::Qemu(mode) => theirs(bench, &images, mode),
    }
}

fn ours(bench: &Bench, images: &[PathBuf; 2]) -> Result<Numbers> {
    let host = |name, image: &Path| {
        let disk = format!("vda,file={}", image.display());
        Host::start(&bench.scratch, &bench.executable, name, &[disk], &bench.log)
    };
    let (source, destination) = (host("A", &images[0])?, host("B", &images[1])?);
    source.ask("claim", &[])?;
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
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let port = listener.map_err(|error| Error::new("bench", PEER, error))?.port();
    let size = (DISK_MIB as u64) << 20;
    fs::File::create_new(&images[1])
        .and_then(|file| file.set_len(size))
        .map_err(|error| Error::new("bench", images[1].display(), error))?;
    let [door, monitor] = ["qsd.nbd", "qsd.qmp"].map(|name| bench.scratch.path(name));
    for socket in [&door, &monitor] {
        // Left by the run before.
        let _ = fs::remove_file(socket);
    }
    let mut destination =
        storage_daemon(bench, &images[1], &format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}"));
    let destination = Program::start(&bench.scratch, PEER, &mut destination, &bench.log)?;
    let mut source = storage_daemon(bench, &images[0], &format!("addr.type=unix,addr.path={}", door.display()));
    source.arg("--chardev").arg(format!("socket,id=m,server=on,wait=off,path={}", monitor.display()));
    source.args(["--monitor", "chardev=m"]);
    let mut source = Program::start(&bench.scratch, PEER, &mut source, &bench.log)?;
    source.listens(&door)?;
    let deadline = Instant::now() + ANSWER;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    let mut qmp = Qmp::connect(&monitor)?;
    let target = format!(
        "{{\"execute\":\"blockdev-add\",\"arguments\":{{\"driver\":\"nbd\",\"node-name\":\"target\",\"export\":\"vda\",\
         \"discard\":\"unmap\",\"server\":{{\"type\":\"inet\",\"host\":\"127.0.0.1\",\"port\":\"{port}\"}}}}}}"
    );
    let mirror = format!(
        "{{\"execute\":\"blockdev-mirror\",\"arguments\":{{\"job-id\":\"j\",\"device\":\"vda\",\"target\":\"target\",\
         \"sync\":\"full\",\"copy-mode\":\"{mode}\"}}}}"
    );
    let copy = || {
        let deadline = Instant::now() + LIMIT;
        qmp.ask(&target)?;
        qmp.ask(&mirror)?;
        loop {
            let jobs = qmp.ask("{\"execute\":\"query-block-jobs\"}")?;
            if jobs.contains("\"ready\": true") || Instant::now() > deadline {
                return Ok(jobs.contains("\"ready\": true"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    };
    // The guest stays where it is.
    measure(images, [&door, &door], [&source, &destination], copy)
}

/// A storage daemon that exports `image` as vda.
fn storage_daemon(bench: &Bench, image: &Path, server: &str) -> Command {
    let mut command = Command::new(util::find_program(PEER).unwrap_or_else(|| PEER.into()));
    command.current_dir(bench.scratch.path("")).stdout(Stdio::null());
    command.arg("--blockdev").arg(format!("driver=file,node-name=f,discard=unmap,filename={}", image.display()));
    command.args(["--blockdev", "driver=raw,node-name=vda,discard=unmap,file=f", "--nbd-server", server]);
    command.args(["--export", "type=nbd,id=e,node-name=vda,name=vda,writable=on"]);
    command
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

/// QEMU's monitor.
struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let fault = |error: std::io::Error| Error::new("bench", "QMP", error);
        let socket = UnixStream::connect(path).map_err(fault)?;
        socket.set_read_timeout(Some(ANSWER)).map_err(fault)?;
        let mut qmp = Self { lines: BufReader::new(socket) };
        qmp.ask("{\"execute\":\"qmp_capabilities\"}")?;
        Ok(qmp)
    }

    /// Says something, and returns the answer; events and the greeting are passed over.
    fn ask(&mut self, command: &str) -> Result<String> {
        let fault = |cause: &dyn std::fmt::Display| Error::new("bench", "QMP", cause);
        writeln!(self.lines.get_mut(), "{command}").map_err(|error| fault(&error))?;
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).map_err(|error| fault(&error))? == 0 {
                return Err(fault(&"closed"));
            }
            if line.contains("\"error\":") {
                return Err(fault(&line));
            }
            if line.contains("\"return\":") {
                return Ok(line);
            }
        }
    }
}
