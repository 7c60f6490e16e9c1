//! The server's transmission phase: one connection, from its first request to its last reply.
//!
//! # One thread reads, a few work
//!
//! The connection's own thread receives as many pipelined requests as there are with one system call and serves at once
//! what needs no waiting: reads that are in the page cache, writes into it. The replies gather in a buffer and leave
//! together when no whole request is left. Whatever may wait, a read from the device, a sync, a trim, a write to a slow
//! disk or at a closed gate, goes to one of up to [`SLOTS`] workers, which answers by itself; the requests behind it
//! are served meanwhile. What is done and waits only for the mirror (D7) is left to the answerer. Workers are started
//! when first needed and live as long as the connection.
//!
//! Memory is one receive buffer, one reply buffer and one buffer for each started worker; those of four grow when a
//! disk whose requests all wait (`cache=none`, a server's) is asked for much at once. A request larger than they are
//! passes through them piece by piece, and a refused write is read to its end and dropped, so that the connection lives
//! on. Long reads over a Unix socket need no buffer: `pipe.rs`.
//!
//! # The life of a request
//!
//! [`Reader::next_request`] receives, [`validate`] says what is wrong with it, `serve` or a [`Worker`] does it through
//! the [`Visit`], and a reply is sent. The connection and its reader are in this file, the workers in `worker.rs`, the
//! answerer in `answerer.rs`, the bytes of replies in `reply.rs`. Which error a client sees is decided in
//! [`error_number`] alone. Section names of the NBD specification that this follows: "Transmission", "Request types",
//! "Structured reply chunk", "Error values", "Terminating the transmission phase".

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::Instant;

use crate::dirty::Owed;
use crate::disk::AlignedBuffer;
use crate::export::{Door, Fault, Patience, Visit};
use crate::limits::{
    DIRECT_ALIGN, INLINE_READ_MAX, LONG_SLOTS, OWED_MAX, PAYLOAD_MAX, RECEIVE_BUFFER, REPLY_BUFFER, SLOT_BUFFER, SLOTS,
    SLOW_WRITE, SLOW_WRITE_MEMORY, WORKER_STACK,
};
use crate::nbd::handshake::{Agreed, BASE_ALLOCATION_ID, Description};
use crate::nbd::wire::{self, EXTENDED_REQUEST_LENGTH, Fields, REQUEST_LENGTH, Request};
use answerer::{Answer, Answers};
use reply::ReplyHead;
use worker::{Job, Pool, Ticket, Worker, room_of};

mod answerer;
mod pipe;
mod reply;
mod worker;

/// What a client is told about an export of this server: everything that [`transmit`] can do.
#[must_use]
pub fn description(size: u64, read_only: bool) -> Description {
    let reading = wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_DF | wire::FLAG_CAN_MULTI_CONN | wire::FLAG_SEND_CACHE;
    let writing = wire::FLAG_SEND_FLUSH
        | wire::FLAG_SEND_FUA
        | wire::FLAG_SEND_TRIM
        | wire::FLAG_SEND_WRITE_ZEROES
        | wire::FLAG_SEND_FAST_ZERO;
    Description::new(size, reading | if read_only { wire::FLAG_READ_ONLY | wire::FLAG_SEND_FLUSH } else { writing })
}

/// How a client left that broke nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goodbye {
    /// It sent a DISC.
    Said,
    /// It closed the connection between two requests.
    HungUp,
}

/// Serves one connection until its client disconnects, hangs up or breaks the protocol, or until somebody ends it.
/// When this returns, every request that was admitted is finished.
///
/// # Errors
/// One line for the log when the client is to blame or the connection broke; nothing is left to be done about it.
pub fn transmit(visit: &Visit, agreed: Agreed) -> io::Result<Goodbye> {
    let connection = Connection::new(visit, agreed);
    let goodbye = thread::scope(|scope| {
        let mut reader = Reader {
            connection: &connection,
            scope,
            inbox: Inbox { memory: AlignedBuffer::new(RECEIVE_BUFFER), start: 0, end: 0 },
            outbox: Outbox { memory: vec![0; REPLY_BUFFER], length: 0 },
            slow_writes_left: 0,
            after_long: false,
        };
        let ended = reader.run();
        // Also what was asked before the client broke something.
        let flushed = reader.flush_replies();
        let ended = ended.and_then(|goodbye| flushed.map(|()| goodbye));
        if ended.is_err() {
            // Whoever of the workers waits at the gate has nobody left to wait for.
            visit.socket().shutdown();
        }
        connection.dismiss_workers();
        connection.dismiss_answerer();
        ended
    })?;
    if connection.broken.load(Ordering::Acquire) {
        return Err(io::Error::new(ErrorKind::BrokenPipe, "a reply could not be sent whole"));
    }
    Ok(goodbye)
}

/// A WRITE in pieces has pieces with workers, in the queue of the answerer or in its hand, and one is being handed out.
const TICKETS: usize = SLOTS + OWED_MAX + 2;

/// What all threads of one connection share.
struct Connection<'a> {
    visit: &'a Visit,
    agreed: Agreed,
    /// Held while one reply, or one chunk of a structured reply, is sent.
    sending: Mutex<()>,
    pool: Mutex<Pool>,
    /// A worker has become idle.
    freed: Condvar,
    workers: [Worker; SLOTS],
    tickets: Mutex<[Ticket; TICKETS]>,
    answers: Answers,
    /// A reply was cut in the middle: nothing that follows could be understood.
    broken: AtomicBool,
    /// Long reads go through a pipe.
    uncopied: AtomicBool,
}

impl<'a> Connection<'a> {
    fn new(visit: &'a Visit, agreed: Agreed) -> Self {
        Self {
            visit,
            agreed,
            sending: Mutex::new(()),
            pool: Mutex::default(),
            freed: Condvar::new(),
            workers: std::array::from_fn(|_| Worker::default()),
            tickets: Mutex::new(std::array::from_fn(|_| Ticket::default())),
            answers: Answers::default(),
            broken: AtomicBool::new(false),
            uncopied: AtomicBool::new(visit.socket().is_unix() && !visit.disk().is_direct()),
        }
    }
}

/// How many bytes follow a request. With extended headers a flag says it, which QEMU (8.2 to 10) leaves out where it
/// writes: there is no WRITE without a payload.
fn payload_length(request: &Request, agreed: Agreed) -> u64 {
    let flagged = agreed.extended && request.flags & wire::CMD_FLAG_PAYLOAD_LEN != 0;
    if flagged || request.command == wire::CMD_WRITE { request.length } else { 0 }
}

/// What is wrong with a request, before anything is done for it.
fn validate(request: &Request, visit: &Visit, agreed: Agreed) -> Result<(), u32> {
    use wire::{
        CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
        CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EINVAL,
        ENOSPC, EOVERFLOW, EPERM,
    };
    let allowed = match request.command {
        CMD_READ if agreed.structured => CMD_FLAG_FUA | CMD_FLAG_DF,
        CMD_WRITE if agreed.extended => CMD_FLAG_FUA | CMD_FLAG_PAYLOAD_LEN,
        CMD_READ | CMD_WRITE | CMD_FLUSH | CMD_TRIM | CMD_CACHE => CMD_FLAG_FUA,
        CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS if agreed.base_allocation => CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
        _ => return Err(EINVAL),
    };
    if request.flags & !allowed != 0 {
        return Err(EINVAL);
    }
    let changes = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if changes && visit.export().is_read_only() {
        return Err(EPERM);
    }
    if request.command == CMD_FLUSH {
        return if request.offset == 0 && request.length == 0 { Ok(()) } else { Err(EINVAL) };
    }
    let end = request.offset.checked_add(request.length);
    if end.is_none_or(|end| end > visit.disk().size()) {
        return Err(if matches!(request.command, CMD_WRITE | CMD_WRITE_ZEROES) { ENOSPC } else { EINVAL });
    }
    if request.length == 0 {
        return Err(EINVAL);
    }
    if request.command == CMD_READ && request.length > u64::from(PAYLOAD_MAX) {
        return Err(if agreed.structured { EOVERFLOW } else { EINVAL });
    }
    // A chunk that must be whole is read whole before its head says that it is the last one.
    if request.flags & CMD_FLAG_DF != 0 && request.length > SLOT_BUFFER as u64 {
        return Err(EOVERFLOW);
    }
    Ok(())
}

/// The error that a client sees; `None` if there is nobody to see it.
pub(crate) fn error_number(fault: &Fault) -> Option<u32> {
    use rustix::io::Errno;
    Some(match fault {
        Fault::Gone | Fault::WouldWait => return None,
        Fault::NotPermitted => wire::EPERM,
        Fault::Fenced => wire::ESHUTDOWN,
        Fault::Disk(error) => match Errno::from_io_error(error) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => wire::ENOSPC,
            Some(Errno::PERM | Errno::ACCESS | Errno::ROFS) => wire::EPERM,
            Some(Errno::NOMEM) => wire::ENOMEM,
            _ if error.kind() == ErrorKind::Unsupported => wire::ENOTSUP,
            _ => wire::EIO,
        },
    })
}

fn gone() -> io::Error {
    io::Error::new(ErrorKind::ConnectionAborted, "the client has hung up")
}

struct Reader<'s, 'e, 'a> {
    connection: &'s Connection<'a>,
    scope: &'s Scope<'s, 'e>,
    inbox: Inbox,
    outbox: Outbox,
    /// So many writes still go to the workers because one was slow.
    slow_writes_left: u32,
    /// The last request was a long write into a worker's own buffer: the next one may be, and only its head is received
    /// here.
    after_long: bool,
}

/// Received bytes that nobody has looked at yet.
struct Inbox {
    memory: AlignedBuffer,
    start: usize,
    end: usize,
}

/// Replies that have not been sent yet.
struct Outbox {
    memory: Vec<u8>,
    length: usize,
}

impl Inbox {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    fn skip(&mut self, count: usize) {
        self.start += count;
    }

    /// Moves what is left to the front when that gains room.
    fn make_room(&mut self) {
        let left = self.end - self.start;
        if self.start > 0 && (left <= DIRECT_ALIGN || self.end == self.memory.len()) {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, left);
        }
    }
}

impl<'s, 'a: 's> Reader<'s, '_, 'a> {
    fn run(&mut self) -> io::Result<Goodbye> {
        while let Some(request) = self.next_request()? {
            if request.command == wire::CMD_DISC {
                return Ok(Goodbye::Said);
            }
            let agreed = self.connection.agreed;
            let payload = payload_length(&request, agreed);
            if payload > u64::from(PAYLOAD_MAX) {
                return Err(io::Error::new(ErrorKind::InvalidData, "a payload larger than any client may send"));
            }
            if request.command == wire::CMD_BLOCK_STATUS && payload > 0 {
                self.filtered_status(&request, payload)?;
                continue;
            }
            match (request.command, validate(&request, self.connection.visit, agreed)) {
                (_, Err(error)) => {
                    self.drain(usize::try_from(payload).unwrap_or(usize::MAX))?;
                    self.reply(&request, error)?;
                }
                (wire::CMD_WRITE, Ok(())) => self.write(&request)?,
                (wire::CMD_READ, Ok(())) => self.read(&request)?,
                (_, Ok(())) => self.dispatch(Job::Request(request), 0)?,
            }
        }
        Ok(Goodbye::HungUp)
    }

    /// The next request, or `None` when the client has closed between two of them.
    fn next_request(&mut self) -> io::Result<Option<Request>> {
        loop {
            if self.connection.visit.is_ended() {
                return Err(gone());
            }
            let bytes = self.inbox.bytes();
            let (parsed, length) = if self.connection.agreed.extended {
                (bytes.first_chunk().map(Request::parse_extended), EXTENDED_REQUEST_LENGTH)
            } else {
                (bytes.first_chunk().map(Request::parse), REQUEST_LENGTH)
            };
            if let Some(request) = parsed {
                let Some(request) = request else {
                    return Err(io::Error::new(ErrorKind::InvalidData, "a request does not begin with its magic"));
                };
                self.inbox.skip(length);
                self.after_long = false;
                return Ok(Some(request));
            }
            let most = if self.after_long { length - self.inbox.bytes().len() } else { usize::MAX };
            if !self.receive(most)? {
                let inside = !self.inbox.bytes().is_empty();
                return if inside { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(None) };
            }
        }
    }

    /// Receives at most so many bytes, after sending the replies that the client may be waiting for. `false` at the end
    /// of the stream.
    fn receive(&mut self, most: usize) -> io::Result<bool> {
        self.flush_replies()?;
        self.inbox.make_room();
        let room = self.inbox.end..self.inbox.memory.len().min(self.inbox.end.saturating_add(most));
        let got = self.connection.visit.socket().recv(&mut self.inbox.memory[room])?;
        self.inbox.end += got;
        Ok(got > 0)
    }

    fn read(&mut self, request: &Request) -> io::Result<()> {
        let visit = self.connection.visit;
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        if length > INLINE_READ_MAX || visit.disk().is_direct() {
            return self.dispatch(Job::Request(*request), 0);
        }
        if let Err(fault) = visit.may_read() {
            return self.reply(request, error_number(&fault).unwrap_or(wire::EIO));
        }
        let head = ReplyHead::for_data(self.connection.agreed, request, request.offset, length, true);
        if self.outbox.memory.len() - self.outbox.length < head.bytes().len() + length {
            self.flush_replies()?;
        }
        let at = self.outbox.length;
        let (place, rest) = self.outbox.memory[at..].split_at_mut(head.bytes().len());
        if visit.disk().read_cached(&mut rest[..length], request.offset) {
            place.copy_from_slice(head.bytes());
            self.outbox.length += head.bytes().len() + length;
            Ok(())
        } else {
            self.dispatch(Job::Request(*request), 0)
        }
    }

    /// A BLOCK_STATUS that names the contexts it wants, which can only be the one that there is.
    fn filtered_status(&mut self, request: &Request, payload: u64) -> io::Result<()> {
        const PAYLOAD: usize = 8 + 4;
        let agreed = self.connection.agreed;
        if payload != PAYLOAD as u64 {
            self.drain(usize::try_from(payload).unwrap_or(usize::MAX))?;
            return self.reply(request, wire::EINVAL);
        }
        while self.inbox.bytes().len() < PAYLOAD {
            self.receive_payload()?;
        }
        let mut fields = Fields::new(self.inbox.bytes());
        let (length, context) = (fields.u64().unwrap_or(0), fields.u32());
        self.inbox.skip(PAYLOAD);
        let request = Request { flags: request.flags & !wire::CMD_FLAG_PAYLOAD_LEN, length, ..*request };
        match validate(&request, self.connection.visit, agreed) {
            Ok(()) if context == Some(BASE_ALLOCATION_ID) => self.dispatch(Job::Request(request), 0),
            Ok(()) => self.reply(&request, wire::EINVAL),
            Err(error) => self.reply(&request, error),
        }
    }

    fn write(&mut self, request: &Request) -> io::Result<()> {
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        if length > SLOT_BUFFER {
            let is_direct = self.connection.visit.disk().is_direct();
            return if is_direct { self.write_long(request, length) } else { self.write_in_pieces(request, length) };
        }
        while self.inbox.bytes().len() < length {
            self.receive_payload()?;
        }
        if let Some(done) = self.write_now(request.offset, length, request.flags & wire::CMD_FLAG_FUA != 0) {
            self.inbox.skip(length);
            return match done {
                Ok(None) => self.reply(request, 0),
                Ok(Some(owed)) => self.answer_later(Answer { request: *request, ticket: None, owed }),
                Err(fault) => self.reply(request, error_number(&fault).ok_or_else(gone)?),
            };
        }
        self.dispatch(Job::Request(*request), length)
    }

    /// Writes the next `length` bytes of the inbox from this thread, unless that may take long.
    fn write_now(&mut self, offset: u64, length: usize, durable: bool) -> Option<Result<Option<Owed>, Fault>> {
        let visit = self.connection.visit;
        if durable || visit.disk().is_direct() {
            return None;
        }
        if self.slow_writes_left > 0 {
            self.slow_writes_left -= 1;
            return None;
        }
        let began = Instant::now();
        let done = visit.write(Patience::Now, offset, &self.inbox.bytes()[..length], false);
        // A mirror has nothing behind a write that would rather be served first.
        if visit.door() == Door::Guest && began.elapsed() > SLOW_WRITE {
            self.slow_writes_left = SLOW_WRITE_MEMORY;
        }
        if matches!(done, Err(Fault::WouldWait)) { None } else { Some(done) }
    }

    fn answer_later(&mut self, answer: Answer) -> io::Result<()> {
        // Whoever waits for these may be who is waited for.
        self.flush_replies()?;
        self.connection.answer_later(self.scope, answer)
    }

    /// A write that is larger than a worker's buffer: each piece passes the gate by itself, and the reply follows the
    /// last one. Pieces end where pages end, so that no page is written twice.
    fn write_in_pieces(&mut self, request: &Request, length: usize) -> io::Result<()> {
        let ticket = self.connection.open_ticket();
        let mut done = 0;
        while done < length {
            let offset = request.offset + done as u64;
            let there = self.inbox.bytes().len().min(length - done);
            let piece = if done + there == length { there } else { up_to_page_end(offset, there) };
            if piece == 0 {
                self.receive_payload()?;
                continue;
            }
            done += piece;
            if self.connection.has_failed(ticket) {
                self.inbox.skip(piece);
                continue;
            }
            match self.write_now(offset, piece, false) {
                Some(Ok(owed)) => {
                    self.inbox.skip(piece);
                    if let Some(owed) = owed {
                        self.connection.add_piece(ticket);
                        self.answer_later(Answer { request: *request, ticket: Some(ticket), owed })?;
                    }
                }
                Some(Err(fault)) => {
                    self.connection.fail(ticket, error_number(&fault).ok_or_else(gone)?);
                    self.inbox.skip(piece);
                }
                None => self.hand_out(request, ticket, offset, piece)?,
            }
        }
        self.finish(request, ticket)
    }

    /// The last piece of a WRITE is under way. Whoever finishes it replies: this thread, a worker, or the answerer. A
    /// sync is none of this thread's business.
    fn finish(&mut self, request: &Request, ticket: usize) -> io::Result<()> {
        if request.flags & wire::CMD_FLAG_FUA == 0 {
            return self.connection.finish_piece(ticket, request).map_or(Ok(()), |error| self.reply(request, error));
        }
        if self.connection.leave_piece(ticket) {
            Ok(())
        } else {
            self.dispatch(Job::Last { request: *request, ticket }, 0)
        }
    }

    /// The same where every write waits for the device: the workers get few and large pieces, and these are received
    /// where they are written from.
    fn write_long(&mut self, request: &Request, length: usize) -> io::Result<()> {
        let ticket = self.connection.open_ticket();
        let (mut done, mut patient) = (0, true);
        while done < length {
            if self.connection.has_failed(ticket) {
                self.drain(length - done)?;
                break;
            }
            let chosen = self.idle_worker(patient)?;
            let (offset, room) = (request.offset + done as u64, room_of(chosen));
            // Others have the large buffers, and for long.
            patient &= chosen < LONG_SLOTS;
            let there = room.min(length - done);
            let piece = if done + there == length { there } else { up_to_page_end(offset, there) };
            done += piece;
            let connection = self.connection;
            connection.add_piece(ticket);
            let job = Job::Piece { request: *request, ticket, offset, length: piece };
            connection.workers[chosen].give(job, room, |buffer| self.take(&mut buffer[..piece]))?;
        }
        self.after_long = true;
        self.finish(request, ticket)
    }

    /// The next bytes of a payload: from the inbox first, then from the socket.
    fn take(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let visit = self.connection.visit;
        let there = self.inbox.bytes().len().min(buffer.len());
        buffer[..there].copy_from_slice(&self.inbox.bytes()[..there]);
        self.inbox.skip(there);
        let mut filled = there;
        while filled < buffer.len() {
            if visit.is_ended() {
                return Err(gone());
            }
            match visit.socket().recv(&mut buffer[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                got => filled += got,
            }
        }
        Ok(())
    }

    /// Gives the next `length` bytes of the inbox to workers, in as many pieces as their buffers need.
    fn hand_out(&mut self, request: &Request, ticket: usize, mut offset: u64, mut length: usize) -> io::Result<()> {
        while length > 0 {
            let piece = length.min(SLOT_BUFFER);
            self.connection.add_piece(ticket);
            self.dispatch(Job::Piece { request: *request, ticket, offset, length: piece }, piece)?;
            offset += piece as u64;
            length -= piece;
        }
        Ok(())
    }

    /// Reads `length` bytes of a refused write and forgets them: the connection lives on.
    fn drain(&mut self, mut length: usize) -> io::Result<()> {
        loop {
            let there = self.inbox.bytes().len().min(length);
            self.inbox.skip(there);
            length -= there;
            if length == 0 {
                return Ok(());
            }
            self.receive_payload()?;
        }
    }

    /// Receives more of a payload whose end must come.
    fn receive_payload(&mut self) -> io::Result<()> {
        if self.connection.visit.is_ended() {
            return Err(gone());
        }
        if self.receive(usize::MAX)? { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    /// Hands a job, with the next `payload` bytes of the inbox, to an idle worker.
    fn dispatch(&mut self, job: Job, payload: usize) -> io::Result<()> {
        let connection = self.connection;
        let read = match &job {
            Job::Request(request) if request.command == wire::CMD_READ => request.length,
            _ => 0,
        };
        let long = read > SLOT_BUFFER as u64 && connection.visit.disk().is_direct();
        let chosen = self.idle_worker(long)?;
        let room = match (long, read > 0 || payload > 0) {
            (true, _) => room_of(chosen),
            (false, true) => SLOT_BUFFER,
            (false, false) => 0,
        };
        connection.workers[chosen].give(job, room, |buffer| self.take(&mut buffer[..payload]))
    }

    /// An idle worker; starts one if there is none yet, or waits for one.
    fn idle_worker(&mut self, long: bool) -> io::Result<usize> {
        // Whoever waits for these may be who the worker waits for.
        self.flush_replies()?;
        let (connection, scope) = (self.connection, self.scope);
        connection.idle_worker(long, |number| {
            let worker = thread::Builder::new().name(format!("nbd worker {number}")).stack_size(WORKER_STACK);
            worker.spawn_scoped(scope, move || connection.work(number, scope)).map(drop)
        })
    }

    fn reply(&mut self, request: &Request, error: u32) -> io::Result<()> {
        let head = ReplyHead::for_result(self.connection.agreed, request, error);
        if self.outbox.memory.len() - self.outbox.length < head.bytes().len() {
            self.flush_replies()?;
        }
        let at = self.outbox.length;
        self.outbox.memory[at..at + head.bytes().len()].copy_from_slice(head.bytes());
        self.outbox.length += head.bytes().len();
        Ok(())
    }

    fn flush_replies(&mut self) -> io::Result<()> {
        if self.outbox.length == 0 {
            return Ok(());
        }
        let length = std::mem::take(&mut self.outbox.length);
        self.connection.send(&self.outbox.memory[..length], &[])
    }
}

/// How many of `length` bytes at `offset` reach up to the last page boundary among them.
fn up_to_page_end(offset: u64, length: usize) -> usize {
    let beyond = (offset + length as u64) % DIRECT_ALIGN as u64;
    length.saturating_sub(usize::try_from(beyond).unwrap_or(usize::MAX))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
