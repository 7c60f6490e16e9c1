//! What the destination says of its disks' content: digests of regions, for the attempt that it receives (D12, D14).
//!
//! A question is checked and entered under the stage's lock, like everything of an attempt; the disk is read and hashed
//! outside of it. One connection at a time asks about a disk: a newer one takes its place, and what an older one still
//! has hashed is not remembered any more, so that the [`Table`] always holds the newest digest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::wire::{self, LAYERS_PAGE, Message, Region, Verify, cut};
use crate::digest::{Digest, Hasher, Table, Verified, place, question_regions, region_bytes};
use crate::disk::Disk;
use crate::error::reason;
use crate::export::Export;
use crate::layers::Layers;
use crate::limits::{DIGESTS_MAX, DISKS_MAX};
use crate::ownership::Stamp;

/// The number of a connection that asks for digests; later ones are higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asker(u64);

impl Asker {
    /// The next one of this process.
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The digests of an attempt's disks, in the order of the offer.
#[derive(Debug)]
pub(super) struct Digests {
    verify: Verify,
    disks: Vec<Sheet>,
}

#[derive(Debug)]
struct Sheet {
    export: Arc<Export>,
    size: u64,
    told: Mutex<Told>,
    /// The answer of the disk's server, of which one page after the other is asked for.
    layers: Mutex<Option<Result<Layers, String>>>,
}

/// What has been told of one disk.
#[derive(Debug)]
struct Told {
    to: Asker,
    /// When anything is verified.
    table: Option<Table>,
}

/// A question that was found good.
#[derive(Debug)]
pub(super) struct Question {
    digests: Arc<Digests>,
    disk: Arc<Disk>,
    place: u8,
    first: u64,
    regions: usize,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The peer broke the protocol: the connection ends, with this line for the log.
    Broken(String),
    /// The disk cannot be read: the attempt ends (D8).
    Unreadable { region: Region, cause: String },
}

impl Digests {
    /// Of `exports`, which have their disks.
    pub(super) fn new(verify: Verify, exports: &[Arc<Export>]) -> Arc<Self> {
        let sheet = |export: &Arc<Export>| {
            let size = export.disk().map_or(0, |disk| disk.size());
            let table = (verify != Verify::None).then(|| Table::new(size));
            let told = Mutex::new(Told { to: Asker(0), table });
            Sheet { export: Arc::clone(export), size, told, layers: Mutex::default() }
        };
        Arc::new(Self { verify, disks: exports.iter().map(sheet).collect() })
    }

    /// What is verified.
    pub(super) fn verified(&self) -> Verified {
        match self.verify {
            Verify::None => Verified::Nothing,
            Verify::Written => Verified::Written,
            Verify::Full => Verified::Full,
        }
    }

    /// Checks a question strictly: whole regions of a disk of this attempt, and no more of them than may be asked for.
    ///
    /// # Errors
    /// [`NoAnswer::Broken`].
    pub(super) fn question(
        self: &Arc<Self>,
        asker: Asker,
        disk: u8,
        offset_bytes: u64,
        regions: u8,
    ) -> Result<Question, NoAnswer> {
        let broken = |what: &str| {
            let asked = format!("DIGEST of {regions} regions at {offset_bytes} of disk {disk}");
            Err(NoAnswer::Broken(format!("the peer sent a {asked}: {what}")))
        };
        let Some(sheet) = self.disks.get(usize::from(disk)) else { return broken("there is no such disk") };
        let region = region_bytes(sheet.size);
        if !offset_bytes.is_multiple_of(region) || offset_bytes >= sheet.size {
            return broken("no region begins there");
        }
        let first = offset_bytes / region;
        let count = u64::from(regions);
        if count == 0 || count > question_regions(sheet.size) || first + count > sheet.size.div_ceil(region) {
            return broken("there are not so many");
        }
        let Some(file) = sheet.export.disk() else { return broken("it has gone") };
        let mut told = sheet.told();
        if asker < told.to {
            return broken("another connection asks about it since");
        }
        told.to = asker;
        drop(told);
        Ok(Question { digests: Arc::clone(self), disk: file, place: disk, first, regions: usize::from(regions) })
    }

    /// A page of what a disk's top layer holds. Takes as long as the disk's server does.
    ///
    /// # Errors
    /// The peer broke the protocol, with a line for the log.
    pub(super) fn layers(&self, stamp: Stamp, disk: u8, page: u32) -> Result<Message, String> {
        let broken = |what: &str| Err(format!("the peer asked for the layers of disk {disk}, page {page}: {what}"));
        let Some(sheet) = self.disks.get(usize::from(disk)) else { return broken("there is no such disk") };
        if u64::from(page) >= Layers::pages(sheet.size, LAYERS_PAGE) {
            return broken("there is no such page");
        }
        let Some(file) = sheet.export.disk() else { return broken("it has gone") };
        let mut answer = sheet.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if page == 0 || answer.is_none() {
            *answer = Some(Layers::of(&file));
        }
        let (deepest, top, cause) = match &*answer {
            Some(Ok(layers)) => (layers.deepest(), layers.page(u64::from(page), LAYERS_PAGE), cut("")),
            Some(Err(cause)) => (0, Vec::new(), cut(cause)),
            None => (0, Vec::new(), cut("it is not known")),
        };
        // No longer than a page.
        let top = top.into_iter().take(LAYERS_PAGE).collect();
        Ok(Message::Layers { stamp, disk, page, deepest, top, cause })
    }

    /// Compares the source's roots with what was told (D14). Returns the bytes that are verified and the one root over
    /// all.
    ///
    /// # Errors
    /// One line: they differ, or there are none where there must be, or the other way round.
    pub(super) fn compare(&self, theirs: &[Digest]) -> Result<(u64, Digest), String> {
        if self.verify == Verify::None {
            let none = theirs.is_empty();
            return if none { Ok((0, [0; 32])) } else { Err("SEAL has digests where nothing is verified".to_owned()) };
        }
        if theirs.len() != self.disks.len() {
            return Err("SEAL does not have a digest for each disk".to_owned());
        }
        let mut roots: heapless::Vec<Digest, DISKS_MAX> = heapless::Vec::new();
        let mut bytes = 0;
        for (sheet, theirs) in self.disks.iter().zip(theirs) {
            let told = sheet.told();
            let Some(table) = &told.table else { continue };
            let ours = table.root();
            if ours != *theirs {
                return Err(format!("disk {}: the two sides' digests of the whole differ", sheet.export.name()));
            }
            bytes += table.covered_bytes();
            // As many as there are disks.
            let _ = roots.push(ours);
        }
        Ok((bytes, crate::digest::root_of_all(&roots)))
    }
}

impl Sheet {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Question {
    /// Reads and hashes. Without any lock: it takes as long as the disk does.
    ///
    /// # Errors
    /// [`NoAnswer::Unreadable`].
    pub(super) fn answer(&self, hasher: &mut Hasher, asker: Asker, stamp: Stamp) -> Result<Message, NoAnswer> {
        let sheet = &self.digests.disks[usize::from(self.place)];
        let mut digests: heapless::Vec<wire::Digest, DIGESTS_MAX> = heapless::Vec::new();
        // Fits: a question never has more.
        let _ = digests.resize(self.regions.min(DIGESTS_MAX), [0; 32]);
        if let Err(unread) = hasher.regions(&self.disk, self.first, &mut digests) {
            let name = sheet.export.name();
            let (offset_bytes, length_bytes) = (unread.offset, unread.length);
            let cause = reason(&unread.error);
            return Err(NoAnswer::Unreadable {
                region: Region { disk: cut(name), offset_bytes, length_bytes },
                cause: format!("read: disk {name}, {length_bytes} bytes at {offset_bytes}: {cause}"),
            });
        }
        let mut told = sheet.told();
        if told.to == asker
            && let Some(table) = &mut told.table
        {
            (self.first..).zip(&digests).for_each(|(region, digest)| table.put(region, digest));
        }
        drop(told);
        let (offset_bytes, _) = place(sheet.size, self.first);
        Ok(Message::Digests { stamp, disk: self.place, offset_bytes, digests })
    }
}

#[cfg(test)]
mod tests;
