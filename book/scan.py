"""Scan the executed book for anything that no reader should find in an output.

    python book/scan.py          after `make book`; `make check` runs it

It reads what the build has cached, and finds: errors, tracebacks and warnings, numbers
that are nan or infinite, paths and addresses of the machine that built the book, and
numbers in prose that nearly, but not quite, equal a number printed beside them. The last
kind is printed for somebody to look at and fails nothing: times come near by accident.

What it cannot see: words ("half", "three of four"), numbers of one or two digits, what a
figure shows, and a claim about a cell farther away than the paragraph above or below.
For those the rule of the book holds: the cell asserts what the prose says.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
NOTEBOOKS = HERE.parent / "nbs"
sys.path.insert(0, str(HERE / "_ext"))

RULES = {  # kind of problem: a pattern that matches it in an output's text
    "not a number": r"(?<![\w.'\"-])[-+−]?(?:nan|NaN|inf|Infinity|∞)(?![\w'-])",
    "traceback": r"Traceback \(most recent call last\)",
    "warning": r"\b[A-Za-z]*Warning\b: |^WARNING\b|\bwarnings?\.warn\(",
    "path of a machine": r"(?:/(?:root|home|work|tmp|private|Users)/|[A-Z]:\\\\?)[\w.-]+",
    "address of an object": r"\bat 0x[0-9a-f]{6,}|object>$",
}
NEAR = 0.01  # a number this close to a printed one, but not equal to it, is suspicious


@dataclass(frozen=True)
class Complaint:
    "A problem that no reader should find."

    notebook: str  # the file's stem
    cell: str  # its id
    kind: str  # a key of RULES, "error", or a number "in prose"
    text: str  # what was found

    def __str__(self) -> str:
        return f"{self.notebook} [{self.cell}] {self.kind}: {self.text}"


# Where the book shows such a problem on purpose: (cell id, kind) -> reason.
ALLOWED = {
    ("2b50a3d7", "not a number"): "2: 70,000 is more than float16 can hold",
    ("b76274a1", "not a number"): "2: a mask is made of minus infinity",
    ("bd359f1c", "not a number"): "2: the naive softmax overflows, which is the lesson",
    ("206544b4", "not a number"): "2: log of a softmax underflows, which is the lesson",
    ("d8cec29d", "not a number"): "2: without smoothing a row of zeros is divided by 0",
    ("4dc5391f", "not a number"): "5: a mask is made of minus infinity",
    ("36a3b6c6", "not a number"): "5: a mask upside down leaves a row without a key",
    ("8ec0a2fb", "4.63 in prose"): "3: a published figure, beside our own",
    ("8ec0a2fb", "4.77 in prose"): "3: a published figure, beside our own",
    ("8ec0a2fb", "2.46 in prose"): "3: a published figure, beside our own",
    ("042827b1", "not a number"): "6: a step with a loss that is NaN is refused",
    ("2b9338dc", "not a number"): "6: the dump of that step names the NaN",
    ("f300a185", "not a number"): "7: the run without clipping has an infinite limit",
    ("5e10730b", "0.4748 in prose"): "7: by hand, and checked by the cell after next",
    ("8382d658", "32,767 in prose"): "7: the last of the rows before the printed end",
    ("53afabc6", "128 in prose"): "10: bits of a key, no measurement",
}


def shown_text(output: dict) -> str:
    "Return the text that a reader sees in an output; figures have none."
    if output["output_type"] == "stream":
        return joined(output["text"])
    data = output.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        return ""
    for kind in ("text/html", "text/markdown", "text/plain"):
        if kind in data:
            # Scripts and styles of a page are not shown, only what is between them.
            text = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", joined(data[kind]))
            return text if kind == "text/plain" else re.sub(r"<[^>]*>", " ", text)
    return ""


def joined(text: str | list[str]) -> str:
    "Return a notebook's text, which may be stored as a list of lines."
    return text if isinstance(text, str) else "".join(text)


def is_hidden(cell: dict) -> bool:
    "Return whether the book omits a cell's output."
    tags = cell.get("metadata", {}).get("tags", [])
    return bool({"remove-cell", "remove-output"} & set(tags))


def output_complaints(name: str, cell: dict) -> list[Complaint]:
    "Apply the rules to the outputs of a code cell."
    found = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            found.append(Complaint(name, cell["id"], "error", output["evalue"][:80]))
            continue
        text = shown_text(output)
        # The book does not show stderr; only failures in it matter.
        hidden = output.get("name") == "stderr" or is_hidden(cell)
        for kind, pattern in RULES.items():
            if hidden and kind not in ("traceback", "warning"):
                continue
            if match := re.search(pattern, text, re.M):  # one of each kind is enough
                line = text[: match.end()].splitlines()[-1]
                found.append(Complaint(name, cell["id"], kind, line.strip()[-80:]))
    return found


# ---- Numbers in prose

NUMBER = re.compile(
    r"(?<![\w.,^/])[-−]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<![\w.,^/])\d+\.?\d*"
)
# Numbers in links, code, formulas and directives make no claim about a cell.
NOT_PROSE = re.compile(
    r"(?s)```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`|\]\([^)]*\)|\{[\w:]+\}`[^`]*`"
)


def numbers(text: str) -> list[tuple[str, float]]:
    "Return the numbers in a text, as written and as values."
    found = [match[0].rstrip(".") for match in NUMBER.finditer(text)]
    plain = [(x, x.replace(",", "").replace("−", "-")) for x in found]
    return [(written, float(value)) for written, value in plain]


def digits(written: str) -> int:
    "Count significant digits, without the trailing zeros of whole numbers."
    bare = re.sub(r"[,−-]", "", written)
    bare = bare if "." in bare else bare.rstrip("0")
    return len(bare.replace(".", "").lstrip("0"))


def agrees(written: str, claimed: float, printed: float) -> bool:
    "Return whether a printed number, rounded like the prose, is the claimed one."
    decimals = len(written.partition(".")[2])
    unit = 10.0**-decimals
    if not decimals:
        bare = re.sub(r"[,−-]", "", written)
        unit = 10.0 ** (len(bare) - len(bare.rstrip("0")))
    # Allow half a unit, percent instead of fractions, and thousands for thousandths.
    return any(
        abs(claimed - printed * factor) <= 0.5001 * unit
        for factor in (1, 100, 1e3, 1e-3)
    )


def prose_complaints(name: str, prose: dict, outputs: str) -> list[Complaint]:
    "Find numbers in a paragraph that nearly equal a number printed next to it."
    text = NOT_PROSE.sub(" ", joined(prose["source"]))
    printed = [value for _, value in numbers(outputs)]
    found = []
    for written, claimed in numbers(text):
        if re.fullmatch(r"(19|20)\d\d", written):  # a year
            continue
        if digits(written) < 3 or any(agrees(written, claimed, x) for x in printed):
            continue
        values = [x * factor for x in printed for factor in (1, 100) if x]
        near = [x for x in values if abs(claimed / x - 1) < NEAR]
        if near:
            told = f"beside {near[0]:g}"
            found.append(Complaint(name, prose["id"], f"{written} in prose", told))
    return found


def beside(cells: list[dict], place: int) -> str:
    "Return the outputs of the code cells directly above and below a paragraph."
    texts = []
    for step in (-1, 1):
        at = place + step
        while 0 <= at < len(cells) and cells[at]["cell_type"] == "code":
            texts += [shown_text(output) for output in cells[at].get("outputs", [])]
            at += step
    return "\n".join(texts)


# ---- The whole book


def complaints(name: str, notebook: dict) -> list[Complaint]:
    "Scan one executed notebook, without removing what is allowed."
    found = []
    cells = notebook["cells"]
    for place, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            found += output_complaints(name, cell)
        else:
            found += prose_complaints(name, cell, beside(cells, place))
    return found


def judge(found: list[Complaint], allowed: dict[tuple[str, str], str]) -> list[str]:
    "Drop what is allowed; an unused permission becomes a problem itself."
    used = {(c.cell, c.kind) for c in found}
    told = [str(c) for c in found if (c.cell, c.kind) not in allowed]
    for key, reason in allowed.items():
        if key not in used:
            told.append(f"nothing needs this permission any more: {key} ({reason})")
    return told


def in_prose(kind: str) -> bool:
    "Return whether a problem is a number in prose."
    # Times differ from run to run and may come close to a number in prose by accident, so
    # such a problem needs a look but is not a failure.
    return kind.endswith("in prose")


def permissions(prose: bool) -> dict[tuple[str, str], str]:
    "Return the permissions for numbers in prose, or for everything else."
    return {key: why for key, why in ALLOWED.items() if in_prose(key[1]) is prose}


def executed(folder: Path) -> dict[str, Any]:  # notebook's stem -> executed notebook
    "Load the book's notebooks with the outputs that Sphinx has cached."
    from jupyter_cache import get_cache
    from nbdev_reader import read

    cache = get_cache(str(folder))
    found = {}
    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = read(file.read_text("utf-8"))
        try:
            record = cache.match_cache_notebook(notebook)
        except KeyError:
            raise SystemExit(
                f"{file.name} has not been executed: run make book"
            ) from None
        outputs = iter(cache.get_cache_bundle(record.pk).nb.cells)
        # The cache holds only code cells; the paragraphs are in the file.
        cached = [cell for cell in outputs if cell["cell_type"] == "code"]
        for cell in notebook.cells:
            if cell["cell_type"] == "code":
                cell["outputs"] = cached.pop(0)["outputs"]
        found[file.stem] = notebook
    return found


def cache_folder() -> Path:
    "Return the folder where Sphinx caches the executed notebooks."
    spec = importlib.util.spec_from_file_location("conf", HERE / "conf.py")
    assert spec and spec.loader, "conf.py is a file"
    conf: Any = importlib.util.module_from_spec(spec)
    conf.tags = SimpleNamespace(has=lambda tag: False)  # Sphinx would provide it
    with patch.dict(os.environ):  # conf.py sets variables for the kernels
        spec.loader.exec_module(conf)
    return Path(conf.nb_execution_cache_path)


def main() -> int:
    "Scan the book, print the problems and return the exit code."
    folder = cache_folder()
    if not folder.exists():
        print(f"no executed book in {folder.name}: run make book")
        return 1
    book = executed(folder)
    found = [c for name, notebook in book.items() for c in complaints(name, notebook)]
    told = judge([c for c in found if not in_prose(c.kind)], permissions(prose=False))
    print("FAIL" if told else "ok  ", f"outputs of {len(book)} executed notebooks")
    for line in told:
        print("      ", line)
    for doubt in judge([c for c in found if in_prose(c.kind)], permissions(prose=True)):
        print("       look at", doubt)
    return min(len(told), 1)


if __name__ == "__main__":
    sys.exit(main())
