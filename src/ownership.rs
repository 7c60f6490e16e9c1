//! Who owns the guest's disks: the record, its states, and what it proves.
//!
//! At any time at most one host owns a guest's disks. What this host may do is written in its *record*; what may
//! change the record is one pure function, [`next`], that the product and the exhaustive exploration share. It holds
//! no clock (rule M10: no side decides ownership by time) and does no I/O; the [`Keeper`] makes each change durable
//! before anybody sees it (rule M4). The rules M1 to M9 are named where they are carried.
//!
//! A record's order is always one that some host has *durably owned*: the owner's own, the sender's while this host
//! receives, the overruling one when it was superseded. So every record of a lineage, whatever its state, proves that
//! there is or was an owner of that order. The order that an attempt would create is one generation above; it enters
//! a record with GO, never before.

mod event;
mod file;
mod host;
mod id;
mod images;
mod journal;
mod keeper;
mod moving;
mod receipt;
mod store;
#[cfg(test)]
mod tests;
mod transition;
mod volatile;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use event::{Answer, Change, Event, Heard, Promise, Refusal, Step, Why};
pub use file::Content;
pub use id::{Attempt, Host, ID_BYTES, ID_DIGITS, Images, Instance, Lineage, Word};
pub use images::ImageList;
pub use journal::{Entry, How, Image, Journal};
pub use keeper::{KeepError, Keeper, Save, Write};
pub use moving::Moving;
pub use receipt::Receipt;
pub use store::{Found, Look, Store, look, show};
pub use transition::{heard_promise, heard_record, next, promise};

use crate::limits::PLACE_MAX;

/// A printable address.
pub type Address = heapless::String<PLACE_MAX>;

/// The rank of an owner: generations rise at each hand-over, terms only by an operator's word. Compared by term, then
/// generation; printed as `TERM.GENERATION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Order {
    /// Raised by `recover --take-ownership`.
    pub term: u32,
    /// Raised by each hand-over.
    pub generation: u64,
}

impl Order {
    /// No order: what a host without a record says in the hello.
    pub const NONE: Self = Self { term: 0, generation: 0 };
    /// The order that `claim` gives.
    pub const FIRST: Self = Self { term: 1, generation: 1 };

    /// The order after a hand-over; `None` at the end of the numbers, which only a hostile peer reaches.
    #[must_use]
    pub fn handed_over(self) -> Option<Self> {
        Some(Self { generation: self.generation.checked_add(1)?, ..self })
    }

    /// The order before a hand-over, `None` where there cannot have been one.
    #[must_use]
    pub fn before_hand_over(self) -> Option<Self> {
        Some(Self { generation: self.generation.checked_sub(1)?, ..self })
    }

    /// The order after an operator's word; `None` at the end of the numbers.
    #[must_use]
    pub fn taken(self) -> Option<Self> {
        Some(Self { term: self.term.checked_add(1)?, ..self })
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.generation)
    }
}

/// What a record proves: in this lineage somebody owned, or owns, at this order, by this word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Title {
    /// The guest's history.
    pub lineage: Lineage,
    /// The order that was owned.
    pub order: Order,
    /// The word that began the order's term.
    pub word: Word,
}

impl Title {
    /// Whether an owner with the title `mine` must fence itself on this proof (rule M8): a higher order of the same
    /// lineage, or the same term begun by another word. In the second case each overrules the other.
    #[must_use]
    pub fn overrules(&self, mine: &Title) -> bool {
        self.lineage == mine.lineage && (self.order > mine.order || self.ties(mine))
    }

    /// Whether two operators began the same term of the same lineage, each on another host.
    #[must_use]
    pub fn ties(&self, mine: &Title) -> bool {
        self.lineage == mine.lineage && self.order.term == mine.order.term && self.word != mine.word
    }
}

/// The identity of one attempt (rule M1). Messages about ownership carry it and count only when all of it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The guest's history.
    pub lineage: Lineage,
    /// The word that began the term of [`Stamp::order`].
    pub word: Word,
    /// The attempt.
    pub attempt: Attempt,
    /// The host that owns when the attempt begins.
    pub source: Host,
    /// The host that is to own.
    pub destination: Host,
    /// The order at which the destination will own: one generation above the source's.
    pub order: Order,
}

impl Stamp {
    /// Whether a message with the stamp `other` is about the same attempt: every field counts (rule M1).
    #[must_use]
    pub fn matches(&self, other: &Stamp) -> bool {
        self == other
    }

    /// What the sender of a PREPARE with this stamp says that it owns; `None` when the order cannot come from a
    /// hand-over.
    #[must_use]
    pub fn owner(&self) -> Option<Title> {
        Some(Title { lineage: self.lineage, order: self.order.before_hand_over()?, word: self.word })
    }
}

/// The other end of an attempt. Its lineage is the record's.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Peer {
    /// Its machine.
    pub host: Host,
    /// Where its migration door was last reached, printable; empty when nobody can dial it (a pipe).
    pub address: Address,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host == Host::NONE {
            // Nobody there knows of owners.
            return write!(f, "the plain NBD server {}", self.address);
        }
        write!(f, "host {:.8}", self.host)?;
        if self.address.is_empty() { Ok(()) } else { write!(f, " at {}", self.address) }
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({self})")
    }
}

/// How far an offer has come (rules M3 and M5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Offer {
    /// The attempt lives in this process; it can still be given.
    Live,
    /// The attempt has ended for good, so that "not given" may be said. The process that offered lives and serves.
    Ended,
    /// The process has restarted since. The attempt died with it, and the guest door is shut until the peer or the
    /// operator has spoken.
    Closed,
}

/// What this host is to the guest's disks. No record is a state too: it owns nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// An attempt ended here: owns nothing, the disks are not usable.
    Void {
        /// The attempt that ended; [`Attempt::NONE`] once the operator has said that what is here may be forgotten. The
        /// order is kept: it goes on proving who owned.
        attempt: Attempt,
    },
    /// Being written by an attempt. Durable before the first byte.
    Receiving {
        /// The attempt.
        attempt: Attempt,
        /// The owner that sends.
        from: Peer,
    },
    /// Complete; waits for GO (rule M2).
    Sealed {
        /// The attempt.
        attempt: Attempt,
        /// The owner that sent.
        from: Peer,
    },
    /// Owns.
    Owner {
        /// The attempt that was settled last: the one that brought the guest, or one that ended here unsealed. After
        /// `claim` or an operator's word a number of its own.
        attempt: Attempt,
    },
    /// Owns, and somebody may be sealed.
    Offered {
        /// The attempt.
        attempt: Attempt,
        /// Who may be sealed.
        to: Peer,
        /// How far it has come.
        offer: Offer,
    },
    /// Gave.
    Given {
        /// The attempt.
        attempt: Attempt,
        /// Who owns, or will with GO.
        to: Peer,
        /// Whether it is known that the guest arrived: GO is repeated until then, also after a restart.
        arrived: bool,
    },
    /// Owned, and was overruled by an operator's word elsewhere (rule M8).
    Superseded {
        /// Who proved it.
        by: Peer,
        /// Two words began one term: neither host owns, and the operator must decide.
        tie: bool,
    },
}

/// The record of one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The guest's history.
    pub lineage: Lineage,
    /// The highest order that this host knows to have been owned.
    pub order: Order,
    /// The word that began the order's term.
    pub word: Word,
    /// The machine that wrote the record. A record from elsewhere owns nothing (rule M7).
    pub host: Host,
    /// The images that it speaks of; [`Images::NONE`] while they are not whole.
    pub images: Images,
    /// The state.
    pub state: State,
}

impl Record {
    /// What this record proves.
    #[must_use]
    pub fn title(&self) -> Title {
        Title { lineage: self.lineage, order: self.order, word: self.word }
    }

    /// The stamp of the attempt that the record is in the middle of; `None` in a state without one.
    #[must_use]
    pub fn stamp(&self) -> Option<Stamp> {
        let (attempt, source, destination) = match &self.state {
            State::Receiving { attempt, from } | State::Sealed { attempt, from } => (*attempt, from.host, self.host),
            State::Offered { attempt, to, .. } | State::Given { attempt, to, .. } => (*attempt, self.host, to.host),
            State::Void { .. } | State::Owner { .. } | State::Superseded { .. } => return None,
        };
        let order = self.order.handed_over()?;
        Some(Stamp { lineage: self.lineage, word: self.word, attempt, source, destination, order })
    }

    /// The attempt that the state names.
    #[must_use]
    pub fn attempt(&self) -> Option<Attempt> {
        match &self.state {
            State::Void { attempt }
            | State::Receiving { attempt, .. }
            | State::Sealed { attempt, .. }
            | State::Owner { attempt }
            | State::Offered { attempt, .. }
            | State::Given { attempt, .. } => Some(*attempt),
            State::Superseded { .. } => None,
        }
    }

    /// Whether the operator has said that what is here may be forgotten (rule M6): as good as no record, for a claim
    /// and for another guest.
    #[must_use]
    pub fn is_forgotten(&self) -> bool {
        matches!(self.state, State::Void { attempt: Attempt::NONE })
    }

    /// The other end that the state names.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        match &self.state {
            State::Receiving { from: peer, .. }
            | State::Sealed { from: peer, .. }
            | State::Offered { to: peer, .. }
            | State::Given { to: peer, .. }
            | State::Superseded { by: peer, .. } => Some(peer),
            State::Void { .. } | State::Owner { .. } => None,
        }
    }

    /// Whether this host owns and serves the guest.
    #[must_use]
    pub fn owns(&self) -> bool {
        matches!(self.state, State::Owner { .. } | State::Offered { offer: Offer::Live | Offer::Ended, .. })
    }

    /// The record as it is told to peers and users.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            title: self.title(),
            kind: Kind::of(Some(self)),
            attempt: self.attempt().unwrap_or(Attempt::NONE),
            peer: self.peer().cloned(),
        }
    }

    /// The same host and lineage in another state.
    fn with(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }
}

/// Who owns, in words: the end of every refusal.
impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = self.order;
        match &self.state {
            State::Void { .. } if self.is_forgotten() => write!(f, "this host owns nothing"),
            State::Void { .. } => write!(f, "this host owns nothing and its disks are half written"),
            State::Receiving { from, .. } => write!(f, "{from} owns the guest (order {order}) and sends it here"),
            State::Sealed { from, .. } => write!(f, "this host is sealed and waits for the word of {from}"),
            State::Owner { .. } => write!(f, "this host owns the guest (order {order})"),
            State::Offered { to, offer: Offer::Closed, .. } => {
                write!(f, "this host offered the guest (order {order}) and waits for the word of {to}")
            }
            State::Offered { to, .. } => {
                write!(f, "this host owns the guest (order {order}) and {to} may be sealed")
            }
            State::Given { to, arrived: true, .. } => write!(f, "this host gave the guest to {to}, where it arrived"),
            State::Given { to, .. } => write!(f, "this host gave the guest to {to}, which has not answered yet"),
            State::Superseded { by, tie: false } => write!(f, "{by} overruled this host (order {order})"),
            State::Superseded { by, tie: true } => {
                write!(f, "nobody owns the guest: this host and {by} were both taken by hand in term {}", order.term)
            }
        }
    }
}

/// A record without its insides: the state's name, as it travels and as the ready line prints it. Numbers are
/// append-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// No record, or one that owns nothing because it is from another machine.
    None,
    /// [`State::Void`].
    Void,
    /// [`State::Receiving`].
    Receiving,
    /// [`State::Sealed`].
    Sealed,
    /// [`State::Owner`].
    Owner,
    /// [`State::Offered`].
    Offered,
    /// [`State::Given`].
    Given,
    /// [`State::Superseded`].
    Superseded,
}

impl Kind {
    /// The kind of a record, or of none.
    #[must_use]
    pub fn of(record: Option<&Record>) -> Self {
        match record.map(|r| &r.state) {
            None => Self::None,
            Some(State::Void { .. }) => Self::Void,
            Some(State::Receiving { .. }) => Self::Receiving,
            Some(State::Sealed { .. }) => Self::Sealed,
            Some(State::Owner { .. }) => Self::Owner,
            Some(State::Offered { .. }) => Self::Offered,
            Some(State::Given { .. }) => Self::Given,
            Some(State::Superseded { .. }) => Self::Superseded,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None | Self::Void => "incoming",
            Self::Receiving => "receiving",
            Self::Sealed => "sealed",
            Self::Owner => "owner",
            Self::Offered => "offered",
            Self::Given => "given",
            Self::Superseded => "superseded",
        })
    }
}

/// What a host tells a peer about its record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Summary {
    /// What it proves.
    pub title: Title,
    /// Its state.
    pub kind: Kind,
    /// The attempt that it names, [`Attempt::NONE`] without one.
    pub attempt: Attempt,
    /// The other end that it names.
    pub peer: Option<Peer>,
}

/// What the guest door must do (the last column of the table in the rules).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    /// Shows sizes, reads, refuses writes.
    Incoming,
    /// The same; the migration door writes.
    Receiving,
    /// The same, and nobody writes.
    Sealed,
    /// Serves the guest. Only an offered guest may be quiesced.
    Serving {
        /// Whether the gate may wait with writes for a switchover (rule D6).
        may_quiesce: bool,
    },
    /// Shut: nobody is let in until the peer or the operator has spoken (rule M5).
    Closed,
    /// Refuses everything but FLUSH and disconnect, and says who owns (rule D6).
    Fenced,
}

impl Door {
    /// The door of a host with this record.
    #[must_use]
    pub fn of(host: Host, record: Option<&Record>) -> Self {
        let Some(record) = record else { return Self::Incoming };
        if record.host != host {
            return Self::Incoming; // M7: a foreign record owns nothing
        }
        match &record.state {
            State::Void { .. } => Self::Incoming,
            State::Receiving { .. } => Self::Receiving,
            State::Sealed { .. } => Self::Sealed,
            State::Owner { .. } => Self::Serving { may_quiesce: false },
            // M5: the living process may let the guest go on; after a restart the door stays shut.
            State::Offered { offer: Offer::Live, .. } => Self::Serving { may_quiesce: true },
            State::Offered { offer: Offer::Ended, .. } => Self::Serving { may_quiesce: false },
            State::Offered { offer: Offer::Closed, .. } => Self::Closed,
            State::Given { .. } | State::Superseded { .. } => Self::Fenced,
        }
    }
}
