//! Numbers, golden bytes, hostile bytes, round trips.

use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::ownership::{Attempt, Host, Kind, Lineage, Order, Peer, Title, Word};

fn stamp() -> Stamp {
    Stamp {
        lineage: Lineage([0x11; 16]),
        word: Word([0x22; 16]),
        attempt: Attempt([0x33; 16]),
        source: Host([0xaa; 16]),
        destination: Host([0xbb; 16]),
        order: Order { term: 1, generation: 300 },
    }
}

fn many<T: Clone, const N: usize>(item: &T, count: usize) -> heapless::Vec<T, N> {
    std::iter::repeat_n(item.clone(), count).collect()
}

/// One of each, in the order of their numbers: with `count` of everything that comes in lists, and strings of `length`.
fn samples(count: usize, length: usize) -> Vec<Message> {
    let stamp = stamp();
    let disk: DiskName = cut(&"d".repeat(length));
    let cause: Cause = cut(&"c".repeat(length));
    let (instance, epoch) = (Instance([0x44; 16]), Epoch(u32::MAX));
    let offer = DiskOffer { name: disk.clone(), size_bytes: u64::MAX, data_bytes: 1 << 30, granularity_bytes: 4096 };
    let staying = StayingDisk { name: disk.clone(), why: Stays::NotChosen, size_bytes: Some(u64::MAX) };
    let region = Region { disk: disk.clone(), offset_bytes: 4096, length_bytes: u64::MAX };
    let title = Title { lineage: stamp.lineage, order: stamp.order, word: stamp.word };
    let peer = Some(Peer { host: stamp.source, address: cut(&"a".repeat(length)) });
    let record = Some(Summary { title, kind: Kind::Given, attempt: stamp.attempt, peer });
    vec![
        Message::Prepare(Prepare {
            stamp,
            challenge: Challenge([0x55; 16]),
            mode: Mode::Overwrite,
            disks: many(&offer, count.min(DISKS_MAX)),
            connections: 4,
            verify: Verify::Full,
            keep_partial: true,
            state: true,
            staying: many(&staying, count.min(DISKS_MAX)),
            heedless: false,
        }),
        Message::Prepared(Prepared {
            stamp,
            instance,
            epoch,
            token: Token::from_bytes([0x66; 16]),
            disks: many(&DiskReady { reads_as_zero: true, connections: 8, compare: false }, count.min(DISKS_MAX)),
        }),
        Message::Refused { stamp, problems: many(&Problem { disk, cause: cause.clone() }, count.min(PROBLEMS_MAX)) },
        Message::Fence { stamp, epoch },
        Message::Fenced { stamp, instance, epoch },
        Message::Seal { stamp, digests: many(&[0x77; 32], count.min(DISKS_MAX)), unread_bytes: 300 },
        Message::Sealed { stamp, fsync_us: 1500 },
        Message::Go { stamp },
        Message::Running { stamp, instance },
        Message::Abort { stamp, cause: cause.clone(), keep: true },
        Message::Unsealed { stamp },
        Message::Question { stamp },
        Message::Record { stamp, record },
        Message::Promise { stamp, promise: Promise::NotGiven },
        Message::Failed { stamp, cause: cause.clone(), region: Some(region) },
        Message::Ping { number: 7 },
        Message::Pong { number: u64::MAX },
        Message::Digest { stamp, disk: 3, offset_bytes: 1 << 20, regions: 16 },
        Message::Digests { stamp, disk: 3, offset_bytes: 1 << 20, digests: many(&[0x77; 32], count.min(DIGESTS_MAX)) },
        Message::Stream { stamp, instance, epoch, token: Token::from_bytes([0x66; 16]) },
        Message::Streaming { stamp, epoch },
        Message::State { stamp, ran: true },
        Message::StateReady { stamp },
        Message::StateQuestion { stamp },
        Message::StateIs { stamp, standing: Standing::Failed, cause: cause.clone() },
        Message::LayersQuestion { stamp, disk: 3, page: 300 },
        Message::Layers { stamp, disk: 3, page: 300, deepest: 2, top: many(&0x88, count.min(LAYERS_PAGE)), cause },
        Message::StateEnd { stamp, bytes: 1 << 40 },
    ]
}

fn a_digest(half: [u8; 16]) -> Digest {
    let mut digest = [0; 32];
    digest[..16].copy_from_slice(&half);
    digest[16..].copy_from_slice(&half);
    digest
}

fn frame(message: &Message) -> Vec<u8> {
    message.encode(&mut [0; FRAME_HEAD + FRAME_MAX]).expect("fits").to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string");
        text
    })
}

#[test]
fn message_numbers_are_pinned() {
    let names = [
        "PREPARE",
        "PREPARED",
        "REFUSED",
        "FENCE",
        "FENCED",
        "SEAL",
        "SEALED",
        "GO",
        "RUNNING",
        "ABORT",
        "UNSEALED",
        "QUESTION",
        "RECORD",
        "PROMISE",
        "FAILED",
        "PING",
        "PONG",
        "DIGEST",
        "DIGESTS",
        "STREAM",
        "STREAMING",
        "STATE",
        "STATE-READY",
        "STATE-QUESTION",
        "STATE-IS",
        "LAYERS-QUESTION",
        "LAYERS",
        "STATE-END",
    ];
    let samples = samples(1, 3);
    assert_eq!((samples.len(), names.len()), (usize::from(MESSAGES), usize::from(MESSAGES)));
    for ((message, name), number) in samples.iter().zip(names).zip(0_u8..) {
        assert_eq!((message.name(), frame(message)[FRAME_HEAD]), (name, number));
    }
}

#[test]
fn every_message_and_the_hello_have_their_golden_bytes() {
    let mut is = samples(1, 3).iter().fold(String::new(), |mut text, message| {
        writeln!(text, "{} {}", message.name(), hex(&frame(message))).expect("a string");
        text
    });
    for kind in [Kind::None, Kind::Void, Kind::Receiving, Kind::Sealed, Kind::Owner, Kind::Offered, Kind::Superseded] {
        let title = Title { lineage: stamp().lineage, order: stamp().order, word: stamp().word };
        let record = Some(Summary { title, kind, attempt: Attempt::NONE, peer: None });
        let message = Message::Record { stamp: stamp(), record };
        writeln!(is, "RECORD-{kind:?} {}", hex(&frame(&message))).expect("a string");
    }
    for promise in [Promise::Given, Promise::InProgress, Promise::Unknown] {
        let message = Message::Promise { stamp: stamp(), promise };
        writeln!(is, "PROMISE-{promise:?} {}", hex(&frame(&message))).expect("a string");
    }
    writeln!(is, "HELLO {}", hex(&hello().encode())).expect("a string");
    assert!(is == include_str!("golden.txt"), "the bytes have changed; they are now\n{is}");
}

#[test]
fn the_largest_message_of_each_kind_fits_a_frame() {
    for message in samples(usize::MAX, 256) {
        let bytes = frame(&message);
        assert_eq!(frame_length(bytes[..FRAME_HEAD].try_into().expect("4 bytes")), Ok(bytes.len() - FRAME_HEAD));
        assert_eq!(Message::decode(&bytes[FRAME_HEAD..]), Ok(message));
    }
}

#[test]
fn a_message_cut_short_or_with_more_behind_it_is_garbage() {
    for message in samples(2, 5) {
        let bytes = frame(&message);
        for end in FRAME_HEAD + 1..bytes.len() {
            assert_eq!(Message::decode(&bytes[FRAME_HEAD..end]), Err(FrameError::Garbage), "{}", message.name());
        }
        let more = [&bytes[FRAME_HEAD..], &[0]].concat();
        assert_eq!(Message::decode(&more), Err(FrameError::Garbage), "{}", message.name());
    }
}

#[test]
fn peer_sends_more_disks_than_there_can_be() {
    let message = &samples(DISKS_MAX, 1)[5];
    let mut bytes = frame(message);
    let count = FRAME_HEAD + 1 + frame(&Message::Go { stamp: stamp() })[FRAME_HEAD + 1..].len();
    assert_eq!(usize::from(bytes[count]), DISKS_MAX);
    bytes[count] += 1;
    bytes.extend([0x77; 32]);
    assert_eq!(Message::decode(&bytes[FRAME_HEAD..]), Err(FrameError::Garbage));
}

#[test]
fn peer_sends_garbage_of_every_length() {
    // A small generator with a fixed seed: what fails, fails again.
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()[3]
    };
    let mut decoded = 0;
    for length in (0..600).chain([FRAME_MAX]) {
        for number in 0..=MESSAGES {
            let mut bytes: Vec<u8> = (0..length).map(|_| random()).collect();
            if let Some(first) = bytes.first_mut() {
                *first = number;
            }
            decoded += usize::from(Message::decode(&bytes).is_ok());
        }
        let mut bytes = [0; HELLO_LENGTH];
        bytes.fill_with(&mut random);
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        let _ = Hello::parse(&bytes);
        let name: String = (0..length.min(300)).map(|_| char::from(random())).collect();
        assert_eq!(ExportName::parse(&name), None);
    }
    assert!(decoded > 0, "PING and PONG of the right length are made of anything");
}

#[test]
fn unknown_messages_and_impossible_lengths_are_told_apart() {
    assert_eq!(Message::decode(&[MESSAGES, 1, 2]), Err(FrameError::Unknown(MESSAGES)));
    assert_eq!(Message::decode(&[]), Err(FrameError::Garbage));
    assert_eq!(frame_length([0; 4]), Err(FrameError::Garbage));
    assert_eq!(frame_length([0, 0x20, 0, 0]), Ok(FRAME_MAX));
    assert_eq!(frame_length([1, 0x20, 0, 0]), Err(FrameError::TooLong));
    assert_eq!(frame_length([0xff; 4]), Err(FrameError::TooLong));
    assert_eq!(FrameError::Unknown(99).to_string(), "an unknown message, number 99");
    assert_eq!(FrameError::TooLong.to_string(), "a frame longer than 8192 bytes");
    assert_eq!(FrameError::Garbage.to_string(), "a malformed message");
}

#[test]
fn strings_are_cut_between_characters() {
    assert_eq!(cut::<4>("abcdef").as_str(), "abcd");
    assert_eq!(cut::<4>("abcé").as_str(), "abc");
    assert_eq!(cut::<5>("abcé").as_str(), "abcé");
    assert_eq!(cut::<1>("é").as_str(), "");
}

// ---- the hello ---------------------------------------------------------------------------------------------------

fn hello() -> Hello {
    Hello {
        versions: (1, 3),
        role: Role::Source,
        capabilities: Capabilities::NBD,
        guest: cut("g1"),
        title: Some(Title { lineage: stamp().lineage, order: stamp().order, word: stamp().word }),
        boot: BootId([0x88; 16]),
        instance: Instance([0x44; 16]),
        challenge: Challenge([0x55; 16]),
        host: Host([0xaa; 16]),
        address: cut("tcp://[::1]:49152"),
    }
}

#[test]
fn hello_without_a_record_says_no_lineage() {
    let hello = Hello { title: None, address: cut(""), role: Role::Other(200), ..hello() };
    assert_eq!(Hello::parse(&hello.encode()), Ok(hello));
}

#[test]
fn hello_ignores_reserved_bytes_and_keeps_unknown_capabilities() {
    let mut bytes = hello().encode();
    bytes[15] = 9;
    bytes[124..128].fill(9);
    bytes[328..].fill(9);
    assert_eq!(Hello::parse(&bytes), Ok(hello()));
    bytes[23] = 0x80;
    let parsed = Hello::parse(&bytes).expect("valid");
    assert!(parsed.capabilities.has(Capabilities::NBD) && !parsed.capabilities.has(Capabilities::STREAM));
    assert_eq!(parsed.capabilities.common(Capabilities::NBD.with(Capabilities::STREAM)), Capabilities::NBD);
}

#[test]
fn malformed_hellos_are_refused_with_their_reason() {
    let with = |at: usize, byte: u8| {
        let mut bytes = hello().encode();
        bytes[at] = byte;
        Hello::parse(&bytes)
    };
    // Nobody may make a host run a command.
    let command = Hello::parse(&Hello { address: cut("exec:rm -rf /"), ..hello() }.encode());
    let cases = [
        (with(0, b'N'), HelloError::Magic, "the peer is not blockferry"),
        (with(8, 4), HelloError::Versions, "the peer's versions are not a range"),
        (with(13, 65), HelloError::Guest, "the peer's guest name is malformed"),
        (with(13, 0), HelloError::Guest, "the peer's guest name is malformed"),
        (with(24, 0xff), HelloError::Guest, "the peer's guest name is malformed"),
        (with(24, 0x1b), HelloError::Guest, "the peer's guest name is malformed"),
        (with(14, 129), HelloError::Address, "the peer's address is malformed"),
        (with(200, 0xff), HelloError::Address, "the peer's address is malformed"),
        (command, HelloError::Address, "the peer's address is malformed"),
    ];
    for (is, error, line) in cases {
        assert_eq!(is, Err(error));
        assert_eq!(error.to_string(), line);
    }
}

#[test]
fn the_newest_common_version_wins() {
    assert_eq!(choose_version((1, 3), (2, 5)), Some(3));
    assert_eq!(choose_version((2, 5), (1, 3)), Some(3));
    assert_eq!(choose_version((1, 1), (1, 1)), Some(1));
    assert_eq!(choose_version((1, 2), (3, 4)), None);
    assert_eq!(choose_version((3, 4), (1, 2)), None);
}

// ---- export names ------------------------------------------------------------------------------------------------

#[test]
fn export_names_carry_attempt_instance_epoch_and_token() {
    let (attempt, instance, epoch) = (Attempt([0x33; 16]), Instance([0x44; 16]), Epoch(0x1f));
    let token = Token::from_bytes([0x66; 16]);
    let name = export_name(attempt, instance, epoch, token, "vd/a");
    let digits = |pair: &str| pair.repeat(16);
    assert_eq!(name, format!("{}/{}/0000001f/{}/vd/a", digits("33"), digits("44"), digits("66")).as_str());
    assert_eq!(ExportName::parse(&name), Some(ExportName { attempt, instance, epoch, token, disk: "vd/a" }));
    assert_eq!(export_name(attempt, instance, epoch, token, &"x".repeat(200)).len(), MIGRATION_EXPORT_NAME_MAX);
    assert_eq!(format!("{token:?}"), "Token(..)", "a secret is not logged");
    assert!(token.matches(&token) && !token.matches(&Token::from_bytes([0x67; 16])));
}

#[test]
fn export_names_that_were_not_written_here_are_refused() {
    let good =
        export_name(Attempt([0x3a; 16]), Instance([0x4a; 16]), Epoch(0x1f), Token::from_bytes([0x6a; 16]), "vda");
    for end in 0..good.len() - 2 {
        assert_eq!(ExportName::parse(&good[..end]), None);
    }
    assert_eq!(ExportName::parse(&good.to_uppercase()), None);
    assert_eq!(ExportName::parse(&good.replace("/0000001f/", "/+000001f/")), None);
    assert_eq!(ExportName::parse(&good.replace('/', "-")), None);
    assert_eq!(ExportName::parse(&format!("{good}{}", "x".repeat(DISK_NAME_MAX))), None);
    assert_eq!(ExportName::parse("vda"), None);
    assert_eq!(ExportName::parse(&"é".repeat(100)), None);
}

// ---- round trips -------------------------------------------------------------------------------------------------

prop_compose! {
    fn any_stamp()(
        ids in any::<[[u8; 16]; 5]>(), term in any::<u32>(), generation in any::<u64>()
    ) -> Stamp {
        let [lineage, word, attempt, source, destination] = ids;
        Stamp {
            lineage: Lineage(lineage), word: Word(word), attempt: Attempt(attempt), source: Host(source),
            destination: Host(destination), order: Order { term, generation },
        }
    }
}

prop_compose! {
    fn any_offer()(name in ".{0,16}", sizes in any::<[u64; 3]>()) -> DiskOffer {
        DiskOffer { name: cut(&name), size_bytes: sizes[0], data_bytes: sizes[1], granularity_bytes: sizes[2] }
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        stamp in any_stamp(),
        offers in prop::collection::vec(any_offer(), 0..DISKS_MAX),
        challenge: [u8; 16],
        connections: u8,
        cause in ".{0,300}",
        numbers: [u64; 2],
        ready in prop::collection::vec(any::<(bool, u8)>(), 0..DISKS_MAX),
    ) {
        let disk: DiskName = cut(&cause);
        let cause: Cause = cut(&cause);
        let region = Region { disk: disk.clone(), offset_bytes: numbers[0], length_bytes: numbers[1] };
        let ready = ready.into_iter().map(|(reads_as_zero, connections)| DiskReady {
            reads_as_zero,
            connections,
            compare: !reads_as_zero,
        });
        let messages = [
            Message::Prepare(Prepare {
                stamp,
                challenge: Challenge(challenge),
                mode: Mode::Incremental,
                disks: offers.into_iter().collect(),
                connections,
                verify: Verify::Written,
                keep_partial: numbers[0] % 2 == 1,
                state: numbers[0] % 3 == 1,
                staying: heapless::Vec::new(),
                heedless: numbers[0] % 3 == 1,
            }),
            Message::Prepared(Prepared {
                stamp,
                instance: Instance(challenge),
                epoch: Epoch(stamp.order.term),
                token: Token::from_bytes(challenge),
                disks: ready.collect(),
            }),
            Message::Refused { stamp, problems: many(&Problem { disk, cause: cause.clone() }, PROBLEMS_MAX) },
            Message::Failed { stamp, cause, region: Some(region) },
            Message::Sealed { stamp, fsync_us: numbers[0] },
            Message::Digest { stamp, disk: connections, offset_bytes: numbers[0], regions: connections },
            Message::Digests { stamp, disk: 0, offset_bytes: numbers[1], digests: many(&a_digest(challenge), 7) },
        ];
        for message in messages {
            prop_assert_eq!(Message::decode(&frame(&message)[FRAME_HEAD..]), Ok(message));
        }
    }

    #[test]
    fn hellos_survive_the_wire(
        stamp in any_stamp(), guest in "[^\\p{Cc}]{1,20}", form in "(|tcp://|unix:///)", rest in "[^\\p{Cc}]{0,40}",
        role: u8, capabilities: u64, versions: (u16, u16), ids: [[u8; 16]; 4],
    ) {
        let role = match role { 1 => Role::Source, 2 => Role::Destination, 3 => Role::Asker, n => Role::Other(n) };
        let title = Title { lineage: stamp.lineage, order: stamp.order, word: stamp.word };
        let hello = Hello {
            versions: (versions.0.min(versions.1), versions.0.max(versions.1)),
            role,
            capabilities: Capabilities(capabilities),
            guest: cut(&guest),
            title: (stamp.lineage != Lineage::NONE).then_some(title),
            boot: BootId(ids[0]),
            instance: Instance(ids[1]),
            challenge: Challenge(ids[2]),
            host: Host(ids[3]),
            address: cut(&if form.is_empty() { form } else { form + &rest }),
        };
        prop_assert_eq!(Hello::parse(&hello.encode()), Ok(hello));
    }
}
