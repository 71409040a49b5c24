//! Step 2: learn merges from text.
//!
//! Three phases. With N bytes of text whose different chunks have S bytes, and M merges:
//!
//! 1. **Count** every chunk: O(N), in parallel. Memory is O(S): text is not kept.
//! 2. **Index** every pair of neighbours: how often, and in which words. O(S).
//! 3. **Merge** the most frequent pair, M times. A heap finds it, the index finds its
//!    words, and only the neighbours of merged pairs change their counts.
//!
//! Ties are part of the contract: the highest count wins, and among equals the pair with
//! the smaller ids, compared left first. The result is the same for any number of
//! threads, any order of the documents, and any size of the batches given to `feed`.

use crate::chunk::{unkey, ChunkMap};
use crate::{Error, Id, Pair, Result, Splitter};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

// [trainer]
/// Counts chunks of text, then learns merges from them.
#[derive(Debug)]
pub struct Trainer {
    splitter: Splitter,
    counts: ChunkMap<Box<[u8]>, u64>,
}

/// Refuse a size that no vocabulary can have.
pub fn check(vocab_size: usize) -> Result<()> {
    if vocab_size < 256 || Id::try_from(vocab_size).is_err() {
        return Err(Error::VocabSize(vocab_size));
    }
    Ok(())
}
// [/trainer]

// [count]
impl Trainer {
    /// A trainer that has seen no text yet.
    pub fn new(pattern: &str) -> Result<Self> {
        Ok(Self { splitter: Splitter::new(pattern)?, counts: ChunkMap::default() })
    }

    /// Phase 1: split documents in parallel and add up how often each chunk occurs.
    ///
    /// Every thread counts in a map of its own, whose keys borrow from the documents.
    /// Only a chunk that the trainer has never seen is copied.
    pub fn feed<S: AsRef<str> + Sync>(&mut self, docs: &[S]) -> Result<()> {
        let per_job = docs.len().div_ceil(4 * rayon::current_num_threads()).max(1);
        let partial = docs
            .par_chunks(per_job)
            .map(|docs| self.count(docs))
            .collect::<Result<Vec<_>>>()?;
        for part in partial {
            for (key, n) in part.short {
                *self.counts.short.entry(key).or_insert(0) += n;
            }
            for (chunk, n) in part.long {
                *self.counts.entry(chunk, chunk.len()) += n;
            }
        }
        Ok(())
    }

    fn count<'t, S: AsRef<str>>(
        &self,
        docs: &'t [S],
    ) -> Result<ChunkMap<&'t [u8], u64>> {
        let mut counts = ChunkMap::default();
        for doc in docs {
            self.splitter.cut(doc.as_ref(), |rest, n| {
                *counts.entry(rest.as_bytes(), n) += 1;
            })?;
        }
        Ok(counts)
    }
}
// [/count]

// [word]
/// The different chunks as token ids, one behind the other, and how often each occurs.
#[derive(Debug, Default)]
struct Words {
    ids: Vec<Id>,
    list: Vec<Word>,
}

/// Where a chunk's ids are, and how often the chunk occurs in the text.
#[derive(Debug)]
struct Word {
    start: usize,
    len: u32,
    count: u64,
}

impl Words {
    fn push(&mut self, chunk: &[u8], count: u64) {
        let (start, len) = (self.ids.len(), chunk.len() as u32);
        self.ids.extend(chunk.iter().map(|&byte| Id::from(byte)));
        self.list.push(Word { start, len, count });
    }

    fn ids(&mut self, word: usize) -> &mut [Id] {
        let Word { start, len, .. } = self.list[word];
        &mut self.ids[start..start + len as usize]
    }
}

/// Replace each `pair` in a word by `new`, left to right; report how pair counts change
/// and return the new length.
///
/// `change(p, false)` means one `p` less in this word, `change(p, true)` one more.
fn merge(
    ids: &mut [Id],
    pair: Pair,
    new: Id,
    mut change: impl FnMut(Pair, bool),
) -> usize {
    let (a, b) = pair;
    let mut write = 0; // ids[..write] is the new word so far
    let mut read = 0;
    while read < ids.len() {
        let here = ids[read];
        if here == a && ids.get(read + 1) == Some(&b) {
            if write > 0 {
                let left = ids[write - 1];
                change((left, a), false);
                change((left, new), true);
            }
            change(pair, false);
            if let Some(&right) = ids.get(read + 2) {
                change((b, right), false);
                change((new, right), true);
            }
            ids[write] = new;
            read += 2;
        } else {
            ids[write] = here;
            read += 1;
        }
        write += 1;
    }
    write
}
// [/word]

// [index]
/// How often a pair occurs, and in which words it was ever seen.
///
/// The count is exact. The list may name a word that has lost the pair since, or one
/// word twice; merging there finds nothing and does no harm.
#[derive(Debug, Default)]
struct Entry {
    count: u64,
    words: Vec<u32>,
}

impl Entry {
    fn saw(&mut self, word: u32) {
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// Phase 2: count every pair of neighbours, weighted by the word's count.
fn index(words: &mut Words) -> FxHashMap<Pair, Entry> {
    let mut pairs: FxHashMap<Pair, Entry> = FxHashMap::default();
    for i in 0..words.list.len() {
        let count = words.list[i].count;
        for pair in words.ids(i).windows(2) {
            let entry = pairs.entry((pair[0], pair[1])).or_default();
            entry.count += count;
            entry.saw(i as u32);
        }
    }
    pairs
}
// [/index]

// [best]
/// Highest count first, then smallest pair: the order that the contract asks for.
type Heap = BinaryHeap<(u64, Reverse<Pair>)>;

/// Take the most frequent pair from the heap.
///
/// Counts of pairs in the heap only fall. So an entry that is out of date is too high,
/// comes up too early, and goes back in with its true count.
fn pop_best(heap: &mut Heap, pairs: &FxHashMap<Pair, Entry>) -> Option<Pair> {
    while let Some((count, Reverse(pair))) = heap.pop() {
        let now = pairs.get(&pair).map_or(0, |entry| entry.count);
        if now == count {
            return Some(pair);
        }
        if now > 0 {
            heap.push((now, Reverse(pair)));
        }
    }
    None
}
// [/best]

// [apply]
/// Merge `pair` in all its words, keep `pairs` true, and return the pairs born.
///
/// Only a pair that contains the new token can gain, and no such pair existed before.
fn apply(
    pair: Pair,
    new: Id,
    words: &mut Words,
    pairs: &mut FxHashMap<Pair, Entry>,
) -> FxHashMap<Pair, Entry> {
    let places = pairs.remove(&pair).unwrap_or_default().words;
    let mut born = FxHashMap::<Pair, Entry>::default();
    for i in places {
        let n = words.list[i as usize].count;
        let len = merge(words.ids(i as usize), pair, new, |changed, more| {
            if more {
                let entry = born.entry(changed).or_default();
                entry.count += n;
                entry.saw(i);
            } else if let Some(entry) = born.get_mut(&changed) {
                entry.count -= n;
            } else if let Some(entry) = pairs.get_mut(&changed) {
                entry.count -= n;
            }
        });
        words.list[i as usize].len = len as u32;
    }
    born.retain(|_, entry| entry.count > 0);
    born
}
// [/apply]

// [merge]
impl Trainer {
    /// Learn merges until there are `vocab_size` tokens, or nothing is left to merge.
    ///
    /// Returns the merges in order: the k-th one makes token 256 + k.
    pub fn train(self, vocab_size: usize) -> Result<Vec<Pair>> {
        self.train_with(vocab_size, |_| true)
    }

    /// Like `train`, and asks `go_on(merges so far)` before each merge.
    pub fn train_with(
        self,
        vocab_size: usize,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Pair>> {
        check(vocab_size)?;
        let mut words = self.words();
        let mut pairs = index(&mut words);
        let queued = |(&pair, entry): (&Pair, &Entry)| (entry.count, Reverse(pair));
        let mut heap: Heap = pairs.iter().map(queued).collect();
        let mut merges = Vec::new();
        while merges.len() < vocab_size - 256 {
            let Some(pair) = pop_best(&mut heap, &pairs) else {
                break;
            };
            if !go_on(merges.len()) {
                return Err(Error::Interrupted);
            }
            let new = (256 + merges.len()) as Id;
            merges.push(pair);
            let born = apply(pair, new, &mut words, &mut pairs);
            heap.extend(born.iter().map(queued));
            pairs.extend(born);
        }
        Ok(merges)
    }

    /// Every chunk with a pair in it. Sorted, so that the words of a pair, which share
    /// letters, are near each other in memory: the merges take a quarter less time.
    fn words(self) -> Words {
        let short = self.counts.short.into_iter().map(|(key, n)| (unkey(key), n));
        let mut counts: Vec<(Box<[u8]>, u64)> = short.chain(self.counts.long).collect();
        counts.retain(|(chunk, _)| chunk.len() > 1);
        counts.par_sort_unstable();
        let mut words = Words::default();
        for (chunk, count) in counts {
            words.push(&chunk, count);
        }
        words
    }
}
// [/merge]

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(ids: &[Id], pair: Pair) -> (Vec<Id>, Vec<(Pair, i64)>) {
        let mut ids = ids.to_vec();
        let mut net = std::collections::BTreeMap::new();
        let len = merge(&mut ids, pair, 9, |p, more| {
            *net.entry(p).or_insert(0) += if more { 1 } else { -1 };
        });
        ids.truncate(len);
        (ids, net.into_iter().filter(|&(_, n)| n != 0).collect())
    }

    #[test]
    fn merge_reports_the_change_of_every_pair() {
        let lonely = (vec![9], vec![((1, 2), -1)]);
        assert_eq!(changes(&[1, 2], (1, 2)), lonely);
        let middle =
            vec![((0, 1), -1), ((0, 9), 1), ((1, 2), -1), ((2, 3), -1), ((9, 3), 1)];
        assert_eq!(changes(&[0, 1, 2, 3], (1, 2)), (vec![0, 9, 3], middle));
        let twice = vec![((1, 2), -2), ((2, 1), -1), ((9, 9), 1)];
        assert_eq!(changes(&[1, 2, 1, 2], (1, 2)), (vec![9, 9], twice));
        // Three overlapping pairs (1, 1), of which two can merge.
        let overlap = vec![((1, 1), -3), ((9, 9), 1)];
        assert_eq!(changes(&[1, 1, 1, 1], (1, 1)), (vec![9, 9], overlap));
        let odd = vec![((1, 1), -2), ((9, 1), 1)];
        assert_eq!(changes(&[1, 1, 1], (1, 1)), (vec![9, 1], odd));
        assert_eq!(changes(&[1, 3], (1, 2)), (vec![1, 3], vec![]));
        assert_eq!(changes(&[], (1, 2)), (vec![], vec![]));
    }

    #[test]
    fn counts_beyond_32_bits_decide() -> Result<()> {
        let mut trainer = Trainer::new(crate::GPT4_PATTERN)?;
        *trainer.counts.entry(b"zz", 2) = u64::from(u32::MAX) + 2;
        *trainer.counts.entry(b"aa", 2) = u64::from(u32::MAX) + 1;
        assert_eq!(trainer.train(258)?, [(122, 122), (97, 97)]);
        Ok(())
    }
}
