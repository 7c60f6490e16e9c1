//! The general help text.

use std::fmt::Write as _;

use super::{COMMANDS, LATER};

/// What `blockferry help` prints.
pub(super) fn general() -> String {
    let mut text = String::from(
        "blockferry moves a running guest's disks from one hypervisor host to another, over NBD.\n\n\
         usage: blockferry COMMAND [ARGUMENT]... [--OPTION]...\n\n",
    );
    for (spec, _) in COMMANDS {
        let _ = writeln!(text, "  {:10}{}", spec.name, spec.about);
    }
    let _ = writeln!(text, "  {:10}This text, or of one command: blockferry help migrate", "help");
    let _ = writeln!(text, "  {:10}The version", "version");
    let _ = writeln!(text, "\nNot built yet: {}.\n", LATER.join(", "));
    text.push_str(
        "ADDR is unix:///PATH or tcp://HOST:PORT (IPv6 in brackets). A door of serve and export is also fd:N, a\n\
         socket that was passed on, and unix:///PATH?mode=0660 gives its socket that mode.\n\
         SIZE is bytes, or a whole number of K, M, G or T (powers of 1024).\n\
         Every command takes --json, --log LEVEL, --help and --version.\n\n\
         Exit codes:\n\
         \x20 0  done\n\
         \x20 1  refused before the first byte, nothing changed\n\
         \x20 2  the command line is wrong\n\
         \x20 3  aborted later: this source still owns and serves the guest\n\
         \x20 4  the destination owns, something failed after it: do not start the guest here\n\
         \x20 5  who owns is not known from here\n\n\
         From host A to host B, without a VMM driver:\n\
         \x20 B$ blockferry serve g1 --disk vda,file=/d/g1.raw,size=20G --listen tcp://B:49152 --insecure-plaintext\n\
         \x20 A$ blockferry serve g1 --disk vda,file=/d/g1.raw --insecure-plaintext\n\
         \x20 A$ blockferry claim g1                  (once in the guest's life)\n\
         \x20 A$ blockferry migrate g1 tcp://B:49152 --insecure-plaintext\n\n\
         In trouble:\n\
         \x20 A$ blockferry who-owns g1\n\
         \x20 A$ blockferry recover g1                 (asks the other host, says what to type where)\n",
    );
    text
}
