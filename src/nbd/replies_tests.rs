#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

const CONTEXT: u32 = 7;

/// What the events of a test come down to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Data(u64, Vec<u8>),
    Zero(u64, u32),
    Status(u64, u64, u64),
    /// The same for the second context.
    Second(u64, u64, u64),
    Done(u64, Result<(), u32>),
}

fn seen(event: Event<'_>) -> Seen {
    match event {
        Event::Data { offset, bytes, .. } => Seen::Data(offset, bytes.to_vec()),
        Event::Zero { offset, length, .. } => Seen::Zero(offset, length),
        Event::Status { offset, length, flags, context: 0, .. } => Seen::Status(offset, length, flags),
        Event::Status { offset, length, flags, context, .. } => {
            assert_eq!(context, 1);
            Seen::Second(offset, length, flags)
        }
        Event::Done { cookie, result } => Seen::Done(cookie, result.map_err(|error| error.errno)),
    }
}

/// A client with one request in flight: 4096 bytes at 8192, which the caller named 1.
fn asked(structured: bool, command: u16) -> (Replies, u64) {
    let style = if structured { Style::Structured } else { Style::Simple };
    let mut replies = Replies::new(style, [structured.then_some(CONTEXT), None, None, None]);
    let cookie = replies.enter(&request(command), None).unwrap().0;
    (replies, cookie)
}

fn request(command: u16) -> Request {
    Request { flags: 0, command, cookie: 1, offset: 8192, length: 4096 }
}

/// The same with extended headers, and two contexts.
fn asked_extended(command: u16) -> (Replies, u64) {
    let mut replies = Replies::new(Style::Extended, [Some(CONTEXT), Some(2), None, None]);
    let cookie = replies.enter(&request(command), None).unwrap().0;
    (replies, cookie)
}

fn extended(last: bool, kind: u16, cookie: u64, offset: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let head = wire::extended_chunk(u16::from(last), kind, cookie, offset, payload.len() as u64);
    [&head[..], &payload].concat()
}

fn status_ext(last: bool, cookie: u64, context: u32, count: u32, extents: &[(u64, u64)]) -> Vec<u8> {
    let extents: Vec<u8> = extents.iter().flat_map(|&(length, flags)| wire::extent_ext(length, flags)).collect();
    let kind = wire::REPLY_TYPE_BLOCK_STATUS_EXT;
    extended(last, kind, cookie, 8192, &[&wire::block_status_ext(context, count), &extents])
}

fn answer(replies: &mut Replies, bytes: &[u8]) -> Result<Vec<Seen>, String> {
    let mut all = Vec::new();
    let progress = replies.read(bytes, &mut |event| all.push(seen(event))).map_err(|cause| cause.to_string())?;
    assert_eq!(progress.events, all.len());
    Ok(all)
}

fn chunk(last: bool, kind: u16, cookie: u64, parts: &[&[u8]]) -> Vec<u8> {
    let payload = parts.concat();
    let head = wire::structured_chunk(u16::from(last), kind, cookie, u32::try_from(payload.len()).unwrap());
    [&head[..], &payload].concat()
}

fn data(last: bool, cookie: u64, offset: u64, length: usize) -> Vec<u8> {
    chunk(last, wire::REPLY_TYPE_OFFSET_DATA, cookie, &[&wire::offset_data(offset), &vec![5; length]])
}

fn hole(last: bool, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    chunk(last, wire::REPLY_TYPE_OFFSET_HOLE, cookie, &[&wire::offset_hole(offset, length)])
}

fn status(last: bool, cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let extents: Vec<u8> = extents.iter().flat_map(|&(length, flags)| wire::extent(length, flags)).collect();
    chunk(last, wire::REPLY_TYPE_BLOCK_STATUS, cookie, &[&wire::block_status(context), &extents])
}

fn none(cookie: u64) -> Vec<u8> {
    chunk(true, wire::REPLY_TYPE_NONE, cookie, &[])
}

/// What a client without, and one with structured replies says to `reply`, which is made from the cookie.
fn fault(structured: bool, command: u16, reply: impl Fn(u64) -> Vec<u8>) -> String {
    let (mut replies, cookie) = asked(structured, command);
    answer(&mut replies, &reply(cookie)).unwrap_err()
}

#[test]
fn simple_replies_are_understood() {
    let (mut replies, cookie) = asked(false, wire::CMD_READ);
    let bytes = [&wire::simple_reply(0, cookie)[..], &[9; 4096]].concat();
    assert_eq!(answer(&mut replies, &bytes).unwrap(), [Seen::Data(8192, vec![9; 4096]), Seen::Done(1, Ok(()))]);
    assert_eq!(replies.in_flight(), 0);

    for command in [wire::CMD_READ, wire::CMD_WRITE, wire::CMD_FLUSH] {
        let (mut replies, cookie) = asked(false, command);
        assert_eq!(answer(&mut replies, &wire::simple_reply(28, cookie)).unwrap(), [Seen::Done(1, Err(28))]);
        assert!(!replies.expects_data());
    }
}

#[test]
fn structured_reads_come_in_any_order() {
    let (mut replies, cookie) = asked(true, wire::CMD_READ);
    let bytes = [
        data(false, cookie, 11264, 1024),
        hole(false, cookie, 8192, 1024),
        data(false, cookie, 9216, 1024),
        data(true, cookie, 10240, 1024),
    ]
    .concat();
    let expected = [
        Seen::Data(11264, vec![5; 1024]),
        Seen::Zero(8192, 1024),
        Seen::Data(9216, vec![5; 1024]),
        Seen::Data(10240, vec![5; 1024]),
        Seen::Done(1, Ok(())),
    ];
    assert_eq!(answer(&mut replies, &bytes).unwrap(), expected);
}

#[test]
fn every_reply_may_come_byte_by_byte() {
    let error = chunk(false, wire::REPLY_TYPE_ERROR_OFFSET, 0, &[&wire::error_chunk(5, 3), b"bad", &[0; 8]]);
    type Make = Box<dyn Fn(u64) -> Vec<u8>>;
    let with_cookie = move |cookie: u64| {
        let mut bytes = error.clone();
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes
    };
    let cases: [(bool, u16, Make); 5] = [
        (false, wire::CMD_READ, Box::new(|c| [&wire::simple_reply(0, c)[..], &[9; 4096]].concat())),
        (true, wire::CMD_READ, Box::new(|c| [data(false, c, 8192, 96), hole(true, c, 8288, 4000)].concat())),
        (true, wire::CMD_READ, Box::new(move |c| [data(false, c, 8192, 96), with_cookie(c), none(c)].concat())),
        (true, wire::CMD_BLOCK_STATUS, Box::new(|c| status(true, c, CONTEXT, &[(512, 0), (4096, 3)]))),
        (true, wire::CMD_WRITE, Box::new(none)),
    ];
    for (structured, command, make) in cases {
        let (mut whole, cookie) = asked(structured, command);
        let expected = answer(&mut whole, &make(cookie)).unwrap();
        let (mut split, cookie) = asked(structured, command);
        let (mut buffer, mut events) = (Vec::new(), Vec::new());
        for byte in make(cookie) {
            buffer.push(byte);
            let progress = split.read(&buffer, &mut |event| events.push(seen(event))).unwrap();
            buffer.drain(..progress.consumed);
        }
        assert!(buffer.is_empty());
        // Data comes in single bytes; joined it is the same.
        let mut joined: Vec<Seen> = Vec::new();
        for event in events {
            match (joined.last_mut(), event) {
                (Some(Seen::Data(start, bytes)), Seen::Data(offset, more)) if *start + bytes.len() as u64 == offset => {
                    bytes.extend(more);
                }
                (_, event) => joined.push(event),
            }
        }
        assert_eq!(joined, expected);
    }
}

#[test]
fn server_answers_unknown_cookie() {
    let read = wire::CMD_READ;
    for structured in [false, true] {
        assert!(fault(structured, read, |c| wire::simple_reply(0, c + 1).into()).contains("unknown cookie"));
        assert!(fault(structured, read, |c| wire::simple_reply(0, c + 64).into()).contains("unknown cookie"));
    }
    assert_eq!(fault(true, read, |_| data(true, 0x2a, 0, 4)), "the server answered the unknown cookie 0x2a");
}

#[test]
fn server_answers_twice() {
    let (mut replies, cookie) = asked(false, wire::CMD_WRITE);
    let twice = [wire::simple_reply(0, cookie), wire::simple_reply(0, cookie)].concat();
    assert!(answer(&mut replies, &twice).unwrap_err().contains("unknown cookie"));

    let (mut replies, first) = asked(false, wire::CMD_WRITE);
    answer(&mut replies, &wire::simple_reply(0, first)).unwrap();
    let request = Request { flags: 0, command: wire::CMD_WRITE, cookie: 1, offset: 0, length: 1 };
    let second = replies.enter(&request, None).unwrap().0;
    assert_ne!(first, second, "the slot is the same, the cookie is not");
    assert!(answer(&mut replies, &wire::simple_reply(0, first)).is_err());
}

#[test]
fn server_does_not_cover_the_read() {
    let read = wire::CMD_READ;
    let text = fault(true, read, |c| data(true, c, 8192, 4095));
    assert_eq!(text, "the server answered a READ of 4096 bytes at 8192 with 4095 bytes");
    fault(true, read, none);
    fault(true, read, |c| hole(true, c, 8193, 4095));
    fault(true, read, |c| [data(false, c, 8192, 1000), none(c)].concat());
}

#[test]
fn server_sends_bytes_of_a_read_twice() {
    let read = wire::CMD_READ;
    for (offset, length) in [(8192, 4096), (8192, 1), (9215, 2), (9000, 10), (9215, 1)] {
        let text = fault(true, read, |c| [data(false, c, 8192, 1024), hole(true, c, offset, length)].concat());
        assert!(text.ends_with("with the same bytes twice"), "{text}");
    }
}

#[test]
fn server_sends_bytes_outside_of_the_read() {
    let read = wire::CMD_READ;
    for (offset, length) in [(8191, 1), (8191, 4096), (12288, 1), (12287, 2), (0, 4096), (u64::MAX, 1), (8192, 4097)] {
        assert!(fault(true, read, |c| hole(false, c, offset, length)).ends_with("outside of the request"));
        assert!(fault(true, read, |c| data(false, c, offset, length as usize)).ends_with("outside of the request"));
    }
    assert!(fault(true, read, |c| hole(false, c, 8192, u32::MAX)).ends_with("outside of the request"));
    assert!(fault(true, read, |c| hole(false, c, 8192, 0)).ends_with("outside of the request"), "an empty hole");
}

#[test]
fn server_scatters_a_read() {
    let scattered = |c| (0..100).flat_map(|n| data(false, c, 8192 + 2 * n, 1)).collect::<Vec<u8>>();
    assert!(fault(true, wire::CMD_READ, scattered).ends_with("in too many scattered pieces"));
}

#[test]
fn server_uses_the_wrong_kind_of_reply() {
    let (read, write, block_status) = (wire::CMD_READ, wire::CMD_WRITE, wire::CMD_BLOCK_STATUS);
    let cases: [(&str, String); 13] = [
        ("not agreed on", fault(false, read, |c| data(true, c, 8192, 4096))),
        ("a simple reply after structured ones", fault(true, read, |c| wire::simple_reply(0, c).into())),
        ("without extents", fault(true, block_status, |c| wire::simple_reply(0, c).into())),
        ("chunk of type 1", fault(true, write, |c| data(true, c, 8192, 4096))),
        ("chunk of type 2", fault(true, write, |c| hole(true, c, 8192, 4096))),
        ("chunk of type 5", fault(true, read, |c| status(true, c, CONTEXT, &[(4096, 0)]))),
        ("chunk of type 1", fault(true, block_status, |c| data(true, c, 8192, 4096))),
        ("chunk of type 4", fault(true, read, |c| chunk(true, 4, c, &[]))),
        ("chunk of type 0", fault(true, write, |c| chunk(true, 0, c, &[b"x"]))),
        ("chunk of type 0", fault(true, write, |c| chunk(false, 0, c, &[]))),
        ("hole chunk of a wrong length", fault(true, read, |c| chunk(true, 2, c, &[&[0; 13]]))),
        ("data chunk without data", fault(true, read, |c| chunk(true, 1, c, &[&[0; 8]]))),
        ("no reply but 0x48545450", fault(true, read, |_| b"HTTP/1.1".to_vec())),
    ];
    for (expected, text) in cases {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn server_sends_a_bad_block_status() {
    let command = wire::CMD_BLOCK_STATUS;
    let good = |c| status(false, c, CONTEXT, &[(4096, 0)]);
    let cases: [(&str, String); 8] = [
        ("wrong length", fault(true, command, |c| status(true, c, CONTEXT, &[]))),
        ("wrong length", fault(true, command, |c| chunk(true, 5, c, &[&[0; 13]]))),
        ("wrong length", fault(true, command, |c| wire::structured_chunk(1, 5, c, 0xffff_fffc).into())),
        ("empty extent", fault(true, command, |c| status(true, c, CONTEXT, &[(0, 0)]))),
        ("not agreed on", fault(true, command, |c| status(true, c, CONTEXT + 1, &[(4096, 0)]))),
        ("two block statuses", fault(true, command, |c| [good(c), good(c)].concat())),
        ("without the extents of each", fault(true, command, none)),
        ("not agreed on", fault(false, command, good)),
    ];
    for (expected, text) in cases {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn extents_end_with_the_request() {
    let (mut replies, cookie) = asked(true, wire::CMD_BLOCK_STATUS);
    let bytes = status(true, cookie, CONTEXT, &[(512, 0), (1 << 30, 3), (512, 0)]);
    let expected = [Seen::Status(8192, 512, 0), Seen::Status(8704, 3584, 3), Seen::Done(1, Ok(()))];
    assert_eq!(answer(&mut replies, &bytes).unwrap(), expected);

    let (mut replies, cookie) = asked(true, wire::CMD_BLOCK_STATUS);
    let short = [status(false, cookie, CONTEXT, &[(512, 1)]), none(cookie)].concat();
    assert_eq!(answer(&mut replies, &short).unwrap(), [Seen::Status(8192, 512, 1), Seen::Done(1, Ok(()))]);
}

#[test]
fn each_context_has_extents_of_its_own() {
    let contexts = [Some(CONTEXT), Some(2), None, None];
    let mut replies = Replies::new(Style::Structured, contexts);
    let cookie = replies.enter(&request(wire::CMD_BLOCK_STATUS), None).unwrap().0;
    let bytes = [status(false, cookie, 2, &[(4096, 1)]), status(true, cookie, CONTEXT, &[(512, 0), (512, 3)])].concat();
    let expected =
        [Seen::Second(8192, 4096, 1), Seen::Status(8192, 512, 0), Seen::Status(8704, 512, 3), Seen::Done(1, Ok(()))];
    assert_eq!(answer(&mut replies, &bytes).unwrap(), expected);

    for missing in [CONTEXT, 2] {
        let mut replies = Replies::new(Style::Structured, contexts);
        let cookie = replies.enter(&request(wire::CMD_BLOCK_STATUS), None).unwrap().0;
        let text = answer(&mut replies, &status(true, cookie, missing, &[(4096, 0)])).unwrap_err();
        assert!(text.ends_with("without the extents of each metadata context"), "{text}");
    }
}

#[test]
fn extended_replies_are_understood() {
    let (mut replies, cookie) = asked_extended(wire::CMD_READ);
    let bytes = [
        extended(false, wire::REPLY_TYPE_OFFSET_HOLE, cookie, 8192, &[&wire::offset_hole(8192, 4000)]),
        extended(true, wire::REPLY_TYPE_OFFSET_DATA, cookie, 8192, &[&wire::offset_data(12192), &[5; 96]]),
    ]
    .concat();
    let expected = [Seen::Zero(8192, 4000), Seen::Data(12192, vec![5; 96]), Seen::Done(1, Ok(()))];
    assert_eq!(answer(&mut replies, &bytes).unwrap(), expected);

    let (mut replies, cookie) = asked_extended(wire::CMD_WRITE);
    let done = extended(true, wire::REPLY_TYPE_NONE, cookie, 8192, &[]);
    assert_eq!(answer(&mut replies, &done).unwrap(), [Seen::Done(1, Ok(()))]);

    let (mut replies, cookie) = asked_extended(wire::CMD_BLOCK_STATUS);
    let bytes = [
        status_ext(false, cookie, CONTEXT, 2, &[(512, 0), (1 << 40, 1 << 33)]),
        status_ext(true, cookie, 2, 1, &[(512, 7)]),
    ]
    .concat();
    let expected = [
        Seen::Status(8192, 512, 0),
        Seen::Status(8704, 3584, 1 << 33),
        Seen::Second(8192, 512, 7),
        Seen::Done(1, Ok(())),
    ];
    assert_eq!(answer(&mut replies, &bytes).unwrap(), expected);
    for end in 1..bytes.len() {
        let (mut replies, _) = asked_extended(wire::CMD_BLOCK_STATUS);
        assert!(replies.read(&bytes[..end], &mut |_| {}).unwrap().consumed <= end, "{end} bytes are no error");
    }
}

#[test]
fn server_breaks_what_was_agreed_on_after_extended_headers() {
    let (read, block_status) = (wire::CMD_READ, wire::CMD_BLOCK_STATUS);
    let whole: &[&[u8]] = &[&wire::offset_data(8192), &[5; 4096]];
    let kind = wire::REPLY_TYPE_OFFSET_DATA;
    type Make<'a> = &'a dyn Fn(u64) -> Vec<u8>;
    let cases: [(&str, u16, Make<'_>); 8] = [
        ("a simple reply after extended headers", read, &|c| wire::simple_reply(0, c).into()),
        ("not agreed on", read, &|c| chunk(true, kind, c, whole)),
        ("as if it were for 0", read, &|c| extended(true, kind, c, 0, whole)),
        ("chunk of type 5", block_status, &|c| {
            extended(true, 5, c, 8192, &[&wire::block_status(CONTEXT), &wire::extent(4096, 0)])
        }),
        ("of a wrong length", block_status, &|c| status_ext(true, c, CONTEXT, 2, &[(4096, 0)])),
        ("of a wrong length", block_status, &|c| status_ext(true, c, CONTEXT, 0, &[])),
        ("an empty extent", block_status, &|c| status_ext(true, c, CONTEXT, 1, &[(0, 0)])),
        ("bytes at 8192, outside", read, &|c| {
            wire::extended_chunk(1, kind, c, 8192, (1 << 40) + 8)
                .iter()
                .copied()
                .chain(wire::offset_data(8192))
                .collect()
        }),
    ];
    for (expected, command, reply) in cases {
        let (mut replies, cookie) = asked_extended(command);
        let text = answer(&mut replies, &reply(cookie)).unwrap_err();
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let (mut replies, cookie) = asked(true, read);
    let text = answer(&mut replies, &extended(true, kind, cookie, 8192, whole)).unwrap_err();
    assert!(text.contains("not agreed on"), "{text}");
}

#[test]
fn a_request_in_parts_is_done_once_when_all_are() {
    let mut replies = Replies::new(Style::Simple, [None; CONTEXTS_MAX]);
    let (first, lead) = replies.enter(&request(wire::CMD_WRITE), None).unwrap();
    let others = [(); 2].map(|()| replies.enter(&request(wire::CMD_WRITE), Some(lead)).unwrap().0);
    let by_itself = replies.enter(&Request { cookie: 2, ..request(wire::CMD_READ) }, None).unwrap().0;
    assert_eq!(replies.in_flight(), 4);
    assert_eq!(answer(&mut replies, &wire::simple_reply(0, first)).unwrap(), []);
    assert_eq!(replies.in_flight(), 4, "the first part's place stays taken");
    assert_eq!(answer(&mut replies, &wire::simple_reply(wire::EIO, others[1])).unwrap(), []);
    assert_eq!(answer(&mut replies, &wire::simple_reply(28, by_itself)).unwrap(), [Seen::Done(2, Err(28))]);
    let (ended, twice) = (wire::simple_reply(0, others[0]), wire::simple_reply(0, first));
    assert_eq!(answer(&mut replies, &ended).unwrap(), [Seen::Done(1, Err(wire::EIO))]);
    assert_eq!(replies.in_flight(), 0);
    assert!(answer(&mut replies, &twice).unwrap_err().contains("unknown cookie"));

    let (first, lead) = replies.enter(&request(wire::CMD_WRITE), None).unwrap();
    replies.enter(&request(wire::CMD_WRITE), Some(lead)).unwrap();
    let twice = [wire::simple_reply(0, first), wire::simple_reply(0, first)].concat();
    assert!(answer(&mut replies, &twice).unwrap_err().contains("unknown cookie"), "a part is answered once");
}

#[test]
fn errors_are_values_with_the_servers_words() {
    let mut result = None;
    let (mut replies, cookie) = asked(true, wire::CMD_READ);
    let bytes = [
        data(false, cookie, 8192, 512),
        chunk(false, wire::REPLY_TYPE_ERROR_OFFSET, cookie, &[&wire::error_chunk(5, 11), b"bad\nsector!", &[0; 8]]),
        chunk(true, wire::REPLY_TYPE_ERROR, cookie, &[&wire::error_chunk(22, 0)]),
    ]
    .concat();
    let mut each = |event: Event<'_>| {
        if let Event::Done { result: done, .. } = event {
            result = Some(done);
        }
    };
    replies.read(&bytes, &mut each).unwrap();
    let error = result.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "EIO (bad?sector!)", "the first error counts");

    for kind in [wire::REPLY_TYPE_ERROR, wire::REPLY_TYPE_ERROR_OFFSET, 0x8000, 0xffff] {
        for command in [wire::CMD_READ, wire::CMD_WRITE, wire::CMD_BLOCK_STATUS] {
            let (mut replies, cookie) = asked(true, command);
            let bytes = chunk(true, kind, cookie, &[&wire::error_chunk(0, 0)]);
            assert_eq!(answer(&mut replies, &bytes).unwrap(), [Seen::Done(1, Err(wire::EINVAL))], "0 is no success");
        }
    }
    let (mut replies, cookie) = asked(true, wire::CMD_READ);
    assert_eq!(answer(&mut replies, &wire::simple_reply(5, cookie)).unwrap(), [Seen::Done(1, Err(5))]);
}

#[test]
fn server_sends_a_bad_error_chunk() {
    let error = wire::REPLY_TYPE_ERROR;
    let write = wire::CMD_WRITE;
    assert!(fault(true, write, |c| chunk(true, error, c, &[&[0; 5]])).contains("malformed error chunk"));
    assert!(fault(true, write, |c| chunk(true, error, c, &[&wire::error_chunk(5, 2), b"x"])).contains("malformed"));
    assert!(fault(true, write, |c| wire::structured_chunk(1, error, c, 5000).into()).contains("too long"));
}

#[test]
fn the_window_has_an_end() {
    let mut replies = Replies::new(Style::Simple, [None; CONTEXTS_MAX]);
    let request = Request { flags: 0, command: wire::CMD_READ, cookie: 0, offset: 0, length: 0 };
    let cookies: Vec<u64> = (0..WINDOW_MAX).map(|_| replies.enter(&request, None).unwrap().0).collect();
    assert_eq!(replies.enter(&request, None), None);
    assert_eq!((replies.in_flight(), replies.room()), (WINDOW_MAX, 0));
    for cookie in cookies {
        assert_eq!(answer(&mut replies, &wire::simple_reply(0, cookie)).unwrap(), [Seen::Done(0, Ok(()))]);
    }
    assert_eq!(replies.in_flight(), 0);
    assert!(!replies.expects_data());
}

proptest! {
    /// Pieces say the same as one flag for each byte.
    #[test]
    fn pieces_agree_with_a_plain_model(adds in prop::collection::vec((0..60_u32, 1..12_u32), 0..24)) {
        let mut pieces = Pieces::default();
        let mut model = [false; 80];
        for (start, length) in adds {
            let range = start as usize..(start + length) as usize;
            let meets = model[range.clone()].contains(&true);
            match pieces.add(start, start + length) {
                Ok(()) => {
                    prop_assert!(!meets);
                    model[range].fill(true);
                }
                Err(why) => prop_assert_eq!(meets, why == "with the same bytes twice"),
            }
            prop_assert_eq!(pieces.covered() as usize, model.iter().filter(|&&covered| covered).count());
            prop_assert!(pieces.0.windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", pieces);
        }
    }

    /// Whatever a server sends, reading it ends, and never delivers more bytes than there are.
    #[test]
    fn no_bytes_confuse_the_reader(mut bytes in prop::collection::vec(any::<u8>(), 0..400), structured: bool) {
        let (mut replies, cookie) = asked(structured, wire::CMD_READ);
        if bytes.len() > 20 {
            let (chunk, simple) = (wire::structured_chunk(0, 1, cookie, 40), wire::simple_reply(0, cookie));
            let head = if structured { &chunk[..] } else { &simple[..] };
            bytes[..head.len()].copy_from_slice(head);
        }
        let progress = replies.read(&bytes, &mut |_| {});
        prop_assert!(progress.is_err() || progress.is_ok_and(|progress| progress.consumed <= bytes.len()));
    }
}
