"""Attention's kernels and its cache: the fallback, windows, growth, positions."""

import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat import attention
from nanochat.attention import (
    KERNELS,
    CausalSelfAttention,
    KVCache,
    attend,
    attend_in_blocks,
    attend_plainly,
    choose_kernel,
    constant_when_compiled,
    insert,
    kernel_works,
    misfit,
    precompute_rotary,
    set_kernel,
    visible,
    windowless_varlen,
)
from nanochat.common import UserError
from nanochat.gpt import GPTConfig

ATTENTION = torch.nn.attention
HAS_VARLEN = not (attention.missing("torch.nn.attention.varlen") or windowless_varlen())
bf16, fp32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def nothing_remembered():
    "What is known of the machine and what was said is forgotten after each test."

    def forget():
        for cached in (attention.examine, attention.missing, attention.announce):
            cached.cache_clear()

    forget()
    yield
    forget()


def qkv(rows=2, queries=7, keys=7, heads=4, kv_heads=2, *, dtype=torch.float32):
    "Queries, keys and values of head size 8."
    g = torch.Generator().manual_seed(0)

    def draw(positions: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, positions, heads, 8, generator=g).to(dtype)

    return draw(queries, heads), draw(keys, kv_heads), draw(keys, kv_heads)


def install(monkeypatch, flash3=None):
    "Pretend that FlashAttention-3 is installed, or is not."
    module = None
    if flash3 is not None:
        module = types.ModuleType("flash_attn_interface")
        module.flash_attn_func = flash3
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)


def gpu(monkeypatch, major=9, cudnn=91900, flash3=None):
    "Pretend to have a GPU of a compute capability, and perhaps FlashAttention-3."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "hip", None)
    install(monkeypatch, flash3)
    for cached in (attention.examine, attention.missing, attention.announce):
        cached.cache_clear()


def gpu_of_air(monkeypatch, major=9):
    "The same for tensors that are on a GPU in name only: PyTorch must not look for it."
    with monkeypatch.context() as pretended:
        gpu(pretended, major)
        answers = {name: kernel_works(name, "cuda") for name in KERNELS}
    monkeypatch.setattr(attention, "examine", lambda name, device: answers[name])


def by_mask(q, k, v, window, scale):
    "The same attention by PyTorch, with the mask written out."
    T, S = q.size(1), k.size(1)
    mask = visible(torch.arange(S - T, S)[None], S, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True, scale=scale
    )
    return y.transpose(1, 2)


def stand_in(calls: list, pack=lambda y: y):
    "What FlashAttention-3 computes, by its own interface: windows count from the left."

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        calls.append((causal, window_size))
        left = window_size[0] + 1 if window_size[0] >= 0 else 0
        return pack(by_mask(q, k, v, left, softmax_scale))

    return flash_attn_func


def graded(f, inputs):
    "Result of f and its gradients."
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*(1.0 * x for x in inputs))  # as in a model, the inputs are computed
    weigh = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y.float() * weigh).sum(), inputs)]


def close(mine, others, dtype):
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == bf16:  # rounded twice where heads are copied and their gradients added
        tolerance = {"rtol": 4e-2, "atol": 4e-2}
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False)


SHARES = [(4, 4), (4, 2), (4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", ["", "blocks", "sdpa", "mask", "twin"])
@pytest.mark.parametrize("window", [0, 1, 20, 500])
def test_kernels_of_this_machine_equal_the_twin(name, window, dtype, monkeypatch):
    "Forward and backward, eager and compiled, with every sharing of heads."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for heads in SHARES:
        inputs = qkv(2, 70, 70, *heads, dtype=dtype)
        if name and misfit(name, *inputs[:2], window if window < 70 else 0):
            continue

        def f(q, k, v):
            return attend(q, k, v, None, window, scale=0.3, kernel=name)

        twin = graded(lambda q, k, v: attend_plainly(q, k, v, window, 0.3), inputs)
        close(graded(f, inputs), twin, dtype)
        if heads == (4, 2):
            close(graded(compiled(f), inputs), twin, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cudnn", "flash2"])
def test_asking_pytorch_for_a_kernel_changes_no_result(name, monkeypatch):
    "The same lines run on the CPU, where PyTorch has one kernel for both."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    inputs = qkv(2, 64, 64, dtype=bf16)
    twin = graded(attend_plainly, inputs)
    for f in (KERNELS[name], compiled(KERNELS[name])):
        close(graded(f, inputs), twin, bf16)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before


class FlashOnCPU:
    "What stands behind `varlen_attn`, for rows laid end to end, on the CPU."

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        self.calls = []
        self.library.impl("_flash_attention_forward", self.forward, "CPU")
        self.library.impl("_flash_attention_backward", self.backward, "CPU")

    def weights(self, q, k, starts, key_starts, *, window, scale):
        "Weights of all queries on all keys, (H, total, total)."
        query_row = torch.bucketize(torch.arange(len(q)), starts, right=True) - 1
        key_row = torch.bucketize(torch.arange(len(k)), key_starts, right=True) - 1
        ahead = (key_starts[1:] - starts[1:])[query_row][:, None]
        back = torch.arange(len(q))[:, None] + ahead - torch.arange(len(k))
        seen = (query_row[:, None] == key_row) & (back >= 0)
        seen &= (back <= window[0]) | (window[0] < 0)
        score = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
        return score.masked_fill(~seen, -torch.inf).softmax(-1)

    def forward(self, q, k, v, starts, key_starts, T, S, *rest, **options):
        sides = options["window_size_left"], options["window_size_right"]
        assert q.shape[1:] == k.shape[1:] and sides[1] == 0
        self.calls.append((T, S, sides))
        scale = options.get("scale") or q.size(-1) ** -0.5
        w = self.weights(q, k, starts, key_starts, window=sides, scale=scale)
        y = torch.einsum("hts,shd->thd", w, v.float()).to(q.dtype)
        seed = torch.zeros(2, dtype=torch.uint64)
        return y, torch.zeros(q.size(1), len(q)), seed, seed.clone(), torch.empty(0)

    def backward(self, grad, q, k, v, y, sums, starts, key_starts, *rest, **options):
        sides = options["window_size_left"], options["window_size_right"]
        scale = options.get("scale") or q.size(-1) ** -0.5
        w = self.weights(q, k, starts, key_starts, window=sides, scale=scale)
        g = grad.float()
        dw = torch.einsum("thd,shd->hts", g, v.float())
        ds = w * (dw - (w * dw).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hts,shd->thd", ds, k.float())
        dk = torch.einsum("hts,thd->shd", ds, q.float())
        dv = torch.einsum("hts,thd->shd", w, g)
        return tuple(x.to(q.dtype) for x in (dq, dk, dv))


@pytest.fixture
def flash_on_cpu():
    machine = FlashOnCPU()
    yield machine
    machine.library._destroy()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VARLEN, reason="varlen_attn has windows since 2.11")
@pytest.mark.parametrize(
    "queries, window", [(40, 0), (40, 7), (1, 7), (12, 7), (12, 0)]
)
def test_varlen_equals_the_twin(queries, window, flash_on_cpu, monkeypatch):
    "Whole rows, one token, a chunk after a prefix; eager and compiled, with gradients."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for heads in SHARES:
        inputs = qkv(3, queries, 40, *heads, dtype=bf16)

        def f(q, k, v):
            return KERNELS["varlen"](q, k, v, window, 0.3)

        twin = graded(lambda q, k, v: attend_plainly(q, k, v, window, 0.3), inputs)
        close(graded(f, inputs), twin, bf16)
        close(graded(compiled(f), inputs), twin, bf16)
    assert set(flash_on_cpu.calls) == {(queries, 40, (window - 1 if window else -1, 0))}


def packed(y):
    return y, torch.zeros(())


@pytest.mark.parametrize("pack", [lambda y: y, packed], ids=["tensor", "tuple"])
@pytest.mark.parametrize("queries, window", [(7, 0), (7, 3), (1, 3), (3, 1), (3, 0)])
def test_flash3_by_its_package(queries, window, pack, monkeypatch):
    "Versions that return a tensor and versions that return the sums' logarithms too."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.delattr(ATTENTION, "activate_flash_attention_impl", raising=False)
    calls = []
    install(monkeypatch, stand_in(calls, pack))
    inputs = qkv(queries=queries, dtype=bf16)

    def f(q, k, v):
        return KERNELS["flash3"](q, k, v, window, 0.2)

    twin = graded(lambda q, k, v: attend_plainly(q, k, v, window, 0.2), inputs)
    close(graded(f, inputs), twin, bf16)
    assert calls == [(True, (window - 1, 0) if window else (-1, -1))]
    close(graded(compiled(f), inputs), twin, bf16)


def pretend_activation(monkeypatch, known: tuple[str, ...]):
    "A PyTorch that can put these versions in the place of its flash kernel."
    active = [None]

    def activate(version):
        if version not in known:
            raise RuntimeError("does not expose its kernels")
        active[0] = version

    def put(name, value):
        monkeypatch.setattr(ATTENTION, name, value, raising=False)

    put("activate_flash_attention_impl", activate)
    put("current_flash_attention_impl", lambda: active[0])
    put("restore_flash_attention_impl", lambda: active.__setitem__(0, None))
    return active


@pytest.mark.skipif(not HAS_VARLEN, reason="varlen_attn has windows since 2.11")
def test_flash3_through_pytorch(flash_on_cpu, monkeypatch):
    "Whole rows go to PyTorch's flash kernel, windows to varlen_attn; once activated."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    active = pretend_activation(monkeypatch, ("FA3",))
    install(monkeypatch, lambda *args, **options: 1 / 0)
    inputs = qkv(queries=40, keys=40, dtype=bf16)
    for window in (0, 5):

        def f(q, k, v, window=window):
            return KERNELS["flash3"](q, k, v, window)

        def plain(q, k, v, window=window):
            return attend_plainly(q, k, v, window)

        twin = graded(plain, inputs)
        close(graded(f, inputs), twin, bf16)
        close(graded(compiled(f), inputs), twin, bf16)
        assert bool(flash_on_cpu.calls) == bool(window)
    assert active == ["FA3"]


def test_flash3_whose_package_pytorch_cannot_use(monkeypatch):
    pretend_activation(monkeypatch, ())
    calls = []
    install(monkeypatch, stand_in(calls))
    KERNELS["flash3"](*qkv(dtype=bf16))
    assert len(calls) == 1
    with pytest.raises(UserError, match="choose another kernel"):
        KERNELS["flash4"](*qkv(dtype=bf16))


def test_flash4_through_pytorch(monkeypatch):
    active = pretend_activation(monkeypatch, ("FA4",))
    inputs = qkv(dtype=bf16)
    y = KERNELS["flash4"](*inputs)
    close([y], [attend_plainly(*inputs)], bf16)
    assert active == ["FA4"]
    KERNELS["flash2"](*inputs)  # measured after it: PyTorch's own again
    assert active == [None]


def like(length, keys, device="cuda", dtype=bf16, size=128):
    "Something with a device, a dtype and a shape."
    facts = {"device": torch.device(device), "dtype": dtype}
    return [
        types.SimpleNamespace(**facts, shape=(2, n, 4, size)) for n in (length, keys)
    ]


WINDOWS = "varlen" if HAS_VARLEN else "mask"
CHOICES = [  # what; queries, keys, window, masked, trains; for capabilities 7, 8, 9, 10
    ("training", 256, 256, 0, False, True, "sdpa sdpa cudnn sdpa"),
    ("training, odd length", 200, 200, 0, False, True, "sdpa sdpa sdpa sdpa"),
    (
        "training, window",
        256,
        256,
        64,
        False,
        True,
        f"mask {WINDOWS} {WINDOWS} {WINDOWS}",
    ),
    ("reading", 256, 256, 0, False, False, "sdpa sdpa sdpa sdpa"),
    ("one token", 1, 99, 0, False, False, "sdpa sdpa sdpa sdpa"),
    ("one token, window", 1, 99, 64, False, False, "sdpa sdpa sdpa sdpa"),
    ("chunk", 16, 99, 0, False, False, f"mask {WINDOWS} {WINDOWS} {WINDOWS}"),
    ("unequal rows", 1, 99, 0, True, False, "mask mask mask mask"),
]


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row[0])
def test_choices_on_gpus(row, monkeypatch):
    _, T, S, *call, expected = row
    for major, name in zip((7, 8, 9, 10), expected.split()):
        gpu(monkeypatch, major)
        assert choose_kernel(*like(T, S), *call) == name, major
    gpu(monkeypatch, 9, flash3=stand_in([]))
    assert choose_kernel(*like(T, S), *call) == ("mask" if call[1] else "flash3")
    gpu(monkeypatch, 9, cudnn=91002)  # reads past rows that are no multiple of 128
    assert choose_kernel(*like(T, S), *call) == expected.split()[1]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # MI300 calls itself 9.4
    attention.examine.cache_clear()
    assert choose_kernel(*like(T, S), *call) == expected.split()[0]


def test_only_16_bits_and_heads_of_fitting_size_reach_the_fused_kernels(monkeypatch):
    gpu(monkeypatch, flash3=stand_in([]))
    for size, name in ((128, "flash3"), (256, "flash3"), (264, "sdpa"), (12, "sdpa")):
        assert choose_kernel(*like(256, 256, size=size), 0, False, True) == name
    assert choose_kernel(*like(256, 256, dtype=fp32), 0, False, True) == "sdpa"
    assert choose_kernel(*like(256, 256, dtype=fp32), 9, False, True) == "mask"
    gpu(monkeypatch)
    assert choose_kernel(*like(256, 256, size=256), 0, False, True) == "sdpa"


def test_a_run_that_must_repeat_does_without_flash3(monkeypatch):
    gpu(monkeypatch, flash3=stand_in([]))
    assert choose_kernel(*like(256, 256), 0, False, True) == "flash3"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_kernel(*like(256, 256), 0, False, True) == "cudnn"
    assert choose_kernel(*like(256, 256), 0, False, False) == "flash3"


def test_no_tensor_off_the_gpu_reaches_its_kernels(monkeypatch):
    "On a machine with a Hopper card and the package: bf16 on the CPU, on meta, on MPS."
    gpu(monkeypatch, flash3=lambda *args, **options: 1 / 0)
    pretend_activation(monkeypatch, ("FA3", "FA4"))
    for device in ("cpu", "meta", "mps"):
        for name in ("flash2", "flash3", "flash4", "cudnn", "varlen"):
            assert "NVIDIA" in kernel_works(name, device)
        for dtype in (bf16, fp32):
            name = choose_kernel(*like(256, 256, device, dtype), 0, False, True)
            assert name == ("blocks" if (device, dtype) == ("cpu", fp32) else "sdpa")
            assert choose_kernel(*like(2, 9, device, dtype), 0, False, False) == "mask"
    for window in (0, 3):
        inputs = qkv(dtype=bf16)
        close([attend(*inputs, None, window)], [attend_plainly(*inputs, window)], bf16)
        y = attend(*(x.to("meta").requires_grad_() for x in inputs), None, window)
        y.sum().backward()
        assert y.shape == inputs[0].shape and y.device.type == "meta"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("cudnn", "needs an NVIDIA GPU, not cpu"),
        ("flash2", "needs an NVIDIA GPU, not cpu"),
        ("flash3", "needs an NVIDIA GPU, not cpu"),
        ("flash4", "needs an NVIDIA GPU, not cpu"),
        ("varlen", "needs an NVIDIA GPU, not cpu"),
        ("sdpa", "neither windows nor chunks"),
        ("fast", "unknown: use blocks, "),
    ],
)
def test_a_kernel_that_cannot_run_is_one_line_of_error(name, reason):
    with pytest.raises(UserError, match=reason) as told:
        attend(*qkv(dtype=bf16), None, 3, kernel=name)
    assert "\n" not in str(told.value)


def test_reasons_name_what_is_missing(monkeypatch):
    gpu(monkeypatch, 9, cudnn=91002)
    assert "older than 9.15.1" in kernel_works("cudnn", "cuda")
    assert "flash_attn_interface cannot be imported" in kernel_works("flash3", "cuda")
    assert kernel_works("flash2", "cuda") == kernel_works("sdpa", "cuda") == ""
    assert "made for a CPU" in kernel_works("blocks", "cuda")
    gpu(monkeypatch, 8)
    for name in ("cudnn", "flash3", "flash4"):
        assert "this GPU has 8" in kernel_works(name, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attention.examine.cache_clear()
    assert "PyTorch sees none" in kernel_works("cudnn", "cuda")
    old = types.ModuleType("torch.nn.attention.varlen")
    old.varlen_attn = lambda q, k, v, is_causal=False: 1 / 0  # as in PyTorch 2.10
    monkeypatch.setitem(sys.modules, old.__name__, old)
    gpu(monkeypatch, 9)
    assert "2.11 or newer" in kernel_works("varlen", "cuda")
    assert choose_kernel(*like(256, 256), 64, False, True) == "mask"
    monkeypatch.setitem(sys.modules, old.__name__, None)
    gpu(monkeypatch, 9)
    assert "cannot be imported" in kernel_works("varlen", "cuda")


old_fakes = pytest.mark.skipif(
    not HAS_VARLEN,
    reason="before 2.11, tensors that are on a GPU in name need a driver",
)


def recorded(monkeypatch) -> list[dict]:
    "Replace PyTorch's function by one that notes how it was asked, for tensors of air."
    calls = []

    def attention_of_pytorch(q, k, v, attn_mask=None, is_causal=False, **options):
        cuda = torch.backends.cuda
        calls.append(
            {
                "heads": (q.size(1), k.size(1)),
                "queries": q.size(2),
                "mask": attn_mask is not None and tuple(attn_mask.shape),
                "causal": is_causal,
                "shared": options.get("enable_gqa", False),
                "cudnn": cuda.cudnn_sdp_enabled(),
                "math": cuda.math_sdp_enabled(),
            }
        )
        return 1.0 * q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_of_pytorch)
    return calls


@old_fakes
def test_heads_are_copied_where_the_kernel_cannot_share_them(monkeypatch):
    "With a table, and in float32: else PyTorch would store all scores on a GPU."
    gpu_of_air(monkeypatch, 8)
    calls = recorded(monkeypatch)

    def ask(T, S, dtype, *, window=0, trains=False, ragged=False):
        with FakeTensorMode():
            q = torch.empty(2, T, 4, 8, device="cuda", dtype=dtype)
            k = torch.empty(2, S, 2, 8, device="cuda", dtype=dtype)
            cache = None
            if ragged:
                cache = types.SimpleNamespace(uniform=False)
                cache.cache_seqlens = torch.empty(2, dtype=torch.int64, device="cuda")
            y = attend(q.requires_grad_(trains), k, k, cache, window)
            assert y.shape == q.shape and y.device.type == "cuda"
        return calls.pop()

    asked = ask(16, 16, fp32, window=5, trains=True)
    assert asked["heads"] == (4, 4) and asked["mask"] == (1, 1, 16, 16)
    asked = ask(6, 16, fp32)  # a chunk after a prefix
    assert asked["heads"] == (4, 4) and asked["mask"] == (1, 1, 6, 16)
    asked = ask(16, 16, fp32)
    assert asked["heads"] == (4, 4) and asked["causal"] and not asked["mask"]
    asked = ask(3, 16, bf16, ragged=True)
    assert asked["heads"] == (4, 4) and asked["mask"] == (2, 1, 3, 16)
    asked = ask(1, 16, bf16, ragged=True)  # one query: its heads are rows
    assert asked["heads"] == (2, 2) and asked["queries"] == 2
    assert asked["mask"] == (2, 1, 1, 16) and not asked["shared"]
    asked = ask(1, 16, bf16)
    assert asked["heads"] == (2, 2) and not asked["mask"] and not asked["causal"]
    asked = ask(16, 16, bf16, trains=True)  # no table: the kernel shares heads itself
    assert asked["heads"] == (4, 2) and asked["shared"] and asked["causal"]
    assert not asked["cudnn"] and ask(256, 256, bf16, trains=True)["cudnn"]
    assert not ask(256, 256, bf16)["cudnn"]  # a plan for each shape pays in training
    assert not ask(256, 256, fp32, window=5, trains=True)["cudnn"]
    assert not ask(1, 16, bf16)["cudnn"] and not ask(1, 16, bf16, ragged=True)["cudnn"]


@old_fakes
def test_cudnn_is_asked_first_and_only_for_training(monkeypatch):
    gpu_of_air(monkeypatch, 9)
    calls = recorded(monkeypatch)
    orders = []
    ask = F.scaled_dot_product_attention

    def noting(*args, **options):
        orders.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return ask(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    with FakeTensorMode():
        q = torch.empty(2, 128, 4, 8, device="cuda", dtype=bf16)
        attend(q.requires_grad_(), q.detach(), q.detach())
        attend(q.detach(), q.detach(), q.detach())
    backends = torch.nn.attention.SDPBackend
    assert orders[0] == [backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION]
    assert calls[0]["cudnn"] and not calls[0]["math"]
    assert backends.CUDNN_ATTENTION not in orders[1] and calls[1]["math"]


@old_fakes
def test_the_choice_is_said_once_for_each_kind_of_call(monkeypatch, capsys):
    gpu_of_air(monkeypatch, 9)
    recorded(monkeypatch)
    attend(*qkv())
    assert capsys.readouterr().out == ""  # on a CPU there is little to choose
    with FakeTensorMode():
        q = torch.empty(2, 128, 4, 8, device="cuda", dtype=bf16, requires_grad=True)
        for x in (q, q, q.detach(), q.detach(), q[:, :5], q[:, :5].detach()):
            attend(x, x, x)
        q32 = torch.empty(2, 128, 4, 8, device="cuda")
        attend(q32, q32, q32, window=4)
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "attention for training: cudnn",
        "attention for inference: sdpa",
        "attention for training: sdpa",
    ]
    assert told[3].startswith("attention for inference, windows: mask, which also")
    assert len(told) == 4


@pytest.mark.slow
def test_what_only_a_gpu_reaches_is_one_graph_too(monkeypatch, capsys):
    "PyTorch's choice narrowed for reading, and the line that says the choice."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    kernels = torch.nn.attention.SDPBackend
    kept = [kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]

    def narrowed(q, plan):
        return torch.nn.attention.sdpa_kernel(kept)

    monkeypatch.setattr(attention, "pytorch_choice", narrowed)

    def f(q, k, v):
        name = attention.say_kernel(choose_kernel(q, k, 0, False, False), False, False)
        return attend(q, k, v, kernel=name) + attend(q[:, 2:], k, v).sum()

    inputs = qkv()
    told = f(*inputs)
    torch.testing.assert_close(compiled(f)(*inputs), told)
    attention.announce.cache_clear()
    compiled(f)(*inputs)
    assert capsys.readouterr().out == 2 * "attention for inference: sdpa\n"
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_window_over_all_keys_is_none(monkeypatch):
    seen = []
    monkeypatch.setitem(KERNELS, "sdpa", lambda q, k, v, w, s: seen.append(w) or q)
    attend(*qkv(), None, 7)
    attend(*qkv(), None, 99)
    assert seen == [0, 0]


def test_all_layers_can_be_told_which_kernel_to_use(monkeypatch):
    config = GPTConfig(n_embd=64, n_head=4, n_kv_head=2)
    model = torch.nn.ModuleList(CausalSelfAttention(config, i) for i in range(2))
    x = torch.randn(1, 9, 64)
    tables = precompute_rotary(9, 16)
    free = [layer(x, *tables) for layer in model]
    for name in ("twin", "mask", "sdpa", "blocks", ""):
        set_kernel(model, name)
        assert [layer.kernel for layer in model] == [name] * 2
        for layer, y in zip(model, free):
            torch.testing.assert_close(layer(x, *tables), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UserError, match="'cudnn' cannot run on cpu: it needs an NVIDIA"
    ):
        set_kernel(model, "cudnn")
    with pytest.raises(UserError, match="unknown"):
        set_kernel(model, "fa3")
    assert [layer.kernel for layer in model] == ["", ""]


@pytest.mark.parametrize("heads", SHARES)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_ragged_rows_see_what_each_would_see_alone(heads, window, dtype):
    for queries in (1, 3):
        q, k, v = qkv(2, 9, 9, *heads, dtype=dtype)
        cache = KVCache(2, heads[1], 12, 8, 1, dtype=dtype)
        insert(cache, 0, k[:, :6], v[:, :6])
        cache.set_lengths([6, 2])
        new = [x[:, 6 : 6 + queries] for x in (q, k, v)]
        y = attend(new[0], *insert(cache, 0, *new[1:]), cache, window)
        for row, length in enumerate((6, 2)):
            old = [torch.cat((x[:, :length], n), 1) for x, n in zip((k, v), new[1:])]
            alone = attend_plainly(
                new[0][row : row + 1], *(x[row : row + 1] for x in old), window
            )
            close([y[row : row + 1]], [alone], dtype)


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
    with pytest.raises(
        ValueError, match=r"holds 3 positions, but 4 are needed.*grow=True"
    ):
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


@pytest.mark.slow
def test_the_mark_of_a_constant_is_pytorchs():
    "Ours does not load the compiler, which every command would have to wait for."
    ours = vars(constant_when_compiled(lambda: 1))
    assert ours == vars(torch.compiler.assume_constant_result(lambda: 1)) and ours
    code = "import sys, nanochat.stage; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
