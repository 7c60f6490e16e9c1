//! `--same-base`: what the destination's disks hold in their top layers, asked before the first byte.
//!
//! Called by `prepare.rs`, and by `perform.rs` and `plain.rs` when they scan. What may be taken as equal by it, and
//! why, stands in `layers.rs`. Nothing here fails a migration because nobody knows: then everything is compared, and it
//! is said why.

use super::*;
use crate::disk::Disk;
use crate::layers::Layers;
use crate::migrate::wire::LAYERS_PAGE;

/// What the destination tells of one disk, or why it is not known.
pub(super) type Told = Result<Layers, String>;

const EMPTY: &str = "the destination's disk is empty: everything is sent";

/// Whether the user has given the word.
fn is_wanted(job: &Job) -> bool {
    job.request.same_base && job.request.incremental
}

/// Asks for every disk, in the order of the offer; nothing where the user has not given the word. No lane is open, and
/// no writer of an earlier attempt lives.
///
/// # Errors
/// The destination is lost, or has ended the attempt; nothing has been sent.
pub(super) fn ask(
    job: &Job,
    link: &mut Link,
    stamp: &Stamp,
    prepared: &Prepared,
    theirs: &Hello,
) -> Result<Vec<Told>, String> {
    let mut told = Vec::new();
    if !is_wanted(job) {
        return Ok(told);
    }
    for ((number, export), ready) in (0..).zip(&job.exports).zip(&prepared.disks) {
        let size = export.disk().map_or(0, |disk| disk.size());
        told.push(if ready.reads_as_zero {
            Err(EMPTY.to_owned())
        } else if !ready.compare {
            // D9: what a failed sync has left.
            Err("what the destination's disk holds cannot be relied on: everything is sent".to_owned())
        } else if !theirs.capabilities.has(Capabilities::LAYERS) {
            Err("the destination does not know how to tell its layers".to_owned())
        } else {
            ask_for(job, link, stamp, number, size)?
        });
    }
    Ok(told)
}

/// One disk: page by page.
fn ask_for(job: &Job, link: &mut Link, stamp: &Stamp, disk: u8, size: u64) -> Result<Told, String> {
    let mut pages = Vec::new();
    let mut depth = None;
    for page in (0..).take(usize::try_from(Layers::pages(size, LAYERS_PAGE)).unwrap_or(usize::MAX)) {
        let question = Message::LayersQuestion { stamp: *stamp, disk, page };
        link.send(&question, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
        let (deepest, top, cause) = hear(job, link, stamp, (disk, page))?;
        if !cause.is_empty() {
            return Ok(Err(format!("the destination's disk: {cause}")));
        }
        if depth.is_some_and(|depth| depth != deepest) {
            return Ok(Err("the destination's layers have changed while they were told".to_owned()));
        }
        depth = Some(deepest);
        pages.extend_from_slice(&top);
    }
    Ok(Layers::told(size, depth.unwrap_or_default(), &pages))
}

/// A page: the deepest layer, the bits, and why they are not known.
type Page = (u64, heapless::Vec<u8, LAYERS_PAGE>, super::super::wire::Cause);

fn hear(job: &Job, link: &mut Link, stamp: &Stamp, about: (u8, u32)) -> Result<Page, String> {
    let deadline = Instant::now() + PREPARE_MAX;
    let mut heard = Instant::now();
    loop {
        if let Some(cause) = job.cancelled() {
            return Err(cause);
        }
        let received = link.receive(Instant::now() + TICK).map_err(|error| error.to_string())?;
        if received.is_some() {
            heard = Instant::now();
        }
        match received {
            Some(Message::Layers { stamp: of, disk, page, deepest, top, cause })
                if of.matches(stamp) && (disk, page) == about =>
            {
                return Ok((deepest, top, cause));
            }
            Some(Message::Failed { stamp: of, cause, .. }) if of.matches(stamp) => {
                return Err(format!("the destination: {cause}"));
            }
            Some(Message::Record { stamp: of, .. }) if of.matches(stamp) => {
                return Err("the destination has ended this attempt".to_owned());
            }
            _ if Instant::now() >= deadline => return Err("the destination does not tell its layers".to_owned()),
            // While it works it says so.
            None if heard.elapsed() > LINK_SILENCE_MAX => return Err(SILENT.to_owned()),
            _ => {}
        }
    }
}

/// Why the user's word saves nothing, if it was given; or why a disk cannot be scanned.
pub(super) type Scanned = Result<Option<String>, String>;

/// The same of a plain NBD server's export, which is asked from here.
pub(super) fn layers_of(job: &Job, compare: bool, there: Option<&Disk>) -> Option<Told> {
    is_wanted(job).then(|| match there.filter(|_| compare) {
        Some(there) => Layers::of(there).map_err(|cause| format!("the destination's disk: {cause}")),
        None => Err(EMPTY.to_owned()),
    })
}

/// Makes everything dirty that must be copied or compared. Returns why the user's word saves nothing, if it was given.
///
/// # Errors
/// The disk cannot say what it holds.
pub(super) fn scan(mirror: &Mirror, reads_as_zero: bool, there: Option<Told>) -> Scanned {
    match there {
        Some(Ok(there)) if !reads_as_zero => Ok(mirror.scan_over(&there).err()),
        there => {
            mirror.scan(reads_as_zero).map_err(|error| error.to_string())?;
            Ok(there.and_then(Result::err))
        }
    }
}

/// Why the user's word saves nothing, of each disk of which it does not.
#[derive(Debug, Default)]
pub(super) struct Causes(Vec<String>);

impl Causes {
    /// What has come of one disk's scan.
    pub(super) fn add(&mut self, mirror: &Mirror, cause: Option<String>) {
        let name = mirror.name();
        match cause {
            Some(cause) => {
                log::warn!("migration: --same-base saves nothing: disk {name}: {cause}");
                self.0.push(format!("disk {name}: {cause}"));
            }
            None if mirror.counts().based > 0 => {
                let bytes = mirror.counts().based;
                log::info!("migration: disk {name}: {bytes} bytes are of the same base, and are not read");
            }
            None => {}
        }
    }

    /// Tells the user.
    pub(super) fn show(&self, job: &Job) {
        job.show(|progress| progress.base_cause = text(&self.0.join("; ")));
    }
}
