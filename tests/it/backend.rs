//! A disk that is an export of somebody's NBD server: `file=nbd+unix://...` behind `serve`, and behind `export`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockferry::nbd::client::{Client, Wants};

use crate::exported::Exported;
use crate::harness::{Program, output, peer, scratch, throughout, until};
use crate::host::{Host, exactly_one_takes};
use crate::json::Json;
use crate::relay::{Kind, Relay};
use crate::writer::Ledger;

const MIB: u64 = 1 << 20;

/// `qemu-nbd` with one image as export vda.
pub(crate) struct Backend {
    pub(crate) program: Program,
    socket: PathBuf,
}

impl Backend {
    pub(crate) fn start(image: &Path, format: &str, socket: &Path) -> Option<Self> {
        Self::start_with(image, format, socket, &[])
    }

    /// The same with more options.
    pub(crate) fn start_with(image: &Path, format: &str, socket: &Path, options: &[&str]) -> Option<Self> {
        let mut command = Command::new(peer("qemu-nbd")?);
        // Several clients: it then says that a flush on one connection covers the others.
        command.args(["--persistent", "--shared=8", "--export-name=vda", "--format", format, "--socket"]);
        command.arg(socket).args(options).arg(image);
        let mut program = Program::start(&mut command);
        drop(program.connect_unix(socket));
        Some(Self { program, socket: socket.to_owned() })
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///vda?socket={}", self.socket.display())
    }
}

/// Runs `qemu-img`; it must succeed.
pub(crate) fn qemu_img(arguments: &[&str]) {
    let program = peer("qemu-img").expect("comes with qemu-nbd");
    let done = output(Command::new(program).args(arguments));
    assert!(done.status.success(), "qemu-img {arguments:?}: {done:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

/// An overlay on `base`, and a server with it.
fn overlay(folder: &Path, base: &Path, name: &str) -> Option<Backend> {
    let image = folder.join(format!("{name}.qcow2"));
    peer("qemu-nbd")?;
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(base), "-F", "raw", text(&image)]);
    Backend::start(&image, "qcow2", &folder.join(format!("{name}.sock")))
}

#[test]
fn an_overlay_moves_to_another_one_on_the_same_base_and_only_what_differs_travels() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    drop(Ledger::format(&at("base.raw"), 64 * MIB, 3, 60));
    let Some(of_a) = overlay(folder.path(), &at("base.raw"), "a") else { return };
    let Some(of_b) = overlay(folder.path(), &at("base.raw"), "b") else { return };
    let disk = |backend: &Backend| format!("vda,file={}", backend.uri());
    let a = Host::owner(folder.path(), "a", &[&disk(&of_a)]);
    let b = Host::start(folder.path(), "b", &[&disk(&of_b)]);
    assert!(a.log().contains("a server's export cannot be locked"), "{}", a.log());
    for offset in [0, 20 * MIB, 64 * MIB - 512] {
        assert_eq!(a.try_write("vda", offset), Ok(()));
    }
    // Or qemu-img would look at what qemu-nbd has not put into the image yet.
    a.open("vda").expect("served").flush().expect("flushed");
    // What is there is not empty, and says so.
    let refused = a.migrate(&b.listen, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("is not empty (--overwrite"), "{refused:?}");
    let moved = a.migrate(&b.listen, &["--copy-storage-inc", "--json"]).well();
    let done = Json::parse(moved.lines().last().expect("its end"));
    let (sent, equal) = (done.get("sent_bytes").number(), done.get("equal_bytes").number());
    assert!(sent <= 4 * MIB && equal >= 60 * MIB, "{sent} sent, {equal} equal");
    qemu_img(&["compare", "-q", "-U", text(&at("a.qcow2")), text(&at("b.qcow2"))]);
    let held = at("b.qcow2").metadata().expect("an image").len();
    assert!(held < 8 * MIB, "the overlay holds {held} bytes");
    assert_eq!((a.state().as_str(), b.state().as_str()), ("given", "owner"));
    exactly_one_takes("vda", 0, &b, &a);
}

#[test]
fn a_raw_disk_moves_into_an_empty_qcow2_and_back() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    if peer("qemu-nbd").is_none() {
        return;
    }
    let ledger = Ledger::format(&at("a.raw"), 32 * MIB, 4, 30);
    qemu_img(&["create", "-q", "-f", "qcow2", text(&at("b.qcow2")), "32M"]);
    let Some(backend) = Backend::start(&at("b.qcow2"), "qcow2", &at("b.sock")) else { return };
    let a = Host::owner(folder.path(), "a", &[&format!("vda,file={}", at("a.raw").display())]);
    let b = Host::start(folder.path(), "b", &[&format!("vda,file={}", backend.uri())]);
    a.migrate(&b.listen, &["--verify", "full"]).well();
    // The image itself is locked against qemu-img.
    std::fs::copy(at("a.raw"), at("copy.raw")).expect("copied");
    qemu_img(&["compare", "-q", "-U", "-f", "raw", "-F", "qcow2", text(&at("copy.raw")), text(&at("b.qcow2"))]);
    ledger.verify_door(b.open("vda").expect("served")).assert_whole();
    exactly_one_takes("vda", 0, &b, &a);
    b.migrate(&a.listen, &["--copy-storage-inc"]).well();
    exactly_one_takes("vda", 512, &a, &b);
}

/// `qemu-nbd` with a raw image in `folder`.
fn raw_backend(folder: &Path) -> Option<Backend> {
    Backend::start(&folder.join("disk.raw"), "raw", &folder.join("s.sock"))
}

/// The same with 1 MiB of sevens, our export of it, and a client of that.
fn behind_qemu_nbd(folder: &Path) -> Option<(Backend, Exported, Client)> {
    std::fs::write(folder.join("disk.raw"), vec![7; 1 << 20]).expect("written");
    let backend = raw_backend(folder)?;
    let exported = Exported::start([format!("vda={}", backend.uri())]);
    let client = Client::connect(exported.connect(), "vda", Wants::default()).expect("served");
    Some((backend, exported, client))
}

#[test]
fn a_server_that_dies_with_what_was_not_flushed_is_told_at_every_flush() {
    let folder = scratch();
    let Some((mut backend, exported, mut client)) = behind_qemu_nbd(folder.path()) else { return };
    client.write_all(4096, &[1; 4096]).expect("written");
    client.flush().expect("flushed");
    // Nothing is unflushed: a restart of the server goes unnoticed.
    backend.program.kill();
    let mut backend = raw_backend(folder.path()).expect("again");
    let mut buffer = [0; 8192];
    client.read_exact(0, &mut buffer).expect("read over a new connection");
    assert_eq!((buffer[0], buffer[4096]), (7, 1));
    client.write_all(0, &[2; 512]).expect("written");
    backend.program.kill();
    let refused = client.write_all(8192, &[3; 512]).expect_err("nobody is there");
    assert!(refused.to_string().contains("EIO"), "{refused}");
    let _again = raw_backend(folder.path()).expect("again");
    client.read_exact(0, &mut buffer).expect("it can be read");
    let refused = client.flush().expect_err("what was not flushed may be lost");
    assert!(refused.to_string().contains("EIO"), "{refused}");
    client.flush().expect_err("for good");
    assert!(exported.log().contains("the server went with writes that were not flushed"), "{}", exported.log());
}

#[test]
fn a_server_that_was_started_again_does_not_have_what_was_not_flushed() {
    let folder = scratch();
    let Some((mut backend, _exported, mut client)) = behind_qemu_nbd(folder.path()) else { return };
    client.write_all(0, &[2; 512]).expect("written");
    backend.program.kill();
    let _again = raw_backend(folder.path()).expect("again");
    // Nobody has noticed yet, and the server that is asked has nothing to flush.
    let refused = client.flush().expect_err("what was not flushed may be lost");
    assert!(refused.to_string().contains("EIO"), "{refused}");
    client.flush().expect_err("for good");
}

/// D9: a host that lost its power says nothing, and another one may have its address already.
#[test]
fn a_flush_is_not_answered_by_a_server_that_took_over_from_one_that_fell_silent() {
    let folder = scratch();
    let [first, second] = ["a.raw", "b.raw"].map(|name| {
        std::fs::write(folder.path().join(name), vec![7; 1 << 20]).expect("written");
        Exported::start([format!("vda={}", folder.path().join(name).display())])
    });
    let place = |exported: &Exported| exported.tcp("vda").replace("nbd://", "tcp://").replace("/vda", "");
    let relay = Relay::to(&place(&first));
    let front = Exported::start([format!("vda={}/vda", relay.address.replace("tcp://", "nbd://"))]);
    let open = || Client::connect(front.connect(), "vda", Wants::default()).expect("served");
    open().write_all(0, &[2; 512]).expect("written");
    relay.silence_open(Kind::Data);
    relay.lead_to(&place(&second));
    std::thread::scope(|scope| {
        // It has the one connection that there is, and hears nothing.
        let reads = scope.spawn(|| open().read_exact(4096, &mut [0; 512]));
        until("a read under way", || (relay.held_up() > 0).then_some(()));
        let flushes = scope.spawn(|| open().flush());
        throughout(Duration::from_secs(1), || assert!(!flushes.is_finished(), "nobody here has what was written"));
        relay.cut_all();
        reads.join().expect("no panic").expect("it is asked again");
        let refused = flushes.join().expect("no panic").expect_err("what was not flushed may be lost");
        assert!(refused.to_string().contains("EIO"), "{refused}");
    });
}

/// As many requests at once as there may be connections, some of which nobody takes.
fn all_are_served(exported: &Exported, writes: bool) {
    std::thread::scope(|scope| {
        for number in 0..6_u64 {
            scope.spawn(move || {
                let mut client = Client::connect(exported.connect(), "vda", Wants::default()).expect("served");
                for turn in 0..50 {
                    let offset = (number * 50 + turn) * 4096;
                    if writes {
                        client.write_all(offset, &[9; 4096]).expect("written");
                    }
                    let mut buffer = [0; 4096];
                    client.read_exact(offset, &mut buffer).expect("read");
                    assert_eq!(buffer, [if writes { 9 } else { 7 }; 4096]);
                }
                client.flush().expect("flushed");
            });
        }
    });
}

#[test]
fn a_server_that_takes_few_connections_is_no_error_for_anybody() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("disk.raw"), vec![7; 2 << 20]).expect("written");
    let Some(backend) = Backend::start_with(&at("disk.raw"), "raw", &at("s.sock"), &["--shared=2"]) else { return };
    let exported = Exported::start([format!("vda={}", backend.uri())]);
    all_are_served(&exported, true);
    assert!(exported.log().contains("connections must do"), "it said that it takes several: {}", exported.log());
    drop((exported, backend));
    // It says of itself that it takes one.
    let options = ["--shared=1", "--read-only"];
    // Before: it listens before it has looked how large the file is.
    std::fs::write(at("disk.raw"), vec![7; 2 << 20]).expect("written");
    let Some(backend) = Backend::start_with(&at("disk.raw"), "raw", &at("r.sock"), &options) else { return };
    let exported = Exported::start([&format!("vda={}", backend.uri()), "--read-only"]);
    all_are_served(&exported, false);
    assert!(!exported.log().contains("connections must do"), "{}", exported.log());
}

#[test]
fn a_server_that_cannot_be_a_disk_is_named() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("disk.raw"), vec![7; 1 << 20]).expect("written");
    let exported = Exported::start([text(&at("disk.raw")), "--read-only"]);
    let export = |uri: &str| {
        let door = format!("unix://{}", at("x.sock").display());
        output(crate::harness::blockferry().args(["export", uri, "--nbd", &door]))
    };
    for (uri, cause) in [
        (exported.unix(""), "the server offers it read-only"),
        (format!("nbd+unix:///?socket={}", at("none").display()), "No such file or directory"),
        ("nbd://192.0.2.1/x".to_owned(), "--insecure-plaintext allows it"),
        ("nbds://127.0.0.1/x".to_owned(), "is not supported yet"),
    ] {
        let refused = export(&uri);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(said.contains(cause) && said.lines().count() == 1, "{uri}: {said}");
    }
}
