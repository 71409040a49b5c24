//! Byte pair encoding in four steps, each in its own file.
//!
//! 1. [`split`] cuts text into chunks that no token may cross.
//! 2. [`train`] counts the chunks and learns merges, the most frequent pair first.
//! 3. [`encode`] applies the merges to new text, and decodes tokens.
//! 4. [`decode`] turns bytes that arrive in pieces into whole characters.
//!
//! ```
//! use rustbpe::{Tokenizer, Trainer, NANOCHAT_PATTERN};
//!
//! let mut trainer = Trainer::new(NANOCHAT_PATTERN)?;
//! trainer.feed(&["low lower lowest", "slow slower slowest"])?;
//! let tokenizer = Tokenizer::new(trainer.train(256 + 3)?, NANOCHAT_PATTERN)?;
//!
//! let ids = tokenizer.encode("slowly")?;
//! assert_eq!(ids.len(), 4); // "s", "low", "l", "y"
//! assert_eq!(tokenizer.decode(&ids)?, b"slowly");
//! # Ok::<(), rustbpe::Error>(())
//! ```
//!
//! The feature `python` adds the extension module that Python imports as `rustbpe`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod chunk;
pub mod decode;
pub mod encode;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod train;

pub use decode::Utf8Stream;
pub use encode::Tokenizer;
pub use split::{
    Splitter, CL100K_PATTERN, GPT2_PATTERN, GPT4_PATTERN, NANOCHAT_PATTERN, PATTERNS,
};
pub use train::Trainer;

use std::fmt;

/// The id of a token: bytes are 0 to 255, the k-th merge is 256 + k.
pub type Id = u32;

/// Two adjacent tokens.
pub type Pair = (Id, Id);

/// Everything that can go wrong. Nothing in this crate panics on its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern is not a valid regular expression.
    Pattern(String),
    /// The regex engine gave up on a text, for instance after too much backtracking.
    Split(String),
    /// The pattern matches nothing at this byte of a text, which would be lost.
    Gap(usize),
    /// A vocabulary must hold at least the 256 bytes and at most `u32::MAX` tokens.
    VocabSize(usize),
    /// The distinct chunks of the text have this many bytes, but 2^32 is the limit.
    Chunks(usize),
    /// The list of tokens cannot be a vocabulary, for the reason given.
    Ranks(String),
    /// There is no token with this number in a vocabulary of this size.
    UnknownId(Id, usize),
    /// The bytes of these tokens are not valid UTF-8 from this byte on.
    Utf8(usize),
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(why) => write!(f, "invalid split pattern: {why}"),
            Error::Split(why) => write!(f, "the split pattern failed on a text: {why}"),
            Error::Gap(at) => write!(
                f,
                "the split pattern matches nothing at byte {at} of a text; end it \
                 with an alternative for any character, such as |(?s:.)"
            ),
            Error::VocabSize(n) => write!(
                f,
                "vocab_size is {n}, but it must be at least 256 (one token per byte) \
                 and below 2^32"
            ),
            Error::Chunks(n) => write!(
                f,
                "the text has {n} bytes of distinct chunks, but training can handle only \
                 fewer than 2^32; train on less text"
            ),
            Error::Ranks(why) => write!(f, "these ranks are not a vocabulary: {why}"),
            Error::UnknownId(id, size) => {
                write!(f, "token {id} is not in a vocabulary of {size} tokens")
            }
            Error::Utf8(at) => write!(
                f,
                "the bytes of these tokens are not UTF-8 from byte {at} on; decode to \
                 bytes, or use errors='replace' for incomplete characters"
            ),
            Error::Interrupted => write!(f, "training was interrupted"),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::string::FromUtf8Error> for Error {
    fn from(error: std::string::FromUtf8Error) -> Self {
        Error::Utf8(error.utf8_error().valid_up_to())
    }
}

/// A result whose error is this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
