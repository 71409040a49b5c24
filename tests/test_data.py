"""The data that ships with the package, and the reader of anybody's own folder."""

import hashlib
import json
import re
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nanochat
from nanochat.common import UserError
from nanochat.dataset import (
    download,
    iter_documents,
    list_files,
    read_text_file,
    validation_file,
)

DATA = Path(nanochat.__file__).parent / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
CHATS = sorted({p.stem.rsplit("_", 1)[0] for p in DATA.glob("chat/*.jsonl")})
VALIDATION = DATA / MANIFEST["validation"]
SHARDS = sorted(DATA.glob("pretrain/*.parquet"))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text: str, n: int = 13) -> set[int]:
    found = words(text)
    joined = (" ".join(found[i : i + n]).encode() for i in range(len(found) - n + 1))
    return {zlib.crc32(gram) << 32 | zlib.crc32(gram[::-1]) for gram in joined}


def read_jsonl(path: Path) -> list[dict]:
    # Not `splitlines`: it also cuts at U+2028, which JSON allows inside a string.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_texts(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def strings(value) -> list[str]:
    "Every string inside a row."
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return (
        [s for v in inner for s in strings(v)] if isinstance(value, dict | list) else []
    )


@pytest.fixture(scope="module")
def train_ngrams() -> set[int]:
    "The 13-grams of everything a model may be trained on."
    texts = [t for path in SHARDS if path != VALIDATION for t in read_texts(path)]
    for path in DATA.glob("chat/*_train.jsonl"):
        texts += [m["content"] for row in read_jsonl(path) for m in row["messages"]]
    return set().union(*map(ngrams, texts))


def test_every_file_is_in_the_manifest_with_its_hash():
    found = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file()}
    assert found == {*MANIFEST["files"], "manifest.json"}
    for name, entry in MANIFEST["files"].items():
        raw = (DATA / name).read_bytes()
        assert len(raw) == entry["bytes"], name
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"], name
        assert name == "LICENSES" or (entry["licence"] and entry["source"]), name


@pytest.mark.slow
def test_sizes():
    total = sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file())
    assert total <= 14_000_000
    texts = [t for path in SHARDS for t in read_texts(path)]
    assert sum(len(t.encode()) for t in texts) > 10_000_000
    assert max(map(len, texts)) <= 4_000


def test_parquet_layout():
    assert SHARDS[-1] == VALIDATION and len(SHARDS) >= 3
    for path in SHARDS:
        meta = pq.read_metadata(path)
        assert pq.read_schema(path).names == ["text"]
        rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        assert all(n == 1024 for n in rows[:-1]) and 0 < rows[-1] <= 1024
        column = meta.row_group(0).column(0)
        assert column.compression == "ZSTD"
        assert not column.is_stats_set and not column.has_dictionary_page
        assert meta.num_rows == MANIFEST["files"][f"pretrain/{path.name}"]["rows"]


@pytest.mark.slow
def test_pretraining_text_is_clean():
    texts = [t for path in SHARDS for t in read_texts(path)]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text == text.strip() and "\r" not in text and "  " not in text
        assert not re.search(r"Gutenberg|^CHAPTER|_|\[\d+\]|https?:", text), text[:200]
        assert all(c == "\n" or 32 <= ord(c) < 0x180 for c in text)


@pytest.mark.slow
def test_validation_is_disjoint_from_train(train_ngrams):
    for text in read_texts(VALIDATION):
        assert train_ngrams.isdisjoint(ngrams(text)), text[:200]
    sizes = [sum(map(len, read_texts(p))) for p in SHARDS]
    assert 0.02 <= sizes[-1] / sum(sizes) <= 0.03
    assert all(s["validation_chars"] for s in MANIFEST["pretrain"]["sources"].values())


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_well_formed(name):
    for split in ("train", "test"):
        rows = read_jsonl(DATA / f"chat/{name}_{split}.jsonl")
        assert len(rows) == MANIFEST["files"][f"chat/{name}_{split}.jsonl"]["rows"]
        for row in rows:
            roles = [m["role"] for m in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            texts = [m["content"] for m in row["messages"]]
            assert all(t and t == t.strip() for t in texts)
            assert sum(map(len, texts)) <= 2_000
            assert not re.search(r"[\u2018-\u201f]|https?:|www\.|@\w", " ".join(texts))


@pytest.mark.parametrize("name", CHATS)
def test_no_test_question_is_trained_on(name):
    asked = {}
    for split in ("train", "test"):
        rows = read_jsonl(DATA / f"chat/{name}_{split}.jsonl")
        asked[split] = {" ".join(words(r["messages"][0]["content"])) for r in rows}
    assert asked["test"] and asked["train"].isdisjoint(asked["test"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capitals", "definitions"])
def test_held_out_wordings_ask_for_known_facts(name):
    answers = {}
    for split in ("train", "test"):
        rows = read_jsonl(DATA / f"chat/{name}_{split}.jsonl")
        answers[split] = {row["messages"][1]["content"] for row in rows}
    assert answers["test"] <= answers["train"]


def test_spelling_words():
    train, test = (
        (DATA / f"chat/words_{split}.txt").read_text().split()
        for split in ("train", "test")
    )
    assert len(train) >= 5_000 and len(test) == 500
    assert not set(train) & set(test)
    assert all(re.fullmatch(r"[a-z]{3,8}", w) for w in train + test)
    plain = {w + end for w in train for end in ("s", "es", "ed", "ing", "ly", "er")}
    assert not plain & set(test)
    plain = {w + end for w in test for end in ("s", "es", "ed", "ing", "ly", "er")}
    assert not plain & set(train)


def test_no_evaluation_item_is_trained_on(train_ngrams):
    asked = set()
    for path in DATA.glob("chat/*_train.jsonl"):
        rows = read_jsonl(path)
        asked |= {" ".join(words(r["messages"][0]["content"])) for r in rows}
    for path in DATA.glob("evals/*.jsonl"):
        for row in read_jsonl(path):
            for text in strings(row):
                assert train_ngrams.isdisjoint(ngrams(text)), (path.name, text[:200])
            question = row.get("question") or row.get("input") or ""
            assert " ".join(words(question)) not in asked or len(words(question)) < 4


@pytest.mark.parametrize(
    "name, columns",
    [
        ("arc_easy_test", {"id", "question", "choices", "answerKey"}),
        ("arc_challenge_test", {"id", "question", "choices", "answerKey"}),
        ("mmlu_test", {"question", "subject", "choices", "answer"}),
        ("mmlu_dev", {"question", "subject", "choices", "answer"}),
        ("gsm8k_test", {"question", "answer"}),
        (
            "humaneval_test",
            {"task_id", "prompt", "canonical_solution", "test", "entry_point"},
        ),
        ("hellaswag_validation", {"ctx", "endings", "label"}),
        ("piqa_validation", {"goal", "sol1", "sol2", "label"}),
        ("winogrande_validation", {"sentence", "option1", "option2", "answer"}),
        ("squad_validation", {"id", "title", "context", "question", "answers"}),
    ],
)
def test_evaluation_rows_have_the_official_columns(name, columns):
    rows = read_jsonl(DATA / f"evals/{name}.jsonl")
    assert rows and all(columns <= set(row) for row in rows)
    for row in rows:
        if name.startswith("arc"):
            assert len(row["choices"]["text"]) == len(row["choices"]["label"]) > 2
            assert row["answerKey"] in row["choices"]["label"]
            assert row["question"] and not row["question"].startswith("Question:")
        if name.startswith("mmlu"):
            assert len(row["choices"]) == 4 and 0 <= row["answer"] < 4
        if name.startswith("gsm8k"):
            assert re.search(r"#### [-0-9.,]+$", row["answer"])
        if name.startswith("squad"):
            assert row["answers"]["text"][0] in row["context"]
    if name.startswith("mmlu"):
        assert len({row["subject"] for row in rows}) == 57


def test_every_licence_has_a_notice():
    notices = (DATA / "LICENSES").read_text()
    for name in MANIFEST["files"]:
        if name.startswith("evals/"):
            base = name.split("/")[1].removesuffix(".jsonl").rsplit("_", 1)[0]
            assert base in notices or "bigbench_" in base, base
        elif name.startswith("chat/"):
            assert name.rsplit("_", 1)[0] in notices, name


# ------------------------------------------------------- a folder of one's own

LEFTOVERS = [
    "._book.txt",
    ".hidden.txt",
    ".#book.txt",
    "~$book.txt",
    ".~lock.book.txt",
    ".ipynb_checkpoints/book-checkpoint.txt",
    ".git/description.txt",
    "part/.cache/book.txt",
    "book.txt~",
    "#book.txt#",
    "book.txt.tmp",
    "book.txt.part",
    "book.txt.lock",
    "book.txt.bak",
    ".book.txt.swp",
    "half.tmp/book.txt",
    "half.part/book.txt",
    "old~/book.txt",
    "__MACOSX/book.txt",
    "out/_temporary/0/part-0.txt",
    ".train.parquet.crc",
    ".train.parquet",
]


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_not_read(tmp_path, name):
    kept = put(tmp_path, "a/book.txt", "A book.")
    put(tmp_path, name, "A leftover.")
    assert list_files(str(tmp_path)) == [kept]
    kept.unlink()
    with pytest.raises(UserError, match="add some"):
        list_files(str(tmp_path))


@pytest.mark.parametrize("name", ["._book.txt", "~$book.txt", ".cache/book.txt"])
def test_a_file_that_is_named_is_read(tmp_path, name):
    path = put(tmp_path, name, "Asked for.")
    assert list_files(str(path)) == [path]
    # The rule looks below the folder that was named, not above it.
    assert list_files(str(put(tmp_path, ".home/books/a.txt", "A.").parent)) == [
        tmp_path / ".home/books/a.txt"
    ]


@pytest.mark.parametrize(
    "name",
    ["BOOK.TXT", "_book.txt", "book.part1.txt", "$book.txt", "a~b.txt", "1/2.txt"],
)
def test_ordinary_names_are_read(tmp_path, name):
    path = put(tmp_path, name, "Text. " * 20)
    assert list_files(str(tmp_path)) == [path]
    assert read_text_file(path) == ["Text. " * 20]


def test_two_validation_files_are_refused(tmp_path):
    files = [put(tmp_path, f"{name}/val.txt", name) for name in "ab"]
    with pytest.raises(UserError, match="both"):
        validation_file(files)
    assert validation_file(files[:1]) == files[0]


def test_text_files_with_a_mark_and_other_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo\xe2\x80\xa8lines\xc2\x85here.")
    assert read_text_file(path) == ["One.\n\nTwo\u2028lines\x85here."]


@pytest.mark.parametrize("values", [[1, 2], [1.5], [True], [["a"]], [None], [b"a"]])
def test_a_column_that_is_no_text_is_refused(tmp_path, values):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": values}), path)
    with pytest.raises(UserError, match="not text"):
        list(iter_documents("train", data=str(path)))


def test_columns_of_text_in_every_storage(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    plain = pa.array(texts)
    for n, column in enumerate(
        [plain, plain.cast("large_string"), plain.dictionary_encode()]
    ):
        path = tmp_path / f"{n}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        splits = [iter_documents(s, data=str(path)) for s in ("train", "val")]
        assert sorted(t for split in splits for t, _ in split) == sorted(texts)


def test_a_misspelled_split_is_refused():
    with pytest.raises(UserError, match="'validation'"):
        next(iter_documents("validation"))


@pytest.mark.parametrize("counts", [(-2, 4), (8, 0), (8, -1)])
def test_counts_of_a_download_are_checked(counts):
    with pytest.raises(UserError, match="or more"):
        download(*counts)
