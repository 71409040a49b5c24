"""Teach a pretrained model the format of conversations (midtraining).

python -m scripts.mid_train
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

from nanochat.common import run_cli
from nanochat.config import ChatConfig
from nanochat.stage import midtrain

if __name__ == "__main__":
    run_cli(midtrain, ChatConfig, "mid_train")
