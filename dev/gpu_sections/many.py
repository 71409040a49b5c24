"""What one GPU can show about many: NCCL with one rank, and the memory of rank 0 of 8."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_sections.tools import (
    GIB,
    Report,
    Scale,
    depth_20,
    large_model,
    names,
    peak_of,
    random_batch,
    random_ids,
    require_bf16,
    require_memory,
    seconds_of,
    watched,
    worst,
)
from nanochat.accounting import training_memory
from nanochat.adamw import all_gather, reduce_scatter
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import setup_optimizer
from nanochat.train import accumulate

WORLD = 8
NVLINK = 450e9  # bytes per second that an H100 SXM can send to the others (data sheet)


def nccl(scale: Scale, report: Report) -> None:
    "Take a step under torchrun with NCCL, then as rank 0 of 8 without the others."
    with tempfile.TemporaryDirectory() as folder:
        # Start this file with torchrun, as on eight GPUs.
        out = Path(folder) / "rank.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # Without an address, torchrun looks up the host name, which may not resolve.
        command += ["--local-addr=127.0.0.1", "--nproc_per_node=1"]
        command += [__file__, str(out), str(int(scale.tiny))]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr, flush=True)  # for the log
        if not out.exists():
            said = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError((said or ["torchrun said nothing"])[0])
        found = json.loads(out.read_text())
    report.kernels = found.pop("kernels")
    report.note(**found)
    report.check("weights, away from a step without a group", found["differ"], 1e-4)
    counted = collectives(scale, report)
    rank_of_eight(scale, report)
    report.key = f"{found['backend']}; rank 0 of {WORLD}: peak "
    report.key += f"{report.figures['peak_bytes'] / GIB:.1f} GiB of "
    report.key += f"{report.figures['counted_bytes'] / GIB:.1f} counted, "
    report.key += f"collectives {1000 * counted:.0f} ms a step if nothing overlapped"


# ---- NCCL with one rank


def small_step(device: torch.device) -> dict[str, torch.Tensor]:  # weights
    "Take one optimizer step of a small model."
    model = GPT(GPTConfig(64, 512, 2, 2, 2, 128)).to(device)
    model.init_weights(0)
    optimizer = setup_optimizer(model)
    ids = random_ids(model.config, 4, 65).to(device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    accumulate(model, [batch, batch])
    optimizer.step(1.0, 0.9, clip=1.0)
    return model.state_dict()


def be_rank(out: Path, scale: Scale) -> None:
    "Run as the single rank that torchrun starts."
    device = scale.device
    # Muon in bf16 would magnify differences in the order of sums.
    torch.use_deterministic_algorithms(True, warn_only=True)
    alone = small_step(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend)
    together = small_step(device)
    found = {"backend": backend, "world_size": dist.get_world_size()}
    found["differ"] = worst(together, alone)
    full = torch.randn(scale.pick(2**26, 2**12), device=device)
    part = torch.empty_like(full)
    ways = {
        "reduce_scatter": lambda: reduce_scatter(part, full).wait(),
        "all_gather": lambda: all_gather(part, full).wait(),
        "all_reduce": lambda: dist.all_reduce(full),
    }
    found["collective_bytes"] = full.nbytes
    found["seconds"] = {n: seconds_of(f, scale, 5, 2) for n, f in ways.items()}
    spent = watched(lambda: [f() for f in ways.values()], scale)
    found["kernels"] = names(spent, 6)
    out.write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- Rank 0 of 8


def collectives(scale: Scale, report: Report) -> float:  # seconds of a step
    "Count the bytes a rank sends per step, and how long that takes on NVLink."
    from nanochat.config import BaseConfig
    from nanochat.dry_run import walk

    sizes: dict[str, Any] = dict(depth=20, device_batch_size=16)
    if scale.tiny:
        sizes = dict(depth=1, device_batch_size=1, max_seq_len=64)
        sizes |= dict(total_batch_size=64 * 2 * WORLD)
    found = walk(BaseConfig(**sizes, world=WORLD), scale.pick(65_536, 512))
    rows = {}
    total = 0.0
    for name, (calls, moved) in found["collectives"].items():
        # A ring sends all but a rank's own share; an all-reduce goes around twice.
        sent = moved * (WORLD - 1) / WORLD * (2 if name == "allreduce" else 1)
        rows[name] = {"calls": calls, "bytes": moved, "sent": sent}
        total += sent
    report.note(collectives=rows, sent_bytes=total, nvlink_seconds=total / NVLINK)
    return total / NVLINK


def rank_of_eight(scale: Scale, report: Report) -> None:
    "Take a step as rank 0 of a fake group of 8, which uses the same memory as a real one."
    from torch.testing._internal.distributed.fake_pg import FakeStore

    require_bf16(scale)
    config = depth_20(scale)
    rows = scale.pick(16, 2)
    counted = training_memory(config, rows, 2, WORLD, micro_batches=2)["total"]
    require_memory(scale, counted, f"rank 0 of {WORLD} at depth 20")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        model = large_model(config, scale)
        optimizer = setup_optimizer(model)
        batch = random_batch(config, rows, scale)

        def step() -> None:
            accumulate(model, [batch, batch])
            optimizer.step(1.0, 0.95)
            optimizer.zero_grad()

        step()  # creates the optimizer's state
        report.note(peak_bytes=peak_of(step, scale), counted_bytes=counted)
    finally:
        dist.destroy_process_group()
    off = abs(report.figures["peak_bytes"] / counted - 1)
    report.goal(f"peak of rank 0 of {WORLD}, away from the count", off, 0.05, most=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    be_rank(Path(sys.argv[1]), Scale(tiny=sys.argv[2] == "1"))
