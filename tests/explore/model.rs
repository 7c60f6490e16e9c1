//! What can happen: every move that leads from one [`World`] to another.
//!
//! The order of events on the source is that of `migrate/drive.rs`: PREPARE, Offer, quiesce and final pass, SEAL, Give,
//! GO; or End, and only then the gates open and ABORT is said. What a process says again and again by itself (GO,
//! ABORT, a question of a sealed host, its title) counts as sent from the moment on at which it would begin to.
//!
//! A commit that is cut short by the end of its process leaves a record that is seen and not durable; nothing else of
//! it is seen by anybody, since the keeper's lock is held. So a commit is one move with several ends.

use blockferry::ownership::{Answer, Attempt, Door, Heard, Offer, State};

use super::book::{Act, Book, Outcome, attempt, try_of};
use super::mutants::Mutant;
use super::world::{Faults, GARBAGE, HOSTS, Job, Marks, Message, Node, Process, Stage, TRIES, Try, World};

/// How large the explored world is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Hosts, at most [`HOSTS`].
    pub(crate) hosts: usize,
    /// Attempts, at most [`TRIES`].
    pub(crate) attempts: usize,
    /// Guest writes.
    pub(crate) writes: u8,
    /// Faults.
    pub(crate) faults: Faults,
}

impl Bounds {
    /// Reads `hosts=3,attempts=2,crashes=1`; what is not named is one write, and nothing that goes wrong.
    pub(crate) fn parse(text: &str) -> Self {
        let faults = Faults { crashes: 0, powers: 0, failures: 0, words: 0, mishaps: 0 };
        let mut bounds = Self { hosts: 2, attempts: 1, writes: 1, faults };
        for part in text.split(',') {
            let (name, number) = part.split_once('=').unwrap_or_else(|| panic!("{part}: not name=number"));
            let number: u8 = number.parse().unwrap_or_else(|_| panic!("{part}: not a small number"));
            match name {
                "hosts" => bounds.hosts = usize::from(number).min(HOSTS),
                "attempts" => bounds.attempts = usize::from(number).min(TRIES),
                "writes" => bounds.writes = number,
                "crashes" => bounds.faults.crashes = number,
                "powers" => bounds.faults.powers = number,
                "failures" => bounds.faults.failures = number,
                "words" => bounds.faults.words = number,
                "mishaps" => bounds.faults.mishaps = number,
                _ => panic!("{name}: no such bound"),
            }
        }
        bounds
    }
}

/// A move: what happens, and how the commit ends that it needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    pub(crate) what: What,
    pub(crate) end: End,
    /// It needs a message that nobody would say again: it may be lost.
    is_late: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    Done,
    /// The process dies inside the commit: the record is seen, not durable, nobody is answered.
    CutShort,
    /// The commit fails: what is on the disk is not known.
    Failed,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum What {
    Write(usize),
    Start { try_: usize, source: usize, destination: usize },
    FinalPass { try_: usize, source: usize },
    Cancel(usize),
    EndUndriven(usize),
    OpenGate(usize),
    Receive(Message, usize, usize),
    GiveUp(usize),
    Meet { host: usize, peer: usize },
    Crash(usize),
    PowerLoss(usize),
    Restart(usize),
    Retry(usize),
    Sync(usize),
    Take(usize, Heard),
    ForgetPeer(usize),
    Forget(usize, Heard),
    Claim(usize),
    Copied(usize, usize),
    Lost(usize),
}

impl Move {
    /// Whether it can be waited for: nothing is needed but what somebody says until it is heard.
    pub(crate) fn is_sure(&self) -> bool {
        !self.is_late
    }

    /// Whether the operator makes it.
    pub(crate) fn is_word(&self) -> bool {
        matches!(self.what, What::Take(..) | What::ForgetPeer(_) | What::Forget(..) | What::Claim(_))
    }
}

/// The world in which everything begins: A owns, nothing has been said.
pub(crate) fn beginning(book: &mut Book, bounds: &Bounds) -> World {
    let Outcome::Step { record, .. } = book.next(0, 0, Act::Claim(0)) else {
        unreachable!("a guest without a record can be claimed")
    };
    let empty = Node { record: 0, durable: 0, content: GARBAGE, process: Process::Up, job: None };
    let mut hosts = [empty; HOSTS];
    hosts[0] = Node { record, durable: record, content: 0, ..empty };
    World {
        hosts,
        tries: [Try { stamp: 0, said: 0, spent: false }; TRIES],
        shown: 0,
        truth: 0,
        writes: 0,
        words: 0,
        left: bounds.faults,
        marks: Marks { residue: false, vouched: false, orphaned: false, bereft: false, lost: false },
    }
}

/// All moves out of a world.
pub(crate) struct Moves<'a> {
    pub(crate) book: &'a mut Book,
    pub(crate) bounds: &'a Bounds,
    pub(crate) world: World,
    /// Whether what is looked at needs a message that may be lost.
    pub(crate) is_late: bool,
    /// What has been found.
    pub(crate) found: Vec<(Move, World)>,
}

impl<'a> Moves<'a> {
    /// Finds all moves out of `world`.
    pub(crate) fn of(book: &'a mut Book, bounds: &'a Bounds, world: World, found: Vec<(Move, World)>) -> Self {
        let mut moves = Self { book, bounds, world, is_late: false, found };
        moves.found.clear();
        for host in 0..bounds.hosts {
            if world.hosts[host].is_awake() {
                moves.guest(host);
                moves.source(host);
                moves.destination(host);
                moves.meetings(host);
                moves.operator(host);
            }
            moves.process(host);
            moves.mishaps(host);
        }
        for try_ in 0..TRIES {
            for message in Message::ALL {
                moves.receive(try_, message);
                moves.is_late = false;
            }
        }
        moves
    }

    // ---- what every move is made of ----

    pub(crate) fn add(&mut self, what: What, world: World) {
        if world != self.world {
            self.push(what, End::Done, world);
        }
    }

    fn push(&mut self, what: What, end: End, world: World) {
        self.found.push((Move { what, end, is_late: self.is_late }, world));
    }

    /// Lets `act` happen to a host's record; `then` follows once the change is durable. `false`: it is refused.
    pub(crate) fn commit(&mut self, what: What, host: usize, act: Act, then: impl FnOnce(&mut World, Answer)) -> bool {
        let before = self.world.hosts[host];
        let Outcome::Step { record, answer } = self.book.next(host, before.record, act) else { return false };
        let changed = record != before.record;
        let mut done = self.world;
        then(&mut done, answer);
        done.hosts[host].record = record;
        // M4: durable, then visible.
        if !self.book.rules.without(Mutant::AnswerBeforeDurable) {
            done.hosts[host].durable = record;
        }
        self.speak(&mut done, host);
        self.add(what, done);
        if changed && self.world.left.crashes > 0 {
            let mut dead = self.world;
            dead.left.crashes -= 1;
            dead.hosts[host].record = record;
            dies(&mut dead, self.book, host);
            self.push(what, End::CutShort, dead);
        }
        if changed && self.world.left.failures > 0 {
            let mut failed = self.world;
            failed.left.failures -= 1;
            let node = &mut failed.hosts[host];
            if self.book.rules.without(Mutant::FailedCommitIgnored) {
                // The process goes by the old record and lets the guest go on; the disk has the new one.
                *node = Node { durable: record, job: None, ..*node };
            } else {
                // The driver stops with "not known from here", the gates are fenced.
                *node = Node { record, process: Process::Unknown, job: None, ..*node };
            }
            self.push(what, End::Failed, failed);
        }
        true
    }

    /// What an awake host says by itself, as long as its record stays.
    pub(crate) fn speak(&mut self, world: &mut World, host: usize) {
        let node = world.hosts[host];
        if !node.is_awake() {
            return;
        }
        let (about, message) = match self.book.state(host, node.record) {
            Some(State::Given { attempt, arrived: false, .. }) => (*attempt, Message::Go),
            Some(State::Offered { attempt, offer: Offer::Ended | Offer::Closed, .. }) => (*attempt, Message::Abort),
            Some(State::Sealed { attempt, .. }) => (*attempt, Message::Question),
            _ => (Attempt::NONE, Message::Question),
        };
        if let Some(try_) = try_of(about) {
            world.say(try_, message);
        }
        world.shown |= self.book.shows(host, node.record);
    }

    pub(crate) fn state(&self, host: usize) -> Option<&State> {
        self.book.state(host, self.world.hosts[host].record)
    }

    // ---- the guest ----

    fn guest(&mut self, host: usize) {
        let quiesced = self.world.is_quiesced(host) && !self.book.rules.without(Mutant::SealWithoutQuiesce);
        if self.world.writes == self.bounds.writes || quiesced || !is_serving(self.book, &self.world, host) {
            return;
        }
        let mut world = self.world;
        world.writes += 1;
        world.hosts[host].content = world.writes;
        // Who was overruled by a word writes on until it hears of it: the operator has been told.
        if !is_overruled(self.book, self.bounds, &self.world, host) {
            world.truth = world.writes;
        }
        self.add(What::Write(host), world);
    }

    // ---- the source ----

    fn source(&mut self, host: usize) {
        let node = self.world.hosts[host];
        let Some(job) = node.job else {
            self.start(host);
            match self.state(host) {
                // A cancel that comes when GIVEN has begun (M3).
                Some(State::Given { attempt, .. }) => {
                    let end = Act::End(*attempt);
                    self.commit(What::Cancel(host), host, end, |_, _| ());
                }
                // The record's commit had failed, and so the driver had left.
                Some(State::Offered { attempt, offer: Offer::Live, .. }) => {
                    let end = Act::End(*attempt);
                    self.commit(What::EndUndriven(host), host, end, |_, _| ());
                }
                _ => {}
            }
            return;
        };
        let try_ = usize::from(job.try_);
        self.final_pass(host, try_, job.stage);
        // Any failure, and the user's cancel. The attempt ends for good, then the gates open, then ABORT is said (M3).
        let end = Act::End(attempt(try_));
        let ended = self.commit(What::Cancel(host), host, end, |world, _| {
            world.hosts[host].job = None;
            world.say(try_, Message::Abort);
        });
        if !ended {
            let mut world = self.world;
            world.hosts[host].job = None;
            self.add(What::Cancel(host), world);
        }
        if self.book.rules.without(Mutant::GatesOpenBeforeEnd) && job.stage == Stage::Sealing {
            let mut world = self.world;
            world.hosts[host].job = Some(Job { stage: Stage::Offered, ..job });
            self.add(What::OpenGate(host), world);
        }
        if self.book.rules.without(Mutant::AbortBeforeEnd) {
            let mut world = self.world;
            world.say(try_, Message::Abort);
            self.add(What::Cancel(host), world);
        }
        if self.book.rules.without(Mutant::GiveWithoutSealed) && job.stage == Stage::Sealing {
            self.give(host, try_);
        }
    }

    fn start(&mut self, source: usize) {
        let node = self.world.hosts[source];
        let second_offer = self.book.rules.without(Mutant::SecondOffer);
        let ended = match self.state(source) {
            Some(State::Owner { attempt }) => try_of(*attempt),
            Some(State::Offered { offer: Offer::Ended, .. }) if second_offer => None,
            _ => return,
        };
        if let Some(try_) = ended.filter(|_| self.book.rules.without(Mutant::NumberUsedAgain)) {
            let mut world = self.world;
            world.tries[try_].spent = false;
            self.begin(world, try_, source);
        }
        let Some(try_) = (0..self.bounds.attempts).find(|&try_| self.world.tries[try_].stamp == 0) else { return };
        // Hosts that nobody has used are alike: the first of them stands for all.
        let first_unused = (0..self.bounds.hosts).find(|&host| !is_used(self.book, &self.world, host));
        for destination in 0..self.bounds.hosts {
            let is_choice = is_used(self.book, &self.world, destination) || Some(destination) == first_unused;
            if destination == source || !is_choice {
                continue;
            }
            let Some(stamp) = self.book.new_stamp(node.record, try_, source, destination) else { continue };
            let mut world = self.world;
            world.tries[try_].stamp = stamp;
            self.begin(world, try_, source);
        }
    }

    fn begin(&mut self, mut world: World, try_: usize, source: usize) {
        let (from, destination) = self.book.ends(world.tries[try_].stamp);
        if from == source {
            world.say(try_, Message::Prepare);
            world.hosts[source].job = Some(Job { try_: number(try_), stage: Stage::Asked });
            self.add(What::Start { try_, source, destination }, world);
        }
    }

    /// Quiesces and copies the rest. The destination must be receiving this attempt, or its data door is shut (D4).
    fn final_pass(&mut self, source: usize, try_: usize, stage: Stage) {
        if stage != Stage::Offered {
            return;
        }
        let offered = match self.state(source) {
            Some(State::Offered { attempt: offered, offer: Offer::Live, .. }) => *offered == attempt(try_),
            Some(State::Owner { .. }) => self.book.rules.without(Mutant::SealBeforeOffered),
            _ => false,
        };
        let (_, destination) = self.book.ends(self.world.tries[try_].stamp);
        let receiving = matches!(
            self.state(destination),
            Some(State::Receiving { attempt: received, .. }) if *received == attempt(try_)
        );
        if offered && receiving && self.world.hosts[destination].is_awake() {
            let mut world = self.world;
            world.hosts[destination].content = world.hosts[source].content;
            world.hosts[source].job = Some(Job { try_: number(try_), stage: Stage::Sealing });
            world.say(try_, Message::Seal);
            self.add(What::FinalPass { try_, source }, world);
        }
    }

    // ---- the destination ----

    /// This side ends an attempt, at its user's wish or because something failed.
    fn destination(&mut self, host: usize) {
        let (Some(State::Receiving { attempt, .. }) | Some(State::Sealed { attempt, .. })) = self.state(host) else {
            return;
        };
        let end = Act::AbortReceiving(*attempt);
        let ended = self.commit(What::GiveUp(host), host, end, |_, _| ());
        if !ended && self.book.rules.without(Mutant::SealedCleanedUp) {
            let mut world = self.world;
            world.hosts[host].content = GARBAGE;
            self.add(What::GiveUp(host), world);
        }
    }

    // ---- the process ----

    fn process(&mut self, host: usize) {
        let node = self.world.hosts[host];
        let mut world = self.world;
        match node.process {
            Process::Down => {
                if let Outcome::Step { record, .. } = self.book.next(host, node.record, Act::Restart) {
                    world.hosts[host].record = record;
                    // M4: written again before anybody is answered.
                    if !self.book.rules.without(Mutant::RestartNotWritten) {
                        world.hosts[host].durable = record;
                    }
                    world.hosts[host].process = Process::Up;
                    self.speak(&mut world, host);
                    self.add(What::Restart(host), world);
                }
            }
            Process::Unknown => {
                world.hosts[host] = Node { durable: node.record, process: Process::Up, ..node };
                self.speak(&mut world, host);
                self.add(What::Retry(host), world);
            }
            Process::Up if node.record != node.durable && !self.book.rules.without(Mutant::FailedCommitIgnored) => {
                world.hosts[host].durable = node.record;
                self.add(What::Sync(host), world);
            }
            Process::Up => {}
        }
        if !is_used(self.book, &self.world, host) {
            return;
        }
        if self.world.left.crashes > 0 && node.process != Process::Down {
            let mut world = self.world;
            world.left.crashes -= 1;
            dies(&mut world, self.book, host);
            if self.book.rules.without(Mutant::FailedCommitIgnored) {
                world.hosts[host].record = node.durable;
            }
            self.add(What::Crash(host), world);
        }
        // D12: what was received and not sealed is not on the disk yet.
        let receiving = matches!(self.book.state(host, node.durable), Some(State::Receiving { .. }));
        if self.world.left.powers > 0 && (node.record != node.durable || receiving) {
            let mut world = self.world;
            world.left.powers -= 1;
            dies(&mut world, self.book, host);
            world.hosts[host].record = node.durable;
            if receiving {
                world.hosts[host].content = GARBAGE;
            }
            self.add(What::PowerLoss(host), world);
        }
    }
}

pub(crate) fn number(try_: usize) -> u8 {
    u8::try_from(try_).expect("few tries")
}

/// A process ends: memory and connections are gone, and with them the challenges of its hellos (M1).
pub(crate) fn dies(world: &mut World, book: &Book, host: usize) {
    let node = &mut world.hosts[host];
    node.process = Process::Down;
    node.job = None;
    for try_ in &mut world.tries {
        try_.spent |= try_.stamp != 0 && book.ends(try_.stamp).1 == host;
    }
}

/// Whether a host has ever had a part in anything.
pub(crate) fn is_used(book: &Book, world: &World, host: usize) -> bool {
    let named = |try_: &Try| try_.stamp != 0 && book.ends(try_.stamp).1 == host;
    world.hosts[host].record != 0 || world.hosts[host].durable != 0 || host == 0 || world.tries.iter().any(named)
}

/// Whether a host's guest door lets the guest in; the gate behind it may be quiesced.
pub(crate) fn is_serving(book: &Book, world: &World, host: usize) -> bool {
    world.hosts[host].is_awake() && matches!(book.door(host, world.hosts[host].record), Door::Serving { .. })
}

/// Whether some record proves that a word overruled this host: it fences itself as soon as it hears of it (M8).
pub(crate) fn is_overruled(book: &Book, bounds: &Bounds, world: &World, host: usize) -> bool {
    let Some(mine) = book.record(world.hosts[host].record) else { return false };
    let records = (0..bounds.hosts).filter_map(|other| book.record(world.hosts[other].record));
    records.map(|record| record.title()).any(|title| title.overrules(&mine.title()))
}
