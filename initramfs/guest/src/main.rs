//! What runs inside the machines of `cargo xtask vm`: it stands for a guest on /dev/nbdN, and is the test's hand on the
//! inside. It is in the test's image only. Called with an argument it is the hook of that point.
//!
//! It answers lines at the virtio port `test`, one line each, `ok ...` or `error ...`:
//!
//! | line | what it does |
//! |---|---|
//! | `write DEV SEED` | starts writing, through the page cache as most VMMs do, with a sync now and then |
//! | `count` | says `issued=N synced=M`: how many writes there were, and how many when the last good sync began |
//! | `pause` | writes no more, syncs nothing, keeps the device open, and says the same |
//! | `stop` | syncs a last time, unless it is paused, closes the device, and says the same |
//! | `wipe DEV` | writes zeroes everywhere, and syncs |
//! | `verify DEV SEED SYNCED ISSUED` | reads everything and compares it |
//! | `wait DEV` | waits until the device has a size |
//! | `rss` | resident memory of `serve`, in KiB |
//! | `run PROGRAM ARGUMENT...` | runs it to its end; its exit code and what it said |
//! | `kill serve`, `kill steward` | SIGKILL for it |
//! | `die-after DEV` | from now on: when the device is not connected any more, the machine stops at once, as in a power
//! loss |
//! | `live DEV CLOCK RATE` | stamps a device that is all zeroes and starts a writer that remembers ([`live`]) |
//! | `mark` | that one forgets its longest pause |
//! | `report` | says what it has seen |
//! | `check` | compares the whole device with what it remembers |
//! | `disks` | the names of the machine's disks, with their bytes, `,ro`, or that they are empty drives |
//! | `fail POINT` | the hook fails the next time that it is called at that point ([`hook`]) |
//! | `netem IFACE DELAY_MS LOSS_PERMILLE` | everything that leaves the interface is late, some of it is lost |

mod hook;
mod live;
mod netem;
mod port;
mod process;
mod writer;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use hook::Vmm;
use live::Live;
use rustix::io::Errno;
use writer::Writer;

/// How long a device may take to appear.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    if let Some(point) = std::env::args().nth(1) {
        return hook::call(&point);
    }
    match port::open("test") {
        Ok(mut port) => {
            let vmm = Vmm::listening();
            let mut live = None;
            while let Some(line) = port.line() {
                let said = match answer(&line, &mut hook::lock(&vmm), &mut live) {
                    Ok(text) => format!("ok {text}\n"),
                    Err(cause) => format!("error {cause}\n"),
                };
                port.say(&said);
            }
            ExitCode::SUCCESS
        }
        Err(cause) => {
            eprintln!("testguest: port test: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn answer(line: &str, vmm: &mut Vmm, live: &mut Option<Live>) -> Result<String, String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("'{text}' is no number"));
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let writer = &mut vmm.writer;
    match words.as_slice() {
        ["write", device, seed] if writer.is_none() => {
            *writer = Some(Writer::start(device, number(seed)?)?);
            Ok(String::new())
        }
        ["count"] => writer.as_ref().map(Writer::count).ok_or_else(|| "nobody writes".to_owned()),
        ["pause"] => writer.as_ref().ok_or_else(|| "nobody writes".to_owned())?.pause(),
        ["stop"] => writer.take().ok_or_else(|| "nobody writes".to_owned())?.stop(),
        ["verify", device, seed, synced, issued] => {
            writer::verify(device, number(seed)?, number(synced)?, number(issued)?)
        }
        ["live", device, clock, rate] if live.is_none() => {
            *live = Some(Live::start(device, clock, number(rate)?)?);
            Ok(String::new())
        }
        ["mark"] => running(live).map(Live::mark),
        ["report"] => running(live)?.report(),
        ["check"] => running(live)?.check(),
        ["disks"] => disks(),
        ["wipe", device] => writer::wipe(device),
        ["wait", device] => wait_for(device),
        ["rss"] => process::resident_kib("serve").map(|kib| format!("kib={kib}")),
        ["run", words @ ..] => process::run(words),
        ["kill", "serve"] => process::kill("serve"),
        ["kill", "steward"] => process::kill_parent(),
        ["die-after", device] => die_after(device),
        ["fail", point] => {
            vmm.fails = Some((*point).to_owned());
            Ok(String::new())
        }
        ["netem", interface, delay_ms, loss] => {
            netem::set(interface, number(delay_ms)?, number(loss)?).map(|()| String::new())
        }
        _ => Err(format!("'{line}' is not understood")),
    }
}

/// Waits until the kernel knows how large a device is: an nbd device has no size before it is attached.
pub(crate) fn wait_for(device: &str) -> Result<String, String> {
    let name = device.strip_prefix("/dev/").ok_or("no device")?;
    let size = format!("/sys/block/{name}/size");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sectors = std::fs::read_to_string(&size).ok().and_then(|text| text.trim().parse::<u64>().ok());
        match sectors {
            Some(sectors) if sectors > 0 => return Ok(format!("bytes={}", sectors * 512)),
            _ if Instant::now() > deadline => return Err(format!("{device} has no size")),
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Looks, all the time, whether an nbd device is still connected; when it is not, the kernel restarts the machine
/// without a word to anybody. `serve` disconnects devices when it has given the guest away and before it has heard that
/// this arrived: nobody outside could be quick enough.
fn die_after(device: &str) -> Result<String, String> {
    let name = device.strip_prefix("/dev/").ok_or("no device")?;
    let connected = std::path::PathBuf::from(format!("/sys/block/{name}/pid"));
    if !connected.exists() {
        return Err(format!("{device} is not connected"));
    }
    thread::spawn(move || {
        while connected.exists() {
            thread::sleep(Duration::from_millis(1));
        }
        std::fs::write("/proc/sysrq-trigger", "b")
    });
    Ok(String::new())
}

fn running(live: &Option<Live>) -> Result<&Live, String> {
    live.as_ref().ok_or_else(|| "nobody lives".to_owned())
}

/// The machine's disks, by name: `vda=SIZE` in bytes, `,ro` behind it if nobody may write there; `sr0=empty` for a
/// drive without a medium.
fn disks() -> Result<String, String> {
    let entries = std::fs::read_dir("/sys/block").map_err(|error| error.to_string())?.flatten();
    let mut disks: Vec<String> = entries
        .filter(|entry| entry.path().join("device").exists())
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let fact = |what| std::fs::read_to_string(entry.path().join(what)).unwrap_or_default();
            let opened = std::fs::File::open(format!("/dev/{name}"));
            if opened.is_err_and(|error| error.raw_os_error() == Some(Errno::NOMEDIUM.raw_os_error())) {
                return format!("{name}=empty");
            }
            let bytes = fact("size").trim().parse::<u64>().map_or(0, |sectors| sectors * 512);
            format!("{name}={bytes}{}", if fact("ro").trim() == "1" { ",ro" } else { "" })
        })
        .collect();
    disks.sort();
    Ok(disks.join(" "))
}
