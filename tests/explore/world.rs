//! One moment of the model: all hosts, the network, and what may still happen. Small enough that millions fit into
//! memory; records, stamps and titles are numbers, which [`super::book::Book`] knows.

/// The most hosts.
pub(crate) const HOSTS: usize = 3;
/// The most attempts.
pub(crate) const TRIES: usize = 4;
/// What a disk holds that is half written, or empty.
pub(crate) const GARBAGE: u8 = u8::MAX;

/// One moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// The hosts.
    pub(crate) hosts: [Node; HOSTS],
    /// The attempts, in the order in which they began, with what has been said in each.
    pub(crate) tries: [Try; TRIES],
    /// The titles that somebody may have shown: bits, numbered by the [`super::book::Book`]. Each may arrive later.
    pub(crate) shown: u64,
    /// The last write that was acknowledged to the guest: who owns must have it.
    pub(crate) truth: u8,
    /// Guest writes so far.
    pub(crate) writes: u8,
    /// Words of the operator so far.
    pub(crate) words: u8,
    /// The faults that may still happen.
    pub(crate) left: Faults,
    /// What the operator has been told, and has to live with.
    pub(crate) marks: Marks,
}

/// One host: its disk, its record, its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// The record that the process goes by; without a process, the one that it would find.
    pub(crate) record: u16,
    /// The record that a power loss leaves.
    pub(crate) durable: u16,
    /// The last write that the disks hold, or [`GARBAGE`].
    pub(crate) content: u8,
    /// The process.
    pub(crate) process: Process,
    /// The migration that the process drives.
    pub(crate) job: Option<Job>,
}

/// What the process of a host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    /// There is none.
    Down,
    /// It runs and its record is durable.
    Up,
    /// It runs, and a commit has failed: fenced and silent until it is made good (M4).
    Unknown,
}

/// A migration on its way, as `migrate/drive.rs` walks through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    /// Which try.
    pub(crate) try_: u8,
    /// How far.
    pub(crate) stage: Stage,
}

/// How far a job has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// PREPARE has been sent.
    Asked,
    /// The record says OFFERED; the guest writes on.
    Offered,
    /// The gates are closed, the final pass is over, SEAL has been sent. From here the gates open only behind End.
    Sealing,
}

/// One attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Try {
    /// Its stamp's number; zero: not begun.
    pub(crate) stamp: u16,
    /// The messages that have been sent: bits, numbered by [`Message`]. None ever goes away, so each may be lost,
    /// late, and repeated.
    pub(crate) said: u16,
    /// The challenge that PREPARE echoes has counted, or its connection is gone (M1).
    pub(crate) spent: bool,
}

/// The messages about an attempt. RECORD and the hellos are titles, in [`World::shown`]; FAILED and REFUSED end an
/// attempt at the source, which may end by itself at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    Prepare,
    Prepared,
    Seal,
    Sealed,
    Go,
    Running,
    Abort,
    Unsealed,
    Question,
    NotGiven,
}

impl Message {
    /// All of them.
    pub(crate) const ALL: [Self; 10] = [
        Self::Prepare,
        Self::Prepared,
        Self::Seal,
        Self::Sealed,
        Self::Go,
        Self::Running,
        Self::Abort,
        Self::Unsealed,
        Self::Question,
        Self::NotGiven,
    ];

    /// Its bit in [`Try::said`].
    pub(crate) fn bit(self) -> u16 {
        1 << (self as u16)
    }

    /// Whether the attempt's destination receives it; else its source.
    pub(crate) fn is_for_destination(self) -> bool {
        matches!(self, Self::Prepare | Self::Seal | Self::Go | Self::Abort | Self::NotGiven)
    }
}

/// How often each thing may still go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    /// A process dies: its memory is lost, files stay as they are seen.
    pub(crate) crashes: u8,
    /// The power fails: what was seen and not yet durable is undone.
    pub(crate) powers: u8,
    /// A commit fails and the process lives.
    pub(crate) failures: u8,
    /// The operator speaks.
    pub(crate) words: u8,
    /// A state directory and its disks are copied to an unused machine, or the record of a host that gave is lost.
    pub(crate) mishaps: u8,
}

/// What words have made acceptable: see `checks.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Marks {
    /// A word was given against silence while somebody else owned, or was about to: until the two meet there may be
    /// two owners (the residue of M8).
    pub(crate) residue: bool,
    /// A word has made an owner: a source that is down may own although its destination is sealed.
    pub(crate) vouched: bool,
    /// The way out may need the operator again: what was sealed was forgotten against silence.
    pub(crate) orphaned: bool,
    /// The record of a host that gave is lost: what is sealed is all there is.
    pub(crate) bereft: bool,
    /// A word that was not given against silence lost a write.
    pub(crate) lost: bool,
}

impl Node {
    /// Whether its process answers: it runs, and its record is known.
    pub(crate) fn is_awake(&self) -> bool {
        self.process == Process::Up
    }
}

impl World {
    /// Whether the guest's writes wait: the gate is closed for a switchover.
    pub(crate) fn is_quiesced(&self, host: usize) -> bool {
        matches!(self.hosts[host].job, Some(Job { stage: Stage::Sealing, .. }))
    }

    /// Whether `message` of a try has been sent.
    pub(crate) fn is_said(&self, try_: usize, message: Message) -> bool {
        self.tries[try_].said & message.bit() != 0
    }

    /// Sends `message`.
    pub(crate) fn say(&mut self, try_: usize, message: Message) {
        self.tries[try_].said |= message.bit();
    }
}
