//! Sockets that a service manager has passed on: `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`.
//!
//! The command line asks with [`Passed::from_environment`] once and gives each door its own; the sockets themselves are
//! looked at as any `fd:N` is. [`withhold`] keeps the variables from programs that are started from here.

use std::ffi::OsString;
use std::process::Command;

use crate::door_at::DoorAt;
use crate::limits::{PASSED_FIRST, PASSED_MAX};

/// The doors whose sockets were passed on, or what is wrong with them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Passed {
    doors: Vec<(Name, DoorAt)>,
    fault: Option<String>,
}

/// Which door a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// The guest door: `nbd`, or no name.
    Nbd,
    /// The migration door: `migration`.
    Migration,
    /// A control door: `control`.
    Control,
}

const VARIABLES: [&str; 3] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The name of a connection that systemd accepted itself.
const ACCEPTED: &str = "connection";

impl Name {
    /// Names that the service manager makes up where the administrator gave none count as none.
    fn read(text: &str) -> Option<Self> {
        match text {
            "nbd" | "" | "unknown" | ACCEPTED => Some(Self::Nbd),
            "migration" => Some(Self::Migration),
            "control" => Some(Self::Control),
            unit if unit.ends_with(".socket") => Some(Self::Nbd),
            _ => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Migration => "migration",
            Self::Control => "control",
        }
    }
}

impl Passed {
    /// What was passed on to this process.
    #[must_use]
    pub fn from_environment() -> Self {
        let get = |name: &str| std::env::var_os(name).map(OsString::into_string).transpose();
        let read = || match (get("LISTEN_FDS"), get("LISTEN_PID"), get("LISTEN_FDNAMES")) {
            (Ok(Some(number)), Ok(Some(pid)), Ok(names)) => read(&number, &pid, names.as_deref(), std::process::id()),
            (Ok(_), Ok(_), Ok(_)) => Ok(Vec::new()),
            _ => Err("the variable, or LISTEN_PID or LISTEN_FDNAMES, is not UTF-8".to_owned()),
        };
        match read() {
            Ok(doors) => Self { doors, fault: None },
            Err(fault) => Self { doors: Vec::new(), fault: Some(fault) },
        }
    }

    /// The sockets of one door, for a command that has the doors `known`.
    ///
    /// # Errors
    /// What was passed on is wrong, or is for a door that the command has not.
    pub fn of(&self, name: Name, known: &[Name]) -> Result<Vec<DoorAt>, String> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        if let Some((other, door)) = self.doors.iter().find(|(name, _)| !known.contains(name)) {
            return Err(format!("{door} is named {}: this command has no such door", other.word()));
        }
        Ok(self.doors.iter().filter(|(of, _)| *of == name).map(|(_, door)| door.clone()).collect())
    }

    #[cfg(test)]
    pub(crate) fn reading(number: &str, names: Option<&str>) -> Self {
        match read(number, "1", names, 1) {
            Ok(doors) => Self { doors, fault: None },
            Err(fault) => Self { doors: Vec::new(), fault: Some(fault) },
        }
    }
}

/// Keeps the three variables from a program that is to be started.
pub fn withhold(command: &mut Command) {
    VARIABLES.iter().for_each(|name| {
        command.env_remove(name);
    });
}

/// Reads the three variables; of another process they mean nothing.
fn read(number: &str, pid: &str, names: Option<&str>, own: u32) -> Result<Vec<(Name, DoorAt)>, String> {
    let plain = |text: &str| -> Option<u32> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    match plain(pid) {
        None => return Err(format!("LISTEN_PID is '{pid}', not the number of a process")),
        Some(pid) if pid != own => return Ok(Vec::new()),
        Some(_) => {}
    }
    let number = match plain(number) {
        Some(number) if number <= PASSED_MAX => number,
        _ => return Err(format!("'{number}' is not a number of sockets (0 to {PASSED_MAX})")),
    };
    let names: Vec<&str> =
        names.filter(|names| !names.is_empty()).map_or(Vec::new(), |names| names.split(':').collect());
    if !names.is_empty() && names.len() != number as usize {
        return Err(format!("LISTEN_FDNAMES has {} names for {number} sockets", names.len()));
    }
    let door = |i: u32| {
        let text = names.get(i as usize).copied().unwrap_or_default();
        let name = Name::read(text)
            .ok_or_else(|| format!("LISTEN_FDNAMES: '{text}' is not a door: nbd, migration or control"))?;
        Ok((name, DoorAt::Inherited(PASSED_FIRST + i)))
    };
    (0..number).map(door).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Name; 3] = [Name::Nbd, Name::Migration, Name::Control];

    #[test]
    fn sockets_go_to_the_doors_that_they_are_named_for() {
        let passed = Passed::reading("5", Some("control:nbd:migration::g1.socket"));
        let of = |name| passed.of(name, &ALL).expect("well-formed");
        assert_eq!(of(Name::Control), [DoorAt::Inherited(3)]);
        assert_eq!(of(Name::Nbd), [4, 6, 7].map(DoorAt::Inherited));
        assert_eq!(of(Name::Migration), [DoorAt::Inherited(5)]);
        for names in [None, Some(""), Some("unknown:connection")] {
            assert_eq!(Passed::reading("2", names).of(Name::Nbd, &ALL), Ok([3, 4].map(DoorAt::Inherited).to_vec()));
        }
    }

    #[test]
    fn programs_that_are_started_do_not_see_the_variables() {
        let mut command = Command::new("env");
        command.env_clear().envs(VARIABLES.map(|name| (name, "1"))).env("OTHER", "2");
        withhold(&mut command);
        assert_eq!(command.output().expect("runs").stdout, b"OTHER=2\n");
    }

    #[test]
    fn what_was_passed_to_another_process_is_not_ours() {
        assert_eq!(read("2", "7", Some("what:ever"), 8), Ok(Vec::new()));
        assert_eq!(read("0", "8", None, 8), Ok(Vec::new()));
    }

    #[test]
    fn every_wrong_variable_says_what_is_wrong() {
        for (number, names, cause) in [
            ("x", None, "'x' is not a number of sockets (0 to 32)"),
            ("-1", None, "'-1' is not a number of sockets (0 to 32)"),
            ("33", None, "'33' is not a number of sockets (0 to 32)"),
            ("2", Some("nbd"), "LISTEN_FDNAMES has 1 names for 2 sockets"),
            ("1", Some("nbd:nbd"), "LISTEN_FDNAMES has 2 names for 1 sockets"),
            ("1", Some("NBD"), "LISTEN_FDNAMES: 'NBD' is not a door: nbd, migration or control"),
        ] {
            assert_eq!(Passed::reading(number, names).of(Name::Nbd, &ALL), Err(cause.to_owned()));
        }
        assert_eq!(read("1", "self", None, 1), Err("LISTEN_PID is 'self', not the number of a process".to_owned()));
        assert_eq!(
            Passed::reading("2", Some("nbd:control")).of(Name::Nbd, &[Name::Nbd]),
            Err("fd:4 is named control: this command has no such door".to_owned())
        );
    }
}
