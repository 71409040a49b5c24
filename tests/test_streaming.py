"""Pretraining text from any data set through the `datasets` package, without a network."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.common import UserError
from nanochat.dataloader import batches
from nanochat.dataset import iter_documents, streamed_rows

TEXTS = [f"row {i} " + "word " * (i % 7) for i in range(300)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A data set with the layout of the hub: three Parquet shards, row groups of 40."
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "set"
    root.mkdir()
    for i in range(3):
        table = pa.table({"content": TEXTS[100 * i : 100 * (i + 1)], "id": range(100)})
        file = root / f"train-{i:05d}-of-00003.parquet"
        pq.write_table(table, file, row_group_size=40)
    return f"hf:{root}::content"


def read(data: str, split: str = "train", **options) -> list[str]:
    return [text for text, _ in iter_documents(split, data=data, **options)]


def test_every_row_is_read_once_and_its_text_says_for_what(folder):
    train, val = read(folder), read(folder, "val")
    assert train == [t for t in TEXTS if t in set(train)]  # in order
    assert sorted(train + val) == sorted(TEXTS) and 3 < len(val) < 40


def test_streams_share_the_rows_without_overlap(folder):
    dealt = [read(folder, start=i, step=3) for i in range(3)]
    assert sorted(t for part in dealt for t in part) == sorted(read(folder))
    assert min(map(len, dealt)) > 60


@pytest.mark.slow
def test_a_later_epoch_has_its_own_order_and_a_cursor_continues_it(folder):
    whole = list(iter_documents("train", data=folder, epochs=2))
    first = [text for text, at in whole if at[0] == 0]
    second = [text for text, at in whole if at[0] == 1]
    assert first != second and sorted(first) == sorted(second)
    for place in (0, 17, len(first) + 40):
        rest = list(
            iter_documents("train", cursor=whole[place][1], data=folder, epochs=2)
        )
        assert rest == whole[place + 1 :]


def test_a_resumed_loader_gives_the_batches_that_would_have_come(folder, tokenizer):
    cpu = torch.device("cpu")
    options = dict(num_streams=2, data=folder)
    straight = batches(tokenizer, "train", 2, 32, cpu, **options)
    made = [next(straight) for _ in range(12)]
    cursors = {str(b.stream): b.cursor for b in made[:6]}
    cursors = json.loads(json.dumps(cursors))
    again = batches(tokenizer, "train", 2, 32, cpu, cursors=cursors, **options)
    for batch in made[6:]:
        other = next(again)
        assert torch.equal(batch.inputs, other.inputs) and batch.cursor == other.cursor


def test_json_lines_and_the_usual_column(tmp_path, folder):
    root = tmp_path / "lines"
    root.mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (root / "a.jsonl").write_text("\n".join(lines))
    assert [t for _, t in streamed_rows(str(root), 0)] == TEXTS
    assert list(streamed_rows(str(root), 290)) == list(enumerate(TEXTS))[290:]


def test_what_a_user_can_get_wrong(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no column 'text': \['content', 'id'\]"):
        read(folder.removesuffix("::content"))
    with pytest.raises(UserError, match=r"cannot read row 0 of .*check the name"):
        read(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="lacks a name"):
        read("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'nanochat\[data\]'"):
        read(folder)


def test_a_network_that_goes_away_in_the_middle(folder, monkeypatch):
    import datasets

    whole = datasets.load_dataset

    class Broken:
        def __init__(self, rows):
            self.rows = rows

        def skip(self, count):
            for i, row in enumerate(self.rows.skip(count)):
                if i == 150:
                    raise ConnectionError("no route to host")
                yield row

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: Broken(whole(*a, **k))
    )
    found = []
    with pytest.raises(UserError, match=r"cannot read row 150 .*no route to host"):
        for text, cursor in iter_documents("train", data=folder):
            found.append((text, cursor))
    monkeypatch.setattr(datasets, "load_dataset", whole)
    rest = read(folder, cursor=found[-1][1])
    assert [t for t, _ in found] + rest == read(folder)
