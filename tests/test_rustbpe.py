"""What the Rust tokenizer promises to Python and a notebook cannot show."""

import signal
import threading
import time

import pytest

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
    tokenizer, ticks, done = rustbpe.Tokenizer(), [], threading.Event()

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
    with pytest.raises(ValueError, match="token 256 is not in a vocabulary of 256"):
        tokenizer.decode([256])
    ranks = tokenizer.get_mergeable_ranks()
    with pytest.raises(ValueError, match="number 0 is 1"):
        rustbpe.Tokenizer.from_ranks(ranks[1:], tokenizer.get_pattern())
    assert rustbpe.Tokenizer.from_ranks(ranks, ".").vocab_size == 256
