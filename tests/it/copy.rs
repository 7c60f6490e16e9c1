//! `blockferry copy` against the servers of the field, and what it says when something fails on the way.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::chance::Chance;
use crate::exported::Exported;
use crate::harness::{DEADLINE, Program, blockferry, peer, scratch, until};
use crate::host::{Finished, run};
use crate::images::{allocated, assert_same, cached, disk_scratch, sparse_file};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;

fn copy(source: &str, destination: &str, options: &[&str]) -> Finished {
    run(blockferry().args(["copy", source, destination]).args(options), DEADLINE)
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A server on a Unix socket, as soon as it listens, and the URI of its export.
pub(crate) fn serve(command: &mut Command, listener: &Path, export: &str) -> (Program, String) {
    let mut program = Program::start(command);
    program.until_listens(listener);
    (program, format!("nbd+unix:///{export}?socket={}", listener.display()))
}

pub(crate) fn nbdkit(folder: &Path, arguments: &[&str]) -> Option<(Program, String)> {
    let program = peer("nbdkit")?;
    let listener = folder.join(format!("kit{}.sock", arguments.len()));
    let mut command = Command::new(program);
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&listener).args(arguments);
    Some(serve(&mut command, &listener, ""))
}

/// An image with data, holes, and data that is all zero.
fn image(folder: &Path) -> PathBuf {
    let image = folder.join("source.img");
    sparse_file(&image, SIZE, 7);
    File::options().write(true).open(&image).unwrap().write_all_at(&vec![0; 1 << 20], 2 * MIB).unwrap();
    image
}

#[test]
fn a_file_becomes_a_file_as_thin_as_it_can_be() {
    let folder = scratch();
    let (source, there) = (image(folder.path()), folder.path().join("copy.img"));
    let said = copy(path(&source), path(&there), &["--verify"]).well();
    let begins =
        format!("copied {} to {}: 12.0 MiB of data and 36.0 MiB of zeroes in ", source.display(), there.display());
    assert!(said.starts_with(&begins) && said.contains(", verified, root "), "{said}");
    assert_same(&source, &there, SIZE);
    assert!(allocated(&there) < allocated(&source), "zeroes that were data need no space");
    // Again, over what is there: nothing of it stays.
    File::options().write(true).open(&there).unwrap().write_all_at(&Chance::new(3).bytes(9 << 20), 3 * MIB).unwrap();
    copy(path(&source), path(&there), &["--verify"]).well();
    assert_same(&source, &there, SIZE);
}

#[test]
fn nothing_of_a_copy_stays_in_the_page_cache() {
    let folder = disk_scratch();
    let (source, there) = (image(folder.path()), folder.path().join("copy.img"));
    for options in [&[][..], &["--verify"]] {
        copy(path(&source), path(&there), options).well();
        let (Some(here), Some(left)) = (cached(&source), cached(&there)) else { return };
        assert!(here > 0 && left == 0, "{here} bytes of the source and {left} of the copy are cached: {options:?}");
        std::fs::remove_file(&there).unwrap();
    }
}

#[test]
fn the_last_block_of_an_export_of_an_odd_size_is_copied() {
    let (folder, other) = (scratch(), scratch());
    // None of them says how large its blocks are.
    let Some((_from, source)) = nbdkit(folder.path(), &["pattern", "70000"]) else { return };
    let Some((_to, there)) = nbdkit(other.path(), &["memory", "70000"]) else { return };
    copy(&source, &there, &["--verify"]).well();
    let refused = copy(&source, &source, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("is the source itself"), "{refused:?}");
}

#[test]
fn to_and_from_our_own_server() {
    let folder = scratch();
    let (source, there, back) = (image(folder.path()), folder.path().join("b.img"), folder.path().join("c.img"));
    File::create(&there).unwrap().set_len(SIZE + MIB).unwrap();
    let exported = Exported::start([format!("vda={}", there.display())]);
    let said = copy(path(&source), &exported.unix("vda"), &["--json", "--verify"]).well();
    assert!(said.contains("\"type\":\"copied\"") && said.contains("\"durable\":true"), "{said}");
    assert!(said.contains("\"data_bytes\":12582912"), "{said}");
    assert_same(&source, &there, SIZE);
    assert!(allocated(&there) <= 13 * MIB, "{} bytes are allocated", allocated(&there));
    // An export to an export, and an export to a file.
    let second = folder.path().join("d.img");
    File::create(&second).unwrap().set_len(SIZE + MIB).unwrap();
    let other = Exported::start([format!("vdb={}", second.display())]);
    copy(&exported.tcp("vda"), &other.unix("vdb"), &["--verify"]).well();
    assert_same(&there, &second, SIZE + MIB);
    copy(&other.unix("vdb"), path(&back), &[]).well();
    assert_same(&there, &back, SIZE + MIB);
    assert!(allocated(&back) <= 13 * MIB);
}

#[test]
fn to_and_from_qemu_nbd_that_takes_one_client() {
    let folder = scratch();
    let (Some(qemu_nbd), Some(qemu_img)) = (peer("qemu-nbd"), peer("qemu-img")) else { return };
    let source = image(folder.path());
    let qcow2 = folder.path().join("there.qcow2");
    run(Command::new(&qemu_img).args(["create", "-q", "-f", "qcow2", path(&qcow2), "48M"]), DEADLINE).well();
    for (number, back) in [false, true].into_iter().enumerate() {
        let listener = folder.path().join(format!("q{number}.sock"));
        let mut command = Command::new(&qemu_nbd);
        command.args(["--discard=unmap", "--socket", path(&listener), "--format=qcow2", path(&qcow2)]);
        let (mut server, uri) = serve(&mut command, &listener, "");
        if back {
            let again = folder.path().join("again.img");
            copy(&uri, path(&again), &["--verify"]).well();
            assert_same(&source, &again, SIZE);
        } else {
            copy(path(&source), &uri, &["--verify"]).well();
        }
        server.wait();
    }
    let same = run(Command::new(&qemu_img).args(["compare", "-s", path(&source), path(&qcow2)]), DEADLINE);
    // Strict: what is a hole there must be one here, but for the zeroes that were data.
    assert!(matches!(same.code, Some(0 | 1)), "{same:?}");
    run(Command::new(&qemu_img).args(["compare", path(&source), path(&qcow2)]), DEADLINE).well();
}

#[test]
fn servers_that_lack_something() {
    let folder = scratch();
    let source = image(folder.path());
    let cases: [&[&str]; 5] = [
        &["--filter=nozero", "memory", "48M"],
        &["--filter=noextents", "--filter=noparallel", "memory", "48M"],
        &[
            "--filter=multi-conn",
            "--filter=blocksize-policy",
            "memory",
            "48M",
            "multi-conn-mode=disable",
            "blocksize-minimum=4096",
        ],
        &[
            "--filter=blocksize-policy",
            "memory",
            "48M",
            "blocksize-minimum=65536",
            "blocksize-preferred=65536",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
        &["--no-sr", "memory", "48M"],
    ];
    for case in cases {
        let place = scratch();
        let Some((_server, uri)) = nbdkit(place.path(), case) else { return };
        let back = folder.path().join("back.img");
        copy(path(&source), &uri, &["--verify"]).well();
        copy(&uri, path(&back), &["--verify"]).well();
        assert_same(&source, &back, SIZE);
        std::fs::remove_file(back).unwrap();
    }
}

#[test]
fn an_error_on_either_side_is_said_and_leaves_nothing_behind() {
    let folder = scratch();
    let source = image(folder.path());
    for (what, word) in [("pwrite", "write"), ("zero", "write")] {
        let place = scratch();
        let error = format!("error-{what}=ENOSPC");
        let rate = format!("error-{what}-rate=100%");
        // Something is there already, so that zeroes have to travel.
        let Some((_server, uri)) =
            nbdkit(place.path(), &["--filter=error", "--filter=noextents", "memory", "48M", &error, &rate])
        else {
            return;
        };
        let failed = copy(path(&source), &uri, &[]);
        assert_eq!(failed.code, Some(3), "{failed:?}");
        assert!(failed.stderr.contains(word) && failed.stderr.contains("ENOSPC"), "{failed:?}");
        assert!(failed.stderr.ends_with("; it is incomplete now\n"), "{failed:?}");
    }
    let place = scratch();
    let arguments = ["--filter=error", "pattern", "48M", "error-pread=EIO", "error-pread-rate=5%"];
    let Some((_server, uri)) = nbdkit(place.path(), &arguments) else { return };
    let there = folder.path().join("never.img");
    let failed = copy(&uri, path(&there), &[]);
    assert_eq!(failed.code, Some(3), "{failed:?}");
    assert!(failed.stderr.contains("read at ") && failed.stderr.contains("EIO"), "{failed:?}");
    assert!(failed.stderr.ends_with("the file that was made for it is removed\n"), "{failed:?}");
    assert!(!there.exists());
}

#[test]
fn a_source_that_dies_in_the_middle() {
    let folder = scratch();
    let Some((mut server, uri)) = nbdkit(folder.path(), &["--filter=rate", "pattern", "1G", "rate=80M"]) else {
        return;
    };
    let there = folder.path().join("there.img");
    let (source, destination) = (uri, there.clone());
    let copying = std::thread::spawn(move || copy(&source, path(&destination), &[]));
    until("some bytes", || (there.exists() && allocated(&there) > MIB).then_some(()));
    server.kill();
    let failed = copying.join().unwrap();
    assert_eq!(failed.code, Some(3), "{failed:?}");
    assert!(!there.exists(), "{failed:?}");
    assert!(failed.stderr.contains("the server") || failed.stderr.contains("receiving"), "{failed:?}");
}

#[test]
fn one_that_is_killed_says_nothing_and_leaves_an_incomplete_file_of_full_size() {
    let folder = scratch();
    let (there, said) = (folder.path().join("there.img"), folder.path().join("said"));
    let place = scratch();
    let Some((server, uri)) = nbdkit(place.path(), &["--filter=rate", "pattern", "48M", "rate=80M"]) else { return };
    let mut command = blockferry();
    command.args(["copy", &uri, path(&there)]).stdout(File::create(&said).unwrap());
    let mut copying = Program::start(&mut command);
    until("some bytes", || (there.exists() && allocated(&there) > MIB).then_some(()));
    copying.kill();
    let status = copying.wait();
    assert_eq!((status.code(), status.signal()), (None, Some(9)), "no exit code that means something");
    assert!(!std::fs::read_to_string(&said).unwrap().contains("copied"), "only a copy is called one");
    assert_eq!(std::fs::metadata(&there).unwrap().len(), SIZE, "it looks like one");
    assert!(allocated(&there) < SIZE, "and is none");
    drop(server);
    // The next copy takes what is there for what it is: something to be overwritten.
    let place = scratch();
    let Some((_server, uri)) = nbdkit(place.path(), &["pattern", "48M"]) else { return };
    copy(&uri, path(&there), &["--verify"]).well();
    assert!(allocated(&there) >= SIZE);
}

#[test]
fn what_cannot_be_copied_is_refused() {
    let folder = scratch();
    let source = image(folder.path());
    let small = folder.path().join("small.img");
    File::create(&small).unwrap().set_len(MIB).unwrap();
    let line = |object: &Path, cause: &str| format!("blockferry: copy: {}: {cause}", object.display());
    copy(path(&source), path(&source), &[]).refused(1, &line(&source, "is the source itself"));
    let cause = "has 1048576 bytes, and the source 50331648: remove it, or make it that large";
    copy(path(&source), path(&small), &[]).refused(1, &line(&small, cause));
    let nothing = folder.path().join("nothing");
    copy(path(&nothing), path(&small), &[]).refused(1, &line(&nothing, "no such file"));
    let lost = folder.path().join("lost/there.img");
    assert_eq!(copy(path(&source), path(&lost), &[]).code, Some(1));
    let exported = Exported::start(["--read-only".as_ref(), small.as_os_str()]);
    let uri = exported.unix("");
    copy(path(&small), &uri, &[]).refused(1, &format!("blockferry: copy: {uri}: is read-only"));
    let usage = copy(path(&source), "nbds://localhost/x", &[]);
    assert_eq!(usage.code, Some(2), "{usage:?}");
    let far = copy(path(&source), "nbd://192.0.2.1/x", &[]);
    assert!(far.code == Some(1) && far.stderr.contains("--insecure-plaintext allows it"), "{far:?}");
    // Two processes do not write one file.
    let there = folder.path().join("in-use.img");
    File::create(&there).unwrap().set_len(SIZE).unwrap();
    let _holder = Exported::start([&there]);
    copy(path(&source), path(&there), &[]).refused(1, &line(&there, "in use by another process"));
}
