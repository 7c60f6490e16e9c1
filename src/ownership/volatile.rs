//! Whether a directory outlives the host's power: a record that does not is no record (rule M7).

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
const OVERLAY: i64 = 0x794c_7630;

/// Why a directory is lost with the host's power; `None` when nothing is known against it.
///
/// # Errors
/// The system's word.
pub(super) fn is_volatile(directory: &Path) -> io::Result<Option<String>> {
    Ok(match rustix::fs::statfs(directory)?.f_type {
        TMPFS => Some("is on a tmpfs".to_owned()),
        RAMFS => Some("is on a ramfs".to_owned()),
        OVERLAY => {
            let stat = rustix::fs::stat(directory)?;
            let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
            let mounts = fs::read("/proc/self/mountinfo")?;
            match upper_of(&mounts, device).map(rustix::fs::statfs) {
                Some(Ok(upper)) if upper.f_type == TMPFS || upper.f_type == RAMFS => {
                    Some("is on an overlay over memory".to_owned())
                }
                Some(Ok(_)) => None,
                // A container, as a rule; or an early root that is out of sight.
                _ => Some("is on an overlay, and what that writes to cannot be seen from here".to_owned()),
            }
        }
        _ => None,
    })
}

/// The directory that an overlay with this device number writes to.
fn upper_of(mounts: &[u8], (major, minor): (u32, u32)) -> Option<PathBuf> {
    let device = format!("{major}:{minor}").into_bytes();
    for line in mounts.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        if fields.nth(2) != Some(device.as_slice()) {
            continue;
        }
        let options = fields.skip_while(|field| *field != b"-").nth(3)?;
        let upper = options.split(|byte| *byte == b',').find_map(|option| option.strip_prefix(b"upperdir="))?;
        return Some(PathBuf::from(std::ffi::OsString::from_vec(unescape(upper))));
    }
    None
}

/// Spaces and the like stand as `\040`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| std::str::from_utf8(digits).ok().and_then(|d| u8::from_str_radix(d, 8).ok());
        let escaped = tail.get(..3).filter(|_| *first == b'\\').and_then(octal);
        plain.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_directory_of_an_overlay_is_found() {
        let mounts = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            40 22 0:33 / /m rw,relatime shared:5 - overlay overlay rw,lowerdir=/a,upperdir=/b\\040c,workdir=/w\n\
            41 22 0:34 / /n ro - overlay overlay ro,lowerdir=/a:/b\n";
        assert_eq!(upper_of(mounts, (0, 33)), Some(PathBuf::from("/b c")));
        assert_eq!(upper_of(mounts, (0, 34)), None);
        assert_eq!(upper_of(mounts, (0, 35)), None);
        assert_eq!(unescape(b"\\0"), b"\\0");
    }

    #[test]
    fn memory_is_told_from_disks() {
        if let Ok(why) = is_volatile(Path::new("/dev/shm")) {
            assert_eq!(why.as_deref(), Some("is on a tmpfs"));
        }
        assert_eq!(is_volatile(Path::new("/proc")).expect("known"), None);
        is_volatile(Path::new("/nowhere/at/all")).expect_err("missing");
    }
}
