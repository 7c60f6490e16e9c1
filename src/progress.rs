//! Progress of a migration as its user sees it: redrawn on a terminal, a line a second elsewhere, or `--json`.
//!
//! Draws into any writer; what the writer does not take is lost, because no migration should end for its picture.

use std::io::Write;
use std::time::Instant;

use crate::control::wire::{Convergence, DiskProgress, Done, Kept, Owner, Phase, Progress, Receipt, Verify};
use crate::error::{Exit, OneLine, Problem};
use crate::json;
use crate::limits::PROGRESS_LINE_INTERVAL;
use crate::units::{rate, size, time_ms, time_us};

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A line for each disk and one for the whole, drawn over each other.
    Terminal,
    /// At most one line a second, and one for each new phase.
    Lines,
    /// One object a line, each frame.
    Json,
}

/// Shows the progress of one migration.
#[derive(Debug)]
pub struct Display<W> {
    out: W,
    form: Form,
    guest: String,
    /// Lines of the last picture on a terminal.
    drawn: usize,
    /// The last plain line: when, what phase, whether converged and whether the destination was out of reach.
    told: Option<(Instant, Phase, bool, bool)>,
    /// It has been said that the disks travel inside the phase connection, and that a base saves nothing.
    noted: (bool, bool),
}

impl<W: Write> Display<W> {
    /// Nothing is shown yet.
    pub fn new(out: W, form: Form, guest: &str) -> Self {
        Self { out, form, guest: guest.to_owned(), drawn: 0, told: None, noted: (false, false) }
    }

    /// Shows how the migration is `now`.
    pub fn show(&mut self, progress: &Progress, now: Instant) {
        let form = self.form;
        let text = match form {
            Form::Json => json::progress(&self.guest, progress),
            Form::Terminal => self.picture(progress),
            Form::Lines => {
                let mut text = self.note(progress).map(|note| format!("{note}\n")).unwrap_or_default();
                if self.is_time(progress, now) {
                    text.push_str(&format!("{}\n", total_line(&self.guest, progress)));
                }
                text
            }
        };
        self.put(&text);
    }

    /// Shows how the migration ended.
    ///
    /// # Errors
    /// Its problem, for stderr and the exit code, when it did not end well.
    pub fn finish(&mut self, done: &Done) -> Result<(), Problem> {
        if self.form == Form::Json {
            self.put(&json::done(&self.guest, done));
        }
        if Exit::from_code(done.exit) != Exit::Done {
            return Err(problem(&self.guest, done));
        }
        if self.form != Form::Json {
            self.put(&format!("{}\n", done_line(&self.guest, done)));
        }
        Ok(())
    }

    /// A line that says, once, that and why NBD is not what the disks travel by, or that a base must be read.
    fn note(&mut self, progress: &Progress) -> Option<String> {
        let (guest, (travel, base)) = (OneLine(&self.guest), &mut self.noted);
        if !*travel && !progress.transport_cause.is_empty() {
            *travel = true;
            let cause = OneLine(&progress.transport_cause);
            return Some(format!(
                "{guest}: the disks travel inside the phase connection (stream), without NBD: {cause}"
            ));
        }
        if !*base && !progress.base_cause.is_empty() {
            *base = true;
            let cause = OneLine(&progress.base_cause);
            return Some(format!("{guest}: --same-base saves nothing, all of it is compared: {cause}"));
        }
        None
    }

    /// Whether a plain line is due; remembers it.
    fn is_time(&mut self, progress: &Progress, now: Instant) -> bool {
        let converged = progress.convergence == Convergence::Converged;
        let lost = progress.lost_ms.is_some();
        let due = self.told.is_none_or(|(when, phase, was_converged, was_lost)| {
            let turn = phase != progress.phase || was_converged != converged || was_lost != lost;
            turn || now.duration_since(when) >= PROGRESS_LINE_INTERVAL
        });
        if due {
            self.told = Some((now, progress.phase, converged, lost));
        }
        due
    }

    /// The picture of a terminal, drawn over the one before. Lines are not wrapped meanwhile: too long ones are cut.
    fn picture(&mut self, progress: &Progress) -> String {
        let mut text = String::from("\x1b[?7l");
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.drawn));
        }
        if let Some(note) = self.note(progress) {
            text.push_str(&format!("\r{note}\x1b[K\n"));
        }
        let lines = disk_lines(progress);
        self.drawn = lines.len() + 1;
        for line in lines.into_iter().chain([whole_line(&self.guest, progress)]) {
            text.push_str(&format!("\r{line}\x1b[K\n"));
        }
        // What a longer picture has left below.
        text.push_str("\x1b[J\x1b[?7h");
        text
    }

    fn put(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }
}

/// A line for each disk.
fn disk_lines(progress: &Progress) -> Vec<String> {
    let width = progress.disks.iter().map(|disk| disk.name.chars().count()).max().unwrap_or(0);
    let line = |disk: &DiskProgress| {
        format!(
            "  {:width$}  {:>8}  left {:>8}  {:>10}  dirty {:>10}  pass {}  {}",
            OneLine(&disk.name).to_string(),
            size(disk.size_bytes),
            size(disk.left_bytes),
            rate(disk.rate_bytes),
            rate(disk.dirty_rate_bytes),
            disk.passes,
            estimate(disk.left_bytes, disk.estimate_s),
        )
    };
    progress.disks.iter().map(line).collect()
}

/// When nothing will be left.
fn estimate(left_bytes: u64, estimate_s: Option<u32>) -> String {
    match estimate_s {
        _ if left_bytes == 0 => "clean".to_owned(),
        Some(seconds) => format!("about {}", time_ms(u64::from(seconds) * 1000)),
        None => "no end in sight".to_owned(),
    }
}

/// The line for the whole migration.
fn whole_line(guest: &str, progress: &Progress) -> String {
    let head = format!("{}: {}: {}", OneLine(guest), progress.phase.word(), time_ms(progress.elapsed_ms));
    let body = match progress.lost_ms {
        Some(lost_ms) => format!(": reconnecting for {}: {}", time_ms(lost_ms), OneLine(&progress.lost_cause)),
        None if progress.phase == Phase::State => format!(": {} of memory and devices", size(progress.state_bytes)),
        None if progress.phase > Phase::Passes => String::new(),
        None => format!(": {}", convergence(progress)),
    };
    let held = progress.held && progress.convergence == Convergence::Converged && progress.phase <= Phase::Passes;
    let tail = if held { format!("; held: blockferry switch {guest}") } else { String::new() };
    format!("{head}{body}{tail}")
}

/// Whether it converged, or why not, with the numbers that decide it.
fn convergence(progress: &Progress) -> String {
    let limit = progress.downtime_limit_ms;
    let predicted = match progress.predicted_final_ms {
        Some(ms) => format!("final pass {ms} ms, allowed {limit} ms"),
        None => format!("final pass not known yet, allowed {limit} ms"),
    };
    if let Some(since) = progress.synchronous {
        let word = if progress.convergence == Convergence::Converged { "converged, " } else { "" };
        return format!(
            "{word}synchronous (the guest wrote {}, the mirror copied {}): {predicted}",
            rate(since.dirty_rate_bytes),
            rate(since.rate_bytes)
        );
    }
    match progress.convergence {
        Convergence::Copying => "copying".to_owned(),
        Convergence::Converged => format!("converged: {predicted}"),
        Convergence::TooLong => format!("not converged: {predicted}"),
        Convergence::GuestIsFaster { dirty_rate_bytes, rate_bytes } => format!(
            "not converging: the guest writes {}, the mirror copies {}; {predicted}",
            rate(dirty_rate_bytes),
            rate(rate_bytes)
        ),
    }
}

/// All disks in one plain line.
fn total_line(guest: &str, progress: &Progress) -> String {
    let sum = |of: fn(&DiskProgress) -> u64| progress.disks.iter().map(of).fold(0, u64::saturating_add);
    let some = |what: &str, bytes: u64| if bytes == 0 { String::new() } else { format!(", {} {what}", size(bytes)) };
    format!(
        "{}; {} left, {}, dirty {}{}{}{}{}",
        whole_line(guest, progress),
        size(sum(|d| d.left_bytes)),
        rate(sum(|d| d.rate_bytes)),
        rate(sum(|d| d.dirty_rate_bytes)),
        some("sent again", sum(|d| d.resent_bytes)),
        some("there already", sum(|d| d.equal_bytes)),
        some("of the same base", sum(|d| d.base_bytes)),
        some("unverified", sum(|d| d.unverified_bytes)),
    )
}

/// What a receipt says, in a few words.
#[must_use]
pub fn receipt_words(receipt: &Receipt, digits: usize) -> String {
    let unread = match receipt.unread_bytes {
        0 => String::new(),
        bytes => format!(", {} taken as equal by --same-base and not read", size(bytes)),
    };
    if receipt.verify == Verify::None {
        return format!("nothing was verified{unread}");
    }
    let root: String = receipt.root.iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = root.get(..digits).unwrap_or(&root);
    let more = if shown.len() < root.len() { "..." } else { "" };
    format!("verified {}, root {shown}{more}{unread}", size(receipt.verified_bytes))
}

/// The line of a receipt that a host keeps.
#[must_use]
pub fn kept_line(kept: &Kept) -> String {
    let (way, order) = (if kept.gave { "gave to" } else { "got from" }, &kept.receipt);
    let count = |what: &str, bytes: Option<u64>| bytes.map(|bytes| format!(", {what} {}", size(bytes)));
    format!(
        "receipt: {way} {} order={}.{} attempt={:032x}: {}{}{}\n",
        OneLine(&kept.peer),
        order.term,
        order.generation,
        kept.attempt,
        receipt_words(&kept.receipt, usize::MAX),
        count("sent", kept.sent_bytes).unwrap_or_default(),
        count("there already", kept.equal_bytes.filter(|bytes| *bytes > 0)).unwrap_or_default(),
    )
}

/// What of the data had to be sent again because a connection was lost, if anything had.
fn again(resent_bytes: u64) -> String {
    if resent_bytes == 0 {
        String::new()
    } else {
        format!(" ({} of it again after a lost connection)", size(resent_bytes))
    }
}

/// The last line of a migration that went well.
fn done_line(guest: &str, done: &Done) -> String {
    let switchover = done.switchover_us.map(|us| format!(", switchover {}", time_us(us))).unwrap_or_default();
    let pause = done.pause_us.map(|us| format!(", the guest stood for {}", time_us(us))).unwrap_or_default();
    let state = done.state_bytes.map(|bytes| format!(", memory and devices {}", size(bytes))).unwrap_or_default();
    let equal = match done.equal_bytes {
        0 => String::new(),
        bytes => format!(" ({} were there already)", size(bytes)),
    };
    let verified = done.receipt.as_ref().map(|receipt| format!(", {}", receipt_words(receipt, 16))).unwrap_or_default();
    let note = if done.message.is_empty() { String::new() } else { format!(" ({})", OneLine(&done.message)) };
    format!(
        "{}: migrated to {}: sent {}{} and {} of zeroes{equal} in {} pass{}, \
         {}{switchover}{pause}{state}{verified}{note}",
        OneLine(guest),
        OneLine(&done.destination),
        size(done.sent_bytes),
        again(done.resent_bytes),
        size(done.zero_bytes),
        done.passes,
        if done.passes == 1 { "" } else { "es" },
        time_ms(done.total_ms),
    )
}

/// The problem of a migration that did not end well: its cause, and who owns the guest now.
fn problem(guest: &str, done: &Done) -> Problem {
    let exit = Exit::from_code(done.exit);
    let owner = match (exit, done.owner) {
        (Exit::Refused | Exit::Usage, _) => "nothing has changed".to_owned(),
        (_, Owner::Here) => "this source still owns and serves the guest".to_owned(),
        (_, Owner::Destination) => format!("{} owns the guest: do not start it here", done.destination),
        (_, Owner::Unknown | Owner::Elsewhere) => {
            "who owns the guest is not known from here: do not start it".to_owned()
        }
    };
    let cause = if done.message.is_empty() { owner } else { format!("{}; {owner}", done.message) };
    Problem { exit, ..Problem::aborted("migrate", guest, cause) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::wire::{Since, text};

    fn a_progress() -> Progress {
        let disk = |name: &str, left_bytes, estimate_s| DiskProgress {
            name: text(name),
            size_bytes: 20 << 30,
            left_bytes,
            rate_bytes: 118 << 20,
            dirty_rate_bytes: 3 << 20,
            passes: 2,
            estimate_s,
            ..DiskProgress::default()
        };
        Progress {
            phase: Phase::Passes,
            elapsed_ms: 12_300,
            convergence: Convergence::TooLong,
            predicted_final_ms: Some(900),
            downtime_limit_ms: 300,
            disks: [disk("vda", 1 << 30, Some(9)), disk("vdb10", 0, Some(0))].into_iter().collect(),
            ..Progress::default()
        }
    }

    fn shown(form: Form, frames: &[(&Progress, Duration)]) -> String {
        let mut out = Vec::new();
        let mut display = Display::new(&mut out, form, "g1");
        let start = Instant::now();
        for (progress, at) in frames {
            display.show(progress, start + *at);
        }
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_terminal_is_drawn_over() {
        let progress = a_progress();
        let disks = "\r  vda    20.0 GiB  left  1.0 GiB   118 MiB/s  dirty  3.0 MiB/s  pass 2  about 9.0 s\x1b[K\n\
                     \r  vdb10  20.0 GiB  left      0 B   118 MiB/s  dirty  3.0 MiB/s  pass 2  clean\x1b[K\n";
        let whole = "\rg1: passes: 12.3 s: not converged: final pass 900 ms, allowed 300 ms\x1b[K\n";
        let picture = format!("{disks}{whole}\x1b[J\x1b[?7h");
        let twice = shown(Form::Terminal, &[(&progress, Duration::ZERO), (&progress, Duration::ZERO)]);
        assert_eq!(twice, format!("\x1b[?7l{picture}\x1b[?7l\x1b[3A{picture}"));
    }

    #[test]
    fn plain_lines_come_once_a_second_and_at_each_turn() {
        let first = a_progress();
        let converged = Progress { convergence: Convergence::Converged, held: true, ..a_progress() };
        let last = Progress { phase: Phase::Final, ..a_progress() };
        let ms = Duration::from_millis;
        let frames =
            [(&first, ms(0)), (&first, ms(999)), (&first, ms(1000)), (&converged, ms(1001)), (&last, ms(1002))];
        let tail = "1.0 GiB left, 236 MiB/s, dirty 6.0 MiB/s";
        let line = format!("g1: passes: 12.3 s: not converged: final pass 900 ms, allowed 300 ms; {tail}\n");
        let held = format!(
            "g1: passes: 12.3 s: converged: final pass 900 ms, allowed 300 ms; held: blockferry switch g1; {tail}\n"
        );
        assert_eq!(shown(Form::Lines, &frames), format!("{line}{line}{held}g1: final pass: 12.3 s; {tail}\n"));
    }

    #[test]
    fn each_convergence_is_said_with_its_numbers() {
        let said = |convergence, predicted_final_ms| {
            super::convergence(&Progress { convergence, predicted_final_ms, ..a_progress() })
        };
        assert_eq!(said(Convergence::Copying, None), "copying");
        assert_eq!(said(Convergence::TooLong, None), "not converged: final pass not known yet, allowed 300 ms");
        assert_eq!(
            said(Convergence::GuestIsFaster { dirty_rate_bytes: 30 << 20, rate_bytes: 20 << 20 }, Some(9000)),
            "not converging: the guest writes 30.0 MiB/s, the mirror copies 20.0 MiB/s; \
             final pass 9000 ms, allowed 300 ms"
        );
        let synchronous = Progress {
            synchronous: Some(Since { dirty_rate_bytes: 30 << 20, rate_bytes: 20 << 20 }),
            ..Progress { convergence: Convergence::Converged, predicted_final_ms: Some(9), ..a_progress() }
        };
        assert_eq!(
            super::convergence(&synchronous),
            "converged, synchronous (the guest wrote 30.0 MiB/s, the mirror copied 20.0 MiB/s): \
             final pass 9 ms, allowed 300 ms"
        );
        assert_eq!(estimate(1, None), "no end in sight");
    }

    #[test]
    fn a_lost_destination_is_shown_at_once_with_the_cause() {
        let calm = a_progress();
        let mut lost = Progress { lost_ms: Some(3_200), lost_cause: text("timed out"), ..a_progress() };
        lost.disks[0].resent_bytes = 4 << 20;
        let ms = Duration::from_millis;
        let lines = shown(Form::Lines, &[(&calm, ms(0)), (&lost, ms(1)), (&lost, ms(2)), (&calm, ms(3))]);
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!(lines.len(), 3, "each turn has its line: {lines:?}");
        assert_eq!(
            lines[1],
            "g1: passes: 12.3 s: reconnecting for 3.2 s: timed out; \
             1.0 GiB left, 236 MiB/s, dirty 6.0 MiB/s, 4.0 MiB sent again"
        );
        let picture = shown(Form::Terminal, &[(&Progress { phase: Phase::Give, ..lost }, ms(0))]);
        assert!(picture.contains("\rg1: give: 12.3 s: reconnecting for 3.2 s: timed out\x1b[K"), "{picture:?}");
    }

    #[test]
    fn json_gets_every_frame() {
        let progress = a_progress();
        let lines = shown(Form::Json, &[(&progress, Duration::ZERO), (&progress, Duration::ZERO)]);
        assert_eq!(lines, json::progress("g1", &progress).repeat(2));
    }

    #[test]
    fn the_end_says_what_was_done_or_who_owns() {
        let good = Done {
            owner: Owner::Destination,
            destination: text("tcp://b:1"),
            sent_bytes: 3 << 30,
            zero_bytes: 1 << 20,
            passes: 3,
            total_ms: 32_100,
            switchover_us: Some(8_300),
            ..Done::default()
        };
        let mut out = Vec::new();
        Display::new(&mut out, Form::Lines, "g1").finish(&good).expect("went well");
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "g1: migrated to tcp://b:1: sent 3.0 GiB and 1.0 MiB of zeroes in 3 passes, 32.1 s, switchover 8.3 ms\n"
        );
        let again = Done { resent_bytes: 12 << 20, ..good.clone() };
        assert!(done_line("g1", &again).contains(": sent 3.0 GiB (12.0 MiB of it again after a lost connection) and "));
        for (exit, owner, cause) in [
            (Exit::Refused, Owner::Here, "disk full; nothing has changed"),
            (Exit::Aborted, Owner::Here, "disk full; this source still owns and serves the guest"),
            (Exit::GaveAway, Owner::Destination, "disk full; tcp://b:1 owns the guest: do not start it here"),
            (Exit::Unknown, Owner::Unknown, "disk full; who owns the guest is not known from here: do not start it"),
        ] {
            let done = Done { exit: exit.code(), owner, message: text("disk full"), ..good.clone() };
            let problem = Display::new(Vec::new(), Form::Lines, "g1").finish(&done).expect_err("did not");
            assert_eq!((problem.exit, problem.to_string()), (exit, format!("blockferry: migrate: g1: {cause}")));
        }
    }
}
