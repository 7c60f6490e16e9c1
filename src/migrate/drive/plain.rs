//! A migration to a plain NBD server: qemu-nbd with a qcow2 image, nbdkit, a storage daemon.
//!
//! The same mirrors, lanes, meter and quiesce as to another blockferry, and none of its phases: there is nobody who
//! prepares, seals or owns. What is weaker, and what stands in its place:
//!
//! - **No fence (D4).** A connection that is lost ends the migration: its copies may still be written there.
//! - **No record there.** Nobody can be sealed, so nobody but this host can ever own by this attempt. OFFERED, GIVEN
//!   and "arrived" are written here alone, with no host ([`Host::NONE`]) at the server's URI as the peer. That the
//!   guest is there is true with GIVEN, which follows the answer to the last FLUSH; that nobody is sealed is true at
//!   any time. So this host says "unsealed" and "running" to itself, after a restart too (`settle.rs`). Whoever runs
//!   the guest from the server next says so with `claim`, once; here the way back is `recover --take-ownership`.
//! - **Nothing is kept from writing there.** That nobody else uses the export is the operator's care.
//! - **Digests are made here**, of what this disk and the server's export read as: what is verified has crossed the way
//!   twice. It needs a second connection that sees what the others have written, which not each server offers.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::*;
use crate::digest::Hasher;
use crate::dirty::DirtyMap;
use crate::disk::{Access, Cache, Content, Disk};
use crate::export::Export;
use crate::limits::{DIGEST_PAUSE, DIGESTS_MAX, REGION_MAX, WINDOW_MAX};
use crate::migrate::lanes::{Opened, connect_plain};
use crate::mirror::{Ask, Bell, Failure};
use crate::nbd::wire as nbd;
use crate::ownership::Host;
use crate::uri::NbdUri;
use crate::vmm::Vmm;

/// One disk of the server.
struct Target {
    uri: NbdUri,
    reads_as_zero: bool,
    /// To be read back, where anything is to be compared or verified.
    disk: Option<Disk>,
}

/// A migration for which the server is looked at and the connections are open.
struct Plain<'a> {
    guest: &'a Arc<Guest>,
    job: &'a Job,
    stamp: Stamp,
    peer: Peer,
    mirrors: Vec<Arc<Mirror>>,
    lanes: Lanes,
    readers: Readers,
    meter: Meter,
    proof: Proof,
    course: Course,
}

/// Drives one migration to its end.
pub(super) fn run(guest: &Arc<Guest>, job: &Job, uri: &NbdUri) -> Done {
    let prepared = targets(guest, job, uri).and_then(|targets| {
        let opened = open_lanes(job, &targets)?;
        Ok((targets, opened, course::stamp(guest, job, Host::NONE)?))
    });
    let (targets, opened, stamp) = match prepared {
        Ok(prepared) => prepared,
        Err(cause) => return ended(guest, job, Exit::Refused, &cause),
    };
    let mut plain = Plain {
        guest,
        job,
        stamp,
        peer: Peer { host: Host::NONE, address: cut(&uri.to_string()) },
        mirrors: Vec::new(),
        lanes: Lanes::default(),
        readers: Readers::default(),
        meter: Meter::new(job.exports.len(), Duration::ZERO),
        proof: Proof::default(),
        course: Course::new(),
    };
    let result = plain.perform(targets, opened).and_then(|()| plain.finish());
    let counts = plain.counts();
    let receipt = plain.proof.receipt(job, &stamp, &plain.peer, &counts);
    let mut done = match result {
        Ok(switchover) => {
            guest.keep_receipt(receipt.clone());
            let mut done = done(job, Exit::Done, Owner::Destination, "");
            done.switchover_us = Some(u64::try_from(switchover.as_micros()).unwrap_or(u64::MAX));
            done.receipt = Some(kept(&receipt).receipt);
            done
        }
        Err(Stop::Unknown(cause)) => done(job, Exit::Unknown, Owner::Unknown, &cause),
        Err(Stop::Abort(cause)) => match plain.abort(&cause) {
            Ok(()) => ended(guest, job, Exit::Aborted, &cause),
            Err(unknown) => done(job, Exit::Unknown, Owner::Unknown, &unknown),
        },
    };
    done.sent_bytes = counts.iter().map(|c| c.sent).sum();
    done.zero_bytes = counts.iter().map(|c| c.zeroed).sum();
    done.passes = counts.iter().map(|c| c.passes).max().unwrap_or(0);
    done.equal_bytes = counts.iter().map(|c| c.equal).sum();
    done.base_bytes = counts.iter().map(|c| c.based).sum();
    done
}

/// Looks at every disk that is to move, and at what it is to move into; all that is wrong is said at once.
fn targets(guest: &Guest, job: &Job, uri: &NbdUri) -> Result<Vec<Target>, String> {
    preflight::offers(&job.exports)?;
    if guest.attached.hold().is_none_or(|held| !held.is_empty()) {
        return Err("a disk is a device of this host (blockferry attach): not to a plain NBD server".to_owned());
    }
    if !matches!(guest.vmm, Vmm::None) {
        return Err(
            "the guest's state cannot go to a plain NBD server: serve it with --vmm none, and stop it".to_owned()
        );
    }
    if job.exports.len() > 1 && !uri.export.is_empty() {
        let disks = job.exports.len();
        return Err(format!("{disks} disks move, and the URI names one export: without a name each goes to its own"));
    }
    let (mut targets, mut problems) = (Vec::new(), Vec::new());
    for export in &job.exports {
        let uri = if job.exports.len() > 1 { uri.with_export(export.name()) } else { uri.clone() };
        match target(job, export, uri) {
            Ok(target) => targets.push(target),
            Err(cause) => problems.push(super::super::wire::Problem { disk: cut(export.name()), cause: cut(&cause) }),
        }
    }
    if problems.is_empty() { Ok(targets) } else { Err(preflight::report("refused", &problems)) }
}

fn target(job: &Job, export: &Export, uri: NbdUri) -> Result<Target, String> {
    let size = export.disk().ok_or("does not exist")?.size();
    // Looked at through the same eyes as a disk behind a server, which needs FLUSH and may be written.
    let disk = Disk::open(&PathBuf::from(uri.to_string()), Access::ReadWrite, Cache::Writeback)
        .map_err(|error| format!("{uri}: {error}"))?;
    let info = *disk.server().ok_or("no server")?;
    if disk.size() != size {
        return Err(format!("{uri} has {} bytes, and {size} at the source", disk.size()));
    }
    let granularity = DirtyMap::granularity_for(size);
    if u64::from(info.minimum_block) > granularity {
        return Err(format!("{uri} takes no request of less than {} bytes", info.minimum_block));
    }
    if info.requests(REGION_MAX.max(usize::try_from(granularity).unwrap_or(usize::MAX))) >= WINDOW_MAX {
        return Err(format!("{uri} takes no more than {} bytes at once", info.maximum_payload));
    }
    let content = disk.content().map_err(|error| format!("{uri} cannot be read: {}", crate::error::reason(&error)))?;
    if content == Content::Data && !job.request.overwrite && !job.request.incremental {
        return Err(format!(
            "{uri} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)"
        ));
    }
    let read_back = job.request.verify != wire::Verify::None || job.request.incremental;
    if read_back && !info.has(nbd::FLAG_CAN_MULTI_CONN) {
        let way_out =
            if job.request.incremental { "without --copy-storage-inc, --verify none" } else { "--verify none" };
        return Err(format!(
            "{uri} cannot be read back while it is written: it is not for several connections ({way_out})"
        ));
    }
    Ok(Target { uri, reads_as_zero: content == Content::Hole, disk: read_back.then_some(disk) })
}

fn open_lanes(job: &Job, targets: &[Target]) -> Result<Vec<Opened>, String> {
    let disks: Vec<_> = targets
        .iter()
        .zip(&job.exports)
        .map(|(target, export)| {
            let size = export.disk().map_or(0, |disk| disk.size());
            (target.uri.clone(), export.name().to_owned(), size)
        })
        .collect();
    connect_plain(&disks, job.request.connections.max(1))
}

impl Plain<'_> {
    /// Copies until the final pass would be short enough, and, with `--hold`, until somebody says switch.
    fn perform(&mut self, targets: Vec<Target>, opened: Vec<Opened>) -> Result<(), Stop> {
        let mut causes = base::Causes::default();
        for (export, target) in self.job.exports.iter().zip(targets) {
            let fault = |cause: String| format!("disk {}: {cause}", export.name());
            let verified = verified(self.job.request.verify);
            let compare = self.job.request.incremental && !target.reads_as_zero;
            let plan = Plan { verified, compare, bell: Arc::default() };
            let layers = base::layers_of(self.job, compare, target.disk.as_ref());
            let mirror = Mirror::arm(export, &self.job.budget, &plan).map_err(fault)?;
            // D1: the first extent is asked for after arming.
            causes.add(&mirror, base::scan(&mirror, target.reads_as_zero, layers).map_err(fault)?);
            if let Some(disk) = target.disk.filter(|_| mirror.is_comparing() || mirror.verifies()) {
                self.readers.start(&mirror, &plan.bell, disk)?;
            }
            self.mirrors.push(mirror);
        }
        causes.show(self.job);
        while self.mirrors.iter().any(|mirror| mirror.is_comparing()) {
            self.look()?;
            let counts = self.counts();
            self.show(&counts, Verdict::TooLong, false);
        }
        self.lanes.start(&self.mirrors, opened)?;
        self.copy_until_converged()
    }

    /// Takes in what has happened, and waits a moment.
    fn look(&self) -> Result<(), Stop> {
        if let Some(cause) = self.job.cancelled() {
            return Err(cause.into());
        }
        if let Some(failure) = self.mirrors.iter().find_map(|mirror| mirror.failure()) {
            return Err(failure.text.into());
        }
        // D4: what was under way may be written there at any later moment, and nobody can fence it.
        if let Some(cause) = self.mirrors.iter().find_map(|mirror| mirror.lost()) {
            return Err(format!("the server is lost, and a plain NBD server cannot be gone on with: {cause}").into());
        }
        std::thread::sleep(TICK);
        Ok(())
    }

    fn copy_until_converged(&mut self) -> Result<(), Stop> {
        loop {
            self.look()?;
            let counts = self.counts();
            let now = self.course.assess(self.job, &self.mirrors, &mut self.meter, &counts);
            self.show(&counts, now.verdict, now.converged);
            if now.may_switch(self.job) {
                return Ok(());
            }
            if now.bulk_over {
                self.course.flush(&self.mirrors);
            }
        }
    }

    /// Hands over: OFFERED, quiesce, what is left, the last FLUSH answered, GIVEN. Returns how long the guest's writes
    /// waited until the server had everything.
    fn finish(&mut self) -> Result<Duration, Stop> {
        course::write_ahead(self.guest, self.stamp, &self.peer)?;
        self.record(&Event::Offer { stamp: self.stamp, to: self.peer.clone() })?;
        let mut tries = 0;
        let quiesced = loop {
            match self.final_pass() {
                Ok(quiesced) => break quiesced,
                Err(NotYet::Stop(stop)) => return Err(stop),
                Err(NotYet::GoOn(cause)) => {
                    tries += 1;
                    log::warn!("migration: switchover put off: {cause}");
                    if tries == SWITCHOVERS_MAX {
                        return Err(format!("switchover failed {tries} times: {cause}").into());
                    }
                    std::thread::sleep(SWITCHOVER_PAUSE);
                    self.copy_until_converged()?;
                }
            }
        };
        self.mirrors.iter().for_each(|mirror| mirror.stop());
        self.readers.stop();
        let given = course::check_nothing_left(&quiesced, &self.counts()).and_then(|()| {
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
        let switchover = since.elapsed();
        self.lanes.end();
        // Everything is there since before GIVEN: nobody has to be waited for.
        if let Err(Stop::Abort(cause) | Stop::Unknown(cause)) = self.record(&Event::Running(self.stamp)) {
            log::error!("migration: that the guest has arrived is not durable yet: {cause}");
        }
        Ok(switchover)
    }

    fn final_pass(&mut self) -> Result<Quiesced, NotYet> {
        course::flush_others_ahead(self.guest, &self.mirrors, || self.look())?;
        self.show_phase(Phase::Final);
        let deadline = Instant::now() + QUIESCE_MAX;
        let quiesced = course::quiesce_guest(self.guest, deadline)?;
        self.mirrors.iter().for_each(|mirror| mirror.hurry(&quiesced));
        let settled = self.settle_mirrors(&quiesced, deadline);
        self.mirrors.iter().for_each(|mirror| mirror.relax());
        settled.map(|()| quiesced)
    }

    fn settle_mirrors(&mut self, quiesced: &Quiesced, deadline: Instant) -> Result<(), NotYet> {
        for mirror in &self.mirrors {
            let name = mirror.name();
            match mirror.settle(quiesced, deadline) {
                Ok(()) => {}
                // D4: it cannot be gone on with.
                Err(NotReady::Lost(cause)) => {
                    return Err(NotYet::Stop(format!("disk {name}: the server is lost: {cause}").into()));
                }
                Err(NotReady::TooSlow) => {
                    return Err(NotYet::GoOn(format!("disk {name}: the final pass takes too long")));
                }
                Err(NotReady::Unverified(cause)) => return Err(NotYet::GoOn(format!("disk {name}: {cause}"))),
                Err(NotReady::Failed(failure)) => return Err(NotYet::Stop(failure.text.into())),
            }
        }
        self.proof = Proof::of(&self.mirrors);
        course::flush_others(self.guest, &self.mirrors, true)
    }

    /// Ends an attempt that is not given. Nobody is sealed there, so the offer is settled here and now (M5).
    fn abort(mut self, cause: &str) -> Result<(), String> {
        log::warn!("migration: aborted: {cause}");
        self.show_phase(Phase::Abort);
        // Somebody may have cancelled already: that is what is happening.
        let _ = self.job.close_decision("the migration is being aborted");
        self.readers.stop();
        self.lanes.land();
        if !self.lanes.end().is_empty() {
            let peer = &self.peer;
            log::warn!(
                "migration: writes are still on their way to {}: start that server anew before the next attempt",
                peer.address
            );
        }
        self.mirrors.clear();
        let ended = self.record(&Event::End { attempt: self.stamp.attempt });
        let settled = ended.and_then(|()| {
            if settle::is_needed(self.guest) { self.record(&Event::Unsealed(self.stamp)) } else { Ok(()) }
        });
        settled.map_err(|stop| match stop {
            Stop::Abort(cause) | Stop::Unknown(cause) => cause,
        })
    }

    fn record(&self, event: &Event) -> Result<(), Stop> {
        course::record(self.guest, event)
    }

    fn counts(&self) -> Vec<Counts> {
        self.mirrors.iter().map(|mirror| mirror.counts()).collect()
    }

    fn show_phase(&self, phase: Phase) {
        let disks = shown::disks(&self.mirrors, &self.meter, &self.counts());
        self.job.show(|progress| {
            progress.phase = phase;
            progress.held = false;
            progress.disks = disks;
        });
    }

    fn show(&self, counts: &[Counts], verdict: Verdict, converged: bool) {
        shown::show(self.job, &self.mirrors, &self.meter, counts, verdict, converged);
    }
}

/// The threads that read back what is there, one for each disk.
#[derive(Default)]
struct Readers {
    stop: Arc<AtomicBool>,
    threads: Vec<(Arc<Bell>, JoinHandle<()>)>,
}

impl Readers {
    fn start(&mut self, mirror: &Arc<Mirror>, bell: &Arc<Bell>, there: Disk) -> Result<(), String> {
        let (mirror, ring, stop) = (Arc::clone(mirror), Arc::clone(bell), Arc::clone(&self.stop));
        let thread = std::thread::Builder::new()
            .name(format!("digests {}", mirror.name()))
            .stack_size(crate::limits::DRIVER_STACK)
            .spawn(move || read_back(&mirror, &there, &ring, &stop))
            .map_err(|error| format!("no thread for digests: {error}"))?;
        self.threads.push((Arc::clone(bell), thread));
        Ok(())
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for (bell, thread) in self.threads.drain(..) {
            bell.ring();
            let _ = thread.join();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Hashes here and there what is to be compared or verified, until told to end (D14).
fn read_back(mirror: &Mirror, there: &Disk, bell: &Bell, stop: &AtomicBool) {
    let (mut ours, mut theirs) = (Hasher::default(), Hasher::default());
    let (mut here, mut back) = ([[0; 32]; DIGESTS_MAX], [[0; 32]; DIGESTS_MAX]);
    while !stop.load(Ordering::Acquire) && (mirror.is_comparing() || mirror.verifies()) {
        match mirror.ask_next() {
            Ask::Hash(claim) => {
                let began = Instant::now();
                let count = claim.count();
                let (here, back) = (&mut here[..count], &mut back[..count]);
                let hashed = mirror.hash(&mut ours, &claim, here).and_then(|read| {
                    theirs.regions(there, claim.first(), back).map(|_| read).map_err(|unread| Failure {
                        text: format!(
                            "read back: disk {}, {} bytes at {}: {}",
                            mirror.name(),
                            unread.length,
                            unread.offset,
                            crate::error::reason(&unread.error)
                        ),
                    })
                });
                match hashed {
                    Ok(read) => {
                        if read > 0 {
                            mirror.measured(read, began.elapsed());
                        }
                        mirror.compare(claim, here, back);
                    }
                    Err(failure) => {
                        drop(claim);
                        mirror.fail(failure);
                        break;
                    }
                }
            }
            Ask::Rest(time) => bell.wait(time.max(DIGEST_PAUSE)),
            Ask::Compared => mirror.end_comparison(),
        }
    }
    mirror.end_comparison();
}
