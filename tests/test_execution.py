"""Programs of a model: what they cannot do, when they pass, and who may run them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import (
    MAX_FILES,
    MAX_PROCESSES,
    execute_code,
    room_problem,
    visible_folders,
)

pytestmark = pytest.mark.slow  # starts hundreds of processes

ROOT = Path(__file__).resolve().parents[1]
LINUX = sys.platform.startswith("linux")
needs_room = pytest.mark.skipif(bool(room_problem()), reason=room_problem() or "room")


@pytest.fixture(
    params=[
        pytest.param(False, id="room", marks=needs_room),
        pytest.param(True, id="unsafe"),
    ]
)
def unsafe(request):
    "Both ways of running a program."
    return request.param


def report(program, **options):
    "Run a program that prints JSON, and return what it printed."
    result = execute_code(f"import json, os, sys\n{program}", **options)
    assert result.success, result.stderr
    return json.loads(result.stdout)


# ---- When a program passes

CHEATS = [
    "import os; os._exit(0)",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import sys; sys.stdout.close(); import os; os.close(2); os._exit(0)",
    "class E(BaseException): pass\nraise E",
    "import os\nwhile os.fork(): os._exit(0)",
    "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'started' * 9)\n  except OSError: pass",
    "def f(:",
]


@pytest.mark.posix
@pytest.mark.parametrize("cheat", CHEATS)
def test_leaving_early_is_not_success(cheat, unsafe):
    result = execute_code(f"{cheat}\nassert False, 'tests'", timeout=5, unsafe=unsafe)
    assert not result.success
    assert result.error and "\n" not in result.error


@pytest.mark.posix
def test_the_reason_of_a_failure_is_one_line(unsafe):
    reasons = {
        "assert 1 == 2, 'no'": "AssertionError: no",
        "import os; os._exit(0)": "the program exited before its last line",
        "import os; os._exit(3)": "exit code 3",
        "import os; os.kill(os.getpid(), 9)": "killed by signal 9",
        "while True: pass": "not finished within 0.5 s",
    }
    for program, reason in reasons.items():
        result = execute_code(program, timeout=0.5, unsafe=unsafe)
        assert (result.success, result.error) == (False, reason), program


@pytest.mark.posix
def test_limits_of_a_program(unsafe, monkeypatch):
    monkeypatch.setenv("SECRET", "42")

    def run(program, **more):
        return execute_code(program, unsafe=unsafe, **more)

    seen = run("import os; print(os.environ.get('SECRET'), os.getcwd())")
    assert seen.success and seen.stdout.startswith("None /")
    assert run("while True: pass", timeout=0.5).timeout
    assert run("import time; time.sleep(60)", timeout=0.5).timeout
    assert run("x = bytearray(10**9)").memory_exceeded
    assert not run("while True: print('x' * 1000)").success
    assert len(run("print('x' * 500_000)").stdout) == 64 * 1024


@pytest.mark.posix
def test_children_die_with_the_program(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    assert execute_code(program, unsafe=True).success
    time.sleep(1.5)
    assert not mark.exists()


# ---- What a program in the room cannot do


@pytest.mark.posix
@needs_room
def test_a_program_cannot_delete(tmp_path):
    kept = tmp_path / "folder" / "file"
    kept.parent.mkdir()
    kept.write_text("mine")
    program = f"import shutil; shutil.rmtree({str(kept.parent)!r})"
    result = execute_code(program)
    assert not result.success and "FileNotFoundError" in result.error
    assert kept.read_text() == "mine"
    assert execute_code(program, unsafe=True).success  # this is what the room prevents
    assert not kept.exists()


@pytest.mark.posix
@needs_room
def test_nothing_of_the_user_can_be_seen(tmp_path, monkeypatch):
    home, base, here = (tmp_path / name for name in ("home", "base", "here"))
    for folder in (home, base, here):
        folder.mkdir()
        (folder / "secret").write_text("key")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(here)
    files = [str(folder / "secret") for folder in (home, base, here)]
    files += [str(ROOT / "pyproject.toml"), __file__, execution.__file__]
    files += ["/etc/passwd", "/etc/hostname", "/proc/1/root", "/sys/kernel", "/dev/shm"]
    assert all(os.path.exists(file) for file in files[:6])
    shown = f"print(json.dumps([os.path.exists(f) for f in {files!r}]))"
    assert report(shown) == [False] * len(files)


@pytest.mark.posix
@needs_room
def test_every_visible_file_is_one_that_python_needs():
    allowed = [*execution.visible_folders(), "/dev", "/tmp"]
    program = f"""
allowed, seen = {allowed!r}, []
for folder, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(folder, f) not in allowed]
    seen += [os.path.join(folder, f) for f in files]
print(json.dumps([f for f in seen if f not in allowed]))
"""
    assert report(program) == []
    assert str(ROOT) not in allowed and str(Path.home()) not in allowed


@pytest.mark.posix
@needs_room
def test_only_a_small_tmp_can_be_written():
    program = """
places, writable = ["/"], []
while places:
    folder = places.pop()
    try:
        open(os.path.join(folder, "new"), "w").close()
        writable.append(folder)
    except OSError:
        pass
    if folder.count("/") < 6:
        inside = [os.path.join(folder, f) for f in os.listdir(folder)]
        places += [f for f in inside if os.path.isdir(f) and not os.path.islink(f)]
print(json.dumps(writable))
"""
    assert report(program, timeout=30) == ["/tmp"]
    fill = """
total = 0
try:
    for i in range(100):
        with open(f"/tmp/{i}", "wb") as file:
            total += file.write(bytes(1 << 20))
except OSError as error:
    pass
print(json.dumps(total))
"""
    assert MAX_FILES // 2 < report(fill) <= MAX_FILES


@pytest.mark.posix
@needs_room
def test_each_program_finds_an_empty_room():
    program = "print(json.dumps(os.listdir('/tmp'))); open('/tmp/left', 'w').close()"
    found = report(program)
    assert report(program) == found
    # If this Python is installed below /tmp, the way to it is there, and nothing else.
    python = [Path(folder).parts for folder in visible_folders()]
    assert set(found) <= {parts[2] for parts in python if parts[:2] == ("/", "tmp")}


@pytest.mark.posix
@needs_room
def test_packages_that_are_installed_below_tmp_are_there(tmp_path, monkeypatch):
    "A virtual environment in /tmp is read-only in the room, which has a /tmp of its own."
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    try:
        (folder / "in_tmp.py").write_text("answer = 42")
        seen = [*visible_folders(), str(folder)]
        monkeypatch.setattr(execution, "visible_folders", lambda: seen)
        program = f"import sys; sys.path.append({str(folder)!r}); import in_tmp"
        assert report(f"{program}; print(in_tmp.answer)") == 42
        write = f"open({str(folder / 'left')!r}, 'w')"
        assert "OSError" in execute_code(write).error
    finally:
        shutil.rmtree(folder)


@pytest.mark.posix
@needs_room
def test_environment_machine_and_user_are_not_told(monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    told = report(
        "print(json.dumps([dict(os.environ), os.uname().nodename, os.getgroups()]))"
    )
    environment, machine, groups = told
    assert set(environment) <= {"HOME", "PATH", "LANG", "PWD", "LC_CTYPE"}
    assert environment["HOME"] == "/tmp" and machine == "room"
    if os.getuid() == 0:
        assert report("print(json.dumps(os.getuid()))") >= 20_000 and groups == []


@pytest.mark.posix
@needs_room
def test_nobody_can_be_called():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address).close()  # outside it answers
        hidden = socket.socket(socket.AF_UNIX)
        name = f"\0nanochat-{os.getpid()}"
        hidden.bind(name)
        hidden.listen()
        program = f"""
import socket
refused = 0
for family, address in [(2, {address!r}), (1, {name!r}), (2, ("1.1.1.1", 53))]:
    try:
        socket.socket(family).connect(address)
    except OSError:
        refused += 1
print(json.dumps(refused))
"""
        assert report(program) == 3
        hidden.close()


@pytest.mark.posix
@needs_room
def test_other_processes_cannot_be_reached():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
import ctypes
refused = 0
libc = ctypes.CDLL(None, use_errno=True)
for pid, signal in [({sleeper.pid}, 9), ({os.getpid()}, 0)]:
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        refused += 1
    refused += libc.ptrace(16, pid, 0, 0) == -1
print(json.dumps([refused, os.path.exists("/proc/self")]))
"""
        assert report(program) == [4, False]
        assert not execute_code("import os; os.kill(os.getppid(), 9); 1 / 0").success
        time.sleep(0.1)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def living(mark):
    "Count the processes of this machine whose command line holds a text."
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += mark.encode() in file.read_bytes()
        except OSError:
            pass  # it has just ended
    return count


@pytest.mark.posix
@needs_room
def test_processes_are_few_and_none_is_left():
    mark = f"left-over-{os.getpid()}"
    program = f"""
import subprocess, time
children = []
try:
    while len(children) < 50:
        command = [sys.executable, "-S", "-c", "import time; time.sleep(99)", {mark!r}]
        children.append(subprocess.Popen(command, start_new_session=True))
except OSError:
    pass
time.sleep(0.2)
print(json.dumps([len(children), sum(c.poll() is None for c in children)]))
"""
    started, alive = report(program, timeout=20)
    assert started == alive and 1 < started < MAX_PROCESSES
    deadline = time.time() + 5
    while living(mark) and time.time() < deadline:
        time.sleep(0.05)
    assert living(mark) == 0


@pytest.mark.posix
@needs_room
def test_a_program_may_use_the_installed_packages():
    assert (
        report("import regex; print(json.dumps(regex.findall('a', 'aba')))")
        == ["a"] * 2
    )


# ---- Who may run them without the room


@pytest.fixture
def forget():
    "Let the room be tried again, now and afterwards."
    room_problem.cache_clear()
    yield
    room_problem.cache_clear()


def fake_bwrap(folder, script):
    "Write a program that stands where bubblewrap should be."
    file = folder / "bwrap"
    file.write_text(f"#!/bin/sh\necho called >>{folder}/calls\n{script}\n")
    file.chmod(0o755)


def refusal():
    "Return the line with which a program is refused."
    with pytest.raises(UserError) as error:
        execute_code("print(1)")
    message = str(error.value)
    assert "\n" not in message and message.endswith("--unsafe-code")
    assert execute_code("print(1)", unsafe=True).success
    return message


@pytest.mark.posix
@pytest.mark.skipif(not LINUX, reason="bubblewrap exists on Linux only")
def test_without_bubblewrap_a_program_is_refused(monkeypatch, tmp_path, forget):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install bubblewrap" in refusal()


@pytest.mark.posix
def test_a_mac_is_told_to_use_a_container(monkeypatch, forget):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        UserError, match=r"only on Linux: use a Linux container.*--unsafe-code"
    ):
        execute_code("print(1)")


@pytest.mark.parametrize("unsafe", [False, True])
def test_windows_always_refuses(monkeypatch, unsafe):
    "There is no process group with which one could end all that a program starts."
    monkeypatch.delattr(os, "killpg", raising=False)
    with pytest.raises(UserError, match=r"cannot be run on Windows: use WSL$"):
        execute_code("print(1)", unsafe=unsafe)


@pytest.mark.posix
@pytest.mark.skipif(not LINUX, reason="bubblewrap exists on Linux only")
@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "No perm"),
        ("echo 'bwrap: Unknown option --size' >&2; exit 1", "Unknown option --size"),
        ("exit 7", "exit code 7"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_room_that_fails_is_tried_once(monkeypatch, tmp_path, forget, script, reason):
    fake_bwrap(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for _ in range(3):
        assert reason in refusal()
    assert (tmp_path / "calls").read_text() == "called\n"


@pytest.mark.posix
@needs_room
def test_a_room_that_breaks_later_is_not_a_wrong_answer(monkeypatch, tmp_path):
    assert room_problem() == ""
    fake_bwrap(tmp_path, "echo bwrap: out of memory >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="bwrap: out of memory"):
        execute_code("print(1)")


@pytest.mark.posix
@pytest.mark.skipif(not LINUX, reason="bubblewrap exists on Linux only")
def test_there_is_a_room_wherever_bubblewrap_can_build_one():
    bare = ["bwrap", "--unshare-net", "--unshare-pid", "--ro-bind", "/", "/", "true"]
    try:
        able = subprocess.run(bare, capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("bubblewrap is missing or not allowed here")
    assert room_problem() == ""
