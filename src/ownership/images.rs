//! Which images a record speaks of (rule M7).
//!
//! A record that is found at start with images that it does not speak of owns nothing: somebody has put a backup in
//! their place, or the state directory belongs to other disks. What counts, for each disk that moves with the guest
//! (not the shared, read-only, external and empty ones) and that exists:
//!
//! - its name, and of a file its number in the file system together with the time of its birth. A file that was put in
//!   the place of another one, or made anew, differs in the second even where the file system uses the number again;
//!   where it knows no births (NFS, old kernels) only the number tells.
//! - its name, and of a block device the path that the command line names. A restore *into* a device or into the same
//!   file leaves no trace that could be looked for: the guest's own writes look alike.
//!
//! Not the device number, which changes with the next boot, not the size, which an administrator may let grow, and not
//! a file's path: the same file found elsewhere is the same image.
//!
//! Each disk has a mark of its own, so that a disk that was added to the guest, or taken from it, does not make the
//! record foreign: it does when a disk of a name that it knows has another mark, or when it knows none of the disks.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Images;
use crate::disk::Lasting;
use crate::limits::{DISK_NAME_MAX, DISKS_MAX};

/// One disk's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Image {
    /// The disk.
    name: heapless::String<DISK_NAME_MAX>,
    /// What tells the image from others.
    mark: [u8; 16],
}

/// The images of a guest, in the order of its disks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageList(heapless::Vec<Image, DISKS_MAX>);

impl ImageList {
    /// Adds a disk. A name that is too long, and a disk too many, are left out: the command line takes neither.
    pub fn add(&mut self, name: &str, lasting: Lasting, path: &Path) {
        let mut hash = Fnv::default();
        match lasting {
            Lasting::File { inode, born_ns } => {
                hash.add(b"file");
                hash.add(&inode.to_le_bytes());
                hash.add(&born_ns.unwrap_or_default().to_le_bytes());
            }
            Lasting::Device => {
                hash.add(b"device");
                hash.add(path.as_os_str().as_encoded_bytes());
            }
        }
        if let Ok(name) = heapless::String::try_from(name) {
            let _ = self.0.push(Image { name, mark: hash.done() });
        }
    }

    /// All of it as one fingerprint; [`Images::NONE`] of no image.
    #[must_use]
    pub fn fingerprint(&self) -> Images {
        if self.0.is_empty() {
            return Images::NONE;
        }
        let mut hash = Fnv::default();
        for image in &self.0 {
            hash.add(image.name.as_bytes());
            hash.add(&[0]);
            hash.add(&image.mark);
        }
        Images(hash.done())
    }

    /// Whether a disk of that name is among them.
    #[must_use]
    pub fn names(&self, disk: &str) -> bool {
        self.0.iter().any(|image| image.name == disk)
    }

    /// Why images that are here now are not the ones that this list speaks of; `None` when they are.
    #[must_use]
    pub fn differs_from(&self, here: &ImageList) -> Option<String> {
        let here_is = |image: &&Image| here.0.iter().find(|other| other.name == image.name);
        if let Some(other) = self.0.iter().find(|image| here_is(image).is_some_and(|here| here != *image)) {
            return Some(format!("disk {} is another image than the record speaks of", other.name));
        }
        let known = self.0.is_empty() || self.0.iter().any(|image| here_is(&image).is_some());
        (!known).then(|| format!("the record speaks of other disks ({})", self.list()))
    }

    fn list(&self) -> String {
        self.0.iter().map(|image| image.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// FNV-1a with 128 bits: what is told apart here are accidents, not enemies, who could write the record itself.
struct Fnv(u128);

impl Default for Fnv {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    }

    fn done(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(disks: &[(&str, u64)]) -> ImageList {
        let mut images = ImageList::default();
        for (name, inode) in disks {
            images.add(name, Lasting::File { inode: *inode, born_ns: Some(7) }, Path::new("/d/x"));
        }
        images
    }

    #[test]
    fn the_hash_is_the_published_one() {
        let mut hash = Fnv::default();
        hash.add(b"a");
        assert_eq!(hash.0, 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn an_image_in_anothers_place_is_noticed_and_a_disk_more_or_less_is_not() {
        let known = list(&[("vda", 1), ("vdb", 2)]);
        assert_eq!(known.differs_from(&known), None);
        assert_eq!(known.differs_from(&list(&[("vda", 1), ("vdb", 2), ("vdc", 3)])), None);
        assert_eq!(known.differs_from(&list(&[("vdb", 2)])), None);
        let other = known.differs_from(&list(&[("vda", 1), ("vdb", 9)])).expect("differs");
        assert_eq!(other, "disk vdb is another image than the record speaks of");
        let none = known.differs_from(&list(&[("sda", 1)])).expect("differs");
        assert_eq!(none, "the record speaks of other disks (vda, vdb)");
        assert_eq!(ImageList::default().differs_from(&known), None);
        assert_ne!(known.fingerprint(), list(&[("vda", 2), ("vdb", 1)]).fingerprint());
        assert_eq!(ImageList::default().fingerprint(), Images::NONE);
    }

    #[test]
    fn a_birth_tells_two_files_of_one_number_apart_and_a_path_two_devices() {
        let one = |lasting, path: &str| {
            let mut images = ImageList::default();
            images.add("vda", lasting, Path::new(path));
            images.fingerprint()
        };
        let born = |ns| Lasting::File { inode: 1, born_ns: ns };
        assert_ne!(one(born(Some(1)), "/a"), one(born(Some(2)), "/a"));
        assert_ne!(one(born(None), "/a"), one(born(Some(2)), "/a"));
        assert_eq!(one(born(Some(1)), "/a"), one(born(Some(1)), "/b"), "the same file elsewhere");
        assert_ne!(one(Lasting::Device, "/dev/a"), one(Lasting::Device, "/dev/b"));
    }
}
