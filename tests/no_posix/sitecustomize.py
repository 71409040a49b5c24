"""Let the package believe that it runs where there is no POSIX, as on Windows.

    NANOCHAT_HIDE_POSIX=1 python -m pytest -m "not posix"

Python imports this file by itself, in the test runner and in every process that a test
starts, where its folder is on PYTHONPATH; tests/conftest.py sees to that. Only code of
the package, of scripts/ and of tests/ is deceived: PyTorch, pytest and the standard
library chose their code for this system when they were installed, and would break.

What is different for ours:
- modules: `fcntl`, `resource`, `termios`, `pwd`, `grp` and `readline` do not exist;
- names: `os.sysconf`, `os.fork`, `signal.SIGKILL` and their like do not exist, `os.name`
  is "nt" and `sys.platform` "win32";
- files: one that is open cannot be renamed or removed, one that is only read cannot be
  flushed, a folder cannot be opened, a name cannot hold a colon or end in a dot, links
  are refused, and text is cp1252 with \\r\\n unless the caller says otherwise.

Paths still have slashes, and what other libraries do with a path is not looked at.
"""

import builtins
import fcntl
import io
import os
import pathlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / part}{os.sep}" for part in ("nanochat", "scripts", "tests"))

NO_MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline"}
NO_NAMES = {
    "os": """
        sysconf fork forkpty killpg setsid getsid setpgid getpgid getuid geteuid getgid
        getegid setuid setgid chown lchown chroot mkfifo nice uname statvfs wait3 wait4
        WNOHANG sched_getaffinity sched_setaffinity getloadavg O_DIRECTORY O_NOFOLLOW
        O_CLOEXEC posix_fadvise posix_fallocate sync
        """.split(),
    "signal": """
        SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGSTOP SIGCONT
        alarm setitimer pause pthread_sigmask sigwait
        """.split(),
    "time": ["tzset", "pthread_getcpuclockid"],
    "socket": ["AF_UNIX"],
    "sys": [],
}


def lock(number: int, mode: int, size: int) -> None:
    "Lock an open file."
    fcntl.flock(number, fcntl.LOCK_EX)


OTHERS = {"os": {"name": "nt"}, "sys": {"platform": "win32"}}
STAND_INS = {"msvcrt": SimpleNamespace(LK_LOCK=1, locking=lock)}

# Names that no file may have there: devices, odd characters, a dot or blank at the end.
BAD_NAME = re.compile(r'(?i)(con|nul|aux|prn)(\..*)?$|.*[<>:"|?*\x00-\x1f]|.*[. ]$')
SYSTEM = ("/dev/", "/proc/", "/sys/")  # only ever asked for where they exist


class Without(ModuleType):
    "A module of the standard library in which some names do not exist."

    def __init__(self, real: ModuleType):
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_missing", frozenset(NO_NAMES[real.__name__]))
        object.__setattr__(self, "_instead", OTHERS.get(real.__name__, {}))

    def __getattribute__(self, name: str):
        read = object.__getattribute__
        if name in read(self, "_missing"):
            module = read(self, "_real").__name__
            raise AttributeError(f"module {module!r} has no {name!r} (it is hidden)")
        instead = read(self, "_instead")
        return instead[name] if name in instead else getattr(read(self, "_real"), name)

    def __setattr__(self, name: str, value) -> None:
        setattr(object.__getattribute__(self, "_real"), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(object.__getattribute__(self, "_real"), name)

    def __dir__(self) -> list[str]:
        missing = object.__getattribute__(self, "_missing")
        return [
            n for n in dir(object.__getattribute__(self, "_real")) if n not in missing
        ]


def is_ours(file: str | None) -> bool:
    "Tell whether a file holds code of the repository."
    return bool(file) and file.startswith(OURS)


def callers(depth: int) -> list[str]:
    "Return the files whose code the nearest frames run, the innermost first."
    found = []
    # None where Python itself opens the file that it is told to run.
    frame: FrameType | None = sys._getframe(1).f_back
    while frame is not None and len(found) < depth:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


# ---- Modules and names

import_module = builtins.__import__
deceived: dict[str, ModuleType] = {}


def import_without(name, globals=None, locals=None, fromlist=(), level=0):
    "Import as Python does, but give our code the modules of another system."
    asker = (globals or {}).get("__file__")
    if level or not is_ours(asker):
        return import_module(name, globals, locals, fromlist, level)

    base = name.partition(".")[0]
    if base in NO_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r} (it is hidden)", name=name)
    if name in STAND_INS:
        return STAND_INS[name]
    found = import_module(name, globals, locals, fromlist, level)
    if name in NO_NAMES:
        return deceived.setdefault(name, Without(found))
    return found


# ---- Files

# Events of Python's audit that take a file away.
TAKEN_AWAY = ("os.rename", "os.remove", "os.rmdir")


def is_open(path: str) -> bool:
    "Tell whether this process has a file open or mapped, or one inside a folder."
    real = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            held = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # closed since
            continue
        if os.path.isfile(held) and (held == real or held.startswith(real + os.sep)):
            return True
    with open_file("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return any(line.rstrip("\n").endswith(f" {real}") for line in maps)


def check_name(path: str) -> None:
    "Refuse a name that a file cannot have."
    if not path.startswith(SYSTEM) and BAD_NAME.match(os.path.basename(path)):
        raise OSError(22, "Invalid argument (no such name on Windows)", path)


def full_path(path: str | os.PathLike, folder: int) -> str:
    "Return a path that may be relative to an open folder, given by its number."
    path = os.fspath(path)
    return path if folder < 0 else f"/proc/self/fd/{folder}/{path}"


def refuse(event: str, arguments: tuple) -> None:
    "Raise what Windows would raise, where Python tells that a file is touched."
    if event not in ("open", "os.mkdir", "os.symlink", "os.link", *TAKEN_AWAY):
        return
    path = arguments[0]
    files = callers(depth=12)
    # `tempfile` does on every system what its files allow.
    if path is None or isinstance(path, (int, bytes)) or tempfile.__file__ in files:
        return
    if not any(map(is_ours, files)):
        return

    if event in ("os.symlink", "os.link"):
        raise OSError(1, "A required privilege is not held by the client", path)
    if event == "open":
        # `shutil` opens folders, where it can, to delete what is in them.
        folder = arguments[1] is None and os.path.isdir(path)
        if folder and shutil.rmtree.__code__.co_filename not in files:
            raise PermissionError(13, "Permission denied (a folder)", path)
    paths = [full_path(path, arguments[-1])] if event in TAKEN_AWAY else [path]
    if event == "os.rename":
        paths = [os.fspath(path), os.fspath(arguments[1])]
    for path in paths:
        if event in TAKEN_AWAY and os.path.lexists(path) and is_open(path):
            raise PermissionError(13, "It is used by another process", path)
        if event in ("open", "os.mkdir", "os.rename"):
            check_name(os.fspath(path))


flush_file = os.fsync


def flush(number: int) -> None:
    "Force an open file to the disk, if it may be written: Windows refuses any other."
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor (it can only be read)")
    flush_file(number)


open_file = io.open


def open_with_newlines(
    file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **rest
):
    "Open a file; our text has the line ends and the encoding of Windows."
    if "b" not in mode and any(map(is_ours, callers(depth=4))):
        if newline is None and set(mode) & set("wax+"):
            newline = "\r\n"
        if encoding in (None, "locale"):
            encoding = "cp1252"
    return open_file(file, mode, buffering, encoding, errors, newline, **rest)


def hide() -> None:
    "Deceive our code from now on."
    builtins.__import__ = import_without
    builtins.open = io.open = open_with_newlines
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 keeps a reference of its own
        pathlib._NormalAccessor.open = staticmethod(open_with_newlines)
    os.fsync = flush
    sys.addaudithook(refuse)


if os.environ.get("NANOCHAT_HIDE_POSIX"):
    hide()
