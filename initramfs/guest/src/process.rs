//! Other processes of the machine, found by what they were started as. `main` asks.

use std::fs;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, getppid, kill_process};

/// The process that runs `blockferry COMMAND`.
fn find(command: &str) -> Result<Pid, String> {
    let names = fs::read_dir("/proc").map_err(|error| error.to_string())?.flatten().map(|entry| entry.file_name());
    let pids = names.filter_map(|name| Pid::from_raw(name.to_str()?.parse().ok()?));
    let runs = |pid: &Pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.next() == Some(b"blockferry") && words.next() == Some(command.as_bytes())
    };
    pids.into_iter().find(runs).ok_or_else(|| format!("nobody runs {command}"))
}

/// Resident memory of `blockferry COMMAND`, in KiB.
pub(crate) fn resident_kib(command: &str) -> Result<u64, String> {
    let status = fs::read_to_string(format!("/proc/{}/status", find(command)?)).map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
    number.ok_or_else(|| "no VmRSS".to_owned())
}

/// Kills `blockferry COMMAND` as a crash would.
pub(crate) fn kill(command: &str) -> Result<String, String> {
    let pid = find(command)?;
    kill_process(pid, Signal::KILL).map_err(|error| error.to_string())?;
    Ok(format!("pid={pid}"))
}

/// Kills who started us: init's steward.
pub(crate) fn kill_parent() -> Result<String, String> {
    let pid = getppid().filter(|pid| *pid != Pid::INIT).ok_or("the parent is PID 1")?;
    kill_process(pid, Signal::KILL).map_err(|error| error.to_string())?;
    Ok(format!("pid={pid}"))
}

/// Runs a program to its end; says its exit code and all that it said, on one line.
pub(crate) fn run(words: &[&str]) -> Result<String, String> {
    let (program, arguments) = words.split_first().ok_or("run what?")?;
    let said = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let said = said.map_err(|error| format!("{program}: {error}"))?;
    let text = [said.stdout, said.stderr].concat();
    let code = said.status.code().ok_or("was killed")?;
    Ok(format!("exit={code} {}", String::from_utf8_lossy(&text).trim().replace('\n', " | ")))
}
