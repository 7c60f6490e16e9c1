//! Everything that knows the phases of a migration.
//!
//! `wire` is bytes, `link` one phase connection, `dial` opens one. `destination` is the receiving side, `beat` its
//! signs of life, `stream` writes what comes inside a phase connection. On the sending side `source` is what the user
//! talks to, `drive` the phases in their order, `lanes` the data connections, `verify` those that ask for digests,
//! `meter` the rates, `preflight` what it looks at first. On both, `state` carries the guest's memory and devices,
//! `settle` says what is left to be said after an attempt, and `recover` lets the operator decide.

mod beat;
pub mod destination;
mod dial;
mod drive;
mod lanes;
pub mod link;
mod meter;
mod preflight;
pub mod recover;
pub mod settle;
pub mod source;
mod state;
mod stream;
mod synchrony;
mod verify;
pub mod wire;
