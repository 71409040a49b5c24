"""Run a function as the ranks of a group, in processes that have PyTorch imported already."""

import multiprocessing
import os
import sys
from collections.abc import Callable

import torch.multiprocessing as mp

# What a rank needs; a spawned process would import it for two seconds, every time.
PRELOADED = ["torch", "torch.distributed", "nanochat.stage", "nanochat.rl"]


def run_on_ranks(
    function: Callable[..., None],  # called with the rank, then the arguments
    arguments: tuple,
    ranks: int,  # number of processes
) -> None:
    "Call a function on every rank; the first error of a rank is raised here."
    if sys.platform == "win32":
        mp.spawn(function, arguments, nprocs=ranks)
        return
    # All ranks are forks of one clean process without threads, which has the environment
    # of its first day; so they are told the present one.
    multiprocessing.set_forkserver_preload(PRELOADED)
    told = (dict(os.environ), function, arguments)
    mp.start_processes(in_environment, told, nprocs=ranks, start_method="forkserver")


def in_environment(
    rank: int, environment: dict[str, str], function: Callable, arguments: tuple
) -> None:
    "Call a rank's function in the environment of the test."
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *arguments)
