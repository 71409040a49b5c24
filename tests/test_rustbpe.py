"""What the Rust tokenizer promises to Python and a notebook cannot show."""

import codecs
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import rustbpe


@pytest.fixture(scope="module")
def text() -> str:
    "Two megabytes without much repetition, so that training has something to do."
    return " ".join(f"{i * 7919 % 999_983:x}" for i in range(300_000))


def interrupt_after(seconds: float) -> None:
    "Send this process the signal of Ctrl-C from a timer."
    threading.Timer(seconds, signal.raise_signal, [signal.SIGINT]).start()


def test_interrupt_while_reading():
    def endless():
        while True:
            yield "some text"

    # A job of a shell without a terminal starts with the signal ignored.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            rustbpe.Tokenizer().train_from_iterator(endless(), 300, buffer_size=64)
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.posix
def test_interrupt_while_merging(text):
    "The handler's own error comes through, and the old vocabulary stays."

    def handler(signum, frame):
        raise TimeoutError("stopped by a handler of ours")

    def texts():
        yield text
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # the text is read, now the merges

    tokenizer = rustbpe.Tokenizer()
    old = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(TimeoutError, match="handler of ours"):
            tokenizer.train_from_iterator(texts(), 60_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert tokenizer.vocab_size == 256


def test_other_threads_run_meanwhile(text):
    "A thread that needs the GIL keeps ticking while Rust encodes."
    tokenizer = rustbpe.Tokenizer()
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode_batch([text] * 4)
    during = time.perf_counter() - start
    done.set()
    thread.join()
    inside = [t for t in ticks if start < t < start + during * 0.5]
    assert inside, f"no tick in the first half of {during:.2f} s of encoding"


@pytest.mark.parametrize("items", [["fine", "fine", 3], ["fine", "fine", b"bytes"]])
def test_a_bad_item_is_named(items):
    with pytest.raises(ValueError, match="item 2 "):
        rustbpe.Tokenizer().train_from_iterator(items, 300)
    with pytest.raises(ValueError, match="item 2 "):
        rustbpe.Tokenizer().encode_batch(items)


def test_an_error_of_the_iterator_comes_through():
    def broken():
        yield "fine"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        rustbpe.Tokenizer().train_from_iterator(broken(), 300)


def test_bad_arguments():
    tokenizer = rustbpe.Tokenizer()
    for arguments, complaint in [
        (("a string", 300), "put it in a list"),
        ((["a"], 255), "at least 256"),
        ((["a"], 300, 0), "buffer_size"),
        ((["a"], 300, 1, "("), "invalid split pattern"),
        ((["a b"], 300, 1, r"\w+"), "nothing at byte 1"),
        ((["\ud800"], 300), "item 0 .*surrogates"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            tokenizer.train_from_iterator(*arguments)
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(ValueError, match="token 256 is not in a vocabulary of 256"):
            decode([256])
    with pytest.raises(ValueError, match="UTF-8 from byte 1"):
        tokenizer.decode([97, 0xE2])
    with pytest.raises(ValueError, match="'strict' or 'replace'"):
        tokenizer.decode([97], "ignore")
    ranks = tokenizer.get_mergeable_ranks()
    with pytest.raises(ValueError, match="number 0 is 1"):
        rustbpe.Tokenizer.from_ranks(ranks[1:], tokenizer.get_pattern())
    assert rustbpe.Tokenizer.from_ranks(ranks, ".").vocab_size == 256


def test_progress_is_reported_and_may_stop_the_training(text):
    seen = []
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text], 1_000, progress=lambda *a: seen.append(a))
    assert seen[0] == ("count", len(text), None)
    assert seen[1] == ("merge", 0, 744) and seen[-1] == ("merge", 744, 744)

    def refuse(kind, done, wanted):
        if kind == "merge":
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tokenizer.train_from_iterator([text], 2_000, progress=refuse)
    assert tokenizer.vocab_size == 1_000


@pytest.mark.parametrize(("size", "dtype"), [(700, "uint16"), (66_000, "uint32")])
def test_arrays(size, dtype):
    "The same ids as lists; two bytes each as long as the vocabulary allows it."
    ranks = [(bytes([b]), b) for b in range(256)]
    ranks += [(f"{i:06}".encode(), i) for i in range(256, size)]
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, r"\d{6}|(?s:.)")
    texts = ["", f"{size - 1:06} é", "plain", ""]
    ids, ends = tokenizer.encode_to_numpy(texts)
    assert ids.dtype == dtype and ends.dtype == "int64"
    rows = [tokenizer.encode(t) for t in texts]
    assert ids.tolist() == [i for row in rows for i in row]
    assert max(ids) == size - 1
    assert ends.tolist() == [sum(map(len, rows[: i + 1])) for i in range(4)]
    assert [a.size for a in tokenizer.encode_to_numpy([])] == [0, 0]


@given(st.binary(max_size=40))
@example(b"\xed\xa0\x80 half of a surrogate pair")
def test_streaming_decoder_is_pythons(data):
    """Byte by byte: the same characters at the same moment as Python's own decoder, but for
    the first two bytes of a lone surrogate, with which Python waits for the third."""
    tokenizer = rustbpe.Tokenizer()
    ours = tokenizer.stream_decoder()
    text = ""
    theirs = codecs.getincrementaldecoder("utf-8")("replace")
    expected = ""
    for byte in data:
        text += ours.push(byte)
        expected += theirs.decode(bytes([byte]))
        held = theirs.getstate()[0]
        if not (held[:1] == b"\xed" and held[1:] >= b"\xa0"):
            assert text == expected
    text = text + ours.finish()
    expected = expected + theirs.decode(b"", final=True)
    assert text == expected
    assert tokenizer.decode(list(data), "replace") == data.decode("utf-8", "replace")
    assert tokenizer.decode_bytes(list(data)) == data


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a", "^", " ", "\n", "ab", "漢", "é", "1", "'s"])
def test_a_million_of_one_kind(text):
    "Far below a second each; ten times as long takes not much more than ten times."
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        [text * 1_000], 300, pattern=rustbpe.PATTERNS["nanochat"]
    )
    long = (text * 1_000_000)[:1_000_000]
    start = time.process_time()  # on a busy machine the clock on the wall runs on
    ids = trainer.encode(long)
    assert time.process_time() - start < 3
    assert trainer.decode(ids) == long


@pytest.mark.slow
def test_training_on_a_text_without_blanks():
    "A script without blanks has chunks of any length; a merge visits places, not chunks."
    rng = random.Random(0)
    weights = [1 / k for k in range(1, 1001)]
    characters = [chr(0x4E00 + k) for k in range(1000)]
    chunk = "".join(rng.choices(characters, weights, k=1_000_000))
    start = time.process_time()
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([chunk], 30_000)
    # `rustbpe` 0.1.0, which walks over the chunk for each merge, takes 20 seconds.
    assert time.process_time() - start < 10
    assert tokenizer.decode(tokenizer.encode(chunk)) == chunk


def test_threads_may_share_a_tokenizer(text):
    "Tables are lent to one thread at a time, and never change an answer."
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text], 2_000)
    pieces = [text[i : i + 5_000] for i in range(0, 200_000, 5_000)]
    expected = [tokenizer.encode(piece) for piece in pieces]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, pieces * 3)) == expected * 3
    fresh = rustbpe.Tokenizer.from_ranks(
        tokenizer.get_mergeable_ranks(), tokenizer.get_pattern()
    )
    assert fresh.encode_batch(pieces) == expected


def test_split():
    assert rustbpe.split("I'll pay 2026!", rustbpe.PATTERNS["nanochat"]) == [
        *["I", "'ll", " pay", " ", "20", "26", "!"]
    ]
    with pytest.raises(ValueError, match="invalid split pattern"):
        rustbpe.split("x", "(")
