//! Integration tests: the program and its parts against real programs that nobody here wrote.

mod client;
mod handshake;
mod harness;
mod orders;
mod ownership;
