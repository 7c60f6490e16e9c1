//! The command line: every command parses to what it means, every error text is asserted.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::address::Address;
use crate::attach::Device;
use crate::control::fake::{FakeDesk, WAIT};
use crate::control::server::Server;
use crate::control::wire::{
    AttachRequest, Done, Owner, Ownership, Phase, Progress, Request, SetRequest, Synchronous, Transport, Verify, Word,
    text,
};
use crate::disk::Cache;
use crate::domain::Disk;
use crate::door_at::DoorAt;
use crate::limits::{CONNECTIONS_PER_DISK_MAX, DOWNTIME_LIMIT_DEFAULT_MS};
use crate::listener::Listener;
use crate::options::{ExportFile, Lifetime};
use crate::place::Place;
use crate::progress::{Display, Form};
use crate::vmm::Vmm;

fn parsed(line: &[&str]) -> Result<Parsed, Problem> {
    let args: Vec<String> = line.iter().map(|arg| (*arg).to_owned()).collect();
    parse(&args)
}

fn command(line: &str) -> Command {
    // As a shell splits it: examples are pasted.
    let args = crate::command::words(line).unwrap_or_default();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    parsed(&args).unwrap_or_else(|problem| panic!("{line}: {problem}")).command
}

/// Asserts the text of a usage error and what it hints at.
fn wrong(line: &str, text: &str) {
    let args: Vec<&str> = line.split_whitespace().collect();
    let problem = parsed(&args).expect_err(line);
    assert_eq!(problem.to_string(), format!("blockferry: {text}"), "{line}");
    assert_eq!(problem.exit, Exit::Usage);
}

/// What is said of a bad name.
const NAMES: &str = "no spaces, slashes, commas, equal signs, quotes, nor '.' or '-' first";

fn unix(path: &str) -> Address {
    Address::Unix(path.into())
}

fn door(guest: &str) -> GuestDoor {
    let control = unix(&format!("/run/blockferry/{guest}/control.sock"));
    GuestDoor { guest: guest.to_owned(), control, insecure_plaintext: false }
}

#[test]
fn serve_has_its_defaults() {
    let expected = ServeOptions {
        guest: "g1".to_owned(),
        disks: vec![Disk::parse("vda,file=/d/g1.raw").expect("a disk")],
        domain_xml: None,
        state: PathBuf::from("/var/lib/blockferry/g1"),
        volatile_state: false,
        nbd: vec![unix("/run/blockferry/g1/nbd.sock").into()],
        listen: None,
        control: vec![unix("/run/blockferry/g1/control.sock").into()],
        control_ports: Vec::new(),
        vmm: Vmm::None,
        insecure_plaintext: false,
        json: false,
    };
    assert_eq!(command("serve g1 --disk vda,file=/d/g1.raw"), Command::Serve(expected));
}

#[test]
fn serve_takes_every_option() {
    let line = "serve --disk vda,file=/d/a.raw,size=1G g1 --disk=vdb,external --nbd unix:///n1 --nbd unix:///n2 \
                --listen tcp://[::]:0 --control unix:///c1 --control unix:///c2 --state /s --volatile-state \
                --vmm qmp:/run/g1.qmp --insecure-plaintext";
    let Command::Serve(options) = command(line) else { panic!("not serve") };
    assert_eq!(options.disks.len(), 2);
    assert_eq!(options.nbd, [unix("/n1"), unix("/n2")].map(DoorAt::from));
    assert_eq!(options.control, [unix("/c1"), unix("/c2")].map(DoorAt::from));
    assert_eq!(options.listen, Some(Address::Tcp { host: "::".to_owned(), port: 0 }.into()));
    assert_eq!(options.state, PathBuf::from("/s"));
    assert_eq!(options.vmm, Vmm::Qmp("/run/g1.qmp".into()));
    assert!(options.volatile_state && options.insecure_plaintext);
    options.check().expect("plaintext is allowed");
    let refused = ServeOptions { insecure_plaintext: false, ..options }.check().expect_err("plaintext");
    assert_eq!(refused.exit, Exit::Refused);
    assert!(refused.to_string().starts_with("blockferry: serve: tcp://[::]:0: TCP beyond this host"));
}

#[test]
fn a_control_door_may_be_a_port() {
    let Command::Serve(options) = command("serve g1 --disk a --control virtio:p0") else { panic!("not serve") };
    assert_eq!((options.control, options.control_ports), (Vec::new(), vec!["p0".to_owned()]));
    let line = "serve g1 --disk a --control virtio:p1 --control unix:///c --control virtio:p0";
    let Command::Serve(options) = command(line) else { panic!("not serve") };
    assert_eq!(
        (options.control, options.control_ports),
        (vec![unix("/c").into()], vec!["p1".to_owned(), "p0".to_owned()])
    );
}

/// Where a port makes no sense.
const A_PORT: &str = "a virtio port is a door of serve --control inside the machine; from outside it is the socket of \
                      its chardev: unix:///PATH";

#[test]
fn every_wrong_serve_says_what_is_wrong() {
    let named = "is not a guest's name: no spaces, slashes, commas, equal signs, quotes, nor '.' or '-' first";
    for (line, text) in [
        ("serve", "serve: GUEST: missing".to_owned()),
        ("serve g1", "serve: --disk: a guest has at least one".to_owned()),
        ("serve g1 g2 --disk a", "serve: g2: one argument too many".to_owned()),
        ("serve ../g --disk a", format!("serve: GUEST: '../g' {named}")),
        ("serve g1 --disk", "serve: --disk: needs a value".to_owned()),
        ("serve g1 --disk a --disk a", "serve: --disk: disk a is given twice".to_owned()),
        ("serve g1 --disk a,file=/x --disk b,file=/x", "serve: --disk: disks a and b have the same file /x".to_owned()),
        ("serve g1 --disk a,external,file=/x", "serve: --disk: disk a: 'external' and file= exclude each other".into()),
        ("serve g1 --disk a --listen tcp://b", "serve: --listen: 'tcp://b' lacks a port: tcp://HOST:PORT".to_owned()),
        ("serve g1 --disk a --nbd fd:x", "serve: --nbd: 'fd:x': 'x' is not a descriptor (0 to 65535)".to_owned()),
        (
            "serve g1 --disk a --control virtio:x --control unix:///c --control virtio:x",
            "serve: --control: the port x is named twice".to_owned(),
        ),
        (
            "serve g1 --disk a --control virtio:",
            "serve: --control: 'virtio:' lacks the port's name: virtio:PORTNAME".to_owned(),
        ),
        ("serve g1 --disk a --nbd virtio:x", format!("serve: --nbd: 'virtio:x': {A_PORT}")),
        ("serve g1 --disk a --listen virtio:x", format!("serve: --listen: 'virtio:x': {A_PORT}")),
        ("serve g1 --disk a --state=", "serve: --state: the path is empty".to_owned()),
        ("serve g1 --disk a --vmm qmp:q", "serve: --vmm: 'qmp:q': the path is not absolute".to_owned()),
        (
            "serve g1 --disk a --vmm xen",
            "serve: --vmm: 'xen' is not known; use none, qmp:PATH or hook:PROGRAM".to_owned(),
        ),
        ("serve g1 --disk a --domain-xml f", "serve: --domain-xml: it stands instead of --disk".to_owned()),
        ("serve g1 --domain-xml f --domain-xml f", "serve: --domain-xml: given twice".to_owned()),
        ("serve g1 --disk a --tls-dir d", "serve: --tls-dir: not built yet".to_owned()),
        ("serve g1 --disk a --key f", "serve: --key: not built yet".to_owned()),
        ("serve g1 --disk a --peers f", "serve: --peers: not built yet".to_owned()),
        ("serve g1 --disk a --bogus", "serve: --bogus: there is no such option".to_owned()),
        ("serve g1 --disk a -x", "serve: -x: there is no such option".to_owned()),
        ("serve g1 --disk a --volatile-state=1", "serve: --volatile-state: takes no value".to_owned()),
        ("serve g1 --disk a --listen unix:///a --listen unix:///b", "serve: --listen: given twice".to_owned()),
    ] {
        wrong(line, &text);
    }
}

#[test]
fn migrate_has_its_defaults_and_accepts_what_is_today() {
    let expected = MigrateOptions {
        keep_partial: false,
        heedless: false,
        door: door("g1"),
        destination: Place::At(Address::Tcp { host: "b".to_owned(), port: 49152 }),
        overwrite: false,
        incremental: false,
        same_base: false,
        verify: Verify::Written,
        disks: vec![],
        bandwidth_bytes: 0,
        downtime_limit_ms: 300,
        hold: false,
        connections: 0,
        synchronous: Synchronous::Auto,
        detach: false,
        transport: Transport::Auto,
    };
    assert_eq!(command("migrate g1 tcp://b:49152"), Command::Migrate(expected.clone()));
    for today in ["--copy-storage-all", "--verify written", "--transport auto", "--synchronous auto"] {
        assert_eq!(command(&format!("migrate g1 tcp://b:49152 {today}")), Command::Migrate(expected.clone()));
    }
}

#[test]
fn migrate_takes_every_option_and_they_all_travel() {
    let line = "migrate g1 unix:///b.sock --overwrite --migrate-disks vda,vdb --bandwidth 100M --downtime-limit 50 \
                --hold --detach --connections 3 --insecure-plaintext --control unix:///c";
    let Command::Migrate(options) = command(line) else { panic!("not migrate") };
    assert_eq!(options.door.control, unix("/c"));
    let request = options.request();
    assert_eq!(request.destination, "unix:///b.sock");
    assert_eq!(request.disks, ["vda", "vdb"].map(text::<64>));
    assert_eq!((request.bandwidth_bytes, request.downtime_limit_ms, request.connections), (100 << 20, 50, 3));
    assert!(request.overwrite && request.hold && request.detach && request.insecure_plaintext);
    assert!(!request.incremental);
    for mode in [Synchronous::Auto, Synchronous::Always, Synchronous::Never] {
        let line = format!("migrate g1 unix:///b --synchronous {}", mode.word());
        let Command::Migrate(options) = command(&line) else { panic!("not migrate") };
        assert_eq!(options.request().synchronous, mode);
    }
    for (line, incremental, verify) in [
        ("--copy-storage-inc --verify full", true, Verify::Full),
        ("--verify none", false, Verify::None),
        ("--verify=written", false, Verify::Written),
    ] {
        let Command::Migrate(options) = command(&format!("migrate g1 unix:///b {line}")) else { panic!("not migrate") };
        assert_eq!((options.request().incremental, options.request().verify), (incremental, verify));
    }
}

#[test]
fn a_command_may_be_the_way_to_the_destination_and_a_guest_may_be_brought_here() {
    let line = ["migrate", "g1", "exec:ssh -p 22 'B' blockferry accept g1", "--transport", "stream"];
    let parsed = parse(&line.map(str::to_owned)).expect("a command line");
    let Command::Migrate(options) = parsed.command else { panic!("not migrate") };
    assert_eq!(options.request().destination, "exec:ssh -p 22 'B' blockferry accept g1");
    assert_eq!(options.request().transport, Transport::Stream);
    for (word, transport) in [("nbd", Transport::Nbd), ("auto", Transport::Auto)] {
        let Command::Migrate(options) = command(&format!("migrate g1 unix:///b --transport {word}")) else {
            panic!("not migrate")
        };
        assert_eq!(options.request().transport, transport);
    }
    assert_eq!(
        command("accept g1 --control unix:///c"),
        Command::Accept(GuestDoor { control: unix("/c"), ..door("g1") })
    );
    wrong("accept", "accept: GUEST: missing");
}

#[test]
fn every_wrong_migrate_says_what_is_wrong() {
    let whole = "is not a whole number from";
    for (options, text) in [
        ("--synchronous x", "--synchronous: 'x' is neither auto, always nor never".to_owned()),
        ("--transport x", "--transport: 'x' is neither auto, nbd nor stream".to_owned()),
        ("--verify x", "--verify: 'x' is neither written, full nor none".to_owned()),
        ("--copy-storage-inc --overwrite", "--copy-storage-inc: cannot be combined with --overwrite".to_owned()),
        ("--same-base", "--same-base: says what need not be compared: only with --copy-storage-inc".to_owned()),
        (
            "--copy-storage-all --copy-storage-inc",
            "--copy-storage-inc: cannot be combined with --copy-storage-all".to_owned(),
        ),
        ("--plain", "DEST: 'tcp://b:1': --plain goes to an NBD URI".to_owned()),
        ("--tls-dir d", "--tls-dir: not built yet".to_owned()),
        ("--key f", "--key: not built yet".to_owned()),
        ("--peers f", "--peers: not built yet".to_owned()),
        ("--bandwidth fast", "--bandwidth: 'fast' is not a size: bytes, or a whole number of K, M, G or T".to_owned()),
        ("--downtime-limit 0", format!("--downtime-limit: '0' {whole} 1 to 60000")),
        ("--downtime-limit 60001", format!("--downtime-limit: '60001' {whole} 1 to 60000")),
        ("--downtime-limit +5", format!("--downtime-limit: '+5' {whole} 1 to 60000")),
        ("--downtime-limit 5ms", format!("--downtime-limit: '5ms' {whole} 1 to 60000")),
        ("--connections 9", format!("--connections: '9' {whole} 1 to 8")),
        ("--connections 0", format!("--connections: '0' {whole} 1 to 8")),
        ("--migrate-disks vda,", "--migrate-disks: the disk's name is empty".to_owned()),
        ("--migrate-disks vda,vda", "--migrate-disks: disk vda is named twice".to_owned()),
        ("--log loud", "--log: 'loud' is not a level: off, error, warn, info, debug or trace".to_owned()),
        ("more", "more: one argument too many".to_owned()),
    ] {
        wrong(&format!("migrate g1 tcp://b:1 {options}"), &format!("migrate: {text}"));
    }
    wrong("migrate", "migrate: GUEST: missing");
    wrong("migrate g1", "migrate: DEST: missing");
    wrong("migrate g1 tcp://b:0", "migrate: DEST: 'tcp://b:0': port 0 can be listened on only");
    wrong("migrate g1 b:1", "migrate: DEST: 'b:1' is not an address: unix:///PATH or tcp://HOST:PORT");
    wrong("migrate g1 nbd://b/x", "migrate: DEST: 'nbd://b/x': a plain NBD server: see --plain");
    wrong("migrate g1 exec:", "migrate: DEST: 'exec:': the command names no program");
    wrong(
        "migrate g1 exec:cat --transport nbd",
        "migrate: --transport nbd: 'exec:cat' is one connection: no NBD beside it",
    );
    wrong(
        "serve g1 --disk vda --listen exec:cat",
        "serve: --listen: 'exec:cat': exec: addresses are not supported yet",
    );
    wrong("migrate g1 vsock://2:1", "migrate: DEST: 'vsock://2:1': vsock:// addresses are not supported yet");
    let many: Vec<String> = (0..33).map(|i| format!("v{i}")).collect();
    let line = format!("migrate g1 tcp://b:1 --migrate-disks {}", many.join(","));
    wrong(&line, "migrate: --migrate-disks: 33 disks are more than 32");
}

#[test]
fn the_short_commands_parse() {
    assert_eq!(command("claim g1"), Command::Claim(ClaimOptions { door: door("g1"), discard_record: false }));
    let Command::Claim(options) = command("claim g1 --discard-record") else { panic!("not claim") };
    assert!(options.discard_record);
    assert_eq!(command("switch g1"), Command::Switch(door("g1")));
    assert_eq!(command("cancel g1"), Command::Cancel(door("g1")));
    assert_eq!(command("status g1"), Command::Status(door("g1")));
    let change = SetRequest { bandwidth_bytes: Some(0), downtime_limit_ms: Some(9) };
    let expected = Command::Set(SetOptions { door: door("g1"), change });
    assert_eq!(command("set g1 --bandwidth 0 --downtime-limit 9"), expected);
    let tcp =
        GuestDoor { control: Address::Tcp { host: "h".to_owned(), port: 1 }, insecure_plaintext: true, ..door("g1") };
    assert_eq!(command("status g1 --control tcp://h:1 --insecure-plaintext"), Command::Status(tcp));
    for name in ["claim", "switch", "cancel", "status", "set", "who-owns", "recover"] {
        wrong(name, &format!("{name}: GUEST: missing"));
        wrong(&format!("{name} g1 x"), &format!("{name}: x: one argument too many"));
    }
    wrong("set g1", "set: g1: nothing to change: --bandwidth SIZE or --downtime-limit MS");
    wrong("status g1 --control virtio:x", &format!("status: --control: 'virtio:x': {A_PORT}"));
    wrong("status g1 --control x", "status: --control: 'x' is not an address: unix:///PATH or tcp://HOST:PORT");
}

#[test]
fn who_owns_and_recover_parse() {
    let asked = |state: &str| WhoOwnsOptions { door: door("g1"), state: PathBuf::from(state) };
    assert_eq!(command("who-owns g1"), Command::WhoOwns(asked("/var/lib/blockferry/g1")));
    assert_eq!(command("who-owns g1 --state /s"), Command::WhoOwns(asked("/s")));
    for (line, word) in [
        ("recover g1", Word::Ask),
        ("recover g1 --take-ownership", Word::TakeOwnership),
        ("recover g1 --forget-peer", Word::ForgetPeer),
        ("recover g1 --forget", Word::Forget),
    ] {
        assert_eq!(command(line), Command::Recover(RecoverOptions { door: door("g1"), word }));
    }
    wrong("recover g1 --take-ownership --forget", "recover: --forget: excludes --take-ownership");
    wrong("recover g1 --forget-peer --forget", "recover: --forget: excludes --forget-peer");
    wrong("who-owns g1 --state=", "who-owns: --state: the path is empty");
}

#[test]
fn export_parses_and_says_what_is_wrong() {
    let file = |name: &str, path: &str| ExportFile { name: name.to_owned(), path: PathBuf::from(path) };
    let expected = ExportOptions {
        files: vec![file("", "disk.raw")],
        nbd: vec![Address::Tcp { host: "127.0.0.1".to_owned(), port: 10809 }.into()],
        read_only: false,
        cache: Cache::Writeback,
        lifetime: Lifetime::Persistent,
        insecure_plaintext: false,
        json: false,
    };
    assert_eq!(command("export disk.raw"), Command::Export(expected.clone()));
    assert_eq!(command("export disk.raw --persistent"), Command::Export(expected));
    let Command::Export(options) =
        command("export a=/d/x=y.raw b=b.raw --nbd unix:///x --nbd tcp://h:1 --read-only --cache none --once")
    else {
        panic!("not export")
    };
    assert_eq!(options.files, [file("a", "/d/x=y.raw"), file("b", "b.raw")]);
    assert_eq!((options.nbd.len(), options.read_only, options.cache), (2, true, Cache::None));
    assert_eq!(options.lifetime, Lifetime::Once);
    let Command::Export(options) = command("export ./a=b.raw --nbd tcp://192.0.2.1:1") else { panic!("not export") };
    assert_eq!(options.files, [file("", "./a=b.raw")]);
    assert_eq!(options.check().expect_err("plaintext").exit, Exit::Refused);
    wrong("export", "export: FILE: missing");
    wrong("export a b", "export: a: each of several files needs a name: NAME=FILE");
    wrong("export x=a x=b", "export: x: the name is given twice");
    wrong("export x=", "export: 'x=': the path is empty");
    wrong("export .x=a", &format!("export: '.x=a': '.x' is not a disk's name: {NAMES}"));
    wrong("export a --cache x", "export: --cache: 'x' is neither writeback nor none");
    wrong("export a --persistent --once", "export: --once: excludes --persistent");
    wrong("export a --tls-dir d", "export: --tls-dir: not built yet");
    let many: Vec<String> = (0..33).map(|i| format!("v{i}=f")).collect();
    wrong(&format!("export {}", many.join(" ")), "export: FILE: 33 files are more than 32");
}

#[test]
fn attach_and_detach_take_devices_of_the_driver() {
    let Command::Attach(options) = command("attach g1 vda /dev/nbd0") else { panic!("not attach") };
    assert_eq!(options.door, door("g1"));
    assert_eq!((&*options.request.disk, &*options.request.device), ("vda", "/dev/nbd0"));
    assert_eq!(options.request.wait_s, None);
    let Command::Attach(options) = command("attach g1 vda /dev/nbd1 --wait 0 --control unix:///c") else {
        panic!("not attach")
    };
    assert_eq!((options.door.control, options.request.wait_s), (unix("/c"), Some(0)));
    let detach = DetachOptions {
        device: Device::parse("/dev/nbd15").expect("a device"),
        control: None,
        insecure_plaintext: false,
        force: false,
    };
    assert_eq!(command("detach /dev/nbd15"), Command::Detach(detach));
    let Command::Detach(options) = command("detach /dev/nbd15 --force --control unix:///c") else {
        panic!("not detach")
    };
    assert_eq!((options.force, options.control), (true, Some(unix("/c"))));
    let bad = "not a device of the kernel's nbd driver: /dev/nbdN, N from 0 to 32767";
    wrong("attach g1 vda /dev/sda", &format!("attach: /dev/sda: {bad}"));
    wrong("detach nbd0", &format!("detach: nbd0: {bad}"));
    wrong("attach g1 vda", "attach: /dev/nbdN: missing");
    wrong("attach g1 v/a /dev/nbd0", &format!("attach: DISK: 'v/a' is not a disk's name: {NAMES}"));
    wrong("attach g1 vda /dev/nbd0 --wait 9999999", "attach: --wait: '9999999' is not a whole number from 0 to 604800");
    wrong("detach", "detach: /dev/nbdN: missing");
}

#[test]
fn a_device_that_is_nobodys_is_not_detached() {
    let options = DetachOptions {
        device: Device::parse("/dev/nbd32767").expect("a device"),
        control: None,
        insecure_plaintext: false,
        force: true,
    };
    let problem = attach::detach(&options, false).expect_err("there is no such device");
    assert_eq!(problem.to_string(), "blockferry: detach: /dev/nbd32767: is not attached");
    assert_eq!(problem.exit, Exit::Refused);
}

#[test]
fn attach_says_what_has_become_of_the_disk() {
    let desk = FakeDesk::default();
    desk.change(|inner| inner.owns = true);
    with_guest(&desk, |door| {
        let request = AttachRequest { disk: text("vda"), device: text("/dev/nbd0"), wait_s: Some(9) };
        let options = AttachOptions { door: door.clone(), request };
        assert_eq!(attach::attach(&options, false), Ok("g1: disk vda is /dev/nbd0\n".to_owned()));
        let json = attach::attach(&options, true).expect("attached");
        assert!(json.ends_with("\"disk\":\"vda\",\"device\":\"/dev/nbd0\"}\n"), "{json}");
    });
    assert_eq!(desk.calls(), ["attach vda /dev/nbd0 Some(9)"; 2]);
}

#[test]
fn every_command_of_the_contract_is_known() {
    for name in LATER {
        wrong(name, &format!("command: {name}: not built yet"));
        wrong(&format!("help {name}"), &format!("command: {name}: not built yet"));
    }
    let all =
        "serve claim migrate switch cancel status who-owns set recover accept attach detach export copy info keygen";
    for name in all.split(' ') {
        assert!(LATER.contains(&name) || find(name).is_ok(), "{name}");
    }
    wrong("frobnicate", "command: frobnicate: there is no such command");
    wrong("help frobnicate", "command: frobnicate: there is no such command");
    wrong("help serve x", "help: x: one argument too many");
    wrong("version x", "command: x: one argument too many");
    wrong("", "command: none given");
    assert_eq!(hint("migrate"), "try 'blockferry migrate --help'");
    assert_eq!(hint("command"), "try 'blockferry help'");
    for words in [&["version", "--json"][..], &["--version", "--log", "info"], &["version", "--log=info", "--json"]] {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        assert!(matches!(parse(&words), Ok(Parsed { command: Command::Version, .. })), "{words:?}");
    }
}

#[test]
fn help_is_there_whatever_else_is_wrong_and_its_examples_parse() {
    for (spec, _) in COMMANDS {
        for line in
            [format!("help {}", spec.name), format!("{} --bogus --help", spec.name), format!("{} -h", spec.name)]
        {
            assert_eq!(command(&line), Command::Help(spec.help()), "{line}");
        }
        let help = spec.help();
        assert!(help.contains(&format!("usage: blockferry {} ", spec.name)));
        assert!(help.contains("--json") && help.contains("--version"));
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
        let examples: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  blockferry ")).collect();
        let pasted: Vec<_> = examples.iter().filter(|line| line.starts_with(spec.name)).collect();
        assert!(!pasted.is_empty(), "{}", spec.name);
        for example in pasted {
            command(example);
        }
        for option in spec.options {
            assert_eq!(help.contains(&format!("--{} ", option.name)), !option.help.is_empty(), "{}", option.name);
        }
    }
    let general = help::general();
    for line in ["help", "--help", "-h"] {
        assert_eq!(command(line), Command::Help(general.clone()));
    }
    for example in general.lines().filter_map(|line| line.split_once("$ blockferry ")) {
        command(example.1.split("  ").next().unwrap_or_default());
    }
}

#[test]
fn the_help_tells_the_limits_that_there_are() {
    let help = migrate::SPEC.help();
    assert!(help.contains(&format!("1 to {CONNECTIONS_PER_DISK_MAX}")));
    assert!(help.contains(&format!("[{DOWNTIME_LIMIT_DEFAULT_MS}]")));
}

#[test]
fn the_version_is_a_command_and_an_option() {
    for line in ["version", "--version", "serve --version"] {
        assert_eq!(command(line), Command::Version);
    }
}

#[test]
fn common_options_are_read_everywhere() {
    let parsed = parsed(&["status", "g1", "--json", "--log", "debug"]).expect("parses");
    assert!(parsed.json);
    assert_eq!(parsed.log, Some(LevelFilter::Debug));
    assert_eq!(level(None, Some("trace")).expect("a level"), LevelFilter::Trace);
    assert_eq!(level(Some(LevelFilter::Off), Some("nonsense")).expect("a level"), LevelFilter::Off);
    assert_eq!(level(None, Some("")).expect("a level"), LevelFilter::Warn);
    assert_eq!(
        level(None, Some("loud")).expect_err("not a level").to_string(),
        "blockferry: environment: BLOCKFERRY_LOG: 'loud' is not a level: off, error, warn, info, debug or trace"
    );
}

#[test]
fn run_calls_what_was_plugged_in_and_exits_as_it_says() {
    static SERVED: AtomicUsize = AtomicUsize::new(0);
    let entry = Entry {
        serve: |options| {
            assert!(options.json);
            SERVED.fetch_add(1, Ordering::SeqCst);
            Ok(())
        },
        export: |options| Err(Problem::fatal("export", options.files[0].path.display(), "no such file")),
    };
    let go = |line: &str| run(line.split_whitespace().map(OsString::from), &entry);
    assert_eq!(go("serve g1 --disk a --json"), Exit::Done);
    assert_eq!(SERVED.load(Ordering::SeqCst), 1);
    assert_eq!(go("export x"), Exit::Refused);
    assert_eq!(go("serve g1 --disk a --json --listen tcp://192.0.2.1:1"), Exit::Refused);
    assert_eq!(go("serve"), Exit::Usage);
    assert_eq!(SERVED.load(Ordering::SeqCst), 1);
    let not_text = std::os::unix::ffi::OsStringExt::from_vec(vec![b'a', 0xff]);
    assert_eq!(run([not_text], &entry), Exit::Usage);
}

/// A served guest whose desk is a fake, and a door to it.
fn with_guest(desk: &FakeDesk, test: impl FnOnce(&GuestDoor)) {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(&Address::Unix(dir.path().join("c"))).expect("binds");
    let server = Server::new(desk);
    thread::scope(|scope| {
        scope.spawn(|| server.run(&listener).expect("ends well"));
        // Stops the server also when the test panics: the scope waits for it.
        struct Stop<'a>(&'a Listener);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        let _stop = Stop(&listener);
        test(&GuestDoor { control: listener.address().clone(), ..door("g1") });
    });
}

#[test]
fn the_short_commands_reach_the_guest() {
    let desk = FakeDesk::default();
    with_guest(&desk, |door| {
        assert_eq!(guest::switch(door, false), Ok("g1: handing over\n".to_owned()));
        assert_eq!(
            guest::switch(door, true),
            Ok("{\"type\":\"ok\",\"operation\":\"switch\",\"guest\":\"g1\"}\n".to_owned())
        );
        assert_eq!(guest::status(door, false), Ok("g1: owner order=0.0\n".to_owned()));
        let change = SetRequest { bandwidth_bytes: Some(5), downtime_limit_ms: None };
        guest::set(&SetOptions { door: door.clone(), change }, false).expect("sets");
        let claim = ClaimOptions { door: door.clone(), discard_record: true };
        let problem = guest::claim(&claim, false).expect_err("refused");
        assert_eq!(problem.to_string(), "blockferry: claim: g1: there is a record");
    });
    assert_eq!(desk.calls(), ["switch", "switch", "set Some(5)", "claim true"]);
}

#[test]
fn who_owns_and_recover_exit_as_they_answer() {
    let desk = FakeDesk::default();
    with_guest(&desk, |door| {
        let who = WhoOwnsOptions { door: door.clone(), state: PathBuf::from("/nowhere") };
        let recover = RecoverOptions { door: door.clone(), word: Word::Forget };
        for (owner, exit) in
            [(Owner::Here, Exit::Done), (Owner::Elsewhere, Exit::GaveAway), (Owner::Unknown, Exit::Unknown)]
        {
            desk.change(|inner| inner.ownership = Ownership { guest: text("g1"), owner, ..Ownership::default() });
            assert_eq!(recover::who_owns(&who, true).map(|(_, exit)| exit), Ok(exit));
            // The word was not carried out: the exit says who owns.
            assert_eq!(recover::recover(&recover, true).map(|(_, exit)| exit), Ok(exit));
        }
        // What is thrown away is shown first.
        desk.change(|inner| inner.ownership.rejected = true);
        let claim = ClaimOptions { door: door.clone(), discard_record: true };
        guest::claim(&claim, true).expect_err("refused");
    });
    assert_eq!(desk.calls(), ["recover Forget", "recover Forget", "recover Forget", "claim true"]);
    let nobody = WhoOwnsOptions { door: door("g1"), state: PathBuf::from("/nowhere") };
    let problem = recover::who_owns(&nobody, false).expect_err("nobody");
    assert_eq!(problem.exit, Exit::Unknown);
    assert!(problem.to_string().ends_with("and its record in /nowhere cannot be read: No such file or directory"));
}

#[test]
fn status_shows_a_running_and_an_ended_migration() {
    let desk = FakeDesk::default();
    with_guest(&desk, |door| {
        let running = Progress { attempt: 1, phase: Phase::Bulk, ..Progress::default() };
        desk.change(|inner| inner.running = Some(running));
        assert_eq!(
            guest::status(door, false),
            Ok("g1: owner order=0.0\ng1: bulk pass: 0 ms: copying; 0 B left, 0 B/s, dirty 0 B/s\n".to_owned())
        );
        desk.change(|inner| {
            inner.running = None;
            inner.done = Some(Done { exit: 3, owner: Owner::Here, message: text("no room"), ..Done::default() });
        });
        assert_eq!(
            guest::status(door, false),
            Ok("g1: owner order=0.0\nlast migration: no room; this source still owns and serves the guest\n"
                .to_owned())
        );
        let json = guest::status(door, true).expect("a status");
        let mut lines = json.lines();
        assert!(lines.next().is_some_and(|line| line.starts_with("{\"type\":\"status\",")));
        assert!(lines.next().is_some_and(|line| line.starts_with("{\"type\":\"done\",")));
    });
}

#[test]
fn a_migration_is_followed_and_exits_as_it_ended() {
    let desk = FakeDesk::default();
    with_guest(&desk, |door| {
        let mut client = door.connect("migrate").expect("connects");
        client.tell(&Request::Migrate(Default::default())).expect("starts");
        thread::scope(|scope| {
            scope.spawn(|| {
                desk.wait_for("migrate");
                desk.end(Exit::Aborted, "the link broke");
            });
            let mut display = Display::new(Vec::new(), Form::Lines, "g1");
            let problem = migrate::follow(&mut client, &mut display).expect_err("aborted");
            assert_eq!(problem.exit, Exit::Aborted);
            assert!(problem.cause.starts_with("the link broke; "));
        });
    });
}

#[test]
fn a_process_that_dies_under_a_migration_is_not_known_from_here() {
    let desk = FakeDesk::default();
    let mut client = None;
    with_guest(&desk, |door| {
        let mut connected = door.connect("migrate").expect("connects");
        connected.tell(&Request::Migrate(Default::default())).expect("starts");
        client = Some(connected);
    });
    let mut client = client.expect("connected");
    let mut display = Display::new(Vec::new(), Form::Lines, "g1");
    let problem = migrate::follow(&mut client, &mut display).expect_err("gone");
    assert_eq!(problem.exit, Exit::Unknown);
    assert!(desk.wait_for("cancel Some(42)") < WAIT);
}

/// Reads a command line where sockets were passed on.
fn with_passed(line: &str, number: &str, names: Option<&str>) -> Result<Command, String> {
    let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let parsed = parse_with(&args, &crate::passed::Passed::reading(number, names));
    parsed.map(|parsed| parsed.command).map_err(|problem| {
        assert_eq!(problem.exit, Exit::Usage);
        problem.to_string()
    })
}

#[test]
fn sockets_that_were_passed_replace_the_defaults_and_add_to_what_is_given() {
    let Ok(Command::Serve(options)) = with_passed("serve g1 --disk a", "3", Some("nbd:control:migration")) else {
        panic!("not serve")
    };
    assert_eq!((options.nbd, options.control), (vec![DoorAt::Inherited(3)], vec![DoorAt::Inherited(4)]));
    assert_eq!(options.listen, Some(DoorAt::Inherited(5)));
    let Ok(Command::Serve(options)) = with_passed("serve g1 --disk a --nbd unix:///n", "1", None) else {
        panic!("not serve")
    };
    assert_eq!(options.nbd, [DoorAt::Inherited(3), unix("/n").into()]);
    assert_eq!(options.control, [unix("/run/blockferry/g1/control.sock").into()]);
    let Ok(Command::Export(options)) = with_passed("export x.raw", "1", None) else { panic!("not export") };
    assert_eq!(options.nbd, [DoorAt::Inherited(3)]);
    assert!(with_passed("status g1", "1", Some("wrong")).is_ok(), "a command without doors does not look");
}

#[test]
fn sockets_that_no_door_is_for_are_refused() {
    for (line, names, text) in [
        ("export x.raw", "control", "export: LISTEN_FDS: fd:3 is named control: this command has no such door"),
        ("serve g1 --disk a", "x", "serve: LISTEN_FDS: LISTEN_FDNAMES: 'x' is not a door: nbd, migration or control"),
        (
            "serve g1 --disk a --listen unix:///l",
            "migration",
            "serve: --listen: unix:///l would be a second migration door: a guest has one",
        ),
    ] {
        assert_eq!(with_passed(line, "1", Some(names)), Err(format!("blockferry: {text}")));
    }
}
