//! The mirror against a model: a real server at the other end, a guest that writes all the time, connections that are
//! cut, and at the end a byte-for-byte comparison with what the guest believes to have written.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{Budget, Mirror, NotReady, Plan, Sink};
use crate::disk::{Cache, Disk};
use crate::export::{Door, Export, Gate, Patience, Visit, quiesce};
use crate::nbd::client::{Client, Wants};
use crate::nbd::handshake::{Description, Directory, OpenError, Outcome, haggle};
use crate::nbd::server;
use crate::socket::Socket;

const SIZE: u64 = 2 << 20;

/// One export, through the migration door, without a secret.
struct Plain {
    export: Arc<Export>,
    socket: Arc<Socket>,
}

impl Directory for Plain {
    type Opened = Visit;

    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}

    fn describe(&self, _: &str) -> Result<Description, OpenError> {
        Ok(server::description(SIZE, false))
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        let visit = self.export.enter(Door::Migration, &self.socket).expect("let in");
        self.describe(name).map(|description| (description, visit))
    }

    fn takes_phases(&self) -> bool {
        false
    }
}

/// A lane to `export`: the server's thread, the lane's, and the socket by which to cut it.
fn lane(mirror: &Arc<Mirror>, export: &Arc<Export>) -> (Arc<Socket>, [JoinHandle<()>; 2]) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let (ours, theirs) = (Arc::new(Socket::new(ours.into())), Arc::new(Socket::new(theirs.into())));
    let directory = Plain { export: Arc::clone(export), socket: Arc::clone(&theirs) };
    let served = thread::spawn(move || {
        if let Ok(Outcome::Transmission { opened, agreed }) = haggle(&theirs, &directory) {
            // It ends when the lane's connection is cut.
            let _ = server::transmit(&opened, agreed);
        }
    });
    let (runner, socket) = (Arc::clone(mirror), Arc::clone(&ours));
    let copied = thread::spawn(move || {
        if let Ok(client) = Client::connect(ours, "vda", Wants::default()) {
            runner.run_lane(&mut Sink::Nbd(Box::new(client)));
        }
    });
    (socket, [served, copied])
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        offset: u64,
        length: usize,
        byte: u8,
    },
    Zero {
        offset: u64,
        length: u64,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    /// All connections are lost; the destination is fenced, and new ones are opened.
    Cut,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..SIZE, 1..(200u64 << 10)).prop_map(|(at, length)| (at, length.min(SIZE - at)));
    let small = (0..SIZE - 4096, 1..4096usize);
    prop_oneof![
        8 => (small, 1..=255u8).prop_map(|((offset, length), byte)| Step::Write { offset, length, byte }),
        4 => (place(), 1..=255u8).prop_map(|((offset, length), byte)| {
            Step::Write { offset, length: usize::try_from(length).expect("small"), byte }
        }),
        2 => place().prop_map(|(offset, length)| Step::Zero { offset, length }),
        1 => place().prop_map(|(offset, length)| Step::Trim { offset, length }),
        1 => Just(Step::Cut),
    ]
}

fn export(dir: &tempfile::TempDir, name: &str, gate: Gate) -> Arc<Export> {
    let disk = Disk::create(&dir.path().join(name), SIZE, Cache::Writeback).expect("created");
    Export::new(name, Some(Arc::new(disk)), false, gate)
}

fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
    let at = |offset: u64| usize::try_from(offset).expect("small");
    at(offset)..at(offset + length)
}

/// Plays `before` on the source, starts the mirror with `lanes` lanes, plays `steps`, hands over, and compares.
fn play(before: &[Step], steps: &[Step], lanes: usize, target_reads_zero: bool) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let source = export(&dir, "source", Gate::Serving);
    let destination = export(&dir, "destination", Gate::Receiving);
    let (ours, _vmm) = UnixStream::pair().expect("a socket pair");
    let guest = source.enter(Door::Guest, &Arc::new(Socket::new(ours.into()))).expect("let in");
    let mut model = vec![0; usize::try_from(SIZE).expect("small")];
    let mut one = |step: &Step| match *step {
        Step::Write { offset, length, byte } => {
            guest.write(Patience::Now, offset, &vec![byte; length], false).expect("written");
            model[range(offset, length as u64)].fill(byte);
        }
        Step::Zero { offset, length } => {
            guest.write_zeroes(offset, length, true, false, false).expect("zeroed");
            model[range(offset, length)].fill(0);
        }
        Step::Trim { offset, length } => {
            guest.trim(offset, length, false).expect("trimmed");
            model[range(offset, length)].fill(0);
        }
        Step::Cut => {}
    };
    before.iter().for_each(&mut one);
    let mirror = Mirror::arm(&source, &Budget::new(0), &Plan::default()).expect("armed");
    mirror.scan(target_reads_zero).expect("scanned");
    let open = || (0..lanes).map(|_| lane(&mirror, &destination)).collect::<Vec<_>>();
    let mut running = open();
    let reopen = |running: &mut Vec<(Arc<Socket>, [JoinHandle<()>; 2])>| {
        mirror.stop();
        running.iter().for_each(|(socket, _)| socket.shutdown());
        assert!(destination.end_connections(Door::Migration), "fenced");
        for thread in running.drain(..).flat_map(|(_, threads)| threads) {
            thread.join().expect("no panic");
        }
        drop(mirror.take_lost());
        mirror.resume();
        *running = open();
    };
    for step in steps {
        one(step);
        if matches!(step, Step::Cut) {
            reopen(&mut running);
        }
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let quiesced = quiesce(&[Arc::clone(&source)], deadline).expect("quiet");
    mirror.hurry(&quiesced);
    while let Err(not_ready) = mirror.settle(&quiesced, deadline) {
        assert!(matches!(not_ready, NotReady::Lost(_)), "{not_ready:?}");
        reopen(&mut running);
    }
    assert_eq!(mirror.counts().outstanding.granules, 0);
    let mut arrived = vec![0xff; model.len()];
    destination.disk().expect("there").read(&mut arrived, 0).expect("read");
    if let Some(at) = arrived.iter().zip(&model).position(|(a, b)| a != b) {
        panic!("byte {at} is {:#x} at the destination and {:#x} for the guest", arrived[at], model[at]);
    }
    quiesced.fence();
    mirror.stop();
    running.iter().for_each(|(socket, _)| socket.shutdown());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whatever_the_guest_writes_and_whichever_connections_are_lost_the_destination_is_equal(
        before in prop::collection::vec(step(), 0..12),
        steps in prop::collection::vec(step(), 0..120),
        lanes in 1..4usize,
        target_reads_zero in any::<bool>(),
    ) {
        play(&before, &steps, lanes, target_reads_zero);
    }
}
