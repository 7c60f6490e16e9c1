//! Two machines: a guest whose disk is /dev/nbd0 moves there and back by a hook, as one in Firecracker or Cloud
//! Hypervisor would (docs/hooks.md), with what it has written last in no place but the source's page cache.
//!
//! `vm` calls it. The VMM and its hook are `initramfs/guest/src/hook.rs`. Nobody says hold or switch here, and the
//! destination's device is attached by the hook.

use crate::demo_host::{number, text};
use crate::util::Result;
use crate::vm::{Lab, expect};
use crate::vm_host::{self, GUEST, Host, Role, field};

const ROLE: Role = Role { init: "", serve: "--vmm hook:/bin/testguest" };
const SEED: u64 = 30;
/// Writes before and after each move.
const WRITES: u64 = 200;

/// The whole story; returns what was seen.
pub(crate) fn run(lab: &Lab) -> Result<String> {
    let [mut a, mut b] = Host::pair(lab, ROLE, &vm_host::image(lab, "hook.cpio")?)?;
    a.ask("claim", &[])?;
    let attached = a.tell(&format!("run /init attach {GUEST} vda /dev/nbd0 --wait 30"))?;
    expect("attach", &true, &attached.starts_with("exit=0"))?;
    a.tell("wait /dev/nbd0")?;
    a.tell(&format!("write /dev/nbd0 {SEED}"))?;
    a.writes_on(WRITES)?;
    fail_and_go_on(&mut a, &mut b)?;
    let there = travel(&mut a, &mut b, &[])?;
    // What the kernel writes back waits for the mirror (D7).
    let back = travel(&mut b, &mut a, &["--synchronous", "always"])?;
    let wrote = a.tell("stop")?;
    let issued = field(&wrote, "issued")?;
    let found = a.tell(&format!("verify /dev/nbd0 {SEED} {issued} {issued}"))?;
    Ok(format!("there: {there}; back: {back}; {issued} writes, {found}"))
}

/// The state is not taken: the guest goes on where it was, on the device that it had.
fn fail_and_go_on(from: &mut Host<'_>, to: &mut Host<'_>) -> Result<()> {
    to.tell("fail state-in")?;
    migrate(from, to, &[], ("here", 3))?;
    from.writes_on(WRITES)
}

/// The guest moves, and writes on at its new host; says what that was like.
fn travel(from: &mut Host<'_>, to: &mut Host<'_>, how: &[&str]) -> Result<String> {
    let done = migrate(from, to, &[&["--overwrite"], how].concat(), ("destination", 0))?;
    let states = [from.state()?, to.state()?];
    expect("the states", &["given", "owner"].map(str::to_owned), &states)?;
    to.writes_on(WRITES)?;
    let figure = |name| number(&done, name).unwrap_or_default();
    Ok(format!("pause {} ms, {} bytes of state", figure("pause_us") / 1000, figure("state_bytes")))
}

/// Migrates, which must come to this end: who owns, and the exit code.
fn migrate(from: &Host<'_>, to: &Host<'_>, more: &[&str], end: (&str, u64)) -> Result<String> {
    let door = to.door();
    from.ask("migrate", &[&[door.as_str(), "--detach", "--insecure-plaintext"], more].concat())?;
    let done = from.wait_for("done", |status| status.contains("{\"type\":\"done\""))?;
    if (text(&done, "owner"), number(&done, "exit")) == (Some(end.0), Some(end.1)) {
        return Ok(done);
    }
    Err(from.machine.wrong(&format!("not {end:?}: {done}; and {}", to.machine.wrong("its peer"))))
}
