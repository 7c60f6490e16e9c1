//! `cargo xtask initramfs`: an image that boots into blockferry, out of `initramfs/manifest`, the static executable and
//! a kernel's modules.
//!
//! The same inputs give the same bytes. `vm` boots what is packed here.

use crate::build;
use crate::cpio::{self, Entries, Entry};
use crate::kernel::{self, Kernel};
use crate::util::{self, Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Where init looks for the modules that it is to load.
const MODULES: &str = "/etc/blockferry/modules";

/// `cargo xtask initramfs [--kernel FILE] [--out FILE]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let (mut from, mut out) = (None, None);
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let (option, attached) = word.split_once('=').map_or((word.as_str(), None), |(a, b)| (a, Some(b.to_owned())));
        let place = match option {
            "--kernel" => &mut from,
            "--out" => &mut out,
            _ => return Err(Error::usage("initramfs", word, "not known; try: cargo xtask help")),
        };
        let value = attached.or_else(|| words.next().cloned()).filter(|value| !value.is_empty());
        *place = Some(PathBuf::from(value.ok_or_else(|| Error::usage("initramfs", option, "needs a value"))?));
    }
    let executable = build::static_executable()?.place;
    let kernel = kernel::find(from.as_deref())?;
    let image = pack(&executable, &kernel, &["manifest"], &[])?;
    let folder = util::target_dir()?.join("initramfs");
    let out = out.unwrap_or_else(|| folder.join("blockferry.cpio"));
    write(&out, &image)?;
    println!("xtask: initramfs: {}: {} bytes", out.display(), image.len());
    if from.is_none() {
        let vmlinuz = folder.join("vmlinuz");
        let failed = |error: std::io::Error| Error::new("initramfs", vmlinuz.display(), error);
        fs::create_dir_all(&folder).and_then(|()| fs::copy(&kernel.image, &vmlinuz)).map_err(failed)?;
        println!("xtask: initramfs: {}: Linux {}", vmlinuz.display(), kernel.version);
    }
    Ok(())
}

/// Writes an image; what was there before is replaced when it is complete.
pub(crate) fn write(out: &Path, image: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::new("initramfs", out.display(), error);
    if let Some(folder) = out.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let mut name = out.file_name().ok_or_else(|| Error::usage("initramfs", out.display(), "no file"))?.to_owned();
    name.push(".new");
    let new = out.with_file_name(name);
    fs::write(&new, image).and_then(|()| fs::rename(&new, out)).map_err(failed)
}

/// An image of these manifests of `initramfs/`, and of what is added to them.
pub(crate) fn pack(executable: &Path, kernel: &Kernel, manifests: &[&str], more: &[(&str, Entry)]) -> Result<Vec<u8>> {
    let folder = util::root()?.join("initramfs");
    let mut image = Image { executable, kernel, folder: &folder, entries: Entries::new(), modules: Vec::new() };
    for manifest in manifests {
        let path = folder.join(manifest);
        let text = fs::read_to_string(&path).map_err(|error| Error::new("initramfs", path.display(), error))?;
        for (line, number) in text.lines().zip(1..) {
            let place = format!("{manifest}:{number}");
            image.take(line).map_err(|cause| Error::new("initramfs", place, cause))?;
        }
    }
    let lines: Vec<String> = image.modules.iter().map(|line| format!("{line}\n")).collect();
    image.entries.insert(MODULES.to_owned(), Entry::File(lines.concat().into_bytes(), 0o644));
    image.entries.extend(more.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())));
    cpio::archive(&image.entries).map_err(|cause| Error::new("initramfs", "the image", cause))
}

/// An image that is being put together.
struct Image<'a> {
    executable: &'a Path,
    kernel: &'a Kernel,
    /// Where the manifest's own files are.
    folder: &'a Path,
    entries: Entries,
    /// The lines of the list of modules.
    modules: Vec<String>,
}

impl Image<'_> {
    /// One line of a manifest.
    fn take(&mut self, line: &str) -> std::result::Result<(), String> {
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_ascii_whitespace().collect();
        let (path, entry) = match words.as_slice() {
            [] => return Ok(()),
            ["executable", path] => (path, Entry::File(read(self.executable)?, 0o755)),
            ["file", path, from] => (path, Entry::File(read(&self.folder.join(from))?, 0o644)),
            ["folder", path] => (path, Entry::Folder),
            ["link", path, to] => (path, Entry::Link((*to).to_owned())),
            ["device", path, major, minor] => {
                let number = |text: &str| text.parse().map_err(|_| format!("'{text}' is no number"));
                (path, Entry::Device(number(major)?, number(minor)?, 0o600))
            }
            ["module", name, parameters @ ..] => return self.module(name, parameters),
            ["module?", name, parameters @ ..] => {
                if let Err(cause) = self.module(name, parameters) {
                    eprintln!("xtask: initramfs: left out: {cause}");
                }
                return Ok(());
            }
            [word, ..] => return Err(format!("'{word}' is no entry, or has not what belongs to it")),
        };
        match self.entries.insert((*path).to_owned(), entry) {
            None => Ok(()),
            Some(_) => Err(format!("{path} is there twice")),
        }
    }

    /// A module and all that it needs, in the order in which they are to be loaded.
    fn module(&mut self, name: &str, parameters: &[&str]) -> std::result::Result<(), String> {
        let modules = self.kernel.module(name).map_err(|error| error.to_string())?;
        let last = modules.len().saturating_sub(1);
        for (index, (name, bytes)) in modules.into_iter().enumerate() {
            let path = format!("/lib/modules/{name}.ko");
            if self.entries.insert(path.clone(), Entry::File(bytes, 0o644)).is_none() {
                let words = if index == last { parameters } else { &[] };
                self.modules.push([&[path.as_str()], words].concat().join(" "));
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> std::result::Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_manifest_are_read_or_refused() {
        let folder = std::env::temp_dir().join(format!("xtask-initramfs-{}", std::process::id()));
        fs::create_dir_all(folder.join("boot")).expect("a folder");
        fs::create_dir_all(folder.join("lib/modules/1.2")).expect("a folder");
        let write = |name: &str, bytes: &[u8]| {
            fs::write(folder.join(name), bytes).expect("written");
            folder.join(name)
        };
        let mut vmlinuz = vec![0; 0x400];
        vmlinuz[0x202..0x206].copy_from_slice(b"HdrS");
        vmlinuz[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        vmlinuz[0x300..0x303].copy_from_slice(b"1.2");
        let kernel = write("boot/vmlinuz", &vmlinuz);
        write("lib/modules/1.2/a.ko", b"\0depends=b\0");
        write("lib/modules/1.2/b.ko", b"\0depends=\0");
        let executable = write("blockferry", b"program");
        let kernel = kernel::find(Some(&kernel)).expect("a kernel");
        assert_eq!(kernel.version, "1.2");
        let image = || Image {
            executable: &executable,
            kernel: &kernel,
            folder: &folder,
            entries: Entries::new(),
            modules: Vec::new(),
        };
        let mut good = image();
        for line in ["# nothing", "executable /init # us", "device /dev/console 5 1", "module a x=1", "module b y=2"] {
            good.take(line).expect(line);
        }
        good.take("module? zzz").expect("it is optional");
        assert_eq!(good.modules, ["/lib/modules/b.ko", "/lib/modules/a.ko x=1"]);
        assert_eq!(good.entries["/init"], Entry::File(b"program".to_vec(), 0o755));
        assert_eq!(good.take("folder /init"), Err("/init is there twice".to_owned()));
        for line in
            ["init /init", "device /dev/x 5", "device /dev/x 5 y", "file /x no-such-file", "module zzz", "link /a"]
        {
            image().take(line).expect_err(line);
        }
        fs::remove_dir_all(&folder).expect("removed");
    }
}
