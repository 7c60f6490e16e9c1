//! Everything that knows the phases of a migration.

pub mod link;
pub mod wire;
