//! What a migration to another blockferry and one to a plain NBD server have in common: when the copy has come far
//! enough, what is verified of it, and the records and the quiesce of a hand-over.
//!
//! Called by `perform.rs`, `finish.rs` and `plain.rs`. Nothing here listens to anybody; what waits is the drain of a
//! quiesce and the syncs of disks that stay, while a guest waits too. How a lost connection or a cancel is noticed is
//! the caller's business.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::disk::Disk;
use crate::error::reason;
use crate::export::Export;
use crate::limits::{ATTACHED_PROOF_MAX, ATTACHED_SYNC_MAX, CONNECTION_STACK};
use crate::ownership::Host;

/// How far the copy is.
#[derive(Debug)]
pub(super) struct Course {
    /// Verification passes of each disk when the bulk pass was over.
    walks: heapless::Vec<u64, DISKS_MAX>,
    /// When a flush was asked for last.
    flushed: Instant,
}

/// What [`Course::assess`] has found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Assessed {
    /// The downtime that counts now.
    pub(super) limit: Duration,
    pub(super) verdict: Verdict,
    /// The bulk pass is over.
    pub(super) bulk_over: bool,
    /// The final pass may begin.
    pub(super) converged: bool,
}

impl Assessed {
    /// Nobody holds it, or somebody has said switch.
    pub(super) fn may_switch(&self, job: &Job) -> bool {
        self.converged && (!job.request.hold || job.is_switched())
    }
}

impl Course {
    pub(super) fn new() -> Self {
        Self { walks: heapless::Vec::new(), flushed: Instant::now() }
    }

    /// Whether the final pass would be short enough.
    pub(super) fn assess(
        &mut self,
        job: &Job,
        mirrors: &[Arc<Mirror>],
        meter: &mut Meter,
        counts: &[Counts],
    ) -> Assessed {
        meter.sample(counts);
        let limit = if job.is_switched() { QUIESCE_MAX / 2 } else { job.downtime_limit() };
        let verdict = meter.verdict(counts, limit);
        let bulk_over = counts.iter().all(|c| c.passes > 1 || c.outstanding.granules == 0);
        let converged = verdict == Verdict::Converged
            && bulk_over
            && counts.iter().all(|c| c.flushes > 0)
            && self.has_caught_up(mirrors, counts);
        Assessed { limit, verdict, bulk_over, converged }
    }

    /// Asks for a flush when it is time for one. Whatever the verdict: it counts the last flush, and one that was slow
    /// would never be measured again.
    pub(super) fn flush(&mut self, mirrors: &[Arc<Mirror>]) {
        if self.flushed.elapsed() >= FLUSH_PERIOD {
            self.flushed = Instant::now();
            mirrors.iter().for_each(|mirror| mirror.ask_for_flush());
        }
    }

    /// Whether the verification has followed the bulk pass to its end: what is left of that is not to be hashed while
    /// the guest waits, even if the allowed downtime would do. Only after the bulk pass. A walk always ends, so this
    /// keeps nobody waiting for long.
    fn has_caught_up(&mut self, mirrors: &[Arc<Mirror>], counts: &[Counts]) -> bool {
        if !mirrors.iter().any(|mirror| mirror.verifies()) {
            return true;
        }
        if self.walks.is_empty() {
            self.walks = counts.iter().map(|c| c.verify_walks).collect();
            mirrors.iter().for_each(|mirror| mirror.verify_soon());
        }
        have_caught_up(counts, &self.walks)
    }
}

/// Whether a walk that began after `walks` has verified each disk, and what is left can be verified now: while nobody
/// asks for digests the gates would close for nothing.
pub(super) fn have_caught_up(counts: &[Counts], walks: &[u64]) -> bool {
    counts.iter().zip(walks).all(|(counts, before)| {
        let walked = counts.verify_walks.saturating_sub(*before);
        !counts.verifier_lost && (walked > 1 || walked == 1 && counts.unverified < SATURATED_MIN)
    })
}

/// What is verified of what is handed over, once the guest is quiesced and everything is.
#[derive(Debug, Default)]
pub(super) struct Proof {
    /// One digest for each disk.
    pub(super) roots: heapless::Vec<Digest, DISKS_MAX>,
    /// Bytes that they cover.
    bytes: u64,
    /// Bytes that were taken as equal on the user's word, and that they do not cover.
    pub(super) unread: u64,
}

impl Proof {
    /// Of mirrors that have settled.
    pub(super) fn of(mirrors: &[Arc<Mirror>]) -> Self {
        let mut proof = Self::default();
        for (root, bytes) in mirrors.iter().filter_map(|mirror| mirror.root()) {
            // As many as there are disks.
            let _ = proof.roots.push(root);
            proof.bytes += bytes;
        }
        proof.unread = mirrors.iter().map(|mirror| mirror.unread()).sum();
        proof
    }

    /// The receipt of a hand-over.
    pub(super) fn receipt(&self, job: &Job, stamp: &Stamp, peer: &Peer, counts: &[Counts]) -> Receipt {
        Receipt {
            attempt: stamp.attempt,
            lineage: stamp.lineage,
            order: stamp.order,
            peer: peer.clone(),
            gave: true,
            verified: verified(job.request.verify),
            verified_bytes: self.bytes,
            root: if self.roots.is_empty() { [0; 32] } else { root_of_all(&self.roots) },
            sent_bytes: Some(counts.iter().map(|c| c.sent).sum()),
            equal_bytes: Some(counts.iter().map(|c| c.equal).sum()),
            unread_bytes: self.unread,
        }
    }
}

/// What every message and record of this attempt carries (M1).
pub(super) fn stamp(guest: &Guest, job: &Job, destination: Host) -> Result<Stamp, String> {
    let record = guest.record().map_err(|error| error.to_string())?.ok_or("this host owns nothing")?;
    Ok(Stamp {
        lineage: record.lineage,
        word: record.word,
        attempt: job.attempt,
        source: guest.host,
        destination,
        order: record.order.handed_over().ok_or("the order cannot rise further")?,
    })
}

/// Makes room for the records to come: a full disk ends the attempt now, while the guest runs, and not when GIVEN must
/// be written.
pub(super) fn write_ahead(guest: &Guest, stamp: Stamp, peer: &Peer) -> Result<(), Stop> {
    let offer = Event::Offer { stamp, to: peer.clone() };
    let give = [offer.clone(), Event::Give { sealed: stamp }, Event::Running(stamp)];
    let end = [offer, Event::End { attempt: stamp.attempt }, Event::Unsealed(stamp)];
    Ok(guest.write_ahead(&[&give, &end])?)
}

/// Lets the record change.
pub(super) fn record(guest: &Guest, event: &Event) -> Result<(), Stop> {
    match guest.apply(event) {
        Ok(_) => Ok(()),
        Err(KeepError::Refused(refusal)) => Err(Stop::Abort(refusal.to_string())),
        Err(error @ KeepError::Unknown(_)) => Err(Stop::Unknown(error.to_string())),
    }
}

/// Closes the gates of all disks that the guest may write, and drains them (D6).
pub(super) fn quiesce_guest(guest: &Guest, deadline: Instant) -> Result<Quiesced, NotYet> {
    let exports: Vec<_> = guest.exports().filter(|export| !export.is_read_only()).cloned().collect();
    quiesce(&exports, deadline).map_err(|disk| NotYet::GoOn(format!("disk {disk}: requests in flight do not end")))
}

/// The syncs of the disks that no mirror copies: the next host looks at them as soon as it owns. They go on aside, for
/// as long as they take.
pub(super) struct OtherSyncs {
    names: String,
    ended: Receiver<Result<(), String>>,
}

impl OtherSyncs {
    /// Begins them; `None`: every disk is copied.
    pub(super) fn begin(guest: &Guest, mirrors: &[Arc<Mirror>]) -> Result<Option<Self>, NotYet> {
        let stays = |export: &&Arc<Export>| !export.is_read_only() && mirrors.iter().all(|m| m.name() != export.name());
        let stay = guest.exports().filter(stays).filter_map(|export| Some((export.name().to_owned(), export.disk()?)));
        let others: Vec<(String, Arc<Disk>)> = stay.collect();
        if others.is_empty() {
            return Ok(None);
        }
        let names: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(", ");
        let (done, ended) = channel();
        let sync = move || {
            let mut each = others.iter();
            // Nobody may be waiting any more.
            let _ = done.send(
                each.try_for_each(|(name, disk)| disk.flush().map_err(|error| format!("flush: disk {name}: {error}"))),
            );
        };
        let thread = std::thread::Builder::new().name("sync others".to_owned()).stack_size(CONNECTION_STACK);
        thread.spawn(sync).map_err(|error| NotYet::GoOn(reason(&error)))?;
        Ok(Some(Self { names, ended }))
    }

    /// Whether they have ended, after waiting for `time` at most.
    pub(super) fn wait(&self, time: Duration) -> Result<bool, NotYet> {
        match self.ended.recv_timeout(time) {
            Ok(all) => all.map(|()| true).map_err(|cause| NotYet::Stop(cause.into())),
            Err(_) => Ok(false),
        }
    }

    /// They take longer than somebody waits.
    pub(super) fn late(&self) -> NotYet {
        NotYet::GoOn(format!("disk {}: does not move, and is not synced in time", self.names))
    }
}

/// Syncs the disks that no mirror copies while a guest waits for it at the gates: `runs`, and it has not been stopped,
/// so that it must not wait long (D6).
pub(super) fn flush_others(guest: &Guest, mirrors: &[Arc<Mirror>], runs: bool) -> Result<(), NotYet> {
    let Some(syncs) = OtherSyncs::begin(guest, mirrors)? else { return Ok(()) };
    let time = if runs { ATTACHED_PROOF_MAX } else { ATTACHED_SYNC_MAX };
    if syncs.wait(time)? { Ok(()) } else { Err(syncs.late()) }
}

/// The same before, while it runs, so that little is left: `look` looks at everything else meanwhile.
pub(super) fn flush_others_ahead(
    guest: &Guest,
    mirrors: &[Arc<Mirror>],
    mut look: impl FnMut() -> Result<(), Stop>,
) -> Result<(), NotYet> {
    let Some(syncs) = OtherSyncs::begin(guest, mirrors)? else { return Ok(()) };
    let deadline = Instant::now() + ATTACHED_SYNC_MAX;
    while !syncs.wait(Duration::ZERO)? {
        if Instant::now() >= deadline {
            return Err(syncs.late());
        }
        look().map_err(NotYet::Stop)?;
    }
    Ok(())
}

/// Whether anything has been written since the final pass: nobody can have opened a gate meanwhile; were it so, a write
/// would be missing at the destination.
pub(super) fn check_nothing_left(quiesced: &Quiesced, counts: &[Counts]) -> Result<(), Stop> {
    let left: u64 = counts.iter().map(|counts| counts.outstanding.granules + counts.unverified).sum();
    if left > 0 || !quiesced.holds() { Err("the guest has written after the final pass".into()) } else { Ok(()) }
}
