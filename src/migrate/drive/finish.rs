//! FINISH: offers, quiesces, copies what is left, seals, gives, and says GO.
//!
//! What may end when is decided in [`Drive::finish`]: until SEAL is sent the gates may open again and the migration
//! goes on; once it is sent, opening them ends the attempt (D6); once GIVEN is begun, nothing takes it back (M3).

use super::*;

impl<'a> Drive<'a> {
    /// Hands over.
    pub(super) fn finish(&mut self) -> Result<Handed, Stop> {
        self.write_ahead()?;
        let offer = Event::Offer { stamp: self.stamp, to: self.peer.clone() };
        self.mirrors.iter().for_each(|mirror| mirror.verify_soon());
        // M5: durable before anything that lets the destination seal.
        self.record(&offer)?;
        let mut tries = 0;
        let (held, quiesced) = loop {
            match self.final_pass() {
                Ok(passed) => break passed,
                Err(NotYet::Stop(stop)) => return Err(stop),
                // The guest stands, and does so until it has arrived or goes on here.
                Err(NotYet::GoOn(cause)) if !self.mends => return Err(cause.into()),
                Err(NotYet::GoOn(cause)) => {
                    tries += 1;
                    log::warn!("migration: switchover put off: {cause}");
                    if tries == SWITCHOVERS_MAX {
                        return Err(format!("switchover failed {tries} times: {cause}").into());
                    }
                    if self.mirrors.iter().all(|mirror| mirror.lost().is_none()) {
                        self.pause(SWITCHOVER_PAUSE)?;
                    }
                    self.copy_until_converged()?;
                }
            }
        };
        // Nothing is left to copy: the lanes go quietly, before the destination ends them.
        self.mirrors.iter().for_each(|mirror| mirror.stop());
        self.checkers.stop();
        // From here on the gates open only for an attempt that has ended.
        let given = self.seal().and_then(|()| {
            course::check_nothing_left(&quiesced, &self.counts())?;
            // W3: nor is anything left where it cannot be seen from here.
            self.prove(&held, Instant::now() + ATTACHED_PROOF_MAX)?;
            self.job.close_decision("the guest is given away")?;
            self.show_phase(Phase::Give);
            self.record(&Event::Give { sealed: self.stamp })
        });
        if let Err(stop) = given {
            if let Stop::Abort(_) = stop {
                // M3: it ends for good, and only then does the guest go on.
                self.record(&Event::End { attempt: self.stamp.attempt })?;
                drop(quiesced);
            } else {
                quiesced.fence();
            }
            return Err(stop);
        }
        let since = quiesced.since();
        quiesced.fence();
        let farewell = held.given(self.guest);
        self.lanes.end();
        let handed = self.give(since, Instant::now() + RUNNING_PATIENCE);
        // W5: found out meanwhile, as a rule.
        let handed = match (handed, farewell.late(ATTACHED_PROOF_MAX)) {
            (Handed::Over(_), Some(late)) => Handed::OverBut(late),
            (handed, _) => handed,
        };
        // The VMM here is kept as long as nobody has said that the guest is there.
        Ok(match handed {
            Handed::Unheard => Handed::Unheard,
            Handed::Over(switchover) => match self.see_it_run() {
                Ok(()) => Handed::Over(switchover),
                Err(cause) => Handed::OverBut(cause),
            },
            Handed::OverBut(cause) => {
                let _ = self.see_it_run();
                Handed::OverBut(cause)
            }
        })
    }

    /// Makes room for the records to come, once.
    pub(super) fn write_ahead(&mut self) -> Result<(), Stop> {
        if std::mem::replace(&mut self.written_ahead, true) {
            return Ok(());
        }
        course::write_ahead(self.guest, self.stamp, &self.peer)
    }

    /// Quiesces the guest and copies what is left: when this returns, the destination has everything, flushed (D5), and
    /// no page cache of this host holds more (W2).
    fn final_pass(&mut self) -> Result<(Held<'a>, Quiesced), NotYet> {
        let guest = self.guest;
        let held =
            guest.attached.hold().ok_or_else(|| NotYet::GoOn("a disk is being attached or detached".to_owned()))?;
        if !held.is_empty() {
            let stands = !self.mends;
            self.write_out(&held, if stands { STATE_DRAIN_MAX } else { ATTACHED_SYNC_MAX })?;
            if stands { self.drain_standing() } else { self.copy_until_converged() }.map_err(NotYet::Stop)?;
        }
        if self.mends {
            let mirrors = self.mirrors.clone();
            course::flush_others_ahead(guest, &mirrors, || self.look())?;
        }
        self.show_phase(Phase::Final);
        let deadline = Instant::now() + QUIESCE_MAX;
        let quiesced = course::quiesce_guest(self.guest, deadline)?;
        self.mirrors.iter().for_each(|mirror| mirror.hurry(&quiesced));
        let ready = self.settle_mirrors(&quiesced, deadline);
        self.mirrors.iter().for_each(|mirror| mirror.relax());
        ready.and_then(|()| self.prove(&held, deadline.min(Instant::now() + ATTACHED_PROOF_MAX)))?;
        Ok((held, quiesced))
    }

    /// W1 for a guest that a driver is about to stop: what the kernel has not written yet of its devices is written and
    /// copied while it runs, again while that takes longer than the guest may stand and less than the time before. What
    /// is left, and what comes meanwhile, the final pass finds.
    pub(super) fn write_out_while_it_runs(&mut self) -> Result<(), Stop> {
        let guest = self.guest;
        let (mut before, mut tries) = (Duration::MAX, 0);
        // Devices that come or go just now are the final pass's business.
        while let Some(held) = guest.attached.hold().filter(|held| !held.is_empty()) {
            let began = Instant::now();
            let written = self.write_out(&held, ATTACHED_SYNC_MAX);
            drop(held);
            match written {
                Err(NotYet::GoOn(cause)) if tries < SWITCHOVERS_MAX => {
                    tries += 1;
                    log::warn!("migration: switchover put off: {cause}");
                    self.copy_until_converged()?;
                    continue;
                }
                written => written?,
            }
            self.copy_until_converged()?;
            let took = began.elapsed();
            if took <= self.job.downtime_limit() || took > before / 2 {
                break;
            }
            before = took;
        }
        Ok(())
    }

    /// W1: has the kernel write out what the guest has written through `/dev/nbdN`, while the gates are open and the
    /// mirror runs, within `limit`.
    fn write_out(&mut self, held: &Held<'_>, limit: Duration) -> Result<(), NotYet> {
        if let Some(user) = self.guest.restless_user(self.job.request.hold) {
            return stop(&user);
        }
        let deadline = Instant::now() + limit;
        let mut syncs = held.sync().map_err(NotYet::GoOn)?;
        while !syncs.wait(Instant::now()).map_err(|cause| NotYet::Stop(cause.into()))? {
            if Instant::now() >= deadline {
                return Err(NotYet::GoOn(format!("{}: not written back in {} s", syncs.slowest(), limit.as_secs())));
            }
            self.look().map_err(NotYet::Stop)?;
        }
        Ok(())
    }

    /// W2, W3: with closed gates a sync ends only where nothing is left to be written.
    fn prove(&self, held: &Held<'_>, deadline: Instant) -> Result<(), NotYet> {
        // What has come to stand on a device since it was written out has a cache that no sync reaches.
        if let Some(user) = self.guest.restless_user(true) {
            return stop(&user);
        }
        let mut syncs = held.sync().map_err(NotYet::GoOn)?;
        if syncs.wait(deadline).map_err(|cause| NotYet::Stop(cause.into()))? {
            return Ok(());
        }
        Err(NotYet::GoOn(format!("{} is still being written: the VMM must be stopped", syncs.slowest())))
    }

    /// A connection that is lost now, or that does not get on, is not mended while the guest waits: that takes as long
    /// as the link pleases. The guest goes on, new connections are opened, and there is another final pass.
    fn settle_mirrors(&mut self, quiesced: &Quiesced, deadline: Instant) -> Result<(), NotYet> {
        for mirror in &self.mirrors {
            match mirror.settle(quiesced, deadline) {
                Ok(()) => {}
                Err(NotReady::Lost(cause)) => return Err(NotYet::GoOn(cause)),
                Err(NotReady::TooSlow) => {
                    // A stream that is slow is the same one when it is opened again.
                    self.down = self.stream.is_none();
                    return Err(NotYet::GoOn(format!("disk {}: the final pass takes too long", mirror.name())));
                }
                Err(NotReady::Unverified(cause)) => {
                    return Err(NotYet::GoOn(format!("disk {}: {cause}", mirror.name())));
                }
                Err(NotReady::Failed(failure)) => return Err(NotYet::Stop(failure.text.into())),
            }
        }
        self.proof = Proof::of(&self.mirrors);
        course::flush_others(self.guest, &self.mirrors, self.mends)
    }

    /// SEAL, said again over a new connection if need be, until SEALED.
    fn seal(&mut self) -> Result<(), Stop> {
        self.show_phase(Phase::Seal);
        let deadline = Instant::now() + SEAL_MAX;
        let message =
            Message::Seal { stamp: self.stamp, digests: self.proof.roots.clone(), unread_bytes: self.proof.unread };
        let mut said = self.say(&message);
        let mut pause = None;
        while Instant::now() < deadline {
            match said.and_then(|()| self.listen()) {
                Ok(Some(Message::Sealed { fsync_us, .. })) => {
                    log::info!("migration: sealed, the destination's last sync took {fsync_us} us");
                    return Ok(());
                }
                Ok(Some(Message::Failed { cause, .. })) => return Err(format!("the destination: {cause}").into()),
                Ok(Some(Message::Unsealed { .. } | Message::Record { .. })) => {
                    return Err("the destination cannot seal this attempt any more".into());
                }
                Ok(_) => said = Ok(()),
                Err(cause) => {
                    // At once the first time, for the guest waits. A destination that goes on hanging up cannot make
                    // its record durable now (M4).
                    match &mut pause {
                        None => pause = Some(RECONNECT_PAUSE.0),
                        Some(pause) => self.rest(pause, deadline, &cause)?,
                    }
                    self.redial(&cause, deadline)?;
                    said = self.say(&message);
                }
            }
            if let Some(cause) = self.job.cancelled() {
                return Err(cause.into());
            }
        }
        Err("the destination does not answer to SEAL".into())
    }

    /// Where the destination is dialled once a lost connection matters: its own door, where the connection was one that
    /// nobody can open again.
    fn way_back(&self) -> Place {
        let own = || Place::parse(&self.peer.address).ok();
        let once = !self.job.address.can_be_dialled_again();
        once.then(own).flatten().unwrap_or_else(|| self.job.address.clone())
    }

    /// GO, until the destination says that it owns, or until the patience of whoever waits is at its end. Any process
    /// of the destination can answer: what it needs to own, it has on its disks.
    fn give(&mut self, since: Instant, deadline: Instant) -> Handed {
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            // A connection that has fallen silent must not keep the guest waiting for as long as there is patience.
            let patience = deadline.min(Instant::now() + GO_PATIENCE);
            let answer = settle::converse(self.guest, &mut self.link, patience);
            // M8: whoever gave the word here knows better than this attempt.
            if self.guest.record().is_ok_and(|record| record.is_some_and(|record| record.word != self.stamp.word)) {
                log::warn!("migration: the guest was taken back here by an operator's word");
                return Handed::Unheard;
            }
            match answer {
                Ok((_, heard)) if !settle::is_needed(self.guest) => return Handed::Over(heard.duration_since(since)),
                _ if !settle::is_needed(self.guest) => return Handed::Over(since.elapsed()),
                Ok((answer, _)) => log::info!("migration: GO is answered by {}", answer.name()),
                Err(Trouble::NotDurable(cause)) => return Handed::OverBut(cause),
                Err(Trouble::Silent(cause)) => {
                    log::info!("migration: GO: {cause}");
                    self.job.lose(Instant::now(), &cause);
                }
            }
            if Instant::now() + pause >= deadline {
                return Handed::Unheard;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
            match self.dial_back(deadline) {
                Ok(link) => {
                    self.link = link;
                    self.job.find();
                }
                Err(cause) => {
                    log::info!("migration: {cause}");
                    self.job.still_lost(&cause);
                }
            }
        }
    }

    /// A new connection to any process of the destination, once it is given to.
    pub(super) fn dial_back(&self, deadline: Instant) -> Result<Link, String> {
        match dial(self.guest, &self.way_back(), Role::Source, deadline) {
            Ok((link, theirs)) if theirs.host == self.peer.host => Ok(link),
            Ok(_) => Err("another host answers there".to_owned()),
            Err(no_link) => Err(no_link.to_string()),
        }
    }
}
