//! Every system call that the executable makes, what it makes it for, and what it does where the call is missing.

use std::collections::BTreeMap;

/// A call that is allowed.
pub(super) struct Call {
    pub(super) name: &'static str,
    /// The kernel that brought it, or the newest part of it that is used; empty for what Linux 2.6 had.
    since: &'static str,
    what_for: &'static str,
    /// How it goes on without the call; empty where it cannot.
    without: &'static str,
    /// With which errors a kernel or a file system says that it is missing: what the tests have it fail with.
    pub(super) errors: &'static [&'static str],
}

impl Call {
    /// Whether there is another way.
    pub(super) fn may_be_missing(&self) -> bool {
        !self.errors.is_empty()
    }

    /// Whether nothing is lost with it but time: a test cannot make sure that it is given.
    pub(super) fn is_hint(&self) -> bool {
        self.name == "fadvise64"
    }
}

/// A call that every kernel in use has.
const fn old(name: &'static str, what_for: &'static str) -> Call {
    Call { name, since: "", what_for, without: "", errors: &[] }
}

/// A younger one, without which nothing goes.
const fn needed(name: &'static str, since: &'static str, what_for: &'static str) -> Call {
    Call { name, since, what_for, without: "", errors: &[] }
}

const MISSING: &[&str] = &["ENOSYS"];
const NOT_SUPPORTED: &[&str] = &["ENOSYS", "EOPNOTSUPP", "EINVAL"];

/// By what they are for.
pub(super) const KNOWN: &[Call] = &[
    // Newer than the oldest kernel that works: each has another way.
    Call {
        name: "preadv2",
        since: "4.14 (RWF_NOWAIT)",
        what_for: "reads what is in the page cache without waiting",
        without: "every read goes the ordinary way",
        errors: NOT_SUPPORTED,
    },
    Call {
        name: "statx",
        since: "4.11",
        what_for: "an image's time of birth",
        without: "an image is known by its inode alone",
        errors: &["ENOSYS", "EPERM"],
    },
    Call {
        name: "splice",
        since: "2.6.17",
        what_for: "long reads over a Unix socket without a copy",
        without: "they are copied",
        errors: NOT_SUPPORTED,
    },
    Call {
        name: "getrandom",
        since: "3.17",
        what_for: "host, instance and attempt ids, challenges",
        without: "reads /dev/urandom, which must be there",
        errors: MISSING,
    },
    Call {
        name: "fallocate",
        since: "3.15 (ZERO_RANGE), 2.6.38 (PUNCH_HOLE)",
        what_for: "trim, write zeroes",
        without: "writes zeroes out; trim does nothing",
        errors: NOT_SUPPORTED,
    },
    Call {
        name: "fadvise64",
        since: "",
        what_for: "read-ahead; drops what was read for nothing",
        without: "nothing is advised",
        errors: MISSING,
    },
    // The floor.
    needed("lseek", "3.1 (SEEK_DATA)", "extents of an image; size of a block device"),
    needed("accept4", "2.6.28", "takes connections"),
    needed("pwritev", "2.6.30", "writes zeroes out"),
    needed("preadv", "2.6.30", "reads images"),
    needed("pipe2", "2.6.27", "pipes of the standard library; long reads"),
    // Images and the record.
    old("pread64", "reads images"),
    old("pwrite64", "writes images"),
    old("fdatasync", "flush, FUA"),
    old("fsync", "the record, and the names of what was created"),
    old("ftruncate", "size of an image that PREPARE creates"),
    old("flock", "one process per image, per record, per socket"),
    old("rename", "the record's commit; an atomic exchange of files"),
    old("unlink", "stale sockets; images of an attempt that ended"),
    old("mkdir", "the state folder"),
    old("rmdir", "folders of an attempt that ended"),
    old("getdents64", "what the state folder holds"),
    old("open", "images, the record, /proc and /sys"),
    old("openat", "images, the record, /proc and /sys"),
    old("close", "images, sockets"),
    old("read", "the record, /proc and /sys; a command's input"),
    old("write", "the record; what is printed"),
    old("writev", "what is printed"),
    old("readv", "what is read by the standard library"),
    old("readlink", "/proc/self, /sys"),
    old("fcntl", "locks against QEMU; close-on-exec; the room of a pipe"),
    old("ioctl", "whether the output is a terminal"),
    old("stat", "what a path is"),
    old("lstat", "what a path is"),
    old("fstat", "size and identity of an image"),
    old("newfstatat", "what a path is"),
    old("statfs", "room for an image; whether the state folder outlives a reboot"),
    old("fstatfs", "room for an image; whether it lives in memory"),
    old("access", "whether a path is there, whether a file can be made"),
    old("faccessat", "the same, where there is no access"),
    old("fchmod", "who may open a socket or the record"),
    old("umask", "who may open what is created"),
    old("getuid", "whose process this is"),
    old("geteuid", "whose process this is"),
    old("uname", "the host's name"),
    // Connections.
    old("socket", "doors, and connections to the other host"),
    old("socketpair", "ends a wait from another thread"),
    old("bind", "doors"),
    old("listen", "doors"),
    old("connect", "the other host; the control door"),
    old("getsockname", "the port that a door got; who is at the other end"),
    old("getpeername", "who is at the other end"),
    old("getsockopt", "how a connection attempt ended; of what kind a socket is"),
    old("setsockopt", "TCP_NODELAY, timeouts, keep-alive, send buffer"),
    old("sendto", "NBD, phases, control"),
    old("sendmsg", "NBD: header and payload at once"),
    old("recvfrom", "NBD, phases, control"),
    old("recvmsg", "NBD: header and payload at once"),
    old("shutdown", "ends a connection that another thread waits on"),
    old("poll", "the standard library's start: 0, 1, 2 are open"),
    old("ppoll", "waits with a deadline"),
    // Memory, threads, start and end.
    old("mmap", "buffers, stacks"),
    old("munmap", "buffers, stacks"),
    old("mremap", "buffers that grow"),
    old("mprotect", "guard pages of stacks"),
    old("madvise", "memory given back"),
    old("brk", "small memory"),
    old("clone", "threads"),
    old("futex", "locks, threads that wait for each other"),
    old("set_robust_list", "threads"),
    old("set_tid_address", "threads"),
    old("gettid", "threads"),
    old("getpid", "the process's own id"),
    old("getppid", "whether it was started by our own PID 1"),
    old("tkill", "threads"),
    old("prctl", "names of threads"),
    old("sched_getaffinity", "how many processors there are"),
    old("sched_yield", "locks"),
    old("sigaltstack", "a stack that overflows says so"),
    old("rt_sigaction", "a stack that overflows says so; SIGPIPE is ignored"),
    old("rt_sigprocmask", "threads"),
    old("rt_sigreturn", "signals"),
    old("restart_syscall", "the kernel's own, after a stop"),
    old("nanosleep", "waits"),
    old("clock_nanosleep", "waits"),
    old("clock_gettime", "deadlines, where the kernel's page for it is missing"),
    old("arch_prctl", "thread-local memory"),
    old("execve", "the start"),
    old("exit", "ends of threads"),
    old("exit_group", "the end"),
];

/// Whether the table knows a call.
pub(super) fn is_known(name: &str) -> bool {
    KNOWN.iter().any(|call| call.name == name)
}

/// Counts by name, of what `strace -c -U calls,name` writes.
pub(super) fn counts(text: &str) -> BTreeMap<String, u64> {
    let rows = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (count, name) = (words.next()?.parse().ok()?, words.next()?);
        (name != "total").then(|| (name.to_owned(), count))
    });
    rows.collect()
}

/// The page's table: a row for each call that was made, those that may be missing first.
pub(super) fn table(sides: &[BTreeMap<String, u64>; 4]) -> String {
    let mut text = String::from(
        "| call | source | destination | migrate | export | since | what for | without it |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let made = |call: &&Call| sides.iter().any(|side| side.contains_key(call.name));
    for call in KNOWN.iter().filter(|call| made(call) || call.may_be_missing()) {
        let counts = sides.each_ref().map(|side| side.get(call.name).map_or("-".to_owned(), u64::to_string));
        let (name, counts) = (call.name, counts.join(" | "));
        text += &format!("| {name} | {counts} | {} | {} | {} |\n", call.since, call.what_for, call.without);
    }
    text
}

const BEGIN: &str = "<!-- cargo xtask syscalls writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// The page with another table.
pub(super) fn put(page: &str, table: &str) -> String {
    let (before, rest) = page.split_once(BEGIN).expect("the page has the mark of the beginning");
    let (_, after) = rest.split_once(END).expect("the page has the mark of the end");
    format!("{before}{BEGIN}{table}{END}{after}")
}

#[test]
fn a_table_of_strace_is_read() {
    let text =
        "    calls syscall\n--------- ----------------\n       19 read\n        2 statx\n--------- ----\n  21 total\n";
    let expected = [("read".to_owned(), 19), ("statx".to_owned(), 2)];
    assert_eq!(counts(text), BTreeMap::from(expected));
}

#[test]
fn a_call_is_named_once() {
    for (place, call) in KNOWN.iter().enumerate() {
        assert!(KNOWN[..place].iter().all(|other| other.name != call.name), "{} twice", call.name);
    }
}
