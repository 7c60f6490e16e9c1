//! A guest that is moved while it runs: it writes at a set rate, keeps in its memory what was acknowledged,
//! measures its own longest pause, and compares its whole disk with its memory whenever it is asked.
//!
//! The memory is what makes it a witness: it moves with the guest, and nobody outside writes into it. A write
//! counts as acknowledged when the disk has said so (`O_DIRECT`: no page cache stands between), and a block must
//! hold its last acknowledged stamp; only the one write that failed may be there or not.
//!
//! **The clock.** A machine's own clock stands still while the machine does, so a guest cannot see by it how long
//! it was away. A second device helps: each read of it gives the time of the host ([`Clock`]). The writer reads it
//! after each acknowledgement; the longest pause is the largest difference of two of these. The guest's own clock
//! is watched too, by a ticker, and the report says both.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::writer::mix;

/// What is written at once, and what a device reads and writes past the page cache at least.
const BLOCK: usize = 4096;
/// What is read at once when everything is compared.
const PIECE: usize = 1 << 20;
/// Writes between two flushes.
const FLUSH_EVERY: u64 = 50;
/// How often the ticker looks at the guest's own clock.
const TICK: Duration = Duration::from_millis(2);
/// The first bytes of every sector of a clock.
const CLOCK_MAGIC: &[u8; 8] = b"HOSTTIME";

/// A guest that runs.
pub(crate) struct Live {
    shared: Arc<Shared>,
}

struct Shared {
    disk: File,
    clock: Clock,
    period: Duration,
    /// Who has it may use the disk: the writer for one write, or the comparison.
    turn: Mutex<()>,
    flushes: AtomicU64,
    memory: Mutex<Memory>,
    /// Longest step of the guest's own clock, in microseconds.
    tick_us: AtomicU64,
}

/// What the guest knows of its disk.
struct Memory {
    /// For each block the number of its last acknowledged write; 0: none.
    last: Vec<u64>,
    /// Writes that were acknowledged, and those among them that a flush has confirmed.
    acknowledged: u64,
    flushed: u64,
    /// The write that failed, its block and number: it may be there or not.
    failed: Option<(usize, u64, String)>,
    /// The host's time at the last acknowledgement since the writer began or went on.
    at_us: Option<u64>,
    /// The longest time between two acknowledgements, and the number of the write at its end.
    pause_us: u64,
    pause_before: u64,
}

impl Live {
    /// Stamps every second MiB of a device, leaves the others as they are, and starts writing, so many times a second.
    /// The device was all zeroes.
    pub(crate) fn start(device: &str, clock: &str, rate: u64) -> Result<Self, String> {
        let disk = open(device, true)?;
        let blocks = blocks(&disk).map_err(|cause| format!("{device}: {cause}"))?;
        let clock = Clock::open(clock)?;
        let period = Duration::from_secs(1).checked_div(u32::try_from(rate).unwrap_or(0)).ok_or("no rate")?;
        let mut piece = Aligned::new(PIECE);
        for first in (0..blocks).step_by(PIECE / BLOCK).filter(|first| is_stamped(*first)) {
            let count = (PIECE / BLOCK).min(blocks - first);
            for (block, content) in (first..).zip(piece.bytes()[..count * BLOCK].chunks_exact_mut(BLOCK)) {
                stamp(content, block, 0);
            }
            disk.write_all_at(&piece.bytes()[..count * BLOCK], offset(first)).map_err(|error| error.to_string())?;
        }
        disk.sync_data().map_err(|error| format!("{device}: {error}"))?;
        let memory = Memory {
            last: vec![0; blocks],
            acknowledged: 0,
            flushed: 0,
            failed: None,
            at_us: None,
            pause_us: 0,
            pause_before: 0,
        };
        let shared = Arc::new(Shared {
            disk,
            clock,
            period,
            turn: Mutex::new(()),
            flushes: AtomicU64::new(0),
            memory: Mutex::new(memory),
            tick_us: AtomicU64::new(0),
        });
        let (writer, ticker) = (Arc::clone(&shared), Arc::clone(&shared));
        thread::spawn(move || writer.write());
        thread::spawn(move || ticker.tick());
        Ok(Self { shared })
    }

    /// Forgets the longest pause so far.
    pub(crate) fn mark(&self) -> String {
        let mut memory = self.shared.memory();
        (memory.pause_us, memory.pause_before) = (0, 0);
        self.shared.tick_us.store(0, Ordering::SeqCst);
        format!("writes={}", memory.acknowledged)
    }

    /// What it has seen: writes, and the longest pause since the last `mark`.
    pub(crate) fn report(&self) -> Result<String, String> {
        let memory = self.shared.memory();
        if let Some((block, number, cause)) = &memory.failed {
            return Err(format!("write {number} to block {block}: {cause}"));
        }
        Ok(format!(
            "writes={} flushed={} flushes={} pause_us={} before={} own_clock_us={}",
            memory.acknowledged,
            memory.flushed,
            self.shared.flushes.load(Ordering::SeqCst),
            memory.pause_us,
            memory.pause_before,
            self.shared.tick_us.load(Ordering::SeqCst)
        ))
    }

    /// Compares the whole disk with what it remembers, while the writer holds still between two writes; then the writer
    /// goes on. `lost`: blocks that hold an older stamp than the acknowledged one. `wrong`: blocks that hold anything
    /// else.
    pub(crate) fn check(&self) -> Result<String, String> {
        let turn = self.shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = self.shared.memory();
        let checked = compare(&self.shared.disk, &memory.last, memory.failed.as_ref().map(|it| (it.0, it.1)));
        // That was no pause.
        memory.at_us = None;
        drop(turn);
        checked
    }
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer: until a write fails.
    fn write(&self) {
        let mut content = Aligned::new(BLOCK);
        let blocks = self.memory().last.len();
        let mut next = Instant::now();
        for number in 1.. {
            let now = Instant::now();
            // What it has missed, it does not make up for.
            next = (next + self.period).max(now);
            thread::sleep(next - now);
            let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let block = place(number, blocks);
            stamp(content.bytes(), block, number);
            let written = self.disk.write_all_at(content.bytes(), offset(block)).map_err(|error| error.to_string());
            let flushes = number % FLUSH_EVERY == 0;
            let mut done = written.and_then(|()| self.acknowledge(block, number));
            if done.is_ok() && flushes {
                done = self.disk.sync_data().map_err(|error| format!("flush: {error}"));
                self.flushes.fetch_add(1, Ordering::SeqCst);
                self.memory().flushed = number;
            }
            if let Err(cause) = done {
                self.memory().failed = Some((block, number, cause));
                return;
            }
        }
    }

    /// A write was acknowledged.
    fn acknowledge(&self, block: usize, number: u64) -> Result<(), String> {
        // The time is asked for after the acknowledgement: what comes between belongs to the next write's pause.
        let mut memory = self.memory();
        memory.last[block] = number;
        memory.acknowledged = number;
        drop(memory);
        let now_us = self.clock.read_us()?;
        let mut memory = self.memory();
        if let Some(before_us) = memory.at_us.replace(now_us) {
            let pause_us = now_us.saturating_sub(before_us);
            if pause_us > memory.pause_us {
                (memory.pause_us, memory.pause_before) = (pause_us, number);
            }
        }
        Ok(())
    }

    /// The ticker: watches the guest's own clock.
    fn tick(&self) {
        let mut before = Instant::now();
        loop {
            thread::sleep(TICK);
            let now = Instant::now();
            let step_us = u64::try_from((now - before).as_micros()).unwrap_or(u64::MAX);
            self.tick_us.fetch_max(step_us, Ordering::SeqCst);
            before = now;
        }
    }
}

/// A device whose every sector holds the host's time when it was read: a magic, then nanoseconds, little-endian.
struct Clock {
    device: File,
    sector: Mutex<Aligned>,
}

impl Clock {
    fn open(device: &str) -> Result<Self, String> {
        let clock = Self { device: open(device, false)?, sector: Mutex::new(Aligned::new(BLOCK)) };
        clock.read_us().map(|_| clock).map_err(|cause| format!("{device}: {cause}"))
    }

    fn read_us(&self) -> Result<u64, String> {
        let mut sector = self.sector.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = sector.bytes();
        self.device.read_exact_at(bytes, 0).map_err(|error| format!("clock: {error}"))?;
        match (&bytes[..8] == CLOCK_MAGIC, bytes[8..16].try_into()) {
            (true, Ok(ns)) => Ok(u64::from_le_bytes(ns) / 1000),
            _ => Err("is no clock".to_owned()),
        }
    }
}

/// Bytes at a place in memory that a device can read and write by itself.
struct Aligned {
    memory: Vec<u8>,
    first: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let memory = vec![0; length + BLOCK];
        let first = memory.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { memory, first, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..self.first + self.length]
    }
}

/// Opens a device past the page cache.
fn open(device: &str, writes: bool) -> Result<File, String> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).map_err(|error| error.to_string())?;
    let file = OpenOptions::new().read(true).write(writes).custom_flags(direct).open(device);
    file.map_err(|error| format!("{device}: {error}"))
}

fn blocks(mut disk: &File) -> Result<usize, String> {
    let size = disk.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
    let blocks = usize::try_from(size).map_err(|error| error.to_string())? / BLOCK;
    if blocks == 0 { Err("has no size".to_owned()) } else { Ok(blocks) }
}

fn offset(block: usize) -> u64 {
    (block * BLOCK) as u64
}

/// Whether a block is stamped before the writer begins: every second MiB is.
fn is_stamped(block: usize) -> bool {
    (block / (PIECE / BLOCK)).is_multiple_of(2)
}

/// The block of a write.
fn place(number: u64, blocks: usize) -> usize {
    usize::try_from(mix(number) % blocks as u64).unwrap_or_default()
}

/// The content of a block after a write; number 0: before the first one.
fn stamp(content: &mut [u8], block: usize, number: u64) {
    let key = mix(number ^ mix(block as u64));
    for (word, at) in content.chunks_exact_mut(8).zip(0_u64..) {
        let value = match at {
            0 => number,
            1 => block as u64,
            _ => key.wrapping_mul(2 * at + 1),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Whether a block holds what it is to hold after the write `number`.
fn holds(content: &[u8], expected: &mut [u8], block: usize, number: u64) -> bool {
    if number == 0 && !is_stamped(block) {
        return content.iter().all(|byte| *byte == 0);
    }
    stamp(expected, block, number);
    content == expected
}

/// Compares a disk with what is remembered of it. `open`: a write of which nobody knows whether it was done.
fn compare(disk: &File, last: &[u64], open: Option<(usize, u64)>) -> Result<String, String> {
    let (mut piece, mut expected) = (Aligned::new(PIECE), vec![0; BLOCK]);
    let (mut written, mut lost, mut wrong, mut first) = (0_u64, 0_u64, 0_u64, None);
    for (chunk, at) in last.chunks(PIECE / BLOCK).zip((0..).step_by(PIECE / BLOCK)) {
        let bytes = &mut piece.bytes()[..chunk.len() * BLOCK];
        disk.read_exact_at(bytes, offset(at)).map_err(|error| format!("block {at}: {error}"))?;
        for ((number, block), content) in chunk.iter().zip(at..).zip(bytes.chunks_exact(BLOCK)) {
            written += u64::from(*number > 0);
            let is_right = holds(content, &mut expected, block, *number)
                || open.is_some_and(|(at, later)| at == block && holds(content, &mut expected, block, later));
            if is_right {
                continue;
            }
            let found = u64::from_le_bytes(content[..8].try_into().unwrap_or_default());
            let is_older = found < *number && holds(content, &mut expected, block, found);
            if is_older {
                lost += 1
            } else {
                wrong += 1
            }
            first.get_or_insert_with(|| format!(" first=block {block}, is of {found}, not of {number}"));
        }
    }
    let counts = format!("blocks={} written={written} lost={lost} wrong={wrong}", last.len());
    Ok(counts + &first.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as it is after writes 1 to `count`, and what is remembered of them.
    fn written(name: &str, count: u64) -> (std::path::PathBuf, File, Vec<u64>) {
        const BLOCKS: usize = 4 * PIECE / BLOCK;
        let path = std::env::temp_dir().join(format!("testguest-live-{name}-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).expect("a file");
        file.set_len(offset(BLOCKS)).expect("a size");
        let (mut last, mut content) = (vec![0; BLOCKS], vec![0; BLOCK]);
        for block in (0..BLOCKS).filter(|block| is_stamped(*block)) {
            stamp(&mut content, block, 0);
            file.write_all_at(&content, offset(block)).expect("written");
        }
        for number in 1..=count {
            let block = place(number, BLOCKS);
            stamp(&mut content, block, number);
            file.write_all_at(&content, offset(block)).expect("written");
            last[block] = number;
        }
        (path, file, last)
    }

    #[test]
    fn a_whole_disk_is_compared_with_what_is_remembered() {
        let (path, file, mut last) = written("whole", 300);
        let distinct = last.iter().filter(|number| **number > 0).count();
        let good = format!("blocks=1024 written={distinct} lost=0 wrong=0");
        assert_eq!(compare(&file, &last, None), Ok(good.clone()));
        // Write 301 was acknowledged and is not there; or nobody knows.
        let block = place(301, last.len());
        let before = std::mem::replace(&mut last[block], 301);
        let said = compare(&file, &last, None).expect("readable");
        assert!(said.contains(" lost=1 wrong=0 first=block "), "{said}");
        last[block] = before;
        assert_eq!(compare(&file, &last, Some((block, 301))), Ok(good));
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn lost_torn_misplaced_and_unwanted_blocks_are_counted() {
        let (path, file, mut last) = written("bad", 300);
        let count = |last: &[u64]| compare(&file, last, None).expect("readable");
        let mut content = vec![0; BLOCK];
        // A write came back from the past.
        let block = place(300, last.len());
        last[block] = 305;
        assert!(count(&last).contains(" lost=1 wrong=0 first=block "), "{}", count(&last));
        last[block] = 300;
        // One word of another write.
        file.write_all_at(&[0xff; 8], offset(block) + 4000).expect("written");
        assert!(count(&last).contains(" lost=0 wrong=1 "), "{}", count(&last));
        stamp(&mut content, block, 300);
        file.write_all_at(&content, offset(block)).expect("written");
        // Something where there was nothing: a neighbour's stamp.
        let hole = (0..last.len()).find(|block| !is_stamped(*block) && last[*block] == 0).expect("a hole");
        stamp(&mut content, hole + 1, 0);
        file.write_all_at(&content, offset(hole)).expect("written");
        assert!(count(&last).contains(" lost=0 wrong=1 "), "{}", count(&last));
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn memory_is_aligned() {
        for length in [BLOCK, PIECE] {
            let mut aligned = Aligned::new(length);
            assert_eq!(aligned.bytes().len(), length);
            assert_eq!(aligned.bytes().as_ptr().align_offset(BLOCK), 0);
        }
    }
}
