//! The bytes of a record's file, and what the files of a state directory have in common. Pure: bytes in, records out;
//! nothing of what is wrong with bytes makes a record.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic "BFRECORD" |
//! | 8 | 2 | format version, little-endian |
//! | 10 | | postcard: the [`Record`], then the [`ImageList`] that its fingerprint is of |
//! | end - 4 | 4 | CRC-32C of everything before, little-endian, in every version |

use std::fmt;

use serde::{Deserialize, Serialize};

use super::images::ImageList;
use super::{Images, Record};
use crate::limits::RECORD_FILE_MAX;

const MAGIC: [u8; 8] = *b"BFRECORD";
const VERSION: u16 = 1;
const FORM: Form = Form { magic: MAGIC, version: VERSION, bytes_max: RECORD_FILE_MAX };
const HEAD: usize = MAGIC.len() + size_of::<u16>();
const CHECKSUM: usize = size_of::<u32>();

/// What the files of a state directory have around their content: a magic, a version, a checksum.
pub(super) struct Form {
    /// The first eight bytes.
    pub(super) magic: [u8; 8],
    /// The version of the content.
    pub(super) version: u16,
    /// The longest file.
    pub(super) bytes_max: usize,
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The record.
    pub record: Record,
    /// The images whose fingerprint is in it; empty where it names none.
    pub images: ImageList,
}

/// Why bytes are not a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Shorter than any record, or longer.
    Length(usize),
    /// Another file.
    Magic,
    /// Not what was written.
    Checksum,
    /// Written by another version of this program.
    Version(u16),
    /// The checksum is right and the content is none.
    Content,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(0) => write!(f, "it is empty"),
            Self::Length(bytes) => write!(f, "{bytes} bytes are no such file's length"),
            Self::Magic => write!(f, "it is not blockferry's"),
            Self::Checksum => write!(f, "its checksum is wrong"),
            Self::Version(version) => write!(f, "it has format version {version}, this program knows {VERSION}"),
            Self::Content => write!(f, "its content makes no sense"),
        }
    }
}

impl Form {
    /// The file of this content; `None` when it is too long.
    pub(super) fn wrap(&self, body: &[u8]) -> Option<Vec<u8>> {
        if HEAD + body.len() + CHECKSUM > self.bytes_max {
            return None;
        }
        let mut bytes = [&self.magic, &self.version.to_le_bytes()[..], body].concat();
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        Some(bytes)
    }

    /// The content of a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn unwrap<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], Broken> {
        if bytes.len() < HEAD + CHECKSUM || bytes.len() > self.bytes_max {
            return Err(Broken::Length(bytes.len()));
        }
        let (head, body) = bytes.split_at(HEAD);
        if head[..self.magic.len()] != self.magic {
            return Err(Broken::Magic);
        }
        let (body, checksum) = body.split_last_chunk::<CHECKSUM>().ok_or(Broken::Length(bytes.len()))?;
        if crc32c::crc32c(&bytes[..bytes.len() - CHECKSUM]) != u32::from_le_bytes(*checksum) {
            return Err(Broken::Checksum);
        }
        match u16::from_le_bytes([head[MAGIC.len()], head[MAGIC.len() + 1]]) {
            version if version == self.version => Ok(body),
            version => Err(Broken::Version(version)),
        }
    }
}

/// The file of `content`.
#[must_use]
pub(super) fn encode(content: &Content) -> Vec<u8> {
    let mut body = [0; RECORD_FILE_MAX - HEAD - CHECKSUM];
    // Everything in it has a fixed capacity, and a test says that all of it together fits.
    let body = postcard::to_slice(content, &mut body).map_or(&[][..], |body| body);
    FORM.wrap(body).unwrap_or_default()
}

/// Reads a file.
///
/// # Errors
/// What is wrong with it: it is no record.
pub(super) fn decode(bytes: &[u8]) -> Result<Content, Broken> {
    match postcard::take_from_bytes::<Content>(FORM.unwrap(bytes)?) {
        Ok((content, [])) if is_whole(&content) => Ok(content),
        _ => Err(Broken::Content),
    }
}

/// Whether the images are those that the record's fingerprint is of.
fn is_whole(content: &Content) -> bool {
    content.images.fingerprint() == content.record.images || content.images.fingerprint() == Images::NONE
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk::Lasting;
    use crate::limits::{DISK_NAME_MAX, DISKS_MAX, PLACE_MAX};
    use crate::ownership::{Address, Attempt, Host, Lineage, Offer, Order, Peer, State, Word};

    /// The longest record that there can be.
    fn longest() -> Content {
        let mut images = ImageList::default();
        for disk in 0..DISKS_MAX {
            let name = format!("{disk:0DISK_NAME_MAX$}");
            images.add(&name, Lasting::File { inode: u64::MAX, born_ns: Some(i128::MAX) }, Path::new("/"));
        }
        let address = Address::try_from("x".repeat(PLACE_MAX).as_str()).expect("fits");
        let to = Peer { host: Host([0xff; 16]), address };
        let record = Record {
            lineage: Lineage([0xff; 16]),
            order: Order { term: u32::MAX, generation: u64::MAX },
            word: Word([0xff; 16]),
            host: Host([0xff; 16]),
            images: images.fingerprint(),
            state: State::Offered { attempt: Attempt([0xff; 16]), to, offer: Offer::Closed },
        };
        Content { record, images }
    }

    #[test]
    fn the_longest_record_fits_and_is_read_again() {
        let bytes = encode(&longest());
        assert!(bytes.len() <= RECORD_FILE_MAX, "{}", bytes.len());
        assert_eq!(decode(&bytes), Ok(longest()));
    }

    #[test]
    fn the_bytes_are_pinned() {
        let state = State::Owner { attempt: Attempt([4; 16]) };
        let record = Record {
            lineage: Lineage([1; 16]),
            order: Order { term: 1, generation: 300 },
            word: Word([2; 16]),
            host: Host([3; 16]),
            images: Images::NONE,
            state,
        };
        let bytes = encode(&Content { record, images: ImageList::default() });
        let body =
            [&b"BFRECORD\x01\x00"[..], &[1; 16], &[1, 0xac, 2], &[2; 16], &[3; 16], &[0; 16], &[3], &[4; 16], &[0]]
                .concat();
        assert_eq!(bytes[..bytes.len() - 4], body);
    }

    #[test]
    fn a_bit_that_flipped_makes_no_record() {
        let bytes = encode(&longest());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(matches!(decode(&flipped), Err(Broken::Checksum | Broken::Magic)), "byte {at}");
        }
    }

    #[test]
    fn a_part_of_a_record_makes_no_record() {
        let bytes = encode(&longest());
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(decode(&longer), Err(Broken::Checksum));
        assert_eq!(decode(&vec![0; RECORD_FILE_MAX + 1]), Err(Broken::Length(RECORD_FILE_MAX + 1)));
    }

    #[test]
    fn another_version_and_other_files_are_told_apart() {
        let mut bytes = encode(&longest());
        bytes[MAGIC.len()] = 2;
        let end = bytes.len() - CHECKSUM;
        let checksum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&checksum);
        assert_eq!(decode(&bytes), Err(Broken::Version(2)));
        assert_eq!(decode(&[b'x'; 100]), Err(Broken::Magic));
        let lines = [Broken::Version(2), Broken::Magic, Broken::Length(0), Broken::Length(9), Broken::Checksum];
        assert_eq!(
            lines.map(|broken| broken.to_string()),
            [
                "it has format version 2, this program knows 1",
                "it is not blockferry's",
                "it is empty",
                "9 bytes are no such file's length",
                "its checksum is wrong",
            ]
        );
    }

    #[test]
    fn images_that_the_record_does_not_speak_of_make_no_record() {
        let mut content = longest();
        content.record.images = Images([1; 16]);
        assert_eq!(decode(&encode(&content)), Err(Broken::Content));
    }

    proptest::proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }
}
