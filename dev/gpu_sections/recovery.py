"""Check checkpoints written on the GPU, and runs killed there."""

import os
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_sections.tools import (
    Report,
    Scale,
    error,
    exact_products,
    random_batch,
)
from nanochat.config import OptimConfig
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Optimizers, setup_optimizer
from nanochat.train import accumulate

EXACT = OptimConfig(matrix_dtype="float32")  # the same on every device


def fresh(scale: Scale, device: torch.device, dtype: torch.dtype) -> tuple:
    "Build a small model and its optimizer, as at the start of a run."
    width = scale.pick(256, 32)
    config = GPTConfig(scale.pick(128, 32), 512, 2, 4, 2, width, value_embeds=True)
    model = GPT(config, dtype).to(device)
    model.init_weights(0)
    return model, setup_optimizer(model, EXACT)


def steps(model: GPT, optimizer: Optimizers, numbers: range, scale: Scale) -> None:
    "Take the optimizer steps with these numbers, each with its own random batch."
    for number in numbers:
        batch = random_batch(model.config, 4, scale, seed=number)
        batch.inputs = batch.inputs.to(model.get_device())
        batch.targets = batch.targets.to(model.get_device())
        accumulate(model, [batch])
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()


def moved(model: GPT, start: dict[str, Tensor]) -> Tensor:
    "Return how far training has moved the weights."
    weights = model.state_dict().items()
    return torch.cat([(w.cpu() - start[n]).flatten() for n, w in weights])


def checkpoint(scale: Scale, report: Report) -> None:
    "Resume a checkpoint of the GPU on the GPU and on the CPU; all must agree."
    from nanochat import checkpoint

    with tempfile.TemporaryDirectory() as name, exact_products():
        folder = Path(name)
        cpu = torch.device("cpu")
        model, optimizer = fresh(scale, scale.device, torch.float32)
        start = {n: w.cpu().clone() for n, w in model.state_dict().items()}
        steps(model, optimizer, range(3), scale)
        path = checkpoint.save(folder, 3, model, optimizer, {"0": {"at": 3}})
        checkpoint.read_meta(path)  # verifies every hash
        steps(model, optimizer, range(3, 6), scale)
        wanted = moved(model, start)
        for place, device in {"card": scale.device, "CPU": cpu}.items():
            again, resumed = fresh(scale, device, torch.float32)
            cursors = checkpoint.load_training_state(path, again, resumed)
            report.check(f"{place}: cursors", cursors != {"0": {"at": 3}}, 0)
            steps(again, resumed, range(3, 6), scale)
            # Muon amplifies the smallest singular values, and so rounding errors too.
            bound = 1e-3 if place == "card" else 1e-2
            found = error(moved(again, start), wanted)
            report.check(f"continued on the {place}: weights", found, bound)
    report.key = f"continued on the CPU: {found:.1e} away"


# ---- kill -9

LAST, EVERY = 12, 3  # steps of the run, steps between checkpoints


def be_killed(folder: Path, scale: Scale) -> None:
    "Run training that saves every few steps and resumes from the last checkpoint."
    from nanochat import checkpoint

    checkpoint.use_deterministic()
    model, optimizer = fresh(scale, scale.device, torch.bfloat16)
    done = max(checkpoint.list_steps(folder), default=0)
    if done:
        path = folder / f"step_{done:06d}"
        checkpoint.load_training_state(path, model, optimizer)
    for step in range(done, LAST):
        steps(model, optimizer, range(step, step + 1), scale)
        if (step + 1) % EVERY == 0:
            checkpoint.save(folder, step + 1, model, optimizer)
            time.sleep(0.2)  # leave time for the kill


def start(folder: Path, scale: Scale):  # a process
    "Start a run in a fork; this process has not used the GPU."
    folder.mkdir(exist_ok=True)
    method = os.environ.get("GPU_START", "fork")
    context: Any = get_context(method)
    process = context.Process(target=be_killed, args=(folder, scale))
    process.start()
    return process


def resume(scale: Scale, report: Report) -> None:
    "Kill a run after its second checkpoint, resume it, and compare with one left alone."
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "alone"
        killed = Path(name) / "killed"
        whole, victim = start(alone, scale), start(killed, scale)
        mark = killed / f"step_{2 * EVERY:06d}"
        # The marker appears when a checkpoint is complete; the next steps are lost.
        while victim.is_alive() and not mark.is_dir():
            time.sleep(0.005)
        victim.kill()
        victim.join()
        report.check("the run had ended before the kill", victim.exitcode == 0, 0)
        again = start(killed, scale)
        for process in (whole, again):
            process.join()
            report.check("exit code of a run", process.exitcode, 0)
        if all(check["ok"] for check in report.checks):
            compare_runs(alone, killed, report)


def compare_runs(alone: Path, killed: Path, report: Report) -> None:
    "Compare the last checkpoints bit for bit, since deterministic kernels were used."
    differ, worst = 0, 0.0
    for file in sorted((alone / f"step_{LAST:06d}").glob("*.safetensors")):
        wanted = load_file(file)
        found = load_file(killed / file.parent.name / file.name)
        for name, value in wanted.items():
            differ += not torch.equal(value, found[name])
            worst = max(worst, error(found[name], value))
    report.note(largest_error=worst)
    report.check("tensors that differ", differ, 0)
    report.key = "bit for bit" if not differ else f"within {worst:.1e}"
