#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::limits::WINDOW_MAX;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

const SECOND: Duration = Duration::from_secs(1);
const SIZE: u64 = 1 << 30;

/// A scripted server's end, past a handshake without structured replies.
struct Server(UnixStream);

impl Server {
    /// Takes an option and answers it.
    fn option(&mut self, option: u32, length: usize, replies: &[(u32, &[u8])]) {
        self.0.read_exact(&mut [0; 64][..wire::OPTION_LENGTH + length]).unwrap();
        for &(reply, data) in replies {
            let head = wire::OptionReply { option, reply, length: u32::try_from(data.len()).unwrap() };
            self.0.write_all(&[&head.encode()[..], data].concat()).unwrap();
        }
    }

    fn request(&mut self) -> Option<Request> {
        let mut bytes = [0; wire::REQUEST_LENGTH];
        self.0.read_exact(&mut bytes).ok()?;
        Some(Request::parse(&bytes).unwrap())
    }

    /// The next request and its payload.
    fn request_with_payload(&mut self) -> Option<(Request, Vec<u8>)> {
        let request = self.request()?;
        let length = if request.command == wire::CMD_WRITE { usize::try_from(request.length).unwrap() } else { 0 };
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).ok()?;
        Some((request, payload))
    }

    fn reply(&mut self, cookie: u64) {
        self.0.write_all(&wire::simple_reply(0, cookie)).unwrap();
    }

    /// Stays until the client has gone.
    fn stay(&mut self) {
        let _ = std::io::copy(&mut self.0, &mut std::io::sink());
    }
}

/// A client of a server without structured replies that goes on as `script` says.
fn client(script: impl FnOnce(&mut Server) + Send + 'static) -> (Client, thread::JoinHandle<()>) {
    client_of(false, script)
}

fn client_of(structured: bool, script: impl FnOnce(&mut Server) + Send + 'static) -> (Client, thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(10 * SECOND)).unwrap();
    let peer = thread::spawn(move || {
        let mut server = Server(theirs);
        server.0.write_all(&wire::greeting(3)).unwrap();
        // Client flags, then options without and with data.
        server.0.read_exact(&mut [0; 4]).unwrap();
        if structured {
            server.option(wire::OPT_STRUCTURED_REPLY, 0, &[(wire::REP_ACK, &[])]);
        }
        let flags =
            wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_WRITE_ZEROES | wire::FLAG_SEND_FAST_ZERO;
        let size = wire::info_export(SIZE, flags);
        server.option(wire::OPT_GO, 12, &[(wire::REP_INFO, &size), (wire::REP_ACK, &[])]);
        script(&mut server);
    });
    let wants = Wants { structured, ..Wants::default() };
    let mut client = Client::connect(Arc::new(Socket::new(ours.into())), "disk", wants).unwrap();
    client.set_silence_max(5 * SECOND);
    (client, peer)
}

/// Waits for one request's end.
fn done(client: &mut Client) -> Result<u64, Lost> {
    let mut ended = None;
    while ended.is_none() {
        let events = client.wait(Some(5 * SECOND), &mut |event| {
            if let Event::Done { cookie, result } = event {
                result.unwrap();
                ended = Some(cookie);
            }
        })?;
        assert!(events > 0, "no answer");
    }
    Ok(ended.unwrap())
}

#[test]
fn requests_have_the_bytes_of_the_specification() {
    let (mut client, peer) = client(|server| {
        let mut commands = Vec::new();
        while let Some((request, payload)) = server.request_with_payload() {
            commands.push((request.command, request.flags, request.offset, request.length, payload.len()));
        }
        let expected = [
            (wire::CMD_READ, 0, 512, 1024, 0),
            (wire::CMD_WRITE, 0, 0, 4096, 4096),
            (wire::CMD_WRITE, wire::CMD_FLAG_FUA, 4096, 512, 512),
            (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_NO_HOLE, 0, 7, 0),
            (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_FAST_ZERO, 0, 8, 0),
            (wire::CMD_TRIM, 0, 1, 2, 0),
            (wire::CMD_FLUSH, 0, 0, 0, 0),
            (wire::CMD_BLOCK_STATUS, 0, 3, 4, 0),
            (wire::CMD_DISC, 0, 0, 0, 0),
        ];
        assert_eq!(commands, expected);
    });
    let taken = [
        client.submit_read(0, 512, 1024),
        client.submit_write(1, 0, &[1; 4096], false),
        client.submit_write(2, 4096, &[1; 512], true),
        client.submit_write_zeroes(3, 0, 7, false, false),
        client.submit_write_zeroes(4, 0, 8, true, true),
        client.submit_trim(5, 1, 2),
        client.submit_flush(6),
        client.submit_block_status(7, 3, 4),
    ];
    assert!(taken.iter().all(|taken| taken == &Ok(Submitted::Taken)));
    assert_eq!(client.in_flight(), taken.len());
    client.disconnect();
    peer.join().unwrap();
}

#[test]
fn a_client_that_is_dropped_says_goodbye_unless_it_waits_for_something() {
    for waits in [false, true] {
        let (mut client, peer) = client(move |server| {
            if waits {
                assert_eq!(server.request().unwrap().command, wire::CMD_FLUSH);
            } else {
                let goodbye = Request { flags: 0, command: wire::CMD_DISC, cookie: 0, offset: 0, length: 0 };
                assert_eq!(server.request(), Some(goodbye));
            }
            assert_eq!(server.request(), None);
        });
        if waits {
            assert_eq!(client.submit_flush(1), Ok(Submitted::Taken));
            client.push().unwrap();
        }
        drop(client);
        peer.join().unwrap();
    }
}

#[test]
fn small_requests_gather_until_pushed() {
    let (mut client, peer) = client(|server| {
        server.0.set_nonblocking(true).unwrap();
        assert!(server.0.read(&mut [0]).is_err(), "nothing has left");
        server.0.write_all(b"x").unwrap();
        server.0.set_nonblocking(false).unwrap();
        let mut bytes = [0; 3 * (28 + 4096)];
        server.0.read_exact(&mut bytes).unwrap();
        server.stay();
    });
    for cookie in 0..3 {
        assert_eq!(client.submit_write(cookie, 0, &[7; 4096], false), Ok(Submitted::Taken));
    }
    // The server has looked: only now they leave.
    assert!(client.socket.wait(true, false, Some(5 * SECOND)).unwrap().readable);
    client.push().unwrap();
    drop(client);
    peer.join().unwrap();
}

#[test]
fn answers_come_in_any_order() {
    let (mut client, peer) = client(|server| {
        let requests: Vec<Request> = (0..WINDOW_MAX).map(|_| server.request().unwrap()).collect();
        for request in requests.iter().rev() {
            server.reply(request.cookie);
        }
        server.stay();
    });
    for cookie in 0..WINDOW_MAX as u64 {
        assert_eq!(client.submit_flush(1000 + cookie), Ok(Submitted::Taken));
    }
    assert_eq!(client.submit_flush(0), Ok(Submitted::WaitFirst), "the window is full");
    let mut ended = Vec::new();
    while client.in_flight() > 0 {
        let mut each = |event: Event<'_>| match event {
            Event::Done { cookie, result: Ok(()) } => ended.push(cookie),
            other => panic!("{other:?}"),
        };
        assert!(client.wait(Some(5 * SECOND), &mut each).unwrap() > 0);
    }
    assert!(ended.iter().rev().copied().eq(1000..1000 + WINDOW_MAX as u64));
    assert_eq!(client.wait(None, &mut |_| {}), Ok(0), "nothing is in flight");
    drop(client);
    peer.join().unwrap();
}

#[test]
fn wait_ends_with_its_timeout() {
    let (mut client, peer) = client(|server| {
        let request = server.request().unwrap();
        // Half a reply is no event.
        server.0.write_all(&wire::simple_reply(0, request.cookie)[..9]).unwrap();
        server.request().unwrap();
        server.0.write_all(&wire::simple_reply(0, request.cookie)[9..]).unwrap();
        server.stay();
    });
    assert_eq!(client.submit_flush(1), Ok(Submitted::Taken));
    let started = Instant::now();
    assert_eq!(client.wait(Some(SECOND / 20), &mut |_| {}), Ok(0));
    assert!(started.elapsed() >= SECOND / 20);
    assert_eq!(client.wait(Some(Duration::ZERO), &mut |_| {}), Ok(0));
    assert_eq!(client.submit_flush(2), Ok(Submitted::Taken));
    assert_eq!(done(&mut client), Ok(1));
    drop(client);
    peer.join().unwrap();
}

/// A server that reads nothing while its replies are not read: it answers every request before it takes the next, with
/// the smallest socket buffers that there are.
#[test]
fn a_server_that_only_sends_while_we_send_is_no_deadlock() {
    let (mut client, peer) = client(|server| {
        let read = server.request().unwrap();
        server.0.write_all(&wire::simple_reply(0, read.cookie)).unwrap();
        // Far more than the socket and the client's buffer hold.
        server.0.write_all(&vec![9; read.length as usize]).unwrap();
        while let Some((request, payload)) = server.request_with_payload() {
            if request.command == wire::CMD_DISC {
                return;
            }
            assert!(payload.iter().all(|&byte| byte == 3));
            server.reply(request.cookie);
        }
    });
    assert_eq!(client.submit_read(1, 0, 16 << 20), Ok(Submitted::Taken));
    client.push().unwrap();
    let payload = vec![3; 8 << 20];
    let mut got = 0;
    let mut refused = 0;
    while client.submit_write(2, 0, &payload, false).unwrap() == Submitted::WaitFirst {
        refused += 1;
        let mut each = |event: Event<'_>| match event {
            Event::Data { bytes, offset, .. } => {
                assert_eq!(offset, got);
                assert!(bytes.iter().all(|&byte| byte == 9));
                got += bytes.len() as u64;
            }
            event => assert_eq!(event, Event::Done { cookie: 1, result: Ok(()) }),
        };
        assert!(client.wait(Some(5 * SECOND), &mut each).unwrap() > 0);
    }
    assert!(refused > 0 && got == 16 << 20);
    assert_eq!(done(&mut client), Ok(2));
    drop(client);
    peer.join().unwrap();
}

/// The server does not read on until its replies to the writes before are taken, and those are long: errors with all
/// the text that there can be.
#[test]
fn replies_are_received_in_the_middle_of_a_payload() {
    let small = WINDOW_MAX as u64 - 1;
    let (mut client, peer) = client_of(true, move |server| {
        let open: Vec<Request> = (0..small).map(|_| server.request_with_payload().unwrap().0).collect();
        let large = server.request().unwrap();
        for request in open {
            let head = wire::structured_chunk(1, wire::REPLY_TYPE_ERROR, request.cookie, 6 + 4096);
            let reply = [&head[..], &wire::error_chunk(wire::ENOSPC, 4096), &[b'x'; 4096]].concat();
            server.0.write_all(&reply).unwrap();
        }
        let mut payload = vec![0; large.length as usize];
        server.0.read_exact(&mut payload).unwrap();
        assert!(payload.iter().enumerate().all(|(at, &byte)| byte == (at / 1000 % 251) as u8));
        server.reply(large.cookie);
        server.stay();
    });
    for cookie in 0..small {
        assert_eq!(client.submit_write(cookie, 0, &[1; 512], false), Ok(Submitted::Taken));
    }
    let payload: Vec<u8> = (0..32 << 20).map(|at: u32| (at / 1000 % 251) as u8).collect();
    assert_eq!(client.submit_write(small, 0, &payload, false), Ok(Submitted::Taken));
    let mut ended = 0;
    while client.in_flight() > 0 {
        let mut each = |event: Event<'_>| match event {
            Event::Done { cookie, result } => {
                assert_eq!((cookie, result.is_ok()), (ended, ended == small));
                ended += 1;
            }
            event => panic!("{event:?}"),
        };
        assert!(client.wait(Some(5 * SECOND), &mut each).unwrap() > 0);
    }
    drop(client);
    peer.join().unwrap();
}

#[test]
fn server_stops_to_read() {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let (mut client, peer) = client(move |server| {
        server.request().unwrap();
        let _ = ended.recv();
    });
    client.set_silence_max(SECOND / 5);
    let lost = client.submit_write(1, 0, &vec![1; 32 << 20], false).unwrap_err();
    assert_eq!(lost.to_string(), "sending to the server: the server has stopped to read, with 1 requests in flight");
    assert_eq!(client.wait(None, &mut |_| {}), Err(lost.clone()), "and it stays lost");
    assert_eq!(client.push(), Err(lost));
    drop(end);
    peer.join().unwrap();
}

#[test]
fn server_stops_to_answer_a_simple_call() {
    let (mut client, peer) = client(Server::stay);
    client.set_silence_max(SECOND / 5);
    let error = client.flush().unwrap_err().to_string();
    assert_eq!(error, "FLUSH: the server has stopped to answer, with 1 requests in flight");
    drop(client);
    peer.join().unwrap();
}

#[test]
fn server_closes_with_requests_in_flight() {
    for sent in [0, 7] {
        let (mut client, peer) = client(move |server| {
            let request = server.request().unwrap();
            server.0.write_all(&wire::simple_reply(0, request.cookie)[..sent]).unwrap();
        });
        assert_eq!(client.submit_flush(1), Ok(Submitted::Taken));
        let lost = client.wait(None, &mut |_| {}).unwrap_err();
        let text = "receiving from the server: the server closed the connection, with 1 requests in flight";
        assert_eq!(lost.to_string(), text);
        peer.join().unwrap();
    }
}

#[test]
fn server_answers_unknown_cookie() {
    let (mut client, peer) = client(|server| {
        let request = server.request().unwrap();
        server.reply(request.cookie);
        server.reply(request.cookie);
        let mut rest = Vec::new();
        server.0.read_to_end(&mut rest).unwrap();
    });
    assert_eq!(client.submit_flush(1), Ok(Submitted::Taken));
    // The second answer may come with the first or with the next wait.
    let lost = loop {
        match client.wait(Some(5 * SECOND), &mut |_| {}) {
            Ok(_) => assert_eq!(client.submit_flush(2), Ok(Submitted::Taken)),
            Err(lost) => break lost,
        }
    };
    assert!(lost.to_string().starts_with("receiving from the server: the server answered the unknown cookie 0x"));
    peer.join().unwrap();
}

/// Extents that are shorter than the blocks which the server demands: the next question would be the same for ever.
#[test]
fn server_tells_less_than_one_of_its_blocks() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        let mut server = Server(theirs);
        server.0.write_all(&wire::greeting(3)).unwrap();
        server.0.read_exact(&mut [0; 4]).unwrap();
        server.option(wire::OPT_EXTENDED_HEADERS, 0, &[(wire::REP_ERR_UNSUP, &[])]);
        server.option(wire::OPT_STRUCTURED_REPLY, 0, &[(wire::REP_ACK, &[])]);
        let context = [&7_u32.to_be_bytes()[..], wire::BASE_ALLOCATION.as_bytes()].concat();
        let replies = [(wire::REP_META_CONTEXT, &context[..]), (wire::REP_ACK, &[])];
        server.option(wire::OPT_SET_META_CONTEXT, 31, &replies);
        let (size, blocks) = (wire::info_export(SIZE, 1), wire::info_block_size(4096, 4096, 1 << 20));
        server.option(wire::OPT_GO, 12, &[(wire::REP_INFO, &size), (wire::REP_INFO, &blocks), (wire::REP_ACK, &[])]);
        for length in [5000, 100] {
            let request = server.request().unwrap();
            assert_eq!(request.offset % 4096, 0, "in whole blocks");
            let head = wire::structured_chunk(1, wire::REPLY_TYPE_BLOCK_STATUS, request.cookie, 12);
            let reply = [&head[..], &wire::block_status(7), &wire::extent(length, 3)].concat();
            server.0.write_all(&reply).unwrap();
        }
        server.stay();
    });
    let mut client = Client::connect(Arc::new(Socket::new(ours.into())), "disk", Wants::READING).unwrap();
    let mut told = Vec::new();
    let error = client.block_status(10, 1 << 20, &mut |extent| told.push((extent.offset, extent.length))).unwrap_err();
    assert_eq!(told, [(10, 4990)], "nothing before the range, and nothing twice");
    let text = "BLOCK_STATUS: the server told nothing about the bytes at 5000, with 0 requests in flight";
    assert_eq!(error.to_string(), text);
    assert!(client.has_hung_up(), "and that ends the connection");
    drop(client);
    peer.join().unwrap();
}

#[test]
fn somebody_else_can_end_it() {
    let (mut client, peer) = client(Server::stay);
    let socket = Arc::clone(&client.socket);
    assert_eq!(client.submit_flush(1), Ok(Submitted::Taken));
    let waiter = thread::spawn(move || client.wait(None, &mut |_| {}).unwrap_err());
    socket.shutdown();
    assert!(waiter.join().unwrap().to_string().contains("ing "), "woken up");
    peer.join().unwrap();
}
