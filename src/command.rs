//! A command that is run as the way to another host: `exec:COMMAND`.
//!
//! Its standard input and output are one socket pair, whose other end is used like any connection. No shell is needed,
//! because hosts often have none: [`words`] splits the text, and the first word is looked for in `PATH`.
//! `migrate/dial.rs` runs it, again and again if need be; the command ends with its connection: the end of its input
//! is its sign, and
//! whoever does not heed that is terminated, and then killed, and in any case waited for.
//!
//! What it says on standard error goes to the log, line by line; the last line and the exit status become part of the
//! cause when the connection fails ([`Command::epitaph`]).

use std::io::{BufRead as _, BufReader, Read, Result};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::limits::{COMMAND_GRACE, COMMAND_LINE_MAX, COMMAND_WORDS_MAX, WORKER_STACK};
use crate::socket::Socket;

/// A running command, or one that has ended. Dropping it makes it end.
#[derive(Debug)]
pub struct Command {
    name: String,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pid: Option<Pid>,
    ended: Option<ExitStatus>,
    /// It said this last on standard error.
    last: String,
    /// Nothing more comes on standard error.
    silent: bool,
}

impl Command {
    /// Runs the command of this text.
    ///
    /// # Errors
    /// The text is no command line, or the program cannot be started.
    pub fn run(text: &str) -> std::result::Result<(Socket, Self), String> {
        let words = words(text)?;
        let name = words.first().cloned().unwrap_or_default();
        spawn(&words).map_err(|error| format!("{name}: {}", crate::error::reason(&error)))
    }

    /// How it ended and what it said last, if it ends within `patience`; else what it said last.
    #[must_use]
    pub fn epitaph(&self, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        let state = self.shared.wait_until(deadline, |state| state.ended.is_some() && state.silent);
        let last = if state.last.is_empty() { String::new() } else { format!(": {}", state.last) };
        match state.ended {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{}: exit status {code}{last}", self.name),
                (None, signal) => format!("{}: killed by signal {}{last}", self.name, signal.unwrap_or_default()),
            },
            None if last.is_empty() => String::new(),
            None => format!("{}{last}", self.name),
        }
    }

    /// The exit status, if it has ended by itself with one.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        self.shared.lock().ended.and_then(|status| status.code())
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        let (shared, name) = (Arc::clone(&self.shared), self.name.clone());
        let end = move || {
            for signal in [Signal::TERM, Signal::KILL] {
                let state = shared.wait_until(Instant::now() + COMMAND_GRACE, |state| state.ended.is_some());
                match (state.ended, state.pid) {
                    (None, Some(pid)) => {
                        log::info!("exec: {name}: does not end: signal {}", signal.as_raw());
                        // It has not been waited for: the number is still its own.
                        let _ = kill_process(pid, signal);
                    }
                    _ => return,
                }
            }
        };
        let thread = std::thread::Builder::new().name("command end".to_owned()).stack_size(WORKER_STACK);
        if let Err(error) = thread.spawn(end) {
            log::warn!("exec: {}: nobody looks whether it ends: {error}", self.name);
        }
    }
}

fn spawn(words: &[String]) -> Result<(Socket, Command)> {
    let (ours, theirs) = UnixStream::pair()?;
    let [input, output] = [theirs.try_clone()?, theirs].map(OwnedFd::from);
    let (program, arguments) = words.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::piped())
        .spawn()?;
    let shared = Arc::new(Shared::default());
    shared.lock().pid = Some(Pid::from_child(&child));
    let command = Command { name: program.clone(), shared: Arc::clone(&shared) };
    let (listener, name) = (Arc::clone(&shared), program.clone());
    let errors = child.stderr.take();
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned()).stack_size(WORKER_STACK);
    let listening = thread("command words").spawn(move || {
        if let Some(errors) = errors {
            listener.listen(&name, errors);
        }
        listener.lock().silent = true;
        listener.changed.notify_all();
    });
    listening?;
    thread("command").spawn(move || shared.reap(child))?;
    Ok((Socket::new(OwnedFd::from(ours)), command))
}

impl Shared {
    /// Takes in what it says until it says no more. A process that it has left behind may keep this open for long:
    /// nobody waits for it.
    fn listen(&self, name: &str, errors: impl Read) {
        let mut errors = BufReader::new(errors);
        let mut line = Vec::new();
        loop {
            line.clear();
            let mut limited = (&mut errors).take(COMMAND_LINE_MAX);
            match limited.read_until(b'\n', &mut line) {
                Ok(count) if count > 0 => {}
                _ => return,
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end().escape_debug().to_string();
            if !text.is_empty() {
                log::info!("exec: {name}: {text}");
                self.lock().last = text;
            }
        }
    }

    /// Waits for its end, and only then lets go of its number.
    fn reap(&self, mut child: Child) {
        let pid = Pid::from_child(&child);
        // Looked at without taking it away: until the lock is held, somebody may be sending it a signal.
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).map(drop)
        {}
        let mut state = self.lock();
        state.ended = Some(child.wait().unwrap_or_default());
        state.pid = None;
        drop(state);
        self.changed.notify_all();
    }

    fn wait_until(&self, deadline: Instant, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The words of a command line. Blanks separate them. Inside single quotes everything stands for itself; inside double
/// quotes all but the backslash, which makes the double quote and itself stand for themselves; outside of quotes the
/// backslash does so for every character. There are no variables, no patterns, no pipes: a shell is a command like any
/// other (`sh -c "..."`).
///
/// # Errors
/// The cause, for a usage error.
pub fn words(text: &str) -> std::result::Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), close) if open == close => quote = None,
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, '\\') => {
                let next = letters.next().ok_or("ends with a backslash")?;
                word.get_or_insert_default().push(next);
            }
            (Some('"'), '\\') => match letters.next() {
                Some(next @ ('"' | '\\')) => word.get_or_insert_default().push(next),
                Some(next) => word.get_or_insert_default().extend(['\\', next]),
                None => break,
            },
            (None, blank) if blank.is_ascii_whitespace() => words.extend(word.take()),
            (_, letter) => word.get_or_insert_default().push(letter),
        }
    }
    if let Some(quote) = quote {
        return Err(format!("a quote ({quote}) is not closed"));
    }
    words.extend(word);
    match words.first() {
        None => Err("names no program".to_owned()),
        Some(program) if program.is_empty() => Err("names no program".to_owned()),
        Some(_) if words.len() > COMMAND_WORDS_MAX => {
            Err(format!("has {} words, more than {COMMAND_WORDS_MAX}", words.len()))
        }
        Some(_) => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn run(text: &str) -> (Socket, Command) {
        Command::run(text).expect("runs")
    }

    #[test]
    fn words_are_split_without_a_shell() {
        let split = |text: &str| words(text).expect("words");
        assert_eq!(split("ssh B blockferry accept g1"), ["ssh", "B", "blockferry", "accept", "g1"]);
        assert_eq!(split("  a\t'b c'  d\"e f\"g \"\" "), ["a", "b c", "de fg", ""]);
        assert_eq!(split(r#"a\ b '\' "\"\\\n" $HOME * |"#), ["a b", "\\", "\"\\\\n", "$HOME", "*", "|"]);
        for (text, cause) in [
            ("", "names no program"),
            ("  ", "names no program"),
            ("'' x", "names no program"),
            ("a 'b", "a quote (') is not closed"),
            ("a \"b\\", "a quote (\") is not closed"),
            ("a\\", "ends with a backslash"),
        ] {
            assert_eq!(words(text), Err(cause.to_owned()), "{text}");
        }
        let many = "x ".repeat(COMMAND_WORDS_MAX + 1);
        assert!(words(&many).expect_err("many").contains("more than"));
    }

    #[test]
    fn a_command_talks_over_its_input_and_output_and_ends_with_them() {
        let (socket, command) = run("cat");
        socket.send_all(b"there and back").expect("sent");
        let mut back = [0; 14];
        socket.recv_exact(&mut back).expect("received");
        assert_eq!(&back, b"there and back");
        assert_eq!(command.exit_code(), None);
        drop(socket);
        assert_eq!(command.epitaph(PATIENCE), "cat: exit status 0");
        assert_eq!(command.exit_code(), Some(0));
    }

    #[test]
    fn its_last_words_and_its_status_are_told() {
        let (socket, command) = run("sh -c 'echo first >&2; echo \"no way\" >&2; exit 255'");
        assert_eq!(socket.recv(&mut [0]).ok(), Some(0), "its end is the connection's");
        assert_eq!(command.epitaph(PATIENCE), "sh: exit status 255: no way");
        let (_socket, command) = run("sh -c 'kill -9 $$'");
        assert_eq!(command.epitaph(PATIENCE), "sh: killed by signal 9");
        let (_socket, living) = run("sh -c 'echo waiting >&2; read x'");
        let deadline = Instant::now() + PATIENCE;
        while living.shared.lock().last.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(living.epitaph(Duration::ZERO), "sh: waiting");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Command::run("/no/such/program x").expect_err("none");
        assert!(error.starts_with("/no/such/program: No such file"), "{error}");
    }

    #[test]
    fn a_command_that_does_not_heed_the_end_of_its_input_is_ended() {
        let (socket, command) = run("sh -c 'trap \"\" TERM; echo up; while :; do read x || exec sleep 60; done'");
        let mut up = [0; 3];
        socket.recv_exact(&mut up).expect("up");
        let shared = Arc::clone(&command.shared);
        drop((socket, command));
        let ended = shared.wait_until(Instant::now() + PATIENCE, |state| state.ended.is_some()).ended;
        // The trap is gone with the exec; either signal will do.
        assert!(ended.is_some_and(|status| status.signal().is_some()), "{ended:?}");
    }
}
