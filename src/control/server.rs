//! The process's end of the control door: one thread a connection, every request answered by the guest's [`Desk`].
//!
//! Garbage ends the session and touches nothing else. A `migrate` in the foreground lives no longer than its
//! connection: when the client goes away, the desk is asked to cancel that attempt (and refuses once GIVEN is begun,
//! rule M3). Not so on a byte pipe ([`crate::control::port_door`]): there a host end that closes and opens again may
//! be seen or missed, and whether a migration lives must not depend on that. It goes on, as a detached one does.

use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::control::link::{Link, Passengers, frame_error, is_unknown};
use crate::control::wire::{
    AttachRequest, Convergence, Done, MigrateRequest, Ownership, Phase, Progress, Recovered, Refusal, Reply, Request,
    SetRequest, Status, VERSION, Word,
};
use crate::error::Problem;
use crate::limits::{
    CONTROL_CONNECTIONS_MAX, CONTROL_IDLE_TIMEOUT, CONTROL_SEND_TIMEOUT, HANG_UP_POLL, PROGRESS_INTERVAL,
};
use crate::listener::Listener;
use crate::socket::Socket;

/// Who answers for the guest. Every method may be called from several threads at once; none may wait longer than it
/// says.
pub trait Desk: Send + Sync {
    /// How the guest's disks are now.
    fn status(&self) -> Status;

    /// Who owns the guest, as far as this host knows.
    fn ownership(&self) -> Ownership;

    /// Asks the other host that the record names, and carries out the operator's word if the rules let it (M5, M6, M8).
    /// Waits for the other host for as long as it takes to be sure that it does not answer.
    ///
    /// # Errors
    /// The rules refuse the word; nothing has changed by it.
    fn recover(&self, word: Word) -> std::result::Result<Recovered, Problem>;

    /// This host owns the disks (M7). Returns once that is durable.
    ///
    /// # Errors
    /// Why not; nothing has changed.
    fn claim(&self, discard_record: bool) -> std::result::Result<(), Problem>;

    /// Starts a migration and returns its attempt without waiting for the other host. `passed`: the descriptors
    /// that came with the request.
    ///
    /// # Errors
    /// Why not; nothing has changed.
    fn migrate(&self, request: &MigrateRequest, passed: Passengers) -> std::result::Result<u128, Problem>;

    /// Lets the running migration hand over now, whether it is held or has not converged.
    ///
    /// # Errors
    /// There is none.
    fn switch(&self) -> std::result::Result<(), Problem>;

    /// Ends a migration: the given attempt, or whichever is running. Returns once it is decided, not once it is over.
    ///
    /// # Errors
    /// There is none, or GIVEN is begun (M3).
    fn cancel(&self, attempt: Option<u128>, cause: &str) -> std::result::Result<(), Problem>;

    /// Makes a disk a device of this host: `false` if it does not own the disk yet, after a moment of waiting for that.
    ///
    /// # Errors
    /// Why not; nothing has changed.
    fn attach(&self, request: &AttachRequest) -> std::result::Result<bool, Problem>;

    /// Gives a device up. Waits until what is in its page cache is written, but not for longer than it takes to be
    /// sure that this is slow.
    ///
    /// # Errors
    /// Why not.
    fn detach(&self, device: &str) -> std::result::Result<(), Problem>;

    /// A connection of another host that somebody brings here. Returns at once; the connection lives on.
    fn accept(&self, socket: Arc<Socket>);

    /// Changes the running migration.
    ///
    /// # Errors
    /// There is none.
    fn set(&self, change: &SetRequest) -> std::result::Result<(), Problem>;

    /// News of an attempt, or of the running, else the last one. Waits at most `timeout` for its phase or convergence
    /// to change or for its end, then says how it is; an end is told at once, also when it was long ago. `None`: there
    /// is no such attempt.
    fn news(&self, attempt: Option<u128>, timeout: Duration) -> Option<News>;
}

/// How a migration is, or how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "lives for one frame")]
pub enum News {
    /// It runs.
    Progress(Progress),
    /// It has ended.
    Done(Done),
}

/// The control doors of one process.
pub struct Server<'d> {
    desk: &'d dyn Desk,
    connections: AtomicUsize,
}

impl<'d> Server<'d> {
    /// A server without connections.
    #[must_use]
    pub fn new(desk: &'d dyn Desk) -> Self {
        Self { desk, connections: AtomicUsize::new(0) }
    }

    /// Accepts and answers until the listener is stopped; then ends every connection that came through it. Several
    /// doors may run at once, each on its own thread.
    ///
    /// # Errors
    /// The listener's.
    pub fn run(&self, listener: &Listener) -> Result<()> {
        let open = Mutex::new(Vec::<Weak<Socket>>::new());
        thread::scope(|scope| {
            let ended = loop {
                let socket = match listener.accept() {
                    Ok(Some(socket)) => Arc::new(socket),
                    Ok(None) => break Ok(()),
                    Err(e) => break Err(e),
                };
                let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
                open.retain(|socket| socket.strong_count() > 0);
                open.push(Arc::downgrade(&socket));
                let spawned =
                    thread::Builder::new().name("control".to_owned()).spawn_scoped(scope, move || self.attend(socket));
                if let Err(e) = spawned {
                    log::warn!("control: {}: no thread for a connection: {e}", listener.at());
                }
            };
            for socket in open.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
                socket.shutdown();
            }
            ended
        })
    }

    /// Answers one connection until it ends.
    pub fn attend(&self, socket: Arc<Socket>) {
        let mut link = Link::new(socket);
        let before = self.connections.fetch_add(1, Ordering::AcqRel);
        let ended = if before < CONTROL_CONNECTIONS_MAX {
            converse(&mut link, self.desk)
        } else {
            let cause = format!("{CONTROL_CONNECTIONS_MAX} control connections are open already");
            refuse(&mut link, &Problem::refused("control", "connection", cause))
        };
        self.connections.fetch_sub(1, Ordering::AcqRel);
        if let Err(e) = ended {
            log::info!("control: connection: {e}");
        }
    }
}

/// The whole life of a connection; on a byte pipe as long as the host's end stays open. There garbage ends a session
/// and no more: the next hello begins another.
pub(crate) fn converse(link: &mut Link, desk: &dyn Desk) -> Result<()> {
    let mut greeted = false;
    // A hello that came while a migration was followed.
    let mut hello = None;
    loop {
        let idle = (!link.is_pipe()).then(|| Instant::now() + CONTROL_IDLE_TIMEOUT);
        let request = match hello.take().map_or_else(|| link.receive(idle), |hello| Ok(Some(hello))) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(e) if is_unknown(&e) => {
                refuse(link, &unknown_request())?;
                if link.is_pipe() {
                    continue;
                }
                return Ok(());
            }
            Err(e) if link.is_pipe() && frame_error(&e).is_some() => {
                log::debug!("control: port: {e}");
                greeted = false;
                continue;
            }
            Err(e) => return Err(e),
        };
        match request {
            Request::Hello { version, session } => {
                // Of another version it is answered too, so that the client can say which; nothing else is.
                greeted = version == VERSION;
                let reply = Reply::Hello { version: VERSION, guest: desk.status().guest, session };
                link.send_first(&reply, Instant::now() + CONTROL_SEND_TIMEOUT)?;
            }
            _ if !greeted => {
                let refusal = Refusal::from(&Problem::refused("control", "request", "no hello came before it"));
                // On a pipe these may be the many requests of one who never reads: each is worth no wait.
                let patience = if link.is_pipe() { Duration::ZERO } else { CONTROL_SEND_TIMEOUT };
                match link.send_first(&Reply::Refused(refusal), Instant::now() + patience) {
                    Err(e) if !link.is_pipe() || e.kind() != ErrorKind::TimedOut => return Err(e),
                    _ if !link.is_pipe() => return Ok(()),
                    _ => {}
                }
            }
            Request::Migrate(request) => hello = migrate(link, desk, &request)?,
            Request::Follow => hello = follow_present(link, desk)?,
            Request::Attach(request) => hello = attach(link, desk, &request)?,
            Request::Accept => return accept(link, desk),
            request => answer(link, desk, request)?,
        }
    }
}

fn unknown_request() -> Problem {
    Problem::refused("control", "request", "not known to this process; is the command of another version?")
}

/// Does one request and replies.
fn answer(link: &mut Link, desk: &dyn Desk, request: Request) -> Result<()> {
    match request {
        // Handled by the callers.
        Request::Hello { .. } | Request::Migrate(_) | Request::Follow | Request::Attach(_) | Request::Accept => Ok(()),
        Request::Status => send(link, &Reply::Status(desk.status())),
        Request::Claim { discard_record } => report(link, desk.claim(discard_record)),
        Request::Switch => report(link, desk.switch()),
        Request::Cancel { cause } => report(link, desk.cancel(None, &cause)),
        Request::Set(change) => report(link, desk.set(&change)),
        Request::WhoOwns => send(link, &Reply::Ownership(desk.ownership())),
        Request::Detach { device } => report(link, desk.detach(&device)),
        Request::Recover(word) => match desk.recover(word) {
            Ok(recovered) => send(link, &Reply::Recovered(recovered)),
            Err(problem) => refuse(link, &problem),
        },
    }
}

/// Starts a migration; one in the foreground is followed, and cancelled when its client has gone. Gives a hello back
/// that ended the following.
fn migrate(link: &mut Link, desk: &dyn Desk, request: &MigrateRequest) -> Result<Option<Request>> {
    let passed = link.take_passed();
    let attempt = match desk.migrate(request, passed) {
        Ok(attempt) => attempt,
        Err(problem) => return refuse(link, &problem).map(|()| None),
    };
    if request.detach {
        return send(link, &Reply::Ok).map(|()| None);
    }
    let followed = send(link, &Reply::Ok).and_then(|()| follow(link, desk, attempt));
    if followed.is_err() && link.is_pipe() {
        log::info!("migrate: nobody follows it at the port any more: it goes on");
    } else if followed.is_err() {
        match desk.cancel(Some(attempt), "the migrate command went away") {
            Ok(()) => log::warn!("migrate: cancelled: the command went away"),
            Err(problem) => log::warn!("migrate: the command went away: not cancelled: {}", problem.cause),
        }
    }
    followed
}

/// Attaches a disk as soon as this host owns it, unless the client goes away before or has waited long enough. Gives a
/// hello back that ended the waiting.
fn attach(link: &mut Link, desk: &dyn Desk, request: &AttachRequest) -> Result<Option<Request>> {
    let patience = request.wait_s.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    loop {
        match desk.attach(request) {
            Ok(true) => return send(link, &Reply::Ok).map(|()| None),
            Err(problem) => return refuse(link, &problem).map(|()| None),
            Ok(false) if patience.is_some_and(|patience| Instant::now() >= patience) => {
                let cause = "this host does not own the disk yet";
                return refuse(link, &Problem::refused("attach", &request.disk, cause)).map(|()| None);
            }
            Ok(false) => {}
        }
        match link.receive(Some(Instant::now())) {
            Ok(Some(hello @ Request::Hello { .. })) => return Ok(Some(hello)),
            Ok(Some(_)) => refuse(link, &Problem::refused("control", "request", "an attach is waiting here"))?,
            Ok(None) => return Err(Error::new(ErrorKind::ConnectionAborted, "the client went away")),
            Err(e) if e.kind() == ErrorKind::TimedOut => {}
            Err(e) if is_unknown(&e) => refuse(link, &unknown_request())?,
            Err(e) => return Err(e),
        }
    }
}

/// Makes the connection one to the migration door: this was its last word as a control connection.
fn accept(link: &mut Link, desk: &dyn Desk) -> Result<()> {
    let Some(socket) = link.socket().map(Arc::clone) else {
        return refuse(link, &Problem::refused("accept", "connection", "a virtio port is no way to a migration door"));
    };
    // Before anybody else speaks on it.
    send(link, &Reply::Ok)?;
    desk.accept(socket);
    Ok(())
}

/// Follows the running migration, or tells the end of the last one.
fn follow_present(link: &mut Link, desk: &dyn Desk) -> Result<Option<Request>> {
    match desk.news(None, Duration::ZERO) {
        None => refuse(link, &Problem::refused("follow", "migration", "there is none")).map(|()| None),
        Some(News::Done(done)) => {
            send(link, &Reply::Ok)?;
            send(link, &Reply::Done(done)).map(|()| None)
        }
        Some(News::Progress(progress)) => {
            send(link, &Reply::Ok)?;
            follow(link, desk, progress.attempt)
        }
    }
}

/// Sends the news of an attempt until its end, or until a hello comes, which is given back; an error when the client is
/// gone before.
fn follow(link: &mut Link, desk: &dyn Desk, attempt: u128) -> Result<Option<Request>> {
    let mut sent: Option<Told> = None;
    loop {
        match desk.news(Some(attempt), HANG_UP_POLL) {
            Some(News::Done(done)) => return send(link, &Reply::Done(done)).map(|()| None),
            Some(News::Progress(progress)) => {
                let now = (Instant::now(), progress.phase, progress.convergence, progress.lost_ms.is_some());
                if sent.is_none_or(|before| is_news(before, now)) {
                    sent = Some(now);
                    link.offer(&Reply::Progress(progress))?;
                }
            }
            None => {
                let cause = "it has ended, and another one has begun since";
                return refuse(link, &Problem::unknown("follow", "migration", cause)).map(|()| None);
            }
        }
        // Before the hang-up is looked for: what was asked for before it is done.
        if let Some(hello) = answer_meanwhile(link, desk)? {
            return Ok(Some(hello));
        }
        if link.has_hung_up() {
            return Err(Error::new(ErrorKind::ConnectionAborted, "the client went away"));
        }
    }
}

/// Answers what a client asks while it follows, without waiting for more. On a port there is no second connection on
/// which to cancel.
fn answer_meanwhile(link: &mut Link, desk: &dyn Desk) -> Result<Option<Request>> {
    loop {
        match link.receive(Some(Instant::now())) {
            Ok(Some(hello @ Request::Hello { .. })) => return Ok(Some(hello)),
            Ok(Some(Request::Migrate(_) | Request::Follow | Request::Attach(_) | Request::Accept)) => {
                refuse(link, &Problem::refused("control", "request", "a migration is being followed here already"))?;
            }
            Ok(Some(request)) => answer(link, desk, request)?,
            Ok(None) => return Err(Error::new(ErrorKind::ConnectionAborted, "the client went away")),
            Err(e) if e.kind() == ErrorKind::TimedOut => return Ok(None),
            Err(e) if is_unknown(&e) => refuse(link, &unknown_request())?,
            Err(e) => return Err(e),
        }
    }
}

/// What a follower has been told: when, and whether the destination was out of reach.
type Told = (Instant, Phase, Convergence, bool);

/// Whether a follower should hear: a new phase, convergence or the destination won or lost, or it is time again.
fn is_news(before: Told, now: Told) -> bool {
    let converged = |c| c == Convergence::Converged;
    before.1 != now.1
        || converged(before.2) != converged(now.2)
        || before.3 != now.3
        || now.0.duration_since(before.0) >= PROGRESS_INTERVAL
}

fn report(link: &mut Link, result: std::result::Result<(), Problem>) -> Result<()> {
    match result {
        Ok(()) => send(link, &Reply::Ok),
        Err(problem) => refuse(link, &problem),
    }
}

fn refuse(link: &mut Link, problem: &Problem) -> Result<()> {
    send(link, &Reply::Refused(Refusal::from(problem)))
}

fn send(link: &mut Link, reply: &Reply) -> Result<()> {
    link.send(reply, Instant::now() + CONTROL_SEND_TIMEOUT)
}
