//! `cargo xtask build`: the executable that ships, static against musl, built in one of three ways and checked.
//!
//! 1. *installed*: the toolchain in use has a standard library for the target.
//! 2. *rustup*: `rustup target add` brings one. It needs the network, so it has a time limit, and what counts
//!    afterwards is whether the library is there, not the exit code.
//! 3. *debian*: Debian's own compiler, with Debian's sources of the standard library and Debian's musl. Smaller,
//!    because the standard library is built without its backtrace machinery.
//!
//! Only a product that passed [`check`] reaches its stable place, `target/static/TARGET/blockferry`. The trap that
//! the check is there for: a link through `musl-gcc` leaves an interpreter in the file, which then runs on the
//! machine that built it and on no other.

use crate::elf::{self, Elf, Kind};
use crate::util::{self, Captured, Error, Output, QUESTION, Result};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The target that is built.
const TARGET: &str = "x86_64-unknown-linux-musl";
/// The executable's name.
const PRODUCT: &str = "blockferry";
/// How long a release build may take; the Debian way builds the standard library as well.
const BUILD: Duration = Duration::from_secs(600);
/// How long `rustup target add` may take: it often cannot reach its server.
const RUSTUP: Duration = Duration::from_secs(120);
/// Where Debian keeps musl.
const MUSL: &str = "/usr/lib/x86_64-linux-musl";
/// What the Debian way needs. gcc brings libgcc and links; libc6-dev is what build scripts are linked against.
const DEBIAN_PACKAGES: [&str; 6] = ["rustc-web", "cargo-web", "rust-web-src", "musl-dev", "gcc", "libc6-dev"];
/// What the standard library without backtraces still asks of an unwinder: "end of stack", and an address nobody reads.
const UNWINDER: &str = "int _Unwind_Backtrace(void *step, void *state) { (void)step; (void)state; return 5; }\n\
    unsigned long _Unwind_GetIP(void *context) { (void)context; return 0; }\n";

/// How a static executable is come by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Installed,
    Rustup,
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
    build(parse(arguments)?).map(drop)
}

/// Builds the executable in the first way that works, checks it, and returns its stable place: an absolute path. For
/// every task that runs what ships.
pub(crate) fn static_executable() -> Result<PathBuf> {
    build(None)
}

/// The way that the arguments ask for.
fn parse(arguments: &[String]) -> Result<Option<Way>> {
    let mut way = None;
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
        } else if value != TARGET {
            let cause = format!("other targets are not built yet, only {TARGET}");
            return Err(Error::usage("build", value, cause));
        }
    }
    Ok(way)
}

/// Builds in `way`, or in the first that works; checks; puts the product in its place and says so.
fn build(way: Option<Way>) -> Result<PathBuf> {
    let started = Instant::now();
    let target_dir = util::target_dir()?;
    let way = match way {
        Some(way) => way,
        None => choose()?,
    };
    let product = compile(way, PRODUCT, &target_dir)?;
    let facts = check(&product, &target_dir.join("xtask"))?;
    let (place, size) = install(&product, &target_dir.join("static").join(TARGET))?;
    println!("xtask: build: {}: {size} bytes, way: {way}, {:.1} s", place.display(), started.elapsed().as_secs_f64());
    println!("xtask: build: {facts}");
    Ok(place)
}

/// Builds a program of this workspace that runs inside of a test's machine, static like the product.
pub(crate) fn static_program(package: &str) -> Result<PathBuf> {
    let product = compile(choose()?, package, &util::target_dir()?)?;
    let refused = |cause: &dyn fmt::Display| Error::new("build", product.display(), cause);
    let bytes = fs::read(&product).map_err(|error| refused(&error))?;
    let elf = elf::parse(&bytes).map_err(|cause| refused(&cause))?;
    judge(&elf).map_err(|cause| refused(&cause))?;
    Ok(product)
}

/// Compiles the one program of a package of this workspace; returns where it is.
fn compile(way: Way, package: &str, target_dir: &Path) -> Result<PathBuf> {
    let built_in = match way {
        Way::Installed if !has_standard_library()? => {
            return Err(Error::new("build", TARGET, "the toolchain has no standard library for it"));
        }
        Way::Rustup => {
            add_with_rustup()?;
            target_dir.to_owned()
        }
        Way::Installed => target_dir.to_owned(),
        Way::Debian => target_dir.join("debian"),
    };
    let mut cargo = match way {
        Way::Debian => debian_cargo(&built_in)?,
        Way::Installed | Way::Rustup => util::cargo()?,
    };
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--package", package, "--bin", package]);
    if way == Way::Debian {
        cargo.args(["-Zbuild-std=std,panic_abort", "-Zbuild-std-features="]);
    }
    util::run("build", &mut cargo, BUILD, Output::Shown)?;
    Ok(built_in.join(TARGET).join("release").join(package))
}

/// The first way that can work here. Once the compiler runs there is no second try: its errors are the user's.
fn choose() -> Result<Way> {
    if has_standard_library()? {
        return Ok(Way::Installed);
    }
    match add_with_rustup() {
        Ok(()) => return Ok(Way::Rustup),
        Err(error) => println!("xtask: {error}; trying Debian's compiler"),
    }
    Ok(Way::Debian)
}

/// Whether the compiler that cargo will use has a standard library for the target. rustc prints the folder whether or
/// not it exists, so what counts is what is in it.
fn has_standard_library() -> Result<bool> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(util::root()?).args(["--print", "target-libdir", "--target", TARGET]);
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
fn add_with_rustup() -> Result<()> {
    if util::find_program("rustup").is_none() {
        return Err(Error::new("build", "rustup", "not installed"));
    }
    let log = util::fresh_log("rustup")?;
    let mut rustup = Command::new("rustup");
    rustup.current_dir(util::root()?).args(["target", "add", TARGET]);
    let added = util::run("build", &mut rustup, RUSTUP, Output::Log(&log));
    if has_standard_library()? {
        return Ok(());
    }
    Err(added.err().unwrap_or_else(|| Error::new("build", "rustup target add", "no standard library afterwards")))
}

/// Debian's cargo, ready to build the standard library with the program, in a target directory of its own: another
/// compiler's products would only be thrown away by each in turn.
fn debian_cargo(target_dir: &Path) -> Result<Command> {
    util::apt_install("build", &util::missing_packages("build", &DEBIAN_PACKAGES)?)?;
    let link = link_folder(&target_dir.join("link"))?;
    let mut cargo = Command::new("/usr/bin/cargo");
    cargo.current_dir(util::root()?);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_foreign_to_debian) {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", "/usr/bin/rustc")
        // The encoded form, because the path may contain blanks.
        .env("CARGO_ENCODED_RUSTFLAGS", format!("-Lnative={}", link.display()))
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_LINKER", "cc")
        .env("CARGO_TARGET_DIR", target_dir);
    Ok(cargo)
}

/// Variables that speak of another compiler: what rustup and the cargo that started us have set, and flags.
fn is_foreign_to_debian(name: &str) -> bool {
    let of_rust = name.starts_with("RUSTUP_") || name.starts_with("RUSTC") || name.ends_with("RUSTFLAGS");
    // Where cargo keeps its registry, and how it reaches it, is no matter of the compiler.
    let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    let of_cargo = name.starts_with("CARGO") && !kept.iter().any(|prefix| name.starts_with(prefix));
    of_rust || of_cargo || name == "LD_LIBRARY_PATH" || name == "OUT_DIR"
}

/// Fills the folder in which rustc finds what a self-contained musl link starts and ends with: musl's and gcc's
/// start files, musl itself, and a stub for the unwinder.
fn link_folder(folder: &Path) -> Result<PathBuf> {
    let failed = |object: &Path, error: std::io::Error| Error::new("build", object.display(), error);
    fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    let of_musl = ["rcrt1.o", "crt1.o", "crti.o", "crtn.o", "libc.a"].map(|name| Path::new(MUSL).join(name));
    let mut files = of_musl.to_vec();
    for name in ["crtbegin.o", "crtbeginS.o", "crtend.o", "crtendS.o"] {
        let said = util::capture("build", Command::new("cc").arg(format!("-print-file-name={name}")), QUESTION)?;
        files.push(PathBuf::from(said.stdout));
    }
    for file in files {
        let copy = folder.join(file.file_name().unwrap_or_default());
        fs::copy(&file, copy).map_err(|error| failed(&file, error))?;
    }
    let source = folder.join("unwind.c");
    fs::write(&source, UNWINDER).map_err(|error| failed(&source, error))?;
    let mut cc = Command::new("cc");
    util::run("build", cc.current_dir(folder).args(["-O2", "-fPIC", "-c", "unwind.c"]), QUESTION, Output::Shown)?;
    let mut ar = Command::new("ar");
    util::run("build", ar.current_dir(folder).args(["rcs", "libunwind.a", "unwind.o"]), QUESTION, Output::Shown)?;
    Ok(folder.to_path_buf())
}

/// Refuses a product that needs anything but a kernel. Returns what was seen.
fn check(product: &Path, scratch: &Path) -> Result<String> {
    let refused = |cause: &dyn fmt::Display| Error::new("build", product.display(), cause);
    let bytes = fs::read(product).map_err(|error| refused(&error))?;
    let elf = elf::parse(&bytes).map_err(|cause| refused(&cause))?;
    let kind = judge(&elf).map_err(|cause| refused(&cause))?;
    let ran = run_alone(product, scratch)?;
    Ok(format!("{kind}, no interpreter, no libraries; --version {ran}"))
}

/// The kind of a static executable for the target, or why it is none.
fn judge(elf: &Elf) -> std::result::Result<&'static str, String> {
    if let Some(interpreter) = &elf.interpreter {
        return Err(format!("not static: asks for {interpreter} (PT_INTERP)"));
    }
    if elf.needed > 0 {
        return Err(format!("not static: asks for {} libraries (DT_NEEDED)", elf.needed));
    }
    if elf.machine != elf::X86_64 {
        return Err(format!("for machine {}, not for x86_64", elf.machine));
    }
    Ok(match elf.kind {
        Kind::Pie => "static-pie",
        Kind::Fixed => "static",
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

    fn parsed(line: &str) -> std::result::Result<Option<Way>, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words).map_err(|error| format!("{} {error}", error.exit))
    }

    #[test]
    fn arguments_are_read_in_both_forms() {
        assert_eq!(parsed(""), Ok(None));
        assert_eq!(parsed("--target x86_64-unknown-linux-musl --way debian"), Ok(Some(Way::Debian)));
        assert_eq!(parsed("--way=installed"), Ok(Some(Way::Installed)));
    }

    #[test]
    fn wrong_arguments_are_usage_errors() {
        let cross = "2 build: aarch64-unknown-linux-musl: other targets are not built yet, only ";
        assert_eq!(parsed("--target aarch64-unknown-linux-musl"), Err(format!("{cross}{TARGET}")));
        assert_eq!(parsed("--way"), Err("2 build: --way: needs a value".to_owned()));
        assert_eq!(parsed("--way nix"), Err("2 build: nix: the ways are installed, rustup, debian".to_owned()));
        assert_eq!(parsed("fast"), Err("2 build: fast: not known; try: cargo xtask help".to_owned()));
    }

    fn elf() -> Elf {
        Elf { kind: Kind::Pie, machine: elf::X86_64, interpreter: None, needed: 0 }
    }

    #[test]
    fn only_a_static_executable_for_the_target_passes() {
        assert_eq!(judge(&elf()), Ok("static-pie"));
        assert_eq!(judge(&Elf { kind: Kind::Fixed, ..elf() }), Ok("static"));
        let interpreter = Some("/lib/ld-musl-x86_64.so.1".to_owned());
        let cause = "not static: asks for /lib/ld-musl-x86_64.so.1 (PT_INTERP)".to_owned();
        assert_eq!(judge(&Elf { interpreter, ..elf() }), Err(cause));
        let cause = "not static: asks for 2 libraries (DT_NEEDED)".to_owned();
        assert_eq!(judge(&Elf { needed: 2, ..elf() }), Err(cause));
        assert_eq!(judge(&Elf { machine: 183, ..elf() }), Err("for machine 183, not for x86_64".to_owned()));
    }

    #[test]
    fn a_dynamic_program_is_refused_by_name() {
        let shell = fs::canonicalize("/bin/sh").expect("there is a shell");
        let error = check(&shell, &std::env::temp_dir()).expect_err("the shell is dynamic");
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

    #[test]
    fn debians_cargo_is_told_nothing_of_another_compiler() {
        let foreign = ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER"];
        assert!(foreign.into_iter().all(is_foreign_to_debian));
        let foreign = ["CARGO_TARGET_DIR", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS", "LD_LIBRARY_PATH"];
        assert!(foreign.into_iter().all(is_foreign_to_debian));
        assert!(!["CARGO_HOME", "CARGO_NET_OFFLINE", "HOME", "PATH"].into_iter().any(is_foreign_to_debian));
    }
}
