//! What can be asked of a server without opening an export: which exports it has, what they are, which metadata
//! contexts.
//!
//! For those who show a server to its user, or look before they open. One connection answers all questions and ends
//! with a goodbye. A server that does not know a question is no error. Names come as the server has them: whoever
//! prints one escapes it.
//!
//! NBD specification: "Option types" (LIST, INFO), "Metadata querying".

use std::str;
use std::time::Instant;

use crate::limits::{EXPORT_LIST_MAX, EXPORT_NAME_MAX, HANDSHAKE_TIMEOUT};
use crate::nbd::client_handshake::{ConnectError, ExportInfo, Haggling, Refusal};
use crate::nbd::wire::{self, Fields};
use crate::socket::Socket;

/// A connection for questions. It ends politely when it is dropped.
pub struct Questions<'a> {
    haggling: Haggling<'a>,
    structured: bool,
}

/// What a server tells about an export that is not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Size, flags and size constraints. Of contexts nothing is known.
    pub info: ExportInfo,
    /// The canonical name, if the server told one.
    pub name: Option<String>,
    /// A text for humans, if the server told one.
    pub text: Option<String>,
}

const LISTING: &str = "listing the exports";
const DESCRIBING: &str = "describing the export";
const CONTEXTS: &str = "listing the metadata contexts";

impl<'a> Questions<'a> {
    /// Greets the server at the other end of a fresh connection. All questions together have as long as one handshake.
    /// A server whose newstyle is not fixed would answer a question by hanging up: it is asked none, and knows none.
    ///
    /// # Errors
    /// Why there is nobody to ask.
    pub fn begin(socket: &'a Socket) -> Result<Self, ConnectError> {
        let mut haggling = Haggling::greet(socket, Instant::now() + HANDSHAKE_TIMEOUT)?;
        let structured = haggling.fixed && haggling.structured_replies()?;
        haggling.asks_on = true;
        Ok(Self { haggling, structured })
    }

    /// Whether the server knows structured replies.
    #[must_use]
    pub fn has_structured_replies(&self) -> bool {
        self.structured
    }

    /// Calls `each(name, text)` for each export that the server lists. `false` where it does not.
    ///
    /// # Errors
    /// The connection is dead, or the server has broken the protocol.
    pub fn exports(&mut self, each: &mut dyn FnMut(&str, &str)) -> Result<bool, ConnectError> {
        if !self.haggling.fixed {
            return Ok(false);
        }
        let refusal = self.haggling.ask(LISTING, wire::OPT_LIST, &[], EXPORT_LIST_MAX, &mut |reply, payload| {
            let mut fields = Fields::new(payload);
            let (wire::REP_SERVER, Some(name)) = (reply, fields.string()) else { return Err("an unexpected reply") };
            each(string(name)?, string(fields.rest())?);
            Ok(())
        })?;
        Ok(refusal.is_none())
    }

    /// What the server tells about `export`; `None` where it does not know how, though it may open it.
    ///
    /// # Errors
    /// The server's refusal, or the connection is dead, or the server has broken the protocol.
    pub fn describe(&mut self, export: &str) -> Result<Option<Described>, ConnectError> {
        if !self.haggling.fixed {
            return Ok(None);
        }
        let mut told = Described { info: ExportInfo::unknown(), name: None, text: None };
        let (name, text) = (&mut told.name, &mut told.text);
        let asked = [wire::INFO_NAME, wire::INFO_DESCRIPTION, wire::INFO_BLOCK_SIZE];
        let mut other = |kind: u16, bytes: &[u8]| {
            match kind {
                wire::INFO_NAME => *name = Some(string(bytes)?.to_owned()),
                wire::INFO_DESCRIPTION => *text = Some(string(bytes)?.to_owned()),
                _ => {}
            }
            Ok(())
        };
        match self.haggling.inform(DESCRIBING, wire::OPT_INFO, checked(export)?, &asked, &mut told.info, &mut other)? {
            None => {
                told.info.structured = self.structured;
                Ok(Some(told))
            }
            Some(Refusal { reply: wire::REP_ERR_UNSUP, .. }) => Ok(None),
            Some(Refusal { reply: wire::REP_ERR_TLS_REQD, .. }) => Err(ConnectError::TlsRequired),
            Some(Refusal { reply, text }) => Err(ConnectError::Refused { operation: DESCRIBING, reply, text }),
        }
    }

    /// Calls `each` for each metadata context of `export` that a query matches: a whole name, or what a server takes
    /// for several, as `base:` and `qemu:dirty-bitmap:`. Without a query, for all. `false` where the server has no
    /// contexts, or does not tell them: then what it has told does not count.
    ///
    /// # Errors
    /// The connection is dead, or the server has broken the protocol.
    pub fn contexts(
        &mut self,
        export: &str,
        queries: &[&str],
        each: &mut dyn FnMut(&str),
    ) -> Result<bool, ConnectError> {
        if !self.structured {
            return Ok(false);
        }
        let option = wire::OPT_LIST_META_CONTEXT;
        let mut take = |reply: u32, payload: &[u8]| {
            let mut fields = Fields::new(payload);
            // A list has no numbers.
            let (wire::REP_META_CONTEXT, Some(_)) = (reply, fields.u32()) else { return Err("an unexpected reply") };
            each(string(fields.rest())?);
            Ok(())
        };
        let refusal = self.haggling.ask_contexts(CONTEXTS, option, checked(export)?, queries, &mut take)?;
        Ok(refusal.is_none())
    }
}

impl Drop for Questions<'_> {
    fn drop(&mut self) {
        if self.haggling.fixed {
            self.haggling.say_goodbye();
        }
    }
}

fn checked(export: &str) -> Result<&str, ConnectError> {
    if export.len() > EXPORT_NAME_MAX || export.contains('\0') { Err(ConnectError::Name) } else { Ok(export) }
}

fn string(bytes: &[u8]) -> Result<&str, &'static str> {
    match str::from_utf8(bytes) {
        Ok(string) if string.len() <= wire::STRING_MAX && !string.contains('\0') => Ok(string),
        _ => Err("a name or text that is no string"),
    }
}

#[cfg(test)]
#[path = "client_ask_tests.rs"]
mod tests;
