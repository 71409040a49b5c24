//! Step 1: cut text into chunks that no token may cross.
//!
//! A split pattern is a regular expression; its matches, one after the other, are the
//! chunks. Two patterns are so common that they have a scanner of their own: one pass
//! over the characters, no backtracking, time linear in the text. Any other pattern goes
//! through `fancy-regex`. `tests/split.rs` holds the two against each other.
//!
//! What we tried: `fancy-regex` for everything (the bench `split` has it 12 times slower,
//! and it gives up on a million spaces before a letter); `char::is_alphabetic` instead of
//! a table (it asks for the property Alphabetic, more than the pattern's category L).

use crate::{Error, Result};
use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};
use std::sync::OnceLock;

// [patterns]
/// The pattern of nanochat: GPT-4's, with at most two digits in a chunk.
pub const NANOCHAT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// GPT-4's pattern as nanochat's readers know it, with at most three digits in a chunk.
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);
// [/patterns]

// [splitter]
/// A compiled split pattern.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    Scanner { max_digits: usize },
    Regex(Box<Regex>),
}

impl Splitter {
    /// Compile a pattern, or say what is wrong with it.
    pub fn new(pattern: &str) -> Result<Self> {
        let engine = match pattern {
            NANOCHAT_PATTERN => Engine::Scanner { max_digits: 2 },
            GPT4_PATTERN => Engine::Scanner { max_digits: 3 },
            _ => return Self::with_regex(pattern),
        };
        let pattern = pattern.to_string();
        Ok(Self { pattern, engine })
    }

    /// Compile a pattern for the regex engine even where a scanner exists.
    pub fn with_regex(pattern: &str) -> Result<Self> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        let pattern = pattern.to_string();
        let engine = Engine::Regex(Box::new(regex));
        Ok(Self { pattern, engine })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Call `visit` with every chunk of `text`, in order; together they are the text.
    pub fn for_each<'t>(
        &self,
        text: &'t str,
        mut visit: impl FnMut(&'t str),
    ) -> Result<()> {
        match &self.engine {
            Engine::Scanner { max_digits } => {
                let mut rest = text;
                while !rest.is_empty() {
                    let (chunk, tail) = rest.split_at(scan(rest, *max_digits));
                    visit(chunk);
                    rest = tail;
                }
            }
            Engine::Regex(regex) => {
                let mut end = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| Error::Split(e.to_string()))?;
                    if found.start() != end {
                        return Err(Error::Gap(end));
                    }
                    if found.end() > end {
                        visit(found.as_str());
                    }
                    end = found.end();
                }
                if end != text.len() {
                    return Err(Error::Gap(end));
                }
            }
        }
        Ok(())
    }
}
// [/splitter]

// [classes]
/// What the patterns want to know about a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// One entry per code point, read from the tables that the regex engine uses too.
fn classes() -> &'static [Class] {
    static TABLE: OnceLock<Vec<Class>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![Class::Other; 0x11_0000];
        for (property, class) in [
            (r"\p{L}", Class::Letter),
            (r"\p{N}", Class::Number),
            (r"\s", Class::Space),
        ] {
            if let Ok(HirKind::Class(HirClass::Unicode(set))) =
                regex_syntax::parse(property).map(|hir| hir.into_kind())
            {
                for range in set.ranges() {
                    table[range.start() as usize..=range.end() as usize].fill(class);
                }
            }
        }
        table
    })
}
// [/classes]

// [scan]
/// Length in bytes of the first chunk of a text that is not empty.
fn scan(text: &str, max_digits: usize) -> usize {
    let table = classes();
    let class = |c: char| table[c as usize];
    let Some(first) = text.chars().next() else {
        return 0;
    };
    let rest = &text[first.len_utf8()..];

    // '(?i:[sdmt]|ll|ve|re)
    if first == '\'' {
        if let Some(n) = contraction(rest) {
            return 1 + n;
        }
    }
    // [^\r\n\p{L}\p{N}]?+\p{L}+
    let kind = class(first);
    let prefix =
        !matches!(kind, Class::Letter | Class::Number) && !matches!(first, '\r' | '\n');
    if kind == Class::Letter || prefix {
        let n = run(rest, |c| class(c) == Class::Letter);
        if kind == Class::Letter || n > 0 {
            return first.len_utf8() + n;
        }
    }
    // \p{N}{1,max_digits}
    if kind == Class::Number {
        let digits = text.chars().take(max_digits);
        return digits
            .take_while(|&c| class(c) == Class::Number)
            .map(char::len_utf8)
            .sum();
    }
    // ` ?[^\s\p{L}\p{N}]++[\r\n]*`
    let space = usize::from(first == ' ');
    let n = run(&text[space..], |c| class(c) == Class::Other);
    if n > 0 {
        return space + n + run(&text[space + n..], |c| matches!(c, '\r' | '\n'));
    }
    // \s*[\r\n]|\s+(?!\S)|\s+
    blanks(text, run(text, |c| class(c) == Class::Space))
}

/// Length of the first chunk of a text that starts with `n` bytes of white space.
fn blanks(text: &str, n: usize) -> usize {
    if let Some(newline) = text[..n].rfind(['\r', '\n']) {
        return newline + 1;
    }
    if n == text.len() {
        return n;
    }
    // The last blank goes to the word behind it, unless it is the only one.
    match text[..n].char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => n,
    }
}

/// Length in bytes of an English contraction's letters after the apostrophe.
fn contraction(rest: &str) -> Option<usize> {
    let mut chars = rest.chars();
    let first = chars.next()?;
    // Unicode folds the long s to s, so the pattern's (?i:s) accepts it.
    if matches!(first.to_ascii_lowercase(), 's' | 'd' | 'm' | 't' | 'ſ') {
        return Some(first.len_utf8());
    }
    let second = chars.next()?;
    let both = (first.to_ascii_lowercase(), second.to_ascii_lowercase());
    matches!(both, ('l', 'l') | ('v', 'e') | ('r', 'e')).then_some(2)
}
// [/scan]

// [run]
/// Length in bytes of the longest prefix whose characters are all in a set.
fn run(text: &str, set: impl Fn(char) -> bool) -> usize {
    text.find(|c| !set(c)).unwrap_or(text.len())
}
// [/run]
