//! The bytes of the control door: pinned, bounded, and garbage.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::{self, Assembler, FrameError};
use super::wire::*;
use crate::domain::Stays;
use crate::limits::{CONTROL_FRAME_MAX, DISKS_MAX, NEXT_STEPS_MAX};

fn bytes<T: Serialize>(message: &T) -> Vec<u8> {
    let mut out = [0; CONTROL_FRAME_MAX];
    let length = postcard::to_slice(message, &mut out).expect("fits").len();
    out[..length].to_vec()
}

pub(super) fn framed<T: Serialize>(message: &T) -> Vec<u8> {
    let mut out = [0; CONTROL_FRAME_MAX];
    let length = frame::encode(message, &mut out).expect("fits");
    out[..length].to_vec()
}

fn pinned<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T, golden: &[u8]) {
    assert_eq!(bytes(message), golden, "{message:?}");
    assert_eq!(postcard::from_bytes::<T>(golden).as_ref(), Ok(message));
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
        }]
        .into_iter()
        .collect(),
        lost_ms: Some(13),
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
        }),
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
        receipt: Some(a_receipt()),
    }
}

fn a_receipt() -> Kept {
    let receipt = Receipt { verify: Verify::Full, verified_bytes: 21, root: [22; 32], term: 23, generation: 24 };
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

#[test]
fn every_request_has_its_number_and_bytes() {
    pinned(&Request::Hello { version: 1 }, &[0, 1]);
    pinned(&Request::Status, &[1]);
    pinned(&Request::Claim { discard_record: true }, &[2, 1]);
    let migrate = [
        3, 9, b't', b'c', b'p', b':', b'/', b'/', b'b', b':', b'1', 1, 1, 3, b'v', b'd', b'a', 0xac, 2, 2, 0, 4, 1, 1,
        1, 1, 2,
    ];
    pinned(&Request::Migrate(a_migrate_request()), &migrate);
    pinned(&Request::Switch, &[4]);
    pinned(&Request::Cancel { cause: text("no") }, &[5, 2, b'n', b'o']);
    pinned(&Request::Set(SetRequest { bandwidth_bytes: Some(0), downtime_limit_ms: None }), &[6, 1, 0, 0]);
    pinned(&Request::Follow, &[7]);
    pinned(&Request::WhoOwns, &[8]);
    pinned(&Request::Recover(Word::ForgetPeer), &[9, 2]);
}

#[test]
fn every_reply_has_its_number_and_bytes() {
    pinned(&Reply::Hello { version: 1, guest: text("g") }, &[0, 1, 1, b'g']);
    pinned(&Reply::Ok, &[1]);
    let refusal = Refusal { exit: 1, operation: text("o"), object: text("b"), cause: text("c") };
    pinned(&Reply::Refused(refusal), &[2, 1, 1, b'o', 1, b'b', 1, b'c']);
    let status = [3, 1, b'g', 3, 1, 2, 3, 1, b'p', 1, 1, b'h', 1, 1, b'a', 0x80, 4, 1, 2, 1, 3];
    let kept = [&[1, 2, 21][..], &[22; 32], &[23, 24, 25, 26, 1, 1, b'q', 1, 27, 0]].concat();
    pinned(&Reply::Status(a_status()), &[&status, &kept[..]].concat());
    let progress = [4, 5, 2, 6, 3, 9, 8, 1, 7, 10, 11, 1, 1, 1, b'a', 1, 2, 3, 4, 5, 6, 7, 1, 8, 9, 10, 11, 12, 1, 13];
    pinned(&Reply::Progress(a_progress()), &progress);
    let done = [&[5, 1, 3, 1, b'x', 1, 1, b'd', 4, 5, 6, 7, 1, 8, 9, 10, 1, 1, 11][..], &[12; 32], &[13, 14]].concat();
    pinned(&Reply::Done(a_done()), &done);
    let ownership = [1, b'g', 5, 3, 1, 2, 4, 1, b'a', 1, b't', 1, b'n', 1, b'r', 1, 0];
    pinned(&Reply::Ownership(an_ownership()), &[&[6], &ownership[..]].concat());
    let rest = [1, b'p', 1, b'h', 1, b'd', 1, b'l', 1, b'v', 1, 1, b's'];
    pinned(&Reply::Recovered(a_recovered()), &[&[7], &ownership[..], &rest].concat());
}

#[test]
fn every_value_of_an_enumeration_has_its_number() {
    use {Gate as G, Migration as M, Owner as O, Phase as P, State as S};
    let numbers = |all: &[Vec<u8>]| all.iter().enumerate().all(|(i, b)| b.len() == 1 && usize::from(b[0]) == i);
    let states = [S::Incoming, S::Receiving, S::Sealed, S::Owner, S::Offered, S::Given, S::Superseded, S::Unknown];
    assert!(numbers(&states.map(|v| bytes(&v))));
    let gates = [G::Incoming, G::Receiving, G::Sealed, G::Serving, G::Quiesced, G::Fenced, G::Closed];
    assert!(numbers(&gates.map(|v| bytes(&v))));
    let phases = [P::Prepare, P::Bulk, P::Passes, P::State, P::Final, P::Seal, P::Give, P::Abort];
    assert!(numbers(&phases.map(|v| bytes(&v))));
    assert!(numbers(&[O::Here, O::Destination, O::Unknown, O::Elsewhere].map(|v| bytes(&v))));
    let words = [Word::Ask, Word::TakeOwnership, Word::ForgetPeer, Word::Forget];
    assert!(numbers(&words.map(|v| bytes(&v))));
    assert!(numbers(&[M::None, M::Running, M::Ended].map(|v| bytes(&v))));
    assert!(numbers(&[Verify::None, Verify::Written, Verify::Full].map(|v| bytes(&v))));
    let stays = [Stays::Shared, Stays::ReadOnly, Stays::External, Stays::Empty, Stays::NotChosen];
    assert!(numbers(&stays.map(|v| bytes(&v))));
    assert_eq!(bytes(&Convergence::Copying), [0]);
    assert_eq!(bytes(&Convergence::Converged), [1]);
    assert_eq!(bytes(&Convergence::TooLong), [2]);
}

#[test]
fn a_frame_is_message_checksum_cobs_and_a_zero() {
    // 01 (Status) and its CRC-32C, 0xa016d052 little-endian; no zero inside, so COBS adds one byte in front.
    assert_eq!(framed(&Request::Status), [6, 0x01, 0x52, 0xd0, 0x16, 0xa0, 0]);
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
    };
    let progress = Progress {
        attempt: u128::MAX,
        elapsed_ms: most,
        convergence: Convergence::GuestIsFaster { dirty_rate_bytes: most, rate_bytes: most },
        predicted_final_ms: Some(u32::MAX),
        downtime_limit_ms: u32::MAX,
        bandwidth_bytes: most,
        disks: (0..DISKS_MAX).map(|_| disk.clone()).collect(),
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
    for reply in [Reply::Progress(progress), Reply::Status(status), Reply::Recovered(recovered)] {
        let whole = framed(&reply);
        assert_eq!(frame::decode(&whole[..whole.len() - 1]), Ok(reply));
    }
}

#[test]
fn a_newer_peers_appended_field_is_ignored_and_its_new_message_is_unknown() {
    let frame = |plain: &[u8]| {
        let whole = [plain, &crc32c::crc32c(plain).to_le_bytes()].concat();
        let mut out = [0; 64];
        let length = cobs::encode(&whole, &mut out);
        out[..length].to_vec()
    };
    assert_eq!(frame::decode(&frame(&[2, 1, 77, 78])), Ok(Request::Claim { discard_record: true }));
    assert_eq!(frame::decode::<Request>(&frame(&[10])), Err(FrameError::Unknown));
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
