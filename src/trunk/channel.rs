//! The guest's state on its way through a trunk: two byte streams, one each way, of which each ends by itself.
//!
//! Each side says how much it has room for, and again how much of it is free once its VMM has taken something
//! ([`Kind::Room`]). Nothing more is sent, so that a VMM that takes nothing stops its own stream and nobody else's: the
//! reader of the connection always has room for what comes, and blocks and messages go on. It is opened once on a
//! connection: a state that has begun to move is not resumed.
//!
//! As with blocks, less is in flight than fits while it has to queue on the way (`trunk.rs`), so that the messages
//! behind it need not wait.
//!
//! Used by `migrate/state.rs` with two threads, one a direction.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{FRAME_HEAD, Fault, Kind, head, room};
use super::{Broken, Inner, Trunk};
use crate::limits::{LANE_SILENCE_MAX, REPLY_TIMEOUT, STREAM_BLOCK_MAX, STREAM_QUEUE, STREAM_WINDOW_MIN};

/// One end of the state's way. It says nothing when it is dropped.
#[derive(Debug)]
pub struct Channel {
    trunk: Arc<Trunk>,
}

/// Why no more of the state comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The other side carries it no further.
    There,
    /// Nor does this side: see [`Channel::shutdown`].
    Here,
    /// The connection is dead.
    Broken(Broken),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::There => f.write_str("carries it no further"),
            Self::Here => f.write_str("it is carried no further"),
            Self::Broken(broken) => broken.fmt(f),
        }
    }
}

/// What a trunk knows of it.
#[derive(Debug)]
pub(super) struct State {
    /// What has come and was not taken yet.
    came: VecDeque<u8>,
    /// So much more of it may come.
    room: usize,
    /// All of it has come.
    whole: bool,
    /// What the other side has room for in all, once it has said so.
    theirs: Option<usize>,
    sent: u64,
    /// So much of that has been taken there.
    taken: u64,
    /// Bytes that may be in flight.
    window: usize,
    /// What was in flight when this byte was sent, and when: its acknowledgement is measured.
    probe: Option<Probe>,
    /// The shortest time until an acknowledgement.
    shortest: Option<Duration>,
    /// All of ours was sent.
    finished: bool,
    /// The other side carries it no further.
    refused: bool,
    /// Nor does this side.
    shut: bool,
}

/// A byte whose acknowledgement is waited for.
#[derive(Debug, Clone, Copy)]
struct Probe {
    end: u64,
    at: Instant,
    /// What was taken there before.
    taken: u64,
}

impl State {
    fn new(room: usize) -> Self {
        Self {
            came: VecDeque::with_capacity(room),
            room,
            whole: false,
            theirs: None,
            sent: 0,
            taken: 0,
            window: STREAM_WINDOW_MIN,
            probe: None,
            shortest: None,
            finished: false,
            refused: false,
            shut: false,
        }
    }

    /// Whether a frame of `length` bytes may come; none at all is the end.
    pub(super) fn expect(&mut self, length: usize) -> Result<(), Fault> {
        if self.whole {
            return Err(Fault::State);
        }
        self.whole = length == 0;
        self.room = self.room.checked_sub(length).ok_or(Fault::Room)?;
        Ok(())
    }

    /// Keeps what was expected.
    pub(super) fn take_in(&mut self, bytes: &[u8]) {
        if !self.shut {
            self.came.extend(bytes);
        }
    }

    /// The other side has room for so much more.
    pub(super) fn room(&mut self, bytes: u32, now: Instant) -> Result<(), Fault> {
        if self.refused {
            return Err(Fault::State);
        }
        if bytes == 0 {
            self.refused = true;
            return Ok(());
        }
        match self.theirs {
            None => self.theirs = Some(usize::try_from(bytes).unwrap_or(usize::MAX)),
            Some(_) => {
                self.taken += u64::from(bytes);
                if self.taken > self.sent {
                    return Err(Fault::Unasked);
                }
                self.measure(now);
            }
        }
        Ok(())
    }

    fn measure(&mut self, now: Instant) {
        let Some(probe) = self.probe.take_if(|probe| probe.end <= self.taken) else { return };
        let took = now.duration_since(probe.at);
        let shortest = *self.shortest.insert(self.shortest.map_or(took, |shortest| shortest.min(took)));
        let round = usize::try_from(self.taken - probe.taken).unwrap_or(usize::MAX);
        self.window = if took.saturating_sub(shortest) < STREAM_QUEUE {
            self.window.saturating_add(round)
        } else {
            self.window.saturating_sub(round / 2)
        }
        .clamp(STREAM_WINDOW_MIN, self.theirs.unwrap_or_default().max(STREAM_WINDOW_MIN));
    }

    /// How much of `wanted` bytes may be sent now. Small pieces are not made of large ones unless nothing larger will
    /// ever fit.
    fn may_send(&self, wanted: usize) -> usize {
        let in_flight = usize::try_from(self.sent - self.taken).unwrap_or(usize::MAX);
        let fits = self.theirs.unwrap_or_default().min(self.window).saturating_sub(in_flight);
        if fits >= wanted || in_flight == 0 { fits.min(wanted) } else { 0 }
    }

    fn count(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        self.probe.get_or_insert(Probe { end: self.sent, at: Instant::now(), taken: self.taken });
    }
}

impl Channel {
    /// Opens this side's end, with room for so many bytes: from now on the other side's may come. `None`: it was open
    /// before.
    #[must_use]
    pub fn open(trunk: &Arc<Trunk>, room: usize) -> Option<Self> {
        let mut inner = trunk.lock();
        if inner.state.is_some() {
            return None;
        }
        inner.state = Some(State::new(room));
        Some(Self { trunk: Arc::clone(trunk) })
    }

    /// Says how much there is room for; the other side's end must be open. Nothing comes before.
    ///
    /// # Errors
    /// [`Ended::Broken`].
    pub fn invite(&self) -> Result<(), Ended> {
        let bytes = of(&mut self.trunk.lock()).room;
        self.say_room(bytes)
    }

    /// Takes at least one byte of what has come, or says 0 when all of it has been taken. Waits for as long as it takes
    /// until something comes, the connection is dead, or somebody says [`Channel::shutdown`].
    ///
    /// # Errors
    /// [`Ended`]; what came before is taken first.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Ended> {
        let mut inner = self.trunk.lock();
        let count = loop {
            let broken = inner.broken;
            let state = of(&mut inner);
            if state.shut {
                return Err(Ended::Here);
            }
            if !state.came.is_empty() {
                let (first, second) = state.came.as_slices();
                let from = if first.is_empty() { second } else { first };
                let count = from.len().min(buffer.len());
                buffer[..count].copy_from_slice(&from[..count]);
                state.came.drain(..count);
                break count;
            }
            if state.whole {
                return Ok(0);
            }
            if state.refused {
                return Err(Ended::There);
            }
            if let Some(broken) = broken {
                return Err(Ended::Broken(broken));
            }
            inner = self.trunk.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
        };
        let state = of(&mut inner);
        state.room += count;
        let tell = !state.whole;
        drop(inner);
        if tell {
            // A connection that is dead says so when nothing is left to be taken.
            let _ = self.say_room(count);
        }
        Ok(count)
    }

    /// Sends all of `bytes`, as the other side has room for them. Waits for as long as that takes, as
    /// [`Channel::receive`] does.
    ///
    /// # Errors
    /// [`Ended`]; how much was taken there is not known then.
    pub fn send_all(&self, bytes: &[u8]) -> Result<(), Ended> {
        let mut left = bytes;
        while !left.is_empty() {
            let count = self.wait_for_room(left.len().min(STREAM_BLOCK_MAX))?;
            let (piece, rest) = left.split_at(count);
            self.send(&head(Kind::State, piece.len()), piece)?;
            left = rest;
        }
        Ok(())
    }

    /// Waits until something may be sent, and counts it as sent.
    fn wait_for_room(&self, wanted: usize) -> Result<usize, Ended> {
        let mut inner = self.trunk.lock();
        loop {
            if let Some(broken) = inner.broken {
                return Err(Ended::Broken(broken));
            }
            let state = of(&mut inner);
            if state.shut {
                return Err(Ended::Here);
            }
            if state.refused {
                return Err(Ended::There);
            }
            let count = state.may_send(wanted);
            if count > 0 {
                state.count(count);
                return Ok(count);
            }
            inner = self.trunk.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that all was sent; the other side may go on sending.
    pub fn finish_sending(&self) {
        let first = !std::mem::replace(&mut of(&mut self.trunk.lock()).finished, true);
        if first {
            let _ = self.send(&head(Kind::State, 0), &[]);
        }
    }

    /// Whoever waits here wakes up, and nothing is taken or sent any more. Waits for nothing, so that the other side
    /// hears of it by [`Channel::close`] only. Safe to repeat.
    pub fn shutdown(&self) {
        let mut inner = self.trunk.lock();
        let state = of(&mut inner);
        state.shut = true;
        state.came.clear();
        drop(inner);
        self.trunk.arrived.notify_all();
    }

    /// Both directions are over here: tells the other side, unless both came to their end.
    pub fn close(&self) {
        let is_over = {
            let mut inner = self.trunk.lock();
            let state = of(&mut inner);
            state.finished && state.whole
        };
        if !is_over {
            let _ = self.say_room(0);
        }
    }

    fn say_room(&self, bytes: usize) -> Result<(), Ended> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.trunk.send(Kind::Room, &room(bytes), &[], Instant::now() + REPLY_TIMEOUT).map_err(Ended::Broken)
    }

    fn send(&self, head: &[u8; FRAME_HEAD], bytes: &[u8]) -> Result<(), Ended> {
        self.trunk.send(Kind::State, head, bytes, Instant::now() + LANE_SILENCE_MAX).map_err(Ended::Broken)
    }
}

/// The state of a trunk on which a channel was opened.
fn of(inner: &mut Inner) -> &mut State {
    inner.state.get_or_insert_with(|| State::new(0))
}

#[cfg(test)]
#[path = "channel/tests.rs"]
mod tests;
