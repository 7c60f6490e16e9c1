//! Disks that are overlays on a base: what of two of them need not be read, because both have it from the same base.
//!
//! A server that has a chain of images as its export (a qcow2 overlay on a base, behind `qemu-nbd --allocation-depth`)
//! can tell in which layer something stands: `qemu:allocation-depth`. What the top layer does not have reads as the
//! base does. If it is so on both sides of a migration, and the bases are the same, the two disks are equal there.
//!
//! # What is believed, and whose word it is
//!
//! Nobody can see from here that two bases are the same; finding out is what reading all of them would be. So nothing
//! is taken as equal unless the user has said so (`--same-base`), and the receipt says how much nobody has read. Around
//! that word stands what can be checked:
//!
//! - **Both sides count.** A region in which either side's top layer holds anything, however little, is compared by its
//!   digests like every other one: a destination's overlay may hold what an older attempt has left.
//! - **Order.** The destination is asked between PREPARE, when no writer of an earlier attempt lives (D4), and the
//!   first byte; from then on only this migration writes there, and what it writes is verified. The source is asked
//!   after the dirty map is armed and the gate drained (D1), before anything is taken: whatever the guest changes from
//!   then on is marked, wherever it stands ([`crate::mirror::Mirror::scan_over`]). So the word is used once, before the
//!   first byte, as "known to read as zero" is (D10), and a chain that gets longer later changes nothing.
//! - **One process.** A server that is started anew may have another chain. An answer counts only if no connection was
//!   opened while it was told ([`Depths::Interrupted`]).
//! - **Chains as long.** The deepest layer must be as deep on both sides, or the word is not about these chains: the
//!   source's server may have been started with `--snapshot`, or a snapshot made since the base was copied, and then
//!   the guest's data stands *below* the top layer.
//! - **Samples.** Some regions are compared all the same, evenly spaced. One that differs though it still stands below
//!   the top layer proves the word false, and ends the migration.
//! - **`--verify full`** reads everything and finds a base that differs anywhere.
//!
//! What is left to the word: two chains that show as deep and differ where no sample is, as when a snapshot was made on
//! one side over a layer that hides its base everywhere; and a chain that somebody changes (a snapshot, a commit into
//! the base) before or while it is asked about.

use crate::digest::{place, region_bytes};
use crate::disk::{Depths, Disk};
use crate::error::reason;
use crate::limits::BACKEND_CONNECTIONS_MAX;

/// Most regions of what has the same base that are compared all the same.
const SAMPLES: u64 = 64;

/// How often a server is asked to which connections are opened meanwhile: more often than there can be more of them.
pub const TRIES: usize = BACKEND_CONNECTIONS_MAX + 1;

const TOP: u64 = 1;
const WORD: u64 = 64;
const BYTE: u64 = 8;

/// A set of a disk's regions, those of [`region_bytes`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Regions(Vec<u64>);

impl Regions {
    fn none(size: u64) -> Self {
        let count = size.div_ceil(region_bytes(size));
        Self(vec![0; usize::try_from(count.div_ceil(WORD)).unwrap_or(usize::MAX)])
    }

    fn word(region: u64) -> usize {
        usize::try_from(region / WORD).unwrap_or(usize::MAX)
    }

    fn add(&mut self, region: u64) {
        if let Some(word) = self.0.get_mut(Self::word(region)) {
            *word |= 1 << (region % WORD);
        }
    }

    fn has(&self, region: u64) -> bool {
        self.0.get(Self::word(region)).is_some_and(|word| word & (1 << (region % WORD)) != 0)
    }
}

/// What the top layer of one disk holds, by regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    size: u64,
    /// Regions of which it holds anything.
    top: Regions,
    /// The deepest layer that anything stands in.
    deepest: u64,
}

impl Layers {
    fn new(size: u64) -> Self {
        Self { size, top: Regions::none(size), deepest: 0 }
    }

    /// Asks a disk's server.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn of(disk: &Disk) -> Result<Self, String> {
        if !disk.is_remote() {
            return Err("is no server's export: nobody tells its layers".to_owned());
        }
        for _ in 0..TRIES {
            let mut layers = Self::new(disk.size());
            match disk.depths(0, disk.size(), &mut |offset, length, depth| layers.add(offset, length, depth)) {
                Ok(Depths::Told) => return Ok(layers),
                Ok(Depths::Unknown) => {
                    return Err(
                        "its server does not tell its layers (qemu-nbd does with --allocation-depth)".to_owned()
                    );
                }
                Ok(Depths::Interrupted) => {}
                Err(error) => return Err(format!("its server cannot be asked for its layers: {}", reason(&error))),
            }
        }
        Err("the connections to its server come and go: its layers are not known".to_owned())
    }

    fn add(&mut self, offset: u64, length: u64, depth: u64) {
        self.deepest = self.deepest.max(depth);
        if depth == TOP && length > 0 {
            let bytes = region_bytes(self.size);
            (offset / bytes..(offset + length).div_ceil(bytes)).for_each(|region| self.top.add(region));
        }
    }

    /// The deepest layer that anything stands in.
    #[must_use]
    pub fn deepest(&self) -> u64 {
        self.deepest
    }

    /// How many pages of `bytes` bytes carry it.
    #[must_use]
    pub fn pages(size: u64, bytes: usize) -> u64 {
        size.div_ceil(region_bytes(size)).div_ceil(bytes as u64 * BYTE)
    }

    /// One page: a bit for each region, the lowest bit of the first byte first; 1: the top layer holds something of it.
    #[must_use]
    pub fn page(&self, number: u64, bytes: usize) -> Vec<u8> {
        let first = number * bytes as u64 * BYTE;
        let regions = self.size.div_ceil(region_bytes(self.size));
        let last = (first + bytes as u64 * BYTE).min(regions).max(first);
        let mut page = vec![0; usize::try_from((last - first).div_ceil(BYTE)).unwrap_or(bytes)];
        for region in (first..last).filter(|region| self.top.has(*region)) {
            page[usize::try_from((region - first) / BYTE).unwrap_or(0)] |= 1 << ((region - first) % BYTE);
        }
        page
    }

    /// What the other side has told of its disk of `size` bytes: all pages, one behind the other.
    ///
    /// # Errors
    /// They are not those of such a disk.
    pub fn told(size: u64, deepest: u64, pages: &[u8]) -> Result<Self, String> {
        let regions = size.div_ceil(region_bytes(size));
        if pages.len() as u64 != regions.div_ceil(BYTE) {
            return Err("what the destination tells of its layers does not fit".to_owned());
        }
        let mut layers = Self { deepest, ..Self::new(size) };
        for (region, byte) in (0..regions).zip(pages.iter().flat_map(|byte| [*byte; 8])) {
            if byte & (1 << (region % BYTE)) != 0 {
                layers.top.add(region);
            }
        }
        Ok(layers)
    }
}

/// What two overlays have from the same base: the regions that are taken as equal on the user's word.
#[derive(Debug)]
pub struct Base {
    size: u64,
    taken: Regions,
    samples: Regions,
    bytes: u64,
}

impl Base {
    /// Of the two sides' layers, this side's asked for after its map was armed.
    ///
    /// # Errors
    /// The two chains cannot be on the same base.
    pub fn of(here: &Layers, there: &Layers) -> Result<Self, String> {
        if here.size != there.size {
            return Err("the two sides' sizes differ".to_owned());
        }
        if here.deepest.min(there.deepest) <= TOP {
            return Err("no base shows below the top layer".to_owned());
        }
        if here.deepest != there.deepest {
            let (here, there) = (here.deepest, there.deepest);
            return Err(format!("the chains differ: the source's is {here} deep, the destination's {there}"));
        }
        let size = here.size;
        let mut base = Self { size, taken: Regions::none(size), samples: Regions::none(size), bytes: 0 };
        let below = |region: &u64| !here.top.has(*region) && !there.top.has(*region);
        let regions = 0..size.div_ceil(region_bytes(size));
        let count = regions.clone().filter(below).count() as u64;
        let stride = count.div_ceil(SAMPLES);
        for (number, region) in (0..).zip(regions.filter(below)) {
            if number % stride == 0 {
                base.samples.add(region);
            } else {
                base.taken.add(region);
                base.bytes += place(size, region).1;
            }
        }
        Ok(base)
    }

    /// Bytes that are taken as equal.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a region is taken as equal.
    #[must_use]
    pub fn takes(&self, region: u64) -> bool {
        self.taken.has(region)
    }

    /// Whether a region would be, and is compared all the same.
    #[must_use]
    pub fn samples(&self, region: u64) -> bool {
        self.samples.has(region)
    }

    /// Bytes that are taken as equal, of regions for which `known` says no.
    pub fn unknown(&self, known: impl Fn(u64) -> bool) -> u64 {
        let regions = (0..self.size.div_ceil(region_bytes(self.size))).filter(|region| self.takes(*region));
        regions.filter(|region| !known(*region)).map(|region| place(self.size, region).1).sum()
    }

    /// Calls `each(offset, length)` for every run of regions that are not taken as equal.
    pub fn rest(&self, mut each: impl FnMut(u64, u64)) {
        let regions = self.size.div_ceil(region_bytes(self.size));
        let mut from = None;
        for region in 0..=regions {
            let rest = region < regions && !self.takes(region);
            let (at, _) = place(self.size, region);
            match (rest, from) {
                (true, None) => from = Some(at),
                (false, Some(start)) => {
                    each(start, at - start);
                    from = None;
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::DIGEST_REGION_MIN;

    const REGION: u64 = DIGEST_REGION_MIN;

    fn layers(size: u64, extents: &[(u64, u64, u64)]) -> Layers {
        let mut layers = Layers::new(size);
        extents.iter().for_each(|(offset, length, depth)| layers.add(*offset, *length, *depth));
        layers
    }

    fn rest(base: &Base) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        base.rest(|offset, length| runs.push((offset, length)));
        runs
    }

    #[test]
    fn what_either_top_layer_holds_a_byte_of_is_not_taken() {
        let size = 200 * REGION + 512;
        let here = layers(size, &[(0, size, 2), (3 * REGION - 1, 2, 1), (200 * REGION, 512, 1)]);
        let there = layers(size, &[(0, size, 2), (100 * REGION + 7, 1, 1)]);
        let base = Base::of(&here, &there).expect("as deep");
        for region in [2, 3, 100, 200] {
            assert!(!base.takes(region) && !base.samples(region), "region {region}");
        }
        assert!(base.samples(0) && base.takes(1) && base.takes(99) && base.takes(101));
        let (mut taken, mut sampled, mut rest_bytes) = (0, 0, 0);
        for region in 0..=200 {
            assert!(!(base.takes(region) && base.samples(region)));
            taken += if base.takes(region) { place(size, region).1 } else { 0 };
            sampled += u64::from(base.samples(region));
        }
        base.rest(|offset, length| {
            rest_bytes += length;
            assert!((offset / REGION..(offset + length).div_ceil(REGION)).all(|region| !base.takes(region)));
        });
        assert_eq!((taken, taken + rest_bytes), (base.bytes(), size));
        assert!((32..=SAMPLES).contains(&sampled), "{sampled} samples");
        assert_eq!(base.unknown(|_| false), base.bytes());
        assert_eq!(base.unknown(|region| region == 1), base.bytes() - REGION);
    }

    #[test]
    fn chains_that_are_not_as_deep_have_no_base_in_common() {
        let size = 8 * REGION;
        let (two, three) = (layers(size, &[(0, size, 2)]), layers(size, &[(0, REGION, 3), (REGION, REGION, 2)]));
        let refused = Base::of(&three, &two).expect_err("a snapshot on the source");
        assert_eq!(refused, "the chains differ: the source's is 3 deep, the destination's 2");
        assert!(Base::of(&two, &layers(2 * size, &[(0, size, 2)])).is_err());
    }

    #[test]
    fn small_disks_are_sampled_whole_and_nothing_is_taken_where_no_base_shows() {
        let size = 5 * REGION;
        let all = Base::of(&layers(size, &[(0, size, 2)]), &layers(size, &[(0, size, 2)])).expect("as deep");
        assert_eq!((all.bytes(), rest(&all)), (0, vec![(0, size)]));
        let (full, below) = (layers(size, &[(0, size, 1)]), layers(size, &[(0, size, 2)]));
        for (here, there) in [(&full, &full), (&full, &below), (&below, &full)] {
            assert_eq!(Base::of(here, there).expect_err("no base"), "no base shows below the top layer");
        }
    }

    #[test]
    fn pages_carry_it_to_the_other_side() {
        for regions in [1, 7, 8, 9, 63, 64, 65, 700] {
            let size = (regions - 1) * REGION + 512;
            let extents: Vec<_> =
                (0..regions).filter(|n| n % 3 == 1 || n % 64 == 0).map(|n| (n * REGION, 512, 1)).collect();
            let sent = Layers { deepest: 4, ..layers(size, &extents) };
            for bytes in [1, 16, 1024] {
                let pages = Layers::pages(size, bytes);
                let told: Vec<u8> = (0..pages).flat_map(|page| sent.page(page, bytes)).collect();
                assert_eq!(Layers::told(size, 4, &told).as_ref(), Ok(&sent), "{regions} regions, pages of {bytes}");
                assert!(Layers::told(size, 4, &told[1..]).is_err());
            }
        }
    }
}
