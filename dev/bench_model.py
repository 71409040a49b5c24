"""Measure the model's speed on this CPU, against transformers and the CPU's peak, by part.

python dev/bench_model.py --record dev/records/model_bench.json      about ten minutes

Measures forward and backward passes of a depth-4 model (width 256, 512 positions, 4,096 tokens,
4 rows) in float32, ours and transformers' `NanoChatForCausalLM` with the same weights, alternating
in one process, in five processes, with and without torch.compile; where the time goes; and the
chunked loss next to the plain one at 8,192 positions and 65,536 tokens. BENCH_THREADS=1 uses one
thread instead of two. With --tiny everything takes seconds, and the figures mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ.get("BENCH_THREADS", "2")
os.environ.pop("TORCHDYNAMO_DISABLE", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from typing import Any

import torch
from memory import peak_bytes
from torch.profiler import ProfilerActivity, profile

from nanochat.accounting import flops_per_token
from nanochat.common import environment
from nanochat.functional import cross_entropy, softcap
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import linear_cross_entropy
from nanochat.hf import hf_config, hf_weights


@dataclass(frozen=True)
class Case:
    "The sizes, and the number of measurements."

    config: GPTConfig
    rows: int  # per batch
    repeat: int  # measurements per process
    processes: int
    hows: tuple[str, ...]  # eager, compiled
    losses: tuple[tuple[int, int], ...]  # positions and vocabulary per comparison
    gemm: int  # size of the square matrices whose product is the reference


FULL = Case(
    GPTConfig(512, 4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256),
    rows=4,
    repeat=9,
    processes=5,
    hows=("eager", "compiled"),
    losses=((2048, 4096), (8192, 65_536)),
    gemm=1024,
)
TINY = Case(
    GPTConfig(32, 256, n_layer=1, n_head=2, n_kv_head=2, n_embd=32),
    rows=1,
    repeat=1,
    processes=1,
    hows=("eager",),
    losses=((64, 512),),
    gemm=64,
)
PARTS = {  # parts of a profile: name -> prefixes of operator names
    "matrix products": ("aten::mm", "aten::addmm"),
    "matrix products of attention": ("aten::bmm",),
    "softmax and tanh": ("aten::_softmax", "aten::tanh", "aten::exp"),
}


def our_model(case: Case) -> GPT:
    "Build a model in which no weight is zero."
    model = GPT(case.config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.0 if "wte" in name else p.size(1) ** -0.5, generator=g)
    return model


def their_model(model: GPT):
    "Build a model of transformers' class with the same weights."
    from transformers import NanoChatConfig, NanoChatForCausalLM

    apart = ("architectures", "model_type", "pad_token_id", "dtype")
    facts = hf_config(model.config, 0, 1)
    facts = {k: v for k, v in facts.items() if k not in apart}
    theirs = NanoChatForCausalLM(NanoChatConfig(**facts)).train()
    theirs.load_state_dict(hf_weights(model))
    return theirs


def take_turns(steps: dict, repeat: int) -> dict[str, list[float]]:
    "Measure the seconds of each step, alternating; the first round is discarded."
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeat + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return {name: values[1:] for name, values in seconds.items()}


def compare(slow: list[float], fast: list[float]) -> float:
    "Return the median of the ratios of measurements adjacent in time."
    return statistics.median(a / b for a, b in zip(slow, fast))


def gemm_rate(size: int) -> float:
    "Measure operations per second of a square float32 product, the best of many."
    a = torch.randn(size, size)
    b = torch.randn(size, size)
    return 2 * size**3 / min(take_turns({"": lambda: a @ b}, 40)[""])


def training_batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) each
    "Draw inputs and targets."
    g = torch.Generator().manual_seed(1)
    shape = (case.rows, case.config.sequence_len + 1)
    ids = torch.randint(case.config.vocab_size, shape, generator=g)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_speed(case: Case, compiled: bool) -> dict:
    "Measure tokens per second of forward and backward, ours and theirs."
    model = our_model(case)
    theirs = their_model(model)
    x, y = training_batch(case)
    our_call: Any = model
    their_call: Any = theirs
    if compiled:
        our_call = torch.compile(model, dynamic=False)
        their_call = torch.compile(theirs, dynamic=False)
    labels = {"input_ids": x, "shift_labels": y, "labels": y, "use_cache": False}

    def ours():
        loss = our_call(x, y)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    def transformers():
        loss = their_call(**labels).loss
        loss.backward()
        theirs.zero_grad()
        return loss.detach()

    # Check the loss is the same, or the comparison would mean nothing.
    torch.testing.assert_close(ours(), transformers())
    seconds = take_turns({"ours": ours, "transformers": transformers}, case.repeat)
    rates = {k: x.numel() / statistics.median(v) for k, v in seconds.items()}
    ratio = compare(seconds["transformers"], seconds["ours"])
    return rates | {"ratio": ratio, "gemm_flops": gemm_rate(case.gemm)}


def in_processes(case: Case, how: str) -> dict:
    "Repeat in fresh processes, because memory layout matters, and take medians."
    runs = []
    for _ in range(case.processes):
        command = [sys.executable, __file__, "--one", how]
        command += ["--tiny"] if case is TINY else []
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(told.stdout.splitlines()[-1]))
        print(how, runs[-1], flush=True)

    row = {}
    for key in runs[0]:
        row[key] = statistics.median(run[key] for run in runs)
    share = row["ours"] * flops_per_token(case.config) / row["gemm_flops"]
    ratios = sorted(r["ratio"] for r in runs)
    return {"how": how, **row, "share_of_gemm": share, "ratios": ratios}


def shares(case: Case) -> dict[str, float]:
    "Profile where the time of a forward and backward pass goes."
    model = our_model(case)
    shape = (case.rows, case.config.sequence_len + 1)
    ids = torch.randint(case.config.vocab_size, shape)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as watch:
            model(ids[:, :-1], ids[:, 1:]).backward()
    spent = {e.key: e.self_cpu_time_total for e in watch.key_averages()}
    total = sum(spent.values())
    found = {}
    for part, names in PARTS.items():
        found[part] = sum(t for k, t in spent.items() if k.startswith(names)) / total
    return found | {"everything else": 1 - sum(found.values())}


def loss_cost(positions: int, vocab: int, width: int = 256) -> dict:
    "Measure time and peak memory of the chunked and the plain loss."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(positions, width, generator=g, requires_grad=True)
    w = (torch.randn(vocab, width, generator=g) / 16).requires_grad_()
    targets = torch.randint(vocab, (positions,), generator=g)

    def chunked():
        x.grad = w.grad = None
        linear_cross_entropy(x, w, targets, 15.0).backward()

    def plain():
        x.grad = w.grad = None
        cross_entropy(softcap(x @ w.T, 15.0), targets).backward()

    # Memory first, one at a time, because alternating would mix the peaks.
    steps = {"plain": plain, "chunked": chunked}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = take_turns(steps, 5)
    row: dict[str, Any] = {"positions": positions, "vocab_size": vocab, "width": width}
    row |= {f"{k}_peak_bytes": v for k, v in peaks.items()}
    row |= {f"{k}_seconds": statistics.median(v) for k, v in seconds.items()}
    row["speed"] = compare(seconds["plain"], seconds["chunked"])
    print(row, flush=True)
    return row


def measure(case: Case) -> dict:
    "Measure everything."
    facts: dict[str, Any] = {
        "date": time.strftime("%d %B %Y"),
        "environment": environment(),
    }
    facts |= {"threads": torch.get_num_threads(), "rows": case.rows}
    facts |= {"config": vars(case.config)}
    training = [in_processes(case, how) for how in case.hows]
    facts |= {"training": training, "shares": shares(case)}
    return facts | {"loss": [loss_cost(*sizes) for sizes in case.losses]}


def show(facts: dict) -> None:
    "Print two tables: speed of training, cost of the loss."
    print("\n|  | ours, tokens/s | transformers | ratio (of 5) | share of GEMM peak |")
    print("|---|---|---|---|---|")
    for r in facts["training"]:
        print(
            f"| {r['how']} | {r['ours']:,.0f} | {r['transformers']:,.0f} "
            f"| {r['ratio']:.2f} ({r['ratios'][0]:.2f} to {r['ratios'][-1]:.2f}) "
            f"| {r['share_of_gemm']:.0%} |"
        )

    # What the chunked loss saves, and what it costs.
    print("\n| loss | plain | chunked | speed |\n|---|---|---|---|")
    for r in facts["loss"]:
        print(
            f"| {r['positions']:,} x {r['vocab_size']:,} "
            f"| {r['plain_peak_bytes'] / 2**20:,.0f} MiB "
            f"| {r['chunked_peak_bytes'] / 2**20:,.0f} MiB | {r['speed']:.2f} |"
        )


def main() -> None:
    "Measure, print and record."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="", help="JSON file for the results")
    parser.add_argument("--tiny", action="store_true", help="run the smallest case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = TINY if options.tiny else FULL
    if options.one:
        print(json.dumps(training_speed(case, options.one == "compiled")))
        return
    facts = measure(case)
    show(facts)
    if options.record:
        text = json.dumps(facts, indent=1) + "\n"
        Path(options.record).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
