//! The command line: reads it, talks to the process that serves the guest, prints, and says how to exit.
//!
//! Parsing is pure and ends in plain structs. What a command does besides asking through the control door (`serve`,
//! `export`) comes in from outside as [`Entry`], so that nothing here imports it. Nothing here ever changes a disk.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};

use ::log::LevelFilter;

use crate::error::{Exit, Problem};
use crate::json;
use crate::log;
use crate::options::{ExportOptions, ServeOptions};
use crate::passed::Passed;
use options::{Matches, Spec};

mod accept;
pub mod attach;
mod copy;
pub mod export;
pub mod guest;
mod help;
pub mod info;
pub mod migrate;
mod options;
pub mod recover;
pub mod serve;

#[cfg(test)]
mod tests;

pub use attach::{AttachOptions, DetachOptions};
pub use guest::{ClaimOptions, GuestDoor, SetOptions};
pub use info::InfoOptions;
pub use migrate::MigrateOptions;
pub use recover::{RecoverOptions, WhoOwnsOptions};

/// What the commands that run a process of their own call. Both return when that process is to end.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// `blockferry serve`.
    pub serve: fn(ServeOptions) -> Result<(), Problem>,
    /// `blockferry export`.
    pub export: fn(ExportOptions) -> Result<(), Problem>,
}

/// A whole command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    /// `--json`.
    pub json: bool,
    /// `--log`, if given.
    pub log: Option<LevelFilter>,
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Print a help text.
    Help(String),
    /// Print the version.
    Version,
    /// Serve a guest's disks.
    Serve(ServeOptions),
    /// Serve files as a plain NBD server.
    Export(ExportOptions),
    /// Say what an NBD server has.
    Info(InfoOptions),
    /// Copy a disk.
    Copy(crate::copy::CopyOptions),
    /// The first record.
    Claim(ClaimOptions),
    /// Move the guest.
    Migrate(MigrateOptions),
    /// Let a held migration hand over.
    Switch(GuestDoor),
    /// End the running migration.
    Cancel(GuestDoor),
    /// Show how the guest's disks are.
    Status(GuestDoor),
    /// Say who owns the guest.
    WhoOwns(WhoOwnsOptions),
    /// Ask the other host, or decide without it.
    Recover(RecoverOptions),
    /// Change the running migration.
    Set(SetOptions),
    /// Bring another host's connection to the migration door.
    Accept(GuestDoor),
    /// Make a disk a device of this host.
    Attach(AttachOptions),
    /// Give a device up.
    Detach(DetachOptions),
}

/// A subcommand: its table and what makes a [`Command`] of its options.
type Subcommand = (&'static Spec, fn(&Matches) -> Result<Command, Problem>);

/// The subcommands that are built, in the order of the help.
const COMMANDS: [Subcommand; 15] = [
    (&serve::SPEC, serve::parse),
    (&guest::CLAIM, guest::parse_claim),
    (&migrate::SPEC, migrate::parse),
    (&guest::SWITCH, guest::parse_switch),
    (&guest::CANCEL, guest::parse_cancel),
    (&guest::STATUS, guest::parse_status),
    (&recover::WHO_OWNS, recover::parse_who_owns),
    (&recover::RECOVER, recover::parse_recover),
    (&guest::SET, guest::parse_set),
    (&accept::SPEC, accept::parse),
    (&attach::ATTACH, attach::parse_attach),
    (&attach::DETACH, attach::parse_detach),
    (&export::SPEC, export::parse),
    (&copy::SPEC, copy::parse),
    (&info::SPEC, info::parse),
];

/// Subcommands of the contract that a later part builds.
const LATER: [&str; 1] = ["keygen"];

/// Runs the program with the arguments after its name.
pub fn run(args: impl IntoIterator<Item = OsString>, entry: &Entry) -> Exit {
    let args: Vec<OsString> = args.into_iter().collect();
    let as_json = args.iter().any(|arg| arg == "--json");
    let done = texts(args)
        .and_then(|args| parse_with(&args, &Passed::from_environment()))
        .and_then(|parsed| execute(parsed, entry));
    let problem = match done {
        Ok(exit) => return exit,
        Err(problem) => problem,
    };
    if as_json {
        print(&json::error(&problem));
    }
    complain(&problem);
    problem.exit
}

/// The arguments as text.
fn texts(args: Vec<OsString>) -> Result<Vec<String>, Problem> {
    let text =
        |arg: OsString| arg.into_string().map_err(|arg| Problem::usage("argument", arg.display(), "is not UTF-8"));
    args.into_iter().map(text).collect()
}

/// Reads a command line.
///
/// # Errors
/// The usage error; its operation is the subcommand, where there is one.
pub fn parse(args: &[String]) -> Result<Parsed, Problem> {
    parse_with(args, &Passed::default())
}

/// [`parse`], where a service manager has passed sockets on.
fn parse_with(args: &[String], passed: &Passed) -> Result<Parsed, Problem> {
    let plain = |command| Ok(Parsed { json: false, log: None, command });
    let Some((name, rest)) = args.split_first() else {
        return Err(Problem::usage("command", "", "none given"));
    };
    match (name.as_str(), rest) {
        ("help" | "--help" | "-h", []) => return plain(Command::Help(help::general())),
        ("help", [name]) => return plain(Command::Help(find(name)?.0.help())),
        ("help", [_, extra, ..]) => return Err(Problem::usage("help", extra, "one argument too many")),
        ("version" | "--version", []) => return plain(Command::Version),
        ("version" | "--version", rest) if are_common(rest) => return plain(Command::Version),
        ("version" | "--version" | "--help" | "-h", [extra, ..]) => {
            return Err(Problem::usage("command", extra, "one argument too many"));
        }
        _ => {}
    }
    let (spec, read) = find(name)?;
    // Somebody who asks for help gets it, whatever else is wrong.
    if rest.iter().any(|arg| arg == "--help" || arg == "-h") {
        return plain(Command::Help(spec.help()));
    }
    let matches = spec.parse(rest, passed)?;
    if matches.flag("version") {
        return plain(Command::Version);
    }
    let log = matches.read("log", log::parse_level)?;
    Ok(Parsed { json: matches.flag("json"), log, command: read(&matches)? })
}

/// Options that every command takes, and that say nothing to one that prints a line: `--json`, `--log LEVEL`.
fn are_common(mut rest: &[String]) -> bool {
    while let Some((word, after)) = rest.split_first() {
        rest = match (word.as_str(), after) {
            ("--json", after) => after,
            ("--log", [_, after @ ..]) => after,
            (word, after) if word.starts_with("--log=") => after,
            _ => return false,
        };
    }
    true
}

fn find(name: &str) -> Result<Subcommand, Problem> {
    if let Some(found) = COMMANDS.iter().find(|(spec, _)| spec.name == name) {
        return Ok(*found);
    }
    match LATER.into_iter().find(|later| *later == name) {
        Some(later) => Err(Problem::usage("command", later, "not built yet")),
        None => Err(Problem::usage("command", name, "there is no such command")),
    }
}

/// Does it; the exit of most commands that end well is 0, of some it is the answer.
fn execute(parsed: Parsed, entry: &Entry) -> Result<Exit, Problem> {
    log::init(level(parsed.log, std::env::var(log::VARIABLE).ok().as_deref())?);
    let json = parsed.json;
    match parsed.command {
        Command::Help(text) => print(&text),
        Command::Version => print(&format!("blockferry {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Serve(options) => {
            (entry.serve)(ServeOptions { json, ..serve::complete(options)? })?;
        }
        Command::Export(options) => {
            options.check()?;
            (entry.export)(ExportOptions { json, ..options })?;
        }
        Command::Claim(options) => print(&guest::claim(&options, json)?),
        Command::Migrate(options) => migrate::run(&options, json, std::io::stdout().is_terminal())?,
        Command::Switch(door) => print(&guest::switch(&door, json)?),
        Command::Cancel(door) => print(&guest::cancel(&door, json)?),
        Command::Status(door) => print(&guest::status(&door, json)?),
        Command::Set(options) => print(&guest::set(&options, json)?),
        Command::Copy(options) => copy::run(&options, json, std::io::stderr().is_terminal(), print)?,
        Command::Info(options) => info::run(&options, json, print)?,
        Command::Accept(door) => accept::run(&door)?,
        Command::Attach(options) => print(&attach::attach(&options, json)?),
        Command::Detach(options) => print(&attach::detach(&options, json)?),
        Command::WhoOwns(options) => return recover::who_owns(&options, json).map(answer),
        Command::Recover(options) => return recover::recover(&options, json).map(answer),
    }
    Ok(Exit::Done)
}

/// Prints an answer whose exit code is part of it.
fn answer((text, exit): (String, Exit)) -> Exit {
    print(&text);
    exit
}

/// The log level: `--log`, else the environment's, else the default.
fn level(given: Option<LevelFilter>, environment: Option<&str>) -> Result<LevelFilter, Problem> {
    match (given, environment) {
        (Some(level), _) => Ok(level),
        (None, Some(name)) if !name.is_empty() => {
            log::parse_level(name).map_err(|cause| Problem::usage("environment", log::VARIABLE, cause))
        }
        _ => Ok(log::DEFAULT_LEVEL),
    }
}

/// Prints to stdout. Somebody who does not listen any more (`| head -1`) is no error.
fn print(text: &str) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Prints a problem to stderr: one line, and a hint where the command line is wrong.
fn complain(problem: &Problem) {
    let text = match problem.exit {
        Exit::Usage => format!("{problem}\n{}\n", hint(&problem.operation)),
        _ => format!("{problem}\n"),
    };
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What to type to learn more.
fn hint(operation: &str) -> String {
    match COMMANDS.iter().find(|(spec, _)| spec.name == operation) {
        Some((spec, _)) => format!("try 'blockferry {} --help'", spec.name),
        None => "try 'blockferry help'".to_owned(),
    }
}
