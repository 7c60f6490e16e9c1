//! Opens a phase connection to another host's migration door.

use std::fmt;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::destination::{hello, meet};
use super::link::{Link, LinkError};
use super::wire::{Challenge, Hello, Role};
use crate::command::Command;
use crate::error::reason;
use crate::guest::Guest;
use crate::limits::{CONNECT_TIMEOUT, DRIVER_STACK, HANDSHAKE_TIMEOUT, HELLO_TIMEOUT, LINK_IDLE_MAX};
use crate::nbd::client::{ConnectError, PhasesAnswer, offer_phases_before};
use crate::place::Place;
use crate::socket::Socket;

/// Why there is no phase connection.
#[derive(Debug)]
pub(super) struct NoLink {
    cause: String,
    /// The network is there and says that nobody is at home: refused, or closed before the hello was said. Else nothing
    /// was heard, or there is no way.
    pub(super) is_absent: bool,
}

impl fmt::Display for NoLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl From<String> for NoLink {
    fn from(cause: String) -> Self {
        Self { cause, is_absent: false }
    }
}

impl From<&str> for NoLink {
    fn from(cause: &str) -> Self {
        cause.to_owned().into()
    }
}

/// Runs the command or connects.
fn connect(place: &Place, left: Duration) -> Result<(Arc<Socket>, Option<Command>), NoLink> {
    match place {
        Place::At(address) => match address.connect(CONNECT_TIMEOUT.min(left)) {
            Ok(socket) => Ok((Arc::new(socket), None)),
            Err(error) => Err(NoLink { cause: reason(&error), is_absent: is_answer(error.kind()) }),
        },
        Place::Plain(_) => Err("is a plain NBD server: there is nobody to ask".into()),
        Place::Passed(passed) => match passed.take() {
            Some(socket) => Ok((Arc::new(socket), None)),
            None => Err("was one connection and cannot be dialled again".into()),
        },
        Place::Through(command) => {
            let (socket, command) = Command::run(command)?;
            Ok((Arc::new(socket), Some(command)))
        }
    }
}

/// Whether this is the word of somebody who is reached, and not silence.
fn is_answer(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
    )
}

impl Link {
    /// Why this connection is none yet. Where a command was run, what it said last, and the exit status by which it
    /// says that nobody is at home; ssh says [`SSH_FAILED`] when it has not come that far.
    fn no_link(&self, error: impl fmt::Display, is_absent: bool) -> NoLink {
        let epitaph = self.epitaph();
        let cause = if epitaph.is_empty() { error.to_string() } else { format!("{error} ({epitaph})") };
        let reached = self.exit_code().is_none_or(|code| code != SSH_FAILED);
        NoLink { cause, is_absent: is_absent && reached }
    }
}

/// The exit status of an ssh that did not reach the other host.
const SSH_FAILED: i32 = 255;

/// Dials as `role`, turns the connection into the phase protocol, and exchanges hellos. Returns the peer's; what its
/// title proves has been taken in (M8). Each step has its own time, and all of them end at `deadline`: the guest may be
/// waiting.
///
/// # Errors
/// One line: nobody is there, it is a plain NBD server, it speaks another version, or serves another guest.
pub(super) fn dial(guest: &Guest, place: &Place, role: Role, deadline: Instant) -> Result<(Link, Hello), NoLink> {
    let left = deadline.saturating_duration_since(Instant::now());
    let (socket, command) = connect(place, left)?;
    let mut link = Link::new(Arc::clone(&socket)).through(command);
    match offer_phases_before(&socket, deadline.min(Instant::now() + HANDSHAKE_TIMEOUT)) {
        Ok(PhasesAnswer::Accepted) => {}
        Ok(PhasesAnswer::PlainServer) => return Err("is a plain NBD server, not a blockferry's migration door".into()),
        Err(error) => {
            let is_absent = match &error {
                ConnectError::Closed(_) => true,
                ConnectError::Socket(_, error) => is_answer(error.kind()),
                _ => false,
            };
            return Err(link.no_link(error, is_absent));
        }
    }
    socket.set_keep_alive(LINK_IDLE_MAX);
    let challenge = Challenge::random().map_err(|error| error.to_string())?;
    let ours = hello(guest, role, challenge, &socket, place.address().is_none());
    let (theirs, version) = link
        .hello(&ours, deadline.min(Instant::now() + HELLO_TIMEOUT))
        .map_err(|error| link.no_link(error, error == LinkError::Closed))?;
    log::debug!("migration: {place}: phase protocol version {version}");
    if theirs.guest != ours.guest {
        return Err(format!("serves guest '{}', not '{}'", theirs.guest.escape_debug(), guest.name).into());
    }
    if theirs.instance == guest.instance {
        return Err("is this process itself".into());
    }
    meet(guest, &theirs);
    Ok((link, theirs))
}

/// [`dial`] as the source, on a thread of its own, for who must not wait for it.
pub(super) fn dial_aside(guest: &Arc<Guest>, place: &Place, deadline: Instant) -> Aside<(Link, Hello), NoLink> {
    let (guest, place) = (Arc::clone(guest), place.clone());
    aside("dial", move || dial(&guest, &place, Role::Source, deadline))
}

/// The result of something that is done on another thread.
pub(super) type Aside<T, E> = Receiver<Result<T, E>>;

/// Does `work` on a thread of its own. Who no longer wants the result drops the receiver; the work ends at its own
/// deadline, and what it made is dropped.
pub(super) fn aside<T: Send + 'static, E: From<String> + Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Aside<T, E> {
    let (give, take) = sync_channel(1);
    let refused = give.clone();
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(DRIVER_STACK);
    let spawned = thread.spawn(move || {
        let _ = give.send(work());
    });
    if let Err(error) = spawned {
        let _ = refused.send(Err(format!("no thread: {error}").into()));
    }
    take
}

/// Waits for the result of [`aside`], as long as `may_wait`, asked every `look`, says nothing against it.
///
/// # Errors
/// What `may_wait` said, or the work.
pub(super) fn wait_for<T, E: From<String>, W>(
    result: &Aside<T, E>,
    look: Duration,
    mut may_wait: impl FnMut() -> Result<(), W>,
) -> Result<Result<T, E>, W> {
    loop {
        match result.recv_timeout(look) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => may_wait()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(Err("ended without a result".to_owned().into())),
        }
    }
}
