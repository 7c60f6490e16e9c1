//! A guest moved by QEMU alone, as libvirt has it done: the measure for ours.
//!
//! `bench_guest` and `live_pair` call it, between two machines of `live`.

use crate::live::Body;
use crate::qmp::{Qmp, number};
use crate::util::{Error, Result};
use std::net::TcpListener;

/// Moves memory, devices and the first disk: the destination's QEMU serves the disk, `blockdev-mirror` fills it, the
/// guest's migration stops before its switchover until the mirror has ended well, and at last the guest goes on there.
/// Returns the bytes that were sent.
pub(crate) fn with_disk(from: &mut Body, to: &mut Body) -> Result<u64> {
    let (source, destination) = (&mut from.qmp, &mut to.qmp);
    let port = free_port()?;
    let inet = format!(r#"{{"type":"inet","data":{{"host":"127.0.0.1","port":"{port}"}}}}"#);
    destination.command(&format!(r#"{{"execute":"nbd-server-start","arguments":{{"addr":{inet}}}}}"#))?;
    let export = r#"{"type":"nbd","id":"e0","node-name":"d0","name":"vda","writable":true}"#;
    destination.command(&format!(r#"{{"execute":"block-export-add","arguments":{export}}}"#))?;
    let server = format!(r#"{{"type":"inet","host":"127.0.0.1","port":"{port}"}}"#);
    let node = format!(r#"{{"driver":"nbd","node-name":"target","server":{server},"export":"vda"}}"#);
    source.command(&format!(r#"{{"execute":"blockdev-add","arguments":{node}}}"#))?;
    let job = r#"{"job-id":"mirror","device":"d0","target":"target","sync":"full","copy-mode":"write-blocking"}"#;
    source.command(&format!(r#"{{"execute":"blockdev-mirror","arguments":{job}}}"#))?;
    source.event(&["BLOCK_JOB_READY"])?;
    let state = migrate(source, destination, |source| {
        let copied = number(&source.ask("query-block-jobs")?, "offset");
        source.command(r#"{"execute":"block-job-cancel","arguments":{"device":"mirror"}}"#)?;
        let end = source.event(&["BLOCK_JOB_COMPLETED"])?;
        if end.contains("\"error\"") {
            return Err(Error::new("native", "blockdev-mirror", end));
        }
        Ok(copied.unwrap_or(0))
    })?;
    destination.ask("nbd-server-stop")?;
    destination.ask("cont")?;
    Ok(state)
}

/// Moves memory and devices; the disk is the same for both.
pub(crate) fn with_shared_disk(from: &mut Body, to: &mut Body) -> Result<u64> {
    let sent = memory_and_devices(from, to)?;
    to.qmp.ask("cont")?;
    Ok(sent)
}

/// Moves memory and devices; the guest runs nowhere then.
pub(crate) fn memory_and_devices(from: &mut Body, to: &mut Body) -> Result<u64> {
    migrate(&mut from.qmp, &mut to.qmp, |_| Ok(0))
}

/// Moves memory and devices, and calls `before_switchover` when the source's guest stands still. Returns the bytes of
/// both. The guest does not run yet.
fn migrate(
    source: &mut Qmp,
    destination: &mut Qmp,
    before_switchover: impl FnOnce(&mut Qmp) -> Result<u64>,
) -> Result<u64> {
    let capabilities = |names: &[&str]| {
        let each = names.iter().map(|name| format!(r#"{{"capability":"{name}","state":true}}"#));
        let all = each.collect::<Vec<_>>().join(",");
        format!(r#"{{"execute":"migrate-set-capabilities","arguments":{{"capabilities":[{all}]}}}}"#)
    };
    destination.command(&capabilities(&["events", "late-block-activate"]))?;
    destination.command(r#"{"execute":"migrate-incoming","arguments":{"uri":"tcp:127.0.0.1:0"}}"#)?;
    let said = destination.ask("query-migrate")?;
    let port = said.split_once("\"port\": \"").and_then(|(_, rest)| rest.split('"').next());
    let port = port.ok_or_else(|| Error::new("native", "the destination's port", &said))?;
    source.command(&capabilities(&["events", "pause-before-switchover"]))?;
    source.command(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"tcp:127.0.0.1:{port}"}}}}"#))?;
    source.event(&["\"MIGRATION\"", "\"pre-switchover\""])?;
    let copied = before_switchover(source)?;
    let go_on = r#"{"execute":"migrate-continue","arguments":{"state":"pre-switchover"}}"#;
    source.command(go_on)?;
    source.event(&["\"MIGRATION\"", "\"completed\""])?;
    destination.event(&["\"MIGRATION\"", "\"completed\""])?;
    let transferred = number(&source.ask("query-migrate")?, "transferred");
    Ok(copied + transferred.unwrap_or(0))
}

/// A port of loopback that nobody listens on now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| Error::new("native", "a free port", error))?;
    Ok(listener.local_addr().map_err(|error| Error::new("native", "a free port", error))?.port())
}
