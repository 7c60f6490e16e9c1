//! One host of a round: where its disk and its record are, the process that serves the guest there, and what can be
//! done to it. It is shared with the threads that strike.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockferry::address::Address;

use super::media::{Cable, Failing, Fails, Volume, no_mounts};
use super::plan::{Ground, Plan, Side};
use crate::harness::Program;
use crate::host::{Finished, address, blockferry, run};
use crate::json::Json;

pub(super) const GUEST: &str = "g1";
pub(super) const DISK: &str = "vda";
pub(super) const SIZE: u64 = 64 << 20;
/// How long a short command may take on a machine that has other things to do.
const COMMAND: Duration = Duration::from_secs(90);

/// Who owns, as `who-owns` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) exit: i32,
    pub(super) state: String,
    pub(super) generation: u64,
    pub(super) said: String,
}

/// One host.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) name: &'static str,
    /// Sockets and the log.
    folder: PathBuf,
    pub(super) state: PathBuf,
    /// What `--disk` names, and where its bytes are.
    pub(super) disk: PathBuf,
    pub(super) image: PathBuf,
    pub(super) address: String,
    pub(super) listens: AtomicBool,
    /// What each of its commands begins with.
    begins: Vec<String>,
    /// Its clocks say something else after each start.
    clock_jumps: bool,
    volatile: bool,
    starts: AtomicU32,
    program: Mutex<Option<Program>>,
    pub(super) ground: Mutex<Stands>,
}

/// What it stands on.
#[derive(Debug, Default)]
pub(super) struct Stands {
    /// What disk and state are on, if it can lose its power.
    whole: Vec<Volume>,
    disk: Option<Volume>,
    state: Option<Volume>,
    failing: Option<Failing>,
    lost_power: bool,
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Site {
    /// A host that does not run yet. `prepare` makes its image, where it has one.
    pub(super) fn new(
        places: (&Path, &Path),
        side: Side,
        plan: &Plan,
        (ip, cable): (&str, Option<&Cable>),
        prepare: impl FnOnce(&Path),
    ) -> Result<Self, String> {
        let name = side.name();
        let (folder, home) = (places.0.to_owned(), places.1.join(name));
        fs::create_dir_all(&home).map_err(said)?;
        let mut stands = Stands::default();
        let [mut state, mut image] = ["state", "disk.raw"].map(|what| home.join(what));
        let ground = plan.ground(side);
        match ground {
            Ground::Plain | Ground::FailingReads | Ground::FailingWrites(_) => {}
            Ground::Own if no_mounts().is_some() => {}
            Ground::Own | Ground::LosesPower => {
                let mount = home.join("all");
                stands.whole.push(Volume::make(&mount, 160, true)?);
                image = mount.join("disk.raw");
                // On one file system a sync of the record takes much of the disk's data along.
                if plan.seed.is_multiple_of(2) {
                    state = mount.join("state");
                } else {
                    stands.whole.push(Volume::make(&state, 16, true)?);
                }
            }
            Ground::SmallDisk | Ground::ThinDisk => {
                let mount = home.join("disk");
                let volume = match ground {
                    Ground::ThinDisk => Volume::make_thin(&mount, 160, 16)?,
                    _ => Volume::make(&mount, 96, true)?,
                };
                stands.disk = Some(volume);
                image = mount.join("disk.raw");
            }
            Ground::SmallState => stands.state = Some(Volume::make(&state, 1, false)?),
        }
        prepare(&image);
        let mut disk = image.clone();
        let fails = match ground {
            Ground::FailingReads => Some((Fails::Reads, 20)),
            Ground::FailingWrites(percent) => Some((Fails::Writes, percent)),
            _ => None,
        };
        if let Some((fails, percent)) = fails {
            if !image.exists() {
                File::create(&image).and_then(|file| file.set_len(SIZE)).map_err(said)?;
            }
            let failing = Failing::before(&image, fails, percent)?;
            disk = failing.path.clone();
            stands.failing = Some(failing);
        }
        let volatile = blocks_records(&home) && stands.whole.is_empty() && stands.state.is_none();
        Ok(Self {
            name,
            folder,
            state,
            disk,
            image,
            address: format!("tcp://{ip}:7001"),
            listens: AtomicBool::new(side != Side::Source || plan.source_listens),
            begins: cable.map(|cable| cable.at(usize::from(side != Side::Source))).unwrap_or_default(),
            clock_jumps: plan.clocks_jump,
            volatile,
            starts: AtomicU32::new(0),
            program: Mutex::new(None),
            ground: Mutex::new(stands),
        })
    }

    fn unix(&self, what: &str) -> String {
        format!("unix://{}", self.folder.join(format!("{}.{what}", self.name)).display())
    }

    pub(super) fn door(&self) -> Address {
        address(&self.unix("nbd"))
    }

    pub(super) fn control(&self) -> Address {
        address(&self.unix("control"))
    }

    pub(super) fn log_file(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.name))
    }

    fn program(&self) -> MutexGuard<'_, Option<Program>> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stands(&self) -> MutexGuard<'_, Stands> {
        self.ground.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A command of this host, as it is typed there.
    fn typed(&self) -> Command {
        let mut words: Vec<std::ffi::OsString> = self.begins.iter().map(Into::into).collect();
        if self.clock_jumps {
            // Neither host's clocks agree with anybody's, and after a restart not with themselves.
            let jump = 1_000_000 * (1 + u64::from(self.starts.load(Ordering::Relaxed)) * 7 % 5);
            let offsets = [format!("--monotonic={jump}"), format!("--boottime={}", jump * 2)];
            words.extend(["unshare".to_owned(), "--time".to_owned()].into_iter().chain(offsets).map(Into::into));
        }
        let program = blockferry();
        words.push(program.get_program().to_owned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    /// Starts it, always with the same command line. `false`: its power has been lost, and nobody has looked what is
    /// left.
    pub(super) fn start(&self) -> Result<bool, String> {
        let stands = self.stands();
        let mut program = self.program();
        if program.is_some() || stands.lost_power {
            return Ok(program.is_some());
        }
        let mut command = self.typed();
        command.args(["serve", GUEST, "--disk", &format!("{DISK},file={}", self.disk.display())]);
        command.arg("--state").arg(&self.state).args(["--nbd", &self.unix("nbd"), "--control", &self.unix("control")]);
        if self.listens.load(Ordering::Relaxed) {
            command.args(["--listen", &self.address, "--insecure-plaintext"]);
        }
        if self.volatile {
            command.arg("--volatile-state");
        }
        let log = File::options().create(true).append(true).open(self.log_file()).map_err(said)?;
        command.env("BLOCKFERRY_LOG", "debug").stderr(log);
        self.starts.fetch_add(1, Ordering::Relaxed);
        *program = Some(Program::start_until_line(&mut command, ": ready: ").0);
        Ok(true)
    }

    /// SIGKILL. `false`: it was dead.
    pub(super) fn kill(&self) -> bool {
        // Nobody starts it again before it is dead.
        let mut slot = self.program();
        let Some(mut program) = slot.take() else { return false };
        program.kill();
        true
    }

    pub(super) fn is_dead(&self) -> bool {
        self.program().is_none()
    }

    /// Whether it ended without having been killed.
    pub(super) fn has_crashed(&self) -> bool {
        self.program().as_mut().is_some_and(|program| program.ended().is_some())
    }

    /// Processes that it has started.
    pub(super) fn children(&self) -> String {
        let Some(id) = self.program().as_ref().map(Program::id) else { return String::new() };
        fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default()
    }

    /// Kills it and takes the power of its disks in the same moment.
    pub(super) fn lose_power(&self) -> Result<(), String> {
        let mut stands = self.stands();
        self.kill();
        if stands.whole.is_empty() {
            return Err("its disks cannot lose their power".to_owned());
        }
        stands.whole.iter_mut().try_for_each(Volume::lose_power)?;
        stands.lost_power = true;
        Ok(())
    }

    /// Whether its power was lost since somebody asked.
    pub(super) fn has_lost_power(&self) -> bool {
        std::mem::take(&mut self.stands().lost_power)
    }

    /// What the command line says to it.
    pub(super) fn command(&self, words: &[&str]) -> Command {
        let mut command = blockferry();
        command.args([words[0], GUEST]).args(&words[1..]).args(["--control", &self.control().to_string()]);
        command
    }

    pub(super) fn ask(&self, words: &[&str]) -> Finished {
        run(&mut self.command(words), COMMAND)
    }

    /// Who owns, as far as it knows, whether it runs or not.
    pub(super) fn who_owns(&self) -> Standing {
        let told = run(self.command(&["who-owns", "--json"]).arg("--state").arg(&self.state), COMMAND);
        let line = told.stdout.lines().find(|line| line.contains("\"ownership\"")).map(Json::parse);
        let state = line.as_ref().map_or("", |line| line.get("state").text()).to_owned();
        let generation = line.as_ref().map_or(0, |line| line.get("generation").number());
        let said = format!("{}{}", told.stdout, told.stderr).trim_end().to_owned();
        Standing { exit: told.code.unwrap_or(-1), state, generation, said }
    }
}

impl Stands {
    /// Fills the disk, or the place of the record.
    pub(super) fn fill(&self, record: bool) -> Result<(), String> {
        let volume = if record { &self.state } else { &self.disk };
        volume.as_ref().ok_or("nothing that could be full")?.fill()
    }

    /// The record cannot be written any more.
    pub(super) fn freeze_record(&self) -> Result<(), String> {
        self.state.as_ref().ok_or("nothing that could be frozen")?.remount("ro")
    }

    /// The disk fails.
    pub(super) fn fail(&self) -> Result<(), String> {
        self.failing.as_ref().ok_or("nothing that could fail")?.fail()
    }

    /// All of it works again.
    pub(super) fn heal(&self) -> Result<(), String> {
        self.disk.iter().chain(&self.state).for_each(Volume::empty);
        self.failing.iter().for_each(Failing::heal);
        self.state.as_ref().map_or(Ok(()), |volume| volume.remount("rw"))
    }

    /// The disk is replaced by one that is empty. Nobody may use it now.
    pub(super) fn replace_disk(&mut self, mount: &Path) -> Result<(), String> {
        drop(self.disk.take());
        self.disk = Some(Volume::make(mount, 96, true)?);
        Ok(())
    }
}

/// Whether records are refused in a folder without `--volatile-state`.
fn blocks_records(folder: &Path) -> bool {
    const MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x794c_7630];
    rustix::fs::statfs(folder).is_ok_and(|stat| MEMORY.contains(&stat.f_type))
}
