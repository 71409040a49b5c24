"""Run commands in changed environments, each in a fork that finds everything imported.

A process of its own, started afresh: a fork of the test runner could inherit the locks of
threads that earlier tests have started. It reads one JSON line for each command from
standard input and answers with the exit code. A job names its `argv`, `environment`
(None removes a variable), `folder`, `umask`, and the files `out`, `err` and `stdin`.
"""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

LIMIT = 60.0  # seconds for one command


def without_account() -> None:
    "Let this process belong to a user without an entry in the password file."
    import pwd

    def unknown(uid: int):
        raise KeyError(uid)

    pwd.getpwuid = unknown


def become(job: dict) -> None:
    "Take on the environment, the folder and the streams that a job asks for."
    folder = Path(job["folder"])
    os.chdir(folder)
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    out = os.open(job["out"], writing)
    err = out if job["err"] == job["out"] else os.open(job["err"], writing)
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.umask(job["umask"])
    os.environ.pop("NANOCHAT_PRESET", None)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder / "base")
    for name, value in job["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value.replace("BASE", str(folder))
    if "HOME" in job["environment"] and job["environment"]["HOME"] is None:
        without_account()
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding)
    sys.stdout = open(1, "w", encoding=encoding, errors="strict")
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace")
    sys.argv = ["nanochat", *job["argv"]]


def run(job: dict) -> int:  # exit code, as the shell would see it
    "Run `nanochat` in this process."
    from nanochat.cli import main

    code = 70
    try:
        become(job)
        main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def in_a_fork(job: dict) -> int:  # exit code; 124: it took too long
    "Run a job in a child process."
    child = os.fork()
    if child == 0:
        os._exit(run(job))
    begun = time.monotonic()
    while time.monotonic() - begun < LIMIT:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


if __name__ == "__main__":
    from nanochat.cli import COMMANDS

    for command in COMMANDS.values():
        import_module(command.module)
    for line in sys.stdin:
        print(in_a_fork(json.loads(line)), flush=True)
