//! blockferry
