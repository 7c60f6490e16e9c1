//! A short text with a fixed bound: why something failed, as it travels to the peer, the log or the command line.

use core::fmt::{self, Write as _};

use crate::limits::CAUSE_MAX;

/// A cause: at most [`CAUSE_MAX`] bytes of one line. What does not fit is cut at a character; control characters, which
/// a peer's text may contain, become `?`. It lies on the heap, so that the results that may carry one stay small;
/// causes exist only where something has failed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Cause(Box<str>);

impl Cause {
    /// Writes `text` out, as far as it fits.
    pub fn new(text: impl fmt::Display) -> Self {
        let mut filter = Filter::default();
        // The filter takes everything and never fails.
        let _ = write!(filter, "{text}");
        filter.done()
    }

    /// Takes a peer's bytes, which should be UTF-8 and may be anything.
    #[must_use]
    pub fn from_peer(bytes: &[u8]) -> Self {
        let mut filter = Filter::default();
        for piece in bytes.utf8_chunks() {
            let _ = filter.write_str(piece.valid());
            if !piece.invalid().is_empty() {
                let _ = filter.write_char('?');
            }
        }
        filter.done()
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is no text.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Takes printable characters until one does not fit, and ignores the rest.
#[derive(Default)]
struct Filter {
    text: heapless::String<CAUSE_MAX>,
    full: bool,
}

impl Filter {
    fn done(self) -> Cause {
        Cause(self.text.as_str().into())
    }
}

impl fmt::Write for Filter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let printable = if character.is_control() { '?' } else { character };
            self.full = self.full || self.text.push(printable).is_err();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_cut_at_a_character() {
        let long = "ä".repeat(CAUSE_MAX);
        let cause = Cause::new(&long);
        assert_eq!(cause.as_str(), &long[..CAUSE_MAX]);
        assert_eq!(
            Cause::new(format_args!("x{long}y")).as_str().len(),
            CAUSE_MAX - 1,
            "nothing slips in behind the cut"
        );
    }

    #[test]
    fn a_peer_cannot_smuggle_control_characters() {
        assert_eq!(Cause::from_peer(b"no\n\x1b[31m\xff way").as_str(), "no??[31m? way");
        assert!(Cause::from_peer(&[]).is_empty());
    }
}
