"""Every command under odd environments: it works or says what is wrong, in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.cli import COMMANDS

pytestmark = pytest.mark.slow  # runs hundreds of commands

ROOT = Path(__file__).parents[1]

# What each command is told; without a model most can only say that there is none.
OPTIONS = {
    "tok_train": ["--vocab-size=300", "--max-chars=5000", "--numbers=1"],
    "tok_eval": ["--num-docs=2"],
    "base_train": ["--depth=1", "--num-iterations=1", "--total-batch-size=4096"],
    "speedrun": ["--depth=0"],
    "chat_web": ["--port=0"],
}

REMOVE = None
ENVIRONMENTS = {
    "plain": {},
    "no home": {"HOME": REMOVE, "NANOCHAT_BASE_DIR": REMOVE, "XDG_CACHE_HOME": REMOVE},
    "home that does not exist": {"HOME": "/nonexistent"},
    "left-over WORLD_SIZE": {"WORLD_SIZE": "2"},
    "left-over LOCAL_RANK": {"LOCAL_RANK": "9"},
    "WORLD_SIZE=0": {"WORLD_SIZE": "0", "RANK": "0"},
    "RANK is empty": {"RANK": "", "WORLD_SIZE": "2"},
    "RANK is a word": {"RANK": "first", "WORLD_SIZE": "2"},
    "ranks without a meeting place": {"RANK": "0", "WORLD_SIZE": "2"},
    "C locale": {"LC_ALL": "C", "LANG": "C"},
    "unknown locale": {"LC_ALL": "xx_YY.UTF-8"},
    "ASCII output": {"PYTHONIOENCODING": "ascii"},
    "terminal of 5 columns": {"COLUMNS": "5", "LINES": "2"},
    "no terminal type": {"TERM": REMOVE},
    "dumb terminal": {"TERM": "dumb"},
    "base folder is a file": {"NANOCHAT_BASE_DIR": "/dev/null"},
    "base folder in /proc": {"NANOCHAT_BASE_DIR": "/proc/nanochat"},
    "base folder with odd letters": {"NANOCHAT_BASE_DIR": "BASE/a b'\"ä%s{x}"},
    "unknown preset": {"NANOCHAT_PRESET": "laptop"},
    "preset of a GPU": {"NANOCHAT_PRESET": "gpu-lab"},
    "unknown dtype": {"NANOCHAT_DTYPE": "float8"},
    "settings that do not exist": {"NANOCHAT_SETTINGS": "/no/such/file.ini"},
    "settings that are none": {"NANOCHAT_SETTINGS": "/etc/hostname"},
    "a record that is none": {"NANOCHAT_GPU_RECORD": "/etc/hostname"},
    "offline": {"NANOCHAT_OFFLINE": "1"},
    "hidden cards": {"CUDA_VISIBLE_DEVICES": ""},
    "one thread too few": {"OMP_NUM_THREADS": "0"},
}


@pytest.fixture
def in_a_fork(fork_server):
    "Return a function that runs `nanochat ARGV` in a changed environment."

    def run(
        argv: list[str], change: dict, folder: Path, umask: int = 0o022
    ) -> tuple[int, str]:
        out = folder / "out.txt"
        job = {"argv": argv, "environment": change, "umask": umask}
        job |= {"folder": str(folder), "out": str(out), "err": str(out)}
        return fork_server(job | {"stdin": os.devnull}), out.read_text(errors="replace")

    return run


@pytest.mark.posix
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_works_or_says_why_not(name, tmp_path, in_a_fork):
    wrong = []
    for command in COMMANDS:
        folder = tmp_path / command
        folder.mkdir()
        argv = [command, *OPTIONS.get(command, [])]
        code, said = in_a_fork(argv, ENVIRONMENTS[name], folder)
        clear = code == 0 or (code == 2 and "rror" in said)
        if not clear or "Traceback" in said:
            wrong.append(f"{command}: exit code {code}\n{said[-1500:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.posix
@pytest.mark.parametrize("columns", [1, 5, 20, 400])
def test_help_ends_on_any_terminal(columns, tmp_path, in_a_fork):
    for command in COMMANDS:
        code, said = in_a_fork([command, "--help"], {"COLUMNS": str(columns)}, tmp_path)
        assert code == 0 and "--" in said, (command, said[-500:])


@pytest.mark.posix
def test_help_names_the_command_that_was_typed(tmp_path, in_a_fork):
    for command in ("plan", "speedrun", "base_train"):
        _, said = in_a_fork([command, "--help"], {}, tmp_path)
        assert said.startswith(f"usage: nanochat {command}"), said[:200]
    code, said = in_a_fork(["base-trian"], {}, tmp_path)
    assert code == 1 and "did you mean base_train?" in said
    code, said = in_a_fork([], {}, tmp_path)
    assert code == 0 and all(name in said for name in COMMANDS)


@pytest.mark.posix
@pytest.mark.parametrize("device, why", [("mps", "Apple silicon"), ("cuda", "no GPU")])
def test_a_device_that_is_not_there(device, why, tmp_path, in_a_fork):
    argv = ["base_train", "--preset=cpu", f"--device={device}"]
    code, said = in_a_fork(argv, {}, tmp_path)
    assert code == 2 and why in said and "Traceback" not in said


@pytest.mark.posix
def test_an_unwritable_folder(tmp_path, in_a_fork):
    "The umask takes every right away; root may write all the same."
    code, said = in_a_fork(["report"], {}, tmp_path, umask=0o777)
    assert code in (0, 2) and "Traceback" not in said


def test_a_reader_that_has_had_enough():
    "`nanochat plan | head -1` is no error."
    command = [sys.executable, "-m", "nanochat", "plan", "--gpu=h100", "--gpus=8"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait() == 0 and said == ""


def test_scripts_and_commands_are_the_same():
    "scripts/X.py and `nanochat X` call one function with one config."
    for name, command in COMMANDS.items():
        text = (ROOT / "scripts" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 30
        if "run_command" in text:
            assert f'run_command("{name}"' in text
        else:
            call = f'run_cli({command.function}, {command.config}, "{name}")'
            assert call in text, name
    files = {f.stem for f in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS) | {"base_loss"}  # a name of nanochat


# ---- other systems

HIDE = """
import os, sys
for name in ("fcntl", "resource", "grp", "pwd", "termios", "readline"):
    sys.modules[name] = None
for name in ("sysconf", "killpg", "fork", "getuid", "sched_getaffinity", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
import types
memory = types.SimpleNamespace(total=8 * 2**30)
sys.modules["psutil"] = types.SimpleNamespace(virtual_memory=lambda: memory)
"""


def test_the_package_imports_without_posix(tmp_path):
    "What Windows lacks is hidden; every module must still be importable."
    names = [
        f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for f in sorted((ROOT / "nanochat").rglob("*.py"))
        if not f.name.startswith("_")
    ]
    program = (
        HIDE
        + f"""
from importlib import import_module
for name in {names!r}:
    import_module(name)
from nanochat.common import environment
print(environment()["memory_gib"])
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "8.0"
