//! The bandwidth that a migration may use.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::BUDGET_BURST;

/// One bandwidth budget for everything that a migration sends in the background, whoever sends it: all lanes of all
/// disks, and the guest's state. Beside it, neither waiting nor counted, go the final pass and what a guest write waits
/// for (D7): counted, they would leave nothing for the rest, and a guest that writes faster than this would never be
/// moved.
#[derive(Debug)]
pub struct Budget {
    inner: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes a second; 0 is no limit.
    rate: u64,
    /// Bytes that may be sent now; below zero while what was sent is paid off.
    credit: f64,
    counted: Instant,
}

impl Budget {
    /// A budget of `rate` bytes a second; 0 is no limit.
    #[must_use]
    pub fn new(rate: u64) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(Bucket { rate, credit: 0.0, counted: Instant::now() }) })
    }

    /// Changes the rate from now on.
    pub fn set_rate(&self, rate: u64) {
        let mut bucket = self.lock();
        bucket.rate = rate;
        bucket.credit = bucket.credit.max(0.0);
    }

    /// The rate in bytes a second; 0 is no limit.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.lock().rate
    }

    /// Spends `bytes` if there is credit. Otherwise returns the time after which to ask again.
    #[expect(clippy::cast_precision_loss, reason = "rates and sizes are far below 2^52")]
    pub fn spend(&self, bytes: usize) -> Option<Duration> {
        let mut bucket = self.lock();
        if bucket.rate == 0 {
            return None;
        }
        let rate = bucket.rate as f64;
        let now = Instant::now();
        let earned = now.duration_since(bucket.counted).as_secs_f64() * rate;
        bucket.counted = now;
        bucket.credit = (bucket.credit + earned).min(rate * BUDGET_BURST.as_secs_f64());
        if bucket.credit >= 0.0 {
            bucket.credit -= bytes as f64;
            return None;
        }
        Some(Duration::from_secs_f64(-bucket.credit / rate))
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
