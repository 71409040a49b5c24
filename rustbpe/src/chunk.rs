//! Short chunks as numbers: maps of chunks, and a table of what they became.
//!
//! Text repeats itself: a few thousand words make up most of it, and nearly all are
//! short. A chunk of at most fifteen bytes fits into one 128-bit number together with
//! its length, so hashing and comparing a chunk is arithmetic on a number.

use crate::Id;
use rustc_hash::FxHashMap;
use std::borrow::Borrow;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

// [key]
/// Longest chunk, in bytes, that has a key.
const LONGEST: usize = 15;

/// The first `n` bytes of a text and, in the topmost byte, `n`; none above `LONGEST`.
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

/// The bytes that a key stands for.
pub(crate) fn unkey(key: u128) -> Box<[u8]> {
    let bytes = key.to_le_bytes();
    bytes[..bytes[LONGEST] as usize].into()
}
// [/key]

// [map]
/// A map from chunks: short ones by their key, long ones by their bytes.
#[derive(Debug, Clone)]
pub(crate) struct ChunkMap<L, V> {
    pub short: FxHashMap<u128, V>,
    pub long: FxHashMap<L, V>,
}

impl<L, V> Default for ChunkMap<L, V> {
    fn default() -> Self {
        Self { short: FxHashMap::default(), long: FxHashMap::default() }
    }
}

impl<L: Hash + Eq + Borrow<[u8]>, V> ChunkMap<L, V> {
    /// The value of the first `n` bytes of `rest`.
    pub fn get(&self, rest: &[u8], n: usize) -> Option<&V> {
        match key(rest, n) {
            Some(key) => self.short.get(&key),
            None => self.long.get(&rest[..n]),
        }
    }

    /// The same to change; a chunk that is new has the default value.
    pub fn entry<'t>(&mut self, rest: &'t [u8], n: usize) -> &mut V
    where
        L: From<&'t [u8]>,
        V: Default,
    {
        match key(rest, n) {
            Some(key) => self.short.entry(key).or_default(),
            None => self.long.entry(L::from(&rest[..n])).or_default(),
        }
    }
}
// [/map]

// [cache]
/// Places in a table: 2^15 of 32 bytes are one megabyte.
const BITS: u32 = 15;

/// Stands where there is no further token.
pub(crate) const NONE: Id = Id::MAX;

/// A chunk and its tokens; at most four, which is enough for nearly all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub key: u128,
    pub ids: [Id; 4],
}

/// The tokens of the chunks met lately, each in the one place that its key gives it.
///
/// A chunk that falls on an occupied place replaces what is there: no lists, no
/// bookkeeping, and a fixed amount of memory. Key 0 is no chunk's: chunks have a length.
#[derive(Debug)]
pub(crate) struct Cache(Vec<Slot>);

impl Cache {
    fn new() -> Self {
        Self(vec![Slot { key: 0, ids: [NONE; 4] }; 1 << BITS])
    }

    /// The place of a key, whoever is there now.
    pub fn slot(&mut self, key: u128) -> &mut Slot {
        let folded =
            key as u64 ^ ((key >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (folded ^ (folded >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        &mut self.0[(mixed >> (64 - BITS)) as usize]
    }
}
// [/cache]

// [pool]
/// Tables at rest, at most as many as threads have ever encoded at once.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Cache>>);

impl Pool {
    /// Lend a table to `work`, warm if one has been used before.
    pub fn lend<T>(&self, work: impl FnOnce(&mut Cache) -> T) -> T {
        let rested = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut cache = rested.unwrap_or_else(Cache::new);
        let result = work(&mut cache);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
        result
    }
}

/// A copy starts with no tables.
impl Clone for Pool {
    fn clone(&self) -> Self {
        Self::default()
    }
}
// [/pool]
