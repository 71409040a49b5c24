"""The model: cached and plain, shared heads, ragged rows, and what it costs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanochat.accounting import flops_per_token, kv_cache_bytes, parameter_counts
from nanochat.attention import KVCache
from nanochat.gpt import GPT, GPTConfig

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
    model, ids = random_model(*heads), random_ids(2)
    with torch.inference_mode():
        whole = model(ids)
    torch.testing.assert_close(in_chunks(model, ids, [1] * T), whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, T), min_size=1), st.sampled_from(HEADS))
def test_any_chunks_equal_at_once(sizes, heads):
    while sum(sizes) > T:
        sizes = sizes[:-1] or [T]
    model, ids = random_model(*heads), random_ids(2, sum(sizes))
    with torch.inference_mode():
        whole = model(ids)
    torch.testing.assert_close(in_chunks(model, ids, sizes), whole)


@pytest.mark.parametrize("heads", HEADS)
def test_shared_heads_equal_repeated_ones(heads):
    few = random_model(*heads)
    many = random_model(heads[0], heads[0])
    weights, repeat = few.state_dict(), heads[0] // heads[1]
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
    model, ids = random_model(*heads), random_ids(len(lengths))
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
    model, ids = random_model(), random_ids(5)
    together = model(ids)
    for r in range(5):
        torch.testing.assert_close(together[r], model(ids[r : r + 1])[0])
    ids[3] = 0
    assert torch.equal(model(ids)[:3], together[:3])


def test_a_later_token_changes_nothing_before_it():
    model, ids = random_model(), random_ids(1)
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
    cache = cache_for(model, 1)
    model(random_ids(1), kv_cache=cache)
    with pytest.raises(ValueError, match="positions"):
        model(random_ids(1, 1), kv_cache=cache)
    small = cache_for(model, 1, capacity=4)
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
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
    model, ids = random_model(), random_ids(1, 6)
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


SIZES = [
    (4, 36.70e6, 1.447e8),
    (8, 92.27e6, 4.530e8),
    (10, 133.04e6, 7.039e8),
    (12, 185.60e6, 1.038e9),
    (16, 335.5e6, 2.013e9),
    (20, 560_988_160, 3.491758e9),
    (24, 880.8e6, 5.587e9),
    (26, 1.082e9, 6.90e9),
    (32, 1_879_048_192, 1.20796e10),
    (34, 2_217_082_880, 1.4265e10),
]


@pytest.mark.parametrize(("depth", "parameters", "flops"), SIZES)
def test_published_sizes(depth, parameters, flops):
    config = published(depth)
    assert parameter_counts(config)["total"] == pytest.approx(parameters, rel=5e-4)
    assert flops_per_token(config) == pytest.approx(flops, rel=5e-4)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == model.num_params()
    assert model.estimate_flops() == flops_per_token(config)


def test_depth_20_to_the_digit():
    assert parameter_counts(published(20))["total"] == 560_988_160
    assert flops_per_token(published(20)) == 3_491_758_080


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flops_agree_with_a_counter(kv_heads):
    config = GPTConfig(256, 2048, 3, 4, kv_heads, 256)
    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(2, 256, dtype=torch.int64)
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
