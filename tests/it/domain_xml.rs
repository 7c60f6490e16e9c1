//! A guest whose disks a libvirt domain XML names.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::harness::scratch;
use crate::host::{Host, blockferry, exactly_one_takes, run};
use crate::writer::Ledger;

const MIB: u64 = 1 << 20;

/// What `virsh dumpxml` prints for a guest with five drives whose files are in `folder`, cut to what matters.
fn domain(folder: &Path, host: &str) -> String {
    let drive = |device: &str, target: &str, file: Option<&str>, more: &str| {
        let source = file.map_or(String::new(), |file| format!("<source file='{}/{host}.{file}'/>", folder.display()));
        format!(
            "    <disk type='file' device='{device}'>\n      <driver name='qemu' type='raw' cache='none'/>\n      \
             {source}<target dev='{target}' bus='virtio'/>{more}\n    </disk>\n"
        )
    };
    let mut text = String::from("<domain type='kvm' id='7'>\n  <name>g1</name>\n  <devices>\n");
    for (device, target, file, more) in [
        ("disk", "vda", Some("root.raw"), "<boot order='1'/>"),
        ("disk", "vdb", Some("shared.raw"), "<shareable/>"),
        ("disk", "vdc", Some("tools.raw"), "<readonly/>"),
        ("cdrom", "sda", None, "<readonly/>"),
    ] {
        write!(text, "{}", drive(device, target, file, more)).expect("a string");
    }
    text.push_str(
        "    <disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='p/v'>\
         <host name='mon'/></source><target dev='vdd'/><shareable/></disk>\n  </devices>\n</domain>\n",
    );
    text
}

/// Starts a host whose disks are in its domain XML.
fn start(folder: &Path, host: &'static str) -> Host {
    for file in ["shared.raw", "tools.raw"] {
        fs::write(folder.join(format!("{host}.{file}")), vec![7; 1 << 20]).expect("a file");
    }
    let file = folder.join(format!("{host}.xml"));
    fs::write(&file, domain(folder, host)).expect("written");
    Host::start_with(folder, host, "g1", &["--domain-xml", file.to_str().expect("UTF-8")])
}

#[test]
fn only_the_disk_that_libvirt_would_copy_moves() {
    let folder = scratch();
    let folder = folder.path();
    let ledger = Ledger::format(&folder.join("a.root.raw"), 8 * MIB, 11, 50);
    let (a, b) = (start(folder, "a"), start(folder, "b"));
    a.ask(&["claim"]).well();
    let text = a.ask(&["status"]).well();
    for (disk, fate) in
        [("vda", "moves"), ("vdb", "shared"), ("vdc", "read-only"), ("sda", "no source"), ("vdd", "external")]
    {
        assert!(text.lines().any(|line| line.contains(disk) && line.contains(fate)), "{disk} {fate}:\n{text}");
    }
    a.migrate(&b.listen, &[]).well();
    ledger.verify_file(&folder.join("b.root.raw")).assert_whole();
    exactly_one_takes("vda", 0, &b, &a);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let folder = scratch();
    let file = folder.path().join("g1.xml");
    let path = file.to_str().expect("UTF-8");
    for (text, cause) in [
        (None, "No such file or directory"),
        (Some("<network/>"), "<network> is not a libvirt domain"),
        (
            Some(
                "<domain><devices><disk><driver type='qcow2'/><source file='/a'/><target dev='vda'/></disk>\
                 </devices></domain>",
            ),
            "disk vda: its format is qcow2: only raw images are served, and it would move",
        ),
        (
            Some(
                "<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vda'/></disk></devices></domain>",
            ),
            "disk vda is given twice",
        ),
    ] {
        if let Some(text) = text {
            fs::write(&file, text).expect("written");
        }
        let state = folder.path().join("state");
        let mut command = blockferry();
        command.args(["serve", "g1", "--domain-xml", path, "--state"]).arg(&state);
        run(&mut command, Duration::from_secs(10)).refused(1, &format!("blockferry: serve: {path}: {cause}"));
        assert!(!state.exists(), "nothing has changed");
    }
}
