//! A hook on the source: its guest leaves.
//!
//! `ready`; converged: `stop`, after which the VMM is silent for good; then `state-out`, whose output is the state. The
//! order is another one than QEMU's, because nothing goes before the guest stands: its state is as long as its pause.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Call, Hook, Point, Run};
use crate::error::reason;
use crate::limits::{HOOK_STATE_MAX, HOOK_STOP_MAX, VMM_RUN_MAX};
use crate::socket::Socket;
use crate::vmm::{About, Going};

/// What a hook on this side is told that it is.
pub(super) const SIDE: &str = "source";

/// A guest that leaves.
#[derive(Debug)]
pub struct Leaving {
    hook: Hook,
    about: About,
    ran: bool,
    going: Going,
    /// What `state-out` writes to, until it is started.
    state: Option<OwnedFd>,
    run: Option<Run>,
}

/// See [`crate::vmm::Vmm::resume_again`].
pub(in crate::vmm) fn resume_again(hook: &Hook, about: &About, ran: bool, deadline: Instant) -> Result<(), String> {
    let call = Call { ran: Some(ran), ..Call::new(Point::Abort, SIDE, about) };
    hook.order(call, deadline.min(Instant::now() + VMM_RUN_MAX))
}

impl Leaving {
    pub(in crate::vmm) fn find(hook: &Hook, about: &About, deadline: Instant) -> Result<Self, String> {
        let ran = hook.ready(SIDE, about, deadline)?;
        let (hook, about) = (hook.clone(), about.clone());
        Ok(Self { hook, about, ran, going: Going::Active, state: None, run: None })
    }

    pub(in crate::vmm) fn ran(&self) -> bool {
        self.ran
    }

    pub(in crate::vmm) fn look_again(&mut self, deadline: Instant) -> Result<(), String> {
        self.ran = self.hook.ready(SIDE, &self.about, deadline)?;
        Ok(())
    }

    fn begin(&mut self, point: Point, output: Option<OwnedFd>, limit: Duration) -> Result<(), String> {
        let call = Call { ran: Some(self.ran), output, ..Call::new(point, SIDE, &self.about) };
        self.run = Some(self.hook.start(call, Instant::now() + limit)?);
        Ok(())
    }

    /// Stops the guest. The socket that is returned says nothing before `state-out`.
    pub(in crate::vmm) fn start(&mut self) -> Result<Arc<Socket>, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| format!("hook: {}", reason(&error)))?;
        self.begin(Point::Stop, None, HOOK_STOP_MAX)?;
        self.state = Some(theirs.into());
        Ok(Arc::new(Socket::new(ours.into())))
    }

    pub(in crate::vmm) fn poll(&mut self, wait: Duration) -> Result<Going, String> {
        let Some(run) = &mut self.run else { return Ok(self.going) };
        if run.is_done_within(wait)? {
            self.run = None;
            self.going = if self.going == Going::Active { Going::Stopped } else { Going::Gone };
        }
        Ok(self.going)
    }

    pub(in crate::vmm) fn go_on(&mut self) -> Result<(), String> {
        let state = self.state.take();
        // With the program's end, and only then, the socket comes to its end: nobody else has this half.
        self.begin(Point::StateOut, state, HOOK_STATE_MAX)?;
        self.going = Going::Following;
        Ok(())
    }

    pub(in crate::vmm) fn resume(&mut self, deadline: Instant) -> Result<(), String> {
        // What is under way is ended first: a `stop` that comes late would stop the guest again.
        self.run = None;
        self.state = None;
        resume_again(&self.hook, &self.about, self.ran, deadline)
    }

    pub(in crate::vmm) fn end(&mut self, deadline: Instant) -> Result<(), String> {
        self.run = None;
        let call = Call { ran: Some(self.ran), ..Call::new(Point::Gone, SIDE, &self.about) };
        self.hook.order(call, deadline)
    }
}
