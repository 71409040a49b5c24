"""Midtraining: teach a pretrained model the form of a conversation.

python -m scripts.mid_train
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

from nanochat.common import UserError, run_cli
from nanochat.dataset import data_path
from nanochat.plan import ChatConfig
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import TaskMixture
from nanochat.tasks.customjson import CustomJSON
from nanochat.tasks.facts import Capitals, Definitions
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee
from scripts._stage import run_chat_stage


def chats(split: str, *names: str) -> list[CustomJSON]:
    "Open embedded conversations by name."
    return [CustomJSON(data_path(f"chat/{name}_{split}.jsonl")) for name in names]


def mixture(kind: str, split: str) -> TaskMixture:
    "Choose the conversations: embedded ones, or those of a large run."
    if kind not in ("small", "full"):
        raise UserError(f"mixture {kind!r} is unknown: use small or full")
    test = split == "test"
    if kind == "small":
        tasks = chats(split, "chitchat", "smalltalk", "instruct", "identity")
        tasks += [Definitions(split, stop=2500), Capitals(split)]
        tasks += [SimpleSpelling(split, size=300 if test else 6000)]
        tasks += [Arithmetic(split, size=100 if test else 400)]
        return TaskMixture(tasks)
    if test:
        return TaskMixture([SmolTalk(split), GSM8K(split, stop=420)])
    tasks = [SmolTalk(split), MMLU("auxiliary_train", "train"), GSM8K(split)]
    tasks += [*chats(split, "identity")] * 2
    tasks += [SimpleSpelling(split, size=200_000), SpellingBee(split, size=80_000)]
    return TaskMixture(tasks)


def main(config: ChatConfig) -> None:
    tasks = mixture(config.mixture, "train"), mixture(config.mixture, "test")
    run_chat_stage("mid_train", ("base", "mid"), config, tasks, everything=True)


if __name__ == "__main__":
    run_cli(main, ChatConfig, "mid_train")
