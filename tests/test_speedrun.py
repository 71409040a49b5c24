"""The pipeline as one command: who is told to stop, and what is replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import speedrun
from nanochat.speedrun import MAKERS, STAGES, SpeedrunConfig

pytestmark = pytest.mark.slow  # waits for signals

# Says when it listens, writes a line for each signal, and ends a second after the last.
STAGE = """
import signal, sys, time
end = time.monotonic() + 60
def note(number, frame):
    global end
    print(signal.Signals(number).name, flush=True)
    end = time.monotonic() + 1.5
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
print("ready", flush=True)
while (left := end - time.monotonic()) > 0:
    time.sleep(min(left, 0.05))
sys.exit(130)
"""
PARENT = """
import sys
from nanochat.speedrun import run_to_its_end
for _ in range(int(sys.argv[2])):
    code = run_to_its_end([sys.executable, "-c", sys.argv[1]])
    print("code", code, flush=True)
"""
posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals of POSIX")


def start(stages: int) -> subprocess.Popen:
    "Start the pipeline's waiting loop around stages that listen."
    command = [sys.executable, "-c", PARENT, STAGE, str(stages)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True)


def hear(parent: subprocess.Popen, *expected: str) -> None:
    "Read the next lines."
    assert parent.stdout is not None
    heard = [parent.stdout.readline().strip() for _ in expected]
    assert heard == list(expected)


@posix
def test_a_stage_is_asked_to_end_once():
    "By kill, as a terminal does it, and as `timeout` does it."
    ways = [("SIGINT", "process"), ("SIGTERM", "process"), ("SIGHUP", "process")]
    ways += [("SIGINT", "group"), ("SIGINT", "both"), ("SIGTERM", "both")]
    parent = start(len(ways))
    for name, to in ways:
        hear(parent, "ready")
        if to != "group":
            parent.send_signal(signal.Signals[name])
        if to != "process":
            time.sleep(0.1)
            os.killpg(parent.pid, signal.Signals[name])
        hear(parent, name, "code 130")
    assert parent.wait(60) == 0


@posix
def test_asking_twice_is_passed_on_twice():
    "A second Ctrl-C tells a stage not to wait until it has saved."
    parent = start(1)
    hear(parent, "ready")
    parent.send_signal(signal.SIGINT)
    hear(parent, "SIGINT")
    time.sleep(1.1)
    parent.send_signal(signal.SIGINT)
    hear(parent, "SIGINT", "code 130")
    assert parent.wait(60) == 0


def state(pid: int) -> str:
    "Return a process's state as Linux writes it: S sleeps, T is stopped."
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_ctrl_z_stops_the_stage_too():
    parent = start(1)
    hear(parent, "ready")
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
    both = [parent.pid, int(children.split()[0])]
    for number, stopped in ((signal.SIGTSTP, True), (signal.SIGCONT, False)):
        parent.send_signal(number)
        end = time.monotonic() + 20
        while [state(pid) == "T" for pid in both] != [stopped] * 2:
            assert time.monotonic() < end
            time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    hear(parent, "SIGTERM", "code 130")
    assert parent.wait(60) == 0


@pytest.mark.parametrize("overwrite", [True, False])
def test_overwrite_reaches_every_stage_that_saves(tmp_path, monkeypatch, overwrite):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    flags = ["--overwrite"] if overwrite else []
    monkeypatch.setattr(sys, "argv", ["speedrun", "--depth=1", *flags])
    told: dict[str, list[str]] = {}

    def note(name: str, command: list[str], markers: Path) -> None:
        told[name] = command

    monkeypatch.setattr(speedrun, "run_once", note)
    monkeypatch.setattr(speedrun, "preview", lambda config: None)
    speedrun.speedrun(SpeedrunConfig(depth=1, overwrite=overwrite))
    assert list(told) == [name for name, _, _ in STAGES]
    given = {name for name, command in told.items() if "--overwrite" in command}
    assert given == ({*MAKERS, "base_train"} if overwrite else set())
