//! QEMU on the destination: a guest arrives.
//!
//! QEMU was started with `-incoming defer`, and with `-S`, or is told `stop` here: it must not run by itself. It reads
//! a little of its disks before the guest runs, and what it has read may be old by then; so one whose attempt has ended
//! is ended too, and never waits for another.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Event, Qmp, RunState, Status, soon, state_path, uri};
use crate::address::Address;
use crate::error::reason;
use crate::limits::{QMP_LOOK, QMP_START_LOOK, QMP_TIMEOUT};
use crate::socket::Socket;

/// A QEMU that loads a guest, or has loaded it.
#[derive(Debug)]
pub struct Arriving {
    qmp: Qmp,
    path: PathBuf,
    completed: bool,
}

/// Looks whether a QEMU waits there.
pub(in crate::vmm) fn check(path: &Path, may_come: bool, deadline: Instant) -> Result<(), String> {
    // One that waits for its disks does not speak yet, and keeps nobody waiting.
    let patience = if may_come { deadline.min(Instant::now() + QMP_START_LOOK) } else { deadline };
    match Qmp::connect(path, patience) {
        Ok(mut qmp) => check_waiting(&mut qmp, deadline).map(drop),
        Err(_) if may_come => Ok(()),
        Err(cause) => Err(cause),
    }
}

fn check_waiting(qmp: &mut Qmp, deadline: Instant) -> Result<RunState, String> {
    let state = qmp.run_state(soon(deadline))?;
    if state.word == "inmigrate" {
        return Ok(state);
    }
    Err(qmp.fault(format_args!("it is '{}' and waits for no guest: start it with -incoming defer -S", state.word)))
}

/// See [`crate::vmm::Vmm::run_again`].
pub(in crate::vmm) fn run_again(path: &Path, deadline: Instant) -> Result<(), String> {
    let mut qmp = Qmp::connect(path, deadline)?;
    let (status, _) = qmp.migration(soon(deadline))?;
    let state = qmp.run_state(soon(deadline))?;
    if status != Status::Completed || state.word != "paused" {
        return Err(qmp.fault(format_args!("it is '{}', and has not loaded a guest that waits", state.word)));
    }
    run(&mut qmp, deadline)
}

/// See [`crate::vmm::Vmm::end_again`].
pub(in crate::vmm) fn end_again(path: &Path, deadline: Instant) -> Result<(), String> {
    let Ok(mut qmp) = Qmp::connect(path, deadline) else { return Ok(()) };
    let (status, _) = qmp.migration(soon(deadline))?;
    // One that still waits has read nothing that it would believe later.
    if status == Status::Completed { qmp.quit(deadline) } else { Ok(()) }
}

/// `cont`, and once more if the guest stops at once because of a request that was refused before.
fn run(qmp: &mut Qmp, deadline: Instant) -> Result<(), String> {
    loop {
        qmp.execute("cont", "", soon(deadline))?;
        let state = qmp.run_state(soon(deadline))?;
        if state.running {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(qmp.fault(format_args!("the guest is '{}' and does not run: try 'cont'", state.word)));
        }
        let _ = qmp.line_soon(Instant::now() + QMP_LOOK)?;
    }
}

/// A VMM may have been started only when PREPARE had made its disks, or had opened them to it again.
fn connect_patiently(path: &Path, deadline: Instant) -> Result<Qmp, String> {
    loop {
        match Qmp::connect(path, deadline) {
            Err(_) if Instant::now() + QMP_START_LOOK < deadline => std::thread::sleep(QMP_START_LOOK),
            connected => return connected,
        }
    }
}

impl Arriving {
    /// Has QEMU listen for the state, and connects.
    ///
    /// # Errors
    /// One line.
    pub fn begin(path: &Path, deadline: Instant) -> Result<(Self, Arc<Socket>), String> {
        let mut qmp = connect_patiently(path, deadline)?;
        check_waiting(&mut qmp, deadline)?;
        // As if it had been started with -S.
        qmp.execute("stop", "", soon(deadline))?;
        qmp.set_capabilities(true, soon(deadline))?;
        let state = state_path(path)?;
        let _ = std::fs::remove_file(&state);
        qmp.execute("migrate-incoming", &uri(&state), soon(deadline))?;
        let connected = Address::Unix(state.clone()).connect(QMP_TIMEOUT);
        let _ = std::fs::remove_file(&state);
        let socket = connected.map_err(|error| qmp.fault(format_args!("its state socket: {}", reason(&error))))?;
        Ok((Self { qmp, path: path.to_owned(), completed: false }, Arc::new(socket)))
    }

    pub(in crate::vmm) fn loaded(&mut self, wait: Duration) -> Result<bool, String> {
        let deadline = Instant::now() + wait;
        while !self.completed {
            match self.qmp.event(deadline)? {
                Some(Event::Migration(Status::Completed)) => self.completed = true,
                Some(Event::Migration(Status::Failed)) => {
                    return Err(self.qmp.fault(format_args!("the state does not load")));
                }
                Some(Event::Resume) => {
                    return Err(self.qmp.fault(format_args!("the guest runs before it was handed over")));
                }
                Some(_) => {}
                None => return Ok(false),
            }
        }
        let state = self.qmp.run_state(Instant::now() + QMP_TIMEOUT)?;
        if state.running {
            return Err(self.qmp.fault(format_args!("the guest runs before it was handed over")));
        }
        Ok(state.word == "paused")
    }

    pub(in crate::vmm) fn run(&mut self, ran: bool, deadline: Instant) -> Result<(), String> {
        // A guest that its user had paused is paused here already.
        if ran { run(&mut self.qmp, deadline) } else { Ok(()) }
    }

    pub(in crate::vmm) fn end(&mut self, deadline: Instant) -> Result<(), String> {
        let ended = self.qmp.quit(deadline);
        let _ = state_path(&self.path).map(std::fs::remove_file);
        ended
    }
}
