//! What the source looks at before it asks anybody, and how a refusal reads: one line with all that is wrong.

use std::fmt::Display;
use std::sync::Arc;

use super::wire::{DiskOffer, Problem, StayingDisk, cut};
use crate::dirty::DirtyMap;
use crate::domain;
use crate::error::reason;
use crate::export::Export;
use crate::guest::Guest;
use crate::limits::DISKS_MAX;

/// What is offered to the destination.
///
/// # Errors
/// All that is wrong with the disks of this side, in one line.
pub(super) fn offers(exports: &[Arc<Export>]) -> Result<heapless::Vec<DiskOffer, DISKS_MAX>, String> {
    let (mut offers, mut problems) = (heapless::Vec::new(), Vec::new());
    for export in exports {
        match offer(export) {
            // No more than --disk takes.
            Ok(offer) => _ = offers.push(offer),
            Err(cause) => problems.push(Problem { disk: cut(export.name()), cause: cut(&cause) }),
        }
    }
    if problems.is_empty() { Ok(offers) } else { Err(report("refused by the source", &problems)) }
}

fn offer(export: &Export) -> Result<DiskOffer, String> {
    let fault = |cause: &dyn Display| format!("cannot be read: {cause}");
    let disk = export.disk().ok_or("does not exist")?;
    disk.check()?;
    if disk.is_removed() {
        // No reason to stop: whoever removed it by mistake saves the guest by moving it away.
        let name = export.name();
        log::warn!("disk {name}: its file has been removed: it is gone when this process ends, and moves as it is");
    }
    Ok(DiskOffer {
        name: cut(export.name()),
        size_bytes: disk.size(),
        data_bytes: disk.data_bytes().map_err(|error| fault(&reason(&error)))?,
        granularity_bytes: DirtyMap::granularity_for(disk.size()),
    })
}

/// The disks that stay: the destination is asked whether it reaches them by itself.
///
/// # Errors
/// One line: what `chosen` says is not possible.
pub(super) fn staying(
    guest: &Guest,
    chosen: &[impl AsRef<str>],
) -> Result<heapless::Vec<StayingDisk, DISKS_MAX>, String> {
    let specs: Vec<_> = guest.disks.iter().map(|disk| disk.spec.clone()).collect();
    let fates = domain::moving(&specs, chosen)?;
    let stays = guest.disks.iter().zip(fates).filter_map(|(disk, why)| {
        let size_bytes = disk.export.as_ref().and_then(|export| export.disk()).map(|disk| disk.size());
        why.map(|why| StayingDisk { name: cut(&disk.spec.name), why, size_bytes })
    });
    // No more than --disk takes.
    Ok(stays.take(DISKS_MAX).collect())
}

/// One line with all that was found wrong.
pub(super) fn report(who: &str, problems: &[Problem]) -> String {
    let mut report = who.to_owned();
    for (number, problem) in problems.iter().enumerate() {
        report.push_str(if number == 0 { ": " } else { "; " });
        if !problem.disk.is_empty() {
            report.push_str(&format!("disk {}: ", problem.disk));
        }
        report.push_str(&problem.cause);
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Cache, Disk};
    use crate::export::Gate;

    #[test]
    fn a_source_says_all_that_is_wrong_with_its_own_disks() {
        let folder = tempfile::tempdir().expect("a folder");
        let export = |name: &str| {
            let disk = Disk::create(&folder.path().join(name), 1 << 20, Cache::Writeback).expect("created");
            Export::new(name, Some(Arc::new(disk)), false, Gate::Serving)
        };
        let exports = [export("vda"), export("vdb"), export("vdc"), Export::new("vdd", None, false, Gate::Serving)];
        assert_eq!(offers(&exports[..3]).map(|offers| offers.len()), Ok(3));
        let file = std::fs::File::options().write(true).open(folder.path().join("vdc")).expect("opened");
        file.set_len(4096).expect("cut");
        let said = "refused by the source: disk vdc: its file has become shorter: 4096 bytes of 1048576; disk vdd: \
                    does not exist";
        assert_eq!(offers(&exports), Err(said.to_owned()));
        // One that was removed moves: nothing else saves it.
        std::fs::remove_file(folder.path().join("vda")).expect("removed");
        assert!(exports[0].disk().expect("open").is_removed());
        assert_eq!(offers(&exports[..2]).map(|offers| offers.len()), Ok(2));
        assert_eq!(offers(&exports), Err(said.to_owned()));
    }
}
