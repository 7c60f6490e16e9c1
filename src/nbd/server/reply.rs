//! The bytes of a reply before its data: simple, structured or extended, as it was agreed.
//!
//! The connection's own thread and the workers send them; nothing here touches a socket. NBD specification: "Simple
//! reply message", "Structured reply chunk message".

use crate::nbd::handshake::Agreed;
use crate::nbd::wire::{self, Request};

/// An extended chunk's head, and what may follow it.
const LONGEST: usize = wire::EXTENDED_CHUNK_LENGTH + 8;

/// The bytes of a reply before its data.
pub(super) struct ReplyHead {
    bytes: [u8; LONGEST],
    length: usize,
}

impl ReplyHead {
    fn new(parts: &[&[u8]]) -> Self {
        let mut head = Self { bytes: [0; LONGEST], length: 0 };
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
        let offset_data = wire::offset_data(offset);
        let payload = (length + offset_data.len()) as u64;
        Self::chunk(agreed, request, last, wire::REPLY_TYPE_OFFSET_DATA, payload, &offset_data)
    }

    /// A chunk whose payload of `length` bytes begins with `front`.
    pub(super) fn chunk(agreed: Agreed, request: &Request, last: bool, kind: u16, length: u64, front: &[u8]) -> Self {
        let flags = if last { wire::REPLY_FLAG_DONE } else { 0 };
        if agreed.extended {
            return Self::new(&[&wire::extended_chunk(flags, kind, request.cookie, request.offset, length), front]);
        }
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        Self::new(&[&wire::structured_chunk(flags, kind, request.cookie, length), front])
    }

    /// Without data: success, or an error. A READ or BLOCK_STATUS of a client that agreed on structured replies is
    /// never answered with a simple one, and nothing is after extended headers.
    pub(super) fn for_result(agreed: Agreed, request: &Request, error: u32) -> Self {
        let structured = agreed.structured && matches!(request.command, wire::CMD_READ | wire::CMD_BLOCK_STATUS);
        if !structured && !agreed.extended {
            return Self::new(&[&wire::simple_reply(error, request.cookie)]);
        }
        if error == 0 {
            return Self::chunk(agreed, request, true, wire::REPLY_TYPE_NONE, 0, &[]);
        }
        let error = wire::error_chunk(error, 0);
        Self::chunk(agreed, request, true, wire::REPLY_TYPE_ERROR, error.len() as u64, &error)
    }
}
