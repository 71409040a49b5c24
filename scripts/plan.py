"""Say what a run will do, and what it needs, before it starts.

python -m scripts.plan
python -m scripts.plan --preset gpu8 --depth 26
"""

import shutil
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nanochat import common
from nanochat.accounting import parameter_counts
from nanochat.plan import BaseConfig, ChatConfig, base_plan

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

    name_only: bool = False  # print the preset's name and nothing else


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
    import sys

    if "--name-only" in sys.argv:
        try:
            print(common.detect_preset())
        except common.UserError as error:
            sys.exit(f"error: {error}")
    else:
        common.run_cli(main, PlanConfig, "base_train")
