//! One phase connection: hellos, then messages, over a [`Socket`] or, on the stream path, through a [`Trunk`].
//!
//! The source and the destination each hold one. It bounds every wait by the caller's deadline, reads exactly what it
//! needs (so that the stream path can put blocks between messages), allocates its two buffers once, and never
//! reconnects: that is the source's business. After an error it is of no more use and says the same again.

use std::fmt;
use std::io::{ErrorKind, Result as IoResult};
use std::sync::Arc;
use std::time::Instant;

use super::wire::{
    FRAME_HEAD, FrameError, HELLO_LENGTH, Hello, HelloError, Message, VERSION_HIGHEST, VERSION_LOWEST, choose_version,
    frame_length,
};
use crate::command::Command;
use crate::limits::{COMMAND_LAST_WORDS, FRAME_MAX};
use crate::socket::Socket;
use crate::trunk::wire::{Fault, Kind, head};
use crate::trunk::{Broken, Slots, Trunk};

/// The versions of this program, for its hellos.
pub const VERSIONS: (u16, u16) = (VERSION_LOWEST, VERSION_HIGHEST);

const BUFFER: usize = FRAME_HEAD + FRAME_MAX;

/// A phase connection.
#[derive(Debug)]
pub struct Link {
    carrier: Carrier,
    /// The command that the connection goes through.
    command: Option<Command>,
    output: Box<[u8; BUFFER]>,
    input: Box<[u8; BUFFER]>,
    /// How much of the next frame is in `input`.
    got: usize,
    broken: Option<LinkError>,
}

/// What carries the messages.
#[derive(Debug)]
enum Carrier {
    /// Nothing else goes over it.
    Socket(Arc<Socket>),
    /// One conversation of several.
    Trunk(Arc<Trunk>, Kind),
}

impl Carrier {
    fn socket(&self) -> &Arc<Socket> {
        match self {
            Self::Socket(socket) => socket,
            Self::Trunk(trunk, _) => trunk.socket(),
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // The phases are what the connection is there for.
        if let Self::Trunk(trunk, Kind::Phases) = self {
            trunk.shut();
        }
    }
}

/// Why a phase connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkError {
    /// The peer closed it.
    Closed,
    /// The peer did not say hello, or did not take a message, in time.
    Late,
    /// No version in common.
    Versions {
        /// Lowest and highest that this program speaks.
        ours: (u16, u16),
        /// Lowest and highest that the peer speaks.
        theirs: (u16, u16),
    },
    /// The first bytes are not a hello.
    Hello(HelloError),
    /// Something is not a message.
    Frame(FrameError),
    /// Something is no frame of the stream path.
    Stream(Fault),
    /// The socket's error.
    Socket(ErrorKind),
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the peer closed the connection"),
            Self::Late => f.write_str("the peer did not answer in time"),
            Self::Versions { ours, theirs } => write!(
                f,
                "the peer speaks versions {} to {} of the phase protocol, this program {} to {}",
                theirs.0, theirs.1, ours.0, ours.1
            ),
            Self::Hello(error) => error.fmt(f),
            Self::Frame(error) => write!(f, "the peer sent {error}"),
            Self::Stream(fault) => write!(f, "the peer sent {fault}"),
            Self::Socket(kind) => write!(f, "the connection broke: {kind}"),
        }
    }
}

impl std::error::Error for LinkError {}

impl Link {
    /// Takes a connection over, before the hellos.
    #[must_use]
    pub fn new(socket: Arc<Socket>) -> Self {
        Self::carried(Carrier::Socket(socket))
    }

    /// One conversation of a connection that carries several; the hellos are over.
    #[must_use]
    pub fn over(trunk: Arc<Trunk>, kind: Kind) -> Self {
        Self::carried(Carrier::Trunk(trunk, kind))
    }

    fn carried(carrier: Carrier) -> Self {
        let (output, input) = (Box::new([0; BUFFER]), Box::new([0; BUFFER]));
        Self { carrier, command: None, output, input, got: 0, broken: None }
    }

    /// The connection goes through this command, which ends with it.
    #[must_use]
    pub fn through(mut self, command: Option<Command>) -> Self {
        self.command = command;
        self
    }

    /// From now on the connection carries blocks and digests beside these messages. Both ends do so after the same
    /// message.
    ///
    /// # Errors
    /// There is no thread; the link is of no more use.
    pub fn share(&mut self, slots: Option<Slots>) -> IoResult<Arc<Trunk>> {
        debug_assert_eq!(self.got, 0, "nothing is read ahead");
        match &self.carrier {
            Carrier::Trunk(trunk, _) => Ok(Arc::clone(trunk)),
            Carrier::Socket(socket) => {
                let trunk = Trunk::start(Arc::clone(socket), slots)?;
                self.carrier = Carrier::Trunk(Arc::clone(&trunk), Kind::Phases);
                Ok(trunk)
            }
        }
    }

    /// The connection below, if it carries blocks too.
    #[must_use]
    pub fn trunk(&self) -> Option<&Arc<Trunk>> {
        match &self.carrier {
            Carrier::Socket(_) => None,
            Carrier::Trunk(trunk, _) => Some(trunk),
        }
    }

    /// When anything has come last, where more comes than these messages.
    #[must_use]
    pub fn heard(&self) -> Option<Instant> {
        self.trunk().map(|trunk| trunk.heard())
    }

    /// Ends the connection.
    pub fn shut(&self) {
        match &self.carrier {
            Carrier::Socket(socket) => socket.shutdown(),
            Carrier::Trunk(trunk, _) => trunk.shut(),
        }
    }

    /// An error in words, with those of the command that the connection went through.
    #[must_use]
    pub fn explain(&self, error: LinkError) -> String {
        let epitaph = if error == LinkError::Closed { self.epitaph() } else { String::new() };
        if epitaph.is_empty() { error.to_string() } else { format!("{error} ({epitaph})") }
    }

    /// How the command that the connection went through has ended, and its last words; empty without one.
    #[must_use]
    pub fn epitaph(&self) -> String {
        self.command.as_ref().map(|command| command.epitaph(COMMAND_LAST_WORDS)).unwrap_or_default()
    }

    /// The exit status of the command that the connection went through, once it has ended.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        self.command.as_ref()?.exit_code()
    }

    /// The socket, for whoever must shut it down from another thread.
    #[must_use]
    pub fn socket(&self) -> &Arc<Socket> {
        self.carrier.socket()
    }

    /// Exchanges hellos: both sides send first and then read. Returns the peer's hello and the version agreed on.
    ///
    /// # Errors
    /// A [`LinkError`]; the link is broken.
    pub fn hello(&mut self, ours: &Hello, deadline: Instant) -> Result<(Hello, u16), LinkError> {
        self.check()?;
        let exchanged = self.exchange(ours, deadline);
        exchanged.map_err(|e| self.broken_by(e))
    }

    fn exchange(&self, ours: &Hello, deadline: Instant) -> Result<(Hello, u16), LinkError> {
        let mut bytes = [0; HELLO_LENGTH];
        self.socket().send_all_before(&ours.encode(), deadline).map_err(|e| io_error(e.kind()))?;
        self.socket().recv_exact_before(&mut bytes, deadline).map_err(|e| io_error(e.kind()))?;
        let theirs = Hello::parse(&bytes).map_err(LinkError::Hello)?;
        let none = LinkError::Versions { ours: ours.versions, theirs: theirs.versions };
        let version = choose_version(ours.versions, theirs.versions).ok_or(none)?;
        Ok((theirs, version))
    }

    /// Sends a message, all of it before `deadline`.
    ///
    /// # Errors
    /// A [`LinkError`]; the link is broken. What has been sent of a message is not known then.
    pub fn send(&mut self, message: &Message, deadline: Instant) -> Result<(), LinkError> {
        self.check()?;
        let sent = message.encode(&mut self.output).map(<[u8]>::len).map_err(LinkError::Frame).and_then(|length| {
            let frame = &mut self.output[..length];
            match &self.carrier {
                Carrier::Socket(socket) => socket.send_all_before(frame, deadline).map_err(|e| io_error(e.kind())),
                Carrier::Trunk(trunk, kind) => {
                    // The kind of a phase message is 0: only so a frame differs from one of a socket.
                    frame[..FRAME_HEAD].copy_from_slice(&head(*kind, length - FRAME_HEAD));
                    trunk.send(*kind, frame, &[], deadline).map_err(LinkError::from)
                }
            }
        });
        sent.map_err(|e| self.broken_by(e))
    }

    /// Says a message on a connection that carries blocks too, for who does not listen there.
    ///
    /// # Errors
    /// A [`LinkError`].
    pub fn say(trunk: &Trunk, message: &Message, deadline: Instant) -> Result<(), LinkError> {
        let mut frame = [0; BUFFER];
        let frame = message.encode(&mut frame).map_err(LinkError::Frame)?;
        Ok(trunk.send(Kind::Phases, frame, &[], deadline)?)
    }

    /// Receives a message; `None` when no whole one has come before `deadline`. What has come of it is kept. A
    /// deadline that has passed looks without waiting.
    ///
    /// # Errors
    /// A [`LinkError`]; the link is broken. Messages that came before the peer closed are received first.
    pub fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, LinkError> {
        self.check()?;
        let received = self.receive_frame(deadline);
        received.map_err(|e| self.broken_by(e))
    }

    fn receive_frame(&mut self, deadline: Instant) -> Result<Option<Message>, LinkError> {
        if let Carrier::Trunk(trunk, kind) = &self.carrier {
            let body = trunk.receive(*kind, deadline)?;
            return body.map(|body| Message::decode(&body).map_err(LinkError::Frame)).transpose();
        }
        let mut head = [0; FRAME_HEAD];
        if !self.fill(FRAME_HEAD, deadline)? {
            return Ok(None);
        }
        head.copy_from_slice(&self.input[..FRAME_HEAD]);
        let end = FRAME_HEAD + frame_length(head).map_err(LinkError::Frame)?;
        if !self.fill(end, deadline)? {
            return Ok(None);
        }
        self.got = 0;
        Message::decode(&self.input[FRAME_HEAD..end]).map(Some).map_err(LinkError::Frame)
    }

    /// Whether `input` holds `end` bytes of the frame before `deadline`.
    fn fill(&mut self, end: usize, deadline: Instant) -> Result<bool, LinkError> {
        while self.got < end {
            match self.carrier.socket().recv_nowait(&mut self.input[self.got..end]).map_err(|e| io_error(e.kind()))? {
                Some(0) => return Err(LinkError::Closed),
                Some(n) => self.got += n,
                None if !self.wait(deadline).map_err(|e| io_error(e.kind()))? => return Ok(false),
                None => {}
            }
        }
        Ok(true)
    }

    fn wait(&self, deadline: Instant) -> IoResult<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        Ok(!left.is_zero() && self.socket().wait(true, false, Some(left))?.readable)
    }

    fn check(&self) -> Result<(), LinkError> {
        self.broken.map_or(Ok(()), Err)
    }

    /// Remembers the first error: half a frame may be under way, nothing can follow it.
    fn broken_by(&mut self, error: LinkError) -> LinkError {
        *self.broken.get_or_insert(error)
    }
}

impl From<Broken> for LinkError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Closed => Self::Closed,
            Broken::Late => Self::Late,
            Broken::Socket(kind) => Self::Socket(kind),
            Broken::Frame(fault) => Self::Stream(fault),
        }
    }
}

fn io_error(kind: ErrorKind) -> LinkError {
    match kind {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => LinkError::Closed,
        ErrorKind::TimedOut => LinkError::Late,
        kind => LinkError::Socket(kind),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::migrate::wire::{BootId, Capabilities, Challenge, Role, cut};
    use crate::ownership::{Host, Instance};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn now() -> Instant {
        Instant::now()
    }

    /// A link, and a peer that says what it likes.
    fn link() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        (Link::new(Arc::new(Socket::new(OwnedFd::from(ours)))), theirs)
    }

    fn hello(versions: (u16, u16)) -> Hello {
        Hello {
            versions,
            role: Role::Source,
            capabilities: Capabilities::NBD,
            guest: cut("g1"),
            title: None,
            boot: BootId([1; 16]),
            instance: Instance([2; 16]),
            challenge: Challenge([3; 16]),
            host: Host([4; 16]),
            address: cut(""),
        }
    }

    fn frame(number: u64) -> Vec<u8> {
        Message::Ping { number }.encode(&mut [0; BUFFER]).expect("fits").to_vec()
    }

    #[test]
    fn two_links_say_hello_and_talk() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let [mut a, mut b] = [a, b].map(|s| Link::new(Arc::new(Socket::new(OwnedFd::from(s)))));
        thread::scope(|scope| {
            let other = scope.spawn(move || {
                let (theirs, version) = b.hello(&hello((1, 2)), soon()).expect("hello");
                assert_eq!((theirs.versions, version), ((1, 3), 2));
                let message = b.receive(soon()).expect("received").expect("in time");
                b.send(&message, soon()).expect("sent");
            });
            assert_eq!(a.hello(&hello((1, 3)), soon()).expect("hello").1, 2);
            a.send(&Message::Ping { number: 7 }, soon()).expect("sent");
            assert_eq!(a.receive(soon()), Ok(Some(Message::Ping { number: 7 })));
            other.join().expect("no panic");
            assert_eq!(a.receive(soon()), Err(LinkError::Closed));
        });
    }

    #[test]
    fn peer_speaks_other_versions() {
        let (mut link, mut peer) = link();
        peer.write_all(&hello((4, 9)).encode()).expect("sent");
        let error = link.hello(&hello((1, 2)), soon()).expect_err("no common version");
        assert_eq!(error.to_string(), "the peer speaks versions 4 to 9 of the phase protocol, this program 1 to 2");
        let mut ours = [0; HELLO_LENGTH];
        peer.read_exact(&mut ours).expect("it can say the same to its user");
    }

    #[test]
    fn peer_is_another_program_or_silent_or_gone() {
        let (mut silent, _peer) = link();
        let error = silent.hello(&hello((1, 1)), Instant::now() + Duration::from_millis(20));
        assert_eq!(error.expect_err("late").to_string(), "the peer did not answer in time");

        let (mut other, mut peer) = link();
        peer.write_all(&[b'x'; HELLO_LENGTH]).expect("sent");
        let error = other.hello(&hello((1, 1)), soon()).expect_err("garbage");
        assert_eq!(error.to_string(), "the peer is not blockferry");

        let (mut gone, mut peer) = link();
        peer.write_all(b"BLKF").expect("sent");
        drop(peer);
        let error = gone.hello(&hello((1, 1)), soon()).expect_err("closed");
        assert_eq!(error.to_string(), "the peer closed the connection");
    }

    #[test]
    fn a_frame_that_trickles_in_is_kept_between_calls() {
        let (mut link, mut peer) = link();
        let bytes = frame(300);
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(link.receive(now()), Ok(None), "after {at} bytes");
            peer.write_all(&[*byte]).expect("sent");
        }
        assert_eq!(link.receive(now()), Ok(Some(Message::Ping { number: 300 })));
        assert_eq!(link.receive(now() + Duration::from_millis(5)), Ok(None));
    }

    #[test]
    fn nothing_behind_a_frame_is_read() {
        let (mut link, mut peer) = link();
        peer.write_all(&[frame(1), frame(2), b"block".to_vec()].concat()).expect("sent");
        assert_eq!(link.receive(soon()), Ok(Some(Message::Ping { number: 1 })));
        assert_eq!(link.receive(soon()), Ok(Some(Message::Ping { number: 2 })));
        let mut rest = [0; 5];
        link.socket().recv_exact(&mut rest).expect("received");
        assert_eq!(&rest, b"block");
    }

    #[test]
    fn peer_closes_after_a_message_or_inside_one() {
        let (mut link, mut peer) = self::link();
        peer.write_all(&frame(1)).expect("sent");
        drop(peer);
        assert_eq!(link.receive(soon()), Ok(Some(Message::Ping { number: 1 })));
        assert_eq!(link.receive(soon()), Err(LinkError::Closed));
        assert_eq!(link.send(&Message::Ping { number: 1 }, soon()), Err(LinkError::Closed));

        let (mut link, mut peer) = self::link();
        peer.write_all(&frame(1)[..5]).expect("sent");
        drop(peer);
        assert_eq!(link.receive(soon()), Err(LinkError::Closed));
    }

    #[test]
    fn peer_sends_what_is_no_message() {
        let cases: [(&[u8], &str); 4] = [
            (&[0xff; 4], "the peer sent a frame longer than 8192 bytes"),
            (&[0; 4], "the peer sent a malformed message"),
            (&[1, 0, 0, 0, 99], "the peer sent an unknown message, number 99"),
            (&[2, 0, 0, 0, 7, 7], "the peer sent a malformed message"),
        ];
        for (bytes, line) in cases {
            let (mut link, mut peer) = link();
            peer.write_all(bytes).expect("sent");
            peer.write_all(&frame(1)).expect("sent");
            let error = link.receive(soon()).expect_err("no message");
            assert_eq!(error.to_string(), line);
            assert_eq!(link.receive(soon()), Err(error), "nothing is believed after it");
        }
    }

    #[test]
    fn peer_that_takes_nothing_breaks_the_link_at_the_deadline() {
        let (mut link, _peer) = link();
        let deadline = now() + Duration::from_millis(50);
        let message = Message::Ping { number: u64::MAX };
        let error = loop {
            if let Err(error) = link.send(&message, deadline) {
                break error;
            }
        };
        assert_eq!(error, LinkError::Late);
        assert_eq!(link.receive(soon()), Err(LinkError::Late), "half a frame may be under way");
    }
}
