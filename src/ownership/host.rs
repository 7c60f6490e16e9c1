//! Which host this is, to records and stamps.
//!
//! A [`Host`] is the exclusive or of two 128-bit numbers: the machine's and the state directory's.
//!
//! - The machine's is `/etc/machine-id`, else the firmware's `product_uuid`, else there is none and the state directory
//!   stands alone. So a state directory that is copied to another machine is foreign there (rule M7); one that is
//!   copied *within* a machine, or between machines that have no identity or share one (clones), is not noticed: a copy
//!   must never be used beside its original.
//! - The state directory's is random, drawn when it is first used. So two processes of one guest on one machine, each
//!   with a directory of its own, are two hosts, and a guest can move between them.
//!
//! The machine's own number is not told to peers: without the state directory's it cannot be found in the sum.

use std::fs;
use std::path::Path;

use super::Host;
use super::id::{ID_BYTES, ID_DIGITS};

/// Where a machine's number is, the first that has one counts.
const PLACES: [&str; 2] = ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"];

/// The host of a state directory with the number `directory` on this machine.
#[must_use]
pub(super) fn on_this_machine(directory: Host) -> Host {
    combine(machine(&PLACES.map(Path::new)), directory)
}

fn combine(machine: Host, directory: Host) -> Host {
    let mut sum = [0; ID_BYTES];
    for (byte, (a, b)) in sum.iter_mut().zip(machine.0.iter().zip(directory.0)) {
        *byte = a ^ b;
    }
    Host(sum)
}

/// The machine's number, [`Host::NONE`] where it has none.
fn machine(places: &[&Path]) -> Host {
    let number = |place: &&Path| number_in(&fs::read_to_string(place).ok()?);
    places.iter().find_map(number).unwrap_or(Host::NONE)
}

/// Reads 32 hexadecimal digits, perhaps with dashes. What firmware says that has no number is none.
fn number_in(text: &str) -> Option<Host> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
    let all_alike =
        digits.len() == ID_DIGITS && (digits.bytes().all(|b| b == b'0') || digits.bytes().all(|b| b == b'f'));
    if all_alike { None } else { Host::from_hex(&digits) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_number_is_read_where_there_is_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).expect("written");
            path
        };
        let machine_id = place("machine-id", "3d1219c7c4c5404aaa1f6d2a48adfda4\n");
        let uuid = place("uuid", "3D1219C7-C4C5-404A-AA1F-6D2A48ADFDA5\n");
        let [none, fresh] = [place("zero", &"0".repeat(32)), place("fresh", "uninitialized\n")];
        let read = |places: &[&std::path::PathBuf]| {
            let places: Vec<&Path> = places.iter().map(|path| path.as_path()).collect();
            machine(&places).to_string()
        };
        assert_eq!(read(&[&machine_id, &uuid]), "3d1219c7c4c5404aaa1f6d2a48adfda4");
        assert_eq!(read(&[&fresh, &none, &uuid]), "3d1219c7c4c5404aaa1f6d2a48adfda5");
        assert_eq!(read(&[&dir.path().join("missing")]), Host::NONE.to_string());
    }

    #[test]
    fn another_machine_and_another_directory_are_other_hosts() {
        let [a, b, x, y] = [1, 2, 4, 8].map(|byte| Host([byte; ID_BYTES]));
        let hosts = [combine(a, x), combine(a, y), combine(b, x), combine(b, y)];
        for (i, host) in hosts.iter().enumerate() {
            assert!(hosts[..i].iter().all(|other| other != host));
        }
        assert_eq!(combine(Host::NONE, x), x);
    }
}
