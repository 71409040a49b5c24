"""Measure training speed: ceilings, depth 20 as shipped, each optimization alone, fp8, parts."""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from gpu_sections.optimizing import BYTES, read_bytes
from gpu_sections.tools import (
    GIB,
    Report,
    Scale,
    Skip,
    clean,
    depth_20,
    elapsed,
    large_model,
    names,
    peak_of,
    random_batch,
    require_bf16,
    require_memory,
    seconds_of,
    this_gpu,
    wait,
    watched,
)
from nanochat import adamw, head
from nanochat.accounting import flops_per_token, training_memory
from nanochat.attention import KERNELS, kernel_works, set_kernel
from nanochat.functional import nats_to_bits
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import setup_optimizer
from nanochat.train import accumulate

TOKENS = 524_288  # per optimizer step
PARTS = {  # parts of a step: words in the names of kernels (operators on a CPU)
    "attention": "flash fmha sdpa attention attend cudnn dot_do_o convert_dq".split(),
    "matrix products": "gemm nvjet cutlass cublas xmma splitk _mm ::mm ::bmm".split(),
}


# ---- The two ceilings


def copy_rate(scale: Scale) -> float:  # bytes read and written per second
    "Measure memory bandwidth with a copy far larger than the cache."
    a = torch.randn(scale.pick(2**28, 2**18), device=scale.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds_of(lambda: b.copy_(a), scale, 20, 3)


def product_rate(scale: Scale) -> float:  # operations per second
    "Measure a large square product in bf16, of random numbers."
    n = scale.pick(8192, 256)
    a = torch.randn(n, n, device=scale.device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=scale.device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds_of(lambda: a @ b, scale, 20, 5)


def bandwidth(scale: Scale, report: Report) -> None:
    "Measure the two ceilings to which all other figures are compared."
    require_bf16(scale)
    flops, copied = product_rate(scale), copy_rate(scale)
    report.note(product_flops=flops, copy_bytes_per_second=copied)
    if gpu := this_gpu()[1]:
        report.note(product_share=flops / gpu.peak, copy_share=copied / gpu.bandwidth)
    report.key = f"{flops / 1e12:,.0f}e12 operations/s, {copied / 1e12:.2f} TB/s"


# ---- A training step


class Trainer:
    "A model, its compiled form and its optimizer, on one micro-batch of random tokens."

    def __init__(
        self,
        scale: Scale,
        rows: int,
        layers: int = 20,
        *,
        mode: str | None = None,  # of torch.compile
        wrap: Callable | None = None,  # function(model), before it is compiled
        pattern: str = "L",  # of windows
        guard: bool = False,  # compile as the stages do, with the guard's seconds
    ):
        from nanochat.compiling import compile_model

        torch.set_float32_matmul_precision("high")  # as the stages do on a GPU
        self.scale, self.rows = scale, rows
        self.config = replace(depth_20(scale, layers), window_pattern=pattern)
        self.model = large_model(self.config, scale)
        if wrap:
            wrap(self.model)
        options: dict[str, Any] = {"mode": mode, "backend": scale.backend}
        self.call: Callable[..., Any]
        if guard:
            self.call = compile_model(self.model, **options)
        else:
            self.call = torch.compile(self.model, dynamic=False, **options)
        self.optimizer = setup_optimizer(self.model)
        self.batch = random_batch(self.config, rows, scale)
        self.tokens = self.batch.inputs.numel()
        self.micro = max(2, scale.pick(TOKENS, 256) // self.tokens)  # of a step

    def passes(self, times: int = 1) -> None:
        "Run forward and backward, as in the training loop."
        accumulate(self.call, [self.batch] * times)

    def update(self) -> None:
        "Take the optimizer's step, keeping the gradients."
        self.optimizer.grad_norm()
        self.optimizer.step(1.0, 0.95)

    def once(self) -> None:
        "Take an optimizer step after two micro-batches."
        self.passes(2)
        self.update()

    def step(self) -> None:
        "Take a whole step."
        self.optimizer.zero_grad()
        self.passes(self.micro)
        self.update()

    def close(self) -> None:
        "Free the memory."
        # Nothing uses them afterwards, so their types leave None out.
        self.model = self.call = self.optimizer = self.batch = None  # type: ignore[assignment]
        clean(self.scale)


def counted_bytes(scale: Scale, rows: int, layers: int = 20) -> int:
    "Count the memory of a step with several micro-batches."
    config = depth_20(scale, layers)
    return training_memory(config, rows, 2, 1, micro_batches=2)["total"]


def training(scale: Scale, report: Report) -> None:
    "Measure a step of 524,288 tokens at depth 20, compiled, with 16 rows at a time."
    row = with_rows(scale.pick(16, 2), scale, report)
    off = abs(row["peak_bytes"] / row["counted_bytes"] - 1)
    report.goal("tokens per second", row["tokens_per_second"], 150_000)
    report.goal("optimizer's share of a step", row["optimizer_share"], 0.05, most=True)
    report.goal("peak memory, away from the count", off, 0.05, most=True)
    report.goal("compile seconds", row["compile_seconds"], 90, most=True)


def training_32(scale: Scale, report: Report) -> None:
    "Measure the same with 32 rows at a time, if they fit."
    row = with_rows(scale.pick(32, 4), scale, report)
    report.goal("tokens per second", row["tokens_per_second"], 150_000)


def with_rows(rows: int, scale: Scale, report: Report) -> dict:  # the figures
    "Measure depth 20 with a number of rows per micro-batch."
    require_bf16(scale)
    require_memory(scale, counted_bytes(scale, rows), f"depth 20, {rows} rows")
    row = measure(Trainer(scale, rows, guard=True), report)
    report.note(**row)
    share = f", {row['mfu']:.1%} of the peak" if row["mfu"] else ""
    report.key = f"{row['tokens_per_second']:,.0f} tokens/s{share}, "
    report.key += f"{row['peak_bytes'] / GIB:.1f} GiB"
    return row


def measure(trainer: Trainer, report: Report) -> dict:
    "Measure a step, including the first pass, which compiles."
    scale, config = trainer.scale, trainer.config
    first = elapsed(trainer.passes, scale)
    report.note(first_pass_seconds=first)  # each figure is saved as soon as it is known
    again = statistics.median(elapsed(trainer.passes, scale) for _ in range(3))
    trainer.update()  # allocates its buffers
    peak = peak_of(trainer.once, scale)
    updates = [elapsed(trainer.update, scale) for _ in range(3)]
    seconds = statistics.median(elapsed(trainer.step, scale) for _ in range(3))
    rate = trainer.micro * trainer.tokens / seconds
    gpu = this_gpu()[1]
    report.note(tokens_per_second=rate, step_seconds=seconds, peak_bytes=peak)
    report.kernels = names(watched(trainer.passes, scale), 16)
    row = {
        "depth": config.n_layer,
        "sequence_len": config.sequence_len,
        "vocab_size": config.vocab_size,
        "device_batch_size": trainer.rows,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(config) / gpu.peak if gpu else None,
        "peak_bytes": peak,
        "counted_bytes": counted_bytes(scale, trainer.rows),
        "compile_seconds": first - again,
        "micro_seconds": again,
        "step_seconds": seconds,
        "optimizer_seconds": statistics.median(updates),
        "optimizer_share": statistics.median(updates) / seconds,
    }
    trainer.close()
    return row


# ---- Where the time goes


def sort_kernels(spent: dict[str, float]) -> dict[str, float]:  # part -> seconds
    "Add up kernels by words in their names; all others are element-wise work."
    parts = dict.fromkeys([*PARTS, "element-wise"], 0.0)
    for kernel, seconds in spent.items():
        words = kernel.lower()
        found = []
        for part, keys in PARTS.items():
            if any(key in words for key in keys):
                found.append(part)
        if words.startswith("triton_"):  # named after the fused operations
            found = ["matrix products"] if words.startswith("triton_tem") else []
        parts[found[0] if found else "element-wise"] += seconds
    return parts


def profile(scale: Scale, report: Report) -> None:
    "Divide a step of 524,288 tokens into parts, by the names of its kernels."
    require_bf16(scale)
    rows = scale.pick(16, 2)
    require_memory(scale, counted_bytes(scale, rows), f"depth 20, {rows} rows")
    trainer = Trainer(scale, rows)
    for _ in range(3):
        trainer.passes()
        trainer.update()
    model, loss = watched(trainer.passes, scale), watched(loss_alone(trainer), scale)
    update = watched(trainer.update, scale)
    seconds = statistics.median(elapsed(trainer.step, scale) for _ in range(3))
    # The loss uses the same kinds of kernels, so it is measured alone and subtracted.
    whole, last = sort_kernels(model), sort_kernels(loss)
    micro = trainer.micro
    parts = {k: micro * max(0.0, whole[k] - last[k]) for k in whole}
    parts |= {"loss": micro * sum(loss.values()), "optimizer": sum(update.values())}
    parts["idle"] = max(0.0, seconds - sum(parts.values()))
    report.note(parts=parts, step_seconds=seconds, device_batch_size=rows)
    longest = {"model": model, "loss": loss, "optimizer": update}
    report.note(longest={k: dict(list(v.items())[:25]) for k, v in longest.items()})
    report.kernels = names(model)
    top = sorted(parts.items(), key=lambda pair: -pair[1])[:4]
    report.key = ", ".join(f"{name} {s / seconds:.0%}" for name, s in top)
    trainer.close()


def loss_alone(trainer: Trainer) -> Callable:
    "Return a function that runs head and loss of a micro-batch, with its gradients."
    weight, c = trainer.model.lm_head.weight, trainer.config
    shape = *trainer.batch.inputs.shape, c.n_embd
    x = torch.randn(shape, device=weight.device, dtype=torch.bfloat16)
    x.requires_grad_()

    def f(x, weight, targets):
        return head.linear_cross_entropy(x, weight, targets, c.softcap, "mean")

    call = torch.compile(f, dynamic=False, backend=trainer.scale.backend)

    def step() -> None:
        call(x, weight, trainer.batch.targets).backward()
        x.grad = None

    for _ in range(3):  # compiles
        step()
    wait(trainer.scale)
    return step


# ---- Single optimizations


def levers(scale: Scale, report: Report) -> None:
    "Change one thing at a time on four layers of depth 20, and time a step of each."
    require_bf16(scale)
    report.note(rows=[], layers=scale.pick(4, 1))
    for rows in scale.pick((16, 32), (2, 4)):
        lever(f"{rows} rows", scale, report, batch=rows)
    for name, change in attention_levers(scale, report).items():
        lever(f"attention {name}", scale, report, wrap=change)
    for name in window_kernels(scale, report):
        change = partial(set_kernel, name=name)
        lever(f"windows by {name}", scale, report, wrap=change, pattern="S")
    with patch.object(adamw, "adamw_rule", lambda *_: adamw.adamw_update):
        lever("AdamW line by line", scale, report)
    for power in scale.pick((26, 27, 29, 30), (10,)):
        with patch.dict(head.CHUNK, {scale.device.type: 2**power}):
            lever(f"2^{power} logits at a time", scale, report)
    lever("garbage collection", scale, report, quiet=False)
    mode = scale.pick("max-autotune-no-cudagraphs", "default")  # takes a minute or more
    lever(f"compile mode {mode}", scale, report, mode=mode)
    rows = [row for row in report.figures["rows"] if row["tokens_per_second"]]
    best = max(rows, key=lambda row: row["tokens_per_second"])
    gain = best["tokens_per_second"] / rows[0]["tokens_per_second"]
    report.key = f"best of {len(rows)}: {best['lever']}, {gain:.2f} x the first"


def attention_levers(scale: Scale, report: Report) -> dict[str, Callable]:
    "Return, for each kernel that can run, how to make a model use it; note the others."
    found: dict[str, Callable] = {}
    for name in KERNELS:
        if name in ("twin", "blocks", "mask"):
            continue  # the twin, and kernels for CPUs and ragged rows
        if why := kernel_works(name, scale.device):
            add_lever(f"attention {name}", {"note": f"cannot run: {why}"}, report)
        else:
            found[name] = partial(set_kernel, name=name)
    return found


def window_kernels(scale: Scale, report: Report) -> list[str]:
    "Return the kernels that support windows and can run here."
    found = []
    for name in ("mask", "varlen", "flash3"):
        if why := kernel_works(name, scale.device):
            add_lever(f"windows by {name}", {"note": f"cannot run: {why}"}, report)
        else:
            found.append(name)
    return found


def add_lever(name: str, found: dict, report: Report) -> None:
    "Record a row, with null for anything not measured."
    row = {"lever": name, "tokens_per_second": None, "peak_bytes": None, "note": ""}
    report.note(rows=[*report.figures["rows"], row | found])


def lever(
    name: str,
    scale: Scale,
    report: Report,
    batch: int = 0,  # rows; 0: 16
    *,
    quiet: bool = True,  # no garbage collection, as in the training loop
    **change,  # options of the Trainer
) -> None:
    "Time some layers of depth 20 with one change; a failure is recorded too."
    from nanochat.train import quiet_gc

    if scale.left() < scale.pick(20, 0):
        return add_lever(name, {"note": "no time left"}, report)
    batch = batch or scale.pick(16, 2)
    found: dict[str, Any] = {}
    trainer: Trainer | None = None
    try:
        with quiet_gc() if quiet else nullcontext():
            trainer = Trainer(scale, batch, report.figures["layers"], **change)
            trainer.micro = 2
            first = elapsed(trainer.step, scale)
            found["peak_bytes"] = peak_of(trainer.step, scale)
            times = [elapsed(trainer.step, scale) for _ in range(scale.pick(8, 2))]
        found["tokens_per_second"] = 2 * trainer.tokens / statistics.median(times)
        found["note"] = f"compile {first:.0f} s; {min(times):.4f} to {max(times):.4f} s"
    except (RuntimeError, ValueError) as error:
        found["note"] = str(error).strip().split("\n")[0][:200]
    trainer = None  # free the memory before allocating again
    clean(scale)
    add_lever(name, found, report)


# ---- fp8


def fp8(scale: Scale, report: Report) -> None:
    "Compare fp8 with bf16: speed at depth 20, and what a small model learns."
    from nanochat.fp8 import fp8_works, use_fp8

    require_bf16(scale)
    if (why := fp8_works(scale.device)) and not scale.tiny:
        raise Skip(why)  # a CPU uses an emulation with the same arithmetic
    # Compiling all twenty layers twice takes long; if time is short, use six.
    layers = 20 if scale.left() > 150 else 6
    require_memory(scale, counted_bytes(scale, scale.pick(16, 2), layers), "fp8")
    rates = {name: rate(layers, w, scale, report) for name, w in ways(use_fp8).items()}
    ratio = rates["fp8"] / rates["bf16"]
    report.note(tokens_per_second=rates["fp8"], bf16_tokens_per_second=rates["bf16"])
    report.note(ratio=ratio, layers=layers)
    report.key = f"{ratio:.2f} x bf16 with {layers} layers"
    steps = scale.pick(200, 5)
    for name, wrap in ways(use_fp8).items():
        report.note(**{f"bpb_{name}": bits_after(steps, wrap, scale)})
    report.note(bpb_other_seed=bits_after(steps, None, scale, seed=1), steps=steps)
    away = abs(report.figures["bpb_fp8"] - report.figures["bpb_bf16"])
    report.key += f", {away:.4f} bits per byte away after {steps} steps"
    report.goal("fp8 over bf16", ratio, 1.10)
    report.goal("bits per byte, away from bf16", away, 0.002, most=True)


def ways(use_fp8: Callable) -> dict[str, Callable | None]:
    "Return how the model is changed in each case."
    return {"bf16": None, "fp8": use_fp8}


def rate(layers: int, wrap, scale: Scale, report: Report) -> float:
    "Return tokens per second of forward and backward passes."
    trainer = Trainer(scale, scale.pick(16, 2), layers, wrap=wrap)
    for _ in range(3):
        trainer.passes(2)
    times = [elapsed(lambda: trainer.passes(2), scale) for _ in range(scale.pick(8, 2))]
    found = 2 * trainer.tokens / statistics.median(times)
    report.kernels = names(watched(trainer.passes, scale))
    trainer.close()
    return found


def bits_after(steps: int, wrap, scale: Scale, seed: int = 0) -> float:
    "Train on the bytes of the embedded corpus; return bits per byte on those that follow."
    T, rows = scale.pick((512, 32), (32, 4))
    width, layers = scale.pick((512, 6), (64, 1))
    config = GPTConfig(T, BYTES, layers, width // 64, width // 64, width)
    model = GPT(config, torch.bfloat16).to(scale.device)
    model.init_weights(seed)
    if wrap:
        wrap(model)
    optimizer = setup_optimizer(model)
    size = rows * T
    text = read_bytes((steps + 4) * size + 1).to(scale.device)
    pairs = [
        (text[at : at + size].view(rows, T), text[at + 1 : at + 1 + size].view(rows, T))
        for at in range(0, (steps + 4) * size, size)
    ]
    for step, (x, y) in enumerate(pairs[:steps]):  # warmdown in the second half
        model(x, y).backward()
        optimizer.step(min(1.0, 2 * (1 - step / steps)), 0.95)
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model(x, y).item() for x, y in pairs[steps:]]
    return float(nats_to_bits(statistics.mean(losses)))
