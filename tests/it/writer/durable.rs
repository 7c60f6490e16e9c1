//! What a power loss may take from a disk: what was acknowledged, and not flushed.
//!
//! Rule D13 promises to the guest that what FLUSH and FUA answered for is durable on the owner, and SEALED makes
//! durable on the new owner all that the old one had acknowledged. A ledger that is told to [`Ledger::track`] knows for
//! each sector what it may read as when its host has lost its power; [`Ledger::survive`] looks what it reads as, and
//! goes on from there.

use std::collections::HashMap;

use super::{Entry, Ledger, MIB, Report, SECTOR};

/// What was overwritten and may come back.
#[derive(Debug, Default)]
pub(super) struct Past {
    tracked: bool,
    /// Everything that was acknowledged up to this number is durable.
    flushed: u64,
    /// For each sector the requests before the last acknowledged one, the oldest first.
    before: HashMap<u32, Vec<u32>>,
}

impl Ledger {
    /// From now on what may come back is remembered.
    pub(crate) fn track(&mut self) {
        self.past.tracked = true;
    }

    /// A FLUSH was answered that was sent when so many requests were acknowledged.
    pub(super) fn flushed(&mut self, acknowledged: u64) {
        self.past.flushed = self.past.flushed.max(acknowledged);
    }

    pub(super) fn remember_past(&mut self, entry: &Entry) {
        if !self.past.tracked {
            return;
        }
        for sector in entry.first..entry.first + entry.count {
            let settled = self.settled[sector as usize];
            let is_durable = self.is_durable(settled, usize::MAX);
            let before = self.past.before.entry(sector).or_default();
            if is_durable {
                before.clear();
            }
            before.push(settled);
        }
    }

    /// Whether a request outlives the power of the host behind `door`. What was acknowledged through another door has
    /// come here with SEALED; `usize::MAX`: nobody knows what came.
    fn is_durable(&self, number: u32, door: usize) -> bool {
        let entry = &self.entries[number as usize];
        entry.fua || entry.acknowledged <= self.past.flushed || (door != usize::MAX && entry.door != door)
    }

    /// The host behind `door` owns, and has lost its power: looks what is left, which is what the disk holds from now
    /// on. Wrong is what is older than what was durable.
    #[must_use]
    pub(crate) fn survive(&mut self, door: usize, mut read: impl FnMut(u64, &mut [u8])) -> Report {
        let mut report = Report::default();
        let mut buffer = vec![0; MIB as usize];
        for first in (0..self.sectors).step_by((MIB / SECTOR) as usize) {
            let count = (self.sectors - first).min((MIB / SECTOR) as u32);
            let piece = &mut buffer[..count as usize * SECTOR as usize];
            read(u64::from(first) * SECTOR, piece);
            for (sector, bytes) in (first..).zip(piece.chunks_exact(SECTOR as usize)) {
                report.sectors += 1;
                match self.what_survived(sector, door, bytes) {
                    Some(number) => self.settled[sector as usize] = number,
                    None => {
                        self.complain(&mut report, sector, bytes);
                        if report.wrong == 1 {
                            report.lines.push(self.why_durable(sector));
                        }
                    }
                }
            }
        }
        self.past.before.clear();
        self.past.flushed = self.acknowledged;
        report
    }

    /// What is known of the last request for a sector.
    fn why_durable(&self, sector: u32) -> String {
        let entry = &self.entries[self.settled[sector as usize] as usize];
        format!("{entry:?} was durable: {} of {} acknowledged were flushed", self.past.flushed, self.acknowledged)
    }

    /// The request that a sector's content goes back to.
    fn what_survived(&self, sector: u32, door: usize, bytes: &[u8]) -> Option<u32> {
        let (settled, pending) = (self.settled[sector as usize], self.pending[sector as usize]);
        if self.fits(settled, sector, bytes) || (pending != 0 && self.fits(pending, sector, bytes)) {
            return Some(settled);
        }
        let before = self.past.before.get(&sector).map_or(&[][..], Vec::as_slice);
        let mut newer = settled;
        for number in before.iter().rev() {
            if self.is_durable(newer, door) {
                return None;
            }
            if self.fits(*number, sector, bytes) {
                return Some(*number);
            }
            newer = *number;
        }
        None
    }
}

mod tests {
    use super::super::{Deed, Ledger, tests::apply};
    use super::{Report, SECTOR};
    use crate::harness::scratch;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    /// Writes one request over the whole disk, acknowledged through `door`.
    fn write(ledger: &mut Ledger, image: &File, door: usize, fua: bool) -> u32 {
        let number = u32::try_from(ledger.entries.len()).expect("few");
        let whole = super::Entry { deed: Deed::Write, first: 0, count: ledger.sectors, fua, acknowledged: 0, door: 0 };
        ledger.entries.push(whole);
        apply(ledger, number, image);
        ledger.acknowledge(number, door);
        number
    }

    fn survive(ledger: &mut Ledger, image: &File, door: usize) -> Report {
        ledger.survive(door, |offset, buffer| image.read_exact_at(buffer, offset).expect("read"))
    }

    #[test]
    fn a_power_loss_may_take_what_was_not_flushed_and_nothing_else() {
        let folder = scratch();
        let path = folder.path().join("disk");
        for (flushed, fua, elsewhere, whole) in [
            (false, false, false, true),
            (true, false, false, false),
            (false, true, false, false),
            (false, false, true, false),
        ] {
            let mut ledger = Ledger::format(&path, 64 * SECTOR, 9, 50);
            let image = File::options().read(true).write(true).open(&path).expect("the image");
            ledger.track();
            let first = write(&mut ledger, &image, 0, false);
            ledger.flushed(1);
            let _second = write(&mut ledger, &image, usize::from(elsewhere), fua);
            if flushed {
                ledger.flushed(2);
            }
            // The second is lost.
            apply(&ledger, first, &image);
            let report = survive(&mut ledger, &image, 0);
            assert_eq!(report.wrong == 0, whole, "{flushed} {fua} {elsewhere}: {report}");
            if whole {
                ledger.verify_file(&path).assert_whole();
            }
            // What is older than what was flushed never comes back.
            let mut ledger = Ledger::format(&path, 64 * SECTOR, 9, 50);
            ledger.track();
            write(&mut ledger, &image, 0, false);
            ledger.flushed(1);
            write(&mut ledger, &image, 0, false);
            drop(Ledger::format(&path, 64 * SECTOR, 9, 50));
            let image = File::open(&path).expect("the image");
            assert_eq!(survive(&mut ledger, &image, 0).wrong, 64);
        }
    }
}
