"""How fast is the model on this CPU? Against transformers, against the processor, by part.

python dev/bench_model.py --record dev/records/model_bench.json      about ten minutes

Forward and backward of a model of depth 4 (width 256, 512 positions, 4,096 tokens, 4 rows) in
float32, ours and transformers' `NanoChatForCausalLM` with the same weights, taking turns in one
process, five processes, without and with torch.compile; where the time goes; and the chunked loss beside the
plain one at 8,192 positions and 65,536 tokens. BENCH_THREADS=1 takes one thread instead of two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ.get("BENCH_THREADS", "2")
os.environ.pop("TORCHDYNAMO_DISABLE", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from memory import peak_bytes
from torch.profiler import ProfilerActivity, profile

from nanochat.accounting import flops_per_token
from nanochat.common import environment
from nanochat.functional import cross_entropy, softcap
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import linear_cross_entropy
from nanochat.hf import hf_config, hf_weights

CONFIG = GPTConfig(512, 4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
ROWS, REPEAT = 4, 9
PARTS = {  # of a profile: name -> beginnings of operator names
    "matrix products": ("aten::mm", "aten::addmm"),
    "matrix products of attention": ("aten::bmm",),
    "softmax and tanh": ("aten::_softmax", "aten::tanh", "aten::exp"),
}


def our_model() -> GPT:
    "A model in which no weight is zero."
    model, g = GPT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.0 if "wte" in name else p.size(1) ** -0.5, generator=g)
    return model


def their_model(model: GPT):
    "transformers' class with the same weights."
    from transformers import NanoChatConfig, NanoChatForCausalLM

    apart = ("architectures", "model_type", "pad_token_id", "dtype")
    facts = {k: v for k, v in hf_config(CONFIG, 0, 1).items() if k not in apart}
    theirs = NanoChatForCausalLM(NanoChatConfig(**facts)).train()
    theirs.load_state_dict(hf_weights(model))
    return theirs


def take_turns(steps: dict, repeat: int = REPEAT) -> dict[str, list[float]]:
    "Seconds of each step, alternating; the first round is thrown away."
    seconds = {name: [] for name in steps}
    for _ in range(repeat + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return {name: values[1:] for name, values in seconds.items()}


def compare(slow: list[float], fast: list[float]) -> float:
    "Median of the ratios of neighbours in time."
    return statistics.median(a / b for a, b in zip(slow, fast))


def gemm_rate(size: int = 1024) -> float:
    "Operations per second of a square product in float32: the best of many."
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(take_turns({"": lambda: a @ b}, 40)[""])


def training_speed(compiled: bool) -> dict:
    "Tokens per second of forward and backward, ours and theirs."
    model, g = our_model(), torch.Generator().manual_seed(1)
    theirs, T = their_model(model), CONFIG.sequence_len
    ids = torch.randint(CONFIG.vocab_size, (ROWS, T + 1), generator=g)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    wrap = partial(torch.compile, dynamic=False) if compiled else lambda f: f
    our_call, their_call = wrap(model), wrap(theirs)
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

    torch.testing.assert_close(ours(), transformers())
    seconds = take_turns({"ours": ours, "transformers": transformers})
    rates = {k: x.numel() / statistics.median(v) for k, v in seconds.items()}
    ratio = compare(seconds["transformers"], seconds["ours"])
    return rates | {"ratio": ratio, "gemm_flops": gemm_rate()}


def in_processes(how: str, times: int = 5) -> dict:
    "Repeat in fresh processes, since one may be lucky with its memory; take medians."
    runs = []
    for _ in range(times):
        command = [sys.executable, __file__, "--one", how]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(told.stdout.splitlines()[-1]))
        print(how, runs[-1], flush=True)
    row = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    share = row["ours"] * flops_per_token(CONFIG) / row["gemm_flops"]
    ratios = sorted(r["ratio"] for r in runs)
    return {"how": how, **row, "share_of_gemm": share, "ratios": ratios}


def shares() -> dict[str, float]:
    "Where the time of a forward and backward pass goes, by the profiler."
    model = our_model()
    ids = torch.randint(CONFIG.vocab_size, (ROWS, CONFIG.sequence_len + 1))
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as watch:
            model(ids[:, :-1], ids[:, 1:]).backward()
    spent = {e.key: e.self_cpu_time_total for e in watch.key_averages()}
    total, found = sum(spent.values()), {}
    for part, names in PARTS.items():
        found[part] = sum(t for k, t in spent.items() if k.startswith(names)) / total
    return found | {"everything else": 1 - sum(found.values())}


def loss_cost(positions: int = 8192, vocab: int = 65_536, width: int = 256) -> dict:
    "Time and peak memory of the chunked loss and the plain one."
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

    steps = {"plain": plain, "chunked": chunked}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    seconds = take_turns(steps, 5)
    row = {"positions": positions, "vocab_size": vocab, "width": width}
    row |= {f"{k}_peak_bytes": v for k, v in peaks.items()}
    row |= {f"{k}_seconds": statistics.median(v) for k, v in seconds.items()}
    row["speed"] = compare(seconds["plain"], seconds["chunked"])
    print(row, flush=True)
    return row


def main(record: str) -> None:
    facts = {"date": time.strftime("%d %B %Y"), "environment": environment()}
    facts |= {"threads": torch.get_num_threads(), "rows": ROWS, "config": vars(CONFIG)}
    training = [in_processes(how) for how in ("eager", "compiled")]
    facts |= {"training": training, "shares": shares()}
    facts |= {"loss": [loss_cost(2048, 4096), loss_cost()]}
    print("\n|  | ours, tokens/s | transformers | ratio (of 5) | share of GEMM peak |")
    print("|---|---|---|---|---|")
    for r in facts["training"]:
        print(
            f"| {r['how']} | {r['ours']:,.0f} | {r['transformers']:,.0f} "
            f"| {r['ratio']:.2f} ({r['ratios'][0]:.2f} to {r['ratios'][-1]:.2f}) "
            f"| {r['share_of_gemm']:.0%} |"
        )
    print("\n| loss | plain | chunked | speed |\n|---|---|---|---|")
    for r in facts["loss"]:
        print(
            f"| {r['positions']:,} x {r['vocab_size']:,} "
            f"| {r['plain_peak_bytes'] / 2**20:,.0f} MiB "
            f"| {r['chunked_peak_bytes'] / 2**20:,.0f} MiB | {r['speed']:.2f} |"
        )
    if record:
        Path(record).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="", help="JSON file for the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(training_speed(args.one == "compiled")))
    else:
        main(args.record)
