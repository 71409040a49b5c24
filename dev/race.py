"""Measure how much sooner our recipe reaches the quality of a tuned AdamW.

python dev/race.py --record dev/records/race.json        about two hours on two cores

All runs use depth 4, 512 tokens of context, the embedded corpus in the same order, the same
tokenizer and the same held-out text. AdamW gets a warmup, a cosine, clipping, decay, and the
best of at least five learning rates, and runs to its end. Our recipe, with the schedule of a
shorter run, must reach the same bits per byte. Each seed draws different weights. Speed is
measured separately, alternating recipes on one thread. Finished runs are reused from --work.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nanochat.common import environment
from nanochat.dataloader import Batch, batches
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.muon import METHODS
from nanochat.optim import (
    OptimConfig,
    adamw_rates,
    assign_roles,
    lr_scale,
    muon_momentum,
    setup_optimizer,
)
from nanochat.plan import model_config
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import accumulate

T = 512  # context
VOCAB = 2048
SEEDS = (1, 2, 3)
VAL_BATCHES = 10  # batches of held-out text
CURVE = 40  # steps between two points of a curve
STEPS = 160  # AdamW's steps, with 8 rows each
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
# Everything but the number of steps and the seed.
RECIPES: dict[str, dict[str, Any]] = {
    "AdamW": {"rows": 8, "adamw": True},
    "AdamW by role": {"rows": 8, "adamw": True, "by_role": True},
    "default": {"rows": 8},
    "tuned": {"rows": 4, "warmdown": 1.0},
}
SHARES = {"default": 0.5, "tuned": 0.4}  # largest share of AdamW's time
FURTHER = {"default": (0.3, 0.75, 1.0), "tuned": (0.3,)}  # more, for the first seed
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


class PlainAdamW:
    "PyTorch's AdamW with clipping to norm 1; one learning rate, or ours by role."

    def __init__(self, model, rate: float, by_role: bool):
        width = model.config.n_embd
        groups = []
        rates = adamw_rates(OptimConfig(), width) if by_role else {}
        for role, named in assign_roles(model).items():
            own: dict[str, Any] = {
                "params": list(named.values()),
                "lr": rates.get(role, rate),
            }
            decays = role not in rates and role != "scalar"
            groups.append(own | {"weight_decay": 0.1 if decays else 0.0})
        self.inner = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.weights = list(model.parameters())
        self.rates = [group["lr"] for group in groups]

    def step(self, scale: float, momentum=None):
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group, rate in zip(self.inner.param_groups, self.rates):
            group["lr"] = rate * scale
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()


def cosine(step: int, steps: int) -> float:
    "Return the learning rate factor: warmup over a twentieth, then a cosine to a tenth."
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / (steps - rise))


def set_up(recipe: dict, seed: int):
    "Build a model, its optimizer and the function that sets a step's learning rates."
    model = GPT(model_config(4, VOCAB, T))
    model.init_weights(seed)
    steps = recipe["steps"]
    if recipe.get("adamw"):
        optimizer = PlainAdamW(model, recipe["rate"], recipe.get("by_role", False))
        return model, optimizer, lambda step: (cosine(step, steps), None)
    fall = recipe.get("warmdown", 0.2)

    def rates(step: int) -> tuple[float, float]:
        return lr_scale(step, steps, warmdown=fall), muon_momentum(step)

    return model, setup_optimizer(model, OptimConfig(**recipe.get("optim", {}))), rates


class Spent:
    "Measure the time of training, without evaluations."

    def __init__(self):
        self.cpu = 0.0  # CPU seconds, because the machine may be busy
        self.wall = 0.0

    def __enter__(self):
        self.begun = time.process_time()
        self.watch = time.perf_counter()

    def __exit__(self, *_):
        self.cpu += time.process_time() - self.begun
        self.wall += time.perf_counter() - self.watch


def held_out(model: GPT, tokenizer: RustBPETokenizer) -> float:
    "Measure bits per byte on the same text every time."
    cpu = torch.device("cpu")
    text = batches(tokenizer, "val", 8, T, cpu, data="embedded")
    with torch.inference_mode():
        return evaluate_bpb(model, text, VAL_BATCHES, tokenizer.token_bytes())


def train_one(recipe: dict, seed: int, folder: str) -> dict:
    "Train one recipe, measuring it on held-out text along the way and at the end."
    torch.set_num_threads(1)
    tokenizer = RustBPETokenizer.from_directory(folder)
    cpu = torch.device("cpu")
    model, optimizer, rates = set_up(recipe, seed)
    stream = batches(tokenizer, "train", recipe["rows"], T, cpu, data="embedded")

    curve = []
    spent = Spent()
    for step in range(recipe["steps"]):
        if recipe.get("curve") and step % CURVE == 0:
            curve.append([step, held_out(model, tokenizer)])
        with spent:
            loss = accumulate(model, [next(stream)])
            optimizer.step(*rates(step))
            optimizer.zero_grad()

        # A run that diverges has lost the race; that is not an error.
        if not loss.isfinite():
            return {"bpb": math.inf}

    bits = held_out(model, tokenizer)
    if curve:
        curve.append([recipe["steps"], bits])
    return {
        "bpb": bits,
        "cpu_seconds": spent.cpu,
        "seconds": spent.wall,
        "curve": curve,
    }


# ---- The driver: one process per run


def run(recipe: dict, seed: int, work: Path) -> dict:
    "Train in a separate process, or return the stored result of an earlier run."
    log = work / "runs.jsonl"
    wanted = {"recipe": recipe, "seed": seed}
    for line in log.read_text().splitlines() if log.exists() else []:
        row = json.loads(line)
        if wanted.items() <= row.items():
            return row

    # A separate process, so that runs do not share memory or threads.
    job = [sys.executable, __file__, "--job", json.dumps(wanted), "--work", str(work)]
    out = subprocess.run(job, env=ONE_THREAD, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr[-2000:])
    row = wanted | json.loads(out.stdout.splitlines()[-1])

    # Saved at once: stopping the race loses at most one run.
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)
    return row


def tune(name: str, work: Path, workers: int) -> dict[float, float]:
    "Find AdamW's best learning rate with the first seed, never at the edge of the grid."
    tried: dict[float, float] = {}
    missing = list(RATES)
    while missing:
        recipes = [
            RECIPES[name] | {"rate": rate, "steps": STEPS, "curve": True}
            for rate in missing
        ]
        with ThreadPoolExecutor(workers) as pool:
            rows = list(pool.map(lambda r: run(r, SEEDS[0], work), recipes))
        tried |= {rate: row["bpb"] for rate, row in zip(missing, rows)}
        best = min(tried, key=tried.__getitem__)
        missing = [best / 2] if best == min(tried) else []
        missing += [best * 2] if best == max(tried) else []
    return dict(sorted(tried.items()))


def time_steps(repeat: int = 9) -> dict[str, dict]:
    "Measure one step of each recipe, alternating, in CPU seconds of one thread."
    torch.set_num_threads(1)
    text = torch.randint(VOCAB, (8, T + 1), generator=torch.Generator().manual_seed(0))
    parts = {}
    for name, recipe in RECIPES.items():
        parts[name] = set_up(recipe | {"steps": STEPS, "rate": 0.001}, 1)
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    for turn in range(repeat + 1):
        for name, (model, optimizer, rates) in parts.items():
            ids = text[: RECIPES[name]["rows"]]
            begun = time.process_time()
            accumulate(model, [Batch(ids[:, :-1], ids[:, 1:])])
            optimizer.step(*rates(turn))
            optimizer.zero_grad()

            # The first turn allocates states and buffers and does not count.
            if turn:
                seconds[name].append(time.process_time() - begun)

    # Ratios per turn, because a slow moment slows both.
    facts = {}
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds["AdamW"]))
        middle = statistics.median(ratios)
        facts[name] = {"seconds": statistics.median(own), "of AdamW's": middle}
        facts[name] |= {"low": ratios[0], "high": ratios[-1]}
    return facts


def prepare(work: Path) -> dict:  # the speed of each recipe
    "Train the tokenizer and measure the speeds, unless that is already done."
    if not (work / "tokenizer").exists():
        env = ONE_THREAD | {"NANOCHAT_BASE_DIR": str(work), "NANOCHAT_PRESET": "cpu"}
        command = [sys.executable, "-m", "scripts.tok_train", f"--vocab-size={VOCAB}"]
        subprocess.run(command, env=env, check=True, capture_output=True)
    measured = work / "speed.json"
    if not measured.exists():
        job = [sys.executable, __file__, "--time", "--work", str(work)]
        out = subprocess.run(job, env=ONE_THREAD, check=True, capture_output=True)
        measured.write_bytes(out.stdout.splitlines()[-1])
    return json.loads(measured.read_text())


def race(work: Path, rates: dict, speed: dict, workers: int) -> list[dict]:
    "Run AdamW to its end, and our recipes for a share of its time."
    jobs = [(name, 1.0, seed) for name in rates for seed in SEEDS]
    for name, most in SHARES.items():
        jobs += [(name, most, seed) for seed in SEEDS]
        jobs += [(name, share, SEEDS[0]) for share in FURTHER[name]]

    def one(job: tuple) -> dict:
        name, share, seed = job

        # As many steps as fit into this share of AdamW's time.
        steps = int(share * STEPS / speed[name]["of AdamW's"])
        recipe = RECIPES[name] | {"steps": STEPS if name in rates else steps}
        if name in rates:
            recipe |= {"rate": rates[name], "curve": True}
        return {"name": name, "share": share, **run(recipe, seed, work)}

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, jobs))


def compare_methods(work: Path, speed: dict, workers: int) -> list[dict]:
    "Run the default recipe with each of Muon's iterations."
    fair = int(SHARES["default"] * STEPS / speed["default"]["of AdamW's"])
    # A long run with the first seed, then short ones with all.
    jobs = [(method, SEEDS[0], 4 * fair) for method in METHODS]
    jobs += [(method, seed, fair) for method in METHODS for seed in SEEDS]

    def one(job: tuple) -> dict:
        method, seed, steps = job
        own = {} if method == OptimConfig().matrix_method else {"matrix_method": method}
        recipe = RECIPES["default"] | ({"optim": own} if own else {})
        return {"method": method, **run(recipe | {"steps": steps}, seed, work)}

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, jobs))


def main(work: Path, record: str, workers: int) -> None:
    "Tune AdamW, measure speeds, run the race and record it."
    speed = prepare(work)
    tried = {n: tune(n, work, workers) for n, r in RECIPES.items() if "adamw" in r}
    rates = {name: min(found, key=found.__getitem__) for name, found in tried.items()}
    rows = race(work, rates, speed, workers)
    methods = compare_methods(work, speed, workers)

    # The same seed draws the same weights, so results can be paired.
    goal = {r["seed"]: r["bpb"] for r in rows if r["name"] == "AdamW"}
    for name, most in SHARES.items():
        mine = [r for r in rows if r["name"] == name and r["share"] == most]
        print(f"{name} at {most:.0%}:", [round(r["bpb"], 4) for r in mine], end=" ")
        print("AdamW:", [round(goal[r["seed"]], 4) for r in mine])
    facts: dict[str, Any] = {
        "command": "python dev/race.py",
        "date": time.strftime("%d %B %Y"),
    }
    facts |= {"environment": environment(), "recipes": RECIPES, "steps": STEPS}
    facts |= {"most": SHARES, "tried": tried, "speed": speed, "runs": rows}
    facts |= {"methods": methods}
    if record:
        Path(record).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "race"))
    parser.add_argument("--record", default="", help="JSON file for the results")
    parser.add_argument(
        "--workers", type=int, default=2, help="number of simultaneous runs"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print(
            json.dumps(train_one(job["recipe"], job["seed"], args.work + "/tokenizer"))
        )
    elif args.time:
        print(json.dumps(time_steps()))
    else:
        main(Path(args.work), args.record, args.workers)
