//! The disk images of a demo or a bench: made quickly, half of them holes, and compared afterwards.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The block that the guest writes and that images are compared in.
pub(crate) const BLOCK: usize = 4096;
const MIB: usize = 1024 * 1024;
/// Every so many bytes there is one extent of data; the rest is a hole.
const STRIDE_MIB: usize = 16;
/// Lengths of the extents, one after the other: on average half the stride.
const EXTENTS_MIB: [usize; 4] = [1, 15, 5, 11];

/// Numbers that look random and are the same each time: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Makes an image of so many MiB, a multiple of 64, half of it holes; returns how many extents of data it has. On disk
/// when this returns, so that its write-back does not disturb what is measured.
pub(crate) fn make(path: &Path, mib: usize) -> io::Result<usize> {
    make_of(path, mib, &EXTENTS_MIB)
}

/// The same without holes.
pub(crate) fn make_full(path: &Path, mib: usize) -> io::Result<usize> {
    make_of(path, mib, &[STRIDE_MIB])
}

fn make_of(path: &Path, mib: usize, extents_mib: &[usize]) -> io::Result<usize> {
    let file = File::create_new(path)?;
    file.set_len((mib * MIB) as u64)?;
    let mut random = Random(mib as u64);
    let mut piece: Vec<u8> = (0..MIB / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let extents = mib / STRIDE_MIB;
    for extent in 0..extents {
        for number in 0..extents_mib[extent % extents_mib.len()] {
            // No two blocks are alike, or a block in the wrong place would not be seen.
            let at = ((extent * STRIDE_MIB + number) * MIB) as u64;
            for (block, first) in piece.chunks_mut(BLOCK).zip(0_u64..) {
                block[..8].copy_from_slice(&(at + first).to_le_bytes());
            }
            file.write_all_at(&piece, at)?;
        }
    }
    file.sync_all()?;
    Ok(extents)
}

/// Bytes that a file really takes.
pub(crate) fn allocated(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Compares two images block by block, all blocks for which `skip` says no. Returns how many were compared, and the
/// first that differs.
pub(crate) fn compare(one: &Path, other: &Path, skip: impl Fn(u64) -> bool) -> io::Result<(u64, Option<u64>)> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let size = one.metadata()?.len();
    if size != other.metadata()?.len() {
        return Ok((0, Some(size / BLOCK as u64)));
    }
    let (mut ours, mut theirs) = (vec![0; MIB], vec![0; MIB]);
    let mut compared = 0;
    let mut at = 0;
    while at < size {
        let length = MIB.min(usize::try_from(size - at).unwrap_or(MIB));
        one.read_exact_at(&mut ours[..length], at)?;
        other.read_exact_at(&mut theirs[..length], at)?;
        let blocks = ours[..length].chunks(BLOCK).zip(theirs[..length].chunks(BLOCK));
        for (number, (ours, theirs)) in (at / BLOCK as u64..).zip(blocks) {
            if skip(number) {
                continue;
            }
            if ours != theirs {
                return Ok((compared, Some(number)));
            }
            compared += 1;
        }
        at += length as u64;
    }
    Ok((compared, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_half_holes_and_differences_are_found() {
        let place = |name| std::env::temp_dir().join(format!("xtask-image-{name}-{}", std::process::id()));
        let (one, other) = (place("one"), place("other"));
        assert_eq!(make(&one, 64).expect("an image"), 4);
        assert_eq!(make(&other, 64).expect("an image"), 4);
        let half = 32 * MIB as u64;
        let taken = allocated(&one).expect("a file");
        assert!((half..half + half / 8).contains(&taken), "{taken} bytes");
        let full = place("full");
        make_full(&full, 64).expect("an image");
        assert!(allocated(&full).expect("a file") >= 2 * half);
        fs::remove_file(full).expect("a file");
        assert_eq!(compare(&one, &other, |_| false).expect("files"), (16384, None));
        File::options().write(true).open(&other).expect("a file").write_all_at(b"x", 5 * 4096 + 1).expect("a write");
        assert_eq!(compare(&one, &other, |_| false).expect("files"), (5, Some(5)));
        assert_eq!(compare(&one, &other, |block| block == 5).expect("files"), (16383, None));
        fs::remove_file(one).expect("a file");
        fs::remove_file(other).expect("a file");
    }
}
