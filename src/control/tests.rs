//! The control door as a whole: pinned bytes, garbage, and both ends over real sockets with a desk that is a fake.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::client::Client;
use super::frame::{self, Assembler, FrameError};
use super::server::{Desk, News, Server};
use super::wire::*;
use crate::address::Address;
use crate::domain::Stays;
use crate::error::{Exit, Problem};
use crate::limits::{ADDRESS_MAX, CONTROL_CONNECTIONS_MAX, CONTROL_FRAME_MAX, DISKS_MAX};
use crate::listener::Listener;
use crate::socket::Socket;

const WAIT: Duration = Duration::from_secs(10);

// ---- bytes -------------------------------------------------------------------------------------------------------

fn bytes<T: Serialize>(message: &T) -> Vec<u8> {
    let mut out = [0; CONTROL_FRAME_MAX];
    let length = postcard::to_slice(message, &mut out).expect("fits").len();
    out[..length].to_vec()
}

fn framed<T: Serialize>(message: &T) -> Vec<u8> {
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
        }]
        .into_iter()
        .collect(),
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
    }
}

#[test]
fn every_request_has_its_number_and_bytes() {
    pinned(&Request::Hello { version: 1 }, &[0, 1]);
    pinned(&Request::Status, &[1]);
    pinned(&Request::Claim { discard_record: true }, &[2, 1]);
    let migrate =
        [3, 9, b't', b'c', b'p', b':', b'/', b'/', b'b', b':', b'1', 1, 1, 3, b'v', b'd', b'a', 0xac, 2, 2, 0, 4, 1, 1];
    pinned(&Request::Migrate(a_migrate_request()), &migrate);
    pinned(&Request::Switch, &[4]);
    pinned(&Request::Cancel { cause: text("no") }, &[5, 2, b'n', b'o']);
    pinned(&Request::Set(SetRequest { bandwidth_bytes: Some(0), downtime_limit_ms: None }), &[6, 1, 0, 0]);
    pinned(&Request::Follow, &[7]);
}

#[test]
fn every_reply_has_its_number_and_bytes() {
    pinned(&Reply::Hello { version: 1, guest: text("g") }, &[0, 1, 1, b'g']);
    pinned(&Reply::Ok, &[1]);
    let refusal = Refusal { exit: 1, operation: text("o"), object: text("b"), cause: text("c") };
    pinned(&Reply::Refused(refusal), &[2, 1, 1, b'o', 1, b'b', 1, b'c']);
    let status = [3, 1, b'g', 3, 1, 2, 3, 1, b'p', 1, 1, b'h', 1, 1, b'a', 0x80, 4, 1, 2, 1, 3];
    pinned(&Reply::Status(a_status()), &status);
    let progress = [4, 5, 2, 6, 3, 9, 8, 1, 7, 10, 11, 1, 1, 1, b'a', 1, 2, 3, 4, 5, 6, 7, 1, 8];
    pinned(&Reply::Progress(a_progress()), &progress);
    pinned(&Reply::Done(a_done()), &[5, 1, 3, 1, b'x', 1, 1, b'd', 4, 5, 6, 7, 1, 8]);
}

#[test]
fn every_value_of_an_enumeration_has_its_number() {
    use {Gate as G, Migration as M, Owner as O, Phase as P, State as S};
    let numbers = |all: &[Vec<u8>]| all.iter().enumerate().all(|(i, b)| b.len() == 1 && usize::from(b[0]) == i);
    let states = [S::Incoming, S::Receiving, S::Sealed, S::Owner, S::Offered, S::Given, S::Superseded, S::Unknown];
    assert!(numbers(&states.map(|v| bytes(&v))));
    let gates = [G::Incoming, G::Receiving, G::Sealed, G::Serving, G::Quiesced, G::Fenced];
    assert!(numbers(&gates.map(|v| bytes(&v))));
    let phases = [P::Prepare, P::Bulk, P::Passes, P::State, P::Final, P::Seal, P::Give, P::Abort];
    assert!(numbers(&phases.map(|v| bytes(&v))));
    assert!(numbers(&[O::Here, O::Destination, O::Unknown].map(|v| bytes(&v))));
    assert!(numbers(&[M::None, M::Running, M::Ended].map(|v| bytes(&v))));
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
    let status = Status {
        guest: full(),
        term: most,
        generation: most,
        lineage: u128::MAX,
        peer: full(),
        hint: full(),
        disks: (0..DISKS_MAX).map(|_| disk.clone()).collect(),
        ..a_status()
    };
    let whole = framed(&Request::Migrate(migrate.clone()));
    assert_eq!(frame::decode(&whole[..whole.len() - 1]), Ok(Request::Migrate(migrate)));
    for reply in [Reply::Progress(progress), Reply::Status(status)] {
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
    assert_eq!(frame::decode::<Request>(&frame(&[8])), Err(FrameError::Unknown));
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

// ---- both ends ---------------------------------------------------------------------------------------------------

/// A guest whose migration does what the test says.
#[derive(Default)]
struct FakeDesk {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    calls: Vec<String>,
    running: Option<Progress>,
    done: Option<Done>,
    given: bool,
}

impl FakeDesk {
    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock().expect("no panic"));
        self.changed.notify_all();
    }

    fn calls(&self) -> Vec<String> {
        self.inner.lock().expect("no panic").calls.clone()
    }

    fn note(&self, call: impl Into<String>) -> Result<(), Problem> {
        self.change(|inner| inner.calls.push(call.into()));
        Ok(())
    }

    fn end(&self, exit: Exit, message: &str) {
        self.change(|inner| {
            let attempt = inner.running.take().expect("one runs").attempt;
            inner.done = Some(Done { attempt, exit: exit.code(), message: text(message), ..Done::default() });
        });
    }

    /// Waits until a call was made that starts so.
    fn wait_for(&self, call: &str) -> Duration {
        let start = Instant::now();
        let inner = self.inner.lock().expect("no panic");
        let missing = |inner: &mut Inner| !inner.calls.iter().any(|c| c.starts_with(call));
        let (inner, result) = self.changed.wait_timeout_while(inner, WAIT, missing).expect("no panic");
        assert!(!result.timed_out(), "{call} was not called, only {:?}", inner.calls);
        start.elapsed()
    }
}

impl Desk for FakeDesk {
    fn status(&self) -> Status {
        Status { guest: text("g1"), state: State::Owner, ..Status::default() }
    }

    fn claim(&self, discard_record: bool) -> Result<(), Problem> {
        self.note(format!("claim {discard_record}"))?;
        Err(Problem::refused("claim", "g1", "there is a record"))
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<u128, Problem> {
        self.note(format!("migrate {}", request.destination))?;
        self.change(|inner| inner.running = Some(Progress { attempt: 42, ..Progress::default() }));
        Ok(42)
    }

    fn switch(&self) -> Result<(), Problem> {
        self.note("switch")
    }

    fn cancel(&self, attempt: Option<u128>, cause: &str) -> Result<(), Problem> {
        self.note(format!("cancel {attempt:?} {cause}"))?;
        if self.inner.lock().expect("no panic").given {
            return Err(Problem::refused("cancel", "g1", "GIVEN is begun"));
        }
        self.end(Exit::Aborted, cause);
        Ok(())
    }

    fn set(&self, change: &SetRequest) -> Result<(), Problem> {
        self.note(format!("set {:?}", change.bandwidth_bytes))
    }

    fn news(&self, attempt: Option<u128>, timeout: Duration) -> Option<News> {
        let inner = self.inner.lock().expect("no panic");
        let phase = inner.running.as_ref().map(|p| p.phase);
        let same = |inner: &mut Inner| inner.running.is_some() && inner.running.as_ref().map(|p| p.phase) == phase;
        let (inner, _) = self.changed.wait_timeout_while(inner, timeout, same).expect("no panic");
        let wanted = |found: u128| attempt.is_none_or(|a| a == found);
        if let Some(progress) = inner.running.as_ref().filter(|p| wanted(p.attempt)) {
            return Some(News::Progress(progress.clone()));
        }
        inner.done.as_ref().filter(|d| wanted(d.attempt)).map(|d| News::Done(d.clone()))
    }
}

fn pair() -> (Socket, Arc<Socket>) {
    let (a, b) = UnixStream::pair().expect("a pair");
    (Socket::new(OwnedFd::from(a)), Arc::new(Socket::new(OwnedFd::from(b))))
}

/// Runs a test against a connection that a server attends.
fn attended(desk: &FakeDesk, test: impl FnOnce(Socket)) {
    let server = Server::new(desk);
    thread::scope(|scope| {
        let (ours, theirs) = pair();
        scope.spawn(|| server.attend(theirs));
        test(ours);
    });
}

fn a_client(socket: Socket) -> Client {
    Client::greet("test", "g1", socket).expect("greets")
}

#[test]
fn each_request_reaches_the_desk_and_its_answer_comes_back() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        assert_eq!(client.ask(&Request::Status), Ok(Reply::Status(desk.status())));
        let refused = client.tell(&Request::Claim { discard_record: true }).expect_err("refused");
        assert_eq!(refused, Problem::refused("claim", "g1", "there is a record"));
        client.tell(&Request::Switch).expect("switches");
        client.tell(&Request::Set(SetRequest { bandwidth_bytes: Some(7), ..SetRequest::default() })).expect("sets");
        let problem = client.tell(&Request::Follow).expect_err("nothing to follow");
        assert_eq!(problem.to_string(), "blockferry: follow: migration: there is none");
    });
    assert_eq!(desk.calls(), ["claim true", "switch", "set Some(7)"]);
}

#[test]
fn a_foreground_migration_is_followed_to_its_end() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        let request = MigrateRequest { destination: text("tcp://b:1"), ..MigrateRequest::default() };
        client.tell(&Request::Migrate(request)).expect("starts");
        for phase in [Phase::Bulk, Phase::Passes, Phase::Final] {
            desk.change(|inner| inner.running.as_mut().expect("runs").phase = phase);
            loop {
                let Reply::Progress(progress) = client.next_reply().expect("progress") else { panic!("not progress") };
                assert_eq!(progress.attempt, 42);
                if progress.phase == phase {
                    break;
                }
            }
        }
        desk.end(Exit::Done, "");
        let done = loop {
            match client.next_reply().expect("an end") {
                Reply::Done(done) => break done,
                Reply::Progress(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((done.exit, done.attempt), (0, 42));
        // The connection is good for more, also for the end again.
        client.tell(&Request::Follow).expect("follows");
        assert!(matches!(client.next_reply(), Ok(Reply::Done(_))));
    });
    assert_eq!(desk.calls(), ["migrate tcp://b:1"]);
}

#[test]
fn a_foreground_migration_is_cancelled_within_200_ms_when_its_client_goes_away() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        client.tell(&Request::Migrate(MigrateRequest::default())).expect("starts");
        drop(client);
        let took = desk.wait_for("cancel Some(42) the migrate command went away");
        assert!(took <= Duration::from_millis(200), "{took:?}");
    });
}

#[test]
fn a_client_that_goes_away_after_given_changes_nothing() {
    let desk = FakeDesk::default();
    desk.change(|inner| inner.given = true);
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        client.tell(&Request::Migrate(MigrateRequest::default())).expect("starts");
        drop(client);
        desk.wait_for("cancel");
    });
    assert!(desk.inner.lock().expect("no panic").running.is_some());
}

#[test]
fn a_detached_migration_and_one_that_is_only_followed_go_on() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        client.tell(&Request::Migrate(MigrateRequest { detach: true, ..MigrateRequest::default() })).expect("starts");
        client.tell(&Request::Follow).expect("follows");
        assert!(matches!(client.next_reply(), Ok(Reply::Progress(_))));
    });
    // The server has noticed the client's end: its thread is joined.
    assert_eq!(desk.calls(), ["migrate "]);
}

#[test]
fn a_client_that_does_not_read_holds_nothing_up_and_still_hears_the_end() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        client.tell(&Request::Migrate(MigrateRequest::default())).expect("starts");
        for i in 0..20_000 {
            let phase = if i % 2 == 0 { Phase::Bulk } else { Phase::Passes };
            desk.change(|inner| inner.running.as_mut().expect("runs").phase = phase);
        }
        desk.end(Exit::Done, "");
        let mut frames = 0;
        while matches!(client.next_reply().expect("a frame"), Reply::Progress(_)) {
            frames += 1;
        }
        assert!(frames > 0);
    });
    assert_eq!(desk.calls(), ["migrate "]);
}

#[test]
fn garbage_closes_the_connection_and_nothing_else() {
    let desk = FakeDesk::default();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n\0"[..], &[1, 2, 3, 0], &[255; 20_000]] {
        attended(&desk, |socket| {
            // The server may close before it has read everything.
            let _ = socket.send_all(garbage);
            let mut rest = [0; 16];
            assert!(matches!(socket.recv(&mut rest), Ok(0) | Err(_)));
        });
    }
    attended(&desk, |socket| drop(a_client(socket)));
}

#[test]
fn what_is_not_understood_is_answered_before_the_connection_closes() {
    let desk = FakeDesk::default();
    let first_reply = |request: Vec<u8>| {
        let mut reply = None;
        attended(&desk, |socket| {
            socket.send_all(&request).expect("sends");
            let mut link = super::link::Link::new(Arc::new(socket));
            reply = link.receive::<Reply>(Some(Instant::now() + WAIT)).expect("a reply");
            assert_eq!(link.receive::<Reply>(Some(Instant::now() + WAIT)).expect("an end"), None);
        });
        let Some(Reply::Refused(refusal)) = reply else { panic!("not refused: {reply:?}") };
        Problem::from(refusal).to_string()
    };
    assert_eq!(
        first_reply(framed(&Request::Hello { version: 2 })),
        "blockferry: control: version: the command speaks version 2, the running process version 1"
    );
    assert_eq!(first_reply(framed(&Request::Switch)), "blockferry: control: request: no hello came before it");
    assert_eq!(
        first_reply(framed(&200_u8)),
        "blockferry: control: request: not known to this process; is the command of another version?"
    );
    assert!(desk.calls().is_empty());
}

#[test]
fn the_door_of_another_guest_is_noticed() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let problem = Client::greet("status", "g2", socket).expect_err("another guest");
        assert_eq!(problem.to_string(), "blockferry: status: g2: that door is of guest g1");
    });
}

#[test]
fn a_guest_that_nobody_serves_is_one_clear_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let door = Address::Unix(dir.path().join("control.sock"));
    let problem = Client::connect("status", "g1", &door).expect_err("nobody");
    let why = format!("nobody serves it on this host ({door}: No such file or directory)");
    assert_eq!(problem, Problem::refused("status", "g1", why));
}

#[test]
fn a_process_that_dies_during_a_request_leaves_it_unknown() {
    let (ours, theirs) = pair();
    let server = thread::spawn(move || {
        let mut link = super::link::Link::new(theirs);
        let deadline = Some(Instant::now() + WAIT);
        link.receive::<Request>(deadline).expect("a hello");
        link.send(&Reply::Hello { version: VERSION, guest: text("g1") }, Instant::now() + WAIT).expect("sends");
        link.receive::<Request>(deadline).expect("a request");
    });
    let problem = a_client(ours).tell(&Request::Switch).expect_err("died");
    server.join().expect("no panic");
    let cause = "the process closed the connection; ask it again: blockferry status g1";
    assert_eq!(problem, Problem::unknown("test", "g1", cause));
}

#[test]
fn a_door_answers_many_refuses_too_many_and_ends_with_its_listener() {
    let dir = tempfile::tempdir().expect("a directory");
    let door = Address::Unix(dir.path().join("control.sock"));
    assert!(door.to_string().len() <= ADDRESS_MAX);
    let listener = Listener::bind(&door).expect("binds");
    let desk = FakeDesk::default();
    let server = Server::new(&desk);
    thread::scope(|scope| {
        let running = scope.spawn(|| server.run(&listener));
        let mut clients: Vec<_> =
            (0..CONTROL_CONNECTIONS_MAX).map(|_| Client::connect("test", "g1", &door).expect("connects")).collect();
        let problem = Client::connect("test", "g1", &door).expect_err("too many");
        assert_eq!(problem.to_string(), "blockferry: control: connection: 16 control connections are open already");
        clients[0].tell(&Request::Switch).expect("still answered");
        listener.stop();
        running.join().expect("no panic").expect("ends well");
        assert_eq!(clients[1].tell(&Request::Switch).expect_err("closed").exit, Exit::Unknown);
    });
}
