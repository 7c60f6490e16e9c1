//! `blockferry copy` beside nbdcopy and `qemu-img convert`: a disk that nobody writes to, out of a raw file into a
//! server over a Unix socket, or into another file.
//!
//! Each tool does the whole job: what it has copied is durable when it ends, and holes stay holes. In the first round
//! each copy is read again and compared, after the clock has stopped: a wrong or swollen copy is no result.

use crate::bench::{Bench, Column, Table, median};
use crate::bench_server::{Server, uri};
use crate::demo::real;
use crate::demo_host;
use crate::demo_image;
use crate::util::{self, Error, Result};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Size of each disk, in MiB.
const DISK_MIB: usize = 4096;
/// How long one copy may take.
const LIMIT: Duration = Duration::from_secs(300);
/// What a copy may hold beyond the data of its source: the file system's own books, and extents that it rounds.
const SWOLLEN: f64 = 1.05;
const COLUMNS: &[Column] = &[
    Column { key: "seconds", title: "s", digits: 2 },
    Column { key: "client_cpu_s", title: "CPU s, cl.", digits: 2 },
    Column { key: "server_cpu_s", title: "CPU s, srv", digits: 2 },
    Column { key: "cpu_s_per_gib", title: "CPU s/GiB", digits: 2 },
    Column { key: "resident_mib", title: "MiB, cl.", digits: 1 },
    Column { key: "server_resident_mib", title: "MiB, srv", digits: 1 },
    Column { key: "time_ratio", title: "x s", digits: 2 },
    Column { key: "cpu_ratio", title: "x CPU", digits: 2 },
];
const MIB: f64 = 1024.0 * 1024.0;

/// A disk's name, and how it is made.
type Disk = (&'static str, fn(&Path, usize) -> io::Result<usize>);
const DISKS: [Disk; 2] = [("full", demo_image::make_full), ("half holes", demo_image::make)];
/// Where a copy goes: through which server, and whether it is told to spare the page cache; or through none.
type Way = (&'static str, Option<(&'static str, bool)>);
const WAYS: [Way; 5] = [
    ("into nbdkit", Some(("nbdkit", false))),
    ("into nbdkit cache=none", Some(("nbdkit", true))),
    ("into export", Some(("blockferry", false))),
    ("into export --cache none", Some(("blockferry", true))),
    ("file to file", None),
];

/// Who copies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tool {
    Blockferry,
    Nbdcopy,
    QemuImg,
}

const TOOLS: [Tool; 3] = [Tool::Blockferry, Tool::Nbdcopy, Tool::QemuImg];

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Self::Blockferry => "blockferry copy",
            Self::Nbdcopy => "nbdcopy",
            Self::QemuImg => "qemu-img convert",
        }
    }

    /// Whose program it is, if it is not ours.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Blockferry => None,
            Self::Nbdcopy => Some("nbdcopy"),
            Self::QemuImg => Some("qemu-img"),
        }
    }

    fn is_here(self) -> bool {
        self.program().is_none_or(|program| util::find_program(program).is_some())
    }

    /// As a user runs it who knows that the destination is new, and who relies on the copy afterwards.
    fn command(self, bench: &Bench, source: &Path, destination: &str, into_server: bool) -> Command {
        let program = self.program().and_then(util::find_program);
        let mut command = Command::new(program.unwrap_or_else(|| bench.executable.clone()));
        match self {
            Self::Blockferry => command.arg("copy"),
            Self::Nbdcopy => command.args(["--flush", "--destination-is-zero"]),
            Self::QemuImg => {
                command.args(["convert", "-W", "-f", "raw", "-O", "raw", "-t", "writeback"]);
                command.args(into_server.then_some(["-n", "--target-is-zero"]).into_iter().flatten())
            }
        };
        command.arg(source).arg(destination);
        command
    }
}

/// What one copy has cost.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    client_cpu_s: f64,
    server_cpu_s: Option<f64>,
    /// Bytes.
    client_resident: f64,
    server_resident: Option<f64>,
}

/// What is copied: a file, and the bytes of data in it. Taken away afterwards.
struct Source {
    path: PathBuf,
    data: f64,
}

impl Source {
    fn make(bench: &Bench, number: usize, make: fn(&Path, usize) -> io::Result<usize>) -> Result<Self> {
        let path = bench.scratch.path(&format!("copier-{number}.raw"));
        let made = make(&path, DISK_MIB).and_then(|_| demo_image::allocated(&path));
        let data = real(made.map_err(|error| Error::new("bench", path.display(), error))?);
        Ok(Self { path, data })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Measures ours, and the others' that are here.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    let tools: Vec<Tool> = TOOLS.into_iter().filter(|tool| tool.is_here()).collect();
    let is_here = |server: &str| server == "blockferry" || util::find_program(server).is_some();
    let ways: Vec<_> = WAYS.into_iter().filter(|way| way.1.is_none_or(|server| is_here(server.0))).collect();
    let mut rows = Vec::new();
    // One disk after the other, so that one of them is in the page cache at a time, and room is left for the copy.
    for (number, (disk, make)) in DISKS.into_iter().enumerate() {
        let source = Source::make(bench, number, make)?;
        let mut results: Vec<Vec<Vec<Cost>>> = vec![vec![Vec::new(); tools.len()]; ways.len()];
        for run in 0..runs {
            for (way, results) in ways.iter().zip(&mut results) {
                // Each run begins with another tool: what the one before has left behind must not always meet the same.
                for place in (0..tools.len()).map(|place| (place + run) % tools.len()) {
                    results[place].push(once(bench, tools[place], &source, way.1, run == 0)?);
                }
            }
        }
        for (way, results) in ways.iter().zip(&results) {
            let group = format!("{disk}, {}", way.0);
            let ours = medians(&results[0], source.data);
            for (tool, costs) in tools.iter().zip(results) {
                let mut numbers = medians(costs, source.data);
                let over = |key: &str| {
                    let place = COLUMNS.iter().position(|column| column.key == key)?;
                    Some((*ours.get(place)?)? / (*numbers.get(place)?)?)
                };
                let ratios = [over("seconds"), over("cpu_s_per_gib")];
                numbers.extend(ratios);
                rows.push((format!("{group:<36}  {}", tool.name()), numbers));
            }
        }
    }
    let title = format!("Copies of a disk of {} GiB that nobody writes to ({runs} runs, medians)", DISK_MIB / 1024);
    Ok(Table { title, columns: COLUMNS, rows, notes: notes() })
}

/// What one must know to read the numbers.
fn notes() -> Vec<String> {
    let mut notes = vec![
        "cl.: the tool; srv: the server, over a Unix socket; CPU s/GiB: of both, per GiB of data; MiB: resident at most"
            .to_owned(),
        "x: blockferry's number over this tool's; less is better".to_owned(),
        "nbdkit cache=none lets go of what it has written, export --cache none writes past the page cache".to_owned(),
        "source in the page cache, destination new; durable at the end: FLUSH, or a sync of the file".to_owned(),
        "blockferry finds out that the destination is zero, the others are told; it syncs a new file's name too"
            .to_owned(),
        "nbdcopy --flush --destination-is-zero; qemu-img convert -W -t writeback, into a server -n --target-is-zero"
            .to_owned(),
        "each copy of the first run is compared with its source, and holds no more than the data".to_owned(),
    ];
    let peers = TOOLS.into_iter().filter_map(Tool::program).chain(["nbdkit"]);
    let missing: Vec<&str> = peers.filter(|peer| util::find_program(peer).is_none()).collect();
    if !missing.is_empty() {
        notes.push(format!("not installed: {}", missing.join(", ")));
    }
    notes
}

/// The columns up to the ratios; `data`: bytes.
fn medians(costs: &[Cost], data: f64) -> Vec<Option<f64>> {
    let middle = |of: &dyn Fn(&Cost) -> Option<f64>| median(&costs.iter().filter_map(of).collect::<Vec<_>>());
    let gib = data / MIB / 1024.0;
    vec![
        middle(&|cost| Some(cost.seconds)),
        middle(&|cost| Some(cost.client_cpu_s)),
        middle(&|cost| cost.server_cpu_s),
        middle(&|cost| Some((cost.client_cpu_s + cost.server_cpu_s.unwrap_or(0.0)) / gib)),
        middle(&|cost| Some(cost.client_resident / MIB)),
        middle(&|cost| Some(cost.server_resident? / MIB)),
    ]
}

/// One copy, measured, and if `check` looked at.
fn once(bench: &Bench, tool: Tool, source: &Source, server: Option<(&str, bool)>, check: bool) -> Result<Cost> {
    let copy = bench.scratch.path("copier-copy.raw");
    let _ = fs::remove_file(&copy);
    let fault = |error: io::Error| Error::new("bench", copy.display(), error);
    // Whoever comes first must not be the one who fetches it from the disk.
    File::open(&source.path).and_then(|mut file| io::copy(&mut file, &mut io::sink())).map_err(fault)?;
    let server = match server {
        Some((name, spares)) => {
            let made = File::create_new(&copy).and_then(|file| {
                file.set_len((DISK_MIB as u64) << 20)?;
                file.sync_all()
            });
            made.map_err(fault)?;
            Some(Server::start(bench, name, &copy, spares)?)
        }
        None => None,
    };
    let destination = server.as_ref().map_or_else(|| copy.display().to_string(), |server| uri(&server.socket));
    let mut command = tool.command(bench, &source.path, &destination, server.is_some());
    let before = server.as_ref().map(Server::cpu_s);
    let spent = demo_host::spend(&bench.scratch, tool.name(), &mut command, &bench.log, LIMIT)?;
    let server_cpu_s = server.as_ref().zip(before).map(|(server, before)| server.settled_cpu_s() - before);
    let server_resident = server.as_ref().and_then(Server::resident_max);
    drop(server);
    if check {
        compare(source, &copy).map_err(|cause| Error::new("bench", tool.name(), cause))?;
    }
    fs::remove_file(&copy).map_err(fault)?;
    Ok(Cost {
        seconds: spent.seconds,
        client_cpu_s: spent.cpu_s,
        server_cpu_s,
        client_resident: real(spent.resident),
        server_resident,
    })
}

/// Whether a copy is one, and no thicker than its source.
fn compare(source: &Source, copy: &Path) -> std::result::Result<(), String> {
    let (_, differs) = demo_image::compare(&source.path, copy, |_| false).map_err(|error| error.to_string())?;
    if let Some(block) = differs {
        return Err(format!("the copy differs from its source at {}", block * demo_image::BLOCK as u64));
    }
    let held = real(demo_image::allocated(copy).map_err(|error| error.to_string())?);
    if held > source.data * SWOLLEN {
        return Err(format!("the copy holds {:.0} MiB, its source {:.0}", held / MIB, source.data / MIB));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_wrong_or_swollen_copy_is_no_result() {
        let place = |name: &str| std::env::temp_dir().join(format!("xtask-copier-{name}-{}", std::process::id()));
        let (path, copy) = (place("source"), place("copy"));
        demo_image::make(&path, 64).expect("an image");
        let source = Source { data: real(demo_image::allocated(&path).expect("a file")), path };
        demo_image::make(&copy, 64).expect("an image");
        assert_eq!(compare(&source, &copy), Ok(()));
        let file = File::options().write(true).open(&copy).expect("a file");
        file.write_all_at(&vec![0; 15 << 20], 1 << 20).expect("a write");
        file.sync_all().expect("a sync");
        let swollen = compare(&source, &copy).expect_err("a hole is none any more");
        assert!(swollen.contains("the copy holds 47 MiB, its source 32"), "{swollen}");
        file.write_all_at(b"x", 5 * 4096 + 1).expect("a write");
        assert_eq!(compare(&source, &copy), Err("the copy differs from its source at 20480".to_owned()));
        fs::remove_file(copy).expect("a file");
    }

    #[test]
    fn ratios_are_of_what_was_measured() {
        let cost = |cpu| Cost {
            seconds: 2.0,
            client_cpu_s: cpu,
            server_cpu_s: Some(1.0),
            client_resident: 3.0 * MIB,
            server_resident: None,
        };
        let numbers = medians(&[cost(1.0), cost(9.0), cost(3.0)], 2048.0 * MIB);
        assert_eq!(numbers, [Some(2.0), Some(3.0), Some(1.0), Some(2.0), Some(3.0), None]);
        assert_eq!(COLUMNS.len(), numbers.len() + 2);
    }
}
