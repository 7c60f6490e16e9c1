//! The machines for which the executable is built. `build` and `build_debian` call it; it calls nothing.

use crate::elf;

/// A target of the build: what the compiler, the ELF header and Debian call it.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) struct Target {
    /// The compiler's name.
    pub(crate) name: &'static str,
    /// `e_machine`.
    pub(crate) machine: u16,
    /// The machine's name for people, and in Debian's folders.
    pub(crate) cpu: &'static str,
    /// Debian's name of the architecture.
    pub(crate) debian: &'static str,
    /// The program that runs its executables on another machine.
    pub(crate) emulator: &'static str,
}

impl Target {
    pub(crate) const X86_64: Self = Self {
        name: "x86_64-unknown-linux-musl",
        machine: elf::X86_64,
        cpu: "x86_64",
        debian: "amd64",
        emulator: "qemu-x86_64-static",
    };
    pub(crate) const AARCH64: Self = Self {
        name: "aarch64-unknown-linux-musl",
        machine: elf::AARCH64,
        cpu: "aarch64",
        debian: "arm64",
        emulator: "qemu-aarch64-static",
    };
    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::AARCH64];

    /// Whether this machine runs its executables itself.
    pub(crate) fn is_native(self) -> bool {
        self.cpu == std::env::consts::ARCH
    }

    /// The name with which cargo's variables for this target begin.
    pub(crate) fn variable(self, what: &str) -> String {
        format!("CARGO_TARGET_{}_{what}", self.name.to_uppercase().replace('-', "_"))
    }
}
