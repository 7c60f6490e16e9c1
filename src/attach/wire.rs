//! The bytes between this process and the kernel's nbd driver: generic netlink, family `nbd`.
//!
//! Pure: builds requests and takes answers apart; `netlink.rs` sends and receives them. Numbers are the host's own, as
//! everywhere in netlink. What is here follows the kernel's `linux/netlink.h`, `linux/genetlink.h` and
//! `linux/nbd-netlink.h`; what a kernel is too old to know, it skips. No answer, however broken, panics.

use heapless::Vec;

use crate::limits::NETLINK_REQUEST_MAX;

/// The controller, who knows the numbers of all families.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// The version of the controller's and of nbd's messages.
const VERSION: u8 = 1;
/// The driver's family.
const FAMILY: &str = "nbd";

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Length, type, flags, sequence number, port: `struct nlmsghdr`; then command, version, reserved: `struct genlmsghdr`.
const MESSAGE_HEAD: usize = 16;
const GENERIC_HEAD: usize = 4;
/// Length and type: `struct nlattr`.
const ATTRIBUTE_HEAD: usize = 4;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// Everything begins at a multiple of this.
const ALIGN: usize = 4;

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_CMD_STATUS: u8 = 5;

const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_CLIENT_FLAGS: u16 = 6;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_DEVICE_LIST: u16 = 9;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;
const NBD_DEVICE_ITEM: u16 = 1;
const NBD_DEVICE_INDEX: u16 = 1;
const NBD_DEVICE_CONNECTED: u16 = 2;

/// What a device is connected with. There is one socket (D11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection<'a> {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// The disk's size.
    pub size_bytes: u64,
    /// What the device calls a sector, in bytes.
    pub block_bytes: u64,
    /// The export's transmission flags, as far as the driver is to use them.
    pub flags: u64,
    /// How long requests are kept while the connection is dead, in seconds.
    pub dead_s: u64,
    /// The kernel's end of the connection.
    pub socket: u32,
    /// Names the disk in `/sys/block/nbdN/backend`; whoever connects the device anew must say the same.
    pub backend: &'a str,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    bytes: Vec<u8, NETLINK_REQUEST_MAX>,
    /// It did not fit.
    is_cut: bool,
}

impl Request {
    /// Asks the controller for the number of the family `nbd`.
    #[must_use]
    pub fn family(sequence: u32) -> Self {
        let mut request = Self::new(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, sequence);
        request.text(CTRL_ATTR_FAMILY_NAME, FAMILY);
        request.finish()
    }

    /// Connects a device that is free. No time-out is asked for: a request may wait for as long as a switchover and a
    /// restart take, and one that timed out would be sent again.
    #[must_use]
    pub fn connect(family: u16, sequence: u32, connection: &Connection<'_>) -> Self {
        let mut request = Self::new(family, NBD_CMD_CONNECT, sequence);
        request.number(NBD_ATTR_INDEX, &connection.index.to_ne_bytes());
        request.number(NBD_ATTR_SIZE_BYTES, &connection.size_bytes.to_ne_bytes());
        request.number(NBD_ATTR_BLOCK_SIZE_BYTES, &connection.block_bytes.to_ne_bytes());
        request.number(NBD_ATTR_TIMEOUT, &0_u64.to_ne_bytes());
        request.number(NBD_ATTR_SERVER_FLAGS, &connection.flags.to_ne_bytes());
        request.number(NBD_ATTR_CLIENT_FLAGS, &0_u64.to_ne_bytes());
        request.number(NBD_ATTR_DEAD_CONN_TIMEOUT, &connection.dead_s.to_ne_bytes());
        request.socket(connection.socket);
        request.text(NBD_ATTR_BACKEND_IDENTIFIER, connection.backend);
        request.finish()
    }

    /// Gives a device whose connection is dead a new one. If it is not dead yet, the kernel takes nothing and says
    /// that all is well.
    #[must_use]
    pub fn reconnect(family: u16, sequence: u32, index: u32, socket: u32, backend: &str) -> Self {
        let mut request = Self::new(family, NBD_CMD_RECONFIGURE, sequence);
        request.number(NBD_ATTR_INDEX, &index.to_ne_bytes());
        request.socket(socket);
        request.text(NBD_ATTR_BACKEND_IDENTIFIER, backend);
        request.finish()
    }

    /// Ends a device's connection. Its requests fail from then on.
    #[must_use]
    pub fn disconnect(family: u16, sequence: u32, index: u32) -> Self {
        let mut request = Self::new(family, NBD_CMD_DISCONNECT, sequence);
        request.number(NBD_ATTR_INDEX, &index.to_ne_bytes());
        request.finish()
    }

    /// Asks whether a device is in use.
    #[must_use]
    pub fn status(family: u16, sequence: u32, index: u32) -> Self {
        let mut request = Self::new(family, NBD_CMD_STATUS, sequence);
        request.number(NBD_ATTR_INDEX, &index.to_ne_bytes());
        request.finish()
    }

    /// The bytes to send; `None`: the backend's name is too long.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        (!self.is_cut).then_some(&self.bytes)
    }

    fn new(kind: u16, command: u8, sequence: u32) -> Self {
        let mut request = Self { bytes: Vec::new(), is_cut: false };
        // The length is known at the end, the port is the kernel's.
        request.put(&0_u32.to_ne_bytes());
        request.put(&kind.to_ne_bytes());
        request.put(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        request.put(&sequence.to_ne_bytes());
        request.put(&0_u32.to_ne_bytes());
        request.put(&[command, VERSION, 0, 0]);
        request
    }

    fn finish(mut self) -> Self {
        // No longer than NETLINK_REQUEST_MAX.
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX).to_ne_bytes();
        self.bytes[..length.len()].copy_from_slice(&length);
        self
    }

    fn put(&mut self, bytes: &[u8]) {
        self.is_cut |= self.bytes.extend_from_slice(bytes).is_err();
    }

    /// An attribute, with the zeroes that fill it up.
    fn attribute(&mut self, kind: u16, parts: &[&[u8]]) {
        let length = ATTRIBUTE_HEAD + parts.iter().map(|part| part.len()).sum::<usize>();
        self.put(&u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        parts.iter().for_each(|part| self.put(part));
        self.put(&[0; ALIGN][..length.next_multiple_of(ALIGN) - length]);
    }

    fn number(&mut self, kind: u16, bytes: &[u8]) {
        self.attribute(kind, &[bytes]);
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, &[text.as_bytes(), &[0]]);
    }

    /// The list of sockets, with one in it.
    fn socket(&mut self, socket: u32) {
        let mut item = Self { bytes: Vec::new(), is_cut: false };
        item.number(NBD_SOCK_FD, &socket.to_ne_bytes());
        let mut list = Self { bytes: Vec::new(), is_cut: false };
        list.attribute(NBD_SOCK_ITEM | NLA_F_NESTED, &[&item.bytes]);
        self.attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, &[&list.bytes]);
    }
}

/// One message of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The request was done, or this is why not: an error number, 0 for none.
    Ended {
        /// Of the request.
        sequence: u32,
        /// As in `errno.h`.
        error: i32,
    },
    /// What was asked for.
    Content {
        /// Of the request.
        sequence: u32,
        /// The attributes, to be looked into by the functions below.
        attributes: &'a [u8],
    },
    /// Something else: nobody asked for it.
    Other,
}

/// Takes what one receive brought apart, message by message. Ends at the first one that is not whole.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let message = bytes.get(..length)?;
        bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        let kind = u16_at(message, 4)?;
        let sequence = u32_at(message, 8)?;
        let body = message.get(MESSAGE_HEAD..)?;
        Some(match kind {
            NLMSG_ERROR => {
                let error = i32::from_ne_bytes(body.first_chunk().copied()?);
                Answer::Ended { sequence, error: error.checked_neg().unwrap_or(i32::MAX) }
            }
            // The numbers below the controller's are netlink's own.
            GENL_ID_CTRL.. => match body.get(GENERIC_HEAD..) {
                Some(attributes) => Answer::Content { sequence, attributes },
                None => Answer::Other,
            },
            _ => Answer::Other,
        })
    })
}

/// The family's number in an answer to [`Request::family`].
#[must_use]
pub fn family_in(attributes: &[u8]) -> Option<u16> {
    u16_at(find(attributes, CTRL_ATTR_FAMILY_ID)?, 0)
}

/// Whether the device is in use, in an answer to [`Request::status`]; `None`: there is no such device.
#[must_use]
pub fn connected_in(attributes: &[u8], index: u32) -> Option<bool> {
    let list = find(attributes, NBD_ATTR_DEVICE_LIST)?;
    let item = find(list, NBD_DEVICE_ITEM)?;
    if u32_at(find(item, NBD_DEVICE_INDEX)?, 0)? != index {
        return None;
    }
    Some(*find(item, NBD_DEVICE_CONNECTED)?.first()? != 0)
}

/// What the first attribute of that kind holds.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(attributes, 0)?);
        let found = u16_at(attributes, 2)? & NLA_TYPE_MASK;
        let held = attributes.get(ATTRIBUTE_HEAD..length)?;
        if found == kind {
            return Some(held);
        }
        attributes = attributes.get(length.next_multiple_of(ALIGN)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests;
