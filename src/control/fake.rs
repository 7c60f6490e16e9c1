//! For tests: a guest that is not there.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::link::Passengers;
use super::server::{Desk, News};
use super::wire::*;
use crate::error::{Exit, Problem};
use crate::socket::Socket;

/// Longest wait of a test for what must come.
pub(crate) const WAIT: Duration = Duration::from_secs(10);

/// A guest whose migration does what the test says.
#[derive(Default)]
pub(crate) struct FakeDesk {
    pub(crate) inner: Mutex<Inner>,
    pub(crate) changed: Condvar,
}

#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) calls: Vec<String>,
    pub(crate) running: Option<Progress>,
    pub(crate) done: Option<Done>,
    pub(crate) given: bool,
    /// A disk may be attached.
    pub(crate) owns: bool,
    pub(crate) ownership: Ownership,
}

impl FakeDesk {
    pub(crate) fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock().expect("no panic"));
        self.changed.notify_all();
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.inner.lock().expect("no panic").calls.clone()
    }

    fn note(&self, call: impl Into<String>) -> Result<(), Problem> {
        self.change(|inner| inner.calls.push(call.into()));
        Ok(())
    }

    pub(crate) fn end(&self, exit: Exit, message: &str) {
        self.change(|inner| {
            let attempt = inner.running.take().expect("one runs").attempt;
            inner.done = Some(Done { attempt, exit: exit.code(), message: text(message), ..Done::default() });
        });
    }

    /// Waits until a call was made that starts so.
    pub(crate) fn wait_for(&self, call: &str) -> Duration {
        let start = Instant::now();
        let inner = self.inner.lock().expect("no panic");
        let missing = |inner: &mut Inner| !inner.calls.iter().any(|c| c.starts_with(call));
        let (inner, result) = self.changed.wait_timeout_while(inner, WAIT, missing).expect("no panic");
        assert!(!result.timed_out(), "{call} was not called, only {:?}", inner.calls);
        start.elapsed()
    }
}

impl Desk for FakeDesk {
    fn status(&self) -> Status {
        let inner = self.inner.lock().expect("no panic");
        let migration = match (&inner.running, &inner.done) {
            (Some(_), _) => Migration::Running,
            (None, Some(_)) => Migration::Ended,
            (None, None) => Migration::None,
        };
        Status { guest: text("g1"), state: State::Owner, migration, ..Status::default() }
    }

    fn ownership(&self) -> Ownership {
        self.inner.lock().expect("no panic").ownership.clone()
    }

    fn recover(&self, word: Word) -> Result<Recovered, Problem> {
        self.note(format!("recover {word:?}"))?;
        let ownership = self.ownership();
        Ok(Recovered { ownership, heard: text("no answer"), ..Recovered::default() })
    }

    fn claim(&self, discard_record: bool) -> Result<(), Problem> {
        self.note(format!("claim {discard_record}"))?;
        Err(Problem::refused("claim", "g1", "there is a record"))
    }

    fn migrate(&self, request: &MigrateRequest, passed: Passengers) -> Result<u128, Problem> {
        let with = match passed.len() {
            0 => "",
            1 => " with a descriptor",
            _ => " with two",
        };
        self.note(format!("migrate {}{with}", request.destination))?;
        self.change(|inner| inner.running = Some(Progress { attempt: 42, ..Progress::default() }));
        Ok(42)
    }

    fn switch(&self) -> Result<(), Problem> {
        self.note("switch")
    }

    fn cancel(&self, attempt: Option<u128>, cause: &str) -> Result<(), Problem> {
        self.note(format!("cancel {attempt:?} {cause}"))?;
        if self.inner.lock().expect("no panic").given {
            return Err(Problem::refused("cancel", "g1", "GIVEN is begun"));
        }
        self.end(Exit::Aborted, cause);
        Ok(())
    }

    fn attach(&self, request: &AttachRequest) -> Result<bool, Problem> {
        self.note(format!("attach {} {} {:?}", request.disk, request.device, request.wait_s))?;
        let mut inner = self.inner.lock().expect("no panic");
        if inner.owns {
            return Ok(true);
        }
        inner = self.changed.wait_timeout(inner, WAIT / 100).expect("no panic").0;
        Ok(inner.owns)
    }

    fn detach(&self, device: &str) -> Result<(), Problem> {
        self.note(format!("detach {device}"))?;
        Err(Problem::refused("detach", device, "is in use"))
    }

    fn accept(&self, socket: Arc<Socket>) {
        // Another protocol begins, with its own first bytes.
        let _ = self.note("accept".to_owned()).map(|()| socket.send_all(b"NBDMAGIC"));
    }

    fn set(&self, change: &SetRequest) -> Result<(), Problem> {
        self.note(format!("set {:?}", change.bandwidth_bytes))
    }

    fn news(&self, attempt: Option<u128>, timeout: Duration) -> Option<News> {
        let inner = self.inner.lock().expect("no panic");
        let phase = inner.running.as_ref().map(|p| p.phase);
        let same = |inner: &mut Inner| inner.running.is_some() && inner.running.as_ref().map(|p| p.phase) == phase;
        let (inner, _) = self.changed.wait_timeout_while(inner, timeout, same).expect("no panic");
        let wanted = |found: u128| attempt.is_none_or(|a| a == found);
        if let Some(progress) = inner.running.as_ref().filter(|p| wanted(p.attempt)) {
            return Some(News::Progress(progress.clone()));
        }
        inner.done.as_ref().filter(|d| wanted(d.attempt)).map(|d| News::Done(d.clone()))
    }
}
