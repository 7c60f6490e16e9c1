//! How a state is reached, in words: the moves, and what each changes.

use blockferry::ownership::{Attempt, Heard, Host, Offer, Record, State};
use std::fmt;
use std::fmt::Write as _;

use super::book::{Book, index, try_of};
use super::model::{Bounds, End, Move, Moves, What};
use super::world::{GARBAGE, Message, World};

/// Tells the moves that lead from each of these worlds to the next.
pub(crate) fn tell(book: &mut Book, bounds: &Bounds, path: &[World]) -> String {
    let mut story = String::new();
    for (number, pair) in path.windows(2).enumerate() {
        let (before, after) = (&pair[0], &pair[1]);
        let moves = Moves::of(book, bounds, *before, Vec::new()).found;
        let step = moves.iter().find(|(_, world)| world == after).map(|(step, _)| step);
        writeln!(story, "{:>4}. {}", number + 1, step.expect("this is how it was found")).expect("a string");
        for line in changes(book, bounds, before, after) {
            writeln!(story, "        {line}").expect("a string");
        }
    }
    story
}

/// What a move has changed that a reader wants to see.
fn changes(book: &Book, bounds: &Bounds, before: &World, after: &World) -> Vec<String> {
    let mut lines = Vec::new();
    for host in 0..bounds.hosts {
        let (was, is) = (before.hosts[host], after.hosts[host]);
        if was.record != is.record {
            let seen = if is.record == is.durable { "" } else { ", not durable" };
            let (from, to) = (describe(book.record(was.record)), describe(book.record(is.record)));
            lines.push(format!("{}: {from} -> {to}{seen}", name(host)));
        }
        if was.content != is.content {
            let content =
                if is.content == GARBAGE { "half written".to_owned() } else { format!("write {}", is.content) };
            lines.push(format!("{}: the disks hold {content}", name(host)));
        }
    }
    lines
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Write(host) => write!(f, "the guest writes at {}", name(host)),
            What::Start { try_, source, destination } => {
                write!(f, "{} begins attempt #{} to {}", name(source), try_ + 1, name(destination))
            }
            What::FinalPass { try_, source } => {
                write!(f, "{} quiesces, makes the final pass, sends SEAL #{}", name(source), try_ + 1)
            }
            What::Cancel(host) => write!(f, "{} ends its attempt", name(host)),
            What::EndUndriven(host) => write!(f, "{} ends the offer that nobody drives", name(host)),
            What::OpenGate(host) => write!(f, "{} opens its gates, the attempt goes on", name(host)),
            What::Receive(message, try_, host) => {
                let message = match message {
                    Message::NotGiven => "\"not given\"".to_owned(),
                    Message::Question => "the question".to_owned(),
                    other => format!("{other:?}").to_uppercase(),
                };
                write!(f, "{} receives {message} #{}", name(host), try_ + 1)
            }
            What::GiveUp(host) => write!(f, "{} gives its reception up", name(host)),
            What::Meet { host, peer } => write!(f, "{} hears the title of {}", name(host), name(peer)),
            What::Crash(host) => write!(f, "the process on {} dies", name(host)),
            What::PowerLoss(host) => write!(f, "{} loses power: what is not durable is undone", name(host)),
            What::Restart(host) => write!(f, "{} starts again", name(host)),
            What::Retry(host) => write!(f, "{} makes its record durable after all", name(host)),
            What::Sync(host) => write!(f, "the record of {} becomes durable", name(host)),
            What::Take(host, heard) => {
                write!(f, "operator on {}: recover --take-ownership ({})", name(host), said(heard))
            }
            What::ForgetPeer(host) => write!(f, "operator on {}: recover --forget-peer", name(host)),
            What::Forget(host, heard) => write!(f, "operator on {}: recover --forget ({})", name(host), said(heard)),
            What::Claim(host) => write!(f, "operator on {}: claim", name(host)),
            What::Copied(host, to) => {
                write!(f, "disks and state directory of {} are copied to {}", name(host), name(to))
            }
            What::Lost(host) => write!(f, "the state directory of {} is lost", name(host)),
        }?;
        match self.end {
            End::Done => Ok(()),
            End::CutShort => f.write_str("; the process dies inside the commit"),
            End::Failed => f.write_str("; the commit fails"),
        }
    }
}

fn said(heard: Heard) -> &'static str {
    match heard {
        Heard::Silence => "the peer is silent",
        Heard::Disclaims => "the peer owns nothing",
        Heard::Decides => "the peer decides",
    }
}

/// A record in words: the state, the order, the other end.
pub(crate) fn describe(record: Option<&Record>) -> String {
    let Some(record) = record else { return "no record".to_owned() };
    let number = |attempt: &Attempt| try_of(*attempt).map_or("by word".to_owned(), |try_| format!("#{}", try_ + 1));
    let state = match &record.state {
        State::Void { attempt } => format!("VOID({})", number(attempt)),
        State::Receiving { attempt, from } => format!("RECEIVING({} from {})", number(attempt), letter(from.host)),
        State::Sealed { attempt, from } => format!("SEALED({} from {})", number(attempt), letter(from.host)),
        State::Owner { attempt } => format!("OWNER({})", number(attempt)),
        State::Offered { attempt, to, offer } => {
            let offer = match offer {
                Offer::Live => "live",
                Offer::Ended => "ended",
                Offer::Closed => "closed",
            };
            format!("OFFERED({} to {}, {offer})", number(attempt), letter(to.host))
        }
        State::Given { attempt, to, arrived } => {
            let arrived = if *arrived { ", arrived" } else { "" };
            format!("GIVEN({} to {}{arrived})", number(attempt), letter(to.host))
        }
        State::Superseded { by, tie } => {
            format!("SUPERSEDED(by {}{})", letter(by.host), if *tie { ", tie" } else { "" })
        }
    };
    format!("{state} {}", record.order)
}

/// A host's name.
pub(crate) fn letter(host: Host) -> char {
    name(index(host))
}

/// A host's name.
pub(crate) fn name(host: usize) -> char {
    ['A', 'B', 'C'][host]
}
