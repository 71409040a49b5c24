"""Check that all ways to decode on the GPU agree, and measure how fast each is."""

import statistics
import time

import torch
from torch import Tensor

from gpu_sections.right import BF16, FP32, SLACK, VARIANTS, small_config
from gpu_sections.speed import copy_rate
from gpu_sections.tools import (
    Report,
    Scale,
    depth_20,
    elapsed,
    error,
    exact_products,
    large_model,
    names,
    random_ids,
    random_model,
    require_bf16,
    require_memory,
    watched,
)
from nanochat.accounting import MATRICES, kv_cache_bytes, parameter_counts
from nanochat.attention import KVCache
from nanochat.engine import prefill
from nanochat.gpt import GPT, GPTConfig

# ---- Correctness


def empty_cache(model: GPT, rows: int, capacity: int) -> KVCache:
    "Create a cache for a model."
    c = model.config
    shape = rows, c.n_kv_head, capacity, c.head_dim, c.n_layer
    return KVCache(*shape, device=model.get_device(), dtype=model.dtype)


@torch.inference_mode()
def in_chunks(model: GPT, ids: Tensor, sizes: list[int]) -> Tensor:
    "Return the logits of all positions, computed a few at a time with a cache."
    kv = empty_cache(model, len(ids), ids.size(1))
    found = []
    for part in ids.split(sizes, 1):
        found.append(model(part, kv_cache=kv))
    return torch.cat(found, 1)


@torch.inference_mode()
def ragged(model: GPT, ids: Tensor, lengths: list[int]) -> Tensor:  # (B, V)
    "Return the logits after prompts of several lengths and one more token each."
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    _, kv = prefill(model, prompts, ids.size(1))
    after = torch.stack([row[n] for row, n in zip(ids, lengths)])
    return model(after[:, None], kv_cache=kv)[:, -1]


def decode_right(scale: Scale, report: Report) -> None:
    "Compare decoding token by token, in chunks and in ragged rows with the full forward."
    require_bf16(scale)
    for name, fields in VARIANTS.items():
        config = small_config(scale, n_layer=2, **fields)
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(config, scale.device, dtype)
            ids = random_ids(config, 4, 48).to(scale.device)
            with exact_products():
                compare(f"{name}, {str(dtype)[6:]}", model, ids, report)
                steps_agree(f"{name}, {str(dtype)[6:]}", model, ids, report)
    right = [c["value"] for c in report.checks if "float32" in c["name"]]
    report.key = f"{len(VARIANTS)} models, largest error in fp32 {max(right):.1e}"


def compare(name: str, model: GPT, ids: Tensor, report: Report) -> None:
    "Check one model in one dtype."
    with torch.inference_mode():
        full = model(ids)
    exact = random_model(model.config, model.get_device())
    with torch.inference_mode():
        # Two results rounded to bf16 are further from each other than from the exact one.
        bound = max(FP32, SLACK * SLACK * error(full, exact(ids)))
    rows = torch.arange(4)
    lengths = [40, 7, 1, 25]
    ways = {
        "token by token": (in_chunks(model, ids, [1] * 48), full),
        "in chunks": (in_chunks(model, ids, [17, 1, 25, 5]), full),
        "ragged rows": (ragged(model, ids, lengths), full[rows, lengths]),
    }
    for way, (found, wanted) in ways.items():
        report.check(f"{name}: {way}", error(found, wanted), bound)


def steps_agree(name: str, model: GPT, ids: Tensor, report: Report) -> None:
    "Check that static buffers and a graph choose the ids that eager decoding chooses."
    from nanochat.decode import DecodeStep, freeze_weights

    prompts = [row[:n].tolist() for row, n in zip(ids, (40, 7, 1, 25))]
    kept = freeze_weights(model.eval())
    wanted = greedy(kept, prompts, 8, None)
    static = greedy(kept, prompts, 8, DecodeStep(kept, 4, 64, graph=False))
    caught = DecodeStep(kept, 4, 64)
    graph = greedy(kept, prompts, 8, caught)
    if model.get_device().type == "cuda":
        report.check(f"{name}: not captured", not caught.graph, 0)
    differ = (graph != static).sum().item()
    report.check(f"{name}: greedy ids, graph against the same uncaptured", differ, 0)
    # In bf16, rounding decides between nearly equal logits, and it differs by kernel.
    if model.dtype == torch.float32:
        differ = (graph != wanted).sum().item()
        report.check(f"{name}: greedy ids, graph against eager", differ, 0)


@torch.inference_mode()
def greedy(model: GPT, prompts: list[list[int]], count: int, step) -> Tensor:
    "Continue prompts greedily, with eager decoding or a DecodeStep."
    logits, kv = prefill(model, prompts, 64)
    if step is not None:
        step.load(kv)
    call = step.step if step is not None else eager_step(model, kv)
    chosen = []
    for _ in range(count):
        chosen.append(logits.argmax(-1))
        logits = call(chosen[-1])
    return torch.stack(chosen, 1).cpu()


# ---- Speed

WAYS = ("graph", "eager", "compiled graph")


def decoding(scale: Scale, report: Report) -> None:
    "Measure tokens per second with batches of 1, 16 and 64 after 512 tokens."
    from nanochat.decode import freeze_weights

    require_bf16(scale)
    config = depth_20(scale)
    context = scale.pick(512, 16)
    batches = scale.pick((1, 64, 16), (1, 3))
    cache = kv_cache_bytes(config, max(batches), 2 * context)
    weights = parameter_counts(config)["total"]
    require_memory(scale, 6 * weights + 4 * cache, "decoding at depth 20")
    model = freeze_weights(large_model(config, scale).eval())
    report.note(copy_bytes_per_second=copy_rate(scale), config=vars(config), rows=[])
    for batch in batches:
        one_batch(model, batch, ("graph", "eager"), context, (scale, report))
    conclude(batches, report)  # keep these results, whatever happens later
    for batch in batches[:2]:  # compiling takes longest
        if scale.left() > scale.pick(60, 0):
            one_batch(model, batch, ("compiled graph",), context, (scale, report))
    conclude(batches, report)
    if scale.left() < scale.pick(25, 0):
        report.note(transformers="no time left")
        return
    try:
        transformers_batches(model, batches[:2], context, (scale, report))
    except Exception as error:  # a failure of their code must not lose our results
        report.note(transformers=f"{type(error).__name__}: {error}"[:300])


def conclude(batches: tuple[int, ...], report: Report) -> None:
    "Compare the best rates so far with the goals."
    report.figures["goals"] = []
    best = {b: fastest(report, b) for b in batches}
    shown = [f"{best[b]:,.0f} tokens/s at batch {b}" for b in batches[:2]]
    report.key = "; ".join(shown)
    report.goal("batch 1, tokens per second", best[batches[0]], 1700)
    report.goal("batch 64, tokens per second", best[batches[1]], 25_000)


def fastest(report: Report, batch: int) -> float:
    "Return our best rate at a batch size."
    rows = [r for r in report.figures["rows"] if r["batch_size"] == batch]
    return max(r["tokens_per_second"] for r in rows if r["how"] in WAYS)


def add_row(report: Report, how: str, batch: int, context: int, seconds: float) -> None:
    "Record a measurement of a step, with its share of the memory bound."
    config = GPTConfig(**report.figures["config"])
    counts = parameter_counts(config)
    # Every weight, key and value is read once per step.
    read = 2 * sum(counts[m] for m in MATRICES)
    read += kv_cache_bytes(config, batch, context)
    allowed = batch * report.figures["copy_bytes_per_second"] / read
    row = {"how": how, "batch_size": batch, "context": context}
    row |= {"tokens_per_second": batch / seconds, "bound": allowed}
    row |= {"share_of_bound": batch / seconds / allowed}
    report.note(rows=[*report.figures["rows"], row])


@torch.inference_mode()
def one_batch(
    model: GPT, batch: int, ways: tuple[str, ...], context: int, place: tuple
) -> None:
    "Time several ways to decode a batch; each must choose the same ids as eager."
    from nanochat.decode import DecodeStep

    scale, report = place
    count = scale.pick(64, 4)
    prompts = random_ids(model.config, batch, context)
    first, kv = prefill(model, prompts.tolist(), capacity := context + count + 8)
    for how in ways:
        call = eager_step(model, kv)
        begun = time.perf_counter()
        if how != "eager":  # eager comes last, because it uses up the cache
            backend = scale.pick(True, "eager") if "compiled" in how else False
            step = DecodeStep(model, batch, capacity, compiled=backend)
            step.load(kv)
            call = step.step
        ids, logits, seconds = follow(call, first, count, scale)
        if how != "eager" and scale.device.type == "cuda":
            report.check(f"{how}, batch {batch}: not captured", not step.graph, 0)
        told = time.perf_counter() - begun
        report.note(**{f"{how}, batch {batch}: seconds with the first step": told})
        add_row(report, how, batch, context, seconds)
        same_ids(how, batch, (ids, logits), report)
        if batch == 1:
            spent = watched(lambda f=call: f(first.argmax(-1)), scale)
            report.kernels += [f"{how}: {kernel}" for kernel in names(spent, 5)]


def eager_step(model: GPT, kv: KVCache):
    "Return a function that decodes as the engine does without a graph."
    return lambda tokens: model(tokens[:, None], kv_cache=kv)[:, -1]


def follow(call, logits: Tensor, count: int, scale: Scale) -> tuple:
    "Decode greedily; return ids (steps, B), logits after one step, seconds per step."
    chosen = [logits.argmax(-1)]
    part = max(1, count // 8)
    logits = once = call(chosen[0]).clone()  # the next step overwrites its result

    def some() -> None:
        nonlocal logits
        for _ in range(part):  # nothing is read back, so no step waits
            chosen.append(logits.argmax(-1))
            logits = call(chosen[-1])

    times = [elapsed(some, scale) / part for _ in range(count // part)]
    return torch.stack(chosen).cpu(), once, statistics.median(times)


def same_ids(how: str, batch: int, found: tuple, report: Report) -> None:
    "Compare ids and the first logits with those of the way that ran first."
    first, ids, logits = FIRST.setdefault(batch, (how, *found))
    if first == how:
        return
    name = f"batch {batch}, {how} against {first}"
    bound = 2 * BF16 if "compiled" in how else BF16  # fused kernels round differently
    report.check(f"{name}: logits", error(found[1], logits), bound)
    # Untrained weights leave near ties, which rounding decides. Equality of ids is
    # checked in fp32 (`decode_right`); here we only report how many are equal.
    agree = (ids == found[0]).float().mean().item()
    report.note(**{f"{name}: share of ids that agree": agree})


FIRST: dict[int, tuple] = {}  # batch size -> (how, ids, logits) of this process


def transformers_batches(
    model: GPT, batches: tuple[int, ...], context: int, place: tuple
) -> None:
    "Let transformers continue the same prompts with the same weights."
    scale, report = place
    count = scale.pick(32, 3)
    if not (theirs := transformers_model(model, scale)):
        report.note(transformers="not installed, or older than 5")
        return
    for batch in batches:
        ids = random_ids(model.config, batch, context).to(scale.device)

        def generate(new: int, ids=ids) -> Tensor:
            limits = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
            mask = torch.ones_like(ids)
            return theirs.generate(ids, attention_mask=mask, pad_token_id=0, **limits)

        # The difference of two lengths excludes the prompt, as in our rates.
        generate(2)
        short = elapsed(lambda: generate(2), scale)
        seconds = (elapsed(lambda: generate(2 + count), scale) - short) / count
        add_row(report, "transformers", batch, context, seconds)
        theirs_ids = generate(count)[:, context:].T.cpu()
        ours = FIRST[batch][1][:count]
        agree = (theirs_ids[: len(ours)] == ours).float().mean().item()
        report.note(**{f"batch {batch}: share of ids as transformers": agree})


def transformers_model(model: GPT, scale: Scale):
    "Return their model with our weights, or None if the class does not exist."
    try:
        from transformers import NanoChatConfig, NanoChatForCausalLM
    except ImportError:
        return None
    from nanochat.hf import hf_config, hf_weights

    # With end ids that never occur, every row has the requested length.
    apart = ("architectures", "model_type", "pad_token_id", "dtype")
    told = {k: v for k, v in hf_config(model.config, 0, 1).items() if k not in apart}
    with torch.device(scale.device):
        theirs = NanoChatForCausalLM(NanoChatConfig(**told))
    for p in theirs.parameters():  # not the rotary tables, which stay in fp32
        p.data = p.data.to(torch.bfloat16)
    theirs.load_state_dict(hf_weights(model))
    return theirs.eval()
