"""What the loop tells TensorBoard, trackio and Weights & Biases: what the log says."""

import importlib.machinery
import importlib.util
import json
import sqlite3
import sys
import types

import pytest
import torch

from nanochat.common import RunLog, UserError

ROWS = [{"loss": 3.5, "grad_norm": 0.25}, {"loss": 3.25, "grad_norm": 0.5}]


def write(trackers: str, rows=ROWS, start: int = 0) -> list[dict]:
    "Write some rows, return what the log then holds."
    with RunLog("base_train", start, trackers, {"depth": 1}) as log:
        for step, row in enumerate(rows, start):
            log.write(step=step, **row)
    return [json.loads(line) for line in log.path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for name in ("WANDB_DIR", "TRACKIO_DIR"):  # what the code sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    "Read a folder of event files back."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def test_tensorboard_holds_what_the_log_holds(tmp_path):
    rows = write("tensorboard")
    found = scalars(tmp_path / "runs" / "tensorboard" / "base_train")
    for name in ("loss", "grad_norm"):
        assert found.pop(name) == [(row["step"], row[name]) for row in rows]
    assert not found


def test_a_resumed_run_takes_back_what_tensorboard_should_forget(tmp_path):
    write("tensorboard", ROWS * 2)
    rows = write("tensorboard", ROWS, start=1)
    found = scalars(tmp_path / "runs" / "tensorboard" / "base_train")
    assert found["loss"] == [(row["step"], row["loss"]) for row in rows]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_the_loop_hands_its_settings_and_rows_on(monkeypatch, tmp_path):
    "Stand-ins with the three functions that trackio and wandb share."
    told = []
    for name in ("trackio", "wandb"):
        fake = types.ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
        fake.init = lambda n=name, **options: told.append((n, options))
        fake.log = lambda values, step, n=name: told.append((n, step, values))
        fake.finish = lambda n=name: told.append((n, "finished"))
        monkeypatch.setitem(sys.modules, name, fake)
    write("trackio,wandb")
    first = {"project": "nanochat", "name": "base_train", "config": {"depth": 1}}
    for name in ("trackio", "wandb"):
        mine = [entry for entry in told if entry[0] == name]
        rows = [(name, step, row) for step, row in enumerate(ROWS)]
        assert mine == [(name, first), *rows, (name, "finished")]


def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write("wandb")
    assert list((tmp_path / "runs" / "wandb").glob("wandb/offline-run-*/*.wandb"))


def test_trackio_works_offline(tmp_path):
    if importlib.util.find_spec("trackio") is None:  # it reads its folder when imported
        pytest.skip("trackio is not installed")
    rows = write("trackio")
    with sqlite3.connect(tmp_path / "runs" / "trackio" / "nanochat.db") as base:
        found = base.execute("select step, metrics from metrics order by step")
        assert [{"step": s, **json.loads(v)} for s, v in found] == rows


def test_a_tracker_that_is_missing_or_unknown(monkeypatch, tmp_path):
    real = importlib.util.find_spec

    def missing(name, *more):
        return None if name == "wandb" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(UserError, match=r"pip install wandb.*nanochat\[trackers\]"):
        write("tensorboard,wandb")
    with pytest.raises(UserError, match="use tensorboard, trackio, wandb"):
        write("mlflow")
    assert not (tmp_path / "runs").exists()  # refused before anything was written
    (tmp_path / "trackio").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(tmp_path)
    if getattr(real("trackio"), "origin", None) is None:
        with pytest.raises(UserError, match="pip install trackio"):
            write("trackio")


def test_only_rank_0_tells(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunLog("base_train", 0, "tensorboard") as log:
        log.write(step=0, loss=torch.ones(()).item())
    assert not (tmp_path / "runs").exists()
