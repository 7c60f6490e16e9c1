//! The blockferry executable: hands the arguments to the command line and exits as it says; as a machine's first
//! process it is init.

use std::process::ExitCode;

use blockferry::cli::{self, Entry};
use blockferry::{init, serve};

fn main() -> ExitCode {
    if let Some(role) = init::role() {
        return init::run(role);
    }
    let entry = Entry { serve: serve::serve, export: serve::export };
    cli::run(std::env::args_os().skip(1), &entry).into()
}
