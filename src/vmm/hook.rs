//! A program that drives any VMM: `--vmm hook:PROGRAM`, called at named points of a migration.
//!
//! One file for what both sides share: which points there are, the environment, a run of the program and its end.
//! `hook/source.rs` and `hook/destination.rs` are the two ends that `vmm/mod.rs` calls. What a hook is told and what it
//! must answer is in docs/hooks.md; a change here is a change there.
//!
//! A run ends by its deadline: a program that hangs is killed, and with it its process group, which is what it has
//! started and not moved elsewhere (`setsid`). What it says goes to the log, line by line, and the last line becomes
//! part of the cause when it fails. It never decides who owns; it is told.

pub mod destination;
pub mod source;

use std::fmt;
use std::io::{BufRead as _, BufReader, PipeReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::About;
use crate::error::reason;
use crate::limits::{HOOK_LAST_LINE, HOOK_LINE_MAX, HOOK_LOOK, WORKER_STACK};
use crate::passed;

/// The exit code with which `ready` says that the guest is there and paused by its user.
const PAUSED: i32 = 3;

/// A point at which the program is called; its name is the first argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    Ready,
    Stop,
    StateOut,
    StateIn,
    Run,
    Abort,
    Gone,
}

impl Point {
    fn word(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Stop => "stop",
            Self::StateOut => "state-out",
            Self::StateIn => "state-in",
            Self::Run => "run",
            Self::Abort => "abort",
            Self::Gone => "gone",
        }
    }
}

/// The program, and what it is told each time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    program: PathBuf,
    /// Of the guest: variables and their values.
    facts: Vec<(&'static str, String)>,
}

/// One call of the program.
struct Call<'a> {
    point: Point,
    side: &'static str,
    about: &'a About,
    /// Whether the guest ran before it was moved, where that is known.
    ran: Option<bool>,
    /// Standard input and output, where they are the state.
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
}

impl<'a> Call<'a> {
    fn new(point: Point, side: &'static str, about: &'a About) -> Self {
        Self { point, side, about, ran: None, input: None, output: None }
    }
}

impl Hook {
    /// The program at this path.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self { program, facts: Vec::new() }
    }

    /// Adds what it is told of the guest.
    #[must_use]
    pub fn with_facts(mut self, facts: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.facts.extend(facts);
        self
    }

    /// Starts the program. It must end before `deadline`.
    fn start(&self, call: Call<'_>, deadline: Instant) -> Result<Run, String> {
        let fault = |error: std::io::Error| format!("hook {}: {}: {}", call.point.word(), self, reason(&error));
        let (words, stderr) = std::io::pipe().map_err(fault)?;
        let stdout = match call.output {
            Some(output) => Stdio::from(output),
            None => Stdio::from(stderr.try_clone().map_err(fault)?),
        };
        let mut command = Command::new(&self.program);
        passed::withhold(&mut command);
        command.arg(call.point.word()).stdin(call.input.map_or_else(Stdio::null, Stdio::from));
        command.stdout(stdout).stderr(stderr).process_group(0);
        command.env("BLOCKFERRY_SIDE", call.side).env("BLOCKFERRY_PEER", &call.about.peer);
        command.env("BLOCKFERRY_ATTEMPT", &call.about.attempt);
        command.env("BLOCKFERRY_RAN", call.ran.map_or("", |ran| if ran { "1" } else { "0" }));
        command.envs(self.facts.iter().map(|(name, value)| (name, value)));
        let child = command.spawn().map_err(fault)?;
        log::debug!("hook {}: started, process {}", call.point.word(), child.id());
        let last = Arc::new(Mutex::new(String::new()));
        let (point, heard) = (call.point, Arc::clone(&last));
        let thread = std::thread::Builder::new().name("hook words".to_owned()).stack_size(WORKER_STACK);
        let mut run = Run { point, child: Some(child), last, silent: None, deadline };
        // Dropping the run ends the program.
        run.silent = Some(thread.spawn(move || listen(point, words, &heard)).map_err(fault)?);
        Ok(run)
    }

    /// Runs the program to its end. Everything but 0 is a failure.
    fn order(&self, call: Call<'_>, deadline: Instant) -> Result<(), String> {
        let mut run = self.start(call, deadline)?;
        while !run.is_done()? {
            std::thread::sleep(HOOK_LOOK);
        }
        Ok(())
    }

    /// Looks what is there; whether the guest runs, on the source.
    fn ready(&self, side: &'static str, about: &About, deadline: Instant) -> Result<bool, String> {
        let mut run = self.start(Call::new(Point::Ready, side, about), deadline)?;
        loop {
            match run.ended()?.map(|status| (status, status.code())) {
                None => std::thread::sleep(HOOK_LOOK),
                Some((_, Some(0))) => return Ok(true),
                Some((_, Some(PAUSED))) if side == source::SIDE => return Ok(false),
                Some((status, _)) => return Err(run.failed(status)),
            }
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.display())
    }
}

/// The program, running. Dropping it kills it, and its process group, if it has not ended.
#[derive(Debug)]
struct Run {
    point: Point,
    /// Until it was waited for.
    child: Option<Child>,
    /// What it said last.
    last: Arc<Mutex<String>>,
    /// Ends when it, and whoever has its output, says no more.
    silent: Option<std::thread::JoinHandle<()>>,
    deadline: Instant,
}

impl Run {
    /// How it ended, if it has.
    ///
    /// # Errors
    /// It did not end by its deadline, and was killed.
    fn ended(&mut self) -> Result<Option<ExitStatus>, String> {
        let fault = |point: Point, cause: &dyn fmt::Display| format!("hook {}: {cause}", point.word());
        let child = self.child.as_mut().ok_or_else(|| fault(self.point, &"has ended before"))?;
        if let Some(status) = child.try_wait().map_err(|error| fault(self.point, &reason(&error)))? {
            self.child = None;
            return Ok(Some(status));
        }
        if Instant::now() < self.deadline {
            return Ok(None);
        }
        self.kill();
        Err(fault(self.point, &"did not end in time and was killed"))
    }

    /// Whether it has ended well.
    ///
    /// # Errors
    /// It has not: with what it said last.
    fn is_done(&mut self) -> Result<bool, String> {
        match self.ended()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(self.failed(status)),
        }
    }

    /// Waits for it to end well; at most `wait`.
    fn is_done_within(&mut self, wait: Duration) -> Result<bool, String> {
        let deadline = Instant::now() + wait;
        loop {
            if self.is_done()? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(HOOK_LOOK.min(wait));
        }
    }

    /// The cause of a failure; waits a moment for the last words.
    fn failed(&mut self, status: ExitStatus) -> String {
        let deadline = Instant::now() + HOOK_LAST_LINE;
        while self.silent.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(HOOK_LOOK);
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let said = if last.is_empty() { "it said nothing" } else { last.as_str() };
        format!("hook {}: {status}: {said}", self.point.word())
    }

    /// Ends it and all that is in its process group. It has not been waited for, so its number is its own.
    fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        // One that the kernel holds (a long fsync, a file server that is away) is waited for by nobody else.
        let deadline = Instant::now() + HOOK_LAST_LINE;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let thread = std::thread::Builder::new().name("hook end".to_owned()).stack_size(WORKER_STACK);
                let _ = thread.spawn(move || child.wait());
                return;
            }
            std::thread::sleep(HOOK_LOOK);
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Puts what it says into the log, until nobody is left who could say anything.
fn listen(point: Point, words: PipeReader, last: &Mutex<String>) {
    let mut words = BufReader::new(words);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut words).take(HOOK_LINE_MAX).read_until(b'\n', &mut line) {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        let text = String::from_utf8_lossy(&line).trim_end().escape_debug().to_string();
        if !text.is_empty() {
            log::info!("hook {}: {text}", point.word());
            *last.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
    }
}

#[cfg(test)]
#[path = "hook/tests.rs"]
mod tests;
