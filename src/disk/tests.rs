//! What a disk promises, on a real file system.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Access, AlignedBuffer, Cache, Content, Disk, OpenError, is_zero, place_beside};
use crate::limits::MIB;

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a scratch directory")
}

fn new_disk(dir: &tempfile::TempDir, mib: usize) -> (PathBuf, Disk) {
    let path = dir.path().join("disk.raw");
    let disk = Disk::create(&path, (mib * MIB) as u64, Cache::Writeback).expect("created");
    (path, disk)
}

fn image_of(disk: &Disk) -> &super::Image {
    match &disk.0 {
        super::Kind::Image(image) => image,
        super::Kind::Remote(_) => panic!("a server"),
    }
}

/// How many bytes of a file are in the page cache, as somebody else's program tells; `None`, said aloud, without that.
pub(crate) fn cached(path: &Path) -> Option<u64> {
    // To look by reading would bring in what is looked for.
    let mut fincore = std::process::Command::new("fincore");
    let Ok(told) = fincore.args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output() else {
        eprintln!("SKIP: fincore missing");
        return None;
    };
    Some(String::from_utf8(told.stdout).expect("a number").trim().parse().expect("a number"))
}

#[test]
fn what_is_not_a_disk_is_named() {
    let dir = scratch();
    let text = |path: &std::path::Path| match Disk::open(path, Access::ReadWrite, Cache::Writeback) {
        Err(e) => e.to_string(),
        Ok(_) => panic!("opened"),
    };
    assert_eq!(text(&dir.path().join("none")), "no such file");
    assert_eq!(text(dir.path()), "is a directory, not a file or a block device");
    assert_eq!(text(std::path::Path::new("/dev/null")), "is a character device, not a file or a block device");
    std::fs::write(dir.path().join("odd"), [0; 700]).expect("written");
    assert_eq!(text(&dir.path().join("odd")), "its size of 700 bytes is not a multiple of 512");
    std::fs::write(dir.path().join("empty"), []).expect("written");
    assert_eq!(text(&dir.path().join("empty")), "is empty");
    assert_eq!(text(&dir.path().join("odd/disk")), "Not a directory");
}

#[test]
fn no_file_is_created_among_the_devices() {
    let dir = scratch();
    std::os::unix::fs::symlink("/dev", dir.path().join("nodes")).expect("linked");
    let name = format!("blockferry-test-{}", std::process::id());
    let places = ["/dev".into(), "/tmp/../dev".into(), "/dev/shm/..".into(), dir.path().join("nodes")];
    for path in places.map(|place: PathBuf| place.join(&name)) {
        let made = Disk::create(&path, 512, Cache::Writeback);
        // Where it was made, nothing may be left.
        let left = std::fs::remove_file(&path).is_ok();
        let refused = made.err().map(|error| error.to_string());
        let said = "there is no such device, and no file is created below /dev";
        assert_eq!((refused.as_deref(), left), (Some(said), false), "{}", path.display());
        assert_eq!(place_beside(&path).expect_err("refused"), said, "{}", path.display());
    }
    let memory = PathBuf::from("/dev/shm").join(&name);
    let made = Disk::create(&memory, 512, Cache::Writeback).map(drop);
    std::fs::remove_file(&memory).expect("was made");
    made.expect("a file in memory is what was asked for");
}

#[test]
fn a_second_user_is_refused_and_a_second_reader_is_not() {
    let dir = scratch();
    let (path, disk) = new_disk(&dir, 1);
    assert!(matches!(Disk::open(&path, Access::ReadWrite, Cache::Writeback), Err(OpenError::InUse)));
    assert!(matches!(Disk::open(&path, Access::ReadOnly, Cache::Writeback), Err(OpenError::InUse)));
    assert!(matches!(Disk::create(&path, 512, Cache::Writeback), Err(OpenError::Exists)));
    drop(disk);
    let _one = Disk::open(&path, Access::ReadOnly, Cache::Writeback).expect("a reader");
    let _two = Disk::open(&path, Access::ReadOnly, Cache::Writeback).expect("another reader");
}

#[test]
fn zeroes_and_trims_read_as_zero_and_stay_thin() {
    let dir = scratch();
    let (path, disk) = new_disk(&dir, 4);
    assert_eq!(disk.content().expect("looked"), Content::Hole);
    disk.write(&vec![7; 2 * MIB], 0, false).expect("written");
    assert_eq!(disk.content().expect("looked"), Content::Data);
    disk.write_zeroes(0, MIB as u64, true, true).expect("punched");
    disk.write_zeroes(MIB as u64, 512, false, false).expect("zeroed");
    let mut back = vec![1; MIB + 512];
    disk.read(&mut back, 0).expect("read");
    assert!(is_zero(&back));
    assert!(disk.extent(0, u64::MAX).expect("asked").hole, "the punched part is a hole");
    disk.trim(0, disk.size()).expect("trimmed");
    assert_eq!(disk.content().expect("looked"), Content::Hole);
    assert_eq!(std::fs::metadata(path).expect("there").len(), (4 * MIB) as u64);
}

#[test]
fn written_out_zeroes_stop_where_they_should() {
    let dir = scratch();
    let (_, disk) = new_disk(&dir, 1);
    disk.write(&vec![7; MIB], 0, false).expect("written");
    image_of(&disk).write_out_zeroes(1000, 200_000).expect("zeroed");
    let mut back = vec![0; MIB];
    disk.read(&mut back, 0).expect("read");
    assert!(back[..1000].iter().chain(&back[201_000..]).all(|b| *b == 7));
    assert!(is_zero(&back[1000..201_000]));
}

#[test]
fn direct_and_cached_requests_see_each_other() {
    let dir = tempfile::tempdir_in(".").expect("on a real file system");
    let path = dir.path().join("disk.raw");
    let Ok(disk) = Disk::create(&path, MIB as u64, Cache::None) else {
        eprintln!("SKIP: no O_DIRECT on this file system");
        return;
    };
    let mut buffer = AlignedBuffer::new(8192);
    buffer.fill(3);
    disk.write(&buffer, 4096, false).expect("direct");
    disk.write(&[4; 10], 4100, false).expect("through the cache");
    disk.read(&mut buffer, 4096).expect("direct");
    assert_eq!((buffer[3], buffer[4], buffer[13], buffer[14]), (3, 4, 4, 3));
}

#[test]
fn a_probe_finds_data_at_the_very_end() {
    let dir = scratch();
    let (path, disk) = new_disk(&dir, 8);
    disk.write(&vec![0; 8 * MIB], 0, false).expect("allocated");
    assert_eq!(disk.content().expect("looked"), Content::LooksEmpty);
    let other = std::fs::OpenOptions::new().write(true).open(path).expect("opened");
    other.write_all_at(&[1], (8 * MIB - 1) as u64).expect("written");
    assert_eq!(disk.content().expect("looked"), Content::Data);
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_zeroes() {
    let dir = scratch();
    let (path, disk) = new_disk(&dir, 1);
    let other = std::fs::OpenOptions::new().write(true).open(path).expect("opened");
    other.set_len(4096).expect("cut");
    let mut back = [0; 8192];
    assert!(disk.read(&mut back, 0).is_err());
    assert!(!disk.read_cached(&mut back, 0));
    // Who asks for extents before reads, to leave holes out, must not take it for one.
    let size = disk.size();
    let mut at = 0;
    while at < size {
        let extent = disk.extent(at, size).expect("told");
        assert!(!extent.hole || extent.offset + extent.length <= 4096, "{extent:?}");
        at += extent.length;
    }
}

#[test]
fn what_lives_in_memory_is_read_without_waiting() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let (_, disk) = new_disk(&dir, 1);
    disk.write(&[7; 8192], 4096, false).expect("written");
    let mut back = [1; 12288];
    assert!(disk.read_cached(&mut back, 0), "no worker is needed");
    assert!(back[..4096].iter().all(|byte| *byte == 0) && back[4096..].iter().all(|byte| *byte == 7));
}

#[test]
fn a_file_system_that_does_not_count_its_blocks_is_not_full() {
    assert_eq!(super::free_space_beside(std::path::Path::new("/proc/disk")).expect("looked"), None);
    let dir = scratch();
    let (path, disk) = new_disk(&dir, 1);
    let beside = super::free_space_beside(&path).expect("looked").expect("it counts them");
    assert_eq!(disk.free_space().expect("looked").expect("it counts them").0, beside.0);
}
