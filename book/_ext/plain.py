"""Give the site and the PDF what plain Markdown cannot say, from Markdown that all can read.

A chapter is written in forms that JupyterLab and GitHub show well. Before MyST parses it,
each of them becomes the directive that Sphinx needs:

| written in the notebook                                   | on the site and on paper       |
|-----------------------------------------------------------|--------------------------------|
| `<a id="x"></a>` at the start of a line                   | a target                       |
| `> **Takeaway.** text`                                    | an admonition                  |
| `$$ ... \\tag{7.1} $$`                                     | an equation with a number      |
| a code cell with `#| fig-alt`, then `**Figure 7.1.** ...` | a figure with its caption      |
| `### Exercise 7.1 ★: title`, then text                    | a box                          |
| `### Solution 7.1: title`, then `<details>` and code      | a box that is folded           |

References are links to a heading (`#Adam-by-hand`, spelled as JupyterLab spells the anchor
of a heading) or to such a target; neither needs a translation.
"""

import re

ANCHOR = re.compile(r'<a id="([\w.-]+)"></a>\s*')
CAPTION = re.compile(
    r'(?s)\s*<a id="([\w.-]+)"></a>\s*\*\*Figure ([\w.]+)\.\*\*\s*(.*)'
)
EXERCISE = re.compile(r"### (Exercise [\w.]+\b.*)")
SOLUTION = re.compile(r"### Solution [\w.]+\b.*")
QUOTE = re.compile(r"> \*\*([^*]+)[.:]\*\*\s*(.*)")
NUMBERED = re.compile(
    r'(?ms)^<a id="([\w.-]+)"></a>\s*^\$\$((?:(?!\$\$).)*?)\s*\\tag\{[\w.]+\}\s*\$\$'
)
FOLD = re.compile(r"</?details>|<summary>.*</summary>")
KINDS = {"Warning": "warning", "Note": "note"}  # all other boxes are tips


def slug(heading: str) -> str:
    "Return the anchor that JupyterLab and GitHub give a heading of a notebook."
    return re.sub(r"[`*]", "", heading).strip().replace(" ", "-")


def box(title: str, kind: str, lines: list[str]) -> list[str]:
    "Return the directive of an admonition."
    body = "\n".join(lines).strip("\n").split("\n")
    return [f":::::{{admonition}} {title}", f":class: {kind}", "", *body, ":::::", ""]


class Translator:
    "Translate one cell of Markdown, line by line; code in fences stays as it is."

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.done: list[str] = []

    def next_line(self) -> str:
        "Return the next line without taking it; the end looks like a heading."
        return self.lines[0] if self.lines else "# end"

    def take_fence(self) -> list[str]:
        "Take a fenced block of code, with both fences."
        mark = re.match(r"\s*(`{3,}|~{3,})", self.lines[0])
        taken = [self.lines.pop(0)]
        while mark and self.lines:
            taken.append(self.lines.pop(0))
            if taken[-1].strip() == mark[1]:
                break
        return taken

    def take_until(self, stop: re.Pattern) -> list[str]:
        "Take lines up to one that matches, which may not stand in a block of code."
        taken = []
        while not stop.match(self.next_line()):
            taken += self.take_fence()
        return taken

    def step(self) -> None:
        "Translate what begins on the next line."
        line = self.next_line()
        if found := ANCHOR.match(line):
            # What follows on the same line, such as the text of a work, is next.
            self.done.append(f"({found[1]})=")
            self.lines[0] = line[found.end() :]
            if not self.lines[0]:
                self.lines.pop(0)
        elif found := QUOTE.match(line):
            self.lines.pop(0)
            quote = [x[1:].removeprefix(" ") for x in self.take_until(NOT_QUOTED)]
            kind = KINDS.get(found[1], "tip")
            self.done += box(found[1], kind, [found[2], *quote])
        elif found := EXERCISE.match(line):
            self.lines.pop(0)
            self.done += box(found[1], "exercise", self.take_until(NEXT))
        else:
            self.done += self.take_fence()

    def run(self) -> str:
        "Return the translation."
        while self.lines:
            self.step()
        return "\n".join(self.done)


NEXT = re.compile(r'#+ |<a id="')
NOT_QUOTED = re.compile(r"[^>]|$")


def to_myst(text: str) -> str:
    "Translate a cell or a page."
    text = NUMBERED.sub(r"(\1)=\n\n$$\2\n$$ (\1)", text)
    text = Translator(text).run()
    if re.search(rf"(?m)^{SOLUTION.pattern}", text):
        text = "\n".join(x for x in text.split("\n") if not FOLD.fullmatch(x.strip()))
    return text


def is_caption(cell) -> bool:
    "Return whether a cell is the caption of the figure above it."
    return cell["cell_type"] == "markdown" and bool(
        CAPTION.fullmatch("".join(cell["source"]))
    )


def join_captions(cells: list) -> list:
    "Hand each caption to the code cell above it, and return the other cells."
    kept: list = []
    for cell in cells:
        found = cell["cell_type"] == "markdown" and CAPTION.fullmatch(cell["source"])
        if not found or not kept:
            kept.append(cell)
            continue
        style = kept[-1]["metadata"].setdefault("mystnb", {})
        style["figure"] = {"caption": found[3].strip(), "name": found[1]}
        style.setdefault("image", {}).setdefault("alt", found[3].strip())
    return kept


def open_solutions(cells: list) -> None:
    "Show the code of solutions, since the box around them is folded already."
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            heads = re.findall(r"(?m)^#{1,3} .*", cell["source"])
            inside = bool(SOLUTION.match(heads[-1])) if heads else inside
        elif inside and "hide-input" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].remove("hide-input")


def translate(notebook) -> None:
    "Translate the Markdown of a notebook."
    notebook.cells = join_captions(notebook.cells)
    open_solutions(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = to_myst(cell.source)
