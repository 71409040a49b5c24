"""Pretrain a model on plain text.

python -m scripts.base_train --depth=6
torchrun --standalone --nproc_per_node=8 -m scripts.base_train
python -m scripts.base_train --preset gpu8 --dry-run --world 8
"""

from nanochat.common import run_cli
from nanochat.config import BaseConfig
from nanochat.stage import pretrain

if __name__ == "__main__":
    run_cli(pretrain, BaseConfig, "base_train")
