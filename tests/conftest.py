"""A tiny tokenizer and a tiny trained model, made once for all tests."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Deceive this process and its children, before anything of the package is imported.
collect_ignore = ["no_posix"]
if os.environ.get("NANOCHAT_HIDE_POSIX"):
    collect_ignore = []
    folder = str(Path(__file__).parent / "no_posix")
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, *before]))
    sys.path.insert(0, folder)
    sys.modules.pop("sitecustomize", None)  # the system's own
    import sitecustomize  # noqa: F401 (what it does is done when it is imported)

from itertools import islice

import pytest

from nanochat.config import BaseConfig
from nanochat.dataset import iter_documents

TINY = dict(
    depth=1,
    max_seq_len=64,
    device_batch_size=2,
    total_batch_size=256,
    num_iterations=8,
    eval_every=-1,
    eval_tokens=256,
    save_every=-1,
    data="embedded",
    device="cpu",
)


@pytest.fixture
def tiny() -> dict:
    "Options of a pretraining run that takes about a second."
    return dict(TINY)


@pytest.fixture(scope="session")
def tokenizer():
    "A tokenizer of 400 tokens, trained on forty documents."
    from nanochat.tokenizer import RustBPETokenizer

    texts = (text for text, _ in islice(iter_documents("train"), 40))
    return RustBPETokenizer.train_from_iterator(texts, 400)


@pytest.fixture
def base_dir(tmp_path, monkeypatch, tokenizer):
    "An empty run folder with the tiny tokenizer."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def base_model(base_dir, tiny):
    "The folder of a tiny pretrained model, `d1`."
    from nanochat.stage import pretrain

    pretrain(BaseConfig(**tiny))
    return base_dir / "base_checkpoints" / "d1"
