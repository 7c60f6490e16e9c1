//! Holds the record of this process and makes each change durable before anybody sees it.

use std::fmt;
use std::io;

use super::{Answer, Attempt, Change, Door, Event, Host, Promise, Record, Refusal, Stamp, Step, Why, next, promise};
use crate::error::reason;

/// What a keeper asks of whoever keeps records through a power loss.
#[derive(Debug, Clone, Copy)]
pub enum Write<'a> {
    /// Write these under temporary names, synced and read back, so that a commit of one of them needs neither room nor
    /// time; they replace those that were written ahead before. When it fails nothing has changed.
    Ahead(&'a [Record]),
    /// This is the record now, or there is none: return only when that survives a power loss (rule M4: temporary name,
    /// fsync, verify, rename, fsync the directory).
    Commit(Option<&'a Record>),
}

/// Does what a keeper asks.
pub type Save = Box<dyn FnMut(Write<'_>) -> io::Result<()> + Send>;

/// The record of this process, one thread at a time: who decides given, abort and cancel holds it (rule M3).
///
/// M4: a commit that failed leaves the state *unknown*. The file may hold the old record or the new one, so this host
/// serves nothing, answers nobody and sends no GO until [`Keeper::retry`] has made the new one durable.
pub struct Keeper {
    host: Host,
    record: Option<Record>,
    /// Why it is not known whether `record` is what is on the disk; `None` when it is.
    unknown: Option<String>,
    /// There is a record that owns nothing (rule M7), and why. It stays as it is until the operator throws it away.
    rejected: Option<String>,
    /// How often the record has changed.
    changes: u64,
    save: Save,
}

impl Keeper {
    /// Takes over the record that was found at start. Nothing is answered before [`Keeper::start`].
    #[must_use]
    pub fn new(host: Host, found: Option<Record>, save: Save) -> Self {
        let unknown = Some("it has not been written since the start".to_owned());
        Self { host, record: found, unknown, rejected: None, changes: 0, save }
    }

    /// M7: what was found at start is broken or foreign, for this reason. It owns nothing and is not touched, and
    /// nothing takes its place but a claim that throws it away.
    #[must_use]
    pub fn without(host: Host, rejected: String, save: Save) -> Self {
        Self { host, record: None, unknown: None, rejected: Some(rejected), changes: 0, save }
    }

    /// Why the record that was found counts for nothing.
    #[must_use]
    pub fn rejected(&self) -> Option<&str> {
        self.rejected.as_deref()
    }

    /// A number that rises with every change of the record, and with every commit that fails.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// M4: the record as it was found is written again, with what the restart makes of it, before anybody is answered.
    ///
    /// # Errors
    /// [`KeepError::Unknown`]: it could not be written.
    pub fn start(&mut self) -> Result<(), KeepError> {
        if self.rejected.is_some() {
            return Ok(());
        }
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
        let step = self.next(event)?;
        match step.change {
            Change::Keep => return Ok(step.answer),
            Change::Become(record) => self.record = Some(*record),
            Change::Remove => self.record = None,
        }
        self.rejected = None;
        self.write()?;
        Ok(step.answer)
    }

    fn next(&self, event: &Event) -> Result<Step, KeepError> {
        if self.rejected.is_none() {
            return next(self.host, self.known()?, event).map_err(KeepError::Refused);
        }
        match event {
            Event::Claim { discard: true, .. } => next(self.host, None, event).map_err(KeepError::Refused),
            Event::Forget { .. } => Ok(Step { change: Change::Remove, answer: Answer::Silent }),
            Event::Restart | Event::Meet { .. } => Ok(Step { change: Change::Keep, answer: Answer::Silent }),
            _ => Err(KeepError::Refused(Refusal { why: Why::Foreign, record: None })),
        }
    }

    /// Writes ahead what the record becomes on each of `ways`, one event after the other, as far as the rules let them
    /// happen: a full disk fails here, where nothing depends on it yet, and the commits take no longer than they must.
    ///
    /// # Errors
    /// The system's word. Nothing has changed.
    pub fn write_ahead(&mut self, ways: &[&[Event]]) -> io::Result<()> {
        let mut records: Vec<Record> = Vec::new();
        for way in ways {
            let mut record = self.known().map_err(io::Error::other)?.cloned();
            for event in *way {
                match next(self.host, record.as_ref(), event).map(|step| step.change) {
                    Ok(Change::Become(becomes)) => {
                        record = Some((*becomes).clone());
                        if !records.contains(&becomes) {
                            records.push(*becomes);
                        }
                    }
                    Ok(Change::Keep) => {}
                    Ok(Change::Remove) | Err(_) => break,
                }
            }
        }
        if records.is_empty() { Ok(()) } else { (self.save)(Write::Ahead(&records)) }
    }

    /// What was written ahead is not wanted any more.
    ///
    /// # Errors
    /// The system's word. Nothing has changed.
    pub fn forget_ahead(&mut self) -> io::Result<()> {
        (self.save)(Write::Ahead(&[]))
    }

    /// Writes the record whose commit failed once more. Does nothing when none did.
    ///
    /// # Errors
    /// [`KeepError::Unknown`]: it failed again.
    pub fn retry(&mut self) -> Result<(), KeepError> {
        if self.unknown.is_none() { Ok(()) } else { self.write() }
    }

    fn write(&mut self) -> Result<(), KeepError> {
        self.changes += 1;
        self.unknown = (self.save)(Write::Commit(self.record.as_ref())).err().map(|e| reason(&e));
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
