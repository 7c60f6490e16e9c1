//! The short commands about a guest that is served: `claim`, `switch`, `cancel`, `status`, `set`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use super::options::{Matches, Opt, Spec, Takes, opt};
use super::{Command, print, recover};
use crate::address::Address;
use crate::control::client::Client;
use crate::control::wire::{Migration, Reply, Request, SetRequest, Status, text};
use crate::domain::{check_guest_name, parse_size};
use crate::error::{OneLine, Problem};
use crate::json;
use crate::limits::DOWNTIME_LIMIT_MAX_MS;
use crate::progress::{Display, Form};
use crate::units::size;

/// Which guest, and where its control door is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDoor {
    /// The guest.
    pub guest: String,
    /// Its control door.
    pub control: Address,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
}

/// What `claim` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimOptions {
    /// The guest.
    pub door: GuestDoor,
    /// A broken or foreign record is thrown away.
    pub discard_record: bool,
}

/// What `set` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetOptions {
    /// The guest.
    pub door: GuestDoor,
    /// What changes, at least one thing.
    pub change: SetRequest,
}

pub(super) const CONTROL: Opt =
    opt("control", Takes::One("ADDR"), "the guest's control door [unix:///run/blockferry/GUEST/control.sock]");
pub(super) const PLAINTEXT: Opt = opt("insecure-plaintext", Takes::Nothing, "allow TCP beyond this host without keys");

pub(super) const CLAIM: Spec = Spec {
    name: "claim",
    arguments: "GUEST [--OPTION]...",
    about: "Say that this host owns the guest's disks: the first record, once in the guest's life",
    options: &[
        opt("discard-record", Takes::Nothing, "throw a broken or foreign record away; it is printed first"),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Refused where a record exists. `blockferry serve` must be running for the guest: only it knows the images\n\
            that the record is to speak of.\n\n\
            Example:\n\
            \x20 blockferry claim g1\n",
};

pub(super) const SWITCH: Spec = Spec {
    name: "switch",
    arguments: "GUEST [--OPTION]...",
    about: "Let a migration held by --hold hand over now",
    options: &[CONTROL, PLAINTEXT],
    notes: "Example:\n\x20 blockferry switch g1\n",
};

pub(super) const CANCEL: Spec = Spec {
    name: "cancel",
    arguments: "GUEST [--OPTION]...",
    about: "End the running migration; the source goes on",
    options: &[CONTROL, PLAINTEXT],
    notes: "Refused once ownership is being given away.\n\nExample:\n\x20 blockferry cancel g1\n",
};

pub(super) const STATUS: Spec = Spec {
    name: "status",
    arguments: "GUEST [--OPTION]...",
    about: "Show who owns, every disk, and the migration",
    options: &[CONTROL, PLAINTEXT],
    notes: "Example:\n\x20 blockferry status g1\n",
};

pub(super) const SET: Spec = Spec {
    name: "set",
    arguments: "GUEST --bandwidth SIZE | --downtime-limit MS",
    about: "Change the running migration",
    options: &[
        opt("bandwidth", Takes::One("SIZE"), "bytes a second for all disks together; 0 lifts the limit"),
        opt("downtime-limit", Takes::One("MS"), "longest final pass that counts as converged"),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Example:\n\x20 blockferry set g1 --bandwidth 100M\n",
};

/// `--state`, or the default place of a guest's record.
pub(super) fn state_directory(matches: &Matches, guest: &str) -> Result<PathBuf, Problem> {
    let given = matches.read("state", |path| match path {
        "" => Err("the path is empty".to_owned()),
        path => Ok(PathBuf::from(path)),
    })?;
    Ok(given.unwrap_or_else(|| PathBuf::from(format!("/var/lib/blockferry/{guest}"))))
}

/// A door of a guest at its default place.
#[must_use]
pub fn door(guest: &str, name: &str) -> Address {
    Address::Unix(format!("/run/blockferry/{guest}/{name}.sock").into())
}

pub(super) fn parse_claim(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    let discard_record = matches.flag("discard-record");
    Ok(Command::Claim(ClaimOptions { door: guest_door(&CLAIM, matches, guest)?, discard_record }))
}

pub(super) fn parse_switch(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    Ok(Command::Switch(guest_door(&SWITCH, matches, guest)?))
}

pub(super) fn parse_cancel(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    Ok(Command::Cancel(guest_door(&CANCEL, matches, guest)?))
}

pub(super) fn parse_status(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    Ok(Command::Status(guest_door(&STATUS, matches, guest)?))
}

pub(super) fn parse_set(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    let change = SetRequest {
        bandwidth_bytes: matches.read("bandwidth", parse_size)?,
        downtime_limit_ms: matches.number("downtime-limit", 1, DOWNTIME_LIMIT_MAX_MS)?,
    };
    if change == SetRequest::default() {
        return Err(SET.usage(guest, "nothing to change: --bandwidth SIZE or --downtime-limit MS"));
    }
    Ok(Command::Set(SetOptions { door: guest_door(&SET, matches, guest)?, change }))
}

/// The guest of any command that asks through its control door.
pub(super) fn guest_door(spec: &Spec, matches: &Matches, guest: &str) -> Result<GuestDoor, Problem> {
    check_guest_name(guest).map_err(|cause| spec.usage("GUEST", cause))?;
    let control = matches.read("control", Address::parse)?.unwrap_or_else(|| door(guest, "control"));
    Ok(GuestDoor { guest: guest.to_owned(), control, insecure_plaintext: matches.flag("insecure-plaintext") })
}

impl GuestDoor {
    /// Connects to the process that serves the guest.
    ///
    /// # Errors
    /// A refusal: nobody serves it there, or the door is beyond this host.
    pub fn connect(&self, operation: &'static str) -> Result<Client, Problem> {
        self.control.check_plaintext(operation, self.insecure_plaintext)?;
        Client::connect(operation, &self.guest, &self.control)
    }

    /// Tells the process one thing and says that it is done.
    fn tell(&self, operation: &'static str, request: &Request, done: &str, as_json: bool) -> Result<String, Problem> {
        self.connect(operation)?.tell(request)?;
        Ok(if as_json { json::ok(operation, &self.guest) } else { format!("{}: {done}\n", self.guest) })
    }
}

pub(super) fn claim(options: &ClaimOptions, as_json: bool) -> Result<String, Problem> {
    let request = Request::Claim { discard_record: options.discard_record };
    if options.discard_record {
        // Before it is gone, not after.
        let found = recover::ask(&mut options.door.connect("claim")?)?;
        if found.rejected {
            print(&if as_json { json::ownership(&found) } else { recover::ownership_text(&found) });
        }
    }
    options.door.tell("claim", &request, "this host owns the guest's disks", as_json)
}

pub(super) fn switch(door: &GuestDoor, as_json: bool) -> Result<String, Problem> {
    door.tell("switch", &Request::Switch, "handing over", as_json)
}

pub(super) fn cancel(door: &GuestDoor, as_json: bool) -> Result<String, Problem> {
    door.tell("cancel", &Request::Cancel { cause: text("cancelled by the user") }, "cancelled", as_json)
}

pub(super) fn set(options: &SetOptions, as_json: bool) -> Result<String, Problem> {
    options.door.tell("set", &Request::Set(options.change), "changed", as_json)
}

/// The status, and where a migration runs or has ended, its news.
pub(super) fn status(door: &GuestDoor, as_json: bool) -> Result<String, Problem> {
    let mut client = door.connect("status")?;
    let Reply::Status(status) = client.ask(&Request::Status)? else {
        return Err(Problem::refused("status", &door.guest, "the process gave an answer to another question"));
    };
    let mut out = if as_json { json::status(&status) } else { status_text(&status) }.into_bytes();
    if status.migration != Migration::None {
        let followed = client.tell(&Request::Follow).and_then(|_| client.next_reply());
        let form = if as_json { Form::Json } else { Form::Lines };
        let mut display = Display::new(&mut out, form, &door.guest);
        match followed {
            Ok(Reply::Progress(progress)) => display.show(&progress, Instant::now()),
            // That the last migration failed is news here, no failure of this command.
            Ok(Reply::Done(done)) => {
                if let (Err(problem), false) = (display.finish(&done), as_json) {
                    out.extend_from_slice(format!("last migration: {}\n", OneLine(&problem.cause)).as_bytes());
                }
            }
            Ok(_) => {}
            // It was history a moment ago, and has been forgotten since: another guest comes.
            Err(_) if status.migration == Migration::Ended => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// The status for people.
fn status_text(status: &Status) -> String {
    let mut out =
        format!("{}: {} order={}.{}", OneLine(&status.guest), status.state.word(), status.term, status.generation);
    if status.lineage != 0 {
        let _ = write!(out, " lineage={:032x}", status.lineage);
    }
    if !status.peer.is_empty() {
        let _ = write!(out, " peer={}", OneLine(&status.peer));
    }
    out.push('\n');
    let width = status.disks.iter().map(|disk| disk.name.chars().count()).max().unwrap_or(0);
    for disk in &status.disks {
        let bytes = if disk.size_bytes == 0 { "-".to_owned() } else { size(disk.size_bytes) };
        let fate = disk.stays.map_or_else(|| "moves".to_owned(), |stays| format!("stays: {stays}"));
        let gate = disk.gate.map_or("-", |gate| gate.word());
        let _ = write!(out, "  {:width$}  {bytes:>8}  {fate:16}  {gate}", OneLine(&disk.name).to_string());
        if let Some(attached) = status.attached.iter().find(|attached| attached.disk == disk.name) {
            let _ = write!(out, "  {}", OneLine(&attached.device));
        }
        out.push('\n');
    }
    if let Some(kept) = &status.receipt {
        out.push_str(&crate::progress::kept_line(kept));
    }
    if !status.hint.is_empty() {
        let _ = writeln!(out, "next: {}", OneLine(&status.hint));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{AttachedStatus, DiskStatus, Gate, State};
    use crate::domain::Stays;

    #[test]
    fn a_status_is_readable() {
        let disk = |name, size_bytes, stays, gate| DiskStatus { name: text(name), size_bytes, stays, gate };
        let disks = [disk("vda", 20 << 30, None, Some(Gate::Serving)), disk("sr0", 0, Some(Stays::Empty), None)];
        let status = Status {
            guest: text("g1"),
            state: State::Given,
            term: 1,
            generation: 4,
            lineage: 0xab,
            peer: text("tcp://b:1"),
            hint: text("blockferry who-owns g1"),
            disks: disks.into_iter().collect(),
            attached: [AttachedStatus { disk: text("vda"), device: text("/dev/nbd3") }].into_iter().collect(),
            ..Status::default()
        };
        assert_eq!(
            status_text(&status),
            "g1: given order=1.4 lineage=000000000000000000000000000000ab peer=tcp://b:1\n  \
             vda  20.0 GiB  moves             serving  /dev/nbd3\n  \
             sr0         -  stays: no source  -\n\
             next: blockferry who-owns g1\n"
        );
    }
}
