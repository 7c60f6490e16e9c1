//! The mirror of one disk: takes dirty regions, reads them, and sends them to the destination until nothing is left.
//!
//! A [`Mirror`] has one dirty map and any number of *lanes*, one for each NBD connection to the destination; each lane
//! is a thread in [`Mirror::run_lane`] that takes, reads, sends and collects acknowledgements, with many requests in
//! flight. The rules about what may be taken and given back live in `dirty.rs`; the order clear, read, send (D2) can be
//! seen in `send_region` in `mirror/lane.rs`. Whoever drives a migration (`migrate/drive.rs`) asks for counts, for a
//! flush, and at the end, with the guest quiesced, for the final pass; no data byte passes through there.
//!
//! # Passes
//!
//! The *bulk pass* begins with the disk's extents ([`Mirror::scan`]), each later *pass* with what the guest has written
//! since. All are the same loop: a walk over the dirty map. Holes of the first walk are left out where the target is
//! known to read as zero; that knowledge is used before the first byte is sent and never after (D10). From then on a
//! zero travels as WRITE_ZEROES. Passes are spaced a little, so that a granule that the guest writes again and again
//! travels once for each pass; under quiesce they are not.
//!
//! # When a connection is lost
//!
//! What was in flight on it may still be in a buffer of the destination and be written at any later moment. Its regions
//! therefore stay taken, in [`Mirror::lost`], and nobody copies them again, until the destination has fenced that set
//! of connections (D4); then the driver gives them back and they are dirty again.
//!
//! An error *reply* is something else: the destination's disk has failed, or ours. It ends the migration (D8).

mod budget;
mod checks;
mod lane;
#[cfg(test)]
mod model;
pub(crate) mod runs;
mod sink;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub use budget::Budget;
use checks::Checks;
pub use checks::{Ask, Bell};
use lane::{Flight, Haste, Lane, LaneEnd, Load, Orders};
pub use sink::Sink;

use crate::digest::Verified;
use crate::dirty::{DirtyMap, Outstanding};
use crate::disk::Disk;
use crate::export::{Export, Quiesced};
use crate::layers::{Base, Layers};
use crate::limits::{
    LANE_LOOK, PASS_PERIOD, PAYLOAD_MAX, REGION_MAX, SYNCHRONOUS_LOOK, SYNCHRONOUS_REGION_MAX, SYNCHRONOUS_TURNS,
    SYNCHRONOUS_WINDOW,
};

/// The mirror of one disk.
#[derive(Debug)]
pub struct Mirror {
    export: Arc<Export>,
    disk: Arc<Disk>,
    map: Arc<DirtyMap>,
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Orders have changed, or something that somebody waits for has happened.
    changed: Condvar,
    sent: AtomicU64,
    zeroed: AtomicU64,
    acknowledged: AtomicU64,
    resent: Arc<AtomicU64>,
    checks: Checks,
    /// What is taken as equal on the user's word.
    base: OnceLock<Base>,
    /// Lanes that end wait for what they have sent.
    lands: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Copy on without pause: the guest is quiesced.
    urgent: bool,
    /// Guest writes wait for their copies (D7).
    synchronous: bool,
    /// Every lane ends at its next look.
    stop: bool,
    lanes: usize,
    passes: u32,
    pass_began: Instant,
    /// No pass begins before this.
    rest_until: Instant,
    /// A pass is being walked.
    walking: bool,
    flush: Flush,
    lost: Vec<Lost>,
    /// A lane ended because its connection did, since the driver last asked.
    lost_lanes: Option<String>,
    failure: Option<Failure>,
}

impl State {
    /// How long a lane listens until it looks again. D7: who begins to wait while it listens is not seen before.
    fn look(&self) -> Duration {
        if self.synchronous { SYNCHRONOUS_LOOK } else { LANE_LOOK }
    }
}

/// The one flush that may be wanted at a time, by number.
#[derive(Debug, Default)]
struct Flush {
    wanted: u64,
    sent: u64,
    done: u64,
    took: Duration,
}

/// What ends a migration: an error reply or a disk that cannot be read (D8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One line: the operation, the region, and the cause.
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why the final pass did not come to its end.
#[derive(Debug)]
pub enum NotReady {
    /// A connection was lost: fence, and try again.
    Lost(String),
    /// The time for it is up.
    TooSlow,
    /// The destination has everything, and not all of it is verified.
    Unverified(String),
    /// The migration has failed.
    Failed(Failure),
}

/// What a mirror has done so far.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// What the destination does not have yet.
    pub outstanding: Outstanding,
    /// Bytes of data sent.
    pub sent: u64,
    /// Bytes sent as write-zeroes.
    pub zeroed: u64,
    /// Bytes of regions acknowledged, data and zeroes.
    pub acknowledged: u64,
    /// Bytes of data whose copies were lost with a connection and had to be given back: part of what was sent.
    pub resent: u64,
    /// Bytes that guest writes have made dirty.
    pub marked: u64,
    /// Walks over the map that found something.
    pub passes: u32,
    /// How long the last flush took.
    pub flush_took: Duration,
    /// Flushes answered.
    pub flushes: u64,
    /// Bytes that the destination had already.
    pub equal: u64,
    /// Bytes that both sides have from the same base, by the user's word, and that were not looked at.
    pub based: u64,
    /// Bytes hashed on both sides and found equal, repeated ones counted again.
    pub verified: u64,
    /// Bytes that must be verified yet.
    pub unverified: u64,
    /// Bytes a second that both sides hash.
    pub hash_rate: u64,
    /// Verification passes that have come to their end.
    pub verify_walks: u64,
    /// Nobody can ask the destination for digests just now.
    pub verifier_lost: bool,
}

/// What is to be hashed on both sides.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// What is verified before the hand-over (D14).
    pub verified: Verified,
    /// The destination holds an older copy: what is equal is not sent (D12).
    pub compare: bool,
    /// Wakes whoever asks the destination.
    pub bell: Arc<Bell>,
}

/// A region whose copy may or may not arrive: in flight until it is given back. Dropping it gives it back too, but
/// counts nothing: for an attempt that has ended.
#[derive(Debug)]
#[must_use = "a region that is dropped is dirty again"]
pub struct Lost {
    flight: Flight,
    resent: Arc<AtomicU64>,
}

impl Lost {
    /// The destination has fenced the connection: the region is dirty again, and its data is sent again.
    pub fn give_back(self) {
        self.resent.fetch_add(self.flight.data_bytes, Ordering::Relaxed);
    }
}

impl Mirror {
    /// Arms dirty tracking for an export (D1) and returns its mirror, which does nothing until [`Mirror::scan`] has
    /// been called and lanes run.
    ///
    /// # Errors
    /// One line: there is no disk, or its requests in flight do not end.
    pub fn arm(export: &Arc<Export>, budget: &Arc<Budget>, plan: &Plan) -> Result<Arc<Self>, String> {
        let disk = export.disk().ok_or("the disk does not exist")?;
        let map = DirtyMap::new(disk.size());
        if plan.verified != Verified::Nothing {
            map.verify(plan.verified == Verified::Full);
        }
        let checks = Checks::new(plan.verified, plan.compare, disk.size(), &plan.bell);
        if map.granularity() > u64::from(PAYLOAD_MAX) {
            return Err(format!("a disk of {} bytes is larger than one request for each granule", disk.size()));
        }
        export.arm(&map).map_err(|error| format!("requests in flight do not end: {error}"))?;
        let now = Instant::now();
        let state = State {
            urgent: false,
            synchronous: false,
            stop: false,
            lanes: 0,
            passes: 0,
            pass_began: now,
            rest_until: now,
            walking: false,
            flush: Flush::default(),
            lost: Vec::new(),
            lost_lanes: None,
            failure: None,
        };
        Ok(Arc::new(Self {
            export: Arc::clone(export),
            disk,
            map,
            budget: Arc::clone(budget),
            state: Mutex::new(state),
            changed: Condvar::new(),
            sent: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            resent: Arc::default(),
            checks,
            base: OnceLock::new(),
            lands: AtomicBool::new(false),
        }))
    }

    /// The disk's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.export.name()
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// The bytes of one granule, which is the least that a lane copies.
    #[must_use]
    pub fn granularity(&self) -> usize {
        usize::try_from(self.map.granularity()).unwrap_or(usize::MAX)
    }

    /// Makes everything dirty that the destination must be sent: all data, and holes too unless the whole target is
    /// known to read as zero (D10). Only after arming (D1), and before the first lane runs.
    ///
    /// # Errors
    /// The disk cannot say what it holds.
    pub fn scan(&self, target_reads_zero: bool) -> std::io::Result<()> {
        if !target_reads_zero {
            self.map.mark_for_bulk(0, self.disk.size());
            return Ok(());
        }
        let mut at = 0;
        while at < self.disk.size() {
            let extent = self.disk.extent(at, self.disk.size())?;
            if !extent.hole {
                self.map.mark_for_bulk(extent.offset, extent.length);
            }
            at += extent.length;
        }
        Ok(())
    }

    /// Makes everything dirty but what both sides have from the same base (`layers.rs`), by the user's word; the
    /// target's layers are known since before the first byte. As [`Mirror::scan`]: only after arming, so that what the
    /// guest changes is marked wherever it stands (D1), and before the first lane runs.
    ///
    /// # Errors
    /// Why nothing is taken as equal; then everything is dirty.
    pub fn scan_over(&self, there: &Layers) -> Result<(), String> {
        match Layers::of(&self.disk).and_then(|here| Base::of(&here, there)) {
            Ok(base) => {
                base.rest(|offset, length| self.map.mark_for_bulk(offset, length));
                // Nobody else scans.
                let _ = self.base.set(base);
                Ok(())
            }
            Err(cause) => {
                self.map.mark_for_bulk(0, self.disk.size());
                Err(cause)
            }
        }
    }

    /// What has been done and what is left.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let (passes, flush_took, flushes) = {
            let state = self.lock();
            (state.passes, state.flush.took, state.flush.done)
        };
        let unsettled = self.map.unsettled();
        Counts {
            outstanding: unsettled.outstanding,
            sent: self.sent.load(Ordering::Relaxed),
            zeroed: self.zeroed.load(Ordering::Relaxed),
            acknowledged: self.acknowledged.load(Ordering::Relaxed),
            resent: self.resent.load(Ordering::Relaxed),
            marked: self.map.marked_bytes(),
            passes,
            flush_took,
            flushes,
            equal: self.checks.equal(),
            based: self.base.get().map_or(0, Base::bytes),
            verified: self.checks.agreed(),
            unverified: unsettled.unverified,
            hash_rate: self.checks.rate(),
            verify_walks: self.checks.walks(),
            verifier_lost: self.checks.lost().is_some(),
        }
    }

    /// Asks for a flush on the destination that covers everything acknowledged by now; see [`Counts::flushes`]. Does
    /// nothing while an earlier one is not answered.
    pub fn ask_for_flush(&self) {
        let mut state = self.lock();
        if state.flush.wanted == state.flush.done {
            state.flush.wanted += 1;
            drop(state);
            self.map.ring();
        }
    }

    /// What has ended the migration, if anything has.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        let failure = self.lock().failure.clone();
        failure.or_else(|| self.poison())
    }

    /// D9: after a failed sync nobody knows what the disk holds; that is not to be copied.
    fn poison(&self) -> Option<Failure> {
        let text = || format!("flush: disk {}: a sync of the source's disk has failed", self.name());
        self.disk.is_poisoned().then(|| Failure { text: text() })
    }

    /// The cause, if a lane has ended with its connection since the last call to [`Mirror::take_lost`].
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.lock().lost_lanes.clone()
    }

    /// The regions whose copies have an unknown outcome. Only when no lane runs any more; to be given back only when
    /// the destination has said FENCED (D4).
    pub fn take_lost(&self) -> Vec<Lost> {
        let mut state = self.lock();
        state.lost_lanes = None;
        std::mem::take(&mut state.lost)
    }

    /// Tells every lane to end; their connections are shut down by whoever opened them. The regions in flight become
    /// lost ones.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.let_go(&mut state);
        drop(state);
        self.map.ring();
    }

    /// The same, but each lane waits, as long as its connection lives and for a while, until what it has sent is
    /// answered.
    pub fn land(&self) {
        self.lands.store(true, Ordering::Release);
        self.stop();
    }

    /// From now on guest writes wait until they are copied (D7), if lanes run and none is lost; or no longer.
    pub fn synchronous(&self, on: bool) {
        let mut state = self.lock();
        let runs = state.lanes > 0 && !state.stop && state.lost_lanes.is_none() && state.failure.is_none();
        if on && runs {
            state.synchronous = true;
            self.map.synchronous(true);
        } else {
            self.let_go(&mut state);
        }
    }

    /// D7: nobody waits for what may never be acknowledged. Under the lock under which it is known.
    fn let_go(&self, state: &mut State) {
        state.synchronous = false;
        self.map.synchronous(false);
    }

    /// Lanes may run (again).
    pub fn resume(&self) {
        let mut state = self.lock();
        state.stop = false;
        // A flush that a lost lane took with it is asked for again.
        state.flush.sent = state.flush.done;
    }

    /// The guest is quiesced: copy on without a pause and without regard for the budget.
    pub fn hurry(&self, _: &Quiesced) {
        self.rush();
    }

    /// The guest stands, and its VMM may still write: as [`Mirror::hurry`], with open gates. Nothing is proved by it.
    pub fn rush(&self) {
        self.lock().urgent = true;
        self.map.ring();
        self.checks.ring();
    }

    /// The guest goes on: as before [`Mirror::hurry`].
    pub fn relax(&self) {
        self.lock().urgent = false;
    }

    /// The final pass: waits until nothing is outstanding and a flush that was asked for after that is answered (D5),
    /// and until everything is verified that must be (D14). The guest is quiesced, so nothing can become dirty
    /// meanwhile, and what nobody writes to and nobody copies cannot become unverified: ready is true when this returns
    /// and stays so.
    ///
    /// # Errors
    /// [`NotReady`]; the caller still holds the guest quiesced and decides what then.
    pub fn settle(&self, _: &Quiesced, deadline: Instant) -> Result<(), NotReady> {
        let mut flush_number = None;
        let mut state = self.lock();
        loop {
            if let Some(failure) = state.failure.clone().or_else(|| self.poison()) {
                return Err(NotReady::Failed(failure));
            }
            if let Some(cause) = &state.lost_lanes {
                return Err(NotReady::Lost(cause.clone()));
            }
            let unsettled = self.map.unsettled();
            let copied = unsettled.outstanding.granules == 0;
            if copied
                && unsettled.unverified > 0
                && let Some(cause) = self.checks.lost()
            {
                return Err(NotReady::Unverified(cause));
            }
            if copied {
                match flush_number {
                    None => {
                        // Not one that is already on its way: it may have left before the last acknowledgement.
                        let number = state.flush.wanted.max(state.flush.sent) + 1;
                        state.flush.wanted = number;
                        flush_number = Some(number);
                        self.map.ring();
                    }
                    Some(number) if state.flush.done >= number && unsettled.unverified == 0 => return Ok(()),
                    Some(_) => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && copied && unsettled.unverified > 0 {
                return Err(NotReady::Unverified("the verification takes too long".to_owned()));
            }
            if left.is_zero() {
                return Err(NotReady::TooSlow);
            }
            state = self.wait(state, left);
        }
    }

    /// Runs one lane over an open connection until the mirror is stopped, the connection is lost, or the migration has
    /// failed; which of them it was is in the mirror's state.
    pub fn run_lane(&self, sink: &mut Sink) {
        self.lock().lanes += 1;
        let mut lane = Lane::new(self);
        let end = lane.run(sink);
        let lost = lane.into_flights().map(|flight| Lost { flight, resent: Arc::clone(&self.resent) });
        let mut state = self.lock();
        state.lost.extend(lost);
        state.lanes -= 1;
        match end {
            LaneEnd::Stopped => {}
            // The other end may be quicker than the order to stop.
            LaneEnd::Lost(_) if state.stop => {}
            LaneEnd::Lost(cause) => {
                log::warn!("mirror: disk {}: connection lost: {cause}", self.name());
                state.lost_lanes.get_or_insert(cause);
                self.let_go(&mut state);
            }
            LaneEnd::Failed(failure) => {
                state.failure.get_or_insert(failure);
                state.stop = true;
                self.let_go(&mut state);
            }
        }
        drop(state);
        self.changed.notify_all();
        self.map.ring();
    }

    /// What a lane does next. Walking, resting and flushing are decided under one lock, so that the lanes of one disk
    /// agree on where a pass ends.
    fn orders(&self, load: &Load) -> Orders {
        // Before anything is looked at: what is rung for after that ends a rest.
        let seen = self.map.rung();
        let mut state = self.lock();
        if state.stop {
            return Orders::Stop;
        }
        if state.flush.sent < state.flush.wanted && !load.flushing {
            state.flush.sent = state.flush.wanted;
            return Orders::Flush(state.flush.wanted);
        }
        if !load.room {
            return Orders::Listen(LANE_LOOK);
        }
        if load.turns < SYNCHRONOUS_TURNS
            && let Some(region) = self.map.take_waited(REGION_MAX)
        {
            return Orders::Send(region, Haste::Waited);
        }
        let now = Instant::now();
        // D7: who waits is not to wait behind much that nobody waits for.
        let synchronous = state.synchronous && !state.urgent;
        let (most, may) = if synchronous {
            let may = load.background == 0 || load.background + SYNCHRONOUS_REGION_MAX <= SYNCHRONOUS_WINDOW;
            (SYNCHRONOUS_REGION_MAX, may)
        } else {
            (REGION_MAX, true)
        };
        if may && (state.urgent || state.walking || now >= state.rest_until) {
            if let Some(region) = self.map.take(most) {
                if !state.walking {
                    state.walking = true;
                    state.passes += 1;
                    state.pass_began = now;
                }
                return Orders::Send(region, if state.urgent { Haste::Final } else { Haste::None });
            }
            state.walking = false;
            state.rest_until = (state.pass_began + PASS_PERIOD).max(now + LANE_LOOK);
        }
        if let Some(region) = self.map.take_waited(REGION_MAX) {
            return Orders::Send(region, Haste::Waited);
        }
        if load.flying || load.flushing {
            return Orders::Listen(state.look());
        }
        let rest = if state.urgent { LANE_LOOK } else { state.rest_until.saturating_duration_since(now) };
        drop(state);
        self.map.rest(seen, rest);
        // A look at the idle connection, whether it is still there.
        Orders::Listen(Duration::ZERO)
    }

    fn acknowledge(&self, flight: Flight) {
        self.acknowledged.fetch_add(flight.region.length() as u64, Ordering::Relaxed);
        flight.region.acknowledge();
        // Looked at by the final pass only, and then somebody waits for it.
        if self.lock().urgent {
            if self.map.outstanding().granules == 0 {
                self.changed.notify_all();
            }
            self.checks.ring();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, timeout: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.map.synchronous(false);
        self.export.disarm(&self.map);
    }
}
