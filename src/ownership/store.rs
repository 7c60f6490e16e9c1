//! The state directory: what keeps a guest's record through the end of a process, of the host's power and of the room
//! on its disk (rule M4).
//!
//! | file | what it is |
//! |---|---|
//! | `lock` | locked by the process that serves the guest, as long as it lives |
//! | `id` | the directory's random number, one half of the [`Host`] (see `host.rs`) |
//! | `record` | the record, in the form of `file.rs`; missing: there is none |
//! | `journal` | what migrations have put on the disks, in the form of `journal.rs`; missing: nothing |
//! | `record.ATTEMPT.N.tmp`, `journal.ATTEMPT.N.tmp` | on its way. Never read; deleted at start, and with its attempt |
//!
//! A commit writes a temporary file, syncs it, reads it back, renames it and syncs the directory. The first three can
//! be done ahead for records that will be wanted when there is no time or perhaps no room left ([`Write::Ahead`]): then
//! the commit is a rename and a sync of the directory. The journal is committed in the same way (`store/journal.rs`).

mod journal;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::file::{self, Content};
use super::images::ImageList;
use super::volatile::is_volatile;
use super::{Attempt, Host, Images, Journal, Moving, Offer, Receipt, Record, State, Write, host};
use crate::error::reason;
use crate::limits::{MOVING_FILE_MAX, RECEIPT_FILE_MAX, RECORD_FILE_MAX, RESTART_PATIENCE, RETRY_PAUSE};

const LOCK: &str = "lock";
const ID: &str = "id";
const RECORD: &str = "record";
const JOURNAL: &str = "journal";
const RECEIPT: &str = "receipt";
const MOVING: &str = "moving";
/// What ends the name of a file that is nothing yet.
const TEMPORARY: &str = ".tmp";
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// A state directory that this process has locked.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    _lock: File,
    host: Host,
    /// The images that records may speak of, found by their fingerprint.
    lists: Vec<ImageList>,
    ahead: Vec<Ahead>,
    /// What this process knows of the journal.
    journal: Option<Journal>,
    /// A journal that is on the disk under a temporary name.
    journal_ahead: Option<(String, Vec<u8>)>,
    /// The journal lives as long as the process.
    volatile: bool,
    /// Temporary files that nobody wants any more and that could not be removed, on a disk that took no change.
    left: Vec<String>,
    /// Makes names of temporary files differ.
    serial: u64,
}

/// A record that is on the disk under a temporary name.
#[derive(Debug)]
struct Ahead {
    name: String,
    record: Record,
    bytes: Vec<u8>,
}

/// What a state directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No record.
    Nothing,
    /// A whole record of this host. Whether the images are its own is for the caller to see.
    Record(Box<Content>),
    /// Something that owns nothing (rule M7).
    Rejected {
        /// Why it counts for nothing: "is broken: ...".
        why: String,
        /// What there is of it, for the operator who may throw it away.
        shown: String,
    },
}

impl Store {
    /// Makes the directory where it is missing, locks it, and clears away what an earlier process left unfinished.
    /// `volatile`: the record may be lost with the host's power.
    ///
    /// # Errors
    /// One line: another process has it, it does not outlive the host, or the system's word.
    pub fn open(directory: &Path, volatile: bool) -> Result<Self, String> {
        let said = |error: io::Error| reason(&error);
        make(directory).map_err(said)?;
        let lock = open_lock(&directory.join(LOCK)).map_err(said)?;
        let deadline = Instant::now() + RESTART_PATIENCE;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                // Whoever only looks holds it for a moment, a process that was killed until the kernel is done with it.
                Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(RETRY_PAUSE),
                Err(Errno::AGAIN) => return Err("in use: another process serves the guest from it".to_owned()),
                Err(error) => return Err(said(error.into())),
            }
        }
        if !volatile && let Some(why) = is_volatile(directory).map_err(said)? {
            return Err(format!(
                "{why}: a record there is lost with the host's power, and with it who owns the guest \
                 (--state names another directory, --volatile-state takes the risk)"
            ));
        }
        clear(directory).map_err(said)?;
        let id = match read_id(directory)? {
            Some(id) => id,
            None => make_id(directory).map_err(said)?,
        };
        let host = host::on_this_machine(id);
        let directory = directory.to_owned();
        Ok(Self {
            directory,
            _lock: lock,
            host,
            lists: Vec::new(),
            ahead: Vec::new(),
            journal: None,
            journal_ahead: None,
            volatile,
            left: Vec::new(),
            serial: 0,
        })
    }

    /// This host, as it stands in the records of this directory.
    #[must_use]
    pub fn host(&self) -> Host {
        self.host
    }

    /// Reads the record.
    ///
    /// # Errors
    /// It cannot be read: nothing is known. What *is* read and is no record of this host is [`Found::Rejected`].
    pub fn load(&mut self) -> io::Result<Found> {
        let found = find(&self.directory, self.host)?;
        if let Found::Record(content) = &found {
            self.speak_of(&content.images);
        }
        Ok(found)
    }

    /// The receipt of the last hand-over, if there is one.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        find_receipt(&self.directory)
    }

    /// Keeps the receipt of a hand-over in the place of the one before.
    ///
    /// # Errors
    /// The system's word: there is the one before, or this one.
    pub fn keep_receipt(&self, receipt: &Receipt) -> io::Result<()> {
        self.keep(RECEIPT, &receipt.encode())
    }

    /// The guest that moves, if a process of this directory has seen one begin and none its end.
    #[must_use]
    pub fn moving(&self) -> Option<Moving> {
        Moving::decode(&read_small(&self.directory.join(MOVING), MOVING_FILE_MAX)?)
    }

    /// Keeps that a guest moves, or that none does any more.
    ///
    /// # Errors
    /// The system's word.
    pub fn keep_moving(&self, moving: Option<&Moving>) -> io::Result<()> {
        match moving {
            Some(moving) => self.keep(MOVING, &moving.encode()),
            None => match fs::remove_file(self.directory.join(MOVING)) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }

    /// Puts a file of that name in the place of the one before, durable.
    fn keep(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.directory.join(format!("{name}{TEMPORARY}"));
        write_whole(&temporary, bytes)?;
        fs::rename(temporary, self.directory.join(name))?;
        sync_directory(&self.directory)
    }

    /// Says which images the records to come may speak of.
    pub fn speak_of(&mut self, images: &ImageList) {
        if !self.lists.contains(images) {
            self.lists.push(images.clone());
        }
    }

    /// The images with that fingerprint, if they are known.
    #[must_use]
    pub fn images(&self, fingerprint: Images) -> Option<&ImageList> {
        self.lists.iter().find(|list| list.fingerprint() == fingerprint)
    }

    /// What a keeper asks for.
    ///
    /// # Errors
    /// After [`Write::Ahead`] nothing has changed. After [`Write::Commit`] it is not known what a restart would find.
    pub fn write(&mut self, write: &Write<'_>) -> io::Result<()> {
        match write {
            Write::Ahead(records) => self.write_ahead(records),
            Write::Commit(record) => self.commit(*record),
        }
    }

    fn write_ahead(&mut self, records: &[Record]) -> io::Result<()> {
        let mut fresh: Vec<Ahead> = Vec::new();
        let mut wanted = Vec::new();
        for record in records {
            let bytes = self.bytes(record);
            if !self.ahead.iter().chain(&fresh).any(|ahead| ahead.bytes == bytes) {
                match self.write_temporary(record, &bytes) {
                    Ok(name) => fresh.push(Ahead { name, record: record.clone(), bytes: bytes.clone() }),
                    Err(error) => {
                        self.remove(fresh);
                        return Err(error);
                    }
                }
            }
            wanted.push(bytes);
        }
        self.ahead.append(&mut fresh);
        let (kept, left) = std::mem::take(&mut self.ahead).into_iter().partition(|ahead| wanted.contains(&ahead.bytes));
        self.ahead = kept;
        self.remove(left);
        Ok(())
    }

    /// M4. Whatever fails here, and wherever: only a later commit that succeeds makes the record known again.
    fn commit(&mut self, record: Option<&Record>) -> io::Result<()> {
        let place = self.directory.join(RECORD);
        if let Some(record) = record {
            let bytes = self.bytes(record);
            let name = match self.ahead.iter().position(|ahead| ahead.bytes == bytes) {
                Some(at) => self.ahead.swap_remove(at).name,
                None => self.write_temporary(record, &bytes)?,
            };
            if let Err(error) = fs::rename(self.directory.join(&name), place) {
                self.left.push(name);
                return Err(error);
            }
        } else {
            match fs::remove_file(place) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_directory(&self.directory)?;
        let ahead = std::mem::take(&mut self.ahead);
        let (kept, left) =
            ahead.into_iter().partition(|ahead| record.is_some_and(|now| may_follow(now, &ahead.record)));
        self.ahead = kept;
        self.remove(left);
        Ok(())
    }

    fn bytes(&self, record: &Record) -> Vec<u8> {
        let images = self.images(record.images).cloned().unwrap_or_default();
        file::encode(&Content { record: record.clone(), images })
    }

    /// Writes, syncs and reads back; what fails leaves no file behind.
    fn write_temporary(&mut self, record: &Record, bytes: &[u8]) -> io::Result<String> {
        self.write_temporary_of(RECORD, record.attempt().unwrap_or(Attempt::NONE), bytes)
    }

    fn write_temporary_of(&mut self, what: &str, attempt: Attempt, bytes: &[u8]) -> io::Result<String> {
        self.serial += 1;
        let name = format!("{what}.{attempt}.{}{TEMPORARY}", self.serial);
        write_whole(&self.directory.join(&name), bytes)?;
        Ok(name)
    }

    /// Removes what nobody wants any more, also what could not be removed the last time.
    fn remove(&mut self, ahead: Vec<Ahead>) {
        self.left.extend(ahead.into_iter().map(|ahead| ahead.name));
        let directory = &self.directory;
        self.left.retain(|name| match fs::remove_file(directory.join(name)) {
            Ok(()) => false,
            Err(error) => error.kind() != ErrorKind::NotFound,
        });
    }
}

/// Whether a record that was written ahead may still be wanted: an attempt that has ended never lives again.
fn may_follow(now: &Record, ahead: &Record) -> bool {
    let ways = (&now.state, &ahead.state);
    now.attempt() == ahead.attempt()
        && matches!(
            ways,
            (State::Receiving { .. } | State::Offered { offer: Offer::Live, .. }, _)
                | (State::Sealed { .. }, State::Owner { .. } | State::Void { .. })
                | (State::Offered { .. }, State::Owner { .. })
                | (State::Given { arrived: false, .. }, State::Given { arrived: true, .. })
        )
}

/// A state directory as whoever only asks sees it.
#[derive(Debug)]
pub struct Look {
    /// A process holds it.
    pub held: bool,
    /// What is in it.
    pub found: Found,
    /// The last receipt, if there is one.
    pub receipt: Option<Receipt>,
}

/// Looks into a state directory and changes nothing there, whoever holds it.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn look(directory: &Path) -> Result<Look, String> {
    let said = |error: io::Error| reason(&error);
    let lock = File::open(directory.join(LOCK)).map_err(said)?;
    let held = flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::AGAIN);
    let id = read_id(directory)?.ok_or("it has no id yet")?;
    let found = find(directory, host::on_this_machine(id)).map_err(said)?;
    Ok(Look { held, found, receipt: find_receipt(directory) })
}

/// Reads the record of `host`.
fn find(directory: &Path, host: Host) -> io::Result<Found> {
    let mut bytes = Vec::new();
    match File::open(directory.join(RECORD)) {
        Ok(file) => file.take(RECORD_FILE_MAX as u64 + 1).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    Ok(match file::decode(&bytes) {
        Ok(content) if content.record.host != host => {
            let why =
                format!("is of another machine or directory (host {:.8}; this is {host:.8})", content.record.host);
            Found::Rejected { why, shown: show(&content.record) }
        }
        Ok(content) => Found::Record(Box::new(content)),
        Err(broken) => Found::Rejected { why: format!("is broken: {broken}"), shown: format!("{} bytes", bytes.len()) },
    })
}

/// Reads the receipt; one that cannot be read is none.
fn find_receipt(directory: &Path) -> Option<Receipt> {
    Receipt::decode(&read_small(&directory.join(RECEIPT), RECEIPT_FILE_MAX)?)
}

/// What is in a file, a byte more than it may be long at most.
fn read_small(path: &Path, bytes_max: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(bytes_max as u64 + 1).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// A record in one line, with all that tells it from others.
#[must_use]
pub fn show(record: &Record) -> String {
    let mut text =
        format!("order={} lineage={} host={} word={}", record.order, record.lineage, record.host, record.word);
    if let Some(attempt) = record.attempt() {
        text.push_str(&format!(" attempt={attempt}"));
    }
    format!("{text}: {record}")
}

fn make(directory: &Path) -> io::Result<()> {
    let missing: Vec<&Path> =
        directory.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists()).collect();
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory)?;
    for made in missing {
        let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(parent.unwrap_or(Path::new(".")))?;
    }
    Ok(())
}

/// Opens the lock's file for reading only: one that is open for writing would keep the file system from becoming
/// read-only.
fn open_lock(path: &Path) -> io::Result<File> {
    match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            drop(OpenOptions::new().write(true).create(true).truncate(false).mode(FILE_MODE).open(path)?);
            File::open(path)
        }
        opened => opened,
    }
}

/// Deletes what was never finished.
fn clear(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| {
            let begins = [RECORD, RECEIPT, MOVING, JOURNAL, ID].iter().any(|what| name.starts_with(what));
            begins && name.ends_with(TEMPORARY)
        });
        if ours {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn read_id(directory: &Path) -> Result<Option<Host>, String> {
    match fs::read_to_string(directory.join(ID)) {
        Ok(text) => match Host::from_hex(text.trim_end()) {
            Some(id) => Ok(Some(id)),
            None => Err(format!("{ID}: is broken; a record that was made with it owns nothing without it")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{ID}: {}", reason(&error))),
    }
}

fn make_id(directory: &Path) -> io::Result<Host> {
    let id = Host::random().map_err(io::Error::other)?;
    let temporary = directory.join(format!("{ID}{TEMPORARY}"));
    write_whole(&temporary, format!("{id}\n").as_bytes())?;
    fs::rename(temporary, directory.join(ID))?;
    sync_directory(directory)?;
    Ok(id)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let written = write_and_read_back(path, bytes);
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

fn write_and_read_back(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    file.rewind()?;
    let mut back = Vec::with_capacity(bytes.len());
    file.take(bytes.len() as u64 + 1).read_to_end(&mut back)?;
    if back == bytes { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidData, "it reads back differently")) }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests;
