//! What every task needs and none owns: the error, the tree's places, children under a time limit, apt.
//!
//! Every child gets a time limit and is killed with all its descendants when it passes it. Children stay in the
//! caller's process group, so that Ctrl-C ends them too. Nothing here knows what blockferry is.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program that only answers a question (`rustc --print`, `dpkg-query`) may take.
pub(crate) const QUESTION: Duration = Duration::from_secs(60);
/// How long `apt-get update` may take.
const APT_UPDATE: Duration = Duration::from_secs(180);
/// How long `apt-get install` may take.
const APT_INSTALL: Duration = Duration::from_secs(480);

/// What a task returns.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a task ended: one line, `operation: object: cause`, and the exit code that goes with it.
#[derive(Debug)]
pub(crate) struct Error {
    /// 1: the task failed. 2: it was called wrongly.
    pub(crate) exit: u8,
    text: String,
}

impl Error {
    /// The task `operation` failed on `object` because of `cause`.
    pub(crate) fn new(operation: &str, object: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self { exit: 1, text: format!("{operation}: {object}: {cause}") }
    }

    /// The task `operation` was called with an `object` that it does not take.
    pub(crate) fn usage(operation: &str, object: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self { exit: 2, ..Self::new(operation, object, cause) }
    }
}

impl fmt::Display for Error {
    /// One line, whatever the cause contained.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<&str> = self.text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        formatter.write_str(&lines.join(" "))
    }
}

/// Where a child's output goes.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a> {
    /// To this process's own stdout and stderr.
    Shown,
    /// Both streams to the end of this file, below a line that names the command. The error quotes the last line.
    Log(&'a Path),
}

/// Runs `command` for at most `limit` and returns how long it took. A child that cannot be started, passes the limit
/// or ends with anything but 0 is an error of `operation`, whose object is the command itself.
pub(crate) fn run(operation: &str, command: &mut Command, limit: Duration, output: Output<'_>) -> Result<Duration> {
    let object = describe(command);
    if let Output::Log(path) = output {
        let log = open_log(path, &object).map_err(|error| Error::new(operation, path.display(), error))?;
        let twin = log.try_clone().map_err(|error| Error::new(operation, path.display(), error))?;
        command.stdout(log).stderr(twin);
    }
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).spawn().map_err(|error| Error::new(operation, &object, error))?;
    let status = wait(operation, &object, &mut child, limit)?;
    if status.success() {
        return Ok(started.elapsed());
    }
    let cause = match output {
        Output::Shown => status.to_string(),
        Output::Log(path) => format!("{status}: {} (all of it: {})", last_line(path), path.display()),
    };
    Err(Error::new(operation, object, cause))
}

/// What a child said and how it ended.
pub(crate) struct Captured {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Its standard output, without the blanks at its ends.
    pub(crate) stdout: String,
    /// Its standard error, without the blanks at its ends.
    pub(crate) stderr: String,
}

/// Runs `command` for at most `limit` and returns what it printed. Only a child that cannot be started or passes the
/// limit is an error: what its exit code means is the caller's business.
pub(crate) fn capture(operation: &str, command: &mut Command, limit: Duration) -> Result<Captured> {
    let object = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::new(operation, &object, error))?;
    let (stdout, stderr) = (read_aside(child.stdout.take()), read_aside(child.stderr.take()));
    let status = wait(operation, &object, &mut child, limit)?;
    Ok(Captured { status, stdout: stdout.join().unwrap_or_default(), stderr: stderr.join().unwrap_or_default() })
}

/// Reads a pipe to its end in a thread of its own: a child that fills one pipe must not wait for the other.
fn read_aside(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A pipe that breaks has said all that it will; the exit status tells the rest.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).trim().to_owned()
    })
}

/// Waits for `child`; at `limit` kills it and everything it started. std has no wait with a limit: this one looks,
/// first every millisecond, later every 50.
fn wait(operation: &str, object: &str, child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().map_err(|error| Error::new(operation, object, error))? {
            return Ok(status);
        }
        if started.elapsed() >= limit {
            kill_tree(child.id());
            // The child may be gone already; what counts is that it is reaped.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::new(operation, object, format!("still running after {} s, killed", limit.as_secs())));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Kills `root` and all its descendants. A child group of its own would be simpler to kill and deaf to Ctrl-C.
fn kill_tree(root: u32) {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc").map_or_else(
        |_| Vec::new(),
        |entries| entries.flatten().filter_map(|entry| parent_of(&entry.file_name())).collect(),
    );
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&process) = tree.get(next) {
        tree.extend(parents.iter().filter(|(_, parent)| *parent == process).map(|(child, _)| child));
        next += 1;
    }
    let mut kill = Command::new("sh");
    kill.args(["-c", "kill -KILL \"$@\"", "sh"]).args(tree.iter().map(u32::to_string));
    // Processes that ended meanwhile make kill complain, and that is all right.
    let _ = kill.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// (process, its parent) for a name in /proc that is a process. The command's name in `stat` may contain anything, so
/// the fields are counted from its last bracket.
fn parent_of(name: &OsStr) -> Option<(u32, u32)> {
    let process = name.to_str()?.parse().ok()?;
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
    Some((process, parent))
}

/// The program's name and its arguments, cut to what fits a line.
fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    cut(&words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "), 100)
}

/// At most so many columns of a text.
fn cut(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    text.chars().take(columns - 3).chain("...".chars()).collect()
}

/// Opens a log at its end, makes its folder, and writes the command above what will follow.
fn open_log(path: &Path, object: &str) -> std::io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut log = OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(log, "$ {object}")?;
    Ok(log)
}

/// The last line of a file that says something; some tools put a whole story into it.
fn last_line(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    cut(last.unwrap_or("it printed nothing"), 200)
}

/// The root of the tree: the folder of the nearest `Cargo.toml` with a `[workspace]`, from the place that cargo names
/// or, without cargo, from the current folder upwards.
pub(crate) fn root() -> Result<PathBuf> {
    let start = match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_dir().map_err(|error| Error::new("root", "current folder", error))?,
    };
    let is_root = |folder: &&Path| {
        fs::read_to_string(folder.join("Cargo.toml")).is_ok_and(|text| text.lines().any(|line| line == "[workspace]"))
    };
    let found = start.ancestors().find(is_root).map(Path::to_path_buf);
    found.ok_or_else(|| Error::new("root", start.display(), "no Cargo.toml with a [workspace] here or above"))
}

/// Cargo's target directory, as cargo itself sees it (environment and configuration counted).
pub(crate) fn target_dir() -> Result<PathBuf> {
    let mut command = cargo()?;
    let said = capture("build", command.args(["metadata", "--no-deps", "--format-version", "1"]), QUESTION)?;
    let found = json_string(&said.stdout, "target_directory").map(PathBuf::from);
    found.ok_or_else(|| Error::new("build", "cargo metadata", said.stderr))
}

/// The value of the first `"key":"value"` in a JSON text.
fn json_string(text: &str, key: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("\"{key}\":\""))?;
    let mut value = String::new();
    let mut letters = rest.chars();
    loop {
        match letters.next()? {
            '"' => return Some(value),
            '\\' => value.push(letters.next()?),
            letter => value.push(letter),
        }
    }
}

/// The file that a task's noisy children write to: `target/xtask/NAME.log`, emptied by the first call.
pub(crate) fn fresh_log(name: &str) -> Result<PathBuf> {
    let path = target_dir()?.join("xtask").join(format!("{name}.log"));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::new("log", path.display(), error)),
        _ => Ok(path),
    }
}

/// Variables that `cargo run` sets for the program it starts and that another cargo must not take for the user's own.
const OF_CARGO_RUN: [&str; 7] = [
    "CARGO_BIN_NAME",
    "CARGO_CRATE_NAME",
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
    "CARGO_MANIFEST_LINKS",
    "CARGO_PRIMARY_PACKAGE",
    "OUT_DIR",
];

/// The cargo that started us (or the one in `PATH`), in the tree's root, with the user's environment but without what
/// `cargo run` added to it. `RUSTUP_TOOLCHAIN` stays: the child is to use the toolchain that the user chose.
pub(crate) fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()?);
    for (name, _) in std::env::vars_os() {
        let ours = name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || OF_CARGO_RUN.contains(&name));
        if ours {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    // Uid: real, effective, saved, of the file system.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    ids.and_then(|ids| ids.split_whitespace().nth(1)) == Some("0")
}

/// Whether a continuous integration machine runs this: there, what is missing is a failure.
pub(crate) fn is_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// `PATH` with the folders where Debian keeps what only root used to call (`chroot`, `nbd-client`).
pub(crate) fn wide_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")
}

/// Where `program` is, in [`wide_path`].
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    let path = wide_path();
    let mut candidates = std::env::split_paths(&path).map(|folder| folder.join(program));
    candidates
        .find(|file| fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0))
}

/// Which of Debian's `packages` are not installed.
pub(crate) fn missing_packages<'a>(operation: &str, packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status}\n"]).args(packages);
    // It exits with 1 when it does not know one of them, and still prints the others.
    let said = capture(operation, &mut query, QUESTION)?;
    let is_missing = |package: &&&str| !said.stdout.lines().any(|line| line == format!("{package} installed"));
    Ok(packages.iter().filter(is_missing).copied().collect())
}

/// Installs Debian's `packages`, in silence: apt talks to `target/xtask/apt.log`, and the error quotes its last line.
/// Who is not root gets the command to type instead.
pub(crate) fn apt_install(operation: &str, packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if !is_root() {
        return Err(Error::new(operation, &names, format!("not installed: apt-get install {names}")));
    }
    let log = fresh_log("apt")?;
    println!("xtask: {operation}: apt-get install {names}");
    let mut update = apt_get();
    // Lists that are a little old may still do: the installation is the judge.
    let updated = run(operation, update.arg("update"), APT_UPDATE, Output::Log(&log));
    let mut install = apt_get();
    install.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    match run(operation, &mut install, APT_INSTALL, Output::Log(&log)) {
        Ok(_) => Ok(()),
        Err(error) => Err(updated.err().unwrap_or(error)),
    }
}

/// Fetches apt's lists. Only root may.
pub(crate) fn apt_update(operation: &str) -> Result<()> {
    let log = fresh_log("apt")?;
    run(operation, apt_get().arg("update"), APT_UPDATE, Output::Log(&log)).map(drop)
}

/// apt-get that asks nothing, repeats a failed download and waits for another apt to finish.
fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_error_is_one_line() {
        let error = Error::new("build", "rustc", "exit status: 1\n\n  no such target\n");
        assert_eq!(error.to_string(), "build: rustc: exit status: 1 no such target");
        assert_eq!(error.exit, 1);
        assert_eq!(Error::usage("build", "--way", "needs a value").exit, 2);
    }

    #[test]
    fn a_failing_child_is_named_with_its_exit_status() {
        let error = run("test", &mut shell("exit 3"), QUESTION, Output::Shown).expect_err("it exits with 3");
        assert_eq!(error.to_string(), "test: sh -c exit 3: exit status: 3");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run("test", &mut Command::new("/no/such-program"), QUESTION, Output::Shown).expect_err("not there");
        assert_eq!(error.to_string(), "test: such-program: No such file or directory (os error 2)");
    }

    #[test]
    fn what_is_too_long_is_cut() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdéfg", 6), "abc...");
    }

    #[test]
    fn the_last_line_of_a_log_is_quoted() {
        let log = std::env::temp_dir().join(format!("xtask-log-{}", std::process::id()));
        let failing = "echo first; echo the reason >&2; echo; exit 1";
        let error = run("apt", &mut shell(failing), QUESTION, Output::Log(&log)).expect_err("it exits with 1");
        let text = fs::read_to_string(&log).expect("the log is there");
        fs::remove_file(&log).expect("the log can go");
        assert!(error.to_string().contains("exit status: 1: the reason (all of it:"), "{error}");
        assert_eq!(text, format!("$ sh -c {failing}\nfirst\nthe reason\n\n"));
    }

    #[test]
    fn a_child_over_its_limit_is_killed_with_its_descendants() {
        let limit = Duration::from_millis(300);
        let started = Instant::now();
        // Both sleepers hold the pipe: had one survived, capture's reader would not come back before a minute.
        let error = capture("test", &mut shell("sleep 60 & sleep 60; true"), limit).err().expect("over its limit");
        assert!(error.to_string().ends_with("still running after 0 s, killed"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn both_streams_are_captured_however_long() {
        let script = "head -c 300000 /dev/zero | tr '\\0' e >&2; head -c 300000 /dev/zero | tr '\\0' o; exit 4";
        let said = capture("test", &mut shell(script), QUESTION).expect("it runs");
        assert_eq!((said.stdout.len(), said.stderr.len(), said.status.code()), (300_000, 300_000, Some(4)));
    }

    #[test]
    fn a_value_is_found_in_json() {
        let text = r#"{"packages":[],"target_directory":"/a \"b\"/target","version":1}"#;
        assert_eq!(json_string(text, "target_directory").as_deref(), Some("/a \"b\"/target"));
        assert_eq!(json_string(text, "nothing"), None);
        assert_eq!(json_string(r#"{"target_directory":"/cut"#, "target_directory"), None);
    }

    #[test]
    fn programs_are_found_and_missed() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }

    #[test]
    fn the_root_has_the_workspace() {
        assert!(root().expect("there is a root").join("xtask/Cargo.toml").is_file());
    }
}
