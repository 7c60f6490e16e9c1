//! What an attempt leaves behind, after each way in which it can end.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::*;
use crate::ownership::How;

const SIZE: u64 = 1 << 20;

impl Bench {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same guest in a new process.
    fn restart(&mut self, disks: &[&str], volatile_state: bool) {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let exports: Vec<_> = self.guest.exports().map(Arc::downgrade).collect();
        // Its locks go with the old one, and the old one with its last thread.
        self.guest.exports().for_each(|export| export.set_gate(Gate::Incoming));
        self.guest = Self::open_guest(dir.path(), &[], true);
        let began = Instant::now();
        while exports.iter().any(|export| export.upgrade().is_some()) {
            assert!(began.elapsed() < Duration::from_secs(5), "somebody still has a disk");
            thread::yield_now();
        }
        self.guest = Self::open_guest(self.dir.path(), disks, volatile_state);
    }

    fn send(&self, offer: Prepare) -> Result<Prepared, Vec<String>> {
        match self.say(Message::Prepare(offer)) {
            Message::Prepared(prepared) => Ok(prepared),
            Message::Refused { problems, .. } => {
                Err(problems.iter().map(|problem| format!("{}: {}", problem.disk, problem.cause)).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    /// Prepares, and says what the source is told of its only disk: reads as zero, compare.
    fn told(&self, offer: Prepare) -> (bool, bool) {
        let ready = self.send(offer).expect("prepared").disks[0];
        (ready.reads_as_zero, ready.compare)
    }

    fn one(&self, attempt: u8) -> Prepare {
        self.offer(attempt, &[("vda", SIZE)])
    }

    fn end(&self, attempt: u8, keep: bool) {
        let abort = Message::Abort { stamp: self.stamp(attempt), cause: cut("a test"), keep };
        assert!(matches!(self.say(abort), Message::Unsealed { .. }));
    }

    fn state(&self, names: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at("state")).expect("a directory").map(|entry| entry.expect("an entry"));
        let names: Vec<_> = entries
            .filter_map(|entry| entry.file_name().into_string().ok().filter(|name| name.starts_with(names)))
            .collect();
        names
    }

    fn how(&self, disk: &str) -> Option<How> {
        self.guest.journal()?.entry(disk).filter(|entry| entry.image.is_some()).map(|entry| entry.how)
    }
}

/// As a migration would.
fn write(path: &Path) {
    fs::File::options().write(true).open(path).expect("opened").write_all_at(&[7; 4096], 8192).expect("written");
}

/// What nobody may touch.
fn foreign(path: &Path) {
    fs::write(path, vec![9; usize::try_from(SIZE).expect("small")]).expect("written");
}

fn is_foreign(path: &Path) -> bool {
    fs::read(path).expect("still there").iter().all(|byte| *byte == 9)
}

#[test]
fn a_cancelled_attempt_removes_what_it_made_and_nothing_else() {
    let bench = Bench::new(false);
    assert_eq!(bench.told(bench.one(1)), (true, false));
    assert_eq!(bench.how("vda"), Some(How::Created));
    write(&bench.at("vda"));
    bench.end(1, false);
    assert!(!bench.at("vda").exists() && bench.guest.journal().is_none());

    // Found, so it stays; it is ours all the same, and no user has to say --overwrite again.
    let bench = Bench::new(true);
    assert_eq!(bench.told(bench.one(1)), (true, false));
    write(&bench.at("vda"));
    bench.end(1, false);
    assert_eq!((bench.at("vda").exists(), bench.how("vda")), (true, Some(How::Empty)));
    assert_eq!(bench.told(bench.one(2)), (false, true));
    assert_eq!(fs::read(bench.at("vda")).expect("read")[8192], 7, "what was sent is not thrown away");
}

#[test]
fn what_was_received_stays_when_a_connection_was_lost_or_the_user_wants_it() {
    for (lost, keep_partial) in [(true, false), (false, true)] {
        let bench = Bench::new(false);
        bench.send(Prepare { keep_partial, ..bench.one(1) }).expect("prepared");
        write(&bench.at("vda"));
        bench.end(1, lost);
        assert_eq!(bench.told(Prepare { keep_partial, ..bench.one(2) }), (false, true));
        assert_eq!(fs::read(bench.at("vda")).expect("read")[8192], 7, "what was sent is not thrown away");
        // A new attempt before the old one has ended: its source has been restarted.
        assert_eq!(bench.told(bench.one(3)), (false, true));
        assert_eq!(bench.how("vda"), Some(How::Created));
        bench.guest.destination.cancel(&bench.guest, "a test").expect("receiving");
        assert!(!bench.at("vda").exists(), "who goes on from it takes it over");
    }
}

#[test]
fn another_file_in_the_place_of_what_was_made_is_left_alone() {
    let bench = Bench::new(false);
    bench.prepared(1);
    fs::rename(bench.at("vda"), bench.at("moved")).expect("moved");
    foreign(&bench.at("vda"));
    bench.end(1, false);
    assert!(is_foreign(&bench.at("vda")) && bench.at("moved").exists());
    let refused = bench.send(bench.one(2)).expect_err("not ours");
    assert_eq!(
        refused,
        [format!(
            "vda: {} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)",
            bench.at("vda").display()
        )]
    );
    assert!(is_foreign(&bench.at("vda")));
}

#[test]
fn an_attempt_that_cannot_make_all_its_files_leaves_none_and_no_list() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let guest = Bench::open_guest(dir.path(), &["vda", "vdb"], false);
    let bench = Bench { dir, guest };
    // No file system takes a file of that size, and it says so only when it is made.
    let refused = bench.send(bench.offer(1, &[("vda", SIZE), ("vdb", (1 << 63) - 512)])).expect_err("no room");
    assert!(refused.len() == 1 && refused[0].starts_with("vdb: cannot create "), "{refused:?}");
    assert!(!bench.at("vda").exists() && !bench.at("vdb").exists());
    assert!(bench.guest.journal().is_none() && bench.state("journal").is_empty(), "{:?}", bench.state(""));
    bench.send(bench.offer(2, &[("vda", SIZE), ("vdb", SIZE)])).expect("prepared");
}

#[test]
fn a_refusal_takes_nothing_from_what_an_earlier_attempt_has_left() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let guest = Bench::open_guest(dir.path(), &["vda", "vdb"], false);
    let bench = Bench { dir, guest };
    bench.prepared(1);
    write(&bench.at("vda"));
    bench.end(1, true);
    // Refused at once, and after its record was made.
    bench.send(bench.offer(2, &[("vda", SIZE), ("vdx", SIZE)])).expect_err("no such disk");
    bench.send(bench.offer(3, &[("vda", SIZE), ("vdb", (1 << 63) - 512)])).expect_err("no room");
    assert!(!bench.at("vdb").exists());
    assert_eq!(bench.state("journal"), ["journal"], "M4: nothing that was written ahead outlives its attempt");
    assert_eq!(bench.told(bench.one(4)), (false, true));
    // A disk that an attempt does not offer is not its business.
    bench.end(4, true);
    bench.send(bench.offer(5, &[("vdb", SIZE)])).expect("prepared");
    bench.end(5, false);
    assert_eq!((bench.at("vda").exists(), bench.at("vdb").exists()), (true, false));
    assert_eq!(bench.told(bench.one(6)), (false, true));
}

#[test]
fn a_refused_prepare_ends_nothing_that_is_received() {
    let bench = Bench::new(true);
    let prepared = bench.prepared(1);
    bench.send(bench.offer(2, &[("vdx", SIZE)])).expect_err("no such disk");
    assert!(bench.open(&prepared).is_ok(), "its names still count");
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
}

#[test]
fn m2_what_was_sealed_is_removed_by_nobody_and_may_be_compared() {
    let mut bench = Bench::new(false);
    bench.restart(&["vda"], false);
    bench.prepared(1);
    write(&bench.at("vda"));
    assert!(matches!(bench.seal(1), Message::Sealed { .. }));
    assert_eq!(bench.how("vda"), Some(How::Sealed));
    bench.restart(&["vda"], false);
    assert_eq!(bench.how("vda"), Some(How::Sealed), "the list was durable before SEALED");
    bench.end(1, false);
    assert!(bench.at("vda").exists(), "sealed once");
    assert_eq!(bench.told(bench.one(2)), (false, true));
    bench.end(2, false);
    bench
        .guest
        .destination
        .forget(&bench.guest, &Event::Forget { heard: crate::ownership::Heard::Silence })
        .expect("void");
    assert!(bench.at("vda").exists(), "not even then");
    bench.send(bench.one(3)).expect_err("forgotten: it is nobody's");
}

#[test]
fn m2_a_guest_that_has_arrived_leaves_no_list() {
    let mut bench = Bench::new(false);
    bench.restart(&["vda"], false);
    bench.prepared(1);
    bench.seal(1);
    assert!(matches!(bench.say(Message::Go { stamp: bench.stamp(1) }), Message::Running { .. }));
    assert!(bench.guest.journal().is_none(), "it counts for nothing");
    bench.guest.destination.tidy(&bench.guest);
    assert!(bench.state("journal").is_empty());
}

#[test]
fn what_a_process_that_died_has_left_is_known_to_the_next() {
    let mut bench = Bench::new(false);
    bench.restart(&["vda"], false);
    bench.prepared(1);
    write(&bench.at("vda"));
    bench.restart(&["vda"], false);
    assert_eq!(bench.how("vda"), Some(How::Created));
    assert_eq!(bench.told(bench.one(2)), (false, true));
    bench.restart(&["vda"], false);
    let forget = Event::Forget { heard: crate::ownership::Heard::Silence };
    bench.guest.destination.forget(&bench.guest, &forget).expect("void");
    assert!(!bench.at("vda").exists(), "forgetting gives up what is here");
    assert!(bench.state("journal").is_empty());

    // Without a lasting state nothing is known, and nothing is touched.
    let mut bench = Bench::new(false);
    bench.prepared(1);
    write(&bench.at("vda"));
    bench.restart(&["vda"], true);
    bench.send(bench.one(2)).expect_err("not known to be ours");
    assert!(bench.at("vda").exists());
}

#[test]
fn d9_what_a_failed_sync_has_left_is_doubtful_after_a_restart_too() {
    let mut bench = Bench::new(true);
    bench.restart(&["vda"], false);
    bench.told(bench.one(1));
    write(&bench.at("vda"));
    bench.export().disk().expect("a disk").poison();
    // The source of the first is gone and has said nothing; the user tries again, and then restarts this side.
    let refused = bench.send(bench.one(2)).expect_err("poisoned");
    assert!(refused[0].contains("a sync has failed"), "{refused:?}");
    bench.restart(&["vda"], false);
    assert_eq!(bench.told(bench.one(3)), (false, false), "what it reads as is compared with nothing");
}

#[test]
fn a_broken_journal_removes_nothing_and_makes_nothing_ours() {
    let mut bench = Bench::new(false);
    bench.restart(&["vda"], false);
    bench.prepared(1);
    write(&bench.at("vda"));
    let journal = bench.at("state/journal");
    let mut bytes = fs::read(&journal).expect("read");
    bytes[20] ^= 1;
    fs::write(&journal, bytes).expect("written");
    bench.restart(&["vda"], false);
    assert!(bench.guest.journal().is_none());
    bench.send(bench.one(2)).expect_err("not known to be ours");
    let forget = Event::Forget { heard: crate::ownership::Heard::Silence };
    bench.guest.destination.forget(&bench.guest, &forget).expect("void");
    assert!(bench.at("vda").exists());
}

#[test]
fn only_the_same_guest_goes_on_from_what_was_left() {
    let bench = Bench::new(false);
    bench.prepared(1);
    write(&bench.at("vda"));
    bench.end(1, true);
    let mut other = bench.one(2);
    other.stamp.lineage = Lineage([5; 16]);
    bench.send(other).expect_err("another history");
    assert_eq!(bench.how("vda"), Some(How::Created));
}

#[test]
fn the_users_word_decides_about_data_that_is_not_ours() {
    let mut bench = Bench::new(true);
    write(&bench.at("vda"));
    bench.restart(&["vda"], true);
    bench.send(bench.one(1)).expect_err("not empty");
    // An older copy is compared, and never emptied.
    assert_eq!(bench.told(Prepare { mode: Mode::Incremental, ..bench.one(2) }), (false, true));
    assert_eq!(fs::read(bench.at("vda")).expect("read")[8192], 7);
    assert_eq!(bench.how("vda"), Some(How::Older));
    bench.end(2, false);
    assert!(bench.at("vda").exists(), "found, and never removed");
    // --overwrite begins anew.
    assert_eq!(bench.told(Prepare { mode: Mode::Overwrite, ..bench.one(3) }), (true, false));
    assert_eq!(fs::read(bench.at("vda")).expect("read")[8192], 0);
    // A copy of another size is none.
    let mut longer = bench.offer(4, &[("vda", 2 * SIZE)]);
    longer.mode = Mode::Incremental;
    let refused = bench.send(longer).expect_err("another size");
    assert_eq!(refused, ["vda: has 1048576 bytes at the destination and 2097152 at the source"]);
}

#[test]
fn files_that_two_disks_would_share_or_that_stand_for_a_device_are_refused_through_links_too() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let real = dir.path().join("real");
    fs::create_dir(&real).expect("made");
    std::os::unix::fs::symlink(&real, dir.path().join("link")).expect("linked");
    std::os::unix::fs::symlink("/dev", dir.path().join("nodes")).expect("linked");
    let disk = |name: &str, path: &str| {
        domain::Disk::parse(&format!("{name},file={}", dir.path().join(path).display())).expect("parsed")
    };
    let disks = vec![
        disk("vda", "real/x"),
        disk("vdb", "link/x"),
        disk("vdc", "nowhere"),
        disk("vdd", "nodes/blockferry-none"),
    ];
    let options = ServeOptions::in_directory(dir.path(), disks, true);
    let guest = Arc::new(Guest::open(&options, None).expect("opened"));
    std::os::unix::fs::symlink(dir.path().join("gone"), dir.path().join("nowhere")).expect("linked");
    let bench = Bench { dir, guest };
    let refused = bench.offer(1, &["vda", "vdb", "vdc", "vdd"].map(|name| (name, SIZE)));
    let refused = bench.send(refused).expect_err("shared");
    let at = |name: &str| bench.at(name).display().to_string();
    let (link, nowhere, node) = (at("link/x"), at("nowhere"), at("nodes/blockferry-none"));
    assert_eq!(
        refused,
        [
            format!("vdb: {link} is the image of disk vda too"),
            format!("vdc: {nowhere} cannot be created: {nowhere} is a link to nothing"),
            format!("vdd: {node} cannot be created: there is no such device, and no file is created below /dev"),
        ]
    );
    assert!(!bench.at("real/x").exists());
    // The same once one of them is there.
    drop(Disk::create(&bench.at("real/x"), SIZE, Cache::Writeback).expect("created"));
    let prepared = bench.send(bench.one(2)).expect("put there since, and empty");
    assert_eq!(prepared.disks.len(), 1);
    let refused = bench.send(bench.offer(3, &[("vdb", SIZE)])).expect_err("shared");
    assert_eq!(refused, [format!("vdb: {link} is the image of disk vda too")]);
}
