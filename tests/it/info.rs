//! `blockferry info` beside nbdinfo: the servers of the field, servers that know little, and whoever is no server.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use blockferry::nbd::wire;

use crate::copy::{nbdkit, path, serve};
use crate::exported::Exported;
use crate::harness::{DEADLINE, Program, blockferry, free_port, peer, scratch, until};
use crate::host::{Finished, run};
use crate::images::{disk_scratch, sparse_file};
use crate::json::Json;

const SIZE: u64 = 48 << 20;

/// Our words for what nbdinfo tells under these keys.
const CAN: [(&str, &str); 9] = [
    ("flush", "can_flush"),
    ("fua", "can_fua"),
    ("trim", "can_trim"),
    ("write-zeroes", "can_zero"),
    ("fast-zero", "can_fast_zero"),
    ("multi-conn", "can_multi_conn"),
    ("df", "can_df"),
    ("cache", "can_cache"),
    ("rotational", "is_rotational"),
];
/// Our block sizes, theirs, and what is assumed where the server tells none.
const BLOCKS: [(&str, &str, u64); 3] = [
    ("minimum_block_bytes", "block_size_minimum", 512),
    ("preferred_block_bytes", "block_size_preferred", 4096),
    ("maximum_payload_bytes", "block_size_maximum", 32 << 20),
];

fn info(uri: &str, options: &[&str]) -> Finished {
    run(blockferry().args(["info", uri]).args(options), DEADLINE)
}

/// An export, and its contexts.
type Shown = (Json, Vec<String>);

/// What `info --json` shows.
fn shown(uri: &str) -> Vec<Shown> {
    let mut exports: Vec<Shown> = Vec::new();
    for line in info(uri, &["--json"]).well().lines() {
        let line = Json::parse(line);
        match line.get("type").text() {
            "export" => exports.push((line, Vec::new())),
            "context" => {
                let (export, contexts) = exports.last_mut().expect("an export comes before its contexts");
                assert_eq!(line.get("export"), export.get("export"));
                contexts.push(line.get("context").text().to_owned());
            }
            other => panic!("{other}"),
        }
    }
    exports
}

fn field<'a>(json: &'a Json, name: &str) -> Option<&'a Json> {
    let Json::Fields(fields) = json else { panic!("no object with {name}: {json:?}") };
    fields.iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

/// What `info --json` shows, once it is what nbdinfo shows, asked for `uri` with these options.
fn shown_as_nbdinfo_does(uri: &str, options: &[&str]) -> Vec<Shown> {
    let ours = shown(uri);
    let Some(program) = peer("nbdinfo") else { return ours };
    let said = run(Command::new(program).args(["--json", "--no-content"]).args(options).arg(uri), DEADLINE).well();
    let server = Json::parse(&said);
    let theirs = server.get("exports").items();
    assert_eq!(ours.len(), theirs.len(), "{ours:?}\n{said}");
    for ((export, contexts), theirs) in ours.iter().zip(theirs) {
        assert_eq!(export.get("export"), theirs.get("export-name"));
        assert_eq!(export.get("size_bytes"), theirs.get("export-size"), "{export:?}");
        assert_eq!(export.get("read_only"), theirs.get("is_read_only"), "{export:?}");
        assert_eq!(export.get("structured_replies"), server.get("structured"), "{export:?}");
        let text = field(theirs, "description").map_or("", Json::text);
        assert_eq!(export.get("description").text(), text);
        let can: Vec<&str> = export.get("can").items().iter().map(Json::text).collect();
        for (word, key) in CAN {
            assert_eq!(can.contains(&word), theirs.get(key).is_true(), "{word}: {can:?}\n{said}");
        }
        for (key, their_key, assumed) in BLOCKS {
            assert_eq!(export.get(key).number(), field(theirs, their_key).map_or(assumed, Json::number), "{key}");
        }
        let their_contexts = field(theirs, "contexts").map_or(&[][..], Json::items);
        assert_eq!(contexts.iter().collect::<Vec<_>>(), their_contexts.iter().map(Json::text).collect::<Vec<_>>());
    }
    ours
}

/// What `info --map` shows of a context, once it is what nbdinfo shows: offset, length, flags, and our word for them.
fn mapped_as_nbdinfo_does(uri: &str, context: &str) -> Vec<(u64, u64, u64, String)> {
    let said = info(uri, &["--map", context, "--json"]).well();
    let number = |line: &Json, key| line.get(key).number();
    let ours: Vec<_> = said
        .lines()
        .map(|line| {
            let line = Json::parse(line);
            assert_eq!((line.get("type").text(), line.get("context").text()), ("extent", context));
            let [offset, length] = ["offset_bytes", "length_bytes"].map(|key| number(&line, key));
            (offset, length, number(&line, "flags"), line.get("state").text().to_owned())
        })
        .collect();
    let texts: String = ours.iter().map(|(at, long, flags, state)| format!("{at} {long} {flags} {state}\n")).collect();
    let text = info(uri, &["--map", context]).well();
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&text), words(&texts));
    if let Some(program) = peer("nbdinfo") {
        let said = run(Command::new(program).args(["--json", &format!("--map={context}"), uri]), DEADLINE).well();
        let theirs: Vec<_> = Json::parse(&said)
            .items()
            .iter()
            .map(|line| (number(line, "offset"), number(line, "length"), number(line, "type")))
            .collect();
        assert_eq!(ours.iter().map(|(at, long, flags, _)| (*at, *long, *flags)).collect::<Vec<_>>(), theirs);
    }
    ours
}

// ---- the servers of the field ------------------------------------------------------------------------------------

#[test]
fn maps_are_those_that_nbdinfo_shows() {
    let folder = disk_scratch();
    let image = folder.path().join("base");
    sparse_file(&image, SIZE, 1);
    let exported = Exported::start([format!("vda={}", image.display())]);
    let map = mapped_as_nbdinfo_does(&exported.unix("vda"), wire::BASE_ALLOCATION);
    assert_eq!(map[0], (0, 1 << 20, 0, "data".to_owned()));
    assert_eq!(map[1], (1 << 20, 3 << 20, 3, "hole,zero".to_owned()));
    assert_eq!((map.len(), map.last().map(|last| last.0 + last.1)), (24, Some(SIZE)));
    for (context, code, cause) in [
        ("qemu:dirty-bitmap:b0", 1, "the server has no metadata context 'qemu:dirty-bitmap:b0' for it"),
        (&"x".repeat(4096), 1, "the server has no metadata context 'xxx"),
        (&"x".repeat(4097), 2, "--map: a context's name has 1 to 4096 bytes"),
        ("", 2, "--map: a context's name has 1 to 4096 bytes"),
    ] {
        let refused = info(&exported.unix("vda"), &["--map", context]);
        assert!(refused.code == Some(code) && refused.stderr.contains(cause), "{refused:?}");
    }
    let refused = info(&exported.unix("vdb"), &["--map", wire::BASE_ALLOCATION]);
    assert_eq!(refused.code, Some(1), "{refused:?}");

    drop(exported);
    let (Some(img), Some(io), Some(nbd)) = (peer("qemu-img"), peer("qemu-io"), peer("qemu-nbd")) else { return };
    let (top, listener) = (folder.path().join("top"), folder.path().join("sock"));
    let of_top = |command: &mut Command| run(command.arg(&top), DEADLINE).well();
    let backing = format!("{}", image.display());
    of_top(Command::new(&img).args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing]));
    run(Command::new(&img).args(["bitmap", "--add"]).arg(&top).arg("b0"), DEADLINE).well();
    of_top(Command::new(io).args(["-f", "qcow2", "-c", "write 1M 64k", "-c", "write -z 8M 1M"]));
    let mut command = Command::new(nbd);
    command.args(["--format=qcow2", "--read-only", "--persistent", "--shared=4", "--bitmap=b0", "--allocation-depth"]);
    let mut server = Program::start(command.arg("--socket").arg(&listener).arg(&top));
    drop(server.connect_unix(&listener));
    let uri = format!("nbd+unix:///?socket={}", listener.display());
    for (context, states) in [
        ("qemu:dirty-bitmap:b0", ["clean", "dirty"]),
        ("qemu:allocation-depth", ["backing", "local"]),
        (wire::BASE_ALLOCATION, ["data", "hole,zero"]),
    ] {
        let map = mapped_as_nbdinfo_does(&uri, context);
        assert_eq!((map[0].3.as_str(), map[1].3.as_str()), (states[0], states[1]), "{context}: {map:?}");
    }
}

#[test]
fn nbdkit_is_shown_as_nbdinfo_shows_it() {
    let cases: [(&str, &[&str]); 9] = [
        ("", &["memory", "48M"]),
        ("", &["--no-sr", "memory", "48M"]),
        ("", &["--read-only", "--filter=noparallel", "--filter=noextents", "memory", "48M"]),
        (
            "",
            &["--filter=nozero", "--filter=nocache", "--filter=multi-conn", "memory", "48M", "multi-conn-mode=disable"],
        ),
        (
            "",
            &[
                "--filter=blocksize-policy",
                "memory",
                "48M",
                "blocksize-minimum=4096",
                "blocksize-preferred=64K",
                "blocksize-maximum=1M",
            ],
        ),
        (
            "a",
            &["--filter=exportname", "memory", "48M", "exportname=a", "exportdesc=fixed:two\nlines \u{1b}[1m \u{e9}"],
        ),
        // Its newstyle is not fixed: it can only be opened, with a short answer or a long one.
        ("", &["--mask-handshake=0", "memory", "48M"]),
        ("a", &["--mask-handshake=2", "--read-only", "memory", "48M"]),
        // And one that is: it knows everything.
        ("a", &["--mask-handshake=1", "memory", "48M"]),
    ];
    for (export, arguments) in cases {
        let folder = scratch();
        let Some((_server, uri)) = nbdkit(folder.path(), arguments) else { return };
        let uri = uri.replace(":///?", &format!(":///{export}?"));
        let exports = shown_as_nbdinfo_does(&uri, &[]);
        assert_eq!(exports[0].0.get("size_bytes").number(), SIZE);
        assert_eq!(exports[0].0.get("uri").text(), uri);
    }
}

#[test]
fn people_are_told_the_same() {
    let folder = scratch();
    let arguments = [
        "--filter=exportname",
        "--filter=blocksize-policy",
        "memory",
        "48M",
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
        "exportname=a",
        "exportdesc=fixed:two\nlines \u{1b}[1m",
    ];
    let Some((_server, uri)) = nbdkit(folder.path(), &arguments) else { return };
    let expected = "export 'a':\n\
                    \x20 size: 50331648 (48.0 MiB)\n\
                    \x20 description: two\\nlines \\u{1b}[1m\n\
                    \x20 read-only: no\n\
                    \x20 structured replies: yes\n\
                    \x20 can: flush fua trim write-zeroes fast-zero multi-conn df cache\n\
                    \x20 block sizes: minimum 4096, preferred 65536\n\
                    \x20 maximum payload: 1048576\n\
                    \x20 context: base:allocation\n";
    assert_eq!(info(&uri.replace(":///?", ":///a?"), &[]).well(), expected);
}

#[test]
fn a_description_without_an_end_is_cut() {
    let folder = scratch();
    // Characters of two bytes, behind one of one byte: the limit is in the middle of one.
    let long = format!("exportdesc=fixed:x{}", "\u{e9}".repeat(1000));
    let Some((_server, uri)) = nbdkit(folder.path(), &["--filter=exportname", "memory", "48M", &long]) else { return };
    let told = shown(&uri)[0].0.get("description").text().to_owned();
    assert_eq!(told, format!("x{}", "\u{e9}".repeat(511)));
}

#[test]
fn every_export_of_a_list_is_shown() {
    let folder = scratch();
    let names = ["exportname-list=explicit", "exportname=b b", "exportname=\u{e9}/a"];
    let arguments = [&["--filter=exportname", "memory", "48M"][..], &names].concat();
    let Some((_server, uri)) = nbdkit(folder.path(), &arguments) else { return };
    let exports = shown_as_nbdinfo_does(&uri, &["--list"]);
    let uris: Vec<String> = exports.iter().map(|(export, _)| export.get("uri").text().to_owned()).collect();
    let encoded = ["b%20b", "%C3%A9/a"].map(|name| uri.replace(":///?", &format!(":///{name}?")));
    assert_eq!(uris, encoded);
    for uri in uris {
        shown_as_nbdinfo_does(&uri, &[]);
    }
}

#[test]
fn one_export_that_is_refused_keeps_the_others_from_nobody() {
    let folder = scratch();
    let open = "open=if [ \"$3\" != b ]; then exit 0; fi; echo 'EPERM not for you' >&2; exit 1";
    let list = "list_exports=printf 'NAMES\na\nb\nc\n'";
    let arguments = ["eval", list, open, "get_size=echo 1M", "pread=exit 1"];
    let Some((_server, uri)) = nbdkit(folder.path(), &arguments) else { return };
    let told = info(&uri, &[]);
    assert_eq!(told.code, Some(1), "{told:?}");
    for name in ["a", "c"] {
        assert!(told.stdout.contains(&format!("export '{name}':\n  size: 1048576")), "{told:?}");
    }
    assert!(!told.stdout.contains("export 'b'") && told.stderr.contains("/b?"), "{told:?}");
}

#[test]
fn our_own_exports() {
    let folder = scratch();
    let images = ["a.img", "b.img"].map(|name| folder.path().join(name));
    for image in &images {
        File::create(image).unwrap().set_len(SIZE + 512).unwrap();
    }
    let exported =
        Exported::start(["a", "b"].iter().zip(&images).map(|(name, image)| format!("{name}={}", path(image))));
    let exports = shown_as_nbdinfo_does(&exported.unix(""), &["--list"]);
    let names: Vec<&str> = exports.iter().map(|(export, _)| export.get("export").text()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(exports[0].1, ["base:allocation"]);
    shown_as_nbdinfo_does(&exported.tcp("b"), &[]);
    let unknown = exported.unix("c");
    let refused = info(&unknown, &[]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let begins = format!("blockferry: info: {unknown}: describing the export: the server refused: ERR_UNKNOWN");
    assert!(refused.stderr.starts_with(&begins) && refused.stdout.is_empty(), "{refused:?}");
    // A disk has one server at a time.
    drop(exported);
    let read_only = Exported::start(["--read-only", path(&images[0])]);
    let exports = shown_as_nbdinfo_does(&read_only.tcp(""), &[]);
    assert!(exports[0].0.get("read_only").is_true(), "{exports:?}");
    assert_eq!(exports[0].0.get("size_bytes").number(), SIZE + 512);
}

#[test]
fn qemu_nbd_with_a_dirty_bitmap() {
    let folder = scratch();
    let (Some(qemu_nbd), Some(qemu_img)) = (peer("qemu-nbd"), peer("qemu-img")) else { return };
    let image = folder.path().join("disk.qcow2");
    run(Command::new(&qemu_img).args(["create", "-q", "-f", "qcow2", path(&image), "48M"]), DEADLINE).well();
    run(Command::new(&qemu_img).args(["bitmap", "--add", path(&image), "b0"]), DEADLINE).well();
    // In this order: one that is killed while it may write leaves a bitmap that nobody takes any more.
    for read_only in [true, false] {
        let listener = folder.path().join(format!("{read_only}.sock"));
        let mut command = Command::new(&qemu_nbd);
        command.args(["--persistent", "--format=qcow2", "--export-name=disk", "--description=a disk"]);
        command.args(["--bitmap=b0", "--allocation-depth", "--socket", path(&listener), path(&image)]);
        command.args(read_only.then_some("--read-only"));
        let (_server, uri) = serve(&mut command, &listener, "disk");
        let exports = shown_as_nbdinfo_does(&uri, &[]);
        assert_eq!(exports[0].1, ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]);
        assert_eq!(exports[0].0.get("read_only").is_true(), read_only);
        assert_eq!(exports[0].0.get("description").text(), "a disk");
        // By its list too: the default export is none of its.
        assert_eq!(shown(&uri.replace(":///disk?", ":///?")), exports);
        let other = uri.replace(":///disk?", ":///other?");
        let cause = "describing the export: the server refused: ERR_UNKNOWN (export 'other' not present)";
        info(&other, &[]).refused(1, &format!("blockferry: info: {other}: {cause}"));
    }
}

/// nbd-server; it stays in the foreground for one connection only, and so is a daemon here.
struct Daemon {
    id: String,
}

impl Daemon {
    fn start(folder: &Path, allow_list: bool) -> Option<(Self, String)> {
        let program = peer("nbd-server")?;
        let [listener, config, pid] = ["nbd.sock", "config", "pid"].map(|name| folder.join(name));
        let image = folder.join("disk.img");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let text = format!(
            "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {}\nallowlist = {allow_list}\n\
             [disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n\
             [other]\nexportname = {image}\nreadonly = true\n",
            listener.display(),
            free_port(),
            image = image.display(),
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new(program);
        command.arg("-C").arg(&config).arg("-p").arg(&pid).stdout(Stdio::null()).stderr(Stdio::null());
        Program::start(&mut command).wait();
        let id = until("nbd-server", || fs::read_to_string(&pid).ok().filter(|id| id.ends_with('\n')));
        let daemon = Self { id: id.trim().to_owned() };
        until("nbd-server", || UnixStream::connect(&listener).ok());
        Some((daemon, format!("nbd+unix:///?socket={}", listener.display())))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(&self.id).status();
    }
}

#[test]
fn nbd_server_tells_the_size_to_who_opens_the_export() {
    let folder = scratch();
    let Some((_server, uri)) = Daemon::start(folder.path(), true) else { return };
    let exports = shown(&uri);
    let told = |(export, contexts): &Shown| {
        let can: Vec<&str> = export.get("can").items().iter().map(Json::text).collect();
        assert!(contexts.is_empty(), "{contexts:?}");
        let (name, read_only) = (export.get("export").text(), export.get("read_only").is_true());
        format!("{name} {} {read_only} {}", export.get("size_bytes").number(), can.join(" "))
    };
    assert_eq!(
        exports.iter().map(told).collect::<Vec<_>>(),
        ["disk 50331648 false flush fua trim write-zeroes multi-conn", "other 50331648 true write-zeroes multi-conn"]
    );
    // One by one it is the same.
    for (number, name) in ["disk", "other"].iter().enumerate() {
        assert_eq!(shown(&uri.replace(":///?", &format!(":///{name}?"))), exports[number..=number]);
    }
}

#[test]
fn nbd_server_that_keeps_its_list_to_itself() {
    let folder = scratch();
    let Some((_server, uri)) = Daemon::start(folder.path(), false) else { return };
    let cause = "describing the export: the server refused: ERR_UNKNOWN (Export unknown)";
    info(&uri, &[]).refused(1, &format!("blockferry: info: {uri}: {cause}"));
    assert_eq!(shown(&uri.replace(":///?", ":///disk?"))[0].0.get("size_bytes").number(), SIZE);
}

// ---- servers that know little ------------------------------------------------------------------------------------

/// A server of before OPT_INFO and OPT_GO, for so many clients, one after the other: it opens `disk` by name and hangs
/// up at any other name. Any other option it refuses, or, where its newstyle is not fixed, hangs up at it too. Returns
/// what each client asked.
fn old_server(listener: &Path, fixed: bool, clients: usize) -> JoinHandle<Vec<Vec<u32>>> {
    let listener = UnixListener::bind(listener).unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let serve = |_| {
            let (mut stream, _) = until("client", || listener.accept().ok());
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut asked = Vec::new();
            // However it ends.
            let _ = answer(&mut stream, fixed, &mut asked);
            asked
        };
        (0..clients).map(serve).collect()
    })
}

fn answer(stream: &mut UnixStream, fixed: bool, asked: &mut Vec<u32>) -> io::Result<()> {
    let flags = wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_FLUSH | wire::FLAG_ROTATIONAL;
    stream.write_all(&wire::greeting(if fixed { wire::FLAG_FIXED_NEWSTYLE } else { 0 }))?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; wire::OPTION_LENGTH];
        stream.read_exact(&mut head)?;
        let wire::OptionHead { option, length } = wire::OptionHead::parse(&head).expect("an option");
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        asked.push(option);
        match option {
            wire::OPT_EXPORT_NAME if data == b"disk" => {
                stream.write_all(&wire::export_answer(SIZE, flags))?;
                stream.write_all(&[0; wire::EXPORT_ANSWER_ZEROES])?;
                return stream.read_to_end(&mut Vec::new()).map(drop);
            }
            wire::OPT_EXPORT_NAME | wire::OPT_ABORT => return Ok(()),
            _ if !fixed => return Ok(()),
            _ => {
                let refusal = wire::OptionReply { option, reply: wire::REP_ERR_UNSUP, length: 0 };
                stream.write_all(&refusal.encode())?;
            }
        }
    }
}

#[test]
fn server_that_knows_only_export_name_is_opened() {
    for fixed in [true, false] {
        let folder = scratch();
        let listener = folder.path().join("old.sock");
        let server = old_server(&listener, fixed, 2);
        let uri = format!("nbd+unix:///disk?socket={}", listener.display());
        let expected = "export 'disk':\n\
                        \x20 size: 50331648 (48.0 MiB)\n\
                        \x20 read-only: no\n\
                        \x20 structured replies: no\n\
                        \x20 can: flush rotational\n\
                        \x20 block sizes: minimum 512, preferred 4096\n\
                        \x20 maximum payload: 33554432\n";
        assert_eq!(info(&uri, &[]).well(), expected);
        let asked = server.join().unwrap();
        let (first, last) = (asked[0].last().copied(), asked[1].last().copied());
        assert_eq!(first, fixed.then_some(wire::OPT_ABORT), "{asked:?}");
        assert_eq!(last, Some(wire::OPT_EXPORT_NAME), "{asked:?}");
    }
}

#[test]
fn server_that_knows_only_export_name_has_no_such_export() {
    for fixed in [true, false] {
        let folder = scratch();
        let listener = folder.path().join("old.sock");
        let server = old_server(&listener, fixed, 2);
        let uri = format!("nbd+unix:///?socket={}", listener.display());
        let cause = "opening the export by name: the server closed: it has no such export";
        info(&uri, &[]).refused(1, &format!("blockferry: info: {uri}: {cause}"));
        server.join().unwrap();
    }
}

// ---- whoever is no server ----------------------------------------------------------------------------------------

#[test]
fn server_that_cannot_be_asked() {
    type Talk = fn(&mut UnixStream) -> io::Result<()>;
    let cases: [(Talk, &str); 5] = [
        (|stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), "this is no NBD server"),
        (|stream| stream.shutdown(std::net::Shutdown::Both), "the server closed the connection"),
        (
            |stream| {
                stream.write_all(&wire::greeting(wire::FLAG_FIXED_NEWSTYLE))?;
                let mut option = [0; 4 + wire::OPTION_LENGTH];
                stream.read_exact(&mut option)?;
                let option = u32::from_be_bytes([option[12], option[13], option[14], option[15]]);
                stream.write_all(&wire::OptionReply { option, reply: wire::REP_ERR_TLS_REQD, length: 0 }.encode())
            },
            "the server requires TLS",
        ),
        (
            |stream| {
                stream
                    .write_all(&[&wire::greeting(0)[..8], &0x0000_4202_8186_1253_u64.to_be_bytes(), &[0; 136]].concat())
            },
            "the server is oldstyle, which is not supported",
        ),
        (|_| Ok(()), "no answer from the server within 10 s"),
    ];
    for (talk, cause) in cases {
        let folder = scratch();
        let path = folder.path().join("stranger.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let stranger = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            talk(&mut stream).unwrap();
            // Until the client hangs up.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let uri = format!("nbd+unix:///disk?socket={}", path.display());
        info(&uri, &[]).refused(1, &format!("blockferry: info: {uri}: greeting the server: {cause}"));
        stranger.join().unwrap();
    }
}

#[test]
fn nobody_listens_and_other_mistakes() {
    let folder = scratch();
    let nothing = format!("nbd+unix:///disk?socket={}", folder.path().join("nothing").display());
    info(&nothing, &[]).refused(1, &format!("blockferry: info: {nothing}: No such file or directory"));
    let closed = format!("nbd://127.0.0.1:{}/disk", free_port());
    info(&closed, &[]).refused(1, &format!("blockferry: info: {closed}: Connection refused"));
    let said = info(&closed, &["--json"]);
    let error = Json::parse(&said.stdout);
    assert_eq!((error.get("type").text(), error.get("cause").text()), ("error", "Connection refused"));
    assert_eq!((error.get("object").text(), error.get("exit").number(), said.code), (closed.as_str(), 1, Some(1)));
    let far = info("nbd://192.0.2.1/disk", &[]);
    assert!(far.code == Some(1) && far.stderr.contains("--insecure-plaintext allows it"), "{far:?}");
    let usage = |arguments: &[&str], line: &str| {
        let said = run(blockferry().arg("info").args(arguments), DEADLINE);
        let hint = "try 'blockferry info --help'";
        assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
        assert_eq!(said.stderr, format!("blockferry: info: {line}\n{hint}\n"));
    };
    usage(&[], "URI: missing");
    usage(&["nbd://a", "b"], "b: one argument too many");
    usage(&["nbds://localhost/x"], "URI: 'nbds://localhost/x': nbds: TLS is not supported yet");
    usage(&["nbd+unix:///x"], "URI: 'nbd+unix:///x': lacks the socket: nbd+unix:///EXPORT?socket=PATH");
    let form = "is not an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
    usage(&["http://x"], &format!("URI: 'http://x': {form}"));
}
