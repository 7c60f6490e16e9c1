//! One attempt while it is received: its disks, its epoch, how they are made durable.
//!
//! Made by PREPARE, held by the destination's stage under its lock, and gone with SEALED or with the attempt's end.
//! What is sent to it, the NBD server writes; nothing here does.

use std::sync::Arc;

use super::digest::Digests;
use super::prepare::{Found, Target};
use crate::disk::Content;
use crate::export::{Door, Export, Gate};
use crate::limits::{CONNECTION_STACK, CONNECTIONS_MAX, CONNECTIONS_PER_DISK_MAX, DISKS_MAX, PHASE_CONNECTIONS_MAX};
use crate::migrate::wire::{DiskReady, Epoch, Mode, Token};
use crate::ownership::{Peer, Stamp};

/// The attempt.
#[derive(Debug)]
pub(super) struct Reception {
    pub(super) stamp: Stamp,
    pub(super) from: Peer,
    pub(super) epoch: Epoch,
    pub(super) token: Token,
    pub(super) exports: Vec<Arc<Export>>,
    /// The source's user wants what was sent to stay, however the attempt ends.
    pub(super) keep_partial: bool,
    /// The guest's state comes, too (M11).
    pub(super) state: bool,
    /// Guest writes refused before it began (M11).
    pub(super) refused_before: u64,
    /// What the source has been told of the disks' content.
    pub(super) digests: Arc<Digests>,
}

/// What the source is told of each disk.
pub(super) type Ready = heapless::Vec<DiskReady, DISKS_MAX>;

impl Reception {
    /// Empties what may be emptied, and starts writing back. The gates are at Receiving already.
    pub(super) fn begin(&mut self, targets: &[Target], mode: Mode) -> std::io::Result<Ready> {
        // The door has room for all of them, and for the phases.
        let room = (CONNECTIONS_MAX - PHASE_CONNECTIONS_MAX) / self.exports.len().max(1);
        let connections = u8::try_from(room.clamp(1, CONNECTIONS_PER_DISK_MAX)).unwrap_or(u8::MAX);
        let mut ready = heapless::Vec::new();
        for target in targets {
            let export = &target.export;
            // Only at the user's word: what an earlier attempt has brought is worth comparing.
            if mode == Mode::Overwrite
                && let Err(error) = export.discard_all()
            {
                log::info!("migration: disk {} cannot be emptied, all of it is sent: {error}", export.name());
            }
            let doubtful = matches!(&target.found, Found::Ours(entry) if entry.doubtful);
            // D10: looked at here, before anything is sent. D9: what a failed sync has left is not looked at.
            let content = export.disk().map(|disk| disk.content());
            let reads_as_zero = matches!(content, Some(Ok(Content::Hole))) && !doubtful;
            let compare = match (&target.found, mode) {
                _ if reads_as_zero || doubtful => false,
                (_, Mode::Incremental) => true,
                (Found::Ours(_), Mode::CopyAll) => true,
                _ => false,
            };
            if let Some(disk) = export.disk().filter(|_| compare) {
                // D9: a process that ended since may have failed to write back what the page cache has, and nobody
                // would be told again. What is compared is what the medium has.
                disk.flush()
                    .map_err(|error| std::io::Error::other(format!("flush: disk {}: {error}", export.name())))?;
                disk.forget_cache();
            }
            // As many as there are offers, which fit.
            let _ = ready.push(DiskReady { reads_as_zero, connections, compare });
            let writer = Arc::clone(export);
            let thread = std::thread::Builder::new().name("write back".to_owned()).stack_size(CONNECTION_STACK);
            // Ends by itself when the gate is no longer at Receiving.
            thread.spawn(move || writer.write_back())?;
        }
        Ok(ready)
    }

    /// Ends every data connection and waits for what they had admitted.
    pub(super) fn end_writers(&self) -> bool {
        end_writers(self.exports.iter())
    }

    /// Whether a sync has failed: it can never be sealed (D9).
    pub(super) fn is_poisoned(&self) -> bool {
        self.exports.iter().any(|export| export.disk().is_some_and(|disk| disk.is_poisoned()))
    }

    pub(super) fn make_durable(&mut self) -> Result<(), String> {
        for export in &self.exports {
            export.set_gate(Gate::Sealed);
        }
        for export in &self.exports {
            let disk = export.disk().ok_or_else(|| format!("disk {}: has gone", export.name()))?;
            disk.flush().map_err(|error| format!("flush: disk {}: {error}", export.name()))?;
            // Else all of it is gone when this process ends.
            if disk.is_removed() {
                return Err(format!("disk {}: its file was removed or replaced while it was received", export.name()));
            }
        }
        Ok(())
    }
}

/// Ends every data connection of `exports`, all of them before the first is waited for. `false`: some writer lives on.
pub(super) fn end_writers<'a>(exports: impl Iterator<Item = &'a Arc<Export>>) -> bool {
    let exports: Vec<_> = exports.collect();
    exports.iter().for_each(|export| export.shut_connections(Door::Migration));
    exports.iter().filter(|export| !export.end_connections(Door::Migration)).count() == 0
}
