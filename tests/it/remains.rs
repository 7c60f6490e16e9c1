//! What a migration finds, makes and leaves at its destination: everything wrong in one refusal, a destination that is
//! killed at every step of making its files, what each end of an attempt leaves, and the next attempt after that.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::bad_input::SmallFileSystem;
use crate::harness::{Program, peer, scratch, until};
use crate::host::{Host, PATIENCE, blockferry, run};
use crate::json::Json;
use crate::writer::Ledger;

const MIB: u64 = 1 << 20;

/// A source that owns a disk vda, and a destination whose state lasts.
struct Scene {
    a: Host,
    b: Host,
    ledger: Ledger,
    folder: TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = scratch();
        let ledger = Ledger::format(&folder.path().join("a.img"), 16 * MIB, 31, 80);
        let a = Host::owner(folder.path(), "a", &[&file("vda", &folder.path().join("a.img"))]);
        let b = start_b(folder.path(), &[]);
        Self { a, b, ledger, folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.at("b.img")
    }

    fn restart_b(&mut self) {
        self.b.program.kill();
        self.b = start_b(self.folder.path(), &[]);
    }

    /// A migration is under way, and some of it has arrived.
    fn begin(&self, options: &[&str]) -> crate::host::Migration {
        let migration = self.a.start_migrate(&self.b.listen, &[&["--bandwidth", "4M"], options].concat());
        migration.until_sent(2 * MIB);
        migration
    }

    /// The next one arrives, without a word about what is there.
    fn arrives(&self) {
        self.a.migrate(&self.b.listen, &[]).well();
        self.ledger.verify_file(&self.image()).assert_whole();
        assert_eq!((self.a.state().as_str(), self.b.state().as_str()), ("given", "owner"));
        // History by now, and put away.
        until("end of the journal", || (!self.at("b.state/journal").exists()).then_some(()));
    }

    fn hint(&self) -> String {
        self.b.status().get("next").text().to_owned()
    }
}

/// The destination, run by `wrapper` if there is one.
fn start_b(folder: &Path, wrapper: &[&str]) -> Host {
    let command = match wrapper.split_first() {
        None => blockferry(),
        Some((program, words)) => {
            let mut command = Command::new(program);
            command.args(words).arg(blockferry().get_program());
            command
        }
    };
    Host::lasting(command, folder, "b", &[&file("vda", &folder.join("b.img"))])
}

fn file(name: &str, path: &Path) -> String {
    format!("{name},file={}", path.display())
}

fn inode(path: &Path) -> u64 {
    path.metadata().expect("a file").ino()
}

const KEPT: &str = "the next migration goes on from what an earlier one left on 1 disk; blockferry recover g1 --forget \
                    gives it up";

// ---- before byte one ---------------------------------------------------------------------------------------------

#[test]
fn everything_that_is_wrong_stands_in_one_refusal_and_nothing_has_changed() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    for name in ["b", "gone", "busy"] {
        fs::create_dir(at(name)).expect("a folder");
    }
    let disks = ["size", "full", "none", "ro", "ext", "one", "two", "dir", "busy"];
    for disk in disks {
        drop(Ledger::format(&at(&format!("a.{disk}")), MIB, 1, 10));
    }
    let here: Vec<String> = disks.iter().map(|disk| file(disk, &at(&format!("a.{disk}")))).collect();
    let a = Host::owner(folder.path(), "a", &here.iter().map(String::as_str).collect::<Vec<_>>());
    for (name, size) in [("size", 2), ("full", 1), ("ro", 1)] {
        drop(Ledger::format(&at("b").join(name), size * MIB, 2, 100));
    }
    let b = Host::start(
        folder.path(),
        "b",
        &[
            &file("size", &at("b/size")),
            &file("full", &at("b/full")),
            &format!("{},ro", file("ro", &at("b/ro"))),
            "ext,external",
            &file("one", &at("b/same")),
            &file("two", &at("b/../b/same")),
            &file("dir", &at("gone/x")),
            &file("busy", &at("busy/x")),
        ],
    );
    // Since the start a folder has gone, and somebody else has made, and uses, a file.
    fs::remove_dir(at("gone")).expect("removed");
    drop(Ledger::format(&at("busy/x"), MIB, 3, 0));
    let mut other = blockferry();
    other.arg("export").arg(at("busy/x")).arg("--nbd").arg(format!("unix://{}", at("other").display()));
    let (_other, _) = Program::start_until_line(&mut other, "ready");
    let before = fs::read_dir(at("b")).expect("a folder").count();
    let states = || {
        let names = fs::read_dir(at("b.state")).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let state = states();

    let refused = a.migrate(&b.listen, &[]);
    let place = |name: &str| at(name).display().to_string();
    let problems = [
        format!("disk size: has {} bytes at the destination and {MIB} at the source", 2 * MIB),
        format!(
            "disk size: {} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)",
            place("b/size")
        ),
        format!(
            "disk full: {} is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)",
            place("b/full")
        ),
        "disk none: the destination has no disk of this name".to_owned(),
        "disk ro: is read-only at the destination".to_owned(),
        "disk ext: is external at the destination".to_owned(),
        format!("disk two: {} is the image of disk one too", place("b/../b/same")),
        format!("disk dir: {} cannot be created: {}: No such file or directory", place("gone/x"), place("gone")),
        format!("disk busy: {} in use by another process", place("busy/x")),
    ];
    let line = problems.join("; ");
    refused.refused(1, &format!("blockferry: migrate: g1: refused by the destination: {line}; nothing has changed"));
    assert_eq!((b.state().as_str(), fs::read_dir(at("b")).expect("a folder").count()), ("incoming", before));
    assert_eq!(states(), state, "nothing is left in the state directory");
}

#[test]
fn a_state_directory_without_room_is_said_beside_what_else_is_wrong() {
    let Some(small) = SmallFileSystem::mount(64 << 10) else { return };
    let folder = scratch();
    let a = folder.path().join("a.img");
    drop(Ledger::format(&a, MIB, 4, 50));
    drop(Ledger::format(&folder.path().join("b.img"), 2 * MIB, 4, 50));
    let a = Host::owner(folder.path(), "a", &[&file("vda", &a)]);
    std::os::unix::fs::symlink(small.0.path(), folder.path().join("b.state")).expect("linked");
    let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
    let ballast = small.0.path().join("ballast");
    fs::write(&ballast, vec![1; 128 << 10]).expect_err("that fills it");
    let refused = a.migrate(&b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for cause in ["disk vda: has 2097152 bytes", "cannot take the next record: No space left on device"] {
        assert!(refused.stderr.contains(cause), "{refused:?}");
    }
    assert_eq!(b.state(), "incoming");
    fs::remove_file(ballast).expect("removed");
    fs::remove_file(folder.path().join("b.img")).expect("removed");
    drop(b);
    let b = Host::start(folder.path(), "b", &[&file("vda", &folder.path().join("b.img"))]);
    a.migrate(&b.listen, &[]).well();
}

#[test]
fn disks_of_one_file_system_need_its_room_together() {
    let Some(small) = SmallFileSystem::mount(12 * MIB) else { return };
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    for disk in ["a.vda", "a.vdb"] {
        drop(Ledger::format(&at(disk), 8 * MIB, 5, 100));
    }
    let a = Host::owner(folder.path(), "a", &[&file("vda", &at("a.vda")), &file("vdb", &at("a.vdb"))]);
    let there = |name: &str| small.0.path().join(name);
    let b = Host::start(folder.path(), "b", &[&file("vda", &there("vda")), &file("vdb", &there("vdb"))]);
    let refused = a.migrate(&b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("refused by the destination: the disks vda, vdb need "), "{refused:?}");
    assert!(!there("vda").exists() && !there("vdb").exists());
    a.migrate(&b.listen, &["--migrate-disks", "vda", "--unsafe"]).well();
}

// ---- killed at every step ----------------------------------------------------------------------------------------

/// The journal is written, the record; the file is made, gets its size, is locked; the journal is written again.
#[test]
fn a_destination_that_dies_while_it_makes_a_file_leaves_none() {
    if peer("strace").is_none() {
        return;
    }
    let (opens, renames) = ("?open,openat", "?rename,?renameat,renameat2");
    for (step, call, when, exists) in [
        // Of the thread that serves the connection: the journal, the record, the journal.
        ("listed and not recorded", renames, 2, false),
        ("listed", opens, 1, false),
        ("made", "ftruncate", 1, true),
        ("sized", "flock", 1, true),
        ("about to be completed", renames, 3, true),
    ] {
        let mut scene = Scene::new();
        let image = scene.image().display().to_string();
        scene.b.program.kill();
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=SIGKILL:when={when}"));
        let mut wrapper = vec!["strace", "-D", "-f", "-q", "-o", "/dev/null", "-e", &trace, "-e", &inject];
        if call != renames {
            wrapper.extend(["-P", &image]);
        }
        scene.b = start_b(scene.folder.path(), &wrapper);
        let ended = scene.a.migrate(&scene.b.listen, &[]);
        assert_eq!(ended.code, Some(1), "{step}: {ended:?}");
        until("end of the destination", || scene.b.program.ended());
        assert_eq!(scene.image().exists(), exists, "{step}");
        assert!(scene.at("b.state/journal").exists(), "{step}: listed before it is made");
        assert_eq!(scene.a.state(), "owner");
        scene.restart_b();
        assert!(!scene.image().exists(), "{step}: a file that was being made stays");
        assert_ne!(scene.hint(), KEPT, "{step}");
        scene.arrives();
    }
}

#[test]
fn what_a_killed_destination_had_received_is_gone_on_from() {
    let mut scene = Scene::new();
    let migration = scene.begin(&[]);
    scene.b.program.kill();
    let image = inode(&scene.image());
    migration.wait().aborted();
    scene.restart_b();
    assert_eq!((scene.b.state().as_str(), scene.hint().as_str()), ("incoming", KEPT));
    assert!(scene.b.log().contains("has left its remains in "), "{}", scene.b.log());
    scene.arrives();
    assert_eq!(inode(&scene.image()), image, "the same file");
}

#[test]
fn a_file_that_somebody_put_in_the_place_of_ours_is_left_alone() {
    let mut scene = Scene::new();
    let migration = scene.begin(&[]);
    scene.b.program.kill();
    migration.wait().aborted();
    let foreign = scene.at("foreign");
    let theirs = Ledger::format(&foreign, 16 * MIB, 99, 100);
    fs::rename(&foreign, scene.image()).expect("moved");
    scene.restart_b();
    let refused = scene.a.migrate(&scene.b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("is not empty (--overwrite overwrites it, --copy-storage-inc sends only what differs)"),
        "{refused:?}"
    );
    scene.b.ask(&["recover", "--forget"]).well();
    theirs.verify_file(&scene.image()).assert_whole();
}

// ---- how an attempt ends -----------------------------------------------------------------------------------------

#[test]
fn a_cancel_on_either_side_removes_what_was_made() {
    let scene = Scene::new();
    for who in [&scene.a, &scene.b] {
        let migration = scene.begin(&[]);
        assert!(scene.image().exists());
        who.ask(&["cancel"]).well();
        migration.wait().aborted();
        scene.b.until_state("incoming");
        assert!(!scene.image().exists() && !scene.at("b.state/journal").exists());
    }
    scene.arrives();
}

#[test]
fn keep_partial_keeps_what_a_cancel_would_remove_until_it_is_forgotten() {
    let scene = Scene::new();
    for who in [&scene.a, &scene.b] {
        let migration = scene.begin(&["--keep-partial"]);
        let image = inode(&scene.image());
        who.ask(&["cancel"]).well();
        migration.wait().aborted();
        scene.b.until_state("incoming");
        assert_eq!(inode(&scene.image()), image);
        assert_eq!(scene.hint(), KEPT);
    }
    let status = scene.b.ask(&["status"]).well();
    assert!(status.contains("blockferry recover g1 --forget"), "{status}");
    scene.b.ask(&["recover", "--forget"]).well();
    assert!(!scene.image().exists() && !scene.at("b.state/journal").exists());
    scene.arrives();
}

#[test]
fn a_source_that_dies_leaves_what_it_sent_for_its_next_process() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let ledger = Ledger::format(&at("a.img"), 16 * MIB, 32, 80);
    let a = || Host::lasting(blockferry(), folder.path(), "a", &[&file("vda", &at("a.img"))]);
    let mut first = a();
    first.ask(&["claim"]).well();
    let b = start_b(folder.path(), &[]);
    let migration = first.start_migrate(&b.listen, &["--bandwidth", "4M"]);
    migration.until_sent(2 * MIB);
    first.program.kill();
    assert_eq!(migration.wait().code, Some(5));
    assert_eq!(b.state(), "receiving", "it may come back");
    let image = inode(&at("b.img"));
    let second = a();
    second.migrate(&b.listen, &[]).well();
    ledger.verify_file(&at("b.img")).assert_whole();
    assert_eq!(inode(&at("b.img")), image, "the same file");
}

#[test]
fn what_was_found_is_never_removed_and_an_overwritten_disk_needs_the_word_only_once() {
    let mut scene = Scene::new();
    scene.b.program.kill();
    drop(Ledger::format(&scene.image(), 16 * MIB, 98, 100));
    let image = inode(&scene.image());
    scene.restart_b();
    assert_eq!(scene.a.migrate(&scene.b.listen, &[]).code, Some(1));
    let migration = scene.begin(&["--overwrite"]);
    scene.a.ask(&["cancel"]).well();
    migration.wait().aborted();
    scene.b.until_state("incoming");
    scene.restart_b();
    assert_eq!((inode(&scene.image()), scene.hint().as_str()), (image, KEPT));
    scene.b.ask(&["cancel"]).refused(1, "blockferry: cancel: g1: no migration is running");
    scene.arrives();
    assert_eq!(inode(&scene.image()), image);
}

#[test]
fn forgetting_while_it_is_received_ends_the_attempt() {
    let scene = Scene::new();
    let migration = scene.begin(&[]);
    scene.b.ask(&["recover", "--forget"]).well();
    migration.wait().aborted();
    assert!(!scene.image().exists());
    let known = run(&mut scene.b.command(&["who-owns", "--json"]), PATIENCE);
    assert_eq!(known.code, Some(5), "{known:?}");
    assert!(Json::parse(known.stdout.lines().next().unwrap_or_default()).get("text").text().contains("owns nothing"));
    scene.arrives();
}
