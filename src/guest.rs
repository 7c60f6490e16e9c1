//! One guest on this host: its disks, its record, and what the doors need to know of it.
//!
//! [`Guest`] ties the parts together and holds no mechanism of its own: exports know their gates, the keeper knows the
//! record, the store its file, `migrate/destination.rs` and `migrate/source.rs` know the phases. What it does carry is
//! the one link between record and gates: [`Guest::apply`] changes the record, and the guest door follows before
//! anybody else can look.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Address;
use crate::attach::Attachments;
use crate::disk::{Access, Disk, OpenError, server_of};
use crate::domain::{self, Source};
use crate::door_at::DoorAt;
use crate::error::{Problem, reason};
use crate::export::{Export, Gate};
use crate::migrate::destination::Destination;
use crate::migrate::settle::Settle;
use crate::migrate::source::Source as Sending;
use crate::options::ServeOptions;
use crate::ownership::{
    Answer, Attempt, Content, Door, Event, Found, Host, How, ImageList, Images, Instance, Journal, KeepError, Keeper,
    Kind, Moving, Order, Promise, Receipt, Record, Refusal, Stamp, State, Store, Why, show,
};
use crate::vmm::Vmm;

/// One disk of the guest.
#[derive(Debug)]
pub struct GuestDisk {
    /// As the command line names it.
    pub spec: domain::Disk,
    /// Its export; `None` for a disk that blockferry does not open.
    pub export: Option<Arc<Export>>,
}

/// One guest on this host.
#[derive(Debug)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Every disk, in the order of the command line.
    pub disks: Vec<GuestDisk>,
    /// This host, by its machine and its state directory.
    pub host: Host,
    /// This process (D12).
    pub instance: Instance,
    /// This run of the kernel (D12).
    pub boot: [u8; 16],
    /// Where this host's migration door listens.
    pub migration_address: Option<Address>,
    /// What moves its memory and devices.
    pub vmm: Vmm,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// What this process receives.
    pub destination: Destination,
    /// What this process sends.
    pub source: Sending,
    /// Wakes whoever says what is left to be said.
    pub settle: Settle,
    /// Its disks that are devices of this host.
    pub attached: Attachments,
    keeper: Mutex<Keeper>,
    store: Arc<Mutex<Store>>,
    /// Of the last hand-over that this host took part in.
    receipt: Mutex<Option<Receipt>>,
    /// Whose state moves, or moved when a process before this one died.
    moving: Mutex<Option<Moving>>,
    /// What there is of a record that counts for nothing.
    rejected: String,
}

impl Guest {
    /// Locks the state directory, reads the record and opens the disks of a guest. Files that are missing are created
    /// where a size is given; where none is, the disk has no content until a migration brings it. A file that the
    /// record speaks of must be there. The record is durable when this returns (M4), and the gates follow it.
    ///
    /// # Errors
    /// What is wrong with which disk, or with the state directory; what was created for nothing is removed again.
    pub fn open(options: &ServeOptions, migration_address: Option<Address>) -> Result<Self, Problem> {
        let state = |cause: &dyn std::fmt::Display| Problem::fatal("state", options.state.display(), cause);
        let mut store = Store::open(&options.state, options.volatile_state).map_err(|cause| state(&cause))?;
        let found = store.load().map_err(|error| state(&reason(&error)))?;
        let instance = Instance::random().map_err(|error| Problem::fatal("serve", &options.guest, error))?;
        load_journal(&mut store, &found);
        let mut created = Vec::new();
        let opened = open_disks(&options.disks, &found, &mut created).and_then(|disks| {
            let here = images_of(&disks).map_err(|cause| Problem::fatal("serve", &options.guest, cause))?;
            let host = store.host();
            store.speak_of(&here);
            let store = Arc::new(Mutex::new(store));
            let (mut keeper, rejected) = keep(host, found, &here, &store);
            keeper.start().map_err(|error| state(&error))?;
            Ok((disks, host, store, keeper, rejected))
        });
        let (disks, host, store, keeper, rejected) = opened.inspect_err(|_| {
            for path in &created {
                let _ = std::fs::remove_file(path);
            }
        })?;
        let (receipt, moving) = {
            let store = store.lock().unwrap_or_else(PoisonError::into_inner);
            (store.receipt(), store.moving())
        };
        let guest = Self {
            name: options.guest.clone(),
            disks,
            host,
            instance,
            boot: boot_id(),
            migration_address,
            vmm: options.vmm.clone().with_facts(facts(options)),
            insecure_plaintext: options.insecure_plaintext,
            destination: Destination::default(),
            source: Sending::default(),
            settle: Settle::default(),
            attached: Attachments::default(),
            keeper: Mutex::new(keeper),
            receipt: Mutex::new(receipt),
            moving: Mutex::new(moving),
            store,
            rejected,
        };
        let gate = gate_of(&guest.keeper());
        guest.exports().for_each(|export| export.set_gate(gate));
        Ok(guest)
    }

    /// The exports of all disks that blockferry opens.
    pub fn exports(&self) -> impl Iterator<Item = &Arc<Export>> {
        self.disks.iter().filter_map(|disk| disk.export.as_ref())
    }

    /// The disk of that name.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<&GuestDisk> {
        self.disks.iter().find(|disk| disk.spec.name == name)
    }

    /// The record, if it is known and there is one.
    ///
    /// # Errors
    /// [`KeepError::Unknown`] after a commit that failed.
    pub fn record(&self) -> Result<Option<Record>, KeepError> {
        self.keeper().known().map(Option::<&Record>::cloned)
    }

    /// The state's name and the order, for people.
    #[must_use]
    pub fn standing(&self) -> (Kind, Order) {
        let record = self.record().ok().flatten();
        (Kind::of(record.as_ref()), record.map_or(Order::NONE, |record| record.order))
    }

    /// Why the record that is in the state directory counts for nothing, and what there is of it; `None`: it counts, or
    /// there is none.
    #[must_use]
    pub fn rejected(&self) -> Option<(String, String)> {
        self.keeper().rejected().map(|why| (why.to_owned(), self.rejected.clone()))
    }

    /// The receipt of the last hand-over that this host took part in, if it has one.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        self.receipt.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the receipt of a hand-over that is over. One that cannot be made durable is lost with the process.
    pub fn keep_receipt(&self, receipt: Receipt) {
        if let Err(error) = self.store().keep_receipt(&receipt) {
            log::warn!("receipt: it is lost with this process: {}", reason(&error));
        }
        *self.receipt.lock().unwrap_or_else(PoisonError::into_inner) = Some(receipt);
    }

    /// The guest whose state moves, or moved when a process before this one died.
    #[must_use]
    pub fn moving(&self) -> Option<Moving> {
        *self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VMM is about to be told to move this guest: whoever comes after this process is to know that it may stand.
    ///
    /// # Errors
    /// One line: that cannot be made durable.
    pub fn begin_moving(&self, moving: Moving) -> Result<(), String> {
        let mut now = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        self.store()
            .keep_moving(Some(&moving))
            .map_err(|error| format!("the state directory cannot take that the guest moves: {}", reason(&error)))?;
        *now = Some(moving);
        Ok(())
    }

    /// The guest of that attempt runs, or stands for good: nobody has to see to it any more.
    pub fn end_moving(&self, attempt: Attempt) {
        let mut now = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        if now.take_if(|moving| moving.attempt == attempt).is_some()
            && let Err(error) = self.store().keep_moving(None)
        {
            log::warn!("the state directory: {}", reason(&error));
        }
    }

    /// The images that are here now, which records to come may speak of.
    ///
    /// # Errors
    /// Which disk cannot be looked at.
    pub fn images(&self) -> Result<Images, String> {
        let here = images_of(&self.disks)?;
        self.store().speak_of(&here);
        Ok(here.fingerprint())
    }

    /// Why the images that are here are not the ones that the record speaks of; `None` when they are.
    ///
    /// # Errors
    /// Which disk cannot be looked at.
    pub fn images_differ(&self, record: &Record) -> Result<Option<String>, String> {
        let here = images_of(&self.disks)?;
        let store = self.store();
        let content = store.images(record.images).cloned().unwrap_or_default();
        Ok(differ(record, &content, &here))
    }

    /// Writes ahead what the record becomes on each of `ways`: see [`Keeper::write_ahead`].
    ///
    /// # Errors
    /// One line: the state directory cannot take it. Nothing has changed.
    pub fn write_ahead(&self, ways: &[&[Event]]) -> Result<(), String> {
        let written = self.keeper().write_ahead(ways);
        written.map_err(|error| format!("the state directory cannot take the next record: {}", reason(&error)))
    }

    /// What was written ahead is not wanted any more.
    ///
    /// # Errors
    /// One line. Nothing has changed.
    pub fn forget_ahead(&self) -> Result<(), String> {
        self.keeper().forget_ahead().map_err(|error| reason(&error))
    }

    /// What migrations have put on the disks, if it counts with the record as it is.
    #[must_use]
    pub fn journal(&self) -> Option<Journal> {
        let record = self.record().ok().flatten();
        self.store().journal().filter(|journal| journal.fits(record.as_ref())).cloned()
    }

    /// Makes this the journal, or none, durably.
    ///
    /// # Errors
    /// One line: the state directory cannot take it. A restart finds this one or the one before.
    pub fn write_journal(&self, journal: Option<Journal>) -> Result<(), String> {
        let written = self.store().write_journal(journal);
        written.map_err(|error| format!("the state directory cannot take the journal: {}", reason(&error)))
    }

    /// Writes a journal ahead: see [`Store::write_journal_ahead`].
    ///
    /// # Errors
    /// One line: the state directory cannot take it. Nothing has changed.
    pub fn write_journal_ahead(&self, journal: &Journal) -> Result<(), String> {
        let written = self.store().write_journal_ahead(journal);
        written.map_err(|error| format!("the state directory cannot take the journal: {}", reason(&error)))
    }

    /// The journal that was written ahead is not wanted any more.
    pub fn forget_journal_ahead(&self) {
        self.store().remove_journal_ahead();
    }

    /// Forgets a journal that counts with the record no more. Only order: it would count for nothing anyway.
    pub fn tidy_journal(&self) {
        if self.record().is_ok()
            && self.journal().is_none()
            && self.store().journal().is_some()
            && let Err(cause) = self.write_journal(None)
        {
            log::info!("{cause}");
        }
    }

    /// Lets `event` change the record; once that is durable the gates follow, and then the answer may be sent.
    ///
    /// # Errors
    /// As [`Keeper::apply`]. After [`KeepError::Unknown`] the gates are closed (M4).
    pub fn apply(&self, event: &Event) -> Result<Answer, KeepError> {
        self.apply_under(self.keeper(), event)
    }

    /// As [`Guest::apply`], unless the record is not the one any more from which the event was concluded.
    ///
    /// # Errors
    /// [`Why::PeerDecides`] then.
    pub fn apply_if(&self, event: &Event, expected: &Option<Record>) -> Result<Answer, KeepError> {
        let keeper = self.keeper();
        let record = keeper.known()?.cloned();
        if record != *expected {
            return Err(KeepError::Refused(Refusal { why: Why::PeerDecides, record: record.map(Box::new) }));
        }
        self.apply_under(keeper, event)
    }

    fn apply_under(&self, mut keeper: MutexGuard<'_, Keeper>, event: &Event) -> Result<Answer, KeepError> {
        let (before, gate) = (keeper.changes(), gate_of(&keeper));
        let result = keeper.apply(event);
        match &result {
            Ok(answer) => log::debug!("record: {event:?} is answered {answer:?}"),
            Err(error) => log::info!("record: {error}"),
        }
        // Under the keeper's lock: gates follow the record in the record's order.
        self.follow(&keeper, gate);
        let changed = keeper.changes() != before;
        drop(keeper);
        if changed {
            self.settle.ring();
        }
        result
    }

    /// Writes a record whose commit failed once more (M4).
    ///
    /// # Errors
    /// As [`Keeper::retry`].
    pub fn retry(&self) -> Result<(), KeepError> {
        let mut keeper = self.keeper();
        let gate = gate_of(&keeper);
        let result = keeper.retry();
        self.follow(&keeper, gate);
        result
    }

    /// Moves the gates to where the record wants them, if that is not where it wanted them `before`. An event that
    /// changes nothing moves no gate: a switchover or a seal on another thread may be holding it elsewhere.
    fn follow(&self, keeper: &Keeper, before: Gate) {
        let gate = gate_of(keeper);
        if gate != before {
            self.exports().for_each(|export| export.set_gate(gate));
        }
    }

    /// What to answer to a destination that asks what became of an attempt of this source (M3).
    ///
    /// # Errors
    /// Nothing may be answered.
    pub fn promise(&self, asked: &Stamp) -> Result<Promise, KeepError> {
        // Before the keeper's lock: the desk asks for the record under its own.
        let live = self.source.live_attempt();
        self.keeper().promise(live, asked)
    }

    /// W5: who has a device of the guest's disks and is made still by nobody; with `held`, by whoever says `switch`.
    #[must_use]
    pub fn restless_user(&self, held: bool) -> Option<String> {
        self.attached.restless_user(held || self.vmm.stills_devices())
    }

    /// Why the guest door is shut, and who owns: for whoever knocks at a fenced export.
    #[must_use]
    pub fn why_fenced(&self) -> String {
        match self.record() {
            Ok(Some(record)) => record.to_string(),
            Ok(None) => "this host owns nothing".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a VMM driver tells of the guest to whoever it calls (docs/hooks.md).
fn facts(options: &ServeOptions) -> [(&'static str, String); 4] {
    // Of a door that was passed on, its real address: the number says nothing to another process.
    let addresses = |doors: &[DoorAt]| {
        doors.iter().filter_map(DoorAt::dialled).map(|door| door.to_string()).collect::<Vec<_>>().join(" ")
    };
    let served = options.disks.iter().filter(|disk| matches!(disk.source, domain::Source::File { .. }));
    [
        ("BLOCKFERRY_GUEST", options.guest.clone()),
        ("BLOCKFERRY_DISKS", served.map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(" ")),
        ("BLOCKFERRY_NBD", addresses(&options.nbd)),
        ("BLOCKFERRY_CONTROL", addresses(&options.control)),
    ]
}

/// Reads the journal, and clears away the files that were being made when the process that wrote it died: nothing has
/// come into them (see [`Journal`]'s file). It happens in RECEIVING of that attempt, and before the images are opened:
/// a file that has no size yet could not be.
fn load_journal(store: &mut Store, found: &Found) {
    let record = match found {
        Found::Record(content) => Some(&content.record),
        Found::Nothing => None,
        // It may be thrown away by name; until then what is beside it is left alone.
        Found::Rejected { .. } => return,
    };
    let journal = match store.load_journal() {
        Ok(None) => return,
        Ok(Some(journal)) => journal.clone(),
        Err(broken) => {
            log::warn!("the journal of what a migration left here is broken: {broken}: nothing of it is removed");
            return;
        }
    };
    if !journal.fits(record) {
        log::info!("the journal of attempt {:.8} is over", journal.attempt);
        if let Err(error) = store.write_journal(None) {
            log::warn!("journal: {}", reason(&error));
        }
        return;
    }
    for entry in journal.entries.iter().filter(|entry| entry.image.is_none() && entry.how == How::Created) {
        match Disk::remove_unfinished(Path::new(&entry.path), entry.size_bytes) {
            Ok(true) => log::warn!("disk {}: {} was being made, and is removed", entry.disk, entry.path),
            Ok(false) => {}
            Err(error) => log::warn!("disk {}: {}: {}", entry.disk, entry.path, reason(&error)),
        }
    }
    for entry in journal.remains() {
        log::warn!("disk {}: attempt {:.8} has left its remains in {}", entry.disk, journal.attempt, entry.path);
    }
}

/// What the record means for the gates.
fn gate_of(keeper: &Keeper) -> Gate {
    match keeper.gate_state() {
        // M4. Not fenced for good: what the guest has been told to be written may still have to be flushed.
        _ if keeper.known().is_err() => Gate::Closed,
        Door::Incoming => Gate::Incoming,
        Door::Receiving => Gate::Receiving,
        Door::Sealed => Gate::Sealed,
        Door::Serving { .. } => Gate::Serving,
        Door::Closed => Gate::Closed,
        Door::Fenced => Gate::Fenced,
    }
}

/// The keeper of what was found, and what is shown of a record that counts for nothing.
fn keep(host: Host, found: Found, here: &ImageList, store: &Arc<Mutex<Store>>) -> (Keeper, String) {
    let store = Arc::clone(store);
    let save = Box::new(move |write: crate::ownership::Write<'_>| {
        store.lock().unwrap_or_else(PoisonError::into_inner).write(&write)
    });
    match found {
        Found::Nothing => (Keeper::new(host, None, save), String::new()),
        Found::Rejected { why, shown } => (Keeper::without(host, why, save), shown),
        Found::Record(content) => {
            let Content { mut record, images } = *content;
            if needs_images(&record.state) {
                if let Some(why) = differ(&record, &images, here) {
                    return (Keeper::without(host, format!("is of other images: {why}"), save), show(&record));
                }
                // Disks may have been added to the guest, or taken from it.
                record.images = here.fingerprint();
            }
            (Keeper::new(host, Some(record), save), String::new())
        }
    }
}

/// Whether a record of this state is worth something only together with the images that it speaks of (M7). Who gave
/// the guest away may have deleted them since, and still has to say GO.
fn needs_images(state: &State) -> bool {
    matches!(state, State::Sealed { .. } | State::Owner { .. } | State::Offered { .. })
}

/// Why `here` are not the images that the record speaks of. Without a list only the fingerprint can tell.
fn differ(record: &Record, images: &ImageList, here: &ImageList) -> Option<String> {
    if images.fingerprint() == record.images {
        images.differs_from(here)
    } else {
        (record.images != here.fingerprint()).then(|| "they are not the ones that the record speaks of".to_owned())
    }
}

/// The images that move with the guest, as far as they exist.
fn images_of(disks: &[GuestDisk]) -> Result<ImageList, String> {
    let mut images = ImageList::default();
    for disk in disks.iter().filter(|disk| disk.spec.stays().is_none()) {
        let (Some(image), Source::File { path, .. }) =
            (disk.export.as_ref().and_then(|export| export.disk()), &disk.spec.source)
        else {
            continue;
        };
        let lasting = image.lasting().map_err(|error| format!("disk {}: {}", disk.spec.name, reason(&error)))?;
        images.add(&disk.spec.name, lasting, path);
    }
    Ok(images)
}

/// Opens every disk; those that the record speaks of must be there.
fn open_disks(specs: &[domain::Disk], found: &Found, created: &mut Vec<PathBuf>) -> Result<Vec<GuestDisk>, Problem> {
    let mut opened: Vec<GuestDisk> = Vec::new();
    for spec in specs {
        if let (Found::Record(content), Source::File { path, .. }) = (found, &spec.source)
            && needs_images(&content.record.state)
            && content.images.names(&spec.name)
            && matches!(server_of(path), Ok(None))
            && !path.exists()
        {
            let cause = format!("no such file, and the record speaks of it: {}", content.record);
            return Err(Problem::fatal(format!("open disk {}", spec.name), path.display(), cause));
        }
        let export = open_disk(spec, &opened, created)?;
        opened.push(GuestDisk { spec: spec.clone(), export });
    }
    Ok(opened)
}

/// Opens one disk as its line says; `None` if it is not ours to open.
fn open_disk(
    spec: &domain::Disk,
    others: &[GuestDisk],
    created: &mut Vec<PathBuf>,
) -> Result<Option<Arc<Export>>, Problem> {
    let Source::File { path, size } = &spec.source else { return Ok(None) };
    let refuse =
        |cause: &dyn std::fmt::Display| Problem::fatal(format!("open disk {}", spec.name), path.display(), cause);
    if let Some(twin) = others.iter().find(|other| is_same_file(other, path)) {
        return Err(refuse(&format_args!("is the image of disk {} too", twin.spec.name)));
    }
    let access = match (spec.read_only, spec.shared) {
        (true, _) => Access::ReadOnly,
        (false, true) => Access::Shared,
        (false, false) => Access::ReadWrite,
    };
    let disk = match (Disk::open(path, access, spec.cache), size) {
        (Ok(disk), Some(size)) if disk.size() != *size => {
            return Err(refuse(&format_args!("has {} bytes, not the {size} of size=", disk.size())));
        }
        (Ok(disk), _) => Some(disk),
        (Err(OpenError::Missing), _) if !has_directory(path) => return Err(refuse(&"its directory does not exist")),
        (Err(OpenError::Missing), Some(size)) if !spec.read_only => {
            let disk = Disk::create(path, *size, spec.cache).map_err(|error| refuse(&error))?;
            created.push(path.clone());
            Some(disk)
        }
        // Made at PREPARE, when the size is known; but only where it can be.
        (Err(OpenError::Missing), None) if !spec.read_only && !spec.shared => None,
        (Err(error), _) => return Err(refuse(&error)),
    };
    if disk.as_ref().is_some_and(Disk::is_remote) && access == Access::ReadWrite {
        log::info!(
            "disk {}: {}: a server's export cannot be locked: nobody else may write to it",
            spec.name,
            path.display()
        );
    }
    Ok(Some(Export::new(&spec.name, disk.map(Arc::new), spec.read_only, Gate::Incoming)))
}

/// Whether `path` is the image of an open disk. Told before it is opened: opening and closing it once more would drop
/// the first one's lock.
fn is_same_file(other: &GuestDisk, path: &Path) -> bool {
    let (Some(export), Some(identity)) = (&other.export, Disk::identify(path)) else { return false };
    export.disk().is_some_and(|disk| disk.identity() == identity)
}

fn has_directory(path: &Path) -> bool {
    crate::disk::free_space_beside(path).is_ok()
}

/// The kernel's number for this boot; zero where it does not tell.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    Host::from_hex(&digits).map_or([0; 16], |id| id.0)
}
