//! Where a door listens and where a client dials: `unix:///PATH` and `tcp://HOST:PORT`.
//!
//! The command line parses addresses, [`crate::listener`] binds them, clients [`Address::connect`]. Parsing is pure;
//! names are resolved only when something is dialled or asked whether it stays on this host.

use std::fmt;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Problem;
use crate::limits::{ADDRESS_MAX, UNIX_PATH_MAX};
use crate::socket::Socket;

/// An address as the user wrote it. Its [`Display`](fmt::Display) form parses back to itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:///PATH`, always absolute.
    Unix(PathBuf),
    /// `tcp://HOST:PORT`; an IPv6 host stands in brackets in the text, without them here.
    Tcp {
        /// A name or a number.
        host: String,
        /// 0 asks for any free port, for listening only.
        port: u16,
    },
}

/// Forms that the contract names and a later part builds.
const LATER: [&str; 2] = ["vsock://", "exec:"];

/// Begins the name of a virtio port, which only `serve --control` takes.
const PORT: &str = "virtio:";

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// The cause, for a usage error. A form of a later part gets its own text.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        if text.len() > ADDRESS_MAX {
            return Err(format!("the address is longer than {ADDRESS_MAX} bytes"));
        }
        if text.contains(char::is_control) {
            return Err("the address contains a control character".to_owned());
        }
        if let Some(path) = text.strip_prefix("unix://") {
            if path.contains("?mode=") {
                return Err(format!("'{text}': ?mode= is for the doors of serve and export"));
            }
            return parse_unix(path);
        }
        if let Some(place) = text.strip_prefix("tcp://") {
            return parse_tcp(text, place);
        }
        if text.starts_with(PORT) {
            return Err(format!(
                "'{text}': a virtio port is a door of serve --control inside the machine; from outside it is the \
                 socket of its chardev: unix:///PATH"
            ));
        }
        if text.starts_with("fd:") {
            return Err(format!("'{text}': a passed socket is for the doors of serve and export"));
        }
        if let Some(form) = LATER.into_iter().find(|form| text.starts_with(form)) {
            return Err(format!("'{text}': {form} addresses are not supported yet"));
        }
        Err(format!("'{text}' is not an address: unix:///PATH or tcp://HOST:PORT"))
    }

    /// Whether everything sent there stays on this host. A name counts only when all it resolves to does.
    ///
    /// # Errors
    /// The name cannot be resolved.
    pub fn is_loopback(&self) -> Result<bool> {
        match self {
            Self::Unix(_) => Ok(true),
            Self::Tcp { host, port } => Ok(resolve(host, *port)?.iter().all(|a| a.ip().to_canonical().is_loopback())),
        }
    }

    /// Refuses an address that leaves this host when nothing protects what is sent there.
    ///
    /// # Errors
    /// A refusal that names the option which allows it.
    pub fn check_plaintext(
        &self,
        operation: &'static str,
        insecure_plaintext: bool,
    ) -> std::result::Result<(), Problem> {
        if insecure_plaintext {
            return Ok(());
        }
        match self.is_loopback() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Problem::refused(
                operation,
                self,
                "TCP beyond this host carries the guest's disks in the clear; --insecure-plaintext allows it",
            )),
            Err(e) => Err(Problem::refused(operation, self, crate::error::reason(&e))),
        }
    }

    /// The address as a peer sees it that is connected to this host's `ip`: a door that listens everywhere is reached
    /// there.
    #[must_use]
    pub fn seen_at(&self, ip: Option<IpAddr>) -> Self {
        match (self, ip) {
            (Self::Tcp { host, port }, Some(ip)) if host.parse().is_ok_and(|host: IpAddr| host.is_unspecified()) => {
                Self::Tcp { host: ip.to_canonical().to_string(), port: *port }
            }
            _ => self.clone(),
        }
    }

    /// Connects within `timeout`; of a name's several addresses the first that answers. Resolving the name is not
    /// bounded by it.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`], or the system's error of the last address tried.
    pub fn connect(&self, timeout: Duration) -> Result<Socket> {
        match self {
            Self::Unix(path) => connect_unix(path, timeout),
            Self::Tcp { port: 0, .. } => Err(Error::new(ErrorKind::InvalidInput, "port 0 can be listened on only")),
            Self::Tcp { host, port } => connect_tcp(&resolve(host, *port)?, timeout),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
        }
    }
}

fn parse_unix(path: &str) -> std::result::Result<Address, String> {
    if !path.starts_with('/') {
        return Err(format!("'unix://{path}': the path must be absolute: unix:///PATH"));
    }
    if path.len() > UNIX_PATH_MAX {
        return Err(format!("the socket's path is longer than {UNIX_PATH_MAX} bytes"));
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

fn parse_tcp(text: &str, place: &str) -> std::result::Result<Address, String> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or_else(|| format!("'{text}': expected tcp://[IPV6]:PORT"))?,
        None => place.rsplit_once(':').ok_or_else(|| format!("'{text}' lacks a port: tcp://HOST:PORT"))?,
    };
    if host.contains(':') && !place.starts_with('[') {
        return Err(format!("'{text}': an IPv6 address stands in brackets: tcp://[IPV6]:PORT"));
    }
    if host.is_empty() || host.contains(['/', '[', ']', '@']) || host.contains(char::is_whitespace) {
        return Err(format!("'{text}' lacks a host: tcp://HOST:PORT"));
    }
    // `u16::from_str` takes a plus sign; an address does not.
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(Address::Tcp { host: host.to_owned(), port }),
        _ => Err(format!("'{text}': '{port}' is not a port (0 to 65535)")),
    }
}

/// The name in `virtio:PORTNAME`, where a control door may be; `None`: it is another form of address.
///
/// # Errors
/// The cause, for a usage error.
pub fn parse_port(text: &str) -> std::result::Result<Option<String>, String> {
    let Some(name) = text.strip_prefix(PORT) else { return Ok(None) };
    if text.len() > ADDRESS_MAX {
        return Err(format!("the address is longer than {ADDRESS_MAX} bytes"));
    }
    if name.contains(char::is_control) {
        return Err("the address contains a control character".to_owned());
    }
    if name.is_empty() {
        return Err(format!("'{text}' lacks the port's name: virtio:PORTNAME"));
    }
    Ok(Some(name.to_owned()))
}

/// Every socket address of a host, at least one.
pub(crate) fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let found: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    if found.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "the name has no address"));
    }
    Ok(found)
}

fn connect_unix(path: &Path, timeout: Duration) -> Result<Socket> {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(path)?;
    // A full backlog makes connect wait, and the send timeout bounds that wait.
    sockopt::set_socket_timeout(&fd, Timeout::Send, Some(timeout))?;
    let deadline = Instant::now() + timeout;
    loop {
        match rustix::net::connect(&fd, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) => return Err(Error::from(ErrorKind::TimedOut)),
            Err(Errno::INTR) if Instant::now() < deadline => {}
            Err(e) => return Err(e.into()),
        }
    }
    sockopt::set_socket_timeout(fd.as_fd(), Timeout::Send, None)?;
    Ok(Socket::new(fd))
}

fn connect_tcp(addresses: &[SocketAddr], timeout: Duration) -> Result<Socket> {
    let deadline = Instant::now() + timeout;
    let mut last = Error::from(ErrorKind::TimedOut);
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, left) {
            Ok(stream) => return Ok(Socket::new(OwnedFd::from(stream))),
            Err(e) => last = e,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn addresses_print_as_they_parse() {
        for (text, address) in [
            ("unix:///run/x.sock", Address::Unix("/run/x.sock".into())),
            ("tcp://example.org:49152", tcp("example.org", 49152)),
            ("tcp://127.0.0.1:0", tcp("127.0.0.1", 0)),
            ("tcp://[::1]:10809", tcp("::1", 10809)),
            ("tcp://[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)),
        ] {
            assert_eq!(Address::parse(text), Ok(address.clone()));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn a_door_that_listens_everywhere_is_seen_at_one_place() {
        let ip: IpAddr = "192.0.2.7".parse().expect("an address");
        let mapped: IpAddr = "::ffff:192.0.2.7".parse().expect("an address");
        assert_eq!(tcp("0.0.0.0", 1).seen_at(Some(ip)), tcp("192.0.2.7", 1));
        assert_eq!(tcp("::", 1).seen_at(Some(mapped)), tcp("192.0.2.7", 1));
        assert_eq!(tcp("example.org", 1).seen_at(Some(ip)), tcp("example.org", 1));
        assert_eq!(tcp("0.0.0.0", 1).seen_at(None), tcp("0.0.0.0", 1));
    }

    #[test]
    fn every_wrong_address_says_what_is_wrong() {
        let long = format!("unix:///{}", "a".repeat(110));
        let longer = format!("tcp://{}:1", "a".repeat(130));
        for (text, cause) in [
            ("", "'' is not an address: unix:///PATH or tcp://HOST:PORT"),
            ("/run/x", "'/run/x' is not an address: unix:///PATH or tcp://HOST:PORT"),
            ("unix://run/x", "'unix://run/x': the path must be absolute: unix:///PATH"),
            ("unix:///a\nb", "the address contains a control character"),
            (long.as_str(), "the socket's path is longer than 107 bytes"),
            (longer.as_str(), "the address is longer than 128 bytes"),
            ("tcp://host", "'tcp://host' lacks a port: tcp://HOST:PORT"),
            ("tcp://:1", "'tcp://:1' lacks a host: tcp://HOST:PORT"),
            ("tcp://a b:1", "'tcp://a b:1' lacks a host: tcp://HOST:PORT"),
            ("tcp://h:", "'tcp://h:': '' is not a port (0 to 65535)"),
            ("tcp://h:+1", "'tcp://h:+1': '+1' is not a port (0 to 65535)"),
            ("tcp://h:65536", "'tcp://h:65536': '65536' is not a port (0 to 65535)"),
            ("tcp://::1:5", "'tcp://::1:5': an IPv6 address stands in brackets: tcp://[IPV6]:PORT"),
            ("tcp://[::1]5", "'tcp://[::1]5': expected tcp://[IPV6]:PORT"),
            ("fd:3", "'fd:3': a passed socket is for the doors of serve and export"),
            ("unix:///x?mode=0660", "'unix:///x?mode=0660': ?mode= is for the doors of serve and export"),
            ("vsock://2:5", "'vsock://2:5': vsock:// addresses are not supported yet"),
            ("exec:ssh B x", "'exec:ssh B x': exec: addresses are not supported yet"),
            (
                "virtio:org.x.0",
                "'virtio:org.x.0': a virtio port is a door of serve --control inside the machine; from outside it is \
                 the socket of its chardev: unix:///PATH",
            ),
        ] {
            assert_eq!(Address::parse(text), Err(cause.to_owned()));
        }
    }

    #[test]
    fn a_port_has_a_name() {
        let long = format!("virtio:{}", "x".repeat(ADDRESS_MAX));
        assert_eq!(parse_port("virtio:org.x.0"), Ok(Some("org.x.0".to_owned())));
        assert_eq!(parse_port("unix:///x"), Ok(None));
        for (text, cause) in [
            ("virtio:", "'virtio:' lacks the port's name: virtio:PORTNAME"),
            ("virtio:a\nb", "the address contains a control character"),
            (long.as_str(), "the address is longer than 128 bytes"),
        ] {
            assert_eq!(parse_port(text), Err(cause.to_owned()));
        }
    }

    #[test]
    fn plaintext_beyond_this_host_needs_to_be_allowed() {
        for text in ["unix:///run/x", "tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://[::1]:1", "tcp://localhost:1"] {
            let address = Address::parse(text).expect("an address");
            assert!(address.is_loopback().expect("resolves"), "{text}");
            address.check_plaintext("serve", false).expect("allowed");
        }
        for text in ["tcp://0.0.0.0:1", "tcp://192.0.2.1:1", "tcp://[::]:1", "tcp://[2001:db8::1]:1"] {
            let address = Address::parse(text).expect("an address");
            assert!(!address.is_loopback().expect("resolves"), "{text}");
            let problem = address.check_plaintext("serve", false).expect_err("refused");
            assert_eq!(
                problem.to_string(),
                format!(
                    "blockferry: serve: {text}: TCP beyond this host carries the guest's disks in the clear; \
                     --insecure-plaintext allows it"
                )
            );
            assert_eq!(problem.exit, crate::error::Exit::Refused);
            address.check_plaintext("serve", true).expect("allowed");
        }
    }

    #[test]
    fn port_0_cannot_be_dialled() {
        let error = tcp("127.0.0.1", 0).connect(Duration::from_secs(1)).expect_err("port 0");
        assert_eq!(error.to_string(), "port 0 can be listened on only");
    }
}
