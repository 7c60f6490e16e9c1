//! The journal's file in the state directory: committed as the record is, and read once at the start.
//!
//! With `--volatile-state` there is no file: what a process has made, the next one does not know.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};

use super::{JOURNAL, Journal, Store, sync_directory};
use crate::error::reason;
use crate::limits::JOURNAL_FILE_MAX;

impl Store {
    /// Reads the journal. What it says counts only if it [fits](Journal::fits) the record.
    ///
    /// # Errors
    /// One line: there is one that cannot be read or is broken. Nothing of what it may have listed is known.
    pub fn load_journal(&mut self) -> Result<Option<&Journal>, String> {
        if !self.volatile {
            let mut bytes = Vec::new();
            match File::open(self.directory.join(JOURNAL)) {
                Ok(file) => {
                    let read = file.take(JOURNAL_FILE_MAX as u64 + 1).read_to_end(&mut bytes);
                    read.map_err(|error| reason(&error))?;
                    self.journal = Some(Journal::decode(&bytes).map_err(|broken| broken.to_string())?);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(reason(&error)),
            }
        }
        Ok(self.journal())
    }

    /// The journal as it was last read or committed.
    #[must_use]
    pub fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    /// Writes a journal under a temporary name, so that its commit needs neither room nor time.
    ///
    /// # Errors
    /// The system's. Nothing has changed.
    pub fn write_journal_ahead(&mut self, journal: &Journal) -> io::Result<()> {
        let bytes = journal.encode()?;
        self.remove_journal_ahead();
        if !self.volatile {
            let name = self.write_temporary_of(JOURNAL, journal.attempt, &bytes)?;
            self.journal_ahead = Some((name, bytes));
        }
        Ok(())
    }

    /// Makes this the journal, or none: returns when that survives a power loss (M4).
    ///
    /// # Errors
    /// The system's. A restart finds this one or the one before.
    pub fn write_journal(&mut self, journal: Option<Journal>) -> io::Result<()> {
        let place = self.directory.join(JOURNAL);
        match journal.as_ref().filter(|_| !self.volatile) {
            Some(journal) => {
                let bytes = journal.encode()?;
                let name = match self.journal_ahead.take_if(|(_, ahead)| *ahead == bytes) {
                    Some((name, _)) => name,
                    None => self.write_temporary_of(JOURNAL, journal.attempt, &bytes)?,
                };
                fs::rename(self.directory.join(name), place)?;
                sync_directory(&self.directory)?;
            }
            None => match fs::remove_file(place) {
                Ok(()) => sync_directory(&self.directory)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
        }
        self.journal = journal;
        self.remove_journal_ahead();
        Ok(())
    }

    /// What was written ahead is not wanted any more.
    pub fn remove_journal_ahead(&mut self) {
        if let Some((name, _)) = self.journal_ahead.take() {
            let _ = fs::remove_file(self.directory.join(name));
        }
    }
}
