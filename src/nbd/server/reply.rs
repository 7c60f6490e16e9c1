//! The bytes of a reply before its data: simple or structured, as it was agreed.
//!
//! The connection's own thread and the workers send them; nothing here touches a socket. NBD specification: "Simple
//! reply message", "Structured reply chunk message".

use crate::nbd::handshake::Agreed;
use crate::nbd::wire::{self, Request};

/// The bytes of a reply before its data.
pub(super) struct ReplyHead {
    bytes: [u8; wire::CHUNK_LENGTH + 12],
    length: usize,
}

impl ReplyHead {
    fn new(parts: &[&[u8]]) -> Self {
        let mut head = Self { bytes: [0; wire::CHUNK_LENGTH + 12], length: 0 };
        for part in parts {
            head.bytes[head.length..head.length + part.len()].copy_from_slice(part);
            head.length += part.len();
        }
        head
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Before `length` bytes read at `offset`; `last` if they end the reply.
    pub(super) fn for_data(agreed: Agreed, request: &Request, offset: u64, length: usize, last: bool) -> Self {
        if !agreed.structured {
            return Self::new(&[&wire::simple_reply(0, request.cookie)]);
        }
        let flags = if last { wire::REPLY_FLAG_DONE } else { 0 };
        let payload = u32::try_from(length + 8).unwrap_or(u32::MAX);
        let chunk = wire::structured_chunk(flags, wire::REPLY_TYPE_OFFSET_DATA, request.cookie, payload);
        Self::new(&[&chunk, &wire::offset_data(offset)])
    }

    /// Without data: success, or an error. A READ or BLOCK_STATUS of a client that agreed on structured replies is
    /// never answered with a simple one.
    pub(super) fn for_result(agreed: Agreed, request: &Request, error: u32) -> Self {
        let structured = agreed.structured && matches!(request.command, wire::CMD_READ | wire::CMD_BLOCK_STATUS);
        if !structured {
            return Self::new(&[&wire::simple_reply(error, request.cookie)]);
        }
        let (kind, payload) = if error == 0 { (wire::REPLY_TYPE_NONE, 0) } else { (wire::REPLY_TYPE_ERROR, 6) };
        let chunk = wire::structured_chunk(wire::REPLY_FLAG_DONE, kind, request.cookie, payload);
        if error == 0 { Self::new(&[&chunk]) } else { Self::new(&[&chunk, &wire::error_chunk(error, 0)]) }
    }
}
