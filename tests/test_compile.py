"""A compiled model has the gradients of the eager one, or is not used."""

import os
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp

import nanochat.gpt
from nanochat import compiling, stage
from nanochat.attention import set_kernel
from nanochat.compiling import (
    check_compiled,
    compare,
    compile_model,
    compiled_differs,
    loss_and_gradients,
    small_config,
    small_model,
)
from nanochat.config import BaseConfig
from nanochat.gpt import GPT, GPTConfig
from nanochat.plan import model_config
from nanochat.stage import prepare

pytestmark = pytest.mark.slow  # compiles

CPU = torch.device("cpu")
SHAPE = GPTConfig(96, 200, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
LATER = dict(window_pattern="SL", value_embeds=True, stream_scalars=True, qk_scale=1.2)
LATER |= {"smear": True, "backout": True}
OPTIONS = {
    "default": {},
    "later ideas": LATER | {"pad_vocab_to": 64, "n_kv_head": 1},
    "single head": {"n_head": 1, "n_kv_head": 1, "sequence_len": 48},
    "one block, one token": {"n_layer": 1, "sequence_len": 1},
    "no softcap": {"softcap": 0.0, "n_layer": 1},
}
FACTOR = 0.0  # of the gradient that `Lost` gives when it is compiled
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture(autouse=True)
def dynamo(monkeypatch):
    "The suite runs without compiling; these tests do not."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    yield
    torch._dynamo.reset()


def test_the_small_model_keeps_every_option():
    small = small_config(model_config(20, 65_536, 2048, arch="modern"))
    assert (small.n_layer, small.n_head, small.n_kv_head) == (4, 2, 2)
    assert (small.head_dim, small.window_pattern) == (128, "SSSL")
    assert small.value_embeds and small.stream_scalars
    assert [small.window(i) for i in range(4)] == [32, 32, 32, 0]
    grouped = small_config(model_config(20, 65_536, 2048, kv_heads=2))
    assert (grouped.n_head, grouped.n_kv_head) == (2, 1)
    padded = small_config(replace(SHAPE, pad_vocab_to=64, short_window=100))
    assert padded.table_rows > padded.vocab_size and padded.short_window == 32
    one = small_config(GPTConfig(16, 9, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    assert (one.n_layer, one.n_head, one.vocab_size, one.sequence_len) == (1, 1, 9, 16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_of_the_small_model_has_a_gradient(options):
    shape = small_config(replace(SHAPE, **options))
    model = small_model(shape, CPU, torch.float32, fp8=False)
    found = loss_and_gradients(model, model)
    assert found.keys() == {"loss", *dict(model.named_parameters())}
    blind = ("c_q", "c_k") if shape.sequence_len == 1 else ()  # nothing to choose from
    for name, x in found.items():
        assert x.isfinite().all()
        assert x.norm() > 0 or any(b in name for b in blind), name
    again = loss_and_gradients(model, model)
    assert all(torch.equal(x, again[name]) for name, x in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_equals_eager(options, dtype):
    wrong, said = check_compiled(
        replace(SHAPE, **options), CPU, dtype, backend="aot_eager"
    )
    assert not wrong and "agree with eager (worst" in said


def test_compiled_equals_eager_in_eight_bits():
    asked = SHAPE, CPU, torch.bfloat16
    assert compiled_differs(*asked, fp8=True, backend="aot_eager") == ""


@needs_compiler
@pytest.mark.timeout(300)
def test_generated_kernels_have_the_gradients_of_eager():
    wrong, said = check_compiled(
        replace(SHAPE, n_layer=1, **LATER), CPU, torch.bfloat16
    )
    assert not wrong and "worst" in said


def test_a_gradient_that_compiling_drops_is_named(monkeypatch):
    def forgetful(model, **options):
        model.transformer.wte.requires_grad_(False)
        return model

    monkeypatch.setattr(torch, "compile", forgetful)
    wrong, _ = check_compiled(SHAPE, CPU, torch.float32)
    assert "transformer.wte.weight has no gradient" in wrong


class Lost(torch.autograd.Function):
    "A squared ReLU whose gradient is wrong by a factor, once it is compiled."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu().square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        kept = FACTOR if torch.compiler.is_compiling() else 1.0
        return 2 * kept * x.relu() * grad


def lost(x: torch.Tensor) -> torch.Tensor:
    return Lost.apply(x)


class InPlace(torch.autograd.Function):
    "What PyTorch 2.11 compiles into a function without a gradient."

    @staticmethod
    def forward(ctx, x):
        square = torch.relu(x).square_()
        ctx.save_for_backward(square)
        return square

    @staticmethod
    def backward(ctx, grad):
        (square,) = ctx.saved_tensors
        return 2 * (square.sqrt() * grad)


def in_place(x: torch.Tensor) -> torch.Tensor:
    return InPlace.apply(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 0.6])
def test_a_wrong_gradient_is_caught(dtype, factor, monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", factor)
    monkeypatch.setattr(nanochat.gpt, "relu2", lost)
    wrong = compiled_differs(SHAPE, CPU, dtype, backend="aot_eager")
    assert "off eager" in wrong and "more" in wrong
    if factor == 0:
        assert "c_fc.weight" in wrong and "100% off" in wrong


def test_the_fault_of_2_11_is_caught_where_it_is(monkeypatch):
    monkeypatch.setattr(nanochat.gpt, "relu2", in_place)
    wrong = compiled_differs(SHAPE, CPU, torch.float32, backend="aot_eager")
    assert bool(wrong) == torch.__version__.startswith("2.11."), wrong


def test_a_wrong_loss_and_a_lost_number_are_caught():
    exact = {
        "loss": torch.tensor(5.0),
        "w": torch.ones(9),
        "tiny": torch.ones(9) * 1e-10,
    }
    near = {name: x * (1 + 1e-6) for name, x in exact.items()}
    eps = torch.finfo(torch.float32).eps
    assert compare(near, near, exact, eps)[1] == {}
    for name in ("loss", "w"):
        for x in (exact[name] * 1.001, exact[name] * 0, exact[name] * float("nan")):
            assert list(compare(near | {name: x}, near, exact, eps)[1]) == [name]
    # What should be zero is rounding: it may differ by all of its size.
    assert compare(near | {"tiny": -near["tiny"]}, near, exact, eps)[1] == {}


def tiny_model() -> GPT:
    model = GPT(SHAPE)
    model.init_weights(0)
    return model


def test_a_sound_compiler_is_used_and_said_in_one_line(capsys):
    model = tiny_model()
    before = torch.random.get_rng_state()
    called = compile_model(model, backend="aot_eager")
    assert torch.equal(torch.random.get_rng_state(), before)
    checking, said = capsys.readouterr().out.splitlines()
    assert checking.startswith("compile: checking")
    assert said.startswith("compile: loss and 14 gradients")
    assert called is not model and called._orig_mod is model
    ids = torch.randint(200, (1, 33))
    assert torch.allclose(called(ids[:, :-1]), model(ids[:, :-1]))


def test_the_small_model_uses_the_kernel_that_the_model_was_told(monkeypatch):
    told = []
    monkeypatch.setattr(compiling, "set_kernel", lambda m, name: told.append(name))
    model = tiny_model()
    compile_model(model, backend="aot_eager")
    set_kernel(model, "twin")
    compile_model(model, backend="aot_eager")
    assert told == ["", "twin"]


def test_a_wrong_compiler_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(nanochat.gpt, "relu2", lost)
    model = tiny_model()
    assert compile_model(model, backend="aot_eager") is model
    _, said = capsys.readouterr().out.splitlines()
    assert said.startswith("WARNING: compile: ") and "uncompiled" in said


@pytest.mark.parametrize("error", [RuntimeError("no g++\nat all"), ImportError("")])
def test_a_compiler_that_fails_is_not_used(monkeypatch, capsys, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny_model()
    assert compile_model(model) is model
    said = capsys.readouterr().out
    assert type(error).__name__ in said and said.count("\n") == 2


def test_an_unknown_backend_is_not_used(capsys):
    model = tiny_model()
    assert compile_model(model, backend="nosuch") is model
    assert "uncompiled" in capsys.readouterr().out


def test_the_switch_of_pytorch_is_respected(monkeypatch, capsys):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    model = tiny_model()
    assert compile_model(model) is model
    assert "nothing is compiled" in capsys.readouterr().out


@pytest.mark.parametrize("wished", [None, True, False])
def test_stages_compile_where_they_should(monkeypatch, wished):
    called = []
    model = tiny_model()
    for name in ("compiling", "_stage"):
        module = compiling if name == "compiling" else stage
        monkeypatch.setattr(module, "compile_model", lambda m: called.append(m) or m)
    prepare(model, BaseConfig(compile=wished))
    assert called == ([model] if wished else [])


def verdict_on_rank(rank: int, folder) -> None:
    "Only rank 1 finds something; write down what each of them then uses."
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = ("the gradient of x is 9% off", "") if rank else ("", "all agree")
    with mock.patch.object(compiling, "check_compiled", lambda *_, **__: found):
        model = tiny_model()
        compiled = compile_model(model, backend="aot_eager") is not model
    (folder / str(rank)).write_text(str(compiled))
    dist.destroy_process_group()


def test_all_ranks_decide_alike(tmp_path):
    mp.spawn(verdict_on_rank, (tmp_path,), nprocs=2)
    assert [(tmp_path / str(r)).read_text() for r in range(2)] == ["False", "False"]
