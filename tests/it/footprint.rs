//! What the executable costs a host, held to the budgets of `docs/footprint.md`: memory, threads, descriptors, and the
//! system calls that it makes and can do without.
//!
//! `cargo xtask test` runs these as a step of its own, one after the other, with the static executable: another build
//! needs other memory.

mod calls;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blockferry::limits::SLOTS;
use blockferry::nbd::client::{Client, Wants};

use crate::exported::Exported;
use crate::harness::{Program, peer, scratch, throughout, until, until_within};
use crate::host::{Host, PATIENCE, exactly_one_takes, executable, run};
use crate::writer::Ledger;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Resident memory in KiB: idle, and at its highest while migrating a disk of any size.
const IDLE_KIB: u64 = 2 * 1024;
const MIGRATING_KIB: u64 = 16 * 1024;
/// Threads of `serve` with three doors, and of `export` with two.
const SERVE_THREADS: u64 = 6;
const EXPORT_THREADS: u64 = 5;
/// While one disk migrates: those of `serve`, a connection each for phases, digests and data, who writes back, and the
/// workers of the connection with the data, if the disk is slow.
const MIGRATING_THREADS: u64 = SERVE_THREADS + 4 + SLOTS as u64;
/// Descriptors of `serve` with one disk and four doors.
const SERVE_DESCRIPTORS: usize = 14;
/// The disk that migrates: its size and what it holds.
const LARGE: u64 = 64 * GIB;
const DATA: u64 = GIB;

/// Whether this is that step.
fn alone() -> bool {
    let alone = std::env::var_os("BLOCKFERRY_FOOTPRINT").is_some();
    if !alone {
        eprintln!("SKIP: footprint: a step of cargo xtask test, by itself");
    }
    alone
}

/// A number of `/proc/PID/status`: KiB for memory.
fn status(process: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {key} in {text}"))
}

/// What the open descriptors of a process lead to, by kind.
fn descriptors(process: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).expect("it runs").flatten();
    entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string())).collect()
}

/// Asserts a budget, and tells the figure for `docs/footprint.md`.
fn within(what: &str, figure: u64, budget: u64) {
    println!("footprint: {what}: {figure} of at most {budget}");
    assert!(figure <= budget, "{what}: {figure}, more than {budget}");
}

fn disk(path: &Path) -> String {
    format!("vda,file={}", path.display())
}

/// A sparse image with its data in 64 places.
fn sparse(path: &Path) {
    let image = File::create(path).and_then(|file| file.set_len(LARGE).map(|()| file)).expect("an image");
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; 4 << 20];
    for place in 0..64 {
        for word in bytes.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        for piece in 0..DATA / 64 / bytes.len() as u64 {
            let offset = place * (LARGE / 64) + piece * bytes.len() as u64;
            image.write_all_at(&bytes, offset).expect("room");
        }
    }
}

#[test]
fn an_idle_process_is_small_and_a_large_disk_does_not_make_it_large() {
    if !alone() {
        return;
    }
    let folder = scratch();
    let (at_a, at_b) = (folder.path().join("a.img"), folder.path().join("b.img"));
    sparse(&at_a);
    let a = Host::owner(folder.path(), "a", &[&disk(&at_a)]);
    let b = Host::start(folder.path(), "b", &[&disk(&at_b)]);
    let both = [("source", a.program.id()), ("destination", b.program.id())];
    for (side, process) in both {
        within(&format!("{side}, idle, resident KiB"), status(process, "VmRSS"), IDLE_KIB);
        within(&format!("{side}, idle, threads"), status(process, "Threads"), SERVE_THREADS);
        within(&format!("{side}, idle, descriptors"), descriptors(process).len() as u64, SERVE_DESCRIPTORS as u64);
    }
    let mut threads = [0; 2];
    let began = Instant::now();
    let mut migration = a.start_migrate(&b.listen, &[]);
    until_within(PATIENCE, "end of the migration", || {
        for ((_, process), highest) in both.iter().zip(&mut threads) {
            *highest = status(*process, "Threads").max(*highest);
        }
        migration.is_over().then_some(())
    });
    migration.wait().well();
    println!("footprint: 64 GiB disk, 1 GiB of data, {:.1} s", began.elapsed().as_secs_f64());
    for ((side, process), threads) in both.into_iter().zip(threads) {
        within(&format!("{side}, migrating, highest resident KiB"), status(process, "VmHWM"), MIGRATING_KIB);
        within(&format!("{side}, migrating, threads"), threads, MIGRATING_THREADS);
        until(&format!("end of the {side}'s threads"), || (status(process, "Threads") <= SERVE_THREADS).then_some(()));
        within(&format!("{side}, after it, threads"), status(process, "Threads"), SERVE_THREADS);
        within(&format!("{side}, after it, resident KiB"), status(process, "VmRSS"), IDLE_KIB);
        within(&format!("{side}, after it, descriptors"), descriptors(process).len() as u64, SERVE_DESCRIPTORS as u64);
    }
    exactly_one_takes("vda", 0, &b, &a);
}

/// The process is as it was once all clients have gone. Descriptors come and go with connections, so they are waited
/// for.
fn nothing_stays(process: u32, mut come_and_go: impl FnMut(usize)) {
    come_and_go(0);
    let settled = |count: usize| {
        until("as many descriptors as before", || (descriptors(process).len() <= count).then_some(()));
    };
    // What the first connection makes for all that follow is no leak; what it takes with it does not count.
    let (mut before, mut threads) = (usize::MAX, u64::MAX);
    throughout(Duration::from_millis(200), || {
        before = descriptors(process).len().min(before);
        threads = status(process, "Threads").min(threads);
    });
    (1..=100).for_each(come_and_go);
    settled(before);
    until("as many threads as before", || (status(process, "Threads") <= threads).then_some(()));
    println!("footprint: {before} descriptors and {threads} threads after 100 connections, as before");
}

#[test]
fn a_hundred_connections_to_an_export_leave_nothing_behind() {
    if !alone() {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("disk.img");
    drop(Ledger::format(&image, 4 * MIB, 1, 50));
    let exported = Exported::start([format!("disk={}", image.display())]);
    let process = exported.id();
    within("export, idle, resident KiB", status(process, "VmRSS"), IDLE_KIB);
    within("export, idle, threads", status(process, "Threads"), EXPORT_THREADS);
    nothing_stays(process, |number| {
        let client = Client::connect(exported.connect(), "disk", Wants::default());
        client.expect("served").read_exact((number as u64) * 512, &mut [0; 512]).expect("read");
    });
    within("export, after 100 connections, resident KiB", status(process, "VmRSS"), IDLE_KIB);
}

#[test]
fn a_hundred_connections_to_a_host_leave_nothing_behind() {
    if !alone() {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("disk.img");
    drop(Ledger::format(&image, 4 * MIB, 1, 50));
    let host = Host::owner(folder.path(), "a", &[&disk(&image)]);
    nothing_stays(host.program.id(), |number| {
        host.try_write("vda", (number as u64) * 512).expect("it owns");
        let _ = host.status();
    });
    within("serve, after 100 connections, resident KiB", status(host.program.id(), "VmRSS"), IDLE_KIB);
}

/// strace as a grandchild: who is started is the program itself, and to kill it ends both.
fn traced(strace: &Path, options: &[&str]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![strace.into(), "-D".into(), "-f".into(), "-qq".into()];
    words.extend(options.iter().map(OsString::from));
    words.push(executable());
    words
}

/// What a guest does with its disk: writes, zeroes, reads what has just been written.
fn uses(host: &Host) {
    let mut guest = host.open("vda").expect("served");
    guest.write_all(0, &[0x5a; 4096]).expect("it owns");
    guest.write_zeroes(MIB, MIB, true).expect("it owns");
    let mut bytes = [0; 4096];
    for (offset, byte) in [(0, 0x5a), (MIB, 0)] {
        guest.read_exact(offset, &mut bytes).expect("served");
        assert!(bytes == [byte; 4096], "what was written at {offset} reads otherwise");
    }
    // A long read goes another way.
    let mut long = vec![1; 256 * 1024];
    guest.read_exact(MIB - 128 * 1024, &mut long).expect("served");
    assert!(long[128 * 1024..].iter().all(|byte| *byte == 0), "zeroes read otherwise");
    guest.read_exact(0, &mut long).expect("served");
    assert!(long[..4096] == [0x5a; 4096], "what was written reads otherwise in a long read");
}

/// A migration of a small disk, of which part is holes, with these executables.
fn migrates(folder: &Path, from: &[OsString], to: &[OsString]) {
    let (at_a, at_b) = (folder.join("a.img"), folder.join("b.img"));
    drop(Ledger::format(&at_a, 16 * MIB, 3, 50));
    let a = Host::start_run_by(from, folder, "a", "g1", &[&disk(&at_a)]);
    let b = Host::start_run_by(to, folder, "b", "g1", &[&disk(&at_b)]);
    a.ask(&["claim"]).well();
    uses(&a);
    a.migrate(&b.listen, &[]).well();
    let same = fs::read(&at_a).expect("an image") == fs::read(&at_b).expect("an image");
    assert!(same, "the images differ");
    exactly_one_takes("vda", 0, &b, &a);
}

#[test]
fn a_migration_does_without_every_call_that_may_be_missing() {
    if !alone() {
        return;
    }
    let Some(strace) = peer("strace") else { return };
    for call in calls::KNOWN.iter().filter(|call| call.may_be_missing()) {
        for error in call.errors {
            let folder = scratch();
            let inject = format!("inject={}:error={error}", call.name);
            let log = folder.path().join("strace").display().to_string();
            let words = traced(&strace, &["-e", &format!("trace={}", call.name), "-e", &inject, "-A", "-o", &log]);
            migrates(folder.path(), &words, &words);
            let times = fs::read_to_string(&log).unwrap_or_default().matches("INJECTED").count();
            // A hint is given only for what is far apart, or on another's device.
            assert!(times > 0 || call.is_hint(), "nobody made the call {}", call.name);
            println!("footprint: {} fails with {error}, {times} times: goes on", call.name);
        }
    }
}

#[test]
fn every_call_that_is_made_is_known() {
    if !alone() {
        return;
    }
    let Some(strace) = peer("strace") else { return };
    let folder = scratch();
    let log = |name: &str| folder.path().join(format!("{name}.calls"));
    let counted = |name: &str| traced(&strace, &["-c", "-U", "calls,name", "-o", &log(name).display().to_string()]);
    // Two processes, each with a table of its own; the short commands run as they are.
    {
        let (at_a, at_b) = (folder.path().join("a.img"), folder.path().join("b.img"));
        drop(Ledger::format(&at_a, 16 * MIB, 3, 50));
        let mut a = Host::start_run_by(&counted("source"), folder.path(), "a", "g1", &[&disk(&at_a)]);
        let mut b = Host::start_run_by(&counted("destination"), folder.path(), "b", "g1", &[&disk(&at_b)]);
        let plain = |host: &Host, words: &[&str]| {
            let mut command = Command::new(executable());
            command.args([words[0], "g1"]).args(&words[1..]).args(["--control", &host.control().to_string()]);
            run(&mut command, PATIENCE).well()
        };
        plain(&a, &["claim"]);
        uses(&a);
        let migrate = counted("migrate");
        let mut command = Command::new(&migrate[0]);
        command.args(&migrate[1..]).args(["migrate", "g1", &b.listen, "--control", &a.control().to_string()]);
        run(&mut command, PATIENCE).well();
        uses(&b);
        a.program.kill();
        b.program.kill();
        let image = folder.path().join("b.img");
        let words = counted("export");
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("export").arg(format!("disk={}", image.display()));
        let door = folder.path().join("door");
        command.args(["--nbd", &format!("unix://{}", door.display())]);
        let (mut export, _) = Program::start_until_line(&mut command, ": ready: ");
        for options in [&["--map"][..], &["--size"]] {
            let Some(nbdinfo) = peer("nbdinfo") else { return };
            let uri = format!("nbd+unix:///disk?socket={}", door.display());
            run(Command::new(nbdinfo).args(options).arg(uri), PATIENCE).well();
        }
        export.kill();
    }
    let tables = ["source", "destination", "migrate", "export"].map(|name| {
        until(&format!("strace's table of {name}"), || {
            let text = fs::read_to_string(log(name)).ok()?;
            text.contains("total").then(|| calls::counts(&text))
        })
    });
    let unknown: Vec<&String> =
        tables.iter().flat_map(|table| table.keys()).filter(|name| !calls::is_known(name)).collect();
    assert!(unknown.is_empty(), "tests/it/footprint/calls.rs does not say what for: {unknown:?}");
    let table = calls::table(&tables);
    println!("{table}");
    if let Some(page) = std::env::var_os("BLOCKFERRY_FOOTPRINT_PAGE") {
        let text = fs::read_to_string(&page).expect("the page");
        fs::write(&page, calls::put(&text, &table)).expect("the page can be written");
    }
}
