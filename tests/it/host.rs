//! A host: one `blockferry serve` process and the commands that are given to it, all of them the built executable.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockferry::address::Address;
use blockferry::control;
use blockferry::control::wire::{Gate, Reply, Request};
use blockferry::nbd::client::{Client, ConnectError, RequestError, Wants};

use crate::harness::{Program, until_within};
use crate::json::Json;

/// Longest wait for a migration of a small disk, on a machine that has other things to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);

/// The executable that is tested: what ships, if somebody says where it is.
#[must_use]
pub(crate) fn blockferry() -> Command {
    Command::new(executable())
}

/// Where it is.
#[must_use]
pub(crate) fn executable() -> OsString {
    std::env::var_os("BLOCKFERRY_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_blockferry").into())
}

/// A program and its first arguments.
fn by_words(words: &[OsString]) -> Command {
    let (program, rest) = words.split_first().expect("a program");
    let mut command = Command::new(program);
    command.args(rest);
    command
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Its standard output, after it went well.
    pub(crate) fn well(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Asserts the exit code and the one line on standard error.
    pub(crate) fn refused(&self, code: i32, line: &str) {
        assert_eq!((self.code, self.stderr.as_str()), (Some(code), format!("{line}\n").as_str()));
    }
}

/// Runs a command to its end, which must come within `limit`.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Finished {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = Guard(child.unwrap_or_else(|error| panic!("{command:?}: {error}")));
    let stdout = collect(child.0.stdout.take());
    let stderr = collect(child.0.stderr.take());
    let status = until_within(limit, &format!("end of {command:?}"), || child.0.try_wait().expect("its child"));
    let text = |thread: JoinHandle<String>| thread.join().expect("reads to the end");
    Finished { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    let mut stream = stream.expect("a pipe");
    thread::spawn(move || {
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    })
}

/// A child that does not outlive the test.
#[derive(Debug)]
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One side of a migration.
#[derive(Debug)]
pub(crate) struct Host {
    /// The process.
    pub(crate) program: Program,
    /// Where its migration door is.
    pub(crate) listen: String,
    /// Where its guest door is: a Unix socket, and the same over TCP.
    pub(crate) door: Address,
    pub(crate) tcp_door: String,
    name: &'static str,
    guest: String,
    control: Address,
    log: PathBuf,
    /// The executable that it and its commands are.
    run_by: Vec<OsString>,
}

impl Host {
    /// Starts `serve g1` with these `--disk` values; its sockets and its log are in `folder`.
    #[must_use]
    pub(crate) fn start(folder: &Path, name: &'static str, disks: &[&str]) -> Self {
        Self::start_guest(folder, name, "g1", disks)
    }

    /// The same for a guest of another name.
    #[must_use]
    pub(crate) fn start_guest(folder: &Path, name: &'static str, guest: &str, disks: &[&str]) -> Self {
        let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        Self::start_with(folder, name, guest, &disks)
    }

    /// The same with any options that say which disks there are.
    #[must_use]
    pub(crate) fn start_with(folder: &Path, name: &'static str, guest: &str, disks: &[&str]) -> Self {
        Self::launch((blockferry(), vec![executable()]), folder, name, guest, disks, &["--volatile-state"])
    }

    /// `start`, with a state directory that outlives the process, run by `command`: the executable, or a program that
    /// runs it.
    #[must_use]
    pub(crate) fn lasting(command: Command, folder: &Path, name: &'static str, disks: &[&str]) -> Self {
        let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        Self::launch((command, vec![executable()]), folder, name, "g1", &disks, &[])
    }

    /// The same with any options that say which disks there are, and what else.
    #[must_use]
    pub(crate) fn lasting_with(command: Command, folder: &Path, name: &'static str, options: &[&str]) -> Self {
        Self::launch((command, vec![executable()]), folder, name, "g1", options, &[])
    }

    /// The same with another executable: a program and what stands before its arguments.
    #[must_use]
    pub(crate) fn start_run_by(
        run_by: &[OsString],
        folder: &Path,
        name: &'static str,
        guest: &str,
        disks: &[&str],
    ) -> Self {
        let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        Self::launch((by_words(run_by), run_by.to_vec()), folder, name, guest, &disks, &["--volatile-state"])
    }

    /// Starts it with a command, and remembers how its other commands are run.
    fn launch(
        (mut command, run_by): (Command, Vec<OsString>),
        folder: &Path,
        name: &'static str,
        guest: &str,
        disks: &[&str],
        options: &[&str],
    ) -> Self {
        let place = |what: &str| folder.join(format!("{name}.{what}"));
        let unix = |what: &str| format!("unix://{}", place(what).display());
        let log = place("log");
        let stderr = File::options().create(true).append(true).open(&log).expect("a log");
        command.args(["serve", guest, "--listen", "tcp://127.0.0.1:0"]).args(options).arg("--state");
        command.arg(place("state")).args(["--nbd", &unix("nbd"), "--control", &unix("control")]);
        // Two doors for the guest, so that a relay can stand before one of them.
        command.args(["--nbd", "tcp://127.0.0.1:0"]);
        command.args(disks);
        command.env("BLOCKFERRY_LOG", "info").stderr(stderr);
        let (program, ready) = Program::start_until_line(&mut command, ": ready: ");
        let listen = word(&ready, "listen=").to_owned();
        let tcp_door = word(&ready, "nbd=tcp://");
        let tcp_door = format!("tcp://{tcp_door}");
        let (door, control) = (address(&unix("nbd")), address(&unix("control")));
        Self { program, listen, door, tcp_door, name, guest: guest.to_owned(), control, log, run_by }
    }

    /// A source: owns its disks.
    #[must_use]
    pub(crate) fn owner(folder: &Path, name: &'static str, disks: &[&str]) -> Self {
        let host = Self::start(folder, name, disks);
        host.ask(&["claim"]).well();
        host
    }

    /// What `blockferry COMMAND GUEST ...` would be for this host.
    #[must_use]
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = by_words(&self.run_by);
        let (name, rest) = words.split_first().expect("a command");
        command.args([name, self.guest.as_str()]).args(rest).args(["--control", &self.control.to_string()]);
        command
    }

    /// Runs a short command.
    pub(crate) fn ask(&self, words: &[&str]) -> Finished {
        run(&mut self.command(words), PATIENCE)
    }

    /// Runs `migrate` to its end.
    pub(crate) fn migrate(&self, to: &str, options: &[&str]) -> Finished {
        run(self.command(&["migrate", to]).args(options), PATIENCE)
    }

    /// Starts `migrate --json` in the foreground.
    #[must_use]
    pub(crate) fn start_migrate(&self, to: &str, options: &[&str]) -> Migration {
        Migration::start(self.command(&["migrate", to, "--json"]).args(options))
    }

    /// The object that `status --json` prints first.
    #[must_use]
    pub(crate) fn status(&self) -> Json {
        let text = self.ask(&["status", "--json"]).well();
        Json::parse(text.lines().next().unwrap_or_default())
    }

    /// The record's state, as `status --json` says it.
    #[must_use]
    pub(crate) fn state(&self) -> String {
        self.status().get("state").text().to_owned()
    }

    /// Waits until `status` says `state`.
    pub(crate) fn until_state(&self, state: &str) {
        let mut last = String::new();
        until_within(PATIENCE, &format!("state {state} of {}", self.name), || {
            last = self.state();
            (last == state).then_some(())
        });
    }

    /// A connection to a disk through the guest door.
    ///
    /// # Errors
    /// The door's refusal.
    pub(crate) fn open(&self, disk: &str) -> Result<Client, ConnectError> {
        Client::connect(Arc::new(self.door.connect(PATIENCE).expect("its door")), disk, Wants::default())
    }

    /// Where its control door is.
    #[must_use]
    pub(crate) fn control(&self) -> &Address {
        &self.control
    }

    /// Tries to write one sector through the guest door: what the guest would be told.
    ///
    /// # Errors
    /// The refusal, in words.
    pub(crate) fn try_write(&self, disk: &str, offset: u64) -> Result<(), String> {
        let mut client = self.open(disk).map_err(|error| error.to_string())?;
        client.write_all(offset, &[0x5a; 512]).map_err(|error| match error {
            RequestError::Lost(lost) => panic!("{}: {lost}", self.name),
            other => other.to_string(),
        })
    }

    /// What it has logged.
    #[must_use]
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(60);
            eprintln!("---- log of {}", self.name);
            log.lines().skip(from).for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Whether any disk takes guest writes now. Asks over the control door without a new process.
fn takes_writes(guest: &str, door: &Address) -> bool {
    let Ok(mut client) = control::client::Client::connect("status", guest, door) else { return false };
    match client.ask(&Request::Status) {
        Ok(Reply::Status(status)) => status.disks.iter().any(|disk| disk.gate == Some(Gate::Serving)),
        _ => false,
    }
}

/// After a migration exactly one of the two takes a write, tried on a sector that nobody looks at any more.
pub(crate) fn exactly_one_takes(disk: &str, offset: u64, owner: &Host, other: &Host) {
    assert_eq!(owner.try_write(disk, offset), Ok(()), "{} owns", owner.name);
    let refusal = other.try_write(disk, offset).expect_err("two owners");
    assert!(["SHUTDOWN", "EPERM", "does not exist yet"].iter().any(|word| refusal.contains(word)), "{refusal}");
}

/// Looks all the time whether both hosts take guest writes.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<(u32, bool)>>,
}

impl Watch {
    /// Watches a migration from `source` to `destination`.
    #[must_use]
    pub(crate) fn start(source: &Host, destination: &Host) -> Self {
        Self::over([destination, source].map(|host| (host.guest.clone(), host.control.clone())))
    }

    /// The same for a guest behind two control doors, the destination's first.
    #[must_use]
    pub(crate) fn over(doors: [(String, Address); 2]) -> Self {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut looks = 0;
            loop {
                // In this order: once the destination takes writes the source has stopped to, for good.
                if doors.iter().all(|(guest, door)| takes_writes(guest, door)) {
                    return (looks, true);
                }
                looks += 1;
                let stop = stopped.0.lock().expect("no panic");
                if *stopped.1.wait_timeout(stop, Duration::from_millis(2)).expect("no panic").0 {
                    return (looks, false);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }

    /// Waits for two owners.
    #[must_use]
    pub(crate) fn sees_two_owners(mut self) -> bool {
        self.thread.take().expect("watches").join().expect("no panic").1
    }

    /// Ends it; there never were two owners.
    pub(crate) fn finish(mut self) {
        let (looks, both) = self.end().expect("no panic");
        assert!(!both, "both hosts took guest writes");
        assert!(looks > 0);
    }

    fn end(&mut self) -> Option<(u32, bool)> {
        *self.stop.0.lock().ok()? = true;
        self.stop.1.notify_all();
        self.thread.take()?.join().ok()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// A `migrate --json` in the foreground.
#[derive(Debug)]
pub(crate) struct Migration {
    child: Guard,
    lines: Arc<(Mutex<Lines>, Condvar)>,
    stderr: Option<JoinHandle<String>>,
}

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

/// How a migration ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stderr: String,
    /// Every line, the `done` line last.
    pub(crate) lines: Vec<Json>,
}

impl Ended {
    /// The `done` line.
    #[must_use]
    pub(crate) fn done(&self) -> &Json {
        let last = self.lines.last().unwrap_or_else(|| panic!("no line: {}", self.stderr));
        self.lines.iter().rev().find(|line| line.get("type").text() == "done").unwrap_or(last)
    }

    /// Asserts that it went well.
    pub(crate) fn well(&self) {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        assert_eq!(self.done().get("owner").text(), "destination");
    }

    /// Asserts that it was aborted and who owns.
    pub(crate) fn aborted(&self) {
        assert_eq!(self.code, Some(3), "{} {:?}", self.stderr, self.done());
        assert_eq!(self.done().get("owner").text(), "here");
        assert!(self.stderr.ends_with("; this source still owns and serves the guest\n"), "{}", self.stderr);
    }
}

impl Migration {
    /// Starts the command, whatever else it was told.
    #[must_use]
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = Guard(child.unwrap_or_else(|error| panic!("{command:?}: {error}")));
        let stdout = child.0.stdout.take().expect("a pipe");
        let stderr = Some(collect(child.0.stderr.take()));
        let lines = Arc::new((Mutex::new(Lines::default()), Condvar::new()));
        let shared = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                shared.0.lock().expect("no panic").lines.push(line);
                shared.1.notify_all();
            }
            shared.0.lock().expect("no panic").ended = true;
            shared.1.notify_all();
        });
        Self { child, lines, stderr }
    }

    /// Waits for a line of which `wanted` is true. Panics when the migration ends before.
    pub(crate) fn until_line(&self, what: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        self.until_line_from(0, what, wanted)
    }

    /// The same for a line that has not come yet.
    pub(crate) fn until_turn(&self, what: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        let seen = self.lines.0.lock().expect("no panic").lines.len();
        self.until_line_from(seen, what, wanted)
    }

    fn until_line_from(&self, mut seen: usize, what: &str, wanted: impl Fn(&Json) -> bool) -> Json {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines.0.lock().expect("no panic");
        loop {
            for line in &lines.lines[seen..] {
                let line = Json::parse(line);
                if wanted(&line) {
                    return line;
                }
            }
            seen = lines.lines.len();
            assert!(!lines.ended, "ended without {what}: {:?}", lines.lines.last());
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {what} within {PATIENCE:?}: {:?}", lines.lines.last());
            lines = self.lines.1.wait_timeout(lines, left).expect("no panic").0;
        }
    }

    /// Waits until `--hold` holds it.
    pub(crate) fn until_held(&self) {
        self.until_line("held", |line| line.get("type").text() == "progress" && line.get("held").is_true());
    }

    /// Waits until so many bytes have been sent.
    pub(crate) fn until_sent(&self, bytes: u64) {
        let sent =
            |line: &Json| -> u64 { line.get("disks").items().iter().map(|disk| disk.get("sent_bytes").number()).sum() };
        self.until_line(&format!("{bytes} bytes sent"), |line| {
            line.get("type").text() == "progress" && sent(line) >= bytes
        });
    }

    /// Whether it has ended.
    #[must_use]
    pub(crate) fn is_over(&mut self) -> bool {
        self.child.0.try_wait().expect("its child").is_some()
    }

    /// Kills the command, not the migration.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.0.kill();
    }

    /// Waits for its end.
    #[must_use]
    pub(crate) fn wait(mut self) -> Ended {
        let status = until_within(PATIENCE, "end of migrate", || self.child.0.try_wait().expect("its child"));
        let stderr = self.stderr.take().expect("waited once").join().expect("reads to the end");
        let mut lines = self.lines.0.lock().expect("no panic");
        while !lines.ended {
            lines = self.lines.1.wait(lines).expect("no panic");
        }
        let lines = lines.lines.iter().map(|line| Json::parse(line)).collect();
        Ended { code: status.code(), stderr, lines }
    }
}

/// An address that must be one.
#[must_use]
pub(crate) fn address(text: &str) -> Address {
    Address::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

/// The word of a line that begins with `key`, without it.
#[must_use]
pub(crate) fn word<'a>(line: &'a str, key: &str) -> &'a str {
    let found = line.split(' ').find_map(|word| word.strip_prefix(key));
    found.unwrap_or_else(|| panic!("no {key} in: {line}"))
}
