"""Say what a run will do, and what it needs, before it starts.

python -m scripts.plan                                      this machine
python -m scripts.plan --depth 20 --gpus 8 --gpu h100       cards you do not have yet
python -m scripts.plan --gpus 8 --gpu h100 --budget 100     the depth that dollars buy
python -m scripts.plan --gpu 4090 --hours 12 --json True    or hours; for programs
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from nanochat import common
from nanochat.accounting import parameter_counts, training_memory
from nanochat.plan import (
    GPUS,
    BaseConfig,
    ChatConfig,
    base_plan,
    choose_depth,
    largest_batch,
    published_memory,
    training_seconds,
)

STAGES = {
    "tok_train": "learn {vocab:,} tokens from the training text",
    "tok_eval": "compare its compression with GPT-2's and GPT-4's",
    "base_train": "{steps:,} steps of {batch:,} tokens: predict the next token",
    "base_eval": "bits per byte against a bigram model, samples",
    "mid_train": "learn the form of a conversation",
    "chat_sft": "learn to answer: loss on the assistant's words only",
    "chat_rl": "practise sums with the calculator, keep what worked",
    "chat_eval": "held-out questions after midtraining, fine-tuning and RL",
    "report": "collect numbers, curves and samples into one page",
}


@dataclass(frozen=True)
class PlanConfig(BaseConfig):
    "The options of base_train, on which everything else depends."

    gpu: str = (
        ""  # plan for h100, h200, b200, a100-80, 4090 or 5090; empty: this machine
    )
    gpus: int = 1  # how many of them
    price: float = 0.0  # dollars per card and hour; 0: that of the table, if it has one
    budget: float = 0.0  # dollars for pretraining: picks the depth
    hours: float = 0.0  # of pretraining: picks the depth
    json: bool = False  # print one JSON object instead of a table
    name_only: bool = False  # print the preset's name and nothing else


def cards_plan(config: PlanConfig, given: set[str]) -> dict:
    "Plan a pretraining run on cards that need not be here."
    if config.gpu not in GPUS:
        raise common.UserError(f"--gpu is {config.gpu!r}: use {', '.join(GPUS)} or cpu")
    if min(config.gpus, config.budget + 1, config.hours + 1, config.price + 1) < 1:
        raise common.UserError("--gpus starts at 1; money and hours are not negative")
    if "depth" in given and (config.budget or config.hours):
        raise common.UserError("--budget and --hours pick the depth: leave --depth out")
    gpu, world = GPUS[config.gpu], config.gpus
    rent = (config.price or gpu.price) * world
    hours = config.hours
    if config.budget:
        if not rent:
            raise common.UserError(f"no price of a {config.gpu} is known: add --price")
        hours = min(hours or config.budget / rent, config.budget / rent)
    vocab = int(common.read_preset("tok_train", "gpu8")["vocab_size"])
    if hours:
        depth = choose_depth(config, vocab, gpu, world, hours)
        config = replace(config, depth=depth)
    shape = base_plan(replace(config, device_batch_size=1), vocab, world).model
    most = largest_batch(shape, gpu, config.total_batch_size, world)
    rows = config.device_batch_size if "device_batch_size" in given else most
    plan = base_plan(replace(config, device_batch_size=rows), vocab, world)
    published = published_memory(shape, rows, world) / 2**30
    if rows > most:
        raise common.UserError(
            f"device_batch_size={rows} needs about {published:.0f} GiB, a {config.gpu} "
            f"has {gpu.memory:.0f}: use at most {most}"
        )
    seconds, shards = training_seconds(plan, gpu, world), -(-plan.tokens * 4.8 // 250e6)
    return {
        "gpu": config.gpu,
        "gpus": world,
        **asdict(plan),
        "micro_batches_per_gpu": plan.micro_batches // world,
        "memory_by_part": training_memory(
            shape, rows, 2, world, plan.micro_batches // world
        ),
        "memory_published_gib": round(published, 1),
        "tokens_per_second": round(plan.tokens / seconds),
        "hours": round(seconds / 3600, 2),
        "dollars": round(rent * seconds / 3600, 2) if rent else None,
        "shards": int(shards),
        "disk_gb": round((shards * 95e6 + 8 * 2.6 * 4 * plan.parameters) / 1e9),
    }


def show_cards(facts: dict, console: Console) -> None:
    "Print such a plan as a table."
    shape, gib = facts["model"], 2**30
    parts = facts["memory_by_part"]
    money = (
        "--price is needed" if facts["dollars"] is None else f"${facts['dollars']:,.0f}"
    )
    rows = {
        "model": f"depth {shape['n_layer']}, width {shape['n_embd']}, "
        f"{facts['parameters']:,} parameters, context {shape['sequence_len']}",
        "text": f"{facts['tokens']:,} tokens in {facts['num_steps']:,} steps of "
        f"{facts['total_batch_size']:,}",
        "batch": f"{facts['micro_batches_per_gpu']} x {facts['device_batch_size']} rows "
        f"on each of {facts['gpus']} {facts['gpu']} in a step",
        "operations": f"{facts['flops']:.2e}",
        "memory": f"{parts['total'] / gib:.1f} GiB counted for this code ("
        + ", ".join(f"{k} {v / gib:.1f}" for k, v in parts.items() if k != "total")
        + f"), {facts['memory_published_gib']} GiB as published runs would need",
        "data": f"{facts['shards']:,} shards; {facts['disk_gb']:,} GB with checkpoints",
        "time": f"{facts['hours']:,.1f} hours, {facts['tokens_per_second']:,} tokens/s "
        "(fitted to published runs, chapter 6; evaluation and later stages not included)",
        "cost": money,
    }
    for name, text in rows.items():
        console.print(f"{name:11s} {text}")


def matmul_rate(device: torch.device) -> float:
    "Measure operations per second of a matrix product, for about a third of a second."
    a = torch.randn(1024, 1024, device=device, dtype=common.compute_dtype(device))
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - begun)


def main(config: PlanConfig) -> None:
    if config.gpu not in ("", "cpu"):
        given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in sys.argv[1:]}
        facts = cards_plan(config, given)
        if config.json:
            print(json.dumps(facts))
        else:
            show_cards(facts, Console(highlight=False, soft_wrap=True))
        return
    if config.budget or config.hours or config.json or config.gpus != 1:
        raise common.UserError("--gpus, --budget, --hours and --json need a --gpu")
    preset = common.detect_preset()
    device, world = common.compute_init(config.device), 8 if preset == "gpu8" else 1
    vocab = int(common.read_preset("tok_train", preset)["vocab_size"])
    gpu = preset != "cpu"
    plan = base_plan(config, vocab, world, 2 if gpu else 4)
    shape = plan.model
    console, facts = Console(highlight=False), common.environment()
    machine = ", ".join(facts["gpus"]) or f"{facts['cpus']} CPU cores, no GPU"
    console.print(f"machine   {machine}, {facts['memory_gib']} GiB of memory")
    console.print(f"preset    {preset} (settings.ini)")
    count = parameter_counts(shape)
    console.print(
        f"model     depth {shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, "
        f"{count['total']:,} parameters, context {shape.sequence_len}"
    )
    console.print(
        f"text      {plan.tokens:,} tokens, {plan.flops:.2e} floating point operations"
    )
    chat = 0.0
    for stage in ("mid_train", "chat_sft"):
        options = common.parse_config(ChatConfig, stage, ["--preset", preset])
        chat += max(0, options.num_iterations) * options.total_batch_size
    if gpu and device.type != "cuda":
        rate, origin = 989e12 * world, "that an H100's data sheet gives"
    else:
        rate, origin = matmul_rate(device) * world, "just measured"
    share = (plan.tokens + chat) / plan.tokens * plan.flops / (0.45 * rate) / 60
    console.print(
        f"time      about {share:,.0f} minutes of training at 45 % of the {rate:.1e} "
        f"operations per second {origin}, plus evaluation and RL"
        + (" (a quarter of an hour in all on two cores)" if preset == "cpu" else "")
    )
    # weights and optimizer state of two checkpoints in each of four stages
    disk = 2 * 4 * 4 * 2.6 * plan.parameters + (24e9 if preset != "cpu" else 0)
    free = shutil.disk_usage(common.get_base_dir().parent.anchor or "/").free
    console.print(
        f"disk      at most {disk / 1e9:.1f} GB in {common.get_base_dir()} "
        f"({free / 1e9:.0f} GB are free)"
    )
    kind = "memory on each GPU" if gpu else "memory"
    console.print(f"memory    about {plan.memory / 2**30 + 0.7:.1f} GiB of {kind}")
    table = Table("stage", "what it does", box=None, padding=(0, 2, 0, 0))
    for stage, text in STAGES.items():
        known = {
            "vocab": vocab,
            "steps": plan.num_steps,
            "batch": plan.total_batch_size,
        }
        table.add_row(stage, text.format(**known))
    console.print(table)


if __name__ == "__main__":
    words = [w for a in sys.argv[1:] for w in a.split("=", 1)]
    cards = words[words.index("--gpu") + 1 :][:1] if "--gpu" in words else []
    if cards and cards != ["cpu"] and "--preset" not in words:
        os.environ["NANOCHAT_PRESET"] = "gpu8"  # its sizes, on any number of cards
    elif cards:
        os.environ["NANOCHAT_PRESET"] = "cpu"
    if "--name-only" in words:
        try:
            print(common.detect_preset())
        except common.UserError as error:
            sys.exit(f"error: {error}")
    else:
        common.run_cli(main, PlanConfig, "base_train")
