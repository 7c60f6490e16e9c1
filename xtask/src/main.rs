//! blockferry's chores: `cargo xtask TASK`, one file per task. Needs what the toolchain brings, and the library for the
//! guest of demo and bench.

mod bench;
mod bench_chain;
mod bench_copier;
mod bench_copy;
mod bench_draw;
mod bench_guest;
mod bench_latency;
mod bench_migrate;
mod bench_scale;
mod bench_server;
mod bench_tax;
mod build;
mod build_debian;
mod ci;
mod clock;
mod cpio;
mod demo;
mod demo_guest;
mod demo_host;
mod demo_image;
mod demo_live;
mod elf;
mod footprint;
mod fuzz;
mod initramfs;
mod kernel;
mod live;
mod live_pair;
mod native;
mod peers;
mod qmp;
mod rules;
mod source;
mod storage_daemon;
mod target;
mod test;
mod tidy;
mod torture;
mod unwinder;
mod util;
mod vm;
mod vm_guest;
mod vm_hook;
mod vm_host;
mod vm_machine;
mod vm_pair;

use std::io::Write;
use std::process::ExitCode;

/// What `cargo xtask help` prints.
const HELP: &str = "\
cargo xtask TASK: what is done to this tree

  build [--target x86_64-unknown-linux-musl|aarch64-unknown-linux-musl] [--way installed|rustup|debian]
                  the static executable, in the first way that works here, checked:
                  target/static/TARGET/blockferry
  test [--quick]  everything: tidy, unit tests, the static executable, integration tests that drive it; installs
                  missing peers when root. --quick: no clippy, no static executable, nothing installed
  demo            moves a guest that writes without a pause from one host process to another, then looks up every
                  write that was acknowledged
  demo --guest    moves a running Linux guest, memory, devices and disk, there and back; it compares its whole disk
                  with its memory after each move, and says how long it stood still
  bench [chain|server|copier|copy|latency|migrate|guest|tax|scale] [--runs N] [--quick] [--docs] [--json]
                  side by side with the tools one would take instead: medians of 5 runs; --quick: one run
                    chain    read, socket, write with no protocol: what the machine costs anybody
                    server   export beside nbdkit, qemu-nbd, nbd-server, under fio
                    copier   copy beside nbdcopy and qemu-img convert: a full disk and a half empty one of 4 GiB
                    copy     the live mirror beside two qemu-storage-daemons, under the same writes
                    latency  a guest's writes, mirrored in each mode and not, beside two qemu-storage-daemons
                    migrate  whole migrations under fio's verified writes: lost writes, switchover, cost
                    tax      QEMU's block layer on a file and through servers, when nothing migrates
                    scale    the same data in larger disks, more disks, more guests
                    guest    live migrations of a Linux guest beside QEMU's own: its pause, in its own words
                  what was measured stays in target/bench (--docs: docs/bench): NAME.json, NAME.svg
  torture [--seed N] [--rounds N] [--jobs N] [--fault NAME]
                  migrations in which something dies, breaks, fills up or loses its power, and a look at who owns
                  and what is lost: 100 rounds from seed 1, 2 at once; docs/torture.md has the faults
  fuzz [--seconds N] [--seed N] [--target NAME]
                  bytes that nobody should have sent, for each parser: 30 s each; what breaks one is in target/fuzz/,
                  and belongs into tests/fuzz/corpus/TARGET/ once it is understood
  initramfs [--kernel FILE] [--out FILE]
                  an image that a machine boots with the executable as its first process, and Debian's kernel for it
                  (downloaded once, not installed): target/initramfs/blockferry.cpio and vmlinuz
  vm [NAME]       boots that image in QEMU and looks what comes of it; then moves a guest between two machines, through
                  a crash, an outage and a power loss. NAME: only the tests whose name contains it
  syscalls        traces a migration and an export, and writes the table of system calls in docs/footprint.md
  tidy            rustfmt, clippy, and the rules of the tree: imports, unsafe code, sizes, links
  ci              what .ci/run does before it tests: rustfmt, clippy and every peer are here, or it fails
  help            this text

Examples:
  cargo xtask build
  cargo xtask build --way debian
  cargo xtask build --target aarch64-unknown-linux-musl
  cargo xtask test
  cargo xtask test --quick
  cargo xtask demo
  cargo xtask bench server --runs 3
  cargo xtask torture --seed 7 --rounds 1 --fault kill-both
  cargo xtask vm fw_cfg
  .ci/run
  target/static/x86_64-unknown-linux-musl/blockferry --version

Exit codes: 0 done, 1 failed, 2 called wrongly. What children print in masses is in target/xtask/*.log.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asks_for_help = arguments.iter().any(|word| word == "--help" || word == "-h");
    let (task, arguments) = match arguments.split_first() {
        Some((task, rest)) if !asks_for_help => (task.as_str(), rest),
        Some(_) => ("help", &[][..]),
        None => ("", &[][..]),
    };
    let result = match task {
        "build" => build::main(arguments),
        "test" => test::main(arguments),
        "bench" => bench::main(arguments),
        "syscalls" => footprint::syscalls(arguments),
        "demo" => demo::main(arguments),
        "initramfs" => initramfs::main(arguments),
        "vm" => vm::main(arguments),
        "tidy" => tidy::main(arguments),
        "torture" => torture::main(arguments),
        "fuzz" => fuzz::main(arguments),
        "ci" => ci::main(arguments),
        "help" => {
            // A reader that has seen enough (`| head`) is no error.
            let _ = std::io::stdout().write_all(HELP.as_bytes());
            Ok(())
        }
        "" => Err(util::Error::usage("usage", "no task", "try: cargo xtask help")),
        other => Err(util::Error::usage("usage", other, "not a task; try: cargo xtask help")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(error.exit)
        }
    }
}
