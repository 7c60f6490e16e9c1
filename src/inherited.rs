//! A socket that whoever started this process has passed on, by its number.
//!
//! [`take`] makes a descriptor of our own of it, close-on-exec, with `pidfd_getfd` on ourselves (Linux 5.6): that is
//! the way without `unsafe` from a number to a descriptor. The number itself stays open until the process ends, and a
//! program that is started from here inherits it; standard input, output and error are put on `/dev/null` instead by
//! [`Taken::release_standard`]. Called by [`crate::door_at`] to look and by [`crate::listener`] to keep.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use rustix::net::{SocketAddrUnix, SocketType, getpeername, getsockname};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::address::Address;
use crate::limits::FD_MAX;

/// A passed stream socket, now our own descriptor.
#[derive(Debug)]
pub struct Taken {
    /// The socket, close-on-exec.
    pub fd: OwnedFd,
    /// It listens; else it is connected.
    pub listens: bool,
}

/// Begins the name of a descriptor.
pub const FD: &str = "fd:";

/// Reads the number in `text`.
///
/// # Errors
/// The cause, for a usage error.
pub fn parse(text: &str, digits: &str) -> Result<u32, String> {
    let number = digits.parse().ok().filter(|number| *number <= FD_MAX);
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    let wrong = || format!("'{text}': '{digits}' is not a descriptor (0 to {FD_MAX})");
    number.filter(|_| plain).ok_or_else(wrong)
}

/// Takes a socket over that is listened on or connected.
///
/// # Errors
/// Why it cannot be a door.
pub fn take(number: u32) -> Result<Taken, String> {
    look(own(number)?)
}

/// Takes a connection over that somebody has passed on, by whatever way it came.
///
/// # Errors
/// Why it cannot be one.
pub fn connected(fd: OwnedFd) -> Result<Taken, String> {
    let taken = look(fd)?;
    if taken.listens { Err("is a socket that listens, not a connection".to_owned()) } else { Ok(taken) }
}

/// Takes one direction of a way over: a pipe, or whatever else is read (or, if it `sends`, written) and waited for.
///
/// # Errors
/// Why it cannot be one.
pub fn take_half(number: u32, sends: bool) -> Result<OwnedFd, String> {
    half(own(number)?, sends)
}

/// The same, by whatever way it came.
///
/// # Errors
/// Why it cannot be one.
pub fn half(fd: OwnedFd, sends: bool) -> Result<OwnedFd, String> {
    let kind = fstat(&fd).map_err(|error| error.to_string())?.st_mode;
    if !matches!(FileType::from_raw_mode(kind), FileType::Fifo | FileType::Socket | FileType::CharacterDevice) {
        return Err("is neither a pipe nor a socket".to_owned());
    }
    let mode = fcntl_getfl(&fd).map_err(|error| error.to_string())? & OFlags::ACCMODE;
    match (mode, sends) {
        (OFlags::RDONLY, true) => Err("is the end of a pipe that is read, and is to be written".to_owned()),
        (OFlags::WRONLY, false) => Err("is the end of a pipe that is written, and is to be read".to_owned()),
        _ => Ok(fd),
    }
}

/// Where the other end of a TCP connection is; `None` of anything else.
#[must_use]
pub fn peer(fd: impl AsFd) -> Option<Address> {
    let ip = SocketAddr::try_from(getpeername(fd).ok()??).ok()?;
    Some(Address::Tcp { host: ip.ip().to_string(), port: ip.port() })
}

fn look(fd: OwnedFd) -> Result<Taken, String> {
    match socket_type(&fd) {
        Ok(SocketType::STREAM) => {}
        Ok(_) => return Err("is not a stream socket".to_owned()),
        Err(Errno::NOTSOCK) => return Err("is not a socket".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    let listens = socket_acceptconn(&fd).map_err(|error| error.to_string())?;
    if !listens && getpeername(&fd).is_err() {
        return Err("is a socket that neither listens nor is connected".to_owned());
    }
    Ok(Taken { fd, listens })
}

fn own(number: u32) -> Result<OwnedFd, String> {
    let number = i32::try_from(number).map_err(|error| error.to_string())?;
    let taken =
        pidfd_open(getpid(), PidfdFlags::empty()).and_then(|me| pidfd_getfd(me, number, PidfdGetfdFlags::empty()));
    taken.map_err(|error| match error {
        Errno::BADF => "no such descriptor was passed".to_owned(),
        Errno::NOSYS | Errno::PERM => format!("a passed descriptor needs pidfd_getfd, of Linux 5.6: {error}"),
        _ => error.to_string(),
    })
}

impl Taken {
    /// As [`peer`].
    #[must_use]
    pub fn peer(&self) -> Option<Address> {
        peer(&self.fd)
    }

    /// Where it listens or was connected to, if that is a place that can be dialled from here. An abstract Unix socket
    /// is refused: it has no mode, so everybody on this host may connect to it. What is connected is not dialled again.
    ///
    /// # Errors
    /// Neither TCP nor a Unix socket with a path.
    pub fn address(&self) -> Result<Address, String> {
        let name = getsockname(&self.fd).map_err(|error| error.to_string())?;
        if let Ok(ip) = SocketAddr::try_from(name.clone()) {
            return Ok(Address::Tcp { host: ip.ip().to_string(), port: ip.port() });
        }
        let unix = SocketAddrUnix::try_from(name).map_err(|_| "is neither a TCP nor a Unix socket".to_owned())?;
        match unix.path_bytes() {
            Some(path) => {
                let path = Path::new(std::ffi::OsStr::from_bytes(path));
                std::path::absolute(path).map(Address::Unix).map_err(|error| crate::error::reason(&error).to_string())
            }
            None if self.listens => Err("is an abstract Unix socket, which everybody on this host may use".to_owned()),
            // A socket pair, or the end of a client that has no name.
            None => Ok(Address::Unix("/".into())),
        }
    }

    /// Makes a connection ready for use: it waits when there is nothing to read.
    ///
    /// # Errors
    /// The system's.
    pub fn into_connection(self) -> std::io::Result<OwnedFd> {
        let flags = fcntl_getfl(&self.fd)?;
        fcntl_setfl(&self.fd, flags - OFlags::NONBLOCK)?;
        self.release_standard()?;
        Ok(self.fd)
    }

    /// Puts those of standard input, output and error on `/dev/null` that are this socket: what this process prints
    /// must not come between what it serves, and the peer sees the end when the connection is closed.
    ///
    /// # Errors
    /// The system's.
    pub fn release_standard(&self) -> std::io::Result<()> {
        release_standard(&self.fd)
    }
}

/// The same for anything that was passed on.
///
/// # Errors
/// The system's.
pub fn release_standard(fd: impl AsFd) -> std::io::Result<()> {
    let socket = fstat(fd)?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let same = |other: rustix::io::Result<rustix::fs::Stat>| {
        other.is_ok_and(|other| (other.st_dev, other.st_ino) == (socket.st_dev, socket.st_ino))
    };
    if same(fstat(std::io::stdin())) {
        dup2_stdin(&null)?;
    }
    if same(fstat(std::io::stdout())) {
        dup2_stdout(&null)?;
    }
    if same(fstat(std::io::stderr())) {
        dup2_stderr(&null)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};

    use rustix::net::{AddressFamily, socket};

    use super::*;

    fn number(of: &impl AsRawFd) -> u32 {
        of.as_raw_fd().try_into().expect("not negative")
    }

    #[test]
    fn a_listening_socket_is_taken_and_tells_its_address() {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("binds");
        let taken = take(number(&tcp)).expect("taken");
        assert!(taken.listens);
        let port = tcp.local_addr().expect("bound").port();
        assert_eq!(taken.address(), Ok(Address::Tcp { host: "127.0.0.1".to_owned(), port }));
        let flags = rustix::io::fcntl_getfd(&taken.fd).expect("open");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));

        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.sock");
        let unix = UnixListener::bind(&path).expect("binds");
        assert_eq!(take(number(&unix)).expect("taken").address(), Ok(Address::Unix(path)));
    }

    #[test]
    fn a_connected_socket_is_told_apart() {
        let (a, _b) = UnixStream::pair().expect("a pair");
        assert!(!take(number(&a)).expect("taken").listens);
        let tcp = TcpListener::bind("127.0.0.1:0").expect("binds");
        let client = TcpStream::connect(tcp.local_addr().expect("bound")).expect("connects");
        let taken = take(number(&client)).expect("taken");
        assert!(!taken.listens);
        let port = tcp.local_addr().expect("bound").port();
        assert_eq!(taken.peer(), Some(Address::Tcp { host: "127.0.0.1".to_owned(), port }));
        assert_eq!(take(number(&a)).expect("taken").peer(), None);
        let connection = take(number(&client)).expect("taken").fd;
        assert!(connected(connection).is_ok());
        let listens = take(number(&tcp)).expect("taken").fd;
        let refused = connected(listens).map(drop);
        assert_eq!(refused, Err("is a socket that listens, not a connection".to_owned()));
    }

    #[test]
    fn what_can_be_no_door_says_why() {
        let file = tempfile::tempfile().expect("a file");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("binds");
        let idle = socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
        for (number, cause) in [
            (number(&file), "is not a socket"),
            (number(&udp), "is not a stream socket"),
            (number(&idle), "is a socket that neither listens nor is connected"),
            (60000, "no such descriptor was passed"),
        ] {
            assert_eq!(take(number).map(drop), Err(cause.to_owned()));
        }
        let (reads, writes) = std::io::pipe().expect("a pipe");
        assert!(take_half(number(&reads), false).is_ok() && take_half(number(&writes), true).is_ok());
        assert!(take_half(number(&idle), true).is_ok(), "a socket goes both ways");
        for (number, sends, cause) in [
            (number(&reads), true, "is the end of a pipe that is read, and is to be written"),
            (number(&writes), false, "is the end of a pipe that is written, and is to be read"),
            (number(&file), false, "is neither a pipe nor a socket"),
            (60000, true, "no such descriptor was passed"),
        ] {
            assert_eq!(take_half(number, sends).map(drop), Err(cause.to_owned()));
        }
        let name = UnixAddr::from_abstract_name(format!("blockferry-{}", std::process::id())).expect("a name");
        let listener = UnixListener::bind_addr(&name).expect("binds");
        assert_eq!(
            take(number(&listener)).expect("taken").address(),
            Err("is an abstract Unix socket, which everybody on this host may use".to_owned())
        );
    }
}
