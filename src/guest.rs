//! One guest on this host: its disks, its record, and what the doors need to know of it.
//!
//! [`Guest`] ties the parts together and holds no mechanism of its own: exports know their gates, the keeper knows the
//! record, `migrate/destination.rs` and `migrate/source.rs` know the phases. What it does carry is the one link between
//! record and gates: [`Guest::apply`] changes the record, and the guest door follows before anybody else can look.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Access, Disk, OpenError};
use crate::domain::{self, Source};
use crate::error::Problem;
use crate::export::{Export, Gate};
use crate::migrate::destination::Destination;
use crate::migrate::source::Source as Sending;
use crate::ownership::{Answer, Door, Event, Host, Instance, KeepError, Keeper, Kind, Order, Promise, Record, Stamp};

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
    /// This machine.
    pub host: Host,
    /// This process (D12).
    pub instance: Instance,
    /// This run of the kernel (D12).
    pub boot: [u8; 16],
    /// Where this host's migration door is reached, printable; empty without one.
    pub migration_address: String,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// What this process receives.
    pub destination: Destination,
    /// What this process sends.
    pub source: Sending,
    keeper: Mutex<Keeper>,
}

impl Guest {
    /// Opens the disks of a guest. Files that are missing are created where a size is given; where none is, the disk
    /// has no content until a migration brings it.
    ///
    /// # Errors
    /// What is wrong with which disk; what was created for nothing is removed again.
    pub fn open(name: &str, disks: Vec<domain::Disk>, address: String, insecure: bool) -> Result<Self, Problem> {
        let host = this_machine()?;
        let instance = Instance::random().map_err(|error| Problem::fatal("serve", name, error))?;
        let mut opened: Vec<GuestDisk> = Vec::new();
        let mut created = Vec::new();
        for spec in disks {
            match open_disk(&spec, &opened, &mut created) {
                Ok(export) => opened.push(GuestDisk { spec, export }),
                Err(problem) => {
                    for path in &created {
                        let _ = std::fs::remove_file(path);
                    }
                    return Err(problem);
                }
            }
        }
        // In memory only, until the state directory is opened here.
        let mut keeper = Keeper::new(host, None, Box::new(|_| Ok(())));
        keeper.start().map_err(|error| Problem::fatal("serve", name, error))?;
        Ok(Self {
            name: name.to_owned(),
            disks: opened,
            host,
            instance,
            boot: boot_id(),
            migration_address: address,
            insecure_plaintext: insecure,
            destination: Destination::default(),
            source: Sending::default(),
            keeper: Mutex::new(keeper),
        })
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

    /// Lets `event` change the record; once that is durable the gates follow, and then the answer may be sent.
    ///
    /// # Errors
    /// As [`Keeper::apply`]. After [`KeepError::Unknown`] the gates are fenced (M4).
    pub fn apply(&self, event: &Event) -> Result<Answer, KeepError> {
        let mut keeper = self.keeper();
        let result = keeper.apply(event);
        match &result {
            Ok(answer) => log::debug!("record: {event:?} is answered {answer:?}"),
            Err(error) => log::info!("record: {error}"),
        }
        // Under the keeper's lock: gates follow the record in the record's order.
        let gate = match keeper.gate_state() {
            Door::Incoming => Gate::Incoming,
            Door::Receiving => Gate::Receiving,
            Door::Sealed => Gate::Sealed,
            Door::Serving { .. } => Gate::Serving,
            Door::Closed | Door::Fenced => Gate::Fenced,
        };
        for export in self.exports() {
            // A switchover holds the gate itself, and lets go of it by itself.
            if !(gate == Gate::Serving && export.gate() == Gate::Quiesced) {
                export.set_gate(gate);
            }
        }
        result
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

    /// Why the guest door is shut, and who owns: for whoever knocks at a fenced export.
    #[must_use]
    pub fn why_fenced(&self) -> String {
        match self.record() {
            Ok(Some(record)) => record.to_string(),
            Ok(None) => "this host owns nothing".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        (Err(OpenError::Missing), Some(size)) if !spec.read_only => {
            let disk = Disk::create(path, *size, spec.cache).map_err(|error| refuse(&error))?;
            created.push(path.clone());
            Some(disk)
        }
        // Made at PREPARE, when the size is known; but only where it can be.
        (Err(OpenError::Missing), None) if !spec.read_only && !spec.shared && has_directory(path) => None,
        (Err(error), _) => return Err(refuse(&error)),
    };
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

/// This machine's identity in records and stamps. There is no durable record yet that could outlive the process, so
/// neither need this.
fn this_machine() -> Result<Host, Problem> {
    Host::random().map_err(|error| Problem::fatal("serve", "random numbers", error))
}

/// The kernel's number for this boot; zero where it does not tell.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    Host::from_hex(&digits).map_or([0; 16], |id| id.0)
}
