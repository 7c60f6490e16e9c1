//! The stream path: everything inside one connection, over TCP or through a command.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::faults::Scene;
use super::{MIB, Pair, allocated, assert_same, calm};
use crate::harness::until_within;
use crate::host::{Host, Migration, PATIENCE, Watch, blockferry, exactly_one_takes, executable};
use crate::json::Json;
use crate::relay::{Kind, Relay, Then, Trap, message};
use crate::writer::Writer;

const STREAM: [&str; 2] = ["--transport", "stream"];

/// What `migrate` is told so that it reaches `host` through `accept`.
fn through(host: &Host) -> String {
    format!("exec:{} accept g1 --control {}", executable().display(), host.control())
}

/// The same, run by a shell that leaves its number in a file of the pair's folder: that of `accept`.
fn through_shell(pair: &Pair) -> (String, PathBuf) {
    let number = pair.folder.path().join("n");
    let accept = format!("{} accept g1 --control {}", executable().display(), pair.b.control());
    (format!("exec:sh -c 'echo $$>{};exec {accept}'", number.display()), number)
}

/// Kills whoever has left its number there, once.
fn kill_by_file(number: &PathBuf) {
    let pid =
        until_within(PATIENCE, "a command's number", || std::fs::read_to_string(number).ok()?.trim().parse().ok());
    std::fs::remove_file(number).expect("it is there");
    let pid = rustix::process::Pid::from_raw(pid).expect("a number");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it lives");
}

/// The ways that were shown, one after the other.
fn transports(ended: &[Json]) -> Vec<String> {
    let progress = ended.iter().filter(|line| line.get("type").text() == "progress");
    let mut seen: Vec<String> = progress.map(|line| line.get("transport").text().to_owned()).collect();
    seen.dedup();
    seen
}

/// A door at which connections become `accept`s of the host; after `most` of them, who connects is hung up on.
fn relayed_door(host: &Host, most: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("tcp://{}", listener.local_addr().expect("its address"));
    let control = host.control().to_string();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
            if number >= most {
                continue;
            }
            let copy = || Stdio::from(OwnedFd::from(stream.try_clone().expect("a clone")));
            let mut accept = blockferry();
            accept.args(["accept", "g1", "--control", &control]).stdin(copy()).stdout(copy()).stderr(Stdio::null());
            let mut child = accept.spawn().expect("started");
            thread::spawn(move || child.wait());
        }
    });
    address
}

/// A door to the real one that lets `most` connections through.
fn narrow_door(host: &Host, most: usize) -> String {
    let relay = Relay::to(&host.listen);
    let address = relay.address.clone();
    relay.refuse_after(most);
    // It stays as long as the test.
    std::mem::forget(relay);
    address
}

#[test]
fn a_command_carries_everything_and_no_write_is_lost() {
    let mut pair = Pair::new(48 * MIB, 201, 60);
    let writer = Writer::start(calm(201), pair.ledger(), "vda", &[&pair.a.door]);
    writer.until_more(20);
    let watch = Watch::start(&pair.a, &pair.b);
    let options = ["--verify", "full", "--downtime-limit", "1000"];
    let ended = pair.a.start_migrate(&through(&pair.b), &options).wait();
    ended.well();
    let ledger = writer.finish();
    watch.finish();
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
    assert_eq!(transports(&ended.lines).last().map(String::as_str), Some("stream"));
    let shown = ended.lines.iter().find(|line| line.get("transport").text() == "stream").expect("shown");
    assert_eq!(shown.get("transport_cause").text(), "the command is one connection");
    let (done, size) = (ended.done(), 48 * MIB);
    assert_eq!((done.get("verify").text(), done.get("verified_bytes").number()), ("full", size));
    assert_eq!(done.get("destination").text(), through(&pair.b));
}

#[test]
fn a_sparse_disk_stays_sparse_and_an_older_copy_is_compared() {
    let mut pair = Pair::new(96 * MIB, 202, 20);
    let ledger = pair.ledger();
    let told = pair.a.migrate(&through(&pair.b), &["--keep-partial", "--verify", "written"]).well();
    let note =
        "g1: the disks travel inside the phase connection (stream), without NBD: the command is one connection\n";
    assert_eq!(told.matches(note).count(), 1, "{told}");
    assert_same(&pair.at_a(), &pair.at_b());
    assert!(allocated(&pair.at_b()) <= allocated(&pair.at_a()) + MIB);
    pair.arrived(&ledger);
    // And back, into what is there: only the one sector that was tried since may differ.
    let back = pair.b.start_migrate(&through(&pair.a), &["--copy-storage-inc"]).wait();
    back.well();
    assert!(back.done().get("sent_bytes").number() <= MIB, "{:?}", back.done());
    assert!(back.done().get("equal_bytes").number() >= 90 * MIB, "{:?}", back.done());
    assert_same(&pair.at_a(), &pair.at_b());
    exactly_one_takes("vda", 0, &pair.a, &pair.b);
}

#[test]
fn a_command_that_is_killed_in_the_middle_is_run_again() {
    let mut pair = Pair::new(48 * MIB, 203, 60);
    let (to, number) = through_shell(&pair);
    let writer = Writer::start(calm(203), pair.ledger(), "vda", &[&pair.a.door]);
    let watch = Watch::start(&pair.a, &pair.b);
    let migration = pair.a.start_migrate(&to, &["--bandwidth", "20M", "--downtime-limit", "1000"]);
    for _ in 0..2 {
        migration.until_turn("bytes sent", |line| {
            let sends = |disk: &Json| disk.get("sent_bytes").number() > 2 * MIB;
            line.get("type").text() == "progress" && line.get("disks").items().iter().any(sends)
        });
        kill_by_file(&number);
        until_within(PATIENCE, "the command again", || number.exists().then_some(()));
    }
    let _ = pair.a.ask(&["set", "--bandwidth", "0"]);
    migration.wait().well();
    let ledger = writer.finish();
    watch.finish();
    assert_eq!(pair.a.log().matches("(sh: killed by signal 9)").count(), 2, "and it is said what became of it");
    assert_same(&pair.at_a(), &pair.at_b());
    pair.arrived(&ledger);
}

#[test]
fn a_stream_that_is_cut_is_opened_again_and_fenced_before() {
    for (seed, trap) in [(204, None), (205, Some(message::FENCED))] {
        let scene = Scene::begin(seed, &[&STREAM[..], &["--bandwidth", "10M"]].concat());
        scene.relay.until_carried(4 * MIB);
        if let Some(message) = trap {
            scene.relay.set_trap(Trap { message, passes: false, then: Then::Cut });
        }
        assert!(scene.relay.cut_one(Some(Kind::Phases), 0));
        let (_, relay, _) = scene.arrives();
        assert!(!relay.cut_one(Some(Kind::Data), 0), "everything went through phase connections");
    }
}

#[test]
fn what_was_on_its_way_when_a_stream_was_cut_comes_too_late() {
    let scene = Scene::begin(206, &[&STREAM[..], &["--bandwidth", "20M"]].concat());
    scene.relay.until_carried(4 * MIB);
    scene.relay.hoard_kind(Kind::Phases);
    let before = scene.relay.accepted();
    until_within(PATIENCE, "hoarded blocks", || (scene.relay.hoarded() as u64 > MIB / 2).then_some(()));
    // The destination still has the old connection, and then gets what was in it.
    scene.relay.cut_hoarding_from_source();
    until_within(PATIENCE, "another connection", || (scene.relay.accepted() > before).then_some(()));
    scene.relay.until_carried(scene.relay.carried() + MIB);
    scene.relay.deliver_late();
    scene.arrives();
}

#[test]
fn a_hand_over_of_which_a_message_is_lost_is_finished() {
    for (seed, message, passes) in [
        (207, message::SEAL, false),
        (208, message::SEALED, false),
        (209, message::GO, false),
        (210, message::RUNNING, false),
    ] {
        let scene = Scene::begin(seed, &STREAM);
        scene.relay.set_trap(Trap { message, passes, then: Then::Cut });
        scene.arrives();
    }
}

#[test]
fn a_stream_is_cancelled_and_a_destination_that_is_killed_is_missed() {
    let scene = Scene::begin(211, &[&STREAM[..], &["--bandwidth", "4M"]].concat());
    scene.relay.until_carried(2 * MIB);
    let began = Instant::now();
    scene.pair.a.ask(&["cancel"]).well();
    let (pair, _, ledger) = scene.stays("cancelled by the user");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    pair.b.until_state("incoming");
    pair.stayed(&ledger);

    // Through a command, whose exit status says that nobody is at home.
    let mut pair = Pair::new(32 * MIB, 212, 60);
    let migration = pair.a.start_migrate(&through(&pair.b), &["--bandwidth", "2M"]);
    migration.until_sent(MIB);
    pair.b.program.kill();
    let line = migration.until_line("a lost destination", |line| *line.get("lost_ms") != Json::Null);
    assert!(line.get("lost_cause").text().contains("exit status 1"), "{line:?}");
    pair.a.ask(&["cancel"]).well();
    migration.wait().aborted();
    assert_eq!(pair.a.state(), "owner");
}

#[test]
fn a_slow_stream_keeps_its_phases_alive() {
    let scene = Scene::begin(213, &STREAM);
    // At this rate a whole window would take four seconds, and nothing in front of it may wait as long.
    scene.relay.throttle(MIB);
    scene.relay.until_carried(6 * MIB);
    scene.relay.throttle(64 * MIB);
    let (pair, _, _) = scene.arrives();
    assert!(!pair.a.log().contains("silent"), "no link was given up");
}

#[test]
fn a_door_that_takes_no_data_connections_is_told_from_one_that_should() {
    // It says so: the disks take the other way, and the user is told.
    let mut pair = Pair::new(16 * MIB, 214, 60);
    let ledger = pair.ledger();
    let door = relayed_door(&pair.b, 99);
    let refused = pair.a.migrate(&door, &["--transport", "nbd"]);
    refused.refused(
        1,
        &format!(
            "blockferry: migrate: g1: {door}: the destination can take no data connections; --transport stream sends \
             everything through this one; nothing has changed"
        ),
    );
    let told = pair.a.migrate(&door, &[]).well();
    let note = "(stream), without NBD: the destination can take no data connections\n";
    assert!(told.contains(note), "{told}");
    pair.arrived(&ledger);

    // It does not, and lets only one connection through: that is somebody's mistake, said before anything has changed.
    let mut pair = Pair::new(16 * MIB, 215, 60);
    let ledger = pair.ledger();
    let told = pair.a.migrate(&narrow_door(&pair.b, 1), &[]);
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.stderr.contains("the phases come through, data connections do not ("), "{told:?}");
    assert!(told.stderr.contains("--transport stream sends everything through it; nothing has changed"), "{told:?}");
    pair.stayed(&ledger);
    pair.a.migrate(&narrow_door(&pair.b, 1), &STREAM).well();
    assert_same(&pair.at_a(), &pair.at_b());
}

#[test]
fn a_command_that_leads_nowhere_is_explained() {
    let pair = Pair::new(8 * MIB, 216, 60);
    let missing = format!("exec:{} accept g1 --control unix:///no/such.sock", executable().display());
    for (to, cause) in [
        ("exec:/no/such/program", "/no/such/program: No such file or directory"),
        ("exec:false", "(false: exit status 1)"),
        ("exec:sh -c 'echo no route >&2; exit 255'", "(sh: exit status 255: no route)"),
        (missing.as_str(), "exit status 1: blockferry: accept: g1: nobody serves it on this host"),
    ] {
        let told = pair.a.migrate(to, &[]);
        assert_eq!(told.code, Some(1), "{told:?}");
        assert!(told.stderr.contains(cause) && told.stderr.contains("nothing has changed"), "{cause}: {told:?}");
    }
    let silent: Migration = pair.a.start_migrate("exec:sleep 60", &[]);
    silent.until_line("a beginning", |line| line.get("type").text() == "progress");
    pair.a.ask(&["cancel"]).well();
    assert_eq!(silent.wait().code, Some(1));
}
