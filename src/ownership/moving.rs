//! That a VMM has been told to move its guest, and how that guest was: one small file beside the record, for the
//! process that comes after one that dies meanwhile.
//!
//! It is worth nothing for who owns; it only says that a guest may stand, here or there, whose VMM nobody else speaks
//! to. One that is broken counts as none.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic "BFMOVING" |
//! | 8 | 2 | format version, little-endian |
//! | 10 | | postcard: the [`Moving`] |
//! | end - 4 | 4 | CRC-32C of everything before, little-endian |

use serde::{Deserialize, Serialize};

use super::Attempt;
use super::file::Form;
use crate::limits::MOVING_FILE_MAX;

const FORM: Form = Form { magic: *b"BFMOVING", version: 1, bytes_max: MOVING_FILE_MAX };

/// A guest whose state moves, as far as this host knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// The attempt.
    pub attempt: Attempt,
    /// It comes; else it leaves.
    pub arrives: bool,
    /// It ran before: it is to run where it ends up.
    pub ran: bool,
}

impl Moving {
    /// Its file.
    #[must_use]
    pub(super) fn encode(&self) -> Vec<u8> {
        // It has one length, and a test says that it fits.
        let mut body = [0; MOVING_FILE_MAX];
        let body = postcard::to_slice(self, &mut body).map_or(&[][..], |body| body);
        FORM.wrap(body).unwrap_or_default()
    }

    /// Reads a file; `None`: it is none.
    #[must_use]
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(FORM.unwrap(bytes).ok()?) {
            Ok((moving, [])) => Some(moving),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_is_read_again_and_a_broken_one_is_none() {
        let moving = Moving { attempt: Attempt([0xff; 16]), arrives: true, ran: false };
        let bytes = moving.encode();
        assert_eq!(Moving::decode(&bytes), Some(moving));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!((Moving::decode(&flipped), Moving::decode(&bytes[..at])), (None, None), "byte {at}");
        }
    }
}
