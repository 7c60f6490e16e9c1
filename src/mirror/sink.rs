//! Where a lane sends to: a connection of its own that speaks NBD, or its disk's way through the one connection.

use std::time::Duration;

use crate::cause::Cause;
use crate::limits::REGION_REQUESTS_MAX;
use crate::nbd::client::{Client, Event, Lost, ServerError, Submitted};
use crate::nbd::wire;
use crate::trunk::{Broken, Outlet};

/// Where a lane sends to. The requests of both are those of NBD.
#[derive(Debug)]
pub enum Sink {
    /// A data connection.
    Nbd(Box<Client>),
    /// The stream path.
    Stream(Outlet),
}

impl Sink {
    /// Requests that are not answered.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Nbd(client) => client.in_flight(),
            Self::Stream(outlet) => outlet.in_flight(),
        }
    }

    /// Whether the connection is broken: for who has nothing in flight.
    pub(super) fn has_hung_up(&self) -> bool {
        match self {
            Self::Nbd(client) => client.has_hung_up(),
            Self::Stream(outlet) => outlet.has_hung_up(),
        }
    }

    /// The least that the destination takes at once, in bytes.
    pub(super) fn block(&self) -> u64 {
        match self {
            Self::Nbd(client) => u64::from(client.info().minimum_block),
            Self::Stream(_) => 1,
        }
    }

    /// Most requests that a region of so many bytes takes.
    pub(super) fn requests(&self, length: usize) -> usize {
        match self {
            Self::Nbd(client) => client.info().requests(length),
            Self::Stream(_) => REGION_REQUESTS_MAX,
        }
    }

    /// Whether the destination knows WRITE_ZEROES.
    pub(super) fn takes_zeroes(&self) -> bool {
        match self {
            Self::Nbd(client) => client.info().has(wire::FLAG_SEND_WRITE_ZEROES),
            Self::Stream(_) => true,
        }
    }

    /// Whether the destination knows FLUSH.
    pub(super) fn takes_flush(&self) -> bool {
        match self {
            Self::Nbd(client) => client.info().has(wire::FLAG_SEND_FLUSH),
            Self::Stream(_) => true,
        }
    }

    pub(super) fn write(&mut self, cookie: u64, offset: u64, bytes: &[u8]) -> Result<Submitted, Lost> {
        match self {
            Self::Nbd(client) => client.submit_write(cookie, offset, bytes, false),
            Self::Stream(outlet) => outlet.write(cookie, offset, bytes).map(taken).map_err(lost),
        }
    }

    pub(super) fn write_zeroes(&mut self, cookie: u64, offset: u64, length: usize) -> Result<Submitted, Lost> {
        match self {
            Self::Nbd(client) => {
                let length = u32::try_from(length).unwrap_or(u32::MAX);
                client.submit_write_zeroes(cookie, offset, length, true, false)
            }
            Self::Stream(outlet) => outlet.write_zeroes(cookie, offset, length).map(taken).map_err(lost),
        }
    }

    pub(super) fn flush(&mut self, cookie: u64) -> Result<Submitted, Lost> {
        match self {
            Self::Nbd(client) => client.submit_flush(cookie),
            Self::Stream(outlet) => outlet.flush(cookie).map(taken).map_err(lost),
        }
    }

    /// Waits for answers, as [`Client::wait`].
    pub(super) fn wait(&mut self, timeout: Duration, each: &mut dyn FnMut(Event<'_>)) -> Result<usize, Lost> {
        match self {
            Self::Nbd(client) => client.wait(Some(timeout), each),
            Self::Stream(outlet) => outlet
                .wait(timeout, &mut |cookie, errno| {
                    let failed = || ServerError { errno, text: Cause::default() };
                    each(Event::Done { cookie, result: if errno == 0 { Ok(()) } else { Err(failed()) } });
                })
                .map_err(lost),
        }
    }
}

fn taken((): ()) -> Submitted {
    Submitted::Taken
}

fn lost(broken: Broken) -> Lost {
    Lost { operation: "stream", cause: Cause::new(broken) }
}
