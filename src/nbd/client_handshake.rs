//! The client's side of the handshake, with any server of the field.
//!
//! Fixed newstyle, `OPT_GO` where the server knows it, `OPT_EXPORT_NAME` where it does not. [`negotiate`] is what
//! [`Client::connect`](crate::nbd::client::Client::connect) starts with; [`offer_phases`] finds out whether the other
//! end is a blockferry. One deadline covers each handshake; a server's text is cut, never trusted.
//!
//! NBD specification: "Fixed newstyle negotiation", "Option types", "Size constraints".

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Instant;

use crate::cause::Cause;
use crate::limits::{
    CONTEXT_LIST_MAX, CONTEXTS_MAX, EXPORT_NAME_MAX, HANDSHAKE_TIMEOUT, MINIMUM_BLOCK_MAX, OPTION_PAYLOAD_MAX,
    OPTION_REPLIES_MAX, PARTS_MAX, PAYLOAD_MAX, PREFERRED_BLOCK, REGION_REQUESTS_MAX, ZERO_PART_MAX,
};
use crate::nbd::wire::{self, Fields, Greeting, OptionHead, OptionReply};
use crate::socket::Socket;

/// What a client would like to use; a server that does not know it is no error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wants<'a> {
    /// Structured replies: reads that fail late, and holes, are told.
    pub structured: bool,
    /// Extended headers where the server knows them: then extents are as long as they are. Needs `structured`.
    pub extended: bool,
    /// Block status with these metadata contexts, by their full names: `base:allocation`, `qemu:dirty-bitmap:NAME`,
    /// `qemu:allocation-depth` and whatever else a server may have; at most [`CONTEXTS_MAX`]. Needs `structured`.
    pub contexts: &'a [&'a str],
}

impl Wants<'_> {
    /// What a client wants that reads and follows extents.
    pub const READING: Wants<'static> = Wants { structured: true, extended: true, contexts: &[wire::BASE_ALLOCATION] };
}

/// What the server said about the export, and what was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// `wire::FLAG_...`.
    pub transmission_flags: u16,
    /// Smallest request and alignment, in bytes: a power of two. 512 where the server says nothing.
    pub minimum_block: u32,
    /// Alignment from which on requests are efficient, in bytes: a power of two. 4096 where the server says nothing.
    pub preferred_block: u32,
    /// Largest payload of a request, in bytes: a multiple of `minimum_block`, and at most [`PAYLOAD_MAX`], which stands
    /// here where the server says nothing.
    pub maximum_payload: u32,
    /// Whether structured replies, or extended headers, were agreed on.
    pub structured: bool,
    /// Whether extended headers were agreed on.
    pub extended: bool,
    /// The server's numbers for the contexts of [`Wants::contexts`], in that order; `None` where it has no such one.
    pub contexts: [Option<u32>; CONTEXTS_MAX],
    /// The place of `base:allocation` among them, if it was agreed on.
    pub base_allocation: Option<usize>,
}

impl ExportInfo {
    /// What a client assumes before a server has said anything.
    pub(super) fn unknown() -> Self {
        Self {
            size: 0,
            transmission_flags: 0,
            minimum_block: 512,
            preferred_block: PREFERRED_BLOCK,
            maximum_payload: PAYLOAD_MAX,
            structured: false,
            extended: false,
            contexts: [None; CONTEXTS_MAX],
            base_allocation: None,
        }
    }

    /// Whether the server set all of `flags`.
    #[must_use]
    pub fn has(&self, flags: u16) -> bool {
        self.transmission_flags & flags == flags
    }

    /// How many connections may be open at once to an export that is written: as many as `wanted`, or one where the
    /// server does not say that a flush on one covers what was answered on the others.
    #[must_use]
    pub fn connections(&self, wanted: usize) -> usize {
        if self.has(wire::FLAG_CAN_MULTI_CONN) { wanted } else { wanted.min(1) }
    }

    /// Longest READ or WRITE that can be submitted at once, in bytes: a multiple of the minimum block. What is longer
    /// than the server's maximum payload is split on its way.
    #[must_use]
    pub fn request_max(&self) -> u32 {
        let longest = self.maximum_payload.saturating_mul(PARTS_MAX);
        longest.min(PAYLOAD_MAX - PAYLOAD_MAX % self.minimum_block)
    }

    /// Longest WRITE_ZEROES that can be submitted at once, in bytes: a multiple of the minimum block.
    #[must_use]
    pub fn zeroes_max(&self) -> u32 {
        if self.has(wire::FLAG_SEND_WRITE_ZEROES) {
            u32::MAX - u32::MAX % self.minimum_block
        } else {
            self.zero_part().saturating_mul(PARTS_MAX)
        }
    }

    /// How many places of the window a READ or WRITE of `length` bytes takes.
    #[must_use]
    pub fn parts(&self, length: u32) -> usize {
        length.div_ceil(self.maximum_payload).max(1) as usize
    }

    /// Most places of the window that `length` bytes take, in at most [`REGION_REQUESTS_MAX`] requests: each may end
    /// with a part that is short.
    #[must_use]
    pub fn requests(&self, length: usize) -> usize {
        let longest = usize::try_from(self.maximum_payload).unwrap_or(usize::MAX);
        REGION_REQUESTS_MAX + if length > longest { length / longest } else { 0 }
    }

    /// Longest WRITE of zeroes that stands for a part of a WRITE_ZEROES.
    pub(super) fn zero_part(&self) -> u32 {
        self.maximum_payload.min(ZERO_PART_MAX)
    }

    /// The whole minimum blocks around a range, as far as the export goes.
    pub(super) fn blocks_around(&self, offset: u64, end: u64) -> (u64, u64) {
        let block = u64::from(self.minimum_block);
        (offset - offset % block, end.checked_next_multiple_of(block).unwrap_or(end).min(self.size.max(end)))
    }
}

/// What the other end says to the private option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhasesAnswer {
    /// It is a blockferry: the next byte on the socket belongs to the phase protocol.
    Accepted,
    /// It is an NBD server that does not know the option. The goodbye is said; another connection can open an export.
    PlainServer,
}

/// Why a handshake failed. The connection is of no use any more.
#[derive(Debug)]
pub enum ConnectError {
    /// The name cannot be an export's.
    Name,
    /// The server closed in the middle of what is named here.
    Closed(&'static str),
    /// The deadline passed in the middle of what is named here.
    TooSlow(&'static str),
    /// The socket failed.
    Socket(&'static str, io::Error),
    /// What is at the other end is no NBD server.
    NotNbd,
    /// The server is oldstyle: it has one export and can do next to nothing.
    Oldstyle,
    /// The server wants TLS first.
    TlsRequired,
    /// The server refused an option.
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// `wire::REP_ERR_...`.
        reply: u32,
        /// The server's words, or none.
        text: Cause,
    },
    /// The server broke the protocol.
    Protocol(&'static str, Cause),
}

impl ConnectError {
    /// Whether the server says that it has no such export. A server too old to say it closes instead.
    #[must_use]
    pub fn is_unknown_export(&self) -> bool {
        matches!(self, Self::Refused { reply: wire::REP_ERR_UNKNOWN, .. })
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => write!(f, "opening the export: its name is longer than {EXPORT_NAME_MAX} bytes or has a NUL"),
            Self::Closed(OPENING_OLD) => write!(f, "{OPENING_OLD}: the server closed: it has no such export"),
            Self::Closed(operation) => write!(f, "{operation}: the server closed the connection"),
            Self::TooSlow(operation) => {
                write!(f, "{operation}: no answer from the server within {} s", HANDSHAKE_TIMEOUT.as_secs())
            }
            Self::Socket(operation, error) => write!(f, "{operation}: {error}"),
            Self::NotNbd => write!(f, "{GREETING}: this is no NBD server"),
            Self::Oldstyle => write!(f, "{GREETING}: the server is oldstyle, which is not supported"),
            Self::TlsRequired => write!(f, "{GREETING}: the server requires TLS"),
            Self::Refused { operation, reply, text } => {
                write!(f, "{operation}: the server refused: {}", wire::option_error_name(*reply))?;
                if text.is_empty() { Ok(()) } else { write!(f, " ({text})") }
            }
            Self::Protocol(operation, cause) => write!(f, "{operation}: the server broke the protocol: {cause}"),
        }
    }
}

impl std::error::Error for ConnectError {}

const GREETING: &str = "greeting the server";
const STRUCTURED: &str = "asking for structured replies";
const EXTENDED: &str = "asking for extended headers";
const CONTEXTS: &str = "asking for metadata contexts";
const OPENING: &str = "opening the export";
const OPENING_OLD: &str = "opening the export by name";
const PHASES: &str = "asking for the phase protocol";

#[cfg(test)]
fn negotiate(socket: &Socket, export: &str, wants: Wants<'_>) -> Result<ExportInfo, ConnectError> {
    negotiate_before(socket, export, wants, Instant::now() + HANDSHAKE_TIMEOUT)
}

/// Leads the handshake up to transmission.
pub(super) fn negotiate_before(
    socket: &Socket,
    export: &str,
    wants: Wants<'_>,
    deadline: Instant,
) -> Result<ExportInfo, ConnectError> {
    if export.len() > EXPORT_NAME_MAX || export.contains('\0') {
        return Err(ConnectError::Name);
    }
    let mut haggling = Haggling::greet(socket, deadline)?;
    let mut info = ExportInfo::unknown();
    if haggling.fixed {
        info.extended = wants.structured && wants.extended && haggling.extended_headers()?;
        info.structured = info.extended || (wants.structured && haggling.structured_replies()?);
        if info.structured && !wants.contexts.is_empty() {
            haggling.contexts(export, wants.contexts, &mut info)?;
        }
        if haggling.go(export, &mut info)? {
            return Ok(info);
        }
        if info.extended {
            return Err(ConnectError::Protocol(OPENING, Cause::new("GO is unknown after extended headers")));
        }
    }
    haggling.export_name(export, &mut info)?;
    Ok(info)
}

/// Offers to speak the phase protocol on a fresh connection.
///
/// # Errors
/// As [`offer_phases_before`].
pub fn offer_phases(socket: &Socket) -> Result<PhasesAnswer, ConnectError> {
    offer_phases_before(socket, Instant::now() + HANDSHAKE_TIMEOUT)
}

/// Offers to speak the phase protocol on a fresh connection, and waits for the answer until `deadline`.
///
/// # Errors
/// Why there is no answer. Also what a server says that lets nobody in: that it wants TLS, or is going away.
pub fn offer_phases_before(socket: &Socket, deadline: Instant) -> Result<PhasesAnswer, ConnectError> {
    let mut haggling = Haggling::greet(socket, deadline)?;
    if !haggling.fixed {
        return Ok(PhasesAnswer::PlainServer);
    }
    match haggling.ask_simply(PHASES, wire::OPT_BLOCKFERRY_PHASES)? {
        None => Ok(PhasesAnswer::Accepted),
        Some(_) => {
            haggling.say_goodbye();
            Ok(PhasesAnswer::PlainServer)
        }
    }
}

/// A handshake under way.
pub(super) struct Haggling<'a> {
    socket: &'a Socket,
    deadline: Instant,
    pub(super) fixed: bool,
    no_zeroes: bool,
    /// What leaves with the next option: at first the client flags.
    out: Vec<u8>,
    payload: Vec<u8>,
    /// A refusal of one export leaves the others to be asked about.
    pub(super) asks_on: bool,
    said_goodbye: bool,
}

/// Takes an option's reply and its data, or says what is wrong with them.
pub(super) type Take<'a> = &'a mut dyn FnMut(u32, &[u8]) -> Result<(), &'static str>;

/// Takes a kind of information and its data, or says what is wrong with it.
pub(super) type TakeInfo<'a> = &'a mut dyn FnMut(u16, &[u8]) -> Result<(), &'static str>;

/// The refusal of an option.
pub(super) struct Refusal {
    pub(super) reply: u32,
    pub(super) text: Cause,
}

impl<'a> Haggling<'a> {
    pub(super) fn greet(socket: &'a Socket, deadline: Instant) -> Result<Self, ConnectError> {
        let mut haggling = Self {
            socket,
            deadline,
            fixed: false,
            no_zeroes: false,
            out: Vec::with_capacity(OPTION_PAYLOAD_MAX),
            payload: vec![0; OPTION_PAYLOAD_MAX],
            asks_on: false,
            said_goodbye: false,
        };
        let mut bytes = [0; wire::GREETING_LENGTH];
        haggling.receive(GREETING, &mut bytes)?;
        let flags = match Greeting::parse(&bytes) {
            Greeting::Newstyle(flags) => flags,
            Greeting::Oldstyle => return Err(ConnectError::Oldstyle),
            Greeting::Foreign => return Err(ConnectError::NotNbd),
        };
        haggling.fixed = flags & wire::FLAG_FIXED_NEWSTYLE != 0;
        haggling.no_zeroes = flags & wire::FLAG_NO_ZEROES != 0;
        let mut answer = 0;
        if haggling.fixed {
            answer |= wire::FLAG_C_FIXED_NEWSTYLE;
        }
        if haggling.no_zeroes {
            answer |= wire::FLAG_C_NO_ZEROES;
        }
        haggling.out.extend_from_slice(&answer.to_be_bytes());
        Ok(haggling)
    }

    pub(super) fn structured_replies(&mut self) -> Result<bool, ConnectError> {
        Ok(self.ask_simply(STRUCTURED, wire::OPT_STRUCTURED_REPLY)?.is_none())
    }

    fn extended_headers(&mut self) -> Result<bool, ConnectError> {
        Ok(self.ask_simply(EXTENDED, wire::OPT_EXTENDED_HEADERS)?.is_none())
    }

    /// Chooses the metadata contexts that the server has of those in `names`.
    fn contexts(&mut self, export: &str, names: &[&str], info: &mut ExportInfo) -> Result<(), ConnectError> {
        let names = &names[..names.len().min(CONTEXTS_MAX)];
        let mut chosen = [None; CONTEXTS_MAX];
        let refusal =
            self.ask_contexts(CONTEXTS, wire::OPT_SET_META_CONTEXT, export, names, &mut |reply, payload| {
                let mut fields = Fields::new(payload);
                let (wire::REP_META_CONTEXT, Some(number)) = (reply, fields.u32()) else {
                    return Err("an unexpected reply");
                };
                match names.iter().position(|name| name.as_bytes() == fields.rest()) {
                    _ if chosen.contains(&Some(number)) => Err("it chose one number for two metadata contexts"),
                    Some(place) if chosen[place].is_none() => {
                        chosen[place] = Some(number);
                        Ok(())
                    }
                    _ => Err("it chose a metadata context that was not asked for"),
                }
            })?;
        if refusal.is_none() {
            info.contexts = chosen;
            let allocation = names.iter().position(|&name| name == wire::BASE_ALLOCATION);
            info.base_allocation = allocation.filter(|&place| chosen[place].is_some());
        }
        Ok(())
    }

    /// Sends an option that queries metadata contexts; those that cannot be a name are left out.
    pub(super) fn ask_contexts(
        &mut self,
        operation: &'static str,
        option: u32,
        export: &str,
        queries: &[&str],
        take: Take<'_>,
    ) -> Result<Option<Refusal>, ConnectError> {
        let usable = |name: &&&str| (1..=EXPORT_NAME_MAX).contains(&name.len());
        let queries: heapless::Vec<&str, CONTEXTS_MAX> =
            queries.iter().filter(usable).copied().take(CONTEXTS_MAX).collect();
        let lengths: heapless::Vec<_, CONTEXTS_MAX> = queries.iter().map(|name| length32(name.len())).collect();
        let (name_length, count) = (length32(export.len()), length32(queries.len()));
        let mut parts: heapless::Vec<&[u8], { 3 + 2 * CONTEXTS_MAX }> = heapless::Vec::new();
        parts.extend([&name_length[..], export.as_bytes(), &count]);
        parts.extend(queries.iter().zip(&lengths).flat_map(|(name, length)| [&length[..], name.as_bytes()]));
        self.ask(operation, option, &parts, CONTEXT_LIST_MAX, take)
    }

    /// Opens the export; `false` where the server does not know how.
    fn go(&mut self, export: &str, info: &mut ExportInfo) -> Result<bool, ConnectError> {
        let asked = [wire::INFO_BLOCK_SIZE];
        match self.inform(OPENING, wire::OPT_GO, export, &asked, info, &mut |_, _| Ok(()))? {
            None => Ok(true),
            Some(Refusal { reply: wire::REP_ERR_UNSUP, .. }) => Ok(false),
            Some(Refusal { reply, text }) => {
                self.say_goodbye();
                Err(ConnectError::Refused { operation: OPENING, reply, text })
            }
        }
    }

    /// Sends INFO or GO, asking for the information in `asked`; what `info` has no place for goes to `other`.
    pub(super) fn inform(
        &mut self,
        operation: &'static str,
        option: u32,
        export: &str,
        asked: &[u16],
        info: &mut ExportInfo,
        other: TakeInfo<'_>,
    ) -> Result<Option<Refusal>, ConnectError> {
        let count = u16::try_from(asked.len()).unwrap_or(u16::MAX).to_be_bytes();
        let kinds: heapless::Vec<u8, 16> = asked.iter().flat_map(|kind| kind.to_be_bytes()).collect();
        let parts = [&length32(export.len())[..], export.as_bytes(), &count, &kinds];
        let mut told = false;
        let refusal = self.ask(operation, option, &parts, OPTION_REPLIES_MAX, &mut |reply, payload| {
            let mut fields = Fields::new(payload);
            match (reply, fields.u16()) {
                (wire::REP_INFO, Some(wire::INFO_EXPORT)) => {
                    told = true;
                    export_fields(fields, info)
                }
                (wire::REP_INFO, Some(wire::INFO_BLOCK_SIZE)) => block_size_fields(fields, info),
                (wire::REP_INFO, Some(kind)) => other(kind, fields.rest()),
                _ => Err("an unexpected reply"),
            }
        })?;
        if refusal.is_none() && !told {
            return Err(ConnectError::Protocol(operation, Cause::new("no size was told")));
        }
        Ok(refusal)
    }

    fn export_name(&mut self, export: &str, info: &mut ExportInfo) -> Result<(), ConnectError> {
        self.send(OPENING_OLD, wire::OPT_EXPORT_NAME, &[export.as_bytes()])?;
        let mut answer = [0; wire::EXPORT_ANSWER_LENGTH];
        self.receive(OPENING_OLD, &mut answer)?;
        if !self.no_zeroes {
            self.receive(OPENING, &mut [0; wire::EXPORT_ANSWER_ZEROES])?;
        }
        export_fields(Fields::new(&answer), info).map_err(|cause| ConnectError::Protocol(OPENING, Cause::new(cause)))
    }

    /// Sends an option without data that is answered with one reply.
    fn ask_simply(&mut self, operation: &'static str, option: u32) -> Result<Option<Refusal>, ConnectError> {
        self.ask(operation, option, &[], OPTION_REPLIES_MAX, &mut |_, _| Err("an unexpected reply"))
    }

    /// Sends an option, gives each reply with data, at most `most`, to `take` and returns the last one if it is a
    /// refusal.
    pub(super) fn ask(
        &mut self,
        operation: &'static str,
        option: u32,
        parts: &[&[u8]],
        most: usize,
        take: Take<'_>,
    ) -> Result<Option<Refusal>, ConnectError> {
        self.send(operation, option, parts)?;
        let broken = |cause: &'static str| ConnectError::Protocol(operation, Cause::new(cause));
        for _ in 0..most {
            let mut head = [0; wire::OPTION_REPLY_LENGTH];
            self.receive(operation, &mut head)?;
            let head = OptionReply::parse(&head).ok_or_else(|| broken("no reply to an option"))?;
            if head.option != option {
                return Err(broken("a reply to another option"));
            }
            let mut payload = std::mem::take(&mut self.payload);
            let length = usize::try_from(head.length).unwrap_or(usize::MAX);
            let data = payload.get_mut(..length).ok_or_else(|| broken("a reply of excessive length"))?;
            self.receive(operation, data)?;
            match head.reply {
                wire::REP_ACK => {
                    self.payload = payload;
                    return Ok(None);
                }
                wire::REP_ERR_TLS_REQD if !self.asks_on => {
                    self.say_goodbye();
                    return Err(ConnectError::TlsRequired);
                }
                reply if head.is_error() => {
                    let text = Cause::from_peer(data);
                    self.payload = payload;
                    if reply == wire::REP_ERR_SHUTDOWN && !self.asks_on {
                        self.say_goodbye();
                        return Err(ConnectError::Refused { operation, reply, text });
                    }
                    return Ok(Some(Refusal { reply, text }));
                }
                reply => take(reply, data).map_err(broken)?,
            }
            self.payload = payload;
        }
        Err(broken("replies without an end"))
    }

    /// Ends the handshake as the specification wants it, as far as it can be done without waiting.
    pub(super) fn say_goodbye(&mut self) {
        if std::mem::replace(&mut self.said_goodbye, true) {
            return;
        }
        let head = OptionHead { option: wire::OPT_ABORT, length: 0 }.encode();
        let _ = self.socket.send_nowait(&head, &[]);
    }

    fn send(&mut self, operation: &'static str, option: u32, parts: &[&[u8]]) -> Result<(), ConnectError> {
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        self.out.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        self.out.extend_from_slice(&option.to_be_bytes());
        self.out.extend_from_slice(&length32(length));
        for part in parts {
            self.out.extend_from_slice(part);
        }
        let sent = self.socket.send_all_before(&self.out, self.deadline);
        self.out.clear();
        sent.map_err(|error| lost(operation, error))
    }

    fn receive(&self, operation: &'static str, buffer: &mut [u8]) -> Result<(), ConnectError> {
        self.socket.recv_exact_before(buffer, self.deadline).map_err(|error| lost(operation, error))
    }
}

fn lost(operation: &'static str, error: io::Error) -> ConnectError {
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            ConnectError::Closed(operation)
        }
        ErrorKind::TimedOut => ConnectError::TooSlow(operation),
        _ => ConnectError::Socket(operation, error),
    }
}

fn length32(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}

/// Size and transmission flags, as INFO_EXPORT and the answer to EXPORT_NAME have them.
fn export_fields(mut fields: Fields<'_>, info: &mut ExportInfo) -> Result<(), &'static str> {
    match (fields.u64(), fields.u16(), fields.rest()) {
        (Some(size), Some(flags), []) => {
            info.size = size;
            info.transmission_flags = flags;
            Ok(())
        }
        _ => Err("malformed information about the export"),
    }
}

/// Size constraints. Those that would make no request possible are refused; odd ones are rounded to what the
/// specification allows.
fn block_size_fields(mut fields: Fields<'_>, info: &mut ExportInfo) -> Result<(), &'static str> {
    let (Some(minimum), Some(preferred), Some(maximum), []) = (fields.u32(), fields.u32(), fields.u32(), fields.rest())
    else {
        return Err("malformed size constraints");
    };
    if !minimum.is_power_of_two() || minimum > MINIMUM_BLOCK_MAX || maximum < minimum {
        return Err("size constraints that no request can keep");
    }
    info.minimum_block = minimum;
    info.preferred_block =
        if preferred.is_power_of_two() { preferred.max(minimum) } else { PREFERRED_BLOCK.max(minimum) };
    let maximum = maximum.min(PAYLOAD_MAX);
    info.maximum_payload = maximum - maximum % minimum;
    Ok(())
}

#[cfg(test)]
#[path = "client_handshake_tests.rs"]
mod tests;
