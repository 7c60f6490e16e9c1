//! How one input becomes another: a few small changes, of the kinds that break parsers.

use crate::chance::Chance;

/// Numbers at which lengths and sums go wrong.
const NUMBERS: [u64; 16] = [
    0,
    1,
    7,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x0001_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Puts one of `corpus`, changed, into `input`: at most `longest` bytes.
pub(crate) fn some(corpus: &[Vec<u8>], chance: &mut Chance, longest: usize, input: &mut Vec<u8>) {
    let pick = |chance: &mut Chance| &corpus[index(chance, corpus.len())];
    input.clear();
    input.extend_from_slice(pick(chance));
    for _ in 0..1 + chance.below(6) {
        change(input, pick(chance), chance);
    }
    input.truncate(longest);
}

/// A place below `length`, or 0.
fn index(chance: &mut Chance, length: usize) -> usize {
    usize::try_from(chance.below(length.max(1) as u64)).unwrap()
}

fn change(input: &mut Vec<u8>, other: &[u8], chance: &mut Chance) {
    let at = index(chance, input.len());
    match chance.below(11) {
        // One bit, one byte.
        0 if !input.is_empty() => input[at] ^= 1 << chance.below(8),
        1 if !input.is_empty() => input[at] = chance.next().to_le_bytes()[0],
        // A number at which something may go wrong, in any width and order.
        2 | 3 => {
            let number = NUMBERS[index(chance, NUMBERS.len())].wrapping_add(chance.below(3)).wrapping_sub(1);
            let width = 1 << chance.below(4);
            let little = number.to_le_bytes();
            let big = number.to_be_bytes();
            let bytes = if chance.below(2) == 0 { &little[..width] } else { &big[8 - width..] };
            for (place, byte) in input.iter_mut().skip(at).zip(bytes) {
                *place = *byte;
            }
        }
        // Less of it.
        4 => input.truncate(at),
        5 => drop(input.drain(at..(at + 1 + index(chance, 16)).min(input.len()))),
        // More of it.
        6 => {
            let count = 1 + index(chance, 16);
            let bytes = chance.bytes(count);
            drop(input.splice(at..at, bytes));
        }
        7 => {
            let end = (at + 1 + index(chance, 64)).min(input.len());
            let again = input[at..end].to_vec();
            let at = index(chance, input.len());
            drop(input.splice(at..at, again));
        }
        // Two halves.
        8 => {
            input.truncate(at);
            input.extend_from_slice(&other[index(chance, other.len())..]);
        }
        9 => input.extend_from_slice(other),
        // Something else altogether.
        _ => {
            let count = index(chance, 64);
            let bytes = chance.bytes(count);
            input.truncate(at);
            input.extend_from_slice(&bytes);
        }
    }
}
