//! `blockferry accept`: standard input and output become a connection to the migration door of this host's process.

use std::os::fd::{AsFd as _, OwnedFd};

use super::Command;
use super::guest::{CONTROL, GuestDoor, PLAINTEXT, guest_door};
use super::options::{Matches, Spec};
use crate::control::wire::Request;
use crate::error::{Problem, reason};
use crate::relay::{End, relay};

pub(super) const SPEC: Spec = Spec {
    name: "accept",
    arguments: "GUEST [--OPTION]...",
    about: "Relay stdin and stdout to the migration door of the process that serves the guest here",
    options: &[CONTROL, PLAINTEXT],
    notes: "For the other host's migrate, over anything that carries bytes both ways; the process here needs no\n\
            --listen. Ends when either side does. Whoever may use the control door here may do this.\n\n\
            Examples (the second on the host that gives):\n\
            \x20 blockferry accept g1\n\
            \x20 blockferry migrate g1 'exec:ssh B blockferry accept g1'\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    Ok(Command::Accept(guest_door(&SPEC, matches, guest)?))
}

pub(super) fn run(door: &GuestDoor) -> Result<(), Problem> {
    let mut client = door.connect("accept")?;
    client.tell(&Request::Accept)?;
    let refused = |cause: &dyn std::fmt::Display| Problem::refused("accept", &door.guest, cause);
    let copy = |fd: std::io::Result<OwnedFd>| fd.map_err(|error| refused(&reason(&error)));
    let (socket, said) = client.into_socket().ok_or_else(|| refused(&"the control door is no socket"))?;
    let input = copy(std::io::stdin().as_fd().try_clone_to_owned())?;
    let output = copy(std::io::stdout().as_fd().try_clone_to_owned())?;
    match relay(input, output, &socket, &said) {
        Ok(End::Input) => Ok(()),
        Ok(End::Socket) => Err(refused(&"the process here closed the connection")),
        Err(error) => Err(refused(&reason(&error))),
    }
}
