//! The bytes of netlink: pinned, and garbage. The pinned bytes are those of a little-endian machine.

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(digits: &str) -> std::vec::Vec<u8> {
    let digits: std::vec::Vec<u8> = digits.bytes().filter(|digit| !digit.is_ascii_whitespace()).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).expect("digits"), 16).expect("digits");
    digits.chunks(2).map(pair).collect()
}

fn pinned(request: &Request, golden: &str) {
    let golden: String = golden.split_whitespace().collect();
    assert_eq!(hex(request.bytes().expect("it fits")), golden);
}

#[test]
fn every_request_has_its_bytes() {
    // The head: length, type, flags (a request, to be acknowledged), sequence, port; command, version, reserved.
    pinned(&Request::family(1), "1c000000 1000 0500 01000000 00000000 03 01 0000 0800 0200 6e626400");
    let connection = Connection {
        index: 3,
        size_bytes: 0x0102_0304_0506_0800,
        block_bytes: 512,
        flags: 0x6d,
        dead_s: 604_800,
        socket: 7,
        backend: "a b",
    };
    pinned(
        &Request::connect(0x1c, 2, &connection),
        "7c000000 1c00 0500 02000000 00000000 01 01 0000
         0800 0100 03000000
         0c00 0200 0008060504030201
         0c00 0300 0002000000000000
         0c00 0400 0000000000000000
         0c00 0500 6d00000000000000
         0c00 0600 0000000000000000
         0c00 0800 803a090000000000
         1000 0780 0c00 0180 0800 0100 07000000
         0800 0a00 61206200",
    );
    pinned(
        &Request::reconnect(0x1c, 3, 3, 7, "a bc"),
        "38000000 1c00 0500 03000000 00000000 03 01 0000
         0800 0100 03000000
         1000 0780 0c00 0180 0800 0100 07000000
         0900 0a00 6120626300 000000",
    );
    pinned(&Request::disconnect(0x1c, 4, 3), "1c000000 1c00 0500 04000000 00000000 02 01 0000 0800 0100 03000000");
    pinned(&Request::status(0x1c, 5, 3), "1c000000 1c00 0500 05000000 00000000 05 01 0000 0800 0100 03000000");
}

#[test]
fn a_request_that_does_not_fit_is_not_sent() {
    let connection =
        Connection { index: 0, size_bytes: 1, block_bytes: 1, flags: 0, dead_s: 0, socket: 0, backend: "" };
    let long = "x".repeat(NETLINK_REQUEST_MAX);
    assert_eq!(Request::connect(1, 1, &Connection { backend: &long, ..connection }).bytes(), None);
    // What `attach.rs` says at most.
    let longest = "x".repeat("blockferry ".len() + 32 + 1 + 64 + 1 + 64);
    assert!(Request::connect(1, 1, &Connection { backend: &longest, ..connection }).bytes().is_some());
}

/// Answers as the kernel lays them out: content, then the acknowledgement with the request's head.
const FAMILY_ANSWER: &str = "
    2c000000 1000 0000 01000000 63000000 01 02 0000
        0800 0200 6e626400
        0600 0100 1c00 0000
        0500 0300 01 000000
    24000000 0200 0001 01000000 63000000 00000000 20000000 1000 0500 01000000 00000000";
const STATUS_ANSWER: &str = "
    2c000000 1c00 0000 05000000 63000000 05 00 0000
        1800 0900 1400 0100 0800 0100 03000000 0500 0200 01 000000
    24000000 0200 0001 05000000 63000000 00000000 1c000000 1c00 0500 05000000 00000000";
const BUSY_ANSWER: &str = "
    24000000 0200 0000 02000000 63000000 f0ffffff 7c000000 1c00 0500 02000000 00000000";

#[test]
fn answers_are_taken_apart() {
    let stream = bytes(FAMILY_ANSWER);
    let found: std::vec::Vec<_> = answers(&stream).collect();
    let [Answer::Content { sequence: 1, attributes }, Answer::Ended { sequence: 1, error: 0 }] = found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(family_in(attributes), Some(0x1c));
    assert_eq!(connected_in(attributes, 3), None);

    let stream = bytes(STATUS_ANSWER);
    let Some(Answer::Content { sequence: 5, attributes }) = answers(&stream).next() else { panic!("no content") };
    assert_eq!(connected_in(attributes, 3), Some(true));
    assert_eq!(connected_in(attributes, 4), None, "of another device");

    let stream = bytes(BUSY_ANSWER);
    assert_eq!(answers(&stream).collect::<std::vec::Vec<_>>(), [Answer::Ended { sequence: 2, error: 16 }]);
}

#[test]
fn an_answer_that_is_cut_ends_and_never_panics() {
    for whole in [FAMILY_ANSWER, STATUS_ANSWER, BUSY_ANSWER].map(bytes) {
        for end in 0..whole.len() {
            for answer in answers(&whole[..end]) {
                if let Answer::Content { attributes, .. } = answer {
                    let _ = (family_in(attributes), connected_in(attributes, 3));
                }
            }
        }
    }
    // A message that says it is shorter than its head, and an attribute that does.
    assert_eq!(answers(&[4, 0, 0, 0]).next(), None);
    assert_eq!(answers(&[0; 64]).next(), None);
    assert_eq!(family_in(&[0, 0, 1, 0, 0, 0]), None);
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics_and_always_ends(garbage: std::vec::Vec<u8>) {
        for answer in answers(&garbage) {
            if let Answer::Content { attributes, .. } = answer {
                let _ = (family_in(attributes), connected_in(attributes, 0));
            }
        }
        let _ = (family_in(&garbage), connected_in(&garbage, 0));
    }
}
