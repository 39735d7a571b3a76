//! Pseudo-random payload that both ends make from a seed: no pattern that compresses or repeats, nothing to keep.

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// The generator yields whole words; a block of whole words makes the stream independent of how it is read.
const BLOCK: usize = 16 * 1024;

/// An endless stream of bytes, the same for the same seed within one version of the program.
pub struct Payload {
    random: StdRng,
    block: Vec<u8>,
    used: usize,
    offset: u64,
}

impl Payload {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            block: vec![0; BLOCK],
            used: BLOCK,
            offset: 0,
        }
    }

    /// At most `wanted` further bytes of the stream; at least one if any are wanted.
    pub fn take(&mut self, wanted: usize) -> &[u8] {
        if self.used == BLOCK {
            self.random.fill_bytes(&mut self.block);
            self.used = 0;
        }
        let start = self.used;
        let length = wanted.min(BLOCK - start);
        self.used += length;
        self.offset += length as u64;
        &self.block[start..start + length]
    }

    /// Bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Compares `bytes` with what the stream continues with.
    ///
    /// # Errors
    /// The offset in the stream of the first byte that differs.
    pub fn compare(&mut self, mut bytes: &[u8]) -> Result<(), u64> {
        while !bytes.is_empty() {
            let before = self.offset;
            let expected = self.take(bytes.len());
            let (now, later) = bytes.split_at(expected.len());
            if now != expected {
                let same = now
                    .iter()
                    .zip(expected)
                    .take_while(|(found, wanted)| found == wanted)
                    .count();
                return Err(before + same as u64);
            }
            bytes = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stream_does_not_depend_on_how_it_is_cut(seed: u64, cuts in proptest::collection::vec(1_usize..40_000, 1..8)) {
            let mut source = Payload::new(seed);
            let mut check = Payload::new(seed);
            let mut whole = Vec::new();
            for cut in cuts {
                let mut left = cut;
                while left > 0 {
                    let bytes = source.take(left);
                    left -= bytes.len();
                    whole.extend_from_slice(bytes);
                }
            }
            prop_assert_eq!(check.compare(&whole), Ok(()));
            prop_assert_eq!(check.offset(), whole.len() as u64);
        }

        #[test]
        fn one_changed_byte_is_found_at_its_offset(seed: u64, length in 1_usize..40_000, at: proptest::sample::Index) {
            let mut source = Payload::new(seed);
            let mut bytes = Vec::new();
            while bytes.len() < length {
                let more = length - bytes.len();
                bytes.extend_from_slice(source.take(more));
            }
            let at = at.index(length);
            bytes[at] ^= 0x40;
            prop_assert_eq!(Payload::new(seed).compare(&bytes), Err(at as u64));
        }
    }
}
