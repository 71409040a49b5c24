"""The tokenizer: round trips, three implementations that agree, chats, files."""

import base64
import copy
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

import rustbpe
from nanochat import tok_eval, tok_train
from nanochat.bpe import (
    SPLIT_PATTERN,
    best_pair,
    count_pairs,
    decode_bpe,
    encode_bpe,
    merge_pair,
    train_bpe,
)
from nanochat.common import UserError, get_base_dir
from nanochat.dataset import iter_documents
from nanochat.hf import hf_tokenizer
from nanochat.interop import read_pickled
from nanochat.tokenizer import (
    FILE_NAME,
    PRETRAINED,
    SPECIAL_TOKENS,
    RustBPETokenizer,
    color_html,
    get_token_bytes,
    get_tokenizer,
    load_tiktoken_ranks,
    to_tiktoken,
)

DOCS = [
    "The cat and the other cats sat on 1234 mats; they'd sat there since 1999.\n\n" * 3,
    "naïve café — 안녕하세요 안녕 안녕 🙂🙂 don't DON'T\r\n\tdef f(x):\n        return x\n"
    * 3,
    "aaaaaaaa aaaa aa abababab hello hello, hello!!! <|bos|> 'sss   \n  \n x" * 3,
]
# The regex engines of Python and Rust know different versions of Unicode; they agree on
# every character that this Python's table assigns.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.one_of(st.text(ASSIGNED), st.text(alphabet="aab '1 \n\r\t.é안🙂"))


@pytest.fixture(scope="module")
def tok() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(DOCS, 256 + 9 + 100)


# ---------------------------------------------------------------- BPE by hand


def test_overlapping_pairs_are_counted_but_merge_once():
    word = tuple(b"aaaa")
    assert count_pairs({word: 1}) == {(97, 97): 3}
    assert merge_pair(word, (97, 97), 256) == (256, 256)
    assert merge_pair(tuple(b"aaa"), (97, 97), 256) == (256, 97)


def test_ties_go_to_the_smaller_pair():
    assert best_pair(count_pairs({tuple(b"cd"): 2, tuple(b"ab"): 2})) == (97, 98)
    ranks = train_bpe(["aaabdaaabac"], 259, r".+")
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert encode_bpe("aaabdaaabac", ranks, r".+") == [258, 100, 258, 97, 99]


def test_training_stops_when_nothing_is_left_to_merge():
    assert list(train_bpe(["ab"], 1000))[256:] == [b"ab"]
    assert len(train_bpe([], 1000)) == 256


# ------------------------------------------------------ three implementations


@given(st.lists(TEXTS, max_size=6), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_slow_twin_and_rust_learn_the_same(docs, merges):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(docs), 256 + merges, pattern=SPLIT_PATTERN)
    pairs = [(bytes(token), rank) for token, rank in trainer.get_mergeable_ranks()]
    assert pairs == list(train_bpe(docs, 256 + merges).items())


@pytest.mark.slow
@given(TEXTS)
@example("<|bos|><|user_start|>")
@example("x" * 1000 + " " * 1000 + "\n" * 50)
@example("'S 'ſ ''ll 12345 ½ Ⅳ 一二 \u00a0\u3000\u2028x\x1c\x1dy\x85")
@settings(max_examples=300, deadline=None)
def test_slow_twin_rust_and_tiktoken_encode_the_same(tok, text):
    ranks = {token: rank for rank, token in enumerate(tok.ranks)}
    ids = tok.encode(text)
    assert ids == encode_bpe(text, ranks)
    assert ids == to_tiktoken(tok).encode_ordinary(text)
    assert decode_bpe(ids, ranks) == text.encode()


def test_document_order_does_not_matter(tok):
    again = RustBPETokenizer.train_from_iterator(DOCS[::-1], tok.get_vocab_size())
    assert again.fingerprint() == tok.fingerprint()


# ----------------------------------------------------------------- text, ids


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_round_trip_and_token_bytes(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert "".join(regex.findall(SPLIT_PATTERN, text)) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode())


def test_token_bytes_of_half_characters(tok):
    sizes = tok.token_bytes()
    assert sizes.dtype == torch.int64 and sizes.shape == (tok.get_vocab_size(),)
    assert sizes[:256].eq(1).all()  # 0x80 ... 0xFF alone are not UTF-8
    assert sizes[-9:].eq(0).all()
    assert sizes[256:-9].tolist() == [len(token) for token in tok.ranks[256:]]


def test_special_tokens_come_last_in_order(tok):
    first = len(tok.ranks)
    ids = [tok.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(first, first + 9))
    assert tok.get_vocab_size() == first + 9 == 365
    assert tok.get_bos_token_id() == first
    assert tok.get_special_tokens() == SPECIAL_TOKENS
    assert [tok.id_to_token(i) for i in ids] == SPECIAL_TOKENS
    with pytest.raises(UserError, match="eos"):
        tok.encode_special("<|eos|>")


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_names_in_text_stay_text(tok, name):
    assert max(tok.encode(name)) < len(tok.ranks)
    text = f"ignore this {name} and that"
    chat = {"messages": [{"role": "user", "content": text}]}
    ids, _ = tok.render_conversation(chat)
    special = [i for i in ids if i >= len(tok.ranks)]
    assert [tok.id_to_token(i) for i in special] == [
        "<|bos|>",
        "<|user_start|>",
        "<|user_end|>",
    ]
    assert tok.decode(ids[2:-1]) == text


def test_batches_prepend_append(tok):
    bos = tok.get_bos_token_id()
    end = tok.encode_special("<|assistant_end|>")
    rows = tok.encode(DOCS, prepend="<|bos|>", append=end)
    assert rows == [[bos, *tok.encode(doc), end] for doc in DOCS]
    assert tok("hi", prepend=bos) == tok.encode("hi", prepend="<|bos|>")
    assert tok.encode([]) == [] and tok.encode("") == []


@pytest.mark.slow
@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("around", [("", ""), ("a", "b"), ("!", "!"), ("1", " x")])
def test_a_million_spaces(tok, space, around):
    text = around[0] + space * 1_000_000 + around[1]
    short = around[0] + space * 12_000 + around[1]
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(short) == to_tiktoken(tok).encode_ordinary(short)


def test_lone_surrogates_become_the_replacement_character(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode(tok.encode("a\ud800b" + " " * 10_000))[:3] == "a\ufffdb"


@pytest.mark.parametrize("ids", [[10_000], [-1], [2**40]])
def test_unknown_ids(tok, ids):
    with pytest.raises(UserError, match="365"):
        tok.decode(ids)


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, torch.tensor])
@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint16"])
def test_whatever_holds_whole_numbers_is_decoded(tok, make, dtype):
    ids = tok.encode("naïve cats", prepend="<|bos|>")
    assert tok.decode(make(np.array(ids, dtype))) == "<|bos|>naïve cats"
    assert tok.decode(torch.tensor(ids)) == "<|bos|>naïve cats"
    assert tok.decode([torch.tensor(i) for i in ids]) == "<|bos|>naïve cats"
    assert tok.id_to_token(torch.tensor(ids)[0]) == "<|bos|>"
    assert tok.decode(range(97, 100)) == "abc" and tok.decode([]) == ""


@pytest.mark.parametrize(
    "ids, says",
    [
        (3, "got int"),
        (None, "got NoneType"),
        ("12", "got str"),
        (b"abc", "got bytes"),
        ({97: 1}, "got dict"),
        ({97, 98}, "got set"),
        ([97, None], "NoneType"),
        ([97, "a"], "'a'"),
        ([1.0], "1.0"),
        ([True, False], "bool"),
        ([[97, 98]], "got \\[97"),
        (torch.tensor([[97, 98]]), r"shape \(1, 2\)"),
        (torch.tensor(97), r"shape \(\)"),
        (torch.tensor([97.0]), "97.0"),
        (torch.tensor([True]), "bool"),
        (np.array([[97]]), r"shape \(1, 1\)"),
        (np.array([97.5]), "97.5"),
        ([np.bool_(True)], "bool"),
        ([torch.tensor(True)], "bool"),
        (torch.tensor([-1]), "-1"),
        ([np.int64(365)], "365"),
    ],
)
def test_what_is_no_row_of_ids_is_named(tok, ids, says):
    with pytest.raises(UserError, match=says):
        tok.decode(ids)


@pytest.mark.parametrize(
    "end, says",
    [
        ("bos", "<|bos|>"),
        ("", "not a special token"),
        ("<|eos|>", "not a special token"),
        (365, "no such token"),
        (-1, "no such token"),
        (1.0, "must be an integer"),
        (True, "must be an integer"),
        ([356], "must be an integer"),
        (b"<|bos|>", "must be an integer"),
    ],
)
@pytest.mark.parametrize("side", ["prepend", "append"])
def test_only_tokens_stand_at_the_ends(tok, side, end, says):
    with pytest.raises(UserError, match=re.escape(says)):
        tok.encode("a", **{side: end})
    with pytest.raises(UserError, match=re.escape(says)):
        tok.encode([], **{side: end})


def test_an_id_of_numpy_or_pytorch_stands_at_an_end(tok):
    bos = tok.get_bos_token_id()
    for end in (np.int64(bos), np.uint16(bos), torch.tensor(bos)):
        ids = tok.encode("a", prepend=end, append=end)
        assert ids == [bos, 97, bos] and {type(i) for i in ids} == {int}


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "got NoneType"),
        (3, "got int"),
        (b"bytes", "got bytes"),
        (bytearray(b"bytes"), "got bytearray"),
        ({"a": 1}, "got dict"),
        ({"a"}, "got set"),
        (["fine", None], "item 1 of the list is NoneType"),
        (["fine", "fine", b"bytes"], "item 2 of the list is bytes"),
        ([["fine"]], "item 0 of the list is list"),
        (Path("fine"), "got "),
    ],
)
def test_what_is_no_text_is_named(tok, text, says):
    with pytest.raises(UserError, match=says):
        tok.encode(text)


def test_texts_of_any_iterable(tok):
    rows = [tok.encode("a b"), tok.encode("c")]
    texts = ["a b", "c"]
    for same in (tuple(texts), iter(texts), np.array(texts), (t for t in texts)):
        assert tok.encode(same) == rows
    assert tok.encode(np.str_("a b")) == rows[0]


@pytest.mark.parametrize("name", ["bos", None, 3, ["<|bos|>"], b"<|bos|>"])
def test_special_tokens_are_asked_for_by_name(tok, name):
    with pytest.raises(UserError, match="not a special token"):
        tok.encode_special(name)


@pytest.mark.parametrize(
    "special, says",
    [
        ({"<|bos|>": 97}, "97"),
        ({"<|bos|>": -1}, "-1"),
        ({"<|bos|>": "256"}, "'256'"),
        ({"<|bos|>": True}, "True"),
        ({"<|bos|>": 256, "<|eos|>": 256}, "share"),
        ({"": 256}, "''"),
        ({3: 256}, "3"),
    ],
)
def test_special_tokens_have_ids_of_their_own(plain, special, says):
    with pytest.raises(UserError, match=says):
        RustBPETokenizer(plain.ranks, special=special)


@pytest.mark.parametrize("special", [["<|bos|>"], "<|bos|>", {"<|bos|>"}])
def test_special_tokens_are_a_table(plain, special):
    with pytest.raises(UserError, match="special tokens are"):
        RustBPETokenizer(plain.ranks, special=special)


@pytest.mark.parametrize("token", ["ab", 3, None, b"", [97]])
def test_tokens_are_bytes(plain, token):
    with pytest.raises(UserError, match="token 256 is"):
        RustBPETokenizer([*plain.ranks, token])


@pytest.mark.parametrize("ranks", [None, 256, "abc", b"abc", {b"a": 0}])
def test_ranks_are_a_list(ranks):
    with pytest.raises(UserError, match="ranks are"):
        RustBPETokenizer(ranks)


def test_ranks_of_any_iterable(plain):
    for same in (iter(plain.ranks), tuple(plain.ranks), (r for r in plain.ranks)):
        assert RustBPETokenizer(same).fingerprint() == plain.fingerprint()


def test_a_pattern_that_drops_text_is_named(plain):
    with pytest.raises(UserError, match="matches nothing at byte 2"):
        RustBPETokenizer(plain.ranks, "[a-z]+").encode("ab 12")


def test_a_place_that_is_no_folder_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(UserError, match="no tokenizer at"):
        RustBPETokenizer.from_directory(file)
    for name in PRETRAINED:
        with pytest.raises(UserError, match="does not exist"):
            RustBPETokenizer.from_pretrained(name, file)
    for name in (None, ["gpt2"], 3):
        with pytest.raises(UserError, match="use gpt2"):
            RustBPETokenizer.from_pretrained(name, file)


def test_a_tokenizer_without_bos_says_so(plain):
    bare = RustBPETokenizer(plain.ranks, special={})
    assert bare.decode(bare.encode("hi")) == "hi"
    with pytest.raises(UserError, match="bos"):
        bare.get_bos_token_id()
    # The name decides, not the order in which a file lists the tokens.
    other = RustBPETokenizer(plain.ranks, special={"<|pad|>": 256, "<|bos|>": 257})
    assert other.get_bos_token_id() == 257


def encode_elsewhere(tokenizer, text: str) -> tuple[list[int], str, str]:
    return tokenizer.encode(text), tokenizer.fingerprint(), type(tokenizer).__name__


def test_copies_and_pickles_encode_the_same(tok):
    text = "naïve cats, 1999 mats <|bos|>"
    twins = [pickle.loads(pickle.dumps(tok, n)) for n in range(2, 6)]
    twins += [copy.copy(tok), copy.deepcopy(tok), copy.deepcopy({"tok": tok})["tok"]]
    for twin in twins:
        assert type(twin) is RustBPETokenizer
        assert vars(twin).keys() == vars(tok).keys()
        assert twin.fingerprint() == tok.fingerprint()
        assert twin.encode(text, prepend="<|bos|>") == tok.encode(
            text, prepend="<|bos|>"
        )
        assert twin.render_conversation(CHAT) == tok.render_conversation(CHAT)
        assert twin.decode(twin.encode(text)) == text
        assert twin.token_bytes().equal(tok.token_bytes())


@pytest.mark.slow
def test_another_process_gets_the_tokenizer(tok):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(encode_elsewhere, (tok, "naïve cats"))
    assert found == encode_elsewhere(tok, "naïve cats")


def test_the_crates_tokenizer_is_copied_and_pickled(tok):
    for twin in (copy.copy(tok.bpe), pickle.loads(pickle.dumps(tok.bpe))):
        assert twin.get_pattern() == tok.bpe.get_pattern()
        assert twin.get_mergeable_ranks() == tok.bpe.get_mergeable_ranks()
        assert twin.encode("naïve cats") == tok.bpe.encode("naïve cats")


def test_one_string_is_no_corpus():
    with pytest.raises(UserError, match="put it in a list"):
        RustBPETokenizer.train_from_iterator("one string", 300)
    for texts in (None, 3):
        with pytest.raises(UserError, match="give a list of strings"):
            RustBPETokenizer.train_from_iterator(texts, 300)
    same = [RustBPETokenizer.train_from_iterator(DOCS, n) for n in (300, np.int64(300))]
    assert same[0].fingerprint() == same[1].fingerprint()
    for size in ("300", 300.0, None, True):
        with pytest.raises(UserError, match="must be an integer"):
            RustBPETokenizer.train_from_iterator(DOCS, size)


def test_bad_input_is_named(tok):
    with pytest.raises(UserError, match="int"):
        tok.encode(["fine", 3])
    with pytest.raises(UserError, match="264"):
        RustBPETokenizer.train_from_iterator(DOCS, 264)
    with pytest.raises(UserError, match="bytes"):
        RustBPETokenizer.train_from_iterator(["fine", b"bytes"], 300)
    with pytest.raises(UserError, match="surrogate"):
        RustBPETokenizer.train_from_iterator(["fine", "\ud800"], 300)


# ------------------------------------------------------------- conversations

PARTS = [
    {"type": "text", "text": "A"},
    {"type": "python", "text": "1+1"},
    {"type": "python_output", "text": "2"},
    {"type": "text", "text": "B"},
]
CHAT = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": PARTS},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "W"},
    ]
}
RENDERED = [
    ("<|bos|>", 0),
    ("<|user_start|>", 0),
    *[(c, 0) for c in "S\n\nU"],
    ("<|user_end|>", 0),
    ("<|assistant_start|>", 0),
    ("A", 1),
    ("<|python_start|>", 1),
    *[(c, 1) for c in "1+1"],
    ("<|python_end|>", 1),
    ("<|output_start|>", 0),
    ("2", 0),
    ("<|output_end|>", 0),
    ("B", 1),
    ("<|assistant_end|>", 1),
    ("<|user_start|>", 0),
    ("V", 0),
    ("<|user_end|>", 0),
    ("<|assistant_start|>", 0),
    ("W", 1),
    ("<|assistant_end|>", 1),
]


@pytest.fixture(scope="module")
def plain() -> RustBPETokenizer:
    return RustBPETokenizer([bytes([b]) for b in range(256)])


def test_render_conversation_is_the_table(plain):
    before = copy.deepcopy(CHAT)
    ids, mask = plain.render_conversation(CHAT)
    got = [(plain.id_to_token(i), m) for i, m in zip(ids, mask, strict=True)]
    assert got == RENDERED
    assert before == CHAT


@pytest.mark.parametrize("most", [-1, None, 2.5, True])
def test_a_length_is_a_count(plain, most):
    with pytest.raises(UserError, match="max_tokens"):
        plain.render_conversation(CHAT, max_tokens=most)


def test_a_mask_of_another_length_is_named(plain):
    with pytest.raises(UserError, match="mask of 1"):
        plain.visualize_tokenization([97, 98], [1])


def test_render_truncates_both(plain):
    full = plain.render_conversation(CHAT)
    for n in (0, 1, 7, len(RENDERED), 10_000):
        assert plain.render_conversation(CHAT, max_tokens=n) == tuple(
            row[:n] for row in full
        )


def test_render_for_completion(plain):
    ids = plain.render_for_completion(CHAT)
    assert [plain.id_to_token(i) for i in ids] == [t for t, _ in RENDERED[:-2]]
    with pytest.raises(UserError, match="user"):
        plain.render_for_completion({"messages": CHAT["messages"][:2]})


USER = CHAT["messages"][1]
ASSISTANT = CHAT["messages"][4]


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ({}, "at least one"),
        (None, "at least one"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "user"}]}, "'content'"),
        ({"messages": ["hello"]}, "'role'"),
        ({"messages": [ASSISTANT]}, "message 0 has role 'assistant'"),
        ({"messages": [USER, USER]}, "expected 'assistant'"),
        ({"messages": [CHAT["messages"][0]]}, "followed by a user"),
        ({"messages": [USER, CHAT["messages"][0]]}, "role 'system'"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "must be a string"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "list of parts"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "image",
        ),
    ],
)
def test_faulty_conversations_are_named(plain, chat, says):
    with pytest.raises(UserError, match=says):
        plain.render_conversation(chat)


def test_visualization(plain):
    chat = {"messages": [{"role": "user", "content": "<b>\x1b[2J\n안"}, ASSISTANT]}
    ids, mask = plain.render_conversation(chat)
    shown = plain.visualize_tokenization(ids, mask)
    assert "\x1b[32mW\x1b[0m" in shown and "\x1b[2J" not in shown
    assert "\x1b[31m\\xec\x1b[0m" in shown and "\n" not in shown
    page = plain.visualize_tokenization(ids, mask, view=color_html)
    assert "&lt;" in page and "<b>" not in page and page.count("<code") == len(ids)


# --------------------------------------------------------------------- files


def test_save_and_load(tok, tmp_path, monkeypatch):
    tok.save(tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    again = get_tokenizer()
    assert again.fingerprint() == tok.fingerprint()
    assert [again.encode(d) for d in DOCS] == [tok.encode(d) for d in DOCS]
    assert get_token_bytes().equal(tok.token_bytes())
    content = json.loads((tmp_path / "tokenizer" / FILE_NAME).read_text("ascii"))
    assert content["version"] == 1 and content["pattern"] == SPLIT_PATTERN
    assert content["sha256"] == tok.fingerprint()


def test_missing_file_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        get_tokenizer()


def rewrite(content: dict, **changes) -> str:
    return json.dumps({**content, **changes}, indent=0)


def test_damaged_and_altered_files_are_refused(tok, tmp_path):
    tok.save(tmp_path)
    file = tmp_path / FILE_NAME
    good = file.read_text()
    content = json.loads(good)
    swapped = content["ranks"][:256] + content["ranks"][256:][::-1]
    without = {k: v for k, v in content.items() if k != "pattern"}
    bad = [
        "",
        "[]",
        "null",
        good[: len(good) // 2],
        good.replace("{1,2}", "{1,3}"),
        rewrite(content, ranks=swapped),
        rewrite(content, ranks=content["ranks"][:-1]),
        rewrite(content, special={}),
        rewrite(content, version=2),
        rewrite(content, format="other"),
        rewrite(content, sha256="0" * 64),
        rewrite(content, sha256=None),
        rewrite(without),
    ]
    for text in bad:
        file.write_text(text)
        with pytest.raises(UserError, match=FILE_NAME):
            RustBPETokenizer.from_directory(tmp_path)
    file.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(UserError, match=FILE_NAME):
        RustBPETokenizer.from_directory(tmp_path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_noticed(tok, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bpe")
    tok.save(folder)
    file = folder / FILE_NAME
    raw = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(raw)
    try:  # white space between the values may change, the content may not
        again = RustBPETokenizer.from_directory(folder)
    except UserError:
        return
    assert again.fingerprint() == tok.fingerprint()


def test_tiktoken_files(tok, tmp_path):
    lines = [
        base64.b64encode(token).decode() + f" {rank}"
        for rank, token in enumerate(tok.ranks)
    ]
    file = tmp_path / "ours.tiktoken"
    file.write_text("\n".join(lines) + "\n")
    assert load_tiktoken_ranks(file) == tok.ranks
    for text in ("", "YQ==", "YQ== x", "YQ== 1\n", "?? 0\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="ours"):
            load_tiktoken_ranks(file)
    with pytest.raises(UserError, match="does not exist"):
        RustBPETokenizer.from_pretrained("gpt2", tmp_path)
    (tmp_path / "r50k_base.tiktoken").write_text("\n".join(lines))
    with pytest.raises(UserError, match="sha256"):
        RustBPETokenizer.from_pretrained("gpt2", tmp_path)
    with pytest.raises(UserError, match="gpt3"):
        RustBPETokenizer.from_pretrained("gpt3", tmp_path)


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_definitions_are_openais(name, monkeypatch):
    "Pattern, special tokens and checksum, as the installed tiktoken has them."
    hashes = {}

    def load(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        hashes[url.rsplit("/", 1)[1]] = expected_hash
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    monkeypatch.setattr(
        openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {}
    )
    # GPT-2's vocabulary as one file is r50k_base's.
    theirs = getattr(openai_public, name.replace("gpt2", "r50k_base"))()
    file, sha256, pattern, special = PRETRAINED[name]
    assert hashes == {file: sha256}
    assert pattern == theirs["pat_str"] == getattr(openai_public, name)()["pat_str"]
    assert special == theirs["special_tokens"]
    assert special == getattr(openai_public, name)()["special_tokens"]


@pytest.mark.parametrize(
    ("name", "size", "bos", "ids"),
    [
        ("gpt2", 50_257, 50_256, [15496, 11, 2159, 0]),
        ("cl100k_base", 100_277, 100_257, [9906, 11, 4435, 0]),  # ids up to 100,276
    ],
)
def test_openai_vocabularies(name, size, bos, ids):
    folder = os.environ.get("NANOCHAT_TOKENIZERS", get_base_dir() / "tokenizers")
    if not list(Path(folder).glob("*.tiktoken")):
        pytest.skip(f"no .tiktoken files in {folder}; set NANOCHAT_TOKENIZERS")
    peer = RustBPETokenizer.from_pretrained(name, folder)
    assert peer.get_vocab_size() == size
    assert peer.encode("Hello, World!") == ids
    assert peer.get_bos_token_id() == bos
    ranks = {token: rank for rank, token in enumerate(peer.ranks)}
    text = DOCS[0] + DOCS[1]
    assert encode_bpe(text, ranks, peer.pattern) == peer.encode(text)
    golden = r"EncodingName: (\S+)\nSample: (.*?)\nEncoded: (\[.*?\])\n"
    if (plans := Path(folder) / "TestPlans.txt").exists():
        found = re.findall(golden, plans.read_text("utf-8"), re.DOTALL)
        mine = [x for x in found if x[0] in PRETRAINED[name][0]]
        assert len(mine) > 20
        for _, sample, expected in mine:
            assert peer.encode(sample) == json.loads(expected), sample


# ------------------------------------------------------- ways out, ways in


@pytest.mark.slow
def test_other_libraries_give_the_same_ids(tok):
    "1,500 pieces of real text through tiktoken and Hugging Face's tokenizers."
    texts = [text for text, _ in iter_documents("train")] + DOCS
    pieces = [t[i : i + 1_000] for t in texts for i in range(0, len(t), 1_000)]
    pieces = random.Random(0).sample(pieces, 1_500)
    rows = tok.encode(pieces)
    assert to_tiktoken(tok).encode_ordinary_batch(pieces) == rows
    peer = tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(tok)))
    assert [row.ids for row in peer.encode_batch(pieces)] == rows
    assert [peer.token_to_id(name) for name in SPECIAL_TOKENS] == [
        tok.encode_special(name) for name in SPECIAL_TOKENS
    ]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_nanochats_pickle_is_read_as_data(tok, tmp_path, protocol):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(to_tiktoken(tok), protocol))
    assert RustBPETokenizer(*read_pickled(path)).fingerprint() == tok.fingerprint()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Evil()), pickle.dumps([1, 2]), b"", b"junk", pickle.dumps({"a": 1})],
)
def test_other_pickles_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match="not a pickled tokenizer"):
        read_pickled("tokenizer.pkl")
    assert not (tmp_path / "owned").exists()


def test_importing_a_pickle(tok, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(to_tiktoken(tok)))
    tok_train.train_tokenizer(tok_train.TokTrainConfig(pickle=str(path)))
    assert get_tokenizer().fingerprint() == tok.fingerprint()
    with pytest.raises(UserError, match="does not exist"):
        tok_train.train_tokenizer(tok_train.TokTrainConfig(pickle="nowhere.pkl"))


@pytest.mark.slow
def test_fuzz():
    "A few of the strings of dev/fuzz_tokenizer.py, which has run on a million."
    fuzz = runpy.run_path(str(Path(__file__).parents[1] / "dev" / "fuzz_tokenizer.py"))
    done = fuzz["fuzz"](600, seed=7)
    assert done["ids"] == 2_400 and done["splits"] > 2_100


# ------------------------------------------------------------------ commands


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = tok_train.TokTrainConfig(vocab_size=2048, max_chars=2_000_000)
    tok_train.train_tokenizer(config)
    made = get_tokenizer()
    assert made.get_vocab_size() == 2048
    assert all(len(made.encode(f"{n:02}")) == 1 for n in range(100))
    tok_eval.compare_tokenizers(tok_eval.TokEvalConfig(num_docs=64))
    assert "no column for GPT-2" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "tok_eval.json").read_text())
    rows = {row["text"]: row["ours"] for row in report["bytes_per_token"]}
    assert rows["corpus, val"] > 2.5 and rows["Korean"] >= 1
    assert report["missing"] == ["GPT-2", "GPT-4"]


def test_commands_name_mistakes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="100 is too small"):
        tok_train.train_tokenizer(tok_train.TokTrainConfig(vocab_size=100))
    with pytest.raises(UserError, match="/no/such/place"):
        tok_train.train_tokenizer(tok_train.TokTrainConfig(data="/no/such/place"))
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        tok_eval.compare_tokenizers(tok_eval.TokEvalConfig())


def test_another_tokenizer_is_not_replaced_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    small = {"max_chars": 100_000, "numbers": 1}

    def train(**options: object) -> str:  # the fingerprint of what is there afterwards
        tok_train.train_tokenizer(tok_train.TokTrainConfig(**small, **options))
        return get_tokenizer().fingerprint()

    first = train(vocab_size=400)
    file = tmp_path / "tokenizer" / FILE_NAME
    assert train(vocab_size=400) == first  # the same settings, the same result
    with pytest.raises(UserError, match=r"holds another .*DIR.*--overwrite"):
        train(vocab_size=401)
    assert get_tokenizer().fingerprint() == first
    second = train(vocab_size=401, overwrite=True)
    assert second != first

    # What cannot be read may still be somebody's tokenizer.
    file.write_text(file.read_text().replace("{1,2}", "{1,3}"))
    with pytest.raises(UserError, match=r"not usable.*--overwrite"):
        train(vocab_size=401)
    assert train(vocab_size=401, overwrite=True) == second


def test_no_test_file_is_read():
    read = []
    watching = True

    def note(event: str, args: tuple) -> None:
        if event == "open" and watching:
            read.append(Path(str(args[0])).name)

    sys.addaudithook(note)  # whatever opens a file; a hook cannot be taken off again
    assert sum(map(len, tok_train.chat_texts(tok_train.TokTrainConfig()))) > 1_000_000
    assert "words_train.txt" in read and "capitals_train.jsonl" in read
    watching = False
    assert not [name for name in read if "test" in name]
