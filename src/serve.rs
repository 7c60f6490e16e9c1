//! The long-running commands: `serve`, one guest behind its three doors, and `export`, a plain NBD server.
//!
//! Both bind everything first, so that nothing is changed when something is in use, then open the disks, start the
//! doors, say that they are ready, and go on until they are killed: ending is as safe as a crash, and a crash is as
//! safe as ending.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::attach::{Device, NotAttached};
use crate::control::link::Passengers;
use crate::control::port_door;
use crate::control::server::{Desk, News, Server};
use crate::control::wire::Gate as ShownGate;
use crate::control::wire::{
    self, AttachRequest, AttachedStatus, DiskStatus, MigrateRequest, Migration, Owner, Ownership, Recovered,
    SetRequest, Status, text,
};
use crate::disk::{Access, Disk};
use crate::domain::Source;
use crate::door_at::DoorAt;
use crate::doors::{self, GuestDirectory, Place};
use crate::error::{Problem, reason};
use crate::export::{Door, Export, Gate};
use crate::guest::Guest;
use crate::inherited;
use crate::limits::{
    CLIENT_QUIET, CONNECTION_STACK, HANG_UP_POLL, LANE_SILENCE_MAX, RELAYED_MAX, RESTART_LOOK, RESTART_PATIENCE,
};
use crate::listener::Listener;
use crate::migrate::destination::{self, MigrationDirectory};
use crate::migrate::{recover, settle};
use crate::options::{ExportOptions, Lifetime, ServeOptions};
use crate::ownership::{Event, Journal, KeepError, Lineage, State, Word};
use crate::ready::{self, Ready};
use crate::socket::Socket;
use crate::standing::{self, Standing};

/// `blockferry serve`.
///
/// # Errors
/// Something is in use, or a disk is not what it should be.
pub fn serve(mut options: ServeOptions) -> Result<(), Problem> {
    let control = bind_all("control door", &options.control)?;
    let nbd = bind_all("guest door", &options.nbd)?;
    let listen = options.listen.as_ref().map(|address| bind("migration door", address)).transpose()?;
    let address = listen.as_ref().map(|listener| listener.address().clone());
    // Where a free port was to be taken, that is known now.
    let bound = |doors: &[Arc<Listener>]| doors.iter().map(|door| door.at().clone()).collect();
    (options.control, options.nbd) = (bound(&control), bound(&nbd));
    let guest = Arc::new(Guest::open(&options, address)?);
    settle::start(&guest).map_err(|error| Problem::fatal("serve", &guest.name, error))?;
    guest.attached.resume(&guest);

    for listener in &nbd {
        open_guest_door(&guest, listener)?;
    }
    if let Some(listener) = &listen {
        open_migration_door(&guest, listener)?;
    }
    for name in &options.control_ports {
        open_control_port(&guest, name)?;
    }
    let desk = ControlDesk::new(&guest);
    let server = Server::new(&desk);
    let status = desk.status();
    let doors: Vec<DoorAt> = nbd.iter().map(|listener| listener.at().clone()).collect();
    ready::announce(
        &Ready {
            name: &guest.name,
            record: Some((status.state, status.term, status.generation)),
            nbd: &doors,
            listen: listen.as_ref().map(|listener| listener.at()),
            next: &status.hint,
        },
        options.json,
    );
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for listener in &control {
            let (server, ended) = (&server, ended.clone());
            scope.spawn(move || ended.send((listener.at().clone(), server.run(listener))));
        }
        // They run until the process ends, or one of them cannot go on: then nobody could say what is to be done.
        let failed = end.recv();
        control.iter().for_each(|listener| listener.stop());
        match failed {
            Ok((address, Err(error))) => Err(Problem::fatal("control door", address, reason(&error))),
            _ => Ok(()),
        }
    })
}

fn bind_all(what: &'static str, doors: &[DoorAt]) -> Result<Vec<Arc<Listener>>, Problem> {
    doors.iter().map(|door| bind(what, door)).collect()
}

/// Binds a door. A process that was killed a moment ago may still hold it, as long as the kernel is not done with it.
fn bind(what: &'static str, at: &DoorAt) -> Result<Arc<Listener>, Problem> {
    let deadline = Instant::now() + RESTART_PATIENCE;
    loop {
        match Listener::open(at) {
            Ok(listener) => return Ok(Arc::new(listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(RESTART_LOOK);
            }
            Err(error) => return Err(Problem::fatal(what, at, reason(&error))),
        }
    }
}

fn open_guest_door(guest: &Arc<Guest>, listener: &Arc<Listener>) -> Result<(), Problem> {
    let guest = Arc::clone(guest);
    let exports: Vec<_> = guest.exports().cloned().collect();
    let opened = doors::open("guest", Arc::clone(listener), move |socket, place| {
        socket.probe(CLIENT_QUIET);
        let fenced = || guest.why_fenced();
        let directory = GuestDirectory { exports: &exports, socket, fenced: &fenced };
        doors::serve_nbd("guest", socket, Some(place), &directory, |_| {});
    });
    opened.map_err(|error| Problem::fatal("guest door", listener.at(), error))
}

fn open_migration_door(guest: &Arc<Guest>, listener: &Arc<Listener>) -> Result<(), Problem> {
    let guest = Arc::clone(guest);
    let opened = doors::open("migration", Arc::clone(listener), move |socket, place| {
        // A source that has vanished leaves nothing behind; a phase connection soon has shorter times.
        socket.set_keep_alive(LANE_SILENCE_MAX / 2);
        let directory = MigrationDirectory { guest: &guest, socket };
        let phases = |socket: &Arc<Socket>| destination::serve(&guest, socket, false);
        doors::serve_nbd("migration", socket, Some(place), &directory, phases);
    });
    opened.map_err(|error| Problem::fatal("migration door", listener.at(), error))
}

/// A port is looked for in the background: its driver may be loaded later.
fn open_control_port(guest: &Arc<Guest>, name: &str) -> Result<(), Problem> {
    let desk = ControlDesk::new(guest);
    let port = name.to_owned();
    let spawned = std::thread::Builder::new().name("control port".to_owned()).spawn(move || -> () {
        port_door::run(&port, &desk);
    });
    spawned.map(drop).map_err(|error| Problem::fatal("control door", format_args!("virtio:{name}"), reason(&error)))
}

/// `blockferry export`: no guest, no record, the same code.
///
/// # Errors
/// The address is in use, or a file is not a disk.
pub fn export(options: ExportOptions) -> Result<(), Problem> {
    let entries: Vec<Entry> = options.nbd.iter().map(entry).collect::<Result<_, _>>()?;
    if entries.len() > 1 && entries.iter().any(|entry| matches!(entry, Entry::Connection(_))) {
        return Err(Problem::usage("export", "--nbd", "a connection that was passed is served alone"));
    }
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let mut exports: Vec<Arc<Export>> = Vec::new();
    for file in &options.files {
        let refuse = |cause: &dyn std::fmt::Display| Problem::fatal("open disk", file.path.display(), cause);
        let identity = Disk::identify(&file.path);
        if exports.iter().any(|export| export.disk().map(|disk| disk.identity()) == identity && identity.is_some()) {
            return Err(refuse(&"is exported twice"));
        }
        let disk = Disk::open(&file.path, access, options.cache).map_err(|error| refuse(&error))?;
        exports.push(Export::new(&file.name, Some(Arc::new(disk)), options.read_only, Gate::Serving));
    }
    let (left, gone) = std::sync::mpsc::channel();
    let mut listeners = Vec::new();
    for entry in entries {
        let listener = match entry {
            Entry::Listener(listener) => listener,
            Entry::Connection(socket) => {
                ready::notify();
                serve_export(&exports, &socket, None);
                return Ok(());
            }
        };
        let (exports, left) = (exports.clone(), left.clone());
        listeners.push(Arc::clone(&listener));
        doors::open("export", Arc::clone(&listener), move |socket, place| {
            let visits_before: usize = exports.iter().map(|export| export.visits()).sum();
            serve_export(&exports, socket, Some(place));
            let visited = exports.iter().map(|export| export.visits()).sum::<usize>() > visits_before;
            if visited && exports.iter().all(|export| export.connections(Door::Guest) == 0) {
                let _ = left.send(());
            }
        })
        .map_err(|error| Problem::fatal("export", listener.at(), error))?;
    }
    let nbd: Vec<DoorAt> = listeners.iter().map(|listener| listener.at().clone()).collect();
    ready::announce(&Ready { name: "export", record: None, nbd: &nbd, listen: None, next: "" }, options.json);
    loop {
        // The sender lives as long as the doors do.
        let _ = gone.recv();
        if options.lifetime == Lifetime::Once {
            listeners.iter().for_each(|listener| listener.stop());
            return Ok(());
        }
    }
}

/// A door of `export`: one that listens, or one connection that was passed on.
enum Entry {
    Listener(Arc<Listener>),
    Connection(Arc<Socket>),
}

fn entry(at: &DoorAt) -> Result<Entry, Problem> {
    let DoorAt::Inherited(number) = at else { return bind("export", at).map(Entry::Listener) };
    let fault = |cause: &dyn std::fmt::Display| Problem::fatal("export", at, cause);
    let taken = inherited::take(*number).map_err(|cause| fault(&cause))?;
    let entry = if taken.listens {
        Listener::inherit(*number, taken).map(Arc::new).map(Entry::Listener)
    } else {
        taken.into_connection().map(|fd| Entry::Connection(Arc::new(Socket::new(fd))))
    };
    entry.map_err(|error| fault(&reason(&error)))
}

fn serve_export(exports: &[Arc<Export>], socket: &Arc<Socket>, place: Option<&Place>) {
    socket.probe(CLIENT_QUIET);
    let fenced = || "this export is fenced".to_owned();
    let directory = GuestDirectory { exports, socket, fenced: &fenced };
    doors::serve_nbd("export", socket, place, &directory, |_| {});
}

/// What the control door talks to.
struct ControlDesk {
    guest: Arc<Guest>,
    /// Connections to the migration door that came in here.
    relayed: Arc<AtomicUsize>,
}

impl ControlDesk {
    fn new(guest: &Arc<Guest>) -> Self {
        Self { guest: Arc::clone(guest), relayed: Arc::default() }
    }
}

impl Desk for ControlDesk {
    fn status(&self) -> Status {
        let guest = &*self.guest;
        let record = guest.record();
        let ownership = Standing { guest: &guest.name, record: &record, rejected: guest.rejected() }.ownership();
        let known = record.as_ref().ok().and_then(Option::as_ref);
        let void = known.is_some_and(|record| matches!(record.state, State::Void { .. }));
        let stands = known
            .filter(|record| matches!(record.state, State::Owner { .. }))
            .and_then(|record| guest.destination.why_it_stands(record.attempt()?));
        let left = if void { guest.journal() } else { None };
        let hint = match (left, ownership.next.as_str()) {
            (Some(left), _) if left.remains().count() > 0 => text(&kept(&guest.name, &left)),
            // Whoever looks here sees that it owns, and has to know that this is not all.
            (_, "") if stands.is_some() => {
                text(&format!("the guest was not let run here: {}", stands.unwrap_or_default()))
            }
            (_, "") if ownership.owner != Owner::Here => ownership.text,
            _ if ownership.rejected => text(&format!("{}; {}", ownership.text, ownership.next)),
            _ => ownership.next,
        };
        Status {
            guest: text(&guest.name),
            state: ownership.state,
            term: ownership.term,
            generation: ownership.generation,
            lineage: known.map_or(0, |record| u128::from_be_bytes(record.lineage.0)),
            peer: ownership.address,
            migration: match guest.source.is_running() {
                None => Migration::None,
                Some(true) => Migration::Running,
                Some(false) => Migration::Ended,
            },
            hint,
            // No more than --disk takes.
            disks: guest
                .disks
                .iter()
                .map(|disk| DiskStatus {
                    name: text(&disk.spec.name),
                    size_bytes: disk.export.as_ref().and_then(|e| e.disk()).map_or(0, |disk| disk.size()),
                    stays: disk.spec.stays(),
                    gate: disk.export.as_ref().map(|export| shown(export.gate())),
                })
                .collect(),
            // No more than there are disks.
            attached: guest
                .attached
                .shown()
                .iter()
                .map(|(disk, device)| AttachedStatus { disk: text(disk), device: text(&device.to_string()) })
                .collect(),
            receipt: guest.receipt().as_ref().map(standing::kept),
        }
    }

    fn ownership(&self) -> Ownership {
        let guest = &*self.guest;
        let standing = Standing { guest: &guest.name, record: &guest.record(), rejected: guest.rejected() };
        Ownership { receipt: guest.receipt().as_ref().map(standing::kept), ..standing.ownership() }
    }

    fn recover(&self, word: wire::Word) -> Result<Recovered, Problem> {
        recover::recover(&self.guest, word)
    }

    fn claim(&self, discard_record: bool) -> Result<(), Problem> {
        let guest = &*self.guest;
        let refuse = |cause: &dyn std::fmt::Display| Problem::refused("claim", &guest.name, cause);
        if let Some(missing) = guest.disks.iter().find(|disk| {
            matches!(disk.spec.source, Source::File { .. })
                && disk.export.as_ref().is_some_and(|export| export.disk().is_none())
        }) {
            return Err(refuse(&format_args!("disk {} does not exist", missing.spec.name)));
        }
        if let Some((why, _)) = guest.rejected().filter(|_| !discard_record) {
            return Err(refuse(&format_args!("the record here {why}; --discard-record shows it and throws it away")));
        }
        // W6.
        if let Some((disk, why)) = guest.attached.kept(guest) {
            return Err(refuse(&format_args!("disk {disk} {why}")));
        }
        let lineage = Lineage::random().map_err(|error| refuse(&error))?;
        let word = Word::random().map_err(|error| refuse(&error))?;
        let images = guest.images().map_err(|cause| refuse(&cause))?;
        let event = Event::Claim { lineage, word, images, discard: discard_record };
        // A full disk refuses it, and does no more than that.
        guest.write_ahead(&[std::slice::from_ref(&event)]).map_err(|cause| refuse(&cause))?;
        match guest.apply(&event) {
            Ok(_) => Ok(()),
            Err(KeepError::Refused(refusal)) => Err(refuse(&refusal)),
            Err(error @ KeepError::Unknown(_)) => Err(Problem::unknown("claim", &guest.name, error)),
        }
    }

    fn migrate(&self, request: &MigrateRequest, passed: Passengers) -> Result<u128, Problem> {
        let attempt = self.guest.source.start(&self.guest, request, passed)?;
        Ok(u128::from_be_bytes(attempt.0))
    }

    fn switch(&self) -> Result<(), Problem> {
        self.guest.source.running("switch", &self.guest)?.switch();
        Ok(())
    }

    fn cancel(&self, attempt: Option<u128>, cause: &str) -> Result<(), Problem> {
        let guest = &*self.guest;
        let refuse = |cause: String| Problem::refused("cancel", &guest.name, cause);
        match guest.source.running("cancel", guest) {
            Ok(job) if attempt.is_some_and(|attempt| attempt != u128::from_be_bytes(job.attempt.0)) => {
                Err(refuse("that migration is over".to_owned()))
            }
            Ok(job) => job.cancel(cause).map_err(refuse),
            Err(problem) if attempt.is_some() => Err(problem),
            Err(_) => guest.destination.cancel(guest, cause).map_err(refuse),
        }
    }

    fn attach(&self, request: &AttachRequest) -> Result<bool, Problem> {
        let guest = &self.guest;
        let device =
            Device::parse(&request.device).map_err(|cause| Problem::usage("attach", &request.device, cause))?;
        match guest.attached.attach(guest, &request.disk, device) {
            Ok(()) => Ok(true),
            Err(NotAttached::Yet) => {
                guest.attached.rest(HANG_UP_POLL);
                Ok(false)
            }
            Err(NotAttached::Refused(cause)) => Err(Problem::refused("attach", &guest.name, cause)),
        }
    }

    fn detach(&self, device: &str) -> Result<(), Problem> {
        let parsed = Device::parse(device).map_err(|cause| Problem::usage("detach", device, cause))?;
        let detached = self.guest.attached.detach(&self.guest, parsed);
        detached.map_err(|cause| Problem::refused("detach", device, cause))
    }

    fn accept(&self, socket: Arc<Socket>) {
        if self.relayed.fetch_add(1, Ordering::AcqRel) >= RELAYED_MAX {
            self.relayed.fetch_sub(1, Ordering::AcqRel);
            log::warn!("migration door: more than {RELAYED_MAX} connections through the control door");
            socket.shutdown();
            return;
        }
        let (guest, relayed) = (Arc::clone(&self.guest), Arc::clone(&self.relayed));
        let serve = move || {
            let directory = MigrationDirectory { guest: &guest, socket: &socket };
            let phases = |socket: &Arc<Socket>| destination::serve(&guest, socket, true);
            doors::serve_nbd("migration", &socket, None, &directory, phases);
            // Others may hold it still, and whoever relays it waits for its end.
            socket.shutdown();
            relayed.fetch_sub(1, Ordering::AcqRel);
        };
        let thread = std::thread::Builder::new().name("relayed connection".to_owned()).stack_size(CONNECTION_STACK);
        if let Err(error) = thread.spawn(serve) {
            self.relayed.fetch_sub(1, Ordering::AcqRel);
            log::warn!("migration door: no thread for a connection: {error}");
        }
    }

    fn set(&self, change: &SetRequest) -> Result<(), Problem> {
        self.guest.source.running("set", &self.guest)?.set(change);
        Ok(())
    }

    fn news(&self, attempt: Option<u128>, timeout: Duration) -> Option<News> {
        self.guest.source.news(attempt, timeout)
    }
}

/// What to type where an attempt has left something.
fn kept(guest: &str, journal: &Journal) -> String {
    let disks = match journal.remains().count() {
        1 => "1 disk".to_owned(),
        disks => format!("{disks} disks"),
    };
    format!(
        "the next migration goes on from what an earlier one left on {disks}; blockferry recover {guest} --forget \
         gives it up"
    )
}

fn shown(gate: Gate) -> ShownGate {
    match gate {
        Gate::Incoming => ShownGate::Incoming,
        Gate::Receiving => ShownGate::Receiving,
        Gate::Sealed => ShownGate::Sealed,
        Gate::Serving => ShownGate::Serving,
        Gate::Quiesced => ShownGate::Quiesced,
        Gate::Fenced => ShownGate::Fenced,
        Gate::Closed => ShownGate::Closed,
    }
}
