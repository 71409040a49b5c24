"""Sections for dev/gpu.py that go wrong in every way, and one that does not."""

import os
import signal
import subprocess
import sys
import time

from gpu_sections import Section


def crash(scale, report):
    report.check("before the crash", 1, 2)
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(scale, report):
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    report.note(child=subprocess.Popen(child).pid)
    time.sleep(600)


def fail(scale, report):
    raise RuntimeError("this and that\nis broken")


def memory(scale, report):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")


def wrong(scale, report):
    report.check("fine", 1, 2)
    report.check("not a number", float("nan"), 1)
    report.check("too large", 3, 2)


def skip(scale, report):
    from gpu_sections.tools import Skip

    raise Skip("no reason")


def package(scale, report):
    import no_such_package  # noqa: F401


def fine(scale, report):
    report.goal("speed", 1, 2)
    report.kernels = ["gemm"]
    report.key = "all is well"
    report.note(tokens_per_second=1.5, odd=float("inf"))


def entry(function, limit: int = 60, right: bool = True) -> Section:
    return Section(function, function.__name__, 1, limit, right)


SECTIONS = {f.__name__: entry(f) for f in (crash, fail, memory, wrong, skip, package)}
SECTIONS |= {"hang": entry(hang, limit=4), "fine": entry(fine)}
SECTIONS |= {"slow": entry(fail, right=False)}
