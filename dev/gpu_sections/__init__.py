"""What `dev/gpu.py` can measure: one entry for each section, in the order in which they run.

The order is the order of what is worth knowing when the card may be taken away at any moment.
The two ceilings take seconds and everything fast is a share of them. A wrong model or a wrong
compiled step makes every later number worthless, so they come next. Then the two numbers that
nobody can know without a card, training and decoding. Then what else must be right, since a
mistake there costs a run rather than an hour; then the explanations of the speed, and at last
what one machine can show about many.
"""

import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Section(NamedTuple):
    "Where a section's function is, and what the runner must know about it."

    home: str  # "module:function" of this package
    what: str  # one line for --list
    seconds: int  # that it takes on an H100, by estimate; not started with less left
    limit: int  # seconds after which it is ended
    right: bool = False  # the exit code is 1 if it goes wrong
    asked: bool = False  # runs only where --only names it


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
    "Return the sections, with those of a file that a test names in GPU_EXTRA_SECTIONS."
    extra = os.environ.get("GPU_EXTRA_SECTIONS")
    return SECTIONS | (load_file(extra).SECTIONS if extra else {})


def load_file(path: str) -> Any:
    "Import a Python file that no package holds."
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
