//! `cargo xtask tidy`: what a reader of this tree may rely on, checked: rustfmt, clippy, and the tree's own rules,
//! which are in `rules.rs`.

use crate::rules::{self, Finding, Source};
use crate::util::{self, Error, Output, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long `cargo fmt --check` may take.
const FMT: Duration = Duration::from_secs(60);
/// How long clippy may take in an empty target directory.
const CLIPPY: Duration = Duration::from_secs(400);
/// What is looked at: these files and folders of the root, whether git knows them or not.
const PLACES: [&str; 12] = [
    ".cargo",
    ".ci",
    "Cargo.toml",
    "README.md",
    "benches",
    "clippy.toml",
    "docs",
    "initramfs",
    "rust-toolchain.toml",
    "src",
    "tests",
    "xtask",
];

/// `cargo xtask tidy`: the rules, rustfmt, clippy; all three run, whatever the others say.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    if let Some(word) = arguments.first() {
        return Err(Error::usage("tidy", word, "tidy takes no arguments"));
    }
    let results = [rules(), fmt(FMT), clippy(CLIPPY)];
    let failures: Vec<Error> = results.into_iter().filter_map(std::result::Result::err).collect();
    let count = failures.len();
    for failure in failures {
        eprintln!("xtask: {failure}");
    }
    match count {
        0 => Ok(()),
        count => Err(Error::new("tidy", "the tree", format!("{count} of 3 checks failed"))),
    }
}

/// `cargo fmt --check` over the workspace.
pub(crate) fn fmt(limit: Duration) -> Result<()> {
    let mut cargo = util::cargo()?;
    util::run("tidy", cargo.args(["fmt", "--all", "--check"]), limit.min(FMT), Output::Shown).map(drop)
}

/// clippy over everything, its warnings as errors.
pub(crate) fn clippy(limit: Duration) -> Result<()> {
    let mut cargo = util::cargo()?;
    cargo.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "--deny", "warnings"]);
    util::run("tidy", &mut cargo, limit.min(CLIPPY), Output::Shown).map(drop)
}

/// The rules of `rules.rs`. Every finding is a line on stderr, in the order of the files.
pub(crate) fn rules() -> Result<()> {
    let root = util::root()?;
    let mut sources = sources(&root)?;
    rules::mark_tests(&mut sources);
    let exists = |file: &Path| root.join(file).exists();
    let mut findings: Vec<Finding> = sources.iter().flat_map(|source| rules::check(source, &exists)).collect();
    findings.sort();
    for Finding { path, line, cause } in &findings {
        eprintln!("xtask: tidy: {path}:{line}: {cause}");
    }
    match findings.len() {
        0 => Ok(()),
        count => Err(Error::new("tidy", "rules", format!("{count} findings"))),
    }
}

/// The text files of [`PLACES`], those that exist.
fn sources(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut left: Vec<PathBuf> = PLACES.iter().map(|place| root.join(place)).filter(|place| place.exists()).collect();
    while let Some(path) = left.pop() {
        let failed = |error: std::io::Error| Error::new("tidy", path.display(), error);
        if path.is_dir() {
            for entry in fs::read_dir(&path).map_err(failed)? {
                left.push(entry.map_err(failed)?.path());
            }
        } else if let Ok(text) = String::from_utf8(fs::read(&path).map_err(failed)?) {
            let below = path.strip_prefix(root).unwrap_or(&path);
            sources.push(Source { path: below.to_string_lossy().into_owned(), text, is_test: false });
        }
    }
    Ok(sources)
}
