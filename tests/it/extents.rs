//! Block status of foreign servers, through our client.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use blockferry::nbd::client::{Client, Extent, Questions, RequestError, Wants};
use blockferry::nbd::wire;

use crate::client::{nbdkit, open};
use crate::harness::{Program, peer, scratch};

const MIB: u64 = 1 << 20;

/// The extents of one context, neighbours with the same flags joined.
fn extents(client: &mut Client, context: usize, offset: u64, length: u64) -> Vec<(u64, u64, u64)> {
    let mut all: Vec<(u64, u64, u64)> = Vec::new();
    let mut at = vec![offset; client.info().contexts.len()];
    client
        .block_status(offset, length, &mut |extent: Extent| {
            assert_eq!(extent.offset, at[extent.context], "extents follow each other");
            at[extent.context] += extent.length;
            if extent.context == context {
                match all.last_mut() {
                    Some((_, length, flags)) if *flags == extent.flags => *length += extent.length,
                    _ => all.push((extent.offset, extent.length, extent.flags)),
                }
            }
        })
        .unwrap();
    let end = offset + length;
    assert!(at.iter().enumerate().all(|(place, &at)| client.info().contexts[place].is_none() || at == end), "{at:?}");
    all
}

fn run(program: &Path, arguments: &[&str], file: &Path, more: &[&str]) {
    let done = Command::new(program).args(arguments).arg(file).args(more).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
}

#[test]
fn qemu_nbd_tells_bitmaps_depth_and_allocation() {
    let (Some(img), Some(io), Some(nbd)) = (peer("qemu-img"), peer("qemu-io"), peer("qemu-nbd")) else { return };
    let folder = scratch();
    let (base, top, listener) = (folder.path().join("base"), folder.path().join("top"), folder.path().join("sock"));
    std::fs::write(&base, vec![7; 2 << 20]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&base).unwrap().set_len(8 * MIB).unwrap();
    let backing = format!("{}", base.display());
    run(&img, &["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "raw"], &top, &[]);
    run(&img, &["bitmap", "--add"], &top, &["b0"]);
    run(&io, &["-f", "qcow2", "-c", "write 1M 64k", "-c", "write -z 4M 1M"], &top, &[]);

    let mut command = Command::new(nbd);
    command.args(["--format=qcow2", "--read-only", "--persistent", "--shared=2", "--bitmap=b0", "--allocation-depth"]);
    let mut server = Program::start(command.arg("--socket").arg(&listener).arg(&top));
    let contexts = ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:other", "qemu:allocation-depth", wire::BASE_ALLOCATION];
    let wants = Wants { structured: true, extended: true, contexts: &contexts };
    let mut client = open(server.connect_unix(&listener), "", wants);
    let info = *client.info();
    assert_eq!(info.contexts.map(|agreed| agreed.is_some()), [true, false, true, true]);
    assert_eq!(info.base_allocation, Some(3));

    let dirty = extents(&mut client, 0, 0, 8 * MIB);
    let rest = MIB + (64 << 10);
    assert_eq!(
        dirty,
        [(0, MIB, 0), (MIB, 64 << 10, 1), (rest, 4 * MIB - rest, 0), (4 * MIB, MIB, 1), (5 * MIB, 3 * MIB, 0)]
    );
    assert_eq!(extents(&mut client, 1, 0, 8 * MIB), [], "nothing is known of a bitmap that is not there");
    // 1: in the image itself; 2 and beyond: further down.
    let depth = extents(&mut client, 2, 0, 5 * MIB);
    assert_eq!(depth[..3], [(0, MIB, 2), (MIB, 64 << 10, 1), (rest, 4 * MIB - rest, 2)], "{depth:?}");
    let allocation = extents(&mut client, 3, 0, 8 * MIB);
    assert_eq!(allocation[0], (0, 2 * MIB, 0), "{allocation:?}");
    assert!(allocation[1..].iter().all(|extent| extent.2 & u64::from(wire::STATE_ZERO) != 0), "{allocation:?}");
    // A range that begins and ends within extents.
    assert_eq!(extents(&mut client, 0, MIB + 512, 512), [(MIB + 512, 512, 1)]);
    client.disconnect();

    let mut client =
        open(server.connect_unix(&listener), "", Wants { structured: false, extended: false, contexts: &contexts });
    assert_eq!(client.info().contexts, [None; 4]);
    client.block_status(0, 8 * MIB, &mut |extent| panic!("{extent:?}")).unwrap();
    let mut told = Vec::new();
    client.allocation(0, 8 * MIB, &mut |length, flags| told.push((length, flags))).unwrap();
    assert_eq!(told, [(8 * MIB, 0)], "not known to be anything but data");
}

#[test]
fn qemu_storage_daemon_is_asked_for_its_exports_and_contexts() {
    let (Some(img), Some(daemon)) = (peer("qemu-img"), peer("qemu-storage-daemon")) else { return };
    let folder = scratch();
    let (image, listener) = (folder.path().join("disk"), folder.path().join("sock"));
    run(&img, &["create", "-q", "-f", "qcow2"], &image, &["8M"]);
    run(&img, &["bitmap", "--add"], &image, &["b0"]);
    let mut command = Command::new(daemon);
    command.arg("--blockdev").arg(format!("file,node-name=p,filename={}", image.display()));
    command.args(["--blockdev", "qcow2,node-name=f,file=p"]);
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", listener.display()));
    command.args(["--export", "nbd,id=e,node-name=f,name=disk,description=a disk,writable=on,bitmaps.0=b0"]);
    let mut server = Program::start(&mut command);
    let socket = server.connect_unix(&listener);
    let mut questions = Questions::begin(&socket).unwrap();
    let mut exports = Vec::new();
    assert!(questions.exports(&mut |name, text| exports.push((name.to_owned(), text.to_owned()))).unwrap());
    assert_eq!(exports, [("disk".to_owned(), "a disk".to_owned())]);
    let told = questions.describe("disk").unwrap().unwrap();
    assert_eq!((told.info.size, told.text.as_deref()), (8 * MIB, Some("a disk")));
    let mut contexts = |queries: &[&str]| {
        let mut all = Vec::new();
        assert!(questions.contexts("disk", queries, &mut |name| all.push(name.to_owned())).unwrap());
        all
    };
    assert_eq!(contexts(&[]), ["base:allocation", "qemu:dirty-bitmap:b0"]);
    assert_eq!(contexts(&["qemu:dirty-bitmap:", "qemu:allocation-depth"]), ["qemu:dirty-bitmap:b0"]);
    assert!(questions.describe("other").is_err());
}

#[test]
fn nbdkit_tells_less_than_asked_for() {
    let folder = scratch();
    // Never more than 64 KiB at once; every other 64 KiB is a hole.
    let script = r#"extents=n=$(( ($4 / 65536 + 1) * 65536 - $4 )); t=; [ $(( $4 / 65536 % 2 )) = 1 ] && t=hole,zero
        echo $4 $n $t"#;
    let options = ["eval", "get_size=echo 4M", "pread=head -c $3 /dev/zero", "can_extents=exit 0", script];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", Wants::READING);
    let told = extents(&mut client, 0, 1000, 4 * MIB - 1000);
    assert_eq!(told.len(), 64);
    assert_eq!(told[0], (1000, 65536 - 1000, 0));
    assert_eq!(told[63], (63 << 16, 65536, 3));
}

#[test]
fn nbdkit_keeps_its_minimum_block_in_block_status() {
    let folder = scratch();
    let options = [
        "--filter=blocksize-policy",
        "memory",
        "4M",
        "blocksize-minimum=64K",
        "blocksize-preferred=64K",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", Wants::READING);
    client.write_all(MIB, &[1; 65536]).unwrap();
    assert_eq!(
        extents(&mut client, 0, MIB - 100, 70_000),
        [(MIB - 100, 100, 3), (MIB, 65536, 0), (MIB + 65536, 4364, 3)]
    );
}

#[test]
fn nbdkit_fails_to_tell() {
    let folder = scratch();
    let options = ["--filter=error", "memory", "4M", "error-extents=EIO", "error-extents-rate=100%"];
    let Some((mut server, listener)) = nbdkit(folder.path(), &options) else { return };
    let mut client = open(server.connect_unix(&listener), "", Wants::READING);
    let error = client.allocation(0, 4 * MIB, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, RequestError::Server("BLOCK_STATUS", ref error) if error.errno == wire::EIO), "{error}");
    client.read_exact(0, &mut [0; 4096]).unwrap();
}
