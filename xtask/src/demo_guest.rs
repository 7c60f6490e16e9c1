//! The guest of a demo or a bench: a thread that writes through NBD without ever stopping, as a virtual machine does,
//! and remembers every write that was acknowledged.
//!
//! Each write fills one block with its number and its place, so that it can be told from every other and a torn one be
//! seen. When the source refuses, the guest does what a VMM does whose other half waits on the destination: it sends
//! what was not acknowledged again there, over a connection that is open already, and goes on.

use crate::demo_image::{BLOCK, Random};
use blockferry::address::Address;
use blockferry::nbd::client::{Client, Event, Lost, Submitted, Wants};
use blockferry::nbd::wire;
use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Time between two writes: 500 a second.
const WRITE_PERIOD: Duration = Duration::from_millis(2);
/// Time between two flushes.
const FLUSH_PERIOD: Duration = Duration::from_millis(100);
/// Most writes in flight.
const WINDOW: usize = 16;
/// Longest wait for anything of either side: then the guest counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait until a door answers.
const DIAL: Duration = Duration::from_secs(5);
/// How often the destination is asked whether it has the disk yet.
const LOOK: Duration = Duration::from_millis(50);
/// Pause before a write is tried again that the destination does not take yet.
const AGAIN: Duration = Duration::from_micros(200);
/// The cookie of a flush; writes have their numbers.
const FLUSH: u64 = 0;

/// A write that was acknowledged.
#[derive(Clone, Copy)]
pub(crate) struct Acknowledged {
    /// Which block.
    pub(crate) block: u64,
    /// When the acknowledgement came.
    pub(crate) at: Instant,
    /// How long that took after the write was sent first.
    pub(crate) took: Duration,
    /// Whether the destination acknowledged it.
    pub(crate) moved: bool,
}

/// What a guest has seen.
#[derive(Default)]
pub(crate) struct History {
    /// Every write that was acknowledged, in the order of that.
    pub(crate) acknowledged: Vec<Acknowledged>,
    /// For each block the number of the last write acknowledged.
    pub(crate) last: HashMap<u64, u64>,
    /// Blocks that were sent to the destination.
    pub(crate) moved: HashSet<u64>,
    /// Flushes acknowledged.
    pub(crate) flushes: u64,
    /// What the source said to a write after the hand-over.
    pub(crate) source_says: String,
}

impl History {
    /// The times between two acknowledgements: the longest at the hand-over, and the longest other.
    pub(crate) fn pauses(&self) -> (Duration, Duration) {
        let mut longest = (Duration::ZERO, Duration::ZERO);
        for pair in self.acknowledged.windows(2) {
            let pause = pair[1].at.duration_since(pair[0].at);
            let place = if pair[0].moved == pair[1].moved { &mut longest.1 } else { &mut longest.0 };
            *place = pause.max(*place);
        }
        longest
    }

    /// The median latency of the writes acknowledged in a span of time, and the one that 99 of 100 keep.
    pub(crate) fn latency(&self, from: Instant, to: Instant) -> (Duration, Duration) {
        let within = self.acknowledged.iter().filter(|write| write.at >= from && write.at < to);
        let mut times: Vec<Duration> = within.map(|write| write.took).collect();
        times.sort_unstable();
        let part = |hundredths: usize| times.get(times.len() * hundredths / 100).copied().unwrap_or_default();
        (part(50), part(99))
    }

    /// How many different blocks were written at the source since `from`.
    pub(crate) fn changed_since(&self, from: Instant) -> u64 {
        let blocks: HashSet<u64> = self
            .acknowledged
            .iter()
            .filter(|write| write.at >= from && !write.moved)
            .map(|write| write.block)
            .collect();
        blocks.len() as u64
    }

    /// Looks up every block's last acknowledged write in the disk at `door`. Returns how many writes are lost.
    pub(crate) fn lost(&self, door: &Path, disk: &str) -> Result<u64, String> {
        let mut client = connect(door, disk)?;
        let mut bytes = vec![0; BLOCK];
        let mut lost = 0;
        for (&block, &number) in &self.last {
            client.read_exact(block * BLOCK as u64, &mut bytes).map_err(|error| error.to_string())?;
            lost += u64::from(bytes != stamp(number, block));
        }
        Ok(lost)
    }
}

/// What write `number` fills its block with.
fn stamp(number: u64, block: u64) -> Vec<u8> {
    let words = [number.to_le_bytes(), block.to_le_bytes()].concat();
    words.repeat(BLOCK / words.len())
}

/// A guest that runs.
pub(crate) struct Guest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<History, String>>,
}

impl Guest {
    /// Starts writing to `disk` at the door `source`; goes on at `destination`.
    pub(crate) fn start(source: &Path, destination: &Path, disk: &'static str) -> Result<Self, String> {
        let stop = Arc::new(AtomicBool::new(false));
        let client = connect(source, disk)?;
        let (sender, waiting) = mpsc::channel();
        let (stopped, door) = (Arc::clone(&stop), destination.to_owned());
        // What a VMM with `-incoming` does on the destination: opens the disk as soon as it is there.
        thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(client) = connect(&door, disk) {
                    // Who does not take it has ended.
                    let _ = sender.send(client);
                    return;
                }
                thread::sleep(LOOK);
            }
        });
        let stopped = Arc::clone(&stop);
        let mut writer = Writer::new(client, waiting, destination.to_owned(), disk);
        let thread = thread::spawn(move || writer.run(&stopped));
        Ok(Self { stop, thread })
    }

    /// Stops it when nothing is in flight; what it has seen, or what it died of.
    pub(crate) fn stop(self) -> Result<History, String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the guest's thread has panicked".to_owned())?
    }
}

/// Opens a disk.
pub(crate) fn connect(door: &Path, disk: &str) -> Result<Client, String> {
    let socket = Address::Unix(door.to_owned()).connect(DIAL).map_err(|error| error.to_string())?;
    let wants = Wants { structured: true, ..Wants::default() };
    Client::connect(Arc::new(socket), disk, wants).map_err(|error| error.to_string())
}

/// A write that is not acknowledged yet.
#[derive(Clone, Copy)]
struct Write {
    number: u64,
    block: u64,
    sent: Instant,
}

struct Writer {
    client: Client,
    /// The source's connection, when it is no longer the one in use.
    old: Option<Client>,
    waiting: Receiver<Client>,
    destination: PathBuf,
    disk: &'static str,
    random: Random,
    number: u64,
    in_flight: Vec<Write>,
    /// Refused, and to be sent again before anything else.
    again: VecDeque<Write>,
    /// Nothing is sent before this.
    rest_until: Instant,
    history: History,
}

impl Writer {
    fn new(client: Client, waiting: Receiver<Client>, destination: PathBuf, disk: &'static str) -> Self {
        Self {
            client,
            old: None,
            waiting,
            destination,
            disk,
            random: Random(1),
            number: 0,
            in_flight: Vec::with_capacity(WINDOW),
            again: VecDeque::new(),
            rest_until: Instant::now(),
            history: History::default(),
        }
    }

    fn run(&mut self, stop: &AtomicBool) -> Result<History, String> {
        let mut due = Instant::now();
        let mut flush_due = due;
        let mut heard = due;
        loop {
            let now = Instant::now();
            let stopping = stop.load(Ordering::Relaxed);
            if stopping && self.client.in_flight() == 0 && self.again.is_empty() {
                self.client.flush().map_err(|error| error.to_string())?;
                self.history.flushes += 1;
                self.ask_the_source();
                return Ok(std::mem::take(&mut self.history));
            }
            let mut lost = false;
            if now >= self.rest_until {
                lost |= self.send_again().is_err();
                if !stopping && now >= due && self.again.is_empty() {
                    lost |= self.send_new(now).is_err();
                    // What was missed in a pause is not made up for.
                    due = (due + WRITE_PERIOD).max(now.checked_sub(WRITE_PERIOD * 4).unwrap_or(now));
                }
                if now >= flush_due {
                    lost |= self.client.submit_flush(FLUSH).is_err();
                    flush_due = now + FLUSH_PERIOD;
                }
            }
            let next = if self.again.is_empty() { due } else { self.rest_until };
            let wait = next.saturating_duration_since(Instant::now()).clamp(AGAIN, WRITE_PERIOD);
            match self.receive(wait)? {
                Some(true) => heard = Instant::now(),
                Some(false) => {}
                None => lost = true,
            }
            if self.old.is_none() && (lost || (self.client.in_flight() == 0 && !self.again.is_empty())) {
                self.move_over()?;
            } else if lost {
                return Err("the destination closed the connection".to_owned());
            }
            if heard.elapsed() > PATIENCE {
                return Err(format!("no write was acknowledged for {} s", PATIENCE.as_secs()));
            }
        }
    }

    fn send_again(&mut self) -> Result<(), Lost> {
        if self.old.is_none() {
            return Ok(());
        }
        while let Some(write) = self.again.front().copied() {
            if !self.send(write)? {
                break;
            }
            self.again.pop_front();
        }
        Ok(())
    }

    fn send_new(&mut self, now: Instant) -> Result<(), Lost> {
        if self.in_flight.len() == WINDOW {
            return Ok(());
        }
        let blocks = self.client.info().size / BLOCK as u64;
        let block = self.random.next() % blocks;
        // Two writes of one block in flight have no order.
        if self.in_flight.iter().any(|write| write.block == block) {
            return Ok(());
        }
        let write = Write { number: self.number + 1, block, sent: now };
        if self.send(write)? {
            self.number += 1;
        }
        Ok(())
    }

    /// Whether the client took it.
    fn send(&mut self, write: Write) -> Result<bool, Lost> {
        let bytes = stamp(write.number, write.block);
        let taken = self.client.submit_write(write.number, write.block * BLOCK as u64, &bytes, false)?;
        if taken == Submitted::Taken {
            self.in_flight.push(write);
            if self.old.is_some() {
                self.history.moved.insert(write.block);
            }
        }
        Ok(taken == Submitted::Taken)
    }

    /// Takes what comes within `wait`. Whether a write was acknowledged; `None` if the connection is dead.
    fn receive(&mut self, wait: Duration) -> Result<Option<bool>, String> {
        if self.client.in_flight() == 0 {
            // Then the client would not wait.
            thread::sleep(wait);
            return Ok(Some(false));
        }
        let mut answers = Vec::new();
        let lost = self.client.wait(Some(wait), &mut |event| {
            if let Event::Done { cookie, result } = event {
                answers.push((cookie, result.map_err(|error| error.errno)));
            }
        });
        let now = Instant::now();
        let mut heard = false;
        for (cookie, result) in answers {
            if cookie == FLUSH {
                self.history.flushes += u64::from(result.is_ok());
                continue;
            }
            let Some(place) = self.in_flight.iter().position(|write| write.number == cookie) else { continue };
            let write = self.in_flight.swap_remove(place);
            match result {
                Ok(()) => {
                    heard = true;
                    self.acknowledge(write, now);
                }
                Err(wire::ESHUTDOWN) if self.old.is_none() => self.again.push_back(write),
                Err(wire::EPERM) if self.old.is_some() => {
                    self.again.push_back(write);
                    self.rest_until = now + AGAIN;
                }
                Err(errno) => {
                    let host = if self.old.is_none() { "source" } else { "destination" };
                    return Err(format!("a write at the {host}: {}", wire::error_name(errno)));
                }
            }
        }
        Ok(lost.is_ok().then_some(heard))
    }

    fn acknowledge(&mut self, write: Write, at: Instant) {
        let moved = self.old.is_some();
        let took = at.duration_since(write.sent);
        self.history.acknowledged.push(Acknowledged { block: write.block, at, took, moved });
        self.history.last.insert(write.block, write.number);
    }

    /// Goes on at the destination.
    fn move_over(&mut self) -> Result<(), String> {
        // Unanswered, and the connection is dead: done or not, nobody knows; sending them again is right either way.
        self.again.extend(self.in_flight.drain(..));
        let client = match self.waiting.try_recv() {
            Ok(client) => client,
            Err(_) => connect(&self.destination, self.disk).map_err(|cause| format!("at the destination: {cause}"))?,
        };
        self.old = Some(std::mem::replace(&mut self.client, client));
        Ok(())
    }

    /// One more write at the source, which must not be done.
    fn ask_the_source(&mut self) {
        let Some(old) = &mut self.old else { return };
        self.history.source_says = match old.write_all(0, &stamp(u64::MAX, 0)) {
            Ok(()) => "done".to_owned(),
            Err(error) => error.to_string(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_at_the_hand_over_is_told_from_the_others() {
        let start = Instant::now();
        let write = |ms, moved| Acknowledged {
            block: ms,
            at: start + Duration::from_millis(ms),
            took: Duration::from_millis(ms),
            moved,
        };
        let acknowledged = vec![write(0, false), write(4, false), write(5, false), write(14, true), write(16, true)];
        let history = History { acknowledged, ..History::default() };
        assert_eq!(history.pauses(), (Duration::from_millis(9), Duration::from_millis(4)));
        assert_eq!(history.changed_since(start + Duration::from_millis(1)), 2);
        let all = history.latency(start, start + PATIENCE);
        assert_eq!(all, (Duration::from_millis(5), Duration::from_millis(16)));
    }

    #[test]
    fn a_stamp_fills_its_block_and_is_like_no_other() {
        assert_eq!(stamp(7, 9).len(), BLOCK);
        assert_eq!(stamp(7, 9)[BLOCK - 16..BLOCK - 8], 7_u64.to_le_bytes());
        assert!(stamp(7, 9) != stamp(7, 10) && stamp(7, 9) != stamp(8, 9));
    }
}
