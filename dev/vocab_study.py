"""Find the best vocabulary size for a small model, by bits per byte at equal compute.

python dev/vocab_study.py --record dev/records/vocab_study.json     a quarter of an hour on two cores
python dev/vocab_study.py --record FILE --tiny                      one size, one seed, two steps

For each size, the tokenizer is trained with `scripts.tok_train`, then models of depth 2 with
`scripts.base_train` and several seeds. All runs get the same number of floating-point
operations, so a larger vocabulary, whose head costs more, takes fewer steps. All are evaluated
on the whole validation split.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from nanochat.accounting import flops_per_token
from nanochat.common import environment
from nanochat.dataset import iter_documents
from nanochat.plan import model_config
from nanochat.tokenizer import RustBPETokenizer

SIZES = [512, 1024, 2048, 4096, 8192, 16_384]
SEEDS = [1, 2, 3]
DEPTH = 2
CONTEXT = 256
BATCH = 4096  # tokens per step
STEPS = 200  # for a vocabulary of 2,048; the others follow from it


def run(module: str, base: str, **options) -> None:
    "Run a stage of the pipeline in a separate base folder."
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    env = os.environ | {"NANOCHAT_BASE_DIR": base, "NANOCHAT_PRESET": "cpu"}
    env |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"scripts.{module}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def flops(vocab: int) -> float:
    "Count the operations per token for a vocabulary size."
    return flops_per_token(model_config(DEPTH, vocab, CONTEXT))


def study(case: tuple[int, int, bool]) -> dict:
    "Train a tokenizer and a model for one size and seed; measure bits per byte."
    size, seed, tiny = case
    docs = [text for text, _ in iter_documents("val", data="embedded")]
    docs = docs[:10] if tiny else docs

    # Equal operations for each vocabulary, not equal steps.
    steps = round((2 if tiny else STEPS) * flops(2048) / flops(size))
    text = {"max_chars": 200_000} if tiny else {}
    with tempfile.TemporaryDirectory() as base:
        run("tok_train", base, vocab_size=size, **text)
        tokenizer = RustBPETokenizer.from_directory(Path(base) / "tokenizer")
        tokens = sum(map(len, tokenizer.encode(docs)))
        sizes = {"max_seq_len": CONTEXT, "total_batch_size": BATCH}
        limits = {"num_iterations": steps, "eval_tokens": tokens, "eval_every": -1}
        run("base_train", base, depth=DEPTH, seed=seed, **sizes, **limits)
        section = json.loads((Path(base) / "report" / "base_train.json").read_text())

    # Bits per byte, because losses per token depend on the tokenizer.
    ratio = sum(len(doc.encode()) for doc in docs) / tokens
    row = {"vocab_size": size, "steps": steps, "bytes_per_token": ratio}
    row |= {"parameters": section["parameters"], "val_bpb": section["val_bpb"]}
    print(row, flush=True)
    return row


def main() -> None:
    "Run all sizes and seeds, two at a time, and write the record."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", required=True, help="JSON file for the results")
    parser.add_argument("--tiny", action="store_true", help="one size, seed; two steps")
    options = parser.parse_args()
    sizes = [512] if options.tiny else SIZES
    seeds = [1] if options.tiny else SEEDS
    rows: dict[int, dict] = {}

    # Each run waits for its own processes, so threads are enough.
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(study, product(sizes, seeds, [options.tiny])):
            bits = row.pop("val_bpb")
            rows.setdefault(row["vocab_size"], row | {"val_bpb": []})
            rows[row["vocab_size"]]["val_bpb"].append(bits)
    facts: dict[str, Any] = {
        "date": time.strftime("%d %B %Y"),
        "environment": environment(),
    }
    facts |= {"depth": DEPTH, "context": CONTEXT, "batch": BATCH, "seeds": seeds}
    text = json.dumps(facts | {"rows": list(rows.values())}, indent=1)
    Path(options.record).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
