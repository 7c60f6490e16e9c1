//! Histories of guest writes, copies, lost connections, comparisons and verifications, against a model that knows what
//! each side really holds.
//!
//! The model has a number for the content of each granule on both sides. A guest write changes the source's; a copy
//! reads it when it is sent and changes the destination's when it lands, somewhere before it is acknowledged, given
//! back or, when its connection was lost, before the fence is answered. A claim is hashed on either side at a moment of
//! its own. If the map is right, no region is ever believed wrong, and in the end both sides are equal and every region
//! that was copied has been verified with its last content. The same histories with a mistake in the book-keeping do
//! find one: that is what the last test shows.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::{Claim, Found};
use crate::dirty::{DirtyMap, Granules, Region};
use crate::limits::DIGEST_REGION_MIN;

const G: u64 = 4096;
const PER_REGION: usize = 16;

#[derive(Debug, Clone)]
enum Step {
    Write {
        first: usize,
        count: usize,
    },
    Take {
        max: usize,
    },
    /// A copy reads the source: what it read is what it carries.
    Send {
        which: usize,
    },
    Land {
        which: usize,
    },
    Acknowledge {
        which: usize,
    },
    /// All connections are lost and fenced.
    Cut {
        landed: bool,
    },
    Compare {
        most: u64,
    },
    Claim {
        most: u64,
    },
    HashHere {
        which: usize,
    },
    HashThere {
        which: usize,
    },
    Settle {
        which: usize,
    },
    Drop {
        which: usize,
    },
}

/// What somebody may get wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// A copy is not marked as unverified.
    CopyNotMarked,
    /// A region is claimed although a copy of it is in flight.
    ClaimWhileTaken,
    /// A difference is believed although the region was marked again.
    NoSecondLook,
    /// What is found equal in a comparison is cleared when it is known, not when it is claimed: a write between the two
    /// is wiped off.
    ComparedBeforeTaken,
}

fn step(granules: usize) -> impl Strategy<Value = Step> {
    let which = || 0..6usize;
    prop_oneof![
        4 => (0..granules, 1..40usize).prop_map(|(first, count)| Step::Write { first, count }),
        4 => (1..60usize).prop_map(|max| Step::Take { max }),
        4 => which().prop_map(|which| Step::Send { which }),
        4 => which().prop_map(|which| Step::Land { which }),
        4 => which().prop_map(|which| Step::Acknowledge { which }),
        1 => any::<bool>().prop_map(|landed| Step::Cut { landed }),
        1 => (1..4u64).prop_map(|most| Step::Compare { most }),
        5 => (1..4u64).prop_map(|most| Step::Claim { most }),
        5 => which().prop_map(|which| Step::HashHere { which }),
        5 => which().prop_map(|which| Step::HashThere { which }),
        4 => which().prop_map(|which| Step::Settle { which }),
        1 => which().prop_map(|which| Step::Drop { which }),
    ]
}

struct Copy {
    region: Region,
    carried: Option<Vec<u64>>,
    landed: bool,
}

struct Check {
    claim: Claim,
    here: Option<Vec<u64>>,
    there: Option<Vec<u64>>,
}

struct World {
    map: Arc<DirtyMap>,
    mistake: Mistake,
    here: Vec<u64>,
    there: Vec<u64>,
    ever_copied: Vec<bool>,
    copies: Vec<Copy>,
    checks: Vec<Check>,
    /// What both sides agreed on, by region.
    table: BTreeMap<u64, Vec<u64>>,
    serial: u64,
}

impl World {
    fn new(granules: usize, stale: bool, mistake: Mistake) -> Self {
        let map = DirtyMap::new(granules as u64 * G);
        assert_eq!(DIGEST_REGION_MIN / map.granularity(), PER_REGION as u64);
        map.verify(false);
        map.mark_for_bulk(0, granules as u64 * G);
        let here: Vec<u64> = (1..=granules as u64).collect();
        // An older copy, half of it right.
        let there = here.iter().map(|n| if stale && n / 32 % 2 == 0 { *n } else { 0 }).collect();
        Self {
            map,
            mistake,
            here,
            there,
            ever_copied: vec![false; granules],
            copies: Vec::new(),
            checks: Vec::new(),
            table: BTreeMap::new(),
            serial: 1000,
        }
    }

    fn range(region: &Region) -> std::ops::Range<usize> {
        let first = usize::try_from(region.offset() / G).expect("small");
        first..first + region.length() / 4096
    }

    fn granules(&self, first: u64, count: usize) -> std::ops::Range<usize> {
        let first = usize::try_from(first).expect("small") * PER_REGION;
        first..(first + count * PER_REGION).min(self.here.len())
    }

    fn land(&mut self, which: usize) {
        let copy = &mut self.copies[which];
        if let Some(carried) = &copy.carried {
            let range = Self::range(&copy.region);
            self.ever_copied[range.clone()].fill(true);
            self.there[range].copy_from_slice(carried);
            copy.landed = true;
        }
    }

    /// A history in one step; `Err`: a region is believed wrong that is not.
    fn play(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Write { first, count } => {
                let end = (first + count).min(self.here.len());
                self.serial += 1;
                self.here[first..end].fill(self.serial);
                let (offset, length) = (first as u64 * G, (end - first) as u64 * G);
                self.map.mark(offset, length);
            }
            Step::Take { max } => {
                if let Some(region) = self.map.take(max * 4096) {
                    let range = Self::range(&region);
                    if self.mistake == Mistake::CopyNotMarked {
                        let mut inner = self.map.lock();
                        let touched = inner.checks.touched(region.run);
                        inner.checks.unverified.as_mut().expect("verified").clear(touched);
                    }
                    let held = self.checks.iter().any(|check| {
                        let checked = self.granules(check.claim.first(), check.claim.count());
                        checked.start < range.end && range.start < checked.end
                    });
                    prop_assert!(!held, "a copy was begun of what is being hashed");
                    self.copies.push(Copy { region, carried: None, landed: false });
                }
            }
            Step::Send { which } => {
                if let Some(copy) = self.copies.get_mut(which).filter(|copy| copy.carried.is_none()) {
                    copy.carried = Some(self.here[Self::range(&copy.region)].to_vec());
                }
            }
            Step::Land { which } if which < self.copies.len() && !self.copies[which].landed => self.land(which),
            Step::Acknowledge { which } if self.copies.get(which).is_some_and(|copy| copy.landed) => {
                self.copies.swap_remove(which).region.acknowledge();
            }
            Step::Cut { landed } => {
                for which in 0..self.copies.len() {
                    if landed && !self.copies[which].landed {
                        self.land(which);
                    }
                }
                self.copies.clear();
                self.checks.clear();
            }
            Step::Compare { most } => {
                if let Found::Claim(claim) = self.map.claim_to_compare(most) {
                    prop_assert!(claim.compares());
                    self.checks.push(Check { claim, here: None, there: None });
                }
            }
            Step::Claim { most } => {
                let hidden = match self.mistake {
                    Mistake::ClaimWhileTaken => std::mem::take(&mut self.map.lock().taken),
                    _ => heapless::Vec::new(),
                };
                let found = self.map.claim_to_verify(most);
                self.map.lock().taken.extend(hidden);
                if let Found::Claim(claim) = found {
                    prop_assert!(!claim.compares());
                    self.checks.push(Check { claim, here: None, there: None });
                }
            }
            Step::HashHere { which } => {
                if let Some(check) = self.checks.get(which).filter(|check| check.here.is_none()) {
                    let range = self.granules(check.claim.first(), check.claim.count());
                    self.checks[which].here = Some(self.here[range].to_vec());
                }
            }
            Step::HashThere { which } => {
                if let Some(check) = self.checks.get(which).filter(|check| check.there.is_none()) {
                    let range = self.granules(check.claim.first(), check.claim.count());
                    self.checks[which].there = Some(self.there[range].to_vec());
                }
            }
            Step::Settle { which } if self.checks.get(which).is_some_and(|c| c.here.is_some() && c.there.is_some()) => {
                self.settle(which)?;
            }
            Step::Drop { which } if which < self.checks.len() => drop(self.checks.swap_remove(which)),
            _ => {}
        }
        Ok(())
    }

    fn settle(&mut self, which: usize) -> Result<(), TestCaseError> {
        let Check { claim, here, there } = self.checks.swap_remove(which);
        let (here, there) = (here.expect("hashed"), there.expect("hashed"));
        let (first, count) = (claim.first(), claim.count());
        let part = |all: &[u64], region: u64| -> Vec<u64> {
            let at = usize::try_from(region - first).expect("small") * PER_REGION;
            all[at..(at + PER_REGION).min(all.len())].to_vec()
        };
        for region in first..first + count as u64 {
            if part(&here, region) == part(&there, region) {
                self.table.insert(region, part(&here, region));
            }
        }
        if self.mistake == Mistake::NoSecondLook {
            let differs = (first..first + count as u64).find(|r| part(&here, *r) != part(&there, *r));
            prop_assert!(claim.compares() || differs.is_none(), "believed without a second look");
        }
        if self.mistake == Mistake::ComparedBeforeTaken && claim.compares() {
            let mut inner = self.map.lock();
            for region in first..first + count as u64 {
                let granules = inner.checks.granules(region, region + 1, inner.bits.granules);
                inner.bits.clear(granules);
                inner.checks.unverified.as_mut().expect("verified").clear(Granules { first: region, count: 1 });
            }
        }
        let settled = claim.settle(|region| part(&here, region) == part(&there, region));
        prop_assert_eq!(settled.wrong, None, "nobody tampered with anything");
        Ok(())
    }

    /// The guest is quiesced: copies and verifies to the end.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        self.play(&Step::Cut { landed: false })?;
        for _ in 0..self.here.len() * 8 {
            let before = self.map.unsettled();
            if before.outstanding.granules == 0 && before.unverified == 0 {
                break;
            }
            for step in [
                Step::Take { max: 64 },
                Step::Send { which: 0 },
                Step::Land { which: 0 },
                Step::Acknowledge { which: 0 },
                Step::Claim { most: 3 },
                Step::HashHere { which: 0 },
                Step::HashThere { which: 0 },
                Step::Settle { which: 0 },
            ] {
                self.play(&step)?;
            }
        }
        let left = self.map.unsettled();
        prop_assert_eq!((left.outstanding.granules, left.unverified), (0, 0), "it comes to an end");
        prop_assert_eq!(&self.here, &self.there, "nothing is lost");
        for region in 0..self.here.len().div_ceil(PER_REGION) {
            let range = self.granules(region as u64, 1);
            if self.ever_copied[range.clone()].iter().any(|copied| *copied) {
                let agreed = self.table.get(&(region as u64)).map(Vec::as_slice);
                prop_assert_eq!(agreed, Some(&self.here[range]), "region {} as it is now", region);
            }
        }
        Ok(())
    }
}

fn histories() -> impl Strategy<Value = (usize, bool, Vec<Step>)> {
    (17..100usize)
        .prop_flat_map(|granules| (Just(granules), any::<bool>(), prop::collection::vec(step(granules), 1..160)))
}

fn live(granules: usize, stale: bool, steps: &[Step], mistake: Mistake) -> Result<(), TestCaseError> {
    let mut world = World::new(granules, stale, mistake);
    for step in steps {
        world.play(step)?;
    }
    world.finish()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn d14_no_history_makes_a_right_copy_look_wrong_or_leaves_one_unverified(
        (granules, stale, steps) in histories()
    ) {
        live(granules, stale, &steps, Mistake::None)?;
    }
}

#[test]
fn d14_each_mistake_in_the_book_keeping_is_found() {
    for mistake in
        [Mistake::CopyNotMarked, Mistake::ClaimWhileTaken, Mistake::NoSecondLook, Mistake::ComparedBeforeTaken]
    {
        let config = Config { cases: 20_000, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
        let found = TestRunner::new(config)
            .run(&histories(), |(granules, stale, steps)| live(granules, stale, &steps, mistake));
        assert!(found.is_err(), "{mistake:?} went unnoticed");
    }
}

#[test]
fn a_verification_is_never_outstanding_and_a_comparison_always_is() {
    let map = DirtyMap::new(64 * G);
    map.verify(false);
    map.mark_for_bulk(0, 64 * G);
    let Found::Claim(compared) = map.claim_to_compare(2) else { panic!("dirty") };
    assert_eq!(map.outstanding().granules, 64);
    assert!(map.take(1 << 20).is_some_and(|region| region.offset() == 32 * G), "D4: not what is being compared");
    let settled = compared.settle(|region| region == 0);
    assert_eq!((settled.equal, settled.wrong), (DIGEST_REGION_MIN, None));
    assert_eq!(map.outstanding().granules, 48);
    while let Some(region) = map.take(1 << 20).or_else(|| map.take(1 << 20)) {
        region.acknowledge();
    }
    assert_eq!((map.unsettled().outstanding.granules, map.unsettled().unverified), (0, 48 * G));
    let Found::Claim(verified) = map.claim_to_verify(8) else { panic!("unverified") };
    assert_eq!((map.unsettled().outstanding.granules, map.unsettled().unverified), (0, 48 * G));
    map.mark(20 * G, 1);
    assert_eq!(map.outstanding().granules, 1, "what is written meanwhile is outstanding at once");
    assert!(map.take(1 << 20).or_else(|| map.take(1 << 20)).is_none(), "and copied when it has been hashed");
    let settled = verified.settle(|region| region != 1);
    assert_eq!(settled.wrong, None, "it was written meanwhile");
    map.take(1 << 20).expect("dirty").acknowledge();
    assert_eq!(map.unsettled().unverified, 16 * G);
}

#[test]
fn what_is_clean_is_not_compared() {
    let map = DirtyMap::new(128 * G);
    // The last granule of region 1, the first of region 4 and all of 5.
    map.mark_for_bulk(31 * G, G);
    map.mark_for_bulk(64 * G, G);
    map.mark_for_bulk(80 * G, 16 * G);
    let mut asked = Vec::new();
    let mut claims = Vec::new();
    while let Found::Claim(claim) = map.claim_to_compare(32) {
        asked.push((claim.first(), claim.count()));
        claims.push(claim);
    }
    assert_eq!(asked, [(1, 1), (4, 2)]);
    let equal: u64 = claims.into_iter().map(|claim| claim.settle(|_| true).equal).sum();
    assert_eq!((equal, map.outstanding().granules), (3 * DIGEST_REGION_MIN, 0));
}

#[test]
fn a_region_that_nothing_has_touched_and_that_differs_is_wrong() {
    let map = DirtyMap::new(64 * G);
    map.verify(true);
    let Found::Claim(claim) = map.claim_to_verify(32) else { panic!("all of it is unverified") };
    assert_eq!((claim.first(), claim.count()), (0, 4));
    let settled = claim.settle(|region| region < 2);
    assert_eq!((settled.equal, settled.wrong), (2 * DIGEST_REGION_MIN, Some(2)));
    assert_eq!(map.unsettled().unverified, 2 * DIGEST_REGION_MIN, "and not verified");
}
