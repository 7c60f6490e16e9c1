//! The executable for aarch64, under QEMU's user emulation, beside programs of this machine: bytes on the wire and
//! numbers in messages do not depend on the machine.
//!
//! `cargo xtask test` runs these as a step of its own, with `BLOCKFERRY_AARCH64_BIN`; nobody else runs them.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{blockferry, output, peer, scratch};
use crate::host::{Host, exactly_one_takes, executable};
use crate::writer::{Ledger, Load, Mix, OnLoss, Writer};

const MIB: u64 = 1 << 20;
const EMULATOR: &str = "qemu-aarch64-static";

/// The executable for the other machine, as words of a command of this one.
fn emulated() -> Option<[OsString; 2]> {
    let executable = std::env::var_os("BLOCKFERRY_AARCH64_BIN");
    if executable.is_none() {
        eprintln!("SKIP: aarch64: a step of cargo xtask test");
    }
    Some([EMULATOR.into(), executable?])
}

fn command([emulator, executable]: &[OsString; 2]) -> Command {
    let mut command = Command::new(emulator);
    command.arg(executable).env_remove("BLOCKFERRY_LOG").env_remove("NOTIFY_SOCKET");
    command
}

/// Moves a disk with a guest that goes on writing, and looks up every write.
fn moves(from: &[OsString], to: &[OsString]) {
    let folder = scratch();
    let (at_a, at_b) = (folder.path().join("a.img"), folder.path().join("b.img"));
    let disk = |path: &Path| format!("vda,file={}", path.display());
    let ledger = Ledger::format(&at_a, 32 * MIB, 31, 50);
    let a = Host::start_run_by(from, folder.path(), "a", "g1", &[&disk(&at_a)]);
    let b = Host::start_run_by(to, folder.path(), "b", "g1", &[&disk(&at_b)]);
    a.ask(&["claim"]).well();
    let load = Load { seed: 31, connections: 1, depth: 4, mix: Mix::ALL, rate: 200, on_loss: OnLoss::Stop };
    let writer = Writer::start(load, ledger, "vda", &[&a.door]);
    writer.until_more(50);
    a.migrate(&b.listen, &[]).well();
    let ledger = writer.finish();
    ledger.verify_file(&at_b).assert_whole();
    ledger.verify_door(b.open("vda").expect("served")).assert_whole();
    assert_eq!((a.state().as_str(), b.state().as_str()), ("given", "owner"));
    exactly_one_takes("vda", 0, &b, &a);
}

#[test]
fn it_says_the_same_version_as_this_machines() {
    let Some(emulated) = emulated() else { return };
    let said = output(command(&emulated).arg("--version"));
    assert!(said.status.success(), "{said:?}");
    assert_eq!(said.stdout, output(blockferry().arg("--version")).stdout);
}

#[test]
fn this_machines_clients_read_and_write_its_export() {
    let Some(emulated) = emulated() else { return };
    let (Some(nbdinfo), Some(nbdcopy)) = (peer("nbdinfo"), peer("nbdcopy")) else { return };
    let folder = scratch();
    let place = |name: &str| folder.path().join(name);
    let ledger = Ledger::format(&place("disk.img"), 16 * MIB, 32, 60);
    fs::File::create(place("other.img")).and_then(|file| file.set_len(16 * MIB)).expect("an image");
    let mut command = command(&emulated);
    command
        .arg("export")
        .args(["disk", "other"].map(|name| format!("{name}={}", place(&format!("{name}.img")).display())));
    command.args(["--nbd", &format!("unix://{}", place("sock").display())]);
    let _export = crate::harness::Program::start_until_line(&mut command, ": ready: ");
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", place("sock").display());
    let said = output(Command::new(&nbdinfo).args(["--size", &uri("disk")]));
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), (16 * MIB).to_string(), "{said:?}");
    let said = output(Command::new(&nbdinfo).args(["--map", "--totals", &uri("disk")]));
    assert!(said.status.success() && String::from_utf8_lossy(&said.stdout).contains("data"), "{said:?}");
    let said = output(Command::new(&nbdcopy).args(["--flush", &uri("disk"), &uri("other")]));
    assert!(said.status.success(), "{said:?}");
    ledger.verify_file(&place("other.img")).assert_whole();
}

#[test]
fn a_guests_disk_moves_from_aarch64_to_this_machine() {
    let Some(emulated) = emulated() else { return };
    moves(&emulated, &[executable()]);
}

#[test]
fn a_guests_disk_moves_from_this_machine_to_aarch64() {
    let Some(emulated) = emulated() else { return };
    moves(&[executable()], &emulated);
}
