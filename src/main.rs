//! The blockferry executable: hands the arguments to the command line and exits as it says.

use std::process::ExitCode;

use blockferry::cli::{self, Entry};
use blockferry::serve;

fn main() -> ExitCode {
    let entry = Entry { serve: serve::serve, export: serve::export };
    cli::run(std::env::args_os().skip(1), &entry).into()
}
