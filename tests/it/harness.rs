//! What every integration test needs: peer programs, children that end with the test, sockets, waits with a deadline.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockferry::socket::Socket;

/// Longest wait for a program to be ready, or to end.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Finds a peer program. Without it the test is skipped with a line that says so, or fails where
/// `BLOCKFERRY_REQUIRE_PEERS=1` says that nothing may be skipped.
///
/// Use: `let Some(nbdkit) = peer("nbdkit") else { return };`
#[must_use]
pub(crate) fn peer(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(sbin).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        assert!(std::env::var("BLOCKFERRY_REQUIRE_PEERS").as_deref() != Ok("1"), "{name} is missing");
        eprintln!("SKIP: {name} missing");
    }
    found
}

/// An empty directory that goes away with the test.
#[must_use]
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("blockferry-it-").tempdir().expect("a temporary directory")
}

/// Calls `ready` until it gives something, at most until the deadline.
pub(crate) fn until<T>(what: &str, ready: impl FnMut() -> Option<T>) -> T {
    until_within(DEADLINE, what, ready)
}

/// The same with a deadline of its own.
pub(crate) fn until_within<T>(limit: Duration, what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "no {what} within {limit:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Looks for `time` whether something holds all the while: for what must *not* happen.
pub(crate) fn throughout(time: Duration, mut look: impl FnMut()) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        look();
        thread::sleep(Duration::from_millis(5));
    }
}

/// Lets so much time pass: for what is to happen at a time, never for what is waited for.
pub(crate) fn pause(time: Duration) {
    if !time.is_zero() {
        thread::sleep(time);
    }
}

/// A port on loopback that was free a moment ago.
#[must_use]
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// A child process that is killed, by its own id, when the test is done with it.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    name: String,
}

impl Program {
    /// Starts `command` with nothing on its standard input.
    #[must_use]
    pub(crate) fn start(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| panic!("starting {name}: {error}"));
        Self { child, name }
    }

    /// Starts `command` and returns it with the first line of its standard output that contains `ready`.
    #[must_use]
    pub(crate) fn start_until_line(command: &mut Command, ready: &'static str) -> (Self, String) {
        let mut program = Self::start(command.stdout(Stdio::piped()));
        let output = program.child.stdout.take().expect("its standard output");
        let (sender, receiver) = std::sync::mpsc::channel();
        // Reads on afterwards, so that the program never blocks on a full pipe.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if line.contains(ready) {
                    let _ = sender.send(line);
                }
            }
        });
        let line = receiver.recv_timeout(DEADLINE);
        let line = line.unwrap_or_else(|_| panic!("{} did not say \"{ready}\" within {DEADLINE:?}", program.name));
        (program, line)
    }

    /// The process id.
    #[must_use]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("asking for a child")
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let name = self.name.clone();
        until(&format!("end of {name}"), || self.ended())
    }

    /// Kills it now, as a power cut would.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it listens at the Unix socket `path`, which is there a moment before. Is no client: some programs
    /// serve only one.
    pub(crate) fn until_listens(&mut self, path: &Path) {
        /// Among the flags of a socket: it accepts connections.
        const ACCEPTS: &str = "00010000";
        let path = path.display().to_string();
        until(&format!("listener at {path}"), || {
            assert!(self.ended().is_none(), "{} has ended", self.name);
            let sockets = std::fs::read_to_string("/proc/net/unix").expect("the kernel's list");
            let mut lines = sockets.lines().map(|line| line.split_whitespace());
            lines.any(|mut fields| fields.nth(3) == Some(ACCEPTS) && fields.last() == Some(&path)).then_some(())
        });
    }

    /// Connects to the Unix socket where it listens, as soon as it does.
    #[must_use]
    pub(crate) fn connect_unix(&mut self, path: &Path) -> Arc<Socket> {
        let what = format!("listener at {}", path.display());
        let stream = until(&what, || {
            assert!(self.ended().is_none(), "{} has ended", self.name);
            UnixStream::connect(path).ok()
        });
        Arc::new(Socket::new(stream.into()))
    }

    /// Connects to the loopback port where it listens, as soon as it does.
    #[must_use]
    pub(crate) fn connect_tcp(&mut self, port: u16) -> Arc<Socket> {
        let stream = until(&format!("listener at port {port}"), || {
            assert!(self.ended().is_none(), "{} has ended", self.name);
            TcpStream::connect(("127.0.0.1", port)).ok()
        });
        Arc::new(Socket::new(stream.into()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The executable under test: `$BLOCKFERRY_BIN`, else the one that was built with these tests.
#[must_use]
pub(crate) fn blockferry() -> Command {
    let built = || env!("CARGO_BIN_EXE_blockferry").into();
    let mut command = Command::new(std::env::var_os("BLOCKFERRY_BIN").unwrap_or_else(built));
    command.env_remove("BLOCKFERRY_LOG").env_remove("NOTIFY_SOCKET");
    command
}

/// Runs a program to its end, and gives what it said. One that goes on after `limit` is killed, and the test fails.
#[must_use]
pub(crate) fn output_within(limit: Duration, command: &mut Command) -> Output {
    let mut program = Program::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    // Read at once, so that the program never blocks on a full pipe.
    let stdout = program.child.stdout.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    let stderr = program.child.stderr.take().map(|pipe| thread::spawn(move || read_all(pipe)));
    let said = |pipe: Option<thread::JoinHandle<Vec<u8>>>| pipe.and_then(|pipe| pipe.join().ok()).unwrap_or_default();
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = program.ended() {
            return Output { status, stdout: said(stdout), stderr: said(stderr) };
        }
        if Instant::now() > deadline {
            program.kill();
            let (stdout, stderr) = (said(stdout), said(stderr));
            let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
            panic!("{command:?} goes on after {limit:?}\nstdout: {stdout}\nstderr: {stderr}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// [`output_within`] the deadline.
#[must_use]
pub(crate) fn output(command: &mut Command) -> Output {
    output_within(DEADLINE, command)
}

fn read_all(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    bytes
}
