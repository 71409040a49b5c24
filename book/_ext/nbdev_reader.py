"""Read notebooks for MyST-NB: nbdev's `#|` directives become cell tags and metadata.

The notebooks hold no metadata of the book; this reader translates the comments that
nbdev knows (`hide`, `export`, `eval`, ...) and Quarto's (`code-fold`, `fig-alt`, ...), removes
them from the printed code and heads each exported cell with its module's file name.
"""

import re

import nbformat
from plain import translate

DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+):?\s*(.*?)\s*$")
# The directive on the left gives a cell the tags on the right.
TAGS = {
    "hide": ["remove-cell"],
    "hide_input": ["remove-input"],
    "hide_output": ["remove-output"],
    "exporti": ["exported"],
    "export": ["exported"],
    "code-fold": ["hide-input"],
    "slow": ["skip-execution"],
    "notest": ["skip-execution"],
    "eval=false": ["skip-execution"],
    "echo=false": ["remove-input"],
}


def split_directives(source: str) -> tuple[dict[str, str], str]:
    "Return the `#|` lines at the top of a cell as a dict, and the code below them."
    lines = source.split("\n")
    found = {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        value = match[2]
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1].replace("\\" + value[0], value[0])
        found[match[1]] = value
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def module_file(directives: dict[str, str], default: str = "") -> str:
    "Return `nanochat/tasks/arc.py` for `#| export tasks.arc`, '' for no export."
    for key in ("export", "exporti"):
        if key in directives:
            return f"nanochat/{(directives[key] or default).replace('.', '/')}.py"
    return ""


def read(text: str) -> nbformat.NotebookNode:
    "Return the notebook in the form that MyST-NB expects."
    notebook = nbformat.reads(text, as_version=4)
    default = ""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        found, code = split_directives(cell.source)
        default = found.get("default_exp", default)

        # What nbdev says in directives, MyST-NB wants to hear in tags and metadata.
        tags = cell.metadata.setdefault("tags", [])
        for key, value in found.items():
            tags += TAGS.get(key, []) + TAGS.get(f"{key}={value}", [])
        if not code:
            tags.append("remove-cell")
        if "fig-alt" in found:
            cell.metadata["mystnb"] = {"image": {"alt": found["fig-alt"]}}

        # A reader of the page sees where the code goes.
        if file := module_file(found, default):
            code = f"# {file}\n{code}"
        cell.source = code
    translate(notebook)
    return notebook
