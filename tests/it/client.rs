//! The NBD client against the servers of the field.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use blockferry::limits::{PAYLOAD_MAX, WINDOW_MAX};
use blockferry::nbd::client::{
    Client, ConnectError, Event, PhasesAnswer, RequestError, Submitted, Wants, offer_phases,
};
use blockferry::nbd::wire;
use blockferry::socket::Socket;

use crate::harness::{Program, free_port, peer, scratch};

const SIZE: u64 = 16 << 20;
const ALL: Wants<'_> = Wants::READING;
const PLAIN: Wants<'_> = Wants { structured: false, extended: false, contexts: &[] };

pub(crate) fn open(socket: Arc<Socket>, export: &str, wants: Wants<'_>) -> Client {
    Client::connect(socket, export, wants).unwrap_or_else(|error| panic!("{error}"))
}

/// Bytes that tell where they stand.
pub(crate) fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1).collect()
}

/// Writes, zeroes, reads back in pipelines, asks for extents, flushes. Leaves with goodbye.
fn exercise(mut client: Client) {
    let info = *client.info();
    assert_eq!(info.size, SIZE);
    let minimum = u64::from(info.minimum_block);
    client.write_all(0, &pattern(0, 3 << 20)).unwrap();
    client.write_all(4 << 20, &pattern(4 << 20, minimum as usize)).unwrap();
    client.write_zeroes(1 << 20, 1 << 20, true).unwrap();
    client.write_zeroes(2 << 20, 65536, false).unwrap();
    if info.has(wire::FLAG_SEND_FLUSH) {
        client.flush().unwrap();
    }

    let mut expected = pattern(0, 5 << 20);
    expected[1 << 20..(2 << 20) + 65536].fill(0);
    expected[3 << 20..].fill(0);
    let last = pattern(4 << 20, minimum as usize);
    expected[4 << 20..][..last.len()].copy_from_slice(&last);
    let mut read = vec![0xee; 5 << 20];
    client.read_exact(0, &mut read).unwrap();
    assert!(read == expected, "what was written is read");

    many_small_requests(&mut client);

    let mut covered = 0;
    let mut zero = 0;
    client
        .allocation(0, SIZE, &mut |length, flags| {
            covered += length;
            zero += if flags & u64::from(wire::STATE_ZERO) != 0 { length } else { 0 };
        })
        .unwrap();
    assert_eq!(covered, SIZE);
    if info.base_allocation.is_none() {
        assert_eq!(zero, 0);
    }

    if info.has(wire::FLAG_SEND_TRIM) {
        assert_eq!(client.submit_trim(7, 8 << 20, 1 << 20).unwrap(), Submitted::Taken);
        assert_eq!(
            client.wait(Some(Duration::from_secs(10)), &mut |event| {
                assert_eq!(event, Event::Done { cookie: 7, result: Ok(()) });
            }),
            Ok(1)
        );
    }
    client.disconnect();
}

/// Keeps the window full of writes of the smallest size, then of reads; answers may come in any order.
fn many_small_requests(client: &mut Client) {
    let piece = client.info().minimum_block.max(4096);
    let base = 6 << 20;
    let count = 256;
    for reading in [false, true] {
        let mut got = vec![0; count as usize * piece as usize];
        let (mut next, mut done) = (0, 0);
        while done < count {
            while next < count {
                let offset = base + next * u64::from(piece);
                let submitted = if reading {
                    client.submit_read(next, offset, piece)
                } else {
                    let fua = client.info().has(wire::FLAG_SEND_FUA) && next % 64 == 0;
                    client.submit_write(next, offset, &pattern(offset, piece as usize), fua)
                };
                match submitted.unwrap() {
                    Submitted::Taken => next += 1,
                    Submitted::WaitFirst => break,
                }
            }
            assert!(client.in_flight() <= WINDOW_MAX);
            let events = client.wait(Some(Duration::from_secs(10)), &mut |event| match event {
                Event::Data { cookie, offset, bytes } => {
                    assert_eq!((offset - base) / u64::from(piece), cookie);
                    let at = usize::try_from(offset - base).unwrap();
                    got[at..at + bytes.len()].copy_from_slice(bytes);
                }
                Event::Done { result, .. } => {
                    result.unwrap();
                    done += 1;
                }
                other => panic!("{other:?}"),
            });
            assert!(events.unwrap() > 0, "an answer within ten seconds");
        }
        assert!(!reading || got == pattern(base, got.len()), "what was written is read");
    }
}

/// Ranges that keep no block of the server's: what is around them stays.
fn odd_ranges(client: &mut Client) {
    let base = 9 << 20;
    let mut expected = pattern(base, 64 << 10);
    client.write_all(base, &expected).unwrap();
    let mut changed = |client: &mut Client, at: usize, length: usize, zero: bool| {
        let offset = base + at as u64;
        if zero {
            client.write_zeroes(offset, length as u64, true).unwrap();
            expected[at..at + length].fill(0);
        } else {
            let bytes = vec![0x77; length];
            client.write_all(offset, &bytes).unwrap();
            expected[at..at + length].copy_from_slice(&bytes);
        }
        let mut read = vec![0xee; expected.len() - 2];
        client.read_exact(base + 1, &mut read).unwrap();
        assert!(read == expected[1..expected.len() - 1], "{length} bytes at {at}, zero: {zero}");
    };
    for zero in [false, true] {
        // Within a block, over a boundary, a head, a tail, a head with blocks and a tail.
        for (at, length) in [(5, 7), (4090, 12), (8191, 4097), (12288, 100), (1000, 40_000)] {
            changed(client, at, length, zero);
        }
    }
    client.trim(base + 100, 20_000).unwrap();
    let mut head = [0; 100];
    client.read_exact(base, &mut head).unwrap();
    assert_eq!(head[..5], expected[..5], "a trim leaves what it has only a part of");
}

/// One request to us, several to the server.
fn requests_beyond_the_maximum_payload(client: &mut Client) {
    let info = *client.info();
    let (base, length) = (10 << 20, info.request_max().min(1 << 20));
    assert!(length > info.maximum_payload, "{info:?}");
    let bytes = pattern(base, length as usize);
    let zeroes = base + (2 << 20);
    assert_eq!(client.submit_write(1, base, &bytes, false), Ok(Submitted::Taken));
    assert_eq!(client.in_flight(), info.parts(length));
    assert_eq!(
        client.submit_write_zeroes(2, zeroes, info.zeroes_max().min(1 << 20), true, false),
        Ok(Submitted::Taken)
    );
    let mut done = 0;
    while client.in_flight() > 0 {
        let mut ended = |event: Event<'_>| match event {
            Event::Done { result: Ok(()), .. } => done += 1,
            other => panic!("{other:?}"),
        };
        client.wait(Some(Duration::from_secs(10)), &mut ended).unwrap();
    }
    assert_eq!(done, 2, "each is answered once");
    let mut got = vec![0; bytes.len()];
    assert_eq!(client.submit_read(3, base, length), Ok(Submitted::Taken));
    assert_eq!(client.in_flight(), info.parts(length));
    while client.in_flight() > 0 {
        let mut take = |event: Event<'_>| match event {
            Event::Data { offset, bytes, .. } => {
                got[(offset - base) as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            Event::Done { cookie: 3, result: Ok(()) } => {}
            other => panic!("{other:?}"),
        };
        client.wait(Some(Duration::from_secs(10)), &mut take).unwrap();
    }
    assert!(got == bytes, "the parts of a READ make up the whole");
}

/// Reads beyond the end: a value, not the end of the connection.
fn reads_beyond_the_end(client: &mut Client) {
    let error = client.read_exact(SIZE - 512, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.to_string(), format!("READ: 4096 bytes at {} are not within the export", SIZE - 512));
    assert_eq!(client.submit_read(1, SIZE, 4096), Ok(Submitted::Taken));
    let mut answer = |event: Event<'_>| match event {
        Event::Done { cookie: 1, result: Err(error) } => assert_eq!(error.errno, wire::EINVAL),
        other => panic!("{other:?}"),
    };
    assert_eq!(client.wait(Some(Duration::from_secs(10)), &mut answer), Ok(1));
    client.read_exact(0, &mut [0; 4096]).unwrap();
}

fn unknown_export(socket: Arc<Socket>) -> ConnectError {
    Client::connect(socket, "no-such-export", ALL).expect_err("there is no such export")
}

// ---- qemu-nbd ----------------------------------------------------------------------------------------------------

fn qemu_nbd(folder: &Path, arguments: &[&str]) -> Option<(Program, std::path::PathBuf)> {
    let program = peer("qemu-nbd")?;
    let (image, listener) = (folder.join("disk.img"), folder.join("nbd.sock"));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new(program);
    command.args(["--format=raw", "--persistent", "--shared=8", "--export-name=disk", "--socket"]).arg(&listener);
    Some((Program::start(command.args(arguments).arg(&image)), listener))
}

#[test]
fn qemu_nbd_serves_everything() {
    let folder = scratch();
    let Some((mut server, listener)) = qemu_nbd(folder.path(), &["--discard=unmap", "--detect-zeroes=off"]) else {
        return;
    };
    let mut client = open(server.connect_unix(&listener), "disk", ALL);
    let info = *client.info();
    assert!(info.structured && info.base_allocation.is_some(), "{info:?}");
    assert!(info.has(wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_FUA | wire::FLAG_SEND_DF | wire::FLAG_SEND_WRITE_ZEROES));
    assert_eq!(info.maximum_payload, PAYLOAD_MAX);
    reads_beyond_the_end(&mut client);
    exercise(client);
    exercise(open(server.connect_unix(&listener), "disk", PLAIN));
    let error = unknown_export(server.connect_unix(&listener));
    assert!(error.is_unknown_export(), "{error}");
    let answer = offer_phases(&server.connect_unix(&listener)).unwrap();
    assert_eq!(answer, PhasesAnswer::PlainServer);
}

#[test]
fn qemu_nbd_read_only_refuses_writes() {
    let folder = scratch();
    let Some((mut server, listener)) = qemu_nbd(folder.path(), &["--read-only"]) else { return };
    let mut client = open(server.connect_unix(&listener), "disk", ALL);
    assert!(client.info().has(wire::FLAG_READ_ONLY));
    for length in [4096, 8 << 20] {
        let error = client.write_all(0, &vec![1; length]).unwrap_err();
        // EPERM is what the specification wants; this server says EINVAL.
        assert_eq!(error.to_string(), "WRITE: the server answered EINVAL (Export is read-only)");
    }
    client.read_exact(0, &mut [0; 4096]).unwrap();
}

#[test]
fn qemu_nbd_is_killed_with_requests_in_flight() {
    let folder = scratch();
    let Some((mut server, listener)) = qemu_nbd(folder.path(), &[]) else { return };
    let mut client = open(server.connect_unix(&listener), "disk", ALL);
    for cookie in 0..8 {
        assert_eq!(client.submit_read(cookie, 0, 1 << 20), Ok(Submitted::Taken));
    }
    server.kill();
    let lost = loop {
        match client.wait(Some(Duration::from_secs(10)), &mut |_| {}) {
            Ok(events) => assert!(events > 0),
            Err(lost) => break lost,
        }
    };
    let text = lost.to_string();
    assert!(text.starts_with("receiving from the server: ") || text.starts_with("sending to the server: "), "{text}");
    assert!(text.contains("requests in flight"), "{text}");
    assert_eq!(client.submit_flush(9), Err(lost), "and it stays lost");
}

#[test]
fn qemu_storage_daemon_serves_everything() {
    let Some(program) = peer("qemu-storage-daemon") else { return };
    let folder = scratch();
    let (image, listener) = (folder.path().join("disk.img"), folder.path().join("nbd.sock"));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new(program);
    command.arg("--blockdev").arg(format!("file,node-name=f,discard=unmap,filename={}", image.display()));
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", listener.display()));
    command.args(["--export", "nbd,id=e,node-name=f,name=disk,writable=on"]);
    let mut server = Program::start(&mut command);
    exercise(open(server.connect_unix(&listener), "disk", ALL));
    let answer = offer_phases(&server.connect_unix(&listener)).unwrap();
    assert_eq!(answer, PhasesAnswer::PlainServer);
}

// ---- nbdkit ------------------------------------------------------------------------------------------------------

pub(crate) fn nbdkit(folder: &Path, arguments: &[&str]) -> Option<(Program, std::path::PathBuf)> {
    let program = peer("nbdkit")?;
    let listener = folder.join("nbd.sock");
    let mut command = Command::new(program);
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&listener).args(arguments);
    Some((Program::start(&mut command), listener))
}

#[test]
fn nbdkit_serves_everything() {
    let folder = scratch();
    let Some((mut server, listener)) = nbdkit(folder.path(), &["memory", "16M"]) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    let info = *client.info();
    assert!(info.structured && info.base_allocation.is_some() && info.has(wire::FLAG_SEND_FAST_ZERO), "{info:?}");
    reads_beyond_the_end(&mut client);
    exercise(client);
    exercise(open(server.connect_unix(&listener), "", PLAIN));
    let answer = offer_phases(&server.connect_unix(&listener)).unwrap();
    assert_eq!(answer, PhasesAnswer::PlainServer);
}

#[test]
fn nbdkit_without_structured_replies() {
    let folder = scratch();
    let Some((mut server, listener)) = nbdkit(folder.path(), &["--no-sr", "memory", "16M"]) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    assert!(!client.info().structured && client.info().base_allocation.is_none());
    reads_beyond_the_end(&mut client);
    exercise(client);
}

#[test]
fn nbdkit_without_zeroes_flush_and_trim() {
    let folder = scratch();
    let options = ["--filter=nozero", "--filter=noextents", "memory", "16M"];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let client = open(server.connect_unix(&listener), "", ALL);
    assert!(!client.info().has(wire::FLAG_SEND_WRITE_ZEROES));
    exercise(client);
}

#[test]
fn nbdkit_without_anything_that_can_be_left_out() {
    let folder = scratch();
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let place = disk.display();
    let options = [
        "eval".to_owned(),
        "--filter=nozero".to_owned(),
        "get_size=echo 16M".to_owned(),
        format!("pread=dd if={place} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"),
        format!("pwrite=dd of={place} oflag=seek_bytes conv=notrunc seek=$4 status=none"),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    let info = *client.info();
    let lacks = [wire::FLAG_SEND_FLUSH, wire::FLAG_SEND_FUA, wire::FLAG_SEND_TRIM, wire::FLAG_SEND_WRITE_ZEROES];
    assert!(lacks.iter().all(|&flag| !info.has(flag)), "{info:?}");
    assert_eq!(info.connections(4), 1, "{info:?}");
    client.write_all(0, &pattern(0, 100_000)).unwrap();
    client.write_zeroes(1000, 50_000, true).unwrap();
    client.trim(60_000, 10_000).unwrap();
    let error = client.flush().unwrap_err();
    assert_eq!(error.to_string(), "FLUSH: the server answered ENOTSUP (the server does not offer it)");
    let mut expected = pattern(0, 100_000);
    expected[1000..51_000].fill(0);
    let mut read = vec![1; 100_000];
    client.read_exact(0, &mut read).unwrap();
    assert!(read == expected, "zeroes were written, the trim did nothing");
}

#[test]
fn nbdkit_with_a_named_export() {
    let folder = scratch();
    let options = ["--filter=exportname", "memory", "16M", "exportname=disk", "exportname-strict=true"];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    exercise(open(server.connect_unix(&listener), "disk", ALL));
    let error = unknown_export(server.connect_unix(&listener));
    assert!(matches!(error, ConnectError::Refused { operation: "opening the export", .. }), "{error}");
}

#[test]
fn nbdkit_demands_blocks_of_4096() {
    let folder = scratch();
    let options = [
        "--filter=blocksize-policy",
        "memory",
        "16M",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    let info = *client.info();
    assert_eq!((info.minimum_block, info.preferred_block, info.maximum_payload), (4096, 65536, 65536));
    assert_eq!(client.submit_read(1, 512, 512), Ok(Submitted::Taken));
    let mut refused = |event: Event<'_>| assert!(matches!(event, Event::Done { result: Err(_), .. }), "{event:?}");
    assert_eq!(client.wait(Some(Duration::from_secs(10)), &mut refused), Ok(1), "the server means it");
    odd_ranges(&mut client);
    requests_beyond_the_maximum_payload(&mut client);
    exercise(client);
}

#[test]
fn nbdkit_demands_blocks_and_has_no_zeroes() {
    let folder = scratch();
    let options = [
        "--filter=blocksize-policy",
        "--filter=nozero",
        "--filter=noextents",
        "memory",
        "16M",
        "blocksize-minimum=512",
        "blocksize-maximum=48K",
        "blocksize-preferred=4096",
        "blocksize-error-policy=error",
    ];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    let info = *client.info();
    assert!(!info.has(wire::FLAG_SEND_WRITE_ZEROES));
    assert_eq!((info.maximum_payload, info.request_max(), info.zeroes_max()), (48 << 10, 1536 << 10, 1536 << 10));
    odd_ranges(&mut client);
    requests_beyond_the_maximum_payload(&mut client);
    exercise(client);
}

#[test]
fn nbdkit_answers_errors_in_the_middle() {
    let folder = scratch();
    let options = ["--filter=error", "memory", "16M", "error-pread=ENOSPC", "error-pread-rate=50%"];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", ALL);
    let mut failed = 0;
    for _ in 0..64 {
        match client.read_exact(0, &mut [0; 4096]) {
            Ok(()) => {}
            Err(RequestError::Server("READ", error)) => {
                assert_eq!(error.errno, wire::ENOSPC);
                failed += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!((1..64).contains(&failed), "{failed} of 64");
}

#[test]
fn nbdkit_without_fixed_newstyle() {
    for mask in ["0", "1", "2"] {
        let folder = scratch();
        let options = ["--mask-handshake", mask, "--exportname", "disk", "memory", "16M"];
        let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
        let client = open(server.connect_unix(&listener), "disk", ALL);
        assert_eq!(client.info().structured, mask == "1");
        exercise(client);
        let answer = offer_phases(&server.connect_unix(&listener)).unwrap();
        assert_eq!(answer, PhasesAnswer::PlainServer);
    }
}

#[test]
fn nbdkit_oldstyle_is_refused_by_name() {
    let folder = scratch();
    let Some((mut server, listener)) = nbdkit(folder.path(), &["--oldstyle", "memory", "16M"]) else { return };
    let error = unknown_export(server.connect_unix(&listener));
    assert_eq!(error.to_string(), "greeting the server: the server is oldstyle, which is not supported");
}

#[test]
fn nbdkit_over_tcp_with_a_slow_network() {
    let Some(program) = peer("nbdkit") else { return };
    let port = free_port();
    let mut command = Command::new(program);
    command.args(["--foreground", "--exit-with-parent", "--ipaddr", "127.0.0.1", "--port"]).arg(port.to_string());
    let mut server = Program::start(command.args(["--filter=delay", "memory", "16M", "rdelay=2ms", "wdelay=2ms"]));
    exercise(open(server.connect_tcp(port), "", ALL));
}

// ---- nbd-server --------------------------------------------------------------------------------------------------

/// With `-d` it stays in the foreground, and serves one connection.
fn nbd_server(folder: &Path) -> Option<(Program, Arc<Socket>)> {
    let program = peer("nbd-server")?;
    let (image, listener, config) = (folder.join("disk.img"), folder.join("nbd.sock"), folder.join("config"));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let text = format!(
        "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {}\n\
         [disk]\nexportname = {}\nflush = true\nfua = true\ntrim = true\n",
        listener.display(),
        free_port(),
        image.display()
    );
    std::fs::write(&config, text).unwrap();
    let _ = std::fs::remove_file(&listener);
    let mut command = Command::new(program);
    command.arg("-d").arg("-C").arg(&config).arg("-p").arg(folder.join("pid"));
    let mut server = Program::start(&mut command);
    let socket = server.connect_unix(&listener);
    Some((server, socket))
}

#[test]
fn nbd_server_serves_what_it_has() {
    let folder = scratch();
    for wants in [ALL, PLAIN] {
        let Some((_server, socket)) = nbd_server(folder.path()) else { return };
        let client = open(socket, "disk", wants);
        assert!(client.info().has(wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_FUA | wire::FLAG_SEND_TRIM));
        exercise(client);
    }
}

#[test]
fn nbd_server_has_no_such_export_and_no_phases() {
    let folder = scratch();
    let Some((_server, socket)) = nbd_server(folder.path()) else { return };
    let error = unknown_export(socket);
    assert!(error.is_unknown_export(), "{error}");
    let Some((_server, socket)) = nbd_server(folder.path()) else { return };
    assert_eq!(offer_phases(&socket).unwrap(), PhasesAnswer::PlainServer);
}
