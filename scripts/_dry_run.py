"""Walk one optimizer step of rank 0 of many, without data, memory or other processes."""

import torch
import torch.distributed as dist
from rich.console import Console
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.accounting import training_memory
from nanochat.common import UserError, compute_dtype
from nanochat.dataloader import Batch
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT
from nanochat.optim import setup_optimizer
from nanochat.plan import BaseConfig, base_plan
from nanochat.train import accumulate
from scripts._stage import optim_config


def tensors_of(values):
    "Find the tensors in the arguments of an operator."
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def size(tensors) -> int:  # bytes
    return sum(t.numel() * t.element_size() for t in tensors)


def stand_in(value):  # an argument of an operator
    "Put an empty CPU tensor in the place of every tensor."
    if isinstance(value, torch.Tensor):
        return torch.empty(0)
    if isinstance(value, (list, tuple)):
        return [stand_in(item) for item in value]
    return value


class Collectives(TorchDispatchMode):
    "Count calls and bytes of everything that is sent to other ranks."

    def __init__(self):
        super().__init__()
        self.seen = {}  # operator -> [calls, bytes of the larger side]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            calls, moved = self.seen.get(name, (0, 0))
            largest = max((size([t]) for t in tensors_of(args)), default=0)
            self.seen[name] = calls + 1, moved + largest
            # Old versions of torch have no meta kernel for these. The fake group reads
            # no tensor, so it may be handed any.
            args = [stand_in(argument) for argument in args]
        return func(*args, **(kwargs or {}))


def walk(config: BaseConfig, vocab_size: int) -> dict:
    "Take a step as rank 0 of `config.world`; return sizes in bytes and collectives."
    world = config.world
    if dist.is_initialized():
        raise UserError("a dry run stands for all ranks: start it without torchrun")
    dtype = compute_dtype(torch.device("meta"), config.dtype or "bfloat16")
    plan = base_plan(config, vocab_size, world, dtype.itemsize, device_type="cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with torch.device("meta"):
            model = GPT(plan.model, dtype)
        if config.fp8:
            use_fp8(model)
        optimizer = setup_optimizer(model, optim_config(config))
        shape = config.device_batch_size, config.max_seq_len
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        share = plan.micro_batches // world
        with Collectives() as collectives:
            accumulate(model, [Batch(ids, ids, s, None) for s in range(share)])
            gradients = size(p.grad for p in model.parameters())
            optimizer.step(1.0, 0.95, config.grad_clip)
    finally:
        dist.destroy_process_group()
    states = [s for part in optimizer.parts.values() for s in part.state.values()]
    sizes = config.device_batch_size, dtype.itemsize, world, share
    return {
        "plan": plan,
        "planned": training_memory(plan.model, *sizes, device_type="cuda"),
        "micro_batches": share,
        "weights": size(model.parameters()),
        "gradients": gradients,
        "optimizer": sum(size(tensors_of(s.values())) for s in states),
        "collectives": collectives.seen,
    }


def dry_run(config: BaseConfig, vocab_size: int) -> None:
    "Print what rank 0 holds and sends in one step."
    found, gib = walk(config, vocab_size), 2**30
    plan, told, world = found["plan"], found["planned"], config.world
    show = Console(highlight=False, soft_wrap=True).print
    show(
        f"rank 0 of {world}: {found['micro_batches']} x {config.device_batch_size} rows "
        f"of {config.max_seq_len} tokens, then one update of {plan.parameters:,} parameters"
    )
    for part in ("weights", "gradients", "optimizer"):
        show(
            f"{part:11s} {found[part] / gib:7.2f} GiB held, {told[part] / gib:.2f} planned"
        )
    show(f"peak        {told['total'] / gib:7.2f} GiB planned, activations included")
    for name, (calls, moved) in found["collectives"].items():
        sent = moved * (world - 1) / world * (2 if name == "allreduce" else 1)
        show(
            f"{name:20s} {calls:3d} calls, {moved / gib:6.2f} GiB, of which a ring "
            f"sends {sent / gib:.2f} from each rank"
        )
    show("a dry run computes nothing and measures no time")
