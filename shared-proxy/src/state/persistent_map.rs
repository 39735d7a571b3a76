//! A hash map whose copies share what they have in common.
//!
//! A snapshot of a large mesh is followed by one that differs in a handful of objects. Copying the indexes for each of
//! them would cost as much as the mesh is large; here a copy is one counter, and a change copies only the few nodes on the
//! way to it.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// A branch has 16 children: four bits of the hash choose one.
const BITS: u32 = 4;
const FANOUT: usize = 1 << BITS;
/// A leaf that holds this many entries is divided when another one comes. Copying a leaf is what a change costs.
const LEAF: usize = 16;
/// Below this depth the hash has no bits left: leaves there grow.
const MAX_DEPTH: u32 = u64::BITS / BITS;

/// Maps keys to values. Cloning it is cheap; changing it copies what another clone shares.
pub struct PersistentMap<K, V, S = RandomState> {
    root: Arc<Node<K, V>>,
    len: usize,
    hasher: S,
}

enum Node<K, V> {
    /// Entries with their hashes, in no order.
    Leaf(Vec<(u64, K, V)>),
    Branch(Box<[Arc<Node<K, V>>; FANOUT]>),
}

fn child(hash: u64, depth: u32) -> usize {
    // Masked to four bits, so the cast loses nothing.
    ((hash >> (depth * BITS)) & (FANOUT as u64 - 1)) as usize
}

impl<K: Hash + Eq + Clone, V: Clone, S: BuildHasher> PersistentMap<K, V, S> {
    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of a key.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let mut node = &*self.root;
        let mut depth = 0;
        loop {
            match node {
                Node::Branch(children) => node = &*children[child(hash, depth)],
                Node::Leaf(entries) => {
                    return entries
                        .iter()
                        .find(|(h, k, _)| *h == hash && k.borrow() == key)
                        .map(|(_, _, value)| value);
                }
            }
            depth += 1;
        }
    }

    /// Whether a key has a value.
    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Gives a key a value. Returns the one that it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let previous = insert(Arc::make_mut(&mut self.root), 0, hash, key, value);
        self.len += usize::from(previous.is_none());
        previous
    }

    /// Takes a key out. Returns the value that it had. Branches stay divided: what grew once may grow again, and an empty leaf is small.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // Looked up first, so that nothing is copied for a key that is not there.
        if !self.contains_key(key) {
            return None;
        }
        let hash = self.hasher.hash_one(key);
        let mut node = Arc::make_mut(&mut self.root);
        let mut depth = 0;
        loop {
            match node {
                Node::Branch(children) => node = Arc::make_mut(&mut children[child(hash, depth)]),
                Node::Leaf(entries) => {
                    let at = entries
                        .iter()
                        .position(|(h, k, _)| *h == hash && k.borrow() == key)?;
                    self.len -= 1;
                    return Some(entries.swap_remove(at).2);
                }
            }
            depth += 1;
        }
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let mut pending = vec![&*self.root];
        std::iter::from_fn(move || {
            loop {
                match pending.pop()? {
                    Node::Branch(children) => pending.extend(children.iter().map(|node| &**node)),
                    Node::Leaf(entries) if entries.is_empty() => {}
                    Node::Leaf(entries) => return Some(entries.iter().map(|(_, k, v)| (k, v))),
                }
            }
        })
        .flatten()
    }
}

fn insert<K: Eq + Clone, V: Clone>(
    node: &mut Node<K, V>,
    depth: u32,
    hash: u64,
    key: K,
    value: V,
) -> Option<V> {
    let entries = match node {
        Node::Branch(children) => {
            let node = Arc::make_mut(&mut children[child(hash, depth)]);
            return insert(node, depth + 1, hash, key, value);
        }
        Node::Leaf(entries) => entries,
    };
    let same = |(h, k, _): &&mut (u64, K, V)| *h == hash && *k == key;
    if let Some((_, _, present)) = entries.iter_mut().find(same) {
        return Some(std::mem::replace(present, value));
    }
    entries.push((hash, key, value));
    if entries.len() > LEAF && depth < MAX_DEPTH {
        let mut children: [Vec<_>; FANOUT] = std::array::from_fn(|_| Vec::new());
        for entry in entries.drain(..) {
            children[child(entry.0, depth)].push(entry);
        }
        *node = Node::Branch(Box::new(children.map(|leaf| Arc::new(Node::Leaf(leaf)))));
    }
    None
}

impl<K: Clone, V: Clone> Clone for Node<K, V> {
    fn clone(&self) -> Self {
        match self {
            Self::Leaf(entries) => Self::Leaf(entries.clone()),
            Self::Branch(children) => Self::Branch(children.clone()),
        }
    }
}

impl<K, V, S: Clone> Clone for PersistentMap<K, V, S> {
    fn clone(&self) -> Self {
        Self {
            root: Arc::clone(&self.root),
            len: self.len,
            hasher: self.hasher.clone(),
        }
    }
}

impl<K, V, S: Default> Default for PersistentMap<K, V, S> {
    fn default() -> Self {
        Self {
            root: Arc::new(Node::Leaf(Vec::new())),
            len: 0,
            hasher: S::default(),
        }
    }
}

impl<K, V, S> fmt::Debug for PersistentMap<K, V, S>
where
    K: Hash + Eq + Clone + fmt::Debug,
    V: Clone + fmt::Debug,
    S: BuildHasher,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests;
