//! `--verify`: reads both ends again, side by side, and compares what they hash to.
//!
//! BLAKE3 of every byte, holes as the zeroes that they read as. What is read of the source or of a server may
//! come from a page cache: this finds what went wrong on the way, not what a disk will have forgotten tomorrow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};

use super::end::End;
use crate::disk::AlignedBuffer;
use crate::limits::{CONNECTION_STACK, COPY_VERIFY_READ, COPY_WINDOW, PROGRESS_INTERVAL};

/// The digest of the first `size` bytes of both.
///
/// # Errors
/// One line: an end cannot be read, or they differ.
pub(super) fn compare(here: &mut End, there: &mut End, size: u64, show: &mut dyn FnMut()) -> Result<[u8; 32], String> {
    let stop = &AtomicBool::new(false);
    let [ours, theirs] = std::thread::scope(|scope| {
        let (ended, end) = channel();
        for (number, side) in [here, there].into_iter().enumerate() {
            let ended = ended.clone();
            let thread = std::thread::Builder::new().name("verify".to_owned()).stack_size(CONNECTION_STACK);
            let work = move || {
                // Nobody has asked for the copy to be in the page cache.
                let digest = digest(side, size, stop, number == 1);
                if digest.is_err() {
                    stop.store(true, Ordering::Release);
                }
                let _ = ended.send((number, digest));
            };
            thread.spawn_scoped(scope, work).map_err(|error| format!("no thread: {error}"))?;
        }
        drop(ended);
        let mut digests = [None, None];
        while digests.iter().any(Option::is_none) {
            match end.recv_timeout(PROGRESS_INTERVAL) {
                Ok((number, digest)) => digests[number] = Some(digest?),
                Err(RecvTimeoutError::Timeout) => show(),
                Err(RecvTimeoutError::Disconnected) => return Err("verify: ended without a word".to_owned()),
            }
        }
        Ok::<_, String>(digests.map(|digest| digest.unwrap_or_default()))
    })?;
    if ours == theirs { Ok(ours) } else { Err("verify: the copy differs from the source".to_owned()) }
}

fn digest(end: &mut End, size: u64, stop: &AtomicBool, sparing: bool) -> Result<[u8; 32], String> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = AlignedBuffer::new(COPY_VERIFY_READ);
    let zeroes = vec![0; COPY_VERIFY_READ];
    let mut extents = Vec::new();
    let mut from = 0;
    while from < size && !stop.load(Ordering::Acquire) {
        let to = size.min(from + COPY_WINDOW);
        end.extents(from, to, &mut |_, length, zero| match extents.last_mut() {
            Some((before, same)) if *same == zero => *before += length,
            _ => extents.push((length, zero)),
        })?;
        let mut at = from;
        for (mut left, zero) in extents.drain(..) {
            while left > 0 {
                let length = usize::try_from(left).unwrap_or(usize::MAX).min(COPY_VERIFY_READ);
                if zero {
                    hasher.update(&zeroes[..length]);
                } else {
                    let bytes = &mut buffer[..length];
                    end.read(bytes, at).map_err(|cause| format!("verify: {cause}"))?;
                    hasher.update(bytes);
                }
                at += length as u64;
                left -= length as u64;
            }
        }
        if sparing {
            end.forget(&(from..to));
        }
        from = to;
    }
    Ok(*hasher.finalize().as_bytes())
}
