//! `blockferry copy`: one disk into another, a file, a block device or an NBD server's export on either side.
//!
//! No guest, no record, no dirty map: nobody may write to the source meanwhile. Called by the command line. [`copy`]
//! opens both ends, runs one or two *lanes* (`lane.rs`: a thread with connections of its own), has everything made
//! durable, and with `--verify` reads both ends again and compares. `end.rs` is what a file and an export have in
//! common here, and the only file that writes.
//!
//! What a hole of the source becomes: nothing where the destination is known to read as zero, which is found out before
//! the first byte (D10: a fact, checked); else zeroes, as holes where the destination can make them. Data that is all
//! zero is treated alike, so that a copy is as thin as it can be.
//!
//! A copy that fails leaves no file that looks like one: what it has created it removes again. What was there before is
//! incomplete then, and the message says so.

mod end;
mod lane;
mod trail;
mod verify;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::disk::sync_directory_of;
use crate::error::{Dies, Exit, Problem, reason};
use crate::limits::{CONNECTION_STACK, COPY_LANES, COPY_WINDOW, PROGRESS_INTERVAL};
use crate::uri::{NbdUri, is_nbd};
use end::{End, Opened};
use lane::Lane;

const OPERATION: &str = "copy";

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// A file or a block device.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdUri),
}

impl Side {
    /// Reads one from the command line.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("the path is empty".to_owned()),
            text if is_nbd(text) => NbdUri::parse(text).map(Self::Nbd),
            path => Ok(Self::File(path.into())),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Nbd(uri) => uri.fmt(f),
        }
    }
}

/// What `copy` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOptions {
    /// What is read.
    pub source: Side,
    /// What is written.
    pub destination: Side,
    /// Both are read again and compared.
    pub verify: bool,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the source that are done, data and holes.
    pub done_bytes: u64,
    /// Bytes of the source.
    pub size_bytes: u64,
    /// Both ends are being read again.
    pub verifying: bool,
    /// Since it began.
    pub elapsed: Duration,
}

/// What a copy has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Bytes of the source.
    pub size_bytes: u64,
    /// Bytes that were written as data.
    pub data_bytes: u64,
    /// Bytes that were written as zeroes, or needed not be written.
    pub zero_bytes: u64,
    /// BLAKE3 of all bytes of both ends, where they were compared.
    pub root: Option<[u8; 32]>,
    /// The destination cannot be asked to make it durable: its server offers no FLUSH.
    pub unflushed: bool,
    /// From the beginning to the end.
    pub took: Duration,
}

/// What all lanes share.
#[derive(Debug, Default)]
struct Shared {
    /// Where the next window begins.
    next: AtomicU64,
    /// One lane has failed: the others end.
    stop: AtomicBool,
    done: AtomicU64,
    data: AtomicU64,
    zeroes: AtomicU64,
}

/// Copies; calls `show` every now and then.
///
/// # Errors
/// Exit 1 before the first byte was written; exit 3 after it, when the destination is incomplete.
pub fn copy(options: &CopyOptions, show: &mut dyn FnMut(Progress)) -> Result<Copied, Problem> {
    let began = Instant::now();
    for side in [&options.source, &options.destination] {
        if let Side::Nbd(uri) = side {
            uri.address.check_plaintext(OPERATION, options.insecure_plaintext)?;
        }
    }
    let refused = |side: &Side, cause: String| Problem::refused(OPERATION, side, cause);
    let source = Opened::source(&options.source).map_err(|cause| refused(&options.source, cause))?;
    let destination = Opened::destination(&options.destination, &options.source, source.size)
        .map_err(|cause| refused(&options.destination, cause))?;
    let size = source.size;
    let made = destination.made();
    let shared = Shared::default();
    let unflushed = !destination.end.can_flush();
    let zero = destination.reads_as_zero;
    let done = run(options, (source.end, destination.end), (size, zero), &shared, &mut |verifying| {
        let done_bytes = shared.done.load(Ordering::Relaxed);
        show(Progress { done_bytes, size_bytes: size, verifying, elapsed: began.elapsed() });
    });
    let done = done.and_then(|root| match &made {
        // The name of a new file is to last as its bytes do.
        Some(path) => sync_directory_of(path).map(|()| root).map_err(|error| format!("flush: {}", reason(&error))),
        None => Ok(root),
    });
    match done {
        Ok(root) => Ok(Copied {
            size_bytes: size,
            data_bytes: shared.data.load(Ordering::Relaxed),
            zero_bytes: shared.zeroes.load(Ordering::Relaxed),
            root,
            unflushed,
            took: began.elapsed(),
        }),
        Err(cause) => {
            let left = match made {
                Some(path) => match std::fs::remove_file(&path) {
                    Ok(()) => "the file that was made for it is removed".to_owned(),
                    Err(error) => format!("and it is left incomplete: {}", reason(&error)),
                },
                None => "it is incomplete now".to_owned(),
            };
            let text = format!("{cause}; {left}");
            Err(Problem::new(Dies::Request, Exit::Aborted, OPERATION, &options.destination, text))
        }
    }
}

/// Everything from the first byte on.
fn run(
    options: &CopyOptions,
    first: (End, End),
    (size, zero): (u64, bool),
    shared: &Shared,
    show: &mut dyn FnMut(bool),
) -> Result<Option<[u8; 32]>, String> {
    // A second one only where there is work for it, and where both ends take it.
    let wanted = if size > COPY_WINDOW { COPY_LANES } else { 1 };
    let most = wanted.min(first.0.connections(wanted)).min(first.1.connections(wanted));
    let mut ends = vec![first];
    while ends.len() < most {
        let (here, there) = &ends[0];
        match here.twin(&options.source).and_then(|here| Ok((here, there.twin(&options.destination)?))) {
            Ok(pair) => ends.push(pair),
            // One is enough: a server may take no more.
            Err(cause) => {
                log::info!("copy: one connection less: {cause}");
                break;
            }
        }
    }
    let mut kept = threads(ends, shared, size, zero, show)?;
    if options.verify {
        let (here, there) = kept.first_mut().ok_or("no lane is left")?;
        return verify::compare(here, there, size, &mut || show(true)).map(Some);
    }
    Ok(None)
}

/// Runs the lanes, each to its end; returns their connections.
fn threads(
    ends: Vec<(End, End)>,
    shared: &Shared,
    size: u64,
    zero: bool,
    show: &mut dyn FnMut(bool),
) -> Result<Vec<(End, End)>, String> {
    std::thread::scope(|scope| {
        let (ended, end) = channel();
        let mut running = 0_usize;
        for (here, there) in ends {
            let ended = ended.clone();
            let thread = std::thread::Builder::new().name("copy lane".to_owned()).stack_size(CONNECTION_STACK);
            let lane = move || {
                let mut lane = Lane::new(here, there, zero);
                let done = lane.run(shared, size);
                if done.is_err() {
                    shared.stop.store(true, Ordering::Release);
                }
                let _ = ended.send(done.map(|()| lane.into_ends()));
            };
            thread.spawn_scoped(scope, lane).map_err(|error| format!("no thread: {error}"))?;
            running += 1;
        }
        drop(ended);
        let (mut kept, mut failed) = (Vec::new(), None);
        while running > 0 {
            match end.recv_timeout(PROGRESS_INTERVAL) {
                Ok(done) => {
                    running -= 1;
                    match done {
                        Ok(ends) => kept.push(ends),
                        Err(cause) => failed = failed.or(Some(cause)),
                    }
                }
                Err(RecvTimeoutError::Timeout) => show(false),
                Err(RecvTimeoutError::Disconnected) => return Err("a lane has ended without a word".to_owned()),
            }
        }
        failed.map_or(Ok(kept), Err)
    })
}
