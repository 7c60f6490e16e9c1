//! The two ends of a demo or a bench: scratch space that goes away however we end, programs that end with it, and what
//! the kernel says that they cost.
//!
//! Nothing here can catch Ctrl-C, because that takes unsafe code. A shell stands in: it holds the other end of a pipe
//! and cleans up when that closes, which it also does when this process is killed.

use crate::util::{self, Error, Result};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take until it is ready.
const READY: Duration = Duration::from_secs(20);
/// How long a command that only talks to a running process may take.
const COMMAND: Duration = Duration::from_secs(60);
/// How often one looks at a program that runs to its end.
const LOOK: Duration = Duration::from_millis(5);
/// Ticks of `/proc/PID/stat` a second, on every Linux that we build for.
const TICKS: u64 = 100;
/// Hears `start ID` and `end ID`; when nobody is left to say it, ends who is left and takes the folder away.
const JANITOR: &str = "trap '' INT TERM HUP; left=' '
while read -r word id; do
  case $word in
    start) left=\"$left$id \" ;;
    end) left=\"${left%% $id *} ${left#* $id }\" ;;
  esac
done
[ -z \"${left## }\" ] || kill -KILL $left 2>/dev/null
rm -rf -- \"$1\"";

/// A folder below the target directory, and the shell that outlives us to take it away.
pub(crate) struct Scratch {
    folder: PathBuf,
    janitor: Mutex<(Child, Option<ChildStdin>)>,
}

impl Scratch {
    /// A fresh folder for the task `name`.
    pub(crate) fn new(name: &str) -> Result<Arc<Self>> {
        let folder = util::target_dir()?.join("xtask").join(format!("{name}-{}", std::process::id()));
        let fault = |error: std::io::Error| Error::new(name, folder.display(), error);
        fs::create_dir_all(&folder).map_err(fault)?;
        let mut shell = Command::new("sh");
        shell.args(["-c", JANITOR, "sh"]).arg(&folder).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut janitor = shell.spawn().map_err(fault)?;
        let pipe = janitor.stdin.take();
        Ok(Arc::new(Self { folder, janitor: Mutex::new((janitor, pipe)) }))
    }

    /// A place in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `start`: the process `id` is to end with us; `end`: it has ended.
    pub(crate) fn tell(&self, word: &str, id: u32) {
        if let (_, Some(pipe)) = &mut *self.janitor.lock().unwrap_or_else(PoisonError::into_inner) {
            // Without the shell nothing is lost but the tidying up after an interrupt.
            let _ = writeln!(pipe, "{word} {id}");
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let (janitor, pipe) = self.janitor.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(pipe.take());
        // It has a folder to delete and nothing to wait for.
        let _ = janitor.wait();
    }
}

/// A child that is killed, by its own id, when it is dropped or when this process ends.
pub(crate) struct Program {
    child: Child,
    name: String,
    scratch: Arc<Scratch>,
}

impl Program {
    /// Starts `command`; what it says on stderr goes to the end of `log`.
    pub(crate) fn start(scratch: &Arc<Scratch>, name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let fault = |error: std::io::Error| Error::new("start", name, error);
        let log = OpenOptions::new().create(true).append(true).open(log).map_err(fault)?;
        let child = command.stdin(Stdio::null()).stderr(log).spawn().map_err(fault)?;
        scratch.tell("start", child.id());
        Ok(Self { child, name: name.to_owned(), scratch: Arc::clone(scratch) })
    }

    /// Starts `command` and waits for a line on its stdout that contains `ready`, which is returned too.
    pub(crate) fn start_until(
        scratch: &Arc<Scratch>,
        name: &str,
        command: &mut Command,
        log: &Path,
        ready: &'static str,
    ) -> Result<(Self, String)> {
        let mut program = Self::start(scratch, name, command.stdout(Stdio::piped()), log)?;
        let (sender, receiver) = mpsc::channel();
        if let Some(output) = program.child.stdout.take() {
            // Reads on afterwards: the program must not wait for us.
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                    if line.contains(ready) {
                        // Nobody waits for a second one.
                        let _ = sender.send(line);
                    }
                }
            });
        }
        match receiver.recv_timeout(READY) {
            Ok(line) => Ok((program, line)),
            Err(_) => Err(Error::new("start", name, format!("not ready (see {})", log.display()))),
        }
    }

    /// Waits until it listens at the Unix socket `path`.
    pub(crate) fn listens(&mut self, path: &Path) -> Result<()> {
        let deadline = Instant::now() + READY;
        while std::os::unix::net::UnixStream::connect(path).is_err() {
            if self.ended().is_some() || Instant::now() > deadline {
                return Err(Error::new("start", &self.name, format!("does not listen at {}", path.display())));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, at most `limit`; `None` if it goes on.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() > deadline {
                return ended;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The CPU time that it has used so far, all its threads, in seconds.
    pub(crate) fn cpu_s(&self) -> f64 {
        cpu_s(self.id())
    }

    /// The most memory that was ever resident, in bytes.
    pub(crate) fn resident_max(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: u64 = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0);
        kib * 1024
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may be gone already; what counts is that it is reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.scratch.tell("end", self.child.id());
    }
}

/// What a program has cost that ran to its end.
#[derive(Clone, Copy)]
pub(crate) struct Spent {
    /// By the clock.
    pub(crate) seconds: f64,
    /// CPU time, in seconds.
    pub(crate) cpu_s: f64,
    /// The most memory that was ever resident, in bytes: as it was at the last look, a few milliseconds before the end.
    pub(crate) resident: u64,
}

/// Runs `command` to its end, which comes within `limit` and is a good one; what it says on stderr goes to the end of
/// `log`. No other child may end meanwhile: the kernel adds up their CPU time.
pub(crate) fn spend(
    scratch: &Arc<Scratch>,
    name: &str,
    command: &mut Command,
    log: &Path,
    limit: Duration,
) -> Result<Spent> {
    let before = ended_children_cpu_s();
    let began = Instant::now();
    let mut program = Program::start(scratch, name, command.stdout(Stdio::null()), log)?;
    let mut resident = 0;
    loop {
        // Of one that has ended the kernel tells nothing more.
        resident = resident.max(program.resident_max());
        if let Some(status) = program.ended() {
            let seconds = began.elapsed().as_secs_f64();
            if !status.success() {
                return Err(Error::new("run", name, format!("{status} (see {})", log.display())));
            }
            return Ok(Spent { seconds, cpu_s: ended_children_cpu_s() - before, resident });
        }
        if began.elapsed() > limit {
            return Err(Error::new("run", name, format!("still running after {} s, killed", limit.as_secs())));
        }
        thread::sleep(LOOK);
    }
}

/// The CPU time that a process has used so far, with all its threads and with the children that it has outlived, in
/// seconds.
pub(crate) fn cpu_s(id: u32) -> f64 {
    ticks(&id.to_string(), 11, 4)
}

/// The CPU time of this process's children that have ended, in seconds.
pub(crate) fn ended_children_cpu_s() -> f64 {
    ticks("self", 13, 2)
}

/// So many of a process's times, from this place on behind its name, in seconds.
fn ticks(process: &str, from: usize, count: usize) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The command's name may contain anything: fields are counted from its last bracket.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let ticks: u64 = fields.skip(from).take(count).filter_map(|field| field.parse::<u64>().ok()).sum();
    #[expect(clippy::cast_precision_loss, reason = "few ticks")]
    let seconds = ticks as f64 / TICKS as f64;
    seconds
}

/// One side of a migration: `blockferry serve g1`.
pub(crate) struct Host {
    /// The process.
    pub(crate) program: Program,
    /// Its migration door, as an address.
    pub(crate) migration: String,
    /// Its guest door's path.
    pub(crate) door: PathBuf,
    executable: PathBuf,
    control: String,
}

/// The guest that every demo and bench moves.
pub(crate) const GUEST: &str = "g1";

impl Host {
    /// Starts a host with these `--disk` options, its migration door at a free port of loopback.
    pub(crate) fn start(
        scratch: &Arc<Scratch>,
        executable: &Path,
        name: &str,
        disks: &[String],
        log: &Path,
    ) -> Result<Self> {
        Self::start_with(scratch, executable, name, disks, &[], log)
    }

    /// The same with more options of `serve`.
    pub(crate) fn start_with(
        scratch: &Arc<Scratch>,
        executable: &Path,
        name: &str,
        disks: &[String],
        more: &[&str],
        log: &Path,
    ) -> Result<Self> {
        let door = scratch.path(&format!("{name}.nbd"));
        let control = format!("unix://{}", scratch.path(&format!("{name}.control")).display());
        let mut serve = Command::new(executable);
        serve.args(["serve", GUEST, "--volatile-state", "--listen", "tcp://127.0.0.1:0", "--control", &control]);
        serve.args(["--nbd", &format!("unix://{}", door.display())]).args(more);
        // What an earlier round of a bench has left is another guest's.
        let state = scratch.path(&format!("{name}.state"));
        let _ = std::fs::remove_dir_all(&state);
        serve.arg("--state").arg(state);
        disks.iter().for_each(|disk| {
            serve.args(["--disk", disk]);
        });
        let (program, line) = Program::start_until(scratch, name, &mut serve, log, ": ready: ")?;
        let migration = line.split_whitespace().find_map(|word| word.strip_prefix("listen="));
        let migration = migration.ok_or_else(|| Error::new("start", name, format!("no migration door: {line}")))?;
        let migration = migration.to_owned();
        Ok(Self { program, migration, door, executable: executable.to_owned(), control })
    }

    /// `blockferry WORD g1 ...` for this host.
    pub(crate) fn command(&self, word: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.executable);
        command.args([word, GUEST]).args(arguments).args(["--control", &self.control]);
        command
    }

    /// Runs a command to its end; its stdout. One that fails is an error in its own words.
    pub(crate) fn ask(&self, word: &str, arguments: &[&str]) -> Result<String> {
        let said = util::capture(word, &mut self.command(word, arguments), COMMAND)?;
        if said.status.success() {
            return Ok(said.stdout);
        }
        let last = said.stderr.lines().last().unwrap_or_default();
        Err(Error::new(word, GUEST, last.trim_start_matches("blockferry: ")))
    }

    /// The `done` object of the migration that has ended here.
    pub(crate) fn done(&self) -> Result<String> {
        let status = self.ask("status", &["--json"])?;
        let done = status.lines().find(|line| line.starts_with("{\"type\":\"done\""));
        done.map(str::to_owned).ok_or_else(|| Error::new("status", GUEST, "says nothing of the migration"))
    }
}

/// A number in one of our own `--json` lines.
pub(crate) fn number(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.split_once(&format!("\"{key}\":"))?;
    rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// A text in one of our own `--json` lines, none of which needs escapes here.
pub(crate) fn text<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = json.split_once(&format!("\"{key}\":\""))?;
    rest.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_json_are_found() {
        let json = r#"{"type":"done","owner":"destination","passes":12,"switchover_us":null}"#;
        assert_eq!(number(json, "passes"), Some(12));
        assert_eq!(number(json, "switchover_us"), None);
        assert_eq!(text(json, "owner"), Some("destination"));
    }

    #[test]
    fn the_janitor_ends_who_is_left_and_takes_the_folder_away() {
        let folder = std::env::temp_dir().join(format!("xtask-janitor-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let sleeper = || Command::new("sleep").arg("60").spawn().expect("a child");
        let mut sleepers = [sleeper(), sleeper(), sleeper()];
        let mut shell = Command::new("sh");
        shell.args(["-c", JANITOR, "sh"]).arg(&folder).stdin(Stdio::piped());
        let mut janitor = shell.spawn().expect("a shell");
        let mut pipe = janitor.stdin.take().expect("a pipe");
        sleepers.iter().for_each(|child| writeln!(pipe, "start {}", child.id()).expect("it listens"));
        writeln!(pipe, "end {}", sleepers[1].id()).expect("it listens");
        drop(pipe);
        janitor.wait().expect("it ends");
        assert!(!folder.exists());
        assert_eq!(sleepers[1].try_wait().expect("a child"), None);
        sleepers[1].kill().expect("a child");
        for child in &mut sleepers {
            assert!(!child.wait().expect("a child").success());
        }
    }
}
