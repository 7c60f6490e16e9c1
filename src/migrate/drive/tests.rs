//! When a verification has followed the copy.

use super::course::have_caught_up;
use super::*;
use crate::disk::{Cache, Disk};
use crate::export::{Export, Gate};
use crate::mirror::Budget;

#[test]
fn nobody_is_quiesced_while_the_verification_has_no_connection() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let disk = Disk::create(&dir.path().join("vda"), 1 << 20, Cache::Writeback).expect("created");
    let export = Export::new("vda", Some(Arc::new(disk)), false, Gate::Serving);
    let plan = Plan { verified: Verified::Full, ..Plan::default() };
    let mirror = Mirror::arm(&export, &Budget::new(0), &plan).expect("armed");
    let walked = |walks| [Counts { verify_walks: walks, unverified: u64::MAX, ..mirror.counts() }];
    assert!(!have_caught_up(&walked(1), &[0]));
    assert!(have_caught_up(&walked(2), &[0]));
    mirror.set_verifier_lost(Some("a test"));
    assert!(!have_caught_up(&walked(2), &[0]), "ten tries later a migration that is well would be over");
    mirror.set_verifier_lost(None);
    assert!(have_caught_up(&walked(2), &[0]));
}
