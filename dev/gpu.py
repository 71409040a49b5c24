"""Check that everything is right on this GPU, and measure how fast it is, in seven minutes.

    python dev/gpu.py                      run everything, the most important first
    python dev/gpu.py --list               list the sections and what they show
    python dev/gpu.py --only model,training --seconds 200 --record here.json
    python dev/gpu.py --tiny               run all of it on the CPU, with small models

Every section runs in a separate process with a time limit: a crash, a hang or running out of
memory costs one section. The record (dev/records/gpu.json) is written after each of them, so
that nothing is lost if the GPU is taken away. The exit code is 1 if something is computed
wrongly, 2 if there is no GPU, 0 otherwise; a missed speed goal is not an error. Only the core
packages are needed, no network and no installation: a source tree is enough.
"""

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "dev" / "records" / "gpu.json"
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

from typing import Any

from gpu_sections import all_sections, find_function


def work(name: str, tiny: bool, seconds: float, folder: Path) -> None:
    "Run a section in this process, with all its output going to a file."
    os.setsid()  # a new process group, which can be killed as a whole
    said = open(folder / f"{name}.log", "w", buffering=1)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    from gpu_sections.tools import Report, Scale, Skip

    # If it hangs, print where, shortly before the runner kills it.
    faulthandler.enable(said)
    faulthandler.dump_traceback_later(max(1.0, seconds - 3), file=said)
    report = Report(folder / f"{name}.json")
    report.write()
    try:
        find_function(name)(Scale(tiny, seconds), report)
        wrong = [c["name"] for c in report.checks if not c["ok"]]
        report.status = "wrong" if wrong else "ok"
        report.why = ", ".join(wrong)
    except Skip as reason:
        report.status = "skipped"
        report.why = str(reason)
    except ImportError as missing:
        report.status = "skipped"
        report.why = lacking(missing)
    report.write()


def lacking(error: ImportError) -> str:
    "Return which package, or which part of ours, is missing."
    if isinstance(error, ModuleNotFoundError) and "nanochat" not in str(error.name):
        return f"needs the package {error.name}, which is not installed"
    return str(error)


def end(process) -> None:
    "Kill a section and all processes that it has started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, or its group does not exist yet
    process.kill()
    process.join()


def run(name: str, tiny: bool, limit: float, folder: Path, method: str) -> dict:
    "Run a section to its end or its time limit, and return its part of the record."
    begun = time.time()
    given = (name, tiny, limit, folder)
    context: Any = get_context(method)
    process = context.Process(target=work, args=given)
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        end(process)
    # Results that the section wrote count, however it ended.
    file = folder / f"{name}.json"
    log = folder / f"{name}.log"
    found: dict[str, Any] = {"checks": [], "figures": {}}
    found |= {"status": "failed", "why": "", "key": "", "kernels": []}
    found |= json.loads(file.read_text()) if file.exists() else {}
    found["seconds"] = round(time.time() - begun, 1)
    if late:
        found |= {"status": "timeout", "why": f"no end after {limit:.0f} s"}
    elif process.exitcode or (found["status"] == "failed" and not found["why"]):
        found |= {"status": "failed", "why": last_words(log, process.exitcode)}
    if found["status"] in ("timeout", "failed") and log.exists():
        found["log"] = read_log(log)[-6000:]
    return found


def read_log(log: Path) -> str:
    "Return a process's output without this machine's folders, since records are shared."
    text = log.read_text(errors="replace") if log.exists() else ""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def last_words(log: Path, code: int) -> str:
    "Return the error that a process printed, or how it died."
    lines = [line.strip() for line in read_log(log).split("\n") if line.strip()]
    # Advice often follows an error, so start at the line that names it.
    named = re.compile(
        r"Fatal Python error|[\w.]*(Error|Exception|Unsupported|Interrupt)\b"
    )
    faults = [i for i, line in enumerate(lines) if named.match(line)]
    told = " ".join(lines[faults[-1] :]) if faults else "".join(lines[-1:])
    died = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    if code < 0 and told:  # killed from outside, or by a hardware fault
        told = f"{died}: {told}"
    return (told or died)[:300]


def find_device(tiny: bool, folder: Path) -> tuple[dict, str]:  # facts, how to start
    "Describe the GPU, and find out whether forked processes can use it."
    for method in ("fork", "spawn"):
        found = run("device", tiny, 120, folder, method)
        if found["status"] == "ok":
            break
    if found["status"] != "ok":
        found["figures"]["missing"] = f"it does not answer: {found['why']}"
    return found["figures"], method


def commit() -> str:
    "Return the commit of a git checkout, otherwise the value of NANOCHAT_COMMIT."
    if not shutil.which("git"):
        return os.environ.get("NANOCHAT_COMMIT", "")
    git = ["git", "-C", str(ROOT)]
    head = [*git, "rev-parse", "--short", "HEAD"]
    told = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    # A record written by a run is not a change to the code that it measures.
    changed = [*git, "status", "--porcelain", "-uno", ".", ":!dev/records"]
    dirty = subprocess.run(changed, capture_output=True, text=True).stdout.strip()
    told += "-dirty" if told and dirty else ""
    return told or os.environ.get("NANOCHAT_COMMIT", "")


def write(record: dict, file: Path | None) -> None:
    "Replace the record atomically."
    from nanochat.common import write_atomic

    if file:
        write_atomic(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def begin(tiny: bool, facts: dict, file: Path | None) -> dict:
    "Start a record, keeping sections of an earlier run on the same GPU and commit."
    record = {"date": time.strftime("%d %B %Y"), "commit": commit(), "tiny": tiny}
    record |= {"seconds": 0.0, "environment": facts["environment"]}
    record |= {"device": facts["device"], "sections": {}}
    try:
        old = json.loads(file.read_text()) if file and file.exists() else {}
    except ValueError:
        old = {}
    same = ("commit", "tiny", "device")
    if all(old.get(key) == record[key] for key in same):
        record["sections"] = old["sections"]
    return record


def run_all(names: list[str], options, folder: Path, started: float) -> dict:
    "Run the sections one by one while time remains, writing the record after each."
    facts, method = find_device(options.tiny, folder)
    os.environ["GPU_START"] = method  # for sections that start runs of their own
    if "missing" in facts:
        print(f"no CUDA device: {facts['missing']}; --tiny runs everything on the CPU")
        return {}
    record = begin(options.tiny, facts, options.record)
    print(
        f"{facts['device']['name']}, PyTorch {facts['environment']['torch']}",
        flush=True,
    )
    for name in names:
        section = all_sections()[name]
        left = options.seconds - (time.time() - started)
        if left < (0 if options.tiny else section.seconds):
            why = f"time used up: {left:.0f} s left, it takes about {section.seconds}"
            found = {"status": "skipped", "why": why, "key": "", "seconds": 0.0}
            found |= {"kernels": [], "checks": [], "figures": {}}
        else:
            limit = max(1.0, min(section.limit, left))
            found = run(name, options.tiny, limit, folder, method)
        record["sections"][name] = found
        record["seconds"] = round(time.time() - started, 1)
        write(record, options.record)
        print(row(name, found), flush=True)
    return record


def row(name: str, found: dict) -> str:
    "Format a section as a line of the table."
    told = found["key"] if found["status"] == "ok" else found["why"] or found["key"]
    told = re.sub(r"\s+", " ", told)[:110]
    return f"{name:14s} {found['status']:8s} {found['seconds']:6.1f} s  {told}"


def table(record: dict, names: list[str]) -> int:  # exit code
    "Print the results, with errors and missed goals last."
    sections = {name: record["sections"][name] for name in names}
    print(f"\n{'section':14s} {'status':8s}  seconds  result")
    for name, found in sections.items():
        print(row(name, found))
    for name, found in sections.items():
        for check in found["checks"]:
            if not check["ok"]:
                value = check["value"]
                bound = check["bound"]
                value = "not finite" if value is None else f"{value:.3g}"
                print(f"WRONG {name}: {check['name']}: {value}, at most {bound:.3g}")
        for goal in found["figures"].get("goals", []):
            if not goal["met"] and not record["tiny"]:
                print(
                    f"missed {name}: {goal['name']}: {goal['value']:.4g} of {goal['goal']:g}"
                )

    # A section about speed may fail although the GPU computes everything right.
    bad = ("wrong", "failed", "timeout")
    wrong = [
        n for n in names if all_sections()[n].right and sections[n]["status"] in bad
    ]
    verdict = f"NOT RIGHT: {', '.join(wrong)}" if wrong else "nothing is wrong"
    print(f"{record['seconds']:.0f} s; {verdict}")
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=420, help="time limit for everything"
    )
    parser.add_argument(
        "--only", default="", metavar="NAME,...", help="run only these sections"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the sections and exit"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use small models, on the CPU"
    )
    parser.add_argument("--record", type=Path, help="JSON file for the results")
    options = parser.parse_args(argv)
    if (
        options.record is None and not options.tiny
    ):  # which must not be taken for a GPU's
        options.record = RECORD
    return options


def main(argv: list[str] | None = None) -> int:  # exit code
    "Run the requested sections and return the exit code."
    started = time.time()
    options = parse(argv)
    known = all_sections()
    if options.list:
        for name, s in known.items():
            kind = "right" if s.right else "fast "
            asked = ", only where it is named" if s.asked else ""
            print(f"{name:14s} {kind} {s.seconds:4d} s  {s.what}{asked}")
        return 0
    names = options.only.split(",") if options.only else []
    if unknown := [name for name in names if name not in known]:
        print(f"unknown section {unknown[0]!r}: --list shows them", file=sys.stderr)
        return 2
    names = names or [name for name, section in known.items() if not section.asked]
    if missing := prepare(options.tiny):
        print(missing, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # An empty cache, so that compile times are those of a fresh machine.
        # Set it yourself to keep it between runs on the same GPU.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
        record = run_all(names, options, Path(folder), started)
        return table(record, names) if record else 2


def prepare(tiny: bool) -> str:  # complaint
    "Import what all sections need, since they are forks of this process."
    # A fork cannot use a GPU that its parent has used, so PyTorch must not look for one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    place = [str(ROOT), str(ROOT / "dev"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, place))
    if tiny:  # for small products, one thread is the fastest
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        import_module("gpu_sections.tools")
        if tiny:
            import_module("torch._dynamo")
    except ImportError as error:
        return f"cannot start: {lacking(error)}"
    return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; the record has the sections that had ended")
