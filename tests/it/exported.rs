//! `blockferry export` as a test sees it: the process, its doors, and what can be seen of it from outside.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use blockferry::socket::Socket;

use crate::harness::{Program, blockferry, scratch, until};

/// A running `blockferry export` with a Unix door and a TCP door. When the test is done with it, it must still run, and
/// its log must not tell of a bug.
pub(crate) struct Exported {
    program: Program,
    folder: tempfile::TempDir,
    port: u16,
}

impl Exported {
    /// Starts it with these files and options, and waits until it is ready.
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let folder = scratch();
        let unix = format!("unix://{}", folder.path().join("nbd.sock").display());
        let mut command = blockferry();
        command.arg("export").args(arguments).args(["--log", "info", "--nbd", &unix, "--nbd", "tcp://127.0.0.1:0"]);
        command.stderr(File::create(folder.path().join("log")).expect("a file for the log"));
        let (program, line) = Program::start_until_line(&mut command, ": ready: ");
        let (beginning, port) = line.rsplit_once(':').expect("an address");
        assert_eq!(beginning, format!("blockferry: export: ready: nbd={unix} nbd=tcp://127.0.0.1"));
        Self { program, folder, port: port.parse().expect("a port") }
    }

    /// The Unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// The TCP port on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The URI of an export at the Unix door.
    pub(crate) fn unix(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// The URI of an export at the TCP door.
    pub(crate) fn tcp(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }

    /// A connection to the Unix door.
    pub(crate) fn connect(&self) -> Arc<Socket> {
        Arc::new(Socket::new(UnixStream::connect(self.socket()).expect("the Unix door is open").into()))
    }

    /// A connection to the TCP door.
    pub(crate) fn connect_tcp(&self) -> Arc<Socket> {
        Arc::new(Socket::new(TcpStream::connect(("127.0.0.1", self.port)).expect("the TCP door is open").into()))
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.program.id()
    }

    /// What it has said on stderr.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).expect("the log")
    }

    /// The most memory that it has ever had, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.status("VmHWM:") * 1024
    }

    /// Waits until nobody is connected: it is down to the threads that it had when it was ready.
    pub(crate) fn wait_until_alone(&self) {
        // One for each door, and the first.
        until("end of all connections", || (self.status("Threads:") == 3).then_some(()));
    }

    /// A number from the kernel's account of it.
    fn status(&self, name: &str) -> u64 {
        let text = fs::read_to_string(Path::new("/proc").join(self.program.id().to_string()).join("status"));
        let text = text.expect("its status");
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("that line");
        line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the export's log:\n{}", self.log());
            return;
        }
        let ended = self.program.ended();
        let log = self.log();
        assert!(ended.is_none() && !log.contains("internal error"), "ended: {ended:?}, log:\n{log}");
    }
}
