//! The control door from outside: a client in another language, written from docs/protocol.md, and clients that break
//! the protocol.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockferry::address::Address;
use blockferry::control::client::Client;
use blockferry::control::wire::{Reply, Request};
use blockferry::limits::{CONTROL_CONNECTIONS_MAX, CONTROL_FRAME_MAX};
use blockferry::socket::Socket;

use crate::harness::{Program, output, peer, scratch, until};
use crate::host::{Finished, Host, PATIENCE, blockferry, exactly_one_takes, run};
use crate::writer::{Dice, Ledger};

const MIB: u64 = 1 << 20;

/// A file of these tests.
fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it").join(name)
}

/// The client in Python at a host's control door.
struct Manager<'h> {
    python: PathBuf,
    host: &'h Host,
}

impl Manager<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(beside("control_client.py")).arg(path(self.host)).arg("g1").args(words);
        command
    }

    fn ask(&self, words: &[&str]) -> Finished {
        run(&mut self.command(words), PATIENCE)
    }

    /// Starts a migration and waits for its first progress in this phase.
    fn start(&self, words: &[&str], phase: &'static str) -> Program {
        let mut command = self.command(words);
        Program::start_until_line(command.stderr(Stdio::null()), phase).0
    }
}

/// Where a host's control socket is.
fn path(host: &Host) -> PathBuf {
    let Address::Unix(path) = host.control() else { panic!("not a socket") };
    path.clone()
}

fn file(name: &str, path: &Path) -> String {
    format!("{name},file={}", path.display())
}

/// A source that owns a disk vda and a destination that has none yet.
fn hosts(folder: &Path) -> (Ledger, Host, Host) {
    let ledger = Ledger::format(&folder.join("a.img"), 32 * MIB, 11, 60);
    let a = Host::start(folder, "a", &[&file("vda", &folder.join("a.img"))]);
    let b = Host::start(folder, "b", &[&file("vda", &folder.join("b.img"))]);
    (ledger, a, b)
}

#[test]
fn a_program_in_another_language_drives_a_whole_migration() {
    let Some(python) = peer("python3") else { return };
    let folder = scratch();
    let (ledger, a, b) = hosts(folder.path());
    let (source, destination) = (Manager { python: python.clone(), host: &a }, Manager { python, host: &b });

    let status = source.ask(&["status"]).well();
    assert!(status.starts_with("status guest=g1 state=incoming term=0 "), "{status}");
    assert!(status.contains("'name': 'vda', 'size': 33554432, 'stays': None, 'gate': 'incoming'"), "{status}");
    assert_eq!(source.ask(&["claim"]).well(), "ok\n");
    let again = source.ask(&["claim"]);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.stdout.starts_with("refused exit=1 operation=claim object=g1 cause="), "{again:?}");

    // One that is cancelled over another connection while it crawls.
    let mut crawls = source.start(&["migrate", &b.listen, "100000"], "phase=bulk-pass");
    assert_eq!(source.ask(&["cancel"]).well(), "ok\n");
    assert_eq!(crawls.wait().code(), Some(3));
    // One that goes away ends too: this is a socket.
    let mut crawls = source.start(&["migrate", &b.listen, "100000"], "phase=bulk-pass");
    crawls.kill();
    until("end of the migration", || source.ask(&["status"]).well().contains("migration=ended").then_some(()));

    // One that begins slowly and is let go.
    let mut migration = source.start(&["migrate", &b.listen, "100000"], "phase=bulk-pass");
    assert_eq!(source.ask(&["set", "0"]).well(), "ok\n");
    assert_eq!(migration.wait().code(), Some(0));
    assert!(source.ask(&["status"]).well().contains(" state=given "));
    assert!(destination.ask(&["status"]).well().contains(" state=owner "));
    ledger.verify_file(&folder.path().join("b.img")).assert_whole();
    exactly_one_takes("vda", 0, &b, &a);

    // One that is refused, and one from its first line to its last, on to a third host.
    let refused = destination.ask(&["migrate", &a.listen]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stdout.contains("done attempt=") && refused.stdout.contains(" is not empty "), "{refused:?}");
    let c = Host::start(folder.path(), "c", &[&file("vda", &folder.path().join("c.img"))]);
    let said = destination.ask(&["migrate", &c.listen, "10000000"]).well();
    let kinds: Vec<&str> = said.lines().filter_map(|line| line.split(' ').next()).collect();
    let (progress, ends) = (kinds.len() - 2, [kinds[0], kinds[kinds.len() - 1]]);
    assert!(progress > 3 && kinds[1..=progress].iter().all(|kind| *kind == "progress"), "{said}");
    assert_eq!(ends, ["ok", "done"]);
    let done = format!(" exit=0 message= owner=destination destination={} sent=", c.listen);
    assert!(said.lines().last().is_some_and(|line| line.contains(&done)), "{said}");
    exactly_one_takes("vda", 0, &c, &b);
}

#[test]
fn the_client_in_another_language_agrees_with_the_golden_bytes() {
    let Some(python) = peer("python3") else { return };
    let mut command = Command::new(python);
    command.env("PYTHONDONTWRITEBYTECODE", "1").arg(beside("control_golden.py")).arg(beside("golden/control.txt"));
    let said = output(&mut command);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(String::from_utf8_lossy(&said.stdout), "7 requests, 8 replies, 48 words agree\n");
}

/// Sends bytes, as far as the door takes them, and waits until the door has closed. What it said before.
fn throw(door: &Address, bytes: &[u8]) -> Vec<u8> {
    let socket = door.connect(PATIENCE).expect("the door is open");
    // A door that has had enough closes in the middle.
    let _ = socket.send_all_before(bytes, Instant::now() + PATIENCE);
    let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Write);
    rest(&socket)
}

fn rest(socket: &Socket) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let deadline = Instant::now() + PATIENCE;
    loop {
        match socket.recv_nowait(&mut buffer) {
            Ok(Some(0)) | Err(_) => return all,
            Ok(Some(count)) => all.extend_from_slice(&buffer[..count]),
            Ok(None) => {
                assert!(Instant::now() < deadline, "the door stays open");
                socket.wait(true, false, Some(Duration::from_secs(1))).expect("waits");
            }
        }
    }
}

/// The whole frame of a golden line.
fn golden(kind: &str, name: &str) -> Vec<u8> {
    let begin = format!("{kind} {name} ");
    let line = include_str!("golden/control.txt").lines().find_map(|line| line.strip_prefix(&begin)).expect("a line");
    let hex = line.split(' ').nth(1).expect("its frame");
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect()
}

#[test]
fn clients_that_break_the_protocol_disturb_nobody() {
    let folder = scratch();
    let (_, mut a, b) = hosts(folder.path());
    a.ask(&["claim"]).well();
    let door = a.control().clone();
    let migration = a.start_migrate(&b.listen, &["--hold"]);
    migration.until_held();
    let mut steady = Client::connect("test", "g1", &door).expect("connects");

    let mut dice = Dice::new(2026);
    let mut noise = |length: usize| -> Vec<u8> { (0..length).map(|_| dice.roll().to_le_bytes()[5]).collect() };
    let hello = golden("request", "hello");
    let greets = golden("reply", "hello");
    let spoiled = |name: &str| {
        let mut frame = golden("request", name);
        let last = frame.len() - 2;
        frame[last] ^= 1;
        frame
    };
    let mut thrown: Vec<Vec<u8>> = (0..40).map(|step| noise(step * step * 3)).collect();
    // Noise behind a hello, with a zero after each few bytes.
    thrown.extend((1..20).map(|step| [hello.clone(), noise(600).chunks(step).collect::<Vec<_>>().join(&0)].concat()));
    thrown.push([hello.clone(), vec![0x55; CONTROL_FRAME_MAX + 1]].concat());
    thrown.push([hello.clone(), vec![0xff; 1 << 20]].concat());
    // These would change something.
    thrown.extend(["claim-discard", "cancel", "set", "switch"].map(|name| [hello.clone(), spoiled(name)].concat()));
    // Without a hello they would too.
    thrown.extend(["claim-discard", "cancel", "set", "switch"].map(|name| golden("request", name)));
    thrown.push(hello[..hello.len() - 3].to_vec());
    for bytes in &thrown {
        throw(&door, bytes);
        assert!(matches!(steady.ask(&Request::Status), Ok(Reply::Status(_))));
    }

    // Zeroes between frames are nothing.
    let zeroes = [vec![0; 5000], hello.clone(), vec![0; 5000], golden("request", "follow"), vec![0; 9]].concat();
    let said = throw(&door, &zeroes);
    let guest = [&[0][..], &greets].concat();
    assert!(said.starts_with(&guest[..3]) && said[1..].contains(&0), "{said:?}");

    // As many as may come, and all of them silent in the middle of a frame: the next is told, the others go on.
    let mut silent: Vec<Socket> = Vec::new();
    let fall_silent = || {
        let socket = door.connect(PATIENCE).expect("the door is open");
        socket.send_all_before(&hello[..4], Instant::now() + PATIENCE).expect("sends");
        socket
    };
    silent.extend((0..CONTROL_CONNECTIONS_MAX).map(|_| fall_silent()));
    until("refusal of one too many", || match Client::connect("test", "g1", &door) {
        Ok(_) => {
            // The time of one of them was up: this machine has had other things to do.
            silent.push(fall_silent());
            None
        }
        // Whose hello comes after the door has hung up hears no more than that: the next one is told.
        Err(problem) => problem.cause.contains("connections are open already").then_some(()),
    });
    assert!(matches!(steady.ask(&Request::Status), Ok(Reply::Status(_))));
    silent.clear();

    let mut steady = until("room at the door", || Client::connect("test", "g1", &door).ok());
    assert!(a.program.ended().is_none(), "no panic");
    assert!(!a.log().contains("panicked"), "{}", a.log());
    steady.tell(&Request::Switch).expect("the migration is still held");
    migration.wait().well();
}

#[test]
fn a_port_that_is_not_there_is_looked_for_and_keeps_nobody_waiting() {
    let folder = scratch();
    let (_, a, b) = hosts(folder.path());
    drop((a, b));
    let unix = |what: &str| format!("unix://{}", folder.path().join(what).display());
    let log = folder.path().join("x.log");
    let mut command = blockferry();
    command.args(["serve", "g1", "--volatile-state", "--state"]).arg(folder.path().join("x.state"));
    command.args(["--nbd", &unix("x.nbd"), "--disk", &file("vda", &folder.path().join("a.img"))]);
    command.args(["--control", "virtio:org.blockferry.test.not-there", "--control", &unix("x.control")]);
    command.stderr(std::fs::File::create(&log).expect("a log"));
    let (_program, ready) = Program::start_until_line(&mut command, ": ready: ");
    assert!(ready.contains("g1: ready: incoming"), "{ready}");
    let status = ["status", "g1", "--control", &unix("x.control")];
    run(blockferry().args(status), PATIENCE).well();
    let said = until("word of the port", || {
        let said = std::fs::read_to_string(&log).expect("its log");
        said.contains("looking for it every 1s").then_some(said)
    });
    assert!(said.contains(": warn: control: virtio:org.blockferry.test.not-there: there "), "{said}");
}
