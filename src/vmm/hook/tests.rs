//! Hooks that behave, fail, hang and leave somebody behind: shell scripts.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::*;
use crate::vmm::{Arriving, Going, Leaving, Vmm};

/// A hook that is this script; `$D` in it is `directory`.
fn hook(directory: &Path, script: &str) -> Vmm {
    let path = directory.join("hook");
    fs::write(&path, format!("#!/bin/sh\nD={}\n{script}\n", directory.display())).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    let vmm = Vmm::parse(&format!("hook:{}", path.display())).expect("an absolute path");
    vmm.with_facts([("BLOCKFERRY_GUEST", "g1".to_owned())])
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn about() -> About {
    About { attempt: "00ff".to_owned(), peer: "tcp://b:1".to_owned() }
}

fn leaving(vmm: &Vmm) -> Leaving {
    vmm.leaving(&about(), soon()).expect("it is ready").expect("a driver")
}

fn until(leaving: &mut Leaving, going: Going) {
    let deadline = soon();
    while leaving.poll(Duration::from_millis(50)).expect("it goes on") != going {
        assert!(Instant::now() < deadline, "never {going:?}");
    }
}

#[test]
fn a_state_goes_through_both_ends_and_each_point_is_told_what_it_is_about() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(
        directory.path(),
        r#"what="$BLOCKFERRY_GUEST $BLOCKFERRY_SIDE $BLOCKFERRY_ATTEMPT $BLOCKFERRY_PEER"
           echo "$1 $what ran=$BLOCKFERRY_RAN" >> $D/log
           case $1 in state-out) head -c 300000 /dev/zero ;; state-in) wc -c > $D/state ;; esac"#,
    );
    let mut source = leaving(&vmm);
    assert!(source.ran());
    let out = source.start(Duration::ZERO, soon()).expect("started");
    until(&mut source, Going::Stopped);
    source.go_on(soon()).expect("it goes on");
    vmm.check_arriving(&about(), false, soon()).expect("it is ready");
    let (mut destination, state) = vmm.arriving(&about(), true, soon()).expect("it waits");
    assert_eq!(destination.loaded(Duration::ZERO), Ok(false), "nothing has come");
    let mut buffer = vec![0; 65536];
    loop {
        match out.recv(&mut buffer).expect("readable") {
            0 => break,
            count => state.send_all(&buffer[..count]).expect("it reads"),
        }
    }
    until(&mut source, Going::Gone);
    assert_eq!(destination.loaded(Duration::ZERO), Ok(false), "its end has not come");
    state.finish_sending();
    assert_eq!(destination.loaded(Duration::from_secs(20)), Ok(true));
    assert_eq!(destination.loaded(Duration::ZERO), Ok(true), "and it stays so");
    destination.run(true, soon()).expect("it runs");
    source.end(soon()).expect("it ends");
    let read = |name| fs::read_to_string(directory.path().join(name)).expect("written");
    assert_eq!(read("state").trim(), "300000");
    let log = read("log");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[0], "ready g1 source 00ff tcp://b:1 ran=");
    assert_eq!(lines[1], "stop g1 source 00ff tcp://b:1 ran=1");
    for line in ["state-out g1 source", "ready g1 destination", "state-in g1 destination", "run g1 destination"] {
        assert!(log.contains(line), "{line}: {log}");
    }
    assert_eq!(lines.last(), Some(&"gone g1 source 00ff tcp://b:1 ran=1"));
}

#[test]
fn a_guest_that_its_user_paused_is_told_apart_on_the_source_only() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(directory.path(), "exit 3");
    assert!(!leaving(&vmm).ran());
    let refused = vmm.check_arriving(&about(), true, soon());
    assert_eq!(refused, Err("hook ready: exit status: 3: it said nothing".to_owned()));
}

#[test]
fn a_hook_that_fails_is_quoted() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(directory.path(), "echo first; echo no such guest >&2; exit 1");
    let error = vmm.leaving(&about(), soon()).expect_err("it fails");
    assert_eq!(error, "hook ready: exit status: 1: no such guest");
    let gone = Vmm::parse("hook:/no/such/hook").expect("a path").leaving(&about(), soon());
    assert_eq!(gone.expect_err("not there"), "hook ready: /no/such/hook: No such file or directory");
}

#[test]
fn a_hook_that_hangs_is_killed_with_what_it_has_started() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(directory.path(), "sleep 60 & echo $! > $D/child; sleep 60");
    let began = Instant::now();
    let error = vmm.leaving(&about(), Instant::now() + Duration::from_millis(500)).expect_err("it hangs");
    assert_eq!(error, "hook ready: did not end in time and was killed");
    assert!(began.elapsed() < Duration::from_secs(20));
    let child = fs::read_to_string(directory.path().join("child")).expect("it was started");
    let stat = || fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
    let deadline = soon();
    // Its parent is gone: whoever reaps it may take a moment.
    while !stat().is_empty() && !stat().contains(") Z ") {
        assert!(Instant::now() < deadline, "it lives: {}", stat());
        std::thread::yield_now();
    }
}

#[test]
fn what_it_leaves_behind_is_not_waited_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(directory.path(), "sleep 3 & exit 1");
    let began = Instant::now();
    vmm.leaving(&about(), soon()).expect_err("it fails");
    assert!(began.elapsed() < Duration::from_secs(2), "the sleeper has its output");
}

#[test]
fn a_state_that_breaks_off_is_a_failure_on_both_sides() {
    let directory = tempfile::tempdir().expect("a directory");
    let vmm = hook(directory.path(), "case $1 in state-out) echo half; exit 1;; state-in) read x; exit 7;; esac");
    let mut source = leaving(&vmm);
    let _out = source.start(Duration::ZERO, soon()).expect("started");
    until(&mut source, Going::Stopped);
    source.go_on(soon()).expect("it goes on");
    let error = source.poll(Duration::from_secs(20)).expect_err("it failed");
    assert_eq!(error, "hook state-out: exit status: 1: it said nothing");
    let (mut destination, state) = vmm.arriving(&about(), true, soon()).expect("it waits");
    state.send_all(b"half\n").expect("it reads");
    let error = destination.loaded(Duration::from_secs(20)).expect_err("it failed");
    assert_eq!(error, "hook state-in: exit status: 7: it said nothing");
}

#[test]
fn an_abort_ends_what_is_under_way_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let script =
        "case $1 in stop) sleep 60; echo late >> $D/log;; abort) echo abort ran=$BLOCKFERRY_RAN >> $D/log;; esac";
    let vmm = hook(directory.path(), script);
    let mut source = leaving(&vmm);
    let out = source.start(Duration::ZERO, soon()).expect("started");
    assert_eq!(source.poll(Duration::ZERO), Ok(Going::Active));
    source.resume(soon()).expect("it runs again");
    assert_eq!(fs::read_to_string(directory.path().join("log")).expect("written"), "abort ran=1\n");
    let mut rest = [0; 1];
    assert_eq!(out.recv(&mut rest).expect("its end"), 0);
    let (mut destination, state) = vmm.arriving(&about(), false, soon()).expect("it waits");
    assert!(matches!(destination, Arriving::Hook(_)));
    destination.end(soon()).expect("it ends");
    drop(state);
}
