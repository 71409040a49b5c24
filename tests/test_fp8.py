"""Products in eight bits: against the emulation, against fp32, compiled, and as an option."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from nanochat import fp8, stage
from nanochat.attention import Linear
from nanochat.common import UserError
from nanochat.config import BaseConfig, ChatConfig, changed_settings
from nanochat.dry_run import walk
from nanochat.fp8 import (
    BACKWARD,
    FORWARD,
    PRODUCTS,
    Float8Linear,
    Float8Product,
    emulated_product,
    fp8_memory,
    fp8_works,
    quantize,
    scaled_product,
    use_fp8,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.stage import begin
from nanochat.stage import pretrain as main

SHAPE = GPTConfig(32, 64, n_layer=2, n_head=2, n_kv_head=1, n_embd=128)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_of(config: GPTConfig = SHAPE, dtype=torch.float32) -> GPT:
    model = GPT(config, dtype)
    for i, weight in enumerate(model.parameters()):
        torch.nn.init.normal_(
            weight,
            std=weight.size(-1) ** -0.5,
            generator=torch.Generator().manual_seed(i),
        )
    return model


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("kind, gap", [(FORWARD, 2**-4), (BACKWARD, 2**-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_half_a_gap_whatever_the_size(kind, gap, scale, dtype):
    x = numbers(64, 64, scale=scale).to(dtype)
    small, factor = quantize(x, kind)
    assert small.dtype == kind and factor.dtype == torch.float32 and factor.ndim == 0
    back = small.float() * factor
    normal = x.float().abs() >= torch.finfo(kind).smallest_normal * factor
    relative = (back - x.float()).abs() / x.float().abs()
    assert relative[normal].max() <= gap * 1.001
    assert back.abs().max() == pytest.approx(x.abs().max().item(), rel=1e-5)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_visible():
    for kind in (FORWARD, BACKWARD):
        small, scale = quantize(torch.zeros(16, 16), kind)
        assert (small.float() == 0).all() and scale > 0
    for bad in (float("nan"), float("inf")):
        x = numbers(16, 16)
        x[3, 4] = bad
        small, scale = quantize(x, FORWARD)
        assert not (small.float() * scale).isfinite().all()


@pytest.mark.parametrize("left", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulation_has_the_arithmetic_of_the_real_product(left, dtype):
    a = quantize(numbers(32, 64), left)
    b = quantize(numbers(48, 64, seed=1), FORWARD)
    real, twin = (f(a, b, dtype) for f in (scaled_product, emulated_product))
    assert real.dtype == twin.dtype == dtype and real.shape == (32, 48)
    assert off(real, twin) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradients_with_both_products(dtype):
    results = {}
    for name, table in (("twin", {}), ("real", {"cpu": scaled_product})):
        x = numbers(4, 8, 64).to(dtype).requires_grad_()
        w = numbers(96, 64, seed=1)
        layer = Linear(64, 96)
        layer.weight.data.copy_(w)
        plain = layer(x)
        layer.__class__ = Float8Linear
        with mock.patch.dict(PRODUCTS, table):
            y = layer(x)
            (dx, dw) = torch.autograd.grad(
                (y * numbers(96, seed=2)).sum(), [x, layer.weight]
            )
        assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
        want = torch.autograd.grad(
            (plain * numbers(96, seed=2)).sum(), [x, layer.weight]
        )
        for got, exact in zip((y, dx, dw), (plain, *want)):
            assert 0.001 < off(got, exact) < 0.12
        results[name] = y, dx, dw
    for twin, real in zip(results["twin"], results["real"]):
        assert off(real, twin) < (1e-5 if dtype == torch.float32 else 2**-7)


def test_gradients_are_those_of_the_rounded_operands():
    "By hand: dx = g8 @ w8 and dw = g8.T @ x8, each with its scale."
    x, w, g = numbers(16, 32), numbers(48, 32, seed=1), numbers(16, 48, seed=2)
    x.requires_grad_(), w.requires_grad_()
    y = Float8Product.apply(x, w)
    y.backward(g)

    def value(t, kind):
        rounded, scale = quantize(t.detach(), kind)
        return rounded.float() * scale

    x8, w8, g8 = value(x, FORWARD), value(w, FORWARD), value(g, BACKWARD)
    for got, want in ((y, x8 @ w8.T), (x.grad, g8 @ w8), (w.grad, g8.T @ x8)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_eight_bits_wide():
    kept = []

    def pack(t):
        kept.append(t)
        return t

    x = numbers(16, 64).bfloat16().requires_grad_()
    weight = numbers(64, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        Float8Product.apply(x, weight)
    assert sum(t.numel() * t.element_size() for t in kept) == 16 * 64 + 64 * 64 + 2 * 4


def test_the_blocks_are_converted_and_nothing_else():
    config = replace(SHAPE, value_embeds=True, gate_inputs=16, n_kv_head=2)
    model = model_of(config)
    before = {k: (p, p.data_ptr()) for k, p in model.named_parameters()}
    assert use_fp8(model) == 12 and use_fp8(model) == 0
    assert type(model.lm_head) is Linear
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, Linear)}
    assert all(
        (kind is Float8Linear) == (name != "lm_head" and "gate" not in name)
        for name, kind in kinds.items()
    )
    after = {k: (p, p.data_ptr()) for k, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(before[k][0] is after[k][0] for k in before)
    odd = model_of(GPTConfig(32, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=72))
    assert use_fp8(odd) == 0  # 72 is not a multiple of 16


def test_evaluation_is_that_of_the_plain_model():
    model = model_of()
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        plain = model(ids)
    use_fp8(model)
    with torch.no_grad():
        assert torch.equal(model(ids), plain)
    with torch.inference_mode():
        assert torch.equal(model(ids), plain)
    assert not torch.equal(model(ids), plain)


def test_rows_that_the_card_refuses_are_refused_everywhere():
    model = model_of()
    use_fp8(model)
    with pytest.raises(UserError, match="multiple of 16"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def trained(seed: int, eight: bool) -> list[float]:
    "Losses of forty steps on random text with a pattern in it."
    model = GPT(SHAPE)
    model.init_weights(seed)
    if eight:
        use_fp8(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dice = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(40):
        start = torch.randint(64, (8, 1), generator=dice)
        step = torch.randint(1, 3, (8, 1), generator=dice)
        ids = (start + step * torch.arange(33)) % 64
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_training_stays_within_the_spread_of_seeds():
    def last(seed: int, eight: bool) -> float:
        return sum(trained(seed, eight)[-10:]) / 10

    plain = [last(seed, False) for seed in range(3)]
    rounded = [last(seed, True) for seed in range(3)]
    apart = max(abs(a - b) for a, b in zip(rounded, plain))
    spread = max(plain) - min(plain)
    assert 0 < apart < spread and max(rounded) < 3.0 < trained(0, True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_eager_ones(dtype, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    model = model_of(dtype=dtype)
    ids = torch.randint(64, (2, 33))
    use_fp8(model)
    found = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        call(ids[:, :-1], ids[:, 1:]).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    torch._dynamo.reset()
    for name, want in found[0].items():
        assert off(found[1][name], want) < 0.02, name


class Card:
    type = "cuda"


def test_which_devices_can(monkeypatch):
    assert "the device is cpu" in fp8_works(torch.device("cpu"))
    capability = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability["is"])
    for found, works in (
        ((8, 0), False),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
    ):
        capability["is"] = found
        assert (fp8_works(Card()) == "") == works
    capability["is"] = 9, 0
    monkeypatch.delattr(torch, "_scaled_mm")
    assert torch.__version__ in fp8_works(Card())


@pytest.mark.parametrize("kind", [BaseConfig, ChatConfig])
def test_it_is_an_option_that_older_runs_did_not_have(kind):
    older = {}  # what a checkpoint of that time says of it
    assert changed_settings(older, kind()) == {}
    assert changed_settings(older, kind(fp8=True)) == {"fp8": (False, True)}
    with pytest.raises(UserError, match=r"--fp8 needs .* run without --fp8"):
        begin(kind(fp8=True, device="cpu"))


@pytest.mark.slow
def test_a_stage_trains_with_it(base_dir, tiny, monkeypatch, capsys):
    monkeypatch.setattr(stage, "fp8_works", lambda device: "")
    tiny |= {"depth": 2, "num_iterations": 3}
    main(BaseConfig(**tiny))
    said = capsys.readouterr().out
    assert "eight bits" not in said
    with pytest.raises(UserError, match="different settings"):
        main(BaseConfig(**tiny, fp8=True))
    main(BaseConfig(**tiny, fp8=True, tag="eight"))
    said = capsys.readouterr().out
    assert "12 linear layers" in said and "slower" in said


@pytest.mark.slow
def test_what_it_adds_to_the_memory_is_planned(base_dir, tiny, monkeypatch):
    monkeypatch.setattr(stage, "fp8_works", lambda device: "")
    planned = []
    monkeypatch.setattr(
        stage, "check_fits", lambda plan, size: planned.append(plan.memory)
    )
    tiny |= {"depth": 2, "num_iterations": 1}
    for eight in (False, True):
        main(BaseConfig(**tiny, fp8=eight, overwrite=True))
    config = stage.checkpoint.read_meta(stage.checkpoint.find_checkpoint("base", "d2"))[
        "model_config"
    ]
    more = fp8_memory(GPTConfig(**config), tiny["device_batch_size"], 4)
    _, plain, _, eight = planned  # each run asks twice
    assert eight - plain == more > 0


def test_a_dry_run_walks_through_it():
    config = BaseConfig(
        depth=2, device_batch_size=1, total_batch_size=2048, world=1, num_iterations=1
    )
    eight, plain = walk(replace(config, fp8=True), 512), walk(config, 512)
    assert eight["weights"] == plain["weights"] and eight["plan"] == plain["plan"]
    assert fp8.NARROWEST == 64
