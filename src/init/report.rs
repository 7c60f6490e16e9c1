//! What PID 1 and its steward say: one line a message, once on the console and always in the kernel's log.
//!
//! The kernel's log (/dev/kmsg) takes a priority with each line, and prints what is urgent enough for the console's
//! level on the console by itself. So a line goes to the console from here only when the kernel would not print it.
//! Nothing here can fail its caller: a line that cannot be written is lost.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write as _;

use crate::error::{OneLine, Problem};

/// The kernel's log.
const KMSG: &str = "/dev/kmsg";
/// The console's level is the first number here: what has a lower one is printed.
const PRINTK: &str = "/proc/sys/kernel/printk";
/// Whether the kernel drops lines of a process that says a lot at once.
const RATE_LIMIT: &str = "/proc/sys/kernel/printk_devkmsg";

/// syslog's priorities, as far as they are used here.
#[derive(Debug, Clone, Copy)]
enum Priority {
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
    Debug = 7,
}

/// Asks the kernel not to drop lines when there are many at once, as there are during a boot.
pub(super) fn begin() {
    let _ = fs::write(RATE_LIMIT, "on");
}

/// Makes the console ours alone: the kernel does not print into our last line.
pub(super) fn silence_the_kernel() {
    let _ = fs::write(PRINTK, "1");
}

/// Something that ends the machine's work.
pub(super) fn problem(problem: &Problem) {
    say(Priority::Error, &problem.to_string());
}

/// Something that was asked for and did not happen; the machine goes on.
pub(super) fn warning(text: fmt::Arguments<'_>) {
    say(Priority::Warning, &line(text));
}

/// Something that an operator may want to know.
pub(super) fn notice(text: fmt::Arguments<'_>) {
    say(Priority::Notice, &line(text));
}

/// A step.
pub(super) fn info(text: fmt::Arguments<'_>) {
    say(Priority::Info, &line(text));
}

/// A step of no interest; in the kernel's log only.
pub(super) fn debug(text: fmt::Arguments<'_>) {
    let _ = kernel_log(Priority::Debug, &line(text));
}

/// A line for a program to read: on the console only, and whole, because what was under way is sent first.
pub(super) fn result(text: &impl fmt::Display) {
    let mut stdout = std::io::stdout();
    let _ = stdout.flush();
    let _ = rustix::termios::tcdrain(&stdout);
    let _ = stdout.write_all(format!("{text}\n").as_bytes()).and_then(|()| stdout.flush());
    let _ = rustix::termios::tcdrain(&stdout);
}

fn line(text: fmt::Arguments<'_>) -> String {
    format!("blockferry: init: {}", OneLine(&text.to_string()))
}

fn say(priority: Priority, line: &str) {
    let logged = kernel_log(priority, line).is_ok();
    let level = fs::read_to_string(PRINTK).ok().and_then(|text| console_level(&text));
    if !(logged && level.is_some_and(|level| (priority as u32) < level)) {
        let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
    }
}

/// One write is one entry; line ends in it would begin another.
fn kernel_log(priority: Priority, line: &str) -> std::io::Result<()> {
    let entry = format!("<{}>{line}\n", priority as u32);
    OpenOptions::new().write(true).open(KMSG)?.write_all(entry.as_bytes())
}

/// The first of the numbers in [`PRINTK`].
fn console_level(text: &str) -> Option<u32> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(line(format_args!("module {}: no", "a\nb")), "blockferry: init: module a\\nb: no");
    }

    #[test]
    fn the_consoles_level_is_the_first_number() {
        assert_eq!(console_level("7\t4\t1\t7\n"), Some(7));
        assert_eq!(console_level(""), None);
        assert_eq!(console_level("loud 4"), None);
    }
}
