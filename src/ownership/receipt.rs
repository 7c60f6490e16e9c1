//! What was verified of the copy that was handed over last, on either side of it: one small file beside the record.
//!
//! It is worth nothing for who owns, and nobody waits for it: it is written when the switchover is over, and a host
//! that dies between the two has the guest, or has given it, without a receipt. One that is broken counts as none.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic "BFRECEIP" |
//! | 8 | 2 | format version, little-endian |
//! | 10 | | postcard: the [`Receipt`] |
//! | end - 4 | 4 | CRC-32C of everything before, little-endian |

use serde::{Deserialize, Serialize};

use super::{Attempt, Lineage, Order, Peer};
use crate::digest::{Digest, Verified};
use crate::limits::RECEIPT_FILE_MAX;

const MAGIC: [u8; 8] = *b"BFRECEIP";
const VERSION: u16 = 2;
const HEAD: usize = MAGIC.len() + size_of::<u16>();
const CHECKSUM: usize = size_of::<u32>();

/// What was verified of a copy, and what it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The attempt.
    pub attempt: Attempt,
    /// The guest's history.
    pub lineage: Lineage,
    /// The order that was handed over.
    pub order: Order,
    /// The other host.
    pub peer: Peer,
    /// This host gave the guest; else it got it.
    pub gave: bool,
    /// What was to be verified.
    pub verified: Verified,
    /// Bytes that both sides have hashed to the same digests.
    pub verified_bytes: u64,
    /// The digest over them; all zero when nothing was verified.
    pub root: Digest,
    /// Data sent; known to the source only.
    pub sent_bytes: Option<u64>,
    /// What needed not be sent; known to the source only.
    pub equal_bytes: Option<u64>,
    /// Bytes that were taken as equal by their base, on the word of the source's user, and that nobody has hashed.
    pub unread_bytes: u64,
}

impl Receipt {
    /// Its file.
    #[must_use]
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; RECEIPT_FILE_MAX];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bytes[MAGIC.len()..HEAD].copy_from_slice(&VERSION.to_le_bytes());
        // Everything in it has a fixed capacity, and a test says that all of it together fits.
        let length =
            postcard::to_slice(self, &mut bytes[HEAD..RECEIPT_FILE_MAX - CHECKSUM]).map_or(0, |body| body.len());
        bytes.truncate(HEAD + length);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// Reads a file; `None`: it is no receipt.
    #[must_use]
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (rest, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
        if crc32c::crc32c(rest) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let rest = rest.strip_prefix(&MAGIC)?;
        // Version 1 ended before the bytes that nobody has hashed: there were none.
        let older = rest.strip_prefix(&1_u16.to_le_bytes()).map(|body| [body, &[0]].concat());
        let body = match &older {
            Some(body) => body,
            None => rest.strip_prefix(&VERSION.to_le_bytes())?,
        };
        match postcard::take_from_bytes(body) {
            Ok((receipt, [])) => Some(receipt),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::PLACE_MAX;
    use crate::ownership::{Address, Host};

    fn longest() -> Receipt {
        Receipt {
            attempt: Attempt([0xff; 16]),
            lineage: Lineage([0xff; 16]),
            order: Order { term: u32::MAX, generation: u64::MAX },
            peer: Peer {
                host: Host([0xff; 16]),
                address: Address::try_from("x".repeat(PLACE_MAX).as_str()).expect("fits"),
            },
            gave: true,
            verified: Verified::Full,
            verified_bytes: u64::MAX,
            root: [0xff; 32],
            sent_bytes: Some(u64::MAX),
            equal_bytes: Some(u64::MAX),
            unread_bytes: u64::MAX,
        }
    }

    #[test]
    fn the_longest_receipt_fits_and_is_read_again() {
        let bytes = longest().encode();
        assert!(bytes.len() <= RECEIPT_FILE_MAX);
        assert_eq!(Receipt::decode(&bytes), Some(longest()));
    }

    #[test]
    fn one_of_version_1_is_read() {
        let old = Receipt { unread_bytes: 0, ..longest() };
        let mut bytes = old.encode();
        bytes.truncate(bytes.len() - CHECKSUM - 1);
        bytes[MAGIC.len()] = 1;
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        assert_eq!(Receipt::decode(&bytes), Some(old));
    }

    #[test]
    fn what_is_broken_or_something_else_is_none() {
        let bytes = longest().encode();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert_eq!(Receipt::decode(&flipped), None, "byte {at}");
            assert_eq!(Receipt::decode(&bytes[..at]), None, "{at} bytes");
        }
        assert_eq!(Receipt::decode(b"BFRECORD\x01\x00"), None);
    }
}
