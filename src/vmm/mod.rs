//! What holds the guest still, and moves its memory and devices: a *VMM driver*, chosen by `serve --vmm`.
//!
//! blockferry moves disks. What else a guest is made of its VMM moves, and the driver says when; the bytes of that
//! *state* are carried by `migrate/state.rs` without being looked at. Called by `migrate/drive/state.rs` on the source
//! and by `migrate/destination/state.rs` on the destination. Nothing here knows a disk, a gate or a record.
//!
//! # The points at which a driver is called
//!
//! | on the source | when | what it must have done when it returns |
//! |---|---|---|
//! | [`Vmm::leaving`] | before PREPARE | found its VMM, and that a guest is there which can leave; changed nothing |
//! | [`Leaving::start`] | converged | the VMM sends its state into the socket that is returned, or will after `go_on` |
//! | [`Leaving::poll`] | again and again | said how far it is, see [`Going`] |
//! | [`Leaving::go_on`] | [`Going::Stopped`] and nothing is left to copy | let the rest of the state follow |
//! | [`Leaving::resume`] | the attempt has ended, and this host owns | the guest runs, if it ran before |
//! | [`Leaving::end`] | the destination owns and runs | ended the VMM |
//!
//! | on the destination | when | what it must have done when it returns |
//! |---|---|---|
//! | [`Vmm::check_arriving`] | PREPARE | looked whether a VMM waits, if it can be there already; changed nothing |
//! | [`Vmm::arriving`] | the state is to come | found that a VMM waits for a guest, and had it listen |
//! | [`Arriving::loaded`] | the state has come | seen the state loaded *whole* and the VMM paused (M11) |
//! | [`Arriving::run`] | this host owns, the guest door is open | let the guest run, if it ran before |
//! | [`Arriving::end`] | before "unsealed" is said | ended the VMM: it has read disks that others write |
//!
//! # What must be true
//!
//! - After [`Going::Gone`] the VMM on the source writes nothing any more and never runs by itself: only then are the
//!   gates closed (D6). [`Going::Stopped`] says less: the guest stands, the VMM may still flush, the gates stay open.
//! - A driver never decides who owns. It lets a guest run at two points: [`Leaving::resume`], called only after the
//!   attempt has been ended durably (M3), and [`Arriving::run`], called only when OWNER is durable (M5).
//! - Every call ends by its deadline, whatever the VMM does. What failed is said in one line: the object is the VMM.

pub mod hook;
pub mod qmp;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::limits::{HOOK_STATE_MAX, STATE_FOLLOW_MAX, STATE_LOAD_MAX};
use crate::socket::Socket;

/// Which driver, as `--vmm` names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Vmm {
    /// The caller stops the guest, moves its state and starts it.
    #[default]
    None,
    /// QEMU, by its monitor at this Unix socket.
    Qmp(PathBuf),
    /// Any VMM, by a program that is called at the points above.
    Hook(hook::Hook),
}

/// Which attempt a call is about, for drivers that tell somebody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// Its number, 32 hexadecimal digits; empty: not known.
    pub attempt: String,
    /// The other host: on the source its address, on the destination its machine's number; empty: not known.
    pub peer: String,
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Qmp(path) => write!(f, "qmp:{}", path.display()),
            Self::Hook(hook) => write!(f, "hook:{hook}"),
        }
    }
}

/// How far a guest is that leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Going {
    /// The guest runs, or stands as it stood before, and its state goes.
    Active,
    /// The guest stands. The VMM waits for [`Leaving::go_on`].
    Stopped,
    /// The rest of the state goes.
    Following,
    /// The state has gone, and the VMM is silent for good.
    Gone,
}

/// A VMM on the source whose guest leaves.
#[derive(Debug)]
pub enum Leaving {
    /// QEMU.
    Qmp(qmp::source::Leaving),
    /// A program.
    Hook(hook::source::Leaving),
}

/// A VMM on the destination that waits for a guest, or has got it.
#[derive(Debug)]
pub enum Arriving {
    /// QEMU.
    Qmp(qmp::destination::Arriving),
    /// A program.
    Hook(hook::destination::Arriving),
}

impl Vmm {
    /// Reads what follows `--vmm`.
    ///
    /// # Errors
    /// Why not, without the option.
    pub fn parse(text: &str) -> Result<Self, String> {
        let path = |path: &str| {
            let path = Path::new(path);
            if path.is_absolute() { Ok(path.to_owned()) } else { Err(format!("'{text}': the path is not absolute")) }
        };
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("qmp", rest)) => path(rest).map(Self::Qmp),
            Some(("hook", rest)) => path(rest).map(|program| Self::Hook(hook::Hook::new(program))),
            _ => Err(format!("'{text}' is not known; use none, qmp:PATH or hook:PROGRAM")),
        }
    }

    /// The same driver, which tells this of the guest to whoever it calls: variables and their values.
    #[must_use]
    pub fn with_facts(self, facts: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        match self {
            Self::Hook(hook) => Self::Hook(hook.with_facts(facts)),
            other => other,
        }
    }

    /// Whether who uses the guest's attached devices is silent once the state has gone (W5).
    #[must_use]
    pub fn stills_devices(&self) -> bool {
        matches!(self, Self::Hook(_))
    }

    /// Whether the guest's state moves with the disks.
    #[must_use]
    pub fn moves_state(&self) -> bool {
        *self != Self::None
    }

    /// On the source, before anything has changed: finds the VMM. `None`: there is no driver.
    ///
    /// # Errors
    /// One line: it cannot be spoken with, or no guest is there that could leave.
    pub fn leaving(&self, about: &About, deadline: Instant) -> Result<Option<Leaving>, String> {
        match self {
            Self::None => Ok(None),
            Self::Qmp(path) => qmp::source::Leaving::find(path, deadline).map(|leaving| Some(Leaving::Qmp(leaving))),
            Self::Hook(hook) => {
                hook::source::Leaving::find(hook, about, deadline).map(|leaving| Some(Leaving::Hook(leaving)))
            }
        }
    }

    /// On the destination, at PREPARE. `may_come`: the VMM may be started later, because it needs disks that do not
    /// exist yet.
    ///
    /// # Errors
    /// One line: there is no VMM, or it does not wait for a guest.
    pub fn check_arriving(&self, about: &About, may_come: bool, deadline: Instant) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::Qmp(path) => qmp::destination::check(path, may_come, deadline),
            Self::Hook(hook) => hook::destination::check(hook, about, deadline),
        }
    }

    /// On the destination: has the VMM wait for the state, and returns it with the socket into which the state goes.
    /// `ran`: the guest ran when it left.
    ///
    /// # Errors
    /// One line: there is no driver, no VMM, or it does not wait for a guest.
    pub fn arriving(&self, about: &About, ran: bool, deadline: Instant) -> Result<(Arriving, Arc<Socket>), String> {
        match self {
            Self::None => Err("no VMM driver here: --vmm none".to_owned()),
            Self::Qmp(path) => qmp::destination::Arriving::begin(path, deadline)
                .map(|(arriving, socket)| (Arriving::Qmp(arriving), socket)),
            Self::Hook(hook) => hook::destination::Arriving::begin(hook, about, ran)
                .map(|(arriving, socket)| (Arriving::Hook(arriving), socket)),
        }
    }

    /// On the source, in a process that has not begun the attempt: this host owns, and the guest goes on, if it ran.
    /// `false`: there is no VMM any more.
    ///
    /// # Errors
    /// One line, for the user: the guest stands.
    pub fn resume_again(&self, about: &About, ran: bool, deadline: Instant) -> Result<bool, String> {
        match self {
            Self::None => Ok(false),
            Self::Qmp(path) => qmp::source::resume_again(path, ran, deadline),
            Self::Hook(hook) => hook::source::resume_again(hook, about, ran, deadline).map(|()| true),
        }
    }

    /// On the destination, after OWNER, in a process that has not loaded the state itself (it was restarted while it
    /// was sealed): lets the guest run if a VMM is there that has loaded one and stands. `ran`: it ran when it left;
    /// `None`: not known.
    ///
    /// # Errors
    /// One line.
    pub fn run_again(&self, about: &About, ran: Option<bool>, deadline: Instant) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::Qmp(path) if ran != Some(false) => qmp::destination::run_again(path, deadline),
            Self::Qmp(_) => Ok(()),
            Self::Hook(hook) => hook::destination::run_again(hook, about, ran, deadline),
        }
    }

    /// On the destination, before "unsealed", in such a process: ends the VMM that has loaded a guest and stands.
    ///
    /// # Errors
    /// One line, for the log. That there is no such VMM is none.
    pub fn end_again(&self, about: &About, deadline: Instant) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::Qmp(path) => qmp::destination::end_again(path, deadline),
            Self::Hook(hook) => hook::destination::end_again(hook, about, deadline),
        }
    }
}

impl Leaving {
    /// Whether the guest ran when it was found.
    #[must_use]
    pub fn ran(&self) -> bool {
        match self {
            Self::Qmp(leaving) => leaving.ran(),
            Self::Hook(leaving) => leaving.ran(),
        }
    }

    /// Looks again, right before the other side is told: the guest may have been paused, or started, since it was
    /// found.
    ///
    /// # Errors
    /// One line: it cannot leave any more.
    pub fn look_again(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(leaving) => leaving.look_again(deadline),
            Self::Hook(leaving) => leaving.look_again(deadline),
        }
    }

    /// Whether the VMM that takes the state knows by itself that it is whole. Else its length has to be told.
    #[must_use]
    pub fn knows_the_end(&self) -> bool {
        matches!(self, Self::Qmp(_))
    }

    /// How long the rest of the state may take to be sent while the guest stands, and to be loaded after that, where
    /// `downtime` was allowed.
    #[must_use]
    pub fn patience(&self, downtime: Duration) -> (Duration, Duration) {
        match self {
            Self::Qmp(_) => (STATE_FOLLOW_MAX + downtime * 2, STATE_LOAD_MAX),
            // All of it is sent while the guest stands.
            Self::Hook(_) => (HOOK_STATE_MAX, HOOK_STATE_MAX),
        }
    }

    /// Has the VMM send its state; returns the socket that it comes from. `downtime`: what may be left when the guest
    /// is stopped.
    ///
    /// # Errors
    /// One line; the guest runs on.
    pub fn start(&mut self, downtime: Duration, deadline: Instant) -> Result<Arc<Socket>, String> {
        match self {
            Self::Qmp(leaving) => leaving.start(downtime, deadline),
            Self::Hook(leaving) => leaving.start(),
        }
    }

    /// How far it is; waits for news for at most `wait`.
    ///
    /// # Errors
    /// One line: the state does not go, or the VMM is gone.
    pub fn poll(&mut self, wait: Duration) -> Result<Going, String> {
        match self {
            Self::Qmp(leaving) => leaving.poll(wait),
            Self::Hook(leaving) => leaving.poll(wait),
        }
    }

    /// Lets the rest of the state follow. Only when [`Going::Stopped`].
    ///
    /// # Errors
    /// One line.
    pub fn go_on(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(leaving) => leaving.go_on(deadline),
            Self::Hook(leaving) => leaving.go_on(),
        }
    }

    /// The attempt has ended and this host owns: the guest runs again, if it ran. The socket of the state has been shut
    /// before.
    ///
    /// # Errors
    /// One line, for the user: the guest stands.
    pub fn resume(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(leaving) => leaving.resume(deadline),
            Self::Hook(leaving) => leaving.resume(deadline),
        }
    }

    /// The guest runs on the destination: ends this VMM.
    ///
    /// # Errors
    /// One line, for the log.
    pub fn end(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(leaving) => leaving.end(deadline),
            Self::Hook(leaving) => leaving.end(deadline),
        }
    }
}

impl Arriving {
    /// Waits for the state to be loaded whole and the VMM to stand; at most `wait`. `false`: not yet.
    ///
    /// # Errors
    /// One line: it never will be, or the VMM runs already (M11).
    pub fn loaded(&mut self, wait: Duration) -> Result<bool, String> {
        match self {
            Self::Qmp(arriving) => arriving.loaded(wait),
            Self::Hook(arriving) => arriving.loaded(wait),
        }
    }

    /// OWNER is durable: the guest runs, if it ran.
    ///
    /// # Errors
    /// One line, for the user: the guest stands here.
    pub fn run(&mut self, ran: bool, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(arriving) => arriving.run(ran, deadline),
            Self::Hook(arriving) => arriving.run(ran, deadline),
        }
    }

    /// Whether the VMM knows by itself that a state is whole. Else its length has to be compared.
    #[must_use]
    pub fn knows_the_end(&self) -> bool {
        matches!(self, Self::Qmp(_))
    }

    /// This host will not own: ends the VMM.
    ///
    /// # Errors
    /// One line, for the log.
    pub fn end(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Self::Qmp(arriving) => arriving.end(deadline),
            Self::Hook(arriving) => arriving.end(deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_are_told_apart() {
        assert_eq!(Vmm::parse("none"), Ok(Vmm::None));
        assert_eq!(Vmm::parse("qmp:/run/g1.qmp"), Ok(Vmm::Qmp("/run/g1.qmp".into())));
        assert_eq!(Vmm::parse("hook:/etc/hook").expect("a path").to_string(), "hook:/etc/hook");
        assert_eq!(Vmm::parse("qmp:/a:b").expect("a path").to_string(), "qmp:/a:b");
        for (text, cause) in [
            ("qmp:g1.qmp", "'qmp:g1.qmp': the path is not absolute"),
            ("hook:bin/hook", "'hook:bin/hook': the path is not absolute"),
            ("qmp:", "'qmp:': the path is not absolute"),
            ("xen", "'xen' is not known; use none, qmp:PATH or hook:PROGRAM"),
            ("none:", "'none:' is not known; use none, qmp:PATH or hook:PROGRAM"),
        ] {
            assert_eq!(Vmm::parse(text), Err(cause.to_owned()));
        }
    }
}
