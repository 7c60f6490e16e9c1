//! Regions, digests and roots, against what another program computes.

use super::*;
use crate::dirty::DirtyMap;
use crate::disk::Cache;
use crate::disk::tests::cached;
use crate::limits::{GIB, MIB};

const REGION: u64 = DIGEST_REGION_MIN;

#[test]
fn the_table_fits_and_a_region_is_a_whole_number_of_granules_whatever_the_size() {
    for shift in 9..=50 {
        for size in [1 << shift, (1 << shift) + 512, 3 << shift] {
            let region = region_bytes(size);
            assert!(region.is_power_of_two() && region >= DIGEST_REGION_MIN);
            assert!(size.div_ceil(region) * 32 <= DIGEST_TABLE_MAX as u64, "{size}");
            assert!(region.is_multiple_of(DirtyMap::granularity_for(size)), "{size}");
            assert!(question_regions(size) >= 1 && question_regions(size) <= DIGESTS_MAX as u64);
            assert!(question_regions(size) * region <= DIGEST_QUESTION_MAX.max(region));
        }
    }
    assert_eq!(region_bytes(8 * GIB), 64 * 1024);
    assert_eq!(region_bytes(8 * GIB + 512), 128 * 1024);
    assert_eq!(region_bytes(1024 * GIB), 8 << 20);
}

#[test]
fn a_region_is_hashed_as_it_reads_and_holes_read_as_zero() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let size = 5 * REGION + 1024;
    let disk = Disk::create(&dir.path().join("a"), size, Cache::Writeback).expect("created");
    let bytes: Vec<u8> = (0..REGION).map(|at| (at % 251).to_le_bytes()[0]).collect();
    disk.write(&bytes, 2 * REGION, false).expect("written");
    // A region that is partly a hole, and the short one at the end.
    disk.write(&[7; 4096], 4 * REGION + 8192, false).expect("written");
    disk.write(&[9; 512], 5 * REGION + 512, false).expect("written");
    let mut digests = [[0; 32]; 6];
    let mut hasher = Hasher::default();
    let read = hasher.regions(&disk, 0, &mut digests).expect("read");
    for (region, digest) in digests.iter().enumerate() {
        let (offset, length) = place(size, region as u64);
        let mut whole = vec![0xff; usize::try_from(length).expect("small")];
        disk.read(&mut whole, offset).expect("read");
        assert_eq!(digest, blake3::hash(&whole).as_bytes(), "region {region}");
    }
    assert!(read < size, "whole holes need not be read: {read}");
    // Written in full with zeroes, it is the same.
    let zeroes = vec![0; usize::try_from(REGION).expect("small")];
    disk.write(&zeroes, 0, false).expect("written");
    let mut again = [[1; 32]];
    hasher.regions(&disk, 0, &mut again).expect("read");
    assert_eq!(again[0], digests[0]);
}

#[test]
fn a_sparing_hasher_leaves_nothing_in_the_page_cache() {
    let dir = tempfile::tempdir_in(".").expect("on a real file system");
    let size = 64 * REGION;
    let path = dir.path().join("a");
    let disk = Disk::create(&path, size, Cache::Writeback).expect("created");
    disk.write(&vec![7; usize::try_from(size).expect("small")], 0, false).expect("written");
    disk.flush().expect("synced");
    let mut digests = [[0; 32]; 64];
    Hasher::default().regions(&disk, 0, &mut digests).expect("read");
    let Some(bytes) = cached(&path) else { return };
    assert_eq!(bytes, size, "who did not bring it in does not let go of it");
    let mut again = [[0; 32]; 64];
    Hasher::sparing().regions(&disk, 0, &mut again).expect("read");
    assert_eq!(again, digests);
    assert_eq!(cached(&path), Some(0));
}

#[test]
fn regions_are_hashed_together_or_in_pieces_to_the_same_digests() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    // Regions of 64 KiB, 128 KiB, and of twice what is read at once.
    for size in [GIB, 16 * GIB, 128 * GIB] {
        let disk = Disk::create(&dir.path().join(size.to_string()), size, Cache::Writeback).expect("created");
        let region = region_bytes(size);
        let bytes: Vec<u8> = (0..3 * MIB).map(|at| (at / 7).to_le_bytes()[0]).collect();
        // Data begins and ends within regions.
        let first = GIB / 2 / region;
        disk.write(&bytes, GIB / 2 + 4096, false).expect("written");
        let count = usize::try_from((3 << 20) / region + 1).expect("small");
        let mut digests = vec![[0; 32]; count];
        Hasher::default().regions(&disk, first, &mut digests).expect("read");
        let mut whole = vec![0; 4096];
        whole.extend_from_slice(&bytes);
        whole.resize(count * usize::try_from(region).expect("small"), 0);
        for (digest, piece) in digests.iter().zip(whole.chunks(whole.len() / count)) {
            assert_eq!(digest, blake3::hash(piece).as_bytes(), "{size}");
        }
    }
}

#[test]
fn a_disk_that_has_become_shorter_is_unreadable_and_the_region_is_named() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("a");
    let disk = Disk::create(&path, 4 * REGION, Cache::Writeback).expect("created");
    disk.write(&vec![1; 4 << 16], 0, false).expect("written");
    std::fs::OpenOptions::new().write(true).open(&path).expect("there").set_len(2 * REGION).expect("cut");
    let unread = Hasher::default().regions(&disk, 0, &mut [[0; 32]; 4]).expect_err("what is not there is no hole");
    assert_eq!((unread.offset, unread.length), (2 * REGION, REGION));
}

/// `b3sum` of the bytes that docs/protocol.md gives, written down by hand.
#[test]
fn a_root_is_over_size_region_and_what_is_covered_in_its_order() {
    let size = 3 * REGION + 512;
    let mut table = Table::new(size);
    let head = [size.to_le_bytes(), REGION.to_le_bytes()].concat();
    assert_eq!((table.root(), table.covered_bytes()), (*blake3::hash(&head).as_bytes(), 0));
    table.put(3, &[3; 32]);
    table.put(1, &[9; 32]);
    table.put(1, &[1; 32]);
    table.put(4, &[4; 32]);
    let entries = [&head[..], &1u64.to_le_bytes(), &[1; 32], &3u64.to_le_bytes(), &[3; 32]].concat();
    assert_eq!(table.root(), *blake3::hash(&entries).as_bytes());
    assert_eq!(table.covered_bytes(), REGION + 512, "the last region is short; one behind it there is none");
    assert_eq!(root_of_all(&[[1; 32], [2; 32]]), *blake3::hash(&[[1; 32], [2; 32]].concat()).as_bytes());
}

#[test]
fn a_root_over_many_regions_is_the_same_as_over_all_bytes_at_once() {
    let size = 4000 * REGION;
    let mut table = Table::new(size);
    let mut bytes = [size.to_le_bytes(), REGION.to_le_bytes()].concat();
    for region in (0..4000u64).filter(|region| region % 3 != 1) {
        let digest = *blake3::hash(&region.to_le_bytes()).as_bytes();
        table.put(region, &digest);
        bytes.extend_from_slice(&region.to_le_bytes());
        bytes.extend_from_slice(&digest);
    }
    assert_eq!(table.root(), *blake3::hash(&bytes).as_bytes());
}
