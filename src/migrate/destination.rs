//! The destination of a migration: receives, seals, owns.
//!
//! One match over (stage x message), in [`Destination::answer`]. The record says what this host is to the guest; the
//! [`Stage`] beside it holds what only lives as long as the process: who may open data connections, who writes back.
//! What was made and received is in the journal beside the record. A phase connection is nothing but a way for
//! messages: when it is lost nothing changes here, and the source may go on over another one (M2, M10).
//!
//! Everything that must not happen at once happens under the stage's lock: a data connection is checked and entered
//! under it, and a fence ends all connections and waits for their writers under it (D4).

mod check;
mod digest;
mod directory;
mod prepare;
mod reception;
mod remains;
mod state;

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use digest::{Asker, NoAnswer};
use directory::KnownName;
pub use directory::MigrationDirectory;
pub(super) use directory::Opened;
use reception::Reception;
use remains::Fate;
use state::Loading;

use super::beat::while_working;
use super::link::{Link, LinkError};
use super::stream::Stream;
use super::wire::{
    BootId, Capabilities, Challenge, Epoch, Hello, Message, Role, Standing, VERSION_HIGHEST, VERSION_LOWEST, cut,
};
use crate::digest::{Digest, Hasher};
use crate::export::{Door, Gate};
use crate::guest::Guest;
use crate::limits::{DRIVER_STACK, HELLO_TIMEOUT, LINK_IDLE_MAX, LINK_LOOK, REPLY_TIMEOUT, STREAM_STATE_ROOM};
use crate::ownership::{Answer, Attempt, Event, Images, KeepError, Peer, Promise, Receipt, Record, Stamp, State, next};
use crate::socket::Socket;
use crate::trunk::{Channel, Trunk};

/// What this process receives.
#[derive(Debug, Default)]
pub struct Destination {
    inner: Mutex<Inner>,
    /// The guest's state, if a VMM driver takes it in.
    state: Loading,
}

#[derive(Debug, Default)]
struct Inner {
    stage: Stage,
    /// The attempt that this side ended last: the source is told why.
    ended: Option<Ended>,
    /// Of the attempt that was sealed last, until it owns.
    sealed: Option<Receipt>,
}

/// An attempt that this side has ended.
#[derive(Debug)]
struct Ended {
    stamp: Stamp,
    cause: String,
    /// The source has been told without having asked.
    told: bool,
}

/// What of an attempt only lives in memory. An attempt that is sealed or owns needs nothing but the record.
#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    Receiving(Box<Reception>),
}

/// Speaks the phase protocol on one connection until it ends. One that is `alone` came another way than through the
/// door that the source could open data connections to.
pub fn serve(guest: &Arc<Guest>, socket: &Arc<Socket>, alone: bool) {
    socket.set_keep_alive(LINK_IDLE_MAX);
    let mut link = Link::new(Arc::clone(socket));
    if let Err(cause) = converse(guest, &mut link, alone) {
        log::info!("migration door: phase connection closed: {cause}");
    }
}

fn converse(guest: &Arc<Guest>, link: &mut Link, alone: bool) -> Result<(), String> {
    let challenge = Challenge::random().map_err(|error| error.to_string())?;
    let ours = hello(guest, Role::Destination, challenge, link.socket(), alone);
    let (theirs, _) = link.hello(&ours, Instant::now() + HELLO_TIMEOUT).map_err(|error| error.to_string())?;
    if theirs.guest != ours.guest {
        return Err(format!("the peer speaks of guest '{}', this is '{}'", theirs.guest.escape_debug(), guest.name));
    }
    meet(guest, &theirs);
    let mut session = Session::new(theirs, Some(challenge));
    let mut heard = Instant::now();
    let mut stream = None;
    loop {
        match link.receive(Instant::now() + LINK_LOOK) {
            Ok(Some(Message::Ping { number })) => {
                heard = Instant::now();
                link.send(&Message::Pong { number }, heard + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
            }
            Ok(Some(Message::Stream { stamp, instance, epoch, token })) => {
                session.stamp = Some(stamp);
                let known = KnownName { attempt: stamp.attempt, instance, epoch, token };
                let answer = match guest.destination.open_stream(guest, known, stream.is_some()) {
                    Ok(opened) => {
                        stream = Some(Stream::start(guest, link, opened, &session.theirs)?);
                        Message::Streaming { stamp, epoch }
                    }
                    Err(cause) => guest.destination.why_ended(&stamp).unwrap_or_else(|| failed(stamp, &cause)),
                };
                heard = Instant::now();
                link.send(&answer, heard + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
            }
            Ok(Some(Message::State { stamp, ran })) => {
                log::debug!("migration door: received STATE");
                let Some(trunk) = link.trunk().cloned() else {
                    // This connection is the state's from here on.
                    return guest.destination.take_state(guest, link, stamp, ran);
                };
                session.stamp = Some(stamp);
                heard = Instant::now();
                if let Err(cause) = guest.destination.take_state_inside(guest, trunk, stamp, ran) {
                    let answer = failed(stamp, &cause);
                    link.send(&answer, heard + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
                }
            }
            Ok(Some(Message::StateEnd { stamp, bytes })) => {
                heard = Instant::now();
                guest.destination.state.set_length(&stamp, bytes);
            }
            Ok(Some(Message::StateQuestion { stamp })) => {
                heard = Instant::now();
                let (standing, cause) = guest.destination.state.standing(&stamp);
                let is = Message::StateIs { stamp, standing, cause: cut(&cause) };
                // Who asks all the time leaves no moment for news.
                let ended = (standing == Standing::None).then(|| guest.destination.why_ended_now(&stamp)).flatten();
                let answer = ended.unwrap_or(is);
                link.send(&answer, heard + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
            }
            Ok(Some(message)) => {
                log::debug!("migration door: received {}", message.name());
                // Asked by the thousand, and as long as a small read each.
                let is_short = matches!(message, Message::Digest { .. });
                let work = || guest.destination.answer(guest, &mut session, message);
                let answer = if is_short { work() } else { while_working(link, work) }?;
                heard = Instant::now();
                let Some(answer) = answer else { continue };
                log::debug!("migration door: answered {}", answer.name());
                let sent = link.send(&answer, Instant::now() + REPLY_TIMEOUT);
                if matches!(answer, Message::Running { .. }) {
                    // Whether anybody hears it or not: this host owns.
                    let _ = guest.destination.run_guest(guest);
                    guest.destination.keep_receipt(guest);
                }
                sent.map_err(|error| error.to_string())?;
                // The answer may have taken long; the peer's silence begins now.
                heard = Instant::now();
            }
            Ok(None) if link.heard().map_or(heard, |any| any.max(heard)).elapsed() > LINK_IDLE_MAX => {
                return Err(LinkError::Late.to_string());
            }
            Ok(None) => {
                if let Some(news) = guest.destination.news(guest, &session) {
                    link.send(&news, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Answers whoever asks for digests on a connection that carries blocks too, until it ends.
pub(super) fn answer_digests(guest: &Arc<Guest>, link: &mut Link, theirs: Hello) {
    let mut session = Session::new(theirs, None);
    let ended = loop {
        let answer = match link.receive(Instant::now() + LINK_IDLE_MAX) {
            Ok(Some(message @ Message::Digest { .. })) => guest.destination.answer(guest, &mut session, message),
            Ok(Some(Message::Ping { number })) => Ok(Some(Message::Pong { number })),
            Ok(Some(other)) => Err(format!("the peer sent {} where digests are asked for", other.name())),
            Ok(None) => continue,
            Err(error) => Err(error.to_string()),
        };
        let sent = answer.and_then(|answer| match answer {
            Some(answer) => link.send(&answer, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string()),
            None => Ok(()),
        });
        if let Err(cause) = sent {
            break cause;
        }
    };
    log::debug!("migration door: digests: {ended}");
    link.shut();
}

/// This side's hello on `socket`. A door that listens at every address of this host is reached at the one that the
/// peer sees. Beside a connection that is `alone` no others can be opened.
pub fn hello(guest: &Guest, role: Role, challenge: Challenge, socket: &Socket, alone: bool) -> Hello {
    let address = guest.migration_address.as_ref().map(|door| door.seen_at(socket.local_ip()).to_string());
    let inside =
        Capabilities::STREAM.with(Capabilities::LAYERS).with(Capabilities::STATE).with(Capabilities::STATE_END);
    Hello {
        versions: (VERSION_LOWEST, VERSION_HIGHEST),
        role,
        capabilities: if alone { inside } else { inside.with(Capabilities::NBD) },
        guest: cut(&guest.name),
        title: guest.record().ok().flatten().map(|record| record.title()),
        boot: BootId(guest.boot),
        instance: guest.instance,
        challenge,
        host: guest.host,
        address: cut(&address.unwrap_or_default()),
    }
}

/// M8: whatever the peer's hello proves of a higher order.
pub(super) fn meet(guest: &Guest, theirs: &Hello) {
    let Some(title) = theirs.title else { return };
    let peer = Peer { host: theirs.host, address: cut(&theirs.address) };
    if let Err(error) = guest.apply(&Event::Meet { title, peer }) {
        log::warn!("migration: {error}");
    }
}

/// What one phase connection knows.
struct Session {
    theirs: Hello,
    /// Ours; counts once (M1).
    challenge: Option<Challenge>,
    /// The attempt that it last spoke of.
    stamp: Option<Stamp>,
    /// Among those that ask for digests; later connections count more.
    asker: Asker,
    /// Once it has asked.
    hasher: Option<Hasher>,
}

impl Session {
    fn new(theirs: Hello, challenge: Option<Challenge>) -> Self {
        Self { theirs, challenge, stamp: None, asker: Asker::next(), hasher: None }
    }
}

impl Destination {
    /// The one match of the destination. `None`: nothing is to be answered.
    ///
    /// # Errors
    /// The peer broke the protocol, or nothing may be answered (M4): the connection ends, with this line for the log.
    fn answer(&self, guest: &Guest, session: &mut Session, message: Message) -> Result<Option<Message>, String> {
        if let Message::Digest { stamp, disk, offset_bytes, regions } = message {
            return self.digest(guest, session, stamp, (disk, offset_bytes, regions)).map(Some);
        }
        if let Message::LayersQuestion { stamp, disk, page } = message {
            session.stamp = Some(stamp);
            return self.layers(guest, stamp, disk, page).map(Some);
        }
        let mut inner = self.lock();
        session.stamp = message.stamp().copied().or(session.stamp);
        let receiving = match &inner.stage {
            Stage::Receiving(reception) => message.stamp().is_some_and(|stamp| stamp.matches(&reception.stamp)),
            Stage::Idle => false,
        };
        let answer = match (receiving, message) {
            (_, Message::Prepare(offer)) => inner.prepare(guest, session, &offer),
            // Whatever the source asks of an attempt that this side has ended, it hears why.
            (false, Message::Fence { stamp, .. } | Message::Seal { stamp, .. })
                if inner.why_ended(&stamp).is_some() =>
            {
                Ok(inner.why_ended(&stamp).unwrap_or_else(|| failed(stamp, &"it has ended")))
            }
            (true, Message::Fence { stamp, epoch }) => Ok(inner.fence(guest, stamp, epoch)),
            (true, Message::Seal { stamp, digests, unread_bytes }) => inner.seal(guest, stamp, &digests, unread_bytes),
            (true, Message::Abort { stamp, cause, keep }) => {
                log::info!("migration: attempt {:.8} aborted by the source: {}", stamp.attempt, cause.escape_debug());
                if !inner.stop_receiving() {
                    // "Unsealed" says that no writer lives. The source asks again.
                    return Err("requests in flight do not end".to_owned());
                }
                shut_guest_doors(guest, &stamp);
                inner.clean_up(guest, if keep { Fate::Keep } else { Fate::Remove });
                settle(guest, &Event::Abort(stamp), stamp)
            }
            // Said again by who is sealed; what this process does not receive, it cannot seal.
            (false, Message::Seal { stamp, .. }) if !is_receiving(guest)? => {
                settle(guest, &Event::Seal { stamp, images: Images::NONE }, stamp)
            }
            (false, Message::Go { stamp }) => {
                forget_shared(guest);
                settle(guest, &Event::Go(stamp), stamp)
            }
            (false, Message::Abort { stamp, .. }) => {
                shut_guest_doors(guest, &stamp);
                settle(guest, &Event::Abort(stamp), stamp)
            }
            (_, Message::Question { stamp }) if stamp.source == guest.host => {
                let promise = guest.promise(&stamp).map_err(|error| error.to_string())?;
                // M10: who asks may be dialled by nobody. GO is as good as an answer as by itself.
                let unheard = matches!(
                    guest.record().map_err(|error| error.to_string())?.map(|record| record.state),
                    Some(State::Given { arrived: false, .. })
                );
                let go = promise == Promise::Given && unheard;
                Ok(if go { Message::Go { stamp } } else { Message::Promise { stamp, promise } })
            }
            // What a destination that has asked says in return.
            (_, Message::Running { stamp, .. }) if stamp.source == guest.host => {
                return guest.apply(&Event::Running(stamp)).map(|_| None).map_err(|error| error.to_string());
            }
            (_, Message::Unsealed { stamp }) if stamp.source == guest.host => {
                return guest.apply(&Event::Unsealed(stamp)).map(|_| None).map_err(|error| error.to_string());
            }
            // A GO before SEAL, a fence of an attempt that is not received here: the record is the answer (M2, M6).
            (
                _,
                Message::Go { stamp }
                | Message::Fence { stamp, .. }
                | Message::Question { stamp }
                | Message::Seal { stamp, .. },
            ) => record(guest, stamp),
            (_, other) => Err(format!("the peer sent {} to a destination", other.name())),
        };
        answer.map(Some)
    }

    /// Takes the guest's state in, on a connection that is its own.
    fn take_state(&self, guest: &Guest, link: &mut Link, stamp: Stamp, ran: bool) -> Result<(), String> {
        if let Err(cause) = self.expects_state(&stamp) {
            let _ = link.send(&failed(stamp, &cause), Instant::now() + REPLY_TIMEOUT);
            return Err("a state that is not expected".to_owned());
        }
        self.state.take(guest, link, stamp, ran)
    }

    /// The same inside a phase connection, on a thread of its own: a VMM takes its time, and the phases go on.
    ///
    /// # Errors
    /// One line for the source's user.
    fn take_state_inside(&self, guest: &Arc<Guest>, trunk: Arc<Trunk>, stamp: Stamp, ran: bool) -> Result<(), String> {
        self.expects_state(&stamp)?;
        let channel = Channel::open(&trunk, STREAM_STATE_ROOM).ok_or("this connection has carried a state before")?;
        let guest = Arc::clone(guest);
        let thread = std::thread::Builder::new().name("state".to_owned()).stack_size(DRIVER_STACK);
        let taken = thread.spawn(move || {
            if let Err(cause) = guest.destination.state.take_inside(&guest, &trunk, channel, stamp, ran) {
                log::info!("migration door: the guest's state: {cause}");
            }
        });
        taken.map(drop).map_err(|error| format!("no thread for the guest's state: {error}"))
    }

    /// Whether the guest's state is expected, with that attempt.
    ///
    /// # Errors
    /// One line: it is not, or not any more.
    fn expects_state(&self, stamp: &Stamp) -> Result<(), String> {
        match &self.lock().stage {
            Stage::Receiving(reception) if stamp.matches(&reception.stamp) && reception.state => Ok(()),
            _ => Err("no state is expected".to_owned()),
        }
    }

    /// Answers DIGEST: found good under the lock, hashed outside of it.
    ///
    /// # Errors
    /// As [`Destination::answer`].
    fn digest(
        &self,
        guest: &Guest,
        session: &mut Session,
        stamp: Stamp,
        (disk, offset_bytes, regions): (u8, u64, u8),
    ) -> Result<Message, String> {
        let asker = session.asker;
        let hasher = session.hasher.get_or_insert_with(Hasher::sparing);
        let asked = {
            let inner = self.lock();
            match &inner.stage {
                Stage::Receiving(reception) if stamp.matches(&reception.stamp) => {
                    reception.digests.question(asker, disk, offset_bytes, regions)
                }
                _ => return inner.why_ended(&stamp).map_or_else(|| record(guest, stamp), Ok),
            }
        };
        match asked.and_then(|question| question.answer(hasher, asker, stamp)) {
            Ok(answer) => Ok(answer),
            Err(NoAnswer::Broken(cause)) => Err(cause),
            Err(NoAnswer::Unreadable { region, cause }) => {
                let mut inner = self.lock();
                if matches!(&inner.stage, Stage::Receiving(reception) if stamp.matches(&reception.stamp)) {
                    inner.give_up(guest, &cause, Fate::Remove);
                }
                Ok(Message::Failed { stamp, cause: cut(&cause), region: Some(region) })
            }
        }
    }

    /// Answers LAYERS-QUESTION; the disk's server is asked outside of the lock.
    ///
    /// # Errors
    /// As [`Destination::answer`].
    fn layers(&self, guest: &Guest, stamp: Stamp, disk: u8, page: u32) -> Result<Message, String> {
        let digests = {
            let inner = self.lock();
            match &inner.stage {
                Stage::Receiving(reception) if stamp.matches(&reception.stamp) => Arc::clone(&reception.digests),
                _ => return inner.why_ended(&stamp).map_or_else(|| record(guest, stamp), Ok),
            }
        };
        digests.layers(stamp, disk, page)
    }

    /// Takes in what the source of a sealed attempt says when it is asked; returns what it is told in return.
    ///
    /// # Errors
    /// Nothing may be answered (M4).
    pub(super) fn hear(&self, guest: &Guest, said: &Message) -> Result<Option<Message>, String> {
        let _inner = self.lock();
        match said {
            Message::Go { stamp } => {
                forget_shared(guest);
                settle(guest, &Event::Go(*stamp), *stamp).map(Some)
            }
            Message::Promise { stamp, promise: Promise::NotGiven } => {
                shut_guest_doors(guest, stamp);
                settle(guest, &Event::NotGiven(*stamp), *stamp).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// This host owns: lets the guest run.
    ///
    /// # Errors
    /// One line, for the user: it does not run.
    pub(super) fn run_guest(&self, guest: &Guest) -> Result<(), String> {
        self.state.run(guest)
    }

    /// Why the guest was not let run that this host owns by that attempt; `None`: it was, as far as is known.
    pub fn why_it_stands(&self, attempt: Attempt) -> Option<String> {
        self.state.outcome(attempt)?.err()
    }

    /// The operator takes a sealed guest over (M2): nobody will say GO.
    ///
    /// # Errors
    /// As [`Guest::apply`].
    pub(super) fn take_over(
        &self,
        guest: &Guest,
        event: &Event,
        expected: &Option<Record>,
    ) -> Result<Answer, KeepError> {
        let _inner = self.lock();
        forget_shared(guest);
        guest.apply_if(event, expected)
    }

    /// Keeps the receipt of the attempt by which this host owns, if there is one. The switchover is over.
    pub(super) fn keep_receipt(&self, guest: &Guest) {
        let receipt = self.lock().sealed.take();
        let record = guest.record().ok().flatten();
        if let (Some(receipt), Some(Record { state: State::Owner { attempt }, .. })) = (receipt, record)
            && attempt == receipt.attempt
        {
            guest.keep_receipt(receipt);
        }
    }

    /// Gives up a sealed guest at the operator's word (M2), or whatever else can be forgotten (M6). The source may be
    /// told "unsealed" from then on, so that nobody may go on using what was read here (M11).
    ///
    /// # Errors
    /// As [`Guest::apply`].
    pub(super) fn forget(&self, guest: &Guest, event: &Event) -> Result<Answer, KeepError> {
        let mut inner = self.lock();
        inner.give_up(guest, "given up by the user", Fate::Remove);
        let record = guest.record()?;
        if next(guest.host, record.as_ref(), event).is_ok() {
            if let Some(stamp) = record.as_ref().and_then(Record::stamp) {
                shut_guest_doors(guest, &stamp);
            }
            // An attempt that ended here and was never sealed (M2, M6): the files that were made for it go too.
            if record.is_some_and(|record| matches!(record.state, State::Void { .. })) {
                remains::give_up(guest);
            }
        }
        let answer = guest.apply(event)?;
        guest.tidy_journal();
        Ok(answer)
    }

    /// Forgets a journal that is history. Not while a PREPARE is about to make it count.
    pub(super) fn tidy(&self, guest: &Guest) {
        let _inner = self.lock();
        guest.tidy_journal();
    }

    /// What the source of an attempt that ended here is told.
    fn why_ended(&self, stamp: &Stamp) -> Option<Message> {
        self.lock().why_ended(stamp)
    }

    /// The same, if it can be said without waiting for who is ending it.
    fn why_ended_now(&self, stamp: &Stamp) -> Option<Message> {
        match self.inner.try_lock() {
            Ok(inner) => inner.why_ended(stamp),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().why_ended(stamp),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether an attempt is received.
    pub(super) fn receives(&self) -> bool {
        matches!(self.lock().stage, Stage::Receiving(_))
    }

    /// What the source must hear without having asked: this side has ended the attempt. While another connection has
    /// something done under the lock, this one goes on answering PINGs and looks again later.
    fn news(&self, guest: &Guest, session: &Session) -> Option<Message> {
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if let Stage::Receiving(reception) = &inner.stage
            && refused_writes(guest) > reception.refused_before
        {
            // M11: whoever writes here before it may has read stale data.
            inner.give_up(guest, "a client of the destination's guest door wrote before the hand-over", Fate::Remove);
        }
        let ended = inner.ended.as_mut().filter(|ended| !ended.told && session.stamp == Some(ended.stamp))?;
        ended.told = true;
        Some(failed(ended.stamp, &ended.cause))
    }

    /// Ends an attempt that is being received, at this side's user's wish.
    ///
    /// # Errors
    /// There is none, or it is sealed: then only the source ends it (M2).
    pub fn cancel(&self, guest: &Guest, cause: &str) -> Result<(), String> {
        let mut inner = self.lock();
        match inner.stage {
            Stage::Receiving(_) => {
                inner.give_up(guest, cause, Fate::Remove);
                Ok(())
            }
            Stage::Idle => Err(match guest.record() {
                Ok(Some(record)) if matches!(record.state, State::Sealed { .. } | State::Given { .. }) => {
                    record.to_string()
                }
                _ => "no migration is running".to_owned(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// D4. A repeated fence is answered again, and only when no writer lives: the first may not have ended them.
    fn fence(&mut self, guest: &Guest, stamp: Stamp, epoch: Epoch) -> Message {
        let Stage::Receiving(reception) = &mut self.stage else {
            return failed(stamp, &"nothing is received");
        };
        if epoch > reception.epoch {
            return failed(stamp, &"a fence of an epoch that has not begun");
        }
        if epoch == reception.epoch {
            // The next epoch begins first: whoever waits for the lock with an old name finds it refused.
            reception.epoch = Epoch(epoch.0.saturating_add(1));
        }
        if !reception.end_writers() {
            return failed(stamp, &"requests in flight do not end");
        }
        Message::Fenced { stamp, instance: guest.instance, epoch: reception.epoch }
    }

    /// Everything has been sent: joins the writers, compares the digests, makes all durable, and only then says so.
    fn seal(&mut self, guest: &Guest, stamp: Stamp, roots: &[Digest], unread_bytes: u64) -> Result<Message, String> {
        let Stage::Receiving(reception) = &mut self.stage else { return record(guest, stamp) };
        let began = Instant::now();
        let images = guest.images();
        let journal = guest.journal();
        let mut verified = (0, [0; 32]);
        let durable = if !reception.end_writers() {
            Err("requests in flight do not end".to_owned())
        } else if refused_writes(guest) > reception.refused_before {
            Err("a client of the destination's guest door wrote before the hand-over".to_owned())
        } else if reception.state && guest.destination.state.standing(&stamp).0 != Standing::Loaded {
            Err("the guest's state is not loaded".to_owned())
        } else {
            // M2: from here on nothing of this attempt is cleaned up, whatever becomes of it.
            reception.digests.compare(roots).and_then(|same| {
                verified = same;
                reception.make_durable()?;
                guest.write_journal(journal.map(|journal| journal.retired()))
            })
        };
        let images = match durable.and(images) {
            Ok(images) => images,
            Err(cause) => {
                self.give_up(guest, &cause, Fate::Remove);
                return Ok(failed(stamp, &cause));
            }
        };
        let fsync_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (verified_bytes, root) = verified;
        self.sealed = Some(Receipt {
            attempt: stamp.attempt,
            lineage: stamp.lineage,
            order: stamp.order,
            peer: reception.from.clone(),
            gave: false,
            verified: reception.digests.verified(),
            verified_bytes,
            root,
            sent_bytes: None,
            equal_bytes: None,
            unread_bytes,
        });
        self.stage = Stage::Idle;
        match guest.apply(&Event::Seal { stamp, images }) {
            Ok(Answer::Sealed) => Ok(Message::Sealed { stamp, fsync_us }),
            Ok(_) | Err(KeepError::Refused(_)) => record(guest, stamp),
            Err(error @ KeepError::Unknown(_)) => Err(error.to_string()),
        }
    }

    /// This side ends the attempt that it receives (M6): VOID, then the source is told.
    fn give_up(&mut self, guest: &Guest, cause: &str, fate: Fate) {
        let Stage::Receiving(reception) = &self.stage else { return };
        let stamp = reception.stamp;
        log::warn!("migration: attempt {:.8} ended here: {cause}", stamp.attempt);
        if reception.state {
            guest.destination.state.end(guest, &stamp);
        }
        // M11: from VOID on the source may be told "unsealed", and what was read here may be old.
        end_guest_connections(guest);
        self.stop_receiving();
        self.clean_up(guest, fate);
        if let Err(error) = guest.apply(&Event::AbortReceiving { attempt: stamp.attempt }) {
            log::error!("migration: {error}");
        }
        self.ended = Some(Ended { stamp, cause: cause.to_owned(), told: false });
    }

    /// What the source of an attempt that ended here is told.
    fn why_ended(&self, stamp: &Stamp) -> Option<Message> {
        self.ended.as_ref().filter(|ended| ended.stamp.matches(stamp)).map(|ended| failed(ended.stamp, &ended.cause))
    }

    /// Ends the writers of the attempt that is received, if there is one. `false`: they do not end.
    fn stop_receiving(&mut self) -> bool {
        match &mut self.stage {
            Stage::Receiving(reception) => reception.end_writers(),
            Stage::Idle => true,
        }
    }

    /// Removes or keeps what the attempt brought. In RECEIVING of that attempt, before the record says that it ended:
    /// a process that dies in between finds the journal, and the record that it counts with.
    fn clean_up(&mut self, guest: &Guest, fate: Fate) {
        if let Stage::Receiving(reception) = std::mem::take(&mut self.stage) {
            for export in &reception.exports {
                export.set_gate(Gate::Incoming);
            }
            let fate = if reception.keep_partial { Fate::Keep } else { fate };
            remains::end(guest, &reception, fate);
        }
    }
}

/// Lets the record change and says what it says.
fn settle(guest: &Guest, event: &Event, stamp: Stamp) -> Result<Message, String> {
    match guest.apply(event) {
        Ok(Answer::Sealed) => Ok(Message::Sealed { stamp, fsync_us: 0 }),
        Ok(Answer::Running) => Ok(Message::Running { stamp, instance: guest.instance }),
        Ok(Answer::Unsealed) => Ok(Message::Unsealed { stamp }),
        Ok(Answer::Silent | Answer::Prepared | Answer::Record) | Err(KeepError::Refused(_)) => record(guest, stamp),
        // M4: nobody is answered before the record is durable.
        Err(error @ KeepError::Unknown(_)) => Err(error.to_string()),
    }
}

/// This host's record, for an answer. The number of an attempt is known to its two ends alone: whoever names another
/// one does not learn it here.
fn record(guest: &Guest, stamp: Stamp) -> Result<Message, String> {
    let mut summary = guest.record().map_err(|error| error.to_string())?.map(|record| record.summary());
    if let Some(summary) = summary.as_mut().filter(|summary| summary.attempt != stamp.attempt) {
        summary.attempt = Attempt::NONE;
        summary.peer = None;
    }
    Ok(Message::Record { stamp, record: summary })
}

fn is_receiving(guest: &Guest) -> Result<bool, String> {
    let record = guest.record().map_err(|error| error.to_string())?;
    Ok(record.is_some_and(|record| matches!(record.state, State::Receiving { .. })))
}

fn failed(stamp: Stamp, cause: &dyn Display) -> Message {
    Message::Failed { stamp, cause: cut(&cause.to_string()), region: None }
}

fn refused_writes(guest: &Guest) -> u64 {
    guest.exports().map(|export| export.refused_guest_writes()).sum()
}

/// M11: before "unsealed" is said nobody uses what was read here. Only for the attempt that this host is in the middle
/// of: an ABORT that comes too late for that finds an owner, or another attempt, and cuts nobody off.
fn shut_guest_doors(guest: &Guest, stamp: &Stamp) {
    let record = guest.record().ok().flatten();
    if record.and_then(|record| record.stamp()).is_some_and(|mine| mine.matches(stamp)) {
        guest.destination.state.end(guest, stamp);
        end_guest_connections(guest);
    }
}

fn end_guest_connections(guest: &Guest) {
    for export in guest.exports() {
        let _ = export.end_connections(Door::Guest);
    }
}

/// What was read of shared disks while the other host wrote them may be old.
fn forget_shared(guest: &Guest) {
    let shared = guest.disks.iter().filter(|disk| disk.spec.shared);
    for disk in shared.filter_map(|disk| disk.export.as_ref()?.disk()) {
        disk.forget_cache();
    }
}

#[cfg(test)]
mod tests;
