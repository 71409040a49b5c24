"""A save that fails or dies anywhere loses nothing; damage is found before it is used."""

import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_train import losses, random_batch, weights_hash

from nanochat import checkpoint, common
from nanochat.common import RunLog, UserError
from nanochat.config import BaseConfig
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import setup_optimizer
from nanochat.plan import model_config
from nanochat.stage import find_resume
from nanochat.stage import pretrain as main
from nanochat.train import StopSignal, accumulate

ROOT = Path(__file__).parents[1]
SHAPE = GPTConfig(
    sequence_len=32, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16
)


class Faults:
    "Count the calls by which a save changes the disk; the chosen one fails or kills."

    def __init__(self, monkeypatch, at: int, fail):
        self.count = 0
        self.at = at
        self.fail = fail
        self.names = []
        for owner, name in [
            (os, "replace"),
            (os, "fsync"),
            (os, "open"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (checkpoint, "save_file"),
        ]:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))
        monkeypatch.setattr(common, "open", self.open, raising=False)

    def strike(self, name: str) -> bool:
        self.count += 1
        self.names.append(name)
        return self.count == self.at

    def wrap(self, name: str, function):
        def call(*args, **kwargs):
            if self.strike(name):
                if name == "save_file":  # leaves half of its file
                    Path(args[1]).write_bytes(b"half")
                if name == "rmtree":  # leaves half of the folder
                    inside = sorted(f for f in Path(args[0]).glob("*") if f.is_file())
                    for file in inside[::2]:
                        file.unlink()
                self.fail(name)
            return function(*args, **kwargs)

        return call

    def open(self, path, mode="r", *args):
        if self.strike("open"):
            self.fail("open")
        file = builtins.open(path, mode, *args)
        write = file.write

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(half, data):
                if self.strike("write"):
                    write(data[: len(data) // 2])
                    file.flush()
                    self.fail("write")
                return write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Half()


def oserror(number: int):
    def fail(name: str):
        if name == "save_file":  # what the crate says
            raise SafetensorError(
                f"Error while serializing: I/O error: no (os error {number})"
            )
        raise OSError(number, os.strerror(number))

    return fail


def kill(name: str):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def trained():
    "A tiny model with an optimizer that has state."
    model = GPT(SHAPE)
    model.init_weights(0)
    optimizer = setup_optimizer(model)
    accumulate(model, [random_batch()])
    optimizer.step()
    return model, optimizer


def write(folder: Path, step: int, trained, keep: int = 2) -> None:
    cursors = {"0": {"left": [step]}}
    meta = {"results": {}}
    checkpoint.save(folder, step, *trained, cursors, meta=meta, keep=keep)


def verify(folder: Path) -> list[int]:
    "Load every checkpoint that has a name; return their steps."
    steps = checkpoint.list_steps(folder)
    for step in steps:
        path = folder / f"step_{step:06d}"
        assert checkpoint.read_meta(path)["step"] == step
        other = GPT(SHAPE)
        state = checkpoint.load_training_state(path, other, setup_optimizer(other))
        assert state == {"0": {"left": [step]}}
    return steps


def prepared(folder: Path, trained, case: str) -> int:
    "Make what a save finds; return the step that it writes."
    for step in (10, 20):
        write(folder, step, trained)
    if case == "replaced":  # the last one is damaged and written again
        (folder / "step_000020" / "model.safetensors").write_bytes(b"damaged")
        return 20
    (folder / ".step_000025.tmp").mkdir()  # an earlier crash
    (folder / ".step_000025.tmp" / "model.safetensors").write_bytes(b"half")
    return 30


@pytest.mark.slow
@pytest.mark.parametrize("case", ["next", "replaced"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_anywhere_loses_nothing(
    tmp_path, trained, monkeypatch, number, case
):
    failures = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        step = prepared(folder, trained, case)
        with monkeypatch.context() as patch:
            faults = Faults(patch, at, oserror(number))
            try:
                write(folder, step, trained)
            except UserError as error:
                failures.append(faults.names[at - 1])
                full = number == errno.ENOSPC
                assert ("disk full" if full else "cannot write") in str(error)
                assert "no earlier checkpoint is lost" in str(error)
                assert "run the same command again" in str(error)
            else:
                # a failing clean-up of rubbish is no failure of the save
                if faults.count < at:
                    break
        if case == "replaced":
            left = folder / "step_000020" / "model.safetensors"
            if left.exists() and left.read_bytes() == b"damaged":
                shutil.rmtree(folder / "step_000020")
        assert verify(folder)[0] in (10, 20)
        write(folder, 40, trained)
        assert verify(folder)[-1] == 40
        assert not list(folder.glob(".*"))
    else:
        raise AssertionError("the save never succeeded")
    print(f"{len(failures)} of {at - 1} calls made the save fail: {failures}")
    assert len(failures) >= 20
    wanted = {"save_file", "write", "fsync", "replace", "open", "mkdir", "rmtree"}
    if sys.version_info < (3, 11):
        wanted.remove("mkdir")  # pathlib of 3.10 does not look `os.mkdir` up
    assert wanted <= set(failures)


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.parametrize("case", ["next", "replaced"])
def test_a_process_killed_anywhere_in_a_save_loses_nothing(
    tmp_path, trained, monkeypatch, case
):
    for at in range(1, 200):
        folder = tmp_path / str(at)
        step = prepared(folder, trained, case)
        child = os.fork()
        if child == 0:
            Faults(monkeypatch, at, kill)
            try:
                write(folder, step, trained)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        path, meta = find_resume(folder, lambda meta: "")
        assert meta["step"] in ((10, 20) if case == "replaced" else (20, 30))
        other = GPT(SHAPE)
        checkpoint.load_training_state(path, other, setup_optimizer(other))
        if not os.WIFSIGNALED(status):
            break
        write(folder, 40, trained)
        assert find_resume(folder, lambda meta: "")[1]["step"] == 40
        assert not list(folder.glob(".*"))
    print(f"killed at each of {at - 1} calls")
    assert 20 <= at - 1 < 199


def test_keep_last(tmp_path, trained):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, trained, keep=3)
    assert checkpoint.list_steps(tmp_path) == [2, 3, 4]
    write(tmp_path, 5, trained, keep=0)
    assert checkpoint.list_steps(tmp_path) == [2, 3, 4, 5]
    write(tmp_path, 6, trained, keep=1)
    assert checkpoint.list_steps(tmp_path) == [6]
    write(tmp_path, 2, trained)  # a run that replaces the longer one
    assert checkpoint.list_steps(tmp_path) == [2]


@pytest.fixture
def two_steps(base_dir, tiny, monkeypatch):
    "A run that was stopped after two steps, and the weights it will end with."
    main(BaseConfig(**tiny, tag="whole"))
    monkeypatch.setattr(StopSignal, "agreed", lambda self, device: torch.ones(()))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(BaseConfig(**tiny, tag="parts"))
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    return base_dir / "base_checkpoints" / "parts"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_is_found_and_the_earlier_checkpoint_gives_the_same_end(
    two_steps, tiny, capsys, damage
):
    names = sorted(f.name for f in (two_steps / "step_000002").iterdir())
    assert len(names) == 4
    for name in names:
        copy = two_steps.with_name("copy")
        shutil.copytree(two_steps, copy)
        damage(copy / "step_000002" / name)
        with pytest.raises(UserError, match="step 1 is used") as error:
            checkpoint.read_meta(copy / "step_000002")
        assert name in str(error.value) or name == "meta.json"
        shutil.rmtree(copy)
    damage(two_steps / "step_000002" / names[-1])
    main(BaseConfig(**tiny, tag="parts"))
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "resuming from step 1" in printed
    assert weights_hash(two_steps) == weights_hash(two_steps.with_name("whole"))


def test_every_bit_of_the_description_counts(tmp_path, trained):
    write(tmp_path, 1, trained)
    file = tmp_path / "step_000001" / "meta.json"
    good = file.read_bytes()
    record = checkpoint.read_meta(file.parent)
    for at in range(0, len(good), 7):
        data = bytearray(good)
        data[at] ^= 1
        file.write_bytes(data)
        try:
            assert checkpoint.read_meta(file.parent) == record  # a blank, say
        except UserError:
            pass


@pytest.mark.slow
def test_when_nothing_is_whole_it_says_so(two_steps, tiny):
    for step in two_steps.glob("step_*"):
        flip(step / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete"):
        main(BaseConfig(**tiny, tag="parts"))


def test_a_stop_in_the_last_step_still_finishes(base_dir, tiny, monkeypatch):
    tiny |= {"num_iterations": 1}
    monkeypatch.setattr(StopSignal, "agreed", lambda self, device: torch.ones(()))
    main(BaseConfig(**tiny))
    assert checkpoint.list_steps(base_dir / "base_checkpoints" / "d1") == [1]


def test_a_resumed_log_repeats_what_the_checkpoint_does_not_know(base_dir):
    log = RunLog("base_train", tag="d2")
    for step in range(5):
        log.write(step=step, loss=float(step))
    with open(log.path, "a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    again = RunLog("base_train", start=3, tag="d2")
    again.write(step=3, loss=9.0)
    assert losses(base_dir) == [0.0, 1.0, 2.0, 9.0]


@pytest.mark.slow
@pytest.mark.posix
def test_killed_twice_and_resumed_in_base_and_rl(tmp_path):
    "The small version of dev/kill_test.py: every file and the log, bit for bit."
    out = tmp_path / "kill_resume.json"
    flags = ["--kills=2", "--stages=base_train,chat_rl", "--quick", f"--out={out}"]
    command = [sys.executable, "dev/kill_test.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    base, rl = json.loads(out.read_text())["stages"]
    assert len(base["kills"]) == len(rl["kills"]) == 2
    assert len(base["sha256"]) == len(rl["sha256"]) == 5  # 3 files, results, log


@pytest.mark.slow
@pytest.mark.posix
def test_two_ranks_killed_together_or_one_alone_resume_bit_for_bit(tmp_path):
    out = tmp_path / "kill_resume.json"
    flags = ["--kills=2", "--ranks=2", "--stages=base_train", "--quick"]
    command = [sys.executable, "dev/kill_test.py", *flags, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (base,) = json.loads(out.read_text())["ranks_2"]["stages"]
    assert [len(kill["ranks"]) for kill in base["kills"]] == [2, 1]
    names = {"log", "model.safetensors", "results"}
    names |= {f"cursors_0000{rank}.json" for rank in range(2)}
    names |= {f"optimizer_0000{rank}_of_00002.safetensors" for rank in range(2)}
    assert base["sha256"].keys() == names and not base["different"]


@pytest.mark.slow
def test_a_save_takes_less_than_a_step(tmp_path):
    "At depth 4 with the batch of the cpu preset, 4,096 tokens."
    model = GPT(model_config(4, 2048, 256))
    model.init_weights(0)
    optimizer = setup_optimizer(model)
    ids = torch.randint(2048, (16, 257), generator=torch.Generator().manual_seed(0))
    step = []
    save = []
    for i in range(3):
        begun = time.perf_counter()
        accumulate(model, [Batch(ids[:, :-1], ids[:, 1:].clone())])
        optimizer.step()
        optimizer.zero_grad()
        step.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        checkpoint.save(tmp_path, i, model, optimizer)
        save.append(time.perf_counter() - begun)
    print(f"a save takes {min(save):.2f} s, a step {min(step):.2f} s")
    assert min(save) < min(step)


@pytest.mark.parametrize(
    "number, remedy", [(28, "free some space"), (30, "NANOCHAT_BASE_DIR")]
)
def test_any_command_says_what_to_do_about_the_disk(
    base_dir, monkeypatch, capsys, number, remedy
):
    def fail(config):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "argv", ["base_train"])
    with pytest.raises(SystemExit) as stopped:
        common.run_cli(fail, BaseConfig, "base_train")
    assert stopped.value.code == 2
    assert remedy in capsys.readouterr().err
