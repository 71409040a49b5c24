"""Run commands in changed environments, each in a fork that finds everything imported.

A process of its own, started afresh: a fork of the test runner could inherit the locks of
threads that earlier tests have started. It reads one JSON line for each command from
standard input and answers with the exit code. A job names its `argv`, `environment`
(None removes a variable), `folder`, `umask`, and the files `out`, `err` and `stdin`. With
`program`, a script is run with that `argv` instead of `nanochat`. With
`ranks`, that many forks run the same command as the ranks of one group; torchrun would start
a new interpreter for each, and itself.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from importlib import import_module
from pathlib import Path

LIMIT = 180.0  # seconds for one command, on a busy machine too


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
    sys.argv = [job.get("program", "nanochat"), *job["argv"]]


def run(job: dict) -> int:  # exit code, as the shell would see it
    "Run `nanochat`, or another program, in this process."
    from nanochat.cli import main

    code = 70
    try:
        become(job)
        if program := job.get("program"):
            sys.path[0] = str(Path(program).parent)
            runpy.run_path(program, run_name="__main__")
        else:
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


def start(job: dict) -> int:  # process id
    "Start a job in a child process."
    child = os.fork()
    if child == 0:
        os._exit(run(job))
    return child


def wait(child: int, until: float) -> int:  # exit code; 124: it took too long
    "Wait for a child process and kill it when the clock has reached `until`."
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def free_port() -> int:
    "Return a port that nobody listens on."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def jobs_of_ranks(job: dict) -> list[dict]:
    "Return the job once for each rank, with the variables that torchrun would set."
    ranks = job.get("ranks", 1)
    if ranks == 1:
        return [job]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    jobs = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        files = {name: f"{job[name]}.{rank}" for name in ("out", "err")}
        environment = job["environment"] | group | place
        jobs.append(job | files | {"environment": environment})
    return jobs


def in_forks(job: dict) -> int:  # exit code; 124: it took too long
    "Run a job, in one child process for each rank."
    children = [start(each) for each in jobs_of_ranks(job)]
    until = time.monotonic() + LIMIT
    return max((wait(child, until) for child in children), key=abs)


if __name__ == "__main__":
    from nanochat.cli import COMMANDS

    for command in COMMANDS.values():
        import_module(command.module)
    for line in sys.stdin:
        print(in_forks(json.loads(line)), flush=True)
