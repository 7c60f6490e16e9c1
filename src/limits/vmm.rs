//! The bounds of VMM drivers and of a guest's state on its way: `limits.rs` gives them to everybody.

use super::{GIB, KIB, QUIESCE_MAX, UNIX_PATH_MAX, UNSEALED_PATIENCE};
use std::time::Duration;

/// Longest line of QEMU's monitor, in bytes.
pub const QMP_LINE_MAX: usize = 64 * KIB;
/// Events of QEMU's that are kept until somebody looks.
pub const QMP_EVENTS_MAX: usize = 64;
/// Longest path of a monitor's neighbour: a Unix socket's.
pub const QMP_PATH_MAX: usize = UNIX_PATH_MAX;
/// How long QEMU may take for one answer: it waits for its disks.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often QEMU is asked whether it has come to where it is to come.
pub const QMP_LOOK: Duration = Duration::from_millis(2);
/// How often a QEMU that is to come is looked for.
pub const QMP_START_LOOK: Duration = Duration::from_millis(100);
/// What QEMU is told of its bandwidth, in bytes a second; the budget holds it back.
pub const QMP_BANDWIDTH: u64 = 16 * GIB;
/// The downtime that QEMU is allowed at first: what memory it can move in that time, it leaves.
pub const QMP_DOWNTIME_FIRST: Duration = Duration::from_millis(20);
/// How long QEMU may try with that until it is allowed the whole downtime.
pub const QMP_PATIENCE: Duration = Duration::from_secs(3);
/// How long the state may take to begin to move: both VMMs are asked.
pub const STATE_START_MAX: Duration = Duration::from_secs(20);
/// How long a guest may stand whose state is gone, until it is loaded.
pub const STATE_LOAD_MAX: Duration = Duration::from_secs(30);
/// How long a guest may stand until the rest of its disks is copied, before that of its state follows.
pub const STATE_DRAIN_MAX: Duration = QUIESCE_MAX;
/// How long the rest of the state may take while its guest stands, beyond twice the allowed downtime.
pub const STATE_FOLLOW_MAX: Duration = Duration::from_secs(60);
/// How long the state may stand still while its guest waits.
pub const STATE_STALL_MAX: Duration = Duration::from_secs(20);
/// How often is looked around while a guest stands.
pub const STANDING_TICK: Duration = Duration::from_millis(1);
/// How long a VMM whose socket has closed may take to say that it is done.
pub const VMM_LAST_WORD: Duration = Duration::from_millis(500);
/// How long a VMM may take until its guest runs, or until it has ended.
pub const VMM_RUN_MAX: Duration = Duration::from_secs(10);
/// How long a VMM may take until it lets its guest go on whose attempt has come to nothing: it may be flushing a disk.
pub const VMM_RESUME_MAX: Duration = Duration::from_secs(60);
/// How often it is told to, by the next process of that host too, until it is left to its user.
pub const RESUMES_MAX: u32 = 5;
/// The longest pause between two of these.
pub const RESUME_PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long a VMM may take to end before "unsealed" is said.
pub const VMM_END_MAX: Duration = Duration::from_secs(3);
/// How long a hook's `stop` may take until its VMM is silent.
pub const HOOK_STOP_MAX: Duration = Duration::from_secs(10);
/// How long a hook's `state-out` and `state-in` may take.
pub const HOOK_STATE_MAX: Duration = Duration::from_secs(600);
/// How often a hook that runs is looked at.
pub const HOOK_LOOK: Duration = Duration::from_millis(1);
/// How long a failed hook's last words are waited for.
pub const HOOK_LAST_LINE: Duration = Duration::from_millis(200);
/// Longest line of a hook kept in one piece, in bytes.
pub const HOOK_LINE_MAX: u64 = 1024;
/// How often a state that waits for its budget looks whether its guest stands.
pub const STATE_LOOK: Duration = Duration::from_millis(10);
/// Bytes of a guest's state on their way in one direction, in each process.
pub const STATE_BUFFER: usize = 256 * KIB;

const _: () = assert!(HOOK_STOP_MAX.as_secs() < STATE_STALL_MAX.as_secs(), "a hook that stops is no stalled state");
const _: () = assert!(VMM_END_MAX.as_secs() < UNSEALED_PATIENCE.as_secs(), "unsealed is said while it is waited for");
