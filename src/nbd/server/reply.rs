//! The bytes of a reply before its data: simple, structured or extended, as it was agreed.
//!
//! The connection's own thread and the workers send them; nothing here touches a socket. NBD specification: "Simple
//! reply message", "Structured reply chunk message".

use crate::nbd::handshake::Agreed;
use crate::nbd::wire::{self, Request};

/// An extended chunk's head, and what may follow it.
const LONGEST: usize = wire::EXTENDED_CHUNK_LENGTH + 6 + TEXT_MAX;
/// Longest text of an error, in bytes.
const TEXT_MAX: usize = 64;

/// What a client's user is told about an error.
fn text(error: u32) -> &'static str {
    match error {
        wire::EPERM => "this disk may not be written here",
        wire::EIO => "the disk has failed",
        wire::ENOMEM => "no memory",
        wire::ENOSPC => "no space is left, or the range is beyond the end",
        wire::EOVERFLOW => "more than one reply may carry",
        wire::ENOTSUP => "it would not be fast",
        wire::ESHUTDOWN => "another host owns this disk, or nothing is received",
        _ => "the request is invalid",
    }
}

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

    /// Without data: success, or an error, which has words where replies are structured. A success is as short as it
    /// was agreed: only a READ or BLOCK_STATUS must not be answered with a simple reply, and nothing after extended
    /// headers.
    pub(super) fn for_result(agreed: Agreed, request: &Request, error: u32) -> Self {
        let data = matches!(request.command, wire::CMD_READ | wire::CMD_BLOCK_STATUS);
        let structured = agreed.structured && (data || error != 0);
        if !structured && !agreed.extended {
            return Self::new(&[&wire::simple_reply(error, request.cookie)]);
        }
        if error == 0 {
            return Self::chunk(agreed, request, true, wire::REPLY_TYPE_NONE, 0, &[]);
        }
        let text = text(error).as_bytes();
        let mut chunk: heapless::Vec<u8, { 6 + TEXT_MAX }> = heapless::Vec::new();
        // No text is longer than there is room for.
        let _ = chunk.extend_from_slice(&wire::error_chunk(error, u16::try_from(text.len()).unwrap_or(0)));
        let _ = chunk.extend_from_slice(text);
        Self::chunk(agreed, request, true, wire::REPLY_TYPE_ERROR, chunk.len() as u64, &chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_words_where_replies_are_structured() {
        let request = Request { flags: 0, command: wire::CMD_WRITE, cookie: 7, offset: 512, length: 512 };
        let mut agreed = Agreed { structured: false, extended: false, base_allocation: false };
        assert_eq!(ReplyHead::for_result(agreed, &request, wire::EIO).bytes(), wire::simple_reply(wire::EIO, 7));
        agreed.structured = true;
        assert_eq!(ReplyHead::for_result(agreed, &request, 0).bytes(), wire::simple_reply(0, 7));
        for error in 1..=u32::from(u8::MAX) {
            let head = ReplyHead::for_result(agreed, &request, error);
            let text = text(error);
            assert!(text.len() <= TEXT_MAX, "{text}");
            let expected = wire::error_chunk(error, u16::try_from(text.len()).unwrap_or(0));
            assert_eq!(head.bytes()[wire::CHUNK_LENGTH..], [&expected[..], text.as_bytes()].concat());
        }
        agreed.extended = true;
        let head = ReplyHead::for_result(agreed, &request, wire::EIO);
        assert_eq!(head.bytes()[wire::EXTENDED_CHUNK_LENGTH..][..6], wire::error_chunk(wire::EIO, 19));
        assert_eq!(ReplyHead::for_result(agreed, &request, 0).bytes(), wire::extended_chunk(1, 0, 7, 512, 0));
    }
}
