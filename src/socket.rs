//! A connected stream socket, Unix or TCP, and the few things the doors and clients do with one.
//!
//! The doors and the clients make sockets; the wire code only ever sees bytes. A [`Socket`] is shared between the
//! threads of one connection: every method takes `&self`. All waits are bounded by the caller, except a plain
//! [`Socket::recv`] or [`Socket::send_all`] on a socket without a timeout, which ends when somebody calls
//! [`Socket::shutdown`].

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown,
};
use rustix::pipe::SpliceFlags;

use crate::limits::{PASSENGERS_MAX, UNIX_SEND_BUFFER};

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

/// What [`Socket::wait`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// Bytes, or the end of the stream, or an error can be received now.
    pub readable: bool,
    /// At least one byte can be sent now.
    pub writable: bool,
}

impl Socket {
    /// Takes over a connected stream socket. Turns Nagle's delay off where there is one (TCP): with it each option of
    /// a handshake costs 40 ms. Enlarges the send buffer where it stays as it is (Unix).
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        // A Unix socket has no such option. Its send buffer never grows by itself, and what its two ends hand over
        // between two wake-ups is no more than fits; that of TCP does, unless somebody sets it.
        if sockopt::set_tcp_nodelay(&fd, true).is_err()
            && sockopt::set_socket_send_buffer_size_force(&fd, UNIX_SEND_BUFFER).is_err()
        {
            // Without CAP_NET_ADMIN only up to net.core.wmem_max. That it stays as it is, is no error.
            let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER);
        }
        Self { fd }
    }

    /// Whether both ends are on this host, in one kernel's memory.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        sockopt::socket_domain(&self.fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
    }

    /// This host's address of a TCP connection; `None` of a Unix socket.
    #[must_use]
    pub fn local_ip(&self) -> Option<IpAddr> {
        let address = rustix::net::getsockname(&self.fd).ok()?;
        SocketAddr::try_from(address).ok().map(|address| address.ip())
    }

    /// Receives at least one byte into `buffer`, or 0 at the end of the stream.
    ///
    /// # Errors
    /// The socket's error, or [`ErrorKind::WouldBlock`] when the receive timeout ran out.
    pub fn recv(&self, buffer: &mut [u8]) -> Result<usize> {
        self.recv_flags(buffer, RecvFlags::empty())
    }

    /// Receives what is there without waiting: `None` when nothing is, 0 at the end of the stream.
    ///
    /// # Errors
    /// The socket's error.
    pub fn recv_nowait(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match self.recv_flags(buffer, RecvFlags::DONTWAIT) {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// [`Socket::recv_nowait`], where descriptors may have been passed on: those that came last are in `passed` then,
    /// close-on-exec.
    ///
    /// # Errors
    /// The socket's error.
    pub fn recv_nowait_passed(
        &self,
        buffer: &mut [u8],
        passed: &mut heapless::Vec<OwnedFd, PASSENGERS_MAX>,
    ) -> Result<Option<usize>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSENGERS_MAX))];
        let mut parts = [IoSliceMut::new(buffer)];
        loop {
            // What does not fit is closed by the kernel.
            let mut came = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.fd, &mut parts, &mut came, flags) {
                Ok(message) => {
                    for one in came.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = one {
                            *passed = fds.take(PASSENGERS_MAX).collect();
                        }
                    }
                    return Ok(Some(message.bytes));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends what the peer takes at once of `bytes`, at least one, and passes descriptors on with the first of
    /// them. Only for a Unix socket.
    ///
    /// # Errors
    /// The socket's error, or [`ErrorKind::TimedOut`] when the peer takes nothing.
    pub fn send_passing(&self, bytes: &[u8], passed: &[BorrowedFd<'_>]) -> Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSENGERS_MAX))];
        let mut goes = SendAncillaryBuffer::new(&mut space);
        if !goes.push(SendAncillaryMessage::ScmRights(passed)) {
            return Err(ErrorKind::InvalidInput.into());
        }
        loop {
            let parts = [IoSlice::new(bytes)];
            match rustix::net::sendmsg(&self.fd, &parts, &mut goes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn recv_flags(&self, buffer: &mut [u8], flags: RecvFlags) -> Result<usize> {
        loop {
            match rustix::net::recv(&self.fd, &mut *buffer, flags) {
                Ok((n, _)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives into two buffers with one system call, the second after the first is full.
    ///
    /// # Errors
    /// As [`Socket::recv`].
    pub fn recv_two(&self, first: &mut [u8], second: &mut [u8]) -> Result<usize> {
        loop {
            let mut parts = [IoSliceMut::new(first), IoSliceMut::new(second)];
            let mut none = RecvAncillaryBuffer::default();
            match rustix::net::recvmsg(&self.fd, &mut parts, &mut none, RecvFlags::empty()) {
                Ok(message) => return Ok(message.bytes),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives exactly `buffer.len()` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] when the stream ends before; else as [`Socket::recv`].
    pub fn recv_exact(&self, buffer: &mut [u8]) -> Result<()> {
        let mut got = 0;
        while got < buffer.len() {
            match self.recv(&mut buffer[got..])? {
                0 => return Err(Error::from(ErrorKind::UnexpectedEof)),
                n => got += n,
            }
        }
        Ok(())
    }

    /// Receives exactly `buffer.len()` bytes before `deadline`, however slowly they trickle in.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] past the deadline, [`ErrorKind::UnexpectedEof`] when the stream ends before, else the
    /// socket's error.
    pub fn recv_exact_before(&self, buffer: &mut [u8], deadline: Instant) -> Result<()> {
        let mut got = 0;
        while got < buffer.len() {
            match self.recv_nowait(&mut buffer[got..])? {
                Some(0) => return Err(Error::from(ErrorKind::UnexpectedEof)),
                Some(n) => got += n,
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Error::from(ErrorKind::TimedOut));
                    }
                    self.wait(true, false, Some(left))?;
                }
            }
        }
        Ok(())
    }

    /// Sends all of `bytes` before `deadline`, however slowly the peer takes them.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] past the deadline, else the socket's error.
    pub fn send_all_before(&self, bytes: &[u8], deadline: Instant) -> Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.send_nowait(&bytes[sent..], &[])? {
                Some(n) => sent += n,
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Error::from(ErrorKind::TimedOut));
                    }
                    self.wait(false, true, Some(left))?;
                }
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`, waiting as long as the peer takes.
    ///
    /// # Errors
    /// The socket's error.
    pub fn send_all(&self, bytes: &[u8]) -> Result<()> {
        self.send_all_two(bytes, &[])
    }

    /// Sends all of `first`, then all of `second`, with one system call where the peer takes that much.
    ///
    /// # Errors
    /// The socket's error.
    pub fn send_all_two(&self, first: &[u8], second: &[u8]) -> Result<()> {
        let mut sent = 0;
        let total = first.len() + second.len();
        while sent < total {
            let (a, b) = rest(first, second, sent);
            if let Some(n) = self.send_flags(a, b, SendFlags::NOSIGNAL)? {
                sent += n;
            } else {
                return Err(Error::from(ErrorKind::TimedOut));
            }
        }
        Ok(())
    }

    /// Sends the `length` bytes that a pipe holds, waiting as long as the peer takes.
    ///
    /// # Errors
    /// The socket's error; what is left in the pipe then is nobody's.
    pub fn send_from(&self, pipe: impl AsFd, length: usize) -> Result<()> {
        let mut left = length;
        while left > 0 {
            // std has set SIGPIPE aside: a peer that has gone is an error here too.
            match rustix::pipe::splice(&pipe, None, &self.fd, None, left, SpliceFlags::empty()) {
                Ok(0) => return Err(Error::from(ErrorKind::WriteZero)),
                Ok(n) => left -= n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Error::from(ErrorKind::TimedOut)),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Sends what the peer takes at once of `first` followed by `second`; `None` when it takes nothing.
    ///
    /// # Errors
    /// The socket's error.
    pub fn send_nowait(&self, first: &[u8], second: &[u8]) -> Result<Option<usize>> {
        self.send_flags(first, second, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_flags(&self, first: &[u8], second: &[u8], flags: SendFlags) -> Result<Option<usize>> {
        loop {
            let sent = if second.is_empty() {
                rustix::net::send(&self.fd, first, flags)
            } else {
                let parts = [IoSlice::new(first), IoSlice::new(second)];
                rustix::net::sendmsg(&self.fd, &parts, &mut SendAncillaryBuffer::default(), flags)
            };
            match sent {
                Ok(n) => return Ok(Some(n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until the socket can be read or written as asked, or the time is up (then neither is set). `None` waits
    /// without an end. A broken or hung-up socket counts as readable: the next receive says what it is.
    ///
    /// # Errors
    /// The system's error for poll itself.
    pub fn wait(&self, read: bool, write: bool, timeout: Option<Duration>) -> Result<Ready> {
        wait(&self.fd, read, write, timeout)
    }

    /// Whether the peer has closed its sending side, or the connection is broken. Unread bytes may still be waiting:
    /// this looks past them (rule D11).
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        has_hung_up(&self.fd)
    }

    /// Ends the connection in both directions; every thread that waits on it wakes up. Safe to repeat.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Says to the peer that nothing more comes; it may go on sending.
    pub fn finish_sending(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Bounds every later [`Socket::recv`]; `None` lifts the bound.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_recv_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        Ok(sockopt::set_socket_timeout(&self.fd, Timeout::Recv, timeout)?)
    }

    /// Bounds every later [`Socket::send_all`]; `None` lifts the bound.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_send_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        Ok(sockopt::set_socket_timeout(&self.fd, Timeout::Send, timeout)?)
    }

    /// Asks the kernel to notice a peer that has vanished, and one that takes nothing any more: after `quiet` of
    /// silence it probes, and gives the connection up after about twice that. Only TCP has this.
    pub fn set_keep_alive(&self, quiet: Duration) {
        self.probe(quiet);
        let total_ms = u32::try_from(quiet.as_millis() * 2).unwrap_or(u32::MAX);
        let _ = sockopt::set_tcp_user_timeout(&self.fd, total_ms);
    }

    /// The same of a peer that may take its time as long as its host is there: a guest that is paused.
    pub fn probe(&self, quiet: Duration) {
        let _ = sockopt::set_socket_keepalive(&self.fd, true);
        let _ = sockopt::set_tcp_keepidle(&self.fd, quiet);
        let _ = sockopt::set_tcp_keepintvl(&self.fd, quiet / 4);
        let _ = sockopt::set_tcp_keepcnt(&self.fd, 4);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// [`Socket::wait`] for anything that can be polled.
pub(crate) fn wait(fd: impl AsFd, read: bool, write: bool, timeout: Option<Duration>) -> Result<Ready> {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, read);
    flags.set(PollFlags::OUT, write);
    let deadline = timeout.map(|t| Instant::now() + t);
    loop {
        let left = deadline.map(|d| timespec(d.saturating_duration_since(Instant::now())));
        let mut fds = [PollFd::new(&fd, flags)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {
                let seen = fds[0].revents();
                let broken = seen.intersects(PollFlags::ERR | PollFlags::HUP);
                return Ok(Ready {
                    readable: broken || seen.contains(PollFlags::IN),
                    writable: seen.contains(PollFlags::OUT),
                });
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// [`Socket::has_hung_up`] for anything that can be polled.
pub(crate) fn has_hung_up(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::RDHUP)];
    match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
        Err(_) => false,
    }
}

/// What is left of two buffers after `sent` bytes of them together.
fn rest<'a>(first: &'a [u8], second: &'a [u8], sent: usize) -> (&'a [u8], &'a [u8]) {
    if sent < first.len() { (&first[sent..], second) } else { (&second[sent - first.len()..], &[]) }
}

/// A duration as the kernel wants it.
fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
