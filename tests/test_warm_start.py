"""Stages that begin with the optimizer state of the model they continue."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.config import ChatConfig, OptimConfig
from nanochat.stage import midtrain as main
from nanochat.train import StopSignal

OPTIONS = dict(
    device_batch_size=2,
    total_batch_size=256,
    num_iterations=4,
    eval_every=-1,
    eval_tokens=128,
    optimizer=OptimConfig(matrix_lr=0.01),
    lr_frac=0.5,
    device="cpu",
    warm_start=True,
)


class Begun(Exception):
    "Raised with the optimizer and the run instead of training."


def begin(monkeypatch, **options) -> tuple:
    "Return what the loop would be called with."

    def stop(model, optimizer, batches, run):
        raise Begun(optimizer, run)

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.stage.train", stop)
        with pytest.raises(Begun) as begun:
            main(ChatConfig(**OPTIONS | options))
    return begun.value.args


def state_file(folder):
    return folder / "step_000008" / "optimizer_00000_of_00001.safetensors"


@pytest.mark.slow
def test_a_warm_start_has_the_parents_averages_and_the_stages_rates(
    base_model, monkeypatch
):
    optimizer, run = begin(monkeypatch)
    expected = load_file(state_file(base_model))
    found = optimizer.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    momenta = [v for name, v in found.items() if name.endswith("/momentum")]
    assert momenta and all(v.abs().max() > 0 for v in momenta)
    rates = [g["initial_lr"] for g in optimizer.parts["muon"].param_groups]
    assert rates == [0.01] and run.lr_scale(0) == 0.5 and run.start == 0
    cold, _ = begin(monkeypatch, warm_start=False)
    assert not any(cold.parts[kind].state for kind in cold.parts)


@pytest.mark.slow
def test_resuming_a_warm_start_equals_not_stopping(base_model, base_dir, monkeypatch):
    folders = {t: base_dir / "mid_checkpoints" / t for t in ("whole", "parts", "cold")}
    main(ChatConfig(**OPTIONS, tag="whole"))
    main(ChatConfig(**OPTIONS | {"warm_start": False}, tag="cold"))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self, device: torch.ones(()))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                main(ChatConfig(**OPTIONS, tag="parts"))
    assert checkpoint.list_steps(folders["parts"]) == [1, 2]
    main(ChatConfig(**OPTIONS, tag="parts"))
    ends = {
        tag: checkpoint.read_meta(folder / "step_000004")["sha256"]
        for tag, folder in folders.items()
    }
    assert ends["parts"] == ends["whole"]
    assert ends["cold"] != ends["whole"]


@pytest.mark.slow
def test_state_that_is_missing_damaged_or_of_another_shape_is_refused(base_model):
    file = state_file(base_model)
    kept = shutil.copy(file, file.with_suffix(".kept"))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged: delete"):
        main(ChatConfig(**OPTIONS))
    step = checkpoint.list_steps(base_model)[-1]
    state = load_file(kept)
    momentum = next(k for k in state if k.endswith("/momentum"))
    save_file(state | {momentum: torch.ones(3, 3)}, file)
    with pytest.raises(UserError, match=r"has shape \(3, 3\), not"):
        redescribe(base_model / f"step_{step:06d}")
        main(ChatConfig(**OPTIONS))
    file.unlink()
    with pytest.raises(UserError, match=r"no optimizer state.*without --warm-start"):
        redescribe(base_model / f"step_{step:06d}")
        main(ChatConfig(**OPTIONS))


def redescribe(path) -> None:
    "Make the description of a checkpoint agree with the files that it has now."
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256_of_this"]
    files = [f for f in path.iterdir() if f.name in meta["sha256"]]
    meta["sha256"] = {f.name: checkpoint.digest(f) for f in files}
    meta["sha256_of_this"] = checkpoint.fingerprint(meta)
    (path / "meta.json").write_text(json.dumps(meta))
