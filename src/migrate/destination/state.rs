//! The guest's state at the destination: takes it in, and knows how far it is (M11).
//!
//! The state comes on a connection of its own or inside the phase connection; a thread has the VMM wait, says that it
//! is ready, and from then on a [`Relay`] carries. Whoever else wants to know asks [`Loading::standing`]. It has a lock
//! of its own: a VMM that is asked may take its time, and nobody under the stage's lock waits for that but who ends the
//! VMM before "unsealed".
//!
//! What has loaded here lives in the VMM, and this process only remembers that it saw it. One that was restarted while
//! it was sealed finds the VMM by its monitor: it lets the guest run after GO, and ends it before "unsealed".

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::limits::{REPLY_TIMEOUT, STATE_STALL_MAX, STATE_START_MAX, VMM_END_MAX, VMM_RUN_MAX};
use crate::migrate::link::Link;
use crate::migrate::state::{Carrier, Relay};
use crate::migrate::wire::{Message, Standing, cut};
use crate::ownership::{Attempt, Moving, Stamp};
use crate::trunk::{Channel, Trunk};
use crate::vmm::{About, Arriving};

/// What a driver may tell of an attempt.
pub(super) fn about(stamp: &Stamp) -> About {
    About { attempt: stamp.attempt.to_string(), peer: stamp.source.to_string() }
}

/// How far the guest's state is in this process.
#[derive(Debug, Default)]
pub(super) struct Loading {
    inner: Mutex<Option<Loaded>>,
    /// Whether the guest of that attempt was let run, and why not. Asked while a VMM takes its time.
    outcome: Mutex<Option<(Attempt, Result<(), String>)>>,
}

#[derive(Debug)]
struct Loaded {
    stamp: Stamp,
    ran: bool,
    vmm: Option<Arriving>,
    relay: Option<Arc<Relay>>,
    /// Its length, once the source has said it.
    length: Option<u64>,
    standing: Standing,
    cause: String,
}

impl Loaded {
    fn fail(&mut self, cause: &str) {
        self.standing = Standing::Failed;
        cause.clone_into(&mut self.cause);
        if let Some(relay) = &self.relay {
            relay.end();
        }
    }

    /// Asks the VMM, if it is not known.
    fn look(&mut self) {
        let Some(vmm) = &mut self.vmm else { return };
        if !matches!(self.standing, Standing::Loading | Standing::Loaded) {
            return;
        }
        let whole = if vmm.knows_the_end() { Ok(true) } else { is_whole(self.relay.as_deref(), self.length) };
        match vmm.loaded(Duration::ZERO).and_then(|loaded| Ok(whole? && loaded)) {
            Ok(true) => self.standing = Standing::Loaded,
            Ok(false) if self.standing == Standing::Loaded => self.fail("the VMM does not stand any more"),
            Ok(false) => {
                // It may be loaded a moment after its socket was closed; a socket that broke is no end of a state.
                if let Some(cause) = self.relay.as_ref().and_then(|relay| relay.failure()) {
                    self.fail(&cause);
                }
            }
            Err(cause) => self.fail(&cause),
        }
    }
}

/// Whether a VMM that cannot tell has been given all of the state: a connection that ends early looks like its end.
fn is_whole(relay: Option<&Relay>, length: Option<u64>) -> Result<bool, String> {
    let Some(relay) = relay else { return Ok(false) };
    // In this order: what came before the end is counted before it.
    let over = relay.is_over();
    match length {
        Some(length) if relay.into() == length => Ok(true),
        Some(length) if over || relay.starved() > STATE_STALL_MAX => Err(relay
            .failure()
            .unwrap_or_else(|| format!("{} of {length} bytes of the guest's state came", relay.into()))),
        Some(_) => Ok(false),
        // A source that does not say it yet, or never does.
        None => relay.failure().map_or(Ok(true), Err),
    }
}

impl Loading {
    /// Takes the state in that comes on `link`, whose STATE was found good: returns when it is carried, or cannot be.
    ///
    /// # Errors
    /// One line: the connection ends, and the source has been told why.
    pub(super) fn take(&self, guest: &Guest, link: &mut Link, stamp: Stamp, ran: bool) -> Result<(), String> {
        let carrier = Carrier::Own(Arc::clone(link.socket()));
        self.carry(guest, stamp, ran, carrier, |answer| {
            link.send(answer, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())
        })
    }

    /// The same for a state that comes inside the phase connection.
    ///
    /// # Errors
    /// As there; the connection lives on.
    pub(super) fn take_inside(
        &self,
        guest: &Guest,
        trunk: &Trunk,
        channel: Channel,
        stamp: Stamp,
        ran: bool,
    ) -> Result<(), String> {
        // Nothing comes before the other side knows how much fits, and it speaks only once it has heard that all is
        // ready.
        channel.invite().map_err(|ended| ended.to_string())?;
        self.carry(guest, stamp, ran, Carrier::Inside(channel), |answer| {
            Link::say(trunk, answer, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())
        })
    }

    fn carry(
        &self,
        guest: &Guest,
        stamp: Stamp,
        ran: bool,
        carrier: Carrier,
        mut answer: impl FnMut(&Message) -> Result<(), String>,
    ) -> Result<(), String> {
        let begun = self.begin(stamp, ran).and_then(|()| {
            guest.begin_moving(Moving { attempt: stamp.attempt, arrives: true, ran })?;
            let begun = guest.vmm.arriving(&about(&stamp), ran, Instant::now() + STATE_START_MAX);
            begun.inspect_err(|cause| {
                self.of(&stamp, |loaded| loaded.fail(cause));
            })
        });
        let (vmm, socket) = match begun {
            Ok(begun) => begun,
            Err(cause) => {
                let _ = answer(&Message::Failed { stamp, cause: cut(&cause), region: None });
                return Err(cause);
            }
        };
        // The attempt may have ended while the VMM was got ready, and whoever ended it found nothing to end (M11).
        let mut vmm = Some(vmm);
        self.of(&stamp, |loaded| loaded.vmm = vmm.take());
        if let Some(mut vmm) = vmm {
            let ended = vmm.end(Instant::now() + VMM_END_MAX);
            return Err(ended.err().unwrap_or_else(|| "the attempt has ended".to_owned()));
        }
        if let Err(cause) = guest.destination.expects_state(&stamp) {
            self.end(guest, &stamp);
            return Err(cause);
        }
        answer(&Message::StateReady { stamp })?;
        let relay = Relay::start(socket, carrier, None)?;
        if !self.of(&stamp, |loaded| loaded.relay = Some(Arc::clone(&relay))) {
            // Nobody else would.
            relay.end();
        }
        relay.wait();
        log::info!("migration: {} bytes of the guest's state were carried", relay.bytes());
        Ok(())
    }

    /// A state begins to come, the only one of its attempt.
    fn begin(&self, stamp: Stamp, ran: bool) -> Result<(), String> {
        let mut inner = self.lock();
        if inner.as_ref().is_some_and(|loaded| loaded.stamp.matches(&stamp)) {
            return Err("the guest's state has come before".to_owned());
        }
        *inner = Some(Loaded {
            stamp,
            ran,
            vmm: None,
            relay: None,
            length: None,
            standing: Standing::Loading,
            cause: String::new(),
        });
        Ok(())
    }

    /// Does something to the state of that attempt. `false`: it has been ended meanwhile.
    fn of(&self, stamp: &Stamp, change: impl FnOnce(&mut Loaded)) -> bool {
        let mut inner = self.lock();
        let loaded = inner.as_mut().filter(|loaded| loaded.stamp.matches(stamp));
        loaded.map(change).is_some()
    }

    /// The source has sent all of it, and so much that is.
    pub(super) fn set_length(&self, stamp: &Stamp, bytes: u64) {
        self.of(stamp, |loaded| loaded.length = Some(bytes));
    }

    /// Whether anything of the state of that attempt has begun to come: it cannot be resumed.
    pub(super) fn has_begun(&self, stamp: &Stamp) -> bool {
        self.of(stamp, |_| ())
    }

    /// How far the state of that attempt is.
    pub(super) fn standing(&self, stamp: &Stamp) -> (Standing, String) {
        match self.lock().as_mut().filter(|loaded| loaded.stamp.matches(stamp)) {
            // A process that was restarted while it was sealed has loaded nothing itself.
            None => match self.outcome(stamp.attempt) {
                None => (Standing::None, String::new()),
                Some(Ok(())) => (Standing::Running, String::new()),
                Some(Err(cause)) => (Standing::Failed, cause),
            },
            Some(loaded) => {
                loaded.look();
                (loaded.standing, loaded.cause.clone())
            }
        }
    }

    /// Whether the guest of that attempt was let run, and why not; `None`: it was not to, yet.
    pub(super) fn outcome(&self, attempt: Attempt) -> Option<Result<(), String>> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.as_ref().filter(|(about, _)| *about == attempt).map(|(_, outcome)| outcome.clone())
    }

    /// OWNER is durable: the guest runs, if it ran.
    ///
    /// # Errors
    /// One line, for the user: it does not.
    pub(super) fn run(&self, guest: &Guest) -> Result<(), String> {
        let mut inner = self.lock();
        let deadline = Instant::now() + VMM_RUN_MAX;
        let (run, ran) = match inner.as_mut() {
            Some(Loaded { standing: Standing::Running, .. }) => return Ok(()),
            Some(Loaded { standing: Standing::Failed, cause, .. }) => return Err(cause.clone()),
            Some(loaded) => {
                let ran = loaded.ran;
                let run = loaded.vmm.as_mut().map_or(Ok(()), |vmm| vmm.run(ran, deadline));
                match &run {
                    Ok(()) => loaded.standing = Standing::Running,
                    Err(cause) => loaded.fail(cause),
                }
                // The monitor is free for its user, and nothing comes or goes any more.
                loaded.vmm = None;
                if let Some(relay) = &loaded.relay {
                    relay.end();
                }
                (run, ran)
            }
            None => {
                let ran = guest.moving().filter(|moving| moving.arrives).map(|moving| moving.ran);
                (guest.vmm.run_again(&About::default(), ran, deadline), ran != Some(false))
            }
        };
        if let Some(moving) = guest.moving().filter(|moving| moving.arrives && run.is_ok()) {
            guest.end_moving(moving.attempt);
        }
        if let Some(attempt) = guest.record().ok().flatten().and_then(|record| record.attempt()) {
            *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some((attempt, run.clone()));
        }
        match &run {
            Ok(()) if !guest.vmm.moves_state() => {}
            Ok(()) if !ran => log::warn!("{}: the guest was paused before it moved, and stays so", guest.name),
            Ok(()) => log::info!("{}: the guest runs here", guest.name),
            Err(cause) => log::error!("{}: this host owns, and the guest does not run: {cause}", guest.name),
        }
        run
    }

    /// This host will not own, or the attempt has ended: ends the VMM that has read what may be old (M11).
    pub(super) fn end(&self, guest: &Guest, stamp: &Stamp) {
        let mut inner = self.lock();
        let deadline = Instant::now() + VMM_END_MAX;
        let ended = match inner.take_if(|loaded| loaded.stamp.matches(stamp)) {
            Some(mut loaded) => {
                if let Some(relay) = &loaded.relay {
                    relay.end();
                }
                match &mut loaded.vmm {
                    Some(vmm) => vmm.end(deadline),
                    // It could not be got ready.
                    None if loaded.standing == Standing::Failed => guest.vmm.end_again(&about(stamp), deadline),
                    // Who gets it ready ends it.
                    None => Ok(()),
                }
            }
            None => guest.vmm.end_again(&about(stamp), deadline),
        };
        guest.end_moving(stamp.attempt);
        if let Err(cause) = ended {
            log::warn!("{}: {cause}", guest.name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{Host, Lineage, Order, Word};

    fn stamp(attempt: u8) -> Stamp {
        Stamp {
            lineage: Lineage([1; 16]),
            word: Word([4; 16]),
            attempt: Attempt([attempt; 16]),
            source: Host([2; 16]),
            destination: Host([3; 16]),
            order: Order { term: 1, generation: 2 },
        }
    }

    #[test]
    fn a_second_state_of_an_attempt_does_not_take_the_place_of_the_first() {
        let loading = Loading::default();
        loading.begin(stamp(1), true).expect("the first");
        loading.begin(stamp(1), true).expect_err("it is being loaded");
        assert!(loading.of(&stamp(1), |loaded| loaded.fail("for a test")));
        loading.begin(stamp(1), true).expect_err("and is not resumed");
        assert_eq!(loading.standing(&stamp(1)), (Standing::Failed, "for a test".to_owned()));
        loading.begin(stamp(2), true).expect("another attempt");
        assert!(!loading.of(&stamp(1), |_| ()), "the first has ended");
    }
}
