//! `blockferry export`.

use std::path::PathBuf;

use super::Command;
use super::options::{Matches, Spec, Takes, later, opt};
use crate::address::Address;
use crate::disk::Cache;
use crate::domain::check_disk_name;
use crate::error::Problem;
use crate::limits::DISKS_MAX;
use crate::options::{ExportFile, ExportOptions, Lifetime};

/// NBD's own port, for this host only.
const DEFAULT_NBD: &str = "127.0.0.1";
const NBD_PORT: u16 = 10809;

pub(super) const SPEC: Spec = Spec {
    name: "export",
    arguments: "[NAME=]FILE... [--OPTION]...",
    about: "Serve files or block devices as a plain NBD server",
    options: &[
        opt("nbd", Takes::Many("ADDR"), "where to listen, repeatable [tcp://127.0.0.1:10809]"),
        opt("read-only", Takes::Nothing, "clients cannot write"),
        opt("cache", Takes::One("MODE"), "writeback, or none: past the page cache [writeback]"),
        opt("persistent", Takes::Nothing, "serve until ended from outside (default)"),
        opt("once", Takes::Nothing, "end when the last client has gone"),
        opt("insecure-plaintext", Takes::Nothing, "allow TCP beyond this host without keys"),
        later("tls-dir", Takes::One("DIR")),
        later("key", Takes::One("FILE")),
        later("peers", Takes::One("FILE")),
    ],
    notes: "A single FILE without a name is the default export, whose name is empty. NAME= ends at the first '=';\n\
            a FILE with a '=' of its own is written with a slash before it: ./a=b.raw.\n\
            FILE may be the URI of another server's export: nbd://HOST[:PORT]/EXPORT or\n\
            nbd+unix:///EXPORT?socket=PATH.\n\
            Prints one line when ready, and sends READY=1 to $NOTIFY_SOCKET:\n\
            \x20 blockferry: export: ready: nbd=ADDR\n\n\
            Examples:\n\
            \x20 blockferry export disk.raw\n\
            \x20 blockferry export vda=/d/root.raw vdb=/d/data.raw --nbd unix:///run/x.sock --read-only\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let files = matches.free();
    if files.is_empty() {
        return Err(SPEC.usage("FILE", "missing"));
    }
    if files.len() > DISKS_MAX {
        return Err(SPEC.usage("FILE", format!("{} files are more than {DISKS_MAX}", files.len())));
    }
    let files: Vec<ExportFile> = files.iter().map(|text| parse_file(text)).collect::<Result<_, _>>()?;
    for (i, file) in files.iter().enumerate() {
        if files.len() > 1 && file.name.is_empty() {
            return Err(SPEC.usage(file.path.display(), "each of several files needs a name: NAME=FILE"));
        }
        if files[..i].iter().any(|other| other.name == file.name) {
            return Err(SPEC.usage(&file.name, "the name is given twice"));
        }
    }
    if matches.flag("persistent") && matches.flag("once") {
        return Err(matches.error("once", "excludes --persistent"));
    }
    let here = || Address::Tcp { host: DEFAULT_NBD.to_owned(), port: NBD_PORT };
    Ok(Command::Export(ExportOptions {
        files,
        nbd: matches.addresses("nbd", here)?,
        read_only: matches.flag("read-only"),
        cache: matches.read("cache", Cache::parse)?.unwrap_or_default(),
        lifetime: if matches.flag("once") { Lifetime::Once } else { Lifetime::Persistent },
        insecure_plaintext: matches.flag("insecure-plaintext"),
        json: false,
    }))
}

/// `[NAME=]FILE`.
fn parse_file(text: &str) -> Result<ExportFile, Problem> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !name.contains('/') => (name, path),
        _ => ("", text),
    };
    if path.is_empty() {
        return Err(SPEC.usage(format!("'{text}'"), "the path is empty"));
    }
    if !name.is_empty() {
        check_disk_name(name).map_err(|cause| SPEC.usage(format!("'{text}'"), cause))?;
    }
    Ok(ExportFile { name: name.to_owned(), path: PathBuf::from(path) })
}
