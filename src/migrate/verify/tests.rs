//! A destination that answers what was not asked, and one whose disk holds something else.

use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::digest::Verified;
use crate::disk::{Cache, Disk as Image};
use crate::domain;
use crate::export::{Export, Gate};
use crate::limits::MIB;
use crate::migrate::wire;
use crate::mirror::{Budget, Plan};
use crate::options::ServeOptions;
use crate::ownership::{Attempt, Host, Lineage, Order, Word};
use crate::socket::Socket;

const SIZE: u64 = MIB as u64 + 512;

struct Bench {
    dir: tempfile::TempDir,
    checker: Checker,
    link: Link,
    peer: Link,
    image: Arc<Image>,
}

fn stamp() -> Stamp {
    Stamp {
        lineage: Lineage([9; 16]),
        word: Word([8; 16]),
        attempt: Attempt([1; 16]),
        source: Host([7; 16]),
        destination: Host([6; 16]),
        order: Order { term: 1, generation: 2 },
    }
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let path = dir.path().join("vda");
        let image = Arc::new(Image::create(&path, SIZE, Cache::Writeback).expect("created"));
        image.write(&[7; 70_000], 100, false).expect("written");
        let export = Export::new("vda", Some(Arc::clone(&image)), false, Gate::Serving);
        let bell: Arc<Bell> = Arc::default();
        let plan = Plan { verified: Verified::Full, compare: false, bell: Arc::clone(&bell) };
        let mirror = Mirror::arm(&export, &Budget::new(0), &plan).expect("armed");
        let disks = vec![domain::Disk::parse("sr0").expect("parsed")];
        let options = ServeOptions::in_directory(dir.path(), disks, true);
        let guest = Arc::new(Guest::open(&options, None).expect("opened"));
        let checker = Checker {
            instance: guest.instance,
            guest,
            way: Way::Dial(Place::parse("tcp://127.0.0.1:1").expect("an address")),
            stamp: stamp(),
            disks: vec![Disk { number: 0, mirror }],
            bell,
            stop: Arc::default(),
            hasher: Hasher::default(),
            heard: Instant::now(),
            answered: Instant::now(),
        };
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let [link, peer] = [ours, theirs].map(|socket| Link::new(Arc::new(Socket::new(socket.into()))));
        Self { dir, checker, link, peer, image }
    }

    /// Lets the checker talk to a peer that changes its answers with `lie`, as long as it listens. Returns how the
    /// checker's side ended, and the mirror.
    fn talk(self, mut lie: impl FnMut(&mut Message) + Send) -> (Result<(), String>, Arc<Mirror>) {
        let Self { dir, mut checker, mut link, mut peer, image } = self;
        let mirror = Arc::clone(&checker.disks[0].mirror);
        let stop = Arc::clone(&checker.stop);
        let watched = Arc::clone(&mirror);
        let over = AtomicBool::new(false);
        let is_over = &over;
        let ended = thread::scope(|scope| {
            scope.spawn(move || {
                let mut hasher = Hasher::default();
                let soon = || Instant::now() + Duration::from_secs(5);
                while let Ok(Some(message)) = peer.receive(soon()) {
                    let Message::Digest { stamp, disk, offset_bytes, regions } = message else { continue };
                    let mut digests: heapless::Vec<wire::Digest, DIGESTS_MAX> = heapless::Vec::new();
                    digests.resize(usize::from(regions), [0; 32]).expect("fits");
                    hasher.regions(&image, offset_bytes / region_bytes(SIZE), &mut digests).expect("read");
                    let mut answer = Message::Digests { stamp, disk, offset_bytes, digests };
                    lie(&mut answer);
                    if peer.send(&answer, soon()).is_err() {
                        break;
                    }
                }
            });
            scope.spawn(move || {
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(5)
                    && watched.counts().unverified > 0
                    && watched.failure().is_none()
                    && !is_over.load(Ordering::Acquire)
                {
                    thread::yield_now();
                }
                stop.store(true, Ordering::Release);
            });
            let mut questions = Questions::new();
            let ended = checker.converse(&mut link, &mut questions).map_err(|end| match end {
                End::Lost(cause) => cause,
                End::Failed(_, failure) => failure.text,
            });
            drop(questions);
            // The peer's thread ends with the connection.
            link.socket().shutdown();
            over.store(true, Ordering::Release);
            ended
        });
        drop(dir);
        (ended, mirror)
    }
}

#[test]
fn answers_that_fit_verify_everything() {
    let (ended, mirror) = Bench::new().talk(|_| ());
    assert_eq!(ended, Ok(()));
    let (_, bytes) = mirror.root().expect("verified");
    assert_eq!((bytes, mirror.counts().unverified), (SIZE, 0));
    assert!(mirror.failure().is_none());
}

#[test]
fn answers_that_do_not_fit_the_question_close_the_connection_and_verify_nothing() {
    let lies: [fn(&mut Message); 5] = [
        |answer| {
            if let Message::Digests { digests, .. } = answer {
                digests.pop();
            }
        },
        |answer| {
            if let Message::Digests { offset_bytes, .. } = answer {
                *offset_bytes += 65536;
            }
        },
        |answer| {
            if let Message::Digests { disk, .. } = answer {
                *disk = 1;
            }
        },
        |answer| {
            if let Message::Digests { digests, .. } = answer {
                digests.push([0; 32]).expect("fits");
            }
        },
        |answer| {
            if let Message::Digests { digests, .. } = answer {
                digests.clear();
            }
        },
    ];
    for lie in lies {
        let (ended, mirror) = Bench::new().talk(lie);
        assert_eq!(ended, Err("the destination's digests do not fit the question".to_owned()));
        assert_eq!(mirror.root().map(|(_, bytes)| bytes), Some(0));
        assert!(mirror.counts().unverified >= SIZE, "what was claimed is unverified again");
        assert!(mirror.failure().is_none(), "that alone ends no migration");
    }
}

#[test]
fn d14_a_digest_that_differs_ends_the_migration_and_the_region_is_named() {
    let (_, mirror) = Bench::new().talk(|answer| {
        if let Message::Digests { digests, .. } = answer {
            digests[1][0] ^= 1;
        }
    });
    let failure = mirror.failure().expect("it has failed").text;
    let cause = "verify: disk vda, 65536 bytes at 65536: the destination holds something else than was sent";
    assert_eq!(failure, cause);
    assert!(mirror.counts().unverified > 0);
}

#[test]
fn a_destination_that_never_stops_talking_keeps_nobody_from_ending() {
    let Bench { dir, mut checker, mut link, mut peer, image } = Bench::new();
    let stop = Arc::clone(&checker.stop);
    let babble = Arc::new(AtomicBool::new(true));
    let goes_on = Arc::clone(&babble);
    let ended = thread::scope(|scope| {
        scope.spawn(move || {
            let soon = || Instant::now() + Duration::from_secs(5);
            let mut said = 0;
            while goes_on.load(Ordering::Acquire) && peer.send(&Message::Pong { number: 0 }, soon()).is_ok() {
                said += 1;
                if said == 10_000 {
                    stop.store(true, Ordering::Release);
                }
            }
        });
        let checking = scope.spawn(move || {
            let mut questions = Questions::new();
            let ended = checker.converse(&mut link, &mut questions).is_ok();
            link.socket().shutdown();
            ended
        });
        let began = Instant::now();
        while !checking.is_finished() && began.elapsed() < Duration::from_secs(3) {
            thread::yield_now();
        }
        let in_time = checking.is_finished();
        babble.store(false, Ordering::Release);
        checking.join().expect("no panic") && in_time
    });
    assert!(ended, "it listens for as long as the peer talks");
    drop((dir, image));
}

#[test]
fn who_dials_a_destination_that_says_nothing_can_be_ended() {
    let Bench { dir, mut checker, image, .. } = Bench::new();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = silent.local_addr().expect("an address").port();
    checker.way = Way::Dial(Place::parse(&format!("tcp://127.0.0.1:{port}")).expect("an address"));
    let stop = Arc::clone(&checker.stop);
    let checking = thread::spawn(move || checker.run());
    // It has dialled, and waits for a word.
    let accepted = silent.accept().expect("dialled");
    stop.store(true, Ordering::Release);
    let began = Instant::now();
    while !checking.is_finished() && began.elapsed() < Duration::from_secs(3) {
        thread::yield_now();
    }
    assert!(checking.is_finished(), "it waits for a destination that says nothing");
    checking.join().expect("no panic");
    drop((accepted, dir, image));
}

#[test]
fn a_destination_that_hangs_up_on_every_question_is_not_asked_for_ever() {
    let Bench { dir, mut checker, mut link, peer, image } = Bench::new();
    let before = checker.answered;
    // Taken in by the system, and never by the peer.
    let hangs_up = thread::spawn(move || {
        let mut peer = peer;
        let asked = peer.receive(Instant::now() + Duration::from_secs(5));
        assert!(matches!(asked, Ok(Some(Message::Digest { .. }))), "{asked:?}");
    });
    assert!(checker.converse(&mut link, &mut Questions::new()).is_err());
    hangs_up.join().expect("no panic");
    assert_eq!(checker.answered, before, "having asked is no answer");
    drop((dir, image));
}
