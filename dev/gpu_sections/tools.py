"""Tools shared by the sections: sizes, reports, errors, timing, models with random weights."""

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from nanochat.common import write_atomic
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.gpus import GPUS, Gpu, find_gpu
from nanochat.plan import model_config

GIB = 2**30


class Skip(Exception):
    "A section cannot run here; the message says why, in one line."


@dataclass(frozen=True)
class Scale:
    "The sizes of everything: as on a GPU, or small enough for a CPU."

    tiny: bool = False
    seconds: float = math.inf  # time limit of the section
    begun: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        "Return the seconds left until the section is killed."
        return self.begun + self.seconds - time.monotonic()

    def pick(self, full, tiny):
        "Choose between the size for a GPU and the one for a CPU."
        return tiny if self.tiny else full

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def backend(self) -> str:
        "Return the backend of torch.compile; the CPU's is fast and needs no C++ compiler."
        return self.pick("inductor", "eager")


@dataclass
class Report:
    "The results of a section, written to a file after every line to survive a crash."

    path: Path
    status: str = "failed"  # until the section has finished
    why: str = ""
    key: str = ""  # the figure for the table
    kernels: list[str] = field(default_factory=list)
    checks: list[dict] = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    def write(self) -> None:
        facts = {k: v for k, v in vars(self).items() if k != "path"}
        write_atomic(self.path, json.dumps(plain(facts)))

    def check(self, name: str, value: float, bound: float) -> bool:  # value <= bound
        "Compare an error with its bound; NaN counts as wrong."
        value, bound = float(value), float(bound)
        ok = value <= bound
        self.checks.append({"name": name, "value": value, "bound": bound, "ok": ok})
        self.write()
        return ok

    def goal(self, name: str, value: float, goal: float, most: bool = False) -> None:
        "Record a goal, a minimum or (with `most`) a maximum; missing it is not an error."
        met = value <= goal if most else value >= goal
        row = {"name": name, "value": float(value), "goal": goal, "met": bool(met)}
        self.figures.setdefault("goals", []).append(row)
        self.write()

    def note(self, **figures) -> None:
        "Record figures."
        self.figures.update(figures)
        self.write()


def plain(value):
    "Convert nested results to JSON; numbers that are not finite become null."
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


# ---- What this GPU has


def this_gpu() -> tuple[str | None, Gpu | None]:  # key of GPUS, entry
    "Recognize the GPU, if it is in the plan's table."
    gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return next((key for key, g in GPUS.items() if g is gpu), None), gpu


def require_bf16(scale: Scale) -> None:
    "Skip on GPUs older than Ampere."
    if not scale.tiny and torch.cuda.get_device_capability()[0] < 8:
        raise Skip(f"{torch.cuda.get_device_name()} has no bfloat16")


def free_bytes(scale: Scale) -> int:
    "Return the available memory of a GPU; a CPU is not checked."
    return torch.cuda.mem_get_info()[0] if scale.device.type == "cuda" else 2**60


def require_memory(scale: Scale, needed: float, what: str) -> None:  # bytes
    "Skip a measurement that would not fit, before it fails halfway."
    free = free_bytes(scale)
    if needed > 0.97 * free:
        raise Skip(
            f"{what} needs {needed / GIB:.1f} GiB, but {free / GIB:.1f} are free"
        )


# ---- Errors


def error(found: Tensor, wanted: Tensor) -> float:  # |found - wanted| / |wanted|
    "Return the relative error of a result; NaN stays NaN."
    found, wanted = (x.detach().double().cpu() for x in (found, wanted))
    size = wanted.norm().item()
    return (found - wanted).norm().item() / (size or 1.0)


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    "Return the largest error of any gradient; a NaN or a missing one counts as infinite."
    if found.keys() != wanted.keys():
        return math.inf
    errors = [error(found[name], wanted[name]) for name in wanted]
    return max(math.inf if math.isnan(e) else e for e in errors)


def gradients(model) -> dict[str, Tensor]:
    "Copy a model's gradients, and clear them in the model."
    named = {n.removeprefix("_orig_mod."): p for n, p in model.named_parameters()}
    found = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    for p in named.values():
        p.grad = None
    return found


# ---- Models and batches


def random_model(
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,  # dtype of the activations
    seed: int = 0,
) -> GPT:
    "Build a model without zero weights, drawn on the CPU to be the same everywhere."
    model = GPT(config, dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = p.ndim < 2 or "wte" in name or "value_embeds" in name
            p.normal_(std=1.0 if wide else p.size(1) ** -0.5, generator=g)
            if p.ndim < 2:
                p.copy_(1 + 0.1 * p)
    return model.to(device)


def large_model(config: GPTConfig, scale: Scale) -> GPT:
    "Build a bf16 model on its device, with a run's initial weights."
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
    model = model.to_empty(device=scale.device)
    model.init_weights(0)
    with torch.no_grad():  # zeros hide errors and may be faster than real numbers
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.01)
    return model


def depth_20(scale: Scale, layers: int = 20) -> GPTConfig:
    "Return the model of all published figures, or some of its layers."
    if scale.tiny:
        return GPTConfig(64, 512, n_layer=1, n_head=2, n_kv_head=2, n_embd=64)
    whole = model_config(20, 65_536, 2048)
    return GPTConfig(**{**vars(whole), "n_layer": layers})


def random_ids(config: GPTConfig, rows: int, length: int, seed: int = 1) -> Tensor:
    "Draw token ids, (rows, length), on the CPU."
    g = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length), generator=g)


def random_batch(config: GPTConfig, rows: int, scale: Scale, seed: int = 1) -> Batch:
    "Draw a micro-batch, on the device."
    ids = random_ids(config, rows, config.sequence_len + 1, seed).to(scale.device)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


# ---- Clocks and profiles


def wait(scale: Scale) -> None:
    "Wait until the device has finished all its work."
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(f: Callable, scale: Scale, repeat: int = 10, warm: int = 3) -> float:
    "Return the median time of a call, from events on a GPU, from the clock on a CPU."
    for _ in range(warm):  # warm up: load modules, choose kernels, fill caches
        f()
    wait(scale)
    if scale.device.type != "cuda":
        return statistics.median(elapsed(f, scale) for _ in range(repeat))
    marks = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        marks.append((begin, end))
    wait(scale)
    return statistics.median(a.elapsed_time(b) for a, b in marks) / 1000


def elapsed(f: Callable, scale: Scale) -> float:
    "Return the wall-clock seconds of one call, including the device's work."
    wait(scale)
    begun = time.perf_counter()
    f()
    wait(scale)
    return time.perf_counter() - begun


def peak_of(f: Callable, scale: Scale) -> int:
    "Return the peak of allocated bytes while f runs, including earlier allocations."
    if scale.device.type != "cuda":
        f()
        return 0
    wait(scale)
    torch.cuda.reset_peak_memory_stats()
    f()
    wait(scale)
    return torch.cuda.max_memory_allocated()


def watched(f: Callable, scale: Scale) -> dict[str, float]:  # kernel -> seconds
    "Run f under the profiler; on a CPU, operators stand in for kernels."
    cuda = scale.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as watch:
        f()
        wait(scale)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in watch.key_averages() if e.device_type == wanted]
    # A named region, such as a compiled one, would count its kernels twice.
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    spent = {e.key: getattr(e, field) / 1e6 for e in events}
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def names(kernels: Iterable[str], most: int = 12) -> list[str]:
    "Shorten the names of the kernels that took longest."
    return [name[:110] for name in list(kernels)[:most]]


@contextmanager
def exact_products():
    "Disable tf32 for float32 products."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def clean(scale: Scale) -> None:
    "Free unreferenced memory, and discard compiled code."
    torch._dynamo.reset()
    gc.collect()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()


def require_crate() -> None:
    "Skip if the tokenizer is not available."
    import rustbpe

    # In a source tree without the compiled crate, its folder has the same name.
    if not hasattr(rustbpe, "Tokenizer"):
        raise Skip("needs our crate rustbpe: see CONTRIBUTING.md, On a GPU")
