"""Share one training step among 1, 2, 4 and 8 processes and measure what that changes.

    python dev/ranks.py

A small GPT (one key-value head, a vocabulary not divisible by any number of ranks, three
layers, a few scalars) reads the same batches of the embedded corpus on every number of
ranks. The script measures the largest difference between a weight and its value with one
rank, the bytes of optimizer state on each rank, the bytes that each rank sends per step
(in a ring), and the time of a step, which says little if there are more processes than
cores. Writes dev/records/ranks.json in about a minute.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.common import environment
from nanochat.config import OptimConfig
from nanochat.dataset import iter_documents
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import Muon
from nanochat.optim import setup_optimizer

ROWS = 8  # per step, over all ranks
T = 32  # context
V = 251  # vocabulary: the bytes below it
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def build(padding: int, dtype: torch.dtype) -> GPT:
    "Build the same model in every process, with the vocabulary padded to `padding`."
    shape: dict[str, Any] = dict(
        n_layer=3, n_head=4, n_kv_head=1, n_embd=32, stream_scalars=True
    )
    config = GPTConfig(T, V, pad_vocab_to=padding, **shape)
    model = GPT(config, dtype)
    model.init_weights(0)
    return model.to(dtype)


def read_rows(steps: int) -> torch.Tensor:  # (steps, ROWS, T + 1) bytes of text
    "Cut the embedded corpus into the rows of all steps."
    need = steps * ROWS * (T + 1)
    text = b""
    for document, _ in islice(iter_documents("train"), 200):
        text += bytes(b for b in document.encode() if b < V)
        if len(text) >= need:
            break
    return torch.tensor(list(text[:need])).view(steps, ROWS, T + 1)


class Meter:
    "Count the bytes that this rank would send in a ring, for each collective."

    def __init__(self):
        self.sent = 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        names = {"reduce_scatter_single": 1, "reduce_scatter_tensor": 1}
        names |= {"all_gather_single": 0, "all_gather_into_tensor": 0, "all_reduce": 0}
        for name, which in names.items():
            if hasattr(dist, name):
                rounds = 2 if name == "all_reduce" else 1
                self.wrap(name, which, rounds * (world - 1) / world)

    def wrap(self, name: str, which: int, share: float) -> None:
        call = getattr(dist, name)

        def counted(*args, **kwargs):
            self.sent += round(args[which].nbytes * share)
            return call(*args, **kwargs)

        setattr(dist, name, counted)


def train(model, optimizer, steps: int, rank: int, world: int) -> dict[str, Any]:
    "Take all steps on this rank's rows; return its losses and seconds."
    losses = []
    times = []
    for rows in read_rows(steps):
        begun = time.perf_counter()
        mine = rows[rank::world]
        loss = model(mine[:, :-1], mine[:, 1:], loss_reduction="sum") / (ROWS * T)
        loss.backward()
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
        losses.append(loss.item())
    return {"loss": losses, "seconds": times}


def run(rank: int, world: int, folder: str, case: tuple[int, int, str]) -> None:
    "Run as one rank: train, and write the measurements."
    steps, padding, dtype = case
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = build(padding, DTYPES[dtype])
    meter = Meter()
    optimizer = setup_optimizer(model, OptimConfig(matrix_beta2=0.95))
    record = train(model, optimizer, steps, rank, world)

    # Bytes of state on this rank, and bytes sent per step.
    state = {k: v for k, v in optimizer.state_dict().items() if k[:4] != "meta"}
    muon = optimizer.parts["muon"]
    assert isinstance(muon, Muon), "the optimizer of the matrices"
    record |= {
        "state": sum(v.nbytes for v in state.values()),
        "sent": meter.sent // steps,
        "matrices": sum(owner == rank for owner in muon.owners().values()),
        "weights": model.state_dict(),
    }
    torch.save(record, f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure(worlds: list[int], steps: int, padding: int, dtype: str) -> list[dict]:
    "Train on each number of ranks and compare with the first."
    setup_optimizer(
        build(padding, DTYPES[dtype])
    ).step()  # imports everything once, for all forks
    found = []
    first: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            given = (world, folder, (steps, padding, dtype))
            mp.start_processes(run, given, nprocs=world, start_method="fork")
            ranks = [torch.load(f"{folder}/{world}_{r}.pt") for r in range(world)]
            first = first or ranks[0]["weights"]
            found.append(compare(ranks, first))
    return found


def compare(ranks: list[dict], first: dict[str, torch.Tensor]) -> dict:
    "Summarize the ranks' measurements, comparing weights with those of the first run."
    weights = ranks[0]["weights"]
    alike = []
    for rank in ranks:
        alike += [torch.equal(rank["weights"][k], v) for k, v in weights.items()]
    away = [(v - first[k]).abs().max().item() for k, v in weights.items()]

    # Each rank has the loss of its own rows, so average over ranks.
    losses = [rank["loss"] for rank in ranks]
    curve = [sum(step) for step in zip(*losses)]
    return {
        "ranks": len(ranks),
        "largest_difference": max(away),
        "ranks_agree_bit_for_bit": all(alike),
        "loss": [round(curve[0], 4), round(curve[-1], 4)],
        "state_bytes": [rank["state"] for rank in ranks],
        "matrices": [rank["matrices"] for rank in ranks],
        "sent_bytes_a_step": max(rank["sent"] for rank in ranks),
        "seconds_a_step": round(median(ranks[0]["seconds"]), 4),
    }


def show(rows: list[dict]) -> None:
    "Print the table."
    print("ranks  difference  state per rank, KB  sent per step, KB  ms per step")
    for row in rows:
        low = min(row["state_bytes"]) / 1e3
        high = max(row["state_bytes"]) / 1e3
        print(
            f"{row['ranks']:5}  {row['largest_difference']:10.1e}  "
            f"{low:8.1f} to {high:6.1f}  {row['sent_bytes_a_step'] / 1e3:15.1f}  "
            f"{1e3 * row['seconds_a_step']:9.1f}"
        )


def main() -> None:
    "Measure, print the table and save the record."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--padding",
        type=int,
        default=64,
        help="multiple to which the vocabulary is padded",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float64")
    record = ROOT / "dev" / "records" / "ranks.json"
    parser.add_argument("--out", type=Path, default=record)
    options = parser.parse_args()
    worlds = [int(world) for world in options.ranks.split(",")]
    rows = measure(worlds, options.steps, options.padding, options.dtype)
    show(rows)

    # Only to count its parameters; the ranks built their own.
    model = build(options.padding, torch.float32)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python dev/ranks.py",
        "environment": environment(),
        "parameters": model.num_params(),
        "config": {"vocab_size": V, "padding": options.padding, "dtype": options.dtype},
        "steps": options.steps,
        "runs": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
