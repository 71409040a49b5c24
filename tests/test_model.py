"""The model: cached and plain, shared heads, ragged rows, and what it costs."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nanochat.accounting import (
    decode_flops,
    flops_per_token,
    kv_cache_bytes,
    parameter_counts,
    prefill_flops,
    training_memory,
)
from nanochat.attention import KVCache, apply_rotary
from nanochat.functional import relu2, rms_norm
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import setup_optimizer

T, V = 24, 61


def random_model(n_head: int = 4, n_kv_head: int = 4, n_layer: int = 2) -> GPT:
    "A model in which no weight is zero."
    model = GPT(GPTConfig(T, V, n_layer, n_head, n_kv_head, 8 * n_head))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 1.0 if "wte" in name else p.size(1) ** -0.5
            p.normal_(std=std, generator=generator)
    return model


def random_ids(rows: int, length: int = T, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (rows, length), generator=generator)


def cache_for(model: GPT, rows: int, capacity: int = T) -> KVCache:
    c = model.config
    return KVCache(rows, c.n_kv_head, capacity, c.n_embd // c.n_head, c.n_layer)


@torch.inference_mode()
def in_chunks(model: GPT, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = cache_for(model, len(ids))
    logits = [model(part, kv_cache=cache) for part in ids.split(sizes, dim=1)]
    assert cache.get_pos() == ids.size(1)
    return torch.cat(logits, dim=1)


HEADS = [(4, 4), (4, 2), (4, 1), (1, 1)]


@pytest.mark.parametrize("heads", HEADS)
def test_token_by_token_equals_at_once(heads):
    model = random_model(*heads)
    ids = random_ids(2)
    with torch.inference_mode():
        whole = model(ids)
    torch.testing.assert_close(in_chunks(model, ids, [1] * T), whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, T), min_size=1), st.sampled_from(HEADS))
def test_any_chunks_equal_at_once(sizes, heads):
    while sum(sizes) > T:
        sizes = sizes[:-1] or [T]
    model = random_model(*heads)
    ids = random_ids(2, sum(sizes))
    with torch.inference_mode():
        whole = model(ids)
    torch.testing.assert_close(in_chunks(model, ids, sizes), whole)


@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads_equal_repeated_ones(heads):
    few = random_model(*heads)
    many = random_model(heads[0], heads[0])
    weights = few.state_dict()
    repeat = heads[0] // heads[1]
    for name, w in weights.items():
        if name.endswith(("c_k.weight", "c_v.weight")):
            per_head = w.view(heads[1], 8, -1).repeat_interleave(repeat, dim=0)
            weights[name] = per_head.flatten(0, 1)
    many.load_state_dict(weights)
    torch.testing.assert_close(few(random_ids(2)), many(random_ids(2)))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 4), max_size=3),
    heads=st.sampled_from(HEADS),
)
def test_ragged_rows_equal_one_by_one(lengths, steps, heads):
    model = random_model(*heads)
    ids = random_ids(len(lengths))
    cache = cache_for(model, len(lengths))
    with torch.inference_mode():
        model(ids[:, : max(lengths)], kv_cache=cache)
        cache.set_lengths(lengths)
        at = list(lengths)
        for n in steps:
            new = torch.stack([ids[r, p : p + n] for r, p in enumerate(at)])
            logits = model(new, kv_cache=cache)
            at = [p + n for p in at]
            for r, p in enumerate(at):
                alone = model(ids[r : r + 1, :p])[0, -n:]
                torch.testing.assert_close(logits[r], alone)
    assert cache.cache_seqlens.tolist() == at


def test_rows_of_a_batch_do_not_touch():
    model = random_model()
    ids = random_ids(5)
    together = model(ids)
    for r in range(5):
        torch.testing.assert_close(together[r], model(ids[r : r + 1])[0])
    ids[3] = 0
    assert torch.equal(model(ids)[:3], together[:3])


def test_a_later_token_changes_nothing_before_it():
    model = random_model()
    ids = random_ids(1)
    before = model(ids)
    for t in (1, 10, T - 1):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_too_many_positions_are_an_error():
    model = random_model()
    with pytest.raises(ValueError, match=f"{T + 1} positions, but the context is {T}"):
        model(random_ids(1, T + 1))
    with pytest.raises(ValueError, match="no tokens"):
        model(random_ids(1, 0))
    cache = cache_for(model, 1)
    model(random_ids(1), kv_cache=cache)
    with pytest.raises(ValueError, match="positions"):
        model(random_ids(1, 1), kv_cache=cache)
    small = cache_for(model, 1, capacity=4)
    with pytest.raises(ValueError, match="holds 4 positions, but 5 are needed"):
        model(random_ids(1, 5), kv_cache=small)


def test_ragged_positions_overflow_is_an_error():
    model = random_model()
    cache = cache_for(model, 2)
    model(random_ids(2), kv_cache=cache)
    cache.set_lengths([T, 3])
    with pytest.raises(ValueError, match="positions"):
        model(random_ids(2, 1), kv_cache=cache)


def test_naive_generation_is_deterministic():
    model = random_model()
    a, b = (list(model.generate([1, 2], 10, seed=s)) for s in (3, 3))
    assert a == b != list(model.generate([1, 2], 10, seed=4))
    greedy = [list(model.generate([1, 2], 8, temperature=0, seed=s)) for s in (0, 1)]
    assert greedy[0] == greedy[1]
    ids = [1, 2]
    for token in greedy[0]:
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)
    assert len(list(model.generate([1] * (T - 2), 10))) == 2


def test_prefix_copied_to_every_row():
    model = random_model()
    ids = random_ids(1, 6)
    one, three = cache_for(model, 1), cache_for(model, 3)
    with torch.inference_mode():
        model(ids, kv_cache=one)
        three.prefill(one)
        new = random_ids(3, 2)
        logits = model(new, kv_cache=three)
        whole = model(torch.cat([ids.expand(3, 6), new], 1))[:, -2:]
    torch.testing.assert_close(logits, whole)


# ---- Accounting: the published sizes with a vocabulary of 65,536 and 2,048 positions


def published(depth: int, context: int = 2048) -> GPTConfig:
    heads = max(1, math.ceil(depth * 64 / 128))
    return GPTConfig(context, 65_536, depth, heads, heads, 64 * depth)


# depth, parameters, operations per token; tokens at 20 per parameter, steps of 2^19, all
SIZES = [
    (4, "36.70e6", "1.447e8", "0.734e9", 1_400, "1.06e17"),
    (8, "92.27e6", "4.530e8", "1.85e9", 3_520, "8.4e17"),
    (10, "133.04e6", "7.039e8", "2.66e9", 5_075, "1.87e18"),
    (12, "185.60e6", "1.038e9", "3.71e9", 7_080, "3.85e18"),
    (16, "335.5e6", "2.013e9", "6.71e9", 12_800, "1.35e19"),
    (20, "560988160", "3.491758e9", "11.22e9", 21_400, "3.918e19"),
    (24, "880.8e6", "5.587e9", "17.6e9", 33_600, "9.84e19"),
    (26, "1.082e9", "6.90e9", "21.6e9", 41_275, "1.49e20"),
    (32, "1879048192", "1.20796e10", "37.58e9", 71_680, "4.54e20"),
    (34, "2217082880", "1.4265e10", "44.3e9", 84_575, "1.265e21"),
]


def same_digits(value: float, printed: str) -> bool:
    "Whether a number is what was printed, to all the digits that were."
    digits, _, power = printed.partition("e")
    decimals = len(digits.partition(".")[2])
    return f"{value / 10 ** int(power or 0):.{decimals}f}" == digits


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    depth, parameters, flops, tokens, steps, run = size
    config = published(depth)
    total = parameter_counts(config)["total"]
    work = flops_per_token(config)
    assert same_digits(total, parameters)
    assert same_digits(work, flops)
    assert same_digits(20 * total, tokens)
    assert 20 * total // 2**19 == steps
    factor = 40 if depth == 34 else 20  # that run read 40 tokens per parameter
    assert same_digits(factor * total * work, run)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == model.num_params() == total
    assert model.estimate_flops() == work


# nanochat in July 2026: 32,768 tokens, value embeddings, scalars, windows, smear, backout.
LATER_SIZES = [
    (12, "286261730", "110.1e6", "7.597e8"),
    (16, "536.9e6", "234.9e6", "1.5855e9"),
    (20, "896.5e6", "435.2e6", "2.886e9"),
    (24, "1384122122", "729.8e6", "4.775e9"),
    (26, "1.682e9", "918.4e6", "5.991e9"),
    (32, "2.819e9", "1.678e9", "1.077e10"),
]


@pytest.mark.parametrize(("depth", "total", "scaling", "flops"), LATER_SIZES)
def test_later_sizes(depth, total, scaling, flops):
    config = replace(
        published(depth),
        vocab_size=32_768,
        window_pattern="SSSL",
        short_window=512,
        value_embeds=True,
        stream_scalars=True,
        smear=True,
        backout=True,
    )
    counts = parameter_counts(config)
    assert same_digits(counts["total"], total)
    matrices = sum(counts[m] for m in ("attention", "mlp", "gates", "lm_head"))
    assert same_digits(matrices, scaling)
    assert same_digits(flops_per_token(config), flops)


def test_depth_20_to_the_digit():
    assert parameter_counts(published(20))["total"] == 560_988_160
    assert flops_per_token(published(20)) == 3_491_758_080


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flops_agree_with_a_counter(kv_heads):
    config = GPTConfig(256, 2048, 3, 4, kv_heads, 256)
    with torch.device("meta"):
        model = GPT(config)
        ids = torch.zeros(2, 256, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(flops_per_token(config), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(flops_per_token(config, training=False), rel=0.01)


def test_cache_bytes_are_the_caches_bytes():
    model = random_model(4, 2)
    cache = cache_for(model, 3)
    held = cache.k_cache.nbytes + cache.v_cache.nbytes
    assert kv_cache_bytes(model.config, 3, bytes_per_value=4) == held
    with_ids = replace(model.config, smear=True)
    held += cache.token_ids.nbytes
    assert kv_cache_bytes(with_ids, 3, bytes_per_value=4) == held


# ---- A config that makes no sense, ids that the tables lack


WRONG = [
    ({"n_layer": 0}, "n_layer=0: use at least 1"),
    ({"vocab_size": -3, "n_head": 0}, "vocab_size=-3, n_head=0: use at least 1"),
    (
        {"n_embd": 770},
        "n_embd=770 is not an even multiple of n_head=6: use a multiple of 12",
    ),
    ({"n_embd": 18}, "use a multiple of 12"),
    ({"n_kv_head": 4}, "n_kv_head=4 must divide n_head=6"),
    ({"n_kv_head": 12}, "n_kv_head=12 must divide n_head=6"),
    ({"window_pattern": ""}, "window_pattern='': use the letters L and S"),
    ({"window_pattern": "SsL"}, "window_pattern='SsL': use the letters L and S"),
    ({"short_window": -1}, "short_window=-1 must not be negative: 0 switches"),
    ({"softcap": -1.0}, "softcap=-1.0 and short_window=0 must not be negative"),
    ({"rope_base": 0.0}, "rope_base=0.0, qk_scale=1.0 and norm_eps"),
    ({"qk_scale": -2.0}, "qk_scale=-2.0 and norm_eps"),
    ({"mlp_ratio": 0}, "mlp_ratio=0, rope_base=10000.0, qk_scale=1.0 and"),
    ({"pad_vocab_to": 0}, "pad_vocab_to=0 must be at least 1"),
    ({"value_embeds": True, "gate_inputs": 0}, "gate_inputs=0 must be between 1 and"),
    (
        {"value_embeds": True, "gate_inputs": 769},
        "gate_inputs=769 must be between 1 and n_",
    ),
    ({"smear": True, "smear_inputs": 0}, "smear_inputs=0 must be between 1 and n_"),
    ({"smear": True, "smear_inputs": 769}, "smear_inputs=769 must be between 1 and"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_config_says_what_and_what_instead(fields, message):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**fields)
    assert message in str(caught.value)


CONFIGS = {
    "sequence_len": st.integers(0, 40),
    "vocab_size": st.integers(0, 90),
    "n_layer": st.integers(0, 5),
    "n_head": st.integers(0, 6),
    "n_kv_head": st.integers(0, 6),
    "n_embd": st.integers(0, 12).map(lambda n: 4 * n) | st.integers(-1, 50),
    "softcap": st.sampled_from([0.0, 15.0, -1.0]),
    "mlp_ratio": st.integers(0, 4),
    "window_pattern": st.text("LSX", max_size=4),
    "short_window": st.integers(-1, 50),
    "value_embeds": st.booleans(),
    "gate_inputs": st.integers(0, 20),
    "stream_scalars": st.booleans(),
    "pad_vocab_to": st.integers(0, 64),
    "smear": st.booleans(),
    "smear_inputs": st.integers(0, 20),
    "backout": st.booleans(),
}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional=CONFIGS))
def test_a_config_is_refused_or_makes_a_model_of_the_told_size(fields):
    small = {"sequence_len": 16, "vocab_size": 40, "n_layer": 2, "n_embd": 24}
    fields = small | fields
    try:
        config = GPTConfig(**fields)
    except ValueError as error:
        assert any(f"{n}={fields[n]!r}" in str(error) for n in fields) or (
            "n_head=6" in str(error)
        )
        return
    with torch.device("meta"):
        model = GPT(config)
        ids = torch.zeros(1, config.sequence_len, dtype=torch.int64)
        assert model(ids).shape == (1, config.sequence_len, config.vocab_size)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    counts = parameter_counts(config)
    assert sum(sizes.values()) == counts["total"] == sum(counts.values()) // 2
    for group, part in [("wte", "wte"), ("lm_head", "lm_head"), ("mlp", ".mlp.")]:
        assert sum(size for n, size in sizes.items() if part in n) == counts[group]
    assert min(flops_per_token(config), prefill_flops(config, 3)) > 0


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (
            [[0, V]],
            None,
            f"token ids run from 0 to {V}, but the model knows 0 to {V - 1}",
        ),
        (
            [[-1, 5]],
            None,
            f"token ids run from -1 to 5, but the model knows 0 to {V - 1}",
        ),
        (
            [[0, 1]],
            [[2, V]],
            f"target ids run from 2 to {V}, but the model knows -1 to",
        ),
        ([[0, 1]], [[-2, 0]], "target ids run from -2 to 0, but the model knows -1 to"),
    ],
)
def test_ids_that_the_model_lacks_are_named(ids, targets, message):
    targets = targets and torch.tensor(targets)
    with pytest.raises(ValueError) as caught:
        random_model()(torch.tensor(ids), targets)
    assert message in str(caught.value)
    assert "with the model's own tokenizer" in str(caught.value)


def test_ids_at_the_edge_are_fine():
    model = random_model()
    model(torch.tensor([[0, V - 1]]), torch.tensor([[-1, V - 1]]))


# ---- How it starts


OPTIONS = {
    "value_embeds": True,
    "gate_inputs": 6,
    "stream_scalars": True,
    "qk_scale": 1.2,
    "rope_base": 100_000.0,
    "window_pattern": "SSL",
    "short_window": 5,
    "softcap": 10.0,
    "pad_vocab_to": 16,
    "smear": True,
    "smear_inputs": 5,
    "backout": True,
}
EACH = [{}, *({name: value} for name, value in OPTIONS.items()), OPTIONS]


@pytest.mark.parametrize("fields", EACH)
def test_filling_leaves_nothing_of_what_was_there(fields):
    config = GPTConfig(T, V, 4, 4, 2, 32, **fields)
    models = []
    for before in (math.nan, 7.0):
        with torch.device("meta"):
            model = GPT(config)
        for x in (*model.to_empty(device="cpu").parameters(), *model.buffers()):
            x.data.fill_(before)
        model.init_weights(3)
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.equal(a, b) and a.isfinite().all()
    ids = random_ids(3)
    assert torch.equal(models[0](ids), models[1](ids))
    torch.testing.assert_close(
        models[0](ids, ids).item(), math.log(V), rtol=0, atol=1e-5
    )
    models[0](ids, ids).backward()
    moved = {n for n, p in models[0].named_parameters() if p.grad.any()}
    assert moved == {"lm_head.weight"}


# ---- The options, through everything


def model_with(
    fields: dict, n_head: int = 4, n_kv_head: int = 2, n_layer: int = 4
) -> GPT:
    "A model in which no weight is what it starts as."
    model = GPT(GPTConfig(T, V, n_layer, n_head, n_kv_head, 8 * n_head, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.0, generator=generator)
            else:
                table = "wte" in name or "value_embeds" in name
                std = 1.0 if table else p.size(1) ** -0.5
                p.normal_(std=std, generator=generator)
    return model


def slow_twin(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    "Logits with every option, masks and softmax written out, one row, no cache."
    c = model.config
    w = dict(model.named_parameters())
    n = ids.size(1)
    D = c.n_embd // c.n_head
    angle = torch.outer(
        torch.arange(n), 1 / c.rope_base ** (torch.arange(0, D, 2) / D)
    )[:, None]
    back = torch.arange(n)[:, None] - torch.arange(n)
    x = rms_norm(w["transformer.wte.weight"][ids])
    if c.smear:  # e_t + lambda * sigmoid(w . e_t[:24]) * e_(t-1), from the second on
        share = (x[..., : c.smear_inputs] @ w["smear_gate.weight"][0]).sigmoid()
        share = (w["smear_lambda"] * share)[:, 1:, None]
        x = torch.cat([x[:, :1], x[:, 1:] + share * x[:, :-1]], 1)
    start = x
    after = []
    for i in range(c.n_layer):
        if c.stream_scalars:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * start
        h = f"transformer.h.{i}."
        read = rms_norm(x)
        q, k, v = (
            (read @ w[f"{h}attn.c_{m}.weight"].T).unflatten(-1, (-1, D)) for m in "qkv"
        )
        if c.value_embeds and (c.n_layer - i) % 2:
            gate = read[..., : c.gate_inputs] @ w[h + "attn.ve_gate.weight"].T
            own = w[f"value_embeds.{i}.weight"][ids].unflatten(-1, (-1, D))
            v = v + c.gate_max * gate.sigmoid()[..., None] * own
        q, k = (rms_norm(apply_rotary(y, angle.cos(), angle.sin())) for y in (q, k))
        repeat = c.n_head // c.n_kv_head
        k, v = (y.repeat_interleave(repeat, dim=2) for y in (k, v))
        score = torch.einsum("bthd,bshd->bhts", q, k) * c.qk_scale**2 / D**0.5
        short = c.window_pattern[i % len(c.window_pattern)] == "S" and i + 1 < c.n_layer
        window = (c.short_window or c.sequence_len // 4) if short else n
        seen = (back >= 0) & (back < window)
        weight = score.masked_fill(~seen, -math.inf).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weight, v).flatten(2)
        x = x + y @ w[h + "attn.c_proj.weight"].T
        up = relu2(rms_norm(x) @ w[h + "mlp.c_fc.weight"].T)
        x = x + up @ w[h + "mlp.c_proj.weight"].T
        after.append(x)
    if c.backout:
        x = x - w["backout_lambda"] * after[c.n_layer // 2]
    z = (rms_norm(x) @ w["lm_head.weight"].T)[..., : c.vocab_size]
    return c.softcap * (z / c.softcap).tanh() if c.softcap else z


WINDOWS = [
    {"window_pattern": pattern, "short_window": w}
    for pattern, w in (("S", 1), ("SL", 3), ("SSSL", 6), ("LS", 4), ("S", T), ("S", 99))
]


@pytest.mark.parametrize("fields", [*EACH, *WINDOWS, {"softcap": 0.0}])
@torch.inference_mode()
def test_every_option_equals_the_slow_twin(fields):
    model = model_with(fields)
    ids = random_ids(2)
    torch.testing.assert_close(model(ids), slow_twin(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [*EACH, *WINDOWS])
def test_options_token_by_token(fields):
    model = model_with(fields)
    ids = random_ids(2)
    with torch.inference_mode():
        whole = model(ids)
    steps = in_chunks(model, ids, [1] * T)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_smear_finds_the_token_before_in_a_copied_and_in_a_grown_cache():
    model = model_with({"smear": True, "backout": True})
    ids = random_ids(1)
    whole = model(ids)
    one = KVCache(1, 2, 4, 8, 4, grow=True)
    parts = [model(ids[:, :3], kv_cache=one), model(ids[:, 3:6], kv_cache=one)]
    assert one.k_cache.size(2) == 8 and one.token_ids.size(1) == 9
    three = KVCache(3, 2, T, 8, 4)
    three.prefill(one)
    rest = model(ids[:, 6:].expand(3, -1), kv_cache=three)
    for row in rest:
        logits = torch.cat([*(part[0] for part in parts), row])
        torch.testing.assert_close(logits, whole[0], rtol=1e-4, atol=1e-4)
    three.reset()  # and nothing stands before the first token of a new text
    again = model(ids.expand(3, -1), kv_cache=three)
    torch.testing.assert_close(again[1], whole[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, T), min_size=1),
    heads=st.sampled_from(HEADS),
    pattern=st.text("LS", min_size=1, max_size=4),
    window=st.integers(1, T + 2),
)
def test_options_in_any_chunks(sizes, heads, pattern, window):
    while sum(sizes) > T:
        sizes = sizes[:-1] or [T]
    fields = OPTIONS | {"window_pattern": pattern, "short_window": window}
    model = model_with(fields, *heads)
    ids = random_ids(2, sum(sizes))
    with torch.inference_mode():
        whole = model(ids)
    parts = in_chunks(model, ids, sizes)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", EACH)
def test_no_derivative_by_a_later_token(fields):
    model = model_with(fields)
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(0))[None, :T]
    logits = model(ids)
    tables = [model.transformer.wte, *model.value_embeds.values()]
    for t in range(T):
        grads = torch.autograd.grad(
            logits[0, t].sum(), [x.weight for x in tables], retain_graph=True
        )
        for grad in grads:  # each position has a row of its own
            assert not grad[ids[0, t + 1 :]].any()
        assert grads[0][ids[0, : t + 1]].any(-1).all()


@pytest.mark.parametrize("fields", EACH)
@torch.inference_mode()
def test_rows_and_padding_do_not_touch_with_options(fields):
    model = model_with(fields)
    ids = random_ids(4)
    together = model(ids)
    for r in range(4):
        alone = model(ids[r : r + 1])[0]
        torch.testing.assert_close(together[r], alone, rtol=1e-4, atol=1e-4)
    short = model(ids[:, :9])  # what follows, padding or not, changes nothing before
    torch.testing.assert_close(short, together[:, :9], rtol=1e-4, atol=1e-4)
    ids[:, 9:] = 0
    assert torch.equal(model(ids)[:, :9], together[:, :9])


# ---- Operations and bytes, against counters that know nothing of our formulas


@pytest.mark.slow
@pytest.mark.parametrize("fields", [*EACH, *WINDOWS])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_decode_and_prefill_flops_are_the_counters(fields, kv_heads):
    config = GPTConfig(T, V, 3, 4, kv_heads, 32, **fields)
    length = T if fields in (OPTIONS, WINDOWS[2]) else 8
    total = 0
    with torch.device("meta"):
        model = GPT(config)
        token = torch.zeros(1, 1, dtype=torch.int64)
        cache = KVCache(1, kv_heads, T, 8, 3, device="meta")
        for context in range(1, length + 1):
            with FlopCounterMode(display=False) as counter:
                model(token, kv_cache=cache)
            assert counter.get_total_flops() == decode_flops(config, context)
            total += counter.get_total_flops()
    assert total == prefill_flops(config, length)


@pytest.mark.parametrize("fields", EACH)
def test_flops_with_options_agree_with_a_counter(fields):
    "A mask saves no work in a plain kernel: windows are counted token by token above."
    config = GPTConfig(128, 1024, 4, 4, 2, 128, **fields)
    with torch.device("meta"):
        model = GPT(config)
        ids = torch.zeros(2, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    full = replace(config, window_pattern="L")
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(flops_per_token(full), rel=0.01)
    assert flops_per_token(config) <= flops_per_token(full)


def test_a_window_wider_than_the_context_saves_nothing():
    config = GPTConfig(window_pattern="S", short_window=4096)
    assert flops_per_token(config) == flops_per_token(GPTConfig())


def training_step(model: GPT, optimizer, ids: torch.Tensor, micro_batches: int) -> None:
    for _ in range(micro_batches):
        model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def peak_bytes(step) -> int:
    "Most bytes in use while a step runs, beyond those before it."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        step()
    events = sorted(watch.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return int(torch.tensor(sizes).cumsum(0).max())


# layers, width, key-value heads, rows, positions, vocabulary, micro-batches, options
STEPS = [
    (1, 128, 4, 8, 128, 512, 1, {}),
    (2, 256, 4, 1, 128, 512, 1, {}),
    (3, 128, 1, 4, 256, 1024, 2, {}),
    (4, 128, 4, 16, 64, 512, 1, {}),
    (5, 192, 2, 2, 128, 4096, 2, {}),
    (6, 256, 4, 4, 64, 300, 1, {}),
    (6, 128, 4, 8, 128, 256, 2, {"stream_scalars": True}),
    (4, 128, 4, 8, 128, 512, 1, {"value_embeds": True}),
    (5, 128, 2, 2, 128, 512, 2, {"value_embeds": True}),
    (3, 128, 4, 8, 128, 500, 1, {"pad_vocab_to": 64}),
    (4, 128, 4, 8, 128, 512, 1, {"window_pattern": "SSSL"}),
    (4, 128, 4, 2, 256, 512, 1, {"window_pattern": "SL"}),
    (3, 128, 4, 4, 128, 512, 1, {"softcap": 0.0}),
    (2, 128, 4, 16, 128, 512, 1, {"smear": True}),
    (2, 128, 4, 16, 128, 512, 1, {"backout": True}),
    (4, 128, 4, 8, 128, 512, 2, {"smear": True, "backout": True}),
    (6, 128, 2, 4, 128, 512, 1, OPTIONS),
    (2, 256, 4, 8, 128, 1024, 2, OPTIONS),
]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_training_memory_is_what_a_profiler_sees(step):
    layers, width, kv_heads, rows, length, vocab, micro_batches, fields = step
    config = GPTConfig(length, vocab, layers, 4, kv_heads, width, **fields)
    model = GPT(config)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    model.init_weights(0)
    run = partial(training_step, model, setup_optimizer(model), ids, micro_batches)
    run()  # makes the optimizer's state
    told = training_memory(config, rows, value_bytes=4, micro_batches=micro_batches)
    found = peak_bytes(run) + told["weights"] + told["optimizer"]
    assert told["total"] == pytest.approx(found, rel=0.1)
