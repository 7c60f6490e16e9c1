//! What is left to be said after an attempt: GO until RUNNING is heard, ABORT until UNSEALED is, and a sealed host's
//! question to its source until that has an answer (M2, M5, M10).
//!
//! A process whose record is in the middle of something does not rest before it knows what became of it. Nobody has to
//! be woken for a link that blinked or a host that was restarted: one thread, [`start`]ed with the process, looks at
//! the record whenever it changes and dials by itself, for as long as it takes. No clock decides anything here; it only
//! says when to ask again. The same thread writes a record again that could not be made durable (M4), and ends attempts
//! whose process part is gone.
//!
//! `drive.rs` says GO over the connection that it has, and `recover.rs` lets the operator ask now: both through
//! [`converse`].

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dial::dial;
use super::link::Link;
use super::wire::{Message, Role, cut};
use crate::guest::Guest;
use crate::limits::{
    ASK_PERIOD, DIAL_MAX, DRIVER_STACK, LINK_LOOK, RECONNECT_PAUSE, REPLY_TIMEOUT, RESUME_PAUSE_MAX, RESUMES_MAX,
    REWRITE_PAUSE, VMM_RESUME_MAX,
};
use crate::ownership::{Attempt, Event, Host, KeepError, Moving, Offer, Peer, Promise, Record, Stamp, State, Title};
use crate::place::Place;
use crate::vmm::About;

/// Wakes the thread that settles.
#[derive(Debug, Default)]
pub struct Settle {
    rung: Mutex<bool>,
    bell: Condvar,
    /// How often a guest was to go on that does not.
    resumes: AtomicU32,
}

impl Settle {
    /// The record has changed, or the process part of an attempt is over.
    pub fn ring(&self) {
        *self.lock() = true;
        self.bell.notify_all();
    }

    /// Waits until somebody rings, at most until `due`.
    fn wait(&self, due: Option<Instant>) {
        let mut rung = self.lock();
        while !*rung {
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            rung = match left {
                None => self.bell.wait(rung).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => self.bell.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        *rung = false;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record's unfinished business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Business {
    /// It is not durable.
    Rewrite,
    /// An attempt of a part of this process that is gone.
    End(Attempt),
    /// A guest that stands since a process before this one, or an attempt of this one, has died.
    Resume(Moving),
    /// What a plain NBD server would say if it could say anything.
    Plain(Attempt),
    /// Something to be said to the peer.
    Say(Attempt),
    /// Something to be asked of the source.
    Ask(Attempt),
}

impl Business {
    /// The longest pause between two tries.
    fn pause(self) -> Duration {
        match self {
            Self::Rewrite | Self::End(_) | Self::Plain(_) => REWRITE_PAUSE,
            Self::Resume(_) => RESUME_PAUSE_MAX,
            Self::Say(_) => RECONNECT_PAUSE.1,
            Self::Ask(_) => ASK_PERIOD,
        }
    }
}

fn business(guest: &Guest) -> Option<Business> {
    let record = match guest.record() {
        Ok(record) => record?,
        Err(_) => return Some(Business::Rewrite),
    };
    let attempt = record.attempt()?;
    let live = guest.source.live_attempt() == Some(attempt);
    match &record.state {
        State::Offered { offer: Offer::Live, .. } if !live => Some(Business::End(attempt)),
        State::Receiving { .. } if !guest.destination.receives() => Some(Business::End(attempt)),
        State::Given { to, arrived: false, .. } | State::Offered { to, offer: Offer::Ended | Offer::Closed, .. }
            if !live && to.host == Host::NONE =>
        {
            Some(Business::Plain(attempt))
        }
        State::Given { arrived: false, .. } | State::Offered { offer: Offer::Ended | Offer::Closed, .. } if !live => {
            Some(Business::Say(attempt))
        }
        State::Sealed { .. } => Some(Business::Ask(attempt)),
        State::Owner { .. } if guest.source.live_attempt().is_none() => {
            guest.moving().filter(|moving| !moving.arrives).map(Business::Resume)
        }
        _ => None,
    }
}

/// Starts the thread that settles what is left, whenever something is.
///
/// # Errors
/// The system cannot start a thread.
pub fn start(guest: &Arc<Guest>) -> std::io::Result<()> {
    let guest = Arc::clone(guest);
    let thread = std::thread::Builder::new().name("settle".to_owned()).stack_size(DRIVER_STACK);
    thread.spawn(move || settle(&guest)).map(drop)
}

fn settle(guest: &Guest) {
    // Whoever is sealed by a source that lives hears GO within moments; after a restart it asks at once.
    let mut patience = Duration::ZERO;
    let mut doing = None;
    let mut due = Instant::now();
    let mut pause = RECONNECT_PAUSE.0;
    loop {
        forget_who_has_left(guest);
        let Some(now) = business(guest) else {
            doing = None;
            patience = ASK_PERIOD;
            guest.destination.tidy(guest);
            guest.settle.wait(None);
            continue;
        };
        if doing != Some(now) {
            doing = Some(now);
            pause = RECONNECT_PAUSE.0;
            due = Instant::now() + if matches!(now, Business::Ask(_)) { patience } else { Duration::ZERO };
            patience = ASK_PERIOD;
        }
        if due > Instant::now() {
            guest.settle.wait(Some(due));
            continue;
        }
        if let Err(cause) = attend(guest, now) {
            log::debug!("settle: {cause}");
        }
        due = Instant::now() + pause;
        pause = (pause * 2).min(now.pause());
        if business(guest) != Some(now) {
            log::info!("settle: {}", guest.why_fenced());
        }
    }
}

fn attend(guest: &Guest, business: Business) -> Result<(), String> {
    match business {
        Business::Rewrite => guest.retry().map_err(|error| error.to_string()),
        Business::End(attempt) => {
            let receiving = guest.record().ok().flatten().is_some_and(|r| matches!(r.state, State::Receiving { .. }));
            let event = if receiving { Event::AbortReceiving { attempt } } else { Event::End { attempt } };
            guest.apply(&event).map(drop).map_err(|error| error.to_string())
        }
        Business::Resume(moving) => resume(guest, &moving),
        Business::Plain(_) => arrived_or_not(guest),
        Business::Say(_) | Business::Ask(_) => call(guest).map(drop).map_err(|trouble| trouble.to_string()),
    }
}

/// A guest that was given away is let go on by nobody here, whatever becomes of that: only by hand.
fn forget_who_has_left(guest: &Guest) {
    let record = guest.record().ok().flatten();
    if record.is_some_and(|record| matches!(record.state, State::Given { .. } | State::Superseded { .. }))
        && let Some(moving) = guest.moving().filter(|moving| !moving.arrives)
    {
        guest.end_moving(moving.attempt);
    }
}

/// This host owns, and nobody has let the guest go on whose state began to move (M3).
fn resume(guest: &Guest, moving: &Moving) -> Result<(), String> {
    let about = About { attempt: moving.attempt.to_string(), peer: String::new() };
    match guest.vmm.resume_again(&about, moving.ran, Instant::now() + VMM_RESUME_MAX) {
        Ok(true) => log::warn!("{}: the guest stood for an attempt that came to nothing, and goes on here", guest.name),
        Ok(false) => log::warn!("{}: the guest's state was moving, and its VMM is gone", guest.name),
        Err(cause) if guest.settle.resumes.fetch_add(1, Ordering::Relaxed) + 1 < RESUMES_MAX => {
            log::error!("{}: this host owns, and the guest stands: {cause}", guest.name);
            return Err(cause);
        }
        Err(cause) => {
            log::error!("{}: this host owns, and the guest stands: {cause}; it is left to its user", guest.name);
        }
    }
    guest.settle.resumes.store(0, Ordering::Relaxed);
    guest.end_moving(moving.attempt);
    Ok(())
}

/// A plain NBD server is never sealed, and what was given to it was there before GIVEN: both sides of the exchange are
/// known here (see `drive/plain.rs`).
fn arrived_or_not(guest: &Guest) -> Result<(), String> {
    let record = guest.record().map_err(|error| error.to_string())?.ok_or("there is no record")?;
    let stamp = record.stamp().ok_or("there is nothing to say")?;
    let given = matches!(record.state, State::Given { .. });
    let event = if given { Event::Running(stamp) } else { Event::Unsealed(stamp) };
    guest.apply(&event).map(drop).map_err(|error| error.to_string())
}

/// Whether GO or ABORT has to be said again, as far as is known.
pub(super) fn is_needed(guest: &Guest) -> bool {
    let unsaid = |record: Record| {
        matches!(
            record.state,
            State::Given { arrived: false, .. } | State::Offered { offer: Offer::Ended | Offer::Closed, .. }
        )
    };
    guest.record().map_or(true, |record| record.is_some_and(unsaid))
}

// ---- one conversation --------------------------------------------------------------------------------------------

/// Why a conversation came to nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The peer is not there, not reachable, or another host.
    Silent(String),
    /// It answered, and what it said could not be made durable here (M4).
    NotDurable(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(cause) | Self::NotDurable(cause) => f.write_str(cause),
        }
    }
}

fn silent(cause: impl fmt::Display) -> Trouble {
    Trouble::Silent(cause.to_string())
}

/// Dials the peer that the record names, says what is to be said, and takes the answer in.
pub(super) fn call(guest: &Guest) -> Result<Message, Trouble> {
    let record = guest.record().map_err(silent)?;
    let (_, to) = record.as_ref().and_then(saying).ok_or_else(|| silent("there is nobody to ask"))?;
    if to.address.is_empty() {
        return Err(silent("it cannot be dialled from here"));
    }
    let place = Place::parse(&to.address).map_err(silent)?;
    let (mut link, theirs) = dial(guest, &place, Role::Asker, Instant::now() + DIAL_MAX).map_err(silent)?;
    if theirs.host != to.host {
        return Err(silent(format_args!("another host ({:.8}) answers there", theirs.host)));
    }
    converse(guest, &mut link, Instant::now() + REPLY_TIMEOUT).map(|(answer, _)| answer)
}

/// What a host with this record says to its peer, and who that is.
fn saying(record: &Record) -> Option<(Message, Peer)> {
    let stamp = record.stamp();
    let message = match &record.state {
        State::Given { arrived: false, .. } => Message::Go { stamp: stamp? },
        State::Offered { offer: Offer::Ended | Offer::Closed, .. } => {
            // Said by who has lost the peer: a cancel was said before, if there was one.
            Message::Abort { stamp: stamp?, cause: cut("the attempt has ended"), keep: true }
        }
        State::Sealed { .. } | State::Given { arrived: true, .. } => Message::Question { stamp: stamp? },
        State::Superseded { .. } => Message::Question { stamp: nobodys(record.title()) },
        _ => return None,
    };
    Some((message, record.peer()?.clone()))
}

/// A stamp of no attempt: whoever is asked about it answers with its record.
fn nobodys(title: Title) -> Stamp {
    let Title { lineage, order, word } = title;
    Stamp { lineage, word, attempt: Attempt::NONE, source: Host::NONE, destination: Host::NONE, order }
}

/// Says over `link` what the record has to say, takes the answer in, and returns it, with the moment at which it came.
/// The record is what it has become by it.
pub(super) fn converse(guest: &Guest, link: &mut Link, deadline: Instant) -> Result<(Message, Instant), Trouble> {
    let record = guest.record().map_err(silent)?;
    let (message, peer) = record.as_ref().and_then(saying).ok_or_else(|| silent("there is nothing to say"))?;
    let stamp = *message.stamp().ok_or_else(|| silent("there is nothing to say"))?;
    link.send(&message, deadline).map_err(silent)?;
    loop {
        let look = deadline.min(Instant::now() + LINK_LOOK);
        match link.receive(look).map_err(silent)? {
            Some(answer) if answer.stamp().is_some_and(|about| about.matches(&stamp)) => {
                let heard = Instant::now();
                if let Some(reply) = take_in(guest, &answer, &peer)? {
                    link.send(&reply, deadline).map_err(silent)?;
                }
                return Ok((answer, heard));
            }
            _ if Instant::now() >= deadline => return Err(silent("no answer")),
            _ => {}
        }
    }
}

/// Lets an answer change the record; returns what is to be said in return.
fn take_in(guest: &Guest, answer: &Message, peer: &Peer) -> Result<Option<Message>, Trouble> {
    let event = match answer {
        Message::Running { stamp, .. } => Event::Running(*stamp),
        Message::Unsealed { stamp } => Event::Unsealed(*stamp),
        // The guest has moved on from there, or was taken by hand: the record of the peer is the proof (M6).
        Message::Record { record: Some(theirs), .. } => Event::Meet { title: theirs.title, peer: peer.clone() },
        // M3: the source's word ends SEALED.
        Message::Go { .. } | Message::Promise { promise: Promise::NotGiven, .. } => {
            let said = guest.destination.hear(guest, answer).map_err(Trouble::NotDurable);
            if matches!(said, Ok(Some(Message::Running { .. }))) {
                let _ = guest.destination.run_guest(guest);
                guest.destination.keep_receipt(guest);
            }
            return said;
        }
        _ => return Ok(None),
    };
    match guest.apply(&event) {
        Ok(_) => Ok(None),
        Err(KeepError::Refused(refusal)) => Err(silent(refusal)),
        Err(error @ KeepError::Unknown(_)) => Err(Trouble::NotDurable(error.to_string())),
    }
}
