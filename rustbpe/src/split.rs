//! Step 1: split text into chunks that no token may cross.
//!
//! A split pattern is a regular expression; its successive matches are the chunks. Four
//! common patterns have a hand-written scanner: one pass over the characters, without
//! backtracking, in time linear in the text. Any other pattern goes through
//! `fancy-regex`. `tests/split.rs` compares the two.
//!
//! What we tried: `fancy-regex` for everything (12 times slower in the bench `split`, and
//! it gives up on a million spaces before a letter); `char::is_alphabetic` instead of a
//! table (it tests for the property Alphabetic, which is larger than category L).

use crate::{Error, Result};
use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};
use std::sync::OnceLock;

/// GPT-2's pattern. A chunk is a word, a number or punctuation, each with the space
/// before it; tiktoken's spelling for `r50k_base` is equivalent.
pub const GPT2_PATTERN: &str = concat!(
    r"'(?:[sdmt]|ll|ve|re)",
    r"| ?\p{L}++",
    r"| ?\p{N}++",
    r"| ?[^\s\p{L}\p{N}]++",
    r"|\s++$",
    r"|\s+(?!\S)",
    r"|\s",
);

/// GPT-4's pattern, as tiktoken spells it for `cl100k_base`. White space at the end of
/// a text is one chunk, newlines or not; numbers have at most three digits.
pub const CL100K_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}++",
    r"|\p{N}{1,3}+",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+",
    r"|\s++$",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s",
);

/// GPT-4's pattern as first published, with a given number of digits in a chunk.
macro_rules! older {
    ($digits:literal) => {
        concat!(
            r"'(?i:[sdmt]|ll|ve|re)",
            r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
            r"|\p{N}{1,",
            $digits,
            r"}| ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"|\s*[\r\n]",
            r"|\s+(?!\S)",
            r"|\s+",
        )
    };
}

/// nanochat's pattern, without special treatment of the end of a text.
pub const NANOCHAT_PATTERN: &str = older!("2");

/// The same with three digits, as GPT-4's pattern was first published.
pub const GPT4_PATTERN: &str = older!("3");

/// The patterns that have a scanner, by name.
pub const PATTERNS: [(&str, &str); 4] = [
    ("gpt2", GPT2_PATTERN),
    ("cl100k", CL100K_PATTERN),
    ("gpt4", GPT4_PATTERN),
    ("nanochat", NANOCHAT_PATTERN),
];

/// What the scanner must know about a pattern.
#[derive(Debug, Clone, Copy, Default)]
struct Rules {
    /// Only a space may lead a word, and a newline is white space like any other.
    gpt2: bool,
    /// Longest run of digits in a chunk.
    max_digits: usize,
    /// White space at the end of a text is one chunk, even with newlines in it.
    whole_end: bool,
}

impl Rules {
    fn of(pattern: &str) -> Option<Self> {
        let (gpt2, max_digits, whole_end) = match pattern {
            GPT2_PATTERN => (true, usize::MAX, true),
            CL100K_PATTERN => (false, 3, true),
            NANOCHAT_PATTERN => (false, 2, false),
            GPT4_PATTERN => (false, 3, false),
            _ => return None,
        };
        Some(Self { gpt2, max_digits, whole_end })
    }
}

/// A compiled split pattern.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    Scanner(Rules),
    Regex(Box<Regex>),
}

impl Splitter {
    /// Compile a pattern, or return what is wrong with it.
    pub fn new(pattern: &str) -> Result<Self> {
        match Rules::of(pattern) {
            Some(rules) => {
                let engine = Engine::Scanner(rules);
                Ok(Self { pattern: pattern.to_string(), engine })
            }
            None => Self::with_regex(pattern),
        }
    }

    /// Compile a pattern for the regex engine, even if it has a scanner.
    pub fn with_regex(pattern: &str) -> Result<Self> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        let pattern = pattern.to_string();
        let engine = Engine::Regex(Box::new(regex));
        Ok(Self { pattern, engine })
    }

    /// Return the pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Call `visit` with every chunk of `text` in order; together they are the text.
    pub fn for_each<'t>(
        &self,
        text: &'t str,
        mut visit: impl FnMut(&'t str),
    ) -> Result<()> {
        self.cut(text, |start, n| visit(&text[start..start + n]))
    }

    /// Like `for_each`, but passes where each chunk starts and how long it is, so that
    /// `visit` may read more bytes at once than the chunk has. There is one loop for both
    /// engines: with two loops, `visit` would not be inlined into either.
    #[inline(always)]
    pub(crate) fn cut(
        &self,
        text: &str,
        mut visit: impl FnMut(usize, usize),
    ) -> Result<()> {
        let (mut scan, found) = match &self.engine {
            Engine::Scanner(rules) => (Scan::new(text, *rules), Vec::new()),
            Engine::Regex(regex) => (Scan::default(), search(regex, text)?),
        };
        let mut found = found.into_iter();
        while let Some((start, n)) = scan.next().or_else(|| found.next()) {
            visit(start, n);
        }
        Ok(())
    }
}

/// Return the start and length of every match; it is an error if there are gaps.
fn search(regex: &Regex, text: &str) -> Result<Vec<(usize, usize)>> {
    let (mut chunks, mut end) = (Vec::new(), 0);
    for found in regex.find_iter(text) {
        let found = found.map_err(|e| Error::Split(e.to_string()))?;
        if found.start() != end {
            return Err(Error::Gap(end));
        }
        if found.end() > end {
            chunks.push((end, found.end() - end));
        }
        end = found.end();
    }
    if end != text.len() {
        return Err(Error::Gap(end));
    }
    Ok(chunks)
}

/// What the patterns need to know about a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
}

/// Return one entry per code point, read from the regex engine's own tables.
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

/// Return a number with the same byte in all eight places.
const fn every(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// Set the top bit of every byte that is an ASCII letter, and no other bit.
fn letters(window: u64) -> u64 {
    let top = every(0x80);
    let lower = (window | every(0x20)) & !top; // 'A' and 'a' differ in this bit
    let from_a = lower + every(0x80 - b'a'); // a carry into the top bit means >= 'a'
    let past_z = lower + every(0x80 - b'z' - 1);
    from_a & !past_z & !window & top
}

/// Collect the top bits of eight bytes in one byte, with the first as the lowest bit.
fn gather(tops: u64) -> u64 {
    (tops >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// What is known about sixty-four bytes of text; bit i describes byte i.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    letters: u64, // an ASCII letter
    foreign: u64, // not ASCII
}

impl Block {
    #[inline(always)]
    fn new(bytes: &[u8; 64]) -> Self {
        let mut block = Self::default();
        for (i, eight) in bytes.chunks_exact(8).enumerate() {
            let eight = eight.first_chunk().copied().unwrap_or_default();
            let window = u64::from_le_bytes(eight);
            block.letters |= gather(letters(window)) << (8 * i);
            block.foreign |= gather(window & every(0x80)) << (8 * i);
        }
        block
    }

    /// Read the start of a text, padded with zeros.
    #[inline(always)]
    fn read(rest: &[u8]) -> Self {
        if let Some(bytes) = rest.first_chunk() {
            return Self::new(bytes);
        }
        let mut bytes = [0; 64];
        bytes[..rest.len()].copy_from_slice(rest);
        Self::new(&bytes)
    }
}

impl Block {
    /// Return the length of the chunk at byte `i`, where `rest` starts, if it is an ASCII
    /// word, or one mark before a space, and ends inside the block; else 0.
    #[inline(always)]
    fn chunk(&self, i: usize, rest: &[u8], rules: &Rules) -> usize {
        if i >= 64 {
            return 0;
        }
        let prefix = match rest {
            [b' ', ..] => 1,
            [b'a'..=b'z' | b'A'..=b'Z', ..] => 0,
            [first, b' ', ..] if first.is_ascii_punctuation() => return 1,
            [b'\'' | b'0'..=b'9' | b'\r' | b'\n' | 0x80.., ..] | [] => return 0,
            _ if rules.gpt2 => return 0,
            _ => 1,
        };
        let end = (!self.letters & (u64::MAX << i << prefix)).trailing_zeros() as usize;
        if end == i + prefix || end == 64 || self.foreign >> end & 1 == 1 {
            return 0; // not a word, or it may go on after the block or in non-ASCII
        }
        end - i
    }
}

/// An iterator over the chunks of a text: where each starts and how long it is.
#[derive(Debug, Default)]
struct Scan<'t> {
    text: &'t str,
    rules: Rules,
    block: Block,
    begin: usize, // of the block
    start: usize, // of the next chunk
}

impl<'t> Scan<'t> {
    #[inline(always)]
    fn new(text: &'t str, rules: Rules) -> Self {
        Self { text, rules, block: Block::read(text.as_bytes()), begin: 0, start: 0 }
    }
}

impl Iterator for Scan<'_> {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let (start, i) = (self.start, self.start - self.begin);
        let rest = &self.text.as_bytes()[start..];
        if rest.is_empty() {
            return None;
        }
        let mut n = self.block.chunk(i, rest, &self.rules);
        if n == 0 && i >= 48 {
            (self.block, self.begin) = (Block::read(rest), start);
            n = self.block.chunk(0, rest, &self.rules);
        }
        if n == 0 {
            n = scan(&self.text[start..], &self.rules);
        }
        self.start += n;
        Some((start, n))
    }
}

/// Return the length in bytes of a text's first chunk.
fn scan(text: &str, rules: &Rules) -> usize {
    let table = classes();
    let class = |c: char| table[c as usize];
    let Some(first) = text.chars().next() else {
        return 0;
    };
    let kind = class(first);

    // '(?i:[sdmt]|ll|ve|re)
    if first == '\'' {
        if let Some(n) = contraction(&text[1..], rules) {
            return 1 + n;
        }
    }
    // [^\r\n\p{L}\p{N}]?+\p{L}+ or, in GPT-2, ` ?\p{L}+`
    let prefix = match kind {
        Class::Letter | Class::Number => false,
        _ if rules.gpt2 => first == ' ',
        _ => !matches!(first, '\r' | '\n'),
    };
    if kind == Class::Letter || prefix {
        let n = run(&text[first.len_utf8()..], |c| class(c) == Class::Letter);
        if kind == Class::Letter || n > 0 {
            return first.len_utf8() + n;
        }
    }
    // \p{N}{1,max_digits} or, in GPT-2, ` ?\p{N}+`
    let blank = usize::from(first == ' ');
    let start = if rules.gpt2 { blank } else { 0 };
    let digits = text[start..].chars().take(rules.max_digits);
    let digits = digits.take_while(|&c| class(c) == Class::Number);
    let n: usize = digits.map(char::len_utf8).sum();
    if n > 0 {
        return start + n;
    }
    // ` ?[^\s\p{L}\p{N}]++[\r\n]*`, in GPT-2 without the newlines
    let n = run(&text[blank..], |c| class(c) == Class::Other);
    if n > 0 {
        let newline = |c| !rules.gpt2 && matches!(c, '\r' | '\n');
        return blank + n + run(&text[blank + n..], newline);
    }
    blanks(text, run(text, |c| class(c) == Class::Space), rules)
}

/// Return the length of the first chunk of a text that starts with `n` bytes of white
/// space: `\s++$|\s*[\r\n]|\s+(?!\S)|\s+`, where GPT-2 lacks the second alternative and
/// nanochat lacks the first.
fn blanks(text: &str, n: usize, rules: &Rules) -> usize {
    if n == text.len() && rules.whole_end {
        return n;
    }
    if !rules.gpt2 {
        if let Some(newline) = text[..n].rfind(['\r', '\n']) {
            return newline + 1;
        }
    }
    if n == text.len() {
        return n;
    }
    // The last space goes to the word after it, unless it is the only one.
    match text[..n].char_indices().next_back() {
        Some((last, _)) if last > 0 => last,
        _ => n,
    }
}

/// Return the length in bytes of a contraction's letters after the apostrophe.
fn contraction(rest: &str, rules: &Rules) -> Option<usize> {
    let fold = |c: char| if rules.gpt2 { c } else { c.to_ascii_lowercase() };
    let mut chars = rest.chars();
    let first = chars.next()?;
    // Unicode folds the long s to s, so the pattern's (?i:s) accepts it.
    let long_s = first == 'ſ' && !rules.gpt2;
    if long_s || matches!(fold(first), 's' | 'd' | 'm' | 't') {
        return Some(first.len_utf8());
    }
    let both = (fold(first), fold(chars.next()?));
    matches!(both, ('l', 'l') | ('v', 'e') | ('r', 'e')).then_some(2)
}

/// Return the length in bytes of the longest prefix whose characters are all in a set.
fn run(text: &str, set: impl Fn(char) -> bool) -> usize {
    text.find(|c| !set(c)).unwrap_or(text.len())
}
