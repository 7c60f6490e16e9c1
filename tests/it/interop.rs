//! `blockferry export` against the clients of the field, each doing what it is used for, over Unix sockets and TCP, on
//! files through and past the page cache and on a block device.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::exported::Exported;
use crate::harness::{output, output_within, peer};
use crate::images::{Image, Kind, MIB, allocated, assert_same, disk_scratch, sparse_file};

const SIZE: u64 = 64 * MIB;
/// What a file system may take for itself, in bytes.
const SLACK: u64 = MIB;
/// Longest run of one peer that moves or checks a whole disk.
const LONG: Duration = Duration::from_secs(120);

/// What a successful program printed.
fn printed(what: &str, output: &Output) -> String {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\nstdout: {stdout}\nstderr: {stderr}", output.status);
    stdout.into_owned()
}

/// What a program printed that must fail.
fn complained(what: &str, output: &Output) -> String {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{what}: {}\nstdout: {stdout}\nstderr: {stderr}", output.status);
    format!("{stdout}{stderr}")
}

/// Runs a peer on `arguments`, at most [`LONG`]; it must succeed.
fn run(program: &Path, arguments: &[&str]) -> String {
    printed(
        &format!("{} {arguments:?}", program.display()),
        &output_within(LONG, Command::new(program).args(arguments)),
    )
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of [`SIZE`] bytes of holes, exported without a name.
fn default_export(options: &[&str]) -> (Image, Exported) {
    let image = Image::new(Kind::Cached, SIZE).unwrap();
    let exported = Exported::start([text(&image.path)].iter().chain(options));
    (image, exported)
}

// ---- nbdinfo -----------------------------------------------------------------------------------------------------

#[test]
fn nbdinfo_describes_every_export() {
    let Some(nbdinfo) = peer("nbdinfo") else { return };
    let (big, small) = (Image::new(Kind::Cached, SIZE).unwrap(), Image::new(Kind::Cached, MIB).unwrap());
    let exported = Exported::start([&big.arguments("vda")[0], &small.arguments("vdb")[0]]);
    for uri in [exported.unix("vda"), exported.tcp("vda")] {
        let json = run(&nbdinfo, &["--json", &uri]);
        for line in [
            r#""protocol": "newstyle-fixed","#,
            r#""structured": true,"#,
            r#""export-name": "vda","#,
            r#""base:allocation""#,
            r#""is_rotational": false,"#,
            r#""is_read_only": false,"#,
            r#""can_cache": true,"#,
            r#""can_df": true,"#,
            r#""can_fast_zero": true,"#,
            r#""can_flush": true,"#,
            r#""can_fua": true,"#,
            r#""can_multi_conn": true,"#,
            r#""can_trim": true,"#,
            r#""can_zero": true,"#,
            r#""block_size_minimum": 1,"#,
            r#""block_size_preferred": 4096,"#,
            r#""block_size_maximum": 33554432,"#,
            r#""export-size": 67108864,"#,
        ] {
            assert!(json.contains(line), "{line} is missing in {json}");
        }
        assert_eq!(run(&nbdinfo, &["--size", &uri]), "67108864\n");
        for can in "cache connect df fast-zero flush fua multi-conn read trim write zero structured-reply".split(' ') {
            run(&nbdinfo, &["--can", can, &uri]);
        }
        let no = output(Command::new(&nbdinfo).args(["--is", "read-only", &uri]));
        assert_eq!(no.status.code(), Some(2), "{no:?}");
        let no = output(Command::new(&nbdinfo).args(["--can", "tls", &uri]));
        assert_eq!(no.status.code(), Some(2), "{no:?}");
    }
    for uri in [exported.unix(""), exported.tcp("")] {
        let list = run(&nbdinfo, &["--list", &uri]);
        let (vda, vdb) = (list.find("export=\"vda\":").unwrap(), list.find("export=\"vdb\":").unwrap());
        assert!(vda < vdb && list[vda..vdb].contains("export-size: 67108864 (64M)\n"), "{list}");
        assert!(list[vdb..].contains("export-size: 1048576 (1M)\n"), "{list}");
        assert_eq!(list.matches("export=").count(), 2, "{list}");
        let json = run(&nbdinfo, &["--list", "--json", &uri]);
        assert!(json.contains(r#""export-name": "vda""#) && json.contains(r#""export-name": "vdb""#), "{json}");
        // Of several exports none is the default one.
        let said = complained("nbdinfo of no name", &output(Command::new(&nbdinfo).args(["--size", &uri])));
        assert!(said.contains("No such file or directory"), "{said}");
    }
    let said = complained("nbdinfo of a wrong name", &output(Command::new(&nbdinfo).arg(exported.unix("vdc"))));
    assert!(said.contains("No such file or directory"), "{said}");
}

#[test]
fn nbdinfo_maps_what_is_data_and_what_is_hole() {
    let Some(nbdinfo) = peer("nbdinfo") else { return };
    for image in Image::each(SIZE) {
        let file = std::fs::OpenOptions::new().write(true).open(&image.path).unwrap();
        for offset in [0, 8 * MIB, SIZE - MIB] {
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 1 << 20], offset).unwrap();
        }
        file.sync_all().unwrap();
        let exported = Exported::start(image.arguments("vda"));
        let map = run(&nbdinfo, &["--map", &exported.unix("vda")]);
        let rows = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        let expected: &[&str] = if image.has_holes() {
            &[
                "0 1048576 0 data",
                "1048576 7340032 3 hole,zero",
                "8388608 1048576 0 data",
                "9437184 56623104 3 hole,zero",
                "66060288 1048576 0 data",
            ]
        } else {
            &["0 67108864 0 data"]
        };
        assert_eq!(rows.collect::<Vec<_>>(), expected, "{:?}", image.kind());
        let totals = run(&nbdinfo, &["--map", "--totals", "--json", &exported.tcp("vda")]);
        let data = if image.has_holes() { 3 * MIB } else { SIZE };
        assert!(totals.contains(&format!("\"size\": {data}")), "{:?}: {totals}", image.kind());
    }
}

#[test]
fn nbdinfo_finds_the_default_export_and_its_read_only_sister() {
    let Some(nbdinfo) = peer("nbdinfo") else { return };
    let (_image, exported) = default_export(&["--read-only"]);
    for uri in [exported.unix(""), exported.tcp("")] {
        run(&nbdinfo, &["--is", "read-only", &uri]);
        let json = run(&nbdinfo, &["--json", &uri]);
        for line in [r#""is_read_only": true,"#, r#""can_trim": false,"#, r#""can_zero": false,"#] {
            assert!(json.contains(line), "{line} is missing in {json}");
        }
        assert!(json.contains(r#""can_fua": false,"#) && json.contains(r#""can_flush": true,"#), "{json}");
    }
}

// ---- nbdsh -------------------------------------------------------------------------------------------------------

/// Runs a script of `tests/it/nbdsh` with these variables; its last line says that it came to its end.
fn nbdsh(script: &str, variables: &[(&str, &str)]) -> Option<()> {
    let program = peer("nbdsh")?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/nbdsh").join(script).with_extension("py");
    let mut command = Command::new(program);
    // Its module belongs to the system's Python, not to another that may stand before it.
    command.env("PATH", "/usr/bin:/bin").env("SCRIPT", &file).envs(variables.iter().copied());
    let start = "import os, sys, traceback\n\
                 try:\n  exec(compile(open(os.environ['SCRIPT']).read(), os.environ['SCRIPT'], 'exec'))\n\
                 except BaseException:\n  traceback.print_exc()\n  sys.exit(1)\n";
    let done = output_within(LONG, command.args(["-n", "-c", start]));
    assert_eq!(printed(&format!("{script} {variables:?}"), &done), format!("{script}: ok\n"));
    Some(())
}

#[test]
fn nbdsh_sends_every_command() {
    for image in Image::each(SIZE) {
        let exported = Exported::start(image.arguments("vda"));
        for (structured, uri) in [("1", exported.unix("vda")), ("0", exported.tcp("vda"))] {
            let sparse = if image.has_holes() { "1" } else { "0" };
            let file = text(&image.path);
            let variables = [("URI", uri.as_str()), ("STRUCTURED", structured), ("SPARSE", sparse), ("FILE", file)];
            if nbdsh("commands", &variables).is_none() {
                return;
            }
        }
        exported.wait_until_alone();
    }
}

#[test]
fn nbdsh_sends_what_must_be_refused() {
    for (options, writable) in [(&[][..], "1"), (&["--read-only"], "0"), (&["--cache", "none"], "1")] {
        let (image, exported) = default_export(options);
        for structured in ["1", "0"] {
            let uri = exported.unix("");
            if nbdsh("refusals", &[("URI", &uri), ("STRUCTURED", structured), ("WRITABLE", writable)]).is_none() {
                return;
            }
        }
        assert!(allocated(&image.path) <= SLACK, "nothing of it was done");
    }
}

#[test]
fn nbdsh_haggles_about_options() {
    let (big, small) = (Image::new(Kind::Cached, SIZE).unwrap(), Image::new(Kind::Cached, MIB).unwrap());
    let exported = Exported::start([&big.arguments("vda")[0], &small.arguments("vdb")[0]]);
    for uri in [exported.unix(""), exported.tcp("")] {
        if nbdsh("options", &[("URI", &uri)]).is_none() {
            return;
        }
    }
}

// ---- nbdcopy -----------------------------------------------------------------------------------------------------

#[test]
fn nbdcopy_copies_there_and_back_and_holes_stay_holes() {
    let Some(nbdcopy) = peer("nbdcopy") else { return };
    let folder = disk_scratch();
    let (source, back) = (folder.path().join("source.raw"), folder.path().join("back.raw"));
    for (seed, image) in Image::each(SIZE).enumerate() {
        sparse_file(&source, SIZE, seed as u64);
        let exported = Exported::start(image.arguments("vda"));
        for (uri, connections) in [(exported.unix("vda"), "1"), (exported.tcp("vda"), "8")] {
            // Everything is something else before.
            let filled = format!("--connections={connections}");
            std::fs::write(&back, vec![0xaa; usize::try_from(SIZE).unwrap()]).unwrap();
            run(&nbdcopy, &["--flush", &filled, text(&back), &uri]);
            run(&nbdcopy, &["--flush", &filled, text(&source), &uri]);
            assert_same(&source, &image.path, SIZE);
            let (there, here) = (allocated(&image.path), allocated(&source));
            assert!(!image.has_holes() || there <= here + SLACK, "{:?}: {there} of {here}", image.kind());

            std::fs::remove_file(&back).unwrap();
            run(&nbdcopy, &["--flush", &filled, &uri, text(&back)]);
            assert_same(&source, &back, SIZE);
            assert!(allocated(&back) <= here + SLACK, "{:?}: {} of {here}", image.kind(), allocated(&back));
        }
        let simple = run(
            &nbdcopy,
            &["--synchronous", "--no-extents", "--request-size=33554432", &exported.unix("vda"), "null:"],
        );
        assert_eq!(simple, "");
        exported.wait_until_alone();
    }
}

#[test]
fn nbdcopy_copies_between_two_exports() {
    let Some(nbdcopy) = peer("nbdcopy") else { return };
    let (from, to) = (Image::new(Kind::Cached, SIZE).unwrap(), Image::new(Kind::Cached, SIZE).unwrap());
    sparse_file(&from.path, SIZE, 7);
    let exported = Exported::start([&from.arguments("vda")[0], &to.arguments("vdb")[0]]);
    run(&nbdcopy, &["--flush", "--destination-is-zero", &exported.unix("vda"), &exported.tcp("vdb")]);
    assert_same(&from.path, &to.path, SIZE);
    assert!(allocated(&to.path) <= allocated(&from.path) + SLACK);
}

#[test]
fn nbdcopy_writes_to_a_read_only_export() {
    let Some(nbdcopy) = peer("nbdcopy") else { return };
    let (image, exported) = default_export(&["--read-only"]);
    let folder = disk_scratch();
    let source = folder.path().join("source.raw");
    sparse_file(&source, SIZE, 8);
    let refused = output(Command::new(&nbdcopy).args([text(&source), &exported.unix("")]));
    let said = complained("nbdcopy", &refused);
    assert!(said.contains("read-only") || said.contains("read only"), "{said}");
    assert_eq!(allocated(&image.path), 0);
}

// ---- QEMU --------------------------------------------------------------------------------------------------------

#[test]
fn qemu_img_converts_compares_and_maps() {
    let Some(qemu_img) = peer("qemu-img") else { return };
    let folder = disk_scratch();
    let file = |name: &str| folder.path().join(name);
    let (source, raw, qcow2) = (file("source.raw"), file("back.raw"), file("back.qcow2"));
    sparse_file(&source, SIZE, 9);
    let here = allocated(&source);
    for image in Image::each(SIZE) {
        let exported = Exported::start(image.arguments("vda"));
        for uri in [&exported.unix("vda"), &exported.tcp("vda")] {
            let info = run(&qemu_img, &["info", "--output=json", uri]);
            assert!(info.contains(r#""virtual-size": 67108864"#) && info.contains(r#""format": "raw""#), "{info}");
            run(&qemu_img, &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), uri]);
            assert_same(&source, &image.path, SIZE);
            let there = allocated(&image.path);
            assert!(!image.has_holes() || there <= here + SLACK, "{:?}: {there} of {here}", image.kind());
            assert_eq!(
                run(&qemu_img, &["compare", "-f", "raw", "-F", "raw", text(&source), uri]),
                "Images are identical.\n"
            );
            run(&qemu_img, &["convert", "-f", "raw", "-O", "raw", uri, text(&raw)]);
            assert_same(&source, &raw, SIZE);
            assert!(allocated(&raw) <= here + SLACK);
            run(&qemu_img, &["convert", "-m", "16", "-W", "-f", "raw", "-O", "qcow2", uri, text(&qcow2)]);
            assert_eq!(
                run(&qemu_img, &["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), uri]),
                "Images are identical.\n"
            );
            let map = run(&qemu_img, &["map", "--output=json", uri]);
            let holes = if image.has_holes() { 16 } else { 0 };
            assert_eq!(map.matches(r#""zero": true, "data": false"#).count(), holes, "{map}");
        }
        let uri = exported.unix("vda");
        run_io(&uri, &["write -P 0x5a 33M 4k", "flush"]);
        let different =
            output(Command::new(&qemu_img).args(["compare", "-f", "raw", "-F", "raw", text(&source), &uri]));
        assert!(complained("compare", &different).contains("offset 34603008"), "{different:?}");
    }
}

/// Runs these commands of qemu-io, if there is one; every pattern must be found.
fn run_io(uri: &str, commands: &[&str]) {
    let Some(qemu_io) = peer("qemu-io") else { return };
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(uri);
    let said = run(&qemu_io, &arguments);
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn qemu_io_finds_its_patterns() {
    for image in Image::each(SIZE) {
        let exported = Exported::start(image.arguments("vda"));
        let commands = [
            "aio_write -P 0x11 0 1M",
            "aio_write -P 0x22 1M 3M",
            "aio_write -P 0x33 4M 512",
            "aio_write -f -P 0x44 8M 32M",
            "aio_flush",
            "aio_read -P 0x11 0 1M",
            "aio_read -P 0x22 1M 3M",
            "aio_read -P 0x33 4M 512",
            "aio_read -P 0x44 8M 32M",
            "aio_flush",
            "write -z 512k 64k",
            "write -z -u 1M 1M",
            "read -P 0x11 0 512k",
            "read -P 0 512k 64k",
            "read -P 0x11 576k 448k",
            "read -P 0 1M 1M",
            "read -P 0x22 2M 2M",
            "discard 8M 16M",
            "read -P 0x44 24M 16M",
        ];
        let more = ["write -f -P 0x66 67108352 512", "read -P 0x66 67108352 512", "writev -P 7 9k 512 1k 2k", "flush"];
        for uri in [exported.unix("vda"), exported.tcp("vda")] {
            run_io(&uri, &commands);
            run_io(&uri, &more);
            // Another process, hence another connection.
            run_io(&uri, &["read -P 7 9k 3584", "read -P 0x66 67108352 512"]);
        }
    }
}

#[test]
fn qemu_io_writes_to_a_read_only_export() {
    let Some(qemu_io) = peer("qemu-io") else { return };
    let (image, exported) = default_export(&["--read-only"]);
    let refused = output(Command::new(&qemu_io).args(["-f", "raw", "-c", "write 0 512", &exported.unix("")]));
    let said = complained("qemu-io", &refused);
    assert!(said.contains("Permission denied") || said.contains("read-only"), "{said}");
    run(&qemu_io, &["-r", "-f", "raw", "-c", "read -P 0 0 32M", &exported.unix("")]);
    assert_eq!(allocated(&image.path), 0);
}

// ---- fio ---------------------------------------------------------------------------------------------------------

#[test]
fn fio_verifies_what_several_jobs_write() {
    let Some(fio) = peer("fio") else { return };
    if !run(&fio, &["--enghelp"]).contains("nbd") {
        eprintln!("SKIP: this fio has no NBD engine");
        return;
    }
    let folder = disk_scratch();
    for image in Image::each(SIZE) {
        let exported = Exported::start(image.arguments("vda"));
        let sizes = ["--bs=4k", "--bsrange=512-2m"];
        for (uri, size) in [exported.unix("vda"), exported.tcp("vda")].iter().zip(sizes) {
            let mut command = Command::new(&fio);
            command.current_dir(folder.path()).args([
                "--name=job",
                "--ioengine=nbd",
                "--rw=randrw",
                "--size=16m",
                size,
            ]);
            command.arg(format!("--uri={uri}")).args(["--offset_increment=16m", "--numjobs=4", "--iodepth=32"]);
            command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64", "--minimal"]);
            let what = format!("fio {size} {:?}", image.kind());
            let terse = printed(&what, &output_within(LONG, &mut command));
            let jobs: Vec<&str> = terse.lines().filter(|line| line.starts_with("3;")).collect();
            // The fifth field is the job's error.
            assert_eq!(jobs.len(), 4, "{terse}");
            assert!(jobs.iter().all(|job| job.split(';').nth(4) == Some("0")), "{terse}");
        }
        exported.wait_until_alone();
    }
}

// ---- nbd-client --------------------------------------------------------------------------------------------------

#[test]
fn nbd_client_lists() {
    let Some(nbd_client) = peer("nbd-client") else { return };
    let (one, two) = (Image::new(Kind::Cached, MIB).unwrap(), Image::new(Kind::Cached, MIB).unwrap());
    let exported = Exported::start([&one.arguments("vda")[0], &two.arguments("vdb")[0]]);
    let port = exported.port().to_string();
    assert_eq!(run(&nbd_client, &["-l", "127.0.0.1", &port]), "Negotiation: ..\nvda\nvdb\n");
    assert_eq!(run(&nbd_client, &["-unix", text(&exported.socket()), "-l"]), "Negotiation: ..\nvda\nvdb\n");
    exported.wait_until_alone();
}
