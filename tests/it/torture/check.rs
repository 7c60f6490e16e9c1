//! What must be true after a round: one owner, every write, a truthful exit code, nothing left behind. Everything that
//! a round may leave in folders is said here, in [`leftovers`].

use std::fs;
use std::time::{Duration, Instant};

use blockferry::nbd::client::{Client, RequestError, Wants};
use std::sync::Arc;

use super::plan::Side;
use super::site::{DISK, Site, Standing};
use crate::harness::pause;
use crate::writer::Ledger;

/// How long hosts that can hear each other may take until everybody knows who owns.
const SETTLE: Duration = Duration::from_secs(45);
/// When an operator loses patience, and how often.
const PATIENCE: Duration = Duration::from_millis(400);
/// Longest wait for a guest door.
const DOOR: Duration = Duration::from_secs(10);

/// Waits until one of two hosts owns and the other one knows that it does not. Nobody says a word that decides
/// anything; with `operator` somebody types `recover` where it is not known who owns, as docs/operations.md says.
pub(super) fn settled(a: &Site, b: &Site, operator: bool) -> Result<(Side, [Standing; 2]), String> {
    let began = Instant::now();
    let mut asked = began;
    loop {
        // In this order: once the destination owns, the source does not, for good.
        let there = b.who_owns();
        let here = a.who_owns();
        if let Some(owner) = judge(&here, &there)? {
            return Ok((owner, [here, there]));
        }
        if began.elapsed() > SETTLE {
            return Err(format!("nobody knows who owns after {SETTLE:?}: a: {}; b: {}", here.said, there.said));
        }
        if operator && asked.elapsed() > PATIENCE {
            asked = Instant::now();
            for (site, standing) in [(a, &here), (b, &there)] {
                if standing.exit == 5 && standing.state != "incoming" {
                    drop(site.ask(&["recover"]));
                }
            }
        }
        pause(Duration::from_millis(20));
    }
}

/// Who owns, as two hosts say it; `None` while that is still to be settled.
fn judge(here: &Standing, there: &Standing) -> Result<Option<Side>, String> {
    if here.exit == 0 && there.exit == 0 {
        return Err(format!("two owners: a: {}; b: {}", here.said, there.said));
    }
    for standing in [here, there] {
        if standing.state == "superseded" {
            return Err(format!("somebody was overruled, and nobody gave a word: {}", standing.said));
        }
    }
    // A host whose attempt died with the source's process goes on receiving until the next one comes.
    let owns = |one: &Standing, other: &Standing| {
        let knows = matches!((other.exit, other.state.as_str()), (4, "given" | "receiving") | (5, "incoming"));
        one.exit == 0 && one.state == "owner" && knows
    };
    Ok(match (owns(here, there), owns(there, here)) {
        (true, _) => Some(Side::Source),
        (_, true) => Some(Side::Destination),
        _ => None,
    })
}

/// What `migrate` said must be true of who owns now: nothing has happened since that could have changed it.
pub(super) fn truthful(exit: Option<i32>, stderr: &str, owner: Side) -> Result<(), String> {
    let lie = |what: &str| Err(format!("migrate ended with {exit:?} ({what}), {} owns: {stderr}", owner.name()));
    match (exit, owner) {
        (Some(0 | 4), Side::Destination) | (Some(1), Side::Source) | (Some(5) | None, _) => Ok(()),
        (Some(3), Side::Source) if stderr.trim_end().ends_with("; this source still owns and serves the guest") => {
            Ok(())
        }
        (Some(3), Side::Source) => lie("and does not say so"),
        (Some(0 | 4), _) => lie("the destination owns"),
        (Some(1 | 3), _) => lie("the source owns"),
        _ => lie("no exit code of a migration"),
    }
}

/// Exactly one guest door takes a write: tried with what is there already.
pub(super) fn one_takes(owner: &Site, others: &[&Site]) -> Result<(), String> {
    takes(owner).map_err(|refusal| format!("{} owns and takes no write: {refusal}", owner.name))?;
    for other in others {
        match takes(other) {
            Ok(()) => return Err(format!("{} and {} both take writes", owner.name, other.name)),
            Err(refusal) if ["SHUTDOWN", "EPERM", "does not exist yet"].iter().any(|word| refusal.contains(word)) => {}
            Err(refusal) => return Err(format!("{} does not own, and says: {refusal}", other.name)),
        }
    }
    Ok(())
}

/// Writes the first sector as it is.
fn takes(site: &Site) -> Result<(), String> {
    let mut client = open(site)?;
    let mut bytes = [0; 512];
    let refused = |error: RequestError| error.to_string();
    client.read_exact(0, &mut bytes).map_err(refused)?;
    client.write_all(0, &bytes).map_err(refused)?;
    client.disconnect();
    Ok(())
}

fn open(site: &Site) -> Result<Client, String> {
    let socket = site.door().connect(DOOR).map_err(|error| error.to_string())?;
    Client::connect(Arc::new(socket), DISK, Wants::default()).map_err(|error| error.to_string())
}

/// Everything that was acknowledged is on the owner's disk, and comes through its door.
pub(super) fn whole(ledger: &Ledger, owner: &Site) -> Result<(), String> {
    let report = ledger.verify_file(&owner.image);
    if report.wrong > 0 {
        return Err(format!("the disk of {}: {report}", owner.name));
    }
    let report = ledger.verify_door(open(owner)?);
    if report.wrong > 0 {
        return Err(format!("the door of {}: {report}", owner.name));
    }
    Ok(())
}

/// What the folders of a host hold that has settled. `made`: its disk was made by the attempt, and by nobody else.
/// `frozen`: its record could not be changed for a while.
pub(super) fn leftovers(site: &Site, standing: &Standing, made: bool, frozen: bool) -> Result<(), String> {
    let names = |folder: &std::path::Path| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    for name in names(&site.state) {
        let known = ["lock", "id", "record", "receipt", "lost+found"].contains(&name.as_str());
        // What is left of an attempt is listed until somebody uses it or gives it up.
        let listed = name == "journal" && ["incoming", "receiving", "sealed"].contains(&standing.state.as_str());
        // Who receives has written ahead what it will need; what could not be removed is removed with the next change.
        let may = standing.state == "receiving" || frozen;
        let ahead = may && (name.starts_with("record.") || name.starts_with("journal.")) && name.ends_with(".tmp");
        if !known && !listed && !ahead {
            return Err(format!("{} is {} and keeps {name} in its state directory", site.name, standing.state));
        }
    }
    for name in names(site.image.parent().unwrap_or(&site.state)) {
        let known = ["disk.raw", "disk.fuse", "disk.fails", "state", "disk", "disk.thin", "all", "lost+found"];
        if !known.contains(&name.as_str()) {
            return Err(format!("{} keeps {name} beside its disk", site.name));
        }
    }
    // What the attempt made is removed when it ends, or kept for the next one and listed; nothing is cleaned up of an
    // attempt that was sealed (M2).
    let sealed = || fs::read_to_string(site.log_file()).is_ok_and(|log| log.contains(" record: Seal { "));
    let listed = site.state.join("journal").exists();
    if made && standing.state == "incoming" && !listed && site.image.exists() && !sealed() {
        return Err(format!("{} keeps the disk of an attempt that ended", site.name));
    }
    let children = site.children();
    if !children.trim().is_empty() {
        return Err(format!("{} has processes: {children}", site.name));
    }
    if site.has_crashed() {
        return Err(format!("the process of {} has ended by itself", site.name));
    }
    Ok(())
}

mod tests {
    use super::*;

    fn standing(exit: i32, state: &str) -> Standing {
        Standing { exit, state: state.to_owned(), generation: 1, said: format!("{exit} {state}") }
    }

    #[test]
    fn two_owners_are_found_and_one_that_is_not_settled_is_waited_for() {
        let judged = |here, there| judge(&here, &there);
        let owner = || standing(0, "owner");
        assert!(judged(owner(), owner()).expect_err("two").starts_with("two owners"));
        assert!(judged(standing(4, "superseded"), owner()).is_err());
        assert_eq!(judged(owner(), standing(5, "incoming")), Ok(Some(Side::Source)));
        assert_eq!(judged(owner(), standing(4, "receiving")), Ok(Some(Side::Source)));
        assert_eq!(judged(standing(4, "given"), owner()), Ok(Some(Side::Destination)));
        for (here, there) in [
            (standing(5, "given"), owner()),
            (standing(0, "offered"), standing(5, "incoming")),
            (owner(), standing(5, "sealed")),
            (standing(5, "offered"), standing(5, "sealed")),
            (standing(5, "unknown"), standing(5, "incoming")),
        ] {
            assert_eq!(judged(here, there), Ok(None));
        }
    }

    #[test]
    fn an_exit_code_that_is_not_true_is_found() {
        let kept = "blockferry: migrate: g1: x; this source still owns and serves the guest\n";
        for (exit, owner, is_true) in [
            (Some(0), Side::Destination, true),
            (Some(0), Side::Source, false),
            (Some(1), Side::Source, true),
            (Some(1), Side::Destination, false),
            (Some(3), Side::Source, true),
            (Some(3), Side::Destination, false),
            (Some(4), Side::Destination, true),
            (Some(4), Side::Source, false),
            (Some(5), Side::Source, true),
            (Some(5), Side::Destination, true),
            (None, Side::Source, true),
            (Some(2), Side::Source, false),
            (Some(101), Side::Source, false),
        ] {
            assert_eq!(truthful(exit, kept, owner).is_ok(), is_true, "{exit:?} {owner:?}");
        }
        assert!(truthful(Some(3), "blockferry: migrate: g1: x\n", Side::Source).is_err());
    }
}
