"""Record what every head of a trained model attends to, and what it contributes.

python dev/attention_maps.py dev/records/attention_maps.json     half a minute on one core
python dev/attention_maps.py FILE --tiny                         three texts, three sums

Reads the base model and the last chat model of a speedrun from NANOCHAT_BASE_DIR. The
weights are recomputed from each layer's own input and matrices, and the script stops if
weights times values differ from what the layer really returned.
"""

import argparse
import json
import random
from contextlib import contextmanager
from datetime import date

import torch
from torch import Tensor

from nanochat.attention import CausalSelfAttention, apply_rotary, visible
from nanochat.checkpoint import load_model
from nanochat.common import environment
from nanochat.dataset import iter_documents
from nanochat.engine import Engine
from nanochat.functional import rms_norm
from nanochat.tasks.arithmetic import NAMES, PHRASINGS, THINGS, in_test_split

SENTENCE = (
    '"What an excellent father you have, girls!" said she, when the door was shut.'
)
QUESTION = "Anna has 37 books and buys 48 more. How many books does Anna have?"
VARIANT = "Anna has 37 books. She buys 48 more. How many books does Anna have now?"
LENGTH = 64  # tokens of each held-out text
SKIP = 8  # first rows of a text, excluded from means
HALF = 24  # random tokens that are read twice
SUMS = 50  # arithmetic questions whose calculator calls are counted


def head_weights(
    attn: CausalSelfAttention,
    x: Tensor,  # (B, T, C) the layer's input
    cos: Tensor,
    sin: Tensor,
    out: Tensor,  # (B, T, C) the layer's output
) -> Tensor:  # (B, H, T, T)
    "Compute the weights that a layer used, and verify them against its output."

    def split(linear) -> Tensor:
        return linear(x).unflatten(-1, (-1, attn.head_dim))

    q = rms_norm(apply_rotary(split(attn.c_q), cos, sin))
    k = rms_norm(apply_rotary(split(attn.c_k), cos, sin))
    each = q.size(2) // k.size(2)  # query heads that share a key-value head
    k = k.repeat_interleave(each, 2)
    v = split(attn.c_v).repeat_interleave(each, 2)
    seen = visible(torch.arange(x.size(1))[None], x.size(1), attn.window)
    score = torch.einsum("bthd,bshd->bhts", q, k) * attn.scale
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
    mine = attn.c_proj(torch.einsum("bhts,bshd->bthd", weight, v).flatten(2))
    torch.testing.assert_close(mine, out, rtol=1e-4, atol=1e-4)
    return weight


def look(model, ids: Tensor) -> Tensor:  # (L, B, H, T, T)
    "Run the model and return the weights of all its layers."
    found = []

    def note(attn: CausalSelfAttention, args: tuple, out: Tensor) -> None:
        x, cos, sin = args[:3]
        found.append(head_weights(attn, x, cos, sin, out))

    hooks = [block.attn.register_forward_hook(note) for block in model.transformer.h]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@contextmanager
def without(model, layer: int, head: int):
    "Disable one head, so that its output no longer reaches the residual stream."
    attn = model.transformer.h[layer].attn
    columns = attn.c_proj.weight[:, head * attn.head_dim : (head + 1) * attn.head_dim]
    kept = columns.clone()
    columns.zero_()
    yield
    columns.copy_(kept)


def heads_of(model) -> list[tuple[int, int]]:
    "List all (layer, head) pairs."
    c = model.config
    return [(i, h) for i in range(c.n_layer) for h in range(c.n_head)]


def entropy(weight: Tensor) -> Tensor:
    "Return the entropy of each row in nats."
    return torch.special.entr(weight).sum(-1)


def mean_by_head(x: Tensor) -> list[float]:
    "Average (L, B, H, ...) over all but layers and heads."
    mean = x.movedim(2, 1).flatten(2).double().mean(-1).flatten()
    return [round(m, 4) for m in mean.tolist()]


def held_out_texts(tokenizer, tiny: bool) -> Tensor:  # (N, LENGTH)
    "Encode the start of each held-out text that is long enough."
    texts = [text for text, _ in iter_documents("val", data="embedded")]
    assert any(SENTENCE in text for text in texts)
    texts = [tokenizer.encode(t, prepend="<|bos|>")[:LENGTH] for t in texts]
    ids = torch.tensor([t for t in texts if len(t) == LENGTH])
    return ids[:3] if tiny else ids


def worth_of_heads(model, ids: Tensor) -> tuple[float, list[float]]:
    "Return the loss, and how much it rises without each head."

    def loss() -> float:
        return model(ids[:, :-1], ids[:, 1:]).item()

    whole = loss()
    worth = []
    for layer, head in heads_of(model):
        with without(model, layer, head):
            worth.append(round(loss() - whole, 4))
    return whole, worth


def repetition(model, bos: int) -> dict:
    "Return the losses on random tokens read twice, and the weight on what followed."
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, bos, (64, HALF), generator=dice)
    twice = torch.cat((torch.full((64, 1), bos), drawn, drawn), 1)
    second = torch.arange(HALF + 1, 2 * HALF)  # reads a token that it has read before
    weights = look(model, twice)[..., second, second - HALF + 1]
    losses = model(twice[:, :-1], twice[:, 1:], loss_reduction="none").view(64, -1)
    halves = [round(x.mean().item(), 4) for x in losses.split(HALF, 1)]
    return {"loss_repeated": halves, "follower": mean_by_head(weights)}


def habits(model, tokenizer, tiny: bool = False) -> dict:
    "Average over held-out texts, and over random tokens that are read twice."
    bos = tokenizer.get_bos_token_id()
    ids = held_out_texts(tokenizer, tiny)
    w = look(model, ids)[..., SKIP:, :]

    # Where the quotation marks are, and their share of the text.
    quote = torch.tensor(['"' in tokenizer.id_to_token(i) for i in range(bos)])
    is_quote = quote[ids.clamp(max=bos - 1)] & (ids < bos)  # special tokens come last
    visible_tokens = torch.arange(SKIP + 1, LENGTH + 1)
    share = is_quote.cumsum(1)[:, SKIP:] / visible_tokens

    whole, worth = worth_of_heads(model, ids)
    repeated = repetition(model, bos)
    return {
        "texts": len(ids),
        "tokens": LENGTH,
        "skipped": SKIP,
        "loss": round(whole, 4),
        "loss_repeated": repeated["loss_repeated"],
        "heads": [f"{layer}.{head}" for layer, head in heads_of(model)],
        "first": mean_by_head(w[..., 0]),
        "self": mean_by_head(w.diagonal(SKIP, -2, -1)),
        "previous": mean_by_head(w.diagonal(SKIP - 1, -2, -1)),
        "follower": repeated["follower"],
        "quotes": mean_by_head((w * is_quote[:, None, None]).sum(-1)),
        "quotes_even": round(share.mean().item(), 4),
        "entropy": mean_by_head(entropy(w) / visible_tokens.log()),
        "worth": worth,
    }


def picture(model, tokenizer, name: str, ids: list[int]) -> dict:
    "Record a text's tokens, weights in thousandths (up to the diagonal) and entropies."
    w = look(model, torch.tensor([ids]))
    heads = (w[:, 0] * 1000).round().int().flatten(0, 1).tolist()

    # The rest of a row is zero, because a position cannot see later ones.
    weights = []
    for head in heads:
        weights.append([row[: t + 1] for t, row in enumerate(head)])
    return {
        "name": name,
        "tokens": [tokenizer.id_to_token(i) for i in ids],
        "entropy": mean_by_head(entropy(w)),
        "weights": weights,
    }


def prompt_of(tokenizer, question: str) -> list[int]:
    "Render a question up to the start of the reply."
    messages = [{"role": "user", "content": question}]
    messages += [{"role": "assistant", "content": ""}]
    return tokenizer.render_for_completion({"messages": messages})


def sum_of(model, tokenizer, name: str, question: str) -> dict:
    "Let the model answer, and record the heads that its numbers depend on."
    prompt = prompt_of(tokenizer, question)
    (ids, *_), _ = Engine(model, tokenizer).generate_batch(prompt, 1, 40, 0.0)
    found = picture(model, tokenizer, name, ids)

    # Only numbers that the model chose, so not the tool's forced output.
    forced = tokenizer.encode_special("<|output_start|>")
    spots = [
        t
        for t in range(len(prompt), len(ids) - 1)
        if tokenizer.decode([ids[t + 1]]).isdigit() and ids[t] != forced
    ]

    def chance() -> list[float]:
        p = model(torch.tensor([ids])).softmax(-1)[0]
        return [round(p[t, ids[t + 1]].item(), 4) for t in spots]

    found |= {"numbers": spots, "chance": chance(), "without": []}
    for layer, head in heads_of(model):
        with without(model, layer, head):
            found["without"].append(chance())
    return found


def calls(model, tokenizer, count: int) -> dict:
    "Count correct calculator calls for held-out arithmetic in training's wording."
    draw = random.Random(0)
    prompts: list[list[int]] = []
    right = []
    while len(prompts) < count:
        a = draw.randint(11, 99)
        b = draw.randint(11, 99)
        if a == b or not in_test_split(a, b, "+"):
            continue
        who = draw.choice(NAMES)
        what = draw.choice(THINGS)
        text = PHRASINGS["+"][5].format(name=who, thing=what, a=a, b=b)
        prompts.append(prompt_of(tokenizer, text))
        right.append(f"<|python_start|>{a}+{b}<|python_end|>")
    # With all heads, then without each one: whose absence costs correct calls?
    engine = Engine(model, tokenizer)

    def score() -> int:
        rows = engine.generate_many(prompts, 6, 0.0)
        return sum(r in tokenizer.decode(row.ids) for r, row in zip(right, rows))

    found: dict = {"questions": count, "right": score(), "without": []}
    for layer, head in heads_of(model):
        with without(model, layer, head):
            found["without"].append(score())
    return found


@torch.no_grad()
def main() -> None:
    "Examine the base model and the latest chat model, and write the record."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", help="JSON file for the results")
    parser.add_argument("--tiny", action="store_true", help="three texts, three sums")
    options = parser.parse_args()
    target = options.record
    cpu = torch.device("cpu")
    base, tokenizer, base_meta = load_model("base", cpu)
    chat, _, chat_meta = load_model("rl", cpu)
    sentence = tokenizer.encode(SENTENCE, prepend="<|bos|>")

    # Each part runs the model that it describes.
    record = {
        "command": "python dev/attention_maps.py dev/records/attention_maps.json",
        "date": date.today().isoformat(),
        "environment": environment(),
        "config": base_meta["model_config"],
        "steps": {"base": base_meta["step"], "rl": chat_meta["step"]},
        "habits": habits(base, tokenizer, options.tiny),
        "sentence": picture(base, tokenizer, "a sentence (base model)", sentence),
        "sum": sum_of(chat, tokenizer, "a sum (chat model)", QUESTION),
        "variant": sum_of(chat, tokenizer, "another wording (chat model)", VARIANT),
        "calls": calls(chat, tokenizer, 3 if options.tiny else SUMS),
    }

    # One line per part, so that changing a number does not change thousands of lines.
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    with open(target, "w") as file:
        file.write(text)
    print(f"{target}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
