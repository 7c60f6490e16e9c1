//! The one failure path.

use super::*;

/// How an attempt did not end as it should.
pub(super) enum NotEnded {
    /// The record cannot be made durable: who owns is not known from here (M4).
    Unknown(String),
    /// This host owns and serves, and the VMM does not let the guest run.
    Stands(String),
}

/// Ends an attempt that is not given: for good first, then the destination is told (M3), and UNSEALED is waited for a
/// little (M6). If the guest was offered and the destination cannot be reached, the process goes on asking (M5).
pub(super) fn abort(mut drive: Drive<'_>, cause: &str) -> Result<(), NotEnded> {
    log::warn!("migration: aborted: {cause}");
    drive.show_phase(Phase::Abort);
    drive.job.find();
    // Somebody may have cancelled already: that is what is happening.
    let _ = drive.job.close_decision("the migration is being aborted");
    if let Err(Stop::Abort(cause) | Stop::Unknown(cause)) = drive.record(&Event::End { attempt: drive.stamp.attempt }) {
        return Err(NotEnded::Unknown(cause));
    }
    // M3: it has ended for good, and only now does a guest go on whose VMM was stopped for it.
    let resumed = drive.state.as_mut().map_or(Ok(()), |state| state.resume());
    if resumed.is_ok() {
        drive.guest.end_moving(drive.stamp.attempt);
    }
    tell(drive, cause);
    resumed.map_err(NotEnded::Stands)
}

/// Tells the destination, and waits a little for UNSEALED.
fn tell(mut drive: Drive<'_>, cause: &str) {
    // Given back without a fence: nobody copies them any more.
    drop(drive.lanes.end());
    drive.checkers.stop();
    drive.unknown.clear();
    drive.mirrors.clear();
    // Who was out of reach is not waited for: the source has ended the attempt, and asks on by itself if it must know.
    let deadline = Instant::now() + if drive.link_lost { LOST_PATIENCE } else { UNSEALED_PATIENCE };
    // What was sent is worth keeping when it was a connection that was lost, and not anybody's wish or a disk's error.
    let keep = (drive.down || drive.link_lost) && drive.job.cancelled().is_none();
    let message = Message::Abort { stamp: drive.stamp, cause: cut(cause), keep };
    let mut ask = Some(&message);
    while Instant::now() < deadline {
        match drive.converse(ask.take()) {
            Ok(Some(Message::Unsealed { stamp })) => {
                if settle::is_needed(drive.guest)
                    && let Err(stop) = drive.record(&Event::Unsealed(stamp))
                {
                    log::error!("migration: {stop:?}");
                }
                return;
            }
            Ok(Some(Message::Record { .. })) => return,
            Ok(_) => {}
            Err(lost) => {
                log::info!("migration: {lost}");
                // Not aside: an attempt that is being ended is not cancelled.
                let dialled = dial(drive.guest, &drive.job.address, Role::Source, deadline);
                match dialled.map(|(link, theirs)| drive.take_link(link, &theirs)) {
                    Ok(Ok(())) => ask = Some(&message),
                    _ => return,
                }
            }
        }
    }
}
