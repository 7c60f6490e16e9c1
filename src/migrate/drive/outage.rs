//! A lost connection: fences the destination, dials it again and opens new data connections, for as long as it takes.
//!
//! Called by the phases in `drive.rs`, while the guest runs or while it waits for SEALED; they decide how long. Nothing
//! here ends an attempt: it says that it must end.
//!
//! # What counts as dead
//!
//! The phase connection says whether the destination is there: each PING is answered within moments, by a thread that
//! waits for no disk, and whoever is busy for the source says PONG meanwhile (`beat.rs`). So [`LINK_SILENCE_MAX`] of
//! silence means a dead connection, in any phase and while a fence is waited for too; then all connections are given
//! up. A data connection may be silent for as long as a disk is slow; as long as PINGs are answered it is given up
//! after `LANE_SILENCE_MAX` only.
//!
//! Whatever waits for the network is done aside: a cancel is looked at all the time.

use super::*;

/// How an outage goes on.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// Since when whoever answers at the destination says that it is not there.
    absent: Option<Instant>,
}

impl Drive<'_> {
    /// D4: a connection was lost. Ends all data connections, has the destination fence their epoch, gives back what
    /// was in flight on them, and opens a new set; dials again for as long as it takes.
    pub(super) fn recover(&mut self, cause: &str) -> Result<(), NotYet> {
        if !self.job.address.can_be_dialled_again() {
            self.down = true;
            self.link_lost = true;
            return stop(&self.job.lost_for_good(cause));
        }
        log::warn!("migration: {cause}; reconnecting");
        let began = Instant::now();
        self.down = true;
        self.job.lose(self.owed.filter(|_| self.link_lost).unwrap_or(began), cause);
        if self.stream.is_some() {
            // They are one connection.
            self.link_lost = true;
            self.link.shut();
        }
        self.unknown.append(&mut self.lanes.end());
        let recovered = self.try_until_recovered(began + RECONNECT_MAX);
        self.job.find();
        recovered?;
        self.down = false;
        log::info!("migration: reconnected after {} ms", began.elapsed().as_millis());
        Ok(())
    }

    fn try_until_recovered(&mut self, deadline: Instant) -> Result<(), NotYet> {
        let mut pause = RECONNECT_PAUSE.0;
        self.outage = Outage::default();
        while let Err(not_yet) = self.try_to_recover(deadline) {
            let NotYet::GoOn(cause) = not_yet else { return Err(not_yet) };
            log::info!("migration: {cause}");
            self.rest(&mut pause, deadline, &cause)?;
        }
        Ok(())
    }

    fn try_to_recover(&mut self, deadline: Instant) -> Result<(), NotYet> {
        if self.link_lost {
            self.dial_again(deadline)?;
        }
        self.fence()?;
        // FENCED: now, and not before, they may be copied again.
        self.unknown.drain(..).for_each(Lost::give_back);
        self.mirrors.iter().for_each(|mirror| mirror.resume());
        // While it is found out what the destination has already, nobody copies: a lane would send what is the same
        // there, and what is compared to see whether the bases are the same.
        let compares = self.mirrors.iter().any(|mirror| mirror.is_comparing());
        let opened = if compares { self.open_stream() } else { self.open_lanes() };
        if opened.is_err() {
            // Those that did open belong to an epoch that must end before another set is opened.
            self.unknown.append(&mut self.lanes.end());
            if self.stream.is_some() {
                self.link_lost = true;
            }
            if !self.link_lost {
                self.outage.absent.get_or_insert_with(Instant::now);
            }
        }
        opened
    }

    fn fence(&mut self) -> Result<(), NotYet> {
        let deadline = Instant::now() + FENCE_MAX;
        self.say(&Message::Fence { stamp: self.stamp, epoch: self.epoch }).map_err(NotYet::GoOn)?;
        while Instant::now() < deadline {
            match self.listen().map_err(NotYet::GoOn)? {
                Some(Message::Fenced { instance, epoch, .. })
                    if instance == self.prepared.instance && epoch > self.epoch =>
                {
                    self.epoch = epoch;
                    return Ok(());
                }
                Some(Message::Fenced { .. }) => return stop("the destination's fence is not for this process"),
                Some(Message::Failed { cause, .. }) => return stop(&format!("the destination: {cause}")),
                Some(Message::Record { .. }) => return stop("the destination has ended this attempt"),
                _ => {}
            }
            if let Some(cause) = self.job.cancelled() {
                return stop(&cause);
            }
        }
        stop("the destination does not answer to a fence")
    }

    /// Opens a new phase connection to the same process of the destination.
    fn dial_again(&mut self, deadline: Instant) -> Result<(), NotYet> {
        let job = self.job;
        let deadline = deadline.min(Instant::now() + REDIAL_MAX);
        let dialled = dial_aside(self.guest, &job.address, deadline);
        let dialled = wait_for(&dialled, TICK, || job.cancelled().map_or(Ok(()), |cause| stop(&cause)))?;
        match dialled {
            Ok((link, theirs)) => self.take_link(link, &theirs),
            Err(no_link) => {
                if no_link.is_absent {
                    self.outage.absent.get_or_insert_with(Instant::now);
                } else {
                    self.outage.absent = None;
                }
                Err(NotYet::GoOn(no_link.to_string()))
            }
        }
    }

    /// The phases go on over this connection, if it leads to the same process.
    pub(super) fn take_link(&mut self, link: Link, theirs: &Hello) -> Result<(), NotYet> {
        if theirs.instance != self.prepared.instance {
            // D12: what it had been sent, it may have forgotten.
            return stop("the destination has been restarted");
        }
        self.link = link;
        self.link_lost = false;
        self.owed = None;
        Ok(())
    }

    /// Dials until somebody answers or `deadline` passes.
    pub(super) fn redial(&mut self, cause: &str, deadline: Instant) -> Result<(), NotYet> {
        if !self.job.address.can_be_dialled_again() {
            return stop(&self.job.lost_for_good(cause));
        }
        self.job.lose(self.owed.unwrap_or_else(Instant::now), cause);
        self.outage = Outage::default();
        let mut pause = RECONNECT_PAUSE.0;
        while let Err(not_yet) = self.dial_again(deadline) {
            let NotYet::GoOn(cause) = not_yet else { return Err(not_yet) };
            self.rest(&mut pause, deadline, &cause)?;
        }
        self.job.find();
        Ok(())
    }

    /// A pause before something is tried again, each longer than the one before.
    pub(super) fn rest(&self, pause: &mut Duration, deadline: Instant, cause: &str) -> Result<(), NotYet> {
        self.job.still_lost(cause);
        let until = Instant::now() + *pause;
        let absent = self.outage.absent.is_some_and(|since| since.elapsed() > ABSENT_MAX);
        if absent || until >= deadline {
            return Err(NotYet::GoOn(format!("the destination is lost: {cause}")));
        }
        loop {
            if let Some(cause) = self.job.cancelled() {
                return stop(&cause);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(TICK));
        }
        *pause = (*pause * 2).min(RECONNECT_PAUSE.1);
        Ok(())
    }

    /// The stream path: has the destination take blocks of the current epoch inside the phase connection. Without it
    /// there is nothing to do.
    pub(super) fn open_stream(&mut self) -> Result<(), NotYet> {
        let Some(present) = self.stream.clone().filter(|_| self.link.trunk().is_none()) else { return Ok(()) };
        let Prepared { instance, token, .. } = self.prepared;
        let deadline = Instant::now() + REPLY_TIMEOUT;
        self.say(&Message::Stream { stamp: self.stamp, instance, epoch: self.epoch, token }).map_err(NotYet::GoOn)?;
        while Instant::now() < deadline {
            match self.listen().map_err(NotYet::GoOn)? {
                Some(Message::Streaming { epoch, .. }) if epoch == self.epoch => {
                    let shared = self.link.share(None);
                    let trunk = shared.map_err(|error| NotYet::GoOn(format!("no thread for the stream: {error}")))?;
                    present.set(&trunk);
                    return Ok(());
                }
                Some(Message::Failed { cause, .. }) => return stop(&format!("the destination: {cause}")),
                _ => {}
            }
            if let Some(cause) = self.job.cancelled() {
                return stop(&cause);
            }
        }
        self.link_lost = true;
        Err(NotYet::GoOn("the destination does not answer to STREAM".to_owned()))
    }

    /// Opens the lanes of the current epoch. The mirrors may run.
    pub(super) fn open_lanes(&mut self) -> Result<(), NotYet> {
        if self.stream.is_some() {
            self.open_stream()?;
            let trunk = self.link.trunk().cloned().ok_or_else(|| NotYet::GoOn("no stream".to_owned()))?;
            return self.lanes.start_stream(&self.mirrors, &trunk).map_err(NotYet::GoOn);
        }
        let Some(address) = self.job.address.address().cloned() else {
            return stop("there are no data connections beside one connection");
        };
        let most = self.prepared.disks.iter().map(|disk| disk.connections).min().unwrap_or(1).max(1);
        let most = most.min(u8::try_from(CONNECTIONS_PER_DISK_MAX).unwrap_or(u8::MAX));
        let wanted = match self.job.request.connections {
            0 if self.round_trip < DISTANT => 1,
            0 => u8::try_from(LANES_DISTANT / self.mirrors.len().max(1)).unwrap_or(1).max(1),
            some => some,
        };
        let (job, prepared, epoch) = (self.job, self.prepared.clone(), self.epoch);
        let disks: Vec<_> = self.mirrors.iter().map(disk_of).collect();
        let opening = move || connect(&address, &prepared, epoch, &disks, wanted.min(most));
        let opened = wait_for(&aside("lanes", opening), LINK_LOOK, || {
            if let Some(cause) = job.cancelled() {
                return stop(&cause);
            }
            match self.listen().map_err(NotYet::GoOn)? {
                Some(Message::Failed { cause, .. }) => stop(&format!("the destination: {cause}")),
                _ => Ok(()),
            }
        })?;
        opened.and_then(|opened| self.lanes.start(&self.mirrors, opened)).map_err(NotYet::GoOn)
    }
}

pub(super) fn stop(cause: &str) -> Result<(), NotYet> {
    Err(NotYet::Stop(Stop::Abort(cause.to_owned())))
}
