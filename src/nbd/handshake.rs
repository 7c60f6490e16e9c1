//! The server's side of the handshake: fixed newstyle option haggling.
//!
//! A door calls [`haggle`] once for each connection and goes on with what it returns: transmission with an opened
//! export, the phase protocol, or nothing. What exports there are is the door's knowledge, behind [`Directory`]. One
//! deadline covers the whole handshake, one buffer of fixed size all of its options; nothing that a client says makes
//! it longer or larger. This file never touches a disk and never reads a byte beyond the handshake.
//!
//! NBD specification: "Fixed newstyle negotiation", "Option types", "Metadata querying".

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Instant;

use crate::cause::Cause;
use crate::limits::{
    DISK_NAME_MAX, EXPORT_NAME_MAX, EXPORT_TEXT_MAX, HANDSHAKE_TIMEOUT, OPTION_PAYLOAD_MAX, OPTION_SKIP_MAX,
    OPTIONS_MAX, PAYLOAD_MAX, PREFERRED_BLOCK,
};
use crate::nbd::wire::{self, Fields, OptionHead, OptionReply};
use crate::socket::Socket;

/// The number by which block status replies name `base:allocation`.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// The exports that one door offers.
pub trait Directory {
    /// What an opened export is to the transmission phase; dropping it closes it.
    type Opened;

    /// Calls `each(name, description)` for each export in the order of the list.
    fn list(&self, each: &mut dyn FnMut(&str, &str));

    /// What a client may know of the export `name`. An empty name is the default export, if there is one.
    ///
    /// # Errors
    /// Why this client gets nothing under that name.
    fn describe(&self, name: &str) -> Result<Description, OpenError>;

    /// Opens the export `name` for transmission. Succeeds at most once for a connection.
    ///
    /// # Errors
    /// Why this client gets nothing under that name.
    fn open(&self, name: &str) -> Result<(Description, Self::Opened), OpenError>;

    /// Whether this door takes [`wire::OPT_BLOCKFERRY_PHASES`]; asked when that has come.
    fn takes_phases(&self) -> bool;
}

/// What a client is told about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The canonical name, where it is not the one that was asked for; else empty.
    pub name: heapless::String<DISK_NAME_MAX>,
    /// A text for humans, or empty.
    pub text: heapless::String<EXPORT_TEXT_MAX>,
    /// Size in bytes.
    pub size: u64,
    /// `wire::FLAG_...`. The handshake sets `FLAG_HAS_FLAGS`, and clears `FLAG_SEND_DF` without structured replies.
    pub transmission_flags: u16,
    /// Smallest request and alignment, in bytes: a power of two.
    pub minimum_block: u32,
    /// Alignment from which on requests are efficient, in bytes: a power of two.
    pub preferred_block: u32,
    /// Largest payload of a request, in bytes.
    pub maximum_payload: u32,
}

impl Description {
    /// An export without texts and with the size constraints that each client may assume.
    #[must_use]
    pub fn new(size: u64, transmission_flags: u16) -> Self {
        Self {
            name: heapless::String::new(),
            text: heapless::String::new(),
            size,
            transmission_flags,
            minimum_block: 1,
            preferred_block: PREFERRED_BLOCK,
            maximum_payload: PAYLOAD_MAX,
        }
    }
}

/// Why an export is not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenError {
    /// There is no such export.
    Unknown,
    /// There is, but not for this client or not now.
    Refused(Cause),
    /// The server is going away, or the disk has another owner.
    Shutdown(Cause),
}

impl OpenError {
    fn reply(&self) -> u32 {
        match self {
            Self::Unknown => wire::REP_ERR_UNKNOWN,
            Self::Refused(_) => wire::REP_ERR_POLICY,
            Self::Shutdown(_) => wire::REP_ERR_SHUTDOWN,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("no such export"),
            Self::Refused(cause) | Self::Shutdown(cause) => cause.fmt(f),
        }
    }
}

/// How a handshake ended well.
#[derive(Debug)]
pub enum Outcome<T> {
    /// The connection is in transmission.
    Transmission {
        /// What [`Directory::open`] returned.
        opened: T,
        /// What both sides agreed on.
        agreed: Agreed,
    },
    /// The connection speaks the phase protocol from the next byte on.
    Phases,
    /// The client said goodbye, or closed between two options.
    Ended,
}

/// What both sides agreed on for transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// Requests and replies have extended headers; then replies are structured too.
    pub extended: bool,
    /// Block status is answered for `base:allocation`, named [`BASE_ALLOCATION_ID`].
    pub base_allocation: bool,
}

/// How a handshake ended badly. The connection is of no use any more.
#[derive(Debug)]
pub enum HandshakeError {
    /// The client closed inside of something, named here.
    Left(&'static str),
    /// The deadline passed.
    TooSlow(&'static str),
    /// The client set flags that do not exist.
    ClientFlags(u32),
    /// An option began with this instead of the magic.
    Magic([u8; 8]),
    /// A client without fixed newstyle sent this option.
    NotFixed(u32),
    /// After extended headers were agreed on, the client opened an export the old way.
    NotExtended,
    /// The option's length is beyond all measure.
    TooLong(OptionHead),
    /// Too many options.
    TooMany,
    /// The old way to open an export failed; only closing can tell the client.
    ExportName(OpenError),
    /// The socket failed.
    Socket(&'static str, io::Error),
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left(place) => write!(f, "handshake: the client left inside {place}"),
            Self::TooSlow(place) => {
                write!(f, "handshake: the client was in {place} after {} s", HANDSHAKE_TIMEOUT.as_secs())
            }
            Self::ClientFlags(flags) => write!(f, "handshake: the client set unknown flags {flags:#x}"),
            Self::Magic(magic) => {
                write!(f, "handshake: the client sent no option but \"{}\"", magic.escape_ascii())
            }
            Self::NotFixed(option) => write!(f, "handshake: the client sent option {option} without fixed newstyle"),
            Self::NotExtended => f.write_str("handshake: the client sent EXPORT_NAME after extended headers"),
            Self::TooLong(head) => {
                write!(f, "handshake: the client sent option {} with {} bytes", head.option, head.length)
            }
            Self::TooMany => write!(f, "handshake: the client sent more than {OPTIONS_MAX} options"),
            Self::ExportName(cause) => write!(f, "handshake: the client's export is refused: {cause}"),
            Self::Socket(place, error) => write!(f, "handshake: the connection failed inside {place}: {error}"),
        }
    }
}

impl std::error::Error for HandshakeError {}

/// Leads the handshake of a fresh connection to its end.
///
/// # Errors
/// Who broke it off and why; then the socket is of no use.
pub fn haggle<D: Directory>(socket: &Socket, directory: &D) -> Result<Outcome<D::Opened>, HandshakeError> {
    haggle_before(socket, directory, Instant::now() + HANDSHAKE_TIMEOUT)
}

fn haggle_before<D: Directory>(
    socket: &Socket,
    directory: &D,
    deadline: Instant,
) -> Result<Outcome<D::Opened>, HandshakeError> {
    let mut haggling = Haggling {
        line: Line { socket, deadline, out: Vec::with_capacity(OPTION_PAYLOAD_MAX), failed: None },
        directory,
        no_zeroes: false,
        structured: false,
        extended: false,
        context: false,
        context_name: Vec::with_capacity(EXPORT_NAME_MAX),
    };
    haggling.run()
}

/// What one option leads to.
enum Next<T> {
    Option,
    End(Outcome<T>),
}

struct Haggling<'a, D: Directory> {
    line: Line<'a>,
    directory: &'a D,
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// Whether `base:allocation` is chosen; then for the export `context_name`.
    context: bool,
    context_name: Vec<u8>,
}

impl<D: Directory> Haggling<'_, D> {
    fn run(&mut self) -> Result<Outcome<D::Opened>, HandshakeError> {
        let greeting = wire::greeting(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        self.line.put(&greeting);
        self.line.flush("the greeting")?;
        let mut flags = [0; 4];
        if !self.line.receive_or_end(&mut flags, "the client flags")? {
            return Ok(Outcome::Ended);
        }
        let flags = u32::from_be_bytes(flags);
        if flags & !(wire::FLAG_C_FIXED_NEWSTYLE | wire::FLAG_C_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags(flags));
        }
        let fixed = flags & wire::FLAG_C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & wire::FLAG_C_NO_ZEROES != 0;

        let mut payload = vec![0; OPTION_PAYLOAD_MAX];
        for _ in 0..OPTIONS_MAX {
            let mut head = [0; wire::OPTION_LENGTH];
            if !self.line.receive_or_end(&mut head, "an option's head")? {
                return Ok(Outcome::Ended);
            }
            let Some(head) = OptionHead::parse(&head) else {
                return Err(HandshakeError::Magic(*head.first_chunk().unwrap_or(&[0; 8])));
            };
            if !fixed && head.option != wire::OPT_EXPORT_NAME {
                return Err(HandshakeError::NotFixed(head.option));
            }
            let data = self.line.receive_payload(head, &mut payload)?;
            let next = self.option(head.option, data)?;
            self.line.flush("the reply to an option")?;
            if let Next::End(outcome) = next {
                return Ok(outcome);
            }
        }
        Err(HandshakeError::TooMany)
    }

    /// Answers one option. `data` is `None` where it was too long to be kept.
    fn option(&mut self, option: u32, data: Option<&[u8]>) -> Result<Next<D::Opened>, HandshakeError> {
        if option == wire::OPT_SET_META_CONTEXT {
            // Whatever comes of it, what was chosen before is forgotten.
            self.context = false;
        }
        match (option, data) {
            (wire::OPT_EXPORT_NAME, Some(data)) => return self.export_name(data),
            (wire::OPT_ABORT, _) => {
                self.line.reply(option, wire::REP_ACK, &[]);
                // The client may have gone without waiting for it.
                let _ = self.line.flush("the goodbye");
                return Ok(Next::End(Outcome::Ended));
            }
            (wire::OPT_BLOCKFERRY_PHASES, Some([])) if self.directory.takes_phases() => {
                self.line.reply(option, wire::REP_ACK, &[]);
                return Ok(Next::End(Outcome::Phases));
            }
            (wire::OPT_LIST, Some([])) => self.list(),
            (wire::OPT_STRUCTURED_REPLY, Some([])) if self.extended => {
                self.line.reply(option, wire::REP_ERR_EXT_HEADER_REQD, b"extended headers are agreed on");
            }
            (wire::OPT_EXTENDED_HEADERS, Some([])) => {
                (self.structured, self.extended) = (true, true);
                self.line.reply(option, wire::REP_ACK, &[]);
            }
            (wire::OPT_STRUCTURED_REPLY, Some([])) => {
                self.structured = true;
                self.line.reply(option, wire::REP_ACK, &[]);
            }
            (wire::OPT_LIST | wire::OPT_STRUCTURED_REPLY | wire::OPT_EXTENDED_HEADERS, Some(_)) => {
                self.line.reply(option, wire::REP_ERR_INVALID, b"this option has no data");
            }
            (wire::OPT_INFO | wire::OPT_GO, Some(data)) => return Ok(self.info_or_go(option, data)),
            (wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT, Some(data)) => self.meta_context(option, data),
            (
                wire::OPT_LIST
                | wire::OPT_STRUCTURED_REPLY
                | wire::OPT_EXTENDED_HEADERS
                | wire::OPT_INFO
                | wire::OPT_GO
                | wire::OPT_LIST_META_CONTEXT
                | wire::OPT_SET_META_CONTEXT,
                None,
            ) => self.line.reply(option, wire::REP_ERR_TOO_BIG, b"the option's data is too long"),
            _ => self.line.reply(option, wire::REP_ERR_UNSUP, b"unknown option"),
        }
        Ok(Next::Option)
    }

    /// The old way to open an export: there is no reply that refuses, only the end of the connection.
    fn export_name(&mut self, data: &[u8]) -> Result<Next<D::Opened>, HandshakeError> {
        if self.extended {
            return Err(HandshakeError::NotExtended);
        }
        let name = export_name(data).map_err(|_| HandshakeError::ExportName(OpenError::Unknown))?;
        let (description, opened) = self.directory.open(name).map_err(HandshakeError::ExportName)?;
        self.line.put(&wire::export_answer(description.size, self.transmission_flags(&description)));
        if !self.no_zeroes {
            self.line.put(&[0; wire::EXPORT_ANSWER_ZEROES]);
        }
        Ok(Next::End(Outcome::Transmission { opened, agreed: self.agreed(name) }))
    }

    fn list(&mut self) {
        let line = &mut self.line;
        self.directory.list(&mut |name, text| {
            let name_length = length32(name.len()).to_be_bytes();
            line.reply_parts(wire::OPT_LIST, wire::REP_SERVER, &[&name_length, name.as_bytes(), text.as_bytes()]);
        });
        line.reply(wire::OPT_LIST, wire::REP_ACK, &[]);
    }

    fn info_or_go(&mut self, option: u32, data: &[u8]) -> Next<D::Opened> {
        let (name, wanted) = match parse_info(data) {
            Ok(parsed) => parsed,
            Err(refusal) => {
                self.line.refuse(option, refusal);
                return Next::Option;
            }
        };
        let found = if option == wire::OPT_GO {
            self.directory.open(name).map(|(description, opened)| (description, Some(opened)))
        } else {
            self.directory.describe(name).map(|description| (description, None))
        };
        let (description, opened) = match found {
            Ok(found) => found,
            Err(cause) => {
                self.line.reply(option, cause.reply(), Cause::new(&cause).as_str().as_bytes());
                return Next::Option;
            }
        };
        let flags = self.transmission_flags(&description) | self.payload_flag(name);
        self.inform(option, name, &description, flags, wanted);
        self.line.reply(option, wire::REP_ACK, &[]);
        match opened {
            Some(opened) => Next::End(Outcome::Transmission { opened, agreed: self.agreed(name) }),
            None => Next::Option,
        }
    }

    /// Sends what INFO and GO tell: the size always, the rest as asked for.
    fn inform(&mut self, option: u32, name: &str, description: &Description, flags: u16, wanted: Wanted) {
        self.line.reply(option, wire::REP_INFO, &wire::info_export(description.size, flags));
        if wanted.name {
            let canonical = if description.name.is_empty() { name } else { &description.name };
            let kind = wire::INFO_NAME.to_be_bytes();
            self.line.reply_parts(option, wire::REP_INFO, &[&kind, canonical.as_bytes()]);
        }
        if wanted.description && !description.text.is_empty() {
            let kind = wire::INFO_DESCRIPTION.to_be_bytes();
            self.line.reply_parts(option, wire::REP_INFO, &[&kind, description.text.as_bytes()]);
        }
        if wanted.block_size {
            let Description { minimum_block, preferred_block, maximum_payload, .. } = *description;
            let sizes = wire::info_block_size(minimum_block, preferred_block, maximum_payload);
            self.line.reply(option, wire::REP_INFO, &sizes);
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) {
        if !self.structured {
            self.line.reply(option, wire::REP_ERR_INVALID, b"needs structured replies");
            return;
        }
        let (name, queries) = match parse_meta_context(data) {
            Ok(parsed) => parsed,
            Err(refusal) => {
                self.line.refuse(option, refusal);
                return;
            }
        };
        if let Err(cause) = self.directory.describe(name) {
            self.line.reply(option, cause.reply(), Cause::new(&cause).as_str().as_bytes());
            return;
        }
        let setting = option == wire::OPT_SET_META_CONTEXT;
        let found = if setting { queries.exact } else { queries.exact || queries.wildcard || queries.none };
        if found {
            // A list names contexts without numbers.
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let context = wire::BASE_ALLOCATION.as_bytes();
            self.line.reply_parts(option, wire::REP_META_CONTEXT, &[&id.to_be_bytes(), context]);
        }
        if found && setting {
            self.context = true;
            self.context_name.clear();
            self.context_name.extend_from_slice(name.as_bytes());
        }
        self.line.reply(option, wire::REP_ACK, &[]);
    }

    fn agreed(&self, name: &str) -> Agreed {
        let same_export = self.context_name == name.as_bytes();
        Agreed { structured: self.structured, extended: self.extended, base_allocation: self.context && same_export }
    }

    /// A filter for contexts makes sense where there are some.
    fn payload_flag(&self, name: &str) -> u16 {
        if self.extended && self.agreed(name).base_allocation { wire::FLAG_BLOCK_STATUS_PAYLOAD } else { 0 }
    }

    fn transmission_flags(&self, description: &Description) -> u16 {
        let without = if self.structured { 0 } else { wire::FLAG_SEND_DF };
        (description.transmission_flags | wire::FLAG_HAS_FLAGS) & !without
    }
}

// ---- the connection ----------------------------------------------------------------------------------------------

/// The socket with the handshake's deadline, and the replies that gather until they leave together.
struct Line<'a> {
    socket: &'a Socket,
    deadline: Instant,
    /// Replies not yet sent; never grows beyond its first capacity.
    out: Vec<u8>,
    /// An error while gathering, which the next flush reports.
    failed: Option<io::Error>,
}

impl Line<'_> {
    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.failed.is_none() {
            let room = self.out.capacity() - self.out.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.out.extend_from_slice(now);
            bytes = later;
            if !bytes.is_empty() {
                self.failed = self.socket.send_all_before(&self.out, self.deadline).err();
                self.out.clear();
            }
        }
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        self.reply_parts(option, reply, &[data]);
    }

    fn reply_parts(&mut self, option: u32, reply: u32, parts: &[&[u8]]) {
        let length = length32(parts.iter().map(|part| part.len()).sum());
        self.put(&OptionReply { option, reply, length }.encode());
        for part in parts {
            self.put(part);
        }
    }

    fn refuse(&mut self, option: u32, refusal: Refusal) {
        self.reply(option, refusal.reply, refusal.text.as_bytes());
    }

    fn flush(&mut self, place: &'static str) -> Result<(), HandshakeError> {
        let sent = match self.failed.take() {
            Some(error) => Err(error),
            None => self.socket.send_all_before(&self.out, self.deadline),
        };
        self.out.clear();
        sent.map_err(|error| lost(place, error))
    }

    /// Receives what fills `buffer`; `false` when the stream ends before its first byte.
    fn receive_or_end(&self, buffer: &mut [u8], place: &'static str) -> Result<bool, HandshakeError> {
        let Some((first, rest)) = buffer.split_at_mut_checked(1) else { return Ok(true) };
        match self.socket.recv_exact_before(first, self.deadline) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(lost(place, error)),
        }
        self.socket.recv_exact_before(rest, self.deadline).map_err(|error| lost(place, error))?;
        Ok(true)
    }

    /// Receives an option's data: `None` when it was too long to be kept and has been skipped.
    fn receive_payload<'b>(&self, head: OptionHead, buffer: &'b mut [u8]) -> Result<Option<&'b [u8]>, HandshakeError> {
        let place = "an option's data";
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        // Where there is no polite way to refuse there is no reason to skip.
        if length > OPTION_SKIP_MAX || (length > EXPORT_NAME_MAX && head.option == wire::OPT_EXPORT_NAME) {
            return Err(HandshakeError::TooLong(head));
        }
        let mut left = length;
        while left > buffer.len() {
            self.socket.recv_exact_before(buffer, self.deadline).map_err(|error| lost(place, error))?;
            left -= buffer.len();
        }
        let last = &mut buffer[..left];
        self.socket.recv_exact_before(last, self.deadline).map_err(|error| lost(place, error))?;
        Ok(if left == length { Some(last) } else { None })
    }
}

fn lost(place: &'static str, error: io::Error) -> HandshakeError {
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => HandshakeError::Left(place),
        ErrorKind::TimedOut => HandshakeError::TooSlow(place),
        _ => HandshakeError::Socket(place, error),
    }
}

/// The length of something that a limit keeps far below 4 GiB.
fn length32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

// ---- data of options ---------------------------------------------------------------------------------------------

/// A refusal of an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refusal {
    reply: u32,
    text: &'static str,
}

const MALFORMED: Refusal = Refusal { reply: wire::REP_ERR_INVALID, text: "the option's data is malformed" };
const BAD_NAME: Refusal = Refusal { reply: wire::REP_ERR_INVALID, text: "the export's name is no string" };
const LONG_NAME: Refusal = Refusal { reply: wire::REP_ERR_TOO_BIG, text: "the export's name is too long" };

/// What INFO or GO asks for besides the size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Wanted {
    name: bool,
    description: bool,
    block_size: bool,
}

/// What the queries of a meta context option match.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Queries {
    none: bool,
    exact: bool,
    wildcard: bool,
}

fn export_name(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > EXPORT_NAME_MAX {
        return Err(LONG_NAME);
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name),
        _ => Err(BAD_NAME),
    }
}

/// The data of INFO and GO. The inner lengths must add up to the outer one.
fn parse_info(data: &[u8]) -> Result<(&str, Wanted), Refusal> {
    let mut fields = Fields::new(data);
    let name = export_name(fields.string().ok_or(MALFORMED)?)?;
    let count = fields.u16().ok_or(MALFORMED)?;
    if fields.rest().len() != 2 * usize::from(count) {
        return Err(MALFORMED);
    }
    let mut wanted = Wanted::default();
    while let Some(kind) = fields.u16() {
        match kind {
            wire::INFO_NAME => wanted.name = true,
            wire::INFO_DESCRIPTION => wanted.description = true,
            wire::INFO_BLOCK_SIZE => wanted.block_size = true,
            _ => {}
        }
    }
    Ok((name, wanted))
}

/// The data of the meta context options. How many queries there can be is bounded by the data's length.
fn parse_meta_context(data: &[u8]) -> Result<(&str, Queries), Refusal> {
    let mut fields = Fields::new(data);
    let name = export_name(fields.string().ok_or(MALFORMED)?)?;
    let count = fields.u32().ok_or(MALFORMED)?;
    let mut queries = Queries { none: count == 0, ..Queries::default() };
    for _ in 0..count {
        let query = fields.string().filter(|query| query.len() <= wire::STRING_MAX).ok_or(MALFORMED)?;
        queries.exact |= query == wire::BASE_ALLOCATION.as_bytes();
        queries.wildcard |= query == b"base:";
    }
    if fields.rest().is_empty() { Ok((name, queries)) } else { Err(MALFORMED) }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
