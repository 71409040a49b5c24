"""book/scan.py finds what no reader should find, and leaves alone what is right."""

import importlib.util
import os
import sys
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parents[1] / "book"
SPEC = importlib.util.spec_from_file_location("scan", BOOK / "scan.py")
scan = importlib.util.module_from_spec(SPEC)
sys.modules["scan"] = scan
SPEC.loader.exec_module(scan)


def code(*outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    "A code cell with outputs."
    metadata = {"tags": list(tags)}
    return {"cell_type": "code", "id": "c0de0000", "metadata": metadata} | {
        "source": "...",
        "outputs": list(outputs),
    }


def result(text: str, kind: str = "text/plain") -> dict:
    return {"output_type": "execute_result", "data": {kind: text}, "metadata": {}}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def prose(text: str) -> dict:
    return {"cell_type": "markdown", "id": "7e770000", "metadata": {}, "source": text}


def kinds(*cells: dict) -> list[str]:
    return [c.kind for c in scan.complaints("00_sample", {"cells": list(cells)})]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("nan", "not a number"),
        ("tensor([1.0, nan])", "not a number"),
        ("loss -inf", "not a number"),
        ("{'x': float(inf)}", "not a number"),
        ("Traceback (most recent call last):\n  File", "traceback"),
        ("UserWarning: this is slow", "warning"),
        ("saved in /tmp/tmpab12/model", "path of a machine"),
        ("PosixPath('/home/somebody')", "path of a machine"),
        (r"C:\Users\somebody", "path of a machine"),
        ("<function f at 0x7f12ab34cd56>", "address of an object"),
    ],
)
def test_what_no_reader_should_find(text, kind):
    assert kinds(code(result(text))) == [kind]
    assert kinds(code(stream(text))) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "information about the inference of nanochat's infinite loop",
        "nanometer 3, 'inf': a key, banana",
        "the warning is printed once",
        "see .../runs/step_000001.json and nanochat/data",
        "0x7f is 127",
    ],
)
def test_what_is_right(text):
    assert kinds(code(result(text))) == []


def test_an_error_is_found_although_nothing_is_printed():
    error = {
        "output_type": "error",
        "ename": "ValueError",
        "evalue": "no",
        "traceback": [],
    }
    assert kinds(code(error)) == ["error"]


def test_of_stderr_and_of_hidden_cells_only_failures_count():
    assert kinds(code(stream("/tmp/a/b nan", "stderr"))) == []
    assert kinds(code(stream("FutureWarning: soon", "stderr"))) == ["warning"]
    assert kinds(code(result("'/tmp/a/b'"), tags=("remove-cell",))) == []


def test_what_a_reader_sees_is_scanned_and_nothing_else():
    figure = {"output_type": "display_data", "metadata": {}}
    figure["data"] = {"image/svg+xml": "<svg/>", "text/plain": "<Figure object>"}
    page = result("<script>let x = NaN</script><b>loss</b> 2.5", "text/html")
    page["data"]["text/plain"] = "<IPython.core.display.HTML object>"
    assert kinds(code(figure, page)) == []
    assert kinds(code(result("<td>nan</td>", "text/html"))) == ["not a number"]


@pytest.mark.parametrize(
    ("claim", "printed"),
    [
        ("from 0.1: 0.4749", "0.4748"),
        ("the 46,987 runs", "46,991 runs"),
        ("ends at 2.386 nats", "2.389"),
        ("a share of 43.4 %", "0.4371"),
    ],
)
def test_a_number_beside_another_that_it_nearly_is(claim, printed):
    for cells in (
        (prose(claim), code(stream(printed))),
        (code(stream(printed)), prose(claim)),
    ):
        (kind,) = kinds(*cells)
        number = kind.removesuffix(" in prose")
        assert number in claim


@pytest.mark.parametrize(
    ("claim", "printed"),
    [
        ("ends at 2.386 nats", "[2.38593, 2.41]"),  # rounded as the prose rounds
        ("a share of 43.7 %", "0.4371"),
        ("561 million weights", "560,988,160"),
        ("about 36 steps of 60", "36 steps, 60%"),
        ("measured in 2026", "2048"),  # a year
        ("it takes $0.4749$ and `0.4749`", "0.4748"),  # formulas and code
        (
            "another 0.512 of something",
            "0.4748",
        ),  # not near: not recognized, and said so
    ],
)
def test_a_number_that_is_right_or_of_something_else(claim, printed):
    assert kinds(code(stream(printed)), prose(claim)) == []


def test_only_the_cells_beside_a_paragraph_are_asked():
    far = [
        code(stream("0.4748")),
        prose("in between"),
        code(stream("1")),
        prose("0.4749"),
    ]
    assert kinds(*far) == []
    near = [code(stream("0.4748")), code(stream("1")), prose("0.4749")]
    assert kinds(*near) == ["0.4749 in prose"]


def test_a_permission_holds_for_its_cell_and_must_be_needed():
    found = scan.complaints("06_training", {"cells": [code(result("nan"))]})
    assert len(scan.judge(found, {})) == 1
    assert scan.judge(found, {("c0de0000", "not a number"): "on purpose"}) == []
    (line,) = scan.judge([], {("c0de0000", "not a number"): "on purpose"})
    assert "nothing needs this permission" in line


def test_every_permission_names_a_cell_of_the_book():
    ids = set()
    for file in scan.NOTEBOOKS.glob("*.ipynb"):
        ids |= {cell["id"] for cell in nbformat.read(file, 4).cells}
    kinds_known = {*scan.RULES, "error"}
    for (cell, kind), reason in scan.ALLOWED.items():
        assert cell in ids and len(reason) > 10
        assert kind in kinds_known or kind.endswith(" in prose")


def test_outputs_come_from_the_cache_that_sphinx_leaves(tmp_path, monkeypatch):
    jupyter_cache = pytest.importorskip("jupyter_cache")
    from nbdev_reader import read

    monkeypatch.setattr(scan, "NOTEBOOKS", tmp_path / "nbs")
    scan.NOTEBOOKS.mkdir()
    file = scan.NOTEBOOKS / "01_sample.ipynb"
    cells = [
        nbformat.v4.new_code_cell("#| code-fold: true\nx"),
        nbformat.v4.new_markdown_cell("y"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, file)
    cache = jupyter_cache.get_cache(str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="make book"):
        scan.executed(tmp_path / "cache")
    executed = read(file.read_text("utf-8"))
    executed.cells[0].outputs = [nbformat.v4.new_output("stream", text="nan")]
    bundle = jupyter_cache.base.CacheBundleIn(executed, file)
    cache.cache_notebook_bundle(bundle, check_validity=False)
    (found,) = scan.complaints("01", scan.executed(tmp_path / "cache")["01_sample"])
    assert found.kind == "not a number"


def test_the_folder_is_the_one_that_the_build_uses():
    pytest.importorskip("myst_nb")
    before = dict(os.environ)
    folder = scan.cache_folder()
    assert dict(os.environ) == before
    assert folder.parent == BOOK / "_build" and folder.name.startswith("cache-")


PAGE = """<div class="body"><div class="toctree-wrapper">
<section id="a"><h2>1. One</h2><section id="s"><h3>1.8. Solutions</h3><p>first</p></section></section>
<section id="b"><h2>2. Two</h2><p><a href="#Adam,-by-hand">see</a> <a href="#eq-x">it</a></p>
<section id="Adam,-by-hand"><h3>2.1. Adam, by hand</h3><p id="key">a work</p>
<div class="math" id="equation-eq-x"><span id="eq-x"></span><span class="eqno">(2.1)</span>\\[x\\]</div>
</section><section id="s"><h3>2.2. Solutions</h3><p>second</p></section></section>
</div></div>"""


def test_the_pdf_prints_solutions_last_and_keeps_every_anchor():
    pytest.importorskip("typst")
    pytest.importorskip("pypandoc")
    spec = importlib.util.spec_from_file_location("pdf", BOOK / "pdf.py")
    pdf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pdf)
    body, _ = pdf.clean(PAGE)
    order = ["1. One", "2. Two", "Adam, by hand", "<h2>Solutions</h2>"]
    order += ["<h3>1. One</h3>", "first", "<h3>2. Two</h3>", "second"]
    places = [body.index(order[0])]
    for text in order[1:]:
        places.append(body.index(text, places[-1] + 1))
    assert body.count("Solutions") == 1
    assert 'href="#Adam_-by-hand"' in body and 'id="Adam_-by-hand"' in body
    assert 'id="eq-x"' in body and '<span id="key">' in body
