//! A real QEMU's guest moves: what the VMM driver does when all goes well, and each row of what may fail.
//!
//! The guest is firmware alone: it runs, it has memory, it never ends. What it writes is not looked at here; a Linux
//! guest that verifies its disk is `cargo xtask vm guest`.

// What is made here is small.
#![allow(clippy::cast_possible_truncation)]

mod failures;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::harness::{Program, peer, scratch, until};
use crate::host::{Host, Migration};
use crate::json::Json;

const MIB: u64 = 1 << 20;

/// A QEMU, and a monitor of it that no driver uses.
struct Qemu {
    program: Program,
    monitor: PathBuf,
}

impl Qemu {
    fn start(qemu: &Path, folder: &Path, name: &str, incoming: bool) -> Self {
        let place = |what: &str| folder.join(format!("{name}.{what}"));
        let qmp = |what: &str| format!("unix:{},server=on,wait=off", place(what).display());
        let mut command = Command::new(qemu);
        command.args(["-accel", "tcg", "-M", "q35", "-m", "32", "-nodefaults", "-display", "none"]);
        command.args(["-qmp", &qmp("qmp"), "-qmp", &qmp("monitor"), "-blockdev"]);
        command.arg(format!(
            "driver=nbd,node-name=n0,server.type=unix,server.path={},export=vda,reconnect-delay=60,open-timeout=30,\
             discard=unmap,cache.direct=on,auto-read-only=off",
            place("nbd").display()
        ));
        command.args(["-blockdev", "driver=raw,node-name=d0,file=n0,discard=unmap,cache.direct=on"]);
        command.args(["-device", "virtio-blk-pci,drive=d0,werror=stop,rerror=stop"]);
        // Memory that is not empty: a state that takes its time.
        let content = place("ram");
        let mut seed = 1_u32;
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        });
        std::fs::write(&content, noise.take(4 * MIB as usize).collect::<Vec<_>>()).expect("written");
        command.arg("-device");
        command.arg(format!("loader,file={},addr=0x1000000,force-raw=on", content.display()));
        if incoming {
            command.args(["-incoming", "defer", "-S"]);
        }
        let log = File::create(place("qemu.log")).expect("a log");
        let mut program = Program::start(command.stdout(Stdio::null()).stderr(log));
        let monitor = place("monitor");
        // It listens before its disks are there, and greets when they are.
        let _ = program.connect_unix(&place("qmp"));
        let mut qemu = Self { program, monitor };
        until("a QEMU that is ready", || (!qemu.status().is_empty() || qemu.program.ended().is_some()).then_some(()));
        qemu
    }

    /// Says something to the second monitor; the answer's line.
    fn tell(&self, words: &str) -> String {
        let Ok(mut stream) = UnixStream::connect(&self.monitor) else { return String::new() };
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        let mut lines = BufReader::new(stream.try_clone().expect("a copy")).lines();
        let _ = lines.next();
        let said = format!("{{\"execute\": \"qmp_capabilities\"}}\n{{\"execute\": {words}, \"id\": \"it\"}}\n");
        let _ = stream.write_all(said.as_bytes());
        lines.map_while(Result::ok).find(|line| line.contains("\"id\": \"it\"")).unwrap_or_default()
    }

    /// Its run state.
    fn status(&self) -> String {
        let line = self.tell("\"query-status\"");
        let status = line.split("\"status\": \"").nth(1).and_then(|rest| rest.split('"').next());
        status.unwrap_or_default().to_owned()
    }

    fn until_status(&self, status: &str) {
        until(&format!("QEMU that is {status}"), || (self.status() == status).then_some(()));
    }
}

/// A guest at A, and QEMU and blockferry waiting for it at B.
struct Pair {
    a: Host,
    b: Host,
    here: Qemu,
    there: Qemu,
    folder: TempDir,
}

fn serve(folder: &Path, name: &'static str) -> Host {
    let disk = format!("vda,file={},size=16M", folder.join(format!("{name}.img")).display());
    let vmm = format!("qmp:{}", folder.join(format!("{name}.qmp")).display());
    Host::start_with(folder, name, "g1", &["--disk", &disk, "--vmm", &vmm])
}

impl Pair {
    /// `None`: there is no QEMU here.
    fn start() -> Option<Self> {
        let qemu = peer("qemu-system-x86_64")?;
        let folder = scratch();
        let (a, b) = (serve(folder.path(), "a"), serve(folder.path(), "b"));
        a.ask(&["claim"]).well();
        let here = Qemu::start(&qemu, folder.path(), "a", false);
        let there = Qemu::start(&qemu, folder.path(), "b", true);
        Some(Self { a, b, here, there, folder })
    }

    /// The guest is at the destination, runs there, and nowhere else.
    fn moved(&mut self, status: &str) {
        assert_eq!((self.a.state().as_str(), self.b.state().as_str()), ("given", "owner"));
        self.there.until_status(status);
        self.here.program.wait();
    }

    /// A migration whose state takes seconds, seen while it moves.
    fn slowly(&self) -> Migration {
        let migration = self.a.start_migrate(&self.b.listen, &["--bandwidth", "128K"]);
        migration.until_line("state that moves", |line| {
            line.get("type").text() == "progress" && line.get("phase").text() == "state" && bytes(line) > 0
        });
        migration
    }

    /// The guest is at the source as it was, and a later migration to another QEMU works.
    fn stayed(mut self, status: &str) {
        self.here.until_status(status);
        assert_eq!(self.a.state(), "owner");
        self.there.program.kill();
        self.b.until_state("incoming");
        let qemu = peer("qemu-system-x86_64").expect("it was there");
        self.there = Qemu::start(&qemu, self.folder.path(), "b", true);
        self.a.migrate(&self.b.listen, &["--overwrite"]).well();
        self.moved(status);
    }
}

/// Bytes of the state that have moved.
fn bytes(line: &Json) -> u64 {
    line.get("state_bytes").number()
}

#[test]
fn a_guest_that_runs_moves_with_its_memory_and_runs_there() {
    let Some(mut pair) = Pair::start() else { return };
    assert_eq!((pair.here.status().as_str(), pair.there.status().as_str()), ("running", "inmigrate"));
    let migration = pair.a.start_migrate(&pair.b.listen, &[]);
    let ended = migration.wait();
    ended.well();
    let done = ended.done();
    assert!(done.get("state_bytes").number() > 4 * MIB, "{done:?}");
    assert!(done.get("pause_us").number() > 0, "{done:?}");
    pair.moved("running");
}

#[test]
fn a_guest_that_its_user_has_paused_stays_paused_on_both() {
    let Some(mut pair) = Pair::start() else { return };
    pair.here.tell("\"stop\"");
    pair.here.until_status("paused");
    pair.a.migrate(&pair.b.listen, &[]).well();
    pair.moved("paused");
}
