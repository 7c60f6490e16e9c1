//! `cargo xtask demo`: a guest that never stops writing moves from one host process to another, and then every write
//! that it was told is done is looked for where it should be.
//!
//! Everything is real: the executable that ships, two `serve` processes, loopback TCP between them, files on disk. Only
//! the guest is a thread of ours, because no virtual machine remembers what it wrote.

use crate::build;
use crate::demo_guest::{self, Guest, History};
use crate::demo_host::{self, GUEST, Host, Scratch};
use crate::demo_image::{self, BLOCK};
use crate::demo_live;
use crate::util::{self, Error, Output, Result};
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Size of the disk that moves, in MiB; half of it is holes.
const DISK_MIB: usize = 2048;
/// Size of each disk that stays.
const STAYS: u64 = 16 << 20;
/// How long the guest writes before it is moved, and after.
const BEFORE: Duration = Duration::from_millis(1500);
const AFTER: Duration = Duration::from_millis(1500);
/// How long the migration may take.
const MIGRATION: Duration = Duration::from_secs(90);
/// What the destination may allocate more than was sent there: the file system's own bookkeeping.
const SLACK: u64 = 1 << 20;

/// `cargo xtask demo [--guest]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    match arguments {
        [] => {}
        [word] if word == "--guest" => return demo_live::run(),
        [word, ..] => return Err(Error::usage("demo", word, "the only option is --guest")),
    }
    let executable = build::static_executable()?.place;
    let scratch = Scratch::new("demo")?;
    let stage = Stage::set(&scratch, &executable)?;
    let moved = stage.move_guest()?;
    stage.show(&moved)
}

/// Two hosts and their disks.
struct Stage {
    source: Host,
    destination: Host,
    /// The moving disk's image on each side.
    images: [PathBuf; 2],
    log: PathBuf,
}

/// A move that was made, and what it cost.
struct Moved {
    history: History,
    /// When it began.
    began: Instant,
    /// Bytes of data at the source when it began.
    data: u64,
    /// CPU seconds of source and destination during the move.
    cpu_s: [f64; 2],
    /// The migration's own account, a JSON object.
    done: String,
}

impl Stage {
    fn set(scratch: &Arc<Scratch>, executable: &Path) -> Result<Self> {
        let log = util::fresh_log("demo")?;
        let images = [scratch.path("a-vda.raw"), scratch.path("b-vda.raw")];
        let (shared, tools) = (scratch.path("vdb.raw"), scratch.path("vdc.raw"));
        let fault = |error: std::io::Error| Error::new("demo", "making the disks", error);
        let extents = demo_image::make(&images[0], DISK_MIB).map_err(fault)?;
        let data = demo_image::allocated(&images[0]).map_err(fault)?;
        for path in [&shared, &tools] {
            fs::File::create_new(path).and_then(|file| file.set_len(STAYS)).map_err(fault)?;
        }
        let disks = |image: &Path| {
            let file = |name: &str, path: &Path, more: &str| format!("{name},file={}{more}", path.display());
            [file("vda", image, ""), file("vdb", &shared, ",shared"), file("vdc", &tools, ",ro")]
        };
        let source = Host::start(scratch, executable, "A", &disks(&images[0]), &log)?;
        let destination = Host::start(scratch, executable, "B", &disks(&images[1]), &log)?;
        source.ask("claim", &[])?;
        println!();
        heading("A running guest moves from host A to host B");
        let process = |host: &Host| format!("process {}, {}", host.program.id(), host.migration);
        line("host A", process(&source));
        line("host B", process(&destination));
        let what = format!("{}, {} of data in {extents} extents", size((DISK_MIB as u64) << 20), size(data));
        line("disk vda", format!("moves     {what}"));
        line("disk vdb", format!("stays     {}, shared", size(STAYS)));
        line("disk vdc", format!("stays     {}, read-only", size(STAYS)));
        line("guest", "writes 4 KiB somewhere in vda 500 times a second, flushes 10 times, never stops");
        Ok(Self { source, destination, images, log })
    }

    /// Moves the guest while it writes.
    fn move_guest(&self) -> Result<Moved> {
        let died = |cause: String| Error::new("demo", "the guest", cause);
        let guest = Guest::start(&self.source.door, &self.destination.door, "vda").map_err(died)?;
        thread::sleep(BEFORE);
        let data = self.allocated(0)?;
        let cpu_s = || [self.source.program.cpu_s(), self.destination.program.cpu_s()];
        let cpu_before_s = cpu_s();
        println!("\n$ blockferry migrate {GUEST} {}", self.destination.migration);
        let began = Instant::now();
        let mut migrate = self.source.command("migrate", &[&self.destination.migration]);
        util::run("demo", &mut migrate, MIGRATION, Output::Shown)?;
        let cpu_after_s = cpu_s();
        thread::sleep(AFTER);
        let history = guest.stop().map_err(died)?;
        let cpu_s = [0, 1].map(|side| cpu_after_s[side] - cpu_before_s[side]);
        Ok(Moved { history, began, data, cpu_s, done: self.source.done()? })
    }

    fn allocated(&self, side: usize) -> Result<u64> {
        let image = &self.images[side];
        demo_image::allocated(image).map_err(|error| Error::new("demo", image.display(), error))
    }

    /// Looks at everything, says what it finds, and fails if anything is not as it should be.
    fn show(&self, moved: &Moved) -> Result<()> {
        let mut wrong = Vec::new();
        self.show_guest(&moved.history, moved, &mut wrong)?;
        self.show_disk(&moved.history, &mut wrong)?;
        self.show_cost(moved);
        self.show_owner(&moved.history, &mut wrong)?;
        println!();
        match wrong.as_slice() {
            [] => {
                println!("Nothing was lost, and there is one owner.");
                Ok(())
            }
            wrong => Err(Error::new("demo", "the move", format!("{} (see {})", wrong.join("; "), self.log.display()))),
        }
    }

    fn show_guest(&self, history: &History, moved: &Moved, wrong: &mut Vec<String>) -> Result<()> {
        let died = |cause: String| Error::new("demo", "reading back", cause);
        let lost = history.lost(&self.destination.door, "vda").map_err(died)?;
        let all = history.acknowledged.len() as u64;
        let at_b = history.acknowledged.iter().filter(|write| write.moved).count() as u64;
        let again = all - history.last.len() as u64;
        heading("What the guest saw");
        row("writes acknowledged", count(all), format!("{} at A, then {} at B", count(all - at_b), count(at_b)));
        row("found at B", count(all - lost), format!("{} of them overwritten by later ones", count(again)));
        row("lost", count(lost), "");
        row("flushes", count(history.flushes), "");
        let (pause, other) = history.pauses();
        row("pause at hand-over", ms(pause), format!("between two acknowledgements; longest other: {}", ms(other)));
        let hand_over = history.acknowledged.iter().find(|write| write.moved).map_or(moved.began, |write| write.at);
        let (before, during) = (
            history.latency(moved.began.checked_sub(BEFORE).unwrap_or(moved.began), moved.began),
            history.latency(moved.began, hand_over),
        );
        row("latency of a write", ms(during.0), format!("median while it moved; {} before", ms(before.0)));
        row("", ms(during.1), format!("99 of 100 while it moved; {} before", ms(before.1)));
        if at_b == 0 {
            wrong.push("the guest has not gone on at B".to_owned());
        }
        if lost > 0 {
            wrong.push(format!("{lost} acknowledged writes are lost"));
        }
        Ok(())
    }

    fn show_disk(&self, history: &History, wrong: &mut Vec<String>) -> Result<()> {
        let [a, b] = &self.images;
        let skip = |block| history.moved.contains(&block);
        let fault = |error: std::io::Error| Error::new("demo", "comparing the images", error);
        let (compared, differs) = demo_image::compare(a, b, skip).map_err(fault)?;
        let since = history.moved.len() as u64;
        let [at_a, at_b] = [self.allocated(0)?, self.allocated(1)?];
        heading("What arrived");
        let verdict = if differs.is_none() { "identical" } else { "DIFFERS" };
        row("disk vda", verdict, format!("{} blocks of 4 KiB, compared byte for byte", count(compared)));
        row("", count(since), "blocks left out: written at B after the hand-over");
        row("space on disk at A", size(at_a), format!("of {}", size((DISK_MIB as u64) << 20)));
        row("space on disk at B", size(at_b), "holes kept, and what the guest wrote since");
        if let Some(block) = differs {
            wrong.push(format!("block {block} differs"));
        }
        if at_b > at_a + since * BLOCK as u64 + SLACK {
            wrong.push(format!("holes were filled: {} at A, {} at B", size(at_a), size(at_b)));
        }
        Ok(())
    }

    fn show_cost(&self, moved: &Moved) {
        let said = |key| demo_host::number(&moved.done, key).unwrap_or(0);
        let (sent, total_ms) = (said("sent_bytes"), said("total_ms"));
        let changed = moved.history.changed_since(moved.began) * BLOCK as u64;
        let beyond = sent.saturating_sub(moved.data);
        let gib = real(moved.data) / real(1 << 30);
        heading("What it cost");
        let rate = real(sent) / real(1 << 20) / (real(total_ms.max(1)) / 1000.0);
        row("total time", format!("{:.2} s", real(total_ms) / 1000.0), format!("{rate:.0} MiB/s, durable at B"));
        row("sent", size(sent), format!("in {} passes", said("passes")));
        row(
            "beyond the data",
            size(beyond),
            format!("{} changed meanwhile: ratio {:.2}", size(changed), { real(beyond) / real(changed.max(1)) }),
        );
        row("switchover", ms(Duration::from_micros(said("switchover_us"))), "from quiesce to running at B");
        let sides = [&self.source.program, &self.destination.program];
        for ((name, program), cpu_s) in ["A", "B"].iter().zip(sides).zip(moved.cpu_s) {
            let note = format!("{:.2} s per GiB of data, with the guest's own requests", cpu_s / gib);
            row(&format!("CPU of {name}"), format!("{cpu_s:.2} s"), note);
            row(&format!("memory of {name}"), size(program.resident_max()), "resident, at most");
        }
    }

    fn show_owner(&self, history: &History, wrong: &mut Vec<String>) -> Result<()> {
        let [a, b] = [self.source.ask("status", &["--json"])?, self.destination.ask("status", &["--json"])?];
        heading("Who owns it now");
        for (name, status, expected) in [("host A", &a, "given"), ("host B", &b, "owner")] {
            let state = demo_host::text(status, "state").unwrap_or("?");
            let order = ["term", "generation"].map(|key| demo_host::number(status, key).unwrap_or(0).to_string());
            line(name, format!("{state:<9} order {}", order.join(".")));
            if state != expected {
                wrong.push(format!("{name} is {state}, not {expected}"));
            }
        }
        let says = history.source_says.trim_start_matches("WRITE: ");
        line("a write at A", says);
        if !history.source_says.contains("ESHUTDOWN") {
            wrong.push(format!("a write at A after the hand-over: {}", history.source_says));
        }
        match demo_guest::connect(&self.source.door, "vda") {
            Ok(_) => wrong.push("A still opens the disk".to_owned()),
            // What stands in brackets is the host's own text.
            Err(cause) => line(
                "a VMM at A",
                match cause.split_once('(') {
                    Some((_, text)) => format!("refused: {}", text.trim_end_matches(')')),
                    None => cause,
                },
            ),
        }
        Ok(())
    }
}

pub(crate) fn heading(text: &str) {
    println!("\n{text}");
}

/// A fact without a number.
pub(crate) fn line(name: &str, what: impl Display) {
    println!("  {name:<14}{what}");
}

/// A number, right-aligned, and what it means.
pub(crate) fn row(name: &str, number: impl Display, note: impl Display) {
    println!("{}", format!("  {name:<20}{:>11}   {note}", number.to_string()).trim_end());
}

/// `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes in MiB or GiB.
pub(crate) fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 {
        format!("{:.2} GiB", real(bytes) / real(1 << 30))
    } else {
        format!("{:.1} MiB", real(bytes) / real(1 << 20))
    }
}

/// Milliseconds, with two digits where they are few.
pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.1} ms") }
}

#[expect(clippy::cast_precision_loss, reason = "for people, who do not read 2^52")]
pub(crate) fn real(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([size(1 << 30), size(3 << 19)], ["1.00 GiB", "1.5 MiB"]);
        assert_eq!([ms(Duration::from_micros(3456)), ms(Duration::from_micros(34_560))], ["3.46 ms", "34.6 ms"]);
    }
}
