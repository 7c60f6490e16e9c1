//! A virtio-serial port: found by its name, opened, read and written without ever waiting for longer than asked.
//!
//! Used by [`crate::control::port_door`] and, for its bytes, by [`crate::control::link`]. It creates nothing: the
//! driver makes the entries in /sys and (with devtmpfs) in /dev. The port is one pipe of bytes with two states that the
//! host chooses, open and closed, and no boundary between two hosts' programs that come one after the other.

use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::socket;

/// Where the driver lists its ports, each a folder with a file `name`.
const LISTED: &str = "/sys/class/virtio-ports";
/// Where their nodes are, under the same names.
const NODES: &str = "/dev";

/// An open port.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
}

impl Port {
    /// Finds the port of that name and opens it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such port (yet), [`Errno::BUSY`] when another process has it, or the
    /// system's error.
    pub fn open(name: &str) -> Result<Self> {
        let node = find(Path::new(LISTED), Path::new(NODES), name)?;
        log::debug!("control: virtio:{name}: is {}", node.display());
        Self::open_node(&node)
    }

    fn open_node(node: &Path) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::open(node, flags, Mode::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::CharacterDevice => Ok(Self { fd }),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("{} is not a device", node.display()))),
        }
    }

    /// Takes over what behaves like a port: a non-blocking descriptor.
    #[cfg(test)]
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Reads what is there without waiting: `None` when nothing is, 0 when nothing is and the host's end is closed.
    ///
    /// # Errors
    /// The port is gone (unplugged).
    pub fn recv_nowait(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                // A terminal that stands in for a port says it so.
                Err(Errno::PIPE | Errno::IO) => return Ok(Some(0)),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Writes what the host takes at once; `None` when it takes nothing now.
    ///
    /// # Errors
    /// [`ErrorKind::BrokenPipe`] when the host's end is closed: nobody is going to take it. Else the port is gone.
    pub fn send_nowait(&self, bytes: &[u8]) -> Result<Option<usize>> {
        loop {
            match rustix::io::write(&self.fd, bytes) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !self.is_closed() => return Ok(None),
                Err(Errno::AGAIN | Errno::PIPE | Errno::IO) => return Err(ErrorKind::BrokenPipe.into()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until the port can be read or written as asked, its host end is closed, or the time is up.
    ///
    /// # Errors
    /// The system's error for poll itself.
    pub fn wait(&self, read: bool, write: bool, timeout: Option<Duration>) -> Result<()> {
        socket::wait(&self.fd, read, write, timeout).map(drop)
    }

    /// Whether the host's end is closed now. One that was closed and is open again is not told.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        socket::has_hung_up(&self.fd)
    }
}

/// The node of the port of that name; of several the first.
fn find(listed: &Path, nodes: &Path, name: &str) -> Result<PathBuf> {
    let none = || Error::new(ErrorKind::NotFound, "there is no such port");
    let entries = match fs::read_dir(listed) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(Error::new(ErrorKind::NotFound, "there are no virtio ports (is virtio_console loaded?)"));
        }
        Err(e) => return Err(e),
    };
    // A port that is unplugged while we look has no name any more.
    let is_it = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim_end_matches('\n') == name)
    };
    let found = entries.filter_map(|entry| entry.ok().filter(is_it)).map(|entry| entry.file_name()).min();
    found.map(|node| nodes.join(node)).ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_port_is_found_by_its_name_and_nothing_is_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let (listed, nodes) = (dir.path().join("virtio-ports"), dir.path().join("dev"));
        let error = |name: &str| find(&listed, &nodes, name).expect_err("not there").to_string();
        assert_eq!(error("org.x.0"), "there are no virtio ports (is virtio_console loaded?)");
        for (port, name) in [("vport1p1", "org.x.0\n"), ("vport1p2", "org.x.01\n"), ("vport0p9", "org.x.0\n")] {
            fs::create_dir_all(listed.join(port)).expect("a folder");
            fs::write(listed.join(port).join("name"), name).expect("its name");
        }
        fs::create_dir(listed.join("vport2p1")).expect("a port without a name");
        assert_eq!(find(&listed, &nodes, "org.x.0").expect("there"), nodes.join("vport0p9"));
        assert_eq!(find(&listed, &nodes, "org.x.01").expect("there"), nodes.join("vport1p2"));
        assert_eq!(error("org.x"), "there is no such port");
        assert_eq!(error(""), "there is no such port");

        let node = nodes.join("vport0p9");
        let missing = Port::open_node(&node).expect_err("not made");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert!(!nodes.exists());
        fs::create_dir(&nodes).expect("a folder");
        fs::write(&node, "").expect("a file");
        let file = Port::open_node(&node).expect_err("a file is no port");
        assert_eq!(file.to_string(), format!("{} is not a device", node.display()));
        fs::remove_file(&node).expect("removed");
        symlink("/dev/null", &node).expect("a device");
        Port::open_node(&node).expect("opens");
    }
}
