//! Two ends of one connection, and one end with a peer that says what it likes.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::wire::head;
use super::*;
use crate::limits::{MIB, STREAM_BLOCK_MAX};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn socket(stream: UnixStream) -> Arc<Socket> {
    Arc::new(Socket::new(OwnedFd::from(stream)))
}

/// An end without slots, and a peer.
fn source() -> (Arc<Trunk>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    (Trunk::start(socket(ours), None).expect("a trunk"), theirs)
}

/// An end with slots, the bell that its writer hears, and a peer.
fn destination() -> (Arc<Trunk>, Arc<Socket>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let (slots, bell) = Slots::new().expect("slots");
    (Trunk::start(socket(ours), Some(slots)).expect("a trunk"), bell, theirs)
}

fn message(kind: Kind, body: &[u8]) -> Vec<u8> {
    [&head(kind, body.len())[..], body].concat()
}

fn block(number: u32, data: &[u8]) -> Vec<u8> {
    let length_bytes = u32::try_from(data.len()).expect("short");
    let block = Block { verb: Verb::Write, disk: 0, number, offset_bytes: 0, length_bytes };
    [&head(Kind::Blocks, BLOCK_HEAD + data.len())[..], &block.encode(), data].concat()
}

/// Does what a writer does, with a disk in memory, until the bell ends.
fn write(trunk: &Trunk, bell: &Socket, disk: &mut [u8]) {
    let mut number = [0];
    while bell.recv(&mut number).is_ok_and(|count| count > 0) {
        let slots = trunk.slots().expect("slots");
        let block = {
            let slot = slots.slot(number[0]);
            let at = usize::try_from(slot.block.offset_bytes).expect("fits");
            match slot.block.verb {
                Verb::Write => disk[at..at + slot.data().len()].copy_from_slice(slot.data()),
                Verb::Zero => disk[at..at + slot.block.length_bytes as usize].fill(0),
                Verb::Flush => {}
            }
            slot.block
        };
        slots.give_back(number[0]);
        let done = Done { disk: block.disk, number: block.number, error: 0 }.encode();
        let _ = trunk.send(Kind::Done, &[&head(Kind::Done, done.len())[..], &done].concat(), &[], soon());
    }
}

#[test]
fn blocks_arrive_in_order_while_both_ends_send_messages() {
    let (a, b) = UnixStream::pair().expect("a pair");
    let source = Trunk::start(socket(a), None).expect("a trunk");
    let (slots, bell) = Slots::new().expect("slots");
    let destination = Trunk::start(socket(b), Some(slots)).expect("a trunk");
    let mut disk = vec![7; 8 * MIB];
    let data: Vec<u8> = (0..8 * MIB).map(|at| u8::try_from(at / 4096 % 251).expect("small")).collect();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&destination, &bell, &mut disk));
        let talker = scope.spawn(|| {
            for number in 0..100_u8 {
                for (trunk, kind) in [(&source, Kind::Phases), (&destination, Kind::Digests)] {
                    trunk.send(kind, &message(kind, &[number]), &[], soon()).expect("sent");
                }
            }
        });
        let mut outlet = Outlet::new(&source, 0);
        let mut answered = Vec::new();
        for (cookie, piece) in (0..).zip(data.chunks(3 * MIB / 2)) {
            outlet.write(cookie, cookie * (3 * MIB as u64 / 2), piece).expect("sent");
        }
        outlet.write_zeroes(100, MIB as u64, MIB).expect("sent");
        outlet.flush(101).expect("sent");
        assert_eq!(outlet.in_flight(), 8);
        while outlet.in_flight() > 0 {
            outlet
                .wait(Duration::from_secs(5), &mut |cookie, error| {
                    assert_eq!(error, 0);
                    answered.push(cookie);
                })
                .expect("alive");
        }
        assert_eq!(answered, [0, 1, 2, 3, 4, 5, 100, 101], "each request once, in order");
        talker.join().expect("no panic");
        for (trunk, kind) in [(&destination, Kind::Phases), (&source, Kind::Digests)] {
            for number in 0..100_u8 {
                assert_eq!(trunk.receive(kind, soon()), Ok(Some(vec![number].into())));
            }
            assert_eq!(trunk.receive(kind, Instant::now()), Ok(None));
        }
        source.shut();
        writer.join().expect("it ends with the connection");
    });
    let expected = [&data[..MIB], &vec![0; MIB], &data[2 * MIB..]].concat();
    assert!(disk == expected);
    assert_eq!(destination.receive(Kind::Phases, soon()), Err(Broken::Closed));
}

#[test]
fn source_sends_more_than_there_is_room_for() {
    let (trunk, _bell, mut peer) = destination();
    let slots = u32::try_from(STREAM_SLOTS).expect("small");
    for number in 0..=slots {
        peer.write_all(&block(number, &[1])).expect("sent");
    }
    assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Frame(Fault::TooMany)));
    let mut rest = Vec::new();
    assert_eq!(peer.read_to_end(&mut rest).ok(), Some(0), "and is cut off");
}

#[test]
fn blocks_wait_for_nobody_once_the_writer_has_been_ended() {
    let (trunk, bell, mut peer) = destination();
    bell.shutdown();
    for number in 0..1000 {
        peer.write_all(&block(number, &[1])).expect("sent");
    }
    peer.write_all(&message(Kind::Phases, b"phases go on")).expect("sent");
    assert_eq!(trunk.receive(Kind::Phases, soon()), Ok(Some(b"phases go on"[..].into())));
}

#[test]
fn peer_sends_what_must_not_come() {
    let done = |disk, number| message(Kind::Done, &Done { disk, number, error: 0 }.encode());
    for (bytes, fault) in [
        (done(0, 0), Fault::Unasked),
        (done(40, 0), Fault::Unasked),
        (block(0, &[1]), Fault::Way(Kind::Blocks)),
        (vec![1, 0, 0, 9], Fault::Kind(9)),
        (vec![0, 0, 0, 0], Fault::Length(Kind::Phases, 0)),
    ] {
        let (trunk, mut peer) = source();
        peer.write_all(&bytes).expect("sent");
        assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Frame(fault)));
    }
    let (trunk, mut peer) = source();
    let mut outlet = Outlet::new(&trunk, 0);
    outlet.write(1, 0, &[1]).expect("sent");
    peer.write_all(&done(0, 1)).expect("sent");
    let answered = outlet.wait(Duration::from_secs(5), &mut |_, _| panic!("nothing was acknowledged"));
    assert_eq!(answered, Err(Broken::Frame(Fault::Unasked)), "an acknowledgement out of order");
    let (trunk, _bell, mut peer) = destination();
    peer.write_all(&done(0, 0)).expect("sent");
    assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Frame(Fault::Way(Kind::Done))));
}

#[test]
fn the_window_opens_while_acknowledgements_come_soon_and_closes_behind_a_queue() {
    let (trunk, _peer) = source();
    let sent = |number, ago| Sent { number, cookie: 0, last: true, bytes: STREAM_BLOCK_MAX, at: Instant::now() - ago };
    let mut inner = trunk.lock();
    let mut number = 0;
    let mut done = |inner: &mut Inner, ago| {
        inner.in_flight.0 += 1;
        inner.in_flight.1 += STREAM_BLOCK_MAX;
        inner.lanes[0].sent.push_back(sent(number, ago));
        inner.done(Done { disk: 0, number, error: 0 }).expect("in order");
        number += 1;
    };
    assert_eq!(inner.window, STREAM_WINDOW_MIN);
    for _ in 0..STREAM_SLOTS {
        done(&mut inner, Duration::from_millis(20));
    }
    assert_eq!(inner.window, STREAM_WINDOW_MAX);
    for _ in 0..4 * STREAM_SLOTS {
        done(&mut inner, Duration::from_millis(20) + 2 * STREAM_QUEUE);
    }
    assert_eq!(inner.window, STREAM_WINDOW_MIN);
    assert!(inner.has_room(STREAM_BLOCK_MAX), "something always fits");
    inner.in_flight = (1, STREAM_WINDOW_MIN);
    assert!(!inner.has_room(1));
}

#[test]
fn whoever_waits_for_room_is_woken_when_no_block_is_sent_any_more() {
    let (trunk, _peer) = source();
    std::thread::scope(|scope| {
        let mut outlet = Outlet::new(&trunk, 0);
        let sender = scope.spawn(move || {
            loop {
                if let Err(broken) = outlet.write(0, 0, &[0; STREAM_BLOCK_MAX]) {
                    return broken;
                }
            }
        });
        let deadline = soon();
        while trunk.lock().in_flight.1 < STREAM_BLOCK_MAX && Instant::now() < deadline {
            std::thread::yield_now();
        }
        trunk.close_lanes();
        assert_eq!(sender.join().expect("no panic"), Broken::Closed);
    });
    assert_eq!(trunk.receive(Kind::Phases, Instant::now()), Ok(None), "the connection lives");
}
