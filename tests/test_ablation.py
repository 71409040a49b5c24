"""dev/ablation.py: every variant takes a step, and the smallest run is measured."""

import importlib.util
from pathlib import Path

import pytest

from nanochat import attention, gpt, optim
from nanochat.dataset import iter_documents
from nanochat.tokenizer import RustBPETokenizer

FILE = Path(__file__).resolve().parents[1] / "dev" / "ablation.py"
SPEC = importlib.util.spec_from_file_location("ablation", FILE)
ablation = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablation)
SMALLEST = {"sequence_len": 16, "vocab_size": 300, "n_layer": 4, "n_head": 4}
SMALLEST |= {"n_kv_head": 4, "n_embd": 32}


@pytest.fixture
def smallest(monkeypatch):
    "A tiny model; what a variant exchanges in the package is put back afterwards."
    monkeypatch.setattr(ablation, "BASE", SMALLEST)
    for place, name in [
        (attention, "apply_rotary"),
        (attention, "rms_norm"),
        (gpt, "rms_norm"),
        (gpt, "relu2"),
        (gpt.Block, "forward"),
        (optim, "roles"),
    ]:
        monkeypatch.setattr(place, name, getattr(place, name))


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_every_variant_takes_a_step(smallest, variant):
    told = ablation.one_step(variant, rows=1, repeat=1)
    assert told["seconds"] > 0 and told["parameters"] > 0
    assert told["peak_bytes"] > 4 * told["parameters"]


@pytest.mark.parametrize("variant", ["default", "LayerNorm", "no QK norm", "post-norm"])
def test_a_variant_is_another_model(smallest, variant):
    "An exchange that is not called would measure the default twice."
    ids = ablation.torch.arange(17)[None] % 300
    plain = gpt.GPT(gpt.GPTConfig(**SMALLEST))
    plain.init_weights(1)
    generator = ablation.torch.Generator().manual_seed(0)
    for weight in plain.parameters():
        weight.data.normal_(std=0.3, generator=generator)
    want = plain(ids[:, :-1], ids[:, 1:]).item()
    model = ablation.fresh_model(variant, 1)
    model.load_state_dict(plain.state_dict())
    assert (model(ids[:, :-1], ids[:, 1:]).item() == want) == (variant == "default")


def test_the_smallest_run_is_measured_on_held_out_text(smallest, tmp_path):
    texts = [text for text, _ in iter_documents("val", data="embedded")][:5]
    RustBPETokenizer.train_from_iterator(texts, 300).save(tmp_path)
    row = ablation.train_one("LayerNorm", 1, 1.0, str(tmp_path), steps=2)
    assert 1 < row["bpb"] < 9 and row["steps"] == 2
