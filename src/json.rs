//! `--json`: one object a line, one schema for all commands. `docs/json.md` describes every field.
//!
//! Each object has `type`. Fields are only ever added; what is not known is `null`, never left out. Identities are
//! strings of hexadecimal digits, because a number in JSON has 53 bits in many readers.

use serde::Serialize;

use crate::control::wire::{Convergence, Done, Kept, Ownership, Progress, Recovered, Status, Verify};
use crate::copy::{Copied, CopyOptions};
use crate::error::{Exit, Problem};
use crate::info::{Extent, Shown};
use crate::limits::JSON_LINE_MAX;
use crate::ready::Ready;

/// One object as a line, with its line end.
fn line(object: &impl Serialize) -> String {
    let mut bytes = vec![0; JSON_LINE_MAX];
    let length = serde_json_core::to_slice(object, &mut bytes).unwrap_or_else(|_| {
        // Every text that comes in is bounded far below the largest line.
        log::error!("json: a line longer than {JSON_LINE_MAX} bytes was not written");
        0
    });
    bytes.truncate(length);
    bytes.push(b'\n');
    String::from_utf8(bytes).unwrap_or_default()
}

/// `None` for what is empty.
fn some(text: &str) -> Option<&str> {
    if text.is_empty() { None } else { Some(text) }
}

#[derive(Serialize)]
struct ReadyLine<'a> {
    r#type: &'static str,
    name: &'a str,
    state: Option<&'a str>,
    term: Option<u64>,
    generation: Option<u64>,
    nbd: &'a [&'a str],
    listen: Option<&'a str>,
    next: Option<&'a str>,
}

/// The ready line of `serve` and `export`.
#[must_use]
pub fn ready(ready: &Ready<'_>) -> String {
    let nbd: Vec<String> = ready.nbd.iter().map(ToString::to_string).collect();
    let nbd: Vec<&str> = nbd.iter().map(String::as_str).collect();
    let listen = ready.listen.map(ToString::to_string);
    line(&ReadyLine {
        r#type: "ready",
        name: ready.name,
        state: ready.record.map(|(state, ..)| state.word()),
        term: ready.record.map(|(_, term, _)| term),
        generation: ready.record.map(|(_, _, generation)| generation),
        nbd: &nbd,
        listen: listen.as_deref(),
        next: some(ready.next),
    })
}

#[derive(Serialize)]
struct OkLine<'a> {
    r#type: &'static str,
    operation: &'a str,
    guest: &'a str,
}

/// A command without a result of its own was done.
#[must_use]
pub fn ok(operation: &str, guest: &str) -> String {
    line(&OkLine { r#type: "ok", operation, guest })
}

#[derive(Serialize)]
struct AttachedLine<'a> {
    r#type: &'static str,
    operation: &'a str,
    guest: &'a str,
    disk: &'a str,
    device: &'a str,
}

/// A disk has become a device, or a device was given up.
#[must_use]
pub fn attached(operation: &str, guest: &str, disk: &str, device: &str) -> String {
    line(&AttachedLine { r#type: "ok", operation, guest, disk, device })
}

#[derive(Serialize)]
struct ExportLine<'a> {
    r#type: &'static str,
    uri: &'a str,
    export: &'a str,
    size_bytes: u64,
    description: Option<&'a str>,
    read_only: bool,
    structured_replies: bool,
    can: &'a [&'a str],
    minimum_block_bytes: u32,
    preferred_block_bytes: u32,
    maximum_payload_bytes: u32,
}

#[derive(Serialize)]
struct ContextLine<'a> {
    r#type: &'static str,
    export: &'a str,
    context: &'a str,
}

/// An export of an NBD server, and on lines of their own its metadata contexts.
#[must_use]
pub fn export(shown: &Shown) -> String {
    let info = &shown.described.info;
    let export = &shown.uri.export;
    let mut lines = line(&ExportLine {
        r#type: "export",
        uri: &shown.uri.to_string(),
        export,
        size_bytes: info.size,
        description: shown.described.text.as_deref().and_then(some),
        read_only: shown.is_read_only(),
        structured_replies: info.structured,
        can: &shown.can(),
        minimum_block_bytes: info.minimum_block,
        preferred_block_bytes: info.preferred_block,
        maximum_payload_bytes: info.maximum_payload,
    });
    for context in &shown.contexts {
        lines.push_str(&line(&ContextLine { r#type: "context", export, context }));
    }
    lines
}

#[derive(Serialize)]
struct ExtentLine<'a> {
    r#type: &'static str,
    export: &'a str,
    context: &'a str,
    offset_bytes: u64,
    length_bytes: u64,
    flags: u64,
    state: Option<&'a str>,
}

/// What a metadata context says about a part of an export.
#[must_use]
pub fn extent(export: &str, context: &str, extent: Extent, state: Option<&str>) -> String {
    line(&ExtentLine {
        r#type: "extent",
        export,
        context,
        offset_bytes: extent.offset,
        length_bytes: extent.length,
        flags: extent.flags,
        state,
    })
}

#[derive(Serialize)]
struct ErrorLine<'a> {
    r#type: &'static str,
    operation: &'a str,
    object: &'a str,
    cause: &'a str,
    exit: u8,
}

/// A command failed; the same text is on stderr.
#[must_use]
pub fn error(problem: &Problem) -> String {
    line(&ErrorLine {
        r#type: "error",
        operation: &problem.operation,
        object: &problem.object,
        cause: &problem.cause,
        exit: problem.exit.code(),
    })
}

#[derive(Serialize)]
struct StatusLine<'a> {
    r#type: &'static str,
    guest: &'a str,
    state: &'a str,
    term: u64,
    generation: u64,
    lineage: Option<&'a str>,
    peer: Option<&'a str>,
    migration: &'a str,
    next: Option<&'a str>,
    disks: &'a [StatusDisk<'a>],
    receipt: Option<KeptLine<'a>>,
}

#[derive(Serialize)]
struct StatusDisk<'a> {
    name: &'a str,
    size_bytes: u64,
    moves: bool,
    stays: Option<&'a str>,
    gate: Option<&'a str>,
    device: Option<&'a str>,
}

/// How a guest's disks are.
#[must_use]
pub fn status(status: &Status) -> String {
    let disks: Vec<_> = status
        .disks
        .iter()
        .map(|disk| StatusDisk {
            name: &disk.name,
            size_bytes: disk.size_bytes,
            moves: disk.stays.is_none(),
            stays: disk.stays.map(|stays| stays.word()),
            gate: disk.gate.map(|gate| gate.word()),
            device: status
                .attached
                .iter()
                .find(|attached| attached.disk == disk.name)
                .map(|found| found.device.as_str()),
        })
        .collect();
    let lineage = id(status.lineage);
    let receipt = status.receipt.as_ref().map(KeptTexts::of);
    line(&StatusLine {
        r#type: "status",
        guest: &status.guest,
        state: status.state.word(),
        term: status.term,
        generation: status.generation,
        lineage: some(&lineage),
        peer: some(&status.peer),
        migration: status.migration.word(),
        next: some(&status.hint),
        disks: &disks,
        receipt: receipt.as_ref().map(KeptTexts::line),
    })
}

#[derive(Serialize)]
struct OwnershipLine<'a> {
    r#type: &'static str,
    guest: &'a str,
    owner: &'a str,
    state: &'a str,
    term: u64,
    generation: u64,
    host: Option<&'a str>,
    address: Option<&'a str>,
    text: &'a str,
    record: Option<&'a str>,
    rejected: bool,
    next: Option<&'a str>,
    exit: u8,
    receipt: Option<KeptLine<'a>>,
}

/// Who owns a guest.
#[must_use]
pub fn ownership(ownership: &Ownership) -> String {
    let receipt = ownership.receipt.as_ref().map(KeptTexts::of);
    line(&OwnershipLine {
        r#type: "ownership",
        guest: &ownership.guest,
        owner: ownership.owner.word(),
        state: ownership.state.word(),
        term: ownership.term,
        generation: ownership.generation,
        host: some(&id(ownership.host)),
        address: some(&ownership.address),
        text: &ownership.text,
        record: some(&ownership.record),
        rejected: ownership.rejected,
        next: some(&ownership.next),
        exit: ownership.owner.exit().code(),
        receipt: receipt.as_ref().map(KeptTexts::line),
    })
}

#[derive(Serialize)]
struct KeptLine<'a> {
    gave: bool,
    peer: &'a str,
    attempt: &'a str,
    lineage: &'a str,
    term: u64,
    generation: u64,
    verify: &'a str,
    verified_bytes: u64,
    root: Option<&'a str>,
    sent_bytes: Option<u64>,
    equal_bytes: Option<u64>,
    unread_bytes: u64,
}

/// A receipt, and its numbers as they print.
struct KeptTexts<'a> {
    kept: &'a Kept,
    attempt: String,
    lineage: String,
    root: Option<String>,
}

impl<'a> KeptTexts<'a> {
    fn of(kept: &'a Kept) -> Self {
        let root = (kept.receipt.verify != Verify::None).then(|| hex(&kept.receipt.root));
        Self { kept, attempt: id(kept.attempt), lineage: id(kept.lineage), root }
    }

    fn line(&self) -> KeptLine<'_> {
        let receipt = &self.kept.receipt;
        KeptLine {
            gave: self.kept.gave,
            peer: &self.kept.peer,
            attempt: &self.attempt,
            lineage: &self.lineage,
            term: receipt.term,
            generation: receipt.generation,
            verify: receipt.verify.word(),
            verified_bytes: receipt.verified_bytes,
            root: self.root.as_deref(),
            sent_bytes: self.kept.sent_bytes,
            equal_bytes: self.kept.equal_bytes,
            unread_bytes: receipt.unread_bytes,
        }
    }
}

#[derive(Serialize)]
struct RecoverLine<'a> {
    r#type: &'static str,
    guest: &'a str,
    owner: &'a str,
    state: &'a str,
    term: u64,
    generation: u64,
    host: Option<&'a str>,
    address: Option<&'a str>,
    text: &'a str,
    asked: Option<&'a str>,
    heard: Option<&'a str>,
    done: Option<&'a str>,
    may_lose: Option<&'a str>,
    never_take: Option<&'a str>,
    next: &'a [&'a str],
    exit: u8,
}

/// What became of a `recover`.
#[must_use]
pub fn recovered(recovered: &Recovered, exit: Exit) -> String {
    let ownership = &recovered.ownership;
    let next: Vec<&str> = recovered.next.iter().map(|next| next.as_str()).collect();
    line(&RecoverLine {
        r#type: "recover",
        guest: &ownership.guest,
        owner: ownership.owner.word(),
        state: ownership.state.word(),
        term: ownership.term,
        generation: ownership.generation,
        host: some(&id(ownership.host)),
        address: some(&ownership.address),
        text: &ownership.text,
        asked: some(&recovered.asked),
        heard: some(&recovered.heard),
        done: some(&recovered.done),
        may_lose: some(&recovered.may_lose),
        never_take: some(&recovered.never_take),
        next: &next,
        exit: exit.code(),
    })
}

/// A number of 128 bits as digits; empty: none.
fn id(number: u128) -> String {
    if number == 0 { String::new() } else { format!("{number:032x}") }
}

/// A digest as digits.
fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Serialize)]
struct ProgressLine<'a> {
    r#type: &'static str,
    guest: &'a str,
    attempt: &'a str,
    phase: &'a str,
    elapsed_ms: u64,
    converged: bool,
    convergence: &'a str,
    predicted_final_ms: Option<u32>,
    downtime_limit_ms: u32,
    bandwidth_bytes: u64,
    held: bool,
    disks: &'a [ProgressDisk<'a>],
    lost_ms: Option<u64>,
    lost_cause: Option<&'a str>,
    transport: &'static str,
    transport_cause: Option<&'a str>,
    state_bytes: u64,
    synchronous: Option<SinceRates>,
    base_cause: Option<&'a str>,
}

/// Why guest writes wait.
#[derive(Serialize)]
struct SinceRates {
    dirty_rate_bytes: u64,
    rate_bytes: u64,
}

#[derive(Serialize)]
struct ProgressDisk<'a> {
    name: &'a str,
    size_bytes: u64,
    left_bytes: u64,
    sent_bytes: u64,
    zero_bytes: u64,
    rate_bytes: u64,
    dirty_rate_bytes: u64,
    passes: u32,
    estimate_s: Option<u32>,
    resent_bytes: u64,
    equal_bytes: u64,
    verified_bytes: u64,
    unverified_bytes: u64,
    base_bytes: u64,
}

/// How a migration is.
#[must_use]
pub fn progress(guest: &str, progress: &Progress) -> String {
    let disks: Vec<_> = progress
        .disks
        .iter()
        .map(|disk| ProgressDisk {
            name: &disk.name,
            size_bytes: disk.size_bytes,
            left_bytes: disk.left_bytes,
            sent_bytes: disk.sent_bytes,
            zero_bytes: disk.zero_bytes,
            rate_bytes: disk.rate_bytes,
            dirty_rate_bytes: disk.dirty_rate_bytes,
            passes: disk.passes,
            estimate_s: disk.estimate_s,
            resent_bytes: disk.resent_bytes,
            equal_bytes: disk.equal_bytes,
            verified_bytes: disk.verified_bytes,
            unverified_bytes: disk.unverified_bytes,
            base_bytes: disk.base_bytes,
        })
        .collect();
    line(&ProgressLine {
        r#type: "progress",
        guest,
        attempt: &format!("{:032x}", progress.attempt),
        phase: progress.phase.word(),
        elapsed_ms: progress.elapsed_ms,
        converged: progress.convergence == Convergence::Converged,
        convergence: match progress.convergence {
            Convergence::Copying => "copying",
            Convergence::Converged => "converged",
            Convergence::TooLong => "too long",
            Convergence::GuestIsFaster { .. } => "guest is faster",
        },
        predicted_final_ms: progress.predicted_final_ms,
        downtime_limit_ms: progress.downtime_limit_ms,
        bandwidth_bytes: progress.bandwidth_bytes,
        held: progress.held,
        disks: &disks,
        lost_ms: progress.lost_ms,
        lost_cause: progress.lost_ms.map(|_| progress.lost_cause.as_str()),
        transport: progress.transport.word(),
        transport_cause: Some(progress.transport_cause.as_str()).filter(|cause| !cause.is_empty()),
        state_bytes: progress.state_bytes,
        synchronous: progress
            .synchronous
            .map(|since| SinceRates { dirty_rate_bytes: since.dirty_rate_bytes, rate_bytes: since.rate_bytes }),
        base_cause: some(&progress.base_cause),
    })
}

#[derive(Serialize)]
struct CopyProgressLine {
    r#type: &'static str,
    done_bytes: u64,
    size_bytes: u64,
    verifying: bool,
    elapsed_ms: u64,
}

/// How far a copy is.
#[must_use]
pub fn copy_progress(progress: &crate::copy::Progress) -> String {
    line(&CopyProgressLine {
        r#type: "copy-progress",
        done_bytes: progress.done_bytes,
        size_bytes: progress.size_bytes,
        verifying: progress.verifying,
        elapsed_ms: u64::try_from(progress.elapsed.as_millis()).unwrap_or(u64::MAX),
    })
}

#[derive(Serialize)]
struct CopiedLine<'a> {
    r#type: &'static str,
    source: &'a str,
    destination: &'a str,
    size_bytes: u64,
    data_bytes: u64,
    zero_bytes: u64,
    total_ms: u64,
    durable: bool,
    root: Option<&'a str>,
}

/// What a copy has done.
#[must_use]
pub fn copied(options: &CopyOptions, copied: &Copied) -> String {
    line(&CopiedLine {
        r#type: "copied",
        source: &options.source.to_string(),
        destination: &options.destination.to_string(),
        size_bytes: copied.size_bytes,
        data_bytes: copied.data_bytes,
        zero_bytes: copied.zero_bytes,
        total_ms: u64::try_from(copied.took.as_millis()).unwrap_or(u64::MAX),
        durable: !copied.unflushed,
        root: copied.root.map(|root| hex(&root)).as_deref(),
    })
}

#[derive(Serialize)]
struct DoneLine<'a> {
    r#type: &'static str,
    guest: &'a str,
    attempt: &'a str,
    exit: u8,
    cause: Option<&'a str>,
    owner: &'a str,
    destination: Option<&'a str>,
    sent_bytes: u64,
    zero_bytes: u64,
    passes: u32,
    total_ms: u64,
    switchover_us: Option<u64>,
    resent_bytes: u64,
    equal_bytes: u64,
    verify: Option<&'a str>,
    verified_bytes: Option<u64>,
    root: Option<&'a str>,
    state_bytes: Option<u64>,
    pause_us: Option<u64>,
    base_bytes: u64,
    unread_bytes: Option<u64>,
}

/// How a migration ended.
#[must_use]
pub fn done(guest: &str, done: &Done) -> String {
    let receipt = done.receipt.as_ref();
    let root = receipt.filter(|receipt| receipt.verify != Verify::None).map(|receipt| hex(&receipt.root));
    line(&DoneLine {
        r#type: "done",
        guest,
        attempt: &format!("{:032x}", done.attempt),
        exit: Exit::from_code(done.exit).code(),
        cause: some(&done.message),
        owner: done.owner.word(),
        destination: some(&done.destination),
        sent_bytes: done.sent_bytes,
        zero_bytes: done.zero_bytes,
        passes: done.passes,
        total_ms: done.total_ms,
        switchover_us: done.switchover_us,
        resent_bytes: done.resent_bytes,
        equal_bytes: done.equal_bytes,
        verify: receipt.map(|receipt| receipt.verify.word()),
        verified_bytes: receipt.map(|receipt| receipt.verified_bytes),
        root: root.as_deref(),
        state_bytes: done.state_bytes,
        pause_us: done.pause_us,
        base_bytes: done.base_bytes,
        unread_bytes: receipt.map(|receipt| receipt.unread_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;
    use crate::control::wire::{AttachedStatus, DiskProgress, DiskStatus, Gate, Migration, Owner, Phase, State, text};
    use crate::domain::Stays;

    #[test]
    fn every_line_has_its_fields_in_order() {
        let nbd = [Address::Unix("/run/n".into()).into()];
        let announced = Ready {
            name: "g1",
            record: Some((State::Incoming, 1, 2)),
            nbd: &nbd,
            listen: None,
            next: "blockferry claim g1",
        };
        assert_eq!(
            ready(&announced),
            "{\"type\":\"ready\",\"name\":\"g1\",\"state\":\"incoming\",\"term\":1,\"generation\":2,\
             \"nbd\":[\"unix:///run/n\"],\"listen\":null,\"next\":\"blockferry claim g1\"}\n"
        );
        assert_eq!(ok("switch", "g1"), "{\"type\":\"ok\",\"operation\":\"switch\",\"guest\":\"g1\"}\n");
        assert_eq!(
            attached("attach", "g1", "vda", "/dev/nbd0"),
            "{\"type\":\"ok\",\"operation\":\"attach\",\"guest\":\"g1\",\"disk\":\"vda\",\"device\":\"/dev/nbd0\"}\n"
        );
        assert_eq!(
            error(&Problem::refused("claim", "g1", "a \"b\"\\\n\u{1b}é")),
            "{\"type\":\"error\",\"operation\":\"claim\",\"object\":\"g1\",\"cause\":\"a \\\"b\\\"\\\\\\n\\u001Bé\",\
             \"exit\":1}\n"
        );
    }

    #[test]
    fn a_status_line_has_its_fields_in_order() {
        let disks = [
            DiskStatus { name: text("a"), size_bytes: 512, stays: None, gate: Some(Gate::Serving) },
            DiskStatus { name: text("b"), size_bytes: 0, stays: Some(Stays::Empty), gate: None },
        ];
        let told = Status {
            guest: text("g1"),
            state: State::Owner,
            term: 1,
            generation: 2,
            lineage: 255,
            migration: Migration::Running,
            disks: disks.into_iter().collect(),
            attached: [AttachedStatus { disk: text("a"), device: text("/dev/nbd3") }].into_iter().collect(),
            ..Status::default()
        };
        assert_eq!(
            status(&told),
            "{\"type\":\"status\",\"guest\":\"g1\",\"state\":\"owner\",\"term\":1,\"generation\":2,\
             \"lineage\":\"000000000000000000000000000000ff\",\"peer\":null,\"migration\":\"running\",\"next\":null,\
             \"disks\":[{\"name\":\"a\",\"size_bytes\":512,\"moves\":true,\"stays\":null,\"gate\":\"serving\",\
             \"device\":\"/dev/nbd3\"},\
             {\"name\":\"b\",\"size_bytes\":0,\"moves\":false,\"stays\":\"no source\",\"gate\":null,\
             \"device\":null}],\"receipt\":null}\n"
        );
    }

    #[test]
    fn ownership_and_recover_lines_have_their_fields_in_order() {
        let told = Ownership {
            guest: text("g1"),
            state: State::Given,
            owner: Owner::Elsewhere,
            term: 1,
            generation: 2,
            host: 255,
            address: text("tcp://b:1"),
            text: text("t"),
            ..Ownership::default()
        };
        let head = "\"guest\":\"g1\",\"owner\":\"elsewhere\",\"state\":\"given\",\"term\":1,\"generation\":2,\
                    \"host\":\"000000000000000000000000000000ff\",\"address\":\"tcp://b:1\",\"text\":\"t\"";
        assert_eq!(
            ownership(&told),
            format!(
                "{{\"type\":\"ownership\",{head},\"record\":null,\"rejected\":false,\"next\":null,\"exit\":4,\
                 \"receipt\":null}}\n"
            )
        );
        let told = Recovered {
            ownership: told,
            asked: text("a"),
            heard: text("h"),
            next: [text("n")].into_iter().collect(),
            ..Recovered::default()
        };
        assert_eq!(
            recovered(&told, Exit::GaveAway),
            format!(
                "{{\"type\":\"recover\",{head},\"asked\":\"a\",\"heard\":\"h\",\"done\":null,\"may_lose\":null,\
                 \"never_take\":null,\"next\":[\"n\"],\"exit\":4}}\n"
            )
        );
    }

    #[test]
    fn progress_and_done_lines_have_their_fields_in_order() {
        let disk = DiskProgress { name: text("a"), size_bytes: 9, estimate_s: Some(8), ..DiskProgress::default() };
        let running = Progress {
            attempt: 1,
            phase: Phase::Bulk,
            predicted_final_ms: Some(3),
            disks: [disk].into_iter().collect(),
            ..Progress::default()
        };
        assert_eq!(
            progress("g1", &running),
            "{\"type\":\"progress\",\"guest\":\"g1\",\"attempt\":\"00000000000000000000000000000001\",\
             \"phase\":\"bulk pass\",\"elapsed_ms\":0,\"converged\":false,\"convergence\":\"copying\",\
             \"predicted_final_ms\":3,\"downtime_limit_ms\":0,\"bandwidth_bytes\":0,\"held\":false,\"disks\":[\
             {\"name\":\"a\",\"size_bytes\":9,\"left_bytes\":0,\"sent_bytes\":0,\"zero_bytes\":0,\"rate_bytes\":0,\
             \"dirty_rate_bytes\":0,\"passes\":0,\"estimate_s\":8,\"resent_bytes\":0,\"equal_bytes\":0,\
             \"verified_bytes\":0,\"unverified_bytes\":0,\"base_bytes\":0}],\"lost_ms\":null,\"lost_cause\":null,\
             \"transport\":\"auto\",\"transport_cause\":null,\"state_bytes\":0,\
             \"synchronous\":null,\"base_cause\":null}\n"
        );
        let ended = Done { attempt: 1, owner: Owner::Destination, destination: text("d"), ..Done::default() };
        assert_eq!(
            done("g1", &ended),
            "{\"type\":\"done\",\"guest\":\"g1\",\"attempt\":\"00000000000000000000000000000001\",\"exit\":0,\
             \"cause\":null,\"owner\":\"destination\",\"destination\":\"d\",\"sent_bytes\":0,\"zero_bytes\":0,\
             \"passes\":0,\"total_ms\":0,\"switchover_us\":null,\"resent_bytes\":0,\"equal_bytes\":0,\
             \"verify\":null,\"verified_bytes\":null,\"root\":null,\"state_bytes\":null,\"pause_us\":null,\
             \"base_bytes\":0,\"unread_bytes\":null}\n"
        );
    }
}
