#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use proptest::prelude::*;

use super::*;

/// Few different hashes, so that keys collide down to the last level.
#[derive(Default)]
struct Poor(u64);

impl Hasher for Poor {
    fn finish(&self) -> u64 {
        self.0 % 3
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_add(u64::from(*byte));
        }
    }
}

fn behaves_like_a_hash_map<S: BuildHasher + Default + Clone>(steps: &[(bool, u16, u32)]) {
    let mut map: PersistentMap<u16, u32, S> = PersistentMap::default();
    let mut model = HashMap::new();
    let mut older = Vec::new();
    for (at, &(put, key, value)) in steps.iter().enumerate() {
        if at % 50 == 0 {
            older.push((map.clone(), model.clone()));
        }
        if put {
            assert_eq!(map.insert(key, value), model.insert(key, value));
        } else {
            assert_eq!(map.remove(&key), model.remove(&key));
        }
        assert_eq!(map.len(), model.len());
    }
    older.push((map, model));
    // Every copy is what it was when it was made.
    for (map, model) in older {
        let entries: HashMap<u16, u32> = map.iter().map(|(k, v)| (*k, *v)).collect();
        assert_eq!(entries, model);
        assert_eq!(map.iter().count(), map.len());
        assert!(model.iter().all(|(k, v)| map.get(k) == Some(v)));
        assert_eq!(map.get(&u16::MAX), model.get(&u16::MAX));
    }
}

proptest! {
    #[test]
    fn is_a_map(steps in prop::collection::vec((prop::bool::weighted(0.7), 0u16..400, any::<u32>()), 0..1500)) {
        behaves_like_a_hash_map::<RandomState>(&steps);
    }

    #[test]
    fn is_a_map_when_hashes_collide(steps in prop::collection::vec((any::<bool>(), 0u16..80, any::<u32>()), 0..300)) {
        behaves_like_a_hash_map::<BuildHasherDefault<Poor>>(&steps);
    }
}

#[test]
fn a_change_copies_only_the_way_to_it() {
    let mut map: PersistentMap<u32, Arc<u32>> = PersistentMap::default();
    for key in 0..10_000 {
        map.insert(key, Arc::new(key));
    }
    let before = map.clone();
    map.insert(5, Arc::new(0));
    // A value in a node that was copied has two owners, one in a shared node has one.
    let copied = before.iter().filter(|(_, v)| Arc::strong_count(v) > 1);
    let copied = copied.count();
    assert!(
        (1..=LEAF).contains(&(copied + 1)),
        "{copied} entries were copied"
    );
}
