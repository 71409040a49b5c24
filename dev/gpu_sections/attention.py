"""Compare every attention kernel that can run here with the readable one."""

from functools import partial

import torch
from torch import Tensor

from gpu_sections.tools import (
    Report,
    Scale,
    error,
    names,
    require_bf16,
    seconds_of,
    watched,
)
from nanochat.attention import KERNELS, attend, choose_kernel, kernel_works
from nanochat.common import UserError

BOUND = 1e-2  # largest error in bf16, forward and backward; its rounding alone is 2e-3


def cases(scale: Scale) -> dict[str, tuple[int, ...]]:
    "Return the shapes to try: rows, positions, heads, key-value heads, head size, window."
    T, D = scale.pick(1024, 32), scale.pick(128, 16)
    return {
        "plain": (2, T, 4, 4, D, 0),
        "grouped": (2, T, 4, 2, D, 0),
        "one key-value head": (2, T, 4, 1, D, 0),
        "window": (2, T, 4, 4, D, T // 4),
        "grouped, window": (2, T, 4, 2, D, T // 4 + 1),
        "odd length": (1, T - 3, 2, 2, D, 0),
        "small heads": (3, T // 2, 3, 3, D // 2, 0),
    }


def draw(shape: tuple[int, ...], scale: Scale) -> list[Tensor]:
    "Draw queries, keys, values and a gradient in bf16."
    B, T, H, kv, D, _ = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = [(B, T, heads, D) for heads in (H, kv, kv, H)]
    drawn = [torch.randn(size, generator=g) for size in sizes]
    return [x.to(scale.device, torch.bfloat16) for x in drawn]


def derive(inputs: list[Tensor], window: int, kernel: str) -> dict[str, Tensor]:
    "Return the output of a kernel and its three gradients."
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    y = attend(q, k, v, window=window, kernel=kernel)
    y.backward(inputs[3].to(y.dtype))
    found = {"output": y.detach()}
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert x.grad is not None, f"no {name}"
        found[name] = x.grad
    return found


def attention(scale: Scale, report: Report) -> None:
    "Compare all kernels, forward and backward, with the twin in fp32, and time each."
    require_bf16(scale)
    refused = {name: kernel_works(name, scale.device) for name in KERNELS}
    report.note(refused={k: why for k, why in refused.items() if why})

    # For each shape, the twin's result in fp32 is the reference.
    drawn = {}
    wanted = {}
    for case, shape in cases(scale).items():
        inputs = draw(shape, scale)
        window = shape[-1]
        drawn[case] = (inputs, window)
        wanted[case] = derive([x.float() for x in inputs], window, "twin")

    ran = []
    for name in (name for name, why in refused.items() if not why):
        served = [
            compare(name, case, drawn[case], wanted[case], report) for case in drawn
        ]
        if any(served):
            ran.append(name)
        if served[0] and name != "twin":  # the twin holds all scores in fp32
            time_kernel(name, scale, report)

    q, k, *_ = draw(timed_shape(scale), scale)
    chosen = choose_kernel(q, k, 0, masked=False, trains=True)
    report.note(ran=ran, chosen_for_training=chosen)
    report.key = f"{len(ran)} kernels right: {', '.join(ran)}"


def compare(
    name: str,  # the kernel's name
    case: str,
    inputs: tuple[list[Tensor], int],  # and the window
    wanted: dict[str, Tensor],
    report: Report,
) -> bool:  # whether it ran
    "Check one kernel on one shape; an explicit refusal is noted and not an error."
    (q, k, *_), window = inputs
    try:
        found = derive(*inputs, name)
    except UserError as refusal:
        report.note(**{f"{name}, {case}: refused": str(refusal)})
        return False
    except RuntimeError as broken:  # wrong only if the model would have chosen it
        report.note(**{f"{name}, {case}: broken": str(broken)})
        chosen = choose_kernel(q, k, window, masked=False, trains=True) == name
        return not report.check(f"{name}, {case}: chosen, but broken", chosen, 0)
    for part, right in wanted.items():
        report.check(f"{name}, {case}: {part}", error(found[part], right), BOUND)
    return True


def time_kernel(name: str, scale: Scale, report: Report) -> None:
    "Time forward and backward at depth 20's shape, and list the kernels that run."
    inputs = draw(timed_shape(scale), scale)
    step = partial(derive, inputs, 0, name)
    report.note(**{f"{name} seconds": seconds_of(step, scale, 10, 3)})
    report.kernels += [f"{name}: {kernel}" for kernel in names(watched(step, scale), 3)]


def timed_shape(scale: Scale) -> tuple[int, ...]:
    "Return the shape of depth 20 at device batch 4."
    return scale.pick((4, 2048, 10, 10, 128, 0), (1, 32, 2, 2, 16, 0))
