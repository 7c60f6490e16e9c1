//! Disks as `/dev/nbdN` of this host, for VMMs that do not speak NBD: which devices there are, their connections, and
//! what a migration must do with them.
//!
//! The running `serve` makes a pair of sockets, gives one end to the kernel's nbd driver and serves the other with
//! `nbd/server`, as a client of the guest door that needs no handshake. [`Attachments`] is asked by the control door
//! (attach, detach, status) and by `migrate/drive.rs` ([`Attachments::hold`]). It never writes to a device, and never
//! opens one that is free.
//!
//! # The page cache stands between (W1 to W6)
//!
//! A client of the guest door has an answer when we have the write. A VMM on `/dev/nbdN` has it when this host's *page
//! cache* has it, which may be half a minute before we do. The naive hand-over, which quiesces, copies what is dirty in
//! the map, gives and disconnects, loses all of that: the guest has an acknowledged write that is in no map, on no
//! disk, and at the destination not at all. So:
//!
//! - **W1 write out.** Before the gates close, while the guest's writes pass, every attached device is synced; then the
//!   map is waited for once more. It takes as long as the cache is large, so it stands outside of the switchover and
//!   outside of every lock. It has a maximum; past it the switchover is put off and the migration goes on. A guest
//!   that a hook stops has had most of it written out before; what is left must not keep it standing for long.
//! - **W2 prove.** With the gates *closed* every device is synced again. A sync of a cache that holds nothing sends one
//!   FLUSH, which a closed gate serves. A sync of a cache that holds a byte sends a WRITE, which waits at the gate, and
//!   the sync with it. That it ends is therefore the proof that nothing was in the cache at some moment when nothing
//!   could reach the disk any more. That it does not end in time means that somebody still writes: the gates open, the
//!   write arrives and is marked, and the switchover is tried again.
//! - **W3 prove last.** The same once more between SEALED and GIVEN, so that what was written while the destination
//!   sealed is found: the attempt ends, the gates open, the write arrives here, where the guest goes on.
//! - **W4 disconnect after GIVEN, not before.** Disconnecting looks like the better barrier and is none: a device that
//!   somebody has open stays, its size too, and `write` goes on to succeed into the page cache; only a sync tells that
//!   it is lost. A disconnect before GIVEN would therefore protect nothing, and an abort after it would have failed the
//!   guest's requests. So an abort leaves every device as it was, and the disconnect follows the fence.
//! - **W5 still.** Between W3's proof and GIVEN nothing can stop a process that writes into the page cache; only the
//!   VMM can be still. Without a hook that is the caller's part of `switch`, and a migration that would switch by
//!   itself while somebody has a device open is refused. What a VMM that did not keep still wrote in that moment is
//!   found by one more sync after the fence, which fails then (a FLUSH succeeds there, a WRITE does not), and is said:
//!   exit 4. What stands on the device (a mounted file system, a loop device) has a page cache that no sync of the
//!   device reaches and no hook stills: with that nothing moves.
//! - **W6 gone.** A VMM that keeps its device open after the disk was given keeps its old pages too, and the name in
//!   `/sys` with them. Should the guest come back, the next process would take that device for its own, and the kernel
//!   write the old pages over the new disk: PREPARE is refused until the device is gone.
//!
//! | the write enters the page cache | and is |
//! |---|---|
//! | before W1 | written out, marked, copied by a pass |
//! | between W1 and the closing of the gates | waiting at the gate: W2 does not end, the switchover is put off |
//! | between W2 and SEALED | waiting at the gate: W3 does not end, the attempt is aborted |
//! | between W3 and the fence, against the contract | refused by the fence, told by the last sync |
//!
//! At the destination the cache must not hold what was read before the disk was whole: a device is connected only while
//! the gate is [`Gate::Serving`], and a device that is found after a restart is given up if the host has not owned all
//! the time. While nobody knows whether this host owns, the connection is ended, for an error to a write-back is a page
//! that is never written: the kernel sends it again over the next one.
//!
//! # When this process dies
//!
//! The kernel keeps the requests of a device whose connection died ([`NBD_DEAD_MAX`]), and takes a new connection from
//! whoever names the same backend. The name is in `/sys/block/nbdN/backend`, so the memory of what is attached is the
//! kernel's: it survives this process and not the host, exactly as the devices do. What was sent over the dead
//! connection and not answered is sent again ([`NBD_LOOK`]); the writes of the dead process cannot come later than
//! those, because the image's lock is free only when it is gone (D11). A disk on somebody's NBD server has no such
//! lock: there the server's own patience decides, and `docs/operations.md` says what to do.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::error::reason;
use crate::export::{Door, Export, Gate, Visit};
use crate::guest::Guest;
use crate::limits::{
    ATTACHED_LOOK, CONNECTION_STACK, DETACH_FREE_MAX, DETACH_SYNC_MAX, NBD_DEAD_MAX, NBD_LOOK, RETRY_PAUSE, SECTOR,
};
use crate::nbd::handshake::Agreed;
use crate::nbd::server::{self, Goodbye};
use crate::nbd::wire as nbd;
use crate::ownership::{Host, State};
use crate::socket::Socket;
use device::{Sync, User};
use netlink::Netlink;
use wire::Connection;

pub mod device;
mod hold;
mod netlink;
pub mod wire;

pub use device::Device;
pub use hold::{Farewell, Held, Syncs};

/// What of the server's flags the kernel is to know. Not that several connections are possible: it has one (D11).
const KERNEL_FLAGS: u16 = nbd::FLAG_HAS_FLAGS
    | nbd::FLAG_READ_ONLY
    | nbd::FLAG_SEND_FLUSH
    | nbd::FLAG_SEND_FUA
    | nbd::FLAG_SEND_TRIM
    | nbd::FLAG_SEND_WRITE_ZEROES;
/// The kernel speaks no more than simple replies.
const KERNEL_AGREED: Agreed = Agreed { structured: false, extended: false, base_allocation: false };

/// The devices of one guest.
#[derive(Debug, Default)]
pub struct Attachments {
    inner: Mutex<Inner>,
    /// Something has come or gone, or the token is free again.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    attached: Vec<Arc<Attached>>,
    /// Who decides what comes and goes now: one at a time. The lock itself is never held while the kernel is asked.
    token: Option<&'static str>,
    /// The thread that looks after the devices runs.
    watched: bool,
}

/// One disk that is a device.
#[derive(Debug)]
struct Attached {
    device: Device,
    export: Arc<Export>,
    /// The name that the kernel remembers.
    backend: String,
    /// It goes: a connection that ends is not replaced.
    leaving: AtomicBool,
}

impl Attached {
    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }
}

/// Why a device was not attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAttached {
    /// Not yet: this host does not own the disk, or a switchover is under way. It may change by itself.
    Yet,
    /// For good.
    Refused(String),
}

fn refused(cause: impl Into<String>) -> NotAttached {
    NotAttached::Refused(cause.into())
}

/// What `/sys/block/nbdN/backend` says of a device of ours: which state directory of which machine, guest and disk.
fn backend(host: Host, guest: &str, disk: &str) -> String {
    format!("blockferry {host} {guest} {disk}")
}

/// Guest and disk of a device whose backend is a blockferry's.
#[must_use]
pub fn guest_and_disk(backend: &str) -> Option<(&str, &str)> {
    let mut words = backend.split(' ');
    match (words.next(), words.next(), words.next(), words.next(), words.next()) {
        (Some("blockferry"), Some(_), Some(guest), Some(disk), None) => Some((guest, disk)),
        _ => None,
    }
}

/// Why the driver cannot be asked, in words.
fn trouble(error: &std::io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => {
            "the kernel has no nbd driver loaded: modprobe nbd".to_owned()
        }
        Some(Errno::PERM | Errno::ACCESS) => "the process that serves the guest needs CAP_SYS_ADMIN for it".to_owned(),
        Some(Errno::BUSY) => "is in use".to_owned(),
        _ => reason(error),
    }
}

/// The kernel's end, and ours.
fn pair() -> std::io::Result<(OwnedFd, Arc<Socket>)> {
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok((theirs, Arc::new(Socket::new(ours))))
}

impl Attachments {
    /// Makes `disk` the device, if this host owns it now.
    ///
    /// # Errors
    /// Why not, or not yet; nothing has changed.
    pub fn attach(&self, guest: &Arc<Guest>, disk: &str, device: Device) -> Result<(), NotAttached> {
        let found = guest.disk(disk).ok_or_else(|| refused(format!("guest {} has no disk {disk}", guest.name)))?;
        let export = found.export.as_ref().ok_or_else(|| refused(format!("disk {disk} is not served from here")))?;
        // Before waiting for anything: what is wrong with the driver or the device stays wrong.
        let mut netlink = Netlink::open().map_err(|error| refused(format!("{device}: {}", trouble(&error))))?;
        device.check_node().map_err(|cause| refused(format!("{device}: {cause}")))?;
        let Some(token) = self.take("an attach") else { return Err(NotAttached::Yet) };
        if let Some(twin) = self.list().iter().find(|twin| twin.device == device || twin.export.name() == disk) {
            return Err(refused(format!("disk {} is attached as {}", twin.export.name(), twin.device)));
        }
        if let Some((_, twin)) = left_over(guest).iter().find(|(name, _)| name == disk) {
            let user = twin.user().map(|user| format!(", and is in use by {user}")).unwrap_or_default();
            return Err(refused(format!(
                "disk {disk} is {twin} already, which nobody serves{user}: detach --force {twin}"
            )));
        }
        match export.gate() {
            Gate::Serving => {}
            Gate::Fenced => return Err(refused(guest.why_fenced())),
            Gate::Incoming | Gate::Receiving | Gate::Sealed | Gate::Quiesced | Gate::Closed => {
                return Err(NotAttached::Yet);
            }
        }
        let Some(size_bytes) = export.disk().map(|disk| disk.size()) else { return Err(NotAttached::Yet) };
        let system = |error: std::io::Error| refused(format!("{device}: {}", trouble(&error)));
        let (theirs, ours) = pair().map_err(system)?;
        let visit = export.enter(Door::Guest, &ours).map_err(refused)?;
        let attached = Arc::new(Attached {
            device,
            export: Arc::clone(export),
            backend: backend(guest.host, &guest.name, disk),
            leaving: AtomicBool::new(false),
        });
        let flags = server::description(size_bytes, export.is_read_only()).transmission_flags & KERNEL_FLAGS;
        let connection = Connection {
            index: device.index(),
            size_bytes,
            block_bytes: SECTOR,
            flags: flags.into(),
            dead_s: NBD_DEAD_MAX.as_secs(),
            socket: netlink::number(&theirs).map_err(system)?,
            backend: &attached.backend,
        };
        netlink.connect(&connection).map_err(system)?;
        drop(theirs);
        device.set_look(NBD_LOOK.as_millis());
        // From here on the kernel may ask: for the partitions at once.
        if let Err(error) = self.serve(guest, &attached, Some(visit)) {
            let _ = netlink.disconnect(device.index());
            return Err(system(error));
        }
        drop(token);
        log::info!("attach: disk {disk} is {device}");
        Ok(())
    }

    /// Writes the device's page cache back, disconnects it, and waits until the kernel has it free.
    ///
    /// # Errors
    /// Why not. Before the disconnect nothing has changed; the text says if it came to that.
    pub fn detach(&self, guest: &Guest, device: Device) -> Result<(), String> {
        let token = self.take("a detach").ok_or_else(|| format!("{} is under way", self.token_text()))?;
        let list = self.list();
        let attached = list.iter().find(|attached| attached.device == device);
        let attached = attached.ok_or_else(|| format!("is not attached to a disk of guest {}", guest.name))?;
        if let Some(user) = device.user() {
            return Err(format!("is in use by {user}"));
        }
        let sync = device.sync().map_err(|error| reason(&error))?;
        sync.wait(Instant::now() + DETACH_SYNC_MAX).map_err(|error| match error.kind() {
            std::io::ErrorKind::TimedOut => {
                format!("its page cache is not written back after {} s; try again", DETACH_SYNC_MAX.as_secs())
            }
            _ => format!("its page cache cannot be written back: {}", reason(&error)),
        })?;
        // That took a while. Who has come meanwhile may have written.
        if let Some(user) = device.user() {
            return Err(format!("is in use by {user}"));
        }
        self.let_go(attached).map_err(|error| trouble(&error))?;
        drop(token);
        let free = wait_until_free(device, Instant::now() + DETACH_FREE_MAX);
        if free { Ok(()) } else { Err(STILL_OPEN.to_owned()) }
    }

    /// Disconnects a device, whatever is in its page cache, and forgets it.
    fn let_go(&self, attached: &Arc<Attached>) -> std::io::Result<()> {
        attached.leaving.store(true, Ordering::Release);
        // It may be somebody else's by now.
        let is_ours = attached.device.backend().is_none_or(|backend| backend == attached.backend);
        let disconnect = |mut netlink: Netlink| netlink.disconnect(attached.device.index());
        let ended = if is_ours { Netlink::open().and_then(disconnect) } else { Ok(()) };
        match &ended {
            Ok(()) => self.forget(attached),
            // It stays, and is served on.
            Err(_) => attached.leaving.store(false, Ordering::Release),
        }
        ended
    }

    /// Takes the devices that the kernel still has for this guest from a process that died.
    pub fn resume(&self, guest: &Arc<Guest>) {
        let found = left_over(guest);
        for (disk, device) in &found {
            if found.iter().any(|(twin, other)| twin == disk && other != device) {
                log::error!("attach: {device} was disk {disk}, and is not the only one: nobody serves it");
                continue;
            }
            let (disk, device, backend) = (disk.as_str(), *device, backend(guest.host, &guest.name, disk));
            let Some(export) = guest.disk(disk).and_then(|disk| disk.export.clone()) else {
                log::warn!("attach: {device} was disk {disk}, which is not served any more");
                continue;
            };
            if export.gate() == Gate::Incoming {
                log::warn!("attach: {device} was disk {disk}, which this host does not own: nobody serves it");
                continue;
            }
            let leaving = AtomicBool::new(false);
            let attached = Arc::new(Attached { device, export, backend, leaving });
            match self.serve(guest, &attached, None) {
                Ok(()) => log::info!("attach: {device} is disk {disk}, as before"),
                Err(error) => log::error!("attach: {device}: {}", reason(&error)),
            }
        }
    }

    /// W6: who keeps a device of a time when this host owned the guest: disk, and why it must go first. What is
    /// attached now is no such device.
    #[must_use]
    pub fn kept(&self, guest: &Guest) -> Option<(String, String)> {
        let list = self.list();
        let left = left_over(guest).into_iter();
        let mut left = left.filter(|(_, device)| list.iter().all(|attached| attached.device != *device));
        left.find_map(|(disk, device)| {
            let user = device.user()?;
            let way_out = format!("end that first, or detach --force {device}");
            Some((disk, format!("was {device} when this host owned it, and is in use by {user}: {way_out}")))
        })
    }

    /// W6: takes away what devices are left of a time when this host owned the guest, before anything is received.
    ///
    /// # Errors
    /// The disk whose device stays, and why.
    pub fn clear(&self, guest: &Guest) -> Result<(), (String, String)> {
        let deadline = Instant::now() + DETACH_FREE_MAX;
        // Whoever gives them up now has a last look at them.
        while !self.list().is_empty() && Instant::now() < deadline {
            self.rest(RETRY_PAUSE);
        }
        let left = left_over(guest);
        if left.is_empty() {
            // To ask the driver would load it.
            return Ok(());
        }
        let ended = Netlink::open()
            .and_then(|mut netlink| left.iter().try_for_each(|(_, device)| netlink.disconnect(device.index())));
        for (disk, device) in left {
            if !wait_until_free(device, deadline) {
                let cause = ended.as_ref().err().map_or_else(|| STILL_OPEN.to_owned(), trouble);
                return Err((disk, format!("was {device} when this host owned it: {cause}")));
            }
        }
        Ok(())
    }

    /// What is attached, for `status`: disk and device.
    #[must_use]
    pub fn shown(&self) -> Vec<(String, Device)> {
        self.list().iter().map(|attached| (attached.export.name().to_owned(), attached.device)).collect()
    }

    /// Who has a device that the guest's disk can be written through, and will not be `still` at the switchover: a
    /// process, unless somebody stops it; a file system or a device on the device, in any case. With what to do.
    #[must_use]
    pub fn restless_user(&self, still: bool) -> Option<String> {
        let list = self.list();
        let writable = list.iter().filter(|attached| !attached.export.is_read_only());
        let mut restless = writable.filter_map(|attached| {
            let user = if still { attached.device.stands_on_it() } else { attached.device.user() }?;
            let advice = match user {
                User::Process(_) => "stop that before the hand-over: --hold, and then switch",
                User::Kernel(_) => "take that away first: what it has in memory would be lost",
            };
            let (disk, device) = (attached.export.name(), attached.device);
            Some(format!("disk {disk} is attached as {device}, which is in use by {user}: {advice}"))
        });
        restless.next()
    }

    /// Waits until something may have changed for those who were told [`NotAttached::Yet`].
    pub fn rest(&self, time: Duration) {
        drop(self.changed.wait_timeout(self.lock(), time).unwrap_or_else(PoisonError::into_inner));
    }

    // ---- one device ----

    /// Enters a device and starts its thread, and the one that looks after all.
    fn serve(&self, guest: &Arc<Guest>, attached: &Arc<Attached>, visit: Option<Visit>) -> std::io::Result<()> {
        let (served, host) = (Arc::clone(attached), Arc::clone(guest));
        self.lock().attached.push(Arc::clone(attached));
        let thread = std::thread::Builder::new().name(format!("nbd{}", attached.device.index()));
        let started = thread.stack_size(CONNECTION_STACK).spawn(move || host.attached.run(&host, &served, visit));
        if let Err(error) = started {
            self.forget(attached);
            return Err(error);
        }
        let mut inner = self.lock();
        if !inner.watched {
            let watcher = Arc::clone(guest);
            let thread = std::thread::Builder::new().name("attached".to_owned()).stack_size(CONNECTION_STACK);
            thread.spawn(move || watcher.attached.watch(&watcher))?;
            inner.watched = true;
        }
        Ok(())
    }

    /// The life of an attached device: one connection after the other.
    fn run(&self, guest: &Guest, attached: &Arc<Attached>, mut visit: Option<Visit>) {
        let device = attached.device;
        loop {
            let Some(current) = visit.take().or_else(|| self.connect_again(guest, attached)) else { break };
            current.ends_when_closed();
            let ended = server::transmit(&current, KERNEL_AGREED);
            if attached.is_leaving() {
                break;
            }
            match ended {
                // And not because we asked it to.
                Ok(Goodbye::Said) => {
                    log::warn!("attach: {device} was disconnected by somebody else");
                    break;
                }
                Ok(Goodbye::HungUp) if !current.is_ended() => log::warn!("attach: {device}: the kernel hung up"),
                Ok(Goodbye::HungUp) => log::info!("attach: {device}: its connection was ended"),
                Err(error) => log::warn!("attach: {device}: {}", reason(&error)),
            }
        }
        self.forget(attached);
    }

    /// A new connection for a device whose connection died, as soon as the gate allows it; `None`: there will be none.
    fn connect_again(&self, guest: &Guest, attached: &Arc<Attached>) -> Option<Visit> {
        let device = attached.device;
        while !attached.is_leaving() {
            match attached.export.gate() {
                Gate::Serving | Gate::Quiesced => {}
                Gate::Closed => {
                    self.rest(ATTACHED_LOOK);
                    continue;
                }
                // What is in its page cache may be older than the disk.
                Gate::Incoming | Gate::Receiving | Gate::Sealed | Gate::Fenced => {
                    log::warn!("attach: {device} is given up: {}", guest.why_fenced());
                    let _ = self.let_go(attached);
                    return None;
                }
            }
            match try_to_connect(attached) {
                Ok(Some(visit)) => return Some(visit),
                // The kernel has not noticed yet that the old connection is dead.
                Ok(None) => self.rest(RETRY_PAUSE),
                Err(cause) if device.backend().as_ref() == Some(&attached.backend) => {
                    log::warn!("attach: {device}: {cause}");
                    self.rest(ATTACHED_LOOK);
                }
                Err(cause) => {
                    log::warn!("attach: {device} is not connected any more: {cause}");
                    return None;
                }
            }
        }
        None
    }

    /// Looks after the devices until there is none: one whose disk belongs to another host for good is disconnected.
    fn watch(&self, guest: &Guest) {
        loop {
            self.rest(ATTACHED_LOOK);
            {
                let mut inner = self.lock();
                if inner.attached.is_empty() {
                    inner.watched = false;
                    return;
                }
            }
            // Not while the record is unknown, nor after a restart in the middle of something: it may be ours yet.
            let gone = |state: &State| matches!(state, State::Given { .. } | State::Superseded { .. });
            if !guest.record().is_ok_and(|record| record.is_some_and(|record| gone(&record.state))) {
                continue;
            }
            let Some(token) = self.take("a disconnect") else { continue };
            for attached in self.list().into_iter().filter(|attached| !attached.is_leaving()) {
                if let Err(error) = self.let_go(&attached) {
                    log::warn!("attach: {}: {}", attached.device, trouble(&error));
                }
            }
            drop(token);
        }
    }

    fn forget(&self, attached: &Arc<Attached>) {
        self.lock().attached.retain(|other| !Arc::ptr_eq(other, attached));
        self.changed.notify_all();
    }

    // ---- who decides ----

    /// The right to let devices come and go, unless somebody has it.
    fn take(&self, what: &'static str) -> Option<Token<'_>> {
        let mut inner = self.lock();
        if inner.token.is_some() {
            return None;
        }
        inner.token = Some(what);
        Some(Token { attachments: self })
    }

    fn token_text(&self) -> &'static str {
        self.lock().token.unwrap_or("something else")
    }

    fn list(&self) -> Vec<Arc<Attached>> {
        self.lock().attached.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Attachments::take`].
#[derive(Debug)]
struct Token<'a> {
    attachments: &'a Attachments,
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.attachments.lock().token = None;
        self.attachments.changed.notify_all();
    }
}

/// Every device that the kernel has under the name of one of the guest's disks, with that disk.
fn left_over(guest: &Guest) -> Vec<(String, Device)> {
    let named = Device::all().into_iter().filter_map(|device| Some((device, device.backend()?)));
    let ours = named.filter_map(|(device, backend)| {
        let (_, disk) = guest_and_disk(&backend)?;
        (self::backend(guest.host, &guest.name, disk) == backend).then(|| (disk.to_owned(), device))
    });
    let mut ours: Vec<_> = ours.collect();
    if !ours.is_empty() {
        let mut netlink = Netlink::open();
        // One that is free has its name a moment longer.
        ours.retain(|(_, device)| {
            netlink.as_mut().map_or(Ok(true), |asked| asked.is_in_use(device.index())).unwrap_or(true)
        });
    }
    ours
}

/// Offers the kernel a new connection; `None`: it did not want one.
fn try_to_connect(attached: &Arc<Attached>) -> Result<Option<Visit>, String> {
    let (theirs, ours) = pair().map_err(|error| reason(&error))?;
    let visit = attached.export.enter(Door::Guest, &ours)?;
    let mut netlink = Netlink::open().map_err(|error| trouble(&error))?;
    let index = attached.device.index();
    netlink.reconnect(index, &theirs, &attached.backend).map_err(|error| trouble(&error))?;
    attached.device.set_look(NBD_LOOK.as_millis());
    // A kernel that did not take its end has dropped it: with ours it was the last.
    drop(theirs);
    Ok(if ours.has_hung_up() { None } else { Some(visit) })
}

/// A process of this host that serves `guest`, though it may not answer; only its command line tells.
#[must_use]
pub fn process_that_serves(guest: &str) -> Option<String> {
    device::process_that_serves(guest)
}

/// Disconnects a device that nobody serves, whatever is in its page cache, and waits until the kernel has it free.
///
/// # Errors
/// Why not.
pub fn abandon(device: Device) -> Result<(), String> {
    let mut netlink = Netlink::open().map_err(|error| trouble(&error))?;
    netlink.disconnect(device.index()).map_err(|error| trouble(&error))?;
    let free = wait_until_free(device, Instant::now() + DETACH_FREE_MAX);
    if free { Ok(()) } else { Err(STILL_OPEN.to_owned()) }
}

/// A device that was disconnected stays until everybody has closed it.
const STILL_OPEN: &str = "is disconnected, and somebody still has it open";

/// Waits until the driver has given the device up: there is no connection, and nobody has it open.
fn wait_until_free(device: Device, deadline: Instant) -> bool {
    let Ok(mut netlink) = Netlink::open() else { return false };
    while netlink.is_in_use(device.index()).unwrap_or(true) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(RETRY_PAUSE);
    }
    true
}

#[cfg(test)]
mod tests;
