//! What the subcommands have in common: a table of options each, from which getopts parses and the help is printed.
//!
//! Pure. Options of the contract that a later part builds are in the table too, so that they are told apart from
//! options that do not exist.

use std::fmt::{Display, Write as _};
use std::str::FromStr;

use getopts::{Fail, Options};

use crate::address::Address;
use crate::door_at::DoorAt;
use crate::error::Problem;
use crate::passed::{Name, Passed};

/// What an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing: it is there or not.
    Nothing,
    /// One value, once; the hint names it in the help.
    One(&'static str),
    /// One value, as often as wanted.
    Many(&'static str),
}

/// One option.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opt {
    /// Its name, without dashes.
    pub(super) name: &'static str,
    /// What it takes.
    pub(super) takes: Takes,
    /// What the help says; empty: not built yet.
    pub(super) help: &'static str,
}

/// An option that exists.
pub(super) const fn opt(name: &'static str, takes: Takes, help: &'static str) -> Opt {
    Opt { name, takes, help }
}

/// An option of a later part.
pub(super) const fn later(name: &'static str, takes: Takes) -> Opt {
    Opt { name, takes, help: "" }
}

/// One subcommand.
#[derive(Debug)]
pub(super) struct Spec {
    /// Its name.
    pub(super) name: &'static str,
    /// Its arguments, as the usage line shows them.
    pub(super) arguments: &'static str,
    /// What it does, one line.
    pub(super) about: &'static str,
    /// Its own options.
    pub(super) options: &'static [Opt],
    /// What else the help says: notes, and examples that can be pasted.
    pub(super) notes: &'static str,
}

/// Options of every subcommand.
const COMMON: [Opt; 4] = [
    opt("json", Takes::Nothing, "one JSON object a line on stdout (docs/json.md)"),
    opt("log", Takes::One("LEVEL"), "off, error, warn, info, debug or trace; else $BLOCKFERRY_LOG [warn]"),
    opt("help", Takes::Nothing, "this text"),
    opt("version", Takes::Nothing, "the version"),
];

/// Column where the help of an option starts.
const HELP_COLUMN: usize = 28;

impl Spec {
    fn all_options(&self) -> impl Iterator<Item = &Opt> {
        self.options.iter().chain(&COMMON)
    }

    /// Parses what follows the subcommand's name.
    pub(super) fn parse(&'static self, args: &[String], passed: &Passed) -> Result<Matches, Problem> {
        let mut options = Options::new();
        for option in self.all_options() {
            // The contract has long options only; `-h` is what fingers type.
            let short = if option.name == "help" { "h" } else { "" };
            match option.takes {
                Takes::Nothing => options.optflagmulti(short, option.name, ""),
                Takes::One(hint) => options.optopt(short, option.name, "", hint),
                Takes::Many(hint) => options.optmulti(short, option.name, "", hint),
            };
        }
        let matches = options.parse(args).map_err(|fail| self.wrong(fail))?;
        for option in self.options.iter().filter(|option| option.help.is_empty()) {
            if matches.opt_present(option.name) {
                return Err(self.usage(format!("--{}", option.name), "not built yet"));
            }
        }
        Ok(Matches { spec: self, matches, passed: passed.clone() })
    }

    fn wrong(&self, fail: Fail) -> Problem {
        let dashed = |name: &str| if name.len() == 1 { format!("-{name}") } else { format!("--{name}") };
        match fail {
            Fail::ArgumentMissing(name) => self.usage(dashed(&name), "needs a value"),
            Fail::UnrecognizedOption(name) => self.usage(dashed(&name), "there is no such option"),
            Fail::OptionMissing(name) => self.usage(dashed(&name), "missing"),
            Fail::OptionDuplicated(name) => self.usage(dashed(&name), "given twice"),
            Fail::UnexpectedArgument(name) => self.usage(dashed(&name), "takes no value"),
        }
    }

    /// A usage error of this subcommand.
    pub(super) fn usage(&self, object: impl Display, cause: impl Display) -> Problem {
        Problem::usage(self.name, object, cause)
    }

    /// The text of `--help`.
    pub(super) fn help(&self) -> String {
        let mut text = format!("{}\n\nusage: blockferry {} {}\n\n", self.about, self.name, self.arguments);
        for option in self.all_options().filter(|option| !option.help.is_empty()) {
            let head = match option.takes {
                Takes::Nothing => format!("  --{}", option.name),
                Takes::One(hint) | Takes::Many(hint) => format!("  --{} {hint}", option.name),
            };
            let mut lines = option.help.lines();
            let first = lines.next().unwrap_or_default();
            if head.len() + 2 > HELP_COLUMN {
                let _ = writeln!(text, "{head}\n{:HELP_COLUMN$}{first}", "");
            } else {
                let _ = writeln!(text, "{head:HELP_COLUMN$}{first}");
            }
            for line in lines {
                let _ = writeln!(text, "{:HELP_COLUMN$}{line}", "");
            }
        }
        let _ = write!(text, "\n{}", self.notes);
        text
    }
}

/// The parsed options of one subcommand.
pub(super) struct Matches {
    spec: &'static Spec,
    matches: getopts::Matches,
    passed: Passed,
}

impl Matches {
    /// Whether a flag is there.
    pub(super) fn flag(&self, name: &str) -> bool {
        self.matches.opt_present(name)
    }

    /// The value of an option that can be given once.
    pub(super) fn value(&self, name: &str) -> Option<String> {
        self.matches.opt_str(name)
    }

    /// The value of an option, read by `read`.
    pub(super) fn read<T>(&self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, Problem> {
        self.value(name).map(|value| read(&value)).transpose().map_err(|cause| self.error(name, cause))
    }

    /// All values of an option, each read by `read`.
    pub(super) fn read_all<T>(&self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, Problem> {
        self.values(name).iter().map(|value| read(value).map_err(|cause| self.error(name, cause))).collect()
    }

    /// All values of an option.
    pub(super) fn values(&self, name: &str) -> Vec<String> {
        self.matches.opt_strs(name)
    }

    /// The sockets that were passed on for one door, of a command that has the doors `known`.
    pub(super) fn passed(&self, name: Name, known: &[Name]) -> Result<Vec<DoorAt>, Problem> {
        self.passed.of(name, known).map_err(|cause| self.spec.usage("LISTEN_FDS", cause))
    }

    /// The doors `passed` on and those of an option, or what stands for none.
    pub(super) fn doors(
        &self,
        name: &str,
        passed: Vec<DoorAt>,
        none: impl FnOnce() -> Address,
    ) -> Result<Vec<DoorAt>, Problem> {
        let mut doors = passed;
        doors.extend(self.read_all(name, DoorAt::parse)?);
        Ok(if doors.is_empty() { vec![none().into()] } else { doors })
    }

    /// A whole number within bounds.
    pub(super) fn number<T: FromStr + PartialOrd + Display + Copy>(
        &self,
        name: &str,
        lowest: T,
        highest: T,
    ) -> Result<Option<T>, Problem> {
        self.read(name, |text| match text.parse::<T>() {
            Ok(number) if number >= lowest && number <= highest && !text.starts_with('+') => Ok(number),
            _ => Err(format!("'{text}' is not a whole number from {lowest} to {highest}")),
        })
    }

    /// A usage error about an option.
    pub(super) fn error(&self, option: &str, cause: impl Display) -> Problem {
        self.spec.usage(format!("--{option}"), cause)
    }

    /// The arguments that are no options: exactly the named ones.
    pub(super) fn arguments<const N: usize>(&self, names: [&'static str; N]) -> Result<[&str; N], Problem> {
        let free = &self.matches.free;
        if let Some(extra) = free.get(N) {
            return Err(self.spec.usage(extra, "one argument too many"));
        }
        if let Some(missing) = names.get(free.len()) {
            return Err(self.spec.usage(missing, "missing"));
        }
        let mut arguments: [&str; N] = names;
        for (place, argument) in arguments.iter_mut().zip(free) {
            *place = argument;
        }
        Ok(arguments)
    }

    /// All arguments that are no options.
    pub(super) fn free(&self) -> &[String] {
        &self.matches.free
    }
}
