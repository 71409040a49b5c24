"""Which vocabulary serves a small model best? Bits per byte at equal compute.

python dev/vocab_study.py dev/records/vocab_study.json     about half an hour on two cores

For each size: the tokenizer is trained with `scripts.tok_train`, then models of depth 2 with
`scripts.base_train`, from several seeds. All runs get the same number of floating-point
operations, so a larger vocabulary, whose head costs more, takes fewer steps. The whole
validation split is the test in every case.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.accounting import flops_per_token
from nanochat.common import environment
from nanochat.dataset import iter_documents
from nanochat.plan import model_config
from nanochat.tokenizer import RustBPETokenizer

SIZES = [512, 1024, 2048, 4096, 8192, 16_384]
SEEDS = [1, 2, 3]
DEPTH, CONTEXT, BATCH = 2, 256, 4096
STEPS = 250  # at 2,048 tokens; the others follow


def run(module: str, base: str, **options) -> None:
    "Run a stage of the pipeline in a folder of its own."
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    env = os.environ | {"NANOCHAT_BASE_DIR": base, "NANOCHAT_PRESET": "cpu"}
    command = [sys.executable, "-m", f"scripts.{module}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def study(size: int, base: str, docs: list[str], total: int) -> dict:
    "Train a tokenizer and a model from each seed; return the validation's bits per byte."
    run("tok_train", base, vocab_size=size)
    tokenizer = RustBPETokenizer.from_directory(Path(base) / "tokenizer")
    tokens = sum(map(len, tokenizer.encode(docs)))
    flops = lambda vocab: flops_per_token(model_config(DEPTH, vocab, CONTEXT))
    steps = round(STEPS * flops(2048) / flops(size))
    bits = []
    for seed in SEEDS:
        sizes = {"max_seq_len": CONTEXT, "total_batch_size": BATCH}
        limits = {"num_iterations": steps, "eval_tokens": tokens, "save_every": -1}
        run("base_train", base, depth=DEPTH, seed=seed, tag=seed, **sizes, **limits)
        section = json.loads((Path(base) / "report" / "base_train.json").read_text())
        bits.append(section["val_bpb"])
    row = {"vocab_size": size, "steps": steps, "bytes_per_token": total / tokens}
    return row | {"parameters": section["parameters"], "val_bpb": bits}


def main(record: str) -> None:
    docs = [text for text, _ in iter_documents("val", data="embedded")]
    total, rows = sum(len(doc.encode()) for doc in docs), []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as base:
            rows.append(study(size, base, docs, total))
        middle, spread = (f(rows[-1]["val_bpb"]) for f in (statistics.mean, max))
        print(rows[-1], f"mean {middle:.4f}, largest {spread:.4f}", flush=True)
    facts = {"date": time.strftime("%d %B %Y"), "environment": environment()}
    facts |= {"depth": DEPTH, "context": CONTEXT, "batch": BATCH, "seeds": SEEDS}
    Path(record).write_text(
        json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1])
