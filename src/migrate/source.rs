//! The source of a migration, as its user sees it: start, follow, switch, set, cancel.
//!
//! One migration runs at a time, on a thread of its own that walks through the phases in `drive.rs`; a [`Job`] is what
//! that thread and the control door share. Whether the guest is given away, the attempt aborted or cancelled is decided
//! by that thread alone: a cancel only leaves word, under the lock under which the thread begins GIVEN (M3).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::drive;
use crate::address::Address;
use crate::control::link::Passengers;
use crate::control::server::News;
use crate::control::wire::{Done, MigrateRequest, Progress, SetRequest, Transport, text};
use crate::domain;
use crate::error::{Problem, reason};
use crate::export::Export;
use crate::guest::Guest;
use crate::inherited;
use crate::limits::DRIVER_STACK;
use crate::mirror::Budget;
use crate::ownership::{Attempt, State};
use crate::place::{Passed, Place};
use crate::relay::join;
use crate::socket::Socket;

/// What this process sends: the running migration, or the last one.
#[derive(Debug, Default)]
pub struct Source {
    job: Mutex<Option<Arc<Job>>>,
}

/// One migration.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub attempt: Attempt,
    /// Where to.
    pub address: Place,
    /// What was asked for.
    pub request: MigrateRequest,
    /// The exports that move.
    pub exports: Vec<Arc<Export>>,
    /// When it was asked for.
    pub began: Instant,
    /// The bandwidth, changed while it runs.
    pub budget: Arc<Budget>,
    downtime_limit_ms: AtomicU32,
    switch: AtomicBool,
    decision: Mutex<Decision>,
    board: Mutex<Board>,
    /// The board has changed in a way that a follower wants to see at once.
    changed: Condvar,
}

/// What has been decided about an attempt.
#[derive(Debug)]
enum Decision {
    /// Nothing yet.
    Open,
    /// Somebody wants it cancelled, for this reason.
    Cancel(String),
    /// It is given away, or has ended: too late to cancel.
    Closed(&'static str),
}

#[derive(Debug)]
struct Board {
    progress: Progress,
    done: Option<Done>,
    /// The destination is out of reach: since when, and why.
    lost: Option<(Instant, String)>,
}

impl Source {
    /// Starts a migration, perhaps over a connection that was passed with the request; the rest is told by
    /// [`Source::news`].
    ///
    /// # Errors
    /// Why not; nothing has changed.
    pub fn start(&self, guest: &Arc<Guest>, request: &MigrateRequest, passed: Passengers) -> Result<Attempt, Problem> {
        let refuse = |cause: &dyn std::fmt::Display| Problem::refused("migrate", &guest.name, cause);
        let address = Place::parse(&request.destination)
            .map_err(|cause| Problem::usage("migrate", &request.destination, cause))?;
        let insecure_plaintext = request.insecure_plaintext || guest.insecure_plaintext;
        address.check_plaintext("migrate", insecure_plaintext)?;
        if request.transport == Transport::Nbd && address.address().is_none() {
            return Err(Problem::usage("migrate", &address, "is one connection: no NBD beside it"));
        }
        let exports = choose(guest, request).map_err(|cause| refuse(&cause))?;
        // W5: only the VMM can be still, and only its user can make it so, or a hook.
        if let Some(user) = guest.restless_user(request.hold) {
            return Err(refuse(&user));
        }

        if let Place::Passed(to) = &address {
            bring(to, passed, insecure_plaintext).map_err(|cause| Problem::refused("migrate", &address, cause))?;
        }

        let mut slot = self.lock();
        if let Some(job) = slot.as_ref().filter(|job| !job.is_over()) {
            return Err(refuse(&format_args!("a migration to {} is running", job.address)));
        }
        if guest.moving().is_some_and(|moving| !moving.arrives) {
            return Err(refuse(&"its guest is being let go on after an attempt that came to nothing: try again soon"));
        }
        match guest.record() {
            Ok(Some(record)) if matches!(record.state, State::Owner { .. }) => {}
            Ok(Some(record)) => return Err(refuse(&record)),
            Ok(None) => return Err(refuse(&"this host owns nothing (blockferry claim makes it the owner, once)")),
            Err(error) => return Err(Problem::unknown("migrate", &guest.name, error)),
        }
        let attempt = Attempt::random().map_err(|error| refuse(&error))?;
        let progress = Progress {
            attempt: u128::from_be_bytes(attempt.0),
            downtime_limit_ms: request.downtime_limit_ms,
            bandwidth_bytes: request.bandwidth_bytes,
            ..Progress::default()
        };
        let job = Arc::new(Job {
            attempt,
            address,
            request: request.clone(),
            exports,
            began: Instant::now(),
            budget: Budget::new(request.bandwidth_bytes),
            downtime_limit_ms: AtomicU32::new(request.downtime_limit_ms),
            switch: AtomicBool::new(false),
            decision: Mutex::new(Decision::Open),
            board: Mutex::new(Board { progress, done: None, lost: None }),
            changed: Condvar::new(),
        });
        let (driver, passenger) = (Arc::clone(&job), Arc::clone(guest));
        std::thread::Builder::new()
            .name("migration".to_owned())
            .stack_size(DRIVER_STACK)
            .spawn(move || {
                let done = drive::run(&passenger, &driver);
                if let Place::Passed(passed) = &driver.address
                    && let Some(unused) = passed.take()
                {
                    // Others may hold it still, and the other end is to hear that nobody comes.
                    unused.shutdown();
                }
                driver.finish(done);
                // What is left to be said from now on, another thread says.
                passenger.settle.ring();
            })
            .map_err(|error| refuse(&error))?;
        *slot = Some(job);
        Ok(attempt)
    }

    /// The attempt that is running.
    #[must_use]
    pub fn live_attempt(&self) -> Option<Attempt> {
        self.lock().as_ref().filter(|job| !job.is_over()).map(|job| job.attempt)
    }

    /// Another guest comes, or this one has come back: how the last migration ended is history.
    pub fn forget_ended(&self) {
        let _ = self.lock().take_if(|job| job.is_over());
    }

    /// Whether there is a migration: `None`, or whether it still runs.
    #[must_use]
    pub fn is_running(&self) -> Option<bool> {
        self.lock().as_ref().map(|job| !job.is_over())
    }

    /// The running migration.
    ///
    /// # Errors
    /// There is none.
    pub fn running(&self, operation: &'static str, guest: &Guest) -> Result<Arc<Job>, Problem> {
        let job = self.lock().clone().filter(|job| !job.is_over());
        job.ok_or_else(|| Problem::refused(operation, &guest.name, "no migration is running"))
    }

    /// News of an attempt, or of the running, else the last one; see [`crate::control::server::Desk::news`].
    #[must_use]
    pub fn news(&self, attempt: Option<u128>, timeout: Duration) -> Option<News> {
        let job = self.lock().clone()?;
        if attempt.is_some_and(|attempt| attempt != u128::from_be_bytes(job.attempt.0)) {
            return None;
        }
        Some(job.news(timeout))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Job>>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the connection of an `fd:N` taken over by who will dial it.
fn bring(to: &Passed, passed: Passengers, insecure_plaintext: bool) -> Result<(), String> {
    let mut passed = passed.into_iter();
    let passed = match (passed.next(), passed.next(), to.numbers()) {
        (Some(input), Some(output), (_, Some(_))) => {
            let (input, output) = (inherited::half(input, false)?, inherited::half(output, true)?);
            for half in [&input, &output] {
                check_peer(inherited::peer(half), insecure_plaintext)?;
            }
            to.bring(join(input, output).map_err(|error| reason(&error))?);
            return Ok(());
        }
        (Some(passed), None, (_, None)) => passed,
        _ => return Err("no such descriptor came with the request: a control door's Unix socket passes it".to_owned()),
    };
    let taken = inherited::connected(passed)?;
    check_peer(taken.peer(), insecure_plaintext)?;
    to.bring(Socket::new(taken.into_connection().map_err(|error| reason(&error))?));
    Ok(())
}

/// Whether what is at the other end of a TCP connection may be spoken with in the clear.
fn check_peer(peer: Option<Address>, insecure_plaintext: bool) -> Result<(), String> {
    let Some(peer) = peer else { return Ok(()) };
    peer.check_plaintext("migrate", insecure_plaintext).map_err(|problem| format!("{peer}: {}", problem.cause))
}

/// The exports that move: by the rule, or those that were named.
fn choose(guest: &Guest, request: &MigrateRequest) -> Result<Vec<Arc<Export>>, String> {
    let specs: Vec<_> = guest.disks.iter().map(|disk| disk.spec.clone()).collect();
    let stays = domain::moving(&specs, &request.disks)?;
    let mut exports = Vec::new();
    for (disk, stays) in guest.disks.iter().zip(stays) {
        if stays.is_some() {
            continue;
        }
        match &disk.export {
            Some(export) if export.disk().is_some() => exports.push(Arc::clone(export)),
            _ => return Err(format!("disk {} does not exist", disk.spec.name)),
        }
    }
    if exports.is_empty() {
        return Err("no disk moves: all are shared, read-only, external or without a source".to_owned());
    }
    Ok(exports)
}

impl Job {
    /// In words: the connection is lost, and there will be no other one.
    #[must_use]
    pub fn lost_for_good(&self, cause: &str) -> String {
        format!("{cause}; {} was one connection and cannot be dialled again", self.address)
    }

    /// Hands over now: `--hold` ends, or convergence is not waited for.
    pub fn switch(&self) {
        self.switch.store(true, Ordering::Release);
    }

    /// Whether somebody said switch.
    #[must_use]
    pub fn is_switched(&self) -> bool {
        self.switch.load(Ordering::Acquire)
    }

    /// The downtime that is allowed now.
    #[must_use]
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(u64::from(self.downtime_limit_ms.load(Ordering::Acquire)))
    }

    /// Changes what can be changed while it runs.
    pub fn set(&self, change: &SetRequest) {
        if let Some(rate) = change.bandwidth_bytes {
            self.budget.set_rate(rate);
        }
        if let Some(limit) = change.downtime_limit_ms {
            self.downtime_limit_ms.store(limit, Ordering::Release);
        }
    }

    /// Leaves word that the attempt shall end.
    ///
    /// # Errors
    /// It is too late (M3).
    pub fn cancel(&self, cause: &str) -> Result<(), String> {
        let mut decision = self.decision();
        match &*decision {
            Decision::Open => *decision = Decision::Cancel(cause.to_owned()),
            Decision::Cancel(_) => {}
            Decision::Closed(why) => return Err((*why).to_owned()),
        }
        Ok(())
    }

    /// The reason, if somebody wants it cancelled.
    #[must_use]
    pub fn cancelled(&self) -> Option<String> {
        match &*self.decision() {
            Decision::Cancel(cause) => Some(cause.clone()),
            Decision::Open | Decision::Closed(_) => None,
        }
    }

    /// From here on nobody can cancel: GIVEN is begun, or the attempt is being ended.
    ///
    /// # Errors
    /// Somebody did cancel before, for this reason.
    pub fn close_decision(&self, why: &'static str) -> Result<(), String> {
        let mut decision = self.decision();
        if let Decision::Cancel(cause) = &*decision {
            return Err(cause.clone());
        }
        *decision = Decision::Closed(why);
        Ok(())
    }

    fn decision(&self) -> MutexGuard<'_, Decision> {
        self.decision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows how it is; followers are woken when the phase or the convergence has changed.
    pub fn show(&self, change: impl FnOnce(&mut Progress)) {
        let mut board = self.board();
        let before = (board.progress.phase, board.progress.convergence, board.progress.held);
        change(&mut board.progress);
        if before != (board.progress.phase, board.progress.convergence, board.progress.held) {
            self.changed.notify_all();
        }
    }

    /// The destination is out of reach, `since` then; followers hear of it at once. Said again, it changes nothing but
    /// the cause.
    pub fn lose(&self, since: Instant, cause: &str) {
        let mut board = self.board();
        let since = board.lost.as_ref().map_or(since, |(since, _)| *since);
        board.lost = Some((since, cause.to_owned()));
        self.changed.notify_all();
    }

    /// The destination is still out of reach, if it was, for this reason now.
    pub fn still_lost(&self, cause: &str) {
        if let Some((_, why)) = &mut self.board().lost {
            cause.clone_into(why);
        }
    }

    /// The destination is there again.
    pub fn find(&self) {
        self.board().lost = None;
        self.changed.notify_all();
    }

    fn finish(&self, done: Done) {
        *self.decision() = Decision::Closed("the migration is over");
        self.board().done = Some(done);
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        self.board().done.is_some()
    }

    fn news(&self, timeout: Duration) -> News {
        let board = self.board();
        let board = if board.done.is_some() {
            board
        } else {
            self.changed.wait_timeout(board, timeout).unwrap_or_else(PoisonError::into_inner).0
        };
        board.done.clone().map_or_else(|| News::Progress(self.progress(&board)), News::Done)
    }

    /// What is shown, as of now: times go on while the driver waits for something.
    fn progress(&self, board: &Board) -> Progress {
        let mut progress = board.progress.clone();
        progress.elapsed_ms = milliseconds(self.began);
        if let Some((since, cause)) = &board.lost {
            progress.lost_ms = Some(milliseconds(*since));
            progress.lost_cause = text(cause);
        }
        progress
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
