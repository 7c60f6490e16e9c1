//! The guest's state on its way: two byte streams, carried and never looked at.
//!
//! On the source the state comes out of the VMM's socket and goes into the *carrier*, a connection of its own to the
//! destination's migration door; on the destination it is the other way round. The VMMs speak with each other, so bytes
//! go both ways, and each direction ends by itself. A [`Relay`] is the same on both sides: two threads, a buffer each,
//! which never wait for anything but the two sockets and, on the source while the guest runs, for the migration's
//! bandwidth budget. Called by `drive/state.rs` and `destination/state.rs`, which know what the VMMs do meanwhile.
//!
//! A state that has begun to move is not resumed: when either socket breaks, both are shut, and the VMM on the source
//! goes on by itself or is told to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::reason;
use crate::limits::{CONNECTION_STACK, STATE_BUFFER, STATE_LOOK};
use crate::mirror::Budget;
use crate::socket::Socket;

/// The state of one guest on its way through this process.
#[derive(Debug)]
pub(super) struct Relay {
    vmm: Arc<Socket>,
    carrier: Arc<Socket>,
    /// Of what goes into the carrier; the destination has none.
    budget: Option<Arc<Budget>>,
    /// The guest stands: nothing waits for the budget.
    urgent: AtomicBool,
    bytes: AtomicU64,
    began: Instant,
    /// When bytes last moved, in milliseconds since it began.
    moved_ms: AtomicU64,
    ends: Mutex<Ends>,
    /// A direction has come to its end.
    ended: Condvar,
}

/// How the directions have ended.
#[derive(Debug, Default)]
struct Ends {
    /// So many have.
    count: u32,
    /// Why one was broken.
    failure: Option<String>,
}

/// Where one direction leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FromVmm,
    ToVmm,
}

impl Relay {
    /// Begins to carry between the VMM's socket and the carrier.
    ///
    /// # Errors
    /// One line: there are no threads.
    pub(super) fn start(
        vmm: Arc<Socket>,
        carrier: Arc<Socket>,
        budget: Option<Arc<Budget>>,
    ) -> Result<Arc<Self>, String> {
        let relay = Arc::new(Self {
            vmm,
            carrier,
            budget,
            urgent: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            began: Instant::now(),
            moved_ms: AtomicU64::new(0),
            ends: Mutex::default(),
            ended: Condvar::new(),
        });
        for way in [Way::FromVmm, Way::ToVmm] {
            let runner = Arc::clone(&relay);
            let thread = std::thread::Builder::new().name("state".to_owned()).stack_size(CONNECTION_STACK);
            thread.spawn(move || runner.carry(way)).map_err(|error| {
                relay.end();
                format!("no thread for the guest's state: {error}")
            })?;
        }
        Ok(relay)
    }

    /// Bytes that came out of the VMM or went into it, both ways together.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The guest stands: the state waits for nobody any more.
    pub(super) fn hurry(&self) {
        self.urgent.store(true, Ordering::Release);
    }

    /// For how long nothing has moved.
    pub(super) fn quiet(&self) -> Duration {
        let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(moved)
    }

    /// Why it broke, if it did.
    pub(super) fn failure(&self) -> Option<String> {
        self.ends().failure.clone()
    }

    /// Waits until both directions have come to their end, as they do when either side is gone.
    pub(super) fn wait(&self) {
        let mut ends = self.ends();
        while ends.count < 2 {
            ends = self.ended.wait(ends).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts both sockets; whoever waits on them hears of it. Safe to repeat.
    pub(super) fn end(&self) {
        self.vmm.shutdown();
        self.carrier.shutdown();
    }

    fn carry(&self, way: Way) {
        let carried = self.carry_to_the_end(way);
        let mut ends = self.ends();
        ends.count += 1;
        if let Err(cause) = carried {
            ends.failure.get_or_insert(cause);
            self.end();
        }
        drop(ends);
        self.ended.notify_all();
    }

    fn carry_to_the_end(&self, way: Way) -> Result<(), String> {
        let (from, to) = match way {
            Way::FromVmm => (&self.vmm, &self.carrier),
            Way::ToVmm => (&self.carrier, &self.vmm),
        };
        let fault = |place: &Arc<Socket>, error: &std::io::Error| {
            let whose = if Arc::ptr_eq(place, &self.vmm) { "the VMM" } else { "the other host" };
            format!("the guest's state: {whose}: {}", reason(error))
        };
        let mut buffer = vec![0; STATE_BUFFER];
        loop {
            let count = from.recv(&mut buffer).map_err(|error| fault(from, &error))?;
            if count == 0 {
                to.finish_sending();
                return Ok(());
            }
            if let Some(budget) = self.budget.as_ref().filter(|_| way == Way::FromVmm) {
                while !self.urgent.load(Ordering::Acquire)
                    && let Some(time) = budget.spend(count)
                {
                    std::thread::sleep(time.min(STATE_LOOK));
                }
            }
            to.send_all(&buffer[..count]).map_err(|error| fault(to, &error))?;
            self.bytes.fetch_add(count as u64, Ordering::Relaxed);
            let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.moved_ms.store(now, Ordering::Relaxed);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end();
    }
}
