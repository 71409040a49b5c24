"""Compare the crate with tiktoken and with Python's regex on random strings.

python dev/fuzz_tokenizer.py 1000000
python dev/fuzz_tokenizer.py 1000000 --tokenizers FOLDER   also OpenAI's vocabularies

The strings are short and nasty: all planes of Unicode, combining marks, emoji sequences,
control characters, every kind of white space, digits of all scripts, contractions in both
cases. Each is tested with every pattern that has a scanner. The crate's tables are those
of Unicode 16, like tiktoken's; a newer `regex` knows more letters and digits, so strings
with a character on which the tables differ are compared only with tiktoken.
"""

import argparse
import random
import time
import unicodedata

import regex
import tiktoken

import rustbpe

NASTY = ["'s", "'S", "'ſ", "'LL", "'re", "'Ve", "don't", "I'M", "''d", "hello", "World"]
NASTY += [
    "  ",
    " \n",
    "\r\n",
    "\t\t",
    "...",
    "!?\n",
    "12345",
    "a1b2",
    "x" * 17,
    "_" * 20,
]
NASTY += [
    "👩‍🚀",
    "🏳️‍🌈",
    "👍🏽",
    "🇰🇷",
    "1️⃣",
    "e\u0301\u0323",
    "한국어",
    "漢字",
    "١٢٣",
    "Ⅷ½",
]


def alphabets() -> list[list[str]]:
    "Group all characters by kind; error-prone kinds appear more than once."
    kinds: dict[str, list[str]] = {}
    for char in (chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000):
        kinds.setdefault(unicodedata.category(char)[0], []).append(char)
    ascii_only = [chr(c) for c in range(128)]
    spaces = [chr(c) for c in range(0x3001) if chr(c).isspace()]
    return [ascii_only, ascii_only, spaces, NASTY, NASTY, NASTY, *kinds.values()]


def disputed() -> set[str]:
    "Find the characters that the crate and Python's regex put into different classes."
    found = set()
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    doubled = "".join(c * 2 + "!" for c in chars)
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        chunks = rustbpe.split(doubled, f"{kind}{{2}}|(?s:.)")
        ours = {chunk[0] for chunk in chunks if len(chunk) == 2}
        found |= ours ^ {c for c in chars if regex.match(kind, c)}
    return found


def strings(count: int, seed: int):
    "Generate strings, always the same for the same seed."
    rng = random.Random(seed)
    letters = alphabets()
    for _ in range(count):
        few = rng.choices(letters, k=3)
        pieces = (rng.choice(rng.choice(few)) for _ in range(rng.randrange(1, 24)))
        yield "".join(pieces)


def vocabularies(folder: str) -> dict[str, tuple[list[bytes], str]]:
    "Return a vocabulary for every pattern, learned from the strings or OpenAI's."
    made = {}
    for name, pattern in rustbpe.PATTERNS.items():
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(strings(20_000, 1), 4096, pattern=pattern)
        made[name] = [bytes(t) for t, _ in trainer.get_mergeable_ranks()], pattern
    if folder:
        from nanochat.tokenizer import read_pretrained

        for name in ("gpt2", "cl100k_base"):
            made[f"OpenAI's {name}"] = read_pretrained(name, folder)[:2]
    return made


def fuzz(count: int, seed: int, folder: str = "") -> dict[str, int]:
    "Compare, raising at the first difference; return the number of comparisons."
    doubtful = disputed()
    done = {"strings": 0, "ids": 0, "splits": 0}
    pairs = []
    for name, (tokens, pattern) in vocabularies(folder).items():
        ranks = {token: rank for rank, token in enumerate(tokens)}
        ours = rustbpe.Tokenizer.from_ranks(list(ranks.items()), pattern)
        peer = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        judge = regex.compile(pattern.replace("$", r"\Z"))  # $ may stop before \n there
        pairs.append((name, ours, peer, judge, pattern))
    for text in strings(count, seed):
        done["strings"] += 1
        clean = doubtful.isdisjoint(text)
        for name, ours, peer, judge, pattern in pairs:
            ids = ours.encode(text)
            if ids != peer.encode_ordinary(text) or ours.decode(ids) != text:
                raise AssertionError(f"{name} and tiktoken differ on {text!r}")
            done["ids"] += 1
            if clean:
                if rustbpe.split(text, pattern) != judge.findall(text):
                    raise AssertionError(f"{name} and regex differ on {text!r}")
                done["splits"] += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizers", default="", type=str, help="folder of .tiktoken files"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    result = fuzz(options.count, options.seed, options.tokenizers)
    took = time.perf_counter() - start
    print(
        ", ".join(f"{n:,} {what}" for what, n in result.items()),
        f"equal in {took:.0f} s",
    )
