//! The netlink socket: says one thing to the kernel's nbd driver and waits for its answer.
//!
//! Called by `attach.rs`. A [`Netlink`] is opened for a few requests and dropped again; nothing listens in between. The
//! kernel does what it is told before the request has left, so a lost answer is no question of time. This file knows
//! neither guests nor disks.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::wire::{Answer, Connection, Request, answers, connected_in, family_in};
use crate::limits::{NETLINK_ANSWER_MAX, NETLINK_TIMEOUT};

/// A socket to the nbd driver.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Netlink {
    /// Finds the driver.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]: the kernel has none (yet); else the system's error.
    pub(super) fn open() -> Result<Self> {
        let family = AddressFamily::NETLINK;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::RAW, flags, Some(netlink::GENERIC))?;
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(NETLINK_TIMEOUT))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut opened = Self { socket, family: 0, sequence: 0 };
        let request = Request::family(opened.next());
        opened.family = opened.ask(&request, family_in)?.ok_or(ErrorKind::NotFound)?;
        Ok(opened)
    }

    /// Connects a free device; `socket` is the kernel's from then on, the caller's copy may be dropped.
    ///
    /// # Errors
    /// [`Errno::BUSY`]: it is in use. [`Errno::PERM`]: only root may. Else the system's error.
    pub(super) fn connect(&mut self, connection: &Connection<'_>) -> Result<()> {
        let request = Request::connect(self.family, self.next(), connection);
        self.ask(&request, |_| Some(())).map(drop)
    }

    /// Gives a device whose connection is dead a new one. Succeeds also where the kernel has not noticed yet that it is
    /// dead, and did not take the socket.
    ///
    /// # Errors
    /// The device has been disconnected, or is another's; else the system's error.
    pub(super) fn reconnect(&mut self, index: u32, socket: impl AsFd, backend: &str) -> Result<()> {
        let request = Request::reconnect(self.family, self.next(), index, number(socket)?, backend);
        self.ask(&request, |_| Some(())).map(drop)
    }

    /// Ends a device's connection; ending it again does no harm.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn disconnect(&mut self, index: u32) -> Result<()> {
        let request = Request::disconnect(self.family, self.next(), index);
        self.ask(&request, |_| Some(())).map(drop)
    }

    /// Whether a device is connected, or held open by somebody.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn is_in_use(&mut self, index: u32) -> Result<bool> {
        let request = Request::status(self.family, self.next(), index);
        Ok(self.ask(&request, |attributes| connected_in(attributes, index))?.unwrap_or(false))
    }

    fn next(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    /// Sends a request and waits until the kernel says that it has ended; what `read` finds in the answers.
    fn ask<T>(&self, request: &Request, read: impl Fn(&[u8]) -> Option<T>) -> Result<Option<T>> {
        let bytes = request.bytes().ok_or(ErrorKind::InvalidInput)?;
        rustix::net::send(&self.socket, bytes, SendFlags::empty())?;
        let mut found = None;
        let mut buffer = [0; NETLINK_ANSWER_MAX];
        loop {
            let length = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(Error::from(ErrorKind::TimedOut)),
                Err(error) => return Err(error.into()),
            };
            for answer in answers(&buffer[..length]) {
                match answer {
                    Answer::Ended { sequence, error: 0 } if sequence == self.sequence => return Ok(found),
                    Answer::Ended { sequence, error } if sequence == self.sequence => {
                        return Err(Error::from_raw_os_error(error));
                    }
                    Answer::Content { sequence, attributes } if sequence == self.sequence => {
                        found = found.or(read(attributes));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The number of a descriptor: the kernel looks it up in the process that sends.
pub(super) fn number(socket: impl AsFd) -> Result<u32> {
    u32::try_from(socket.as_fd().as_raw_fd()).map_err(|_| Error::from(ErrorKind::InvalidInput))
}
