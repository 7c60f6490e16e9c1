//! What the migration door offers to a data connection: the disks of the attempt that is received, to whoever knows
//! their present names (D4).

use std::sync::Arc;

use super::{Destination, Inner, Stage};
use crate::cause::Cause;
use crate::export::{Door, Export, Visit};
use crate::guest::Guest;
use crate::migrate::wire::ExportName;
use crate::nbd::handshake::{Description, Directory, OpenError};
use crate::nbd::server;
use crate::socket::Socket;

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
}

impl Inner {
    fn find(&self, guest: &Guest, name: &str) -> Option<&Arc<Export>> {
        let Stage::Receiving(reception) = &self.stage else { return None };
        let name = ExportName::parse(name)?;
        let current = name.attempt == reception.stamp.attempt
            && name.instance == guest.instance
            && name.epoch == reception.epoch
            && name.token.matches(&reception.token);
        reception.exports.iter().find(|export| current && export.name() == name.disk)
    }
}
