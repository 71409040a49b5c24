"""The engine against the naive generator, ragged batches, tools and limits."""

import pytest
import torch
from chat_model import tiny_engine, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.engine import ControlTokens, Engine, Row, prefill, push
from nanochat.execution import execute_code
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
    engine, ends = Engine(model, tokenizer), ControlTokens.of(tokenizer).ends
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
    run = lambda seed: engine.generate_batch(prompts[1], 4, 12, 1.0, 20, seed)
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
    for _ in module.run_rows(engine, rows, 1, 0.0, None, 0):
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


CHEATS = [
    "import os; os._exit(0)",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import sys; sys.stdout.close(); import os; os.close(2); os._exit(0)",
    "class E(BaseException): pass\nraise E",
    "import os\nwhile os.fork(): os._exit(0)",
]


@pytest.mark.parametrize("cheat", CHEATS)
def test_leaving_early_is_not_success(cheat):
    result = execute_code(f"{cheat}\nassert False, 'tests'", timeout=5)
    assert not result.success
    assert result.error


def test_limits_of_the_sandbox(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    seen = execute_code("import os; print(os.environ.get('SECRET'), os.getcwd())")
    assert seen.success and seen.stdout.startswith("None /")
    assert execute_code("while True: pass", timeout=0.5).timeout
    assert execute_code("import time; time.sleep(60)", timeout=0.5).timeout
    assert execute_code("x = bytearray(10**9)").memory_exceeded
    assert not execute_code("while True: print('x' * 1000)").success
    assert len(execute_code("print('x' * 500_000)").stdout) == 64 * 1024


def test_children_die_with_the_program(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    assert execute_code(program).success
    import time

    time.sleep(1.5)
    assert not mark.exists()


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


def conversation(turns: int, text: str = "word") -> list[dict]:
    pair = lambda i: [
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
