//! Where another host is reached: at an address, through a command that this host runs, or over a connection that the
//! user has passed on.
//!
//! Only what this host's own user has typed may name a command, and its record repeats it. What a peer says of itself
//! is an address or nothing: `migrate/wire/hello.rs` sees to that.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::address::Address;
use crate::command::words;
use crate::error::Problem;
use crate::inherited::{self, FD};
use crate::limits::PLACE_MAX;
use crate::socket::Socket;
use crate::uri::{NbdUri, is_nbd};

/// Where another host is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A door that can be dialled by as many connections as are wanted.
    At(Address),
    /// `exec:COMMAND`: its input and output are one connection to the other host's migration door.
    Through(String),
    /// `fd:N`, or `fd:IN,OUT`: a connection of the user's, which nobody can dial again.
    Passed(Passed),
    /// A plain NBD server: nobody there knows the phases.
    Plain(NbdUri),
}

/// A connection that was passed on: by its numbers in the user's process, and once, if it is here, itself.
#[derive(Debug, Clone)]
pub struct Passed {
    input: u32,
    output: Option<u32>,
    socket: Arc<Mutex<Option<Socket>>>,
}

impl Passed {
    /// Its number in the process of whoever has passed it on; of two pipes the one that is read, and the other.
    #[must_use]
    pub fn numbers(&self) -> (u32, Option<u32>) {
        (self.input, self.output)
    }

    /// Here it is.
    pub fn bring(&self, socket: Socket) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }

    /// The connection, for the first who asks.
    #[must_use]
    pub fn take(&self) -> Option<Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl PartialEq for Passed {
    fn eq(&self, other: &Self) -> bool {
        self.numbers() == other.numbers()
    }
}

impl Eq for Passed {}

/// Begins a command.
pub const EXEC: &str = "exec:";

impl Place {
    /// Reads it.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> Result<Self, String> {
        if is_nbd(text) {
            let uri = NbdUri::parse(text)?;
            let printed = uri.to_string();
            // It is remembered as it is printed.
            if printed.len() > PLACE_MAX {
                return Err(format!("'{text}': the URI is longer than {PLACE_MAX} bytes"));
            }
            return Ok(Self::Plain(uri));
        }
        if let Some(numbers) = text.strip_prefix(FD) {
            let number = |digits| inherited::parse(text, digits);
            let (input, output) = match numbers.split_once(',') {
                Some((input, output)) => (number(input)?, Some(number(output)?)),
                None => (number(numbers)?, None),
            };
            return Ok(Self::Passed(Passed { input, output, socket: Arc::default() }));
        }
        let Some(command) = text.strip_prefix(EXEC) else {
            return Address::parse(text).map(Self::At);
        };
        if text.len() > PLACE_MAX {
            return Err(format!("the command is longer than {} bytes", PLACE_MAX - EXEC.len()));
        }
        if command.contains(char::is_control) {
            return Err("the command contains a control character".to_owned());
        }
        words(command).map_err(|cause| format!("'{text}': the command {cause}"))?;
        Ok(Self::Through(command.to_owned()))
    }

    /// The address to which further connections can be opened.
    #[must_use]
    pub fn address(&self) -> Option<&Address> {
        match self {
            Self::At(address) => Some(address),
            Self::Plain(uri) => Some(&uri.address),
            Self::Through(_) | Self::Passed(_) => None,
        }
    }

    /// Whether a lost connection can be opened again.
    #[must_use]
    pub fn can_be_dialled_again(&self) -> bool {
        !matches!(self, Self::Passed(_))
    }

    /// As [`Address::check_plaintext`]. A command is asked nothing: who reaches the other host by it, and who can read
    /// what it carries, is its own business, as with ssh. A connection that was passed on is looked at by who gets it.
    ///
    /// # Errors
    /// As there.
    pub fn check_plaintext(&self, operation: &'static str, insecure_plaintext: bool) -> Result<(), Problem> {
        self.address().map_or(Ok(()), |address| address.check_plaintext(operation, insecure_plaintext))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => address.fmt(f),
            Self::Plain(uri) => uri.fmt(f),
            Self::Through(command) => write!(f, "{EXEC}{command}"),
            Self::Passed(Passed { input, output: Some(output), .. }) => write!(f, "{FD}{input},{output}"),
            Self::Passed(Passed { input, .. }) => write!(f, "{FD}{input}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_print_as_they_parse() {
        for text in [
            "tcp://b:49152",
            "unix:///x.sock",
            "nbd://b:1/vda",
            "exec:ssh B blockferry accept g1",
            "exec:a 'b c'",
            "fd:5",
            "fd:0,1",
        ] {
            assert_eq!(Place::parse(text).map(|place| place.to_string()), Ok(text.to_owned()));
        }
        let command = Place::parse("exec:ssh B x").expect("a command");
        assert_eq!(command.address(), None);
        command.check_plaintext("migrate", false).expect("its own business");
        assert!(command.can_be_dialled_again());
        let passed = Place::parse("fd:5").expect("a descriptor");
        assert!(!passed.can_be_dialled_again() && passed.address().is_none());
        Place::parse("tcp://192.0.2.1:1").expect("an address").check_plaintext("migrate", false).expect_err("refused");
    }

    #[test]
    fn every_wrong_command_says_what_is_wrong() {
        let long = format!("exec:{}", "x".repeat(PLACE_MAX));
        for (text, cause) in [
            ("exec:", "'exec:': the command names no program"),
            ("exec:a 'b", "'exec:a 'b': the command a quote (') is not closed"),
            ("fd:3,", "'fd:3,': '' is not a descriptor (0 to 65535)"),
            ("fd:3,4,5", "'fd:3,4,5': '4,5' is not a descriptor (0 to 65535)"),
            ("fd:x", "'fd:x': 'x' is not a descriptor (0 to 65535)"),
            ("exec:a\nb", "the command contains a control character"),
            (long.as_str(), "the command is longer than 251 bytes"),
        ] {
            assert_eq!(Place::parse(text), Err(cause.to_owned()));
        }
    }
}
