//! `migrate --plain`: a guest's disk moves to somebody's NBD server, and exactly one host owned it until then.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry::nbd::client::{Client, Wants};
use blockferry::socket::Socket;

use crate::backend::{Backend, qemu_img};
use crate::copy::nbdkit;
use crate::harness::{Program, peer, scratch, until};
use crate::host::Host;
use crate::images::allocated;
use crate::writer::{Ledger, Load, Mix, OnLoss, Writer};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

#[test]
fn a_guest_that_writes_moves_into_a_qcow2_behind_qemu_nbd_and_is_served_from_there() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    if peer("qemu-nbd").is_none() {
        return;
    }
    let ledger = Ledger::format(&at("a.raw"), 64 * MIB, 41, 50);
    qemu_img(&["create", "-q", "-f", "qcow2", text(&at("b.qcow2")), "64M"]);
    let Some(backend) = Backend::start(&at("b.qcow2"), "qcow2", &at("q.sock")) else { return };
    let a = Host::owner(folder.path(), "a", &[&format!("vda,file={}", at("a.raw").display())]);
    let load = Load { seed: 41, connections: 1, depth: 4, mix: Mix::ALL, rate: 500, on_loss: OnLoss::Stop };
    let writer = Writer::start(load, ledger, "vda", &[&a.door]);
    writer.until_more(100);
    let said = a.migrate(&backend.uri(), &["--plain"]).well();
    let ledger = writer.finish();
    assert!(said.contains("is a plain NBD server: it keeps no record and no second writer away"), "{said}");
    assert_eq!(a.state(), "given");
    let owns = a.ask(&["who-owns"]);
    assert_eq!(owns.code, Some(4), "{owns:?}");
    assert!(owns.stdout.contains(&backend.uri()), "{owns:?}");
    assert!(a.try_write("vda", 0).expect_err("fenced").contains("SHUTDOWN"));
    // The new host: the same server is its disk, and claim is said once.
    let b = Host::owner(folder.path(), "b", &[&format!("vda,file={}", backend.uri())]);
    ledger.verify_door(b.open("vda").expect("served")).assert_whole();
    assert_eq!(b.try_write("vda", 0), Ok(()));
    // The way back, once nobody uses the other one: an operator's word.
    drop(b);
    let taken = a.ask(&["recover", "--take-ownership"]).well();
    assert!(taken.contains("this host owns the guest from now on"), "{taken}");
    assert_eq!(a.try_write("vda", 0), Ok(()));
}

#[test]
fn what_cannot_go_to_a_plain_server_is_refused_before_the_first_byte() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    for name in ["a.vda", "a.vdb", "full.raw"] {
        drop(Ledger::format(&at(name), MIB, 5, 100));
    }
    let Some(backend) = Backend::start(&at("full.raw"), "raw", &at("q.sock")) else { return };
    let disk = |name: &str| format!("{name},file={}", at(&format!("a.{name}")).display());
    let a = Host::owner(folder.path(), "a", &[&disk("vda"), &disk("vdb")]);
    let uri = backend.uri();
    let full = std::fs::read(at("full.raw")).expect("an image");
    for (to, options, code, cause) in [
        (uri.as_str(), &["--plain"][..], 1, "2 disks move, and the URI names one export"),
        (&uri, &["--plain", "--migrate-disks", "vda"], 1, "is not empty (--overwrite"),
        (&uri, &["--plain", "--transport", "stream"], 2, "a plain NBD server takes no stream"),
        (&uri, &["--plain", "--keep-partial"], 2, "nothing at a plain NBD server is ever removed"),
        (&uri, &[], 2, "a plain NBD server: see --plain"),
        ("tcp://127.0.0.1:1", &["--plain"], 2, "--plain goes to an NBD URI"),
        ("nbd+unix:///x?socket=/none", &["--plain", "--migrate-disks", "vda"], 1, "No such file or directory"),
    ] {
        let refused = a.migrate(to, options);
        assert_eq!(refused.code, Some(code), "{to} {options:?}: {refused:?}");
        assert!(refused.stderr.contains(cause), "{to} {options:?}: {refused:?}");
    }
    assert!(std::fs::read(at("full.raw")).expect("an image") == full);
    assert_eq!(a.state(), "owner");
    // One client at a time: it cannot be read back while it is written.
    let Some(nbdkit) = peer("nbdkit") else { return };
    let mut command = Command::new(nbdkit);
    command.args(["-f", "-U", text(&at("k.sock")), "--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"]);
    let mut program = Program::start(&mut command);
    drop(program.connect_unix(&at("k.sock")));
    let kit = format!("nbd+unix:///?socket={}", at("k.sock").display());
    let one = &["--plain", "--migrate-disks", "vda"];
    let refused = a.migrate(&kit, one);
    assert!(refused.stderr.contains("cannot be read back while it is written"), "{refused:?}");
    a.migrate(&kit, &[one.as_slice(), &["--verify", "none"]].concat()).well();
    assert_eq!(a.state(), "given");
}

#[test]
fn a_server_with_large_blocks_or_small_payloads_gets_no_request_that_it_refuses() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let Some(nbdkit) = peer("nbdkit") else { return };
    // So large that a granule is 64 KiB: one of them has a hole in its middle.
    let (large, small) = (300 << 30, 8 * MIB);
    let cases: [(&str, u64, &[&str]); 3] = [
        ("l", large, &["blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=1M"]),
        ("s", small, &["blocksize-maximum=16K"]),
        ("n", small, &["blocksize-maximum=4K"]),
    ];
    for (name, size, blocks) in cases {
        let image = at(&format!("{name}.raw"));
        let file = File::options().read(true).write(true).create_new(true).open(&image).expect("made");
        file.set_len(size).expect("sparse");
        let data: Vec<u8> = (0..MIB).map(|at| u8::try_from(at / 4096 % 255 + 1).expect("small")).collect();
        for offset in [0, 3 * MIB + 4096, size - MIB] {
            file.write_all_at(&data, offset).expect("written");
            file.write_all_at(&[0; 20480], offset + 70_000).expect("written");
        }
        let socket = at(&format!("{name}.sock"));
        let mut command = Command::new(&nbdkit);
        command.args(["-f", "-U", text(&socket), "--filter=blocksize-policy", "memory", &size.to_string()]);
        command.arg("blocksize-error-policy=error").args(blocks);
        let mut program = Program::start(&mut command);
        drop(program.connect_unix(&socket));
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let a = Host::owner(folder.path(), name, &[&format!("vda,file={}", image.display())]);
        let moved = a.migrate(&uri, &["--plain"]);
        if name == "n" {
            assert_eq!(moved.code, Some(1), "{moved:?}");
            assert!(moved.stderr.contains("takes no more than 4096 bytes at once"), "{moved:?}");
            continue;
        }
        moved.well();
        let socket = Arc::new(Socket::new(UnixStream::connect(&socket).expect("it listens").into()));
        let mut client = Client::connect(socket, "", Wants::default()).expect("served");
        for offset in [0, 3 * MIB, size - MIB] {
            let (mut here, mut there) = (vec![0; 1 << 20], vec![1; 1 << 20]);
            file.read_exact_at(&mut here, offset).expect("read");
            client.read_exact(offset, &mut there).expect("read");
            assert!(here == there, "{name}: {offset}");
        }
    }
}

#[test]
fn a_server_that_dies_ends_the_migration_and_the_guest_stays() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let ledger = Ledger::format(&at("a.raw"), 32 * MIB, 43, 100);
    File::create(at("b.raw")).and_then(|file| file.set_len(32 * MIB)).expect("made");
    let Some(mut backend) = Backend::start(&at("b.raw"), "raw", &at("q.sock")) else { return };
    let a = Host::owner(folder.path(), "a", &[&format!("vda,file={}", at("a.raw").display())]);
    let migration = a.start_migrate(&backend.uri(), &["--plain", "--hold"]);
    migration.until_held();
    backend.program.kill();
    let ended = migration.wait();
    ended.aborted();
    assert_eq!(a.state(), "owner");
    ledger.verify_door(a.open("vda").expect("served")).assert_whole();
    assert_eq!(a.try_write("vda", 0), Ok(()));
    let mut sector = [0; 512];
    File::open(at("b.raw")).and_then(|file| file.read_exact_at(&mut sector, 0)).expect("half a copy");
}

#[test]
fn d4_what_a_cancelled_attempt_has_sent_is_there_when_it_ends() {
    let folder = scratch();
    let (image, there) = (folder.path().join("a.raw"), folder.path().join("b.raw"));
    std::fs::write(&image, vec![7; 64 << 20]).expect("written");
    File::create(&there).and_then(|file| file.set_len(64 * MIB)).expect("made");
    // Whoever only closes the connection leaves it what it has read, for a while.
    let pread = format!("pread=dd if={} iflag=skip_bytes,count_bytes skip=$4 count=$3 2>/dev/null", text(&there));
    let pwrite = format!("pwrite=sleep 0.5; dd of={} oflag=seek_bytes seek=$4 conv=notrunc 2>/dev/null", text(&there));
    let (flush, parallel) = (["can_flush=exit 0", "flush=exit 0"], "thread_model=echo parallel");
    let options = ["eval", "get_size=echo 64M", "can_write=exit 0", flush[0], flush[1], parallel, &pread, &pwrite];
    let Some((_server, uri)) = nbdkit(folder.path(), &options) else { return };
    let a = Host::owner(folder.path(), "a", &[&format!("vda,file={}", image.display())]);
    let migration = a.start_migrate(&uri, &["--plain", "--verify", "none"]);
    until("the first bytes", || (allocated(&there) > 0).then_some(()));
    a.ask(&["cancel"]).well();
    migration.wait().aborted();
    let left = allocated(&there);
    assert!(left < 64 * MIB, "it was cancelled");
    let ended = Instant::now();
    until("time for what is late", || (ended.elapsed() > Duration::from_secs(1)).then_some(()));
    assert_eq!(allocated(&there), left, "something arrived behind the end of the attempt");
    assert_eq!(a.state(), "owner");
}
