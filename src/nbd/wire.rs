//! The bytes of the NBD protocol: numbers, heads, and how they stand on the wire.
//!
//! Bytes in, values out, and back; no socket, no state, no judgement. Names are the specification's without the `NBD_`
//! prefix. A number that is not listed here is still a value: whoever handles it decides what an unknown option,
//! command or reply type means. All fields are big-endian.

// ---- magic numbers -----------------------------------------------------------------------------------------------

/// First eight bytes of every server: "NBDMAGIC".
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Next eight bytes of a newstyle server, and the first eight of each option: "IHAVEOPT".
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Next eight bytes of an oldstyle server, which no longer exists in the field except as `nbdkit --oldstyle`.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First eight bytes of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

// ---- lengths of fixed parts, in bytes ----------------------------------------------------------------------------

/// Length of a newstyle greeting.
pub const GREETING_LENGTH: usize = 18;
/// Length of an option's head.
pub const OPTION_LENGTH: usize = 16;
/// Length of an option reply's head.
pub const OPTION_REPLY_LENGTH: usize = 20;
/// Length of the answer to `OPT_EXPORT_NAME` before its zeroes.
pub const EXPORT_ANSWER_LENGTH: usize = 10;
/// Zeroes that end the answer to `OPT_EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_ANSWER_ZEROES: usize = 124;
/// Length of a request without its payload.
pub const REQUEST_LENGTH: usize = 28;
/// Length of an extended request without its payload.
pub const EXTENDED_REQUEST_LENGTH: usize = 32;
/// Length of a simple reply without its payload.
pub const SIMPLE_REPLY_LENGTH: usize = 16;
/// Length of a structured reply chunk's head.
pub const CHUNK_LENGTH: usize = 20;
/// Length of an extended reply chunk's head.
pub const EXTENDED_CHUNK_LENGTH: usize = 32;
/// Longest string of the protocol: names, descriptions, messages.
pub const STRING_MAX: usize = 4096;

// ---- handshake flags (server) and client flags -------------------------------------------------------------------

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave the zeroes after `OPT_EXPORT_NAME` out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: the client wants no zeroes after `OPT_EXPORT_NAME`.
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

// ---- options -----------------------------------------------------------------------------------------------------

/// Enter transmission with the named export; no way to say no but to close.
pub const OPT_EXPORT_NAME: u32 = 1;
/// End the handshake politely.
pub const OPT_ABORT: u32 = 2;
/// List the exports.
pub const OPT_LIST: u32 = 3;
/// Withdrawn from the specification.
pub const OPT_PEEK_EXPORT: u32 = 4;
/// Go on under TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Describe an export.
pub const OPT_INFO: u32 = 6;
/// Describe an export and enter transmission with it.
pub const OPT_GO: u32 = 7;
/// Use structured replies in transmission.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// List the metadata contexts of an export.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Choose the metadata contexts for block status.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Use extended headers in transmission: 64-bit lengths.
pub const OPT_EXTENDED_HEADERS: u32 = 11;
/// Our own option: turn this connection into blockferry's phase protocol. No data. `REP_ACK` means that the next byte
/// belongs to the phase protocol; a plain NBD server answers `REP_ERR_UNSUP` and is thereby known to be one. The number
/// is "bfph" in ASCII, far outside of the numbers that the specification assigns one by one.
pub const OPT_BLOCKFERRY_PHASES: u32 = 0x6266_7068;

// ---- option replies ----------------------------------------------------------------------------------------------

/// The option is accepted, or all its data has been sent.
pub const REP_ACK: u32 = 1;
/// One export of the list.
pub const REP_SERVER: u32 = 2;
/// One piece of information about an export.
pub const REP_INFO: u32 = 3;
/// One metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Set in each error reply.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// The server does not know the option.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR + 1;
/// The server's policy forbids it.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR + 2;
/// The option is malformed, or makes no sense now.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR + 3;
/// The server's platform cannot.
pub const REP_ERR_PLATFORM: u32 = REP_FLAG_ERROR + 4;
/// Only after `OPT_STARTTLS`.
pub const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR + 5;
/// No such export.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR + 6;
/// The server is going away.
pub const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR + 7;
/// The client must ask for block sizes first.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_FLAG_ERROR + 8;
/// The option, or its answer, is too long.
pub const REP_ERR_TOO_BIG: u32 = REP_FLAG_ERROR + 9;
/// Only with the extension of 64-bit lengths.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_FLAG_ERROR + 10;

/// Size and transmission flags of an export.
pub const INFO_EXPORT: u16 = 0;
/// The export's canonical name.
pub const INFO_NAME: u16 = 1;
/// A text about the export for humans.
pub const INFO_DESCRIPTION: u16 = 2;
/// The export's size constraints.
pub const INFO_BLOCK_SIZE: u16 = 3;

// ---- transmission flags ------------------------------------------------------------------------------------------

/// Set always.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// The export is read-only.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// `CMD_FLUSH` works.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// `CMD_FLAG_FUA` works.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// The medium rotates.
pub const FLAG_ROTATIONAL: u16 = 1 << 4;
/// `CMD_TRIM` works.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// `CMD_WRITE_ZEROES` works, with `CMD_FLAG_NO_HOLE`.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// `CMD_FLAG_DF` works; only with structured replies.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Several connections see one cache: a flush on one covers all.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// An extension: `CMD_RESIZE` works.
pub const FLAG_SEND_RESIZE: u16 = 1 << 9;
/// `CMD_CACHE` works.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// `CMD_FLAG_FAST_ZERO` works.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// `CMD_BLOCK_STATUS` takes a payload that says which contexts are wanted; only with extended headers.
pub const FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

// ---- commands and their flags ------------------------------------------------------------------------------------

/// Read.
pub const CMD_READ: u16 = 0;
/// Write; with compact headers the only request with a payload.
pub const CMD_WRITE: u16 = 1;
/// Finish what is under way and close; has no reply.
pub const CMD_DISC: u16 = 2;
/// Make all answered writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Say that a range is no longer needed.
pub const CMD_TRIM: u16 = 4;
/// Say that a range will be read soon.
pub const CMD_CACHE: u16 = 5;
/// Make a range read as zero.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Ask for the extents of a range.
pub const CMD_BLOCK_STATUS: u16 = 7;
/// An extension.
pub const CMD_RESIZE: u16 = 8;

/// Durable before the reply.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// `CMD_WRITE_ZEROES`: leave no hole.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// `CMD_READ`: one content chunk at most.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// `CMD_BLOCK_STATUS`: one extent for each context.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// `CMD_WRITE_ZEROES`: refuse rather than be as slow as a write.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Only with extended headers: the length is that of a payload which follows.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

// ---- structured replies ------------------------------------------------------------------------------------------

/// Set on a reply's last chunk.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Chunk without a payload, always the last.
pub const REPLY_TYPE_NONE: u16 = 0;
/// Chunk with data.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk that stands for zeroes.
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk with extents of one context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// The same with 64-bit lengths; only with extended headers.
pub const REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Set in each error chunk's type.
pub const REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// Chunk that says the request failed.
pub const REPLY_TYPE_ERROR: u16 = REPLY_TYPE_FLAG_ERROR + 1;
/// The same with the offset where it failed.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = REPLY_TYPE_FLAG_ERROR + 2;

/// The one metadata context that the specification defines.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// A context of QEMU's: in which layer of a chain of images something stands. 1 is the top one, more is below it, 0 is
/// in none of them.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zero.
pub const STATE_ZERO: u32 = 1 << 1;

// ---- error numbers -----------------------------------------------------------------------------------------------

/// Operation not permitted.
pub const EPERM: u32 = 1;
/// Input or output error.
pub const EIO: u32 = 5;
/// No memory.
pub const ENOMEM: u32 = 12;
/// Invalid argument; an unknown number counts as this one.
pub const EINVAL: u32 = 22;
/// No space, or beyond the end of the export.
pub const ENOSPC: u32 = 28;
/// Too large.
pub const EOVERFLOW: u32 = 75;
/// Not supported.
pub const ENOTSUP: u32 = 95;
/// The server is going away, or does not own the disk any more.
pub const ESHUTDOWN: u32 = 108;

/// An error number's name for a message; a number that the specification does not know counts as `EINVAL`.
#[must_use]
pub fn error_name(error: u32) -> &'static str {
    match error {
        0 => "no error",
        EPERM => "EPERM",
        EIO => "EIO",
        ENOMEM => "ENOMEM",
        ENOSPC => "ENOSPC",
        EOVERFLOW => "EOVERFLOW",
        ENOTSUP => "ENOTSUP",
        ESHUTDOWN => "ESHUTDOWN",
        _ => "EINVAL",
    }
}

/// An option error reply's name for a message.
#[must_use]
pub fn option_error_name(reply: u32) -> &'static str {
    match reply {
        REP_ERR_UNSUP => "ERR_UNSUP",
        REP_ERR_POLICY => "ERR_POLICY",
        REP_ERR_INVALID => "ERR_INVALID",
        REP_ERR_PLATFORM => "ERR_PLATFORM",
        REP_ERR_TLS_REQD => "ERR_TLS_REQD",
        REP_ERR_UNKNOWN => "ERR_UNKNOWN",
        REP_ERR_SHUTDOWN => "ERR_SHUTDOWN",
        REP_ERR_BLOCK_SIZE_REQD => "ERR_BLOCK_SIZE_REQD",
        REP_ERR_TOO_BIG => "ERR_TOO_BIG",
        REP_ERR_EXT_HEADER_REQD => "ERR_EXT_HEADER_REQD",
        _ => "an unknown error",
    }
}

// ---- fields ------------------------------------------------------------------------------------------------------

/// Walks over the fields of a payload. Each method takes the next field, or `None` where the payload is too short; then
/// nothing is taken.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Starts at the first byte.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Takes `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// Takes 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Takes 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Takes 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Takes a string that has its length, 32 bits, before it.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let before = *self;
        let length = usize::try_from(self.u32()?).ok()?;
        let string = self.bytes(length);
        if string.is_none() {
            *self = before;
        }
        string
    }

    /// What is left.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }
}

/// Puts `parts` one after the other into an array that they fill exactly.
fn join<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut bytes = [0; N];
    let mut at = 0;
    for part in parts {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert_eq!(at, N, "the parts fill the array");
    bytes
}

// ---- handshake ---------------------------------------------------------------------------------------------------

/// The first bytes of a newstyle server.
#[must_use]
pub fn greeting(handshake_flags: u16) -> [u8; GREETING_LENGTH] {
    join(&[&NBDMAGIC.to_be_bytes(), &IHAVEOPT.to_be_bytes(), &handshake_flags.to_be_bytes()])
}

/// What a server's first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// A newstyle server with these handshake flags.
    Newstyle(u16),
    /// An oldstyle server.
    Oldstyle,
    /// No NBD server.
    Foreign,
}

impl Greeting {
    /// Reads a server's first bytes.
    #[must_use]
    pub fn parse(bytes: &[u8; GREETING_LENGTH]) -> Self {
        let mut fields = Fields::new(bytes);
        match (fields.u64(), fields.u64(), fields.u16()) {
            (Some(NBDMAGIC), Some(IHAVEOPT), Some(flags)) => Self::Newstyle(flags),
            (Some(NBDMAGIC), Some(OLDSTYLE_MAGIC), _) => Self::Oldstyle,
            _ => Self::Foreign,
        }
    }
}

/// The head of an option; `length` bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHead {
    /// Which option, `OPT_...` or any other number.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHead {
    /// Reads a head; `None` when its magic is wrong.
    #[must_use]
    pub fn parse(bytes: &[u8; OPTION_LENGTH]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != IHAVEOPT {
            return None;
        }
        Some(Self { option: fields.u32()?, length: fields.u32()? })
    }

    /// The head's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; OPTION_LENGTH] {
        join(&[&IHAVEOPT.to_be_bytes(), &self.option.to_be_bytes(), &self.length.to_be_bytes()])
    }
}

/// The head of an option reply; `length` bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that this answers.
    pub option: u32,
    /// `REP_...` or any other number.
    pub reply: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReply {
    /// Reads a head; `None` when its magic is wrong.
    #[must_use]
    pub fn parse(bytes: &[u8; OPTION_REPLY_LENGTH]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return None;
        }
        Some(Self { option: fields.u32()?, reply: fields.u32()?, length: fields.u32()? })
    }

    /// The head's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; OPTION_REPLY_LENGTH] {
        let magic = OPTION_REPLY_MAGIC.to_be_bytes();
        join(&[&magic, &self.option.to_be_bytes(), &self.reply.to_be_bytes(), &self.length.to_be_bytes()])
    }

    /// Whether this ends the option with a refusal.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.reply & REP_FLAG_ERROR != 0
    }
}

/// The answer to `OPT_EXPORT_NAME`, before its zeroes.
#[must_use]
pub fn export_answer(size: u64, transmission_flags: u16) -> [u8; EXPORT_ANSWER_LENGTH] {
    join(&[&size.to_be_bytes(), &transmission_flags.to_be_bytes()])
}

/// The payload of a `REP_INFO` with `INFO_EXPORT`.
#[must_use]
pub fn info_export(size: u64, transmission_flags: u16) -> [u8; 12] {
    join(&[&INFO_EXPORT.to_be_bytes(), &size.to_be_bytes(), &transmission_flags.to_be_bytes()])
}

/// The payload of a `REP_INFO` with `INFO_BLOCK_SIZE`: minimum block, preferred block and maximum payload in bytes.
#[must_use]
pub fn info_block_size(minimum: u32, preferred: u32, maximum: u32) -> [u8; 14] {
    let kind = INFO_BLOCK_SIZE.to_be_bytes();
    join(&[&kind, &minimum.to_be_bytes(), &preferred.to_be_bytes(), &maximum.to_be_bytes()])
}

// ---- transmission ------------------------------------------------------------------------------------------------

/// A request, compact or extended, without the payload that follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `CMD_FLAG_...`, or any other bits.
    pub flags: u16,
    /// `CMD_...`, or any other number.
    pub command: u16,
    /// The client's name for this request; the reply carries it back.
    pub cookie: u64,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes, or of the payload that follows; below 4 GiB in a compact request.
    pub length: u64,
}

impl Request {
    /// Reads a compact request; `None` when its magic is wrong.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_LENGTH]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: u64::from(fields.u32()?),
        })
    }

    /// Reads an extended request; `None` when its magic is wrong.
    #[must_use]
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_LENGTH]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != EXTENDED_REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u64()?,
        })
    }

    /// The bytes of an extended request.
    #[must_use]
    pub fn encode_extended(&self) -> [u8; EXTENDED_REQUEST_LENGTH] {
        join(&[
            &EXTENDED_REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.command.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.length.to_be_bytes(),
        ])
    }

    /// The bytes of a compact request.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LENGTH] {
        join(&[
            &REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.command.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes(),
        ])
    }
}

/// A simple reply, without the data that follows a successful `CMD_READ`.
#[must_use]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_LENGTH] {
    join(&[&SIMPLE_REPLY_MAGIC.to_be_bytes(), &error.to_be_bytes(), &cookie.to_be_bytes()])
}

/// The head of a structured reply chunk of type `kind`; `length` bytes of payload follow.
#[must_use]
pub fn structured_chunk(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; CHUNK_LENGTH] {
    join(&[
        &STRUCTURED_REPLY_MAGIC.to_be_bytes(),
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &length.to_be_bytes(),
    ])
}

/// The head of an extended reply chunk of type `kind`; `offset` is that of the request, and `length` bytes of payload
/// follow.
#[must_use]
pub fn extended_chunk(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) -> [u8; EXTENDED_CHUNK_LENGTH] {
    join(&[
        &EXTENDED_REPLY_MAGIC.to_be_bytes(),
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ])
}

/// Head of the payload of `REPLY_TYPE_OFFSET_DATA`; the data follows.
#[must_use]
pub fn offset_data(offset: u64) -> [u8; 8] {
    offset.to_be_bytes()
}

/// Payload of `REPLY_TYPE_OFFSET_HOLE`.
#[must_use]
pub fn offset_hole(offset: u64, length: u32) -> [u8; 12] {
    join(&[&offset.to_be_bytes(), &length.to_be_bytes()])
}

/// Head of the payload of `REPLY_TYPE_ERROR`; a message of `message_length` bytes follows.
#[must_use]
pub fn error_chunk(error: u32, message_length: u16) -> [u8; 6] {
    join(&[&error.to_be_bytes(), &message_length.to_be_bytes()])
}

/// Head of the payload of `REPLY_TYPE_BLOCK_STATUS`; extents follow.
#[must_use]
pub fn block_status(context: u32) -> [u8; 4] {
    context.to_be_bytes()
}

/// One extent of a block status.
#[must_use]
pub fn extent(length: u32, status_flags: u32) -> [u8; 8] {
    join(&[&length.to_be_bytes(), &status_flags.to_be_bytes()])
}

/// Head of the payload of `REPLY_TYPE_BLOCK_STATUS_EXT`; so many extents follow.
#[must_use]
pub fn block_status_ext(context: u32, count: u32) -> [u8; 8] {
    join(&[&context.to_be_bytes(), &count.to_be_bytes()])
}

/// One extent of such a block status.
#[must_use]
pub fn extent_ext(length: u64, status_flags: u64) -> [u8; 16] {
    join(&[&length.to_be_bytes(), &status_flags.to_be_bytes()])
}

/// The head of a reply, as a client meets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// A simple reply; data follows when it answers a `CMD_READ` with success.
    Simple {
        /// 0 or an error number.
        error: u32,
        /// The request that it answers.
        cookie: u64,
    },
    /// A structured or extended reply chunk; `length` bytes follow.
    Chunk {
        /// `REPLY_FLAG_...`.
        flags: u16,
        /// `REPLY_TYPE_...`, or any other number.
        kind: u16,
        /// The request that it answers.
        cookie: u64,
        /// Bytes of payload that follow.
        length: u64,
        /// In an extended chunk, where the request that it answers begins.
        offset: Option<u64>,
    },
}

/// What the front of a client's receive buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyFront {
    /// Not yet a whole head.
    Short,
    /// A head, and its length in bytes.
    Head(ReplyHead, usize),
    /// No reply: this is the magic that stands there.
    BadMagic(u32),
}

impl ReplyFront {
    /// Reads the head at the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let mut fields = Fields::new(bytes);
        let head = match fields.u32() {
            None => return Self::Short,
            Some(SIMPLE_REPLY_MAGIC) => simple_fields(&mut fields).map(|head| (head, SIMPLE_REPLY_LENGTH)),
            Some(STRUCTURED_REPLY_MAGIC) => chunk_fields(&mut fields).map(|head| (head, CHUNK_LENGTH)),
            Some(EXTENDED_REPLY_MAGIC) => extended_fields(&mut fields).map(|head| (head, EXTENDED_CHUNK_LENGTH)),
            Some(magic) => return Self::BadMagic(magic),
        };
        head.map_or(Self::Short, |(head, length)| Self::Head(head, length))
    }
}

fn simple_fields(fields: &mut Fields<'_>) -> Option<ReplyHead> {
    Some(ReplyHead::Simple { error: fields.u32()?, cookie: fields.u64()? })
}

fn chunk_fields(fields: &mut Fields<'_>) -> Option<ReplyHead> {
    let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
    Some(ReplyHead::Chunk { flags, kind, cookie, length: u64::from(fields.u32()?), offset: None })
}

fn extended_fields(fields: &mut Fields<'_>) -> Option<ReplyHead> {
    let (flags, kind, cookie, offset) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u64()?);
    Some(ReplyHead::Chunk { flags, kind, cookie, length: fields.u64()?, offset: Some(offset) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_bytes() {
        assert_eq!(&greeting(3), b"NBDMAGICIHAVEOPT\x00\x03");
        let head = OptionHead { option: OPT_GO, length: 6 };
        assert_eq!(&head.encode(), b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x06");
        let phases = OptionHead { option: OPT_BLOCKFERRY_PHASES, length: 0 };
        assert_eq!(&phases.encode(), b"IHAVEOPTbfph\x00\x00\x00\x00");
        let reply = OptionReply { option: OPT_LIST, reply: REP_ERR_INVALID, length: 1 };
        assert_eq!(
            &reply.encode(),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x03\x00\x00\x00\x01"
        );
        assert!(reply.is_error());
        assert_eq!(export_answer(0x0102, 5), [0, 0, 0, 0, 0, 0, 1, 2, 0, 5]);
        assert_eq!(info_export(0x0102, 5), [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 5]);
        assert_eq!(info_block_size(1, 4096, 1 << 25), [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn greetings_are_told_apart() {
        assert_eq!(Greeting::parse(&greeting(7)), Greeting::Newstyle(7));
        let mut old = greeting(0);
        old[8..16].copy_from_slice(&[0, 0, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53]);
        assert_eq!(Greeting::parse(&old), Greeting::Oldstyle);
        assert_eq!(Greeting::parse(b"SSH-2.0-OpenSSH_9."), Greeting::Foreign);
    }

    #[test]
    fn handshake_heads_come_back() {
        let head = OptionHead { option: 0xdead_beef, length: u32::MAX };
        assert_eq!(OptionHead::parse(&head.encode()), Some(head));
        let reply = OptionReply { option: 0xdead_beef, reply: REP_ACK, length: 9 };
        assert_eq!(OptionReply::parse(&reply.encode()), Some(reply));
        assert_eq!(OptionHead::parse(b"IHAVEOPX\x00\x00\x00\x07\x00\x00\x00\x06"), None);
        assert_eq!(OptionReply::parse(&[0; 20]), None);
    }

    #[test]
    fn request_bytes() {
        let request = Request {
            flags: CMD_FLAG_FUA,
            command: CMD_WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 4096,
            length: 512,
        };
        let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00";
        assert_eq!(request.encode(), bytes);
        assert_eq!(Request::parse(&bytes), Some(request));
        let mut bad = bytes;
        bad[3] = 0x14;
        assert_eq!(Request::parse(&bad), None);
    }

    #[test]
    fn extended_bytes() {
        let request = Request {
            flags: CMD_FLAG_PAYLOAD_LEN,
            command: CMD_WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 4096,
            length: 1 << 32,
        };
        let bytes = *b"\x21\xe4\x1c\x71\x00\x20\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
            \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x01\x00\x00\x00\x00";
        assert_eq!(request.encode_extended(), bytes);
        assert_eq!(Request::parse_extended(&bytes), Some(request));
        assert_eq!(Request::parse_extended(&[0; EXTENDED_REQUEST_LENGTH]), None);
        assert_eq!(
            extended_chunk(REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS_EXT, 0x11, 0x1000, 24),
            *b"\x6e\x8a\x27\x8c\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00\x00\x11\
                \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00\x18"
        );
        assert_eq!(block_status_ext(1, 2), [0, 0, 0, 1, 0, 0, 0, 2]);
        assert_eq!(extent_ext(1 << 32, 3), [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn unknown_numbers_are_values() {
        let request =
            Request { flags: 0xffff, command: 0x7777, cookie: 0, offset: u64::MAX, length: u64::from(u32::MAX) };
        assert_eq!(Request::parse(&request.encode()), Some(request));
        assert_eq!(error_name(4711), "EINVAL");
    }

    #[test]
    fn reply_bytes() {
        assert_eq!(simple_reply(EIO, 0x11), *b"\x67\x44\x66\x98\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x11");
        assert_eq!(
            structured_chunk(REPLY_FLAG_DONE, REPLY_TYPE_ERROR, 0x11, 6),
            *b"\x66\x8e\x33\xef\x00\x01\x80\x01\x00\x00\x00\x00\x00\x00\x00\x11\x00\x00\x00\x06"
        );
        assert_eq!(offset_data(0x1000), [0, 0, 0, 0, 0, 0, 0x10, 0]);
        assert_eq!(offset_hole(0x1000, 0x200), [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]);
        assert_eq!(error_chunk(ESHUTDOWN, 0x102), [0, 0, 0, 108, 1, 2]);
        assert_eq!(block_status(1), [0, 0, 0, 1]);
        assert_eq!(extent(0x200, STATE_HOLE | STATE_ZERO), [0, 0, 2, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn reply_heads_come_back_and_short_ones_wait() {
        let simple = simple_reply(EINVAL, 7);
        let chunk = structured_chunk(0, 99, 7, 12);
        let extended = extended_chunk(1, 6, 7, 1 << 40, 1 << 33);
        let heads = [
            (&extended[..], ReplyHead::Chunk { flags: 1, kind: 6, cookie: 7, length: 1 << 33, offset: Some(1 << 40) }),
            (&simple[..], ReplyHead::Simple { error: EINVAL, cookie: 7 }),
            (&chunk[..], ReplyHead::Chunk { flags: 0, kind: 99, cookie: 7, length: 12, offset: None }),
        ];
        for (bytes, head) in heads {
            assert_eq!(ReplyFront::parse(bytes), ReplyFront::Head(head, bytes.len()));
            for short in 0..bytes.len() {
                assert_eq!(ReplyFront::parse(&bytes[..short]), ReplyFront::Short, "{short} bytes");
            }
        }
        assert_eq!(ReplyFront::parse(b"HTTP/1.1"), ReplyFront::BadMagic(0x4854_5450));
    }

    #[test]
    fn fields_never_run_past_the_end() {
        let mut fields = Fields::new(b"\x00\x00\x00\x03ab");
        assert_eq!(fields.string(), None);
        assert_eq!(fields.rest().len(), 6, "a short string takes nothing");
        assert_eq!(fields.u32(), Some(3));
        assert_eq!(fields.u32(), None);
        assert_eq!(fields.bytes(2), Some(&b"ab"[..]));
        assert_eq!(fields.u16(), None);
    }
}
