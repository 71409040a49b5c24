"""Measure the optimizer's cost on this CPU: its share of a step, and both iterations compared.

python dev/bench_optim.py --record dev/records/optim_bench.json      about five minutes on a busy machine

A depth-4 model (width 256, 4,096 tokens) takes steps of 4 x 256 tokens in float32: on one thread
in CPU seconds, which a busy machine hardly changes, and on two threads in wall-clock seconds.
Everything alternates in one process; a ratio is the median of ratios of adjacent measurements.
With --tiny the model is so small that it takes seconds, and the figures mean nothing.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "2"

import torch
from torch import Tensor

from nanochat.adamw import AdamW, run_jobs
from nanochat.common import environment
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import METHODS, by_shape, orthogonalize
from nanochat.optim import setup_optimizer

CONFIG = GPTConfig(256, 4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
TINY = GPTConfig(32, 256, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
ROWS = 4
REPEAT = 7


def plain(x: Tensor, method: str = "newton-schulz") -> Tensor:
    "Iterate on the full matrices as nanochat does, for one matrix or a stack."
    schatten, margin, steps = METHODS[method]
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    norm = x.norm(dim=(-2, -1), keepdim=True)
    if schatten == 4:
        norm = (x @ x.mT).norm(dim=(-2, -1), keepdim=True).sqrt()
    x = x / (margin * norm + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def take_turns(steps: dict) -> dict[str, list[float]]:
    "Measure the seconds of each step, alternating; the first round is discarded."
    one = torch.get_num_threads() == 1
    clock = time.process_time if one else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEAT + 1):
        for name, step in steps.items():
            begun = clock()
            step()
            seconds[name].append(clock() - begun)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    "Return median and quartiles of the ratios of measurements adjacent in time."
    low, middle, high = statistics.quantiles((a / b for a, b in zip(slow, fast)), n=4)
    return {"median": middle, "low": low, "high": high}


# Replacements for Muon's `orthogonalize` in a step.
WAYS = {
    "two steps, cans": lambda x, *_: orthogonalize(x, "cans"),
    "five steps": lambda x, *_: orthogonalize(x),
    "five plain steps": lambda x, *_: plain(x),
    "five steps in bfloat16": lambda x, *_: orthogonalize(x, dtype=torch.bfloat16),
}


def share(model: GPT, optimizers) -> dict:
    "Run training steps and measure the optimizer's share of each."
    shape = (ROWS, model.config.sequence_len + 1)
    ids = torch.randint(model.config.vocab_size, shape)

    def passes() -> None:
        optimizers.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()

    def muon(iterate) -> None:
        with patch("nanochat.muon.orthogonalize", iterate):
            run_jobs(optimizers.parts["muon"].jobs())

    def adamw() -> None:
        run_jobs(optimizers.parts["adamw"].jobs())

    steps = {"passes": passes, "adamw": adamw}
    for name, iterate in WAYS.items():
        steps[name] = partial(muon, iterate)
    seconds = take_turns(steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    # Shares per turn, so that a slow moment affects both parts of a ratio.
    facts = {"seconds": medians}
    for name in WAYS:
        both = [a + b for a, b in zip(seconds["adamw"], seconds[name])]
        whole = [a + b for a, b in zip(seconds["passes"], both)]
        facts[f"share with {name}"] = ratio(both, whole)
    return facts


def iterations(model: GPT, method: str) -> dict:
    "Orthogonalize a step's matrices in three ways, and compare the results."
    g = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(p.shape, generator=g) for p in model.transformer.h.parameters()
    ]
    stacks = [torch.stack(group) for group in by_shape(grads)]

    # Like shapes in one product, and each matrix by itself.
    ways = {
        "ours": lambda: [orthogonalize(stack, method) for stack in stacks],
        "plain, stacked": lambda: [plain(stack, method) for stack in stacks],
        "plain, one by one": lambda: [plain(x, method) for s in stacks for x in s],
    }

    # Make sure that the faster ways give the same numbers.
    pairs = zip(ways["ours"](), ways["plain, stacked"]())
    gap = max((a - b).abs().max().item() for a, b in pairs)
    seconds = take_turns(ways)
    ours = seconds.pop("ours")
    facts = {f"speed against {k}": ratio(v, ours) for k, v in seconds.items()}
    return facts | {"largest difference": gap}


def adamw(model: GPT) -> dict:
    "Measure our AdamW on embedding and head against PyTorch's three versions."
    tables = (model.transformer.wte.weight, model.lm_head.weight)
    grads = [torch.randn_like(p) for p in tables]
    theirs = torch.optim.AdamW
    makers = {
        "ours": (AdamW, {}),
        "loop": (theirs, {"foreach": False, "fused": False}),
        "foreach": (theirs, {"foreach": True, "fused": False}),
        "fused": (theirs, {"foreach": False, "fused": True}),
    }

    # Each gets its own weights, starting at zero, and the same gradients.
    steps = {}
    for name, (kind, options) in makers.items():
        params = [torch.zeros_like(grad) for grad in grads]
        for p, grad in zip(params, grads):
            p.grad = grad
        steps[name] = kind(params, lr=1e-3, weight_decay=0.0, **options).step
    seconds = take_turns(steps)
    ours = seconds.pop("ours")
    facts = {f"speed against torch's {k}": ratio(v, ours) for k, v in seconds.items()}
    return facts | {"milliseconds": 1000 * statistics.median(ours)}


def main() -> None:
    "Measure, print and record."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--tiny", action="store_true", help="run the smallest case")
    args = parser.parse_args()
    record = {"environment": environment(), "load": os.getloadavg()}

    # One thread shows the arithmetic, two show what waiting costs.
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = GPT(TINY if args.tiny else CONFIG)
        model.init_weights(0)
        facts = {"step": share(model, setup_optimizer(model)), "adamw": adamw(model)}
        facts["iteration"] = {method: iterations(model, method) for method in METHODS}
        record[f"{threads} threads"] = facts
    text = json.dumps(record, indent=2)
    print(text)
    if args.record:
        args.record.write_text(text + "\n")


if __name__ == "__main__":
    main()
