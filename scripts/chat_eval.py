"""Evaluate a chat model on tasks with a grader.

python -m scripts.chat_eval --source sft
python -m scripts.chat_eval --source rl --tasks "Arithmetic|Spelling"
python -m scripts.chat_eval --tasks HumanEval   runs generated code, inside bubblewrap
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval --source sft
"""

from nanochat.chat_eval import ChatEvalConfig, examine_chat
from nanochat.common import run_cli

if __name__ == "__main__":
    run_cli(examine_chat, ChatEvalConfig, "chat_eval")
