//! Disks for the tests to serve: a file through and past the page cache, a block device; and what they are filled with.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};

use crate::chance::Chance;
use crate::harness::{output, peer};

/// One mebibyte, in bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// What stands behind an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file, through the page cache.
    Cached,
    /// A file, with `O_DIRECT`.
    Direct,
    /// A block device.
    Block,
}

/// A disk in a folder of its own.
pub(crate) struct Image {
    kind: Kind,
    /// What is given to blockferry.
    pub(crate) path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Image {
    /// A disk full of holes, or `None`, loudly, where this machine has no such thing.
    pub(crate) fn new(kind: Kind, size: u64) -> Option<Self> {
        let folder = disk_scratch();
        let file = folder.path().join("disk.raw");
        File::create(&file).expect("an image").set_len(size).expect("its size");
        let path = match kind {
            Kind::Cached => file,
            Kind::Direct => {
                if let Err(error) = rustix::fs::open(&file, OFlags::RDWR | OFlags::DIRECT, Mode::empty()) {
                    eprintln!("SKIP: no O_DIRECT in {}: {error}", folder.path().display());
                    return None;
                }
                file
            }
            Kind::Block => {
                let attached = output(Command::new(peer("losetup")?).args(["--find", "--show"]).arg(&file));
                if !attached.status.success() {
                    eprintln!("SKIP: no loop device: {}", String::from_utf8_lossy(&attached.stderr).trim_end());
                    return None;
                }
                String::from_utf8(attached.stdout).expect("a path").trim_end().into()
            }
        };
        Some(Self { kind, path, _folder: folder })
    }

    /// All kinds that this machine has.
    pub(crate) fn each(size: u64) -> impl Iterator<Item = Self> {
        [Kind::Cached, Kind::Direct, Kind::Block].into_iter().filter_map(move |kind| Self::new(kind, size))
    }

    /// Which kind it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The arguments that export it as `name`.
    pub(crate) fn arguments(&self, name: &str) -> [String; 3] {
        let cache = if self.kind == Kind::Direct { "none" } else { "writeback" };
        [format!("{name}={}", self.path.display()), "--cache".to_owned(), cache.to_owned()]
    }

    /// Whether the file system tells its holes.
    pub(crate) fn has_holes(&self) -> bool {
        self.kind != Kind::Block
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.kind == Kind::Block
            && let Some(losetup) = peer("losetup")
        {
            let _ = output(Command::new(losetup).arg("--detach").arg(&self.path));
        }
    }
}

/// An empty folder on the file system of the build, which is a disk's where that of `/tmp` may be none.
#[must_use]
pub(crate) fn disk_scratch() -> tempfile::TempDir {
    let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(place).expect("the folder for tests");
    tempfile::Builder::new().prefix("blockferry-it-").tempdir_in(place).expect("a folder on a disk")
}

/// A file of `size` bytes in which a quarter is data, a mebibyte at each multiple of four, and the rest holes.
pub(crate) fn sparse_file(path: &Path, size: u64, seed: u64) {
    let file = File::create(path).expect("a file");
    file.set_len(size).expect("its size");
    let mut chance = Chance::new(seed);
    for offset in (0..size).step_by(4 << 20) {
        file.write_all_at(&chance.bytes(1 << 20), offset).expect("data");
    }
    file.sync_all().expect("a sync");
}

/// Asserts that two files or devices hold the same bytes.
pub(crate) fn assert_same(one: &Path, other: &Path, size: u64) {
    let (a, b) = (File::open(one).expect("one"), File::open(other).expect("the other"));
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let length = usize::try_from((size - at).min(1 << 20)).expect("small");
        a.read_exact_at(&mut left[..length], at).expect("a read");
        b.read_exact_at(&mut right[..length], at).expect("a read");
        assert!(left[..length] == right[..length], "{} and {} differ near {at}", one.display(), other.display());
        at += length as u64;
    }
}

/// Bytes that a file really takes.
pub(crate) fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).expect("a file").blocks() * 512
}

/// How many bytes of a file are in the page cache, as somebody else's program tells; `None` without that.
pub(crate) fn cached(path: &Path) -> Option<u64> {
    // To look by reading would bring in what is looked for.
    let told = Command::new(peer("fincore")?).args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output();
    let told = String::from_utf8(told.expect("it runs").stdout).expect("a number");
    Some(told.trim().parse().expect("a number"))
}
