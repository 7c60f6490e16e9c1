//! What comes from outside the protocol: the operator's words (`recover`, `claim`), and what should not happen to a
//! state directory.
//!
//! The peer is asked first, and what its answer means is the product's to say; but that it is silent may always be, for
//! a link can be down while both ends live. A word is one move: what is heard and then changes before the word is given
//! is as good as silence.

use blockferry::ownership::{Answer, Door, Heard, Record, State, heard_promise};

use super::book::{Act, Book, Outcome, index, machine, try_of};
use super::messages::promised;
use super::model::{Bounds, Moves, What, dies, is_used};
use super::mutants::Rules;
use super::world::{GARBAGE, Message, Node, Process, World};

impl Moves<'_> {
    // ---- the operator ----

    /// `recover` on this host. The peer is asked first; that it does not answer may always be.
    pub(crate) fn operator(&mut self, host: usize) {
        let node = self.world.hosts[host];
        if self.world.left.words == 0 || node.record == 0 {
            return;
        }
        let sealed = matches!(self.state(host), Some(State::Sealed { .. }));
        let answered = heard(self.book, &self.world, host);
        for heard in [Some(Heard::Silence), answered].into_iter().flatten() {
            self.take(host, heard, sealed);
            self.forget(host, heard, sealed);
        }
        let number = self.world.words + 1;
        let rivals = has_rivals(self.book, self.bounds, &self.world, host, false);
        self.word(What::ForgetPeer(host), host, Act::ForgetPeer, |world| {
            world.marks.vouched = true;
            world.marks.residue |= rivals;
        });
        // Where nothing is left that could be claimed twice, a claim is another guest's.
        if !self.book.record(node.record).is_some_and(Record::is_forgotten) {
            self.word(What::Claim(host), host, Act::Claim(number), |_| ());
        }
    }

    /// A word. Its commit is not cut short: nobody is told anything before it is durable.
    fn word(&mut self, what: What, host: usize, act: Act, then: impl FnOnce(&mut World)) {
        if let Outcome::Step { record, .. } = self.book.next(host, self.world.hosts[host].record, act) {
            let mut world = self.world;
            world.left.words -= 1;
            world.words += 1;
            world.hosts[host].record = record;
            world.hosts[host].durable = record;
            then(&mut world);
            self.speak(&mut world, host);
            self.add(what, world);
        }
    }

    fn take(&mut self, host: usize, heard: Heard, sealed: bool) {
        let content = self.world.hosts[host].content;
        let rivals = has_rivals(self.book, self.bounds, &self.world, host, sealed);
        let act = Act::Take(self.world.words + 1, heard);
        self.word(What::Take(host, heard), host, act, |world| {
            if heard == Heard::Silence {
                world.marks.residue |= rivals;
            } else {
                world.marks.lost |= content != world.truth && !world.marks.residue;
            }
            world.marks.vouched = true;
            // The operator was told what the guest may lose.
            world.truth = content;
        });
    }

    fn forget(&mut self, host: usize, heard: Heard, sealed: bool) {
        if sealed && self.world.marks.bereft {
            return;
        }
        self.word(What::Forget(host, heard), host, Act::Forget(heard), |world| {
            world.marks.orphaned |= sealed && heard == Heard::Silence;
        });
    }

    // ---- what should not happen to a state directory ----

    pub(crate) fn mishaps(&mut self, host: usize) {
        let node = self.world.hosts[host];
        if self.world.left.mishaps == 0 {
            return;
        }
        let mut world = self.world;
        world.left.mishaps -= 1;
        if matches!(self.state(host), Some(State::Given { .. })) && self.world.words == 0 {
            let mut lost = world;
            lost.marks.bereft = true;
            dies(&mut lost, self.book, host);
            lost.hosts[host].record = 0;
            lost.hosts[host].durable = 0;
            self.add(What::Lost(host), lost);
        }
        let unused = (0..self.bounds.hosts).find(|&host| !is_used(self.book, &self.world, host));
        if let Some(to) = unused.filter(|_| node.durable != 0) {
            let copy = Node { record: node.durable, process: Process::Down, job: None, ..node };
            world.hosts[to] = copy;
            self.add(What::Copied(host, to), world);
        }
    }
}

/// Whether a word at `host` against silence may make two owners: somebody else serves, or sleeps as an owner, or is
/// sealed and has GO on its way. For a sealed host a sleeping source does not count: it offered, and stays shut (M5).
fn has_rivals(book: &mut Book, bounds: &Bounds, world: &World, host: usize, sealed: bool) -> bool {
    let product = Rules::all();
    (0..bounds.hosts).filter(|&other| other != host).any(|other| {
        let node = world.hosts[other];
        let opens = |record| matches!(product.door(machine(other), record), Door::Serving { .. });
        let lives = node.process != Process::Down && opens(book.record(node.record));
        let owns = [node.record, node.durable]
            .iter()
            .any(|&record| matches!(book.state(other, record), Some(State::Owner { .. } | State::Offered { .. })));
        let goes = [node.record, node.durable].iter().any(|&record| match book.state(other, record) {
            Some(State::Sealed { attempt, .. }) => {
                try_of(*attempt).is_some_and(|try_| world.is_said(try_, Message::Go))
            }
            _ => false,
        });
        lives || goes || (owns && (!sealed || world.marks.vouched))
    })
}

/// What a peer says that answers; none if it does not.
fn heard(book: &mut Book, world: &World, host: usize) -> Option<Heard> {
    let record = book.record(world.hosts[host].record)?.clone();
    let other = index(record.peer()?.host);
    if other == host || !world.hosts[other].is_awake() {
        return None;
    }
    let stamp = record.attempt().and_then(try_of).map(|try_| world.tries[try_].stamp);
    let theirs = world.hosts[other].record;
    Some(match (&record.state, stamp) {
        (State::Sealed { .. }, Some(stamp)) => heard_promise(promised(book, world, other, stamp)),
        // It is told that the offer has ended, and what it says settles that.
        (State::Offered { .. }, Some(stamp)) if says_unsealed(book.next(other, theirs, Act::Abort(stamp))) => {
            Heard::Decides
        }
        _ => {
            let theirs = book.record(theirs).filter(|theirs| theirs.host == machine(other));
            book.rules.heard(&record, theirs)
        }
    })
}

fn says_unsealed(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Step { answer: Answer::Unsealed, .. })
}

/// Whether a further word, given after the peers were asked, would make somebody the owner.
pub(crate) fn can_be_taken(book: &mut Book, bounds: &Bounds, world: &World) -> bool {
    (0..bounds.hosts).any(|host| {
        let node = world.hosts[host];
        if !node.is_awake() || node.content == GARBAGE {
            return false;
        }
        let heard = heard(book, world, host).unwrap_or(Heard::Silence);
        matches!(book.next(host, node.record, Act::Take(world.words + 1, heard)), Outcome::Step { .. })
    })
}
