//! Splits a region into what travels as data and what travels as write-zeroes.

use crate::disk::is_zero;
use crate::limits::{REGION_REQUESTS_MAX, ZERO_RUN_MIN, ZERO_STEP};

/// A run of a region that is all zero, or is not.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: usize,
    pub(crate) length: usize,
    pub(crate) zero: bool,
}

/// Splits a region's bytes into runs: zeroes from [`ZERO_RUN_MIN`] on by themselves, the rest as data, and never more
/// than [`REGION_REQUESTS_MAX`].
pub(crate) struct Runs<'a> {
    bytes: &'a [u8],
    at: usize,
    made: usize,
    /// One run, whatever it holds.
    whole: bool,
}

impl<'a> Runs<'a> {
    /// Of bytes for somebody who takes no requests of less than `block` bytes: parts of a large block are none.
    pub(crate) fn new(bytes: &'a [u8], block: u64) -> Self {
        Self { bytes, at: 0, made: 0, whole: block > ZERO_STEP as u64 }
    }

    /// The next place from `from` on where a whole run of zeroes begins, and where it ends.
    fn next_zeroes(&self, from: usize) -> Option<(usize, usize)> {
        let zero_at = |at: usize| is_zero(&self.bytes[at..self.bytes.len().min(at + ZERO_STEP)]);
        let mut at = from;
        while at < self.bytes.len() {
            if !zero_at(at) {
                at += ZERO_STEP;
                continue;
            }
            let start = at;
            while at < self.bytes.len() && zero_at(at) {
                at += ZERO_STEP;
            }
            let end = at.min(self.bytes.len());
            if end - start >= ZERO_RUN_MIN || end - start == self.bytes.len() {
                return Some((start, end));
            }
        }
        None
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let start = self.at;
        if start >= self.bytes.len() {
            return None;
        }
        self.made += 1;
        let last = self.whole || self.made == REGION_REQUESTS_MAX;
        let (end, zero) = match self.next_zeroes(start) {
            Some((0, end)) if end == self.bytes.len() => (end, true),
            _ if last => (self.bytes.len(), false),
            Some((zeroes, end)) if zeroes == start => (end, true),
            Some((zeroes, _)) => (zeroes, false),
            None => (self.bytes.len(), false),
        };
        self.at = end;
        Some(Run { start, length: end - start, zero })
    }
}
