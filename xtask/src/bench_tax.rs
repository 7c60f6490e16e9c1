//! The permanent tax: what a guest's I/O costs when it goes through a server on the same host and nothing migrates.
//!
//! QEMU's own block layer is the client, as it is in the guest's VMM (`qemu-img bench`): once on the file itself, then
//! on the same file behind a server. What is counted is the CPU time of both, client and server, for each request.

use crate::bench::{Bench, Column, Table, median};
use crate::bench_server::{Server, uri};
use crate::util::{self, Error, Result};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Size of the file, in MiB; all of it is data.
const FILE_MIB: u64 = 256;
/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(60);
const CLIENT: &str = "qemu-img";
/// Who is in between; the first stands for nobody.
const WAYS: [&str; 4] = ["QEMU on the file", "blockferry", "qemu-storage-daemon", "qemu-nbd"];
/// Write or read, depth, and how many requests.
const JOBS: [(bool, &str, &str, u32); 4] = [
    (false, "4096", "1", 20_000),
    (true, "4096", "1", 20_000),
    (false, "4096", "32", 50_000),
    (true, "4096", "32", 50_000),
];
/// From one request to the next, in bytes: not neighbours, and the whole file in the end.
const STEP: &str = "69632";
const COLUMNS: &[Column] = &[
    Column { key: "us_per_request", title: "us/rq", digits: 1 },
    Column { key: "cpu_us_per_request", title: "CPU us/rq", digits: 1 },
    Column { key: "server_us_per_request", title: "server's", digits: 1 },
    Column { key: "time_ratio", title: "x file's", digits: 2 },
    Column { key: "cpu_ratio", title: "x CPU", digits: 2 },
];

/// Microseconds, CPU microseconds of both, and of the server alone.
type Numbers = [f64; 3];

/// Measures.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    if util::find_program(CLIENT).is_none() {
        return Err(Error::new("bench", CLIENT, "not installed: apt-get install qemu-utils"));
    }
    let file = bench.scratch.path("tax.raw");
    fs::write(&file, vec![0x5a; usize::try_from(FILE_MIB << 20).unwrap_or(0)])
        .map_err(|error| Error::new("bench", file.display(), error))?;
    let here = |way: &&str| way.contains(' ') || *way == "blockferry" || util::find_program(way).is_some();
    let ways: Vec<&str> = WAYS.into_iter().filter(here).collect();
    let mut results: Vec<Vec<Vec<Numbers>>> = vec![vec![Vec::new(); ways.len()]; JOBS.len()];
    for run in 0..runs {
        for (job, results) in JOBS.iter().zip(&mut results) {
            for place in (0..ways.len()).map(|place| (place + run) % ways.len()) {
                results[place].push(once(bench, ways[place], &file, *job)?);
            }
        }
    }
    let mut rows = Vec::new();
    for ((write, size, depth, _), results) in JOBS.iter().zip(&results) {
        let middle = |numbers: &[Numbers], place: usize| {
            median(&numbers.iter().map(|numbers| numbers[place]).collect::<Vec<_>>())
        };
        let bare = [0, 1].map(|place| middle(&results[0], place));
        for (way, numbers) in ways.iter().zip(results) {
            let [time, cpu, server] = [0, 1, 2].map(|place| middle(numbers, place));
            let over = |theirs: Option<f64>, bare: Option<f64>| Some(theirs? / bare?);
            let word = if *write { "write" } else { "read" };
            let name = format!("{word} {size}, depth {depth:<2}  {way}");
            rows.push((name, vec![time, cpu, server, over(time, bare[0]), over(cpu, bare[1])]));
        }
    }
    let _ = fs::remove_file(file);
    let notes = vec![
        "us/rq: time over requests; CPU: of QEMU and the server together; x: over those of QEMU on the file".to_owned(),
        "all through the page cache, so that what is compared is the way and not the disk".to_owned(),
    ];
    let title = format!("The permanent tax: QEMU's block layer on a file and through servers ({runs} runs, medians)");
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

fn once(
    bench: &Bench,
    way: &str,
    file: &Path,
    (write, size, depth, count): (bool, &str, &str, u32),
) -> Result<Numbers> {
    let synced = fs::File::open(file).and_then(|file| file.sync_all());
    synced.map_err(|error| Error::new("bench", file.display(), error))?;
    let server = if way == WAYS[0] { None } else { Some(Server::start(bench, way, file, false)?) };
    let place = server.as_ref().map_or_else(|| file.display().to_string(), |server| uri(&server.socket));
    let before = server.as_ref().map_or(0.0, Server::cpu_s);
    let mut client = Command::new(CLIENT);
    client.args(["bench", "-f", "raw", "-t", "writeback", "-s", size, "-S", STEP, "-d", depth]);
    client.arg("-c").arg(count.to_string());
    if write {
        client.arg("-w");
    }
    let children = children_cpu_s();
    let said = util::capture("bench", client.arg(&place), LIMIT)?;
    let client_s = children_cpu_s() - children;
    let seconds = seconds(&said.stdout).filter(|_| said.status.success());
    let seconds = seconds.ok_or_else(|| Error::new("bench", format!("{CLIENT} on {place}"), &said.stderr))?;
    let server_s = server.as_ref().map_or(0.0, Server::settled_cpu_s) - before;
    let each = |seconds: f64| seconds * 1e6 / f64::from(count);
    Ok([each(seconds), each(client_s + server_s), each(server_s)])
}

/// The time in "Run completed in 0.123 seconds."
fn seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.split_once("Run completed in ")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The CPU time of this process's children that have ended, in seconds.
fn children_cpu_s() -> f64 {
    crate::demo_host::ended_children_cpu_s()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_found_in_what_qemu_says() {
        let said = "Sending 100 read requests, 4096 bytes each, 1 in parallel (starting at offset 0, step size 69632)\n\
                    Run completed in 0.125 seconds.";
        assert_eq!(seconds(said), Some(0.125));
        assert_eq!(seconds("qemu-img: Could not open"), None);
    }
}
