//! The workers of one connection: they do what may wait for the disk or at the gate, and reply by themselves.
//!
//! The connection's own thread hands each a job and the bytes of a WRITE, and never waits for a busy one's lock. A
//! WRITE larger than a worker's buffer comes in pieces, perhaps to several workers, and is answered once: a [`Ticket`]
//! counts them.

use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::Scope;
use std::time::Instant;

use super::answerer::Answer;
use super::pipe::Pipe;
use super::reply::ReplyHead;
use super::{Connection, TICKETS, error_number, gone, locked};
use crate::dirty::Owed;
use crate::disk::AlignedBuffer;
use crate::export::{Fault, Patience};
use crate::limits::{INLINE_READ_MAX, LONG_BUFFER, LONG_SLOTS, LONG_WAIT, SLOT_BUFFER, SLOTS, STATUS_EXTENTS_MAX};
use crate::nbd::handshake::BASE_ALLOCATION_ID;
use crate::nbd::wire::{self, Request};

#[derive(Default)]
pub(super) struct Pool {
    idle: heapless::Vec<usize, SLOTS>,
    started: usize,
}

#[derive(Default)]
pub(super) struct Worker {
    mail: Mutex<Mail>,
    arrived: Condvar,
}

/// What the reader hands to a worker. While a worker is busy it holds the lock; the reader only ever locks idle ones.
#[derive(Default)]
struct Mail {
    job: Option<Job>,
    buffer: Option<AlignedBuffer>,
    pipe: Option<Pipe>,
    dismissed: bool,
}

impl Worker {
    /// Gives an idle worker a job. One that needs a buffer says how large; `fill` puts the payload of a WRITE there.
    pub(super) fn give(&self, job: Job, room: usize, fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let mut mail = locked(&self.mail);
        if room > 0 {
            fill(mail.room(room))?;
        }
        mail.job = Some(job);
        drop(mail);
        self.arrived.notify_one();
        Ok(())
    }
}

/// The buffer that a worker may have.
pub(super) fn room_of(worker: usize) -> usize {
    if worker < LONG_SLOTS { LONG_BUFFER } else { SLOT_BUFFER }
}

impl Mail {
    /// The buffer, at least that large.
    fn room(&mut self, room: usize) -> &mut [u8] {
        if self.buffer.as_ref().is_none_or(|buffer| buffer.len() < room) {
            self.buffer = Some(AlignedBuffer::new(room));
        }
        self.buffer.as_deref_mut().unwrap_or_default()
    }
}

/// What a worker is to do.
pub(super) enum Job {
    /// A whole request; a WRITE's payload is in the buffer.
    Request(Request),
    /// Part of a larger WRITE: `length` bytes for `offset` are in the buffer.
    Piece { request: Request, ticket: usize, offset: u64, length: usize },
    /// What is left of a larger WRITE when all of its pieces are under way: to sync, and to answer.
    Last { request: Request, ticket: usize },
}

/// A WRITE that is done in pieces. Only the reader takes a ticket, and each piece under way is somewhere: there are
/// always enough.
#[derive(Default)]
pub(super) struct Ticket {
    /// Pieces not finished, plus one as long as the reader has not handed out all of them; 0 is free.
    open: usize,
    /// The first error, or 0.
    error: u32,
}

impl<'a> Connection<'a> {
    /// Sends one whole reply or chunk.
    pub(super) fn send(&self, first: &[u8], second: &[u8]) -> io::Result<()> {
        let _turn = locked(&self.sending);
        self.send_in_turn(first, second)
    }

    /// Sends while `sending` is held. What could not be sent whole ends the connection.
    pub(super) fn send_in_turn(&self, first: &[u8], second: &[u8]) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            return Err(ErrorKind::BrokenPipe.into());
        }
        self.visit.socket().send_all_two(first, second).inspect_err(|_| self.break_off())
    }

    /// Nothing that is sent from now on could be understood.
    pub(super) fn break_off(&self) {
        self.broken.store(true, Ordering::Release);
        self.visit.socket().shutdown();
    }

    /// An idle worker; starts one, or waits for one. For a `long` job one of the first [`LONG_SLOTS`], which alone ever
    /// have a large buffer, if one of them comes free soon; who is there else may be needed by what comes behind it.
    pub(super) fn idle_worker(&self, long: bool, start: impl Fn(usize) -> io::Result<()>) -> io::Result<usize> {
        let mut pool = locked(&self.pool);
        let patience = long.then(|| Instant::now() + LONG_WAIT);
        loop {
            let left = patience.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left.filter(|left| !left.is_zero());
            let end = if left.is_some() { LONG_SLOTS } else { SLOTS };
            if let Some(at) = pool.idle.iter().rposition(|number| *number < end) {
                return Ok(pool.idle.swap_remove(at));
            }
            if pool.started < end {
                let number = pool.started;
                start(number)?;
                pool.started += 1;
                return Ok(number);
            }
            pool = match left {
                Some(left) => self.freed.wait_timeout(pool, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    pub(super) fn dismiss_workers(&self) {
        let started = locked(&self.pool).started;
        for worker in &self.workers[..started] {
            locked(&worker.mail).dismissed = true;
            worker.arrived.notify_one();
        }
    }

    /// A worker's life.
    pub(super) fn work<'s>(&'s self, number: usize, scope: &'s Scope<'s, '_>)
    where
        'a: 's,
    {
        let worker = &self.workers[number];
        let mut mail = locked(&worker.mail);
        loop {
            if let Some(job) = mail.job.take() {
                let mut nothing = AlignedBuffer::default();
                let Mail { buffer, pipe, .. } = &mut *mail;
                let outcome = self.serve(&job, buffer.as_mut().unwrap_or(&mut nothing), pipe, scope);
                // Else the connection is ending; its thread finds that out by itself.
                if let Err(error) = outcome {
                    log::debug!("nbd: export {}: {error}", self.visit.export().name());
                    self.break_off();
                }
                // Unlocked before it counts as idle: the reader must never wait for a busy worker's lock.
                drop(mail);
                // There is room for every worker.
                let _ = locked(&self.pool).idle.push(number);
                self.freed.notify_one();
                mail = locked(&worker.mail);
            } else if mail.dismissed {
                return;
            } else {
                mail = worker.arrived.wait(mail).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Does a job and replies. An error is the connection's end.
    fn serve<'s>(
        &'s self,
        job: &Job,
        buffer: &mut [u8],
        pipe: &mut Option<Pipe>,
        scope: &'s Scope<'s, '_>,
    ) -> io::Result<()>
    where
        'a: 's,
    {
        let later =
            |request: &Request, ticket, owed| self.answer_later(scope, Answer { request: *request, ticket, owed });
        match job {
            Job::Piece { request, ticket, offset, length } => {
                match self.visit.write(Patience::Wait, *offset, &buffer[..*length], false) {
                    Ok(None) => {}
                    Ok(Some(owed)) => return later(request, Some(*ticket), owed),
                    Err(fault) => self.fail(*ticket, error_number(&fault).ok_or_else(gone)?),
                }
                self.reply_after_piece(*ticket, request)
            }
            Job::Last { request, ticket } => self.reply_after_piece(*ticket, request),
            Job::Request(request) if request.command == wire::CMD_READ => {
                let long = request.length > INLINE_READ_MAX as u64;
                if long && self.uncopied.load(Ordering::Relaxed) && self.read_uncopied(request, pipe)? {
                    return Ok(());
                }
                self.read(request, buffer)
            }
            Job::Request(request) if request.command == wire::CMD_BLOCK_STATUS => self.block_status(request),
            Job::Request(request) => {
                let error = match self.change(request, buffer) {
                    Ok(None) => 0,
                    Ok(Some(owed)) => return later(request, None, owed),
                    Err(fault) => error_number(&fault).ok_or_else(gone)?,
                };
                self.reply(request, error)
            }
        }
    }

    /// Everything that is answered with nothing but success or an error.
    fn change(&self, request: &Request, payload: &[u8]) -> Result<Option<Owed>, Fault> {
        let visit = self.visit;
        let (offset, length) = (request.offset, request.length);
        let durable = request.flags & wire::CMD_FLAG_FUA != 0;
        match request.command {
            wire::CMD_WRITE => {
                let length = usize::try_from(request.length).unwrap_or(usize::MAX);
                visit.write(Patience::Wait, offset, &payload[..length], durable)
            }
            wire::CMD_WRITE_ZEROES => {
                let may_punch = request.flags & wire::CMD_FLAG_NO_HOLE == 0;
                let fast = request.flags & wire::CMD_FLAG_FAST_ZERO != 0;
                visit.write_zeroes(offset, length, may_punch, fast, durable)
            }
            wire::CMD_TRIM => visit.trim(offset, length, durable),
            wire::CMD_CACHE => {
                visit.may_read()?;
                visit.disk().prefetch(offset, length);
                Ok(None)
            }
            _ => visit.flush().map(|()| None),
        }
    }

    /// A read that may have to wait for the device. A structured reply comes in chunks; a reply that must be whole (a
    /// simple one, or with DF) and does not fit the buffer is sent as it is read, and an error in its middle, which
    /// nobody could be told of any more, ends the connection.
    fn read(&self, request: &Request, buffer: &mut [u8]) -> io::Result<()> {
        let whole = !self.agreed.structured || request.flags & wire::CMD_FLAG_DF != 0;
        let end = request.offset + request.length;
        let mut turn = None;
        let mut at = request.offset;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let length = left.min(buffer.len());
            if let Err(fault) = self.visit.read(&mut buffer[..length], at) {
                if turn.is_some() {
                    return Err(io::Error::other("a read failed after its reply had begun"));
                }
                return self.reply(request, error_number(&fault).ok_or_else(gone)?);
            }
            let data = &buffer[..length];
            if whole {
                let first = turn.is_none();
                turn.get_or_insert_with(|| locked(&self.sending));
                let total = usize::try_from(request.length).unwrap_or(usize::MAX);
                let head = ReplyHead::for_data(self.agreed, request, at, total, true);
                self.send_in_turn(if first { head.bytes() } else { &[] }, data)?;
            } else {
                let head = ReplyHead::for_data(self.agreed, request, at, length, length == left);
                self.send(head.bytes(), data)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    /// The extents of a range, for `base:allocation`.
    fn block_status(&self, request: &Request) -> io::Result<()> {
        if let Err(fault) = self.visit.may_read() {
            return self.reply(request, error_number(&fault).ok_or_else(gone)?);
        }
        let most = if request.flags & wire::CMD_FLAG_REQ_ONE == 0 { STATUS_EXTENTS_MAX } else { 1 };
        let mut extents: heapless::Vec<u8, { STATUS_EXTENTS_MAX * 16 }> = heapless::Vec::new();
        let (mut at, end) = (request.offset, request.offset + request.length);
        let mut count = 0;
        while at < end && (count as usize) < most {
            let extent = match self.visit.disk().extent(at, end) {
                Ok(extent) => extent,
                Err(error) => return self.reply(request, error_number(&error.into()).unwrap_or(wire::EIO)),
            };
            let state = if extent.hole { wire::STATE_HOLE | wire::STATE_ZERO } else { 0 };
            // There is room for all of them.
            let _ = if self.agreed.extended {
                extents.extend_from_slice(&wire::extent_ext(extent.length, u64::from(state)))
            } else {
                let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
                extents.extend_from_slice(&wire::extent(length, state))
            };
            count += 1;
            at += extent.length;
        }
        let (ext, plain) = (wire::block_status_ext(BASE_ALLOCATION_ID, count), wire::block_status(BASE_ALLOCATION_ID));
        let (kind, front) = if self.agreed.extended {
            (wire::REPLY_TYPE_BLOCK_STATUS_EXT, &ext[..])
        } else {
            (wire::REPLY_TYPE_BLOCK_STATUS, &plain[..])
        };
        let head = ReplyHead::chunk(self.agreed, request, true, kind, (front.len() + extents.len()) as u64, front);
        self.send(head.bytes(), &extents)
    }

    pub(super) fn reply(&self, request: &Request, error: u32) -> io::Result<()> {
        self.send(ReplyHead::for_result(self.agreed, request, error).bytes(), &[])
    }

    // ---- writes in pieces ----

    pub(super) fn open_ticket(&self) -> usize {
        let mut tickets = locked(&self.tickets);
        let free = tickets.iter().position(|t| t.open == 0).unwrap_or(TICKETS - 1);
        tickets[free] = Ticket { open: 1, error: 0 };
        free
    }

    pub(super) fn add_piece(&self, ticket: usize) {
        locked(&self.tickets)[ticket].open += 1;
    }

    pub(super) fn fail(&self, ticket: usize, error: u32) {
        let entry = &mut locked(&self.tickets)[ticket];
        if entry.error == 0 {
            entry.error = error;
        }
    }

    pub(super) fn has_failed(&self, ticket: usize) -> bool {
        locked(&self.tickets)[ticket].error != 0
    }

    /// One piece less, if it is not the last one.
    pub(super) fn leave_piece(&self, ticket: usize) -> bool {
        let entry = &mut locked(&self.tickets)[ticket];
        let others = entry.open > 1;
        entry.open -= usize::from(others);
        others
    }

    /// One piece less; the last one answers the whole write.
    pub(super) fn reply_after_piece(&self, ticket: usize, request: &Request) -> io::Result<()> {
        self.finish_piece(ticket, request).map_or(Ok(()), |error| self.reply(request, error))
    }

    /// One piece less; after the last one, what the whole write is to be answered with.
    pub(super) fn finish_piece(&self, ticket: usize, request: &Request) -> Option<u32> {
        let error = {
            let entry = &mut locked(&self.tickets)[ticket];
            entry.open -= 1;
            if entry.open > 0 {
                return None;
            }
            entry.error
        };
        if error == 0 && request.flags & wire::CMD_FLAG_FUA != 0 {
            return Some(self.visit.flush().err().and_then(|fault| error_number(&fault)).unwrap_or(0));
        }
        Some(error)
    }
}
