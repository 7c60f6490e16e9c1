//! What attempts leave on the disks: listed before it is made, kept for the next attempt or removed, and never touched
//! again once it is sealed.
//!
//! Called by the destination under the stage's lock. It changes the journal (`ownership/journal.rs`) and removes files;
//! what may be removed is what the journal says that a migration made, as long as the image in that place is the one
//! that it knows. An attempt that goes on from the remains of another one of the same guest takes them over: if it is
//! cancelled, they go with it.

use std::path::Path;
use std::sync::Arc;

use super::prepare::{Found, Target};
use super::reception::Reception;
use crate::disk::{Access, Cache, Disk, OpenError, sync_directory_of};
use crate::error::reason;
use crate::export::Export;
use crate::guest::Guest;
use crate::limits::DISKS_MAX;
use crate::migrate::wire::Mode;
use crate::ownership::{Attempt, Entry, How, Image, Journal, Peer, Stamp};

/// What becomes of what an attempt has brought, when it ends and is not sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It stays: the next attempt goes on from it.
    Keep,
    /// What was made for it is removed.
    Remove,
}

/// The journal of an attempt that is about to make its files: its own disks, and what else is left of `before`.
pub(super) fn list(stamp: &Stamp, from: &Peer, mode: Mode, before: Option<&Journal>, targets: &[Target]) -> Journal {
    let mut entries: Vec<Entry> = targets
        .iter()
        .map(|target| {
            let how = match &target.found {
                Found::Ours(entry) => return entry.clone(),
                Found::Nothing => How::Created,
                Found::Empty => How::Empty,
                Found::Data if mode == Mode::Incremental => How::Older,
                Found::Data => How::Overwritten,
            };
            let disk = target.export.name().to_owned();
            Entry { disk, path: target.place.clone(), size_bytes: target.size_bytes, how, doubtful: false, image: None }
        })
        .collect();
    for entry in before.into_iter().flat_map(Journal::remains) {
        if entries.iter().any(|other| other.disk == entry.disk) {
            continue;
        }
        if entries.len() < DISKS_MAX {
            entries.push(entry.clone());
        } else {
            log::warn!("disk {}: what an earlier migration left in {} is not remembered", entry.disk, entry.path);
        }
    }
    let after = before.map_or(Attempt::NONE, |before| before.attempt);
    Journal { attempt: stamp.attempt, after, lineage: stamp.lineage, from: from.clone(), entries }
}

/// The same once every file is there: from now on data may come.
///
/// # Errors
/// Which image cannot be looked at.
pub(super) fn complete(mut journal: Journal, targets: &[Target]) -> Result<Journal, String> {
    for target in targets {
        let name = target.export.name();
        let fault = |cause: &dyn std::fmt::Display| format!("disk {name}: {cause}");
        let disk = target.export.disk().ok_or_else(|| fault(&"has gone"))?;
        let image = Image::of(&disk).map_err(|error| fault(&reason(&error)))?;
        for entry in journal.entries.iter_mut().filter(|entry| entry.disk == name) {
            entry.image = Some(image);
        }
    }
    Ok(journal)
}

/// What is left when an attempt came to nothing before anything was sent: what was there before it, bound to the record
/// that it leaves.
pub(super) fn go_back(guest: &Guest, stamp: &Stamp, before: Option<Journal>) {
    let journal = before.map(|before| {
        let entries = before.remains().cloned().collect();
        Journal { attempt: stamp.attempt, after: before.attempt, entries, ..before }
    });
    keep(guest, journal);
}

/// Ends what an attempt has brought, in RECEIVING of that attempt and not later (M2).
pub(super) fn end(guest: &Guest, reception: &Reception, fate: Fate) {
    let Some(mut journal) = guest.journal() else { return };
    let before = journal.clone();
    let own = |entry: &Entry| reception.exports.iter().any(|export| export.name() == entry.disk);
    for export in &reception.exports {
        let poisoned = export.disk().is_some_and(|disk| disk.is_poisoned());
        for entry in journal.entries.iter_mut().filter(|entry| poisoned && entry.disk == export.name()) {
            entry.doubtful = true;
        }
    }
    if fate == Fate::Remove {
        journal.entries.retain(|entry| !own(entry) || !is_removed(guest, entry));
    }
    for entry in journal.remains().filter(|entry| own(entry)) {
        log::warn!("disk {}: what was received stays in {}, and the next migration may use it", entry.disk, entry.path);
    }
    if journal == before {
        // What was written ahead for SEALED goes with the attempt (M4).
        guest.forget_journal_ahead();
    } else {
        keep(guest, Some(journal));
    }
}

/// Removes everything that migrations have made here and that was never sealed: the operator gives it up.
pub(super) fn give_up(guest: &Guest) {
    for entry in guest.journal().iter().flat_map(|journal| &journal.entries) {
        is_removed(guest, entry);
    }
}

fn keep(guest: &Guest, journal: Option<Journal>) {
    if let Err(cause) = guest.write_journal(journal.filter(|journal| !journal.entries.is_empty())) {
        log::error!("migration: {cause}");
    }
}

/// Removes a file that a migration has made. `false`: it stays, and goes on being ours.
fn is_removed(guest: &Guest, entry: &Entry) -> bool {
    if entry.how != How::Created || entry.image.is_none() {
        return false;
    }
    match remove(guest, entry) {
        Ok(()) => true,
        Err(cause) => {
            log::warn!("disk {}: {} is not removed: {cause}", entry.disk, entry.path);
            false
        }
    }
}

fn remove(guest: &Guest, entry: &Entry) -> Result<(), String> {
    let path = Path::new(&entry.path);
    let is_ours = |export: &&Arc<Export>| export.disk().is_some_and(|disk| entry.is_about(&disk, &entry.path));
    let disk = match guest.exports().find(is_ours) {
        // Whoever still uses it would go on writing into a file without a name.
        Some(export) => export.take_disk().ok_or("requests in flight do not end")?,
        None => match Disk::open(path, Access::ReadWrite, Cache::Writeback) {
            Ok(disk) => Arc::new(disk),
            Err(OpenError::Missing) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        },
    };
    if !entry.is_about(&disk, &entry.path) || Disk::identify(path) != Some(disk.identity()) {
        log::warn!("disk {}: another file is at {} now: it is left alone", entry.disk, entry.path);
        return Ok(());
    }
    std::fs::remove_file(path).map_err(|error| reason(&error))?;
    log::info!("disk {}: {} is removed", entry.disk, entry.path);
    // Or the file could come back without anybody who knows that it is ours.
    sync_directory_of(path).map_err(|error| reason(&error))
}
