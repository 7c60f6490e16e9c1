//! The walk-through of docs/foreign-guests.md with a real QEMU: a guest that was not started on blockferry moves to it
//! by QEMU's own mirror. Its load comes from QEMU's monitor, through the guest's device.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Program, blockferry, peer, scratch};
use crate::host::Host;
use crate::writer::Ledger;

const MIB: u64 = 1 << 20;

/// QEMU's monitor.
struct Monitor {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events that came before they were waited for.
    events: Vec<String>,
}

impl Monitor {
    fn open(path: &Path, program: &mut Program) -> Self {
        drop(program.connect_unix(path));
        let stream = UnixStream::connect(path).expect("its monitor");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let lines = BufReader::new(stream.try_clone().expect("a second descriptor"));
        let mut monitor = Self { stream, lines, events: Vec::new() };
        assert!(monitor.line().contains("\"QMP\""));
        monitor.run(r#"{"execute": "qmp_capabilities"}"#);
        monitor
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).expect("QEMU answers") > 0, "QEMU has closed its monitor");
        line
    }

    /// Runs a command, which must succeed.
    fn run(&mut self, command: &str) {
        writeln!(self.stream, "{command}").expect("sent");
        loop {
            let line = self.line();
            assert!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return;
            }
            self.events.push(line);
        }
    }

    /// A write of the guest's device.
    fn write(&mut self, what: &str) {
        self.run(&format!(
            r#"{{"execute": "human-monitor-command", "arguments": {{"command-line": "qemu-io -d disk0 \"{what}\""}}}}"#
        ));
    }

    /// Waits for an event.
    fn until(&mut self, event: &str) {
        while !self.events.iter().any(|line| line.contains(event)) {
            let line = self.line();
            assert!(!line.contains("BLOCK_JOB_ERROR") && !line.contains("BLOCK_JOB_CANCELLED"), "{line}");
            self.events.push(line);
        }
    }
}

#[test]
fn a_guest_that_was_not_started_on_blockferry_moves_to_it_by_qemus_mirror() {
    let Some(qemu) = peer("qemu-system-x86_64") else { return };
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    drop(Ledger::format(&at("a.raw"), 32 * MIB, 51, 50));
    // 1
    File::create(at("b.raw")).and_then(|file| file.set_len(32 * MIB)).expect("made");
    let door = format!("unix://{}", at("b.nbd").display());
    let mut export = blockferry();
    export.arg("export").arg(format!("vda={}", at("b.raw").display())).args(["--nbd", &door]);
    let (mut export, _) = Program::start_until_line(&mut export, ": ready: ");
    let mut command = Command::new(qemu);
    command.args(["-M", "microvm", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-S", "-qmp", &format!("unix:{},server=on,wait=off", at("qmp").display())]);
    command.args(["-blockdev", &format!("driver=file,filename={},node-name=f0", at("a.raw").display())]);
    command.args(["-blockdev", "driver=raw,file=f0,node-name=d0", "-device", "virtio-blk-device,drive=d0,id=disk0"]);
    let mut old = Program::start(&mut command);
    let mut monitor = Monitor::open(&at("qmp"), &mut old);
    monitor.run(r#"{"execute": "cont"}"#);
    monitor.write("write -P 17 0 64k");
    // 2
    monitor.run(&format!(
        r#"{{"execute": "blockdev-add", "arguments": {{"driver": "nbd", "node-name": "t0", "export": "vda",
            "server": {{"type": "unix", "path": "{}"}}}}}}"#,
        at("b.nbd").display()
    ));
    monitor.run(r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "t1", "file": "t0"}}"#);
    monitor.run(
        r#"{"execute": "blockdev-mirror", "arguments": {"job-id": "m0", "device": "d0", "target": "t1",
            "sync": "full", "copy-mode": "write-blocking"}}"#,
    );
    monitor.write("write -P 19 2M 64k");
    // 3
    monitor.until("BLOCK_JOB_READY");
    monitor.write("write -P 23 1M 64k");
    monitor.write("write -P 29 5M 4k");
    // 4, 5
    monitor.run(r#"{"execute": "stop"}"#);
    monitor.run(r#"{"execute": "block-job-cancel", "arguments": {"device": "m0"}}"#);
    monitor.until("BLOCK_JOB_COMPLETED");
    // 6
    monitor.run(r#"{"execute": "quit"}"#);
    assert!(old.wait().success());
    // 7
    export.kill();
    let same = std::fs::read(at("a.raw")).expect("an image") == std::fs::read(at("b.raw")).expect("an image");
    assert!(same, "the images differ");
    let b = Host::owner(folder.path(), "b", &[&format!("vda,file={}", at("b.raw").display())]);
    let mut client = b.open("vda").expect("served");
    let mut bytes = [0; 4096];
    for (offset, pattern) in [(0, 17), (2 * MIB, 19), (MIB, 23), (5 * MIB, 29)] {
        client.read_exact(offset, &mut bytes).expect("read");
        assert!(bytes.iter().all(|byte| *byte == pattern), "at {offset}");
    }
    assert_eq!(b.try_write("vda", 0), Ok(()));
}
