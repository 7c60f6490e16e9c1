//! Lines over a virtio port. Found by its name; `main` reads and answers. A host end that is closed is waited for.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long the port may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often one whose other end is closed is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Longest line.
const LINE_MAX: usize = 4096;

/// An open port.
pub(crate) struct Port {
    file: File,
    /// What has come and is no whole line yet.
    inbox: Vec<u8>,
}

/// Waits for the port of that name and opens it.
pub(crate) fn open(name: &str) -> Result<Port, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(node) = find(name) {
            let file = OpenOptions::new().read(true).write(true).open(&node);
            return file.map(|file| Port { file, inbox: Vec::new() }).map_err(|error| error.to_string());
        }
        if Instant::now() > deadline {
            return Err("did not appear".to_owned());
        }
        thread::sleep(LOOK);
    }
}

fn find(name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let mut named =
        entries.filter(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == name));
    named.next().map(|entry| Path::new("/dev").join(entry.file_name()))
}

impl Port {
    /// The next line; `None` when the port is gone.
    pub(crate) fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.inbox.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.inbox.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim().to_owned());
            }
            let mut bytes = [0; 256];
            match self.file.read(&mut bytes) {
                // The other end is closed: what it began to say it will not end.
                Ok(0) => {
                    self.inbox.clear();
                    thread::sleep(LOOK);
                }
                Ok(count) if self.inbox.len() + count <= LINE_MAX => self.inbox.extend(&bytes[..count]),
                Ok(_) => self.inbox.clear(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Says a whole line. Who does not listen any more does not hear it.
    pub(crate) fn say(&mut self, line: &str) {
        let _ = self.file.write_all(line.as_bytes());
    }
}
