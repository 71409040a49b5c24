//! The crate against a trainer and an encoder that a beginner can check by eye.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rustbpe::{
    Error, Id, Pair, Splitter, Tokenizer, Trainer, GPT4_PATTERN, NANOCHAT_PATTERN,
};
use std::cmp::Reverse;
use std::collections::HashMap;

fn merge(ids: &[Id], pair: Pair, new: Id) -> Vec<Id> {
    let mut out = Vec::new();
    let mut i = 0;
    while i < ids.len() {
        let found = ids[i] == pair.0 && ids.get(i + 1) == Some(&pair.1);
        out.push(if found { new } else { ids[i] });
        i += if found { 2 } else { 1 };
    }
    out
}

fn chunks(text: &str, pattern: &str) -> Vec<Vec<Id>> {
    let mut out = Vec::new();
    let splitter = Splitter::new(pattern).unwrap();
    let visit = |chunk: &str| out.push(chunk.bytes().map(Id::from).collect());
    splitter.for_each(text, visit).unwrap();
    out
}

/// Count every pair from scratch, merge the best, repeat.
fn naive_train(docs: &[String], vocab_size: usize, pattern: &str) -> Vec<Pair> {
    let mut words: Vec<Vec<Id>> =
        docs.iter().flat_map(|d| chunks(d, pattern)).collect();
    let mut merges = Vec::new();
    while 256 + merges.len() < vocab_size {
        let mut counts: HashMap<Pair, u64> = HashMap::new();
        for pair in words.iter().flat_map(|w| w.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let best = counts.into_iter().max_by_key(|&(pair, n)| (n, Reverse(pair)));
        let Some((pair, _)) = best else { break };
        let new = (256 + merges.len()) as Id;
        words = words.iter().map(|w| merge(w, pair, new)).collect();
        merges.push(pair);
    }
    merges
}

/// Replay all merges in order.
fn naive_encode(text: &str, merges: &[Pair], pattern: &str) -> Vec<Id> {
    let mut words = chunks(text, pattern);
    for (k, &pair) in merges.iter().enumerate() {
        words = words.iter().map(|w| merge(w, pair, (256 + k) as Id)).collect();
    }
    words.concat()
}

fn train(docs: &[String], vocab_size: usize, pattern: &str) -> Vec<Pair> {
    let mut trainer = Trainer::new(pattern).unwrap();
    trainer.feed(docs).unwrap();
    trainer.train(vocab_size).unwrap()
}

/// Texts with many repeats, ties and overlaps, or with anything at all.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]{0,40}", "[abc ]{0,60}", "[a-e é\n'1]{0,60}", "\\PC{0,30}"]
}

proptest! {
    #[test]
    fn training_equals_the_naive_trainer(
        docs in prop::collection::vec(text(), 0..8),
        merges in 0_usize..40,
    ) {
        let vocab_size = 256 + merges;
        for pattern in [NANOCHAT_PATTERN, GPT4_PATTERN, "(?s).+"] {
            let ours = train(&docs, vocab_size, pattern);
            prop_assert_eq!(ours, naive_train(&docs, vocab_size, pattern));
        }
    }

    #[test]
    fn encoding_replays_the_merges(
        docs in prop::collection::vec(text(), 1..8),
        new in text(),
    ) {
        // One chunk per text makes chunks long enough for the heap, too.
        for pattern in [NANOCHAT_PATTERN, "(?s).+"] {
            let merges = train(&docs, 300, pattern);
            let tokenizer = Tokenizer::new(merges.clone(), pattern).unwrap();
            for text in [docs.concat(), new.clone(), new.repeat(9)] {
                let ids = tokenizer.encode(&text).unwrap();
                prop_assert_eq!(&ids, &naive_encode(&text, &merges, pattern));
                prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
            }
            let batch = tokenizer.encode_batch(&docs).unwrap();
            let one_by_one = docs.iter().map(|d| tokenizer.encode(d).unwrap());
            prop_assert_eq!(batch, one_by_one.collect::<Vec<_>>());
        }
    }

    #[test]
    fn neither_order_nor_batches_nor_threads_matter(
        docs in prop::collection::vec(text(), 1..30),
        cut in 0_usize..30,
    ) {
        let expected = train(&docs, 320, NANOCHAT_PATTERN);
        let mut shuffled = docs.clone();
        shuffled.reverse();
        shuffled.rotate_left(cut % docs.len());
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let merges = pool.install(|| {
                let mut trainer = Trainer::new(NANOCHAT_PATTERN).unwrap();
                for batch in shuffled.chunks(cut % 7 + 1) {
                    trainer.feed(batch).unwrap();
                }
                trainer.train(320).unwrap()
            });
            prop_assert_eq!(&merges, &expected);
        }
    }
}

fn strings(docs: &[&str]) -> Vec<String> {
    docs.iter().map(ToString::to_string).collect()
}

#[test]
fn ties_go_to_the_smaller_pair() {
    // Every pair occurs once: (a, b) before (c, d), and (x, a) last though it comes first.
    let merges = train(&strings(&["xa", "cd", "ab"]), 400, GPT4_PATTERN);
    let letters = |s: &str| (Id::from(s.as_bytes()[0]), Id::from(s.as_bytes()[1]));
    assert_eq!(merges, ["ab", "cd", "xa"].map(letters));
}

#[test]
fn overlapping_pairs_are_counted_and_merged_left_to_right() {
    // "aaaaa": (a, a) four times; then (aa, aa) and (aa, a) once each.
    let merges = train(&strings(&["aaaaa"]), 258, GPT4_PATTERN);
    assert_eq!(merges, [(97, 97), (256, 97)]);
    let tokenizer = Tokenizer::new(merges, GPT4_PATTERN).unwrap();
    assert_eq!(tokenizer.encode("aaaaa").unwrap(), [256, 257]);
}

#[test]
fn nothing_to_learn_is_no_error() {
    for docs in [&[][..], &[""], &["a"], &["", "b", ""]] {
        assert_eq!(train(&strings(docs), 300, NANOCHAT_PATTERN), []);
    }
    // A corpus can run dry before the vocabulary is full.
    assert_eq!(train(&strings(&["ab"]), 300, NANOCHAT_PATTERN).len(), 1);
}

#[test]
fn errors_say_what_is_wrong() {
    let small = Trainer::new(GPT4_PATTERN).unwrap().train(255);
    assert_eq!(small, Err(Error::VocabSize(255)));
    assert!(matches!(Trainer::new("("), Err(Error::Pattern(_))));
    let mut stopped = Trainer::new(GPT4_PATTERN).unwrap();
    stopped.feed(&["hello"]).unwrap();
    assert_eq!(stopped.train_with(300, |n| n < 2), Err(Error::Interrupted));

    let tokenizer = Tokenizer::new(vec![(97, 98)], GPT4_PATTERN).unwrap();
    assert_eq!(tokenizer.decode(&[256, 257]), Err(Error::UnknownId(257, 257)));
    let future = Tokenizer::new(vec![(97, 256)], GPT4_PATTERN);
    assert_eq!(future.err(), Some(Error::UnknownId(256, 256)));

    let mut tokens = tokenizer.tokens().to_vec();
    tokens.push(b"ab".as_slice().into());
    let twice = Tokenizer::from_tokens(tokens.clone(), GPT4_PATTERN);
    assert!(twice.unwrap_err().to_string().contains("256 and 257"));
    let no_byte = Tokenizer::from_tokens(tokens[1..257].to_vec(), GPT4_PATTERN);
    assert!(no_byte.unwrap_err().to_string().contains("single byte 0"));
}

#[test]
fn bytes_may_have_other_ids() {
    // As in GPT-2's and GPT-4's vocabularies, whose first 256 ranks are not in byte order.
    let mut tokens =
        Tokenizer::new(vec![(97, 98)], GPT4_PATTERN).unwrap().tokens().to_vec();
    tokens[..256].reverse();
    let tokenizer = Tokenizer::from_tokens(tokens, GPT4_PATTERN).unwrap();
    assert_eq!(tokenizer.encode("abb").unwrap(), [256, 255 - 98]);
}

#[test]
fn a_long_chunk_takes_no_quadratic_time() {
    let docs = strings(&["^^^^^^^^ aaaaaaaa"]);
    let tokenizer =
        Tokenizer::new(train(&docs, 262, GPT4_PATTERN), GPT4_PATTERN).unwrap();
    for text in ["^".repeat(300_000), " ".repeat(300_000), "a".repeat(300_000)] {
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
    }
}

#[test]
fn a_long_token_takes_no_quadratic_time() {
    let byte = |b: u8| -> Box<[u8]> { [b].into() };
    let long: Box<[u8]> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut tokens: Vec<_> = (0..=255).map(byte).collect();
    tokens.extend([long[..1_000_000].into(), long[1_000_000..].into(), long.clone()]);
    let start = std::time::Instant::now();
    let tokenizer = Tokenizer::from_tokens(tokens, r"(?s)[\s\S]+").unwrap();
    // Both halves are tokens, so this is a merge like any other; before, it took minutes.
    assert_eq!(tokenizer.decode(&[258]).unwrap(), *long);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
