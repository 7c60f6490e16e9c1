//! The data connections of a migration: opened together, ended together.
//!
//! They belong to one epoch. When one is lost all are ended here and joined, the destination is asked for a fence, and
//! a new set is opened (D4).

use std::sync::Arc;
use std::thread::JoinHandle;

use super::wire::{Epoch, Prepared, export_name};
use crate::address::Address;
use crate::dirty::Region;
use crate::error::reason;
use crate::limits::{CONNECT_TIMEOUT, CONNECTION_STACK, LANE_SILENCE_MAX};
use crate::mirror::Mirror;
use crate::nbd::client::{Client, Wants};
use crate::nbd::wire;
use crate::socket::Socket;

/// The lanes of all disks. Dropping it ends and joins them.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    mirror: Arc<Mirror>,
    socket: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
}

impl Lanes {
    /// Opens `connections` lanes for each mirror, or one where the destination does not say that several see each
    /// other's writes.
    ///
    /// # Errors
    /// One line. What was opened runs already and stays: the caller ends it and keeps what was in flight.
    pub(super) fn open(
        &mut self,
        address: &Address,
        prepared: &Prepared,
        epoch: Epoch,
        mirrors: &[Arc<Mirror>],
        connections: u8,
    ) -> Result<(), String> {
        mirrors.iter().try_for_each(|mirror| {
            let attempt = prepared.stamp.attempt;
            let name = export_name(attempt, prepared.instance, epoch, prepared.token, mirror.name());
            let several = self.open_one(address, mirror, name.as_str())?;
            (1..if several { connections } else { 1 }).try_for_each(|_| {
                self.open_one(address, mirror, name.as_str())?;
                Ok(())
            })
        })
    }

    /// Whether there are any.
    pub(super) fn are_open(&self) -> bool {
        !self.lanes.is_empty()
    }

    /// Opens one lane and starts its thread. Returns whether there may be more.
    fn open_one(&mut self, address: &Address, mirror: &Arc<Mirror>, name: &str) -> Result<bool, String> {
        let socket = Arc::new(address.connect(CONNECT_TIMEOUT).map_err(|error| reason(&error))?);
        let mut client = Client::connect(Arc::clone(&socket), name, Wants::default())
            .map_err(|error| format!("disk {}: data connection: {error}", mirror.name()))?;
        if client.info().size != mirror.size() {
            return Err(format!("disk {}: the destination's size has changed", mirror.name()));
        }
        socket.set_keep_alive(LANE_SILENCE_MAX / 2);
        client.set_silence_max(LANE_SILENCE_MAX);
        let several = client.info().has(wire::FLAG_CAN_MULTI_CONN);
        let runner = Arc::clone(mirror);
        let thread = std::thread::Builder::new()
            .name(format!("lane {}", mirror.name()))
            .stack_size(CONNECTION_STACK)
            .spawn(move || runner.run_lane(&mut client))
            .map_err(|error| format!("no thread for a data connection: {error}"))?;
        self.lanes.push(Lane { mirror: Arc::clone(mirror), socket, thread: Some(thread) });
        Ok(several)
    }

    /// Ends all lanes and joins their threads. Returns the regions whose copies have an unknown outcome: they stay in
    /// flight as long as the caller holds them.
    pub(super) fn end(&mut self) -> Vec<Region> {
        for lane in &self.lanes {
            lane.mirror.stop();
            lane.socket.shutdown();
        }
        let mut regions = Vec::new();
        for mut lane in self.lanes.drain(..) {
            if let Some(thread) = lane.thread.take() {
                let _ = thread.join();
            }
            regions.extend(lane.mirror.take_lost());
        }
        regions
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.end();
    }
}
