//! `blockferry migrate`.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use super::guest::{CONTROL, GuestDoor, PLAINTEXT, guest_door};
use super::options::{Matches, Spec, Takes, later, opt};
use super::{Command, print};
use crate::address::Address;
use crate::control::client::Client;
use crate::control::wire::{MigrateRequest, Reply, Request, Synchronous, Transport, Verify, text};
use crate::domain::{check_disk_name, parse_size};
use crate::error::{Exit, Problem, reason};
use crate::inherited;
use crate::json;
use crate::limits::{CONNECTIONS_PER_DISK_MAX, DISKS_MAX, DOWNTIME_LIMIT_DEFAULT_MS, DOWNTIME_LIMIT_MAX_MS};
use crate::place::Place;
use crate::progress::{Display, Form};
use crate::uri::is_nbd;

/// What `migrate` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrateOptions {
    /// The guest.
    pub door: GuestDoor,
    /// The destination's migration door.
    pub destination: Place,
    /// Disks there that are not empty are overwritten.
    pub overwrite: bool,
    /// Disks there hold an older copy: only what differs is sent.
    pub incremental: bool,
    /// What is below the top layers of the two sides' disks is the same: it is not read.
    pub same_base: bool,
    /// What of the copy is verified before the hand-over.
    pub verify: Verify,
    /// Exactly these disks move; empty: all that move by themselves.
    pub disks: Vec<String>,
    /// Bytes a second for all disks together; 0: no limit.
    pub bandwidth_bytes: u64,
    /// Longest predicted final pass that counts as converged.
    pub downtime_limit_ms: u32,
    /// Wait for `switch` when converged.
    pub hold: bool,
    /// Data connections of one disk; 0: one, or several to a distant host.
    pub connections: u8,
    /// Whether guest writes wait for the mirror.
    pub synchronous: Synchronous,
    /// Return once the migration has started.
    pub detach: bool,
    /// What has been sent stays at the destination, however the migration ends.
    pub keep_partial: bool,
    /// How the disks are to travel.
    pub transport: Transport,
    /// Disks that stay need not be within the destination's reach.
    pub heedless: bool,
}

pub(super) const SPEC: Spec = Spec {
    name: "migrate",
    arguments: "GUEST DEST [--OPTION]...",
    about: "Move the guest's disks, and its ownership, to another host",
    options: &[
        opt("copy-storage-all", Takes::Nothing, "copy everything (default); the disks there must be empty"),
        opt("copy-storage-inc", Takes::Nothing, "disks there hold an older copy: only what differs is sent"),
        opt(
            "same-base",
            Takes::Nothing,
            "with --copy-storage-inc: the disks are overlays on the same base (behind\n\
             qemu-nbd --allocation-depth), which is not read",
        ),
        opt("overwrite", Takes::Nothing, "disks there that are not empty are overwritten"),
        opt(
            "migrate-disks",
            Takes::One("A,B"),
            "move exactly these disks [all but shared, read-only, external and\nempty ones]",
        ),
        opt("bandwidth", Takes::One("SIZE"), "bytes a second for all disks together; 0: no limit [0]"),
        opt("downtime-limit", Takes::One("MS"), "longest final pass that counts as converged [300]"),
        opt("hold", Takes::Nothing, "when converged, wait for: blockferry switch GUEST"),
        opt("detach", Takes::Nothing, "return once it has started; see: blockferry status GUEST"),
        opt(
            "keep-partial",
            Takes::Nothing,
            "what has been sent stays there even if this is cancelled; the next\nmigration goes on from it",
        ),
        opt("connections", Takes::One("N"), "data connections of one disk, 1 to 8 [1, more to a distant host]"),
        opt(
            "synchronous",
            Takes::One("MODE"),
            "guest writes wait for the mirror: auto (when it does not converge),\n\
             always (from the end of the bulk pass) or never [auto]",
        ),
        opt(
            "transport",
            Takes::One("MODE"),
            "nbd (data connections), stream (everything inside one connection)\n\
             or auto: stream where NBD is not possible [auto]",
        ),
        opt(
            "verify",
            Takes::One("MODE"),
            "what both sides hash and compare before the hand-over: what was\n\
             written, full (everything) or none [written]",
        ),
        opt("unsafe", Takes::Nothing, "move even if the destination does not reach a disk that stays"),
        opt(
            "plain",
            Takes::Nothing,
            "DEST is a plain NBD server, nbd://HOST[:PORT]/[EXPORT] or\n\
             nbd+unix:///[EXPORT]?socket=PATH: weaker promises, see the notes",
        ),
        CONTROL,
        PLAINTEXT,
        later("tls-dir", Takes::One("DIR")),
        later("key", Takes::One("FILE")),
        later("peers", Takes::One("FILE")),
    ],
    notes: "DEST is the --listen address of `blockferry serve GUEST` on the other host, or exec:COMMAND: a command\n\
            (words with quotes, no shell) whose stdin and stdout lead to `blockferry accept GUEST` there, or fd:N: a\n\
            connected socket that this command was started with and that leads there, or fd:IN,OUT: two pipes. Such a\n\
            connection cannot be opened again.\n\
            With --plain DEST is somebody's NBD server (qemu-nbd with a qcow2 image, nbdkit). An EXPORT takes the one\n\
            disk that moves; without one, one disk goes to the default export and several to the exports of their\n\
            names. Nothing there keeps a record or a second writer away, and a lost connection ends the migration.\n\
            Runs in the foreground; when it goes away (Ctrl-C) the migration ends and this host goes on, until\n\
            ownership is being given away.\n\n\
            Examples:\n\
            \x20 blockferry migrate g1 tcp://B:49152 --insecure-plaintext\n\
            \x20 blockferry migrate g1 'exec:ssh B blockferry accept g1'\n\
            \x20 blockferry migrate g1 --plain 'nbd+unix:///vda?socket=/run/q.sock' --verify none\n\
            \x20 blockferry migrate g1 tcp://127.0.0.1:49152 --migrate-disks vda,vdb --bandwidth 100M --hold\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [guest, destination] = matches.arguments(["GUEST", "DEST"])?;
    let plain = matches.flag("plain");
    if plain != is_nbd(destination) {
        let cause = if plain { "--plain goes to an NBD URI" } else { "a plain NBD server: see --plain" };
        return Err(SPEC.usage("DEST", format!("'{destination}': {cause}")));
    }
    let destination = Place::parse(destination).map_err(|cause| SPEC.usage("DEST", cause))?;
    if matches!(destination, Place::At(Address::Tcp { port: 0, .. })) {
        return Err(SPEC.usage("DEST", format!("'{destination}': port 0 can be listened on only")));
    }
    let transport = matches.read("transport", parse_transport)?.unwrap_or_default();
    if transport == Transport::Nbd && destination.address().is_none() {
        return Err(SPEC.usage("--transport nbd", format!("'{destination}' is one connection: no NBD beside it")));
    }
    let senseless = [
        ("transport", transport == Transport::Stream, "a plain NBD server takes no stream"),
        ("keep-partial", matches.flag("keep-partial"), "nothing at a plain NBD server is ever removed"),
        ("synchronous", matches.value("synchronous").is_some_and(|mode| mode != "never"), "not built yet with --plain"),
        ("unsafe", matches.flag("unsafe"), "nobody at a plain NBD server looks for disks that stay"),
    ];
    if let Some((option, _, cause)) = senseless.iter().find(|(_, given, _)| plain && *given) {
        return Err(matches.error(option, cause));
    }
    let [all, inc, overwrite] = ["copy-storage-all", "copy-storage-inc", "overwrite"].map(|name| matches.flag(name));
    if inc && (all || overwrite) {
        let other = if all { "copy-storage-all" } else { "overwrite" };
        return Err(SPEC.usage("--copy-storage-inc", format!("cannot be combined with --{other}")));
    }
    let same_base = matches.flag("same-base");
    if same_base && !inc {
        return Err(SPEC.usage("--same-base", "says what need not be compared: only with --copy-storage-inc"));
    }
    let most = u8::try_from(CONNECTIONS_PER_DISK_MAX).unwrap_or(u8::MAX);
    Ok(Command::Migrate(MigrateOptions {
        door: guest_door(&SPEC, matches, guest)?,
        destination,
        overwrite,
        incremental: inc,
        same_base,
        verify: matches.read("verify", parse_verify)?.unwrap_or_default(),
        disks: matches.read("migrate-disks", parse_names)?.unwrap_or_default(),
        bandwidth_bytes: matches.read("bandwidth", parse_size)?.unwrap_or(0),
        synchronous: matches.read("synchronous", parse_synchronous)?.unwrap_or_default(),
        downtime_limit_ms: matches
            .number("downtime-limit", 1, DOWNTIME_LIMIT_MAX_MS)?
            .unwrap_or(DOWNTIME_LIMIT_DEFAULT_MS),
        hold: matches.flag("hold"),
        connections: matches.number("connections", 1, most)?.unwrap_or(0),
        detach: matches.flag("detach"),
        keep_partial: matches.flag("keep-partial"),
        transport,
        heedless: matches.flag("unsafe"),
    }))
}

fn parse_transport(text: &str) -> Result<Transport, String> {
    let modes = [Transport::Auto, Transport::Nbd, Transport::Stream];
    let known = modes.into_iter().find(|mode| mode.word() == text);
    known.ok_or_else(|| format!("'{text}' is neither auto, nbd nor stream"))
}

fn parse_verify(text: &str) -> Result<Verify, String> {
    let modes = [Verify::Written, Verify::Full, Verify::None];
    let known = modes.into_iter().find(|mode| mode.word() == text);
    known.ok_or_else(|| format!("'{text}' is neither written, full nor none"))
}

fn parse_synchronous(text: &str) -> Result<Synchronous, String> {
    let modes = [Synchronous::Auto, Synchronous::Always, Synchronous::Never];
    let known = modes.into_iter().find(|mode| mode.word() == text);
    known.ok_or_else(|| format!("'{text}' is neither auto, always nor never"))
}

/// `A,B`.
fn parse_names(text: &str) -> Result<Vec<String>, String> {
    let names: Vec<String> = text.split(',').map(str::to_owned).collect();
    names.iter().try_for_each(|name| check_disk_name(name))?;
    if names.len() > DISKS_MAX {
        return Err(format!("{} disks are more than {DISKS_MAX}", names.len()));
    }
    match names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        Some((_, name)) => Err(format!("disk {name} is named twice")),
        None => Ok(names),
    }
}

impl MigrateOptions {
    /// As it travels through the control door.
    #[must_use]
    pub fn request(&self) -> MigrateRequest {
        MigrateRequest {
            destination: text(&self.destination.to_string()),
            overwrite: self.overwrite,
            disks: self.disks.iter().map(|name| text(name)).collect(),
            bandwidth_bytes: self.bandwidth_bytes,
            downtime_limit_ms: self.downtime_limit_ms,
            hold: self.hold,
            connections: self.connections,
            detach: self.detach,
            insecure_plaintext: self.door.insecure_plaintext,
            incremental: self.incremental,
            same_base: self.same_base,
            verify: self.verify,
            synchronous: self.synchronous,
            keep_partial: self.keep_partial,
            transport: self.transport,
            heedless: self.heedless,
        }
    }
}

pub(super) fn run(options: &MigrateOptions, as_json: bool, terminal: bool) -> Result<(), Problem> {
    options.destination.check_plaintext("migrate", options.door.insecure_plaintext)?;
    let guest = &options.door.guest;
    let passed = match &options.destination {
        Place::Passed(passed) => {
            take(passed.numbers()).map_err(|cause| Problem::refused("migrate", &options.destination, cause))?
        }
        _ => Vec::new(),
    };
    let mut client = options.door.connect("migrate")?;
    if let (Place::Plain(uri), false) = (&options.destination, as_json) {
        print(&format!(
            "{guest}: {uri} is a plain NBD server: it keeps no record and no second writer away, and a lost connection \
             ends the migration\n"
        ));
    }
    let request = Request::Migrate(options.request());
    if passed.is_empty() {
        client.tell(&request)?;
    } else {
        client.tell_passing(&request, &passed.iter().map(OwnedFd::as_fd).collect::<Vec<_>>())?;
        drop(passed);
    }
    if options.detach {
        let text = if as_json { json::ok("migrate", guest) } else { format!("{guest}: started\n") };
        print(&text);
        return Ok(());
    }
    let form = match (as_json, terminal) {
        (true, _) => Form::Json,
        (false, true) => Form::Terminal,
        (false, false) => Form::Lines,
    };
    follow(&mut client, &mut Display::new(std::io::stdout(), form, guest))
}

/// The connection that this command was started with: the process that serves the guest uses it from now on, and
/// nothing is printed into it.
fn take(numbers: (u32, Option<u32>)) -> Result<Vec<OwnedFd>, String> {
    let fault = |error: std::io::Error| reason(&error);
    let (input, Some(output)) = numbers else {
        let taken = inherited::take(numbers.0).and_then(|taken| inherited::connected(taken.fd))?;
        return Ok(vec![taken.into_connection().map_err(fault)?]);
    };
    let pipe = |number, sends| inherited::take_half(number, sends).map_err(|cause| format!("{number} {cause}"));
    let pipes = vec![pipe(input, false)?, pipe(output, true)?];
    pipes.iter().try_for_each(inherited::release_standard).map_err(fault)?;
    Ok(pipes)
}

/// Shows a migration until its end.
pub(super) fn follow<W: std::io::Write>(client: &mut Client, display: &mut Display<W>) -> Result<(), Problem> {
    loop {
        match client.next_reply() {
            Ok(Reply::Progress(progress)) => display.show(&progress, Instant::now()),
            Ok(Reply::Done(done)) => return display.finish(&done),
            Ok(_) => {}
            // Whatever broke after the start, the migration's end is not known here.
            Err(problem) => return Err(Problem { exit: Exit::Unknown, ..problem }),
        }
    }
}
