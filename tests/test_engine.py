"""The engine against the naive generator, ragged batches, tools and limits."""

import inspect
import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch._dynamo
from chat_model import tiny_engine, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import decode, gpt
from nanochat.attention import KVCache, keep_rows
from nanochat.common import UserError
from nanochat.decode import DecodeStep, freeze_weights
from nanochat.engine import (
    ControlTokens,
    Engine,
    Row,
    decode_step,
    prefill,
    push,
)
from nanochat.server import ReplyReader, fit_conversation
from nanochat.tools import use_calculator


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def prompts(engine) -> list[list[int]]:
    texts = ["The capital", "How many letters r are in strawberry?", "a", "12 + 30 ="]
    bos = engine.tokenizer.get_bos_token_id()
    return [[bos, *engine.tokenizer.encode(text)] for text in texts]


@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (4, 2)])
def test_greedy_engine_equals_naive_generation(heads):
    model, tokenizer = tiny_model(n_head=heads[0], n_kv_head=heads[1]), tiny_tokenizer()
    engine = Engine(model, tokenizer)
    ends = ControlTokens.of(tokenizer).ends
    prompt = tokenizer.encode("The capital of France")
    naive = list(model.generate(prompt, max_tokens=60, temperature=0))
    stop = next((i for i, t in enumerate(naive) if t in ends), len(naive))
    row = engine.generate_many([prompt], max_tokens=60, temperature=0)[0]
    assert [i for i, m in zip(row.reply, row.mask[row.num_prompt :]) if m] == naive[
        :stop
    ]
    assert row.ended == (stop < len(naive))


def test_ragged_batch_equals_one_by_one(engine, prompts):
    together = engine.generate_many(prompts, max_tokens=40, temperature=0)
    alone = [
        engine.generate_many([p], max_tokens=40, temperature=0)[0] for p in prompts
    ]
    for a, b in zip(together, alone):
        assert (a.ids, a.mask, a.end) == (b.ids, b.mask, b.end)


def test_ragged_prefill_gives_each_rows_own_logits(engine, prompts):
    last, kv = prefill(engine.model, prompts, capacity=60)
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = engine.model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(last[row], expected, rtol=1e-4, atol=1e-4)
    assert kv.cache_seqlens.tolist() == [len(p) for p in prompts]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_prefill_equals_full(engine, prompts, chunk):
    full, a = prefill(engine.model, prompts, capacity=60)
    part, b = prefill(engine.model, prompts, capacity=60, chunk=chunk)
    torch.testing.assert_close(part, full, rtol=1e-4, atol=1e-4)
    for row, prompt in enumerate(prompts):
        pick = (slice(None), row, slice(0, len(prompt)))
        torch.testing.assert_close(
            b.k_cache[pick], a.k_cache[pick], rtol=1e-4, atol=1e-4
        )


def test_samples_differ_from_the_first_token_on(engine, prompts):
    column, masks = next(engine.generate(prompts[0], num_samples=64, temperature=2.0))
    assert len(set(column)) > 5
    assert masks == [1] * 64


def test_seed_fixes_the_samples(engine, prompts):
    def run(seed):
        return engine.generate_batch(prompts[1], 4, 12, 1.0, 20, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_generation_stops_at_the_contexts_end(engine, prompts):
    for row in engine.generate_many(prompts, temperature=0):
        assert len(row.ids) <= engine.model.config.sequence_len
        assert row.ended or len(row.ids) == engine.model.config.sequence_len


def test_lengths_at_the_edge(engine):
    full = [5] * engine.model.config.sequence_len
    assert engine.generate_many([full])[0].reply == []
    assert len(engine.generate_many([full[:-1]], temperature=0)[0].reply) <= 1
    assert engine.generate_many([[5]], max_tokens=0)[0].reply == []
    assert list(engine.generate([5], max_tokens=0)) == []
    for bad in ([*full, 5], []):
        with pytest.raises(UserError, match="tokens"):
            engine.generate_many([[5], bad])


def test_top_k_zero_means_all(engine, prompts):
    a = engine.generate_batch(prompts[0], 2, 5, 1.0, 0)
    assert a == engine.generate_batch(prompts[0], 2, 5, 1.0, None)


def scripted_rows(monkeypatch, tokenizer, lines, max_tokens=40):
    "Run rows whose sampled tokens are given; forced tokens do not consume the script."
    import nanochat.engine as module

    engine = Engine(tiny_model(), tokenizer)
    rows = engine.start([[1 + i] for i in range(len(lines))], 1, max_tokens)
    said = {id(row): list(line) for row, line in zip(rows, lines)}
    pushed = []

    def speak(row, sampled, control, tok):
        pushed.append(row.ids[0])
        forced = bool(row.forced)
        push(row, sampled if forced else said[id(row)].pop(0), control, tok)

    monkeypatch.setattr(module, "push", speak)
    for _ in module.run_rows(engine, rows, 1, temperature=0.0, top_k=None, seed=0):
        pass
    return rows, pushed


def test_tool_calls_are_answered_and_finished_rows_stay_finished(monkeypatch):
    tokenizer = tiny_tokenizer()
    special = tokenizer.encode_special
    word = tokenizer.encode("ok")
    open_, close = special("<|python_start|>"), special("<|python_end|>")
    out, tuo = special("<|output_start|>"), special("<|output_end|>")
    end = special("<|assistant_end|>")
    call = [open_, *tokenizer.encode("12*3"), close]
    bad = [open_, *tokenizer.encode("import os"), close]
    lines = [[*call, *word, end], [*word, end, *call], [*bad, *word, end]]
    rows, pushed = scripted_rows(monkeypatch, tokenizer, lines)
    answer = [out, *tokenizer.encode("36"), tuo]
    assert rows[0].reply == [*call, *answer, *word]
    marks = [1] * len(call) + [0] * len(answer) + [1] * len(word)
    assert rows[0].mask[rows[0].num_prompt :] == marks
    assert rows[1].reply == word
    assert (
        pushed.count(2) == len(word) + 1
    )  # the second row is left alone after its end
    assert rows[2].reply == [*bad, out, *tokenizer.encode("error"), tuo, *word]
    assert [row.end for row in rows] == [end] * 3


def test_a_row_that_is_cut_has_not_ended(monkeypatch):
    tokenizer = tiny_tokenizer()
    rows, _ = scripted_rows(monkeypatch, tokenizer, [[65] * 9], max_tokens=5)
    assert (rows[0].ended, rows[0].reply) == (False, [65] * 5)


def test_forced_tokens_ignore_what_was_sampled():
    tokenizer = tiny_tokenizer()
    control = ControlTokens.of(tokenizer)
    row = Row([0], [0], 1, 50)
    row.forced.extend([7, 8])
    for sampled in (control.python[0], next(iter(control.ends)), 9):
        push(row, sampled, control, tokenizer)
    assert row.reply == [7, 8, 9]
    assert (row.mask, row.call, row.ended) == ([0, 0, 0, 1], None, False)


def test_results_of_the_calculator():
    right = {
        "24/2": "12",
        "7/2": "3.5",
        "2**10": "1024",
        "0.1 + 0.2": "0.3",
        "1,234 + 1": "1235",
        "-3 // 2": "-2",
        "(1 + 2) * 3 % 4": "1",
        '"strawberry".count("r")': "3",
        '"a,b".count(",")': "1",
    }
    assert {e: use_calculator(e) for e in right} == right
    wrong = "9**9**9", "__import__('os')", "1/0", "(", "x", "", "'a'*9", "1e999", "True"
    assert [use_calculator(e) for e in wrong] == [None] * len(wrong)


@settings(max_examples=300, deadline=2000)
@given(st.text(alphabet="0123456789+-*/%.,() e\"'count", max_size=60))
def test_the_calculator_never_raises(expression):
    result = use_calculator(expression)
    assert result is None or float(result) == float(result)


def test_text_arrives_in_whole_characters():
    tokenizer = tiny_tokenizer()
    text = "Grüße → ½ €"
    single = [t for b in text.encode() for t in [tokenizer_byte(tokenizer, b)]]
    reader = ReplyReader(tokenizer, ControlTokens.of(tokenizer))
    pieces = [e["token"] for t in single for e in reader.read(t)]
    assert "".join(pieces) == text
    reader.read(tokenizer_byte(tokenizer, 0xE2))  # the beginning of a character
    assert reader.close() == []


def tokenizer_byte(tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.decode_bytes([i]) == bytes([byte]))


def test_tool_calls_become_events():
    tokenizer = tiny_tokenizer()
    special = tokenizer.encode_special
    ids = [
        special("<|python_start|>"),
        *tokenizer.encode("1+2"),
        special("<|python_end|>"),
        special("<|output_start|>"),
        *tokenizer.encode("3"),
        special("<|output_end|>"),
        *tokenizer.encode("So 3."),
        special("<|assistant_end|>"),
    ]
    reader = ReplyReader(tokenizer, ControlTokens.of(tokenizer))
    events = [event for i in ids for event in reader.read(i)]
    assert events[0] == {"tool": "1+2", "result": "3"}
    assert "".join(e["token"] for e in events[1:]) == "So 3."


def test_an_answer_before_the_end_of_a_call_ends_the_call():
    tokenizer = tiny_tokenizer()
    names = ("python_start", "output_start", "output_end")
    opened, answered, closed = [tokenizer.encode_special(f"<|{n}|>") for n in names]
    ids = [opened, *tokenizer.encode("1"), answered, closed, *tokenizer.encode("So")]
    reader = ReplyReader(tokenizer, ControlTokens.of(tokenizer))
    events = [event for i in ids for event in reader.read(i)]
    assert events[0] == {"tool": "1", "result": ""}
    assert "".join(e["token"] for e in events[1:]) == "So"


def conversation(turns: int, text: str = "word") -> list[dict]:
    def pair(i):
        return [
            {"role": "user", "content": f"{text} {i}"},
            {"role": "assistant", "content": f"reply {i}"},
        ]

    return [m for i in range(turns) for m in pair(i)][:-1]


@pytest.mark.parametrize("limit", [30, 60, 90, 1000])
def test_oldest_turns_are_dropped(limit):
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "S"}, *conversation(8)]
    ids, dropped = fit_conversation(tokenizer, messages, limit)
    kept = tokenizer.decode(ids)
    assert len(ids) <= limit and ids[-1] == tokenizer.encode_special(
        "<|assistant_start|>"
    )
    assert "word 7" in kept and (f"word {dropped - 1}" not in kept)
    assert f"word {dropped}" in kept
    if dropped:  # one turn more would not have fitted
        more = [messages[0], *messages[1 + 2 * (dropped - 1) :]]
        assert fit_conversation(tokenizer, more, 1000)[1] == 0
        assert len(fit_conversation(tokenizer, more, 1000)[0]) > limit


def test_a_message_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="shorten"):
        fit_conversation(tiny_tokenizer(), conversation(3, "x" * 300), 50)


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["system"]]
)
def test_conversations_must_alternate(roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(UserError):
        fit_conversation(tiny_tokenizer(), messages, 100)


# ---- decoding with fixed shapes

MODERN = {"n_layer": 4, "window_pattern": "SSSL", "short_window": 9}
MODERN |= {"value_embeds": True, "stream_scalars": True, "qk_scale": 1.2}
MODERN |= {"smear": True, "backout": True}
SHAPES = [(4, 4, {}), (4, 2, {}), (4, 1, {}), (4, 2, MODERN)]
LENGTHS = [3, 10, 17, 9]


class Tape(TorchDispatchMode):
    "Record operations as a CUDA graph does: none takes effect before it is replayed."

    def __init__(self):
        super().__init__()
        self.calls = []
        self.undo = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.undo.append((value, value.clone()))
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    def rewind(self):
        for value, before in reversed(self.undo):
            value.copy_(before)

    def replay(self):
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            for there, here in zip(tree_leaves(out), tree_leaves(new)):
                if isinstance(there, torch.Tensor) and there is not here:
                    there.copy_(here)  # the same memory at every replay


class FakeGraph:
    made = 0

    def __init__(self):
        FakeGraph.made += 1
        self.tape = Tape()

    def replay(self):
        with torch.inference_mode():
            self.tape.replay()


GRAPH_ARGUMENTS = inspect.signature(torch.cuda.graph.__init__)


@contextmanager
def fake_capture(*args, **kwargs):
    graph = GRAPH_ARGUMENTS.bind(None, *args, **kwargs).arguments["cuda_graph"]
    with graph.tape:
        yield
    graph.tape.rewind()


class FakeStream:
    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


CHOSEN = []  # streams that were made the current one: whether it was the usual one


@pytest.fixture
def fake_cuda(monkeypatch):
    "CUDA's graphs and streams, played on the CPU; whoever looks at ids is told off."
    FakeGraph.made = 0
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    usual = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: usual)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: CHOSEN.append(s is usual))
    CHOSEN.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(gpt, "check_ids", lambda *args: None)  # looks on CPUs only


def ragged_prompts(lengths=LENGTHS, seed=0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 300, (n,), generator=g).tolist() for n in lengths]


def follow(model, step, steps=40, lengths=LENGTHS, leave=None):
    "Take the same greedy tokens by `step`, by `decode_step` and by the whole model."
    rows = ragged_prompts(lengths)
    last, kv = prefill(model, rows, 96)
    step.load(kv)
    for i in range(steps):
        if leave and i in leave:
            keep_rows(kv, leave[i])
            step.keep(leave[i])
            rows = [rows[r] for r in leave[i]]
            last = last[leave[i]]
        tokens = last.argmax(-1)
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
        last = decode_step(model, tokens, kv)
        torch.testing.assert_close(step.step(tokens), last, rtol=1e-4, atol=1e-4)
    for row, logits in zip(rows, last):
        with torch.inference_mode():
            whole = model(torch.tensor([row]))[0, -1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads, kv_heads, fields", SHAPES)
@pytest.mark.parametrize("graph", [False, True])
def test_fixed_shapes_give_what_growing_ones_give(
    fake_cuda, monkeypatch, heads, kv_heads, fields, graph
):
    monkeypatch.setattr(decode, "SPAN", 16)
    model = tiny_model(n_head=heads, n_kv_head=kv_heads, **fields)
    step = DecodeStep(model, 4, 96, graph=graph)
    follow(model, step)
    assert [span for _, span in step.steps] == [32, 48, 64]
    assert FakeGraph.made == (3 if graph else 0)


def test_a_captured_step_follows_rows_that_leave(fake_cuda, monkeypatch):
    monkeypatch.setattr(decode, "SPAN", 16)
    model = tiny_model(n_head=4, n_kv_head=2)
    step = DecodeStep(model, 5, 70, graph=True)
    assert step.capacity == 80
    lengths = [3, 10, 17, 9, 30]
    leave = {4: [0, 1, 2, 3], 9: [0, 2, 3], 20: [1, 2], 27: [1]}
    follow(model, step, 40, lengths, leave)
    assert sorted({rows for rows, _ in step.steps}) == [1, 2, 4, 5]
    made = FakeGraph.made
    follow(model, step, 40, lengths, leave)  # the same shapes: nothing new is captured
    assert FakeGraph.made == made == len(step.steps)


def test_a_capture_changes_nothing_before_it_is_replayed(fake_cuda):
    model = tiny_model()
    step = DecodeStep(model, 4, 96, graph=True)
    _, kv = prefill(model, ragged_prompts(), 96)
    step.load(kv)
    before = step.cache.cache_seqlens.clone()
    replay = step.prepare(4, 96)
    assert step.cache.cache_seqlens.equal(before)
    replay()
    assert step.cache.cache_seqlens.equal(before + 1)


def test_weights_that_change_in_place_reach_a_captured_step(fake_cuda):
    model = tiny_model()
    step = DecodeStep(model, 4, 96, graph=True)
    follow(model, step, 3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    follow(model, step, 3)
    assert FakeGraph.made == 1


def test_one_prompt_fills_every_slot(fake_cuda):
    model = tiny_model()
    step = DecodeStep(model, 3, 96, graph=True)
    last, kv = prefill(model, ragged_prompts([7]), 7)
    step.load(kv)
    logits = step.step(last.argmax(-1).expand(3))
    assert logits.shape == (3, 320) and step.lengths == [7, 7, 7]
    assert logits[0].equal(logits[1]) and logits[0].equal(logits[2])


def test_a_failed_capture_is_said_once_and_changes_no_number(
    fake_cuda, monkeypatch, capsys
):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: operation not permitted\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(decode, "SPAN", 16)
    model = tiny_model()
    follow(model, DecodeStep(model, 4, 96, graph=True))
    told = capsys.readouterr().out
    assert told.count("without CUDA graphs") == 1 and "not permitted" in told
    assert CHOSEN == [True]  # PyTorch leaves the capture's stream current, we do not


@pytest.fixture
def compiler(monkeypatch):
    "Compile in this test, whatever the environment says; yields what was counted."
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(disable=False):
        yield counters
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads, fields", SHAPES[2:])
def test_a_compiled_step_gives_the_same(compiler, monkeypatch, heads, kv_heads, fields):
    monkeypatch.setattr(decode, "SPAN", 16)
    model = tiny_model(n_head=heads, n_kv_head=kv_heads, **fields)
    step = DecodeStep(model, 4, 96, compiled="aot_eager")
    follow(model, step, leave={9: [0, 2, 3]})
    assert list(step.steps) == [(4, 96)]  # one shape, or it would be compiled often
    assert compiler["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_many_sizes_may_be_compiled(compiler):
    model = tiny_model(n_layer=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2, 3):
            step = DecodeStep(model, rows, 96, compiled="aot_eager")
            follow(model, step, 2, LENGTHS[:rows])
    assert compiler["stats"]["unique_graphs"] == 3


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    step = DecodeStep(model, 2, 96)
    _, kv = prefill(model, ragged_prompts([3, 3, 3]), 96)
    with pytest.raises(ValueError, match="3 rows of 3 positions"):
        step.load(kv)
    last, kv = prefill(model, ragged_prompts([95, 4]), 96)
    step.load(kv)
    step.step(last.argmax(-1))
    with pytest.raises(ValueError, match="96 positions: there is no room"):
        step.step(last.argmax(-1))
    step.keep([1])
    step.step(last.argmax(-1)[:1])  # the short row goes on


class HostReads(TorchDispatchMode):
    "Count the looks at single numbers, each of which would wait for a GPU."

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_never_looks_at_the_device(fake_cuda):
    model = tiny_model()
    step = DecodeStep(model, 4, 96, graph=False)
    last, kv = prefill(model, ragged_prompts(), 96)
    tokens = last.argmax(-1)
    with HostReads() as reads:
        step.load(kv)
        for _ in range(5):
            step.step(tokens)
        step.keep([0, 3])
        step.step(tokens[:2])
    assert reads.count == 0


def both_engines(model) -> tuple[Engine, Engine]:
    return (Engine(model, tiny_tokenizer(), static=s) for s in (False, True))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_engine_says_the_same_with_fixed_shapes(
    fake_cuda, monkeypatch, prompts, temperature
):
    monkeypatch.setattr(decode, "SPAN", 16)
    eager, static = both_engines(tiny_model(n_head=4, n_kv_head=2))
    sampling = {"max_tokens": 50, "temperature": temperature, "num_samples": 3}
    a = eager.generate_many(prompts, **sampling)
    for _ in range(2):  # the second time in the same buffers
        b = static.generate_many(prompts, **sampling)
        assert [(r.ids, r.mask, r.end) for r in a] == [
            (r.ids, r.mask, r.end) for r in b
        ]
    buffers = static.spare
    assert buffers is not None and buffers.batch_size == 12


def test_conversations_that_overlap_have_buffers_of_their_own(prompts):
    eager, static = both_engines(tiny_model())
    sampling = {"max_tokens": 12, "temperature": 0}
    streams = [static.generate(p, **sampling) for p in prompts[:2]]
    columns = ([], [])
    for a, b in itertools.zip_longest(*streams):
        for said, column in zip(columns, (a, b)):
            said += [] if column is None else column[0]
    for prompt, said in zip(prompts, columns):
        alone = [column for column, _ in eager.generate(prompt, **sampling)]
        assert said == list(itertools.chain(*alone))
    abandoned = static.generate(prompts[0])
    next(abandoned)
    assert static.spare is None
    abandoned.close()
    assert static.spare is not None


def test_large_buffers_do_not_wait_for_the_next_call(monkeypatch, prompts):
    monkeypatch.setattr("nanochat.engine.SPARE_BYTES", 1000)
    _, static = both_engines(tiny_model())
    static.generate_many(prompts, max_tokens=3)
    assert static.spare is None


# ---- weights and rows


@pytest.mark.parametrize("fields", [{}, MODERN])
def test_frozen_weights_give_the_same_logits_bit_for_bit(fields):
    model = tiny_model(n_head=4, n_kv_head=2, **fields)
    model.dtype = torch.bfloat16
    ids = torch.tensor(ragged_prompts([30, 30]))

    def held():
        return sum(p.nbytes for p in model.parameters())

    with torch.inference_mode():
        before = model(ids)
        loss = model(ids, ids)
        size = held()
    same = freeze_weights(model)
    with torch.inference_mode():
        assert same is model and model(ids).equal(before)
        assert model(ids, ids).equal(loss)
    tables = {p.dtype for p in model.parameters() if p.dim() == 2}
    assert tables == {torch.bfloat16} and held() < 0.51 * size
    assert not any(p.requires_grad for p in model.parameters())
    assert model.num_params() == sum(p.numel() for p in model.parameters())


def test_a_model_in_training_is_not_frozen():
    model = tiny_model().train()
    with pytest.raises(UserError, match="training mode"):
        freeze_weights(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def filled_cache(rows: int, lengths=None) -> KVCache:
    cache = KVCache(rows, 2, 64, 16, 4)
    g = torch.Generator().manual_seed(0)
    for part in (cache.k_cache, cache.v_cache):
        part.normal_(generator=g)
    cache.token_ids.random_(1000, generator=g)
    cache.set_lengths(lengths or [50] * rows)
    return cache


@pytest.mark.parametrize(
    "rows", [[0], [1, 2, 5], [0, 2, 7], [7], [], list(range(8)), [5, 1], [2, 2, 3]]
)
@pytest.mark.parametrize("ragged", [False, True])
def test_rows_are_kept_without_asking_for_each(rows, ragged):
    cache = filled_cache(8, [50, 3, 20, 7, 9, 64, 1, 30] if ragged else None)
    keys, values = cache.k_cache.clone(), cache.v_cache.clone()
    ids = cache.token_ids.clone()
    lengths = cache.cache_seqlens.tolist()
    with HostReads() as reads:
        keep_rows(cache, rows)
    assert reads.count == 0
    assert cache.cache_seqlens.tolist() == [lengths[r] for r in rows]
    assert cache.get_pos() == max([lengths[r] for r in rows], default=0)
    assert len(cache.token_ids) == cache.k_cache.size(1) == len(rows)
    for to, row in enumerate(rows):
        n = lengths[row]
        assert cache.k_cache[:, to, :n].equal(keys[:, row, :n])
        assert cache.v_cache[:, to, :n].equal(values[:, row, :n])
        assert cache.token_ids[to, : n + 1].equal(ids[row, : n + 1])


def test_keeping_rows_takes_no_second_cache():
    cache = filled_cache(8, [50, 3, 20, 7, 9, 64, 1, 30])
    one_layer = cache.k_cache[0].nbytes
    assert peak_bytes(lambda: keep_rows(cache, [1, 3, 4, 6, 7])) < one_layer / 8


def test_prefill_makes_logits_for_one_position_of_each_prompt():
    model = tiny_model(vocab_size=50_000)
    logits = 50_000 * 4
    few = peak_bytes(lambda: prefill(model, [[5] * 60] * 4, 60))
    assert few < 60 * logits  # of 240 positions
