//! One control connection: messages in, messages out, on a socket or on a virtio port.
//!
//! Used by both ends. A link is driven by one thread; a socket is shared so that another can shut it down.

use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::frame::{self, Assembler, DELIMITER, FrameError, Message};
use crate::control::port::Port;
use crate::limits::{CONTROL_FRAME_MAX, PASSENGERS_MAX};
use crate::socket::Socket;

/// Descriptors that are passed on with a message.
pub type Passengers = heapless::Vec<OwnedFd, PASSENGERS_MAX>;

/// A connection that carries messages.
#[derive(Debug)]
pub struct Link {
    way: Way,
    inbox: Assembler,
    outbox: Box<[u8; CONTROL_FRAME_MAX]>,
    /// What of the outbox has not left yet.
    unsent: Range<usize>,
    /// The descriptors that came last and were not taken.
    passed: Passengers,
}

/// What carries the bytes.
#[derive(Debug)]
enum Way {
    Socket(Arc<Socket>),
    Port(Port),
}

impl Link {
    /// A link over a fresh connection.
    #[must_use]
    pub fn new(socket: Arc<Socket>) -> Self {
        Self::over(Way::Socket(socket))
    }

    /// A link over a virtio port; it outlives whoever comes and goes at the host's end.
    #[must_use]
    pub fn over_port(port: Port) -> Self {
        Self::over(Way::Port(port))
    }

    fn over(way: Way) -> Self {
        Self {
            way,
            inbox: Assembler::default(),
            outbox: Box::new([0; CONTROL_FRAME_MAX]),
            unsent: 0..0,
            passed: Passengers::new(),
        }
    }

    /// Whether this is a byte pipe: nothing says where one client ends and the next begins.
    #[must_use]
    pub fn is_pipe(&self) -> bool {
        matches!(self.way, Way::Port(_))
    }

    /// The next message; `None` when the peer has closed between two messages, or the host's end of a port is closed.
    /// Without a deadline it waits until the socket is shut down or the port's host end closes.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::UnexpectedEof`] inside a frame, [`ErrorKind::InvalidData`] around a
    /// [`FrameError`], or the error of socket or port.
    pub fn receive<T: Message>(&mut self, deadline: Option<Instant>) -> Result<Option<T>> {
        loop {
            if let Some(message) = self.inbox.take().map_err(|e| Error::new(ErrorKind::InvalidData, e))? {
                return Ok(Some(message));
            }
            match self.way.recv_nowait(self.inbox.space(), &mut self.passed)? {
                Some(0) if self.is_pipe() => {
                    // All that came later comes from the next one.
                    self.inbox.clear();
                    return Ok(None);
                }
                Some(0) if self.inbox.is_inside() => return Err(ErrorKind::UnexpectedEof.into()),
                Some(0) => return Ok(None),
                Some(count) => self.inbox.received(count),
                None => {
                    let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    self.way.wait(true, false, left)?;
                }
            }
        }
    }

    /// Sends a message, and passes descriptors on with it: only a Unix socket can.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn send_with<T: Message>(&mut self, message: &T, passed: &[BorrowedFd<'_>], deadline: Instant) -> Result<()> {
        let length = self.load(message)?;
        let Way::Socket(socket) = &self.way else { return Err(ErrorKind::Unsupported.into()) };
        if !socket.is_unix() {
            return Err(ErrorKind::Unsupported.into());
        }
        // With the first of its bytes.
        let sent = socket.send_passing(&self.outbox[..length], passed)?;
        self.way.send_all(&self.outbox[sent..length], deadline)
    }

    /// The descriptors that came with the last message.
    pub fn take_passed(&mut self) -> Passengers {
        std::mem::take(&mut self.passed)
    }

    /// Sends a message that is not part of what went on before. Of an earlier message that has left in part the rest
    /// is dropped; the delimiter in front keeps the two apart.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn send_first<T: Message>(&mut self, message: &T, deadline: Instant) -> Result<()> {
        self.unsent = 0..0;
        self.way.send_all(&[DELIMITER], deadline)?;
        self.send(message, deadline)
    }

    /// Sends a message whole, after what [`Link::offer`] has left.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::BrokenPipe`] when the host's end of a port is closed, or the error of
    /// socket or port.
    pub fn send<T: Message>(&mut self, message: &T, deadline: Instant) -> Result<()> {
        let rest = self.way.send_all(&self.outbox[self.unsent.clone()], deadline);
        self.unsent = 0..0;
        rest?;
        let length = self.load(message)?;
        self.way.send_all(&self.outbox[..length], deadline)
    }

    /// Sends a message as far as the peer takes it at once. When it has not taken the one before, this one is
    /// dropped: for news that the next ones replace.
    ///
    /// # Errors
    /// The error of socket or port.
    pub fn offer<T: Message>(&mut self, message: &T) -> Result<()> {
        self.push()?;
        if self.unsent.is_empty() {
            self.unsent = 0..self.load(message)?;
            self.push()?;
        }
        Ok(())
    }

    /// The socket, for who speaks something else on it from now on; `None` on a port.
    #[must_use]
    pub fn socket(&self) -> Option<&Arc<Socket>> {
        match &self.way {
            Way::Socket(socket) => Some(socket),
            Way::Port(_) => None,
        }
    }

    /// What has come behind the last message.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        self.inbox.rest()
    }

    /// Whether the peer has gone (or has said that it sends no more).
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        match &self.way {
            Way::Socket(socket) => socket.has_hung_up(),
            Way::Port(port) => port.is_closed(),
        }
    }

    fn load<T: Message>(&mut self, message: &T) -> Result<usize> {
        frame::encode(message, &mut self.outbox).map_err(|e| Error::new(ErrorKind::InvalidInput, e))
    }

    fn push(&mut self) -> Result<()> {
        while !self.unsent.is_empty() {
            match self.way.send_nowait(&self.outbox[self.unsent.clone()])? {
                Some(count) => self.unsent.start += count,
                None => break,
            }
        }
        Ok(())
    }
}

impl Way {
    fn recv_nowait(&self, buffer: &mut [u8], passed: &mut Passengers) -> Result<Option<usize>> {
        match self {
            Self::Socket(socket) => socket.recv_nowait_passed(buffer, passed),
            Self::Port(port) => port.recv_nowait(buffer),
        }
    }

    fn send_nowait(&self, bytes: &[u8]) -> Result<Option<usize>> {
        match self {
            Self::Socket(socket) => socket.send_nowait(bytes, &[]),
            Self::Port(port) => port.send_nowait(bytes),
        }
    }

    fn wait(&self, read: bool, write: bool, timeout: Option<Duration>) -> Result<()> {
        match self {
            Self::Socket(socket) => socket.wait(read, write, timeout).map(drop),
            Self::Port(port) => port.wait(read, write, timeout),
        }
    }

    fn send_all(&self, bytes: &[u8], deadline: Instant) -> Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.send_nowait(&bytes[sent..])? {
                Some(count) => sent += count,
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    self.wait(false, true, Some(left))?;
                }
            }
        }
        Ok(())
    }
}

/// The frame that an error of [`Link::receive`] is about: not one that this version can read.
#[must_use]
pub fn frame_error(error: &Error) -> Option<FrameError> {
    error.get_ref().and_then(|e| e.downcast_ref()).copied()
}

/// Whether an error of [`Link::receive`] is a whole frame that this version cannot read: worth an answer.
#[must_use]
pub fn is_unknown(error: &Error) -> bool {
    frame_error(error) == Some(FrameError::Unknown)
}
