//! How the program says that something went wrong: one line, `blockferry: operation: object: cause`, and an exit code.
//!
//! A [`Problem`] is made where the failure is understood and travels upward unchanged, over the control door too; only
//! the command line prints it. It names what dies of it ([`Dies`]), because that also says who is to blame.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::process::ExitCode;

/// How a command ends, as its exit code. The numbers are a promise to scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Refused before the first byte; nothing has changed.
    Refused = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Aborted later; **this source still owns and serves the guest**.
    Aborted = 3,
    /// The destination owns; something failed after that. The guest must not be started here.
    GaveAway = 4,
    /// Who owns is not known from here: `blockferry recover` finds out.
    Unknown = 5,
}

impl Exit {
    /// Every exit, in the order of the numbers.
    pub const ALL: [Self; 6] = [Self::Done, Self::Refused, Self::Usage, Self::Aborted, Self::GaveAway, Self::Unknown];

    /// The number that the process exits with.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Refused => 1,
            Self::Usage => 2,
            Self::Aborted => 3,
            Self::GaveAway => 4,
            Self::Unknown => 5,
        }
    }

    /// The exit of a number that came from elsewhere. A number nobody knows means "not known from here".
    #[must_use]
    pub fn from_code(code: u8) -> Self {
        Self::ALL.into_iter().find(|exit| exit.code() == code).unwrap_or(Self::Unknown)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// What a problem ends, and by that who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dies {
    /// One request or one command; whoever asked is to blame, everything else goes on.
    Request,
    /// One connection; its peer misbehaved or is gone.
    Connection,
    /// The migration; a disk, the link or the other host failed. The exit code says who owns the guest.
    Migration,
    /// The process; the host or this program is to blame.
    Process,
}

/// One failure, ready to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What was being done, in the user's words: `migrate`, `open disk`.
    pub operation: Cow<'static, str>,
    /// What it was done to: a guest, a disk, a path, an address, an option.
    pub object: String,
    /// Why it failed.
    pub cause: String,
    /// What ends because of it.
    pub dies: Dies,
    /// What the command exits with.
    pub exit: Exit,
}

impl Problem {
    /// A problem with every part given. Most callers want one of the short forms below.
    pub fn new(
        dies: Dies,
        exit: Exit,
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self { operation: operation.into(), object: object.to_string(), cause: cause.to_string(), dies, exit }
    }

    /// The request is refused, nothing has changed: exit 1.
    pub fn refused(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self::new(Dies::Request, Exit::Refused, operation, object, cause)
    }

    /// The command line is wrong: exit 2.
    pub fn usage(operation: impl Into<Cow<'static, str>>, object: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::new(Dies::Request, Exit::Usage, operation, object, cause)
    }

    /// The migration ended and this source still owns: exit 3.
    pub fn aborted(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self::new(Dies::Migration, Exit::Aborted, operation, object, cause)
    }

    /// Something failed after the destination had become the owner: exit 4.
    pub fn gave_away(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self::new(Dies::Migration, Exit::GaveAway, operation, object, cause)
    }

    /// Who owns is not known from here: exit 5.
    pub fn unknown(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl fmt::Display,
    ) -> Self {
        Self::new(Dies::Migration, Exit::Unknown, operation, object, cause)
    }

    /// The process cannot start or go on, and has changed nothing: exit 1.
    pub fn fatal(operation: impl Into<Cow<'static, str>>, object: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::new(Dies::Process, Exit::Refused, operation, object, cause)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blockferry: {}: ", OneLine(&self.operation))?;
        if !self.object.is_empty() {
            write!(f, "{}: ", OneLine(&self.object))?;
        }
        write!(f, "{}", OneLine(&self.cause))
    }
}

impl std::error::Error for Problem {}

/// A text from anywhere, shown on one line: control characters (line ends, terminal commands) appear escaped.
#[derive(Debug, Clone, Copy)]
pub struct OneLine<'a>(pub &'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(char::is_control) {
            let (plain, tail) = rest.split_at(at);
            f.write_str(plain)?;
            let mut chars = tail.chars();
            if let Some(control) = chars.next() {
                write!(f, "{}", control.escape_default())?;
            }
            rest = chars.as_str();
        }
        f.write_str(rest)
    }
}

/// Whether it says that nobody listens at an address: no process is there, rather than one that does not answer.
#[must_use]
pub fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// A system error in words, without the number that Rust appends.
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) if error.raw_os_error().is_some() => text[..at].to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_in_the_programs_form() {
        let problem = Problem::refused("migrate", "g1", "the destination\nsays \u{1b}[2J no");
        assert_eq!(problem.to_string(), "blockferry: migrate: g1: the destination\\nsays \\u{1b}[2J no");
        assert_eq!(Problem::usage("usage", "", "no command").to_string(), "blockferry: usage: no command");
    }

    #[test]
    fn the_exit_codes_are_pinned() {
        let codes: Vec<u8> = Exit::ALL.iter().map(|e| e.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5]);
        for exit in Exit::ALL {
            assert_eq!(Exit::from_code(exit.code()), exit);
            assert_eq!(exit as u8, exit.code());
        }
        assert_eq!(Exit::from_code(77), Exit::Unknown);
    }

    #[test]
    fn the_short_forms_exit_as_the_contract_says() {
        assert_eq!(Problem::refused("a", "b", "c").exit, Exit::Refused);
        assert_eq!(Problem::usage("a", "b", "c").exit, Exit::Usage);
        assert_eq!(Problem::aborted("a", "b", "c").exit, Exit::Aborted);
        assert_eq!(Problem::gave_away("a", "b", "c").exit, Exit::GaveAway);
        assert_eq!(Problem::unknown("a", "b", "c").exit, Exit::Unknown);
        assert_eq!(Problem::fatal("a", "b", "c").dies, Dies::Process);
    }

    #[test]
    fn a_system_error_is_said_in_words() {
        assert_eq!(reason(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(reason(&io::Error::other("odd (os error 9)")), "odd (os error 9)");
    }
}
