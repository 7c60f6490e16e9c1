//! The exploration: every order in which things can happen between two or three hosts, over the product's own
//! transition function. `docs/exploration.md` says in which bounds, how many states, and how long it takes.
//!
//! An explicit state graph, breadth first. A state is the record, disk and process of each host, everything that was
//! ever sent, and the faults that may still happen ([`world`]); a move is an event at one host, put to
//! `ownership::next` ([`model`], [`operator`]). In each state, and of the whole graph, `checks.rs` says what must be
//! true; a violation is told as the shortest story that leads there.
//!
//! What may happen: up to four attempts, also back (A to B to A); each message lost, late and repeated; a process that
//! dies, between and inside commits; a power loss that undoes what was seen and not yet durable; a commit that fails;
//! `recover` with each of its words, against a peer that answers and one that is silent; a state directory that is
//! copied or lost; guest writes wherever a guest door is open.
//!
//! That the checks see something is shown by taking each rule out of the product in turn (`mutants.rs`). What cannot be
//! taken out here, because the model has no such thing:
//!
//! - M1: other lineages, and messages that reach a host they are not for. One guest is modelled. (Unit tests.)
//! - M3: that one thread decides; M4: temporary names, verifying, fsync and rename. Below `Save` and the keeper's lock.
//! - M7: a second claim in another lineage is another guest; tmpfs.
//! - M8: what is printed, and that hellos are authenticated. Locks on disks, and records written ahead.
//! - M10: a clock. `next` has none, and whatever a time limit could do may happen here at any time.
//! - M11: the VMM, its state and its end. D1 to D5, D7 to D11, D13, D14: the data path is one move, the final pass.
//!
//! Three refusals were not missed within three hosts, two attempts, a crash and two words, for nothing bad follows: a
//! word (`--take-ownership`, `--forget-peer`) on an offer whose attempt still lives, and that who gave or is sealed
//! does not fence itself. The transition table pins them; they keep the user's view simple.
//!
//! One move is a demand and not yet a description: when the commit of OFFERED failed and is made good later, no driver
//! is left, and whoever makes it good must end that offer.

mod book;
mod checks;
mod messages;
mod model;
mod mutants;
mod operator;
mod search;
mod story;
mod world;

use std::fmt::{Display, Write as _};

use model::Bounds;
use mutants::Rules;
use search::explore;

/// More states than that are none of a test's business.
const MOST: usize = 40_000_000;

/// What is explored in every run, and how many states that has: a change of the rules or of the model shows here.
const EXPLORED: &[(&str, usize)] = &[
    ("hosts=2,attempts=3,crashes=1,words=1,writes=2", 1_149_915),
    ("hosts=2,attempts=2,crashes=2,powers=1,failures=1,words=1", 749_034),
    ("hosts=3,attempts=3,crashes=1", 400_803),
    ("hosts=3,attempts=3,crashes=1,words=1,writes=0", 1_481_522),
    ("hosts=3,attempts=2,crashes=1,words=2", 525_939),
    ("hosts=3,attempts=2,crashes=1,words=1,mishaps=1", 1_362_521),
];

#[test]
fn all_rules_together_hold_in_every_state() {
    for (text, states) in EXPLORED {
        let report = explore(&Bounds::parse(text), Rules::all(), MOST);
        say(format_args!("{report}  {text}"));
        let wrong = report.wrong.map(|wrong| wrong.story);
        assert!(wrong.is_none(), "{text}:\n{}", wrong.unwrap_or_default());
        assert_eq!(report.states, *states, "the states within {text}: write the new number here if that is meant");
    }
}

#[test]
fn every_rule_is_missed_when_it_is_taken_out() {
    let mut table = String::new();
    for (mutant, rule, without) in mutants::ALL {
        let bounds = mutant.bounds();
        let report = explore(&Bounds::parse(bounds), Rules::all_but(*mutant), MOST);
        let found = match &report.wrong {
            Some(wrong) => format!("{}, {} moves", wrong.wrong.kind(), wrong.moves),
            None => "NOTHING".to_owned(),
        };
        writeln!(table, "{rule:<4}| {without:<66}| {found:<23}| {bounds}").expect("a string");
        println!("{rule}: {without}\n{}", report.wrong.map(|wrong| wrong.story).unwrap_or_default());
    }
    let pinned = include_str!("mutants.txt");
    assert!(table == pinned && !table.contains("NOTHING"), "what is missed without each rule is now\n{table}");
}

/// Larger bounds, by hand: `BLOCKFERRY_EXPLORE='hosts=3,attempts=3,crashes=2;...' cargo test --release --test explore
/// larger`.
#[test]
fn larger_bounds_by_hand() {
    let Ok(all) = std::env::var("BLOCKFERRY_EXPLORE") else { return };
    for text in all.split(';') {
        let report = explore(&Bounds::parse(text), Rules::all(), usize::MAX);
        say(format_args!("{report}  {text}"));
        assert!(report.wrong.is_none(), "{text}:\n{}", report.wrong.map(|wrong| wrong.story).unwrap_or_default());
    }
}

/// Says it in the log of every run, which libtest keeps from tests that pass.
fn say(line: impl Display) {
    let line = format!("explore: {line}\n");
    let _ = std::io::Write::write_all(&mut std::io::stdout().lock(), line.as_bytes());
}
