//! The rounds that were run, a line for each, and a table of all.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::plan::{Blow, Fault};
use super::{Outcome, again};

/// One round; `Ok(None)`: it was skipped.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) seed: u64,
    pub(super) fault: Fault,
    pub(super) took: Duration,
    pub(super) result: Result<Option<Outcome>, String>,
}

impl Row {
    /// When processes were killed in it.
    fn deaths(&self) -> Vec<String> {
        let outcome = self.result.as_ref().ok().and_then(Option::as_ref);
        let struck = outcome.map_or(&[][..], |outcome| &outcome.struck);
        let mut deaths: Vec<String> = struck.iter().filter_map(Blow::death).collect();
        deaths.sort();
        deaths.dedup();
        deaths
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {} {}: ", self.seed, self.fault.name())?;
        match &self.result {
            Ok(Some(outcome)) => {
                let (exit, owner) = (Exit(outcome.exit), outcome.owner.name());
                write!(f, "exit {exit}, {owner} owns, {} writes", outcome.acknowledged)?;
                outcome.struck.iter().try_for_each(|blow| write!(f, "; {blow}"))?;
            }
            Ok(None) => write!(f, "skipped")?,
            Err(cause) => write!(f, "FAILED: {}", cause.lines().next().unwrap_or_default())?,
        }
        write!(f, ", {:.1} s", self.took.as_secs_f64())
    }
}

/// An exit code, or none of a command that was killed.
struct Exit(Option<i32>);

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(code) => code.fmt(f),
            None => f.write_str("killed"),
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Table {
    rows: Vec<Row>,
}

impl Table {
    pub(super) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// What went wrong, each with the command that repeats it.
    pub(super) fn failures(&self) -> Vec<String> {
        let failed = self.rows.iter().filter_map(|row| Some((row, row.result.as_ref().err()?)));
        failed.map(|(row, cause)| format!("{cause}; {}", again(row.seed, row.fault))).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By their faults, all together, and by the moments at which somebody died.
        let mut groups: BTreeMap<(u8, u8, String), Vec<&Row>> = BTreeMap::new();
        for row in &self.rows {
            groups.entry((0, row.fault as u8, row.fault.name().to_owned())).or_default().push(row);
            groups.entry((1, 0, "all".to_owned())).or_default().push(row);
            for moment in row.deaths() {
                groups.entry((2, 0, moment)).or_default().push(row);
            }
        }
        writeln!(f, "| fault | rounds | struck | exit 0 | 1 | 3 | 4 | 5 | killed | failed | median, s |")?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|---|")?;
        for ((.., name), rows) in groups {
            let outcomes: Vec<&Outcome> = rows.iter().filter_map(|row| row.result.as_ref().ok()?.as_ref()).collect();
            let failed = rows.iter().filter(|row| row.result.is_err()).count();
            let struck = outcomes.iter().filter(|outcome| !outcome.struck.is_empty()).count();
            write!(f, "| {} | {} | {struck} |", name, outcomes.len() + failed)?;
            for code in [Some(0), Some(1), Some(3), Some(4), Some(5), None] {
                write!(f, " {} |", outcomes.iter().filter(|outcome| outcome.exit == code).count())?;
            }
            let mut times: Vec<Duration> = rows.iter().map(|row| row.took).collect();
            times.sort();
            let median = times.get(times.len() / 2).copied().unwrap_or_default();
            writeln!(f, " {failed} | {:.1} |", median.as_secs_f64())?;
        }
        Ok(())
    }
}
