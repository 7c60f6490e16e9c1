//! A hook on the destination: a guest arrives.
//!
//! `ready` at PREPARE; `state-in` reads the state and ends with 0 only when it is loaded and the VMM stands, or when it
//! is stored whole and fsynced (M11); `run` when this host owns and the guest door is open; `abort` when it will not
//! own.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Call, Hook, Point, Run};
use crate::error::reason;
use crate::limits::HOOK_STATE_MAX;
use crate::socket::Socket;
use crate::vmm::About;

/// What a hook on this side is told that it is.
const SIDE: &str = "destination";

/// A guest that arrives.
#[derive(Debug)]
pub struct Arriving {
    hook: Hook,
    about: About,
    /// `state-in`, until it has ended well.
    run: Option<Run>,
}

/// Looks whether a guest could come.
pub(in crate::vmm) fn check(hook: &Hook, about: &About, deadline: Instant) -> Result<(), String> {
    hook.ready(SIDE, about, deadline).map(drop)
}

/// `run`, whoever has loaded the guest.
pub(in crate::vmm) fn run_again(
    hook: &Hook,
    about: &About,
    ran: Option<bool>,
    deadline: Instant,
) -> Result<(), String> {
    let call = Call { ran, ..Call::new(Point::Run, SIDE, about) };
    hook.order(call, deadline)
}

/// `abort`, whoever has loaded the guest.
pub(in crate::vmm) fn end_again(hook: &Hook, about: &About, deadline: Instant) -> Result<(), String> {
    hook.order(Call::new(Point::Abort, SIDE, about), deadline)
}

impl Arriving {
    /// Starts what reads the state; returns the socket that it reads from.
    pub(in crate::vmm) fn begin(hook: &Hook, about: &About, ran: bool) -> Result<(Self, Arc<Socket>), String> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| format!("hook: {}", reason(&error)))?;
        let call = Call { ran: Some(ran), input: Some(theirs.into()), ..Call::new(Point::StateIn, SIDE, about) };
        let run = hook.start(call, Instant::now() + HOOK_STATE_MAX)?;
        let arriving = Self { hook: hook.clone(), about: about.clone(), run: Some(run) };
        Ok((arriving, Arc::new(Socket::new(ours.into()))))
    }

    pub(in crate::vmm) fn loaded(&mut self, wait: Duration) -> Result<bool, String> {
        let Some(run) = &mut self.run else { return Ok(true) };
        let done = run.is_done_within(wait)?;
        if done {
            self.run = None;
        }
        Ok(done)
    }

    pub(in crate::vmm) fn run(&mut self, ran: bool, deadline: Instant) -> Result<(), String> {
        let call = Call { ran: Some(ran), ..Call::new(Point::Run, SIDE, &self.about) };
        self.hook.order(call, deadline)
    }

    pub(in crate::vmm) fn end(&mut self, deadline: Instant) -> Result<(), String> {
        self.run = None;
        end_again(&self.hook, &self.about, deadline)
    }
}
