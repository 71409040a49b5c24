"""A tiny random chat model and its tokenizer, for the tests of engine and server."""

from functools import cache

import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

TEXT = [
    "How many letters r are in strawberry? Let me count them: s t r a w b e r r y.",
    "The capital of France is Paris. Twelve plus thirty is forty-two, 12 + 30 = 42.",
    "Grüße aus Köln; a naïve café, ½ price, 3 × 7 = 21, done → yes.",
]


@cache
def tiny_tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TEXT * 20), 320)


def tiny_model(seed: int = 0, **changes) -> GPT:
    "A model whose zero-initialised matrices are random too, so that it has opinions."
    sizes = dict(
        sequence_len=96, vocab_size=320, n_layer=2, n_head=2, n_kv_head=1, n_embd=64
    )
    model = GPT(GPTConfig(**(sizes | changes)))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if not weight.any():
            weight.data.normal_(std=3 * weight.size(-1) ** -0.5, generator=generator)
    return model.eval()


def tiny_engine(**changes) -> Engine:
    return Engine(tiny_model(**changes), tiny_tokenizer())
