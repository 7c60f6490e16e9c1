#![allow(clippy::unwrap_used)]

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

/// An option, its data, and the replies to it with theirs.
type Answer = (u32, Vec<u8>, Vec<(u32, Vec<u8>)>);

/// A server's end that expects options and answers each with replies; it ends with the client's goodbye.
fn asked<T>(script: Vec<Answer>, questions: impl FnOnce(&mut Questions<'_>) -> T) -> T {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        theirs.write_all(&wire::greeting(3)).unwrap();
        theirs.read_exact(&mut [0; 4]).unwrap();
        let structured = (wire::OPT_STRUCTURED_REPLY, Vec::new(), vec![(wire::REP_ACK, Vec::new())]);
        let goodbye = (wire::OPT_ABORT, Vec::new(), Vec::new());
        for (option, data, replies) in [vec![structured], script, vec![goodbye]].concat() {
            let mut head = [0; wire::OPTION_LENGTH];
            theirs.read_exact(&mut head).unwrap();
            let head = wire::OptionHead::parse(&head).unwrap();
            let mut got = vec![0; head.length as usize];
            theirs.read_exact(&mut got).unwrap();
            assert_eq!((head.option, got), (option, data));
            for (reply, data) in replies {
                let head = wire::OptionReply { option, reply, length: u32::try_from(data.len()).unwrap() };
                theirs.write_all(&[&head.encode()[..], &data].concat()).unwrap();
            }
        }
    });
    let socket = Socket::new(ours.into());
    let mut open = Questions::begin(&socket).unwrap();
    let told = questions(&mut open);
    drop(open);
    socket.shutdown();
    peer.join().unwrap();
    told
}

#[test]
fn a_server_is_asked_for_everything() {
    let server = |name: &str, text: &str| {
        let length = u32::try_from(name.len()).unwrap().to_be_bytes();
        (wire::REP_SERVER, [&length[..], name.as_bytes(), text.as_bytes()].concat())
    };
    let ack = (wire::REP_ACK, Vec::new());
    let info = |bytes: &[u8]| (wire::REP_INFO, bytes.to_vec());
    let script = vec![
        (wire::OPT_LIST, Vec::new(), vec![server("a", "first"), server("", ""), ack.clone()]),
        (
            wire::OPT_INFO,
            b"\0\0\0\x01a\0\x03\0\x01\0\x02\0\x03".to_vec(),
            vec![
                info(&wire::info_export(4096, 1)),
                info(b"\0\x01A"),
                info(b"\0\x02first"),
                info(&wire::info_block_size(1, 4096, 1 << 20)),
                ack.clone(),
            ],
        ),
        (
            wire::OPT_LIST_META_CONTEXT,
            b"\0\0\0\x01a\0\0\0\0".to_vec(),
            vec![(wire::REP_META_CONTEXT, b"\0\0\0\0x:y".to_vec()), ack],
        ),
        (
            wire::OPT_INFO,
            b"\0\0\0\x01b\0\x03\0\x01\0\x02\0\x03".to_vec(),
            vec![(wire::REP_ERR_UNKNOWN, b"no".to_vec())],
        ),
        (wire::OPT_LIST, Vec::new(), vec![(wire::REP_ERR_POLICY, Vec::new())]),
    ];
    asked(script, |questions| {
        let mut names = Vec::new();
        assert!(questions.exports(&mut |name, text| names.push(format!("{name}={text}"))).unwrap());
        assert_eq!(names, ["a=first", "="]);
        let told = questions.describe("a").unwrap().unwrap();
        assert_eq!((told.info.size, told.info.maximum_payload), (4096, 1 << 20));
        assert_eq!((told.name.as_deref(), told.text.as_deref()), (Some("A"), Some("first")));
        let mut contexts = Vec::new();
        assert!(questions.contexts("a", &[], &mut |name| contexts.push(name.to_owned())).unwrap());
        assert_eq!(contexts, ["x:y"]);
        let refused = questions.describe("b").unwrap_err();
        assert_eq!(refused.to_string(), "describing the export: the server refused: ERR_UNKNOWN (no)");
        assert!(!questions.exports(&mut |_, _| {}).unwrap(), "a server may keep its list to itself");
        assert!(matches!(questions.describe("a\0"), Err(ConnectError::Name)));
    });
}

#[test]
fn server_keeps_one_export_for_those_with_tls_and_tells_about_another() {
    let question = b"\0\0\0\x01a\0\x03\0\x01\0\x02\0\x03".to_vec();
    let script = vec![
        (wire::OPT_INFO, question.clone(), vec![(wire::REP_ERR_TLS_REQD, Vec::new())]),
        (wire::OPT_INFO, question.clone(), vec![(wire::REP_ERR_SHUTDOWN, Vec::new())]),
        (
            wire::OPT_LIST_META_CONTEXT,
            b"\0\0\0\x01a\0\0\0\0".to_vec(),
            vec![(wire::REP_META_CONTEXT, b"\0\0\0\0x:y".to_vec()), (wire::REP_ERR_TLS_REQD, Vec::new())],
        ),
        (
            wire::OPT_INFO,
            question,
            vec![(wire::REP_INFO, wire::info_export(4096, 1).to_vec()), (wire::REP_ACK, Vec::new())],
        ),
    ];
    // And one goodbye, at the end.
    asked(script, |questions| {
        assert!(matches!(questions.describe("a"), Err(ConnectError::TlsRequired)));
        assert!(matches!(questions.describe("a"), Err(ConnectError::Refused { .. })));
        assert!(!questions.contexts("a", &[], &mut |_| {}).unwrap(), "what it has told does not count");
        assert_eq!(questions.describe("a").unwrap().unwrap().info.size, 4096);
    });
}

#[test]
fn server_without_fixed_newstyle_is_asked_nothing() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&wire::greeting(2)).unwrap();
    let socket = Socket::new(ours.into());
    let mut open = Questions::begin(&socket).unwrap();
    assert!(!open.has_structured_replies());
    assert!(!open.exports(&mut |_, _| panic!("none is known")).unwrap());
    assert_eq!(open.describe("a").unwrap(), None);
    assert!(!open.contexts("a", &[], &mut |_| panic!("none is known")).unwrap());
    drop(open);
    socket.shutdown();
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"", "not even a goodbye, which it would not know");
}

#[test]
fn server_sends_a_list_that_is_none() {
    for (reply, data, text) in [
        (wire::REP_SERVER, &b"\0\0\0\x09a"[..], "an unexpected reply"),
        (wire::REP_SERVER, b"\0\0\0\x01\xff", "a name or text that is no string"),
        (wire::REP_INFO, b"", "an unexpected reply"),
    ] {
        let error = asked(vec![(wire::OPT_LIST, Vec::new(), vec![(reply, data.to_vec())])], |questions| {
            questions.exports(&mut |_, _| {}).unwrap_err().to_string()
        });
        assert_eq!(error, format!("listing the exports: the server broke the protocol: {text}"));
    }
}
