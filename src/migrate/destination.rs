//! The destination of a migration: receives, seals, owns.
//!
//! One match over (stage x message), in [`Destination::answer`]. The record says what this host is to the guest; the
//! [`Stage`] beside it holds what only lives as long as the process: who may open data connections, which files were
//! made, who writes back. A phase connection is nothing but a way for messages: when it is lost nothing changes here,
//! and the source may go on over another one (M2, M10).
//!
//! Everything that must not happen at once happens under the stage's lock: a data connection is checked and entered
//! under it, and a fence ends all connections and waits for their writers under it (D4).

mod digest;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use digest::{Asker, Digests, NoAnswer};

use super::link::{Link, LinkError};
use super::wire::{
    BootId, Capabilities, Challenge, DiskOffer, DiskReady, Epoch, ExportName, Hello, Message, Mode, Prepare, Prepared,
    Problem, Role, Token, VERSION_HIGHEST, VERSION_LOWEST, Verify, cut,
};
use crate::cause::Cause;
use crate::digest::{Digest, Hasher};
use crate::disk::{Content, Disk};
use crate::domain::{Source, Stays};
use crate::export::{Door, Export, Gate, Visit};
use crate::guest::Guest;
use crate::limits::{
    CONNECTION_STACK, CONNECTIONS_MAX, CONNECTIONS_PER_DISK_MAX, DISKS_MAX, HELLO_TIMEOUT, LINK_LOOK, LINK_SILENCE_MAX,
    PHASE_CONNECTIONS_MAX, PROBLEMS_MAX, REPLY_TIMEOUT,
};
use crate::nbd::handshake::{Description, Directory, OpenError};
use crate::nbd::server;
use crate::ownership::{Answer, Attempt, Event, Images, KeepError, Peer, Promise, Receipt, Record, Stamp, State, next};
use crate::socket::Socket;

/// What this process receives.
#[derive(Debug, Default)]
pub struct Destination {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    stage: Stage,
    /// The attempt that this side ended last: the source is told why.
    ended: Option<Ended>,
    /// Disks that hold the remains of an attempt that ended here and had found them empty: our own, to be emptied for
    /// the next one (D10).
    remains: Vec<String>,
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

#[derive(Debug)]
struct Reception {
    stamp: Stamp,
    from: Peer,
    epoch: Epoch,
    token: Token,
    exports: Vec<Arc<Export>>,
    /// Files that this attempt made, and the exports that they are behind.
    created: Vec<(Arc<Export>, PathBuf)>,
    /// Disks that were empty when it began.
    were_empty: Vec<String>,
    /// Guest writes refused before it began (M11).
    refused_before: u64,
    /// What the source has been told of the disks' content.
    digests: Arc<Digests>,
}

/// What the source is told of each disk.
type Ready = heapless::Vec<DiskReady, DISKS_MAX>;

/// Speaks the phase protocol on one connection until it ends.
pub fn serve(guest: &Arc<Guest>, socket: &Arc<Socket>) {
    socket.set_keep_alive(LINK_SILENCE_MAX);
    let mut link = Link::new(Arc::clone(socket));
    if let Err(cause) = converse(guest, &mut link) {
        log::info!("migration door: phase connection closed: {cause}");
    }
}

fn converse(guest: &Arc<Guest>, link: &mut Link) -> Result<(), String> {
    let challenge = Challenge::random().map_err(|error| error.to_string())?;
    let ours = hello(guest, Role::Destination, challenge, link.socket());
    let (theirs, _) = link.hello(&ours, Instant::now() + HELLO_TIMEOUT).map_err(|error| error.to_string())?;
    if theirs.guest != ours.guest {
        return Err(format!("the peer speaks of guest '{}', this is '{}'", theirs.guest.escape_debug(), guest.name));
    }
    meet(guest, &theirs);
    let mut session = Session { theirs, challenge: Some(challenge), stamp: None, asker: Asker::next(), hasher: None };
    let mut heard = Instant::now();
    loop {
        match link.receive(Instant::now() + LINK_LOOK) {
            Ok(Some(message)) => {
                log::debug!("migration door: received {}", message.name());
                let answer = guest.destination.answer(guest, &mut session, message)?;
                heard = Instant::now();
                let Some(answer) = answer else { continue };
                log::debug!("migration door: answered {}", answer.name());
                link.send(&answer, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
                if matches!(answer, Message::Running { .. }) {
                    guest.destination.keep_receipt(guest);
                }
                // The answer may have taken long; the peer's silence begins now.
                heard = Instant::now();
            }
            Ok(None) if heard.elapsed() > LINK_SILENCE_MAX => return Err(LinkError::Late.to_string()),
            Ok(None) => {
                if let Some(news) = guest.destination.news(guest, &session) {
                    link.send(&news, Instant::now() + REPLY_TIMEOUT).map_err(|error| error.to_string())?;
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// This side's hello on `socket`. A door that listens at every address of this host is reached at the one that the
/// peer sees.
pub fn hello(guest: &Guest, role: Role, challenge: Challenge, socket: &Socket) -> Hello {
    let address = guest.migration_address.as_ref().map(|door| door.seen_at(socket.local_ip()).to_string());
    Hello {
        versions: (VERSION_LOWEST, VERSION_HIGHEST),
        role,
        capabilities: Capabilities::NBD,
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
    let peer = Peer { host: theirs.host, address: theirs.address.clone() };
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

impl Destination {
    /// The one match of the destination. `None`: nothing is to be answered.
    ///
    /// # Errors
    /// The peer broke the protocol, or nothing may be answered (M4): the connection ends, with this line for the log.
    fn answer(&self, guest: &Guest, session: &mut Session, message: Message) -> Result<Option<Message>, String> {
        if let Message::Digest { stamp, disk, offset_bytes, regions } = message {
            return self.digest(guest, session, stamp, (disk, offset_bytes, regions)).map(Some);
        }
        let mut inner = self.lock();
        session.stamp = message.stamp().copied().or(session.stamp);
        let receiving = match &inner.stage {
            Stage::Receiving(reception) => message.stamp().is_some_and(|stamp| stamp.matches(&reception.stamp)),
            Stage::Idle => false,
        };
        let answer = match (receiving, message) {
            (_, Message::Ping { number }) => Ok(Message::Pong { number }),
            (_, Message::Prepare(offer)) => inner.prepare(guest, session, &offer),
            // Whatever the source asks of an attempt that this side has ended, it hears why.
            (false, Message::Fence { stamp, .. } | Message::Seal { stamp, .. })
                if inner.why_ended(&stamp).is_some() =>
            {
                Ok(inner.why_ended(&stamp).unwrap_or_else(|| failed(stamp, &"it has ended")))
            }
            (true, Message::Fence { stamp, epoch }) => Ok(inner.fence(guest, stamp, epoch)),
            (true, Message::Seal { stamp, digests }) => inner.seal(guest, stamp, &digests),
            (true, Message::Abort { stamp, cause }) => {
                log::info!("migration: attempt {:.8} aborted by the source: {}", stamp.attempt, cause.escape_debug());
                if !inner.stop_receiving() {
                    // "Unsealed" says that no writer lives. The source asks again.
                    return Err("requests in flight do not end".to_owned());
                }
                shut_guest_doors(guest, &stamp);
                let answer = settle(guest, &Event::Abort(stamp), stamp);
                inner.clean_up();
                answer
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
        let hasher = session.hasher.get_or_insert_default();
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
                    inner.give_up(guest, &cause);
                }
                Ok(Message::Failed { stamp, cause: cut(&cause), region: Some(region) })
            }
        }
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
        let _inner = self.lock();
        let record = guest.record()?;
        if let Some(stamp) = record.as_ref().and_then(Record::stamp)
            && next(guest.host, record.as_ref(), event).is_ok()
        {
            shut_guest_doors(guest, &stamp);
        }
        guest.apply(event)
    }

    /// Whether an attempt is received.
    pub(super) fn receives(&self) -> bool {
        matches!(self.lock().stage, Stage::Receiving(_))
    }

    /// What the source must hear without having asked: this side has ended the attempt.
    fn news(&self, guest: &Guest, session: &Session) -> Option<Message> {
        let mut inner = self.lock();
        if let Stage::Receiving(reception) = &inner.stage
            && refused_writes(guest) > reception.refused_before
        {
            // M11: whoever writes here before it may has read stale data.
            inner.give_up(guest, "a client of the destination's guest door wrote before the hand-over");
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
                inner.give_up(guest, cause);
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

    /// Opens a data connection for who knows a current name (D4): checked and entered under the lock that a fence
    /// takes. Whatever is wrong with a name, there is no such export.
    fn open(&self, guest: &Guest, name: &str, socket: &Arc<Socket>) -> Result<(Description, Visit), OpenError> {
        let inner = self.lock();
        let export = inner.find(guest, name).ok_or(OpenError::Unknown)?;
        let visit = export.enter(Door::Migration, socket).map_err(|why| OpenError::Refused(Cause::new(why)))?;
        Ok((server::description(visit.disk().size(), false), visit))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn find(&self, guest: &Guest, name: &str) -> Option<&Arc<Export>> {
        let Stage::Receiving(reception) = &self.stage else { return None };
        let name = ExportName::parse(name)?;
        let current = name.attempt == reception.stamp.attempt
            && name.instance == guest.instance
            && name.epoch == reception.epoch
            && name.token.matches(&reception.token);
        reception.exports.iter().find(|export| current && export.name() == name.disk)
    }

    fn prepare(&mut self, guest: &Guest, session: &mut Session, offer: &Prepare) -> Result<Message, String> {
        let stamp = offer.stamp;
        let fresh = session.challenge.take_if(|ours| *ours == offer.challenge).is_some();
        let from = Peer { host: session.theirs.host, address: session.theirs.address.clone() };
        let event = Event::Prepare { stamp, from: from.clone(), fresh };
        let refused = |problems: Problems| Ok(Message::Refused { stamp, problems: problems.0 });

        let mut problems = Problems::default();
        let current = guest.record().map_err(|error| error.to_string())?;
        if let Err(refusal) = next(guest.host, current.as_ref(), &event) {
            problems.add("", &refusal);
            return refused(problems);
        }
        // D4: whatever any earlier attempt still has on its way is over before this one is answered.
        if !end_writers(guest.exports()) {
            problems.add("", &"requests of an earlier attempt do not end");
            return refused(problems);
        }
        self.give_up(guest, "another attempt has begun");
        let found = self.check(guest, offer, &mut problems);
        if !problems.0.is_empty() {
            return refused(problems);
        }
        let mut reception = Reception {
            stamp,
            from,
            epoch: Epoch(0),
            token: Token::random().map_err(|error| error.to_string())?,
            exports: found.iter().map(|(export, _)| Arc::clone(export)).collect(),
            created: Vec::new(),
            were_empty: Vec::new(),
            refused_before: refused_writes(guest),
            digests: Digests::new(Verify::None, &[]),
        };
        if let Err(cause) = guest.write_ahead(&[&[event.clone(), Event::Abort(stamp)]]) {
            problems.add("", &cause);
            return refused(problems);
        }
        // The record first: from here on nobody claims what is being made.
        if let Err(error) = guest.apply(&event) {
            problems.add("", &error);
            return refused(problems);
        }
        for ((export, path), disk) in found.iter().zip(&offer.disks) {
            if let Err(error) = reception.create_missing(guest, export, path, disk) {
                problems.add(&disk.name, &error);
            }
        }
        if problems.0.is_empty()
            && let Err(cause) = write_ahead(guest, stamp)
        {
            problems.add("", &cause);
        }
        let begun = if problems.0.is_empty() {
            reception.begin(&self.remains, offer).map_err(|error| problems.add("", &error))
        } else {
            Err(())
        };
        let Ok(disks) = begun else {
            if let Err(error) = guest.apply(&Event::AbortReceiving { attempt: stamp.attempt }) {
                log::error!("migration: {error}");
            }
            reception.remove_created();
            return refused(problems);
        };
        // Their sizes are known only now.
        reception.digests = Digests::new(offer.verify, &reception.exports);
        self.remains.retain(|name| !reception.exports.iter().any(|export| export.name() == name));
        let answer =
            Prepared { stamp, instance: guest.instance, epoch: reception.epoch, token: reception.token, disks };
        log::info!("migration: attempt {:.8} is received from host {:.8}", stamp.attempt, session.theirs.host);
        self.ended = None;
        self.stage = Stage::Receiving(Box::new(reception));
        Ok(Message::Prepared(answer))
    }

    /// Looks at every offered disk and collects all that is wrong. Returns the exports and their files.
    fn check(&self, guest: &Guest, offer: &Prepare, problems: &mut Problems) -> Vec<(Arc<Export>, PathBuf)> {
        let mut found: Vec<(Arc<Export>, PathBuf)> = Vec::new();
        let mut needed: Vec<(u64, u64, u64)> = Vec::new();
        for disk in &offer.disks {
            let twice = found.iter().any(|(export, _)| export.name() == disk.name);
            let checked = if twice {
                Err("is offered twice".to_owned())
            } else {
                self.check_disk(guest, disk, offer.mode, &mut needed)
            };
            match checked {
                Ok(export) => found.push(export),
                Err(cause) => problems.add(&disk.name, &cause),
            }
        }
        if offer.disks.is_empty() {
            problems.add("", &"no disk is offered");
        }
        for (_, needs, has) in needed.iter().filter(|(_, needs, has)| needs > has) {
            problems.add("", &format_args!("the disks need {needs} bytes, their file system has {has} free"));
        }
        found
    }

    fn check_disk(
        &self,
        guest: &Guest,
        offer: &DiskOffer,
        mode: Mode,
        needed: &mut Vec<(u64, u64, u64)>,
    ) -> Result<(Arc<Export>, PathBuf), String> {
        let disk = guest.disk(&offer.name).ok_or("the destination has no disk of this name")?;
        let (Some(export), Source::File { path, .. }) = (&disk.export, &disk.spec.source) else {
            let why = disk.spec.stays().unwrap_or(Stays::Empty);
            return Err(format!("is {why} at the destination"));
        };
        if let Some(why @ (Stays::ReadOnly | Stays::Shared)) = disk.spec.stays() {
            return Err(format!("is {why} at the destination"));
        }
        let free = match export.disk() {
            None => crate::disk::free_space_beside(path).map_err(|error| error.to_string())?,
            Some(target) => {
                if target.size() != offer.size_bytes {
                    let (there, here) = (target.size(), offer.size_bytes);
                    return Err(format!("has {there} bytes at the destination and {here} at the source"));
                }
                let ours = self.remains.iter().any(|name| name.as_str() == offer.name);
                let content = target.content().map_err(|error| format!("cannot be read: {error}"))?;
                if content == Content::Data && mode == Mode::CopyAll && !ours {
                    let ways = "--overwrite overwrites it, --copy-storage-inc sends only what differs";
                    return Err(format!("{} is not empty ({ways})", path.display()));
                }
                target.free_space().map_err(|error| error.to_string())?
            }
        };
        if let Some((file_system, bytes)) = free {
            match needed.iter_mut().find(|(known, ..)| *known == file_system) {
                Some((_, needs, _)) => *needs = needs.saturating_add(offer.data_bytes),
                None => needed.push((file_system, offer.data_bytes, bytes)),
            }
        }
        Ok((Arc::clone(export), path.clone()))
    }

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
    fn seal(&mut self, guest: &Guest, stamp: Stamp, roots: &[Digest]) -> Result<Message, String> {
        let Stage::Receiving(reception) = &mut self.stage else { return record(guest, stamp) };
        let began = Instant::now();
        let images = guest.images();
        let mut verified = (0, [0; 32]);
        let durable = if !reception.end_writers() {
            Err("requests in flight do not end".to_owned())
        } else if refused_writes(guest) > reception.refused_before {
            Err("a client of the destination's guest door wrote before the hand-over".to_owned())
        } else {
            reception.digests.compare(roots).and_then(|same| reception.make_durable().map(|()| verified = same))
        };
        let images = match durable.and(images) {
            Ok(images) => images,
            Err(cause) => {
                self.give_up(guest, &cause);
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
        });
        // M2: from here on nothing of this attempt is cleaned up.
        self.stage = Stage::Idle;
        match guest.apply(&Event::Seal { stamp, images }) {
            Ok(Answer::Sealed) => Ok(Message::Sealed { stamp, fsync_us }),
            Ok(_) | Err(KeepError::Refused(_)) => record(guest, stamp),
            Err(error @ KeepError::Unknown(_)) => Err(error.to_string()),
        }
    }

    /// This side ends the attempt that it receives (M6): VOID, then the source is told.
    fn give_up(&mut self, guest: &Guest, cause: &str) {
        let Stage::Receiving(reception) = &self.stage else { return };
        let stamp = reception.stamp;
        log::warn!("migration: attempt {:.8} ended here: {cause}", stamp.attempt);
        self.stop_receiving();
        if let Err(error) = guest.apply(&Event::AbortReceiving { attempt: stamp.attempt }) {
            log::error!("migration: {error}");
        }
        self.clean_up();
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

    /// Removes what the attempt made, and remembers what it leaves behind. Only for an attempt that is not sealed.
    fn clean_up(&mut self) {
        if let Stage::Receiving(mut reception) = std::mem::take(&mut self.stage) {
            for export in &reception.exports {
                export.set_gate(Gate::Incoming);
            }
            self.remains.append(&mut reception.were_empty);
            reception.remove_created();
        }
    }
}

impl Reception {
    fn create_missing(
        &mut self,
        guest: &Guest,
        export: &Arc<Export>,
        path: &Path,
        offer: &DiskOffer,
    ) -> Result<(), String> {
        if export.disk().is_some() {
            return Ok(());
        }
        let cache = guest.disk(&offer.name).map(|disk| disk.spec.cache).unwrap_or_default();
        let disk = Disk::create(path, offer.size_bytes, cache)
            .map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        export.set_disk(Arc::new(disk));
        self.created.push((Arc::clone(export), path.to_owned()));
        Ok(())
    }

    /// Empties what may be emptied, and starts writing back. The gates are at Receiving already.
    fn begin(&mut self, remains: &[String], offer: &Prepare) -> std::io::Result<Ready> {
        // The door has room for all of them, and for the phases.
        let room = (CONNECTIONS_MAX - PHASE_CONNECTIONS_MAX) / self.exports.len().max(1);
        let connections = u8::try_from(room.clamp(1, CONNECTIONS_PER_DISK_MAX)).unwrap_or(u8::MAX);
        let mut ready = heapless::Vec::new();
        for export in &self.exports {
            let ours = remains.iter().any(|name| name == export.name());
            if (offer.mode == Mode::Overwrite || ours && offer.mode == Mode::CopyAll)
                && let Err(error) = export.discard_all()
            {
                log::info!("migration: disk {} cannot be emptied, all of it is sent: {error}", export.name());
            }
            // D10: looked at here, before anything is sent.
            let content = export.disk().map(|disk| disk.content());
            let reads_as_zero = matches!(content, Some(Ok(Content::Hole)));
            if ours || offer.mode == Mode::CopyAll {
                self.were_empty.push(export.name().to_owned());
            }
            let compare = offer.mode == Mode::Incremental && !reads_as_zero;
            // As many as there are offers, which fit.
            let _ = ready.push(DiskReady { reads_as_zero, connections, compare });
            let writer = Arc::clone(export);
            let thread = std::thread::Builder::new().name("write back".to_owned()).stack_size(CONNECTION_STACK);
            // Ends by itself when the gate is no longer at Receiving.
            thread.spawn(move || writer.write_back())?;
        }
        Ok(ready)
    }

    /// Ends every data connection and waits for what they had admitted.
    fn end_writers(&self) -> bool {
        end_writers(self.exports.iter())
    }

    fn make_durable(&mut self) -> Result<(), String> {
        for export in &self.exports {
            export.set_gate(Gate::Sealed);
        }
        for export in &self.exports {
            let disk = export.disk().ok_or_else(|| format!("disk {}: has gone", export.name()))?;
            disk.flush().map_err(|error| format!("flush: disk {}: {error}", export.name()))?;
        }
        for (export, path) in &self.created {
            crate::disk::sync_directory_of(path).map_err(|error| format!("sync: disk {}: {error}", export.name()))?;
        }
        Ok(())
    }

    /// Removes the files that this attempt made, unless somebody put others in their place.
    fn remove_created(&mut self) {
        for (export, path) in self.created.drain(..) {
            // Whoever still uses it would go on writing into a file without a name.
            let ours = export.take_disk().map(|disk| disk.identity());
            if ours.is_some() && Disk::identify(&path) == ours {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

/// Ends every data connection of `exports`, all of them before the first is waited for. `false`: some writer lives on.
fn end_writers<'a>(exports: impl Iterator<Item = &'a Arc<Export>>) -> bool {
    let exports: Vec<_> = exports.collect();
    exports.iter().for_each(|export| export.shut_connections(Door::Migration));
    exports.iter().filter(|export| !export.end_connections(Door::Migration)).count() == 0
}

/// All that is wrong, as far as it fits a message.
#[derive(Default)]
struct Problems(heapless::Vec<Problem, PROBLEMS_MAX>);

impl Problems {
    fn add(&mut self, disk: &str, cause: &dyn Display) {
        let _ = self.0.push(Problem { disk: cut(disk), cause: cut(&cause.to_string()) });
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

/// What an attempt that begins will need: a full disk is noticed now, and not while the guest waits for SEALED.
fn write_ahead(guest: &Guest, stamp: Stamp) -> Result<(), String> {
    let seal = Event::Seal { stamp, images: guest.images()? };
    guest.write_ahead(&[&[seal, Event::Go(stamp)], &[Event::Abort(stamp)]])
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
        for export in guest.exports() {
            let _ = export.end_connections(Door::Guest);
        }
    }
}

/// What was read of shared disks while the other host wrote them may be old.
fn forget_shared(guest: &Guest) {
    let shared = guest.disks.iter().filter(|disk| disk.spec.shared);
    for disk in shared.filter_map(|disk| disk.export.as_ref()?.disk()) {
        disk.forget_cache();
    }
}

/// What the migration door offers to one connection: nothing that could be listed.
pub struct MigrationDirectory<'a> {
    /// The guest.
    pub guest: &'a Guest,
    /// The connection that asks.
    pub socket: &'a Arc<Socket>,
}

impl Directory for MigrationDirectory<'_> {
    type Opened = Visit;

    fn list(&self, _: &mut dyn FnMut(&str, &str)) {}

    fn describe(&self, name: &str) -> Result<Description, OpenError> {
        let inner = self.guest.destination.lock();
        let disk = inner.find(self.guest, name).and_then(|export| export.disk()).ok_or(OpenError::Unknown)?;
        Ok(server::description(disk.size(), false))
    }

    fn open(&self, name: &str) -> Result<(Description, Visit), OpenError> {
        self.guest.destination.open(self.guest, name, self.socket)
    }

    fn takes_phases(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
