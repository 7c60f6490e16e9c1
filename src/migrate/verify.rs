//! The threads that ask the destination for digests: to find out what it has already (D12), and to verify the copy
//! (D14).
//!
//! Each has a phase connection of its own and some of the disks. Several questions are under way at once, so that a
//! distant destination does not cost a round trip for each; while it hashes, this side hashes the same regions. What is
//! asked next, and what an answer means, is the mirror's business (`mirror/checks.rs`). A connection that is lost takes
//! its claims with it, which are dropped: a claim is no copy, nothing of it can be late, and no fence is needed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dial::{dial_aside, wait_for};
use super::link::Link;
use super::wire::Message;
use crate::digest::{Digest, Hasher, place, question_regions, region_bytes};
use crate::dirty::Claim;
use crate::guest::Guest;
use crate::limits::{
    DIGEST_CONNECTIONS_MAX, DIGEST_PAUSE, DIGEST_RATE_MIN, DIGESTS_MAX, DRIVER_STACK, LINK_LOOK, LINK_SILENCE_MAX,
    PING_PERIOD, QUESTIONS_MAX, RECONNECT_MAX, RECONNECT_PAUSE, REDIAL_MAX, REPLY_TIMEOUT, VERIFY_PERIOD,
};
use crate::mirror::{Ask, Bell, Failure, Mirror};
use crate::ownership::{Instance, Stamp};
use crate::place::Place;
use crate::trunk::Trunk;
use crate::trunk::wire::Kind;

/// What all threads of one migration know.
pub(super) struct Peer<'a> {
    pub(super) guest: &'a Arc<Guest>,
    pub(super) way: Way,
    pub(super) stamp: Stamp,
    pub(super) instance: Instance,
}

/// How those who ask reach the destination.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// Each dials for itself.
    Dial(Place),
    /// One of them speaks inside the phase connection, whichever that is at the moment.
    Inside(Arc<Present>),
}

/// The phase connection that carries everything, as long as there is one.
#[derive(Debug, Default)]
pub(super) struct Present(Mutex<Option<Arc<Trunk>>>);

impl Present {
    /// It is this one from now on.
    pub(super) fn set(&self, trunk: &Arc<Trunk>) {
        *self.lock() = Some(Arc::clone(trunk));
    }

    /// The connection, once: whoever has lost it waits for another one.
    fn take(&self) -> Option<Arc<Trunk>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Trunk>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads. Dropping it tells them to end, and waits for none: one may be dialling a host that is silent, and holds
/// nothing meanwhile that anybody waits for.
#[derive(Debug, Default)]
pub(super) struct Checkers {
    stop: Arc<AtomicBool>,
    bells: Vec<Arc<Bell>>,
}

impl Checkers {
    /// How many threads there are for so many disks, each with a bell of its own; inside the phase connection one.
    pub(super) fn bells(disks: usize, way: &Way) -> Vec<Arc<Bell>> {
        let most = if matches!(way, Way::Inside(_)) { 1 } else { DIGEST_CONNECTIONS_MAX };
        (0..disks.clamp(1, most)).map(|_| Arc::default()).collect()
    }

    /// Starts a thread for each bell. The mirrors are those of all disks, in the order of the offer; the disks of a
    /// bell are every so-manieth.
    ///
    /// # Errors
    /// One line: there is no thread.
    pub(super) fn start(peer: &Peer<'_>, mirrors: &[Arc<Mirror>], bells: &[Arc<Bell>]) -> Result<Self, String> {
        let mut checkers = Self::default();
        for (number, bell) in bells.iter().enumerate() {
            let disks = mirrors.iter().enumerate().skip(number).step_by(bells.len());
            let disks = disks.filter(|(_, mirror)| mirror.is_comparing() || mirror.verifies());
            let disks: Vec<_> = disks
                .map(|(disk, mirror)| Disk {
                    number: u8::try_from(disk).unwrap_or(u8::MAX),
                    mirror: Arc::clone(mirror),
                })
                .collect();
            if disks.is_empty() {
                continue;
            }
            let mut checker = Checker {
                guest: Arc::clone(peer.guest),
                way: peer.way.clone(),
                stamp: peer.stamp,
                instance: peer.instance,
                disks,
                bell: Arc::clone(bell),
                stop: Arc::clone(&checkers.stop),
                hasher: Hasher::default(),
                heard: Instant::now(),
                answered: Instant::now(),
            };
            std::thread::Builder::new()
                .name(format!("digests {number}"))
                .stack_size(DRIVER_STACK)
                .spawn(move || checker.run())
                .map_err(|error| format!("no thread for digests: {error}"))?;
            checkers.bells.push(Arc::clone(bell));
        }
        Ok(checkers)
    }

    /// Tells them to end, without waiting for it.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.bells.iter().for_each(|bell| bell.ring());
    }
}

impl Drop for Checkers {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Disk {
    number: u8,
    mirror: Arc<Mirror>,
}

/// A question under way.
struct Question {
    disk: usize,
    claim: Claim,
    ours: [Digest; DIGESTS_MAX],
    /// Bytes that had to be read for it.
    read: u64,
}

impl Question {
    /// Bytes that it is about, of the disk that it asks for.
    fn bytes(&self, asked: &Disk) -> u64 {
        region_bytes(asked.mirror.size()) * self.claim.count() as u64
    }
}

/// How a connection came to its end.
enum End {
    /// It is dead, or the peer says something that is no answer.
    Lost(String),
    /// The migration is.
    Failed(usize, Failure),
}

/// One thread.
struct Checker {
    guest: Arc<Guest>,
    way: Way,
    stamp: Stamp,
    instance: Instance,
    disks: Vec<Disk>,
    bell: Arc<Bell>,
    stop: Arc<AtomicBool>,
    hasher: Hasher,
    /// When the destination last answered, or was owed nothing.
    heard: Instant,
    /// When it last said anything at all.
    answered: Instant,
}

type Questions = heapless::Deque<Question, QUESTIONS_MAX>;

impl Checker {
    fn run(&mut self) {
        let mut pause = RECONNECT_PAUSE.0;
        self.answered = Instant::now();
        loop {
            let answered_before = self.answered;
            let mut questions = Box::new(Questions::new());
            let ended = match self.connect() {
                Ok(mut link) => {
                    let ended = self.converse(&mut link, &mut questions);
                    if ended.is_err() {
                        // Answers to what nobody asks any more may be on their way.
                        link.shut();
                    }
                    ended
                }
                Err(end) => Err(end),
            };
            // What was under way is to be done again.
            drop(questions);
            let cause = match ended {
                Ok(()) => break,
                Err(End::Failed(disk, failure)) => {
                    self.disks[disk].mirror.fail(failure);
                    break;
                }
                Err(End::Lost(cause)) => cause,
            };
            if self.stopped() {
                break;
            }
            if self.answered > answered_before {
                pause = RECONNECT_PAUSE.0;
            }
            log::info!("digests: {cause}");
            self.tell_lost(Some(&cause));
            if self.answered.elapsed() > RECONNECT_MAX {
                self.give_up(&cause);
                break;
            }
            self.bell.wait(pause);
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        }
        // Whatever is not compared by now is copied.
        self.disks.iter().for_each(|disk| disk.mirror.end_comparison());
    }

    /// The destination cannot be asked: nothing can be verified. What could only be compared is copied, unless
    /// more than that was taken as equal on the user's word, of which nobody has seen a sample.
    fn give_up(&self, cause: &str) {
        let must = |mirror: &Mirror| mirror.verifies() || mirror.is_comparing() && mirror.counts().based > 0;
        for disk in self.disks.iter().filter(|disk| must(&disk.mirror)) {
            let text = format!("verify: disk {}: the destination cannot be asked: {cause}", disk.mirror.name());
            disk.mirror.fail(Failure { text });
        }
    }

    fn tell_lost(&self, cause: Option<&str>) {
        self.disks.iter().for_each(|disk| disk.mirror.set_verifier_lost(cause));
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn connect(&self) -> Result<Link, End> {
        // Whoever ends this thread waits for it.
        let may_wait = || if self.stopped() { Err(End::Lost("nobody asks any more".to_owned())) } else { Ok(()) };
        let place = match &self.way {
            Way::Dial(place) => place,
            Way::Inside(present) => {
                let deadline = Instant::now() + REDIAL_MAX;
                loop {
                    may_wait()?;
                    if let Some(trunk) = present.take() {
                        return Ok(Link::over(trunk, Kind::Digests));
                    }
                    if Instant::now() >= deadline {
                        return Err(End::Lost("the destination is out of reach".to_owned()));
                    }
                    self.bell.wait(LINK_LOOK);
                }
            }
        };
        let dialled = dial_aside(&self.guest, place, Instant::now() + REDIAL_MAX);
        let (link, theirs) =
            wait_for(&dialled, LINK_LOOK, may_wait)?.map_err(|no_link| End::Lost(no_link.to_string()))?;
        if theirs.instance != self.instance {
            // D12: the driver finds out by itself, and ends the attempt.
            return Err(End::Lost("the destination has been restarted".to_owned()));
        }
        Ok(link)
    }

    /// Asks and takes in answers until nothing is left to do.
    fn converse(&mut self, link: &mut Link, questions: &mut Questions) -> Result<(), End> {
        self.tell_lost(None);
        let mut turn = 0;
        let mut spoken = Instant::now();
        // When the answer before came, while another question was already waiting.
        let mut busy_since = None;
        while !self.stopped() {
            let rest = if questions.is_full() { Duration::ZERO } else { self.ask(link, questions, &mut turn)? };
            let asked = rest.is_zero() && !questions.is_full();
            if self.disks.iter().all(|disk| !disk.mirror.is_comparing() && !disk.mirror.verifies()) {
                return Ok(());
            }
            if asked {
                spoken = Instant::now();
            } else if questions.is_empty() {
                if spoken.elapsed() >= PING_PERIOD {
                    self.send(link, &Message::Ping { number: 0 })?;
                    spoken = Instant::now();
                }
                self.heard = Instant::now();
                self.bell.wait(rest);
            }
            let wait = if asked || questions.is_empty() { Duration::ZERO } else { LINK_LOOK };
            self.listen(link, questions, Instant::now() + wait, &mut busy_since)?;
            if let Some(question) = questions.front() {
                // Regions of a large disk are large, and the other side is silent while it reads one.
                let reading = Duration::from_secs(question.bytes(&self.disks[question.disk]) / DIGEST_RATE_MIN);
                if self.heard.elapsed() > LINK_SILENCE_MAX + reading {
                    return Err(End::Lost("the destination does not answer".to_owned()));
                }
            }
        }
        Ok(())
    }

    /// Asks one more question, of the next disk that has one. Returns how long nothing is to be asked: no time if
    /// something was.
    fn ask(&mut self, link: &mut Link, questions: &mut Questions, turn: &mut usize) -> Result<Duration, End> {
        let mut rest = VERIFY_PERIOD;
        for _ in 0..self.disks.len() {
            let at = *turn % self.disks.len();
            *turn = at + 1;
            let mirror = Arc::clone(&self.disks[at].mirror);
            match mirror.ask_next() {
                Ask::Hash(claim) => {
                    self.question(link, questions, at, claim)?;
                    // A walk goes through a disk in one go.
                    *turn = at;
                    return Ok(Duration::ZERO);
                }
                Ask::Rest(time) => rest = rest.min(time.max(DIGEST_PAUSE)),
                Ask::Compared => {
                    if !questions.iter().any(|question| question.disk == at) {
                        mirror.end_comparison();
                        rest = DIGEST_PAUSE;
                    }
                }
            }
        }
        Ok(rest)
    }

    /// Has a claim hashed there, and hashes it here meanwhile.
    fn question(&mut self, link: &mut Link, questions: &mut Questions, at: usize, claim: Claim) -> Result<(), End> {
        let disk = &self.disks[at];
        let (offset_bytes, _) = place(disk.mirror.size(), claim.first());
        let regions = u8::try_from(claim.count()).unwrap_or(u8::MAX);
        if questions.is_empty() {
            self.heard = Instant::now();
        }
        self.send(link, &Message::Digest { stamp: self.stamp, disk: disk.number, offset_bytes, regions })?;
        let mut question = Question { disk: at, claim, ours: [[0; 32]; DIGESTS_MAX], read: 0 };
        let digests = question.ours.get_mut(..question.claim.count()).unwrap_or_default();
        match disk.mirror.hash(&mut self.hasher, &question.claim, digests) {
            Ok(read) => question.read = read,
            Err(failure) => return Err(End::Failed(at, failure)),
        }
        // There is room: whoever asks has looked.
        let _ = questions.push_back(question);
        Ok(())
    }

    /// Takes in what has come, and waits for the first of it.
    fn listen(
        &mut self,
        link: &mut Link,
        questions: &mut Questions,
        deadline: Instant,
        busy_since: &mut Option<Instant>,
    ) -> Result<(), End> {
        let mut deadline = deadline;
        while let Some(message) = link.receive(deadline).map_err(|error| End::Lost(error.to_string()))? {
            self.heard = Instant::now();
            self.answered = self.heard;
            // Only the first is waited for; and a peer that never stops talking keeps nobody here.
            deadline = self.heard;
            if self.stopped() {
                break;
            }
            match message {
                Message::Digests { stamp, disk, offset_bytes, digests } if stamp.matches(&self.stamp) => {
                    let Some(question) = questions.pop_front() else {
                        return Err(End::Lost("the destination answers what was not asked".to_owned()));
                    };
                    let asked = &self.disks[question.disk];
                    let fits = disk == asked.number
                        && digests.len() == question.claim.count()
                        && offset_bytes == place(asked.mirror.size(), question.claim.first()).0;
                    if !fits {
                        return Err(End::Lost("the destination's digests do not fit the question".to_owned()));
                    }
                    // Between two answers of which the second was waiting already, it did nothing but hash.
                    let full = question.claim.count() as u64 >= question_regions(asked.mirror.size());
                    if let Some(since) = busy_since.take().filter(|_| full) {
                        let hashed = question.bytes(asked);
                        if question.read >= hashed {
                            asked.mirror.measured(hashed, self.heard.duration_since(since));
                        }
                    }
                    *busy_since = (!questions.is_empty()).then_some(self.heard);
                    asked.mirror.compare(question.claim, &question.ours[..digests.len()], &digests);
                }
                Message::Failed { stamp, cause, .. } if stamp.matches(&self.stamp) => {
                    let text = format!("the destination: {cause}");
                    return Err(End::Failed(0, Failure { text }));
                }
                Message::Record { stamp, .. } if stamp.matches(&self.stamp) => {
                    let text = "the destination has ended this attempt".to_owned();
                    return Err(End::Failed(0, Failure { text }));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn send(&self, link: &mut Link, message: &Message) -> Result<(), End> {
        link.send(message, Instant::now() + REPLY_TIMEOUT).map_err(|error| End::Lost(error.to_string()))
    }
}

#[cfg(test)]
mod tests;
