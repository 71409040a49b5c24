"""The package where POSIX is hidden, and that it is: see tests/no_posix/sitecustomize.py.

NANOCHAT_HIDE_POSIX=1 python -m pytest -m "not posix"
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = bool(os.environ.get("NANOCHAT_HIDE_POSIX"))
hidden = pytest.mark.skipif(not HIDDEN, reason="POSIX is not hidden")
seen = pytest.mark.skipif(HIDDEN, reason="POSIX is hidden")

# A part of the suite that saves, locks, renames, deletes and starts processes.
PART = (
    "tests/test_no_posix.py",
    "tests/test_execution.py",
    "tests/test_checkpoint.py::test_keep_last",
    "tests/test_checkpoint.py::test_every_bit_of_the_description_counts",
    "tests/test_download.py::test_whole_after_trouble",
    "tests/test_download.py::test_parallel",
    "tests/test_download.py::test_a_page_that_is_no_parquet_is_refused",
)


@seen
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


# ---- What is hidden


@hidden
def test_modules_and_names_of_posix_are_not_there():
    for name in ("fcntl", "resource", "pwd", "termios"):
        with pytest.raises(ModuleNotFoundError, match="hidden"):
            exec(f"import {name}", {"__file__": __file__})
    assert not any(hasattr(os, name) for name in ("fork", "killpg", "sysconf"))
    assert os.name == "nt" and sys.platform == "win32"


@hidden
def test_an_open_file_can_be_neither_renamed_nor_removed(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb"):
        for take_away in (path.unlink, lambda: path.rename(tmp_path / "other")):
            with pytest.raises(PermissionError, match="used by another process"):
                take_away()
    path.unlink()


@hidden
def test_odd_names_links_and_folders_cannot_be_opened(tmp_path):
    for name in ("a:b", "what?", "end.", "nul"):
        with pytest.raises(OSError, match="no such name"):
            (tmp_path / name).write_text("x", "utf-8")
    with pytest.raises(OSError, match="privilege"):
        (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="a folder"):
        os.open(tmp_path, os.O_RDONLY)


@hidden
def test_only_what_may_be_written_can_be_flushed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with open(path, "rb") as file, pytest.raises(OSError, match="only be read"):
        os.fsync(file.fileno())
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


@hidden
def test_lines_end_as_on_windows(tmp_path):
    path = tmp_path / "file"
    path.write_text("a\nb\n", "utf-8")
    assert path.read_bytes() == b"a\r\nb\r\n" and path.read_text("utf-8") == "a\nb\n"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("a\nb\n")
    assert path.read_bytes() == b"a\nb\n"


@hidden
def test_processes_that_are_started_find_it_hidden_too():
    program = "import sitecustomize; print(sitecustomize.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == ROOT / "tests" / "no_posix"


@hidden
def test_the_default_encoding_is_that_of_windows(tmp_path):
    path = tmp_path / "file"
    path.write_text("é")
    assert path.read_bytes() == b"\xe9"
    with pytest.raises(UnicodeEncodeError):
        path.write_text("→")
    path.write_text("→", "utf-8")
    assert path.read_text("utf-8") == "→"
