//! The names of the exports on the migration door.
//!
//! `ATTEMPT/INSTANCE/EPOCH/TOKEN/DISK`, hexadecimal digits of fixed width before the disk's name. A data connection
//! opens with such a name and is let in only when all of it is current (rule D4); nobody who was not told can guess
//! one, because the token is 128 random bits. The name is a secret as long as the attempt lives: it is never logged.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::{DISK_NAME_MAX, EXPORT_NAME_MAX};
use crate::ownership::{Attempt, ID_BYTES, ID_DIGITS, Instance};

/// Digits of an epoch.
const EPOCH_DIGITS: usize = 8;
/// Longest export name of the migration door, in bytes.
pub const MIGRATION_EXPORT_NAME_MAX: usize = 3 * (ID_DIGITS + 1) + EPOCH_DIGITS + 1 + DISK_NAME_MAX;
const _: () = assert!(MIGRATION_EXPORT_NAME_MAX <= EXPORT_NAME_MAX, "NBD must be able to say the name");

/// One set of data connections of one attempt: a fence ends it, and what comes after it is the next (rule D4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u32);

/// The secret part of the export names of one attempt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token([u8; ID_BYTES]);

impl Token {
    /// Draws a new one.
    ///
    /// # Errors
    /// The system's random source failed.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; ID_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// A token of known bytes, for tests of the wire.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// Whether the two are equal, in a time that does not tell where they differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// An export name of the migration door, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportName<'a> {
    /// The attempt.
    pub attempt: Attempt,
    /// The destination's process.
    pub instance: Instance,
    /// The set of connections.
    pub epoch: Epoch,
    /// The secret.
    pub token: Token,
    /// The disk.
    pub disk: &'a str,
}

/// Writes the name of a disk's export; a disk name beyond its limit is cut.
#[must_use]
pub fn export_name(
    attempt: Attempt,
    instance: Instance,
    epoch: Epoch,
    token: Token,
    disk: &str,
) -> heapless::String<MIGRATION_EXPORT_NAME_MAX> {
    use fmt::Write as _;
    let disk: heapless::String<DISK_NAME_MAX> = super::cut(disk);
    let secret = Attempt(token.0); // for its digits
    let mut name = heapless::String::new();
    let fits = write!(name, "{attempt}/{instance}/{:08x}/{secret}/{disk}", epoch.0);
    debug_assert!(fits.is_ok(), "the parts have fixed widths");
    name
}

impl<'a> ExportName<'a> {
    /// Takes a name apart; `None` when it is not one that [`export_name`] could have written.
    #[must_use]
    pub fn parse(name: &'a str) -> Option<Self> {
        let (attempt, rest) = part(name, ID_DIGITS)?;
        let (instance, rest) = part(rest, ID_DIGITS)?;
        let (epoch, rest) = part(rest, EPOCH_DIGITS)?;
        let (token, disk) = part(rest, ID_DIGITS)?;
        if disk.is_empty()
            || disk.len() > DISK_NAME_MAX
            || !epoch.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return None;
        }
        Some(Self {
            attempt: Attempt::from_hex(attempt)?,
            instance: Instance::from_hex(instance)?,
            epoch: Epoch(u32::from_str_radix(epoch, 16).ok()?),
            token: Token(Attempt::from_hex(token)?.0),
            disk,
        })
    }
}

/// The first `digits` bytes, which end with a slash, and what follows it.
fn part(text: &str, digits: usize) -> Option<(&str, &str)> {
    let (part, rest) = text.split_at_checked(digits)?;
    Some((part, rest.strip_prefix('/')?))
}
