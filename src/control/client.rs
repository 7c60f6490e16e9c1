//! The command line's end of the control door.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::address::Address;
use crate::control::link::{Link, frame_error};
use crate::control::wire::{GuestName, Reply, Request, VERSION};
use crate::error::{Problem, is_nobody, reason};
use crate::limits::{CONNECT_TIMEOUT, CONTROL_REPLY_TIMEOUT, CONTROL_SEND_TIMEOUT, HELLO_REPEAT, HELLO_TIMEOUT};
use crate::socket::Socket;

/// A connection to the process that serves a guest.
#[derive(Debug)]
pub struct Client {
    link: Link,
    operation: &'static str,
    guest: String,
    /// The number of our hello.
    session: u32,
}

impl Client {
    /// Connects to the guest's control door; `operation` names the command in problems.
    ///
    /// # Errors
    /// Nobody serves the guest there, or somebody else is.
    pub fn connect(operation: &'static str, guest: &str, door: &Address) -> Result<Self, Problem> {
        let socket = door.connect(CONNECT_TIMEOUT).map_err(|e| {
            let cause = format!("{door}: {}", reason(&e));
            let cause = if is_nobody(&e) { format!("nobody serves it on this host ({cause})") } else { cause };
            Problem::refused(operation, guest, cause)
        })?;
        Self::greet(operation, guest, socket)
    }

    /// Says hello on a fresh connection. At its other end may be a byte pipe (QEMU's socket for a virtio port): what
    /// was meant for somebody before us is passed over.
    ///
    /// # Errors
    /// It is no control door, of another version, or of another guest.
    pub fn greet(operation: &'static str, guest: &str, socket: Socket) -> Result<Self, Problem> {
        let mut client = Self { link: Link::new(Arc::new(socket)), operation, guest: guest.to_owned(), session: 0 };
        let mut session = [0; size_of::<u32>()];
        getrandom::fill(&mut session).map_err(|e| client.refused(e))?;
        client.session = u32::from_le_bytes(session);
        match client.hello()? {
            (version, _) if version != VERSION => Err(client.refused(format!(
                "the command speaks version {VERSION} of the control protocol, the running process version {version}"
            ))),
            (_, served) if served != guest => Err(client.refused(format!("that door is of guest {served}"))),
            _ => Ok(client),
        }
    }

    /// Exchanges hellos: the other end's version, and the guest that it serves. Ours is said again and again until it
    /// is answered: a virtio port whose host end opened a moment ago may be closed in the eyes of the process still,
    /// and then its answer goes nowhere.
    fn hello(&mut self) -> Result<(u16, GuestName), Problem> {
        let deadline = Instant::now() + HELLO_TIMEOUT;
        // The last thing that was no answer to us, should none come.
        let mut other: Option<Problem> = None;
        let end = loop {
            let again = deadline.min(Instant::now() + HELLO_REPEAT);
            let hello = Request::Hello { version: VERSION, session: self.session };
            match self.link.send_first(&hello, deadline) {
                // A process that refuses and closes at once breaks the sending; what it said is still there to be read.
                Err(e) if e.kind() != ErrorKind::BrokenPipe => break reason(&e),
                _ => {}
            }
            match self.hello_reply(again, &mut other) {
                Ok(Some(heard)) => return Ok(heard),
                Ok(None) => break "the process closed the connection".to_owned(),
                Err(e) if e.kind() != ErrorKind::TimedOut => break reason(&e),
                Err(_) if again < deadline => {}
                Err(_) => break "the process does not answer".to_owned(),
            }
        };
        Err(other.unwrap_or_else(|| self.refused(end)))
    }

    /// Waits for the answer to our hello; what else comes is passed over, and the last problem among it kept. `None`
    /// is the connection's end.
    fn hello_reply(
        &mut self,
        deadline: Instant,
        other: &mut Option<Problem>,
    ) -> std::io::Result<Option<(u16, GuestName)>> {
        loop {
            match self.link.receive(Some(deadline)) {
                Ok(Some(Reply::Hello { version, guest, session })) if session == self.session => {
                    return Ok(Some((version, guest)));
                }
                Ok(Some(Reply::Refused(refusal))) => *other = Some(refusal.into()),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(e) if frame_error(&e).is_some() => {
                    *other = Some(self.refused(format!("that door is no control door: {e}")));
                }
                Err(e) => return Err(e),
            }
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

    /// As [`Client::tell`], and passes descriptors on with the request.
    ///
    /// # Errors
    /// As there; also when this door is no Unix socket.
    pub fn tell_passing(&mut self, request: &Request, passed: &[BorrowedFd<'_>]) -> Result<(), Problem> {
        match self.link.send_with(request, passed, Instant::now() + CONTROL_SEND_TIMEOUT) {
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                return Err(self.refused("a descriptor can be passed on over a Unix socket only"));
            }
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return Err(self.lost(&reason(&e))),
            _ => {}
        }
        match self.receive(Some(Instant::now() + CONTROL_REPLY_TIMEOUT))? {
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
        self.receive(Some(Instant::now() + CONTROL_REPLY_TIMEOUT))
    }

    /// The next reply; that to a hello which we had to repeat is none to what was asked later.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Reply, Problem> {
        loop {
            return match self.link.receive(deadline) {
                Ok(Some(Reply::Hello { session, .. })) if session == self.session => continue,
                Ok(Some(Reply::Refused(refusal))) => Err(refusal.into()),
                Ok(Some(reply)) => Ok(reply),
                Ok(None) => Err(self.lost("the process closed the connection")),
                Err(e) if e.kind() == ErrorKind::TimedOut => Err(self.lost("the process does not answer")),
                Err(e) => Err(self.lost(&reason(&e))),
            };
        }
    }

    /// The connection, once the process has said that it is none of the control door any more, and what it has said
    /// since.
    #[must_use]
    pub fn into_socket(self) -> Option<(Arc<Socket>, Vec<u8>)> {
        self.link.socket().map(|socket| (Arc::clone(socket), self.link.rest().to_vec()))
    }

    fn refused(&self, cause: impl std::fmt::Display) -> Problem {
        Problem::refused(self.operation, &self.guest, cause)
    }

    fn lost(&self, cause: &str) -> Problem {
        let cause = format!("{cause}; ask it again: blockferry status {}", self.guest);
        Problem::unknown(self.operation, &self.guest, cause)
    }
}
