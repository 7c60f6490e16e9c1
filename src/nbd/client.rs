//! The client's side of transmission: one connection to any server of the field, many requests in flight.
//!
//! A [`Client`] has one owner, who submits requests and waits for what comes of them. Small requests gather in a send
//! buffer; a large WRITE leaves from the caller's buffer, together with what has gathered, in one system call. Nothing
//! is allocated after [`Client::connect`].
//!
//! **What servers lack.** A READ, WRITE or WRITE_ZEROES of up to [`ExportInfo::request_max`] or
//! [`ExportInfo::zeroes_max`] bytes is one request to the caller, with one answer: it is split where the server's
//! maximum payload is smaller, and zeroes travel as data where WRITE_ZEROES is not offered. What cannot be made up for
//! the caller must ask about: [`ExportInfo::has`] (FLUSH, FUA, TRIM, FAST_ZERO), [`ExportInfo::connections`]. The
//! simple calls in `client_calls.rs` also keep the minimum block, and take ranges of any length.
//!
//! **Why this cannot deadlock.** A server may stop reading until its replies are read; a client that only sends while
//! it has a payload half out then waits for ever. So a send that would block polls both directions and receives
//! meanwhile. What it receives must fit the receive buffer, because nobody takes events in the middle of a payload.
//! Replies to writes are small, and a whole window of them fits. Replies to reads are not: a request that would have to
//! block while a read is in flight is not taken, and [`Submitted::WaitFirst`] says so. [`Client::wait`] never blocks in
//! one direction only.
//!
//! NBD specification: "Transmission", "Ordering of messages and writes".

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cause::Cause;
use crate::limits::{
    CLIENT_RECEIVE_BUFFER, GOODBYE_TIMEOUT, HANDSHAKE_TIMEOUT, SEND_BUFFER, SEND_COPY_MAX, SILENCE_MAX, WINDOW_MAX,
};
pub use crate::nbd::client_ask::{Described, Questions};
pub use crate::nbd::client_calls::{Extent, RequestError};
use crate::nbd::client_handshake::negotiate_before;
pub use crate::nbd::client_handshake::{
    ConnectError, ExportInfo, PhasesAnswer, Wants, offer_phases, offer_phases_before,
};
pub use crate::nbd::replies::{Event, ServerError};
use crate::nbd::replies::{Replies, Style};
use crate::nbd::wire::{self, Request};
use crate::socket::{Ready, Socket};

/// One connection in transmission. Dropping it ends the connection.
#[derive(Debug)]
pub struct Client {
    socket: Arc<Socket>,
    pub(super) info: ExportInfo,
    replies: Replies,
    /// Requests not yet sent: `send[sent..]`. Never grows beyond its first capacity.
    send: Vec<u8>,
    sent: usize,
    /// Bytes not yet read as replies: `receive[start..end]`.
    receive: Box<[u8]>,
    start: usize,
    end: usize,
    /// What is written where WRITE_ZEROES is not offered; else nothing.
    zeroes: Box<[u8]>,
    /// One minimum block, for the simple calls that change a part of it.
    pub(super) block: Vec<u8>,
    pub(super) silence_max: Duration,
    lost: Option<Lost>,
}

/// Whether a request was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a request that was not taken must be submitted again"]
pub enum Submitted {
    /// It is in flight, or gathers to leave with the next push or wait.
    Taken,
    /// It is not: the window is full, or it could block while replies with data are on their way. Call
    /// [`Client::wait`], then submit it again.
    WaitFirst,
}

/// The connection is dead: what was in flight may have been done or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What the client was doing.
    pub operation: &'static str,
    /// Why it cannot go on.
    pub cause: Cause,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, self.cause)
    }
}

impl std::error::Error for Lost {}

/// What follows a request.
enum Payload<'a> {
    Bytes(&'a [u8]),
    /// As many zeroes as the request is long.
    Zeroes,
}

const SENDING: &str = "sending to the server";
const RECEIVING: &str = "receiving from the server";

impl Client {
    /// Opens `export` on a fresh connection.
    ///
    /// # Errors
    /// Why not; then the socket is shut down.
    pub fn connect(socket: Arc<Socket>, export: &str, wants: Wants<'_>) -> Result<Self, ConnectError> {
        Self::connect_within(socket, export, wants, HANDSHAKE_TIMEOUT)
    }

    /// The same, with so long for the handshake.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_within(
        socket: Arc<Socket>,
        export: &str,
        wants: Wants<'_>,
        time: Duration,
    ) -> Result<Self, ConnectError> {
        let info = match negotiate_before(&socket, export, wants, Instant::now() + time) {
            Ok(info) => info,
            Err(error) => {
                socket.shutdown();
                return Err(error);
            }
        };
        let style = match (info.structured, info.extended) {
            (_, true) => Style::Extended,
            (true, false) => Style::Structured,
            (false, false) => Style::Simple,
        };
        let written = if info.has(wire::FLAG_SEND_WRITE_ZEROES) { 0 } else { info.zero_part() as usize };
        Ok(Self {
            socket,
            info,
            replies: Replies::new(style, info.contexts),
            send: Vec::with_capacity(SEND_BUFFER),
            sent: 0,
            receive: vec![0; CLIENT_RECEIVE_BUFFER].into(),
            start: 0,
            end: 0,
            zeroes: vec![0; written].into(),
            block: Vec::with_capacity(info.minimum_block as usize),
            silence_max: SILENCE_MAX,
            lost: None,
        })
    }

    /// What the server said about the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Requests that were taken and are not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.replies.in_flight()
    }

    /// Whether the server has closed, or the connection is broken: for a client with nothing in flight, who would not
    /// notice otherwise.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        self.lost.is_some() || self.socket.has_hung_up()
    }

    /// Bounds the silence of a server where the client can do nothing but wait; [`SILENCE_MAX`] at first.
    pub fn set_silence_max(&mut self, silence_max: Duration) {
        self.silence_max = silence_max;
    }

    // ---- submitting ----------------------------------------------------------------------------------------------
    //
    // Ranges must lie within the export, keep its minimum block, and use only what its transmission flags offer.

    /// Asks for `length` bytes at `offset`, at most [`ExportInfo::request_max`].
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_read(&mut self, cookie: u64, offset: u64, length: u32) -> Result<Submitted, Lost> {
        let request = Request { flags: 0, command: wire::CMD_READ, cookie, offset, length: u64::from(length) };
        self.submit(request, &Payload::Bytes(&[]), self.info.maximum_payload)
    }

    /// Writes `bytes` at `offset`, at most [`ExportInfo::request_max`]; with `fua`, durable when answered. The
    /// bytes have left or are copied when this returns.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_write(&mut self, cookie: u64, offset: u64, bytes: &[u8], fua: bool) -> Result<Submitted, Lost> {
        let flags = if fua { wire::CMD_FLAG_FUA } else { 0 };
        let length = bytes.len() as u64;
        let request = Request { flags, command: wire::CMD_WRITE, cookie, offset, length };
        self.submit(request, &Payload::Bytes(bytes), self.info.maximum_payload)
    }

    /// Makes a range of at most [`ExportInfo::zeroes_max`] bytes read as zero; with `may_punch_hole`, the server may
    /// free its space. With `fast`, a server that would have to write answers `ENOTSUP` instead.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_write_zeroes(
        &mut self,
        cookie: u64,
        offset: u64,
        length: u32,
        may_punch_hole: bool,
        fast: bool,
    ) -> Result<Submitted, Lost> {
        let length = u64::from(length);
        if !self.info.has(wire::FLAG_SEND_WRITE_ZEROES) {
            debug_assert!(!fast, "FAST_ZERO is not offered");
            let request = Request { flags: 0, command: wire::CMD_WRITE, cookie, offset, length };
            return self.submit(request, &Payload::Zeroes, self.info.zero_part());
        }
        let flags = if may_punch_hole { 0 } else { wire::CMD_FLAG_NO_HOLE };
        let flags = if fast { flags | wire::CMD_FLAG_FAST_ZERO } else { flags };
        self.submit_bare(Request { flags, command: wire::CMD_WRITE_ZEROES, cookie, offset, length })
    }

    /// Says that a range is no longer needed.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_trim(&mut self, cookie: u64, offset: u64, length: u32) -> Result<Submitted, Lost> {
        let length = u64::from(length);
        self.submit_bare(Request { flags: 0, command: wire::CMD_TRIM, cookie, offset, length })
    }

    /// Makes all writes durable that are answered already.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_flush(&mut self, cookie: u64) -> Result<Submitted, Lost> {
        self.submit_bare(Request { flags: 0, command: wire::CMD_FLUSH, cookie, offset: 0, length: 0 })
    }

    /// Asks for the extents of a range, in all contexts that were agreed on; below 4 GiB without extended headers. The
    /// answer may end before the range does.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn submit_block_status(&mut self, cookie: u64, offset: u64, length: u64) -> Result<Submitted, Lost> {
        self.submit_bare(Request { flags: 0, command: wire::CMD_BLOCK_STATUS, cookie, offset, length })
    }

    /// Sends what has gathered, as far as the server takes it at once.
    ///
    /// # Errors
    /// The connection is dead.
    pub fn push(&mut self) -> Result<(), Lost> {
        self.alive()?;
        self.send_some(&[]).map(|_| ())
    }

    /// Submits a request without a payload, whose length no constraint bounds.
    fn submit_bare(&mut self, request: Request) -> Result<Submitted, Lost> {
        debug_assert!(self.info.extended || u32::try_from(request.length).is_ok(), "{request:?}");
        self.submit(request, &Payload::Bytes(&[]), u64::MAX)
    }

    /// Submits a request, in parts where it is longer than `longest`. Either all of them are taken or none.
    fn submit(&mut self, request: Request, payload: &Payload<'_>, longest: impl Into<u64>) -> Result<Submitted, Lost> {
        self.alive()?;
        let longest = longest.into();
        let parts = usize::try_from(request.length.div_ceil(longest).max(1)).unwrap_or(usize::MAX);
        if parts > WINDOW_MAX {
            return Err(self.lose(SENDING, format_args!("a request of {} bytes is too long to split", request.length)));
        }
        let copied: &[u8] = match payload {
            Payload::Bytes(bytes) if bytes.len() <= SEND_COPY_MAX && parts == 1 => bytes,
            _ => &[],
        };
        let leaves = copied.is_empty() && request.command == wire::CMD_WRITE;
        let fits = self.has_room(parts * wire::EXTENDED_REQUEST_LENGTH + copied.len())?;
        if self.replies.room() < parts || (leaves || !fits) && self.replies.expects_data() {
            return Ok(Submitted::WaitFirst);
        }
        if !fits {
            self.send_all(&[])?;
        }
        let (mut lead, mut at) = (None, 0);
        for _ in 0..parts {
            let length = (request.length - at).min(longest);
            let part = Request { offset: request.offset + at, length, ..request };
            let Some((cookie, slot)) = self.replies.enter(&part, lead) else { return Ok(Submitted::WaitFirst) };
            lead.get_or_insert(slot);
            self.put_head(Request { cookie, ..part });
            self.send.extend_from_slice(copied);
            let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
            let (start, end) = (place(at), place(at + length));
            match payload {
                _ if !leaves => {}
                Payload::Bytes(bytes) => self.send_all(&bytes[start..end])?,
                Payload::Zeroes => {
                    let zeroes = std::mem::take(&mut self.zeroes);
                    let sent = self.send_all(&zeroes[..end - start]);
                    self.zeroes = zeroes;
                    sent?;
                }
            }
            at += length;
        }
        Ok(Submitted::Taken)
    }

    /// Puts a request's head behind what has gathered.
    fn put_head(&mut self, mut request: Request) {
        if !self.info.extended {
            return self.send.extend_from_slice(&request.encode());
        }
        if request.command == wire::CMD_WRITE {
            request.flags |= wire::CMD_FLAG_PAYLOAD_LEN;
        }
        self.send.extend_from_slice(&request.encode_extended());
    }

    /// Whether `room` bytes fit the send buffer, after sending what leaves at once.
    fn has_room(&mut self, room: usize) -> Result<bool, Lost> {
        if self.send.len() + room <= SEND_BUFFER {
            return Ok(true);
        }
        self.send_some(&[])?;
        self.send.drain(..self.sent);
        self.sent = 0;
        Ok(self.send.len() + room <= SEND_BUFFER)
    }

    /// Sends what the server takes at once of what has gathered, and of `payload` behind it. Returns how much of
    /// `payload` left.
    fn send_some(&mut self, payload: &[u8]) -> Result<usize, Lost> {
        let gathered = self.send.len() - self.sent;
        if gathered + payload.len() == 0 {
            return Ok(0);
        }
        let sent = match self.socket.send_nowait(&self.send[self.sent..], payload) {
            Ok(sent) => sent.unwrap_or(0),
            Err(error) => return Err(self.lose(SENDING, error)),
        };
        self.sent += sent.min(gathered);
        if self.sent == self.send.len() {
            self.send.clear();
            self.sent = 0;
        }
        Ok(sent.saturating_sub(gathered))
    }

    /// Sends all of what has gathered and of `payload`, receiving meanwhile.
    fn send_all(&mut self, mut payload: &[u8]) -> Result<(), Lost> {
        let mut silence: Option<Instant> = None;
        loop {
            let unsent = self.send.len() - self.sent;
            let sent = self.send_some(payload)?;
            payload = &payload[sent..];
            if payload.is_empty() && self.send.is_empty() {
                return Ok(());
            }
            if sent > 0 || self.send.len() - self.sent < unsent {
                silence = None;
            }
            // The clock is asked only where the server does not keep up.
            let since = *silence.get_or_insert_with(Instant::now);
            let left = self.silence_max.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(self.lose(SENDING, "the server has stopped to read"));
            }
            let room = self.end - self.start < self.receive.len();
            let ready = self.wait_socket(room, true, Some(left))?;
            if ready.readable && room && self.fill()? {
                silence = None;
            }
        }
    }

    // ---- waiting -------------------------------------------------------------------------------------------------

    /// Sends what has gathered, then waits until there are events, delivers them and returns how many. Returns 0 when
    /// nothing is in flight, or when `timeout` passes first; `None` waits without an end.
    ///
    /// # Errors
    /// The connection is dead; events delivered before stay true.
    pub fn wait(&mut self, timeout: Option<Duration>, each: &mut dyn FnMut(Event<'_>)) -> Result<usize, Lost> {
        self.alive()?;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.send_some(&[])?;
            let events = self.deliver(each)?;
            if events > 0 || self.replies.in_flight() == 0 {
                return Ok(events);
            }
            let unsent = !self.send.is_empty();
            if deadline.is_none() && !unsent {
                // Nothing else to watch: one system call instead of three.
                self.fill_waiting()?;
                continue;
            }
            if self.fill()? {
                continue;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(0);
            }
            self.wait_socket(true, unsent, left)?;
        }
    }

    /// Reads the replies that have arrived.
    fn deliver(&mut self, each: &mut dyn FnMut(Event<'_>)) -> Result<usize, Lost> {
        match self.replies.read(&self.receive[self.start..self.end], each) {
            Ok(progress) => {
                self.start += progress.consumed;
                if self.start == self.end {
                    (self.start, self.end) = (0, 0);
                }
                Ok(progress.events)
            }
            Err(cause) => Err(self.lose(RECEIVING, cause)),
        }
    }

    /// Receives what has arrived into the free part of the buffer; `false` when there is nothing.
    fn fill(&mut self) -> Result<bool, Lost> {
        self.make_room();
        match self.socket.recv_nowait(&mut self.receive[self.end..]) {
            Ok(Some(received)) => self.filled(received).map(|()| true),
            Ok(None) => Ok(false),
            Err(error) => Err(self.lose(RECEIVING, error)),
        }
    }

    /// The same, waiting until something arrives.
    fn fill_waiting(&mut self) -> Result<(), Lost> {
        self.make_room();
        match self.socket.recv(&mut self.receive[self.end..]) {
            Ok(received) => self.filled(received),
            // Somebody has set a receive timeout; the caller of wait has not.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(self.lose(RECEIVING, error)),
        }
    }

    fn make_room(&mut self) {
        if self.end == self.receive.len() {
            self.receive.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        debug_assert!(self.end < self.receive.len(), "events are larger than the receive buffer");
    }

    fn filled(&mut self, received: usize) -> Result<(), Lost> {
        self.end += received;
        if received == 0 { Err(self.lose(RECEIVING, "the server closed the connection")) } else { Ok(()) }
    }

    fn wait_socket(&mut self, read: bool, write: bool, timeout: Option<Duration>) -> Result<Ready, Lost> {
        self.socket.wait(read, write, timeout).map_err(|error| self.lose("waiting for the server", error))
    }

    fn alive(&self) -> Result<(), Lost> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    pub(super) fn lose(&mut self, operation: &'static str, cause: impl fmt::Display) -> Lost {
        self.socket.shutdown();
        let in_flight = self.replies.in_flight();
        let cause = Cause::new(format_args!("{cause}, with {in_flight} requests in flight"));
        self.lost.insert(Lost { operation, cause }).clone()
    }

    /// Says goodbye, which a server needs to know that nothing was cut off, and takes its time for it. Wait for the
    /// requests in flight before.
    pub fn disconnect(mut self) {
        if self.lost.is_none() {
            let goodbye = Request { flags: 0, command: wire::CMD_DISC, cookie: 0, offset: 0, length: 0 };
            let deadline = Instant::now() + GOODBYE_TIMEOUT;
            self.put_head(goodbye);
            let _ = self.socket.send_all_before(&self.send[self.sent..], deadline);
            // Nothing may follow a goodbye.
            self.lose(SENDING, "it was closed");
        }
    }
}

/// A client that owes nothing and is owed nothing says goodbye, as far as it can be done without waiting. With requests
/// in flight it does not: their outcome is given up, and the connection with it.
impl Drop for Client {
    fn drop(&mut self) {
        if self.lost.is_none() && self.in_flight() == 0 && self.send.is_empty() {
            self.put_head(Request { flags: 0, command: wire::CMD_DISC, cookie: 0, offset: 0, length: 0 });
            let _ = self.socket.send_nowait(&self.send, &[]);
        }
        self.socket.shutdown();
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
