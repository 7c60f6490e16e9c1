//! What the executable says, and how it exits, when it is asked for what it cannot do; and how `export` ends.

#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use blockferry::limits::DISKS_MAX;
use blockferry::socket::Socket;

use crate::exported::Exported;
use crate::harness::{DEADLINE, Program, blockferry, output, peer, scratch};
use crate::images::disk_scratch;

/// Runs blockferry in `folder`: it prints nothing but this on stderr, and exits with this code.
fn refuses<S: AsRef<OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>, code: i32, text: &str) {
    let mut command = blockferry();
    let done = output(command.current_dir(folder).args(arguments));
    let (stdout, stderr) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert_eq!((&*stdout, &*stderr, done.status.code()), ("", text, Some(code)), "{command:?}");
}

/// [`refuses`] before anything is done: exit code 1, and one line.
fn is_refused(folder: &Path, arguments: &[&str], text: &str) {
    refuses(folder, arguments, 1, &format!("blockferry: {text}\n"));
}

/// [`refuses`] a wrong command line: exit code 2, one line and a hint.
fn is_misused(arguments: &[&str], text: &str, hint: &str) {
    refuses(Path::new("/"), arguments, 2, &format!("blockferry: {text}\ntry 'blockferry {hint}'\n"));
}

/// A file of `size` bytes of holes.
fn file(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

fn unix(path: &Path) -> String {
    format!("unix://{}", path.display())
}

// ---- what is there -----------------------------------------------------------------------------------------------

#[test]
fn what_is_no_disk_is_refused() {
    let folder = disk_scratch();
    let door = unix(&folder.path().join("nbd.sock"));
    let at = |name: &str| folder.path().join(name);
    file(&at("empty"), 0);
    file(&at("odd"), 1000);
    file(&at("disk"), 4096);
    std::fs::create_dir(at("directory")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let _listener = UnixListener::bind(at("socket")).unwrap();
    for (name, cause) in [
        ("missing", "no such file"),
        ("missing/disk", "no such file"),
        ("directory", "is a directory, not a file or a block device"),
        ("pipe", "is a pipe, not a file or a block device"),
        ("socket", "is a socket, not a file or a block device"),
        ("/dev/null", "is a character device, not a file or a block device"),
        ("empty", "is empty"),
        ("odd", "its size of 1000 bytes is not a multiple of 512"),
        ("disk/disk", "Not a directory"),
    ] {
        is_refused(folder.path(), &["export", name, "--nbd", &door], &format!("open disk: {name}: {cause}"));
    }
    assert!(!at("nbd.sock").exists(), "nothing is left behind");
    // One that is wrong spoils all, and the message names it.
    let some = ["export", "a=disk", "b=missing", "--nbd", &door];
    is_refused(folder.path(), &some, "open disk: missing: no such file");
    assert!(!at("missing").exists());
}

#[test]
fn a_file_given_twice_is_refused() {
    let folder = disk_scratch();
    let door = unix(&folder.path().join("nbd.sock"));
    file(&folder.path().join("disk"), 4096);
    std::os::unix::fs::symlink("disk", folder.path().join("link")).unwrap();
    std::fs::hard_link(folder.path().join("disk"), folder.path().join("name")).unwrap();
    for other in ["disk", "./disk", "link", "name"] {
        for options in [&[][..], &["--read-only"]] {
            let disks = ["export", "a=disk", &format!("b={other}"), "--nbd", &door];
            is_refused(folder.path(), &[&disks, options].concat(), &format!("open disk: {other}: is exported twice"));
        }
    }
}

#[test]
fn a_door_in_use_is_refused() {
    let folder = disk_scratch();
    file(&folder.path().join("disk"), 4096);
    let socket = folder.path().join("nbd.sock");
    let _unix = UnixListener::bind(&socket).unwrap();
    let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = format!("tcp://127.0.0.1:{}", tcp.local_addr().unwrap().port());
    File::create(folder.path().join("precious")).unwrap().write_all(b"precious").unwrap();
    let precious = unix(&folder.path().join("precious"));
    for (door, cause) in [
        (unix(&socket), "in use: a process listens there"),
        (port, "in use: a process listens there"),
        (precious, "exists and is not a socket"),
    ] {
        is_refused(folder.path(), &["export", "disk", "--nbd", &door], &format!("export: {door}: {cause}"));
        let serve = ["serve", "g1", "--disk", "vda,file=/none", "--control", &door];
        is_refused(folder.path(), &serve, &format!("control door: {door}: {cause}"));
        let control = unix(&folder.path().join("control.sock"));
        let serve = ["serve", "g1", "--disk", "vda,file=/none", "--control", &control, "--nbd", &door];
        is_refused(folder.path(), &serve, &format!("guest door: {door}: {cause}"));
        let nbd = unix(&folder.path().join("guest.sock"));
        let serve =
            ["serve", "g1", "--disk", "vda,file=/none", "--control", &control, "--nbd", &nbd, "--listen", &door];
        is_refused(folder.path(), &serve, &format!("migration door: {door}: {cause}"));
    }
    assert_eq!(std::fs::read(folder.path().join("precious")).unwrap(), b"precious");
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
}

#[test]
fn a_door_whose_process_was_killed_is_taken_over() {
    let folder = disk_scratch();
    file(&folder.path().join("disk"), 4096);
    let door = unix(&folder.path().join("nbd.sock"));
    for _ in 0..2 {
        let mut command = blockferry();
        command.current_dir(folder.path()).args(["export", "disk", "--nbd", &door]);
        let (mut program, line) = Program::start_until_line(&mut command, "ready");
        assert_eq!(line, format!("blockferry: export: ready: nbd={door}"));
        program.kill();
        assert!(folder.path().join("nbd.sock").exists());
    }
}

#[test]
fn plaintext_beyond_this_host_is_refused() {
    let folder = disk_scratch();
    file(&folder.path().join("disk"), 4096);
    let cause = "TCP beyond this host carries the guest's disks in the clear; --insecure-plaintext allows it";
    for door in ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:10809"] {
        is_refused(folder.path(), &["export", "disk", "--nbd", door], &format!("export: {door}: {cause}"));
        let serve = ["serve", "g1", "--disk", "vda,file=disk", "--listen", door];
        is_refused(folder.path(), &serve, &format!("serve: {door}: {cause}"));
    }
    // Before anything else is looked at, and one loopback door makes the other no better.
    let two = ["export", "missing", "--nbd", "tcp://127.0.0.1:0", "--nbd", "tcp://0.0.0.0:0"];
    is_refused(folder.path(), &two, &format!("export: tcp://0.0.0.0:0: {cause}"));
    let mut allowed = blockferry();
    allowed.current_dir(folder.path()).args(["export", "disk", "--nbd", "tcp://0.0.0.0:0", "--insecure-plaintext"]);
    let (_program, line) = Program::start_until_line(&mut allowed, "ready");
    assert!(line.starts_with("blockferry: export: ready: nbd=tcp://0.0.0.0:"), "{line}");
}

// ---- locks -------------------------------------------------------------------------------------------------------

#[test]
fn another_blockferry_has_the_file() {
    let folder = disk_scratch();
    let disk = folder.path().join("disk");
    file(&disk, 4096);
    let door = unix(&folder.path().join("nbd.sock"));
    let refused = format!("open disk: {}: in use by another process", disk.display());
    let path = disk.to_str().unwrap();
    let writer = Exported::start([path]);
    is_refused(folder.path(), &["export", path, "--nbd", &door], &refused);
    is_refused(folder.path(), &["export", path, "--read-only", "--nbd", &door], &refused);
    drop(writer);
    // Readers share it, and nobody writes behind their backs.
    let _readers = [Exported::start([path, "--read-only"]), Exported::start([path, "--read-only"])];
    is_refused(folder.path(), &["export", path, "--nbd", &door], &refused);
}

#[test]
fn qemu_nbd_has_the_file() {
    let Some(qemu_nbd) = peer("qemu-nbd") else { return };
    let folder = disk_scratch();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("qemu.sock"));
    file(&disk, 4096);
    let mut qemu = Command::new(qemu_nbd);
    let mut qemu = Program::start(qemu.args(["-f", "raw", "-t", "-k"]).arg(&socket).arg(&disk));
    drop(qemu.connect_unix(&socket));
    let door = unix(&folder.path().join("nbd.sock"));
    is_refused(folder.path(), &["export", "disk", "--nbd", &door], "open disk: disk: in use by another process");
    qemu.kill();
    let _now = Exported::start([&disk]);
}

#[test]
fn blockferry_has_the_file_that_qemu_nbd_wants() {
    let (Some(qemu_nbd), Some(qemu_io)) = (peer("qemu-nbd"), peer("qemu-io")) else { return };
    let folder = disk_scratch();
    let disk = folder.path().join("disk");
    file(&disk, 4096);
    for options in [&[][..], &["--read-only"]] {
        let _exported = Exported::start([disk.to_str().unwrap()].iter().chain(options));
        let socket = folder.path().join("qemu.sock");
        let wants = output(Command::new(&qemu_nbd).args(["-f", "raw", "-k"]).args([&socket, &disk]));
        let said = String::from_utf8_lossy(&wants.stderr);
        assert!(!wants.status.success() && said.contains("lock"), "{said}");
        let wants = output(Command::new(&qemu_io).args(["-f", "raw", "-c", "write 0 4k"]).arg(&disk));
        let said = String::from_utf8_lossy(&wants.stderr);
        assert!(!wants.status.success() && said.contains("lock"), "{said}");
    }
    assert_eq!(std::fs::read(&disk).unwrap(), [0; 4096]);
}

// ---- the command line --------------------------------------------------------------------------------------------

#[test]
fn a_wrong_command_line_is_one_line_and_a_hint() {
    is_misused(&[], "command: none given", "help");
    is_misused(&["exprot"], "command: exprot: there is no such command", "help");
    is_misused(&["keygen", "a"], "command: keygen: not built yet", "help");
    is_misused(&["--frobnicate"], "command: --frobnicate: there is no such command", "help");

    let many: Vec<String> = (0..=DISKS_MAX).map(|i| format!("d{i}=/disk")).collect();
    let many: Vec<&str> = ["export"].into_iter().chain(many.iter().map(String::as_str)).collect();
    for (arguments, text) in [
        (&["export"][..], "FILE: missing"),
        (&["export", ""], "'': the path is empty"),
        (&["export", "a="], "'a=': the path is empty"),
        (&["export", "/a", "/b"], "/a: each of several files needs a name: NAME=FILE"),
        (&["export", "a=/a", "/b"], "/b: each of several files needs a name: NAME=FILE"),
        (&["export", "a=/a", "b=/b", "a=/c"], "a: the name is given twice"),
        (&many, "FILE: 33 files are more than 32"),
        (&["export", "/a", "--frobnicate"], "--frobnicate: there is no such option"),
        (&["export", "/a", "-x"], "-x: there is no such option"),
        (&["export", "/a", "--nbd"], "--nbd: needs a value"),
        (&["export", "/a", "--nbd", "/sock"], "--nbd: '/sock' is not an address: unix:///PATH or tcp://HOST:PORT"),
        (&["export", "/a", "--nbd", "unix://sock"], "--nbd: 'unix://sock': the path must be absolute: unix:///PATH"),
        (&["export", "/a", "--nbd", "tcp://localhost"], "--nbd: 'tcp://localhost' lacks a port: tcp://HOST:PORT"),
        (&["export", "/a", "--cache", "some"], "--cache: 'some' is neither writeback nor none"),
        (&["export", "/a", "--cache=none", "--cache=none"], "--cache: given twice"),
        (&["export", "/a", "--read-only=yes"], "--read-only: takes no value"),
        (&["export", "/a", "--once", "--persistent"], "--once: excludes --persistent"),
        (&["export", "/a", "--tls-dir", "/tls"], "--tls-dir: not built yet"),
        (&["export", "/a", "--log", "loud"], "--log: 'loud' is not a level: off, error, warn, info, debug or trace"),
    ] {
        is_misused(arguments, &format!("export: {text}"), "export --help");
    }
    for (arguments, text) in [
        (&["serve"][..], "GUEST: missing"),
        (&["serve", "g1"], "--disk: a guest has at least one"),
        (&["serve", "g1", "g2"], "g2: one argument too many"),
        (&["serve", "g1", "--disk", "vda,file=/a", "--frobnicate"], "--frobnicate: there is no such option"),
        (&["serve", "g1", "--disk", "vda,file=/a", "--disk", "vda,file=/b"], "--disk: disk vda is given twice"),
        (
            &["serve", "g1", "--disk", "vda,file=/a", "--disk", "vdb,file=/a"],
            "--disk: disks vda and vdb have the same file /a",
        ),
        (&["serve", "g1", "--disk", "vda,file=/a,size=1000"], "--disk: disk vda: size: 1000 is not a multiple of 512"),
        (&["serve", "g1", "--disk", "vda,file=/a", "--domain-xml", "/x"], "--domain-xml: it stands instead of --disk"),
    ] {
        is_misused(arguments, &format!("serve: {text}"), "serve --help");
    }
    let mut loud = blockferry();
    let done = output(loud.env("BLOCKFERRY_LOG", "loud").args(["export", "/a"]));
    let text = "blockferry: environment: BLOCKFERRY_LOG: 'loud' is not a level: off, error, warn, info, debug or \
                trace\ntry 'blockferry help'\n";
    assert_eq!((String::from_utf8_lossy(&done.stderr).as_ref(), done.status.code()), (text, Some(2)));
}

#[test]
fn a_guest_that_nobody_serves_cannot_be_asked() {
    let folder = scratch();
    let control = unix(&folder.path().join("control.sock"));
    for command in ["claim", "switch", "cancel", "status"] {
        let text = format!("{command}: g1: nobody serves it on this host ({control}: No such file or directory)");
        is_refused(folder.path(), &[command, "g1", "--control", &control], &text);
    }
}

#[test]
fn help_is_on_stdout_and_no_failure() {
    let help = |arguments: &[&str]| {
        let done = output(blockferry().args(arguments));
        assert_eq!(
            (done.status.code(), String::from_utf8_lossy(&done.stderr).as_ref()),
            (Some(0), ""),
            "{arguments:?}"
        );
        String::from_utf8(done.stdout).unwrap()
    };
    let general = help(&["help"]);
    assert!(general.contains("\nusage: blockferry COMMAND [ARGUMENT]... [--OPTION]...\n"), "{general}");
    assert_eq!((help(&["--help"]), help(&["-h"])), (general.clone(), general.clone()));
    for (command, arguments) in [
        ("serve", "GUEST --disk NAME[,...]...|--domain-xml FILE [--OPTION]..."),
        ("claim", "GUEST [--OPTION]..."),
        ("migrate", "GUEST DEST [--OPTION]..."),
        ("switch", "GUEST [--OPTION]..."),
        ("cancel", "GUEST [--OPTION]..."),
        ("status", "GUEST [--OPTION]..."),
        ("set", "GUEST --bandwidth SIZE | --downtime-limit MS"),
        ("export", "[NAME=]FILE... [--OPTION]..."),
    ] {
        let text = help(&[command, "--help"]);
        let mut lines = text.lines();
        let about = lines.next().unwrap();
        assert!(general.contains(&format!("\n  {command:10}{about}\n")), "{command}: {about}");
        assert_eq!(lines.nth(1), Some(format!("usage: blockferry {command} {arguments}").as_str()));
        assert!(text.contains("  --help ") && text.contains("\nExample"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 120 && !line.ends_with(' ')), "{text}");
        assert_eq!(help(&["help", command]), text);
        assert_eq!(help(&[command, "-h", "--frobnicate"]), text, "whatever else is wrong");
        assert_eq!(help(&[command, "--version", "--help"]), text);
    }
    let version = concat!("blockferry ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!((help(&["--version"]), help(&["version"])), (version.to_owned(), version.to_owned()));
}

#[test]
fn json_says_the_same() {
    let folder = disk_scratch();
    file(&folder.path().join("disk"), 4096);
    let door = unix(&folder.path().join("nbd.sock"));
    let wrong = output(blockferry().current_dir(folder.path()).args(["export", "none", "--json", "--nbd", &door]));
    assert_eq!(wrong.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&wrong.stderr), "blockferry: open disk: none: no such file\n");
    let json = r#"{"type":"error","operation":"open disk","object":"none","cause":"no such file","exit":1}"#;
    assert_eq!(String::from_utf8_lossy(&wrong.stdout), format!("{json}\n"));
    let mut right = blockferry();
    right.current_dir(folder.path()).args(["export", "disk", "--json", "--nbd", &door]);
    let (_program, line) = Program::start_until_line(&mut right, "ready");
    let json = r#"{"type":"ready","name":"export","state":null,"term":null,"generation":null,"nbd":["#;
    assert_eq!(line, format!(r#"{json}"{door}"],"listen":null,"next":null}}"#));
}

// ---- how an export ends ------------------------------------------------------------------------------------------

#[test]
fn an_export_for_once_ends_with_its_last_client() {
    let folder = disk_scratch();
    file(&folder.path().join("disk"), 4096);
    let socket = folder.path().join("nbd.sock");
    let mut command = blockferry();
    command.current_dir(folder.path()).args(["export", "disk", "--once", "--nbd", &unix(&socket)]);
    let (mut program, _) = Program::start_until_line(&mut command, "ready");
    let open = |program: &mut Program| {
        let client = program.connect_unix(&socket);
        client.send_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        receive::<28>(&client);
        client
    };
    // Somebody who only looks is no client.
    let guest = program.connect_unix(&socket);
    guest.send_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0").unwrap();
    receive::<38>(&guest);
    drop(guest);
    let (first, second) = (open(&mut program), open(&mut program));
    drop(first);
    let third = open(&mut program);
    drop(second);
    assert!(program.ended().is_none(), "one is still there");
    drop(third);
    assert_eq!(program.wait().code(), Some(0));
    assert!(!socket.exists(), "and takes its socket along");
}

fn receive<const N: usize>(socket: &Socket) -> [u8; N] {
    let mut bytes = [0; N];
    socket.recv_exact_before(&mut bytes, Instant::now() + DEADLINE).unwrap();
    bytes
}
