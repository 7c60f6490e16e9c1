//! How regions are split into runs, and the budget.

use std::time::{Duration, Instant};

use super::Budget;
use super::runs::{Run, Runs};
use crate::limits::{MIB, REGION_REQUESTS_MAX, ZERO_RUN_MIN};

fn runs(bytes: &[u8]) -> Vec<Run> {
    let found: Vec<_> = Runs::new(bytes, 512).collect();
    let mut at = 0;
    for run in &found {
        assert_eq!(run.start, at, "runs follow each other");
        assert!(run.length > 0);
        assert!(!run.zero || bytes[run.start..run.start + run.length].iter().all(|b| *b == 0));
        at += run.length;
    }
    assert_eq!(at, bytes.len(), "nothing is left out");
    assert!(found.len() <= REGION_REQUESTS_MAX);
    found
}

#[test]
fn a_region_of_zeroes_is_one_run_however_short() {
    for length in [512, 4096, MIB] {
        assert_eq!(runs(&vec![0; length]), [Run { start: 0, length, zero: true }]);
    }
}

#[test]
fn data_between_zeroes_travels_by_itself() {
    let mut bytes = vec![0; MIB];
    bytes[100_000] = 1;
    assert_eq!(
        runs(&bytes),
        [
            Run { start: 0, length: 98_304, zero: true },
            Run { start: 98_304, length: 4096, zero: false },
            Run { start: 102_400, length: MIB - 102_400, zero: true },
        ]
    );
}

#[test]
fn short_zeroes_travel_as_data() {
    let mut bytes = vec![1; 64 * 1024];
    bytes[4096..4096 + ZERO_RUN_MIN - 4096].fill(0);
    assert_eq!(runs(&bytes).len(), 1);
}

#[test]
fn a_region_full_of_small_holes_is_not_split_without_end() {
    let mut bytes = vec![0; MIB];
    for at in (0..MIB).step_by(ZERO_RUN_MIN + 4096) {
        bytes[at] = 1;
    }
    assert_eq!(runs(&bytes).len(), REGION_REQUESTS_MAX);
}

#[test]
fn the_budget_lets_through_what_it_says() {
    let budget = Budget::new(100 * MIB as u64);
    let began = Instant::now();
    let mut sent = 0;
    while began.elapsed() < Duration::from_millis(200) {
        match budget.spend(MIB) {
            None => sent += MIB,
            Some(time) => std::thread::sleep(time.min(Duration::from_millis(5))),
        }
    }
    let fair = began.elapsed().as_millis() as usize * MIB / 10;
    assert!(sent <= fair + 6 * MIB, "{sent} of {fair}");
    budget.set_rate(0);
    assert!(budget.spend(MIB).is_none(), "no limit");
}
