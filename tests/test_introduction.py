"""The end of chapter 1: a chat with the reader's own model, else with the recorded one."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))
from record import QUESTIONS

SAID = [
    {"type": "python", "text": "37+48"},
    {"type": "python_output", "text": "85"},
    {"type": "text", "text": "It is 85."},
]


@pytest.fixture(scope="module")
def closing() -> str:
    "The code of the section that settles the bet."
    text = (ROOT / "nbs" / "01_introduction.ipynb").read_text("utf-8")
    cells = {c["id"]: "".join(c["source"]) for c in json.loads(text)["cells"]}
    return "\n".join(cells[name] for name in ("0c0a9006", "0c0a9008", "0c0a900a"))


def tell(code: str, record: dict) -> str:
    "Run the cells on a record; return what they print."
    printed = io.StringIO()
    seen = {"record": record}
    with redirect_stdout(printed):
        exec(code, seen)
    # What the chapter asks live, the record has been asked as well.
    assert set(seen["bets"]) < set(QUESTIONS)
    return printed.getvalue()


def test_the_record_answers_where_there_is_no_chat_model(closing, base_model):
    "A base model has not learned to chat; an older record has no dialogue."
    assert "its record holds no dialogue" in tell(closing, {})
    messages = [
        {"role": "user", "content": "What is 37 + 48?"},
        {"role": "assistant", "content": SAID},
    ]
    other = [
        {"role": "user", "content": "What is the capital of Estonia?"},
        {"role": "assistant", "content": "Riga."},
    ]
    chats = [{"messages": messages}, {"messages": other}]
    told = tell(closing, {"chat": {"model": "old-d3", "conversations": chats}})
    assert "no chat model of yours" in told and "old-d3" in told
    assert "nanochat: [37+48 = 85] It is 85.\n    If you" in told
    assert told.count("you won") == told.count("you lost") == 1


def test_the_readers_own_model_is_asked(closing, base_model):
    base_model.parent.rename(base_model.parents[1] / "sft_checkpoints")
    told = tell(closing, {"chat": {"model": "old-d3", "conversations": []}})
    assert "Your own model answers: nanochat-d1-sft." in told and "old-d3" not in told
    assert told.count("you: ") == told.count("nanochat: ") == 3
