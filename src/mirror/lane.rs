//! One lane: the thread that copies over one connection.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::runs::Runs;
use super::sink::Sink;
use super::{Failure, Mirror};
use crate::dirty::Region;
use crate::disk::AlignedBuffer;
use crate::error::reason;
use crate::limits::{
    LAND_MAX, LANE_LOOK, LANE_REGIONS_MAX, LANE_SILENCE_MAX, LINK_LOOK, REGION_MAX, REGION_REQUESTS_MAX, WINDOW_MAX,
};
use crate::nbd::client::{Event, Lost, Submitted};

/// What a lane does next.
pub(super) enum Orders {
    /// End.
    Stop,
    /// Wait for replies, at most so long.
    Listen(Duration),
    /// Copy this.
    Send(Region, Haste),
    /// Send the flush of this number.
    Flush(u64),
}

/// How a region is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haste {
    /// When the budget has room for it.
    None,
    /// Now: a guest write waits for it (D7). It is beside the budget, which is for what goes on in the background.
    Waited,
    /// Now: the guest is quiesced.
    Final,
}

/// What a lane has under way when it asks for orders.
pub(super) struct Load {
    /// Another region may be sent.
    pub(super) room: bool,
    /// Regions are in flight.
    pub(super) flying: bool,
    /// A flush is.
    pub(super) flushing: bool,
    /// Bytes in flight that nobody waits for.
    pub(super) background: usize,
    /// Regions sent one after the other because somebody waited.
    pub(super) turns: u32,
}

/// How a lane came to its end.
pub(super) enum LaneEnd {
    /// It was told to.
    Stopped,
    /// Its connection is dead.
    Lost(String),
    /// The migration is.
    Failed(Failure),
}

/// A region on its way, and how many of its requests are not answered.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) region: Region,
    requests: usize,
    haste: Haste,
    /// Bytes of data that have been sent of it; the rest are zeroes, or has not been sent.
    pub(super) data_bytes: u64,
}

/// One connection's thread.
pub(super) struct Lane<'a> {
    mirror: &'a Mirror,
    flights: [Option<Flight>; LANE_REGIONS_MAX],
    flying: usize,
    background: usize,
    turns: u32,
    /// The flush on its way: its number, and when it left.
    flush: Option<(u64, Instant)>,
    buffer: AlignedBuffer,
    /// When the destination last answered, or was last owed nothing.
    heard: Instant,
}

/// The cookie of a flush; those of a region's requests are its place among the flights, and a number within.
const FLUSH_COOKIE: u64 = u64::MAX;

impl<'a> Lane<'a> {
    pub(super) fn new(mirror: &'a Mirror) -> Self {
        Self {
            mirror,
            flights: std::array::from_fn(|_| None),
            flying: 0,
            background: 0,
            turns: 0,
            flush: None,
            buffer: AlignedBuffer::new(REGION_MAX.max(mirror.granularity())),
            heard: Instant::now(),
        }
    }

    /// What was in flight when it ended.
    pub(super) fn into_flights(self) -> impl Iterator<Item = Flight> {
        self.flights.into_iter().flatten()
    }

    pub(super) fn run(&mut self, sink: &mut Sink) -> LaneEnd {
        let end = self.copy(sink);
        if matches!(end, LaneEnd::Stopped) && self.mirror.lands.load(Ordering::Acquire) {
            self.let_land(sink);
        }
        end
    }

    fn copy(&mut self, sink: &mut Sink) -> LaneEnd {
        loop {
            let load = Load {
                room: self.has_room(sink, 0),
                flying: self.flying > 0,
                flushing: self.flush.is_some(),
                background: self.background,
                turns: self.turns,
            };
            let done = match self.mirror.orders(&load) {
                Orders::Stop => return LaneEnd::Stopped,
                Orders::Listen(time) => self.listen(sink, time),
                Orders::Flush(number) => self.send_flush(sink, number),
                Orders::Send(region, haste) => self
                    .spend(sink, &region, haste)
                    .and_then(|()| self.send_region(sink, region, haste))
                    .and_then(|()| self.listen(sink, Duration::ZERO)),
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// Nothing more is sent. What is on its way is waited for, for a while, as long as nobody ends the connection: a
    /// server that nobody fences may else write it behind what somebody sends next (D4).
    fn let_land(&mut self, sink: &mut Sink) {
        let until = Instant::now() + LAND_MAX;
        while (self.flying > 0 || self.flush.is_some()) && Instant::now() < until {
            if self.listen(sink, LINK_LOOK).is_err() {
                return;
            }
        }
    }

    /// Whether another region can be sent, and `more` after it, and a flush.
    fn has_room(&self, sink: &Sink, more: usize) -> bool {
        let requests = sink.in_flight() + (1 + more) * sink.requests(self.buffer.len());
        self.flying + more < LANE_REGIONS_MAX && requests < WINDOW_MAX
    }

    /// Waits for its share of the bandwidth, collecting replies meanwhile, and serving whoever waits for a copy.
    fn spend(&mut self, sink: &mut Sink, region: &Region, haste: Haste) -> Result<(), LaneEnd> {
        while haste == Haste::None
            && let Some(time) = self.mirror.budget.spend(region.length())
        {
            let seen = self.mirror.map.rung();
            let (urgent, stop, look) = {
                let state = self.mirror.lock();
                (state.urgent, state.stop, state.look())
            };
            if stop {
                return Err(LaneEnd::Stopped);
            }
            // D7: of what is in hand no other copy can be made.
            if urgent || region.is_waited_for() {
                break;
            }
            while self.has_room(sink, 1)
                && let Some(waited) = self.mirror.map.take_waited(REGION_MAX)
            {
                self.send_region(sink, waited, Haste::Waited)?;
                self.listen(sink, Duration::ZERO)?;
            }
            if sink.in_flight() == 0 {
                self.mirror.map.rest(seen, time.min(LANE_LOOK));
                self.listen(sink, Duration::ZERO)?;
            } else {
                self.listen(sink, time.min(look))?;
            }
        }
        Ok(())
    }

    /// D2, the mirror's side: the region was cleared when it was taken; now it is read, then sent.
    fn send_region(&mut self, sink: &mut Sink, region: Region, haste: Haste) -> Result<(), LaneEnd> {
        let (offset, length) = (region.offset(), region.length());
        let data = &mut self.buffer[..length];
        if let Err(error) = self.mirror.disk.read(data, offset) {
            return Err(LaneEnd::Failed(self.failure("read", offset, length, &reason(&error))));
        }
        let Some(place) = self.flights.iter().position(Option::is_none) else {
            return Ok(());
        };
        let flight = self.flights[place].insert(Flight { region, requests: 0, haste, data_bytes: 0 });
        self.flying += 1;
        if haste == Haste::Waited {
            self.turns += 1;
        } else {
            self.turns = 0;
            self.background += length;
        }
        if sink.in_flight() == 0 {
            self.heard = Instant::now();
        }
        let zeroes = sink.takes_zeroes();
        for run in Runs::new(&self.buffer[..length], sink.block()) {
            let at = offset + run.start as u64;
            let cookie = (place * REGION_REQUESTS_MAX + flight.requests) as u64;
            flight.requests += 1;
            if run.zero && zeroes {
                taken(sink.write_zeroes(cookie, at, run.length))?;
                self.mirror.zeroed.fetch_add(run.length as u64, Ordering::Relaxed);
            } else {
                let bytes = &self.buffer[run.start..run.start + run.length];
                taken(sink.write(cookie, at, bytes))?;
                self.mirror.sent.fetch_add(run.length as u64, Ordering::Relaxed);
                flight.data_bytes += run.length as u64;
            }
        }
        Ok(())
    }

    fn send_flush(&mut self, sink: &mut Sink, number: u64) -> Result<(), LaneEnd> {
        if !sink.takes_flush() {
            self.flushed(number, Duration::ZERO);
            return Ok(());
        }
        if sink.in_flight() == 0 {
            self.heard = Instant::now();
        }
        self.flush = Some((number, Instant::now()));
        taken(sink.flush(FLUSH_COOKIE))
    }

    fn flushed(&self, number: u64, took: Duration) {
        let mut state = self.mirror.lock();
        state.flush.done = state.flush.done.max(number);
        state.flush.took = took;
        drop(state);
        self.mirror.changed.notify_all();
    }

    /// Takes in the replies that come within `time`.
    fn listen(&mut self, sink: &mut Sink, time: Duration) -> Result<(), LaneEnd> {
        let mut failed = None;
        let (flights, flush, mirror) = (&mut self.flights, &mut self.flush, self.mirror);
        let (mut landed, mut landed_background) = (0, 0);
        let mut flushed = None;
        let answers = sink.wait(time, &mut |event| {
            let Event::Done { cookie, result } = event else { return };
            if cookie == FLUSH_COOKIE {
                match (result, flush.take()) {
                    (Ok(()), Some((number, left))) => flushed = Some((number, left.elapsed())),
                    (Err(error), _) => {
                        failed.get_or_insert(Failure { text: format!("flush: disk {}: {error}", mirror.name()) });
                    }
                    (Ok(()), None) => {}
                }
                return;
            }
            let place = usize::try_from(cookie).unwrap_or(usize::MAX) / REGION_REQUESTS_MAX;
            let Some(Some(flight)) = flights.get_mut(place) else { return };
            if let Err(error) = result {
                let region = &flight.region;
                failed.get_or_insert(describe("write", mirror.name(), region.offset(), region.length(), &error));
                return;
            }
            flight.requests -= 1;
            if flight.requests == 0
                && let Some(flight) = flights[place].take()
            {
                landed += 1;
                if flight.haste != Haste::Waited {
                    landed_background += flight.region.length();
                }
                mirror.acknowledge(flight);
            }
        });
        self.flying -= landed;
        self.background -= landed_background;
        let answers = answers.map_err(|lost| lost_lane(&lost))?;
        if sink.in_flight() == 0 && sink.has_hung_up() {
            return Err(LaneEnd::Lost("the destination has closed the connection".to_owned()));
        }
        if let Some(failure) = failed {
            return Err(LaneEnd::Failed(failure));
        }
        if let Some((number, took)) = flushed {
            self.flushed(number, took);
        }
        if answers > 0 || sink.in_flight() == 0 {
            self.heard = Instant::now();
        } else if self.heard.elapsed() > LANE_SILENCE_MAX {
            return Err(LaneEnd::Lost(format!("no answer for {} s", LANE_SILENCE_MAX.as_secs())));
        }
        Ok(())
    }

    fn failure(&self, operation: &str, offset: u64, length: usize, cause: &dyn fmt::Display) -> Failure {
        describe(operation, self.mirror.name(), offset, length, cause)
    }
}

fn describe(operation: &str, disk: &str, offset: u64, length: usize, cause: &dyn fmt::Display) -> Failure {
    Failure { text: format!("{operation}: disk {disk}, {length} bytes at {offset}: {cause}") }
}

/// A lane looks at the window before it takes a region, so a request is always taken.
fn taken(submitted: Result<Submitted, Lost>) -> Result<(), LaneEnd> {
    match submitted {
        Ok(Submitted::Taken) => Ok(()),
        Ok(Submitted::WaitFirst) => Err(LaneEnd::Lost("more requests than the window holds".to_owned())),
        Err(lost) => Err(lost_lane(&lost)),
    }
}

fn lost_lane(lost: &Lost) -> LaneEnd {
    LaneEnd::Lost(lost.to_string())
}
