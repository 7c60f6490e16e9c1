//! Opens a phase connection to another host's migration door.

use std::sync::Arc;
use std::time::Instant;

use super::destination::{hello, meet};
use super::link::Link;
use super::wire::{Capabilities, Challenge, Hello, Role};
use crate::address::Address;
use crate::error::reason;
use crate::guest::Guest;
use crate::limits::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, HELLO_TIMEOUT, LINK_SILENCE_MAX};
use crate::nbd::client::{PhasesAnswer, offer_phases_before};

/// Dials as `role`, turns the connection into the phase protocol, and exchanges hellos. Returns the peer's; what its
/// title proves has been taken in (M8). Each step has its own time, and all of them end at `deadline`: the guest may be
/// waiting.
///
/// # Errors
/// One line: nobody is there, it is a plain NBD server, it speaks another version, or serves another guest.
pub(super) fn dial(guest: &Guest, address: &Address, role: Role, deadline: Instant) -> Result<(Link, Hello), String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let socket = Arc::new(address.connect(CONNECT_TIMEOUT.min(left)).map_err(|error| reason(&error))?);
    match offer_phases_before(&socket, deadline.min(Instant::now() + HANDSHAKE_TIMEOUT)) {
        Ok(PhasesAnswer::Accepted) => {}
        Ok(PhasesAnswer::PlainServer) => {
            return Err("is a plain NBD server, not a blockferry's migration door".to_owned());
        }
        Err(error) => return Err(error.to_string()),
    }
    socket.set_keep_alive(LINK_SILENCE_MAX);
    let mut link = Link::new(Arc::clone(&socket));
    let challenge = Challenge::random().map_err(|error| error.to_string())?;
    let ours = hello(guest, role, challenge, &socket);
    let (theirs, version) =
        link.hello(&ours, deadline.min(Instant::now() + HELLO_TIMEOUT)).map_err(|error| error.to_string())?;
    log::debug!("migration: {address}: phase protocol version {version}");
    if theirs.guest != ours.guest {
        return Err(format!("serves guest '{}', not '{}'", theirs.guest.escape_debug(), guest.name));
    }
    if !theirs.capabilities.has(Capabilities::NBD) {
        return Err("cannot use NBD, and the stream path is not built yet".to_owned());
    }
    if theirs.instance == guest.instance {
        return Err("is this process itself".to_owned());
    }
    meet(guest, &theirs);
    Ok((link, theirs))
}
