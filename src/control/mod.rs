//! The control door: how the command line of the same host talks to the process that serves a guest.
//!
//! [`wire`] has the messages and [`frame`] their bytes, both pure. [`link`] moves frames over a socket, [`server`]
//! answers for a [`server::Desk`], [`client`] asks. [`port`] is a virtio-serial port, [`port_door`] serves at one.

pub mod client;
pub mod frame;
pub mod link;
pub mod port;
pub mod port_door;
pub mod server;
pub mod wire;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests_bytes;
#[cfg(test)]
mod tests_ends;
#[cfg(test)]
mod tests_port;
