//! Every scanner cuts any text as the regex engine does.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{Splitter, PATTERNS};

fuzz_target!(|text: &str| {
    for (name, pattern) in PATTERNS {
        let chunks = |splitter: rustbpe::Result<Splitter>| {
            let mut chunks = Vec::new();
            let splitter = splitter.expect("a pattern of the crate compiles");
            let done = splitter.for_each(text, |chunk| chunks.push(chunk));
            done.map(|()| chunks)
        };
        let ours = chunks(Splitter::new(pattern)).expect("the scanner never fails");
        // The engine may give up on a long run of blanks; then there is nothing to compare.
        if let Ok(theirs) = chunks(Splitter::with_regex(pattern)) {
            assert_eq!(ours, theirs, "{name}: {text:?}");
        }
    }
});
