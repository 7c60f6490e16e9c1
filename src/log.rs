//! The program's logger: one line a message on stderr, and panics as one line too.
//!
//! A line is `[  123.456] blockferry: level: text`; the time is seconds since the host's boot, as in the kernel's own
//! log, so that it never jumps. What the user asked for and got is printed by the command line, never by the log.

use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::PanicHookInfo;

use ::log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::time::{ClockId, clock_gettime};

use crate::error::OneLine;

/// Environment variable with the level, for when `--log` is not given.
pub const VARIABLE: &str = "BLOCKFERRY_LOG";

/// The level when neither `--log` nor the variable says one.
pub const DEFAULT_LEVEL: LevelFilter = LevelFilter::Warn;

/// What `--log` takes.
pub const LEVELS: &str = "off, error, warn, info, debug or trace";

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= ::log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            print(&line(now_ms(), record.level(), &record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Turns logging on and makes panics one line. The first call wins; later ones change the level only.
pub fn init(level: LevelFilter) {
    static LOGGER: Stderr = Stderr;
    // A second call finds the logger there: nothing is wrong with that.
    if ::log::set_logger(&LOGGER).is_ok() {
        std::panic::set_hook(Box::new(|info| print(&panic_line(info))));
    }
    ::log::set_max_level(level);
}

/// The level of a name, in either case.
///
/// # Errors
/// The cause, for a usage error.
pub fn parse_level(name: &str) -> Result<LevelFilter, String> {
    name.parse().map_err(|_| format!("'{name}' is not a level: {LEVELS}"))
}

/// One finished line.
fn line(time_ms: u64, level: Level, text: &str) -> String {
    let name = match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    format!("[{:>5}.{:03}] blockferry: {name}: {}\n", time_ms / 1000, time_ms % 1000, OneLine(text))
}

/// One finished line for a panic: our own bug, so it says where.
fn panic_line(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    let mut out = String::from("blockferry: internal error: ");
    if let Some(place) = info.location() {
        let _ = write!(out, "{}:{}: ", place.file(), place.line());
    }
    let _ = writeln!(out, "{}", OneLine(text));
    out
}

/// Writes with one system call, so that lines of several threads or processes do not mix. A broken stderr is nobody's
/// problem.
fn print(line: &str) {
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Milliseconds since the host's boot.
fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let millis = u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0);
    seconds * 1000 + millis
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_with_time_and_level() {
        assert_eq!(line(12_345, Level::Warn, "a\nb"), "[   12.345] blockferry: warn: a\\nb\n");
        assert_eq!(line(1_234_567_007, Level::Error, "x"), "[1234567.007] blockferry: error: x\n");
    }

    #[test]
    fn levels_are_read_in_either_case_and_a_wrong_one_lists_them() {
        assert_eq!(parse_level("debug"), Ok(LevelFilter::Debug));
        assert_eq!(parse_level("OFF"), Ok(LevelFilter::Off));
        let error = parse_level("loud").expect_err("not a level");
        assert_eq!(error, "'loud' is not a level: off, error, warn, info, debug or trace");
    }

    #[test]
    fn the_clock_moves_forward() {
        let first = now_ms();
        assert!(first > 0 && now_ms() >= first);
    }
}
