//! One lane of a copy: a thread that takes windows of the disk, and copies what is in them with many requests on their
//! way.
//!
//! Data goes through a few *slots* of one piece each. A piece of a file is read when it is its turn; of an export
//! several are asked for at once, and each is written when it has come whole. A write to an export has left its slot
//! when it was submitted. Before the next window, and at the end, everything is answered: then the extents can be asked
//! for over the same connection, which may be the only one that a server allows.

use std::sync::atomic::Ordering;

use super::Shared;
use super::end::End;
use crate::disk::AlignedBuffer;
use crate::limits::{COPY_SLOTS, COPY_WINDOW};
use crate::mirror::runs::Runs;
use crate::nbd::client::Event;
use crate::nbd::replies::ServerError;

/// What one request is about.
#[derive(Debug, Clone, Copy)]
struct Piece {
    offset: u64,
    length: usize,
}

/// A part of a window.
#[derive(Debug, Clone, Copy)]
struct Part {
    from: u64,
    to: u64,
    zero: bool,
}

struct Slot {
    buffer: AlignedBuffer,
    /// It is asked for.
    asked: Option<Piece>,
    /// It has come.
    came: bool,
}

/// One lane.
pub(super) struct Lane {
    source: End,
    destination: End,
    /// The destination is known to read as zero where nothing was written (D10).
    zero: bool,
    slots: Vec<Slot>,
    piece: usize,
    block: u64,
    data: u64,
    zeroes: u64,
    failure: Option<String>,
}

impl Lane {
    pub(super) fn new(source: End, destination: End, zero: bool) -> Self {
        let block = source.block().max(destination.block());
        let piece = source.piece_read().min(destination.piece_written());
        let count = if matches!(source, End::File(_)) { 1 } else { COPY_SLOTS };
        let slots = (0..count).map(|_| Slot { buffer: AlignedBuffer::new(piece), asked: None, came: false }).collect();
        Self { source, destination, zero, slots, piece, block, data: 0, zeroes: 0, failure: None }
    }

    pub(super) fn into_ends(self) -> (End, End) {
        (self.source, self.destination)
    }

    /// Copies until no window is left, and makes durable what it has written.
    pub(super) fn run(&mut self, shared: &Shared, size: u64) -> Result<(), String> {
        let mut parts = Vec::new();
        while !shared.stop.load(Ordering::Acquire) {
            let from = shared.next.fetch_add(COPY_WINDOW, Ordering::AcqRel);
            if from >= size {
                break;
            }
            let to = size.min(from + COPY_WINDOW);
            // Whole blocks; what is left at the end of an odd disk is copied by itself.
            let whole = to - to % self.block;
            self.parts(from, whole, &mut parts)?;
            for part in parts.drain(..) {
                if part.zero {
                    self.clear(part)?;
                } else {
                    self.copy(part)?;
                }
                if shared.stop.load(Ordering::Acquire) {
                    break;
                }
            }
            self.drain()?;
            if whole < to {
                self.copy_odd(whole.max(from), to)?;
            }
            shared.done.fetch_add(to - from, Ordering::Relaxed);
            shared.data.fetch_add(std::mem::take(&mut self.data), Ordering::Relaxed);
            shared.zeroes.fetch_add(std::mem::take(&mut self.zeroes), Ordering::Relaxed);
        }
        self.destination.flush()
    }

    /// What is in a window, in whole blocks: a block that holds any data is data.
    fn parts(&mut self, from: u64, to: u64, parts: &mut Vec<Part>) -> Result<(), String> {
        let block = self.block;
        if from >= to {
            return Ok(());
        }
        self.source.extents(from, to, &mut |offset, length, zero| {
            let end = offset + length;
            let start = parts.last().map_or(from, |last: &Part| last.to);
            let (start, end) = if zero {
                (offset.next_multiple_of(block).max(start), end - end % block)
            } else {
                (start.max(offset - offset % block), end.next_multiple_of(block).min(to))
            };
            if start >= end {
                return;
            }
            match parts.last_mut() {
                Some(last) if last.zero == zero && last.to == start => last.to = end,
                _ => parts.push(Part { from: start, to: end, zero }),
            }
        })?;
        // Blocks that are part hole, part nothing: whatever was left out between two is data.
        let (mut at, mut whole) = (from, Vec::with_capacity(parts.len()));
        for part in parts.drain(..) {
            if at < part.from {
                whole.push(Part { from: at, to: part.from, zero: false });
            }
            at = part.to;
            whole.push(part);
        }
        if at < to {
            whole.push(Part { from: at, to, zero: false });
        }
        *parts = whole;
        Ok(())
    }

    /// A hole.
    fn clear(&mut self, part: Part) -> Result<(), String> {
        self.zeroes += part.to - part.from;
        if self.zero { Ok(()) } else { self.write_zeroes(part.from, part.to - part.from) }
    }

    fn copy(&mut self, part: Part) -> Result<(), String> {
        let mut at = part.from;
        while at < part.to {
            let length = usize::try_from(part.to - at).unwrap_or(usize::MAX).min(self.piece);
            let piece = Piece { offset: at, length };
            if matches!(self.source, End::File(_)) {
                self.source.read(&mut self.slots[0].buffer[..length], at)?;
                self.pass_on(0, piece)?;
            } else {
                self.ask(piece)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    /// Asks for a piece of an export, as soon as there is a slot for it.
    fn ask(&mut self, piece: Piece) -> Result<(), String> {
        loop {
            if let Some(free) = self.slots.iter().position(|slot| slot.asked.is_none())
                && self.source.ask(free as u64, piece.offset, piece.length)?
            {
                self.slots[free].asked = Some(piece);
                return self.take_in(false);
            }
            self.take_in(true)?;
        }
    }

    /// Takes in what has come of the source, and passes on what is whole; waits for the first of it if `wait`.
    fn take_in(&mut self, wait: bool) -> Result<(), String> {
        let (slots, failure) = (&mut self.slots, &mut self.failure);
        self.source.listen(wait, &mut |event| match event {
            Event::Data { cookie, offset, bytes } => {
                if let Some((slot, at)) = place(slots, cookie, offset) {
                    slot.buffer[at..at + bytes.len()].copy_from_slice(bytes);
                }
            }
            Event::Zero { cookie, offset, length } => {
                if let Some((slot, at)) = place(slots, cookie, offset) {
                    slot.buffer[at..at + length as usize].fill(0);
                }
            }
            Event::Status { .. } => {}
            Event::Done { cookie, result } => {
                match (usize::try_from(cookie).ok().and_then(|n| slots.get_mut(n)), result) {
                    (Some(slot), Ok(())) => slot.came = true,
                    (_, Err(error)) => note(failure, "read", &error, slots_offset(slots, cookie)),
                    (None, Ok(())) => {}
                }
            }
        })?;
        self.check()?;
        for number in 0..self.slots.len() {
            if !std::mem::take(&mut self.slots[number].came) {
                continue;
            }
            if let Some(piece) = self.slots[number].asked.take() {
                self.pass_on(number, piece)?;
            }
        }
        Ok(())
    }

    /// Writes what is in a slot.
    fn pass_on(&mut self, number: usize, piece: Piece) -> Result<(), String> {
        let buffer = std::mem::take(&mut self.slots[number].buffer);
        let bytes = &buffer[..piece.length];
        let passed = Runs::new(bytes, self.block).try_for_each(|run| {
            self.pass_run(&bytes[run.start..run.start + run.length], piece.offset + run.start as u64, run.zero)
        });
        self.slots[number].buffer = buffer;
        passed
    }

    fn pass_run(&mut self, bytes: &[u8], offset: u64, zero: bool) -> Result<(), String> {
        let length = bytes.len() as u64;
        if zero {
            self.zeroes += length;
            return if self.zero { Ok(()) } else { self.write_zeroes(offset, length) };
        }
        self.data += length;
        while !self.destination.write(bytes, offset)? {
            self.hear(true)?;
        }
        self.hear(false)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), String> {
        let mut at = offset;
        while at < offset + length {
            match self.destination.write_zeroes(at, offset + length - at)? {
                0 => self.hear(true)?,
                part => at += part,
            }
        }
        self.hear(false)
    }

    /// Takes in what the destination has answered.
    fn hear(&mut self, wait: bool) -> Result<(), String> {
        if self.destination.in_flight() == 0 {
            return Ok(());
        }
        let failure = &mut self.failure;
        self.destination.listen(wait, &mut |event| {
            if let Event::Done { cookie, result: Err(error) } = event {
                note(failure, "write", &error, Some(cookie));
            }
        })?;
        self.check()
    }

    /// Waits until everything is answered at both ends.
    fn drain(&mut self) -> Result<(), String> {
        while self.source.in_flight() > 0 {
            self.take_in(true)?;
        }
        while self.destination.in_flight() > 0 {
            self.hear(true)?;
        }
        Ok(())
    }

    /// The last bytes of a disk that is no whole number of blocks.
    fn copy_odd(&mut self, from: u64, to: u64) -> Result<(), String> {
        let mut at = from;
        while at < to {
            let length = usize::try_from(to - at).unwrap_or(usize::MAX).min(self.piece);
            let mut buffer = std::mem::take(&mut self.slots[0].buffer);
            let copied = self
                .source
                .read(&mut buffer[..length], at)
                .and_then(|()| self.destination.write_whole(&buffer[..length], at));
            self.slots[0].buffer = buffer;
            copied?;
            self.data += length as u64;
            at += length as u64;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        self.failure.take().map_or(Ok(()), Err)
    }
}

/// Where bytes of a reply belong.
fn place(slots: &mut [Slot], cookie: u64, offset: u64) -> Option<(&mut Slot, usize)> {
    let slot = slots.get_mut(usize::try_from(cookie).ok()?)?;
    let at = offset.checked_sub(slot.asked?.offset)?;
    Some((slot, usize::try_from(at).ok()?))
}

fn slots_offset(slots: &[Slot], cookie: u64) -> Option<u64> {
    Some(slots.get(usize::try_from(cookie).ok()?)?.asked?.offset)
}

/// Remembers the first error.
fn note(failure: &mut Option<String>, what: &str, error: &ServerError, offset: Option<u64>) {
    let at = offset.map(|offset| format!(" at {offset}")).unwrap_or_default();
    failure.get_or_insert_with(|| format!("{what}{at}: the server answered {error}"));
}
