"""Supervised fine-tuning: learn only from what the assistant says.

python -m scripts.chat_sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from nanochat.common import UserError, run_cli
from nanochat.plan import ChatConfig
from nanochat.tasks.arc import ARC
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import TaskMixture
from nanochat.tasks.facts import Capitals, Definitions
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee
from scripts._stage import run_chat_stage
from scripts.mid_train import chats


def mixture(kind: str, split: str) -> TaskMixture:
    "Choose the conversations: embedded ones, or those of a large run."
    if kind not in ("small", "full"):
        raise UserError(f"mixture {kind!r} is unknown: use small or full")
    test = split == "test"
    if kind == "small":
        tasks = chats(split, "smalltalk", *["identity"] * 3)
        tasks += [Definitions(split, stop=2500), *[Capitals(split)] * 3]
        tasks += [SimpleSpelling(split, size=300 if test else 12_000)]
        tasks += [SpellingBee(split, size=100 if test else 600)]
        tasks += [Arithmetic(split, size=100 if test else 1500)]
        return TaskMixture(tasks)
    if test:
        return TaskMixture([SmolTalk(split), GSM8K(split, stop=420)])
    tasks = [ARC("ARC-Easy", split), ARC("ARC-Challenge", split), GSM8K(split)]
    tasks += [SmolTalk(split, stop=10_000), *chats(split, "identity")]
    tasks += [SimpleSpelling(split, size=300), SpellingBee(split, size=300)]
    return TaskMixture(tasks)


def main(config: ChatConfig) -> None:
    tasks = mixture(config.mixture, "train"), mixture(config.mixture, "test")
    run_chat_stage("chat_sft", ("mid", "sft"), config, tasks, everything=False)


if __name__ == "__main__":
    run_cli(main, ChatConfig, "chat_sft")
