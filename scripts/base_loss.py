"""Evaluate a base model without the few-shot tasks: nanochat's name for that part of base_eval.

python -m scripts.base_loss
torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
"""

import sys

from nanochat.cli import run_command

if __name__ == "__main__":
    options = ["--core", "none", *sys.argv[1:]]
    run_command("base_eval", options, "python -m scripts.base_loss")
