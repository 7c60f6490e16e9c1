//! `serve --vmm hook:PROGRAM` with a VMM that stands in for a real one: it writes stamps through the guest door, stops,
//! saves what it remembers as its state, loads that at the other host, and goes on. And each way in which a hook fails.
//!
//! A VMM is a thread here, and the program is tests/it/hook.py, which tells it each point.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use blockferry::nbd::client::{Client, Wants};
use tempfile::TempDir;

use crate::harness::{peer, scratch, until_within};
use crate::host::{Finished, Host, PATIENCE};
use crate::relay::{Kind, Relay, message};

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;
const NAMES: [&str; 2] = ["a", "b"];

/// What a VMM does wrong at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The hook ends with this code.
    Exit(i32),
    /// It never answers.
    Hang,
    /// It ends in the middle of its state.
    DieMidState,
    /// It writes before it may.
    RunEarly,
}

/// A VMM.
struct Vmm {
    door: blockferry::address::Address,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    runs: bool,
    /// What the guest remembers: for each block the number of its last acknowledged write.
    memory: Vec<u32>,
    writes: u32,
    /// Nobody needs it any more.
    over: bool,
    /// A write that was refused.
    refused: Option<String>,
    faults: HashMap<String, Fault>,
    /// What the hook was called with.
    calls: Vec<String>,
}

impl Vmm {
    /// A VMM without a guest, whose hook is at `folder/NAME.hook`.
    fn start(folder: &Path, name: &str) -> Arc<Self> {
        let socket = folder.join(format!("{name}.vmm"));
        let listener = UnixListener::bind(&socket).expect("a socket");
        let hook = folder.join(format!("{name}.hook"));
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/hook.py");
        let script = format!("#!/bin/sh\nexec python3 {} {} \"$1\"\n", program.display(), socket.display());
        std::fs::write(&hook, script).expect("written");
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let door = format!("unix://{}", folder.join(format!("{name}.nbd")).display());
        let door = blockferry::address::Address::parse(&door).expect("an address");
        let vmm = Arc::new(Self { door, inner: Mutex::default(), changed: Condvar::new() });
        let (hooks, writer) = (Arc::clone(&vmm), Arc::clone(&vmm));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let vmm = Arc::clone(&hooks);
                thread::spawn(move || vmm.answer(&stream));
            }
        });
        thread::spawn(move || writer.write());
        vmm
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic")
    }

    fn open(&self) -> Result<Client, String> {
        let socket = self.door.connect(PATIENCE).map_err(|error| error.to_string())?;
        Client::connect(Arc::new(socket), "vda", Wants::default()).map_err(|error| error.to_string())
    }

    fn set_running(&self, runs: bool) {
        self.lock().runs = runs;
        self.changed.notify_all();
    }

    /// The guest: writes while it runs. A write that is under way is finished before anybody else has the lock.
    fn write(&self) {
        let mut client = None;
        loop {
            let mut inner = self.lock();
            if !inner.runs {
                client = None;
                inner = self.changed.wait_while(inner, |inner| !inner.runs && !inner.over).expect("no panic");
            }
            if inner.over {
                return;
            }
            let (number, block) = (inner.writes + 1, place(inner.writes + 1));
            let written = match client.take().map_or_else(|| self.open(), Ok) {
                Ok(mut open) => {
                    let written = open.write_all((block * BLOCK) as u64, &stamp(block, number));
                    client = Some(open);
                    written.map_err(|error| error.to_string())
                }
                Err(cause) => Err(cause),
            };
            match written {
                Ok(()) => (inner.memory[block], inner.writes) = (number, number),
                Err(cause) => (inner.refused, inner.runs) = (Some(cause), false),
            }
            let limit = Duration::from_millis(1);
            drop(self.changed.wait_timeout(inner, limit).expect("no panic"));
        }
    }

    /// A call of the hook.
    fn answer(&self, mut stream: &UnixStream) {
        let mut input = BufReader::new(stream);
        let mut line = String::new();
        input.read_line(&mut line).expect("a line");
        let point = line.split_whitespace().next().unwrap_or_default().to_owned();
        let mut state = Vec::new();
        input.read_to_end(&mut state).expect("its state");
        self.lock().calls.push(line.trim().to_owned());
        let fault = self.lock().faults.get(&point).copied();
        match fault {
            Some(Fault::Exit(code)) => {
                let _ = stream.write_all(format!("{code} 0\n").as_bytes());
                return;
            }
            // Until the hook is killed: the other end closes.
            Some(Fault::Hang) => {
                stream.set_read_timeout(Some(PATIENCE)).expect("a time");
                let mut inner = self.lock();
                while inner.faults.get(&point) == Some(&Fault::Hang) {
                    inner = self.changed.wait(inner).expect("no panic");
                }
                return;
            }
            Some(Fault::RunEarly) => {
                let early = self
                    .open()
                    .and_then(|mut client| client.write_all(0, &stamp(0, u32::MAX)).map_err(|error| error.to_string()));
                early.expect_err("this host does not own");
            }
            _ => {}
        }
        let mut out = Vec::new();
        match point.as_str() {
            "stop" => self.set_running(false),
            "state-out" => out = self.lock().memory.iter().flat_map(|number| number.to_le_bytes()).collect(),
            "state-in" => {
                let numbers = state.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four")));
                let mut inner = self.lock();
                inner.memory = numbers.collect();
                inner.writes = inner.memory.iter().copied().max().unwrap_or_default();
            }
            "run" => self.set_running(!line.contains(" destination 0 ")),
            "abort" if line.contains(" source 1 ") => self.set_running(true),
            "abort" | "gone" => self.set_running(false),
            _ => {}
        }
        let _ = stream.write_all(format!("0 {}\n", out.len()).as_bytes());
        let half = if fault == Some(Fault::DieMidState) { out.len() / 2 } else { out.len() };
        let _ = stream.write_all(&out[..half]);
    }

    /// Waits until the guest has written so much more.
    fn writes_on(&self, more: u32) {
        let wanted = self.lock().writes + more;
        until_within(PATIENCE, "more writes", || {
            let inner = self.lock();
            assert_eq!(inner.refused, None, "the guest's write was refused");
            (inner.writes >= wanted).then_some(())
        });
    }

    /// The guest stands still, and its disk holds what it remembers.
    fn check(&self) {
        self.set_running(false);
        let inner = self.lock();
        let mut client = self.open().expect("it is served");
        let mut content = vec![0; BLOCK];
        for (block, number) in inner.memory.iter().enumerate() {
            client.read_exact((block * BLOCK) as u64, &mut content).expect("readable");
            let expected = if *number == 0 { vec![0; BLOCK] } else { stamp(block, *number) };
            assert!(content == expected, "block {block} does not hold write {number}");
        }
    }

    fn calls(&self) -> Vec<String> {
        let points = |call: &String| call.split(' ').next().unwrap_or_default().to_owned();
        self.lock().calls.drain(..).map(|call| points(&call)).collect()
    }

    fn fail(&self, point: &str, fault: Fault) {
        self.lock().faults.insert(point.to_owned(), fault);
    }

    fn heal(&self) {
        self.lock().faults.clear();
        self.changed.notify_all();
    }
}

fn place(number: u32) -> usize {
    number.wrapping_mul(0x9e37_79b9) as usize % BLOCKS
}

fn stamp(block: usize, number: u32) -> Vec<u8> {
    format!("block {block:09} write {number:010} ").bytes().cycle().take(BLOCK).collect()
}

/// Two hosts, two VMMs, and a guest in the first.
struct Pair {
    vmms: [Arc<Vmm>; 2],
    hosts: [Host; 2],
    _folder: TempDir,
}

impl Pair {
    fn new() -> Option<Self> {
        peer("python3")?;
        let folder = scratch();
        let vmms = NAMES.map(|name| Vmm::start(folder.path(), name));
        let hosts = NAMES.map(|name| {
            let disk = format!("vda,file={},size=8M", folder.path().join(format!("{name}.img")).display());
            let hook = format!("hook:{}", folder.path().join(format!("{name}.hook")).display());
            Host::start_with(folder.path(), name, "g1", &["--disk", &disk, "--vmm", &hook])
        });
        hosts[0].ask(&["claim"]).well();
        vmms[0].lock().memory = vec![0; BLOCKS];
        vmms[0].set_running(true);
        vmms[0].writes_on(50);
        Some(Self { vmms, hosts, _folder: folder })
    }

    fn migrate(&self, from: usize) -> Finished {
        self.hosts[from].migrate(&self.hosts[1 - from].listen, &["--overwrite"])
    }

    /// The guest lives at `side` and has lost nothing.
    fn lives(&self, side: usize) {
        self.vmms[side].writes_on(20);
        self.vmms[side].check();
        assert!(!self.vmms[1 - side].lock().runs, "the other one runs");
        self.vmms[side].set_running(true);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for vmm in &self.vmms {
            if let Ok(mut inner) = vmm.inner.lock() {
                inner.over = true;
                inner.faults.clear();
            }
            vmm.changed.notify_all();
        }
    }
}

#[test]
fn a_guest_in_any_vmm_moves_there_and_back() {
    let Some(pair) = Pair::new() else { return };
    for from in [0, 1] {
        let done = pair.migrate(from).well();
        pair.lives(1 - from);
        assert_eq!([pair.hosts[from].state(), pair.hosts[1 - from].state()], ["given", "owner"], "{done}");
        let calls = pair.vmms[1 - from].lock().calls.clone();
        assert!(calls.iter().all(|call| call.starts_with("ready g1") || call.contains(" g1 destination 1 vda ")));
        assert!(
            calls.iter().all(|call| call.contains(" unix://") && !call.contains(":0")),
            "real addresses: {calls:?}"
        );
        assert_eq!(pair.vmms[from].calls(), ["ready", "ready", "stop", "state-out", "gone"]);
        assert_eq!(pair.vmms[1 - from].calls(), ["ready", "state-in", "run"]);
    }
}

#[test]
fn a_guest_that_its_user_paused_stays_paused() {
    let Some(pair) = Pair::new() else { return };
    pair.vmms[0].set_running(false);
    pair.vmms[0].fail("ready", Fault::Exit(3));
    pair.migrate(0).well();
    let calls = pair.vmms[1].lock().calls.clone();
    assert!(calls.last().is_some_and(|call| call.starts_with("run g1 destination 0 ")), "{calls:?}");
    assert!(!pair.vmms[1].lock().runs, "it was paused");
    assert_eq!(pair.hosts[1].state(), "owner");
    pair.vmms[1].check();
}

/// A guest that its user pauses while its disks are copied, and one that goes on meanwhile.
#[test]
fn a_guest_that_is_paused_or_goes_on_meanwhile_is_at_the_destination_as_it_was_last() {
    for paused in [true, false] {
        let Some(pair) = Pair::new() else { return };
        let told = |pair: &Pair, paused: bool| {
            pair.vmms[0].set_running(!paused);
            pair.vmms[0].heal();
            if paused {
                pair.vmms[0].fail("ready", Fault::Exit(3));
            }
        };
        told(&pair, !paused);
        let migration = pair.hosts[0].start_migrate(&pair.hosts[1].listen, &["--hold"]);
        migration.until_held();
        told(&pair, paused);
        pair.hosts[0].ask(&["switch"]).well();
        migration.wait().well();
        assert_eq!(pair.vmms[1].lock().runs, !paused);
        assert!(!pair.vmms[0].lock().runs, "two guests run");
        pair.vmms[1].check();
    }
}

/// The connection of the state ends early, and looks as if the state had ended: who reads it cannot know.
#[test]
fn a_state_that_was_cut_off_is_not_taken_for_a_whole_one() {
    let Some(pair) = Pair::new() else { return };
    let relay = Relay::to(&pair.hosts[1].listen);
    let hold = Arc::new(relay);
    let late = Arc::clone(&hold);
    hold.on(message::STATE_READY, true, move || late.hoard_kind(Kind::State));
    let migration = pair.hosts[0].start_migrate(&hold.address, &["--overwrite"]);
    until_within(PATIENCE, "all of the state", || (hold.hoarded() >= 4 * BLOCKS).then_some(()));
    assert!(hold.cut_one(Some(Kind::State), 0));
    let ended = migration.wait();
    ended.aborted();
    let cause = ended.done().get("cause").text().to_owned();
    assert!(cause.contains(&format!("of {} bytes of the guest's state came", 4 * BLOCKS)), "{cause}");
    assert_eq!(pair.hosts[0].state(), "owner");
    assert!(!pair.vmms[1].calls().contains(&"run".to_owned()));
    pair.lives(0);
    pair.migrate(0).well();
    pair.lives(1);
}

#[test]
fn each_failure_before_the_hand_over_leaves_the_guest_where_it_was() {
    let Some(pair) = Pair::new() else { return };
    let cases = [
        (0, "ready", Fault::Exit(1), 1, "hook ready: exit status: 1: told to fail at ready"),
        (1, "ready", Fault::Exit(3), 1, "hook ready: exit status: 3: told to fail at ready"),
        (0, "stop", Fault::Exit(1), 3, "hook stop: exit status: 1: told to fail at stop"),
        (0, "stop", Fault::Hang, 3, "hook stop: did not end in time and was killed"),
        (0, "state-out", Fault::Exit(2), 3, "hook state-out: exit status: 2: told to fail at state-out"),
        (0, "state-out", Fault::DieMidState, 3, "hook state-out: exit status: 1: the VMM died"),
        (1, "state-in", Fault::Exit(4), 3, "hook state-in: exit status: 4: told to fail at state-in"),
        (1, "state-in", Fault::RunEarly, 3, "wr"),
    ];
    for (side, point, fault, code, cause) in cases {
        pair.vmms[side].fail(point, fault);
        let ended = pair.migrate(0);
        pair.vmms[side].heal();
        assert_eq!(ended.code, Some(code), "{point} {fault:?}: {ended:?}");
        assert!(ended.stderr.contains(cause), "{point} {fault:?}: {ended:?}");
        assert_eq!(pair.hosts[0].state(), "owner", "{point} {fault:?}");
        pair.lives(0);
        let calls = pair.vmms[0].calls();
        assert_eq!(calls.contains(&"abort".to_owned()), code == 3, "{point} {fault:?}: {calls:?}");
        let there = pair.vmms[1].calls();
        assert!(!there.contains(&"run".to_owned()), "{point} {fault:?}: {there:?}");
        assert_eq!(there.contains(&"abort".to_owned()), code == 3, "{point} {fault:?}: {there:?}");
    }
    pair.migrate(0).well();
    pair.lives(1);
}

/// A hook may ask how its guest is, and so may a manager: nobody waits for the hook then.
#[test]
fn a_host_answers_while_a_hook_takes_its_time() {
    let Some(pair) = Pair::new() else { return };
    pair.vmms[1].fail("run", Fault::Hang);
    let migration = pair.hosts[0].start_migrate(&pair.hosts[1].listen, &[]);
    let runs = || pair.vmms[1].lock().calls.iter().any(|call| call.starts_with("run ")).then_some(());
    until_within(PATIENCE, "the hook's run", runs);
    let began = Instant::now();
    let said = pair.hosts[1].ask(&["status"]).well();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(said.contains("owner"), "{said}");
    assert_eq!(migration.wait().code, Some(4), "it was killed");
    pair.vmms[1].heal();
}

#[test]
fn a_guest_that_does_not_run_at_its_new_owner_is_said_so() {
    let Some(pair) = Pair::new() else { return };
    pair.vmms[1].fail("run", Fault::Exit(1));
    let ended = pair.migrate(0);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(ended.stderr.contains("hook run: exit status: 1"), "{ended:?}");
    assert_eq!([pair.hosts[0].state(), pair.hosts[1].state()], ["given", "owner"]);
    let there = pair.hosts[1].ask(&["status"]).well();
    assert!(there.contains("the guest was not let run here: hook run: exit status: 1"), "{there}");
    assert!(!pair.vmms[0].lock().runs, "it does not own any more");
    pair.vmms[1].check();
}
