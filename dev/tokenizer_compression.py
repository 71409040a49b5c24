"""Measure bytes per token of our tokenizers in two sizes, next to GPT-2's and GPT-4's.

python dev/tokenizer_compression.py --reference-dir DIR --record dev/records/tokenizer_compression.json
python dev/tokenizer_compression.py --record FILE --tiny      one small tokenizer of ours

DIR contains r50k_base.tiktoken and cl100k_base.tiktoken, which OpenAI publishes. The larger of
our sizes equals GPT-2's vocabulary, so that the two can be compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.tok_eval import TITLES, TokEvalConfig, compare, load_references, samples
from nanochat.tokenizer import PRETRAINED, RustBPETokenizer

SIZES = (2048, 50_257)


def train(size: int, *flags: str) -> RustBPETokenizer:
    "Train a tokenizer as a user would, in a separate folder."
    with tempfile.TemporaryDirectory() as base:
        env = os.environ | {"NANOCHAT_BASE_DIR": base, "NANOCHAT_PRESET": "cpu"}
        flags = (f"--vocab-size={size}", "--data=embedded", *flags)
        command = [sys.executable, "-m", "scripts.tok_train", *flags]
        subprocess.run(command, env=env, check=True, capture_output=True)
        return RustBPETokenizer.from_directory(Path(base) / "tokenizer")


def main() -> None:
    "Train, compare and record."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", required=True, help="JSON file for the results")
    parser.add_argument("--reference-dir", default="", help="folder of .tiktoken files")
    parser.add_argument("--tiny", action="store_true", help="one small tokenizer")
    options = parser.parse_args()

    # Name the columns by tokenizer and size.
    flags = ["--max-chars=200000"] if options.tiny else []
    columns = {}
    for size in SIZES[:1] if options.tiny else SIZES:
        columns[f"ours {size:,}"] = train(size, *flags)
    references = load_references(options.reference_dir)
    for name, tokenizer in references.items():
        columns[f"{TITLES[name]} {tokenizer.get_vocab_size():,}"] = tokenizer

    config = TokEvalConfig(num_docs=20 if options.tiny else 1024, data="embedded")
    rows = []
    for row in compare(samples(config), columns):
        rounded = {key: round(row[key], 3) for key in columns}
        rows.append({"text": row["text"], "bytes": row["bytes"]} | rounded)

    record = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python dev/tokenizer_compression.py --reference-dir DIR",
        "data": "embedded",
        "reference_sha256": {TITLES[name]: PRETRAINED[name][1] for name in references},
        "rows": rows,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    Path(options.record).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
