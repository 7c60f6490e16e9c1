//! PREPARE: dials, says hello, has the destination check and open the disks.
//!
//! Called by `drive::run`, first. Nothing here has changed anything when it fails: the destination is told to withdraw.

use super::*;
use crate::address::Address;
use crate::vmm::About;

/// Everything before the first byte: dials, says hello, has the destination check and open the disks. A failure here
/// has changed nothing.
pub(super) fn prepare<'a>(guest: &'a Arc<Guest>, job: &'a Job) -> Result<Drive<'a>, String> {
    let about = About { attempt: job.attempt.to_string(), peer: job.address.to_string() };
    let leaving = guest.vmm.leaving(&about, Instant::now() + REPLY_TIMEOUT)?;
    // Before the destination waits for an answer: it may take a while on a large disk.
    let disks = preflight::offers(&job.exports)?;
    let dialled = dial_aside(guest, &job.address, Instant::now() + DIAL_MAX);
    let (mut link, theirs) = wait_for(&dialled, TICK, || job.cancelled().map_or(Ok(()), Err))?
        .map_err(|no_link| format!("{}: {no_link}", job.address))?;
    let stream = choose_transport(job, &theirs)?.then(Arc::default);
    let state_inside = stream.is_some() && theirs.capabilities.has(Capabilities::STATE);
    if leaving.is_some() && !state_inside && !job.address.can_be_dialled_again() {
        return Err(format!("{}: the destination takes no guest's state inside the phase connection", job.address));
    }
    let stamp = course::stamp(guest, job, theirs.host)?;
    let message = Message::Prepare(Prepare {
        stamp,
        challenge: theirs.challenge,
        mode: match (job.request.overwrite, job.request.incremental) {
            (true, _) => Mode::Overwrite,
            (false, true) => Mode::Incremental,
            (false, false) => Mode::CopyAll,
        },
        disks,
        connections: job.request.connections,
        verify: match job.request.verify {
            wire::Verify::None => Verify::None,
            wire::Verify::Written => Verify::Written,
            wire::Verify::Full => Verify::Full,
        },
        keep_partial: job.request.keep_partial,
        state: leaving.is_some(),
        staying: preflight::staying(guest, &job.request.disks)?,
        heedless: job.request.heedless,
    });
    let prepared = match ask_to_prepare(job, &mut link, &message, &stamp, &theirs) {
        Ok(prepared) => prepared,
        Err(NotPrepared::Refused(cause)) => return Err(cause),
        Err(NotPrepared::Unclear(cause)) => {
            // It may be prepared, or become so yet: nothing of that is to stay.
            withdraw(&mut link, stamp, &cause, job.cancelled().is_none());
            return Err(cause);
        }
    };
    if let (false, Some(address)) = (stream.is_some(), job.address.address())
        && let Err(cause) = try_data_connection(job, address, &prepared, &mut link)
    {
        withdraw(&mut link, stamp, &cause, job.cancelled().is_none());
        return Err(cause);
    }
    // What cannot be dialled again leads nobody there later; its own door may.
    let remembered =
        if job.address.can_be_dialled_again() { cut(&job.address.to_string()) } else { cut(&theirs.address) };
    // The destination receives from here on: a link that is lost now is dialled again like any later one.
    let round_trip = measure_round_trip(&mut link);
    // One that is lost already tells nothing; it is mended later.
    let asked =
        if round_trip.is_err() { Ok(Vec::new()) } else { base::ask(job, &mut link, &stamp, &prepared, &theirs) };
    let layers = match asked {
        Ok(layers) => layers,
        Err(cause) => {
            withdraw(&mut link, stamp, &cause, job.cancelled().is_none());
            return Err(cause);
        }
    };
    Ok(Drive {
        guest,
        job,
        round_trip: round_trip.unwrap_or_default(),
        stamp,
        epoch: prepared.epoch,
        prepared,
        peer: Peer { host: theirs.host, address: remembered },
        link,
        layers,
        stream,
        mirrors: Vec::new(),
        lanes: Lanes::default(),
        checkers: Checkers::default(),
        proof: Proof::default(),
        course: Course::new(),
        unknown: Vec::new(),
        down: false,
        link_lost: round_trip.is_err(),
        outage: Outage::default(),
        meter: Meter::new(job.exports.len(), round_trip.unwrap_or_default()),
        synchrony: Synchrony::new(job.request.synchronous),
        owed: None,
        state: leaving.map(State::new),
        state_inside,
        wants_length: theirs.capabilities.has(Capabilities::STATE_END),
        mends: true,
        written_ahead: false,
        pinged: Instant::now(),
    })
}

/// Opens one data connection, and drops it again: where the phases come through and data does not, that is said before
/// anything has changed, and not after minutes of trying. A link that is lost meanwhile is no such thing.
fn try_data_connection(job: &Job, address: &Address, prepared: &Prepared, link: &mut Link) -> Result<(), String> {
    let disk = job.exports.first().and_then(|export| Some((export.name().to_owned(), export.disk()?.size())));
    let (Some(disk), address, prepared) = (disk, address.clone(), prepared.clone()) else { return Ok(()) };
    let opening = aside("lanes", move || connect(&address, &prepared, prepared.epoch, &[disk], 1));
    match wait_for(&opening, TICK, || job.cancelled().map_or(Ok(()), Err))? {
        Err(cause) if measure_round_trip(link).is_ok() => Err(format!(
            "{}: the phases come through, data connections do not ({cause}): does that lead to one connection only? \
             --transport stream sends everything through it",
            job.address
        )),
        _ => Ok(()),
    }
}

/// Whether the disks travel inside the phase connection; shows how, and why.
fn choose_transport(job: &Job, theirs: &Hello) -> Result<bool, String> {
    let asked = job.request.transport;
    let why_not_nbd = match (&job.address, theirs.capabilities.has(Capabilities::NBD)) {
        (Place::Through(_), _) => Some("the command is one connection"),
        (Place::Passed(_), _) => Some("the descriptor is one connection, and is not opened again when it is lost"),
        (_, false) => Some("the destination can take no data connections"),
        (_, true) => None,
    };
    let stream = match (asked, why_not_nbd) {
        (wire::Transport::Nbd, Some(why)) => {
            return Err(format!("{}: {why}; --transport stream sends everything through this one", job.address));
        }
        (wire::Transport::Nbd, None) => false,
        (wire::Transport::Stream, _) => true,
        (wire::Transport::Auto, why) => why.is_some(),
    };
    if stream && !theirs.capabilities.has(Capabilities::STREAM) {
        return Err(format!("{}: the destination takes no blocks inside the phase connection", job.address));
    }
    job.show(|progress| {
        progress.transport = if stream { wire::Transport::Stream } else { wire::Transport::Nbd };
        let is_news = asked == wire::Transport::Auto || !job.address.can_be_dialled_again();
        progress.transport_cause = why_not_nbd.filter(|_| is_news).map(text).unwrap_or_default();
    });
    if let Some(why) = why_not_nbd {
        log::info!("migration: {why}: the disks travel inside the phase connection");
    }
    Ok(stream)
}

/// The time from a question to its answer on an idle link.
fn measure_round_trip(link: &mut Link) -> Result<Duration, LinkError> {
    let began = Instant::now();
    let deadline = began + REPLY_TIMEOUT;
    link.send(&Message::Ping { number: 0 }, deadline)?;
    while Instant::now() < deadline {
        if let Some(Message::Pong { .. }) = link.receive(deadline)? {
            return Ok(began.elapsed());
        }
    }
    Err(LinkError::Late)
}

/// Why a destination is not prepared.
enum NotPrepared {
    /// It says so: nothing has changed there.
    Refused(String),
    /// It has been asked, and was not waited for or not understood.
    Unclear(String),
}

/// Sends PREPARE and waits for the answer.
fn ask_to_prepare(
    job: &Job,
    link: &mut Link,
    message: &Message,
    stamp: &Stamp,
    theirs: &Hello,
) -> Result<Prepared, NotPrepared> {
    let unclear = |cause: &str| NotPrepared::Unclear(cause.to_owned());
    let broken = |error: LinkError| NotPrepared::Unclear(error.to_string());
    link.send(message, Instant::now() + REPLY_TIMEOUT).map_err(broken)?;
    let deadline = Instant::now() + PREPARE_MAX;
    let mut heard = Instant::now();
    let prepared = loop {
        if let Some(cause) = job.cancelled() {
            return Err(NotPrepared::Unclear(cause));
        }
        let received = link.receive(Instant::now() + TICK).map_err(broken)?;
        if received.is_some() {
            heard = Instant::now();
        }
        match received {
            Some(Message::Prepared(prepared)) if prepared.stamp.matches(stamp) => break prepared,
            Some(Message::Refused { stamp: about, problems }) if about.matches(stamp) => {
                return Err(NotPrepared::Refused(preflight::report("refused by the destination", &problems)));
            }
            None if Instant::now() >= deadline => return Err(unclear("the destination does not get ready")),
            // While it works it says so.
            None if heard.elapsed() > LINK_SILENCE_MAX => return Err(unclear(SILENT)),
            _ => {}
        }
    };
    if prepared.disks.len() != job.exports.len() || prepared.instance != theirs.instance {
        return Err(unclear("the destination's answer does not fit the question"));
    }
    Ok(prepared)
}

/// Ends an attempt that has not begun here: tells the destination, and gives it a moment to say that it has heard.
fn withdraw(link: &mut Link, stamp: Stamp, cause: &str, keep: bool) {
    let deadline = Instant::now() + UNSEALED_PATIENCE;
    let mut sent = link.send(&Message::Abort { stamp, cause: cut(cause), keep }, deadline);
    while sent.is_ok() && Instant::now() < deadline {
        match link.receive(deadline) {
            Ok(Some(Message::Unsealed { .. } | Message::Record { .. })) => return,
            Ok(_) => {}
            Err(error) => sent = Err(error),
        }
    }
}
