"""Properties of the shared functions that a chapter's cells cannot show."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.functional import (
    cross_entropy,
    nats_to_bits,
    relu2,
    rms_norm,
    sample_next,
    softcap,
    upcast,
)

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 9)
calm = settings(deadline=None, max_examples=40)


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_and_targets(seed: int, B: int, V: int, scale: float = 5.0):
    g = dice(seed)
    z = scale * torch.randn(B, V, generator=g, dtype=torch.float64)
    return z, torch.randint(0, V, (B,), generator=g)


# -- the loss ---------------------------------------------------------------------


@calm
@given(seeds, sizes, sizes, st.sampled_from(["mean", "sum", "none"]))
def test_cross_entropy_equals_torch(seed, B, V, reduction):
    z, y = logits_and_targets(seed, B, V)
    want = F.cross_entropy(z, y, reduction=reduction)
    torch.testing.assert_close(cross_entropy(z, y, reduction), want)


@calm
@given(seeds, sizes, sizes)
def test_cross_entropy_skips_minus_one(seed, B, V):
    z, y = logits_and_targets(seed, B, V)
    keep = torch.rand(B, generator=dice(seed)) < 0.5
    masked = y.masked_fill(~keep, -1)
    each = cross_entropy(z, masked, "none")
    assert each[~keep].eq(0).all()
    want = cross_entropy(z[keep], y[keep]) if keep.any() else torch.zeros(())
    torch.testing.assert_close(cross_entropy(z, masked), want, check_dtype=False)


def test_cross_entropy_of_nothing_is_zero_with_zero_gradient():
    z = torch.randn(3, 7, generator=dice(0), requires_grad=True)
    loss = cross_entropy(z, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0 and z.grad.eq(0).all()
    assert cross_entropy(z[:0], torch.empty(0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_runs_in_float32(dtype):
    z = torch.randn(4, 11, generator=dice(1)).to(dtype)
    y = torch.arange(4)
    loss = cross_entropy(z, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(z.float(), y))


def test_cross_entropy_keeps_shape():
    z = torch.randn(2, 3, 5)
    y = torch.zeros(2, 3, dtype=torch.int64)
    assert cross_entropy(z, y, "none").shape == (2, 3)
    torch.testing.assert_close(cross_entropy(z, y, "none").mean(), cross_entropy(z, y))
    # A transposed view (no single stride over the rows) must work as well.
    swapped = cross_entropy(z.transpose(0, 1), y.T, "none")
    torch.testing.assert_close(swapped.T, cross_entropy(z, y, "none"))
    assert cross_entropy(z[0, 0], y[0, 0]).shape == ()


@calm
@given(seeds, sizes, st.integers(2, 9), st.floats(-1e4, 1e4))
def test_shifting_all_logits_changes_nothing(seed, B, V, shift):
    z, y = logits_and_targets(seed, B, V)
    torch.testing.assert_close(cross_entropy(z + shift, y), cross_entropy(z, y))


@calm
@given(seeds, sizes, st.integers(2, 9))
def test_permuting_the_vocabulary_changes_nothing(seed, B, V):
    z, y = logits_and_targets(seed, B, V)
    order = torch.randperm(V, generator=dice(seed + 1))
    where = order.argsort()
    torch.testing.assert_close(
        cross_entropy(z[:, order], where[y]), cross_entropy(z, y)
    )


def test_extreme_logits_stay_finite():
    z = torch.tensor([[3e38, -3e38, 0.0], [-1e4, -1e4, -1e4]])
    assert cross_entropy(z, torch.tensor([0, 2])).isfinite()


def test_uniform_logits_cost_log_vocabulary():
    for V in (2, 256, 65_536):
        loss = cross_entropy(torch.zeros(1, V), torch.tensor([0]))
        assert loss.item() == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("reduction", ["", "Mean", "avg"])
def test_unknown_reduction_is_refused(reduction):
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(torch.zeros(1, 2), torch.tensor([0]), reduction)


def test_target_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(1, 2), torch.tensor([2]))


# -- gradients --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed):
    x = torch.randn(3, 5, generator=dice(seed), dtype=torch.float64)
    x.requires_grad_()
    y = torch.tensor([0, -1, 4])
    for f in (rms_norm, relu2, lambda x: softcap(x, 2.0)):
        assert torch.autograd.gradcheck(f, (x,))
        if f not in (rms_norm, relu2):  # their backward passes are final
            assert torch.autograd.gradgradcheck(f, (x,))
    for how in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda x, h=how: cross_entropy(x, y, h), (x,))


# -- norm, activation, cap, bits --------------------------------------------------


@calm
@given(seeds, sizes, st.integers(1, 33), st.floats(0.5, 1e4))
def test_rms_norm_forgets_scale_and_keeps_direction(seed, B, C, scale):
    x = torch.randn(B, C, generator=dice(seed), dtype=torch.float64) + 0.1
    y = rms_norm(x)
    torch.testing.assert_close(y, x / x.square().mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(rms_norm(scale * x), y)
    torch.testing.assert_close(y.norm(dim=-1), torch.full((B,), C**0.5).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_of_a_gpu_without_gradients_is_pytorchs(dtype):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = F.rms_norm(x, (96,), eps=1e-6)
    torch.testing.assert_close(rms_norm(x, 1e-6), theirs)
    with torch.no_grad():  # "meta" takes the way of every device that is no CPU
        y = rms_norm(x.to("meta"))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "meta")


def test_rms_norm_of_zero_is_zero():
    assert rms_norm(torch.zeros(2, 4)).eq(0).all()


@calm
@given(st.floats(-1e3, 1e3), st.floats(0.5, 100))
def test_softcap_is_odd_bounded_and_monotone(x, cap):
    z = torch.tensor([x, x + 0.5], dtype=torch.float64)
    s = softcap(z, cap)
    assert s.abs().max() <= cap and s[0] <= s[1]
    torch.testing.assert_close(softcap(-z, cap), -s)
    assert (s.abs() <= z.abs() + 1e-12).all()


def test_dtypes():
    assert softcap(torch.ones(1).bfloat16(), 15.0).dtype == torch.float32
    assert upcast(torch.ones(1).double()).dtype == torch.float64
    assert rms_norm(torch.ones(1, 2).bfloat16()).dtype == torch.bfloat16
    assert relu2(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0, 0, 9]
    assert nats_to_bits(math.log(8)) == pytest.approx(3)
    assert nats_to_bits(torch.tensor(math.log(2))).item() == pytest.approx(1)


# -- sampling ---------------------------------------------------------------------


def chi_square_p(counts, expected) -> float:
    "Upper tail of the chi-square statistic, one degree of freedom less than bins."
    x = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), x / 2).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 0, 3, 50])
def test_frequencies_follow_the_softmax(temperature, top_k):
    N = 20_000
    z = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -1.0])
    p = (z / temperature).softmax(-1)
    if top_k:
        kept = z.topk(min(top_k, 6)).indices
        p = torch.zeros(6).index_copy(0, kept, p[kept] / p[kept].sum())
    ids = sample_next(z.expand(N, 6), temperature, top_k, dice(42))
    assert ids.shape == (N, 1) and ids.dtype == torch.int64
    counts = torch.bincount(ids.flatten(), minlength=6).float()
    seen = p > 0
    assert counts[~seen].sum() == 0
    assert chi_square_p(counts[seen], N * p[seen]) > 1e-3


def test_rows_are_independent_and_seeded():
    z = torch.zeros(64, 100)
    a, b, c = (sample_next(z, generator=dice(s)) for s in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and a.unique().numel() > 20


@calm
@given(seeds, sizes, sizes, st.sampled_from([0.0, 1e-45, 1e-9]))
def test_cold_sampling_is_argmax(seed, B, V, temperature):
    z, _ = logits_and_targets(seed, B, V)
    best = z.argmax(-1, keepdim=True)
    assert sample_next(z, temperature).equal(best)
    assert sample_next(z, 1.0, top_k=1).equal(best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [2e-6, 1.0, 1e6])
def test_sampling_survives_extremes(dtype, temperature):
    z = torch.tensor([[6e4, -6e4, 0.0], [float("-inf"), 0.0, float("-inf")]]).to(dtype)
    ids = sample_next(z, temperature, generator=dice(0))
    assert ids[1].item() == 1
    if temperature <= 1:
        assert ids[0].item() == 0


@pytest.mark.parametrize("kwargs", [
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_k": -1},
])  # fmt: skip
def test_bad_sampling_settings_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        sample_next(torch.zeros(1, 3), **kwargs)
