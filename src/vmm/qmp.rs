//! QEMU's monitor (QMP): one connection, commands and their answers, events in between.
//!
//! [`source`] and [`destination`] drive QEMU with it. A line is a peer's bytes: one that is too long, or is no answer,
//! ends the connection. Every wait has a deadline: QEMU answers nothing while a disk or the state's socket stalls it.
//! A monitor takes one client at a time, so blockferry needs one of its own (`-qmp unix:PATH,server=on,wait=off`), and
//! holds it only as long as a migration lasts.
//!
//! What QEMU does at which step, and which of its words can be believed, was found by experiment; `docs/vmm.md` has it.

pub mod destination;
pub mod json;
pub mod source;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::address::Address;
use crate::error::reason;
use crate::limits::{QMP_EVENTS_MAX, QMP_LINE_MAX, QMP_LOOK, QMP_PATH_MAX, QMP_TIMEOUT};
use crate::socket::Socket;

/// A connection to a monitor, in command mode.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    socket: Socket,
    /// What has been received: whole lines are taken from its front.
    input: Vec<u8>,
    /// Of the input, in front: it has been taken.
    taken: usize,
    events: VecDeque<Event>,
    /// Of the last command: an answer to an earlier one, which nobody waited for, is none to it.
    id: u64,
}

/// Something that QEMU says without having been asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The migration has come to this status.
    Migration(Status),
    /// The guest stands.
    Stop,
    /// The guest runs.
    Resume,
    /// A disk has failed, and with `werror=stop` the guest stands.
    BlockError,
    /// QEMU is about to end.
    Shutdown,
}

/// A migration's status, as far as a driver acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// None has been begun.
    None,
    /// It begins, or the state goes while the guest runs.
    Active,
    /// The guest stands, and QEMU waits to be told to go on.
    PreSwitchover,
    /// The rest of the state goes.
    Device,
    /// QEMU says that it is done.
    Completed,
    /// It is being cancelled.
    Cancelling,
    /// It failed, or was cancelled.
    Failed,
}

impl Status {
    fn from_word(word: &str) -> Self {
        match word {
            "setup" | "active" | "wait-unplug" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "cancelling" => Self::Cancelling,
            "failed" | "cancelled" => Self::Failed,
            _ => Self::None,
        }
    }
}

/// What `query-status` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunState {
    /// The guest runs.
    pub running: bool,
    /// QEMU's word for how it stands or runs.
    pub word: String,
}

impl Qmp {
    /// Connects and leaves the greeting behind.
    ///
    /// # Errors
    /// One line: nobody listens, somebody else speaks with it, or it is no monitor.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, String> {
        let left = deadline.saturating_duration_since(Instant::now()).min(QMP_TIMEOUT);
        let fault = |cause: String| format!("the VMM at {}: {cause}", path.display());
        let socket = Address::Unix(path.to_owned()).connect(left).map_err(|error| fault(reason(&error)))?;
        Self::over(path, socket, deadline)
    }

    /// The same on a socket that is connected.
    fn over(path: &Path, socket: Socket, deadline: Instant) -> Result<Self, String> {
        let fault = |cause: String| format!("the VMM at {}: {cause}", path.display());
        let input = Vec::with_capacity(QMP_LINE_MAX);
        let mut qmp = Self { path: path.to_owned(), socket, input, taken: 0, events: VecDeque::new(), id: 0 };
        let deadline = deadline.min(Instant::now() + QMP_TIMEOUT);
        match qmp.line(deadline)? {
            Some(line) if json::find(&line, &["QMP", "version"]).is_some() => {}
            Some(_) => return Err(fault("it is no QEMU monitor".to_owned())),
            None => return Err(fault("it does not greet: is somebody else connected to it?".to_owned())),
        }
        qmp.execute("qmp_capabilities", "", deadline)?;
        Ok(qmp)
    }

    /// Executes a command with `arguments`, a JSON object or nothing, and returns the line of the answer.
    ///
    /// # Errors
    /// One line: QEMU says no, or nothing before `deadline`, or has gone.
    pub fn execute(&mut self, command: &str, arguments: &str, deadline: Instant) -> Result<String, String> {
        self.id += 1;
        let id = self.id.to_string();
        let line = if arguments.is_empty() {
            format!("{{\"execute\":\"{command}\",\"id\":\"{id}\"}}\r\n")
        } else {
            format!("{{\"execute\":\"{command}\",\"id\":\"{id}\",\"arguments\":{arguments}}}\r\n")
        };
        log::debug!("qmp: {}", line.trim_end());
        let sent = self.socket.send_all_before(line.as_bytes(), deadline);
        sent.map_err(|error| self.fault(format_args!("{command}: {}", reason(&error))))?;
        loop {
            let Some(line) = self.line(deadline)? else {
                return Err(self.fault(format_args!("{command}: no answer")));
            };
            if json::string(&line, &["id"]).is_some_and(|other| other != id) {
                log::debug!("qmp: late: {}", line.trim_end());
                continue;
            }
            if json::find(&line, &["return"]).is_some() {
                return Ok(line);
            }
            if let Some(cause) = json::string(&line, &["error", "desc"]) {
                return Err(self.fault(format_args!("{command}: {}", cause.escape_debug())));
            }
            self.note(&line);
        }
    }

    /// The next event, waited for until `deadline`.
    ///
    /// # Errors
    /// One line: QEMU has gone.
    pub fn event(&mut self, deadline: Instant) -> Result<Option<Event>, String> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.line(deadline)? {
                Some(line) => self.note(&line),
                None => return Ok(None),
            }
        }
    }

    /// How the guest stands or runs.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn run_state(&mut self, deadline: Instant) -> Result<RunState, String> {
        let line = self.execute("query-status", "", deadline)?;
        let running = json::truth(&line, &["return", "running"]);
        match (running, json::string(&line, &["return", "status"])) {
            (Some(running), Some(word)) => Ok(RunState { running, word: word.escape_debug().to_string() }),
            _ => Err(self.fault(format_args!("query-status: an answer that says nothing"))),
        }
    }

    /// Whether the guest runs on KVM, and not in an emulator. Who does not say so is an emulator.
    pub fn is_kvm(&mut self, deadline: Instant) -> bool {
        let said = self.execute("query-kvm", "", deadline);
        said.ok().and_then(|line| json::truth(&line, &["return", "enabled"])).unwrap_or(false)
    }

    /// The migration's status, and why it failed.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn migration(&mut self, deadline: Instant) -> Result<(Status, String), String> {
        let line = self.execute("query-migrate", "", deadline)?;
        let status = json::string(&line, &["return", "status"]).map_or(Status::None, Status::from_word);
        let cause = json::string(&line, &["return", "error-desc"]).unwrap_or_default();
        Ok((status, cause.escape_debug().to_string()))
    }

    /// Sets what both sides of a migration need (`late`: and what only the destination does), whatever a user has set.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn set_capabilities(&mut self, late: bool, deadline: Instant) -> Result<(), String> {
        let on = ["events", "pause-before-switchover", "return-path"];
        let off = ["multifd", "postcopy-ram"];
        let mut list = String::new();
        let states = on.map(|name| (name, true)).into_iter().chain(off.map(|name| (name, false)));
        for (name, state) in states.chain(late.then_some(("late-block-activate", true))) {
            let comma = if list.is_empty() { "" } else { "," };
            list.push_str(&format!("{comma}{{\"capability\":\"{name}\",\"state\":{state}}}"));
        }
        self.execute("migrate-set-capabilities", &format!("{{\"capabilities\":[{list}]}}"), deadline).map(drop)
    }

    /// Waits until `good`, asked again and again, says so.
    ///
    /// # Errors
    /// What QEMU said, or how it still is at the deadline.
    fn wait_for(&mut self, what: &str, deadline: Instant, good: impl Fn(&RunState) -> bool) -> Result<(), String> {
        loop {
            let state = self.run_state(deadline)?;
            if good(&state) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.fault(format_args!("it is '{}' and not {what}", state.word)));
            }
            // Events come meanwhile, and are kept.
            let _ = self.line_soon(Instant::now() + QMP_LOOK)?;
        }
    }

    /// Asks QEMU to end, and waits until its monitor is gone.
    ///
    /// # Errors
    /// One line: it is still there.
    fn quit(&mut self, deadline: Instant) -> Result<(), String> {
        // It may hang up before it has answered.
        let _ = self.execute("quit", "", deadline);
        while Instant::now() < deadline {
            if self.socket.has_hung_up() {
                return Ok(());
            }
            match self.line_soon(Instant::now() + QMP_LOOK) {
                Ok(_) => {}
                Err(_) => return Ok(()),
            }
        }
        Err(self.fault(format_args!("it was told to quit, and is still there")))
    }

    /// Whether QEMU has hung up.
    fn is_gone(&self) -> bool {
        self.socket.has_hung_up()
    }

    /// Takes one line in, if one comes, and keeps it if it is an event. `true`: there was one.
    fn line_soon(&mut self, deadline: Instant) -> Result<bool, String> {
        let line = self.line(deadline)?;
        if let Some(line) = &line {
            self.note(line);
        }
        Ok(line.is_some())
    }

    /// Keeps an event that somebody may want to know of. The oldest goes when there are too many.
    fn note(&mut self, line: &str) {
        let event = match json::string(line, &["event"]) {
            Some("MIGRATION") => {
                Event::Migration(Status::from_word(json::string(line, &["data", "status"]).unwrap_or_default()))
            }
            Some("STOP") => Event::Stop,
            Some("RESUME") => Event::Resume,
            Some("BLOCK_IO_ERROR") => Event::BlockError,
            Some("SHUTDOWN") => Event::Shutdown,
            _ => return,
        };
        log::debug!("qmp: {event:?}");
        if self.events.len() == QMP_EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next line, waited for until `deadline`; what has come of it is kept.
    fn line(&mut self, deadline: Instant) -> Result<Option<String>, String> {
        loop {
            let rest = &self.input[self.taken..];
            if let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&rest[..length]).into_owned();
                self.taken += length + 1;
                return Ok(Some(line));
            }
            if self.taken > 0 {
                self.input.drain(..self.taken);
                self.taken = 0;
            }
            let got = self.input.len();
            if got == QMP_LINE_MAX {
                return Err(self.fault(format_args!("it sends a line of more than {QMP_LINE_MAX} bytes")));
            }
            self.input.resize(QMP_LINE_MAX, 0);
            let received = self.socket.recv_nowait(&mut self.input[got..]);
            self.input.truncate(got + received.as_ref().map_or(0, |count| count.unwrap_or(0)));
            match received {
                Ok(Some(0)) => return Err(self.fault(format_args!("it has gone"))),
                Ok(Some(_)) => {}
                Ok(None) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    self.socket.wait(true, false, Some(left)).map_err(|error| self.fault(format_args!("{error}")))?;
                }
                Err(error) => return Err(self.fault(format_args!("it has gone: {}", reason(&error)))),
            }
        }
    }

    fn fault(&self, cause: std::fmt::Arguments<'_>) -> String {
        format!("the VMM at {}: {cause}", self.path.display())
    }
}

/// The socket of the state: beside the monitor's, where both QEMU and blockferry can reach it.
///
/// # Errors
/// One line: there is no such name.
fn state_path(monitor: &Path) -> Result<PathBuf, String> {
    let mut path = monitor.as_os_str().to_owned();
    path.push(".state");
    if path.len() > QMP_PATH_MAX || path.to_str().is_none() {
        return Err(format!("the VMM at {}: the socket's path is too long, or not UTF-8", monitor.display()));
    }
    Ok(path.into())
}

/// The argument of `migrate` and `migrate-incoming`.
fn uri(path: &Path) -> String {
    let mut text = "{\"uri\":".to_owned();
    json::quote(&format!("unix:{}", path.display()), &mut text);
    text.push('}');
    text
}

/// How long a step may take that begins now.
fn soon(deadline: Instant) -> Instant {
    deadline.min(Instant::now() + QMP_TIMEOUT)
}

#[cfg(test)]
mod tests;
