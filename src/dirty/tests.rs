//! The dirty map against a model that is too simple to be wrong: a vector of booleans and a list of regions.

use std::sync::Arc;

use proptest::prelude::*;

use super::{DirtyMap, Region};
use crate::limits::{GIB, REGIONS_IN_FLIGHT_MAX};

const G: u64 = 4096;

#[test]
fn granularity_keeps_the_map_within_a_mebibyte() {
    assert_eq!(DirtyMap::new(G).granularity(), 4096);
    assert_eq!(DirtyMap::new(32 * GIB).granularity(), 4096);
    assert_eq!(DirtyMap::new(32 * GIB + 512).granularity(), 8192);
    assert_eq!(DirtyMap::new(1024 * GIB).granularity(), 128 * 1024);
}

#[test]
fn a_granule_in_flight_is_not_taken_twice() {
    let map = DirtyMap::new(64 * G);
    map.mark(0, G);
    let first = map.take(1 << 20).expect("dirty");
    map.mark(0, G);
    for _pass in 0..2 {
        assert!(map.take(1 << 20).is_none(), "D4: a copy of it is under way");
    }
    first.acknowledge();
    let second = map.take(1 << 20).expect("it was written meanwhile");
    assert_eq!((second.offset(), second.length()), (0, 4096));
}

#[test]
fn neighbours_of_a_region_in_flight_are_taken_up_to_it() {
    let map = DirtyMap::new(64 * G);
    map.mark(4 * G, 2 * G);
    let middle = map.take(1 << 20).expect("dirty");
    assert!(map.take(1 << 20).is_none());
    map.mark(2 * G, 6 * G);
    let before = map.take(1 << 20).expect("dirty before");
    let after = map.take(1 << 20).expect("dirty after");
    assert_eq!((before.offset(), before.length()), (2 * G, 2 * 4096));
    assert_eq!((after.offset(), after.length()), (6 * G, 2 * 4096));
    drop((middle, before, after));
    assert_eq!(map.outstanding().granules, 6);
}

#[test]
fn a_dropped_region_is_dirty_again() {
    let map = DirtyMap::new(64 * G);
    map.mark(3 * G, G);
    drop(map.take(1 << 20));
    assert_eq!(map.outstanding().granules, 1);
    assert!(map.take(1 << 20).is_none(), "the pass is over; the next one finds it");
    map.take(1 << 20).expect("given back").acknowledge();
    assert_eq!(map.outstanding().granules, 0);
}

#[test]
fn the_last_granule_may_be_short() {
    let map = DirtyMap::new(5 * G + 512);
    map.mark(5 * G + 100, 1 << 30);
    let region = map.take(1 << 20).expect("dirty");
    assert_eq!((region.offset(), region.length()), (5 * G, 512));
}

#[test]
fn nothing_is_handed_out_that_could_not_be_remembered() {
    let map = DirtyMap::new(4096 * G);
    map.mark(0, 4096 * G);
    let held: Vec<_> = std::iter::from_fn(|| map.take(4096)).collect();
    assert_eq!(held.len(), REGIONS_IN_FLIGHT_MAX);
    assert_eq!(map.outstanding().granules, 4096);
}

#[derive(Debug, Clone)]
enum Step {
    Mark { offset: u64, length: u64 },
    Take { max: usize },
    Acknowledge { which: usize },
    GiveBack { which: usize },
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..size, prop_oneof![1..4 * G, 1..size]).prop_map(|(offset, length)| Step::Mark { offset, length }),
        4 => (0..40 * 4096usize).prop_map(|max| Step::Take { max }),
        2 => (0..8usize).prop_map(|which| Step::Acknowledge { which }),
        1 => (0..8usize).prop_map(|which| Step::GiveBack { which }),
    ]
}

fn run_of(region: &Region) -> std::ops::Range<usize> {
    let first = usize::try_from(region.offset() / G).expect("small");
    first..first + region.length().div_ceil(4096)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_map_agrees_with_the_model(
        (size, steps) in (1..9000u64).prop_flat_map(|g| (Just(g * G - 512), prop::collection::vec(step(g * G), 1..60)))
    ) {
        let map = DirtyMap::new(size);
        let granules = usize::try_from(size.div_ceil(G)).expect("small");
        let mut dirty = vec![false; granules];
        let mut held: Vec<Region> = Vec::new();
        for step in steps {
            match step {
                Step::Mark { offset, length } => {
                    map.mark(offset, length);
                    let end = (offset + length).min(size);
                    if offset < end {
                        let last = usize::try_from(end.div_ceil(G)).expect("small");
                        dirty[usize::try_from(offset / G).expect("small")..last].fill(true);
                    }
                }
                Step::Take { max } => {
                    let taken = map.take(max).or_else(|| map.take(max));
                    let free = |g: usize, held: &[Region]| !held.iter().any(|r| run_of(r).contains(&g));
                    match taken {
                        Some(region) => {
                            prop_assert!(region.length() <= max.max(4096));
                            for g in run_of(&region) {
                                prop_assert!(dirty[g], "granule {} was clean", g);
                                prop_assert!(free(g, &held), "granule {} is in flight", g);
                                dirty[g] = false;
                            }
                            held.push(region);
                        }
                        None => prop_assert!((0..granules).all(|g| !dirty[g] || !free(g, &held))
                            || held.len() == REGIONS_IN_FLIGHT_MAX),
                    }
                }
                Step::Acknowledge { which } if which < held.len() => held.swap_remove(which).acknowledge(),
                Step::GiveBack { which } if which < held.len() => {
                    let region = held.swap_remove(which);
                    dirty[run_of(&region)].fill(true);
                    drop(region);
                }
                Step::Acknowledge { .. } | Step::GiveBack { .. } => {}
            }
            let taken: usize = held.iter().map(|r| run_of(r).len()).sum();
            let expected = dirty.iter().filter(|d| **d).count() + taken;
            prop_assert_eq!(map.outstanding().granules, expected as u64);
        }
        drop(held);
        let mut left = 0;
        while let Some(region) = map.take(1 << 20).or_else(|| map.take(1 << 20)) {
            left += 1;
            region.acknowledge();
        }
        prop_assert!(left <= granules);
        prop_assert_eq!(map.outstanding().granules, 0);
    }
}

#[test]
fn marks_and_takes_from_many_threads_lose_nothing() {
    let map = DirtyMap::new(1024 * G);
    let writers: Vec<_> = (0..2u64)
        .map(|seed| {
            let map = Arc::clone(&map);
            std::thread::spawn(move || {
                let mut x = seed * 2 + 1;
                for _ in 0..20_000 {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    map.mark((x >> 33) % (1024 * G), 1);
                }
            })
        })
        .collect();
    let copier = {
        let map = Arc::clone(&map);
        std::thread::spawn(move || {
            for turn in 0..40_000 {
                if let Some(region) = map.take(64 * 1024)
                    && turn % 3 > 0
                {
                    region.acknowledge();
                }
            }
        })
    };
    for thread in writers.into_iter().chain([copier]) {
        thread.join().expect("no panic");
    }
    while let Some(region) = map.take(1 << 20).or_else(|| map.take(1 << 20)) {
        region.acknowledge();
    }
    assert_eq!(map.outstanding().granules, 0);
}
