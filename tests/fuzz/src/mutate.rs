//! Damage.

use crate::random::Random;

/// Numbers at which lengths and ports go wrong.
const EDGES: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    u64::MAX >> 1,
    u64::MAX,
];

/// Texts at which numbers, names and paths go wrong in any format that is text.
const TEXTS: [&str; 16] = [
    "0",
    "-1",
    "65535",
    "65536",
    "4294967296",
    "18446744073709551616",
    "1e309",
    "%00",
    "\0",
    "\u{fffd}",
    "ſ",
    "İ",
    "../",
    "null",
    "::ffff:1.2.3.4",
    "10.0.0.0/33",
];

/// One change to an input.
pub(crate) fn change(random: &mut Random, input: &mut Vec<u8>, words: &[&[u8]]) {
    if input.is_empty() {
        *input = random.bytes(16);
        return;
    }
    let at = random.below(input.len());
    match random.below(12) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.byte(),
        2 => input[at] = input[at].wrapping_add(if random.one_in(2) { 1 } else { 255 }),
        3 => input.insert(at, random.byte()),
        4 => drop(input.drain(at..end(random, input, at))),
        5 => {
            let piece = input[at..end(random, input, at)].to_vec();
            put(random, input, &piece);
        }
        6 => {
            let mut piece = input[at..end(random, input, at)].to_vec();
            input.drain(at..at + piece.len());
            if random.one_in(2) {
                piece.reverse();
            }
            put(random, input, &piece);
        }
        7 => input.truncate(at),
        8 => {
            let number = random.one_of(&EDGES).to_be_bytes();
            let width = *random.one_of(&[1, 2, 4, 8]);
            for (byte, edge) in input[at..].iter_mut().zip(&number[8 - width..]) {
                *byte = *edge;
            }
        }
        9 => {
            let text = *random.one_of(&TEXTS);
            put(random, input, text.as_bytes());
        }
        10 => {
            // A number that grows in place, as lengths in text do.
            let digits = input[at..]
                .iter()
                .take_while(|c| c.is_ascii_digit())
                .count();
            let number = random.one_of(&EDGES).to_string();
            input.splice(at..at + digits, number.bytes());
        }
        _ => match words {
            [] => input.push(random.byte()),
            words => {
                let word = *random.one_of(words);
                put(random, input, word);
            }
        },
    }
}

/// The beginning of one, the end of another.
pub(crate) fn splice(random: &mut Random, first: &[u8], second: &[u8]) -> Vec<u8> {
    let (to, from) = (
        random.below(first.len() + 1),
        random.below(second.len() + 1),
    );
    [&first[..to], &second[from..]].concat()
}

fn end(random: &mut Random, input: &[u8], at: usize) -> usize {
    let longest = if random.one_in(4) { input.len() } else { 8 };
    (at + 1 + random.below(longest)).min(input.len())
}

fn put(random: &mut Random, input: &mut Vec<u8>, piece: &[u8]) {
    let at = random.below(input.len() + 1);
    input.splice(at..at, piece.iter().copied());
}
