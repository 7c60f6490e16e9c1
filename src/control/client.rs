//! The command line's end of the control door.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Instant;

use crate::address::Address;
use crate::control::link::Link;
use crate::control::wire::{Reply, Request, VERSION};
use crate::error::{Problem, reason};
use crate::limits::{CONNECT_TIMEOUT, CONTROL_REPLY_TIMEOUT, CONTROL_SEND_TIMEOUT};
use crate::socket::Socket;

/// A connection to the process that serves a guest.
#[derive(Debug)]
pub struct Client {
    link: Link,
    operation: &'static str,
    guest: String,
}

impl Client {
    /// Connects to the guest's control door; `operation` names the command in problems.
    ///
    /// # Errors
    /// Nobody serves the guest there, or somebody else is.
    pub fn connect(operation: &'static str, guest: &str, door: &Address) -> Result<Self, Problem> {
        let socket = door.connect(CONNECT_TIMEOUT).map_err(|e| {
            let cause = match e.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    format!("nobody serves it on this host ({door}: {})", reason(&e))
                }
                _ => format!("{door}: {}", reason(&e)),
            };
            Problem::refused(operation, guest, cause)
        })?;
        Self::greet(operation, guest, socket)
    }

    /// Says hello on a fresh connection.
    ///
    /// # Errors
    /// It is no control door, of another version, or of another guest.
    pub fn greet(operation: &'static str, guest: &str, socket: Socket) -> Result<Self, Problem> {
        let mut client = Self { link: Link::new(Arc::new(socket)), operation, guest: guest.to_owned() };
        match client.ask(&Request::Hello { version: VERSION })? {
            Reply::Hello { guest: served, .. } if served == guest => Ok(client),
            Reply::Hello { guest: served, .. } => Err(client.refused(format!("that door is of guest {served}"))),
            _ => Err(client.refused("that door is no control door")),
        }
    }

    /// Sends a request and waits for its reply. A refusal comes back as the problem it is.
    ///
    /// # Errors
    /// The refusal, or the connection's end: then it is not known whether the request was done.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Problem> {
        match self.link.send(request, Instant::now() + CONTROL_SEND_TIMEOUT) {
            // A process that refuses and closes at once breaks the sending; what it said is still there to be read.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(self.lost(&reason(&e))),
            _ => self.receive(Some(Instant::now() + CONTROL_REPLY_TIMEOUT)),
        }
    }

    /// Sends a request that is answered by [`Reply::Ok`].
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn tell(&mut self, request: &Request) -> Result<(), Problem> {
        match self.ask(request)? {
            Reply::Ok => Ok(()),
            _ => Err(self.lost("the process gave an answer to another question")),
        }
    }

    /// Sends a request whose one reply may take as long as it likes.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn ask_patiently(&mut self, request: &Request) -> Result<Reply, Problem> {
        self.link.send(request, Instant::now() + CONTROL_SEND_TIMEOUT).map_err(|e| self.lost(&reason(&e)))?;
        self.receive(None)
    }

    /// Waits for the next reply to a request that has several.
    ///
    /// # Errors
    /// The refusal, or the connection's end.
    pub fn next_reply(&mut self) -> Result<Reply, Problem> {
        self.receive(None)
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<Reply, Problem> {
        match self.link.receive(deadline) {
            Ok(Some(Reply::Refused(refusal))) => Err(refusal.into()),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.lost("the process closed the connection")),
            Err(e) if e.kind() == ErrorKind::TimedOut => Err(self.lost("the process does not answer")),
            Err(e) => Err(self.lost(&reason(&e))),
        }
    }

    fn refused(&self, cause: impl std::fmt::Display) -> Problem {
        Problem::refused(self.operation, &self.guest, cause)
    }

    fn lost(&self, cause: &str) -> Problem {
        let cause = format!("{cause}; ask it again: blockferry status {}", self.guest);
        Problem::unknown(self.operation, &self.guest, cause)
    }
}
