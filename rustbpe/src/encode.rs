//! Step 3: convert text to tokens and back.
//!
//! Inside a chunk, the adjacent pair whose merge has the lowest rank is merged first,
//! the leftmost one among equals, until no adjacent pair forms a token.
//!
//! A pair may be merged if its bytes together are a token. (This is tiktoken's rule. For
//! ranks that come from training, it is equivalent to "if this pair was learned".)

use crate::chunk::{key, Cache, ChunkMap, Pool, NONE};
use crate::{Error, Id, Pair, Result, Splitter};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A vocabulary with its split pattern.
#[derive(Debug)]
pub struct Tokenizer {
    splitter: Splitter,
    tokens: Vec<Box<[u8]>>,
    ids: ChunkMap<Box<[u8]>, Id>,
    merges: FxHashMap<Pair, Id>,
    bytes: [Id; 256],
    caches: Pool<Cache>,
}

impl Tokenizer {
    /// Build a vocabulary of the 256 bytes and one token per merge, in order.
    pub fn new(merges: Vec<Pair>, pattern: &str) -> Result<Self> {
        let mut tokens: Vec<Box<[u8]>> = (0..=255).map(|b| [b].into()).collect();
        for pair in merges {
            let part = |id: Id| {
                tokens.get(id as usize).ok_or(Error::UnknownId(id, tokens.len()))
            };
            let token = [part(pair.0)?.as_ref(), part(pair.1)?.as_ref()].concat();
            tokens.push(token.into());
        }
        Self::from_tokens(tokens, pattern)
    }

    /// Build a vocabulary from its tokens, in the order of their ids.
    pub fn from_tokens(tokens: Vec<Box<[u8]>>, pattern: &str) -> Result<Self> {
        let splitter = Splitter::new(pattern)?;
        let mut ids = ChunkMap::default();
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(first) = ids.get(token, token.len()) {
                let why = format!("tokens {first} and {id} have the same bytes");
                return Err(Error::Ranks(why));
            }
            *ids.entry(token, token.len()) = id;
        }
        let mut bytes = [0; 256];
        for (byte, id) in (0..=255_u8).zip(&mut bytes) {
            let missing =
                || Error::Ranks(format!("no token for the single byte {byte}"));
            *id = ids.get(&[byte], 1).ok_or_else(missing)?;
        }
        let merges = joins(&tokens, &ids);
        Ok(Self { splitter, tokens, ids, merges, bytes, caches: Pool::default() })
    }
}

/// Return every pair of tokens whose bytes together are a token, with that token's id.
///
/// A token is cut only where both parts have the length of some token. Looking up every
/// prefix would hash half a terabyte for one token of a megabyte.
fn joins(tokens: &[Box<[u8]>], ids: &ChunkMap<Box<[u8]>, Id>) -> FxHashMap<Pair, Id> {
    let longest = tokens.iter().map(|token| token.len()).max().unwrap_or(0);
    let mut exists = vec![false; longest + 1];
    for token in tokens {
        exists[token.len()] = true;
    }
    let lengths: Vec<usize> = (1..=longest).filter(|&n| exists[n]).collect();
    let cuts = |id: usize| {
        let token = &tokens[id];
        let pair = |&cut: &usize| {
            if !exists[token.len() - cut] {
                return None;
            }
            let (left, right) = (ids.get(token, cut)?, &token[cut..]);
            Some(((left, ids.get(right, right.len())?), id as Id))
        };
        let shorter = lengths.iter().take_while(|&&cut| cut < token.len());
        shorter.filter_map(pair).collect::<Vec<_>>()
    };
    let found: Vec<_> = (0..tokens.len()).into_par_iter().flat_map_iter(cuts).collect();
    found.into_iter().collect()
}

impl Tokenizer {
    /// Return the tokens in the order of their ids.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// Return the split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// Encode one text.
    pub fn encode(&self, text: &str) -> Result<Vec<Id>> {
        let mut out = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut out)?;
        Ok(out)
    }

    /// Encode many texts on all cores.
    pub fn encode_batch<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
    ) -> Result<Vec<Vec<Id>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    /// Encode many texts on all cores: return all ids concatenated, each converted by
    /// `pack`, and where the ids of each text end.
    pub fn encode_flat<S: AsRef<str> + Sync, T: Copy + Send + Sync>(
        &self,
        texts: &[S],
        pack: impl Fn(Id) -> T + Sync,
    ) -> Result<(Vec<T>, Vec<usize>)> {
        let rows = texts.par_iter().map_init(Vec::new, |ids, text| {
            ids.clear();
            self.encode_into(text.as_ref(), ids)?;
            Ok(ids.iter().map(|&id| pack(id)).collect())
        });
        let rows = rows.collect::<Result<Vec<Vec<T>>>>()?;
        let ends = rows.iter().scan(0, |end, row| {
            *end += row.len();
            Some(*end)
        });
        Ok((rows.concat(), ends.collect()))
    }

    /// Encode one text and append its ids to `out`.
    pub fn encode_into(&self, text: &str, out: &mut Vec<Id>) -> Result<()> {
        self.caches.lend(|cache| {
            let visit =
                |start, n| self.append(cache, &text.as_bytes()[start..], n, out);
            self.splitter.cut(text, visit)
        })
    }

    /// Append the tokens of the chunk that is the first `n` bytes of `rest`.
    #[inline(always)]
    fn append(&self, cache: &mut Cache, rest: &[u8], n: usize, out: &mut Vec<Id>) {
        let Some(key) = key(rest, n) else {
            return self.append_long(&rest[..n], out);
        };
        match self.ids.short.get(key) {
            Some(id) => out.push(id), // nearly always
            None => match cache.get(key) {
                Some(ids) => out.extend(ids.iter().take_while(|&&id| id != NONE)),
                None => self.remember(cache, key, &rest[..n], out),
            },
        }
    }

    /// Append the tokens of a chunk that is not in the cache, and store them there.
    #[inline(never)]
    fn remember(&self, cache: &mut Cache, key: u128, chunk: &[u8], out: &mut Vec<Id>) {
        let start = out.len();
        self.merge_short(chunk, out);
        let new = &out[start..];
        let mut ids = [NONE; 4];
        if let Some(places) = ids.get_mut(..new.len()) {
            places.copy_from_slice(new);
            cache.put(key, ids);
        }
    }

    /// Append the tokens of a chunk that has no key.
    #[inline(never)]
    fn append_long(&self, chunk: &[u8], out: &mut Vec<Id>) {
        match self.ids.long.get(chunk) {
            Some(&id) => out.push(id),
            None if chunk.len() <= SHORT => self.merge_short(chunk, out),
            None => self.merge_long(chunk, out),
        }
    }

    /// Return the bytes of a list of tokens, which need not be valid UTF-8.
    pub fn decode(&self, ids: &[Id]) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            let unknown = Error::UnknownId(id, self.tokens.len());
            out.extend_from_slice(self.tokens.get(id as usize).ok_or(unknown)?);
        }
        Ok(out)
    }
}

/// Chunks up to this many bytes are merged by scanning, longer ones with a heap.
const SHORT: usize = 100;

impl Tokenizer {
    /// Scan for the lowest rank, merge there, repeat: quadratic, but fastest if short.
    fn merge_short(&self, chunk: &[u8], out: &mut Vec<Id>) {
        let start = out.len();
        out.extend(chunk.iter().map(|&b| self.bytes[b as usize]));
        let rank = |a: Id, b: Id| self.merges.get(&(a, b)).copied().unwrap_or(NONE);
        // ranks[i] belongs to the pair (i, i + 1); the last id has no right neighbor.
        let mut ranks = [NONE; SHORT];
        for i in 1..chunk.len() {
            ranks[i - 1] = rank(out[start + i - 1], out[start + i]);
        }
        let mut len = chunk.len();
        while let Some((best, i)) = (0..len).map(|i| (ranks[i], i)).min() {
            if best == NONE {
                break;
            }
            out[start + i] = best;
            out.remove(start + i + 1);
            ranks.copy_within(i + 1..len, i);
            len -= 1;
            let ids = &out[start..];
            ranks[i] = if i + 1 < len { rank(ids[i], ids[i + 1]) } else { NONE };
            if i > 0 {
                ranks[i - 1] = rank(ids[i - 1], ids[i]);
            }
        }
    }
}

impl Tokenizer {
    /// Merge with a heap of candidates over a linked list: O(n log n) for any length.
    fn merge_long(&self, chunk: &[u8], out: &mut Vec<Id>) {
        let n = chunk.len();
        let mut ids: Vec<Id> = chunk.iter().map(|&b| self.bytes[b as usize]).collect();
        // Neighbors in the list; n stands for "none".
        let mut next: Vec<usize> = (1..=n).collect();
        let mut prev: Vec<usize> =
            (0..n).map(|i| i.checked_sub(1).unwrap_or(n)).collect();
        let mut alive = vec![true; n];
        let rank = |ids: &[Id], i: usize, j: usize| match (ids.get(i), ids.get(j)) {
            (Some(&a), Some(&b)) => self.merges.get(&(a, b)).copied(),
            _ => None,
        };
        let mut heap: BinaryHeap<Reverse<(Id, usize)>> = (0..n)
            .filter_map(|i| rank(&ids, i, i + 1).map(|r| Reverse((r, i))))
            .collect();
        while let Some(Reverse((best, i))) = heap.pop() {
            // Skip a stale candidate: its left part is gone or has a different neighbor.
            if !alive[i] || rank(&ids, i, next[i]) != Some(best) {
                continue;
            }
            let gone = next[i];
            ids[i] = best;
            alive[gone] = false;
            next[i] = next[gone];
            if next[i] < n {
                prev[next[i]] = i;
            }
            heap.extend(rank(&ids, i, next[i]).map(|r| Reverse((r, i))));
            let left = prev[i];
            heap.extend(rank(&ids, left, i).map(|r| Reverse((r, left))));
        }
        out.extend((0..n).filter(|&i| alive[i]).map(|i| ids[i]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Trainer, GPT4_PATTERN};

    #[test]
    fn scan_and_heap_agree() {
        let mut seed = 1_u64;
        let mut text = String::new();
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            text.push(['a', 'a', 'b', 'c', 'é'][(seed >> 33) as usize % 5]);
        }
        let mut trainer = Trainer::new(GPT4_PATTERN).unwrap();
        trainer.feed(&[&text]).unwrap();
        let tokenizer =
            Tokenizer::new(trainer.train(700).unwrap(), GPT4_PATTERN).unwrap();
        for start in (0..3800).step_by(7) {
            for len in [0, 1, 2, 3, 50, SHORT] {
                let (mut short, mut long) = (Vec::new(), Vec::new());
                let chunk = &text.as_bytes()[start..start + len];
                tokenizer.merge_short(chunk, &mut short);
                tokenizer.merge_long(chunk, &mut long);
                assert_eq!(short, long, "{chunk:?}");
            }
        }
    }
}
