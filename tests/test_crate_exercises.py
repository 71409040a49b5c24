"""The solutions of chapter 10 that change the crate: apply each, and run the crate's tests."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.build]  # compiles the crate

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "nbs" / "10_rust_implementation.ipynb"


def solutions() -> dict[str, str]:
    "Return the diffs that the chapter prints, by the exercise's label."
    cells = json.loads(CHAPTER.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    boxes = re.findall(r"### Solution (\S+)(.*?)\n</details>", text, re.S)
    diffs = {name: re.findall(r"```diff\n(.*?)```", box, re.S) for name, box in boxes}
    return {name: "".join(found) for name, found in diffs.items() if found}


def test_two_exercises_change_the_crate():
    assert len(solutions()) == 2


def test_the_solutions_pass_the_crates_tests(tmp_path):
    "Both together: they change different files, and compiling twice costs a minute."
    crate = tmp_path / "rustbpe"
    ignore = shutil.ignore_patterns("target", "fuzz")
    shutil.copytree(ROOT / "rustbpe", crate, ignore=ignore)
    for diff in solutions().values():
        apply = ["git", "apply", "-"]
        subprocess.run(apply, cwd=tmp_path, input=diff, text=True, check=True)
    for file in ("src/split.rs", "src/train.rs"):
        assert (crate / file).read_bytes() != (ROOT / "rustbpe" / file).read_bytes()

    test = ["cargo", "test", "-q", "--test", "split", "--test", "reference"]
    env = os.environ | {"CARGO_TARGET_DIR": str(ROOT / "rustbpe" / "target")}
    done = subprocess.run(test, cwd=crate, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
