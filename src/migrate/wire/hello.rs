//! The hello: the first bytes of both sides of a phase connection.
//!
//! Its layout never changes, so that any two versions can tell each other that they do not understand each other. All
//! numbers are little-endian; reserved bytes are sent as zero and not looked at.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic "BLKFERRY" |
//! | 8, 10 | 2, 2 | lowest and highest version spoken |
//! | 12 | 1 | role: 1 source, 2 destination, 3 somebody who only asks |
//! | 13, 14 | 1, 1 | lengths of the guest's name and of the address |
//! | 15 | 1 | reserved |
//! | 16 | 8 | capabilities |
//! | 24 | 64 | guest name, UTF-8 |
//! | 88, 104 | 16, 16 | lineage (zero: no record) and word |
//! | 120, 124, 128 | 4, 4, 8 | order: term, reserved, generation |
//! | 136, 152 | 16, 16 | boot id and instance |
//! | 168 | 16 | challenge |
//! | 184 | 16 | host |
//! | 200 | 128 | the side's own migration address, UTF-8; empty: nobody can dial it |
//! | 328 | 56 | reserved |

use std::fmt;

use crate::limits::{ADDRESS_MAX, GUEST_NAME_MAX};
use crate::ownership::{Host, ID_BYTES, Instance, Lineage, Order, Title, Word};

/// Length of a hello, in bytes.
pub const HELLO_LENGTH: usize = 384;
/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"BLKFERRY";
/// Oldest version of the phase protocol that this program speaks.
pub const VERSION_LOWEST: u16 = 1;
/// Newest version of the phase protocol that this program speaks.
pub const VERSION_HIGHEST: u16 = 1;

/// How addresses begin that a side may give as its own.
const ADDRESSES: [&str; 3] = ["tcp://", "unix://", "vsock://"];

const VERSIONS: usize = 8;
const ROLE: usize = 12;
const LENGTHS: usize = 13;
const CAPABILITIES: usize = 16;
const GUEST: usize = 24;
const LINEAGE: usize = GUEST + GUEST_NAME_MAX;
const WORD: usize = LINEAGE + ID_BYTES;
const TERM: usize = WORD + ID_BYTES;
const GENERATION: usize = TERM + 8;
const BOOT: usize = GENERATION + 8;
const INSTANCE: usize = BOOT + ID_BYTES;
const CHALLENGE: usize = INSTANCE + ID_BYTES;
const HOST: usize = CHALLENGE + ID_BYTES;
const ADDRESS: usize = HOST + ID_BYTES;
const RESERVED: usize = ADDRESS + ADDRESS_MAX;
const _: () = assert!(RESERVED == 328 && RESERVED < HELLO_LENGTH, "the layout never changes");

/// What a side is on this connection. A number that is not listed is a value, too: whoever handles it refuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Owns, and wants to move the guest.
    Source,
    /// Is to receive it.
    Destination,
    /// Asks for the record (`recover`, a sealed destination that dials its source).
    Asker,
    /// Something newer.
    Other(u8),
}

impl Role {
    fn number(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Destination => 2,
            Self::Asker => 3,
            Self::Other(n) => n,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Source,
            2 => Self::Destination,
            3 => Self::Asker,
            n => Self::Other(n),
        }
    }
}

/// What a side can do, as bits. What both can do counts; unknown bits are kept and mean nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Can reach, or be reached, by more connections that speak NBD.
    pub const NBD: Self = Self(1 << 0);
    /// Can move blocks inside the phase connection.
    pub const STREAM: Self = Self(1 << 1);
    /// Answers LAYERS-QUESTION.
    pub const LAYERS: Self = Self(1 << 2);
    /// Can move the guest's state inside the phase connection, where blocks do.
    pub const STATE: Self = Self(1 << 3);
    /// Knows STATE-END.
    pub const STATE_END: Self = Self(1 << 4);

    /// The bits of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits in common.
    #[must_use]
    pub fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all bits of `other` are set.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A random number that the receiver of PREPARE makes for one connection. PREPARE echoes it, and it counts once; a
/// newer hello makes older challenges void (rule M1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Challenge(pub [u8; ID_BYTES]);

impl Challenge {
    /// Draws a new one.
    ///
    /// # Errors
    /// The system's random source failed.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; ID_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

/// The kernel's number for this boot of the machine (rule D12).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; ID_BYTES]);

/// A hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest and highest version spoken.
    pub versions: (u16, u16),
    /// What this side is.
    pub role: Role,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The guest it speaks for.
    pub guest: heapless::String<GUEST_NAME_MAX>,
    /// What its record proves; `None` without a record.
    pub title: Option<Title>,
    /// This boot of its machine.
    pub boot: BootId,
    /// Its process.
    pub instance: Instance,
    /// Its challenge for this connection.
    pub challenge: Challenge,
    /// Its machine.
    pub host: Host,
    /// Its own migration address; empty when it cannot be dialled.
    pub address: heapless::String<ADDRESS_MAX>,
}

/// Why the peer's first bytes are not a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HelloError {
    /// Another program.
    Magic,
    /// The lowest version is above the highest.
    Versions,
    /// A length is beyond its field, or the name is not UTF-8, empty, or holds control characters.
    Guest,
    /// A length is beyond its field, or the address is not UTF-8, holds control characters, or is no address: nobody
    /// may make a host run a command.
    Address,
}

impl fmt::Display for HelloError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magic => "the peer is not blockferry",
            Self::Versions => "the peer's versions are not a range",
            Self::Guest => "the peer's guest name is malformed",
            Self::Address => "the peer's address is malformed",
        })
    }
}

impl std::error::Error for HelloError {}

impl Hello {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LENGTH] {
        let none = Title { lineage: Lineage::NONE, order: Order::NONE, word: Word::NONE };
        let Title { lineage, order, word } = self.title.unwrap_or(none);
        let mut bytes = [0; HELLO_LENGTH];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(VERSIONS, &self.versions.0.to_le_bytes());
        put(VERSIONS + 2, &self.versions.1.to_le_bytes());
        put(ROLE, &[self.role.number()]);
        put(LENGTHS, &[length(&self.guest), length(&self.address)]);
        put(CAPABILITIES, &self.capabilities.0.to_le_bytes());
        put(GUEST, self.guest.as_bytes());
        put(LINEAGE, &lineage.0);
        put(WORD, &word.0);
        put(TERM, &order.term.to_le_bytes());
        put(GENERATION, &order.generation.to_le_bytes());
        put(BOOT, &self.boot.0);
        put(INSTANCE, &self.instance.0);
        put(CHALLENGE, &self.challenge.0);
        put(HOST, &self.host.0);
        put(ADDRESS, self.address.as_bytes());
        bytes
    }

    /// Reads the bytes. Whether the versions have one in common is for [`choose_version`].
    ///
    /// # Errors
    /// A [`HelloError`]: they are not a hello.
    pub fn parse(bytes: &[u8; HELLO_LENGTH]) -> Result<Self, HelloError> {
        if bytes[..MAGIC.len()] != MAGIC {
            return Err(HelloError::Magic);
        }
        let versions = (u16::from_le_bytes(take(bytes, VERSIONS)), u16::from_le_bytes(take(bytes, VERSIONS + 2)));
        if versions.0 > versions.1 {
            return Err(HelloError::Versions);
        }
        let [guest_length, address_length] = take(bytes, LENGTHS);
        let guest = text(&bytes[GUEST..LINEAGE], guest_length).ok_or(HelloError::Guest)?;
        if guest.is_empty() {
            return Err(HelloError::Guest);
        }
        let lineage = Lineage(take(bytes, LINEAGE));
        let order = Order {
            term: u32::from_le_bytes(take(bytes, TERM)),
            generation: u64::from_le_bytes(take(bytes, GENERATION)),
        };
        Ok(Self {
            versions,
            role: Role::from_number(bytes[ROLE]),
            capabilities: Capabilities(u64::from_le_bytes(take(bytes, CAPABILITIES))),
            guest,
            title: (lineage != Lineage::NONE).then_some(Title { lineage, order, word: Word(take(bytes, WORD)) }),
            boot: BootId(take(bytes, BOOT)),
            instance: Instance(take(bytes, INSTANCE)),
            challenge: Challenge(take(bytes, CHALLENGE)),
            host: Host(take(bytes, HOST)),
            address: text(&bytes[ADDRESS..RESERVED], address_length)
                .filter(|address| ADDRESSES.iter().any(|form| address.starts_with(form)) || address.is_empty())
                .ok_or(HelloError::Address)?,
        })
    }
}

/// The newest version that both sides speak.
#[must_use]
pub fn choose_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

/// The length of a string whose field is shorter than 256 bytes.
fn length(text: &str) -> u8 {
    u8::try_from(text.len()).unwrap_or(u8::MAX)
}
const _: () = assert!(GUEST_NAME_MAX <= 255 && ADDRESS_MAX <= 255, "lengths are one byte");

/// The `N` bytes at `at`; the offsets are constants.
fn take<const N: usize>(bytes: &[u8; HELLO_LENGTH], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// A string field: it ends up on terminals and in logs, so control characters are not let in.
fn text<const N: usize>(field: &[u8], length: u8) -> Option<heapless::String<N>> {
    let text = str::from_utf8(field.get(..usize::from(length))?).ok()?;
    if text.chars().any(char::is_control) { None } else { heapless::String::try_from(text).ok() }
}
