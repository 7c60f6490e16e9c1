//! What the long-running commands were asked for: the command line writes it, `serve.rs` reads it.

use std::path::{Path, PathBuf};

use crate::disk::{Cache, server_of};
use crate::domain::{Disk, Source};
use crate::door_at::{DoorAt, given_twice};
use crate::error::Problem;
use crate::vmm::Vmm;

/// What `serve` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeOptions {
    /// The guest.
    pub guest: String,
    /// Its disks, at least one, names and files all different; none yet where a domain XML is to be read.
    pub disks: Vec<Disk>,
    /// The libvirt domain XML that names the disks.
    pub domain_xml: Option<PathBuf>,
    /// Where the record is kept.
    pub state: PathBuf,
    /// The record may be kept where a restart of the host loses it.
    pub volatile_state: bool,
    /// The guest doors, at least one.
    pub nbd: Vec<DoorAt>,
    /// The migration door.
    pub listen: Option<DoorAt>,
    /// The control doors that are sockets.
    pub control: Vec<DoorAt>,
    /// The control doors that are virtio ports, by name, each once; with the sockets at least one.
    pub control_ports: Vec<String>,
    /// What moves the guest's memory and devices.
    pub vmm: Vmm,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// The ready line is JSON.
    pub json: bool,
}

impl ServeOptions {
    /// Of guest g1, with its state below `directory` and no door.
    #[cfg(test)]
    pub(crate) fn in_directory(directory: &std::path::Path, disks: Vec<Disk>, volatile_state: bool) -> Self {
        Self {
            guest: "g1".to_owned(),
            disks,
            domain_xml: None,
            state: directory.join("state"),
            volatile_state,
            nbd: Vec::new(),
            listen: None,
            control: Vec::new(),
            control_ports: Vec::new(),
            vmm: Vmm::None,
            insecure_plaintext: true,
            json: false,
        }
    }

    /// Checks what only the host can answer: whether every TCP door stays on it, or may leave it,
    /// and what was passed on is a socket.
    ///
    /// # Errors
    /// A refusal.
    pub fn check(&self) -> Result<(), Problem> {
        let doors = self.nbd.iter().chain(&self.listen).chain(&self.control);
        if let Some(door) = given_twice(doors.clone()) {
            return Err(Problem::usage("serve", door, "is given twice"));
        }
        doors.into_iter().try_for_each(|door| door.check_plaintext("serve", self.insecure_plaintext))?;
        let files = self.disks.iter().filter_map(|disk| match &disk.source {
            Source::File { path, .. } => Some(path.as_path()),
            Source::External | Source::Empty => None,
        });
        check_servers("serve", files, self.insecure_plaintext)
    }
}

/// What `export` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// What to serve, at least one, names all different.
    pub files: Vec<ExportFile>,
    /// Where, at least one.
    pub nbd: Vec<DoorAt>,
    /// Clients cannot write.
    pub read_only: bool,
    /// How the host's page cache is used.
    pub cache: Cache,
    /// When to end.
    pub lifetime: Lifetime,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// The ready line is JSON.
    pub json: bool,
}

/// One file and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportFile {
    /// The export's name; empty: the default export.
    pub name: String,
    /// A file or a block device.
    pub path: PathBuf,
}

/// When an export ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lifetime {
    /// Never.
    #[default]
    Persistent,
    /// When its last client has gone.
    Once,
}

impl ExportOptions {
    /// Checks what only the host can answer: whether every TCP door stays on it, or may leave it,
    /// and what was passed on is a socket.
    ///
    /// # Errors
    /// A refusal.
    pub fn check(&self) -> Result<(), Problem> {
        if let Some(door) = given_twice(self.nbd.iter()) {
            return Err(Problem::usage("export", door, "is given twice"));
        }
        self.nbd.iter().try_for_each(|door| door.check_plaintext("export", self.insecure_plaintext))?;
        check_servers("export", self.files.iter().map(|file| file.path.as_path()), self.insecure_plaintext)
    }
}

/// Checks the servers among the disks: they are on this host too, or may be elsewhere.
fn check_servers<'a>(
    operation: &'static str,
    files: impl Iterator<Item = &'a Path>,
    insecure_plaintext: bool,
) -> Result<(), Problem> {
    for path in files {
        if let Some(uri) = server_of(path).map_err(|cause| Problem::refused(operation, path.display(), cause))? {
            uri.address.check_plaintext(operation, insecure_plaintext)?;
        }
    }
    Ok(())
}
