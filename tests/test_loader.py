"""The stream of batches: nothing lost, nothing twice, and every position can be kept."""

import json
import os
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataloader import batches, copy_queue, prefetch, take_row, to_device
from nanochat.dataset import iter_documents
from nanochat.gpt import GPT
from nanochat.plan import model_config

CPU = torch.device("cpu")
EPOCHS = 3
WORLDS = pytest.mark.parametrize("world", range(1, 9))
FEW_PLACES = {"data": "", "places": 6}  # defaults of `packed_stream`, for small corpora
few = settings(max_examples=4, deadline=None, derandomize=True)


class Words:
    "A tokenizer for texts like `7*12`: twelve times token 7; 0 begins a document."

    def get_bos_token_id(self) -> int:
        return 0

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        split = (map(int, text.split("*")) for text in texts)
        return [[prepend, *[token] * times] for token, times in split]


def write_corpus(folder: Path, lengths: list[int | None], sizes: list[int]) -> set[str]:
    "Write documents of some lengths (None: an empty one) in files with small row groups."
    texts = ["" if n is None else f"{i + 1}*{n}" for i, n in enumerate(lengths)]
    half = len(texts) // 3
    for name, part, size in zip("ab", (texts[:half], texts[half:]), sizes):
        table = pa.table({"text": pa.array(part, pa.string())})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=size)
    pq.write_table(pa.table({"text": ["1*1"]}), folder / "val.parquet")
    return set(filter(None, texts))


@st.composite
def corpora(draw, world: int):
    "A world, its streams, documents enough for every stream, rows of a batch."
    streams = world * draw(st.integers(1, 2))
    lengths = draw(
        st.lists(st.integers(1, 30), min_size=2 * streams, max_size=2 * streams + 30)
    )
    for place in draw(st.lists(st.integers(streams, len(lengths) - 1), max_size=3)):
        lengths.insert(place, None)
    sizes = draw(st.tuples(st.integers(3, 9), st.integers(5, 20)))
    return world, streams, lengths, sizes, draw(st.integers(1, 3))


def read(folder, start, step, epoch, epochs=1):
    return list(
        iter_documents(
            "train", start, step, (epoch, 0), str(folder), epochs=epoch + epochs
        )
    )


def rank_batches(folder, rank, world, streams, shape, **options):
    "What `batches` yields on one of several ranks."
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))  # read at the first next
    options |= {"num_streams": streams, "data": str(folder)}
    source = batches(Words(), "train", *shape, CPU, **options)
    while True:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        yield next(source)


def every_stream(folder, world, streams, shape, steps, **options):
    "Collect `steps` batches of every stream over all ranks; each from one rank only."
    found = {}
    for rank in range(world):
        source = rank_batches(folder, rank, world, streams, shape, **options)
        mine = {}
        for batch in islice(source, steps * streams // world):
            mine.setdefault(batch.stream, []).append(batch)
        assert not mine.keys() & found.keys()
        found |= mine
    assert found.keys() == set(range(streams))
    return found


@pytest.mark.slow
@WORLDS
@few
@given(st.data())
def test_every_epoch_deals_every_document_once(world, data):
    _, streams, lengths, sizes, _ = data.draw(corpora(world))
    with tempfile.TemporaryDirectory() as folder:
        texts = write_corpus(Path(folder), lengths, sizes)
        orders = []
        for epoch in range(EPOCHS):
            whole = [t for t, _ in read(folder, 0, 1, epoch)]
            assert Counter(whole) == Counter(texts)
            dealt = [
                t for s in range(streams) for t, _ in read(folder, s, streams, epoch)
            ]
            assert Counter(dealt) == Counter(texts)
            assert whole == [t for t, _ in read(folder, 0, 1, epoch)]
            orders.append(whole)
        assert orders[0] == sorted(texts, key=lambda t: int(t.split("*")[0]))
        if len(texts) > 12:
            assert orders[0] != orders[1] != orders[2]


@WORLDS
@few
@given(st.data())
def test_ranks_cut_the_ribbon_without_overlap_or_loss(world, data):
    _, streams, lengths, sizes, rows = data.draw(corpora(world))
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ),
    ):
        write_corpus(Path(folder), lengths, sizes)
        tokens = EPOCHS * sum(n + 1 for n in lengths if n) // streams
        steps = max(1, tokens // (rows * 8))
        found = every_stream(folder, world, streams, (rows, 8), steps)
        for stream, got in found.items():
            documents = (
                text
                for epoch in count()
                for text, _ in read(folder, stream, streams, epoch)
            )
            ribbon = []
            while len(ribbon) < steps * rows * 8 + 1:
                ribbon += Words().encode([next(documents)], 0)[0]
            inputs = torch.cat([b.inputs.flatten() for b in got]).tolist()
            targets = torch.cat([b.targets.flatten() for b in got]).tolist()
            assert inputs == ribbon[: len(inputs)]
            assert targets == ribbon[1 : len(inputs) + 1]


def pieces(row: list[int]) -> list[tuple[int, int]]:
    "Split a row at the tokens that begin documents: (token, times)."
    assert row[0] == 0
    begins = [i for i, token in enumerate(row) if token == 0] + [len(row)]
    found = []
    for begin, end in zip(begins, begins[1:]):
        inside = row[begin + 1 : end]
        assert len(set(inside)) <= 1
        found.append((inside[0] if inside else 0, len(inside)))
    return found


@pytest.mark.slow
@WORLDS
@few
@given(st.data())
def test_best_fit_uses_every_document_that_it_read(world, data):
    _, streams, lengths, sizes, rows = data.draw(corpora(world))
    T = 12
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ),
        patch("nanochat.dataloader.packed_stream.__kwdefaults__", FEW_PLACES),
    ):
        write_corpus(Path(folder), lengths, sizes)
        full = {i + 1: n for i, n in enumerate(lengths) if n}
        found = every_stream(folder, world, streams, (rows, T), 9, best_fit=True)
        for stream, got in found.items():
            cursor = got[-1].cursor
            epochs = cursor["documents"][0] + 1
            at = {p: t for t, p in read(folder, stream, streams, 0, epochs)}
            until = tuple(cursor["documents"])
            was_read = Counter(
                int(t.split("*")[0]) for p, t in at.items() if p <= until
            )
            waits = Counter(int(at[tuple(p)].split("*")[0]) for p in cursor["waiting"])
            used = Counter()
            cropped = 0
            unseen = 0
            for batch in got:
                for x, y in zip(batch.inputs.tolist(), batch.targets.tolist()):
                    *inner, last = pieces([x[0], *y])
                    assert all(full[token] == times for token, times in inner)
                    used.update(token for token, _ in [*inner, last] if token)
                    unseen += last[1] == 0  # cropped to its first token: which?
                    cropped += full[last[0]] - last[1] if last[0] else 0
            missing = was_read - waits - used
            assert not (used + waits) - was_read
            assert missing.total() == unseen
            cropped += sum(full[token] * n for token, n in missing.items())
            assert cursor["cropped"] == cropped


@WORLDS
@few
@given(st.data(), st.integers(0, 12), st.booleans(), st.integers(0, 7))
def test_a_cursor_continues_exactly(world, data, stop, best_fit, rank):
    _, streams, lengths, sizes, rows = data.draw(corpora(world))
    rank = rank % world
    shape = (rows, 12)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ),
        patch("nanochat.dataloader.packed_stream.__kwdefaults__", FEW_PLACES),
    ):
        write_corpus(Path(folder), lengths, sizes)
        turns = streams // world
        options = {"best_fit": best_fit}
        whole = rank_batches(folder, rank, world, streams, shape, **options)
        cursors = {}
        for batch in islice(whole, stop * turns):
            cursors[str(batch.stream)] = batch.cursor
        cursors = json.loads(json.dumps(cursors))
        options["cursors"] = cursors
        again = rank_batches(folder, rank, world, streams, shape, **options)
        for _ in range(12 * turns):
            expected, got = next(whole), next(again)
            assert torch.equal(got.inputs, expected.inputs)
            assert torch.equal(got.targets, expected.targets)
            assert (got.stream, got.cursor) == (expected.stream, expected.cursor)


def test_a_row_is_the_best_fit():
    waiting = [(n, [n] * n) for n in (3, 4, 7, 6, 2)]
    row, cropped = take_row(waiting, 12)
    assert row == [3] * 3 + [7] * 7 + [2] * 2 and cropped == 0
    assert [n for n, _ in waiting] == [4, 6]
    row, cropped = take_row(waiting, 7)  # 6 does not fit behind 4: it is cropped
    assert row == [4] * 4 + [6] * 3 and cropped == 3 and not waiting
    waiting = [(n, [n] * n) for n in (5, 9, 4)]
    assert take_row(waiting, 7) == ([5] * 5 + [4] * 2, 2)  # the shortest loses least


def speed(work, tokens: int) -> float:
    "Tokens per second: the best of three."
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return tokens / min(times)


@pytest.mark.slow
@pytest.mark.parametrize("best_fit", [False, True])
def test_loader_is_20_times_faster_than_the_d4_model(tokenizer, best_fit):
    B, T = 4, 256
    source = batches(tokenizer, "train", B, T, CPU, best_fit=best_fit)
    batch = next(source)
    model = GPT(model_config(4, tokenizer.get_vocab_size(), T))
    model.init_weights(0)

    def step():
        return model(batch.inputs, batch.targets).backward()

    step()
    eaten = speed(step, B * T)
    made = speed(lambda: [next(source) for _ in range(50)], 50 * B * T)
    print(
        f"best_fit={best_fit}: {made:,.0f} of {eaten:,.0f} tokens/s, {made / eaten:.0f}x"
    )
    assert made >= 20 * eaten


def test_prefetch_keeps_the_order_and_passes_errors_on():
    def source():
        yield from range(9)
        raise UserError("no more text")

    ahead = prefetch(source(), depth=2)
    assert list(islice(ahead, 9)) == list(range(9))
    with pytest.raises(UserError, match="no more text"):
        next(ahead)


def test_a_copy_to_a_gpu_is_pinned_ordered_and_kept(monkeypatch):
    """What CUDA is told, in order, on a machine that has none.

    The pinned buffer needs no care of ours: torch's allocator of pinned memory notes the
    queue of a copy that does not block, and gives the buffer away after it.
    """
    told = []
    now = ["compute"]

    class Queue:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(queue):
        now.append(queue.name)
        yield
        now.pop()

    class Ids:
        def pin_memory(self):
            told.append(f"pin on {now[-1]}")
            return self

        def to(self, device, non_blocking=False):
            assert non_blocking
            told.append(f"copy on {now[-1]}")
            return self

        def record_stream(self, queue):
            told.append(f"kept for {queue.name}")

    monkeypatch.setattr(
        "nanochat.dataloader.copy_queue", lambda device: Queue("copies")
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Queue("compute"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    ids = Ids()
    assert to_device(ids, torch.device("cuda", 1)) is ids
    assert told == [
        "pin on copies",
        "copy on copies",
        "compute waits for copies",  # before anything reads the copy
        "kept for compute",  # until what computes with it is done
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_arrive_whole_behind_a_slow_queue():
    device = torch.device("cuda", 0)
    sums = []
    for i in range(50):
        with torch.cuda.stream(copy_queue(device)):
            torch.cuda._sleep(2_000_000)  # about a millisecond in front of the copy
        sums.append(to_device(torch.full((64, 1024), i), device).sum())
        torch.cuda._sleep(1_000_000)
    assert [s.item() for s in sums] == [i * 64 * 1024 for i in range(50)]


def test_prefetch_prepares_as_many_as_asked_and_no_more():
    drawn = []

    def source():
        for i in count():
            drawn.append(i)
            yield i

    ahead = prefetch(source(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(drawn) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(drawn) == 5  # one is used, three wait, one is in the hand
