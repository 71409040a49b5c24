"""Examine a chat model on tasks with a grader.

python -m scripts.chat_eval --source sft
python -m scripts.chat_eval --source rl --tasks "Arithmetic|Spelling"
python -m scripts.chat_eval --tasks HumanEval   runs generated code, inside bubblewrap
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval --source sft
"""

from nanochat.chat_eval import ChatEvalConfig, evaluate_chat
from nanochat.checkpoint import load_model
from nanochat.common import compute_init, print0, run_cli, save_section
from nanochat.decode import freeze_weights
from nanochat.engine import Engine


def main(config: ChatEvalConfig) -> None:
    device = compute_init(config.device)
    model, tokenizer, meta = load_model(config.source, device, config.tag, config.step)
    engine = Engine(freeze_weights(model), tokenizer)
    values = evaluate_chat(model, tokenizer, engine, config)
    for name, r in values["tasks"].items():
        ended = "" if r["ended"] is None else f"  ended {100 * r['ended']:.1f} %"
        print0(
            f"{name:14} {100 * r['accuracy']:5.1f} %  95 % interval "
            f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]  n {r['n']}  "
            f"chance {100 * r['chance']:.0f} %{ended}"
        )
    if values["chatcore"] is not None:
        print0(f"ChatCORE {values['chatcore']:.4f}")
    save_section(f"chat_eval_{config.source}", {**values, "checkpoint": meta["path"]})


if __name__ == "__main__":
    run_cli(main, ChatEvalConfig, "chat_eval")
