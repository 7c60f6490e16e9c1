//! Integration tests: the program and its parts against real programs that nobody here wrote.

mod backend;
mod bad_clients;
mod bad_input;
#[path = "../common/chance.rs"]
mod chance;
mod client;
mod control;
mod copy;
mod domain_xml;
mod export_cli;
mod exported;
mod extended;
mod extents;
mod footprint;
mod foreign;
mod foreign_guests;
mod guests;
mod handshake;
mod harness;
mod hooks;
mod host;
mod images;
mod info;
mod interop;
mod json;
mod migrations;
mod orders;
mod overlays;
mod ownership;
mod passed;
mod plain;
mod relay;
mod remains;
mod torture;
mod writer;
