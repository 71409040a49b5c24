"""Pretrain a model on plain text.

python -m scripts.base_train --depth=6
torchrun --standalone --nproc_per_node=8 -m scripts.base_train
python -m scripts.base_train --preset gpu8 --dry-run --world 8
"""

import torch

from nanochat.checkpoint import build_model
from nanochat.common import (
    compute_dtype,
    detect_preset,
    get_dist_info,
    print0,
    read_preset,
    run_cli,
)
from nanochat.dataloader import batches
from nanochat.loss_eval import evaluate_bpb
from nanochat.plan import BaseConfig, base_plan, check_fits
from nanochat.tokenizer import get_tokenizer
from scripts._dry_run import dry_run
from scripts._stage import begin, device_memory, run_stage


def main(config: BaseConfig) -> None:
    if config.dry_run:
        # The preset's vocabulary: a dry run needs no tokenizer.
        return dry_run(
            config, int(read_preset("tok_train", detect_preset())["vocab_size"])
        )
    device, tokenizer = begin(config), get_tokenizer()
    world = get_dist_info()[2]
    wide = compute_dtype(device, config.dtype).itemsize
    vocab, kind = tokenizer.get_vocab_size(), device.type
    plan = base_plan(config, vocab, world, wide, device_type=kind)
    print0(
        f"{plan.parameters:,} parameters, {plan.num_steps:,} steps of "
        f"{plan.total_batch_size:,} tokens, {plan.flops:.2e} operations, about "
        f"{plan.memory / 2**30:.1f} GiB"
    )
    check_fits(plan, device_memory(device))
    model = build_model(plan.model, device, config.seed)
    B, T = config.device_batch_size, config.max_seq_len

    def stream(split: str, streams: int, cursors: dict | None = None):
        fit = config.best_fit and split == "train"
        return batches(
            tokenizer, split, B, T, device, streams, cursors, config.data, best_fit=fit
        )

    def validate() -> dict:
        steps = max(1, config.eval_tokens // (B * T * world))
        with torch.inference_mode():
            sizes = tokenizer.token_bytes().to(device)
            return {"val_bpb": evaluate_bpb(model, stream("val", world), steps, sizes)}

    run_stage(
        "base_train",
        "base",
        config,
        plan,
        model,
        tokenizer,
        lambda cursors: stream("train", plan.micro_batches, cursors),
        [(config.eval_every, validate)],
        config.tag or f"d{config.depth}",
    )


if __name__ == "__main__":
    run_cli(main, BaseConfig, "base_train")
