//! That the checks of a round see something: each is shown what it must never let pass.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::check;
use super::plan::{Fault, Plan};
use super::round::{load, set};
use super::site::{DISK, GUEST, SIZE};
use super::stage::Stage;
use crate::harness::scratch;
use crate::host::Watch;
use crate::images::disk_scratch;
use crate::writer::{Ledger, Writer};

/// A guest that has moved, from a to b, as in a round without a fault.
struct Moved {
    stage: Arc<Stage>,
    ledger: Ledger,
    _folders: [tempfile::TempDir; 2],
}

impl Moved {
    fn new(seed: u64) -> Self {
        let folders = [scratch(), disk_scratch()];
        let plan = Plan::drawn(seed, Fault::None);
        let (stage, ledger) = set(&plan, (folders[0].path(), folders[1].path())).expect("two hosts");
        stage.a.start().expect("started");
        stage.a.ask(&["claim"]).well();
        stage.b.start().expect("started");
        let writer = Writer::start(load(&plan), ledger, DISK, &[&stage.a.door(), &stage.b.door()]);
        writer.until_more(50);
        let overwrite: &[&str] = if stage.b.image.exists() { &["--overwrite"] } else { &[] };
        stage.a.ask(&[&["migrate", stage.b.address.as_str()], overwrite].concat()).well();
        writer.until_more(20);
        Self { ledger: writer.finish(), stage, _folders: folders }
    }
}

#[test]
fn what_a_round_must_not_let_pass_is_found() {
    let mut moved = Moved::new(1);
    let (a, b) = (&moved.stage.a, &moved.stage.b);
    check::settled(a, b, false).expect("b owns");
    check::whole(&moved.ledger, b).expect("every write is there");
    check::one_takes(b, &[a]).expect("one owner");
    check::leftovers(b, &b.who_owns(), false, false).expect("nothing");

    // The wrong host is said to own.
    check::one_takes(a, &[b]).expect_err("a does not own");

    // Somebody leaves a record that is none.
    let left = b.state.join("record.0123.1.tmp");
    fs::write(&left, "x").expect("written");
    check::leftovers(b, &b.who_owns(), false, false).expect_err("a temporary record");
    fs::remove_file(left).expect("removed");

    // One byte of the destination's disk is another.
    let image = File::options().read(true).write(true).open(&b.image).expect("an image");
    let (mut byte, at) = ([0], SIZE / 2 + 700);
    image.read_exact_at(&mut byte, at).expect("read");
    image.write_all_at(&[byte[0] ^ 1], at).expect("written");
    let found = check::whole(&moved.ledger, b).expect_err("tampered with");
    assert!(found.contains("1 of 131072 sectors are wrong"), "{found}");
    image.write_all_at(&byte, at).expect("written");
    check::whole(&moved.ledger, b).expect("as it was");

    // The guest was told of a write that never happened.
    moved.ledger.invent(7);
    check::whole(&moved.ledger, b).expect_err("never written");
}

#[test]
fn two_hosts_that_both_serve_are_found() {
    let folders = [scratch(), disk_scratch()];
    let plan = Plan::drawn(2, Fault::None);
    let (stage, _) = set(&plan, (folders[0].path(), folders[1].path())).expect("two hosts");
    let (a, b) = (&stage.a, &stage.b);
    drop(Ledger::format(&b.image, SIZE, 2, 10));
    for site in [a, b] {
        site.start().expect("started");
    }
    let watch = Watch::over([b, a].map(|site| (GUEST.to_owned(), site.control())));
    // Nobody may type this twice; it is what makes two owners.
    for site in [a, b] {
        site.ask(&["claim"]).well();
    }
    assert!(watch.sees_two_owners());
    let found = check::settled(a, b, false).expect_err("two owners");
    assert!(found.starts_with("two owners"), "{found}");
    let found = check::one_takes(a, &[b]).expect_err("two doors");
    assert_eq!(found, "a and b both take writes");
}
