//! As much of ELF as it takes to tell a static executable from one that needs something.
//!
//! Pure: bytes in, facts out. `build` calls it with its product. Only 64-bit little-endian files are read; every
//! offset is checked, a file that lies about itself is refused.

/// `e_machine` of x86_64.
pub(crate) const X86_64: u16 = 62;
/// `e_machine` of aarch64.
pub(crate) const AARCH64: u16 = 183;

const ET_EXEC: u64 = 2;
const ET_DYN: u64 = 3;
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DYNAMIC_ENTRY: usize = 16;

/// What an executable says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Elf {
    /// `ET_EXEC` or `ET_DYN` with an entry point, named.
    pub(crate) kind: Kind,
    /// `e_machine`.
    pub(crate) machine: u16,
    /// The program that the kernel starts in its stead (`PT_INTERP`): the dynamic linker.
    pub(crate) interpreter: Option<String>,
    /// How many libraries it asks for (`DT_NEEDED`).
    pub(crate) needed: usize,
}

/// The two kinds of executables.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Kind {
    /// `ET_EXEC`: runs at a fixed address.
    Fixed,
    /// `ET_DYN`: runs at any address.
    Pie,
}

/// Reads the headers of an executable. The error is what is wrong with the file.
pub(crate) fn parse(bytes: &[u8]) -> Result<Elf, &'static str> {
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF file");
    }
    let kind = match number(bytes, 16, 2)? {
        ET_EXEC => Kind::Fixed,
        ET_DYN => Kind::Pie,
        _ => return Err("neither ET_EXEC nor ET_DYN"),
    };
    if number(bytes, 24, 8)? == 0 {
        return Err("no entry point: a library");
    }
    let machine = u16::try_from(number(bytes, 18, 2)?).map_err(|_| "machine out of range")?;
    let (table, size, count) = (place(bytes, 32, 8)?, place(bytes, 54, 2)?, place(bytes, 56, 2)?);
    let mut elf = Elf { kind, machine, interpreter: None, needed: 0 };
    for index in 0..count {
        let header =
            size.checked_mul(index).and_then(|skip| skip.checked_add(table)).ok_or("program header overflow")?;
        let header = bytes.get(header..).ok_or("program header outside the file")?;
        match number(header, 0, 4)? {
            PT_INTERP => {
                let text = String::from_utf8_lossy(segment(bytes, header)?);
                elf.interpreter = Some(text.trim_end_matches('\0').to_owned());
            }
            PT_DYNAMIC => elf.needed += needed(segment(bytes, header)?)?,
            _ => {}
        }
    }
    Ok(elf)
}

/// How many `DT_NEEDED` a dynamic section holds before its end mark.
fn needed(section: &[u8]) -> Result<usize, &'static str> {
    let mut count = 0;
    for entry in section.chunks_exact(DYNAMIC_ENTRY) {
        match number(entry, 0, 8)? {
            DT_NULL => break,
            DT_NEEDED => count += 1,
            _ => {}
        }
    }
    Ok(count)
}

/// The bytes in the file that a program header describes.
fn segment<'a>(bytes: &'a [u8], header: &[u8]) -> Result<&'a [u8], &'static str> {
    let (start, length) = (place(header, 8, 8)?, place(header, 32, 8)?);
    let end = start.checked_add(length).ok_or("segment overflow")?;
    bytes.get(start..end).ok_or("segment outside the file")
}

/// A number that is a place or a length in the file.
fn place(bytes: &[u8], offset: usize, length: usize) -> Result<usize, &'static str> {
    usize::try_from(number(bytes, offset, length)?).map_err(|_| "offset out of range")
}

/// A little-endian number of `length` bytes.
fn number(bytes: &[u8], offset: usize, length: usize) -> Result<u64, &'static str> {
    let field = bytes.get(offset..offset + length).ok_or("file ends inside a header")?;
    Ok(field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;

    /// An executable with these segments (type, content) and nothing else.
    fn file(kind: u8, segments: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(HEADER, 0);
        bytes[16] = kind;
        bytes[18] = 62;
        bytes[24] = 1;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(segments.len()).expect("few segments");
        let mut offset = HEADER + PROGRAM_HEADER * segments.len();
        for (kind, content) in segments {
            let mut header = vec![0; PROGRAM_HEADER];
            header[0] = *kind;
            header[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            offset += content.len();
            bytes.extend(header);
        }
        segments.iter().for_each(|(_, content)| bytes.extend(*content));
        bytes
    }

    fn dynamic(tags: &[u64]) -> Vec<u8> {
        tags.iter().flat_map(|tag| [tag.to_le_bytes(), [0; 8]].concat()).collect()
    }

    #[test]
    fn a_static_executable_needs_nothing() {
        let expected = Elf { kind: Kind::Fixed, machine: X86_64, interpreter: None, needed: 0 };
        assert_eq!(parse(&file(2, &[(1, b"code")])), Ok(expected));
    }

    #[test]
    fn a_static_pie_needs_nothing() {
        let section = dynamic(&[5, 6, 0]);
        let expected = Elf { kind: Kind::Pie, machine: X86_64, interpreter: None, needed: 0 };
        assert_eq!(parse(&file(3, &[(1, b"code"), (2, &section)])), Ok(expected));
    }

    #[test]
    fn an_interpreter_is_seen() {
        let elf = parse(&file(3, &[(3, b"/lib/ld-musl-x86_64.so.1\0")])).expect("it is well formed");
        assert_eq!(elf.interpreter.as_deref(), Some("/lib/ld-musl-x86_64.so.1"));
    }

    #[test]
    fn needed_libraries_are_counted_up_to_the_end_mark() {
        let section = dynamic(&[1, 5, 1, 0, 1]);
        assert_eq!(parse(&file(3, &[(2, &section)])).map(|elf| elf.needed), Ok(2));
    }

    #[test]
    fn what_is_no_executable_is_refused() {
        assert_eq!(parse(b"#!/bin/sh\n"), Err("not a 64-bit little-endian ELF file"));
        assert_eq!(parse(&file(1, &[])), Err("neither ET_EXEC nor ET_DYN"));
        let mut library = file(3, &[]);
        library[24] = 0;
        assert_eq!(parse(&library), Err("no entry point: a library"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_and_nothing_panics() {
        let section = dynamic(&[1, 0]);
        let whole = file(3, &[(3, b"/lib/ld\0"), (2, &section)]);
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length} bytes");
        }
        let mut lying = whole;
        lying[64 + 8..64 + 16].fill(0xff);
        assert_eq!(parse(&lying), Err("segment overflow"));
    }

    #[test]
    fn the_test_program_itself_has_an_interpreter_or_none_needed() {
        let own = std::env::current_exe().and_then(std::fs::read).expect("this program can be read");
        let elf = parse(&own).expect("this program runs");
        assert_eq!(elf.interpreter.is_some(), elf.needed > 0);
    }
}
