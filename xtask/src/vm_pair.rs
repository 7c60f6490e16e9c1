//! Two machines: a disk moves from one to the other while a guest writes, over a link that is slow, loses packets and
//! goes away; and moves back to a source that loses its power when it has given the guest away.
//!
//! `vm` calls it. Inside of each machine are init, `serve`, `attach` and the guest of `initramfs/guest`; from outside
//! come the executable's own commands through the control door on a virtio port, words to the guest through another,
//! and QMP for what happens to a machine. The only network is a pair of sockets between the two.

use crate::cpio::Entry;
use crate::demo_host::{number, text};
use crate::util::{self, Error, Result};
use crate::vm::{Lab, disks, expect};
use crate::vm_machine::{Blueprint, Lines, Machine, PATIENCE};
use crate::{build, initramfs};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The guest's name, and the seed of what it writes.
const GUEST: &str = "g1";
const SEED: u64 = 20;
/// How long the link is away.
const OUTAGE: Duration = Duration::from_secs(3);
/// How often a state is asked for.
const LOOK: Duration = Duration::from_millis(200);
/// How long whatever leaves the source is on its way when its power is cut: GO is in there then.
const LAST_DELAY_MS: u64 = 500;

/// A machine of the pair, and what it consists of.
struct Host<'a> {
    lab: &'a Lab,
    name: &'static str,
    /// Its number: of its address, its hardware address and its identity.
    number: u8,
    image: PathBuf,
    drives: [PathBuf; 2],
    machine: Machine,
    /// What is inside, at the guest's port.
    inside: Lines,
}

impl<'a> Host<'a> {
    fn new(lab: &'a Lab, name: &'static str, number: u8, image: PathBuf) -> Result<Self> {
        let drives = [lab.disk(&format!("{name}-data.raw"))?, lab.ext4(&format!("{name}-state.raw"))?];
        let (machine, inside) = power_on(lab, name, number, &image, &drives)?;
        Ok(Self { lab, name, number, image, drives, machine, inside })
    }

    /// Waits until it has lost its power.
    fn loses_power(self) -> Result<Powerless<'a>> {
        let Self { lab, name, number, image, drives, machine, .. } = self;
        machine.ends()?;
        Ok(Powerless { lab, name, number, image, drives })
    }

    /// Where another host finds its migration door.
    fn door(&self) -> String {
        format!("tcp://10.0.0.{}:49152", self.number)
    }

    /// `blockferry WORD g1 ...` from outside of the machine; its stdout.
    fn ask(&self, word: &str, arguments: &[&str]) -> Result<String> {
        let port = format!("unix://{}", self.lab.scratch.path(&format!("{}.control", self.name)).display());
        let mut command = Command::new(&self.lab.executable);
        command.args([word, GUEST]).args(arguments).args(["--control", &port]);
        let said = util::capture(word, &mut command, PATIENCE)?;
        if !said.status.success() {
            return Err(self.machine.wrong(&format!("{word}: {}", said.stderr)));
        }
        Ok(said.stdout)
    }

    /// The state of its record.
    fn state(&self) -> Result<String> {
        let status = self.ask("status", &["--json"])?;
        Ok(text(&status, "state").unwrap_or_default().to_owned())
    }

    /// Waits until `status --json` is as wanted; returns it.
    fn wait_for(&self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ask("status", &["--json"])?;
            if is_so(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(self.machine.wrong(&format!("never {what}: {status}")));
            }
            thread::sleep(LOOK);
        }
    }

    /// A line to what is inside; its answer without `ok`.
    fn tell(&mut self, line: &str) -> Result<String> {
        let answer = self.inside.say(line).and_then(|()| self.inside.hear(|_| true));
        match answer.as_deref().map(|answer| answer.strip_prefix("ok")) {
            Ok(Some(rest)) => Ok(rest.trim().to_owned()),
            Ok(None) => Err(self.machine.wrong(&format!("{line}: {}", answer.unwrap_or_default()))),
            Err(error) => Err(self.machine.wrong(&format!("{line}: {error}"))),
        }
    }

    /// Waits until the guest has written so much more.
    fn writes_on(&mut self, writes: u64) -> Result<()> {
        let before = field(&self.tell("count")?, "issued")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.tell("count")?;
            if said.contains("failed=") || Instant::now() > deadline {
                return Err(self.machine.wrong(&format!("the guest does not write on: {said}")));
            }
            if field(&said, "issued")? >= before + writes {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
    }
}

/// A machine without power: what is left are its disks.
struct Powerless<'a> {
    lab: &'a Lab,
    name: &'static str,
    number: u8,
    image: PathBuf,
    drives: [PathBuf; 2],
}

impl<'a> Powerless<'a> {
    /// Switched on again.
    fn boot(self) -> Result<Host<'a>> {
        let Self { lab, name, number, image, drives } = self;
        let (machine, inside) = power_on(lab, name, number, &image, &drives)?;
        Ok(Host { lab, name, number, image, drives, machine, inside })
    }
}

/// Boots a host, and waits until it serves.
fn power_on(lab: &Lab, name: &str, number: u8, image: &PathBuf, drives: &[PathBuf; 2]) -> Result<(Machine, Lines)> {
    let at = |name: &str, what: &str| lab.scratch.path(&format!("{name}.{what}")).display().to_string();
    let other = if name == "A" { "B" } else { "A" };
    let mut more = disks(&[&drives[0], &drives[1]]);
    let mut add = |option: &str, value: String| more.extend([option.to_owned(), value]);
    let [ours, theirs] = [at(name, "net"), at(other, "net")];
    add("-netdev", format!("dgram,id=n0,local.type=unix,local.path={ours},remote.type=unix,remote.path={theirs}"));
    add("-device", format!("virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0{number}"));
    add("-uuid", format!("3d1219c7-c4c5-404a-aa1f-6d2a48adfd0{number}"));
    add("-device", "virtio-serial-pci".to_owned());
    for (what, port) in [("control", "org.blockferry.0"), ("guest", "test")] {
        add("-chardev", format!("socket,id={what},path={},server=on,wait=off", at(name, what)));
        add("-device", format!("virtserialport,chardev={what},name={port}"));
    }
    let append = format!(
        "blockferry.ip=eth0=10.0.0.{number}/24 blockferry.mount=/dev/vdb:/var/lib/blockferry:ext4 \
         blockferry.restart=1 blockferry.start=/bin/testguest blockferry.start=\"/init attach {GUEST} vda /dev/nbd0\" \
         -- serve {GUEST} --disk vda,file=/dev/vda --listen tcp://10.0.0.{number}:49152 --log info \
         --insecure-plaintext --control unix:///run/blockferry/{GUEST}/control.sock --control virtio:org.blockferry.0"
    );
    let blueprint = Blueprint { name, kernel: &lab.kernel.image, image, append: &append, more };
    let mut machine = Machine::start(&lab.scratch, &blueprint)?;
    machine.says(": ready: ")?;
    let port = lab.scratch.path(&format!("{name}.guest"));
    let inside = Lines::open(&port).map_err(|error| machine.wrong(&format!("the guest's port: {error}")))?;
    Ok((machine, inside))
}

/// `name=N` in an answer of the guest.
fn field(said: &str, name: &str) -> Result<u64> {
    let value = said.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).ok_or_else(|| Error::new("vm", name, format!("not in '{said}'")))
}

/// The whole story; returns what was seen.
pub(crate) fn run(lab: &Lab) -> Result<String> {
    let guest = build::static_program("testguest")?;
    let guest = fs::read(&guest).map_err(|error| Error::new("vm", guest.display(), error))?;
    let image = lab.scratch.path("pair.cpio");
    let more = [("/bin/testguest", Entry::File(guest, 0o755))];
    let manifests = ["manifest", "manifest.test"];
    initramfs::write(&image, &initramfs::pack(&lab.executable, &lab.kernel, &manifests, &more)?)?;

    let mut a = Host::new(lab, "A", 1, image.clone())?;
    let mut b = Host::new(lab, "B", 2, image)?;
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
