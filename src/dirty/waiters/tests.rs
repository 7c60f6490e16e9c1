//! Who may be answered when, against a model that keeps for each write what of it was not copied yet.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{DirtyMap, Owed};
use crate::dirty::{Found, Region};
use crate::limits::{SYNCHRONOUS_WAIT_MAX, WAITERS_MAX};

const G: u64 = 4096;
const LARGE: usize = 1 << 30;

fn synchronous(granules: u64) -> Arc<DirtyMap> {
    let map = DirtyMap::new(granules * G);
    map.synchronous(true);
    map
}

fn write(map: &Arc<DirtyMap>, first: u64, count: u64) -> Owed {
    map.mark_and_owe(first * G, count * G).expect("the map is synchronous")
}

fn may_be_answered(owed: &mut Owed) -> bool {
    owed.wait(Duration::ZERO)
}

#[test]
fn d7_a_copy_that_began_before_the_mark_answers_nobody() {
    let map = synchronous(8);
    map.mark(0, G);
    let early = map.take(LARGE).expect("dirty");
    let mut owed = write(&map, 0, 1);
    assert!(map.take_waited(LARGE).is_none(), "D4: a copy of it is under way");
    assert!(early.is_waited_for(), "and must not be held back");
    early.acknowledge();
    assert!(!may_be_answered(&mut owed), "it may have read the bytes before the write");
    let late = map.take_waited(LARGE).expect("it goes first");
    assert!(!may_be_answered(&mut owed), "it is not acknowledged");
    late.acknowledge();
    assert!(may_be_answered(&mut owed));
}

#[test]
fn d7_a_hot_granule_answers_each_of_its_writers() {
    let map = synchronous(8);
    let mut writers = Vec::new();
    for _ in 0..10 {
        writers.push(write(&map, 3, 1));
        let copy = map.take_waited(LARGE).expect("waited for");
        writers.push(write(&map, 3, 1));
        copy.acknowledge();
        let answered: Vec<_> = writers.iter_mut().map(may_be_answered).collect();
        let last = answered.len() - 1;
        assert!(answered[..last].iter().all(|answered| *answered), "though it has never been clean: {answered:?}");
        assert!(!answered[last]);
    }
}

#[test]
fn d7_a_copy_that_was_lost_answers_nobody_and_is_made_again() {
    let map = synchronous(8);
    let mut owed = write(&map, 3, 2);
    drop(map.take_waited(LARGE));
    assert!(!may_be_answered(&mut owed));
    map.take_waited(LARGE).expect("dirty again").acknowledge();
    assert!(may_be_answered(&mut owed));
    assert_eq!(map.outstanding().granules, 0);
}

#[test]
fn d7_who_waits_goes_first_and_the_oldest_before_the_others() {
    let map = synchronous(1000);
    map.mark(0, 900 * G);
    let _old = write(&map, 800, 4);
    drop(map.take(4096));
    let _young = write(&map, 10, 2);
    let first = map.take_waited(LARGE).expect("waited for");
    assert_eq!((first.offset(), first.length()), (800 * G, 4 * 4096));
    let second = map.take_waited(LARGE).expect("waited for");
    assert_eq!((second.offset(), second.length()), (10 * G, 2 * 4096));
    assert!(map.take_waited(LARGE).is_none());
}

#[test]
fn d7_off_nobody_waits_and_turning_it_off_lets_all_go_dirty() {
    let map = DirtyMap::new(8 * G);
    assert!(map.mark_and_owe(0, G).is_none());
    map.synchronous(true);
    let mut writers: Vec<_> = (0..4).map(|at| write(&map, at, 1)).collect();
    let copy = map.take_waited(LARGE).expect("waited for");
    thread::scope(|scope| {
        let waits: Vec<_> = writers.iter_mut().map(|owed| scope.spawn(|| owed.wait(Duration::from_secs(60)))).collect();
        map.synchronous(false);
        for wait in waits {
            assert!(wait.join().expect("no panic"));
        }
    });
    drop(copy);
    assert_eq!(map.outstanding().granules, 4, "they are copied later");
    assert!(map.mark_and_owe(0, G).is_none());
}

#[test]
fn d7_nobody_waits_longer_than_the_limit_and_a_stalled_map_keeps_nobody() {
    let map = synchronous(8);
    let mut writers = [write(&map, 0, 1), write(&map, 1, 1)];
    let began = Instant::now();
    thread::scope(|scope| {
        for owed in &mut writers {
            scope.spawn(|| assert!(owed.wait(SYNCHRONOUS_WAIT_MAX * 10)));
        }
    });
    let took = began.elapsed();
    assert!(took >= SYNCHRONOUS_WAIT_MAX - Duration::from_millis(100) && took < SYNCHRONOUS_WAIT_MAX * 2, "{took:?}");
    assert!(map.mark_and_owe(0, G).is_none(), "nothing was acknowledged: the next one does not wait at all");
    map.take(LARGE).expect("dirty").acknowledge();
    assert!(map.mark_and_owe(0, G).is_some(), "something was");
}

#[test]
fn d7_who_finds_no_place_in_the_table_is_answered_too() {
    let map = synchronous(2 * WAITERS_MAX as u64);
    let mut writers: Vec<_> = (0..WAITERS_MAX as u64 + 10).map(|at| write(&map, at, 1)).collect();
    assert!(!writers.iter_mut().any(may_be_answered));
    let mut copies = Vec::new();
    while let Some(copy) = map.take(4096) {
        copies.push(copy);
    }
    copies.into_iter().for_each(Region::acknowledge);
    while let Some(copy) = map.take(LARGE) {
        copy.acknowledge();
    }
    assert!(writers.iter_mut().all(may_be_answered), "those outside find nothing left to wait for");
}

#[test]
fn d7_a_write_of_a_whole_disk_waits_for_all_of_it() {
    let map = synchronous(1 << 20);
    let mut owed = write(&map, 0, 1 << 20);
    let mut copies = 0;
    while let Some(copy) = map.take_waited(1 << 24) {
        assert!(!may_be_answered(&mut owed));
        copy.acknowledge();
        copies += 1;
    }
    assert_eq!(copies, 256);
    assert!(may_be_answered(&mut owed));
}

#[test]
fn d7_what_is_being_verified_is_copied_for_who_waits_and_verified_again() {
    let map = synchronous(64);
    map.verify(false);
    map.mark(0, G);
    map.take(LARGE).expect("dirty").acknowledge();
    let Found::Claim(claim) = map.claim_to_verify(1) else { panic!("unverified") };
    let mut owed = write(&map, 0, 1);
    assert!(map.take(LARGE).is_none(), "a pass leaves it alone");
    let copy = map.take_waited(LARGE).expect("waited for");
    assert_eq!(claim.settle(|_| false).wrong, None, "it was copied meanwhile");
    copy.acknowledge();
    assert!(may_be_answered(&mut owed));
    assert!(map.unsettled().unverified > 0);
}

#[test]
fn d7_what_is_found_equal_is_as_good_as_copied() {
    let map = synchronous(64);
    let mut owed = write(&map, 0, 1);
    let Found::Claim(claim) = map.claim_to_compare(1) else { panic!("dirty") };
    let mut later = write(&map, 0, 1);
    claim.settle(|_| true);
    assert!(may_be_answered(&mut owed));
    assert!(!may_be_answered(&mut later));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64),
    /// A write of which nobody waits: one that failed.
    Mark(u64, u64),
    Take(usize),
    TakeWaited(usize),
    Acknowledge(usize),
    Lose(usize),
    HangUp(usize),
}

const GRANULES: u64 = 300;

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..GRANULES, prop_oneof![4 => 1..4u64, 1 => 1..GRANULES]);
    prop_oneof![
        4 => run().prop_map(|(first, count)| Step::Write(first, count.min(GRANULES - first))),
        1 => run().prop_map(|(first, count)| Step::Mark(first, count.min(GRANULES - first))),
        2 => (1..100usize).prop_map(Step::Take),
        2 => (1..100usize).prop_map(Step::TakeWaited),
        4 => any::<usize>().prop_map(Step::Acknowledge),
        1 => any::<usize>().prop_map(Step::Lose),
        1 => any::<usize>().prop_map(Step::HangUp),
    ]
}

/// A write, what of it was in no acknowledged copy that began after it, and the takes before it.
struct Writer {
    owed: Owed,
    left: BTreeSet<u64>,
    since: usize,
}

#[derive(Default)]
struct Model {
    writers: Vec<Writer>,
    flying: Vec<(usize, Region)>,
    takes: usize,
}

impl Model {
    fn took(&mut self, region: Option<Region>) -> bool {
        let Some(region) = region else { return false };
        self.takes += 1;
        self.flying.push((self.takes, region));
        true
    }

    fn acknowledge(&mut self, which: usize) {
        let (number, region) = self.flying.swap_remove(which);
        let granules = region.offset() / G..(region.offset() + region.length() as u64) / G;
        for writer in self.writers.iter_mut().filter(|writer| writer.since < number) {
            writer.left.retain(|granule| !granules.contains(granule));
        }
        region.acknowledge();
    }

    /// Nobody is answered too early, and a write that fits a window at once.
    fn check(&mut self) -> Result<(), TestCaseError> {
        for writer in &mut self.writers {
            let (answered, left) = (may_be_answered(&mut writer.owed), writer.left.len());
            prop_assert!(!answered || left == 0, "answered with {left} granules not copied");
            let short = writer.owed.entry.run.count <= 64;
            prop_assert!(answered || left > 0 || !short, "not answered though all is copied");
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn d7_no_history_answers_a_write_before_its_copy_or_never(steps in prop::collection::vec(step(), 1..120)) {
        let map = synchronous(GRANULES);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Write(first, count) => {
                    let owed = write(&map, first, count);
                    let left = (first..first + count).collect();
                    model.writers.push(Writer { owed, left, since: model.takes });
                }
                Step::Mark(first, count) => map.mark(first * G, count * G),
                Step::Take(most) => drop(model.took(map.take(most * 4096))),
                Step::TakeWaited(most) => drop(model.took(map.take_waited(most * 4096))),
                Step::Acknowledge(_) | Step::Lose(_) if model.flying.is_empty() => {}
                Step::Acknowledge(which) => model.acknowledge(which % model.flying.len()),
                Step::Lose(which) => drop(model.flying.swap_remove(which % model.flying.len())),
                Step::HangUp(_) if model.writers.is_empty() => {}
                Step::HangUp(which) => drop(model.writers.swap_remove(which % model.writers.len())),
            }
            model.check()?;
        }
        // A mirror that does nothing but what is waited for answers everybody, whatever is written meanwhile.
        for round in 0..4 * GRANULES {
            model.check()?;
            while model.took(map.take_waited(LARGE)) {}
            if model.flying.is_empty() {
                break;
            }
            map.mark(round % GRANULES * G, G);
            model.acknowledge(0);
        }
        for writer in &mut model.writers {
            prop_assert!(may_be_answered(&mut writer.owed), "{:?}", writer.left);
        }
    }
}
