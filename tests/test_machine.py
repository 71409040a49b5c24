"""What the package finds out about the machine it runs on, and what it needs of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import common
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parents[1]
# What a bare machine with PyTorch and these packages need not have.
MISSING = ("rustbpe", "fastapi", "uvicorn", "pydantic", "tyro", "datasets")
MISSING += ("matplotlib", "transformers", "tiktoken", "huggingface_hub")
TRAINS = "accounting adamw attention checkpoint common dataloader dataset engine "
TRAINS += "functional gpt head loss_eval muon optim plan gpus config train"

BLOCK = """
import importlib, sys

class Absent:
    "Pretend that some packages are not installed."
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(f"nanochat.{name}")
print("imported", len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_training_can_be_imported_on_a_bare_machine():
    program = f"MISSING = {MISSING!r}\n" + BLOCK
    names = TRAINS.split()
    told = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True
    )
    assert told.stdout == f"imported {len(names)}\n", told.stderr


def test_a_source_tree_knows_its_version_and_an_installed_package_its_own(monkeypatch):
    def absent(name):
        raise common.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(common.importlib.metadata, "version", absent)
    project = (ROOT / "pyproject.toml").read_text()
    version = common.package_version()
    assert version.endswith(" (source)")
    assert f'version = "{version.split()[0]}"' in project
    facts = common.environment()
    assert facts["nanochat"] == version and json.dumps(facts)
    monkeypatch.setattr(common.importlib.metadata, "version", lambda name: "7.1")
    assert common.package_version() == "7.1"


class FakeCard:
    name, total_memory, major, minor = "NVIDIA H100 80GB HBM3", 85_017_493_504, 9, 0


@pytest.mark.posix
def test_the_facts_of_a_card(monkeypatch, tmp_path):
    assert common.gpu_facts() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: FakeCard.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: FakeCard)
    tool(monkeypatch, tmp_path, "580.65.06")
    monkeypatch.setattr(common, "DRIVER", tmp_path / "absent")
    facts = common.gpu_facts()
    assert facts["name"] == FakeCard.name and facts["capability"] == "9.0"
    assert facts["memory_gib"] == 79.2 and facts["driver"] == "580.65.06"
    told = common.environment()
    assert told["driver"] == "580.65.06" and told["gpus"] == [FakeCard.name]
    (tmp_path / "version").write_text("575.51\n")
    monkeypatch.setattr(common, "DRIVER", tmp_path / "version")
    assert common.gpu_facts()["driver"] == "575.51"


def tool(monkeypatch, folder: Path, says: str) -> None:
    "Put a program named nvidia-smi first on the path."
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{says}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def unseen(monkeypatch, tmp_path):
    "A machine with two cards that torch cannot use."
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-modeset"):
        (tmp_path / name).touch()
    monkeypatch.setattr(common, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("NANOCHAT_PRESET", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    "ask", [common.detect_preset, common.autodetect_device_type, common.compute_init]
)
def test_a_card_that_torch_does_not_see_is_not_passed_over(unseen, monkeypatch, ask):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"2 NVIDIA GPUs.*driver.*13\.0.*--device cpu"):
        ask()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="install a torch that is built for CUDA"):
        ask()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_hidden_card_is_absent(unseen, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert common.detect_preset() == "cpu"
    common.refuse_unseen_cards()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError):
        common.detect_preset()


def test_a_container_without_device_files_has_no_card(unseen, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "DEVICES", tmp_path / "dev")
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert common.nvidia_cards() == 0 and common.detect_preset() == "cpu"


@pytest.mark.posix
def test_without_device_files_the_drivers_program_is_asked(
    unseen, monkeypatch, tmp_path
):
    monkeypatch.setattr(common, "DEVICES", tmp_path / "none")
    tool(monkeypatch, tmp_path, "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)")
    assert common.nvidia_cards() == 1
    tool(monkeypatch, tmp_path, "NVIDIA-SMI has failed")
    assert common.nvidia_cards() == 0


def test_who_asks_for_the_cpu_gets_it(unseen, monkeypatch):
    assert common.compute_init("cpu").type == "cpu"
    with pytest.raises(UserError, match="2 NVIDIA GPUs"):
        common.compute_init("cuda")
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    assert common.detect_preset() == "cpu" and common.compute_init().type == "cpu"


@pytest.mark.parametrize(
    "options", [["--preset", "cpu"], ["--device", "cpu"], ["--device=cpu"]]
)
def test_the_command_line_may_choose_the_cpu(unseen, monkeypatch, options):
    from nanochat.config import BaseConfig

    monkeypatch.setenv("NANOCHAT_PRESET", "x")  # so that it is put back afterwards
    monkeypatch.delenv("NANOCHAT_PRESET")
    config = common.parse_config(BaseConfig, "base_train", options)
    assert config.depth == int(common.read_preset("base_train", "cpu")["depth"])
    assert common.detect_preset() == "cpu"


def test_the_lab_is_asked_for_by_name_and_needs_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("NANOCHAT_PRESET", raising=False)
    assert common.detect_preset() == "cpu"
    for count in (1, 8):
        with monkeypatch.context() as seen:
            seen.setattr(torch.cuda, "is_available", lambda: True)
            seen.setattr(torch.cuda, "device_count", lambda count=count: count)
            assert common.detect_preset() == f"gpu{count}"
    monkeypatch.setenv("NANOCHAT_PRESET", "gpu-lab")
    assert common.detect_preset() == "gpu-lab"
    with pytest.raises(UserError, match=r"gpu-lab needs a CUDA GPU.*--preset cpu"):
        common.compute_init()
    assert common.compute_init("cpu").type == "cpu"
