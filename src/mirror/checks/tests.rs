//! What a difference between the two sides means.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::disk::{Cache, Disk};
use crate::export::{Door, Export, Gate, Patience, Visit};
use crate::mirror::{Budget, Plan};
use crate::socket::Socket;

const SIZE: u64 = 1 << 20;

struct Bench {
    _dir: tempfile::TempDir,
    mirror: Arc<Mirror>,
    guest: Visit,
    _client: UnixStream,
}

impl Bench {
    /// A mirror that verifies everything and has nothing to copy, and a guest.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let disk = Disk::create(&dir.path().join("vda"), SIZE, Cache::Writeback).expect("created");
        let export = Export::new("vda", Some(Arc::new(disk)), false, Gate::Serving);
        let plan = Plan { verified: Verified::Full, compare: false, bell: Arc::default() };
        let mirror = Mirror::arm(&export, &Budget::new(0), &plan).expect("armed");
        let (ours, client) = UnixStream::pair().expect("a socket pair");
        let guest = export.enter(Door::Guest, &Arc::new(Socket::new(OwnedFd::from(ours)))).expect("let in");
        Self { _dir: dir, mirror, guest, _client: client }
    }

    /// The next claim is found to differ in its first region.
    fn differs(&self) {
        let Ask::Hash(claim) = self.mirror.ask_next() else { panic!("nothing to verify") };
        let count = claim.count();
        let (ours, mut theirs) = ([[1; 32]; 64], [[1; 32]; 64]);
        theirs[0] = [2; 32];
        self.mirror.compare(claim, &ours[..count], &theirs[..count]);
    }
}

#[test]
fn d14_a_region_that_nobody_has_touched_and_differs_ends_the_migration() {
    let bench = Bench::new();
    bench.differs();
    let failure = bench.mirror.failure().expect("a wrong copy").to_string();
    assert!(failure.starts_with("verify: disk vda, 65536 bytes at 0: "), "{failure}");
}

#[test]
fn d7_nobody_waits_for_a_mirror_that_has_failed() {
    let bench = Bench::new();
    bench.mirror.map.synchronous(true);
    bench.differs();
    assert!(!bench.mirror.map.is_synchronous());
}

#[test]
fn d14_a_write_that_is_on_the_disk_and_not_marked_yet_explains_the_difference() {
    let bench = Bench::new();
    let admitted = bench.guest.admit(Patience::Now, 0, 512).expect("admitted");
    std::thread::scope(|scope| {
        scope.spawn(|| bench.differs());
        // The comparison waits for it: no sooner is it done than the difference is decided about.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !bench.mirror.export.is_draining() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(bench.mirror.failure(), None);
        drop(admitted);
    });
    assert_eq!(bench.mirror.failure(), None, "it is dirty, and is verified again when it has been copied");
    assert_eq!(bench.mirror.counts().outstanding.bytes, bench.mirror.granularity() as u64);
}
