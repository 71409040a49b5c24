"""Measure a base model: bits per byte (and a bigram's), CORE tasks, samples.

python -m scripts.base_eval
python -m scripts.base_eval --core none             without the few-shot tasks
python -m scripts.base_eval --core eval_bundle      DCLM's whole bundle, unpacked there
"""

import time
from dataclasses import dataclass

from nanochat.checkpoint import load_model
from nanochat.common import compute_init, get_dist_info, print0, run_cli, save_section
from nanochat.core_eval import evaluate_core, load_bundle, load_samples
from nanochat.dataloader import batches
from nanochat.dataset import iter_documents
from nanochat.decode import freeze_weights
from nanochat.engine import Engine
from nanochat.loss_eval import encode_documents, evaluate_bpb, fit_bigram

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "Once upon a time there was",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
    "The planets of the solar system are:",
    "",
)


@dataclass(frozen=True)
class BaseEvalConfig:
    "Options of the examination of a base model."

    source: str = "base"  # which stage's model
    device_batch_size: int = 16  # rows of a forward pass on one device
    eval_tokens: int = 10_485_760  # tokens read from each split
    bigram_chars: int = 20_000_000  # text that the bigram model counts; 0: no bigram
    core: str = "samples"  # none, samples (embedded), or the folder of the bundle
    core_items: int = 500  # per CORE task; -1: all
    data: str = ""  # text; empty: what pretraining used
    tag: str = ""  # which model; empty: the deepest
    step: int = -1  # which checkpoint; -1: the last
    device: str = ""  # cpu, cuda or mps; empty: the fastest


def training_documents(data: str, num_chars: int):
    "Yield training documents up to an amount of text."
    for text, _ in iter_documents("train", data=data):
        if num_chars <= 0:
            return
        num_chars -= len(text)
        yield text


def main(config: BaseEvalConfig) -> None:
    device, world, begun = compute_init(config.device), get_dist_info()[2], time.time()
    model, tokenizer, meta = load_model(config.source, device, config.tag, config.step)
    freeze_weights(model)
    data = config.data or meta.get("config", {}).get("data", "")
    B, T = config.device_batch_size, model.config.sequence_len
    steps = max(1, config.eval_tokens // (B * T * world))
    sizes = tokenizer.token_bytes().to(device)

    def bpb(model, split: str, device=device) -> float:
        stream = batches(tokenizer, split, B, T, device, world, data=data)
        return evaluate_bpb(model, stream, steps, sizes.to(device))

    values = {f"{split}_bpb": bpb(model, split) for split in ("train", "val")}
    if config.bigram_chars:
        ids = encode_documents(tokenizer, training_documents(data, config.bigram_chars))
        bigram = fit_bigram(ids, tokenizer.get_vocab_size())
        on_host = device if world > 1 else sizes.cpu().device
        values["bigram_bpb"] = bpb(bigram.to(on_host), "val", on_host)
        values["bigram_k"] = bigram.k
    for name, value in values.items():
        print0(f"{name:12} {value:.4f}")
    if config.core != "none":
        tasks = load_samples() if config.core == "samples" else load_bundle(config.core)
        show = lambda label, r: print0(
            f"{label:34} accuracy {r['accuracy']:.3f}  centred {r['centered']:+.3f}  "
            f"n {r['n']}"
        )
        result = evaluate_core(model, tokenizer, tasks, config.core_items, show)
        print0(f"CORE ({config.core}) {result['core']:.4f}")
        values |= {"core": result["core"], "core_set": config.core}
        values["core_tasks"] = result["tasks"]
    engine, samples = Engine(model, tokenizer), []
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        settings = (32, 0.0 if prompt else 1.0, None, seed)
        (row,) = engine.generate_many([ids], *settings)
        samples.append(tokenizer.decode(row.ids[1:]))
        print0(f"> {samples[-1]!r}")
    values |= {"samples": samples, "seconds": time.time() - begun}
    save_section("base_eval", {**values, "checkpoint": meta["path"]})


if __name__ == "__main__":
    run_cli(main, BaseEvalConfig, "base_eval")
