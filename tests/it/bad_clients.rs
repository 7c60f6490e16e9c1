//! Clients that break the protocol, leave in the middle, or never come to an end, against `blockferry export`. They
//! speak through raw sockets. Whatever they do, everybody else is served, memory stays bounded, and their threads go
//! away.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry::limits::{CONNECTIONS_MAX, HANDSHAKE_TIMEOUT, OPTION_PAYLOAD_MAX, OPTION_SKIP_MAX, OPTIONS_MAX};
use blockferry::nbd::wire;
use blockferry::socket::Socket;

use crate::chance::Chance;
use crate::exported::Exported;
use crate::harness::{DEADLINE, until};
use crate::images::{Image, Kind, MIB};

const SIZE: u64 = 64 * MIB;
/// What the server may need for a few connections, in bytes.
const MEMORY: u64 = 48 * MIB;

// ---- the protocol's bytes ----------------------------------------------------------------------------------------

/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: [u8; 4] = [0, 0, 0, 3];

fn option_head(option: u32, length: u32) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes()].concat()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [&option_head(option, u32::try_from(data.len()).unwrap())[..], data].concat()
}

/// GO for the default export, without any wish.
fn go() -> Vec<u8> {
    option(wire::OPT_GO, &[0; 6])
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
    let (cookie, offset, length) = (cookie.to_be_bytes(), offset.to_be_bytes(), length.to_be_bytes());
    [&0x2560_9513_u32.to_be_bytes()[..], &flags, &command, &cookie, &offset, &length].concat()
}

/// A request without flags, and no longer than 4 GiB.
fn plain(command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    request(0, command, cookie, offset, u32::try_from(length).unwrap())
}

fn write(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    [&plain(wire::CMD_WRITE, cookie, offset, data.len() as u64)[..], data].concat()
}

// ---- a client ----------------------------------------------------------------------------------------------------

/// A client that does what the test says; every wait of it ends.
struct Raw {
    socket: Arc<Socket>,
}

impl Raw {
    fn connect(exported: &Exported) -> Self {
        Self::over(exported.connect())
    }

    fn over(socket: Arc<Socket>) -> Self {
        let client = Self { socket };
        client.socket.set_send_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(client.receive::<18>(), *b"NBDMAGICIHAVEOPT\0\x03");
        client
    }

    /// One that is in transmission, with simple replies.
    fn open(exported: &Exported) -> Self {
        Self::connect(exported).go()
    }

    fn go(self) -> Self {
        self.send(&[&CLIENT_FLAGS[..], &go()].concat());
        assert_eq!(self.option_reply(wire::OPT_GO).0, wire::REP_INFO);
        assert_eq!(self.option_reply(wire::OPT_GO).0, wire::REP_ACK);
        self
    }

    fn send(&self, bytes: &[u8]) {
        self.socket.send_all(bytes).unwrap();
    }

    /// Sends to a server that may have closed already.
    fn try_send(&self, bytes: &[u8]) {
        let _ = self.socket.send_all(bytes);
    }

    fn receive<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.recv_exact_before(&mut bytes, Instant::now() + DEADLINE).unwrap();
        bytes
    }

    fn receive_bytes(&self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.socket.recv_exact_before(&mut bytes, Instant::now() + DEADLINE).unwrap();
        bytes
    }

    /// The next reply to `option`: its type and length. What it says is read and forgotten.
    fn option_reply(&self, option: u32) -> (u32, u32) {
        let head = self.receive::<20>();
        let number = |at: usize| u32::from_be_bytes(*head[at..].first_chunk().unwrap());
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(number(8), option);
        assert!(number(16) < 4096);
        self.receive_bytes(number(16).into());
        (number(12), number(16))
    }

    /// The next simple reply: cookie and error.
    fn reply(&self) -> (u64, u32) {
        let head = self.receive::<16>();
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        (u64::from_be_bytes(*head[8..].first_chunk().unwrap()), u32::from_be_bytes(*head[4..].first_chunk().unwrap()))
    }

    /// Does one request and says how it went.
    fn ask(&self, request: &[u8]) -> u32 {
        self.send(request);
        let (cookie, error) = self.reply();
        assert_eq!(cookie.to_be_bytes(), request[8..16]);
        error
    }

    /// That it is served, as everybody is.
    fn is_served(&self) {
        assert_eq!(self.ask(&plain(wire::CMD_READ, 77, SIZE - 4096, 4096)), 0);
        self.receive_bytes(4096);
    }

    /// Reads and forgets until the server has closed; how many bytes there were.
    fn ends(&self) -> usize {
        let mut buffer = vec![0; 1 << 16];
        let mut total = 0;
        let deadline = Instant::now() + DEADLINE;
        loop {
            assert!(Instant::now() < deadline, "the server has not closed within {DEADLINE:?}");
            match self.socket.recv_nowait(&mut buffer) {
                Ok(Some(0)) => return total,
                Ok(Some(got)) => total += got,
                Ok(None) => drop(self.socket.wait(true, false, Some(Duration::from_secs(1))).unwrap()),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return total,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Says that nothing more will be sent.
    fn half_close(&self) {
        rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Write).unwrap();
    }
}

/// A file of holes, exported without a name.
fn export() -> (Image, Exported) {
    let image = Image::new(Kind::Cached, SIZE).unwrap();
    let exported = Exported::start([&image.path]);
    (image, exported)
}

/// That the server is as it was before: it serves, has forgotten everybody who left, and has not grown.
fn unharmed(exported: &Exported) {
    let client = Raw::open(exported);
    client.is_served();
    client.send(&plain(wire::CMD_DISC, 0, 0, 0));
    assert_eq!(client.ends(), 0);
    exported.wait_until_alone();
    let memory = exported.peak_memory();
    assert!(memory < MEMORY, "{} MiB of memory", memory / MIB);
}

// ---- in the handshake --------------------------------------------------------------------------------------------

#[test]
fn client_disconnects_inside_the_handshake() {
    let (_image, exported) = export();
    let context = [&[0; 4][..], &1_u32.to_be_bytes(), &15_u32.to_be_bytes(), b"base:allocation"].concat();
    let whole = [
        &CLIENT_FLAGS[..],
        &option(wire::OPT_STRUCTURED_REPLY, &[]),
        &option(99, b"something new"),
        &option(wire::OPT_SET_META_CONTEXT, &context),
        &go(),
    ]
    .concat();
    for cut in 0..=whole.len() {
        let client = Raw::connect(&exported);
        client.send(&whole[..cut]);
    }
    for cut in 0..=whole.len() {
        let client = Raw::connect(&exported);
        client.send(&whole[..cut]);
        client.half_close();
        client.ends();
    }
    unharmed(&exported);
}

#[test]
fn client_is_none() {
    let (_image, exported) = export();
    for greeting in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        &[0xff; 4],
        &[0, 0, 0, 4],
        &[0x80, 0, 0, 3],
    ] {
        let client = Raw::connect(&exported);
        client.send(greeting);
        assert_eq!(client.ends(), 0, "it is told nothing");
    }
    let log = exported.log();
    assert!(
        log.contains("export door: connection closed: handshake: the client set unknown flags 0x47455420"),
        "{log}"
    );
    unharmed(&exported);
}

#[test]
fn client_sends_an_option_with_wrong_magic() {
    let (_image, exported) = export();
    for magic in [&b"IHAVEOPS"[..], b"NBDMAGIC", b"\x25\x60\x95\x13\0\0\0\0"] {
        let client = Raw::connect(&exported);
        client.send(&CLIENT_FLAGS);
        client.send(&[magic, &[0; 8]].concat());
        assert_eq!(client.ends(), 0);
    }
    unharmed(&exported);
}

#[test]
fn client_sends_an_option_without_fixed_newstyle() {
    let (_image, exported) = export();
    let client = Raw::connect(&exported);
    client.send(&[&[0; 4][..], &option(wire::OPT_LIST, &[])].concat());
    assert_eq!(client.ends(), 0);
    unharmed(&exported);
}

#[test]
fn client_sends_huge_options() {
    let (_image, exported) = export();
    for number in [wire::OPT_EXPORT_NAME, wire::OPT_LIST, wire::OPT_GO, 12345] {
        for length in [u32::MAX, 1 << 31, u32::try_from(OPTION_SKIP_MAX).unwrap() + 1] {
            let client = Raw::connect(&exported);
            client.send(&CLIENT_FLAGS);
            client.try_send(&option_head(number, length));
            client.try_send(&[0; 4096]);
            assert_eq!(client.ends(), 0, "option {number} of {length} bytes");
        }
    }
    // What can be skipped is refused politely, and the haggling goes on.
    let client = Raw::connect(&exported);
    client.send(&CLIENT_FLAGS);
    for length in [OPTION_PAYLOAD_MAX + 1, OPTION_SKIP_MAX] {
        for (number, error) in [
            (wire::OPT_INFO, wire::REP_ERR_TOO_BIG),
            (wire::OPT_SET_META_CONTEXT, wire::REP_ERR_TOO_BIG),
            (12345, wire::REP_ERR_UNSUP),
        ] {
            client.send(&option(number, &vec![0; length]));
            assert_eq!(client.option_reply(number).0, error);
        }
    }
    client.go_on();
    client.is_served();
    drop(client);
    unharmed(&exported);
}

impl Raw {
    /// From the middle of the haggling to transmission: nothing was left in the way.
    fn go_on(&self) {
        self.send(&go());
        assert_eq!(self.option_reply(wire::OPT_GO).0, wire::REP_INFO);
        assert_eq!(self.option_reply(wire::OPT_GO).0, wire::REP_ACK);
    }
}

#[test]
fn client_sends_options_whose_inner_lengths_are_wrong() {
    let (_image, exported) = export();
    let client = Raw::connect(&exported);
    client.send(&CLIENT_FLAGS);
    let number = |number: u32| number.to_be_bytes();
    for number in [wire::OPT_INFO, wire::OPT_GO] {
        for data in [
            &[][..],
            &[0; 3],
            &[0; 5],
            // A name longer than the option, by one and by all that 32 bits can say.
            &[&1_u32.to_be_bytes()[..], &[0; 2]].concat(),
            &[&u32::MAX.to_be_bytes()[..], &[0; 2]].concat(),
            &[&0x7fff_ffff_u32.to_be_bytes()[..], b"name", &[0; 2]].concat(),
            // More wishes than there are, and fewer.
            &[&[0; 4][..], &[0, 1]].concat(),
            &[&[0; 4][..], &[0xff, 0xff], &[0, 3]].concat(),
            &[&[0; 4][..], &[0, 0], &[0, 3]].concat(),
            &[&[0; 4][..], &[0, 1], &[0, 3, 0]].concat(),
        ] {
            client.send(&option(number, data));
            assert_eq!(client.option_reply(number).0, wire::REP_ERR_INVALID, "{data:x?}");
        }
    }
    client.send(&option(wire::OPT_STRUCTURED_REPLY, &[]));
    assert_eq!(client.option_reply(wire::OPT_STRUCTURED_REPLY).0, wire::REP_ACK);
    for option_number in [wire::OPT_LIST_META_CONTEXT, wire::OPT_SET_META_CONTEXT] {
        for data in [
            &[][..],
            &[0; 7],
            &[&number(1)[..], &number(0)].concat(),
            &[&number(u32::MAX)[..], &number(0)].concat(),
            &[&number(0)[..], &number(1)].concat(),
            &[&number(0)[..], &number(u32::MAX)].concat(),
            &[&number(0)[..], &number(1), &number(16), b"base:allocation"].concat(),
            &[&number(0)[..], &number(2), &number(15), b"base:allocation"].concat(),
            &[&number(0)[..], &number(1), &number(15), b"base:allocation", b"!"].concat(),
        ] {
            client.send(&option(option_number, data));
            assert_eq!(client.option_reply(option_number).0, wire::REP_ERR_INVALID, "{data:x?}");
        }
    }
    for (option_number, data) in [(wire::OPT_LIST, &b"x"[..]), (wire::OPT_STRUCTURED_REPLY, b"xy")] {
        client.send(&option(option_number, data));
        assert_eq!(client.option_reply(option_number).0, wire::REP_ERR_INVALID);
    }
    client.go_on();
    drop(client);
    unharmed(&exported);
}

#[test]
fn client_sends_options_without_end() {
    let (_image, exported) = export();
    for data in [option(wire::OPT_LIST, &[]), option(12345, &[0; 512])] {
        let client = Raw::connect(&exported);
        client.send(&CLIENT_FLAGS);
        let mut answered = 0;
        while answered <= OPTIONS_MAX && client.socket.send_all(&data).is_ok() {
            let mut one = [0];
            // Byte by byte up to the first of the reply's head tells whether there is one.
            if client.socket.recv_exact_before(&mut one, Instant::now() + DEADLINE).is_err() {
                break;
            }
            answered += 1;
            // An export and the end of the list, or one refusal: whatever it is, it comes whole.
            while client.socket.recv_nowait(&mut [0; 4096]).is_ok_and(|got| got.is_some_and(|got| got > 0)) {}
        }
        assert!(answered <= OPTIONS_MAX, "{answered} options were answered");
    }
    // Nor does it help to send them all at once and to read nothing.
    let client = Raw::connect(&exported);
    client.send(&CLIENT_FLAGS);
    client.try_send(&option(wire::OPT_LIST, &[]).repeat(10 * OPTIONS_MAX));
    client.ends();
    unharmed(&exported);
}

#[test]
fn client_sends_one_byte_a_second() {
    let (_image, exported) = export();
    let idle = Raw::open(&exported);
    let unix = Raw::connect(&exported);
    let tcp = Raw::over(exported.connect_tcp());
    let began = Instant::now();
    let mut haggling = [&CLIENT_FLAGS[..], &option(12345, &[0; 64])].concat().into_iter();
    let mut closed = [false; 2];
    while closed != [true; 2] {
        assert!(began.elapsed() < HANDSHAKE_TIMEOUT + DEADLINE, "it goes on and on");
        let byte = [haggling.next().unwrap()];
        for (client, closed) in [&unix, &tcp].iter().zip(&mut closed) {
            client.try_send(&byte);
            *closed = client.socket.recv_nowait(&mut [0]).is_ok_and(|got| got == Some(0))
                || *closed
                || client.socket.has_hung_up();
        }
        if closed == [false; 2] {
            // A second passes, but for the end.
            let _ = unix.socket.wait(true, false, Some(Duration::from_secs(1))).unwrap();
        }
        // Everybody else is served meanwhile.
        Raw::open(&exported).is_served();
    }
    let took = began.elapsed();
    assert!(took > HANDSHAKE_TIMEOUT - Duration::from_millis(500) && took < HANDSHAKE_TIMEOUT * 2, "{took:?}");
    let log = exported.log();
    assert_eq!(log.matches("handshake: the client was in an option's head after 10 s").count(), 2, "{log}");
    // The deadline was the handshake's, not that of somebody who has nothing to ask.
    idle.is_served();
    drop(idle);
    unharmed(&exported);
}

#[test]
fn clients_are_more_than_there_is_room_for() {
    let (_image, exported) = export();
    let mut clients: Vec<Raw> = (0..CONNECTIONS_MAX).map(|_| Raw::open(&exported)).collect();
    for _ in 0..8 {
        let socket = exported.connect();
        let mut greeting = [0; 18];
        let error = socket.recv_exact_before(&mut greeting, Instant::now() + DEADLINE).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{error}");
    }
    // Each door has its own room.
    let other_door = Raw::over(exported.connect_tcp()).go();
    other_door.is_served();
    clients.iter().for_each(Raw::is_served);
    let left = clients.pop().unwrap();
    left.send(&plain(wire::CMD_DISC, 0, 0, 0));
    left.ends();
    let newcomer = until("room for one more", || {
        let socket = exported.connect();
        let mut greeting = [0; 18];
        socket.recv_exact_before(&mut greeting, Instant::now() + DEADLINE).is_ok().then_some(Raw { socket })
    });
    newcomer.go().is_served();
    let log = exported.log();
    assert!(log.matches(&format!("more than {CONNECTIONS_MAX} connections")).count() >= 8, "{log}");
    drop((clients, other_door));
    exported.wait_until_alone();
}

#[test]
fn clients_that_say_nothing_keep_nobody_out() {
    let (_image, exported) = export();
    let working = Raw::open(&exported);
    let silent: Vec<Arc<Socket>> = (0..2 * CONNECTIONS_MAX).map(|_| exported.connect()).collect();
    for _ in 0..8 {
        // Who comes next is in, and stays in while they go on.
        let newcomer = Raw::open(&exported);
        let more: Vec<Arc<Socket>> = (0..CONNECTIONS_MAX / 2).map(|_| exported.connect()).collect();
        newcomer.is_served();
        working.is_served();
        drop(more);
    }
    let turned_away = silent.iter().filter(|socket| socket.has_hung_up()).count();
    assert!(turned_away > CONNECTIONS_MAX, "{turned_away}: who has been silent longest goes first");
    drop(silent);
    drop(working);
    unharmed(&exported);
}

/// Where a client of [`two_hundred_clients_come_and_stay_where_they_are`] stops, for good.
fn stop_inside(socket: Arc<Socket>, place: usize) -> Raw {
    let client = Raw { socket };
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    match place {
        0 => {}
        1 => client.try_send(&CLIENT_FLAGS[..2]),
        2 => client.try_send(&[&CLIENT_FLAGS[..], &half(option(wire::OPT_LIST, &[]))].concat()),
        3 => client.try_send(&[&CLIENT_FLAGS[..], &half(option(12345, &[0; 4096]))].concat()),
        4 => client.try_send(&[&CLIENT_FLAGS[..], &go()].concat()),
        5 => client.try_send(&[&CLIENT_FLAGS[..], &go(), &half(plain(wire::CMD_READ, 1, 0, 512))].concat()),
        // Small enough to gather in the buffer, and as large as may be.
        6 => client.try_send(&[&CLIENT_FLAGS[..], &go(), &half(write(1, MIB, &[7; 4096]))].concat()),
        _ => {
            client.try_send(&[&CLIENT_FLAGS[..], &go(), &plain(wire::CMD_WRITE, 1, 2 * MIB, 32 * MIB)].concat());
            client.try_send(&[7; 100_000]);
        }
    }
    client
}

#[test]
fn two_hundred_clients_come_and_stay_where_they_are() {
    let (image, exported) = export();
    let working = Raw::over(exported.connect_tcp()).go();
    let stuck: Vec<Raw> = (0..200).map(|number| stop_inside(exported.connect(), number % 8)).collect();
    // The others of this door find it full; who works at the other one is served as ever.
    for number in 0..500 {
        assert_eq!(working.ask(&write(number, 40 * MIB + number * 4096, &[9; 4096])), 0);
        working.is_served();
    }
    assert_eq!(working.ask(&plain(wire::CMD_FLUSH, 1, 0, 0)), 0);
    let memory = exported.peak_memory();
    assert!(memory < MEMORY, "{} MiB of memory", memory / MIB);
    drop(stuck);
    // What came of a write that never came whole: at most what had come of it.
    let mut there = vec![0; 4096];
    std::fs::File::open(&image.path).unwrap().read_exact_at(&mut there, MIB).unwrap();
    assert!(there.iter().all(|byte| *byte == 0), "half a small write is no write");
    drop(working);
    unharmed(&exported);
}

// ---- in transmission ---------------------------------------------------------------------------------------------

#[test]
fn client_sends_a_request_with_wrong_magic() {
    let (_image, exported) = export();
    for bytes in [[0; 28].as_slice(), &option(wire::OPT_LIST, &[0; 12]), &[0xff; 28], &write(1, 0, &[1; 512])[1..]] {
        let client = Raw::open(&exported);
        client.send(bytes);
        assert_eq!(client.ends(), 0);
    }
    unharmed(&exported);
}

#[test]
fn client_disconnects_inside_a_request() {
    let (image, exported) = export();
    // Behind what a connection's own thread and its workers take at once, and before a page's end.
    let whole = write(1, MIB, &vec![0xee; 1 << 20]);
    for cut in [1, 4, 27, 28, 29, 28 + 4095, 28 + 4096, 28 + 131_072, 28 + 262_145, 28 + 600_000, whole.len() - 1] {
        for half in [false, true] {
            let client = Raw::open(&exported);
            client.send(&whole[..cut]);
            if half {
                client.half_close();
                assert_eq!(client.ends(), 0, "nothing is answered that was not sent");
            }
        }
    }
    unharmed(&exported);
    let mut beside = vec![0; 1 << 20];
    let file = std::fs::File::open(&image.path).unwrap();
    for offset in [0, 2 * MIB] {
        file.read_exact_at(&mut beside, offset).unwrap();
        assert!(beside.iter().all(|byte| *byte == 0), "nothing beside it was written");
    }
}

#[test]
fn client_sends_a_write_larger_than_allowed() {
    let (image, exported) = export();
    for length in [(32 << 20) + 1, 1 << 30, u32::MAX] {
        let client = Raw::open(&exported);
        client.send(&request(0, wire::CMD_WRITE, 1, 0, length));
        client.try_send(&[0xee; 65536]);
        client.ends();
    }
    assert_eq!(crate::images::allocated(&image.path), 0);
    unharmed(&exported);
}

#[test]
fn client_asks_for_what_there_is_not() {
    let (image, exported) = export();
    let client = Raw::open(&exported);
    for (offset, length) in [(SIZE, 512), (SIZE - 511, 512), (u64::MAX - 511, 512), (u64::MAX, 1), (1 << 63, 1), (0, 0)]
    {
        let error = if length == 0 { wire::EINVAL } else { wire::ENOSPC };
        let number = u32::try_from(length).unwrap();
        assert_eq!(client.ask(&write(1, offset, &vec![0xee; length])), error);
        assert_eq!(client.ask(&request(0, wire::CMD_TRIM, 2, offset, number)), wire::EINVAL);
        assert_eq!(client.ask(&request(0, wire::CMD_WRITE_ZEROES, 3, offset, number)), error);
        assert_eq!(client.ask(&request(0, wire::CMD_READ, 4, offset, number)), wire::EINVAL);
        assert_eq!(client.ask(&request(0, wire::CMD_CACHE, 5, offset, number)), wire::EINVAL);
    }
    for length in [(32 << 20) + 1, u32::MAX] {
        assert_eq!(client.ask(&request(0, wire::CMD_READ, 6, 0, length)), wire::EINVAL);
    }
    assert_eq!(client.ask(&request(0, wire::CMD_WRITE_ZEROES, 7, 0, u32::MAX)), wire::ENOSPC);
    assert_eq!(client.ask(&request(0, wire::CMD_FLUSH, 8, 512, 512)), wire::EINVAL);
    // Nobody agreed on block status, and nobody knows the others.
    for command in [wire::CMD_BLOCK_STATUS, 8, 9, 100, u16::MAX] {
        assert_eq!(client.ask(&request(0, command, 9, 0, 512)), wire::EINVAL);
    }
    for flag in 0..16 {
        for command in [wire::CMD_READ, wire::CMD_FLUSH, wire::CMD_TRIM, wire::CMD_CACHE] {
            // FUA may stand with every command.
            if flag > 0 {
                let length = if command == wire::CMD_FLUSH { 0 } else { 512 };
                assert_eq!(client.ask(&request(1 << flag, command, 10, 0, length)), wire::EINVAL);
            }
        }
    }
    client.is_served();
    assert_eq!(crate::images::allocated(&image.path), 0);
    drop(client);
    unharmed(&exported);
}

#[test]
fn client_never_reads_its_replies() {
    let (_image, exported) = export();
    let deaf: Vec<Raw> =
        (0..4).map(|i| if i < 2 { Raw::open(&exported) } else { Raw::over(exported.connect_tcp()).go() }).collect();
    // Reads of each kind: from the page cache in little pieces, through the workers in large ones.
    let reads = [plain(wire::CMD_READ, 1, 0, 4096).repeat(64), plain(wire::CMD_READ, 2, 0, 32 * MIB).repeat(4)];
    for (client, reads) in deaf.iter().zip(reads.iter().cycle()) {
        let bytes = reads.repeat(1000);
        let mut sent = 0;
        // Until the server takes nothing more for a moment: it waits for this client, and for nobody else.
        while sent < bytes.len() && client.socket.wait(false, true, Some(Duration::from_millis(300))).unwrap().writable
        {
            sent += client.socket.send_nowait(&bytes[sent..], &[]).unwrap().unwrap_or(0);
        }
    }
    let other = Raw::open(&exported);
    for i in 0..1000 {
        other.is_served();
        assert_eq!(other.ask(&write(i, i * 4096, &[0xee; 4096])), 0);
    }
    assert_eq!(other.ask(&plain(wire::CMD_FLUSH, 1, 0, 0)), 0);
    let memory = exported.peak_memory();
    assert!(memory < MEMORY, "{} MiB of memory", memory / MIB);
    drop((deaf, other));
    unharmed(&exported);
}

#[test]
fn client_leaves_with_replies_under_way() {
    let (_image, exported) = export();
    for round in 0..20 {
        let client = if round % 2 == 0 { Raw::open(&exported) } else { Raw::over(exported.connect_tcp()).go() };
        let mut bytes = Vec::new();
        for cookie in 0..64 {
            bytes.extend(plain(wire::CMD_READ, cookie, cookie * 4096, [4096, 1 << 20][usize::from(cookie % 3 == 0)]));
            bytes.extend(write(cookie, cookie * 8192, &[1; 8192]));
            bytes.extend(plain(wire::CMD_FLUSH, cookie, 0, 0));
        }
        // What the server takes while nobody reads its replies.
        let _ = client.socket.send_nowait(&bytes, &[]).unwrap();
        if round % 4 > 1 {
            client.receive::<100>();
        }
    }
    unharmed(&exported);
}

#[test]
fn client_says_nothing_more_and_waits_for_its_replies() {
    let (image, exported) = export();
    for round in 0..10 {
        let client = if round % 2 == 0 { Raw::open(&exported) } else { Raw::over(exported.connect_tcp()).go() };
        let reads: Vec<u8> = (0..200).flat_map(|cookie| plain(wire::CMD_READ, cookie, cookie * 512, 65537)).collect();
        client.send(&reads);
        client.half_close();
        assert_eq!(client.ends(), 200 * (16 + 65537), "every read is answered before the server closes");
    }
    // A write of somebody who has half gone may be dropped, for who knows what his successor has written; but it is
    // never answered and dropped.
    for round in 0_u64..10 {
        let client = Raw::open(&exported);
        let data = [u8::try_from(round + 1).unwrap(); 512];
        client.send(&(0..100).flat_map(|cookie| write(cookie, cookie * 512, &data)).collect::<Vec<u8>>());
        client.half_close();
        let mut there = vec![0; 512];
        let file = std::fs::File::open(&image.path).unwrap();
        let mut head = [0; 16];
        while client.socket.recv_exact_before(&mut head, Instant::now() + DEADLINE).is_ok() {
            assert_eq!(head[..8], [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4]].concat());
            let cookie = u64::from_be_bytes(*head[8..].first_chunk().unwrap());
            file.read_exact_at(&mut there, cookie * 512).unwrap();
            assert_eq!(there, data, "write {cookie} was answered");
        }
    }
    unharmed(&exported);
}

#[test]
fn client_sends_a_thousand_requests_at_once() {
    let (image, exported) = export();
    for (round, client) in [Raw::open(&exported), Raw::over(exported.connect_tcp()).go()].iter().enumerate() {
        let mark = u8::try_from(round + 1).unwrap();
        let (mut bytes, mut expected) = (Vec::new(), HashSet::new());
        for cookie in 0..1000_u64 {
            let offset = cookie * 8192;
            match cookie % 10 {
                0 => bytes.extend(plain(wire::CMD_FLUSH, cookie, 0, 0)),
                1 => bytes.extend(plain(wire::CMD_WRITE_ZEROES, cookie, offset, 8192)),
                2 => bytes.extend(plain(wire::CMD_TRIM, cookie, offset, 8192)),
                3 => bytes.extend(plain(wire::CMD_CACHE, cookie, offset, 8192)),
                4 => bytes.extend(plain(77, cookie, offset, 8192)),
                5 => bytes.extend(write(cookie, SIZE, &[mark; 512])),
                6 => {
                    bytes.extend(request(wire::CMD_FLAG_FUA, wire::CMD_WRITE, cookie, offset, 512));
                    bytes.extend([mark; 512]);
                }
                _ => bytes.extend(write(cookie, offset, &[mark; 512])),
            }
            expected.insert(cookie);
        }
        client.send(&bytes);
        for _ in 0..1000 {
            let (cookie, error) = client.reply();
            assert!(expected.remove(&cookie), "{cookie} is answered once");
            let wanted = [0, 0, 0, 0, wire::EINVAL, wire::ENOSPC, 0, 0, 0, 0][usize::try_from(cookie % 10).unwrap()];
            assert_eq!(error, wanted, "{cookie}");
        }
        let file = std::fs::File::open(&image.path).unwrap();
        for cookie in (0..1000_u64).filter(|cookie| cookie % 10 >= 6) {
            let mut there = [0; 512];
            file.read_exact_at(&mut there, cookie * 8192).unwrap();
            assert_eq!(there, [mark; 512]);
        }
        client.is_served();
    }
    unharmed(&exported);
}

#[test]
fn client_writes_and_says_goodbye_in_one_breath() {
    let (image, exported) = export();
    let file = std::fs::File::open(&image.path).unwrap();
    for (round, length) in [512, 4096, 200_000, 3 << 20, 32 << 20].into_iter().enumerate() {
        for flags in [0, wire::CMD_FLAG_FUA] {
            let data = vec![u8::try_from(round + 1).unwrap() | (u8::try_from(flags).unwrap() << 7); length];
            let mut bytes = request(flags, wire::CMD_WRITE, 5, 4096, u32::try_from(length).unwrap());
            bytes.extend(&data);
            bytes.extend(plain(wire::CMD_FLUSH, 6, 0, 0));
            bytes.extend(plain(wire::CMD_DISC, 7, 0, 0));
            let client = Raw::open(&exported);
            client.send(&bytes);
            let mut replies = [client.reply(), client.reply()];
            replies.sort_unstable();
            assert_eq!(replies, [(5, 0), (6, 0)], "what was asked before the goodbye is done");
            assert_eq!(client.ends(), 0);
            let mut there = vec![0; length];
            file.read_exact_at(&mut there, 4096).unwrap();
            assert!(there == data);
        }
    }
    unharmed(&exported);
}

#[test]
fn client_reads_while_its_flush_is_slow() {
    let (_image, exported) = export();
    let client = Raw::open(&exported);
    let data = vec![0xee; 1 << 20];
    for at in 0..64 {
        assert_eq!(client.ask(&write(at, at * MIB, &data)), 0);
    }
    // Which reply comes first is the server's business: both come, and the flush keeps no read waiting for good.
    client.send(&[plain(wire::CMD_FLUSH, 1, 0, 0), plain(wire::CMD_READ, 2, 0, 4096).repeat(100)].concat());
    let mut cookies = Vec::new();
    for _ in 0..101 {
        let (cookie, error) = client.reply();
        assert_eq!(error, 0);
        if cookie == 2 {
            assert_eq!(client.receive_bytes(4096), data[..4096]);
        }
        cookies.push(cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, [&[1][..], &[2; 100]].concat());
    drop(client);
    unharmed(&exported);
}

// ---- anything ----------------------------------------------------------------------------------------------------

/// Sends all of `bytes`, reading and forgetting what comes, until the server closes or does nothing for a while.
fn pump(socket: &Socket, bytes: &[u8], patience: Duration) {
    let (mut sent, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        let Ok(ready) = socket.wait(true, sent < bytes.len(), Some(patience)) else { return };
        if !ready.readable && !ready.writable {
            return;
        }
        if ready.readable {
            match socket.recv_nowait(&mut buffer) {
                Ok(Some(0)) | Err(_) => return,
                Ok(_) => {}
            }
        }
        if ready.writable && sent < bytes.len() {
            let Ok(count) = socket.send_nowait(&bytes[sent..], &[]) else { return };
            sent += count.unwrap_or(0);
        }
    }
}

/// A request of which some is right.
fn some_request(chance: &mut Chance) -> Vec<u8> {
    let command = u16::try_from(chance.below(10)).unwrap();
    let flags = if chance.below(3) == 0 { u16::try_from(chance.below(1 << 16)).unwrap() } else { 0 };
    let offset = if chance.below(8) == 0 { chance.next() } else { chance.below(SIZE) };
    let length = match chance.below(8) {
        0 => chance.below(1 << 32),
        1 => chance.below(64 << 20),
        _ => chance.below(9000),
    };
    let mut bytes = request(flags, command, chance.next(), offset, u32::try_from(length).unwrap());
    if command == wire::CMD_WRITE {
        let payload = if chance.below(8) == 0 { chance.below(9000) } else { length.min(9000) };
        bytes.extend(chance.bytes(usize::try_from(payload).unwrap()));
    }
    bytes
}

/// An option of which some is right.
fn some_option(chance: &mut Chance) -> Vec<u8> {
    let number = if chance.below(8) == 0 {
        u32::try_from(chance.below(1 << 32)).unwrap()
    } else {
        u32::try_from(chance.below(12)).unwrap()
    };
    let length = usize::try_from(chance.below(64)).unwrap();
    let mut data = chance.bytes(length);
    if data.len() > 8 && chance.below(2) == 0 {
        data[..4].copy_from_slice(&u32::try_from(chance.below(16)).unwrap().to_be_bytes());
    }
    let length = if chance.below(16) == 0 { chance.below(1 << 32) } else { data.len() as u64 };
    [option_head(number, u32::try_from(length).unwrap()), data].concat()
}

#[test]
fn clients_send_anything() {
    let (_image, exported) = export();
    let mut sent = 0;
    for seed in 0..400 {
        let mut chance = Chance::new(seed);
        let mut frames = |one: fn(&mut Chance) -> Vec<u8>, count: u64| -> Vec<u8> {
            (0..chance.below(count)).flat_map(|_| one(&mut chance)).collect()
        };
        let structured = option(wire::OPT_STRUCTURED_REPLY, &[]);
        let context = [&[0; 4][..], &1_u32.to_be_bytes(), &15_u32.to_be_bytes(), b"base:allocation"].concat();
        let context = option(wire::OPT_SET_META_CONTEXT, &context);
        let bytes = match seed % 4 {
            0 => frames(|chance| chance.bytes(512), 8),
            1 => [&CLIENT_FLAGS[..], &frames(some_option, 40)].concat(),
            2 => [&CLIENT_FLAGS[..], &go(), &frames(some_request, 40)].concat(),
            _ => [&CLIENT_FLAGS[..], &structured, &context, &go(), &frames(some_request, 40)].concat(),
        };
        sent += bytes.len();
        let socket = if seed % 3 == 0 { exported.connect_tcp() } else { exported.connect() };
        // Half of them stay until nothing comes any more, half leave at once.
        pump(&socket, &bytes, Duration::from_millis(if seed % 8 < 4 { 30 } else { 0 }));
        if seed % 50 == 0 {
            Raw::open(&exported).is_served();
        }
    }
    assert!(sent > 400_000, "{sent} bytes");
    unharmed(&exported);
}
