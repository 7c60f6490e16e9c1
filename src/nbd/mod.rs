//! Everything that knows the NBD standard, and nothing that knows migrations.

pub mod client;
mod client_ask;
mod client_calls;
mod client_handshake;
pub mod handshake;
pub(crate) mod replies;
pub mod server;
pub mod wire;
