//! Bytes per second of each step: `cargo bench`, or with files of yours in `BENCH_TEXT`.

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use rustbpe::{Error, Splitter, Tokenizer, Trainer, NANOCHAT_PATTERN};
use std::hint::black_box;

/// The file named in the environment, or two megabytes of made-up words with Zipf's law.
fn corpus() -> Vec<String> {
    let text = match std::env::var("BENCH_TEXT").map(std::fs::read_to_string) {
        Ok(Ok(text)) => text,
        _ => invented(2_000_000),
    };
    let chars: Vec<char> = text.chars().collect();
    chars.chunks(4000).map(|c| c.iter().collect()).collect()
}

fn invented(bytes: usize) -> String {
    let syllables = ["ka", "lo", "mi", "ter", "an", "sol", "eth", "ing", "er", "pra"];
    let mut seed = 42_u64;
    let mut text = String::new();
    while text.len() < bytes {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // A rank with density 1/rank up to e^9, written in base ten with syllables as digits.
        let uniform = (seed >> 11) as f64 / (1_u64 << 53) as f64;
        let mut rank = (9.0 * uniform).exp() as usize;
        while rank > 0 {
            text.push_str(syllables[rank % 10]);
            rank /= 10;
        }
        text.push_str(if seed % 11 == 0 { ".\n" } else { " " });
    }
    text
}

fn steps(c: &mut Criterion) -> Result<(), Error> {
    let docs = corpus();
    let mut trainer = Trainer::new(NANOCHAT_PATTERN)?;
    trainer.feed(&docs)?;
    let tokenizer = Tokenizer::new(trainer.train(4096)?, NANOCHAT_PATTERN)?;

    let mut group = c.benchmark_group("text");
    group.sample_size(10);
    let bytes = docs.iter().map(String::len).sum::<usize>() as u64;
    group.throughput(Throughput::Bytes(bytes));
    let scanner = Splitter::new(NANOCHAT_PATTERN)?;
    let regex = Splitter::with_regex(NANOCHAT_PATTERN)?;
    for (name, splitter) in [("split/scanner", &scanner), ("split/regex", &regex)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                docs.iter().try_for_each(|d| {
                    splitter.for_each(d, |chunk| {
                        black_box(chunk);
                    })
                })
            })
        });
    }
    group.bench_function("train/4096", |b| {
        b.iter(|| {
            let mut trainer = Trainer::new(NANOCHAT_PATTERN)?;
            trainer.feed(&docs)?;
            trainer.train(4096)
        })
    });
    group.bench_function("encode/one thread", |b| {
        b.iter(|| {
            docs.iter()
                .try_for_each(|d| tokenizer.encode(d).map(|ids| drop(black_box(ids))))
        })
    });
    group.bench_function("encode/batch", |b| b.iter(|| tokenizer.encode_batch(&docs)));
    group.finish();

    let mut group = c.benchmark_group("one long chunk");
    group.sample_size(10);
    for n in [10_000, 100_000, 1_000_000] {
        let text = "^".repeat(n);
        group.throughput(Throughput::Bytes(n as u64));
        group.bench_function(n.to_string(), |b| b.iter(|| tokenizer.encode(&text)));
    }
    group.finish();
    Ok(())
}

fn run(c: &mut Criterion) {
    if let Err(error) = steps(c) {
        eprintln!("{error}");
    }
}

criterion_group!(benches, run);
criterion_main!(benches);
