//! What is left to be said after an attempt: GO until RUNNING is heard, ABORT until UNSEALED is (M5, M10).
//!
//! A process that has given its guest away, or has offered it and then aborted, does not rest before it knows what
//! became of it. Nobody has to be woken for a link that blinked: this dials by itself, for as long as it takes.

use std::sync::Arc;
use std::time::Instant;

use super::dial::dial;
use super::link::Link;
use super::wire::{Message, cut};
use crate::address::Address;
use crate::guest::Guest;
use crate::limits::{DIAL_MAX, DRIVER_STACK, LINK_LOOK, RECONNECT_PAUSE, REPLY_TIMEOUT};
use crate::ownership::{Answer, Event, Offer, Peer, Record, Stamp, State};

/// The record's unfinished business.
enum Business {
    /// Given, and not known to have arrived.
    Go,
    /// Offered, ended, and not known to be unsealed.
    Abort,
}

fn business(record: &Record) -> Option<(Business, Stamp, Peer)> {
    let (business, to) = match &record.state {
        State::Given { to, arrived: false, .. } => (Business::Go, to),
        State::Offered { to, offer: Offer::Ended | Offer::Closed, .. } => (Business::Abort, to),
        _ => return None,
    };
    Some((business, record.stamp()?, to.clone()))
}

/// Whether anything is left to be said.
pub(super) fn is_needed(guest: &Guest) -> bool {
    guest.record().ok().flatten().is_some_and(|record| business(&record).is_some())
}

/// Starts a thread that says it until it is heard.
pub(super) fn start(guest: &Arc<Guest>) {
    let guest = Arc::clone(guest);
    let thread = std::thread::Builder::new().name("settle".to_owned()).stack_size(DRIVER_STACK);
    let started = thread.spawn(move || {
        let mut pause = RECONNECT_PAUSE.0;
        while is_needed(&guest) {
            match settle_once(&guest) {
                Ok(()) => {}
                Err(cause) => {
                    log::debug!("settle: {cause}");
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(RECONNECT_PAUSE.1);
                }
            }
        }
        log::info!("settle: {}", guest.why_fenced());
    });
    if let Err(error) = started {
        log::error!("settle: no thread: {error}");
    }
}

fn settle_once(guest: &Guest) -> Result<(), String> {
    let record = guest.record().map_err(|error| error.to_string())?;
    let Some((_, _, to)) = record.as_ref().and_then(business) else { return Ok(()) };
    let address = Address::parse(&to.address)?;
    let (mut link, _) = dial(guest, &address, Instant::now() + DIAL_MAX)?;
    say(guest, &mut link, Instant::now() + REPLY_TIMEOUT)
}

/// Says what is left to be said over `link`, and takes the answer in.
///
/// # Errors
/// One line: the link is of no more use, or the answer is not one.
pub(super) fn say(guest: &Guest, link: &mut Link, deadline: Instant) -> Result<(), String> {
    let record = guest.record().map_err(|error| error.to_string())?;
    let Some((business, stamp, to)) = record.as_ref().and_then(business) else { return Ok(()) };
    let message = match business {
        Business::Go => Message::Go { stamp },
        Business::Abort => Message::Abort { stamp, cause: cut("the attempt has ended") },
    };
    link.send(&message, deadline).map_err(|error| error.to_string())?;
    loop {
        let look = deadline.min(Instant::now() + LINK_LOOK);
        let event = match link.receive(look).map_err(|error| error.to_string())? {
            Some(Message::Running { stamp: about, .. }) if about.matches(&stamp) => Event::Running(stamp),
            Some(Message::Unsealed { stamp: about }) if about.matches(&stamp) => Event::Unsealed(stamp),
            // The guest has moved on from there, or was taken by hand: the record of the peer is the proof (M6).
            Some(Message::Record { stamp: about, record: Some(theirs) }) if about.matches(&stamp) => {
                Event::Meet { title: theirs.title, peer: to.clone() }
            }
            Some(Message::Record { .. }) => return Err(format!("{to} does not know the attempt")),
            Some(_) => continue,
            None if Instant::now() >= deadline => return Err("no answer".to_owned()),
            None => continue,
        };
        return match guest.apply(&event) {
            Ok(Answer::Silent) if !is_needed(guest) => Ok(()),
            Ok(_) => Err(format!("{to} answered, and that settles nothing")),
            Err(error) => Err(error.to_string()),
        };
    }
}
