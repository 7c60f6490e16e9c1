//! QEMU's own port, as much of it as machines of tests and benches need: a command and its answer, and events.
//!
//! `vm_machine` opens it. Answers stay text: those who ask know which word they want.

use crate::util::{Error, Result};
use crate::vm_machine::Lines;
use std::path::Path;

/// An open port.
pub(crate) struct Qmp {
    name: String,
    lines: Lines,
    /// Events that came while an answer was waited for.
    events: Vec<String>,
}

impl Qmp {
    /// Opens the port of the machine `name`.
    pub(crate) fn open(name: &str, path: &Path) -> Result<Self> {
        let lines = Lines::open(path).map_err(|error| Error::new("qmp", name, error))?;
        let mut qmp = Self { name: name.to_owned(), lines, events: Vec::new() };
        qmp.command(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(qmp)
    }

    /// One command; its answer. One that is refused is an error with QEMU's words.
    pub(crate) fn command(&mut self, command: &str) -> Result<String> {
        let fail = |name: &str, cause: &dyn std::fmt::Display| Error::new("qmp", name, format!("{command}: {cause}"));
        self.lines.say(command).map_err(|error| fail(&self.name, &error))?;
        loop {
            let line = self.lines.hear(|_| true).map_err(|error| fail(&self.name, &error))?;
            if line.starts_with("{\"return\"") {
                return Ok(line);
            }
            if line.starts_with("{\"error\"") {
                return Err(fail(&self.name, &line));
            }
            if line.contains("\"event\":") {
                self.events.push(line);
            }
        }
    }

    /// The same for a command without arguments.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        self.command(&format!("{{\"execute\":\"{command}\"}}"))
    }

    /// Waits for an event in which all these words are, and forgets those before it; one that was heard counts.
    pub(crate) fn event(&mut self, words: &[&str]) -> Result<String> {
        let is_meant = |line: &str| line.contains("\"event\":") && words.iter().all(|word| line.contains(word));
        if let Some(at) = self.events.iter().position(|line| is_meant(line)) {
            return Ok(self.events.drain(..=at).next_back().unwrap_or_default());
        }
        self.events.clear();
        self.lines
            .hear(is_meant)
            .map_err(|error| Error::new("qmp", &self.name, format!("{}: {error}", words.join(" "))))
    }
}

/// The number after the first `"key":` of an answer.
pub(crate) fn number(answer: &str, key: &str) -> Option<u64> {
    let (_, rest) = answer.split_once(&format!("\"{key}\":"))?;
    rest.trim_start().split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn events_between_answers_are_kept_and_refusals_are_errors() {
        let path = std::env::temp_dir().join(format!("xtask-qmp-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let emulator = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut input = BufReader::new(stream.try_clone().expect("a twin")).lines();
            writeln!(stream, "{{\"QMP\": {{}}}}").expect("said");
            for answer in [
                "{\"return\": {}}",
                "{\"event\": \"STOP\"}\n{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n\
                 {\"return\": {\"size\": 12, \"x\": 1}}",
                "{\"error\": {\"desc\": \"no\"}}\n{\"event\": \"RESUME\"}",
            ] {
                input.next().expect("a line").expect("a command");
                writeln!(stream, "{answer}").expect("said");
            }
        });
        let mut qmp = Qmp::open("a", &path).expect("it greets");
        let answer = qmp.ask("query-x").expect("an answer");
        assert_eq!((number(&answer, "size"), number(&answer, "gone")), (Some(12), None));
        assert!(qmp.event(&["MIGRATION", "active"]).expect("it was heard").contains("active"));
        let error = qmp.ask("stop").expect_err("it is refused").to_string();
        assert!(error.starts_with("qmp: a: {\"execute\":\"stop\"}: {\"error\""), "{error}");
        qmp.event(&["RESUME"]).expect("it comes");
        emulator.join().expect("all was asked");
        std::fs::remove_file(&path).expect("it was there");
    }
}
