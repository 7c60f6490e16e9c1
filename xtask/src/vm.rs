//! `cargo xtask vm`: boots the image of `cargo xtask initramfs` in QEMU and looks what comes of it.
//!
//! What is tested is what nothing but a kernel can show: that the executable is an init. Machines have 128 MiB of
//! memory and no KVM; each test says what it saw in one line, and a failure quotes the end of the machine's serial
//! port.

use crate::cpio::Entry;
use crate::demo_host::Scratch;
use crate::kernel::{self, Kernel};
use crate::live::Nursery;
use crate::util::{self, Error, QUESTION, Result};
use crate::vm_machine::{Blueprint, Machine, QEMU};
use crate::{build, initramfs, peers, vm_guest, vm_hook, vm_pair};
use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

/// Size of a guest's disk and of a disk for records, in bytes.
const DISK: u64 = 16 << 20;

/// A test: it returns what it saw.
type Test = fn(&Lab) -> Result<String>;

/// The tests, the cheapest first.
const TESTS: [(&str, Test); 14] = [
    ("image_is_reproducible", image_is_reproducible),
    ("version_is_printed_and_the_machine_powers_off", version_is_printed),
    ("bad_command_line_is_one_line_and_powers_off", bad_command_line),
    ("bad_parameter_is_one_line_and_powers_off", bad_parameter),
    ("fw_cfg_says_what_to_run", fw_cfg_says_what_to_run),
    ("bad_modules_are_lines_and_companions_run", bad_modules_and_companions),
    ("disk_that_cannot_be_mounted_is_an_end", disk_that_cannot_be_mounted),
    ("mounted_disk_is_released_at_the_end", mounted_disk_is_released),
    ("server_that_fails_is_started_again", server_is_started_again),
    ("serve_comes_up_with_its_address", serve_comes_up),
    ("guest_that_runs_is_moved_there_and_back", vm_guest::driven),
    ("guest_that_runs_is_moved_by_hand", vm_guest::by_hand),
    ("guest_on_a_device_is_moved_there_and_back_by_a_hook", vm_hook::run),
    ("guest_moves_there_and_back_through_crash_outage_and_power_loss", vm_pair::run),
];

/// `cargo xtask vm [NAME]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let only = match arguments {
        [] => "",
        [name] if !name.starts_with('-') => name,
        [word, ..] => return Err(Error::usage("vm", word, "the only argument is a part of a test's name")),
    };
    if !TESTS.iter().any(|(name, _)| name.contains(only)) {
        return Err(Error::usage("vm", only, "no test has a name like that"));
    }
    peers::install("vm")?;
    run(&build::static_executable()?.place, only)
}

/// Runs the tests whose name contains `only` with this executable; all of them, whatever the others say.
pub(crate) fn run(executable: &Path, only: &str) -> Result<()> {
    let lab = Lab::open(executable)?;
    let mut failed = Vec::new();
    for (name, test) in TESTS.into_iter().filter(|(name, _)| name.contains(only)) {
        let began = Instant::now();
        match test(&lab) {
            Ok(seen) => println!("xtask: vm: {name}: ok, {:.1} s: {seen}", began.elapsed().as_secs_f64()),
            Err(error) => {
                eprintln!("xtask: vm: {name}: FAILED, {:.1} s: {error}", began.elapsed().as_secs_f64());
                failed.push(name);
            }
        }
    }
    match failed.as_slice() {
        [] => Ok(()),
        names => Err(Error::new("vm", format!("{} tests failed", names.len()), names.join(", "))),
    }
}

/// Whether a machine could run here.
pub(crate) fn is_possible() -> bool {
    util::find_program(QEMU).is_some() && util::find_program("mke2fs").is_some()
}

/// What every test has.
pub(crate) struct Lab {
    pub(crate) scratch: Arc<Scratch>,
    pub(crate) kernel: Kernel,
    pub(crate) executable: PathBuf,
    /// The image as it ships.
    image: PathBuf,
    /// What guests that run are made of, once one was wanted.
    nursery: OnceCell<Arc<Nursery>>,
}

impl Lab {
    fn open(executable: &Path) -> Result<Self> {
        let scratch = Scratch::new("vm")?;
        let kernel = kernel::find(None)?;
        let image = scratch.path("blockferry.cpio");
        initramfs::write(&image, &initramfs::pack(executable, &kernel, &["manifest"], &[])?)?;
        Ok(Self { scratch, kernel, executable: executable.to_owned(), image, nursery: OnceCell::new() })
    }

    /// What guests that run are made of.
    pub(crate) fn nursery(&self) -> Result<&Arc<Nursery>> {
        match self.nursery.get() {
            Some(nursery) => Ok(nursery),
            None => Nursery::open(&self.scratch, &self.executable).map(|made| self.nursery.get_or_init(|| made)),
        }
    }

    /// A machine with this command line of the kernel.
    fn boot(&self, name: &str, append: &str, more: &[&str]) -> Result<Machine> {
        self.boot_image(name, &self.image, append, more.iter().map(|word| (*word).to_owned()).collect())
    }

    fn boot_image(&self, name: &str, image: &Path, append: &str, more: Vec<String>) -> Result<Machine> {
        Machine::start(&self.scratch, &Blueprint { name, kernel: &self.kernel.image, image, append, more })
    }

    /// A fresh disk, all holes.
    pub(crate) fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.path(name);
        let made = fs::File::create(&path).and_then(|file| file.set_len(DISK));
        made.map_err(|error| Error::new("vm", path.display(), error))?;
        Ok(path)
    }

    /// A fresh disk with an empty ext4 on it.
    pub(crate) fn ext4(&self, name: &str) -> Result<PathBuf> {
        let path = self.disk(name)?;
        let program = util::find_program("mke2fs").ok_or_else(|| Error::new("vm", "mke2fs", "not here"))?;
        let said = util::capture("vm", Command::new(program).args(["-t", "ext4", "-q", "-F"]).arg(&path), QUESTION)?;
        if said.status.success() { Ok(path) } else { Err(Error::new("vm", "mke2fs", said.stderr)) }
    }
}

/// QEMU's arguments for virtio disks: the first is /dev/vda.
pub(crate) fn disks(paths: &[&Path]) -> Vec<String> {
    let drive = |path: &&Path| ["-drive".to_owned(), format!("file={},format=raw,if=virtio", path.display())];
    paths.iter().flat_map(drive).collect()
}

/// The one line that a machine says after everything else, if all that it said is as it should be.
fn result(said: &str) -> Result<&str> {
    let wrong = |cause: &str| Error::new("vm", cause, said.replace('\n', " | "));
    if said.contains("Kernel panic") {
        return Err(wrong("the kernel panicked"));
    }
    let results: Vec<&str> = said.lines().filter(|line| line.starts_with("blockferry-result: ")).collect();
    match results.as_slice() {
        [line] => Ok(line),
        _ => Err(wrong("not one result line")),
    }
}

/// The lines that blockferry itself said, of whatever process, without the result line.
fn own_lines(said: &str) -> Vec<&str> {
    let lines = said.lines().filter_map(|line| line.find("blockferry: ").map(|at| &line[at..]));
    lines.collect()
}

/// The first is what was to be, or it is an error.
pub(crate) fn expect<T: PartialEq + std::fmt::Debug>(what: &str, wanted: &T, seen: &T) -> Result<()> {
    if wanted == seen { Ok(()) } else { Err(Error::new("vm", what, format!("{seen:?} instead of {wanted:?}"))) }
}

fn image_is_reproducible(lab: &Lab) -> Result<String> {
    let again = initramfs::pack(&lab.executable, &lab.kernel, &["manifest"], &[])?;
    let first = fs::read(&lab.image).map_err(|error| Error::new("vm", lab.image.display(), error))?;
    expect("two images of one tree", &true, &(first == again))?;
    Ok(format!("{} bytes, for Linux {}", first.len(), lab.kernel.version))
}

fn version_is_printed(lab: &Lab) -> Result<String> {
    let said = lab.boot("version", "-- --version", &[])?.ends()?;
    expect("result", &"blockferry-result: exit=0 starts=1 end=poweroff", &result(&said)?)?;
    let version = said.lines().find(|line| line.starts_with("blockferry "));
    version.map(str::to_owned).ok_or_else(|| Error::new("vm", "version", said))
}

fn bad_command_line(lab: &Lab) -> Result<String> {
    let said = lab.boot("usage", "blockferry.end=reboot -- ferry g1", &[])?.ends()?;
    expect("result", &"blockferry-result: exit=2 starts=1 end=reboot", &result(&said)?)?;
    let lines = own_lines(&said);
    expect("what it said", &vec!["blockferry: command: ferry: there is no such command"], &lines)?;
    // No command line at all is wrong too, and the default end is to power off.
    let said = lab.boot("nothing", "", &[])?.ends()?;
    expect("result", &"blockferry-result: exit=2 starts=1 end=poweroff", &result(&said)?)?;
    Ok(lines.concat())
}

fn bad_parameter(lab: &Lab) -> Result<String> {
    let said = lab.boot("parameter", "blockferry.ip=eth0=10.0.0.300/24 -- --version", &[])?.ends()?;
    expect("result", &"blockferry-result: exit=2 starts=0 end=poweroff", &result(&said)?)?;
    let wanted = "blockferry: init: blockferry.ip=eth0=10.0.0.300/24: '10.0.0.300' is no IP address";
    expect("what it said", &vec![wanted], &own_lines(&said))?;
    // The quotes are the kernel's: it, and we, see one that is never closed.
    let said = lab.boot("quote", "-- serve \"g1", &[])?.ends()?;
    expect("result", &"blockferry-result: exit=2 starts=0 end=poweroff", &result(&said)?)?;
    Ok(wanted.to_owned())
}

fn fw_cfg_says_what_to_run(lab: &Lab) -> Result<String> {
    let file = lab.scratch.path("arguments");
    let failed = |error: std::io::Error| Error::new("vm", file.display(), error);
    fs::write(&file, "status g1\n  --control \"unix:///run/a b.sock\"\n").map_err(failed)?;
    let more = format!("name=opt/blockferry/args,file={}", file.display());
    let said = lab.boot("fw_cfg", "-- --version", &["-fw_cfg", &more])?.ends()?;
    expect("result", &"blockferry-result: exit=1 starts=1 end=poweroff", &result(&said)?)?;
    let lines = own_lines(&said);
    expect("the quoted word", &true, &lines.iter().any(|line| line.contains("unix:///run/a b.sock")))?;
    Ok(lines.join(" | "))
}

/// Modules that are not there or are none, and a companion that cannot be started beside one that can.
fn bad_modules_and_companions(lab: &Lab) -> Result<String> {
    let file = |text: &str| Entry::File(text.as_bytes().to_vec(), 0o644);
    let list = "/lib/modules/gone.ko\n/etc/no-module.ko x=1\nrelative.ko\n";
    let more = [
        ("/etc/blockferry/modules", file(list)),
        ("/etc/no-module.ko", file(&"nothing".repeat(512))),
        ("/etc/blockferry/start", file("/init version # ends at once\n/bin/gone\n")),
    ];
    let image = lab.scratch.path("modules.cpio");
    initramfs::write(&image, &initramfs::pack(&lab.executable, &lab.kernel, &["manifest"], &more)?)?;
    let append = "loglevel=7 -- export /etc/no-module.ko --nbd unix:///run/x.sock";
    let mut machine = lab.boot_image("modules", &image, append, Vec::new())?;
    let (line, _) = machine.says("gone.ko: ")?;
    for text in ["no-module.ko: ", "relative.ko: is no absolute path", "/bin/gone: cannot be started", "/init ended"] {
        machine.says(text)?;
    }
    machine.says("blockferry 0")?;
    Ok(line)
}

fn disk_that_cannot_be_mounted(lab: &Lab) -> Result<String> {
    let disk = lab.disk("empty.raw")?;
    let append = "blockferry.mount=/dev/vda:/var/lib/blockferry:ext4 -- --version";
    let said = lab.boot_image("mount", &lab.image, append, disks(&[&disk]))?.ends()?;
    expect("result", &"blockferry-result: exit=1 starts=0 end=poweroff", &result(&said)?)?;
    let lines = own_lines(&said);
    let wanted = vec!["blockferry: init: mount /dev/vda at /var/lib/blockferry: Invalid argument"];
    expect("what it said", &wanted, &lines)?;
    Ok(lines.concat())
}

/// A disk that was mounted needs no recovery after the machine's end.
fn mounted_disk_is_released(lab: &Lab) -> Result<String> {
    let disk = lab.ext4("mounted.raw")?;
    let append = "blockferry.mount=/dev/vda:/var/lib/blockferry:ext4 -- --version";
    let said = lab.boot_image("mounted", &lab.image, append, disks(&[&disk]))?.ends()?;
    expect("result", &"blockferry-result: exit=0 starts=1 end=poweroff", &result(&said)?)?;
    let program = util::find_program("dumpe2fs").ok_or_else(|| Error::new("vm", "dumpe2fs", "not here"))?;
    let seen = util::capture("vm", Command::new(program).arg("-h").arg(&disk), QUESTION)?.stdout;
    let features = seen.lines().find(|line| line.starts_with("Filesystem features:")).unwrap_or_default();
    let mounts = seen.lines().find(|line| line.starts_with("Mount count:")).unwrap_or_default();
    expect("times that it was mounted", &Some("1"), &mounts.split_whitespace().nth(2))?;
    expect("needs recovery", &false, &features.contains("needs_recovery"))?;
    Ok(mounts.to_owned())
}

/// A server whose address is not this machine's: it fails, again and again, and each pause is longer.
fn server_is_started_again(lab: &Lab) -> Result<String> {
    let disk = lab.disk("restart.raw")?;
    let append = "blockferry.restart=1 -- export /dev/vda --nbd tcp://192.0.2.1:10809 --insecure-plaintext";
    let mut machine = lab.boot_image("restart", &lab.image, append, disks(&[&disk]))?;
    for pause in ["100 ms", "200 ms", "400 ms", "800 ms"] {
        machine.says(&format!("again in {pause}"))?;
    }
    machine.says("again in 1600 ms").map(|(line, _)| line)
}

/// A host as it would be: its address, its records on a disk of their own, and a guest's disk.
fn serve_comes_up(lab: &Lab) -> Result<String> {
    let (data, state) = (lab.disk("data.raw")?, lab.ext4("state.raw")?);
    let mut more = disks(&[&data, &state]);
    more.extend(["-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0"].map(str::to_owned));
    let append = "blockferry.ip=eth0=10.0.0.1/24,10.0.0.254 blockferry.ip=eth0=fd00::1/64 \
                  blockferry.mount=/dev/vdb:/var/lib/blockferry:ext4 -- serve g1 --disk vda,file=/dev/vda \
                  --listen tcp://10.0.0.1:49152 --insecure-plaintext";
    let mut machine = lab.boot_image("serve", &lab.image, append, more)?;
    let (line, took) = machine.says(": ready: ")?;
    let wanted = "blockferry: g1: ready: incoming order=0.0 nbd=unix:///run/blockferry/g1/nbd.sock \
                  listen=tcp://10.0.0.1:49152";
    expect("the ready line", &true, &line.contains(wanted))?;
    Ok(format!("{:.1} s from power on to ready", took.as_secs_f64()))
}
