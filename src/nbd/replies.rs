//! A client's requests in flight, and the reader of the replies to them.
//!
//! Bytes in, [`Event`]s out; the socket is the [`client`](crate::nbd::client)'s. This is where a client's distrust
//! lives. A server that answers what was not asked, answers twice, or claims success for a read without having sent
//! each of its bytes exactly once, has broken the connection: what a naive client does then is to hand out whatever
//! stood in its buffer before, and a migration would write that to the guest's disk. An error number in a well-formed
//! reply, in contrast, is a value that belongs to its request.
//!
//! NBD specification: "Simple reply message", "Structured reply types", "Request types".

use std::fmt;

use crate::cause::Cause;
use crate::limits::{CLIENT_EXTENTS_MAX, CONTEXTS_MAX, ERROR_CHUNK_MAX, READ_PIECES_MAX, WINDOW_MAX};
use crate::nbd::wire::{self, Fields, ReplyFront, ReplyHead, Request};

/// What a reply, or a piece of it, says about a request that the caller named with `cookie`.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes of a READ. They count only when its [`Event::Done`] is a success.
    Data {
        /// The caller's name for the request.
        cookie: u64,
        /// Where the bytes stand in the export.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range of a READ that is zero.
    Zero {
        /// The caller's name for the request.
        cookie: u64,
        /// Where the range stands in the export.
        offset: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// An extent of a BLOCK_STATUS. Those of one context come in order, the first begins where the request does, the
    /// last may end before it does and never ends behind it. Each context that was agreed on has at least one.
    Status {
        /// The caller's name for the request.
        cookie: u64,
        /// The metadata context: its place among those that were asked for.
        context: usize,
        /// Where the extent stands in the export.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// For `base:allocation`, `wire::STATE_...`; what they mean is the context's business.
        flags: u64,
    },
    /// The request is answered and no longer in flight: all of its parts, where it had to be split.
    Done {
        /// The caller's name for the request.
        cookie: u64,
        /// The server's verdict.
        result: Result<(), ServerError>,
    },
}

/// A request that the server has refused or failed to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// An error number, `wire::E...`. Unknown ones stay as the server sent them.
    pub errno: u32,
    /// The server's words, or none.
    pub text: Cause,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(wire::error_name(self.errno))?;
        if self.text.is_empty() { Ok(()) } else { write!(f, " ({})", self.text) }
    }
}

impl std::error::Error for ServerError {}

/// A cookie on the wire is a serial number times this, plus the slot.
const SLOTS: u64 = 64;

/// How a server replies, as it was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// With simple replies only.
    Simple,
    /// With structured ones where there is data.
    Structured,
    /// With extended headers only.
    Extended,
}

/// The server's numbers for the metadata contexts that a client asked for, in the order of its asking.
pub(crate) type Contexts = [Option<u32>; CONTEXTS_MAX];

/// The requests in flight on one connection, and how far their replies have come.
#[derive(Debug)]
pub(crate) struct Replies {
    slots: Box<[Pending]>,
    /// A bit for each slot that is free.
    free: u64,
    serial: u64,
    /// Requests in flight whose replies carry data.
    with_data: usize,
    style: Style,
    contexts: Contexts,
    /// What the next bytes belong to.
    inside: Inside,
}

/// One request in flight, or one part of it.
#[derive(Debug, Clone)]
struct Pending {
    /// The cookie on the wire: a serial number, and the slot in the low bits.
    wire: u64,
    cookie: u64,
    command: u16,
    offset: u64,
    length: u64,
    pieces: Pieces,
    /// A bit for each context whose extents have come.
    statuses: u8,
    error: Option<ServerError>,
    /// The slot of the first part, which stays taken until all parts are answered.
    lead: usize,
    /// In the first part: parts that are not answered.
    parts: usize,
    answered: bool,
}

/// What the next bytes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// A reply's head.
    Head,
    /// Bytes of a READ.
    Data(Stream),
    /// Extents of a BLOCK_STATUS.
    Status(Stream),
}

/// A payload that is delivered while it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    slot: usize,
    /// Of extents: the place of their context.
    context: usize,
    /// Where in the export the next piece stands.
    offset: u64,
    /// Bytes of payload that are still to come.
    left: u64,
    /// Whether the reply ends with it.
    last: bool,
}

/// A structured reply chunk, its slot found.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    slot: usize,
    kind: u16,
    length: u64,
    last: bool,
}

/// How far [`Replies::read`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes that are done with.
    pub(crate) consumed: usize,
    /// Events delivered.
    pub(crate) events: usize,
}

type Each<'a> = &'a mut dyn FnMut(Event<'_>);

/// What the front of the buffer led to.
enum Step {
    /// This many bytes are done with, and this many events delivered.
    Took(usize, usize),
    /// More bytes must come first.
    Short,
}

impl Replies {
    pub(crate) fn new(style: Style, contexts: Contexts) -> Self {
        let empty = Pending {
            wire: 0,
            cookie: 0,
            command: wire::CMD_DISC,
            offset: 0,
            length: 0,
            pieces: Pieces::default(),
            statuses: 0,
            error: None,
            lead: 0,
            parts: 0,
            answered: true,
        };
        Self {
            slots: vec![empty; WINDOW_MAX].into(),
            free: u64::MAX >> (64 - WINDOW_MAX),
            serial: 0,
            with_data: 0,
            style,
            contexts,
            inside: Inside::Head,
        }
    }

    /// Requests that are not answered.
    pub(crate) fn in_flight(&self) -> usize {
        WINDOW_MAX - self.free.count_ones() as usize
    }

    /// Requests that can be entered.
    pub(crate) fn room(&self) -> usize {
        self.free.count_ones() as usize
    }

    /// Whether a reply with data may be on its way.
    pub(crate) fn expects_data(&self) -> bool {
        self.with_data > 0
    }

    /// Enters `request`, whose cookie is the caller's, and returns the cookie for the wire: one that was never used on
    /// this connection, and the slot. With the slot of another part that is not yet answered, both are parts of one
    /// request, which is done when all are. `None` when the window is full.
    pub(crate) fn enter(&mut self, request: &Request, lead: Option<usize>) -> Option<(u64, usize)> {
        if self.free == 0 {
            return None;
        }
        let slot = self.free.trailing_zeros() as usize;
        self.free &= self.free - 1;
        self.serial += 1;
        let wire = self.serial * SLOTS + slot as u64;
        self.with_data += usize::from(carries_data(request.command));
        let lead = lead.unwrap_or(slot);
        let pending = &mut self.slots[slot];
        pending.parts = 0;
        pending.lead = lead;
        pending.answered = false;
        pending.wire = wire;
        pending.cookie = request.cookie;
        pending.command = request.command;
        pending.offset = request.offset;
        pending.length = request.length;
        pending.pieces.clear();
        pending.statuses = 0;
        pending.error = None;
        self.slots[lead].parts += 1;
        Some((wire, slot))
    }

    /// Reads as many whole events as `bytes` hold and delivers them. What is not consumed must stand at the front the
    /// next time, with more behind it.
    ///
    /// # Errors
    /// How the server broke the protocol; nothing may be read after that.
    pub(crate) fn read(&mut self, bytes: &[u8], each: Each<'_>) -> Result<Progress, Cause> {
        let mut progress = Progress { consumed: 0, events: 0 };
        loop {
            let front = &bytes[progress.consumed..];
            let step = match self.inside {
                Inside::Head => self.head(front, each)?,
                Inside::Data(stream) => self.data(front, stream, each)?,
                Inside::Status(stream) => self.extent(front, stream, each)?,
            };
            match step {
                Step::Took(consumed, events) => {
                    progress.consumed += consumed;
                    progress.events += events;
                }
                Step::Short => return Ok(progress),
            }
        }
    }

    fn head(&mut self, front: &[u8], each: Each<'_>) -> Result<Step, Cause> {
        match ReplyFront::parse(front) {
            ReplyFront::Short => Ok(Step::Short),
            ReplyFront::BadMagic(magic) => Err(Cause::new(format_args!("the server sent no reply but {magic:#010x}"))),
            ReplyFront::Head(ReplyHead::Simple { error, cookie }, length) => {
                if self.style == Style::Extended {
                    return Err(Cause::new("the server sent a simple reply after extended headers"));
                }
                let events = self.simple(error, cookie, each)?;
                Ok(Step::Took(length, events))
            }
            ReplyFront::Head(ReplyHead::Chunk { flags, kind, cookie, length, offset }, head_length) => {
                let agreed = if offset.is_some() { Style::Extended } else { Style::Structured };
                if self.style != agreed {
                    return Err(Cause::new("the server sent a structured reply that was not agreed on"));
                }
                let (slot, last) = (self.find(cookie)?, flags & wire::REPLY_FLAG_DONE != 0);
                let pending = &self.slots[slot];
                if let Some(offset) = offset.filter(|&offset| offset != pending.offset) {
                    return Err(pending.fault(format_args!("as if it were for {offset}")));
                }
                let step = self.chunk(Chunk { slot, kind, length, last }, Fields::new(&front[head_length..]), each)?;
                Ok(match step {
                    Step::Took(consumed, events) => Step::Took(head_length + consumed, events),
                    Step::Short => Step::Short,
                })
            }
        }
    }

    fn find(&self, cookie: u64) -> Result<usize, Cause> {
        let slot = usize::try_from(cookie % SLOTS).unwrap_or(WINDOW_MAX);
        let pending = self.slots.get(slot).filter(|pending| !pending.answered && pending.wire == cookie);
        match pending {
            Some(_) => Ok(slot),
            None => Err(Cause::new(format_args!("the server answered the unknown cookie {cookie:#x}"))),
        }
    }

    fn simple(&mut self, error: u32, cookie: u64, each: Each<'_>) -> Result<usize, Cause> {
        let slot = self.find(cookie)?;
        let pending = &mut self.slots[slot];
        if error != 0 {
            // After structured replies were agreed on, this is not allowed as the answer to a read; there are servers
            // that do it, and what it means is plain.
            if pending.error.is_none() {
                pending.error = Some(ServerError { errno: error, text: Cause::default() });
            }
            return Ok(self.done(slot, each));
        }
        match pending.command {
            wire::CMD_READ if self.style != Style::Simple => {
                Err(pending.fault("with a simple reply after structured ones"))
            }
            wire::CMD_READ => {
                let whole = pending.cover(pending.offset, pending.length);
                debug_assert!(whole.is_ok() || pending.length == 0, "a simple reply is the only piece of its read");
                let (offset, left) = (pending.offset, pending.length);
                self.inside = Inside::Data(Stream { slot, context: 0, offset, left, last: true });
                Ok(0)
            }
            wire::CMD_BLOCK_STATUS => Err(pending.fault("without extents")),
            _ if !pending.pieces.is_empty() || pending.error.is_some() => Err(pending.fault("in two styles")),
            _ => Ok(self.done(slot, each)),
        }
    }

    /// Reads a chunk, as far as its payload does not stream. Counts what it consumes behind the head.
    fn chunk(&mut self, chunk: Chunk, payload: Fields<'_>, each: Each<'_>) -> Result<Step, Cause> {
        let pending = &self.slots[chunk.slot];
        match (chunk.kind, pending.command) {
            (wire::REPLY_TYPE_NONE, _) if chunk.length == 0 && chunk.last => {
                Ok(Step::Took(0, self.finish(chunk.slot, each)?))
            }
            (wire::REPLY_TYPE_OFFSET_DATA, wire::CMD_READ) => self.data_chunk(chunk, payload),
            (wire::REPLY_TYPE_OFFSET_HOLE, wire::CMD_READ) => self.hole_chunk(chunk, payload, each),
            (wire::REPLY_TYPE_BLOCK_STATUS, wire::CMD_BLOCK_STATUS) if self.style == Style::Structured => {
                self.status_chunk(chunk, payload, 4, 8)
            }
            (wire::REPLY_TYPE_BLOCK_STATUS_EXT, wire::CMD_BLOCK_STATUS) if self.style == Style::Extended => {
                self.status_chunk(chunk, payload, 8, 16)
            }
            (kind, _) if kind & wire::REPLY_TYPE_FLAG_ERROR != 0 => self.error_chunk(chunk, payload, each),
            (kind, _) => Err(pending.fault(format_args!("with a chunk of type {kind} and {} bytes", chunk.length))),
        }
    }

    fn data_chunk(&mut self, chunk: Chunk, mut payload: Fields<'_>) -> Result<Step, Cause> {
        let Chunk { slot, last, .. } = chunk;
        let pending = &mut self.slots[slot];
        let Some(left) = chunk.length.checked_sub(8).filter(|&left| left > 0) else {
            return Err(pending.fault("with a data chunk without data"));
        };
        let Some(offset) = payload.u64() else { return Ok(Step::Short) };
        pending.cover(offset, left)?;
        self.inside = Inside::Data(Stream { slot, context: 0, offset, left, last });
        Ok(Step::Took(8, 0))
    }

    fn hole_chunk(&mut self, chunk: Chunk, mut payload: Fields<'_>, each: Each<'_>) -> Result<Step, Cause> {
        let pending = &mut self.slots[chunk.slot];
        if chunk.length != 12 {
            return Err(pending.fault("with a hole chunk of a wrong length"));
        }
        let (Some(offset), Some(length)) = (payload.u64(), payload.u32()) else { return Ok(Step::Short) };
        pending.cover(offset, u64::from(length))?;
        each(Event::Zero { cookie: pending.cookie, offset, length });
        let done = if chunk.last { self.finish(chunk.slot, each)? } else { 0 };
        Ok(Step::Took(12, 1 + done))
    }

    /// A block status whose payload has a head, then extents, of so many bytes each.
    fn status_chunk(&mut self, chunk: Chunk, mut payload: Fields<'_>, head: u64, extent: u64) -> Result<Step, Cause> {
        let Chunk { slot, length, last, .. } = chunk;
        let pending = &mut self.slots[slot];
        let left = length.saturating_sub(head);
        if left == 0 || left % extent != 0 || left > extent * u64::from(CLIENT_EXTENTS_MAX) {
            return Err(pending.fault("with a block status of a wrong length"));
        }
        let Some(number) = payload.u32() else { return Ok(Step::Short) };
        if self.style == Style::Extended {
            let Some(count) = payload.u32() else { return Ok(Step::Short) };
            if u64::from(count) * extent != left {
                return Err(pending.fault("with a block status of a wrong length"));
            }
        }
        let Some(context) = self.contexts.iter().position(|&agreed| agreed == Some(number)) else {
            return Err(pending.fault("for a metadata context that was not agreed on"));
        };
        if pending.statuses & 1 << context != 0 {
            return Err(pending.fault("with two block statuses for one context"));
        }
        pending.statuses |= 1 << context;
        self.inside = Inside::Status(Stream { slot, context, offset: pending.offset, left, last });
        Ok(Step::Took(usize::try_from(head).unwrap_or(usize::MAX), 0))
    }

    fn error_chunk(&mut self, chunk: Chunk, mut payload: Fields<'_>, each: Each<'_>) -> Result<Step, Cause> {
        let pending = &mut self.slots[chunk.slot];
        let whole = usize::try_from(chunk.length).unwrap_or(usize::MAX);
        if whole > ERROR_CHUNK_MAX {
            return Err(pending.fault("with an error chunk that is too long"));
        }
        let Some(payload) = payload.bytes(whole) else { return Ok(Step::Short) };
        let error = parse_error(payload).ok_or_else(|| pending.fault("with a malformed error chunk"))?;
        pending.error.get_or_insert(error);
        let events = if chunk.last { self.done(chunk.slot, each) } else { 0 };
        Ok(Step::Took(whole, events))
    }

    /// Delivers what there is of a READ's bytes.
    fn data(&mut self, front: &[u8], mut stream: Stream, each: Each<'_>) -> Result<Step, Cause> {
        let here = stream.left.min(front.len() as u64);
        if here == 0 && stream.left > 0 {
            return Ok(Step::Short);
        }
        let mut events = 0;
        let bytes = &front[..usize::try_from(here).unwrap_or(front.len())];
        if here > 0 {
            each(Event::Data { cookie: self.slots[stream.slot].cookie, offset: stream.offset, bytes });
            events += 1;
        }
        stream.offset += here;
        stream.left -= here;
        self.inside = Inside::Data(stream);
        events += self.after(stream, each)?;
        Ok(Step::Took(bytes.len(), events))
    }

    /// Delivers one extent, cut at the end of the range that was asked for.
    fn extent(&mut self, front: &[u8], mut stream: Stream, each: Each<'_>) -> Result<Step, Cause> {
        let mut fields = Fields::new(front);
        let (extent, read) = if self.style == Style::Extended {
            (fields.u64().zip(fields.u64()), 16)
        } else {
            (fields.u32().zip(fields.u32()).map(|(length, flags)| (u64::from(length), u64::from(flags))), 8)
        };
        let Some((length, flags)) = extent else { return Ok(Step::Short) };
        let pending = &self.slots[stream.slot];
        if length == 0 {
            return Err(pending.fault("with an empty extent"));
        }
        let length = pending.offset.saturating_add(pending.length).saturating_sub(stream.offset).min(length);
        let mut events = 0;
        if length > 0 {
            let Stream { context, offset, .. } = stream;
            each(Event::Status { cookie: pending.cookie, context, offset, length, flags });
            events += 1;
        }
        stream.offset += length;
        stream.left -= read;
        self.inside = Inside::Status(stream);
        events += self.after(stream, each)?;
        Ok(Step::Took(usize::try_from(read).unwrap_or(usize::MAX), events))
    }

    /// Leaves a stream whose payload is used up, and ends the request with it if it was the last of its reply.
    fn after(&mut self, stream: Stream, each: Each<'_>) -> Result<usize, Cause> {
        if stream.left > 0 {
            return Ok(0);
        }
        self.inside = Inside::Head;
        if stream.last { self.finish(stream.slot, each) } else { Ok(0) }
    }

    /// Checks that a request which the server calls done has got everything, then ends it.
    fn finish(&mut self, slot: usize, each: Each<'_>) -> Result<usize, Cause> {
        let pending = &self.slots[slot];
        let complete = match pending.command {
            wire::CMD_READ => u64::from(pending.pieces.covered()) == pending.length,
            wire::CMD_BLOCK_STATUS => {
                let agreed = |place: usize| self.contexts[place].is_some();
                (0..CONTEXTS_MAX).all(|place| pending.statuses & 1 << place != 0 || !agreed(place))
            }
            _ => true,
        };
        if !complete && pending.error.is_none() {
            return Err(match pending.command {
                wire::CMD_READ => pending.fault(format_args!("with {} bytes", pending.pieces.covered())),
                _ => pending.fault("without the extents of each metadata context"),
            });
        }
        Ok(self.done(slot, each))
    }

    /// Ends a request, or a part of one: only the last part to be answered ends the whole. Returns how many events
    /// that makes.
    fn done(&mut self, slot: usize, each: Each<'_>) -> usize {
        let pending = &mut self.slots[slot];
        pending.answered = true;
        self.with_data -= usize::from(carries_data(pending.command));
        let (lead, error) = (pending.lead, pending.error.take());
        if slot != lead {
            self.free |= 1 << slot;
        }
        let whole = &mut self.slots[lead];
        whole.error = whole.error.take().or(error);
        whole.parts -= 1;
        if whole.parts > 0 {
            return 0;
        }
        self.free |= 1 << lead;
        let result = whole.error.take().map_or(Ok(()), Err);
        each(Event::Done { cookie: whole.cookie, result });
        1
    }
}

fn carries_data(command: u16) -> bool {
    matches!(command, wire::CMD_READ | wire::CMD_BLOCK_STATUS)
}

fn parse_error(payload: &[u8]) -> Option<ServerError> {
    let mut fields = Fields::new(payload);
    let errno = fields.u32()?;
    let length = usize::from(fields.u16()?);
    let text = Cause::from_peer(fields.bytes(length)?);
    // Zero is no error number; the request has failed all the same.
    Some(ServerError { errno: if errno == 0 { wire::EINVAL } else { errno }, text })
}

impl Pending {
    /// Notes that the reply has a piece of the range, each byte of which may come once.
    fn cover(&mut self, offset: u64, length: u64) -> Result<(), Cause> {
        let start = offset.checked_sub(self.offset);
        let end = start.and_then(|start| start.checked_add(length)).filter(|&end| end <= self.length && length > 0);
        // A READ is never longer than 32 bits say.
        let narrow = |at: Option<u64>| at.and_then(|at| u32::try_from(at).ok());
        let (Some(start), Some(end)) = (narrow(start), narrow(end)) else {
            return Err(self.fault(format_args!("with {length} bytes at {offset}, outside of the request")));
        };
        self.pieces.add(start, end).map_err(|why| self.fault(why))
    }

    fn fault(&self, how: impl fmt::Display) -> Cause {
        let Self { command, offset, length, .. } = self;
        Cause::new(format_args!("the server answered a {} of {length} bytes at {offset} {how}", command_name(*command)))
    }
}

fn command_name(command: u16) -> &'static str {
    match command {
        wire::CMD_READ => "READ",
        wire::CMD_WRITE => "WRITE",
        wire::CMD_FLUSH => "FLUSH",
        wire::CMD_TRIM => "TRIM",
        wire::CMD_WRITE_ZEROES => "WRITE_ZEROES",
        wire::CMD_BLOCK_STATUS => "BLOCK_STATUS",
        _ => "request",
    }
}

/// The pieces of a range that a reply has brought, in order, neighbours joined.
#[derive(Debug, Clone, Default)]
struct Pieces(heapless::Vec<(u32, u32), READ_PIECES_MAX>);

impl Pieces {
    fn clear(&mut self) {
        self.0.clear();
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn covered(&self) -> u32 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// Adds `start..end`, which must not meet what is there.
    fn add(&mut self, start: u32, end: u32) -> Result<(), &'static str> {
        let at = self.0.iter().position(|piece| piece.1 >= start).unwrap_or(self.0.len());
        let joins_before = self.0.get(at).is_some_and(|piece| piece.1 == start);
        let after = if joins_before { at + 1 } else { at };
        match self.0.get(after) {
            Some(piece) if piece.0 < end => return Err("with the same bytes twice"),
            Some(piece) if piece.0 == end => {
                let end = piece.1;
                if joins_before {
                    self.0.remove(after);
                    self.0[at].1 = end;
                } else {
                    self.0[after].0 = start;
                }
                return Ok(());
            }
            _ => {}
        }
        if joins_before {
            self.0[at].1 = end;
            return Ok(());
        }
        self.0.insert(at, (start, end)).map_err(|_| "in too many scattered pieces")
    }
}

#[cfg(test)]
#[path = "replies_tests.rs"]
mod tests;
