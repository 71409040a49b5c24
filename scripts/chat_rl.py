"""Improve a fine-tuned model by practice with a checker (REINFORCE, group baseline).

python -m scripts.chat_rl
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --task GSM8K
"""

import dataclasses
from pathlib import Path

from nanochat import checkpoint
from nanochat.common import (
    UserError,
    compute_dtype,
    compute_init,
    get_dist_info,
    print0,
    run_cli,
    save_section,
)
from nanochat.engine import Engine
from nanochat.optim import setup_optimizer
from nanochat.rl import RLConfig, train_rl
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.spelling import SpellingBee
from scripts._stage import find_resume, settings_hash, weight_settings

IDLE = ("device", "overwrite", "save_every", "keep", "tracker")  # not on weights


def questions(task: str, split: str):
    "Open the questions of a split; practice never uses the numbers of fine-tuning's seed."
    if task == "Arithmetic":
        train = split == "train"
        return Arithmetic(split, 100_000 if train else 1000, seed=1 if train else 0)
    if task in ("GSM8K", "SpellingBee"):
        return {"GSM8K": GSM8K, "SpellingBee": SpellingBee}[task](split)
    raise UserError(f"task {task!r} is unknown: use Arithmetic, GSM8K or SpellingBee")


def main(config: RLConfig) -> None:
    device, world = compute_init(config.device), get_dist_info()[2]
    if config.examples_per_step % world:
        raise UserError(
            f"examples_per_step={config.examples_per_step} cannot be shared by {world} "
            f"ranks: use a multiple of {world}"
        )
    tasks = questions(config.task, "train"), questions(config.task, "test")
    model, tokenizer, meta = checkpoint.load_model(
        config.source, device, config.source_tag, config.step
    )
    model.dtype = compute_dtype(device, config.dtype)
    chosen = weight_settings(config, IDLE)
    settings = settings_hash("chat_rl", chosen, meta["sha256"]["model.safetensors"])
    tag = config.tag or Path(meta["path"]).parent.name
    folder = checkpoint.checkpoint_folder("rl", tag)
    optimizer, start, results = setup_optimizer(model), 0, {}
    path, done = find_resume(folder, settings, config.overwrite)
    if path is not None:
        start, results = done["step"], done["results"]
        checkpoint.load_training_state(path, model, optimizer)
        print0(f"chat_rl: {start} steps are done, see {path}")

    def save(step: int, results: dict) -> None:
        facts = {
            "stage": "chat_rl",
            "settings": settings,
            "config": dataclasses.asdict(config),
            "tokenizer": tokenizer.fingerprint(),
            "results": results,
        }
        checkpoint.save(folder, step, model, optimizer, None, facts, config.keep)

    engine = Engine(model, tokenizer)
    if start < config.num_steps:
        results = train_rl(engine, optimizer, *tasks, config, start, results, save)
    before, after = results["before"], results["after"]
    for name in after:
        print0(f"{name:10} {100 * before[name]:6.1f} % -> {100 * after[name]:6.1f} %")
    flat = {
        f"{k}_{when}": results[when][k] for when in ("before", "after") for k in after
    }
    save_section(
        "chat_rl",
        {**flat, "seconds": results["seconds"], "steps": config.num_steps},
    )


if __name__ == "__main__":
    run_cli(main, RLConfig, "chat_rl")
