//! Everything that knows the phases of a migration.
//!
//! `wire` is bytes, `link` one phase connection, `dial` opens one. `destination` is the receiving side. On the sending
//! side `source` is what the user talks to, `drive` the phases in their order, `lanes` the data connections, `verify`
//! those that ask for digests, `meter` the rates. On both, `settle` says what is left to be said after an attempt, and
//! `recover` lets the operator decide.

pub mod destination;
mod dial;
mod drive;
mod lanes;
pub mod link;
mod meter;
pub mod recover;
pub mod settle;
pub mod source;
mod verify;
pub mod wire;
