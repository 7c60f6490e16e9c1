//! The steward: what has to be done before the command can run, and the last word after it. The keeper starts it.
//!
//! Everything that is read here comes from outside: the kernel's command line, fw_cfg, the lists in the image. What is
//! wrong is one line on the console, and the machine ends as it was told to.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::process::ExitCode;

use super::ending::{Outcome, Verdict};
use super::parameters::{self, Parameters};
use super::supervise::{self, Plan};
use super::{modules, mounts, network, report, words};
use crate::error::{Problem, reason};
use crate::limits::INIT_TEXT_MAX;

/// The kernel's command line.
const CMDLINE: &str = "/proc/cmdline";
/// QEMU's `-fw_cfg name=opt/blockferry/args,...`.
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/blockferry/args/raw";
/// The image's companions: a program and its arguments in each line. `#` begins a comment.
const COMPANIONS: &str = "/etc/blockferry/start";

/// Boots, runs the command, says how it ended, and returns what the keeper is to do then.
pub(super) fn run() -> ExitCode {
    report::begin();
    // What a companion leaves behind comes here, so that the end can wait for everybody. Without it the keeper reaps.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let line = read(CMDLINE).unwrap_or_default();
    let mut verdict =
        Verdict { outcome: Outcome::Exit(0), starts: 0, end: parameters::end_of(line.as_deref().unwrap_or_default()) };
    match boot(line.as_deref()) {
        Ok((wanted, plan)) => {
            (verdict.outcome, verdict.starts) = supervise::run(&plan);
            mounts::release(&wanted.mounts);
        }
        Err(problem) => {
            report::problem(&problem);
            verdict.outcome = Outcome::Exit(problem.exit.code());
        }
    }
    report::silence_the_kernel();
    report::result(&verdict);
    ExitCode::from(verdict.end.code())
}

/// From the kernel's command line to what is to be run. The command does not run without the addresses and mounts that
/// it was to have: a record on a disk that is not there would be no record.
fn boot(line: Option<&[u8]>) -> Result<(Parameters, Plan), Problem> {
    let line = line.ok_or_else(|| Problem::fatal("init", CMDLINE, "is not there"))?;
    let mut wanted = parameters::parse(line)?;
    modules::load();
    if let Err(problem) = network::loopback() {
        report::warning(format_args!("{}: {}", problem.object, problem.cause));
    }
    for address in &wanted.addresses {
        network::configure(address)?;
        report::info(format_args!("{}: {}/{}", address.interface, address.address, address.prefix));
    }
    let mut mounted = Vec::new();
    for mount in std::mem::take(&mut wanted.mounts) {
        if let Err(problem) = mounts::wanted(&mount) {
            mounts::release(&mounted);
            return Err(problem);
        }
        report::info(format_args!("{} is mounted at {}", mount.device, mount.directory));
        mounted.push(mount);
    }
    wanted.mounts = mounted;
    let plan = plan(&mut wanted);
    if plan.is_err() {
        mounts::release(&wanted.mounts);
    }
    Ok((wanted, plan?))
}

/// The command and the companions: fw_cfg's command before the kernel's, the image's companions before the kernel's.
fn plan(wanted: &mut Parameters) -> Result<Plan, Problem> {
    let of_kernel = wanted.command.take();
    let command = match read(FW_CFG).map_err(|error| Problem::fatal("init", FW_CFG, reason(&error)))? {
        Some(text) => {
            if of_kernel.is_some_and(|words| !words.is_empty()) {
                report::notice(format_args!(
                    "fw_cfg says what to run; what the kernel's command line says does not count"
                ));
            }
            words::split(&text).map_err(|cause| Problem::usage("init", "opt/blockferry/args", cause))?
        }
        None => of_kernel.unwrap_or_default(),
    };
    let text = read(COMPANIONS).map_err(|error| Problem::fatal("init", COMPANIONS, reason(&error)))?;
    let mut companions = listed(&text.unwrap_or_default())?;
    companions.append(&mut wanted.start);
    Ok(Plan { command, companions, restart: wanted.restart })
}

/// The companions of a list.
fn listed(text: &[u8]) -> Result<Vec<Vec<String>>, Problem> {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let companion = |line| parameters::companion(line).map_err(|cause| Problem::usage("init", COMPANIONS, cause));
    lines.filter(|line| !line.is_empty()).map(companion).collect()
}

/// A whole small file; `None` when there is none.
fn read(path: &str) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        result => result?,
    };
    let mut text = Vec::new();
    file.take(u64::try_from(INIT_TEXT_MAX + 1).unwrap_or(u64::MAX)).read_to_end(&mut text)?;
    if text.len() > INIT_TEXT_MAX {
        return Err(io::Error::other(format!("is longer than {INIT_TEXT_MAX} bytes")));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_lines_of_an_absolute_path_and_arguments() {
        let list = listed(b"# the VMM\n/bin/vmm --disk /dev/nbd0 # its disk\n\n  /bin/other\n").expect("a good list");
        assert_eq!(list, [vec!["/bin/vmm", "--disk", "/dev/nbd0"], vec!["/bin/other"]]);
        let problem = listed(b"/bin/vmm\nvmm\n").expect_err("no path");
        assert_eq!(problem.to_string(), "blockferry: init: /etc/blockferry/start: 'vmm' is no absolute path");
    }

    #[test]
    fn what_is_read_is_bounded_and_may_be_missing() {
        assert_eq!(read("/no/such/file").expect("missing"), None);
        assert!(read("/proc/self/cmdline").expect("readable").is_some_and(|text| !text.is_empty()));
        let error = read("/dev/zero").expect_err("it has no end");
        assert_eq!(error.to_string(), format!("is longer than {INIT_TEXT_MAX} bytes"));
    }
}
