//! A guest that runs is moved, memory, devices and disk, and says itself what that was like.
//!
//! `vm` calls it. The guest is a Linux in QEMU that writes all the time, remembers what was acknowledged, and compares
//! its whole disk with that after each move. It has disks that must not be copied besides.

use crate::demo::ms;
use crate::demo_host::number;
use crate::live_pair::{self, Moved, Pair, SIDES};
use crate::util::{self, Error, Result};
use crate::vm::{Lab, expect};

/// Size of the disk that moves.
const DISK: u64 = 64 << 20;
/// Writes before a move and after it.
const BEFORE: u64 = 300;
const AFTER: u64 = 300;

/// There and back, each host drives its own QEMU (`--vmm qmp:`).
pub(crate) fn driven(lab: &Lab) -> Result<String> {
    there_and_back(lab, true, |pair, how| pair.migrate(&[&["--overwrite"], how].concat(), false))
}

/// There and back, the caller drives both QEMUs (`--vmm none`).
pub(crate) fn by_hand(lab: &Lab) -> Result<String> {
    there_and_back(lab, false, |pair, how| pair.migrate_by_hand(&[&["--overwrite"], how].concat()))
}

/// Moves the guest to and fro, and looks at everything after each move.
fn there_and_back(lab: &Lab, driven: bool, migrate: impl Fn(&mut Pair, &[&str]) -> Result<Moved>) -> Result<String> {
    let pair = &mut Pair::start(lab.nursery()?, DISK, driven, &util::fresh_log("vm-guest")?)?;
    expect("the guest's disks", &live_pair::disks_inside(DISK), &pair.here.tell("disks")?)?;
    let mut seen = Vec::new();
    // Back with guest writes that wait for the mirror (D7).
    for how in [&[][..], &["--synchronous", "always"]] {
        pair.here.writes_on(BEFORE)?;
        let moved = migrate(pair, how)?;
        pair.here.writes_on(AFTER)?;
        let report = pair.here.report()?;
        let checked = pair.here.check()?;
        expect(
            "the states",
            &["owner", "given"].map(str::to_owned),
            &[pair.state(pair.side)?, pair.state(1 - pair.side)?],
        )?;
        expect("the guest's disks", &live_pair::disks_inside(DISK), &pair.here.tell("disks")?)?;
        expect("which disks move", &live_pair::MOVES.to_owned(), &pair.moves()?)?;
        let sent = number(&moved.done, "sent_bytes").unwrap_or(u64::MAX);
        // Half of the disk is data, and what was written since is a few blocks.
        expect("bytes sent that are the first disk's", &true, &(sent < DISK))?;
        let to = SIDES[pair.side];
        seen.push(format!("to {to}: pause {}, {}, {checked}, {sent} bytes sent", ms(report.pause), report.said));
    }
    if seen.is_empty() { Err(Error::new("vm", "guest", "was not moved")) } else { Ok(seen.join("; ")) }
}
