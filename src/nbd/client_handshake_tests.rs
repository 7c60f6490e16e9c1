#![allow(clippy::unwrap_used)]

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

const ALL: Wants<'_> = Wants { extended: false, ..Wants::READING };

/// A scripted server's end.
struct Server(UnixStream);

impl Server {
    fn send(&mut self, parts: &[&[u8]]) {
        self.0.write_all(&parts.concat()).unwrap();
    }

    fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn greet(&mut self, flags: u16) -> u32 {
        self.send(&[&wire::greeting(flags)]);
        u32::from_be_bytes(self.receive())
    }

    /// The next option and its data.
    fn option(&mut self) -> (u32, Vec<u8>) {
        let head = OptionHead::parse(&self.receive()).unwrap();
        let mut data = vec![0; head.length as usize];
        self.0.read_exact(&mut data).unwrap();
        (head.option, data)
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.send(&[&OptionReply { option, reply, length }.encode(), data]);
    }

    /// Takes the next option, which is `option`, and answers it.
    fn answer(&mut self, option: u32, reply: u32, data: &[u8]) {
        assert_eq!(self.option().0, option);
        self.reply(option, reply, data);
    }

    /// Whether the client has closed.
    fn ends(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

fn with<T>(server: impl FnOnce(Server) + Send + 'static, client: impl FnOnce(&Socket) -> T) -> T {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let peer = thread::spawn(move || server(Server(theirs)));
    let socket = Socket::new(ours.into());
    let result = client(&socket);
    drop(socket);
    peer.join().unwrap();
    result
}

fn connect(server: impl FnOnce(Server) + Send + 'static) -> Result<ExportInfo, ConnectError> {
    connect_within(Duration::from_secs(2), server)
}

fn connect_within(limit: Duration, server: impl FnOnce(Server) + Send + 'static) -> Result<ExportInfo, ConnectError> {
    with(server, |socket| negotiate_before(socket, "disk", ALL, Instant::now() + limit))
}

/// A server that knows GO, up to there; `go` answers it.
fn until_go(go: impl FnOnce(&mut Server) + Send + 'static) -> impl FnOnce(Server) + Send + 'static {
    move |mut server| {
        assert_eq!(server.greet(3), 3);
        server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
        assert_eq!(
            server.option(),
            (wire::OPT_SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation".to_vec())
        );
        server.reply(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, b"\0\0\0\x2abase:allocation");
        server.reply(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]);
        assert_eq!(server.option(), (wire::OPT_GO, b"\0\0\0\x04disk\0\x01\0\x03".to_vec()));
        go(&mut server);
    }
}

fn info(server: &mut Server, data: &[u8]) {
    server.reply(wire::OPT_GO, wire::REP_INFO, data);
}

fn ack(server: &mut Server) {
    server.reply(wire::OPT_GO, wire::REP_ACK, &[]);
}

/// The text of the error that a server which answers GO so brings about.
fn refused(go: impl FnOnce(&mut Server) + Send + 'static) -> String {
    connect(until_go(go)).unwrap_err().to_string()
}

#[test]
fn server_with_everything() {
    let told = connect(until_go(|server| {
        info(server, &[0, 99, 1, 2, 3]);
        info(server, &wire::info_block_size(4096, 65536, u32::MAX));
        info(server, b"\x00\x01disk");
        info(server, &wire::info_export(1 << 40, 0xffff));
        ack(server);
    }));
    let expected = ExportInfo {
        size: 1 << 40,
        transmission_flags: 0xffff,
        minimum_block: 4096,
        preferred_block: 65536,
        maximum_payload: PAYLOAD_MAX,
        structured: true,
        extended: false,
        contexts: [Some(0x2a), None, None, None],
        base_allocation: Some(0),
    };
    assert_eq!(told.unwrap(), expected);
}

#[test]
fn server_that_tells_only_the_size() {
    let told = connect(until_go(|server| {
        info(server, &wire::info_export(4096, 1));
        ack(server);
    }));
    let told = told.unwrap();
    assert_eq!((told.minimum_block, told.preferred_block, told.maximum_payload), (512, 4096, 32 << 20));
}

#[test]
fn server_with_odd_size_constraints() {
    let cases = [
        ((1, 3, 5000), Some((1, 4096, 5000))),
        ((512, 1, 5000), Some((512, 512, 4608))),
        ((65536, 4096, 65536), Some((65536, 65536, 65536))),
        ((0, 4096, 65536), None),
        ((3, 4096, 65536), None),
        ((1 << 17, 1 << 17, 1 << 20), None),
        ((4096, 4096, 512), None),
    ];
    for ((minimum, preferred, maximum), expected) in cases {
        let told = connect(until_go(move |server| {
            info(server, &wire::info_export(4096, 1));
            info(server, &wire::info_block_size(minimum, preferred, maximum));
            server.0.set_nonblocking(true).unwrap();
            let _ = server.0.write_all(&OptionReply { option: wire::OPT_GO, reply: wire::REP_ACK, length: 0 }.encode());
        }));
        let told = told.ok().map(|info| (info.minimum_block, info.preferred_block, info.maximum_payload));
        assert_eq!(told, expected);
    }
}

#[test]
fn server_that_knows_no_option_is_opened_by_name() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let told = connect(move |mut server| {
            assert_eq!(server.greet(flags), u32::from(flags));
            server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ERR_UNSUP, b"what?");
            server.answer(wire::OPT_GO, wire::REP_ERR_UNSUP, &[]);
            assert_eq!(server.option(), (wire::OPT_EXPORT_NAME, b"disk".to_vec()));
            server.send(&[&wire::export_answer(8192, 5), &[0; 124][..zeroes]]);
        });
        let told = told.unwrap();
        assert_eq!((told.size, told.transmission_flags, told.structured), (8192, 5, false));
    }
}

#[test]
fn server_without_fixed_newstyle_is_opened_by_name() {
    let told = connect(|mut server| {
        assert_eq!(server.greet(0), 0);
        assert_eq!(server.option(), (wire::OPT_EXPORT_NAME, b"disk".to_vec()));
        server.send(&[&wire::export_answer(8192, 5), &[0; 124]]);
    });
    assert_eq!(told.unwrap().base_allocation, None);
}

#[test]
fn server_closes_instead_of_saying_that_it_has_no_such_export() {
    let told = connect(|mut server| {
        server.greet(0);
        server.option();
    });
    let text = told.unwrap_err().to_string();
    assert_eq!(text, "opening the export by name: the server closed: it has no such export");
}

#[test]
fn server_knows_extended_headers() {
    let script = |go: u32| {
        move |mut server: Server| {
            server.greet(3);
            server.answer(wire::OPT_EXTENDED_HEADERS, wire::REP_ACK, &[]);
            server.answer(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]);
            assert_eq!(server.option().0, wire::OPT_GO, "structured replies are not asked for");
            if go == wire::REP_ACK {
                info(&mut server, &wire::info_export(8192, 1));
            }
            server.reply(wire::OPT_GO, go, &[]);
        }
    };
    let told = with(script(wire::REP_ACK), |socket| negotiate(socket, "disk", Wants::READING)).unwrap();
    assert!(told.extended && told.structured);
    let error = with(script(wire::REP_ERR_UNSUP), |socket| negotiate(socket, "disk", Wants::READING)).unwrap_err();
    let text = "opening the export: the server broke the protocol: GO is unknown after extended headers";
    assert_eq!(error.to_string(), text, "EXPORT_NAME is not allowed any more");

    for reply in [wire::REP_ERR_UNSUP, wire::REP_ERR_POLICY] {
        let script = move |mut server: Server| {
            server.greet(3);
            server.answer(wire::OPT_EXTENDED_HEADERS, reply, &[]);
            server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
            server.answer(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]);
            server.option();
            info(&mut server, &wire::info_export(8192, 1));
            ack(&mut server);
        };
        let told = with(script, |socket| negotiate(socket, "disk", Wants::READING)).unwrap();
        assert!(!told.extended && told.structured);
    }
}

#[test]
fn server_has_some_of_the_contexts() {
    let names = ["qemu:dirty-bitmap:b0", "", "qemu:allocation-depth", wire::BASE_ALLOCATION, "a:fifth"];
    let wants = Wants { structured: true, extended: false, contexts: &names };
    let script = |mut server: Server| {
        server.greet(3);
        server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
        let (option, data) = server.option();
        assert_eq!(option, wire::OPT_SET_META_CONTEXT);
        let mut expected = b"\0\0\0\x04disk\0\0\0\x03".to_vec();
        for name in ["qemu:dirty-bitmap:b0", "qemu:allocation-depth", wire::BASE_ALLOCATION] {
            expected.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            expected.extend_from_slice(name.as_bytes());
        }
        assert_eq!(data, expected);
        server.reply(option, wire::REP_META_CONTEXT, b"\0\0\0\0base:allocation");
        server.reply(option, wire::REP_META_CONTEXT, b"\0\0\0\x02qemu:dirty-bitmap:b0");
        server.reply(option, wire::REP_ACK, &[]);
        server.option();
        info(&mut server, &wire::info_export(8192, 1));
        ack(&mut server);
    };
    let told = with(script, |socket| negotiate(socket, "disk", wants)).unwrap();
    assert_eq!(told.contexts, [Some(2), None, None, Some(0)]);
    assert_eq!(told.base_allocation, Some(3));
}

#[test]
fn what_a_server_lacks_is_told() {
    let info = ExportInfo {
        size: 1 << 20,
        transmission_flags: 0,
        minimum_block: 512,
        preferred_block: 4096,
        maximum_payload: 3 * 512,
        structured: false,
        extended: false,
        contexts: [None; CONTEXTS_MAX],
        base_allocation: None,
    };
    assert_eq!((info.connections(4), info.request_max(), info.zeroes_max()), (1, 32 * 1536, 32 * 1536));
    assert_eq!([0, 1536, 1537].map(|length| info.parts(length)), [1, 1, 2]);
    assert_eq!(info.blocks_around(513, 1025), (512, 1536));
    let flags = wire::FLAG_CAN_MULTI_CONN | wire::FLAG_SEND_WRITE_ZEROES;
    let info = ExportInfo { transmission_flags: flags, maximum_payload: PAYLOAD_MAX, size: 1030, ..info };
    assert_eq!((info.connections(4), info.request_max(), info.zeroes_max()), (4, PAYLOAD_MAX, 0xffff_fe00));
    assert_eq!(info.blocks_around(513, 1025), (512, 1030), "the export ends within a block");
}

#[test]
fn server_without_contexts_is_used_without() {
    for reply in [wire::REP_ERR_UNSUP, wire::REP_ERR_POLICY, wire::REP_ACK] {
        let told = connect(move |mut server| {
            server.greet(3);
            server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
            server.answer(wire::OPT_SET_META_CONTEXT, reply, &[]);
            server.option();
            info(&mut server, &wire::info_export(8192, 1));
            ack(&mut server);
        });
        let told = told.unwrap();
        assert_eq!((told.structured, told.base_allocation), (true, None));
    }
}

#[test]
fn server_refuses_the_export() {
    let error = connect(until_go(|server| {
        server.reply(wire::OPT_GO, wire::REP_ERR_UNKNOWN, b"no\nsuch disk");
        assert_eq!(server.option().0, wire::OPT_ABORT, "the client says goodbye");
        assert!(server.ends());
    }));
    let error = error.unwrap_err();
    assert!(error.is_unknown_export());
    assert_eq!(error.to_string(), "opening the export: the server refused: ERR_UNKNOWN (no?such disk)");
    let text = refused(|server| server.reply(wire::OPT_GO, wire::REP_ERR_POLICY, &[]));
    assert_eq!(text, "opening the export: the server refused: ERR_POLICY");
}

#[test]
fn server_wants_tls_or_goes_away() {
    let text = refused(|server| server.reply(wire::OPT_GO, wire::REP_ERR_TLS_REQD, &[]));
    assert_eq!(text, "greeting the server: the server requires TLS");
    for reply in [wire::REP_ERR_TLS_REQD, wire::REP_ERR_SHUTDOWN] {
        let ended = connect(move |mut server| {
            server.greet(3);
            server.answer(wire::OPT_STRUCTURED_REPLY, reply, &[]);
            assert_eq!(server.option().0, wire::OPT_ABORT);
        });
        ended.unwrap_err();
    }
}

#[test]
fn server_breaks_the_protocol() {
    let cases: [(&str, String); 8] = [
        ("no size was told", refused(ack)),
        ("malformed information about the export", refused(|server| info(server, &[0; 11]))),
        ("malformed information about the export", refused(|server| info(server, &[0; 13]))),
        ("malformed size constraints", refused(|server| info(server, &[0, 3, 0]))),
        ("an unexpected reply", refused(|server| server.reply(wire::OPT_GO, wire::REP_SERVER, &[0; 8]))),
        ("a reply to another option", refused(|server| server.reply(wire::OPT_INFO, wire::REP_ACK, &[]))),
        ("no reply to an option", refused(|server| server.send(&[&[7; 20]]))),
        (
            "a reply of excessive length",
            refused(|server| {
                let head = OptionReply { option: wire::OPT_GO, reply: wire::REP_INFO, length: u32::MAX };
                server.send(&[&head.encode()]);
            }),
        ),
    ];
    for (expected, text) in cases {
        assert_eq!(text, format!("opening the export: the server broke the protocol: {expected}"));
    }
}

#[test]
fn server_replies_without_an_end() {
    let text = refused(|server| {
        let reply = OptionReply { option: wire::OPT_GO, reply: wire::REP_INFO, length: 2 }.encode();
        while server.0.write_all(&[&reply[..], &[0, 77]].concat()).is_ok() {}
    });
    assert!(text.ends_with("replies without an end"), "{text}");
}

#[test]
fn server_chooses_a_context_that_was_not_asked_for() {
    let ended = connect(|mut server| {
        server.greet(3);
        server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]);
        server.answer(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, b"\0\0\0\x01base:other");
    });
    assert!(ended.unwrap_err().to_string().contains("was not asked for"));
}

#[test]
fn server_is_something_else() {
    let ended = connect(|mut server| server.send(&[b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"]));
    assert_eq!(ended.unwrap_err().to_string(), "greeting the server: this is no NBD server");
    let ended = connect(|mut server| server.send(&[b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", &[0; 136]]));
    assert_eq!(ended.unwrap_err().to_string(), "greeting the server: the server is oldstyle, which is not supported");
    let ended = connect(|mut server| server.send(&[b"NBDMAGIC"]));
    assert_eq!(ended.unwrap_err().to_string(), "greeting the server: the server closed the connection");
}

#[test]
fn server_is_silent() {
    let started = Instant::now();
    let ended = connect_within(Duration::from_millis(200), |mut server| assert!(server.ends()));
    assert_eq!(ended.unwrap_err().to_string(), "greeting the server: no answer from the server within 10 s");
    let ended = connect_within(Duration::from_millis(200), |mut server| {
        server.greet(3);
        server.option();
        assert!(server.ends());
    });
    assert!(matches!(ended, Err(ConnectError::TooSlow("asking for structured replies"))), "{ended:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn server_trickles_byte_by_byte() {
    let told = connect(|mut server| {
        for byte in wire::greeting(1) {
            server.send(&[&[byte]]);
            thread::yield_now();
        }
        assert_eq!(server.receive::<4>(), [0, 0, 0, 1]);
        server.answer(wire::OPT_STRUCTURED_REPLY, wire::REP_ERR_UNSUP, &[]);
        server.option();
        let size = OptionReply { option: wire::OPT_GO, reply: wire::REP_INFO, length: 12 }.encode();
        let done = OptionReply { option: wire::OPT_GO, reply: wire::REP_ACK, length: 0 }.encode();
        for byte in [&size[..], &wire::info_export(512, 1), &done].concat() {
            server.send(&[&[byte]]);
            thread::yield_now();
        }
    });
    assert_eq!(told.unwrap().size, 512);
}

#[test]
fn a_name_that_cannot_be_is_not_asked_for() {
    for name in ["a\0b".to_owned(), "x".repeat(EXPORT_NAME_MAX + 1)] {
        let ended = with(|_| {}, |socket| negotiate(socket, &name, ALL));
        assert!(matches!(ended, Err(ConnectError::Name)));
    }
}

#[test]
fn phases_are_offered_to_every_kind_of_server() {
    let phases = wire::OPT_BLOCKFERRY_PHASES;
    let ask = |server: Box<dyn FnOnce(Server) + Send>| with(server, offer_phases);
    let answer = |reply: u32| -> Box<dyn FnOnce(Server) + Send> {
        Box::new(move |mut server| {
            server.greet(3);
            server.answer(phases, reply, &[]);
        })
    };
    assert_eq!(ask(answer(wire::REP_ACK)).unwrap(), PhasesAnswer::Accepted);
    assert_eq!(ask(answer(wire::REP_ERR_UNSUP)).unwrap(), PhasesAnswer::PlainServer);
    assert_eq!(ask(answer(wire::REP_ERR_POLICY)).unwrap(), PhasesAnswer::PlainServer);
    assert!(matches!(ask(answer(wire::REP_ERR_TLS_REQD)), Err(ConnectError::TlsRequired)));
    assert!(matches!(ask(answer(wire::REP_ERR_SHUTDOWN)), Err(ConnectError::Refused { .. })));
    let old = ask(Box::new(|mut server| server.send(&[&wire::greeting(0)])));
    assert_eq!(old.unwrap(), PhasesAnswer::PlainServer);
}

#[test]
fn nothing_behind_the_acceptance_of_phases_is_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let ack = OptionReply { option: wire::OPT_BLOCKFERRY_PHASES, reply: wire::REP_ACK, length: 0 };
    theirs.write_all(&[&wire::greeting(3)[..], &ack.encode(), b"hello"].concat()).unwrap();
    let socket = Socket::new(ours.into());
    assert_eq!(offer_phases(&socket).unwrap(), PhasesAnswer::Accepted);
    let mut rest = [0; 16];
    assert_eq!(socket.recv(&mut rest).unwrap(), 5);
}
