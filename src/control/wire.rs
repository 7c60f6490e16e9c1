//! The messages of the control door.
//!
//! A message's number is its place in [`Request`] or [`Reply`], a field's its place in the struct: **only append**,
//! and raise [`VERSION`] with it. A test pins the bytes of every one. All types have a fixed capacity, so no peer can
//! make us allocate; texts that are longer are cut by [`text`].
//!
//! A session starts with [`Request::Hello`]. Then each request gets one reply; after [`Request::Follow`] and a
//! [`Request::Migrate`] that is not detached, the first reply is [`Reply::Ok`] and [`Reply::Progress`] follow until one
//! [`Reply::Done`].

use std::borrow::Cow;

use heapless::{String, Vec};
use serde::{Deserialize, Serialize};

use crate::domain::Stays;
use crate::error::{Dies, Exit, Problem};
use crate::limits::{
    CAUSE_MAX, DISK_NAME_MAX, DISKS_MAX, GUEST_NAME_MAX, NBD_DEVICE_PATH_MAX, NEXT_STEPS_MAX, OPERATION_MAX, PLACE_MAX,
    RECORD_TEXT_MAX, REPORT_MAX, WORDS_MAX,
};

/// The version of these messages. Both ends are the same executable as a rule, so there is no older one to speak.
pub const VERSION: u16 = 4;

/// A guest's name.
pub type GuestName = String<GUEST_NAME_MAX>;
/// A disk's name.
pub type DiskName = String<DISK_NAME_MAX>;
/// An address as it prints, or `exec:` and a command.
pub type AddressText = String<PLACE_MAX>;
/// A device of the kernel's nbd driver.
pub type DevicePath = String<NBD_DEVICE_PATH_MAX>;
/// A cause.
pub type Cause = String<CAUSE_MAX>;
/// What is, or what to type and where: the command must not be cut off behind a long address.
pub type Words = String<WORDS_MAX>;

/// What the command line asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "a box would let a peer make us allocate")]
pub enum Request {
    /// 0: the first message, always.
    Hello {
        /// [`VERSION`] of the client.
        version: u16,
        /// A fresh random number. On a byte pipe, answers to somebody who was there before may still come: the client
        /// passes over everything until the reply with its own number.
        session: u32,
    },
    /// 1: answered by [`Reply::Status`].
    Status,
    /// 2: this host owns the guest's disks (M7).
    Claim {
        /// A broken or foreign record is thrown away.
        discard_record: bool,
    },
    /// 3: start a migration.
    Migrate(MigrateRequest),
    /// 4: a migration held by `--hold` hands over now.
    Switch,
    /// 5: end the running migration.
    Cancel {
        /// Who wants it and why, for both sides' users.
        cause: Cause,
    },
    /// 6: change the running migration.
    Set(SetRequest),
    /// 7: the progress of the running migration, or the end of the last one.
    Follow,
    /// 8: answered by [`Reply::Ownership`].
    WhoOwns,
    /// 9: ask the other host, and if the operator says so, do without it (M5, M6, M8); answered by
    /// [`Reply::Recovered`].
    Recover(Word),
    /// 10: a disk becomes a device of this host; answered when it is, which is when this host owns the disk.
    Attach(AttachRequest),
    /// 11: a device is given up.
    Detach {
        /// The device.
        device: DevicePath,
    },
    /// 12: after [`Reply::Ok`] this connection is one to the migration door, and no control connection any more.
    Accept,
}

/// What `attach` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// The disk.
    pub disk: DiskName,
    /// The device.
    pub device: DevicePath,
    /// How long this host's ownership is waited for, in seconds; `None`: as long as the client stays.
    pub wait_s: Option<u32>,
}

/// The operator's word when a record waits for another host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// 0: only ask the other host.
    #[default]
    Ask,
    /// 1: this host owns from now on (M8).
    TakeOwnership,
    /// 2: the peer of an ended offer will never own (M5).
    ForgetPeer,
    /// 3: what is here is given up (M6).
    Forget,
}

/// What `migrate` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// The destination's migration door.
    pub destination: AddressText,
    /// Disks there that are not empty are overwritten.
    pub overwrite: bool,
    /// Exactly these disks move; empty: all that move by themselves.
    pub disks: Vec<DiskName, DISKS_MAX>,
    /// Bytes a second for all disks together; 0: no limit.
    pub bandwidth_bytes: u64,
    /// Longest predicted final pass that counts as converged.
    pub downtime_limit_ms: u32,
    /// Wait for `switch` when converged.
    pub hold: bool,
    /// Data connections of one disk; 0: one, or several to a distant host.
    pub connections: u8,
    /// The migration goes on when the command goes away.
    pub detach: bool,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
    /// Disks there hold an older copy: only what differs is sent.
    pub incremental: bool,
    /// What has been sent stays at the destination even if the migration is cancelled.
    pub keep_partial: bool,
    /// What of the copy is verified before the hand-over.
    pub verify: Verify,
    /// How the disks are to travel.
    pub transport: Transport,
    /// Disks that stay need not be within the destination's reach.
    pub heedless: bool,
    /// Whether guest writes wait for the mirror.
    pub synchronous: Synchronous,
    /// With `incremental`: what is below the top layers of the two sides' disks is the same, and need not be read.
    pub same_base: bool,
}

/// Whether guest writes are answered only when the mirror has them (rule D7).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Synchronous {
    /// 0: from when a mirror that passes does not converge.
    #[default]
    Auto,
    /// 1: from the end of the bulk pass.
    Always,
    /// 2: never.
    Never,
}

impl Synchronous {
    /// As the command line names it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// How the disks travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// 0: by NBD where that is possible, else inside the phase connection.
    #[default]
    Auto,
    /// 1: over data connections that speak NBD.
    Nbd,
    /// 2: inside the phase connection.
    Stream,
}

impl Transport {
    /// As the command line names it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Nbd => "nbd",
            Self::Stream => "stream",
        }
    }
}

/// What of the copy is verified before the hand-over (rule D14).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verify {
    /// 0: nothing.
    None,
    /// 1: every region that was sent, or found equal.
    #[default]
    Written,
    /// 2: every region of every disk.
    Full,
}

impl Verify {
    /// As the command line names it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Written => "written",
            Self::Full => "full",
        }
    }
}

/// What was verified of a copy before it was handed over (rule D14).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// What was asked for.
    pub verify: Verify,
    /// Bytes that both sides have hashed to the same digests, as the disks were when the guest stopped.
    pub verified_bytes: u64,
    /// The digest over all of them; all zero when nothing was verified.
    pub root: [u8; 32],
    /// The order that was handed over: its term.
    pub term: u64,
    /// The order that was handed over: its generation.
    pub generation: u64,
    /// Bytes taken as equal on the word that the bases are the same, and hashed by nobody.
    pub unread_bytes: u64,
}

/// The receipt that a host keeps of the last hand-over that it took part in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What was verified.
    pub receipt: Receipt,
    /// The attempt's number.
    pub attempt: u128,
    /// The guest's history.
    pub lineage: u128,
    /// This host gave the guest; else it got it.
    pub gave: bool,
    /// The other host.
    pub peer: AddressText,
    /// Data sent; known to the source only.
    pub sent_bytes: Option<u64>,
    /// What needed not be sent; known to the source only.
    pub equal_bytes: Option<u64>,
}

/// What `set` changes; `None` leaves it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetRequest {
    /// Bytes a second; 0 lifts the limit.
    pub bandwidth_bytes: Option<u64>,
    /// Longest predicted final pass that counts as converged.
    pub downtime_limit_ms: Option<u32>,
}

/// What the process answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "a box would let a peer make us allocate")]
pub enum Reply {
    /// 0: answer to the hello.
    Hello {
        /// [`VERSION`] of the process.
        version: u16,
        /// The guest that it serves.
        guest: GuestName,
        /// The number of the hello that this answers.
        session: u32,
    },
    /// 1: done, or started.
    Ok,
    /// 2: not done.
    Refused(Refusal),
    /// 3: how the guest's disks are.
    Status(Status),
    /// 4: how the migration is.
    Progress(Progress),
    /// 5: how the migration ended.
    Done(Done),
    /// 6: who owns.
    Ownership(Ownership),
    /// 7: what the other host said, and what was done.
    Recovered(Recovered),
}

/// A [`Problem`] on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// [`Exit::code`].
    pub exit: u8,
    /// [`Problem::operation`].
    pub operation: String<OPERATION_MAX>,
    /// [`Problem::object`].
    pub object: AddressText,
    /// [`Problem::cause`].
    pub cause: Cause,
}

impl From<&Problem> for Refusal {
    fn from(problem: &Problem) -> Self {
        Self {
            exit: problem.exit.code(),
            operation: text(&problem.operation),
            object: text(&problem.object),
            cause: text(&problem.cause),
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let operation = Cow::Owned(refusal.operation.as_str().to_owned());
        Self::new(Dies::Request, Exit::from_code(refusal.exit), operation, &refusal.object, &refusal.cause)
    }
}

/// The record's state, in the ready line's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// 0: owns nothing.
    #[default]
    Incoming,
    /// 1: an attempt writes into the disks.
    Receiving,
    /// 2: complete, waits for the source's word.
    Sealed,
    /// 3: owns.
    Owner,
    /// 4: owns, and somebody may be sealed.
    Offered,
    /// 5: gave the guest away.
    Given,
    /// 6: overruled by an operator's word elsewhere.
    Superseded,
    /// 7: a commit failed: fenced until a newer record is durable (M4).
    Unknown,
}

impl State {
    /// The word of the ready line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Incoming => "incoming",
            Self::Receiving => "receiving",
            Self::Sealed => "sealed",
            Self::Owner => "owner",
            Self::Offered => "offered",
            Self::Given => "given",
            Self::Superseded => "superseded",
            Self::Unknown => "unknown",
        }
    }
}

/// The gate of one disk's export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gate {
    /// 0: shows its size, reads, refuses writes.
    Incoming,
    /// 1: the same; the migration door writes.
    Receiving,
    /// 2: the same; nobody writes.
    Sealed,
    /// 3: serves the guest.
    Serving,
    /// 4: the guest's writes wait.
    Quiesced,
    /// 5: refuses everything.
    Fenced,
    /// 6: the same, until it is known who owns.
    Closed,
}

impl Gate {
    /// As `status` prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Incoming => "incoming",
            Self::Receiving => "receiving",
            Self::Sealed => "sealed",
            Self::Serving => "serving",
            Self::Quiesced => "quiesced",
            Self::Fenced => "fenced",
            Self::Closed => "closed",
        }
    }
}

/// How a guest's disks are on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The guest.
    pub guest: GuestName,
    /// The record's state.
    pub state: State,
    /// The order's term.
    pub term: u64,
    /// The order's generation.
    pub generation: u64,
    /// The lineage; 0: none yet.
    pub lineage: u128,
    /// The other host that the state names; empty: none.
    pub peer: AddressText,
    /// Whether a migration can be followed.
    pub migration: Migration,
    /// What to type next; empty: nothing.
    pub hint: Words,
    /// Every disk, in the order of the command line.
    pub disks: Vec<DiskStatus, DISKS_MAX>,
    /// The disks that are devices of this host.
    pub attached: Vec<AttachedStatus, DISKS_MAX>,
    /// Of the last hand-over that this host took part in.
    pub receipt: Option<Kept>,
}

/// One device in [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedStatus {
    /// The disk.
    pub disk: DiskName,
    /// The device.
    pub device: DevicePath,
}

/// Whether a migration can be followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Migration {
    /// 0: none since this process started.
    #[default]
    None,
    /// 1: one is running.
    Running,
    /// 2: one has ended.
    Ended,
}

impl Migration {
    /// As `--json` prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Running => "running",
            Self::Ended => "ended",
        }
    }
}

/// One disk in [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: DiskName,
    /// Its size; 0: not known (no source, or not yet made).
    pub size_bytes: u64,
    /// Why it would stay; `None`: it moves.
    pub stays: Option<Stays>,
    /// Its export's gate; `None`: it has no export.
    pub gate: Option<Gate>,
}

/// Where a migration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// 0: dials, says hello, opens the disks there.
    #[default]
    Prepare,
    /// 1: the first copy.
    Bulk,
    /// 2: walks over what the guest has written since.
    Passes,
    /// 3: the VMM moves its memory and devices; the mirror keeps passing.
    State,
    /// 4: the guest's writes wait; the final pass.
    Final,
    /// 5: SEAL is sent: the destination makes everything durable.
    Seal,
    /// 6: ownership is given.
    Give,
    /// 7: aborting; the two sides agree on it.
    Abort,
}

impl Phase {
    /// As progress prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Bulk => "bulk pass",
            Self::Passes => "passes",
            Self::State => "state",
            Self::Final => "final pass",
            Self::Seal => "seal",
            Self::Give => "give",
            Self::Abort => "abort",
        }
    }
}

/// Whether the final pass would fit the allowed downtime, or why not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Convergence {
    /// 0: the bulk pass is not over; nothing to predict from.
    #[default]
    Copying,
    /// 1: it fits.
    Converged,
    /// 2: it would take too long yet, and is getting shorter.
    TooLong,
    /// 3: it does not get shorter: the guest writes faster than the mirror copies.
    GuestIsFaster {
        /// What the guest writes, in bytes a second, all disks together.
        dirty_rate_bytes: u64,
        /// What the mirror copies, in bytes a second, all disks together.
        rate_bytes: u64,
    },
}

/// How a running migration is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The attempt's number.
    pub attempt: u128,
    /// Where it is.
    pub phase: Phase,
    /// Since `migrate`.
    pub elapsed_ms: u64,
    /// Whether it converged, or why not.
    pub convergence: Convergence,
    /// Predicted length of the final pass; `None`: cannot be said yet.
    pub predicted_final_ms: Option<u32>,
    /// The downtime that is allowed.
    pub downtime_limit_ms: u32,
    /// Bytes a second that are allowed; 0: no limit.
    pub bandwidth_bytes: u64,
    /// `--hold`: waits for `switch` when converged.
    pub held: bool,
    /// Every disk that moves.
    pub disks: Vec<DiskProgress, DISKS_MAX>,
    /// How long the destination has been out of reach; `None`: it is not.
    pub lost_ms: Option<u64>,
    /// Why it is out of reach; empty: it is not.
    pub lost_cause: Cause,
    /// How the disks travel; auto: not known yet.
    pub transport: Transport,
    /// Why they travel inside the phase connection, where nobody has asked for that; else empty.
    pub transport_cause: Cause,
    /// Bytes of the guest's memory and devices that have moved.
    pub state_bytes: u64,
    /// Guest writes wait for the mirror, since these rates; `None`: they do not.
    pub synchronous: Option<Since>,
    /// Why the word that the bases are the same saves nothing, and of which disk; empty: it does, or was not given.
    pub base_cause: Cause,
}

/// The rates of all disks together when guest writes began to wait for the mirror.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// What the guest made dirty, in bytes a second.
    pub dirty_rate_bytes: u64,
    /// What the mirror copied, in bytes a second.
    pub rate_bytes: u64,
}

/// One disk in [`Progress`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskProgress {
    /// Its name.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// Dirty or taken: what is left at this moment.
    pub left_bytes: u64,
    /// Data sent, repeated copies counted again.
    pub sent_bytes: u64,
    /// Zeroes that travelled as write-zeroes, or needed not travel.
    pub zero_bytes: u64,
    /// What the mirror copies, a second.
    pub rate_bytes: u64,
    /// What the guest makes dirty, a second.
    pub dirty_rate_bytes: u64,
    /// Passes begun, the bulk pass included.
    pub passes: u32,
    /// Seconds until nothing is left; `None`: never at these rates, or not known.
    pub estimate_s: Option<u32>,
    /// Data sent again because a connection was lost.
    pub resent_bytes: u64,
    /// Bytes that the destination had already, found by digest.
    pub equal_bytes: u64,
    /// Bytes hashed on both sides and found equal, repeated ones counted again.
    pub verified_bytes: u64,
    /// Bytes that must be verified yet.
    pub unverified_bytes: u64,
    /// Bytes taken as equal on the word that the bases are the same.
    pub base_bytes: u64,
}

/// Who owns the guest after a migration, seen from here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// 0: this host.
    Here,
    /// 1: the destination.
    Destination,
    /// 2: not known from here.
    #[default]
    Unknown,
    /// 3: another host, which is named.
    Elsewhere,
}

impl Owner {
    /// As `--json` prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Destination => "destination",
            Self::Unknown => "unknown",
            Self::Elsewhere => "elsewhere",
        }
    }

    /// How `who-owns` ends.
    #[must_use]
    pub const fn exit(self) -> Exit {
        match self {
            Self::Here => Exit::Done,
            Self::Destination | Self::Elsewhere => Exit::GaveAway,
            Self::Unknown => Exit::Unknown,
        }
    }
}

/// How a migration ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The attempt's number.
    pub attempt: u128,
    /// [`Exit::code`] of the command.
    pub exit: u8,
    /// The cause when it failed; may be empty when it did not. A refusal lists all that is wrong.
    pub message: String<REPORT_MAX>,
    /// Who owns the guest now.
    pub owner: Owner,
    /// The destination.
    pub destination: AddressText,
    /// Data sent.
    pub sent_bytes: u64,
    /// Zeroes that travelled as write-zeroes, or needed not travel.
    pub zero_bytes: u64,
    /// Most passes of any disk, the bulk pass included.
    pub passes: u32,
    /// From `migrate` to the end.
    pub total_ms: u64,
    /// From quiesce to the destination's word that it owns; `None`: never came to it.
    pub switchover_us: Option<u64>,
    /// Data sent again because a connection was lost; part of the data sent.
    pub resent_bytes: u64,
    /// Bytes that the destination had already, found by digest.
    pub equal_bytes: u64,
    /// What was verified; `None`: it was not handed over.
    pub receipt: Option<Receipt>,
    /// Bytes of the guest's memory and devices; `None`: no VMM driver has moved them.
    pub state_bytes: Option<u64>,
    /// How long the guest stood, as the VMM drivers saw it; `None`: it was not seen.
    pub pause_us: Option<u64>,
    /// Bytes taken as equal on the word that the bases are the same.
    pub base_bytes: u64,
}

/// Who owns a guest, as far as this host knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// The guest.
    pub guest: GuestName,
    /// The record's state.
    pub state: State,
    /// Here, elsewhere or not known.
    pub owner: Owner,
    /// The order's term.
    pub term: u64,
    /// The order's generation.
    pub generation: u64,
    /// The other host that the state names; 0: none.
    pub host: u128,
    /// Where that was last reached; empty: it cannot be dialled.
    pub address: AddressText,
    /// All of it in words.
    pub text: Words,
    /// What to type next; empty: nothing.
    pub next: Words,
    /// The record with all that tells it from others; empty: there is none.
    pub record: String<RECORD_TEXT_MAX>,
    /// The record counts for nothing (M7).
    pub rejected: bool,
    /// Of the last hand-over that this host took part in.
    pub receipt: Option<Kept>,
}

/// What became of a [`Request::Recover`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// Who owns after it.
    pub ownership: Ownership,
    /// Who was asked; empty: nobody.
    pub asked: Words,
    /// What it said.
    pub heard: Words,
    /// The word was carried out, and this was done; empty: it was not, or there was none.
    pub done: Words,
    /// What the guest may lose by it.
    pub may_lose: Words,
    /// Which host must never be taken, and why; empty: none.
    pub never_take: Words,
    /// What to do next, and where.
    pub next: Vec<Words, NEXT_STEPS_MAX>,
}

/// As much of `full` as fits, cut at a character.
#[must_use]
pub fn text<const N: usize>(full: &str) -> String<N> {
    let mut end = full.len().min(N);
    while !full.is_char_boundary(end) {
        end -= 1;
    }
    // It fits: `end` is at most N.
    String::try_from(&full[..end]).unwrap_or_default()
}
