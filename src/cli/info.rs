//! `blockferry info`: what an NBD server says about its exports.

use std::fmt::Write as _;

use super::Command;
use super::guest::PLAINTEXT;
use super::options::{Matches, Spec, Takes, opt};
use crate::error::{OneLine, Problem};
use crate::info::{Extent, Shown, ask, map, state};
use crate::json;
use crate::limits::EXPORT_NAME_MAX;
use crate::units;
use crate::uri::NbdUri;

/// What `info` was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct InfoOptions {
    /// The server, and the export; without one all that the server lists.
    pub uri: NbdUri,
    /// Not the exports, but what this metadata context says about the parts of the one.
    pub map: Option<String>,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
}

pub(super) const SPEC: Spec = Spec {
    name: "info",
    arguments: "URI [--OPTION]...",
    about: "Show what an NBD server says about its exports",
    options: &[
        opt("map", Takes::One("CONTEXT"), "show what a metadata context says, such as base:allocation"),
        PLAINTEXT,
    ],
    notes: "URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH. Without EXPORT every export is shown\n\
            that the server lists; where it lists none, its default export. Block sizes that the server does not tell\n\
            are those that blockferry assumes.\n\
            A map has a line for each extent: offset and length in bytes, the context's flags, and what they mean.\n\
            Servers have base:allocation, qemu:dirty-bitmap:NAME, qemu:allocation-depth, and others.\n\n\
            Examples:\n\
            \x20 blockferry info nbd://localhost\n\
            \x20 blockferry info nbd://localhost/vda --map base:allocation\n\
            \x20 blockferry info 'nbd+unix:///vda?socket=/run/blockferry/g1/nbd.sock' --json\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [uri] = matches.arguments(["URI"])?;
    let uri = NbdUri::parse(uri).map_err(|cause| SPEC.usage("URI", cause))?;
    let map = matches.value("map");
    // As long as a name may be at most.
    if map.as_ref().is_some_and(|context| context.is_empty() || context.len() > EXPORT_NAME_MAX) {
        return Err(SPEC.usage("--map", format!("a context's name has 1 to {EXPORT_NAME_MAX} bytes")));
    }
    Ok(Command::Info(InfoOptions { uri, map, insecure_plaintext: matches.flag("insecure-plaintext") }))
}

pub(super) fn run(options: &InfoOptions, as_json: bool, print: fn(&str)) -> Result<(), Problem> {
    if let Some(context) = &options.map {
        return map(&options.uri, context, options.insecure_plaintext, &mut |extent| {
            let state = state(context, extent.flags);
            let Extent { offset, length, flags } = extent;
            print(&if as_json {
                json::extent(&options.uri.export, context, extent, state)
            } else {
                format!("{offset:>12} {length:>12} {flags:>4}  {}", state.unwrap_or_default()).trim_end().to_owned()
                    + "\n"
            });
        });
    }
    ask(&options.uri, options.insecure_plaintext, &mut |shown| {
        print(&if as_json { json::export(shown) } else { text(shown) });
    })
}

/// An export as people read it.
fn text(shown: &Shown) -> String {
    let info = &shown.described.info;
    let name = &shown.uri.export;
    let mut text = format!("export '{}':\n", OneLine(name));
    let _ = writeln!(text, "  size: {} ({})", info.size, units::size(info.size));
    if let Some(name) = shown.described.name.as_ref().filter(|name| **name != shown.uri.export) {
        let _ = writeln!(text, "  canonical name: {}", OneLine(name));
    }
    if let Some(words) = shown.described.text.as_ref().filter(|words| !words.is_empty()) {
        let _ = writeln!(text, "  description: {}", OneLine(words));
    }
    let _ = writeln!(text, "  read-only: {}", if shown.is_read_only() { "yes" } else { "no" });
    let _ = writeln!(text, "  structured replies: {}", if info.structured { "yes" } else { "no" });
    let can = shown.can();
    let _ = writeln!(text, "  can: {}", if can.is_empty() { "nothing more".to_owned() } else { can.join(" ") });
    let (minimum, preferred) = (info.minimum_block, info.preferred_block);
    let _ = writeln!(text, "  block sizes: minimum {minimum}, preferred {preferred}");
    let _ = writeln!(text, "  maximum payload: {}", info.maximum_payload);
    for context in &shown.contexts {
        let _ = writeln!(text, "  context: {}", OneLine(context));
    }
    text
}
