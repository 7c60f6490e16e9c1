//! A virtio port as a control door: looks for the port, opens it, and answers one session after another.
//!
//! `serve` runs [`run`] on a thread of its own for each port. It never gives up: a driver that is loaded later, a port
//! that is plugged in or out, a host end that opens and closes are all waited for. It has no say in what a session may
//! do; that is [`crate::control::server`].

use std::io::Error;
use std::thread;

use crate::control::link::Link;
use crate::control::port::Port;
use crate::control::server::{Desk, converse};
use crate::error::reason;
use crate::limits::{PORT_LOOK, PORT_SEARCH_PERIOD};

/// Answers at the port of that name for as long as the process lives. What stands in the way is logged once, not at
/// every look.
pub fn run(name: &str, desk: &dyn Desk) -> ! {
    let mut told = String::new();
    loop {
        match Port::open(name) {
            Ok(port) => {
                log::info!("control: virtio:{name}: open");
                told.clear();
                let gone = attend(port, desk);
                log::warn!("control: virtio:{name}: lost: {}; looking for it again", reason(&gone));
            }
            Err(error) => {
                let cause = reason(&error);
                if cause != told {
                    log::warn!("control: virtio:{name}: {cause}; looking for it every {PORT_SEARCH_PERIOD:?}");
                    told = cause;
                }
            }
        }
        thread::sleep(PORT_SEARCH_PERIOD);
    }
}

/// Answers session after session until the port is gone, and says why it is.
pub(crate) fn attend(port: Port, desk: &dyn Desk) -> Error {
    let mut link = Link::over_port(port);
    loop {
        match converse(&mut link, desk) {
            // What the system says, and not we, is about the port and not about the session.
            Err(error) if error.raw_os_error().is_some() => return error,
            Err(error) => log::info!("control: port: session ended: {error}"),
            Ok(()) => {}
        }
        // A closed port is readable all the time: only this pause keeps the process from spinning.
        thread::sleep(PORT_LOOK);
    }
}
