//! The random numbers that name things: attempts, lineages, processes, words of the operator, hosts.
//!
//! Each is 128 bits and a type of its own, so that none is ever compared with another. They print as 32 lowercase
//! hexadecimal digits; `{:.8}` gives the short form for people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of every id.
pub const ID_BYTES: usize = 16;
/// Hexadecimal digits of every id.
pub const ID_DIGITS: usize = 2 * ID_BYTES;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; ID_BYTES]);

        impl $name {
            /// All zero: stands for "none" in the hello, and is never drawn.
            pub const NONE: Self = Self([0; ID_BYTES]);

            /// Draws a new one.
            ///
            /// # Errors
            /// The system's random source failed.
            pub fn random() -> Result<Self, getrandom::Error> {
                let mut bytes = [0; ID_BYTES];
                getrandom::fill(&mut bytes)?;
                Ok(Self(bytes))
            }

            /// Reads 32 lowercase hexadecimal digits, the form that [`fmt::Display`] writes.
            #[must_use]
            pub fn from_hex(digits: &str) -> Option<Self> {
                bytes_from_hex(digits).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(hex(&self.0, &mut [0; ID_DIGITS]))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:.8})"), self)
            }
        }
    };
}

id! {
    /// One try to move the guest (rule M1). An attempt that has ended never lives again: going on takes a new number.
    Attempt
}
id! {
    /// One guest's history, drawn by `claim`. Hosts that hold different lineages have nothing to say to each other.
    Lineage
}
id! {
    /// The word of an operator that began a term: two hosts taken by hand in the same term are told apart by it
    /// (rule M8).
    Word
}
id! {
    /// One process (rule D12): what a destination knew before it restarted, it no longer knows.
    Instance
}
id! {
    /// One machine, by its machine id.
    Host
}
id! {
    /// The names and identities of the images that a record speaks of, as one fingerprint.
    Images
}

/// Writes `bytes` as hexadecimal digits into `text`.
fn hex<'a>(bytes: &[u8; ID_BYTES], text: &'a mut [u8; ID_DIGITS]) -> &'a str {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (byte, pair) in bytes.iter().zip(text.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    str::from_utf8(text).unwrap_or_default()
}

/// Reads exactly [`ID_DIGITS`] lowercase hexadecimal digits.
fn bytes_from_hex(digits: &str) -> Option<[u8; ID_BYTES]> {
    let digits: &[u8; ID_DIGITS] = digits.as_bytes().try_into().ok()?;
    let mut bytes = [0; ID_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_32_digits_or_the_first_8() {
        let id = Attempt([0xab, 0x01, 0x23, 0xff, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(id.to_string(), "ab0123ff0405060708090a0b0c0d0e0f");
        assert_eq!(format!("{id:.8}"), "ab0123ff");
        assert_eq!(Attempt::from_hex(&id.to_string()), Some(id));
    }

    #[test]
    fn reads_only_what_it_writes() {
        for bad in ["", "ab", "AB0123ff0405060708090a0b0c0d0e0f", "ab0123ff0405060708090a0b0c0d0e0f0", "gé"] {
            assert_eq!(Host::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn two_draws_differ() {
        assert_ne!(Lineage::random().expect("random"), Lineage::random().expect("random"));
    }
}
