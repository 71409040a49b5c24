"""Attention's kernels and its cache: the fallback, windows, growth, positions."""

import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.attention import (
    KVCache,
    attend,
    attend_in_blocks,
    flash_kernel,
    insert,
    visible,
)


@pytest.fixture
def fresh_choice():
    flash_kernel.cache_clear()
    yield
    flash_kernel.cache_clear()


def qkv(rows=2, queries=7, keys=7, heads=4, kv_heads=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shape = lambda t, h: torch.randn(rows, t, h, 8, generator=g).to(dtype)
    return shape(queries, heads), shape(keys, kv_heads), shape(keys, kv_heads)


def hopper(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def by_mask(q, k, v, window, scale):
    "The same attention by PyTorch, with the mask written out."
    T, S = q.size(1), k.size(1)
    mask = visible(torch.arange(S - T, S)[None], S, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True, scale=scale
    )
    return y.transpose(1, 2)


def stand_in(calls: list):
    "What FlashAttention-3 computes, by its own interface: windows count from the left."

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        calls.append((causal, window_size))
        left = window_size[0] + 1 if window_size[0] >= 0 else 0
        return by_mask(q, k, v, left, softmax_scale)

    return flash_attn_func


def test_without_a_gpu_pytorch_attends(fresh_choice, capsys):
    assert flash_kernel() is None
    assert capsys.readouterr().out == ""


def test_hopper_without_the_package_falls_back_and_says_so(
    fresh_choice, monkeypatch, capsys
):
    hopper(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert flash_kernel() is None and flash_kernel() is None
    assert capsys.readouterr().out.count("flash_attn_interface is missing") == 1


def test_hopper_with_the_package_uses_it_and_says_so_once(
    fresh_choice, monkeypatch, capsys
):
    hopper(monkeypatch)
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = stand_in([])
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert flash_kernel() is flash_kernel() is module.flash_attn_func
    assert capsys.readouterr().out.count("FlashAttention-3") == 1


def test_older_gpus_do_not_look_for_it(fresh_choice, monkeypatch):
    hopper(monkeypatch, (8, 0))
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    assert flash_kernel() is None


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("queries", [7, 1, 3])
def test_the_flash_branch_equals_pytorchs(queries, window):
    "In bfloat16, for a whole row, one token, and a chunk after a prefix."
    q, k, v = qkv(queries=queries, dtype=torch.bfloat16)
    calls = []
    fused = attend(q, k, v, None, window, 0.2, stand_in(calls))
    plain = attend(q, k, v, None, window, 0.2)
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)
    assert calls == [(True, (window - 1, 0) if window else (-1, -1))]


def test_flash_is_not_asked_for_what_it_cannot_do():
    refuse = lambda *args, **options: 1 / 0
    attend(*qkv(), flash=refuse)  # float32
    cache = KVCache(2, 2, 9, 8, 1, dtype=torch.bfloat16)
    q, k, v = qkv(queries=1, keys=1, dtype=torch.bfloat16)
    cache.set_lengths([5, 2])
    attend(q, *insert(cache, 0, k, v), cache, flash=refuse)  # rows of unequal length


def test_a_cache_that_may_grow_gives_what_a_large_one_gives():
    small, large = KVCache(2, 2, 3, 8, 1, grow=True), KVCache(2, 2, 40, 8, 1)
    q, k, v = qkv(keys=37, queries=37)
    for part in torch.arange(37).split([2, 1, 5, 1, 20, 8]):
        out = []
        for cache in (small, large):
            keys = insert(cache, 0, k[:, part], v[:, part])
            out.append(attend(q[:, part], *keys, cache))
            cache.advance(len(part))
        assert torch.equal(*out)
    assert small.k_cache.size(2) == 48  # 3 doubled until 37 fit


def test_a_cache_that_may_not_grow_says_what_to_do():
    cache = KVCache(1, 2, 3, 8, 1)
    with pytest.raises(ValueError, match=r"holds 3 positions, 4 are needed.*grow=True"):
        insert(cache, 0, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))
    assert not cache.k_cache.any() and cache.get_pos() == 0  # nothing was lost


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 150),
    window=st.sampled_from([0, 1, 5, 64, 70, 500]),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)]),
    scale=st.sampled_from([None, 0.7]),
)
def test_blocks_equal_a_mask_gradients_too(queries, window, heads, scale):
    inputs = qkv(2, queries, queries, *heads, dtype=torch.float64)
    weigh = torch.linspace(-1, 1, inputs[0].numel()).view(inputs[0].shape).double()
    results = []
    for f in (attend_in_blocks, by_mask):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        y = f(q, k, v, window, scale)
        (y * weigh).sum().backward()
        results.append((y.detach(), q.grad, k.grad, v.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_training_and_reading_agree():
    "The blocks of training and PyTorch's kernel of inference, in float32."
    for window in (0, 9):
        inputs = qkv(queries=100, keys=100)
        read = attend(*inputs, None, window)
        trained = attend(*(x.requires_grad_() for x in inputs), None, window)
        torch.testing.assert_close(trained, read, rtol=1e-5, atol=1e-6)
        assert type(trained.grad_fn).__name__ == "BlockAttentionBackward"
