//! What a switchover does with the devices: nothing comes or goes, page caches are written out, proved empty, and the
//! devices disconnected once the disks are given. The rules W1 to W5 are in `attach.rs`; `migrate/drive.rs` calls.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::{Attached, Attachments, Sync, Token, wait_until_free};
use crate::error::reason;
use crate::guest::Guest;
use crate::limits::{ATTACHED_PROOF_MAX, CONNECTION_STACK, DETACH_FREE_MAX};

/// While it lives no device is attached or detached. Dropped, everything is as it was before.
#[derive(Debug)]
#[must_use = "dropping it lets devices come and go"]
pub struct Held<'a> {
    attachments: &'a Attachments,
    token: Token<'a>,
    devices: Vec<Arc<Attached>>,
}

impl Attachments {
    /// Holds the devices for a switchover; `None`: one is just being attached or detached.
    pub fn hold(&self) -> Option<Held<'_>> {
        let token = self.take("a switchover")?;
        // A reader's cache holds nothing that could be lost.
        let mut devices = self.list();
        devices.retain(|attached| !attached.export.is_read_only());
        Some(Held { attachments: self, token, devices })
    }
}

impl Held<'_> {
    /// Whether no page cache stands between the guest and its disks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Begins to sync all devices: W1 with open gates, W2 and W3 with closed ones.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn sync(&self) -> Result<Syncs, String> {
        let begin = |attached: &Arc<Attached>| {
            let sync = attached.device.sync().map_err(|error| reason(&error))?;
            Ok((attached.export.name().to_owned(), sync))
        };
        Ok(Syncs { pending: self.devices.iter().map(begin).collect::<Result<_, String>>()? })
    }

    /// The disks are given and fenced: looks once more whether anything was left (W5), and disconnects the devices
    /// (W4), on a thread, because the guest waits for GO.
    pub fn given(self, guest: &Arc<Guest>) -> Farewell {
        let (said, late) = channel();
        let Self { token, devices, attachments } = self;
        if devices.is_empty() {
            return Farewell { late };
        }
        // Nobody else disconnects them now, and the kernel is not connected anew.
        devices.iter().for_each(|attached| attached.leaving.store(true, Ordering::Release));
        drop(token);
        let host = Arc::clone(guest);
        let thread = std::thread::Builder::new().name("farewell".to_owned()).stack_size(CONNECTION_STACK);
        let mine = devices.clone();
        let started = thread.spawn(move || {
            // Nobody may be waiting any more.
            let _ = said.send(last_look(&mine));
            part(&host.attached, &mine);
        });
        if let Err(error) = started {
            log::warn!("attach: {}", reason(&error));
            part(attachments, &devices);
        }
        Farewell { late }
    }
}

/// What is in the page caches of fenced disks, and lost.
fn last_look(devices: &[Arc<Attached>]) -> Option<String> {
    let deadline = Instant::now() + ATTACHED_PROOF_MAX;
    let mut late = None;
    for attached in devices {
        let device = attached.device;
        let synced = device.sync().and_then(|sync| sync.wait(deadline));
        if let Err(error) = synced {
            let cause = format!(
                "disk {}: {device} was written after the switchover had begun, and that is lost ({})",
                attached.export.name(),
                reason(&error)
            );
            log::error!("attach: {cause}");
            late = late.or(Some(cause));
        }
    }
    late
}

/// Disconnects.
fn part(attachments: &Attachments, devices: &[Arc<Attached>]) {
    let deadline = Instant::now() + DETACH_FREE_MAX;
    for attached in devices {
        let device = attached.device;
        match attachments.let_go(attached) {
            Ok(()) if wait_until_free(device, deadline) => log::info!("attach: {device} is disconnected and free"),
            Ok(()) => log::warn!("attach: {device} is disconnected, and somebody still has it open"),
            Err(error) => log::warn!("attach: {device}: {}", reason(&error)),
        }
    }
}

/// The last look at devices that were given away.
#[derive(Debug)]
pub struct Farewell {
    late: Receiver<Option<String>>,
}

impl Farewell {
    /// What was written too late, and is lost, as far as is known when `time` has passed.
    #[must_use]
    pub fn late(&self, time: Duration) -> Option<String> {
        self.late.recv_timeout(time).ok().flatten()
    }
}

/// Syncs that are under way, each with its disk.
#[derive(Debug)]
pub struct Syncs {
    pending: Vec<(String, Sync)>,
}

impl Syncs {
    /// Waits until all have ended, or until `deadline`: `false`, and they can be waited for again.
    ///
    /// # Errors
    /// A page cache could not be written: what the guest believes to be on its disk is lost (D9).
    pub fn wait(&mut self, deadline: Instant) -> Result<bool, String> {
        while let Some((disk, sync)) = self.pending.last() {
            match sync.wait(deadline) {
                Ok(()) => drop(self.pending.pop()),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(false),
                Err(error) => return Err(format!("disk {disk}: sync of {}: {}", sync.device, reason(&error))),
            }
        }
        Ok(true)
    }

    /// Whose end is still waited for.
    #[must_use]
    pub fn slowest(&self) -> String {
        self.pending.last().map_or_else(String::new, |(disk, sync)| format!("disk {disk}: {}", sync.device))
    }
}
