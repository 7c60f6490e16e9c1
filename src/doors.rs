//! The doors: accepts connections, carries them through the NBD handshake, and hands them to whoever speaks next.
//!
//! The guest door (and the only door of `export`) offers exports to the VMM; the migration door shows nothing to
//! anybody, opens exports to those who know a migration's secret names, and turns a connection that asks for it into
//! the phase protocol. What stands behind a door is given to [`open`] as a closure; this file knows neither the record
//! nor the phases.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::cause::Cause;
use crate::export::{Door, Export, Visit};
use crate::limits::{CONNECTION_STACK, CONNECTIONS_MAX};
use crate::listener::Listener;
use crate::nbd::handshake::{self, Description, Directory, OpenError, Outcome};
use crate::nbd::server;
use crate::socket::Socket;

/// Opens a door: from now on each connection to `listener` runs `serve` on a thread of its own, at most
/// [`CONNECTIONS_MAX`] at a time; further ones are closed at once.
///
/// # Errors
/// The system cannot start a thread.
pub fn open(
    name: &'static str,
    listener: Arc<Listener>,
    serve: impl Fn(Arc<Socket>) + Send + Sync + 'static,
) -> std::io::Result<()> {
    let serve = Arc::new(serve);
    let inside = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name(format!("{name} door")).stack_size(CONNECTION_STACK).spawn(move || {
        loop {
            let socket = match listener.accept() {
                Ok(Some(socket)) => Arc::new(socket),
                Ok(None) => return,
                Err(error) => {
                    log::error!("{name} door: {}: {error}", listener.at());
                    return;
                }
            };
            if inside.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                inside.fetch_sub(1, Ordering::AcqRel);
                log::warn!("{name} door: {}: more than {CONNECTIONS_MAX} connections", listener.at());
                continue;
            }
            let leave = Leave(Arc::clone(&inside));
            let serve = Arc::clone(&serve);
            let thread = thread::Builder::new().name(format!("{name} connection")).stack_size(CONNECTION_STACK);
            let started = thread.spawn(move || {
                serve(socket);
                drop(leave);
            });
            if let Err(error) = started {
                log::warn!("{name} door: {}: no thread for a connection: {error}", listener.at());
            }
        }
    })?;
    Ok(())
}

/// Counts a connection out however its thread ends.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves one connection that came through `name`'s door, up to the point where the phases begin: then `phases` has
/// the socket.
pub fn serve_nbd<D: Directory<Opened = Visit>>(
    name: &str,
    socket: &Arc<Socket>,
    directory: &D,
    phases: impl FnOnce(&Arc<Socket>),
) {
    match handshake::haggle(socket, directory) {
        Ok(Outcome::Transmission { opened, agreed }) => {
            let export = Arc::clone(opened.export());
            log::debug!("{name} door: export {}: opened", export.name());
            if let Err(error) = server::transmit(&opened, agreed) {
                log::info!("{name} door: export {}: connection closed: {error}", export.name());
            }
        }
        Ok(Outcome::Phases) => phases(socket),
        Ok(Outcome::Ended) => {}
        Err(error) => log::info!("{name} door: connection closed: {error}"),
    }
}

/// What the guest door offers to one connection: every disk of the guest that exists.
pub struct GuestDirectory<'a> {
    /// The guest's exports.
    pub exports: &'a [Arc<Export>],
    /// The connection that asks.
    pub socket: &'a Arc<Socket>,
    /// Says why a fenced or closed export is refused, naming the owner or whom it waits for.
    pub fenced: &'a dyn Fn() -> String,
}

impl GuestDirectory<'_> {
    /// The export of that name; without a name the only one there is.
    fn find(&self, name: &str) -> Result<(&Arc<Export>, Description), OpenError> {
        let export = match (name, self.exports) {
            ("", [only]) => Some(only),
            _ => self.exports.iter().find(|export| export.name() == name),
        };
        let export = export.ok_or(OpenError::Unknown)?;
        if export.gate().is_shut() {
            return Err(OpenError::Shutdown(Cause::new((self.fenced)())));
        }
        let disk = export.disk().ok_or_else(|| OpenError::Refused(Cause::new("this disk does not exist yet")))?;
        let mut description = server::description(disk.size(), export.is_read_only());
        // A disk's name fits.
        description.name = export.name().try_into().unwrap_or_default();
        Ok((export, description))
    }
}

impl Directory for GuestDirectory<'_> {
    type Opened = Visit;

    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        for export in self.exports.iter().filter(|export| export.disk().is_some()) {
            each(export.name(), "");
        }
    }

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        self.find(name).map(|(_, description)| description)
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        let (export, description) = self.find(name)?;
        let visit = export.enter(Door::Guest, self.socket).map_err(|why| OpenError::Refused(Cause::new(why)))?;
        Ok((description, visit))
    }

    fn takes_phases(&self) -> bool {
        false
    }
}
