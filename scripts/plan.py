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
    Plan,
    base_plan,
    choose_depth,
    gpu_key,
    largest_batch,
    measured_gpu,
    peak_memory,
    training_seconds,
    utilization,
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


def affordable_hours(config: PlanConfig, given: set[str]) -> float:  # 0: any
    "Refuse questions without an answer; turn a budget into hours."
    if config.gpu not in GPUS:
        raise common.UserError(f"--gpu is {config.gpu!r}: use {', '.join(GPUS)} or cpu")
    if min(config.gpus, config.budget + 1, config.hours + 1, config.price + 1) < 1:
        raise common.UserError("--gpus starts at 1; money and hours are not negative")
    if "depth" in given and (config.budget or config.hours):
        raise common.UserError("--budget and --hours pick the depth: leave --depth out")
    if not config.budget:
        return config.hours
    rent = (config.price or GPUS[config.gpu].price) * config.gpus
    if not rent:
        raise common.UserError(f"no price of a {config.gpu} is known: add --price")
    return min(config.hours or config.budget / rent, config.budget / rent)


def cards_plan(config: PlanConfig, given: set[str]) -> dict:
    "Plan a pretraining run on cards that need not be here."
    hours = affordable_hours(config, given)
    gpu, world = measured_gpu(config.gpu), config.gpus
    rent = (config.price or gpu.price) * world
    vocab = int(common.read_preset("tok_train", "gpu8")["vocab_size"])
    if hours:
        depth = choose_depth(config, vocab, gpu, world, hours)
        config = replace(config, depth=depth)
    shape = base_plan(replace(config, device_batch_size=1), vocab, world).model
    most = largest_batch(shape, gpu, config.total_batch_size, world)
    rows = config.device_batch_size if "device_batch_size" in given else most
    plan = base_plan(replace(config, device_batch_size=rows), vocab, world)
    share = plan.micro_batches // world
    expected = peak_memory(shape, rows, world, gpu, share) / 2**30
    if rows > most:
        raise common.UserError(
            f"device_batch_size={rows} needs about {expected:.0f} GiB, a {config.gpu} "
            f"has {gpu.memory:.0f}: use at most {most}"
        )
    seconds, shards = training_seconds(plan, gpu, world), -(-plan.tokens * 4.8 // 250e6)
    return {
        "gpu": config.gpu,
        "gpus": world,
        **asdict(plan),
        "source": gpu.source,
        "micro_batches_per_gpu": share,
        "memory_by_part": training_memory(
            shape, rows, 2, world, share, device_type="cuda"
        ),
        "memory_expected_gib": round(expected, 1),
        "share_of_peak": round(utilization(gpu, shape.n_embd), 3),
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
        + f"), {facts['memory_expected_gib']} GiB expected, {facts['source']}",
        "data": f"{facts['shards']:,} shards; {facts['disk_gb']:,} GB with checkpoints",
        "time": f"{facts['hours']:,.1f} hours, {facts['tokens_per_second']:,} tokens/s, "
        f"{facts['share_of_peak']:.0%} of the peak, {facts['source']} (chapter 6; "
        "evaluation and later stages not included)",
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


@dataclass(frozen=True)
class Speed:
    "How fast a machine is thought to train."

    peak: float  # operations per second, all devices together
    share: float  # of it that training reaches
    source: str  # where the two come from


def machine_speed(device: torch.device, preset: str, width: int) -> Speed:
    "Look a known card up, measure anything else."
    world = 8 if preset == "gpu8" else 1
    if device.type == "cuda":
        if key := gpu_key(torch.cuda.get_device_name(device)):
            gpu = measured_gpu(key)
            share, source = utilization(gpu, width), f"of its data sheet, {gpu.source}"
            return Speed(gpu.peak * world, share, source)
    elif preset != "cpu":  # a look at what cards that are not here would do
        return Speed(989e12 * world, 0.45, "that an H100's data sheet gives")
    return Speed(matmul_rate(device) * world, 0.45, "just measured")


def machine_plan(config: PlanConfig, preset: str, device: torch.device) -> Plan:
    "Plan base_train for this machine, or for the cards that a preset stands for."
    vocab = int(common.read_preset("tok_train", preset)["vocab_size"])
    world, kind = 8 if preset == "gpu8" else 1, device.type
    wide = common.compute_dtype(device, config.dtype).itemsize
    if kind == "cpu" and preset != "cpu":
        kind, wide = "cuda", 4 if config.dtype == "float32" else 2
    return base_plan(config, vocab, world, wide, device_type=kind)


def training_minutes(plan: Plan, speed: Speed, preset: str) -> float:
    "Predict the time of base_train and of the chat stages whose steps are known."
    chat = 0.0
    for stage in ("mid_train", "chat_sft"):
        options = common.parse_config(ChatConfig, stage, ["--preset", preset])
        chat += max(0, options.num_iterations) * options.total_batch_size
    operations = (plan.tokens + chat) / plan.tokens * plan.flops
    return operations / (speed.share * speed.peak) / 60


def show_machine(config: PlanConfig, console: Console) -> None:
    "Print what the whole pipeline will do here."
    preset = common.detect_preset()
    device, facts = common.compute_init(config.device), common.environment()
    plan = machine_plan(config, preset, device)
    shape, count = plan.model, parameter_counts(plan.model)["total"]
    speed = machine_speed(device, preset, shape.n_embd)
    minutes = training_minutes(plan, speed, preset)
    machine = ", ".join(facts["gpus"]) or f"{facts['cpus']} CPU cores, no GPU"
    console.print(f"machine   {machine}, {facts['memory_gib']} GiB of memory")
    console.print(f"preset    {preset} (settings.ini)")
    console.print(
        f"model     depth {shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, "
        f"{count:,} parameters, context {shape.sequence_len}"
    )
    console.print(
        f"text      {plan.tokens:,} tokens, {plan.flops:.2e} floating point operations"
    )
    console.print(
        f"time      about {minutes:,.0f} minutes of training at {speed.share:.0%} of the "
        f"{speed.peak:.1e} operations per second {speed.source}, plus evaluation and RL"
        + (" (a quarter of an hour in all on two cores)" if preset == "cpu" else "")
    )
    # weights and optimizer state of two checkpoints in each of four stages
    disk = 2 * 4 * 4 * 2.6 * plan.parameters + (24e9 if config.data == "hub" else 0)
    free = shutil.disk_usage(common.get_base_dir().parent.anchor or "/").free
    console.print(
        f"disk      at most {disk / 1e9:.1f} GB in {common.get_base_dir()} "
        f"({free / 1e9:.0f} GB are free)"
    )
    kind = "memory" if preset == "cpu" else "memory on each GPU"
    console.print(f"memory    about {plan.memory / 2**30 + 0.7:.1f} GiB of {kind}")
    table = Table("stage", "what it does", box=None, padding=(0, 2, 0, 0))
    vocab = int(common.read_preset("tok_train", preset)["vocab_size"])
    known = {"vocab": vocab, "steps": plan.num_steps, "batch": plan.total_batch_size}
    for stage, text in STAGES.items():
        table.add_row(stage, text.format(**known))
    console.print(table)


def main(config: PlanConfig) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if config.gpu in ("", "cpu"):
        if config.budget or config.hours or config.json or config.gpus != 1:
            raise common.UserError("--gpus, --budget, --hours and --json need a --gpu")
        show_machine(config, console)
        return
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in sys.argv[1:]}
    facts = cards_plan(config, given)
    if config.json:
        print(json.dumps(facts))
    else:
        show_cards(facts, console)


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
