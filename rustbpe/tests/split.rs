//! The hand-written scanner against the regular expression it stands for.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rustbpe::{Error, Splitter, NANOCHAT_PATTERN, PATTERNS};
use std::sync::LazyLock;

fn split(splitter: &Splitter, text: &str) -> Vec<String> {
    let mut out = Vec::new();
    splitter.for_each(text, |chunk| out.push(chunk.to_string())).unwrap();
    out
}

/// (scanner, regex) for every pattern that has a scanner.
static RIVALS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
    let both = |p| (Splitter::new(p).unwrap(), Splitter::with_regex(p).unwrap());
    PATTERNS.iter().map(|(_, pattern)| both(pattern)).collect()
});

/// At least one character of every kind that the patterns distinguish.
const KINDS: [char; 14] =
    ['\'', 's', 'L', 'l', 'e', '7', ' ', '\n', '\r', '\t', '!', 'ſ', '\u{a0}', 'é'];

#[test]
fn equal_on_every_short_text() {
    let mut texts = vec![String::new()];
    for _ in 0..4 {
        let longer = |t: &String| KINDS.map(|c| format!("{t}{c}"));
        texts = texts.iter().flat_map(longer).collect();
        for (scanner, regex) in RIVALS.iter() {
            for text in &texts {
                assert_eq!(split(scanner, text), split(regex, text), "{text:?}");
            }
        }
    }
}

#[test]
fn equal_on_every_character() {
    let all: Vec<char> = ('\0'..=char::MAX).collect();
    for (scanner, regex) in RIVALS.iter() {
        for block in all.chunks(4096) {
            let around = |&c: &char| ['\'', c, ' ', c, 'a', c, '1'];
            let text: String = block.iter().flat_map(around).collect();
            assert_eq!(split(scanner, &text), split(regex, &text));
        }
    }
}

/// The block of 64 bytes ends inside the word, on it, or behind it; and the word may go
/// on in another script.
#[test]
fn equal_around_the_block() {
    for (scanner, regex) in RIVALS.iter() {
        for n in (0..20).chain(60..68) {
            for first in ["", " ", "\t", "'", ",", "\n", "é"] {
                for last in ["", " ", "é", "é b", "7", ", and more text behind it"] {
                    for word in ["aZ".repeat(n / 2), "I am ".repeat(n / 4)] {
                        let text = format!("{first}{word}{last}");
                        assert_eq!(
                            split(scanner, &text),
                            split(regex, &text),
                            "{text:?}"
                        );
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn equal_on_random_texts(
        kinds in prop::collection::vec(prop::sample::select(&KINDS[..]), 0..40),
        any in "(?s).{0,40}",
        ascii in "[ -~\\n\\t]{0,80}",
    ) {
        let kinds: String = kinds.into_iter().collect();
        for (scanner, regex) in RIVALS.iter() {
            for text in [&kinds, &any, &ascii, &format!("{kinds}{any}{ascii}")] {
                let chunks = split(scanner, text);
                prop_assert_eq!(&chunks.concat(), text);
                prop_assert_eq!(chunks, split(regex, text));
            }
        }
    }
}

#[test]
fn a_lost_byte_is_an_error() {
    let words = Splitter::new(r"\w+").unwrap();
    assert_eq!(words.for_each("one two", |_| ()), Err(Error::Gap(3)));
    assert_eq!(words.for_each("one!", |_| ()), Err(Error::Gap(3)));
    assert_eq!(
        split(&Splitter::new(r"\w+|\W+").unwrap(), "one two"),
        ["one", " ", "two"]
    );
}

#[test]
fn a_million_spaces_are_two_chunks() {
    let text = " ".repeat(1_000_000) + "x";
    let scanner = Splitter::new(NANOCHAT_PATTERN).unwrap();
    assert_eq!(split(&scanner, &text), [&text[1..1_000_000], " x"]);
    let regex = Splitter::with_regex(NANOCHAT_PATTERN).unwrap();
    assert!(matches!(regex.for_each(&text, |_| ()), Err(Error::Split(_))));
}

#[test]
fn a_pattern_that_explodes_is_an_error() {
    let evil = Splitter::new(r"(?:(a|aa)+\1b|(?s:.))").unwrap();
    let result = evil.for_each(&"a".repeat(200), |_| ());
    assert!(matches!(result, Err(Error::Split(_))), "{result:?}");
}
