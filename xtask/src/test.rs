//! `cargo xtask test`: everything that tells whether this tree is good.
//!
//! Unit tests run in the dev profile, which is optimised a little and keeps its assertions. The integration tests drive
//! the static executable, by `BLOCKFERRY_BIN`: what is tested is what ships. A step that fails does not keep the others
//! from running; only what needs its product is left out. Each step has a time limit, and so has the whole.

use crate::target::Target;
use crate::util::{self, Error, Output, Result};
use crate::{build, footprint, peers, tidy, vm};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long all steps together may take: less than a continuous integration machine's patience.
const WHOLE: Duration = Duration::from_secs(22 * 60);
/// How long one step may take. The build and apt have limits of their own below it.
const STEP: Duration = Duration::from_secs(14 * 60);

/// How many tests run at once, for each core. With two, the integration tests take 0.6 of the time on two cores.
const TESTS_PER_CORE: usize = 2;

/// `cargo xtask test [--quick]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let quick = match arguments {
        [] => false,
        [word] if word == "--quick" => true,
        [word, ..] => return Err(Error::usage("test", word, "the only option is --quick")),
    };
    let mut steps = Steps::new(WHOLE);
    if quick {
        quickly(&mut steps);
    } else {
        fully(&mut steps);
    }
    steps.summary()
}

/// What answers in seconds: no peers are installed, no clippy, and integration tests take the dev profile's program.
fn quickly(steps: &mut Steps) {
    steps.step("rules", |_| tidy::rules());
    steps.step("fmt", tidy::fmt);
    steps.step("tests of xtask", |limit| cargo_test(&CHORES, None, limit));
    steps.step("unit tests", |limit| cargo_test(&UNITS, None, limit));
    steps.step("integration tests", |limit| cargo_test(&INTEGRATION, None, limit));
}

/// Everything.
fn fully(steps: &mut Steps) {
    steps.step("peers", |_| match peers::install("test") {
        // Elsewhere than on a CI machine tests skip a missing peer, loudly.
        Err(error) if !util::is_ci() => {
            eprintln!("xtask: {error}");
            Ok(())
        }
        result => result,
    });
    steps.step("rules", |_| tidy::rules());
    steps.step("fmt", tidy::fmt);
    steps.step("clippy", tidy::clippy);
    steps.step("tests of xtask", |limit| cargo_test(&CHORES, None, limit));
    steps.step("unit tests", |limit| cargo_test(&UNITS, None, limit));
    steps.step("examples in the documentation", |limit| cargo_test(&["--package", "blockferry", "--doc"], None, limit));
    let built = steps.step("static executable", |_| build::static_executable());
    if let Some(executable) = built {
        let run = |limit| cargo_test(&INTEGRATION, Some(&executable.place), limit);
        steps.step("integration tests of the static executable", run);
        steps.step("footprint of the static executable", |limit| footprint::test(&executable, limit));
        steps.step("virtual machines", |_| machines(&executable.place));
        steps.step("aarch64", |limit| aarch64(&executable.place, limit));
    } else {
        steps.left_out("integration tests of the static executable");
        steps.left_out("footprint of the static executable");
        steps.left_out("virtual machines");
        steps.left_out("aarch64");
    }
}

/// The machines of `cargo xtask vm`. Like any peer, an emulator that is not here is a failure on a CI machine only.
fn machines(executable: &Path) -> Result<()> {
    if !util::is_ci() && !vm::is_possible() {
        eprintln!("xtask: test: virtual machines: SKIPPED: apt-get install qemu-system-x86 e2fsprogs");
        return Ok(());
    }
    vm::run(executable, "")
}

/// Builds the executable for aarch64 and runs it, emulated, against programs of this machine. On a CI machine what is
/// missing is a failure; elsewhere it is a loud skip. An executable that was built and is not right is a failure
/// everywhere.
fn aarch64(native: &Path, limit: Duration) -> Result<()> {
    let target = Target::AARCH64;
    let emulator = || match util::find_program(target.emulator) {
        Some(emulator) => Ok(emulator),
        None => util::apt_install("test", &["qemu-user-static"]).and_then(|()| {
            let missing = || Error::new("test", target.emulator, "not here, though qemu-user-static is installed");
            util::find_program(target.emulator).ok_or_else(missing)
        }),
    };
    let ready = emulator().and_then(|_| build::prepare(target));
    let way = match ready {
        Ok(way) => way,
        Err(error) if util::is_ci() => return Err(error),
        Err(error) => {
            eprintln!("SKIP: aarch64: {error}");
            return Ok(());
        }
    };
    let started = Instant::now();
    let built = build::static_executable_in(target, way)?;
    footprint::size(target, &built)?;
    let mut cargo = cargo_test_command(Some(native))?;
    cargo.args(["--test", "it", "foreign::"]).env("BLOCKFERRY_AARCH64_BIN", &built.place);
    util::run("test", &mut cargo, limit.saturating_sub(started.elapsed()), Output::Shown).map(drop)
}

/// The chores, and what they put into a test's machines.
const CHORES: [&str; 4] = ["--package", "xtask", "--package", "testguest"];
/// The unit tests of the library and the program.
const UNITS: [&str; 4] = ["--package", "blockferry", "--lib", "--bins"];
/// Every integration crate in `tests/`.
const INTEGRATION: [&str; 4] = ["--package", "blockferry", "--test", "*"];

/// `cargo test`, its result lines on stdout. With `executable`, that is the program the tests are to drive.
fn cargo_test(arguments: &[&str], executable: Option<&Path>, limit: Duration) -> Result<()> {
    util::run("test", cargo_test_command(executable)?.args(arguments), limit, Output::Shown).map(drop)
}

/// `cargo test`, to which arguments are added.
pub(crate) fn cargo_test_command(executable: Option<&Path>) -> Result<Command> {
    let mut cargo = util::cargo()?;
    cargo.args(["test", "--locked", "--no-fail-fast"]).env("PATH", util::wide_path());
    if util::is_ci() {
        cargo.env("BLOCKFERRY_REQUIRE_PEERS", "1");
    }
    // Most tests wait for something most of the time.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cargo.env("RUST_TEST_THREADS", (cores * TESTS_PER_CORE).to_string());
    match executable {
        Some(executable) => cargo.env("BLOCKFERRY_BIN", executable),
        None => cargo.env_remove("BLOCKFERRY_BIN"),
    };
    Ok(cargo)
}

/// Steps that were run, and how they ended.
struct Steps {
    deadline: Instant,
    done: Vec<(String, Outcome, Duration)>,
}

enum Outcome {
    Passed,
    Failed,
    LeftOut,
}

impl Steps {
    fn new(whole: Duration) -> Self {
        Self { deadline: Instant::now() + whole, done: Vec::new() }
    }

    /// Runs one step below a line that names it, says how it ended, and returns its product. The step is told how long
    /// it may take.
    fn step<T>(&mut self, name: &str, run: impl FnOnce(Duration) -> Result<T>) -> Option<T> {
        let limit = STEP.min(self.deadline.saturating_duration_since(Instant::now()));
        println!("\n== {name}");
        let started = Instant::now();
        let result = if limit.is_zero() { Err(Error::new("test", name, "no time left")) } else { run(limit) };
        let took = started.elapsed();
        let outcome = match &result {
            Ok(_) => Outcome::Passed,
            Err(error) => {
                eprintln!("xtask: {error}");
                Outcome::Failed
            }
        };
        println!("== {name}: {outcome}, {:.1} s", took.as_secs_f64());
        self.done.push((name.to_owned(), outcome, took));
        result.ok()
    }

    /// Notes a step that another one's failure made impossible.
    fn left_out(&mut self, name: &str) {
        self.done.push((name.to_owned(), Outcome::LeftOut, Duration::ZERO));
    }

    /// A line for each step; an error unless all passed.
    fn summary(&self) -> Result<()> {
        println!();
        for (name, outcome, took) in &self.done {
            println!("xtask: test: {outcome:<8} {:>6.1} s  {name}", took.as_secs_f64());
        }
        let bad = self.done.iter().filter(|(_, outcome, _)| !matches!(outcome, Outcome::Passed));
        let names: Vec<&str> = bad.map(|(name, ..)| name.as_str()).collect();
        match names.as_slice() {
            [] => Ok(()),
            names => Err(Error::new("test", format!("{} of {} steps", names.len(), self.done.len()), names.join(", "))),
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(match self {
            Self::Passed => "ok",
            Self::Failed => "FAILED",
            Self::LeftOut => "left out",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_fails_the_whole_and_lets_the_others_run() {
        let mut steps = Steps::new(WHOLE);
        assert_eq!(steps.step("one", |_| Ok(1)), Some(1));
        assert_eq!(steps.step("two", |_| Err::<(), _>(Error::new("test", "two", "broken"))), None);
        assert_eq!(steps.step("three", Ok), Some(STEP));
        steps.left_out("four");
        let error = steps.summary().expect_err("two of them are not good");
        assert_eq!(error.to_string(), "test: 2 of 4 steps: two, four");
    }

    #[test]
    fn no_step_begins_after_the_whole_limit() {
        let mut steps = Steps::new(Duration::ZERO);
        assert_eq!(steps.step("late", |_| Ok(())), None);
        assert!(steps.summary().is_err());
    }

    #[test]
    fn other_options_are_usage_errors() {
        let error = main(&["--fast".to_owned()]).expect_err("there is no such option");
        assert_eq!((error.exit, error.to_string().as_str()), (2, "test: --fast: the only option is --quick"));
    }
}
