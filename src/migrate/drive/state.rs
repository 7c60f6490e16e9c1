//! The guest's state: has the VMM move it while the mirror keeps passing, and waits until it stands, loaded whole, at
//! the destination (M11).
//!
//! Called by `drive::run` between PERFORM and FINISH; without a VMM driver there is nothing to do here. Until the VMM
//! is silent for good the gates stay open (D6): QEMU flushes and may write until then, and hangs where it cannot.
//!
//! On the stream path the state travels inside the phase connection, if the destination knows that; else on a
//! connection of its own, for which the command of an `exec:` is run once more.
//!
//! While the guest runs a lost connection is mended as ever, unless the state was on it. Once the guest stands nothing
//! is waited for that can take long: whatever breaks ends the attempt, and the guest goes on here (`abort.rs`).

use super::*;
use crate::limits::{
    STANDING_TICK, STATE_STALL_MAX, STATE_START_MAX, STREAM_STATE_ROOM_BACK, VMM_LAST_WORD, VMM_RESUME_MAX, VMM_RUN_MAX,
};
use crate::migrate::state::{Carrier, Relay};
use crate::migrate::wire::Standing;
use crate::ownership::Moving;
use crate::socket::Socket;
use crate::trunk::Channel;
use crate::vmm::{Going, Leaving};

/// The guest's state, on its way.
#[derive(Debug)]
pub(super) struct State {
    vmm: Leaving,
    /// The VMM was told to send it, and may have begun.
    started: bool,
    relay: Option<Arc<Relay>>,
    /// The connection of its own that it travels on; a command that is the way to the other host ends with it.
    connection: Option<Link>,
    /// Since when the guest stands.
    stands: Option<Instant>,
    /// Until it was heard to run at the destination.
    pause: Option<Duration>,
}

impl State {
    pub(super) fn new(vmm: Leaving) -> Self {
        Self { vmm, started: false, relay: None, connection: None, stands: None, pause: None }
    }

    /// Has the VMM send the state. Whatever comes of it, it may have begun.
    pub(super) fn start(&mut self, downtime: Duration) -> Result<Arc<Socket>, String> {
        self.started = true;
        self.vmm.start(downtime, Instant::now() + STATE_START_MAX)
    }

    /// Bytes of the state, if it has begun to move.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.relay.as_ref().map(|relay| relay.bytes())
    }

    /// How long the guest stood, if it was heard to run again.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.pause
    }

    /// The attempt has ended for good, and this host owns: the guest goes on here. First the socket, then the monitor:
    /// a VMM that is stalled by the one does not answer at the other.
    ///
    /// # Errors
    /// One line, for the user: it stands.
    pub(super) fn resume(&mut self) -> Result<(), String> {
        if !self.started {
            return Ok(());
        }
        if let Some(relay) = &self.relay {
            relay.end();
        }
        self.vmm.resume(Instant::now() + VMM_RESUME_MAX)
    }
}

impl Drive<'_> {
    /// Moves the state. When this returns, the source's VMM is silent for good and the destination's has loaded the
    /// guest, which stands.
    pub(super) fn move_state(&mut self) -> Result<(), Stop> {
        let Some(mut state) = self.state.take() else { return Ok(()) };
        let moved = self.move_it(&mut state);
        self.state = Some(state);
        moved.map_err(|stop| self.blame_the_way(stop))
    }

    /// A connection that is lost takes the state with it; whoever notices first, a VMM or a disk, does not know why.
    fn blame_the_way(&mut self, stop: Stop) -> Stop {
        let broken = self.link.trunk().filter(|_| self.state_inside).and_then(|trunk| trunk.broken());
        match (broken, stop) {
            (Some(broken), Stop::Abort(_)) => Stop::Abort(self.lost_link(broken.into())),
            (_, stop) => stop,
        }
    }

    fn move_it(&mut self, state: &mut State) -> Result<(), Stop> {
        // What takes the time of a disk is done while the guest runs.
        self.write_ahead()?;
        self.write_out_while_it_runs()?;
        self.show_phase(Phase::State);
        state.vmm.look_again(Instant::now() + REPLY_TIMEOUT)?;
        let ran = state.vmm.ran();
        let carrier = if self.state_inside {
            Carrier::Inside(self.open_channel(ran)?)
        } else {
            let connection = self.open_connection(ran)?;
            Carrier::Own(Arc::clone(state.connection.insert(connection).socket()))
        };
        self.guest.begin_moving(Moving { attempt: self.stamp.attempt, arrives: false, ran })?;
        // From here on the guest may stand at any moment (a hook's does at once), and while a connection is mended
        // nobody looks after it.
        self.mends = false;
        let vmm = state.start(self.job.downtime_limit())?;
        let relay = Relay::start(vmm, carrier, Some(Arc::clone(&self.job.budget)))?;
        state.relay = Some(Arc::clone(&relay));
        while state.vmm.poll(Duration::ZERO)? == Going::Active {
            check(&relay)?;
            self.look()?;
            let counts = self.counts();
            self.meter.sample(&counts);
            self.show_state(&counts, relay.bytes());
        }
        state.stands = Some(Instant::now());
        relay.hurry();
        self.drain_standing()?;
        state.vmm.go_on(Instant::now() + VMM_RUN_MAX)?;
        relay.expect();
        let (follow_max, load_max) = state.vmm.patience(self.job.downtime_limit());
        self.follow(state, &relay, Instant::now() + follow_max)?;
        if !state.vmm.knows_the_end() {
            self.tell_the_end(&relay)?;
        }
        let loaded = self.ask_until(Standing::Loaded, Instant::now() + load_max);
        self.show_state(&self.counts(), relay.bytes());
        loaded
    }

    /// The state's part of the phase connection, at whose other end a VMM waits.
    fn open_channel(&mut self, ran: bool) -> Result<Channel, Stop> {
        let deadline = Instant::now() + STATE_START_MAX;
        let trunk = self.link.trunk().cloned().ok_or_else(|| SILENT.to_owned())?;
        let channel = Channel::open(&trunk, STREAM_STATE_ROOM_BACK).ok_or("the guest's state has moved before")?;
        self.mends = false;
        self.say(&Message::State { stamp: self.stamp, ran })?;
        while Instant::now() < deadline {
            if let Some(Message::StateReady { .. }) = self.look_for(TICK)? {
                channel.invite().map_err(|ended| format!("the guest's state: {ended}"))?;
                return Ok(channel);
            }
        }
        Err("the guest's state: the destination's VMM does not get ready".into())
    }

    /// A connection of its own for the state, at whose other end a VMM waits.
    fn open_connection(&mut self, ran: bool) -> Result<Link, Stop> {
        let deadline = Instant::now() + STATE_START_MAX;
        let dialled = dial_aside(self.guest, &self.job.address, deadline);
        let (mut link, theirs) = wait_for(&dialled, TICK, || self.look())?
            .map_err(|no_link| format!("the guest's state: {}: {no_link}", self.job.address))?;
        if theirs.instance != self.prepared.instance {
            return Err("the guest's state: the destination has been restarted".into());
        }
        let fault = |error: LinkError| Stop::Abort(format!("the guest's state: {error}"));
        link.send(&Message::State { stamp: self.stamp, ran }, deadline).map_err(fault)?;
        while Instant::now() < deadline {
            match link.receive(Instant::now() + TICK).map_err(fault)? {
                Some(Message::StateReady { stamp }) if stamp.matches(&self.stamp) => {
                    return Ok(link);
                }
                Some(Message::Failed { stamp, cause, .. }) if stamp.matches(&self.stamp) => {
                    return Err(format!("the destination: {cause}").into());
                }
                _ => self.look()?,
            }
        }
        Err("the guest's state: the destination's VMM does not get ready".into())
    }

    /// The guest stands and its VMM may still flush: copies what is left, flushes and verifies, with open gates. What
    /// is true when this returns is established again under quiesce (D5); it only makes that short.
    pub(super) fn drain_standing(&mut self) -> Result<(), Stop> {
        let deadline = Instant::now() + STATE_DRAIN_MAX;
        self.mirrors.iter().for_each(|mirror| mirror.rush());
        let mut flushes: Option<Vec<u64>> = None;
        let drained = loop {
            if let Err(stop) = self.watch() {
                break Err(stop);
            }
            let counts = self.counts();
            if counts.iter().all(|counts| counts.outstanding.granules == 0) {
                let before = flushes.get_or_insert_with(|| counts.iter().map(|counts| counts.flushes).collect());
                let flushed = counts.iter().zip(before.iter()).all(|(counts, before)| counts.flushes > *before);
                if flushed && counts.iter().all(|counts| counts.unverified == 0) {
                    break Ok(());
                }
                self.mirrors.iter().zip(&counts).zip(before.iter()).for_each(|((mirror, counts), before)| {
                    if counts.flushes == *before {
                        mirror.ask_for_flush();
                    }
                });
            }
            if Instant::now() >= deadline {
                break Err("the guest stands, and what is left to copy takes too long".into());
            }
        };
        self.mirrors.iter().for_each(|mirror| mirror.relax());
        drained
    }

    /// The rest of the state, until the VMM is silent for good.
    fn follow(&mut self, state: &mut State, relay: &Relay, deadline: Instant) -> Result<(), Stop> {
        while state.vmm.poll(STANDING_TICK)? != Going::Gone {
            self.watch()?;
            if let Err(broken) = check(relay) {
                if !state.vmm.knows_the_end() {
                    return Err(broken);
                }
                // A VMM that has just come to its end closes its socket, too.
                return match state.vmm.poll(VMM_LAST_WORD)? {
                    Going::Gone => Ok(()),
                    _ => Err(broken),
                };
            }
            if Instant::now() >= deadline {
                return Err("the guest stands, and the rest of its state takes too long".into());
            }
        }
        Ok(())
    }

    /// The VMM has ended its state: waits until the last byte is sent, and says how many there were.
    fn tell_the_end(&mut self, relay: &Relay) -> Result<(), Stop> {
        loop {
            check(relay)?;
            if relay.is_drained() {
                break;
            }
            self.watch()?;
        }
        if self.wants_length {
            self.say(&Message::StateEnd { stamp: self.stamp, bytes: relay.out() })?;
        }
        Ok(())
    }

    /// Asks the destination how far the state is, until it is as wanted.
    pub(super) fn ask_until(&mut self, wanted: Standing, deadline: Instant) -> Result<(), Stop> {
        let question = Message::StateQuestion { stamp: self.stamp };
        let mut ask = true;
        while Instant::now() < deadline {
            let heard = if ask { self.say(&question).and_then(|()| self.listen()) } else { self.listen() };
            ask = false;
            match heard? {
                Some(Message::StateIs { standing, .. }) if standing == wanted => return Ok(()),
                Some(Message::StateIs { standing: Standing::Failed, cause, .. }) => {
                    return Err(format!("the destination: {cause}").into());
                }
                Some(Message::StateIs { .. }) => ask = true,
                Some(Message::Failed { cause, .. }) => return Err(format!("the destination: {cause}").into()),
                _ => {}
            }
            if let Some(cause) = self.job.cancelled() {
                return Err(cause.into());
            }
        }
        Err("the destination does not say that it has loaded the guest".into())
    }

    /// The destination owns: waits for its guest to run, and ends the VMM here.
    ///
    /// # Errors
    /// One line: the guest does not run there.
    pub(super) fn see_it_run(&mut self) -> Result<(), String> {
        let Some(mut state) = self.state.take() else { return Ok(()) };
        let runs = self.ask_whether_it_runs();
        state.pause = state.stands.filter(|_| runs.is_ok() && state.vmm.ran()).map(|since| since.elapsed());
        if let Err(cause) = state.vmm.end(Instant::now() + VMM_RUN_MAX) {
            log::warn!("migration: {cause}");
        }
        self.guest.end_moving(self.stamp.attempt);
        if let Some(relay) = &state.relay {
            // All of it was carried; who does not hang up holds nobody here.
            relay.end();
        }
        self.state = Some(state);
        runs
    }

    /// Asks until it runs there, over a new connection if need be.
    fn ask_whether_it_runs(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + VMM_RUN_MAX;
        loop {
            let cause = match self.ask_until(Standing::Running, deadline) {
                Ok(()) => return Ok(()),
                Err(Stop::Abort(cause) | Stop::Unknown(cause)) => cause,
            };
            if !self.link_lost || Instant::now() >= deadline {
                return Err(format!("whether the guest runs there is not known: {cause}"));
            }
            match self.dial_back(deadline) {
                Ok(link) => (self.link, self.link_lost, self.owed) = (link, false, None),
                Err(no_link) => {
                    log::info!("migration: {no_link}");
                    std::thread::sleep(RECONNECT_PAUSE.1.min(deadline.saturating_duration_since(Instant::now())));
                }
            }
        }
    }

    /// As [`Drive::look`], more often: the guest stands.
    fn watch(&mut self) -> Result<(), Stop> {
        self.look_for(STANDING_TICK).map(drop)
    }
}

/// Whether the state still moves.
fn check(relay: &Relay) -> Result<(), Stop> {
    if let Some(cause) = relay.failure() {
        return Err(cause.into());
    }
    if relay.quiet() > STATE_STALL_MAX {
        return Err("the guest's state does not move".into());
    }
    Ok(())
}
