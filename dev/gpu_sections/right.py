"""Compare the model on the GPU with the CPU, bf16 with fp32, and compiled with eager."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.tools import (
    Report,
    Scale,
    elapsed,
    error,
    exact_products,
    gradients,
    names,
    peak_of,
    random_ids,
    random_model,
    require_bf16,
    require_memory,
    seconds_of,
    watched,
    worst,
)
from nanochat.attention import apply_rotary, gated, visible
from nanochat.functional import cross_entropy, softcap
from nanochat.gpt import GPT, GPTConfig, extra_values, smear, take_back, weigh
from nanochat.head import linear_cross_entropy

# Fields of a config that differ from the default model.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped heads": {"n_kv_head": 2},
    "one key-value head": {"n_kv_head": 1},
    "windows": {"window_pattern": "SSSL", "short_window": 24},
    "value embeddings": {"value_embeds": True},
    "everything": {
        "n_kv_head": 2,
        "window_pattern": "SL",
        "short_window": 40,
        "value_embeds": True,
        "stream_scalars": True,
        "smear": True,
        "backout": True,
        "pad_vocab_to": 128,
    },
}
FP32, BF16 = 1e-4, 2e-2  # largest errors
SLACK = 1.5  # largest ratio of our bf16 error to that of PyTorch's own operations


def small_config(scale: Scale, **fields) -> GPTConfig:
    "Return a model small enough to check on the CPU, with heads of the real size."
    width, vocab = scale.pick(512, 64), scale.pick(4000, 250)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=width)
    return GPTConfig(scale.pick(256, 64), vocab, **(sizes | fields))


def norm(x: Tensor, eps: float) -> Tensor:
    "Compute RMSNorm with PyTorch's own operation."
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    "Multiply with a layer's weight, in the dtype of x."
    return F.linear(x, layer.weight.to(x.dtype))


def plain_attention(model: GPT, i: int, x: Tensor, extra: Tensor | None) -> Tensor:
    "Compute the attention of layer i with PyTorch's own operations and a mask."
    c = model.config
    a = model.transformer.h[i].attn
    T = x.size(1)
    q, k, v = (
        linear(x, layer).unflatten(-1, (-1, c.head_dim))
        for layer in (a.c_q, a.c_k, a.c_v)
    )
    if extra is not None:
        v = v + gated(extra, linear(x[..., : c.gate_inputs], a.ve_gate), c.gate_max)
    cos = model.cos[:T]
    sin = model.sin[:T]
    q, k = (norm(apply_rotary(t, cos, sin), c.norm_eps) for t in (q, k))
    k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, 2) for t in (k, v))
    # A mask of all pairs, which can express windows too.
    mask = visible(torch.arange(T, device=x.device)[None], T, c.window(i))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=a.scale)
    return linear(y.transpose(1, 2).flatten(2), a.c_proj)


def plain_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    "Compute the loss with PyTorch's own operations only, in the model's dtype."
    c = model.config
    table = F.embedding(ids, model.transformer.wte.weight)
    x = norm(table.to(model.dtype), c.norm_eps)
    x = start = middle = smear(model, x, ids, None)

    # Layer by layer; some designs add the middle of the network to the end.
    for i, block in enumerate(model.transformer.h):
        x = weigh(model, i, x, start)
        extra = extra_values(model, i, ids)
        x = x + plain_attention(model, i, norm(x, c.norm_eps), extra)
        hidden = linear(norm(x, c.norm_eps), block.mlp.c_fc).relu().square()
        x = x + linear(hidden, block.mlp.c_proj)
        if i == c.n_layer // 2:
            middle = x
    x = take_back(model, x, middle)
    logits = linear(norm(x, c.norm_eps), model.lm_head)[..., : c.vocab_size]
    logits = softcap(logits, c.softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def outcome(call, model: GPT, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    "Return the loss and all gradients of one batch."
    ids = ids.to(model.get_device())
    loss = call(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return loss.detach(), gradients(model)


def model(scale: Scale, report: Report) -> None:
    "Compare a small model of every variant: fp32 on both devices, bf16 on the GPU."
    require_bf16(scale)
    for name, fields in VARIANTS.items():
        config = small_config(scale, **fields)
        ids = random_ids(config, 4, config.sequence_len + 1)
        reference = random_model(config, torch.device("cpu"))
        ours = random_model(config, scale.device)
        # Products in tf32 would hide an error of a thousandth.
        with exact_products(), torch.no_grad():
            wanted = reference(ids[:, :-1])
            found = ours(ids[:, :-1].to(scale.device))
        report.check(f"{name}: logits, fp32", error(found, wanted), FP32)
        with exact_products():
            loss, grads = outcome(reference, reference, ids)
            near, near_grads = outcome(ours, ours, ids)
            _, plain = outcome(lambda x, y, m=ours: plain_loss(m, x, y), ours, ids)
        report.check(f"{name}: loss, fp32", error(near, loss), FP32)
        report.check(f"{name}: gradients, fp32", worst(near_grads, grads), FP32)
        report.check(f"{name}: gradients of plain fp32", worst(plain, grads), FP32)
        ours.dtype = torch.bfloat16
        half(name, ours, ids, (wanted, loss, grads), report)
    report.kernels = names(watched(lambda: outcome(ours, ours, ids), scale))
    largest = max(c["value"] for c in report.checks if "fp32" in c["name"])
    report.key = f"{len(VARIANTS)} models, largest error in fp32 {largest:.1e}"


def half(name: str, ours: GPT, ids: Tensor, right: tuple, report: Report) -> None:
    "Compare a model in bf16 with the fp32 results, and with plain operations in bf16."
    wanted, loss, grads = right
    with torch.no_grad():
        logits = error(ours(ids[:, :-1].to(ours.get_device())), wanted)
    near, near_grads = outcome(ours, ours, ids)
    plain, plain_grads = outcome(lambda x, y: plain_loss(ours, x, y), ours, ids)
    mine, theirs = (error(flat(g), flat(grads)) for g in (near_grads, plain_grads))
    report.check(f"{name}: logits, bf16", logits, BF16)
    report.check(f"{name}: loss, bf16", error(near, loss), BF16)
    report.check(f"{name}: gradients, bf16", mine, max(BF16, SLACK * theirs))
    mine, theirs = worst(near_grads, grads), worst(plain_grads, grads)
    # This is the largest of many rounding errors, some in gradients of four numbers.
    report.check(f"{name}: worst gradient, bf16", mine, max(5e-2, 2 * theirs))
    report.note(**{f"{name}: bf16 error of the loss": error(near, loss)})
    report.note(**{f"{name}: plain bf16 error of the loss": error(plain, loss)})


def flat(grads: dict[str, Tensor]) -> Tensor:
    "Concatenate all gradients into one vector."
    return torch.cat([grads[name].flatten().cpu() for name in sorted(grads)])


def compiled(scale: Scale, report: Report) -> None:
    "Compare the compiled model with the eager one, whose errors would be silent."
    from nanochat.compiling import compiled_differs

    require_bf16(scale)
    backend = scale.pick("inductor", "aot_eager")
    cases = {"default": torch.bfloat16, "everything": torch.bfloat16}
    if scale.tiny:
        del cases["default"]  # each takes seconds
    for name, dtype in cases.items():
        compare_compiled(name, dtype, backend, scale, report)
    # The guard of every run must not give false alarms.
    config = small_config(scale, n_layer=1)
    told = compiled_differs(config, scale.device, torch.bfloat16, backend=backend)
    report.check("complaints of the guard in bf16", bool(told), 0)
    # In fp32, both round in the last digit, but differently: only noted.
    wide = compiled_differs(config, scale.device, torch.float32, backend=backend)
    report.note(guard=told, guard_fp32=wide)
    worst_of_all = max(c["value"] for c in report.checks if "gradient" in c["name"])
    report.key = f"{len(cases)} models, worst gradient {worst_of_all:.1e} from fp32"


def compare_compiled(
    name: str, dtype: torch.dtype, backend: str, scale: Scale, report: Report
) -> None:
    "Check loss and gradients of one compiled model."
    config = small_config(scale, n_layer=scale.pick(2, 1), **VARIANTS[name])
    ids = random_ids(config, 4, config.sequence_len + 1)
    exact = random_model(config, scale.device)
    ours = random_model(config, scale.device, dtype)
    call = torch.compile(ours, dynamic=False, backend=backend)
    with exact_products():
        loss, grads = outcome(exact, exact, ids)
        _, eager = outcome(ours, ours, ids)
        told = elapsed(lambda: outcome(call, ours, ids), scale)
        near, near_grads = outcome(call, ours, ids)
    report.note(**{f"{name}: compile seconds": told})
    report.check(f"{name}: loss", error(near, loss), BF16)
    # Fused kernels round less often, so require only to be as close to fp32 as eager.
    bound = max(BF16, SLACK * worst(eager, grads))
    report.check(f"{name}: worst gradient", worst(near_grads, grads), bound)
    report.kernels = names(watched(lambda: outcome(call, ours, ids), scale))


# ---- The loss


def plain_head(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    "Compute the loss with all logits in memory."
    return cross_entropy(softcap(x @ w.to(x.dtype).T, 15.0), targets)


def chunked_head(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    "Compute the loss as the model does."
    return linear_cross_entropy(x, w, targets, 15.0)


def derive(f, x: Tensor, w: Tensor, targets: Tensor) -> dict[str, Tensor]:
    "Return the loss and its gradients."
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = f(x, w, targets)
    loss.backward()
    return {"loss": loss.detach(), "dx": x.grad, "dw": w.grad}


def head(scale: Scale, report: Report) -> None:
    "Compare the chunked loss in bf16 with the plain one, in bf16 and in fp32."
    require_bf16(scale)
    N, C, V = scale.pick((8192, 1280, 65_536), (200, 32, 500))
    require_memory(scale, 6 * 4 * N * V, "the plain loss in fp32")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=g).to(scale.device, torch.bfloat16)
    w = (torch.randn(V, C, generator=g) * C**-0.5).to(scale.device)
    targets = torch.randint(-1, V, (N,), generator=g).to(scale.device)
    with exact_products():
        wanted = derive(plain_head, x.float(), w, targets)
    found = derive(chunked_head, x, w, targets)
    theirs = derive(plain_head, x, w, targets)
    for part, right in wanted.items():
        bound = max(
            SLACK * error(theirs[part], right), 1e-3 if part == "loss" else 5e-3
        )
        report.check(f"{part}, bf16", error(found[part], right), bound)
    del wanted, found, theirs  # gigabytes that would count toward the peaks below
    for name, f in {"chunked": chunked_head, "plain": plain_head}.items():
        step = partial(derive, f, x, w, targets)
        report.note(**{f"{name} seconds": seconds_of(step, scale, 5, 2)})
        report.note(**{f"{name} peak bytes": peak_of(step, scale)})
    step = partial(derive, chunked_head, x, w, targets)
    report.kernels = names(watched(step, scale))
    ms = [1000 * report.figures[f"{name} seconds"] for name in ("chunked", "plain")]
    report.key = f"chunked {ms[0]:.1f} ms, plain {ms[1]:.1f} ms"
