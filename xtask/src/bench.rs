//! `cargo xtask bench`: blockferry beside the tools one would take instead, in one run on one machine.
//!
//! Here are the command line, medians, and how results are shown; each bench has a file of its own. These are commands
//! that say what they measured, never tests that fail when a machine is slow. What does fail is a lost write.

use crate::demo_host::{Host, Scratch};
use crate::util::{self, Error, Result};
use crate::{
    bench_chain, bench_copier, bench_copy, bench_draw, bench_guest, bench_latency, bench_migrate, bench_scale,
    bench_server, bench_tax, build,
};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Runs that a median is taken of, if nobody says otherwise.
const RUNS: usize = 5;
/// Runs of what takes long and varies little.
const FEW_RUNS: usize = 3;
/// Live migrations of a real guest, of each kind.
const LIVE_MIGRATIONS: usize = 10;
/// A load of so many tasks for each processor is more than a bench makes by itself.
const BUSY: f64 = 2.0;
/// Most runs that can be asked for.
const RUNS_MAX: usize = 1000;
/// The benches, in the order in which they run.
const ALL: [&str; 9] = ["chain", "server", "copier", "copy", "latency", "migrate", "guest", "tax", "scale"];
/// What is drawn of a bench: the keys of columns.
const DRAWN: [(&str, &[&str]); 6] = [
    ("server", &["iops", "cpu_us_per_request", "resident_mib"]),
    ("copier", &["seconds", "cpu_s_per_gib", "resident_mib"]),
    ("copy", &["seconds", "cpu_s_per_gib", "latency_ms"]),
    ("latency", &["median_ms", "latency_99_ms"]),
    ("tax", &["us_per_request", "cpu_us_per_request"]),
    ("scale", &["resident_source_mib", "cpu_s_per_gib", "switchover_ms", "seconds"]),
];

/// What every bench needs.
pub(crate) struct Bench {
    /// What ships.
    pub(crate) executable: PathBuf,
    /// Where files go.
    pub(crate) scratch: Arc<Scratch>,
    /// What children say on stderr.
    pub(crate) log: PathBuf,
}

impl Bench {
    /// Two hosts with an image each; the first owns.
    pub(crate) fn hosts(&self, images: &[PathBuf; 2]) -> Result<[Host; 2]> {
        let host = |name, image: &Path| {
            let disk = format!("vda,file={}", image.display());
            Host::start(&self.scratch, &self.executable, name, &[disk], &self.log)
        };
        let hosts = [host("A", &images[0])?, host("B", &images[1])?];
        hosts[0].ask("claim", &[])?;
        Ok(hosts)
    }
}

/// `cargo xtask bench [NAME]... [--runs N] [--quick] [--docs] [--json]`; the names are in [`ALL`].
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let asked = parse(arguments)?;
    let executable = build::static_executable()?.place;
    let bench = Bench { executable, scratch: Scratch::new("bench")?, log: util::fresh_log("bench")? };
    let machine = machine();
    if !asked.json {
        println!("\n{machine}");
    }
    for name in ALL.iter().filter(|name| asked.benches.is_empty() || asked.benches.contains(*name)) {
        let runs = |usual| asked.runs.unwrap_or(usual);
        let (mut table, result) = match *name {
            "chain" => (bench_chain::run(&bench, runs(RUNS))?, Ok(())),
            "server" => (bench_server::run(&bench, runs(RUNS))?, Ok(())),
            "copier" => (bench_copier::run(&bench, runs(RUNS))?, Ok(())),
            "copy" => (bench_copy::run(&bench, runs(RUNS))?, Ok(())),
            "latency" => (bench_latency::run(&bench, runs(RUNS))?, Ok(())),
            "guest" => (bench_guest::run(&bench, runs(LIVE_MIGRATIONS))?, Ok(())),
            "tax" => (bench_tax::run(&bench, runs(RUNS))?, Ok(())),
            "scale" => (bench_scale::run(&bench, runs(FEW_RUNS))?, Ok(())),
            _ => bench_migrate::run(&bench, runs(RUNS))?,
        };
        let (cpus, load) = (cpus(), load());
        if load > crate::demo::real(cpus as u64) * BUSY {
            table.notes.push(format!(
                "the machine was busy (load {load:.0} on {cpus} CPUs): times, IOPS and latencies are of little use"
            ));
        }
        keep(name, &table, &machine, asked.docs)?;
        if asked.json {
            print!("{}", table.json(name));
        } else {
            print!("\n{}", table.text());
        }
        result?;
    }
    Ok(())
}

/// Keeps what was measured: `target/bench/NAME.json`, and a picture beside it; or in docs/bench, for performance.md.
fn keep(name: &str, table: &Table, machine: &str, docs: bool) -> Result<()> {
    let folder = if docs { util::root()?.join("docs/bench") } else { util::target_dir()?.join("bench") };
    let write = |ending: &str, text: String| {
        let path = folder.join(format!("{name}.{ending}"));
        fs::write(&path, text).map_err(|error| Error::new("bench", path.display(), error))
    };
    fs::create_dir_all(&folder).map_err(|error| Error::new("bench", folder.display(), error))?;
    let head = format!("{{\"type\":\"bench-machine\",\"bench\":\"{name}\",\"machine\":\"{machine}\"}}\n");
    write("json", head + &table.json(name))?;
    match DRAWN.iter().find(|(bench, _)| *bench == name) {
        Some((_, keys)) => write("svg", bench_draw::svg(table, keys)),
        None => Ok(()),
    }
}

/// What was asked for.
#[derive(Default)]
struct Asked {
    benches: Vec<&'static str>,
    runs: Option<usize>,
    json: bool,
    docs: bool,
}

fn parse(arguments: &[String]) -> Result<Asked> {
    let mut asked = Asked::default();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--json" {
            asked.json = true;
        } else if word == "--docs" {
            asked.docs = true;
        } else if word == "--quick" {
            asked.runs = asked.runs.or(Some(1));
        } else if word == "--runs" {
            let number = words.next().and_then(|number| number.parse().ok());
            let number = number.filter(|number| (1..=RUNS_MAX).contains(number));
            asked.runs = Some(number.ok_or_else(|| Error::usage("bench", word, format!("wants 1 to {RUNS_MAX}")))?);
        } else if let Some(name) = ALL.iter().find(|name| *name == word) {
            asked.benches.push(name);
        } else {
            return Err(Error::usage("bench", word, format!("the benches are {}", ALL.join(", "))));
        }
    }
    Ok(asked)
}

/// The machine, in one line: numbers without it mean nothing.
fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (text, kernel) = (read("/proc/cpuinfo"), read("/proc/sys/kernel/osrelease"));
    let model = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    format!("{} x {}, Linux {}, load {:.1} at the start", cpus(), model.unwrap_or("?"), kernel.trim(), load())
}

/// How many processors there are.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// How many tasks wanted to run over the last minute.
fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

/// The middle of some numbers; of an even count the mean of the two in the middle.
pub(crate) fn median(numbers: &[f64]) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// A column of a table.
pub(crate) struct Column {
    /// Its name in JSON.
    pub(crate) key: &'static str,
    /// Its head for people.
    pub(crate) title: &'static str,
    /// Digits after the point.
    pub(crate) digits: usize,
}

/// Results.
pub(crate) struct Table {
    /// What was measured.
    pub(crate) title: String,
    /// What the numbers are.
    pub(crate) columns: &'static [Column],
    /// Who did it, and the numbers; those that are not known are left out.
    pub(crate) rows: Vec<(String, Vec<Option<f64>>)>,
    /// What one must know to read them.
    pub(crate) notes: Vec<String>,
}

impl Table {
    /// For people.
    fn text(&self) -> String {
        let width = self.rows.iter().map(|row| row.0.chars().count()).max().unwrap_or(0);
        let mut out = format!("{}\n  {:width$}", self.title, "");
        for column in self.columns {
            let _ = write!(out, "  {:>9}", column.title);
        }
        out.push('\n');
        for (name, numbers) in &self.rows {
            let mut line = format!("  {name:width$}");
            for (column, number) in self.columns.iter().zip(numbers) {
                let place = column.title.chars().count().max(9);
                let text = number.map_or_else(|| "-".to_owned(), |number| format!("{number:.*}", column.digits));
                let _ = write!(line, "  {text:>place$}");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(out, "  {note}");
        }
        out
    }

    /// For programs: one object a row.
    fn json(&self, bench: &str) -> String {
        let mut out = String::new();
        for (name, numbers) in &self.rows {
            let _ = write!(out, "{{\"type\":\"bench\",\"bench\":\"{bench}\",\"what\":\"{name}\"");
            for (column, number) in self.columns.iter().zip(numbers) {
                let number = number.map_or_else(|| "null".to_owned(), |number| format!("{number:.*}", column.digits));
                let _ = write!(out, ",\"{}\":{number}", column.key);
            }
            out.push_str("}\n");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn the_command_line_is_read() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let asked = parse(&words("server --runs 3 chain --json --docs")).expect("fine");
        assert_eq!((asked.benches, asked.runs), (vec!["server", "chain"], Some(3)));
        assert!(asked.json && asked.docs);
        assert_eq!(parse(&words("tax --quick")).expect("fine").runs, Some(1));
        for bad in ["disk", "--runs", "--runs 0", "--runs x"] {
            assert_eq!(parse(&words(bad)).err().map(|error| error.exit), Some(2), "{bad}");
        }
    }

    #[test]
    fn a_table_is_for_people_and_for_programs() {
        const COLUMNS: &[Column] =
            &[Column { key: "iops", title: "IOPS", digits: 0 }, Column { key: "ratio", title: "ratio", digits: 2 }];
        let rows = vec![("ours".to_owned(), vec![Some(1234.5), Some(1.0)]), ("b".to_owned(), vec![Some(7.0), None])];
        let table = Table { title: "T".to_owned(), columns: COLUMNS, rows, notes: vec!["n".to_owned()] };
        let head = "T\n             IOPS      ratio\n";
        assert_eq!(table.text(), format!("{head}  ours       1234       1.00\n  b             7          -\n  n\n"));
        assert_eq!(
            table.json("x").lines().next(),
            Some("{\"type\":\"bench\",\"bench\":\"x\",\"what\":\"ours\",\"iops\":1234,\"ratio\":1.00}")
        );
    }
}
