//! Who owns a guest, through everything that ends processes: two `serve`s of the built program on loopback, a relay
//! between them that loses what the test says, `kill -9`, and the commands that an operator would type.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use blockferry::address::Address;
use blockferry::nbd::client::{Client, Wants};

use crate::harness::{DEADLINE, Program, free_port, scratch, until};

const SIZE: u64 = 4 << 20;
/// Messages of the phase protocol, by their numbers.
const SEAL: u8 = 5;
const SEALED: u8 = 6;
const GO: u8 = 7;

fn blockferry() -> Command {
    let built = env!("CARGO_BIN_EXE_blockferry").into();
    Command::new(std::env::var_os("BLOCKFERRY_BIN").unwrap_or(built))
}

/// What a command said, and how it ended.
#[derive(Debug)]
struct Said {
    exit: i32,
    out: String,
    err: String,
}

fn run(command: &mut Command) -> Said {
    let output = command.output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Said { exit: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

impl Said {
    #[track_caller]
    fn ends(self, exit: i32) -> Self {
        assert_eq!(self.exit, exit, "{self:?}");
        self
    }

    #[track_caller]
    fn says(self, words: &str) -> Self {
        assert!(self.out.contains(words) || self.err.contains(words), "not \"{words}\": {self:?}");
        self
    }
}

/// One host: its image, its state directory and, while it runs, its process.
struct Host {
    name: &'static str,
    folder: PathBuf,
    state: PathBuf,
    /// The migration door; `None`: it has none, and nobody can dial it.
    port: Option<u16>,
    disk: String,
    program: Option<Program>,
}

impl Host {
    /// A host that is not running yet. Its image is made by `serve`, or by the test.
    fn new(folder: &Path, name: &'static str) -> Self {
        let state = folder.join(name).join("state");
        fs::create_dir(folder.join(name)).expect("a folder");
        let folder = folder.join(name);
        let disk = format!("vda,file={},size={SIZE}", folder.join("disk.raw").display());
        Self { name, folder, state, port: None, disk, program: None }
    }

    fn listening(self) -> Self {
        Self { port: Some(free_port()), ..self }
    }

    fn address(&self) -> String {
        format!("tcp://127.0.0.1:{}", self.port.expect("it listens"))
    }

    fn image(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    fn unix(&self, what: &str) -> String {
        format!("unix://{}", self.folder.join(what).display())
    }

    fn serve(&self) -> Command {
        let mut command = blockferry();
        command.args(["serve", "g1", "--disk", &self.disk, "--volatile-state", "--state"]).arg(&self.state);
        command.args(["--nbd", &self.unix("nbd"), "--control", &self.unix("control")]);
        if self.port.is_some() {
            command.args(["--listen", &self.address()]);
        }
        let log = File::options().create(true).append(true).open(self.folder.join("log")).expect("a log");
        command.env("BLOCKFERRY_LOG", "debug").stderr(log);
        command
    }

    /// Starts it, and returns the ready line.
    fn start(&mut self) -> String {
        let (program, ready) = Program::start_until_line(&mut self.serve(), ": ready: ");
        self.program = Some(program);
        ready
    }

    /// As a power cut would.
    fn kill(&mut self) {
        self.program.take().expect("it runs").kill();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = blockferry();
        command.args([words[0], "g1"]).args(&words[1..]).args(["--control", &self.unix("control")]);
        command
    }

    fn ask(&self, words: &[&str]) -> Said {
        run(&mut self.command(words))
    }

    fn who_owns(&self) -> Said {
        run(self.command(&["who-owns"]).arg("--state").arg(&self.state))
    }

    /// Waits until `who-owns` ends so.
    #[track_caller]
    fn until_owner(&self, exit: i32) -> Said {
        until(&format!("exit {exit} of who-owns on {}", self.name), || {
            let said = self.who_owns();
            (said.exit == exit).then_some(said)
        })
    }

    /// Waits until the record has this state.
    #[track_caller]
    fn until_state(&self, state: &str) {
        until(&format!("state {state} of {}", self.name), || {
            let said = self.ask(&["status", "--json"]);
            said.out.contains(&format!("\"state\":\"{state}\"")).then_some(())
        });
    }

    fn open(&self) -> Result<Client, String> {
        let door = Address::parse(&self.unix("nbd")).expect("an address");
        let socket = Arc::new(door.connect(DEADLINE).expect("its door"));
        Client::connect(socket, "vda", Wants::default()).map_err(|error| error.to_string())
    }

    /// What the guest is told that writes one sector.
    fn write(&self, byte: u8) -> Result<(), String> {
        self.open()?.write_all(0, &[byte; 512]).map_err(|error| error.to_string())
    }

    fn first_byte(&self) -> u8 {
        let mut byte = [0];
        File::open(self.image()).expect("an image").read_exact_at(&mut byte, 0).expect("read");
        byte[0]
    }
}

/// What becomes of a message of the phase protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Passes,
    /// It is lost, and with it every connection; nobody gets through until the link is healed.
    Cut,
}

/// A link between two hosts.
struct Relay {
    port: u16,
    link: Arc<Link>,
}

struct Link {
    target: u16,
    is_cut: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    fate: Box<dyn Fn(u8) -> Fate + Send + Sync>,
}

impl Relay {
    /// `fate` decides what becomes of a message, by its number.
    fn start(target: u16, fate: impl Fn(u8) -> Fate + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let link = Link { target, is_cut: AtomicBool::new(false), open: Mutex::default(), fate: Box::new(fate) };
        let link = Arc::new(link);
        let ours = Arc::clone(&link);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if ours.is_cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(there) = TcpStream::connect(("127.0.0.1", ours.target)) else { continue };
                for (from, to) in [(&stream, &there), (&there, &stream)] {
                    let _ = from.set_nodelay(true);
                    let clone = |stream: &TcpStream| stream.try_clone().expect("a clone");
                    let (from, to, link) = (clone(from), clone(to), Arc::clone(&ours));
                    ours.open.lock().expect("no panic").push(clone(&from));
                    thread::spawn(move || link.carry(from, to));
                }
            }
        });
        Self { port, link }
    }

    fn address(&self) -> String {
        format!("tcp://127.0.0.1:{}", self.port)
    }

    fn heal(&self) {
        self.link.is_cut.store(false, Ordering::SeqCst);
    }
}

impl Link {
    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 256 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes = &buffer[..count];
            if messages(bytes).iter().any(|number| (self.fate)(*number) == Fate::Cut) {
                self.is_cut.store(true, Ordering::SeqCst);
                for stream in self.open.lock().expect("no panic").drain(..) {
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
            if self.is_cut.load(Ordering::SeqCst) || to.write_all(bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}

/// The numbers of the messages that `bytes` are, if they are whole frames and nothing else.
fn messages(mut bytes: &[u8]) -> Vec<u8> {
    let mut numbers = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*head) as usize;
        let (Some(number), Some(next)) = (rest.first(), rest.get(length..)) else { return Vec::new() };
        numbers.push(*number);
        bytes = next;
    }
    if bytes.is_empty() { numbers } else { Vec::new() }
}

/// Loses the first message of this number, and with it the link.
fn loses(number: u8) -> impl Fn(u8) -> Fate + Send + Sync {
    let sprung = AtomicBool::new(false);
    move |seen| if seen == number && !sprung.swap(true, Ordering::SeqCst) { Fate::Cut } else { Fate::Passes }
}

/// A owns and has one sector of ones; B waits to receive; nobody can dial A.
fn two(folder: &Path) -> (Host, Host) {
    let mut a = Host::new(folder, "a");
    let mut b = Host::new(folder, "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    a.write(1).expect("written");
    b.start();
    (a, b)
}

/// Starts a migration and returns its end.
fn migrate(from: &Host, to: &str) -> thread::JoinHandle<Said> {
    let mut command = from.command(&["migrate", to]);
    thread::spawn(move || run(&mut command))
}

#[test]
fn a_claim_outlives_kill_9_and_is_made_once() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    a.who_owns().ends(5).says("nobody serves it on this host");
    assert!(a.start().contains(": ready: incoming order=0.0"));
    a.who_owns().ends(5).says("blockferry claim g1");
    assert!(a.write(1).is_err(), "nobody owns it");
    a.ask(&["claim"]).ends(0);
    a.write(7).expect("written");
    a.kill();
    a.who_owns().ends(0).says("next: nobody serves it now: blockferry serve g1");
    assert!(a.start().contains(": ready: owner order=1.1"));
    a.who_owns().ends(0).says("g1: here: this host owns the guest (order 1.1)");
    a.ask(&["who-owns", "--json"]).ends(0).says("\"owner\":\"here\",\"state\":\"owner\",\"term\":1,\"generation\":1,");
    a.write(8).expect("written");
    // SIGTERM is as safe as a crash.
    let mut program = a.program.take().expect("it runs");
    run(Command::new("kill").arg(program.id().to_string())).ends(0);
    assert!(!program.wait().success());
    assert!(a.start().contains(": ready: owner order=1.1"));
    a.ask(&["claim"]).ends(1).says("ownership is claimed once, where there is no record");
    a.ask(&["recover"]).ends(0).says("g1: owner: this host owns the guest");
    a.ask(&["recover", "--take-ownership"]).ends(1).says("there is nothing to take");
}

#[test]
fn one_process_at_a_time_has_the_state_directory() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    a.start();
    let mut second = Host::new(dir.path(), "second");
    second.state = a.state.clone();
    let refused = run(second.serve().stderr(std::process::Stdio::piped())).ends(1);
    let cause = "in use: another process serves the guest from it";
    assert_eq!(refused.err, format!("blockferry: state: {}: {cause}\n", a.state.display()));
    assert!(!second.image().exists(), "nothing was made");
}

#[test]
fn a_record_that_would_be_lost_is_refused() {
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("SKIP: no /dev/shm") };
    let dir = scratch();
    let a = Host::new(dir.path(), "a");
    let mut serve = blockferry();
    serve.args(["serve", "g1", "--disk", &a.disk, "--state"]).arg(memory.path());
    serve.args(["--nbd", &a.unix("nbd"), "--control", &a.unix("control")]);
    run(&mut serve)
        .ends(1)
        .says("is on a tmpfs: a record there is lost with the host's power")
        .says("--volatile-state");
}

#[test]
fn a_broken_record_owns_nothing_until_it_is_thrown_away() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    a.start();
    a.ask(&["claim"]).ends(0);
    a.kill();
    let record = a.state.join("record");
    let mut bytes = fs::read(&record).expect("a record");
    bytes[20] ^= 1;
    fs::write(&record, &bytes).expect("written");
    a.who_owns().ends(5).says("the record here is broken: its checksum is wrong");
    let ready = a.start();
    assert!(ready.contains(": ready: incoming order=0.0") && ready.contains("--discard-record"), "{ready}");
    assert!(a.write(1).is_err());
    a.ask(&["claim"]).ends(1).says("is broken: its checksum is wrong; --discard-record shows it");
    assert_eq!(fs::read(&record).expect("there"), bytes, "not touched");
    let said = a.ask(&["claim", "--discard-record"]).ends(0);
    assert!(said.out.starts_with("g1: not known: this host owns nothing: the record here is broken"), "{said:?}");
    assert!(said.out.ends_with("g1: this host owns the guest's disks\n"), "{said:?}");
    a.write(2).expect("written");
}

#[test]
fn a_record_of_other_images_or_of_another_directory_owns_nothing() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    a.start();
    a.ask(&["claim"]).ends(0);
    a.kill();
    // A backup in the place of the image, as most tools restore it.
    fs::copy(a.image(), a.folder.join("backup")).expect("copied");
    let kept = a.folder.join("kept");
    fs::rename(a.image(), &kept).expect("moved");
    let missing = run(a.serve().stderr(std::process::Stdio::piped())).ends(1);
    assert!(missing.err.contains("no such file, and the record speaks of it"), "{missing:?}");
    fs::rename(a.folder.join("backup"), a.image()).expect("moved");
    assert!(a.start().contains(": ready: incoming"));
    a.who_owns().ends(5).says("is of other images: disk vda is another image than the record speaks of");
    a.ask(&["status"]).ends(0).says("--discard-record");
    a.kill();
    // The image itself, grown, and with a disk beside it that the record does not know.
    fs::rename(&kept, a.image()).expect("moved");
    File::options().write(true).open(a.image()).expect("an image").set_len(2 * SIZE).expect("grown");
    a.disk = format!("vda,file={}", a.image().display());
    let (mut program, ready) = Program::start_until_line(
        a.serve().args(["--disk", &format!("vdb,file={},size=1M", a.folder.join("vdb").display())]),
        ": ready: ",
    );
    assert!(ready.contains(": ready: owner order=1.1"), "{ready}");
    program.kill();
    // The record in another state directory.
    let mut b = Host::new(dir.path(), "b");
    b.start();
    b.kill();
    fs::copy(a.state.join("record"), b.state.join("record")).expect("copied");
    assert!(b.start().contains(": ready: incoming"));
    b.who_owns().ends(5).says("is of another machine or directory");
    b.ask(&["recover", "--forget"]).ends(0).says("thrown away");
    b.ask(&["claim"]).ends(0);
}

#[test]
fn a_guest_that_moved_is_refused_at_home_by_the_name_of_its_new_host_and_can_come_back() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a").listening();
    let mut b = Host::new(dir.path(), "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    a.write(1).expect("written");
    b.start();
    a.ask(&["migrate", &b.address()]).ends(0);
    b.who_owns().ends(0).says("this host owns the guest (order 1.2)");
    a.who_owns().ends(4).says(&format!("at {}, where it arrived", b.address()));
    a.ask(&["recover"]).ends(4).says("its record says owner (order 1.2)").says("blockferry who-owns g1");
    a.ask(&["recover", "--take-ownership"]).ends(1).says("the other host answers, and what it says decides");
    let refused = a.write(2).expect_err("given away");
    assert!(refused.contains("this host gave the guest to host") && refused.contains(&b.address()), "{refused}");
    b.write(3).expect("served");
    for host in [&mut a, &mut b] {
        host.kill();
    }
    a.who_owns().ends(4);
    b.who_owns().ends(0);
    assert!(a.start().contains(": ready: given order=1.1"));
    assert!(b.start().contains(": ready: owner order=1.2"));
    assert!(a.write(2).is_err());
    b.write(4).expect("served");
    b.ask(&["migrate", &a.address(), "--overwrite"]).ends(0);
    a.who_owns().ends(0).says("order 1.3");
    b.who_owns().ends(4);
    a.write(5).expect("served");
    assert_eq!((a.first_byte(), b.first_byte()), (5, 4));
    // The record, the id, the lock, and the receipt, which nobody waits for.
    until("nothing temporary is left", || {
        let names = fs::read_dir(&a.state).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let names: Vec<_> = names.map(|name| name.into_string().expect("text")).collect();
        (names.len() == 4 && !names.iter().any(|name| name.ends_with(".tmp"))).then_some(())
    });
}

#[test]
fn go_is_repeated_by_itself_also_after_the_sources_restart() {
    let dir = scratch();
    let (mut a, mut b) = two(dir.path());
    let relay = Relay::start(b.port.expect("it listens"), loses(GO));
    let migrating = migrate(&a, &relay.address());
    a.until_state("given");
    a.kill();
    // The process that knew is gone: so says the command.
    migrating.join().expect("no panic").ends(5);
    a.who_owns().ends(5).says("which has not answered yet").says("next: blockferry recover g1");
    assert!(a.start().contains(": ready: given order=1.1"));
    let refused = a.write(2).expect_err("given away");
    assert!(refused.contains(&format!("at {}, which has not answered yet", relay.address())), "{refused}");
    a.ask(&["recover"]).ends(5).says("no answer").says("only if that host is gone for good").says("--take-ownership");
    a.ask(&["recover", "--forget"]).ends(1).says("forgetting could leave the guest without an owner");
    // M2: sealed outlives the link, and a restart.
    b.who_owns().ends(5).says("this host is sealed and waits for the word of host");
    b.kill();
    assert!(b.start().contains(": ready: sealed"));
    assert!(b.write(2).is_err());
    b.ask(&["recover"]).ends(5).says("no answer: it cannot be dialled from here");
    relay.heal();
    b.until_owner(0).says("order 1.2");
    a.until_owner(4).says("where it arrived");
    b.write(3).expect("served");
    assert_eq!(a.first_byte(), 1);
}

#[test]
fn a_give_that_is_not_answered_exits_5_and_arrives_when_the_link_is_back() {
    let dir = scratch();
    let (a, b) = two(dir.path());
    let relay = Relay::start(b.port.expect("it listens"), loses(GO));
    let said = migrate(&a, &relay.address()).join().expect("no panic").ends(5);
    said.says("given away, and the destination has not answered yet").says("who owns the guest is not known from here");
    a.who_owns().ends(5);
    b.who_owns().ends(5);
    relay.heal();
    b.until_owner(0);
    a.until_owner(4);
}

#[test]
fn a_sealed_host_asks_by_itself_when_nobody_can_dial_it() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a").listening();
    let mut b = Host::new(dir.path(), "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    b.start();
    let relay = Relay::start(b.port.expect("it listens"), loses(GO));
    let migrating = migrate(&a, &relay.address());
    a.until_state("given");
    // From A to B there is no way any more; from B to A there is.
    b.kill();
    b.start();
    b.until_owner(0);
    a.until_owner(4);
    migrating.join().expect("no panic").ends(0);
}

#[test]
fn an_offer_after_a_restart_keeps_the_door_shut_until_the_peer_says_unsealed() {
    let dir = scratch();
    let (mut a, mut b) = two(dir.path());
    let relay = Relay::start(b.port.expect("it listens"), loses(SEALED));
    let migrating = migrate(&a, &relay.address());
    b.until_state("sealed");
    a.kill();
    migrating.join().expect("no panic").ends(5);
    a.who_owns().ends(5).says("waits for the word of host");
    assert!(a.start().contains(": ready: offered order=1.1"));
    let refused = a.write(2).expect_err("nobody knows");
    let door = "this host offered the guest (order 1.1) and waits for the word of host";
    assert!(refused.contains(door) && refused.contains(&relay.address()), "{refused}");
    a.ask(&["status"]).ends(0).says("closed").says("next: blockferry recover g1");
    a.ask(&["recover"]).ends(5).says("--forget-peer");
    relay.heal();
    a.until_owner(0);
    a.write(3).expect("served again");
    b.until_state("incoming");
    b.ask(&["claim"]).ends(1);
    // M6: the host that gave up can receive again.
    b.kill();
    assert!(b.start().contains(": ready: incoming order=1.1"));
    a.ask(&["migrate", &b.address(), "--overwrite"]).ends(0);
    b.who_owns().ends(0);
    assert_eq!(b.first_byte(), 3);
}

#[test]
fn an_offer_whose_peer_is_gone_is_settled_by_the_operator() {
    let dir = scratch();
    let (mut a, mut b) = two(dir.path());
    let relay = Relay::start(b.port.expect("it listens"), loses(SEALED));
    let migrating = migrate(&a, &relay.address());
    b.until_state("sealed");
    a.kill();
    migrating.join().expect("no panic");
    b.kill();
    a.start();
    let said = a.ask(&["recover", "--forget-peer"]).ends(0).says("this host owns the guest").says("never take: host");
    assert!(said.out.contains("no answer"), "{said:?}");
    a.write(2).expect("served");
    a.who_owns().ends(0).says("order 1.1");
}

#[test]
fn a_sealed_host_that_is_taken_by_hand_overrules_its_source_when_they_meet() {
    let dir = scratch();
    let (mut a, b) = two(dir.path());
    let relay = Relay::start(b.port.expect("it listens"), loses(SEALED));
    let migrating = migrate(&a, &relay.address());
    b.until_state("sealed");
    a.kill();
    migrating.join().expect("no panic");
    b.ask(&["recover", "--forget-peer"]).ends(1).says("there is no offer to another host");
    let said = b.ask(&["recover", "--take-ownership"]).ends(0).says("this host owns the guest from now on");
    let said = said.says("the guest may lose: what the guest wrote on host");
    said.says("never take: host").says("there are two owners until the two hosts meet");
    b.who_owns().ends(0).says("order 2.1");
    b.write(9).expect("served");
    relay.heal();
    a.start();
    a.until_owner(4).says("overruled this host (order 2.1)");
    let refused = a.write(2).expect_err("overruled");
    assert!(refused.contains("overruled this host"), "{refused}");
    a.ask(&["recover", "--take-ownership"]).ends(1).says("its record says owner (order 2.1)");
}

#[test]
fn a_reception_that_died_with_its_process_is_void_until_it_is_forgotten() {
    let dir = scratch();
    let (a, mut b) = two(dir.path());
    let mut command = a.command(&["migrate", &b.address(), "--hold"]);
    let migrating = thread::spawn(move || run(&mut command));
    b.until_state("receiving");
    b.who_owns().ends(4).says("owns the guest (order 1.1) and sends it here");
    b.kill();
    b.start();
    // The source notices that this is another process.
    migrating.join().expect("no panic").ends(3).says("this source still owns and serves the guest");
    a.who_owns().ends(0);
    a.write(4).expect("served");
    b.who_owns().ends(5).says("its disks are half written");
    b.ask(&["claim"]).ends(1);
    b.ask(&["recover", "--take-ownership"]).ends(1).says("there is nothing to take");
    b.ask(&["recover", "--forget", "--json"]).ends(0).says("\"done\":\"what was here is given up\"");
    b.ask(&["claim"]).ends(0);
    b.who_owns().ends(0);
}

/// A small file system for a host's state. Needs root; `None` is a loud skip.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(place: &Path) -> Option<Self> {
        fs::create_dir_all(place).expect("a folder");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(place).output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIP: no small file system: not root, or no mount");
            return None;
        }
        Some(Self(place.to_owned()))
    }

    fn remount(place: &Path, how: &str) {
        let done = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(place).status();
        assert!(done.expect("mount runs").success());
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_state_disk_ends_the_attempt_before_the_guest_waits() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    let Some(_tiny) = Tiny::mount(&a.state) else { return };
    let mut b = Host::new(dir.path(), "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    b.start();
    let mut file = File::create(a.state.join("filler")).expect("created");
    while file.write_all(&[1; 512]).is_ok() {}
    drop(file);
    let said = a.ask(&["migrate", &b.address()]).ends(3).says("this source still owns and serves the guest");
    said.says("the state directory cannot take the next record: No space left on device");
    a.who_owns().ends(0);
    a.write(2).expect("served");
    b.until_state("incoming");
    fs::remove_file(a.state.join("filler")).expect("removed");
    a.ask(&["migrate", &b.address(), "--overwrite"]).ends(0);
}

#[test]
fn a_given_that_is_not_durable_is_unknown_until_it_is_and_then_the_guest_moves_by_itself() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    let Some(_tiny) = Tiny::mount(&a.state) else { return };
    let mut b = Host::new(dir.path(), "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    b.start();
    let state = a.state.clone();
    let relay = Relay::start(b.port.expect("it listens"), move |number| {
        if number == SEALED {
            Tiny::remount(&state, "ro");
        }
        Fate::Passes
    });
    a.ask(&["migrate", &relay.address()]).ends(5).says("the ownership record is not durable: Read-only file system");
    a.who_owns().ends(5).says("who owns is not known until it is");
    assert!(a.write(2).is_err());
    b.who_owns().ends(5).says("sealed");
    a.ask(&["recover"]).ends(5);
    Tiny::remount(&a.state, "rw");
    b.until_owner(0);
    a.until_owner(4);
}

#[test]
fn a_destination_that_cannot_write_when_it_is_to_seal_ends_the_attempt_and_keeps_no_temporary_record() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    let mut b = Host::new(dir.path(), "b").listening();
    let Some(_tiny) = Tiny::mount(&b.state) else { return };
    a.start();
    a.ask(&["claim"]).ends(0);
    b.start();
    let (state, frozen) = (b.state.clone(), Arc::new(AtomicBool::new(false)));
    let freezes = Arc::clone(&frozen);
    let relay = Relay::start(b.port.expect("it listens"), move |number| {
        if number == SEAL && !freezes.swap(true, Ordering::SeqCst) {
            Tiny::remount(&state, "ro");
        }
        Fate::Passes
    });
    // The guest is quiesced: it does not wait for a disk that may never come back.
    let said = a.ask(&["migrate", &relay.address()]).ends(3);
    said.says("the state directory cannot take the journal: Read-only file system");
    a.who_owns().ends(0);
    assert!(a.write(2).is_ok());
    assert!(frozen.load(Ordering::SeqCst));
    Tiny::remount(&b.state, "rw");
    // Its record is written again as soon as that is possible; then the guest moves after all.
    until("a destination that receives again", || (a.ask(&["migrate", &relay.address()]).exit == 0).then_some(()));
    b.until_owner(0);
    let left = fs::read_dir(&b.state).expect("its state").flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().ends_with(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_fails_after_the_destination_owns_exits_4() {
    let dir = scratch();
    let mut a = Host::new(dir.path(), "a");
    let Some(_tiny) = Tiny::mount(&a.state) else { return };
    let mut b = Host::new(dir.path(), "b").listening();
    a.start();
    a.ask(&["claim"]).ends(0);
    b.start();
    let state = a.state.clone();
    let relay = Relay::start(b.port.expect("it listens"), move |number| {
        if number == GO {
            Tiny::remount(&state, "ro");
        }
        Fate::Passes
    });
    let said = a.ask(&["migrate", &relay.address()]).ends(4).says("owns the guest: do not start it here");
    said.says("the ownership record is not durable");
    b.who_owns().ends(0);
    assert!(a.write(2).is_err());
    Tiny::remount(&a.state, "rw");
    a.until_owner(4).says("where it arrived");
}
