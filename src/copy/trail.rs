//! What a copy leaves behind in the page cache of the file that it writes: nothing.
//!
//! A disk is often larger than the memory of its host, and nobody reads it from this cache soon; left to itself it
//! would push out what others use, and wait there until the last sync. So every [`TRAIL_STEP`] the kernel is asked to
//! write back what was written, and after [`TRAIL_STEPS`] of them all is synced and let go of. That costs less than
//! keeping it: pages that were freed a moment ago are taken again. Both are the same hint, which lets go of what is
//! clean and writes back the rest.

use std::io::Result;
use std::ops::Range;

use crate::disk::{Disk, around};
use crate::limits::{TRAIL_STEP, TRAIL_STEPS};

/// What was written through one end and may be in the page cache.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// From the first to the last byte of what is being written back.
    behind: Range<u64>,
    steps: u32,
    /// The same of what nobody writes back yet, and how many bytes that is.
    step: Range<u64>,
    bytes: u64,
}

impl Trail {
    /// So much has been written.
    ///
    /// # Errors
    /// That of a sync, if one was due.
    pub(super) fn wrote(&mut self, disk: &Disk, offset: u64, length: u64) -> Result<()> {
        self.step = around(&self.step, &(offset..offset + length));
        self.bytes += length;
        if self.bytes < TRAIL_STEP {
            return Ok(());
        }
        disk.forget_range(&self.step);
        self.behind = around(&self.behind, &self.step);
        (self.step, self.bytes) = (0..0, 0);
        self.steps += 1;
        if self.steps < TRAIL_STEPS { Ok(()) } else { self.sync(disk) }
    }

    /// Makes all of it durable, and lets go of it.
    ///
    /// # Errors
    /// The disk's, and for good after the first (D9).
    pub(super) fn sync(&mut self, disk: &Disk) -> Result<()> {
        disk.flush()?;
        let Self { behind, step, .. } = std::mem::take(self);
        disk.forget_range(&around(&behind, &step));
        Ok(())
    }
}
