"""Train the CPU preset's model for 300 steps with three seeds, as a reference for GPUs.

python dev/gpu_baseline.py      about ten minutes on two cores; writes dev/records/gpu_baseline.json

`python dev/gpu.py` trains the same model on the same text in bfloat16 and checks whether its
bits per byte are within the spread of the seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

from gpu_sections.pipeline import BASELINE, STEPS, preset_run, spread
from gpu_sections.tools import Scale

from nanochat.common import environment

SEEDS = (1, 2, 3)


def measure(tiny: bool) -> dict:
    "Train with every seed and return the results."
    # All seeds read the same text with the same tokenizer; only the weights differ.
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder), Scale(tiny)
        runs = [preset_run(place[0], seed, place[1], "cpu") for seed in SEEDS]
    bpb = [run["val_bpb"] for run in runs]
    return {
        "date": time.strftime("%d %B %Y"),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "command": "python dev/gpu_baseline.py",
        "environment": environment(),
        "steps": runs[0]["steps"],
        "tokens": runs[0]["tokens"],
        "parameters": runs[0]["parameters"],
        "seeds": SEEDS,
        "val_bpb": bpb,
        "spread": spread(bpb),
        "train_seconds": [run["train_seconds"] for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=BASELINE)
    parser.add_argument(
        "--tiny", action="store_true", help=f"8 steps instead of {STEPS}"
    )
    options = parser.parse_args()
    found = measure(options.tiny)
    print(json.dumps(found, indent=1))
    options.record.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
