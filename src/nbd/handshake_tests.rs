#![allow(clippy::unwrap_used)]

use super::*;
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

/// Two disks, one of them refused, and a count of how often one was opened.
struct Door {
    phases: bool,
    opened: Cell<usize>,
}

impl Directory for &Door {
    type Opened = &'static str;

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each("sda", "the first disk");
        each("sdb", "");
    }

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        match name {
            "" | "sda" => {
                let flags = wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_DF;
                let mut description = Description::new(1 << 20, flags);
                description.name.push_str("sda").unwrap();
                description.text.push_str("the first disk").unwrap();
                Ok(description)
            }
            "sdb" => Err(OpenError::Refused(Cause::new("sdb is being received"))),
            "given" => Err(OpenError::Shutdown(Cause::new("the guest lives elsewhere"))),
            _ => Err(OpenError::Unknown),
        }
    }

    fn open(&self, name: &str) -> Result<(Description, &'static str), OpenError> {
        let description = self.describe(name)?;
        self.opened.set(self.opened.get() + 1);
        Ok((description, "sda"))
    }

    fn takes_phases(&self) -> bool {
        self.phases
    }
}

type Ended = Result<Outcome<&'static str>, HandshakeError>;

/// Runs the server's side against what `client` does with its end, within two seconds.
fn against(phases: bool, client: impl FnOnce(UnixStream) + Send + 'static) -> (Ended, usize) {
    within(phases, Duration::from_secs(2), client)
}

fn within(phases: bool, limit: Duration, client: impl FnOnce(UnixStream) + Send + 'static) -> (Ended, usize) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let peer = thread::spawn(move || client(theirs));
    let door = Door { phases, opened: Cell::new(0) };
    let socket = Socket::new(ours.into());
    let ended = haggle_before(&socket, &&door, Instant::now() + limit);
    drop(socket);
    peer.join().unwrap();
    (ended, door.opened.get())
}

fn receive<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Takes the greeting and answers with `flags`.
fn greet(stream: &mut UnixStream, flags: u32) {
    assert_eq!(receive(stream), wire::greeting(3));
    stream.write_all(&flags.to_be_bytes()).unwrap();
}

fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) {
    stream.write_all(&OptionHead { option, length: length32(data.len()) }.encode()).unwrap();
    stream.write_all(data).unwrap();
}

/// Sends an option and returns its replies up to the last.
fn ask(stream: &mut UnixStream, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    send_option(stream, option, data);
    let mut replies = Vec::new();
    loop {
        let head = OptionReply::parse(&receive(stream)).unwrap();
        assert_eq!(head.option, option);
        let mut data = vec![0; usize::try_from(head.length).unwrap()];
        stream.read_exact(&mut data).unwrap();
        let last = head.reply == wire::REP_ACK || head.is_error();
        replies.push((head.reply, data));
        if last {
            return replies;
        }
    }
}

/// The last reply to an option.
fn verdict(stream: &mut UnixStream, option: u32, data: &[u8]) -> u32 {
    ask(stream, option, data).pop().unwrap().0
}

fn info_data(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = length32(name.len()).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
    data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = length32(name.len()).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&length32(queries.len()).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&length32(query.len()).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

fn agreed(ended: &Ended) -> Agreed {
    match ended {
        Ok(Outcome::Transmission { opened: "sda", agreed }) => *agreed,
        other => panic!("not in transmission: {other:?}"),
    }
}

#[test]
fn go_answers_every_kind_of_information() {
    let (ended, opened) = against(false, |mut stream| {
        greet(&mut stream, 3);
        let all = [0, 1, 2, 3, 77];
        let info = ask(&mut stream, wire::OPT_INFO, &info_data("", &all));
        let go = ask(&mut stream, wire::OPT_GO, &info_data("", &all));
        assert_eq!(info, go);
        let data: Vec<_> = go.into_iter().map(|(_, data)| data).collect();
        assert_eq!(data[0], wire::info_export(1 << 20, wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_FLUSH));
        assert_eq!(data[1], b"\x00\x01sda");
        assert_eq!(data[2], b"\x00\x02the first disk");
        assert_eq!(data[3], wire::info_block_size(1, 4096, 1 << 25));
        assert_eq!(data.len(), 5, "an unknown kind is ignored");
    });
    assert_eq!(agreed(&ended), Agreed { structured: false, extended: false, base_allocation: false });
    assert_eq!(opened, 1, "INFO opens nothing");
}

#[test]
fn export_name_answers_with_and_without_zeroes() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let (ended, _) = against(false, move |mut stream| {
            greet(&mut stream, flags);
            send_option(&mut stream, wire::OPT_EXPORT_NAME, b"sda");
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert_eq!(answer.len(), 10 + zeroes);
            assert_eq!(answer[..10], wire::export_answer(1 << 20, 5));
        });
        agreed(&ended);
    }
}

#[test]
fn client_asks_for_an_export_that_it_does_not_get() {
    let (ended, opened) = against(false, |mut stream| {
        greet(&mut stream, 1);
        let go = wire::OPT_GO;
        assert_eq!(ask(&mut stream, go, &info_data("x", &[])), [(wire::REP_ERR_UNKNOWN, b"no such export".to_vec())]);
        let refused = ask(&mut stream, go, &info_data("sdb", &[]));
        assert_eq!(refused, [(wire::REP_ERR_POLICY, b"sdb is being received".to_vec())]);
        assert_eq!(verdict(&mut stream, go, &info_data("given", &[])), wire::REP_ERR_SHUTDOWN);
        send_option(&mut stream, wire::OPT_EXPORT_NAME, b"sdb");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client's export is refused: sdb is being received");
    assert_eq!(opened, 0);
}

#[test]
fn list_names_the_exports_in_order() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 1);
        let list = ask(&mut stream, wire::OPT_LIST, &[]);
        assert_eq!(list[0], (wire::REP_SERVER, b"\x00\x00\x00\x03sdathe first disk".to_vec()));
        assert_eq!(list[1], (wire::REP_SERVER, b"\x00\x00\x00\x03sdb".to_vec()));
        assert_eq!(list[2], (wire::REP_ACK, vec![]));
        assert_eq!(verdict(&mut stream, wire::OPT_LIST, b"x"), wire::REP_ERR_INVALID);
        assert_eq!(verdict(&mut stream, wire::OPT_ABORT, b"ignored"), wire::REP_ACK);
    });
    assert!(matches!(ended, Ok(Outcome::Ended)));
}

#[test]
fn client_closes_between_options() {
    for bytes in [&b""[..], &[0, 0, 0, 1]] {
        let (ended, _) = against(false, move |mut stream| {
            receive::<18>(&mut stream);
            stream.write_all(bytes).unwrap();
        });
        assert!(matches!(ended, Ok(Outcome::Ended)), "{ended:?}");
    }
}

#[test]
fn client_disconnects_inside_option() {
    let whole = [&OptionHead { option: wire::OPT_GO, length: 9 }.encode()[..], &info_data("sda", &[])].concat();
    for cut in 1..whole.len() {
        let part = whole[..cut].to_vec();
        let (ended, _) = against(false, move |mut stream| {
            greet(&mut stream, 1);
            stream.write_all(&part).unwrap();
        });
        let text = ended.unwrap_err().to_string();
        assert!(text.starts_with("handshake: the client left inside an option's "), "{cut}: {text}");
    }
}

#[test]
fn client_trickles_byte_by_byte() {
    let (ended, _) = against(false, |mut stream| {
        receive::<18>(&mut stream);
        let head = OptionHead { option: wire::OPT_GO, length: 9 };
        for byte in [&[0, 0, 0, 1], &head.encode()[..], &info_data("sda", &[])].concat() {
            stream.write_all(&[byte]).unwrap();
            thread::yield_now();
        }
        assert_eq!(OptionReply::parse(&receive(&mut stream)).unwrap().reply, wire::REP_INFO);
    });
    agreed(&ended);
}

#[test]
fn client_is_silent_or_too_slow() {
    for dribble in [false, true] {
        let started = Instant::now();
        let (ended, _) = within(false, Duration::from_millis(200), move |mut stream| {
            greet(&mut stream, 1);
            let mut byte = 0;
            while dribble && stream.write_all(&[b"IHAVEOPT"[byte % 8]]).is_ok() {
                byte += 1;
                thread::sleep(Duration::from_millis(if byte < 8 { 20 } else { 2000 }));
            }
            // Until the server gives up.
            assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
        });
        assert!(matches!(ended, Err(HandshakeError::TooSlow("an option's head"))), "{ended:?}");
        assert!(started.elapsed() < Duration::from_secs(4));
    }
}

#[test]
fn client_never_reads_the_replies() {
    let (ended, _) = within(false, Duration::from_millis(300), |mut stream| {
        greet(&mut stream, 1);
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let list = OptionHead { option: wire::OPT_INFO, length: 4000 }.encode();
        while stream.write_all(&list).and_then(|()| stream.write_all(&[0; 4000])).is_ok() {}
    });
    assert!(ended.is_err(), "{ended:?}");
}

#[test]
fn client_sets_unknown_flags() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 5);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client set unknown flags 0x5");
}

#[test]
fn client_sends_something_else() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 1);
        stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client sent no option but \"GET / HT\"");
}

#[test]
fn client_without_fixed_newstyle_sends_an_option() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 0);
        send_option(&mut stream, wire::OPT_LIST, &[]);
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client sent option 3 without fixed newstyle");
}

#[test]
fn unknown_options_are_refused_and_the_connection_lives_on() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        let unknown = [wire::OPT_STARTTLS, wire::OPT_PEEK_EXPORT, wire::OPT_BLOCKFERRY_PHASES];
        for option in unknown.into_iter().chain([0, 12, 0x8000_0000, u32::MAX]) {
            for data in [0, 1, OPTION_PAYLOAD_MAX, OPTION_PAYLOAD_MAX + 1, OPTION_SKIP_MAX] {
                assert_eq!(verdict(&mut stream, option, &vec![7; data]), wire::REP_ERR_UNSUP, "{option} {data}");
            }
        }
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data("sda", &[])), wire::REP_ACK);
    });
    agreed(&ended);
}

#[test]
fn client_sends_options_that_are_too_long() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &vec![0; OPTION_PAYLOAD_MAX + 1]), wire::REP_ERR_TOO_BIG);
        let long = "x".repeat(EXPORT_NAME_MAX + 1);
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data(&long, &[])), wire::REP_ERR_TOO_BIG);
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data(&long[1..], &[3])), wire::REP_ERR_UNKNOWN);
        let head = OptionHead { option: wire::OPT_GO, length: u32::MAX };
        stream.write_all(&head.encode()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client sent option 7 with 4294967295 bytes");
}

#[test]
fn client_sends_options_without_an_end() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        for _ in 0..OPTIONS_MAX {
            assert_eq!(verdict(&mut stream, 4711, &[]), wire::REP_ERR_UNSUP);
        }
    });
    assert_eq!(ended.unwrap_err().to_string(), "handshake: the client sent more than 128 options");
}

#[test]
fn client_lies_about_inner_lengths() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        let good = info_data("sda", &[3]);
        let mut bad: Vec<Vec<u8>> = (0..good.len()).map(|cut| good[..cut].to_vec()).collect();
        bad.push([&good[..], &[0]].concat());
        bad.push([&u32::MAX.to_be_bytes(), &good[4..]].concat());
        bad.push(info_data("s\0a", &[]));
        bad.push(b"\x00\x00\x00\x01\xff\x00\x00".to_vec());
        for data in bad {
            assert_eq!(verdict(&mut stream, wire::OPT_GO, &data), wire::REP_ERR_INVALID, "{data:?}");
        }
        assert_eq!(verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, b"x"), wire::REP_ERR_INVALID);
        assert_eq!(verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, b""), wire::REP_ACK);
        let good = context_data("sda", &["base:allocation", "base:"]);
        for cut in 0..good.len() {
            assert_eq!(verdict(&mut stream, wire::OPT_SET_META_CONTEXT, &good[..cut]), wire::REP_ERR_INVALID, "{cut}");
        }
        let long = "b".repeat(wire::STRING_MAX + 1);
        assert_eq!(
            verdict(&mut stream, wire::OPT_SET_META_CONTEXT, &context_data("sda", &[&long])),
            wire::REP_ERR_INVALID
        );
        let many = [&good[..7], &u32::MAX.to_be_bytes()].concat();
        assert_eq!(verdict(&mut stream, wire::OPT_SET_META_CONTEXT, &many), wire::REP_ERR_INVALID);
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data("sda", &[])), wire::REP_ACK);
    });
    assert_eq!(agreed(&ended), Agreed { structured: true, extended: false, base_allocation: false });
}

#[test]
fn contexts_are_listed_and_set() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        let set = wire::OPT_SET_META_CONTEXT;
        let list = wire::OPT_LIST_META_CONTEXT;
        let allocation = context_data("sda", &["base:allocation"]);
        assert_eq!(verdict(&mut stream, set, &allocation), wire::REP_ERR_INVALID, "before structured replies");
        assert_eq!(verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, b""), wire::REP_ACK);
        for queries in [&[][..], &["base:"], &["base:allocation"], &["x-a:b", "base:", "base:"]] {
            let listed = ask(&mut stream, list, &context_data("sda", queries));
            assert_eq!(listed.len(), 2);
            assert_eq!(listed[0], (wire::REP_META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()));
        }
        for queries in [&["base:alloc"][..], &["x-a:b"], &["base"]] {
            assert_eq!(ask(&mut stream, list, &context_data("sda", queries)).len(), 1);
        }
        assert_eq!(verdict(&mut stream, list, &context_data("x", &[])), wire::REP_ERR_UNKNOWN);
        for queries in [&[][..], &["base:"], &["qemu:dirty-bitmap:a"]] {
            assert_eq!(ask(&mut stream, set, &context_data("sda", queries)).len(), 1, "selects nothing");
        }
        let chosen = ask(&mut stream, set, &context_data("sda", &["base:allocation", "base:allocation"]));
        assert_eq!(chosen.len(), 2);
        assert_eq!(chosen[0], (wire::REP_META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()));
        assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data("sda", &[])), wire::REP_ACK);
    });
    assert_eq!(agreed(&ended), Agreed { structured: true, extended: false, base_allocation: true });
}

#[test]
fn contexts_are_forgotten() {
    let allocation = context_data("sda", &["base:allocation"]);
    let cases: [(&str, Option<Vec<u8>>, &str); 5] = [
        ("another export is opened", None, ""),
        ("an empty set", Some(context_data("sda", &[])), "sda"),
        ("a set that fails", Some(context_data("x", &[])), "sda"),
        ("a set that is malformed", Some(vec![1]), "sda"),
        ("a set that is too long", Some(vec![0; OPTION_PAYLOAD_MAX + 1]), "sda"),
    ];
    for (case, again, name) in cases {
        let allocation = allocation.clone();
        let (ended, _) = against(false, move |mut stream| {
            greet(&mut stream, 3);
            verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, b"");
            assert_eq!(ask(&mut stream, wire::OPT_SET_META_CONTEXT, &allocation).len(), 2);
            if let Some(again) = again {
                verdict(&mut stream, wire::OPT_SET_META_CONTEXT, &again);
            }
            assert_eq!(verdict(&mut stream, wire::OPT_GO, &info_data(name, &[])), wire::REP_ACK);
        });
        assert_eq!(agreed(&ended), Agreed { structured: true, extended: false, base_allocation: false }, "{case}");
    }
}

#[test]
fn structured_replies_bring_the_df_flag() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, b"");
        let go = ask(&mut stream, wire::OPT_GO, &info_data("sda", &[]));
        let flags = wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_FLUSH | wire::FLAG_SEND_DF;
        assert_eq!(go[0].1, wire::info_export(1 << 20, flags));
    });
    assert!(agreed(&ended).structured);
}

#[test]
fn the_private_option_opens_the_phase_protocol() {
    let (ended, _) = against(true, |mut stream| {
        greet(&mut stream, 3);
        assert_eq!(verdict(&mut stream, wire::OPT_BLOCKFERRY_PHASES, b"x"), wire::REP_ERR_UNSUP);
        assert_eq!(verdict(&mut stream, wire::OPT_BLOCKFERRY_PHASES, b""), wire::REP_ACK);
    });
    assert!(matches!(ended, Ok(Outcome::Phases)), "{ended:?}");
}

#[test]
fn nothing_beyond_the_handshake_is_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let option = OptionHead { option: wire::OPT_EXPORT_NAME, length: 3 }.encode();
    theirs.write_all(&[&[0, 0, 0, 3], &option[..], b"sda", b"more"].concat()).unwrap();
    let door = Door { phases: false, opened: Cell::new(0) };
    let socket = Socket::new(ours.into());
    agreed(&haggle_before(&socket, &&door, Instant::now() + Duration::from_secs(2)));
    let mut rest = [0; 8];
    assert_eq!(socket.recv(&mut rest).unwrap(), 4);
    assert_eq!(&rest[..4], b"more");
}

#[test]
fn extended_headers_come_before_structured_replies() {
    let (ended, _) = against(false, |mut stream| {
        greet(&mut stream, 3);
        assert_eq!(verdict(&mut stream, wire::OPT_EXTENDED_HEADERS, b"x"), wire::REP_ERR_INVALID);
        assert_eq!(verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, &[]), wire::REP_ACK, "either may come first");
        assert_eq!(verdict(&mut stream, wire::OPT_EXTENDED_HEADERS, &[]), wire::REP_ACK);
        assert_eq!(verdict(&mut stream, wire::OPT_STRUCTURED_REPLY, &[]), wire::REP_ERR_EXT_HEADER_REQD);
        let flags = |replies: Vec<(u32, Vec<u8>)>| u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);
        let without = flags(ask(&mut stream, wire::OPT_INFO, &info_data("sda", &[])));
        assert_eq!(without & (wire::FLAG_SEND_DF | wire::FLAG_BLOCK_STATUS_PAYLOAD), wire::FLAG_SEND_DF);
        let set = ask(&mut stream, wire::OPT_SET_META_CONTEXT, &context_data("sda", &[wire::BASE_ALLOCATION]));
        assert_eq!(set.len(), 2, "contexts need nothing else");
        let with = flags(ask(&mut stream, wire::OPT_GO, &info_data("sda", &[])));
        assert_eq!(with & wire::FLAG_BLOCK_STATUS_PAYLOAD, wire::FLAG_BLOCK_STATUS_PAYLOAD);
    });
    assert_eq!(agreed(&ended), Agreed { structured: true, extended: true, base_allocation: true });

    let (ended, opened) = against(false, |mut stream| {
        greet(&mut stream, 3);
        assert_eq!(verdict(&mut stream, wire::OPT_EXTENDED_HEADERS, &[]), wire::REP_ACK);
        send_option(&mut stream, wire::OPT_EXPORT_NAME, b"sda");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "closed");
    });
    assert!(matches!(ended, Err(HandshakeError::NotExtended)), "{ended:?}");
    assert_eq!(opened, 0);
}
