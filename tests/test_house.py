"""The repository as a whole: what `make check` prints, as tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))
import check


@pytest.mark.parametrize("rule", check.CHECKS, ids=lambda rule: rule.__name__)
def test_house(rule):
    assert rule() == []


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
