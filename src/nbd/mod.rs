//! Everything that knows the NBD standard, and nothing that knows migrations.

pub mod handshake;
pub mod server;
pub mod wire;
