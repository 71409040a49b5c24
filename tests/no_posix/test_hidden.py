"""What sitecustomize.py hides; collected only where it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_modules_and_names_of_posix_are_not_there():
    for name in ("fcntl", "resource", "pwd", "termios"):
        with pytest.raises(ModuleNotFoundError, match="hidden"):
            exec(f"import {name}", {"__file__": __file__})
    assert not any(hasattr(os, name) for name in ("fork", "killpg", "sysconf"))
    assert os.name == "nt" and sys.platform == "win32"


def test_an_open_file_can_be_neither_renamed_nor_removed(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb"):
        for take_away in (path.unlink, lambda: path.rename(tmp_path / "other")):
            with pytest.raises(PermissionError, match="used by another process"):
                take_away()
    path.unlink()


def test_odd_names_links_and_folders_cannot_be_opened(tmp_path):
    for name in ("a:b", "what?", "end.", "nul"):
        with pytest.raises(OSError, match="no such name"):
            (tmp_path / name).write_text("x", "utf-8")
    with pytest.raises(OSError, match="privilege"):
        (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="a folder"):
        os.open(tmp_path, os.O_RDONLY)


def test_only_what_may_be_written_can_be_flushed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with open(path, "rb") as file, pytest.raises(OSError, match="only be read"):
        os.fsync(file.fileno())
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def test_lines_end_as_on_windows(tmp_path):
    path = tmp_path / "file"
    path.write_text("a\nb\n", "utf-8")
    assert path.read_bytes() == b"a\r\nb\r\n" and path.read_text("utf-8") == "a\nb\n"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("a\nb\n")
    assert path.read_bytes() == b"a\nb\n"


def test_processes_that_are_started_find_it_hidden_too():
    program = "import sitecustomize; print(sitecustomize.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == ROOT / "tests" / "no_posix"


def test_a_file_can_be_run_as_a_program(tmp_path):
    "Python opens it before there is any frame whose file could be looked at."
    path = tmp_path / "program.py"
    path.write_text("import os; print(os.name)", "utf-8")
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "posix"  # not ours, so it is not deceived


def test_the_default_encoding_is_that_of_windows(tmp_path):
    path = tmp_path / "file"
    path.write_text("é")
    assert path.read_bytes() == b"\xe9"
    with pytest.raises(UnicodeEncodeError):
        path.write_text("→")
    path.write_text("→", "utf-8")
    assert path.read_text("utf-8") == "→"
