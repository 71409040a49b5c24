"""Packed conversations: never cropped in the middle, never clogged, the mask as it was."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import checkpoint
from nanochat.chat_data import chat_batches, row_stream
from nanochat.common import UserError
from nanochat.config import ChatConfig
from nanochat.gpt import GPT, GPTConfig
from nanochat.train import accumulate

CPU = torch.device("cpu")


def talk(number: int, turns: int, words: int) -> dict:
    "A conversation that can be recognised by its first word."
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"{number} question {turn}"},
            {"role": "assistant", "content": " ".join(["word"] * words)},
        ]
    return {"messages": messages}


def pieces(rows, bos: int) -> list[tuple[list[int], list[int]]]:
    "Split packed rows into conversations again."
    found = []
    for ids, mask in rows:
        starts = [i for i, t in enumerate(ids) if t == bos] + [len(ids)]
        assert starts[0] == 0
        for a, b in zip(starts, starts[1:]):
            if b - a > 1:
                found.append((ids[a:b], mask[a:b]))
    return found


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 60)), min_size=70, max_size=90
    ),
    streams=st.integers(1, 2),
)
def test_every_conversation_is_whole_once_or_counted(tokenizer, sizes, streams):
    chats = [talk(i, *size) for i, size in enumerate(sizes)]
    T = 64
    bos = tokenizer.get_bos_token_id()
    end = tokenizer.encode_special("<|assistant_end|>")
    whole = {tuple(r[0]): r for r in map(tokenizer.render_conversation, chats)}
    for stream in range(streams):
        source = row_stream(
            tokenizer, chats, stream, streams, (2, T), cursor=None, everything=False
        )
        seen = Counter()
        cursor = {"epoch": 0}
        while cursor["epoch"] < 2:
            rows, cursor = next(source)
            for ids, mask in pieces(rows, bos):
                assert ids[-1] == end and any(mask)  # a complete answer
                full = [r for k, r in whole.items() if k[: len(ids)] == tuple(ids)]
                assert full and full[0][1][: len(ids)] == mask
                seen[tuple(ids)] += 1
        mine = len(chats[stream::streams])  # at least, of each epoch
        waiting = len(cursor["waiting"])
        assert sum(seen.values()) + waiting + cursor["dropped"] >= 2 * (mine - 1)
        too_long = sum(len(k) > T + 1 for k in whole)
        if streams == 1:
            assert cursor["cut"] + cursor["dropped"] >= 2 * too_long


def test_a_corpus_without_a_fitting_answer_is_an_error_not_a_loop(tokenizer):
    chats = [talk(i, 1, 200) for i in range(70)]
    with pytest.raises(UserError, match="not one of 70 conversations fits into 32"):
        next(row_stream(tokenizer, chats, 0, 1, (1, 32), cursor=None, everything=False))


def test_counts_survive_a_resume(tokenizer):
    chats = [talk(i, 1 + i % 4, 5) for i in range(80)]
    straight = chat_batches(tokenizer, chats, 2, 64, CPU)
    batches = [next(straight) for _ in range(60)]
    again = chat_batches(
        tokenizer, chats, 2, 64, CPU, cursors={"0": batches[29].cursor}
    )
    for batch in batches[30:]:
        other = next(again)
        assert torch.equal(batch.inputs, other.inputs) and batch.cursor == other.cursor
    assert batches[-1].cursor["cut"] > 0


def spans(batch) -> list[list[int]]:
    "The runs of targets that carry loss, row by row."
    found = []
    for row in batch.targets.tolist():
        inside = False
        for token in row:
            if token >= 0 and not inside:
                found.append([])
            inside = token >= 0
            if inside:
                found[-1].append(token)
    return found


def test_exactly_the_answers_carry_loss_through_the_loader(tokenizer):
    chats = [talk(i, 1 + i % 3, 2 + i % 5) for i in range(80)]
    source = chat_batches(tokenizer, chats, 2, 128, CPU)
    seen, answers = Counter(), Counter()
    for chat in chats:
        said = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
        answers.update(f"{text}<|assistant_end|>" for text in said)
    cursor = {"epoch": 0}
    while cursor["epoch"] < 3:
        batch = next(source)
        cursor = batch.cursor
        seen.update(tokenizer.decode(span) for span in spans(batch))
        where = batch.targets[:, :-1] >= 0
        assert torch.equal(batch.targets[:, :-1][where], batch.inputs[:, 1:][where])
    assert seen.keys() == answers.keys()  # nothing else, and no piece of an answer
    assert sum(seen.values()) > 2 * sum(answers.values())


def test_a_batch_without_a_trained_token_does_no_harm(tokenizer):
    "Only user messages: the loader gives targets of -1, the step is that of the others."
    silent = [
        {"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(70)
    ]
    rows, _ = next(
        row_stream(tokenizer, silent, 0, 1, (2, 64), cursor=None, everything=False)
    )
    assert not any(any(mask) for _, mask in rows)
    batch = next(chat_batches(tokenizer, silent, 2, 64, CPU))
    assert (batch.targets == -1).all()
    good = next(chat_batches(tokenizer, [talk(i, 2, 5) for i in range(70)], 2, 64, CPU))
    steps = []
    for micro in ([good], [good, batch], [batch]):
        model = GPT(GPTConfig(64, tokenizer.get_vocab_size(), 1, 2, 1, 16))
        model.init_weights(0)
        loss = accumulate(model, micro)
        steps.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert steps[0][0] == steps[1][0] and torch.equal(steps[0][1], steps[1][1])
    assert steps[2][0] == 0 and not steps[2][1].any()


@pytest.mark.slow
def test_own_conversations_join_and_too_long_ones_are_reported(
    base_model, base_dir, capsys
):
    from nanochat.stage import midtrain as main

    own = base_dir / "own.jsonl"
    lines = [json.dumps(talk(i, 3, 40)) for i in range(30)]
    own.write_text("\n".join(lines))
    options = dict(
        num_iterations=2, device_batch_size=2, total_batch_size=64, device="cpu"
    )
    options |= dict(eval_tokens=64, compile=False, extra=str(own), extra_epochs=3)
    context = checkpoint.read_meta(base_model / "step_000008")["model_config"]
    options["total_batch_size"] = 2 * context["sequence_len"]
    main(ChatConfig(**options))
    told = capsys.readouterr().out
    plain = len_of_mixture()
    assert f"{plain + 90:,} conversations" in told
    assert "conversations were cut after an answer" in told
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        main(ChatConfig(**options | {"extra": "missing.jsonl"}))


def len_of_mixture() -> int:
    from nanochat.tasks.mixtures import open_mixture

    return len(open_mixture("mid", ChatConfig())[0])
