//! What a mirror compares and verifies: which regions are hashed next, and what their digests mean (D12, D14).
//!
//! The thread that asks the destination is in `migrate/verify.rs`; which regions may be looked at when is decided in
//! `dirty/checks.rs`. Here stand the pace of the passes, the table of what both sides agree on, and the end of a
//! migration whose copy is wrong.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Failure, Mirror};
use crate::digest::{Digest, Hasher, Table, Verified, place, question_regions};
use crate::dirty::{Claim, Found};
use crate::disk::Depths;
use crate::layers::TRIES;
use crate::limits::{ASSUMED_HASH_RATE, LANE_LOOK, VERIFY_PERIOD};

/// The checks of one mirror.
#[derive(Debug)]
pub(super) struct Checks {
    verified: Verified,
    /// What both sides agree on, when anything is verified.
    table: Option<Mutex<Table>>,
    pace: Mutex<Pace>,
    equal: AtomicU64,
    agreed: AtomicU64,
    /// Bytes a second.
    rate: AtomicU64,
    bell: Arc<Bell>,
}

/// The pace of the walks.
#[derive(Debug)]
struct Pace {
    comparing: bool,
    /// A verification pass is being walked.
    walking: bool,
    began: Instant,
    /// No pass begins before this.
    rest_until: Instant,
    /// Verification passes that have come to the end of the disk.
    walks: u64,
    /// Nobody verifies any more for now, and why.
    lost: Option<String>,
}

/// Wakes the thread that asks for digests when there may be something to ask for.
#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// Somebody wants it to look.
    pub fn ring(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    /// Waits until somebody rings, at most so long.
    pub fn wait(&self, time: Duration) {
        let mut rung = self.lock();
        if !*rung && !time.is_zero() {
            rung = self.changed.wait_timeout(rung, time).unwrap_or_else(PoisonError::into_inner).0;
        }
        *rung = false;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread that asks for digests does next for one disk.
#[derive(Debug)]
pub enum Ask {
    /// Hash this here, and have it hashed there.
    Hash(Claim),
    /// Nothing before so much time has passed.
    Rest(Duration),
    /// The comparison is over as soon as everything that was asked for is answered.
    Compared,
}

impl Checks {
    pub(super) fn new(verified: Verified, compare: bool, size: u64, bell: &Arc<Bell>) -> Self {
        let now = Instant::now();
        let pace = Pace { comparing: compare, walking: false, began: now, rest_until: now, walks: 0, lost: None };
        Self {
            verified,
            table: (verified != Verified::Nothing).then(|| Mutex::new(Table::new(size))),
            pace: Mutex::new(pace),
            equal: AtomicU64::new(0),
            agreed: AtomicU64::new(0),
            rate: AtomicU64::new(ASSUMED_HASH_RATE),
            bell: Arc::clone(bell),
        }
    }

    pub(super) fn equal(&self) -> u64 {
        self.equal.load(Ordering::Relaxed)
    }

    pub(super) fn agreed(&self) -> u64 {
        self.agreed.load(Ordering::Relaxed)
    }

    pub(super) fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    pub(super) fn walks(&self) -> u64 {
        self.pace().walks
    }

    pub(super) fn ring(&self) {
        if self.verified != Verified::Nothing {
            self.bell.ring();
        }
    }

    pub(super) fn lost(&self) -> Option<String> {
        self.pace().lost.clone()
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> Option<MutexGuard<'_, Table>> {
        Some(self.table.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Mirror {
    /// Whether it is still compared what the destination has already.
    #[must_use]
    pub fn is_comparing(&self) -> bool {
        self.checks.pace().comparing
    }

    /// The comparison is over: what was not found equal is copied.
    pub fn end_comparison(&self) {
        self.checks.pace().comparing = false;
        self.changed.notify_all();
    }

    /// Whether anything is verified.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.checks.verified != Verified::Nothing
    }

    /// What to hash next.
    #[must_use]
    pub fn ask_next(&self) -> Ask {
        let most = question_regions(self.size());
        let urgent = self.lock().urgent;
        let now = Instant::now();
        let mut pace = self.checks.pace();
        if pace.comparing {
            return match self.map.claim_to_compare(most) {
                Found::Claim(claim) => Ask::Hash(claim),
                Found::Later => Ask::Rest(Duration::ZERO),
                Found::End => Ask::Compared,
            };
        }
        if !self.verifies() {
            return Ask::Rest(VERIFY_PERIOD);
        }
        if !urgent && !pace.walking && now < pace.rest_until {
            return Ask::Rest(pace.rest_until - now);
        }
        match self.map.claim_to_verify(most) {
            Found::Claim(claim) => {
                if !pace.walking {
                    pace.walking = true;
                    pace.began = now;
                }
                Ask::Hash(claim)
            }
            Found::Later => Ask::Rest(Duration::ZERO),
            Found::End => {
                pace.walking = false;
                pace.walks += 1;
                pace.rest_until = (pace.began + VERIFY_PERIOD).max(now + LANE_LOOK);
                Ask::Rest(if urgent { LANE_LOOK } else { pace.rest_until - now })
            }
        }
    }

    /// The guest is about to be quiesced: a verification pass begins now, so that less is left for then.
    pub fn verify_soon(&self) {
        self.checks.pace().rest_until = Instant::now();
        self.checks.ring();
    }

    /// This side's digests of a claim. Returns the bytes that were read.
    ///
    /// # Errors
    /// The disk cannot be read: the migration has failed (D8).
    pub fn hash(&self, hasher: &mut Hasher, claim: &Claim, digests: &mut [Digest]) -> Result<u64, Failure> {
        hasher.regions(&self.disk, claim.first(), digests).map_err(|unread| {
            let (length, offset) = (unread.length, unread.offset);
            let cause = crate::error::reason(&unread.error);
            Failure { text: format!("read: disk {}, {length} bytes at {offset}: {cause}", self.name()) }
        })
    }

    /// Both sides' digests of a claim are known. A region that differs though nothing has touched it ends the migration
    /// (D14).
    pub fn compare(&self, claim: Claim, ours: &[Digest], theirs: &[Digest]) {
        let first = claim.first();
        let regions: Range<u64> = first..first + claim.count() as u64;
        let compares = claim.compares();
        // The last byte counts like the first, wherever they differ: no secret is guarded here.
        let same = |region: u64| {
            let at = usize::try_from(region - first).unwrap_or(usize::MAX);
            ours.get(at).is_some_and(|ours| theirs.get(at) == Some(ours))
        };
        if let Some(mut table) = self.checks.table() {
            // Before the claim is let go: whoever finds nothing left to verify finds all of it in the table.
            for (region, digest) in regions.zip(ours).filter(|(region, _)| same(*region)) {
                table.put(region, digest);
            }
        }
        // The word that the bases are the same is false, if this is still what the base has.
        let stray = self.base.get().filter(|_| compares).and_then(|base| {
            let sampled = (first..first + claim.count() as u64).filter(|region| base.samples(*region));
            let mut strange = sampled.filter(|region| !same(*region));
            strange.find_map(|region| match self.is_below_the_top(region) {
                Some(false) => None,
                told => Some((region, told.is_some())),
            })
        });
        // D2: a guest write is on the disk before it is marked, and what was read here may be in between. While the
        // claim is held no copy of it begins, so the mark is still there when that write is done.
        let differs = !compares && (first..first + claim.count() as u64).any(|region| !same(region));
        if differs && !self.export.drain_admitted() {
            return;
        }
        let settled = claim.settle(same);
        let counter = if compares { &self.checks.equal } else { &self.checks.agreed };
        counter.fetch_add(settled.equal, Ordering::Relaxed);
        if compares && self.verifies() {
            self.checks.agreed.fetch_add(settled.equal, Ordering::Relaxed);
        }
        if let Some(region) = settled.wrong {
            let (offset, length) = place(self.size(), region);
            let what = match self.base.get() {
                // Perhaps all of it is its base's, perhaps it was sent a part.
                Some(base) if base.takes(region) => "than here, and was taken as equal (--same-base)",
                _ => "than was sent",
            };
            let name = self.name();
            let text =
                format!("verify: disk {name}, {length} bytes at {offset}: the destination holds something else {what}");
            self.fail(Failure { text });
        }
        if let Some((region, told)) = stray {
            let (offset, length) = place(self.size(), region);
            let what = if told {
                "both sides have it from their bases, and the bases differ (--same-base)"
            } else {
                "it differs, and whether both sides have it from their bases is not told any more (--same-base)"
            };
            let text = format!("compare: disk {}, {length} bytes at {offset}: {what}", self.name());
            self.fail(Failure { text });
        }
        if self.lock().urgent {
            self.changed.notify_all();
        }
    }

    /// Whether this side's top layer holds nothing of a region; `None`: it is not told. Asked after it was hashed: what
    /// had come into the layer before that would be seen now.
    fn is_below_the_top(&self, region: u64) -> Option<bool> {
        let (offset, length) = place(self.size(), region);
        (0..TRIES).find_map(|_| {
            let mut below = true;
            let told = self.disk.depths(offset, offset + length, &mut |_, _, depth| below &= depth != 1);
            matches!(told, Ok(Depths::Told)).then_some(below)
        })
    }

    /// Bytes that were taken as equal on the user's word, and that nobody has hashed since.
    #[must_use]
    pub fn unread(&self) -> u64 {
        let table = self.checks.table();
        let known = |region| table.as_ref().is_some_and(|table| table.covers(region));
        self.base.get().map_or(0, |base| base.unknown(known))
    }

    /// The migration has failed.
    pub fn fail(&self, failure: Failure) {
        let mut state = self.lock();
        state.failure.get_or_insert(failure);
        state.stop = true;
        self.let_go(&mut state);
        drop(state);
        self.changed.notify_all();
        self.map.ring();
    }

    /// Nobody can ask the destination just now, for this reason; `None`: somebody can again.
    pub fn set_verifier_lost(&self, cause: Option<&str>) {
        self.checks.pace().lost = cause.map(str::to_owned);
        // Whoever looks at it does so under this lock, and then waits.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// How fast both sides hash, in bytes a second: one more measurement.
    pub fn measured(&self, bytes: u64, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = bytes.saturating_mul(1_000_000) / micros;
        // One thread measures.
        let smooth = (self.checks.rate() * 7 + rate * 3) / 10;
        self.checks.rate.store(smooth.max(1), Ordering::Relaxed);
    }

    /// The digest over everything that was verified, and how many bytes that is; `None`: nothing was to be.
    #[must_use]
    pub fn root(&self) -> Option<(Digest, u64)> {
        self.checks.table().map(|table| (table.root(), table.covered_bytes()))
    }
}

#[cfg(test)]
mod tests;
