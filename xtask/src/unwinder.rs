//! The stub for an unwinder that the Debian way links with: an archive with one object file, written byte by byte.
//!
//! A standard library without its backtrace machinery still names two functions of an unwinder. A C compiler could
//! make them, but for a foreign target there is none: so the few bytes are written here, for both machines alike.
//! Pure: a machine in, bytes out. `build_debian` calls it.

use crate::elf;

/// One function: its name and its code.
type Function = (&'static str, &'static [u8]);

/// "End of stack" (5), and an address that nobody reads (0).
const FOR_X86_64: [Function; 2] = [
    // mov eax, 5; ret
    ("_Unwind_Backtrace", &[0xb8, 5, 0, 0, 0, 0xc3]),
    // xor eax, eax; ret
    ("_Unwind_GetIP", &[0x31, 0xc0, 0xc3]),
];
const FOR_AARCH64: [Function; 2] = [
    // mov w0, #5; ret
    ("_Unwind_Backtrace", &[0xa0, 0x00, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6]),
    // mov x0, #0; ret
    ("_Unwind_GetIP", &[0x00, 0x00, 0x80, 0xd2, 0xc0, 0x03, 0x5f, 0xd6]),
];

const FILE_HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
const ALIGNMENT: usize = 16;
const PROGBITS: u32 = 1;
const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
/// Allocated, executable.
const CODE: u64 = 2 | 4;
/// A global function, as `st_info` has it.
const GLOBAL_FUNCTION: u8 = 1 << 4 | 2;
/// The section of the code, and that of the symbols' names.
const TEXT: u16 = 1;
const NAMES: u32 = 3;
/// The section that names the sections, and how many there are.
const SECTION_NAMES: u16 = 4;
/// An object without this empty section asks for an executable stack.
const SECTIONS: [&str; 6] = ["", ".text", ".symtab", ".strtab", ".shstrtab", ".note.GNU-stack"];

/// `libunwind.a` for an `e_machine`, or nothing for a machine that is not known here.
pub(crate) fn archive(machine: u16) -> Option<Vec<u8>> {
    let functions = match machine {
        elf::X86_64 => FOR_X86_64,
        elf::AARCH64 => FOR_AARCH64,
        _ => return None,
    };
    Some(wrap(&object(machine, &functions), &functions.map(|function| function.0)))
}

/// An archive with one member, and the index by which linkers find `names` in it.
fn wrap(object: &[u8], names: &[&str]) -> Vec<u8> {
    let text: Vec<u8> = names.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect();
    let mut index = Vec::new();
    let index_length = even(4 + 4 * names.len() + text.len());
    let member = 8 + MEMBER_HEADER + index_length;
    // The index is the one part of an archive whose numbers are big-endian.
    index.extend(u32::try_from(names.len()).unwrap_or_default().to_be_bytes());
    for _ in names {
        index.extend(u32::try_from(member).unwrap_or_default().to_be_bytes());
    }
    index.extend(text);
    index.resize(index_length, 0);
    let mut bytes = b"!<arch>\n".to_vec();
    bytes.extend(member_header("/", index.len()));
    bytes.extend(index);
    bytes.extend(member_header("unwind.o/", object.len()));
    bytes.extend(object);
    bytes.resize(even(bytes.len()), b'\n');
    bytes
}

const MEMBER_HEADER: usize = 60;

/// Name, time, owner, group, mode, length: no time and no owner, so that equal input gives equal bytes.
fn member_header(name: &str, length: usize) -> Vec<u8> {
    format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{length:<10}`\n", 0, 0, 0, 644).into_bytes()
}

fn even(length: usize) -> usize {
    length.next_multiple_of(2)
}

/// A relocatable file with these functions. There is nothing to relocate in them.
fn object(machine: u16, functions: &[Function]) -> Vec<u8> {
    let (mut code, mut names, mut symbols) = (Vec::new(), vec![0], vec![0; 24]);
    for (name, body) in functions {
        symbols.extend(u32::try_from(names.len()).unwrap_or_default().to_le_bytes());
        symbols.extend([GLOBAL_FUNCTION, 0]);
        symbols.extend(TEXT.to_le_bytes());
        symbols.extend((code.len() as u64).to_le_bytes());
        symbols.extend((body.len() as u64).to_le_bytes());
        names.extend(name.bytes().chain([0]));
        code.extend(*body);
        code.resize(code.len().next_multiple_of(ALIGNMENT), 0);
    }
    let mut section_names = Vec::new();
    let mut name_offsets = Vec::new();
    for name in SECTIONS {
        name_offsets.push(section_names.len());
        section_names.extend(name.bytes().chain([0]));
    }
    // Kind, flags, linked section, first global symbol, length of an entry.
    let contents: [(Vec<u8>, u32, u64, u32, u32, u64); 6] = [
        (Vec::new(), 0, 0, 0, 0, 0),
        (code, PROGBITS, CODE, 0, 0, 0),
        (symbols, SYMTAB, 0, NAMES, 1, 24),
        (names, STRTAB, 0, 0, 0, 0),
        (section_names, STRTAB, 0, 0, 0, 0),
        (Vec::new(), PROGBITS, 0, 0, 0, 0),
    ];
    let mut bytes = vec![0; FILE_HEADER];
    let mut headers = Vec::new();
    for ((content, kind, flags, link, info, entry), name) in contents.iter().zip(name_offsets) {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        let is_null = *kind == 0;
        headers.extend(u32::try_from(name).unwrap_or_default().to_le_bytes());
        headers.extend(kind.to_le_bytes());
        let offset = if is_null { 0 } else { bytes.len() as u64 };
        let alignment = if is_null { 0 } else { ALIGNMENT as u64 };
        for number in [*flags, 0, offset, content.len() as u64] {
            headers.extend(number.to_le_bytes());
        }
        headers.extend(link.to_le_bytes());
        headers.extend(info.to_le_bytes());
        headers.extend(alignment.to_le_bytes());
        headers.extend(entry.to_le_bytes());
        bytes.extend(content);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let table = bytes.len() as u64;
    bytes.extend(headers);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    // ET_REL, the machine, version 1.
    put(16, &1_u16.to_le_bytes());
    put(18, &machine.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(40, &table.to_le_bytes());
    put(52, &u16::try_from(FILE_HEADER).unwrap_or_default().to_le_bytes());
    put(58, &u16::try_from(SECTION_HEADER).unwrap_or_default().to_le_bytes());
    put(60, &u16::try_from(SECTIONS.len()).unwrap_or_default().to_le_bytes());
    put(62, &SECTION_NAMES.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::{self, QUESTION};
    use std::process::Command;

    #[test]
    fn a_machine_that_is_not_known_gets_nothing() {
        assert_eq!(archive(243), None);
    }

    #[test]
    fn the_index_points_at_the_object() {
        for machine in [elf::X86_64, elf::AARCH64] {
            let bytes = archive(machine).expect("known");
            let at = |from: usize| u32::from_be_bytes(bytes[from..from + 4].try_into().expect("four bytes"));
            assert_eq!(at(68), 2);
            let member = at(72) as usize;
            assert_eq!((&bytes[member..member + 9], at(76)), (b"unwind.o/".as_slice(), at(72)));
            assert_eq!(&bytes[member + MEMBER_HEADER..][..4], b"\x7fELF");
            let length = std::str::from_utf8(&bytes[member + 48..member + 58]).expect("digits");
            let length: usize = length.trim().parse().expect("a number");
            assert_eq!(bytes.len(), even(member + MEMBER_HEADER + length));
        }
    }

    #[test]
    fn other_tools_see_two_functions_and_no_executable_stack() {
        let Some(readelf) = util::find_program("readelf") else {
            eprintln!("SKIP: readelf missing");
            return;
        };
        for machine in [elf::X86_64, elf::AARCH64] {
            let file = std::env::temp_dir().join(format!("xtask-unwinder-{}-{machine}", std::process::id()));
            std::fs::write(&file, archive(machine).expect("known")).expect("a temporary file");
            let said = util::capture("test", Command::new(&readelf).args(["-sSW"]).arg(&file), QUESTION);
            std::fs::remove_file(&file).expect("it was there");
            let said = said.expect("it runs");
            assert_eq!((said.status.code(), said.stderr.as_str()), (Some(0), ""), "{}", said.stdout);
            for what in ["FUNC    GLOBAL DEFAULT    1 _Unwind_Backtrace", "1 _Unwind_GetIP", ".note.GNU-stack"] {
                assert!(said.stdout.contains(what), "{}", said.stdout);
            }
        }
    }
}
