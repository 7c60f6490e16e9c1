//! Where a round plays: the hosts, the link, the command, and who strikes when. A blow that waits for a message is
//! struck by the thread that carries the message, one that waits for a record by a thread that watches the directory.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use super::media::Cable;
use super::plan::{Blow, Deed, Plan, Side, When};
use super::site::Site;
use crate::harness::{pause, until_within};
use crate::host::Migration;
use crate::relay::{Kind, Relay};

/// Longest wait of a blow for what it waits for inside of itself.
const DEED: Duration = Duration::from_secs(2);
/// What is late comes so long after the first connection of the next epoch: what it says has been said anew by then.
const LATER: Duration = Duration::from_millis(80);
/// Longest wait for blows that are being struck.
const CLOSE: Duration = Duration::from_secs(100);

/// Everything in a round that somebody may strike.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) a: Site,
    pub(super) b: Site,
    pub(super) relay: Option<Relay>,
    pub(super) cable: Option<Cable>,
    pub(super) migration: Mutex<Option<Migration>>,
    began: Instant,
    struck: Mutex<Vec<Blow>>,
    first: Mutex<Option<Instant>>,
    /// How many are striking now.
    striking: AtomicUsize,
    /// Nobody strikes any more.
    closed: AtomicBool,
    story: Mutex<Vec<String>>,
}

impl Stage {
    pub(super) fn new(a: Site, b: Site, relay: Option<Relay>, cable: Option<Cable>) -> Self {
        Self {
            a,
            b,
            relay,
            cable,
            migration: Mutex::new(None),
            began: Instant::now(),
            struck: Mutex::default(),
            first: Mutex::new(None),
            striking: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            story: Mutex::default(),
        }
    }

    pub(super) fn site(&self, side: Side) -> &Site {
        if side == Side::Source { &self.a } else { &self.b }
    }

    /// Writes down what happened.
    pub(super) fn tell(&self, what: &str) {
        let line = format!("[{:8.3}] {what}", self.began.elapsed().as_secs_f64());
        self.story.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    pub(super) fn story(&self) -> String {
        self.story.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    pub(super) fn migration(&self) -> MutexGuard<'_, Option<Migration>> {
        self.migration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the command has ended.
    pub(super) fn is_over(&self) -> bool {
        self.migration().as_mut().is_none_or(Migration::is_over)
    }

    /// What was struck so far.
    pub(super) fn struck(&self) -> Vec<Blow> {
        self.struck.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When the first blow was struck.
    pub(super) fn first(&self) -> Option<Instant> {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// No blow is struck from here on, and none is being struck.
    pub(super) fn close(&self) {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::SeqCst);
        drop(first);
        if let Some(relay) = &self.relay {
            relay.unhook();
        }
        until_within(CLOSE, "end of the blows", || (self.striking.load(Ordering::SeqCst) == 0).then_some(()));
    }

    /// Has everybody wait who is to strike. The blows that need the command come after it has begun.
    pub(super) fn arm(self: &Arc<Self>, plan: &Plan) {
        for blow in plan.blows.iter().copied() {
            let stage = Arc::clone(self);
            match (blow.when, &self.relay) {
                (When::Message { number, passes, later }, Some(relay)) => relay.on(number, passes, move || {
                    pause(later);
                    stage.strike(blow);
                }),
                (When::Message { .. }, None) => self.tell(&format!("nobody sees messages: {blow}")),
                (When::Time(time), _) => {
                    thread::spawn(move || {
                        pause(time);
                        stage.strike(blow);
                    });
                }
                (When::Record { side, renamed, count }, _) => match watch(&self.site(side).state) {
                    Ok(events) => {
                        thread::spawn(move || {
                            if await_record(&stage, &events, renamed, count) {
                                stage.strike(blow);
                            }
                        });
                    }
                    Err(error) => self.tell(&format!("no watch: {error}")),
                },
            }
        }
    }

    /// Lets something happen now.
    pub(super) fn strike(self: &Arc<Self>, blow: Blow) {
        {
            let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
            if self.is_closed() {
                return;
            }
            first.get_or_insert_with(Instant::now);
            self.striking.fetch_add(1, Ordering::SeqCst);
        }
        self.tell(&blow.to_string());
        if let Err(cause) = self.strike_now(blow.deed) {
            self.tell(&format!("{blow}: {cause}"));
        }
        self.struck.lock().unwrap_or_else(PoisonError::into_inner).push(blow);
        self.striking.fetch_sub(1, Ordering::SeqCst);
    }

    fn strike_now(self: &Arc<Self>, deed: Deed) -> Result<(), String> {
        let (a, b) = (&self.a, &self.b);
        match deed {
            Deed::Kill(side) => drop(self.site(side).kill()),
            Deed::KillBoth => drop((a.kill(), b.kill())),
            Deed::KillCommand => {
                if let Some(migration) = self.migration().as_mut() {
                    migration.kill();
                }
            }
            Deed::Power(side) => return self.site(side).lose_power(),
            Deed::PowerBoth => return a.lose_power().and(b.lose_power()),
            Deed::Cancel => drop(a.ask(&["cancel"])),
            Deed::Fill(side, record) => return self.site(side).stands().fill(record),
            Deed::Freeze(side) => return self.site(side).stands().freeze_record(),
            Deed::Fail(side) => return self.site(side).stands().fail(),
            Deed::Unplug => return self.cable.as_ref().map_or(Ok(()), |cable| cable.pull(true)),
            link => {
                if let Some(relay) = &self.relay {
                    self.strike_link(relay, link);
                }
            }
        }
        Ok(())
    }

    fn strike_link(self: &Arc<Self>, relay: &Relay, deed: Deed) {
        match deed {
            Deed::Cut(refuse) => {
                if refuse {
                    relay.refuse();
                }
                relay.cut_all();
            }
            Deed::CutOne(choice) => drop(relay.cut_one(None, choice)),
            Deed::Silence(false) => relay.fall_silent(),
            Deed::Silence(true) => {
                relay.silence_open(Kind::Phases);
                relay.silence_open(Kind::Data);
            }
            Deed::Hold(choice) => drop(relay.silence_one(Kind::Data, choice)),
            Deed::Delay(time) => relay.delay(time),
            Deed::Throttle(rate) => relay.throttle(rate),
            Deed::Late => {
                relay.hoard();
                let waits = |what: &dyn Fn() -> bool| {
                    let deadline = Instant::now() + DEED;
                    while !what() && !self.is_over() && Instant::now() < deadline {
                        pause(Duration::from_millis(1));
                    }
                };
                waits(&|| relay.hoarded() > 64 << 10);
                let before = relay.accepted();
                self.tell(&format!("{} bytes are kept", relay.hoarded()));
                relay.cut_hoarding_from_source();
                // The next epoch: data connections that are newer.
                waits(&|| relay.accepted() > before);
                pause(LATER);
                relay.deliver_late();
            }
            _ => {}
        }
    }

    /// Makes everything work again that was struck; returns the hosts whose process is to be started again.
    pub(super) fn mend(&self) -> Result<(), String> {
        if let Some(relay) = &self.relay {
            relay.heal();
        }
        if let Some(cable) = &self.cable {
            cable.pull(false)?;
        }
        self.a.stands().heal().and(self.b.stands().heal())
    }
}

fn watch(state: &Path) -> Result<OwnedFd, String> {
    let said = |error: rustix::io::Errno| error.to_string();
    let events = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(said)?;
    let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&events, state, flags).map_err(said)?;
    Ok(events)
}

/// Waits for the event that a blow waits for. `false`: the round has gone on without it.
fn await_record(stage: &Stage, events: &OwnedFd, renamed: bool, count: u32) -> bool {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(events, &mut buffer);
    let wanted = if renamed { inotify::ReadFlags::MOVED_TO } else { inotify::ReadFlags::CREATE };
    let mut seen = 0;
    while !stage.is_closed() {
        if reader.is_buffer_empty() {
            let look = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            let mut polled = [PollFd::new(events, PollFlags::IN)];
            if poll(&mut polled, Some(&look)).unwrap_or(0) == 0 {
                continue;
            }
        }
        let Ok(event) = reader.next() else { return false };
        if event.events().contains(wanted) {
            if seen == count {
                return true;
            }
            seen += 1;
        }
    }
    false
}
