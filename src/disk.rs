//! One disk of a guest: an image or block device of this host, or an export of somebody's NBD server.
//!
//! What a [`Disk`] is stays in here: `disk/image.rs` is the only file that touches images, `disk/remote.rs` the only
//! one that speaks with a server as a disk; everybody else reads, writes and flushes. Nobody but `export.rs` calls the
//! functions that change a disk.

mod image;
mod remote;
#[cfg(test)]
pub(crate) mod tests;

use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use image::Image;
pub use image::{
    Access, AlignedBuffer, Cache, Content, Extent, Identity, Lasting, OpenError, free_space_beside, is_zero,
    place_beside, sync_directory_of,
};
pub use remote::ExportInfo;
use remote::Remote;

use crate::error::reason;
use crate::limits::{DIRECT_ALIGN, PROBE_BYTES, PROBES, SECTOR};
use crate::uri::{NbdUri, is_nbd};

/// An open disk.
#[derive(Debug)]
pub struct Disk(Kind);

#[derive(Debug)]
enum Kind {
    Image(Image),
    Remote(Box<Remote>),
}

/// What has come of the question in which layers of a chain of images things stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depths {
    /// All of it was told, by connections that were open before the question was asked.
    Told,
    /// Nobody can tell.
    Unknown,
    /// A connection was opened meanwhile: part of the answer may be of another process, and of another chain.
    Interrupted,
}

/// The server's export that `path` is the URI of; `None`: it is the path of an image.
///
/// # Errors
/// The cause, for a usage error.
pub fn server_of(path: &Path) -> std::result::Result<Option<NbdUri>, String> {
    match path.to_str().filter(|text| is_nbd(text)) {
        Some(text) => NbdUri::parse(text).map(Some),
        None => Ok(None),
    }
}

/// The smallest range of a disk that holds both.
#[must_use]
pub fn around(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => b.clone(),
        (_, true) => a.clone(),
        _ => a.start.min(b.start)..a.end.max(b.end),
    }
}

/// `path` from the root on; a URI as it is.
///
/// # Errors
/// The system's.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if path.to_str().is_some_and(is_nbd) { Ok(path.to_owned()) } else { std::path::absolute(path) }
}

impl Disk {
    /// Opens an existing file or block device and locks it, or an export of a server, where no lock is possible.
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong with it; nothing is changed.
    pub fn open(path: &Path, access: Access, cache: Cache) -> std::result::Result<Self, OpenError> {
        match server_of(path).map_err(OpenError::Server)? {
            Some(uri) => Remote::open(&uri, access).map(|remote| Self(Kind::Remote(Box::new(remote)))),
            None => Image::open(path, access, cache).map(|image| Self(Kind::Image(image))),
        }
    }

    /// Creates a sparse file of `size` bytes and opens it; never touches one that exists.
    ///
    /// # Errors
    /// [`OpenError`]; a file that was created and cannot be used is removed again.
    pub fn create(path: &Path, size: u64, cache: Cache) -> std::result::Result<Self, OpenError> {
        Image::create(path, size, cache).map(|image| Self(Kind::Image(image)))
    }

    /// Removes the file at `path` if it is one that was being created with `size` bytes and nothing more: all hole, of
    /// that size or still of none, and nobody's. Returns whether it did.
    ///
    /// # Errors
    /// The system's word.
    pub fn remove_unfinished(path: &Path, size: u64) -> Result<bool> {
        Image::remove_unfinished(path, size)
    }

    /// Which image is at `path`, without opening it; `None` if there is none.
    #[must_use]
    pub fn identify(path: &Path) -> Option<Identity> {
        match server_of(path) {
            Ok(Some(uri)) => Some(Identity::of_server(&uri.to_string())),
            _ => Image::identify(path),
        }
    }

    /// Whether no name leads to its file any more: what is in it lives only as long as it is open. Never so of a block
    /// device or a server.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        matches!(&self.0, Kind::Image(image) if image.is_removed())
    }

    /// Whether the disk is still what it was when it was opened, and can be read; how it is not, otherwise. Reads its
    /// first and its last sector. A file without a name ([`Disk::is_removed`]) is as good as another here.
    ///
    /// # Errors
    /// One line.
    pub fn check(&self) -> std::result::Result<(), String> {
        if self.is_poisoned() {
            return Err("a sync has failed: what was written since the last good one may be lost".to_owned());
        }
        if let Kind::Image(image) = &self.0 {
            image.check()?;
        }
        let mut sector = AlignedBuffer::new(usize::try_from(SECTOR).unwrap_or(DIRECT_ALIGN));
        let ends = [0, self.size() - SECTOR];
        let read = ends.into_iter().try_for_each(|at| self.read(&mut sector, at));
        read.map_err(|error| format!("cannot be read: {}", reason(&error)))
    }

    /// Its size in bytes, a multiple of 512, as it was when opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.0 {
            Kind::Image(image) => image.size(),
            Kind::Remote(remote) => remote.size(),
        }
    }

    /// Which image or export this is, whatever path led to it.
    #[must_use]
    pub fn identity(&self) -> Identity {
        match &self.0 {
            Kind::Image(image) => image.identity(),
            Kind::Remote(remote) => Identity::of_server(&remote.uri().to_string()),
        }
    }

    /// What tells it from others for as long as it exists.
    ///
    /// # Errors
    /// The file system's.
    pub fn lasting(&self) -> Result<Lasting> {
        match &self.0 {
            Kind::Image(image) => image.lasting(),
            Kind::Remote(_) => Ok(Lasting::Device),
        }
    }

    /// Whether every request waits: for the device past the page cache, or for a server.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        match &self.0 {
            Kind::Image(image) => image.is_direct(),
            Kind::Remote(_) => true,
        }
    }

    /// Whether it is an export of a server: nothing locks it.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self.0, Kind::Remote(_))
    }

    /// What the server says of it, if it is an export of one.
    #[must_use]
    pub fn server(&self) -> Option<&ExportInfo> {
        match &self.0 {
            Kind::Image(_) => None,
            Kind::Remote(remote) => Some(remote.info()),
        }
    }

    /// Reads exactly `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The device's error; [`ErrorKind::UnexpectedEof`] if the file has become shorter.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match &self.0 {
            Kind::Image(image) => image.read(buffer, offset),
            Kind::Remote(remote) => remote.read(buffer, offset),
        }
    }

    /// Reads `buffer.len()` bytes at `offset` if that needs no waiting. `false`: it would, and what the buffer holds
    /// means nothing.
    #[must_use]
    pub fn read_cached(&self, buffer: &mut [u8], offset: u64) -> bool {
        matches!(&self.0, Kind::Image(image) if image.read_cached(buffer, offset))
    }

    /// Puts the pages of up to `length` bytes at `offset` into a pipe that nobody reads meanwhile, waiting for the
    /// device if need be. Returns how many bytes it had room for, at least one.
    ///
    /// # Errors
    /// As [`Disk::read`], and those of files that have no pages to give; the pipe may hold something then.
    pub fn fill_pipe(&self, pipe: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize> {
        match &self.0 {
            Kind::Image(image) => image.fill_pipe(pipe, offset, length),
            // It has no pages here.
            Kind::Remote(_) => Err(Error::from(ErrorKind::Unsupported)),
        }
    }

    /// As [`Disk::read`]; tells whether the page cache did not have it and has it only now, where that can be seen.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn read_and_tell(&self, buffer: &mut [u8], offset: u64) -> Result<bool> {
        match &self.0 {
            Kind::Image(image) => image.read_and_tell(buffer, offset),
            Kind::Remote(remote) => remote.read(buffer, offset).map(|()| false),
        }
    }

    /// Writes all of `bytes` at `offset`; with `durable` (FUA) they are on stable storage afterwards.
    ///
    /// # Errors
    /// The device's error. Part of the bytes may have been written.
    pub fn write(&self, bytes: &[u8], offset: u64, durable: bool) -> Result<()> {
        match &self.0 {
            Kind::Image(image) => image.write(bytes, offset, durable),
            Kind::Remote(remote) => {
                remote.write(bytes, offset)?;
                if durable { remote.flush() } else { Ok(()) }
            }
        }
    }

    /// Makes everything written so far durable. Callers that come while a sync runs share the next one.
    ///
    /// # Errors
    /// The device's error. The kernel tells it once and may then believe the lost pages clean, so every later flush of
    /// this disk fails too, and so does everybody who waits for the same one (D9): two syncs at once could have one of
    /// them take the error and the other one say that all is well.
    pub fn flush(&self) -> Result<()> {
        match &self.0 {
            Kind::Image(image) => image.flush(),
            Kind::Remote(remote) => remote.flush(),
        }
    }

    /// As if a sync had failed.
    #[cfg(test)]
    pub(crate) fn poison(&self) {
        match &self.0 {
            Kind::Image(image) => image.poison(),
            Kind::Remote(remote) => remote.poison(),
        }
    }

    /// Whether a sync has ever failed, or a server is gone with what was not flushed (D9).
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        match &self.0 {
            Kind::Image(image) => image.is_poisoned(),
            Kind::Remote(remote) => remote.is_poisoned(),
        }
    }

    /// The guest needs `length` bytes at `offset` no more: their room is given back where that is possible. What they
    /// read as afterwards is not promised.
    ///
    /// # Errors
    /// The device's error; that it cannot trim is none.
    pub fn trim(&self, offset: u64, length: u64) -> Result<()> {
        match &self.0 {
            Kind::Image(image) => image.trim(offset, length),
            Kind::Remote(remote) => remote.trim(offset, length),
        }
    }

    /// Makes `length` bytes at `offset` read as zero. With `may_punch` as a hole where possible, else allocated. With
    /// `fast` only if that costs no writing, which of a server nobody can tell.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when `fast` and not possible; else the device's error.
    pub fn write_zeroes(&self, offset: u64, length: u64, may_punch: bool, fast: bool) -> Result<()> {
        match &self.0 {
            Kind::Image(image) => image.write_zeroes(offset, length, may_punch, fast),
            Kind::Remote(_) if fast => Err(Error::from(ErrorKind::Unsupported)),
            Kind::Remote(remote) => remote.write_zeroes(offset, length, may_punch),
        }
    }

    /// Asks for `length` bytes at `offset` to be brought into the page cache; only a hint.
    pub fn prefetch(&self, offset: u64, length: u64) {
        if let Kind::Image(image) = &self.0 {
            image.prefetch(offset, length);
        }
    }

    /// Forgets what the page cache holds of the disk: somebody else has changed it. Only a hint.
    pub fn forget_cache(&self) {
        if let Kind::Image(image) = &self.0 {
            image.forget_cache();
        }
    }

    /// Lets go of what the page cache holds of a range and need not be written. Only a hint.
    pub fn forget_range(&self, range: &Range<u64>) {
        if let Kind::Image(image) = &self.0 {
            image.forget_range(range);
        }
    }

    /// The extent at `offset`, at most up to `end`. What nobody can tell counts as data.
    ///
    /// # Errors
    /// The device's error.
    pub fn extent(&self, offset: u64, end: u64) -> Result<Extent> {
        match &self.0 {
            Kind::Image(image) => image.extent(offset, end),
            Kind::Remote(remote) => remote.extent(offset, end.min(remote.size())),
        }
    }

    /// In which layers of a chain of images the range up to `end` stands: calls `each(offset, length, depth)`, where 1
    /// is the top layer, more is one below it, and 0 is none. What was told counts only with [`Depths::Told`].
    ///
    /// # Errors
    /// The server's error.
    pub fn depths(&self, offset: u64, end: u64, each: &mut dyn FnMut(u64, u64, u64)) -> Result<Depths> {
        match &self.0 {
            // A file has no layers that anybody here could see.
            Kind::Image(_) => Ok(Depths::Unknown),
            Kind::Remote(remote) => remote.depths(offset, end.min(remote.size()), each),
        }
    }

    /// Bytes that are allocated for the disk; of a block device all of them, of a server what it tells of its holes.
    ///
    /// # Errors
    /// The system's error.
    pub fn allocated(&self) -> Result<u64> {
        match &self.0 {
            Kind::Image(image) => image.allocated(),
            Kind::Remote(_) => self.data_bytes(),
        }
    }

    /// Free bytes on the file system that holds the image, and which file system that is; `None` for a block device,
    /// which needs none, for a server, and where nobody knows.
    ///
    /// # Errors
    /// The system's error.
    pub fn free_space(&self) -> Result<Option<(u64, u64)>> {
        match &self.0 {
            Kind::Image(image) => image.free_space(),
            Kind::Remote(_) => Ok(None),
        }
    }

    /// Bytes that the file system holds data for; all of it where it cannot say.
    ///
    /// # Errors
    /// The device's error.
    pub fn data_bytes(&self) -> Result<u64> {
        let (mut at, mut data) = (0, 0);
        while at < self.size() {
            let extent = self.extent(at, self.size())?;
            data += if extent.hole { 0 } else { extent.length };
            at += extent.length;
        }
        Ok(data)
    }

    /// Looks whether anything is on the disk. A file tells its holes; allocated runs and block devices are probed at
    /// the beginning, at the end, and at a bounded number of places between.
    ///
    /// # Errors
    /// The device's error.
    pub fn content(&self) -> Result<Content> {
        let data = self.data_bytes()?;
        if data == 0 {
            return Ok(Content::Hole);
        }
        let mut buffer = vec![0; PROBE_BYTES];
        let stride = (data / PROBES).max(PROBE_BYTES as u64);
        let mut at = 0;
        while at < self.size() {
            let extent = self.extent(at, self.size())?;
            if !extent.hole && !self.probes_zero(extent, stride, &mut buffer)? {
                return Ok(Content::Data);
            }
            at += extent.length;
        }
        Ok(Content::LooksEmpty)
    }

    fn probes_zero(&self, extent: Extent, stride: u64, buffer: &mut [u8]) -> Result<bool> {
        let end = extent.offset + extent.length;
        let last = end.saturating_sub(buffer.len() as u64).max(extent.offset);
        let mut at = extent.offset;
        loop {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = &mut buffer[..length];
            self.read(piece, at)?;
            if !is_zero(piece) {
                return Ok(false);
            }
            if at >= last {
                return Ok(true);
            }
            at = (at + stride).min(last);
        }
    }
}
