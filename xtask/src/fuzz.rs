//! `cargo xtask fuzz`: goes on feeding the parsers where `cargo xtask test` has stopped. What is fed, and how, is in
//! `tests/fuzz`.

use crate::util::{self, Error, Output, Result};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest that can be asked for, in seconds.
const SECONDS_MAX: u64 = 7 * 24 * 3600;
/// How long each target is fed, in seconds, if nobody says otherwise.
const SECONDS: u64 = 30;
/// Targets side by side: one for each is fed by one thread.
const TARGETS_MAX: u32 = 64;
/// How long the program may take to be built.
const BUILD: Duration = Duration::from_secs(600);

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    seconds: u64,
    seed: Option<u64>,
    target: Option<String>,
}

/// `cargo xtask fuzz [--seconds N] [--seed N] [--target NAME]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let asked = parse(arguments)?;
    // Another one each time; the line that names it is enough to repeat the run.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    let seed = asked.seed.unwrap_or(now);
    println!("xtask: fuzz: {} s for each target, --seed {seed}", asked.seconds);
    let mut cargo = util::cargo()?;
    cargo.args(["test", "--locked", "--package", "blockferry", "--test", "fuzz", "--", "--nocapture"]);
    cargo.args(&asked.target);
    cargo.env("BLOCKFERRY_FUZZ", format!("seconds={},seed={seed}", asked.seconds));
    let limit = BUILD + Duration::from_secs(asked.seconds).saturating_mul(TARGETS_MAX);
    util::run("fuzz", &mut cargo, limit, Output::Shown).map(drop)
}

fn parse(arguments: &[String]) -> Result<Asked> {
    let mut asked = Asked { seconds: SECONDS, seed: None, target: None };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| Error::usage("fuzz", word, "wants a value"))?;
        let number = value.parse::<u64>().map_err(|_| Error::usage("fuzz", word, "wants a number"));
        match word.as_str() {
            "--seconds" => {
                let bounds = Error::usage("fuzz", word, format!("wants 1 to {SECONDS_MAX}"));
                asked.seconds = number?;
                if !(1..=SECONDS_MAX).contains(&asked.seconds) {
                    return Err(bounds);
                }
            }
            "--seed" => asked.seed = Some(number?),
            "--target" => asked.target = Some(value.clone()),
            _ => return Err(Error::usage("fuzz", word, "the options are --seconds, --seed and --target")),
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
    fn the_line_that_repeats_a_run_is_understood() {
        let asked = parsed("--seconds 60 --seed 7 --target nbd_session").expect("a good line");
        assert_eq!(asked, Asked { seconds: 60, seed: Some(7), target: Some("nbd_session".to_owned()) });
        assert_eq!(parsed("").expect("everything has a default").seconds, SECONDS);
    }

    #[test]
    fn other_words_are_usage_errors() {
        for line in ["--seconds", "--seconds 0", "--seconds x", "--seed x", "--rounds 1", "7 8"] {
            assert_eq!(parsed(line).expect_err(line).exit, 2, "{line}");
        }
    }
}
