//! The bytes of the phase protocol: the hello, frames, messages, and the names of migration exports.
//!
//! Bytes in, values out, and back; no socket, no state. After the [`Hello`]s each side sends frames: a `u32`
//! little-endian length and one postcard message of at most [`FRAME_MAX`] bytes. Everything decodes into types of fixed
//! capacity, so that no peer can make this side allocate. Numbers of messages are append-only and pinned by a test.
//! Strings are the peer's: whoever prints one escapes it.

mod export_name;
mod hello;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use export_name::{Epoch, ExportName, MIGRATION_EXPORT_NAME_MAX, Token, export_name};
pub use hello::{
    BootId, Capabilities, Challenge, HELLO_LENGTH, Hello, HelloError, MAGIC, Role, VERSION_HIGHEST, VERSION_LOWEST,
    choose_version,
};

use crate::domain::Stays;
use crate::limits::{CAUSE_MAX, DIGESTS_MAX, DISK_NAME_MAX, DISKS_MAX, FRAME_MAX, PROBLEMS_MAX};
use crate::ownership::{Instance, Promise, Stamp, Summary};

/// Bytes of a frame's length.
pub const FRAME_HEAD: usize = 4;

/// A disk's name.
pub type DiskName = heapless::String<DISK_NAME_MAX>;
/// Why something failed, for the other side's user.
pub type Cause = heapless::String<CAUSE_MAX>;

/// Most bytes of a page of LAYERS: 8192 regions.
pub const LAYERS_PAGE: usize = 1024;

/// What to do with disks that are not empty at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Refuse them.
    CopyAll,
    /// Overwrite them.
    Overwrite,
    /// They hold an older copy: compare digests, and send only what differs.
    Incremental,
}

/// What of the copy is verified before it is sealed (rule D14).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Verify {
    /// Nothing; the receipt says so.
    None,
    /// Every region that this attempt sent, or found equal by its digest.
    #[default]
    Written,
    /// Every region of every disk.
    Full,
}

/// A digest of one region: BLAKE3 of its bytes.
pub type Digest = [u8; 32];

/// One disk that the source wants to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOffer {
    /// Its name, the same on both sides.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// How much of it is data, as far as its holes tell.
    pub data_bytes: u64,
    /// The granularity of its dirty map.
    pub granularity_bytes: u64,
}

/// One disk that does not move: the destination must reach it by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StayingDisk {
    /// Its name, the same on both sides.
    pub name: DiskName,
    /// Why it stays.
    pub why: Stays,
    /// Its size, where this side has it open.
    pub size_bytes: Option<u64>,
}

/// Source to destination: the first message of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The attempt; its order is one above the one that the sender owns at.
    pub stamp: Stamp,
    /// The destination's challenge of this connection, echoed (rule M1).
    pub challenge: Challenge,
    /// What may be overwritten.
    pub mode: Mode,
    /// The disks.
    pub disks: heapless::Vec<DiskOffer, DISKS_MAX>,
    /// Connections per disk that the source would like to open.
    pub connections: u8,
    /// What will be verified.
    pub verify: Verify,
    /// What has been sent stays, however the attempt ends: another one will go on from it.
    pub keep_partial: bool,
    /// The guest's state will follow, by the VMM drivers of both sides (rule M11).
    pub state: bool,
    /// The disks that stay where they are.
    pub staying: heapless::Vec<StayingDisk, DISKS_MAX>,
    /// The user wants to move even if the destination cannot reach one of those.
    pub heedless: bool,
}

/// How far the guest's state is at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Standing {
    /// None has come.
    None,
    /// It comes.
    Loading,
    /// It is loaded whole, and the guest stands.
    Loaded,
    /// The guest runs.
    Running,
    /// It cannot be loaded, or the guest cannot run.
    Failed,
}

/// What the destination says of one offered disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReady {
    /// It was checked to read as zero everywhere, and nothing has been written since (rule D10).
    pub reads_as_zero: bool,
    /// Connections that may be open to it at once.
    pub connections: u8,
    /// It may hold much of what is to come, an older copy or what an earlier attempt had sent: digests tell what
    /// differs (rule D12). Never set together with `reads_as_zero`.
    pub compare: bool,
}

/// Destination to source: everything is ready to receive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The attempt.
    pub stamp: Stamp,
    /// This process (rule D12).
    pub instance: Instance,
    /// The first set of connections.
    pub epoch: Epoch,
    /// The secret of the export names.
    pub token: Token,
    /// The disks, in the order of the offer.
    pub disks: heapless::Vec<DiskReady, DISKS_MAX>,
}

/// One reason to refuse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The disk; empty when it is not about one.
    pub disk: DiskName,
    /// What is wrong.
    pub cause: Cause,
}

/// A part of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// The disk.
    pub disk: DiskName,
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is.
    pub length_bytes: u64,
}

/// A message. The numbers are those of this order, from 0: a new one goes to the end and none is ever removed.
#[expect(clippy::large_enum_variant, reason = "one message at a time, of fixed capacity, never allocated by a peer")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// S to D: begin an attempt.
    Prepare(Prepare),
    /// D to S: ready to receive.
    Prepared(Prepared),
    /// D to S: PREPARE is refused, nothing has been touched.
    Refused {
        /// The attempt.
        stamp: Stamp,
        /// All that is wrong, or the first of it.
        problems: heapless::Vec<Problem, PROBLEMS_MAX>,
    },
    /// S to D: end all data connections of this epoch and before (rule D4).
    Fence {
        /// The attempt.
        stamp: Stamp,
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// D to S: they are shut down and their writers joined; a new epoch begins.
    Fenced {
        /// The attempt.
        stamp: Stamp,
        /// This process: only the same one still has what it was sent (rule D12).
        instance: Instance,
        /// The epoch that begins.
        epoch: Epoch,
    },
    /// S to D: all is sent; make it durable and wait.
    Seal {
        /// The attempt.
        stamp: Stamp,
        /// One digest over those of each disk's verified regions, in the order of the offer; none when nothing is
        /// verified.
        digests: heapless::Vec<Digest, DISKS_MAX>,
        /// Bytes that were taken as equal by their base on the user's word, and that nobody has hashed.
        unread_bytes: u64,
    },
    /// D to S: SEALED is durable.
    Sealed {
        /// The attempt.
        stamp: Stamp,
        /// How long the fsync of the disks took, in microseconds.
        fsync_us: u64,
    },
    /// S to D: GIVEN is durable; own.
    Go {
        /// The attempt.
        stamp: Stamp,
    },
    /// D to S: OWNER is durable.
    Running {
        /// The attempt.
        stamp: Stamp,
        /// The process that serves the guest.
        instance: Instance,
    },
    /// S to D: this attempt has ended for good.
    Abort {
        /// The attempt.
        stamp: Stamp,
        /// Why, for the destination's user.
        cause: Cause,
        /// Nobody wanted it to end: a connection or a process was lost. What has been sent stays for another attempt.
        keep: bool,
    },
    /// D to S: VOID is durable; this attempt will never be sealed (rule M6).
    Unsealed {
        /// The attempt.
        stamp: Stamp,
    },
    /// Either way: what does your record say of this attempt?
    Question {
        /// The attempt.
        stamp: Stamp,
    },
    /// The answer of the attempt's destination, and of any host that cannot answer a message about an attempt
    /// otherwise (rule M6).
    Record {
        /// The attempt that was asked for.
        stamp: Stamp,
        /// The record; `None`: there is none.
        record: Option<Summary>,
    },
    /// The answer of the attempt's source (rule M3). When it is given, GO follows.
    Promise {
        /// The attempt that was asked for.
        stamp: Stamp,
        /// The answer.
        promise: Promise,
    },
    /// Either way: the attempt cannot go on.
    Failed {
        /// The attempt.
        stamp: Stamp,
        /// Why, for the other side's user.
        cause: Cause,
        /// Where, when it is about data (rule D8).
        region: Option<Region>,
    },
    /// Either way: are you there?
    Ping {
        /// To be echoed.
        number: u64,
    },
    /// Either way: yes.
    Pong {
        /// The echo.
        number: u64,
    },
    /// S to D: what do you hold there? Read from the disk, after every write that was acknowledged before.
    Digest {
        /// The attempt.
        stamp: Stamp,
        /// The disk's place in the offer.
        disk: u8,
        /// Where the first region begins.
        offset_bytes: u64,
        /// How many regions; the last one of a disk may be short.
        regions: u8,
    },
    /// D to S: this.
    Digests {
        /// The attempt.
        stamp: Stamp,
        /// The disk's place in the offer.
        disk: u8,
        /// Where the first region begins.
        offset_bytes: u64,
        /// The digest of each region, in their order.
        digests: heapless::Vec<Digest, DIGESTS_MAX>,
    },
    /// S to D: from the answer on, this connection carries blocks too: the stream path.
    Stream {
        /// The attempt.
        stamp: Stamp,
        /// The process that is meant (rule D12).
        instance: Instance,
        /// The epoch that the blocks belong to (rule D4).
        epoch: Epoch,
        /// The secret of the attempt.
        token: Token,
    },
    /// D to S: they may come.
    Streaming {
        /// The attempt.
        stamp: Stamp,
        /// The epoch.
        epoch: Epoch,
    },
    /// S to D, on a connection of its own or on one that carries blocks: the guest's state follows, as soon as it is
    /// ready to be taken (rule M11).
    State {
        /// The attempt.
        stamp: Stamp,
        /// The guest ran: it is to run there, too.
        ran: bool,
    },
    /// D to S: a VMM waits for it. From the next byte on both ways of a connection of its own carry what the VMMs say
    /// to each other; else frames do.
    StateReady {
        /// The attempt.
        stamp: Stamp,
    },
    /// S to D: how far is the guest's state?
    StateQuestion {
        /// The attempt.
        stamp: Stamp,
    },
    /// D to S: so far.
    StateIs {
        /// The attempt.
        stamp: Stamp,
        /// How far.
        standing: Standing,
        /// Why it failed; empty: it did not.
        cause: Cause,
    },
    /// S to D, before anything is sent: what does your disk's top layer hold, where it is an overlay? The first page
    /// has the disk asked; the others are of the same answer.
    LayersQuestion {
        /// The attempt.
        stamp: Stamp,
        /// The disk's place in the offer.
        disk: u8,
        /// Which page.
        page: u32,
    },
    /// D to S: this.
    Layers {
        /// The attempt.
        stamp: Stamp,
        /// The disk's place in the offer.
        disk: u8,
        /// Which page.
        page: u32,
        /// The deepest layer of the chain that anything stands in.
        deepest: u64,
        /// A bit for each of the regions that have a digest of their own, from the lowest bit of the first byte on; 1:
        /// the top layer holds something of it.
        top: heapless::Vec<u8, LAYERS_PAGE>,
        /// Why that is not known; empty: it is.
        cause: Cause,
    },
    /// S to D: all of the guest's state was sent, and it is so long. A connection that ends early looks like its end.
    StateEnd {
        /// The attempt.
        stamp: Stamp,
        /// Its length.
        bytes: u64,
    },
}

/// How many messages there are.
const MESSAGES: u8 = 28;

impl Message {
    /// The message's name in logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "PREPARE",
            Self::Prepared(_) => "PREPARED",
            Self::Refused { .. } => "REFUSED",
            Self::Fence { .. } => "FENCE",
            Self::Fenced { .. } => "FENCED",
            Self::Seal { .. } => "SEAL",
            Self::Sealed { .. } => "SEALED",
            Self::Go { .. } => "GO",
            Self::Running { .. } => "RUNNING",
            Self::Abort { .. } => "ABORT",
            Self::Unsealed { .. } => "UNSEALED",
            Self::Question { .. } => "QUESTION",
            Self::Record { .. } => "RECORD",
            Self::Promise { .. } => "PROMISE",
            Self::Failed { .. } => "FAILED",
            Self::Ping { .. } => "PING",
            Self::Pong { .. } => "PONG",
            Self::Digest { .. } => "DIGEST",
            Self::Digests { .. } => "DIGESTS",
            Self::Stream { .. } => "STREAM",
            Self::Streaming { .. } => "STREAMING",
            Self::State { .. } => "STATE",
            Self::StateReady { .. } => "STATE-READY",
            Self::StateQuestion { .. } => "STATE-QUESTION",
            Self::StateIs { .. } => "STATE-IS",
            Self::LayersQuestion { .. } => "LAYERS-QUESTION",
            Self::Layers { .. } => "LAYERS",
            Self::StateEnd { .. } => "STATE-END",
        }
    }

    /// The attempt that the message is about; `None` for PING and PONG.
    #[must_use]
    pub fn stamp(&self) -> Option<&Stamp> {
        match self {
            Self::Prepare(Prepare { stamp, .. })
            | Self::Prepared(Prepared { stamp, .. })
            | Self::Refused { stamp, .. }
            | Self::Fence { stamp, .. }
            | Self::Fenced { stamp, .. }
            | Self::Seal { stamp, .. }
            | Self::Sealed { stamp, .. }
            | Self::Go { stamp }
            | Self::Running { stamp, .. }
            | Self::Abort { stamp, .. }
            | Self::Unsealed { stamp }
            | Self::Question { stamp }
            | Self::Record { stamp, .. }
            | Self::Promise { stamp, .. }
            | Self::Failed { stamp, .. }
            | Self::Digest { stamp, .. }
            | Self::Digests { stamp, .. }
            | Self::Stream { stamp, .. }
            | Self::Streaming { stamp, .. }
            | Self::State { stamp, .. }
            | Self::StateReady { stamp }
            | Self::StateQuestion { stamp }
            | Self::StateIs { stamp, .. }
            | Self::LayersQuestion { stamp, .. }
            | Self::Layers { stamp, .. }
            | Self::StateEnd { stamp, .. } => Some(stamp),
            Self::Ping { .. } | Self::Pong { .. } => None,
        }
    }

    /// Writes the frame, length and message, into `buffer` and returns it.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]: cannot happen to a message of this program (a test says so).
    pub fn encode<'a>(&self, buffer: &'a mut [u8; FRAME_HEAD + FRAME_MAX]) -> Result<&'a [u8], FrameError> {
        let (head, body) = buffer.split_at_mut(FRAME_HEAD);
        let length = postcard::to_slice(self, body).map_err(|_| FrameError::TooLong)?.len();
        head.copy_from_slice(&u32::try_from(length).map_err(|_| FrameError::TooLong)?.to_le_bytes());
        Ok(&buffer[..FRAME_HEAD + length])
    }

    /// Reads a frame without its length. All of it must be used up.
    ///
    /// # Errors
    /// [`FrameError::Unknown`] or [`FrameError::Garbage`].
    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        match postcard::take_from_bytes(body) {
            Ok((message, [])) => Ok(message),
            _ => match body.first() {
                Some(&number) if number >= MESSAGES => Err(FrameError::Unknown(number)),
                _ => Err(FrameError::Garbage),
            },
        }
    }
}

/// The length that a frame's first bytes announce.
///
/// # Errors
/// [`FrameError::TooLong`], or [`FrameError::Garbage`] for a frame of nothing.
pub fn frame_length(head: [u8; FRAME_HEAD]) -> Result<usize, FrameError> {
    match usize::try_from(u32::from_le_bytes(head)) {
        Ok(0) => Err(FrameError::Garbage),
        Ok(length) if length <= FRAME_MAX => Ok(length),
        _ => Err(FrameError::TooLong),
    }
}

/// Why a frame is not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameError {
    /// Longer than any message.
    TooLong,
    /// A number that the agreed version does not have.
    Unknown(u8),
    /// Not what its number says, or more than that.
    Garbage,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "a frame longer than {FRAME_MAX} bytes"),
            Self::Unknown(number) => write!(f, "an unknown message, number {number}"),
            Self::Garbage => f.write_str("a malformed message"),
        }
    }
}

impl std::error::Error for FrameError {}

/// As much of `text` as fits, cut between characters.
#[must_use]
pub fn cut<const N: usize>(text: &str) -> heapless::String<N> {
    let mut short = heapless::String::new();
    for c in text.chars() {
        if short.push(c).is_err() {
            break;
        }
    }
    short
}
