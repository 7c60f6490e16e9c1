//! Machines that are hosts: init, `serve` and a stand-in for a guest in each, and a network that is a pair of sockets.
//!
//! `vm_pair` and `vm_hook` move a guest from one to the other. From outside come the executable's own commands through
//! the control door on a virtio port, words to what is inside through another, and QMP for what happens to a machine.

use crate::cpio::Entry;
use crate::demo_host::text;
use crate::util::{self, Error, Result};
use crate::vm::{Lab, disks};
use crate::vm_machine::{Blueprint, Lines, Machine, PATIENCE};
use crate::{build, initramfs};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The guest's name.
pub(crate) const GUEST: &str = "g1";
/// How often a state is asked for.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// What such a machine does besides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Role {
    /// More of the kernel's command line, for init.
    pub(crate) init: &'static str,
    /// More options for `serve`.
    pub(crate) serve: &'static str,
}

/// The image of such machines, with the stand-in for a guest.
pub(crate) fn image(lab: &Lab, name: &str) -> Result<PathBuf> {
    let guest = build::static_program("testguest")?;
    let guest = fs::read(&guest).map_err(|error| Error::new("vm", guest.display(), error))?;
    let image = lab.scratch.path(name);
    let more = [("/bin/testguest", Entry::File(guest, 0o755))];
    let manifests = ["manifest", "manifest.test"];
    initramfs::write(&image, &initramfs::pack(&lab.executable, &lab.kernel, &manifests, &more)?)?;
    Ok(image)
}

/// A machine that runs.
pub(crate) struct Host<'a> {
    /// What it consists of.
    of: Powerless<'a>,
    pub(crate) machine: Machine,
    /// What is inside, at the guest's port.
    inside: Lines,
}

impl<'a> Host<'a> {
    /// Hosts A and B, with empty disks.
    pub(crate) fn pair(lab: &'a Lab, role: Role, image: &Path) -> Result<[Self; 2]> {
        Ok([Self::new(lab, "A", 1, role, image)?, Self::new(lab, "B", 2, role, image)?])
    }

    fn new(lab: &'a Lab, name: &'static str, number: u8, role: Role, image: &Path) -> Result<Self> {
        let drives = [lab.disk(&format!("{name}-data.raw"))?, lab.ext4(&format!("{name}-state.raw"))?];
        Powerless { lab, name, number, role, image: image.to_owned(), drives }.boot()
    }

    /// Waits until it has lost its power.
    pub(crate) fn loses_power(self) -> Result<Powerless<'a>> {
        self.machine.ends()?;
        Ok(self.of)
    }

    /// Where another host finds its migration door.
    pub(crate) fn door(&self) -> String {
        format!("tcp://10.0.0.{}:49152", self.of.number)
    }

    /// `blockferry WORD g1 ...` from outside of the machine; its stdout.
    pub(crate) fn ask(&self, word: &str, arguments: &[&str]) -> Result<String> {
        let port = format!("unix://{}", self.of.lab.scratch.path(&format!("{}.control", self.of.name)).display());
        let mut command = Command::new(&self.of.lab.executable);
        command.args([word, GUEST]).args(arguments).args(["--control", &port]);
        let said = util::capture(word, &mut command, PATIENCE)?;
        if !said.status.success() {
            return Err(self.machine.wrong(&format!("{word}: {}", said.stderr)));
        }
        Ok(said.stdout)
    }

    /// The state of its record.
    pub(crate) fn state(&self) -> Result<String> {
        let status = self.ask("status", &["--json"])?;
        Ok(text(&status, "state").unwrap_or_default().to_owned())
    }

    /// Waits until `status --json` is as wanted; returns it.
    pub(crate) fn wait_for(&self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ask("status", &["--json"])?;
            if is_so(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(self.machine.wrong(&format!("never {what}: {status}")));
            }
            thread::sleep(LOOK);
        }
    }

    /// A line to what is inside; its answer without `ok`.
    pub(crate) fn tell(&mut self, line: &str) -> Result<String> {
        self.machine.tell(&mut self.inside, line)
    }

    /// Waits until the guest has written so much more.
    pub(crate) fn writes_on(&mut self, writes: u64) -> Result<()> {
        let before = field(&self.tell("count")?, "issued")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.tell("count")?;
            if said.contains("failed=") || Instant::now() > deadline {
                return Err(self.machine.wrong(&format!("the guest does not write on: {said}")));
            }
            if field(&said, "issued")? >= before + writes {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
    }
}

/// A machine without power: what is left are its disks.
pub(crate) struct Powerless<'a> {
    lab: &'a Lab,
    name: &'static str,
    /// Of its address, its hardware address and its identity.
    number: u8,
    role: Role,
    image: PathBuf,
    drives: [PathBuf; 2],
}

impl<'a> Powerless<'a> {
    /// Switched on (again): waits until it serves.
    pub(crate) fn boot(self) -> Result<Host<'a>> {
        let Self { lab, name, number, role, image, drives } = &self;
        let at = |name: &str, what: &str| lab.scratch.path(&format!("{name}.{what}")).display().to_string();
        let other = if *name == "A" { "B" } else { "A" };
        let mut more = disks(&[&drives[0], &drives[1]]);
        let mut add = |option: &str, value: String| more.extend([option.to_owned(), value]);
        let [ours, theirs] = [at(name, "net"), at(other, "net")];
        add("-netdev", format!("dgram,id=n0,local.type=unix,local.path={ours},remote.type=unix,remote.path={theirs}"));
        add("-device", format!("virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0{number}"));
        add("-uuid", format!("3d1219c7-c4c5-404a-aa1f-6d2a48adfd0{number}"));
        add("-device", "virtio-serial-pci".to_owned());
        for (what, port) in [("control", "org.blockferry.0"), ("guest", "test")] {
            add("-chardev", format!("socket,id={what},path={},server=on,wait=off", at(name, what)));
            add("-device", format!("virtserialport,chardev={what},name={port}"));
        }
        let append = format!(
            "blockferry.ip=eth0=10.0.0.{number}/24 blockferry.mount=/dev/vdb:/var/lib/blockferry:ext4 \
             blockferry.restart=1 blockferry.start=/bin/testguest {} -- serve {GUEST} --disk vda,file=/dev/vda \
             --listen tcp://10.0.0.{number}:49152 --log info --insecure-plaintext \
             --control unix:///run/blockferry/{GUEST}/control.sock --control virtio:org.blockferry.0 {}",
            role.init, role.serve
        );
        let blueprint = Blueprint { name, kernel: &lab.kernel.image, image, append: &append, more };
        let mut machine = Machine::start(&lab.scratch, &blueprint)?;
        machine.says(": ready: ")?;
        let port = lab.scratch.path(&format!("{name}.guest"));
        let inside = Lines::open(&port).map_err(|error| machine.wrong(&format!("the guest's port: {error}")))?;
        Ok(Host { of: self, machine, inside })
    }
}

/// `name=N` in an answer of the guest.
pub(crate) fn field(said: &str, name: &str) -> Result<u64> {
    let value = said.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).ok_or_else(|| Error::new("vm", name, format!("not in '{said}'")))
}
