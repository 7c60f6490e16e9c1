//! Looks at every disk that a source offers and says all that is wrong with it; changes nothing and makes nothing.
//!
//! Called by PREPARE, before anything else. What it opens on the way (an image that was put there since the start) is
//! handed on, so that it stays locked.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Access, Cache, Content, Disk, Identity, OpenError, absolute, free_space_beside, place_beside};
use crate::domain::{Source, Stays};
use crate::error::reason;
use crate::export::Export;
use crate::guest::{Guest, GuestDisk};
use crate::limits::{FREE_MARGIN_MIN, FREE_MARGIN_PART, PROBLEMS_MAX};
use crate::migrate::wire::{DiskOffer, Mode, Prepare, Problem, StayingDisk, cut};
use crate::ownership::{Entry, Journal};

/// A disk that can be received.
pub(super) struct Target {
    pub(super) export: Arc<Export>,
    pub(super) path: PathBuf,
    /// The same from the root on, for the journal.
    pub(super) place: String,
    pub(super) size_bytes: u64,
    pub(super) cache: Cache,
    pub(super) found: Found,
    /// The image, if it was put there since the start.
    pub(super) disk: Option<Arc<Disk>>,
}

/// What is there already.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing: a file will be made.
    Nothing,
    /// An image that looks empty.
    Empty,
    /// Data that the user wants overwritten or updated.
    Data,
    /// What earlier attempts of this guest's migration have brought (D10).
    Ours(Entry),
}

/// All that is wrong, as far as it fits a message; the rest is logged.
#[derive(Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, disk: &str, cause: &dyn Display) {
        let cause = cause.to_string();
        if self.0.len() >= PROBLEMS_MAX {
            log::warn!("migration: refused, and there was no room to say it: disk {disk}: {cause}");
        }
        self.0.push(Problem { disk: cut(disk), cause: cut(&cause) });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn list(self) -> heapless::Vec<Problem, PROBLEMS_MAX> {
        self.0.into_iter().take(PROBLEMS_MAX).collect()
    }
}

/// What the disks need of each file system.
#[derive(Default)]
struct Space(Vec<Need>);

struct Need {
    file_system: u64,
    bytes: u64,
    free: u64,
    disks: Vec<String>,
}

impl Space {
    fn add(&mut self, disk: &str, free: Option<(u64, u64)>, bytes: u64) {
        // A block device needs none.
        let Some((file_system, free)) = free else { return };
        if let Some(need) = self.0.iter_mut().find(|need| need.file_system == file_system) {
            need.bytes = need.bytes.saturating_add(bytes);
            need.disks.push(disk.to_owned());
        } else {
            self.0.push(Need { file_system, bytes, free, disks: vec![disk.to_owned()] });
        }
    }

    /// All disks of one file system together, and what it needs to keep its books.
    fn judge(&self, problems: &mut Problems) {
        for need in self.0.iter().filter(|need| need.bytes > 0) {
            let bytes = need.bytes.saturating_add((need.bytes / FREE_MARGIN_PART).max(FREE_MARGIN_MIN));
            if bytes > need.free {
                let (disks, free) = (need.disks.join(", "), need.free);
                problems
                    .add("", &format_args!("the disks {disks} need {bytes} bytes, their file system has {free} free"));
            }
        }
    }
}

/// Where a file will be made.
type Place = (Identity, OsString);

/// Looks at all of them. `ours` is what earlier attempts of this guest have left; `inside`: whether what is on the
/// disks matters, which it does not where the record refuses.
pub(super) fn targets(
    guest: &Guest,
    offer: &Prepare,
    ours: Option<&Journal>,
    inside: bool,
    problems: &mut Problems,
) -> Vec<Target> {
    let mut look = Look { guest, mode: offer.mode, ours, inside, space: Space::default(), new: Vec::new() };
    let mut targets: Vec<Target> = Vec::new();
    for disk in &offer.disks {
        if targets.iter().any(|target| target.export.name() == disk.name) {
            problems.add(&disk.name, &"is offered twice");
        } else {
            targets.extend(look.at(disk, problems));
        }
    }
    if offer.disks.is_empty() {
        problems.add("", &"no disk is offered");
    }
    look.space.judge(problems);
    targets
}

/// Looks whether this host reaches by itself what does not move. What it does not is a problem, or a line in the log
/// when the user does not mind.
pub(super) fn staying(guest: &Guest, offer: &Prepare, problems: &mut Problems) {
    for disk in &offer.staying {
        let moves = offer.disks.iter().any(|moving| moving.name == disk.name);
        match reach(guest, disk) {
            _ if moves => problems.add(&disk.name, &"is said to move and to stay"),
            Ok(()) => {}
            Err(cause) if offer.heedless => log::warn!("migration: disk {}: {cause}: --unsafe", disk.name),
            Err(cause) => problems.add(&disk.name, &format_args!("stays ({}) and {cause}", disk.why)),
        }
    }
}

/// Whether the guest will find a disk here that does not come with it.
fn reach(guest: &Guest, wanted: &StayingDisk) -> Result<(), String> {
    // There is nothing in it to be reached.
    if wanted.why == Stays::Empty {
        return Ok(());
    }
    let disk = guest.disk(&wanted.name).ok_or("the destination has no disk of this name")?;
    match (&disk.spec.source, &disk.export) {
        // What the VMM opens only the VMM can look at.
        (Source::External, _) => Ok(()),
        (Source::Empty, _) => Err("has no source at the destination".to_owned()),
        (Source::File { path, .. }, export) => {
            let path = path.display();
            // Removed or put there since the start: the process that will serve it has to have it open.
            let image = export.as_ref().and_then(|export| export.disk());
            let image = image.ok_or_else(|| format!("{path} does not exist at the destination"))?;
            image.check().map_err(|cause| format!("{path} at the destination {cause}"))?;
            match wanted.size_bytes {
                Some(size) if size != image.size() => {
                    Err(format!("has {} bytes at the destination and {size} at the source", image.size()))
                }
                _ => Ok(()),
            }
        }
    }
}

struct Look<'a> {
    guest: &'a Guest,
    mode: Mode,
    ours: Option<&'a Journal>,
    inside: bool,
    space: Space,
    /// The files that will be made, and for which disk.
    new: Vec<(Place, String)>,
}

impl Look<'_> {
    fn at(&mut self, offer: &DiskOffer, problems: &mut Problems) -> Option<Target> {
        let mut wrong = |cause: &dyn Display| problems.add(&offer.name, cause);
        let Some(disk) = self.guest.disk(&offer.name) else {
            wrong(&"the destination has no disk of this name");
            return None;
        };
        let (Some(export), Source::File { path, .. }, None) = (&disk.export, &disk.spec.source, disk.spec.stays())
        else {
            let why = disk.spec.stays().unwrap_or(Stays::Empty);
            wrong(&format_args!("is {why} at the destination"));
            return None;
        };
        let place = match absolute(path).map(PathBuf::into_os_string).map(OsString::into_string) {
            Ok(Ok(place)) => place,
            _ => {
                wrong(&format_args!("{} cannot be remembered", path.display()));
                return None;
            }
        };
        let opened =
            if export.disk().is_none() { self.open(disk, path).map_err(|cause| wrong(&cause)).ok()? } else { None };
        let found = match export.disk().or(opened.clone()) {
            None => self.missing(offer, path).map(|()| Found::Nothing).map_err(|cause| wrong(&cause)).ok()?,
            Some(image) => self.image(offer, path, &place, &image, &mut wrong)?,
        };
        Some(Target {
            export: Arc::clone(export),
            path: path.clone(),
            place,
            size_bytes: offer.size_bytes,
            cache: disk.spec.cache,
            found,
            disk: opened,
        })
    }

    /// An image that was not there at the start, and perhaps is now.
    fn open(&self, disk: &GuestDisk, path: &Path) -> Result<Option<Arc<Disk>>, String> {
        // Opening and closing an image of ours once more would drop its lock.
        let here = Disk::identify(path);
        let is_here = |other: &&GuestDisk| {
            here.is_some() && other.export.as_ref().and_then(|e| e.disk()).map(|disk| disk.identity()) == here
        };
        if let Some(twin) = self.guest.disks.iter().find(is_here) {
            return Err(format!("{} is the image of disk {} too", path.display(), twin.spec.name));
        }
        match Disk::open(path, Access::ReadWrite, disk.spec.cache) {
            Ok(image) => Ok(Some(Arc::new(image))),
            Err(OpenError::Missing) => Ok(None),
            Err(error) => Err(format!("{} {error}", path.display())),
        }
    }

    /// A file that will be made.
    fn missing(&mut self, offer: &DiskOffer, path: &Path) -> Result<(), String> {
        let fault = |cause: &dyn Display| format!("{} cannot be created: {cause}", path.display());
        let place = place_beside(path).map_err(|cause| fault(&cause))?;
        if let Some((_, twin)) = self.new.iter().find(|(other, _)| *other == place) {
            return Err(format!("{} is the image of disk {twin} too", path.display()));
        }
        self.new.push((place, offer.name.as_str().to_owned()));
        let free = free_space_beside(path).map_err(|error| fault(&reason(&error)))?;
        self.space.add(&offer.name, free, offer.data_bytes);
        Ok(())
    }

    /// An image that is there.
    fn image(
        &mut self,
        offer: &DiskOffer,
        path: &Path,
        place: &str,
        image: &Disk,
        wrong: &mut dyn FnMut(&dyn Display),
    ) -> Option<Found> {
        let mut fits = true;
        let mut wrong = |cause: &dyn Display| {
            fits = false;
            wrong(cause);
        };
        // What would come into it would be gone with this process.
        if image.is_removed() {
            wrong(&format_args!("{} its file has been removed", path.display()));
        } else if let Err(cause) = image.check() {
            wrong(&format_args!("{} {cause}", path.display()));
        }
        if image.size() != offer.size_bytes {
            let (there, here) = (image.size(), offer.size_bytes);
            wrong(&format_args!("has {there} bytes at the destination and {here} at the source"));
        }
        match (image.free_space(), image.allocated()) {
            // What it holds already is overwritten or given back.
            (Ok(free), Ok(held)) => self.space.add(&offer.name, free, offer.data_bytes.saturating_sub(held)),
            (Err(error), _) | (_, Err(error)) => wrong(&reason(&error)),
        }
        let ours = self.ours.and_then(|journal| journal.entry(&offer.name));
        let found = match ours.filter(|entry| entry.is_about(image, place)) {
            Some(entry) => Found::Ours(entry.clone()),
            None if !self.inside => Found::Data,
            None => match image.content() {
                Ok(Content::Data) => {
                    if self.mode == Mode::CopyAll {
                        wrong(&format_args!(
                            "{} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)",
                            path.display()
                        ));
                    }
                    Found::Data
                }
                Ok(Content::Hole | Content::LooksEmpty) => Found::Empty,
                Err(error) => {
                    wrong(&format_args!("{} cannot be read: {}", path.display(), reason(&error)));
                    return None;
                }
            },
        };
        fits.then_some(found)
    }
}
