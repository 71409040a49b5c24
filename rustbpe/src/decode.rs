//! Step 4: turn bytes that arrive in pieces into whole characters.
//!
//! A token may end in the middle of a character. A program that shows a reply while it
//! is generated must hold such bytes back until the rest arrives, but not forever: bytes
//! that can no longer become a character are replaced by U+FFFD, one for each longest
//! prefix of a character, as Unicode recommends and Python does.

/// Holds back the bytes of an unfinished character.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>, // at most three bytes between two calls
}

impl Utf8Stream {
    /// Add some bytes; return the characters that are now complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        while let Some(chunk) = rest.utf8_chunks().next() {
            text.push_str(chunk.valid());
            let bad = chunk.invalid().len();
            let end = chunk.valid().len() + bad;
            if bad > 0 && end == rest.len() && may_go_on(chunk.invalid()) {
                rest = chunk.invalid();
                break;
            }
            if bad > 0 {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            rest = &rest[end..];
        }
        self.pending = rest.to_vec();
        text
    }

    /// End the stream; return a replacement character if bytes were held back.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Return whether more bytes can complete a character; then the error has no length.
fn may_go_on(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cutting bytes in two anywhere gives the same text as the whole.
    #[test]
    fn cuts_do_not_matter() {
        let samples: [&[u8]; 6] = [
            "né \u{6f22}\u{5b57} 👩\u{200d}🚀".as_bytes(),
            b"\xff\xfe plain",
            b"\xe2\x82 cut short",
            b"\xf0\x9f\x98",
            b"\xed\xa0\x80 surrogate",
            b"\xc0\x80\xf5 never",
        ];
        for bytes in samples {
            let whole = String::from_utf8_lossy(bytes);
            for cut in 0..=bytes.len() {
                let mut stream = Utf8Stream::default();
                let mut text = stream.push(&bytes[..cut]);
                text += &stream.push(&bytes[cut..]);
                text += &stream.finish();
                assert_eq!(text, whole, "{bytes:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn nothing_comes_too_early_or_too_late() {
        let mut stream = Utf8Stream::default();
        let mut push = |byte: u8| stream.push(&[byte]);
        let euro = [0xe2, 0x82, 0xac].map(&mut push);
        assert_eq!(euro, ["", "", "€"]);
        assert_eq!([0xe2, b'x'].map(&mut push), ["", "\u{fffd}x"]);
        assert_eq!(push(0xff), "\u{fffd}");
    }
}
