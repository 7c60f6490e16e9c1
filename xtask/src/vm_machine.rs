//! A QEMU machine that boots an image without a disk of its own, and what it says on its serial port.
//!
//! The tests in `vm` build machines here. A machine ends with its handle; every wait has a limit.

use crate::demo_host::{Program, Scratch};
use crate::util::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The emulator; without KVM, so that it runs everywhere.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// A machine's memory, in MiB.
const MEMORY_MIB: u32 = 128;
/// How long one wait on a machine may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often its serial port is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// What a machine is made of.
pub(crate) struct Blueprint<'a> {
    /// A name for its files.
    pub(crate) name: &'a str,
    /// The kernel.
    pub(crate) kernel: &'a Path,
    /// The first file system.
    pub(crate) image: &'a Path,
    /// The kernel's command line, after what every machine has there.
    pub(crate) append: &'a str,
    /// More arguments of QEMU.
    pub(crate) more: Vec<String>,
}

/// A machine that runs.
pub(crate) struct Machine {
    name: String,
    program: Program,
    serial: PathBuf,
    log: PathBuf,
    began: Instant,
}

impl Machine {
    /// Switches a machine on.
    pub(crate) fn start(scratch: &Arc<Scratch>, blueprint: &Blueprint<'_>) -> Result<Self> {
        let name = blueprint.name;
        let serial = scratch.path(&format!("{name}.serial"));
        let log = scratch.path(&format!("{name}.qemu"));
        // What an earlier machine of this name said is not this one's.
        let _ = fs::remove_file(&serial);
        let mut qemu = Command::new(QEMU);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg", "-cpu", "max"]);
        qemu.args(["-m", &MEMORY_MIB.to_string(), "-kernel"]).arg(blueprint.kernel);
        qemu.arg("-initrd").arg(blueprint.image);
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 {}", blueprint.append)]);
        qemu.args(["-serial", &format!("file:{}", serial.display())]).args(&blueprint.more);
        let began = Instant::now();
        let program = Program::start(scratch, name, &mut qemu, &log)?;
        Ok(Self { name: name.to_owned(), program, serial, log, began })
    }

    /// Everything that it has said so far.
    pub(crate) fn said(&self) -> String {
        let bytes = fs::read(&self.serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits for a whole line that contains `text` and returns it, with the time since it was switched on.
    pub(crate) fn says(&mut self, text: &str) -> Result<(String, Duration)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.program.ended().is_some();
            let said = self.said();
            let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().find(|line| line.contains(text)) {
                return Ok((line.to_owned(), self.began.elapsed()));
            }
            if ended || Instant::now() > deadline {
                let why = if ended { "ended and" } else { "runs and" };
                return Err(self.wrong(&format!("{why} never said '{text}'")));
            }
            thread::sleep(LOOK);
        }
    }

    /// Waits until it has switched itself off; returns what it said in its life.
    pub(crate) fn ends(mut self) -> Result<String> {
        match self.program.wait(PATIENCE) {
            Some(status) if status.success() => Ok(self.said()),
            Some(status) => Err(self.wrong(&format!("QEMU: {status}"))),
            None => Err(self.wrong("does not switch itself off")),
        }
    }

    /// An error of this machine, with the end of what it said.
    pub(crate) fn wrong(&self, cause: &str) -> Error {
        let said = self.said();
        let lines: Vec<&str> = said.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join(" | ");
        let qemu = fs::read_to_string(&self.log).unwrap_or_default();
        Error::new("vm", &self.name, format!("{cause}; QEMU said: {}; its serial port: {end}", qemu.trim()))
    }
}
