//! Rates of a running migration, and whether it has converged.
//!
//! The driver of a migration feeds a [`Meter`] with the mirrors' counts a few times a second. *Converged* means: the
//! predicted final pass, that is what is outstanding at the rate at which this migration has been seen to copy when it
//! was copying all the time, what is unverified at the rate of hashing, and the last flush, fits the allowed downtime.
//! The rate of a moment does not serve for that: a mirror that has little to do copies little.

use std::time::{Duration, Instant};

use crate::limits::{ASSUMED_RATE, METER_PERIOD, RATE_WINDOW, SATURATED_MIN};
use crate::mirror::Counts;

/// Samples of one disk over the last [`RATE_WINDOW`].
#[derive(Debug)]
struct Samples {
    ring: [Sample; SAMPLES],
    taken: usize,
}

const SAMPLES: usize = (RATE_WINDOW.as_millis() / METER_PERIOD.as_millis()) as usize + 1;

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    acknowledged: u64,
    marked: u64,
}

/// What the guest and the mirror do to one disk, in bytes a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rates {
    /// Copied and acknowledged.
    pub(super) copied: u64,
    /// Made dirty by guest writes.
    pub(super) dirtied: u64,
}

/// What a look at the meter says about all disks together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The predicted final pass fits the limit.
    Converged,
    /// It does not yet, but what is outstanding goes down.
    TooLong,
    /// It does not, and the guest writes at least as fast as the mirror copies.
    GuestIsFaster(Rates),
}

/// Measures one migration.
#[derive(Debug)]
pub(super) struct Meter {
    disks: Vec<Samples>,
    /// Bytes a second of all disks together while there was always enough to copy; smoothed.
    capacity: Option<f64>,
    busy_since: Option<(Instant, u64)>,
    last: Instant,
    /// How far away the destination is.
    round_trip: Duration,
}

impl Meter {
    /// A meter for so many disks, counting from now.
    #[must_use]
    pub(super) fn new(disks: usize, round_trip: Duration) -> Self {
        let now = Instant::now();
        let start = Sample { at: now, acknowledged: 0, marked: 0 };
        let samples = || Samples { ring: [start; SAMPLES], taken: 1 };
        Self {
            disks: std::iter::repeat_with(samples).take(disks).collect(),
            capacity: None,
            busy_since: None,
            last: now,
            round_trip,
        }
    }

    /// Takes a sample if it is time for one. `counts` are the disks' in the same order each time.
    #[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^52")]
    pub(super) fn sample(&mut self, counts: &[Counts]) {
        let now = Instant::now();
        if now.duration_since(self.last) < METER_PERIOD {
            return;
        }
        self.last = now;
        for (samples, counts) in self.disks.iter_mut().zip(counts) {
            let place = samples.taken % SAMPLES;
            samples.ring[place] = Sample { at: now, acknowledged: counts.acknowledged, marked: counts.marked };
            samples.taken += 1;
        }
        let acknowledged = counts.iter().map(|c| c.acknowledged).sum();
        let saturated = counts.iter().map(|c| c.outstanding.bytes).sum::<u64>() >= SATURATED_MIN;
        if let Some((since, before)) = self.busy_since {
            let seconds = now.duration_since(since).as_secs_f64();
            let rate = (acknowledged - before.min(acknowledged)) as f64 / seconds.max(1e-3);
            if rate > 0.0 {
                self.capacity = Some(self.capacity.map_or(rate, |old| old.mul_add(0.7, rate * 0.3)));
            }
        }
        self.busy_since = saturated.then_some((now, acknowledged));
    }

    /// The rates of one disk over the last second.
    #[must_use]
    pub(super) fn rates(&self, disk: usize) -> Rates {
        let Some(samples) = self.disks.get(disk) else { return Rates::default() };
        let newest = samples.ring[(samples.taken - 1) % SAMPLES];
        let oldest = samples.ring[if samples.taken > SAMPLES { samples.taken % SAMPLES } else { 0 }];
        let ms = u64::try_from(newest.at.duration_since(oldest.at).as_millis()).unwrap_or(u64::MAX);
        let per_second = |bytes: u64| bytes.saturating_mul(1000).checked_div(ms).unwrap_or(0);
        Rates {
            copied: per_second(newest.acknowledged - oldest.acknowledged),
            dirtied: per_second(newest.marked - oldest.marked),
        }
    }

    /// The rates of all disks together.
    #[must_use]
    pub(super) fn total(&self) -> Rates {
        (0..self.disks.len()).map(|disk| self.rates(disk)).fold(Rates::default(), |sum, rates| Rates {
            copied: sum.copied + rates.copied,
            dirtied: sum.dirtied + rates.dirtied,
        })
    }

    /// How long the final pass would take now.
    #[must_use]
    pub(super) fn predicted_final(&self, counts: &[Counts]) -> Duration {
        let flush = counts.iter().map(|c| c.flush_took).max().unwrap_or_default();
        self.predicted_copying(counts) + flush + self.predicted_hashing(counts)
    }

    /// How much of that is copying.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^52")]
    pub(super) fn predicted_copying(&self, counts: &[Counts]) -> Duration {
        let bytes: u64 = counts.iter().map(|c| c.outstanding.bytes).sum();
        let rate = self.capacity.unwrap_or(ASSUMED_RATE as f64).max(1.0);
        // A day is as good as never, and fits every type that shows it.
        Duration::from_secs_f64((bytes as f64 / rate).min(86_400.0))
    }

    /// How long it would take to verify what is not: each disk at the rate at which its regions were seen to be hashed.
    #[expect(clippy::cast_precision_loss, reason = "byte counts are far below 2^52")]
    fn predicted_hashing(&self, counts: &[Counts]) -> Duration {
        let seconds: f64 = counts.iter().map(|c| c.unverified as f64 / c.hash_rate.max(1) as f64).sum();
        let asked = if counts.iter().any(|c| c.unverified > 0) { self.round_trip } else { Duration::ZERO };
        Duration::from_secs_f64(seconds.min(86_400.0)) + asked
    }

    /// Whether the final pass would fit `limit`, or why not.
    #[must_use]
    pub(super) fn verdict(&self, counts: &[Counts], limit: Duration) -> Verdict {
        if self.predicted_final(counts) <= limit {
            return Verdict::Converged;
        }
        let total = self.total();
        // Where only the verification is not done yet, the guest is not to blame.
        let copied =
            counts.iter().all(|c| c.outstanding.bytes < SATURATED_MIN) && !self.predicted_hashing(counts).is_zero();
        // A granule that is dirty already cannot become so again: what a guest that is much faster makes dirty is just
        // what has been copied, and the two are never the same at one moment.
        if total.dirtied > 0 && !copied && total.dirtied + total.dirtied / 8 >= total.copied {
            Verdict::GuestIsFaster(total)
        } else {
            Verdict::TooLong
        }
    }
}
