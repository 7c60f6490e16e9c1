//! One end of a copy: a file or block device, or one connection to an export.
//!
//! The only file of `copy` that writes. A file is read and written at once; an export has requests on their way, which
//! `lane.rs` waits for.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Side;
use super::trail::Trail;
use crate::disk::{Access, Cache, Content, Disk, OpenError};
use crate::error::reason;
use crate::limits::{CONNECT_TIMEOUT, COPY_ASK, COPY_PIECE, GRANULARITY_MIN, LANE_SILENCE_MAX, ZERO_REQUEST_MAX};
use crate::nbd::client::{Client, Event, Submitted, Wants};
use crate::nbd::wire;
use crate::uri::NbdUri;

/// One end.
#[derive(Debug)]
pub(super) enum End {
    File(FileEnd),
    Nbd(Box<Client>),
}

/// A file or a block device.
#[derive(Debug)]
pub(super) struct FileEnd {
    disk: Arc<Disk>,
    /// Of what was written.
    trail: Trail,
}

impl FileEnd {
    fn new(disk: Arc<Disk>) -> Self {
        Self { disk, trail: Trail::default() }
    }
}

/// An end, and what is known of it before the first byte.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) end: End,
    pub(super) size: u64,
    /// All of it is known to read as zero (D10).
    pub(super) reads_as_zero: bool,
    /// The file that was made.
    made: Option<PathBuf>,
}

impl Opened {
    /// Opens what is read.
    pub(super) fn source(side: &Side) -> Result<Self, String> {
        let end = match side {
            Side::File(path) => {
                let disk = Disk::open(path, Access::ReadOnly, Cache::Writeback).map_err(|error| error.to_string())?;
                End::File(FileEnd::new(Arc::new(disk)))
            }
            Side::Nbd(uri) => connect(uri)?,
        };
        let size = end.size();
        if size == 0 {
            return Err("is empty".to_owned());
        }
        Ok(Self { end, size, reads_as_zero: false, made: None })
    }

    /// Opens what is written, for `size` bytes; makes a file that is missing.
    pub(super) fn destination(side: &Side, source: &Side, size: u64) -> Result<Self, String> {
        match side {
            Side::File(path) => {
                if let (Side::File(other), Some(here)) = (source, Disk::identify(path))
                    && Disk::identify(other) == Some(here)
                {
                    return Err("is the source itself".to_owned());
                }
                let (disk, made) = match Disk::open(path, Access::ReadWrite, Cache::Writeback) {
                    Ok(disk) => (disk, None),
                    Err(OpenError::Missing) => {
                        let made = Disk::create(path, size, Cache::Writeback).map_err(|error| match error {
                            OpenError::Missing => "its directory does not exist".to_owned(),
                            error => error.to_string(),
                        })?;
                        (made, Some(path.clone()))
                    }
                    Err(error) => return Err(error.to_string()),
                };
                let is_file = path.is_file();
                if disk.size() < size || is_file && disk.size() > size {
                    let there = disk.size();
                    return Err(format!("has {there} bytes, and the source {size}: remove it, or make it that large"));
                }
                let reads_as_zero = matches!(disk.content(), Ok(Content::Hole));
                Ok(Self { size: disk.size(), end: End::File(FileEnd::new(Arc::new(disk))), reads_as_zero, made })
            }
            Side::Nbd(uri) => {
                if matches!(source, Side::Nbd(other) if other == uri) {
                    return Err("is the source itself".to_owned());
                }
                let End::Nbd(mut client) = connect(uri)? else { return Err("is no export".to_owned()) };
                let info = *client.info();
                if info.has(wire::FLAG_READ_ONLY) {
                    return Err("is read-only".to_owned());
                }
                if info.size < size {
                    return Err(format!("has {} bytes, and the source {size}", info.size));
                }
                let mut zero = info.base_allocation.is_some();
                let mut look = |_: u64, flags: u64| zero &= flags & u64::from(wire::STATE_ZERO) != 0;
                client.allocation(0, size, &mut look).map_err(|error| error.to_string())?;
                Ok(Self { end: End::Nbd(client), size: info.size, reads_as_zero: zero, made: None })
            }
        }
    }

    /// The file that was made for it.
    pub(super) fn made(&self) -> Option<PathBuf> {
        self.made.clone()
    }
}

fn connect(uri: &NbdUri) -> Result<End, String> {
    let socket = uri.address.connect(CONNECT_TIMEOUT).map_err(|error| reason(&error))?;
    // Or a host that has lost its power would be waited for without end.
    socket.probe(LANE_SILENCE_MAX);
    let client = Client::connect(Arc::new(socket), &uri.export, Wants::READING).map_err(|error| error.to_string())?;
    Ok(End::Nbd(Box::new(client)))
}

impl End {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.disk.size(),
            Self::Nbd(client) => client.info().size,
        }
    }

    /// Whether it can be asked to make durable what was written.
    pub(super) fn can_flush(&self) -> bool {
        match self {
            Self::File(_) => true,
            Self::Nbd(client) => client.info().has(wire::FLAG_SEND_FLUSH),
        }
    }

    /// How many lanes may have it at once.
    pub(super) fn connections(&self, wanted: usize) -> usize {
        match self {
            Self::File(_) => wanted,
            Self::Nbd(client) => client.info().connections(wanted),
        }
    }

    /// Another one of the same.
    pub(super) fn twin(&self, side: &Side) -> Result<Self, String> {
        match (self, side) {
            (Self::File(file), _) => Ok(Self::File(FileEnd::new(Arc::clone(&file.disk)))),
            (Self::Nbd(_), Side::Nbd(uri)) => connect(uri),
            (Self::Nbd(_), Side::File(_)) => Err("is no export".to_owned()),
        }
    }

    /// Alignment of every request, in bytes.
    pub(super) fn block(&self) -> u64 {
        match self {
            Self::File(_) => GRANULARITY_MIN,
            Self::Nbd(client) => u64::from(client.info().minimum_block).max(GRANULARITY_MIN),
        }
    }

    /// Longest piece of data that is read from it.
    pub(super) fn piece_read(&self) -> usize {
        match self {
            Self::File(_) => COPY_PIECE,
            Self::Nbd(client) => COPY_ASK.min(request_max(client)),
        }
    }

    /// Longest piece of data that is written to it.
    pub(super) fn piece_written(&self) -> usize {
        match self {
            Self::File(_) => COPY_PIECE,
            Self::Nbd(client) => COPY_PIECE.min(request_max(client)),
        }
    }

    /// Requests that are not answered.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::File(_) => 0,
            Self::Nbd(client) => client.in_flight(),
        }
    }

    /// Calls `each(offset, length, zero)` for the extents of a range. Nothing may be in flight.
    pub(super) fn extents(&mut self, from: u64, to: u64, each: &mut dyn FnMut(u64, u64, bool)) -> Result<(), String> {
        match self {
            Self::File(file) => {
                let mut at = from;
                while at < to {
                    let extent = file.disk.extent(at, to).map_err(|error| format!("extents: {}", reason(&error)))?;
                    each(extent.offset, extent.length, extent.hole);
                    at += extent.length;
                }
                Ok(())
            }
            Self::Nbd(client) => {
                let mut at = from;
                let mut tell = |length: u64, flags: u64| {
                    each(at, length, flags & u64::from(wire::STATE_ZERO) != 0);
                    at += length;
                };
                client.allocation(from, to - from, &mut tell).map_err(|error| error.to_string())
            }
        }
    }

    /// Lets go of what is in the page cache of a file.
    pub(super) fn forget(&self, range: &Range<u64>) {
        if let Self::File(file) = self {
            file.disk.forget_range(range);
        }
    }

    /// Reads a piece whole. Nothing may be in flight.
    pub(super) fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), String> {
        match self {
            Self::File(file) => file
                .disk
                .read(buffer, offset)
                .map_err(|error| format!("read: {} bytes at {offset}: {}", buffer.len(), reason(&error))),
            Self::Nbd(client) => client.read_exact(offset, buffer).map_err(|error| error.to_string()),
        }
    }

    /// Writes a piece, by whatever the export's blocks make of it. Nothing may be in flight.
    pub(super) fn write_whole(&mut self, bytes: &[u8], offset: u64) -> Result<(), String> {
        match self {
            Self::File(_) => self.write(bytes, offset).map(|_| ()),
            Self::Nbd(client) => client.write_all(offset, bytes).map_err(|error| error.to_string()),
        }
    }

    /// Writes a piece, or has it on its way. `false`: replies must be waited for first.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<bool, String> {
        match self {
            Self::File(FileEnd { disk, trail }) => {
                let written = disk.write(bytes, offset, false);
                written.map_err(|error| format!("write: {} bytes at {offset}: {}", bytes.len(), reason(&error)))?;
                trail.wrote(disk, offset, bytes.len() as u64).map_err(|error| format!("flush: {}", reason(&error)))?;
                Ok(true)
            }
            Self::Nbd(client) => taken(client.submit_write(offset, offset, bytes, false)),
        }
    }

    /// The same for zeroes: as much of them as one request takes. Returns how much; 0: replies must be waited for.
    pub(super) fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<u64, String> {
        let part = length.min(u64::from(ZERO_REQUEST_MAX));
        match self {
            Self::File(FileEnd { disk, .. }) => {
                let written = disk.write_zeroes(offset, part, true, false);
                written.map_err(|error| format!("write zeroes: {part} bytes at {offset}: {}", reason(&error)))?;
                Ok(part)
            }
            Self::Nbd(client) => {
                let part = u32::try_from(part).unwrap_or(u32::MAX).min(client.info().zeroes_max());
                let went = taken(client.submit_write_zeroes(offset, offset, part, true, false))?;
                Ok(if went { u64::from(part) } else { 0 })
            }
        }
    }

    /// Asks for a piece of an export. `false`: replies must be waited for first.
    pub(super) fn ask(&mut self, cookie: u64, offset: u64, length: usize) -> Result<bool, String> {
        match self {
            Self::File(_) => Err("a file is read at once".to_owned()),
            Self::Nbd(client) => taken(client.submit_read(cookie, offset, u32::try_from(length).unwrap_or(u32::MAX))),
        }
    }

    /// Takes replies in; waits for the first if `wait`.
    pub(super) fn listen(&mut self, wait: bool, each: &mut dyn FnMut(Event<'_>)) -> Result<(), String> {
        match self {
            Self::File(_) => Ok(()),
            Self::Nbd(client) => {
                let time = if wait { None } else { Some(Duration::ZERO) };
                client.wait(time, each).map(drop).map_err(|lost| lost.to_string())
            }
        }
    }

    /// Makes durable what was written through this end. Nothing may be in flight.
    pub(super) fn flush(&mut self) -> Result<(), String> {
        match self {
            Self::File(FileEnd { disk, trail }) => {
                trail.sync(disk).map_err(|error| format!("flush: {}", reason(&error)))
            }
            Self::Nbd(client) if client.info().has(wire::FLAG_SEND_FLUSH) => {
                client.flush().map_err(|error| error.to_string())
            }
            Self::Nbd(_) => Ok(()),
        }
    }
}

fn request_max(client: &Client) -> usize {
    usize::try_from(client.info().request_max()).unwrap_or(usize::MAX)
}

fn taken(submitted: Result<Submitted, crate::nbd::client::Lost>) -> Result<bool, String> {
    match submitted {
        Ok(Submitted::Taken) => Ok(true),
        Ok(Submitted::WaitFirst) => Ok(false),
        Err(lost) => Err(lost.to_string()),
    }
}
