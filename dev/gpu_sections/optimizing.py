"""Check the optimizer on the GPU: Muon's iteration in bf16, and AdamW against PyTorch's."""

import copy
import statistics

import torch

from gpu_sections.pipeline import spread
from gpu_sections.tools import (
    Report,
    Scale,
    error,
    exact_products,
    names,
    require_bf16,
    watched,
)
from nanochat.adamw import AdamW
from nanochat.config import OptimConfig
from nanochat.dataset import iter_documents
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import METHODS, orthogonalize
from nanochat.optim import setup_optimizer

BYTES = 256  # the vocabulary of a model that reads bytes


def optimizer(scale: Scale, report: Report) -> None:
    "Check the effect of bf16 on Muon, in one step and over fifty, and AdamW's steps."
    require_bf16(scale)
    for method in METHODS:
        singular_values(method, scale, report)
    steps = scale.pick(50, 6)
    finals = {}
    for dtype in (torch.float32, torch.bfloat16):
        seeds = range(scale.pick(4, 2))
        finals[dtype] = [fifty_steps(dtype, seed, steps, scale) for seed in seeds]
    # The seeds differ far more than the iterations, so their spread is the bound.
    exact, half = finals.values()
    report.note(final_loss_fp32=exact, final_loss_bf16=half, steps=steps)
    away = abs(statistics.mean(half) - statistics.mean(exact))
    report.check(f"loss after {steps} steps, bf16 - fp32", away, spread(exact))
    adamw(scale, report)
    report.key = f"{steps} steps: {statistics.mean(half):.4f} in bf16, "
    report.key += f"{statistics.mean(exact):.4f} in fp32"


def singular_values(method: str, scale: Scale, report: Report) -> None:
    "Compare the iteration in bf16 and fp32 by the resulting singular values."
    side = scale.pick(768, 32)
    for shape in ((side, side), (side, 4 * side), (4 * side, side)):
        g = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(shape, generator=g).to(scale.device)
        with exact_products():
            exact = orthogonalize(x, method, torch.float32)
        half = orthogonalize(x, method, torch.bfloat16)
        name = f"{method}, {shape[0]} x {shape[1]}"
        report.check(f"{name}: bf16 against fp32", error(half, exact), 5e-2)
        found, wanted = (torch.linalg.svdvals(m.float().cpu()) for m in (half, exact))
        report.check(
            f"{name}: largest singular value", found.max(), wanted.max() + 0.05
        )
        # The smallest values of a square matrix are not reached in five steps, so the
        # median stands for "near 1".
        report.check(f"{name}: median", (found.median() - wanted.median()).abs(), 0.05)


def read_bytes(count: int) -> torch.Tensor:  # (count,) bytes of the embedded corpus
    text = b""
    for document, _ in iter_documents("train", data="embedded"):
        text += document.encode()
        if len(text) >= count:
            return torch.tensor(list(text[:count]))
    raise ValueError(f"the corpus has only {len(text)} bytes")


def fifty_steps(dtype: torch.dtype, seed: int, steps: int, scale: Scale) -> float:
    "Train a small model on bytes; return the mean loss of its last five steps."
    width, T, rows = scale.pick((256, 256, 16), (32, 32, 4))
    config = GPTConfig(T, BYTES, n_layer=4, n_head=4, n_kv_head=4, n_embd=width)
    model = GPT(config, torch.float32).to(scale.device)
    model.init_weights(seed)
    name = str(dtype).removeprefix("torch.")
    ours = setup_optimizer(model, OptimConfig(matrix_dtype=name))
    text = read_bytes(steps * rows * T + 1).to(scale.device)
    losses = []  # kept on the device, so that no step waits
    for step in range(steps):
        at = step * rows * T
        x, y = (text[at + i : at + i + rows * T].view(rows, T) for i in (0, 1))
        loss = model(x, y)
        loss.backward()
        ours.step(1.0, 0.9)
        ours.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-5:]).mean().item()


def adamw(scale: Scale, report: Report) -> None:
    "Take ten steps with ours and with PyTorch's."
    shape = scale.pick((4096, 1280), (64, 32))
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g).to(scale.device)
    grads = [torch.randn(shape, generator=g).to(scale.device) for _ in range(3)]
    found = {}
    for name, kind in {"ours": AdamW, "PyTorch's": torch.optim.AdamW}.items():
        p = torch.nn.Parameter(copy.deepcopy(start))
        rule = kind([p], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
        for step in range(9):
            p.grad = grads[step % 3].clone()
            rule.step()
        found[name] = p.detach() - start
    report.check("AdamW: ours against PyTorch's", error(*found.values()), 1e-5)
    report.kernels = names(watched(rule.step, scale))
