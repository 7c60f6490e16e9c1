//! Writing back what a migration brings while it brings it (D13), and letting go of it in the page cache.
//!
//! A receiving disk has a thread here, from PREPARE until its gate is moved. It syncs every [`WRITE_BACK_BYTES`], so
//! that the sync before SEALED is short. What it has synced a few times before, the page cache need not hold any more:
//! whoever hashes what has come has read it by then, and a disk that is larger than the host's memory would else push
//! out what other guests are using. It costs less, too: the kernel takes pages that were freed a moment ago before it
//! looks for others.

use std::ops::Range;
use std::time::Instant;

use super::{Export, Gate};
use crate::disk::around;
use crate::limits::{CACHED_BYTES, WRITE_BACK_BYTES, WRITE_BACK_PERIOD, WRITE_BACKS_CACHED};

/// What a migration has written, and nobody has synced yet.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    bytes: u64,
    /// From the first to the last of them.
    range: Range<u64>,
}

impl Unsynced {
    /// How many bytes that is.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// So many bytes more. `true`: with these it is time to sync.
    pub(super) fn add(&mut self, offset: u64, length: u64) -> bool {
        let before = self.bytes;
        self.bytes += length;
        self.range = around(&self.range, &(offset..offset + length));
        before < WRITE_BACK_BYTES && self.bytes >= WRITE_BACK_BYTES
    }

    /// A sync begins: how many bytes it is of, and where they are. They count until it has ended.
    fn begin(&mut self) -> (u64, Range<u64>) {
        (self.bytes, std::mem::take(&mut self.range))
    }

    /// It has ended.
    fn end(&mut self, bytes: u64) {
        // The last attempt's thread may still have been at it.
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What was synced and may still be in the page cache, the oldest first.
#[derive(Debug, Default)]
struct Cached {
    syncs: heapless::Deque<(u64, Range<u64>), WRITE_BACKS_CACHED>,
    bytes: u64,
}

impl Cached {
    /// One more sync of so many bytes, somewhere in `range`; `forget` lets go of a range, where that is due.
    fn add(&mut self, bytes: u64, range: Range<u64>, forget: impl Fn(Range<u64>)) {
        self.bytes += bytes;
        while let Some((oldest, _)) = self.syncs.front()
            && (self.syncs.is_full() || self.bytes - oldest >= CACHED_BYTES)
            && let Some((oldest, range)) = self.syncs.pop_front()
        {
            self.bytes -= oldest;
            forget(range);
        }
        // There is room for it.
        let _ = self.syncs.push_back((bytes, range));
    }
}

impl Export {
    /// Writes back what a migration brings. Returns when the gate is no longer [`Gate::Receiving`]. A failed sync
    /// poisons the disk (D9), and the migration learns of it by its next request.
    pub fn write_back(&self) {
        let mut cached = Cached::default();
        let mut inner = self.lock();
        let mut last = Instant::now();
        while inner.gate == Gate::Receiving {
            let bytes = inner.unsynced.bytes();
            let due = bytes > 0 && (bytes >= WRITE_BACK_BYTES || last.elapsed() >= WRITE_BACK_PERIOD);
            let Some(disk) = inner.disk.clone().filter(|_| due) else {
                inner = self.wait(inner, WRITE_BACK_PERIOD);
                continue;
            };
            let (bytes, range) = inner.unsynced.begin();
            drop(inner);
            let synced = disk.flush();
            last = Instant::now();
            inner = self.lock();
            inner.unsynced.end(bytes);
            self.wake(&inner);
            drop(inner);
            match synced {
                Ok(()) => cached.add(bytes, range, |old| disk.forget_range(&old)),
                Err(error) => log::error!("write back: disk {}: {error}", self.name),
            }
            inner = self.lock();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_newest_stay_cached() {
        let forgotten = RefCell::new(Vec::new());
        let mut cached = Cached::default();
        let mut sync =
            |bytes: u64, at: u64| cached.add(bytes, at..at + 1, |old| forgotten.borrow_mut().push(old.start));
        // As much as may stay, and the first of them is let go of only when enough has come behind it.
        sync(CACHED_BYTES / 2, 1);
        sync(CACHED_BYTES / 2, 2);
        assert_eq!(*forgotten.borrow(), [0_u64; 0]);
        sync(CACHED_BYTES / 2, 3);
        assert_eq!(*forgotten.borrow(), [1]);
        // A large one is enough by itself.
        sync(CACHED_BYTES * 2, 4);
        assert_eq!(*forgotten.borrow(), [1, 2, 3]);
        // Small ones are no more than there is room for.
        (5..5 + WRITE_BACKS_CACHED as u64).for_each(|at| sync(1, at));
        assert_eq!(*forgotten.borrow(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_is_unsynced_has_an_extent() {
        let mut unsynced = Unsynced::default();
        assert!(!unsynced.add(4096, 512));
        assert!(!unsynced.add(512, 512));
        assert_eq!(unsynced.begin(), (1024, 512..4608));
        assert!(unsynced.add(8192, WRITE_BACK_BYTES), "they count until the sync has ended");
        unsynced.end(1024);
        assert_eq!(unsynced.begin(), (WRITE_BACK_BYTES, 8192..8192 + WRITE_BACK_BYTES));
    }
}
