//! A guest that writes and remembers, and the check of what it wrote.
//!
//! Write number N of a seed goes to a block that follows from both, and fills it with bytes that follow from both. So
//! two numbers say everything that a check needs: how many writes were issued, and how many before the last sync that
//! ended well. A block must hold its last write before that sync or a later one that was issued; a block with no write
//! is zero.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What is written at once.
const BLOCK: usize = 4096;
/// Time between two writes.
const PERIOD: Duration = Duration::from_millis(2);
/// Writes between two syncs.
const SYNC_EVERY: u64 = 64;

/// A writer that runs.
pub(crate) struct Writer {
    seed: u64,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    issued: AtomicU64,
    synced: AtomicU64,
    stop: AtomicBool,
    /// It is to write no more, and then: it writes no more.
    pause: AtomicBool,
    paused: AtomicBool,
    failed: Mutex<Option<String>>,
}

impl Shared {
    fn say(&self) -> String {
        let (issued, synced) = (self.issued.load(Ordering::SeqCst), self.synced.load(Ordering::SeqCst));
        format!("issued={issued} synced={synced}")
    }

    fn failure(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Writer {
    /// Starts writing to a device.
    pub(crate) fn start(device: &str, seed: u64) -> Result<Self, String> {
        Self::start_after(device, seed, 0)
    }

    /// The same for a writer that has issued so many writes already, which are all on stable storage.
    pub(crate) fn start_after(device: &str, seed: u64, issued: u64) -> Result<Self, String> {
        let file = OpenOptions::new().read(true).write(true).open(device).map_err(|e| format!("{device}: {e}"))?;
        let blocks = blocks(&file)?;
        let shared = Arc::new(Shared { issued: issued.into(), synced: issued.into(), ..Shared::default() });
        let ours = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            if let Err(cause) = ours.run(&file, seed, blocks) {
                *ours.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
            }
        });
        Ok(Self { seed, shared, thread })
    }

    /// How far it is.
    pub(crate) fn count(&self) -> String {
        let failed = self.shared.failure().map(|cause| format!(" failed={cause}")).unwrap_or_default();
        self.shared.say() + &failed
    }

    /// Stops it as a VMM that is paused stops: in the middle, without a sync, and with the device open.
    pub(crate) fn pause(&self) -> Result<String, String> {
        self.shared.pause.store(true, Ordering::SeqCst);
        while !self.shared.paused.load(Ordering::SeqCst) {
            if let Some(cause) = self.shared.failure() {
                return Err(cause);
            }
            thread::sleep(PERIOD);
        }
        Ok(self.shared.say())
    }

    /// Lets one that was paused go on.
    pub(crate) fn go_on(&self) {
        self.shared.pause.store(false, Ordering::SeqCst);
    }

    /// Its seed, and how many writes it has issued: all that another needs to go on for it.
    pub(crate) fn memory(&self) -> (u64, u64) {
        (self.seed, self.shared.issued.load(Ordering::SeqCst))
    }

    /// Ends it after a last sync, or without one if it is paused. The device is closed then.
    pub(crate) fn stop(self) -> Result<String, String> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| "the writer panicked")?;
        match self.shared.failure() {
            Some(cause) => Err(format!("{cause} {}", self.shared.say())),
            None => Ok(self.shared.say()),
        }
    }
}

impl Shared {
    fn run(&self, file: &File, seed: u64, blocks: u64) -> Result<(), String> {
        let mut content = vec![0; BLOCK];
        for number in self.issued.load(Ordering::SeqCst) + 1.. {
            while self.pause.load(Ordering::SeqCst) {
                self.paused.store(true, Ordering::SeqCst);
                if self.stop.load(Ordering::SeqCst) {
                    return Ok(());
                }
                thread::sleep(PERIOD);
            }
            self.paused.store(false, Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            let block = place(seed, number, blocks);
            fill(&mut content, seed, number, block);
            self.issued.store(number, Ordering::SeqCst);
            file.write_all_at(&content, block * BLOCK as u64).map_err(|error| format!("write {number}: {error}"))?;
            if number % SYNC_EVERY == 0 {
                self.sync(file)?;
            }
            thread::sleep(PERIOD);
        }
        self.sync(file)
    }

    fn sync(&self, file: &File) -> Result<(), String> {
        let number = self.issued.load(Ordering::SeqCst);
        file.sync_data().map_err(|error| format!("sync after {number}: {error}"))?;
        self.synced.store(number, Ordering::SeqCst);
        Ok(())
    }
}

/// Makes a whole device zero, so that another seed can begin.
pub(crate) fn wipe(device: &str) -> Result<String, String> {
    let fail = |error: std::io::Error| format!("{device}: {error}");
    let file = OpenOptions::new().read(true).write(true).open(device).map_err(fail)?;
    let (blocks, zeroes) = (blocks(&file)?, vec![0; BLOCK]);
    for block in 0..blocks {
        file.write_all_at(&zeroes, block * BLOCK as u64).map_err(fail)?;
    }
    file.sync_data().map_err(fail)?;
    Ok(format!("wiped={blocks}"))
}

/// Reads a whole device and compares every block.
pub(crate) fn verify(device: &str, seed: u64, synced: u64, issued: u64) -> Result<String, String> {
    let file = File::open(device).map_err(|error| format!("{device}: {error}"))?;
    let blocks = blocks(&file)?;
    // For each block its last write before the sync, and those after it.
    let mut wanted: HashMap<u64, (u64, Vec<u64>)> = HashMap::new();
    for number in 1..=issued {
        let entry = wanted.entry(place(seed, number, blocks)).or_default();
        if number <= synced { entry.0 = number } else { entry.1.push(number) }
    }
    let (mut content, mut expected) = (vec![0; BLOCK], vec![0; BLOCK]);
    for block in 0..blocks {
        file.read_exact_at(&mut content, block * BLOCK as u64).map_err(|error| format!("block {block}: {error}"))?;
        let (first, later) = wanted.get(&block).cloned().unwrap_or_default();
        let is_one = std::iter::once(first).chain(later).any(|number| {
            fill(&mut expected, seed, number, block);
            content == expected
        });
        if !is_one {
            let found = u64::from_le_bytes(content[..8].try_into().unwrap_or_default());
            return Err(format!("block {block}: is of write {found}, or of none, and not of {first} or later"));
        }
    }
    Ok(format!("blocks={blocks} written={}", wanted.len()))
}

fn blocks(mut file: &File) -> Result<u64, String> {
    let size = file.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
    match size / BLOCK as u64 {
        0 => Err("has no size".to_owned()),
        blocks => Ok(blocks),
    }
}

/// The block of a write.
fn place(seed: u64, number: u64, blocks: u64) -> u64 {
    mix(seed ^ mix(number)) % blocks
}

/// The content of a block after a write; number 0: never written.
fn fill(content: &mut [u8], seed: u64, number: u64, block: u64) {
    if number == 0 {
        return content.fill(0);
    }
    for (word, at) in content.chunks_exact_mut(8).zip(0_u64..) {
        let value = if at == 0 { number } else { mix(seed ^ mix(number) ^ mix(block ^ mix(at))) };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// splitmix64's mixing.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;

    /// A file with writes 1 to `issued` of the seed.
    fn written(name: &str, issued: u64) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("testguest-{name}-{}", std::process::id()));
        let file = File::create(&path).expect("a file");
        file.set_len(64 * BLOCK as u64).expect("a size");
        let mut content = vec![0; BLOCK];
        for number in 1..=issued {
            let block = place(SEED, number, 64);
            fill(&mut content, SEED, number, block);
            file.write_all_at(&content, block * BLOCK as u64).expect("written");
        }
        path
    }

    #[test]
    fn what_was_written_is_found_and_what_was_lost_is_seen() {
        let path = written("found", 100);
        let check = |synced, issued| verify(path.to_str().expect("a path"), SEED, synced, issued);
        check(100, 100).expect("all of it");
        // A power loss: any of the writes after the sync may have arrived.
        check(40, 100).expect("all of it");
        check(100, 120).expect("all that was synced");
        assert!(check(101, 101).is_err(), "write 101 was acknowledged and is lost");
        assert!(check(90, 99).is_err(), "write 100 was never issued");
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn one_wrong_byte_is_seen() {
        let path = written("byte", 30);
        let block = place(SEED, 30, 64);
        let file = OpenOptions::new().write(true).open(&path).expect("a file");
        file.write_all_at(&[0x55], block * BLOCK as u64 + 4095).expect("written");
        let error = verify(path.to_str().expect("a path"), SEED, 30, 30).expect_err("a wrong byte");
        assert!(error.starts_with(&format!("block {block}: is of write 30")), "{error}");
        std::fs::remove_file(&path).expect("removed");
    }
}
