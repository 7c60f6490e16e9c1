//! The gate, the mark, and connections that hang up.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Door, Export, Fault, Gate, Patience, Visit, quiesce};
use crate::dirty::DirtyMap;
use crate::disk::tests::cached;
use crate::disk::{Cache, Disk};
use crate::limits::{CACHED_BYTES, WRITE_BACK_BYTES};
use crate::socket::Socket;

struct Bench {
    _dir: tempfile::TempDir,
    export: Arc<Export>,
}

impl Bench {
    fn new(gate: Gate) -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let disk = Disk::create(&dir.path().join("disk"), 1 << 20, Cache::Writeback).expect("created");
        Self { _dir: dir, export: Export::new("vda", Some(Arc::new(disk)), false, gate) }
    }

    fn enter(&self, door: Door) -> (Visit, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let socket = Arc::new(Socket::new(OwnedFd::from(ours)));
        (self.export.enter(door, &socket).expect("let in"), theirs)
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn who_may_write_in_which_gate() {
    use Door::{Guest, Migration};
    let word = |visit: &Visit| match visit.write(Patience::Now, 0, &[1; 512], false) {
        Ok(_) => "done",
        Err(Fault::NotPermitted) => "EPERM",
        Err(Fault::Fenced) => "ESHUTDOWN",
        Err(Fault::WouldWait) => "waits",
        Err(other) => panic!("{other:?}"),
    };
    for (gate, for_guest, for_migration) in [
        (Gate::Incoming, "EPERM", "ESHUTDOWN"),
        (Gate::Receiving, "EPERM", "done"),
        (Gate::Sealed, "EPERM", "ESHUTDOWN"),
        (Gate::Serving, "done", "ESHUTDOWN"),
        (Gate::Quiesced, "waits", "ESHUTDOWN"),
        (Gate::Fenced, "ESHUTDOWN", "ESHUTDOWN"),
        (Gate::Closed, "ESHUTDOWN", "ESHUTDOWN"),
    ] {
        let bench = Bench::new(Gate::Incoming);
        let (guest, _g) = bench.enter(Guest);
        let (migration, _m) = bench.enter(Migration);
        bench.export.set_gate(gate);
        assert_eq!((word(&guest), word(&migration)), (for_guest, for_migration), "{gate:?}");
        assert!(guest.flush().is_ok(), "a flush is served in {gate:?}");
        assert_eq!(guest.read(&mut [0; 512], 0).is_ok(), !gate.is_shut(), "a read in {gate:?}");
        assert_eq!(bench.export.refused_guest_writes(), u64::from(for_guest == "EPERM"), "{gate:?}");
    }
}

#[test]
fn every_change_is_marked_and_only_while_armed() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    guest.write(Patience::Now, 0, &[1; 512], false).expect("before");
    let map = DirtyMap::new(1 << 20);
    bench.export.arm(&map).expect("armed");
    assert_eq!(map.outstanding().granules, 0);
    guest.write(Patience::Now, 0, &[1; 512], false).expect("written");
    guest.write_zeroes(8192, 4096, true, false, false).expect("zeroed");
    guest.trim(16384, 4096, false).expect("trimmed");
    assert_eq!(map.outstanding().granules, 3);
    bench.export.disarm(&DirtyMap::new(1 << 20));
    guest.write(Patience::Now, 32768, &[1; 512], false).expect("still armed");
    assert_eq!(map.outstanding().granules, 4, "another's end does not end this one");
    bench.export.disarm(&map);
    guest.write(Patience::Now, 65536, &[1; 512], false).expect("after");
    assert_eq!(map.outstanding().granules, 4);
}

#[test]
fn a_write_that_fails_is_marked_too() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("disk");
    drop(Disk::create(&path, 1 << 20, Cache::Writeback).expect("created"));
    let disk = Disk::open(&path, crate::disk::Access::ReadOnly, Cache::Writeback).expect("opened");
    let export = Export::new("vda", Some(Arc::new(disk)), false, Gate::Serving);
    let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
    let visit = export.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).expect("let in");
    let map = DirtyMap::new(1 << 20);
    export.arm(&map).expect("armed");
    map.synchronous(true);
    assert!(matches!(visit.write(Patience::Now, 0, &[1; 512], false), Err(Fault::Disk(_))));
    assert_eq!(map.outstanding().granules, 1);
    assert!(map.take_waited(1 << 20).is_none(), "D7: nobody waits for the copy of a failed write");
}

#[test]
fn quiesce_holds_writes_until_it_is_dropped() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let quiesced = quiesce(&[Arc::clone(&bench.export)], soon()).expect("quiet");
    let writer = std::thread::spawn(move || guest.write(Patience::Wait, 0, &[1; 512], false));
    while bench.export.lock().waiting == 0 {
        std::thread::yield_now();
    }
    drop(quiesced);
    assert!(writer.join().expect("no panic").is_ok());
}

#[test]
fn a_fenced_export_refuses_whoever_waits() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let quiesced = quiesce(&[Arc::clone(&bench.export)], soon()).expect("quiet");
    let writer = std::thread::spawn(move || guest.write(Patience::Wait, 0, &[1; 512], false));
    while bench.export.lock().waiting == 0 {
        std::thread::yield_now();
    }
    quiesced.fence();
    assert!(matches!(writer.join().expect("no panic"), Err(Fault::Fenced)));
}

#[test]
fn quiesce_gives_up_on_a_request_that_stays_in_the_disk() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let stuck = guest.admit(Patience::Now, 0, 512).expect("admitted");
    let deadline = Instant::now() + Duration::from_millis(20);
    assert_eq!(quiesce(&[Arc::clone(&bench.export)], deadline).expect_err("not quiet"), "vda");
    assert_eq!(bench.export.gate(), Gate::Serving, "the guest goes on");
    drop(stuck);
    drop(quiesce(&[Arc::clone(&bench.export)], soon()).expect("quiet now"));
}

#[test]
fn a_drain_after_one_that_gave_up_waits_for_both_generations() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let stuck = guest.admit(Patience::Now, 0, 512).expect("admitted");
    for _ in 0..3 {
        assert!(!bench.export.drain(bench.export.lock(), Instant::now() + Duration::from_millis(5)));
    }
    drop(stuck);
    assert!(bench.export.drain(bench.export.lock(), soon()));
}

#[test]
fn d6_a_drain_is_not_cut_short_by_another_one() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let export = &bench.export;
    let stuck = guest.admit(Patience::Now, 0, 512).expect("admitted");
    assert!(!export.drain(export.lock(), Instant::now() + Duration::from_millis(5)), "it stays in the disk");
    let slow = guest.admit(Patience::Now, 512, 512).expect("admitted");
    let let_go = AtomicBool::new(false);
    let waiting = |count| {
        let began = Instant::now();
        while export.lock().waiting < count && began.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        assert_eq!(export.lock().waiting, count);
    };
    std::thread::scope(|scope| {
        let quiesce = scope.spawn(|| (export.drain(export.lock(), soon()), let_go.load(Ordering::Acquire)));
        waiting(1);
        let verify = scope.spawn(|| export.drain(export.lock(), soon()));
        waiting(2);
        drop(slow);
        let began = Instant::now();
        while !quiesce.is_finished() && began.elapsed() < Duration::from_millis(100) {
            std::thread::yield_now();
        }
        let_go.store(true, Ordering::Release);
        drop(stuck);
        assert_eq!(quiesce.join().expect("no panic"), (true, true), "a request admitted before was in the disk yet");
        assert!(verify.join().expect("no panic"));
    });
}

#[test]
fn a_waiting_request_dies_with_its_connection() {
    let bench = Bench::new(Gate::Serving);
    let (guest, client) = bench.enter(Door::Guest);
    let quiesced = quiesce(&[Arc::clone(&bench.export)], soon()).expect("quiet");
    let writer = std::thread::spawn(move || guest.write(Patience::Wait, 0, &[1; 512], false));
    while bench.export.lock().waiting == 0 {
        std::thread::yield_now();
    }
    drop(client);
    assert!(matches!(writer.join().expect("no panic"), Err(Fault::Gone)));
    drop(quiesced);
}

#[test]
fn a_new_connection_waits_for_what_a_dead_one_had_admitted() {
    let bench = Bench::new(Gate::Serving);
    let (old, old_client) = bench.enter(Door::Guest);
    let admitted = old.admit(Patience::Now, 0, 512).expect("admitted");
    drop(old_client);
    let export = Arc::clone(&bench.export);
    let newcomer = std::thread::spawn(move || {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let visit = export.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).expect("let in");
        (visit, theirs)
    });
    while bench.export.lock().waiting == 0 {
        std::thread::yield_now();
    }
    assert!(old.is_ended(), "it had hung up");
    assert!(matches!(old.write(Patience::Now, 0, &[1; 512], false), Err(Fault::Gone)), "nothing more of it");
    assert!(!newcomer.is_finished(), "not served before the old one's request is finished");
    drop(admitted);
    drop(old);
    let _ = newcomer.join().expect("no panic");
}

#[test]
fn a_request_of_a_connection_that_hung_up_is_not_admitted() {
    let bench = Bench::new(Gate::Serving);
    let (guest, client) = bench.enter(Door::Guest);
    drop(client);
    assert!(matches!(guest.write(Patience::Now, 0, &[1; 512], false), Err(Fault::Gone)));
}

#[test]
fn received_bytes_are_written_back_while_they_come() {
    let bench = Bench::new(Gate::Receiving);
    let (mirror, _source) = bench.enter(Door::Migration);
    let export = Arc::clone(&bench.export);
    let thread = std::thread::spawn(move || export.write_back());
    mirror.write(Patience::Wait, 0, &[1; 4096], false).expect("written");
    let deadline = soon();
    while bench.export.lock().unsynced.bytes() > 0 {
        assert!(Instant::now() < deadline, "never synced");
        std::thread::yield_now();
    }
    bench.export.set_gate(Gate::Sealed);
    thread.join().expect("no panic");
}

#[test]
fn what_was_synced_a_while_ago_leaves_the_page_cache() {
    let dir = tempfile::tempdir_in(".").expect("on a real file system");
    let batches = 2 + CACHED_BYTES / WRITE_BACK_BYTES;
    let size = batches * WRITE_BACK_BYTES;
    let path = dir.path().join("disk");
    let disk = Disk::create(&path, size, Cache::Writeback).expect("created");
    let export = Export::new("vda", Some(Arc::new(disk)), false, Gate::Receiving);
    let (ours, _source) = UnixStream::pair().expect("a socket pair");
    let mirror = export.enter(Door::Migration, &Arc::new(Socket::new(ours.into()))).expect("let in");
    let piece = vec![1; usize::try_from(WRITE_BACK_BYTES / 4).expect("small")];
    let writer = Arc::clone(&export);
    let thread = std::thread::spawn(move || writer.write_back());
    for batch in 0..batches {
        for part in 0..4 {
            let offset = batch * WRITE_BACK_BYTES + part * piece.len() as u64;
            mirror.write(Patience::Wait, offset, &piece, false).expect("written");
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while export.lock().unsynced.bytes() > 0 {
            assert!(Instant::now() < deadline, "never synced");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    export.set_gate(Gate::Sealed);
    thread.join().expect("no panic");
    let Some(left) = cached(&path) else { return };
    assert!(left < size, "the first batch leaves");
    assert!(left >= CACHED_BYTES, "whoever hashes the last batches finds them there: {left}");
}

#[test]
fn who_keeps_its_requests_is_ended_and_not_refused_where_nobody_knows_who_owns() {
    let bench = Bench::new(Gate::Serving);
    let [(kernel, _one), (vmm, _two), (late, _three)] = std::array::from_fn(|_| bench.enter(Door::Guest));
    kernel.ends_when_closed();
    bench.export.set_gate(Gate::Closed);
    assert!(kernel.is_ended() && kernel.socket().has_hung_up(), "a reply could be sent");
    assert!(!vmm.is_ended());
    assert!(matches!(vmm.write(Patience::Wait, 0, &[1; 512], false), Err(Fault::Fenced)));
    late.ends_when_closed();
    assert!(late.is_ended(), "it comes between the two");
    // The fence answers everybody: whoever syncs must learn that it was too late (W5).
    let bench = Bench::new(Gate::Serving);
    let (kernel, _one) = bench.enter(Door::Guest);
    kernel.ends_when_closed();
    bench.export.set_gate(Gate::Fenced);
    assert!(!kernel.is_ended());
    assert!(matches!(kernel.write(Patience::Wait, 0, &[1; 512], false), Err(Fault::Fenced)));
}

#[test]
fn dead_connections_do_not_wait_for_each_other() {
    let bench = Bench::new(Gate::Serving);
    let (old, old_client) = bench.enter(Door::Guest);
    drop(old_client);
    let newcomer = || {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let (export, before) = (Arc::clone(&bench.export), bench.export.visits());
        let thread = std::thread::spawn(move || export.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).is_ok());
        while bench.export.visits() == before {
            std::thread::yield_now();
        }
        (thread, theirs)
    };
    let (a, a_client) = newcomer();
    drop(a_client);
    let (b, b_client) = newcomer();
    assert!(!a.join().expect("no panic"), "it has hung up, and leaves at once");
    drop(b_client);
    let (c, _c_client) = newcomer();
    assert!(!b.join().expect("no panic"));
    drop(old);
    assert!(c.join().expect("no panic"), "the living one is let in");
}

#[test]
fn a_connection_that_was_fenced_is_not_let_go_on() {
    let bench = Bench::new(Gate::Fenced);
    assert!(
        bench.export.enter(Door::Guest, &Arc::new(Socket::new(UnixStream::pair().expect("a pair").0.into()))).is_err()
    );
    bench.export.set_gate(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    bench.export.set_gate(Gate::Fenced);
    bench.export.set_gate(Gate::Receiving);
    bench.export.set_gate(Gate::Serving);
    assert!(matches!(guest.write(Patience::Now, 0, &[1; 512], false), Err(Fault::Gone)));
}

#[test]
fn only_a_served_guest_is_quiesced() {
    for gate in [Gate::Incoming, Gate::Receiving, Gate::Sealed, Gate::Fenced] {
        let bench = Bench::new(gate);
        assert!(quiesce(&[Arc::clone(&bench.export)], soon()).is_err());
        assert_eq!(bench.export.gate(), gate);
    }
}

#[test]
fn d1_arming_waits_for_what_was_admitted_before() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let admitted = guest.admit(Patience::Now, 0, 512).expect("admitted");
    let (export, map) = (Arc::clone(&bench.export), DirtyMap::new(1 << 20));
    let arming = std::thread::spawn(move || export.arm(&map).map(|()| map.outstanding().granules));
    while bench.export.lock().waiting == 0 {
        std::thread::yield_now();
    }
    assert!(!arming.is_finished());
    drop(admitted);
    assert_eq!(arming.join().expect("no panic").expect("armed"), 1, "and marked it");
}

#[test]
fn d9_a_disk_whose_sync_failed_takes_nothing_from_a_migration() {
    let bench = Bench::new(Gate::Receiving);
    let (mirror, _source) = bench.enter(Door::Migration);
    mirror.write(Patience::Now, 0, &[1; 512], false).expect("written");
    bench.export.disk().expect("there").poison();
    assert!(matches!(mirror.write(Patience::Now, 0, &[1; 512], false), Err(Fault::Disk(_))));
    assert!(matches!(mirror.flush(), Err(Fault::Disk(_))), "and is never said to be durable again");
}

#[test]
fn d7_a_write_that_waits_for_its_copy_keeps_no_drain_and_no_quiesce_waiting() {
    let bench = Bench::new(Gate::Serving);
    let (guest, _client) = bench.enter(Door::Guest);
    let map = DirtyMap::new(1 << 20);
    bench.export.arm(&map).expect("armed");
    map.synchronous(true);
    let owed = guest.write(Patience::Now, 0, &[1; 512], false).expect("written").expect("not to be answered yet");
    assert!(bench.export.drain_admitted());
    let quiesced = quiesce(&[Arc::clone(&bench.export)], soon()).expect("quiesced");
    map.take_waited(1 << 20).expect("waited for").acknowledge();
    guest.wait_for_copy(owed);
    drop(quiesced);
}

#[test]
fn d7_a_guest_that_has_hung_up_waits_no_longer() {
    let bench = Bench::new(Gate::Serving);
    let (guest, client) = bench.enter(Door::Guest);
    let map = DirtyMap::new(1 << 20);
    bench.export.arm(&map).expect("armed");
    map.synchronous(true);
    let owed = guest.write(Patience::Now, 0, &[1; 512], false).expect("written").expect("not to be answered yet");
    guest.flush().expect("a flush does not wait");
    drop(client);
    let began = Instant::now();
    guest.wait_for_copy(owed);
    assert!(began.elapsed() < Duration::from_secs(1), "D11: whoever reconnects waits for this");
    assert_eq!(map.outstanding().granules, 1, "it is copied later");
}
