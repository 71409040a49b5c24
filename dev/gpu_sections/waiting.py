"""Check a step for hidden synchronizations, and that copies overlap with computation."""

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from gpu_sections.tools import (
    Report,
    Scale,
    depth_20,
    large_model,
    names,
    random_ids,
    require_bf16,
    wait,
)
from nanochat.dataloader import Batch, prefetch, to_device
from nanochat.gpt import GPT
from nanochat.optim import Optimizers, setup_optimizer
from nanochat.train import accumulate


def alarm(scale: Scale, mode: str) -> None:
    "Set how PyTorch reports every wait for the GPU: default, warn or error."
    if scale.device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def stream(model: GPT, scale: Scale) -> Iterator[Batch]:
    "Yield batches forever, copied to the device as by the loader."
    config, number = model.config, 0
    while True:
        number += 1
        ids = random_ids(config, scale.pick(8, 2), config.sequence_len + 1, number)
        rows = to_device(ids, scale.device)
        yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def step(model: GPT, optimizer: Optimizers, batches, scale: Scale, mode: str) -> None:
    "Take a step as in the loop; only the one read of loss and norm may wait."
    alarm(scale, mode)
    try:
        micro = [next(batches) for _ in range(2)]
        loss = accumulate(model, micro)
        norm = optimizer.grad_norm()
        alarm(scale, "default")
        torch.stack([loss, norm]).tolist()
        alarm(scale, mode)
        optimizer.step(1.0, 0.95, clip=1.0)
        optimizer.zero_grad()
    finally:
        alarm(scale, "default")


def find_waits(take, report: Report) -> None:
    "Take steps with the alarm on, which must not go off, and check that it works."
    # "warn" reports every place; "error" stops reliably at the first.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        take("warn")
    waits = []
    for warning in told:
        if "called a synchronizing" in str(warning.message):
            waits.append(f"{Path(warning.filename).name}:{warning.lineno}")
    report.note(waits=waits)
    report.check("waits in the step", len(waits), 0)

    try:
        take("error")
        report.check("an operation that waits", 0, 0)
    except RuntimeError as complaint:
        report.note(complaint=str(complaint))
        report.check("an operation that waits", 1, 0)


def syncs(scale: Scale, report: Report) -> None:
    "Take steps with the alarm on, then look for copies that overlap with kernels."
    require_bf16(scale)
    model = large_model(depth_20(scale, 4), scale)
    optimizer = setup_optimizer(model)
    batches = prefetch(stream(model, scale))

    def take(mode: str) -> None:
        step(model, optimizer, batches, scale, mode)

    for _ in range(2):  # the first steps allocate memory, which waits
        take("default")
    find_waits(take, report)

    events = trace(lambda: take("default"), scale)
    copies, beside = overlap(events)
    report.note(copies=copies, copies_beside_kernels=beside)
    report.kernels = names({e["name"] for e in events if e.get("cat") == "gpu_memcpy"})
    if scale.device.type == "cuda":
        report.check(
            "share of copies beside no kernel", 1 - beside / (copies or 1), 0.5
        )
        report.key = f"no waits; {beside} of {copies} copies run beside kernels"
    else:
        report.key = "no CUDA: no alarm and no copies to see"


def trace(f, scale: Scale, times: int = 5) -> list[dict]:
    "Return the events of some steps."
    cuda = scale.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as watch:
        for _ in range(scale.pick(times, 1)):
            f()
        wait(scale)
    with tempfile.TemporaryDirectory() as folder:
        watch.export_chrome_trace(f"{folder}/trace.json")
        return json.loads(Path(folder, "trace.json").read_text())["traceEvents"]


def overlap(
    events: list[dict],
) -> tuple[int, int]:  # copies to the GPU; those that overlap with kernels
    "Count the copies that overlap with a kernel of another stream."
    kernels = [e for e in events if e.get("cat") == "kernel"]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e["name"]]
    copies = [e for e in copies if "Pinned" in e["name"]]

    beside = 0
    for copy in copies:
        if any(together(copy, kernel) for kernel in kernels):
            beside += 1
    return len(copies), beside


def together(a: dict, b: dict) -> bool:
    "Return whether two events of different streams overlap in time."
    if a["args"].get("stream") == b["args"].get("stream"):
        return False
    return a["ts"] < b["ts"] + b["dur"] and b["ts"] < a["ts"] + a["dur"]
