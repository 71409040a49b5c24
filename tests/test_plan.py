"""The plan against what was published, and against wrong questions."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat import gpus
from nanochat.accounting import (
    activation_memory,
    kept_weights,
    parameter_counts,
    training_memory,
)
from nanochat.common import UserError
from nanochat.config import BaseConfig, OptimConfig
from nanochat.dry_run import walk
from nanochat.fp8 import fp8_memory, use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.gpus import GPUS, Gpu, find_gpu, gpu_key, gpu_record, show_record
from nanochat.plan import (
    NVLINK,
    base_plan,
    check_fits,
    choose_depth,
    collective_bytes,
    collective_seconds,
    largest_batch,
    make_plan,
    measured_gpu,
    model_config,
    peak_memory,
    published_memory,
    training_seconds,
    utilization,
)

HOURS = [  # card, ranks, depth, vocabulary, design, tokens of the run, hours
    ("h100", 8, 20, 65_536, "default", 11_219_763_200, 172.57 / 60),
    ("h100", 8, 32, 65_536, "default", 37_580_963_840, 31.3),
    ("a100-80", 8, 20, 65_536, "default", 11_219_763_200, 6.6),
    ("5090", 1, 20, 65_536, "default", 11_219_763_200, 3918 / 60),
    ("4090", 1, 12, 32_768, "modern", 150_800 * 96.8 * 60, 96.8 / 60),
]
PEAKS = [  # ranks, depth, rows, GiB
    (8, 20, 32, 75_422 / 1024),
    (8, 32, 8, 77_017 / 1024),
    (8, 34, 4, 69.8),
    (1, 20, 8, 29.6),
]


@pytest.fixture(autouse=True)
def no_record(monkeypatch):
    "Plan from published runs, whatever has been measured where the tests run."
    monkeypatch.setenv("NANOCHAT_GPU_RECORD", os.devnull)


@pytest.mark.parametrize("card, ranks, depth, vocab, arch, tokens, hours", HOURS)
def test_hours_of_published_runs(card, ranks, depth, vocab, arch, tokens, hours):
    plan = make_plan(model_config(depth, vocab, 2048, arch=arch), 1, 524_288, 1000)
    seconds = training_seconds(plan, GPUS[card], ranks) * tokens / plan.tokens
    assert seconds / 3600 == pytest.approx(hours, rel=0.15)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_known_by_its_name(name, key):
    assert find_gpu(name) is GPUS.get(key) and gpu_key(name) == key


@pytest.mark.parametrize("ranks, depth, rows, gib", PEAKS)
def test_memory_of_published_runs(ranks, depth, rows, gib):
    told = published_memory(model_config(depth, 65_536, 2048), rows, ranks)
    assert told / 2**30 == pytest.approx(gib, rel=0.1)


def test_our_count_is_below_what_was_published():
    for ranks, depth, rows, _ in PEAKS:
        plan = base_plan(BaseConfig(depth=depth, device_batch_size=rows), 65_536, ranks)
        assert plan.memory < published_memory(plan.model, rows, ranks)


@pytest.mark.parametrize(
    "card, ranks, depth, rows",
    [("h100", 8, 20, 32), ("h100", 8, 32, 8), ("5090", 1, 20, 8)],
)
def test_the_batches_that_were_published_fit(card, ranks, depth, rows):
    c = model_config(depth, 65_536, 2048)
    assert largest_batch(c, GPUS[card], 524_288, ranks) == rows


def test_more_bandwidth_and_more_width_reach_more():
    slow, fast = Gpu(80, 1e15, 2e12), Gpu(80, 1e15, 4e12)
    assert utilization(slow, 1280) < utilization(fast, 1280)
    assert utilization(slow, 768) < utilization(slow, 1280)


def test_the_chosen_depth_is_the_deepest_in_the_time():
    config = BaseConfig()
    gpu = GPUS["h100"]
    for hours in (0.5, 4, 30):
        depth = choose_depth(config, 65_536, gpu, 8, hours)
        need = []
        for d in (depth, depth + 1):
            rows = largest_batch(model_config(d, 65_536, 2048), gpu, 524_288, 8)
            chosen = replace(config, depth=d, device_batch_size=rows)
            plan = base_plan(chosen, 65_536, 8)
            need.append(training_seconds(plan, gpu, 8) / 3600)
        assert need[0] <= hours < need[1]


def test_what_cannot_fit_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"depth 34 needs about \d+ GiB .* has 24 GiB"):
        largest_batch(model_config(34, 65_536, 2048), GPUS["4090"], 524_288, 1)
    with pytest.raises(UserError, match="no depth fits"):
        choose_depth(BaseConfig(), 65_536, GPUS["h100"], 8, 1e-6)
    plan = base_plan(BaseConfig(), 65_536)
    check_fits(plan, plan.memory)
    with pytest.raises(UserError, match=r"device_batch_size 32 needs .* halve"):
        check_fits(plan, plan.memory - 1)


class Fused(torch.autograd.Function):
    "What a fused kernel keeps: inputs, output, and one float32 number for each query."

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out


def kept_bytes(
    config: GPTConfig, rows: int, dtype: torch.dtype, eight: bool = False
) -> int:
    "Count the storage that autograd keeps in a forward pass on the meta device."
    with torch.device("meta"):
        model = GPT(config, dtype)
        ids = torch.zeros(rows, config.sequence_len, dtype=torch.int64)
    if eight:
        use_fp8(model)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids, ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_activations_are_what_autograd_keeps(monkeypatch, dtype, kv_heads):
    "On the meta device, with a stand-in for the fused kernel that a GPU has."

    def fused(q, k, v, **options):
        return Fused.apply(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    config = GPTConfig(256, 512, 3, 4, kv_heads, 256)
    rows = 4
    told = activation_memory(config, rows, dtype.itemsize, device_type="cuda")
    head = parameter_counts(config)["lm_head"] * 4  # its gradient is kept as well
    assert told + head == pytest.approx(kept_bytes(config, rows, dtype), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_eight_bits_add_is_what_autograd_keeps_more(monkeypatch, dtype):
    def fused(q, k, v, **options):
        return Fused.apply(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    config = GPTConfig(256, 512, 3, 4, 4, 256)
    rows = 4
    more = kept_bytes(config, rows, dtype, True) - kept_bytes(config, rows, dtype)
    assert fp8_memory(config, rows, dtype.itemsize) == pytest.approx(more, rel=0.03)


def test_float32_on_a_gpu_is_not_planned_like_a_cpu():
    config = model_config(20, 65_536, 2048)
    sizes = {}
    for kind in ("cuda", "cpu"):
        plan = make_plan(
            config, 16, 524_288, 1000, activation_bytes=4, device_type=kind
        )
        sizes[kind] = plan.memory
    half = make_plan(config, 16, 524_288, 1000)
    assert half.memory < sizes["cuda"] < 0.7 * sizes["cpu"]
    unsaid = make_plan(config, 16, 524_288, 1000, activation_bytes=4)
    assert unsaid.memory == sizes["cpu"]
    parts = training_memory(config, 16, 4, device_type="cuda")
    scores = 4 * 16 * kept_weights(config) * config.n_head
    on_cpu = activation_memory(config, 16, 4)
    sums = 4 * 16 * 2048 * 20 * config.n_head
    assert parts["activations"] == on_cpu - scores + sums
    assert parts["update"] < training_memory(config, 16, 4)["update"]


@pytest.fixture
def ask(command):
    "Return a function that runs `nanochat plan`."
    return partial(command, "plan")


@pytest.mark.slow
def test_the_command_answers_in_a_table_and_in_json(ask):
    told = ask("--depth=20", "--gpus=8", "--gpu=h100", "--json=True")
    facts = json.loads(told.stdout.splitlines()[-1])
    assert facts["num_steps"] == 21_400 and facts["device_batch_size"] == 32
    assert facts["hours"] == pytest.approx(172.57 / 60, rel=0.15)
    assert facts["dollars"] == pytest.approx(24 * facts["hours"], abs=0.2)
    assert facts["memory_by_part"]["total"] == facts["memory"]
    table = ask("--gpus", "8", "--gpu", "h100", "--budget", "100").stdout
    assert "depth 20" in table and "560,988,160" in table


def invented_record(**changes) -> dict:
    "A record as dev/gpu.py would write it; its figures are made up for these tests."
    figures = {"depth": 20, "vocab_size": 65_536, "sequence_len": 2048}
    figures |= {"tokens_per_second": 160e3, "mfu": 0.56}
    figures |= {"peak_bytes": 26e9, "counted_bytes": 25e9, "optimizer_share": 0.031}
    training = {"status": "ok", "why": "", "figures": figures}
    profile = {"parts": {"matrix products": 2.0, "attention": 1.0, "idle": 1.0}}
    levers = {"rows": [{"lever": "no mask", "tokens_per_second": 161e3, "note": ""}]}
    record = {
        "date": "1 January 2027",
        "tiny": False,
        "device": {"name": "NVIDIA H100 80GB HBM3", "key": "h100"},
        "environment": {"torch": "2.11.0"},
        "sections": {
            "training": training,
            "profile": {"status": "ok", "why": "", "figures": profile},
            "levers": {"status": "ok", "why": "", "figures": levers},
            "fp8": {"status": "skipped", "why": "no time", "figures": {}},
        },
    }
    return record | changes


@pytest.fixture
def write_record(monkeypatch, tmp_path):
    "A function that makes a record the one that is found."
    monkeypatch.setenv("NANOCHAT_GPU_RECORD", str(tmp_path / "gpu.json"))
    return lambda record: (tmp_path / "gpu.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_a_measured_card_is_planned_by_its_measurement(write_record, ask):
    write_record(invented_record())
    gpu = measured_gpu("h100")
    c = model_config(20, 65_536, 2048)
    assert gpu.source == "measured here, 1 January 2027"
    plan = make_plan(c, 16, 524_288)
    assert plan.tokens / training_seconds(plan, gpu, 1) == pytest.approx(160e3)
    counted = training_memory(c, 16, 2, 1, 16, device_type="cuda")["total"]
    assert peak_memory(c, 16, 1, gpu, 16) == pytest.approx(1.04 * counted)
    assert utilization(gpu, 768) < utilization(gpu, 1280)
    assert measured_gpu("a100-80") is GPUS["a100-80"]  # another card
    told = ask("--depth=20", "--gpus=1", "--gpu=h100", "--json=True").stdout
    facts = json.loads(told.splitlines()[-1])
    assert facts["source"] == gpu.source
    assert facts["tokens_per_second"] == pytest.approx(160e3, rel=1e-3)
    assert facts["device_batch_size"] == 32  # counted: 40.7 GiB, and 64 do not fit
    assert "160,0" in ask("--gpu", "h100", "--depth", "20").stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"tiny": True},
        {"device": {"name": "NVIDIA H100 PCIe", "key": None}},
        {"sections": {}},
        {"sections": {"training": {"status": "failed", "why": "", "figures": {}}}},
        {"sections": {"training": {"status": "timeout", "why": "", "figures": {}}}},
    ],
    ids=["tiny", "unknown card", "empty", "failed", "timeout"],
)
def test_what_is_no_measurement_changes_no_plan(write_record, changes):
    write_record(invented_record(**changes))
    assert measured_gpu("h100") is GPUS["h100"]


def test_a_record_is_looked_for_in_three_places(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCHAT_GPU_RECORD", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpus, "package_folder", lambda: tmp_path / "nanochat")
    assert gpu_record() is None
    kept = tmp_path / "dev" / "records" / "gpu.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(invented_record(date="kept")))
    assert gpu_record()["date"] == "kept"
    own = tmp_path / "base" / "gpu.json"
    own.parent.mkdir()
    own.write_text(json.dumps(invented_record(tiny=True)))
    assert gpu_record()["date"] == "kept"  # a rehearsal hides nothing
    own.write_text(json.dumps(invented_record(date="own")))
    assert gpu_record()["date"] == "own"
    own.write_text("{")
    with pytest.raises(UserError, match=r"gpu\.json is not a record.*measure again"):
        gpu_record()


def test_chapters_show_a_record_or_say_that_there_is_none(write_record, capsys):
    show_record(training=[], profile=[])
    assert capsys.readouterr().out == "This has not been measured on a GPU yet.\n"
    write_record(invented_record())
    show_record(fp8=[])  # it was skipped
    assert capsys.readouterr().out == "This has not been measured on a GPU yet.\n"
    show_record(training=[], profile=[], levers=[], fp8=[], decoding=[])
    told = capsys.readouterr().out
    for text in ("NVIDIA H100 80GB HBM3, torch 2.11.0, 1 January 2027", "160,000"):
        assert text in told
    for text in ("24.21 GiB", "56.0%", "3.1%", "matrix products  2        50.0%"):
        assert text in told
    assert "fp8: skipped (no time)" in told and "decoding" not in told
    show_record(training=["mfu"], levers=["lever"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["figure", "value"],
        ["mfu", "56.0%"],
    ]
    assert [line.strip() for line in lines[4:]] == ["levers: ok", "lever", "no mask"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpu", "tpu"], "use h100"),
        (["--gpu", "5090", "--budget", "50"], "add --price"),
        (["--gpu", "h100", "--depth", "20", "--hours", "3"], "leave --depth out"),
        (["--gpu", "h100", "--gpus", "0"], "use at least 1"),
        (["--budget", "10"], "need a --gpu"),
        (["--gpu", "h100", "--device-batch-size", "64"], "use at most 32"),
    ],
)
def test_the_command_refuses_nonsense_in_one_line(ask, options, message):
    told = ask(*options)
    assert told.returncode == 2 and message in " ".join(told.stderr.split())
    assert "Traceback" not in told.stderr


@pytest.mark.slow
def test_a_dry_run_holds_what_was_planned():
    "Eight ranks in one process: sizes of the real objects, and what they send."
    config = BaseConfig(depth=20, device_batch_size=16, world=8, dry_run=True)
    found = walk(config, 65_536)
    params = 4 * 560_988_160
    assert found["weights"] == found["gradients"] == params
    told = training_memory(found["plan"].model, 16, 2, 8, 2)
    assert found["optimizer"] == pytest.approx(told["optimizer"], rel=0.1)
    for name in ("reduce_scatter_base", "allgather_base"):
        calls, moved = found["collectives"][name]
        assert calls == 5  # two tables, three shapes of matrices
        assert params <= moved < 1.1 * params  # 20 matrices do not divide by 8
    assert found["collectives"]["allreduce"][1] < 100  # a count and a loss


def test_a_dry_run_changes_with_dtype_and_ranks():
    config = BaseConfig(depth=4, device_batch_size=16, world=8, dry_run=True)
    found = walk(config, 65_536)
    full = walk(replace(config, dtype="float32"), 65_536)
    assert full["planned"]["activations"] > 1.8 * found["planned"]["activations"]
    assert full["weights"] == found["weights"]  # in float32 either way
    alone = walk(replace(config, world=1), 65_536)
    assert not {"reduce_scatter_base", "allgather_base"} & alone["collectives"].keys()
    assert found["optimizer"] < 1.1 * alone["optimizer"] / 8


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize(
    "fields", [{}, {"kv_heads": 2}, {"arch": "modern", "depth": 5}], ids=str
)
def test_the_plan_counts_what_the_optimizers_send(fields, world):
    config = BaseConfig(depth=4, max_seq_len=64, device_batch_size=1, world=world)
    config = replace(config, total_batch_size=64 * world, **fields)
    found = walk(config, 512 * 3)
    seen = found["collectives"]
    shape = found["plan"].model
    told = collective_bytes(shape, world)
    named = {"reduce_scatter": "reduce_scatter_base", "all_gather": "allgather_base"}
    for name, operator in named.items():
        assert told[name] == seen[operator][1]
    scalars = seen["allreduce"][1] - told["all_reduce"]
    assert 0 <= scalars <= 32  # the count of targets, the loss, the norm
    halves = sum(told.values()) + told["all_reduce"]
    expected = halves * (world - 1) / world / NVLINK
    assert collective_seconds(shape, world) == pytest.approx(expected)
    assert collective_seconds(shape, 1) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": OptimConfig(matrix_method="cubic")}, {"grad_clip": -1.0}],
    ids=["method", "clip"],
)
def test_a_dry_run_refuses_what_training_refuses(wrong):
    config = BaseConfig(depth=2, max_seq_len=64, device_batch_size=2, world=2)
    config = replace(config, total_batch_size=256)
    walk(config, 512)
    with pytest.raises(UserError, match=r"method|grad_clip"):
        walk(replace(config, **wrong), 512)


@pytest.mark.slow
def test_a_dry_run_needs_no_tokenizer_and_refuses_what_does_not_divide(
    command, tmp_path
):
    base = {"NANOCHAT_BASE_DIR": str(tmp_path)}
    dry_run = partial(command, "base_train", "--preset=gpu8", "--dry-run", **base)
    told = dry_run("--world=8")
    assert told.returncode == 0 and "rank 0 of 8: 2 x 16 rows" in told.stdout
    wrong = dry_run("--world=3")
    assert wrong.returncode == 2 and "x 3 ranks: use" in wrong.stderr
