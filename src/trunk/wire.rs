//! The bytes of the stream path: the heads of frames, of blocks, and of their acknowledgements.
//!
//! Bytes in, values out, and back. A frame is a `u32`, little-endian, whose low 24 bits are the length of what follows
//! and whose high 8 bits are its [`Kind`]; a frame of kind 0 is therefore what a phase connection has always carried.
//! Heads are postcard with numbers of fixed width, so that their length is fixed; the data behind a head is as it is.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::{FRAME_MAX, STREAM_BLOCK_MAX, STREAM_SLOTS};

/// Bytes in front of each frame.
pub const FRAME_HEAD: usize = 4;
/// Bytes of a [`Block`].
pub const BLOCK_HEAD: usize = 18;
/// Bytes of a [`Done`].
pub const DONE_LENGTH: usize = 9;
/// Bytes of a frame of [`Kind::Room`].
pub const ROOM_LENGTH: usize = 4;
/// Where the kind begins in a frame's head.
const KIND_SHIFT: u32 = 24;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 0: a message of the phases.
    Phases = 0,
    /// 1: a message of those who ask for digests: the same messages, in a conversation of their own.
    Digests = 1,
    /// 2: source to destination: a [`Block`], and the data of a write.
    Blocks = 2,
    /// 3: destination to source: one or more [`Done`].
    Done = 3,
    /// 4: bytes of the guest's state; none at all: this side has sent all of it.
    State = 4,
    /// 5: a `u32`: so many bytes more of the state fit; 0: no more is taken.
    Room = 5,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Phases, Self::Digests, Self::Blocks, Self::Done, Self::State, Self::Room];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// The shortest and the longest frame of it.
    fn lengths(self) -> (usize, usize) {
        match self {
            Self::Phases | Self::Digests => (1, FRAME_MAX),
            Self::Blocks => (BLOCK_HEAD, BLOCK_HEAD + STREAM_BLOCK_MAX),
            Self::Done => (DONE_LENGTH, DONE_LENGTH * STREAM_SLOTS),
            Self::State => (0, STREAM_BLOCK_MAX),
            Self::Room => (ROOM_LENGTH, ROOM_LENGTH),
        }
    }
}

/// The head of a frame of `length` bytes.
#[must_use]
pub fn head(kind: Kind, length: usize) -> [u8; FRAME_HEAD] {
    // The callers' lengths are within those of the kind.
    (u32::try_from(length).unwrap_or(u32::MAX) | (kind as u32) << KIND_SHIFT).to_le_bytes()
}

/// The whole frame that says how much more of the state fits.
#[must_use]
pub fn room(bytes: u32) -> [u8; FRAME_HEAD + ROOM_LENGTH] {
    let mut frame = [0; FRAME_HEAD + ROOM_LENGTH];
    frame[..FRAME_HEAD].copy_from_slice(&head(Kind::Room, ROOM_LENGTH));
    frame[FRAME_HEAD..].copy_from_slice(&bytes.to_le_bytes());
    frame
}

/// What follows a head.
///
/// # Errors
/// A [`Fault`]: it is no head.
pub fn parse_head(head: [u8; FRAME_HEAD]) -> Result<(Kind, usize), Fault> {
    let word = u32::from_le_bytes(head);
    let kind = Kind::from_number(word >> KIND_SHIFT).ok_or(Fault::Kind(head[FRAME_HEAD - 1]))?;
    let length = usize::try_from(word & ((1 << KIND_SHIFT) - 1)).unwrap_or(usize::MAX);
    let (least, most) = kind.lengths();
    let fits = (least..=most).contains(&length) && (kind != Kind::Done || length.is_multiple_of(DONE_LENGTH));
    if fits { Ok((kind, length)) } else { Err(Fault::Length(kind, length)) }
}

/// What is to be done with a range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verb {
    /// 0: write the data that follows.
    Write,
    /// 1: make it read as zero.
    Zero,
    /// 2: make durable what was acknowledged of this disk; offset and length are zero.
    Flush,
}

/// The head of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// What is to be done.
    pub verb: Verb,
    /// The disk's place in the offer.
    pub disk: u8,
    /// Numbers the blocks of one disk, from 0, on one connection; after the largest comes 0.
    #[serde(with = "postcard::fixint::le")]
    pub number: u32,
    /// Where the range begins.
    #[serde(with = "postcard::fixint::le")]
    pub offset_bytes: u64,
    /// How long it is.
    #[serde(with = "postcard::fixint::le")]
    pub length_bytes: u32,
}

impl Block {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_HEAD] {
        let mut bytes = [0; BLOCK_HEAD];
        // It has exactly this length; a test says so.
        let _ = postcard::to_slice(self, &mut bytes);
        bytes
    }

    /// Reads a frame of `length` bytes that begins with `head`.
    ///
    /// # Errors
    /// [`Fault::Block`]: it is none, or its data is not as long as it says.
    pub fn decode(head: &[u8; BLOCK_HEAD], length: usize) -> Result<Self, Fault> {
        let block: Self = postcard::from_bytes(head).map_err(|_| Fault::Block)?;
        let data = length - BLOCK_HEAD;
        let fits = match block.verb {
            Verb::Write => data > 0 && usize::try_from(block.length_bytes) == Ok(data),
            Verb::Zero => data == 0 && block.length_bytes > 0,
            Verb::Flush => data == 0 && block.length_bytes == 0 && block.offset_bytes == 0,
        };
        if fits && block.offset_bytes.checked_add(block.length_bytes.into()).is_some() {
            Ok(block)
        } else {
            Err(Fault::Block)
        }
    }
}

/// A block has been done, or has failed. Those of one disk come in the order of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The disk's place in the offer.
    pub disk: u8,
    /// The block's number.
    #[serde(with = "postcard::fixint::le")]
    pub number: u32,
    /// 0, or an error number of the NBD standard.
    #[serde(with = "postcard::fixint::le")]
    pub error: u32,
}

impl Done {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; DONE_LENGTH] {
        let mut bytes = [0; DONE_LENGTH];
        let _ = postcard::to_slice(self, &mut bytes);
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Fault::Block`]: it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        postcard::from_bytes(bytes).map_err(|_| Fault::Block)
    }
}

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No kind has this number.
    Kind(u8),
    /// Frames of this kind are never so long, or so short.
    Length(Kind, usize),
    /// A block's head, or an acknowledgement, is malformed.
    Block,
    /// Frames of this kind do not go this way.
    Way(Kind),
    /// More blocks or messages than were agreed on.
    TooMany,
    /// An acknowledgement of what was not sent, or not now.
    Unasked,
    /// A block of no disk, or beyond its end.
    Range,
    /// Something of a guest's state that is not on its way, or not any more.
    State,
    /// More of it than there is room for.
    Room,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(number) => write!(f, "a frame of an unknown kind, {number}"),
            Self::Length(kind, length) => write!(f, "a frame of kind {} with {length} bytes", *kind as u32),
            Self::Block => f.write_str("a malformed block"),
            Self::Way(kind) => write!(f, "a frame of kind {}, which does not go this way", *kind as u32),
            Self::TooMany => f.write_str("more blocks or messages than fit"),
            Self::Unasked => f.write_str("an acknowledgement of what was not sent"),
            Self::Range => f.write_str("a block that lies on no disk"),
            Self::State => f.write_str("something of a guest's state that is not on its way"),
            Self::Room => f.write_str("more of the guest's state than there is room for"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MIB;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn block(verb: Verb, offset_bytes: u64, length_bytes: u32) -> Block {
        Block { verb, disk: 3, number: 0x0102_0304, offset_bytes, length_bytes }
    }

    #[test]
    fn heads_blocks_and_acknowledgements_have_their_golden_bytes() {
        assert_eq!(hex(&head(Kind::Phases, 300)), "2c010000");
        assert_eq!(hex(&head(Kind::Digests, 300)), "2c010001");
        assert_eq!(hex(&head(Kind::Blocks, BLOCK_HEAD + STREAM_BLOCK_MAX)), "12000102");
        assert_eq!(hex(&head(Kind::Done, 18)), "12000003");
        assert_eq!(hex(&head(Kind::State, STREAM_BLOCK_MAX)), "00000104");
        assert_eq!(hex(&head(Kind::State, 0)), "00000004");
        assert_eq!(hex(&room(0x0102_0304)), "0400000504030201");
        assert_eq!(hex(&block(Verb::Write, 1 << 40, 4096).encode()), "000304030201000000000001000000100000");
        assert_eq!(hex(&block(Verb::Zero, u64::MAX - 4096, 4096).encode()), "010304030201ffefffffffffffff00100000");
        assert_eq!(hex(&block(Verb::Flush, 0, 0).encode()), "020304030201000000000000000000000000");
        assert_eq!(hex(&Done { disk: 3, number: 7, error: 28 }.encode()), "03070000001c000000");
    }

    #[test]
    fn what_was_written_is_read_again() {
        for (block, data) in
            [(block(Verb::Write, 4096, 4096), 4096), (block(Verb::Zero, 0, u32::MAX), 0), (block(Verb::Flush, 0, 0), 0)]
        {
            assert_eq!(Block::decode(&block.encode(), BLOCK_HEAD + data), Ok(block));
        }
        let done = Done { disk: 255, number: u32::MAX, error: 5 };
        assert_eq!(Done::decode(&done.encode()), Ok(done));
        for kind in Kind::ALL {
            for length in [kind.lengths().0, kind.lengths().1] {
                assert_eq!(parse_head(head(kind, length)), Ok((kind, length)));
            }
        }
    }

    #[test]
    fn peer_sends_heads_that_are_none() {
        assert_eq!(parse_head([1, 0, 0, 6]), Err(Fault::Kind(6)));
        assert_eq!(parse_head([0xff; 4]), Err(Fault::Kind(255)));
        for kind in Kind::ALL {
            let (least, most) = kind.lengths();
            let short = least.checked_sub(1);
            for length in [most + 1, 16 * MIB - 1].into_iter().chain(short) {
                assert_eq!(parse_head(head(kind, length)), Err(Fault::Length(kind, length)));
            }
        }
        assert_eq!(parse_head(head(Kind::Done, 10)), Err(Fault::Length(Kind::Done, 10)));
    }

    #[test]
    fn peer_sends_blocks_that_are_none() {
        for (block, data) in [
            (block(Verb::Write, 0, 4096), 4095),
            (block(Verb::Write, 0, 0), 0),
            (block(Verb::Write, u64::MAX, 1), 1),
            (block(Verb::Zero, 0, 0), 0),
            (block(Verb::Zero, 0, 1), 1),
            (block(Verb::Zero, u64::MAX, 1), 0),
            (block(Verb::Flush, 1, 0), 0),
            (block(Verb::Flush, 0, 1), 0),
            (block(Verb::Flush, 0, 0), 1),
        ] {
            assert_eq!(Block::decode(&block.encode(), BLOCK_HEAD + data), Err(Fault::Block), "{block:?} {data}");
        }
        let mut unknown = block(Verb::Flush, 0, 0).encode();
        unknown[0] = 3;
        assert_eq!(Block::decode(&unknown, BLOCK_HEAD), Err(Fault::Block));
    }
}
