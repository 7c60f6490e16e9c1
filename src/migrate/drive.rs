//! The phases of a migration on the source, in their order.
//!
//! [`run`] reads from top to bottom: prepare, perform, finish; beside it stands the one failure path, [`abort`].
//! Nothing here touches a data byte: it starts lanes, asks mirrors for counts, and speaks with the destination.
//!
//! What may end when is decided in [`Drive::finish`]: until SEAL is sent the gates may open again and the migration
//! goes on; once it is sent, opening them ends the attempt (D6); once GIVEN is begun, nothing takes it back (M3).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dial::{aside, dial, dial_aside, wait_for};
use super::lanes::{Lanes, connect, disk_of};
use super::link::{Link, LinkError};
use super::meter::{Meter, Verdict};
use super::preflight;
use super::settle::{self, Trouble};
use super::source::Job;
use super::verify::{self, Checkers};
use super::wire::{Epoch, Hello, Message, Mode, Prepare, Prepared, Role, Verify, cut};
use crate::attach::Held;
use crate::control::wire::{self, Convergence, DiskProgress, Done, Owner, Phase, text};
use crate::digest::{Digest, Verified, root_of_all};
use crate::error::Exit;
use crate::export::{Quiesced, quiesce};
use crate::guest::Guest;
use crate::limits::{
    ABSENT_MAX, ATTACHED_PROOF_MAX, ATTACHED_SYNC_MAX, CONNECTIONS_PER_DISK_MAX, DIAL_MAX, DISKS_MAX, DISTANT,
    FENCE_MAX, FLUSH_PERIOD, GO_PATIENCE, LANES_DISTANT, LINK_LOOK, LINK_SILENCE_MAX, LOST_PATIENCE, PING_PERIOD,
    PREPARE_MAX, QUIESCE_MAX, RECONNECT_MAX, RECONNECT_PAUSE, REDIAL_MAX, REPLY_TIMEOUT, RUNNING_PATIENCE,
    SATURATED_MIN, SEAL_MAX, SWITCHOVER_PAUSE, SWITCHOVERS_MAX, TICK, UNSEALED_PATIENCE,
};
use crate::mirror::{Counts, Lost, Mirror, NotReady, Plan};
use crate::ownership::{Event, KeepError, Peer, Receipt, Record, Stamp};
use crate::standing::kept;
use outage::{Outage, stop};

mod outage;

/// What is said of a destination that does not say anything.
const SILENT: &str = "the destination is silent";

/// Why a migration does not go on. Which exit code that is depends on where it happens.
#[derive(Debug)]
enum Stop {
    /// It failed, or was cancelled: the attempt ends, the source goes on.
    Abort(String),
    /// The record cannot be made durable: who owns is not known from here (M4).
    Unknown(String),
}

impl From<String> for Stop {
    fn from(cause: String) -> Self {
        Self::Abort(cause)
    }
}

impl From<&str> for Stop {
    fn from(cause: &str) -> Self {
        Self::Abort(cause.to_owned())
    }
}

/// How a hand-over ended that nothing takes back.
enum Handed {
    /// The destination owns. The length of the switchover.
    Over(Duration),
    /// The destination owns, and what failed after that.
    OverBut(String),
    /// It has not answered yet.
    Unheard,
}

/// Why a switchover came to nothing while the gates could still open again.
enum NotYet {
    /// The guest goes on, and the migration too.
    GoOn(String),
    /// The migration does not.
    Stop(Stop),
}

impl From<NotYet> for Stop {
    fn from(not_yet: NotYet) -> Self {
        match not_yet {
            NotYet::GoOn(cause) => Self::Abort(cause),
            NotYet::Stop(stop) => stop,
        }
    }
}

/// Drives one migration to its end.
pub(super) fn run(guest: &Arc<Guest>, job: &Job) -> Done {
    let mut drive = match prepare(guest, job) {
        Ok(drive) => drive,
        Err(cause) => return ended(guest, job, Exit::Refused, &cause),
    };
    let result = drive.perform().and_then(|()| drive.finish());
    let counts = drive.counts();
    let handed = result.is_ok().then(|| drive.receipt(&counts));
    let mut done = match result {
        Ok(Handed::Over(switchover)) => {
            let mut done = done(job, Exit::Done, Owner::Destination, "");
            done.switchover_us = Some(u64::try_from(switchover.as_micros()).unwrap_or(u64::MAX));
            done
        }
        Ok(Handed::OverBut(cause)) => done(job, Exit::GaveAway, Owner::Destination, &cause),
        Ok(Handed::Unheard) => done(
            job,
            Exit::Unknown,
            Owner::Unknown,
            "given away, and the destination has not answered yet: it owns as soon as it hears of it",
        ),
        Err(Stop::Unknown(cause)) => done(job, Exit::Unknown, Owner::Unknown, &cause),
        Err(Stop::Abort(cause)) => match abort(drive, &cause) {
            Ok(()) => ended(guest, job, Exit::Aborted, &cause),
            Err(unknown) => done(job, Exit::Unknown, Owner::Unknown, &unknown),
        },
    };
    if let Some(receipt) = &handed {
        // The switchover is over; only now may it cost time.
        guest.keep_receipt(receipt.clone());
    }
    done.sent_bytes = counts.iter().map(|c| c.sent).sum();
    done.zero_bytes = counts.iter().map(|c| c.zeroed).sum();
    done.resent_bytes = counts.iter().map(|c| c.resent).sum();
    done.passes = counts.iter().map(|c| c.passes).max().unwrap_or(0);
    done.equal_bytes = counts.iter().map(|c| c.equal).sum();
    done.receipt = handed.filter(|_| done.owner == Owner::Destination).map(|receipt| kept(&receipt).receipt);
    done
}

/// The end of an attempt that was not given. That this host still owns is said only if its record says so: it may not
/// be durable (M4), or another host may have proved a higher order meanwhile (M8).
fn ended(guest: &Guest, job: &Job, exit: Exit, cause: &str) -> Done {
    match guest.record() {
        Ok(record) if record.as_ref().is_some_and(Record::owns) => done(job, exit, Owner::Here, cause),
        Ok(Some(record)) => done(job, Exit::Unknown, Owner::Unknown, &format!("{cause}; {record}")),
        Ok(None) => done(job, Exit::Unknown, Owner::Unknown, cause),
        Err(error) => done(job, Exit::Unknown, Owner::Unknown, &format!("{cause}; {error}")),
    }
}

fn done(job: &Job, exit: Exit, owner: Owner, cause: &str) -> Done {
    Done {
        attempt: u128::from_be_bytes(job.attempt.0),
        exit: exit.code(),
        message: text(cause),
        owner,
        destination: text(&job.address.to_string()),
        total_ms: u64::try_from(job.began.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..Done::default()
    }
}

// ---- PREPARE -----------------------------------------------------------------------------------------------------

/// Everything before the first byte: dials, says hello, has the destination check and open the disks. A failure here
/// has changed nothing.
fn prepare<'a>(guest: &'a Arc<Guest>, job: &'a Job) -> Result<Drive<'a>, String> {
    // Before the destination waits for an answer: it may take a while on a large disk.
    let disks = preflight::offers(&job.exports)?;
    let dialled = dial_aside(guest, &job.address, Instant::now() + DIAL_MAX);
    let (mut link, theirs) = wait_for(&dialled, TICK, || job.cancelled().map_or(Ok(()), Err))?
        .map_err(|no_link| format!("{}: {no_link}", job.address))?;
    let record = guest.record().map_err(|error| error.to_string())?.ok_or("this host owns nothing")?;
    let stamp = Stamp {
        lineage: record.lineage,
        word: record.word,
        attempt: job.attempt,
        source: guest.host,
        destination: theirs.host,
        order: record.order.handed_over().ok_or("the order cannot rise further")?,
    };
    let message = Message::Prepare(Prepare {
        stamp,
        challenge: theirs.challenge,
        mode: match (job.request.overwrite, job.request.incremental) {
            (true, _) => Mode::Overwrite,
            (false, true) => Mode::Incremental,
            (false, false) => Mode::CopyAll,
        },
        disks,
        connections: job.request.connections,
        verify: match job.request.verify {
            wire::Verify::None => Verify::None,
            wire::Verify::Written => Verify::Written,
            wire::Verify::Full => Verify::Full,
        },
        keep_partial: job.request.keep_partial,
    });
    let prepared = match ask_to_prepare(job, &mut link, &message, &stamp, &theirs) {
        Ok(prepared) => prepared,
        Err(NotPrepared::Refused(cause)) => return Err(cause),
        Err(NotPrepared::Unclear(cause)) => {
            // It may be prepared, or become so yet: nothing of that is to stay.
            withdraw(&mut link, stamp, &cause, job.cancelled().is_none());
            return Err(cause);
        }
    };
    // The destination receives from here on: a link that is lost now is dialled again like any later one.
    let round_trip = measure_round_trip(&mut link);
    Ok(Drive {
        guest,
        job,
        round_trip: round_trip.unwrap_or_default(),
        stamp,
        epoch: prepared.epoch,
        prepared,
        peer: Peer { host: theirs.host, address: cut(&job.address.to_string()) },
        link,
        mirrors: Vec::new(),
        lanes: Lanes::default(),
        checkers: Checkers::default(),
        roots: heapless::Vec::new(),
        verified_bytes: 0,
        walks: heapless::Vec::new(),
        unknown: Vec::new(),
        down: false,
        link_lost: round_trip.is_err(),
        outage: Outage::default(),
        meter: Meter::new(job.exports.len(), round_trip.unwrap_or_default()),
        owed: None,
        pinged: Instant::now(),
        flushed: Instant::now(),
    })
}

/// The time from a question to its answer on an idle link.
fn measure_round_trip(link: &mut Link) -> Result<Duration, LinkError> {
    let began = Instant::now();
    let deadline = began + REPLY_TIMEOUT;
    link.send(&Message::Ping { number: 0 }, deadline)?;
    while Instant::now() < deadline {
        if let Some(Message::Pong { .. }) = link.receive(deadline)? {
            return Ok(began.elapsed());
        }
    }
    Err(LinkError::Late)
}

/// Why a destination is not prepared.
enum NotPrepared {
    /// It says so: nothing has changed there.
    Refused(String),
    /// It has been asked, and was not waited for or not understood.
    Unclear(String),
}

/// Sends PREPARE and waits for the answer.
fn ask_to_prepare(
    job: &Job,
    link: &mut Link,
    message: &Message,
    stamp: &Stamp,
    theirs: &Hello,
) -> Result<Prepared, NotPrepared> {
    let unclear = |cause: &str| NotPrepared::Unclear(cause.to_owned());
    let broken = |error: LinkError| NotPrepared::Unclear(error.to_string());
    link.send(message, Instant::now() + REPLY_TIMEOUT).map_err(broken)?;
    let deadline = Instant::now() + PREPARE_MAX;
    let mut heard = Instant::now();
    let prepared = loop {
        if let Some(cause) = job.cancelled() {
            return Err(NotPrepared::Unclear(cause));
        }
        let received = link.receive(Instant::now() + TICK).map_err(broken)?;
        if received.is_some() {
            heard = Instant::now();
        }
        match received {
            Some(Message::Prepared(prepared)) if prepared.stamp.matches(stamp) => break prepared,
            Some(Message::Refused { stamp: about, problems }) if about.matches(stamp) => {
                return Err(NotPrepared::Refused(preflight::report("refused by the destination", &problems)));
            }
            None if Instant::now() >= deadline => return Err(unclear("the destination does not get ready")),
            // While it works it says so.
            None if heard.elapsed() > LINK_SILENCE_MAX => return Err(unclear(SILENT)),
            _ => {}
        }
    };
    if prepared.disks.len() != job.exports.len() || prepared.instance != theirs.instance {
        return Err(unclear("the destination's answer does not fit the question"));
    }
    Ok(prepared)
}

/// Ends an attempt that has not begun here: tells the destination, and gives it a moment to say that it has heard.
fn withdraw(link: &mut Link, stamp: Stamp, cause: &str, keep: bool) {
    let deadline = Instant::now() + UNSEALED_PATIENCE;
    let mut sent = link.send(&Message::Abort { stamp, cause: cut(cause), keep }, deadline);
    while sent.is_ok() && Instant::now() < deadline {
        match link.receive(deadline) {
            Ok(Some(Message::Unsealed { .. } | Message::Record { .. })) => return,
            Ok(_) => {}
            Err(error) => sent = Err(error),
        }
    }
}

// ---- PERFORM and FINISH ------------------------------------------------------------------------------------------

/// A migration that the destination is prepared for.
struct Drive<'a> {
    guest: &'a Arc<Guest>,
    job: &'a Job,
    stamp: Stamp,
    prepared: Prepared,
    epoch: Epoch,
    peer: Peer,
    link: Link,
    /// How far away the destination is.
    round_trip: Duration,
    mirrors: Vec<Arc<Mirror>>,
    lanes: Lanes,
    /// Those who ask for digests.
    checkers: Checkers,
    /// One digest for each disk, once the guest is quiesced and everything is verified.
    roots: heapless::Vec<Digest, DISKS_MAX>,
    /// Bytes that they cover.
    verified_bytes: u64,
    /// Verification passes of each disk when the bulk pass was over.
    walks: heapless::Vec<u64, DISKS_MAX>,
    /// Regions whose copies may still be in a buffer of the destination: in flight until it is fenced (D4).
    unknown: Vec<Lost>,
    /// The lanes are ended and not open again.
    down: bool,
    /// The phase connection is dead.
    link_lost: bool,
    outage: Outage,
    meter: Meter,
    /// Since when the destination owes an answer and has said nothing at all.
    owed: Option<Instant>,
    /// When it was last asked whether it is there, and for a flush.
    pinged: Instant,
    flushed: Instant,
}

impl<'a> Drive<'a> {
    /// Copies until the final pass would be short enough, and, with `--hold`, until somebody says switch.
    fn perform(&mut self) -> Result<(), Stop> {
        let bells = Checkers::bells(self.job.exports.len());
        for (number, (export, ready)) in self.job.exports.iter().zip(self.prepared.disks.clone()).enumerate() {
            let fault = |cause: String| format!("disk {}: {cause}", export.name());
            let verified = verified(self.job.request.verify);
            let compare = ready.compare && !ready.reads_as_zero;
            let plan = Plan { verified, compare, bell: Arc::clone(&bells[number % bells.len()]) };
            let mirror = Mirror::arm(export, &self.job.budget, &plan).map_err(fault)?;
            // D1: the first extent is asked for after arming.
            mirror.scan(ready.reads_as_zero).map_err(|error| fault(error.to_string()))?;
            self.mirrors.push(mirror);
        }
        let peer = verify::Peer {
            guest: self.guest,
            address: &self.job.address,
            stamp: self.stamp,
            instance: self.prepared.instance,
        };
        self.checkers = Checkers::start(&peer, &self.mirrors, &bells)?;
        self.compare()?;
        // A link that was lost meanwhile has brought them with it when it was mended.
        if !self.lanes.are_open() {
            match self.open_lanes() {
                Err(NotYet::GoOn(cause)) => self.recover(&cause)?,
                opened => opened?,
            }
        }
        self.copy_until_converged()
    }

    /// D12: what the destination has already is found out first; what differs is dirty, and copied later.
    fn compare(&mut self) -> Result<(), Stop> {
        while self.mirrors.iter().any(|mirror| mirror.is_comparing()) {
            self.look()?;
            let counts = self.counts();
            self.show(&counts, Verdict::TooLong, false);
        }
        Ok(())
    }

    fn copy_until_converged(&mut self) -> Result<(), Stop> {
        loop {
            self.look()?;
            let counts = self.counts();
            self.meter.sample(&counts);
            let limit = if self.job.is_switched() { QUIESCE_MAX / 2 } else { self.job.downtime_limit() };
            let verdict = self.meter.verdict(&counts, limit);
            let bulk_over = counts.iter().all(|c| c.passes > 1 || c.outstanding.granules == 0);
            let converged = verdict == Verdict::Converged
                && bulk_over
                && counts.iter().all(|c| c.flushes > 0)
                && self.has_caught_up(&counts);
            self.show(&counts, verdict, converged);
            if converged && (!self.job.request.hold || self.job.is_switched()) {
                return Ok(());
            }
            // Whatever the verdict: it counts the last flush, and one that was slow would never be measured again.
            if bulk_over && self.flushed.elapsed() >= FLUSH_PERIOD {
                self.flushed = Instant::now();
                self.mirrors.iter().for_each(|mirror| mirror.ask_for_flush());
            }
        }
    }

    /// Whether the verification has followed the bulk pass to its end: what is left of that is not to be hashed while
    /// the guest waits, even if the allowed downtime would do. Only after the bulk pass. A walk always ends, so this
    /// keeps nobody waiting for long.
    fn has_caught_up(&mut self, counts: &[Counts]) -> bool {
        if !self.mirrors.iter().any(|mirror| mirror.verifies()) {
            return true;
        }
        if self.walks.is_empty() {
            self.walks = counts.iter().map(|c| c.verify_walks).collect();
            self.mirrors.iter().for_each(|mirror| mirror.verify_soon());
        }
        have_caught_up(counts, &self.walks)
    }

    /// Hands over.
    fn finish(&mut self) -> Result<Handed, Stop> {
        let attempt = self.stamp.attempt;
        let offer = Event::Offer { stamp: self.stamp, to: self.peer.clone() };
        // A full disk ends the attempt now, while the guest runs, and not when GIVEN must be written.
        let give = [offer.clone(), Event::Give { sealed: self.stamp }, Event::Running(self.stamp)];
        let end = [offer.clone(), Event::End { attempt }, Event::Unsealed(self.stamp)];
        self.guest.write_ahead(&[&give, &end])?;
        self.mirrors.iter().for_each(|mirror| mirror.verify_soon());
        // M5: durable before anything that lets the destination seal.
        self.record(&offer)?;
        let mut tries = 0;
        let (held, quiesced) = loop {
            match self.final_pass() {
                Ok(passed) => break passed,
                Err(NotYet::Stop(stop)) => return Err(stop),
                Err(NotYet::GoOn(cause)) => {
                    tries += 1;
                    log::warn!("migration: switchover put off: {cause}");
                    if tries == SWITCHOVERS_MAX {
                        return Err(format!("switchover failed {tries} times: {cause}").into());
                    }
                    if self.mirrors.iter().all(|mirror| mirror.lost().is_none()) {
                        self.pause(SWITCHOVER_PAUSE)?;
                    }
                    self.copy_until_converged()?;
                }
            }
        };
        // Nothing is left to copy: the lanes go quietly, before the destination ends them.
        self.mirrors.iter().for_each(|mirror| mirror.stop());
        self.checkers.stop();
        // From here on the gates open only for an attempt that has ended.
        let given = self.seal().and_then(|()| {
            // Nobody can have opened a gate meanwhile; were it so, a write would be missing at the destination.
            let left: u64 = self.counts().iter().map(|counts| counts.outstanding.granules + counts.unverified).sum();
            if left > 0 || !quiesced.holds() {
                return Err("the guest has written after the final pass".into());
            }
            // W3: nor is anything left where it cannot be seen from here.
            self.prove(&held, Instant::now() + ATTACHED_PROOF_MAX)?;
            self.job.close_decision("the guest is given away")?;
            self.show_phase(Phase::Give);
            self.record(&Event::Give { sealed: self.stamp })
        });
        if let Err(stop) = given {
            if let Stop::Abort(_) = stop {
                // M3: it ends for good, and only then does the guest go on.
                self.record(&Event::End { attempt: self.stamp.attempt })?;
                drop(quiesced);
            } else {
                quiesced.fence();
            }
            return Err(stop);
        }
        let since = quiesced.since();
        quiesced.fence();
        let farewell = held.given(self.guest);
        self.lanes.end();
        let handed = self.give(since, Instant::now() + RUNNING_PATIENCE);
        // W5: found out meanwhile, as a rule.
        Ok(match (handed, farewell.late(ATTACHED_PROOF_MAX)) {
            (Handed::Over(_), Some(late)) => Handed::OverBut(late),
            (handed, _) => handed,
        })
    }

    /// Quiesces the guest and copies what is left: when this returns, the destination has everything, flushed (D5), and
    /// no page cache of this host holds more (W2).
    fn final_pass(&mut self) -> Result<(Held<'a>, Quiesced), NotYet> {
        let guest = self.guest;
        let held =
            guest.attached.hold().ok_or_else(|| NotYet::GoOn("a disk is being attached or detached".to_owned()))?;
        if !held.is_empty() {
            self.write_out(&held)?;
            self.copy_until_converged().map_err(NotYet::Stop)?;
        }
        self.show_phase(Phase::Final);
        let deadline = Instant::now() + QUIESCE_MAX;
        let exports: Vec<_> = self.guest.exports().filter(|export| !export.is_read_only()).cloned().collect();
        let quiesced = quiesce(&exports, deadline)
            .map_err(|disk| NotYet::GoOn(format!("disk {disk}: requests in flight do not end")))?;
        self.mirrors.iter().for_each(|mirror| mirror.hurry(&quiesced));
        let ready = self.settle_mirrors(&quiesced, deadline);
        self.mirrors.iter().for_each(|mirror| mirror.relax());
        ready.and_then(|()| self.prove(&held, deadline.min(Instant::now() + ATTACHED_PROOF_MAX)))?;
        Ok((held, quiesced))
    }

    /// W1: has the kernel write out what the guest has written through `/dev/nbdN`, while the gates are open and the
    /// mirror runs.
    fn write_out(&mut self, held: &Held<'_>) -> Result<(), NotYet> {
        if let Some(user) = self.guest.attached.user().filter(|_| !self.job.request.hold) {
            return stop(&format!("{user}, and would be switched without a word: use --hold, and switch"));
        }
        let deadline = Instant::now() + ATTACHED_SYNC_MAX;
        let mut syncs = held.sync().map_err(NotYet::GoOn)?;
        while !syncs.wait(Instant::now()).map_err(|cause| NotYet::Stop(cause.into()))? {
            if Instant::now() >= deadline {
                let seconds = ATTACHED_SYNC_MAX.as_secs();
                return Err(NotYet::GoOn(format!("{}: not written back in {seconds} s", syncs.slowest())));
            }
            self.look().map_err(NotYet::Stop)?;
        }
        Ok(())
    }

    /// W2, W3: with closed gates a sync ends only where nothing is left to be written.
    fn prove(&self, held: &Held<'_>, deadline: Instant) -> Result<(), NotYet> {
        let mut syncs = held.sync().map_err(NotYet::GoOn)?;
        if syncs.wait(deadline).map_err(|cause| NotYet::Stop(cause.into()))? {
            return Ok(());
        }
        Err(NotYet::GoOn(format!("{} is still being written: the VMM must be stopped", syncs.slowest())))
    }

    /// A connection that is lost now, or that does not get on, is not mended while the guest waits: that takes as long
    /// as the link pleases. The guest goes on, new connections are opened, and there is another final pass.
    fn settle_mirrors(&mut self, quiesced: &Quiesced, deadline: Instant) -> Result<(), NotYet> {
        for mirror in &self.mirrors {
            match mirror.settle(quiesced, deadline) {
                Ok(()) => {}
                Err(NotReady::Lost(cause)) => return Err(NotYet::GoOn(cause)),
                Err(NotReady::TooSlow) => {
                    self.down = true;
                    return Err(NotYet::GoOn(format!("disk {}: the final pass takes too long", mirror.name())));
                }
                Err(NotReady::Unverified(cause)) => {
                    return Err(NotYet::GoOn(format!("disk {}: {cause}", mirror.name())));
                }
                Err(NotReady::Failed(failure)) => return Err(NotYet::Stop(failure.text.into())),
            }
        }
        self.roots.clear();
        self.verified_bytes = 0;
        for (root, bytes) in self.mirrors.iter().filter_map(|mirror| mirror.root()) {
            // As many as there are disks.
            let _ = self.roots.push(root);
            self.verified_bytes += bytes;
        }
        let copied = |name: &str| self.mirrors.iter().any(|mirror| mirror.name() == name);
        quiesced.flush(copied).map_err(|cause| NotYet::Stop(cause.into()))
    }

    /// SEAL, said again over a new connection if need be, until SEALED.
    fn seal(&mut self) -> Result<(), Stop> {
        self.show_phase(Phase::Seal);
        let deadline = Instant::now() + SEAL_MAX;
        let message = Message::Seal { stamp: self.stamp, digests: self.roots.clone() };
        let mut said = self.say(&message);
        let mut pause = None;
        while Instant::now() < deadline {
            match said.and_then(|()| self.listen()) {
                Ok(Some(Message::Sealed { fsync_us, .. })) => {
                    log::info!("migration: sealed, the destination's last sync took {fsync_us} us");
                    return Ok(());
                }
                Ok(Some(Message::Failed { cause, .. })) => return Err(format!("the destination: {cause}").into()),
                Ok(Some(Message::Unsealed { .. } | Message::Record { .. })) => {
                    return Err("the destination cannot seal this attempt any more".into());
                }
                Ok(_) => said = Ok(()),
                Err(cause) => {
                    // At once the first time, for the guest waits. A destination that goes on hanging up cannot make
                    // its record durable now (M4).
                    match &mut pause {
                        None => pause = Some(RECONNECT_PAUSE.0),
                        Some(pause) => self.rest(pause, deadline, &cause)?,
                    }
                    self.redial(&cause, deadline)?;
                    said = self.say(&message);
                }
            }
            if let Some(cause) = self.job.cancelled() {
                return Err(cause.into());
            }
        }
        Err("the destination does not answer to SEAL".into())
    }

    /// GO, until the destination says that it owns, or until the patience of whoever waits is at its end. Any process
    /// of the destination can answer: what it needs to own, it has on its disks.
    fn give(&mut self, since: Instant, deadline: Instant) -> Handed {
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            // A connection that has fallen silent must not keep the guest waiting for as long as there is patience.
            let patience = deadline.min(Instant::now() + GO_PATIENCE);
            match settle::converse(self.guest, &mut self.link, patience) {
                Ok((_, heard)) if !settle::is_needed(self.guest) => return Handed::Over(heard.duration_since(since)),
                _ if !settle::is_needed(self.guest) => return Handed::Over(since.elapsed()),
                Ok((answer, _)) => log::info!("migration: GO is answered by {}", answer.name()),
                Err(Trouble::NotDurable(cause)) => return Handed::OverBut(cause),
                Err(Trouble::Silent(cause)) => {
                    log::info!("migration: GO: {cause}");
                    self.job.lose(Instant::now(), &cause);
                }
            }
            if Instant::now() + pause >= deadline {
                return Handed::Unheard;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
            match dial(self.guest, &self.job.address, Role::Source, deadline) {
                Ok((link, _)) => {
                    self.link = link;
                    self.job.find();
                }
                Err(no_link) => {
                    log::info!("migration: {no_link}");
                    self.job.still_lost(&no_link.to_string());
                }
            }
        }
    }

    // ---- what happens meanwhile ----

    /// Takes in what has happened: cancels, failures, messages, lost connections. Waits a moment for a message.
    fn look(&mut self) -> Result<(), Stop> {
        if let Some(cause) = self.job.cancelled() {
            return Err(cause.into());
        }
        if let Some(failure) = self.mirrors.iter().find_map(|mirror| mirror.failure()) {
            return Err(failure.text.into());
        }
        if self.down {
            return Ok(self.recover("the data connections are down")?);
        }
        if let Some(cause) = self.mirrors.iter().find_map(|mirror| mirror.lost()) {
            return Ok(self.recover(&cause)?);
        }
        match self.listen() {
            Ok(Some(Message::Failed { cause, .. })) => Err(format!("the destination: {cause}").into()),
            Ok(_) => Ok(()),
            Err(cause) => Ok(self.recover(&cause)?),
        }
    }

    /// Waits a moment for a message about this attempt, and asks whether the destination is there when it is time.
    ///
    /// # Errors
    /// The link is lost; one that is silent for too long counts as that.
    fn listen(&mut self) -> Result<Option<Message>, String> {
        let ping = (self.pinged.elapsed() >= PING_PERIOD).then_some(Message::Ping { number: 0 });
        if ping.is_some() {
            self.pinged = Instant::now();
        }
        let heard = self.converse(ping.as_ref())?;
        if self.owed.is_some_and(|since| since.elapsed() > LINK_SILENCE_MAX) {
            self.link_lost = true;
            return Err(SILENT.to_owned());
        }
        Ok(heard)
    }

    /// Says what is to be answered.
    fn say(&mut self, message: &Message) -> Result<(), String> {
        self.send(message).map_err(|error| self.lost_link(error))
    }

    fn pause(&mut self, time: Duration) -> Result<(), Stop> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look()?;
        }
        Ok(())
    }

    /// Says `message`, if there is one, and waits a moment for one about this attempt.
    fn converse(&mut self, message: Option<&Message>) -> Result<Option<Message>, String> {
        self.exchange(message).map_err(|error| self.lost_link(error))
    }

    fn lost_link(&mut self, error: LinkError) -> String {
        self.link_lost = true;
        error.to_string()
    }

    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.owed.get_or_insert_with(Instant::now);
        self.link.send(message, Instant::now() + LINK_SILENCE_MAX)
    }

    fn exchange(&mut self, message: Option<&Message>) -> Result<Option<Message>, LinkError> {
        if let Some(message) = message {
            self.send(message)?;
        }
        let look = Instant::now() + TICK;
        while let Some(message) = self.link.receive(look)? {
            self.owed = None;
            if message.stamp().is_some_and(|stamp| stamp.matches(&self.stamp)) {
                return Ok(Some(message));
            }
            if Instant::now() >= look {
                break;
            }
        }
        Ok(None)
    }

    /// What was verified of what was handed over.
    fn receipt(&self, counts: &[Counts]) -> Receipt {
        Receipt {
            attempt: self.stamp.attempt,
            lineage: self.stamp.lineage,
            order: self.stamp.order,
            peer: self.peer.clone(),
            gave: true,
            verified: verified(self.job.request.verify),
            verified_bytes: self.verified_bytes,
            root: if self.roots.is_empty() { [0; 32] } else { root_of_all(&self.roots) },
            sent_bytes: Some(counts.iter().map(|c| c.sent).sum()),
            equal_bytes: Some(counts.iter().map(|c| c.equal).sum()),
        }
    }

    fn record(&self, event: &Event) -> Result<(), Stop> {
        match self.guest.apply(event) {
            Ok(_) => Ok(()),
            Err(KeepError::Refused(refusal)) => Err(Stop::Abort(refusal.to_string())),
            Err(error @ KeepError::Unknown(_)) => Err(Stop::Unknown(error.to_string())),
        }
    }

    // ---- what is shown ----

    fn counts(&self) -> Vec<Counts> {
        self.mirrors.iter().map(|mirror| mirror.counts()).collect()
    }

    fn show_phase(&self, phase: Phase) {
        let counts = self.counts();
        self.job.show(|progress| {
            progress.phase = phase;
            progress.held = false;
            progress.disks = self.disks(&counts);
        });
    }

    fn show(&self, counts: &[Counts], verdict: Verdict, converged: bool) {
        let bulk = counts.iter().any(|c| c.passes <= 1);
        let predicted = self.meter.predicted_final(counts).as_millis();
        self.job.show(|progress| {
            progress.phase = if bulk { Phase::Bulk } else { Phase::Passes };
            progress.convergence = match verdict {
                _ if converged => Convergence::Converged,
                Verdict::GuestIsFaster(rates) if !bulk => {
                    Convergence::GuestIsFaster { dirty_rate_bytes: rates.dirtied, rate_bytes: rates.copied }
                }
                // Fits, but its flush has not been measured yet.
                Verdict::Converged => Convergence::Copying,
                _ if bulk => Convergence::Copying,
                _ => Convergence::TooLong,
            };
            progress.predicted_final_ms = u32::try_from(predicted).ok();
            progress.downtime_limit_ms = u32::try_from(self.job.downtime_limit().as_millis()).unwrap_or(u32::MAX);
            progress.bandwidth_bytes = self.job.budget.rate();
            progress.held = converged && self.job.request.hold && !self.job.is_switched();
            progress.disks = self.disks(counts);
        });
    }

    fn disks(&self, counts: &[Counts]) -> heapless::Vec<DiskProgress, DISKS_MAX> {
        let disk = |(number, (mirror, counts)): (usize, (&Arc<Mirror>, &Counts))| {
            let rates = self.meter.rates(number);
            let left = counts.outstanding.bytes;
            let gain = rates.copied.saturating_sub(rates.dirtied);
            let estimate = if left == 0 { Some(0) } else { left.checked_div(gain) };
            DiskProgress {
                name: text(mirror.name()),
                size_bytes: mirror.size(),
                left_bytes: left,
                sent_bytes: counts.sent,
                resent_bytes: counts.resent,
                zero_bytes: counts.zeroed,
                rate_bytes: rates.copied,
                dirty_rate_bytes: rates.dirtied,
                passes: counts.passes,
                estimate_s: estimate.and_then(|seconds| u32::try_from(seconds).ok()),
                equal_bytes: counts.equal,
                verified_bytes: counts.verified,
                unverified_bytes: counts.unverified,
            }
        };
        // No more mirrors than disks, which fit.
        self.mirrors.iter().zip(counts).enumerate().map(disk).take(DISKS_MAX).collect()
    }
}

/// Whether a walk that began after `walks` has verified each disk, and what is left can be verified now: while nobody
/// asks for digests the gates would close for nothing.
fn have_caught_up(counts: &[Counts], walks: &[u64]) -> bool {
    counts.iter().zip(walks).all(|(counts, before)| {
        let walked = counts.verify_walks.saturating_sub(*before);
        !counts.verifier_lost && (walked > 1 || walked == 1 && counts.unverified < SATURATED_MIN)
    })
}

fn verified(verify: wire::Verify) -> Verified {
    match verify {
        wire::Verify::None => Verified::Nothing,
        wire::Verify::Written => Verified::Written,
        wire::Verify::Full => Verified::Full,
    }
}

// ---- the failure path --------------------------------------------------------------------------------------------

/// Ends an attempt that is not given: for good first, then the destination is told (M3), and UNSEALED is waited for a
/// little (M6). If the guest was offered and the destination cannot be reached, the process goes on asking (M5).
fn abort(mut drive: Drive<'_>, cause: &str) -> Result<(), String> {
    log::warn!("migration: aborted: {cause}");
    drive.show_phase(Phase::Abort);
    drive.job.find();
    // Somebody may have cancelled already: that is what is happening.
    let _ = drive.job.close_decision("the migration is being aborted");
    if let Err(Stop::Abort(cause) | Stop::Unknown(cause)) = drive.record(&Event::End { attempt: drive.stamp.attempt }) {
        return Err(cause);
    }
    // Given back without a fence: nobody copies them any more.
    drop(drive.lanes.end());
    drive.checkers.stop();
    drive.unknown.clear();
    drive.mirrors.clear();
    // Who was out of reach is not waited for: the source has ended the attempt, and asks on by itself if it must know.
    let deadline = Instant::now() + if drive.link_lost { LOST_PATIENCE } else { UNSEALED_PATIENCE };
    // What was sent is worth keeping when it was a connection that was lost, and not anybody's wish or a disk's error.
    let keep = (drive.down || drive.link_lost) && drive.job.cancelled().is_none();
    let message = Message::Abort { stamp: drive.stamp, cause: cut(cause), keep };
    let mut ask = Some(&message);
    while Instant::now() < deadline {
        match drive.converse(ask.take()) {
            Ok(Some(Message::Unsealed { stamp })) => {
                if settle::is_needed(drive.guest)
                    && let Err(stop) = drive.record(&Event::Unsealed(stamp))
                {
                    log::error!("migration: {stop:?}");
                }
                return Ok(());
            }
            Ok(Some(Message::Record { .. })) => return Ok(()),
            Ok(_) => {}
            Err(lost) => {
                log::info!("migration: {lost}");
                // Not aside: an attempt that is being ended is not cancelled.
                let dialled = dial(drive.guest, &drive.job.address, Role::Source, deadline);
                match dialled.map(|(link, theirs)| drive.take_link(link, &theirs)) {
                    Ok(Ok(())) => ask = Some(&message),
                    _ => return Ok(()),
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
