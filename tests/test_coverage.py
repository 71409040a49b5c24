"""dev/coverage.json: every row of the 2025 guide, and a place for it that exists."""

import copy
import json
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))
import markup

ROWS = json.loads((ROOT / "dev" / "coverage.json").read_text("utf-8"))["rows"]
# How many rows each series has, numbered from 1: letter, then chapters 0, 1, 2, ...
SERIES = {
    "G": [9, 14, 28, 21, 23, 18, 20, 20, 24],
    "E": [3, 8, 8, 8, 9, 8, 13, 13, 9],
    "M": [2, 4, 7, 7, 7, 7, 9, 6, 5, 6],
}
WHOLE = {"P": 11, "X": 9}  # series that belong to no chapter
THIN = 6  # rows that are not covered, or only in part; this number may only fall

anchors = cache(markup.anchors)


def expected() -> set[str]:
    "Return the id of every row."
    counts = {f"{s}{c}": n for s, row in SERIES.items() for c, n in enumerate(row)}
    return {f"{s}.{i + 1}" for s, n in (counts | WHOLE).items() for i in range(n)}


def leads_nowhere(place: str) -> str:
    "Return why a place does not exist, or an empty string."
    page, _, anchor = place.partition("#")
    if not anchor:
        return "" if (ROOT / place).is_file() else "no such file"
    file = markup.NOTEBOOKS / page
    if not file.is_file():
        return "no such page"
    found = anchors(file).count(anchor)
    return "" if found == 1 else f"{found} headings or anchors of this name"


def complaints(rows: list[dict]) -> list[str]:
    "Return what is wrong with the table."
    count = Counter(row["id"] for row in rows)
    problems = [f"{name}: {n} rows" for name, n in count.items() if n > 1]
    problems += [f"{name}: no row" for name in sorted(expected() - count.keys())]
    problems += [f"{name}: not in the guide" for name in count.keys() - expected()]
    for row in rows:
        if not row["topic"].strip():
            problems.append(f"{row['id']}: no topic")
        if not row["where"] and not row.get("thin", "").strip():
            problems.append(f"{row['id']}: neither a place nor what is missing")
        for place in row["where"]:
            if why := leads_nowhere(place):
                problems.append(f"{row['id']}: {place}: {why}")
        if len(set(row["where"])) < len(row["where"]):
            problems.append(f"{row['id']}: a place twice")
    return problems


def test_every_row_has_a_place():
    assert complaints(ROWS) == []


def test_no_more_rows_are_thin():
    thin = [row["id"] for row in ROWS if "thin" in row]
    assert len(thin) <= THIN, thin


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"where": ["05_attention_mechanism.ipynb#Looking-ahead"]}, "0 headings"),
        ({"where": ["09_evaluation.ipynb#By-hand"]}, "3 headings"),
        ({"where": ["11_attention.ipynb#No-looking-ahead"]}, "no such page"),
        ({"where": ["tests/test_nothing.py"]}, "no such file"),
        ({"where": ["README.md", "README.md"]}, "a place twice"),
        ({"where": []}, "neither a place nor what is missing"),
        ({"where": [], "thin": " "}, "neither a place nor what is missing"),
        ({"topic": ""}, "no topic"),
    ],
)
def test_a_wrong_row_is_found(change, told):
    rows = copy.deepcopy(ROWS)
    rows[0].pop("thin", None)
    rows[0] |= change
    (found,) = complaints(rows)
    assert re.match(rf"{rows[0]['id']}: .*{told}", found)


def test_rows_too_many_or_too_few_are_found():
    first = ROWS[0]
    last = ROWS[-1]
    assert complaints(ROWS[1:]) == [f"{first['id']}: no row"]
    assert complaints([*ROWS, last]) == [f"{last['id']}: 2 rows"]
    assert complaints([*ROWS, last | {"id": "G9.1"}]) == ["G9.1: not in the guide"]
    assert complaints([first | {"where": [], "thin": "all of it"}, *ROWS[1:]]) == []
