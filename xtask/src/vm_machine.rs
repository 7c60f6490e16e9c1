//! A QEMU machine that boots an image, what it says on its serial port, and its other ports: the emulator's own (QMP),
//! the control door, and the guest's.
//!
//! The tests in `vm` and `vm_pair` build machines here. A machine ends with its handle; every wait has a limit.

use crate::demo_host::{Program, Scratch};
use crate::qmp::Qmp;
use crate::util::{Error, Result};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
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
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
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
    qmp: PathBuf,
    began: Instant,
}

impl Machine {
    /// Switches a machine on.
    pub(crate) fn start(scratch: &Arc<Scratch>, blueprint: &Blueprint<'_>) -> Result<Self> {
        let name = blueprint.name;
        let serial = scratch.path(&format!("{name}.serial"));
        let log = scratch.path(&format!("{name}.qemu"));
        let qmp = scratch.path(&format!("{name}.qmp"));
        // What an earlier machine of this name said is not this one's.
        let _ = fs::remove_file(&serial);
        let mut qemu = Command::new(QEMU);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg", "-cpu", "max"]);
        qemu.args(["-m", &MEMORY_MIB.to_string(), "-kernel"]).arg(blueprint.kernel);
        qemu.arg("-initrd").arg(blueprint.image);
        // On a busy machine the emulated timer is late, and a kernel that checks it believes that it has none.
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 no_timer_check {}", blueprint.append)]);
        qemu.args(["-serial", &format!("file:{}", serial.display())]);
        qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]).args(&blueprint.more);
        let began = Instant::now();
        let program = Program::start(scratch, name, &mut qemu, &log)?;
        Ok(Self { name: name.to_owned(), program, serial, log, qmp, began })
    }

    /// Everything that it has said so far.
    pub(crate) fn said(&self) -> String {
        let bytes = fs::read(&self.serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits for a whole line that contains `text` and returns it, with the time since it was switched on.
    pub(crate) fn says(&mut self, text: &str) -> Result<(String, Duration)> {
        self.says_again(text, 1)
    }

    /// The same for the line that is the `nth` of those, counted from 1.
    pub(crate) fn says_again(&mut self, text: &str, nth: usize) -> Result<(String, Duration)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.program.ended().is_some();
            let said = self.said();
            let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().filter(|line| line.contains(text)).nth(nth - 1) {
                return Ok((line.to_owned(), self.began.elapsed()));
            }
            if ended || Instant::now() > deadline {
                let why = if ended { "ended and" } else { "runs and" };
                return Err(self.wrong(&format!("{why} did not say '{text}' {nth} times")));
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

    /// One command to the emulator, in QMP's words.
    pub(crate) fn command(&self, command: &str) -> Result<()> {
        let answer = self.qmp().and_then(|mut qmp| qmp.command(command));
        answer.map(drop).map_err(|error| self.wrong(&error.to_string()))
    }

    /// The emulator's own port; one at a time may speak there.
    pub(crate) fn qmp(&self) -> Result<Qmp> {
        Qmp::open(&self.name, &self.qmp)
    }

    /// Waits until somebody else's `quit` has ended it.
    pub(crate) fn quits(&mut self) -> Result<()> {
        match self.program.wait(PATIENCE) {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.wrong(&format!("QEMU: {status}"))),
            None => Err(self.wrong("QEMU runs on")),
        }
    }

    /// A line to what is inside; its answer without `ok`.
    pub(crate) fn tell(&self, inside: &mut Lines, line: &str) -> Result<String> {
        let answer = inside.say(line).and_then(|()| inside.hear(|_| true));
        match answer.as_deref().map(|answer| answer.strip_prefix("ok")) {
            Ok(Some(rest)) => Ok(rest.trim().to_owned()),
            Ok(None) => Err(self.wrong(&format!("{line}: {}", answer.unwrap_or_default()))),
            Err(error) => Err(self.wrong(&format!("{line}: {error}"))),
        }
    }

    /// An error of this machine, with the end of what it said. Connections of ours that came and went say nothing.
    pub(crate) fn wrong(&self, cause: &str) -> Error {
        let said = self.said();
        let lines: Vec<&str> = said.lines().filter(|line| !line.contains(": control: connection: ")).collect();
        let end = lines[lines.len().saturating_sub(20)..].join(" | ");
        let qemu = fs::read_to_string(&self.log).unwrap_or_default();
        Error::new("vm", &self.name, format!("{cause}; QEMU said: {}; its serial port: {end}", qemu.trim()))
    }
}

/// Lines over a Unix socket: QMP, or what is behind a virtio port.
pub(crate) struct Lines {
    input: BufReader<UnixStream>,
}

impl Lines {
    /// Connects; the emulator makes its sockets before the machine runs.
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(LOOK),
                Ok(stream) => break stream,
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { input: BufReader::new(stream) })
    }

    /// Says a line.
    pub(crate) fn say(&mut self, line: &str) -> std::io::Result<()> {
        self.input.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    /// Waits for a line that is meant.
    pub(crate) fn hear(&mut self, is_meant: impl Fn(&str) -> bool) -> std::io::Result<String> {
        loop {
            let mut line = String::new();
            if self.input.read_line(&mut line)? == 0 {
                return Err(std::io::Error::other("closed"));
            }
            if is_meant(line.trim()) {
                return Ok(line.trim().to_owned());
            }
        }
    }
}
