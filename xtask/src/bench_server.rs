//! Our server beside the others', all over a Unix socket, all on one file in the page cache, all under the same fio.

use crate::bench::{Bench, Column, Table, median};
use crate::demo_host::{self, Program};
use crate::util::{self, Error, Output, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// Size of the file, in MiB; all of it is data.
const FILE_MIB: u64 = 512;
/// How long each job runs, and how long it may take with everything around it.
const JOB: &str = "1500ms";
const JOB_LIMIT: Duration = Duration::from_secs(30);
/// How long a server may take to start or to collect its children.
const PATIENCE: Duration = Duration::from_secs(10);
/// The peers, those that are installed.
const PEERS: [&str; 3] = ["nbdkit", "qemu-nbd", "nbd-server"];
/// fio's pattern, size and depth.
const JOBS: [(&str, &str, &str); 6] = [
    ("randread", "4k", "1"),
    ("randwrite", "4k", "1"),
    ("randread", "4k", "32"),
    ("randwrite", "4k", "32"),
    ("read", "1m", "4"),
    ("write", "1m", "4"),
];
const COLUMNS: &[Column] = &[
    Column { key: "iops", title: "IOPS", digits: 0 },
    Column { key: "mib_per_s", title: "MiB/s", digits: 0 },
    Column { key: "cpu_us_per_request", title: "CPU us/rq", digits: 1 },
    Column { key: "iops_ratio", title: "x IOPS", digits: 2 },
    Column { key: "cpu_ratio", title: "x CPU", digits: 2 },
];

/// What fio says about a job, in numbers.
pub(crate) struct Fio {
    /// KiB read.
    pub(crate) read_kib: f64,
    /// KiB written.
    pub(crate) written_kib: f64,
    /// Requests a second, both directions together.
    iops: f64,
    /// Milliseconds that it took, in both directions.
    ms: f64,
}

/// Reads fio's terse output, version 3: the numbers of writes stand behind those of reads in the same order.
pub(crate) fn terse(text: &str) -> Option<Fio> {
    let fields: Vec<&str> = text.lines().find(|line| line.starts_with("3;"))?.split(';').collect();
    let number = |place: usize| fields.get(place)?.parse::<f64>().ok();
    let sum = |place: usize| Some(number(place)? + number(place + 41)?);
    Some(Fio { read_kib: number(5)?, written_kib: number(46)?, iops: sum(7)?, ms: sum(8)? })
}

/// Measures every server that is here.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    if util::find_program("fio").is_none() {
        return Err(Error::new("bench", "fio", "not installed: apt-get install fio"));
    }
    let file = bench.scratch.path("server.raw");
    fs::write(&file, vec![0x5a; usize::try_from(FILE_MIB << 20).unwrap_or(0)])
        .map_err(|error| Error::new("bench", file.display(), error))?;
    let here: Vec<&str> = PEERS.into_iter().filter(|peer| util::find_program(peer).is_some()).collect();
    let servers: Vec<&str> = [&["blockferry"], here.as_slice()].concat();
    // By job and server: IOPS and CPU.
    let mut results = vec![vec![(Vec::new(), Vec::new()); servers.len()]; JOBS.len()];
    for run in 0..runs {
        for (job, results) in JOBS.iter().zip(&mut results) {
            // Each run begins with another server: what the one before has left behind must not always meet the same.
            for place in (0..servers.len()).map(|place| (place + run) % servers.len()) {
                let (iops, cpu_us) = once(bench, servers[place], &file, *job)?;
                results[place].0.push(iops);
                results[place].1.push(cpu_us);
            }
        }
    }
    let mut rows = Vec::new();
    for ((pattern, size, depth), results) in JOBS.iter().zip(&results) {
        let medians: Vec<_> = results.iter().map(|(iops, cpu)| (median(iops), median(cpu))).collect();
        for (name, (iops, cpu)) in servers.iter().zip(&medians) {
            let (our_iops, our_cpu) = medians[0];
            let over = |ours: Option<f64>, theirs: &Option<f64>| Some(ours? / (*theirs)?);
            let kib = if *size == "4k" { 4.0 } else { 1024.0 };
            let row = vec![*iops, iops.map(|iops| iops * kib / 1024.0), *cpu, over(our_iops, iops), over(our_cpu, cpu)];
            rows.push((format!("{pattern:<9} {size} depth {depth:<2}  {name}"), row));
        }
    }
    let _ = fs::remove_file(file);
    let mut notes = vec!["x: blockferry's number over this server's; for IOPS more is better, for CPU less".to_owned()];
    let missing: Vec<&str> = PEERS.into_iter().filter(|peer| !here.contains(peer)).collect();
    if !missing.is_empty() {
        notes.push(format!("not installed: {}", missing.join(", ")));
    }
    let title = format!("Servers of one file in the page cache, Unix socket, fio ({runs} runs of {JOB}, medians)");
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

/// One server, one job: requests a second, and the server's CPU time for each in microseconds.
fn once(bench: &Bench, name: &str, file: &Path, (pattern, size, depth): (&str, &str, &str)) -> Result<(f64, f64)> {
    // What others have written must not be written back meanwhile.
    let synced = fs::File::open(file).and_then(|file| file.sync_all());
    synced.map_err(|error| Error::new("bench", file.display(), error))?;
    let server = Server::start(bench, name, file)?;
    let before = server.cpu_s();
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--time_based", "--randrepeat=1", "--output-format=terse"]);
    fio.args([format!("--uri={}", uri(&server.socket)), format!("--size={FILE_MIB}m"), format!("--runtime={JOB}")]);
    fio.args([format!("--rw={pattern}"), format!("--bs={size}"), format!("--iodepth={depth}")]);
    let said = util::capture("bench", &mut fio, JOB_LIMIT)?;
    let numbers = terse(&said.stdout).filter(|numbers| said.status.success() && numbers.iops > 0.0);
    let numbers = numbers.ok_or_else(|| Error::new("bench", format!("fio into {name}"), &said.stderr))?;
    let requests = numbers.iops * numbers.ms / 1000.0;
    Ok((numbers.iops, (server.settled_cpu_s() - before) * 1e6 / requests))
}

/// How fio names a disk behind a Unix socket.
pub(crate) fn uri(socket: &Path) -> String {
    format!("nbd+unix:///vda?socket={}", socket.display())
}

/// A server that runs.
struct Server<'a> {
    bench: &'a Bench,
    socket: PathBuf,
    /// `None`: it has made itself a daemon, whose process id is known.
    program: Option<Program>,
    id: u32,
}

impl<'a> Server<'a> {
    fn start(bench: &'a Bench, name: &str, file: &Path) -> Result<Self> {
        let socket = bench.scratch.path(&format!("{name}.sock"));
        // Not every server takes its own stale socket away.
        let _ = fs::remove_file(&socket);
        if name == "nbd-server" {
            return Self::daemon(bench, socket, file);
        }
        let mut command = Command::new(util::find_program(name).unwrap_or_else(|| bench.executable.clone()));
        let (path, place) = (file.as_os_str(), socket.as_os_str());
        match name {
            "nbdkit" => command.args(["-f", "-U"]).arg(place).arg("file").arg(path),
            "qemu-nbd" => command
                .args(["-t", "-e", "8", "-f", "raw", "-x", "vda", "--cache=writeback", "-k"])
                .arg(place)
                .arg(path),
            _ => {
                command = Command::new(&bench.executable);
                let [vda, nbd] = [format!("vda={}", file.display()), format!("unix://{}", socket.display())];
                command.args(["export", &vda, "--nbd", &nbd])
            }
        };
        command.stdout(std::process::Stdio::null());
        let mut program = Program::start(&bench.scratch, name, &mut command, &bench.log)?;
        program.listens(&socket)?;
        let id = program.id();
        Ok(Self { bench, socket, program: Some(program), id })
    }

    /// nbd-server knows no other way to serve more than one client.
    fn daemon(bench: &'a Bench, socket: PathBuf, file: &Path) -> Result<Self> {
        let fault = |cause: &dyn std::fmt::Display| Error::new("start", "nbd-server", cause);
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = port.map_err(|error| fault(&error))?.port();
        let [conf, pid] = ["nbd-server.conf", "nbd-server.pid"].map(|name| bench.scratch.path(name));
        let generic = format!("[generic]\nunixsock = {}\nport = {port}\nlistenaddr = 127.0.0.1\n", socket.display());
        fs::write(&conf, format!("{generic}[vda]\nexportname = {}\n", file.display()))
            .map_err(|error| fault(&error))?;
        let _ = fs::remove_file(&pid);
        let mut command = Command::new(util::find_program("nbd-server").unwrap_or_default());
        command.arg("-C").arg(conf).arg("-p").arg(&pid);
        // Into a file: a pipe would stay open for as long as the daemon lives.
        util::run("bench", &mut command, PATIENCE, Output::Log(&bench.log))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let id = fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse().ok());
            if let (Some(id), true) = (id, socket.exists()) {
                bench.scratch.tell("start", id);
                return Ok(Self { bench, socket, program: None, id });
            }
            if Instant::now() > deadline {
                return Err(fault(&"not ready"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn cpu_s(&self) -> f64 {
        demo_host::cpu_s(self.id)
    }

    /// The same when the process that served a connection has been collected, where there was one.
    fn settled_cpu_s(&self) -> f64 {
        let deadline = Instant::now() + PATIENCE;
        let children = format!("/proc/{0}/task/{0}/children", self.id);
        while fs::read_to_string(&children).is_ok_and(|text| !text.trim().is_empty()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        self.cpu_s()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if self.program.is_none() {
            // std can only kill its own children.
            let _ = Command::new("sh").args(["-c", "kill \"$1\"", "sh", &self.id.to_string()]).status();
            self.bench.scratch.tell("end", self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_is_understood() {
        let mut fields = vec!["0"; 130];
        (fields[0], fields[5], fields[7], fields[8]) = ("3", "400", "100", "1000");
        let read = terse(&format!("noise\n{}\n", fields.join(";"))).expect("numbers");
        assert_eq!((read.read_kib, read.iops, read.ms), (400.0, 100.0, 1000.0));
        (fields[46], fields[48], fields[49]) = ("100", "25", "1");
        let both = terse(&fields.join(";")).expect("numbers");
        assert_eq!((both.written_kib, both.iops, both.ms), (100.0, 125.0, 1001.0));
        assert!(terse("fio: error").is_none());
    }
}
