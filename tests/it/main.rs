//! Integration tests: the program and its parts against real programs that nobody here wrote.

mod bad_clients;
mod client;
mod export_cli;
mod exported;
mod handshake;
mod harness;
mod images;
mod interop;
mod orders;
