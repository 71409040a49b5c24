"""Check the notebooks' Markdown: plain, numbered in order, every link leading somewhere.

    python dev/markup.py            put numbers in order and fold code; `make export` runs it

A chapter is read in JupyterLab, on GitHub, on the site and on paper, so it is written in
Markdown that all four understand; book/_ext/plain.py says what the site makes of it. Who
inserts a figure, an equation or an exercise gives it any unused number, such as 7.99; the
command above puts the numbers in order, in the links to them as well. It also tells
JupyterLab which cells to fold: those that the site folds, and all code of solutions.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from nbdev_reader import split_directives
from plain import CAPTION, slug

RAW = {  # what JupyterLab and GitHub would show as it stands: its pattern
    "a role": r"\{[a-z][\w:+-]*\}``",
    "a directive": r"(?m)^\s*(?::{3,}|`{3,}|~{3,})\{[\w:-]+\}",
    "the end of a directive": r"(?m)^\s*:{3,}[ \t]*$",
    "an option of a directive": r"(?m)^:[a-z][\w-]*:(?: |$)",
    "a label": r"(?m)^\([\w.:-]+\)=[ \t]*$",
    "the label of an equation": r"\$\$[ \t]*\([\w.:-]+\)",
    "attributes": r"(?m)^\{[#.][^}\n]*\}[ \t]*$|[\])`]\{[#.][\w-]+[^}\n]*\}",
}
FENCED = re.compile(r"(?ms)^[ \t]*(`{3,}|~{3,})(?!\{).*?^[ \t]*\1[ \t]*$")
CODE = re.compile(r"(?<!`)(`{1,2})(?!`)[^`]+\1(?!`)")
LINK = re.compile(r"\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([\w./-]*)#([^)\s]+)\)")
ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
HEADING = re.compile(r"(?m)^#{1,6} (.*)$")
# Something with a number: its anchor, its kind and its number.
NUMBERED = re.compile(
    r'(?ms)^<a id="(?P<id>[\w.-]+)"></a>\s*(?:\*\*(?=Figure)|### (?=Exercise|Solution)|(?=\$\$))'
    r"(?:(?P<kind>Figure|Exercise|Solution) |\$\$(?:(?!\$\$).)*?\\tag\{)(?P<number>\d+\.\d+|\d+)"
)
COLLAPSED = "jp-MarkdownHeadingCollapsed"  # JupyterLab's name for a folded section
REFERENCE = re.compile(r"(?i)(figure|equation|exercise|solution) (\d+\.\d+|\d+)")


def source(cell: dict) -> str:
    "Return a cell's text."
    return "".join(cell["source"])


def cells(file: Path) -> list[dict]:
    "Return the cells of a notebook, or a page as one of them."
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        return [{"cell_type": "markdown", "id": "page", "source": [text]}]
    return json.loads(text)["cells"]


def prose(file: Path) -> Iterator[tuple[str, str]]:
    "Yield the id and the text of each cell of Markdown, without blocks of code."
    for cell in cells(file):
        if cell["cell_type"] == "markdown":
            yield cell["id"], FENCED.sub("", source(cell))


def pages() -> list[Path]:
    "Return the notebooks and the other pages."
    return sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("*.md")])


def raw(text: str) -> list[str]:
    "Return what a cell shows a reader that is meant for Sphinx."
    # What stands between backticks is shown as it is: `{ref}` is a word, {ref}`x` a role.
    plain = CODE.sub("``", FENCED.sub("", text))
    found = []
    for kind, pattern in RAW.items():
        for match in re.finditer(pattern, plain):
            found.append(f"{kind}: {match[0].strip()}")
    return found


def markup_is_plain() -> list[str]:
    "JupyterLab and GitHub show no role, directive or label of a chapter."
    problems = []
    for file in pages():
        for name, text in prose(file):
            problems += [f"{file.name} [{name}] {told}" for told in raw(text)]
    return problems


# ---- Numbers


def numbered(file: Path) -> Iterator[tuple[str, str, str]]:
    "Yield the anchor, kind and number of each figure, equation, exercise and solution."
    for _, text in prose(file):
        for found in NUMBERED.finditer(text):
            yield found["id"], (found["kind"] or "equation").lower(), found["number"]


def right_numbers(file: Path) -> dict[str, str]:
    "Return the number that each anchor should have: its chapter's, and one more each."
    prefix = f"{int(file.stem[:2])}." if file.stem[:2].isdigit() else ""
    count: dict[str, int] = {}
    right: dict[str, str] = {}
    for anchor, kind, _ in numbered(file):
        count[kind] = count.get(kind, 0) + 1
        right[anchor] = f"{prefix}{count[kind]}"
    return right


def resolve(file: Path, path: str) -> Path:
    "Return the file that a link names."
    return NOTEBOOKS / path if path else file


def numbers_are_in_order() -> list[str]:
    "Figures, equations, exercises and solutions count from 1, and links say their number."
    problems = []
    # The order of the cells decides what each number is, a link's anchor which one is meant.
    right = {file: right_numbers(file) for file in pages()}
    for file in pages():
        for anchor, kind, number in numbered(file):
            if number != right[file][anchor]:
                problems.append(f"{file.name}: {kind} {number} ({anchor})")
        for _, text in prose(file):
            for words, path, anchor in LINK.findall(text):
                number = right.get(resolve(file, path), {}).get(anchor, "")
                said = REFERENCE.fullmatch(words)
                if said and said[2] != number:
                    problems.append(f"{file.name}: {words} is {number or 'nowhere'}")
    remedy = "run python dev/markup.py"
    return [f"{problem}: {remedy}" for problem in problems]


def renumber(text: str, file: Path, right: dict[Path, dict[str, str]]) -> str:
    "Return a cell of Markdown with the right numbers."

    def thing(found: re.Match) -> str:
        at = found.start("number") - found.start()
        return found[0][:at] + right[file][found["id"]]

    def link(found: re.Match) -> str:
        number = right.get(resolve(file, found[2]), {}).get(found[3])
        if not number or not REFERENCE.fullmatch(found[1]):
            return found[0]
        words = f"{found[1].split()[0]} {number}"
        return f"[{words}]({found[2]}#{found[3]})"

    return LINK.sub(link, NUMBERED.sub(thing, text))


# ---- Links


def anchors(file: Path) -> list[str]:
    "Return what a link into a notebook may name: its headings and its anchors."
    found: list[str] = []
    for _, text in prose(file):
        found += map(slug, HEADING.findall(text))
        found += ANCHOR.findall(text)
    return found


def every_link_leads_somewhere() -> list[str]:
    "A link names a file, and a heading or an anchor that occurs in it once."
    problems = []
    known = {file: anchors(file) for file in pages()}
    for file, names in known.items():
        doubles = {x for x in ids(file) if names.count(x) > 1}
        problems += [f"{file.name}: two anchors {x}" for x in sorted(doubles)]
        for _, text in prose(file):
            for _, path, anchor in LINK.findall(text):
                other = resolve(file, path)
                if "//" in path:
                    continue
                if known.get(other, []).count(anchor) != 1:
                    problems.append(f"{file.name}: no or several {path}#{anchor}")
                # JupyterLab compares the letters of the address with those of the heading.
                if not anchor.isascii():
                    problems.append(f"{file.name}: put an anchor for {anchor}")
    return problems


def ids(file: Path) -> list[str]:
    "Return the anchors that a file sets itself."
    return [name for _, text in prose(file) for name in ANCHOR.findall(text)]


# ---- Figures and solutions


def figures_have_captions() -> list[str]:
    "A cell with `#| fig-alt` is followed by its caption, and a caption has its figure."
    problems = []
    for file in pages():
        above = False
        for cell in cells(file):
            caption = cell["cell_type"] == "markdown" and CAPTION.fullmatch(
                source(cell)
            )
            if above != bool(caption):
                problems.append(f"{file.name} [{cell['id']}]: figure without caption")
            directives, _ = split_directives(source(cell))
            above = cell["cell_type"] == "code" and "fig-alt" in directives
            if cell["cell_type"] == "code" and "fig-cap" in directives:
                problems.append(f"{file.name} [{cell['id']}]: write the caption below")
    return problems


def folds(directives: dict[str, str], solved: bool) -> dict[str, bool]:
    "Return what JupyterLab is told to hide of a cell: what the site hides or folds."
    said = {*directives} | {f"{key}={value}" for key, value in directives.items()}
    code = {"hide", "hide_input", "code-fold=true", "echo=false"} & said
    output = {"hide", "hide_output"} & said
    hidden = {"source_hidden": bool(code), "outputs_hidden": bool(output)}
    return {key: True for key, value in hidden.items() if value or solved}


def folded(all_cells: list[dict]) -> Iterator[tuple[dict, dict]]:
    "Yield each cell with the metadata that it should have for JupyterLab."
    solved = False
    for cell in all_cells:
        if cell["cell_type"] == "markdown":
            heads = HEADING.findall(source(cell))
            solved = heads[-1].startswith("Solution ") if heads else solved
            # Running a cell shows its outputs, but not below a heading that is collapsed.
            yield cell, {COLLAPSED: True} if solved and heads else {}
        elif cell["cell_type"] == "code":
            directives, _ = split_directives(source(cell))
            hidden = folds(directives, solved)
            yield cell, {"jupyter": hidden} if hidden else {}


def folding(cell: dict) -> dict:
    "Return what a cell's metadata tells JupyterLab."
    keys = {"jupyter", COLLAPSED} & cell.get("metadata", {}).keys()
    return {key: cell["metadata"][key] for key in keys}


def code_is_folded() -> list[str]:
    "JupyterLab folds what the site folds, and the code and outputs of solutions."
    problems = []
    for file in pages():
        for cell, right in folded(cells(file)):
            if folding(cell) != right:
                place = f"{file.name} [{cell['id']}]"
                problems.append(f"{place}: run python dev/markup.py to fold it")
    return problems


def exercises_have_solutions() -> list[str]:
    "Each exercise has a solution at the end, whose text is folded."
    problems = []
    for file in pages():
        asked = {a[3:] for a, kind, _ in numbered(file) if kind == "exercise"}
        solved = {a[4:] for a, kind, _ in numbered(file) if kind == "solution"}
        problems += [f"{file.name}: ex-{x} and sol-{x}" for x in asked ^ solved]
        for name, text in prose(file):
            for part in re.split(r"(?m)^(?=### Solution)", text)[1:]:
                if "<details>" not in part or "</details>" not in part:
                    problems.append(f"{file.name} [{name}]: a solution without details")
    return problems


CHECKS = [
    markup_is_plain,
    numbers_are_in_order,
    every_link_leads_somewhere,
    figures_have_captions,
    code_is_folded,
    exercises_have_solutions,
]


def main() -> None:
    "Number everything anew, and fold code."
    # It takes no arguments: a name that is given is refused, not ignored.
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    right = {file: right_numbers(file) for file in pages()}
    for file in right:
        if file.suffix == ".md":
            continue
        notebook = json.loads(file.read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = renumber(source(cell), file, right)
                cell["source"] = text.splitlines(keepends=True)
        for cell, right_folding in folded(notebook["cells"]):
            for key in folding(cell):
                del cell["metadata"][key]
            cell["metadata"] |= right_folding

        # As `make export` leaves a notebook, so that nothing else changes.
        text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
