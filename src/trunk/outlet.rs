//! The source's end of the stream path for one disk: a mirror's lane sends blocks through it and hears how it went.
//!
//! Like a client of NBD, without a connection of its own. A request of any length leaves as blocks of at most
//! [`STREAM_BLOCK_MAX`] bytes; the caller hears once of each request, when its last block is done or one has failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::wire::{BLOCK_HEAD, Block, FRAME_HEAD, Kind, Verb, head};
use super::{Broken, Sent, Trunk};
use crate::limits::{LANE_SILENCE_MAX, STREAM_BLOCK_MAX};

/// One disk's way through a trunk.
#[derive(Debug)]
pub struct Outlet {
    trunk: Arc<Trunk>,
    disk: u8,
    /// Requests that are not answered.
    in_flight: usize,
}

impl Outlet {
    /// The way of the disk with this place in the offer; there is one of each at a time.
    #[must_use]
    pub fn new(trunk: &Arc<Trunk>, disk: u8) -> Self {
        Self { trunk: Arc::clone(trunk), disk, in_flight: 0 }
    }

    /// Requests that were sent and are not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether nothing comes or goes any more.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        self.trunk.lock().broken.is_some()
    }

    /// Sends a write. Waits until the destination has room for it.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn write(&mut self, cookie: u64, offset: u64, bytes: &[u8]) -> Result<(), Broken> {
        let mut at = offset;
        let blocks = bytes.chunks(STREAM_BLOCK_MAX);
        let last = blocks.len();
        self.in_flight += 1;
        for (block, number) in blocks.zip(1..) {
            self.send(Verb::Write, cookie, number == last, at, block.len(), block)?;
            at += block.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zero at the destination.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn write_zeroes(&mut self, cookie: u64, offset: u64, length: usize) -> Result<(), Broken> {
        self.in_flight += 1;
        self.send(Verb::Zero, cookie, true, offset, length, &[])
    }

    /// Makes durable there what was acknowledged.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn flush(&mut self, cookie: u64) -> Result<(), Broken> {
        self.in_flight += 1;
        self.send(Verb::Flush, cookie, true, 0, 0, &[])
    }

    fn send(
        &self,
        verb: Verb,
        cookie: u64,
        last: bool,
        offset_bytes: u64,
        length: usize,
        data: &[u8],
    ) -> Result<(), Broken> {
        let length_bytes = u32::try_from(length).unwrap_or(u32::MAX);
        let deadline = Instant::now() + LANE_SILENCE_MAX;
        let number = self.enter(cookie, last, BLOCK_HEAD + data.len(), deadline)?;
        let block = Block { verb, disk: self.disk, number, offset_bytes, length_bytes };
        let mut front = [0; FRAME_HEAD + BLOCK_HEAD];
        front[..FRAME_HEAD].copy_from_slice(&head(Kind::Blocks, BLOCK_HEAD + data.len()));
        front[FRAME_HEAD..].copy_from_slice(&block.encode());
        self.trunk.send(Kind::Blocks, &front, data, deadline)
    }

    /// Waits for room, and counts a block in. Its number.
    fn enter(&self, cookie: u64, last: bool, bytes: usize, deadline: Instant) -> Result<u32, Broken> {
        let mut inner = self.trunk.lock();
        loop {
            if let Some(broken) = inner.broken {
                return Err(broken);
            }
            if inner.closed {
                return Err(Broken::Closed);
            }
            if inner.has_room(bytes) {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Broken::Late);
            }
            inner = self.trunk.wait(inner, left);
        }
        inner.in_flight.0 += 1;
        inner.in_flight.1 += bytes;
        // There are as many as disks.
        let lane = inner.lanes.get_mut(usize::from(self.disk)).ok_or(Broken::Closed)?;
        let number = lane.number;
        lane.number = number.wrapping_add(1);
        lane.sent.push_back(Sent { number, cookie, last, bytes, at: Instant::now() });
        Ok(number)
    }

    /// Waits at most `timeout` until requests are answered, and says of each its name and 0 or an error number.
    /// Returns how many; 0 also when none is in flight.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn wait(&mut self, timeout: Duration, each: &mut dyn FnMut(u64, u32)) -> Result<usize, Broken> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.trunk.lock();
        let mut answered = 0;
        loop {
            let lane = inner.lanes.get_mut(usize::from(self.disk)).ok_or(Broken::Closed)?;
            while let Some((cookie, error)) = lane.done.pop_front() {
                answered += 1;
                each(cookie, error);
            }
            if answered > 0 || self.in_flight == 0 {
                self.in_flight = self.in_flight.saturating_sub(answered);
                return Ok(answered);
            }
            if let Some(broken) = inner.broken {
                return Err(broken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || inner.closed {
                return Ok(0);
            }
            inner = self.trunk.wait(inner, left);
        }
    }
}
