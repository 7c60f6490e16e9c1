//! QEMU on the source: its guest leaves.
//!
//! The order is that of `docs/vmm.md`: `migrate` to a socket of ours, `pre-switchover` (the guest stands), what is left
//! is copied, `migrate-continue`, `completed`, and then `postmigrate`, in which QEMU writes nothing any more. That QEMU
//! says `completed` proves nothing about the destination.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Event, Qmp, Status, soon, state_path, uri};
use crate::address::Address;
use crate::error::{is_nobody, reason};
use crate::limits::{QMP_BANDWIDTH, QMP_DOWNTIME_FIRST, QMP_LOOK, QMP_PATIENCE, QMP_TIMEOUT};
use crate::socket::{self, Socket};
use crate::vmm::Going;

/// A guest that leaves.
#[derive(Debug)]
pub struct Leaving {
    qmp: Qmp,
    path: PathBuf,
    /// The guest ran when it was found: only then does it ever run again by our word.
    ran: bool,
    going: Going,
    /// The downtime that QEMU is told when it does not come to its end with less: since when, and how much.
    patience: Option<(Instant, Duration)>,
}

/// See [`crate::vmm::Vmm::resume_again`].
pub(in crate::vmm) fn resume_again(path: &Path, ran: bool, deadline: Instant) -> Result<bool, String> {
    let qmp = match Address::Unix(path.to_owned()).connect(QMP_TIMEOUT) {
        Ok(socket) => Qmp::over(path, socket, deadline)?,
        Err(error) if is_nobody(&error) => return Ok(false),
        Err(error) => return Err(format!("the VMM at {}: {}", path.display(), reason(&error))),
    };
    let mut leaving = Leaving { qmp, path: path.to_owned(), ran, going: Going::Active, patience: None };
    leaving.resume(deadline).map(|()| true)
}

impl Leaving {
    /// Finds QEMU, and a guest in it that can leave. Changes nothing.
    ///
    /// # Errors
    /// One line.
    pub fn find(path: &Path, deadline: Instant) -> Result<Self, String> {
        let qmp = Qmp::connect(path, deadline)?;
        let mut leaving = Self { qmp, path: path.to_owned(), ran: true, going: Going::Active, patience: None };
        leaving.look_again(deadline)?;
        Ok(leaving)
    }

    pub(in crate::vmm) fn ran(&self) -> bool {
        self.ran
    }

    pub(in crate::vmm) fn look_again(&mut self, deadline: Instant) -> Result<(), String> {
        self.ran = self.look(deadline)?;
        Ok(())
    }

    /// Whether the guest runs; else it was paused.
    fn look(&mut self, deadline: Instant) -> Result<bool, String> {
        let state = self.qmp.run_state(soon(deadline))?;
        if state.running || state.word == "paused" {
            return Ok(state.running);
        }
        // Where a paused guest is left whose migration came to nothing late: QEMU does not migrate it again like that.
        let way_out = if state.word == "postmigrate" { ": 'cont' at its monitor, and 'stop' if need be" } else { "" };
        Err(self.qmp.fault(format_args!("the guest is '{}', neither running nor paused{way_out}", state.word)))
    }

    pub(in crate::vmm) fn start(&mut self, downtime: Duration, deadline: Instant) -> Result<Arc<Socket>, String> {
        let ran = self.look(deadline)?;
        if std::mem::replace(&mut self.ran, ran) != ran {
            // The other side has been told how it was.
            return Err(self.qmp.fault(format_args!("the guest was paused, or started, a moment ago: try again")));
        }
        self.qmp.set_capabilities(false, soon(deadline))?;
        // The pace is that of the migration's budget, which holds the socket back. What QEMU may leave for the time
        // when the guest stands it does leave: so it is little at first. Not under emulation: what a guest writes while
        // its memory is looked through, QEMU may overlook there, and only what is left for the end is sure.
        let first = if self.qmp.is_kvm(soon(deadline)) { downtime.min(QMP_DOWNTIME_FIRST) } else { downtime };
        self.allow(first, soon(deadline))?;
        self.patience = (downtime > first).then(|| (Instant::now() + QMP_PATIENCE, downtime));
        let path = state_path(&self.path)?;
        let fault =
            |error: std::io::Error| format!("listen for the guest's state: {}: {}", path.display(), reason(&error));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(fault)?;
        listener.set_nonblocking(true).map_err(fault)?;
        let began = self.qmp.execute("migrate", &uri(&path), soon(deadline));
        let came = began.and_then(|_| accept(&listener, soon(deadline)));
        let _ = std::fs::remove_file(&path);
        came.inspect_err(|_| {
            // Nobody takes the state: a migration that was begun is not left to itself.
            let _ = self.qmp.execute("migrate_cancel", "", soon(deadline));
        })
    }

    /// Says how long the guest may stand.
    fn allow(&mut self, downtime: Duration, deadline: Instant) -> Result<(), String> {
        let pace = format!("{{\"max-bandwidth\":{QMP_BANDWIDTH},\"downtime-limit\":{}}}", downtime.as_millis());
        self.qmp.execute("migrate-set-parameters", &pace, deadline).map(drop)
    }

    pub(in crate::vmm) fn poll(&mut self, wait: Duration) -> Result<Going, String> {
        if let Some((_, downtime)) =
            self.patience.take_if(|(until, _)| self.going == Going::Active && Instant::now() >= *until)
        {
            // It may be about to stop, and says nothing while its disks are flushed: then it needs no more.
            if let Err(cause) = self.allow(downtime, Instant::now() + QMP_TIMEOUT) {
                log::info!("migration: {cause}");
            }
        }
        let deadline = Instant::now() + wait;
        loop {
            let before = self.going;
            match self.qmp.event(deadline)? {
                Some(Event::Migration(Status::PreSwitchover)) if self.going == Going::Active => {
                    self.going = Going::Stopped;
                }
                Some(Event::Migration(Status::Completed)) => {
                    // The word comes a moment before it is true.
                    self.qmp.wait_for("'postmigrate'", Instant::now() + QMP_TIMEOUT, |s| s.word == "postmigrate")?;
                    self.going = Going::Gone;
                }
                Some(Event::Migration(Status::Failed | Status::Cancelling)) => return Err(self.why_failed()),
                Some(Event::Shutdown) => return Err(self.qmp.fault(format_args!("the guest is shut down"))),
                Some(_) => {}
                None => return Ok(self.going),
            }
            if before != self.going {
                return Ok(self.going);
            }
        }
    }

    fn why_failed(&mut self) -> String {
        let asked = self.qmp.migration(Instant::now() + QMP_TIMEOUT);
        match asked {
            Ok((_, cause)) if !cause.is_empty() => self.qmp.fault(format_args!("the state does not go: {cause}")),
            _ => self.qmp.fault(format_args!("the state does not go")),
        }
    }

    pub(in crate::vmm) fn go_on(&mut self, deadline: Instant) -> Result<(), String> {
        self.qmp.execute("migrate-continue", "{\"state\":\"pre-switchover\"}", soon(deadline))?;
        self.going = Going::Following;
        Ok(())
    }

    /// Whatever the migration had come to. QEMU says nothing for as long as a disk takes to be flushed; then it is
    /// asked again.
    pub(in crate::vmm) fn resume(&mut self, deadline: Instant) -> Result<(), String> {
        loop {
            let cause = match self.try_to_resume(deadline) {
                Ok(true) => return Ok(()),
                Ok(false) => "the guest does not run again".to_owned(),
                Err(cause) => cause,
            };
            if self.qmp.is_gone() {
                return Err(cause);
            }
            if Instant::now() >= deadline {
                return Err(format!("{cause}: try 'migrate_cancel', and then 'cont', at its monitor"));
            }
            let _ = self.qmp.line_soon(Instant::now() + QMP_LOOK)?;
        }
    }

    /// `query-migrate` is not believed about the guest: after `postmigrate` a cancel says yes and does nothing, and
    /// only `cont` helps; before, `cont` fails and only the cancel helps. `true`: the guest is as it was.
    fn try_to_resume(&mut self, deadline: Instant) -> Result<bool, String> {
        let (status, _) = self.qmp.migration(soon(deadline))?;
        match status {
            Status::Active | Status::PreSwitchover | Status::Device => {
                self.qmp.execute("migrate_cancel", "", soon(deadline))?;
            }
            Status::Cancelling => {}
            Status::None | Status::Completed | Status::Failed => {
                let state = self.qmp.run_state(soon(deadline))?;
                if !self.ran || state.running {
                    return Ok(true);
                }
                if ["shutdown", "internal-error", "guest-panicked"].contains(&state.word.as_str()) {
                    log::warn!(
                        "{}",
                        self.qmp.fault(format_args!("the guest is '{}': it has ended by itself", state.word))
                    );
                    return Ok(true);
                }
                self.qmp.execute("cont", "", soon(deadline))?;
            }
        }
        Ok(false)
    }

    pub(in crate::vmm) fn end(&mut self, deadline: Instant) -> Result<(), String> {
        self.qmp.quit(deadline)
    }
}

/// The connection that QEMU makes.
fn accept(listener: &UnixListener, deadline: Instant) -> Result<Arc<Socket>, String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let ready = socket::wait(listener, true, false, Some(left)).map_err(|error| reason(&error))?;
    if !ready.readable {
        return Err("the VMM does not send its state".to_owned());
    }
    let (stream, _) = listener.accept().map_err(|error| reason(&error))?;
    stream.set_nonblocking(false).map_err(|error| reason(&error))?;
    Ok(Arc::new(Socket::new(stream.into())))
}
