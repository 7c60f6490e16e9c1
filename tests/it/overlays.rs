//! `migrate --copy-storage-inc --same-base`: overlays on one base, behind qemu-nbd that tells its layers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry::disk::{Access, Cache, Depths, Disk};
use blockferry::layers::Layers;
use blockferry::nbd::client::{Client, Wants};

use crate::backend::{Backend, qemu_img};
use crate::harness::{peer, scratch, until};
use crate::host::{Host, exactly_one_takes};
use crate::json::Json;
use crate::writer::{Dice, Ledger, Load, Mix, OnLoss, Writer};

const MIB: u64 = 1 << 20;
const REGION: u64 = REGION_BYTES as u64;
const REGION_BYTES: usize = 64 << 10;
const TELLS: &[&str] = &["--allocation-depth"];

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

/// Two overlays on bases, each behind its own qemu-nbd, and a host on either.
struct Pair {
    folder: tempfile::TempDir,
    of_a: Backend,
    of_b: Backend,
}

impl Pair {
    /// `None`: there is no qemu-nbd.
    fn new(make_bases: impl FnOnce(&Path, &Path), options: [&[&str]; 2]) -> Option<Self> {
        peer("qemu-nbd")?;
        let folder = scratch();
        let at = |name: &str| folder.path().join(name);
        make_bases(&at("a.base"), &at("b.base"));
        let [of_a, of_b] = [("a", options[0]), ("b", options[1])].map(|(name, options)| {
            let image = at(&format!("{name}.qcow2"));
            overlay(&at(&format!("{name}.base")), "raw", &image);
            Backend::start_with(&image, "qcow2", &at(&format!("{name}.sock")), options).expect("is there")
        });
        Some(Self { folder, of_a, of_b })
    }

    /// Two overlays on one base of `size` bytes that is data everywhere.
    fn on_one_base(size: u64, options: [&[&str]; 2]) -> Option<Self> {
        Self::new(
            |a, b| {
                noise(a, size);
                std::fs::hard_link(a, b).expect("linked");
            },
            options,
        )
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn hosts(&self) -> (Host, Host) {
        let disk = |backend: &Backend| format!("vda,file={}", backend.uri());
        let a = Host::owner(self.folder.path(), "a", &[&disk(&self.of_a)]);
        let b = Host::start(self.folder.path(), "b", &[&disk(&self.of_b)]);
        (a, b)
    }

    /// Both ends read the same, seen by qemu-img through their servers; nobody else uses them any more.
    fn assert_same(&self) {
        let [a, b] = [&self.of_a, &self.of_b].map(Backend::uri);
        qemu_img(&["compare", "-q", "-f", "raw", "-F", "raw", &a, &b]);
    }
}

fn overlay(base: &Path, format: &str, image: &Path) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(base), "-F", format, text(image)]);
}

/// A file of `size` bytes, whole regions, without a hole and without two sectors alike.
fn noise(path: &Path, size: u64) {
    let file = File::create(path).expect("an image");
    let mut dice = Dice::new(size);
    for at in (0..size).step_by(REGION_BYTES) {
        let mut bytes = vec![0; REGION_BYTES];
        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&dice.roll().to_le_bytes()[..chunk.len()]));
        file.write_all_at(&bytes, at).expect("written");
    }
}

/// A connection to an export behind whoever serves it.
fn directly(backend: &Backend) -> Client {
    let uri = blockferry::uri::NbdUri::parse(&backend.uri()).expect("a URI");
    let socket = uri.address.connect(crate::host::PATIENCE).expect("served");
    Client::connect(Arc::new(socket), &uri.export, Wants::default()).expect("opened")
}

/// Bytes that a process has asked the kernel for.
fn has_read(backend: &Backend) -> u64 {
    let told = std::fs::read_to_string(format!("/proc/{}/io", backend.program.id())).expect("its counters");
    let line = told.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("its reads");
    line.parse().expect("a number")
}

fn end(said: &str) -> Json {
    Json::parse(said.lines().last().expect("its end"))
}

#[test]
fn only_the_top_layer_travels_and_the_base_is_not_read() {
    let size = 256 * MIB;
    let Some(pair) = Pair::on_one_base(size, [TELLS; 2]) else { return };
    let (a, b) = pair.hosts();
    let mut guest = a.open("vda").expect("served");
    for offset in [0, 100 * MIB + 512, size - 512] {
        guest.write_all(offset, &[0x77; 512]).expect("written");
    }
    guest.write_zeroes(30 * MIB, 3 * REGION, true).expect("zeroed");
    guest.trim(40 * MIB, REGION).expect("trimmed");
    let before = [&pair.of_a, &pair.of_b].map(has_read);
    let migration = a.start_migrate(&b.listen, &["--copy-storage-inc", "--same-base", "--hold"]);
    // The guest goes on writing: below the top layer, at what is copied already, and at a sample.
    let mut dice = Dice::new(5);
    for round in 0..60 {
        let offset = dice.below(size / 512) * 512;
        guest.write_all(offset, &[round; 512]).expect("written");
    }
    migration.until_held();
    for round in 60..90 {
        let offset = dice.below(size / 512) * 512;
        guest.write_all(offset, &[round; 512]).expect("written");
    }
    drop(guest);
    a.ask(&["switch"]).well();
    let ended = migration.wait();
    ended.well();
    let read: Vec<u64> =
        [&pair.of_a, &pair.of_b].iter().zip(before).map(|(of, before)| has_read(of) - before).collect();
    let done = ended.done();
    let number = |key: &str| done.get(key).number();
    let (sent, based, unread) = (number("sent_bytes"), number("base_bytes"), number("unread_bytes"));
    println!("{sent} sent, {based} of the base, {unread} unread; the servers have read {read:?}");
    // A region for each write before it was compared, a granule for each later one.
    assert!(sent < 8 * MIB, "{sent} sent");
    assert!(
        based > 240 * MIB && unread <= based && unread > based - 90 * REGION,
        "{based} of the base, {unread} unread"
    );
    assert!(read.iter().all(|bytes| *bytes < 40 * MIB), "the servers have read {read:?} bytes");
    let held = pair.at("b.qcow2").metadata().expect("an image").len();
    assert!(held < 16 * MIB, "the overlay there holds {held} bytes");
    // The receipt tells, on both sides, for as long as there is one.
    for host in [&a, &b] {
        let status = host.ask(&["status"]).well();
        assert!(status.contains("taken as equal by --same-base and not read"), "{status}");
        assert_eq!(host.status().get("receipt").get("unread_bytes").number(), unread);
    }
    exactly_one_takes("vda", 0, &b, &a);
    // That write is not at A.
    let mut client = directly(&pair.of_a);
    client.write_all(0, &[0x5a; 512]).expect("written");
    drop((a, b, client));
    pair.assert_same();
}

#[test]
fn a_guest_that_writes_all_the_time_loses_nothing() {
    let size = 128 * MIB;
    let mut ledger = None;
    let bases = |a: &Path, b: &Path| {
        ledger = Some(Ledger::format(a, size, 91, 100));
        std::fs::copy(a, b).expect("copied");
    };
    let Some(pair) = Pair::new(bases, [TELLS; 2]) else { return };
    let (a, b) = pair.hosts();
    let load = Load { seed: 91, connections: 2, depth: 4, mix: Mix::ALL, rate: 150, on_loss: OnLoss::Stop };
    let writer = Writer::start(load, ledger.expect("a ledger"), "vda", &[&a.door]);
    writer.until_more(50);
    let ended = a.start_migrate(&b.listen, &["--copy-storage-inc", "--same-base"]).wait();
    let ledger = writer.finish();
    ended.well();
    assert!(ended.done().get("base_bytes").number() > 0, "{:?}", ended.done());
    ledger.verify_door(b.open("vda").expect("served")).assert_whole();
    drop((a, b));
    pair.assert_same();
}

#[test]
fn what_an_older_attempt_has_left_in_the_overlay_there_is_compared() {
    let size = 64 * MIB;
    for options in [&["--verify", "written"][..], &["--verify", "none"], &["--transport", "stream"]] {
        let Some(pair) = Pair::on_one_base(size, [TELLS; 2]) else { return };
        // Where the source's top layer has nothing, where it has something else, zeroes, and what is the base's anyway.
        let mut there = directly(&pair.of_b);
        there.write_all(10 * MIB + 4096, &[1; 512]).expect("written");
        there.write_all(20 * MIB, &[2; 4096]).expect("written");
        there.write_zeroes(30 * MIB, 2 * MIB, true).expect("zeroed");
        let mut same = vec![0; REGION_BYTES];
        File::open(pair.at("b.base")).expect("a base").read_exact_at(&mut same, 50 * MIB).expect("read");
        there.write_all(50 * MIB, &same).expect("written");
        there.flush().expect("flushed");
        drop(there);
        let (a, b) = pair.hosts();
        let mut guest = a.open("vda").expect("served");
        guest.write_all(20 * MIB + 1024, &[3; 4096]).expect("written");
        drop(guest);
        let options = [&["--copy-storage-inc", "--same-base", "--json"], options].concat();
        let done = end(&a.migrate(&b.listen, &options).well());
        let sent = done.get("sent_bytes").number();
        assert!((2 * MIB..4 * MIB).contains(&sent) && done.get("base_bytes").number() > 50 * MIB, "{done:?}");
        drop((a, b));
        pair.assert_same();
    }
}

#[test]
fn an_attempt_that_was_cancelled_leaves_nothing_that_the_next_one_believes() {
    let size = 64 * MIB;
    let Some(pair) = Pair::on_one_base(size, [TELLS; 2]) else { return };
    let (a, b) = pair.hosts();
    let mut guest = a.open("vda").expect("served");
    let mut dice = Dice::new(77);
    let places: Vec<u64> = (0..50).map(|_| dice.below(size / 4096) * 4096).collect();
    for at in &places {
        guest.write_all(*at, &[1; 4096]).expect("written");
    }
    let migration = a.start_migrate(&b.listen, &["--copy-storage-inc", "--same-base", "--hold", "--keep-partial"]);
    migration.until_held();
    a.ask(&["cancel"]).well();
    migration.wait().aborted();
    assert_eq!(a.state(), "owner");
    // What was sent is something else by now.
    for (number, at) in places.iter().enumerate() {
        match number % 3 {
            0 => guest.write_all(*at, &[2; 4096]).expect("written"),
            1 => guest.trim(*at, 4096).expect("trimmed"),
            _ => guest.write_zeroes(*at / REGION * REGION, REGION, true).expect("zeroed"),
        }
    }
    drop(guest);
    let options = ["--copy-storage-inc", "--same-base", "--verify", "none", "--json"];
    let done = end(&a.migrate(&b.listen, &options).well());
    assert!(done.get("base_bytes").number() > 50 * MIB, "{done:?}");
    drop((a, b));
    pair.assert_same();
}

#[test]
fn where_nobody_tells_the_layers_it_is_said_and_everything_is_compared() {
    let size = 64 * MIB;
    for (options, who) in
        [([&[], TELLS], "disk vda: its server does not"), ([TELLS, &[]], "the destination's disk: its")]
    {
        let Some(pair) = Pair::on_one_base(size, options) else { return };
        let (a, b) = pair.hosts();
        assert_eq!(a.try_write("vda", 5 * MIB), Ok(()));
        let said = a.migrate(&b.listen, &["--copy-storage-inc", "--same-base"]).well();
        assert!(said.contains("--same-base saves nothing, all of it is compared") && said.contains(who), "{said}");
        assert!(said.contains("63.9 MiB were there already") && !said.contains("not read"), "{said}");
        drop((a, b));
        pair.assert_same();
    }
    // Without the word nothing changes, whatever the servers tell.
    let Some(pair) = Pair::on_one_base(size, [TELLS; 2]) else { return };
    let (a, b) = pair.hosts();
    let done = end(&a.migrate(&b.listen, &["--copy-storage-inc", "--json"]).well());
    assert_eq!((done.get("equal_bytes").number(), done.get("base_bytes").number()), (size, 0));
    let usage = a.migrate(&b.listen, &["--same-base"]);
    assert_eq!(usage.code, Some(2), "{usage:?}");
    assert!(usage.stderr.contains("only with --copy-storage-inc"), "{usage:?}");
}

/// Two bases that differ in one byte of this region.
fn that_differ(region: u64) -> impl FnOnce(&Path, &Path) {
    move |a: &Path, b: &Path| {
        noise(a, 64 * MIB);
        std::fs::copy(a, b).expect("copied");
        let file = File::options().read(true).write(true).open(b).expect("a base");
        let mut byte = [0];
        file.read_exact_at(&mut byte, region * REGION + 7).expect("read");
        file.write_all_at(&[byte[0] ^ 0x40], region * REGION + 7).expect("written");
    }
}

#[test]
fn a_base_that_differs_is_found_by_verify_full_and_otherwise_the_receipt_says_what_nobody_has_read() {
    // No sample is there: they are the first of all regions, and each 16th after it.
    let Some(pair) = Pair::new(that_differ(21), [TELLS; 2]) else { return };
    let (a, b) = pair.hosts();
    let ended = a.start_migrate(&b.listen, &["--copy-storage-inc", "--same-base", "--verify", "full"]).wait();
    ended.aborted();
    let cause = "disk vda, 65536 bytes at 1376256: the destination holds something else than here, and was";
    assert!(ended.stderr.contains(cause), "{}", ended.stderr);
    assert_eq!((a.state().as_str(), a.try_write("vda", 0)), ("owner", Ok(())));
    // Without the word it is compared, and put right.
    let moved = a.migrate(&b.listen, &["--copy-storage-inc", "--verify", "full", "--json"]).well();
    assert!(end(&moved).get("sent_bytes").number() >= REGION);
    assert_eq!(end(&moved).get("unread_bytes").number(), 0);
    drop((a, b));
    pair.assert_same();

    for verify in ["written", "none"] {
        let Some(pair) = Pair::new(that_differ(21), [TELLS; 2]) else { return };
        let (a, b) = pair.hosts();
        let said = a.migrate(&b.listen, &["--copy-storage-inc", "--same-base", "--verify", verify]).well();
        assert!(said.contains("60.0 MiB taken as equal by --same-base and not read"), "{said}");
        // B keeps its receipt when it has answered: the guest does not wait for that.
        let kept = "60.0 MiB taken as equal by --same-base and not read";
        until("the receipt", || b.ask(&["who-owns"]).well().contains(kept).then_some(()));
    }
}

#[test]
fn a_base_that_differs_at_a_sample_or_beside_what_the_guest_writes_ends_the_migration() {
    for (region, write, cause) in [
        (32, None, "compare: disk vda, 65536 bytes at 2097152: both sides have it from their bases"),
        (
            21,
            Some(21 * REGION + 8192),
            "verify: disk vda, 65536 bytes at 1376256: the destination holds something else",
        ),
    ] {
        let Some(pair) = Pair::new(that_differ(region), [TELLS; 2]) else { return };
        let (a, b) = pair.hosts();
        let migration = a.start_migrate(&b.listen, &["--copy-storage-inc", "--same-base", "--hold"]);
        if let Some(offset) = write {
            migration.until_held();
            assert_eq!(a.try_write("vda", offset), Ok(()));
        }
        let ended = migration.wait();
        ended.aborted();
        assert!(ended.stderr.contains(cause) && ended.stderr.contains("(--same-base)"), "{}", ended.stderr);
        assert!(b.log().contains("(--same-base)"), "the destination's user is told, too: {}", b.log());
        assert_eq!((a.state().as_str(), b.state().as_str()), ("owner", "incoming"));
    }
}

#[test]
fn a_source_with_a_layer_more_is_not_believed_to_be_on_the_same_base() {
    let Some(pair) = Pair::on_one_base(64 * MIB, [TELLS; 2]) else { return };
    let mut before = directly(&pair.of_a);
    before.write_all(7 * MIB, &[9; 4096]).expect("written");
    before.flush().expect("flushed");
    drop(before);
    // What the guest wrote is below the top layer now.
    let Pair { folder, mut of_a, of_b } = pair;
    of_a.program.kill();
    let at = |name: &str| folder.path().join(name);
    overlay(&at("a.qcow2"), "qcow2", &at("a2.qcow2"));
    let of_a = Backend::start_with(&at("a2.qcow2"), "qcow2", &at("a.sock"), TELLS).expect("is there");
    let pair = Pair { folder, of_a, of_b };
    let (a, b) = pair.hosts();
    let said = a.migrate(&b.listen, &["--copy-storage-inc", "--same-base"]).well();
    assert!(said.contains("the chains differ: the source's is 3 deep, the destination's 2"), "{said}");
    drop((a, b));
    pair.assert_same();
}

#[test]
fn the_same_holds_to_a_plain_server() {
    let Some(pair) = Pair::on_one_base(128 * MIB, [TELLS; 2]) else { return };
    let mut there = directly(&pair.of_b);
    there.write_all(10 * MIB + 4096, &[1; 512]).expect("written");
    drop(there);
    let a = Host::owner(pair.folder.path(), "a", &[&format!("vda,file={}", pair.of_a.uri())]);
    assert_eq!(a.try_write("vda", 77 * MIB), Ok(()));
    let before = [&pair.of_a, &pair.of_b].map(has_read);
    let options = ["--plain", "--copy-storage-inc", "--same-base", "--json"];
    let done = end(&a.migrate(&pair.of_b.uri(), &options).well());
    for (backend, before) in [&pair.of_a, &pair.of_b].iter().zip(before) {
        let read = has_read(backend) - before;
        assert!(read < 20 * MIB, "{read} bytes were read");
    }
    assert!(done.get("unread_bytes").number() > 120 * MIB, "{done:?}");
    drop(a);
    pair.assert_same();
}

#[test]
fn an_answer_of_two_servers_counts_for_nothing() {
    let Some(mut pair) = Pair::on_one_base(256 * MIB, [TELLS; 2]) else { return };
    let disk = Disk::open(Path::new(&pair.of_a.uri()), Access::ReadWrite, Cache::Writeback).expect("served");
    let whole = disk.depths(0, disk.size(), &mut |_, _, depth| assert_eq!(depth, 2)).expect("told");
    assert_eq!(whole, Depths::Told);
    let (path, socket) = (pair.at("a2.qcow2"), pair.at("a.sock"));
    overlay(&pair.at("a.qcow2"), "qcow2", &path);
    let mut again = None;
    let mut seen = Vec::new();
    let told = disk.depths(0, disk.size(), &mut |offset, _, depth| {
        seen.push((offset, depth));
        // In the middle of it, with nothing unflushed: another chain.
        if again.is_none() {
            pair.of_a.program.kill();
            again = Backend::start_with(&path, "qcow2", &socket, TELLS);
        }
    });
    assert_eq!(told.expect("told"), Depths::Interrupted, "{seen:?}");
    assert_eq!(seen.iter().map(|(_, depth)| *depth).max(), Some(3), "{seen:?}");
    assert_eq!(Layers::of(&disk).expect("told").deepest(), 3);
    // Started anew without the option, it tells nothing.
    again.take().expect("started").program.kill();
    let _mute = Backend::start(&path, "qcow2", &socket);
    let cause = Layers::of(&disk).expect_err("mute");
    assert!(cause.contains("does not tell its layers (qemu-nbd does with --allocation-depth)"), "{cause}");
}
