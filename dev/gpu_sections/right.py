"""Is it right? The model on the card against the CPU, bf16 against fp32, compiled against eager."""

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
from nanochat.gpt import GPT, GPTConfig, extra_values, weigh
from nanochat.head import linear_cross_entropy

VARIANTS = {  # fields of a config that differ from the default model
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
        "pad_vocab_to": 128,
    },
}
FP32, BF16 = 1e-4, 2e-2  # largest errors
SLACK = 1.5  # of our error in bf16 over that of PyTorch's own operations


def small_config(scale: Scale, **fields) -> GPTConfig:
    "Return a model small enough for the CPU to check, with heads as large as on a card."
    width, vocab = scale.pick(512, 64), scale.pick(4000, 250)
    sizes = dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=width)
    return GPTConfig(scale.pick(256, 64), vocab, **(sizes | fields))


def plain_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    "Compute the loss with PyTorch's own operations only, in the model's dtype."
    c, dtype, T = model.config, model.dtype, ids.size(1)
    norm = lambda x: F.rms_norm(x, x.shape[-1:], eps=c.norm_eps)
    linear = lambda x, layer: F.linear(x, layer.weight.to(dtype))
    heads = lambda x: x.unflatten(-1, (-1, c.head_dim))
    x = start = norm(F.embedding(ids, model.transformer.wte.weight).to(dtype))
    for i, block in enumerate(model.transformer.h):
        a, x = block.attn, weigh(model, i, x, start)
        h, extra = norm(x), extra_values(model, i, ids)
        q, k, v = (heads(linear(h, layer)) for layer in (a.c_q, a.c_k, a.c_v))
        if extra is not None:
            gate = linear(h[..., : c.gate_inputs], a.ve_gate)
            v = v + gated(extra, gate, c.gate_max)
        q, k = (norm(apply_rotary(t, model.cos[:T], model.sin[:T])) for t in (q, k))
        k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, 2) for t in (k, v))
        mask = visible(torch.arange(T, device=ids.device)[None], T, c.window(i))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=a.scale)
        x = x + linear(y.transpose(1, 2).flatten(2), a.c_proj)
        x = x + linear(linear(norm(x), block.mlp.c_fc).relu().square(), block.mlp.c_proj)
    logits = softcap(linear(norm(x), model.lm_head)[..., : c.vocab_size], c.softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def outcome(call, model: GPT, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    "Return the loss and all gradients of one batch."
    ids = ids.to(model.get_device())
    loss = call(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return loss.detach(), gradients(model)


def model(scale: Scale, report: Report) -> None:
    "Compare a small model of every kind: fp32 on both devices, bf16 on the card."
    require_bf16(scale)
    for name, fields in VARIANTS.items():
        config = small_config(scale, **fields)
        ids = random_ids(config, 4, config.sequence_len + 1)
        reference = random_model(config, torch.device("cpu"))
        ours = random_model(config, scale.device)
        with exact_products(), torch.no_grad():
            wanted, found = reference(ids[:, :-1]), ours(ids[:, :-1].to(scale.device))
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
    flat = lambda g: torch.cat([g[n].flatten().cpu() for n in grads])
    mine, theirs = (error(flat(g), flat(grads)) for g in (near_grads, plain_grads))
    report.check(f"{name}: logits, bf16", logits, BF16)
    report.check(f"{name}: loss, bf16", error(near, loss), BF16)
    report.check(f"{name}: gradients, bf16", mine, max(BF16, SLACK * theirs))
    ratio = worst(near_grads, grads) / max(worst(plain_grads, grads), 1e-9)
    report.check(f"{name}: worst gradient over that of plain bf16", ratio, SLACK)
    report.note(**{f"{name}: bf16 error of the loss": error(near, loss)})
    report.note(**{f"{name}: plain bf16 error of the loss": error(plain, loss)})


def compiled(scale: Scale, report: Report) -> None:
    "Compare the compiled model with the eager one, where every mistake would be silent."
    from nanochat.compiling import compile_model

    require_bf16(scale)
    cases = {
        "default, bf16": ("default", torch.bfloat16),
        "default, fp32": ("default", torch.float32),
        "everything, bf16": ("everything", torch.bfloat16),
    }
    if scale.tiny:  # one of them takes seconds
        cases = {"everything, bf16": cases["everything, bf16"]}
    for name, (variant, dtype) in cases.items():
        layers = scale.pick(2, 1)
        config = small_config(scale, n_layer=layers, **VARIANTS[variant])
        ids = random_ids(config, 4, config.sequence_len + 1)
        exact = random_model(config, scale.device)
        ours = random_model(config, scale.device, dtype)
        call = compile_model(ours, backend=scale.pick("inductor", "aot_eager"))
        with exact_products():
            loss, grads = outcome(exact, exact, ids)
            eager, eager_grads = outcome(ours, ours, ids)
            told = elapsed(lambda: outcome(call, ours, ids), scale)
            near, near_grads = outcome(call, ours, ids)
        report.note(**{f"{name}: compile seconds": told})
        # Fused kernels round less often, so equal means: as near to fp32 as eager is.
        bound = FP32 if dtype == torch.float32 else BF16
        report.check(f"{name}: loss", error(near, loss), bound)
        bound = max(bound, SLACK * worst(eager_grads, grads))
        report.check(f"{name}: worst gradient", worst(near_grads, grads), bound)
        same = float(call is ours)
        report.check(f"{name}: run uncompiled by the guard", same, 0)
    report.kernels = names(watched(lambda: outcome(call, ours, ids), scale))
    report.key = f"{len(cases)} models, compile {told:.0f} s"


def head(scale: Scale, report: Report) -> None:
    "Compare the chunked loss in bf16 with the plain one, in bf16 and in fp32."
    require_bf16(scale)
    N, C, V = scale.pick((8192, 1280, 65_536), (200, 32, 500))
    require_memory(scale, 5 * 4 * N * V, "the plain loss in fp32")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=g).to(scale.device, torch.bfloat16)
    w = (torch.randn(V, C, generator=g) * C**-0.5).to(scale.device)
    targets = torch.randint(-1, V, (N,), generator=g).to(scale.device)
    plain = lambda x, w: cross_entropy(softcap(x @ w.to(x.dtype).T, 15.0), targets)
    ours = lambda x, w: linear_cross_entropy(x, w, targets, 15.0)

    def derive(f, x):
        x, head = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = f(x, head)
        loss.backward()
        return {"loss": loss.detach(), "dx": x.grad, "dw": head.grad}

    with exact_products():
        wanted = derive(plain, x.float())
    found, theirs = derive(ours, x), derive(plain, x)
    for part in wanted:
        mine, other = error(found[part], wanted[part]), error(theirs[part], wanted[part])
        bound = max(SLACK * other, 1e-3 if part == "loss" else 5e-3)
        report.check(f"{part}, bf16", mine, bound)
    for name, f in {"chunked": ours, "plain": plain}.items():
        step = lambda f=f: derive(f, x)
        report.note(**{f"{name} seconds": seconds_of(step, scale, 5, 2)})
        report.note(**{f"{name} peak bytes": peak_of(step, scale)})
    report.kernels = names(watched(lambda: derive(ours, x), scale))
    ms = 1000 * report.figures["chunked seconds"], 1000 * report.figures["plain seconds"]
    report.key = f"chunked {ms[0]:.1f} ms, plain {ms[1]:.1f} ms"
