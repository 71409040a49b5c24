"""The loss that never holds all logits: the same numbers, in a fraction of the memory."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from torch._dynamo.utils import counters

from nanochat import head
from nanochat.functional import cross_entropy, softcap
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import linear_cross_entropy


def plainly(x, weight, targets, cap, reduction, vocab_size=None):
    logits = x @ weight[:vocab_size].T
    return cross_entropy(softcap(logits, cap) if cap else logits, targets, reduction)


def loss_and_gradients(loss_of, x, weight, targets, *rest):
    "Loss, and gradients of a sum in which every entry of the loss weighs differently."
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(x, weight, targets, *rest)
    scales = torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss.dtype)
    (loss * scales).sum().backward()
    return loss.detach(), x.grad, weight.grad


def inputs(rows: int, width: int, vocab: int, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) * width**-0.5).to(dtype)
    return x, weight, torch.randint(-1, vocab, (rows,), generator=g)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("cap", [15.0, 0.0, 1.0])
def test_loss_and_gradients_equal_the_naive_ones(cap, reduction):
    "Within 1e-6 of the largest entry, with chunks that do not divide the rows."
    args = (*inputs(700, 64, 4099), cap, reduction)
    whole, pieces = (
        loss_and_gradients(f, *args) for f in (plainly, linear_cross_entropy)
    )
    for a, b in zip(whole, pieces):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, a.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 50),
    chunk=st.integers(1, 400),
    cap=st.sampled_from([0.0, 2.0, 15.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_chunk_size_gives_the_same(
    rows, vocab, chunk, cap, reduction, padding, seed
):
    x, weight, targets = inputs(rows, 8, vocab + padding, seed, torch.float64)
    targets = targets.clamp(max=vocab - 1)
    kept = head.CHUNK["cpu"]
    rows_kept = head.MIN_ROWS
    head.CHUNK["cpu"], head.MIN_ROWS = chunk, 1
    try:
        args = (x, weight, targets, cap, reduction)
        whole, pieces = (
            loss_and_gradients(partial(f, vocab_size=vocab), *args)
            for f in (plainly, linear_cross_entropy)
        )
    finally:
        head.CHUNK["cpu"], head.MIN_ROWS = kept, rows_kept
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not pieces[2][vocab:].any()  # rows of padding learn nothing


def test_gradients_by_finite_differences():
    x, weight, targets = inputs(5, 4, 7, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):

        def f(x, w, how=reduction):
            return linear_cross_entropy(x, w, targets, 3.0, how)

        torch.autograd.gradcheck(f, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_is_zero_and_not_nan(reduction):
    x, weight, targets = inputs(9, 8, 11)
    args = (x, weight, torch.full_like(targets, -1), 15.0, reduction)
    for value in loss_and_gradients(linear_cross_entropy, *args):
        assert not value.any()


def test_no_gradients_are_made_where_none_are_wanted(monkeypatch):
    made = []
    told = head.logits_gradient
    monkeypatch.setattr(head, "logits_gradient", lambda *a: made.append(1) or told(*a))
    x, weight, targets = inputs(9, 8, 11)
    with torch.no_grad():
        linear_cross_entropy(x, weight.requires_grad_(), targets)
    assert not made
    linear_cross_entropy(x, weight, targets)
    assert made


def test_bfloat16_stream_keeps_a_float32_gradient_of_the_head():
    x, weight, targets = inputs(64, 32, 101)
    rough = loss_and_gradients(
        linear_cross_entropy, x.bfloat16(), weight, targets, 15.0
    )
    exact = loss_and_gradients(plainly, x, weight, targets, 15.0, "mean")
    assert rough[0].dtype == rough[2].dtype == torch.float32
    assert rough[1].dtype == torch.bfloat16
    for a, b in zip(rough, exact):
        assert (a - b).norm() < 0.02 * b.norm() + 1e-6


@pytest.mark.slow
def test_memory_is_at_most_a_quarter_of_the_naive_loss():
    "At B*T = 2,048 and V = 32,768; `make bench` measures 8,192 and 65,536."
    args = (*inputs(2048, 64, 32_768), 15.0, "mean")
    peaks = [
        peak_bytes(lambda f=f: loss_and_gradients(f, *args))
        for f in (plainly, linear_cross_entropy)
    ]
    assert peaks[1] < peaks[0] / 4


def test_a_wrong_reduction_is_an_error():
    with pytest.raises(ValueError, match="use 'mean', 'sum' or 'none'"):
        linear_cross_entropy(*inputs(2, 4, 5), 15.0, "average")


def test_first_loss_is_the_logarithm_of_the_vocabulary():
    for vocab in (61, 4096):
        model = GPT(GPTConfig(16, vocab, 2, 2, 2, 32))
        model.init_weights(1)
        ids = torch.randint(vocab, (3, 17), generator=torch.Generator().manual_seed(0))
        loss = model(ids[:, :-1], ids[:, 1:]).item()
        assert loss == pytest.approx(math.log(vocab), abs=1e-5)


@pytest.mark.slow
def test_model_compiles_as_one_graph_with_the_same_gradients(monkeypatch):
    "No graph break in the step: neither the default model's nor with all options on."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    options = {"window_pattern": "SL", "value_embeds": True, "stream_scalars": True}
    for fields in ({}, options | {"qk_scale": 1.2, "pad_vocab_to": 64, "n_kv_head": 1}):
        sizes = {"sequence_len": 16, "vocab_size": 50, "n_layer": 2, "n_head": 2}
        config = GPTConfig(**sizes | {"n_kv_head": 2, "n_embd": 32} | fields)
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.double()  # a sum over the stream cancels: fp32 leaves three digits of it
        ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
        results = []
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for f in (model, compiled):
            loss = f(ids[:, :-1], ids[:, 1:], loss_reduction="sum")
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
            model.zero_grad()
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
