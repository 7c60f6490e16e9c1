//! blockferry as a machine's first process: it boots a thin host, runs one command, and ends the machine.
//!
//! The kernel starts the executable as PID 1, under a name that ends in `init`; [`role`] sees that. Then there are
//! three kinds of processes, all of the same executable:
//!
//! - the *keeper* is PID 1, this file: mounts the kernel's own file systems, opens the console, starts the steward,
//!   reaps, and ends the machine;
//! - the *steward* (`init/steward.rs`) is its child: reads the kernel's command line, loads modules, sets addresses,
//!   mounts disks, and says how it ended;
//! - the *command* is the steward's child (`init/supervise.rs`): what stands after ` -- `, run like everywhere else. So
//!   are the companions: the VMM, or whatever else the image wants to run.
//!
//! # Why nothing that goes wrong panics the kernel
//!
//! The kernel panics when PID 1 ends, for whatever reason, and a panic of ours is an end: the release profile aborts.
//! So whatever can meet bad input, and whatever is complicated, runs in another process. What a text from outside says
//! is read in the steward; a disk, a peer or a guest is met in the command. When the command crashes, the steward sees
//! an exit status; when the steward crashes, the keeper does, and goes on reaping until everybody who is left has ended
//! by himself: a guest that is being served goes on being served.
//!
//! The keeper itself parses nothing, indexes nothing, and has no path that ends in an `unwrap`. Nearly all that it
//! allocates it allocates before it waits. Should it panic all the same, its panic hook, which std calls before it
//! unwinds or aborts, ends the machine the ordered way and does not return. SIGTERM and its like do not reach PID 1:
//! the kernel drops signals for which it has no handler.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread;

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use rustix::system::RebootCommand;

use crate::error::{Problem, reason};
use crate::limits::{INIT_READY_LOOK, INIT_SYNC_MAX};
use ending::{End, Outcome, Verdict};

mod ending;
mod modules;
mod mounts;
mod netlink;
mod network;
mod parameters;
mod report;
mod steward;
mod supervise;
mod words;

/// What the keeper starts: itself once more.
const SELF: &str = "/proc/self/exe";
/// The name under which it starts the steward.
const STEWARD: &str = "blockferry-steward";

/// What this process is to a machine that boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// PID 1.
    Keeper,
    /// PID 1's one child.
    Steward,
}

/// What this process is, by its number and the name that it was started under. `None`: an ordinary command, also as
/// the first process of a container.
#[must_use]
pub fn role() -> Option<Role> {
    let name = std::env::args_os().next()?;
    if std::process::id() == 1 {
        return name.as_bytes().ends_with(b"init").then_some(Role::Keeper);
    }
    let of_keeper = rustix::process::getppid() == Some(Pid::INIT);
    (of_keeper && name == STEWARD).then_some(Role::Steward)
}

/// Boots, works, ends. As the keeper it never returns.
pub fn run(role: Role) -> ExitCode {
    match role {
        Role::Keeper => keep(),
        Role::Steward => steward::run(),
    }
}

/// PID 1.
fn keep() -> ! {
    std::panic::set_hook(Box::new(|_| {
        say("blockferry: init: internal error in PID 1");
        end_now(End::PowerOff);
    }));
    let failed = mounts::own();
    open_console();
    for (place, error) in failed {
        say(&Problem::fatal("init", place, reason(&error.into())).to_string());
    }
    let asked = match start_steward() {
        Ok(steward) => reap_until(steward),
        Err(error) => {
            say(&Problem::fatal("init", "steward", reason(&error)).to_string());
            None
        }
    };
    let end = asked.unwrap_or_else(|| {
        let end = End::default();
        say(&Verdict { outcome: Outcome::Lost, starts: 0, end }.to_string());
        end
    });
    sync_within_its_time();
    end_now(end)
}

/// A line on the console. A console that does not take it changes nothing.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Makes the console this process's input and output, and so everybody's. Where the image has no /dev/console of its
/// own the kernel could not do that.
fn open_console() {
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
    }
}

fn start_steward() -> std::io::Result<Pid> {
    let child = Command::new(SELF).arg0(STEWARD).spawn()?;
    pid_of(&child).ok_or_else(|| std::io::Error::other("has no number"))
}

/// A child's number. The handle may go: it neither waits nor kills.
fn pid_of(child: &std::process::Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

/// Reaps until the steward has ended by its own decision, which it says with its exit code. After a steward that
/// crashed: until nobody is left, then `None`.
fn reap_until(steward: Pid) -> Option<End> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == steward => match status.exit_status().and_then(End::from_code) {
                Some(end) => return Some(end),
                None => say(&format!("blockferry: init: the steward {}; everybody else goes on", Ended(status))),
            },
            Ok(_) | Err(Errno::INTR) => {}
            // No children.
            Err(_) => return None,
        }
    }
}

/// How a child ended, in words.
struct Ended(WaitStatus);

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0.exit_status(), self.0.terminating_signal()) {
            (Some(code), _) => write!(f, "ended with exit code {code}"),
            (None, Some(signal)) => write!(f, "was ended by signal {signal}"),
            (None, None) => f.write_str("ended"),
        }
    }
}

/// Writes back what is in memory. A disk that hangs (a server that is gone, behind /dev/nbdN) may take for ever, and
/// must not keep the machine on: what had to be durable was made durable when it was promised.
fn sync_within_its_time() {
    let (done, wait) = mpsc::channel();
    let syncing = thread::Builder::new().name("sync".to_owned()).spawn(move || {
        rustix::fs::sync();
        done.send(())
    });
    if syncing.is_ok() && wait.recv_timeout(INIT_SYNC_MAX).is_err() {
        say("blockferry: init: a disk does not take what is still to be written");
    }
}

/// Ends the machine. Where this process may not (the first process of a container that calls itself init), it stays
/// and does nothing, for ever.
fn end_now(end: End) -> ! {
    let command = match end {
        End::PowerOff => RebootCommand::PowerOff,
        End::Reboot => RebootCommand::Restart,
        End::Halt => RebootCommand::Halt,
    };
    if let Err(error) = rustix::system::reboot(command) {
        say(&format!("blockferry: init: {end}: {}", reason(&error.into())));
    }
    loop {
        thread::sleep(INIT_READY_LOOK.saturating_mul(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_process_has_no_part_in_it() {
        assert_eq!(role(), None);
    }
}
