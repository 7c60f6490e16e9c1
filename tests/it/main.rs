//! Integration tests: the program and its parts against real programs that nobody here wrote.

mod bad_input;
mod client;
mod handshake;
mod harness;
mod host;
mod json;
mod migrations;
mod orders;
mod relay;
mod writer;
