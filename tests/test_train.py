"""What a notebook cannot show of training: crashes, resuming, ranks."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.dataloader import Batch, batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import OptimConfig, setup_optimizer
from nanochat.plan import BaseConfig, make_plan, model_config
from nanochat.train import StopSignal, accumulate
from scripts.base_train import main

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


def losses(base: Path) -> list[float]:
    lines = (base / "runs" / "base_train.jsonl").read_text().splitlines()
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


def test_a_batch_without_targets_has_loss_zero():
    batch = random_batch()
    batch.targets.fill_(-1)
    assert accumulate(tiny_model(), [batch]).item() == 0


def test_streams_do_not_depend_on_ranks(tokenizer, monkeypatch):
    cpu = torch.device("cpu")

    def first(rank: int, world: int, count: int) -> list[torch.Tensor]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        source = batches(tokenizer, "train", 1, 32, cpu, num_streams=4)
        return [next(source).inputs for _ in range(count)]

    alone, two = first(0, 1, 4), first(0, 2, 2) + first(1, 2, 2)
    for mine, theirs in zip([alone[i] for i in (0, 2, 1, 3)], two):
        assert torch.equal(mine, theirs)


def test_resume_equals_uninterrupted_bit_for_bit(base_dir, tiny, monkeypatch):
    main(BaseConfig(**tiny, tag="whole"))
    reference = losses(base_dir)
    monkeypatch.setattr(StopSignal, "agreed", lambda self, device: True)
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
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = checkpoint.list_steps(folder)[-1]
    assert 0 < done < 400
    checkpoint.read_meta(folder / f"step_{done:06d}")
    (folder / ".step_000999.tmp").mkdir()  # what a crash while saving leaves
    main(BaseConfig(**{**tiny, "num_iterations": 400}))
    assert checkpoint.list_steps(folder)[-1] == 400


def run_ranks(base: Path, ranks: int, tiny: dict, tag: str = "") -> list[float]:
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(base), OMP_NUM_THREADS="1")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in tiny.items()]
    flags += [f"--tag={tag or f'ranks{ranks}'}"]
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "-m",
        ]
    done = subprocess.run(
        [*launch, "scripts.base_train", *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return losses(base)


@pytest.mark.timeout(240)
def test_two_ranks_train_like_one(base_dir, tiny):
    tiny |= {"num_iterations": 20, "depth": 2}
    one, two = run_ranks(base_dir, 1, tiny), run_ranks(base_dir, 2, tiny)
    assert len(one) == len(two) == 20
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    folder = base_dir / "base_checkpoints" / "ranks2" / "step_000020"
    assert len(list(folder.glob("optimizer_*_of_00002.safetensors"))) == 2


@pytest.mark.timeout(240)
def test_two_nodes_train_like_one_process(base_dir, tiny, tmp_path_factory):
    "The Slurm script with two torchrun agents on this machine."
    tiny |= {"num_iterations": 12, "depth": 2}
    one, tools = run_ranks(base_dir, 1, tiny), tmp_path_factory.mktemp("tools")
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


@pytest.mark.timeout(240)
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_with_the_same_text(
    base_dir, tiny, before, after
):
    tiny |= {"num_iterations": 12, "depth": 2, "save_every": 6}
    expected = run_ranks(base_dir, before, tiny, "run")
    last = base_dir / "base_checkpoints" / "run" / "step_000012"
    read = lambda: {  # stream -> cursor, of all ranks
        k: v
        for file in last.glob("cursors_*.json")
        for k, v in json.loads(file.read_text()).items()
    }
    cursors = read()
    shutil.rmtree(last)
    found = run_ranks(base_dir, after, tiny, "run")
    assert len(list(last.glob("optimizer_*"))) == after
    assert read() == cursors and cursors
    assert found[:6] == expected[:6]
    assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-4
    assert len(found) == 12


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
        main(BaseConfig(**{**tiny, "matrix_lr": 0.01}))
    before = weights_hash(base_model)
    main(BaseConfig(**{**tiny, "matrix_lr": 0.01, "overwrite": True}))
    assert weights_hash(base_model) != before


def test_best_fit_is_an_option_and_another_run(base_dir, tiny):
    main(BaseConfig(**tiny, best_fit=True))
    folder = base_dir / "base_checkpoints" / "d1" / "step_000008"
    cursors = json.loads((folder / "cursors_00000.json").read_text())
    assert "cropped" in json.dumps(cursors)
    with pytest.raises(UserError, match="other settings"):
        main(BaseConfig(**tiny))
