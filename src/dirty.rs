//! The dirty map of one disk: which granules the destination does not have yet.
//!
//! # On dirty granules and the order of things
//!
//! A guest writes all the time while its disk is copied. The naive way is to note each write and copy the noted places
//! later. Nearly every way of doing that loses a write now and then; these are the rules that do not, and each has its
//! place here or in the file it names.
//!
//! **Mark after the write, take before the read (D2).** The guest side writes the disk, *then* marks, then replies. The
//! mirror side clears the mark, *then* reads the disk, then sends. Suppose the guest marked first: the mirror could
//! clear the mark and read the old bytes before the write reaches the disk, and nobody would ever come back for the new
//! ones. Suppose the mirror cleared after reading: a write between the two would be wiped off the map unread. With the
//! order kept, whatever the mirror may have missed is marked after it looked. The mark is made whatever became of the
//! write: a failed one may have changed half of the disk. `export.rs` makes it in a `Drop`.
//!
//! **A region is taken or dirty, never neither (D3).** [`DirtyMap::take`] hands out a [`Region`]. Only
//! [`Region::acknowledge`] removes it from the account; dropped in any other way, an early return or a dead thread
//! included, its granules are dirty again.
//!
//! **Never two copies of one granule (D4).** If a granule is marked again while a copy of it is on its way, a second
//! copy could overtake the first, on another connection or in another thread of the destination, and the older bytes
//! would win. So `take` passes over granules that are in flight; they stay dirty and are handed out when the first
//! copy is settled. A copy whose connection broke is *not* settled: the destination may still have it in a buffer. Its
//! `Region` is kept until the destination has said that everything of that connection is over (`mirror.rs`).
//!
//! **One number says how much is left (D5).** A granule moves from dirty to taken and perhaps back; whoever reads
//! "dirty" and then "taken" can miss it on its way from one to the other, in either order. [`DirtyMap::outstanding`]
//! is read under the one lock under which granules move. All of the map lives under that lock: it is held for a few
//! dozen nanoseconds, and a guest write needs it once.
//!
//! **What is copied is verified (D14).** Beside the dirty granules stand the *unverified* regions (`dirty/checks.rs`),
//! under the same lock: [`DirtyMap::mark`] and [`DirtyMap::take`] make them.
//!
//! **Who waits for a copy (D7).** In synchronous mode a guest write is answered after its copy: `dirty/waiters.rs`.
//!
//! The map is two kinds of bits: the lowest level has one for each granule, each higher level has one for each word of
//! the level below that is not zero. Looking for dirty work touches one word a level however large the disk is.

mod checks;
mod waiters;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use checks::Checks;
pub use checks::{Claim, Found, Settled, Unsettled};
pub use waiters::Owed;
use waiters::Waiters;

use crate::limits::{DIRTY_MAP_MAX, GRANULARITY_MIN, REGIONS_IN_FLIGHT_MAX};

/// Which granules of one disk are dirty, and which are taken.
#[derive(Debug)]
pub struct DirtyMap {
    size: u64,
    granularity: u64,
    inner: Mutex<Inner>,
    /// Somebody who waits for a copy of its write may be answered (D7).
    answered: Condvar,
    /// There is something for a lane that rests.
    work: Condvar,
}

#[derive(Debug)]
struct Inner {
    bits: Bits,
    /// Granules of which a copy is under way, by region.
    taken: heapless::Vec<Granules, REGIONS_IN_FLIGHT_MAX>,
    taken_granules: u64,
    /// The granule at which the walk of the current pass stands.
    cursor: u64,
    /// Granules that became dirty by a guest write, ever.
    marked: u64,
    /// Regions ever taken, those for a comparison included.
    clock: u64,
    checks: Checks,
    waiters: Waiters,
}

/// A run of granules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Granules {
    first: u64,
    count: u64,
}

impl Granules {
    fn end(self) -> u64 {
        self.first + self.count
    }

    fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// How much of a disk the destination does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outstanding {
    /// Granules dirty, plus granules taken and not acknowledged; one that is both counts twice.
    pub granules: u64,
    /// The same in bytes.
    pub bytes: u64,
}

impl DirtyMap {
    /// A clean map for a disk of `size` bytes. The granularity is the finest power of two from 4 KiB on that keeps the
    /// lowest level within 1 MiB: 4 KiB up to 32 GiB, 128 KiB for 1 TiB.
    #[must_use]
    pub fn new(size: u64) -> Arc<Self> {
        let granularity = Self::granularity_for(size);
        let inner = Inner {
            bits: Bits::new(size.div_ceil(granularity)),
            taken: heapless::Vec::new(),
            taken_granules: 0,
            cursor: 0,
            marked: 0,
            clock: 0,
            checks: Checks::new(size, granularity),
            waiters: Waiters::default(),
        };
        let (answered, work) = (Condvar::new(), Condvar::new());
        Arc::new(Self { size, granularity, inner: Mutex::new(inner), answered, work })
    }

    /// The bytes that one bit of a disk of `size` bytes stands for.
    #[must_use]
    pub fn granularity_for(size: u64) -> u64 {
        let mut granularity = GRANULARITY_MIN;
        while size.div_ceil(granularity).div_ceil(8) > DIRTY_MAP_MAX as u64 {
            granularity *= 2;
        }
        granularity
    }

    /// The bytes that one bit stands for.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// A guest write to `length` bytes at `offset` is on the disk, or may be: every granule it touches is dirty.
    pub fn mark(&self, offset: u64, length: u64) {
        if let Some(run) = self.touched(offset, length) {
            self.lock().mark(run);
        }
    }

    /// The destination lacks `length` bytes at `offset`, for another reason than a guest write: the bulk pass begins
    /// with what the disk holds.
    pub fn mark_for_bulk(&self, offset: u64, length: u64) {
        let Some(run) = self.touched(offset, length) else { return };
        self.lock().bits.set(run);
    }

    /// Takes the next dirty region of the current pass, at most `max_bytes` long, and clears it (D2). `None` ends the
    /// pass: no dirty granule follows that is not in flight already; the next call begins another pass at the start of
    /// the disk. Also `None` while as many regions are in flight as the map can hold.
    #[must_use]
    pub fn take(self: &Arc<Self>, max_bytes: usize) -> Option<Region> {
        let max_granules = (max_bytes as u64 / self.granularity).max(1);
        let mut inner = self.lock();
        if inner.taken.is_full() {
            return None;
        }
        let mut from = inner.cursor;
        let run = loop {
            let Some(first) = inner.bits.next_set(from) else {
                inner.cursor = 0;
                return None;
            };
            // D4: what is in flight is not handed out again; nor what is being verified, which would be for nothing.
            if let Some(busy) = inner.held().find(|t| (t.first..t.end()).contains(&first)) {
                from = busy.end();
                continue;
            }
            let mut end = inner.bits.next_clear(first, first + max_granules);
            for busy in inner.held() {
                if busy.first > first {
                    end = end.min(busy.first);
                }
            }
            break Granules { first, count: end - first };
        };
        inner.cursor = run.end();
        Some(self.hand_out(&mut inner, run))
    }

    /// Clears `run`, which is dirty and of which no copy is under way, and hands it out (D2, D4).
    fn hand_out(self: &Arc<Self>, inner: &mut Inner, run: Granules) -> Region {
        inner.bits.clear(run);
        inner.checks.mark(run);
        inner.taken_granules += run.count;
        inner.clock += 1;
        // There is room: who calls this has looked, under the same lock.
        let _ = inner.taken.push(run);
        Region { map: Arc::clone(self), run, number: inner.clock, acknowledged: false }
    }

    /// What the destination does not have yet: one number, read at one moment (D5).
    #[must_use]
    pub fn outstanding(&self) -> Outstanding {
        let inner = self.lock();
        let granules = inner.bits.count + inner.taken_granules;
        Outstanding { granules, bytes: granules * self.granularity }
    }

    /// Bytes in granules that guest writes have made dirty since the map was made; grows only. A granule written again
    /// while dirty counts once.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.lock().marked * self.granularity
    }

    /// The granules that a byte range touches, cut at the end of the disk.
    fn touched(&self, offset: u64, length: u64) -> Option<Granules> {
        let end = offset.saturating_add(length).min(self.size);
        if length == 0 || offset >= end {
            return None;
        }
        let first = offset / self.granularity;
        Some(Granules { first, count: end.div_ceil(self.granularity) - first })
    }

    fn settle(&self, run: Granules, number: u64, acknowledged: bool) {
        let mut inner = self.lock();
        if let Some(at) = inner.taken.iter().position(|t| *t == run) {
            inner.taken.swap_remove(at);
            inner.taken_granules -= run.count;
        }
        if !acknowledged {
            inner.bits.set(run);
        } else if inner.copied(run, number) {
            self.answered.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// A guest write: D2's mark, and D14's.
    fn mark(&mut self, run: Granules) {
        let before = self.bits.count;
        self.bits.set(run);
        self.marked += self.bits.count - before;
        self.checks.mark(run);
    }

    /// What nobody else may have: copies under way, and what is being verified.
    fn held(&self) -> impl Iterator<Item = &Granules> {
        self.taken.iter().chain(self.checks.claims())
    }
}

/// Dirty granules handed out together; the map says that they are in flight until this is settled.
///
/// [`Region::acknowledge`] settles it for good. Dropping it gives it back: its granules are dirty again (D3).
#[derive(Debug)]
#[must_use = "a region that is dropped is dirty again"]
pub struct Region {
    map: Arc<DirtyMap>,
    run: Granules,
    /// The map's clock when it was taken.
    number: u64,
    acknowledged: bool,
}

impl Region {
    /// Where it begins, in bytes from the start of the disk.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.run.first * self.map.granularity
    }

    /// How many bytes it has; the last granule of a disk may be short.
    #[must_use]
    pub fn length(&self) -> usize {
        let end = (self.run.end() * self.map.granularity).min(self.map.size);
        usize::try_from(end - self.offset()).unwrap_or(usize::MAX)
    }

    /// The destination has it. Granules that were written meanwhile are dirty and stay so.
    pub fn acknowledge(mut self) {
        self.acknowledged = true;
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.map.settle(self.run, self.number, self.acknowledged);
    }
}

/// A bit for each granule, with summary levels above.
#[derive(Debug)]
struct Bits {
    /// `levels[0]` has the granules' bits; bit `i` of `levels[n + 1]` says that word `i` of `levels[n]` is not zero.
    levels: Vec<Vec<u64>>,
    granules: u64,
    count: u64,
}

const WORD: u64 = 64;

/// A word's index as the vectors want it. A map has at most 8 Mi granules, so this never saturates.
fn index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(usize::MAX)
}

impl Bits {
    fn new(granules: u64) -> Self {
        let mut levels = Vec::new();
        let mut bits = granules.max(1);
        loop {
            let words = bits.div_ceil(WORD);
            levels.push(vec![0; index(words)]);
            if words == 1 {
                break;
            }
            bits = words;
        }
        Self { levels, granules, count: 0 }
    }

    /// The bits of word `word` that belong to `run`.
    fn mask(run: Granules, word: u64) -> u64 {
        let low = run.first.saturating_sub(word * WORD);
        let high = (run.end() - word * WORD).min(WORD);
        (u64::MAX << low) & (u64::MAX >> (WORD - high))
    }

    fn set(&mut self, run: Granules) {
        for word in run.first / WORD..run.end().div_ceil(WORD) {
            let mask = Self::mask(run, word);
            let slot = &mut self.levels[0][index(word)];
            self.count += u64::from((mask & !*slot).count_ones());
            let was_zero = *slot == 0;
            *slot |= mask;
            if was_zero {
                self.summarise_set(word);
            }
        }
    }

    fn summarise_set(&mut self, mut word: u64) {
        for level in &mut self.levels[1..] {
            let slot = &mut level[index(word / WORD)];
            let was_zero = *slot == 0;
            *slot |= 1 << (word % WORD);
            if !was_zero {
                break;
            }
            word /= WORD;
        }
    }

    fn clear(&mut self, run: Granules) {
        for word in run.first / WORD..run.end().div_ceil(WORD) {
            let mask = Self::mask(run, word);
            let slot = &mut self.levels[0][index(word)];
            self.count -= u64::from((mask & *slot).count_ones());
            let had = *slot != 0;
            *slot &= !mask;
            if had && *slot == 0 {
                self.summarise_clear(word);
            }
        }
    }

    fn summarise_clear(&mut self, mut word: u64) {
        for level in &mut self.levels[1..] {
            let slot = &mut level[index(word / WORD)];
            *slot &= !(1 << (word % WORD));
            if *slot != 0 {
                break;
            }
            word /= WORD;
        }
    }

    /// The first set bit at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.granules {
            return None;
        }
        // Up: the first level at which something is set at or after the place we stand at.
        let mut at = from;
        let mut height = 0;
        let mut found = loop {
            let level = self.levels.get(height)?;
            let word = at / WORD;
            if let Some(bits) = level.get(index(word)) {
                let rest = bits & (u64::MAX << (at % WORD));
                if rest != 0 {
                    break word * WORD + u64::from(rest.trailing_zeros());
                }
            }
            at = word + 1;
            height += 1;
        };
        // Down again: the first set bit of each word.
        while height > 0 {
            height -= 1;
            found = found * WORD + u64::from(self.levels[height][index(found)].trailing_zeros());
        }
        Some(found)
    }

    /// The first clear bit after `from`, or `end` (or the end of the disk) if there is none before.
    fn next_clear(&self, from: u64, end: u64) -> u64 {
        let end = end.min(self.granules);
        let mut at = from;
        while at < end {
            let clear = !self.levels[0][index(at / WORD)] & (u64::MAX << (at % WORD));
            if clear != 0 {
                return end.min(at / WORD * WORD + u64::from(clear.trailing_zeros()));
            }
            at = (at / WORD + 1) * WORD;
        }
        end
    }
}

#[cfg(test)]
mod tests;
