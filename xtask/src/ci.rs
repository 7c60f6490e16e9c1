//! `cargo xtask ci`: makes a machine that has only the Rust toolchain ready for `cargo xtask test`, and says what is on
//! it. `.ci/run` calls it first. Whatever is missing and cannot be installed is a failure here, with its name, and not
//! a skipped test later.

use crate::peers;
use crate::util::{self, Error, Output, QUESTION, Result};
use std::process::Command;
use std::time::Duration;

/// How long `rustup component add` may take.
const COMPONENT: Duration = Duration::from_secs(180);
/// The parts of the toolchain that `tidy` needs: cargo's command and rustup's name.
const COMPONENTS: [(&str, &str); 2] = [("fmt", "rustfmt"), ("clippy", "clippy")];
/// What is asked for its version, so that a log tells what was tested with what.
const VERSIONS: [&[&str]; 9] = [
    &["rustc", "--version"],
    &["cc", "--version"],
    &["nbdkit", "--version"],
    &["nbdinfo", "--version"],
    &["nbd-server", "-V"],
    &["nbd-client", "-V"],
    &["fio", "--version"],
    &["qemu-img", "--version"],
    &["qemu-system-x86_64", "--version"],
];

/// `cargo xtask ci`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    if let Some(word) = arguments.first() {
        return Err(Error::usage("ci", word, "ci takes no arguments"));
    }
    for (command, component) in COMPONENTS {
        component_ready(command, component)?;
    }
    peers::install("ci")?;
    for question in VERSIONS {
        println!("xtask: ci: {}: {}", question[0], version(question)?);
    }
    Ok(())
}

/// Sees to it that `cargo COMMAND` is there.
fn component_ready(command: &str, component: &str) -> Result<()> {
    let is_there = || {
        let said = util::capture("ci", util::cargo()?.args([command, "--version"]), QUESTION)?;
        Ok(said.status.success())
    };
    if is_there()? {
        return Ok(());
    }
    let log = util::fresh_log("rustup")?;
    let mut rustup = Command::new("rustup");
    rustup.current_dir(util::root()?).args(["component", "add", component]);
    let added = util::run("ci", &mut rustup, COMPONENT, Output::Log(&log));
    if is_there()? {
        return Ok(());
    }
    Err(added.err().unwrap_or_else(|| Error::new("ci", component, "not there after rustup component add")))
}

/// The first line that a program prints about itself.
fn version(question: &[&str]) -> Result<String> {
    let mut command = Command::new(question[0]);
    let said = util::capture("ci", command.args(&question[1..]).env("PATH", util::wide_path()), QUESTION)?;
    let lines = said.stdout.lines().chain(said.stderr.lines());
    Ok(lines.map(str::trim).find(|line| !line.is_empty()).unwrap_or("no version").to_owned())
}
