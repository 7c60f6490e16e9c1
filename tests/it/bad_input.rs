//! What users, peers and disks get wrong: one line with operation, object and cause, the promised exit code, and the
//! other side undisturbed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use blockferry::address::Address;
use blockferry::migrate::wire::{BootId, Capabilities, Challenge, HELLO_LENGTH, Hello, Role, cut};
use blockferry::nbd::client::{PhasesAnswer, offer_phases};
use blockferry::nbd::wire;
use blockferry::ownership;
use blockferry::socket::Socket;
use tempfile::TempDir;

use crate::harness::{Program, free_port, peer, scratch, until};
use crate::host::{Finished, Host, PATIENCE, address, blockferry, run};
use crate::writer::{Dice, Ledger};

const MIB: u64 = 1 << 20;

/// A source with a disk vda that serves and a destination without one.
struct Pair {
    a: Host,
    b: Host,
    ledger: Ledger,
    folder: TempDir,
}

impl Pair {
    fn new() -> Self {
        let folder = scratch();
        let ledger = Ledger::format(&folder.path().join("a.img"), 16 * MIB, 1, 50);
        let a = Host::owner(folder.path(), "a", &[&file("vda", &folder.path().join("a.img"))]);
        let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
        Self { a, b, ledger, folder }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the destination anew, with other disks.
    fn destination(&mut self, disk: &str) {
        self.b.program.kill();
        self.b = Host::start(self.folder.path(), "b", &[disk]);
    }

    /// A migration that is refused with this cause; nothing has changed on either side.
    fn refuses(&self, options: &[&str], cause: &str) {
        self.refuses_to(&self.b.listen, options, cause);
    }

    fn refuses_to(&self, to: &str, options: &[&str], cause: &str) {
        let states = [self.b.state(), self.a.state()];
        let files = || {
            let entries = std::fs::read_dir(self.folder.path()).expect("its folder");
            let mut names: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        let before = files();
        self.a.migrate(to, options).refused(1, &format!("blockferry: migrate: g1: {cause}"));
        assert_eq!(states, [self.b.state(), self.a.state()], "a refusal changes nothing");
        assert_eq!(before, files(), "a refusal leaves nothing behind");
        self.ledger.verify_door(self.a.open("vda").expect("served")).assert_whole();
    }
}

fn file(name: &str, path: &Path) -> String {
    format!("{name},file={}", path.display())
}

fn made(path: &Path, size: u64) {
    File::create(path).expect("an image").set_len(size).expect("its size");
}

/// `serve` with these disks, which it refuses.
fn serve(folder: &Path, more: &[&str]) -> Finished {
    let mut command = blockferry();
    command.args(["serve", "g1", "--volatile-state", "--nbd", &format!("unix://{}/x.nbd", folder.display())]);
    command.args(["--control", &format!("unix://{}/x.control", folder.display())]).args(more);
    command.arg("--state").arg(folder.join("x.state"));
    run(&mut command, PATIENCE)
}

// ---- disks -------------------------------------------------------------------------------------------------------

#[test]
fn serve_refuses_what_is_no_disk() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    made(&at("odd"), 1000);
    made(&at("empty"), 0);
    made(&at("sized"), MIB);
    let refuses = |path: &Path, more: &str, cause: &str| {
        let disk = format!("vda,file={}{more}", path.display());
        let line = format!("blockferry: open disk vda: {}: {cause}", path.display());
        serve(folder.path(), &["--disk", &disk]).refused(1, &line);
    };
    refuses(&at("nowhere/x"), "", "its directory does not exist");
    refuses(&at("missing"), ",ro", "no such file");
    refuses(folder.path(), "", "is a directory, not a file or a block device");
    let nodes = Path::new("/dev/blockferry-none");
    refuses(nodes, ",size=1M", "there is no such device, and no file is created below /dev");
    assert!(!nodes.exists(), "in memory, where a device was meant");
    refuses(Path::new("/dev/null"), "", "is a character device, not a file or a block device");
    refuses(&at("odd"), "", "its size of 1000 bytes is not a multiple of 512");
    refuses(&at("empty"), "", "is empty");
    refuses(&at("sized"), ",size=2M", "has 1048576 bytes, not the 2097152 of size=");
    std::fs::hard_link(at("sized"), at("linked")).expect("linked");
    let twice = serve(folder.path(), &["--disk", &file("vda", &at("sized")), "--disk", &file("vdb", &at("linked"))]);
    twice.refused(1, &format!("blockferry: open disk vdb: {}: is the image of disk vda too", at("linked").display()));
    let used = Host::start(folder.path(), "a", &[&file("vda", &at("sized"))]);
    refuses(&at("sized"), "", "in use by another process");
    assert_eq!(used.state(), "incoming");
}

#[test]
fn serve_refuses_a_port_that_is_in_use() {
    let folder = scratch();
    made(&folder.path().join("a.img"), MIB);
    made(&folder.path().join("b.img"), MIB);
    let a = Host::owner(folder.path(), "a", &[&file("vda", &folder.path().join("a.img"))]);
    let disk = file("vda", &folder.path().join("b.img"));
    let taken = serve(folder.path(), &["--disk", &disk, "--listen", &a.listen]);
    taken.refused(1, &format!("blockferry: migration door: {}: in use: a process listens there", a.listen));
    let taken = serve(folder.path(), &["--disk", &disk, "--nbd", &a.tcp_door]);
    taken.refused(1, &format!("blockferry: guest door: {}: in use: a process listens there", a.tcp_door));
    let control = serve(folder.path(), &["--disk", &disk, "--control", &a.door.to_string()]);
    assert_eq!(control.code, Some(1), "{control:?}");
    assert!(control.stderr.contains("control door"), "a socket that is alive is not taken away: {control:?}");
    assert_eq!(a.try_write("vda", 0), Ok(()));
}

#[test]
fn migrate_names_a_disk_that_is_not_there() {
    let pair = Pair::new();
    pair.refuses(&["--migrate-disks", "vdz"], "there is no disk vdz");
    let usage = pair.a.migrate(&pair.b.listen, &["--migrate-disks", "vda,vda"]);
    assert_eq!(usage.code, Some(2), "{usage:?}");
    assert!(usage.stderr.contains("disk vda is named twice"), "{usage:?}");
}

#[test]
fn a_destination_whose_disks_do_not_fit_refuses() {
    let mut pair = Pair::new();
    let at = pair.image("b2.img");
    for (size, bytes) in [("8M", 8 * MIB), ("32M", 32 * MIB)] {
        pair.destination(&format!("vda,file={},size={size}", at.display()));
        let cause = format!("disk vda: has {bytes} bytes at the destination and 16777216 at the source");
        pair.refuses(&[], &format!("refused by the destination: {cause}; nothing has changed"));
        pair.b.program.kill();
        std::fs::remove_file(&at).expect("removed");
    }
    drop(Ledger::format(&at, 16 * MIB, 9, 100));
    pair.destination(&file("vda", &at));
    let cause = format!(
        "disk vda: {} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)",
        at.display()
    );
    pair.refuses(&[], &format!("refused by the destination: {cause}; nothing has changed"));
    pair.destination(&file("vdb", &at));
    let cause = "disk vda: the destination has no disk of this name";
    pair.refuses(&["--overwrite"], &format!("refused by the destination: {cause}; nothing has changed"));
    pair.destination(&format!("{},ro", file("vda", &at)));
    pair.refuses(
        &["--overwrite"],
        "refused by the destination: disk vda: is read-only at the destination; nothing has changed",
    );
    pair.destination("vda,external");
    pair.refuses(&[], "refused by the destination: disk vda: is external at the destination; nothing has changed");
    pair.destination(&file("vda", &at));
    pair.a.migrate(&pair.b.listen, &["--overwrite"]).well();
    pair.ledger.verify_file(&at).assert_whole();
}

#[test]
fn a_destination_without_room_refuses_before_the_first_byte() {
    let mut pair = Pair::new();
    let Some(small) = SmallFileSystem::mount(4 * MIB) else { return };
    let at = small.0.path().join("b.img");
    pair.destination(&file("vda", &at));
    let refused = pair.a.migrate(&pair.b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.starts_with("blockferry: migrate: g1: refused by the destination: the disks vda need "),
        "{refused:?}"
    );
    assert!(refused.stderr.contains(" bytes, their file system has "), "{refused:?}");
    assert!(!at.exists());
    pair.b.program.kill();
}

#[test]
fn a_destination_that_becomes_full_ends_the_migration() {
    let mut pair = Pair::new();
    let Some(small) = SmallFileSystem::mount(12 * MIB) else { return };
    pair.destination(&file("vda", &small.0.path().join("b.img")));
    let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "4M"]);
    migration.until_sent(MIB);
    // Somebody else needs the room.
    std::fs::write(small.0.path().join("other"), vec![1; 16 << 20]).expect_err("full");
    let ended = migration.wait();
    ended.aborted();
    let cause = ended.done().get("cause").text();
    assert!(cause.starts_with("write: disk vda, ") && cause.ends_with("ENOSPC"), "{cause}");
    assert_eq!(pair.a.try_write("vda", 16 * MIB - 512), Ok(()), "the source serves");
    pair.b.until_state("incoming");
    pair.b.program.kill();
}

#[test]
fn a_source_image_that_cannot_be_read_ends_the_migration() {
    let pair = Pair::new();
    let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "1M"]);
    migration.until_sent(MIB / 2);
    // Somebody makes the image shorter behind our back: what follows cannot be read.
    File::options().write(true).open(pair.image("a.img")).expect("an image").set_len(4 * MIB).expect("shorter");
    pair.a.ask(&["set", "--bandwidth", "0"]).well();
    let ended = migration.wait();
    ended.aborted();
    let cause = ended.done().get("cause").text();
    assert!(cause.starts_with("read: disk vda, ") && cause.ends_with(": the image has become shorter"), "{cause}");
    assert_eq!(pair.a.try_write("vda", 0), Ok(()), "the source serves what there is");
    pair.b.until_state("incoming");
    assert!(!pair.image("b.img").exists());
}

/// D8: a device that answers reads with an error.
#[test]
fn a_source_device_that_fails_ends_the_migration() {
    let folder = scratch();
    let backing = folder.path().join("backing");
    drop(Ledger::format(&backing, 16 * MIB, 4, 100));
    let Some(device) = LoopDevice::over(&backing) else { return };
    let a = Host::owner(folder.path(), "a", &[&file("vda", &device.path)]);
    let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
    let migration = a.start_migrate(&b.listen, &["--bandwidth", "2M"]);
    migration.until_sent(MIB);
    // What is behind the new end of the backing file can be read no more, once the cache has forgotten it.
    File::options().write(true).open(&backing).expect("its file").set_len(MIB).expect("shorter");
    tool("blockdev", &["--flushbufs", device.path.to_str().expect("a path")]).expect("flushed");
    let ended = migration.wait();
    ended.aborted();
    let cause = ended.done().get("cause").text();
    // The words for the error are the C library's.
    let error = ["I/O error", "Input/output error"].iter().any(|words| cause.ends_with(words));
    assert!(cause.starts_with("read: disk vda, ") && error, "{cause}");
    assert_eq!((a.state().as_str(), b.state().as_str()), ("owner", "incoming"));
    assert_eq!(a.try_write("vda", 0), Ok(()));
    // And where it is known before, nobody is asked.
    let again = a.migrate(&b.listen, &[]);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.stderr.contains("refused by the source: disk vda: cannot be read: "), "{again:?}");
    assert!(!folder.path().join("b.img").exists());
}

/// Nobody writes into a device on which the host has a file system.
#[test]
fn a_mounted_device_is_no_disk() {
    let folder = scratch();
    let backing = folder.path().join("backing");
    made(&backing, 16 * MIB);
    let Some(device) = LoopDevice::over(&backing) else { return };
    let (name, place) = (device.path.to_str().expect("a path"), folder.path().join("mounted"));
    std::fs::create_dir(&place).expect("a folder");
    let place = place.to_str().expect("a path");
    if tool("mkfs.ext4", &["-q", name]).is_none() || tool("mount", &[name, place]).is_none() {
        return;
    }
    let refused = serve(folder.path(), &["--disk", &file("vda", &device.path)]);
    tool("umount", &[place]).expect("unmounted");
    let cause = "is mounted, or in use by the system or another process";
    refused.refused(1, &format!("blockferry: open disk vda: {name}: {cause}"));
    drop(Host::start(folder.path(), "b", &[&file("vda", &device.path)]));
}

/// D9: a device that takes every write and fails the sync. Its disk is not sealed, whatever comes afterwards.
#[test]
fn a_destination_device_that_cannot_sync_ends_the_migration() {
    let mut pair = Pair::new();
    let Some(small) = SmallFileSystem::mount(4 * MIB) else { return };
    let backing = small.0.path().join("backing");
    made(&backing, 16 * MIB);
    let Some(device) = LoopDevice::over(&backing) else { return };
    pair.destination(&file("vda", &device.path));
    let ended = pair.a.start_migrate(&pair.b.listen, &[]).wait();
    ended.aborted();
    let cause = ended.done().get("cause").text();
    let known = ["write: disk vda, ", "flush: disk vda: ", "the destination: flush: disk vda: "];
    assert!(known.iter().any(|known| cause.starts_with(known)), "{cause}");
    assert_eq!((pair.a.state().as_str(), pair.b.state().as_str()), ("owner", "incoming"));
    pair.ledger.verify_door(pair.a.open("vda").expect("served")).assert_whole();
    assert_eq!(pair.a.try_write("vda", 0), Ok(()));
    pair.b.program.kill();
}

// ---- peers -------------------------------------------------------------------------------------------------------

#[test]
fn a_plain_nbd_server_is_no_destination() {
    let pair = Pair::new();
    let image = pair.image("plain.img");
    made(&image, 16 * MIB);
    type Arguments = fn(&mut Command, u16, &Path);
    let servers: [(&str, Arguments); 2] = [
        ("qemu-nbd", |command, port, image| {
            command.args(["--format=raw", "--persistent", "--export-name=vda", "--bind=127.0.0.1"]);
            command.arg(format!("--port={port}")).arg(image);
        }),
        ("nbdkit", |command, port, image| {
            command.args(["--foreground", "--exit-with-parent", "--ipaddr=127.0.0.1"]);
            command.arg(format!("--port={port}")).arg("file").arg(image);
        }),
    ];
    for (name, arguments) in servers {
        let Some(program) = peer(name) else { continue };
        let port = free_port();
        let mut command = Command::new(program);
        arguments(&mut command, port, &image);
        let mut server = Program::start(&mut command);
        drop(server.connect_tcp(port));
        let to = format!("tcp://127.0.0.1:{port}");
        let cause = format!("{to}: is a plain NBD server, not a blockferry's migration door; nothing has changed");
        pair.refuses_to(&to, &[], &cause);
    }
    let uri = pair.a.migrate("nbd://127.0.0.1/vda", &[]);
    assert_eq!(uri.code, Some(2), "{uri:?}");
}

/// A peer that is not quite one: accepts one connection and says what it is told to.
fn stranger(talk: impl FnOnce(&mut TcpStream) + Send + 'static) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let to = format!("tcp://{}", listener.local_addr().expect("its address"));
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a source");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        talk(&mut stream);
        // Until the source hangs up.
        let mut rest = [0; 4096];
        while matches!(stream.read(&mut rest), Ok(got) if got > 0) {}
    });
    (to, thread)
}

/// The server's side of the NBD handshake up to the point where the phases begin.
fn accept_phases(stream: &mut TcpStream) {
    let greeting = [&wire::NBDMAGIC.to_be_bytes()[..], &wire::IHAVEOPT.to_be_bytes(), &3_u16.to_be_bytes()].concat();
    stream.write_all(&greeting).expect("sent");
    let mut option = [0; 4 + 16];
    stream.read_exact(&mut option).expect("the client's flags and its first option");
    assert_eq!(option[12..16], wire::OPT_BLOCKFERRY_PHASES.to_be_bytes());
    let reply = [
        &wire::OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &wire::OPT_BLOCKFERRY_PHASES.to_be_bytes(),
        &wire::REP_ACK.to_be_bytes(),
        &0_u32.to_be_bytes(),
    ];
    stream.write_all(&reply.concat()).expect("sent");
}

fn hello(guest: &str, versions: (u16, u16)) -> [u8; HELLO_LENGTH] {
    let hello = Hello {
        versions,
        role: Role::Destination,
        capabilities: Capabilities::NBD,
        guest: cut(guest),
        title: None,
        boot: BootId([1; 16]),
        instance: ownership::Instance([2; 16]),
        challenge: Challenge([3; 16]),
        host: ownership::Host([4; 16]),
        address: heapless::String::new(),
    };
    hello.encode()
}

#[test]
fn a_peer_that_is_not_one_is_told_apart() {
    type Talk = fn(&mut TcpStream);
    let cases: [(Talk, &str); 8] = [
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&hello("g1", (7, 9))).expect("sent");
            },
            "the peer speaks versions 7 to 9 of the phase protocol, this program 1 to 1",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&hello("g2", (1, 1))).expect("sent");
            },
            "serves guest 'g2', not 'g1'",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&[b'x'; HELLO_LENGTH]).expect("sent");
            },
            "the peer is not blockferry",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.shutdown(std::net::Shutdown::Both).expect("closed");
            },
            "the peer closed the connection",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&[&hello("g1", (1, 1))[..], &[0xff, 0xff, 0xff, 0x7f]].concat()).expect("sent");
            },
            "the peer sent a frame longer than 8192 bytes",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&[&hello("g1", (1, 1))[..], &[2, 0, 0, 0, 99, 1]].concat()).expect("sent");
            },
            "the peer sent an unknown message, number 99",
        ),
        (
            |stream| {
                accept_phases(stream);
                stream.write_all(&[&hello("g1", (1, 1))[..], &[3, 0, 0, 0, 1, 7, 7]].concat()).expect("sent");
            },
            "the peer sent a malformed message",
        ),
        (|stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").expect("sent"), "this is no NBD server"),
    ];
    let pair = Pair::new();
    for (talk, cause) in cases {
        let (to, thread) = stranger(talk);
        let refused = pair.a.migrate(&to, &[]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.starts_with("blockferry: migrate: g1: "), "{refused:?}");
        assert!(refused.stderr.contains(cause), "{cause}: {refused:?}");
        assert!(refused.stderr.ends_with("; nothing has changed\n"), "{refused:?}");
        assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
        thread.join().expect("no panic");
    }
    let to = format!("tcp://127.0.0.1:{}", free_port());
    pair.refuses_to(&to, &[], &format!("{to}: Connection refused; nothing has changed"));
}

#[test]
fn a_migration_goes_neither_to_itself_nor_to_another_guest_nor_from_who_owns_nothing() {
    let pair = Pair::new();
    let itself = format!("{}: is this process itself; nothing has changed", pair.a.listen);
    pair.refuses_to(&pair.a.listen, &[], &itself);
    let other = Host::start_guest(pair.folder.path(), "other", "g2", &[&file("vda", &pair.image("o.img"))]);
    let cause = format!("{}: serves guest 'g2', not 'g1'; nothing has changed", other.listen);
    pair.refuses_to(&other.listen, &[], &cause);
    assert_eq!(other.state(), "incoming");
    made(&pair.image("third.img"), MIB);
    let third = Host::start(pair.folder.path(), "third", &[&file("vda", &pair.image("third.img"))]);
    let owns_nothing = "this host owns nothing (blockferry claim makes it the owner, once)";
    third.migrate(&pair.b.listen, &[]).refused(1, &format!("blockferry: migrate: g1: {owns_nothing}"));
    let missing = pair.b.migrate(&pair.a.listen, &[]);
    missing.refused(1, "blockferry: migrate: g1: disk vda does not exist");
    pair.b.ask(&["claim"]).refused(1, "blockferry: claim: g1: disk vda does not exist");
    third.ask(&["claim"]).well();
    let twice = third.ask(&["claim"]);
    assert_eq!(twice.code, Some(1), "{twice:?}");
    // Two owners of two lineages: neither takes the other's guest.
    let refused = third.migrate(&pair.a.listen, &["--overwrite"]);
    let busy = "refused by the destination: the guest cannot be received here: this host owns the guest (order 1.1)";
    refused.refused(1, &format!("blockferry: migrate: g1: {busy}; nothing has changed"));
    assert_eq!((third.state().as_str(), pair.a.state().as_str()), ("owner", "owner"));
    let switch = pair.a.ask(&["switch"]);
    switch.refused(1, "blockferry: switch: g1: no migration is running");
    let set = pair.a.ask(&["set", "--bandwidth", "1M"]);
    set.refused(1, "blockferry: set: g1: no migration is running");
}

// ---- garbage -----------------------------------------------------------------------------------------------------

/// Says that nothing more is sent.
fn hang_up(socket: &Socket) {
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
}

/// Sends bytes to a door and waits until it hangs up.
fn throw(door: &Address, bytes: &[u8]) {
    let socket = door.connect(PATIENCE).expect("a door");
    // It may hang up before it has everything.
    let _ = socket.send_all_before(bytes, Instant::now() + PATIENCE);
    hang_up(&socket);
    until("end of the connection", || {
        let mut answer = [0; 4096];
        match socket.recv_nowait(&mut answer) {
            Ok(None) => None,
            Ok(Some(got)) if got > 0 => None,
            _ => Some(()),
        }
    });
}

/// A phase connection to a door, after the hellos.
fn phases(door: &Address, guest: &str) -> Arc<Socket> {
    let socket = Arc::new(door.connect(PATIENCE).expect("a door"));
    assert_eq!(offer_phases(&socket).expect("answered"), PhasesAnswer::Accepted);
    socket.send_all_before(&hello(guest, (1, 1)), Instant::now() + PATIENCE).expect("sent");
    let mut theirs = [0; HELLO_LENGTH];
    socket.recv_exact_before(&mut theirs, Instant::now() + PATIENCE).expect("its hello");
    socket
}

#[test]
fn garbage_at_any_door_disturbs_nobody() {
    let pair = Pair::new();
    let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
    migration.until_held();
    let mut dice = Dice::new(7);
    let mut noise = |length: usize| -> Vec<u8> { (0..length).map(|_| dice.roll().to_le_bytes()[3]).collect() };
    for host in [&pair.a, &pair.b] {
        let doors = [host.door.clone(), address(&host.tcp_door), address(&host.listen), host.control().clone()];
        for door in &doors {
            for length in [0, 1, 100, 100_000] {
                throw(door, &noise(length));
            }
            // A beginning that is right.
            let begin = [&3_u32.to_be_bytes()[..], &wire::IHAVEOPT.to_be_bytes(), &noise(64)].concat();
            throw(door, &begin);
        }
        let door = address(&host.listen);
        for frame in [
            noise(200),
            vec![0, 0, 0, 0],
            vec![0xff; 8],
            vec![1, 0, 0, 0, 200],
            [vec![0, 1, 0, 0, 0], noise(255)].concat(),
            [vec![0, 1, 0, 0, 3], noise(255)].concat(),
            [vec![0, 1, 0, 0, 7], noise(255)].concat(),
            [vec![0, 1, 0, 0, 9], noise(255)].concat(),
        ] {
            let socket = phases(&door, "g1");
            let _ = socket.send_all_before(&frame, Instant::now() + PATIENCE);
            hang_up(&socket);
            until("end of the connection", || {
                matches!(socket.recv_nowait(&mut [0; 4096]), Ok(Some(0)) | Err(_)).then_some(())
            });
        }
        let _ = phases(&door, "g2");
    }
    pair.a.ask(&["switch"]).well();
    migration.wait().well();
    assert_eq!((pair.a.state().as_str(), pair.b.state().as_str()), ("given", "owner"));
    pair.ledger.verify_door(pair.b.open("vda").expect("served")).assert_whole();
}

#[test]
fn messages_of_an_unknown_attempt_change_nothing() {
    use blockferry::migrate::wire::{Epoch, Message};
    use blockferry::ownership::{Attempt, Lineage, Order, Stamp, Word};
    let pair = Pair::new();
    let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
    migration.until_held();
    let stamp = Stamp {
        lineage: Lineage([1; 16]),
        word: Word([2; 16]),
        attempt: Attempt([3; 16]),
        source: ownership::Host([4; 16]),
        destination: ownership::Host([5; 16]),
        order: Order { term: 9, generation: 9 },
    };
    for host in [&pair.a, &pair.b] {
        for message in [
            Message::Go { stamp },
            Message::Abort { stamp, cause: cut("a stranger"), keep: false },
            Message::Seal { stamp, digests: heapless::Vec::new(), unread_bytes: 0 },
            Message::Fence { stamp, epoch: Epoch(0) },
            Message::Unsealed { stamp },
            Message::Question { stamp },
        ] {
            let socket = phases(&address(&host.listen), "g1");
            let mut buffer = [0; 4 + blockferry::limits::FRAME_MAX];
            let frame = message.encode(&mut buffer).expect("fits");
            socket.send_all_before(frame, Instant::now() + PATIENCE).expect("sent");
            // An answer, or the end of the connection.
            let _ = socket.recv_exact_before(&mut [0; 5], Instant::now() + PATIENCE);
        }
    }
    assert_eq!((pair.a.state().as_str(), pair.b.state().as_str()), ("owner", "receiving"));
    pair.a.ask(&["switch"]).well();
    migration.wait().well();
    pair.ledger.verify_door(pair.b.open("vda").expect("served")).assert_whole();
}

// ---- what only root can arrange ----------------------------------------------------------------------------------

/// Runs a tool that may be missing, or not be allowed here.
fn tool(name: &str, arguments: &[&str]) -> Option<String> {
    let done = run(Command::new(peer(name)?).args(arguments), PATIENCE);
    if done.code == Some(0) {
        return Some(done.stdout);
    }
    eprintln!("SKIP: {name} does not work here: {}", done.stderr.trim_end());
    None
}

/// A file system of its own, taken away with the test.
pub(crate) struct SmallFileSystem(pub(crate) TempDir);

impl SmallFileSystem {
    pub(crate) fn mount(size: u64) -> Option<Self> {
        let folder = scratch();
        let place = folder.path().to_str().expect("a path").to_owned();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "blockferry-it", &place])?;
        Some(Self(folder))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Also when the process that uses it is just being ended.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// A block device of which somebody else has the content in hand.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    fn over(backing: &Path) -> Option<Self> {
        let name = tool("losetup", &["--find", "--show", backing.to_str()?])?;
        Some(Self { path: PathBuf::from(name.trim()) })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// How long a stranger may keep a connection.
#[test]
fn a_peer_that_says_nothing_is_not_waited_for() {
    let pair = Pair::new();
    let (to, thread) = stranger(|_| {});
    let began = Instant::now();
    let refused = pair.a.migrate(&to, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("no answer from the server within 10 s"), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    thread.join().expect("no panic");
}
