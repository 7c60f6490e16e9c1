//! The bytes of the control door: pinned, bounded, and garbage.

use std::collections::BTreeSet;

use serde::Serialize;

use super::frame::{self, Assembler, FrameError, Message};
use super::wire::*;
use crate::domain::Stays;
use crate::limits::{CONTROL_FRAME_MAX, DISKS_MAX, NEXT_STEPS_MAX};

fn bytes<T: Serialize>(message: &T) -> Vec<u8> {
    let mut out = [0; CONTROL_FRAME_MAX];
    let length = postcard::to_slice(message, &mut out).expect("fits").len();
    out[..length].to_vec()
}

pub(super) fn framed<T: Message>(message: &T) -> Vec<u8> {
    let mut out = [0; CONTROL_FRAME_MAX];
    let length = frame::encode(message, &mut out).expect("fits");
    out[..length].to_vec()
}

/// What is pinned: names, the bytes of messages, whole frames. One file for this test and for programs in other
/// languages.
const GOLDEN: &str = include_str!("../../tests/it/golden/control.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The beginning of a request's golden line.
fn ask(name: &str, request: &Request) -> String {
    format!("request {name} {} ", both(request))
}

/// The beginning of a reply's.
fn answer(name: &str, reply: &Reply) -> String {
    format!("reply {name} {} ", both(reply))
}

/// The bytes of a message and its frame; both are read back here too.
fn both<T: Message + PartialEq + std::fmt::Debug>(message: &T) -> String {
    let (plain, frame) = (bytes(message), framed(message));
    assert_eq!(postcard::from_bytes::<T>(&plain).as_ref(), Ok(message));
    assert_eq!(frame::decode::<T>(&frame[..frame.len() - 1]).as_ref(), Ok(message));
    format!("{} {}", hex(&plain), hex(&frame))
}

fn a_migrate_request() -> MigrateRequest {
    MigrateRequest {
        destination: text("tcp://b:1"),
        overwrite: true,
        disks: [text("vda")].into_iter().collect(),
        bandwidth_bytes: 300,
        downtime_limit_ms: 2,
        hold: false,
        connections: 4,
        detach: true,
        insecure_plaintext: true,
        incremental: true,
        keep_partial: true,
        verify: Verify::Full,
        transport: Transport::Stream,
        heedless: true,
        synchronous: Synchronous::Never,
        same_base: true,
    }
}

fn a_progress() -> Progress {
    Progress {
        attempt: 5,
        phase: Phase::Passes,
        elapsed_ms: 6,
        convergence: Convergence::GuestIsFaster { dirty_rate_bytes: 9, rate_bytes: 8 },
        predicted_final_ms: Some(7),
        downtime_limit_ms: 10,
        bandwidth_bytes: 11,
        held: true,
        disks: [DiskProgress {
            name: text("a"),
            size_bytes: 1,
            left_bytes: 2,
            sent_bytes: 3,
            zero_bytes: 4,
            rate_bytes: 5,
            dirty_rate_bytes: 6,
            passes: 7,
            estimate_s: Some(8),
            resent_bytes: 9,
            equal_bytes: 10,
            verified_bytes: 11,
            unverified_bytes: 12,
            base_bytes: 18,
        }]
        .into_iter()
        .collect(),
        lost_ms: Some(13),
        lost_cause: text("c"),
        transport: Transport::Stream,
        transport_cause: text("n"),
        state_bytes: 14,
        synchronous: Some(Since { dirty_rate_bytes: 15, rate_bytes: 16 }),
        base_cause: text("b"),
    }
}

fn a_done() -> Done {
    Done {
        attempt: 1,
        exit: 3,
        message: text("x"),
        owner: Owner::Destination,
        destination: text("d"),
        sent_bytes: 4,
        zero_bytes: 5,
        passes: 6,
        total_ms: 7,
        switchover_us: Some(8),
        resent_bytes: 9,
        equal_bytes: 10,
        receipt: Some(Receipt {
            verify: Verify::Written,
            verified_bytes: 11,
            root: [12; 32],
            term: 13,
            generation: 14,
            unread_bytes: 17,
        }),
        state_bytes: Some(15),
        pause_us: Some(16),
        base_bytes: 18,
    }
}

fn a_status() -> Status {
    Status {
        guest: text("g"),
        state: State::Owner,
        term: 1,
        generation: 2,
        lineage: 3,
        peer: text("p"),
        migration: Migration::Running,
        hint: text("h"),
        disks: [DiskStatus {
            name: text("a"),
            size_bytes: 512,
            stays: Some(Stays::External),
            gate: Some(Gate::Serving),
        }]
        .into_iter()
        .collect(),
        attached: [AttachedStatus { disk: text("a"), device: text("/dev/nbd0") }].into_iter().collect(),
        receipt: Some(a_receipt()),
    }
}

fn a_receipt() -> Kept {
    let receipt = Receipt {
        verify: Verify::Full,
        verified_bytes: 21,
        root: [22; 32],
        term: 23,
        generation: 24,
        unread_bytes: 28,
    };
    Kept { receipt, attempt: 25, lineage: 26, gave: true, peer: text("q"), sent_bytes: Some(27), equal_bytes: None }
}

fn an_ownership() -> Ownership {
    Ownership {
        guest: text("g"),
        state: State::Given,
        owner: Owner::Elsewhere,
        term: 1,
        generation: 2,
        host: 4,
        address: text("a"),
        text: text("t"),
        next: text("n"),
        record: text("r"),
        rejected: true,
        receipt: None,
    }
}

fn a_recovered() -> Recovered {
    Recovered {
        ownership: an_ownership(),
        asked: text("p"),
        heard: text("h"),
        done: text("d"),
        may_lose: text("l"),
        never_take: text("v"),
        next: [text("s")].into_iter().collect(),
    }
}

/// The beginnings of the golden lines of every message.
fn messages() -> Vec<String> {
    let set = |bandwidth_bytes, downtime_limit_ms| Request::Set(SetRequest { bandwidth_bytes, downtime_limit_ms });
    let refusal = Refusal { exit: 1, operation: text("claim"), object: text("g1"), cause: text("there is a record") };
    let attach = |wait_s| Request::Attach(AttachRequest { disk: text("a"), device: text("/dev/nbd0"), wait_s });
    vec![
        ask("hello", &Request::Hello { version: VERSION, session: 0x1234_5678 }),
        ask("status", &Request::Status),
        ask("claim", &Request::Claim { discard_record: false }),
        ask("claim-discard", &Request::Claim { discard_record: true }),
        ask("migrate", &Request::Migrate(a_migrate_request())),
        ask("switch", &Request::Switch),
        ask("cancel", &Request::Cancel { cause: text("no") }),
        ask("set", &set(Some(100 << 20), Some(300))),
        ask("set-no-limit", &set(Some(0), None)),
        ask("follow", &Request::Follow),
        ask("who-owns", &Request::WhoOwns),
        ask("recover", &Request::Recover(Word::ForgetPeer)),
        ask("attach", &attach(Some(300))),
        ask("attach-patiently", &attach(None)),
        ask("detach", &Request::Detach { device: text("/dev/nbd0") }),
        ask("accept", &Request::Accept),
        answer("hello", &Reply::Hello { version: VERSION, guest: text("g1"), session: 0x1234_5678 }),
        answer("ok", &Reply::Ok),
        answer("refused", &Reply::Refused(refusal)),
        answer("status", &Reply::Status(a_status())),
        answer("progress", &Reply::Progress(a_progress())),
        answer("progress-first", &Reply::Progress(Progress { attempt: 5, ..Progress::default() })),
        answer("done", &Reply::Done(a_done())),
        answer(
            "done-aborted",
            &Reply::Done(Done { owner: Owner::Here, switchover_us: None, receipt: None, ..a_done() }),
        ),
        answer("ownership", &Reply::Ownership(an_ownership())),
        answer("recovered", &Reply::Recovered(a_recovered())),
    ]
}

/// The beginnings of the golden lines of every value that is a number on the wire.
fn values() -> Vec<String> {
    fn lines<T: Serialize>(kind: &str, all: &[T], word: impl Fn(&T) -> String) -> Vec<String> {
        let line = |value| format!("{kind} {} {} - ", word(value).replace(' ', "-"), hex(&bytes(value)));
        all.iter().map(line).collect()
    }
    use {Convergence as C, Gate as G, Migration as M, Owner as O, Phase as P, State as S};
    let states = [S::Incoming, S::Receiving, S::Sealed, S::Owner, S::Offered, S::Given, S::Superseded, S::Unknown];
    let gates = [G::Incoming, G::Receiving, G::Sealed, G::Serving, G::Quiesced, G::Fenced, G::Closed];
    let phases = [P::Prepare, P::Bulk, P::Passes, P::State, P::Final, P::Seal, P::Give, P::Abort];
    let faster = C::GuestIsFaster { dirty_rate_bytes: 9, rate_bytes: 8 };
    let stays = [Stays::Shared, Stays::ReadOnly, Stays::External, Stays::Empty, Stays::NotChosen];
    let words = [Word::Ask, Word::TakeOwnership, Word::ForgetPeer, Word::Forget];
    [
        lines("state", &states, |v| v.word().to_owned()),
        lines("gate", &gates, |v| v.word().to_owned()),
        lines("stays", &stays, ToString::to_string),
        lines("migration", &[M::None, M::Running, M::Ended], |v| v.word().to_owned()),
        lines("phase", &phases, |v| v.word().to_owned()),
        lines("convergence", &[C::Copying, C::Converged, C::TooLong, faster], |v| {
            format!("{v:?}").split(' ').take(1).collect()
        }),
        lines("owner", &[O::Here, O::Destination, O::Unknown, O::Elsewhere], |v| v.word().to_owned()),
        lines("word", &words, |v| format!("{v:?}")),
        lines("synchronous", &[Synchronous::Auto, Synchronous::Always, Synchronous::Never], |v| v.word().to_owned()),
        lines("verify", &[Verify::None, Verify::Written, Verify::Full], |v| v.word().to_owned()),
        lines("transport", &[Transport::Auto, Transport::Nbd, Transport::Stream], |v| v.word().to_owned()),
    ]
    .concat()
}

#[test]
fn every_message_and_every_number_is_pinned() {
    let expected = [messages(), values()].concat();
    let golden: Vec<&str> = GOLDEN.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let same = golden.len() == expected.len()
        && golden.iter().zip(&expected).all(|(line, begin)| line.strip_prefix(begin).is_some_and(|m| !m.is_empty()));
    assert!(same, "each line of tests/it/golden/control.txt begins so, and goes on with its meaning:\n{expected:#?}");
}

#[test]
fn no_message_is_missing() {
    for (kind, count) in [("request ", 13), ("reply ", 8)] {
        let of_kind = messages().into_iter().filter(|line| line.starts_with(kind));
        let numbers: BTreeSet<String> =
            of_kind.map(|line| line.split(' ').nth(2).expect("bytes")[..2].into()).collect();
        assert_eq!(numbers, (0..count).map(|number| format!("{number:02x}")).collect(), "{kind}");
        // Zeroes are right for any fields.
        let next = [&[count][..], &[0; 64]].concat();
        assert!(postcard::from_bytes::<Request>(&next).is_err() || kind != "request ", "{kind}{count}");
        assert!(postcard::from_bytes::<Reply>(&next).is_err() || kind != "reply ", "{kind}{count}");
    }
}

#[test]
fn a_frame_is_message_checksum_cobs_and_a_zero() {
    // 01 (Status) and its CRC-32C, 0xa016d052 little-endian; no zero inside, so COBS adds one byte in front.
    assert_eq!(framed(&Request::Status), [6, 0x01, 0x52, 0xd0, 0x16, 0xa0, 0]);
    // A reply with the same bytes (Ok) has all bits of it inverted.
    assert_eq!(framed(&Reply::Ok), [6, 0x01, 0xad, 0x2f, 0xe9, 0x5f, 0]);
    assert_eq!(frame::decode(&framed(&Request::Status)[..6]), Ok(Request::Status));
}

#[test]
fn the_largest_messages_fit_a_frame() {
    fn full<const N: usize>() -> heapless::String<N> {
        text(&"x".repeat(N))
    }
    let migrate = MigrateRequest {
        destination: full(),
        disks: (0..DISKS_MAX).map(|_| full()).collect(),
        bandwidth_bytes: u64::MAX,
        downtime_limit_ms: u32::MAX,
        connections: u8::MAX,
        ..a_migrate_request()
    };
    let most = u64::MAX;
    let disk = DiskProgress {
        name: full(),
        size_bytes: most,
        left_bytes: most,
        sent_bytes: most,
        zero_bytes: most,
        rate_bytes: most,
        dirty_rate_bytes: most,
        passes: u32::MAX,
        estimate_s: Some(u32::MAX),
        resent_bytes: most,
        equal_bytes: most,
        verified_bytes: most,
        unverified_bytes: most,
        base_bytes: most,
    };
    let progress = Progress {
        attempt: u128::MAX,
        elapsed_ms: most,
        convergence: Convergence::GuestIsFaster { dirty_rate_bytes: most, rate_bytes: most },
        predicted_final_ms: Some(u32::MAX),
        downtime_limit_ms: u32::MAX,
        bandwidth_bytes: most,
        disks: (0..DISKS_MAX).map(|_| disk.clone()).collect(),
        lost_cause: full(),
        transport_cause: full(),
        base_cause: full(),
        ..a_progress()
    };
    let disk = DiskStatus { name: full(), size_bytes: most, stays: Some(Stays::Shared), gate: Some(Gate::Fenced) };
    let whole = Receipt { verified_bytes: most, root: [0xff; 32], term: most, generation: most, ..a_receipt().receipt };
    let kept = Kept {
        receipt: whole,
        attempt: u128::MAX,
        lineage: u128::MAX,
        gave: true,
        peer: full(),
        sent_bytes: Some(most),
        equal_bytes: Some(most),
    };
    let status = Status {
        guest: full(),
        term: most,
        generation: most,
        lineage: u128::MAX,
        peer: full(),
        hint: full(),
        disks: (0..DISKS_MAX).map(|_| disk.clone()).collect(),
        attached: (0..DISKS_MAX).map(|_| AttachedStatus { disk: full(), device: full() }).collect(),
        receipt: Some(kept.clone()),
        ..a_status()
    };
    let ownership = Ownership {
        guest: full(),
        term: most,
        generation: most,
        host: u128::MAX,
        address: full(),
        text: full(),
        next: full(),
        record: full(),
        receipt: Some(kept),
        ..an_ownership()
    };
    let recovered = Recovered {
        ownership,
        asked: full(),
        heard: full(),
        done: full(),
        may_lose: full(),
        never_take: full(),
        next: (0..NEXT_STEPS_MAX).map(|_| full()).collect(),
    };
    let whole = framed(&Request::Migrate(migrate.clone()));
    assert_eq!(frame::decode(&whole[..whole.len() - 1]), Ok(Request::Migrate(migrate)));
    let hello = Reply::Hello { version: u16::MAX, guest: full(), session: u32::MAX };
    for reply in [hello, Reply::Progress(progress), Reply::Status(status), Reply::Recovered(recovered)] {
        let whole = framed(&reply);
        assert_eq!(frame::decode(&whole[..whole.len() - 1]), Ok(reply));
    }
}

/// The frame, without its delimiter, of a request's bytes.
pub(super) fn frame(plain: &[u8]) -> Vec<u8> {
    let whole = [plain, &crc32c::crc32c(plain).to_le_bytes()].concat();
    let mut out = [0; 64];
    let length = cobs::encode(&whole, &mut out);
    out[..length].to_vec()
}

#[test]
fn what_goes_one_way_means_nothing_the_other_way() {
    // Without the inverted checksum this refusal would come back from a line that echoes as `claim --discard-record`.
    let refusal = Refusal { exit: 1, operation: text("switch"), object: text("g1"), cause: text("no") };
    let echo = framed(&Reply::Refused(refusal));
    assert_eq!(postcard::from_bytes(&[2, 1, 6, b's']), Ok(Request::Claim { discard_record: true }));
    assert_eq!(frame::decode::<Request>(&echo[..echo.len() - 1]), Err(FrameError::Garbage));
    let echo = framed(&Request::Status);
    assert_eq!(frame::decode::<Reply>(&echo[..echo.len() - 1]), Err(FrameError::Garbage));
}

#[test]
fn a_newer_peers_appended_field_is_ignored_and_its_new_message_is_unknown() {
    assert_eq!(frame::decode(&frame(&[2, 1, 77, 78])), Ok(Request::Claim { discard_record: true }));
    assert_eq!(frame::decode::<Request>(&frame(&[13])), Err(FrameError::Unknown));
    assert_eq!(frame::decode::<Request>(&frame(&[])), Err(FrameError::Unknown));
}

#[test]
fn a_changed_frame_is_garbage() {
    let whole = framed(&Request::Migrate(a_migrate_request()));
    for at in 0..whole.len() - 1 {
        for bit in 0..8 {
            let mut changed = whole[..whole.len() - 1].to_vec();
            changed[at] ^= 1 << bit;
            assert!(frame::decode::<Request>(&changed).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn frames_are_found_however_the_bytes_arrive() {
    let stream = [framed(&Request::Status), vec![0, 0], framed(&Request::Switch), framed(&Request::Follow)].concat();
    for step in 1..=stream.len() {
        let mut inbox = Assembler::default();
        let mut found = Vec::new();
        for part in stream.chunks(step) {
            inbox.space()[..part.len()].copy_from_slice(part);
            inbox.received(part.len());
            while let Some(request) = inbox.take::<Request>().expect("no garbage") {
                found.push(request);
            }
        }
        assert_eq!(found, [Request::Status, Request::Switch, Request::Follow]);
        assert!(!inbox.is_inside());
    }
}

#[test]
fn a_frame_without_an_end_is_too_long() {
    let mut inbox = Assembler::default();
    let space = inbox.space();
    space.fill(1);
    let room = space.len();
    inbox.received(room);
    assert_eq!(inbox.take::<Request>(), Err(FrameError::TooLong));
    assert!(!inbox.space().is_empty());
}

#[test]
fn texts_are_cut_at_a_character() {
    assert_eq!(text::<4>("abc").as_str(), "abc");
    assert_eq!(text::<4>("abcé").as_str(), "abc");
    assert_eq!(text::<4>("abé").as_str(), "abé");
    assert_eq!(text::<4>("").as_str(), "");
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(bytes: Vec<u8>) {
        let _ = frame::decode::<Request>(&bytes);
        let _ = frame::decode::<Reply>(&bytes);
        let _ = postcard::from_bytes::<Request>(&bytes);
        let _ = postcard::from_bytes::<Reply>(&bytes);
    }

    #[test]
    fn garbage_between_frames_never_panics_and_always_ends(parts: Vec<(Vec<u8>, bool)>) {
        let mut inbox = Assembler::default();
        for (part, good) in parts {
            let bytes = if good { [&[0], framed(&Request::Status).as_slice()].concat() } else { part };
            let count = bytes.len().min(inbox.space().len());
            inbox.space()[..count].copy_from_slice(&bytes[..count]);
            inbox.received(count);
            while !matches!(inbox.take::<Request>(), Ok(None)) {}
        }
    }
}
