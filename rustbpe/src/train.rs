//! Step 2: learn merges from text.
//!
//! Three phases, for N bytes of text whose distinct chunks have S bytes, and M merges:
//!
//! 1. **Count** every chunk: O(N), in parallel. Memory is O(S), as text is not kept.
//! 2. **Index** every adjacent pair: how often it occurs, and in which places. O(S).
//! 3. **Merge** the most frequent pair, M times. A heap finds it, the index finds its
//!    places, and only the neighbors of merged pairs change their counts: O(S log S) in
//!    total, however long the chunks are.
//!
//! Ties are part of the contract: the highest count wins, and among equals the pair with
//! the smaller ids, compared left first. The result is the same for any number of
//! threads, any order of the documents, and any size of the batches given to `feed`.

use crate::chunk::{unkey, ChunkMap, Pool};
use crate::{Error, Id, Pair, Result, Splitter};
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem::take;

/// Counts chunks of text, then learns merges from them.
#[derive(Debug)]
pub struct Trainer {
    splitter: Splitter,
    counts: ChunkMap<Box<[u8]>, u64>,
}

/// Return an error unless a vocabulary can have this size.
pub fn check(vocab_size: usize) -> Result<()> {
    if vocab_size < 256 || Id::try_from(vocab_size).is_err() {
        return Err(Error::VocabSize(vocab_size));
    }
    Ok(())
}

impl Trainer {
    /// Create a trainer that has not seen any text yet.
    pub fn new(pattern: &str) -> Result<Self> {
        Ok(Self { splitter: Splitter::new(pattern)?, counts: ChunkMap::default() })
    }

    /// Phase 1: split documents in parallel and add up how often each chunk occurs.
    ///
    /// Every thread counts in its own map, whose long keys borrow from the
    /// documents. Only a chunk that the trainer has never seen is copied.
    pub fn feed<S: AsRef<str> + Sync>(&mut self, docs: &[S]) -> Result<()> {
        let per_job = docs.len().div_ceil(8 * rayon::current_num_threads()).max(1);
        let maps = Pool::default();
        docs.par_chunks(per_job)
            .try_for_each(|docs| maps.lend(|counts| self.count(docs, counts)))?;
        for part in maps.into_inner() {
            for (key, n) in part.short.iter() {
                *self.counts.short.entry(key) += n;
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
        counts: &mut ChunkMap<&'t [u8], u64>,
    ) -> Result<()> {
        for doc in docs {
            let bytes = doc.as_ref().as_bytes();
            let tally = |start, n| *counts.entry(&bytes[start..], n) += 1;
            self.splitter.cut(doc.as_ref(), tally)?;
        }
        Ok(())
    }
}

/// Separates words, and marks where a token started that is now part of another.
const GAP: Id = Id::MAX;

/// The distinct chunks, one after the other, with a place for every byte.
///
/// A token's id is stored in the places of its first and its last byte, so that both
/// neighbors of a pair are found in one step.
#[derive(Debug)]
struct Words {
    ids: Vec<Id>,
    counts: Vec<u64>,  // how often each word occurs in the text
    lengths: Vec<u32>, // of each token, in bytes
}

/// Where a pair starts, and in which word.
type Place = (u32, u32);

impl Words {
    fn new() -> Self {
        Self { ids: vec![GAP], counts: Vec::new(), lengths: vec![1; 256] }
    }

    /// Add a chunk, unless it is a single byte, which has no pairs.
    fn push(&mut self, chunk: &[u8], count: u64) {
        if chunk.len() > 1 {
            self.ids.extend(chunk.iter().map(|&byte| Id::from(byte)));
            self.ids.push(GAP);
            self.counts.push(count);
        }
    }

    /// Replace a pair by a new token, if the pair is still there; return where its left
    /// neighbor starts, and both neighbors, which may be a `GAP`.
    fn join(&mut self, at: u32, pair: Pair, new: Id) -> Option<(u32, Id, Id)> {
        let begin = at as usize;
        let middle = begin + self.lengths[pair.0 as usize] as usize;
        if self.ids[begin] != pair.0 || self.ids[middle] != pair.1 {
            return None;
        }
        let end = middle + self.lengths[pair.1 as usize] as usize;
        let (left, right) = (self.ids[begin - 1], self.ids[end]);
        self.ids[middle] = GAP; // no pair starts here anymore
        self.ids[begin] = new;
        self.ids[end - 1] = new;
        let before = at - self.lengths.get(left as usize).copied().unwrap_or(0);
        Some((before, left, right))
    }
}

/// How often a pair occurs, and all places where it has been seen.
///
/// The count is exact. The list may contain a place that has since lost the pair;
/// joining there finds nothing and does no harm.
#[derive(Debug, Default)]
struct Entry {
    count: u64,
    places: Vec<Place>,
}

/// Phase 2: count every adjacent pair, weighted by the word's count.
fn index(words: &Words) -> FxHashMap<Pair, Entry> {
    let mut pairs: FxHashMap<Pair, Entry> = FxHashMap::default();
    let mut word = 0;
    for (at, pair) in (0..).zip(words.ids.windows(2)) {
        match (pair[0], pair[1]) {
            (GAP, _) => {}
            (_, GAP) => word += 1,
            pair => {
                let entry = pairs.entry(pair).or_default();
                entry.count += words.counts[word as usize];
                entry.places.push((at, word));
            }
        }
    }
    pairs
}

/// Highest count first, then smallest pair: the order that the contract asks for.
type Heap = BinaryHeap<(u64, Reverse<Pair>)>;

/// Everything that a merge changes.
#[derive(Debug)]
struct Learner {
    words: Words,
    pairs: FxHashMap<Pair, Entry>,
    heap: Heap,
    floor: u64,
    beside: [Beside; 2], // neighbors of the current merges, on the left and the right
}

impl Learner {
    fn new(words: Words) -> Self {
        let pairs = index(&words);
        let floor = 1 + pairs.values().map(|entry| entry.count).max().unwrap_or(0);
        let beside = [Beside::new(256), Beside::new(256)];
        Self { words, pairs, heap: Heap::new(), floor, beside }
    }
}

impl Learner {
    /// Pop the most frequent pair.
    ///
    /// The heap holds every pair whose count is at least `floor`. Once a pair exists, its
    /// count only falls, so an outdated entry is too high: it comes up too early, and
    /// goes back in with its true count. When the heap is empty, the floor is
    /// lowered.
    fn best(&mut self) -> Option<Pair> {
        loop {
            while let Some((count, Reverse(pair))) = self.heap.pop() {
                let now = self.pairs.get(&pair).map_or(0, |entry| entry.count);
                if now == count {
                    return Some(pair);
                }
                if now >= self.floor {
                    self.heap.push((now, Reverse(pair)));
                }
            }
            if self.floor <= 1 {
                return None;
            }
            self.floor = (self.floor / 8).max(1);
            let high = |(_, entry): &(_, &Entry)| entry.count >= self.floor;
            let queued = |(&pair, entry): (_, &Entry)| (entry.count, Reverse(pair));
            self.heap.extend(self.pairs.iter().filter(high).map(queued));
        }
    }
}

/// The tokens on one side of the merges of a pair: how often each occurs, and where.
#[derive(Debug)]
struct Beside {
    entries: Vec<Entry>,
    met: Vec<Id>,
}

impl Beside {
    fn new(tokens: usize) -> Self {
        let entries = (0..tokens).map(|_| Entry::default()).collect();
        Self { entries, met: Vec::new() }
    }

    fn saw(&mut self, id: Id, place: Place, count: u64) {
        let Some(entry) = self.entries.get_mut(id as usize) else {
            return; // a gap
        };
        if entry.places.is_empty() {
            self.met.push(id);
        }
        entry.count += count;
        entry.places.push(place);
    }
}

impl Learner {
    /// Merge `pair` in all its places.
    ///
    /// Only pairs that contain the new token can gain, and none of those existed before.
    fn apply(&mut self, pair: Pair, new: Id) {
        let length = |id: Id| self.words.lengths[id as usize];
        self.words.lengths.push(length(pair.0) + length(pair.1));
        self.beside.iter_mut().for_each(|side| side.entries.push(Entry::default()));
        for (at, word) in self.pairs.remove(&pair).unwrap_or_default().places {
            if let Some((before, left, right)) = self.words.join(at, pair, new) {
                let count = self.words.counts[word as usize];
                self.beside[0].saw(left, (before, word), count);
                self.beside[1].saw(right, (at, word), count);
            }
        }
        self.settle(pair, new);
    }

    /// Update the counts: whatever was next to a part of the pair is now next to `new`.
    fn settle(&mut self, (a, b): Pair, new: Id) {
        // If two merges touch, the first was next to `a` until the second consumed it.
        let touching = self.beside[0].entries[new as usize].count;
        for id in take(&mut self.beside[0].met) {
            let entry = take(&mut self.beside[0].entries[id as usize]);
            if id != new {
                self.lose((id, a), entry.count);
            }
            self.gain((id, new), entry);
        }
        for id in take(&mut self.beside[1].met) {
            let mut entry = take(&mut self.beside[1].entries[id as usize]);
            self.lose((b, id), entry.count);
            if id == a {
                entry.count -= touching;
            }
            self.gain((new, id), entry);
        }
    }

    fn lose(&mut self, pair: Pair, count: u64) {
        if let Some(entry) = self.pairs.get_mut(&pair) {
            entry.count -= count;
        }
    }

    fn gain(&mut self, pair: Pair, entry: Entry) {
        if entry.count >= self.floor {
            self.heap.push((entry.count, Reverse(pair)));
        }
        if entry.count > 0 {
            self.pairs.insert(pair, entry);
        }
    }
}

impl Trainer {
    /// Learn merges until there are `vocab_size` tokens or nothing is left to merge.
    ///
    /// Returns the merges in order: the k-th one creates token 256 + k.
    pub fn train(self, vocab_size: usize) -> Result<Vec<Pair>> {
        self.train_with(vocab_size, |_| true)
    }

    /// Like `train`, but calls `go_on(merges so far)` before each merge; false stops.
    pub fn train_with(
        self,
        vocab_size: usize,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Pair>> {
        check(vocab_size)?;
        let mut learner = Learner::new(self.words()?);
        let mut merges = Vec::new();
        while merges.len() < vocab_size - 256 {
            let Some(pair) = learner.best() else {
                break;
            };
            if !go_on(merges.len()) {
                return Err(Error::Interrupted);
            }
            learner.apply(pair, (256 + merges.len()) as Id);
            merges.push(pair);
        }
        Ok(merges)
    }

    /// Lay out every chunk that has a pair, sorted, so that words that share a pair are
    /// near each other in memory: on 28 MB, the merges take a tenth less time.
    fn words(self) -> Result<Words> {
        // With the chunk's first byte on top, numbers sort in alphabetical order.
        let short = self.counts.short.iter().map(|(key, n)| (key.swap_bytes(), n));
        let mut short: Vec<(u128, u64)> = short.collect();
        let mut long: Vec<_> = self.counts.long.into_iter().collect();
        short.par_sort_unstable();
        long.par_sort_unstable();
        let mut words = Words::new();
        for (key, n) in short {
            words.push(&unkey(key.swap_bytes()), n);
        }
        for (chunk, n) in long {
            words.push(&chunk, n);
        }
        match u32::try_from(words.ids.len()) {
            Ok(_) => Ok(words),
            Err(_) => Err(Error::Chunks(words.ids.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Merge the pair (1, 2) or (1, 1) of one word, that occurs three times, into 256.
    fn apply(chunk: &[u8], pair: Pair) -> (Vec<Id>, Vec<(Pair, u64)>) {
        let mut words = Words::new();
        words.push(chunk, 3);
        let mut learner = Learner::new(words);
        learner.apply(pair, 256);
        let mut counts = FxHashMap::<Pair, u64>::default();
        let mut ids = Vec::new();
        let mut at = 1;
        while learner.words.ids[at] != GAP {
            ids.push(learner.words.ids[at]);
            at += learner.words.lengths[learner.words.ids[at] as usize] as usize;
        }
        for pair in ids.windows(2) {
            *counts.entry((pair[0], pair[1])).or_default() += 3;
        }
        let found = learner.pairs.into_iter().filter(|(_, entry)| entry.count > 0);
        let mut found: Vec<_> =
            found.map(|(pair, entry)| (pair, entry.count)).collect();
        let mut counts: Vec<_> = counts.into_iter().collect();
        found.sort_unstable();
        counts.sort_unstable();
        assert_eq!(found, counts, "{chunk:?}");
        (ids, found)
    }

    #[test]
    fn counts_stay_true() {
        assert_eq!(apply(&[1, 2], (1, 2)), (vec![256], vec![]));
        let middle = (vec![0, 256, 3], vec![((0, 256), 3), ((256, 3), 3)]);
        assert_eq!(apply(&[0, 1, 2, 3], (1, 2)), middle);
        assert_eq!(apply(&[1, 2, 1, 2], (1, 2)), (vec![256; 2], vec![((256, 256), 3)]));
        // Three overlapping pairs (1, 1), of which two can merge.
        assert_eq!(apply(&[1; 4], (1, 1)), (vec![256; 2], vec![((256, 256), 3)]));
        assert_eq!(apply(&[1; 3], (1, 1)), (vec![256, 1], vec![((256, 1), 3)]));
        apply(&[1, 2, 1, 2, 1, 3, 1, 2, 2, 1, 1, 2], (1, 2));
        apply(&[2, 1, 1, 1, 1, 1, 2, 1, 1, 1], (1, 1));
        apply(&[1, 3], (1, 2));
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
