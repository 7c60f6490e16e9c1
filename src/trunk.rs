//! One byte stream that carries everything of a migration: phases, digests, blocks, their acknowledgements, and the
//! guest's state.
//!
//! The stream path (see `docs/stream.md`): where the two hosts have one connection and cannot open more, the blocks
//! travel inside the phase connection. A [`Trunk`] takes such a connection over, at either end. One thread reads it and
//! sorts what comes; whoever sends takes turns, a whole frame each, and messages go before blocks. Reading never waits
//! for sending, for a disk or for a reader that is slow, so that two ends which both send never wait for each other:
//! there is room for all that the other side may have sent ([`Slots`], [`STREAM_SLOTS`], the room of a [`Channel`]),
//! and one that sends more is cut off.
//!
//! `migrate/link.rs` speaks the phases over it, a mirror copies over it through an [`Outlet`], the guest's state goes
//! through a [`Channel`] both ways, and at the destination `migrate/stream.rs` writes what has come. Nothing here knows
//! what a message means, and nothing here touches a disk or a VMM.
//!
//! # How much is in flight
//!
//! Blocks that wait in a buffer of the way keep the messages behind them waiting. So the source measures how long each
//! block takes until it is acknowledged; what that is longer than the shortest time seen is a queue. Below
//! [`STREAM_QUEUE`] the window grows by what is acknowledged, which doubles it each round trip; above, it shrinks.

mod channel;
mod outlet;
mod slots;
pub mod wire;

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use channel::{Channel, Ended};
pub use outlet::Outlet;
pub use slots::{Slot, Slots};
use wire::{BLOCK_HEAD, Block, DONE_LENGTH, Done, Fault, Kind, Verb, parse_head};

use crate::limits::{
    CONNECTION_STACK, DISKS_MAX, FRAME_MAX, STREAM_MESSAGES_MAX, STREAM_QUEUE, STREAM_RECEIVE_BUFFER, STREAM_SLOTS,
    STREAM_WINDOW_MAX, STREAM_WINDOW_MIN,
};
use crate::socket::Socket;

/// The one connection.
#[derive(Debug)]
pub struct Trunk {
    socket: Arc<Socket>,
    turn: Mutex<Turn>,
    next: Condvar,
    inner: Mutex<Inner>,
    arrived: Condvar,
    /// At the destination.
    slots: Option<Slots>,
}

/// Whose turn it is to send. Blocks and the state go in the order in which they have come: whoever sends all the time
/// must not always be quicker than the others.
#[derive(Debug, Default)]
struct Turn {
    busy: bool,
    /// So many wait with messages.
    urgent: usize,
    /// So many have come with something else, and so many of them have had their turn.
    come: u64,
    served: u64,
}

#[derive(Debug)]
struct Inner {
    phases: VecDeque<Box<[u8]>>,
    digests: VecDeque<Box<[u8]>>,
    lanes: heapless::Vec<Lane, DISKS_MAX>,
    /// The guest's state, once it is on its way.
    state: Option<channel::State>,
    /// No block is sent any more.
    closed: bool,
    /// Frames and bytes with blocks that are not acknowledged.
    in_flight: (usize, usize),
    window: usize,
    /// The shortest time until an acknowledgement.
    shortest: Option<Duration>,
    heard: Instant,
    broken: Option<Broken>,
}

/// What of one disk is on its way.
#[derive(Debug, Default)]
struct Lane {
    number: u32,
    sent: VecDeque<Sent>,
    done: VecDeque<(u64, u32)>,
}

/// A block that is not acknowledged.
#[derive(Debug, Clone, Copy)]
struct Sent {
    number: u32,
    /// The caller's name for the request.
    cookie: u64,
    /// The last block of that request.
    last: bool,
    bytes: usize,
    at: Instant,
}

/// Why nothing more comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// The peer closed it, or this side did.
    Closed,
    /// The peer took nothing for too long.
    Late,
    /// The socket's error.
    Socket(ErrorKind),
    /// The peer sent something that it must not.
    Frame(Fault),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the peer closed the connection"),
            Self::Late => f.write_str("the peer takes nothing"),
            Self::Socket(kind) => write!(f, "the connection broke: {kind}"),
            Self::Frame(fault) => write!(f, "the peer sent {fault}"),
        }
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Closed,
            ErrorKind::TimedOut => Self::Late,
            kind => Self::Socket(kind),
        }
    }
}

impl Trunk {
    /// Takes a connection over; nothing that came on it before may have been read ahead. With `slots`, blocks may come.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(socket: Arc<Socket>, slots: Option<Slots>) -> std::io::Result<Arc<Self>> {
        let trunk = Arc::new(Self {
            socket,
            turn: Mutex::default(),
            next: Condvar::new(),
            inner: Mutex::new(Inner {
                phases: VecDeque::new(),
                digests: VecDeque::new(),
                lanes: (0..DISKS_MAX).map(|_| Lane::default()).collect(),
                state: None,
                closed: false,
                in_flight: (0, 0),
                window: STREAM_WINDOW_MIN,
                shortest: None,
                heard: Instant::now(),
                broken: None,
            }),
            arrived: Condvar::new(),
            slots,
        });
        let reader = Arc::clone(&trunk);
        let thread = std::thread::Builder::new().name("stream".to_owned()).stack_size(CONNECTION_STACK);
        thread.spawn(move || reader.read())?;
        Ok(trunk)
    }

    /// The socket below.
    #[must_use]
    pub fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Where blocks that have come are; `None` at the source.
    #[must_use]
    pub fn slots(&self) -> Option<&Slots> {
        self.slots.as_ref()
    }

    /// Ends the connection. Whoever waits for something of it wakes up.
    pub fn shut(&self) {
        self.break_by(Broken::Closed);
    }

    /// No block is sent any more, and whoever waits to send one wakes up; messages come and go.
    pub fn close_lanes(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    /// Why nothing more comes or goes, if that is so.
    #[must_use]
    pub fn broken(&self) -> Option<Broken> {
        self.lock().broken
    }

    /// When anything at all has come last.
    #[must_use]
    pub fn heard(&self) -> Instant {
        self.lock().heard
    }

    /// Sends a frame: a whole one is in `first` followed by `second`. Messages go before blocks and the state.
    ///
    /// # Errors
    /// [`Broken`], and from then on always.
    pub fn send(&self, kind: Kind, first: &[u8], second: &[u8], deadline: Instant) -> Result<(), Broken> {
        let urgent = !matches!(kind, Kind::Blocks | Kind::State);
        self.take_turn(urgent, deadline).map_err(|broken| self.break_by(broken))?;
        let sent = self.push(first, second, deadline);
        self.turn().busy = false;
        self.next.notify_all();
        sent.map_err(|broken| self.break_by(broken))
    }

    fn take_turn(&self, urgent: bool, deadline: Instant) -> Result<(), Broken> {
        let mut turn = self.turn();
        let place = turn.come;
        turn.urgent += usize::from(urgent);
        turn.come += u64::from(!urgent);
        // Whoever leaves without a turn has found the connection broken, or breaks it: nobody gets a turn after that.
        while turn.busy || !urgent && (turn.urgent > 0 || turn.served < place) {
            if let Some(broken) = self.lock().broken {
                return Err(broken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Broken::Late);
            }
            turn = self.next.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        turn.urgent -= usize::from(urgent);
        turn.served += u64::from(!urgent);
        turn.busy = true;
        Ok(())
    }

    fn push(&self, first: &[u8], second: &[u8], deadline: Instant) -> Result<(), Broken> {
        if let Some(broken) = self.lock().broken {
            return Err(broken);
        }
        let (mut first, mut second) = (first, second);
        while !first.is_empty() || !second.is_empty() {
            if first.is_empty() {
                (first, second) = (second, &[]);
            }
            match self.socket.send_nowait(first, second)? {
                Some(sent) => {
                    let (head, tail) = (sent.min(first.len()), sent.saturating_sub(first.len()));
                    (first, second) = (&first[head..], &second[tail..]);
                }
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Broken::Late);
                    }
                    self.socket.wait(false, true, Some(left))?;
                }
            }
        }
        Ok(())
    }

    /// The next message of a conversation; `None`: none has come before `deadline`.
    ///
    /// # Errors
    /// [`Broken`], once all that came before has been received.
    pub fn receive(&self, kind: Kind, deadline: Instant) -> Result<Option<Box<[u8]>>, Broken> {
        let mut inner = self.lock();
        loop {
            if let Some(message) = inner.inbox(kind).and_then(VecDeque::pop_front) {
                return Ok(Some(message));
            }
            if let Some(broken) = inner.broken {
                return Err(broken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            inner = self.wait(inner, left);
        }
    }

    // ---- reading -------------------------------------------------------------------------------------------------

    fn read(&self) {
        let mut inlet = Inlet { socket: &self.socket, buffer: Box::new([0; STREAM_RECEIVE_BUFFER]), start: 0, end: 0 };
        let mut piece = Vec::new();
        let broken = loop {
            if let Err(broken) = self.read_frame(&mut inlet, &mut piece) {
                break broken;
            }
        };
        self.break_by(broken);
    }

    /// `piece` is there for one frame of the state after the other.
    fn read_frame(&self, inlet: &mut Inlet<'_>, piece: &mut Vec<u8>) -> Result<(), Broken> {
        let (kind, length) = parse_head(inlet.take()?).map_err(Broken::Frame)?;
        match (kind, &self.slots) {
            (Kind::Phases | Kind::Digests, _) => {
                let mut message = vec![0; length.min(FRAME_MAX)].into_boxed_slice();
                inlet.fill(&mut message)?;
                let mut inner = self.lock();
                inner.heard = Instant::now();
                match inner.inbox(kind) {
                    Some(inbox) if inbox.len() < STREAM_MESSAGES_MAX => inbox.push_back(message),
                    _ => return Err(Broken::Frame(Fault::TooMany)),
                }
                drop(inner);
                self.arrived.notify_all();
            }
            (Kind::Blocks, Some(slots)) => {
                let block = Block::decode(&inlet.take::<BLOCK_HEAD>()?, length).map_err(Broken::Frame)?;
                let number = slots.take().ok_or(Broken::Frame(Fault::TooMany))?;
                let mut slot = slots.slot(number);
                slot.block = block;
                if block.verb == Verb::Write {
                    inlet.fill(slot.room(length - BLOCK_HEAD))?;
                }
                drop(slot);
                self.lock().heard = Instant::now();
                slots.ring(number);
            }
            (Kind::Done, None) => {
                for _ in 0..length / DONE_LENGTH {
                    let done = Done::decode(&inlet.take::<DONE_LENGTH>()?).map_err(Broken::Frame)?;
                    self.lock().done(done).map_err(Broken::Frame)?;
                }
                self.arrived.notify_all();
            }
            (Kind::State, _) => {
                // Whether it may come is known before its first byte is taken.
                self.lock().state.as_mut().ok_or(Fault::State).and_then(|s| s.expect(length)).map_err(Broken::Frame)?;
                piece.resize(length, 0);
                inlet.fill(piece)?;
                let mut inner = self.lock();
                inner.heard = Instant::now();
                if let Some(state) = &mut inner.state {
                    state.take_in(piece);
                }
                drop(inner);
                self.arrived.notify_all();
            }
            (Kind::Room, _) => {
                let bytes = u32::from_le_bytes(inlet.take()?);
                let mut inner = self.lock();
                inner.heard = Instant::now();
                let now = inner.heard;
                inner.state.as_mut().ok_or(Fault::State).and_then(|s| s.room(bytes, now)).map_err(Broken::Frame)?;
                drop(inner);
                self.arrived.notify_all();
            }
            (kind, _) => return Err(Broken::Frame(Fault::Way(kind))),
        }
        Ok(())
    }

    /// Remembers the first cause, and ends the connection.
    fn break_by(&self, broken: Broken) -> Broken {
        let first = *self.lock().broken.get_or_insert(broken);
        self.socket.shutdown();
        if let Some(slots) = &self.slots {
            slots.end();
        }
        self.arrived.notify_all();
        // Nobody is between looking and waiting.
        drop(self.turn());
        self.next.notify_all();
        first
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, timeout: Duration) -> MutexGuard<'a, Inner> {
        self.arrived.wait_timeout(inner, timeout).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Inner {
    fn inbox(&mut self, kind: Kind) -> Option<&mut VecDeque<Box<[u8]>>> {
        match kind {
            Kind::Phases => Some(&mut self.phases),
            Kind::Digests => Some(&mut self.digests),
            Kind::Blocks | Kind::Done | Kind::State | Kind::Room => None,
        }
    }

    /// Whether a block of `bytes` may leave.
    fn has_room(&self, bytes: usize) -> bool {
        let (frames, in_flight) = self.in_flight;
        frames < STREAM_SLOTS && (in_flight == 0 || in_flight + bytes <= self.window)
    }

    fn done(&mut self, done: Done) -> Result<(), Fault> {
        let lane = self.lanes.get_mut(usize::from(done.disk)).ok_or(Fault::Unasked)?;
        let sent = lane.sent.pop_front().filter(|sent| sent.number == done.number).ok_or(Fault::Unasked)?;
        if sent.last || done.error != 0 {
            lane.done.push_back((sent.cookie, done.error));
        }
        self.in_flight.0 -= 1;
        self.in_flight.1 -= sent.bytes;
        self.heard = Instant::now();
        let took = self.heard.duration_since(sent.at);
        let shortest = *self.shortest.insert(self.shortest.map_or(took, |shortest| shortest.min(took)));
        self.window = if took.saturating_sub(shortest) < STREAM_QUEUE {
            self.window + sent.bytes
        } else {
            self.window.saturating_sub(sent.bytes / 2)
        }
        .clamp(STREAM_WINDOW_MIN, STREAM_WINDOW_MAX);
        Ok(())
    }
}

/// Reads ahead what is small; blocks go past its buffer.
struct Inlet<'a> {
    socket: &'a Socket,
    buffer: Box<[u8; STREAM_RECEIVE_BUFFER]>,
    start: usize,
    end: usize,
}

impl Inlet<'_> {
    /// The next `N` bytes.
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Fills `room` with what comes next.
    fn fill(&mut self, room: &mut [u8]) -> Result<(), Broken> {
        let mut got = room.len().min(self.end - self.start);
        room[..got].copy_from_slice(&self.buffer[self.start..self.start + got]);
        self.start += got;
        while got < room.len() {
            (self.start, self.end) = (0, 0);
            let wanted = room.len() - got;
            match self.socket.recv_two(&mut room[got..], &mut self.buffer[..]) {
                Ok(0) => return Err(Broken::Closed),
                Ok(received) => {
                    got += received.min(wanted);
                    self.end = received.saturating_sub(wanted);
                }
                // A receive timeout that somebody has set before; or whoever has passed the connection on shares it,
                // and has it wait for nothing.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.socket.wait(true, false, None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
