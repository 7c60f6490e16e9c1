//! Frames: a postcard message and its CRC-32C (little-endian), COBS-encoded, ended by a zero byte.
//!
//! The checksum of a reply is inverted. Without that a line that echoes (a terminal that nobody made raw) would bring
//! our own replies back as requests: a refusal has the bytes of a claim.
//!
//! Pure: bytes in, bytes out. Everything is bounded by [`CONTROL_FRAME_MAX`]; no input panics. A zero byte can stand
//! only between frames, so a byte pipe that has lost its place (a serial port) finds it again at the next one; empty
//! frames are skipped.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::wire::{Reply, Request};
use crate::limits::CONTROL_FRAME_MAX;

/// Ends a frame. One more of it before a frame does no harm.
pub const DELIMITER: u8 = 0;
/// Length of the checksum.
const CHECKSUM: usize = size_of::<u32>();

/// What travels in a frame.
pub trait Message: Serialize + DeserializeOwned {
    /// The checksum on the wire is the CRC-32C with these bits inverted: what goes one way means nothing the other way.
    const INVERTED: u32;
}

impl Message for Request {
    const INVERTED: u32 = 0;
}

impl Message for Reply {
    const INVERTED: u32 = u32::MAX;
}

/// Why bytes are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// The frame does not end within the largest size, or the message does not fit it.
    TooLong,
    /// Not COBS, or the checksum is wrong: not our protocol, or a broken pipe.
    Garbage,
    /// A whole frame with a right checksum that this version cannot read: the peer is of another version.
    Unknown,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the frame is too long",
            Self::Garbage => "the bytes are not a control frame",
            Self::Unknown => "the message is not known; is the peer of another version?",
        })
    }
}

impl std::error::Error for FrameError {}

/// Writes one frame with its delimiter into `out` and returns its length.
///
/// # Errors
/// [`FrameError::TooLong`] when the message does not fit: a bug of ours.
pub fn encode<T: Message>(message: &T, out: &mut [u8; CONTROL_FRAME_MAX]) -> Result<usize, FrameError> {
    let mut plain = [0; CONTROL_FRAME_MAX];
    let room = CONTROL_FRAME_MAX - CHECKSUM;
    let length = postcard::to_slice(message, &mut plain[..room]).map_err(|_| FrameError::TooLong)?.len();
    let checksum = (crc32c::crc32c(&plain[..length]) ^ T::INVERTED).to_le_bytes();
    plain[length..length + CHECKSUM].copy_from_slice(&checksum);
    let encoded = cobs::try_encode(&plain[..length + CHECKSUM], &mut out[..CONTROL_FRAME_MAX - 1])
        .map_err(|_| FrameError::TooLong)?;
    out[encoded] = DELIMITER;
    Ok(encoded + 1)
}

/// Reads one frame, given without its delimiter. Bytes after the message are fields of a newer version: ignored.
///
/// # Errors
/// [`FrameError`]; no input panics.
pub fn decode<T: Message>(frame: &[u8]) -> Result<T, FrameError> {
    let mut plain = [0; CONTROL_FRAME_MAX];
    if frame.len() >= CONTROL_FRAME_MAX {
        return Err(FrameError::TooLong);
    }
    let length = cobs::decode(frame, &mut plain).map_err(|_| FrameError::Garbage)?.frame_size();
    let (message, checksum) = plain[..length].split_last_chunk::<CHECKSUM>().ok_or(FrameError::Garbage)?;
    if crc32c::crc32c(message) ^ T::INVERTED != u32::from_le_bytes(*checksum) {
        return Err(FrameError::Garbage);
    }
    postcard::from_bytes(message).map_err(|_| FrameError::Unknown)
}

/// Finds frames in a stream of bytes.
#[derive(Debug)]
pub struct Assembler {
    bytes: Box<[u8; CONTROL_FRAME_MAX]>,
    /// What was received and not yet taken: `bytes[start..end]`.
    start: usize,
    end: usize,
}

impl Default for Assembler {
    fn default() -> Self {
        Self { bytes: Box::new([0; CONTROL_FRAME_MAX]), start: 0, end: 0 }
    }
}

impl Assembler {
    /// Where the next bytes go; never empty after [`Assembler::take`] has returned `None`.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// Says that `count` bytes were put into [`Assembler::space`].
    pub fn received(&mut self, count: usize) {
        self.end = (self.end + count).min(CONTROL_FRAME_MAX);
    }

    /// Forgets what has been received.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// What has been received and belongs to no message that was taken.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.start < self.end
    }

    /// Takes the next whole message; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the frame at fault is gone: a socket should be closed now, a byte pipe is good for what comes
    /// next.
    pub fn take<T: Message>(&mut self) -> Result<Option<T>, FrameError> {
        while let Some(length) = self.bytes[self.start..self.end].iter().position(|&b| b == DELIMITER) {
            let frame = self.start..self.start + length;
            self.start = frame.end + 1;
            if !frame.is_empty() {
                return decode(&self.bytes[frame]).map(Some);
            }
        }
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end == CONTROL_FRAME_MAX {
            self.end = 0;
            return Err(FrameError::TooLong);
        }
        Ok(None)
    }
}
