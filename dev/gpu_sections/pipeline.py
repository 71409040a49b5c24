"""Run the real pipeline on the GPU: the CPU preset's run, and the five-minute lab."""

import json
import math
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gpu_sections.tools import Report, Scale, Skip, require_crate

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "dev" / "records" / "gpu_baseline.json"
STEPS = 300


def preset_run(folder: Path, seed: int, scale: Scale, device: str) -> dict:
    "Pretrain with the CPU preset's model and data; return what the report says."
    os.environ.update(NANOCHAT_BASE_DIR=str(folder), NANOCHAT_PRESET="cpu")
    from nanochat.common import read_preset
    from nanochat.config import BaseConfig
    from nanochat.stage import pretrain
    from nanochat.tok_train import TokTrainConfig, train_tokenizer

    # The preset's values are text; the config's defaults tell their types.
    read = read_preset("base_train", "cpu")
    options = {k: type(getattr(BaseConfig, k))(v) for k, v in read.items()}
    options |= dict(num_iterations=STEPS, eval_every=-1, save_every=-1)
    vocab = int(read_preset("tok_train", "cpu")["vocab_size"])
    limits: dict[str, Any] = dict(data="embedded")
    if scale.tiny:
        options |= dict(depth=1, max_seq_len=64, device_batch_size=4, eval_tokens=1024)
        options |= dict(total_batch_size=512, num_iterations=8, compile=False)
        vocab = 400
        limits |= dict(max_chars=50_000, numbers=1)
    if not (folder / "tokenizer").is_dir():
        train_tokenizer(TokTrainConfig(vocab_size=vocab, **limits))
    options |= dict(seed=seed, device=device, tag=f"seed{seed}", overwrite=True)
    pretrain(BaseConfig(**options))
    return json.loads((folder / "report" / "base_train.json").read_text())


def spread(values: list[float]) -> float:
    "Return the distance from the mean within which another seed falls 19 times in 20."
    # Student's t for 95 %, by the number of values.
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return t * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))


def same_training(scale: Scale, report: Report) -> None:
    "Train the CPU preset's model in bf16, and compare its loss with the CPU's."
    require_crate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if scale.tiny:  # a stand-in for the record: two seeds in float32
            runs = [preset_run(folder, seed, scale, "cpu") for seed in (1, 2)]
            known = [run["val_bpb"] for run in runs]
            os.environ["NANOCHAT_DTYPE"] = "bfloat16"
        elif BASELINE.exists():
            known = json.loads(BASELINE.read_text())["val_bpb"]
        else:
            raise Skip("no record of the CPU's seeds: run python dev/gpu_baseline.py")
        found = preset_run(folder, 42, scale, scale.device.type)
    bpb = found["val_bpb"]
    mean = statistics.mean(known)
    report.note(val_bpb=bpb, cpu_val_bpb=known, steps=found["steps"])
    report.note(train_seconds=found["train_seconds"])
    report.key = f"{bpb:.4f} bits per byte, {mean:.4f} on the CPU"
    report.check("distance from the CPU's mean", abs(bpb - mean), spread(known))


def lab(scale: Scale, report: Report) -> None:
    "Run every stage with the preset gpu-lab and keep what its report says."
    with tempfile.TemporaryDirectory() as folder:
        command = ["bash", "speedrun.sh", "--preset", "gpu-lab"]
        told = dict(os.environ, NANOCHAT_BASE_DIR=folder)
        if scale.tiny:
            raise Skip("takes five minutes on a GPU; the CPU has its own preset")
        code = subprocess.run(command, cwd=ROOT, env=told).returncode
        for file in sorted((Path(folder) / "report").glob("*.json")):
            report.note(**{file.stem: json.loads(file.read_text())})
    report.key = f"{len(report.figures)} stages"
    report.check("exit code of speedrun.sh", code, 0)
