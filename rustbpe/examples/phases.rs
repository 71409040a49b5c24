//! Time each phase on a text of yours: `cargo run --release --example phases -- FILE`.
//!
//! A line of JSON: seconds to split, to split and count, to learn 32,768 tokens, and to
//! encode with them and with the first 2,048; and a hash of the ids. Documents in the file
//! are separated by zero bytes.

use rustbpe::{Pair, Splitter, Tokenizer, Trainer, NANOCHAT_PATTERN};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;

fn seconds<T>(action: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = action();
    (start.elapsed().as_secs_f64(), result)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().nth(1).ok_or("name a file")?;
    let text = std::fs::read_to_string(file)?;
    let docs: Vec<&str> = text.split('\0').collect();

    let splitter = Splitter::new(NANOCHAT_PATTERN)?;
    let (split, chunks) = seconds(|| {
        let mut chunks = 0_usize;
        let each = |doc: &&str| splitter.for_each(doc, |_| chunks += 1);
        docs.iter().try_for_each(each).map(|()| chunks)
    });
    let mut trainer = Trainer::new(NANOCHAT_PATTERN)?;
    let (count, fed) = seconds(|| trainer.feed(&docs));
    fed?;
    let (merge, merges) = seconds(|| trainer.train(32_768));
    let merges = merges?;
    let mut ids = Vec::new();
    let mut encode = |merges: &[Pair]| {
        let tokenizer = Tokenizer::new(merges.to_vec(), NANOCHAT_PATTERN)?;
        let each = |doc: &&str| tokenizer.encode_into(doc, &mut ids);
        let (encode, done) = seconds(|| docs.iter().try_for_each(each));
        done.map(|()| encode)
    };
    let (large, small) =
        (encode(&merges)?, encode(&merges[..merges.len().min(2048 - 256)])?);
    let mut hash = DefaultHasher::new();
    (chunks?, ids).hash(&mut hash);
    println!(
        r#"{{"split": {split}, "count": {count}, "merge": {merge}, "encode": {large}, "encode, 2,048 tokens": {small}, "hash": "{:016x}"}}"#,
        hash.finish()
    );
    Ok(())
}
