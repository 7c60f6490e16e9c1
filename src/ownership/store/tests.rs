//! The state directory: every place where a process may die, a disk that is full or read-only, bits that flip, and two
//! processes that want one directory.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::*;
use crate::disk::Lasting;
use crate::ownership::{
    Address, Answer, Event, KeepError, Keeper, Kind, Lineage, Order, Peer, Save, Stamp, Title, Word,
};

const ATTEMPT: Attempt = Attempt([4; 16]);
const PEER: Host = Host([0xbb; 16]);

/// A state directory below a temporary one.
struct Bench {
    _dir: tempfile::TempDir,
    state: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("a/b");
        Self { _dir: dir, state }
    }

    fn open(&self) -> Store {
        Store::open(&self.state, true).expect("opened")
    }

    /// What a process finds that starts now.
    fn found(&self) -> Found {
        self.open().load().expect("read")
    }

    fn kind(&self) -> Kind {
        match self.found() {
            Found::Nothing => Kind::None,
            Found::Record(content) => Kind::of(Some(&content.record)),
            Found::Rejected { why, .. } => panic!("{why}"),
        }
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.state).expect("a directory");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    fn temporary(&self) -> usize {
        self.files().iter().filter(|name| name.ends_with(TEMPORARY)).count()
    }
}

fn peer() -> Peer {
    Peer { host: PEER, address: Address::try_from("tcp://b:1").expect("fits") }
}

fn owner(host: Host) -> Record {
    Record {
        lineage: Lineage([1; 16]),
        order: Order::FIRST,
        word: Word([2; 16]),
        host,
        images: Images::NONE,
        state: State::Owner { attempt: Attempt([2; 16]) },
    }
}

/// The stamp of an attempt from a store's host to the peer.
fn stamp(host: Host) -> Stamp {
    let order = Order::FIRST.handed_over().expect("far from the end");
    let Title { lineage, word, .. } = owner(host).title();
    Stamp { lineage, word, attempt: ATTEMPT, source: host, destination: PEER, order }
}

fn offer(host: Host) -> Event {
    Event::Offer { stamp: stamp(host), to: peer() }
}

/// A keeper of a store that two can see: the test, and the keeper.
fn keeper(bench: &Bench, record: impl FnOnce(Host) -> Option<Record>) -> (Keeper, Host) {
    let mut store = bench.open();
    let host = store.host();
    let save: Save = Box::new(move |write| store.write(&write));
    let mut keeper = Keeper::new(host, record(host), save);
    keeper.start().expect("written");
    (keeper, host)
}

#[test]
fn a_directory_is_made_for_its_owner_only_and_a_record_outlives_the_store() {
    let bench = Bench::new();
    let mut store = bench.open();
    let mode = fs::metadata(&bench.state).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, DIRECTORY_MODE);
    assert_eq!(store.load().expect("read"), Found::Nothing);
    let record = owner(store.host());
    store.write(&Write::Commit(Some(&record))).expect("written");
    assert_eq!(bench.files(), ["id", "lock", "record"]);
    let mode = fs::metadata(bench.state.join(RECORD)).expect("written").permissions().mode();
    assert_eq!(mode & 0o777, FILE_MODE);
    drop(store);
    let content = Content { record, images: ImageList::default() };
    assert_eq!(bench.found(), Found::Record(Box::new(content)));
    bench.open().write(&Write::Commit(None)).expect("removed");
    bench.open().write(&Write::Commit(None)).expect("removed again");
    assert_eq!(bench.found(), Found::Nothing);
}

#[test]
fn a_second_process_is_refused_in_one_line_and_the_next_one_is_the_same_host() {
    let bench = Bench::new();
    let store = bench.open();
    let host = store.host();
    let refused = Store::open(&bench.state, true).expect_err("in use");
    assert_eq!(refused, "in use: another process serves the guest from it");
    assert!(look(&bench.state).expect("looked").held);
    drop(store);
    assert!(!look(&bench.state).expect("looked").held);
    assert_eq!(bench.open().host(), host);
    assert_ne!(Bench::new().open().host(), host, "two directories of one machine are two hosts");
}

#[test]
fn who_only_looks_changes_nothing() {
    let bench = Bench::new();
    look(&bench.state).expect_err("there is none");
    assert!(!bench.state.exists());
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    keeper.write_ahead(&[&[offer(host)]]).expect("written");
    let before = bench.files();
    let Look { held, found: Found::Record(content), .. } = look(&bench.state).expect("looked") else {
        panic!("no record")
    };
    assert_eq!((held, Kind::of(Some(&content.record))), (true, Kind::Owner));
    assert_eq!(bench.files(), before);
}

#[test]
fn a_directory_that_is_copied_is_of_this_machine_and_a_record_of_another_host_owns_nothing() {
    let bench = Bench::new();
    let mut store = bench.open();
    store.write(&Write::Commit(Some(&owner(PEER)))).expect("written");
    let Found::Rejected { why, shown } = store.load().expect("read") else { panic!("not foreign") };
    let here = store.host();
    assert_eq!(why, format!("is of another machine or directory (host bbbbbbbb; this is {here:.8})"));
    assert!(shown.contains("order=1.1") && shown.contains("this host owns the guest"), "{shown}");
}

#[test]
fn m4_wherever_a_process_dies_in_a_commit_the_next_one_finds_the_old_record_or_the_new_one() {
    let begin = || {
        let bench = Bench::new();
        let mut store = bench.open();
        let record = owner(store.host());
        store.write(&Write::Commit(Some(&record))).expect("written");
        let next = Record { order: Order { term: 2, generation: 1 }, ..record };
        (bench, store, next)
    };
    // It dies inside the temporary file, at every length of it.
    let (bench, store, next) = begin();
    let bytes = store.bytes(&next);
    drop(store);
    for length in 0..=bytes.len() {
        fs::write(bench.state.join("record.x.1.tmp"), &bytes[..length]).expect("written");
        let Found::Record(content) = bench.found() else { panic!("{length} bytes") };
        assert_eq!(content.record.order, Order::FIRST);
        assert_eq!(bench.temporary(), 0, "cleared away");
    }
    // It dies with the temporary file whole, synced and read back.
    let (bench, mut store, next) = begin();
    store.write(&Write::Ahead(std::slice::from_ref(&next))).expect("written");
    drop(store);
    let Found::Record(content) = bench.found() else { panic!("no record") };
    assert_eq!(content.record.order, Order::FIRST);
    // It dies behind the rename; whether the directory was synced only a power cut would show.
    let (bench, mut store, next) = begin();
    store.write(&Write::Ahead(std::slice::from_ref(&next))).expect("written");
    let name = store.ahead[0].name.clone();
    fs::rename(bench.state.join(name), bench.state.join(RECORD)).expect("renamed");
    drop(store);
    let Found::Record(content) = bench.found() else { panic!("no record") };
    assert_eq!(content.record, next);
}

#[test]
fn m4_a_record_on_its_way_is_never_read_as_one() {
    let bench = Bench::new();
    let store = bench.open();
    let bytes = store.bytes(&owner(store.host()));
    drop(store);
    for name in ["record.tmp", "record.04040404040404040404040404040404.1.tmp", "id.tmp"] {
        fs::write(bench.state.join(name), &bytes).expect("written");
    }
    fs::write(bench.state.join("notes.txt"), "not ours").expect("written");
    assert_eq!(bench.found(), Found::Nothing);
    assert_eq!(bench.files(), ["id", "lock", "notes.txt"]);
}

#[test]
fn m7_what_is_no_record_owns_nothing_and_is_not_touched() {
    let bench = Bench::new();
    let mut store = bench.open();
    store.write(&Write::Commit(Some(&owner(store.host())))).expect("written");
    drop(store);
    let whole = fs::read(bench.state.join(RECORD)).expect("a record");
    let mut flipped = whole.clone();
    flipped[40] ^= 4;
    for (bytes, cause) in [
        (&[][..], "is broken: it is empty"),
        (&whole[..whole.len() - 1], "is broken: its checksum is wrong"),
        (&flipped, "is broken: its checksum is wrong"),
        (b"hello, this is not a record", "is broken: it is not blockferry's"),
    ] {
        fs::write(bench.state.join(RECORD), bytes).expect("written");
        let Found::Rejected { why, shown } = bench.found() else { panic!("{cause}") };
        assert_eq!((why.as_str(), shown), (cause, format!("{} bytes", bytes.len())));
        // A keeper of it does nothing but what the operator says, and only by name.
        let mut store = bench.open();
        let host = store.host();
        let mut keeper = Keeper::without(host, why, Box::new(move |write| store.write(&write)));
        keeper.start().expect("nothing to write");
        let claim =
            |discard| Event::Claim { lineage: Lineage([1; 16]), word: Word([2; 16]), images: Images::NONE, discard };
        let prepare = Event::Prepare { stamp: stamp(PEER), from: peer(), fresh: true };
        for event in [claim(false), prepare, Event::Abort(stamp(PEER)), Event::ForgetPeer] {
            assert!(matches!(keeper.apply(&event), Err(KeepError::Refused(_))), "{event:?}");
        }
        assert_eq!(keeper.known(), Ok(None));
        assert_eq!(fs::read(bench.state.join(RECORD)).expect("there"), bytes);
        keeper.apply(&claim(true)).expect("claimed");
        assert_eq!(keeper.rejected(), None);
        drop(keeper);
        assert_eq!(bench.kind(), Kind::Owner);
    }
}

#[test]
fn a_broken_id_is_one_line_and_no_new_host() {
    let bench = Bench::new();
    drop(bench.open());
    fs::write(bench.state.join(ID), "?").expect("written");
    let refused = Store::open(&bench.state, true).expect_err("broken");
    assert_eq!(refused, "id: is broken; a record that was made with it owns nothing without it");
}

#[test]
fn what_was_written_ahead_is_committed_by_a_rename_and_cleared_away_with_its_attempt() {
    let bench = Bench::new();
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    let give = [offer(host), Event::Give { sealed: stamp(host) }, Event::Running(stamp(host))];
    let end = [offer(host), Event::End { attempt: ATTEMPT }, Event::Unsealed(stamp(host))];
    keeper.write_ahead(&[&give, &end]).expect("written");
    assert_eq!(bench.temporary(), 5, "offered, given, arrived, ended, owner: {:?}", bench.files());
    keeper.write_ahead(&[&give, &end]).expect("written again");
    assert_eq!(bench.temporary(), 5);
    // From here on nothing can be written, and nothing has to be: the names are all that changes.
    let inode = |name: &str| rustix::fs::stat(bench.state.join(name)).expect("there").st_ino;
    let written: Vec<u64> = bench.files().iter().filter(|name| name.ends_with(TEMPORARY)).map(|n| inode(n)).collect();
    for (event, left) in [(&give[0], 4), (&give[1], 1), (&give[2], 0)] {
        keeper.apply(event).expect("committed");
        assert!(written.contains(&inode(RECORD)), "{event:?}");
        assert_eq!(bench.temporary(), left, "{event:?}: {:?}", bench.files());
    }
    drop(keeper);
    assert_eq!(bench.kind(), Kind::Given);
}

#[test]
fn an_abort_clears_away_what_gives_and_keeps_what_settles() {
    let bench = Bench::new();
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    let give = [offer(host), Event::Give { sealed: stamp(host) }];
    let end = [offer(host), Event::End { attempt: ATTEMPT }, Event::Unsealed(stamp(host))];
    keeper.write_ahead(&[&give, &end]).expect("written");
    keeper.apply(&end[0]).expect("offered");
    keeper.apply(&end[1]).expect("ended");
    assert_eq!(bench.temporary(), 1, "{:?}", bench.files());
    keeper.apply(&end[2]).expect("settled");
    assert_eq!((bench.temporary(), keeper.known().expect("known").map(Record::owns)), (0, Some(true)));
}

#[test]
fn images_travel_with_the_record_that_speaks_of_them() {
    let bench = Bench::new();
    let mut store = bench.open();
    let mut images = ImageList::default();
    images.add("vda", Lasting::File { inode: 1, born_ns: Some(2) }, Path::new("/d"));
    store.speak_of(&ImageList::default());
    store.speak_of(&images);
    let record = Record { images: images.fingerprint(), ..owner(store.host()) };
    store.write(&Write::Commit(Some(&record))).expect("written");
    drop(store);
    let mut store = bench.open();
    let Found::Record(content) = store.load().expect("read") else { panic!("no record") };
    assert_eq!(content.images, images);
    assert_eq!(store.images(record.images), Some(&images));
}

#[test]
fn a_directory_that_forgets_is_refused() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("SKIP: no /dev/shm") };
    let refused = Store::open(&dir.path().join("s"), false).expect_err("volatile");
    assert!(refused.starts_with("is on a tmpfs: a record there is lost with the host's power"), "{refused}");
    Store::open(&dir.path().join("s"), true).expect("at one's own risk");
}

/// A file system of a few pages, which goes away with the test.
struct Tiny {
    dir: tempfile::TempDir,
}

impl Tiny {
    /// Only root can mount; elsewhere the test is skipped, loudly.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = rustix::process::geteuid().is_root()
            && Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=64k", "none"])
                .arg(dir.path())
                .status()
                .is_ok_and(|s| s.success());
        if !mounted {
            eprintln!("SKIP: no small file system: not root, or no mount");
            return None;
        }
        Some(Self { dir })
    }

    fn remount(&self, how: &str) {
        let done = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(self.dir.path()).status();
        assert!(done.expect("mount runs").success());
    }

    fn bench(&self) -> Bench {
        Bench { _dir: tempfile::tempdir().expect("a directory"), state: self.dir.path().join("s") }
    }

    /// Takes every page that is left.
    fn fill(&self) {
        let mut file = File::create(self.dir.path().join("filler")).expect("created");
        while file.write_all(&[1; 512]).is_ok() {}
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

#[test]
fn m4_a_full_disk_fails_ahead_and_what_was_written_ahead_still_commits() {
    let Some(tiny) = Tiny::mount() else { return };
    let bench = tiny.bench();
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    let give = [offer(host), Event::Give { sealed: stamp(host) }, Event::Running(stamp(host))];
    keeper.write_ahead(&[&give]).expect("room is there");
    tiny.fill();
    let other = Event::Offer { stamp: Stamp { attempt: Attempt([9; 16]), ..stamp(host) }, to: peer() };
    let full = keeper.write_ahead(&[&[other]]).expect_err("full");
    assert_eq!(reason(&full), "No space left on device");
    assert_eq!((bench.temporary(), keeper.known().map(|r| r.map(Record::owns))), (3, Ok(Some(true))), "as it was");

    fs::remove_file(tiny.dir.path().join("filler")).expect("removed");
    keeper.write_ahead(&[&give]).expect("room is there");
    tiny.fill();
    for event in &give {
        keeper.apply(event).expect("needs no room");
    }
    assert_eq!(keeper.known().map(Kind::of), Ok(Kind::Given));
}

#[test]
fn m4_a_commit_that_fails_is_unknown_until_it_is_made_good() {
    let Some(tiny) = Tiny::mount() else { return };
    let bench = tiny.bench();
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    tiny.fill();
    assert!(matches!(keeper.apply(&offer(host)), Err(KeepError::Unknown(_))));
    assert!(matches!(keeper.known(), Err(KeepError::Unknown(_))));
    keeper.retry().expect_err("still full");
    fs::remove_file(tiny.dir.path().join("filler")).expect("removed");
    keeper.retry().expect("made good");
    assert_eq!(keeper.known().map(Kind::of), Ok(Kind::Offered));
    drop(keeper);
    assert_eq!(bench.kind(), Kind::Offered);
}

#[test]
fn m4_in_a_read_only_directory_nothing_commits_and_nothing_starts() {
    let Some(tiny) = Tiny::mount() else { return };
    let bench = tiny.bench();
    // Written ahead: not even a rename is possible.
    let (mut keeper, host) = keeper(&bench, |host| Some(owner(host)));
    keeper.write_ahead(&[&[offer(host), Event::Give { sealed: stamp(host) }]]).expect("written");
    tiny.remount("ro");
    let Err(KeepError::Unknown(cause)) = keeper.apply(&offer(host)) else { panic!("committed") };
    assert_eq!(cause, "Read-only file system");
    tiny.remount("rw");
    keeper.retry().expect("made good");
    assert_eq!(keeper.apply(&offer(host)), Ok(Answer::Silent));
    drop(keeper);
    tiny.remount("ro");
    // What is left of the attempt cannot even be cleared away.
    let refused = Store::open(&bench.state, true).expect_err("read-only");
    assert_eq!(refused, "Read-only file system");
    let fresh = Store::open(&bench.state.join("c"), true).expect_err("read-only");
    assert_eq!(fresh, "Read-only file system");
}
