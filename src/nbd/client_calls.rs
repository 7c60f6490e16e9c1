//! A client's simple calls: read, write, zero, flush, extents; each returns when all of it is answered.
//!
//! For callers that have nothing else to do meanwhile. Built on what [`Client`] has for the others.

use std::fmt;

use crate::cause::Cause;
use crate::limits::{CLIENT_REQUEST_MAX, ZERO_REQUEST_MAX};
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
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(lost) => lost.fmt(f),
            Self::Server(operation, error) => write!(f, "{operation}: the server answered {error}"),
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

/// One request after the other's submission, and all answered when the call returns. Nothing else may be in flight.
/// Ranges must lie within the export and keep its minimum block.
impl Client {
    /// Reads `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// The first error; the buffer's content is then of no use.
    pub fn read_exact(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), RequestError> {
        let piece = self.info.maximum_payload.min(CLIENT_REQUEST_MAX);
        let total = buffer.len() as u64;
        self.pieces("READ", offset, total, piece, &mut Client::submit_read, &mut |event| match event {
            Event::Data { offset: at, bytes, .. } => {
                if let Some(place) = place(buffer, at - offset, bytes.len()) {
                    place.copy_from_slice(bytes);
                }
            }
            Event::Zero { offset: at, length, .. } => {
                if let Some(place) = place(buffer, at - offset, length as usize) {
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
        let piece = self.info.maximum_payload.min(CLIENT_REQUEST_MAX);
        let mut submit = |client: &mut Self, cookie: u64, at: u64, length: u32| {
            let start = usize::try_from(at - offset).unwrap_or(usize::MAX);
            client.submit_write(cookie, at, &bytes[start..start + length as usize], false)
        };
        self.pieces("WRITE", offset, bytes.len() as u64, piece, &mut submit, &mut |_| {})
    }

    /// Makes a range read as zero.
    ///
    /// # Errors
    /// The first error; what the range holds then is unknown. `ENOTSUP` where the server does not offer it.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_punch_hole: bool) -> Result<(), RequestError> {
        self.offered("WRITE_ZEROES", wire::FLAG_SEND_WRITE_ZEROES)?;
        let mut submit = |client: &mut Self, cookie: u64, at: u64, length: u32| {
            client.submit_write_zeroes(cookie, at, length, may_punch_hole, false)
        };
        self.pieces("WRITE_ZEROES", offset, length, ZERO_REQUEST_MAX, &mut submit, &mut |_| {})
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The server's failure, after which nothing is known to be durable. `ENOTSUP` where the server does not offer it.
    pub fn flush(&mut self) -> Result<(), RequestError> {
        self.offered("FLUSH", wire::FLAG_SEND_FLUSH)?;
        let mut submit = |client: &mut Self, cookie: u64, _, _| client.submit_flush(cookie);
        self.pieces("FLUSH", 0, 1, 1, &mut submit, &mut |_| {})
    }

    /// Calls `each(length, flags)` for one extent after the other of `base:allocation`, until they make up the range.
    /// Where it was not agreed on, nothing is known and the whole range is one extent without flags.
    ///
    /// # Errors
    /// The first error.
    pub fn block_status(
        &mut self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(u64, u32),
    ) -> Result<(), RequestError> {
        if self.info.base_allocation.is_none() {
            each(length, 0);
            return Ok(());
        }
        let longest = u32::MAX - u32::MAX % self.info.minimum_block.max(512);
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let piece = u32::try_from(length - done).unwrap_or(longest).min(longest);
            let mut submit = Client::submit_block_status;
            self.pieces("BLOCK_STATUS", at, u64::from(piece), piece, &mut submit, &mut |event| {
                if let Event::Status { length, flags, .. } = event {
                    done += u64::from(length);
                    each(u64::from(length), flags);
                }
            })?;
        }
        Ok(())
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

    fn offered(&self, operation: &'static str, flag: u16) -> Result<(), RequestError> {
        if self.info.has(flag) {
            return Ok(());
        }
        let text = Cause::new("the server does not offer it");
        Err(RequestError::Server(operation, ServerError { errno: wire::ENOTSUP, text }))
    }
}

fn place(buffer: &mut [u8], start: u64, length: usize) -> Option<&mut [u8]> {
    let start = usize::try_from(start).ok()?;
    buffer.get_mut(start..start.checked_add(length)?)
}
