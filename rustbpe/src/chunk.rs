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
/// A table has at least 2^12 places of 32 bytes, and grows to at most 2^16, two
/// megabytes: more would push the most frequent words out of the processor's cache.
const SMALLEST: u32 = 12;
const LARGEST: u32 = 16;

/// Stands where there is no further token.
pub(crate) const NONE: Id = Id::MAX;

/// A chunk and its tokens; at most four, which is enough for nearly all.
#[derive(Debug, Clone, Copy)]
struct Slot {
    key: u128,
    ids: [Id; 4],
}

/// The tokens of the chunks met lately, each in the one place that its key gives it.
///
/// A chunk that falls on an occupied place replaces what is there: no lists, no
/// bookkeeping. Key 0 is no chunk's, since a chunk has a length.
#[derive(Debug)]
pub(crate) struct Cache {
    slots: Vec<Slot>,
    bits: u32,
    used: usize,
}

impl Cache {
    fn new(bits: u32) -> Self {
        let empty = Slot { key: 0, ids: [NONE; 4] };
        Self { slots: vec![empty; 1 << bits], bits, used: 0 }
    }

    /// Mix all bits of a key into the few that choose its place.
    fn place(&self, key: u128) -> usize {
        let high = ((key >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let folded = key as u64 ^ high;
        let mixed = (folded ^ (folded >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        (mixed >> (64 - self.bits)) as usize
    }

    /// The tokens of a chunk, filled up with `NONE`, if they are here.
    #[inline]
    pub fn get(&self, key: u128) -> Option<&[Id; 4]> {
        let slot = &self.slots[self.place(key)];
        (slot.key == key).then_some(&slot.ids)
    }

    /// Remember the tokens of a chunk. A table that is half full grows.
    pub fn put(&mut self, key: u128, ids: [Id; 4]) {
        let at = self.place(key);
        self.used += usize::from(self.slots[at].key == 0);
        self.slots[at] = Slot { key, ids };
        if 2 * self.used > self.slots.len() && self.bits < LARGEST {
            let mut larger = Self::new(self.bits + 2);
            for slot in self.slots.iter().filter(|slot| slot.key != 0) {
                larger.put(slot.key, slot.ids);
            }
            *self = larger;
        }
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
        let mut cache = rested.unwrap_or_else(|| Cache::new(SMALLEST));
        let result = work(&mut cache);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
        result
    }
}
// [/pool]
