//! Guest writes that are answered only when the mirror has them (D7): the home of that rule.
//!
//! While a map is *synchronous*, [`DirtyMap::mark_and_owe`] returns an [`Owed`] for a write that is on the disk and
//! marked. It may be answered when each of its granules was in a copy that *began after the mark* and is acknowledged.
//! The copies are the mirror's own: nobody else sends anything, so D4 needs no second thought. What somebody waits for
//! goes first ([`DirtyMap::take_waited`]).
//!
//! # Why not "until its granules are clean"
//!
//! A granule that the guest writes again and again is never clean when somebody looks: its writer would wait for as
//! long as others write. And a copy that was under way at the mark may have read the bytes before the write: that one's
//! acknowledgement says nothing. So the map has a clock that counts takes. A write notes it at its mark (`since`), each
//! region has its own number, and an acknowledgement counts for the writes whose `since` is below that number. A write
//! that comes later marks its granules again and waits for a later copy; it cannot take anything from an earlier one.
//!
//! A write that finds no place in the table, and each further piece of a long one, is registered after its mark: what
//! is neither dirty nor in flight then has been copied since (only the acknowledgement of a later copy makes a marked
//! granule clean), and what is in flight without being dirty is a later copy. What is both waits for one more copy than
//! it must, which is safe.
//!
//! # Who waits for whom
//!
//! A write that waits is done and marked, and is *not* in flight for a drain: a drain wants what is on the disk to be
//! in the map, and it is. Were it counted, a quiesce would stand or fall with the link, and a verification, which
//! drains before it believes a difference, would wait for a copy of the region that it keeps. The final pass copies all
//! that is dirty, so whoever waits at a quiesce is answered by it, or let go when the gates open again.
//!
//! All waiting ends with an acknowledgement or by being let go, granules dirty: [`DirtyMap::synchronous`] with `false`
//! (a lost connection, a failure, a stop: `mirror.rs` says so in the same breath in which it records them), a guest
//! that has hung up (`export.rs`), or [`SYNCHRONOUS_WAIT_MAX`] after the mark. If no copy at all was acknowledged in
//! that time, the map is *stalled*: all are let go at once, and nobody waits until something is acknowledged again. So
//! an outage that nobody has noticed yet costs each write that limit once, and not one limit after the other.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Bits, DirtyMap, Granules, Inner, Region, WORD, index};
use crate::limits::{SYNCHRONOUS_WAIT_MAX, WAITERS_MAX};

/// Who waits, and who waits for work.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    /// Guest writes wait for the mirror.
    on: bool,
    /// Nothing was acknowledged for too long: nobody waits until something is.
    stalled: bool,
    /// Writes with granules that no acknowledged copy since their mark has covered; whoever is not here is answered.
    table: heapless::Vec<Waiter, WAITERS_MAX>,
    /// Numbers given to waiters so far.
    numbers: u64,
    /// Threads that found no place in the table.
    outside: u32,
    /// Copies acknowledged so far.
    acknowledged: u64,
    /// Counts what a lane that rests wants to know.
    rung: u64,
    /// Lanes that rest.
    resting: u32,
}

/// One write. Of a long one only a window is looked at, as many granules as there are bits in a word.
#[derive(Debug)]
struct Waiter {
    number: u64,
    since: u64,
    /// Where the window begins, and its granules that have not been copied since the mark.
    first: u64,
    pending: u64,
    /// The end of the whole write.
    end: u64,
    /// A thread waits on the condition variable.
    awaited: bool,
}

impl Waiter {
    /// Moves the window on to the next granule from `from` on that may not have been copied; `false`: there is none.
    fn advance(&mut self, from: u64, bits: &Bits, taken: &[Granules]) -> bool {
        if from >= self.end {
            return false;
        }
        let rest = Granules { first: from, count: self.end - from };
        let dirty = bits.next_set(from).filter(|dirty| *dirty < self.end);
        let flying = taken.iter().filter(|run| run.overlaps(rest)).map(|run| run.first.max(from)).min();
        let Some(first) = dirty.into_iter().chain(flying).min() else { return false };
        let window = Granules { first, count: WORD.min(self.end - first) };
        self.first = first;
        self.pending = (bits.window(first) | in_flight(taken, first)) & mask(window, first);
        true
    }
}

/// The granules of `run` in the window that begins with `first`.
fn mask(run: Granules, first: u64) -> u64 {
    let low = run.first.saturating_sub(first);
    let high = run.end().saturating_sub(first).min(WORD);
    if low >= high { 0 } else { (u64::MAX << low) & (u64::MAX >> (WORD - high)) }
}

fn in_flight(taken: &[Granules], first: u64) -> u64 {
    taken.iter().fold(0, |bits, run| bits | mask(*run, first))
}

impl Bits {
    /// The bits from `first` on, as one word.
    fn window(&self, first: u64) -> u64 {
        let word = |at: u64| self.levels[0].get(index(at)).copied().unwrap_or(0);
        let shift = first % WORD;
        let low = word(first / WORD) >> shift;
        if shift == 0 { low } else { low | word(first / WORD + 1) << (WORD - shift) }
    }
}

impl Inner {
    /// Registers a write; `false`: there is nothing to wait for, or (`number` stays `None`) no place.
    fn register(&mut self, owed: &mut Entry) -> bool {
        let Self { bits, taken, waiters, .. } = self;
        let (since, end) = (owed.since, owed.run.end());
        let mut waiter =
            Waiter { number: waiters.numbers, since, first: owed.run.first, pending: 0, end, awaited: false };
        if !waiter.advance(owed.run.first, bits, taken) {
            return false;
        }
        if waiters.table.push(waiter).is_ok() {
            owed.number = Some(waiters.numbers);
            waiters.numbers += 1;
        }
        true
    }

    /// D7: a copy of `run` that began as number `number` is acknowledged and no longer in `taken`. Says whether
    /// somebody is to be woken.
    pub(super) fn copied(&mut self, run: Granules, number: u64) -> bool {
        let Self { bits, taken, waiters, .. } = self;
        waiters.acknowledged += 1;
        waiters.stalled = false;
        let mut wake = false;
        waiters.table.retain_mut(|waiter| {
            // What began before the mark may have read the bytes before the write.
            if number <= waiter.since {
                return true;
            }
            waiter.pending &= !mask(run, waiter.first);
            let waits = waiter.pending != 0 || waiter.advance(waiter.first + WORD, bits, taken);
            wake |= !waits && (waiter.awaited || waiters.outside > 0);
            waits
        });
        wake
    }
}

/// What a write is known by while it waits.
#[derive(Debug)]
struct Entry {
    run: Granules,
    since: u64,
    /// Its waiter's, if it has found a place.
    number: Option<u64>,
}

/// A guest write that is on the disk and marked, and is not to be answered yet (D7). Dropped, nobody waits any more.
#[derive(Debug)]
#[must_use = "the write is answered when Owed::wait says so"]
pub struct Owed {
    map: Arc<DirtyMap>,
    entry: Entry,
    /// Copies acknowledged when it was marked.
    acknowledged: u64,
    /// When it is let go in any case.
    until: Instant,
}

impl Owed {
    /// Waits for at most `time`; whether the write may be answered.
    #[must_use]
    pub fn wait(&mut self, time: Duration) -> bool {
        let now = Instant::now();
        let until = (now + time).min(self.until);
        let mut inner = self.map.lock();
        loop {
            let Inner { waiters, .. } = &mut *inner;
            if !waiters.on || waiters.stalled {
                return true;
            }
            if self.entry.number.is_none() && !inner.register(&mut self.entry) {
                return true;
            }
            let waiters = &mut inner.waiters;
            let outside = match self.entry.number {
                None => true,
                Some(number) => match waiters.table.iter_mut().find(|waiter| waiter.number == number) {
                    None => return true,
                    Some(waiter) => {
                        waiter.awaited = true;
                        false
                    }
                },
            };
            let now = Instant::now();
            if now >= self.until {
                // Something was acknowledged meanwhile: the link is slow, and only this one has waited long enough.
                waiters.stalled = waiters.acknowledged == self.acknowledged;
                if waiters.stalled {
                    waiters.table.clear();
                    self.map.answered.notify_all();
                }
                return true;
            }
            if now >= until {
                return false;
            }
            waiters.outside += u32::from(outside);
            let waited = self.map.answered.wait_timeout(inner, until - now);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
            inner.waiters.outside -= u32::from(outside);
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let Some(number) = self.entry.number else { return };
        let mut inner = self.map.lock();
        let waiters = &mut inner.waiters;
        if let Some(at) = waiters.table.iter().position(|waiter| waiter.number == number) {
            waiters.table.swap_remove(at);
            if waiters.outside > 0 {
                self.map.answered.notify_all();
            }
        }
    }
}

impl Region {
    /// Whether somebody waits for a copy of something in it: of this one, or of the one that can be made after it (D4).
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.map.lock().waiters.table.iter().any(|waiter| waiter.pending & mask(self.run, waiter.first) != 0)
    }
}

impl DirtyMap {
    /// [`DirtyMap::mark`] for a write that is to be answered with success: while the map is synchronous, what its
    /// answer waits for.
    #[must_use]
    pub fn mark_and_owe(self: &Arc<Self>, offset: u64, length: u64) -> Option<Owed> {
        let run = self.touched(offset, length)?;
        let mut inner = self.lock();
        inner.mark(run);
        if !inner.waiters.on || inner.waiters.stalled {
            return None;
        }
        let mut entry = Entry { run, since: inner.clock, number: None };
        // It has just been marked: there is something to wait for.
        let _ = inner.register(&mut entry);
        let waiters = &mut inner.waiters;
        waiters.rung += 1;
        if waiters.resting > 0 {
            self.work.notify_one();
        }
        let acknowledged = waiters.acknowledged;
        Some(Owed { map: Arc::clone(self), entry, acknowledged, until: Instant::now() + SYNCHRONOUS_WAIT_MAX })
    }

    /// From now on guest writes wait for their copies; or, with `false`, nobody does, and all who wait are let go.
    pub fn synchronous(&self, on: bool) {
        let mut inner = self.lock();
        let waiters = &mut inner.waiters;
        if waiters.on == on {
            return;
        }
        waiters.on = on;
        waiters.stalled = false;
        waiters.table.clear();
        self.answered.notify_all();
    }

    /// Whether guest writes wait for their copies.
    #[cfg(test)]
    pub(crate) fn is_synchronous(&self) -> bool {
        self.lock().waiters.on
    }

    /// Takes the granules that somebody has waited for the longest and of which no copy is under way, at most
    /// `max_bytes`, and clears them (D2). They do not belong to a pass. What is being verified is taken too: that makes
    /// it unverified again, as a guest's write has done before (D14).
    #[must_use]
    pub fn take_waited(self: &Arc<Self>, max_bytes: usize) -> Option<Region> {
        let mut inner = self.lock();
        if inner.waiters.table.is_empty() || inner.taken.is_full() {
            return None;
        }
        let Inner { bits, taken, waiters, .. } = &*inner;
        let mut found: Option<(u64, u64, u64)> = None;
        for waiter in &waiters.table {
            let dirty = waiter.pending & bits.window(waiter.first);
            if dirty == 0 || found.is_some_and(|(since, ..)| since <= waiter.since) {
                continue;
            }
            let free = dirty & !in_flight(taken, waiter.first);
            if free != 0 {
                found = Some((waiter.since, waiter.first + u64::from(free.trailing_zeros()), waiter.end));
            }
        }
        let (_, first, end) = found?;
        let most = (max_bytes as u64 / self.granularity).max(1);
        let mut end = bits.next_clear(first, end.min(first + most));
        for busy in taken.iter().filter(|busy| busy.first > first) {
            end = end.min(busy.first);
        }
        Some(self.hand_out(&mut inner, Granules { first, count: end - first }))
    }

    /// How often lanes have been rung for; see [`DirtyMap::rest`].
    #[must_use]
    pub fn rung(&self) -> u64 {
        self.lock().waiters.rung
    }

    /// Has whoever rests look again.
    pub fn ring(&self) {
        let mut inner = self.lock();
        inner.waiters.rung += 1;
        if inner.waiters.resting > 0 {
            self.work.notify_all();
        }
    }

    /// Rests for at most `time`, or until somebody rings, or waits for a copy, after [`DirtyMap::rung`] said `seen`.
    pub fn rest(&self, seen: u64, time: Duration) {
        let mut inner = self.lock();
        if inner.waiters.rung != seen {
            return;
        }
        inner.waiters.resting += 1;
        inner = self.work.wait_timeout(inner, time).unwrap_or_else(PoisonError::into_inner).0;
        inner.waiters.resting -= 1;
    }
}

#[cfg(test)]
mod tests;
