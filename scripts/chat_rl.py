"""Improve a chat model by reinforcement learning (REINFORCE with a group baseline).

python -m scripts.chat_rl
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --task GSM8K
"""

from nanochat.common import run_cli
from nanochat.rl import RLConfig, reinforce

if __name__ == "__main__":
    run_cli(reinforce, RLConfig, "chat_rl")
