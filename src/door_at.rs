//! Where a door listens: an address to bind, perhaps with a mode for its Unix socket, or a socket that whoever started
//! this process has passed on: `fd:N`.
//!
//! The command line parses, [`crate::listener`] opens. Parsing is pure; [`DoorAt::check_plaintext`] looks at the host
//! and at what was passed. Clients dial an [`Address`], never this.

use std::fmt;

use crate::address::Address;
use crate::error::Problem;
use crate::inherited;
use crate::limits::SOCKET_MODE_MAX;

/// Where a door listens. Its [`Display`](fmt::Display) form is what the ready line says: `fd:N`, or the address, which
/// can be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DoorAt {
    /// An address that this process binds.
    Bound {
        /// Where.
        address: Address,
        /// The mode of the Unix socket; `None`: its owner only.
        mode: Option<u32>,
    },
    /// A descriptor that was passed on.
    Inherited(u32),
}

impl DoorAt {
    /// Reads an address to listen at.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(digits) = text.strip_prefix(inherited::FD) {
            return inherited::parse(text, digits).map(Self::Inherited);
        }
        match text.split_once("?mode=") {
            Some((place, mode)) if place.starts_with("unix://") => {
                let address = Address::parse(place)?;
                Ok(Self::Bound { address, mode: Some(parse_mode(mode).map_err(|cause| format!("'{text}': {cause}"))?) })
            }
            _ => Address::parse(text).map(Self::from),
        }
    }

    /// Refuses a door that can be reached from beyond this host when nothing protects what passes it.
    ///
    /// # Errors
    /// A refusal; also when what was passed is no such socket.
    pub fn check_plaintext(&self, operation: &'static str, insecure_plaintext: bool) -> Result<(), Problem> {
        match self {
            Self::Bound { address, .. } => address.check_plaintext(operation, insecure_plaintext),
            Self::Inherited(number) => {
                let refused = |cause: String| Problem::refused(operation, self, cause);
                let address = place(*number).map_err(refused)?;
                address.check_plaintext(operation, insecure_plaintext)
            }
        }
    }
}

impl DoorAt {
    /// Where a client on this host dials it, if it can.
    #[must_use]
    pub fn dialled(&self) -> Option<Address> {
        match self {
            Self::Bound { address, .. } => Some(address.clone()),
            Self::Inherited(number) => place(*number).ok(),
        }
    }
}

impl From<Address> for DoorAt {
    fn from(address: Address) -> Self {
        Self::Bound { address, mode: None }
    }
}

impl fmt::Display for DoorAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bound { address, .. } => address.fmt(f),
            Self::Inherited(number) => write!(f, "fd:{number}"),
        }
    }
}

fn place(number: u32) -> Result<Address, String> {
    inherited::take(number).and_then(|taken| taken.address())
}

/// The first of these descriptors that stands among them twice: two doors cannot share one.
#[must_use]
pub fn given_twice<'a>(doors: impl Iterator<Item = &'a DoorAt> + Clone) -> Option<&'a DoorAt> {
    let passed = doors.filter(|door| matches!(door, DoorAt::Inherited(_)));
    passed
        .clone()
        .enumerate()
        .find(|(i, door)| passed.clone().take(*i).any(|other| other == *door))
        .map(|(_, door)| door)
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{text}' is not a mode: three octal digits, or four that begin with 0, such as 0660");
    if !(text.len() == "660".len() || text.len() == "0660".len()) || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= SOCKET_MODE_MAX).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &str, mode: Option<u32>) -> DoorAt {
        DoorAt::Bound { address: Address::Unix(path.into()), mode }
    }

    #[test]
    fn doors_are_read() {
        for (text, door, shown) in [
            ("fd:0", DoorAt::Inherited(0), "fd:0"),
            ("fd:17", DoorAt::Inherited(17), "fd:17"),
            ("unix:///x", unix("/x", None), "unix:///x"),
            ("unix:///x?mode=0660", unix("/x", Some(0o660)), "unix:///x"),
            ("unix:///x?mode=600", unix("/x", Some(0o600)), "unix:///x"),
            ("unix:///x?y", unix("/x?y", None), "unix:///x?y"),
        ] {
            assert_eq!(DoorAt::parse(text), Ok(door.clone()));
            assert_eq!(door.to_string(), shown);
        }
    }

    #[test]
    fn every_wrong_door_says_what_is_wrong() {
        let mode = |text: &str| {
            format!(
                "'unix:///x?mode={text}': '{text}' is not a mode: three octal digits, or four that begin with 0, \
                 such as 0660"
            )
        };
        for (text, cause) in [
            ("fd:", "'fd:': '' is not a descriptor (0 to 65535)".to_owned()),
            ("fd:+3", "'fd:+3': '+3' is not a descriptor (0 to 65535)".to_owned()),
            ("fd:x", "'fd:x': 'x' is not a descriptor (0 to 65535)".to_owned()),
            ("fd:65536", "'fd:65536': '65536' is not a descriptor (0 to 65535)".to_owned()),
            ("unix:///x?mode=", mode("")),
            ("unix:///x?mode=66", mode("66")),
            ("unix:///x?mode=+66", mode("+66")),
            ("unix:///x?mode=680", mode("680")),
            ("unix:///x?mode=1660", mode("1660")),
            ("unix:///x?mode=00660", mode("00660")),
            ("tcp://h:1?mode=0660", "'tcp://h:1?mode=0660': '1?mode=0660' is not a port (0 to 65535)".to_owned()),
        ] {
            assert_eq!(DoorAt::parse(text), Err(cause));
        }
    }

    #[test]
    fn one_descriptor_is_one_door() {
        let [a, b, c] = [DoorAt::Inherited(3), DoorAt::Inherited(4), unix("/x", None)];
        assert_eq!(given_twice([&a, &b, &c, &c].into_iter()), None);
        assert_eq!(given_twice([&a, &c, &b, &a].into_iter()), Some(&a));
    }
}
