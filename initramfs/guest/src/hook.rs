//! A stand-in for a VMM whose guest's disk is /dev/nbd0, and the program that blockferry calls for it
//! (`--vmm hook:/bin/testguest`, docs/hooks.md).
//!
//! The guest is the [`Writer`], its memory the number of its next write, and so much noise that it takes its time. The
//! program only carries: the point, and the state on its standard input or output, to the process that [`Vmm`] is part
//! of, and the exit code back.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::process;
use crate::writer::{Writer, mix};

/// Where the two meet.
const SOCKET: &str = "/run/testguest.sock";
/// The guest's disk and its device.
const DISK: [&str; 2] = ["vda", "/dev/nbd0"];
/// Words of noise in a guest's state: 4 MiB.
const NOISE: u64 = (4 << 20) / 8;

/// The VMM.
#[derive(Default)]
pub(crate) struct Vmm {
    /// Its guest, running or paused.
    pub(crate) writer: Option<Writer>,
    /// A guest that was loaded and does not run: its seed, and how many writes it had issued.
    loaded: Option<(u64, u64)>,
    /// The point at which it fails next.
    pub(crate) fails: Option<String>,
}

pub(crate) fn lock(vmm: &Mutex<Vmm>) -> MutexGuard<'_, Vmm> {
    vmm.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- the program ----

/// Is called at a point of a migration.
pub(crate) fn call(point: &str) -> ExitCode {
    match ask(point) {
        Ok(code) => ExitCode::from(code),
        Err(cause) => {
            eprintln!("testguest: {point}: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn ask(point: &str) -> Result<u8, String> {
    let fail = |error: std::io::Error| error.to_string();
    let told = |name: &str| std::env::var(format!("BLOCKFERRY_{name}")).unwrap_or_default();
    let controls = told("CONTROL");
    let control = controls.split(' ').find(|address| address.starts_with("unix://")).unwrap_or("-");
    let mut vmm = UnixStream::connect(SOCKET).map_err(fail)?;
    let line = format!("{point} {} {} {control}\n", told("SIDE"), told("GUEST"));
    vmm.write_all(line.as_bytes()).map_err(fail)?;
    if point == "state-in" {
        std::io::copy(&mut std::io::stdin(), &mut vmm).map_err(fail)?;
    }
    vmm.shutdown(Shutdown::Write).map_err(fail)?;
    let mut code = [0];
    vmm.read_exact(&mut code).map_err(fail)?;
    let copied = match code {
        [0] => std::io::copy(&mut vmm, &mut std::io::stdout()),
        _ => std::io::copy(&mut vmm, &mut std::io::stderr()),
    };
    copied.map_err(fail)?;
    Ok(code[0])
}

// ---- the VMM ----

impl Vmm {
    /// A VMM without a guest, which the program finds.
    pub(crate) fn listening() -> Arc<Mutex<Self>> {
        let vmm = Arc::new(Mutex::new(Self::default()));
        let ours = Arc::clone(&vmm);
        match UnixListener::bind(SOCKET) {
            Ok(listener) => {
                thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(|call| answer(&ours, call)));
            }
            Err(error) => eprintln!("testguest: {SOCKET}: {error}"),
        }
        vmm
    }

    /// What it does at a point; what goes to the program's standard output.
    fn at(&mut self, words: &[&str], state: &[u8]) -> Result<Vec<u8>, String> {
        let &[point, side, guest, control] = words else { return Err("is no point".to_owned()) };
        if self.fails.take_if(|fails| fails == point).is_some() {
            return Err("was told to fail".to_owned());
        }
        match point {
            "ready" if side == "source" => drop(self.guest()?.count()),
            "stop" => drop(self.guest()?.pause()?),
            "state-out" => return Ok(pack(self.guest()?.memory())),
            "state-in" => self.loaded = Some(unpack(state)?),
            "run" if self.writer.is_none() => {
                let (seed, issued) = self.loaded.take().ok_or("no guest was loaded")?;
                let [disk, device] = DISK;
                let said = process::run(&["/init", "attach", guest, disk, device, "--control", control])?;
                if !said.starts_with("exit=0") {
                    return Err(said);
                }
                crate::wait_for(device)?;
                self.writer = Some(Writer::start_after(device, seed, issued)?);
            }
            "abort" if side == "source" => self.guest()?.go_on(),
            "abort" => self.loaded = None,
            "gone" => drop(self.writer.take().map(Writer::stop)),
            _ => {}
        }
        Ok(Vec::new())
    }

    fn guest(&self) -> Result<&Writer, String> {
        self.writer.as_ref().ok_or_else(|| "there is no guest".to_owned())
    }
}

/// Answers one call of the program.
fn answer(vmm: &Mutex<Vmm>, mut call: UnixStream) {
    let mut said = Vec::new();
    if call.read_to_end(&mut said).is_err() {
        return;
    }
    let end = said.iter().position(|byte| *byte == b'\n').unwrap_or(said.len());
    let (line, state) = said.split_at(end);
    let line = String::from_utf8_lossy(line).into_owned();
    let words: Vec<&str> = line.split(' ').collect();
    let answer = lock(vmm).at(&words, state.get(1..).unwrap_or_default());
    let answer = match answer {
        Ok(state) => [vec![0], state].concat(),
        Err(cause) => [b"\x01testguest: ", cause.as_bytes(), b"\n"].concat(),
    };
    let _ = call.write_all(&answer);
}

/// A guest's state.
fn pack((seed, issued): (u64, u64)) -> Vec<u8> {
    let noise = (0..NOISE).map(|at| mix(seed ^ mix(issued ^ mix(at))));
    [seed, issued].into_iter().chain(noise).flat_map(u64::to_le_bytes).collect()
}

/// What is in a state, if nothing of it is missing or wrong.
fn unpack(state: &[u8]) -> Result<(u64, u64), String> {
    let word = |at: usize| Some(u64::from_le_bytes(state.get(at..at + 8)?.try_into().ok()?));
    match (word(0), word(8)) {
        (Some(seed), Some(issued)) if pack((seed, issued)) == state => Ok((seed, issued)),
        _ => Err(format!("{} bytes of state are not what was sent", state.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_is_cut_or_wrong_is_not_loaded() {
        let mut state = pack((3, 99));
        assert_eq!(unpack(&state), Ok((3, 99)));
        unpack(&state[..state.len() - 1]).expect_err("cut");
        unpack(&[]).expect_err("nothing");
        state[1 << 20] ^= 1;
        unpack(&state).expect_err("wrong");
    }
}
