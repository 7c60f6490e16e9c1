//! The process of an owner is killed and started again under a guest that goes on: a crash, and an upgrade.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{MIB, Pair, assert_same, file};
use crate::harness::{peer, scratch, throughout, until_within};
use crate::host::{Host, PATIENCE};

/// QEMU's own block layer, as a guest's disk is attached: it waits for the door and sends again what was not answered.
fn qemu_io(socket: &str) -> Command {
    let mut command = Command::new("qemu-io");
    command.args(["-t", "none", "--image-opts"]);
    command.arg(format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},file.export=vda,\
         file.reconnect-delay=60,file.open-timeout=30"
    ));
    command
}

/// D11, and what `werror=stop` must never have to catch: no request fails, and nothing that was acknowledged is lost,
/// however often `serve` dies, also in the middle of a migration.
#[test]
fn a_qemu_client_sees_no_error_when_its_server_is_killed_and_started_again() {
    let Some(_) = peer("qemu-io") else { return };
    let mut pair = Pair::new(32 * MIB, 301, 40);
    let place = pair.folder.path().to_owned();
    let disk = file("vda", &pair.at_a());
    let socket = place.join("a.nbd").display().to_string();
    let mut client = qemu_io(&socket).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let client = client.as_mut().expect("qemu-io");
    let mut orders = client.stdin.take().expect("a pipe");
    let (mut written, mut slowest_start) = (0_u32, Duration::ZERO);
    let pattern = |number: u32| 1 + number % 250;
    let offset = |number: u32| u64::from(number % 400) * 65536;
    for kill in 0..5 {
        // They wait in the pipe, so that the client is in the middle of them.
        for _ in 0..120 {
            let (pattern, offset) = (pattern(written), offset(written));
            writeln!(orders, "write -q -P {pattern} {offset} 64k\nflush").expect("it lives");
            written += 1;
        }
        orders.flush().expect("it lives");
        if kill >= 3 {
            let words = ["migrate", &pair.b.listen, "--bandwidth", "1M", "--detach", "--overwrite"];
            pair.a.ask(&words).well();
            until_within(PATIENCE, "a migration", || (pair.b.state() == "receiving").then_some(()));
        } else {
            throughout(Duration::from_millis(20), || assert_eq!(client.try_wait().expect("its child"), None));
        }
        pair.a.program.kill();
        let began = Instant::now();
        pair.a = Host::start(&place, "a", &[&disk]);
        slowest_start = slowest_start.max(began.elapsed());
    }
    for number in written - 400..written {
        writeln!(orders, "read -q -P {} {} 64k", pattern(number), offset(number)).expect("it lives");
    }
    drop(orders);
    let status = until_within(PATIENCE, "end of qemu-io", || client.try_wait().expect("its child"));
    let said = |pipe: Option<&mut dyn std::io::Read>| {
        let mut text = String::new();
        pipe.expect("a pipe").read_to_string(&mut text).expect("text");
        text
    };
    let stdout = said(client.stdout.as_mut().map(|pipe| pipe as _));
    let stderr = said(client.stderr.as_mut().map(|pipe| pipe as _));
    assert!(status.success(), "{stdout}{stderr}");
    let complaints = ["failed", "rror"].map(|word| stdout.contains(word) || stderr.contains(word));
    assert_eq!(complaints, [false, false], "{stdout}{stderr}");
    eprintln!("{written} writes over 5 restarts, the slowest took {slowest_start:?} to be ready");
    // It owns all the while, and nothing hinders it from giving the guest away.
    assert_eq!(pair.a.state(), "owner");
    pair.a.migrate(&pair.b.listen, &["--overwrite"]).well();
    assert_same(&pair.at_a(), &pair.at_b());
}

/// A process that was killed in the middle of a sync keeps its locks and doors for a while.
#[test]
fn a_server_waits_for_the_one_before_it_to_be_gone() {
    let folder = scratch();
    let image = folder.path().join("a.img");
    std::fs::File::create(&image).and_then(|image| image.set_len(MIB)).expect("an image");
    let mut old = Host::owner(folder.path(), "a", &[&file("vda", &image)]);
    thread::scope(|scope| {
        let new = scope.spawn(|| Host::start(folder.path(), "a", &[&file("vda", &image)]));
        throughout(Duration::from_millis(700), || assert!(!new.is_finished(), "two processes serve one guest"));
        old.program.kill();
        let new = new.join().expect("it waits");
        assert_eq!(new.state(), "owner");
        assert_eq!(new.try_write("vda", 0), Ok(()));
    });
}
