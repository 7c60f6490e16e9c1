//! A listening socket: what a door waits at.
//!
//! Binding a Unix socket removes what a dead process left at that path and refuses where a living one answers. The
//! socket can be connected to by its owner only, or by whom the wished mode allows, from the first moment on. A blocked
//! [`Listener::accept`] ends when another thread calls [`Listener::stop`].
//!
//! A socket that was passed on belongs to whoever passed it as well: it is never shut down, its path is never removed,
//! and its flags stay as they are.

use std::fs::{self, DirBuilder, File};
use std::io::{Error, ErrorKind, Result};
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use crate::address::{Address, resolve};
use crate::door_at::DoorAt;
use crate::inherited::{self, Taken};
use crate::limits::{ACCEPT_PAUSE, BIND_LOCK_TIMEOUT, CONNECT_TIMEOUT, LISTEN_BACKLOG, RETRY_PAUSE};
use crate::socket::Socket;

/// Mode of directories that are made for a socket.
const DIRECTORY_MODE: u32 = 0o700;

/// A bound, listening socket. Stopping or dropping it removes its Unix socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    at: DoorAt,
    address: Address,
    /// Wakes an accept on a socket that was passed on.
    wake: Option<OwnedFd>,
    stopped: AtomicBool,
    made: Mutex<Option<Made>>,
}

/// The file of a Unix socket, so that only our own is removed.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Binds and listens. TCP sets `SO_REUSEADDR`; port 0 becomes a free port, which [`Listener::address`] tells.
    /// The directory of a Unix socket is made where it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::AddrInUse`] when a living process listens there; else the system's error.
    pub fn bind(address: &Address) -> Result<Self> {
        Self::bind_with(address, None)
    }

    fn bind_with(address: &Address, mode: Option<u32>) -> Result<Self> {
        match address {
            Address::Unix(path) => bind_unix(path, mode),
            Address::Tcp { host, port } => bind_tcp(host, *port),
        }
    }

    /// Opens a door: binds as [`Listener::bind`] does, or takes over what was passed on.
    ///
    /// # Errors
    /// As [`Listener::bind`]; for what was passed on, why it cannot be listened on.
    pub fn open(at: &DoorAt) -> Result<Self> {
        match at {
            DoorAt::Bound { address, mode } => Self::bind_with(address, *mode),
            DoorAt::Inherited(number) => match inherited::take(*number).map_err(Error::other)? {
                taken if taken.listens => Self::inherit(*number, taken),
                _ => Err(Error::other("is connected, it does not listen; only export serves one connection")),
            },
        }
    }

    /// A door of a listening socket that was passed on.
    ///
    /// # Errors
    /// It listens where nobody should, or the system's error.
    pub fn inherit(number: u32, taken: Taken) -> Result<Self> {
        let address = taken.address().map_err(Error::other)?;
        taken.release_standard()?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut listener = Self::new(taken.fd, address);
        listener.at = DoorAt::Inherited(number);
        listener.wake = Some(wake);
        Ok(listener)
    }

    fn new(fd: OwnedFd, address: Address) -> Self {
        let at = DoorAt::from(address.clone());
        Self { fd, at, address, wake: None, stopped: AtomicBool::new(false), made: Mutex::default() }
    }

    /// The door as the ready line names it.
    #[must_use]
    pub fn at(&self) -> &DoorAt {
        &self.at
    }

    /// Where this listens, with the port that it really has.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next connection; `None` once [`Listener::stop`] was called. What a peer does wrong before it is
    /// accepted, and a lack of descriptors or memory, is waited out.
    ///
    /// # Errors
    /// The system's error: this listener is of no more use.
    pub fn accept(&self) -> Result<Option<Socket>> {
        loop {
            self.wait_inherited()?;
            if self.stopped.load(Ordering::Acquire) {
                return Ok(None);
            }
            let accepted = rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC);
            if self.stopped.load(Ordering::Acquire) {
                return Ok(None);
            }
            match accepted {
                Ok(fd) => return Ok(Some(Socket::new(fd))),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    log::warn!("accept: {}: out of descriptors or memory, waiting", self.address);
                    thread::sleep(ACCEPT_PAUSE);
                }
                Err(e) if is_the_connections_fault(e) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until there is a connection on a socket that was passed on, or this is stopped. It may be one that does
    /// not block, and it cannot be shut down to end a wait.
    fn wait_inherited(&self) -> Result<()> {
        let Some(wake) = &self.wake else { return Ok(()) };
        let mut ready = [PollFd::new(&self.fd, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends every present and later [`Listener::accept`], and removes the Unix socket. Safe to repeat.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.remove_socket();
        if let Some(wake) = &self.wake {
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
            return;
        }
        // On Linux this wakes a blocked accept, of TCP and of Unix sockets.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Once only: a later socket there may be another's and have the same inode number.
    fn remove_socket(&self) {
        let Some(made) = self.made.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let ours = fs::symlink_metadata(&made.path).is_ok_and(|m| m.dev() == made.device && m.ino() == made.inode);
        if ours {
            let _ = fs::remove_file(&made.path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove_socket();
    }
}

/// What accept(2) passes on from the new connection rather than from the listener.
fn is_the_connections_fault(error: Errno) -> bool {
    matches!(
        error,
        Errno::INTR
            | Errno::AGAIN
            | Errno::CONNABORTED
            | Errno::PERM
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
    )
}

fn bind_tcp(host: &str, port: u16) -> Result<Listener> {
    // The standard library sets SO_REUSEADDR and CLOEXEC.
    let listener = TcpListener::bind(resolve(host, port)?.as_slice()).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => in_use(),
        _ => error,
    })?;
    let port = listener.local_addr()?.port();
    let address = Address::Tcp { host: host.to_owned(), port };
    Ok(Listener::new(OwnedFd::from(listener), address))
}

fn bind_unix(path: &Path, mode: Option<u32>) -> Result<Listener> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory)?;
    // Two processes that start at once must not take each other's fresh socket for a stale one.
    let _lock = lock(directory)?;
    remove_stale(path)?;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the file inherits this mode, so there is no moment in which others could connect.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    let meta = fs::symlink_metadata(path)?;
    let made = Made { path: path.to_owned(), device: meta.dev(), inode: meta.ino() };
    let address = Address::Unix(path.to_owned());
    // From here on dropping removes the file.
    let mut listener = Listener::new(fd, address);
    listener.made = Mutex::new(Some(made));
    if let Some(mode) = mode {
        set_mode(path, mode)?;
    }
    rustix::net::listen(&listener.fd, LISTEN_BACKLOG)?;
    Ok(listener)
}

/// Lets others connect once the socket listens, which it does not yet. Not through a link, should the directory be
/// another's.
fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::Socket {
        return Err(Error::new(ErrorKind::AlreadyExists, "is no longer the socket that was made"));
    }
    // A descriptor of this kind cannot be changed itself, and chmod cannot be told to follow nothing before Linux 6.6.
    fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), fs::Permissions::from_mode(mode))
}

/// Locks a directory against other processes that bind in it, until the result is dropped.
fn lock(directory: &Path) -> Result<File> {
    let file = File::open(directory)?;
    let deadline = Instant::now() + BIND_LOCK_TIMEOUT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(RETRY_PAUSE),
            Err(Errno::AGAIN) => {
                return Err(Error::new(ErrorKind::ResourceBusy, "another process keeps the socket's directory locked"));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if !meta.file_type().is_socket() {
        return Err(Error::new(ErrorKind::AlreadyExists, "exists and is not a socket"));
    }
    match Address::Unix(path.to_owned()).connect(CONNECT_TIMEOUT) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(e) if e.kind() != ErrorKind::TimedOut => Err(e),
        // A full backlog is a living listener too.
        _ => Err(in_use()),
    }
}

/// The same words for each kind of address, and with each C library.
fn in_use() -> Error {
    Error::new(ErrorKind::AddrInUse, "in use: a process listens there")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    const WAIT: Duration = Duration::from_secs(5);

    fn scratch(name: &str) -> (tempfile::TempDir, PathBuf, Address) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(name);
        let address = Address::Unix(path.clone());
        (dir, path, address)
    }

    #[test]
    fn a_connection_passes_through_each_kind_of_listener() {
        let (_dir, _path, unix) = scratch("door.sock");
        for address in [unix, Address::parse("tcp://127.0.0.1:0").expect("an address")] {
            let listener = Listener::bind(&address).expect("binds");
            let client = listener.address().connect(WAIT).expect("connects");
            let server = listener.accept().expect("accepts").expect("not stopped");
            client.send_all(b"hello").expect("sends");
            let mut got = [0; 5];
            server.recv_exact_before(&mut got, Instant::now() + WAIT).expect("receives");
            assert_eq!(&got, b"hello");
        }
    }

    #[test]
    fn tcp_port_0_tells_the_port_it_got_and_keeps_the_host() {
        let listener = Listener::bind(&Address::parse("tcp://localhost:0").expect("an address")).expect("binds");
        let Address::Tcp { host, port } = listener.address() else { panic!("not TCP") };
        assert_eq!(host, "localhost");
        assert_ne!(*port, 0);
    }

    #[test]
    fn a_tcp_port_in_use_is_refused() {
        let first = Listener::bind(&Address::parse("tcp://127.0.0.1:0").expect("an address")).expect("binds");
        let error = Listener::bind(first.address()).expect_err("in use");
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert_eq!(error.to_string(), "in use: a process listens there");
    }

    #[test]
    fn a_stale_socket_is_removed() {
        let (_dir, path, address) = scratch("stale.sock");
        // The standard library leaves the file behind, as a killed process does.
        drop(UnixListener::bind(&path).expect("binds"));
        assert!(path.exists());
        let listener = Listener::bind(&address).expect("binds over the stale one");
        listener.address().connect(WAIT).expect("connects");
    }

    #[test]
    fn a_living_socket_is_refused_and_goes_on() {
        let (_dir, _path, address) = scratch("live.sock");
        let first = Listener::bind(&address).expect("binds");
        let error = Listener::bind(&address).expect_err("in use");
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert_eq!(error.to_string(), "in use: a process listens there");
        let _probe = first.accept().expect("accepts").expect("the probe of the second");
        first.address().connect(WAIT).expect("still there");
    }

    #[test]
    fn a_file_that_is_no_socket_is_kept() {
        let (_dir, path, address) = scratch("file");
        fs::write(&path, "precious").expect("writes");
        let error = Listener::bind(&address).expect_err("refused");
        assert_eq!(error.to_string(), "exists and is not a socket");
        assert_eq!(fs::read(&path).expect("reads"), b"precious");
    }

    #[test]
    fn sockets_and_their_directories_are_the_owners_only_and_go_with_the_listener() {
        let (dir, path, address) = scratch("made/for/door.sock");
        let listener = Listener::bind(&address).expect("binds");
        let mode = |p: &Path| fs::metadata(p).expect("exists").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&dir.path().join("made")), 0o700);
        assert_eq!(mode(&dir.path().join("made/for")), 0o700);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_wished_mode_does_not_depend_on_the_umask() {
        let (_dir, path, address) = scratch("door.sock");
        for wished in [0o660, 0o666, 0o600, 0o622] {
            let at = DoorAt::Bound { address: address.clone(), mode: Some(wished) };
            let listener = Listener::open(&at).expect("binds");
            assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o7777, wished);
            listener.address().connect(WAIT).expect("connects");
        }
    }

    #[test]
    fn a_link_in_the_sockets_place_is_not_followed() {
        let (dir, path, _address) = scratch("door.sock");
        let other = dir.path().join("other");
        fs::write(&other, "").expect("writes");
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).expect("sets");
        std::os::unix::fs::symlink(&other, &path).expect("links");
        assert_eq!(set_mode(&path, 0o666).expect_err("a link").to_string(), "is no longer the socket that was made");
        assert_eq!(fs::metadata(&other).expect("exists").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_passed_socket_is_used_and_left_as_it_was() {
        let (_dir, path, _address) = scratch("passed.sock");
        let theirs = UnixListener::bind(&path).expect("binds");
        for nonblocking in [false, true] {
            theirs.set_nonblocking(nonblocking).expect("sets");
            let number = theirs.as_raw_fd().try_into().expect("not negative");
            let listener = Arc::new(Listener::open(&DoorAt::Inherited(number)).expect("taken"));
            assert_eq!(listener.at().to_string(), format!("fd:{number}"));
            let waiting = thread::spawn({
                let listener = Arc::clone(&listener);
                move || {
                    listener.accept().expect("accepts").expect("not stopped");
                    listener.accept().expect("ends without an error").is_none()
                }
            });
            listener.address().connect(WAIT).expect("connects");
            thread::sleep(RETRY_PAUSE);
            listener.stop();
            assert!(waiting.join().expect("no panic"));
            drop(listener);
            // Its owner goes on with it.
            theirs.set_nonblocking(false).expect("sets");
            let _client = Address::Unix(path.clone()).connect(WAIT).expect("connects");
            theirs.accept().expect("accepts");
        }
    }

    #[test]
    fn a_passed_connection_is_no_listener() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let at = DoorAt::Inherited(a.as_raw_fd().try_into().expect("not negative"));
        let error = Listener::open(&at).expect_err("connected");
        assert_eq!(error.to_string(), "is connected, it does not listen; only export serves one connection");
    }

    #[test]
    fn dropping_a_listener_leaves_a_socket_that_is_not_its_own() {
        let (_dir, path, address) = scratch("moved.sock");
        let first = Listener::bind(&address).expect("binds");
        fs::rename(&path, path.with_extension("old")).expect("moves");
        let second = Listener::bind(&address).expect("binds");
        drop(first);
        second.address().connect(WAIT).expect("still there");
    }

    #[test]
    fn stop_ends_a_blocked_accept() {
        let (_dir, _path, unix) = scratch("door.sock");
        for address in [unix, Address::parse("tcp://127.0.0.1:0").expect("an address")] {
            let listener = Arc::new(Listener::bind(&address).expect("binds"));
            let waiting = thread::spawn({
                let listener = Arc::clone(&listener);
                move || listener.accept().expect("ends without an error").is_none()
            });
            // Whether the thread waits already or not: both must end.
            thread::sleep(RETRY_PAUSE);
            listener.stop();
            assert!(waiting.join().expect("no panic"));
            assert!(listener.accept().expect("stays stopped").is_none());
            // Whoever comes later takes nothing over.
            if let Address::Unix(path) = listener.address().clone() {
                assert!(!path.exists());
                let _later = UnixListener::bind(&path).expect("binds");
                drop(listener);
                assert!(path.exists());
            }
        }
    }

    #[test]
    fn two_processes_that_start_at_once_get_one_socket() {
        let (_dir, path, address) = scratch("race.sock");
        drop(UnixListener::bind(&path).expect("leaves a stale socket"));
        let racers: Vec<_> = (0..8)
            .map(|_| {
                let address = address.clone();
                thread::spawn(move || Listener::bind(&address))
            })
            .collect();
        let bound: Vec<_> = racers.into_iter().filter_map(|r| r.join().expect("no panic").ok()).collect();
        assert_eq!(bound.len(), 1);
    }
}
