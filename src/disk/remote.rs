//! A disk that is an export of somebody's NBD server: behind it may be a qcow2 image, or whatever else is not raw.
//!
//! A [`Remote`] has a small pool of connections; a request takes one, and gives it back when it is answered. So several
//! requests are in flight at once where the server says that a flush on one connection covers the others, and one after
//! the other where it does not. A server that takes fewer connections than that keeps those it took busy. `disk.rs`
//! alone uses this file.
//!
//! **A connection that is lost.** A server that went may have taken with it what it had answered and not yet flushed,
//! and whether a write without an answer will be done nobody knows; sending it again could undo what came after it. So
//! a write whose connection is lost is an I/O error, and from the moment at which a connection is lost while anything
//! is written and not flushed, every flush fails for good (D9). A read is asked again, once, over a new connection: it
//! changes nothing. With nothing unflushed a restart of the server goes unnoticed.
//!
//! **No lock.** NBD has none. Nobody else may write to the export; that is the operator's care, and `serve` says so.

use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use super::{Access, Depths, Extent, OpenError};
use crate::error::reason;
use crate::limits::{
    BACKEND_CONNECTIONS_MAX, BACKEND_MORE_TIMEOUT, BACKEND_STATUS, CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT,
    LANE_SILENCE_MAX, SECTOR,
};
pub use crate::nbd::client::ExportInfo;
use crate::nbd::client::{Client, Lost, RequestError, Wants};
use crate::nbd::wire;
use crate::uri::NbdUri;

/// What a disk wants of its server.
const WANTS: Wants<'static> = Wants { contexts: &[wire::BASE_ALLOCATION, wire::ALLOCATION_DEPTH], ..Wants::READING };
/// The place of the depth among the contexts.
const DEPTH: usize = 1;

/// An open export of a server.
#[derive(Debug)]
pub(super) struct Remote {
    uri: NbdUri,
    info: ExportInfo,
    pool: Mutex<Pool>,
    /// Connections opened since the first one, each counted before anybody has it.
    dialled: AtomicU64,
    /// A connection has been given back, or is gone.
    freed: Condvar,
    /// Changes that begin or end within a minimum block of the server read what is around them first: alone.
    odd: RwLock<()>,
    flushing: Mutex<()>,
    /// Changes begun, changes that have ended, and how many of them the last flush covers.
    begun: AtomicU64,
    ended: AtomicU64,
    flushed: AtomicU64,
    /// A connection was lost with something unflushed, or a flush has failed: nothing is durable any more (D9).
    poisoned: AtomicBool,
}

#[derive(Debug)]
struct Pool {
    idle: Vec<Connection>,
    /// Idle, at work, or being opened.
    open: usize,
    /// Those of them that are open, by number: the first is the oldest.
    numbers: heapless::Vec<u64, BACKEND_CONNECTIONS_MAX>,
    /// How many there may be: what the server says, or what it took when it did not take one more. As many again only
    /// when none is left: to try it costs a request the time.
    most: usize,
    /// Somebody waits for the oldest one.
    flushing: bool,
    /// How often nobody could be reached, and why the last time.
    failures: (u64, String),
}

/// One connection, and its number: those that were opened later have higher ones.
#[derive(Debug)]
struct Connection {
    number: u64,
    client: Client,
}

/// Which connection a request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Any,
    /// A flush: behind a newer one there may be another server already, which has nothing to flush, while nobody has
    /// noticed that the one with the writes is gone. The oldest one was there before they were.
    Oldest,
}

impl Remote {
    /// Opens an export and asks what it can do.
    pub(super) fn open(uri: &NbdUri, access: Access) -> std::result::Result<Self, OpenError> {
        let mut client = dial(uri, HANDSHAKE_TIMEOUT).map_err(|error| OpenError::Server(reason(&error)))?;
        let info = *client.info();
        let lacks = |what: &str| OpenError::Server(format!("the server {what}"));
        if access != Access::ReadOnly && info.has(wire::FLAG_READ_ONLY) {
            return Err(lacks("offers it read-only"));
        }
        if access != Access::ReadOnly && !info.has(wire::FLAG_SEND_FLUSH) {
            return Err(lacks("cannot make anything durable: it does not offer FLUSH"));
        }
        if info.size == 0 || !info.size.is_multiple_of(SECTOR) {
            return Err(OpenError::OddSize(info.size));
        }
        if access != Access::ReadOnly {
            // What a process before this one has left unflushed would be lost unnoticed with the server (D9): nobody
            // here counts it.
            client.flush().map_err(|error| lacks(&format!("cannot make durable what it holds: {}", told(&error))))?;
        }
        Ok(Self {
            uri: uri.clone(),
            info,
            pool: Mutex::new(Pool {
                idle: vec![Connection { number: 0, client }],
                open: 1,
                numbers: [0].into_iter().collect(),
                most: info.connections(BACKEND_CONNECTIONS_MAX),
                flushing: false,
                failures: (0, String::new()),
            }),
            dialled: AtomicU64::new(0),
            freed: Condvar::new(),
            odd: RwLock::new(()),
            flushing: Mutex::new(()),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.info.size
    }

    /// What the server says of it.
    pub(super) fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// The export, by its name.
    pub(super) fn uri(&self) -> &NbdUri {
        &self.uri
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.ask(&mut |client| client.read_exact(offset, buffer))
    }

    /// The extent at `offset`, at most up to `end` and one question long.
    pub(super) fn extent(&self, offset: u64, end: u64) -> Result<Extent> {
        let mut extent = Extent { offset, length: 0, hole: false };
        let length = (end - offset).min(BACKEND_STATUS);
        self.ask(&mut |client| {
            (extent.length, extent.hole) = (0, false);
            let mut over = false;
            client.allocation(offset, length, &mut |length, flags| {
                let hole = flags & u64::from(wire::STATE_ZERO) != 0;
                if extent.length == 0 {
                    extent.hole = hole;
                }
                over |= hole != extent.hole;
                if !over {
                    extent.length += length;
                }
            })
        })?;
        Ok(extent)
    }

    /// Calls `each(offset, length, depth)` for what makes up the range up to `end`, in order; see [`Depths`]. Where a
    /// connection was lost in the middle, some of it is told twice.
    pub(super) fn depths(&self, offset: u64, end: u64, each: &mut dyn FnMut(u64, u64, u64)) -> Result<Depths> {
        let before = self.dialled.load(Ordering::Acquire);
        let mut at = offset;
        while at < end {
            let length = (end - at).min(BACKEND_STATUS);
            let mut tells = false;
            self.ask(&mut |client| {
                tells = client.info().contexts[DEPTH].is_some();
                if !tells {
                    return Ok(());
                }
                client.block_status(at, length, &mut |extent| {
                    if extent.context == DEPTH {
                        each(extent.offset, extent.length, extent.flags);
                    }
                })
            })?;
            if !tells {
                return Ok(Depths::Unknown);
            }
            at += length;
        }
        let same = self.dialled.load(Ordering::Acquire) == before;
        Ok(if same { Depths::Told } else { Depths::Interrupted })
    }

    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.change(offset, bytes.len() as u64, &mut |client| client.write_all(offset, bytes))
    }

    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_punch: bool) -> Result<()> {
        self.change(offset, length, &mut |client| client.write_zeroes(offset, length, may_punch))
    }

    pub(super) fn trim(&self, offset: u64, length: u64) -> Result<()> {
        match self.change(offset, length, &mut |client| client.trim(offset, length)) {
            // That it cannot is no error.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    /// Makes durable what was answered before. One at a time: of two at once one could take the error (D9).
    pub(super) fn flush(&self) -> Result<()> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_poisoned() {
            return Err(lost_unflushed());
        }
        let ended = self.ended.load(Ordering::Acquire);
        let begun = self.begun.load(Ordering::Acquire);
        let mut connection = self.take(Which::Oldest)?;
        let done = connection.client.flush();
        if done.is_err() {
            self.poison();
        }
        self.give_back(connection, &done);
        done.map_err(|error| told(&error))?;
        // Where none was left, this may be another server than the one that had what was to be flushed: whoever finds
        // that a connection is gone, here in `take` or beside, says so before it dials.
        if self.is_poisoned() {
            return Err(lost_unflushed());
        }
        // What was under way is not covered.
        if begun == ended {
            self.flushed.fetch_max(begun, Ordering::AcqRel);
        }
        Ok(())
    }

    /// A question that changes nothing: asked again, once, where the connection is lost.
    fn ask(&self, question: &mut dyn FnMut(&mut Client) -> std::result::Result<(), RequestError>) -> Result<()> {
        let mut again = true;
        loop {
            let mut connection = self.take(Which::Any)?;
            let done = question(&mut connection.client);
            self.give_back(connection, &done);
            if !matches!(done, Err(RequestError::Lost(_))) || !std::mem::take(&mut again) {
                return done.map_err(|error| told(&error));
            }
        }
    }

    fn change(
        &self,
        offset: u64,
        length: u64,
        change: &mut dyn FnMut(&mut Client) -> std::result::Result<(), RequestError>,
    ) -> Result<()> {
        let block = u64::from(self.info.minimum_block);
        let whole = offset.is_multiple_of(block) && length.is_multiple_of(block);
        let (_shared, _alone) = if whole {
            (Some(self.odd.read().unwrap_or_else(PoisonError::into_inner)), None)
        } else {
            (None, Some(self.odd.write().unwrap_or_else(PoisonError::into_inner)))
        };
        let mut connection = self.take(Which::Any)?;
        self.begun.fetch_add(1, Ordering::AcqRel);
        let done = change(&mut connection.client);
        // Before it has ended: or the flush of another thread could cover it.
        self.give_back(connection, &done);
        self.ended.fetch_add(1, Ordering::AcqRel);
        done.map_err(|error| told(&error))
    }

    /// A connection that nobody uses: an idle one, a new one while there may be more, or the next that is given back.
    /// Everybody who has one is bounded by the silence that a client bears, and whoever waits while nobody can be
    /// reached is told with the one who tried.
    fn take(&self, which: Which) -> Result<Connection> {
        let mut pool = self.lock();
        let failures = pool.failures.0;
        loop {
            if pool.failures.0 != failures {
                return Err(Error::other(pool.failures.1.clone()));
            }
            while let Some(connection) = pool.pop(which) {
                if !connection.client.has_hung_up() {
                    return Ok(connection);
                }
                self.forget(&mut pool, connection.number);
            }
            let first = pool.open == 0;
            // The first one is waited for before there are more.
            if !first && (which == Which::Oldest || pool.numbers.is_empty() || pool.open >= pool.most) {
                pool.flushing |= which == Which::Oldest;
                pool = self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // A server may take fewer than it says, and leave the others waiting: that is no reason to wait for long.
            let patience = if first { HANDSHAKE_TIMEOUT } else { BACKEND_MORE_TIMEOUT };
            pool.open += 1;
            drop(pool);
            let dialled = self.dial_again(patience);
            pool = self.lock();
            match dialled {
                Ok(connection) => {
                    // There is room for each that is open.
                    let _ = pool.numbers.push(connection.number);
                    pool.numbers.sort_unstable();
                    drop(pool);
                    // Who waited for the first one may open more.
                    self.freed.notify_all();
                    return Ok(connection);
                }
                Err(error) => {
                    pool.open -= 1;
                    self.freed.notify_all();
                    if pool.open == 0 {
                        pool.most = self.info.connections(BACKEND_CONNECTIONS_MAX);
                        pool.failures = (pool.failures.0 + 1, error.to_string());
                        return Err(error);
                    }
                    log::warn!("{}: {}; {} connections must do", self.uri, reason(&error), pool.open);
                    pool.most = pool.open;
                }
            }
        }
    }

    /// The end of a request, as far as it concerns its connection.
    fn give_back<T>(&self, connection: Connection, done: &std::result::Result<T, RequestError>) {
        let gone = match done {
            Err(RequestError::Lost(_)) => "the connection is lost",
            // Who says so wants to hear a goodbye, which dropping it is.
            Err(RequestError::Server(_, error)) if error.errno == wire::ESHUTDOWN => "the server shuts down",
            _ => "",
        };
        let mut pool = self.lock();
        let mut all = std::mem::take(&mut pool.flushing);
        if gone.is_empty() {
            pool.idle.push(connection);
        } else {
            self.forget(&mut pool, connection.number);
            all |= pool.open == 0;
            log::warn!("{}: {gone}", self.uri);
        }
        drop(pool);
        if all {
            self.freed.notify_all();
        } else {
            self.freed.notify_one();
        }
    }

    /// A connection is gone.
    fn forget(&self, pool: &mut Pool, number: u64) {
        pool.open -= 1;
        pool.numbers.retain(|other| *other != number);
        if pool.open == 0 {
            pool.most = self.info.connections(BACKEND_CONNECTIONS_MAX);
        }
        self.lost();
    }

    /// A connection is gone: with it perhaps what the server had not made durable.
    fn lost(&self) {
        if self.begun.load(Ordering::Acquire) != self.flushed.load(Ordering::Acquire) && !self.is_poisoned() {
            log::error!("{}: the server went with writes that were not flushed: they may be lost", self.uri);
            self.poison();
        }
    }

    fn dial_again(&self, patience: Duration) -> Result<Connection> {
        let client = dial(&self.uri, patience)?;
        let number = self.dialled.fetch_add(1, Ordering::AcqRel) + 1;
        let (is, was) = (client.info(), &self.info);
        let same = is.size == was.size
            && is.transmission_flags == was.transmission_flags
            && is.minimum_block == was.minimum_block
            && is.maximum_payload == was.maximum_payload;
        if same {
            Ok(Connection { number, client })
        } else {
            Err(Error::other("the server offers another export than before"))
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// An idle connection.
    fn pop(&mut self, which: Which) -> Option<Connection> {
        let oldest = self.numbers.first().copied();
        match which {
            Which::Any => self.idle.pop(),
            Which::Oldest => {
                let place = self.idle.iter().position(|connection| Some(connection.number) == oldest)?;
                Some(self.idle.swap_remove(place))
            }
        }
    }
}

fn dial(uri: &NbdUri, patience: Duration) -> Result<Client> {
    let socket = Arc::new(uri.address.connect(CONNECT_TIMEOUT.min(patience))?);
    let mut client = Client::connect_within(Arc::clone(&socket), &uri.export, WANTS, patience).map_err(Error::other)?;
    socket.set_keep_alive(LANE_SILENCE_MAX / 2);
    client.set_silence_max(LANE_SILENCE_MAX);
    Ok(client)
}

fn lost_unflushed() -> Error {
    Error::other("an earlier sync failed, or the server went with what was not flushed")
}

/// The server's errno, which are the numbers of Linux; a dead connection is an I/O error.
fn told(error: &RequestError) -> Error {
    match error {
        RequestError::Server(_, error) => Error::from_raw_os_error(i32::try_from(error.errno).unwrap_or_default()),
        RequestError::Lost(Lost { operation, cause }) => Error::other(format!("{operation}: {cause}")),
        RequestError::Beyond(..) => Error::from(ErrorKind::InvalidInput),
    }
}
