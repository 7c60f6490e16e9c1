//! The fault harness: rounds of a migration under a writing guest, in each of which something dies, breaks, fills up or
//! loses its power, and after each of which there must be one owner that has every write. docs/torture.md says what the
//! faults are and what is looked at.
//!
//! `BLOCKFERRY_TORTURE='seed=7,rounds=100,jobs=2,fault=cut'` says which rounds; `cargo xtask torture` sets it.

mod check;
mod media;
mod plan;
mod round;
mod selftest;
mod site;
mod stage;
mod table;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crate::harness::scratch;
use crate::images::disk_scratch;
use plan::{Fault, Plan};
use round::{Outcome, Witness};
use table::{Row, Table};

/// Which rounds are run.
#[derive(Debug, Clone, Copy)]
struct Asked {
    seed: u64,
    rounds: u64,
    jobs: u64,
    fault: Option<Fault>,
}

impl Asked {
    /// What continuous integration runs.
    const USUAL: Self = Self { seed: 1, rounds: 30, jobs: 2, fault: None };

    fn parse(text: &str) -> Self {
        let mut asked = Self::USUAL;
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse().unwrap_or_else(|_| panic!("{word}: no number"));
            match key {
                "seed" => asked.seed = number(),
                "rounds" => asked.rounds = number(),
                "jobs" => asked.jobs = number().max(1),
                "fault" => asked.fault = Some(Fault::named(value).unwrap_or_else(|| panic!("{value}: no fault"))),
                _ => panic!("{word}: seed, rounds, jobs and fault are known"),
            }
        }
        asked
    }
}

#[test]
fn the_guest_has_one_owner_and_every_write_whatever_happens() {
    let asked = Asked::parse(&std::env::var("BLOCKFERRY_TORTURE").unwrap_or_default());
    let (next, table) = (AtomicU64::new(0), Mutex::new(Table::default()));
    thread::scope(|scope| {
        for _ in 0..asked.jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= asked.rounds {
                        return;
                    }
                    let seed = asked.seed.wrapping_add(number);
                    let fault = asked.fault.unwrap_or_else(|| Fault::drawn(seed));
                    let row = torture(seed, fault);
                    println!("{row}");
                    table.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(row);
                }
            });
        }
    });
    let table = table.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    println!("{table}");
    assert_eq!(table.failures(), Vec::<String>::new());
}

/// One round, whatever becomes of it.
fn torture(seed: u64, fault: Fault) -> Row {
    let began = Instant::now();
    let row = |result| Row { seed, fault, took: began.elapsed(), result };
    if let Some(why) = fault.missing() {
        eprintln!("SKIP: {}: {why}", fault.name());
        return row(Ok(None));
    }
    let plan = Plan::drawn(seed, fault);
    let folders = [scratch(), disk_scratch()];
    let mut witness = Witness::default();
    let result =
        catch_unwind(AssertUnwindSafe(|| round::run(&plan, (folders[0].path(), folders[1].path()), &mut witness)));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("a panic").to_owned())
    });
    if let Err(cause) = &result {
        lament(&plan, cause, &witness);
        let kept = folders.map(tempfile::TempDir::keep);
        eprintln!("kept: {} {}", kept[0].display(), kept[1].display());
    }
    row(result.map(Some))
}

/// Everything that is known of a round that failed.
fn lament(plan: &Plan, cause: &str, witness: &Witness) {
    let blows: Vec<String> = plan.blows.iter().map(ToString::to_string).collect();
    let mut text = format!("---- round {} ({}) failed: {cause}\n", plan.seed, plan.fault.name());
    text.push_str(&format!("again: {}\n{plan:?}\nplanned: {}\n", again(plan.seed, plan.fault), blows.join("; ")));
    if let Some(stage) = &witness.stage {
        text.push_str(&format!("happened:\n{}\n", stage.story()));
        let third = witness.third.as_deref();
        for site in [&stage.a, &stage.b].into_iter().chain(third) {
            let log = std::fs::read_to_string(site.log_file()).unwrap_or_default();
            let from = log.lines().count().saturating_sub(LOG_LINES);
            text.push_str(&format!("log of {}:\n", site.name));
            log.lines().skip(from).for_each(|line| text.push_str(&format!("  {line}\n")));
        }
    }
    eprint!("{text}");
}

/// So many lines of each log are printed; the folders have all.
const LOG_LINES: usize = 200;

/// The command that repeats a round.
fn again(seed: u64, fault: Fault) -> String {
    format!("cargo xtask torture --seed {seed} --rounds 1 --fault {}", fault.name())
}
