//! A monitor that says what the test wants.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}"#;

fn later() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// A monitor that greets and then answers each command with the next of `answers`, lines each.
fn monitor(answers: &'static [&'static str]) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<String>>) {
    speaks(move |stream| {
        let mut asked = Vec::new();
        let mut out = stream.try_clone().expect("a twin");
        writeln!(out, "{GREETING}").expect("sent");
        let mut commands = BufReader::new(stream).lines();
        for answer in [&r#"{"return": {}}"#].into_iter().chain(answers) {
            let Some(Ok(command)) = commands.next() else { break };
            asked.push(command);
            if writeln!(out, "{answer}").is_err() {
                break;
            }
        }
        asked
    })
}

fn speaks<T: Send + 'static>(
    say: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<T>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("bound");
    let thread = thread::spawn(move || say(listener.accept().expect("accepted").0));
    (folder, path, thread)
}

#[test]
fn answers_and_events_are_told_apart() {
    let (_folder, path, monitor) = monitor(&[
        "{\"event\": \"STOP\"}\r\n{\"event\": \"NIC_RX_FILTER_CHANGED\"}\r\n\
         {\"return\": {\"running\": false, \"status\": \"paused\"}}",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Migration is not finalized yet\"}}",
        "{\"return\": {\"status\": \"failed\", \"error-desc\": \"no \\\"space\\\"\"}}\n\
         {\"event\": \"MIGRATION\", \"data\": {\"status\": \"pre-switchover\"}}",
    ]);
    let mut qmp = Qmp::connect(&path, later()).expect("connected");
    let state = qmp.run_state(later()).expect("a state");
    assert_eq!(state, RunState { running: false, word: "paused".to_owned() });
    let refused = qmp.execute("cont", "", later()).expect_err("refused");
    assert_eq!(refused, format!("the VMM at {}: cont: Migration is not finalized yet", path.display()));
    let (status, cause) = qmp.migration(later()).expect("a status");
    assert_eq!((status, cause.as_str()), (Status::Failed, r#"no \\\"space\\\""#));
    assert_eq!(qmp.event(later()), Ok(Some(Event::Stop)));
    assert_eq!(qmp.event(later()), Ok(Some(Event::Migration(Status::PreSwitchover))));
    let gone = qmp.event(later()).expect_err("it hung up");
    assert_eq!(gone, format!("the VMM at {}: it has gone", path.display()));
    let asked = monitor.join().expect("no panic");
    assert_eq!(asked[1], r#"{"execute":"query-status","id":"2"}"#);
}

#[test]
fn the_answer_to_a_command_that_nobody_waited_for_is_none_to_the_next() {
    let (_folder, path, monitor) = monitor(&[
        "{\"timestamp\": {}}",
        "{\"return\": {}, \"id\": \"2\"}\n{\"return\": {\"running\": true, \"status\": \"running\"}, \"id\": \"3\"}",
    ]);
    let mut qmp = Qmp::connect(&path, later()).expect("connected");
    let late = qmp.execute("migrate_cancel", "", Instant::now() + Duration::from_millis(50)).expect_err("no answer");
    assert!(late.ends_with("migrate_cancel: no answer"), "{late}");
    assert_eq!(qmp.run_state(later()).expect("its own answer").word, "running");
    drop(qmp);
    monitor.join().expect("no panic");
}

#[test]
fn capabilities_are_set_whatever_the_user_has_set() {
    let (_folder, path, monitor) = monitor(&[r#"{"return": {}}"#]);
    Qmp::connect(&path, later()).and_then(|mut qmp| qmp.set_capabilities(true, later())).expect("set");
    let asked = monitor.join().expect("no panic");
    let state = |name: &str| asked[1].contains(&format!("{{\"capability\":\"{name}\",\"state\":true}}"));
    assert!(
        state("events") && state("pause-before-switchover") && state("return-path") && state("late-block-activate")
    );
    assert!(!state("multifd") && !state("postcopy-ram") && asked[1].contains("multifd"), "{}", asked[1]);
}

#[test]
fn little_downtime_is_allowed_at_first_but_not_to_an_emulator() {
    let begins = |said: &'static str| {
        let (_folder, path, thread) = speaks(move |stream| {
            let mut out = stream.try_clone().expect("a twin");
            writeln!(out, "{GREETING}").expect("sent");
            let mut allowed = String::new();
            for command in BufReader::new(stream).lines().map_while(Result::ok) {
                let answer = match &command {
                    c if c.contains("query-status") => r#"{"return": {"running": true, "status": "running"}}"#,
                    c if c.contains("query-kvm") => said,
                    c if c.contains("migrate-set-parameters") => {
                        allowed.push_str(&command);
                        r#"{"return": {}}"#
                    }
                    _ => r#"{"return": {}}"#,
                };
                writeln!(out, "{answer}").expect("sent");
                if let Some(path) = command.split_once("unix:").and_then(|(_, rest)| rest.split('"').next()) {
                    // It sends its state.
                    let _ = UnixStream::connect(path).expect("somebody takes it");
                    break;
                }
            }
            allowed
        });
        let mut leaving = source::Leaving::find(&path, later()).expect("a guest");
        leaving.start(Duration::from_millis(300), later()).expect("it leaves");
        thread.join().expect("no panic")
    };
    assert!(begins(r#"{"return": {"enabled": true, "present": true}}"#).ends_with(r#""downtime-limit":20}}"#));
    for emulated in [r#"{"return": {"enabled": false, "present": true}}"#, r#"{"error": {"desc": "what?"}}"#] {
        assert!(begins(emulated).ends_with(r#""downtime-limit":300}}"#), "{emulated}");
    }
}

#[test]
fn what_is_no_monitor_is_told() {
    let (_folder, path, thread) = speaks(|mut stream| writeln!(stream, "SSH-2.0"));
    let error = Qmp::connect(&path, later()).expect_err("no monitor");
    assert_eq!(error, format!("the VMM at {}: it is no QEMU monitor", path.display()));
    thread.join().expect("no panic").expect("sent");

    let (_folder, path, thread) = speaks(|mut stream| {
        let line = vec![b'x'; 2 * QMP_LINE_MAX];
        let _ = stream.write_all(&line);
    });
    let error = Qmp::connect(&path, later()).expect_err("no end");
    assert_eq!(error, format!("the VMM at {}: it sends a line of more than 65536 bytes", path.display()));
    thread.join().expect("no panic");

    let missing = Qmp::connect(Path::new("/nowhere/qmp"), later()).expect_err("nobody");
    assert!(missing.starts_with("the VMM at /nowhere/qmp: "), "{missing}");
}

#[test]
fn a_silent_monitor_keeps_nobody_waiting() {
    let (give, take) = std::sync::mpsc::channel::<()>();
    let (_folder, path, thread) = speaks(move |stream| {
        let _ = take.recv();
        drop(stream);
    });
    let began = Instant::now();
    let error = Qmp::connect(&path, Instant::now() + Duration::from_millis(50)).expect_err("it does not greet");
    assert!(error.contains("is somebody else connected to it?"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(4));
    drop(give);
    thread.join().expect("no panic");
}

#[test]
fn a_quit_that_hangs_up_is_done() {
    let (_folder, path, thread) = monitor(&[]);
    let mut qmp = Qmp::connect(&path, later()).expect("connected");
    assert_eq!(qmp.quit(later()), Ok(()));
    thread.join().expect("no panic");
}
