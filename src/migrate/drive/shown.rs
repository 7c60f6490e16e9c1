//! What is shown of a migration while it runs. Changes nothing.

use super::*;

impl Drive<'_> {
    pub(super) fn counts(&self) -> Vec<Counts> {
        self.mirrors.iter().map(|mirror| mirror.counts()).collect()
    }

    pub(super) fn show_phase(&self, phase: Phase) {
        let counts = self.counts();
        self.job.show(|progress| {
            progress.phase = phase;
            progress.held = false;
            progress.disks = disks(&self.mirrors, &self.meter, &counts);
        });
    }

    pub(super) fn show(&self, counts: &[Counts], verdict: Verdict, converged: bool) {
        show(self.job, &self.mirrors, &self.meter, counts, verdict, converged);
        let since = |rates: Rates| wire::Since { dirty_rate_bytes: rates.dirtied, rate_bytes: rates.copied };
        self.job.show(|progress| progress.synchronous = self.synchrony.on().map(since));
    }

    /// While the guest's state moves.
    pub(super) fn show_state(&self, counts: &[Counts], bytes: u64) {
        self.job.show(|progress| {
            progress.state_bytes = bytes;
            progress.bandwidth_bytes = self.job.budget.rate();
            progress.disks = disks(&self.mirrors, &self.meter, counts);
        });
    }
}

/// How a migration is going.
pub(super) fn show(
    job: &Job,
    mirrors: &[Arc<Mirror>],
    meter: &Meter,
    counts: &[Counts],
    verdict: Verdict,
    converged: bool,
) {
    let bulk = counts.iter().any(|c| c.passes <= 1);
    let predicted = meter.predicted_final(counts).as_millis();
    job.show(|progress| {
        progress.phase = if bulk { Phase::Bulk } else { Phase::Passes };
        progress.convergence = match verdict {
            _ if converged => Convergence::Converged,
            Verdict::GuestIsFaster(rates) if !bulk => {
                Convergence::GuestIsFaster { dirty_rate_bytes: rates.dirtied, rate_bytes: rates.copied }
            }
            // Fits, but its flush has not been measured yet.
            Verdict::Converged => Convergence::Copying,
            _ if bulk => Convergence::Copying,
            _ => Convergence::TooLong,
        };
        progress.predicted_final_ms = u32::try_from(predicted).ok();
        progress.downtime_limit_ms = u32::try_from(job.downtime_limit().as_millis()).unwrap_or(u32::MAX);
        progress.bandwidth_bytes = job.budget.rate();
        progress.held = converged && job.request.hold && !job.is_switched();
        progress.disks = disks(mirrors, meter, counts);
    });
}

/// What is shown of each disk.
pub(super) fn disks(
    mirrors: &[Arc<Mirror>],
    meter: &Meter,
    counts: &[Counts],
) -> heapless::Vec<DiskProgress, DISKS_MAX> {
    let disk = |(number, (mirror, counts)): (usize, (&Arc<Mirror>, &Counts))| {
        let rates = meter.rates(number);
        let left = counts.outstanding.bytes;
        let gain = rates.copied.saturating_sub(rates.dirtied);
        let estimate = if left == 0 { Some(0) } else { left.checked_div(gain) };
        DiskProgress {
            name: text(mirror.name()),
            size_bytes: mirror.size(),
            left_bytes: left,
            sent_bytes: counts.sent,
            resent_bytes: counts.resent,
            zero_bytes: counts.zeroed,
            rate_bytes: rates.copied,
            dirty_rate_bytes: rates.dirtied,
            passes: counts.passes,
            estimate_s: estimate.and_then(|seconds| u32::try_from(seconds).ok()),
            equal_bytes: counts.equal,
            verified_bytes: counts.verified,
            unverified_bytes: counts.unverified,
            base_bytes: counts.based,
        }
    };
    // No more mirrors than disks, which fit.
    mirrors.iter().zip(counts).enumerate().map(disk).take(DISKS_MAX).collect()
}
