//! The rules of the tree that no compiler knows: who may import whom, who may touch an image, where numbers live, how
//! long a file may be, where links lead.
//!
//! Pure: a file's path and text in, findings out; `tidy` feeds them. Most rules are rows of two tables, [`WORDS`] and
//! [`IMPORTS`]: to add one, add a row and, in the tests below, a text that breaks it and one that does not. A rule is a
//! heuristic on text: it sees what people write, not what they could write to get round it. A row may name files that
//! do not exist yet.

use crate::source;
use std::path::Path;

/// The most bytes that a file of source or prose may have.
const FILE_BYTES: usize = 40_000;
/// The most columns that a line of Rust or shell may have.
const LINE_COLUMNS: usize = 120;
/// The most lines that the README may have.
const README_LINES: usize = 150;

/// A file of the tree.
pub(crate) struct Source {
    /// Its path below the root, with slashes.
    pub(crate) path: String,
    /// What is in it.
    pub(crate) text: String,
    /// Whether all of it is tests.
    pub(crate) is_test: bool,
}

/// A rule that is broken somewhere.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// The file's path below the root.
    pub(crate) path: String,
    /// The line, counted from 1.
    pub(crate) line: usize,
    /// What is wrong, in a few words.
    pub(crate) cause: String,
}

/// What a row of [`WORDS`] looks for. Comments and literals are not looked at.
#[derive(Clone, Copy)]
enum What {
    /// Whole words of code.
    Code(&'static str),
    /// The beginning of words of code.
    Start(&'static str),
    /// The beginning of words of code that are called: `disk.write` finds `disk.write_zeroes(`, not `disk.written`.
    Call(&'static str),
    /// Segments in a row of any path that is named, also inside a group.
    Path(&'static str),
}
use What::{Call, Code, Path as Named, Start};

/// Something that only some files may say.
struct Rule {
    what: &'static [What],
    /// Where it is looked for.
    within: &'static [&'static str],
    /// The files among these that may say it.
    allowed: &'static [&'static str],
    /// Whether `#[cfg(test)]` items and files of tests are looked at too.
    tests: bool,
    reason: &'static str,
}

/// Files are named by a path, a folder (`src/nbd/`) or an end (`**/wire.rs`).
const RUST: &[&str] = &["src/", "tests/", "xtask/", "benches/"];
const SRC: &[&str] = &["src/"];

/// What only some files may say.
const WORDS: &[Rule] = &[
    Rule {
        what: &[Code("unsafe")],
        within: RUST,
        allowed: &[],
        tests: true,
        reason: "no unsafe code: rustix has the system calls",
    },
    Rule {
        what: &[Code("todo!"), Code("unimplemented!"), Code("dbg!")],
        within: RUST,
        allowed: &[],
        tests: true,
        reason: "left behind",
    },
    Rule {
        what: &[Start("#[ignore")],
        within: RUST,
        allowed: &[],
        tests: true,
        reason: "a test that does not run is no test: mend it or take it out",
    },
    Rule {
        what: &[Code("dead_code")],
        within: RUST,
        allowed: &[],
        tests: true,
        reason: "take dead code out instead of allowing it",
    },
    Rule {
        // init opens the console and modules, attach /dev/nbdN, the control door virtio ports; the listener locks the
        // folder of a socket.
        what: &[
            Named("File::open"),
            Named("File::create"),
            Named("OpenOptions"),
            Named("fs::open"),
            Named("fs::openat"),
        ],
        within: SRC,
        allowed: &[
            "src/disk.rs",
            "src/disk/",
            "src/ownership.rs",
            "src/ownership/",
            "src/init.rs",
            "src/init/",
            "src/attach.rs",
            "src/attach/",
            "src/listener.rs",
            // /dev/null in the place of a client's socket
            "src/inherited.rs",
            // --domain-xml
            "src/cli/serve.rs",
            "src/control/",
        ],
        tests: false,
        reason: "only disk.rs opens images (for files that are none there is a list in xtask/src/rules.rs)",
    },
    Rule {
        what: &[
            Start("pwrite"),
            Start("fallocate"),
            Code("ftruncate"),
            Code("copy_file_range"),
            Code("write_at"),
            Code("write_all_at"),
        ],
        within: SRC,
        allowed: &["src/disk.rs", "src/disk/", "src/ownership.rs", "src/ownership/"],
        tests: false,
        reason: "only disk.rs writes to images",
    },
    Rule {
        what: &[
            Call("disk.write"),
            Call("disk.trim"),
            Call("disk().write"),
            Call("disk().trim"),
            Named("Disk::write"),
            Named("Disk::trim"),
        ],
        within: SRC,
        // A copy has no guest, and nobody else at its disk.
        allowed: &["src/disk.rs", "src/disk/", "src/export.rs", "src/export/", "src/copy/end.rs"],
        tests: false,
        reason: "only export.rs writes to disks (D3)",
    },
    Rule {
        what: &[Call("visit.write"), Call("visit.trim"), Named("Visit::write"), Named("Visit::trim")],
        within: SRC,
        allowed: &["src/export.rs", "src/export/", "src/nbd/server.rs", "src/nbd/server/", "src/migrate/stream.rs"],
        tests: false,
        reason: "into an export write only nbd/server and migrate/stream",
    },
    Rule {
        what: &[Named("thread::sleep")],
        within: &["tests/"],
        allowed: &["tests/it/harness.rs", "tests/it/harness/"],
        tests: true,
        reason: "tests wait for a line or a state with a deadline (the harness does), they never sleep",
    },
];

/// Which modules a module never names, whether in `use` or in full.
struct Import {
    within: &'static [&'static str],
    allowed: &'static [&'static str],
    never: &'static [&'static str],
    reason: &'static str,
}

/// Who imports whom: nothing imports upward.
const IMPORTS: &[Import] = &[
    Import {
        within: &["src/limits.rs", "src/limits/", "src/dirty.rs", "src/dirty/", "src/disk.rs", "src/disk/"],
        // A server's export as a disk: through the client, which knows no disk.
        allowed: &["src/disk/remote.rs"],
        never: &[
            "export",
            "mirror",
            "ownership",
            "doors",
            "nbd",
            "migrate",
            "control",
            "vmm",
            "copy",
            "attach",
            "init",
        ],
        reason: "a lower layer",
    },
    Import {
        within: &["src/export.rs", "src/export/", "src/mirror.rs", "src/mirror/"],
        allowed: &[],
        never: &["doors", "migrate", "control", "vmm", "init"],
        reason: "the data path knows no control plane",
    },
    Import {
        within: &["src/nbd.rs", "src/nbd/"],
        allowed: &[],
        never: &["doors", "migrate", "control", "vmm", "init"],
        reason: "the handshake returns the connection to doors, which calls migrate",
    },
    Import {
        within: &["src/migrate.rs", "src/migrate/", "src/vmm.rs", "src/vmm/"],
        allowed: &[],
        never: &["init"],
        reason: "nothing imports upward",
    },
    Import {
        within: SRC,
        allowed: &["src/main.rs", "src/init.rs", "src/cli.rs", "src/cli/"],
        never: &["cli"],
        reason: "nothing imports upward, and the command line is the top",
    },
];
/// What a wire file may name of the crate besides its own module: the rows whose files it is among.
const BELOW_WIRE: &[(&[&str], &[&str])] = &[
    (SRC, &["limits", "error"]),
    // Numbers and states that travel: plain values with one home.
    (&["src/migrate/wire.rs", "src/migrate/wire/"], &["domain", "ownership"]),
    (&["src/control/wire.rs"], &["domain"]),
];

/// Where sizes and times may stand as literals; wire files spell out the layout of their standard.
const LIMITS: &[&str] =
    &["src/limits.rs", "src/limits/", "**/wire.rs", "src/nbd/wire/", "src/migrate/wire/", "src/control/wire/"];

/// All that one file does against the rules. `exists` answers for the targets of links, paths below the root.
pub(crate) fn check(source: &Source, exists: &dyn Fn(&Path) -> bool) -> Vec<Finding> {
    let mut found = too_big(source);
    found.extend(broken_links(source, exists));
    if source.path.ends_with("Cargo.toml") {
        found.extend(manifest(source));
    }
    if source.path.ends_with(".rs") || is_one_of(&source.path, &["**.sh", ".ci/"]) {
        found.extend(long_lines(source));
    }
    if source.path.ends_with(".rs") {
        let code = source::code(&source.text);
        let shipped = if source.is_test { String::new() } else { source::without_tests(&code) };
        // What the tests of a file are is said by that file.
        if !source.is_test || source.path.starts_with("tests/") {
            found.extend(headless(source));
        }
        found.extend(words(source, &code, &shipped));
        found.extend(imports(source, &code));
        found.extend(literals(source, &shipped));
    }
    found
}

/// Finds out which files are tests as a whole: by their names, or because another file declares them for tests.
pub(crate) fn mark_tests(sources: &mut [Source]) {
    let declared = |source: &Source| {
        let code = source::code(&source.text);
        let module = source::module(&source.path);
        let names = source::test_modules(&code).into_iter().map(str::to_owned);
        names.map(|name| [module.clone(), vec![name]].concat()).collect::<Vec<_>>()
    };
    let ours = sources.iter().filter(|source| is_one_of(&source.path, SRC));
    let modules: Vec<Vec<String>> = ours.flat_map(declared).collect();
    for source in sources {
        let is_declared = is_one_of(&source.path, SRC) && modules.contains(&source::module(&source.path));
        source.is_test = is_declared || has_name_of_tests(&source.path);
    }
}

fn has_name_of_tests(path: &str) -> bool {
    path.starts_with("tests/") || path.ends_with("tests.rs") || path.contains("/tests/")
}

/// Whether one of `patterns` names the file: a path, a folder with its slash, or `**/` and an end.
fn is_one_of(path: &str, patterns: &[&str]) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_prefix("**") {
        Some(end) => path.ends_with(end),
        None if pattern.ends_with('/') => path.starts_with(pattern),
        None => path == *pattern,
    })
}

fn finding(source: &Source, line: usize, cause: impl Into<String>) -> Finding {
    Finding { path: source.path.clone(), line, cause: cause.into() }
}

/// [`WORDS`]; `shipped` is `code` without tests.
fn words(source: &Source, code: &str, shipped: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let rules = WORDS.iter().filter(|rule| is_one_of(&source.path, rule.within));
    for rule in rules.filter(|rule| !is_one_of(&source.path, rule.allowed)) {
        let text = if rule.tests { code } else { shipped };
        for (what, place) in rule.what.iter().flat_map(|what| said(&source.path, text, *what)) {
            found.push(finding(source, source::line_of(text, place), format!("`{what}`: {}", rule.reason)));
        }
    }
    found
}

/// What is said of `what`, and where.
fn said(path: &str, code: &str, what: What) -> Vec<(String, usize)> {
    let words = |phrase: &str, open_ended| -> Vec<(String, usize)> {
        let places = source::find_words(code, phrase, open_ended).into_iter();
        places.map(|place| (phrase.to_owned(), place)).collect()
    };
    match what {
        Code(phrase) => words(phrase, false),
        Start(phrase) => words(phrase, true),
        Call(phrase) => {
            let mut calls = words(phrase, true);
            let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            calls.retain(|(_, place)| code[place + phrase.len()..].trim_start_matches(is_word).starts_with('('));
            calls
        }
        Named(part) => {
            let part: Vec<&str> = part.split("::").collect();
            let has_part = |named: &source::Named| named.segments.windows(part.len()).any(|window| window == part);
            let named = source::paths(path, code).into_iter().filter(has_part);
            named.map(|named| (named.text(), named.offset)).collect()
        }
    }
}

/// [`IMPORTS`], and what wire files may name.
fn imports(source: &Source, code: &str) -> Vec<Finding> {
    let path = &source.path;
    if !path.starts_with("src/") {
        return Vec::new();
    }
    let module = source::module(path);
    // `crate::nbd::wire`, also for the files below it.
    let wire = module.iter().position(|name| name == "wire").map(|depth| &module[..=depth]);
    let is_impure = |named: &source::Named, top: &str| {
        let below = BELOW_WIRE.iter().filter(|row| is_one_of(path, row.0));
        let is_own = |wire: &[String]| named.segments.starts_with(wire);
        wire.is_some_and(|wire| !is_own(wire)) && !source.is_test && !below.into_iter().any(|row| row.1.contains(&top))
    };
    let rows = || IMPORTS.iter().filter(|row| is_one_of(path, row.within) && !is_one_of(path, row.allowed));
    let mut found = Vec::new();
    for named in source::paths(path, code) {
        let [first, second, ..] = named.segments.as_slice() else {
            continue;
        };
        if first != "crate" {
            continue;
        }
        let second = second.as_str();
        let impure = is_impure(&named, second);
        let reasons = rows().filter(|row| row.never.contains(&second)).map(|row| row.reason);
        let line = source::line_of(code, named.offset);
        for reason in reasons.chain(impure.then_some("wire files take of the crate only limits and error")) {
            found.push(finding(source, line, format!("`{}`: {reason}", named.text())));
        }
    }
    found
}

/// Sizes and times that are literals outside [`LIMITS`]: a `Duration` made of a number, and a number of bytes (decimal,
/// a power of two from 1024 up, or a shift by whole tens; flags are written in hexadecimal).
fn literals(source: &Source, shipped: &str) -> Vec<Finding> {
    if !source.path.starts_with("src/") || is_one_of(&source.path, LIMITS) {
        return Vec::new();
    }
    let is_number = |rest: &str| {
        let inside = rest.trim_start_matches(|letter: char| letter.is_ascii_alphanumeric() || letter == '_');
        let first = inside.strip_prefix('(').map(str::trim_start);
        first.is_some_and(|text| text.starts_with(|letter: char| letter.is_ascii_digit()))
    };
    let times = ["Duration::from_", "Duration::new"].into_iter().flat_map(|maker| {
        let places = source::find_words(shipped, maker, true).into_iter();
        places.filter(move |place| is_number(&shipped[place + maker.len()..]))
    });
    let sizes = source::decimals(shipped).into_iter().filter(|(value, place)| {
        let is_shift = shipped[..*place].ends_with("<< ") && matches!(value, 10 | 20 | 30 | 40);
        is_shift || *value >= 1024 && value.is_power_of_two()
    });
    let time = times.map(|place| (place, "a time: name it in limits.rs"));
    let size = sizes.map(|(_, place)| (place, "a size: name it in limits.rs"));
    time.chain(size).map(|(place, cause)| finding(source, source::line_of(shipped, place), cause)).collect()
}

/// A Rust file says first what it is.
fn headless(source: &Source) -> Option<Finding> {
    let cause = "no head: `//!` what it owns, who calls it, what it never does";
    (!source.text.starts_with("//!")).then(|| finding(source, 1, cause))
}

fn too_big(source: &Source) -> Vec<Finding> {
    let mut found = Vec::new();
    let bytes = source.text.len();
    if bytes > FILE_BYTES {
        found.push(finding(source, 1, format!("{bytes} bytes, over {FILE_BYTES}: is it still one thing?")));
    }
    let lines = source.text.lines().count();
    if source.path == "README.md" && lines > README_LINES {
        found.push(finding(source, lines, format!("{lines} lines, over {README_LINES}: docs/ has room")));
    }
    found
}

fn long_lines(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().zip(1..).map(|(text, line)| (text.chars().count(), line));
    let long = lines.filter(|(columns, _)| *columns > LINE_COLUMNS);
    long.map(|(columns, line)| finding(source, line, format!("{columns} columns, over {LINE_COLUMNS}"))).collect()
}

/// The root's manifest forbids unsafe code, and every package takes the root's lints.
fn manifest(source: &Source) -> Vec<Finding> {
    let has = |section: &str, entry: &str| {
        let mut lines = source.text.lines().map(str::trim).skip_while(|line| *line != section).skip(1);
        lines.by_ref().take_while(|line| !line.starts_with('[')).any(|line| line == entry)
    };
    let mut found = Vec::new();
    if source.path == "Cargo.toml" && !has("[workspace.lints.rust]", "unsafe_code = \"forbid\"") {
        found.push(finding(source, 1, "[workspace.lints.rust] must say unsafe_code = \"forbid\""));
    }
    if source.text.contains("[package]") && !has("[lints]", "workspace = true") {
        found.push(finding(source, 1, "[lints] must say workspace = true"));
    }
    found
}

/// Relative links in the README and in `docs/` that lead nowhere.
fn broken_links(source: &Source, exists: &dyn Fn(&Path) -> bool) -> Vec<Finding> {
    if source.path != "README.md" && !(source.path.starts_with("docs/") && source.path.ends_with(".md")) {
        return Vec::new();
    }
    let folder = Path::new(&source.path).parent().unwrap_or(Path::new(""));
    let broken = links(&source.text).into_iter().filter(|(_, link)| {
        let file = link.split('#').next().unwrap_or_default();
        let is_relative = !file.is_empty() && !file.contains("://") && !file.starts_with("mailto:");
        is_relative && !exists(&folder.join(file))
    });
    broken.map(|(line, link)| finding(source, line, format!("broken link: {link}"))).collect()
}

/// The targets of `[text](target)` and `[name]: target`, with their lines; fenced blocks and code spans are no text.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (line, number) in text.lines().zip(1..) {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let spoken: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
            let defined = spoken.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
            let inline = spoken.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
            let targets = inline.chain(defined.map(|(_, target)| target.trim()));
            found.extend(targets.map(|target| (number, target.to_owned())));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Source {
        let mut sources = [Source { path: path.to_owned(), text: text.to_owned(), is_test: false }];
        mark_tests(&mut sources);
        let [source] = sources;
        source
    }

    /// What the rules say about a file, as `line: cause`; a Rust file gets a head, every link is good.
    fn check(path: &str, text: &str) -> Vec<String> {
        let text = if path.ends_with(".rs") { format!("//! Head.\n{text}") } else { text.to_owned() };
        let source = file(path, &text);
        let found = super::check(&source, &|_| true);
        found.iter().map(|found| format!("{}: {}", found.line, found.cause)).collect()
    }

    /// The rule is broken by `bad`, once, on the second line, and the message contains `cause`; `good` is clean.
    fn breaks(path: &str, bad: &str, cause: &str, good: &str) {
        let said = check(path, bad);
        assert!(said.len() == 1 && said[0].starts_with("2: ") && said[0].contains(cause), "{path}: {bad}: {said:?}");
        assert_eq!(check(path, good), Vec::<String>::new(), "{path}: {good}");
    }

    #[test]
    fn unsafe_code_is_found() {
        let good = "// unsafe\nlet unsafe_mode = option(\"--unsafe\");";
        breaks("src/cli.rs", "fn f() { unsafe { g() } }", "no unsafe code", good);
    }

    #[test]
    fn what_was_left_behind_is_found() {
        for path in ["src/a.rs", "tests/it/a.rs", "xtask/src/a.rs"] {
            breaks(path, "fn f() { todo!() }", "`todo!`: left behind", "fn f() { done!() } // todo!()");
            breaks(path, "fn f() { unimplemented!() }", "left behind", "fn f() { g(\"unimplemented!\") }");
            breaks(path, "fn f() { dbg!(1) }", "left behind", "fn f() { sdbg!(1) }");
            breaks(path, "#[ignore = \"slow\"] fn f() {}", "does not run", "#[test] fn ignore() {}");
            breaks(path, "#[allow(dead_code)] fn f() {}", "take dead code out", "#[must_use] fn f() {}");
            breaks(path, "#[cfg(test)] mod t { fn f() { todo!() } }", "left behind", "#[cfg(test)] mod t {}");
        }
    }

    #[test]
    fn images_are_opened_in_one_place() {
        let good = "use std::fs; fn f() { fs::read_to_string(p); socket.open(); }";
        for bad in [
            "use rustix::fs::{OFlags, open};",
            "fn f() { rustix::fs::open(p, o, m); }",
            "fn f() { std::fs::File::open(p); }",
            "use std::fs::{self, OpenOptions};",
            "fn f() { fs::File::create(p); }",
        ] {
            breaks("src/copy.rs", bad, "only disk.rs opens images", good);
            breaks("src/nbd/server.rs", bad, "only disk.rs opens images", good);
            for allowed in ["src/disk.rs", "src/ownership.rs", "src/init.rs", "tests/it/a.rs", "xtask/src/a.rs"] {
                assert_eq!(check(allowed, bad), Vec::<String>::new(), "{allowed}");
            }
            assert_eq!(check("src/copy.rs", &format!("#[cfg(test)] mod tests {{ {bad} }}")), Vec::<String>::new());
        }
    }

    #[test]
    fn images_are_written_in_one_place() {
        let good = "fn f() { socket.write_all(b); sendfile(a, b); }";
        breaks("src/copy.rs", "fn f() { rustix::io::pwritev(fd, b, 0); }", "only disk.rs writes to images", good);
        breaks("src/copy.rs", "fn f() { file.write_all_at(b, 0); }", "only disk.rs writes to images", good);
        breaks("src/nbd/client.rs", "fn f() { fallocate(fd, m, 0, 1); }", "only disk.rs writes to images", good);
        assert_eq!(check("src/disk.rs", "fn f() { pwrite(fd, b, 0); }"), Vec::<String>::new());
    }

    #[test]
    fn disks_are_written_by_exports_only() {
        let good = "fn f() { export.disk().read(b); disk.flush(); disk.zero_bytes + disk.written }";
        breaks("src/copy.rs", "fn f() { self.disk.write(b, 0); }", "only export.rs writes to disks", good);
        breaks(
            "src/migrate/stream.rs",
            "fn f() { visit.disk().write_zeroes(0, 1); }",
            "only export.rs writes to disks",
            good,
        );
        assert_eq!(check("src/export.rs", "fn f() { self.disk.trim(0, 1); }"), Vec::<String>::new());
    }

    #[test]
    fn exports_are_written_by_the_server_and_the_stream_only() {
        let good = "fn f() { visit.read(b, 0); visit.written(); }";
        breaks("src/mirror.rs", "fn f() { self.visit.write_zeroes(0, 1); }", "into an export write only", good);
        for allowed in ["src/nbd/server.rs", "src/nbd/server/request.rs", "src/migrate/stream.rs"] {
            assert_eq!(check(allowed, "fn f() { self.visit.write_zeroes(0, 1); }"), Vec::<String>::new());
        }
    }

    #[test]
    fn tests_do_not_sleep() {
        let good = "fn f() { wait_for_line(&mut child, deadline); }";
        breaks("tests/it/bad.rs", "fn f() { std::thread::sleep(D); }", "they never sleep", good);
        breaks("tests/it/bad.rs", "use std::{thread::sleep, time::Instant};", "they never sleep", good);
        assert_eq!(check("tests/it/harness.rs", "fn f() { thread::sleep(D); }"), Vec::<String>::new());
    }

    #[test]
    fn nothing_imports_upward() {
        let nbd = "the handshake returns the connection";
        let good = "use super::wire; use crate::{disk::Disk, export, limits};";
        breaks("src/nbd/server.rs", "use crate::migrate::link;", nbd, good);
        breaks("src/nbd/server.rs", "use crate::{limits, control::{server}};", nbd, "use crate::limits;");
        breaks("src/nbd/client.rs", "fn f() { super::super::vmm::stop() }", nbd, good);
        breaks("src/nbd.rs", "#[cfg(test)] mod t { use crate::migrate::link; }", nbd, good);
        breaks(
            "src/export.rs",
            "use crate::migrate::source;",
            "the data path",
            "use crate::{dirty::DirtyMap, disk::Disk};",
        );
        breaks("src/disk.rs", "use crate::export::Export;", "a lower layer", "use crate::limits;");
        breaks("src/vmm/qmp.rs", "use crate::init;", "nothing imports upward", "use crate::error::Error;");
        breaks("src/doors.rs", "fn f() { crate::cli::run(); }", "the command line is the top", "use crate::migrate;");
        assert_eq!(check("src/main.rs", "fn main() { blockferry::cli::run(); }"), Vec::<String>::new());
        assert_eq!(check("src/migrate/link.rs", "use crate::nbd::client;"), Vec::<String>::new());
    }

    #[test]
    fn wire_files_are_pure() {
        let good = "use crate::{error::Error, limits}; use self::inner::A; use std::io;";
        breaks("src/nbd/wire.rs", "use crate::disk::Disk;", "wire files take", good);
        breaks("src/control/wire.rs", "use super::server::Server;", "wire files take", good);
        breaks("src/migrate/wire/hello.rs", "use crate::guest;", "wire files take", "use crate::ownership::A;");
        assert_eq!(check("src/nbd/wire.rs", "use crate::nbd::wire::Flags;"), Vec::<String>::new());
        assert_eq!(
            check("src/migrate/wire/hello.rs", "use super::cut; use crate::migrate::wire::A;"),
            Vec::<String>::new()
        );
        assert_eq!(check("src/migrate/wire/tests.rs", "use crate::ownership::Order;"), Vec::<String>::new());
    }

    #[test]
    fn times_are_named_in_limits() {
        let good = "let a = Duration::from_millis(limits::POLL_MS); let b = Duration::ZERO;";
        breaks("src/doors.rs", "let a = Duration::from_secs(5);", "a time", good);
        breaks("src/doors.rs", "let a = time::Duration::from_millis( 60 * MS );", "a time", good);
        breaks("src/doors.rs", "let a = Duration::new(1, 0);", "a time", good);
        for elsewhere in
            ["src/limits.rs", "tests/it/a.rs", "xtask/src/a.rs", "src/nbd/tests.rs", "src/nbd/server_tests.rs"]
        {
            assert_eq!(check(elsewhere, "const A: Duration = Duration::from_secs(5);"), Vec::<String>::new());
        }
        let test = "#[cfg(test)] mod tests { fn f() { g(Duration::from_secs(5)) } }";
        assert_eq!(check("src/doors.rs", test), Vec::<String>::new());
    }

    #[test]
    fn sizes_are_named_in_limits() {
        let good = "let a = limits::BLOCK; let b = 512; let c = 1 << 7; let d = 0x1000; let e = 1000; // 4096";
        breaks("src/disk.rs", "let a = [0; 4096];", "a size", good);
        breaks("src/disk.rs", "let a = 64 * 1024;", "a size", good);
        breaks("src/disk.rs", "let a = 65_536u64;", "a size", good);
        assert_eq!(check("src/limits.rs", "pub const A: usize = 64 * 1024;"), Vec::<String>::new());
        assert_eq!(check("src/nbd/wire.rs", "const A: u32 = 1024;"), Vec::<String>::new());
    }

    #[test]
    fn a_file_says_what_it_is() {
        let source = |text: &str| file("src/a.rs", text);
        assert_eq!(headless(&source("use std::io;\n")).map(|found| found.line), Some(1));
        assert_eq!(headless(&source("//! Owns nothing.\n")), None);
        assert_eq!(super::check(&file("src/a/tests.rs", "use super::*;\n"), &|_| true), []);
    }

    #[test]
    fn files_and_lines_have_an_end() {
        let line = "x".repeat(LINE_COLUMNS - 3);
        breaks("src/a.rs", &format!("// {line}y"), "121 columns, over 120", &format!("// {line}"));
        assert_eq!(check("docs/a.md", &"x".repeat(500)), Vec::<String>::new());
        let said = check("docs/a.md", &"x\n".repeat(FILE_BYTES));
        assert_eq!(said, ["1: 80000 bytes, over 40000: is it still one thing?"]);
        assert_eq!(check("docs/a.md", &"x\n".repeat(FILE_BYTES / 2)), Vec::<String>::new());
    }

    #[test]
    fn the_readme_is_short() {
        assert_eq!(check("README.md", &"x\n".repeat(151)), ["151: 151 lines, over 150: docs/ has room"]);
        assert_eq!(check("README.md", &"x\n".repeat(150)), Vec::<String>::new());
        assert_eq!(check("docs/a.md", &"x\n".repeat(151)), Vec::<String>::new());
    }

    #[test]
    fn manifests_forbid_unsafe_code() {
        let good = "[workspace.lints.rust]\nunsafe_code = \"forbid\"\n\n[package]\n\n[lints]\nworkspace = true\n";
        assert_eq!(check("Cargo.toml", good), Vec::<String>::new());
        let bad = good.replace("forbid", "deny");
        assert_eq!(check("Cargo.toml", &bad), ["1: [workspace.lints.rust] must say unsafe_code = \"forbid\""]);
        let bad = "[package]\n[lints]\n[dependencies]\nworkspace = true\n";
        assert_eq!(check("xtask/Cargo.toml", bad), ["1: [lints] must say workspace = true"]);
    }

    #[test]
    fn links_lead_somewhere() {
        let text = "See [a](docs/a.md#top), [b](https://b.example/c), [c](#here) and `[d](no.md)`.\n\
                    ```\n[e](no.md)\n```\n[f]: gone.md\n[g](docs/gone.md)\n";
        let source = |path: &str| file(path, text);
        let exists = |file: &Path| file == Path::new("docs/a.md");
        let lines = |path| broken_links(&source(path), &exists).into_iter().map(|found| (found.line, found.cause));
        let expected = [(5, "broken link: gone.md".to_owned()), (6, "broken link: docs/gone.md".to_owned())];
        assert_eq!(lines("README.md").collect::<Vec<_>>(), expected);
        assert_eq!(lines("src/a.rs").count(), 0);
        // From docs/ the first link means docs/docs/a.md.
        assert_eq!(lines("docs/b.md").count(), 3);
    }

    #[test]
    fn files_that_another_declares_for_tests_are_tests() {
        let mut sources = [
            file("src/a/fake.rs", ""),
            file("src/a/mod.rs", "#[cfg(test)]\nmod fake;\nmod real;"),
            file("src/a/real.rs", ""),
            file("src/fake.rs", ""),
        ];
        mark_tests(&mut sources);
        assert_eq!(sources.map(|source| source.is_test), [true, false, false, false]);
    }

    #[test]
    fn files_are_named_by_path_folder_or_end() {
        assert!(is_one_of("src/nbd/wire.rs", &["**/wire.rs"]) && is_one_of("src/nbd/wire.rs", &["src/nbd/"]));
        assert!(!is_one_of("src/nbd/firewire.rs", &["**/wire.rs"]) && !is_one_of("src/nbd.rs", &["src/nbd/"]));
    }
}
