//! Two channels of one connection, and one with a peer that says what it likes.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::limits::{KIB, MIB, STREAM_STATE_ROOM, STREAM_STATE_ROOM_BACK};
use crate::socket::Socket;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

fn trunk(stream: UnixStream) -> Arc<Trunk> {
    Trunk::start(Arc::new(Socket::new(OwnedFd::from(stream))), None).expect("a trunk")
}

fn open(trunk: &Arc<Trunk>, room: usize) -> Channel {
    Channel::open(trunk, room).expect("the first")
}

/// Two ends that have said how much they have room for: the source's and the destination's.
fn pair() -> ([Arc<Trunk>; 2], [Channel; 2]) {
    let (a, b) = UnixStream::pair().expect("a pair");
    let trunks = [trunk(a), trunk(b)];
    let channels = [open(&trunks[0], STREAM_STATE_ROOM_BACK), open(&trunks[1], STREAM_STATE_ROOM)];
    channels.iter().for_each(|channel| channel.invite().expect("sent"));
    (trunks, channels)
}

/// One end with room for so much, and a peer.
fn lone(room: usize) -> (Arc<Trunk>, Channel, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let trunk = trunk(ours);
    let channel = open(&trunk, room);
    (trunk, channel, theirs)
}

fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
    [&head(kind, body.len())[..], body].concat()
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| u8::try_from(at / 777 % 251).expect("small")).collect()
}

/// Takes everything in until the end.
fn take_all(channel: &Channel) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 100_000]);
    loop {
        match channel.receive(&mut buffer).expect("alive") {
            0 => return all,
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
}

#[test]
fn both_directions_carry_everything_and_end_by_themselves() {
    let ([source, destination], [a, b]) = pair();
    let (there, back) = (bytes(9 * MIB + 5), bytes(300 * KIB + 1));
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            a.send_all(&there).expect("sent");
            a.finish_sending();
        });
        let receiver = scope.spawn(|| take_all(&b));
        b.send_all(&back[..1000]).expect("sent");
        let mut first = [0; 1000];
        let mut got = 0;
        while got < first.len() {
            got += a.receive(&mut first[got..]).expect("alive");
        }
        assert_eq!(first, back[..1000]);
        sender.join().expect("no panic");
        assert!(receiver.join().expect("no panic") == there);
        // The one direction is over, the other is not.
        let answering = scope.spawn(|| {
            b.send_all(&back[1000..]).expect("sent");
            b.finish_sending();
        });
        assert!(take_all(&a) == back[1000..]);
        answering.join().expect("no panic");
    });
    a.close();
    b.close();
    for trunk in [&source, &destination] {
        assert_eq!(trunk.receive(Kind::Phases, Instant::now()), Ok(None), "the connection lives on, and nothing came");
        assert!(Channel::open(trunk, 1).is_none(), "once");
    }
}

#[test]
fn a_vmm_that_takes_nothing_stops_its_own_stream_and_nothing_else() {
    let ([source, destination], [a, b]) = pair();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| a.send_all(&bytes(4 * MIB)));
        let deadline = soon();
        // Nobody takes: the sender comes to its end somewhere within the room.
        let mut before = 0;
        loop {
            let sent = of(&mut source.lock()).sent;
            if sent > 0 && sent == before || Instant::now() > deadline {
                break;
            }
            before = sent;
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(before >= STREAM_WINDOW_MIN as u64 && before <= STREAM_STATE_ROOM as u64, "{before}");
        for (from, to) in [(&source, &destination), (&destination, &source)] {
            from.send(Kind::Phases, &frame(Kind::Phases, b"x"), &[], soon()).expect("sent");
            assert_eq!(to.receive(Kind::Phases, soon()), Ok(Some(b"x"[..].into())));
        }
        b.shutdown();
        b.close();
        assert_eq!(sender.join().expect("no panic"), Err(Ended::There), "and hears that it will not go on");
    });
    assert_eq!(source.receive(Kind::Phases, Instant::now()), Ok(None), "the connection lives");
}

#[test]
fn what_is_on_its_way_when_one_side_gives_up_is_thrown_away() {
    let (trunk, channel, mut peer) = lone(1000);
    channel.invite().expect("sent");
    peer.write_all(&frame(Kind::State, &[1; 300])).expect("sent");
    channel.shutdown();
    channel.close();
    peer.write_all(&[frame(Kind::State, &[1; 700]), frame(Kind::State, &[]), frame(Kind::Phases, b"x")].concat())
        .expect("sent");
    assert_eq!(trunk.receive(Kind::Phases, soon()), Ok(Some(b"x"[..].into())));
    assert_eq!(channel.receive(&mut [0; 10]), Err(Ended::Here));
    assert_eq!(channel.send_all(&[1]), Err(Ended::Here));
    let mut said = [0; 16];
    peer.read_exact(&mut said).expect("received");
    assert_eq!(said, *[room(1000), room(0)].concat(), "how much fits, and that no more does");
}

#[test]
fn what_came_before_the_connection_was_lost_is_taken_first() {
    let (trunk, channel, mut peer) = lone(1000);
    peer.write_all(&frame(Kind::State, &[7; 500])).expect("sent");
    drop(peer);
    assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Closed));
    let mut buffer = [0; 1000];
    assert_eq!(channel.receive(&mut buffer), Ok(500));
    assert_eq!(channel.receive(&mut buffer), Err(Ended::Broken(Broken::Closed)));
    assert_eq!(channel.send_all(&[1]), Err(Ended::Broken(Broken::Closed)));
}

#[test]
fn whoever_waits_is_woken_by_a_connection_that_is_lost() {
    let (trunk, channel, _peer) = lone(1000);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| channel.receive(&mut [0; 10]));
        // Nothing was said yet about how much fits.
        let sending = scope.spawn(|| channel.send_all(&[1]));
        std::thread::sleep(Duration::from_millis(20));
        trunk.shut();
        assert_eq!(receiving.join().expect("no panic"), Err(Ended::Broken(Broken::Closed)));
        assert_eq!(sending.join().expect("no panic"), Err(Ended::Broken(Broken::Closed)));
    });
}

#[test]
fn peer_sends_of_the_state_what_must_not_come() {
    let state = |length| frame(Kind::State, &bytes(length));
    for (sent, fault) in [
        (state(1001), Fault::Room),
        ([state(600), state(401)].concat(), Fault::Room),
        ([state(0), state(1)].concat(), Fault::State),
        ([state(0), state(0)].concat(), Fault::State),
        // More has been taken than was sent.
        ([room(10), room(1)].concat(), Fault::Unasked),
        ([room(0), room(1)].concat(), Fault::State),
    ] {
        let (trunk, _channel, mut peer) = lone(1000);
        peer.write_all(&sent).expect("sent");
        assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Frame(fault)));
        let mut rest = Vec::new();
        assert_eq!(peer.read_to_end(&mut rest).unwrap_or_default(), 0, "and is cut off");
    }
    for sent in [state(0), state(1), room(1).to_vec(), room(0).to_vec()] {
        let (ours, mut peer) = UnixStream::pair().expect("a pair");
        let trunk = trunk(ours);
        peer.write_all(&sent).expect("sent");
        assert_eq!(trunk.receive(Kind::Phases, soon()), Err(Broken::Frame(Fault::State)), "no state is on its way");
    }
}

#[test]
fn the_window_opens_while_it_goes_well_and_closes_behind_a_queue() {
    let mut state = State::new(0);
    let mut now = Instant::now();
    state.room(u32::try_from(STREAM_STATE_ROOM).expect("fits"), now).expect("the first");
    let mut round = |state: &mut State, took| {
        let mut sent = 0;
        while state.may_send(STREAM_BLOCK_MAX) > 0 {
            state.count(STREAM_BLOCK_MAX);
            sent += STREAM_BLOCK_MAX;
        }
        let probe = state.probe.as_mut().expect("one is under way");
        probe.at = now;
        now += took;
        state.room(u32::try_from(sent).expect("fits"), now).expect("was sent");
        sent
    };
    assert_eq!(round(&mut state, Duration::from_millis(20)), STREAM_WINDOW_MIN);
    assert_eq!(round(&mut state, Duration::from_millis(20)), 2 * STREAM_WINDOW_MIN);
    for _ in 0..8 {
        round(&mut state, Duration::from_millis(20));
    }
    assert_eq!(round(&mut state, Duration::from_millis(20)), STREAM_STATE_ROOM);
    for _ in 0..16 {
        round(&mut state, Duration::from_millis(20) + 2 * STREAM_QUEUE);
    }
    assert_eq!(round(&mut state, Duration::from_millis(20)), STREAM_WINDOW_MIN);
}

#[test]
fn blocks_and_the_state_take_turns_in_the_order_in_which_they_come() {
    let (trunk, _channel, mut peer) = lone(1000);
    std::thread::scope(|scope| {
        // Somebody sends.
        trunk.turn().busy = true;
        for place in 0..12_u8 {
            let kind = if place % 2 == 0 { Kind::Blocks } else { Kind::State };
            let trunk = &trunk;
            scope.spawn(move || trunk.send(kind, &frame(kind, &[place; 20]), &[], soon()).expect("sent"));
            let deadline = soon();
            while trunk.turn().come <= u64::from(place) && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
        trunk.turn().busy = false;
        trunk.next.notify_all();
        for place in 0..12 {
            let mut came = [0; FRAME_HEAD + 20];
            peer.read_exact(&mut came).expect("received");
            assert_eq!(came[FRAME_HEAD], place);
        }
    });
}
