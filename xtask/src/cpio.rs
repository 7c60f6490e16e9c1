//! An archive that the kernel unpacks as its first file system: cpio in the *newc* form.
//!
//! Pure: entries in, bytes out, and the same entries give the same bytes whatever their order was: they are sorted by
//! path, belong to root, are of one time, and are numbered in their order. `initramfs` calls it.

use std::collections::BTreeMap;

/// What stands at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A folder.
    Folder,
    /// A file and its permissions.
    File(Vec<u8>, u32),
    /// A symbolic link to this.
    Link(String),
    /// A character device: major, minor and permissions.
    Device(u32, u32, u32),
}

/// What a path stands for; paths are absolute.
pub(crate) type Entries = BTreeMap<String, Entry>;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// The archive. Folders above an entry that are not entries themselves are added.
pub(crate) fn archive(entries: &Entries) -> Result<Vec<u8>, String> {
    let mut all = entries.clone();
    for path in entries.keys() {
        let parents = path.match_indices('/').map(|(at, _)| &path[..at]).filter(|parent| !parent.is_empty());
        for parent in parents {
            let found = all.entry(parent.to_owned()).or_insert(Entry::Folder);
            if *found != Entry::Folder {
                return Err(format!("{path}: {parent} is no folder"));
            }
        }
    }
    let mut bytes = Vec::new();
    for (number, (path, entry)) in (1..).zip(&all) {
        let name = path.strip_prefix('/').filter(|name| !name.is_empty() && !name.ends_with('/'));
        let name = name.ok_or_else(|| format!("{path}: not an absolute path"))?;
        add(&mut bytes, number, name, entry).map_err(|cause| format!("{path}: {cause}"))?;
    }
    // The end has a name of its own and no number.
    add(&mut bytes, 0, "TRAILER!!!", &Entry::File(Vec::new(), 0))?;
    Ok(bytes)
}

/// One entry: a head of hexadecimal fields, the name with its NUL, the data; name and data padded to four bytes.
fn add(bytes: &mut Vec<u8>, number: u32, name: &str, entry: &Entry) -> Result<(), String> {
    let (mode, links, data, device): (u32, u32, &[u8], (u32, u32)) = match entry {
        Entry::Folder => (S_IFDIR | 0o755, 2, &[], (0, 0)),
        Entry::File(data, _) if number == 0 => (0, 1, data, (0, 0)),
        Entry::File(data, permissions) => (S_IFREG | permissions, 1, data, (0, 0)),
        Entry::Link(to) => (S_IFLNK | 0o777, 1, to.as_bytes(), (0, 0)),
        Entry::Device(major, minor, permissions) => (S_IFCHR | permissions, 1, &[], (*major, *minor)),
    };
    let size = u32::try_from(data.len()).map_err(|_| "too long for cpio")?;
    let name_size = u32::try_from(name.len() + 1).map_err(|_| "too long a name for cpio")?;
    bytes.extend(b"070701");
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
    for field in [number, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        bytes.extend(format!("{field:08x}").bytes());
    }
    bytes.extend(name.bytes().chain([0]));
    pad(bytes);
    bytes.extend(data);
    pad(bytes);
    Ok(())
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(list: &[(&str, Entry)]) -> Entries {
        list.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect()
    }

    #[test]
    fn the_bytes_of_one_file_are_pinned() {
        let bytes = archive(&entries(&[("/init", Entry::File(b"hello".to_vec(), 0o755))])).expect("an archive");
        let fields = [1, 0o100_755, 0, 0, 1, 0, 5, 0, 0, 0, 0, 5, 0].map(|field: u32| format!("{field:08x}"));
        assert_eq!(String::from_utf8_lossy(&bytes[..110]), format!("070701{}", fields.concat()));
        assert_eq!(&bytes[110..124], b"init\0\0hello\0\0\0");
        assert!(bytes[124..].starts_with(b"070701") && bytes[124 + 110..].starts_with(b"TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_order_of_the_entries_changes_nothing_and_parents_are_added() {
        let file = ("/lib/modules/a.ko", Entry::File(vec![7; 5], 0o644));
        let link = ("/bin/x", Entry::Link("/init".to_owned()));
        let device = ("/dev/console", Entry::Device(5, 1, 0o600));
        let one = archive(&entries(&[file.clone(), link.clone(), device.clone()])).expect("an archive");
        let two = archive(&entries(&[device, file, link])).expect("an archive");
        assert_eq!(one, two);
        let text = String::from_utf8_lossy(&one).into_owned();
        let places: Vec<usize> =
            ["bin\0", "bin/x\0", "dev\0", "dev/console\0", "lib\0", "lib/modules\0", "lib/modules/a.ko\0"]
                .iter()
                .map(|name| text.find(name).expect(name))
                .collect();
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn what_cannot_be_unpacked_is_refused() {
        let file = || Entry::File(Vec::new(), 0o644);
        let error = archive(&entries(&[("/a", file()), ("/a/b", file())])).expect_err("a is a file");
        assert_eq!(error, "/a/b: /a is no folder");
        for path in ["a", "/", "/a/", ""] {
            assert!(archive(&entries(&[(path, file())])).is_err(), "{path}");
        }
    }
}
