//! What the product says: its transition function, asked once for each record and event.
//!
//! Records, stamps and titles are the product's own types. A [`super::world::World`] names them by their numbers here.

use blockferry::ownership::{
    Address, Answer, Attempt, Change, Door, Event, Heard, Host, Images, Lineage, Order, Peer, Record, Stamp, State,
    Title, Why, Word,
};
use std::collections::HashMap;

use super::mutants::Rules;
use super::world::TRIES;

const LINEAGE: Lineage = Lineage([1; 16]);
/// The machine ids of the hosts begin here, and the numbers of the operator's words; those of attempts are smaller.
const FIRST_HOST: u8 = 0xa0;
const FIRST_WORD: u8 = 0xc0;

/// An event, as small as it can be told: [`Book::event`] makes the product's of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    Restart,
    Claim(u8),
    Take(u8, Heard),
    ForgetPeer,
    Forget(Heard),
    Prepare { stamp: u16, fresh: bool },
    AbortReceiving(Attempt),
    Seal(u16),
    Go(u16),
    Abort(u16),
    NotGiven(u16),
    Offer(u16),
    End(Attempt),
    Give(u16),
    Unsealed(u16),
    Running(u16),
    Meet(u8),
}

/// What the product makes of an [`Act`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing changes.
    Refused(Why),
    /// The record becomes this one, and then this is answered.
    Step { record: u16, answer: Answer },
}

/// The numbers of records, stamps and titles, and the product's answers.
pub(crate) struct Book {
    /// The rules by which it answers: all of them, or all but one.
    pub(crate) rules: Rules,
    records: Vec<Option<Record>>,
    numbers: HashMap<Option<Record>, u16>,
    stamps: Vec<Option<Stamp>>,
    titles: Vec<(usize, Title)>,
    outcomes: HashMap<(usize, u16, Act), Outcome>,
}

impl Book {
    /// An empty book. Number zero is "none" for records and stamps.
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            records: vec![None],
            numbers: HashMap::from([(None, 0)]),
            stamps: vec![None],
            titles: Vec::new(),
            outcomes: HashMap::new(),
        }
    }

    /// How many questions the product was asked: different records and events.
    pub(crate) fn questions(&self) -> usize {
        self.outcomes.len()
    }

    /// The record of that number.
    pub(crate) fn record(&self, number: u16) -> Option<&Record> {
        self.records[usize::from(number)].as_ref()
    }

    /// The state of the record of that number, if it is this host's own.
    pub(crate) fn state(&self, host: usize, number: u16) -> Option<&State> {
        self.record(number).filter(|record| record.host == machine(host)).map(|record| &record.state)
    }

    /// The number of a record.
    pub(crate) fn number(&mut self, record: Option<Record>) -> u16 {
        if let Some(number) = self.numbers.get(&record) {
            return *number;
        }
        let number = u16::try_from(self.records.len()).expect("few records");
        self.records.push(record.clone());
        self.numbers.insert(record, number);
        number
    }

    /// The stamp of that number.
    pub(crate) fn stamp(&self, number: u16) -> &Stamp {
        self.stamps[usize::from(number)].as_ref().expect("a try that has begun")
    }

    /// The source and the destination of an attempt.
    pub(crate) fn ends(&self, stamp: u16) -> (usize, usize) {
        let stamp = self.stamp(stamp);
        (index(stamp.source), index(stamp.destination))
    }

    /// The number of the stamp of a try that `source` begins with what its record says.
    pub(crate) fn new_stamp(&mut self, record: u16, try_: usize, source: usize, destination: usize) -> Option<u16> {
        let record = self.record(record)?;
        let stamp = Stamp {
            lineage: record.lineage,
            word: record.word,
            attempt: attempt(try_),
            source: machine(source),
            destination: machine(destination),
            order: record.order.handed_over()?,
        };
        let known = self.stamps.iter().position(|known| known.as_ref() == Some(&stamp));
        let number = known.unwrap_or_else(|| {
            self.stamps.push(Some(stamp));
            self.stamps.len() - 1
        });
        u16::try_from(number).ok()
    }

    /// The title of that number, and who shows it.
    pub(crate) fn title(&self, number: u8) -> &(usize, Title) {
        &self.titles[usize::from(number)]
    }

    /// The bit of the title that a host shows with this record; none if it can prove nothing to anybody: every record
    /// knows of the first owner.
    pub(crate) fn shows(&mut self, host: usize, record: u16) -> u64 {
        let Some(record) = self.record(record) else { return 0 };
        let title = record.title();
        if title.order <= Order::FIRST { 0 } else { 1 << self.title_number(host, title) }
    }

    /// The number of a title that a host shows.
    pub(crate) fn title_number(&mut self, host: usize, title: Title) -> u8 {
        let shown = (host, title);
        let known = self.titles.iter().position(|known| *known == shown).unwrap_or_else(|| {
            self.titles.push(shown);
            self.titles.len() - 1
        });
        assert!(known < 64, "more titles than bits");
        u8::try_from(known).expect("fits")
    }

    /// What becomes of a record when `act` happens: the product's answer, or that of a product without one rule.
    pub(crate) fn next(&mut self, host: usize, record: u16, act: Act) -> Outcome {
        if let Some(outcome) = self.outcomes.get(&(host, record, act)) {
            return *outcome;
        }
        let event = self.event(act);
        let outcome = match self.rules.next(machine(host), self.record(record), &event) {
            Err(refusal) => Outcome::Refused(refusal.why),
            Ok(step) => {
                let becomes = match step.change {
                    Change::Keep => record,
                    Change::Become(record) => self.number(Some(*record)),
                    Change::Remove => 0,
                };
                Outcome::Step { record: becomes, answer: step.answer }
            }
        };
        self.outcomes.insert((host, record, act), outcome);
        outcome
    }

    /// What the guest door does with this record.
    pub(crate) fn door(&self, host: usize, record: u16) -> Door {
        self.rules.door(machine(host), self.record(record))
    }

    fn event(&self, act: Act) -> Event {
        match act {
            Act::Restart => Event::Restart,
            Act::Claim(number) => {
                Event::Claim { lineage: LINEAGE, word: word(number), images: Images::NONE, discard: false }
            }
            Act::Take(number, heard) => Event::Take { word: word(number), heard },
            Act::ForgetPeer => Event::ForgetPeer,
            Act::Forget(heard) => Event::Forget { heard },
            Act::Prepare { stamp, fresh } => {
                let stamp = *self.stamp(stamp);
                Event::Prepare { stamp, from: peer(stamp.source), fresh }
            }
            Act::AbortReceiving(attempt) => Event::AbortReceiving { attempt },
            Act::Seal(stamp) => Event::Seal { stamp: *self.stamp(stamp), images: Images::NONE },
            Act::Go(stamp) => Event::Go(*self.stamp(stamp)),
            Act::Abort(stamp) => Event::Abort(*self.stamp(stamp)),
            Act::NotGiven(stamp) => Event::NotGiven(*self.stamp(stamp)),
            Act::Offer(stamp) => {
                let stamp = *self.stamp(stamp);
                Event::Offer { stamp, to: peer(stamp.destination) }
            }
            Act::End(attempt) => Event::End { attempt },
            Act::Give(stamp) => Event::Give { sealed: *self.stamp(stamp) },
            Act::Unsealed(stamp) => Event::Unsealed(*self.stamp(stamp)),
            Act::Running(stamp) => Event::Running(*self.stamp(stamp)),
            Act::Meet(number) => {
                let (from, title) = self.title(number);
                Event::Meet { title: *title, peer: peer(machine(*from)) }
            }
        }
    }
}

/// A host's machine id.
pub(crate) fn machine(host: usize) -> Host {
    Host([FIRST_HOST + u8::try_from(host).expect("few hosts"); 16])
}

/// The host of a machine id.
pub(crate) fn index(machine: Host) -> usize {
    usize::from(machine.0[0] - FIRST_HOST)
}

/// The number of a try's attempt.
pub(crate) fn attempt(try_: usize) -> Attempt {
    Attempt([1 + u8::try_from(try_).expect("few tries"); 16])
}

/// The try of an attempt; none for the number of a word.
pub(crate) fn try_of(attempt: Attempt) -> Option<usize> {
    (1..=TRIES).contains(&usize::from(attempt.0[0])).then(|| usize::from(attempt.0[0]) - 1)
}

fn peer(host: Host) -> Peer {
    Peer { host, address: Address::new() }
}

fn word(number: u8) -> Word {
    Word([FIRST_WORD + number; 16])
}
