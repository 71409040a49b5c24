"""What the type checker says: nothing, unless there is something to say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLANTED = """
from nanochat.functional import nats_to_bits
from nanochat.tokenizer import RustBPETokenizer


def find(name: str) -> RustBPETokenizer | None:
    return None


def untyped(x):
    return x


def mistaken() -> str:
    find("a").encode("b")
    return nats_to_bits(1.0)
"""


def module(
    name: str, *words: str | Path, folder: Path = ROOT
) -> subprocess.CompletedProcess:
    "Run a Python module in the checkout, or in another folder."
    command = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.timeout(600)
def test_planted_mistakes_are_found(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)
    # Read in the place of a script, so that the settings of the scripts hold for it.
    script = "scripts/plan.py"
    done = module("mypy", "--shadow-file", script, planted, script)
    for kind in ("[no-untyped-def]", "[union-attr]", "[return-value]"):
        assert kind in done.stdout, done.stdout + done.stderr
    assert "Found 3 errors" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.timeout(600)
def test_the_stub_is_compared_with_the_compiled_crate(tmp_path):
    stub = (ROOT / "rustbpe.pyi").read_text()
    wrong = stub.replace("def push(self, id: int)", "def push(self, token: int)")
    wrong = wrong.replace("    def get_pattern(self) -> str: ...\n", "")
    (tmp_path / "rustbpe.pyi").write_text(wrong)
    # As in the checkout, the crate's own folder lies beside the stub.
    shutil.copytree(ROOT / "rustbpe" / "src", tmp_path / "rustbpe" / "src")
    allowed = ROOT / "dev" / "stubtest.txt"
    done = module("mypy.stubtest", "rustbpe", "--allowlist", allowed, folder=tmp_path)
    assert 'stub parameter "token" differs from runtime parameter "id"' in done.stdout
    assert "rustbpe.Tokenizer.get_pattern is not present in stub" in done.stdout
    assert "Found 2 errors" in done.stdout, done.stdout + done.stderr
