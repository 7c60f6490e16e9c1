//! The data connections of a migration: opened together, ended together.
//!
//! They belong to one epoch. When one is lost all are ended here and joined, the destination is asked for a fence, and
//! a new set is opened (D4). [`connect`] opens a set and may take as long as the network pleases, so that the driver
//! has it done aside; nothing has been sent over it, and who no longer wants it drops it. [`Lanes::start`] copies.
//!
//! On the stream path there are none: [`Lanes::start_stream`] gives each disk its way through the phase connection.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::wire::{Epoch, Prepared, export_name};
use crate::address::Address;
use crate::error::reason;
use crate::limits::{CONNECT_TIMEOUT, CONNECTION_STACK, LAND_MAX, LANE_SILENCE_MAX, TICK};
use crate::mirror::{Lost, Mirror, Sink};
use crate::nbd::client::{Client, Wants};
use crate::nbd::wire;
use crate::socket::Socket;
use crate::trunk::{Outlet, Trunk};
use crate::uri::NbdUri;

/// The lanes of all disks. Dropping it ends and joins them.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    mirror: Arc<Mirror>,
    way: Way,
    thread: Option<JoinHandle<()>>,
}

/// What is ended so that a lane ends.
#[derive(Debug)]
enum Way {
    Socket(Arc<Socket>),
    Trunk(Arc<Trunk>),
}

/// An open data connection, over which nothing has been sent.
#[derive(Debug)]
pub(super) struct Opened {
    /// Which of the mirrors it is for.
    mirror: usize,
    socket: Arc<Socket>,
    client: Client,
}

/// The name and size in bytes of a mirror's disk.
pub(super) fn disk_of(mirror: &Arc<Mirror>) -> (String, u64) {
    (mirror.name().to_owned(), mirror.size())
}

/// Opens `connections` data connections for each of the mirrors' disks, or one where the destination does not say that
/// several see each other's writes.
///
/// # Errors
/// One line.
pub(super) fn connect(
    address: &Address,
    prepared: &Prepared,
    epoch: Epoch,
    disks: &[(String, u64)],
    connections: u8,
) -> Result<Vec<Opened>, String> {
    let mut all = Vec::new();
    for (mirror, (disk, size)) in disks.iter().enumerate() {
        let name = export_name(prepared.stamp.attempt, prepared.instance, epoch, prepared.token, disk);
        let one = || {
            let (socket, client) = connect_one(address, disk, *size, name.as_str())?;
            Ok::<_, String>(Opened { mirror, socket, client })
        };
        let first = one()?;
        let several = first.client.info().has(wire::FLAG_CAN_MULTI_CONN);
        all.push(first);
        for _ in 1..if several { connections } else { 1 } {
            all.push(one()?);
        }
    }
    Ok(all)
}

/// The same to a plain NBD server: what each disk goes to, its name and its size in bytes.
///
/// # Errors
/// One line.
pub(super) fn connect_plain(disks: &[(NbdUri, String, u64)], connections: u8) -> Result<Vec<Opened>, String> {
    let mut all = Vec::new();
    for (mirror, (uri, disk, size)) in disks.iter().enumerate() {
        let one = || {
            let (socket, client) = connect_one(&uri.address, disk, *size, &uri.export)?;
            Ok::<_, String>(Opened { mirror, socket, client })
        };
        let first = one()?;
        let several = first.client.info().connections(usize::from(connections));
        all.push(first);
        for _ in 1..several {
            all.push(one()?);
        }
    }
    Ok(all)
}

fn connect_one(address: &Address, disk: &str, size: u64, name: &str) -> Result<(Arc<Socket>, Client), String> {
    let socket = Arc::new(address.connect(CONNECT_TIMEOUT).map_err(|error| reason(&error))?);
    let mut client = Client::connect(Arc::clone(&socket), name, Wants::default())
        .map_err(|error| format!("disk {disk}: data connection: {error}"))?;
    if client.info().size != size {
        return Err(format!("disk {disk}: the destination's size has changed"));
    }
    socket.set_keep_alive(LANE_SILENCE_MAX / 2);
    client.set_silence_max(LANE_SILENCE_MAX);
    Ok((socket, client))
}

impl Lanes {
    /// Copies over these connections, one thread for each. The mirrors stand in the order of the disks that they were
    /// opened for.
    ///
    /// # Errors
    /// One line. What has been started runs and stays: the caller ends it and keeps what was in flight.
    pub(super) fn start(&mut self, mirrors: &[Arc<Mirror>], opened: Vec<Opened>) -> Result<(), String> {
        opened.into_iter().try_for_each(|Opened { mirror, socket, client }| {
            let mirror = mirrors.get(mirror).ok_or("a data connection for no disk")?;
            self.run(mirror, Way::Socket(socket), Sink::Nbd(Box::new(client)))
        })
    }

    /// Copies inside the phase connection. The mirrors stand in the order of the offer.
    ///
    /// # Errors
    /// As [`Lanes::start`].
    pub(super) fn start_stream(&mut self, mirrors: &[Arc<Mirror>], trunk: &Arc<Trunk>) -> Result<(), String> {
        mirrors.iter().zip(0..).try_for_each(|(mirror, disk)| {
            self.run(mirror, Way::Trunk(Arc::clone(trunk)), Sink::Stream(Outlet::new(trunk, disk)))
        })
    }

    fn run(&mut self, mirror: &Arc<Mirror>, way: Way, mut sink: Sink) -> Result<(), String> {
        let runner = Arc::clone(mirror);
        let thread = std::thread::Builder::new()
            .name(format!("lane {}", mirror.name()))
            .stack_size(CONNECTION_STACK)
            .spawn(move || runner.run_lane(&mut sink))
            .map_err(|error| format!("no thread for a data connection: {error}"))?;
        self.lanes.push(Lane { mirror: Arc::clone(mirror), way, thread: Some(thread) });
        Ok(())
    }

    /// Whether there are any.
    pub(super) fn are_open(&self) -> bool {
        !self.lanes.is_empty()
    }

    /// Has all lanes send nothing more and waits until what they have sent is answered, for a while.
    pub(super) fn land(&self) {
        self.lanes.iter().for_each(|lane| lane.mirror.land());
        let until = Instant::now() + LAND_MAX;
        let runs = |lane: &Lane| lane.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        while self.lanes.iter().any(runs) && Instant::now() < until {
            std::thread::sleep(TICK);
        }
    }

    /// Ends all lanes and joins their threads. Returns what was in flight, with an unknown outcome: it stays in flight
    /// as long as the caller holds it.
    pub(super) fn end(&mut self) -> Vec<Lost> {
        for lane in &self.lanes {
            lane.mirror.stop();
            match &lane.way {
                Way::Socket(socket) => socket.shutdown(),
                Way::Trunk(trunk) => trunk.close_lanes(),
            }
        }
        let mut lost = Vec::new();
        for mut lane in self.lanes.drain(..) {
            if let Some(thread) = lane.thread.take() {
                let _ = thread.join();
            }
            lost.extend(lane.mirror.take_lost());
        }
        lost
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.end();
    }
}
