//! `blockferry info`: what an NBD server says about its exports.

use std::fmt::Write as _;

use super::Command;
use super::guest::PLAINTEXT;
use super::options::{Matches, Spec};
use crate::error::{OneLine, Problem};
use crate::info::{Shown, ask};
use crate::json;
use crate::units;
use crate::uri::NbdUri;

/// What `info` was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct InfoOptions {
    /// The server, and the export; without one all that the server lists.
    pub uri: NbdUri,
    /// TCP beyond this host is allowed without keys.
    pub insecure_plaintext: bool,
}

pub(super) const SPEC: Spec = Spec {
    name: "info",
    arguments: "URI [--OPTION]...",
    about: "Show what an NBD server says about its exports",
    options: &[PLAINTEXT],
    notes: "URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH. Without EXPORT every export is shown that\n\
            the server lists; where it lists none, its default export. Block sizes that the server does not tell are\n\
            those that blockferry assumes.\n\n\
            Examples:\n\
            \x20 blockferry info nbd://localhost\n\
            \x20 blockferry info 'nbd+unix:///vda?socket=/run/blockferry/g1/nbd.sock' --json\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [uri] = matches.arguments(["URI"])?;
    let uri = NbdUri::parse(uri).map_err(|cause| SPEC.usage("URI", cause))?;
    Ok(Command::Info(InfoOptions { uri, insecure_plaintext: matches.flag("insecure-plaintext") }))
}

pub(super) fn run(options: &InfoOptions, as_json: bool, print: fn(&str)) -> Result<(), Problem> {
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
