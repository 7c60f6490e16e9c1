//! What the migration door offers to a data connection: the disks of the attempt that is received, to whoever knows
//! their present names (D4).

use std::sync::Arc;

use super::reception::Reception;
use super::{Destination, Inner, Stage};
use crate::cause::Cause;
use crate::error::reason;
use crate::export::{Door, Export, Visit};
use crate::guest::Guest;
use crate::migrate::wire::{Epoch, ExportName, Token};
use crate::nbd::handshake::{Description, Directory, OpenError};
use crate::nbd::server;
use crate::ownership::{Attempt, Instance};
use crate::socket::Socket;
use crate::trunk::Slots;

/// What the migration door offers to one connection: nothing that could be listed.
pub struct MigrationDirectory<'a> {
    /// The guest.
    pub guest: &'a Guest,
    /// The connection that asks.
    pub socket: &'a Arc<Socket>,
}

impl Directory for MigrationDirectory<'_> {
    type Opened = Visit;

    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        let inner = self.guest.destination.lock();
        let disk = inner.find(self.guest, name).and_then(|export| export.disk()).ok_or(OpenError::Unknown)?;
        Ok(server::description(disk.size(), false))
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        self.guest.destination.open(self.guest, name, self.socket)
    }

    fn takes_phases(&self) -> bool {
        true
    }
}

impl Destination {
    /// Opens a data connection for who knows a current name (D4): checked and entered under the lock that a fence
    /// takes. Whatever is wrong with a name, there is no such export.
    pub(super) fn open(
        &self,
        guest: &Guest,
        name: &str,
        socket: &Arc<Socket>,
    ) -> Result<(Description, Visit), OpenError> {
        let inner = self.lock();
        let export = inner.find(guest, name).ok_or(OpenError::Unknown)?;
        let visit = export.enter(Door::Migration, socket).map_err(|why| OpenError::Refused(Cause::new(why)))?;
        Ok((server::description(visit.disk().size(), false), visit))
    }

    /// Opens all disks to the blocks that come inside a phase connection: the same names, checked and entered under the
    /// same lock.
    ///
    /// # Errors
    /// One line for the source's user.
    pub(super) fn open_stream(&self, guest: &Guest, known: KnownName, is_open: bool) -> Result<Opened, String> {
        if is_open {
            return Err("this connection carries blocks already".to_owned());
        }
        let inner = self.lock();
        let reception = inner.current(guest, &known).ok_or("nothing is received under that name")?;
        let (slots, bell) = Slots::new().map_err(|error| format!("no room for blocks: {}", reason(&error)))?;
        let enter = |export: &Arc<Export>| export.enter(Door::Migration, &bell);
        let visits: Result<_, _> = reception.exports.iter().map(enter).collect();
        Ok(Opened { slots, bell, visits: visits? })
    }
}

/// The disks of an attempt, open to the blocks that come inside a phase connection.
#[derive(Debug)]
pub(in crate::migrate) struct Opened {
    /// Where blocks wait for their writer.
    pub(in crate::migrate) slots: Slots,
    /// Its shutdown is the writer's end.
    pub(in crate::migrate) bell: Arc<Socket>,
    /// The disks, in the order of the offer.
    pub(in crate::migrate) visits: Vec<Visit>,
}

/// What whoever may write into the disks has been told.
#[derive(Debug, Clone, Copy)]
pub(super) struct KnownName {
    pub(super) attempt: Attempt,
    pub(super) instance: Instance,
    pub(super) epoch: Epoch,
    pub(super) token: Token,
}

impl Inner {
    fn find(&self, guest: &Guest, name: &str) -> Option<&Arc<Export>> {
        let ExportName { attempt, instance, epoch, token, disk } = ExportName::parse(name)?;
        let reception = self.current(guest, &KnownName { attempt, instance, epoch, token })?;
        reception.exports.iter().find(|export| export.name() == disk)
    }

    /// What is received, for who knows all of its present names.
    fn current(&self, guest: &Guest, known: &KnownName) -> Option<&Reception> {
        let Stage::Receiving(reception) = &self.stage else { return None };
        let current = known.attempt == reception.stamp.attempt
            && known.instance == guest.instance
            && known.epoch == reception.epoch
            && known.token.matches(&reception.token);
        current.then_some(reception)
    }
}
