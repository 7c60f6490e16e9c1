//! What an NBD server says about its exports, for those who show it to a user: size, flags, block sizes, contexts, and
//! what a context says about which part.
//!
//! Questions only: an export is opened for its map, and where its server knows no other way to describe it; nothing is
//! read or written then. Texts come as the server has them; whoever prints one escapes it.

use std::sync::Arc;

use crate::error::{OneLine, Problem, reason};
use crate::limits::{CONNECT_TIMEOUT, INFO_TEXT_MAX};
use crate::nbd::client::{Client, ConnectError, Described, Questions, Wants};
use crate::nbd::wire;
use crate::socket::Socket;
use crate::uri::NbdUri;

/// One export, as it is shown.
#[derive(Debug)]
pub struct Shown {
    /// Where it is, by the name that it was asked for.
    pub uri: NbdUri,
    /// What the server told.
    pub described: Described,
    /// Its metadata contexts.
    pub contexts: Vec<String>,
}

/// The words for `wire::FLAG_...`.
const CAN: [(u16, &str); 9] = [
    (wire::FLAG_SEND_FLUSH, "flush"),
    (wire::FLAG_SEND_FUA, "fua"),
    (wire::FLAG_SEND_TRIM, "trim"),
    (wire::FLAG_SEND_WRITE_ZEROES, "write-zeroes"),
    (wire::FLAG_SEND_FAST_ZERO, "fast-zero"),
    (wire::FLAG_CAN_MULTI_CONN, "multi-conn"),
    (wire::FLAG_SEND_DF, "df"),
    (wire::FLAG_SEND_CACHE, "cache"),
    (wire::FLAG_ROTATIONAL, "rotational"),
];

impl Shown {
    /// What the server can do, by [`CAN`]'s words.
    #[must_use]
    pub fn can(&self) -> Vec<&'static str> {
        CAN.into_iter().filter(|&(flag, _)| self.described.info.has(flag)).map(|(_, word)| word).collect()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.described.info.has(wire::FLAG_READ_ONLY)
    }
}

/// Calls `each` for the export that `uri` names, or for every export that the server lists where it names none; where
/// the server lists none, for its default export.
///
/// # Errors
/// The server cannot be reached or asked, or does not tell; what was shown stands. Of several exports that it refuses,
/// the last one is returned and the others are warned of, after all that it tells about.
pub fn ask(uri: &NbdUri, insecure_plaintext: bool, each: &mut dyn FnMut(&Shown)) -> Result<(), Problem> {
    let refuse = |uri: &NbdUri, cause: &dyn std::fmt::Display| Problem::refused("info", uri, cause);
    uri.address.check_plaintext("info", insecure_plaintext)?;
    let socket = connect(uri)?;
    let mut questions = Questions::begin(&socket).map_err(|error| refuse(uri, &error))?;
    let mut names = vec![uri.export.clone()];
    if uri.export.is_empty() {
        let mut listed = Vec::new();
        let mut list = |name: &str, _: &str| listed.push(name.to_owned());
        questions.exports(&mut list).map_err(|error| refuse(uri, &error))?;
        if !listed.is_empty() {
            names = listed;
        }
    }
    let mut open = Vec::new();
    let mut problems = Vec::new();
    for name in names {
        let here = uri.with_export(&name);
        let told = match questions.describe(&name) {
            Ok(told) => told,
            // Of one export. The others are there nevertheless.
            Err(error @ (ConnectError::Refused { .. } | ConnectError::TlsRequired)) => {
                problems.push(refuse(&here, &error));
                continue;
            }
            Err(error) => return Err(refuse(&here, &error)),
        };
        let mut contexts = Vec::new();
        let mut take = |context: &str| contexts.push(context.to_owned());
        if !questions.contexts(&name, &[], &mut take).map_err(|error| refuse(&here, &error))? {
            contexts.clear();
        }
        match told {
            Some(described) if described.info.size > 0 => each(&shown(here, described, contexts)),
            told => open.push((here, told, contexts)),
        }
    }
    // A server that knows no better may serve one client at a time.
    drop(questions);
    drop(socket);
    // What a server tells who opens the export: one that knows no other way, or that says size 0 before, as nbd-server
    // does of every export.
    for (here, told, contexts) in open {
        let socket = Arc::new(connect(&here)?);
        let info = match Client::connect(socket, &here.export, Wants::READING) {
            Ok(client) => *client.info(),
            // Closing is how a server refuses who asks by name.
            Err(error @ (ConnectError::Refused { .. } | ConnectError::TlsRequired | ConnectError::Closed(_))) => {
                problems.push(refuse(&here, &error));
                continue;
            }
            Err(error) => return Err(refuse(&here, &error)),
        };
        let (name, text) = told.map_or((None, None), |told| (told.name, told.text));
        each(&shown(here, Described { info, name, text }, contexts));
    }
    let last = problems.pop();
    problems.iter().for_each(|problem| log::warn!("{problem}"));
    last.map_or(Ok(()), Err)
}

/// What a metadata context says about a part of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it stands, in bytes.
    pub offset: u64,
    /// Its length in bytes. What follows is told to be something else.
    pub length: u64,
    /// What the context says; [`state`] has words for it.
    pub flags: u64,
}

/// Calls `each` for the extents of the export that `uri` names, in order, as the metadata context has them.
///
/// # Errors
/// The server cannot be reached or asked, has no such context, or does not tell all; what was shown stands.
pub fn map(uri: &NbdUri, context: &str, insecure_plaintext: bool, each: &mut dyn FnMut(Extent)) -> Result<(), Problem> {
    let refuse = |cause: &dyn std::fmt::Display| Problem::refused("info", uri, cause);
    uri.address.check_plaintext("info", insecure_plaintext)?;
    let wants = Wants { contexts: &[context], ..Wants::READING };
    let mut client = Client::connect(Arc::new(connect(uri)?), &uri.export, wants).map_err(|error| refuse(&error))?;
    if client.info().contexts.iter().all(Option::is_none) {
        return Err(refuse(&format_args!("the server has no metadata context '{}' for it", OneLine(context))));
    }
    let mut last: Option<Extent> = None;
    let size = client.info().size;
    let told = client.block_status(0, size, &mut |told| match &mut last {
        // A server tells in as many pieces as it likes.
        Some(last) if last.flags == told.flags => last.length += told.length,
        _ => {
            last.iter().for_each(|whole| each(*whole));
            last = Some(Extent { offset: told.offset, length: told.length, flags: told.flags });
        }
    });
    last.iter().for_each(|whole| each(*whole));
    told.map_err(|error| refuse(&error))?;
    client.disconnect();
    Ok(())
}

/// What the flags of a context mean, where that is known.
#[must_use]
pub fn state(context: &str, flags: u64) -> Option<&'static str> {
    const HOLE: u64 = wire::STATE_HOLE as u64;
    const ZERO: u64 = wire::STATE_ZERO as u64;
    const BOTH: u64 = HOLE | ZERO;
    let is_bitmap = context.starts_with("qemu:dirty-bitmap:");
    match (context, flags) {
        (wire::BASE_ALLOCATION, 0) => Some("data"),
        (wire::BASE_ALLOCATION, HOLE) => Some("hole"),
        (wire::BASE_ALLOCATION, ZERO) => Some("zero"),
        (wire::BASE_ALLOCATION, BOTH) => Some("hole,zero"),
        (_, 0) if is_bitmap => Some("clean"),
        (_, 1) if is_bitmap => Some("dirty"),
        ("qemu:allocation-depth", 0) => Some("unallocated"),
        ("qemu:allocation-depth", 1) => Some("local"),
        ("qemu:allocation-depth", _) => Some("backing"),
        _ => None,
    }
}

fn shown(uri: NbdUri, mut described: Described, contexts: Vec<String>) -> Shown {
    if let Some(text) = &mut described.text {
        // A server's essay must fit a line.
        let end = (0..=INFO_TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or_default());
    }
    Shown { uri, described, contexts }
}

fn connect(uri: &NbdUri) -> Result<Socket, Problem> {
    uri.address.connect(CONNECT_TIMEOUT).map_err(|error| Problem::refused("info", uri, reason(&error)))
}
