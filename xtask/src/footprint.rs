//! The budgets of `docs/footprint.md` that are this side's: the executable's size for each way of building it. What it
//! costs while it runs is measured by `tests/it/footprint.rs`, which this runs alone.
//!
//! `cargo xtask syscalls` writes the page's table of system calls anew.

use crate::build::{self, Built, Way};
use crate::target::Target;
use crate::test;
use crate::util::{self, Error, Output, Result};
use std::time::Duration;

/// The page with the figures.
const PAGE: &str = "docs/footprint.md";
/// How long the traced run may take.
const TRACE: Duration = Duration::from_secs(300);

/// The most bytes that an executable may have. Whoever needs more raises the number here and says in the page for what.
fn budget(target: Target, way: Way) -> u64 {
    let kib = match (target.is_native(), way) {
        (true, Way::Installed | Way::Rustup) => 1640,
        (true, Way::Debian) => 1340,
        (false, Way::Installed | Way::Rustup) => 1320,
        (false, Way::Debian) => 1300,
    };
    kib * 1024
}

/// Holds an executable to its budget.
pub(crate) fn size(target: Target, built: &Built) -> Result<()> {
    judge(built.size, budget(target, built.way))
        .map(|text| println!("xtask: footprint: {}, way {}: {text}", target.name, built.way))
        .map_err(|cause| Error::new("footprint", format!("{}, way {}", target.name, built.way), cause))
}

fn judge(size: u64, budget: u64) -> std::result::Result<String, String> {
    if size > budget {
        return Err(format!("{size} bytes, {} over its budget of {budget} ({PAGE})", size - budget));
    }
    Ok(format!("{size} bytes of at most {budget}"))
}

/// The step of `cargo xtask test`: the size, and the tests by themselves, their figures shown. Other tests at their
/// side would only make the machine busy.
pub(crate) fn test(built: &Built, limit: Duration) -> Result<()> {
    size(Target::X86_64, built)?;
    let mut cargo = test::cargo_test_command(Some(&built.place))?;
    cargo
        .args(["--test", "it", "footprint::", "--", "--nocapture", "--test-threads=1"])
        .env("BLOCKFERRY_FOOTPRINT", "1");
    util::run("footprint", &mut cargo, limit, Output::Shown).map(drop)
}

/// `cargo xtask syscalls`: traces a whole migration and an export, and writes the table into the page.
pub(crate) fn syscalls(arguments: &[String]) -> Result<()> {
    if let Some(word) = arguments.first() {
        return Err(Error::usage("syscalls", word, "syscalls takes no arguments"));
    }
    let built = build::static_executable()?;
    let page = util::root()?.join(PAGE);
    let mut cargo = test::cargo_test_command(Some(&built.place))?;
    cargo.env("BLOCKFERRY_FOOTPRINT", "1").env("BLOCKFERRY_FOOTPRINT_PAGE", &page);
    cargo.args(["--test", "it", "footprint::every_call_that_is_made_is_known", "--", "--nocapture"]);
    util::run("syscalls", &mut cargo, TRACE, Output::Shown)?;
    println!("xtask: syscalls: {}", page.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_held_to_its_budget() {
        assert_eq!(judge(10, 10), Ok("10 bytes of at most 10".to_owned()));
        assert_eq!(judge(11, 10), Err(format!("11 bytes, 1 over its budget of 10 ({PAGE})")));
    }

    #[test]
    fn the_page_names_every_budget() {
        let page = std::fs::read_to_string(util::root().expect("a root").join(PAGE)).expect("the page");
        for target in Target::ALL {
            for way in [Way::Installed, Way::Debian] {
                let kib = format!("| {} KiB |", budget(target, way) / 1024);
                assert!(page.contains(&kib), "{PAGE} does not say {kib} for {} {way}", target.name);
            }
        }
    }
}
