//! Every scanner cuts any text as the regex engine does.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{Result, Splitter, PATTERNS};
use std::sync::LazyLock;

static RIVALS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
    let compiled = "a pattern of the crate compiles";
    let scanner = |pattern| Splitter::new(pattern).expect(compiled);
    let regex = |pattern| Splitter::with_regex(pattern).expect(compiled);
    PATTERNS.iter().map(|(_, pattern)| (scanner(pattern), regex(pattern))).collect()
});

fn chunks<'t>(splitter: &Splitter, text: &'t str) -> Result<Vec<&'t str>> {
    let mut chunks = Vec::new();
    splitter.for_each(text, |chunk| chunks.push(chunk)).map(|()| chunks)
}

fuzz_target!(|text: &str| {
    for (scanner, regex) in RIVALS.iter() {
        let ours = chunks(scanner, text).expect("the scanner never fails");
        // The engine may give up on a long run of blanks; then there is nothing to compare.
        if let Ok(theirs) = chunks(regex, text) {
            assert_eq!(ours, theirs, "{}", scanner.pattern());
        }
    }
});
