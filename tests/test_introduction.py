"""Chapter 1: its last section asks the reader's own model, and its map is complete."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))
from check import chapters
from record import QUESTIONS

NOTEBOOK = json.loads((ROOT / "nbs" / "01_introduction.ipynb").read_text("utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
SAID = [
    {"type": "python", "text": "37+48"},
    {"type": "python_output", "text": "85"},
    {"type": "text", "text": "It is 85."},
]


@pytest.fixture(scope="module")
def closing() -> str:
    "The code that opens the record and settles the bet."
    names = ("0c0aa001", "0c0a9006", "0c0a9008", "0c0a900a", "0c0aa013")
    return "\n".join(CELLS[name] for name in names)


def tell(code: str, answers: dict) -> str:
    "Run the cells on a record with these answers; return what they print."
    record = {"chat": {"model": "old-d3", "conversations": []}}
    for question, answer in answers.items():
        asked = {"role": "user", "content": question}
        said = {"role": "assistant", "content": answer}
        record["chat"]["conversations"].append({"messages": [asked, said]})
    printed = io.StringIO()
    seen = {"record": record}
    with redirect_stdout(printed):
        exec(code, seen)
    # What the chapter asks live, the record has been asked as well.
    assert set(seen["bets"]) < set(QUESTIONS)
    return printed.getvalue()


def test_the_record_answers_where_there_is_no_chat_model(closing, base_model):
    "A base model has not learned to chat."
    answers = dict(zip(QUESTIONS, (SAID, "Riga.", "b e a u t y")))
    told = tell(closing, answers)
    assert "no chat model of yours" in told and "old-d3" in told
    assert "nanochat: [37+48 = 85] It is 85.\n    If you" in told
    assert told.count("you won") == 2 and told.count("you lost") == 1


def test_the_readers_own_model_is_asked(closing, base_model):
    base_model.parent.rename(base_model.parents[1] / "sft_checkpoints")
    told = tell(closing, {})
    assert "Your own model answers:\nnanochat-d1-sft\n" in told and "old-d3" not in told
    assert told.count("you: ") == told.count("nanochat: ") == 3


def test_the_map_names_every_module_in_its_chapter():
    table = next(text for text in CELLS.values() if "| modules |" in text)
    told = {}
    for row in re.findall(r"^\| (\d+|Appendices).*\| ([^|]*) \|$", table, re.M):
        told[row[0]] = set(re.findall(r"`([\w.]+)`", row[1]))
    written: dict[str, set[str]] = {}
    for module, notebook in chapters().items():
        chapter = notebook[:2].lstrip("0") if notebook[0].isdigit() else "Appendices"
        written.setdefault(chapter, set()).add(module.split(".")[0])
    written |= {"1": set(), "10": {"rustbpe"}}
    assert told == written
