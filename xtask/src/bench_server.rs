//! Our server beside the others', all over a Unix socket, all on the same file, all under the same fio: a file in the
//! page cache, one on tmpfs, and one past the page cache, for those who can (`cache=none`).

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
const JOB: &str = "500ms";
const JOB_LIMIT: Duration = Duration::from_secs(30);
/// How long a server may take to start or to collect its children.
const PATIENCE: Duration = Duration::from_secs(10);
/// The peers, those that are installed.
const PEERS: [&str; 4] = ["nbdkit", "qemu-nbd", "nbd-server", "qemu-storage-daemon"];
/// Those of them that can read and write past the page cache.
const DIRECT: [&str; 2] = ["qemu-nbd", "qemu-storage-daemon"];
/// Where the file is in memory.
const TMPFS: &str = "/dev/shm";

/// Where the file is, and how it is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Medium {
    Cached,
    Tmpfs,
    Direct,
}

/// What fio does.
#[derive(Clone, Copy)]
struct Job {
    medium: Medium,
    pattern: &'static str,
    size: &'static str,
    depth: &'static str,
    connections: &'static str,
}

const fn job(
    medium: Medium,
    pattern: &'static str,
    size: &'static str,
    depth: &'static str,
    connections: &'static str,
) -> Job {
    Job { medium, pattern, size, depth, connections }
}

const JOBS: [Job; 13] = [
    job(Medium::Cached, "randread", "4k", "1", "1"),
    job(Medium::Cached, "randwrite", "4k", "1", "1"),
    job(Medium::Cached, "randread", "4k", "32", "1"),
    job(Medium::Cached, "randwrite", "4k", "32", "1"),
    job(Medium::Cached, "randread", "4k", "32", "4"),
    job(Medium::Cached, "randwrite", "4k", "32", "4"),
    job(Medium::Cached, "read", "1m", "4", "1"),
    job(Medium::Cached, "write", "1m", "4", "1"),
    job(Medium::Tmpfs, "randread", "4k", "32", "1"),
    job(Medium::Tmpfs, "randwrite", "4k", "32", "1"),
    job(Medium::Direct, "randread", "4k", "32", "1"),
    job(Medium::Direct, "randwrite", "4k", "32", "1"),
    job(Medium::Direct, "read", "1m", "4", "1"),
];

impl Job {
    /// For people, and for the picture, which puts together what has the same name.
    fn name(&self) -> String {
        let medium = match self.medium {
            Medium::Cached => "page cache",
            Medium::Tmpfs => "tmpfs",
            Medium::Direct => "cache=none",
        };
        let Self { pattern, size, depth, connections, .. } = self;
        format!("{medium}, {pattern} {size}, depth {depth} x {connections}")
    }
}

const COLUMNS: &[Column] = &[
    Column { key: "iops", title: "IOPS", digits: 0 },
    Column { key: "mib_per_s", title: "MiB/s", digits: 0 },
    Column { key: "cpu_us_per_request", title: "CPU us/rq", digits: 1 },
    Column { key: "resident_mib", title: "MiB", digits: 1 },
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
}

/// Reads fio's terse output, version 3: the numbers of writes stand behind those of reads in the same order.
pub(crate) fn terse(text: &str) -> Option<Fio> {
    let fields: Vec<&str> = text.lines().find(|line| line.starts_with("3;"))?.split(';').collect();
    let number = |place: usize| fields.get(place)?.parse::<f64>().ok();
    let sum = |place: usize| Some(number(place)? + number(place + 41)?);
    Some(Fio { read_kib: number(5)?, written_kib: number(46)?, iops: sum(7)? })
}

/// What one run of one job costs.
struct Cost {
    iops: f64,
    cpu_us: f64,
    /// Bytes, where one process does all the work.
    resident: Option<f64>,
}

/// The files of a run; the one in memory is taken away whatever happens.
struct Files {
    on_disk: PathBuf,
    in_memory: Option<PathBuf>,
}

impl Files {
    fn make(bench: &Bench) -> Result<Self> {
        let bytes = vec![0x5a; usize::try_from(FILE_MIB << 20).unwrap_or(0)];
        let write = |path: &Path| {
            fs::write(path, &bytes).map_err(|error| Error::new("bench", path.display(), error))?;
            Ok(())
        };
        let files = Self {
            on_disk: bench.scratch.path("server.raw"),
            in_memory: Path::new(TMPFS)
                .is_dir()
                .then(|| Path::new(TMPFS).join(format!("blockferry-bench-{}.raw", std::process::id()))),
        };
        write(&files.on_disk)?;
        files.in_memory.as_deref().map_or(Ok(()), write)?;
        Ok(files)
    }

    fn of(&self, medium: Medium) -> Option<&Path> {
        if medium == Medium::Tmpfs { self.in_memory.as_deref() } else { Some(&self.on_disk) }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.on_disk);
        if let Some(path) = &self.in_memory {
            let _ = fs::remove_file(path);
        }
    }
}

/// Measures every server that is here.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<Table> {
    if util::find_program("fio").is_none() {
        return Err(Error::new("bench", "fio", "not installed: apt-get install fio"));
    }
    let files = Files::make(bench)?;
    let here: Vec<&str> = PEERS.into_iter().filter(|peer| util::find_program(peer).is_some()).collect();
    let all: Vec<&str> = [&["blockferry"], here.as_slice()].concat();
    let servers = |medium: Medium| -> Vec<&str> {
        let can = |name: &&str| medium != Medium::Direct || *name == "blockferry" || DIRECT.contains(name);
        all.iter().copied().filter(can).collect()
    };
    let jobs: Vec<Job> = JOBS.into_iter().filter(|job| files.of(job.medium).is_some()).collect();
    // By job and server.
    let mut results: Vec<Vec<Vec<Cost>>> =
        jobs.iter().map(|job| servers(job.medium).iter().map(|_| Vec::new()).collect()).collect();
    for run in 0..runs {
        for (job, results) in jobs.iter().zip(&mut results) {
            let Some(file) = files.of(job.medium) else { continue };
            let servers = servers(job.medium);
            // Each run begins with another server: what the one before has left behind must not always meet the same.
            for place in (0..servers.len()).map(|place| (place + run) % servers.len()) {
                results[place].push(once(bench, servers[place], file, job)?);
            }
        }
    }
    let mut rows = Vec::new();
    for (job, results) in jobs.iter().zip(&results) {
        let middle =
            |costs: &[Cost], of: fn(&Cost) -> Option<f64>| median(&costs.iter().filter_map(of).collect::<Vec<_>>());
        let (our_iops, our_cpu) = (middle(&results[0], |c| Some(c.iops)), middle(&results[0], |c| Some(c.cpu_us)));
        for (name, costs) in servers(job.medium).iter().zip(results) {
            let (iops, cpu) = (middle(costs, |c| Some(c.iops)), middle(costs, |c| Some(c.cpu_us)));
            let over = |ours: Option<f64>, theirs: Option<f64>| Some(ours? / theirs?);
            let kib = if job.size == "4k" { 4.0 } else { 1024.0 };
            let resident = middle(costs, |c| c.resident).map(|bytes| bytes / (1024.0 * 1024.0));
            let mib_per_s = iops.map(|iops| iops * kib / 1024.0);
            let row = vec![iops, mib_per_s, cpu, resident, over(our_iops, iops), over(our_cpu, cpu)];
            rows.push((format!("{:<38}  {name}", job.name()), row));
        }
    }
    let mut notes = vec![
        "depth 32 x 4: 32 requests under way on each of 4 connections; MiB: resident at most, the server's process"
            .to_owned(),
        "x: blockferry's number over this server's; for IOPS more is better, for CPU less".to_owned(),
    ];
    let missing: Vec<&str> = PEERS.into_iter().filter(|peer| !here.contains(peer)).collect();
    if !missing.is_empty() {
        notes.push(format!("not installed: {}", missing.join(", ")));
    }
    let title = format!("Servers of one file of {FILE_MIB} MiB, Unix socket, fio ({runs} runs of {JOB}, medians)");
    Ok(Table { title, columns: COLUMNS, rows, notes })
}

/// One server, one job.
fn once(bench: &Bench, name: &str, file: &Path, job: &Job) -> Result<Cost> {
    // What others have written must not be written back meanwhile.
    let synced = fs::File::open(file).and_then(|file| file.sync_all());
    synced.map_err(|error| Error::new("bench", file.display(), error))?;
    let server = Server::start(bench, name, file, job.medium == Medium::Direct)?;
    let before = server.cpu_s();
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--time_based", "--randrepeat=1", "--output-format=terse"]);
    fio.args([format!("--uri={}", uri(&server.socket)), format!("--size={FILE_MIB}m"), format!("--runtime={JOB}")]);
    fio.args([format!("--rw={}", job.pattern), format!("--bs={}", job.size), format!("--iodepth={}", job.depth)]);
    fio.args([format!("--numjobs={}", job.connections), "--group_reporting".to_owned()]);
    let said = util::capture("bench", &mut fio, JOB_LIMIT)?;
    let numbers = terse(&said.stdout).filter(|numbers| said.status.success() && numbers.iops > 0.0);
    let numbers = numbers.ok_or_else(|| Error::new("bench", format!("fio into {name}"), &said.stderr))?;
    // Counted by their bytes: with several connections fio adds the times up.
    let kib = if job.size == "4k" { 4.0 } else { 1024.0 };
    let requests = (numbers.read_kib + numbers.written_kib) / kib;
    let resident = server.resident_max();
    Ok(Cost { iops: numbers.iops, cpu_us: (server.settled_cpu_s() - before) * 1e6 / requests, resident })
}

/// How fio names a disk behind a Unix socket.
pub(crate) fn uri(socket: &Path) -> String {
    format!("nbd+unix:///vda?socket={}", socket.display())
}

/// A server that runs.
pub(crate) struct Server<'a> {
    bench: &'a Bench,
    /// Where it listens.
    pub(crate) socket: PathBuf,
    /// `None`: it has made itself a daemon, whose process id is known.
    program: Option<Program>,
    id: u32,
}

impl<'a> Server<'a> {
    /// Starts it; it listens.
    pub(crate) fn start(bench: &'a Bench, name: &str, file: &Path, direct: bool) -> Result<Self> {
        let socket = bench.scratch.path(&format!("{name}.sock"));
        // Not every server takes its own stale socket away.
        let _ = fs::remove_file(&socket);
        if name == "nbd-server" {
            return Self::daemon(bench, socket, file);
        }
        let mut command = Command::new(util::find_program(name).unwrap_or_else(|| bench.executable.clone()));
        let (path, place) = (file.as_os_str(), socket.as_os_str());
        match name {
            "nbdkit" => {
                command.args(["-f", "-U"]).arg(place).arg("file").arg(path).args(direct.then_some("cache=none"))
            }
            "qemu-nbd" => command
                .args(["-t", "-e", "8", "-f", "raw", "-x", "vda", "-k"])
                .arg(place)
                .arg(if direct { "--cache=none" } else { "--cache=writeback" })
                .arg(path),
            "qemu-storage-daemon" => {
                let cache = if direct { ",cache.direct=on" } else { "" };
                let node = format!("driver=file,node-name=f,filename={}{cache}", file.display());
                let door = format!("addr.type=unix,addr.path={}", socket.display());
                command.arg("--blockdev").arg(node).arg("--nbd-server").arg(door);
                command.args(["--export", "type=nbd,id=e,node-name=f,name=vda,writable=on"])
            }
            _ => {
                command = Command::new(&bench.executable);
                let [vda, nbd] = [format!("vda={}", file.display()), format!("unix://{}", socket.display())];
                command.args(["export", &vda, "--nbd", &nbd, "--cache", if direct { "none" } else { "writeback" }])
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

    /// The most memory that was ever resident, in bytes, where one process does all the work.
    pub(crate) fn resident_max(&self) -> Option<f64> {
        self.program.as_ref().map(|program| crate::demo::real(program.resident_max()))
    }

    /// The CPU time that it has used so far, in seconds.
    pub(crate) fn cpu_s(&self) -> f64 {
        demo_host::cpu_s(self.id)
    }

    /// The same when the process that served a connection has been collected, where there was one.
    pub(crate) fn settled_cpu_s(&self) -> f64 {
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
        assert_eq!((read.read_kib, read.iops), (400.0, 100.0));
        (fields[46], fields[48], fields[49]) = ("100", "25", "1");
        let both = terse(&fields.join(";")).expect("numbers");
        assert_eq!((both.written_kib, both.iops), (100.0, 125.0));
        assert!(terse("fio: error").is_none());
    }
}
