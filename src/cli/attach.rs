//! `attach` and `detach`: a disk as a device of this host, for VMMs that do not speak NBD.

use super::Command;
use super::guest::{CONTROL, GuestDoor, PLAINTEXT, door, guest_door};
use super::options::{Matches, Spec, Takes, opt};
use crate::address::Address;
use crate::attach::{Device, abandon, guest_and_disk, process_that_serves};
use crate::control::client::Client;
use crate::control::wire::{AttachRequest, Reply, Request, text};
use crate::domain::check_disk_name;
use crate::error::{Problem, is_nobody, reason};
use crate::json;
use crate::limits::{ATTACH_WAIT_MAX_S, CONNECT_TIMEOUT};

/// What `attach` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachOptions {
    /// The guest.
    pub door: GuestDoor,
    /// Which disk, as which device, and how long it may take.
    pub request: AttachRequest,
}

/// What `detach` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachOptions {
    /// The device.
    pub device: Device,
    /// The control door of its guest, if not at the default place.
    pub control: Option<Address>,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// Nobody serves it any more: what is in its page cache is given up.
    pub force: bool,
}

pub(super) const ATTACH: Spec = Spec {
    name: "attach",
    arguments: "GUEST DISK /dev/nbdN [--OPTION]...",
    about: "Make a disk a block device of this host, for VMMs that do not speak NBD",
    options: &[
        opt(
            "wait",
            Takes::One("SECONDS"),
            "how long to wait for this host to own the disk; 0: not at all\n[as long as the command runs]",
        ),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Needs the kernel's nbd driver (modprobe nbd), and root for the process that serves the guest. On a host\n\
            that does not own the disk it waits: what was read too early would stay in the page cache.\n\
            The device outlives the process that serves the guest: requests wait until that has been started again.\n\
            Before a migration hands over, stop the VMM: migrate --hold, stop it, switch; or let --vmm hook: do it.\n\n\
            Examples:\n\
            \x20 blockferry attach g1 vda /dev/nbd0\n\
            \x20 blockferry attach g1 vda /dev/nbd0 --wait 60\n",
};

pub(super) const DETACH: Spec = Spec {
    name: "detach",
    arguments: "/dev/nbdN [--OPTION]...",
    about: "Write a device's page cache back and give the device up",
    options: &[
        opt("force", Takes::Nothing, "although nobody serves the guest: what is only in the page cache is lost"),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Refused while the device is mounted or somebody has it open.\n\n\
            Example:\n\
            \x20 blockferry detach /dev/nbd0\n",
};

pub(super) fn parse_attach(matches: &Matches) -> Result<Command, Problem> {
    let [guest, disk, device] = matches.arguments(["GUEST", "DISK", "/dev/nbdN"])?;
    check_disk_name(disk).map_err(|cause| ATTACH.usage("DISK", cause))?;
    let device = Device::parse(device).map_err(|cause| ATTACH.usage(device, cause))?;
    let request = AttachRequest {
        disk: text(disk),
        device: text(&device.to_string()),
        wait_s: matches.number("wait", 0, ATTACH_WAIT_MAX_S)?,
    };
    Ok(Command::Attach(AttachOptions { door: guest_door(&ATTACH, matches, guest)?, request }))
}

pub(super) fn parse_detach(matches: &Matches) -> Result<Command, Problem> {
    let [device] = matches.arguments(["/dev/nbdN"])?;
    Ok(Command::Detach(DetachOptions {
        device: Device::parse(device).map_err(|cause| DETACH.usage(device, cause))?,
        control: matches.read("control", Address::parse)?,
        insecure_plaintext: matches.flag("insecure-plaintext"),
        force: matches.flag("force"),
    }))
}

pub(super) fn attach(options: &AttachOptions, as_json: bool) -> Result<String, Problem> {
    let AttachOptions { door: GuestDoor { guest, .. }, request } = options;
    let mut client = options.door.connect("attach")?;
    match client.ask_patiently(&Request::Attach(request.clone()))? {
        Reply::Ok if as_json => Ok(json::attached("attach", guest, &request.disk, &request.device)),
        Reply::Ok => Ok(format!("{guest}: disk {} is {}\n", request.disk, request.device)),
        _ => Err(Problem::refused("attach", guest, "the process gave an answer to another question")),
    }
}

pub(super) fn detach(options: &DetachOptions, as_json: bool) -> Result<String, Problem> {
    let device = options.device;
    let refuse = |cause: &str| Problem::refused("detach", device, cause);
    // The kernel knows whose it is.
    let backend = device.backend().ok_or_else(|| refuse("is not attached"))?;
    let (guest, disk) = guest_and_disk(&backend).ok_or_else(|| refuse("was not attached by blockferry"))?;
    let control = options.control.clone().unwrap_or_else(|| door(guest, "control"));
    let door = GuestDoor { guest: guest.to_owned(), control, insecure_plaintext: options.insecure_plaintext };
    let request = Request::Detach { device: text(&device.to_string()) };
    door.control.check_plaintext("detach", door.insecure_plaintext)?;
    match door.control.connect(CONNECT_TIMEOUT) {
        Ok(socket) => {
            let mut client = Client::greet("detach", guest, socket)?;
            if options.force && !is_attached(&mut client, device)? {
                // There is a process for the guest, and it has nothing to do with the device.
                abandon(device).map_err(|cause| refuse(&cause))?;
            } else {
                client.tell(&request)?;
            }
        }
        // Somebody may be there, and busy.
        Err(error) if !is_nobody(&error) => {
            return Err(refuse(&format!("{}: {}", door.control, reason(&error))));
        }
        Err(error) => {
            let nobody = format!("nobody serves guest {guest} on this host ({}: {})", door.control, reason(&error));
            if let Some(process) = process_that_serves(guest) {
                return Err(refuse(&format!("{nobody}, but process {process} does: --control says where to ask it")));
            }
            if !options.force {
                return Err(refuse(&format!(
                    "{nobody}; its requests wait until somebody does, or --force gives them up"
                )));
            }
            abandon(device).map_err(|cause| refuse(&cause))?;
        }
    }
    Ok(if as_json {
        json::attached("detach", guest, disk, &device.to_string())
    } else {
        format!("{device}: detached\n")
    })
}

/// Whether the process that serves the guest serves this device, too.
fn is_attached(client: &mut Client, device: Device) -> Result<bool, Problem> {
    match client.ask(&Request::Status)? {
        Reply::Status(status) => Ok(status.attached.iter().any(|attached| *attached.device == device.to_string())),
        _ => Err(Problem::refused("detach", device, "the process gave an answer to another question")),
    }
}
