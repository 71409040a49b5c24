"""Optimizers on one rank: against torch, against the definition, and their state."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanochat.adamw import AdamW, adamw_fused, adamw_rule, adamw_update, own_rows
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import METHODS, Muon, deal, iteration_flops, orthogonalize, symmetric
from nanochat.optim import (
    OptimConfig,
    assign_roles,
    batch_lr_scale,
    decay_scale,
    lr_scale,
    merge_state,
    muon_momentum,
    setup_optimizer,
)


def tiny_model(seed: int = 0) -> GPT:
    model = GPT(GPTConfig(16, 32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights(seed)
    return model


def fill_grads(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-10])
def test_adamw_equals_torch(weight_decay, eps):
    generator = torch.Generator().manual_seed(0)
    ours = [
        torch.randn(64, 8, generator=generator),
        torch.randn(3, generator=generator),
    ]
    theirs = [p.clone() for p in ours]
    options = dict(lr=0.01, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay)
    a = AdamW(ours, **options)
    b = torch.optim.AdamW(theirs, **options)
    for _ in range(8):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_adamw_skips_what_has_no_gradient():
    p = torch.ones(3)
    optimizer = AdamW([p], lr=0.1)
    optimizer.step()
    assert p.eq(1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (3, 24, 48)])
def test_singular_values_come_near_one(method, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix, method))
    low, high = (0.5, 1.2) if method == "polar-express" else (0.3, 1.3)
    assert values.max() < high and values.median() > 0.6
    assert (values > low).float().mean() > 0.9


@pytest.mark.parametrize("decades", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_never_overshoot_and_lift_the_strong_values(decades, dtype):
    "The closer bound is a bound: nothing is thrown beyond 1.22, in bfloat16 1.3."
    matrix = spectrum((96, 160), decades)
    before = torch.linalg.svdvals(matrix)
    after = torch.linalg.svdvals(orthogonalize(matrix, "cans", dtype))
    assert after.max() < (1.22 if dtype is torch.float32 else 1.3)
    strong = int((before > 0.055 * before.norm(4)).sum())
    assert after[:strong].min() > (0.78 if dtype is torch.float32 else 0.7)
    assert orthogonalize(0 * matrix, "cans", dtype).eq(0).all()


def test_orthogonalize_keeps_singular_vectors():
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(2)).double()
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ orthogonalize(matrix) @ vt.mT
    torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-10)


def test_orthogonalize_transposes():
    wide = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonalize(wide.mT), orthogonalize(wide).mT)


def plain(matrix: torch.Tensor, method: str) -> torch.Tensor:
    "The steps on the full matrix, in nanochat's words."
    schatten, margin, steps = METHODS[method]
    tall = matrix.size(0) > matrix.size(1)
    size = torch.linalg.svdvals(matrix).norm(schatten)
    x = (matrix.mT if tall else matrix) / (margin * size + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def spectrum(shape: tuple[int, int], decades: float) -> torch.Tensor:
    "A matrix whose singular values fall over so many decades."
    g = torch.Generator().manual_seed(6)
    small = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, small, generator=g))[0] for n in shape)
    return u * torch.logspace(0, -decades, small) @ v.mT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(64, 64), (64, 256), (256, 64), (64, 80), (129, 129), (400, 130)]
)
@pytest.mark.parametrize("decades", [0, 3, 6, 10, None])
def test_both_sides_equal_the_plain_iteration(method, shape, decades):
    if decades is None:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    else:
        matrix = spectrum(shape, decades)
    got, want = orthogonalize(matrix, method), plain(matrix, method)
    assert (got - want).abs().max() < 1e-4
    assert (got - want).norm() < 1e-4 * want.norm()


def test_a_symmetric_product_is_mirrored_on_large_matrices_alone():
    "Three quarters of the operations from 128 rows on, the same numbers, symmetric."
    for rows in (127, 128, 201):
        x = torch.randn(2, rows, 300, generator=torch.Generator().manual_seed(rows))
        with CountProducts() as count:
            got = symmetric(x, x.mT)
        share = count.flops / (2 * 2 * rows * rows * 300)
        assert share == 1.0 if rows < 128 else 0.74 < share < 0.76
        torch.testing.assert_close(got, x @ x.mT, rtol=1e-5, atol=1e-4)
        if rows >= 128:
            half = rows // 2
            assert torch.equal(got[:, half:, :half], got[:, :half, half:].mT)


class CountProducts(torch.overrides.TorchFunctionMode):
    "Add up the operations of all matrix products."

    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.baddbmm):
            self.flops += 2 * out.numel() * args[-1].size(-2)
        return out


@pytest.mark.parametrize("shape", [(8, 8), (8, 11), (8, 32), (32, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_cheaper_side_is_taken(shape, dtype, method):
    with CountProducts() as count:
        orthogonalize(torch.ones(2, *shape), method, dtype)
    cost = iteration_flops(*shape, len(METHODS[method][2]))
    if dtype is torch.bfloat16:  # too coarse for the Gram side
        assert count.flops == 2 * cost["full"]
    else:
        assert count.flops == 2 * min(cost.values())
    assert (cost["gram"] < cost["full"]) == (shape in [(8, 32), (32, 8)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_iteration(dtype):
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    got, default = orthogonalize(matrix, dtype=dtype), orthogonalize(matrix)
    error = (got - default).norm() / default.norm()
    assert got.dtype is torch.float32
    assert (1e-4 < error < 0.1) if dtype is torch.bfloat16 else 0 < error < 1e-5
    p = matrix.clone()
    p.grad = matrix
    Muon([p], lr=1.0, momentum=0.5, nesterov=False, dtype=dtype).step()
    torch.testing.assert_close(matrix - p, got, rtol=0, atol=1e-6)
    name = str(dtype).removeprefix("torch.")
    optimizers = setup_optimizer(tiny_model(), OptimConfig(matrix_dtype=name))
    assert optimizers.parts["muon"].param_groups[0]["dtype"] is dtype


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_in_bfloat16(shape, nesterov):
    generator = torch.Generator().manual_seed(9)
    p = torch.randn(shape, generator=generator)
    q, options = p.clone(), dict(lr=0.1, momentum=0.95, nesterov=nesterov)
    ours = Muon([p], dtype=torch.bfloat16, **options)
    theirs = torch.optim.Muon([q], weight_decay=0.0, **options)
    for _ in range(4):
        p.grad = torch.randn(shape, generator=generator)
        q.grad = p.grad.clone()
        ours.step(), theirs.step()
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
    assert (p - q).norm() < 1e-3 * p.norm()


def test_orthogonalize_of_zero_is_zero():
    assert orthogonalize(torch.zeros(2, 4, 4)).eq(0).all()


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (8, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_its_definition(shape, nesterov):
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(shape, generator=generator)
    want = p.clone()
    average = torch.zeros(shape)
    optimizer = Muon([p], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(3):
        p.grad = torch.randn(shape, generator=generator)
        average = 0.9 * average + 0.1 * p.grad
        blend = 0.1 * p.grad + 0.9 * average if nesterov else average
        scale = max(1, shape[0] / shape[1]) ** 0.5
        want = want - 0.1 * scale * orthogonalize(blend)
        optimizer.step()
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 128), (128, 32)])
def test_muon_learns_rectangles(shape):
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(shape, generator=generator)
    x = torch.randn(256, shape[1], generator=generator)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=0.3)
    for step in range(200):
        p.grad = None
        loss = (x @ (p - target).T).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 200)
        optimizer.step()
    assert loss < 0.01 * (x @ target.T).square().mean()


def test_cautious_decay_shrinks_only_with_the_update():
    p = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    plain = p.clone()
    for q, decay in ((p, 0.5), (plain, 0.0)):
        q.grad = torch.eye(2)
        Muon([q], lr=0.1, weight_decay=decay).step()
    # The update lowers both: 1 shrinks (decay helps), -1 grows (decay would oppose).
    assert p[0, 0] == pytest.approx(plain[0, 0].item() - 0.05)
    assert p[1, 1] == plain[1, 1]


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_normuon_equals_its_definition(shape):
    generator = torch.Generator().manual_seed(10)
    first = torch.randn(shape, generator=generator)
    params = [first, first.clone()]
    want = first.clone()
    optimizer = Muon(params, lr=0.1, momentum=0.0, beta2=0.9)
    average = 0
    for _ in range(3):
        grad = torch.randn(shape, generator=generator)
        for p in params:
            p.grad = grad.clone()
        update = orthogonalize(grad)
        average = 0.9 * average + 0.1 * update.square().mean(1, keepdim=True)
        even = update / average.sqrt()
        even *= update.norm() / even.norm()
        want = want - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * even
        optimizer.step()
    for p in params:
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)
        assert optimizer.state[p]["variance"].shape == (shape[0], 1)
        torch.testing.assert_close(optimizer.state[p]["variance"], average)


def test_normuon_is_off_by_default_and_bears_zero_gradients():
    plain, normed = torch.eye(4), torch.eye(4)
    for p, beta2 in ((plain, None), (normed, 0.9)):
        p.grad = torch.zeros(4, 4)
        optimizer = Muon([p], beta2=beta2)
        optimizer.step()
        assert torch.equal(p, torch.eye(4))
        assert ("variance" in optimizer.state[p]) == (beta2 is not None)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([torch.zeros(3)])
    with pytest.raises(ValueError, match="newton-schulz"):
        Muon([torch.zeros(3, 3)], method="cubic")


def test_every_matrix_has_one_owner():
    for count in range(1, 12):
        for world in range(1, 6):
            hands = deal(count, world)
            assert sorted(i for hand in hands for i in hand) == list(range(count))
            assert max(map(len, hands)) == len(hands[0]) == -(-count // world)


def test_rows():
    big, odd, small = torch.zeros(64, 32), torch.zeros(65, 32), torch.zeros(4, 4)
    assert own_rows(big, 1, 2) == slice(32, 64)
    assert own_rows(odd, 1, 2) is own_rows(small, 1, 2) is own_rows(big, 0, 1) is None


def test_roles():
    groups = assign_roles(tiny_model())
    assert list(groups["embedding"]) == ["transformer.wte.weight"]
    assert list(groups["unembedding"]) == ["lm_head.weight"]
    assert len(groups["matrix"]) == 12 and set(groups) == {
        "embedding",
        "unembedding",
        "matrix",
    }


def test_a_parameter_in_no_group_or_two_is_an_error():
    model = tiny_model()
    model.extra = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"extra\.weight .* roles \[\]"):
        setup_optimizer(model)
    model = tiny_model()
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.raises(ValueError, match="are the same tensor"):
        setup_optimizer(model)


def test_scalars_go_to_adamw():
    model = tiny_model()
    model.gain = nn.Parameter(torch.ones(2))
    optimizers = setup_optimizer(model, OptimConfig(scalar_lr=0.5))
    group = optimizers.parts["adamw"].param_groups[-1]
    assert group["params"][0] is model.gain
    assert group["lr"] == pytest.approx(0.5 * (16 / 768) ** -0.5)


def test_rates_follow_width():
    optimizers = setup_optimizer(tiny_model())
    head, table = optimizers.parts["adamw"].param_groups
    assert head["lr"] == pytest.approx(0.004 * (16 / 768) ** -0.5)
    assert table["lr"] == pytest.approx(0.2 * (16 / 768) ** -0.5)
    assert optimizers.parts["muon"].param_groups[0]["lr"] == 0.02


def test_step_sets_rate_and_momentum():
    optimizers = setup_optimizer(tiny_model())
    optimizers.step(0.5, muon_momentum=0.9)
    group = optimizers.parts["muon"].param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.01, 0.9)
    optimizers.step()
    assert (group["lr"], group["momentum"]) == (0.02, 0.9)


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e6])
def test_norm_and_clipping_equal_torch(limit):
    "And a limit that is not reached, or none, changes no bit."
    ours, theirs = tiny_model(), tiny_model()
    a, b = setup_optimizer(ours), setup_optimizer(theirs)
    for step in range(3):
        fill_grads(ours, step), fill_grads(theirs, step)
        norm = a.grad_norm()
        told = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
        assert norm > 1 and norm.item() == pytest.approx(told.item(), rel=1e-6)
        a.step(clip=limit), b.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        exact = limit != 1.0
        torch.testing.assert_close(p, q, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_that_would_turn_gradients_round_is_refused(limit):
    model = tiny_model()
    optimizers = setup_optimizer(model)
    fill_grads(model, 0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="use a limit above 0"):
        optimizers.step(clip=limit)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_step_that_was_measured_and_not_taken_leaves_nothing_behind():
    model = tiny_model()
    optimizers = setup_optimizer(model)
    before = [*map(torch.clone, model.parameters())]
    fill_grads(model, 0)
    optimizers.grad_norm()
    optimizers.zero_grad()
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p, old)
    assert set(optimizers.state_dict()) == {"meta/rank", "meta/world_size"}
    fill_grads(model, 1)
    optimizers.step()
    told = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert optimizers.norm.item() == pytest.approx(told.item(), rel=1e-6)


def test_zero_grad_frees():
    model = tiny_model()
    optimizers = setup_optimizer(model)
    fill_grads(model, 0)
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("beta2", [None, 0.9])
def test_resume_equals_uninterrupted(beta2):
    straight, resumed = tiny_model(), tiny_model()
    config = OptimConfig(matrix_beta2=beta2)
    a, b = setup_optimizer(straight, config), setup_optimizer(resumed, config)
    for step in range(3):
        for model, optimizers in ((straight, a), (resumed, b)):
            fill_grads(model, step)
            optimizers.step()
    saved = {key: value.clone() for key, value in b.state_dict().items()}
    b = setup_optimizer(resumed, config)
    b.load_state_dict([saved])
    for step in range(3, 6):
        for model, optimizers in ((straight, a), (resumed, b)):
            fill_grads(model, step)
            optimizers.step(0.5, muon_momentum=0.9)
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_state_is_flat_tensors():
    model = tiny_model()
    optimizers = setup_optimizer(model)
    assert set(optimizers.state_dict()) == {"meta/rank", "meta/world_size"}
    fill_grads(model, 0)
    optimizers.step()
    state = optimizers.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert "muon/transformer.h.0.attn.c_q.weight/momentum" in state
    assert "adamw/lm_head.weight/exp_avg_sq" in state


def test_wrong_state_is_refused():
    model = tiny_model()
    optimizers = setup_optimizer(model)
    fill_grads(model, 0)
    optimizers.step()
    state = optimizers.state_dict()
    with pytest.raises(UserError, match="all 2 are needed"):
        optimizers.load_state_dict([state | {"meta/world_size": torch.tensor(2)}])
    with pytest.raises(UserError, match="which the model lacks"):
        merge_state([state | {"adamw/gone/exp_avg": torch.ones(1)}], optimizers.params)
    with pytest.raises(UserError, match=r"has shape \(3, 3\), not \(16, 16\)"):
        key = "muon/transformer.h.0.attn.c_q.weight/momentum"
        optimizers.load_state_dict([state | {key: torch.ones(3, 3)}])


def test_schedule():
    scales = [lr_scale(i, 100, 0.1, 0.2, 0.1) for i in range(100)]
    assert scales[0] == pytest.approx(0.1) and scales[9] == scales[80] == 1.0
    assert scales[90] == pytest.approx(0.55) and scales[99] == pytest.approx(0.145)
    assert lr_scale(0, 1) == 1.0 and lr_scale(7, 10, 0, 0) == 1.0


@given(
    num_steps=st.integers(1, 400),
    warmup=st.floats(0, 1),
    warmdown=st.floats(0, 1),
    final_frac=st.floats(0, 1),
)
def test_the_rate_is_never_negative_nor_above_its_peak(
    num_steps, warmup, warmdown, final_frac
):
    scales = [
        lr_scale(step, num_steps, warmup, warmdown, final_frac)
        for step in range(num_steps)
    ]
    rounding = 1e-12
    assert 0 < min(scales) <= max(scales) <= 1 + rounding
    top = scales.index(max(scales))
    assert all(a <= b + rounding for a, b in zip(scales[:top], scales[1 : top + 1]))
    assert all(a >= b - rounding for a, b in zip(scales[top:], scales[top + 1 :]))


def test_batch_and_horizon():
    assert batch_lr_scale(524_288) == 1.0 and batch_lr_scale(4 * 524_288) == 2.0
    assert batch_lr_scale(64, reference=256) == 0.5
    assert decay_scale(2000, 1000) == 0.5 and decay_scale(1000, 1000, 0.5) == 2.0


def test_momentum_schedule():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(150) == pytest.approx(0.9)
    assert muon_momentum(300) == muon_momentum(9999) == pytest.approx(0.95)


def test_fused_adamw_is_the_plain_step_also_on_rows_of_a_larger_table():
    g = torch.Generator().manual_seed(3)
    group = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    plain = torch.randn(10, 6, generator=g)
    fused = plain.clone()
    states = {}, {}
    for _ in range(7):
        grad = torch.randn(4, 6, generator=g)
        adamw_update(plain[2:6], grad, states[0], group)
        adamw_fused(fused[2:6], grad, states[1], group)
    torch.testing.assert_close(plain, fused, rtol=1e-6, atol=1e-6)
    assert states[0].keys() == states[1].keys() and states[1]["step"] == 7
    untouched = [*range(2), *range(6, 10)]
    assert plain[untouched].equal(fused[untouched])


def test_the_fused_step_is_for_gpus_only():
    "The bits of a CPU run stay what they were."
    assert adamw_rule(torch.zeros(2)) is adamw_update
    assert adamw_rule(SimpleNamespace(is_cuda=True)) is adamw_fused


def test_the_fused_step_refuses_an_option_that_it_would_ignore():
    group = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    weights = torch.zeros(2)
    with pytest.raises(ValueError, match="does not know \\['nesterov'\\]"):
        adamw_fused(weights, torch.ones(2), {}, group | {"nesterov": True})
    assert weights.equal(torch.zeros(2))
    # The groups of a real optimizer hold nothing else.
    (found,) = AdamW([torch.zeros(2, requires_grad=True)]).param_groups
    adamw_fused(weights, torch.ones(2), {}, found)
