//! When a verification has followed the copy, and when a VMM is told to let its guest go on.

use std::os::unix::fs::PermissionsExt as _;

use super::course::have_caught_up;
use super::*;
use crate::disk::{Cache, Disk};
use crate::export::{Export, Gate};
use crate::mirror::Budget;
use crate::vmm::{About, Vmm};

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

#[test]
fn a_vmm_that_was_told_to_send_its_state_is_told_to_go_on_even_if_nothing_carried_it() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let (hook, log) = (dir.path().join("hook"), dir.path().join("log"));
    std::fs::write(&hook, format!("#!/bin/sh\necho $1 >> {}\n", log.display())).expect("written");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let vmm = Vmm::parse(&format!("hook:{}", hook.display())).expect("a hook");
    let about = About::default();
    let leaving = vmm.leaving(&about, Instant::now() + REPLY_TIMEOUT).expect("ready").expect("a driver");
    let said = || std::fs::read_to_string(&log).expect("a log").lines().map(str::to_owned).collect::<Vec<_>>();
    let mut state = State::new(leaving);
    state.resume().expect("nothing was asked of it");
    assert_eq!(said(), ["ready"]);
    let _socket = state.start(Duration::ZERO).expect("it stops");
    // Here the threads that would carry it cannot be started.
    state.resume().expect("it goes on");
    assert_eq!(said().last().map(String::as_str), Some("abort"));
}
