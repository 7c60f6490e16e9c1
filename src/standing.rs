//! Who owns a guest, in the words of the control door: what a record means to whoever asks.
//!
//! Pure. Asked by the process that serves the guest, and by `who-owns` for a state directory that no process holds.

use crate::control::wire::{Kept, Owner, Ownership, Receipt as Told, State as Shown, Verify, text};
use crate::digest::Verified;
use crate::ownership::{Host, KeepError, Kind, Offer, Peer, Receipt, Record, State};

/// What is known of a guest on this host.
#[derive(Debug)]
pub struct Standing<'a> {
    /// The guest.
    pub guest: &'a str,
    /// The record, if it is known and counts.
    pub record: &'a Result<Option<Record>, KeepError>,
    /// Why there is one that does not count, and what there is of it.
    pub rejected: Option<(String, String)>,
}

/// A receipt as the control door tells it.
#[must_use]
pub fn kept(receipt: &Receipt) -> Kept {
    Kept {
        receipt: Told {
            verify: match receipt.verified {
                Verified::Nothing => Verify::None,
                Verified::Written => Verify::Written,
                Verified::Full => Verify::Full,
            },
            verified_bytes: receipt.verified_bytes,
            unread_bytes: receipt.unread_bytes,
            root: receipt.root,
            term: u64::from(receipt.order.term),
            generation: receipt.order.generation,
        },
        attempt: u128::from_be_bytes(receipt.attempt.0),
        lineage: u128::from_be_bytes(receipt.lineage.0),
        gave: receipt.gave,
        peer: text(&receipt.peer.to_string()),
        sent_bytes: receipt.sent_bytes,
        equal_bytes: receipt.equal_bytes,
    }
}

impl Standing<'_> {
    /// The state's name.
    #[must_use]
    pub fn state(&self) -> Shown {
        match self.record.as_ref().map(|record| Kind::of(record.as_ref())) {
            Err(_) => Shown::Unknown,
            Ok(Kind::None | Kind::Void) => Shown::Incoming,
            Ok(Kind::Receiving) => Shown::Receiving,
            Ok(Kind::Sealed) => Shown::Sealed,
            Ok(Kind::Owner) => Shown::Owner,
            Ok(Kind::Offered) => Shown::Offered,
            Ok(Kind::Given) => Shown::Given,
            Ok(Kind::Superseded) => Shown::Superseded,
        }
    }

    /// Who owns.
    #[must_use]
    pub fn ownership(&self) -> Ownership {
        let guest = self.guest;
        let told = |owner, words: &str, next: &str| Ownership {
            guest: text(guest),
            state: self.state(),
            owner,
            text: text(words),
            next: text(next),
            ..Ownership::default()
        };
        if let Some((why, shown)) = &self.rejected {
            let next = format!("blockferry claim {guest} --discard-record shows that record and throws it away");
            let told = told(Owner::Unknown, &format!("this host owns nothing: the record here {why}"), &next);
            return Ownership { record: text(shown), rejected: true, ..told };
        }
        let record = match self.record {
            Ok(Some(record)) => record,
            Ok(None) => return told(Owner::Unknown, "this host owns nothing", &next(guest, None)),
            Err(error) => return told(Owner::Unknown, &error.to_string(), &format!("blockferry recover {guest}")),
        };
        let peer = record.peer();
        Ownership {
            term: u64::from(record.order.term),
            generation: record.order.generation,
            host: peer.map_or(0, |peer| u128::from_be_bytes(peer.host.0)),
            address: peer.map(|peer| peer.address.clone()).unwrap_or_default(),
            record: text(&crate::ownership::show(record)),
            ..told(owner(&record.state), &record.to_string(), &next(guest, Some(record)))
        }
    }
}

/// Who owns by a record of this state.
fn owner(state: &State) -> Owner {
    match state {
        State::Owner { .. } | State::Offered { offer: Offer::Live | Offer::Ended, .. } => Owner::Here,
        State::Receiving { .. } | State::Given { arrived: true, .. } | State::Superseded { tie: false, .. } => {
            Owner::Elsewhere
        }
        State::Void { .. }
        | State::Sealed { .. }
        | State::Offered { offer: Offer::Closed, .. }
        | State::Given { arrived: false, .. }
        | State::Superseded { tie: true, .. } => Owner::Unknown,
    }
}

/// What to type, for whoever finds the guest with this record, or with none.
fn next(guest: &str, record: Option<&Record>) -> String {
    let Some(record) = record.filter(|record| !record.is_forgotten()) else {
        return format!("a migration brings the guest, or blockferry claim {guest} makes this host the owner");
    };
    match &record.state {
        State::Void { .. } => format!("a migration brings the guest; blockferry recover {guest} --forget gives it up"),
        State::Sealed { .. }
        | State::Offered { offer: Offer::Closed, .. }
        | State::Given { arrived: false, .. }
        | State::Superseded { .. } => format!("blockferry recover {guest}"),
        State::Owner { .. } | State::Offered { .. } | State::Receiving { .. } | State::Given { .. } => String::new(),
    }
}

/// What is left to do when the other host has not settled it, and where.
#[must_use]
pub fn ways_out(guest: &str, record: &Record) -> Vec<String> {
    let wait = |peer: &Peer| format!("on {peer}, if it can be started: blockferry serve {guest}; it settles by itself");
    let there =
        |peer: &Peer| format!("if it runs and cannot be reached from here, on {peer}: blockferry recover {guest}");
    let gone = |word: &str| format!("only if that host is gone for good, here: blockferry recover {guest} --{word}");
    match &record.state {
        State::Sealed { from: peer, .. } | State::Given { to: peer, arrived: false, .. } => {
            vec![wait(peer), there(peer), gone("take-ownership")]
        }
        State::Offered { to, offer: Offer::Ended | Offer::Closed, .. } => {
            vec![wait(to), there(to), gone("forget-peer")]
        }
        // Of a plain server nobody knows anything, and nobody has to.
        State::Given { to, .. } if to.host == Host::NONE => {
            vec![format!(
                "only once nobody uses that export any more, here: blockferry recover {guest} --take-ownership"
            )]
        }
        State::Given { to, .. } => vec![format!("on {to}: blockferry who-owns {guest}"), gone("take-ownership")],
        State::Superseded { by, tie: false } => {
            vec![format!("on {by}: blockferry who-owns {guest}"), gone("take-ownership")]
        }
        State::Superseded { tie: true, .. } => {
            vec![format!(
                "choose one of the two hosts, and type only there: blockferry recover {guest} --take-ownership"
            )]
        }
        State::Void { .. } => vec![next(guest, Some(record))],
        State::Owner { .. } | State::Offered { .. } | State::Receiving { .. } => Vec::new(),
    }
}

/// The same for who gives up what is here.
#[must_use]
pub fn price_of_forgetting(guest: &str, state: &State) -> Option<(String, String)> {
    match state {
        State::Given { to, .. } => Some((
            "nothing that the other host has".to_owned(),
            format!("this host by 'blockferry claim {guest}', unless {to} is gone for good: there would be two owners"),
        )),
        State::Sealed { from, .. } => Some((
            format!("all of it, if {from} has given it away and its disks are gone"),
            format!("this host by 'blockferry claim {guest}': what it has may be half of a guest"),
        )),
        _ => None,
    }
}

/// What the guest may lose when this host is taken in this state, and which host must never be.
#[must_use]
pub fn price(state: &State) -> Option<(String, String)> {
    let two = "if it owns the guest and is only switched off, there are two owners until the two hosts meet";
    match state {
        State::Given { to, .. } if to.host == Host::NONE => Some((
            format!("what was written to {to} since it was given away"),
            format!("{to}: it never hears that this host owns again, and takes whatever is written there"),
        )),
        State::Sealed { from, .. } => {
            Some((format!("what the guest wrote on {from} after this host was sealed"), format!("{from}: {two}")))
        }
        State::Given { to, .. } => {
            Some((format!("what the guest wrote on {to} since it was given away"), format!("{to}: {two}")))
        }
        State::Offered { to, .. } => Some((format!("nothing, unless {to} was taken by hand"), to.to_string())),
        State::Superseded { by, .. } => Some((format!("what the guest wrote on {by}"), format!("{by}: {two}"))),
        State::Void { .. } | State::Receiving { .. } | State::Owner { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{Address, Attempt, Images, Lineage, Order, Word};

    fn record(state: State) -> Record {
        let order = Order { term: 1, generation: 4 };
        let (lineage, word, host) = (Lineage([1; 16]), Word([2; 16]), Host([0xaa; 16]));
        Record { lineage, order, word, host, images: Images::NONE, state }
    }

    fn every_state() -> [(&'static str, State); 11] {
        let attempt = Attempt([4; 16]);
        let peer = || Peer { host: Host([0xbb; 16]), address: Address::try_from("tcp://b:1").expect("fits") };
        let offered = |offer| State::Offered { attempt, to: peer(), offer };
        let given = |arrived| State::Given { attempt, to: peer(), arrived };
        [
            ("unknown recover", State::Void { attempt }),
            ("elsewhere", State::Receiving { attempt, from: peer() }),
            ("unknown recover", State::Sealed { attempt, from: peer() }),
            ("here", State::Owner { attempt }),
            ("here", offered(Offer::Live)),
            ("here", offered(Offer::Ended)),
            ("unknown recover", offered(Offer::Closed)),
            ("unknown recover", given(false)),
            ("elsewhere", given(true)),
            ("elsewhere recover", State::Superseded { by: peer(), tie: false }),
            ("unknown recover", State::Superseded { by: peer(), tie: true }),
        ]
    }

    fn ownership(record: Option<Record>) -> Ownership {
        Standing { guest: "g1", record: &Ok(record), rejected: None }.ownership()
    }

    #[test]
    fn every_state_says_who_owns_and_what_to_type() {
        for (said, state) in every_state() {
            let told = ownership(Some(record(state.clone())));
            let recover = if told.next.contains("blockferry recover g1") { " recover" } else { "" };
            assert_eq!(format!("{}{recover}", told.owner.word()), said, "{state:?}");
            assert_eq!((told.term, told.generation), (1, 4));
            assert!(told.record.contains(told.text.as_str()), "{}", told.record);
            if told.owner == Owner::Elsewhere {
                assert!(told.host != 0 && told.text.contains("host bbbbbbbb at tcp://b:1"), "{}", told.text);
            }
        }
    }

    #[test]
    fn nothing_and_what_counts_for_nothing_say_what_to_type() {
        let none = ownership(None);
        assert_eq!((none.owner, none.text.as_str()), (Owner::Unknown, "this host owns nothing"));
        assert!(none.next.contains("blockferry claim g1 "));
        let forgotten = ownership(Some(record(State::Void { attempt: Attempt::NONE })));
        assert_eq!((forgotten.text, forgotten.next), (none.text, none.next));
        let rejected = Some(("is broken: its checksum is wrong".to_owned(), "99 bytes".to_owned()));
        let told = Standing { guest: "g1", record: &Ok(None), rejected }.ownership();
        assert_eq!(told.text, "this host owns nothing: the record here is broken: its checksum is wrong");
        assert!(
            told.next.contains("blockferry claim g1 --discard-record") && told.rejected && told.record == "99 bytes"
        );
        let unknown = Err(KeepError::Unknown("No space left on device".to_owned()));
        let told = Standing { guest: "g1", record: &unknown, rejected: None }.ownership();
        assert_eq!((told.state, told.next.as_str()), (Shown::Unknown, "blockferry recover g1"));
    }

    #[test]
    fn of_a_plain_server_nobody_asks_who_owns() {
        let to = Peer { host: Host::NONE, address: Address::try_from("nbd://c").expect("fits") };
        let given = State::Given { attempt: Attempt([4; 16]), to, arrived: true };
        let ways = ways_out("g1", &record(given.clone()));
        assert!(ways.len() == 1 && ways[0].ends_with(", here: blockferry recover g1 --take-ownership"), "{ways:?}");
        assert!(price(&given).expect("a price").1.contains("it never hears that this host owns again"));
    }

    #[test]
    fn a_long_way_to_a_host_cuts_no_command_off() {
        let longest = "x".repeat(crate::limits::PLACE_MAX);
        let to = Peer { host: Host([0xff; 16]), address: Address::try_from(longest.as_str()).expect("fits") };
        let guest = "g".repeat(crate::limits::GUEST_NAME_MAX);
        for state in [
            State::Given { attempt: Attempt([4; 16]), to: to.clone(), arrived: true },
            State::Given { attempt: Attempt([4; 16]), to: to.clone(), arrived: false },
            State::Offered { attempt: Attempt([4; 16]), to: to.clone(), offer: Offer::Closed },
            State::Sealed { attempt: Attempt([4; 16]), from: to.clone() },
            State::Superseded { by: to, tie: false },
        ] {
            let record = record(state.clone());
            let words = |text: &str| assert!(text.len() <= crate::limits::WORDS_MAX, "{}: {text}", text.len());
            words(&record.to_string());
            ways_out(&guest, &record).iter().for_each(|way| words(way));
            let prices = [price(&state), price_of_forgetting(&guest, &state)];
            prices.into_iter().flatten().for_each(|(lose, never)| [lose, never].iter().for_each(|text| words(text)));
        }
    }

    #[test]
    fn whoever_waits_is_told_every_way_out_and_whoever_takes_the_price() {
        for (_, state) in every_state() {
            let ways = ways_out("g1", &record(state.clone()));
            let quiet = matches!(
                state,
                State::Owner { .. } | State::Receiving { .. } | State::Offered { offer: Offer::Live, .. }
            );
            assert_eq!(ways.is_empty(), quiet, "{state:?}");
            assert!(ways.len() <= crate::limits::NEXT_STEPS_MAX && ways.iter().all(|way| way.contains("blockferry ")));
            if let Some((lose, never)) = price(&state) {
                assert!(never.starts_with("host bbbbbbbb at tcp://b:1"), "{never}");
                assert!(lose.contains("host bbbbbbbb"), "{lose}");
            }
        }
        let sealed = &every_state()[2].1;
        assert_eq!(
            ways_out("g1", &record(sealed.clone())),
            [
                "on host bbbbbbbb at tcp://b:1, if it can be started: blockferry serve g1; it settles by itself",
                "if it runs and cannot be reached from here, on host bbbbbbbb at tcp://b:1: blockferry recover g1",
                "only if that host is gone for good, here: blockferry recover g1 --take-ownership",
            ]
        );
    }
}
