"""Talk to a trained model in the terminal.

python -m scripts.chat_cli                       a conversation; /clear starts anew, /quit ends it
python -m scripts.chat_cli -p "What is a noun?"  one reply
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat.common import UserError, run_cli
from nanochat.engine import Engine
from nanochat.server import (
    fit_conversation,
    load_chat_model,
    reply_content,
    reply_events,
)


@dataclass(frozen=True)
class ChatCliConfig:
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """Print the reply to this and leave; empty: a conversation."""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = ""
    """The stage to talk to: base, mid, sft or rl; empty: the best that exists."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0: always the most probable token; higher: more surprising."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Choose among this many tokens; 0: among all."""
    max_tokens: int = 256
    """Longest reply, in tokens."""
    seed: int = -1
    """Seed of the sampling; -1: a new one for each reply."""
    system: str = ""
    """A system message."""
    tag: str = ""
    """Model, such as d20; empty: the deepest."""
    step: int = -1
    """Checkpoint; -1: the last."""
    device: str = ""
    """cuda, mps or cpu; empty: the fastest present."""
    compile: bool = False
    """Compile the decode step: the first reply has to wait for it. Meant for GPUs."""


def visible(text: str) -> str:
    "Drop control characters: a model must not be able to steer the terminal."
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def reply(engine: Engine, messages: list[dict], config: ChatCliConfig) -> dict:
    "Print the reply as it arrives and return it as a message."
    room = min(config.max_tokens, engine.model.config.sequence_len // 4)
    limit = engine.model.config.sequence_len - room
    ids, dropped = fit_conversation(engine.tokenizer, messages, limit)
    if dropped:
        turns = "turn does" if dropped == 1 else "turns do"
        print(f"[the oldest {dropped} {turns} not fit into the context any more]")
    options = (config.max_tokens, config.temperature, config.top_k)
    seed = None if config.seed < 0 else config.seed
    events = []
    for event in reply_events(engine, ids, *options, seed):
        events.append(event)
        if "token" in event:
            print(visible(event["token"]), end="", flush=True)
        elif "tool" in event:
            call = f"[{event['tool']} = {event['result']}] "
            print(visible(call), end="", flush=True)
    print(" [...]" if events[-1]["reason"] == "length" else "")
    return {"role": "assistant", "content": reply_content(events)}


def converse(engine: Engine, start: list[dict], config: ChatCliConfig) -> None:
    "Read, answer, repeat; a reply can be interrupted with Ctrl-C."
    print(
        "Type a message; /clear starts a new conversation, /quit (or Ctrl-D) ends it."
    )
    messages = list(start)
    while True:
        try:
            text = input("\nyou: ").strip()
        except EOFError:
            return print()
        if text in ("/quit", "/exit", "quit", "exit"):
            return
        if text == "/clear":
            messages = list(start)
            print("[new conversation]")
            continue
        if not text:
            continue
        print("nanochat: ", end="", flush=True)
        try:
            asked = [*messages, {"role": "user", "content": text}]
            messages = [*asked, reply(engine, asked, config)]
        except UserError as error:
            print(f"[{error}]")
        except KeyboardInterrupt:
            print(" [stopped; the message was taken back]")


def main(config: ChatCliConfig) -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401  arrow keys and history in input()
    where = config.source, config.device, config.tag, config.step
    engine, name = load_chat_model(*where, compiled=config.compile)
    start = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt:
        reply(engine, [*start, {"role": "user", "content": config.prompt}], config)
    else:
        print(f"{name}, {engine.model.num_params():,} parameters")
        converse(engine, start, config)


if __name__ == "__main__":
    run_cli(main, ChatCliConfig, "chat_cli")
