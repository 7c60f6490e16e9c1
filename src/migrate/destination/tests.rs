//! What a destination answers when things happen in the wrong order, twice, or by the wrong hand.

mod left;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use super::*;
use crate::disk::{Cache, Disk};
use crate::domain;
use crate::domain::Stays;
use crate::export::{Export, Fault, Patience, Visit, quiesce};
use crate::migrate::wire::{DiskOffer, Mode, Prepare, Prepared, StayingDisk, Token, Verify, export_name};
use crate::nbd::handshake::OpenError;
use crate::options::ServeOptions;
use crate::ownership::{Host, Lineage, Order, Why, Word};

struct Bench {
    dir: tempfile::TempDir,
    guest: Arc<Guest>,
}

const SOURCE: Host = Host([7; 16]);

impl Bench {
    /// A destination with one disk of 1 MiB, there already or made at PREPARE.
    fn new(exists: bool) -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        if exists {
            drop(Disk::create(&dir.path().join("vda"), 1 << 20, Cache::Writeback).expect("created"));
        }
        let guest = Self::open_guest(dir.path(), &["vda"], true);
        Self { dir, guest }
    }

    fn open_guest(dir: &std::path::Path, disks: &[&str], volatile_state: bool) -> Arc<Guest> {
        let disk = |name: &&str| domain::Disk::parse(&format!("{name},file={}", dir.join(name).display()));
        let disks = disks.iter().map(|name| disk(name).expect("parsed")).collect();
        let options = ServeOptions::in_directory(dir, disks, volatile_state);
        Arc::new(Guest::open(&options, None).expect("opened"))
    }

    fn export(&self) -> Arc<Export> {
        Arc::clone(self.guest.exports().next().expect("one"))
    }

    fn stamp(&self, attempt: u8) -> Stamp {
        Stamp {
            lineage: Lineage([9; 16]),
            word: Word([8; 16]),
            attempt: Attempt([attempt; 16]),
            source: SOURCE,
            destination: self.guest.host,
            order: Order { term: 1, generation: 2 },
        }
    }

    fn say(&self, message: Message) -> Message {
        let mut theirs = hello(&self.guest, Role::Source, Challenge([2; 16]), &pair().0, false);
        theirs.host = SOURCE;
        let mut session =
            Session { theirs, challenge: Some(Challenge([1; 16])), stamp: None, asker: Asker::next(), hasher: None };
        self.guest.destination.answer(&self.guest, &mut session, message).expect("no end").expect("an answer")
    }

    fn prepare(&self, attempt: u8) -> Message {
        self.say(Message::Prepare(self.offer(attempt, &[("vda", 1 << 20)])))
    }

    fn offer(&self, attempt: u8, disks: &[(&str, u64)]) -> Prepare {
        let offer = |&(name, size_bytes): &(&str, u64)| DiskOffer {
            name: cut(name),
            size_bytes,
            data_bytes: 0,
            granularity_bytes: 4096,
        };
        Prepare {
            stamp: self.stamp(attempt),
            challenge: Challenge([1; 16]),
            mode: Mode::CopyAll,
            disks: disks.iter().map(offer).collect(),
            connections: 0,
            verify: Verify::None,
            keep_partial: false,
            state: false,
            staying: heapless::Vec::new(),
            heedless: false,
        }
    }

    fn prepared(&self, attempt: u8) -> Prepared {
        match self.prepare(attempt) {
            Message::Prepared(prepared) => prepared,
            other => panic!("{other:?}"),
        }
    }

    fn open(&self, prepared: &Prepared) -> Result<(Visit, UnixStream), OpenError> {
        let name = export_name(prepared.stamp.attempt, prepared.instance, prepared.epoch, prepared.token, "vda");
        let (ours, theirs) = pair();
        self.guest.destination.open(&self.guest, &name, &ours).map(|(_, visit)| (visit, theirs))
    }

    fn seal(&self, attempt: u8) -> Message {
        self.say(Message::Seal { stamp: self.stamp(attempt), digests: heapless::Vec::new(), unread_bytes: 0 })
    }

    fn abort(&self, attempt: u8) -> Message {
        self.say(Message::Abort { stamp: self.stamp(attempt), cause: cut("a test"), keep: false })
    }

    fn claim(&self) -> Result<Answer, KeepError> {
        let (lineage, word) = (Lineage([9; 16]), Word([8; 16]));
        self.guest.apply(&Event::Claim { lineage, word, images: Images::NONE, discard: false })
    }
}

fn pair() -> (Arc<Socket>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    (Arc::new(Socket::new(OwnedFd::from(ours))), theirs)
}

/// Drops a visit as its connection's thread would, as soon as it is ended.
fn leave_when_ended(visit: Visit) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let began = Instant::now();
        while !visit.is_ended() && began.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
    })
}

#[test]
fn every_disk_that_stays_is_looked_for_before_anything_is_touched() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let disks = ["vda,file=@", "vdb,external", "vdc", "vdd,file=@,ro", "vde,file=@,shared"];
    for name in ["vdd", "vde"] {
        drop(Disk::create(&dir.path().join(name), 1 << 20, Cache::Writeback).expect("created"));
    }
    let disk = |text: &&str| {
        let name = text.split(',').next().expect("a name");
        domain::Disk::parse(&text.replace('@', &dir.path().join(name).display().to_string())).expect("parsed")
    };
    let options = ServeOptions::in_directory(dir.path(), disks.iter().map(disk).collect(), true);
    let bench = Bench { guest: Arc::new(Guest::open(&options, None).expect("opened")), dir };
    let stays = |name: &str, why, size_bytes| StayingDisk { name: cut(name), why, size_bytes };
    let ask = |staying: &[StayingDisk], heedless| {
        let staying = staying.iter().cloned().collect();
        bench.say(Message::Prepare(Prepare { staying, heedless, ..bench.offer(1, &[("vda", 1 << 20)]) }))
    };
    let missing = [
        stays("vdb", Stays::External, None),
        stays("vdc", Stays::Shared, Some(1 << 20)),
        stays("vdd", Stays::ReadOnly, Some(1 << 21)),
        stays("vde", Stays::NotChosen, Some(1 << 20)),
        stays("vdf", Stays::External, None),
        stays("sr0", Stays::Empty, None),
        stays("vda", Stays::NotChosen, None),
    ];
    let Message::Refused { problems, .. } = ask(&missing, false) else { panic!("not refused") };
    let said: Vec<_> = problems.iter().map(|problem| format!("{}: {}", problem.disk, problem.cause)).collect();
    assert_eq!(
        said,
        [
            "vdc: stays (shared) and has no source at the destination",
            "vdd: stays (read-only) and has 1048576 bytes at the destination and 2097152 at the source",
            "vdf: stays (external) and the destination has no disk of this name",
            "vda: is said to move and to stay",
        ]
    );
    assert!(!bench.dir.path().join("vda").exists(), "nothing is made for a PREPARE that is refused");
    std::fs::File::options().write(true).open(bench.dir.path().join("vde")).and_then(|f| f.set_len(512)).expect("cut");
    let Message::Refused { problems, .. } = ask(&missing[3..4], false) else { panic!("not refused") };
    assert!(problems[0].cause.ends_with("its file has become shorter: 512 bytes of 1048576"), "{problems:?}");
    assert!(matches!(ask(&missing[..6], true), Message::Prepared(_)), "--unsafe");
}

#[test]
fn d4_a_fence_ends_the_epoch_and_its_names() {
    let bench = Bench::new(true);
    let prepared = bench.prepared(1);
    let (visit, _client) = bench.open(&prepared).expect("a current name");
    let leaving = leave_when_ended(visit);
    let fence = || bench.say(Message::Fence { stamp: bench.stamp(1), epoch: Epoch(0) });
    assert!(matches!(fence(), Message::Fenced { epoch: Epoch(1), .. }));
    assert_eq!(bench.export().connections(Door::Migration), 0, "FENCED: nobody is left");
    leaving.join().expect("no panic");
    assert!(matches!(bench.open(&prepared), Err(OpenError::Unknown)), "the name is over");
    assert!(matches!(fence(), Message::Fenced { epoch: Epoch(1), .. }), "said twice, answered twice");
    assert!(bench.open(&Prepared { epoch: Epoch(1), ..prepared }).is_ok());
}

#[test]
fn d4_no_attempt_is_prepared_while_an_old_writer_lives() {
    let bench = Bench::new(true);
    let prepared = bench.prepared(1);
    let (visit, _client) = bench.open(&prepared).expect("a current name");
    let export = bench.export();
    thread::scope(|scope| {
        let second = scope.spawn(|| bench.prepare(2));
        while !visit.is_ended() {
            thread::yield_now();
        }
        assert!(!second.is_finished(), "it waits for the writer of the first");
        assert_eq!(export.connections(Door::Migration), 1);
        drop(visit);
        assert!(matches!(second.join().expect("no panic"), Message::Prepared(_)));
    });
}

#[test]
fn a_name_counts_for_its_attempt_instance_and_token_only() {
    let bench = Bench::new(true);
    let prepared = bench.prepared(1);
    let wrong = [
        Prepared { token: Token::from_bytes([0; 16]), ..prepared.clone() },
        Prepared { instance: crate::ownership::Instance([0; 16]), ..prepared.clone() },
        Prepared { epoch: Epoch(1), ..prepared.clone() },
        Prepared { stamp: bench.stamp(2), ..prepared },
    ];
    for prepared in wrong {
        assert!(matches!(bench.open(&prepared), Err(OpenError::Unknown)));
    }
}

#[test]
fn an_event_that_changes_nothing_moves_no_gate() {
    let bench = Bench::new(true);
    bench.claim().expect("the first owner");
    let quiesced = quiesce(&[bench.export()], Instant::now() + Duration::from_secs(5)).expect("quiet");
    assert!(bench.claim().is_err(), "claimed once");
    let stray = Message::Go { stamp: bench.stamp(9) };
    assert!(matches!(bench.say(stray), Message::Record { .. }));
    assert!(quiesced.holds(), "a stray message has opened the gate of a switchover");
}

#[test]
fn a_guest_connection_does_not_outlive_its_disk() {
    let bench = Bench::new(false);
    bench.prepared(1);
    let export = bench.export();
    let (ours, _vmm) = pair();
    let visit = export.enter(Door::Guest, &ours).expect("let in");
    let leaving = leave_when_ended(visit);
    assert!(matches!(bench.abort(1), Message::Unsealed { .. }));
    leaving.join().expect("no panic");
    assert!(!bench.dir.path().join("vda").exists(), "what the attempt made is removed");
    let (ours, _vmm) = pair();
    assert!(export.enter(Door::Guest, &ours).is_err(), "there is no disk");
    bench.prepared(2);
    assert!(export.enter(Door::Guest, &ours).is_ok());
}

#[test]
fn a_disk_taken_away_refuses_whoever_still_holds_it() {
    let bench = Bench::new(true);
    let export = bench.export();
    bench.claim().expect("the first owner");
    let (ours, _vmm) = pair();
    let visit = export.enter(Door::Guest, &ours).expect("let in");
    let other = Disk::create(&bench.dir.path().join("other"), 1 << 20, Cache::Writeback).expect("created");
    export.set_disk(Arc::new(other));
    assert!(matches!(visit.write(Patience::Now, 0, &[5; 512], true), Err(Fault::Gone)));
    assert!(matches!(visit.read(&mut [0; 512], 0), Err(Fault::Gone)));
}

#[test]
fn a_stale_abort_cuts_nobody_off() {
    let bench = Bench::new(true);
    bench.prepared(1);
    let (ours, _vmm) = pair();
    let visit = bench.export().enter(Door::Guest, &ours).expect("let in");
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
    assert!(matches!(bench.abort(99), Message::Unsealed { .. }), "that one was never sealed here");
    assert!(!visit.is_ended(), "the VMM of the sealed attempt has lost its disk");
    assert!(matches!(bench.say(Message::Go { stamp: bench.stamp(1) }), Message::Running { .. }));
}

#[test]
fn m6_an_aborted_attempt_never_seals_again() {
    let bench = Bench::new(true);
    bench.prepared(1);
    assert!(matches!(bench.abort(1), Message::Unsealed { .. }));
    assert!(matches!(bench.seal(1), Message::Unsealed { .. }));
    assert!(matches!(bench.prepare(1), Message::Refused { .. }), "nor is it prepared again");
    assert!(matches!(bench.prepare(2), Message::Prepared(_)));
}

#[test]
fn m2_sealed_waits_for_its_own_go() {
    let bench = Bench::new(true);
    bench.prepared(1);
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
    assert!(matches!(bench.seal(1), Message::Sealed { .. }), "said twice, answered twice");
    assert!(bench.guest.destination.cancel(&bench.guest, "a test").is_err(), "only the source ends it");
    assert!(matches!(bench.prepare(2), Message::Refused { .. }), "M9");
    let fence = Message::Fence { stamp: bench.stamp(1), epoch: Epoch(0) };
    assert!(matches!(bench.say(fence), Message::Record { .. }));
    assert_eq!(bench.export().gate(), Gate::Sealed);
    for _ in 0..2 {
        assert!(matches!(bench.say(Message::Go { stamp: bench.stamp(1) }), Message::Running { .. }));
    }
    assert_eq!(bench.export().gate(), Gate::Serving);
    assert!(matches!(bench.abort(1), Message::Record { .. }), "too late");
}

#[test]
fn m11_a_guest_write_before_the_hand_over_ends_the_attempt() {
    let bench = Bench::new(true);
    bench.prepared(1);
    let (ours, _vmm) = pair();
    let visit = bench.export().enter(Door::Guest, &ours).expect("let in");
    assert!(matches!(visit.write(Patience::Now, 0, &[5; 512], false), Err(Fault::NotPermitted)));
    let left = leave_when_ended(visit);
    assert!(matches!(bench.seal(1), Message::Failed { .. }));
    left.join().expect("it was ended");
    assert_eq!(bench.export().gate(), Gate::Incoming);
}

#[test]
fn a_file_that_was_removed_while_it_was_received_is_not_sealed() {
    let bench = Bench::new(true);
    bench.prepared(1);
    std::fs::remove_file(bench.dir.path().join("vda")).expect("it was made");
    let Message::Failed { cause, .. } = bench.seal(1) else { panic!("sealed") };
    assert!(cause.contains("its file was removed or replaced while it was received"), "{cause}");
    assert_eq!(bench.export().gate(), Gate::Incoming);
}

#[test]
fn d9_what_is_compared_is_what_the_medium_has() {
    let bench = Bench::new(true);
    let path = bench.dir.path().join("vda");
    std::fs::write(&path, vec![1; 1 << 20]).expect("written");
    let offer = Prepare { mode: Mode::Incremental, ..bench.offer(1, &[("vda", 1 << 20)]) };
    let Message::Prepared(prepared) = bench.say(Message::Prepare(offer)) else { panic!("not prepared") };
    assert!(prepared.disks[0].compare);
    if let Some(left) = crate::disk::tests::cached(&path) {
        assert_eq!(left, 0, "a process before this one may have failed to write it back");
    }
}

#[test]
fn a_word_counts_only_for_the_record_that_it_was_spoken_to() {
    let bench = Bench::new(true);
    bench.prepared(1);
    let before = bench.guest.record().expect("known");
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
    let event = Event::AbortReceiving { attempt: Attempt([1; 16]) };
    let refused = bench.guest.apply_if(&event, &before);
    assert!(matches!(refused, Err(KeepError::Refused(refusal)) if refusal.why == Why::PeerDecides));
}

#[test]
fn whoever_does_not_know_the_attempt_does_not_learn_it() {
    let bench = Bench::new(true);
    bench.prepared(1);
    bench.seal(1);
    let asked = Stamp { lineage: Lineage([5; 16]), ..bench.stamp(77) };
    let Message::Record { record: Some(summary), .. } = bench.say(Message::Question { stamp: asked }) else {
        panic!("a record");
    };
    assert_eq!((summary.attempt, summary.peer), (Attempt::NONE, None));
    let Message::Record { record: Some(summary), .. } = bench.say(Message::Question { stamp: bench.stamp(1) }) else {
        panic!("a record");
    };
    assert_eq!(summary.attempt, Attempt([1; 16]));
}

#[test]
fn digests_are_told_to_who_sends_this_attempt_and_only_while_it_is_received() {
    let bench = Bench::new(true);
    let prepared = bench.prepared(1);
    let digest = |attempt| Message::Digest { stamp: bench.stamp(attempt), disk: 0, offset_bytes: 0, regions: 16 };
    let Message::Digests { stamp, disk: 0, offset_bytes: 0, digests } = bench.say(digest(1)) else { panic!("none") };
    assert!(stamp.matches(&prepared.stamp));
    assert_eq!(digests.len(), 16);
    let zeroes = *blake3::hash(&[0; 65536]).as_bytes();
    assert!(digests.iter().all(|digest| *digest == zeroes));
    assert!(matches!(bench.say(digest(2)), Message::Record { .. }), "another attempt");
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
    assert!(matches!(bench.say(digest(1)), Message::Record { .. }), "sealed: nobody asks any more");
}

#[test]
fn a_disk_that_cannot_be_hashed_ends_the_attempt_and_names_the_region() {
    let bench = Bench::new(true);
    bench.prepared(1);
    let path = bench.dir.path().join("vda");
    let export = bench.export();
    // Data, so that it is read, and then gone from under the export.
    std::fs::write(&path, vec![1; 1 << 20]).expect("written");
    std::fs::OpenOptions::new().write(true).open(&path).expect("there").set_len((1 << 16) + 512).expect("cut");
    let digest = Message::Digest { stamp: bench.stamp(1), disk: 0, offset_bytes: 1 << 16, regions: 1 };
    match bench.say(digest) {
        Message::Failed { cause, region: Some(region), .. } => {
            assert!(cause.starts_with("read: disk vda, 65536 bytes at 65536: "), "{cause}");
            assert_eq!((region.offset_bytes, region.length_bytes), (65536, 65536));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(export.gate(), Gate::Incoming);
    assert!(matches!(bench.seal(1), Message::Failed { .. }));
}
