//! `blockferry serve`.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::options::{Matches, Spec, Takes, later, opt};
use super::{Command, guest};
use crate::address::{Address, parse_port};
use crate::domain::{Disk, check_disks, check_guest_name, xml};
use crate::door_at::DoorAt;
use crate::error::{Problem, reason};
use crate::limits::DOMAIN_XML_MAX;
use crate::options::ServeOptions;
use crate::passed::Name;
use crate::vmm::Vmm;

pub(super) const SPEC: Spec = Spec {
    name: "serve",
    arguments: "GUEST --disk NAME[,...]...|--domain-xml FILE [--OPTION]...",
    about: "Serve a guest's disks: one process per guest and host",
    options: &[
        opt(
            "disk",
            Takes::Many("NAME[,...]"),
            "a disk, repeatable (a path cannot contain a comma):\n\
             NAME,file=PATH[,size=SIZE][,ro][,shared][,cache=writeback|none]\n\
             \x20 a file or block device; a missing file is created with size=, or when\n\
             \x20 a migration brings it\n\
             NAME,file=nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH\n\
             \x20 a server's export, such as a qcow2 image behind qemu-nbd; not locked\n\
             NAME,external[,ro][,shared]\n\
             \x20 opened by the VMM itself; known, never copied\n\
             NAME\n\
             \x20 an empty drive",
        ),
        opt("domain-xml", Takes::One("FILE"), "instead of --disk: the disks of a libvirt domain XML (virsh dumpxml)"),
        opt("nbd", Takes::Many("ADDR"), "guest door, repeatable [unix:///run/blockferry/GUEST/nbd.sock]"),
        opt("listen", Takes::One("ADDR"), "migration door; TCP port 0 prints the port it got [none]"),
        opt(
            "control",
            Takes::Many("ADDR"),
            "control door, repeatable [unix:///run/blockferry/GUEST/control.sock];\n\
             virtio:PORTNAME is a virtio-serial port, looked for until it is there",
        ),
        opt(
            "state",
            Takes::One("DIR"),
            "where the record of who owns is kept, and nothing else; made if it is\n\
             missing, never copied [/var/lib/blockferry/GUEST]",
        ),
        opt("volatile-state", Takes::Nothing, "DIR may be on a tmpfs: then a power cut loses who owns the guest"),
        opt(
            "vmm",
            Takes::One("none|qmp:PATH|hook:PROGRAM"),
            "what moves the guest's memory and devices: none, the caller does; qmp:PATH,\n\
             QEMU by a monitor of its own at this socket, on both hosts (docs/vmm.md);\n\
             hook:PROGRAM, any VMM by a program called at named points (docs/hooks.md) [none]",
        ),
        opt("insecure-plaintext", Takes::Nothing, "allow TCP beyond this host without keys"),
        later("tls-dir", Takes::One("DIR")),
        later("key", Takes::One("FILE")),
        later("peers", Takes::One("FILE")),
    ],
    notes: "ADDR is also fd:N, a listening socket that was passed on, and unix:///PATH?mode=0660 gives the socket\n\
            that mode; else it is its owner's only. Sockets of systemd (LISTEN_FDS) named nbd, migration and control\n\
            are doors instead of that door's default.\n\n\
            Prints one line when ready, and sends READY=1 to $NOTIFY_SOCKET:\n\
            \x20 blockferry: GUEST: ready: STATE order=TERM.GEN nbd=ADDR listen=ADDR\n\n\
            Examples:\n\
            \x20 blockferry serve g1 --disk vda,file=/d/g1.raw\n\
            \x20 blockferry serve g1 --disk vda,file=/d/g1.raw,size=20G --listen tcp://127.0.0.1:49152\n\
            \x20 blockferry serve g1 --disk vda,file=/d/root.raw --disk vdb,external,shared \
            --disk vdc,file=/d/tools.raw,ro --disk sr0\n\
            \x20 blockferry serve g1 --domain-xml /etc/libvirt/qemu/g1.xml --listen tcp://127.0.0.1:49152\n\n\
            \x20 blockferry serve g1 --disk vda,file=/dev/vda --control virtio:org.blockferry.0\n",
};

/// The doors for which a service manager can pass sockets on.
const NAMES: [Name; 3] = [Name::Nbd, Name::Migration, Name::Control];

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    check_guest_name(guest).map_err(|cause| SPEC.usage("GUEST", cause))?;
    let disks = matches.read_all("disk", Disk::parse)?;
    let domain_xml = matches.value("domain-xml").map(PathBuf::from);
    match (disks.is_empty(), &domain_xml) {
        (true, None) => return Err(matches.error("disk", "a guest has at least one")),
        (false, Some(_)) => return Err(matches.error("domain-xml", "it stands instead of --disk")),
        _ => check_disks(&disks).map_err(|cause| matches.error("disk", cause))?,
    }
    let (control, control_ports) = control_doors(matches, guest)?;
    Ok(Command::Serve(ServeOptions {
        guest: guest.to_owned(),
        disks,
        domain_xml,
        state: guest::state_directory(matches, guest)?,
        volatile_state: matches.flag("volatile-state"),
        nbd: matches.doors("nbd", matches.passed(Name::Nbd, &NAMES)?, || guest::door(guest, "nbd"))?,
        listen: migration_door(matches)?,
        control,
        control_ports,
        vmm: matches.read("vmm", Vmm::parse)?.unwrap_or_default(),
        insecure_plaintext: matches.flag("insecure-plaintext"),
        json: false,
    }))
}

/// Checks what only the host can answer, and reads the disks of the domain XML where there is one.
pub(super) fn complete(mut options: ServeOptions) -> Result<ServeOptions, Problem> {
    options.check()?;
    if let Some(path) = options.domain_xml.take() {
        let fault = |cause: String| Problem::refused("serve", path.display(), cause);
        options.disks = read_domain(&path).and_then(|disks| check_disks(&disks).map(|()| disks)).map_err(fault)?;
    }
    Ok(options)
}

fn read_domain(path: &Path) -> Result<Vec<Disk>, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| reason(&error))?;
    file.take(DOMAIN_XML_MAX + 1).read_to_string(&mut text).map_err(|error| reason(&error))?;
    if text.len() as u64 > DOMAIN_XML_MAX {
        return Err(format!("larger than {DOMAIN_XML_MAX} bytes"));
    }
    xml::disks(&text)
}

/// The migration door: the one that was passed on or the one that is given.
fn migration_door(matches: &Matches) -> Result<Option<DoorAt>, Problem> {
    let mut doors = matches.passed(Name::Migration, &NAMES)?;
    doors.extend(matches.read("listen", DoorAt::parse)?);
    if let [_, second, ..] = &doors[..] {
        return Err(matches.error("listen", format_args!("{second} would be a second migration door: a guest has one")));
    }
    Ok(doors.pop())
}

/// The control doors: sockets and virtio ports.
fn control_doors(matches: &Matches, guest: &str) -> Result<(Vec<DoorAt>, Vec<String>), Problem> {
    let (mut sockets, mut ports) = (matches.passed(Name::Control, &NAMES)?, Vec::new());
    for text in matches.values("control") {
        match parse_port(&text).map_err(|cause| matches.error("control", cause))? {
            Some(name) if ports.contains(&name) => {
                return Err(matches.error("control", format!("the port {name} is named twice")));
            }
            Some(name) => ports.push(name),
            None => {
                let door = DoorAt::parse(&text).map_err(|cause| matches.error("control", cause))?;
                if matches!(&door, DoorAt::Bound { address: Address::Tcp { port: 0, .. }, .. }) {
                    return Err(matches.error("control", format!("'{text}': nobody could learn which port it takes")));
                }
                sockets.push(door);
            }
        }
    }
    if sockets.is_empty() && ports.is_empty() {
        sockets.push(guest::door(guest, "control").into());
    }
    Ok((sockets, ports))
}
