"""A part of the suite with POSIX hidden, as tests/no_posix/sitecustomize.py does it.

All of it: NANOCHAT_HIDE_POSIX=1 python -m pytest -m "not posix"
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part of the suite that saves, locks, renames, deletes and starts processes.
PART = (
    "tests/no_posix",
    "tests/test_execution.py",
    "tests/test_checkpoint.py::test_keep_last",
    "tests/test_checkpoint.py::test_every_bit_of_the_description_counts",
    "tests/test_download.py::test_whole_after_trouble",
    "tests/test_download.py::test_parallel",
    "tests/test_download.py::test_a_page_that_is_no_parquet_is_refused",
)


@pytest.mark.slow
@pytest.mark.skipif("NANOCHAT_HIDE_POSIX" in os.environ, reason="it is hidden")
def test_a_part_of_the_suite_passes_without_posix():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not posix", *PART],
        cwd=ROOT,
        env=os.environ | {"NANOCHAT_HIDE_POSIX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
