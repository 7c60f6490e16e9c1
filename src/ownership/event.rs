//! What can happen to a record, and what can come of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Attempt, Images, Lineage, Peer, Record, Stamp, Title, Word};

/// Everything that can change a record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The process starts.
    Restart,

    /// The operator's first word (rule M7).
    Claim {
        /// The new lineage.
        lineage: Lineage,
        /// The number of this word.
        word: Word,
        /// The images that are claimed.
        images: Images,
        /// A record of another machine may be thrown away; the user has been shown it.
        discard: bool,
    },
    /// The operator takes ownership (rule M8), after the peer was asked.
    Take {
        /// The number of this word.
        word: Word,
        /// What the peer said.
        heard: Heard,
    },
    /// The operator says that the peer of an ended offer will never own (rule M5).
    ForgetPeer,
    /// The operator gives up what is here (rule M6).
    Forget {
        /// What the peer said; it is asked only by a sealed host.
        heard: Heard,
    },

    /// Destination: PREPARE arrived. Every writer of earlier attempts has been joined (rule D4).
    Prepare {
        /// Its stamp.
        stamp: Stamp,
        /// The sender.
        from: Peer,
        /// It echoed the challenge of its connection's hello, and that challenge had not counted before (rule M1).
        fresh: bool,
    },
    /// Destination: this side ends an attempt that is not sealed. Clean-up, which needs RECEIVING, is over.
    AbortReceiving {
        /// The attempt.
        attempt: Attempt,
    },
    /// Destination: SEAL arrived, and all that must be true before SEALED is.
    Seal {
        /// Its stamp.
        stamp: Stamp,
        /// The images, now whole.
        images: Images,
    },
    /// Destination: GO arrived.
    Go(Stamp),
    /// Destination: ABORT arrived. The VMM has been ended, the guest door's connections shut and the writers joined
    /// (rule M11): what becomes of this event may be "unsealed".
    Abort(Stamp),
    /// Destination: the source says for good that this attempt was not given.
    NotGiven(Stamp),

    /// Source: somebody may be sealed from now on (rule M5).
    Offer {
        /// What PREPARE said; the attempt was never offered before.
        stamp: Stamp,
        /// The destination.
        to: Peer,
    },
    /// Source: the attempt ends here, for good (rule M3).
    End {
        /// The attempt.
        attempt: Attempt,
    },
    /// Source: give the guest away. The caller holds the destination's SEALED, its VMM's state is loaded (rule M11).
    Give {
        /// The stamp of that SEALED.
        sealed: Stamp,
    },
    /// Source: the destination says "unsealed".
    Unsealed(Stamp),
    /// Source: the destination says RUNNING.
    Running(Stamp),

    /// Either side: an authenticated peer shows its title, in its hello or in its record.
    Meet {
        /// What it proves.
        title: Title,
        /// Who shows it.
        peer: Peer,
    },
}

/// What the peer said when an operator wants to take ownership, or to give up a sealed guest: see
/// [`super::heard_record`] and [`super::heard_promise`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Heard {
    /// Nothing: it is not there, or it cannot know who owns. The operator has been told what the guest may lose.
    Silence,
    /// It proves that nobody owns, and no message of either side can change that.
    Disclaims,
    /// Anything else: it owns, will own with GO, or its answer settles the record by itself.
    Decides,
}

/// What a transition does to the record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Change {
    /// Nothing.
    Keep,
    /// It becomes this one, which must be durable before anything follows from it.
    Become(Box<Record>),
    /// There is none any more: it was another machine's.
    Remove,
}

/// What the peer is told once the change is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Nothing: the event was not a question of the peer.
    Silent,
    /// PREPARED.
    Prepared,
    /// SEALED.
    Sealed,
    /// RUNNING.
    Running,
    /// UNSEALED: this host will never seal that attempt again.
    Unsealed,
    /// This host's record, whatever it is: the peer must judge by itself.
    Record,
}

/// The result of [`next`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Step {
    /// The change.
    pub change: Change,
    /// The answer.
    pub answer: Answer,
}

/// Why an event is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// The record is broken, from another machine, or of other images.
    Foreign,
    /// Claimed where a record exists.
    Exists,
    /// The event needs a record.
    NoRecord,
    /// An operator's word against a peer that answers.
    PeerDecides,
    /// An operator's word in a state where there is nothing to take.
    NotTakeable,
    /// The attempt still lives in this process.
    InProgress,
    /// No offer whose peer could be forgotten.
    NothingOffered,
    /// Forgetting would lose the guest.
    NotForgettable,
    /// A PREPARE to an owner, or to one who gave and does not know yet that the guest arrived elsewhere.
    Busy,
    /// The sender of a PREPARE does not prove that it owns the guest.
    NotProven,
    /// The sender's guest has another history.
    OtherLineage,
    /// The message was sent before and counted then.
    Repeated,
    /// The attempt has ended.
    Ended,
    /// Sealed: this side cannot end it.
    Sealed,
    /// An earlier offer is not settled.
    Unsettled,
    /// The guest has been given: nothing can be taken back.
    Given,
    /// This host does not own the guest.
    NotOwner,
    /// The message is about something else than this record.
    Stale,
    /// Orders cannot rise further.
    Exhausted,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => "the record here is broken or foreign",
            Self::Exists => "ownership is claimed once, where there is no record",
            Self::NoRecord => "there is no record of this guest",
            Self::PeerDecides => "the other host answers, and what it says decides",
            Self::NotTakeable => "there is nothing to take",
            Self::InProgress => "a migration is in progress: cancel it first",
            Self::NothingOffered => "there is no offer to another host",
            Self::NotForgettable => "forgetting could leave the guest without an owner",
            Self::Busy => "the guest cannot be received here",
            Self::NotProven => "the sender does not prove that it owns the guest",
            Self::OtherLineage => "the sender's guest has another history",
            Self::Repeated => "the request has been made before",
            Self::Ended => "this attempt has ended",
            Self::Sealed => "the reception is complete: only its source or the operator ends it",
            Self::Unsettled => "an earlier migration is not settled",
            Self::Given => "the guest has been given away",
            Self::NotOwner => "the guest is not this host's to give",
            Self::Stale => "the message is about another attempt",
            Self::Exhausted => "the order cannot rise further",
        })
    }
}

/// A refused event: why, and who owns as far as this host knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Why.
    pub why: Why,
    /// The record that refused, unchanged.
    pub record: Option<Box<Record>>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.record {
            // M7: what a foreign record says about owners is not true here.
            Some(record) if self.why != Why::Foreign => write!(f, "{}: {record}", self.why),
            _ => write!(f, "{}: this host owns nothing", self.why),
        }
    }
}

impl std::error::Error for Refusal {}

/// What a source answers when a sealed destination asks whether an attempt was given (rule M3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Promise {
    /// Given: the answer is GO.
    Given,
    /// Not decided yet.
    InProgress,
    /// Not given, and never will be: the attempt has ended for good.
    NotGiven,
    /// There is no record of that lineage here.
    Unknown,
}
