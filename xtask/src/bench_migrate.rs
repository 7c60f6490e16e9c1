//! Whole migrations under a load that nobody here wrote: fio writes blocks with checksums until the source refuses,
//! and a second fio looks for them on the destination. fio counts the refused ones as written, too: what it misses must
//! be among those that the first fio says it was refused.

use crate::bench::{Bench, Column, Table, median};
use crate::bench_server::{terse, uri};
use crate::demo::{count, real};
use crate::demo_host::{self, Host, Program};
use crate::util::{self, Error, Result};
use crate::{bench_chain, demo_image};
use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// Size of the disk, in MiB; half of it is holes.
const DISK_MIB: usize = 1024;
/// How long fio writes before the migration begins.
const BEFORE: Duration = Duration::from_secs(1);
/// How long the migration may take, and fio to notice that the source refuses.
const MIGRATION: Duration = Duration::from_secs(90);
const FIO_END: Duration = Duration::from_secs(20);
/// How long fio may take to read everything back.
const READ_BACK: Duration = Duration::from_secs(60);
const COLUMNS: &[Column] = &[
    Column { key: "median", title: "median", digits: 2 },
    Column { key: "best", title: "best", digits: 2 },
    Column { key: "worst", title: "worst", digits: 2 },
];
const MIB: f64 = 1024.0 * 1024.0;
/// What is verified: the default first, of which the table tells most.
const VERIFY: [&str; 3] = ["written", "none", "full"];

/// What one migration was like.
struct Run {
    sent_mib: f64,
    /// Bytes sent over what the source holds at the end.
    sent_ratio: f64,
    passes: f64,
    total_s: f64,
    switchover_ms: f64,
    acknowledged: f64,
    resident_mib: [f64; 2],
    cpu_s_per_gib: [f64; 2],
}

/// Measures. The second result is an error if a single write was lost.
pub(crate) fn run(bench: &Bench, runs: usize) -> Result<(Table, Result<()>)> {
    if util::find_program("fio").is_none() {
        return Err(Error::new("bench", "fio", "not installed: apt-get install fio"));
    }
    let [chain, durable] = bench_chain::reference(bench)?;
    let mut modes: [Vec<Run>; VERIFY.len()] = Default::default();
    let mut lost = Vec::new();
    // In turns: what the machine does meanwhile, it does to all.
    for number in 0..runs {
        for (verify, done) in VERIFY.iter().zip(&mut modes) {
            let (run, wrong) = once(bench, number, verify)?;
            done.push(run);
            lost.extend(wrong.map(|wrong| format!("migration {number}, --verify {verify}: {wrong}")));
        }
    }
    let row_of = |name: &str, done: &[Run], of: &dyn Fn(&Run) -> f64| {
        let numbers: Vec<f64> = done.iter().map(of).collect();
        let best = numbers.iter().copied().fold(f64::INFINITY, f64::min);
        let worst = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (name.to_owned(), vec![median(&numbers), Some(best), Some(worst)])
    };
    let [done, none, _] = &modes;
    let row = |name: &str, of: &dyn Fn(&Run) -> f64| row_of(name, done, of);
    let both = |run: &Run| run.cpu_s_per_gib[0] + run.cpu_s_per_gib[1];
    let mut rows = vec![
        row("total time, s", &|run| run.total_s),
        row("switchover, ms", &|run| run.switchover_ms),
        row("passes", &|run| run.passes),
        row("sent, MiB", &|run| run.sent_mib),
        row("sent over held, x", &|run| run.sent_ratio),
        row("memory of source, MiB", &|run| run.resident_mib[0]),
        row("memory of destination, MiB", &|run| run.resident_mib[1]),
        row("CPU of source, s/GiB", &|run| run.cpu_s_per_gib[0]),
        row("CPU of destination, s/GiB", &|run| run.cpu_s_per_gib[1]),
        row("CPU over the bare chain's, x", &|run| both(run) / chain),
        row("CPU over its with fsync, x", &|run| both(run) / durable),
    ];
    let ratio = |of: &dyn Fn(&Run) -> f64, done: &[Run]| {
        let middle = |done: &[Run]| median(&done.iter().map(of).collect::<Vec<_>>()).unwrap_or(f64::NAN);
        vec![Some(middle(done) / middle(none)), None, None]
    };
    for (verify, done) in VERIFY.iter().zip(&modes) {
        if *verify != VERIFY[0] {
            rows.push(row_of(&format!("{verify}: total time, s"), done, &|run| run.total_s));
            rows.push(row_of(&format!("{verify}: switchover, ms"), done, &|run| run.switchover_ms));
            rows.push(row_of(&format!("{verify}: CPU of both, s/GiB"), done, &both));
        }
        if *verify != "none" {
            rows.push((format!("{verify} over none: total time, x"), ratio(&|run| run.total_s, done)));
            rows.push((format!("{verify} over none: CPU of both, x"), ratio(&both, done)));
        }
    }
    let acknowledged: f64 = modes.iter().flatten().map(|run| run.acknowledged).sum();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let acknowledged = count(acknowledged as u64);
    let notes = vec![
        format!("writes: {acknowledged} acknowledged, lost in {} of {} migrations", lost.len(), runs * VERIFY.len()),
        "verified as by default (--verify written) where nothing else is said; medians over medians".to_owned(),
        "lost: acknowledged, and not found by fio's second run at the destination; or images that differ".to_owned(),
        "held: what the source has allocated at the end; CPU is per GiB of that, with the guest's own requests"
            .to_owned(),
        format!("bare chain over TCP in this run: {chain:.3} CPU s/GiB, with fsync {durable:.3}, both ends together"),
    ];
    let title = format!(
        "{runs} migrations of each kind of 1 GiB, half holes, over TCP, under fio: 500 verified 4 KiB writes a second"
    );
    let verdict = if lost.is_empty() { Ok(()) } else { Err(Error::new("bench", "migrate", lost.join("; "))) };
    Ok((Table { title, columns: COLUMNS, rows, notes }, verdict))
}

/// One migration, and what is wrong with it.
fn once(bench: &Bench, number: usize, verify: &str) -> Result<(Run, Option<String>)> {
    let images = ["a.raw", "b.raw"].map(|name| bench.scratch.path(name));
    for image in &images {
        // From the run before.
        let _ = fs::remove_file(image);
    }
    let fault = |error: std::io::Error| Error::new("bench", "disk image", error);
    demo_image::make(&images[0], DISK_MIB).map_err(fault)?;
    let [source, destination] = bench.hosts(&images)?;

    let [said, errors] = ["fio.out", "fio.err"].map(|name| bench.scratch.path(name));
    let _ = fs::remove_file(&errors);
    let mut fio = fio(bench, &source, number);
    fio.args(["--do_verify=0", "--verify_state_save=1", "--rate_iops=500", "--fsync=50"]).arg("--output").arg(&said);
    let mut writer = Program::start(&bench.scratch, "fio", fio.stdout(Stdio::null()), &errors)?;
    thread::sleep(BEFORE);
    let sides = [&source.program, &destination.program];
    let before = sides.map(Program::cpu_s);
    let mut migrate = source.command("migrate", &[&destination.migration, "--json", "--verify", verify]);
    let migrated = util::capture("bench", &mut migrate, MIGRATION)?;
    let after = sides.map(Program::cpu_s);
    if !migrated.status.success() {
        return Err(Error::new("bench", "migrate", migrated.stderr));
    }
    if writer.wait(FIO_END).is_none() {
        return Err(Error::new("bench", "fio", "goes on writing at the source after the hand-over"));
    }
    let [said, errors] = [said, errors].map(|path| fs::read_to_string(path).unwrap_or_default());
    let wrote = terse(&said).ok_or_else(|| Error::new("bench", "fio", errors.lines().next().unwrap_or("no result")))?;

    let mut look = self::fio(bench, &destination, number);
    look.args(["--verify_only", "--verify_state_load=1", "--verify_state_save=0", "--continue_on_error=verify"]);
    let looked = util::capture("bench", &mut look, READ_BACK)?;
    let read = terse(&looked.stdout).ok_or_else(|| Error::new("bench", "fio", &looked.stderr))?;
    let refused = offsets(&errors, "write offset=");
    let missing = offsets(&looked.stderr, " offset ");
    let lost = missing.difference(&refused).count();
    let (_, differs) = demo_image::compare(&images[0], &images[1], |_| false).map_err(fault)?;
    let wrong = if lost > 0 {
        Some(format!("{lost} acknowledged writes are lost"))
    } else if read.read_kib < wrote.written_kib || wrote.written_kib == 0.0 {
        Some(format!("fio wrote {} KiB and looked at {}", wrote.written_kib, read.read_kib))
    } else {
        differs.map(|block| format!("block {block} differs"))
    };
    let done = source.done()?;
    let told = |key| real(demo_host::number(&done, key).unwrap_or(0));
    let held = real(demo_image::allocated(&images[0]).map_err(fault)?);
    let gib = held / MIB / 1024.0;
    let run = Run {
        sent_mib: told("sent_bytes") / MIB,
        sent_ratio: told("sent_bytes") / held,
        passes: told("passes"),
        total_s: told("total_ms") / 1000.0,
        switchover_ms: told("switchover_us") / 1000.0,
        acknowledged: wrote.written_kib / 4.0,
        resident_mib: sides.map(|program| real(program.resident_max()) / MIB),
        cpu_s_per_gib: [0, 1].map(|side| (after[side] - before[side]) / gib),
    };
    Ok((run, wrong))
}

/// The numbers behind `mark`, at most one in a line: where fio was refused, and where it does not find what it wrote.
fn offsets(text: &str, mark: &str) -> BTreeSet<u64> {
    let number = |line: &str| {
        let (_, rest) = line.split_once(mark)?;
        rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    };
    text.lines().filter_map(number).collect()
}

/// What both runs of fio have in common: the second makes the same blocks from the same seed.
fn fio(bench: &Bench, host: &Host, number: usize) -> Command {
    let mut fio = Command::new("fio");
    let folder = bench.scratch.path("");
    fio.current_dir(&folder).args(["--name=guest", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=4"]);
    fio.args(["--size=1g", "--number_ios=100000", "--verify=crc32c", "--output-format=terse"]);
    fio.args([format!("--uri={}", uri(&host.door)), format!("--randseed={}", number + 1)]);
    fio.arg("--aux-path").arg(&folder);
    fio
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fio_was_refused_and_what_it_misses_are_found() {
        let refused = "fio: io_u error on file g.0.0: Cannot send after transport endpoint shutdown: \
                       write offset=8192, buflen=4096\nfio: pid=1\n";
        assert_eq!(offsets(refused, "write offset="), BTreeSet::from([8192]));
        let missing = "verify: bad magic header 0, wanted acca at file g.0.0 offset 4096, length 4096 \
                       (requested block: offset=4096, length=4096)\n\
                       crc32c: verify failed at file g.0.0 offset 7, length 4096\n";
        assert_eq!(offsets(missing, " offset "), BTreeSet::from([7, 4096]));
    }
}
