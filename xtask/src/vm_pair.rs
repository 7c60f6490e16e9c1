//! Two machines: a disk moves from one to the other while a guest writes, over a link that is slow, loses packets and
//! goes away; and moves back to a source that loses its power when it has given the guest away.
//!
//! `vm` calls it. The guest is the writer of `initramfs/guest` on /dev/nbd0; whoever moves it says hold and switch.

use crate::demo_host::{number, text};
use crate::util::Result;
use crate::vm::{Lab, expect};
use crate::vm_host::{self, GUEST, Host, Role, field};
use std::thread;
use std::time::Duration;

/// The guest's device is attached as soon as its host owns.
const ROLE: Role = Role { init: "blockferry.start=\"/init attach g1 vda /dev/nbd0\"", serve: "" };
/// The seed of what it writes.
const SEED: u64 = 20;
/// How long the link is away.
const OUTAGE: Duration = Duration::from_secs(3);
/// How long whatever leaves the source is on its way when its power is cut: GO is in there then.
const LAST_DELAY_MS: u64 = 500;

/// The whole story; returns what was seen.
pub(crate) fn run(lab: &Lab) -> Result<String> {
    let [mut a, mut b] = Host::pair(lab, ROLE, &vm_host::image(lab, "pair.cpio")?)?;
    a.ask("claim", &[])?;
    a.tell("wait /dev/nbd0")?;
    a.tell(&format!("write /dev/nbd0 {SEED}"))?;
    a.writes_on(200)?;
    survive_a_crash(&mut a)?;
    let there = move_over_a_bad_link(&mut a, &mut b)?;
    let back = come_back_through_a_power_loss(b, &mut a)?;
    // Last, for nothing starts again after it.
    a.tell("kill steward")?;
    a.machine.says("the steward was ended by signal 9; everybody else goes on")?;
    expect("the state after init's helper has died", &"owner".to_owned(), &a.state()?)?;
    Ok(format!("{there}; {back}"))
}

/// `serve` is killed under a guest that writes: init starts it again, and the guest's device goes on.
fn survive_a_crash(host: &mut Host<'_>) -> Result<()> {
    host.tell("kill serve")?;
    host.machine.says("the command was ended by signal 9; again in 100 ms")?;
    host.machine.says_again(": ready: ", 2)?;
    host.writes_on(200)
}

/// The guest goes from `a` to `b`; in the middle the link is away.
fn move_over_a_bad_link<'a>(a: &mut Host<'a>, b: &mut Host<'a>) -> Result<String> {
    for host in [&mut *a, &mut *b] {
        host.tell("netem eth0 5 10")?;
    }
    a.ask("migrate", &[&b.door(), "--hold", "--detach", "--bandwidth", "1M", "--insecure-plaintext"])?;
    let sent = |status: &str| number(status, "sent_bytes").unwrap_or_default();
    let before = sent(&a.wait_for("sent anything", |status| sent(status) > 1 << 20)?);
    a.machine.command(r#"{"execute":"set_link","arguments":{"name":"n0","up":false}}"#)?;
    thread::sleep(OUTAGE);
    a.writes_on(100)?;
    a.machine.command(r#"{"execute":"set_link","arguments":{"name":"n0","up":true}}"#)?;
    a.wait_for("sent more after the outage", |status| sent(status) > before + (1 << 20))?;
    a.ask("set", &["--bandwidth", "0"])?;
    a.wait_for("converged", |status| status.contains("\"converged\":true"))?;
    // As a VMM is paused: what it has written last is in the page cache and nowhere else (W1 to W3), and it keeps the
    // device open. Each of its writes must arrive, and not only those before its last sync.
    let wrote = a.tell("pause")?;
    let issued = field(&wrote, "issued")?;
    a.ask("switch", &[])?;
    let done = a.wait_for("done", |status| status.contains("{\"type\":\"done\""))?;
    // What the VMM that is still there has in its page cache must never reach a newer disk.
    let early = b.tell(&format!("run /init migrate {GUEST} {} --hold --insecure-plaintext", a.door()))?;
    let kept = "vda: was /dev/nbd0 when this host owned it, and is in use by process";
    expect("a way back past the VMM of before", &(true, true), &(early.starts_with("exit=1"), early.contains(kept)))?;
    // Nobody serves it, which the process that serves the guest knows.
    let forced = a.tell("run /init detach /dev/nbd0 --force")?;
    expect("detach --force", &true, &forced.contains("is disconnected, and somebody still has it open"))?;
    a.tell("stop")?;
    expect("the owner", &Some("destination"), &text(&done, "owner"))?;
    expect("who owns at the source", &"given".to_owned(), &a.state()?)?;
    expect("who owns at the destination", &"owner".to_owned(), &b.state()?)?;
    b.tell("wait /dev/nbd0")?;
    let found = b.tell(&format!("verify /dev/nbd0 {SEED} {issued} {issued}"))?;
    let resident = [a.tell("rss")?, b.tell("rss")?].join(" and ");
    Ok(format!(
        "{issued} writes, moved in {} ms over a link that was away for {} s; {found}; resident {resident}",
        number(&done, "total_ms").unwrap_or_default(),
        OUTAGE.as_secs()
    ))
}

/// The guest goes back; its source loses its power after it gave, and before the destination heard of it.
fn come_back_through_a_power_loss<'a>(mut b: Host<'a>, a: &mut Host<'a>) -> Result<String> {
    let seed = SEED + 1;
    for host in [&mut *a, &mut b] {
        host.tell("netem eth0 0 0")?;
    }
    // A disk full of the first seed's blocks would be found to be none of the second's.
    let wipe = b.tell("wipe /dev/nbd0")?;
    b.tell(&format!("write /dev/nbd0 {seed}"))?;
    b.writes_on(200)?;
    // The last pass will find a slow link: that is allowed here.
    let options = ["--hold", "--detach", "--overwrite", "--insecure-plaintext", "--downtime-limit", "60000"];
    b.ask("migrate", &[&[a.door().as_str()], &options[..]].concat())?;
    b.wait_for("converged", |status| status.contains("\"converged\":true"))?;
    let wrote = b.tell("stop")?;
    b.tell(&format!("netem eth0 {LAST_DELAY_MS} 0"))?;
    b.tell("die-after /dev/nbd0")?;
    b.ask("switch", &[])?;
    let b = b.loses_power()?;
    expect("the destination, whose GO was on its way", &"sealed".to_owned(), &a.state()?)?;
    let mut b = b.boot()?;
    expect("the source after its power loss", &"given".to_owned(), &b.state()?)?;
    let status = b.ask("status", &["--json"])?;
    expect("the source's gate", &true, &status.contains("\"gate\":\"fenced\""))?;
    a.wait_for("owns", |status| text(status, "state") == Some("owner"))?;
    let attached = a.tell(&format!("run /init attach {GUEST} vda /dev/nbd0 --wait 30"))?;
    expect("attach", &true, &attached.starts_with("exit=0"))?;
    let refused = b.tell(&format!("run /init attach {GUEST} vda /dev/nbd0 --wait 0"))?;
    expect("attach at the old owner", &true, &refused.starts_with("exit=1"))?;
    let (synced, issued) = (field(&wrote, "synced")?, field(&wrote, "issued")?);
    let found = a.tell(&format!("verify /dev/nbd0 {seed} {synced} {issued}"))?;
    Ok(format!("back with a power loss after GIVEN: {wipe}, {issued} writes, {found}; old owner: {refused}"))
}
