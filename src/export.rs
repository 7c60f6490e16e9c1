//! An export: one disk, its gate, its dirty map, and the connections that use it.
//!
//! Every byte that changes a disk passes through here, whoever sends it: a [`Visit`] is a connection that has come in
//! through one of the doors, and its `write`, `write_zeroes` and `trim` are the only callers of the disk's. The gate
//! decides who may change the disk at this moment:
//!
//! | gate | guest door | migration door |
//! |---|---|---|
//! | [`Gate::Incoming`] | reads; writes refused | refused |
//! | [`Gate::Receiving`] | reads; writes refused | writes |
//! | [`Gate::Sealed`] | reads; writes refused | refused |
//! | [`Gate::Serving`] | everything | refused |
//! | [`Gate::Quiesced`] | reads and flushes; writes wait | refused |
//! | [`Gate::Closed`] | refused, but for flush | refused |
//! | [`Gate::Fenced`] | refused, but for flush, which always succeeds | refused |
//!
//! # The life of a guest write (D2, D3)
//!
//! `admit` takes the gate's lock, looks at the gate and counts the write in; the disk is written without any lock; the
//! `Drop` of the admission takes the lock again, marks the dirty map *if one is armed now*, and counts the write out.
//! Only then does the server reply. The mark is in a `Drop` because a write that failed half-way has changed the disk
//! too.
//!
//! In synchronous mode a write that succeeded comes back with an [`Owed`], and is answered when
//! [`Visit::wait_for_copy`] returns (D7; `dirty/waiters.rs`). It is counted out before that: a drain does not wait for
//! the mirror.
//!
//! Because a write looks for the map after it has changed the disk, and under the lock under which [`Export::arm`]
//! puts the map there, a write that is not marked was on the disk before the map was armed, and the bulk pass, which
//! asks for extents later, sees it. `arm` drains the gate once all the same (D1): the rule then holds whatever becomes
//! of the order in `Drop`.
//!
//! # Connections that have hung up (D11)
//!
//! A VMM that reconnects sends again what was not answered. If its old connection's last write were still sitting in a
//! socket buffer and were served *after* the new connection's requests, it would put old bytes over newer ones. So a
//! new connection of an export first ends those that have hung up, waits until what they had admitted is finished, and
//! only then is served; and a write is admitted only if its connection still lives.

mod write_back;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::dirty::{DirtyMap, Owed};
use crate::disk::Disk;
use crate::limits::{DRAIN_MAX, GATE_LOOK, UNSYNCED_MAX};
use crate::socket::Socket;
use write_back::Unsynced;

/// Who may change the disk now. See the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// This host does not own the disk and receives nothing.
    Incoming,
    /// A migration writes; the guest does not yet.
    Receiving,
    /// Everything has been received; nobody writes until ownership is settled.
    Sealed,
    /// This host owns the disk and the guest uses it.
    Serving,
    /// This host owns the disk; guest writes wait.
    Quiesced,
    /// Another host owns the disk: refuses for good.
    Fenced,
    /// Who owns the disk is not known from here; it may turn out to be this host.
    Closed,
}

impl Gate {
    /// Whether nobody is served, and who comes is told who owns or whom this host waits for.
    #[must_use]
    pub fn is_shut(self) -> bool {
        matches!(self, Self::Fenced | Self::Closed)
    }
}

/// Through which door a connection came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The guest's VMM, or any client of a plain export.
    Guest,
    /// Another host's mirror.
    Migration,
}

/// Whether a write may wait at a closed gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Come back at once with [`Fault::WouldWait`].
    Now,
    /// Wait until the gate opens, the export is fenced, or the connection has gone.
    Wait,
}

/// Why a request was not done.
#[derive(Debug)]
pub enum Fault {
    /// The gate is closed for the moment, and the caller would not wait.
    WouldWait,
    /// The connection has hung up or was ended: nobody is left to be answered.
    Gone,
    /// This host does not own the disk (yet), or the export is read-only: `EPERM`.
    NotPermitted,
    /// Another host owns the disk, or may: `ESHUTDOWN`.
    Fenced,
    /// The disk's own error.
    Disk(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// One disk offered under a name.
#[derive(Debug)]
pub struct Export {
    name: String,
    read_only: bool,
    inner: Mutex<Inner>,
    /// Something that somebody waits for has changed: the gate, a count that reached zero, a connection that left.
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    gate: Gate,
    disk: Option<Arc<Disk>>,
    map: Option<Arc<DirtyMap>>,
    /// Requests admitted and not finished, by the generation in which they were admitted: a drain begins another
    /// generation and waits for the old one, so that later requests cannot keep it waiting.
    in_flight: [u64; 2],
    generation: usize,
    /// Somebody drains: whoever else wants to waits for its turn. Two that begin generations in turns would each take
    /// one that the other has begun for one that it has waited for.
    draining: bool,
    /// Threads that wait on `changed`; nobody is woken, and no system call made, when there are none.
    waiting: u32,
    connections: Vec<Arc<Connection>>,
    /// Connections ever let in.
    visits: usize,
    /// What a migration has brought and nobody has synced yet (D13).
    unsynced: Unsynced,
    /// Guest writes refused because this host does not own the disk (M11 wants to know).
    refused_guest_writes: u64,
}

/// One connection as the export knows it.
#[derive(Debug)]
struct Connection {
    /// Connections are numbered in the order in which they came.
    number: usize,
    socket: Arc<Socket>,
    door: Door,
    /// Ended from our side: nothing more of it is admitted.
    dead: AtomicBool,
    /// See [`Visit::ends_when_closed`].
    ends_when_closed: AtomicBool,
}

impl Connection {
    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    fn end(&self) {
        self.dead.store(true, Ordering::Release);
        self.socket.shutdown();
    }
}

impl Export {
    /// An export in the given gate state; without a disk it cannot be opened yet.
    #[must_use]
    pub fn new(name: &str, disk: Option<Arc<Disk>>, read_only: bool, gate: Gate) -> Arc<Self> {
        let inner = Inner {
            gate,
            disk,
            map: None,
            in_flight: [0; 2],
            generation: 0,
            draining: false,
            waiting: 0,
            connections: Vec::new(),
            visits: 0,
            unsynced: Unsynced::default(),
            refused_guest_writes: 0,
        };
        Arc::new(Self { name: name.to_owned(), read_only, inner: Mutex::new(inner), changed: Condvar::new() })
    }

    /// The disk's name, which is the export's name at the guest door.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether writes are refused for good, whoever owns the disk.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The disk behind it, if there is one yet.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<Disk>> {
        self.lock().disk.clone()
    }

    /// Puts a disk behind an export that has none.
    pub fn set_disk(&self, disk: Arc<Disk>) {
        self.lock().disk = Some(disk);
    }

    /// The gate as it stands.
    #[must_use]
    pub fn gate(&self) -> Gate {
        self.lock().gate
    }

    /// Moves the gate; whoever waits there is looked at again. Quiescing is [`quiesce`]'s business.
    pub fn set_gate(&self, gate: Gate) {
        let mut inner = self.lock();
        if inner.gate != gate {
            log::debug!("export {}: gate {:?} becomes {gate:?}", self.name, inner.gate);
            if inner.gate.is_shut() {
                // Whoever was refused then is not let go on when the guest has come back: it has seen errors.
                inner.connections.iter().for_each(|c| c.end());
            }
            if gate == Gate::Closed {
                let ends = |c: &&Arc<Connection>| c.ends_when_closed.load(Ordering::Acquire);
                inner.connections.iter().filter(ends).for_each(|c| c.end());
            }
            inner.gate = gate;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Begins a quiesce; `false` if the guest is not being served.
    fn close(&self) -> bool {
        let mut inner = self.lock();
        if inner.gate == Gate::Serving {
            inner.gate = Gate::Quiesced;
        }
        inner.gate == Gate::Quiesced
    }

    /// Ends a quiesce, unless the gate has been moved meanwhile.
    fn reopen(&self) {
        let mut inner = self.lock();
        if inner.gate == Gate::Quiesced {
            inner.gate = Gate::Serving;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// How many guest writes were refused because this host does not own the disk.
    #[must_use]
    pub fn refused_guest_writes(&self) -> u64 {
        self.lock().refused_guest_writes
    }

    /// How many connections are open through `door`.
    #[must_use]
    pub fn connections(&self, door: Door) -> usize {
        self.lock().connections.iter().filter(|c| c.door == door).count()
    }

    /// How many connections have ever been let in.
    #[must_use]
    pub fn visits(&self) -> usize {
        self.lock().visits
    }

    /// Begins dirty tracking (D1): the map is in place, then everything that was admitted before is drained. Only after
    /// this returns may the first extent be asked for.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if a request stays in the disk for longer than [`DRAIN_MAX`]; tracking is off then.
    pub fn arm(&self, map: &Arc<DirtyMap>) -> io::Result<()> {
        let mut inner = self.lock();
        inner.map = Some(Arc::clone(map));
        if self.drain(inner, Instant::now() + DRAIN_MAX) {
            Ok(())
        } else {
            self.disarm(map);
            Err(io::Error::from(io::ErrorKind::TimedOut))
        }
    }

    /// Whether somebody waits for something here.
    #[cfg(test)]
    pub(crate) fn is_draining(&self) -> bool {
        self.lock().waiting > 0
    }

    /// Waits until everything that was admitted before is done and marked. `false`: some of it stays in the disk for
    /// longer than [`DRAIN_MAX`].
    #[must_use]
    pub fn drain_admitted(&self) -> bool {
        self.drain(self.lock(), Instant::now() + DRAIN_MAX)
    }

    /// Ends dirty tracking with `map`; another one that was armed since stays.
    pub fn disarm(&self, map: &Arc<DirtyMap>) {
        self.lock().map.take_if(|armed| Arc::ptr_eq(armed, map));
    }

    /// Lets a connection in through `door`. For the guest door this is where rule D11 is kept: see above.
    ///
    /// # Errors
    /// What the client is told: there is no disk yet, or a dead sister's last request does not come to an end.
    pub fn enter(self: &Arc<Self>, door: Door, socket: &Arc<Socket>) -> Result<Visit, &'static str> {
        let mut inner = self.lock();
        let Some(disk) = inner.disk.clone() else { return Err("this disk does not exist yet") };
        if inner.gate.is_shut() {
            return Err("this disk belongs to another host, or may");
        }
        inner.visits += 1;
        let number = inner.visits;
        let connection = Arc::new(Connection {
            number,
            socket: Arc::clone(socket),
            door,
            dead: AtomicBool::new(false),
            ends_when_closed: AtomicBool::new(false),
        });
        inner.connections.push(Arc::clone(&connection));
        let visit = Visit { export: Arc::clone(self), disk, connection };
        if door == Door::Guest {
            inner.connections.iter().filter(|c| c.door == door && c.socket.has_hung_up()).for_each(|c| c.end());
            self.changed.notify_all();
            // Only for those that came before: two that wait here, and have hung up, must not wait for each other.
            let waits_for = |c: &Connection| c.door == door && c.number < number && c.is_dead();
            let (inner, waited) = self.wait_until(inner, Instant::now() + DRAIN_MAX, |inner| {
                visit.is_ended() || !inner.connections.iter().any(|c| waits_for(c))
            });
            drop(inner);
            if !waited {
                return Err("an earlier connection's request is not finished");
            }
            if visit.is_ended() {
                return Err("the connection was ended");
            }
        }
        Ok(visit)
    }

    /// Shuts every connection that came through `door` down, without waiting for what they had admitted.
    pub fn shut_connections(&self, door: Door) {
        self.lock().connections.iter().filter(|c| c.door == door).for_each(|c| c.end());
        self.changed.notify_all();
    }

    /// Ends every connection that came through `door` until now: nothing more of them is admitted, and when this
    /// returns `true` all that was admitted is finished and their threads are gone. `false`: not within [`DRAIN_MAX`].
    #[must_use]
    pub fn end_connections(&self, door: Door) -> bool {
        let inner = self.lock();
        inner.connections.iter().filter(|c| c.door == door).for_each(|c| c.end());
        self.wait_for_the_dead(inner, |c| c.door == door)
    }

    /// Takes the disk away from behind the export: nobody is let in any more, and everybody who is in has gone when
    /// this returns it. `None`: there was no disk, or its last requests do not end.
    pub fn take_disk(&self) -> Option<Arc<Disk>> {
        let mut inner = self.lock();
        let disk = inner.disk.take();
        inner.connections.iter().for_each(|c| c.end());
        if self.wait_for_the_dead(inner, |_| true) { disk } else { None }
    }

    fn wait_for_the_dead<'a>(&'a self, inner: MutexGuard<'a, Inner>, which: impl Fn(&Connection) -> bool) -> bool {
        self.changed.notify_all();
        let gone = |inner: &Inner| !inner.connections.iter().any(|c| which(c) && c.is_dead());
        self.wait_until(inner, Instant::now() + DRAIN_MAX, gone).1
    }

    /// Empties a receiving disk before anything is sent to it: all of it becomes a hole.
    ///
    /// # Errors
    /// The file system cannot, or this is not the moment for it.
    pub fn discard_all(&self) -> io::Result<()> {
        let inner = self.lock();
        match &inner.disk {
            Some(disk) if inner.gate == Gate::Receiving && inner.connections.iter().all(|c| c.door == Door::Guest) => {
                disk.write_zeroes(0, disk.size(), true, true)
            }
            _ => Err(io::Error::other("not receiving, or in use")),
        }
    }

    /// Waits for everything admitted before now. `false` when `deadline` passes first.
    fn drain<'a>(&'a self, inner: MutexGuard<'a, Inner>, deadline: Instant) -> bool {
        let (mut inner, mut drained) = self.wait_until(inner, deadline, |inner| !inner.draining);
        if !drained {
            return false;
        }
        inner.draining = true;
        // An earlier drain that ran into its deadline may have left requests in the other generation: they count too.
        for _ in 0..2 {
            let old = inner.generation;
            inner.generation = 1 - old;
            (inner, drained) = self.wait_until(inner, deadline, |inner| inner.in_flight[old] == 0);
            if !drained {
                break;
            }
        }
        inner.draining = false;
        self.wake(&inner);
        drained
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, mut inner: MutexGuard<'a, Inner>, timeout: Duration) -> MutexGuard<'a, Inner> {
        inner.waiting += 1;
        let (mut inner, _) = self.changed.wait_timeout(inner, timeout).unwrap_or_else(PoisonError::into_inner);
        inner.waiting -= 1;
        inner
    }

    fn wait_until<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        deadline: Instant,
        done: impl Fn(&Inner) -> bool,
    ) -> (MutexGuard<'a, Inner>, bool) {
        while !done(&inner) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (inner, false);
            }
            inner = self.wait(inner, left);
        }
        (inner, true)
    }

    fn wake(&self, inner: &Inner) {
        if inner.waiting > 0 {
            self.changed.notify_all();
        }
    }
}

/// A connection that has come in through a door and may use the export. Dropped when its last request is finished.
#[derive(Debug)]
pub struct Visit {
    export: Arc<Export>,
    disk: Arc<Disk>,
    connection: Arc<Connection>,
}

impl Visit {
    /// The disk, for reading what needs no gate: its size and extents.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The export it visits.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Through which door it came in.
    #[must_use]
    pub fn door(&self) -> Door {
        self.connection.door
    }

    /// The connection's socket.
    #[must_use]
    pub fn socket(&self) -> &Arc<Socket> {
        &self.connection.socket
    }

    /// Whether the connection was ended from our side.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.connection.is_dead()
    }

    /// Where nobody knows who owns, this connection is ended, and its client not refused: it keeps what was not
    /// answered, and sends it again over another connection.
    pub fn ends_when_closed(&self) {
        let inner = self.export.lock();
        self.connection.ends_when_closed.store(true, Ordering::Release);
        if inner.gate == Gate::Closed {
            self.connection.end();
        }
    }

    /// Whether the export still answers reads and the like.
    ///
    /// # Errors
    /// [`Fault::Fenced`] if not, [`Fault::Gone`] if the disk is not the export's any more.
    pub fn may_read(&self) -> Result<(), Fault> {
        let inner = self.export.lock();
        self.is_current(&inner)?;
        if inner.gate.is_shut() { Err(Fault::Fenced) } else { Ok(()) }
    }

    /// Whether the disk that this connection was let in for is still the export's.
    fn is_current(&self, inner: &Inner) -> Result<(), Fault> {
        let current = inner.disk.as_ref().is_some_and(|disk| Arc::ptr_eq(disk, &self.disk));
        if current { Ok(()) } else { Err(Fault::Gone) }
    }

    /// Reads exactly `buffer.len()` bytes at `offset`, waiting for the device if need be.
    ///
    /// # Errors
    /// [`Fault::Fenced`] or the disk's error.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Fault> {
        self.may_read()?;
        Ok(self.disk.read(buffer, offset)?)
    }

    /// Puts the pages of up to `length` bytes at `offset` into a pipe; returns how many bytes it had room for.
    ///
    /// # Errors
    /// As [`Visit::read`], and whatever says that this cannot be done; the pipe may hold something then.
    pub fn fill_pipe(&self, pipe: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize, Fault> {
        self.may_read()?;
        Ok(self.disk.fill_pipe(pipe, offset, length)?)
    }

    /// Writes `bytes` at `offset`, and marks them. With `durable` they are on stable storage afterwards.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn write(&self, patience: Patience, offset: u64, bytes: &[u8], durable: bool) -> Result<Option<Owed>, Fault> {
        let admission = self.admit(patience, offset, bytes.len() as u64)?;
        self.disk.write(bytes, offset, durable)?;
        Ok(admission.done())
    }

    /// Makes a range read as zero, and marks it. `may_punch` and `fast` as [`Disk::write_zeroes`].
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        may_punch: bool,
        fast: bool,
        durable: bool,
    ) -> Result<Option<Owed>, Fault> {
        let admission = self.admit(Patience::Wait, offset, length)?;
        self.disk.write_zeroes(offset, length, may_punch, fast)?;
        if durable {
            self.disk.flush()?;
        }
        Ok(admission.done())
    }

    /// Gives the room of a range back, and marks it.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn trim(&self, offset: u64, length: u64, durable: bool) -> Result<Option<Owed>, Fault> {
        let admission = self.admit(Patience::Wait, offset, length)?;
        self.disk.trim(offset, length)?;
        if durable {
            self.disk.flush()?;
        }
        Ok(admission.done())
    }

    /// Waits until a write may be answered (D7), or until there is nobody to be answered: whoever reconnects waits for
    /// this connection's end (D11).
    pub fn wait_for_copy(&self, mut owed: Owed) {
        while !self.is_ended() && !self.connection.socket.has_hung_up() && !owed.wait(GATE_LOOK) {}
    }

    /// Makes all finished writes durable (D13). A fenced export says in any case that it is done: a VMM that cannot
    /// flush cannot quit (D6).
    ///
    /// # Errors
    /// The disk's error, and for good after the first (D9).
    pub fn flush(&self) -> Result<(), Fault> {
        if self.export.read_only {
            return Ok(());
        }
        let synced = self.disk.flush();
        if self.export.gate() == Gate::Fenced { Ok(()) } else { Ok(synced?) }
    }

    /// Passes the gate with a request that will change `length` bytes at `offset`.
    pub(crate) fn admit(&self, patience: Patience, offset: u64, length: u64) -> Result<Admission<'_>, Fault> {
        let export = &*self.export;
        if export.read_only {
            return Err(Fault::NotPermitted);
        }
        let door = self.connection.door;
        // D11: between reading a request and admitting it.
        if door == Door::Guest && self.connection.socket.has_hung_up() {
            return Err(Fault::Gone);
        }
        let mut inner = export.lock();
        loop {
            self.is_current(&inner)?;
            let must_wait = match (inner.gate, door) {
                (Gate::Fenced | Gate::Closed, _) => return Err(Fault::Fenced),
                (Gate::Serving, Door::Guest) => false,
                (Gate::Receiving, Door::Migration) if self.disk.is_poisoned() => {
                    return Err(Fault::Disk(io::Error::other("an earlier sync failed")));
                }
                (Gate::Receiving, Door::Migration) => inner.unsynced.bytes() >= UNSYNCED_MAX,
                (Gate::Quiesced, Door::Guest) => true,
                (Gate::Incoming | Gate::Receiving | Gate::Sealed, Door::Guest) => {
                    inner.refused_guest_writes += 1;
                    return Err(Fault::NotPermitted);
                }
                (_, Door::Migration) => return Err(Fault::Fenced),
            };
            // Whoever ends a connection does so under the lock that is held here: what is admitted now, it waits for.
            if self.is_ended() {
                return Err(Fault::Gone);
            }
            if !must_wait {
                break;
            }
            if patience == Patience::Now {
                return Err(Fault::WouldWait);
            }
            inner = export.wait(inner, GATE_LOOK);
            if self.connection.socket.has_hung_up() {
                return Err(Fault::Gone);
            }
        }
        let generation = inner.generation;
        inner.in_flight[generation] += 1;
        Ok(Admission { visit: self, offset, length, generation, over: false })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut inner = self.export.lock();
        inner.connections.retain(|c| !Arc::ptr_eq(c, &self.connection));
        self.export.wake(&inner);
    }
}

/// A request that has passed the gate. Its end marks the map and counts it out (D2, D3).
pub(crate) struct Admission<'a> {
    visit: &'a Visit,
    offset: u64,
    length: u64,
    generation: usize,
    /// Marked and counted out.
    over: bool,
}

impl Admission<'_> {
    /// The request has succeeded; what its answer waits for, if anything (D7).
    fn done(mut self) -> Option<Owed> {
        self.end(true)
    }

    fn end(&mut self, succeeded: bool) -> Option<Owed> {
        let mut owed = None;
        let export = &*self.visit.export;
        self.over = true;
        let mut inner = export.lock();
        if let Some(map) = &inner.map {
            if succeeded {
                owed = map.mark_and_owe(self.offset, self.length);
            } else {
                map.mark(self.offset, self.length);
            }
        }
        inner.in_flight[self.generation] -= 1;
        let drained = inner.in_flight[self.generation] == 0;
        let mut write_back_due = false;
        if self.visit.connection.door == Door::Migration {
            write_back_due = inner.unsynced.add(self.offset, self.length);
        }
        if drained || write_back_due {
            export.wake(&inner);
        }
        owed
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if !self.over {
            // A failed write has changed the disk too, and never waits for anybody.
            drop(self.end(false));
        }
    }
}

/// All of a guest's disks at rest: guest writes wait at the gates and none is in flight. The final pass cannot be begun
/// without this, and exactly one of its ends happens: [`Quiesced::fence`], or the gates open again when it is dropped.
#[derive(Debug)]
#[must_use = "dropping it opens the gates"]
pub struct Quiesced {
    exports: Vec<Arc<Export>>,
    since: Instant,
}

/// Closes the gates of `exports` to guest writes and waits until those in flight are finished (D6). The mirror runs on
/// meanwhile.
///
/// # Errors
/// The name of the disk whose requests did not end before `deadline`; all gates are open again then.
pub fn quiesce(exports: &[Arc<Export>], deadline: Instant) -> Result<Quiesced, String> {
    let mut quiesced = Quiesced { exports: Vec::new(), since: Instant::now() };
    for export in exports {
        if !export.close() {
            return Err(export.name.clone());
        }
        quiesced.exports.push(Arc::clone(export));
    }
    for export in exports {
        if !export.drain(export.lock(), deadline) {
            return Err(export.name.clone());
        }
    }
    Ok(quiesced)
}

impl Quiesced {
    /// Whether every gate is still as it was left.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.exports.iter().all(|export| export.gate() == Gate::Quiesced)
    }

    /// When the first gate closed.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// This host has given the disks away: the gates never open again, and whoever waits there is refused.
    pub fn fence(mut self) {
        for export in self.exports.drain(..) {
            export.set_gate(Gate::Fenced);
        }
    }
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        for export in &self.exports {
            export.reopen();
        }
    }
}

#[cfg(test)]
mod tests;
