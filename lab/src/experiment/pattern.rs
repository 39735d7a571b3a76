//! What is said on a connection: bytes that depend on the connection, the direction and the position, and need no memory.

/// Increment of splitmix64: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The bytes of one direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern(u64);

impl Pattern {
    /// What the client of this connection says.
    pub fn up(connection: u64) -> Self {
        Self(mix(connection.wrapping_mul(2)))
    }

    /// What the server says.
    pub fn down(connection: u64) -> Self {
        Self(mix(connection.wrapping_mul(2).wrapping_add(1)))
    }

    /// Writes the bytes from `position` on.
    pub fn fill(self, position: u64, into: &mut [u8]) {
        let mut at = position;
        let mut rest = into;
        while !rest.is_empty() {
            let word = self.word(at / 8);
            let skip = (at % 8) as usize;
            let length = rest.len().min(8 - skip);
            let (part, later) = rest.split_at_mut(length);
            part.copy_from_slice(&word[skip..skip + length]);
            rest = later;
            at += length as u64;
        }
    }

    /// The position of the first of `bytes`, which are from `position` on, that is another one than it should be.
    pub fn first_wrong(self, position: u64, bytes: &[u8]) -> Option<u64> {
        let mut at = position;
        let mut rest = bytes;
        while !rest.is_empty() {
            let word = self.word(at / 8);
            let skip = (at % 8) as usize;
            let length = rest.len().min(8 - skip);
            let (part, later) = rest.split_at(length);
            let wanted = &word[skip..skip + length];
            if part != wanted {
                let same = part.iter().zip(wanted).take_while(|(a, b)| a == b).count();
                return Some(at + same as u64);
            }
            rest = later;
            at += length as u64;
        }
        None
    }

    fn word(self, index: u64) -> [u8; 8] {
        mix(self.0.wrapping_add(index.wrapping_mul(STEP))).to_le_bytes()
    }
}

/// splitmix64's finalizer.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_do_not_depend_on_how_they_are_cut(id: u64, start in 0_u64..1 << 40, cuts in proptest::collection::vec(1_usize..300, 1..6)) {
            let whole: usize = cuts.iter().sum();
            let mut once = vec![0; whole];
            Pattern::up(id).fill(start, &mut once);
            let mut parts = Vec::new();
            for cut in cuts {
                let mut part = vec![0; cut];
                Pattern::up(id).fill(start + parts.len() as u64, &mut part);
                parts.extend(part);
            }
            prop_assert_eq!(&once, &parts);
            prop_assert_eq!(Pattern::up(id).first_wrong(start, &once), None);
        }

        #[test]
        fn a_changed_byte_is_found_where_it_is(id: u64, start in 0_u64..1 << 40, length in 1_usize..300, at: proptest::sample::Index) {
            let mut bytes = vec![0; length];
            Pattern::down(id).fill(start, &mut bytes);
            let at = at.index(length);
            bytes[at] ^= 1;
            prop_assert_eq!(Pattern::down(id).first_wrong(start, &bytes), Some(start + at as u64));
        }
    }

    /// Bytes of another connection, of the other direction or of another place are wrong ones.
    #[test]
    fn what_belongs_elsewhere_is_wrong() {
        let mut bytes = [0; 64];
        Pattern::up(7).fill(640, &mut bytes);
        assert!(Pattern::up(8).first_wrong(640, &bytes).is_some());
        assert!(Pattern::down(7).first_wrong(640, &bytes).is_some());
        assert!(Pattern::up(7).first_wrong(641, &bytes).is_some());
        assert!(Pattern::up(7).first_wrong(0, &bytes).is_some());
    }
}
