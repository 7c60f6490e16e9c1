//! A guest that knows what it wrote: random writes, write-zeroes, trims and flushes through the guest door, and after
//! the hand-over a look at every sector whether each acknowledged write is there.
//!
//! Every sector that is written carries a stamp: the seed, the number of the request and the sector's place. No two
//! requests that are under way touch the same sector, so that there is one answer to what it must hold: the last
//! acknowledged request's stamp, or that of the one that was sent and never answered. A [`Ledger`] knows both.

// Disks are small here.
#![allow(clippy::cast_possible_truncation)]

mod durable;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockferry::address::Address;
use blockferry::nbd::client::{Client, ConnectError, Event, Submitted, Wants};
use blockferry::nbd::wire;

use crate::host::PATIENCE;

const SECTOR: u64 = 512;
const WORDS: usize = 64;
const MIB: u64 = 1 << 20;

/// Random numbers that are the same for the same seed: xorshift64*.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    #[must_use]
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.roll() >> 11) % bound.max(1)
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (x ^ (x >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What a request does. Numbers in a [`Ledger`] begin at 1; 0 is what the disk held before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    Write,
    Zero,
    Trim,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    deed: Deed,
    first: u32,
    count: u32,
    /// Answered only when it is durable.
    fua: bool,
    /// When it was acknowledged, as a number that rises, and through which door.
    acknowledged: u64,
    door: usize,
}

/// How often which request is made, in relation to the others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mix {
    pub(crate) writes: u64,
    pub(crate) zeroes: u64,
    pub(crate) trims: u64,
    pub(crate) flushes: u64,
    /// Of 100 writes so many have FUA.
    pub(crate) fua: u64,
}

impl Mix {
    const NOTHING: Self = Self { writes: 0, zeroes: 0, trims: 0, flushes: 0, fua: 0 };
    pub(crate) const WRITES: Self = Self { writes: 1, zeroes: 0, trims: 0, flushes: 0, fua: 0 };
    pub(crate) const ALL: Self = Self { writes: 40, zeroes: 4, trims: 3, flushes: 1, fua: 0 };
    pub(crate) const ZEROES: Self = Self { writes: 10, zeroes: 10, trims: 10, flushes: 1, fua: 0 };
    /// For a guest whose host may lose its power.
    pub(crate) const DURABLE: Self = Self { writes: 40, zeroes: 4, trims: 0, flushes: 2, fua: 5 };
}

/// What a disk must hold.
#[derive(Debug)]
pub(crate) struct Ledger {
    seed: u64,
    sectors: u32,
    /// Percent of the mebibytes that held stamps at the beginning; the others were holes.
    full: u64,
    entries: Vec<Entry>,
    /// For each sector the request that was acknowledged last, and the one that is sent and not answered.
    settled: Vec<u32>,
    pending: Vec<u32>,
    /// For a sector whose last acknowledged request is a trim: the one before. It may read as either.
    before_trim: HashMap<u32, u32>,
    acknowledged: u64,
    /// What a power loss may bring back.
    past: durable::Past,
}

impl Ledger {
    /// Makes a file of `size` bytes of which about `full` percent hold data, and its ledger.
    #[must_use]
    pub(crate) fn format(path: &Path, size: u64, seed: u64, full: u64) -> Self {
        let sectors = u32::try_from(size / SECTOR).expect("a small disk");
        let ledger = Self {
            seed,
            sectors,
            full,
            entries: vec![Entry { deed: Deed::Write, first: 0, count: 0, fua: true, acknowledged: 0, door: 0 }],
            settled: vec![0; sectors as usize],
            pending: vec![0; sectors as usize],
            before_trim: HashMap::new(),
            acknowledged: 0,
            past: durable::Past::default(),
        };
        let file = File::create(path).expect("an image");
        file.set_len(size).expect("its size");
        let mut bytes = Vec::new();
        for first in (0..sectors).step_by((MIB / SECTOR) as usize).filter(|first| ledger.began_full(*first)) {
            let count = (sectors - first).min((MIB / SECTOR) as u32);
            ledger.payload(0, first, count, &mut bytes);
            file.write_all_at(&bytes, u64::from(first) * SECTOR).expect("written");
        }
        ledger
    }

    fn began_full(&self, sector: u32) -> bool {
        mix(self.seed ^ (u64::from(sector) * SECTOR / MIB)) % 100 < self.full
    }

    /// The bytes that request `number` writes to these sectors.
    fn payload(&self, number: u32, first: u32, count: u32, bytes: &mut Vec<u8>) {
        bytes.clear();
        for sector in first..first + count {
            for word in stamp(self.seed, number, sector) {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// The next request: somewhere, half of the time in a small part of the disk, never where another is under way.
    fn begin(&mut self, dice: &mut Dice, mix: Mix) -> Option<u32> {
        let deed = match dice.below(mix.writes + mix.zeroes + mix.trims) {
            n if n < mix.writes => Deed::Write,
            n if n < mix.writes + mix.zeroes => Deed::Zero,
            _ => Deed::Trim,
        };
        // 512 bytes to 64 KiB; now and then what does not fit one buffer.
        let longest = if dice.below(64) == 0 { 1024 } else { 128 };
        let count = u32::try_from(1 + dice.below(longest)).expect("small").min(self.sectors);
        let count = if count > 8 && dice.below(2) == 0 { count & !7 } else { count };
        for _ in 0..8 {
            let within = if dice.below(2) == 0 { self.sectors / 16 } else { self.sectors };
            let first = u32::try_from(dice.below(u64::from(within))).expect("small").min(self.sectors - count);
            let first = if dice.below(2) == 0 { first & !7 } else { first };
            let range = first as usize..(first + count) as usize;
            if self.pending[range.clone()].iter().all(|number| *number == 0) {
                let number = u32::try_from(self.entries.len()).expect("fewer requests");
                let fua = mix.fua > 0 && deed == Deed::Write && dice.below(100) < mix.fua;
                self.entries.push(Entry { deed, first, count, fua, acknowledged: 0, door: 0 });
                self.pending[range].fill(number);
                return Some(number);
            }
        }
        None
    }

    /// Request `number` was answered with success, through this door.
    fn acknowledge(&mut self, number: u32, door: usize) {
        self.acknowledged += 1;
        let entry = &mut self.entries[number as usize];
        (entry.acknowledged, entry.door) = (self.acknowledged, door);
        let entry = *entry;
        self.remember_past(&entry);
        for sector in entry.first..entry.first + entry.count {
            let place = sector as usize;
            if entry.deed == Deed::Trim {
                let before = self.settled[place];
                let was_trim = before != 0 && self.entries[before as usize].deed == Deed::Trim;
                if !was_trim {
                    self.before_trim.insert(sector, before);
                }
            }
            self.settled[place] = number;
            self.pending[place] = 0;
        }
    }

    /// How many requests were acknowledged.
    #[must_use]
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Believes in a write that nobody made: for whoever wants to see that it is missed.
    pub(crate) fn invent(&mut self, seed: u64) {
        let number = self.begin(&mut Dice::new(seed), Mix::WRITES).expect("nothing is under way");
        self.acknowledge(number, 0);
    }

    /// Whether a sector may hold `bytes` if request `number` was the last.
    fn fits(&self, number: u32, sector: u32, bytes: &[u8]) -> bool {
        let zero = || bytes.iter().all(|byte| *byte == 0);
        match self.entries[number as usize].deed {
            Deed::Write if number == 0 && !self.began_full(sector) => zero(),
            Deed::Write => {
                let words = stamp(self.seed, number, sector);
                bytes.chunks_exact(8).zip(words).all(|(bytes, word)| bytes == word.to_le_bytes())
            }
            Deed::Zero => zero(),
            Deed::Trim => {
                let before = self.before_trim.get(&sector).copied().unwrap_or(0);
                zero() || self.fits(before, sector, bytes)
            }
        }
    }

    /// What somebody made of a sector, in words.
    fn describe(&self, sector: u32, bytes: &[u8]) -> String {
        if bytes.iter().all(|byte| *byte == 0) {
            return "zeroes".to_owned();
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
        let number = word(1);
        match u32::try_from(number) {
            Ok(number) if word(0) == self.seed && word(2) == u64::from(sector) => {
                let whole = (number as usize) < self.entries.len() && self.fits(number, sector, bytes);
                format!("{} {number}", if whole { "write" } else { "part of write" })
            }
            _ => "something nobody wrote".to_owned(),
        }
    }

    /// Notes a sector that holds what it must not.
    fn complain(&self, report: &mut Report, sector: u32, bytes: &[u8]) {
        report.wrong += 1;
        if report.lines.len() < 8 {
            let (settled, pending) = (self.settled[sector as usize], self.pending[sector as usize]);
            let deed = self.entries[settled as usize].deed;
            let or = if pending == 0 { String::new() } else { format!(" or {pending}") };
            let found = self.describe(sector, bytes);
            report.lines.push(format!("sector {sector}: {deed:?} {settled}{or} expected, {found} found"));
        }
    }

    /// Looks at every sector. `read` fills a buffer from an offset.
    #[must_use]
    pub(crate) fn verify(&self, mut read: impl FnMut(u64, &mut [u8])) -> Report {
        let mut report = Report::default();
        let mut buffer = vec![0; MIB as usize];
        for first in (0..self.sectors).step_by((MIB / SECTOR) as usize) {
            let count = (self.sectors - first).min((MIB / SECTOR) as u32);
            let piece = &mut buffer[..count as usize * SECTOR as usize];
            read(u64::from(first) * SECTOR, piece);
            for (sector, bytes) in (first..).zip(piece.chunks_exact(SECTOR as usize)) {
                let (settled, pending) = (self.settled[sector as usize], self.pending[sector as usize]);
                report.sectors += 1;
                if self.fits(settled, sector, bytes) || (pending != 0 && self.fits(pending, sector, bytes)) {
                    continue;
                }
                self.complain(&mut report, sector, bytes);
            }
        }
        report
    }

    /// The same for an image.
    #[must_use]
    pub(crate) fn verify_file(&self, path: &Path) -> Report {
        let file = File::open(path).expect("an image");
        self.verify(|offset, buffer| file.read_exact_at(buffer, offset).expect("read"))
    }

    /// The same through a guest door.
    #[must_use]
    pub(crate) fn verify_door(&self, mut client: Client) -> Report {
        assert_eq!(client.info().size, u64::from(self.sectors) * SECTOR);
        let report = self.verify(|offset, buffer| client.read_exact(offset, buffer).expect("read"));
        client.disconnect();
        report
    }
}

/// A sector's content, as numbers.
fn stamp(seed: u64, number: u32, sector: u32) -> [u64; WORDS] {
    let mut dice = Dice::new(seed ^ (u64::from(number) << 32) ^ u64::from(sector));
    let mut words = std::array::from_fn(|_| dice.roll() | 1);
    (words[0], words[1], words[2]) = (seed, u64::from(number), u64::from(sector));
    words
}

/// What a verification found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) sectors: u64,
    pub(crate) wrong: u64,
    lines: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} sectors are wrong; {}", self.wrong, self.sectors, self.lines.join("; "))
    }
}

impl Report {
    /// Nothing is missing.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        assert_eq!(self.wrong, 0, "{self}");
    }
}

/// What a writer does when its connection is lost or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnLoss {
    /// It ends.
    Stop,
    /// It connects again and sends again what was not answered, as QEMU does. When it is told that this host has given
    /// the guest away (ESHUTDOWN), it goes on at the next door.
    Reconnect,
    /// The same, and it goes on at the next door, too, where this one does not let it write: it looks for the owner.
    Follow,
}

/// How a writer writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) seed: u64,
    pub(crate) connections: u64,
    pub(crate) depth: usize,
    pub(crate) mix: Mix,
    /// Requests a second on each connection; 0 is as many as possible.
    pub(crate) rate: u32,
    pub(crate) on_loss: OnLoss,
}

/// A writer at work.
#[derive(Debug)]
pub(crate) struct Writer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    load: Load,
    disk: String,
    doors: Vec<Address>,
    ledger: Mutex<Ledger>,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    reconnected: AtomicU64,
    /// How many connections are open at each door.
    inside: Vec<AtomicU64>,
    /// Anything that no guest should ever see.
    faults: Mutex<Vec<String>>,
}

impl Writer {
    /// Writes to `disk` at the first of `doors`.
    #[must_use]
    pub(crate) fn start(load: Load, ledger: Ledger, disk: &str, doors: &[&Address]) -> Self {
        let shared = Arc::new(Shared {
            load,
            disk: disk.to_owned(),
            doors: doors.iter().map(|door| (*door).clone()).collect(),
            ledger: Mutex::new(ledger),
            stop: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            reconnected: AtomicU64::new(0),
            inside: doors.iter().map(|_| AtomicU64::new(0)).collect(),
            faults: Mutex::default(),
        });
        let threads = (0..load.connections).map(|number| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.run(number))
        });
        Self { threads: threads.collect(), shared }
    }

    /// Requests acknowledged so far.
    #[must_use]
    pub(crate) fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// How often a connection was opened again, or tried to.
    #[must_use]
    pub(crate) fn reconnected(&self) -> u64 {
        self.shared.reconnected.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests are acknowledged: it is alive.
    pub(crate) fn until_more(&self, count: u64) {
        let goal = self.acknowledged() + count;
        crate::harness::until_within(PATIENCE, &format!("{count} more writes"), || {
            assert!(self.shared.faults().is_empty(), "{:?}", self.shared.faults());
            (self.acknowledged() >= goal).then_some(())
        });
    }

    /// Waits until nobody expects an answer through this door any more, whose process is dead.
    pub(crate) fn until_left(&self, door: usize) {
        let inside = &self.shared.inside[door];
        crate::harness::until("end of the connections", || (inside.load(Ordering::SeqCst) == 0).then_some(()));
    }

    /// Does something with what the disk must hold, while nobody else does.
    pub(crate) fn with_ledger<T>(&self, look: impl FnOnce(&mut Ledger) -> T) -> T {
        look(&mut self.shared.ledger())
    }

    /// Ends it. Returns what the disk must hold.
    #[must_use]
    pub(crate) fn finish(self) -> Ledger {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no panic");
        }
        let shared = Arc::into_inner(self.shared).expect("all threads are joined");
        let faults = shared.faults.into_inner().expect("no panic");
        assert!(faults.is_empty(), "{faults:?}");
        shared.ledger.into_inner().expect("no panic")
    }
}

const FLUSH: u64 = u64::MAX;

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("no panic")
    }

    fn faults(&self) -> MutexGuard<'_, Vec<String>> {
        self.faults.lock().expect("no panic")
    }

    fn fault(&self, fault: String) {
        self.faults().push(fault);
    }

    fn run(&self, number: u64) {
        let mut dice = Dice::new(self.load.seed.wrapping_add(number * 7919));
        let mut door = 0;
        // Sent and not answered, in order; sent again first of all.
        let mut again: VecDeque<u32> = VecDeque::new();
        while let Some(client) = self.connect(&mut door) {
            let place = door % self.doors.len();
            self.inside[place].fetch_add(1, Ordering::SeqCst);
            let end = self.write(client, place, &mut dice, &mut again);
            self.inside[place].fetch_sub(1, Ordering::SeqCst);
            match (end, self.load.on_loss) {
                (End::Stopped, _) | (_, OnLoss::Stop) => return,
                (End::Given, OnLoss::Reconnect) => door += 1,
                (End::Given | End::NotYet, OnLoss::Follow) => {
                    door += 1;
                    thread::park_timeout(PAUSE);
                }
                (End::Lost | End::NotYet, OnLoss::Reconnect) | (End::Lost, OnLoss::Follow) => {}
            }
            self.reconnected.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connects, again and again; `None` when there is no use in it.
    fn connect(&self, door: &mut usize) -> Option<Client> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let place = &self.doors[*door % self.doors.len()];
            let opened = place.connect(PATIENCE).map_err(|error| error.to_string()).and_then(|socket| {
                let result = Client::connect(Arc::new(socket), &self.disk, Wants::default());
                if let Err(ConnectError::Refused { reply, .. }) = &result
                    && (self.load.on_loss == OnLoss::Follow || *reply == wire::REP_ERR_SHUTDOWN)
                {
                    *door += 1;
                }
                result.map_err(|error| error.to_string())
            });
            match (opened, self.load.on_loss) {
                (Ok(client), _) => return Some(client),
                (Err(_), OnLoss::Stop) => return None,
                (Err(_), OnLoss::Reconnect | OnLoss::Follow) => {
                    self.reconnected.fetch_add(1, Ordering::Relaxed);
                    thread::park_timeout(PAUSE);
                }
            }
        }
        self.fault(format!("disk {}: no connection within {PATIENCE:?}", self.disk));
        None
    }

    fn write(&self, mut client: Client, door: usize, dice: &mut Dice, again: &mut VecDeque<u32>) -> End {
        let mut flying: VecDeque<u32> = VecDeque::new();
        let end = self.write_until(&mut client, door, dice, again, &mut flying);
        // In front of what was not sent again yet, in the order in which they were sent.
        while let Some(number) = flying.pop_back() {
            again.push_front(number);
        }
        end
    }

    fn write_until(
        &self,
        client: &mut Client,
        door: usize,
        dice: &mut Dice,
        again: &mut VecDeque<u32>,
        flying: &mut VecDeque<u32>,
    ) -> End {
        let mut end = None;
        let mut due = Instant::now();
        let mut flushed = false;
        // How many requests were acknowledged when each FLUSH under way was sent; whichever is answered, the first
        // number is safe.
        let mut flushes: VecDeque<u64> = VecDeque::new();
        let mut heard = Instant::now();
        loop {
            let stopping = self.stop.load(Ordering::Relaxed);
            while end.is_none()
                && client.in_flight() < self.load.depth
                && (self.load.rate == 0 || Instant::now() >= due)
            {
                let next = match again.pop_front() {
                    Some(number) => Some(number),
                    None if stopping => None,
                    None => self.ledger().begin(dice, self.load.mix),
                };
                let Some(number) = next else { break };
                flying.push_back(number);
                if self.submit(client, number).is_err() {
                    return End::Lost;
                }
                due += Duration::from_secs(1) / self.load.rate.max(1);
                let mix = self.load.mix;
                if mix.flushes > 0 && dice.below(mix.writes + mix.zeroes + mix.trims + mix.flushes) < mix.flushes {
                    // Full is no harm: another time.
                    if self.flush(client, &mut flushes).is_err() {
                        return End::Lost;
                    }
                }
            }
            if client.in_flight() == 0 {
                match end {
                    Some(end) => return end,
                    None if stopping && again.is_empty() && flushed => return End::Stopped,
                    None if stopping && again.is_empty() => {
                        flushed = true;
                        if self.flush(client, &mut flushes).is_err() {
                            return End::Lost;
                        }
                    }
                    None => {}
                }
            }
            let patience = if client.in_flight() == 0 { due.saturating_duration_since(Instant::now()) } else { TURN };
            let answers = client.wait(Some(patience.min(TURN)), &mut |event| {
                let Event::Done { cookie, result } = event else { return };
                let told = match result {
                    Ok(()) => None,
                    Err(error) if error.errno == wire::ESHUTDOWN => Some(End::Given),
                    Err(error) if error.errno == wire::EPERM => Some(End::NotYet),
                    Err(error) => {
                        self.fault(format!("disk {}: request {cookie}: {error}", self.disk));
                        Some(End::NotYet)
                    }
                };
                let before_flush = if cookie == FLUSH { flushes.pop_front() } else { None };
                if let Some(told) = told {
                    end = Some(told);
                } else if let Some(before) = before_flush {
                    self.ledger().flushed(before);
                } else {
                    let number = u32::try_from(cookie).expect("a request's number");
                    flying.retain(|flying| *flying != number);
                    self.ledger().acknowledge(number, door);
                    self.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
            });
            match answers {
                Err(_) => return End::Lost,
                Ok(0) if client.in_flight() > 0 && heard.elapsed() > PATIENCE => {
                    self.fault(format!("disk {}: no answer within {PATIENCE:?}", self.disk));
                    return End::Stopped;
                }
                Ok(0) => {}
                Ok(_) => heard = Instant::now(),
            }
            if client.in_flight() == 0 {
                heard = Instant::now();
            }
        }
    }

    fn flush(&self, client: &mut Client, flushes: &mut VecDeque<u64>) -> Result<(), ()> {
        let acknowledged = self.ledger().acknowledged();
        match client.submit_flush(FLUSH) {
            Ok(Submitted::Taken) => flushes.push_back(acknowledged),
            Ok(Submitted::WaitFirst) => {}
            Err(_) => return Err(()),
        }
        Ok(())
    }

    fn submit(&self, client: &mut Client, number: u32) -> Result<(), ()> {
        let (entry, payload) = {
            let ledger = self.ledger();
            let entry = ledger.entries[number as usize];
            let mut payload = Vec::new();
            if entry.deed == Deed::Write {
                ledger.payload(number, entry.first, entry.count, &mut payload);
            }
            (entry, payload)
        };
        let (offset, length) = (u64::from(entry.first) * SECTOR, entry.count * SECTOR as u32);
        let submitted = match entry.deed {
            Deed::Write => client.submit_write(u64::from(number), offset, &payload, entry.fua),
            Deed::Zero => {
                client.submit_write_zeroes(u64::from(number), offset, length, number.is_multiple_of(2), false)
            }
            Deed::Trim => client.submit_trim(u64::from(number), offset, length),
        };
        match submitted {
            Ok(Submitted::Taken) => Ok(()),
            Ok(Submitted::WaitFirst) => panic!("the depth is below the window"),
            Err(_) => Err(()),
        }
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The writer was told to.
    Stopped,
    /// It broke.
    Lost,
    /// This host has given the guest away.
    Given,
    /// This host does not own the guest.
    NotYet,
}

/// Pause between two tries to connect: as QEMU's reconnect-delay, only shorter.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest wait for answers before it looks for orders.
const TURN: Duration = Duration::from_millis(10);

// ---- the verifier can fail ---------------------------------------------------------------------------------------

mod tests {
    use super::*;
    use crate::harness::scratch;

    /// Does what a server would do.
    pub(super) fn apply(ledger: &Ledger, number: u32, image: &File) {
        let entry = ledger.entries[number as usize];
        let mut bytes = vec![0; entry.count as usize * SECTOR as usize];
        if entry.deed == Deed::Write {
            ledger.payload(number, entry.first, entry.count, &mut bytes);
        }
        image.write_all_at(&bytes, u64::from(entry.first) * SECTOR).expect("written");
    }

    /// A disk after some thousand requests, all applied and acknowledged.
    fn used(folder: &Path) -> (Ledger, File, Dice) {
        let path = folder.join("disk");
        let mut ledger = Ledger::format(&path, 4 * MIB, 3, 50);
        let image = File::options().read(true).write(true).open(&path).expect("the image");
        let mut dice = Dice::new(3);
        for _ in 0..2000 {
            let number = ledger.begin(&mut dice, Mix::ALL).expect("nothing is under way");
            apply(&ledger, number, &image);
            ledger.acknowledge(number, 0);
        }
        (ledger, image, dice)
    }

    #[test]
    fn a_disk_with_every_write_is_whole() {
        let folder = scratch();
        let (mut ledger, image, mut dice) = used(folder.path());
        let path = folder.path().join("disk");
        assert_eq!(ledger.verify_file(&path), Report { sectors: 8192, ..Report::default() });
        // Sent and not answered: it may be there or not.
        let number = ledger.begin(&mut dice, Mix::WRITES).expect("nothing is under way");
        ledger.verify_file(&path).assert_whole();
        apply(&ledger, number, &image);
        ledger.verify_file(&path).assert_whole();
    }

    #[test]
    fn one_corrupt_sector_is_found() {
        let folder = scratch();
        let (ledger, image, _) = used(folder.path());
        let at = (0..8192).find(|sector| ledger.entries[ledger.settled[*sector] as usize].deed == Deed::Write);
        let at = at.expect("a written sector") as u64 * SECTOR;
        let mut byte = [0];
        image.read_exact_at(&mut byte, at + 511).expect("read");
        image.write_all_at(&[byte[0] ^ 1], at + 511).expect("written");
        let report = ledger.verify_file(&folder.path().join("disk"));
        assert_eq!(report.wrong, 1);
        assert!(report.to_string().contains("found"), "{report}");
    }

    #[test]
    fn one_dropped_write_is_found() {
        let folder = scratch();
        let (mut ledger, image, mut dice) = used(folder.path());
        let number = ledger.begin(&mut dice, Mix::WRITES).expect("nothing is under way");
        ledger.acknowledge(number, 0);
        let report = ledger.verify_file(&folder.path().join("disk"));
        assert_eq!(report.wrong, u64::from(ledger.entries[number as usize].count), "{report}");
        assert!(report.to_string().contains(&format!("Write {number} expected")), "{report}");
        apply(&ledger, number, &image);
        ledger.verify_file(&folder.path().join("disk")).assert_whole();
    }

    #[test]
    fn an_older_write_in_the_place_of_a_newer_one_is_found() {
        let folder = scratch();
        let (mut ledger, image, _) = used(folder.path());
        let old = (1..).find(|number| ledger.entries[*number as usize].deed == Deed::Write).expect("a write");
        let entry = ledger.entries[old as usize];
        let new = u32::try_from(ledger.entries.len()).expect("few");
        ledger.entries.push(entry);
        apply(&ledger, new, &image);
        ledger.acknowledge(new, 0);
        ledger.verify_file(&folder.path().join("disk")).assert_whole();
        apply(&ledger, old, &image);
        let report = ledger.verify_file(&folder.path().join("disk"));
        assert_eq!(report.wrong, u64::from(entry.count));
        assert!(report.to_string().contains(&format!("write {old} found")), "{report}");
    }

    #[test]
    fn zeroes_that_did_not_arrive_are_found() {
        let folder = scratch();
        let (mut ledger, _image, mut dice) = used(folder.path());
        let zeroes = Mix { zeroes: 1, ..Mix::NOTHING };
        let written = |ledger: &Ledger, number: u32| {
            let entry = ledger.entries[number as usize];
            (entry.first..entry.first + entry.count).any(|s| ledger.fits(ledger.settled[s as usize], s, &[0; 512]))
        };
        let number = loop {
            let number = ledger.begin(&mut dice, zeroes).expect("nothing is under way");
            if !written(&ledger, number) {
                break number;
            }
        };
        ledger.acknowledge(number, 0);
        let report = ledger.verify_file(&folder.path().join("disk"));
        assert_eq!(report.wrong, u64::from(ledger.entries[number as usize].count), "{report}");
    }
}
