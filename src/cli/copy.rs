//! `blockferry copy`.

use std::io::Write as _;
use std::time::Instant;

use super::Command;
use super::guest::PLAINTEXT;
use super::options::{Matches, Spec, Takes, opt};
use crate::copy::{Copied, CopyOptions, Progress, Side, copy};
use crate::error::{OneLine, Problem};
use crate::json;
use crate::limits::PROGRESS_LINE_INTERVAL;
use crate::units::{rate, size, time_ms};

pub(super) const SPEC: Spec = Spec {
    name: "copy",
    arguments: "SOURCE DESTINATION [--OPTION]...",
    about: "Copy a disk that nobody writes to: a file, a block device or an NBD server's export on either side",
    options: &[opt("verify", Takes::Nothing, "read both sides again and compare them (BLAKE3)"), PLAINTEXT],
    notes: "SOURCE and DESTINATION are a PATH, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.\n\
            A file that is missing is made, as large as the source and as thin; one that is there must be as large,\n\
            and is overwritten, as is a device or an export, which may be larger. Everything is durable before it\n\
            ends with 0. Exit codes: 0 copied; 1 refused, nothing has changed; 2 the command line is wrong; 3 failed\n\
            on the way: the destination is incomplete (a file that was made for it is removed). One that is killed\n\
            leaves a file of the full size that is incomplete: run it again, over what is there.\n\n\
            Examples:\n\
            \x20 blockferry copy /d/g1.raw nbd://localhost/vda --verify\n\
            \x20 blockferry copy 'nbd+unix:///vda?socket=/run/x.sock' /d/g1.raw\n\
            \x20 blockferry copy /d/g1.raw /dev/sdb\n",
};

pub(super) fn parse(matches: &Matches) -> Result<Command, Problem> {
    let [source, destination] = matches.arguments(["SOURCE", "DESTINATION"])?;
    let side = |name: &'static str, text: &str| Side::parse(text).map_err(|cause| SPEC.usage(name, cause));
    Ok(Command::Copy(CopyOptions {
        source: side("SOURCE", source)?,
        destination: side("DESTINATION", destination)?,
        verify: matches.flag("verify"),
        insecure_plaintext: matches.flag("insecure-plaintext"),
    }))
}

pub(super) fn run(options: &CopyOptions, as_json: bool, terminal: bool, print: fn(&str)) -> Result<(), Problem> {
    let mut told = Instant::now();
    let mut drawn = false;
    let copied = copy(options, &mut |progress| {
        if terminal && !as_json {
            drawn = true;
            let _ = write!(std::io::stderr(), "\r{}\x1b[K", text(&progress));
        } else if told.elapsed() >= PROGRESS_LINE_INTERVAL {
            told = Instant::now();
            print(&if as_json { json::copy_progress(&progress) } else { format!("{}\n", text(&progress)) });
        }
    });
    if drawn {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    let copied = copied?;
    if copied.unflushed {
        let _ = writeln!(
            std::io::stderr(),
            "blockferry: copy: {}: its server offers no FLUSH: whether the copy is durable is not known",
            OneLine(&options.destination.to_string())
        );
    }
    print(&if as_json { json::copied(options, &copied) } else { done(options, &copied) });
    Ok(())
}

fn text(progress: &Progress) -> String {
    let Progress { done_bytes, size_bytes, verifying, elapsed } = *progress;
    let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let speed = done_bytes.saturating_mul(1000) / ms.max(1);
    let percent = done_bytes.saturating_mul(100) / size_bytes.max(1);
    if verifying {
        return format!("copy: verifying {}, {}", size(size_bytes), time_ms(ms));
    }
    format!("copy: {percent} % of {}, {}, {}", size(size_bytes), rate(speed), time_ms(ms))
}

fn done(options: &CopyOptions, copied: &Copied) -> String {
    let verified = copied.root.map(|root| {
        let digits: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
        format!(", verified, root {digits}")
    });
    format!(
        "copied {} to {}: {} of data and {} of zeroes in {}{}\n",
        OneLine(&options.source.to_string()),
        OneLine(&options.destination.to_string()),
        size(copied.data_bytes),
        size(copied.zero_bytes),
        time_ms(u64::try_from(copied.took.as_millis()).unwrap_or(u64::MAX)),
        verified.unwrap_or_default(),
    )
}
