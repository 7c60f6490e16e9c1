//! The guest's state on its way: two byte streams, carried and never looked at.
//!
//! On the source the state comes out of the VMM's socket and goes into the *carrier*: a connection of its own to the
//! destination's migration door or, on the stream path, a part of the phase connection. On the destination it is the
//! other way round. The VMMs speak with each other, so bytes
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
use crate::trunk::Channel;

/// What carries the state between the hosts.
#[derive(Debug)]
pub(super) enum Carrier {
    /// A connection of its own.
    Own(Arc<Socket>),
    /// The phase connection.
    Inside(Channel),
}

impl Carrier {
    fn receive(&self, buffer: &mut [u8]) -> Result<usize, String> {
        match self {
            Self::Own(socket) => socket.recv(buffer).map_err(|error| reason(&error)),
            Self::Inside(channel) => channel.receive(buffer).map_err(|ended| ended.to_string()),
        }
    }

    fn send_all(&self, bytes: &[u8]) -> Result<(), String> {
        match self {
            Self::Own(socket) => socket.send_all(bytes).map_err(|error| reason(&error)),
            Self::Inside(channel) => channel.send_all(bytes).map_err(|ended| ended.to_string()),
        }
    }

    /// Nothing more goes; something may still come.
    fn finish_sending(&self) {
        match self {
            Self::Own(socket) => socket.finish_sending(),
            Self::Inside(channel) => channel.finish_sending(),
        }
    }

    /// Wakes whoever waits. Waits for nothing.
    fn shutdown(&self) {
        match self {
            Self::Own(socket) => socket.shutdown(),
            Self::Inside(channel) => channel.shutdown(),
        }
    }

    /// Nobody carries anything any more; the other side hears of it.
    fn close(&self) {
        match self {
            Self::Own(socket) => socket.shutdown(),
            Self::Inside(channel) => channel.close(),
        }
    }
}

/// The state of one guest on its way through this process.
#[derive(Debug)]
pub(super) struct Relay {
    vmm: Arc<Socket>,
    carrier: Carrier,
    /// Of what goes into the carrier; the destination has none.
    budget: Option<Arc<Budget>>,
    /// The guest stands: nothing waits for the budget.
    urgent: AtomicBool,
    /// Bytes that came out of the VMM, and that went into it.
    out: AtomicU64,
    into: AtomicU64,
    /// The VMM is being given something, and takes its time.
    gives: AtomicBool,
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
    /// That out of the VMM is one of them, and that into it.
    drained: bool,
    filled: bool,
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
    pub(super) fn start(vmm: Arc<Socket>, carrier: Carrier, budget: Option<Arc<Budget>>) -> Result<Arc<Self>, String> {
        let relay = Arc::new(Self {
            vmm,
            carrier,
            budget,
            urgent: AtomicBool::new(false),
            out: AtomicU64::new(0),
            into: AtomicU64::new(0),
            gives: AtomicBool::new(false),
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
                relay.carrier.close();
                format!("no thread for the guest's state: {error}")
            })?;
        }
        Ok(relay)
    }

    /// Bytes that came out of the VMM or went into it, both ways together.
    pub(super) fn bytes(&self) -> u64 {
        self.out() + self.into()
    }

    /// Bytes that have come out of the VMM and been sent.
    pub(super) fn out(&self) -> u64 {
        self.out.load(Ordering::Acquire)
    }

    /// Bytes that the VMM has been given.
    pub(super) fn into(&self) -> u64 {
        self.into.load(Ordering::Acquire)
    }

    /// For how long nothing has come that the VMM could be given.
    pub(super) fn starved(&self) -> Duration {
        if self.gives.load(Ordering::Acquire) { Duration::ZERO } else { self.quiet() }
    }

    /// The guest stands: the state waits for nobody any more.
    pub(super) fn hurry(&self) {
        self.urgent.store(true, Ordering::Release);
    }

    /// Its quiet is counted anew: nothing could have come before now.
    pub(super) fn expect(&self) {
        self.moved_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
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

    /// Whether all that the VMM had to say has been sent.
    pub(super) fn is_drained(&self) -> bool {
        self.ends().drained
    }

    /// Whether the direction into the VMM has come to its end, or the whole has broken.
    pub(super) fn is_over(&self) -> bool {
        let ends = self.ends();
        ends.filled || ends.failure.is_some()
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

    /// Shuts both ends; whoever waits on them hears of it. Waits for nothing. Safe to repeat.
    pub(super) fn end(&self) {
        self.vmm.shutdown();
        self.carrier.shutdown();
    }

    fn carry(&self, way: Way) {
        let carried = self.carry_to_the_end(way);
        let mut ends = self.ends();
        ends.count += 1;
        ends.drained |= way == Way::FromVmm && carried.is_ok();
        ends.filled |= way == Way::ToVmm;
        if let Err(cause) = carried {
            ends.failure.get_or_insert(cause);
            self.end();
        }
        let is_over = ends.count == 2;
        drop(ends);
        if is_over {
            self.carrier.close();
        }
        self.ended.notify_all();
    }

    fn carry_to_the_end(&self, way: Way) -> Result<(), String> {
        let vmm = |error: std::io::Error| format!("the guest's state: the VMM: {}", reason(&error));
        let other = |cause: String| format!("the guest's state: the other host: {cause}");
        let mut buffer = vec![0; STATE_BUFFER];
        loop {
            let count = match way {
                Way::FromVmm => self.vmm.recv(&mut buffer).map_err(vmm)?,
                Way::ToVmm => self.carrier.receive(&mut buffer).map_err(other)?,
            };
            if count == 0 {
                match way {
                    Way::FromVmm => self.carrier.finish_sending(),
                    Way::ToVmm => self.vmm.finish_sending(),
                }
                return Ok(());
            }
            if let Some(budget) = self.budget.as_ref().filter(|_| way == Way::FromVmm) {
                while !self.urgent.load(Ordering::Acquire)
                    && let Some(time) = budget.spend(count)
                {
                    std::thread::sleep(time.min(STATE_LOOK));
                }
            }
            match way {
                Way::FromVmm => self.carrier.send_all(&buffer[..count]).map_err(other)?,
                Way::ToVmm => {
                    self.gives.store(true, Ordering::Release);
                    let given = self.vmm.send_all(&buffer[..count]);
                    self.gives.store(false, Ordering::Release);
                    given.map_err(vmm)?;
                }
            }
            let one_way = if way == Way::FromVmm { &self.out } else { &self.into };
            one_way.fetch_add(count as u64, Ordering::Release);
            self.expect();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.end();
    }
}
