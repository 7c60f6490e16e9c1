//! Doors that somebody else opened: sockets passed on by number, by a service manager's variables, or as standard
//! input. A python program is the one that passes them on; libnbd's programs are the clients.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{DEADLINE, Program, blockferry, output, peer, until};
use crate::images::disk_scratch;

/// Listens at Unix sockets (`PATH`) or at `tcp4`, `tcp6`, puts them at 3, 4 and so on, and becomes the program after
/// `--`. Arguments before it: the names or `-`, or `fd` for no variables at all; then the places.
const ACTIVATOR: &str = r#"
import os, socket, sys
split = sys.argv.index("--")
names, places, program = sys.argv[1], sys.argv[2:split], sys.argv[split + 1:]
for number, place in enumerate(places, 3):
    if place in ("tcp4", "tcp6"):
        s = socket.socket(socket.AF_INET if place == "tcp4" else socket.AF_INET6)
        s.bind(("127.0.0.1" if place == "tcp4" else "::1", 0))
        print("port", s.getsockname()[1], flush=True)
    else:
        s = socket.socket(socket.AF_UNIX)
        s.bind(place)
    s.listen(8)
    # As service managers do, which poll it themselves.
    s.setblocking(False)
    if s.fileno() == number:
        s.set_inheritable(True)
    else:
        os.dup2(s.fileno(), number)
    s.detach()
if names != "fd":
    os.environ.update(LISTEN_FDS=str(len(places)), LISTEN_PID=str(os.getpid()))
    if names != "-":
        os.environ["LISTEN_FDNAMES"] = names
os.execv(program[0], program)
"#;

/// The program under test, started by a foreign one that opens its doors.
fn activated(names: &str, places: &[&str], arguments: &[&str]) -> Option<Command> {
    let mut command = Command::new(peer("python3")?);
    command.env_remove("BLOCKFERRY_LOG").env_remove("NOTIFY_SOCKET");
    command.args(["-c", ACTIVATOR, names]).args(places).arg("--");
    command.arg(blockferry().get_program()).args(arguments);
    Some(command)
}

fn disk(folder: &Path) -> String {
    let path = folder.join("disk.raw");
    let mut file = File::create(&path).unwrap();
    file.write_all(&[0x5A; 4096]).unwrap();
    file.set_len(1 << 20).unwrap();
    path.display().to_string()
}

/// `nbdinfo` sees a disk of 1 MiB there.
fn is_served(uri: &str) {
    let Some(nbdinfo) = peer("nbdinfo") else { return };
    let done = output(Command::new(nbdinfo).args(["--size", uri]));
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1048576\n", "{uri}: {}", String::from_utf8_lossy(&done.stderr));
}

fn at(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[test]
fn export_serves_at_a_passed_socket_and_leaves_its_path() {
    let folder = disk_scratch();
    let (door, disk) = (folder.path().join("door"), disk(folder.path()));
    let place = door.display().to_string();
    let Some(mut command) = activated("fd", &[&place], &["export", &disk, "--nbd", "fd:3", "--once"]) else { return };
    let (mut program, line) = Program::start_until_line(&mut command, ": ready: ");
    assert_eq!(line, "blockferry: export: ready: nbd=fd:3");
    is_served(&at(&door));
    assert!(program.wait().success());
    assert!(door.exists(), "the socket is its maker's");
}

#[test]
fn a_service_managers_sockets_are_the_doors_of_their_names() {
    let folder = disk_scratch();
    let (disk, state) = (disk(folder.path()), folder.path().join("state").display().to_string());
    let [nbd, control] = ["nbd", "control"].map(|name| folder.path().join(name));
    let places = [control.display().to_string(), nbd.display().to_string()];
    let disk = format!("vda,file={disk}");
    let serve = ["serve", "g1", "--disk", &disk, "--state", &state, "--volatile-state"];
    let places = [places[0].as_str(), &places[1], "tcp4"];
    let Some(mut command) = activated("control:nbd:migration", &places, &serve) else { return };
    let (_program, line) = Program::start_until_line(&mut command, ": ready: ");
    assert!(line.contains(" nbd=fd:4 listen=fd:5"), "{line}");
    let control = format!("unix://{}", control.display());
    let claimed = output(blockferry().args(["claim", "g1", "--control", &control]));
    assert!(claimed.status.success(), "{claimed:?}");
    let uri = format!("nbd+unix:///vda?socket={}", nbd.display());
    is_served(&uri);
    let (Some(nbdcopy), copy) = (peer("nbdcopy"), folder.path().join("copy")) else { return };
    assert!(output(Command::new(nbdcopy).arg(&uri).arg(&copy)).status.success());
    let copied = std::fs::read(&copy).unwrap();
    assert!(copied.len() == 1 << 20 && copied[..4096].iter().all(|byte| *byte == 0x5A));
}

#[test]
fn systemd_itself_opens_the_doors() {
    let Some(systemd) = peer("systemd-socket-activate") else { return };
    let folder = disk_scratch();
    let (disk, state) = (disk(folder.path()), folder.path().join("state"));
    let [nbd, control] = ["nbd", "control"].map(|name| folder.path().join(name));
    let mut command = Command::new(&systemd);
    command.arg("--listen").arg(&control).arg("--listen").arg(&nbd).arg("--fdname=control:nbd");
    command.arg(blockferry().get_program()).args(["serve", "g1", "--disk", &format!("vda,file={disk}"), "--state"]);
    command.arg(&state).arg("--volatile-state");
    let mut program = Program::start(&mut command);
    program.until_listens(&nbd);
    // Only now it starts the program, with the sockets of both.
    let claimed = output(blockferry().args(["claim", "g1", "--control", &format!("unix://{}", control.display())]));
    assert!(claimed.status.success(), "{claimed:?}");
    is_served(&format!("nbd+unix:///vda?socket={}", nbd.display()));
    is_served(&format!("nbd+unix:///vda?socket={}", nbd.display()));
}

#[test]
fn systemd_gives_each_client_a_process_of_its_own() {
    let Some(systemd) = peer("systemd-socket-activate") else { return };
    let folder = disk_scratch();
    let (door, disk) = (folder.path().join("door"), disk(folder.path()));
    let mut command = Command::new(&systemd);
    command.args(["--accept", "--inetd", "--listen"]).arg(&door).arg(blockferry().get_program());
    command.args(["export", &disk, "--read-only", "--nbd", "fd:0"]);
    let mut program = Program::start(&mut command);
    program.until_listens(&door);
    for _ in 0..3 {
        is_served(&at(&door));
    }
}

#[test]
fn unnamed_sockets_are_guest_doors_of_either_family() {
    let folder = disk_scratch();
    let disk = disk(folder.path());
    let family6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    let places: &[&str] = if family6 { &["tcp4", "tcp6"] } else { &["tcp4"] };
    let log = folder.path().join("ports");
    let Some(mut command) = activated("-", places, &["export", &disk]) else { return };
    // What is passed on as well: a variable that names another process is not looked at by anybody.
    let _program = Program::start(command.stdout(File::create(&log).unwrap()));
    let said = until("the ready line", || {
        Some(std::fs::read_to_string(&log).ok()?).filter(|said| said.contains(": ready: ") && said.ends_with('\n'))
    });
    let ports: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("port ")).collect();
    assert_eq!(ports.len(), places.len());
    for (host, port) in ["127.0.0.1", "[::1]"].iter().zip(ports) {
        is_served(&format!("nbd://{host}:{port}"));
    }
}

#[test]
fn tcp_6_is_bound_and_dialled() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("SKIPPED: this host has no IPv6");
        return;
    }
    let folder = disk_scratch();
    let disk = disk(folder.path());
    let mut command = blockferry();
    let (_program, line) =
        Program::start_until_line(command.args(["export", &disk, "--nbd", "tcp://[::1]:0"]), ": ready: ");
    let place = line.split_once("nbd=tcp://").unwrap().1.to_owned();
    assert!(place.starts_with("[::1]:") && place != "[::1]:0", "{line}");
    is_served(&format!("nbd://{place}"));
    let address = blockferry::address::Address::parse(&format!("tcp://{place}")).unwrap();
    address.connect(DEADLINE).unwrap();
}

#[test]
fn a_connection_on_standard_input_is_the_only_client() {
    let (Some(nbdsh), folder) = (peer("nbdsh"), disk_scratch()) else { return };
    let disk = disk(folder.path());
    // As inetd does: one socket is standard input, output and error.
    let script = format!(
        "import socket, subprocess\n\
         ours, theirs = socket.socketpair()\n\
         server = subprocess.Popen([{:?}, 'export', {disk:?}, '--nbd', 'fd:0', '--log', 'trace'],\n\
         \x20   stdin=theirs, stdout=theirs, stderr=theirs)\n\
         theirs.close()\n\
         h.connect_socket(ours.detach())\n\
         assert h.get_size() == 1 << 20\n\
         assert h.pread(4096, 0) == b'\\x5a' * 4096\n\
         h.pwrite(b'x' * 512, 8192)\n\
         h.shutdown()\n\
         assert server.wait(timeout=20) == 0\n",
        blockferry().get_program()
    );
    // Its module belongs to the system's Python, not to another that may stand before it.
    let done = output(Command::new(nbdsh).env("PATH", "/usr/bin:/bin").args(["-c", &script]));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(std::fs::read(&disk).unwrap()[8192..8704], [b'x'; 512]);
}

#[test]
fn what_can_be_no_door_is_refused() {
    let folder = disk_scratch();
    let (door, disk) = (folder.path().join("door"), disk(folder.path()));
    let refused = |command: &mut Command, code: i32, text: &str| {
        let done = output(command.stdin(Stdio::null()));
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!((said.lines().next(), done.status.code()), (Some(text), Some(code)));
    };
    for (descriptor, cause) in [("fd:0", "is not a socket"), ("fd:900", "no such descriptor was passed")] {
        let text = format!("blockferry: export: {descriptor}: {cause}");
        refused(blockferry().args(["export", &disk, "--nbd", descriptor]), 1, &text);
    }
    let place = door.display().to_string();
    let twice = ["export", &disk, "--nbd", "fd:3", "--nbd", "fd:3"];
    let Some(mut command) = activated("fd", &[&place], &twice) else { return };
    refused(&mut command, 2, "blockferry: export: fd:3: is given twice");
    std::fs::remove_file(&door).unwrap();
    let Some(mut command) = activated("wrong", &[&place], &["export", &disk]) else { return };
    let text = "blockferry: export: LISTEN_FDS: LISTEN_FDNAMES: 'wrong' is not a door: nbd, migration or control";
    refused(&mut command, 2, text);
}

#[test]
fn a_doors_socket_has_the_wished_mode() {
    let folder = disk_scratch();
    let (door, disk) = (folder.path().join("door"), disk(folder.path()));
    let place = format!("unix://{}", door.display());
    let mut command = blockferry();
    let (_program, line) =
        Program::start_until_line(command.args(["export", &disk, "--nbd", &format!("{place}?mode=0660")]), ": ready: ");
    assert_eq!(line, format!("blockferry: export: ready: nbd={place}"));
    assert_eq!(std::fs::metadata(&door).unwrap().permissions().mode() & 0o777, 0o660);
    is_served(&at(&door));
}
