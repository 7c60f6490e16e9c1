//! `cargo xtask build`: the executable that ships, static against musl, built in one of three ways and checked.
//!
//! 1. *installed*: the toolchain in use has a standard library for the target.
//! 2. *rustup*: `rustup target add` brings one. It needs the network, so it has a time limit, and what counts
//!    afterwards is whether the library is there, not the exit code.
//! 3. *debian*: Debian's own compiler, with Debian's sources of the standard library and Debian's musl. Smaller,
//!    because the standard library is built without its backtrace machinery.
//!
//! The ways are the same for a machine of another kind (`--target`); lld links there, so no C compiler for it is
//! needed.
//!
//! Only a product that passed [`check`] reaches its stable place, `target/static/TARGET/blockferry`. The trap that
//! the check is there for: a link through `musl-gcc` leaves an interpreter in the file, which then runs on the
//! machine that built it and on no other.

use crate::build_debian;
use crate::elf::{self, Elf, Kind};
use crate::target::Target;
use crate::util::{self, Captured, Error, Output, QUESTION, Result};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The executable's name.
const PRODUCT: &str = "blockferry";
/// How long a release build may take; the Debian way builds the standard library as well.
const BUILD: Duration = Duration::from_secs(600);
/// How long `rustup target add` may take: it often cannot reach its server.
const RUSTUP: Duration = Duration::from_secs(120);
/// How a static executable is come by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// The toolchain had a standard library.
    Installed,
    /// rustup brought one.
    Rustup,
    /// Debian's compiler built one.
    Debian,
}

impl Way {
    const ALL: [Self; 3] = [Self::Installed, Self::Rustup, Self::Debian];

    fn name(self) -> &'static str {
        match self {
            Self::Installed => "installed",
            Self::Rustup => "rustup",
            Self::Debian => "debian",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// `cargo xtask build [--target TARGET] [--way WAY]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let (target, way) = parse(arguments)?;
    build(target, way).map(drop)
}

/// Builds the executable in the first way that works, checks it, and returns its stable place: an absolute path. For
/// every task that runs what ships.
pub(crate) fn static_executable() -> Result<Built> {
    build(Target::X86_64, None)
}

/// Finds the first way that works here for a target and brings what it needs, without building the program: the error
/// says what is missing.
pub(crate) fn prepare(target: Target) -> Result<Way> {
    let way = choose(target)?;
    match way {
        Way::Debian => build_debian::cargo(target, &util::target_dir()?.join("debian")).map(drop)?,
        Way::Installed | Way::Rustup => toolchain_cargo(target).map(drop)?,
    }
    Ok(way)
}

/// Builds for a target in one way.
pub(crate) fn static_executable_in(target: Target, way: Way) -> Result<Built> {
    build(target, Some(way))
}

/// What was built.
#[derive(Debug)]
pub(crate) struct Built {
    /// Its stable place: an absolute path.
    pub(crate) place: PathBuf,
    /// Bytes of the file.
    pub(crate) size: u64,
    /// How it was come by: the size depends on it.
    pub(crate) way: Way,
}

/// The target and the way that the arguments ask for.
fn parse(arguments: &[String]) -> Result<(Target, Option<Way>)> {
    let (mut target, mut way) = (Target::X86_64, None);
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let (option, attached) = word.split_once('=').map_or((word.as_str(), None), |(a, b)| (a, Some(b.to_owned())));
        if option != "--target" && option != "--way" {
            return Err(Error::usage("build", word, "not known; try: cargo xtask help"));
        }
        let value = attached.or_else(|| words.next().cloned());
        let value = value.ok_or_else(|| Error::usage("build", option, "needs a value"))?;
        if option == "--way" {
            let known = Way::ALL.into_iter().find(|way| way.name() == value);
            way = Some(known.ok_or_else(|| Error::usage("build", &value, "the ways are installed, rustup, debian"))?);
        } else {
            let known = Target::ALL.into_iter().find(|target| target.name == value);
            let names = Target::ALL.map(|target| target.name).join(", ");
            target = known.ok_or_else(|| Error::usage("build", &value, format!("the targets are {names}")))?;
        }
    }
    Ok((target, way))
}

/// Builds in `way`, or in the first that works; checks; puts the product in its place and says so.
fn build(target: Target, way: Option<Way>) -> Result<Built> {
    let started = Instant::now();
    let target_dir = util::target_dir()?;
    let way = match way {
        Some(way) => way,
        None => choose(target)?,
    };
    let product = compile(target, way, PRODUCT, &target_dir)?;
    let facts = check(target, &product, &target_dir.join("xtask"))?;
    let (place, size) = install(&product, &target_dir.join("static").join(target.name))?;
    println!("xtask: build: {}: {size} bytes, way: {way}, {:.1} s", place.display(), started.elapsed().as_secs_f64());
    println!("xtask: build: {facts}");
    Ok(Built { place, size, way })
}

/// Builds a program of this workspace that runs inside of a test's machine, static like the product.
pub(crate) fn static_program(package: &str) -> Result<PathBuf> {
    let target = Target::X86_64;
    let product = compile(target, choose(target)?, package, &util::target_dir()?)?;
    let refused = |cause: &dyn fmt::Display| Error::new("build", product.display(), cause);
    let bytes = fs::read(&product).map_err(|error| refused(&error))?;
    let elf = elf::parse(&bytes).map_err(|cause| refused(&cause))?;
    judge(target, &elf).map_err(|cause| refused(&cause))?;
    Ok(product)
}

/// Compiles the one program of a package of this workspace; returns where it is.
fn compile(target: Target, way: Way, package: &str, target_dir: &Path) -> Result<PathBuf> {
    let built_in = match way {
        Way::Installed if !has_standard_library(target)? => {
            return Err(Error::new("build", target.name, "the toolchain has no standard library for it"));
        }
        Way::Rustup => {
            add_with_rustup(target)?;
            target_dir.to_owned()
        }
        Way::Installed => target_dir.to_owned(),
        Way::Debian => target_dir.join("debian"),
    };
    let mut cargo = match way {
        Way::Debian => build_debian::cargo(target, &built_in)?,
        Way::Installed | Way::Rustup => toolchain_cargo(target)?,
    };
    cargo.args(["build", "--release", "--locked", "--target", target.name, "--package", package, "--bin", package]);
    if way == Way::Debian {
        cargo.args(["-Zbuild-std=std,panic_abort", "-Zbuild-std-features="]);
    }
    let compiler = format!("CC_{}", target.name.replace('-', "_"));
    if target.is_native() && std::env::var_os(&compiler).is_none() {
        // Assembly needs nothing of the C library that it is for. Without a compiler blake3 does without assembly.
        cargo.env(compiler, "cc");
    }
    util::run("build", &mut cargo, BUILD, Output::Shown)?;
    Ok(built_in.join(target.name).join("release").join(package))
}

/// What every linker is told; see there. Cargo runs the compiler in the workspace's root, so there are no blanks.
pub(crate) const LINK: &str = "-Clink-arg=-Txtask/src/link.ld";

/// The cargo in use. For a machine of another kind it links with lld and the toolchain's own start files: `cc` of this
/// machine could not.
fn toolchain_cargo(target: Target) -> Result<Command> {
    let mut cargo = util::cargo()?;
    let mut flags = LINK.to_owned();
    if !target.is_native() {
        cargo.env(target.variable("LINKER"), build_debian::linker()?);
        flags.push_str(" -Clinker-flavor=ld.lld -Clink-self-contained=yes");
    }
    cargo.env(target.variable("RUSTFLAGS"), flags);
    Ok(cargo)
}

/// The first way that can work here. Once the compiler runs there is no second try: its errors are the user's.
fn choose(target: Target) -> Result<Way> {
    if has_standard_library(target)? {
        return Ok(Way::Installed);
    }
    match add_with_rustup(target) {
        Ok(()) => return Ok(Way::Rustup),
        Err(error) => println!("xtask: {error}; trying Debian's compiler"),
    }
    Ok(Way::Debian)
}

/// Whether the compiler that cargo will use has a standard library for the target. rustc prints the folder whether or
/// not it exists, so what counts is what is in it.
fn has_standard_library(target: Target) -> Result<bool> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(util::root()?).args(["--print", "target-libdir", "--target", target.name]);
    let said = util::capture("build", &mut rustc, QUESTION)?;
    let Ok(entries) = fs::read_dir(&said.stdout) else {
        return Ok(false);
    };
    Ok(entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libstd-") && name.ends_with(".rlib")
    }))
}

/// Brings the target's standard library by rustup.
fn add_with_rustup(target: Target) -> Result<()> {
    if util::find_program("rustup").is_none() {
        return Err(Error::new("build", "rustup", "not installed"));
    }
    let log = util::fresh_log("rustup")?;
    let mut rustup = Command::new("rustup");
    rustup.current_dir(util::root()?).args(["target", "add", target.name]);
    let added = util::run("build", &mut rustup, RUSTUP, Output::Log(&log));
    if has_standard_library(target)? {
        return Ok(());
    }
    Err(added.err().unwrap_or_else(|| Error::new("build", "rustup target add", "no standard library afterwards")))
}

/// Refuses a product that needs anything but a kernel. Returns what was seen.
fn check(target: Target, product: &Path, scratch: &Path) -> Result<String> {
    let refused = |cause: &dyn fmt::Display| Error::new("build", product.display(), cause);
    let bytes = fs::read(product).map_err(|error| refused(&error))?;
    let elf = elf::parse(&bytes).map_err(|cause| refused(&cause))?;
    let kind = judge(target, &elf).map_err(|cause| refused(&cause))?;
    let ran = if target.is_native() { run_alone(product, scratch)? } else { run_emulated(target, product)? };
    Ok(format!("{kind}, no interpreter, no libraries; --version {ran}"))
}

/// The kind of a static executable for the target, or why it is none.
fn judge(target: Target, elf: &Elf) -> std::result::Result<&'static str, String> {
    if let Some(interpreter) = &elf.interpreter {
        return Err(format!("not static: asks for {interpreter} (PT_INTERP)"));
    }
    if elf.needed > 0 {
        return Err(format!("not static: asks for {} libraries (DT_NEEDED)", elf.needed));
    }
    if elf.machine != target.machine {
        return Err(format!("for machine {}, not for {}", elf.machine, target.cpu));
    }
    Ok(match elf.kind {
        Kind::Pie => "static-pie",
        // What the compiler makes for aarch64: as static, at a fixed address.
        Kind::Fixed => "static, not position-independent",
    })
}

/// Runs `--version` where there is nothing but the file: in an empty folder that chroot makes the whole world. Only
/// root may; others run it with an empty environment. Returns where it ran and what it printed.
fn run_alone(product: &Path, scratch: &Path) -> Result<String> {
    let skipped = if !util::is_root() {
        "not root".to_owned()
    } else if let Some(chroot) = util::find_program("chroot") {
        let said = run_in_chroot(product, scratch, &chroot)?;
        // 125: chroot(1) itself failed, so this root may not.
        if said.status.code() != Some(125) {
            return printed(product, &said).map(|text| format!("in an empty chroot: {text}"));
        }
        said.stderr
    } else {
        "no chroot program".to_owned()
    };
    let said = util::capture("build", Command::new(product).arg("--version").env_clear(), QUESTION)?;
    printed(product, &said).map(|text| format!("outside (empty chroot skipped: {skipped}): {text}"))
}

/// Runs `--version` of another machine's executable in an emulator, where there is one.
fn run_emulated(target: Target, product: &Path) -> Result<String> {
    let Some(emulator) = util::find_program(target.emulator) else {
        return Ok(format!("not run: no {} here", target.emulator));
    };
    let said = util::capture("build", Command::new(emulator).arg(product).arg("--version").env_clear(), QUESTION)?;
    printed(product, &said).map(|text| format!("under {}: {text}", target.emulator))
}

/// Runs `--version` in a fresh folder that holds only a copy of the file.
fn run_in_chroot(product: &Path, scratch: &Path, chroot: &Path) -> Result<Captured> {
    let folder = scratch.join(format!("chroot-{}", std::process::id()));
    let failed = |error: std::io::Error| Error::new("build", folder.display(), error);
    fs::create_dir_all(&folder).map_err(failed)?;
    let copied = fs::copy(product, folder.join(PRODUCT)).map_err(failed);
    let said = copied.and_then(|_| {
        let mut command = Command::new(chroot);
        command.env_clear().arg(&folder).arg(format!("/{PRODUCT}")).arg("--version");
        util::capture("build", &mut command, QUESTION)
    });
    fs::remove_dir_all(&folder).map_err(failed)?;
    said
}

/// What `--version` printed, if it ended well and that is what it printed.
fn printed(product: &Path, said: &Captured) -> Result<String> {
    if said.status.success() && said.stdout.starts_with(PRODUCT) {
        return Ok(format!("{:?}", said.stdout));
    }
    let cause = format!("--version: {}: {:?} {}", said.status, said.stdout, said.stderr);
    Err(Error::new("build", product.display(), cause))
}

/// Puts the product into `folder` in one step: whoever runs the old one goes on running the old one. Returns its path
/// and its size in bytes.
fn install(product: &Path, folder: &Path) -> Result<(PathBuf, u64)> {
    let place = folder.join(PRODUCT);
    let new = folder.join(format!("{PRODUCT}.{}", std::process::id()));
    fs::create_dir_all(folder)
        .and_then(|()| fs::copy(product, &new))
        .and_then(|size| fs::rename(&new, &place).map(|()| (place.clone(), size)))
        .map_err(|error| Error::new("build", place.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> std::result::Result<(Target, Option<Way>), String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words).map_err(|error| format!("{} {error}", error.exit))
    }

    #[test]
    fn arguments_are_read_in_both_forms() {
        assert_eq!(parsed(""), Ok((Target::X86_64, None)));
        let line = "--target aarch64-unknown-linux-musl --way debian";
        assert_eq!(parsed(line), Ok((Target::AARCH64, Some(Way::Debian))));
        assert_eq!(parsed("--way=installed"), Ok((Target::X86_64, Some(Way::Installed))));
    }

    #[test]
    fn wrong_arguments_are_usage_errors() {
        let known = "the targets are x86_64-unknown-linux-musl, aarch64-unknown-linux-musl";
        assert_eq!(parsed("--target riscv64"), Err(format!("2 build: riscv64: {known}")));
        assert_eq!(parsed("--way"), Err("2 build: --way: needs a value".to_owned()));
        assert_eq!(parsed("--way nix"), Err("2 build: nix: the ways are installed, rustup, debian".to_owned()));
        assert_eq!(parsed("fast"), Err("2 build: fast: not known; try: cargo xtask help".to_owned()));
    }

    fn elf() -> Elf {
        Elf { kind: Kind::Pie, machine: elf::X86_64, interpreter: None, needed: 0 }
    }

    #[test]
    fn only_a_static_executable_for_the_target_passes() {
        let judged = |elf: Elf| judge(Target::X86_64, &elf);
        assert_eq!(judged(elf()), Ok("static-pie"));
        assert_eq!(judged(Elf { kind: Kind::Fixed, ..elf() }), Ok("static, not position-independent"));
        let interpreter = Some("/lib/ld-musl-x86_64.so.1".to_owned());
        let cause = "not static: asks for /lib/ld-musl-x86_64.so.1 (PT_INTERP)".to_owned();
        assert_eq!(judged(Elf { interpreter, ..elf() }), Err(cause));
        let cause = "not static: asks for 2 libraries (DT_NEEDED)".to_owned();
        assert_eq!(judged(Elf { needed: 2, ..elf() }), Err(cause));
        assert_eq!(judged(Elf { machine: elf::AARCH64, ..elf() }), Err("for machine 183, not for x86_64".to_owned()));
        assert_eq!(judge(Target::AARCH64, &elf()), Err("for machine 62, not for aarch64".to_owned()));
    }

    #[test]
    fn a_dynamic_program_is_refused_by_name() {
        let shell = fs::canonicalize("/bin/sh").expect("there is a shell");
        let error = check(Target::X86_64, &shell, &std::env::temp_dir()).expect_err("the shell is dynamic");
        assert!(error.to_string().contains("not static: asks for "), "{error}");
    }

    #[test]
    fn a_program_that_does_not_say_its_version_is_refused() {
        let version = |script: &str| {
            let said = util::capture("test", Command::new("sh").args(["-c", script]), QUESTION).expect("sh runs");
            printed(Path::new("/p"), &said).map_err(|error| error.to_string())
        };
        assert_eq!(version("echo blockferry 1.2"), Ok("\"blockferry 1.2\"".to_owned()));
        assert_eq!(version("true"), Err("build: /p: --version: exit status: 0: \"\"".to_owned()));
        assert_eq!(version("echo no >&2; exit 3"), Err("build: /p: --version: exit status: 3: \"\" no".to_owned()));
    }
}
