//! Digests of regions: what both sides of a migration hash, and how the digests of a disk become one.
//!
//! A *region* here is what has a digest of its own: [`region_bytes`] of them, computed from the size of the disk alone,
//! so that both sides agree without a word. The [`Table`] of a disk keeps the digests that both sides have agreed on;
//! its [`Table::root`] is one digest over them. Used by `mirror/checks.rs` on the source and by
//! `migrate/destination/digest.rs`; nothing here knows who asks, and nothing is ever written to a disk.
//!
//! A digest is of what the disk reads as, not of a buffer on its way there: a write that went astray is found. It says
//! nothing of the medium, which the page cache stands before (D9).

use std::io;

use serde::{Deserialize, Serialize};

use crate::disk::{AlignedBuffer, Disk};
use crate::limits::{DIGEST_QUESTION_MAX, DIGEST_READ, DIGEST_REGION_MIN, DIGEST_TABLE_MAX, DIGESTS_MAX, ZERO_STEP};

/// BLAKE3 of a region's bytes.
pub type Digest = [u8; 32];

/// What of a copy is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Verified {
    /// Nothing.
    #[default]
    Nothing,
    /// What was copied, or found equal.
    Written,
    /// Everything.
    Full,
}

const WORD: u64 = 64;

/// The bytes of one region of a disk of `size` bytes, a power of two: the finest whose digests fit the table. The last
/// region of a disk may be short.
#[must_use]
pub fn region_bytes(size: u64) -> u64 {
    let mut region = DIGEST_REGION_MIN;
    while size.div_ceil(region).saturating_mul(size_of::<Digest>() as u64) > DIGEST_TABLE_MAX as u64 {
        region *= 2;
    }
    region
}

/// Most regions of a disk of `size` bytes that one question asks for: bounded in number and in bytes, so that an answer
/// is never far away. At least one.
#[must_use]
pub fn question_regions(size: u64) -> u64 {
    (DIGEST_QUESTION_MAX / region_bytes(size)).clamp(1, DIGESTS_MAX as u64)
}

/// Where a region of a disk of `size` bytes begins, and how long it is.
#[must_use]
pub fn place(size: u64, region: u64) -> (u64, u64) {
    let offset = region.saturating_mul(region_bytes(size)).min(size);
    (offset, region_bytes(size).min(size - offset))
}

/// A region that could not be hashed.
#[derive(Debug)]
pub struct Unreadable {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// The disk's error.
    pub error: io::Error,
}

/// Hashes regions; one for each thread that does.
#[derive(Debug)]
pub struct Hasher {
    /// Small enough to stay in a core's own cache between the read and the hash.
    buffer: AlignedBuffer,
    /// From where to where of the disk the buffer holds, while regions of one question are hashed.
    holds: (u64, u64),
    state: Box<blake3::Hasher>,
    /// The digest of so many zeroes.
    zeroes: (u64, Digest),
    /// Nothing of what it has read stays in the page cache, whoever brought it there.
    sparing: bool,
}

impl Default for Hasher {
    fn default() -> Self {
        Self {
            buffer: AlignedBuffer::new(DIGEST_READ),
            holds: (0, 0),
            state: Box::new(blake3::Hasher::new()),
            zeroes: (0, [0; 32]),
            sparing: false,
        }
    }
}

impl Hasher {
    /// One that lets go of all that it reads in the page cache, not only of what had to be brought in: for a disk that
    /// is being received, whose guest is not here yet.
    #[must_use]
    pub fn sparing() -> Self {
        Self { sparing: true, ..Self::default() }
    }

    /// Hashes as many regions from `first` on as `digests` has room for, all of them on the disk. Returns the bytes
    /// that had to be read: holes need not.
    ///
    /// # Errors
    /// The first region that cannot be read.
    pub fn regions(&mut self, disk: &Disk, first: u64, digests: &mut [Digest]) -> Result<u64, Unreadable> {
        let (mut read, mut extent) = (0, (0, 0, false));
        let (last, length) = place(disk.size(), first + (digests.len() as u64).saturating_sub(1));
        let end = last + length;
        self.holds = (0, 0);
        for (region, digest) in (first..).zip(digests) {
            let (offset, length) = place(disk.size(), region);
            let unreadable = |error| Unreadable { offset, length, error };
            if !(extent.0..extent.1).contains(&offset) {
                let found = disk.extent(offset, disk.size()).map_err(unreadable)?;
                extent = (found.offset, found.offset + found.length, found.hole);
            }
            if extent.2 && extent.1 >= offset + length {
                *digest = self.zeroes(length);
                continue;
            }
            // Small regions are read together, as far as there is data; who cannot be read is found out one by one.
            let together = extent.1.clamp(offset + length, end.max(offset + length));
            if self.hold(disk, offset, length, together).is_err() {
                self.hold(disk, offset, length, offset + length).map_err(unreadable)?;
            }
            *digest = self.region(disk, offset, length).map_err(unreadable)?;
            read += length;
        }
        if self.sparing && read > 0 {
            let (start, _) = place(disk.size(), first);
            disk.forget_range(&(start..end));
        }
        Ok(read)
    }

    /// Makes the buffer hold a region, and what follows up to `end` as far as it has room; nothing, if it has no room
    /// for the region.
    fn hold(&mut self, disk: &Disk, offset: u64, length: u64, end: u64) -> io::Result<()> {
        let (from, to) = self.holds;
        if length > DIGEST_READ as u64 || (from <= offset && offset + length <= to) {
            return Ok(());
        }
        // Whole regions: all but a disk's last one are equally long.
        let wanted = (end - offset).min(DIGEST_READ as u64 / length * length);
        let bytes = &mut self.buffer[..usize::try_from(wanted).unwrap_or(DIGEST_READ)];
        self.holds = (0, 0);
        // What had to be brought in for this alone does not stay in the host's page cache.
        if disk.read_and_tell(bytes, offset)? {
            disk.forget_range(&(offset..offset + wanted));
        }
        self.holds = (offset, offset + wanted);
        Ok(())
    }

    /// Hashes what the buffer holds, or what is read piece by piece.
    fn region(&mut self, disk: &Disk, offset: u64, length: u64) -> io::Result<Digest> {
        let (from, to) = self.holds;
        if from <= offset && offset + length <= to {
            let at = usize::try_from(offset - from).unwrap_or(usize::MAX);
            let bytes = &self.buffer[at..at + usize::try_from(length).unwrap_or(usize::MAX)];
            return Ok(*blake3::hash(bytes).as_bytes());
        }
        self.state.reset();
        let (mut at, end) = (offset, offset + length);
        let mut brought_in = false;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX).min(DIGEST_READ);
            let bytes = &mut self.buffer[..left];
            brought_in |= disk.read_and_tell(bytes, at)?;
            self.state.update(bytes);
            at += left as u64;
        }
        if brought_in {
            disk.forget_range(&(offset..end));
        }
        Ok(*self.state.finalize().as_bytes())
    }

    fn zeroes(&mut self, length: u64) -> Digest {
        if self.zeroes.0 != length {
            const ZEROES: [u8; ZERO_STEP] = [0; ZERO_STEP];
            self.state.reset();
            let mut left = usize::try_from(length).unwrap_or(usize::MAX);
            while left > 0 {
                let piece = left.min(ZEROES.len());
                self.state.update(&ZEROES[..piece]);
                left -= piece;
            }
            self.zeroes = (length, *self.state.finalize().as_bytes());
        }
        self.zeroes.1
    }
}

/// The digests of one disk's regions, as far as they are known. Memory is touched as they come.
#[derive(Debug)]
pub struct Table {
    size: u64,
    digests: Vec<Digest>,
    covered: Vec<u64>,
    covered_bytes: u64,
}

impl Table {
    /// A table for a disk of `size` bytes that covers nothing.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let regions = size.div_ceil(region_bytes(size));
        let room = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let covered = vec![0; room(regions.div_ceil(WORD))];
        Self { size, digests: vec![[0; 32]; room(regions)], covered, covered_bytes: 0 }
    }

    /// Remembers the digest of a region, the newest counts. One that the disk does not have is passed over.
    pub fn put(&mut self, region: u64, digest: &Digest) {
        let Ok(place_in_table) = usize::try_from(region) else { return };
        let Some(slot) = self.digests.get_mut(place_in_table) else { return };
        *slot = *digest;
        let bit = 1 << (region % WORD);
        let word = &mut self.covered[place_in_table / 64];
        if *word & bit == 0 {
            *word |= bit;
            self.covered_bytes += place(self.size, region).1;
        }
    }

    /// Whether a region is covered.
    #[must_use]
    pub fn covers(&self, region: u64) -> bool {
        let word = usize::try_from(region / WORD).ok().and_then(|word| self.covered.get(word));
        word.is_some_and(|word| word & (1 << (region % WORD)) != 0)
    }

    /// Bytes of the regions that are covered.
    #[must_use]
    pub fn covered_bytes(&self) -> u64 {
        self.covered_bytes
    }

    /// One digest over all that is covered: BLAKE3 of the disk's size and the bytes of a region, then of each covered
    /// region, in their order, its number and its digest. Numbers are `u64`, little-endian.
    #[must_use]
    pub fn root(&self) -> Digest {
        const ENTRY: usize = size_of::<u64>() + size_of::<Digest>();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.size.to_le_bytes());
        hasher.update(&region_bytes(self.size).to_le_bytes());
        // Long runs of bytes are hashed several times as fast as short ones.
        let mut bytes = [0; 400 * ENTRY];
        let mut filled = 0;
        for (place_in_table, digest) in self.digests.iter().enumerate() {
            if self.covered[place_in_table / 64] & (1 << (place_in_table % 64)) == 0 {
                continue;
            }
            let entry = &mut bytes[filled..filled + ENTRY];
            entry[..8].copy_from_slice(&(place_in_table as u64).to_le_bytes());
            entry[8..].copy_from_slice(digest);
            filled += ENTRY;
            if filled == bytes.len() {
                hasher.update(&bytes);
                filled = 0;
            }
        }
        hasher.update(&bytes[..filled]);
        *hasher.finalize().as_bytes()
    }
}

/// One digest over the roots of all disks, in the order of the offer: BLAKE3 of one behind the other.
#[must_use]
pub fn root_of_all(roots: &[Digest]) -> Digest {
    *blake3::hash(roots.as_flattened()).as_bytes()
}

#[cfg(test)]
mod tests;
