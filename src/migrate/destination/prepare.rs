//! PREPARE: all that is wrong, said at once and before anything is touched; then record, files, PREPARED.
//!
//! Called by the destination's match, under the stage's lock. It never writes into a disk.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use super::reception::{Reception, end_writers};
use super::{Inner, Session, Stage, refused_writes};
use crate::disk::Content;
use crate::domain::{Source, Stays};
use crate::export::Export;
use crate::guest::Guest;
use crate::limits::PROBLEMS_MAX;
use crate::migrate::wire::{DiskOffer, Epoch, Message, Mode, Prepare, Prepared, Problem, Token, cut};
use crate::ownership::{Event, Peer, Stamp, next};

impl Inner {
    pub(super) fn prepare(&mut self, guest: &Guest, session: &mut Session, offer: &Prepare) -> Result<Message, String> {
        let stamp = offer.stamp;
        let fresh = session.challenge.take_if(|ours| *ours == offer.challenge).is_some();
        let from = Peer { host: session.theirs.host, address: session.theirs.address.clone() };
        let event = Event::Prepare { stamp, from, fresh };
        let refused = |problems: Problems| Ok(Message::Refused { stamp, problems: problems.0 });

        let mut problems = Problems::default();
        let current = guest.record().map_err(|error| error.to_string())?;
        if let Err(refusal) = next(guest.host, current.as_ref(), &event) {
            problems.add("", &refusal);
            return refused(problems);
        }
        // D4: whatever any earlier attempt still has on its way is over before this one is answered.
        if !end_writers(guest.exports()) {
            problems.add("", &"requests of an earlier attempt do not end");
            return refused(problems);
        }
        self.give_up(guest, "another attempt has begun");
        let found = self.check(guest, offer, &mut problems);
        if !problems.0.is_empty() {
            return refused(problems);
        }
        let mut reception = Reception {
            stamp,
            epoch: Epoch(0),
            token: Token::random().map_err(|error| error.to_string())?,
            exports: found.iter().map(|(export, _)| Arc::clone(export)).collect(),
            created: Vec::new(),
            were_empty: Vec::new(),
            refused_before: refused_writes(guest),
        };
        if let Err(cause) = guest.write_ahead(&[&[event.clone(), Event::Abort(stamp)]]) {
            problems.add("", &cause);
            return refused(problems);
        }
        // The record first: from here on nobody claims what is being made.
        if let Err(error) = guest.apply(&event) {
            problems.add("", &error);
            return refused(problems);
        }
        for ((export, path), disk) in found.iter().zip(&offer.disks) {
            if let Err(error) = reception.create_missing(guest, export, path, disk) {
                problems.add(&disk.name, &error);
            }
        }
        if problems.0.is_empty()
            && let Err(cause) = write_ahead(guest, stamp)
        {
            problems.add("", &cause);
        }
        let begun = if problems.0.is_empty() {
            reception.begin(&self.remains, offer).map_err(|error| problems.add("", &error))
        } else {
            Err(())
        };
        let Ok(disks) = begun else {
            if let Err(error) = guest.apply(&Event::AbortReceiving { attempt: stamp.attempt }) {
                log::error!("migration: {error}");
            }
            reception.remove_created();
            return refused(problems);
        };
        self.remains.retain(|name| !reception.exports.iter().any(|export| export.name() == name));
        let answer =
            Prepared { stamp, instance: guest.instance, epoch: reception.epoch, token: reception.token, disks };
        log::info!("migration: attempt {:.8} is received from host {:.8}", stamp.attempt, session.theirs.host);
        self.ended = None;
        self.stage = Stage::Receiving(Box::new(reception));
        Ok(Message::Prepared(answer))
    }

    /// Looks at every offered disk and collects all that is wrong. Returns the exports and their files.
    fn check(&self, guest: &Guest, offer: &Prepare, problems: &mut Problems) -> Vec<(Arc<Export>, PathBuf)> {
        let mut found: Vec<(Arc<Export>, PathBuf)> = Vec::new();
        let mut needed: Vec<(u64, u64, u64)> = Vec::new();
        for disk in &offer.disks {
            let twice = found.iter().any(|(export, _)| export.name() == disk.name);
            let checked = if twice {
                Err("is offered twice".to_owned())
            } else {
                self.check_disk(guest, disk, offer.mode, &mut needed)
            };
            match checked {
                Ok(export) => found.push(export),
                Err(cause) => problems.add(&disk.name, &cause),
            }
        }
        if offer.disks.is_empty() {
            problems.add("", &"no disk is offered");
        }
        for (_, needs, has) in needed.iter().filter(|(_, needs, has)| needs > has) {
            problems.add("", &format_args!("the disks need {needs} bytes, their file system has {has} free"));
        }
        found
    }

    fn check_disk(
        &self,
        guest: &Guest,
        offer: &DiskOffer,
        mode: Mode,
        needed: &mut Vec<(u64, u64, u64)>,
    ) -> Result<(Arc<Export>, PathBuf), String> {
        let disk = guest.disk(&offer.name).ok_or("the destination has no disk of this name")?;
        let (Some(export), Source::File { path, .. }) = (&disk.export, &disk.spec.source) else {
            let why = disk.spec.stays().unwrap_or(Stays::Empty);
            return Err(format!("is {why} at the destination"));
        };
        if let Some(why @ (Stays::ReadOnly | Stays::Shared)) = disk.spec.stays() {
            return Err(format!("is {why} at the destination"));
        }
        let free = match export.disk() {
            None => crate::disk::free_space_beside(path).map_err(|error| error.to_string())?,
            Some(target) => {
                if target.size() != offer.size_bytes {
                    let (there, here) = (target.size(), offer.size_bytes);
                    return Err(format!("has {there} bytes at the destination and {here} at the source"));
                }
                let ours = self.remains.iter().any(|name| name.as_str() == offer.name);
                let content = target.content().map_err(|error| format!("cannot be read: {error}"))?;
                if content == Content::Data && mode == Mode::CopyAll && !ours {
                    return Err(format!("{} is not empty (--overwrite overwrites it)", path.display()));
                }
                target.free_space().map_err(|error| error.to_string())?
            }
        };
        if let Some((file_system, bytes)) = free {
            match needed.iter_mut().find(|(known, ..)| *known == file_system) {
                Some((_, needs, _)) => *needs = needs.saturating_add(offer.data_bytes),
                None => needed.push((file_system, offer.data_bytes, bytes)),
            }
        }
        Ok((Arc::clone(export), path.clone()))
    }
}

/// All that is wrong, as far as it fits a message.
#[derive(Default)]
struct Problems(heapless::Vec<Problem, PROBLEMS_MAX>);

impl Problems {
    fn add(&mut self, disk: &str, cause: &dyn Display) {
        let _ = self.0.push(Problem { disk: cut(disk), cause: cut(&cause.to_string()) });
    }
}

/// What an attempt that begins will need: a full disk is noticed now, and not while the guest waits for SEALED.
fn write_ahead(guest: &Guest, stamp: Stamp) -> Result<(), String> {
    let seal = Event::Seal { stamp, images: guest.images()? };
    guest.write_ahead(&[&[seal, Event::Go(stamp)], &[Event::Abort(stamp)]])
}
