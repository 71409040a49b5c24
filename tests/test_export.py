"""An exported folder, read back, and by transformers where that is installed."""

import json

import pytest
import torch
from chat_model import TEXT, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from nanochat.common import UserError
from nanochat.export import byte_alphabet, export_hf, recover_merges

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many r's are in strawberry? Grüße!"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And 12 + 30?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_hf(tiny_model(), tiny_tokenizer(), tmp_path_factory.mktemp("hf"))


def test_every_weight_arrives(folder):
    weights = load_file(folder / "model.safetensors")
    model = tiny_model()
    assert sum(w.numel() for w in weights.values()) == model.num_params()
    ours = model.transformer.h[1].attn.c_q.weight
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.weight"], ours)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)


def test_merges_rebuild_the_vocabulary():
    ranks = {token: rank for rank, token in enumerate(tiny_tokenizer().ranks)}
    merges = recover_merges(ranks)
    assert [ranks[a + b] for a, b in merges] == list(range(256, len(ranks)))
    assert all(ranks[a] < ranks[a + b] > ranks[b] for a, b in merges)
    assert len(set(byte_alphabet().values())) == 256


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="belong together"):
        export_hf(tiny_model(vocab_size=400), tiny_tokenizer(), tmp_path)


def test_transformers_computes_the_same_logits(folder):
    transformers = pytest.importorskip("transformers", "5.0", "needs transformers 5")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    idx = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(idx).logits, tiny_model()(idx), rtol=1e-4, atol=1e-4
        )


def test_transformers_tokenizes_the_same(folder):
    transformers = pytest.importorskip("transformers", "5.0", "needs transformers 5")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tiny_tokenizer()
    texts = [*TEXT, "  two  spaces\n\n\n12345 l'été I'LL \t x", "日本 naïve ½", ""]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    rendered = theirs.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, tokenize=False
    )
    expected, _ = ours.render_conversation({"messages": CONVERSATION})
    expected.append(ours.encode_special("<|assistant_start|>"))
    assert theirs.encode(rendered, add_special_tokens=False) == expected
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 320
