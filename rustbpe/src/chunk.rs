//! Short chunks as numbers: maps of chunks, and a cache of their tokens.
//!
//! Text repeats itself: a few thousand words make up most of it, and nearly all are
//! short. A chunk of at most fifteen bytes fits into one 128-bit number together with
//! its length, so hashing and comparing a chunk is arithmetic on a number.

use crate::Id;
use rustc_hash::FxHashMap;
use std::borrow::Borrow;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// Longest chunk, in bytes, that has a key.
const LONGEST: usize = 15;

/// Pack the first `n` bytes of a text, and `n` in the top byte; `None` above `LONGEST`.
#[inline]
pub(crate) fn key(rest: &[u8], n: usize) -> Option<u128> {
    if n > LONGEST {
        return None;
    }
    let window = match rest.first_chunk::<16>() {
        Some(window) => u128::from_le_bytes(*window),
        None => {
            let mut window = [0; 16];
            window[..rest.len()].copy_from_slice(rest);
            u128::from_le_bytes(window)
        }
    };
    Some((window & ((1 << (8 * n)) - 1)) | (n as u128) << (8 * LONGEST))
}

/// Unpack the bytes of a key.
pub(crate) fn unkey(key: u128) -> Box<[u8]> {
    let bytes = key.to_le_bytes();
    bytes[..bytes[LONGEST] as usize].into()
}

/// A hash map from keys that keeps insertion order, like Python's dict.
///
/// `index` is searched from a key's slot to the next free one (0); its numbers count
/// `keys` from 1. The keys that came first are the most frequent, and close together.
#[derive(Debug, Clone)]
pub(crate) struct Table<V> {
    index: Vec<u32>,
    keys: Vec<u128>,
    values: Vec<V>,
}

/// Mix all bits of a key into the few that choose one of `places` slots, a power of 2.
#[inline]
fn place(key: u128, places: usize) -> usize {
    let high = ((key >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let folded = key as u64 ^ high;
    let mixed = (folded ^ (folded >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (mixed >> 32) as usize & (places - 1)
}

impl<V: Copy + Default> Default for Table<V> {
    fn default() -> Self {
        Self { index: vec![0; 1 << 10], keys: Vec::new(), values: Vec::new() }
    }
}

impl<V: Copy + Default> Table<V> {
    /// Return the slot of a key in `index`, and its number, or 0 if it is new.
    #[inline]
    fn find(&self, key: u128) -> (usize, usize) {
        let mut at = place(key, self.index.len());
        loop {
            let number = self.index[at] as usize;
            if number == 0 || self.keys[number - 1] == key {
                return (at, number);
            }
            at = (at + 1) & (self.index.len() - 1);
        }
    }

    /// Return the value of a key.
    #[inline]
    pub fn get(&self, key: u128) -> Option<V> {
        let (_, number) = self.find(key);
        number.checked_sub(1).map(|i| self.values[i])
    }

    /// Return a key's value for modification; a new key gets the default value.
    #[inline]
    pub fn entry(&mut self, key: u128) -> &mut V {
        let (at, mut number) = self.find(key);
        if number == 0 {
            number = self.insert(key, at);
        }
        &mut self.values[number - 1]
    }

    #[inline(never)]
    fn insert(&mut self, key: u128, at: usize) -> usize {
        self.keys.push(key);
        self.values.push(V::default());
        self.index[at] = self.keys.len() as u32;
        if 2 * self.keys.len() > self.index.len() {
            self.index = vec![0; 2 * self.index.len()];
            for (number, &key) in (1..).zip(&self.keys) {
                let mut at = place(key, self.index.len());
                while self.index[at] != 0 {
                    at = (at + 1) & (self.index.len() - 1);
                }
                self.index[at] = number;
            }
        }
        self.keys.len()
    }

    /// Iterate over all keys with their values.
    pub fn iter(&self) -> impl Iterator<Item = (u128, V)> + '_ {
        self.keys.iter().copied().zip(self.values.iter().copied())
    }
}

/// A map from chunks: short ones by their key, long ones by their bytes.
#[derive(Debug, Clone)]
pub(crate) struct ChunkMap<L, V> {
    pub short: Table<V>,
    pub long: FxHashMap<L, V>,
}

impl<L, V: Copy + Default> Default for ChunkMap<L, V> {
    fn default() -> Self {
        Self { short: Table::default(), long: FxHashMap::default() }
    }
}

impl<L: Hash + Eq + Borrow<[u8]>, V: Copy + Default> ChunkMap<L, V> {
    /// Return the value of the chunk that is the first `n` bytes of `rest`.
    pub fn get(&self, rest: &[u8], n: usize) -> Option<V> {
        match key(rest, n) {
            Some(key) => self.short.get(key),
            None => self.long.get(&rest[..n]).copied(),
        }
    }

    /// Return its value for modification; a new chunk gets the default value.
    #[inline]
    pub fn entry<'t>(&mut self, rest: &'t [u8], n: usize) -> &mut V
    where
        L: From<&'t [u8]>,
    {
        match key(rest, n) {
            Some(key) => self.short.entry(key),
            None => self.long.entry(L::from(&rest[..n])).or_default(),
        }
    }
}

/// Marks the end of a list of tokens.
pub(crate) const NONE: Id = Id::MAX;

/// The tokens, at most four, of recently seen chunks that are not tokens themselves.
#[derive(Debug, Default)]
pub(crate) struct Cache(Table<[Id; 4]>);

/// A cache with this many chunks, about three megabytes, forgets them all.
const FULL: usize = 1 << 16;

impl Cache {
    /// Return the tokens of a chunk, padded with `NONE`, if they are cached.
    #[inline]
    pub fn get(&self, key: u128) -> Option<[Id; 4]> {
        self.0.get(key)
    }

    /// Store the tokens of a chunk.
    pub fn put(&mut self, key: u128, ids: [Id; 4]) {
        if self.0.keys.len() == FULL {
            self.0 = Table::default();
        }
        *self.0.entry(key) = ids;
    }
}

/// Unused tables, at most as many as threads have ever worked at the same time.
#[derive(Debug, Default)]
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T: Default> Pool<T> {
    /// Lend a table to `work`, one that has been used before if possible.
    pub fn lend<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let rested = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut table = rested.unwrap_or_default();
        let result = work(&mut table);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(table);
        result
    }

    /// Return all tables.
    pub fn into_inner(self) -> Vec<T> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
