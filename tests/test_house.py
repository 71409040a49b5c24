"""dev/check.py, which `make check` runs on the repository, finds what it should."""

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
