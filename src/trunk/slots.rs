//! Where the blocks that have come wait for whoever writes them.
//!
//! So many slots as the source may have blocks in flight, each allocated once: the reader of the connection never waits
//! for a disk, and a source that sends more than was agreed on is cut off. The reader fills a free slot and says its
//! number on the *bell*, a socket pair; the writer hears it there, does what the block says, and gives the slot back
//! before it acknowledges. Whoever ends the writer shuts its end of the bell down: what was not yet begun is thrown
//! away (D4).

use std::io::Result;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::wire::{Block, Verb};
use crate::limits::{STREAM_BLOCK_MAX, STREAM_SLOTS};
use crate::socket::Socket;

/// The slots of one connection.
#[derive(Debug)]
pub struct Slots {
    slots: Box<[Mutex<Slot>]>,
    free: Mutex<heapless::Vec<u8, STREAM_SLOTS>>,
    bell: Socket,
}

/// One block that has come.
#[derive(Debug)]
pub struct Slot {
    /// What is to be done.
    pub block: Block,
    bytes: Box<[u8]>,
}

impl Slot {
    /// The data of a write.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        let length = usize::try_from(self.block.length_bytes).unwrap_or(usize::MAX);
        if self.block.verb == Verb::Write { self.bytes.get(..length).unwrap_or_default() } else { &[] }
    }

    /// Room for the data of a write of `length` bytes.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        self.bytes.get_mut(..length).unwrap_or_default()
    }
}

impl Slots {
    /// Makes them, and the writer's end of the bell.
    ///
    /// # Errors
    /// The system has no socket pair.
    pub fn new() -> Result<(Self, Arc<Socket>)> {
        let (ours, theirs) = UnixStream::pair()?;
        let none = Block { verb: Verb::Flush, disk: 0, number: 0, offset_bytes: 0, length_bytes: 0 };
        let slot = |_| Mutex::new(Slot { block: none, bytes: vec![0; STREAM_BLOCK_MAX].into() });
        let slots = Self {
            slots: (0..STREAM_SLOTS).map(slot).collect(),
            free: Mutex::new((0..u8::try_from(STREAM_SLOTS).unwrap_or(u8::MAX)).collect()),
            bell: Socket::new(OwnedFd::from(ours)),
        };
        Ok((slots, Arc::new(Socket::new(OwnedFd::from(theirs)))))
    }

    /// A slot; numbers that are none lead to the first one.
    pub fn slot(&self, number: u8) -> MutexGuard<'_, Slot> {
        let slot = self.slots.get(usize::from(number)).unwrap_or(&self.slots[0]);
        slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A free one, if there is one.
    pub(super) fn take(&self) -> Option<u8> {
        self.free().pop()
    }

    /// Has the writer look at a slot. Once the writer has been ended nobody does.
    pub(super) fn ring(&self, number: u8) {
        if self.bell.send_all(&[number]).is_err() {
            self.give_back(number);
        }
    }

    /// The slot is free.
    pub fn give_back(&self, number: u8) {
        // There are no more numbers than places.
        let _ = self.free().push(number);
    }

    /// Nothing more comes.
    pub(super) fn end(&self) {
        self.bell.shutdown();
    }

    fn free(&self) -> MutexGuard<'_, heapless::Vec<u8, STREAM_SLOTS>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
