//! What a host does when it receives a message, and which messages can be waited for.

use blockferry::ownership::{Answer, Offer, Promise, State};

use super::book::{Act, Book, Outcome, attempt, machine};
use super::model::{Moves, What, number};
use super::mutants::Mutant;
use super::world::{GARBAGE, Job, Message, Stage, World};

impl Moves<'_> {
    pub(crate) fn receive(&mut self, try_: usize, message: Message) {
        let told = self.world.tries[try_];
        if told.stamp == 0 || !self.world.is_said(try_, message) {
            return;
        }
        let (source, destination) = self.book.ends(told.stamp);
        let host = if message.is_for_destination() { destination } else { source };
        if !self.world.hosts[host].is_awake() {
            return;
        }
        self.is_late = !self.is_said_again(try_, message);
        let what = What::Receive(message, try_, host);
        let act = match message {
            Message::Prepare => Act::Prepare { stamp: told.stamp, fresh: !told.spent },
            Message::Seal => Act::Seal(told.stamp),
            Message::Go => Act::Go(told.stamp),
            Message::Abort => Act::Abort(told.stamp),
            Message::NotGiven => Act::NotGiven(told.stamp),
            Message::Unsealed => Act::Unsealed(told.stamp),
            Message::Running => Act::Running(told.stamp),
            // The driver looks for SEALED only while it seals; `next` must know without that.
            Message::Sealed if self.book.rules.without(Mutant::SealBeforeOffered) && !self.is_sealing(host, try_) => {
                return;
            }
            Message::Sealed => return self.give(host, try_),
            Message::Prepared => return self.offer(host, try_),
            Message::Question => return self.promise(host, try_),
        };
        self.commit(what, host, act, |world, answer| {
            if answer == Answer::Prepared {
                // The first byte may be written now, or the disks are emptied.
                world.hosts[host].content = GARBAGE;
                world.tries[try_].spent = true;
            }
            let said = match answer {
                Answer::Prepared => Message::Prepared,
                Answer::Sealed => Message::Sealed,
                Answer::Running => Message::Running,
                Answer::Unsealed => Message::Unsealed,
                // The record's title is in the air anyway.
                Answer::Record | Answer::Silent => return,
            };
            world.say(try_, said);
        });
    }

    /// Whether somebody would say this now, in place of what may be lost: what is repeated until it is heard, and the
    /// answer to it. An attempt that has not got as far as SEAL need not go on.
    fn is_said_again(&mut self, try_: usize, message: Message) -> bool {
        let (stamp, about) = (self.world.tries[try_].stamp, attempt(try_));
        let (source, destination) = self.book.ends(stamp);
        let (sends, receives) = (self.world.hosts[source], self.world.hosts[destination]);
        if !sends.is_awake() || !receives.is_awake() {
            return false;
        }
        let once = |mutant| self.book.rules.without(mutant);
        let seals = self.is_sealing(source, try_);
        let (mut gives, mut ends) = match self.state(source) {
            Some(State::Given { attempt, arrived, .. }) => (*attempt == about && !arrived, false),
            Some(State::Offered { attempt, offer, .. }) => (false, *attempt == about && *offer != Offer::Live),
            _ => (false, false),
        };
        gives &= !once(Mutant::GoSaidOnce);
        ends &= !once(Mutant::AbortSaidOnce);
        let asks = matches!(self.state(destination), Some(State::Sealed { attempt, .. }) if *attempt == about)
            && !once(Mutant::SealedNeverAsks)
            && !once(Mutant::GoSaidOnce);
        let promise = promised(self.book, &self.world, source, stamp);
        let mut answers = |act, answer| {
            let outcome = self.book.next(destination, receives.record, act);
            matches!(outcome, Outcome::Step { answer: given, .. } if given == answer)
        };
        match message {
            Message::Prepare | Message::Prepared => false,
            Message::Seal => seals,
            Message::Sealed => seals && answers(Act::Seal(stamp), Answer::Sealed),
            Message::Go => gives || asks && promise == Promise::Given,
            Message::Running => gives && answers(Act::Go(stamp), Answer::Running),
            Message::Abort => ends,
            Message::Unsealed => ends && answers(Act::Abort(stamp), Answer::Unsealed),
            Message::Question => asks,
            Message::NotGiven => asks && promise == Promise::NotGiven,
        }
    }

    fn offer(&mut self, host: usize, try_: usize) {
        let job = Job { try_: number(try_), stage: Stage::Asked };
        if self.world.hosts[host].job != Some(job) {
            return;
        }
        let offered = Some(Job { stage: Stage::Offered, ..job });
        let what = What::Receive(Message::Prepared, try_, host);
        if self.book.rules.without(Mutant::SealBeforeOffered) {
            let mut world = self.world;
            world.hosts[host].job = offered;
            return self.add(what, world);
        }
        let act = Act::Offer(self.world.tries[try_].stamp);
        self.commit(what, host, act, |world, _| world.hosts[host].job = offered);
    }

    fn promise(&mut self, host: usize, try_: usize) {
        let mut world = self.world;
        match promised(self.book, &self.world, host, self.world.tries[try_].stamp) {
            Promise::NotGiven => world.say(try_, Message::NotGiven),
            Promise::Given => world.say(try_, Message::Go),
            Promise::InProgress | Promise::Unknown => {}
        }
        self.add(What::Receive(Message::Question, try_, host), world);
    }

    pub(crate) fn meetings(&mut self, host: usize) {
        for number in 0..64 {
            if self.world.shown & (1 << number) == 0 {
                continue;
            }
            let peer = self.book.title(number).0;
            if peer != host {
                let shows = self.world.hosts[peer];
                self.is_late = !shows.is_awake() || self.book.shows(peer, shows.record) != 1 << number;
                self.commit(What::Meet { host, peer }, host, Act::Meet(number), |_, _| ());
                self.is_late = false;
            }
        }
    }

    fn is_sealing(&self, host: usize, try_: usize) -> bool {
        self.world.hosts[host].job == Some(Job { try_: number(try_), stage: Stage::Sealing })
    }

    pub(crate) fn give(&mut self, host: usize, try_: usize) {
        let act = Act::Give(self.world.tries[try_].stamp);
        self.commit(What::Receive(Message::Sealed, try_, host), host, act, |world, _| world.hosts[host].job = None);
    }
}

/// What a source answers to a sealed destination that asks, with what its process is in the middle of (M3).
pub(crate) fn promised(book: &Book, world: &World, host: usize, stamp: u16) -> Promise {
    let node = world.hosts[host];
    let live = node.job.map(|job| attempt(usize::from(job.try_)));
    book.rules.promise(machine(host), book.record(node.record), live, book.stamp(stamp))
}
