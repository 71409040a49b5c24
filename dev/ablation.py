"""Measure what each architectural choice is worth, in bits per byte at equal tokens.

python dev/ablation.py --record dev/records/ablation.json        about two hours on two cores

The variants are the default model, the same with one choice replaced by an older one, and the
same with one later idea added, all trained on the same tokens in the same order. Each variant
uses the best of three or more factors on all learning rates, found with one seed, and is then
trained with two more seeds. Speed and memory are measured afterward, alternating variants.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_bytes
from torch import nn

from nanochat import attention, gpt, optim
from nanochat.common import environment
from nanochat.dataloader import batches
from nanochat.functional import rms_norm
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import accumulate

BASE = {"sequence_len": 256, "vocab_size": 2048, "n_layer": 4, "n_head": 4}
BASE |= {"n_kv_head": 4, "n_embd": 128}
ROWS = 8  # 2,048 tokens per step
STEPS = 120
SEEDS = (1, 2, 3)
FACTORS = (0.5, 1.0, 2.0)


# ---- Replaced choices. Each function changes a model before it is initialized.


class Positioned(nn.Embedding):
    "A token embedding plus a learned vector for each position."

    def __init__(self, rows: int, width: int, length: int):
        super().__init__(rows, width)
        self.places = nn.Parameter(torch.empty(length, width))

    def forward(self, idx):
        return super().forward(idx) + self.places[: idx.size(1)]


class SwiGLU(nn.Module):
    "A gated MLP, with a hidden width that keeps the number of weights."

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd * 2 / 3)
        self.c_gate = attention.Linear(config.n_embd, hidden)
        self.c_fc = attention.Linear(config.n_embd, hidden)
        self.c_proj = attention.Linear(hidden, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class TiedHead(nn.Module):
    "A head that shares its weights with the token embedding."

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = [table]  # hidden from parameters()

    @property
    def weight(self):
        return self.table[0].weight

    def forward(self, x):
        return F.linear(x, self.weight)


# A stand-in has the same parameters as the function that it replaces.


def learned_positions(model):
    def unturned(x, cos, sin):
        return x

    attention.apply_rotary = unturned
    c = model.config
    model.transformer.wte = Positioned(c.table_rows, c.n_embd, c.sequence_len)


def layer_norm(model):
    def norm(x, eps=None):
        return F.layer_norm(x, (x.size(-1),), eps=eps or 1e-5)

    gpt.rms_norm = norm


def no_qk_norm(model):
    def unscaled(x, eps=None):
        return x

    attention.rms_norm = unscaled


def gelu(model):
    gpt.relu2 = F.gelu  # type: ignore[assignment]  # the exchange is what is measured


def swiglu(model):
    for block in model.transformer.h:
        block.mlp = SwiGLU(model.config)


def tied(model):
    model.lm_head = TiedHead(model.transformer.wte)


def no_zeros(model):
    model.zeros = False


def post_norm(model):
    def forward(self, x, cos, sin, kv_cache=None, extra=None):
        x = rms_norm(x + self.attn(x, cos, sin, kv_cache, extra), self.eps)
        return rms_norm(x + self.mlp(x), self.eps)

    gpt.Block.forward = forward  # type: ignore[method-assign]  # as above


# Name: (fields of the config, function that exchanges a choice).
VARIANTS: dict[str, tuple[dict[str, Any], Callable | None]] = {
    "default": ({}, None),
    "learned positions": ({}, learned_positions),
    "LayerNorm": ({}, layer_norm),
    "no QK norm": ({}, no_qk_norm),
    "GELU": ({}, gelu),
    "SwiGLU": ({}, swiglu),
    "tied head": ({}, tied),
    "no softcap": ({"softcap": 0.0}, None),
    "no zero init": ({}, no_zeros),
    "post-norm": ({}, post_norm),
    "GQA, 2 of 4": ({"n_kv_head": 2}, None),
    "MQA, 1 of 4": ({"n_kv_head": 1}, None),
    "sliding windows": ({"window_pattern": "SSSL"}, None),
    "value embeddings": ({"value_embeds": True}, None),
    "stream scalars": ({"stream_scalars": True}, None),
    "q and k times 1.2": ({"qk_scale": 1.2}, None),
    "RoPE base 1,000": ({"rope_base": 1000.0}, None),
    "RoPE base 100,000": ({"rope_base": 100_000.0}, None),
    "modern": (gpt.ARCHITECTURES["modern"], None),
}


def fresh_model(name: str, seed: int) -> GPT:
    "Build a variant in this process, possibly changing it permanently."
    fields, exchange = VARIANTS[name]
    model = GPT(GPTConfig(**BASE | fields))
    if exchange:
        exchange(model)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        gpt.initialize(
            key if "places" not in key else "transformer.wte.weight", weight, generator
        )
        if not getattr(model, "zeros", True) and not weight.any():
            weight.data.normal_(std=weight.size(-1) ** -0.5, generator=generator)
        if name == "tied head" and key == "transformer.wte.weight":
            weight.data.mul_(0.02)
    return model


def optimizer_of(model: GPT, name: str, factor: float):
    "Set up the optimizer with all learning rates times a factor."
    known = optim.roles

    def roles(name, parameter):
        if name.endswith("places"):  # learned positions train like the embedding
            return ["embedding"]
        return known(name, parameter)

    optim.roles = roles
    rates = optim.OptimConfig()
    embedding = 0.01 if name == "tied head" else rates.embedding_lr
    scaled = {k: v * factor for k, v in asdict(rates).items() if k.endswith("_lr")}
    config = optim.OptimConfig(**scaled | {"embedding_lr": embedding * factor})
    return optim.setup_optimizer(model, config)


def train_one(name: str, seed: int, factor: float, folder: str, steps: int) -> dict:
    "Train a variant and measure it on the whole validation split."
    tokenizer = RustBPETokenizer.from_directory(folder)
    model = fresh_model(name, seed)
    optimizer = optimizer_of(model, name, factor)
    T = BASE["sequence_len"]
    cpu = torch.device("cpu")
    stream = batches(tokenizer, "train", ROWS, T, cpu, data="embedded")
    for step in range(steps):
        accumulate(model, [next(stream)])
        rate = optim.lr_scale(step, steps, warmdown=0.4)
        optimizer.step(rate, optim.muon_momentum(step, steps=steps // 2))
        optimizer.zero_grad()
    held_out = batches(tokenizer, "val", ROWS, T, cpu, data="embedded")
    bits = evaluate_bpb(model, held_out, 40, tokenizer.token_bytes())
    return {"name": name, "seed": seed, "factor": factor, "steps": steps, "bpb": bits}


# ---- The driver: one process for each run, two at a time


def run(name: str, seed: int, factor: float, folder: str, steps: int) -> float:
    "Train in a separate process, or return the stored result of an earlier run."
    log = Path(folder) / "runs.jsonl"
    done = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    wanted = {"name": name, "seed": seed, "factor": factor, "steps": steps}
    for row in done:
        if wanted.items() <= row.items():
            return row["bpb"]

    # A separate process, so that runs do not share memory or threads.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = [name, str(seed), str(factor), folder, str(steps)]
    command = [sys.executable, __file__, "--job", *job]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr[-2000:])
    row = json.loads(out.stdout.splitlines()[-1])

    # Saved at once: stopping the study loses at most one run.
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)
    return row["bpb"]


def tune(name: str, folder: str) -> dict:
    "Find a variant's best factor with the first seed, then train with the others."
    tried = {f: run(name, SEEDS[0], f, folder, STEPS) for f in FACTORS}
    while (best := min(tried, key=tried.__getitem__)) in (min(tried), max(tried)):
        further = best / 2 if best == min(tried) else best * 2
        tried[further] = run(name, SEEDS[0], further, folder, STEPS)
    bits = [run(name, seed, best, folder, STEPS) for seed in SEEDS]
    return {"name": name, "factor": best, "tried": tried, "bpb": bits}


def speeds(names: list[str], repeat: int = 5) -> dict[str, dict]:
    "Measure a training step of each variant, alternating, and its peak memory."
    out: dict[str, dict] = {name: {"seconds": []} for name in names}

    def measure(name: str) -> None:
        command = [sys.executable, __file__, "--step", name]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        told = subprocess.run(command, env=env, capture_output=True, text=True)
        row = json.loads(told.stdout.splitlines()[-1])
        out[name]["seconds"].append(row["seconds"])
        out[name] |= {k: row[k] for k in ("peak_bytes", "parameters")}

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, names * repeat))
    return out


def one_step(name: str, rows: int = ROWS, repeat: int = 5) -> dict:
    "Time several steps of a variant, and count the bytes of one."
    model = fresh_model(name, 1)
    optimizer = optimizer_of(model, name, 1.0)
    generator = torch.Generator().manual_seed(0)
    shape = (rows, BASE["sequence_len"] + 1)
    ids = torch.randint(BASE["vocab_size"], shape, generator=generator)

    def step():
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    times = []
    for _ in range(repeat):
        begun = time.process_time()
        step()
        times.append(time.process_time() - begun)
    top = peak_bytes(step)
    count = sum(p.numel() for p in model.parameters())
    state = optimizer.state_dict().values()
    kept = sum(value.nbytes for value in state if value.ndim)  # not the counters
    peak = top + 4 * count + kept
    return {"seconds": min(times), "peak_bytes": peak, "parameters": count}


def make_tokenizer(work: Path) -> str:  # its folder
    "Train the tokenizer for all runs, unless it exists."
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").exists():
        env = os.environ | {"NANOCHAT_BASE_DIR": str(work), "NANOCHAT_PRESET": "cpu"}
        command = [sys.executable, "-m", "scripts.tok_train", "--vocab-size=2048"]
        subprocess.run(command, env=env, check=True, capture_output=True)
    return str(work / "tokenizer")


def add_costs(rows: list[dict]) -> float:  # seconds of a step of the default
    "Measure speed and memory of the variants and add them to their rows."
    costs = speeds([row["name"] for row in rows])
    usual = costs["default"]["seconds"]
    for row in rows:
        cost = costs[row["name"]]
        pairs = zip(usual, cost["seconds"])
        row["tokens_per_second"] = ROWS * 256 / statistics.median(cost["seconds"])
        row["speed"] = statistics.median(a / b for a, b in pairs)
        row |= {k: cost[k] for k in ("peak_bytes", "parameters")}
    return statistics.median(usual)


def main(record: str, work: str, only: list[str]) -> None:
    tokens = make_tokenizer(Path(work))
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda name: tune(name, tokens), only or list(VARIANTS)))
    if not record:
        return
    usual = add_costs(rows)
    # A variant that is slower at equal tokens may still win or lose at equal time.
    modern = next(r for r in rows if r["name"] == "modern")
    longer = round(STEPS * modern["speed"])
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, "modern", seed, modern["factor"], tokens, longer)
            for seed in SEEDS
        ]
        same_time = [job.result() for job in jobs]
    facts: dict[str, Any] = {
        "date": time.strftime("%d %B %Y"),
        "environment": environment(),
    }
    facts |= {"config": BASE, "rows": ROWS, "steps": STEPS, "seeds": SEEDS}
    facts |= {"seconds_of_a_step": usual, "preset": gpt.ARCHITECTURES["modern"]}
    facts |= {"modern_at_equal_time": {"steps": longer, "bpb": same_time}}
    text = json.dumps(facts | {"rows": rows}, indent=1) + "\n"
    Path(record).write_text(text, "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="", help="JSON file for the results")
    parser.add_argument(
        "--work",
        default=str(Path(tempfile.gettempdir()) / "ablation"),
        help="folder for the tokenizer and finished runs, which a second call reuses",
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of variants; none: all"
    )
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, seed, factor, folder, steps = args.job
        print(json.dumps(train_one(name, int(seed), float(factor), folder, int(steps))))
    elif args.step:
        print(json.dumps(one_step(args.step)))
    else:
        main(args.record, args.work, args.only)
