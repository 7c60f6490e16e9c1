//! How the machine ends, what the steward says about it to the keeper, and the result line. Pure.

use std::fmt;

/// What happens to the machine when the command has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum End {
    /// Power off, the default.
    #[default]
    PowerOff,
    /// Start again.
    Reboot,
    /// Stop, and keep the last words on the screen.
    Halt,
}

/// The steward's exit codes. Far from those of a program that failed on its own: 1, 2, 101, 128 and more.
const CODES: [(End, u8); 3] = [(End::PowerOff, 70), (End::Reboot, 71), (End::Halt, 72)];

impl End {
    /// The word of `blockferry.end=`.
    #[must_use]
    pub(super) fn from_word(word: &str) -> Option<Self> {
        CODES.into_iter().map(|(end, _)| end).find(|end| end.to_string() == word)
    }

    /// The exit code with which the steward asks the keeper for it.
    #[must_use]
    pub(super) fn code(self) -> u8 {
        CODES.into_iter().find(|(end, _)| *end == self).map_or(0, |(_, code)| code)
    }

    /// What an exit code of the steward asks for; `None` when the steward did not end by its own decision.
    #[must_use]
    pub(super) fn from_code(code: i32) -> Option<Self> {
        CODES.into_iter().find(|(_, known)| i32::from(*known) == code).map(|(end, _)| end)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
            Self::Halt => "halt",
        })
    }
}

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With this exit code.
    Exit(u8),
    /// By this signal: it crashed, or somebody killed it.
    Signal(i32),
    /// There is nobody who could say: PID 1 lost its steward.
    Lost,
}

/// What the machine has done, in one line for a program to read: `blockferry-result: exit=0 starts=1 end=poweroff`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Verdict {
    /// How the command ended the last time.
    pub(super) outcome: Outcome,
    /// How often it was started.
    pub(super) starts: u32,
    /// What happens now.
    pub(super) end: End,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("blockferry-result: ")?;
        match self.outcome {
            Outcome::Exit(code) => write!(f, "exit={code}")?,
            Outcome::Signal(signal) => write!(f, "signal={signal}")?,
            Outcome::Lost => f.write_str("init=failed")?,
        }
        write!(f, " starts={} end={}", self.starts, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_a_word_and_a_code_of_its_own() {
        for (end, code) in CODES {
            assert_eq!(End::from_word(&end.to_string()), Some(end));
            assert_eq!((end.code(), End::from_code(i32::from(code))), (code, Some(end)));
        }
        assert_eq!(End::from_word("Poweroff"), None);
        for crash in [-1, 0, 1, 2, 101, 134, 256 + 70] {
            assert_eq!(End::from_code(crash), None, "{crash}");
        }
    }

    #[test]
    fn the_result_line_is_pinned() {
        let line = |outcome, starts, end| Verdict { outcome, starts, end }.to_string();
        assert_eq!(line(Outcome::Exit(2), 1, End::PowerOff), "blockferry-result: exit=2 starts=1 end=poweroff");
        assert_eq!(line(Outcome::Signal(9), 3, End::Reboot), "blockferry-result: signal=9 starts=3 end=reboot");
        assert_eq!(line(Outcome::Lost, 0, End::Halt), "blockferry-result: init=failed starts=0 end=halt");
    }
}
