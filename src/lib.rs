//! blockferry moves a running guest's disks from one hypervisor host to another.
//!
//! The executable is `main.rs`; everything it does is here, so that the tests can use the same code. Start with
//! `docs/architecture.md`: the way of a guest write, and the rules that the names D1 to D14 and M1 to M11 stand for.

pub mod address;
pub mod attach;
pub mod cause;
pub mod cli;
pub mod command;
pub mod control;
pub mod copy;
pub mod digest;
pub mod dirty;
pub mod disk;
pub mod domain;
pub mod door_at;
pub mod doors;
pub mod error;
pub mod export;
pub mod guest;
pub mod info;
pub mod inherited;
pub mod init;
pub mod json;
pub mod layers;
pub mod limits;
pub mod listener;
pub mod log;
pub mod migrate;
pub mod mirror;
pub mod nbd;
pub mod options;
pub mod ownership;
pub mod passed;
pub mod place;
pub mod progress;
pub mod ready;
pub mod relay;
pub mod serve;
pub mod socket;
pub mod standing;
pub mod trunk;
pub mod units;
pub mod uri;
pub mod vmm;
