//! One disk image or block device: the only file that opens one, reads it, writes it, or asks what is in it.
//!
//! An [`Image`] is stateless between calls but for two facts: whether a sync has ever failed (rule D9: told once by the
//! kernel, remembered here for good), and what the file system turned out not to support. `disk.rs` alone uses it.

use std::ffi::OsString;
use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::fs::{
    Access as WriteOk, Advice, AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, Stat,
    StatVfs, StatxFlags, StatxTimestamp,
};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::pipe::SpliceFlags;

use crate::error::reason;
use crate::limits::{DIRECT_ALIGN, FOLIO_MAX, RESTART_LOOK, RESTART_PATIENCE, SECTOR, ZERO_STEP, ZERO_WRITE};

/// What `statfs` calls tmpfs and ramfs.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Through the page cache; a flush makes durable.
    #[default]
    Writeback,
    /// Past the page cache (`O_DIRECT`) wherever a request is aligned; a flush makes durable what the device caches.
    None,
}

impl Cache {
    /// Reads `writeback` or `none`.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "none" => Ok(Self::None),
            _ => Err(format!("'{text}' is neither writeback nor none")),
        }
    }
}

/// Who may use the disk beside this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write; nobody else on this host may have it open for us or for QEMU.
    ReadWrite,
    /// Read only; others may read too.
    ReadOnly,
    /// Read and write, and so do others: no lock is taken (a cluster file system inside, for example).
    Shared,
}

/// Why a disk could not be opened or created.
#[derive(Debug)]
pub enum OpenError {
    /// Nothing is there.
    Missing,
    /// A directory, a socket, a pipe.
    NotADisk(&'static str),
    /// The size is 0, or not a multiple of 512 bytes.
    OddSize(u64),
    /// Another process has it locked.
    InUse,
    /// A block device that is mounted, or claimed by another driver or process.
    Busy,
    /// Something is there already where a new file was to be created.
    Exists,
    /// Nothing is there, and it is a place of devices, where no file is created.
    NoDevice,
    /// The system's word.
    System(Error),
    /// It is an export of a server, and what stands against that.
    Server(String),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no such file"),
            Self::NotADisk(what) => write!(f, "is {what}, not a file or a block device"),
            Self::OddSize(0) => f.write_str("is empty"),
            Self::OddSize(size) => write!(f, "its size of {size} bytes is not a multiple of {SECTOR}"),
            Self::InUse => f.write_str("in use by another process"),
            Self::Busy => f.write_str("is mounted, or in use by the system or another process"),
            Self::Exists => f.write_str("exists already"),
            Self::NoDevice => f.write_str("there is no such device, and no file is created below /dev"),
            Self::System(error) => f.write_str(&reason(error)),
            Self::Server(cause) => f.write_str(cause),
        }
    }
}

impl std::error::Error for OpenError {}

impl From<Errno> for OpenError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::Missing,
            Errno::EXIST => Self::Exists,
            Errno::BUSY => Self::Busy,
            other => Self::System(other.into()),
        }
    }
}

/// What tells one image from another on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// The number of the file system's device, of a file.
    #[must_use]
    pub fn device(self) -> u64 {
        self.device
    }

    /// Of an export of a server: its URI, as a number.
    pub(super) fn of_server(uri: &str) -> Self {
        let mut hash = DefaultHasher::new();
        hash.write(uri.as_bytes());
        Self { device: u64::MAX - 1, inode: hash.finish() }
    }

    fn of(stat: &Stat, block_device: bool) -> Self {
        if block_device {
            // Two nodes of one device are one disk.
            Self { device: u64::MAX, inode: stat.st_rdev }
        } else {
            Self { device: stat.st_dev, inode: stat.st_ino }
        }
    }
}

/// What tells an image from another one in its place, also after the host has been restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// A file.
    File {
        /// Its number in its file system; used again for new files once it is removed.
        inode: u64,
        /// When it was made, in nanoseconds, where the file system knows.
        born_ns: Option<i128>,
    },
    /// A block device or an export of a server: nothing but the path or the URI that leads to it.
    Device,
}

/// A run of bytes that is either all data, as far as the file system knows, or all hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub length: u64,
    /// A hole: nothing allocated, reads as zero.
    pub hole: bool,
}

/// What a disk holds, before anybody writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The file system says that there is nothing but holes: all of it reads as zero.
    Hole,
    /// No data was found where it was looked for, but that was not everywhere: not known to read as zero.
    LooksEmpty,
    /// There is data.
    Data,
}

/// The syncs of one disk: one runs at a time.
#[derive(Debug, Default)]
struct Syncs {
    running: bool,
    started: u64,
    finished: u64,
}

/// An open image.
#[derive(Debug)]
pub(super) struct Image {
    file: OwnedFd,
    /// The same file opened past the page cache, with `cache=none`.
    direct: Option<OwnedFd>,
    size: u64,
    block_device: bool,
    identity: Identity,
    syncs: Mutex<Syncs>,
    /// A sync has ended.
    synced: Condvar,
    /// A sync failed once: nothing written since the last good one can be trusted (D9).
    poisoned: AtomicBool,
    /// Reads that must not wait are possible here.
    nowait: AtomicBool,
    /// On a file system that lives in memory: no read waits for a device, whatever it says of reads that must not wait.
    in_memory: bool,
}

impl Image {
    /// Opens and locks an existing file or block device.
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong with it; nothing is changed.
    pub(super) fn open(path: &Path, access: Access, cache: Cache) -> std::result::Result<Self, OpenError> {
        let stat = rustix::fs::stat(path)?;
        let block_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(OpenError::NotADisk("a directory")),
            FileType::CharacterDevice => return Err(OpenError::NotADisk("a character device")),
            FileType::Fifo => return Err(OpenError::NotADisk("a pipe")),
            FileType::Socket => return Err(OpenError::NotADisk("a socket")),
            _ => return Err(OpenError::NotADisk("something else")),
        };
        let mode = if access == Access::ReadOnly { OFlags::RDONLY } else { OFlags::RDWR };
        // Of a block device the kernel then says whether it is mounted, or part of something that is.
        let sole = if block_device && access == Access::ReadWrite { OFlags::EXCL } else { OFlags::empty() };
        let file = rustix::fs::open(path, mode | sole | OFlags::CLOEXEC, Mode::empty())?;
        Self::from_file(path, file, block_device, access, cache)
    }

    /// Creates a sparse file of `size` bytes and opens it; never touches one that exists.
    ///
    /// # Errors
    /// [`OpenError`]; a file that was created and cannot be used is removed again.
    pub(super) fn create(path: &Path, size: u64, cache: Cache) -> std::result::Result<Self, OpenError> {
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(OpenError::OddSize(size));
        }
        if is_among_devices(path)? {
            return Err(OpenError::NoDevice);
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        let made = rustix::fs::ftruncate(&file, size)
            .map_err(OpenError::from)
            .and_then(|()| Self::from_file(path, file, false, Access::ReadWrite, cache));
        if made.is_err() {
            let _ = rustix::fs::unlink(path);
        }
        made
    }

    fn from_file(
        path: &Path,
        file: OwnedFd,
        block_device: bool,
        access: Access,
        cache: Cache,
    ) -> std::result::Result<Self, OpenError> {
        lock(&file, access)?;
        let stat = rustix::fs::fstat(&file)?;
        let size = if block_device {
            rustix::fs::seek(&file, SeekFrom::End(0))?
        } else {
            u64::try_from(stat.st_size).unwrap_or(0)
        };
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(OpenError::OddSize(size));
        }
        let direct = match cache {
            Cache::Writeback => None,
            Cache::None => {
                let mode = if access == Access::ReadOnly { OFlags::RDONLY } else { OFlags::RDWR };
                Some(rustix::fs::open(path, mode | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?)
            }
        };
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|system| IN_MEMORY.contains(&system.f_type));
        Ok(Self {
            file,
            direct,
            size,
            block_device,
            in_memory: in_memory && !block_device,
            identity: Identity::of(&stat, block_device),
            syncs: Mutex::default(),
            synced: Condvar::new(),
            poisoned: AtomicBool::new(false),
            nowait: AtomicBool::new(true),
        })
    }

    /// Removes the file at `path` if it is one that was being created with `size` bytes and nothing more: all hole, of
    /// that size or still of none, and nobody's. Returns whether it did.
    ///
    /// # Errors
    /// The system's word.
    pub(super) fn remove_unfinished(path: &Path, size: u64) -> Result<bool> {
        let file = match rustix::fs::open(path, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let stat = rustix::fs::fstat(&file)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let ours = is_file && (stat.st_size == 0 || u64::try_from(stat.st_size) == Ok(size));
        // Nothing but a hole: looking for data finds the end.
        let empty = ours && matches!(rustix::fs::seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO));
        if !empty || lock(&file, Access::ReadWrite).is_err() {
            return Ok(false);
        }
        if Self::identify(path) == Some(Identity::of(&stat, false)) {
            rustix::fs::unlink(path)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether no name leads to its file any more: what is in it lives only as long as it is open. Never so of a block
    /// device.
    #[must_use]
    pub(super) fn is_removed(&self) -> bool {
        !self.block_device && rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// Whether its file is as long as it was when it was opened.
    ///
    /// # Errors
    /// One line.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let stat =
            rustix::fs::fstat(&self.file).map_err(|errno| format!("cannot be read: {}", reason(&errno.into())))?;
        if !self.block_device && u64::try_from(stat.st_size).unwrap_or(0) < self.size {
            return Err(format!("its file has become shorter: {} bytes of {}", stat.st_size, self.size));
        }
        Ok(())
    }

    /// Which image is at `path`, without opening it; `None` if there is none.
    #[must_use]
    pub(super) fn identify(path: &Path) -> Option<Identity> {
        let stat = rustix::fs::stat(path).ok()?;
        Some(Identity::of(&stat, FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice))
    }

    /// Its size in bytes, a multiple of 512, as it was when opened.
    #[must_use]
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Which image this is, whatever path led to it.
    #[must_use]
    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// What tells this image from others for as long as it exists.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn lasting(&self) -> Result<Lasting> {
        if self.block_device {
            return Ok(Lasting::Device);
        }
        let inode = rustix::fs::fstat(&self.file)?.st_ino;
        let born = match rustix::fs::statx(&self.file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
            Ok(stat) => {
                StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME).then_some(stat.stx_btime)
            }
            Err(Errno::NOSYS | Errno::PERM) => None,
            Err(e) => return Err(e.into()),
        };
        let nanoseconds = |born: StatxTimestamp| i128::from(born.tv_sec) * 1_000_000_000 + i128::from(born.tv_nsec);
        Ok(Lasting::File { inode, born_ns: born.map(nanoseconds) })
    }

    /// Whether requests bypass the page cache where they can: then every one of them waits for the device.
    #[must_use]
    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Reads exactly `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The device's error; [`ErrorKind::UnexpectedEof`] if the file has become shorter.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let rest = &mut buffer[done..];
            match rustix::io::pread(self.way(rest.as_ptr(), rest.len(), at), &mut *rest, at) {
                Ok(0) => return Err(Error::new(ErrorKind::UnexpectedEof, "the image has become shorter")),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads `buffer.len()` bytes at `offset` if that needs no waiting for the device. `false`: it would, and what the
    /// buffer holds means nothing.
    #[must_use]
    pub(super) fn read_cached(&self, buffer: &mut [u8], offset: u64) -> bool {
        if self.direct.is_some() {
            return false;
        }
        if self.in_memory {
            // A failure is met again, and told, where reads may wait.
            return self.read(buffer, offset).is_ok();
        }
        if !self.nowait.load(Ordering::Relaxed) {
            return false;
        }
        let wanted = buffer.len();
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, flags) {
            Ok(n) => n == wanted,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.nowait.store(false, Ordering::Relaxed);
                false
            }
            Err(_) => false,
        }
    }

    /// Puts the pages of up to `length` bytes at `offset` into a pipe that nobody reads meanwhile, waiting for the
    /// device if need be. Returns how many bytes it had room for, at least one.
    ///
    /// # Errors
    /// As [`Image::read`], and those of files that have no pages to give; the pipe may hold something then.
    pub(super) fn fill_pipe(&self, pipe: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize> {
        let mut done = 0;
        while done < length {
            let mut at = offset + done as u64;
            let flags = SpliceFlags::NONBLOCK;
            match rustix::pipe::splice(&self.file, Some(&mut at), pipe, None, length - done, flags) {
                Ok(0) => return Err(Error::new(ErrorKind::UnexpectedEof, "the image has become shorter")),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                // Full.
                Err(Errno::AGAIN) if done > 0 => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }

    /// As [`Image::read`]; tells whether the page cache did not have it and has it only now, where that can be seen.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub(super) fn read_and_tell(&self, buffer: &mut [u8], offset: u64) -> Result<bool> {
        if self.read_cached(buffer, offset) {
            return Ok(false);
        }
        self.read(buffer, offset)?;
        Ok(self.direct.is_none() && self.nowait.load(Ordering::Relaxed))
    }

    /// Writes all of `bytes` at `offset`; with `durable` (FUA) they are on stable storage afterwards.
    ///
    /// # Errors
    /// The device's error. Part of the bytes may have been written.
    pub(super) fn write(&self, bytes: &[u8], offset: u64, durable: bool) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let rest = &bytes[done..];
            match rustix::io::pwrite(self.way(rest.as_ptr(), rest.len(), at), rest, at) {
                Ok(0) => return Err(Error::from(ErrorKind::WriteZero)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if durable { self.flush() } else { Ok(()) }
    }

    /// Makes everything written so far durable. Callers that come while a sync runs share the next one.
    ///
    /// # Errors
    /// The device's error. The kernel tells it once and may then believe the lost pages clean, so every later flush of
    /// this disk fails too, and so does everybody who waits for the same one (D9): two syncs at once could have one of
    /// them take the error and the other one say that all is well.
    pub(super) fn flush(&self) -> Result<()> {
        let mut syncs = self.lock_syncs();
        let mine = syncs.started + 1;
        loop {
            if self.is_poisoned() {
                return Err(Error::other("an earlier sync failed"));
            }
            if syncs.finished >= mine {
                return Ok(());
            }
            if syncs.running {
                syncs = self.synced.wait(syncs).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            syncs.running = true;
            syncs.started += 1;
            drop(syncs);
            let result = rustix::fs::fdatasync(&self.file);
            if result.is_err() {
                self.poisoned.store(true, Ordering::Release);
            }
            syncs = self.lock_syncs();
            syncs.running = false;
            syncs.finished = syncs.started;
            self.synced.notify_all();
            result?;
        }
    }

    /// As if a sync had failed.
    #[cfg(test)]
    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    fn lock_syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a sync has ever failed (D9).
    #[must_use]
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// The guest needs `length` bytes at `offset` no more: their room is given back where the file system can do so.
    /// What they read as afterwards is not promised.
    ///
    /// # Errors
    /// The device's error; that it cannot trim is none.
    pub(super) fn trim(&self, offset: u64, length: u64) -> Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes `length` bytes at `offset` read as zero. With `may_punch` as a hole where possible, else allocated. With
    /// `fast` only if that costs no writing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when `fast` and not possible; else the device's error.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_punch: bool, fast: bool) -> Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        for way in [punch, range].into_iter().skip(usize::from(!may_punch)) {
            // There the kernel may write the zeroes out, however long that takes.
            if fast && way == range && self.block_device {
                break;
            }
            match self.allocate(way, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if fast {
            return Err(Error::from(ErrorKind::Unsupported));
        }
        self.write_out_zeroes(offset, length)
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> std::result::Result<(), Errno> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    pub(super) fn write_out_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        const PAGE: [u8; ZERO_STEP] = [0; ZERO_STEP];
        let pages = [IoSlice::new(&PAGE); ZERO_WRITE / ZERO_STEP];
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let written = if left >= ZERO_WRITE {
                rustix::io::pwritev(&self.file, &pages, at)
            } else {
                rustix::io::pwrite(&self.file, &PAGE[..left.min(PAGE.len())], at)
            };
            match written {
                Ok(n) => at += n as u64,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Asks for `length` bytes at `offset` to be brought into the page cache; only a hint.
    pub(super) fn prefetch(&self, offset: u64, length: u64) {
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed);
    }

    /// Forgets what the page cache holds of the disk: somebody else has changed it. Only a hint.
    pub(super) fn forget_cache(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
    }

    /// Lets go of what the page cache holds of a range and need not be written, and of what it may hold together with
    /// the first of it: the kernel lets go of large folios only as a whole. Only a hint.
    pub(super) fn forget_range(&self, range: &Range<u64>) {
        let start = range.start - range.start % FOLIO_MAX;
        // A length of 0 would be all the rest of the file.
        if let Some(length) = NonZeroU64::new(range.end - start) {
            let _ = rustix::fs::fadvise(&self.file, start, Some(length), Advice::DontNeed);
        }
    }

    /// The extent at `offset`, at most up to `end`. What the file system cannot tell counts as data.
    ///
    /// # Errors
    /// The device's error.
    pub(super) fn extent(&self, offset: u64, end: u64) -> Result<Extent> {
        let end = end.min(self.size);
        let data = |until: u64| Extent { offset, length: until.min(end) - offset, hole: false };
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) if at > offset => Ok(Extent { offset, length: at.min(end) - offset, hole: true }),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(at) if at > offset => Ok(data(at)),
                Ok(_) | Err(Errno::INVAL | Errno::NXIO | Errno::OPNOTSUPP) => Ok(data(end)),
                Err(e) => Err(e.into()),
            },
            // All that follows is a hole, or there is no more of it: that reads as an error, and not as zeroes.
            Err(Errno::NXIO) if self.check().is_ok() => Ok(Extent { offset, length: end - offset, hole: true }),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(data(end)),
            Err(e) => Err(e.into()),
        }
    }

    /// Bytes that the file system has allocated for the image; of a block device all of them.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn allocated(&self) -> Result<u64> {
        if self.block_device {
            return Ok(self.size);
        }
        let blocks = rustix::fs::fstat(&self.file)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(SECTOR))
    }

    /// Free bytes on the file system that holds the image, and which file system that is; `None` for a block device,
    /// which needs none, and where nobody knows.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn free_space(&self) -> Result<Option<(u64, u64)>> {
        if self.block_device {
            return Ok(None);
        }
        Ok(room(&rustix::fs::fstatvfs(&self.file)?).map(|free| (self.identity.device, free)))
    }

    /// The descriptor a request goes through: past the page cache where that is wanted and everything is aligned. The
    /// kernel keeps the two ways coherent.
    fn way(&self, memory: *const u8, length: usize, offset: u64) -> BorrowedFd<'_> {
        match &self.direct {
            Some(direct)
                if offset.is_multiple_of(DIRECT_ALIGN as u64)
                    && length.is_multiple_of(DIRECT_ALIGN)
                    && memory.addr().is_multiple_of(DIRECT_ALIGN) =>
            {
                direct.as_fd()
            }
            _ => self.file.as_fd(),
        }
    }
}

/// Free bytes on the file system on which a file at `path` would be made, and which file system that is; `None` where
/// nobody knows.
///
/// # Errors
/// The system's error: there is no such directory, for example.
pub fn free_space_beside(path: &Path) -> Result<Option<(u64, u64)>> {
    let directory = directory_of(path);
    let free = room(&rustix::fs::statvfs(directory)?);
    let file_system = rustix::fs::stat(directory)?.st_dev;
    Ok(free.map(|free| (file_system, free)))
}

/// The bytes that a file system has free. One that has no blocks at all does not count them (FUSE, as a rule).
fn room(stat: &StatVfs) -> Option<u64> {
    (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Makes the name of a created file durable.
///
/// # Errors
/// The system's error.
pub fn sync_directory_of(path: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory_of(path), flags, Mode::empty())?;
    Ok(rustix::fs::fsync(&directory)?)
}

/// Where a file at `path` would be made: its directory and its name there. Two paths that would make one file are one
/// place.
///
/// # Errors
/// Why none can be made there.
pub fn place_beside(path: &Path) -> std::result::Result<(Identity, OsString), String> {
    let directory = directory_of(path);
    let named = |errno: Errno| format!("{}: {}", directory.display(), reason(&errno.into()));
    if rustix::fs::lstat(path).is_ok() {
        return Err(format!("{} is a link to nothing", path.display()));
    }
    let stat = rustix::fs::stat(directory).map_err(named)?;
    if is_among_devices(path).map_err(named)? {
        return Err(OpenError::NoDevice.to_string());
    }
    // For a root that may write anywhere this still tells of a read-only file system.
    rustix::fs::access(directory, WriteOk::WRITE_OK | WriteOk::EXEC_OK).map_err(named)?;
    let name = path.file_name().ok_or_else(|| format!("{} names no file", path.display()))?;
    Ok((Identity::of(&stat, false), name.to_owned()))
}

/// Whether a file at `path` would be made among the devices: in memory, and gone with the next boot, where somebody
/// meant a device that is not there. /dev/shm is for files, and whoever names it knows that it is memory.
fn is_among_devices(path: &Path) -> std::result::Result<bool, Errno> {
    let directory =
        std::fs::canonicalize(directory_of(path)).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(directory.starts_with("/dev") && !directory.starts_with("/dev/shm"))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Locks an image against a second blockferry (`flock`) and against QEMU, whose byte-range locks a whole-file one
/// collides with; but they are read locks, so that a reader does not see a QEMU that writes already. The kernel drops
/// both when the process ends. They stay ours only as long as nobody else in this process opens and closes the same
/// file; that is one reason why only this file opens images.
fn lock(file: &OwnedFd, access: Access) -> std::result::Result<(), OpenError> {
    let operation = match access {
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::Shared => return Ok(()),
    };
    let deadline = Instant::now() + RESTART_PATIENCE;
    loop {
        let results = [rustix::fs::flock(file, operation), rustix::fs::fcntl_lock(file, operation)];
        // Any other error is a file system without locks (some network ones): the operator's own care.
        if !results.iter().any(|result| matches!(result, Err(Errno::AGAIN | Errno::ACCESS))) {
            return Ok(());
        }
        // A process that was killed a moment ago keeps them until its last request has left the kernel.
        if Instant::now() >= deadline {
            return Err(OpenError::InUse);
        }
        std::thread::sleep(RESTART_LOOK);
    }
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole lines first, eight words at a time. Written out: a compiler that is told to save room compares two arrays
    // by a call, a byte at a time.
    let (lines, tail) = bytes.as_chunks::<64>();
    let is_empty = |line: &[u8; 64]| {
        let [a, b, c, d, e, f, g, h] = line.as_chunks::<8>().0 else { return false };
        let word = |bytes: &[u8; 8]| u64::from_ne_bytes(*bytes);
        word(a) | word(b) | word(c) | word(d) | word(e) | word(f) | word(g) | word(h) == 0
    };
    lines.iter().all(is_empty) && tail.iter().all(|byte| *byte == 0)
}

/// Memory for requests, aligned as a disk with `cache=none` wants it. Fresh memory is not touched until it is used.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` bytes of zero.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + DIRECT_ALIGN];
        let start = memory.as_ptr().addr().wrapping_neg() % DIRECT_ALIGN;
        Self { memory, start, length }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}
