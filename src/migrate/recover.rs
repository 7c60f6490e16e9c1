//! `recover`: asks the other host that the record names, and lets the operator do without it (M5, M6, M8).
//!
//! A peer that answers decides. What it says changes the record through the same door as always (`settle.rs`); only
//! when it is silent, or has nothing to say, does the operator's word count. What it may cost is said with it.

use super::settle::{self, Trouble};
use super::wire::Message;
use crate::control::wire::{Recovered, Word, text};
use crate::error::Problem;
use crate::guest::Guest;
use crate::ownership::{
    Event, Heard, KeepError, Offer, Promise, Record, Refusal, State, Why, Word as Number, heard_promise, heard_record,
};
use crate::standing::{Standing, price, price_of_forgetting, ways_out};

/// Whether the attempt that gave the guest away still runs here.
fn is_being_given(guest: &Guest, record: &Record) -> bool {
    let live = guest.source.live_attempt();
    matches!(record.state, State::Given { attempt, .. } if live == Some(attempt))
}

/// Asks, and carries out `word` if the rules let it.
///
/// # Errors
/// The rules refuse the word, or the record cannot be made durable.
pub fn recover(guest: &Guest, word: Word) -> Result<Recovered, Problem> {
    let unknown = |error: &dyn std::fmt::Display| Problem::unknown("recover", &guest.name, error);
    let refused = |cause: &dyn std::fmt::Display| Problem::refused("recover", &guest.name, cause);
    // M4: nothing is asked or said before the record is what is on the disk.
    guest.retry().map_err(|error| unknown(&error))?;
    let before = guest.record().map_err(|error| unknown(&error))?;
    let rejected = guest.rejected();
    let mut told = Recovered::default();
    let heard = match before.as_ref().filter(|record| waits_for_another(&record.state)) {
        Some(record) => ask(guest, record, &mut told),
        None => Heard::Silence,
    };
    let now = guest.record().map_err(|error| unknown(&error))?;
    // Where the peer has just settled it, no word is needed.
    if let Some(event) = event(word, heard).map_err(|error| refused(&error))?
        && before == now
    {
        // Else it would go on telling the other host, and whoever follows it, that this one gave the guest away.
        if word == Word::TakeOwnership && now.as_ref().is_some_and(|record| is_being_given(guest, record)) {
            return Err(refused(&"the hand-over is going on here: again when it has ended, in less than a minute"));
        }
        // W6.
        if let (Word::TakeOwnership, Some((disk, why))) = (word, guest.attached.kept(guest)) {
            return Err(refused(&format_args!("disk {disk} {why}")));
        }
        if let (Word::TakeOwnership, Some(record)) = (word, &now)
            && let Some(why) = guest.images_differ(record).map_err(|cause| refused(&cause))?
        {
            return Err(refused(&why));
        }
        // A full disk refuses the word, and does no more than that.
        guest.write_ahead(&[std::slice::from_ref(&event)]).map_err(|cause| refused(&cause))?;
        let spoken = match word {
            // M5: here, too, a peer that answers decides.
            Word::ForgetPeer if heard == Heard::Decides => {
                Err(KeepError::Refused(Refusal { why: Why::PeerDecides, record: now.clone().map(Box::new) }))
            }
            Word::Forget => guest.destination.forget(guest, &event),
            // What the peer has said since decides, too.
            Word::TakeOwnership => guest.destination.take_over(guest, &event, &now),
            _ => guest.apply_if(&event, &now),
        };
        match spoken {
            Ok(_) => {}
            Err(KeepError::Refused(refusal)) if told.heard.is_empty() => return Err(refused(&refusal)),
            Err(KeepError::Refused(refusal)) => {
                return Err(refused(&format_args!("{refusal}; {}", told.heard)));
            }
            Err(error @ KeepError::Unknown(_)) => return Err(unknown(&error)),
        }
        guest.source.forget_ended();
        // As after GO: what has been loaded here, waits.
        let was_sealed = before.as_ref().is_some_and(|record| matches!(record.state, State::Sealed { .. }));
        let runs = if word == Word::TakeOwnership && was_sealed {
            let runs = guest.destination.run_guest(guest);
            guest.destination.keep_receipt(guest);
            runs
        } else {
            Ok(())
        };
        let shown = rejected.as_ref().map_or("", |(_, shown)| shown);
        let thrown_away = format!("the record that counted for nothing is thrown away: {shown}");
        told.done = text(match word {
            Word::TakeOwnership if runs.is_err() => {
                "this host owns the guest from now on; its VMM does not let it run, and the log says why"
            }
            Word::TakeOwnership => "this host owns the guest from now on",
            Word::ForgetPeer => "the other host is not waited for any more: this host owns the guest",
            Word::Forget if rejected.is_some() => &thrown_away,
            Word::Forget => "what was here is given up",
            Word::Ask => "",
        });
        let price = before.as_ref().and_then(|record| match word {
            Word::TakeOwnership | Word::ForgetPeer => price(&record.state),
            Word::Forget => price_of_forgetting(&guest.name, &record.state),
            Word::Ask => None,
        });
        if let Some((lose, never)) = price {
            told.may_lose = text(&lose);
            told.never_take = text(&never);
        }
    }
    let record = guest.record();
    told.ownership = Standing { guest: &guest.name, record: &record, rejected: guest.rejected() }.ownership();
    if told.done.is_empty() {
        told.next = match &record {
            Ok(Some(record)) if !told.ownership.rejected => {
                ways_out(&guest.name, record).iter().map(|way| text(way)).collect()
            }
            _ => Some(told.ownership.next.clone()).into_iter().filter(|next| !next.is_empty()).collect(),
        };
    }
    Ok(told)
}

/// Whether another host could say something that settles the record, or is known to own.
fn waits_for_another(state: &State) -> bool {
    match state {
        State::Offered { offer, .. } => *offer != Offer::Live,
        State::Sealed { .. } | State::Given { .. } | State::Superseded { .. } => true,
        State::Void { .. } | State::Receiving { .. } | State::Owner { .. } => false,
    }
}

/// Asks the peer. What it says has changed the record when this returns.
fn ask(guest: &Guest, record: &Record, told: &mut Recovered) -> Heard {
    if let Some(peer) = record.peer() {
        told.asked = text(&peer.to_string());
    }
    let (heard, words) = match settle::call(guest) {
        Ok(answer) => judge(record, &answer),
        Err(Trouble::Silent(cause)) => (Heard::Silence, format!("no answer: {cause}")),
        Err(Trouble::NotDurable(cause)) => (Heard::Decides, format!("it answers, and here {cause}")),
    };
    told.heard = text(&words);
    heard
}

/// What an answer means for the operator's word (M8), and in words.
fn judge(mine: &Record, answer: &Message) -> (Heard, String) {
    let (heard, words) = match answer {
        Message::Go { .. } => (Heard::Decides, "it has given the guest to this host"),
        Message::Running { .. } => (Heard::Decides, "it owns the guest"),
        Message::Unsealed { .. } => (Heard::Decides, "it has given up what it had received"),
        Message::Promise { promise, .. } => {
            let words = match promise {
                Promise::Unknown => "it does not know the attempt",
                Promise::NotGiven => "it has not given the guest away",
                Promise::InProgress => "the migration is in progress",
                Promise::Given => "it gave the guest away",
            };
            (heard_promise(*promise), words)
        }
        Message::Record { record: None, .. } => (heard_record(mine, None), "it has no record of the guest"),
        // It speaks of another guest, and says nothing of this one.
        Message::Record { record: Some(theirs), .. } if theirs.title.lineage != mine.lineage => {
            (Heard::Silence, "its guest has another history")
        }
        Message::Record { record: Some(theirs), .. } => {
            let words = format!("its record says {} (order {})", theirs.kind, theirs.title.order);
            return (heard_record(mine, Some(theirs)), words);
        }
        _ => (Heard::Decides, "it says something else"),
    };
    (heard, words.to_owned())
}

/// The operator's word as the record takes it; asking is none.
fn event(word: Word, heard: Heard) -> Result<Option<Event>, getrandom::Error> {
    Ok(match word {
        Word::Ask => None,
        Word::TakeOwnership => Some(Event::Take { word: Number::random()?, heard }),
        Word::ForgetPeer => Some(Event::ForgetPeer),
        Word::Forget => Some(Event::Forget { heard }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{
        Attempt, Host, Images, Instance, Kind, Lineage, Order, Peer, Stamp, Summary, Title, Word as Number,
    };

    #[test]
    fn only_who_cannot_own_leaves_it_to_the_operator() {
        let lineage = Lineage([1; 16]);
        let order = Order { term: 1, generation: 4 };
        let (attempt, host) = (Attempt([3; 16]), Host([4; 16]));
        let to = Peer { host: Host([5; 16]), address: crate::ownership::Address::new() };
        let state = State::Given { attempt, to, arrived: false };
        let mine = Record { lineage, order, word: Number([2; 16]), host, images: Images::NONE, state };
        let stamp = mine.stamp().expect("given");
        let record = |lineage, attempt, kind| {
            let title = Title { lineage, order, word: stamp.word };
            Message::Record { stamp, record: Some(Summary { title, kind, attempt, peer: None }) }
        };
        let promise = |promise| Message::Promise { stamp, promise };
        let other = Stamp { attempt: Attempt([7; 16]), ..stamp };
        for (heard, answers) in [
            (Heard::Disclaims, vec![promise(Promise::Unknown), record(lineage, attempt, Kind::Void)]),
            (
                // It owned perhaps, and has passed the guest on since.
                Heard::Silence,
                vec![
                    Message::Record { stamp, record: None },
                    record(Lineage([9; 16]), attempt, Kind::Owner),
                    record(lineage, other.attempt, Kind::Void),
                    record(lineage, attempt, Kind::Superseded),
                ],
            ),
            (
                Heard::Decides,
                vec![
                    promise(Promise::Given),
                    promise(Promise::NotGiven),
                    promise(Promise::InProgress),
                    Message::Go { stamp },
                    Message::Unsealed { stamp },
                    Message::Running { stamp, instance: Instance([6; 16]) },
                    record(lineage, attempt, Kind::Owner),
                    record(lineage, attempt, Kind::Offered),
                    record(lineage, attempt, Kind::Given),
                    record(lineage, attempt, Kind::Sealed),
                    record(lineage, attempt, Kind::Receiving),
                ],
            ),
        ] {
            for answer in answers {
                assert_eq!(judge(&mine, &answer).0, heard, "{answer:?}");
            }
        }
    }
}
