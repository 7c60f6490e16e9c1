//! A guest's disks as a libvirt domain XML describes them, and libvirt's rule for which of them move.
//!
//! Reads what `virsh dumpxml` prints, or the file in which libvirt keeps a running domain's state. Only the `disk`
//! elements of the domain's `devices` are looked at, and of each only its own children: backing stores and mirrors have
//! sources too. Names and meanings are those of libvirt's
//! [domain format](https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms).
//!
//! A disk moves unless it is shareable, read-only (a CD-ROM always is) or without a source. One that would move by that
//! rule and cannot be served from here, a network source or an image format, is an error: to leave it out in silence
//! would lose it.

use std::path::PathBuf;

use roxmltree::{Document, Node, ParsingOptions};

use super::{Disk, Source, check_disk_name};
use crate::disk::Cache;
use crate::limits::DOMAIN_XML_NODES_MAX;

/// Reads the disks of a domain, in its order.
///
/// # Errors
/// The cause, in one line: not a domain, or a disk that cannot be handled, by its name.
pub fn disks(text: &str) -> Result<Vec<Disk>, String> {
    let bounds = ParsingOptions { allow_dtd: false, nodes_limit: DOMAIN_XML_NODES_MAX };
    let document = Document::parse_with_options(text, bounds).map_err(|error| format!("not XML: {error}"))?;
    let root = document.root_element();
    let domain = match root.tag_name().name() {
        "domain" => Some(root),
        // As libvirt keeps it while the domain runs.
        "domstatus" => child(root, "domain"),
        _ => None,
    };
    let domain = domain.ok_or_else(|| format!("<{}> is not a libvirt domain", root.tag_name().name()))?;
    let devices = child(domain, "devices").ok_or("the domain has no devices")?;
    let disks = devices.children().filter(|node| node.has_tag_name("disk")).map(disk).collect::<Result<Vec<_>, _>>()?;
    if disks.is_empty() { Err("the domain has no disk".to_owned()) } else { Ok(disks) }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn disk(node: Node<'_, '_>) -> Result<Disk, String> {
    let name = child(node, "target").and_then(|target| target.attribute("dev")).ok_or("a disk has no target dev=")?;
    check_disk_name(name)?;
    let fault = |cause: String| format!("disk {name}: {cause}");
    // libvirt itself makes every CD-ROM read-only.
    let read_only = child(node, "readonly").is_some() || node.attribute("device") == Some("cdrom");
    let shared = child(node, "shareable").is_some();
    let driver = child(node, "driver");
    let cache = match driver.and_then(|driver| driver.attribute("cache")) {
        Some("none" | "directsync") => Cache::None,
        _ => Cache::Writeback,
    };
    let source = match place(node).map_err(fault)? {
        Place::Nowhere => Source::Empty,
        Place::Here(path) => match driver.and_then(|driver| driver.attribute("type")) {
            None | Some("raw") => Source::File { path, size: None },
            Some(_) if read_only || shared => Source::External,
            Some(format) => {
                return Err(fault(format!("its format is {format}: only raw images are served, and it would move")));
            }
        },
        Place::Beyond(_) if read_only || shared => Source::External,
        Place::Beyond(what) => {
            return Err(fault(format!(
                "its source is {what}, which is not served from here, and it would move (<shareable/> says that both \
                 hosts reach it)"
            )));
        }
    };
    if child(node, "transient").is_some() && !matches!(source, Source::Empty) {
        return Err(fault("it is transient: what the guest writes there belongs to this host's process".to_owned()));
    }
    Ok(Disk { name: name.to_owned(), source, read_only, shared, cache })
}

/// Where a disk's bytes are.
enum Place {
    /// No medium, no source.
    Nowhere,
    /// A file or a block device of this host.
    Here(PathBuf),
    /// Something that only the VMM opens, in words.
    Beyond(String),
}

fn place(node: Node<'_, '_>) -> Result<Place, String> {
    let source = child(node, "source");
    let attribute = |name: &str| source.and_then(|source| source.attribute(name)).filter(|value| !value.is_empty());
    let path = |value: Option<&str>| value.map_or(Place::Nowhere, |path| Place::Here(PathBuf::from(path)));
    Ok(match node.attribute("type").unwrap_or("file") {
        "file" => path(attribute("file")),
        "block" => path(attribute("dev")),
        "network" => match (attribute("protocol"), attribute("name")) {
            (None, _) => Place::Nowhere,
            (Some(protocol), None) => Place::Beyond(format!("network ({protocol})")),
            (Some(protocol), Some(name)) => Place::Beyond(format!("network ({protocol} {name})")),
        },
        "volume" => match (attribute("pool"), attribute("volume")) {
            (Some(pool), Some(volume)) => Place::Beyond(format!("volume {volume} of pool {pool}")),
            _ => Place::Nowhere,
        },
        "dir" if attribute("dir").is_none() => Place::Nowhere,
        other @ ("dir" | "nvme" | "vhostuser" | "vhostvdpa") => Place::Beyond(format!("of type {other}")),
        other => return Err(format!("its type '{other}' is not known")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::moving;

    fn domain(disks: &str) -> String {
        format!("<domain type='kvm'><name>g1</name><devices><emulator>/q</emulator>{disks}</devices></domain>")
    }

    fn one(disk: &str) -> Result<Disk, String> {
        disks(&domain(disk)).map(|mut disks| disks.remove(0))
    }

    /// One disk of each kind that libvirt's format has, and what becomes of it: `moves`, why it stays, or the error.
    #[test]
    fn every_kind_of_disk_moves_stays_or_is_refused() {
        let target = "<target dev='vda' bus='virtio'/>";
        let raw = "<driver name='qemu' type='raw'/>";
        let file = "<source file='/d/a.raw'/>";
        let rbd = "<source protocol='rbd' name='pool/a'><host name='mon' port='6789'/></source>";
        let beyond = |what: &str| {
            format!(
                "disk vda: its source is {what}, which is not served from here, and it would move (<shareable/> says \
                 that both hosts reach it)"
            )
        };
        let cases: &[(&str, String, &str)] = &[
            ("type='file' device='disk'", format!("{raw}{file}"), "moves"),
            ("type='file'", file.to_owned(), "moves"),
            ("", format!("{raw}{file}"), "moves"),
            ("type='block' device='disk'", format!("{raw}<source dev='/dev/vg/a'/>"), "moves"),
            ("type='block' device='lun'", format!("{raw}<source dev='/dev/sda'/>"), "moves"),
            ("type='file' device='floppy'", format!("{raw}{file}"), "moves"),
            ("type='file' device='disk'", format!("{raw}{file}<shareable/>"), "shared"),
            ("type='file' device='disk'", format!("{raw}{file}<readonly/>"), "read-only"),
            ("type='file' device='disk'", format!("{raw}{file}<readonly/><shareable/>"), "read-only"),
            ("type='file' device='cdrom'", format!("{raw}{file}"), "read-only"),
            ("type='file' device='cdrom'", raw.to_owned(), "no source"),
            ("type='file' device='cdrom'", format!("{raw}<source startupPolicy='optional'/>"), "no source"),
            ("type='block' device='cdrom'", format!("{raw}<source dev=''/>"), "no source"),
            ("type='file' device='floppy'", String::new(), "no source"),
            ("type='file' device='floppy'", "<transient/>".to_owned(), "no source"),
            ("type='network' device='disk'", raw.to_owned(), "no source"),
            ("type='network' device='disk'", format!("{raw}{rbd}<shareable/>"), "external"),
            ("type='network' device='cdrom'", format!("{raw}<source protocol='https' name='i.iso'/>"), "external"),
            ("type='volume' device='disk'", format!("{raw}<source pool='p' volume='v'/><readonly/>"), "external"),
            ("type='volume' device='disk'", format!("{raw}<source pool='p'/>"), "no source"),
            ("type='file' device='disk'", format!("<driver type='qcow2'/>{file}<readonly/>"), "external"),
            (
                "type='file' device='disk'",
                format!("<driver type='qcow2'/>{file}"),
                "disk vda: its format is qcow2: only raw images are served, and it would move",
            ),
            ("type='network' device='disk'", format!("{raw}{rbd}"), &beyond("network (rbd pool/a)")),
            ("type='network'", "<source protocol='nbd'><host name='b'/></source>".to_owned(), &beyond("network (nbd)")),
            ("type='volume'", "<source pool='p' volume='v'/>".to_owned(), &beyond("volume v of pool p")),
            ("type='nvme' device='disk'", "<source type='pci' namespace='1'/>".to_owned(), &beyond("of type nvme")),
            ("type='dir' device='floppy'", "<source dir='/d'/>".to_owned(), &beyond("of type dir")),
            (
                "type='file' device='disk'",
                format!("{raw}{file}<transient/>"),
                "disk vda: it is transient: what the guest writes there belongs to this host's process",
            ),
            ("type='tape'", file.to_owned(), "disk vda: its type 'tape' is not known"),
        ];
        for (attributes, inside, expected) in cases {
            let disk = format!("<disk {attributes}>{inside}{target}</disk>");
            let is = match one(&disk) {
                Ok(disk) => disk.stays().map_or("moves".to_owned(), |stays| stays.to_string()),
                Err(cause) => cause,
            };
            assert_eq!(is, *expected, "{disk}");
        }
    }

    #[test]
    fn only_the_disks_own_source_counts() {
        let disk = "<disk type='file' device='cdrom'><backingStore type='file'><source file='/base'/></backingStore>\
                    <mirror type='file'><source file='/mirror'/></mirror><target dev='hda'/></disk>";
        assert_eq!(one(disk).map(|disk| disk.source), Ok(Source::Empty));
    }

    #[test]
    fn paths_and_cache_modes_are_taken_over() {
        let disk = |cache: &str| {
            one(&format!(
                "<disk><driver type='raw' cache='{cache}'/><source file='/d/a &amp; b.raw'/><target dev='sda'/></disk>"
            ))
        };
        for (cache, expected) in [
            ("none", Cache::None),
            ("directsync", Cache::None),
            ("writeback", Cache::Writeback),
            ("unsafe", Cache::Writeback),
        ] {
            let disk = disk(cache).expect("a disk");
            assert_eq!(disk.cache, expected, "{cache}");
            assert_eq!(disk.source, Source::File { path: PathBuf::from("/d/a & b.raw"), size: None });
        }
    }

    #[test]
    fn a_whole_domain_moves_by_libvirts_rule() {
        let text = format!(
            "<?xml version='1.0'?><!-- c --><domstatus state='running'>{}</domstatus>",
            domain(
                "<disk type='file' device='disk'><source file='/d/root.raw'/><target dev='vda'/></disk>\
                 <disk type='file' device='disk'><source file='/s/data.raw'/><target dev='vdb'/><shareable/></disk>\
                 <disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>\
                 <interface type='user'/>"
            )
        );
        let disks = disks(&text).expect("a domain");
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["vda", "vdb", "sda"]);
        let none: [&str; 0] = [];
        let stays: Vec<_> = moving(&disks, &none).expect("one moves").iter().map(Option::is_some).collect();
        assert_eq!(stays, [false, true, true]);
    }

    #[test]
    fn what_is_no_domain_is_refused_in_one_line() {
        for (text, expected) in [
            ("", "not XML: "),
            ("<domain>", "not XML: "),
            ("<network/>", "<network> is not a libvirt domain"),
            ("<domstatus/>", "<domstatus> is not a libvirt domain"),
            ("<domain/>", "the domain has no devices"),
            ("<domain><devices/></domain>", "the domain has no disk"),
            ("<domain><devices><disk type='file'/></devices></domain>", "a disk has no target dev="),
            ("<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>", "not XML: "),
        ] {
            let cause = disks(text).expect_err(text);
            assert!(cause.starts_with(expected) && !cause.contains('\n'), "{text}: {cause}");
        }
        let cause = one("<disk><source file='/a'/><target dev='a,b'/></disk>").expect_err("a name");
        assert!(cause.contains("'a,b' is not a disk's name"), "{cause}");
        let nodes = "<a/>".repeat(usize::try_from(DOMAIN_XML_NODES_MAX).expect("small"));
        assert!(disks(&domain(&nodes)).expect_err("too many").starts_with("not XML: "));
    }
}
