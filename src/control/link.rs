//! One control connection: messages in, messages out, on a socket.
//!
//! Used by both ends. A link is driven by one thread; the socket is shared so that another can shut it down.

use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::frame::{self, Assembler, FrameError};
use crate::limits::CONTROL_FRAME_MAX;
use crate::socket::Socket;

/// A connection that carries messages.
#[derive(Debug)]
pub struct Link {
    socket: Arc<Socket>,
    inbox: Assembler,
    outbox: Box<[u8; CONTROL_FRAME_MAX]>,
    /// What of the outbox has not left yet.
    unsent: std::ops::Range<usize>,
}

impl Link {
    /// A link over a fresh connection.
    #[must_use]
    pub fn new(socket: Arc<Socket>) -> Self {
        Self { socket, inbox: Assembler::default(), outbox: Box::new([0; CONTROL_FRAME_MAX]), unsent: 0..0 }
    }

    /// The next message; `None` when the peer has closed between two messages. Without a deadline it waits until the
    /// socket is shut down.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], [`ErrorKind::UnexpectedEof`] inside a frame, [`ErrorKind::InvalidData`] around a
    /// [`FrameError`], or the socket's error.
    pub fn receive<T: DeserializeOwned>(&mut self, deadline: Option<Instant>) -> Result<Option<T>> {
        loop {
            if let Some(message) = self.inbox.take().map_err(|e| Error::new(ErrorKind::InvalidData, e))? {
                return Ok(Some(message));
            }
            match self.socket.recv_nowait(self.inbox.space())? {
                Some(0) if self.inbox.is_inside() => return Err(ErrorKind::UnexpectedEof.into()),
                Some(0) => return Ok(None),
                Some(count) => self.inbox.received(count),
                None => {
                    let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    self.socket.wait(true, false, left)?;
                }
            }
        }
    }

    /// Sends a message whole, after what [`Link::offer`] has left.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], or the socket's error.
    pub fn send<T: Serialize>(&mut self, message: &T, deadline: Instant) -> Result<()> {
        self.socket.send_all_before(&self.outbox[self.unsent.clone()], deadline)?;
        self.load(message)?;
        self.socket.send_all_before(&self.outbox[self.unsent.clone()], deadline)?;
        self.unsent = 0..0;
        Ok(())
    }

    /// Sends a message as far as the peer takes it at once. When it has not taken the one before, this one is
    /// dropped: for news that the next ones replace.
    ///
    /// # Errors
    /// The socket's error.
    pub fn offer<T: Serialize>(&mut self, message: &T) -> Result<()> {
        self.push()?;
        if self.unsent.is_empty() {
            self.load(message)?;
            self.push()?;
        }
        Ok(())
    }

    /// Whether the peer has gone (or has said that it sends no more).
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        self.socket.has_hung_up()
    }

    fn load<T: Serialize>(&mut self, message: &T) -> Result<()> {
        let length = frame::encode(message, &mut self.outbox).map_err(|e| Error::new(ErrorKind::InvalidInput, e))?;
        self.unsent = 0..length;
        Ok(())
    }

    fn push(&mut self) -> Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.send_nowait(&self.outbox[self.unsent.clone()], &[])? {
                Some(count) => self.unsent.start += count,
                None => break,
            }
        }
        Ok(())
    }
}

/// Whether an error of [`Link::receive`] is a whole frame that this version cannot read: worth an answer.
#[must_use]
pub fn is_unknown(error: &Error) -> bool {
    error.get_ref().and_then(|e| e.downcast_ref()) == Some(&FrameError::Unknown)
}
