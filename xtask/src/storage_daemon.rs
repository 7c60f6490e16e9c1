//! Two qemu-storage-daemons, the source's exports a disk and mirrors it to the other's over TCP: what one would take
//! instead of our mirror.
//!
//! `bench_copy` and `bench_latency` call it. They own nothing and hand nothing over; the guest stays where it is.

use crate::bench::Bench;
use crate::demo_host::Program;
use crate::demo_image;
use crate::qmp::Qmp;
use crate::util::{self, Error, Result};
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const PEER: &str = "qemu-storage-daemon";
/// How long the destination may take to listen.
const START: Duration = Duration::from_secs(10);
/// How long a cancelled mirror may take to end.
const CANCEL: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

/// Both of them.
pub(crate) struct Daemons {
    pub(crate) source: Program,
    pub(crate) destination: Program,
    /// Where the source exports the disk, as `vda`.
    pub(crate) door: PathBuf,
    pub(crate) monitor: Monitor,
}

/// The source's.
pub(crate) struct Monitor {
    qmp: Qmp,
}

impl Daemons {
    /// Starts both. The destination's image is made, as long as the source's.
    pub(crate) fn start(bench: &Bench, images: &[PathBuf; 2]) -> Result<Self> {
        let fault = |place: &Path, error: std::io::Error| Error::new("bench", place.display(), error);
        let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = listener.map_err(|error| Error::new("bench", PEER, error))?.port();
        let size = fs::metadata(&images[0]).map_err(|error| fault(&images[0], error))?.len();
        let made = File::create_new(&images[1]).and_then(|file| file.set_len(size));
        made.map_err(|error| fault(&images[1], error))?;
        let [door, monitor] = ["qsd.nbd", "qsd.qmp"].map(|name| bench.scratch.path(name));
        for socket in [&door, &monitor] {
            // Left by the run before.
            let _ = fs::remove_file(socket);
        }
        let server = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}");
        let mut destination = daemon(bench, &images[1], &server);
        let destination = Program::start(&bench.scratch, PEER, &mut destination, &bench.log)?;
        let mut source = daemon(bench, &images[0], &format!("addr.type=unix,addr.path={}", door.display()));
        source.arg("--chardev").arg(format!("socket,id=m,server=on,wait=off,path={}", monitor.display()));
        source.args(["--monitor", "chardev=m"]);
        let mut source = Program::start(&bench.scratch, PEER, &mut source, &bench.log)?;
        source.listens(&door)?;
        let deadline = Instant::now() + START;
        while TcpStream::connect(("127.0.0.1", port)).is_err() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        let mut qmp = Qmp::open(PEER, &monitor)?;
        let server = format!(r#"{{"type":"inet","host":"127.0.0.1","port":"{port}"}}"#);
        let target =
            format!(r#"{{"driver":"nbd","node-name":"target","export":"vda","discard":"unmap","server":{server}}}"#);
        qmp.command(&format!(r#"{{"execute":"blockdev-add","arguments":{target}}}"#))?;
        Ok(Self { source, destination, door, monitor: Monitor { qmp } })
    }
}

impl Monitor {
    /// Begins to copy everything, with this `copy-mode`.
    pub(crate) fn mirror(&mut self, mode: &str) -> Result<()> {
        let job = format!(r#"{{"job-id":"j","device":"vda","target":"target","sync":"full","copy-mode":"{mode}"}}"#);
        self.qmp.command(&format!(r#"{{"execute":"blockdev-mirror","arguments":{job}}}"#)).map(drop)
    }

    /// Whether everything is copied once.
    pub(crate) fn is_ready(&mut self) -> Result<bool> {
        Ok(self.jobs()?.contains("\"ready\": true"))
    }

    /// Ends it.
    pub(crate) fn cancel(&mut self) -> Result<()> {
        self.qmp.command(r#"{"execute":"block-job-cancel","arguments":{"device":"j","force":true}}"#)?;
        let deadline = Instant::now() + CANCEL;
        while self.jobs()?.contains("\"device\"") {
            if Instant::now() > deadline {
                return Err(Error::new("bench", PEER, "a cancelled mirror does not end"));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn jobs(&mut self) -> Result<String> {
        self.qmp.ask("query-block-jobs")
    }
}

/// Half of the disk is holes.
pub(crate) fn fresh(bench: &Bench, names: [&str; 2], mib: usize) -> Result<[PathBuf; 2]> {
    let images = names.map(|name| bench.scratch.path(name));
    for image in &images {
        // From the run before.
        let _ = fs::remove_file(image);
    }
    demo_image::make(&images[0], mib).map_err(|error| Error::new("bench", images[0].display(), error))?;
    Ok(images)
}

/// A storage daemon that exports `image` as vda.
fn daemon(bench: &Bench, image: &Path, server: &str) -> Command {
    let mut command = Command::new(util::find_program(PEER).unwrap_or_else(|| PEER.into()));
    command.current_dir(bench.scratch.path("")).stdout(Stdio::null());
    command.arg("--blockdev").arg(format!("driver=file,node-name=f,discard=unmap,filename={}", image.display()));
    command.args(["--blockdev", "driver=raw,node-name=vda,discard=unmap,file=f", "--nbd-server", server]);
    command.args(["--export", "type=nbd,id=e,node-name=vda,name=vda,writable=on"]);
    command
}
