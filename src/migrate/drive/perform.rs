//! PERFORM: arms the maps, starts lanes and checkers, and copies until the final pass would be short enough.
//!
//! Called by `drive::run` after PREPARE; `finish.rs` comes back to `copy_until_converged` when a switchover is put off.

use super::*;

impl Drive<'_> {
    /// Copies until the final pass would be short enough, and, with `--hold`, until somebody says switch.
    pub(super) fn perform(&mut self) -> Result<(), Stop> {
        let way = match &self.stream {
            Some(present) => verify::Way::Inside(Arc::clone(present)),
            None => verify::Way::Dial(self.job.address.clone()),
        };
        let bells = Checkers::bells(self.job.exports.len(), &way);
        for (number, (export, ready)) in self.job.exports.iter().zip(self.prepared.disks.clone()).enumerate() {
            let fault = |cause: String| format!("disk {}: {cause}", export.name());
            let verified = verified(self.job.request.verify);
            let compare = ready.compare && !ready.reads_as_zero;
            let plan = Plan { verified, compare, bell: Arc::clone(&bells[number % bells.len()]) };
            let mirror = Mirror::arm(export, &self.job.budget, &plan).map_err(fault)?;
            // D1: the first extent is asked for after arming.
            mirror.scan(ready.reads_as_zero).map_err(|error| fault(error.to_string()))?;
            self.mirrors.push(mirror);
        }
        let peer = verify::Peer { guest: self.guest, way, stamp: self.stamp, instance: self.prepared.instance };
        self.checkers = Checkers::start(&peer, &self.mirrors, &bells)?;
        if let Err(NotYet::Stop(stop)) = self.open_stream() {
            return Err(stop);
        }
        self.compare()?;
        // A link that was lost meanwhile has brought them with it when it was mended.
        if !self.lanes.are_open() {
            match self.open_lanes() {
                Err(NotYet::GoOn(cause)) => self.recover(&cause)?,
                opened => opened?,
            }
        }
        self.copy_until_converged()
    }

    /// D12: what the destination has already is found out first; what differs is dirty, and copied later.
    fn compare(&mut self) -> Result<(), Stop> {
        while self.mirrors.iter().any(|mirror| mirror.is_comparing()) {
            self.look()?;
            let counts = self.counts();
            self.show(&counts, Verdict::TooLong, false);
        }
        Ok(())
    }

    pub(super) fn copy_until_converged(&mut self) -> Result<(), Stop> {
        loop {
            self.look()?;
            let counts = self.counts();
            self.meter.sample(&counts);
            let limit = if self.job.is_switched() { QUIESCE_MAX / 2 } else { self.job.downtime_limit() };
            let verdict = self.meter.verdict(&counts, limit);
            let bulk_over = counts.iter().all(|c| c.passes > 1 || c.outstanding.granules == 0);
            if bulk_over {
                let (copying, rates) = (self.meter.predicted_copying(&counts), self.meter.total());
                self.synchrony.look(copying, limit, rates, Instant::now());
            }
            let converged = verdict == Verdict::Converged
                && bulk_over
                && counts.iter().all(|c| c.flushes > 0)
                && self.has_caught_up(&counts);
            self.show(&counts, verdict, converged);
            if converged && (!self.job.request.hold || self.job.is_switched()) {
                return Ok(());
            }
            // Whatever the verdict: it counts the last flush, and one that was slow would never be measured again.
            if bulk_over && self.flushed.elapsed() >= FLUSH_PERIOD {
                self.flushed = Instant::now();
                self.mirrors.iter().for_each(|mirror| mirror.ask_for_flush());
            }
        }
    }

    /// Whether the verification has followed the bulk pass to its end: what is left of that is not to be hashed while
    /// the guest waits, even if the allowed downtime would do. Only after the bulk pass. A walk always ends, so this
    /// keeps nobody waiting for long.
    fn has_caught_up(&mut self, counts: &[Counts]) -> bool {
        if !self.mirrors.iter().any(|mirror| mirror.verifies()) {
            return true;
        }
        if self.walks.is_empty() {
            self.walks = counts.iter().map(|c| c.verify_walks).collect();
            self.mirrors.iter().for_each(|mirror| mirror.verify_soon());
        }
        have_caught_up(counts, &self.walks)
    }
}

/// Whether a walk that began after `walks` has verified each disk, and what is left can be verified now: while nobody
/// asks for digests the gates would close for nothing.
pub(super) fn have_caught_up(counts: &[Counts], walks: &[u64]) -> bool {
    counts.iter().zip(walks).all(|(counts, before)| {
        let walked = counts.verify_walks.saturating_sub(*before);
        !counts.verifier_lost && (walked > 1 || walked == 1 && counts.unverified < SATURATED_MIN)
    })
}
