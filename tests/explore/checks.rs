//! What must be true, in every state and of every state.
//!
//! - **One owner.** At most one guest door is open. The residue of M8 is the only exception, and is this: a word was
//!   given *against silence* while somebody else served, slept as an owner, or was sealed with GO on its way. For a
//!   sealed host even that is narrower: only a source that *lives*, cut off, may make two, for one that restarts stays
//!   shut (M5). And even then the two fence each other as soon as they meet, so that at most one goes on.
//! - **No write lost.** Who serves has the last write that was acknowledged to the guest; whoever does not is overruled
//!   by a record somewhere, and was when it lost it. What a word against silence gives up is not lost: the operator was
//!   told. Nobody ever serves disks that are half written.
//! - **A way out.** From every state a way leads to exactly one owner and nobody sealed, offered or receiving: without
//!   the operator, unless two words or a `--forget` of a sealed host against silence, or a lost record, made that
//!   impossible; then with one word more.

use blockferry::ownership::State;
use std::fmt;

use super::book::{Act, Book, Outcome};
use super::model::{Bounds, is_overruled, is_serving};
use super::story::name;
use super::world::{GARBAGE, World};

/// What is wrong with a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wrong {
    /// Two guest doors are open.
    TwoOwners(usize, usize),
    /// Two guest doors are open and stay so when the hosts meet.
    Unfenced(usize, usize),
    /// Who serves lacks a write that was acknowledged.
    LostWrite(usize),
    /// Who serves has disks that are half written.
    HalfWritten(usize),
    /// A word that the peer agreed to lost a write.
    LostByWord,
    /// No way leads to exactly one owner.
    NoWayOut,
}

impl Wrong {
    /// The same, whoever it is about.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::TwoOwners(..) => "two owners",
            Self::Unfenced(..) => "unfenced",
            Self::LostWrite(_) => "lost write",
            Self::HalfWritten(_) => "half written",
            Self::LostByWord => "lost by word",
            Self::NoWayOut => "no way out",
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TwoOwners(one, two) => write!(f, "two owners: {} and {}", name(one), name(two)),
            Self::Unfenced(one, two) => {
                write!(f, "two owners, {} and {}, that do not fence each other when they meet", name(one), name(two))
            }
            Self::LostWrite(host) => write!(f, "{} serves, and lacks a write that was acknowledged", name(host)),
            Self::HalfWritten(host) => write!(f, "{} serves disks that are half written", name(host)),
            Self::LostByWord => f.write_str("a word that the peer agreed to lost a write"),
            Self::NoWayOut => f.write_str("no way leads to exactly one owner"),
        }
    }
}

/// What is wrong with this state, by itself.
pub(crate) fn check(book: &mut Book, bounds: &Bounds, world: &World) -> Option<Wrong> {
    for host in (0..bounds.hosts).filter(|&host| is_serving(book, world, host)) {
        let content = world.hosts[host].content;
        if content == GARBAGE {
            return Some(Wrong::HalfWritten(host));
        }
        if content != world.truth && !is_overruled(book, bounds, world, host) {
            return Some(Wrong::LostWrite(host));
        }
    }
    let serving: Vec<usize> = (0..bounds.hosts).filter(|&host| is_serving(book, world, host)).collect();
    for (nth, &one) in serving.iter().enumerate() {
        for &two in &serving[nth + 1..] {
            if !world.marks.residue {
                return Some(Wrong::TwoOwners(one, two));
            }
            if goes_on(book, world, one, two) && goes_on(book, world, two, one) {
                return Some(Wrong::Unfenced(one, two));
            }
        }
    }
    world.marks.lost.then_some(Wrong::LostByWord)
}

/// Whether a host serves on when it has met another one.
fn goes_on(book: &mut Book, world: &World, host: usize, other: usize) -> bool {
    let Some(theirs) = book.record(world.hosts[other].record) else { return true };
    let title = theirs.title();
    let meet = Act::Meet(book.title_number(other, title));
    let mut met = *world;
    if let Outcome::Step { record, .. } = book.next(host, world.hosts[host].record, meet) {
        met.hosts[host].record = record;
    }
    is_serving(book, &met, host)
}

/// Whether everything has come to its end: exactly one owner, and nobody waits for anybody.
pub(crate) fn is_settled(book: &Book, bounds: &Bounds, world: &World) -> bool {
    let mut owners = 0;
    for host in 0..bounds.hosts {
        let node = world.hosts[host];
        match book.state(host, node.record) {
            _ if !node.is_awake() || node.job.is_some() => return false,
            Some(State::Owner { .. }) => owners += 1,
            Some(State::Offered { .. } | State::Sealed { .. } | State::Receiving { .. }) => return false,
            Some(State::Void { .. } | State::Given { .. } | State::Superseded { .. }) | None => {}
        }
    }
    owners == 1
}

/// Whether the way out may need one word more.
pub(crate) fn may_need_a_word(world: &World) -> bool {
    world.marks.orphaned || world.marks.bereft || world.words >= 2
}
