//! The blockferry executable.
fn main() {}
