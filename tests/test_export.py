"""Weights travel: to transformers and back, from nanochat's files, and what is refused."""

import json
import os
import pickle
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from chat_model import TEXT, tiny_model, tiny_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat import interop
from nanochat.checkpoint import find_checkpoint, load_model, load_weights, save
from nanochat.common import UserError, run_cli
from nanochat.engine import Engine, decode_step, prefill
from nanochat.gpt import GPTConfig
from nanochat.hf import (
    byte_alphabet,
    export_hf,
    hf_config,
    hf_tokenizer,
    recover_merges,
    tokenizer_from_hf,
)
from nanochat.interop import adopt, load_foreign
from nanochat.optim import setup_optimizer
from nanochat.tokenizer import RustBPETokenizer, to_tiktoken

ROOT = Path(__file__).parents[1]
TOOL = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "12+30"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "It is 42."},
]
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {
        "role": "user",
        "content": "  How many r's are in strawberry? Grüße! 日本 🙂 e\u0301",
    },
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And 12 + 30?\n\n"},
    {"role": "assistant", "content": TOOL},
    {"role": "user", "content": "{{ messages }} {% if %} <b>&amp;"},
]
SHAPES = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def random_model(kind: str = "gqa", **changes):
    "A model of which no matrix is zero."
    heads, kv_heads = SHAPES[kind]
    sizes = dict(n_head=heads, n_kv_head=kv_heads, n_embd=128, n_layer=3)
    model = tiny_model(1, **(sizes | {"sequence_len": 512} | changes))
    assert all(weight.abs().min() < weight.abs().max() for weight in model.parameters())
    return model


def random_ids(length: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(length)
    return torch.randint(0, 320, (2, length), generator=dice)


def edit(path: Path, **changes) -> None:
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v != "absent"}))


@torch.inference_mode()
def check_same_logits(theirs, ours, atol: float = 1e-5) -> None:
    for length in (1, 2, 33, ours.config.sequence_len):
        logits = [model(random_ids(length)) for model in (theirs, ours)]
        logits = [getattr(z, "logits", z) for z in logits]
        torch.testing.assert_close(*logits, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_hf(random_model(), tiny_tokenizer(), tmp_path_factory.mktemp("hf"))


@pytest.fixture
def copy(folder, tmp_path):
    "The exported folder, to be spoilt."
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty base folder."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    return tmp_path / "home"


# ---- (a) from us to transformers


def test_every_weight_arrives(folder):
    weights = load_file(folder / "model.safetensors")
    model = random_model()
    assert sum(w.numel() for w in weights.values()) == model.num_params()
    ours = model.transformer.h[1].attn.c_q.weight
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.weight"], ours)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_a_transformers_computes_the_same_logits(tmp_path, kind):
    other = {"rope_base": 1e5, "softcap": 20.0, "mlp_ratio": 3}
    for number, changes in enumerate(({}, other, {"softcap": 0})):
        # A folder for each: Windows replaces no file from which weights are mapped.
        folder = tmp_path / str(number)
        ours = random_model(kind, **changes)
        export_hf(ours, tiny_tokenizer(), folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__name__ == "NanoChatForCausalLM"
        assert theirs.dtype == torch.float32
        check_same_logits(theirs, ours)
        check_same_logits(theirs, load_foreign(folder)[0])


@pytest.mark.slow
def test_a_transformers_generates_the_same(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, ours = tiny_tokenizer(), random_model()
    ends = {tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")}
    prompt = tokenizer.render_conversation({"messages": CONVERSATION})[0]
    prompt.append(tokenizer.encode_special("<|assistant_start|>"))
    for ids in ([5], prompt, *([bos] for bos in range(40, 60))):
        out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)
        out = out[0, len(ids) :].tolist()
        naive = []
        for token in ours.generate(ids, 40, temperature=0):
            naive.append(token)
            if token in ends:
                break
        assert out == naive
    batch = Engine(ours, tokenizer).generate_batch(prompt, max_tokens=8, temperature=0)
    assert len(batch[0][0]) > len(prompt)


def test_a_transformers_tokenizes_the_same(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = tiny_tokenizer()
    texts = [*TEXT, "  two  spaces\n\n\n12345 l'été I'LL \t x", "日本 naïve ½", ""]
    texts += [
        "\r\n \u00a0\u3000\u2028 'ſ 'S",
        "१२३ Ⅻ x\u0301 \x00\ufeff",
        "🙂👩‍👩‍👧 a\u200db",
    ]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("length", range(2, len(CONVERSATION) + 1))
def test_a_chat_template_gives_the_same_ids(folder, length):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = tiny_tokenizer()
    messages = CONVERSATION[:length]
    expected, _ = ours.render_conversation({"messages": messages})
    found = theirs.apply_chat_template(messages, return_dict=False)
    assert found == expected
    found = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert found == [*expected, ours.encode_special("<|assistant_start|>")]


def test_a_what_transformers_cannot_express_is_refused(tmp_path):
    later = {"window_pattern": "SL", "value_embeds": True, "qk_scale": 1.2}
    for name, value in later.items():
        with pytest.raises(UserError, match=f"{name}={value!r}"):
            export_hf(random_model(**{name: value}), tiny_tokenizer(), tmp_path)

    @dataclass(frozen=True)
    class Later(GPTConfig):
        window: str = "L"
        lambdas: bool = False

    sizes = asdict(random_model().config)
    assert hf_config(Later(**sizes), 0, 1) == hf_config(GPTConfig(**sizes), 0, 1)
    with pytest.raises(UserError, match=r"window='SL', lambdas=True"):
        hf_config(Later(**sizes, window="SL", lambdas=True), 0, 1)


def test_merges_rebuild_the_vocabulary():
    ranks = {token: rank for rank, token in enumerate(tiny_tokenizer().ranks)}
    merges = recover_merges(ranks)
    assert [ranks[a + b] for a, b in merges] == list(range(256, len(ranks)))
    assert all(ranks[a] < ranks[a + b] > ranks[b] for a, b in merges)
    assert len(set(byte_alphabet().values())) == 256


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="use the tokenizer of the model"):
        export_hf(tiny_model(vocab_size=400), tiny_tokenizer(), tmp_path)


def test_a_only_an_earlier_export_is_replaced(folder, tmp_path):
    "Somebody's files, one of them called config.json, stay as they are."
    for name, text in {"config.json": "{}", "thesis.txt": "mine"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="use a new folder"):
            export_hf(random_model(), tiny_tokenizer(), tmp_path)
        assert (tmp_path / name).read_text() == text
        assert len(list(tmp_path.iterdir())) == 1
        (tmp_path / name).unlink()
    export_hf(random_model("mha"), tiny_tokenizer(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    export_hf(random_model(), tiny_tokenizer(), tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == len(list(folder.iterdir())) + 1


def test_a_failed_write_leaves_the_earlier_weights(tmp_path, monkeypatch):
    export_hf(random_model(), tiny_tokenizer(), tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("os error 28")

    monkeypatch.setattr("nanochat.hf.save_file", full)
    with pytest.raises(UserError, match="cannot write the weights"):
        export_hf(random_model("mha"), tiny_tokenizer(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == names


# ---- (b) from a Hugging Face folder to us


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["50GB", "300KB"])
def test_b_what_transformers_saves_comes_back(tmp_path, kind, dtype, shard):
    export_hf(random_model(kind), tiny_tokenizer(), tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    theirs.save_pretrained(tmp_path / "b", max_shard_size=shard)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    index = tmp_path / "b" / "model.safetensors.index.json"
    assert index.exists() == (shard == "300KB")
    model, tokenizer = load_foreign(tmp_path / "b")
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    check_same_logits(theirs.float(), model)
    assert tokenizer.fingerprint() == tiny_tokenizer().fingerprint()


@pytest.mark.parametrize("eps", [1e-6, 1e-3, "absent"])
def test_b_epsilon_is_taken_over(copy, eps):
    edit(copy / "config.json", rms_norm_eps=eps)
    model, _ = load_foreign(copy)
    assert model.config.norm_eps == (1e-6 if eps == "absent" else eps)
    check_same_logits(AutoModelForCausalLM.from_pretrained(copy), model)


def test_b_older_spellings_are_read(copy):
    edit(copy / "config.json", rope_parameters="absent", rope_theta=5e4, qkv_bias=False)
    assert load_foreign(copy)[0].config.rope_base == 5e4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "silu", "mlp_bias": 1}, "mlp_bias=1, hidden_act='silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_theta": "wide"}}, "no valid rope_theta"),
        ({"hidden_size": 128.0}, "no valid hidden_size"),
        ({"hidden_size": True}, "no valid hidden_size"),
        ({"rms_norm_eps": float("nan")}, "no valid rms_norm_eps"),
        ({"final_logit_softcapping": "absent"}, "no valid final_logit_softcapping"),
        ({"hidden_size": 0}, "does not describe a valid model"),
        ({"num_hidden_layers": "absent"}, "no valid num_hidden_layers"),
        ({"intermediate_size": 500}, "intermediate_size=500"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rms_norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
        ({"head_dim": 64}, "head_dim=64"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"hidden_size": "wide"}, "no valid hidden_size"),
        ({"intermediate_size": "absent"}, "no valid intermediate_size"),
    ],
)
def test_b_other_architectures_are_refused(copy, changes, message):
    edit(copy / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_foreign(copy)


def test_b_whatever_transformers_writes_is_read(copy):
    "All keys of the installed version's own config, defaults included, and unknown ones."
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    everything = json.loads(theirs.config.to_json_string(use_diff=False))
    known = json.loads((copy / "config.json").read_text())
    assert len(everything.keys() - known.keys()) > 5
    extra = {"attention_dropout": 0.1, "new_in_a_later_version": [1, 2], "cache": "x"}
    extra |= {"layer_types": ["full_attention"] * 3, "rope_scaling": None}
    (copy / "config.json").write_text(json.dumps(everything | extra))
    check_same_logits(theirs, load_foreign(copy)[0])


def test_b_absent_key_value_heads_are_as_many_as_query_heads(tmp_path):
    folder = export_hf(random_model("mha"), tiny_tokenizer(), tmp_path)
    edit(folder / "config.json", num_key_value_heads=None)
    check_same_logits(random_model("mha"), load_foreign(folder)[0], atol=0)


def test_b_merges_are_read_in_both_spellings(copy):
    "Older files write a merge as one string; the tokenizers library reads both."
    record = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    pairs = record["model"]["merges"]
    record["model"]["merges"] = [" ".join(pair) for pair in pairs]
    (copy / "tokenizer.json").write_text(json.dumps(record))
    ours = load_foreign(copy)[1]
    assert ours.fingerprint() == tiny_tokenizer().fingerprint()
    assert AutoTokenizer.from_pretrained(copy).encode(TEXT[0]) == ours.encode(TEXT[0])
    for odd in ("ab", "a b c", ["a"], 3, None):
        record["model"]["merges"] = [odd, *pairs]
        with pytest.raises(UserError, match="not a nanochat tokenizer"):
            tokenizer_from_hf(record, Path("tokenizer.json"))


def test_b_surplus_merges_do_not_matter():
    letters = [bytes([i]) for i in range(256)]
    ours = RustBPETokenizer([*letters, b"ab", b"bc", b"abc", b"abcabc"])
    record = hf_tokenizer(ours)
    vocab = record["model"]["vocab"]
    ways = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t))]
    record["model"]["merges"] = [w for w in ways if w[0] in vocab and w[1] in vocab]
    assert len(record["model"]["merges"]) == 5  # abc twice
    path = Path("tokenizer.json")
    assert tokenizer_from_hf(record, path).fingerprint() == ours.fingerprint()


def spoilt_tokenizers():
    "Yield what is wrong and a function that does it to a tokenizer.json."
    yield "normalizer", lambda r: r.update(normalizer={"type": "NFC"})
    yield "pre_tokenizer", lambda r: r["pre_tokenizer"]["pretokenizers"].pop()
    yield (
        "pre_tokenizer",
        lambda r: r["pre_tokenizer"]["pretokenizers"][0].update(
            pattern={"Regex": r"\w+"}
        ),
    )
    yield "merges", lambda r: r["model"]["merges"].reverse()
    yield "merges", lambda r: r["model"]["merges"].pop()
    yield "vocab", lambda r: r["model"]["vocab"].update(Ā=999)
    yield (
        "special tokens",
        lambda r: r["added_tokens"].append({"id": 320, "content": "<|x|>"}),
    )
    yield "options", lambda r: r["model"].update(dropout=0.1)
    yield "options", lambda r: r["model"].update(ignore_merges=True)
    yield "not a nanochat tokenizer", lambda r: r["added_tokens"].pop()
    yield "not a nanochat tokenizer", lambda r: r.update(model={"type": "Unigram"})
    yield "not a nanochat tokenizer", lambda r: r.update(pre_tokenizer=None)


@pytest.mark.parametrize("message, spoil", list(spoilt_tokenizers()))
def test_b_other_tokenizers_are_refused(message, spoil):
    record = json.loads(json.dumps(hf_tokenizer(tiny_tokenizer())))
    spoil(record)
    with pytest.raises(UserError, match=message):
        tokenizer_from_hf(record, Path("tokenizer.json"))


# ---- (c) from nanochat's own files to us


class Attack:
    "Unpickled by a reader that obeys, this leaves a file."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def nanochat_folder(folder: Path, model, prefix="", dtype=torch.bfloat16, **config):
    "Write a checkpoint as nanochat does; return the folder."
    folder.mkdir(parents=True, exist_ok=True)
    sizes = "sequence_len vocab_size n_layer n_head n_kv_head n_embd".split()
    config = {k: getattr(model.config, k) for k in sizes} | config
    state = {prefix + n: w.to(dtype) for n, w in model.state_dict().items()}
    for step in (2, 650):
        torch.save(state, folder / f"model_{step:06d}.pt")
        meta = {"step": step, "model_config": config, "user_config": {"depth": 3}}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(to_tiktoken(tiny_tokenizer())))
    return folder


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"window_pattern": "LL"}])
def test_c_nanochats_checkpoints_are_read(tmp_path, prefix, dtype, config):
    theirs = random_model("mqa")
    nanochat_folder(tmp_path, theirs, prefix, dtype, **config)
    model, tokenizer = load_foreign(tmp_path)
    assert tokenizer.fingerprint() == tiny_tokenizer().fingerprint()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    theirs.load_state_dict({k: v.to(dtype) for k, v in theirs.state_dict().items()})
    check_same_logits(theirs, model, atol=0)
    assert len(list(model.generate([1, 2, 3], 5))) == 5


def test_c_the_tokenizer_lies_where_nanochat_puts_it(tmp_path):
    folder = nanochat_folder(tmp_path / "base_checkpoints" / "d3", random_model())
    (tmp_path / "tokenizer").mkdir()
    (folder / "tokenizer.pkl").rename(tmp_path / "tokenizer" / "tokenizer.pkl")
    assert load_foreign(folder)[1].get_vocab_size() == 320
    (tmp_path / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match=r"tokenizer.pkl does not exist"):
        load_foreign(folder)


@pytest.mark.parametrize("config", [{"window_pattern": "SSSL"}, {"smear_gates": 24}])
def test_c_unknown_architectures_are_refused(tmp_path, config):
    nanochat_folder(tmp_path, random_model(), **config)
    with pytest.raises(UserError, match="|".join(config)) as error:
        load_foreign(tmp_path)
    assert "\n" not in str(error.value)


# ---- (c) nanochat of July 2026, from its formulas

JULY = dict(sequence_len=200, vocab_size=309, n_layer=5, n_head=4, n_kv_head=2)
JULY |= {"n_embd": 64, "window_pattern": "SSSL"}
LATE = ("resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda")


def july_weights(c: dict) -> dict[str, torch.Tensor]:
    "Random values under nanochat's names; the tables have 320 rows for 309 tokens."
    C = c["n_embd"]
    L = c["n_layer"]
    rows = -(-c["vocab_size"] // 64) * 64
    kv = C // c["n_head"] * c["n_kv_head"]
    shapes = {"transformer.wte.weight": (rows, C), "lm_head.weight": (rows, C)}
    shapes |= {"resid_lambdas": (L,), "x0_lambdas": (L,), "backout_lambda": (1,)}
    shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,)}
    for i in range(L):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.attn.c_{m}.weight": (kv, C) for m in "kv"}
        shapes |= {f"{h}.attn.c_q.weight": (C, C), f"{h}.attn.c_proj.weight": (C, C)}
        shapes |= {f"{h}.mlp.c_fc.weight": (4 * C, C)}
        shapes |= {f"{h}.mlp.c_proj.weight": (C, 4 * C)}
        if i % 2 == (L - 1) % 2:
            shapes |= {f"value_embeds.{i}.weight": (rows, kv)}
            shapes |= {f"{h}.attn.ve_gate.weight": (c["n_kv_head"], 12)}
    dice = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:  # scalars near one, so that each of them matters
            weights[name] = 0.5 + torch.rand(shape, generator=dice)
        else:
            weights[name] = torch.randn(shape, generator=dice) * shape[-1] ** -0.5
    return weights


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def july_attention(w: dict, c: dict, i: int, x, ids) -> torch.Tensor:
    "Layer `i` of one row: (T, C) to (T, C), one query after the other."
    D = c["n_embd"] // c["n_head"]
    L = c["n_layer"]
    h = f"transformer.h.{i}.attn"
    r = plain_norm(x)
    q, k, v = ((r @ w[f"{h}.c_{m}.weight"].T).unflatten(-1, (-1, D)) for m in "qkv")
    if i % 2 == (L - 1) % 2:
        gate = 3 * (r[:, :12] @ w[f"{h}.ve_gate.weight"].T).sigmoid()
        v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].view_as(v)
    slow = 100_000.0 ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(len(ids)), slow)
    turn = torch.polar(torch.ones_like(angle), -angle)[:, None]  # by minus the angle
    for y in (q, k):
        pair = torch.complex(y[..., : D // 2], y[..., D // 2 :]) * turn
        y[:] = 1.2 * plain_norm(torch.cat([pair.real, pair.imag], -1))
    short = c["window_pattern"][i % len(c["window_pattern"])] == "S" and i < L - 1
    back = -(-c["sequence_len"] // 4 // 128) * 128 if short else len(ids)
    out = torch.empty_like(x)
    for t in range(len(ids)):
        seen = slice(max(0, t - back), t + 1)  # `back` positions and its own
        for head in range(c["n_head"]):
            shared = head * c["n_kv_head"] // c["n_head"]
            score = k[seen, shared] @ q[t, head] / D**0.5
            mixed = score.softmax(0) @ v[seen, shared]
            out[t, head * D : (head + 1) * D] = mixed
    return out @ w[f"{h}.c_proj.weight"].T


def july_logits(w: dict, c: dict, ids: torch.Tensor) -> torch.Tensor:
    "What nanochat of July 2026 computes for one row of ids, from its formulas."
    e = plain_norm(w["transformer.wte.weight"][ids])
    x = e.clone()
    for t in range(1, len(ids)):
        share = (w["smear_gate.weight"][0] @ e[t, :24]).sigmoid()
        x[t] += w["smear_lambda"][0] * share * e[t - 1]
    start = x
    after = []
    for i in range(c["n_layer"]):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * start
        x = x + july_attention(w, c, i, x, ids)
        h = f"transformer.h.{i}.mlp"
        up = (plain_norm(x) @ w[f"{h}.c_fc.weight"].T).relu().square()
        x = x + up @ w[f"{h}.c_proj.weight"].T
        after.append(x)
    x = plain_norm(x - w["backout_lambda"] * after[c["n_layer"] // 2])
    z = (x @ w["lm_head.weight"].T)[:, : c["vocab_size"]]
    return 15 * (z / 15).tanh()


def write_july(folder: Path, config: dict, weights: dict) -> Path:
    "Lay a checkpoint out as nanochat does, the tokenizer apart; return its folder."
    here = folder / "base_checkpoints" / "d5"
    home = folder / "tokenizer"
    for place in (here, home):
        place.mkdir(parents=True)
    torch.save(weights, here / "model_000650.pt")
    meta = {"step": 650, "val_bpb": 1.0, "model_config": config, "loop_state": {}}
    (here / "meta_000650.json").write_text(json.dumps(meta, indent=2))
    ours = RustBPETokenizer(tiny_tokenizer().ranks[:300])
    (home / "tokenizer.pkl").write_bytes(pickle.dumps(to_tiktoken(ours)))
    torch.save(torch.zeros(309, dtype=torch.int32), home / "token_bytes.pt")
    return here


@pytest.mark.parametrize(
    "changes", [{}, {"n_layer": 4, "n_kv_head": 1}, {"n_layer": 1}]
)
@pytest.mark.parametrize("pattern", ["SSSL", "sl", "L"])
@torch.inference_mode()
def test_c_a_checkpoint_of_july_2026_computes_its_formulas(tmp_path, changes, pattern):
    config = JULY | changes
    weights = july_weights(config)
    saved = {f"_orig_mod.{name}": w for name, w in weights.items()}
    for name in saved:  # tables are kept in bfloat16 on a GPU
        if "wte" in name or "value_embeds" in name:
            saved[name] = saved[name].bfloat16()
            weights[name.removeprefix("_orig_mod.")] = saved[name].float()
    folder = write_july(tmp_path, config | {"window_pattern": pattern}, saved)
    model, tokenizer = load_foreign(folder)
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 309
    assert len(model.lm_head.weight) == 309 and model.config.smear
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(309, (200,), generator=dice)  # more than a window of 129
    expected = july_logits(weights, config | {"window_pattern": pattern.upper()}, ids)
    torch.testing.assert_close(model(ids[None])[0], expected, rtol=0, atol=2e-5)
    one = model(ids[None, :1])[0]
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=2e-5)
    last, cache = prefill(model, [ids[:150].tolist()], 200)
    torch.testing.assert_close(last[0], expected[149], rtol=0, atol=2e-5)
    for t in range(150, 155):
        logits = decode_step(model, [int(ids[t])], cache)
        torch.testing.assert_close(logits[0], expected[t], rtol=0, atol=2e-5)


def test_c_a_july_model_is_adopted_trained_and_not_exported(home, tmp_path):
    folder = write_july(tmp_path / "theirs", JULY, july_weights(JULY))
    model, tokenizer = load_foreign(folder)
    adopt(model, tokenizer, "base", "july")
    again, _, _ = load_model("base", torch.device("cpu"))
    ids = torch.randint(309, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again(ids), model(ids))
    optimizer = setup_optimizer(again.train())
    before = {n: p.detach().clone() for n, p in again.named_parameters()}
    again(ids, ids).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in again.named_parameters())
    with pytest.raises(
        UserError, match=r"smear=True, backout=True: this model cannot be exported"
    ):
        export_hf(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", [*LATE, "value_embeds", "ve_gate"])
def test_c_a_model_from_between_is_refused(tmp_path, lost):
    weights = july_weights(JULY)
    kept = {name: w for name, w in weights.items() if lost not in name.split(".")}
    assert len(kept) < len(weights)
    folder = write_july(tmp_path, JULY, kept)
    with pytest.raises(UserError, match="between January and March 2026") as error:
        load_foreign(folder)
    assert "\n" not in str(error.value)


def test_c_an_odd_shape_in_a_july_model_is_named(tmp_path):
    weights = july_weights(JULY)
    weights["smear_gate.weight"] = torch.zeros(1, 32)
    folder = write_july(tmp_path, JULY, weights)
    with pytest.raises(UserError, match=r"smear_gate.weight: found \(1, 32\)"):
        load_foreign(folder)


# ---- (c) rows for no token


@pytest.fixture
def short_tokenizer():
    "309 tokens: rounded up to a multiple of 64 they are 320."
    return RustBPETokenizer(tiny_tokenizer().ranks[:300])


def test_c_a_padded_vocabulary_of_nanochat_is_cut(tmp_path, short_tokenizer):
    "The first architecture, with tables that have eleven rows too many."
    theirs = random_model("mha", vocab_size=309, pad_vocab_to=64)
    with torch.no_grad():  # what the surplus rows say would win, if it were heard
        theirs.lm_head.weight[309:] = 100.0
    nanochat_folder(tmp_path, theirs, dtype=torch.float32)
    pickled = pickle.dumps(to_tiktoken(short_tokenizer))
    (tmp_path / "tokenizer.pkl").write_bytes(pickled)
    model, tokenizer = load_foreign(tmp_path)
    assert len(model.lm_head.weight) == 309 == tokenizer.get_vocab_size()
    ids = random_ids(33).clamp(max=308)
    with torch.inference_mode():
        assert model(ids).shape == (2, 33, 309)
        assert torch.equal(model(ids), theirs(ids))
    tokens = list(model.generate([1, 2], 100, temperature=3.0))
    assert max(tokens) < 309 and len(set(tokens)) > 50
    export_hf(model, tokenizer, tmp_path / "out")  # and is now an ordinary model


def test_c_a_padded_vocabulary_of_transformers_is_cut(tmp_path, short_tokenizer):
    "A converted model has logits for the surplus rows; ours has the others, equal."
    whole = random_model("gqa")  # 320 rows
    export_hf(whole, tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf_tokenizer(short_tokenizer)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = load_foreign(tmp_path)
    ids = random_ids(33).clamp(max=308)
    with torch.inference_mode():
        expected = theirs(ids).logits[..., :309]
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned", [300, 280, 265])
def test_c_a_tokenizer_of_another_model_is_still_refused(tmp_path, learned):
    "nanochat tells its number of tokens: 320 of them are not 309 and some padding."
    nanochat_folder(tmp_path, random_model())
    other = RustBPETokenizer(tiny_tokenizer().ranks[:learned])
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(to_tiktoken(other)))
    with pytest.raises(UserError, match="another tokenizer"):
        load_foreign(tmp_path)


def test_c_only_numbered_steps_are_steps(tmp_path):
    folder = nanochat_folder(tmp_path, random_model())
    (folder / "model_best.pt").write_bytes(b"notes")
    (folder / "model_1000000.pt").write_bytes((folder / "model_000002.pt").read_bytes())
    with pytest.raises(UserError, match=r"meta_1000000.json"):
        load_foreign(folder)
    (folder / "model_1000000.pt").unlink()
    check_same_logits(random_model(), load_foreign(folder)[0], atol=0.1)


@pytest.mark.parametrize("victim", ["model_000650.pt", "tokenizer.pkl"])
def test_c_a_pickle_that_would_run_code_does_not(tmp_path, victim):
    folder = nanochat_folder(tmp_path / "in", random_model())
    mark = tmp_path / "ran"
    if victim == "tokenizer.pkl":
        (folder / victim).write_bytes(pickle.dumps(Attack(mark)))
    else:
        torch.save({"lm_head.weight": Attack(mark)}, folder / victim)
    with pytest.raises(UserError, match=rf"{victim}.*mkdir"):
        load_foreign(folder)
    assert not mark.exists()
    if victim == "tokenizer.pkl":  # it would have
        pickle.loads((folder / victim).read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04half", b"\x80\x02]q\x00."]
)
def test_c_what_is_no_weights_is_refused(tmp_path, content):
    folder = nanochat_folder(tmp_path, random_model())
    (folder / "model_000650.pt").write_bytes(content)
    with pytest.raises(UserError, match="does not hold weights"):
        load_foreign(folder)


# ---- (d) what does not fit is listed


def spoil_weights(weights: dict) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].contiguous()
    weights["model.layers.0.self_attn.rotary"] = torch.zeros(3)
    del weights["model.layers.2.mlp.fc1.weight"]


def test_d_missing_surplus_and_misshapen_tensors_are_listed(copy):
    weights = load_file(copy / "model.safetensors")
    spoil_weights(weights)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_foreign(copy)
    text = str(error.value)
    assert "lm_head.weight: found (320, 127), wanted (320, 128)" in text
    assert "rotary: found (3,), wanted none" in text
    assert "transformer.h.2.mlp.c_fc.weight: found none, wanted (512, 128)" in text
    assert text.count("found") == 3 and "more" not in text and "\n" not in text


def test_d_long_lists_are_cut(tmp_path):
    nanochat_folder(tmp_path, random_model(n_layer=4), n_layer=2, dtype=torch.float32)
    with pytest.raises(UserError, match="and 2 more") as error:
        load_foreign(tmp_path)
    assert str(error.value).count("found") == 10


def test_d_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    names = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="00002-of-00002"):
        load_foreign(copy)
    index.write_text("[1")
    with pytest.raises(UserError, match=r"index.json"):
        load_foreign(copy)


def test_d_our_own_checkpoints_are_as_strict(home):
    model = random_model()
    path = save(home / "base_checkpoints" / "d3", 1, model)
    with pytest.raises(UserError, match=r"h.2.mlp.c_proj.weight: found .*wanted none"):
        load_weights(random_model(n_layer=2), path)
    tiny_tokenizer().save(home / "tokenizer")
    edit(
        path / "meta.json",
        format=1,
        model_config=asdict(model.config) | {"window": "SL"},
    )
    with pytest.raises(UserError, match=r"window='SL'.*that version"):
        load_model("base", torch.device("cpu"))


def test_d_unknown_sizes_are_refused(tmp_path):
    nanochat_folder(tmp_path, random_model(), n_head=3)
    with pytest.raises(UserError, match="n_head=3"):
        load_foreign(tmp_path)


# ---- (e) the command


@pytest.mark.slow
def test_e_import_then_chat(home, tmp_path, command):
    other = nanochat_folder(tmp_path / "nanochat", random_model("mha"))
    done = command("import_model", f"--folder={other}")
    assert done.returncode == 0 and "nanochat chat" in done.stdout, done.stderr
    done = command("chat_cli", "-p", "hi", "--max-tokens=4", "--temperature=0")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_e_another_tokenizer_is_kept(home, folder):
    model, tokenizer = load_foreign(folder)
    other = type(tokenizer)(tokenizer.ranks[:300])
    other.save(home / "tokenizer")
    with pytest.raises(UserError, match="a different tokenizer"):
        adopt(model, tokenizer)
    assert not (home / "sft_checkpoints").exists()
    path = adopt(model, tokenizer, overwrite=True)
    assert path == find_checkpoint("sft") and path.parent.name == "d3"
    loaded, tokenizer, meta = load_model("sft", torch.device("cpu"))
    check_same_logits(loaded, model, atol=0)
    assert tokenizer.get_vocab_size() == 320 and meta["stage"] == "import"
    with pytest.raises(UserError, match="has a checkpoint"):
        adopt(model, tokenizer)
    assert adopt(model, tokenizer, "rl", "mine").parent.name == "mine"


def test_e_overwriting_removes_only_checkpoints(home, folder):
    model, tokenizer = load_foreign(folder)
    run = home / "sft_checkpoints" / "d3"
    for step in (5, 10):
        save(run, step, random_model("mha"))
    for name in ("notes.txt", "curves/loss.png"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    assert adopt(model, tokenizer, overwrite=True) == run / "step_000000"
    assert sorted(path.name for path in run.iterdir()) == [
        "curves",
        "notes.txt",
        "step_000000",
    ]
    assert (run / "curves" / "loss.png").read_text() == "mine"
    check_same_logits(load_model("sft", torch.device("cpu"))[0], model, atol=0)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("absent", "neither"),
        ("empty", "neither"),
        ("damaged", "cannot be read"),
        ("without tokenizer", "tokenizer.json"),
        ("without config", "config.json"),
        ("", "--folder"),
    ],
)
def test_e_wrong_folders_give_one_line(home, copy, monkeypatch, capsys, kind, message):
    removed = {"without tokenizer": "tokenizer.json", "without config": "config.json"}
    if kind == "damaged":
        (copy / "model.safetensors").write_bytes(b"nonsense")
    elif kind in removed:
        (copy / removed[kind]).unlink()
    elif kind:
        copy = copy / kind
    if kind == "empty":
        copy.mkdir()
    monkeypatch.setattr(sys, "argv", ["x", f"--folder={copy if kind else ''}"])
    with pytest.raises(SystemExit) as exit:
        run_cli(interop.import_model, interop.ImportModelConfig, "import_model")
    text = capsys.readouterr().err
    assert exit.value.code == 2 and message in text
    assert text.startswith("error: ") and len(text.splitlines()) == 1
    assert not (home / "sft_checkpoints").exists()
