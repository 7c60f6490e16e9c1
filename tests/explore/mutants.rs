//! The product's transition function with one rule taken out.
//!
//! A rule is taken out here where [`ownership::next`] carries it, by changing the question (as if the stamp matched, as
//! if the record were another) or the answer; the product's function is called all the same. Where the driver carries
//! it, in what order things happen and when they are durable, `model.rs` asks [`Rules::without`].

use blockferry::ownership::{
    self, Address, Answer, Attempt, Change, Door, Event, Heard, Host, Offer, Peer, Promise, Record, Refusal, Stamp,
    State, Step, Why,
};

/// A rule that is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    PrepareCountsTwice,
    SealOfAnyAttempt,
    SealedOfAnyAttempt,
    GoOfAnyAttempt,
    AbortOfAnyAttempt,
    NotGivenOfAnyAttempt,
    UnsealedOfAnyAttempt,
    RunningOfAnyAttempt,
    NumberUsedAgain,
    OfferAtAnotherOrder,
    SealedEndsByItself,
    SealedEndsAtRestart,
    SealedCleanedUp,
    ForgetAgainstTheSource,
    NotGivenWhileInProgress,
    GiveAfterEnd,
    EndAfterGive,
    GatesOpenBeforeEnd,
    AbortBeforeEnd,
    UnknownIsNotGiven,
    GiveWithoutSealed,
    AnswerBeforeDurable,
    RestartNotWritten,
    FailedCommitIgnored,
    RestartOpens,
    RestartKeepsTheAttempt,
    SealBeforeOffered,
    SecondOffer,
    OwnerWithoutUnsealed,
    OwnerSaysUnsealed,
    UnsealedWithoutVoid,
    UnsealedAboveTheAttempt,
    VoidFallsBack,
    VoidIsTaken,
    VoidIsClaimed,
    VoidSealsAgain,
    ForgottenProvesNothing,
    NoRecordServes,
    ForeignRecordOwns,
    TermStays,
    PeerNotAsked,
    AnyoneDisclaims,
    WordHasNoNumber,
    TieIgnored,
    NobodyFences,
    GoSaidOnce,
    AbortSaidOnce,
    SealedNeverAsks,
    PrepareToOwner,
    PrepareToOffered,
    PrepareToSealed,
    PrepareWithoutProof,
    ReceivingOutlivesItsProcess,
    SealWithoutQuiesce,
}

use Mutant as M;

/// Each mutant: the rule that is taken out, and what the product does without it.
pub(crate) const ALL: &[(Mutant, &str, &str)] = &[
    (M::PrepareCountsTwice, "M1", "a PREPARE counts as often as it comes"),
    (M::NumberUsedAgain, "M1", "a new try takes the number of the one that ended"),
    (M::OfferAtAnotherOrder, "M1", "an offer counts whatever order its PREPARE spoke of"),
    (M::SealOfAnyAttempt, "M1", "SEAL counts for any attempt"),
    (M::SealedOfAnyAttempt, "M1", "SEALED counts for any attempt"),
    (M::GoOfAnyAttempt, "M1", "GO counts for any attempt"),
    (M::RunningOfAnyAttempt, "M1", "RUNNING counts for any attempt"),
    (M::AbortOfAnyAttempt, "M1", "ABORT counts for any attempt"),
    (M::UnsealedOfAnyAttempt, "M1", "UNSEALED counts for any attempt"),
    (M::NotGivenOfAnyAttempt, "M1", "\"not given\" counts for any attempt"),
    (M::SealedEndsByItself, "M2", "a sealed host may end the attempt"),
    (M::SealedEndsAtRestart, "M2", "a restart ends SEALED"),
    (M::SealedCleanedUp, "M2", "clean-up works when sealed"),
    (M::ForgetAgainstTheSource, "M2", "a sealed guest is forgotten although its source answers"),
    (M::SealedNeverAsks, "M2", "a sealed host does not ask its source"),
    (M::NotGivenWhileInProgress, "M3", "\"not given\" is said of an attempt that lives"),
    (M::GiveAfterEnd, "M3", "an attempt that has ended is given"),
    (M::EndAfterGive, "M3", "a cancel counts after GIVEN"),
    (M::AbortBeforeEnd, "M3", "ABORT is said before the attempt has ended"),
    (M::UnknownIsNotGiven, "M3", "without a record \"not given\" is said"),
    (M::GiveWithoutSealed, "M3", "GIVEN is written before SEALED is heard"),
    (M::AnswerBeforeDurable, "M4", "what is seen is answered before it is durable"),
    (M::RestartNotWritten, "M4", "a restart answers before it has written the record again"),
    (M::FailedCommitIgnored, "M4", "after a failed commit the host goes on as before"),
    (M::SealBeforeOffered, "M5", "SEAL is sent before OFFERED is durable"),
    (M::RestartOpens, "M5", "a restart in OFFERED opens the guest door"),
    (M::RestartKeepsTheAttempt, "M5", "a restart in OFFERED goes on with the attempt"),
    (M::SecondOffer, "M5", "an offer that is not settled allows another"),
    (M::OwnerWithoutUnsealed, "M5", "OFFERED becomes OWNER without UNSEALED"),
    (M::AbortSaidOnce, "M5", "ABORT is said once"),
    (M::OwnerSaysUnsealed, "M6", "an owner says UNSEALED"),
    (M::UnsealedAboveTheAttempt, "M6", "UNSEALED is said by a host whose order is not below the attempt's"),
    (M::UnsealedWithoutVoid, "M6", "UNSEALED is said without VOID"),
    (M::VoidFallsBack, "M6", "an aborted reception becomes the record that was there before"),
    (M::VoidIsTaken, "M6", "VOID is taken"),
    (M::VoidIsClaimed, "M6", "VOID is claimed"),
    (M::VoidSealsAgain, "M6", "VOID seals the attempt that it ended"),
    (M::ForgottenProvesNothing, "M6", "what is forgotten no longer proves who owned"),
    (M::NoRecordServes, "M7", "a host without a record serves"),
    (M::ForeignRecordOwns, "M7", "a record of another machine owns"),
    (M::TermStays, "M8", "a word does not raise the term"),
    (M::PeerNotAsked, "M8", "the peer is not asked"),
    (M::AnyoneDisclaims, "M8", "any peer that owns nothing disclaims"),
    (M::WordHasNoNumber, "M8", "a word has no number of its own"),
    (M::TieIgnored, "M8", "two words of one term do not fence each other"),
    (M::NobodyFences, "M8", "an owner does not fence itself on proof"),
    (M::PrepareToOwner, "M9", "PREPARE counts at an owner"),
    (M::PrepareToOffered, "M9", "PREPARE counts at who offered"),
    (M::PrepareToSealed, "M9", "PREPARE counts at a sealed host"),
    (M::PrepareWithoutProof, "M9", "PREPARE counts without proof"),
    (M::GoSaidOnce, "M10", "GO is said once, and nobody asks for it"),
    (M::SealWithoutQuiesce, "D6", "the guest is not quiesced when SEAL is sent"),
    (M::GatesOpenBeforeEnd, "D6", "the gates open and the attempt goes on"),
    (M::ReceivingOutlivesItsProcess, "D12", "a reception outlives its process"),
];

impl Mutant {
    /// The smallest bounds in which the rule is missed.
    pub(crate) fn bounds(self) -> &'static str {
        match self {
            Self::SealOfAnyAttempt
            | Self::SealedOfAnyAttempt
            | Self::AbortOfAnyAttempt
            | Self::NotGivenOfAnyAttempt
            | Self::PrepareToOwner
            | Self::PrepareToSealed => "hosts=2,attempts=2",
            Self::ForgetAgainstTheSource
            | Self::SealedNeverAsks
            | Self::VoidFallsBack
            | Self::VoidIsTaken
            | Self::VoidIsClaimed
            | Self::TermStays
            | Self::PeerNotAsked
            | Self::NobodyFences => "hosts=2,attempts=1,words=1",
            Self::AnswerBeforeDurable | Self::ReceivingOutlivesItsProcess => "hosts=2,attempts=1,powers=1",
            Self::GoOfAnyAttempt | Self::PrepareToOffered | Self::PrepareWithoutProof => "hosts=2,attempts=3,writes=0",
            Self::SealedEndsAtRestart | Self::RestartKeepsTheAttempt => "hosts=2,attempts=1,crashes=1",
            Self::ForeignRecordOwns => "hosts=2,attempts=1,mishaps=1",
            Self::WordHasNoNumber | Self::TieIgnored => "hosts=2,attempts=1,words=2,writes=0",
            Self::RunningOfAnyAttempt => "hosts=2,attempts=3,words=1,writes=0",
            Self::SealBeforeOffered
            | Self::RestartOpens
            | Self::OwnerWithoutUnsealed
            | Self::OwnerSaysUnsealed
            | Self::VoidSealsAgain => "hosts=2,attempts=1,crashes=1,words=1",
            Self::UnknownIsNotGiven => "hosts=2,attempts=1,words=1,mishaps=1",
            Self::RestartNotWritten => "hosts=2,attempts=2,crashes=1,powers=1",
            Self::FailedCommitIgnored => "hosts=2,attempts=1,crashes=1,failures=1",
            Self::UnsealedOfAnyAttempt => "hosts=2,attempts=2,crashes=1,words=1,writes=0",
            Self::SecondOffer | Self::UnsealedAboveTheAttempt => "hosts=3,attempts=2,crashes=1,words=1,writes=0",
            Self::OfferAtAnotherOrder | Self::ForgottenProvesNothing | Self::AnyoneDisclaims => {
                "hosts=3,attempts=2,crashes=1,words=2,writes=0"
            }
            _ => "hosts=2,attempts=1",
        }
    }
}

/// The rules by which an exploration goes: the product's, or the product's without one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules(Option<Mutant>);

impl Rules {
    /// All rules.
    pub(crate) fn all() -> Self {
        Self(None)
    }

    /// All but one.
    pub(crate) fn all_but(mutant: Mutant) -> Self {
        Self(Some(mutant))
    }

    /// Whether this rule is the one that is taken out.
    pub(crate) fn without(&self, mutant: Mutant) -> bool {
        self.0 == Some(mutant)
    }

    /// What the guest door does.
    pub(crate) fn door(&self, host: Host, record: Option<&Record>) -> Door {
        match (self.0, record) {
            (Some(M::NoRecordServes), None) => Door::Serving { may_quiesce: false },
            (Some(M::ForeignRecordOwns), Some(record)) => Door::of(record.host, Some(record)),
            _ => Door::of(host, record),
        }
    }

    /// What a source answers to a sealed destination.
    pub(crate) fn promise(&self, host: Host, record: Option<&Record>, live: Option<Attempt>, asked: &Stamp) -> Promise {
        match (self.0, ownership::promise(host, record, live, asked)) {
            (Some(M::NotGivenWhileInProgress), Promise::InProgress) => Promise::NotGiven,
            (Some(M::UnknownIsNotGiven), Promise::Unknown) => Promise::NotGiven,
            (_, promise) => promise,
        }
    }

    /// What a peer's record means for a word.
    pub(crate) fn heard(&self, mine: &Record, theirs: Option<&Record>) -> Heard {
        match (self.0, ownership::heard_record(mine, theirs.map(Record::summary).as_ref())) {
            (Some(M::AnyoneDisclaims), Heard::Silence) => Heard::Disclaims,
            (_, heard) => heard,
        }
    }

    /// What becomes of a record.
    pub(crate) fn next(&self, host: Host, record: Option<&Record>, event: &Event) -> Result<Step, Refusal> {
        match (self.0, record) {
            (Some(mutant), Some(record)) => next_without(mutant, host, record, event),
            _ => ownership::next(host, record, event),
        }
    }
}

fn next_without(mutant: Mutant, host: Host, record: &Record, event: &Event) -> Result<Step, Refusal> {
    // The product's answer to this question, or to another one.
    let product = || ownership::next(host, Some(record), event);
    let asked = |event: Event| ownership::next(host, Some(record), &event);
    let as_if = |state: State| ownership::next(host, Some(&with(record, state)), event);
    let as_if_none = || ownership::next(host, None, event);
    // An answer of our own.
    let becomes = |state: State| Ok(step(Change::Become(Box::new(with(record, state))), Answer::Silent));
    let keep = |answer: Answer| Ok(step(Change::Keep, answer));
    // The stamp that the record waits for: whatever comes is taken for it.
    let mine = record.stamp();

    match (mutant, &record.state, event) {
        // M1
        (M::PrepareCountsTwice | M::NumberUsedAgain, state, Event::Prepare { stamp, from, .. }) => {
            let fresh = Event::Prepare { stamp: *stamp, from: from.clone(), fresh: true };
            let state = match state {
                State::Void { .. } => State::Void { attempt: Attempt::NONE },
                State::Receiving { from, .. } => State::Receiving { attempt: Attempt::NONE, from: from.clone() },
                other => other.clone(),
            };
            ownership::next(host, Some(&with(record, state)), &fresh)
        }
        (M::NumberUsedAgain, State::Owner { .. }, Event::Offer { .. }) => {
            as_if(State::Owner { attempt: Attempt::NONE })
        }
        (M::OfferAtAnotherOrder, State::Owner { attempt }, Event::Offer { stamp, to }) if *attempt != stamp.attempt => {
            becomes(State::Offered { attempt: stamp.attempt, to: to.clone(), offer: Offer::Live })
        }
        (M::SealOfAnyAttempt, State::Receiving { .. }, Event::Seal { images, .. }) => {
            asked(Event::Seal { stamp: mine.expect("receiving"), images: *images })
        }
        (M::SealedOfAnyAttempt, State::Offered { .. }, Event::Give { .. }) => {
            asked(Event::Give { sealed: mine.expect("offered") })
        }
        (M::GoOfAnyAttempt, State::Sealed { .. }, Event::Go(_)) => asked(Event::Go(mine.expect("sealed"))),
        (M::AbortOfAnyAttempt, State::Sealed { .. }, Event::Abort(_)) => asked(Event::Abort(mine.expect("sealed"))),
        (M::NotGivenOfAnyAttempt, State::Sealed { .. }, Event::NotGiven(_)) => {
            asked(Event::NotGiven(mine.expect("sealed")))
        }
        (M::UnsealedOfAnyAttempt, State::Offered { .. }, Event::Unsealed(_)) => {
            asked(Event::Unsealed(mine.expect("offered")))
        }
        (M::RunningOfAnyAttempt, State::Given { .. }, Event::Running(_)) => asked(Event::Running(mine.expect("given"))),
        // M2
        (M::SealedEndsByItself, State::Sealed { attempt, .. }, Event::AbortReceiving { .. })
        | (M::SealedEndsAtRestart, State::Sealed { attempt, .. }, Event::Restart) => {
            becomes(State::Void { attempt: *attempt })
        }
        (M::ForgetAgainstTheSource, State::Sealed { .. }, Event::Forget { .. }) => {
            asked(Event::Forget { heard: Heard::Silence })
        }
        // M3
        (M::GiveAfterEnd, State::Offered { attempt, to, .. }, Event::Give { .. }) => {
            as_if(State::Offered { attempt: *attempt, to: to.clone(), offer: Offer::Live })
        }
        (M::EndAfterGive, State::Given { attempt, .. }, Event::End { .. }) => {
            becomes(State::Owner { attempt: *attempt })
        }
        // M5
        (M::RestartOpens, State::Offered { attempt, to, .. }, Event::Restart) => {
            becomes(State::Offered { attempt: *attempt, to: to.clone(), offer: Offer::Ended })
        }
        (M::RestartKeepsTheAttempt, State::Offered { .. }, Event::Restart)
        | (M::ReceivingOutlivesItsProcess, State::Receiving { .. }, Event::Restart) => keep(Answer::Silent),
        (M::SealBeforeOffered, State::Owner { .. }, Event::Give { sealed }) => {
            let to = Peer { host: sealed.destination, address: Address::new() };
            as_if(State::Offered { attempt: sealed.attempt, to, offer: Offer::Live })
        }
        (M::SecondOffer, State::Offered { offer: Offer::Ended, .. }, Event::Offer { .. }) => {
            as_if(State::Owner { attempt: Attempt::NONE })
        }
        (M::OwnerWithoutUnsealed, State::Offered { attempt, .. }, Event::End { .. }) => {
            becomes(State::Owner { attempt: *attempt })
        }
        // M6
        (M::OwnerSaysUnsealed, State::Owner { .. } | State::Offered { .. }, Event::Abort(_))
        | (M::UnsealedAboveTheAttempt, State::Given { .. } | State::Superseded { .. }, Event::Abort(_)) => {
            keep(Answer::Unsealed)
        }
        (M::UnsealedWithoutVoid, State::Sealed { .. }, Event::Abort(_) | Event::NotGiven(_)) => {
            product().map(|step| Step { change: Change::Keep, ..step })
        }
        (M::VoidFallsBack, State::Receiving { from, .. }, Event::AbortReceiving { .. }) => {
            becomes(State::Given { attempt: Attempt::NONE, to: from.clone(), arrived: true })
        }
        (M::VoidIsTaken, State::Void { .. }, Event::Take { word, .. }) => {
            becomes(State::Owner { attempt: Attempt(word.0) })
        }
        (M::VoidIsClaimed, State::Void { .. }, Event::Claim { .. }) => as_if_none(),
        (M::VoidSealsAgain, State::Void { attempt }, Event::Seal { stamp, .. }) if *attempt == stamp.attempt => {
            let from = Peer { host: stamp.source, address: Address::new() };
            as_if(State::Receiving { attempt: *attempt, from })
        }
        (M::ForgottenProvesNothing, _, Event::Forget { .. }) => product().map(|step| match &step.change {
            Change::Become(record) if record.is_forgotten() => Step { change: Change::Remove, ..step },
            _ => step,
        }),
        // M7
        (M::ForeignRecordOwns, ..) => ownership::next(record.host, Some(record), event),
        // M8
        (M::TermStays, _, Event::Take { .. }) => product().map(|step| changed(step, |is| is.order = record.order)),
        (M::WordHasNoNumber, _, Event::Take { .. }) => product().map(|step| changed(step, |is| is.word = record.word)),
        (M::PeerNotAsked, _, Event::Take { word, .. }) => asked(Event::Take { word: *word, heard: Heard::Silence }),
        (M::TieIgnored, _, Event::Meet { title, .. }) if title.order <= record.order => keep(Answer::Silent),
        (M::NobodyFences, State::Owner { .. } | State::Offered { .. }, Event::Meet { .. } | Event::Running(_)) => {
            keep(Answer::Silent)
        }
        // M9
        (M::PrepareToOwner, State::Owner { .. }, Event::Prepare { .. })
        | (M::PrepareToOffered, State::Offered { .. }, Event::Prepare { .. })
        | (M::PrepareToSealed, State::Sealed { .. }, Event::Prepare { .. }) => as_if_none(),
        (M::PrepareWithoutProof, _, Event::Prepare { .. }) => match product() {
            Err(Refusal { why: Why::NotProven, .. }) => as_if_none(),
            answer => answer,
        },
        _ => product(),
    }
}

fn with(record: &Record, state: State) -> Record {
    Record { state, ..record.clone() }
}

fn step(change: Change, answer: Answer) -> Step {
    Step { change, answer }
}

fn changed(step: Step, how: impl FnOnce(&mut Record)) -> Step {
    match step.change {
        Change::Become(mut record) => {
            how(&mut record);
            Step { change: Change::Become(record), ..step }
        }
        Change::Keep | Change::Remove => step,
    }
}
