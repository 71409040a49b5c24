"""Memory of a piece of code, as the profiler sees it."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(f) -> int:
    "Most bytes that were allocated at one time while f ran, beyond those before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        f()
    events = [
        e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(torch.tensor(sizes).cumsum(0).max())
