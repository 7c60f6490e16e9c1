//! Runs the command and its companions, reaps, starts a server that crashed again, and ends everybody at the end.
//!
//! One thread does all of it, because who reaps everybody must not race with who starts somebody. It waits without
//! a limit in one place only: for the command, whose time is its own.

use std::fmt;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::ending::Outcome;
use super::{Ended, SELF, pid_of, report};
use crate::error::reason;
use crate::limits::{INIT_GRACE, INIT_READY_LOOK, INIT_RESTART_CALM, INIT_RESTART_PAUSE, RETRY_PAUSE};

/// Where the command says that it is ready: an abstract socket, as systemd's.
const NOTIFY: &str = "blockferry-init";
/// The commands that say so, and that are worth starting again.
const SERVERS: [&str; 2] = ["serve", "export"];

/// What is to be run.
pub(super) struct Plan {
    /// blockferry's own words.
    pub(super) command: Vec<String>,
    /// Programs and their arguments. They are started once: when a server is ready, or with any other command.
    pub(super) companions: Vec<Vec<String>>,
    /// Whether a server that crashed is started again.
    pub(super) restart: bool,
}

impl Plan {
    fn is_server(&self) -> bool {
        self.command.first().is_some_and(|word| SERVERS.contains(&word.as_str()))
    }

    /// Whether it is started again: a server that neither ended well nor refused its command line.
    fn again_after(&self, outcome: Outcome) -> bool {
        self.restart && self.is_server() && !matches!(outcome, Outcome::Exit(0 | 2) | Outcome::Lost)
    }
}

/// Runs it all; returns how the command ended the last time, and how often it was started.
pub(super) fn run(plan: &Plan) -> (Outcome, u32) {
    let mut crew = Crew { companions: &plan.companions, running: Vec::new(), ready: None };
    if plan.is_server() && !plan.companions.is_empty() {
        match ready_socket() {
            Ok(socket) => crew.ready = Some(socket),
            Err(error) => report::warning(format_args!("ready socket: {}: companions do not wait", reason(&error))),
        }
    }
    let mut starts = 0;
    let mut pause = INIT_RESTART_PAUSE.0;
    let outcome = loop {
        starts += 1;
        let began = Instant::now();
        let outcome = match start_command(plan, crew.ready.is_some()) {
            Ok(command) => crew.wait_for(command),
            Err(error) => {
                report::warning(format_args!("the command cannot be started: {}", reason(&error)));
                Outcome::Exit(1)
            }
        };
        if !plan.again_after(outcome) {
            break outcome;
        }
        pause = if began.elapsed() >= INIT_RESTART_CALM { INIT_RESTART_PAUSE.0 } else { pause };
        report::warning(format_args!("the command {}; again in {} ms", Shown(outcome), pause.as_millis()));
        thread::sleep(pause);
        pause = next_pause(pause);
    };
    match outcome {
        // It has said itself why, and the result line says the rest.
        Outcome::Exit(_) => report::debug(format_args!("the command {}", Shown(outcome))),
        Outcome::Signal(_) | Outcome::Lost => report::warning(format_args!("the command {}", Shown(outcome))),
    }
    end_everybody();
    (outcome, starts)
}

fn next_pause(pause: Duration) -> Duration {
    (pause * 2).min(INIT_RESTART_PAUSE.1)
}

/// Who runs beside the command.
struct Crew<'a> {
    /// Those who have not been started.
    companions: &'a [Vec<String>],
    /// Those who have.
    running: Vec<(Pid, &'a str)>,
    /// Where the command says that it is ready; `None` when nobody waits for that.
    ready: Option<UnixDatagram>,
}

impl Crew<'_> {
    /// Reaps until the command has ended.
    fn wait_for(&mut self, command: Pid) -> Outcome {
        loop {
            if self.ready.is_none() {
                self.start_companions();
            }
            let patience = if self.ready.is_some() { WaitOptions::NOHANG } else { WaitOptions::empty() };
            match rustix::process::wait(patience) {
                Ok(Some((pid, status))) if pid == command => return outcome(status),
                Ok(Some((pid, status))) => self.ended(pid, status),
                Ok(None) => self.listen(),
                Err(Errno::INTR) => {}
                // No children: somebody else has reaped it, and nobody else can.
                Err(_) => return Outcome::Lost,
            }
        }
    }

    /// Waits a moment for the command's word that it is ready.
    fn listen(&mut self) {
        let mut text = [0; 64];
        let Some(socket) = &self.ready else { return };
        match socket.recv(&mut text) {
            Ok(length) if text[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") => {
                self.ready = None;
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                report::warning(format_args!("ready socket: {}: companions do not wait", reason(&error)));
                self.ready = None;
            }
        }
    }

    /// Starts those who have not been started.
    fn start_companions(&mut self) {
        for words in std::mem::take(&mut self.companions) {
            let Some((program, arguments)) = words.split_first() else { continue };
            let started = Command::new(program).args(arguments).spawn();
            match started.map(|child| pid_of(&child)) {
                Ok(Some(pid)) => {
                    report::info(format_args!("{program}: started, process {pid}"));
                    self.running.push((pid, program));
                }
                Ok(None) => {}
                Err(error) => report::warning(format_args!("{program}: cannot be started: {}", reason(&error))),
            }
        }
    }

    /// Notes an end; orphans end in silence.
    fn ended(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(at) = self.running.iter().position(|(companion, _)| *companion == pid) {
            let (_, program) = self.running.swap_remove(at);
            report::notice(format_args!("{program} {}", Ended(status)));
        }
    }
}

fn start_command(plan: &Plan, notify: bool) -> io::Result<Pid> {
    let mut command = Command::new(SELF);
    command.arg0("blockferry").args(&plan.command);
    if notify {
        command.env("NOTIFY_SOCKET", format!("@{NOTIFY}"));
    }
    pid_of(&command.spawn()?).ok_or_else(|| io::Error::other("has no number"))
}

fn ready_socket() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(NOTIFY)?)?;
    socket.set_read_timeout(Some(INIT_READY_LOOK))?;
    Ok(socket)
}

fn outcome(status: WaitStatus) -> Outcome {
    match (status.exit_status(), status.terminating_signal()) {
        // The kernel has eight bits for it.
        (Some(code), _) => Outcome::Exit(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(signal)) => Outcome::Signal(signal),
        (None, None) => Outcome::Lost,
    }
}

/// An outcome in words.
struct Shown(Outcome);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Outcome::Exit(code) => write!(f, "ended with exit code {code}"),
            Outcome::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Outcome::Lost => f.write_str("is lost"),
        }
    }
}

/// Ends every other process: asks first, then does not ask any more.
fn end_everybody() {
    for (signal, grace) in [(Signal::TERM, INIT_GRACE.0), (Signal::KILL, INIT_GRACE.1)] {
        others().for_each(|pid| {
            // It may be gone already.
            let _ = rustix::process::kill_process(pid, signal);
        });
        if all_end_within(grace) {
            return;
        }
    }
    report::warning(format_args!("somebody does not end"));
}

/// Reaps until nobody is left, or the time is over.
fn all_end_within(grace: Duration) -> bool {
    let deadline = Instant::now() + grace;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) if Instant::now() < deadline => thread::sleep(RETRY_PAUSE),
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// Every process but PID 1 and this one. The kernel's own threads and those who wait to be reaped have no command line.
fn others() -> impl Iterator<Item = Pid> {
    let own = rustix::process::getpid();
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(move |name| {
        let pid = Pid::from_raw(name.to_str()?.parse().ok()?)?;
        let has_line = || fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
        (pid != own && pid != Pid::INIT && has_line()).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(command: &str, restart: bool) -> Plan {
        let command = command.split_ascii_whitespace().map(str::to_owned).collect();
        Plan { command, companions: Vec::new(), restart }
    }

    #[test]
    fn only_a_server_that_crashed_is_started_again() {
        let serve = plan("serve g1", true);
        for outcome in [Outcome::Signal(6), Outcome::Signal(9), Outcome::Exit(1), Outcome::Exit(101)] {
            assert!(serve.again_after(outcome), "{outcome:?}");
            assert!(plan("export a.raw", true).again_after(outcome), "{outcome:?}");
            assert!(!plan("serve g1", false).again_after(outcome), "{outcome:?}");
            assert!(!plan("migrate g1 tcp://b:1", true).again_after(outcome), "{outcome:?}");
            assert!(!plan("", true).again_after(outcome), "{outcome:?}");
        }
        for outcome in [Outcome::Exit(0), Outcome::Exit(2), Outcome::Lost] {
            assert!(!serve.again_after(outcome), "{outcome:?}");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut pause = INIT_RESTART_PAUSE.0;
        for _ in 0..20 {
            let next = next_pause(pause);
            assert!(next > pause || next == INIT_RESTART_PAUSE.1);
            pause = next;
        }
        assert_eq!(pause, INIT_RESTART_PAUSE.1);
    }
}
