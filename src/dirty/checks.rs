//! The regions of a disk that must be hashed on both sides, and those that are being hashed (D12, D14).
//!
//! Two kinds of [`Claim`] are handed out, a run of regions each. One to *compare* is a copy by other means: its
//! granules are dirty, are cleared (D2) and are in flight like those of a [`super::Region`] (D4); regions found equal
//! are acknowledged, all others are dirty again. One to *verify* is no copy: it is handed out only where nothing is
//! dirty or in flight, and while it is held no copy is begun there. [`Outstanding`] counts the first kind and never the
//! second (D5): a verification that comes to nothing leaves the destination as complete as it was.
//!
//! # Why a mismatch can be believed
//!
//! A region is unverified from the moment at which a copy of it is taken, or the guest writes to it. Claiming clears
//! that, before either side reads. Whatever makes the two sides differ later, a guest write here or a copy there, marks
//! again what it touches; so a region whose mark is still clear when both digests are known was the same on both sides
//! all the time, or something else has changed it. A guest write is on the disk a moment before its mark (D2): whoever
//! finds a difference waits for the writes under way before it settles the claim (`mirror/checks.rs`). If a claim were
//! handed out while a copy is in flight, the copy's mark would be cleared with its data still on the way, and a
//! difference would be believed that is none.

use std::sync::Arc;

use super::{Bits, DirtyMap, Granules, Inner, Outstanding};
use crate::digest::{place, region_bytes};
use crate::limits::{CLAIM_STEPS, CLAIMS_MAX};

/// What is not verified, and what is being looked at.
#[derive(Debug)]
pub(super) struct Checks {
    /// Granules of one region.
    per_region: u64,
    regions: u64,
    /// One bit for each region; `None`: nothing is verified.
    unverified: Option<Bits>,
    /// Granules held while they are verified.
    claims: heapless::Vec<Granules, CLAIMS_MAX>,
    /// Where the walk of the present verification pass stands, and where the comparison does.
    cursor: u64,
    compared: u64,
}

/// What a look for something to hash has come to.
#[derive(Debug)]
pub enum Found {
    /// This.
    Claim(Claim),
    /// Nothing just now, but the walk is not over: ask again.
    Later,
    /// Nothing more: the next call begins another walk, where there is another.
    End,
}

/// What is left before a disk may be handed over, read at one moment (D5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// What the destination does not have.
    pub outstanding: Outstanding,
    /// Bytes of regions that are unverified or being verified.
    pub unverified: u64,
}

/// What became of a claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    /// Bytes found equal.
    pub equal: u64,
    /// The first region that differs though nothing has touched it: the copy is wrong.
    pub wrong: Option<u64>,
}

impl Checks {
    pub(super) fn new(size: u64, granularity: u64) -> Self {
        Self {
            per_region: region_bytes(size) / granularity,
            regions: size.div_ceil(region_bytes(size)),
            unverified: None,
            claims: heapless::Vec::new(),
            cursor: 0,
            compared: 0,
        }
    }

    /// D14: a guest has written here, or a copy of it has been taken.
    pub(super) fn mark(&mut self, run: Granules) {
        let touched = self.touched(run);
        if let Some(unverified) = &mut self.unverified {
            unverified.set(touched);
        }
    }

    pub(super) fn claims(&self) -> impl Iterator<Item = &Granules> {
        self.claims.iter()
    }

    /// The regions that granules are in, as a run of regions.
    fn touched(&self, run: Granules) -> Granules {
        let first = run.first / self.per_region;
        Granules { first, count: run.end().div_ceil(self.per_region) - first }
    }

    /// The granules of regions; the last region may be short.
    fn granules(&self, first: u64, end: u64, all: u64) -> Granules {
        let first = first * self.per_region;
        Granules { first, count: (end * self.per_region).min(all) - first }
    }
}

impl Inner {
    /// Up to which region a run that begins with `first` may go, as far as what is held allows; `Err`: not even this
    /// one is free, and the region after what holds it.
    fn free_until(&self, first: u64, end: u64) -> Result<u64, u64> {
        let per_region = self.checks.per_region;
        let one = self.checks.granules(first, first + 1, self.bits.granules);
        let mut end = end;
        for busy in self.held() {
            if busy.overlaps(one) {
                return Err((busy.end().div_ceil(per_region)).max(first + 1));
            }
            if busy.first >= one.end() {
                end = end.min(busy.first / per_region);
            }
        }
        Ok(end)
    }

    fn find_unverified(&mut self, most: u64) -> Result<Option<Granules>, Found> {
        if self.checks.claims.is_full() {
            return Err(Found::Later);
        }
        let Some(unverified) = &self.checks.unverified else { return Ok(None) };
        let mut at = self.checks.cursor;
        for _ in 0..CLAIM_STEPS {
            let Some(first) = unverified.next_set(at) else {
                self.checks.cursor = 0;
                return Ok(None);
            };
            let mut end = unverified.next_clear(first, first + most.max(1));
            match self.free_until(first, end) {
                Ok(free) => end = free,
                Err(next) => {
                    at = next;
                    continue;
                }
            }
            // D14: what is dirty has a copy to come, and is verified after it.
            if let Some(dirty) = self.bits.next_set(first * self.checks.per_region) {
                end = end.min(dirty / self.checks.per_region);
            }
            if end <= first {
                at = first + 1;
                continue;
            }
            self.checks.cursor = end;
            return Ok(Some(Granules { first, count: end - first }));
        }
        self.checks.cursor = at;
        Err(Found::Later)
    }

    fn find_uncompared(&mut self, most: u64) -> Result<Option<Granules>, Found> {
        if self.taken.is_full() {
            return Err(Found::Later);
        }
        let mut at = self.checks.compared;
        for _ in 0..CLAIM_STEPS {
            let dirty = self.bits.next_set(at * self.checks.per_region);
            let Some(dirty) = dirty.filter(|_| at < self.checks.regions) else {
                self.checks.compared = self.checks.regions;
                return Ok(None);
            };
            let first = dirty / self.checks.per_region;
            // What is clean is known to be equal, and not looked at.
            let per_region = self.checks.per_region;
            let is_clean = |region: &u64| {
                let dirty = self.bits.next_set(region * per_region);
                dirty.is_none_or(|dirty| dirty >= (region + 1) * per_region)
            };
            let end = (first + most.max(1)).min(self.checks.regions);
            let end = (first + 1..end).find(is_clean).unwrap_or(end);
            match self.free_until(first, end) {
                Ok(end) => {
                    self.checks.compared = end;
                    return Ok(Some(Granules { first, count: end - first }));
                }
                // Somebody copies it: there is nothing to be saved.
                Err(next) => at = next,
            }
        }
        self.checks.compared = at;
        Err(Found::Later)
    }
}

impl DirtyMap {
    /// From now on whatever is copied or written is unverified; with `full` everything is. Before the first region is
    /// taken.
    pub fn verify(&self, full: bool) {
        let mut inner = self.lock();
        let regions = inner.checks.regions;
        let mut unverified = Bits::new(regions);
        if full {
            unverified.set(Granules { first: 0, count: regions });
        }
        inner.checks.unverified = Some(unverified);
    }

    /// Claims the next unverified regions of the present verification pass, at most `most`, of which nothing is dirty
    /// or in flight, and clears their marks (D14).
    #[must_use]
    pub fn claim_to_verify(self: &Arc<Self>, most: u64) -> Found {
        let mut inner = self.lock();
        let regions = match inner.find_unverified(most) {
            Ok(Some(regions)) => regions,
            Ok(None) => return Found::End,
            Err(found) => return found,
        };
        let run = inner.checks.granules(regions.first, regions.end(), inner.bits.granules);
        if let Some(unverified) = &mut inner.checks.unverified {
            unverified.clear(regions);
        }
        // There is room: checked under the same lock.
        let _ = inner.checks.claims.push(run);
        Found::Claim(Claim { map: Arc::clone(self), regions, run, number: 0, compare: false, settled: false })
    }

    /// Takes the next dirty regions of the one walk that compares, at most `most`, of which nothing is in flight, and
    /// clears them (D2). What is dirty behind the walk is copied.
    #[must_use]
    pub fn claim_to_compare(self: &Arc<Self>, most: u64) -> Found {
        let mut inner = self.lock();
        let regions = match inner.find_uncompared(most) {
            Ok(Some(regions)) => regions,
            Ok(None) => return Found::End,
            Err(found) => return found,
        };
        let run = inner.checks.granules(regions.first, regions.end(), inner.bits.granules);
        inner.bits.clear(run);
        if let Some(unverified) = &mut inner.checks.unverified {
            unverified.clear(regions);
        }
        inner.taken_granules += run.count;
        inner.clock += 1;
        let number = inner.clock;
        let _ = inner.taken.push(run);
        Found::Claim(Claim { map: Arc::clone(self), regions, run, number, compare: true, settled: false })
    }

    /// What is left, of both kinds.
    #[must_use]
    pub fn unsettled(&self) -> Unsettled {
        let inner = self.lock();
        let granules = inner.bits.count + inner.taken_granules;
        let claimed: u64 = inner.checks.claims.iter().map(|run| run.count).sum();
        let marked = inner.checks.unverified.as_ref().map_or(0, |unverified| unverified.count);
        Unsettled {
            outstanding: Outstanding { granules, bytes: granules * self.granularity },
            unverified: (marked * inner.checks.per_region + claimed) * self.granularity,
        }
    }

    fn settle_claim(&self, claim: &Claim, equal: impl Fn(u64) -> bool) -> Settled {
        let mut inner = self.lock();
        let mut settled = Settled::default();
        for region in claim.regions.first..claim.regions.end() {
            let one = Granules { first: region, count: 1 };
            let granules = inner.checks.granules(region, region + 1, inner.bits.granules);
            if equal(region) {
                settled.equal += place(self.size, region).1;
            } else if claim.compare {
                inner.bits.set(granules);
            } else {
                let dirty = inner.bits.next_set(granules.first).is_some_and(|dirty| dirty < granules.end());
                let Some(unverified) = &mut inner.checks.unverified else { continue };
                let marked = unverified.next_set(region) == Some(region);
                if !dirty && !marked && settled.wrong.is_none() {
                    settled.wrong = Some(region);
                }
                unverified.set(one);
            }
        }
        inner.let_go(claim);
        if claim.compare {
            // D7: what is equal is as good as copied.
            for region in (claim.regions.first..claim.regions.end()).filter(|region| equal(*region)) {
                let granules = inner.checks.granules(region, region + 1, inner.bits.granules);
                if inner.copied(granules, claim.number) {
                    self.answered.notify_all();
                }
            }
        }
        settled
    }

    fn drop_claim(&self, claim: &Claim) {
        let mut inner = self.lock();
        if claim.compare {
            inner.bits.set(claim.run);
        } else {
            inner.checks.mark(claim.run);
        }
        inner.let_go(claim);
    }
}

impl Inner {
    fn let_go(&mut self, claim: &Claim) {
        if claim.compare {
            if let Some(at) = self.taken.iter().position(|run| *run == claim.run) {
                self.taken.swap_remove(at);
                self.taken_granules -= claim.run.count;
            }
        } else if let Some(at) = self.checks.claims.iter().position(|run| *run == claim.run) {
            self.checks.claims.swap_remove(at);
        }
    }
}

/// Regions that are hashed on both sides. Dropped, they are what they were before: to be verified, or dirty (D3).
#[derive(Debug)]
#[must_use = "a claim that is dropped has to be made again"]
pub struct Claim {
    map: Arc<DirtyMap>,
    regions: Granules,
    run: Granules,
    /// The map's clock when it was claimed to be compared.
    number: u64,
    compare: bool,
    settled: bool,
}

impl Claim {
    /// The number of the first region.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.regions.first
    }

    /// How many regions.
    #[must_use]
    pub fn count(&self) -> usize {
        usize::try_from(self.regions.count).unwrap_or(usize::MAX)
    }

    /// Whether what is found equal need not be copied.
    #[must_use]
    pub fn compares(&self) -> bool {
        self.compare
    }

    /// Both sides' digests are known; `equal` says of each region, by its number, whether they are the same.
    pub fn settle(mut self, equal: impl Fn(u64) -> bool) -> Settled {
        self.settled = true;
        self.map.settle_claim(&self, equal)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.settled {
            self.map.drop_claim(self);
        }
    }
}

#[cfg(test)]
mod tests;
