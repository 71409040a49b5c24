"""Kill training at random moments, resume it, and compare with a run that was left alone.

    python dev/kill_test.py --kills 12 --seed 0
    python dev/kill_test.py --kills 6 --ranks 2 --stages base_train

Every stage runs once undisturbed. Then it is killed (SIGKILL, which no program can catch)
at random moments and started again with the same command, until it has been killed often
enough and has finished. Weights, optimizer state, cursors and loss curve must be the same
bit for bit. Writes dev/records/kill_resume.json; a run of 48 kills takes about 15 minutes.

With --ranks 2, a stage is a group of processes with the environment that torchrun sets.
Kills alternate between all of them and a random one; the others are then asked to stop
and, if they do not, killed too, as torchrun does. These runs have a separate key in the
record.
"""

import argparse
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

from nanochat.common import read_log

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
STEPS = {"base_train": 48, "mid_train": 48, "chat_sft": 48, "chat_rl": 24}
FOLDERS = {
    "base_train": "base",
    "mid_train": "mid",
    "chat_sft": "sft",
    "chat_rl": "rl",
}
CHAT = "--device-batch-size=2 --total-batch-size=512 --eval-tokens=512 --eval-every=3"
OPTIONS = {
    "base_train": "--depth=1 --max-seq-len=128 --data=embedded " + CHAT,
    "mid_train": CHAT,
    "chat_sft": CHAT,
    "chat_rl": "--examples-per-step=2 --num-samples=4 --max-new-tokens=8 "
    "--eval-examples=4 --eval-samples=2 --eval-every=3 --init-lr-frac=1.0",
}
CLOCK = ("tokens_per_second", "mfu", "seconds")  # entries of the log that may differ


def work(stage: str, base: Path, options: list[str], ranks: dict[str, str]) -> None:
    "Run a command in this process, with its output going to a file."
    os.environ.update(ranks, NANOCHAT_BASE_DIR=str(base))
    said = open(base / f"said_{ranks.get('RANK', 0)}.txt", "w", buffering=1)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.argv = [stage, *options]
    runpy.run_module(f"scripts.{stage}", run_name="__main__")


def launch(stage: str, base: Path, options: list[str], ranks: int = 1) -> list:
    "Start a command in forks of this process, which has already imported everything."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        given = (stage, base, options, place | meet if ranks > 1 else {})
        processes.append(get_context("fork").Process(target=work, args=given))
        processes[-1].start()
    return processes


def start(stage: str, base: Path, quick: bool = False, ranks: int = 1) -> list:
    "Start a stage with one process per rank."
    steps = STEPS[stage] // 2 if quick else STEPS[stage]
    name = "num-steps" if stage == "chat_rl" else "num-iterations"
    options = [*OPTIONS[stage].split(), f"--{name}={steps}", "--save-every=3"]
    options += ["--preset=cpu", "--device=cpu"]
    options += ["--source=base"] if quick and stage == "chat_rl" else []
    return launch(stage, base, options, ranks)


def finish(processes: list, base: Path) -> None:
    "Wait for a stage, which must succeed."
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        said = [f.read_text()[-2000:] for f in sorted(base.glob("said_*.txt"))]
        raise SystemExit("\n".join(said))


def kill(processes: list, victims: list) -> bool:  # whether any was still running
    "Kill some ranks without warning, then stop the others as torchrun does."
    for process in victims:
        process.kill()
        process.join()
    if all(process.exitcode != -signal.SIGKILL for process in victims):
        return False
    for end in ("terminate", "kill"):
        for process in processes:
            getattr(process, end)()
        for process in processes:
            process.join(5)
    return True


def state(stage: str, base: Path) -> dict[str, str]:  # file -> SHA-256
    "Return hashes of everything that must not depend on the kills."
    folder = base / f"{FOLDERS[stage]}_checkpoints"
    last = max(folder.glob("*/step_*"), key=lambda f: int(f.name[5:]))
    found = {f.name: f.read_bytes() for f in sorted(last.iterdir())}
    meta = json.loads(found.pop("meta.json"))
    results = {k: v for k, v in meta["results"].items() if "seconds" not in k}
    found["results"] = json.dumps([meta["step"], results]).encode()
    (log,) = (base / "runs" / stage).glob("*.jsonl")
    curve = []
    for record in read_log(log):
        curve.append({k: v for k, v in record.items() if k not in CLOCK})
    found["log"] = json.dumps(curve).encode()
    return {k: hashlib.sha256(v).hexdigest() for k, v in found.items()}


def interrupt(
    stage: str,
    base: Path,
    kills: int,
    seconds: float,  # of a whole run
    dice: random.Random,
    *,
    quick: bool = False,
    ranks: int = 1,
) -> list[dict]:  # when each kill came and what was saved
    "Kill and resume a stage until it has been killed often enough and has finished."
    struck: list[dict] = []
    while len(struck) < kills:
        processes = start(stage, base, quick, ranks)
        moment = dice.uniform(0.2, 1.0) * seconds
        victims = processes
        if ranks > 1 and len(struck) % 2:
            victims = [dice.choice(processes)]
        until = time.time() + moment
        for process in processes:
            process.join(max(0, until - time.time()))
        if kill(processes, victims):
            folder = base / f"{FOLDERS[stage]}_checkpoints"
            steps = [int(f.name[5:]) for f in folder.glob("*/step_*")]
            half = len(list(folder.glob("*/.step_*")))
            record: dict = {"after": round(moment, 2), "saved": max(steps, default=0)}
            record |= {"half_written": half}
            if ranks > 1:
                record["ranks"] = [processes.index(victim) for victim in victims]
            struck.append(record)
            print(stage, struck[-1], file=sys.stderr, flush=True)
        else:  # it finished before it could be killed, so start a new run
            finish(processes, base)
            seconds *= 0.9
            shutil.rmtree(base / f"{FOLDERS[stage]}_checkpoints", ignore_errors=True)
    finish(start(stage, base, quick, ranks), base)
    return struck


def check(
    stage: str,
    alone: Path,  # base folder with the finished earlier stages
    kills: int,
    dice: random.Random,
    *,
    quick: bool = False,  # half the steps; RL starts from the base model
    ranks: int = 1,
) -> dict:  # what was compared
    "Run a stage with and without kills, and compare."
    import_module(f"scripts.{stage}")
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # triggers slow imports that every stage needs
    disturbed = Path(shutil.copytree(alone, alone.with_name(f"killed_{stage}")))
    begun = time.time()
    finish(start(stage, alone, quick, ranks), alone)
    seconds = time.time() - begun
    struck = interrupt(stage, disturbed, kills, seconds, dice, quick=quick, ranks=ranks)
    expected = state(stage, alone)
    found = state(stage, disturbed)
    shutil.rmtree(disturbed)
    different = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    return {
        "stage": stage,
        "seconds_alone": round(seconds, 1),
        "kills": struck,
        "sha256": expected,
        "different": different,
    }


def parse() -> argparse.Namespace:
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=13, help="kills per stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="base_train,mid_train,chat_sft,chat_rl")
    parser.add_argument("--quick", action="store_true", help="half the steps, no SFT")
    parser.add_argument("--ranks", type=int, default=1, help="processes per stage")
    record = ROOT / "dev" / "records" / "kill_resume.json"
    parser.add_argument("--out", type=Path, default=record)
    return parser.parse_args()


def keep(records: list[dict], options: argparse.Namespace) -> None:
    "Write the results so far; runs on several ranks have a separate key."
    command = " ".join(["python dev/kill_test.py", *sys.argv[1:]])
    result = {"date": time.strftime("%Y-%m-%d"), "seed": options.seed}
    result |= {"command": command, "stages": records}
    if options.ranks > 1:
        result = {f"ranks_{options.ranks}": result}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps(kept | result, indent=1) + "\n")


def main() -> None:
    "Kill the stages one after the other; exit with 1 if anything differs."
    options = parse()
    dice = random.Random(options.seed)
    how = {"quick": options.quick, "ranks": options.ranks}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        alone.mkdir()
        flags = ["--vocab-size=600", "--max-chars=200000", "--preset=cpu"]
        finish(launch("tok_train", alone, flags), alone)

        # Each stage starts from the previous one's checkpoint in `alone`.
        for stage in options.stages.split(","):
            record = check(stage, alone, options.kills, dice, **how)
            records.append(record)
            saved = sorted(kill["saved"] for kill in record["kills"])
            verdict = f"DIFFERENT: {record['different']}" if record["different"] else ""
            print(
                f"{stage:10} {len(saved):3} kills, at saved steps {saved}: "
                f"{verdict or 'bit-identical'}",
                flush=True,
            )
            keep(records, options)
    sys.exit(any(record["different"] for record in records))


if __name__ == "__main__":
    main()
