//! Everything that reads bytes from somebody else, fed with bytes that nobody should have sent.
//!
//! A *target* ([`targets`]) is a parser, or a whole end of a conversation, as a function of the bytes that come in; it
//! checks what must be true whatever they are. Its *corpus* is what well-behaved peers send, made by the product's own
//! encoders ([`seeds`]), and what was found before, in `tests/fuzz/corpus/TARGET/`. Each input is one of the corpus,
//! changed in a few places ([`change`]). The numbers come from a seed, so that a run can be repeated; `xtask test` runs
//! a fixed number of inputs from a fixed seed, `cargo xtask fuzz --seconds N` goes on from there with another one.
//!
//! An input that makes a target panic, or keeps it busy for longer than [`PATIENCE`], is written to
//! `target/fuzz/TARGET-NUMBER`. Once it is understood it belongs into the corpus.

#![allow(clippy::unwrap_used)]

#[path = "../common/chance.rs"]
mod chance;
mod change;
mod seeds;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chance::Chance;

/// The longest that one input may take. Hanging up and closed sockets end every wait, so none of it is waiting.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often somebody looks whether it took longer.
const LOOK: Duration = Duration::from_millis(200);
/// What the process may need, whatever is sent, in bytes: all targets side by side.
const MEMORY_MAX: u64 = 256 << 20;
/// Longest input that is made.
const INPUT_MAX: usize = 64 << 10;

/// Something that reads a peer's bytes.
struct Target {
    name: &'static str,
    /// Takes one input; panics when something is not as it must be.
    run: fn(&[u8]),
    /// What well-behaved peers send.
    seeds: fn() -> Vec<Vec<u8>>,
    /// Inputs in a run of `cargo xtask test`.
    inputs: u64,
}

/// What `cargo xtask fuzz` asks for: `seconds=N,seed=N`.
struct Asked {
    seconds: u64,
    seed: u64,
}

fn asked() -> Option<Asked> {
    let words = std::env::var("BLOCKFERRY_FUZZ").ok()?;
    let mut asked = Asked { seconds: 10, seed: 1 };
    for word in words.split(',') {
        match word.split_once('=') {
            Some(("seconds", number)) => asked.seconds = number.parse().expect("seconds=N"),
            Some(("seed", number)) => asked.seed = number.parse().expect("seed=N"),
            _ => panic!("BLOCKFERRY_FUZZ: {word}"),
        }
    }
    Some(asked)
}

fn corpus_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target)
}

/// The seeds, and what was found before.
fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let mut corpus = (target.seeds)();
    if let Ok(found) = std::fs::read_dir(corpus_folder(target.name)) {
        let mut paths: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        corpus.extend(paths.iter().map(|path| std::fs::read(path).unwrap()));
    }
    assert!(!corpus.is_empty(), "{}: nothing to begin with", target.name);
    corpus
}

/// Keeps what a target is busy with, so that somebody else can say what it hangs at.
#[derive(Default)]
struct Busy(Mutex<(Option<Instant>, Vec<u8>)>);

impl Busy {
    fn with(&self, input: &[u8]) {
        let mut busy = self.0.lock().unwrap();
        busy.0 = Some(Instant::now());
        busy.1.clear();
        busy.1.extend_from_slice(input);
    }
}

/// Writes an input down for whoever looks into it.
fn keep(target: &str, input: &[u8]) -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    std::fs::create_dir_all(&folder).unwrap();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("{target}-{}-{number}", std::process::id()));
    std::fs::write(&path, input).unwrap();
    path
}

/// Feeds a target: first the corpus as it is, then as many changed inputs as were asked for.
fn feed(target: &'static Target) {
    let corpus = corpus(target);
    let asked = asked();
    let seed = asked.as_ref().map_or(1, |asked| asked.seed);
    let end = asked.map(|asked| Instant::now() + Duration::from_secs(asked.seconds));
    let busy = Arc::new(Busy::default());
    let watched = Arc::clone(&busy);
    // Ends with the sender.
    let (_fed, ended) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            let busy = watched.0.lock().unwrap();
            if busy.0.is_some_and(|since| since.elapsed() > PATIENCE) {
                eprintln!("fuzz: {}: hangs at {}", target.name, keep(target.name, &busy.1).display());
                std::process::exit(101);
            }
        }
    });
    let panics = targets::panics();
    let run = |input: &[u8]| {
        busy.with(input);
        let ended = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        if ended.is_err() || targets::panics() > panics {
            let kept = keep(target.name, input);
            panic!("fuzz: {}: input {} (seed {seed}) made it panic", target.name, kept.display());
        }
    };
    corpus.iter().for_each(|input| run(input));
    let mut chance = Chance::new(seed);
    let mut input = Vec::with_capacity(INPUT_MAX);
    let mut inputs = 0_u64;
    while end.map_or(inputs < target.inputs, |end| Instant::now() < end) {
        change::some(&corpus, &mut chance, INPUT_MAX, &mut input);
        run(&input);
        inputs += 1;
    }
    let resident = targets::peak_memory();
    assert!(resident < MEMORY_MAX, "{}: {resident} bytes resident", target.name);
    println!("fuzz: {}: {inputs} inputs from seed {seed}, {} in the corpus", target.name, corpus.len());
}

/// A test for each target, so that one can be asked for by its name.
macro_rules! fuzz {
    ($($name:ident: $inputs:expr;)*) => {$(
        #[test]
        fn $name() {
            static TARGET: Target = Target {
                name: stringify!($name),
                run: targets::$name,
                seeds: seeds::$name,
                inputs: $inputs,
            };
            feed(&TARGET);
        }
    )*};
}

fuzz! {
    address: 200_000;
    control_frame: 300_000;
    control_message: 500_000;
    control_stream: 50_000;
    disk_option: 300_000;
    domain_xml: 30_000;
    kernel_netlink: 1_000_000;
    nbd_client: 40_000;
    nbd_session: 40_000;
    nbd_wire: 1_000_000;
    phase_export_name: 300_000;
    phase_hello: 500_000;
    phase_message: 1_000_000;
}
