//! A guest's disks as the user names them, and which of them move.
//!
//! The command line makes [`Disk`]s from `--disk`, or from a libvirt domain XML ([`xml`]); `serve` opens them and
//! `migrate` asks [`moving`]. Nothing here touches a file.

pub mod xml;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::{Cache, server_of};
use crate::limits::{DISK_NAME_MAX, DISKS_MAX, GIB, GUEST_NAME_MAX, KIB, MIB, SECTOR};

/// One disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its name: the guest's device (`vda`) and the NBD export.
    pub name: String,
    /// Where its bytes are.
    pub source: Source,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Both hosts see the same bytes already.
    pub shared: bool,
    /// How the host's page cache is used.
    pub cache: Cache,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, a block device, or a server's export that blockferry opens.
    File {
        /// Its path, or the URI of the export.
        path: PathBuf,
        /// The size in bytes of the file that is created where none is; a multiple of 512.
        size: Option<u64>,
    },
    /// The VMM opens it itself; known, never copied.
    External,
    /// An empty drive.
    Empty,
}

/// Why a disk stays where it is. The numbers travel through the control door: only append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stays {
    /// 0: both hosts see it already.
    Shared,
    /// 1: nobody writes to it; the destination has its own.
    ReadOnly,
    /// 2: the VMM opens it itself.
    External,
    /// 3: there is nothing in the drive.
    Empty,
    /// 4: `--migrate-disks` does not name it.
    NotChosen,
}

impl Stays {
    /// As `status` prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::ReadOnly => "read-only",
            Self::External => "external",
            Self::Empty => "no source",
            Self::NotChosen => "not chosen",
        }
    }
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Disk {
    /// Reads what follows `--disk`: `NAME[,file=PATH][,size=SIZE][,external][,ro][,shared][,cache=writeback|none]`.
    /// A path cannot contain a comma.
    ///
    /// # Errors
    /// The cause, for a usage error.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        check_disk_name(name)?;
        let mut given = Given::default();
        for part in parts {
            given.take(name, part)?;
        }
        given.finish(name)
    }

    /// Why this disk stays where it is unless `--migrate-disks` says otherwise; `None` when it moves.
    #[must_use]
    pub fn stays(&self) -> Option<Stays> {
        match self.source {
            Source::External => Some(Stays::External),
            Source::Empty => Some(Stays::Empty),
            Source::File { .. } if self.read_only => Some(Stays::ReadOnly),
            Source::File { .. } if self.shared => Some(Stays::Shared),
            Source::File { .. } => None,
        }
    }
}

/// Fills `place` once.
fn put<T>(place: &mut Option<T>, value: T, twice: impl FnOnce() -> String) -> Result<(), String> {
    if place.replace(value).is_some() { Err(twice()) } else { Ok(()) }
}

/// The parts of one `--disk`, gathered before they are judged together.
#[derive(Default)]
struct Given {
    file: Option<PathBuf>,
    size: Option<u64>,
    cache: Option<Cache>,
    external: bool,
    read_only: bool,
    shared: bool,
}

impl Given {
    fn take(&mut self, name: &str, part: &str) -> Result<(), String> {
        let twice = |key: &str| format!("disk {name}: '{key}' is given twice");
        let flag = |seen: &mut bool| if std::mem::replace(seen, true) { Err(twice(part)) } else { Ok(()) };
        match part.split_once('=') {
            None => match part {
                "external" => flag(&mut self.external),
                "ro" => flag(&mut self.read_only),
                "shared" => flag(&mut self.shared),
                "file" | "size" | "cache" => Err(format!("disk {name}: '{part}' needs a value: {part}=...")),
                _ => Err(format!(
                    "disk {name}: '{part}' is not known; there are file=, size=, cache=, external, ro and shared \
                     (a path cannot contain a comma)"
                )),
            },
            Some(("file", "")) => Err(format!("disk {name}: file= needs a path")),
            Some(("file", path)) => put(&mut self.file, PathBuf::from(path), || twice("file")),
            Some(("size", size)) => {
                let size = disk_size(size).map_err(|cause| format!("disk {name}: size: {cause}"))?;
                put(&mut self.size, size, || twice("size"))
            }
            Some(("cache", cache)) => {
                let cache = Cache::parse(cache).map_err(|cause| format!("disk {name}: cache: {cause}"))?;
                put(&mut self.cache, cache, || twice("cache"))
            }
            Some((key, _)) => Err(format!(
                "disk {name}: '{key}=' is not known; there are file=, size=, cache=, external, ro and shared \
                 (a path cannot contain a comma)"
            )),
        }
    }

    fn finish(self, name: &str) -> Result<Disk, String> {
        if self.file.is_none() && (self.size.is_some() || self.cache.is_some()) {
            return Err(format!("disk {name}: size= and cache= need file=PATH"));
        }
        if let Some(path) = &self.file
            && server_of(path).map_err(|cause| format!("disk {name}: file: {cause}"))?.is_some()
            && self.cache.is_some()
        {
            return Err(format!("disk {name}: cache= is for files and block devices"));
        }
        let source = match (self.file, self.external) {
            (Some(_), true) => return Err(format!("disk {name}: 'external' and file= exclude each other")),
            (Some(path), false) => Source::File { path, size: self.size },
            (None, true) => Source::External,
            (None, false) => Source::Empty,
        };
        Ok(Disk {
            name: name.to_owned(),
            source,
            read_only: self.read_only,
            shared: self.shared,
            cache: self.cache.unwrap_or_default(),
        })
    }
}

/// Checks what only all disks together show: their number, and that no name or file comes twice.
///
/// # Errors
/// The cause, for a usage error.
pub fn check_disks(disks: &[Disk]) -> Result<(), String> {
    if disks.len() > DISKS_MAX {
        return Err(format!("{} disks are more than {DISKS_MAX}", disks.len()));
    }
    for (i, disk) in disks.iter().enumerate() {
        for other in &disks[..i] {
            if other.name == disk.name {
                return Err(format!("disk {} is given twice", disk.name));
            }
            if let (Source::File { path: a, .. }, Source::File { path: b, .. }) = (&other.source, &disk.source)
                && a == b
            {
                return Err(format!("disks {} and {} have the same file {}", other.name, disk.name, a.display()));
            }
        }
    }
    Ok(())
}

/// What happens to each disk, in the order of `disks`: `None` moves, else why it stays. An empty `chosen` moves all
/// but shared, read-only, external and empty ones; a list moves exactly what it names, shared disks too.
///
/// # Errors
/// The cause: a name that is not known, comes twice, or cannot move; or nothing moves at all.
pub fn moving(disks: &[Disk], chosen: &[impl AsRef<str>]) -> Result<Vec<Option<Stays>>, String> {
    for (i, name) in chosen.iter().map(AsRef::as_ref).enumerate() {
        if chosen[..i].iter().any(|other| other.as_ref() == name) {
            return Err(format!("disk {name} is named twice"));
        }
        let Some(disk) = disks.iter().find(|disk| disk.name == name) else {
            return Err(format!("there is no disk {name}"));
        };
        match disk.stays() {
            None | Some(Stays::Shared) => {}
            Some(why) => return Err(format!("disk {name} cannot move: {why}")),
        }
    }
    let fate = |disk: &Disk| match chosen.is_empty() {
        true => disk.stays(),
        false if chosen.iter().any(|name| name.as_ref() == disk.name) => None,
        false => Some(disk.stays().unwrap_or(Stays::NotChosen)),
    };
    Ok(disks.iter().map(fate).collect())
}

/// Reads a size: bytes, or a whole number of K, M, G or T (powers of 1024, either case).
///
/// # Errors
/// The cause, for a usage error.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: bytes, or a whole number of K, M, G or T");
    let (digits, unit) = match text.bytes().last().map(|b| b.to_ascii_uppercase()) {
        Some(b'K') => (&text[..text.len() - 1], KIB as u64),
        Some(b'M') => (&text[..text.len() - 1], MIB as u64),
        Some(b'G') => (&text[..text.len() - 1], GIB),
        Some(b'T') => (&text[..text.len() - 1], GIB * KIB as u64),
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    // Only too many digits fail here. The largest size is the largest file offset.
    let number: Option<u64> = digits.parse().ok();
    match number.and_then(|n| n.checked_mul(unit)) {
        Some(size) if i64::try_from(size).is_ok() => Ok(size),
        _ => Err(format!("'{text}' is too large")),
    }
}

/// A size that a disk can have.
fn disk_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("a disk cannot be empty".to_owned()),
        size if size % SECTOR != 0 => Err(format!("{size} is not a multiple of {SECTOR}")),
        size => Ok(size),
    }
}

/// Checks a guest's name: it names files too.
///
/// # Errors
/// The cause, for a usage error.
pub fn check_guest_name(name: &str) -> Result<(), String> {
    check_name("guest", name, GUEST_NAME_MAX)
}

/// Checks a disk's name: it names an export too.
///
/// # Errors
/// The cause, for a usage error.
pub fn check_disk_name(name: &str) -> Result<(), String> {
    check_name("disk", name, DISK_NAME_MAX)
}

/// A name is a path component and a word on a command line.
fn check_name(what: &str, name: &str, longest: usize) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("the {what}'s name is empty"));
    }
    if name.len() > longest {
        return Err(format!("the {what}'s name is longer than {longest} bytes"));
    }
    let bad = |c: char| c.is_control() || c.is_whitespace() || "/,='\"\\".contains(c);
    if name.starts_with(['.', '-']) || name.contains(bad) {
        return Err(format!(
            "'{name}' is not a {what}'s name: no spaces, slashes, commas, equal signs, quotes, nor '.' or '-' first"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Disk {
        Disk::parse(text).expect("a disk")
    }

    #[test]
    fn a_disk_is_read_with_all_its_parts() {
        assert_eq!(
            disk("vda,file=/d/g1.raw,size=20G,cache=none"),
            Disk {
                name: "vda".to_owned(),
                source: Source::File { path: "/d/g1.raw".into(), size: Some(20 << 30) },
                read_only: false,
                shared: false,
                cache: Cache::None,
            }
        );
        assert_eq!(disk("vdb,external,shared").source, Source::External);
        assert_eq!(disk("sr0").source, Source::Empty);
        let tools = disk("vdc,file=/d/a=b.raw,ro");
        assert_eq!(tools.source, Source::File { path: "/d/a=b.raw".into(), size: None });
        assert!(tools.read_only && !tools.shared);
        assert_eq!(tools.cache, Cache::Writeback);
    }

    #[test]
    fn every_wrong_disk_says_what_is_wrong() {
        let known = "is not known; there are file=, size=, cache=, external, ro and shared \
                     (a path cannot contain a comma)";
        let name = "no spaces, slashes, commas, equal signs, quotes, nor '.' or '-' first";
        let long = "x".repeat(65);
        for (text, cause) in [
            ("", "the disk's name is empty".to_owned()),
            (",file=/x", "the disk's name is empty".to_owned()),
            (&long, "the disk's name is longer than 64 bytes".to_owned()),
            ("a/b", format!("'a/b' is not a disk's name: {name}")),
            ("file=/x", format!("'file=/x' is not a disk's name: {name}")),
            (".x", format!("'.x' is not a disk's name: {name}")),
            ("vda,file=/a,b.raw", format!("disk vda: 'b.raw' {known}")),
            ("vda,flie=/a", format!("disk vda: 'flie=' {known}")),
            ("vda,", format!("disk vda: '' {known}")),
            ("vda,file", "disk vda: 'file' needs a value: file=...".to_owned()),
            ("vda,file=", "disk vda: file= needs a path".to_owned()),
            ("vda,file=/a,file=/b", "disk vda: 'file' is given twice".to_owned()),
            ("vda,file=/a,size=1M,size=1M", "disk vda: 'size' is given twice".to_owned()),
            ("vda,file=/a,cache=none,cache=none", "disk vda: 'cache' is given twice".to_owned()),
            ("vda,ro,ro", "disk vda: 'ro' is given twice".to_owned()),
            ("vda,external,external", "disk vda: 'external' is given twice".to_owned()),
            ("vda,shared,shared", "disk vda: 'shared' is given twice".to_owned()),
            ("vda,external,file=/a", "disk vda: 'external' and file= exclude each other".to_owned()),
            ("vda,size=1M", "disk vda: size= and cache= need file=PATH".to_owned()),
            ("vda,external,cache=none", "disk vda: size= and cache= need file=PATH".to_owned()),
            ("vda,file=/a,cache=x", "disk vda: cache: 'x' is neither writeback nor none".to_owned()),
            ("vda,file=/a,size=0", "disk vda: size: a disk cannot be empty".to_owned()),
            ("vda,file=/a,size=1000", "disk vda: size: 1000 is not a multiple of 512".to_owned()),
            (
                "vda,file=/a,size=1X",
                "disk vda: size: '1X' is not a size: bytes, or a whole number of K, M, G or T".to_owned(),
            ),
        ] {
            assert_eq!(Disk::parse(text), Err(cause), "{text}");
        }
    }

    #[test]
    fn all_disks_together_are_checked() {
        let many: Vec<Disk> = (0..33).map(|i| disk(&format!("vd{i}"))).collect();
        assert_eq!(check_disks(&many), Err("33 disks are more than 32".to_owned()));
        assert_eq!(check_disks(&[disk("a"), disk("b"), disk("a")]), Err("disk a is given twice".to_owned()));
        assert_eq!(
            check_disks(&[disk("a,file=/x"), disk("b,file=/x")]),
            Err("disks a and b have the same file /x".to_owned())
        );
        assert_eq!(check_disks(&[disk("a,file=/x"), disk("b,file=/y"), disk("c"), disk("d")]), Ok(()));
    }

    #[test]
    fn all_but_shared_read_only_external_and_empty_disks_move() {
        let disks = [
            disk("vda,file=/d/root.raw"),
            disk("vdb,external,shared"),
            disk("vdc,file=/d/tools.raw,ro"),
            disk("sr0"),
            disk("vdd,file=/d/s.raw,shared"),
        ];
        let none: [&str; 0] = [];
        assert_eq!(
            moving(&disks, &none).expect("vda moves"),
            [None, Some(Stays::External), Some(Stays::ReadOnly), Some(Stays::Empty), Some(Stays::Shared)]
        );
        assert_eq!(
            moving(&disks, &["vdd"]).expect("a shared disk can be chosen"),
            [Some(Stays::NotChosen), Some(Stays::External), Some(Stays::ReadOnly), Some(Stays::Empty), None]
        );
        for (chosen, cause) in [
            (vec!["vda", "vdx"], "there is no disk vdx"),
            (vec!["vda", "vda"], "disk vda is named twice"),
            (vec!["vdc"], "disk vdc cannot move: read-only"),
            (vec!["vdb"], "disk vdb cannot move: external"),
            (vec!["sr0"], "disk sr0 cannot move: no source"),
        ] {
            assert_eq!(moving(&disks, &chosen), Err(cause.to_owned()));
        }
        assert!(moving(&disks[1..], &none).expect("none moves").iter().all(Option::is_some));
    }

    #[test]
    fn sizes_are_bytes_or_powers_of_1024() {
        for (text, size) in [("0", 0), ("512", 512), ("1K", 1024), ("3m", 3 << 20), ("20G", 20 << 30), ("2t", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(size));
        }
        for text in ["", "K", "1KB", "1.5G", "-1", "+1", "1 G", "0x10", "é"] {
            let cause = format!("'{text}' is not a size: bytes, or a whole number of K, M, G or T");
            assert_eq!(parse_size(text), Err(cause));
        }
        for text in ["9223372036854775808", "99999999999999999999999", "8388608T"] {
            assert_eq!(parse_size(text), Err(format!("'{text}' is too large")));
        }
        assert_eq!(parse_size("9223372036854775807"), Ok(u64::MAX >> 1));
    }
}
