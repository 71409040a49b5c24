"""Is everything right on this GPU, and how fast is it? One command, about seven minutes.

    python dev/gpu.py                      everything, the most important first
    python dev/gpu.py --list               the sections and what they show
    python dev/gpu.py --only model,training --seconds 200 --record here.json
    python dev/gpu.py --tiny               every line of it on the CPU, with small models

Every section runs in a process of its own with a time limit: a crash, a hang or an
out-of-memory costs one section. The record (dev/records/gpu.json) is written after each of
them, so that nothing is lost when the card is. The exit code is 1 if something is computed
wrongly, 2 if there is no card, 0 otherwise; a missed goal of speed is no error. Nothing but the
core packages is needed, no network and no installation: a source tree will do.
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
    "Be the process of a section: everything it says goes to a file."
    os.setsid()  # a group of its own, which can be ended as a whole
    said = open(folder / f"{name}.log", "w", buffering=1)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    from gpu_sections.tools import Report, Scale, Skip

    # Where it hangs, if it does: said shortly before the runner ends it.
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
    "Say which package, or which part of ours, is not there."
    if isinstance(error, ModuleNotFoundError) and "nanochat" not in str(error.name):
        return f"needs the package {error.name}, which is not installed"
    return str(error)


def end(process) -> None:
    "End a section and all processes it has started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, or has not yet begun to be a group
    process.kill()
    process.join()


def run(name: str, tiny: bool, limit: float, folder: Path, method: str) -> dict:
    "Run a section to its end or to its limit, and return its part of the record."
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
    # What the section wrote down counts, however it ended.
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
    "Return what a process said, without the folders of this machine: records are shared."
    text = log.read_text(errors="replace") if log.exists() else ""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def last_words(log: Path, code: int) -> str:
    "Return the error that a process named, or how it died."
    lines = [line.strip() for line in read_log(log).split("\n") if line.strip()]
    # Advice often follows: an error is told from the line that names it on.
    named = re.compile(
        r"Fatal Python error|[\w.]*(Error|Exception|Unsupported|Interrupt)\b"
    )
    faults = [i for i, line in enumerate(lines) if named.match(line)]
    told = " ".join(lines[faults[-1] :]) if faults else "".join(lines[-1:])
    died = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    if code < 0 and told:  # ended from outside or by a fault of the machine's
        told = f"{died}: {told}"
    return (told or died)[:300]


def find_device(tiny: bool, folder: Path) -> tuple[dict, str]:  # facts, how to start
    "Describe the card, and find out whether forks can use it."
    for method in ("fork", "spawn"):
        found = run("device", tiny, 120, folder, method)
        if found["status"] == "ok":
            break
    if found["status"] != "ok":
        found["figures"]["missing"] = f"it does not answer: {found['why']}"
    return found["figures"], method


def commit() -> str:
    "Name the commit, if this is a git checkout; else what NANOCHAT_COMMIT says."
    if not shutil.which("git"):
        return os.environ.get("NANOCHAT_COMMIT", "")
    git = ["git", "-C", str(ROOT)]
    head = [*git, "rev-parse", "--short", "HEAD"]
    told = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    # A record that a run has written is no change of the code that it measures.
    changed = [*git, "status", "--porcelain", "-uno", ".", ":!dev/records"]
    dirty = subprocess.run(changed, capture_output=True, text=True).stdout.strip()
    told += "-dirty" if told and dirty else ""
    return told or os.environ.get("NANOCHAT_COMMIT", "")


def write(record: dict, file: Path | None) -> None:
    "Replace the record, so that a reader sees the old or the new one."
    from nanochat.common import write_atomic

    if file:
        write_atomic(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def begin(tiny: bool, facts: dict, file: Path | None) -> dict:
    "Begin a record; sections of an earlier run on the same card and commit stay in it."
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
    "Run the sections in turn while there is time; write the record after each."
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
    "Put a section into a line of the table."
    told = found["key"] if found["status"] == "ok" else found["why"] or found["key"]
    told = re.sub(r"\s+", " ", told)[:110]
    return f"{name:14s} {found['status']:8s} {found['seconds']:6.1f} s  {told}"


def table(record: dict, names: list[str]) -> int:  # exit code
    "Print what was found, mistakes and missed goals last."
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

    # A section about speed may fail without the card computing anything wrong.
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
        "--seconds", type=float, default=420, help="time for everything"
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help="these sections")
    parser.add_argument(
        "--list", action="store_true", help="show the sections, and stop"
    )
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU")
    parser.add_argument("--record", type=Path, help="JSON file for the results")
    options = parser.parse_args(argv)
    if options.record is None and not options.tiny:  # which must not pass for a card's
        options.record = RECORD
    return options


def main(argv: list[str] | None = None) -> int:  # exit code
    "Run what was asked for."
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
        # An empty cache, so that the time of compiling is that of a fresh machine.
        # Whoever runs more sections on the same card may name one that stays.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/compiled")
        record = run_all(names, options, Path(folder), started)
        return table(record, names) if record else 2


def prepare(tiny: bool) -> str:  # complaint
    "Import what all sections need: they are forks of this process."
    # A fork cannot use a card that its parent has used: PyTorch must not look for one here.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    place = [str(ROOT), str(ROOT / "dev"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, place))
    if tiny:  # on two cores one thread for each small product is the fastest
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
