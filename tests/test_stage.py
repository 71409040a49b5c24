"""A stage around the loop: what it checks before, whose run it continues, what it keeps."""

import json
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import torch

from nanochat import checkpoint, stage
from nanochat.common import UserError, log_path, read_log
from nanochat.config import (
    BaseConfig,
    ChatConfig,
    OptimConfig,
    TextConfig,
    changed_settings,
    weight_settings,
)
from nanochat.rl import RLConfig
from nanochat.stage import Stage, check_disk, find_resume, midtrain, pretrain

# ---- which settings belong to a run


def test_what_determines_the_weights_is_compared_and_nothing_else():
    saved = json.loads(json.dumps(asdict(BaseConfig(depth=4))))
    idle = dict(save_every=7, keep=0, tracker="wandb", tag="x", compile=True)
    assert changed_settings(saved, BaseConfig(depth=4, **idle)) == {}
    assert changed_settings(saved, BaseConfig(depth=5)) == {"depth": (4, 5)}
    other = OptimConfig(betas=(0.9, 0.95))
    found = changed_settings(saved, BaseConfig(depth=4, optimizer=other))
    assert found == {"betas": ([0.8, 0.95], [0.9, 0.95])}


def test_a_run_saved_with_flat_settings_is_the_same_run():
    "Until November 2026 the optimizer's options stood beside the others."
    saved = {"depth": 4, "matrix_lr": 0.02, "embedding_lr": 0.2, "warmup_ratio": 0.0}
    assert changed_settings(saved, BaseConfig(depth=4)) == {}
    saved["matrix_lr"] = 0.05
    assert changed_settings(saved, BaseConfig(depth=4)) == {"matrix_lr": (0.05, 0.02)}


@pytest.mark.parametrize("kind", [BaseConfig, ChatConfig, RLConfig])
def test_every_stage_has_the_optimizers_options_once(kind):
    names = list(weight_settings(kind()))
    assert set(asdict(OptimConfig())) <= set(names) and len(names) == len(set(names))


def test_another_setting_is_named(base_model, tiny):
    other = BaseConfig(**{**tiny, "optimizer": OptimConfig(matrix_lr=0.03)})
    with pytest.raises(UserError, match=r"--matrix-lr was 0\.02 and is 0\.03.*--tag"):
        pretrain(other)


@pytest.mark.slow
def test_another_parent_is_named(base_model, base_dir, tiny):
    chat = ChatConfig(
        device_batch_size=2, total_batch_size=128, num_iterations=2, eval_tokens=128,
        eval_every=-1, device="cpu",
    )  # fmt: skip
    midtrain(chat)
    pretrain(BaseConfig(**{**tiny, "seed": 1, "overwrite": True}))
    with pytest.raises(UserError, match="the model that it started from has been"):
        midtrain(chat)
    midtrain(replace(chat, overwrite=True))


# ---- what is checked before the first step


def test_a_disk_that_cannot_hold_the_checkpoints(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**6))
    check_disk(tmp_path, 400_000, 2)
    with pytest.raises(UserError, match=r"3 of 0\.00 GB must fit at once: free"):
        check_disk(tmp_path, 400_000, 3)
    (tmp_path / "step_000001").mkdir()  # an earlier checkpoint makes room
    (tmp_path / "step_000001" / "model.safetensors").write_bytes(bytes(400_000))
    check_disk(tmp_path, 400_000, 3)


def test_a_full_disk_is_found_before_the_first_step(base_dir, tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(UserError, match="free some space"):
        pretrain(BaseConfig(**tiny))
    assert not log_path("base_train", "d1").exists()


def test_a_folder_that_cannot_be_made(base_dir, tiny):
    (base_dir / "base_checkpoints").write_text("a file in its place")
    with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR"):
        pretrain(BaseConfig(**tiny))


def test_the_size_of_a_checkpoint_is_known_before_the_first_step(base_model):
    path = base_model / "step_000008"
    files = [*path.glob("*.safetensors")]
    model, _, _ = checkpoint.load_model("base", torch.device("cpu"))
    counted = stage.checkpoint_bytes(model, stage.setup_optimizer(model))
    # The files have headers, and a few numbers that are not counted.
    assert counted == pytest.approx(sum(f.stat().st_size for f in files), rel=0.05)


def test_a_corpus_without_validation_is_found_before_the_first_step(
    base_dir, tiny, tmp_path
):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_text("one document, and it is for training")
    with pytest.raises(UserError):
        pretrain(BaseConfig(**{**tiny, "data": str(folder)}))
    assert not log_path("base_train", "d1").exists()


# ---- what is kept


@pytest.mark.slow
def test_the_last_checkpoint_comes_before_the_last_measurement(
    base_dir, tiny, monkeypatch
):
    def fails(*arguments):
        raise RuntimeError("the measurement fails")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "evaluate_bpb", fails)
        with pytest.raises(RuntimeError, match="the measurement fails"):
            pretrain(BaseConfig(**tiny))
    path = base_dir / "base_checkpoints" / "d1" / "step_000008"
    before = checkpoint.read_meta(path)
    assert before["measured"] is False and "val_bpb" not in before["results"]

    results = pretrain(BaseConfig(**tiny))  # the same command: only measures
    after = checkpoint.read_meta(path)
    assert after["measured"] is True and after["results"] == results
    assert results["val_bpb"] > 0 and after["sha256"] == before["sha256"]


@pytest.mark.slow
def test_each_run_has_its_own_log(base_dir, tiny):
    short = {**tiny, "save_every": 4}
    pretrain(BaseConfig(**short, tag="a"))
    a = log_path("base_train", "a").read_text()
    pretrain(BaseConfig(**{**short, "seed": 3}, tag="b"))
    assert log_path("base_train", "a").read_text() == a
    assert len(read_log(log_path("base_train", "b"))) == 9  # eight steps, one measure


# ---- which model is chosen


@pytest.mark.slow
def test_the_deepest_model_is_found_by_its_configuration(base_dir, tiny):
    pretrain(BaseConfig(**{**tiny, "num_iterations": 1}, tag="d9"))
    deep = {**tiny, "num_iterations": 1, "depth": 2}
    pretrain(BaseConfig(**deep, tag="mine"))
    assert checkpoint.find_checkpoint("base").parent.name == "mine"
    pretrain(BaseConfig(**deep, tag="other"))
    with pytest.raises(UserError, match=r"choose one of mine, other with --tag"):
        checkpoint.find_checkpoint("base")
    assert checkpoint.find_checkpoint("base", "other").parent.name == "other"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    assert find_resume(tmp_path, lambda meta: "") == (None, {})
    (tmp_path / "step_000004").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete"):
        find_resume(tmp_path, lambda meta: "")
    assert "not a complete checkpoint" in capsys.readouterr().out
    assert find_resume(tmp_path, lambda meta: "", overwrite=True) == (None, {})


def test_a_stage_counts_the_checkpoints_that_will_be_there(base_model, monkeypatch):
    model, tokenizer, _ = checkpoint.load_model("base", torch.device("cpu"))
    counted = []
    monkeypatch.setattr(stage, "check_disk", lambda *a: counted.append(a[2]))
    optimizer = stage.setup_optimizer(model)
    for save_every, keep in ((-1, 2), (10, 2), (10, 0), (50, 5)):
        config = TextConfig(save_every=save_every, keep=keep)
        names = dict(name="base_train", source="base", tag="t", num_steps=100)
        Stage(
            config=config,
            model=model,
            tokenizer=tokenizer,
            optimizer=optimizer,
            **names,
        ).check()
    assert counted == [1, 3, 10, 2]
