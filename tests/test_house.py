"""dev/check.py, which `make check` runs on the repository, finds what it should."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))
import check

GOLF = {
    "x = 1  # why\n" * 31: "31 lines, 30 at most",
    "    # a comment does not count as a body\n    return 0\n": "",
    "    count, found = 0, []\n": "two statements in one",
    "    left, right = right, left\n": "",
    "    low, high = min(xs), max(xs)\n": "",
    "    total = lambda xs: sum(xs)\n": "a lambda with a name",
    "    return [[y for y in x] for x in xs]\n": "a comprehension inside another",
    "    total: object = lambda xs: sum(xs)\n": "a lambda with a name",
    "    xs.total = lambda: 0\n": "",
    "x = 1\n" * 15: "15 lines without a comment",
    "x = 1\n" * 14: "",
    "x = 1  # why\n" * 15: "",
    "x = '# no comment'\n" * 15: "15 lines without a comment",
}


@pytest.mark.parametrize("body", GOLF)
def test_what_is_hard_to_read_is_found(body):
    lines = body if body.startswith(" ") else "    " + body.replace("\n", "\n    ")
    found = check.habits("module", f"def f(xs):\n{lines}")
    assert [GOLF[body] in problem for problem in found] == [True] * bool(GOLF[body])


def test_a_signature_of_six_is_found():
    (found,) = check.habits("m", "def f(a, b, c, d, e, g): pass")
    assert found == "m.f: 6 positional parameters"
    assert not check.habits("m", "def f(a, b, c, d, e, *, g): pass")
    method = "class A:\n    def f(self, a, b, c, d, e): pass"
    assert not check.habits("m", method)
    for by_name in ("def test_f", "@pytest.fixture\ndef f"):
        assert not check.habits("m", f"{by_name}(a, b, c, d, e, g): pass")


def test_every_file_of_python_is_read():
    names = check.python_files()
    assert {"gpt", "tasks.arc", "scripts/chat_web", "dev/gpu_sections/card"} <= {*names}
    assert {"book/scan", "book/_ext/nbdev_reader", "tests/test_house"} <= {*names}


def test_a_test_may_be_longer_than_what_it_tests():
    lines = "    x = 1\n" * 45
    assert check.habits("m", f"def f():\n{lines}")
    assert not check.habits("m", f"def f():\n{lines}", check.TESTS)
    assert check.habits("m", f"def f():\n{lines}    x = 1\n", check.TESTS)


def test_reader_translates_directives():
    source = '#| export tasks.arc\n#| fig-cap: "Two \\"words\\"."\n\nx = 1'
    directives, code = check.split_directives(source)
    assert directives == {"export": "tasks.arc", "fig-cap": 'Two "words".'}
    assert check.module_file(directives) == "nanochat/tasks/arc.py"
    assert code == "x = 1"


def test_generated_relative_imports_are_recognised():
    line = "    from ..gpt import GPT"
    assert check.absolute(line, "tasks.arc") == "    from nanochat.gpt import GPT"
    assert check.absolute("from . import gpt", "engine") == "from nanochat import gpt"


# ---- The Markdown of the chapters

markup = check.markup


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("see {ref}`sec-x` there", "a role"),
        ("see {cite:p}`a2020b`", "a role"),
        (":::{note}\ntext", "a directive"),
        ("```{figure} x.png\n```", "a directive"),
        ("text\n:::", "the end of a directive"),
        (":class: dropdown\ntext", "an option of a directive"),
        ("(sec-x)=\n## Heading", "a label"),
        ("$$\nx\n$$ (eq-x)", "the label of an equation"),
        ("{.wide}\ntext", "attributes"),
    ],
)
def test_markup_that_jupyter_would_show_is_found(text, kind):
    assert any(told.startswith(kind + ":") for told in markup.raw(text))


@pytest.mark.parametrize(
    "text",
    [
        "`{a}` and `{b}` are operands, `{ref}` is a word",
        "```python\n{a}`x`\n:::\n(label)=\n```",
        "a set $\\{x\\}$, $$y$$ (with a remark), a ratio 3:1",
        "> **Takeaway.** text\n\n| a | b |\n|:--|--:|",
    ],
)
def test_markdown_that_everybody_understands_is_left_alone(text):
    assert markup.raw(text) == []


SAMPLE = {  # a chapter in which everything is right
    "head": "# Sample\n\n## The loss mask, again\n\n[Figure 3.1](#fig-a), [equation 3.1](#eq-a)",
    "code": '#| fig-alt: "A line."\nplot()',
    "caption": '<a id="fig-a"></a>**Figure 3.1.** A line.',
    "equation": '<a id="eq-a"></a>\n$$ x = 1 \\tag{3.1} $$',
    "exercise": '<a id="ex-a"></a>\n### Exercise 3.1 ★★: Why?\n\n[Solution 3.1](#sol-a)',
    "solutions": '<a id="sol-a"></a>\n### Solution 3.1: Why?\n\n[exercise 3.1](#ex-a)\n\n'
    "<details>\n<summary>Show</summary>\n\nSo. [Mask](#The-loss-mask,-again)\n\n</details>",
    "hidden": "1 + 1",
}


def write_chapter(folder: Path, **changes: str) -> Path:
    "Write the sample with changes, and return its file."
    cells = []
    for name, text in (SAMPLE | changes).items():
        cell = {"cell_type": "markdown", "id": name, "metadata": {}, "source": [text]}
        if name in ("code", "hidden"):
            cell["cell_type"] = "code"
            hidden = {"source_hidden": True, "outputs_hidden": True}
            cell["metadata"] = {"jupyter": hidden} if name == "hidden" else {}
        if text.startswith('<a id="sol-'):
            cell["metadata"] = {"jp-MarkdownHeadingCollapsed": True}
        cells.append(cell)
    file = folder / "03_sample.ipynb"
    file.write_text(json.dumps({"cells": cells}), "utf-8")
    return file


def complaints() -> list[str]:
    return [problem for test in markup.CHECKS for problem in test()]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, ""),
        ({"caption": '<a id="fig-a"></a>**Figure 3.2.** A line.'}, "figure 3.2"),
        ({"equation": SAMPLE["equation"].replace("3.1", "4.1")}, "equation 4.1"),
        ({"exercise": SAMPLE["exercise"].replace("e 3.1", "e 3.7")}, "exercise 3.7"),
        ({"head": SAMPLE["head"].replace("Figure 3.1", "Figure 3.4")}, "Figure 3.4 is"),
        ({"head": SAMPLE["head"].replace("again", "anew")}, "no or several #The-loss"),
        ({"solutions": SAMPLE["solutions"].replace("The-l", "the-l")}, "no or several"),
        ({"caption": "A line."}, "figure without caption"),
        ({"code": SAMPLE["code"] + "\n#"}, ""),
        ({"code": '#| fig-cap: "A"\n' + SAMPLE["code"]}, "write the caption below"),
        ({"code": "plot()"}, "figure without caption"),
        ({"solutions": "## Solutions"}, "ex-a and sol-a"),
        (
            {"solutions": SAMPLE["solutions"].replace("<details>", "")},
            "without details",
        ),
        ({"more": '<a id="eq-a"></a>text'}, "two anchors eq-a"),
        ({"more": "## Größe\n\n[size](#Größe)"}, "put an anchor"),
    ],
)
def test_what_is_wrong_in_a_chapter_is_found(changes, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "NOTEBOOKS", tmp_path)
    write_chapter(tmp_path, **changes)
    found = complaints()
    assert bool(found) == bool(complaint), found
    assert any(complaint in problem for problem in found) or not complaint


def test_code_that_jupyter_does_not_fold_is_found_and_folded(tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "NOTEBOOKS", tmp_path)
    file = write_chapter(tmp_path, code="#| code-fold: true\n" + SAMPLE["code"])
    file.write_text(file.read_text().replace('"outputs_hidden": true', '"x": 1'))
    assert [problem.split("]")[0] for problem in complaints()] == [
        "03_sample.ipynb [code",
        "03_sample.ipynb [hidden",
    ]
    markup.main()
    assert complaints() == []
    cells = {cell["id"]: cell for cell in json.loads(file.read_text())["cells"]}
    assert cells["code"]["metadata"]["jupyter"] == {"source_hidden": True}
    assert markup.folds({"hide": ""}, False) == markup.folds({}, True)
    assert markup.folds({"hide_output": ""}, False) == {"outputs_hidden": True}


def test_numbers_are_put_in_order_with_the_links_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "NOTEBOOKS", tmp_path)
    new = '<a id="fig-new"></a>**Figure 3.99.** Another.'
    file = write_chapter(tmp_path, head=SAMPLE["head"] + "; [figure 3.99](#fig-new)")
    cells = json.loads(file.read_text())["cells"]
    cells[1:1] = [cells[1], cells[2] | {"source": [new]}]  # before the other figure
    file.write_text(json.dumps({"cells": cells}), "utf-8")
    assert len(complaints()) == 4
    markup.main()
    assert complaints() == []
    text = file.read_text()
    assert "[Figure 3.2](#fig-a)" in text and "[figure 3.1](#fig-new)" in text


def test_headings_are_spelled_as_jupyter_spells_their_anchors():
    from plain import slug

    assert slug("Adam, by hand") == "Adam,-by-hand"
    assert slug("The `code` of *this*") == "The-code-of-this"


def test_the_glossary_is_in_order_and_each_entry_leads_to_a_chapter():
    page = markup.NOTEBOOKS / "appendix_glossary.ipynb"
    text = "\n\n".join(text for _, text in markup.prose(page))
    terms = []
    lost = []
    for entry in text.split("\n### ")[1:]:
        terms.append(entry.split("\n")[0].casefold())
        # That the section exists is a matter of `markup.every_link_leads_somewhere`.
        links = [path for _, path, _ in markup.LINK.findall(entry)]
        if not any(path[:2].isdigit() for path in links):
            lost.append(terms[-1])
    assert lost == [], "no link to a section of a chapter"
    assert terms == sorted(set(terms))


def test_the_site_gets_what_plain_markdown_cannot_say():
    from plain import to_myst

    assert to_myst(SAMPLE["equation"]) == "(eq-a)=\n\n$$ x = 1\n$$ (eq-a)"
    told = to_myst("a\n\n> **Takeaway.** One.\n>\n> Two.\n\nb")
    inside = ":::::{admonition} Takeaway\n:class: tip\n\nOne.\n\nTwo.\n:::::"
    assert told == f"a\n\n{inside}\n\n\nb"
    told = to_myst(SAMPLE["exercise"] + "\n\n```\n# no heading\n```\n\n## Next")
    assert told.startswith("(ex-a)=\n:::::{admonition} Exercise 3.1 ★★: Why?")
    assert told.endswith("# no heading\n```\n:::::\n\n## Next")
    assert "details" not in to_myst(SAMPLE["solutions"])
    untouched = (
        "```\n> **Bold.** code\n```\n\n> a quote\n\n<details>\n\nb\n\n</details>"
    )
    assert to_myst(untouched) == untouched


def test_the_caption_below_a_figure_becomes_its_caption():
    import nbformat
    from nbdev_reader import read

    notebook = nbformat.v4.new_notebook()
    for name in ("code", "caption"):
        make = nbformat.v4.new_code_cell
        make = nbformat.v4.new_markdown_cell if name == "caption" else make
        notebook.cells.append(make(SAMPLE[name]))
    (cell,) = read(nbformat.writes(notebook)).cells
    assert cell.source == "plot()"
    assert cell.metadata["mystnb"] == {
        "image": {"alt": "A line."},
        "figure": {"caption": "A line.", "name": "fig-a"},
    }
