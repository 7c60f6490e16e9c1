//! The phases of a migration on the source, in their order.
//!
//! [`run`] reads from top to bottom: prepare, perform, finish, one file each; beside them stands the one failure path,
//! `abort`. Here is what they share: the [`Drive`] itself, and how it listens to the destination. Nothing here touches
//! a data byte: it starts lanes, asks mirrors for counts, and speaks with the destination.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dial::{aside, dial, dial_aside, wait_for};
use super::lanes::{Lanes, connect, disk_of};
use super::link::{Link, LinkError};
use super::meter::{Meter, Rates, Verdict};
use super::preflight;
use super::settle::{self, Trouble};
use super::source::Job;
use super::synchrony::Synchrony;
use super::verify::{self, Checkers};
use super::wire::{Capabilities, Epoch, Hello, Message, Mode, Prepare, Prepared, Role, Verify, cut};
use crate::attach::Held;
use crate::control::wire::{self, Convergence, DiskProgress, Done, Owner, Phase, text};
use crate::digest::{Digest, Verified, root_of_all};
use crate::error::Exit;
use crate::export::{Quiesced, quiesce};
use crate::guest::Guest;
use crate::limits::{
    ABSENT_MAX, ATTACHED_PROOF_MAX, ATTACHED_SYNC_MAX, CONNECTIONS_PER_DISK_MAX, DIAL_MAX, DISKS_MAX, DISTANT,
    FENCE_MAX, FLUSH_PERIOD, GO_PATIENCE, LANES_DISTANT, LINK_LOOK, LINK_SILENCE_MAX, LOST_PATIENCE, PING_PERIOD,
    PREPARE_MAX, QUIESCE_MAX, RECONNECT_MAX, RECONNECT_PAUSE, REDIAL_MAX, REPLY_TIMEOUT, RUNNING_PATIENCE,
    SATURATED_MIN, SEAL_MAX, STATE_DRAIN_MAX, SWITCHOVER_PAUSE, SWITCHOVERS_MAX, TICK, UNSEALED_PATIENCE,
};
use crate::mirror::{Counts, Lost, Mirror, NotReady, Plan};
use crate::ownership::{Event, KeepError, Peer, Receipt, Record, Stamp};
use crate::place::Place;
use crate::standing::kept;
use abort::{NotEnded, abort};
use base::Told;
use course::{Course, Proof};
use outage::{Outage, stop};
use prepare::prepare;
use state::State;

mod abort;
mod base;
mod course;
mod finish;
mod outage;
mod perform;
mod plain;
mod prepare;
mod shown;
mod state;

/// What is said of a destination that does not say anything.
const SILENT: &str = "the destination is silent";

/// Why a migration does not go on. Which exit code that is depends on where it happens.
#[derive(Debug)]
enum Stop {
    /// It failed, or was cancelled: the attempt ends, the source goes on.
    Abort(String),
    /// The record cannot be made durable: who owns is not known from here (M4).
    Unknown(String),
}

impl From<String> for Stop {
    fn from(cause: String) -> Self {
        Self::Abort(cause)
    }
}

impl From<&str> for Stop {
    fn from(cause: &str) -> Self {
        Self::Abort(cause.to_owned())
    }
}

/// How a hand-over ended that nothing takes back.
enum Handed {
    /// The destination owns. The length of the switchover.
    Over(Duration),
    /// The destination owns, and what failed after that.
    OverBut(String),
    /// It has not answered yet.
    Unheard,
}

/// Why a switchover came to nothing while the gates could still open again.
enum NotYet {
    /// The guest goes on, and the migration too.
    GoOn(String),
    /// The migration does not.
    Stop(Stop),
}

impl From<NotYet> for Stop {
    fn from(not_yet: NotYet) -> Self {
        match not_yet {
            NotYet::GoOn(cause) => Self::Abort(cause),
            NotYet::Stop(stop) => stop,
        }
    }
}

/// Drives one migration to its end.
pub(super) fn run(guest: &Arc<Guest>, job: &Job) -> Done {
    if let Place::Plain(uri) = &job.address {
        return plain::run(guest, job, uri);
    }
    let mut drive = match prepare(guest, job) {
        Ok(drive) => drive,
        Err(cause) => return ended(guest, job, Exit::Refused, &cause),
    };
    let result = drive.perform().and_then(|()| drive.move_state()).and_then(|()| drive.finish());
    let counts = drive.counts();
    let handed = result.is_ok().then(|| drive.proof.receipt(job, &drive.stamp, &drive.peer, &counts));
    let moved = drive.state.as_ref().map_or((None, None), |state| (state.bytes(), state.pause()));
    let mut done = match result {
        Ok(Handed::Over(switchover)) => {
            let mut done = done(job, Exit::Done, Owner::Destination, "");
            done.switchover_us = Some(u64::try_from(switchover.as_micros()).unwrap_or(u64::MAX));
            done
        }
        Ok(Handed::OverBut(cause)) => done(job, Exit::GaveAway, Owner::Destination, &cause),
        Ok(Handed::Unheard) => done(
            job,
            Exit::Unknown,
            Owner::Unknown,
            "given away, and the destination has not answered yet: it owns as soon as it hears of it",
        ),
        Err(Stop::Unknown(cause)) => done(job, Exit::Unknown, Owner::Unknown, &cause),
        Err(Stop::Abort(cause)) => match abort(drive, &cause) {
            Ok(()) => ended(guest, job, Exit::Aborted, &cause),
            Err(NotEnded::Stands(vmm)) => ended(guest, job, Exit::Aborted, &format!("{cause}; and {vmm}")),
            Err(NotEnded::Unknown(unknown)) => done(job, Exit::Unknown, Owner::Unknown, &unknown),
        },
    };
    if let Some(receipt) = &handed {
        // The switchover is over; only now may it cost time.
        guest.keep_receipt(receipt.clone());
    }
    done.sent_bytes = counts.iter().map(|c| c.sent).sum();
    done.zero_bytes = counts.iter().map(|c| c.zeroed).sum();
    done.resent_bytes = counts.iter().map(|c| c.resent).sum();
    done.passes = counts.iter().map(|c| c.passes).max().unwrap_or(0);
    done.equal_bytes = counts.iter().map(|c| c.equal).sum();
    done.base_bytes = counts.iter().map(|c| c.based).sum();
    done.state_bytes = moved.0;
    done.pause_us = moved.1.map(|pause| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX));
    done.receipt = handed.filter(|_| done.owner == Owner::Destination).map(|receipt| kept(&receipt).receipt);
    done
}

/// The end of an attempt that was not given. That this host still owns is said only if its record says so: it may not
/// be durable (M4), or another host may have proved a higher order meanwhile (M8).
fn ended(guest: &Guest, job: &Job, exit: Exit, cause: &str) -> Done {
    match guest.record() {
        Ok(record) if record.as_ref().is_some_and(Record::owns) => done(job, exit, Owner::Here, cause),
        Ok(Some(record)) => done(job, Exit::Unknown, Owner::Unknown, &format!("{cause}; {record}")),
        Ok(None) => done(job, Exit::Unknown, Owner::Unknown, cause),
        Err(error) => done(job, Exit::Unknown, Owner::Unknown, &format!("{cause}; {error}")),
    }
}

fn done(job: &Job, exit: Exit, owner: Owner, cause: &str) -> Done {
    Done {
        attempt: u128::from_be_bytes(job.attempt.0),
        exit: exit.code(),
        message: text(cause),
        owner,
        destination: text(&job.address.to_string()),
        total_ms: u64::try_from(job.began.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..Done::default()
    }
}

/// A migration that the destination is prepared for.
struct Drive<'a> {
    guest: &'a Arc<Guest>,
    job: &'a Job,
    stamp: Stamp,
    prepared: Prepared,
    epoch: Epoch,
    peer: Peer,
    link: Link,
    /// What the destination tells of its disks' layers, where the user says that the bases are the same.
    layers: Vec<Told>,
    /// The stream path: the phase connection of the moment. `None`: data connections.
    stream: Option<Arc<verify::Present>>,
    /// How far away the destination is.
    round_trip: Duration,
    mirrors: Vec<Arc<Mirror>>,
    lanes: Lanes,
    /// Those who ask for digests.
    checkers: Checkers,
    /// What is verified, once the guest is quiesced and everything is.
    proof: Proof,
    /// How far the copy is.
    course: Course,
    /// Regions whose copies may still be in a buffer of the destination: in flight until it is fenced (D4).
    unknown: Vec<Lost>,
    /// The lanes are ended and not open again.
    down: bool,
    /// The phase connection is dead.
    link_lost: bool,
    outage: Outage,
    meter: Meter,
    /// Whether guest writes wait for the mirror.
    synchrony: Synchrony,
    /// Since when the destination owes an answer and has said nothing at all.
    owed: Option<Instant>,
    /// The guest's state, where a VMM driver moves it.
    state: Option<State>,
    /// It travels inside the phase connection.
    state_inside: bool,
    /// The destination wants to know how long it is.
    wants_length: bool,
    /// A lost connection is mended. Not while the guest stands: that takes as long as the link pleases. Nor when its
    /// state is lost with the connection.
    mends: bool,
    /// Room is made for the records to come.
    written_ahead: bool,
    /// When it was last asked whether it is there.
    pinged: Instant,
}

impl Drive<'_> {
    /// Takes in what has happened: cancels, failures, messages, lost connections. Waits a moment for a message.
    fn look(&mut self) -> Result<(), Stop> {
        self.look_for(TICK).map(drop)
    }

    /// The same, for a moment of this length; the message, if there was one.
    fn look_for(&mut self, moment: Duration) -> Result<Option<Message>, Stop> {
        if let Some(cause) = self.job.cancelled() {
            return Err(cause.into());
        }
        if let Some(failure) = self.mirrors.iter().find_map(|mirror| mirror.failure()) {
            return Err(failure.text.into());
        }
        if self.down {
            return self.mend("the data connections are down");
        }
        if let Some(cause) = self.mirrors.iter().find_map(|mirror| mirror.lost()) {
            return self.mend(&cause);
        }
        match self.listen_for(moment) {
            Ok(Some(Message::Failed { cause, .. })) => Err(format!("the destination: {cause}").into()),
            Ok(heard) => {
                // Said again and again: a mirror whose connection was lost has let everybody go (D7).
                if self.synchrony.on().is_some() {
                    self.mirrors.iter().for_each(|mirror| mirror.synchronous(true));
                }
                Ok(heard)
            }
            Err(cause) => self.mend(&cause),
        }
    }

    /// A connection is lost: opens another one, if this is the time for that.
    fn mend(&mut self, cause: &str) -> Result<Option<Message>, Stop> {
        if self.mends {
            self.recover(cause)?;
            return Ok(None);
        }
        self.down = true;
        Err(cause.into())
    }

    /// Waits a moment for a message about this attempt, and asks whether the destination is there when it is time.
    ///
    /// # Errors
    /// The link is lost; one that is silent for too long counts as that.
    fn listen(&mut self) -> Result<Option<Message>, String> {
        self.listen_for(TICK)
    }

    /// The same, for a moment of this length.
    fn listen_for(&mut self, moment: Duration) -> Result<Option<Message>, String> {
        let ping = (self.pinged.elapsed() >= PING_PERIOD).then_some(Message::Ping { number: 0 });
        if ping.is_some() {
            self.pinged = Instant::now();
        }
        let heard = self.exchange(ping.as_ref(), moment).map_err(|error| self.lost_link(error))?;
        // Blocks that are acknowledged are a sign of life too, and a PONG may be waiting behind them.
        let last = |since: Instant| self.link.heard().map_or(since, |any| any.max(since));
        if self.owed.is_some_and(|since| last(since).elapsed() > LINK_SILENCE_MAX) {
            self.link_lost = true;
            return Err(SILENT.to_owned());
        }
        Ok(heard)
    }

    /// Says what is to be answered.
    fn say(&mut self, message: &Message) -> Result<(), String> {
        self.send(message).map_err(|error| self.lost_link(error))
    }

    fn pause(&mut self, time: Duration) -> Result<(), Stop> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look()?;
        }
        Ok(())
    }

    /// Says `message`, if there is one, and waits a moment for one about this attempt.
    fn converse(&mut self, message: Option<&Message>) -> Result<Option<Message>, String> {
        self.exchange(message, TICK).map_err(|error| self.lost_link(error))
    }

    fn lost_link(&mut self, error: LinkError) -> String {
        self.link_lost = true;
        self.link.explain(error)
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.owed.get_or_insert_with(Instant::now);
        self.link.send(message, Instant::now() + LINK_SILENCE_MAX)
    }

    fn exchange(&mut self, message: Option<&Message>, moment: Duration) -> Result<Option<Message>, LinkError> {
        if let Some(message) = message {
            self.send(message)?;
        }
        let look = Instant::now() + moment;
        while let Some(message) = self.link.receive(look)? {
            self.owed = None;
            if message.stamp().is_some_and(|stamp| stamp.matches(&self.stamp)) {
                return Ok(Some(message));
            }
            if Instant::now() >= look {
                break;
            }
        }
        Ok(None)
    }

    fn record(&self, event: &Event) -> Result<(), Stop> {
        course::record(self.guest, event)
    }
}

fn verified(verify: wire::Verify) -> Verified {
    match verify {
        wire::Verify::None => Verified::Nothing,
        wire::Verify::Written => Verified::Written,
        wire::Verify::Full => Verified::Full,
    }
}

#[cfg(test)]
mod tests;
