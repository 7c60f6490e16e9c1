//! Migrations between two processes, as a user starts them.

// Disks are small here.
#![allow(clippy::cast_possible_truncation)]

mod descriptor;
mod digests;
mod faults;
mod load;
mod outages;
mod restarts;
mod stream;
mod synchronous;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blockferry::nbd::client::RequestError;
use tempfile::TempDir;

use crate::harness::{peer, scratch, throughout, until_within};
use crate::host::{Host, PATIENCE, exactly_one_takes, run};
use crate::json::Json;
use crate::writer::{Ledger, Load, Mix, OnLoss, Writer};

const MIB: u64 = 1 << 20;

/// A source that owns a disk vda, a destination that has none yet, and what the disk holds.
struct Pair {
    a: Host,
    b: Host,
    ledger: Option<Ledger>,
    folder: TempDir,
}

impl Pair {
    /// A disk of `size` bytes of which `full` percent hold data.
    fn new(size: u64, seed: u64, full: u64) -> Self {
        let folder = scratch();
        let ledger = Some(Ledger::format(&folder.path().join("a.img"), size, seed, full));
        let a = Host::owner(folder.path(), "a", &[&file("vda", &folder.path().join("a.img"))]);
        let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
        Self { a, b, ledger, folder }
    }

    fn at_a(&self) -> PathBuf {
        self.folder.path().join("a.img")
    }

    fn at_b(&self) -> PathBuf {
        self.folder.path().join("b.img")
    }

    fn ledger(&mut self) -> Ledger {
        self.ledger.take().expect("taken once")
    }

    /// The destination has everything, serves it, and is the only one who does.
    fn arrived(&self, ledger: &Ledger) {
        ledger.verify_file(&self.at_b()).assert_whole();
        ledger.verify_door(self.b.open("vda").expect("served")).assert_whole();
        assert_eq!((self.a.state().as_str(), self.b.state().as_str()), ("given", "owner"));
        exactly_one_takes("vda", 0, &self.b, &self.a);
    }

    /// The source has everything and serves it.
    fn stayed(&self, ledger: &Ledger) {
        ledger.verify_file(&self.at_a()).assert_whole();
        ledger.verify_door(self.a.open("vda").expect("served")).assert_whole();
        assert_eq!(self.a.state(), "owner");
        exactly_one_takes("vda", 0, &self.a, &self.b);
    }
}

/// A `--disk` value.
fn file(name: &str, path: &Path) -> String {
    format!("{name},file={}", path.display())
}

/// A quiet guest.
fn calm(seed: u64) -> Load {
    Load { seed, connections: 1, depth: 4, mix: Mix::ALL, rate: 500, on_loss: OnLoss::Stop }
}

/// Bytes that a file occupies.
fn allocated(path: &Path) -> u64 {
    path.metadata().expect("a file").blocks() * 512
}

/// Both files hold the same, byte for byte.
pub(crate) fn assert_same(one: &Path, other: &Path) {
    let files = [one, other].map(|path| File::open(path).expect("an image"));
    let size = files[0].metadata().expect("its size").len();
    assert_eq!(size, files[1].metadata().expect("its size").len());
    let mut bytes = [vec![0; MIB as usize], vec![0; MIB as usize]];
    for offset in (0..size).step_by(MIB as usize) {
        let length = usize::try_from(MIB.min(size - offset)).expect("small");
        for (file, bytes) in files.iter().zip(&mut bytes) {
            file.read_exact_at(&mut bytes[..length], offset).expect("read");
        }
        assert!(bytes[0][..length] == bytes[1][..length], "the mebibyte at {offset} differs");
    }
}

#[test]
fn an_idle_disk_moves_and_stays_sparse() {
    let mut pair = Pair::new(256 * MIB, 1, 20);
    let ledger = pair.ledger();
    assert!(!pair.at_b().exists(), "made at PREPARE");
    let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
    migration.until_held();
    assert_eq!(pair.at_b().metadata().expect("made at PREPARE").len(), 256 * MIB);
    assert_eq!((pair.a.state().as_str(), pair.b.state().as_str()), ("owner", "receiving"));
    pair.a.ask(&["switch"]).well();
    let ended = migration.wait();
    ended.well();
    let done = ended.done();
    assert_eq!(done.get("destination").text(), pair.b.listen);
    assert!(done.get("sent_bytes").number() <= allocated(&pair.at_a()), "{done:?}");
    assert!(done.get("switchover_us").number() > 0);
    assert_eq!(pair.b.status().get("generation").number(), 2);

    assert_same(&pair.at_a(), &pair.at_b());
    let (here, there) = (allocated(&pair.at_a()), allocated(&pair.at_b()));
    assert!(there <= here + MIB, "{here} bytes are allocated at the source, {there} at the destination");
    pair.arrived(&ledger);

    // Who gave it away gives it no more, and whoever owns it receives it no more.
    let again = pair.a.migrate(&pair.b.listen, &[]);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.stderr.starts_with("blockferry: migrate: g1: this host gave the guest to host "), "{again:?}");
    let itself = pair.b.migrate(&pair.b.listen, &[]);
    let cause = format!("{}: is this process itself; nothing has changed", pair.b.listen);
    itself.refused(1, &format!("blockferry: migrate: g1: {cause}"));
}

#[test]
fn foreign_clients_find_the_disk_at_the_new_owner() {
    let (Some(qemu_io), Some(fio)) = (peer("qemu-io"), peer("fio")) else { return };
    let pair = Pair::new(64 * MIB, 2, 30);
    pair.a.migrate(&pair.b.listen, &[]).well();
    let uri = |host: &Host| format!("nbd+unix:///vda?socket={}", host.door.to_string().trim_start_matches("unix://"));
    let io = |host: &Host, command: &str| {
        run(Command::new(&qemu_io).args(["-f", "raw", "-c", command]).arg(uri(host)), PATIENCE)
    };
    io(&pair.b, "write -P 7 1M 64k").well();
    assert!(io(&pair.b, "read -P 7 1M 64k").well().contains("read 65536/65536"));
    let refused = io(&pair.a, "write -P 8 1M 64k");
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.stderr.contains("gave the guest to"), "who owns is said: {refused:?}");
    let mut command = Command::new(&fio);
    command.current_dir(pair.folder.path());
    command.args(["--name=both", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--size=8M", "--iodepth=8"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--output-format=terse"]);
    run(command.arg(format!("--uri={}", uri(&pair.b))), PATIENCE).well();
    run(
        Command::new(&fio)
            .args(["--name=read", "--ioengine=nbd", "--rw=read", "--bs=64k", "--size=8M"])
            .arg(format!("--uri={}", uri(&pair.b))),
        PATIENCE,
    )
    .well();
}

#[test]
fn only_the_disks_that_move_by_themselves_move() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let moving = ["a.vda", "a.vde"].map(|name| Ledger::format(&at(name), 32 * MIB, 5, 50));
    for name in ["shared", "a.vdc", "b.vdc"] {
        let _ = Ledger::format(&at(name), MIB, 6, 100);
    }
    let disks = |host: &str, vda: &str| {
        let shared = format!("vdb,file={},shared", at("shared").display());
        let tools = format!("vdc,file={},ro", at(&format!("{host}.vdc")).display());
        let vde = file("vde", &at(&format!("{host}.vde")));
        [vda.to_owned(), shared, tools, "vdd,external".to_owned(), "sr0".to_owned(), vde]
    };
    let (here, there) =
        (disks("a", &file("vda", &at("a.vda"))), disks("b", &format!("vda,file={},size=32M", at("b.vda").display())));
    let a = Host::owner(folder.path(), "a", &here.each_ref().map(String::as_str));
    let b = Host::start(folder.path(), "b", &there.each_ref().map(String::as_str));
    assert_eq!(at("b.vda").metadata().expect("made at the start with size=").len(), 32 * MIB);
    assert!(!at("b.vde").exists());
    let stays: Vec<_> =
        a.status().get("disks").items().iter().map(|disk| disk.get("stays").text().to_owned()).collect();
    assert_eq!(stays, ["", "shared", "read-only", "external", "no source", ""]);
    let tools = std::fs::read(at("b.vdc")).expect("an image");

    let migration = a.start_migrate(&b.listen, &[]);
    let ended = migration.wait();
    ended.well();
    let named: Vec<_> =
        ended.lines[0].get("disks").items().iter().map(|disk| disk.get("name").text().to_owned()).collect();
    assert!(named.is_empty() || named == ["vda", "vde"], "{named:?}");
    moving[0].verify_file(&at("b.vda")).assert_whole();
    moving[1].verify_file(&at("b.vde")).assert_whole();
    assert!(std::fs::read(at("b.vdc")).expect("an image") == tools, "the destination keeps its own");
    exactly_one_takes("vda", 0, &b, &a);
    exactly_one_takes("vde", 0, &b, &a);
    let refused = b.try_write("vdc", 0).expect_err("read-only");
    assert!(refused.contains("EPERM"), "{refused}");
}

#[test]
fn named_disks_move_and_the_others_do_not() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let vdb = Ledger::format(&at("a.vdb"), 32 * MIB, 8, 50);
    drop(Ledger::format(&at("a.vda"), 32 * MIB, 7, 50));
    let a = Host::owner(folder.path(), "a", &[&file("vda", &at("a.vda")), &file("vdb", &at("a.vdb"))]);
    let b = Host::start(folder.path(), "b", &[&file("vda", &at("b.vda")), &file("vdb", &at("b.vdb"))]);
    // The guest would not find vda there: said before the start.
    let refused = a.migrate(&b.listen, &["--migrate-disks", "vdb"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let cause = format!("disk vda: stays (not chosen) and {} does not exist at the destination", at("b.vda").display());
    assert!(
        refused.stderr.contains(&format!("refused by the destination: {cause}; nothing has changed")),
        "{refused:?}"
    );
    assert!(!at("b.vdb").exists());
    a.migrate(&b.listen, &["--migrate-disks", "vdb", "--unsafe"]).well();
    vdb.verify_file(&at("b.vdb")).assert_whole();
    assert!(!at("b.vda").exists(), "nobody asked for vda");
    exactly_one_takes("vdb", 0, &b, &a);
}

#[test]
fn bandwidth_is_respected_and_can_be_changed() {
    let pair = Pair::new(32 * MIB, 9, 100);
    let began = Instant::now();
    pair.a.migrate(&pair.b.listen, &["--bandwidth", "16M"]).well();
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1600), "32 MiB at 16 MiB/s in {took:?}");
    assert!(took <= Duration::from_secs(20), "32 MiB at 16 MiB/s in {took:?}");

    let pair = Pair::new(64 * MIB, 10, 100);
    let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "1M"]);
    migration.until_sent(MIB);
    pair.a.ask(&["set", "--bandwidth", "0"]).well();
    let began = Instant::now();
    migration.wait().well();
    assert!(began.elapsed() < Duration::from_secs(40), "63 MiB without a limit in {:?}", began.elapsed());
}

#[test]
fn a_detached_migration_is_followed_by_status() {
    let mut pair = Pair::new(64 * MIB, 11, 100);
    let ledger = pair.ledger();
    let started = pair.a.migrate(&pair.b.listen, &["--detach", "--bandwidth", "8M"]);
    assert_eq!(started.well(), "g1: started\n");
    let status = pair.a.status();
    assert_eq!(status.get("migration").text(), "running");
    let second = pair.a.migrate(&pair.b.listen, &[]);
    second.refused(1, &format!("blockferry: migrate: g1: a migration to {} is running", pair.b.listen));
    let text = pair.a.ask(&["status", "--json"]).well();
    let progress = Json::parse(text.lines().nth(1).expect("a second line"));
    assert_eq!(progress.get("type").text(), "progress");
    assert_eq!(progress.get("bandwidth_bytes").number(), 8 * MIB);
    pair.a.ask(&["set", "--bandwidth", "0"]).well();
    pair.a.until_state("given");
    until_within(PATIENCE, "end of the migration", || {
        (pair.a.status().get("migration").text() == "ended").then_some(())
    });
    let text = pair.a.ask(&["status", "--json"]).well();
    let done = Json::parse(text.lines().nth(1).expect("a second line"));
    assert_eq!((done.get("type").text(), done.get("exit").number()), ("done", 0));
    pair.arrived(&ledger);
}

#[test]
fn a_migrate_command_that_is_killed_ends_its_migration() {
    let mut pair = Pair::new(64 * MIB, 12, 100);
    let writer = Writer::start(calm(12), pair.ledger(), "vda", &[&pair.a.door]);
    let mut migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "4M"]);
    migration.until_sent(4 * MIB);
    migration.kill();
    until_within(PATIENCE, "end of the migration", || {
        (pair.a.status().get("migration").text() == "ended").then_some(())
    });
    let text = pair.a.ask(&["status", "--json"]).well();
    let done = Json::parse(text.lines().nth(1).expect("a second line"));
    assert_eq!(done.get("exit").number(), 3);
    assert_eq!(done.get("cause").text(), "the migrate command went away");
    writer.until_more(100);
    pair.b.until_state("incoming");
    assert!(!pair.at_b().exists(), "what the attempt made is removed");
    let ledger = writer.finish();
    pair.a.migrate(&pair.b.listen, &[]).well();
    pair.arrived(&ledger);
}

#[test]
fn a_cancel_in_the_bulk_pass_or_while_held_leaves_the_source_as_it_was() {
    let mut pair = Pair::new(64 * MIB, 13, 60);
    let writer = Writer::start(calm(13), pair.ledger(), "vda", &[&pair.a.door]);
    for (options, held) in [(["--bandwidth", "4M"].as_slice(), false), (&["--hold"], true)] {
        let migration = pair.a.start_migrate(&pair.b.listen, options);
        if held {
            migration.until_held()
        } else {
            migration.until_sent(MIB)
        };
        pair.a.ask(&["cancel"]).well();
        let ended = migration.wait();
        ended.aborted();
        assert_eq!(ended.done().get("cause").text(), "cancelled by the user");
        writer.until_more(20);
        pair.b.until_state("incoming");
        assert!(!pair.at_b().exists(), "what the attempt made is removed");
    }
    // At once, whatever phase that is.
    for _ in 0..5 {
        let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
        until_within(PATIENCE, "a migration to cancel", || (pair.a.ask(&["cancel"]).code == Some(0)).then_some(()));
        let ended = migration.wait();
        assert!(matches!(ended.code, Some(1 | 3)), "{ended:?}");
        assert!(ended.stderr.contains("cancelled by the user"), "{ended:?}");
    }
    writer.until_more(20);
    pair.b.until_state("incoming");
    let idle = pair.a.ask(&["cancel"]);
    idle.refused(1, "blockferry: cancel: g1: no migration is running");
    pair.stayed(&writer.finish());
}

#[test]
fn a_cancel_at_the_destination_tells_the_source_why() {
    let mut pair = Pair::new(64 * MIB, 14, 60);
    let writer = Writer::start(calm(14), pair.ledger(), "vda", &[&pair.a.door]);
    for _ in 0..5 {
        let migration = pair.a.start_migrate(&pair.b.listen, &["--bandwidth", "8M"]);
        migration.until_sent(MIB);
        pair.b.ask(&["cancel"]).well();
        let ended = migration.wait();
        ended.aborted();
        assert_eq!(ended.done().get("cause").text(), "the destination: cancelled by the user");
        assert!(!pair.at_b().exists(), "what the attempt made is removed");
    }
    writer.until_more(20);
    pair.stayed(&writer.finish());
}

#[test]
fn a_guest_that_writes_at_the_destination_too_early_ends_the_attempt() {
    let mut pair = Pair::new(64 * MIB, 15, 60);
    let ledger = pair.ledger();
    let migration = pair.a.start_migrate(&pair.b.listen, &["--hold"]);
    migration.until_held();
    let refused = pair.b.try_write("vda", 0).expect_err("this host does not own the disk");
    assert!(refused.contains("EPERM"), "{refused}");
    let ended = migration.wait();
    ended.aborted();
    let cause = "the destination: a client of the destination's guest door wrote before the hand-over";
    assert_eq!(ended.done().get("cause").text(), cause);
    pair.stayed(&ledger);
}

#[test]
fn there_and_back_again_between_the_same_processes() {
    let mut pair = Pair::new(64 * MIB, 16, 50);
    let load = |seed| Load { rate: 2000, ..calm(seed) };
    let mut ledger = pair.ledger();
    for (turn, there) in [(0, true), (1, false), (2, true)] {
        let (from, to) = if there { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        let writer = Writer::start(load(turn), ledger, "vda", &[&from.door]);
        writer.until_more(200);
        let options: &[&str] = if turn == 0 { &[] } else { &["--overwrite"] };
        if turn > 0 {
            let refused = from.migrate(&to.listen, &[]);
            assert_eq!(refused.code, Some(1), "{refused:?}");
            assert!(
                refused
                    .stderr
                    .contains("is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)"),
                "{refused:?}"
            );
        }
        from.migrate(&to.listen, options).well();
        ledger = writer.finish();
        to.until_state("owner");
        assert_eq!(to.status().get("generation").number(), turn + 2);
        ledger.verify_door(to.open("vda").expect("served")).assert_whole();
    }
    pair.arrived(&ledger);
}

#[test]
fn a_newer_write_wins_over_an_older_one_that_nobody_has_read() {
    const SAME: u64 = 8 * MIB;
    let pair = Pair::new(64 * MIB, 17, 0);
    for round in 0..20_u8 {
        // A slow disk, and more pipelined writes than the server has read: each waits for the device.
        let mut old = pair.a.open("vda").expect("served");
        for cookie in 0..60 {
            let taken = old.submit_write(cookie, SAME, &[0xee; 512], true).expect("sent");
            assert_eq!(taken, blockferry::nbd::client::Submitted::Taken);
        }
        old.push().expect("sent");
        // The VMM reconnects; it does not say goodbye.
        drop(old);
        let mut new = pair.a.open("vda").expect("served");
        new.write_all(SAME, &[round + 1; 512]).expect("written");
        let mut bytes = [0; 512];
        throughout(Duration::from_millis(if round == 0 { 300 } else { 30 }), || {
            new.read_exact(SAME, &mut bytes).expect("read");
            assert!(bytes == [round + 1; 512], "an older write has come after a newer one: {}", bytes[0]);
        });
        new.disconnect();
    }
}

#[test]
fn the_last_sync_is_short_because_the_destination_writes_back_all_the_time() {
    const SIZE: u64 = 2 << 30;
    let folder = scratch();
    let free = rustix_free(folder.path());
    if free < 6 << 30 {
        eprintln!("SKIP: {free} bytes are free in {}, 6 GiB are needed", folder.path().display());
        return;
    }
    let ledger = Ledger::format(&folder.path().join("a.img"), SIZE, 18, 100);
    let a = Host::owner(folder.path(), "a", &[&file("vda", &folder.path().join("a.img"))]);
    let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
    let began = Instant::now();
    a.migrate(&b.listen, &[]).well();
    let took = began.elapsed();
    let log = a.log();
    let line = log.lines().find(|line| line.contains("sealed, the destination's last sync took")).expect("its line");
    let us: u64 = line.rsplit(' ').nth(1).and_then(|us| us.parse().ok()).expect("a number");
    eprintln!("2 GiB in {took:?}, the destination's last sync took {us} us");
    assert!(us < 2_000_000, "{line}");
    ledger.verify_file(&folder.path().join("b.img")).assert_whole();
}

fn rustix_free(path: &Path) -> u64 {
    blockferry::disk::free_space_beside(&path.join("x")).expect("a file system").map_or(u64::MAX, |(_, free)| free)
}

#[test]
fn a_guest_that_is_told_that_its_host_gave_the_disk_away_can_still_flush() {
    let pair = Pair::new(16 * MIB, 19, 50);
    let mut client = pair.a.open("vda").expect("served");
    client.write_all(0, &[1; 4096]).expect("written");
    pair.a.migrate(&pair.b.listen, &[]).well();
    let refused = client.write_all(0, &[2; 4096]).expect_err("given away");
    assert!(matches!(&refused, RequestError::Server(_, error) if error.errno == 108), "{refused}");
    client.flush().expect("nothing is left to flush, and a VMM that cannot flush cannot quit");
    client.disconnect();
}
