"""The sections of `dev/gpu.py`, in the order in which they run.

They are ordered by importance, because the GPU may be taken away at any moment. The two
ceilings take seconds, and every speed is a share of them. A wrong model or a wrong compiled
step makes every later number worthless, so these come next. Then come the two numbers that
cannot be known without a GPU, training and decoding speed; then everything else that must be
right; then the explanations of the speed; and finally what one machine can show about many.
"""

import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Section(NamedTuple):
    "A section: where its function is, and what the runner must know about it."

    home: str  # "module:function" of this package
    what: str  # one line for --list
    seconds: int  # estimated duration on an H100; not started if less time is left
    limit: int  # seconds after which it is killed
    right: bool = False  # whether its failure makes the exit code 1
    asked: bool = False  # runs only if --only names it


SECTIONS = {
    "bandwidth": Section(
        "speed:bandwidth", "the two ceilings: bf16 products and copies", 6, 60
    ),
    "model": Section(
        "right:model", "logits, loss and gradients: CPU, card, bf16", 15, 90, True
    ),
    "compile": Section(
        "right:compiled", "compiled = eager, gradients included", 30, 120, True
    ),
    "training": Section(
        "speed:training", "tokens per second and memory at depth 20", 75, 280
    ),
    "decoding": Section(
        "generation:decoding", "tokens per second of generation, depth 20", 55, 120
    ),
    "attention": Section(
        "attention:attention", "every attention kernel against the twin", 15, 90, True
    ),
    "decode_right": Section(
        "generation:decode_right", "cached decoding = full forward", 10, 90, True
    ),
    "optimizer": Section(
        "optimizing:optimizer", "Muon's iteration in bf16, and AdamW", 20, 90, True
    ),
    "head": Section("right:head", "the chunked loss in bf16", 6, 60, True),
    "syncs": Section(
        "waiting:syncs", "no hidden waits; copies that overlap", 12, 60, True
    ),
    "checkpoint": Section(
        "recovery:checkpoint", "written on the card, continued anywhere", 10, 90, True
    ),
    "resume": Section(
        "recovery:resume", "resume after kill -9 = uninterrupted", 20, 90, True
    ),
    "same_training": Section(
        "pipeline:same_training", "the CPU preset's run, on the card", 45, 180, True
    ),
    "fp8": Section("speed:fp8", "fp8 against bf16: speed and bits per byte", 50, 300),
    "profile": Section("speed:profile", "where the time of a step goes", 30, 120),
    "nccl": Section(
        "many:nccl", "NCCL with one rank, and rank 0 of 8 on this card", 25, 120
    ),
    "training_32": Section(
        "speed:training_32", "depth 20 again, with 32 rows at a time", 70, 280
    ),
    "levers": Section("speed:levers", "each lever of training speed alone", 60, 400),
    "lab": Section(
        "pipeline:lab",
        "speedrun.sh --preset gpu-lab, five minutes",
        360,
        900,
        asked=True,
    ),
}


def all_sections() -> dict[str, Section]:
    "Return the sections, including those of the file in GPU_EXTRA_SECTIONS (for tests)."
    extra = os.environ.get("GPU_EXTRA_SECTIONS")
    return SECTIONS | (load_file(extra).SECTIONS if extra else {})


def load_file(path: str) -> Any:
    "Import a Python file that is not part of a package."
    spec = importlib.util.spec_from_file_location("extra_sections", path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_function(name: str) -> Callable:  # function(scale, report)
    "Import the function of a section."
    home = "card:device" if name == "device" else all_sections()[name].home
    if callable(home):
        return home
    module, function = home.split(":")
    return getattr(import_module(f"gpu_sections.{module}"), function)
