"""Measure how to split a compute budget between a larger model and more text.

python dev/scaling.py --record dev/records/scaling.json     a quarter of an hour on one core
python dev/scaling.py --record FILE --tiny                  two sizes, a few steps each

Trains tiny models of the book's architecture on the embedded corpus. A budget is a number of
operations, counted as 6ND with N the weights of the matrices and the head; each size gets the
tokens D that spend it. Every point is trained at two learning rates, and once more with
another seed at the better one. Chapter 6 fits and plots the record.
"""

import argparse
import json
import time

import torch

from nanochat.accounting import parameter_counts
from nanochat.common import environment
from nanochat.dataset import iter_documents
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

SIZES = ((8, 1), (16, 1), (24, 1), (32, 2), (48, 2), (64, 3))  # width, layers
BUDGETS = {2e10: SIZES[:5], 6e10: SIZES[:5], 2e11: SIZES[2:6], 6e11: SIZES[3:]}
TINY = {1e8: SIZES[:2]}
RATES = (0.012, 0.024)  # learning rates at width 64; divided by width / 64
VOCAB = 512
B = 8  # rows per step
T = 64  # context


def config(width: int, layers: int) -> GPTConfig:
    "Return a config with heads of size 8, or 16 from width 32 on."
    heads = width // (8 if width < 32 else 16)
    return GPTConfig(T, VOCAB, layers, heads, heads, width)


def weights(c: GPTConfig) -> int:
    "Count the weights used in products, which is everything but the embedding."
    counts = parameter_counts(c)
    return counts["total"] - counts["wte"]


def texts() -> tuple[torch.Tensor, torch.Tensor, float]:
    "Return the training ribbon, validation windows and bytes per validation token."
    train = [text for text, _ in iter_documents("train")]
    val = [text for text, _ in iter_documents("val")][:100]
    tokenizer = RustBPETokenizer.train_from_iterator(train[:60], VOCAB)

    def flat(docs: list[str]) -> torch.Tensor:
        rows = tokenizer.encode(docs, prepend="<|bos|>")
        return torch.tensor([i for row in rows for i in row])

    held = flat(val)
    windows = held[: (len(held) - 1) // T * T + 1].unfold(0, T + 1, T)[:512]
    return flat(train), windows, sum(len(t.encode()) for t in val) / len(held)


def run(c: GPTConfig, tokens: float, rate: float, seed: int, text: tuple) -> float:
    "Train for a number of tokens with a rate falling to zero; return the held-out loss."
    ribbon, windows = text
    torch.manual_seed(seed)
    model = GPT(c)
    model.init_weights(seed=seed)
    dice = torch.Generator().manual_seed(seed)

    # A wider model needs a smaller learning rate.
    adamw = torch.optim.AdamW(
        model.parameters(), lr=rate * 64 / c.n_embd, betas=(0.9, 0.95), weight_decay=0.0
    )
    steps = max(1, round(tokens / (B * T)))

    def fall(t: int) -> float:
        return min(1.0, (t + 1) / (0.05 * steps)) * (1 - t / steps)

    # Warm up over a twentieth of the run, then decay to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, fall)
    for _ in range(steps):
        start = torch.randint(len(ribbon) - T - 1, (B,), generator=dice)
        window = torch.stack([ribbon[i : i + T + 1] for i in start.tolist()])
        model(window[:, :-1], window[:, 1:]).backward()
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    with torch.no_grad():
        parts = [model(w[:, :-1], w[:, 1:]).item() for w in windows.split(64)]
    return sum(parts) / len(parts)


def measure(budget: float, size: tuple[int, int], seeds: int, text: tuple) -> dict:
    "Train one size with one budget at both learning rates, then with the other seeds."
    width, layers = size
    c = config(width, layers)
    N = weights(c)
    D = budget / (6 * N)

    # Every size gets its best learning rate, found with one seed.
    tried = {rate: run(c, D, rate, 1, text) for rate in RATES}
    best = min(tried, key=tried.__getitem__)
    losses = [tried[best]]
    for seed in range(2, seeds + 1):
        losses.append(run(c, D, best, seed, text))
    return {
        "budget": budget,
        "width": width,
        "layers": layers,
        "N": N,
        "D": round(D / (B * T)) * B * T,
        "rates": {str(rate): round(x, 4) for rate, x in tried.items()},
        "losses": [round(x, 4) for x in losses],
    }


def main() -> None:
    "Measure point after point, saving the record after each."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", default="dev/records/scaling.json")
    parser.add_argument("--budgets", type=float, nargs="*", default=[*BUDGETS])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--tiny", action="store_true", help="two sizes, a few steps each"
    )
    options = parser.parse_args()
    plan = TINY if options.tiny else {b: BUDGETS[b] for b in options.budgets}
    torch.set_num_threads(1)
    ribbon, windows, bytes_per_token = texts()
    points = []
    begun = time.time()
    for budget, sizes in plan.items():
        for size in sizes:
            points.append(measure(budget, size, options.seeds, (ribbon, windows)))
            print(f"{time.time() - begun:6.0f} s", points[-1], flush=True)

            # Written after each point, because the study takes long.
            record = {
                "command": "python dev/scaling.py",
                "date": time.strftime("%Y-%m-%d"),
                "environment": environment(),
                "bytes_per_token": round(bytes_per_token, 3),
                "ribbon": len(ribbon),
                "seconds": round(time.time() - begun),
                "points": points,
            }
            with open(options.record, "w") as file:
                file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
