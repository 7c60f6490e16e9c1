//! The blockferry executable: hands the arguments to the command line and exits as it says.

use std::process::ExitCode;

use blockferry::cli::{self, Entry};
use blockferry::error::Problem;

fn main() -> ExitCode {
    let entry = Entry {
        serve: |options| Err(Problem::fatal("serve", options.guest, "not built yet")),
        export: |_| Err(Problem::fatal("export", "", "not built yet")),
    };
    cli::run(std::env::args_os().skip(1), &entry).into()
}
