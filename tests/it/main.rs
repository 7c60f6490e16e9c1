//! Integration tests: the program and its parts against real programs that nobody here wrote.

mod bad_clients;
mod bad_input;
#[path = "../common/chance.rs"]
mod chance;
mod client;
mod control;
mod domain_xml;
mod export_cli;
mod exported;
mod extended;
mod extents;
mod footprint;
mod foreign;
mod handshake;
mod harness;
mod host;
mod images;
mod interop;
mod json;
mod migrations;
mod orders;
mod ownership;
mod passed;
mod relay;
mod remains;
mod torture;
mod vmm;
mod writer;
