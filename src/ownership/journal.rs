//! What a migration has put on this host's disks: the journal beside the record, and its bytes.
//!
//! PREPARE lists every disk here, durably, before it makes the first file, and once more when all of them are there,
//! with what tells each image from others. So whatever dies in between, a later process knows which images hold nothing
//! but what a migration brought: what may be removed, and what the next attempt may go on from instead of refusing it
//! (D10).
//!
//! **Why listing first and creating with `O_EXCL` is enough.** A file that the list names and of which it does not know
//! the image was not there when the list was written; it has been made since, by us or by somebody else, or not at all.
//! The first byte of data comes after PREPARED, and PREPARED comes after the second list is durable. So if that file is
//! ours, it holds nothing; and one that holds nothing, with the size that ours would have had, can be removed whoever
//! made it. Anything else is left alone. A power loss adds no case: the second list is durable before the file's name
//! may be, and a list that names an image that is not there removes nothing.
//!
//! A journal means nothing by itself. It counts together with a record that is in the middle of, or was left by, the
//! attempt that it names ([`Journal::fits`]); with any other record it is a piece of history. That is why nothing that
//! happens later, a hand-over, a claim, an operator's word, can make it count again (M2).
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic "BFJOURNL" |
//! | 8 | 2 | format version, little-endian |
//! | 10 | | postcard: attempt, the attempt before, lineage, source, number of disks; then the disks |
//! | end - 4 | 4 | CRC-32C of everything before, little-endian, in every version |

use serde::{Deserialize, Serialize};

use super::file::{Broken, Form};
use super::{Attempt, Lineage, Peer, Record, State};
use crate::disk::{Disk, Lasting};
use crate::limits::{DISKS_MAX, JOURNAL_FILE_MAX};

const FORM: Form = Form { magic: *b"BFJOURNL", version: 1, bytes_max: JOURNAL_FILE_MAX };

/// What the attempts of one source have put on this host's disks, and not yet handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    /// The attempt that wrote it last.
    pub attempt: Attempt,
    /// The attempt whose remains it took over: the record still names that one until this one's is durable.
    pub after: Attempt,
    /// The guest's history.
    pub lineage: Lineage,
    /// The source.
    pub from: Peer,
    /// The disks.
    pub entries: Vec<Entry>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The disk's name.
    pub disk: String,
    /// Where its image is, from the root on.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// How it came to be ours.
    pub how: How,
    /// A sync of it has failed: what it reads as is not what is on the medium (D9), so nothing may be compared with it.
    pub doubtful: bool,
    /// The image; `None` until all that is listed is there and data may come.
    pub image: Option<Image>,
}

/// How a disk came to hold what a migration brought. Numbers are append-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// There was nothing, and a file was made: it may be removed.
    Created,
    /// It was found, and held nothing.
    Empty,
    /// It was found with data, and the user had said `--overwrite`.
    Overwritten,
    /// It was found with an older copy, and the user had said `--copy-storage-inc`.
    Older,
    /// As [`How::Created`], and it was sealed since: nobody removes it any more (M2).
    Sealed,
}

/// What tells an image from another one in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Image {
    /// A file.
    File {
        /// Its file system's device number, which may be another one after the next boot.
        device: u64,
        /// Its number there.
        inode: u64,
        /// When it was made, where the file system knows.
        born_ns: Option<i128>,
    },
    /// A block device: what the path leads to.
    Device,
}

impl Image {
    /// The image that `disk` is.
    ///
    /// # Errors
    /// The file system's.
    pub fn of(disk: &Disk) -> std::io::Result<Self> {
        Ok(match disk.lasting()? {
            Lasting::File { inode, born_ns } => Self::File { device: disk.identity().device(), inode, born_ns },
            Lasting::Device => Self::Device,
        })
    }

    /// Whether `other` is the same image. A number and a birth are enough; a number alone needs the device with it,
    /// and such an image is nobody's after a boot that numbers devices differently.
    #[must_use]
    pub fn is(self, other: Self) -> bool {
        match (self, other) {
            (
                Self::File { device, inode, born_ns },
                Self::File { device: other_device, inode: other_inode, born_ns: other_born },
            ) => inode == other_inode && born_ns == other_born && (born_ns.is_some() || device == other_device),
            (Self::Device, Self::Device) => true,
            _ => false,
        }
    }
}

impl Entry {
    /// Whether `disk`, found at `path`, is what this entry speaks of.
    #[must_use]
    pub fn is_about(&self, disk: &Disk, path: &str) -> bool {
        let (Some(image), Ok(here)) = (self.image, Image::of(disk)) else { return false };
        image.is(here) && disk.size() == self.size_bytes && (image != Image::Device || self.path == path)
    }
}

impl Journal {
    /// Whether it counts with this record: M2, M6.
    #[must_use]
    pub fn fits(&self, record: Option<&Record>) -> bool {
        let Some(record) = record.filter(|record| record.lineage == self.lineage) else { return false };
        match &record.state {
            State::Receiving { attempt, .. } | State::Void { attempt } => {
                *attempt != Attempt::NONE && (*attempt == self.attempt || *attempt == self.after)
            }
            State::Sealed { attempt, .. } => *attempt == self.attempt,
            _ => false,
        }
    }

    /// The entry of a disk.
    #[must_use]
    pub fn entry(&self, disk: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.disk == disk)
    }

    /// The disks that may hold what a migration brought.
    pub fn remains(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.image.is_some())
    }

    /// The same once the attempt is sealed: nothing of it is cleaned up from then on (M2).
    #[must_use]
    pub fn retired(&self) -> Self {
        let mut retired = self.clone();
        for entry in retired.entries.iter_mut().filter(|entry| entry.how == How::Created) {
            entry.how = How::Sealed;
        }
        retired
    }

    /// The file.
    ///
    /// # Errors
    /// It is too long for one: a path that no system takes.
    pub(super) fn encode(&self) -> std::io::Result<Vec<u8>> {
        let disks = u8::try_from(self.entries.len()).unwrap_or(u8::MAX);
        let Self { attempt, after, lineage, from, .. } = self;
        let head = Head { attempt: *attempt, after: *after, lineage: *lineage, from: from.clone(), disks };
        let mut body = vec![0; JOURNAL_FILE_MAX];
        let too_long = |_| std::io::Error::other("the list is too long");
        let mut length = postcard::to_slice(&head, &mut body).map_err(too_long)?.len();
        for entry in &self.entries {
            let Entry { disk, path, size_bytes, how, doubtful, image } = entry;
            let line = Line { disk, path, size_bytes: *size_bytes, how: *how, doubtful: *doubtful, image: *image };
            length += postcard::to_slice(&line, &mut body[length..]).map_err(too_long)?.len();
        }
        FORM.wrap(&body[..length]).ok_or_else(|| std::io::Error::other("the list is too long"))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it: it lists nothing.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Broken> {
        let body = FORM.unwrap(bytes)?;
        let (head, mut rest) = postcard::take_from_bytes::<Head>(body).map_err(|_| Broken::Content)?;
        let mut entries = Vec::new();
        for _ in 0..head.disks {
            let (line, left) = postcard::take_from_bytes::<Line<'_>>(rest).map_err(|_| Broken::Content)?;
            rest = left;
            let Line { disk, path, size_bytes, how, doubtful, image } = line;
            entries.push(Entry { disk: disk.to_owned(), path: path.to_owned(), size_bytes, how, doubtful, image });
        }
        if !rest.is_empty() || entries.len() > DISKS_MAX {
            return Err(Broken::Content);
        }
        let Head { attempt, after, lineage, from, .. } = head;
        Ok(Self { attempt, after, lineage, from, entries })
    }
}

#[derive(Serialize, Deserialize)]
struct Head {
    attempt: Attempt,
    after: Attempt,
    lineage: Lineage,
    from: Peer,
    disks: u8,
}

#[derive(Serialize, Deserialize)]
struct Line<'a> {
    disk: &'a str,
    path: &'a str,
    size_bytes: u64,
    how: How,
    doubtful: bool,
    image: Option<Image>,
}

#[cfg(test)]
mod tests;
