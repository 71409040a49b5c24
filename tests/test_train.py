"""What a notebook cannot show of training: crashes, resuming, ranks."""

import gc
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from rank_group import run_on_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import adamw, checkpoint, gpt, muon, train
from nanochat.chat_cli import ChatCliConfig
from nanochat.common import UserError, parse_config, run_cli
from nanochat.config import BaseConfig, OptimConfig, changed_settings
from nanochat.dataloader import Batch, batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import muon_momentum, setup_optimizer
from nanochat.plan import make_plan, model_config
from nanochat.stage import pretrain as main
from nanochat.train import Run, StopSignal, accumulate

ROOT = Path(__file__).parents[1]
SHAPE = GPTConfig(
    sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32
)


def tiny_model(seed: int = 0) -> GPT:
    model = GPT(SHAPE)
    model.init_weights(seed)
    return model


def random_batch(seed: int = 0, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, 33), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:].clone())


def weights_hash(folder: Path) -> str:
    step = checkpoint.list_steps(folder)[-1]
    meta = checkpoint.read_meta(folder / f"step_{step:06d}")
    return meta["sha256"]["model.safetensors"]


def newest_log(base: Path) -> Path:
    logs = (base / "runs").glob("base_train*/*.jsonl")
    return max(logs, key=lambda log: log.stat().st_mtime)


def losses(base: Path) -> list[float]:
    lines = newest_log(base).read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if "loss" in r]


def test_first_loss_is_ln_vocabulary():
    loss = accumulate(tiny_model(), [random_batch()])
    assert loss.item() == pytest.approx(math.log(64), abs=1e-6)


def test_init_writes_every_value():
    model = tiny_model()
    with torch.no_grad():
        for tensor in [*model.parameters(), model.cos, model.sin]:
            tensor.fill_(float("nan"))
    model.init_weights(0)
    reference = tiny_model().state_dict()
    assert all(torch.equal(v, reference[k]) for k, v in model.state_dict().items())
    assert model(random_batch().inputs).isfinite().all()


def test_overfits_one_batch():
    model = tiny_model()
    optimizer = setup_optimizer(model, OptimConfig(embedding_lr=0.1))
    batch = random_batch()
    for _ in range(60):
        loss = accumulate(model, [batch])
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_no_output_depends_on_a_later_token():
    model = tiny_model()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    embedded = model.transformer.wte(random_batch(rows=1).inputs).detach()
    embedded.requires_grad_()
    model.transformer.wte.forward = lambda idx: embedded
    logits = model(random_batch(rows=1).inputs)
    for t in (0, 7, 20):
        (gradient,) = torch.autograd.grad(
            logits[0, t].sum(), embedded, retain_graph=True
        )
        assert gradient[0, t + 1 :].abs().max() == 0
        assert gradient[0, : t + 1].abs().min() > 0


def test_accumulation_weighs_tokens_not_micro_batches():
    whole, model = random_batch(rows=4), tiny_model()
    whole.targets[0, 3:] = -1
    whole.targets[1] = -1
    parts = [Batch(whole.inputs[i : i + 2], whole.targets[i : i + 2]) for i in (0, 2)]
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    expected = accumulate(model, [whole])
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    got = accumulate(model, parts)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def masked_batches(step: int) -> list[Batch]:
    "Four micro-batches as in fine-tuning: 30, 5, 0 and 99 tokens of 128 are trained."
    found = []
    for i, count in enumerate((30, 5, 0, 99)):
        batch = random_batch(10 * step + i)
        keep = torch.randperm(128, generator=torch.Generator().manual_seed(i))[:count]
        targets = torch.full_like(batch.targets, -1).flatten()
        targets[keep] = batch.targets.flatten()[keep]
        found.append(Batch(batch.inputs, targets.view_as(batch.targets)))
    return found


def take_steps(share) -> dict:
    "Three steps on a share of the micro-batches; what the first gradient was, and so on."
    model = tiny_model()
    record = {"loss": [], "gradient": {}}
    for weight in model.parameters():  # no zeros that would hide a gradient
        generator = torch.Generator().manual_seed(weight.numel())
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    optimizer = setup_optimizer(model)
    for step in range(3):
        record["loss"].append(accumulate(model, share(masked_batches(step))).item())
        if not step:
            grads = {k: p.grad.clone() for k, p in model.named_parameters()}
            record["gradient"] = grads
        optimizer.step(clip=1.0)
        optimizer.zero_grad()
    return record | {"weights": model.state_dict()}


def one_large(micro: list[Batch]) -> list[Batch]:
    rows = [(b.inputs, b.targets) for b in micro]
    return [Batch(*map(torch.cat, zip(*rows)))]


def steps_on_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(take_steps(lambda micro: micro[rank::2]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def assert_near(got: dict, want: dict) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulation_equals_the_large_batch():
    want, got = take_steps(one_large), take_steps(lambda micro: micro)
    assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert_near(got["gradient"], want["gradient"])
    assert_near(got["weights"], want["weights"])
    naive = [take_steps(lambda micro, i=i: [micro[i]])["loss"][0] for i in (0, 1, 3)]
    assert abs(sum(naive) / 3 - want["loss"][0]) > 1e-3  # a mean of means is another


@pytest.mark.slow
def test_two_ranks_equal_the_large_batch(tmp_path):
    "The loss that each rank tells is the mean over all ranks; the gradients add up."
    run_on_ranks(steps_on_rank, (tmp_path,), 2)
    want = take_steps(one_large)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    sums = {k: v + ranks[1]["gradient"][k] for k, v in ranks[0]["gradient"].items()}
    assert_near(sums, want["gradient"])
    assert ranks[0]["loss"] == ranks[1]["loss"]
    for record in ranks:
        assert record["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert_near(record["weights"], want["weights"])


def test_a_batch_without_targets_has_loss_zero():
    batch = random_batch()
    batch.targets.fill_(-1)
    assert accumulate(tiny_model(), [batch]).item() == 0


def go(model, batches, **options) -> tuple[list[dict], Run]:
    "Train and return the rows of the log."
    options = {"num_steps": len(batches), "micro_batches": 1} | options
    run = Run("base_train", lr_scale=lambda step: 1.0, **options)
    train.train(model, setup_optimizer(model), iter(batches), run)
    log = Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / "base_train.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()], run


@pytest.mark.slow
def test_a_step_without_trained_tokens_changes_nothing(base_dir):
    nothing = random_batch(1)
    nothing.targets.fill_(-1)
    batches = [random_batch(0), nothing, random_batch(2)]
    with_it = tiny_model()
    without = tiny_model()
    results = []
    for model, stream in ((with_it, batches), (without, batches[::2])):
        rows, run = go(model, stream)
        results.append(run.results["smooth_loss"])
        if model is with_it:
            assert rows[1]["loss"] == rows[1]["grad_norm"] == 0
    for p, q in zip(with_it.parameters(), without.parameters()):
        assert torch.equal(p, q)
    assert results[0] == results[1]


@pytest.mark.slow
def test_log_and_progress_tell_the_same(base_dir, capsys):
    bpb = [(2, lambda: {"val_bpb": 1.25})]
    options = {"evaluators": bpb, "flops_per_token": 1e6, "peak": 1e10}
    rows, _ = go(tiny_model(), [random_batch(i) for i in range(4)], **options)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 4 and [r["step"] for r in rows if "val_bpb" in r] == [2, 4]
    for row in steps:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e6 / 1e10)
    line = capsys.readouterr().err.splitlines()[-1]
    for told in ("4/4", "0:00 left", "bpb 1.250", f"mfu {100 * row['mfu']:.0f} %"):
        assert told in line
    assert f"norm {row['grad_norm']:.3g}" in line and "tok/s" in line
    rows, _ = go(tiny_model(), [random_batch()])
    assert "mfu" not in rows[0]  # on a CPU no peak is known


@pytest.mark.slow
def test_the_norm_is_logged_and_clipped(base_dir):
    batches = [random_batch(i) for i in range(3)]
    free, short = tiny_model(), tiny_model()
    rows, _ = go(free, batches)
    limit = min(row["grad_norm"] for row in rows) / 2
    clipped, _ = go(short, batches, grad_clip=limit)
    reference = tiny_model()
    accumulate(reference, batches[:1])
    told = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)
    assert rows[0]["grad_norm"] == pytest.approx(told.item(), rel=1e-5)
    assert clipped[0]["grad_norm"] == rows[0]["grad_norm"]  # before it is clipped
    assert clipped[2]["grad_norm"] != rows[2]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_change(
    base_dir, monkeypatch, value, where
):
    model = tiny_model()
    real = train.accumulate
    before = {}

    def poisoned(model, micro):
        bad = model.transformer.h[1].mlp.c_proj.weight
        with torch.no_grad():
            if micro[0].stream == 2 and where == "weight":
                bad[0, 0] = value
            loss = real_with_grad(model, micro)
            if micro[0].stream == 2 and where == "gradient":
                bad.grad[0, 0] = value
        before.update({k: v.clone() for k, v in model.state_dict().items()})
        return loss

    real_with_grad = torch.enable_grad()(real)
    monkeypatch.setattr(train, "accumulate", poisoned)
    batches = [random_batch(i) for i in range(4)]
    for i, batch in enumerate(batches):
        batch.stream = i
        batch.cursor = {"documents": i}
    with pytest.raises(UserError, match="no weights were changed") as stopped:
        options = {"save": lambda *_: base_dir / "step_000002", "save_every": 2}
        go(model, batches, **options)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7), before[name].nan_to_num(7))
    path = base_dir / "runs" / "base_train_step_000002_rank_0.json"
    for told in (str(path), "step_000002", "--grad-clip 1.0", "--dtype float32"):
        assert told in str(stopped.value)
    dump = json.loads(path.read_text())
    name = "transformer.h.1.mlp.c_proj.weight"
    assert dump["step"] == 2 and not math.isfinite(float(dump["grad_norm"]))
    assert name in dump["gradients"] and (where == "weight") == bool(dump["weights"])
    assert dump["weights"] in ([], [name])
    (batch,) = dump["batches"]
    assert batch["inputs"] == batches[2].inputs.tolist()
    assert batch["targets"] == batches[2].targets.tolist()
    assert batch["cursor"] == {"documents": 2}


@pytest.mark.slow
def test_a_diverged_run_is_one_line_at_the_command_line(
    base_dir, tiny, monkeypatch, capsys
):
    def poisoned(model, micro):
        return accumulate(model, micro) * float("nan")

    monkeypatch.setattr(train, "accumulate", poisoned)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    monkeypatch.setattr(sys, "argv", ["base_train", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_cli(main, BaseConfig, "base_train")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert "error: step 0 of base_train has loss nan" in said
    assert "last checkpoint: none" in said


@pytest.mark.slow
def test_no_garbage_is_collected_in_the_loop(base_dir):
    "Only at evaluations and checkpoints, and as before afterwards."
    seen = []
    places = []
    was = gc.isenabled()

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    def stream():
        for step in range(12):
            places.append(len(seen))
            junk = [[] for _ in range(2000)]  # enough to start a collection, usually
            for item in junk:
                item.append(junk)
            yield random_batch(step)

    options = {"evaluators": [(4, lambda: {"val_bpb": 1.0})], "save_every": 6}
    options["save"] = lambda *_: base_dir
    run = Run("base_train", 12, 1, lambda step: 1.0, **options)
    model = tiny_model()
    optimizer = setup_optimizer(model)
    gc.callbacks.append(note)
    try:
        train.train(model, optimizer, stream(), run)
    finally:
        gc.callbacks.remove(note)
    began = [b - a for a, b in zip(places, places[1:])]
    # Steps 4 and 8 begin with an evaluation, step 6 with a checkpoint behind it.
    assert began == [0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert gc.isenabled() == was and gc.get_freeze_count() == 0


@pytest.mark.slow
def test_the_loop_gives_garbage_collection_back_when_it_fails():
    with pytest.raises(KeyError), train.quiet_gc():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


class Reads(TorchDispatchMode):
    "Count what makes Python wait for the device: item, float, bool, int of a tensor."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        self.count += func._schema.name.removeprefix("aten::") in waits
        return func(*args, **(kwargs or {}))


def summed_alone(out: torch.Tensor, full: torch.Tensor, real) -> dist.Work:
    "Sum over ranks that are not there: a fake group leaves what the memory held before."
    out.copy_(full.flatten()[: out.numel()].view_as(out))
    return real(out, full)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_waits_for_the_device_once(base_dir, monkeypatch, ranks, clip):
    "Loss, norm and the wish to stop come over in one `tolist`, and nothing else does."
    monkeypatch.setattr(gpt, "check_ids", lambda *_: None)  # looks only on a CPU
    listed = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: listed.append(t) or real(t))
    run = Run("base_train", 3, 2, lambda step: 1.0, muon_momentum, grad_clip=clip)
    model = tiny_model()
    stream = [random_batch(i) for i in range(6)]
    if ranks > 1:
        alone = partial(summed_alone, real=adamw.reduce_scatter)
        monkeypatch.setattr(adamw, "reduce_scatter", alone)
        monkeypatch.setattr(muon, "reduce_scatter", alone)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with Reads() as reads:
            train.train(model, setup_optimizer(model), iter(stream), run)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    assert reads.count == 0
    assert [t.shape for t in listed] == [(3,)] * 3


@pytest.mark.slow
def test_deterministic_is_an_option(base_dir, tiny, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    main(BaseConfig(**tiny, tag="plain"))
    plain = losses(base_dir)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        main(BaseConfig(**tiny, deterministic=True, tag="fixed"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert losses(base_dir) == plain

    def parse(kind, *words):
        return parse_config(kind, "base_train", [*words])

    assert parse(BaseConfig, "--deterministic").deterministic is True


RANKS = """
import os, time
from pathlib import Path
from nanochat import train
from nanochat.common import run_cli
from nanochat.config import BaseConfig
from nanochat.stage import pretrain as main

kind, real, calls = os.environ["KIND"], train.accumulate, []

def accumulate(model, micro):
    loss = real(model, micro)
    calls.append(loss)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        Path(os.environ["NANOCHAT_BASE_DIR"], "failed").touch()
        if kind != "nan":
            raise RuntimeError("enough")
        model.lm_head.weight.grad[0, 0] = float("nan")
    while len(calls) == 4 and kind == "hang":
        time.sleep(60)
    return loss

train.accumulate = accumulate
run_cli(main, BaseConfig, "base_train")
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["raise", "hang", "nan"])
def test_one_failing_rank_ends_all_with_its_own_error(base_dir, tiny, tmp_path, kind):
    "Within seconds, also where the other is stuck and has SIGTERM caught."
    script = tmp_path / "ranks.py"
    failed = base_dir / "failed"
    script.write_text(RANKS)
    tiny |= {"save_every": 2, "num_iterations": 50}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc_per_node=2", str(script), *flags],
        cwd=ROOT,
        env=os.environ | {"KIND": kind, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    seconds = time.time() - failed.stat().st_mtime
    assert done.returncode != 0 and seconds < 20, done.stderr[-3000:]
    said = done.stderr.partition("ChildFailedError")[0]  # what follows is torchrun's
    assert said.count("error on rank") == 1, said
    if kind == "nan":
        assert "step 3 of base_train has loss" in said and "grad_norm nan" in said
        assert "step_000002" in said and "one file per rank" in said
        dumps = sorted((base_dir / "runs").glob("base_train_step_000003_rank_*.json"))
        found = [json.loads(dump.read_text())["gradients"] for dump in dumps]
        assert found == [[], ["lm_head.weight"]]
    else:
        assert "error on rank 1: RuntimeError('enough')" in said
    assert checkpoint.list_steps(base_dir / "base_checkpoints" / "d1") == [2]


def test_streams_do_not_depend_on_ranks(tokenizer, monkeypatch):
    cpu = torch.device("cpu")

    def first(rank: int, world: int, count: int) -> list[torch.Tensor]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        source = batches(tokenizer, "train", 1, 32, cpu, num_streams=4)
        return [next(source).inputs for _ in range(count)]

    alone = first(0, 1, 4)
    two = first(0, 2, 2) + first(1, 2, 2)
    for mine, theirs in zip([alone[i] for i in (0, 2, 1, 3)], two):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_resume_equals_uninterrupted_bit_for_bit(base_dir, tiny, monkeypatch):
    main(BaseConfig(**tiny, tag="whole"))
    reference = losses(base_dir)
    monkeypatch.setattr(StopSignal, "agreed", lambda self, device: torch.ones(()))
    for _ in range(2):  # stops after every step it takes; also a second resume
        with pytest.raises(KeyboardInterrupt):
            main(BaseConfig(**tiny, tag="parts"))
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    parts = base_dir / "base_checkpoints" / "parts"
    assert checkpoint.list_steps(parts) == [1, 2]
    main(BaseConfig(**tiny, tag="parts"))
    assert losses(base_dir) == reference
    assert weights_hash(parts) == weights_hash(parts.with_name("whole"))


@pytest.mark.slow
def test_kill_then_resume(base_dir, tiny):
    "A process killed without warning leaves whole checkpoints and a run that continues."
    tiny |= {"num_iterations": 400, "save_every": 5}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    command = [sys.executable, "-m", "scripts.base_train", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = base_dir / "base_checkpoints" / "d1"
    deadline = time.time() + 120
    while not checkpoint.list_steps(folder) and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = checkpoint.list_steps(folder)[-1]
    assert 0 < done < 400
    checkpoint.read_meta(folder / f"step_{done:06d}")
    (folder / ".step_000999.tmp").mkdir()  # what a crash while saving leaves
    subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    assert checkpoint.list_steps(folder)[-1] == 400


def run_ranks(command, base: Path, ranks: int, tiny: dict, tag: str) -> list[float]:
    "Pretrain with several ranks and return the losses."
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    done = command("base_train", *flags, f"--tag={tag}", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    return losses(base)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_train_like_one(base_dir, tiny, command):
    tiny |= {"num_iterations": 20, "depth": 2}
    one = run_ranks(command, base_dir, 1, tiny, "ranks1")
    two = run_ranks(command, base_dir, 2, tiny, "ranks2")
    assert len(one) == len(two) == 20
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    folder = base_dir / "base_checkpoints" / "ranks2" / "step_000020"
    assert len(list(folder.glob("optimizer_*_of_00002.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(240)
def test_two_nodes_train_like_one_process(base_dir, tiny, tmp_path_factory, command):
    "The Slurm script with two torchrun agents on this machine."
    tiny |= {"num_iterations": 12, "depth": 2}
    one = run_ranks(command, base_dir, 1, tiny, "alone")
    tools = tmp_path_factory.mktemp("tools")
    nodes = 'for i in 1 2; do "${@:2}" & done; wait -n && wait -n'
    for name, body in (("srun", nodes), ("scontrol", "echo 127.0.0.1")):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    command = ["bash", "dev/slurm.sh", "scripts.base_train", *flags, "--tag=nodes"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | job | {"PATH": path, "NANOCHAT_BASE_DIR": str(base_dir)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = losses(base_dir)
    assert len(one) == len(two) == 12
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_with_the_same_text(
    base_dir, tiny, command, before, after
):
    tiny |= {"num_iterations": 12, "depth": 2, "save_every": 6}
    expected = run_ranks(command, base_dir, before, tiny, "run")
    last = base_dir / "base_checkpoints" / "run" / "step_000012"

    def read() -> dict[str, dict]:  # stream -> cursor, of all ranks
        found = {}
        for file in last.glob("cursors_*.json"):
            found |= json.loads(file.read_text())
        return found

    cursors = read()
    shutil.rmtree(last)
    found = run_ranks(command, base_dir, after, tiny, "run")
    assert len(list(last.glob("optimizer_*"))) == after
    assert read() == cursors and cursors
    assert found[:6] == expected[:6]
    assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-4
    assert len(found) == 12


@pytest.mark.slow
def test_dtype_is_an_option(base_dir, tiny):
    main(BaseConfig(**tiny, tag="full"))
    full = losses(base_dir)
    main(BaseConfig(**tiny, tag="named", dtype="float32"))
    assert losses(base_dir) == full
    main(BaseConfig(**tiny, tag="half", dtype="bfloat16"))
    half = losses(base_dir)
    assert half != full and half == pytest.approx(full, abs=0.1)
    with pytest.raises(UserError, match="bfloat16 or float32"):
        main(BaseConfig(**tiny, tag="none", dtype="float8"))


@pytest.mark.slow
def test_compile_is_an_option_on_the_cpu(base_dir, tiny, monkeypatch):
    "Twice: the small model that is compared with eager, then the real one."
    called = []
    monkeypatch.setattr(torch, "compile", lambda m, **_: called.append(m) or m)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for flag, times in ((None, 0), (False, 0), (True, 2)):
        main(BaseConfig(**tiny, compile=flag, tag=str(flag)))
        assert len(called) == times
    assert called[0].config.vocab_size < called[1].config.vocab_size


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_on_the_cpu_learns_the_same(base_dir, tiny, monkeypatch):
    tiny |= {"num_iterations": 3, "eval_tokens": 128}
    main(BaseConfig(**tiny, tag="plain"))
    plain = losses(base_dir)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    main(BaseConfig(**tiny, compile=True, tag="compiled"))
    # One of the small model that is compared with eager, one of the real one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert losses(base_dir) == pytest.approx(plain, abs=1e-4)


def test_options_of_the_loop_are_read(monkeypatch):
    def read(*words):
        return parse_config(BaseConfig, "base_train", [*words])

    assert read().compile is None and read().grad_clip == 0
    assert read("--compile").compile is read("--compile", "True").compile is True
    assert read("--compile=False", "--grad-clip=1.0").compile is False
    words = ["--compile", "-p", "hi"]  # a short option after a switch is not its value
    assert parse_config(ChatCliConfig, "chat_cli", words).prompt == "hi"
    assert read("--grad-clip=1.0").grad_clip == 1.0


def test_fields_that_came_later_leave_older_runs_what_they_were():
    idle = BaseConfig(tracker="wandb", compile=True, deterministic=True)
    assert changed_settings({}, idle) == {}
    assert changed_settings({}, BaseConfig(grad_clip=1.0)) == {"grad_clip": (0.0, 1.0)}
    assert changed_settings({}, BaseConfig(dtype="float32")) == {
        "dtype": ("", "float32")
    }


def test_plan_matches_published_sizes():
    d20 = make_plan(model_config(20, 65_536, 2048), 32, 524_288, world_size=8)
    assert d20.parameters == 560_988_160 and d20.num_steps == 21_400
    assert d20.flops / d20.tokens == pytest.approx(3.491758e9, rel=1e-6)
    d32 = make_plan(model_config(32, 65_536, 2048), 8, 524_288, world_size=8)
    assert d32.parameters == 1_879_048_192 and d32.num_steps == 71_680


@pytest.mark.parametrize("total, message", [(500, "use 512"), (0, "use 256")])
def test_plan_says_which_batch_would_do(total, message):
    with pytest.raises(UserError, match=message):
        make_plan(SHAPE, 8, total, 10)


def test_damaged_checkpoint_is_refused(base_model):
    path = base_model / "step_000008"
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model("base", torch.device("cpu"))
    (path / "meta.json").write_text('{"step": 8')
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load_model("base", torch.device("cpu"))


def test_another_tokenizer_is_refused(base_model, base_dir):
    from nanochat.tokenizer import RustBPETokenizer

    RustBPETokenizer.train_from_iterator(["some other text"], 300).save(
        base_dir / "tokenizer"
    )
    with pytest.raises(UserError, match="another tokenizer"):
        checkpoint.load_model("base", torch.device("cpu"))


def test_finished_run_is_not_replaced_by_other_settings(base_model, tiny):
    with pytest.raises(UserError, match="--tag"):
        main(BaseConfig(**{**tiny, "optimizer": OptimConfig(matrix_lr=0.01)}))
    before = weights_hash(base_model)
    main(
        BaseConfig(
            **{**tiny, "optimizer": OptimConfig(matrix_lr=0.01), "overwrite": True}
        )
    )
    assert weights_hash(base_model) != before


def test_best_fit_is_an_option_and_another_run(base_dir, tiny):
    main(BaseConfig(**tiny, best_fit=True))
    folder = base_dir / "base_checkpoints" / "d1" / "step_000008"
    cursors = json.loads((folder / "cursors_00000.json").read_text())
    assert "cropped" in json.dumps(cursors)
    with pytest.raises(UserError, match="different settings"):
        main(BaseConfig(**tiny))
