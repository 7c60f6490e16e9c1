//! The one function that changes a record.
//!
//! [`next`] looks at this host, its record and an event, and says what the record becomes and what the peer is told.
//! The caller commits the change, and only when it is durable does it send the answer or act on it (rule M4).
//! Repeats of a message are answered again and change nothing; a repeat of a dead attempt revives nothing.

use std::cmp::Ordering;

use super::{
    Answer, Attempt, Change, Event, Heard, Host, Images, Kind, Lineage, Offer, Order, Peer, Promise, Record, Refusal,
    Stamp, State, Step, Summary, Title, Why, Word,
};

/// M3. `live` is the attempt that this process is in the middle of, which the record may not name yet.
#[must_use]
pub fn promise(host: Host, record: Option<&Record>, live: Option<Attempt>, asked: &Stamp) -> Promise {
    let Some(record) = record else { return Promise::Unknown };
    if record.host != host || record.lineage != asked.lineage || asked.source != host || record.is_forgotten() {
        return Promise::Unknown;
    }
    match &record.state {
        State::Given { attempt, .. } | State::Offered { attempt, .. }
            if *attempt == asked.attempt && record.stamp().as_ref() != Some(asked) =>
        {
            Promise::Unknown // M1: the same attempt in other words is nobody's
        }
        State::Given { attempt, .. } if *attempt == asked.attempt => Promise::Given,
        State::Offered { attempt, offer: Offer::Live, .. } if *attempt == asked.attempt => Promise::InProgress,
        State::Offered { attempt, .. } if *attempt == asked.attempt => Promise::NotGiven,
        _ if live == Some(asked.attempt) => Promise::InProgress,
        _ => Promise::NotGiven,
    }
}

/// M8: what the record that a peer shows means for a word of the operator on a host with the record `mine`.
///
/// That a peer owns nothing says little: it may have owned, given the guest on, and received half of it since; it may
/// have been told to forget; who overruled this host may only have passed the proof on. So only two peers disclaim: the
/// one that this host gave to, if that very attempt ended there before GO; and the other side of a tie, fenced too.
#[must_use]
pub fn heard_record(mine: &Record, theirs: Option<&Summary>) -> Heard {
    let Some(theirs) = theirs else { return Heard::Silence };
    match (&mine.state, theirs.kind) {
        (_, Kind::Receiving | Kind::Sealed | Kind::Owner | Kind::Offered | Kind::Given) => Heard::Decides,
        (State::Given { attempt, .. }, Kind::Void) if theirs.attempt == *attempt && theirs.title == mine.title() => {
            Heard::Disclaims
        }
        (State::Superseded { tie: true, .. }, Kind::Superseded) if theirs.title.ties(&mine.title()) => Heard::Disclaims,
        (_, Kind::None | Kind::Void | Kind::Superseded) => Heard::Silence,
    }
}

/// M8, M3: what the promise of the source means for a word of the operator on a sealed host.
#[must_use]
pub fn heard_promise(promise: Promise) -> Heard {
    match promise {
        Promise::Unknown => Heard::Disclaims,
        Promise::Given | Promise::InProgress | Promise::NotGiven => Heard::Decides,
    }
}

/// What becomes of `record` on this host when `event` happens.
///
/// # Errors
/// A [`Refusal`]: the event does not apply, nothing changes. Messages about an attempt that a destination does not
/// hold are not refused but answered with [`Answer::Record`].
pub fn next(host: Host, record: Option<&Record>, event: &Event) -> Result<Step, Refusal> {
    let outcome = match record {
        Some(record) if record.host != host => foreign(host, event),
        _ => step(host, record, event),
    };
    outcome.map_err(|why| Refusal { why, record: record.cloned().map(Box::new) })
}

fn step(host: Host, record: Option<&Record>, event: &Event) -> Result<Step, Why> {
    match event {
        Event::Restart => Ok(restart(record)),
        Event::Claim { lineage, word, images, .. } => match record {
            // M7: once, where there is no record.
            Some(record) if !record.is_forgotten() => Err(Why::Exists),
            _ => Ok(claim(host, *lineage, *word, *images)),
        },
        Event::Take { word, heard } => take(record.ok_or(Why::NoRecord)?, *word, *heard),
        Event::ForgetPeer => forget_peer(record.ok_or(Why::NoRecord)?),
        Event::Forget { heard } => forget(record.ok_or(Why::NoRecord)?, *heard),
        Event::Prepare { stamp, from, fresh } => prepare(host, record, stamp, from, *fresh),
        Event::AbortReceiving { attempt } => abort_receiving(record.ok_or(Why::NoRecord)?, *attempt),
        Event::Seal { stamp, images } => Ok(seal(record, stamp, *images)),
        Event::Go(stamp) => Ok(go(record, stamp)),
        Event::Abort(stamp) => abort(host, record, stamp),
        Event::NotGiven(stamp) => not_given(record.ok_or(Why::NoRecord)?, stamp),
        Event::Offer { stamp, to } => offer(record.ok_or(Why::NoRecord)?, stamp, to),
        Event::End { attempt } => end(record.ok_or(Why::NoRecord)?, *attempt),
        Event::Give { sealed } => give(record.ok_or(Why::NoRecord)?, sealed),
        Event::Unsealed(stamp) => unsealed(record.ok_or(Why::NoRecord)?, stamp),
        Event::Running(stamp) => running(record.ok_or(Why::NoRecord)?, stamp),
        Event::Meet { title, peer } => Ok(record.map_or_else(|| keep(Answer::Silent), |r| meet(r, title, peer))),
    }
}

fn keep(answer: Answer) -> Step {
    Step { change: Change::Keep, answer }
}

fn becomes(record: Record, answer: Answer) -> Step {
    Step { change: Change::Become(Box::new(record)), answer }
}

// ---- this host ---------------------------------------------------------------------------------------------------

/// M7: a record of another machine owns nothing. It can be thrown away by name, and nothing else.
fn foreign(host: Host, event: &Event) -> Result<Step, Why> {
    match event {
        Event::Claim { lineage, word, images, discard: true } => Ok(claim(host, *lineage, *word, *images)),
        Event::Forget { .. } => Ok(Step { change: Change::Remove, answer: Answer::Silent }),
        Event::Restart | Event::Meet { .. } => Ok(keep(Answer::Silent)),
        _ => Err(Why::Foreign),
    }
}

/// D12: an attempt dies with the source's process, or with a receiving destination's. M2: a sealed one does not. M5:
/// after a restart in OFFERED the guest door stays shut.
fn restart(record: Option<&Record>) -> Step {
    let Some(record) = record else { return keep(Answer::Silent) };
    match &record.state {
        State::Receiving { attempt, .. } => becomes(record.void(*attempt), Answer::Silent),
        State::Offered { attempt, to, offer: Offer::Live | Offer::Ended } => {
            becomes(record.offered(*attempt, to, Offer::Closed), Answer::Silent)
        }
        _ => keep(Answer::Silent),
    }
}

// ---- the operator ------------------------------------------------------------------------------------------------

fn claim(host: Host, lineage: Lineage, word: Word, images: Images) -> Step {
    let state = State::Owner { attempt: Attempt(word.0) };
    becomes(Record { lineage, order: Order::FIRST, word, host, images, state }, Answer::Silent)
}

/// M8: on SEALED, GIVEN, SUPERSEDED, and on OFFERED after a restart; a peer that answers decides. The term rises, so
/// that whoever owned by the old one is fenced when the two meet.
fn take(record: &Record, word: Word, heard: Heard) -> Result<Step, Why> {
    match &record.state {
        State::Sealed { .. }
        | State::Given { .. }
        | State::Superseded { .. }
        | State::Offered { offer: Offer::Closed, .. } => {}
        State::Offered { .. } => return Err(Why::InProgress),
        State::Void { .. } | State::Receiving { .. } | State::Owner { .. } => return Err(Why::NotTakeable),
    }
    if heard == Heard::Decides {
        return Err(Why::PeerDecides);
    }
    let order = record.order.taken().ok_or(Why::Exhausted)?;
    let state = State::Owner { attempt: Attempt(word.0) };
    Ok(becomes(Record { order, word, state, ..record.clone() }, Answer::Silent))
}

/// M5: the way out of an offer whose peer never answers. No GO was ever written, so the order stays.
fn forget_peer(record: &Record) -> Result<Step, Why> {
    match &record.state {
        State::Offered { offer: Offer::Live, .. } => Err(Why::InProgress),
        State::Offered { attempt, .. } => Ok(becomes(record.owner(*attempt), Answer::Silent)),
        _ => Err(Why::NothingOffered),
    }
}

/// M6: VOID can be claimed only after this word. M2: the operator may end SEALED, too, which leaves VOID, so that the
/// source can still be told "unsealed"; but a source that answers decides, or else the guest it is just giving would
/// have no owner (found by exploration). Whoever gave keeps the record until the guest has arrived.
///
/// What is on the disks is forgotten, not what was proved: a host that had owned by a word and then knew of no order at
/// all would say "unsealed" to the source that the word had overruled (found by exploration).
fn forget(record: &Record, heard: Heard) -> Result<Step, Why> {
    match &record.state {
        State::Void { .. } | State::Superseded { .. } | State::Given { arrived: true, .. } => {
            Ok(becomes(record.void(Attempt::NONE), Answer::Silent))
        }
        State::Sealed { .. } if heard == Heard::Decides => Err(Why::PeerDecides),
        State::Sealed { attempt, .. } => Ok(becomes(record.void(*attempt), Answer::Silent)),
        _ => Err(Why::NotForgettable),
    }
}

// ---- the destination ---------------------------------------------------------------------------------------------

/// M9: refused by OWNER, OFFERED and SEALED, and unless lineage and order prove the sender the owner. M1: refused
/// when it is a repeat, or of an attempt that ended here.
fn prepare(host: Host, record: Option<&Record>, stamp: &Stamp, from: &Peer, fresh: bool) -> Result<Step, Why> {
    let sender = stamp.owner().ok_or(Why::NotProven)?;
    if stamp.destination != host || stamp.source != from.host || sender.order < Order::FIRST {
        return Err(Why::NotProven);
    }
    if let Some(record) = record {
        match &record.state {
            State::Owner { .. } | State::Offered { .. } => return Err(Why::Busy),
            State::Sealed { .. } => return Err(Why::Sealed),
            _ if record.lineage != stamp.lineage && record.is_forgotten() => {}
            _ if record.lineage != stamp.lineage => return Err(Why::OtherLineage),
            State::Void { attempt } if *attempt == stamp.attempt => return Err(Why::Ended),
            State::Receiving { attempt, .. } if *attempt == stamp.attempt => return Err(Why::Repeated),
            _ if !proves_ownership(&sender, record) => return Err(Why::NotProven),
            _ => {}
        }
    }
    if !fresh {
        return Err(Why::Repeated);
    }
    let state = State::Receiving { attempt: stamp.attempt, from: from.clone() };
    let Title { lineage, order, word } = sender;
    Ok(becomes(Record { lineage, order, word, host, images: Images::NONE, state }, Answer::Prepared))
}

/// M9: whether `sender` proves that it owns the guest of which `record` knows: no order below one that is known to
/// have been owned. A host that gave knows more: the owner is above it.
fn proves_ownership(sender: &Title, record: &Record) -> bool {
    let gave = matches!(record.state, State::Given { .. });
    match sender.order.term.cmp(&record.order.term) {
        Ordering::Less => false,
        Ordering::Greater => true,
        Ordering::Equal if sender.word != record.word => false,
        Ordering::Equal if gave => sender.order > record.order,
        Ordering::Equal => sender.order >= record.order,
    }
}

/// M6: an aborted reception becomes VOID, never the record that was there before. M2: not once it is sealed.
fn abort_receiving(record: &Record, ended: Attempt) -> Result<Step, Why> {
    match &record.state {
        State::Receiving { attempt, .. } if *attempt == ended => Ok(becomes(record.void(ended), Answer::Silent)),
        State::Void { attempt } if *attempt == ended => Ok(keep(Answer::Silent)),
        State::Sealed { attempt, .. } if *attempt == ended => Err(Why::Sealed),
        _ => Err(Why::Stale),
    }
}

/// SEALED is said again for as long as it is true; VOID of this attempt never seals again (M6).
fn seal(record: Option<&Record>, stamp: &Stamp, images: Images) -> Step {
    let Some(record) = record else { return keep(Answer::Record) };
    match &record.state {
        State::Receiving { attempt, from } if record.is_about(stamp) => {
            let state = State::Sealed { attempt: *attempt, from: from.clone() };
            becomes(Record { images, ..record.with(state) }, Answer::Sealed)
        }
        State::Sealed { .. } if record.is_about(stamp) => keep(Answer::Sealed),
        State::Void { attempt } if *attempt == stamp.attempt && may_say_unsealed(record, stamp) => {
            keep(Answer::Unsealed)
        }
        _ => keep(Answer::Record),
    }
}

/// M2: one of the ends of SEALED. A repeat that finds the owner is answered again; one that finds that the guest has
/// moved on, or a dead attempt, gets the record and revives nothing.
fn go(record: Option<&Record>, stamp: &Stamp) -> Step {
    let Some(record) = record else { return keep(Answer::Record) };
    match &record.state {
        State::Sealed { attempt, .. } if record.is_about(stamp) => {
            becomes(Record { order: stamp.order, ..record.owner(*attempt) }, Answer::Running)
        }
        State::Owner { attempt } if *attempt == stamp.attempt && record.owns_by(stamp) => keep(Answer::Running),
        _ => keep(Answer::Record),
    }
}

/// M6: VOID first, then "unsealed". A record that names another attempt or none will never seal this one, because a
/// PREPARE counts once (M1); it stays as it is.
fn abort(host: Host, record: Option<&Record>, stamp: &Stamp) -> Result<Step, Why> {
    let Some(record) = record else {
        let Title { lineage, order, word } = stamp.owner().ok_or(Why::Stale)?;
        if stamp.destination != host {
            return Err(Why::Stale);
        }
        let state = State::Void { attempt: stamp.attempt };
        return Ok(becomes(Record { lineage, order, word, host, images: Images::NONE, state }, Answer::Unsealed));
    };
    Ok(match &record.state {
        State::Receiving { attempt, .. } | State::Sealed { attempt, .. } if *attempt == stamp.attempt => {
            if record.is_about(stamp) { becomes(record.void(*attempt), Answer::Unsealed) } else { keep(Answer::Record) }
        }
        State::Owner { .. } | State::Offered { .. } => keep(Answer::Record),
        _ if may_say_unsealed(record, stamp) => keep(Answer::Unsealed),
        _ => keep(Answer::Record),
    })
}

/// M6: "unsealed" is said only while this host's own order is below the attempt's, to a stamp that is meant for it.
fn may_say_unsealed(record: &Record, stamp: &Stamp) -> bool {
    record.lineage == stamp.lineage && record.host == stamp.destination && record.order < stamp.order
}

/// M2: the source's durable "not given" ends SEALED; the source is told "unsealed" in return.
fn not_given(record: &Record, stamp: &Stamp) -> Result<Step, Why> {
    match &record.state {
        State::Receiving { attempt, .. } | State::Sealed { attempt, .. } if record.is_about(stamp) => {
            Ok(becomes(record.void(*attempt), Answer::Unsealed))
        }
        State::Void { attempt } if *attempt == stamp.attempt && may_say_unsealed(record, stamp) => {
            Ok(keep(Answer::Unsealed))
        }
        _ => Err(Why::Stale),
    }
}

// ---- the source --------------------------------------------------------------------------------------------------

/// M5: before anything that lets the destination seal. An offer that is not settled allows no other, not even to the
/// same peer: it is asked to confirm "unsealed" first. M1: an attempt that ended is not offered again, nor one whose
/// PREPARE spoke of another order: this host was overruled since, and owns anew (found by exploration).
fn offer(record: &Record, stamp: &Stamp, peer: &Peer) -> Result<Step, Why> {
    match &record.state {
        State::Owner { attempt } if *attempt == stamp.attempt => Err(Why::Ended),
        State::Owner { .. } if record.order.handed_over().is_none() => Err(Why::Exhausted),
        State::Owner { .. } => {
            let offered = record.offered(stamp.attempt, peer, Offer::Live);
            if offered.is_about(stamp) { Ok(becomes(offered, Answer::Silent)) } else { Err(Why::Stale) }
        }
        State::Offered { to, offer: Offer::Live, .. } if record.is_about(stamp) && to == peer => {
            Ok(keep(Answer::Silent))
        }
        State::Offered { attempt, .. } if *attempt == stamp.attempt => Err(Why::Ended),
        State::Offered { .. } => Err(Why::Unsettled),
        State::Given { .. } => Err(Why::Given),
        _ => Err(Why::NotOwner),
    }
}

/// M3: an attempt ends for good before anybody hears "not given"; once it is given it cannot end.
fn end(record: &Record, ended: Attempt) -> Result<Step, Why> {
    match &record.state {
        State::Offered { attempt, to, offer: Offer::Live } if *attempt == ended => {
            Ok(becomes(record.offered(ended, to, Offer::Ended), Answer::Silent))
        }
        State::Owner { .. } | State::Offered { .. } => Ok(keep(Answer::Silent)),
        State::Given { .. } => Err(Why::Given),
        _ => Err(Why::NotOwner),
    }
}

/// M3: only an attempt that lives, M1: only on a SEALED of exactly this attempt.
fn give(record: &Record, sealed: &Stamp) -> Result<Step, Why> {
    match &record.state {
        State::Offered { attempt, to, offer: Offer::Live } if record.is_about(sealed) => {
            let state = State::Given { attempt: *attempt, to: to.clone(), arrived: false };
            Ok(becomes(record.with(state), Answer::Silent))
        }
        State::Offered { .. } if record.is_about(sealed) => Err(Why::Ended),
        State::Given { .. } if record.is_about(sealed) => Ok(keep(Answer::Silent)),
        State::Offered { .. } | State::Given { .. } | State::Owner { .. } => Err(Why::Stale),
        _ => Err(Why::NotOwner),
    }
}

/// M5: the one way from OFFERED back to OWNER that needs no operator.
fn unsealed(record: &Record, stamp: &Stamp) -> Result<Step, Why> {
    match &record.state {
        State::Offered { attempt, .. } if record.is_about(stamp) => Ok(becomes(record.owner(*attempt), Answer::Silent)),
        State::Owner { attempt } if *attempt == stamp.attempt => Ok(keep(Answer::Silent)),
        State::Given { .. } if record.is_about(stamp) => Err(Why::Given),
        _ => Err(Why::Stale),
    }
}

/// The guest has arrived: GO need not be repeated. An owner that hears RUNNING of an attempt it never gave is
/// overruled like by any other proof (M8).
fn running(record: &Record, stamp: &Stamp) -> Result<Step, Why> {
    match &record.state {
        State::Given { arrived: true, .. } if record.is_about(stamp) => Ok(keep(Answer::Silent)),
        State::Given { .. } if record.is_about(stamp) => Ok(becomes(record.arrived(), Answer::Silent)),
        State::Offered { to, .. } if record.is_about(stamp) => {
            let title = Title { lineage: stamp.lineage, order: stamp.order, word: stamp.word };
            Ok(meet(record, &title, to))
        }
        _ => Err(Why::Stale),
    }
}

// ---- both --------------------------------------------------------------------------------------------------------

/// M8: only OWNER and OFFERED fence themselves, on proof of a higher order, durably. A host that gave learns from the
/// one it gave to, or from any higher order by the same word, that the guest arrived and has perhaps moved on.
fn meet(record: &Record, title: &Title, peer: &Peer) -> Step {
    let mine = record.title();
    if !title.overrules(&mine) {
        return keep(Answer::Silent);
    }
    match &record.state {
        State::Owner { .. } | State::Offered { .. } => {
            let tie = title.ties(&mine);
            let state = State::Superseded { by: peer.clone(), tie };
            // In a tie both words are dead, and each host keeps its own.
            let word = if tie { record.word } else { title.word };
            becomes(Record { order: record.order.max(title.order), word, ..record.with(state) }, Answer::Silent)
        }
        State::Given { to, arrived: false, .. } if to.host == peer.host || title.word == record.word => {
            becomes(record.arrived(), Answer::Silent)
        }
        _ => keep(Answer::Silent),
    }
}

impl Record {
    /// M1: whether a message is about the attempt that this record is in the middle of.
    fn is_about(&self, stamp: &Stamp) -> bool {
        self.stamp().is_some_and(|mine| mine.matches(stamp))
    }

    /// Whether this record owns what the stamp would hand over.
    fn owns_by(&self, stamp: &Stamp) -> bool {
        self.lineage == stamp.lineage
            && self.host == stamp.destination
            && self.order == stamp.order
            && self.word == stamp.word
    }

    /// M6: what is left of an aborted attempt. Its disks are nobody's, so it names no images.
    fn void(&self, attempt: Attempt) -> Self {
        Self { images: Images::NONE, ..self.with(State::Void { attempt }) }
    }

    fn owner(&self, attempt: Attempt) -> Self {
        self.with(State::Owner { attempt })
    }

    fn offered(&self, attempt: Attempt, to: &Peer, offer: Offer) -> Self {
        self.with(State::Offered { attempt, to: to.clone(), offer })
    }

    fn arrived(&self) -> Self {
        match &self.state {
            State::Given { attempt, to, .. } => {
                self.with(State::Given { attempt: *attempt, to: to.clone(), arrived: true })
            }
            _ => self.clone(),
        }
    }
}
