//! PREPARE: all that is wrong, said at once and before anything is touched; then record, files, PREPARED.
//!
//! Called by the destination's match, under the stage's lock. It never writes into a disk. The order is: look
//! (`check.rs`); end what is received from an earlier attempt (D4); list what will be made (`remains.rs`); record
//! RECEIVING; make it; complete the list; answer. Whatever fails on the way takes back what it has made.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

pub(super) use super::check::{Found, Problems, Target};
use super::digest::Digests;
use super::reception::{Reception, end_writers};
use super::remains::{self, Fate};
use super::state::about;
use super::{Inner, Session, Stage, check, refused_writes};
use crate::disk::{Disk, sync_directory_of};
use crate::guest::Guest;
use crate::limits::REPLY_TIMEOUT;
use crate::migrate::wire::{Epoch, Message, Prepare, Prepared, Token, Verify, cut};
use crate::ownership::{Event, Journal, Peer, Refusal, Stamp, Why, next};

impl Inner {
    pub(super) fn prepare(&mut self, guest: &Guest, session: &mut Session, offer: &Prepare) -> Result<Message, String> {
        let stamp = offer.stamp;
        let fresh = session.challenge.take_if(|ours| *ours == offer.challenge).is_some();
        let from = Peer { host: session.theirs.host, address: cut(&session.theirs.address) };
        let event = Event::Prepare { stamp, from: from.clone(), fresh };
        let refused = |problems: Problems| Ok(Message::Refused { stamp, problems: problems.list() });

        let mut problems = Problems::default();
        let current = guest.record().map_err(|error| error.to_string())?;
        let may = next(guest.host, current.as_ref(), &event);
        if let Err(refusal) = &may {
            problems.add("", refusal);
        }
        // Of a host that owns, or is sealed, nobody wants to know more. Whoever only cannot prove that it owns the
        // guest hears all of it: the disks are the next thing that its user has to see to.
        if let Err(Refusal { why: Why::Busy | Why::Sealed | Why::Ended | Why::Repeated, .. }) = &may {
            return refused(problems);
        }
        // D9: what comes of it is refused anyway; that it is doubtful must be known to whoever is started after this.
        if may.is_ok() && matches!(&self.stage, Stage::Receiving(reception) if reception.is_poisoned()) {
            self.give_up(guest, "a sync of a disk has failed", Fate::Remove);
        }
        // A state that has begun to come is not resumed, and the VMM that has taken it cannot take another.
        if may.is_ok()
            && matches!(&self.stage, Stage::Receiving(reception)
                if reception.state && guest.destination.state.has_begun(&reception.stamp))
        {
            self.give_up(guest, "another attempt has begun", Fate::Keep);
        }
        if let Err(cause) = check_vmm(guest, offer) {
            problems.add("", &cause);
        }
        let known = guest.journal().filter(|journal| journal.lineage == stamp.lineage);
        check::staying(guest, offer, &mut problems);
        let targets = check::targets(guest, offer, known.as_ref(), may.is_ok(), &mut problems);
        if may.is_ok()
            && let Some((disk, cause)) = guest.attached.kept(guest)
        {
            problems.add(&disk, &cause);
        }
        if may.is_ok()
            && let Err(cause) = guest.write_ahead(&[&[event.clone(), Event::Abort(stamp)]])
        {
            problems.add("", &cause);
        }
        if !problems.is_empty() {
            if may.is_ok() {
                self.renew_ahead(guest);
            }
            return refused(problems);
        }
        // D4: whatever any earlier attempt still has on its way is over before this one is answered.
        if !end_writers(guest.exports()) {
            problems.add("", &"requests of an earlier attempt do not end");
            return refused(problems);
        }
        self.give_up(guest, "another attempt has begun", Fate::Keep);
        // W6. Not where the record refuses in any case: the kernel may keep writes there that this host will want.
        if guest.rejected().is_none()
            && let Err((disk, cause)) = guest.attached.clear(guest)
        {
            problems.add(&disk, &cause);
            self.renew_ahead(guest);
            return refused(problems);
        }
        let mut reception = Reception {
            stamp,
            from: from.clone(),
            epoch: Epoch(0),
            token: Token::random().map_err(|error| error.to_string())?,
            exports: targets.iter().map(|target| Arc::clone(&target.export)).collect(),
            keep_partial: offer.keep_partial,
            state: offer.state,
            refused_before: refused_writes(guest),
            digests: Digests::new(Verify::None, &[]),
        };
        // What was received until now is remains now.
        let before = guest.journal().filter(|journal| journal.lineage == stamp.lineage);
        let journal = remains::list(&stamp, &from, offer.mode, before.as_ref(), &targets);
        if let Err(cause) = guest.write_journal(Some(journal.clone())) {
            problems.add("", &cause);
            remains::go_back(guest, &stamp, before);
            return refused(problems);
        }
        // The record before the files: from here on nobody claims what is being made.
        if let Err(error) = guest.apply(&event) {
            problems.add("", &error);
            remains::go_back(guest, &stamp, before);
            return refused(problems);
        }
        let mut made = Made::default();
        made.make(guest, targets, journal, &mut problems);
        if problems.is_empty()
            && let Err(cause) = write_ahead(guest, stamp)
        {
            problems.add("", &cause);
        }
        let begun = if problems.is_empty() {
            reception.begin(&made.targets, offer.mode).map_err(|error| problems.add("", &error))
        } else {
            Err(())
        };
        let Ok(disks) = begun else {
            made.take_back();
            remains::go_back(guest, &stamp, before);
            if let Err(error) = guest.apply(&Event::AbortReceiving { attempt: stamp.attempt }) {
                log::error!("migration: {error}");
            }
            return refused(problems);
        };
        // Their sizes are known only now.
        reception.digests = Digests::new(offer.verify, &reception.exports);
        let answer =
            Prepared { stamp, instance: guest.instance, epoch: reception.epoch, token: reception.token, disks };
        log::info!("migration: attempt {:.8} is received from host {:.8}", stamp.attempt, session.theirs.host);
        self.ended = None;
        guest.source.forget_ended();
        self.stage = Stage::Receiving(Box::new(reception));
        Ok(Message::Prepared(answer))
    }

    /// A PREPARE that is refused leaves nothing behind, and what is received goes on with all that was written ahead
    /// for it.
    fn renew_ahead(&self, guest: &Guest) {
        let renewed = match &self.stage {
            Stage::Receiving(reception) => write_ahead(guest, reception.stamp),
            Stage::Idle => guest.forget_ahead(),
        };
        if let Err(cause) = renewed {
            log::info!("migration: {cause}");
        }
    }
}

/// Whether the guest's state can come as the source wants to send it (M11).
fn check_vmm(guest: &Guest, offer: &Prepare) -> Result<(), String> {
    match (offer.state, guest.vmm.moves_state()) {
        (true, false) => Err("the source's --vmm moves the guest's state, and here is --vmm none".to_owned()),
        (false, true) => Err(format!("the source has --vmm none, and here is --vmm {}", guest.vmm)),
        (false, false) => Ok(()),
        (true, true) => {
            // A VMM cannot have been started that needs a disk which is not there yet, or which is shut.
            let may_come = guest.exports().any(|export| export.disk().is_none() || export.gate().is_shut());
            guest.vmm.check_arriving(&about(&offer.stamp), may_come, Instant::now() + REPLY_TIMEOUT)
        }
    }
}

/// What a PREPARE makes.
#[derive(Default)]
struct Made {
    targets: Vec<Target>,
    /// The places among them of the files that are new.
    new: Vec<usize>,
}

impl Made {
    /// Makes the files that are missing, has their names durable, and completes the journal: only then may data come.
    fn make(&mut self, guest: &Guest, targets: Vec<Target>, journal: Journal, problems: &mut Problems) {
        self.targets = targets;
        for (place, target) in self.targets.iter_mut().enumerate() {
            let fault = |cause: &dyn Display| format!("cannot create {}: {cause}", target.path.display());
            let made = match target.disk.take() {
                Some(disk) => Ok(disk),
                None if target.found != Found::Nothing => continue,
                None => Disk::create(&target.path, target.size_bytes, target.cache).map(|disk| {
                    self.new.push(place);
                    Arc::new(disk)
                }),
            };
            match made {
                Ok(disk) => target.export.set_disk(disk),
                Err(error) => problems.add(target.export.name(), &fault(&error)),
            }
        }
        for target in self.new.iter().map(|&place| &self.targets[place]) {
            if let Err(error) = sync_directory_of(&target.path) {
                problems.add(target.export.name(), &error);
            }
        }
        if !problems.is_empty() {
            return;
        }
        let complete = remains::complete(journal, &self.targets).and_then(|journal| {
            guest.write_journal(Some(journal.clone()))?;
            // Before SEALED it needs no room any more, and little time.
            guest.write_journal_ahead(&journal.retired())
        });
        if let Err(cause) = complete {
            problems.add("", &cause);
        }
    }

    /// Removes the files that were made just now, unless somebody put others in their place.
    fn take_back(&self) {
        for target in self.new.iter().map(|&place| &self.targets[place]) {
            // Whoever still uses it would go on writing into a file without a name.
            let ours = target.export.take_disk().map(|disk| disk.identity());
            if ours.is_some() && Disk::identify(&target.path) == ours {
                let _ = std::fs::remove_file(&target.path);
            }
        }
    }
}

/// What an attempt that begins will need: a full disk is noticed now, and not while the guest waits for SEALED.
fn write_ahead(guest: &Guest, stamp: Stamp) -> Result<(), String> {
    let seal = Event::Seal { stamp, images: guest.images()? };
    guest.write_ahead(&[&[seal, Event::Go(stamp)], &[Event::Abort(stamp)]])
}
