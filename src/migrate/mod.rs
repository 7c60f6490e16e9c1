//! Everything that knows the phases of a migration.

pub mod wire;
