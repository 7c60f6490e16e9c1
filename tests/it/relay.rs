//! A TCP relay between two hosts that behaves as bad networks do.
//!
//! Each connection has two queues, one for each direction, filled and emptied by threads of their own. What happens to
//! the bytes is decided by what the test says meanwhile: they pass, wait, stop without a sign, or are lost with their
//! connection. The relay knows the phase protocol just enough to cut a connection before or after a certain message.

use std::collections::VecDeque;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use blockferry::migrate::wire::{HELLO_LENGTH, MAGIC};
use blockferry::nbd::wire::OPT_BLOCKFERRY_PHASES;

use crate::harness::DEADLINE;

/// Bytes of one direction that wait in the relay as a rule.
const QUEUE: usize = 256 * 1024;

/// Messages of the phase protocol by number, which never changes.
pub(crate) mod message {
    pub(crate) const PREPARE: u8 = 0;
    pub(crate) const PREPARED: u8 = 1;
    pub(crate) const FENCE: u8 = 3;
    pub(crate) const FENCED: u8 = 4;
    pub(crate) const SEAL: u8 = 5;
    pub(crate) const SEALED: u8 = 6;
    pub(crate) const GO: u8 = 7;
    pub(crate) const RUNNING: u8 = 8;
    pub(crate) const ABORT: u8 = 9;
    pub(crate) const UNSEALED: u8 = 10;
    pub(crate) const STREAM: u8 = 19;
    pub(crate) const STREAMING: u8 = 20;
    pub(crate) const STATE: u8 = 21;
    pub(crate) const STATE_READY: u8 = 22;
    pub(crate) const STATE_QUESTION: u8 = 23;
    pub(crate) const STATE_IS: u8 = 24;
    /// No message: the first bytes of a data connection.
    pub(crate) const DATA: u8 = u8::MAX;
}

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its first bytes have not come yet.
    Unknown,
    /// The phase protocol.
    Phases,
    /// Requests to a disk.
    Data,
    /// A guest's state, and nothing else any more.
    State,
}

/// From where to where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From who has dialled.
    Up,
    /// To who has dialled.
    Down,
}

/// What happens to the link when a trap springs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Every connection is cut.
    Cut,
    /// The same, and nobody gets through afterwards.
    CutAndRefuse,
    /// The same, and who dials is accepted and hears nothing.
    CutAndSilence,
    /// Every open connection falls silent; new ones pass.
    Stall,
    /// Those of one kind do.
    StallKind(Kind),
}

/// Waits for a certain message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trap {
    /// The message's number.
    pub(crate) message: u8,
    /// Whether it still passes.
    pub(crate) passes: bool,
    /// What happens then.
    pub(crate) then: Then,
}

/// What the thread does that carries a certain message, once: nothing passes on that connection meanwhile.
struct Hook {
    message: u8,
    /// The message passes first.
    passes: bool,
    act: Box<dyn FnOnce() + Send>,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").field("message", &self.message).field("passes", &self.passes).finish_non_exhaustive()
    }
}

/// The relay. It and all its connections end with the test.
#[derive(Debug)]
pub(crate) struct Relay {
    shared: Arc<Shared>,
    /// Where to dial instead of the real door.
    pub(crate) address: String,
}

#[derive(Debug)]
struct Shared {
    target: Mutex<SocketAddr>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    refuse: bool,
    /// What the destination does not say that it can do.
    hidden: u64,
    /// Connections that are let through, from the first on.
    most: Option<usize>,
    silent: bool,
    bytes_a_second: Option<u64>,
    delay: Duration,
    trap: Option<Trap>,
    hooks: Vec<Hook>,
    sprung: usize,
    carried: u64,
    connections: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    kind: Kind,
    source: TcpStream,
    destination: TcpStream,
    up: Queue,
    down: Queue,
    /// Takes everything in and lets nothing out.
    hoards: bool,
    silent: bool,
    /// Added to the relay's own delay.
    delay: Duration,
    dead: bool,
    /// Directions in which all has passed.
    ended: u8,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    ended: bool,
}

impl Connection {
    fn queue(&mut self, way: Way) -> &mut Queue {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }

    fn cut(&mut self) {
        self.dead = true;
        let _ = self.source.shutdown(Shutdown::Both);
        let _ = self.destination.shutdown(Shutdown::Both);
    }
}

impl Relay {
    /// A relay to `tcp://127.0.0.1:PORT`.
    #[must_use]
    pub(crate) fn to(target: &str) -> Self {
        let target = Mutex::new(parse(target));
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let address = format!("tcp://{}", listener.local_addr().expect("its address"));
        let shared = Arc::new(Shared { target, state: Mutex::default(), changed: Condvar::new() });
        let acceptor = Arc::clone(&shared);
        thread::spawn(move || accept(&acceptor, &listener));
        Self { shared, address }
    }

    /// New connections go elsewhere.
    pub(crate) fn lead_to(&self, target: &str) {
        *self.shared.target.lock().expect("no panic") = parse(target);
    }

    /// Everything passes again; connections that are cut stay so.
    pub(crate) fn heal(&self) {
        self.change(|state| {
            (state.refuse, state.silent, state.bytes_a_second, state.delay) = (false, false, None, Duration::ZERO);
            state.connections.iter_mut().for_each(|c| (c.hoards, c.silent, c.delay) = (false, false, Duration::ZERO));
        });
    }

    /// Cuts all connections; what waits in the relay is lost.
    pub(crate) fn cut_all(&self) {
        self.change(|state| state.connections.iter_mut().for_each(Connection::cut));
    }

    /// Cuts one living connection of `kind`, the one that `choice` picks. `false`: there is none.
    pub(crate) fn cut_one(&self, kind: Option<Kind>, choice: u64) -> bool {
        self.change(|state| {
            let alive = |c: &&mut Connection| !c.dead && kind.is_none_or(|kind| kind == c.kind);
            let mut alive: Vec<_> = state.connections.iter_mut().filter(alive).collect();
            let Some(place) = choice.checked_rem(alive.len() as u64) else { return false };
            alive[usize::try_from(place).expect("small")].cut();
            true
        })
    }

    /// Lets nobody new through.
    pub(crate) fn refuse(&self) {
        self.change(|state| state.refuse = true);
    }

    /// Lets so many through, and nobody after them.
    pub(crate) fn refuse_after(&self, most: usize) {
        self.change(|state| state.most = Some(most));
    }

    /// Makes the destination one that has not learnt this yet: bits of its hello's capabilities.
    pub(crate) fn hide(&self, capabilities: u64) {
        self.change(|state| state.hidden = capabilities);
    }

    /// Stops to pass anything, without a sign to either side; connections are still accepted.
    pub(crate) fn fall_silent(&self) {
        self.change(|state| state.silent = true);
    }

    /// Stops to pass anything on the connections of `kind` that are open now.
    pub(crate) fn silence_open(&self, kind: Kind) {
        self.change(|state| state.connections.iter_mut().filter(|c| c.kind == kind).for_each(|c| c.silent = true));
    }

    /// Passes everything again on connections of `kind`.
    pub(crate) fn speak(&self, kind: Kind) {
        self.change(|state| state.connections.iter_mut().filter(|c| c.kind == kind).for_each(|c| c.silent = false));
    }

    /// Bounds what each direction of each connection passes.
    pub(crate) fn throttle(&self, bytes_a_second: u64) {
        self.change(|state| state.bytes_a_second = Some(bytes_a_second));
    }

    /// Everything comes so much later.
    pub(crate) fn delay(&self, time: Duration) {
        self.change(|state| state.delay = time);
    }

    /// The data connections that are open now take in what the source sends, and keep it.
    pub(crate) fn hoard(&self) {
        self.hoard_kind(Kind::Data);
    }

    /// The same for connections of any kind.
    pub(crate) fn hoard_kind(&self, kind: Kind) {
        self.change(|state| state.connections.iter_mut().filter(|c| c.kind == kind).for_each(|c| c.hoards = true));
    }

    /// How many bytes are hoarded.
    #[must_use]
    pub(crate) fn hoarded(&self) -> usize {
        self.lock().connections.iter().filter(|c| c.hoards).map(|c| c.up.bytes).sum()
    }

    /// How many bytes are on their way up on connections that are silent.
    #[must_use]
    pub(crate) fn held_up(&self) -> usize {
        self.lock().connections.iter().filter(|c| c.silent).map(|c| c.up.bytes).sum()
    }

    /// The source loses the connections that hoard; the destination keeps them, and what they hold is still to come.
    pub(crate) fn cut_hoarding_from_source(&self) {
        self.change(|state| {
            for connection in state.connections.iter().filter(|c| c.hoards) {
                let _ = connection.source.shutdown(Shutdown::Both);
            }
        });
    }

    /// What is hoarded is delivered, late.
    pub(crate) fn deliver_late(&self) {
        self.change(|state| state.connections.iter_mut().for_each(|c| c.hoards = false));
    }

    /// Sets a trap; it springs once.
    pub(crate) fn set_trap(&self, trap: Trap) {
        self.change(|state| state.trap = Some(trap));
    }

    /// Calls `act` when the first such message comes, before it passes on or after.
    pub(crate) fn on(&self, message: u8, passes: bool, act: impl FnOnce() + Send + 'static) {
        self.change(|state| state.hooks.push(Hook { message, passes, act: Box::new(act) }));
    }

    /// Takes the hooks away that nothing has come for.
    pub(crate) fn unhook(&self) {
        let left = self.change(|state| std::mem::take(&mut state.hooks));
        drop(left);
    }

    /// One open connection of `kind` falls silent, the one that `choice` picks. `false`: there is none.
    pub(crate) fn silence_one(&self, kind: Kind, choice: u64) -> bool {
        self.change(|state| {
            let mut open: Vec<_> = state.connections.iter_mut().filter(|c| !c.dead && c.kind == kind).collect();
            let Some(place) = choice.checked_rem(open.len() as u64) else { return false };
            open[usize::try_from(place).expect("small")].silent = true;
            true
        })
    }

    /// Waits until a trap has sprung.
    pub(crate) fn until_sprung(&self) {
        self.until("sprung trap", |state| state.sprung > 0);
    }

    /// Waits until so many bytes have passed upward since the start.
    pub(crate) fn until_carried(&self, bytes: u64) {
        self.until("bytes carried", |state| state.carried >= bytes);
    }

    /// Bytes that have passed upward since the start.
    #[must_use]
    pub(crate) fn carried(&self) -> u64 {
        self.lock().carried
    }

    /// Waits until so many connections of `kind` are open.
    pub(crate) fn until_open(&self, kind: Kind, count: usize) {
        self.until("open connections", |state| {
            state.connections.iter().filter(|c| !c.dead && c.kind == kind).count() >= count
        });
    }

    /// How many connections have ever been let through.
    #[must_use]
    pub(crate) fn accepted(&self) -> usize {
        self.lock().connections.len()
    }

    fn until(&self, what: &str, done: impl Fn(&State) -> bool) {
        let (state, timeout) =
            self.shared.changed.wait_timeout_while(self.lock(), DEADLINE, |state| !done(state)).expect("no panic");
        drop(state);
        assert!(!timeout.timed_out(), "no {what} within {DEADLINE:?}");
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.shared.changed.notify_all();
        changed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.closed = true;
        state.connections.iter_mut().for_each(Connection::cut);
        drop(state);
        self.shared.changed.notify_all();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp://"));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).expect("no panic").0
    }
}

fn parse(target: &str) -> SocketAddr {
    target.strip_prefix("tcp://").expect("a TCP address").parse().expect("numbers")
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        let Ok((source, _)) = listener.accept() else { return };
        let mut state = shared.lock();
        if state.closed {
            return;
        }
        if state.refuse || state.most.is_some_and(|most| state.connections.len() >= most) {
            continue;
        }
        let Ok(destination) = TcpStream::connect(*shared.target.lock().expect("no panic")) else { continue };
        let _ = (source.set_nodelay(true), destination.set_nodelay(true));
        let copies = || Some([source.try_clone().ok()?, destination.try_clone().ok()?]);
        let (Some([from, to]), Some([back_to, back_from])) = (copies(), copies()) else { continue };
        let number = state.connections.len();
        state.connections.push(Connection {
            kind: Kind::Unknown,
            source,
            destination,
            up: Queue::default(),
            down: Queue::default(),
            hoards: false,
            silent: false,
            delay: Duration::ZERO,
            dead: false,
            ended: 0,
        });
        drop(state);
        for (way, from, to) in [(Way::Up, from, to), (Way::Down, back_from, back_to)] {
            let (filler, emptier) = (Arc::clone(shared), Arc::clone(shared));
            thread::spawn(move || fill(&filler, number, way, from));
            thread::spawn(move || empty(&emptier, number, way, to));
        }
    }
}

/// Takes bytes in, as far as there is room for them.
fn fill(shared: &Shared, number: usize, way: Way, mut from: TcpStream) {
    let mut buffer = vec![0; QUEUE / 4];
    loop {
        let mut state = shared.lock();
        loop {
            let silent = state.silent;
            let connection = &mut state.connections[number];
            let silent = silent || connection.silent;
            let full = connection.queue(way).bytes >= QUEUE && !(connection.hoards && way == Way::Up);
            if connection.dead || (!silent && !full) {
                break;
            }
            state = shared.wait(state, Duration::from_secs(1));
        }
        drop(state);
        let got = from.read(&mut buffer).unwrap_or(0);
        let mut state = shared.lock();
        let queue = state.connections[number].queue(way);
        queue.pieces.push_back((Instant::now(), buffer[..got].to_vec()));
        queue.bytes += got;
        queue.ended = got == 0;
        drop(state);
        shared.changed.notify_all();
        if got == 0 {
            return;
        }
    }
}

/// Lets bytes out when it is time for them.
fn empty(shared: &Shared, number: usize, way: Way, mut to: TcpStream) {
    let mut reader = PhaseReader::default();
    while let Some(piece) = next_piece(shared, number, way) {
        if piece.is_empty() {
            break;
        }
        let units = reader.split(&piece);
        if way == Way::Up
            && let Some(kind) = reader.kind()
        {
            let before = std::mem::replace(&mut shared.lock().connections[number].kind, kind);
            shared.changed.notify_all();
            if before != kind && kind == Kind::Data {
                act(shared, message::DATA, false);
                act(shared, message::DATA, true);
            }
        }
        for mut unit in units {
            if way == Way::Down {
                hide(&mut unit.bytes, shared.lock().hidden);
            }
            if let Some(message) = unit.message {
                act(shared, message, false);
            }
            let trap = unit.message.and_then(|message| spring(shared, message));
            if trap.is_none_or(|trap| trap.passes) && to.write_all(&unit.bytes).is_err() {
                shared.lock().connections[number].cut();
                return;
            }
            if let Some(message) = unit.message {
                act(shared, message, true);
            }
            if let Some(trap) = trap {
                let mut state = shared.lock();
                state.refuse |= trap.then == Then::CutAndRefuse;
                state.silent |= trap.then == Then::CutAndSilence;
                for connection in &mut state.connections {
                    match trap.then {
                        Then::Stall => connection.silent = true,
                        Then::StallKind(kind) => connection.silent |= connection.kind == kind,
                        Then::Cut | Then::CutAndRefuse | Then::CutAndSilence => connection.cut(),
                    }
                }
                state.sprung += 1;
                let cut = state.connections[number].dead;
                drop(state);
                shared.changed.notify_all();
                if cut {
                    return;
                }
            }
        }
        let mut state = shared.lock();
        state.carried += if way == Way::Up { piece.len() as u64 } else { 0 };
        if let Some(rate) = state.bytes_a_second {
            let end = Instant::now() + Duration::from_secs_f64(piece.len() as f64 / rate as f64);
            while Instant::now() < end && state.bytes_a_second.is_some() && !state.connections[number].dead {
                let left = end.saturating_duration_since(Instant::now());
                state = shared.wait(state, left);
            }
        }
        drop(state);
        shared.changed.notify_all();
    }
    let _ = to.shutdown(Shutdown::Write);
    // Who has left is not there to be cut.
    let mut state = shared.lock();
    let connection = &mut state.connections[number];
    connection.ended += 1;
    connection.dead |= connection.ended == 2;
}

/// Clears bits of the capabilities of a hello, if these bytes hold one.
fn hide(bytes: &mut [u8], hidden: u64) {
    let hello = bytes.windows(MAGIC.len()).position(|window| window == MAGIC).filter(|_| hidden != 0);
    let Some(capabilities) = hello.and_then(|at| bytes.get_mut(at + 16..at + 24)) else { return };
    for (byte, hidden) in capabilities.iter_mut().zip(hidden.to_le_bytes()) {
        *byte &= !hidden;
    }
}

/// The next bytes of a queue, none at its end; `None` if the connection is cut.
fn next_piece(shared: &Shared, number: usize, way: Way) -> Option<Vec<u8>> {
    let mut state = shared.lock();
    loop {
        let (silent, delay) = (state.silent, state.delay);
        let connection = &mut state.connections[number];
        if connection.dead {
            return None;
        }
        let held = silent || connection.silent || (connection.hoards && way == Way::Up);
        let delay = delay + connection.delay;
        let queue = connection.queue(way);
        let mut patience = Duration::from_secs(1);
        if let Some((came, _)) = queue.pieces.front().filter(|_| !held) {
            let left = (*came + delay).saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (_, piece) = queue.pieces.pop_front()?;
                queue.bytes -= piece.len();
                return Some(piece);
            }
            patience = left;
        }
        state = shared.wait(state, patience);
    }
}

/// Does what is to be done about a message.
fn act(shared: &Shared, message: u8, passes: bool) {
    let mut state = shared.lock();
    let (now, later) = std::mem::take(&mut state.hooks)
        .into_iter()
        .partition(|hook: &Hook| hook.message == message && hook.passes == passes);
    state.hooks = later;
    drop(state);
    now.into_iter().for_each(|hook: Hook| (hook.act)());
}

fn spring(shared: &Shared, message: u8) -> Option<Trap> {
    shared.lock().trap.take_if(|trap| trap.message == message)
}

/// Some bytes that travel together; a whole message if they are one.
struct Unit {
    bytes: Vec<u8>,
    message: Option<u8>,
}

/// Finds the messages in one direction of a phase connection.
#[derive(Default)]
struct PhaseReader {
    /// The beginning, until it is known that these are no phases.
    head: Vec<u8>,
    phases: bool,
    data: bool,
    /// Half a message.
    rest: Vec<u8>,
    /// The stream path: everything follows in frames.
    framed: bool,
    /// The guest's state follows: bytes that are nobody's messages.
    raw: bool,
}

impl PhaseReader {
    /// What the connection carries, as far as its beginning tells: the client's flags and the first option.
    fn kind(&self) -> Option<Kind> {
        if self.raw {
            return Some(Kind::State);
        }
        let option = self.head.get(12..16)?;
        Some(if option == OPT_BLOCKFERRY_PHASES.to_be_bytes() { Kind::Phases } else { Kind::Data })
    }

    /// Cuts bytes into what may pass by itself and whole messages. What is held back follows with the next bytes.
    fn split(&mut self, bytes: &[u8]) -> Vec<Unit> {
        let mut units = Vec::new();
        let mut bytes = bytes;
        if self.raw {
            return vec![Unit { bytes: bytes.to_vec(), message: None }];
        }
        if !self.phases {
            if self.data {
                return vec![Unit { bytes: bytes.to_vec(), message: None }];
            }
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let hello = self.head.windows(MAGIC.len()).position(|window| window == MAGIC);
            let Some(end) = hello.map(|at| at + HELLO_LENGTH).filter(|end| *end <= self.head.len()) else {
                self.data = hello.is_none() && self.head.len() > 4096;
                return vec![Unit { bytes: bytes.to_vec(), message: None }];
            };
            self.phases = true;
            let (hello, rest) = bytes.split_at(end - before);
            units.push(Unit { bytes: hello.to_vec(), message: None });
            bytes = rest;
        }
        self.rest.extend_from_slice(bytes);
        while let Some(length) = self.rest.first_chunk::<4>() {
            // The stream path: the kind of a frame stands above its length, and 0 are the phases.
            let (kind, length) = (length[3], [length[0], length[1], length[2], 0]);
            let end = 4 + u32::from_le_bytes(length) as usize;
            if self.rest.len() < end {
                break;
            }
            let message = (kind == 0).then(|| self.rest[4]);
            units.push(Unit { bytes: self.rest.drain(..end).collect(), message });
            self.framed |= matches!(message, Some(message::STREAM | message::STREAMING));
            if matches!(message, Some(message::STATE | message::STATE_READY)) && !self.framed {
                self.raw = true;
                units.push(Unit { bytes: std::mem::take(&mut self.rest), message: None });
                break;
            }
        }
        units
    }
}
