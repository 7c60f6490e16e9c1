//! Sessions over a byte pipe: a pseudo terminal stands in for the virtio port.
//!
//! The door has the master's end. Opening and closing the other end is what programs on the host do at the chardev:
//! reads and poll say "closed" in between, and nothing says that somebody else is there now.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use super::fake::{FakeDesk, WAIT};
use super::link::Link;
use super::port::Port;
use super::port_door::attend;
use super::server::Desk as _;
use super::tests_bytes::framed;
use super::wire::*;
use crate::limits::{CONTROL_FRAME_MAX, CONTROL_SEND_TIMEOUT, PORT_LOOK};

/// A door at a port. Its thread outlives the test, as it outlives everybody at the port.
struct Door {
    desk: Arc<FakeDesk>,
    far_end: Vec<u8>,
    /// The door's thread, as /proc names it.
    thread: String,
}

impl Door {
    fn open() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let far_end = ptsname(&master, Vec::new()).expect("its name").into_bytes();
        rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK).expect("does not wait");
        let desk = Arc::new(FakeDesk::default());
        let door = Self { desk: Arc::clone(&desk), far_end, thread: String::new() };
        // Closed counts from the first opening on.
        drop(door.plug(LocalModes::empty()));
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let thread = fs::read_link("/proc/thread-self").expect("its name").to_string_lossy().into_owned();
            tell.send(thread).expect("heard");
            attend(Port::from_fd(master), &*desk)
        });
        Self { thread: told.recv().expect("told"), ..door }
    }

    /// The far end as a program on the host has it.
    fn plug(&self, modes: LocalModes) -> OwnedFd {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open(std::ffi::OsStr::from_bytes(&self.far_end), flags, Mode::empty()).expect("opens");
        let mut raw = tcgetattr(&fd).expect("its modes");
        raw.make_raw();
        raw.local_modes |= modes;
        tcsetattr(&fd, OptionalActions::Now, &raw).expect("raw");
        fd
    }

    fn manager(&self) -> Manager {
        let fd = self.plug(LocalModes::empty());
        let raw = fd.try_clone().expect("a second one");
        Manager { link: Link::over_port(Port::from_fd(fd)), raw: Port::from_fd(raw) }
    }

    /// A manager that has said hello.
    fn greeted(&self, session: u32) -> Manager {
        let mut manager = self.manager();
        manager.greet(session);
        manager
    }
}

/// A program on the host, at its end of the port.
struct Manager {
    link: Link,
    /// The same, for what is no frame.
    raw: Port,
}

impl Manager {
    fn greet(&mut self, session: u32) {
        self.link.send_first(&Request::Hello { version: VERSION, session }, Instant::now() + WAIT).expect("sends");
        loop {
            match self.link.receive(Some(Instant::now() + WAIT)) {
                Ok(Some(Reply::Hello { session: ours, .. })) if ours == session => return,
                Ok(Some(_)) => {}
                // The rest of what was meant for somebody else.
                Err(e) if super::link::frame_error(&e).is_some() => {}
                other => panic!("no hello: {other:?}"),
            }
        }
    }

    fn send(&mut self, request: &Request) {
        self.link.send(request, Instant::now() + WAIT).expect("sends");
    }

    fn reply(&mut self) -> Reply {
        self.link.receive(Some(Instant::now() + WAIT)).expect("a reply").expect("not the end")
    }

    fn ask(&mut self, request: &Request) -> Reply {
        self.send(request);
        loop {
            match self.reply() {
                Reply::Progress(_) => {}
                reply => return reply,
            }
        }
    }

    /// Sends bytes as they are, as far as the port takes them within a moment.
    fn throw(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.raw.send_nowait(bytes).expect("open") {
                Some(count) => bytes = &bytes[count..],
                None => self.raw.wait(false, true, Some(WAIT)).expect("waits"),
            }
        }
    }
}

#[test]
fn managers_come_and_go_and_each_hears_its_own_answers() {
    let door = Door::open();
    for session in 1..=5 {
        let mut manager = door.greeted(session);
        assert_eq!(manager.ask(&Request::Status), Reply::Status(door.desk.status()));
        assert_eq!(manager.ask(&Request::Switch), Reply::Ok);
        // Asks and leaves without an answer: that must not be the next one's.
        manager.send(&Request::WhoOwns);
        manager.throw(&framed(&Request::Status)[..3]);
    }
    assert_eq!(door.desk.calls(), ["switch"; 5]);
}

#[test]
fn a_hello_without_a_hang_up_begins_a_session_too() {
    let door = Door::open();
    let mut manager = door.greeted(1);
    for session in 2..=4 {
        // The one before left in the middle of a frame, and the host's end never closed as far as we can see.
        manager.throw(&framed(&Request::Switch)[..4]);
        manager.greet(session);
        assert_eq!(manager.ask(&Request::Switch), Reply::Ok);
    }
    assert_eq!(door.desk.calls(), ["switch"; 3]);
}

#[test]
fn nothing_is_done_for_who_did_not_say_hello() {
    let door = Door::open();
    let mut manager = door.manager();
    let Reply::Refused(refusal) = manager.ask(&Request::Switch) else { panic!("not refused") };
    assert_eq!(refusal.cause, "no hello came before it");
    manager.greet(1);
    drop(manager);
    // The session ended with the host's end: whoever comes says hello.
    thread::sleep(PORT_LOOK * 2);
    let mut manager = door.manager();
    assert!(matches!(manager.ask(&Request::Switch), Reply::Refused(_)));
    assert!(door.desk.calls().is_empty());
}

#[test]
fn a_migration_goes_on_when_the_host_end_blinks() {
    let door = Door::open();
    let mut manager = door.greeted(1);
    assert_eq!(manager.ask(&Request::Migrate(MigrateRequest::default())), Reply::Ok);
    assert!(matches!(manager.reply(), Reply::Progress(_)));
    drop(manager);
    // Long enough to be seen.
    thread::sleep(PORT_LOOK * 2);
    let mut manager = door.greeted(2);
    let Reply::Status(status) = manager.ask(&Request::Status) else { panic!("no status") };
    assert_eq!(status.migration, Migration::Running);
    assert_eq!(door.desk.calls(), ["migrate "]);
    // Whoever follows it then can end it, on the same pipe.
    assert_eq!(manager.ask(&Request::Follow), Reply::Ok);
    assert_eq!(manager.ask(&Request::Cancel { cause: text("enough") }), Reply::Ok);
    let Reply::Done(done) = manager.reply() else { panic!("not done") };
    assert_eq!(done.message, "enough");
    assert_eq!(door.desk.calls(), ["migrate ", "cancel None enough"]);
}

#[test]
fn what_was_asked_before_a_hang_up_is_done() {
    let door = Door::open();
    let mut manager = door.greeted(1);
    assert_eq!(manager.ask(&Request::Migrate(MigrateRequest::default())), Reply::Ok);
    manager.send(&Request::Cancel { cause: text("and gone") });
    drop(manager);
    door.desk.wait_for("cancel None and gone");
}

#[test]
fn noise_ends_a_session_and_nothing_else() {
    let door = Door::open();
    let mut dice = 7_u32;
    let mut roll = || {
        dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        dice.to_be_bytes()[0]
    };
    let mut noise = |length: usize| -> Vec<u8> { (0..length).map(|_| roll()).collect() };
    let wrong_sum = {
        let mut frame = framed(&Request::Claim { discard_record: true });
        frame[3] ^= 4;
        frame
    };
    let mut manager = door.manager();
    let too_long = vec![1; CONTROL_FRAME_MAX + 100];
    for (session, noise) in (1..).zip([vec![0; 500], noise(30), noise(5000), too_long, wrong_sum, noise(20_000)]) {
        manager.throw(&noise);
        manager.greet(session);
        manager.throw(&[0, 0, 0]);
        assert_eq!(manager.ask(&Request::Status), Reply::Status(door.desk.status()));
    }
    // Noise inside a session ends it: who knows whose request comes next.
    manager.throw(&[9, 9, 9, 0]);
    assert!(matches!(manager.ask(&Request::Switch), Reply::Refused(_)));
    assert!(door.desk.calls().is_empty());
}

#[test]
fn a_manager_that_never_reads_holds_the_door_up_for_a_bounded_time() {
    let door = Door::open();
    let mut manager = door.greeted(1);
    let status = framed(&Request::Status);
    let start = Instant::now();
    // Asks until the door, which waits for us to read, takes no more; then it is silent.
    while start.elapsed() < Duration::from_secs(1) {
        if manager.raw.send_nowait(&status).expect("open").is_none() {
            manager.raw.wait(false, true, Some(Duration::from_millis(50))).expect("waits");
        }
    }
    thread::sleep(CONTROL_SEND_TIMEOUT + PORT_LOOK * 2);
    manager.greet(2);
    assert_eq!(manager.ask(&Request::Switch), Reply::Ok);
}

#[test]
fn a_line_that_echoes_asks_for_nothing() {
    let door = Door::open();
    let manager = door.plug(LocalModes::ECHO);
    let mut manager = Manager {
        link: Link::over_port(Port::from_fd(manager.try_clone().expect("a second one"))),
        raw: Port::from_fd(manager),
    };
    for session in 1..5 {
        manager.greet(session);
        manager.send(&Request::Follow);
        // A refusal; what comes back of it must not be a claim.
        let _ = manager.link.receive::<Reply>(Some(Instant::now() + WAIT));
    }
    manager.greet(9);
    assert!(door.desk.calls().is_empty(), "{:?}", door.desk.calls());
}

#[test]
fn a_closed_port_costs_next_to_nothing() {
    let door = Door::open();
    drop(door.greeted(1));
    let cpu_ns = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/schedstat", door.thread)).expect("its times");
        stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number")
    };
    let before = cpu_ns();
    thread::sleep(PORT_LOOK * 8);
    let spent = Duration::from_nanos(cpu_ns() - before);
    assert!(spent < Duration::from_millis(50), "{spent:?} of {:?}", PORT_LOOK * 8);
    // And it is still there.
    door.greeted(2);
}

#[test]
fn a_port_that_is_gone_is_let_go() {
    // What no port says: the descriptor of a folder cannot be read.
    let folder = rustix::fs::open("/", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("opens");
    let error = attend(Port::from_fd(folder), &FakeDesk::default());
    assert!(error.raw_os_error().is_some(), "{error}");
}
