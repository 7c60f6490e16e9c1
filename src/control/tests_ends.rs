//! Both ends of the control door over real sockets, with a desk that is a fake.

use std::io::Read as _;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::client::Client;
use super::fake::{FakeDesk, WAIT};
use super::link::Link;
use super::server::{Desk as _, Server};
use super::tests_bytes::{frame, framed};
use super::wire::*;
use crate::address::Address;
use crate::error::{Exit, Problem};
use crate::limits::CONTROL_CONNECTIONS_MAX;
use crate::listener::Listener;
use crate::socket::Socket;

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

fn an_attach(wait_s: Option<u32>) -> Request {
    Request::Attach(AttachRequest { disk: text("vda"), device: text("/dev/nbd0"), wait_s })
}

#[test]
fn an_attach_waits_until_the_disk_is_owned_or_its_time_is_up() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut client = a_client(socket);
        let problem = client.ask_patiently(&an_attach(Some(0))).expect_err("not owned");
        assert_eq!(problem.to_string(), "blockferry: attach: vda: this host does not own the disk yet");
        assert_eq!(problem.exit, Exit::Refused);
        thread::scope(|scope| {
            scope.spawn(|| {
                desk.wait_for("attach vda /dev/nbd0 None");
                desk.change(|inner| inner.owns = true);
            });
            assert_eq!(client.ask_patiently(&an_attach(None)), Ok(Reply::Ok));
        });
        let problem = client.tell(&Request::Detach { device: text("/dev/nbd0") }).expect_err("the desk says no");
        assert_eq!(problem.to_string(), "blockferry: detach: /dev/nbd0: is in use");
    });
}

#[test]
fn a_descriptor_is_passed_on_with_its_request_and_with_no_other() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let (passed, mut other) = UnixStream::pair().expect("a pair");
        let mut client = a_client(socket);
        let request =
            |to| Request::Migrate(MigrateRequest { destination: text(to), detach: true, ..MigrateRequest::default() });
        client.tell_passing(&request("fd:5"), &[passed.as_fd()]).expect("started");
        drop(passed);
        client.tell(&request("tcp://b:1")).expect("started");
        assert_eq!(desk.calls(), ["migrate fd:5 with a descriptor", "migrate tcp://b:1"]);
        // The desk has let go of it: nobody holds it any more.
        assert_eq!(other.read(&mut [0]).expect("its end"), 0);
    });
    let door = TcpListener::bind("127.0.0.1:0").expect("binds");
    thread::scope(|scope| {
        let address = door.local_addr().expect("bound");
        let client = scope.spawn(move || {
            let socket = Address::Tcp { host: address.ip().to_string(), port: address.port() }.connect(WAIT);
            let (passed, _other) = UnixStream::pair().expect("a pair");
            a_client(socket.expect("connects")).tell_passing(&Request::Status, &[passed.as_fd()])
        });
        let (stream, _) = door.accept().expect("accepts");
        let (desk, socket) = (FakeDesk::default(), Arc::new(Socket::new(OwnedFd::from(stream))));
        Server::new(&desk).attend(socket);
        let problem = client.join().expect("no panic").expect_err("no Unix socket");
        let line = "blockferry: test: g1: a descriptor can be passed on over a Unix socket only";
        assert_eq!((problem.to_string().as_str(), problem.exit), (line, Exit::Refused));
    });
}

#[test]
fn a_client_repeats_a_hello_that_nobody_answers_and_passes_over_a_second_answer() {
    let (ours, theirs) = pair();
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut client = Client::greet("test", "g1", ours).expect("greets in the end");
            client.ask(&Request::Status)
        });
        let mut link = Link::new(theirs);
        let mut hear = || link.receive::<Request>(Some(Instant::now() + WAIT)).expect("a request").expect("no end");
        let (first, again) = (hear(), hear());
        assert_eq!(first, again, "the same session");
        let Request::Hello { version, session } = again else { panic!("no hello: {again:?}") };
        // Both are answered: the first one late.
        for _ in 0..2 {
            let reply = Reply::Hello { version, guest: text("g1"), session };
            link.send_first(&reply, Instant::now() + WAIT).expect("sends");
        }
        assert_eq!(link.receive(Some(Instant::now() + WAIT)).expect("a request"), Some(Request::Status));
        link.send(&Reply::Status(FakeDesk::default().status()), Instant::now() + WAIT).expect("sends");
        let reply = client.join().expect("no panic").expect("answered");
        assert_eq!(reply, Reply::Status(FakeDesk::default().status()));
    });
}

#[test]
fn an_attach_ends_with_its_client() {
    let desk = FakeDesk::default();
    // `attended` returns when the connection's thread has ended.
    attended(&desk, |socket| {
        let mut link = Link::new(Arc::new(socket));
        let hello = Request::Hello { version: VERSION, session: 7 };
        link.send(&hello, Instant::now() + WAIT).expect("sends");
        link.send(&an_attach(None), Instant::now() + WAIT).expect("sends");
        desk.wait_for("attach");
        // Nothing else is done meanwhile, but a hello begins anew.
        link.send(&Request::Switch, Instant::now() + WAIT).expect("sends");
        link.send(&hello, Instant::now() + WAIT).expect("sends");
        link.send(&an_attach(None), Instant::now() + WAIT).expect("sends");
        let deadline = Some(Instant::now() + WAIT);
        let mut replies = || link.receive::<Reply>(deadline).expect("a reply").expect("no end");
        assert!(matches!(replies(), Reply::Hello { .. }));
        assert!(matches!(replies(), Reply::Refused(refusal) if refusal.cause == "an attach is waiting here"));
        assert!(matches!(replies(), Reply::Hello { .. }));
    });
    assert!(desk.calls().iter().all(|call| call.starts_with("attach")), "{:?}", desk.calls());
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
    // More bytes than any socket buffer takes; `offer` never waits, so this ends although nobody reads.
    const OFFERS: u64 = 20_000;
    let (ours, theirs) = pair();
    let mut sender = Link::new(theirs);
    let name: DiskName = text(&"x".repeat(64));
    for elapsed_ms in 0..OFFERS {
        let disks = [DiskProgress { name: name.clone(), ..DiskProgress::default() }].into_iter().collect();
        sender.offer(&Reply::Progress(Progress { elapsed_ms, disks, ..Progress::default() })).expect("offers");
    }
    thread::scope(|scope| {
        scope.spawn(|| sender.send(&Reply::Done(Done::default()), Instant::now() + WAIT).expect("sends"));
        let mut receiver = Link::new(Arc::new(ours));
        let mut last = None;
        let mut frames = 0;
        loop {
            match receiver.receive::<Reply>(Some(Instant::now() + WAIT)).expect("whole frames").expect("not the end") {
                Reply::Progress(progress) => {
                    assert!(last.is_none_or(|before| before < progress.elapsed_ms));
                    last = Some(progress.elapsed_ms);
                    frames += 1;
                }
                reply => break assert_eq!(reply, Reply::Done(Done::default())),
            }
        }
        assert!(frames > 0 && frames < OFFERS, "{frames}");
    });
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
            let mut link = Link::new(Arc::new(socket));
            reply = link.receive::<Reply>(Some(Instant::now() + WAIT)).expect("a reply");
            assert_eq!(link.receive::<Reply>(Some(Instant::now() + WAIT)).expect("an end"), None);
        });
        let Some(Reply::Refused(refusal)) = reply else { panic!("not refused: {reply:?}") };
        Problem::from(refusal).to_string()
    };
    assert_eq!(first_reply(framed(&Request::Switch)), "blockferry: control: request: no hello came before it");
    assert_eq!(
        first_reply([&frame(&[200])[..], &[0]].concat()),
        "blockferry: control: request: not known to this process; is the command of another version?"
    );
    assert!(desk.calls().is_empty());
}

#[test]
fn another_version_is_said_and_gets_nothing_else() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut link = Link::new(Arc::new(socket));
        let until = Instant::now() + WAIT;
        link.send(&Request::Hello { version: VERSION + 1, session: 9 }, until).expect("sends");
        let hello = Reply::Hello { version: VERSION, guest: text("g1"), session: 9 };
        assert_eq!(link.receive(Some(until)).expect("a reply"), Some(hello));
        link.send(&Request::Switch, until).expect("sends");
        let Ok(Some(Reply::Refused(refusal))) = link.receive(Some(until)) else { panic!("not refused") };
        assert_eq!(refusal.cause, "no hello came before it");
    });
    assert!(desk.calls().is_empty());

    let (ours, theirs) = pair();
    let server = thread::spawn(move || {
        let mut link = Link::new(theirs);
        let Ok(Some(Request::Hello { session, .. })) = link.receive(Some(Instant::now() + WAIT)) else {
            panic!("none")
        };
        let hello = Reply::Hello { version: VERSION + 1, guest: text("g1"), session };
        link.send(&hello, Instant::now() + WAIT).expect("sends");
    });
    let problem = Client::greet("status", "g1", ours).expect_err("another version");
    server.join().expect("no panic");
    let (v, next) = (VERSION, VERSION + 1);
    let cause = format!("the command speaks version {v} of the control protocol, the running process version {next}");
    assert_eq!(problem, Problem::refused("status", "g1", cause));
}

#[test]
fn what_was_meant_for_somebody_before_is_passed_over() {
    let (ours, theirs) = pair();
    let server = thread::spawn(move || {
        // The end of a frame that began before, replies to requests of somebody else, noise.
        theirs.send_all(&[7, 7, 7]).expect("sends");
        let mut link = Link::new(theirs);
        let until = Instant::now() + WAIT;
        let Ok(Some(Request::Hello { session, .. })) = link.receive(Some(until)) else { panic!("no hello") };
        let hello = |session| Reply::Hello { version: VERSION, guest: text("g1"), session };
        link.send_first(&hello(session.wrapping_add(1)), until).expect("sends");
        for reply in [Reply::Ok, Reply::Progress(Progress::default()), Reply::Status(Status::default())] {
            link.send(&reply, until).expect("sends");
        }
        link.send_first(&hello(session), until).expect("sends");
        let Ok(Some(Request::Switch)) = link.receive(Some(until)) else { panic!("no request") };
        link.send(&Reply::Ok, until).expect("sends");
    });
    a_client(ours).tell(&Request::Switch).expect("the right answer");
    server.join().expect("no panic");
}

#[test]
fn who_follows_can_ask_meanwhile() {
    let desk = FakeDesk::default();
    attended(&desk, |socket| {
        let mut link = Link::new(Arc::new(socket));
        let until = Instant::now() + WAIT;
        let ask = |link: &mut Link, request: &Request| -> Reply {
            link.send(request, until).expect("sends");
            loop {
                match link.receive(Some(until)).expect("a reply").expect("not the end") {
                    Reply::Progress(_) => {}
                    reply => return reply,
                }
            }
        };
        let hello = Request::Hello { version: VERSION, session: 1 };
        assert!(matches!(ask(&mut link, &hello), Reply::Hello { .. }));
        assert_eq!(ask(&mut link, &Request::Migrate(MigrateRequest::default())), Reply::Ok);
        assert_eq!(ask(&mut link, &Request::Status), Reply::Status(desk.status()));
        assert!(matches!(ask(&mut link, &Request::Follow), Reply::Refused(_)));
        // A hello ends the following and begins a session; the migration goes on.
        assert!(matches!(ask(&mut link, &hello), Reply::Hello { .. }));
        assert_eq!(ask(&mut link, &Request::Follow), Reply::Ok);
        assert_eq!(ask(&mut link, &Request::Cancel { cause: text("enough") }), Reply::Ok);
        let Ok(Some(Reply::Done(done))) = link.receive(Some(until)) else { panic!("not done") };
        assert_eq!(done.message, "enough");
    });
    assert_eq!(desk.calls(), ["migrate ", "cancel None enough"]);
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
        let mut link = Link::new(theirs);
        let deadline = Some(Instant::now() + WAIT);
        let Ok(Some(Request::Hello { session, .. })) = link.receive(deadline) else { panic!("no hello") };
        let hello = Reply::Hello { version: VERSION, guest: text("g1"), session };
        link.send(&hello, Instant::now() + WAIT).expect("sends");
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
