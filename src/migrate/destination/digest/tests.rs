//! Questions that a peer must not ask, and roots that do not agree.

use super::*;
use crate::digest::root_of_all;
use crate::disk::Cache;
use crate::export::Gate;
use crate::limits::DIGEST_REGION_MIN;
use crate::ownership::{Attempt, Host, Lineage, Order, Word};

const REGION: u64 = DIGEST_REGION_MIN;
const SIZE: u64 = 40 * REGION + 512;

struct Bench {
    digests: Arc<Digests>,
    disk: Arc<Disk>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(verify: Verify) -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let disk = Arc::new(Disk::create(&dir.path().join("vda"), SIZE, Cache::Writeback).expect("created"));
        disk.write(&[7; 5000], 3 * REGION + 100, false).expect("written");
        let export = Export::new("vda", Some(Arc::clone(&disk)), false, Gate::Receiving);
        Self { digests: Digests::new(verify, &[export]), disk, _dir: dir }
    }

    fn ask(&self, asker: Asker, first: u64, regions: u8) -> Result<Message, NoAnswer> {
        let question = self.digests.question(asker, 0, first * REGION, regions)?;
        question.answer(&mut Hasher::default(), asker, stamp())
    }

    fn all(&self, asker: Asker) {
        for first in [0, 32] {
            let regions = u8::try_from((41 - first).min(32)).expect("small");
            self.ask(asker, first, regions).expect("an answer");
        }
    }

    /// What the source makes of the disk as it is now.
    fn root(&self) -> Digest {
        let mut digests = [[0; 32]; 41];
        Hasher::default().regions(&self.disk, 0, &mut digests).expect("read");
        let mut table = Table::new(SIZE);
        (0..).zip(&digests).for_each(|(region, digest)| table.put(region, digest));
        table.root()
    }
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

#[test]
fn a_question_that_does_not_fit_the_disk_breaks_the_connection() {
    let bench = Bench::new(Verify::Written);
    let asker = Asker::next();
    for (disk, offset, regions) in [
        (1, 0, 1),
        (255, 0, 1),
        (0, 1, 1),
        (0, REGION - 512, 1),
        (0, 0, 0),
        (0, 0, 33),
        (0, 0, 255),
        (0, 41 * REGION, 1),
        (0, SIZE, 1),
        (0, 40 * REGION, 2),
        (0, 9 * REGION, 33),
        (0, u64::MAX, 1),
        (0, u64::MAX - REGION + 1, 1),
        (0, 1 << 63, 32),
    ] {
        let refused = bench.digests.question(asker, disk, offset, regions);
        let Err(NoAnswer::Broken(line)) = refused else { panic!("{disk} {offset} {regions}: {refused:?}") };
        assert!(line.starts_with(&format!("the peer sent a DIGEST of {regions} regions at {offset} of disk {disk}: ")));
    }
    for (first, regions) in [(0, 1), (0, 32), (9, 32), (40, 1)] {
        let answer = bench.ask(asker, first, regions).expect("an answer");
        let Message::Digests { disk: 0, offset_bytes, digests, .. } = answer else { panic!("{answer:?}") };
        assert_eq!((offset_bytes, digests.len()), (first * REGION, usize::from(regions)));
    }
}

#[test]
fn an_older_connection_is_not_remembered_and_asks_in_vain() {
    let bench = Bench::new(Verify::Written);
    let (old, new) = (Asker::next(), Asker::next());
    // Asked over the old connection, hashed when the new one has asked already: what it saw is out of date.
    let slow = bench.digests.question(old, 0, 3 * REGION, 1).expect("good");
    let before = slow.answer(&mut Hasher::default(), old, stamp()).expect("read");
    bench.disk.write(&[8; 5000], 3 * REGION + 100, false).expect("written");
    bench.all(new);
    let expected = bench.root();
    bench.disk.write(&[7; 5000], 3 * REGION + 100, false).expect("written");
    assert_eq!(slow.answer(&mut Hasher::default(), old, stamp()).expect("read"), before);
    assert_eq!(bench.digests.compare(&[expected]), Ok((SIZE, root_of_all(&[expected]))));
    assert!(matches!(bench.ask(old, 0, 1), Err(NoAnswer::Broken(_))));
}

#[test]
fn d14_roots_that_differ_or_are_missing_are_not_sealed() {
    let bench = Bench::new(Verify::Full);
    bench.all(Asker::next());
    let root = bench.root();
    assert_eq!(bench.digests.compare(&[root]), Ok((SIZE, root_of_all(&[root]))));
    let mut other = root;
    other[31] ^= 1;
    assert_eq!(bench.digests.compare(&[other]), Err("disk vda: the two sides' digests of the whole differ".to_owned()));
    for theirs in [&[][..], &[root, root]] {
        assert_eq!(bench.digests.compare(theirs), Err("SEAL does not have a digest for each disk".to_owned()));
    }
    let nothing = Bench::new(Verify::None);
    nothing.all(Asker::next());
    assert_eq!(nothing.digests.compare(&[]), Ok((0, [0; 32])));
    assert!(nothing.digests.compare(&[root]).is_err(), "nothing was to be verified");
}
