//! When guest writes are to wait for the mirror (D7), as `--synchronous` says.
//!
//! *auto* turns synchronous when a mirror that passes does not converge: for [`CONVERGENCE_PATIENCE`] the copying that
//! is left has not become a tenth shorter than it ever was, and has always been a good part of the allowed downtime, so
//! that less of it would help. *always* does so when the bulk pass is over and not before: as long as the bulk is on
//! its way, a guest write that waits slows the guest down and brings the end no nearer. *never* goes on and says the
//! two rates.
//!
//! It never turns back by itself. What a guest that waits makes dirty says nothing about what it would if it did not,
//! so a rule that turned back would find out by letting the backlog grow again, for ever in turns. It ends with the
//! attempt; a lost connection suspends it (`mirror.rs`).

use std::time::{Duration, Instant};

use super::meter::Rates;
use crate::control::wire::Synchronous;
use crate::limits::CONVERGENCE_PATIENCE;

/// The copying that is left is worth a wait when it is more than this part of the allowed downtime.
const WORTH: u32 = 4;

/// Whether they wait, and why.
#[derive(Debug)]
pub(super) struct Synchrony {
    mode: Synchronous,
    /// The rates when they began to.
    on: Option<Rates>,
    /// The shortest time that what is left would have taken since it was last short enough, and when that was.
    best: Option<(Duration, Instant)>,
}

impl Synchrony {
    pub(super) fn new(mode: Synchronous) -> Self {
        Self { mode, on: None, best: None }
    }

    /// The rates when guest writes began to wait; `None`: they do not.
    pub(super) fn on(&self) -> Option<Rates> {
        self.on
    }

    /// Looks at a mirror whose bulk pass is over: copying what is left would take `copying` now, and `limit` is the
    /// downtime that is allowed.
    pub(super) fn look(&mut self, copying: Duration, limit: Duration, rates: Rates, now: Instant) {
        let short = copying <= limit / WORTH;
        let stuck = match self.best {
            _ if short => {
                self.best = None;
                false
            }
            Some((best, since)) if copying > best - best / 10 => now.duration_since(since) >= CONVERGENCE_PATIENCE,
            _ => {
                self.best = Some((copying, now));
                false
            }
        };
        let turn = match self.mode {
            Synchronous::Never => false,
            Synchronous::Always => true,
            Synchronous::Auto => stuck,
        };
        if turn && self.on.is_none() {
            self.on = Some(rates);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { copied: 8, dirtied: 9 };
    const LIMIT: Duration = Duration::from_millis(300);

    /// What a mirror comes to of which `copying` is left at each tenth of a second.
    fn after(mode: Synchronous, copying: impl Iterator<Item = u64>) -> bool {
        let (mut synchrony, start) = (Synchrony::new(mode), Instant::now());
        for (at, ms) in copying.enumerate() {
            let now = start + Duration::from_millis(100 * at as u64);
            synchrony.look(Duration::from_millis(ms), LIMIT, RATES, now);
        }
        synchrony.on().is_some()
    }

    #[test]
    fn auto_turns_when_what_is_left_stays_and_not_when_it_goes_down_or_is_little() {
        let patience = CONVERGENCE_PATIENCE.as_millis() as usize / 100;
        assert!(after(Synchronous::Auto, [1000].into_iter().cycle().take(patience + 1)));
        assert!(!after(Synchronous::Auto, [1000].into_iter().cycle().take(patience)), "it is patient");
        assert!(after(Synchronous::Auto, (0..100).map(|at| 1000 + at % 7 * 100)), "up and down is no progress");
        assert!(!after(Synchronous::Auto, (0..100).map(|at| 100_000 - at * 990)), "it gets on");
        let bursts = (0..200).map(|at| if at % 20 == 0 { 10 } else { 1000 });
        assert!(!after(Synchronous::Auto, bursts), "what is caught up with again and again converges");
        assert!(!after(Synchronous::Auto, [70].into_iter().cycle().take(1000)), "what takes the time is not copying");
    }

    #[test]
    fn always_turns_at_once_and_never_does_not() {
        assert!(after(Synchronous::Always, [0].into_iter()));
        assert!(!after(Synchronous::Never, [1000].into_iter().cycle().take(1000)));
    }
}
