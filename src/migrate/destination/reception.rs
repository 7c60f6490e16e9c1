//! One attempt while it is received: its disks, its epoch, the files that it made.
//!
//! Made by PREPARE, held by the destination's stage under its lock, and gone with SEALED or with the attempt's end.
//! What is sent to it, the NBD server writes; nothing here does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Content, Disk};
use crate::export::{Door, Export, Gate};
use crate::guest::Guest;
use crate::limits::{CONNECTION_STACK, CONNECTIONS_MAX, CONNECTIONS_PER_DISK_MAX, DISKS_MAX, PHASE_CONNECTIONS_MAX};
use crate::migrate::wire::{DiskOffer, DiskReady, Epoch, Mode, Prepare, Token};
use crate::ownership::Stamp;

/// The attempt.
#[derive(Debug)]
pub(super) struct Reception {
    pub(super) stamp: Stamp,
    pub(super) epoch: Epoch,
    pub(super) token: Token,
    pub(super) exports: Vec<Arc<Export>>,
    /// Files that this attempt made, and the exports that they are behind.
    pub(super) created: Vec<(Arc<Export>, PathBuf)>,
    /// Disks that were empty when it began.
    pub(super) were_empty: Vec<String>,
    /// Guest writes refused before it began (M11).
    pub(super) refused_before: u64,
}

/// What the source is told of each disk.
pub(super) type Ready = heapless::Vec<DiskReady, DISKS_MAX>;

impl Reception {
    pub(super) fn create_missing(
        &mut self,
        guest: &Guest,
        export: &Arc<Export>,
        path: &Path,
        offer: &DiskOffer,
    ) -> Result<(), String> {
        if export.disk().is_some() {
            return Ok(());
        }
        let cache = guest.disk(&offer.name).map(|disk| disk.spec.cache).unwrap_or_default();
        let disk = Disk::create(path, offer.size_bytes, cache)
            .map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        export.set_disk(Arc::new(disk));
        self.created.push((Arc::clone(export), path.to_owned()));
        Ok(())
    }

    /// Empties what may be emptied, and starts writing back. The gates are at Receiving already.
    pub(super) fn begin(&mut self, remains: &[String], offer: &Prepare) -> std::io::Result<Ready> {
        // The door has room for all of them, and for the phases.
        let room = (CONNECTIONS_MAX - PHASE_CONNECTIONS_MAX) / self.exports.len().max(1);
        let connections = u8::try_from(room.clamp(1, CONNECTIONS_PER_DISK_MAX)).unwrap_or(u8::MAX);
        let mut ready = heapless::Vec::new();
        for export in &self.exports {
            let ours = remains.iter().any(|name| name == export.name());
            if (ours || offer.mode == Mode::Overwrite)
                && let Err(error) = export.discard_all()
            {
                log::info!("migration: disk {} cannot be emptied, all of it is sent: {error}", export.name());
            }
            // D10: looked at here, before anything is sent.
            let content = export.disk().map(|disk| disk.content());
            let reads_as_zero = matches!(content, Some(Ok(Content::Hole)));
            if ours || offer.mode == Mode::CopyAll {
                self.were_empty.push(export.name().to_owned());
            }
            // As many as there are offers, which fit.
            let _ = ready.push(DiskReady { reads_as_zero, connections, compare: false });
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

    pub(super) fn make_durable(&mut self) -> Result<(), String> {
        for export in &self.exports {
            export.set_gate(Gate::Sealed);
        }
        for export in &self.exports {
            let disk = export.disk().ok_or_else(|| format!("disk {}: has gone", export.name()))?;
            disk.flush().map_err(|error| format!("flush: disk {}: {error}", export.name()))?;
        }
        for (export, path) in &self.created {
            crate::disk::sync_directory_of(path).map_err(|error| format!("sync: disk {}: {error}", export.name()))?;
        }
        Ok(())
    }

    /// Removes the files that this attempt made, unless somebody put others in their place.
    pub(super) fn remove_created(&mut self) {
        for (export, path) in self.created.drain(..) {
            // Whoever still uses it would go on writing into a file without a name.
            let ours = export.take_disk().map(|disk| disk.identity());
            if ours.is_some() && Disk::identify(&path) == ours {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

/// Ends every data connection of `exports`, all of them before the first is waited for. `false`: some writer lives on.
pub(super) fn end_writers<'a>(exports: impl Iterator<Item = &'a Arc<Export>>) -> bool {
    let exports: Vec<_> = exports.collect();
    exports.iter().for_each(|export| export.shut_connections(Door::Migration));
    exports.iter().filter(|export| !export.end_connections(Door::Migration)).count() == 0
}
