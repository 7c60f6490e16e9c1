//! A client's simple calls: read, write, zero, trim, flush, extents; each returns when all of it is answered.
//!
//! For callers that have nothing else to do meanwhile. Built on what [`Client`] has for the others.

use std::fmt;

use crate::cause::Cause;
use crate::limits::{CLIENT_REQUEST_MAX, MINIMUM_BLOCK_MAX, ZERO_REQUEST_MAX};
use crate::nbd::client::{Client, Lost, Submitted};
use crate::nbd::replies::{Event, ServerError};
use crate::nbd::wire;

/// Why a simple call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestError {
    /// The connection is dead.
    Lost(Lost),
    /// The server said no; the connection lives on.
    Server(&'static str, ServerError),
    /// The range, offset and length in bytes, is not within the export; nothing has been sent.
    Beyond(&'static str, u64, u64),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(lost) => lost.fmt(f),
            Self::Server(operation, error) => write!(f, "{operation}: the server answered {error}"),
            Self::Beyond(operation, offset, length) => {
                write!(f, "{operation}: {length} bytes at {offset} are not within the export")
            }
        }
    }
}

impl std::error::Error for RequestError {}

impl From<Lost> for RequestError {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

/// Submits a piece of a range: cookie, offset, length.
type Submit<'a> = &'a mut dyn FnMut(&mut Client, u64, u64, u32) -> Result<Submitted, Lost>;

/// Does something about a part of a minimum block: where the block stands, where the part does, and its length.
type Odd<'a> = &'a mut dyn FnMut(&mut Client, u64, u64, u64) -> Result<(), RequestError>;

/// An extent of one metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The context: its place in [`Wants::contexts`](crate::nbd::client::Wants::contexts).
    pub context: usize,
    /// Where it stands in the export.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What the context says about it; for `base:allocation`, `wire::STATE_...`.
    pub flags: u64,
}

/// One request after the other's submission, and all answered when the call returns. Nothing else may be in flight.
/// Ranges must lie within the export; a range that does not keep the server's minimum block is read with what is around
/// it, and written after what is around it has been read: nobody else may write there meanwhile.
impl Client {
    /// Reads `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The first error; the buffer's content is then of no use.
    pub fn read_exact(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), RequestError> {
        const READ: &str = "READ";
        let (start, end) = self.range(READ, offset, buffer.len() as u64)?;
        let longest = self.piece();
        self.pieces(READ, start, end - start, longest, &mut Client::submit_read, &mut |event| match event {
            Event::Data { offset: at, bytes, .. } => {
                if let Some((place, skip)) = place(buffer, offset, at, bytes.len()) {
                    place.copy_from_slice(&bytes[skip..skip + place.len()]);
                }
            }
            Event::Zero { offset: at, length, .. } => {
                if let Some((place, _)) = place(buffer, offset, at, length as usize) {
                    place.fill(0);
                }
            }
            Event::Status { .. } | Event::Done { .. } => {}
        })
    }

    /// Writes `bytes` at `offset`. Durable after [`Client::flush`].
    ///
    /// # Errors
    /// The first error; what the range holds then is unknown.
    pub fn write_all(&mut self, offset: u64, bytes: &[u8]) -> Result<(), RequestError> {
        const WRITE: &str = "WRITE";
        self.range(WRITE, offset, bytes.len() as u64)?;
        let part = |from: u64, length: u64| {
            let start = usize::try_from(from - offset).unwrap_or(usize::MAX);
            &bytes[start..start + usize::try_from(length).unwrap_or(usize::MAX)]
        };
        let (whole, blocks) = self.whole_blocks(offset, bytes.len() as u64, &mut |client, at, from, length| {
            client.patch(WRITE, at, from, Some(part(from, length)), length)
        })?;
        let longest = self.piece();
        let mut submit = |client: &mut Self, cookie: u64, at: u64, length: u32| {
            client.submit_write(cookie, at, part(at, u64::from(length)), false)
        };
        self.pieces(WRITE, whole, blocks, longest, &mut submit, &mut |_| {})
    }

    /// Makes a range read as zero, by writing it where the server does not offer WRITE_ZEROES, or not at this length.
    ///
    /// # Errors
    /// The first error; what the range holds then is unknown.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_punch_hole: bool) -> Result<(), RequestError> {
        const ZEROES: &str = "WRITE_ZEROES";
        self.range(ZEROES, offset, length)?;
        let (whole, blocks) = self.whole_blocks(offset, length, &mut |client, at, from, length| {
            client.patch(ZEROES, at, from, None, length)
        })?;
        let mut submit = |client: &mut Self, cookie: u64, at: u64, length: u32| {
            client.submit_write_zeroes(cookie, at, length, may_punch_hole, false)
        };
        let longest = self.info.zeroes_max().min(ZERO_REQUEST_MAX);
        match self.pieces(ZEROES, whole, blocks, longest, &mut submit, &mut |_| {}) {
            // Allowed where the same with at most the maximum payload is not too much for the server.
            Err(RequestError::Server(_, error))
                if too_long(&error) && blocks > u64::from(self.info.maximum_payload) =>
            {
                let longest = self.info.maximum_payload;
                self.pieces(ZEROES, whole, blocks, longest, &mut submit, &mut |_| {})
            }
            done => done,
        }
    }

    /// Says that a range is no longer needed; the minimum blocks that it has only a part of stay. Nothing happens where
    /// the server does not offer TRIM.
    ///
    /// # Errors
    /// The first error; what the range holds is unknown in any case.
    pub fn trim(&mut self, offset: u64, length: u64) -> Result<(), RequestError> {
        const TRIM: &str = "TRIM";
        self.range(TRIM, offset, length)?;
        if !self.info.has(wire::FLAG_SEND_TRIM) {
            return Ok(());
        }
        let (whole, blocks) = self.whole_blocks(offset, length, &mut |_, _, _, _| Ok(()))?;
        let longest = ZERO_REQUEST_MAX;
        self.pieces(TRIM, whole, blocks, longest, &mut Client::submit_trim, &mut |_| {})
    }

    /// Makes all that was written durable: what was answered on this connection, and on others of the same export if
    /// [`ExportInfo::connections`](crate::nbd::client::ExportInfo::connections) allows several.
    ///
    /// # Errors
    /// The server's failure, after which nothing is known to be durable. `ENOTSUP` where the server does not offer it:
    /// then nothing is either.
    pub fn flush(&mut self) -> Result<(), RequestError> {
        if !self.info.has(wire::FLAG_SEND_FLUSH) {
            let text = Cause::new("the server does not offer it");
            return Err(RequestError::Server("FLUSH", ServerError { errno: wire::ENOTSUP, text }));
        }
        let mut submit = |client: &mut Self, cookie: u64, _, _| client.submit_flush(cookie);
        self.pieces("FLUSH", 0, 1, 1, &mut submit, &mut |_| {})
    }

    /// Calls `each` for one extent after the other of every metadata context that was agreed on. Those of one context
    /// come in order and make up the range; those of several alternate. A context that was not agreed on has none:
    /// nothing is known there, see [`ExportInfo::contexts`](crate::nbd::client::ExportInfo::contexts).
    ///
    /// # Errors
    /// The first error.
    pub fn block_status(&mut self, offset: u64, length: u64, each: &mut dyn FnMut(Extent)) -> Result<(), RequestError> {
        const STATUS: &str = "BLOCK_STATUS";
        self.range(STATUS, offset, length)?;
        let end = offset + length;
        // How far each context has come; a server may tell more of one than of another.
        let mut told = self.info.contexts.map(|agreed| if agreed.is_some() { offset } else { end });
        let longest = if self.info.extended { u64::MAX } else { u64::from(u32::MAX - u32::MAX % MINIMUM_BLOCK_MAX) };
        loop {
            let from = told.iter().copied().min().unwrap_or(end);
            if from >= end {
                return Ok(());
            }
            let (at, until) = self.info.blocks_around(from, end);
            let piece = (until - at).min(longest);
            let mut submit = |client: &mut Self, cookie: u64, _, _| client.submit_block_status(cookie, at, piece);
            self.pieces(STATUS, at, 1, 1, &mut submit, &mut |event| {
                let Event::Status { context, offset: at, length, flags, .. } = event else { return };
                let (start, stop) = (at.max(told[context]), (at + length).min(end));
                if start < stop {
                    told[context] = stop;
                    each(Extent { context, offset: start, length: stop - start, flags });
                }
            })?;
            if told.contains(&from) {
                // Less than one of its own blocks.
                return Err(self
                    .lose(STATUS, format_args!("the server told nothing about the bytes at {from}"))
                    .into());
            }
        }
    }

    /// Calls `each(length, flags)` for one extent after the other of `base:allocation`, until they make up the range.
    /// Where it was not agreed on, nothing is known and the whole range is one extent without flags: data.
    ///
    /// # Errors
    /// The first error.
    pub fn allocation(&mut self, offset: u64, length: u64, each: &mut dyn FnMut(u64, u64)) -> Result<(), RequestError> {
        let Some(place) = self.info.base_allocation else {
            self.range("BLOCK_STATUS", offset, length)?;
            each(length, 0);
            return Ok(());
        };
        self.block_status(offset, length, &mut |extent| {
            if extent.context == place {
                each(extent.length, extent.flags);
            }
        })
    }

    /// Checks that a range lies within the export; returns the minimum blocks around it.
    fn range(&self, operation: &'static str, offset: u64, length: u64) -> Result<(u64, u64), RequestError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.info.size => Ok(self.info.blocks_around(offset, end)),
            _ => Err(RequestError::Beyond(operation, offset, length)),
        }
    }

    /// Longest READ or WRITE that the simple calls make.
    fn piece(&self) -> u32 {
        self.info.maximum_payload.min(CLIENT_REQUEST_MAX)
    }

    /// Calls `odd(client, block, from, length)` for the parts of a range at both ends that are less than a minimum
    /// block; returns start and length of what is between them.
    fn whole_blocks(&mut self, offset: u64, length: u64, odd: Odd<'_>) -> Result<(u64, u64), RequestError> {
        let (block, mut start, mut end) = (u64::from(self.info.minimum_block), offset, offset + length);
        if start % block != 0 {
            let stop = start.next_multiple_of(block).min(end);
            odd(self, start - start % block, start, stop - start)?;
            start = stop;
        }
        if end % block != 0 && end > start {
            let from = end - end % block;
            odd(self, from, from, end - from)?;
            end = from;
        }
        Ok((start, end - start))
    }

    /// Changes `length` bytes at `from`, within the minimum block at `at`: reads it, and writes it with `bytes`, or
    /// zeroes, in their place.
    fn patch(
        &mut self,
        operation: &'static str,
        at: u64,
        from: u64,
        bytes: Option<&[u8]>,
        length: u64,
    ) -> Result<(), RequestError> {
        let mut block = std::mem::take(&mut self.block);
        // The last one of an export of an odd size ends with it.
        let length_of_block = u64::from(self.info.minimum_block).min(self.info.size.saturating_sub(at));
        block.resize(usize::try_from(length_of_block).unwrap_or_default(), 0);
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let done = self.read_exact(at, &mut block).and_then(|()| {
            let part = &mut block[place(from - at)..place(from - at + length)];
            match bytes {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
            let mut submit =
                |client: &mut Self, cookie: u64, at: u64, _| client.submit_write(cookie, at, &block, false);
            self.pieces(operation, at, 1, 1, &mut submit, &mut |_| {})
        });
        self.block = block;
        done
    }

    /// Submits a range in pieces, as many at once as the window takes, and waits for all of them.
    fn pieces(
        &mut self,
        operation: &'static str,
        offset: u64,
        length: u64,
        piece: u32,
        submit: Submit<'_>,
        each: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), RequestError> {
        debug_assert_eq!(self.in_flight(), 0, "a simple call while requests are in flight");
        let mut failed = None;
        let mut submitted = 0;
        loop {
            while submitted < length && failed.is_none() {
                let now = u32::try_from(length - submitted).unwrap_or(piece).min(piece);
                match submit(self, submitted, offset + submitted, now)? {
                    Submitted::Taken => submitted += u64::from(now),
                    Submitted::WaitFirst => break,
                }
            }
            if self.in_flight() == 0 {
                return failed.map_or(Ok(()), |error| Err(RequestError::Server(operation, error)));
            }
            let events = self.wait(Some(self.silence_max), &mut |event| match event {
                Event::Done { result: Err(error), .. } => {
                    failed.get_or_insert(error);
                }
                event => each(event),
            })?;
            if events == 0 {
                return Err(self.lose(operation, "the server has stopped to answer").into());
            }
        }
    }
}

/// Whether an error may mean that less at once would do.
fn too_long(error: &ServerError) -> bool {
    matches!(error.errno, wire::EINVAL | wire::EOVERFLOW)
}

/// The part of `buffer`, which stands at `offset`, that `length` bytes at `at` are for, and how many of them come
/// before it.
fn place(buffer: &mut [u8], offset: u64, at: u64, length: usize) -> Option<(&mut [u8], usize)> {
    let end = at + length as u64;
    let (start, skip) = (at.saturating_sub(offset), offset.saturating_sub(at));
    let stop = end.saturating_sub(offset).min(buffer.len() as u64);
    let place = buffer.get_mut(usize::try_from(start).ok()?..usize::try_from(stop).ok()?)?;
    Some((place, usize::try_from(skip).ok()?))
}
