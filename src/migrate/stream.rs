//! The destination's end of the stream path: writes the blocks that have come inside the phase connection.
//!
//! Made when the source says STREAM on a phase connection, and gone with it. Beside the conversation about the phases,
//! which goes on as before, there are three threads: the trunk's reader, a writer, and one that answers who asks for
//! digests. None of them waits for another: see `trunk.rs`.
//!
//! Each disk's blocks come in through a [`Visit`] of the migration door, exactly as those of a data connection do, and
//! under the same rules (D4): whether attempt, instance, epoch and token are current is checked under the lock that a
//! fence takes, and the fence, PREPARE or SEAL that ends the visits shuts the writer's bell down and waits until the
//! writer is gone. What it had not begun by then is thrown away.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::destination::{Opened, answer_digests};
use super::link::Link;
use super::wire::Hello;
use crate::export::{Fault, Patience, Visit};
use crate::guest::Guest;
use crate::limits::{CONNECTION_STACK, DRIVER_STACK, REPLY_TIMEOUT, STREAM_SLOTS};
use crate::nbd::server::error_number;
use crate::nbd::wire::EINVAL;
use crate::socket::Socket;
use crate::trunk::Trunk;
use crate::trunk::wire::{Block, DONE_LENGTH, Done, FRAME_HEAD, Kind, Verb, head};

/// The threads of one connection. Dropping it ends the connection and waits for them.
#[derive(Debug)]
pub(super) struct Stream {
    trunk: Arc<Trunk>,
    bell: Arc<Socket>,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    /// Turns the phase connection into one that carries blocks too.
    ///
    /// # Errors
    /// There is no thread: the connection is of no more use.
    pub(super) fn start(
        guest: &Arc<Guest>,
        link: &mut Link,
        Opened { slots, bell, visits }: Opened,
        theirs: &Hello,
    ) -> Result<Self, String> {
        let fault = |error: std::io::Error| format!("no thread for the stream: {error}");
        let trunk = link.share(Some(slots)).map_err(fault)?;
        let mut stream = Self { trunk: Arc::clone(&trunk), bell: Arc::clone(&bell), threads: Vec::new() };
        let mut digests = Link::over(Arc::clone(&trunk), Kind::Digests);
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned()).stack_size(CONNECTION_STACK);
        let writer = Writer { trunk, bell, visits };
        stream.threads.push(thread("stream writer").spawn(move || writer.run()).map_err(fault)?);
        let (guest, theirs) = (Arc::clone(guest), theirs.clone());
        let asked = move || answer_digests(&guest, &mut digests, theirs);
        stream.threads.push(thread("stream digests").stack_size(DRIVER_STACK).spawn(asked).map_err(fault)?);
        Ok(stream)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.trunk.shut();
        self.bell.shutdown();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The thread that writes.
struct Writer {
    trunk: Arc<Trunk>,
    /// Its shutdown is the writer's end: whoever ends the visits does that.
    bell: Arc<Socket>,
    visits: Vec<Visit>,
}

impl Writer {
    fn run(self) {
        let mut numbers = [0; STREAM_SLOTS];
        let mut frame = [0; FRAME_HEAD + STREAM_SLOTS * DONE_LENGTH];
        while let Ok(count) = self.bell.recv(&mut numbers) {
            if count == 0 {
                return;
            }
            let mut length = FRAME_HEAD;
            for number in &numbers[..count] {
                let Some(done) = self.write(*number) else { return };
                frame[length..length + DONE_LENGTH].copy_from_slice(&done.encode());
                length += DONE_LENGTH;
            }
            frame[..FRAME_HEAD].copy_from_slice(&head(Kind::Done, length - FRAME_HEAD));
            // The source reads all the time: one that does not has gone.
            let deadline = Instant::now() + REPLY_TIMEOUT;
            if let Err(broken) = self.trunk.send(Kind::Done, &frame[..length], &[], deadline) {
                log::info!("migration door: stream: {broken}");
                return;
            }
        }
    }

    /// Does what the block in a slot says, and frees the slot. `None`: the writer has been ended.
    fn write(&self, number: u8) -> Option<Done> {
        let slots = self.trunk.slots()?;
        let (block, done) = {
            let slot = slots.slot(number);
            (slot.block, self.change(&slot.block, slot.data()))
        };
        slots.give_back(number);
        let error = match done {
            Ok(()) => 0,
            Err(Refused::Malformed) => EINVAL,
            Err(Refused::Fault(fault)) => {
                let error = error_number(&fault)?;
                log::warn!("migration door: stream: disk {}: {fault:?}", block.disk);
                error
            }
        };
        Some(Done { disk: block.disk, number: block.number, error })
    }

    fn change(&self, block: &Block, data: &[u8]) -> Result<(), Refused> {
        let visit = self.visits.get(usize::from(block.disk)).ok_or(Refused::Malformed)?;
        let (offset, length) = (block.offset_bytes, u64::from(block.length_bytes));
        if offset.checked_add(length).is_none_or(|end| end > visit.disk().size()) {
            return Err(Refused::Malformed);
        }
        match block.verb {
            Verb::Write => visit.write(Patience::Wait, offset, data, false).map(drop)?,
            Verb::Zero => visit.write_zeroes(offset, length, true, false, false).map(drop)?,
            Verb::Flush => visit.flush()?,
        }
        Ok(())
    }
}

/// Why a block was not done.
enum Refused {
    /// It lies on no disk.
    Malformed,
    Fault(Fault),
}

impl From<Fault> for Refused {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}
