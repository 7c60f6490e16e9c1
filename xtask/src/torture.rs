//! `cargo xtask torture`: rounds of the fault harness against the static executable. The rounds themselves are a test,
//! `tests/it/torture.rs`, which continuous integration runs with a few of them; here is who asks for many.

use crate::build;
use crate::util::{self, Error, Output, Result};
use std::time::Duration;

/// Most rounds that can be asked for.
const ROUNDS_MAX: u64 = 100_000;
/// Most rounds side by side.
const JOBS_MAX: u64 = 64;
/// Rounds, if nobody says otherwise.
const ROUNDS: u64 = 100;
/// How long a round may take, with everything that it waits for.
const ROUND: Duration = Duration::from_secs(120);
/// How long the tests may take to be built.
const BUILD: Duration = Duration::from_secs(600);

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    seed: u64,
    rounds: u64,
    jobs: u64,
    fault: Option<String>,
}

/// `cargo xtask torture [--seed N] [--rounds N] [--jobs N] [--fault NAME]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let asked = parse(arguments)?;
    let executable = build::static_executable()?.place;
    let mut words = format!("seed={},rounds={},jobs={}", asked.seed, asked.rounds, asked.jobs);
    if let Some(fault) = &asked.fault {
        words.push_str(&format!(",fault={fault}"));
    }
    let mut cargo = util::cargo()?;
    cargo.args(["test", "--locked", "--package", "blockferry", "--test", "it", "--"]);
    cargo.args(["--exact", "torture::the_guest_has_one_owner_and_every_write_whatever_happens", "--nocapture"]);
    cargo.env("PATH", util::wide_path()).env("BLOCKFERRY_BIN", executable).env("BLOCKFERRY_TORTURE", words);
    let rounds = u32::try_from(asked.rounds).unwrap_or(u32::MAX);
    util::run("torture", &mut cargo, BUILD + ROUND.saturating_mul(rounds), Output::Shown).map(drop)
}

fn parse(arguments: &[String]) -> Result<Asked> {
    let mut asked = Asked { seed: 1, rounds: ROUNDS, jobs: 2, fault: None };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| Error::usage("torture", word, "wants a value"))?;
        let number = |most| {
            let number = value.parse().ok().filter(|number| (1..=most).contains(number));
            number.ok_or_else(|| Error::usage("torture", word, format!("wants 1 to {most}")))
        };
        match word.as_str() {
            "--seed" => asked.seed = value.parse().map_err(|_| Error::usage("torture", word, "wants a number"))?,
            "--rounds" => asked.rounds = number(ROUNDS_MAX)?,
            "--jobs" => asked.jobs = number(JOBS_MAX)?,
            "--fault" if value.chars().all(|c| c.is_ascii_lowercase() || c == '-') => asked.fault = Some(value.clone()),
            "--fault" => return Err(Error::usage("torture", value, "no fault; docs/torture.md lists them")),
            _ => return Err(Error::usage("torture", word, "the options are --seed, --rounds, --jobs and --fault")),
        }
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Asked> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_line_that_repeats_a_round_is_understood() {
        let asked = parsed("--seed 7 --rounds 1 --fault kill-both").expect("a good line");
        assert_eq!(asked, Asked { seed: 7, rounds: 1, jobs: 2, fault: Some("kill-both".to_owned()) });
        assert_eq!(parsed("").expect("everything has a default").rounds, ROUNDS);
    }

    #[test]
    fn other_words_are_usage_errors() {
        for line in ["--seed", "--seed x", "--rounds 0", "--jobs 65", "--fault a,b", "7 8"] {
            assert_eq!(parsed(line).expect_err(line).exit, 2, "{line}");
        }
    }
}
