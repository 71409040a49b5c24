"""Fine-tune a model on the assistant's words only (supervised fine-tuning).

python -m scripts.chat_sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from nanochat.common import run_cli
from nanochat.config import ChatConfig
from nanochat.stage import finetune

if __name__ == "__main__":
    run_cli(finetune, ChatConfig, "chat_sft")
