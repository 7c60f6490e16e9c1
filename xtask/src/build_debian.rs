//! The way of `build` that takes Debian's compiler, Debian's sources of the standard library and Debian's musl.
//!
//! For this machine's own architecture everything comes by `apt-get install` and gcc links. For another one nothing is
//! installed for that architecture: two packages are fetched with an apt state of their own under the target
//! directory, unpacked there, and lld links. No C compiler for the other architecture is needed.

use crate::build::LINK;
use crate::target::Target;
use crate::unwinder;
use crate::util::{self, Error, Output, QUESTION, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The compiler.
const COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// What links for this machine. gcc brings libgcc and links; libc6-dev is what build scripts are linked against.
const NATIVE: [&str; 3] = ["musl-dev", "gcc", "libc6-dev"];
/// What links build scripts, when the product is for another machine.
const CROSS: [&str; 2] = ["gcc", "libc6-dev"];
/// How long the lists of another architecture, and two small packages, may take.
const FETCH: Duration = Duration::from_secs(180);
/// How the linker is called that comes with rustup, and how Debian's.
const RUST_LLD: &str = "rust-lld";
const LD_LLD: &str = "ld.lld";
/// Start and end files: of musl, of gcc.
const OF_MUSL: [&str; 5] = ["rcrt1.o", "crt1.o", "crti.o", "crtn.o", "libc.a"];
const OF_GCC: [&str; 4] = ["crtbegin.o", "crtbeginS.o", "crtend.o", "crtendS.o"];

/// Debian's cargo, ready to build the standard library with the program, in a target directory of its own: another
/// compiler's products would only be thrown away by each in turn.
pub(crate) fn cargo(target: Target, target_dir: &Path) -> Result<Command> {
    util::apt_install("build", &util::missing_packages("build", &COMPILER)?)?;
    let folder = target_dir.join("link").join(target.cpu);
    let (linker, flags) = if target.is_native() {
        util::apt_install("build", &util::missing_packages("build", &NATIVE)?)?;
        (PathBuf::from("cc"), Vec::new())
    } else {
        util::apt_install("build", &util::missing_packages("build", &CROSS)?)?;
        (linker()?, vec!["-Clinker-flavor=ld.lld".to_owned()])
    };
    let files = if target.is_native() { native_files(target)? } else { foreign_files(target, target_dir)? };
    link_folder(target, &folder, &files)?;
    let mut cargo = Command::new("/usr/bin/cargo");
    cargo.current_dir(util::root()?);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_foreign_to_debian) {
            cargo.env_remove(name);
        }
    }
    let flags = [vec![format!("-Lnative={}", folder.display()), LINK.to_owned()], flags].concat();
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", "/usr/bin/rustc")
        // The encoded form, because the path may contain blanks.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env(target.variable("LINKER"), linker)
        .env("CARGO_TARGET_DIR", target_dir);
    Ok(cargo)
}

/// lld: the one of the rustup toolchain in use, else Debian's, which root installs.
pub(crate) fn linker() -> Result<PathBuf> {
    if let Some(linker) = rust_lld()? {
        return Ok(linker);
    }
    if util::find_program(LD_LLD).is_none() {
        util::apt_install("build", &["lld"])?;
    }
    util::find_program(LD_LLD).ok_or_else(|| Error::new("build", LD_LLD, "not there, though lld is installed"))
}

/// Where rustup keeps its lld, if it has one.
fn rust_lld() -> Result<Option<PathBuf>> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let said = util::capture("build", rustc.current_dir(util::root()?).args(["--print", "target-libdir"]), QUESTION)?;
    let linker = Path::new(&said.stdout).parent().map(|folder| folder.join("bin").join(RUST_LLD));
    Ok(linker.filter(|linker| linker.is_file()))
}

/// Variables that speak of another compiler: what rustup and the cargo that started us have set, and flags.
fn is_foreign_to_debian(name: &str) -> bool {
    let of_rust = name.starts_with("RUSTUP_") || name.starts_with("RUSTC") || name.ends_with("RUSTFLAGS");
    // Where cargo keeps its registry, and how it reaches it, is no matter of the compiler.
    let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    let of_cargo = name.starts_with("CARGO") && !kept.iter().any(|prefix| name.starts_with(prefix));
    of_rust || of_cargo || name == "LD_LIBRARY_PATH" || name == "OUT_DIR"
}

/// What a link for this machine starts and ends with, where its packages have put it.
fn native_files(target: Target) -> Result<Vec<PathBuf>> {
    let musl = PathBuf::from(format!("/usr/lib/{}-linux-musl", target.cpu));
    let mut files: Vec<PathBuf> = OF_MUSL.iter().map(|name| musl.join(name)).collect();
    for name in OF_GCC {
        let said = util::capture("build", Command::new("cc").arg(format!("-print-file-name={name}")), QUESTION)?;
        files.push(PathBuf::from(said.stdout));
    }
    Ok(files)
}

/// The same for another machine: from two packages that are unpacked below the target directory, once.
fn foreign_files(target: Target, target_dir: &Path) -> Result<Vec<PathBuf>> {
    let unpacked = target_dir.join("foreign").join(target.debian);
    let musl = unpacked.join(format!("usr/lib/{}-linux-musl", target.cpu));
    let gcc = unpacked.join(format!("usr/lib/gcc-cross/{}-linux-gnu", target.cpu));
    let found = |gcc_version: PathBuf| {
        let of_gcc = OF_GCC.iter().map(|name| gcc_version.join(name));
        let files: Vec<PathBuf> = OF_MUSL.iter().map(|name| musl.join(name)).chain(of_gcc).collect();
        files.iter().all(|file| file.is_file()).then_some(files)
    };
    let in_one_version = || fs::read_dir(&gcc).ok()?.flatten().find_map(|version| found(version.path()));
    if let Some(files) = in_one_version() {
        return Ok(files);
    }
    fetch_foreign(target, &target_dir.join("foreign"), &unpacked)?;
    in_one_version().ok_or_else(|| Error::new("build", unpacked.display(), "musl-dev or libgcc has other files"))
}

/// Fetches and unpacks `musl-dev` of another architecture and the cross compiler's support library. apt keeps all of
/// its state under `state`; the machine's own is neither read nor changed, and this needs no root.
fn fetch_foreign(target: Target, state: &Path, unpacked: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::new("build", state.display(), error);
    let archives = state.join("archives");
    for folder in [&state.join("lists/partial"), &archives.join("partial"), unpacked] {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::write(state.join("status"), "").map_err(failed)?;
    let log = util::fresh_log("apt-foreign")?;
    let mut update = foreign_apt("apt-get", target, state);
    // Other lists than Debian's may know nothing of the architecture: the download is the judge.
    let updated = util::run("build", update.arg("update"), FETCH, Output::Log(&log));
    let mut search = foreign_apt("apt-cache", target, state);
    let pattern = format!("^libgcc-[0-9]+-dev-{}-cross$", target.debian);
    let said = util::capture("build", search.args(["search", "--names-only", &pattern]), QUESTION)?;
    let Some(libgcc) = newest(&said.stdout) else {
        let none = Error::new("build", pattern, "Debian has no such package here");
        return Err(updated.err().unwrap_or(none));
    };
    println!("xtask: build: apt-get download musl-dev:{} {libgcc}, unpacked below the target directory", target.debian);
    let mut download = foreign_apt("apt-get", target, state);
    download.current_dir(&archives).args(["download", "musl-dev", libgcc]);
    util::run("build", &mut download, FETCH, Output::Log(&log))?;
    for package in fs::read_dir(&archives).map_err(failed)?.flatten() {
        if package.path().extension().is_some_and(|extension| extension == "deb") {
            let mut dpkg = Command::new("dpkg");
            dpkg.arg("-x").arg(package.path()).arg(unpacked);
            util::run("build", &mut dpkg, QUESTION, Output::Log(&log))?;
        }
    }
    // Lists are tens of megabytes, and of no use any more.
    fs::remove_dir_all(state.join("lists")).map_err(failed)
}

/// apt that takes the target for this machine's architecture, and keeps everything it knows under `state`.
fn foreign_apt(program: &str, target: Target, state: &Path) -> Command {
    let mut command = Command::new(program);
    let own = |key: &str, value: &str| format!("Dir::{key}={}", state.join(value).display());
    for option in [
        format!("APT::Architecture={}", target.debian),
        format!("APT::Architectures={}", target.debian),
        own("State::status", "status"),
        own("State::Lists", "lists"),
        own("Cache", ""),
        own("Cache::archives", "archives"),
        "APT::Sandbox::User=root".to_owned(),
        "Acquire::Languages=none".to_owned(),
        "Acquire::Retries=3".to_owned(),
    ] {
        command.args(["-o", &option]);
    }
    command
}

/// The package with the highest number among lines such as `libgcc-12-dev-arm64-cross - support library`.
fn newest(lines: &str) -> Option<&str> {
    let names = lines.lines().filter_map(|line| line.split_whitespace().next());
    names.max_by_key(|name| name.split('-').nth(1).and_then(|number| number.parse::<u32>().ok()))
}

/// Fills the folder in which rustc finds what a self-contained musl link starts and ends with: musl's and gcc's
/// start files, musl itself, and a stub for the unwinder.
fn link_folder(target: Target, folder: &Path, files: &[PathBuf]) -> Result<()> {
    let failed = |object: &Path, error: std::io::Error| Error::new("build", object.display(), error);
    fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    for file in files {
        let copy = folder.join(file.file_name().unwrap_or_default());
        fs::copy(file, copy).map_err(|error| failed(file, error))?;
    }
    let stub = folder.join("libunwind.a");
    let bytes = unwinder::archive(target.machine).ok_or_else(|| Error::new("build", target.name, "no unwinder"))?;
    fs::write(&stub, bytes).map_err(|error| failed(&stub, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_cargo_is_told_nothing_of_another_compiler() {
        let foreign = ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER"];
        assert!(foreign.into_iter().all(is_foreign_to_debian));
        let foreign = ["CARGO_TARGET_DIR", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS", "LD_LIBRARY_PATH"];
        assert!(foreign.into_iter().all(is_foreign_to_debian));
        assert!(!["CARGO_HOME", "CARGO_NET_OFFLINE", "HOME", "PATH"].into_iter().any(is_foreign_to_debian));
    }

    #[test]
    fn the_newest_library_is_taken_by_number_and_not_by_letter() {
        let lines = "libgcc-9-dev-arm64-cross - old\nlibgcc-12-dev-arm64-cross - new\n";
        assert_eq!(newest(lines), Some("libgcc-12-dev-arm64-cross"));
        assert_eq!(newest(""), None);
    }

    #[test]
    fn a_foreign_apt_keeps_its_state_to_itself() {
        let state = std::env::temp_dir().join(format!("xtask-foreign-{}", std::process::id()));
        let apt = foreign_apt("apt-get", Target::AARCH64, &state);
        let words: Vec<String> = apt.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert!(words.contains(&"APT::Architecture=arm64".to_owned()), "{words:?}");
        let own = words.iter().filter(|word| word.starts_with("Dir::"));
        assert!(own.clone().count() == 4 && own.clone().all(|word| word.contains("xtask-foreign-")), "{words:?}");
    }
}
