"""Train the tokenizer on the training text, the training chats and numbers.

python -m scripts.tok_train --vocab-size 65536 --max-chars 2000000000
python -m scripts.tok_train --pickle tokenizer.pkl    take over nanochat's, unexecuted
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat.common import UserError, get_base_dir, print0, run_cli, save_section
from nanochat.dataset import data_path, iter_documents
from nanochat.interop import read_pickled
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tokenizer import RustBPETokenizer

ROUND_TRIP = "Hello, world! I'm 1234 years old.\n\n\tnaïve café — 안녕 🙂 <|bos|>"


@dataclass(frozen=True)
class TokTrainConfig:
    vocab_size: int = 65_536
    """Number of tokens, the nine special ones included."""
    max_chars: int = 2_000_000_000
    """Stop reading the corpus after so many characters."""
    doc_cap: int = 10_000
    """Read at most so many characters of a document."""
    numbers: int = 10
    """Read the numbers 0 to 9,999 so often, so that pairs of digits become tokens."""
    data: str = ""
    """Corpus: embedded, hub, or a path."""
    pickle: str = ""
    """Instead of training, read the tokenizer.pkl of a nanochat run, as data."""


def corpus_texts(config: TokTrainConfig) -> Iterator[str]:
    "Yield the training documents, each cut at the cap, up to the limit in all."
    left = config.max_chars
    for text, _ in iter_documents("train", data=config.data):
        text = text[: min(config.doc_cap, left)]
        left -= len(text)
        yield text
        if left <= 0:
            return


def message_texts(conversation: dict) -> Iterator[str]:
    "Yield what is said in a conversation, tool calls included."
    for message in conversation["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts)


def chat_texts(config: TokTrainConfig) -> Iterator[str]:
    "Yield the text of the training chats, words to spell, sums and plain numbers."
    for path in sorted(data_path("chat").glob("*_train.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            yield from message_texts(json.loads(line))
    yield data_path("chat/words_train.txt").read_text("utf-8")
    for conversation in Arithmetic("train", size=2_000):
        yield from message_texts(conversation)
    for _ in range(config.numbers):
        yield " ".join(map(str, range(10_000)))


def count_text(texts: Iterator[str], seen: dict[str, int], part: str) -> Iterator[str]:
    "Pass texts on and add up their size."
    for text in texts:
        seen[part] = seen.get(part, 0) + len(text.encode("utf-8", "replace"))
        yield text


def main(config: TokTrainConfig) -> None:
    if min(config.max_chars, config.doc_cap) < 1:
        raise UserError("max_chars and doc_cap must be at least 1")
    begun, seen = time.time(), {}

    def texts() -> Iterator[str]:
        yield from count_text(corpus_texts(config), seen, "corpus")
        yield from count_text(chat_texts(config), seen, "chats and numbers")

    if config.pickle:
        tokenizer = RustBPETokenizer(*read_pickled(config.pickle))
        size = tokenizer.get_vocab_size()
    else:
        tokenizer = RustBPETokenizer.train_from_iterator(texts(), config.vocab_size)
        size = tokenizer.get_vocab_size()
        if size < config.vocab_size:
            print0(f"the text has no more pairs to merge: {size:,} tokens instead of")
            print0(f"{config.vocab_size:,}; give more text or ask for fewer tokens")
    seconds = time.time() - begun
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP)) != ROUND_TRIP:
        raise AssertionError(f"the round trip changes {ROUND_TRIP!r}")
    folder = get_base_dir() / "tokenizer"
    tokenizer.save(folder)

    lengths = tokenizer.token_bytes()[: len(tokenizer.ranks)].float()
    sample = [text for text, _ in zip(corpus_texts(config), range(1000))]
    num_tokens = sum(map(len, tokenizer.encode(sample)))
    ratio = sum(len(text.encode("utf-8", "replace")) for text in sample) / num_tokens
    numbers = sum(len(tokenizer.encode(f"{n:02}")) == 1 for n in range(100))
    read = ", ".join(f"{n / 1e6:.2f} MB of {part}" for part, n in seen.items())
    print0(f"read {read or config.pickle} in {seconds:.1f} s")
    print0(
        f"{size:,} tokens of {lengths.mean():.2f} bytes on average, at most", end=" "
    )
    print0(f"{int(lengths.max())}; {ratio:.2f} bytes per token on the corpus;", end=" ")
    print0(f"{numbers} of the numbers 00 ... 99 are tokens; the round trip holds")
    print0(f"saved in {folder}, fingerprint {tokenizer.fingerprint()[:12]}")
    save_section(
        "tok_train",
        {
            "vocab_size": size,
            "bytes_read": seen,
            "seconds": seconds,
            "token_bytes_mean": lengths.mean().item(),
            "token_bytes_std": lengths.std().item(),
            "token_bytes_max": int(lengths.max()),
            "bytes_per_token": ratio,
            "two_digit_tokens": numbers,
            "fingerprint": tokenizer.fingerprint(),
        },
    )


if __name__ == "__main__":
    run_cli(main, TokTrainConfig, "tok_train")
