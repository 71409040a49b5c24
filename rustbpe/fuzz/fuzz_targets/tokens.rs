//! Learn from one half of a text, encode the other half, and decode it again.
//!
//! The reference is what the crate promises: merges replayed in order on the chunks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{Id, Splitter, Tokenizer, Trainer, NANOCHAT_PATTERN};

fuzz_target!(|halves: (&str, &str)| {
    let (seen, unseen) = halves;
    for pattern in [NANOCHAT_PATTERN, "(?s).+"] {
        let mut trainer = Trainer::new(pattern).expect("the pattern compiles");
        trainer.feed(&[seen]).expect("the pattern leaves no gap");
        let merges = trainer.train(256 + 64).expect("the size is allowed");
        let tokenizer = Tokenizer::new(merges.clone(), pattern).expect("merges fit");
        let ids = tokenizer.encode(unseen).expect("any text can be encoded");
        assert_eq!(tokenizer.decode(&ids).expect("own ids"), unseen.as_bytes());

        let mut replayed = Vec::new();
        let splitter = Splitter::new(pattern).expect("the pattern compiles");
        let done = splitter.for_each(unseen, |chunk| {
            let mut word: Vec<Id> = chunk.bytes().map(Id::from).collect();
            for (pair, new) in merges.iter().zip(256..) {
                let mut i = 0;
                while i + 1 < word.len() {
                    if (word[i], word[i + 1]) == *pair {
                        word.splice(i..i + 2, [new]);
                    }
                    i += 1;
                }
            }
            replayed.extend(word);
        });
        done.expect("the pattern leaves no gap");
        assert_eq!(ids, replayed, "{pattern}: {seen:?}, then {unseen:?}");
    }
});
