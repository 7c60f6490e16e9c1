//! `who-owns` and `recover`: who owns a guest, and what to do when nobody can say.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::Command;
use super::guest::{CONTROL, GuestDoor, PLAINTEXT, guest_door, state_directory};
use super::options::{Matches, Spec, Takes, opt};
use crate::control::client::Client;
use crate::control::wire::{Owner, Ownership, Recovered, Reply, Request, Word};
use crate::error::{Exit, OneLine, Problem, is_nobody, reason};
use crate::json;
use crate::limits::CONNECT_TIMEOUT;
use crate::ownership::{Change, Event, Found, Record, look, next};
use crate::progress::kept_line;
use crate::standing::{Standing, kept};

/// What `who-owns` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WhoOwnsOptions {
    /// The guest.
    pub door: GuestDoor,
    /// Where its record is, should no process serve it.
    pub state: PathBuf,
}

/// What `recover` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoverOptions {
    /// The guest.
    pub door: GuestDoor,
    /// The operator's word.
    pub word: Word,
}

pub(super) const WHO_OWNS: Spec = Spec {
    name: "who-owns",
    arguments: "GUEST [--OPTION]...",
    about: "Say who owns the guest's disks, as far as this host knows",
    options: &[
        opt("state", Takes::One("DIR"), "where the record is if nobody serves the guest\n[/var/lib/blockferry/GUEST]"),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Exits 0: this host. 4: another one, which is named. 5: nobody, or it is not known from here.\n\
            Asks the process that serves the guest; if there is none, reads the record.\n\n\
            Example:\n\
            \x20 blockferry who-owns g1\n",
};

pub(super) const RECOVER: Spec = Spec {
    name: "recover",
    arguments: "GUEST [--take-ownership | --forget-peer | --forget]",
    about: "Ask the other host, say what it takes to go on, or decide without it",
    options: &[
        opt(
            "take-ownership",
            Takes::Nothing,
            "this host owns from now on; of a host that is sealed, that gave the\n\
             guest away, that was overruled, or that restarted while it offered it",
        ),
        opt("forget-peer", Takes::Nothing, "the host to which this one offered the guest will never own"),
        opt(
            "forget",
            Takes::Nothing,
            "give up what is here: a half-written reception, with the files that were\n\
             made for it, a sealed copy, the record of a guest that is gone",
        ),
        CONTROL,
        PLAINTEXT,
    ],
    notes: "Without an option it changes nothing by itself: it asks the other host, which may settle it, and says\n\
            what to type where. Exits as who-owns does.\n\
            With one, the other host is asked first, and if it answers, what it says decides. Then the word counts\n\
            and cannot be taken back: what the guest may lose by it, and which host must never be taken, is printed.\n\
            `blockferry serve` must be running for the guest.\n\n\
            Examples:\n\
            \x20 blockferry recover g1\n\
            \x20 blockferry recover g1 --take-ownership\n",
};

pub(super) fn parse_who_owns(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    let door = guest_door(&WHO_OWNS, matches, guest)?;
    Ok(Command::WhoOwns(WhoOwnsOptions { door, state: state_directory(matches, guest)? }))
}

pub(super) fn parse_recover(matches: &Matches) -> Result<Command, Problem> {
    let [guest] = matches.arguments(["GUEST"])?;
    let words = [("take-ownership", Word::TakeOwnership), ("forget-peer", Word::ForgetPeer), ("forget", Word::Forget)];
    let mut given = words.into_iter().filter(|(name, _)| matches.flag(name));
    let word = given.next();
    if let (Some((first, _)), Some((second, _))) = (word, given.next()) {
        return Err(matches.error(second, format!("excludes --{first}")));
    }
    let word = word.map_or(Word::Ask, |(_, word)| word);
    Ok(Command::Recover(RecoverOptions { door: guest_door(&RECOVER, matches, guest)?, word }))
}

/// The text, and the exit code that is the answer.
pub(super) fn who_owns(options: &WhoOwnsOptions, as_json: bool) -> Result<(String, Exit), Problem> {
    options.door.control.check_plaintext("who-owns", options.door.insecure_plaintext)?;
    let ownership = match options.door.control.connect(CONNECT_TIMEOUT) {
        Ok(socket) => Client::greet("who-owns", &options.door.guest, socket)
            .and_then(|mut client| ask(&mut client))
            // Whoever is there and gives no answer: it is not known.
            .map_err(|problem| Problem { exit: Exit::Unknown, ..problem })?,
        Err(error) if is_nobody(&error) => read(options).map_err(|cause| {
            let cause = format!(
                "nobody serves it on this host ({}: {}), and its record in {} cannot be read: {cause}",
                options.door.control,
                reason(&error),
                options.state.display()
            );
            Problem::unknown("who-owns", &options.door.guest, cause)
        })?,
        Err(error) => return Err(Problem::unknown("who-owns", &options.door.guest, reason(&error))),
    };
    let exit = ownership.owner.exit();
    Ok((if as_json { json::ownership(&ownership) } else { ownership_text(&ownership) }, exit))
}

/// Asks the process that serves the guest.
pub(super) fn ask(client: &mut Client) -> Result<Ownership, Problem> {
    match client.ask(&Request::WhoOwns)? {
        Reply::Ownership(ownership) => Ok(ownership),
        _ => Err(Problem::unknown("who-owns", "", "the process gave an answer to another question")),
    }
}

/// Reads the record that nobody serves, as a process that starts now would.
fn read(options: &WhoOwnsOptions) -> Result<Ownership, String> {
    let guest = options.door.guest.as_str();
    let looked = look(&options.state)?;
    let (record, rejected) = match looked.found {
        Found::Nothing => (None, None),
        Found::Record(content) if looked.held => (Some(content.record), None),
        Found::Record(content) => (Some(restarted(content.record)), None),
        Found::Rejected { why, shown } => (None, Some((why, shown))),
    };
    let receipt = looked.receipt.as_ref().map(kept);
    let ownership = Ownership { receipt, ..Standing { guest, record: &Ok(record), rejected }.ownership() };
    if ownership.owner != Owner::Here {
        return Ok(ownership);
    }
    let next = if looked.held {
        "a process serves it, and its control door is elsewhere: --control ADDR".to_owned()
    } else {
        format!("nobody serves it now: blockferry serve {guest}")
    };
    Ok(Ownership { next: crate::control::wire::text(&next), ..ownership })
}

fn restarted(record: Record) -> Record {
    match next(record.host, Some(&record), &Event::Restart).map(|step| step.change) {
        Ok(Change::Become(becomes)) => *becomes,
        _ => record,
    }
}

/// The text, and the exit code: of a word that was carried out 0, else the answer of `who-owns`.
pub(super) fn recover(options: &RecoverOptions, as_json: bool) -> Result<(String, Exit), Problem> {
    let mut client = options.door.connect("recover")?;
    let Reply::Recovered(recovered) = client.ask(&Request::Recover(options.word))? else {
        return Err(Problem::unknown("recover", &options.door.guest, "the process gave an answer to another question"));
    };
    let exit = if recovered.done.is_empty() { recovered.ownership.owner.exit() } else { Exit::Done };
    let text = if as_json { json::recovered(&recovered, exit) } else { recovered_text(&recovered) };
    Ok((text, exit))
}

/// Who owns, for people.
pub(super) fn ownership_text(ownership: &Ownership) -> String {
    let mut out = format!("{}: ", OneLine(&ownership.guest));
    match ownership.owner {
        Owner::Here => out.push_str("here"),
        Owner::Elsewhere | Owner::Destination => out.push_str("elsewhere"),
        Owner::Unknown => out.push_str("not known"),
    }
    let _ = writeln!(out, ": {}", OneLine(&ownership.text));
    if ownership.rejected {
        let _ = writeln!(out, "  record: {}", OneLine(&ownership.record));
    }
    if !ownership.next.is_empty() {
        let _ = writeln!(out, "  next: {}", OneLine(&ownership.next));
    }
    if let Some(kept) = &ownership.receipt {
        let _ = write!(out, "  {}", kept_line(kept));
    }
    out
}

fn recovered_text(recovered: &Recovered) -> String {
    let ownership = &recovered.ownership;
    let mut out = format!("{}: {}: {}\n", OneLine(&ownership.guest), ownership.state.word(), OneLine(&ownership.text));
    if !recovered.asked.is_empty() {
        let _ = writeln!(out, "  asked {}: {}", OneLine(&recovered.asked), OneLine(&recovered.heard));
    }
    for (what, text) in
        [("done", &recovered.done), ("the guest may lose", &recovered.may_lose), ("never take", &recovered.never_take)]
    {
        if !text.is_empty() {
            let _ = writeln!(out, "  {what}: {}", OneLine(text));
        }
    }
    for next in &recovered.next {
        let _ = writeln!(out, "  next: {}", OneLine(next));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{State, text};

    #[test]
    fn what_was_found_and_what_to_type_is_readable() {
        let ownership = Ownership {
            guest: text("g1"),
            state: State::Sealed,
            owner: Owner::Unknown,
            text: text("this host is sealed and waits for the word of host aaaaaaaa at tcp://a:1"),
            next: text("blockferry recover g1"),
            ..Ownership::default()
        };
        assert_eq!(
            ownership_text(&ownership),
            "g1: not known: this host is sealed and waits for the word of host aaaaaaaa at tcp://a:1\n  \
             next: blockferry recover g1\n"
        );
        let recovered = Recovered {
            ownership,
            asked: text("host aaaaaaaa at tcp://a:1"),
            heard: text("no answer: Connection refused"),
            done: text("this host owns the guest from now on"),
            may_lose: text("what it wrote"),
            never_take: text("host aaaaaaaa"),
            next: [text("blockferry status g1")].into_iter().collect(),
        };
        assert_eq!(
            recovered_text(&recovered),
            "g1: sealed: this host is sealed and waits for the word of host aaaaaaaa at tcp://a:1\n  \
             asked host aaaaaaaa at tcp://a:1: no answer: Connection refused\n  \
             done: this host owns the guest from now on\n  \
             the guest may lose: what it wrote\n  \
             never take: host aaaaaaaa\n  \
             next: blockferry status g1\n"
        );
    }
}
