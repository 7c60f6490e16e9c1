//! `fd:N`: the way to the other host is a socket that `migrate` was started with.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{MIB, Pair, assert_same, calm};
use crate::harness::{pause, scratch, until_within};
use crate::host::{Host, PATIENCE, Watch, blockferry, exactly_one_takes, executable};
use crate::writer::Writer;

/// `accept` on a host, at one end of a pair whose other end is returned.
fn accepting(host: &Host) -> (Child, OwnedFd) {
    let (near, far) = UnixStream::pair().expect("a pair");
    let far = [far.try_clone().expect("a clone"), far].map(|end| Stdio::from(OwnedFd::from(end)));
    let [input, output] = far;
    let mut accept = blockferry();
    accept.args(["accept", "g1", "--control", &host.control().to_string()]);
    (accept.stdin(input).stdout(output).stderr(Stdio::null()).spawn().expect("started"), near.into())
}

/// `migrate` that finds `descriptor` at this number.
fn migrate(host: &Host, descriptor: impl Into<Stdio>, number: u32, words: &[&str]) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$@\" {number}<&0 </dev/null"), "sh"]).arg(executable());
    command.args(["migrate", "g1"]).args(words).args(["--control", &host.control().to_string()]);
    command.stdin(descriptor).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started")
}

fn ended(child: Child) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().expect("its child");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

fn dead(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn a_passed_connection_carries_everything_and_no_write_is_lost() {
    let mut pair = Pair::new(48 * MIB, 231, 60);
    let (accept, descriptor) = accepting(&pair.b);
    let writer = Writer::start(calm(231), pair.ledger(), "vda", &[&pair.a.door]);
    writer.until_more(20);
    let watch = Watch::start(&pair.a, &pair.b);
    let (code, told, errors) =
        ended(migrate(&pair.a, descriptor, 5, &["fd:5", "--verify", "full", "--downtime-limit", "1000"]));
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{told}");
    let ledger = writer.finish();
    watch.finish();
    let note = "g1: the disks travel inside the phase connection (stream), without NBD: the descriptor is one \
                connection, and is not opened again when it is lost\n";
    assert_eq!(told.matches(note).count(), 1, "{told}");
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
    dead(accept);
    // The record does not remember a number that means nothing to anybody else.
    assert!(!pair.a.ask(&["who-owns"]).stdout.contains("fd:"));
}

#[test]
fn the_command_may_leave_and_its_connection_stays() {
    let pair = Pair::new(16 * MIB, 232, 60);
    // Standard input itself.
    let (accept, descriptor) = accepting(&pair.b);
    let mut command = pair.a.command(&["migrate", "fd:0", "--detach", "--transport", "stream"]);
    let started = command.stdin(descriptor).stdout(Stdio::piped()).output().expect("runs");
    assert_eq!(String::from_utf8_lossy(&started.stdout), "g1: started\n", "{started:?}");
    pair.a.until_state("given");
    pair.b.until_state("owner");
    assert_same(&pair.at_a(), &pair.at_b());
    exactly_one_takes("vda", 0, &pair.b, &pair.a);
    dead(accept);
}

/// What a shell's coprocess leaves: two pipes.
#[test]
fn two_pipes_are_one_connection() {
    let mut pair = Pair::new(24 * MIB, 235, 60);
    let ledger = pair.ledger();
    let (input, there) = std::io::pipe().expect("a pipe");
    let (back, output) = std::io::pipe().expect("a pipe");
    let mut accept = blockferry();
    accept.args(["accept", "g1", "--control", &pair.b.control().to_string()]);
    accept.stdin(Stdio::from(input)).stdout(Stdio::from(output)).stderr(Stdio::null());
    let mut child = accept.spawn().expect("started");
    // What it has is its own: only so it sees an end.
    drop(accept);
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 8<&0 9>&1 </dev/null >&2", "sh"]).arg(executable());
    command.args(["migrate", "g1", "fd:8,9", "--control", &pair.a.control().to_string()]);
    command.stdin(Stdio::from(back)).stdout(Stdio::from(there)).stderr(Stdio::piped());
    let running = command.spawn().expect("started");
    drop(command);
    let (code, _, told) = ended(running);
    assert_eq!(code, Some(0), "{told}");
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
    // With the migration its connection is over.
    until_within(PATIENCE, "the end of accept", || child.try_wait().expect("its child"));
}

#[test]
fn a_passed_connection_that_is_lost_ends_the_attempt_at_once() {
    let mut pair = Pair::new(32 * MIB, 233, 60);
    let ledger = pair.ledger();
    let (accept, descriptor) = accepting(&pair.b);
    let running = migrate(&pair.a, descriptor, 7, &["fd:7", "--bandwidth", "4M"]);
    pair.b.until_state("receiving");
    pause(Duration::from_millis(500));
    let began = Instant::now();
    dead(accept);
    let (code, told, errors) = ended(running);
    assert_eq!(code, Some(3), "{told} {errors}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let cause = "; fd:7 was one connection and cannot be dialled again; this source still owns and serves the guest\n";
    assert!(errors.ends_with(cause) && errors.lines().count() == 1, "{errors}");
    assert_eq!(pair.a.state(), "owner");
    // And another one works.
    let (accept, descriptor) = accepting(&pair.b);
    let (code, told, errors) = ended(migrate(&pair.a, descriptor, 7, &["fd:7", "--overwrite"]));
    assert_eq!(code, Some(0), "{told} {errors}");
    pair.arrived(&ledger);
    dead(accept);
}

#[test]
fn a_descriptor_that_leads_nowhere_is_refused_in_one_line() {
    let pair = Pair::new(8 * MIB, 234, 60);
    let folder = scratch();
    let file = |path: &Path| OwnedFd::from(std::fs::File::create(path).expect("a file"));
    let listener = UnixListener::bind(folder.path().join("l")).expect("binds");
    let (closed, end) = UnixStream::pair().expect("a pair");
    drop(end);
    let plain = TcpListener::bind("127.0.0.1:0").expect("binds");
    let address = plain.local_addr().expect("bound");
    let reset = TcpStream::connect(address).expect("connects");
    drop(plain);
    for (descriptor, to, line) in [
        (file(&folder.path().join("f")), "fd:9", "fd:9: no such descriptor was passed\n"),
        (file(&folder.path().join("g")), "fd:5", "fd:5: is not a socket\n"),
        (listener.into(), "fd:5", "fd:5: is a socket that listens, not a connection\n"),
        (closed.into(), "fd:5", "g1: fd:5: greeting the server: the server closed the connection"),
        (reset.into(), "fd:5", "fd:5: is a socket that neither listens nor is connected\n"),
    ] {
        let (exit, told, errors) = ended(migrate(&pair.a, descriptor, 5, &[to]));
        assert_eq!(exit, Some(1), "{told} {errors}");
        assert!(errors.starts_with(&format!("blockferry: migrate: {line}")), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
    let (reads, _writes) = std::io::pipe().expect("a pipe");
    let (code, _, errors) = ended(migrate(&pair.a, reads, 5, &["fd:5,5"]));
    let line = "blockferry: migrate: fd:5,5: 5 is the end of a pipe that is read, and is to be written\n";
    assert_eq!((code, errors.as_str()), (Some(1), line));
    for (words, line) in [
        (&["fd:x"][..], "DEST: 'fd:x': 'x' is not a descriptor (0 to 65535)"),
        (&["fd:5", "--transport", "nbd"], "--transport nbd: 'fd:5' is one connection: no NBD beside it"),
    ] {
        let (_, descriptor) = UnixStream::pair().expect("a pair");
        let (code, _, errors) = ended(migrate(&pair.a, OwnedFd::from(descriptor), 5, words));
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains(line), "{errors}");
    }
    assert_eq!(pair.a.state(), "owner");
}
