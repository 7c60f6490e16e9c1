//! Holds the record of this process and makes each change durable before anybody sees it.

use std::fmt;
use std::io;

use super::{Answer, Attempt, Change, Door, Event, Host, Promise, Record, Refusal, Stamp, next, promise};

/// Writes a record, or removes it, so that it survives a power loss; returns only when it is so (rule M4: temporary
/// name, fsync, verify, rename, fsync the directory).
pub type Save = Box<dyn FnMut(Option<&Record>) -> io::Result<()> + Send>;

/// The record of this process, one thread at a time: who decides given, abort and cancel holds it (rule M3).
///
/// M4: a commit that failed leaves the state *unknown*. The file may hold the old record or the new one, so this host
/// serves nothing, answers nobody and sends no GO until [`Keeper::retry`] has made the new one durable.
pub struct Keeper {
    host: Host,
    record: Option<Record>,
    /// Why it is not known whether `record` is what is on the disk; `None` when it is.
    unknown: Option<String>,
    save: Save,
}

impl Keeper {
    /// Takes over the record that was found at start. Nothing is answered before [`Keeper::start`].
    #[must_use]
    pub fn new(host: Host, found: Option<Record>, save: Save) -> Self {
        Self { host, record: found, unknown: Some("it has not been written since the start".to_owned()), save }
    }

    /// A keeper that starts without a record and loses it with the process: for tests, and until there is a store.
    #[must_use]
    pub fn volatile(host: Host) -> Self {
        Self { host, record: None, unknown: None, save: Box::new(|_| Ok(())) }
    }

    /// M4: the record as it was found is written again, with what the restart makes of it, before anybody is answered.
    ///
    /// # Errors
    /// [`KeepError::Unknown`]: it could not be written.
    pub fn start(&mut self) -> Result<(), KeepError> {
        let step = next(self.host, self.record.as_ref(), &Event::Restart).map_err(KeepError::Refused)?;
        if let Change::Become(record) = step.change {
            self.record = Some(*record);
        }
        self.write()
    }

    /// Lets `event` happen: the record changes and is durable, then the answer is returned to be sent.
    ///
    /// # Errors
    /// [`KeepError::Refused`]: nothing has changed. [`KeepError::Unknown`]: the change could not be made durable, now
    /// or in an earlier call.
    pub fn apply(&mut self, event: &Event) -> Result<Answer, KeepError> {
        let step = next(self.host, self.known()?, event).map_err(KeepError::Refused)?;
        match step.change {
            Change::Keep => return Ok(step.answer),
            Change::Become(record) => self.record = Some(*record),
            Change::Remove => self.record = None,
        }
        self.write()?;
        Ok(step.answer)
    }

    /// Writes the record whose commit failed once more. Does nothing when none did.
    ///
    /// # Errors
    /// [`KeepError::Unknown`]: it failed again.
    pub fn retry(&mut self) -> Result<(), KeepError> {
        if self.unknown.is_none() { Ok(()) } else { self.write() }
    }

    fn write(&mut self) -> Result<(), KeepError> {
        self.unknown = (self.save)(self.record.as_ref()).err().map(|e| e.to_string());
        self.known().map(|_| ())
    }

    /// The durable record; `Ok(None)`: there is none.
    ///
    /// # Errors
    /// [`KeepError::Unknown`] after a commit that failed.
    pub fn known(&self) -> Result<Option<&Record>, KeepError> {
        match &self.unknown {
            None => Ok(self.record.as_ref()),
            Some(cause) => Err(KeepError::Unknown(cause.clone())),
        }
    }

    /// What to answer to a sealed destination that asks for an attempt (rule M3); `live` is the attempt that this
    /// process is in the middle of.
    ///
    /// # Errors
    /// [`KeepError::Unknown`] after a commit that failed: nothing may be answered.
    pub fn promise(&self, live: Option<Attempt>, asked: &Stamp) -> Result<Promise, KeepError> {
        Ok(promise(self.host, self.known()?, live, asked))
    }

    /// What the guest door must do now.
    #[must_use]
    pub fn gate_state(&self) -> Door {
        self.known().map_or(Door::Fenced, |record| Door::of(self.host, record))
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("record", &self.record).field("unknown", &self.unknown).finish_non_exhaustive()
    }
}

/// Why the record did not change as asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeepError {
    /// The rules refuse it.
    Refused(Refusal),
    /// It is not known what is on the disk: who owns is not known from here (exit code 5).
    Unknown(String),
}

impl fmt::Display for KeepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Unknown(cause) => {
                write!(f, "the ownership record is not durable: {cause}: who owns is not known until it is")
            }
        }
    }
}

impl std::error::Error for KeepError {}
