//! Every (state, event) pair, then the rules one by one, each named by the behaviour that it forbids.

use super::*;
use std::fmt::Write as _;

const A: Host = Host([0xaa; 16]);
const B: Host = Host([0xbb; 16]);
const C: Host = Host([0xcc; 16]);
const LINEAGE: Lineage = Lineage([1; 16]);
const WORD: Word = Word([2; 16]);
const OTHER_WORD: Word = Word([3; 16]);
const THIS: Attempt = Attempt([4; 16]);
const OTHER: Attempt = Attempt([5; 16]);
const IMAGES: Images = Images([6; 16]);
/// The source owns at 1.4, so the attempts would create 1.5.
const OWNED: Order = Order { term: 1, generation: 4 };

fn peer(host: Host) -> Peer {
    Peer { host, address: Address::try_from("tcp://[::1]:49152").expect("fits") }
}

fn title(term: u32, generation: u64, word: Word) -> Title {
    Title { lineage: LINEAGE, order: Order { term, generation }, word }
}

/// The stamp of an attempt from A to B.
fn stamp(attempt: Attempt) -> Stamp {
    let order = OWNED.handed_over().expect("far from the end");
    Stamp { lineage: LINEAGE, word: WORD, attempt, source: A, destination: B, order }
}

fn record(host: Host, state: State) -> Record {
    Record { lineage: LINEAGE, order: OWNED, word: WORD, host, images: IMAGES, state }
}

fn void() -> Record {
    record(B, State::Void { attempt: THIS })
}
fn receiving() -> Record {
    record(B, State::Receiving { attempt: THIS, from: peer(A) })
}
fn sealed() -> Record {
    record(B, State::Sealed { attempt: THIS, from: peer(A) })
}
/// What GO makes of [`sealed`].
fn arrived() -> Record {
    Record { order: stamp(THIS).order, ..record(B, State::Owner { attempt: THIS }) }
}
fn owner() -> Record {
    record(A, State::Owner { attempt: Attempt([9; 16]) })
}
fn offered(offer: Offer) -> Record {
    record(A, State::Offered { attempt: THIS, to: peer(B), offer })
}
fn given(arrived: bool) -> Record {
    record(A, State::Given { attempt: THIS, to: peer(B), arrived })
}
fn superseded() -> Record {
    let by = Record { order: Order { term: 2, generation: 4 }, word: OTHER_WORD, ..owner() };
    Record { state: State::Superseded { by: peer(C), tie: false }, ..by }
}

fn prepare(attempt: Attempt, fresh: bool) -> Event {
    Event::Prepare { stamp: stamp(attempt), from: peer(A), fresh }
}
/// A's offer to `to`.
fn offer(attempt: Attempt, to: Host) -> Event {
    Event::Offer { stamp: Stamp { destination: to, ..stamp(attempt) }, to: peer(to) }
}
fn meet(title: Title) -> Event {
    Event::Meet { title, peer: peer(C) }
}
fn take(heard: Heard) -> Event {
    Event::Take { word: OTHER_WORD, heard }
}
fn forget(heard: Heard) -> Event {
    Event::Forget { heard }
}
fn claim() -> Event {
    Event::Claim { lineage: LINEAGE, word: WORD, images: IMAGES, discard: true }
}
fn seal(attempt: Attempt) -> Event {
    Event::Seal { stamp: stamp(attempt), images: IMAGES }
}

/// The record after `event`, which must be accepted.
fn after(record: Option<&Record>, event: &Event) -> (Option<Record>, Answer) {
    let host = record.map_or(B, |r| r.host);
    let step = next(host, record, event).unwrap_or_else(|e| panic!("{event:?} on {record:?}: {e}"));
    let becomes = match step.change {
        Change::Keep => record.cloned(),
        Change::Become(record) => Some(*record),
        Change::Remove => None,
    };
    (becomes, step.answer)
}

fn refused(record: Option<&Record>, event: &Event) -> Why {
    let host = record.map_or(B, |r| r.host);
    next(host, record, event).expect_err("must be refused").why
}

fn state_name(record: Option<&Record>) -> &'static str {
    match record.map(|r| &r.state) {
        None => "none",
        Some(State::Void { .. }) => "VOID",
        Some(State::Receiving { .. }) => "RECEIVING",
        Some(State::Sealed { .. }) => "SEALED",
        Some(State::Owner { .. }) => "OWNER",
        Some(State::Offered { offer: Offer::Live, .. }) => "OFFERED",
        Some(State::Offered { offer: Offer::Ended, .. }) => "ended",
        Some(State::Offered { offer: Offer::Closed, .. }) => "closed",
        Some(State::Given { arrived: false, .. }) => "GIVEN",
        Some(State::Given { arrived: true, .. }) => "arrived",
        Some(State::Superseded { .. }) => "SUPERSEDED",
    }
}

fn table() -> String {
    let states = [
        ("none", None),
        ("void", Some(void())),
        ("receiving", Some(receiving())),
        ("sealed", Some(sealed())),
        ("owner (B)", Some(arrived())),
        ("owner (A)", Some(owner())),
        ("offered", Some(offered(Offer::Live))),
        ("ended", Some(offered(Offer::Ended))),
        ("closed", Some(offered(Offer::Closed))),
        ("given", Some(given(false))),
        ("arrived", Some(given(true))),
        ("superseded", Some(superseded())),
        ("foreign", Some(Record { host: C, ..owner() })),
    ];
    let events = [
        ("restart", Event::Restart),
        ("claim", claim()),
        ("take, silence", take(Heard::Silence)),
        ("take, disclaims", take(Heard::Disclaims)),
        ("take, decides", take(Heard::Decides)),
        ("forget peer", Event::ForgetPeer),
        ("forget", forget(Heard::Silence)),
        ("forget, decides", forget(Heard::Decides)),
        ("PREPARE this", prepare(THIS, true)),
        ("PREPARE other", prepare(OTHER, true)),
        ("PREPARE again", prepare(OTHER, false)),
        ("abort receiving", Event::AbortReceiving { attempt: THIS }),
        ("abort other", Event::AbortReceiving { attempt: OTHER }),
        ("SEAL this", seal(THIS)),
        ("SEAL other", seal(OTHER)),
        ("GO this", Event::Go(stamp(THIS))),
        ("GO other", Event::Go(stamp(OTHER))),
        ("ABORT this", Event::Abort(stamp(THIS))),
        ("ABORT other", Event::Abort(stamp(OTHER))),
        ("not given this", Event::NotGiven(stamp(THIS))),
        ("not given other", Event::NotGiven(stamp(OTHER))),
        ("offer this", offer(THIS, B)),
        ("offer other", offer(OTHER, B)),
        ("end this", Event::End { attempt: THIS }),
        ("end other", Event::End { attempt: OTHER }),
        ("SEALED, give", Event::Give { sealed: stamp(THIS) }),
        ("other, give", Event::Give { sealed: stamp(OTHER) }),
        ("UNSEALED this", Event::Unsealed(stamp(THIS))),
        ("UNSEALED other", Event::Unsealed(stamp(OTHER))),
        ("RUNNING this", Event::Running(stamp(THIS))),
        ("RUNNING other", Event::Running(stamp(OTHER))),
        ("meet lower", meet(title(1, 3, WORD))),
        ("meet equal", meet(title(1, 4, WORD))),
        ("meet higher", meet(title(1, 6, WORD))),
        ("meet term", meet(title(3, 1, OTHER_WORD))),
        ("meet tie", meet(title(1, 1, OTHER_WORD))),
    ];
    let mut text = format!("{:16}", "");
    for (name, _) in &states {
        write!(text, "| {name:18}").expect("a string");
    }
    for (name, event) in &events {
        write!(text, "\n{name:16}").expect("a string");
        for (column, record) in &states {
            let host = if *column == "foreign" { A } else { record.as_ref().map_or(B, |r| r.host) };
            let cell = match next(host, record.as_ref(), event) {
                Err(refusal) => format!("- {:?}", refusal.why),
                Ok(Step { change, answer }) => {
                    let becomes = match &change {
                        Change::Keep => "=",
                        Change::Become(record) => state_name(Some(record)),
                        Change::Remove => "none",
                    };
                    if answer == Answer::Silent { becomes.to_owned() } else { format!("{becomes} {answer:?}") }
                }
            };
            write!(text, "| {cell:18}").expect("a string");
        }
    }
    text.lines().fold(String::new(), |all, line| all + line.trim_end() + "\n")
}

#[test]
fn every_state_and_event_has_its_pinned_outcome() {
    let (is, pinned) = (table(), include_str!("table.txt"));
    assert!(is == pinned, "the transition table has changed; it is now\n{is}");
}

// ---- rule by rule ------------------------------------------------------------------------------------------------

#[test]
fn m1_a_message_with_one_differing_field_does_not_count() {
    let right = stamp(THIS);
    let wrong = [
        Stamp { lineage: Lineage([7; 16]), ..right },
        Stamp { word: OTHER_WORD, ..right },
        Stamp { attempt: OTHER, ..right },
        Stamp { source: C, ..right },
        Stamp { destination: C, ..right },
        Stamp { order: Order { term: 1, generation: 6 }, ..right },
    ];
    for wrong in wrong {
        let unchanged = |record: Record, event: &Event| after(Some(&record), event) == (Some(record), Answer::Record);
        assert!(unchanged(sealed(), &Event::Go(wrong)), "{wrong:?}");
        assert!(unchanged(receiving(), &Event::Seal { stamp: wrong, images: IMAGES }), "{wrong:?}");
        let (kept, answer) = after(Some(&sealed()), &Event::Abort(wrong));
        assert_eq!(kept, Some(sealed()), "{wrong:?}");
        assert!(answer == Answer::Record || wrong.attempt == OTHER, "{wrong:?}: {answer:?}");
        assert_eq!(refused(Some(&sealed()), &Event::NotGiven(wrong)), Why::Stale);
        assert_eq!(refused(Some(&offered(Offer::Live)), &Event::Give { sealed: wrong }), Why::Stale);
        assert_eq!(refused(Some(&offered(Offer::Live)), &Event::Unsealed(wrong)), Why::Stale);
        assert_eq!(refused(Some(&given(false)), &Event::Running(wrong)), Why::Stale);
    }
}

#[test]
fn m1_a_repeated_prepare_revives_nothing() {
    assert_eq!(refused(None, &prepare(THIS, false)), Why::Repeated);
    assert_eq!(refused(Some(&void()), &prepare(THIS, true)), Why::Ended);
    assert_eq!(refused(Some(&receiving()), &prepare(THIS, true)), Why::Repeated);
}

#[test]
fn m1_an_attempt_that_ended_unsealed_is_not_offered_again() {
    let (back, _) = after(Some(&offered(Offer::Ended)), &Event::Unsealed(stamp(THIS)));
    assert_eq!(refused(back.as_ref(), &offer(THIS, B)), Why::Ended);
    assert_eq!(refused(back.as_ref(), &Event::Give { sealed: stamp(THIS) }), Why::Stale);
}

#[test]
fn m1_an_offer_counts_only_with_the_order_that_prepare_spoke_of() {
    // Overruled, and the owner again, while the destination was getting ready.
    let anew = Record { order: Order { term: 2, generation: 2 }, word: OTHER_WORD, ..owner() };
    assert_eq!(refused(Some(&anew), &offer(THIS, B)), Why::Stale);
    let elsewhere = Event::Offer { stamp: stamp(THIS), to: peer(C) };
    assert_eq!(refused(Some(&owner()), &elsewhere), Why::Stale);
}

#[test]
fn m2_a_sealed_host_outlives_restarts_and_its_own_wish_to_abort() {
    assert_eq!(after(Some(&sealed()), &Event::Restart).0, Some(sealed()));
    assert_eq!(refused(Some(&sealed()), &Event::AbortReceiving { attempt: THIS }), Why::Sealed);
    assert_eq!(refused(Some(&sealed()), &prepare(OTHER, true)), Why::Sealed);
}

#[test]
fn m2_sealed_ends_by_go_abort_not_given_or_the_operator() {
    let ends = [
        (Event::Go(stamp(THIS)), "OWNER"),
        (Event::Abort(stamp(THIS)), "VOID"),
        (Event::NotGiven(stamp(THIS)), "VOID"),
        (forget(Heard::Silence), "VOID"),
        (take(Heard::Silence), "OWNER"),
    ];
    for (event, state) in ends {
        assert_eq!(state_name(after(Some(&sealed()), &event).0.as_ref()), state);
    }
}

#[test]
fn m3_whoever_said_not_given_cannot_give() {
    for record in [offered(Offer::Ended), offered(Offer::Closed)] {
        assert_eq!(promise(A, Some(&record), None, &stamp(THIS)), Promise::NotGiven);
        assert_eq!(refused(Some(&record), &Event::Give { sealed: stamp(THIS) }), Why::Ended);
    }
}

#[test]
fn m3_not_given_is_not_said_of_an_attempt_that_lives() {
    assert_eq!(promise(A, Some(&offered(Offer::Live)), Some(THIS), &stamp(THIS)), Promise::InProgress);
    assert_eq!(promise(A, Some(&owner()), Some(THIS), &stamp(THIS)), Promise::InProgress);
    assert_eq!(promise(A, Some(&owner()), None, &stamp(THIS)), Promise::NotGiven);
    assert_eq!(promise(A, Some(&given(false)), Some(THIS), &stamp(THIS)), Promise::Given);
    assert_eq!(promise(A, Some(&given(false)), None, &stamp(OTHER)), Promise::NotGiven);
}

#[test]
fn m3_without_a_record_of_that_lineage_the_answer_is_unknown() {
    let asked = Stamp { lineage: Lineage([7; 16]), ..stamp(THIS) };
    assert_eq!(promise(A, None, None, &stamp(THIS)), Promise::Unknown);
    assert_eq!(promise(A, Some(&owner()), None, &asked), Promise::Unknown);
    assert_eq!(promise(C, Some(&owner()), None, &stamp(THIS)), Promise::Unknown);
    let (forgotten, _) = after(Some(&given(true)), &forget(Heard::Silence));
    assert_eq!(promise(A, forgotten.as_ref(), None, &stamp(THIS)), Promise::Unknown);
}

#[test]
fn m3_a_cancel_after_given_is_refused() {
    assert_eq!(refused(Some(&given(false)), &Event::End { attempt: THIS }), Why::Given);
    assert_eq!(refused(Some(&given(false)), &Event::Unsealed(stamp(THIS))), Why::Given);
}

#[test]
fn m4_after_a_failed_commit_the_host_is_fenced_until_the_new_record_is_durable() {
    let mut fails = 1;
    let save: Save = Box::new(move |write| {
        let giving = matches!(write, Write::Commit(Some(Record { state: State::Given { .. }, .. })));
        if giving && fails > 0 {
            fails -= 1;
            return Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        }
        Ok(())
    });
    let mut keeper = Keeper::new(A, Some(owner()), save);
    assert_eq!(keeper.gate_state(), Door::Fenced, "not written since the start");
    keeper.start().expect("written");
    keeper.apply(&offer(THIS, B)).expect("offered");
    assert_eq!(keeper.gate_state(), Door::Serving { may_quiesce: true });

    let give = Event::Give { sealed: stamp(THIS) };
    assert!(matches!(keeper.apply(&give), Err(KeepError::Unknown(_))));
    assert_eq!(keeper.gate_state(), Door::Fenced);
    assert!(matches!(keeper.apply(&Event::End { attempt: THIS }), Err(KeepError::Unknown(_))), "a cancel");
    assert!(matches!(keeper.promise(None, &stamp(THIS)), Err(KeepError::Unknown(_))), "no answer, no GO");

    keeper.retry().expect("now it is durable");
    assert_eq!(keeper.known().expect("known"), Some(&given(false)));
}

#[test]
fn m5_after_a_restart_in_offered_the_door_is_shut_until_the_peer_or_the_operator_speaks() {
    let (closed, _) = after(Some(&offered(Offer::Ended)), &Event::Restart);
    assert_eq!(Door::of(A, closed.as_ref()), Door::Closed);
    for event in [Event::Unsealed(stamp(THIS)), Event::ForgetPeer, take(Heard::Silence)] {
        let (owner, _) = after(closed.as_ref(), &event);
        assert_eq!(Door::of(A, owner.as_ref()), Door::Serving { may_quiesce: false });
    }
}

#[test]
fn m5_an_unsettled_offer_allows_no_other() {
    for state in [Offer::Live, Offer::Ended, Offer::Closed] {
        for to in [B, C] {
            assert_eq!(refused(Some(&offered(state)), &offer(OTHER, to)), Why::Unsettled);
        }
    }
}

/// `migrate --plain`: nobody is at the other end, so the source settles its own offer, after a restart too.
#[test]
fn m5_an_offer_to_nobody_is_settled_by_the_source_alone() {
    let to_nobody = Stamp { destination: Host::NONE, ..stamp(THIS) };
    let plain = Peer { host: Host::NONE, address: Address::try_from("nbd://b/vda").expect("fits") };
    let (live, _) = after(Some(&owner()), &Event::Offer { stamp: to_nobody, to: plain });
    let (closed, _) = after(live.as_ref(), &Event::Restart);
    assert_eq!(Door::of(A, closed.as_ref()), Door::Closed);
    let (back, _) = after(closed.as_ref(), &Event::Unsealed(to_nobody));
    assert_eq!(Door::of(A, back.as_ref()), Door::Serving { may_quiesce: false });
    assert_eq!(refused(closed.as_ref(), &Event::Give { sealed: to_nobody }), Why::Ended, "M3");
    let (gave, _) = after(live.as_ref(), &Event::Give { sealed: to_nobody });
    assert_eq!(refused(gave.as_ref(), &Event::Unsealed(to_nobody)), Why::Given, "M3");
    let (there, _) = after(gave.as_ref(), &Event::Running(to_nobody));
    assert!(matches!(there.as_ref().map(|record| &record.state), Some(State::Given { arrived: true, .. })));
    assert_eq!(
        there.expect("given").to_string(),
        "this host gave the guest to the plain NBD server nbd://b/vda, where it arrived"
    );
    // The way back is the operator's.
    let (taken, _) = after(gave.as_ref(), &take(Heard::Silence));
    assert_eq!(state_name(taken.as_ref()), "OWNER");
}

#[test]
fn m6_an_owner_never_says_unsealed_of_the_attempt_that_made_it_one() {
    assert_eq!(after(Some(&arrived()), &Event::Abort(stamp(THIS))), (Some(arrived()), Answer::Record));
    let gave_on = Record { host: B, order: stamp(THIS).order, ..given(true) };
    assert_eq!(after(Some(&gave_on), &Event::Abort(stamp(THIS))).1, Answer::Record);
}

#[test]
fn m6_who_said_unsealed_never_seals_that_attempt() {
    for record in [None, Some(receiving()), Some(sealed())] {
        let (void, answer) = after(record.as_ref(), &Event::Abort(stamp(THIS)));
        assert_eq!((state_name(void.as_ref()), answer), ("VOID", Answer::Unsealed));
        assert_eq!(refused(void.as_ref(), &prepare(THIS, true)), Why::Ended);
        assert_eq!(after(void.as_ref(), &seal(THIS)), (void.clone(), Answer::Unsealed));
        assert_eq!(after(void.as_ref(), &Event::Go(stamp(THIS))), (void.clone(), Answer::Record));
    }
}

#[test]
fn m6_an_aborted_reception_is_void_whatever_was_there_before() {
    let gave = Record { host: B, state: State::Given { attempt: OTHER, to: peer(A), arrived: true }, ..owner() };
    let gave = Record { order: OWNED.before_hand_over().expect("above zero"), ..gave };
    let (receiving, _) = after(Some(&gave), &prepare(THIS, true));
    let (void, _) = after(receiving.as_ref(), &Event::AbortReceiving { attempt: THIS });
    assert_eq!(state_name(void.as_ref()), "VOID");
    assert_eq!(refused(void.as_ref(), &take(Heard::Silence)), Why::NotTakeable);
    assert_eq!(refused(void.as_ref(), &claim()), Why::Exists);
}

#[test]
fn m6_what_is_forgotten_can_be_claimed_or_receive_another_guest_and_goes_on_proving_who_owned() {
    for record in [void(), superseded(), given(true)] {
        let (forgotten, _) = after(Some(&record), &forget(Heard::Silence));
        let forgotten = forgotten.expect("a record");
        assert_eq!((forgotten.is_forgotten(), forgotten.title()), (true, record.title()));
        assert_eq!(Door::of(forgotten.host, Some(&forgotten)), Door::Incoming);
        assert_eq!(refused(Some(&forgotten), &take(Heard::Silence)), Why::NotTakeable);
        assert_eq!(state_name(after(Some(&forgotten), &claim()).0.as_ref()), "OWNER");
        let stranger = Stamp { lineage: Lineage([7; 16]), destination: forgotten.host, source: C, ..stamp(OTHER) };
        let prepare = Event::Prepare { stamp: stranger, from: peer(C), fresh: true };
        assert_eq!(state_name(after(Some(&forgotten), &prepare).0.as_ref()), "RECEIVING");
    }
    // B was taken while it was sealed, gave the guest on, and was told to forget.
    let owned = Record { order: Order { term: 2, generation: 4 }, word: OTHER_WORD, ..given(true) };
    let (forgotten, _) = after(Some(&Record { host: B, ..owned }), &forget(Heard::Silence));
    assert_eq!(after(forgotten.as_ref(), &Event::Abort(stamp(THIS))), (forgotten.clone(), Answer::Record));
}

#[test]
fn m7_no_record_and_a_foreign_record_own_nothing() {
    assert_eq!(Door::of(A, None), Door::Incoming);
    let foreign = Record { host: C, ..owner() };
    assert_eq!(Door::of(A, Some(&foreign)), Door::Incoming);
    let offer = offer(THIS, B);
    assert_eq!(next(A, Some(&foreign), &offer).expect_err("refused").why, Why::Foreign);
}

#[test]
fn m7_a_guest_is_claimed_once() {
    let (owner, _) = after(None, &claim());
    let owner = owner.expect("claimed");
    assert_eq!((owner.order.to_string().as_str(), owner.word), ("1.1", WORD));
    assert_eq!(refused(Some(&owner), &claim()), Why::Exists);
}

#[test]
fn m8_a_peer_that_answers_decides_and_the_word_raises_the_term() {
    for record in [sealed(), given(false), superseded(), offered(Offer::Closed)] {
        assert_eq!(refused(Some(&record), &take(Heard::Decides)), Why::PeerDecides);
        let taken = after(Some(&record), &take(Heard::Silence)).0.expect("owner");
        assert!(taken.order.term == record.order.term + 1 && taken.word == OTHER_WORD);
        assert!(taken.title().overrules(&record.title()));
        assert!(taken.order > stamp(THIS).order, "above whatever the attempt created");
    }
    for record in [void(), receiving(), owner()] {
        assert_eq!(refused(Some(&record), &take(Heard::Silence)), Why::NotTakeable);
    }
    assert_eq!(refused(Some(&offered(Offer::Ended)), &take(Heard::Silence)), Why::InProgress);
}

#[test]
fn m8_a_peer_that_owns_nothing_is_silence_unless_it_proves_that_nobody_owns() {
    let heard = |mine: &Record, theirs: &Record| heard_record(mine, Some(&theirs.summary()));
    assert_eq!(heard(&given(false), &void()), Heard::Disclaims);
    for theirs in [receiving(), sealed(), arrived(), Record { host: B, ..offered(Offer::Closed) }, given(true)] {
        assert_eq!(heard(&given(false), &theirs), Heard::Decides, "{theirs:?}");
    }
    // It owned, gave the guest on, and was to receive it back; or it does not remember; or somebody overruled it.
    let moved_on = Record { order: stamp(THIS).order, ..record(B, State::Void { attempt: OTHER }) };
    let of_another = record(B, State::Void { attempt: OTHER });
    for theirs in [moved_on, of_another, superseded()] {
        assert_eq!(heard(&given(false), &theirs), Heard::Silence, "{theirs:?}");
    }
    assert_eq!(heard_record(&given(true), None), Heard::Silence);
    // Who overruled this host may only have passed the proof on.
    assert_eq!(heard(&superseded(), &void()), Heard::Silence);
    let tie = |word, host| Record { word, ..record(host, State::Superseded { by: peer(C), tie: true }) };
    assert_eq!(heard(&tie(WORD, A), &tie(OTHER_WORD, B)), Heard::Disclaims);
    assert_eq!(heard(&tie(WORD, A), &Record { word: OTHER_WORD, ..arrived() }), Heard::Decides);
}

#[test]
fn m8_a_source_without_a_record_disclaims_and_any_other_promise_decides() {
    assert_eq!(heard_promise(Promise::Unknown), Heard::Disclaims);
    for promise in [Promise::Given, Promise::InProgress, Promise::NotGiven] {
        assert_eq!(heard_promise(promise), Heard::Decides);
    }
}

#[test]
fn m8_only_owners_fence_themselves_on_a_higher_order() {
    let proof = meet(title(2, 1, OTHER_WORD));
    for record in [owner(), offered(Offer::Live), offered(Offer::Closed)] {
        let fenced = after(Some(&record), &proof).0.expect("superseded");
        assert_eq!(fenced.state, State::Superseded { by: peer(C), tie: false });
        assert_eq!(fenced.title(), title(2, 1, OTHER_WORD));
        assert_eq!(Door::of(A, Some(&fenced)), Door::Fenced);
    }
    for record in [void(), receiving(), sealed(), given(false), superseded()] {
        assert_eq!(after(Some(&record), &proof).0, Some(record));
    }
    let other_guest = Title { lineage: Lineage([7; 16]), ..title(9, 9, OTHER_WORD) };
    assert_eq!(after(Some(&owner()), &meet(other_guest)).0, Some(owner()));
}

#[test]
fn m8_two_words_of_one_term_fence_both() {
    let taken = |record: &Record, word| after(Some(record), &Event::Take { word, heard: Heard::Silence }).0;
    let one = taken(&sealed(), WORD).expect("owner");
    let two = taken(&superseded().with(given(false).state), OTHER_WORD).expect("owner");
    let two = Record { order: Order { term: one.order.term, ..two.order }, ..two };
    for (mine, theirs) in [(&one, &two), (&two, &one)] {
        let fenced = after(Some(mine), &meet(theirs.title())).0.expect("superseded");
        assert!(matches!(fenced.state, State::Superseded { tie: true, .. }), "{fenced:?}");
        let again = taken(&fenced, Word([8; 16])).expect("owner");
        assert!(again.title().overrules(&theirs.title()) && !again.title().ties(&theirs.title()));
    }
}

#[test]
fn m9_prepare_needs_proof_of_ownership() {
    // The way back: A gave to B at 1.5, so only an owner of 1.5 or more can send the guest to A.
    let back = |generation| {
        let order = Order { term: 1, generation };
        let stamp = Stamp { source: B, destination: A, order, ..stamp(OTHER) };
        Event::Prepare { stamp, from: peer(B), fresh: true }
    };
    assert_eq!(refused(Some(&given(false)), &back(5)), Why::NotProven);
    let (receiving, answer) = after(Some(&given(false)), &back(6));
    assert_eq!((state_name(receiving.as_ref()), answer), ("RECEIVING", Answer::Prepared));

    let stale = Record { order: Order { term: 1, generation: 5 }, ..void() };
    assert_eq!(refused(Some(&stale), &prepare(OTHER, true)), Why::NotProven);
    let stranger = Record { lineage: Lineage([7; 16]), ..void() };
    assert_eq!(refused(Some(&stranger), &prepare(OTHER, true)), Why::OtherLineage);
    for busy in [arrived(), Record { host: B, ..offered(Offer::Ended) }] {
        assert_eq!(refused(Some(&busy), &prepare(OTHER, true)), Why::Busy);
    }
}

#[test]
fn m10_no_event_but_go_or_an_operator_makes_a_destination_the_owner() {
    let harmless = [Event::Restart, meet(title(1, 9, WORD)), meet(title(7, 1, OTHER_WORD)), seal(THIS)];
    for event in harmless {
        assert_eq!(after(Some(&sealed()), &event).0, Some(sealed()));
    }
}

#[test]
fn d12_an_attempt_dies_with_its_process() {
    let (void, _) = after(Some(&receiving()), &Event::Restart);
    assert_eq!(state_name(void.as_ref()), "VOID");
    let (closed, _) = after(Some(&offered(Offer::Live)), &Event::Restart);
    assert_eq!(refused(closed.as_ref(), &Event::Give { sealed: stamp(THIS) }), Why::Ended);
}

#[test]
fn go_is_answered_again_by_the_owner_and_with_the_record_once_the_guest_moved_on() {
    assert_eq!(after(Some(&sealed()), &Event::Go(stamp(THIS))), (Some(arrived()), Answer::Running));
    assert_eq!(after(Some(&arrived()), &Event::Go(stamp(THIS))), (Some(arrived()), Answer::Running));
    let on = Stamp { source: B, destination: C, order: Order { term: 1, generation: 6 }, ..stamp(OTHER) };
    let offered_on = after(Some(&arrived()), &Event::Offer { stamp: on, to: peer(C) }).0;
    assert_eq!(after(offered_on.as_ref(), &Event::Go(stamp(THIS))), (offered_on.clone(), Answer::Record));
    // That record is enough for the source to stop.
    let seen = Event::Meet { title: offered_on.expect("offered").title(), peer: peer(B) };
    assert_eq!(after(Some(&given(false)), &seen).0, Some(given(true)));
}

#[test]
fn a_give_that_is_not_known_to_have_arrived_is_not_forgotten() {
    assert_eq!(refused(Some(&given(false)), &forget(Heard::Silence)), Why::NotForgettable);
    assert!(after(Some(&given(true)), &forget(Heard::Silence)).0.expect("a record").is_forgotten());
}

#[test]
fn a_sealed_guest_is_not_forgotten_while_its_source_answers() {
    assert_eq!(refused(Some(&sealed()), &forget(Heard::Decides)), Why::PeerDecides);
}

#[test]
fn hostile_orders_are_refused_not_wrapped() {
    let last = Order { term: u32::MAX, generation: u64::MAX };
    assert_eq!(refused(Some(&Record { order: last, ..sealed() }), &take(Heard::Silence)), Why::Exhausted);
    let offer = offer(OTHER, B);
    assert_eq!(refused(Some(&Record { order: last, ..owner() }), &offer), Why::Exhausted);
    let zero = Stamp { order: Order::NONE, ..stamp(THIS) };
    assert_eq!(refused(None, &Event::Prepare { stamp: zero, from: peer(A), fresh: true }), Why::NotProven);
    assert_eq!(refused(None, &Event::Abort(zero)), Why::Stale);
}

#[test]
fn every_refusal_is_one_line_that_says_who_owns() {
    let say = |record: Option<&Record>, event: &Event| {
        next(record.map_or(B, |r| r.host), record, event).expect_err("refused").to_string()
    };
    let lines = [
        (
            say(Some(&arrived()), &prepare(OTHER, true)),
            "the guest cannot be received here: this host owns the guest (order 1.5)",
        ),
        (
            say(Some(&sealed()), &prepare(OTHER, true)),
            "the reception is complete: only its source or the operator ends it: this host is sealed and waits for the \
             word of host aaaaaaaa at tcp://[::1]:49152",
        ),
        (
            say(Some(&given(false)), &Event::End { attempt: THIS }),
            "the guest has been given away: this host gave the guest to host bbbbbbbb at tcp://[::1]:49152, which has \
             not answered yet",
        ),
        (
            say(Some(&given(true)), &offer(OTHER, C)),
            "the guest has been given away: this host gave the guest to host bbbbbbbb at tcp://[::1]:49152, where it \
             arrived",
        ),
        (
            say(Some(&offered(Offer::Ended)), &offer(OTHER, C)),
            "an earlier migration is not settled: this host owns the guest (order 1.4) and host bbbbbbbb at \
             tcp://[::1]:49152 may be sealed",
        ),
        (
            say(Some(&offered(Offer::Closed)), &take(Heard::Decides)),
            "the other host answers, and what it says decides: this host offered the guest (order 1.4) and waits for \
             the word of host bbbbbbbb at tcp://[::1]:49152",
        ),
        (
            say(Some(&void()), &take(Heard::Silence)),
            "there is nothing to take: this host owns nothing and its disks are half written",
        ),
        (
            say(Some(&superseded()), &offer(OTHER, B)),
            "the guest is not this host's to give: host cccccccc at tcp://[::1]:49152 overruled this host (order 2.4)",
        ),
        (say(None, &take(Heard::Silence)), "there is no record of this guest: this host owns nothing"),
    ];
    for (is, should) in lines {
        assert_eq!(is, should);
    }
}
