"""Measurements: bits per byte, CORE, chat evaluation, statistics and the report."""

import itertools
import json
import math
import os
import socket
import statistics
import sys
from pathlib import Path

import pytest
import torch
from memory import peak_bytes
from rank_group import run_on_ranks

from nanochat import chat_eval, core_eval, execution, report
from nanochat.base_eval import BaseEvalConfig
from nanochat.chat_eval import (
    ChatEvalConfig,
    chat_core,
    grade_categorical,
    letter_ids,
    paired_difference,
    pass_at_k,
    run_chat_eval,
    wilson,
)
from nanochat.common import UserError, compute_cleanup, compute_init, run_cli
from nanochat.core_eval import (
    CoreTask,
    Span,
    evaluate_core,
    evaluate_task,
    gather,
    score_spans,
)
from nanochat.dataloader import Batch
from nanochat.engine import Engine
from nanochat.functional import cross_entropy
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import Bigram, bigram_bpb, evaluate_bpb, fit_bigram
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import ChoiceTask, Task
from nanochat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = RustBPETokenizer([bytes([i]) for i in range(256)])
V = TOKENIZER.get_vocab_size()


def tiny_model(seed=0, sequence_len=128):
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=V, **shape))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the head and the projections begin at zero
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


# ---- bits per byte


def uniform(inputs, targets, loss_reduction):
    return cross_entropy(torch.zeros(*targets.shape, V), targets, loss_reduction)


def test_uniform_bytes_cost_log2_of_the_vocabulary():
    ids = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    bits = evaluate_bpb(uniform, iter([batch]), 1, TOKENIZER.token_bytes())
    assert bits == pytest.approx(math.log2(V), abs=1e-5)


def test_bpb_by_hand_with_masked_and_special_targets():
    sizes = torch.tensor([3, 1, 0])  # two text tokens and a special one
    nats = torch.tensor([[2.0, 0.5, 7.0, 11.0]])
    targets = torch.tensor([[0, 1, 2, -1]])

    def model(inputs, targets, loss_reduction):
        return nats

    bits = evaluate_bpb(model, iter([Batch(targets, targets)]), 1, sizes)
    assert bits == pytest.approx(2.5 / math.log(2) / 4)
    nothing = Batch(targets[:, 2:], targets[:, 2:])

    def model(inputs, targets, loss_reduction):
        return nats[:, 2:]

    assert evaluate_bpb(model, iter([nothing]), 1, sizes) == math.inf


def test_bpb_weights_tokens_not_batches():
    sizes = TOKENIZER.token_bytes()
    generator = torch.Generator().manual_seed(1)
    model = tiny_model()
    ids = torch.randint(256, (6, 17), generator=generator)
    whole = [Batch(ids[:, :-1], ids[:, 1:])]
    parts = [Batch(r[:, :-1], r[:, 1:]) for r in ids.split([1, 3, 2])]
    one = evaluate_bpb(model, iter(whole), 1, sizes)
    assert evaluate_bpb(model, iter(parts), 3, sizes) == pytest.approx(one, rel=1e-6)


def test_bigram_is_what_counting_gives():
    ids = torch.tensor([0, 1, 0, 1, 2, 0, 1])
    k, size = 2.0, 4
    bigram = Bigram(ids, size, k)
    one = [(ids.tolist().count(b) + 1) / (len(ids) + size) for b in range(size)]
    pairs = list(itertools.pairwise(ids.tolist()))
    for a, b in itertools.product(range(size), repeat=2):
        seen = sum(x == a for x, _ in pairs)
        p = (pairs.count((a, b)) + k * one[b]) / (seen + k)
        nats = bigram(torch.tensor([a]), torch.tensor([b]))
        assert nats.item() == pytest.approx(-math.log(p))
    row = bigram(torch.full((size,), 3), torch.arange(size))
    assert (-row).exp().sum().item() == pytest.approx(1.0)


def test_bigram_beats_unigram_on_text_and_never_sees_validation():
    train = ["the cat sat on the mat. " * 20] * 9
    val = ["the cat sat on the rat. "]
    bits = bigram_bpb(TOKENIZER, train, val)
    assert 0 < bits < 3
    ids = torch.tensor(TOKENIZER.encode(train[0]))
    assert fit_bigram(ids, V).k in (1, 3, 10, 30, 100, 300, 1000)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_main(rank, world, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NANOCHAT_BASE_DIR=folder,
    )  # fmt: skip
    torch.set_num_threads(1)
    compute_init("cpu")
    model = tiny_model()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(256, (4, 17), generator=generator)[rank::world]
    batch = Batch(ids[:, :-1], ids[:, 1:])
    bits = evaluate_bpb(model, iter([batch]), 1, TOKENIZER.token_bytes())
    right = evaluate_task(model, TOKENIZER, core_tasks()[0])
    config = ChatEvalConfig(max_problems=7, max_new_tokens=4, batch_size=2)
    engine = Engine(model, TOKENIZER)
    chat = run_chat_eval(Letters(), model, TOKENIZER, engine, config)
    if rank == 0:
        result = {"bits": bits, "right": right, "scores": chat["scores"]}
        with open(f"{folder}/result.json", "w") as file:
            json.dump(result, file)
    assert gather(list(range(rank, 7, world))) == list(range(7))
    compute_cleanup()


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path):
    run_on_ranks(rank_main, (2, free_port(), str(tmp_path)), 2)
    two = json.loads((tmp_path / "result.json").read_text())
    model = tiny_model()
    ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    one = evaluate_bpb(model, iter([batch]), 1, TOKENIZER.token_bytes())
    assert two["bits"] == pytest.approx(one, rel=1e-6)
    assert two["right"] == evaluate_task(model, TOKENIZER, core_tasks()[0])
    config = ChatEvalConfig(max_problems=7, max_new_tokens=4, batch_size=2)
    chat = run_chat_eval(Letters(), model, TOKENIZER, Engine(model, TOKENIZER), config)
    assert two["scores"] == chat["scores"]


# ---- CORE


def core_tasks():
    mc = [
        {
            "query": f"Q{i}: {word}",
            "choices": ["ab", "a longer one", "c"],
            "gold": i % 3,
        }
        for i, word in enumerate(["sun", "moon", "stars", "sky", "sea", "tree"])
    ]
    schema = [
        {
            "context_options": [f"{a} went", f"{b} ran"],
            "continuation": "home.",
            "gold": 1,
        }
        for a, b in (("Tom", "Anna"), ("Eve", "Jo"), ("Al", "Bo"))
    ]
    lm = [{"context": f"one two {i} ", "continuation": "four"} for i in range(4)]
    return [
        CoreTask("mc", "multiple_choice", mc, 2, "\nAnswer: ", 1 / 3),
        CoreTask("schema", "schema", schema, 1, " ", 0.5),
        CoreTask("lm", "language_modeling", lm, 1, " ", 0.0),
    ]


def slowly(model, text, scored):
    "Mean nats of the last `scored` bytes of a text, one token at a time."
    ids = TOKENIZER.encode(text, prepend="<|bos|>")
    total = 0.0
    exact = True
    for i in range(len(ids) - scored, len(ids)):
        row = model(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)
        total -= row[ids[i]].item()
        exact = exact and row.argmax() == ids[i]
    return total / scored, bool(exact)


def shared_start(texts):
    "Length of the longest common beginning."
    for n in range(min(map(len, texts)), 0, -1):
        if len({text[:n] for text in texts}) == 1:
            return n
    return 0


def solved(task, item: dict) -> str:
    "An item of CORE with its answer."
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    if task.kind == "schema":
        return item["context_options"][1] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def scored(task, item: dict) -> list[tuple[str, int]]:
    "Each text to score, with the length of its end that counts."
    rest = item.get("continuation", "")
    if task.kind == "multiple_choice":  # "a longer one" and "ab" share their "a"
        common = shared_start(item["choices"])
        begin = item["query"] + task.delimiter
        return [(begin + choice, len(choice) - common) for choice in item["choices"]]
    if task.kind == "schema":
        ends = [c + task.delimiter + rest for c in item["context_options"]]
        same = shared_start([end[::-1] for end in ends])
        return [(end, same) for end in ends]
    text = item["context"].strip() + task.delimiter + rest
    return [(text, len(task.delimiter + rest))]


@torch.no_grad()
def by_hand(model, task):
    "Grade every item, one token at a time."
    order = list(range(len(task.items)))
    core_eval.random.Random(1337).shuffle(order)
    right = []
    for i in order:
        others = [j for j in range(len(task.items)) if j != i]
        shown = core_eval.random.Random(1234 + i).sample(others, task.num_fewshot)
        item = task.items[i]
        before = "".join(solved(task, task.items[j]) + "\n\n" for j in shown)
        scores = [slowly(model, before + text, n) for text, n in scored(task, item)]
        nats = [s[0] for s in scores]
        exact = task.kind == "language_modeling"
        right.append(scores[0][1] if exact else nats.index(min(nats)) == item["gold"])
    return right


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_core_equals_brute_force(which, seed):
    model = tiny_model(seed)
    task = core_tasks()[which]
    assert evaluate_task(model, TOKENIZER, task) == by_hand(model, task)


def test_core_does_not_depend_on_the_batch():
    for task in core_tasks():
        answers = [
            evaluate_task(tiny_model(), TOKENIZER, task, batch_size=b)
            for b in (1, 4, 64)
        ]
        assert answers[0] == answers[1] == answers[2]


class Fluent:
    "A model that knows one text by heart."

    def __init__(self, text, sequence_len=128):
        self.ids = TOKENIZER.encode(text)
        self.config = GPTConfig(sequence_len=sequence_len)

    def get_device(self):
        return torch.device("cpu")

    def hidden(self, idx):
        return idx

    def logits(self, idx):
        logits = torch.zeros(*idx.shape, V)
        follows = dict(itertools.pairwise(self.ids))
        for place, token in enumerate(idx.tolist()):
            if token in follows:
                logits[place, follows[token]] = 9.0
        return logits


def nested_tasks():
    "Items one of whose parts begins, ends or equals another; right is the last one."
    pairs = [["a", "ab"], ["ab", "a"], ["a", "a"], ["", "a"], ["b", "bc", "bcd"]]
    for choices in pairs:
        item = {"query": "one two", "choices": choices, "gold": len(choices) - 1}
        yield CoreTask("mc", "multiple_choice", [item], 0, " ", 0.5)
    for contexts in (["x he", "x she"], ["so", "so"]):
        item = {"context_options": contexts, "continuation": "", "gold": 1}
        yield CoreTask("schema", "schema", [item], 0, " ", 0.5)


@pytest.mark.parametrize("task", list(nested_tasks()))
@pytest.mark.parametrize("seed", range(3))
def test_an_option_that_begins_another_is_scored_as_a_whole(task, seed):
    model = tiny_model(seed)
    texts, gold = core_eval.render_options(task, 0)
    spans = core_eval.option_spans(task, texts, TOKENIZER, 128)
    scores = [nats for nats, _ in core_eval.score_spans(model, spans)]
    assert all(math.isfinite(nats) for nats in scores)
    if task.kind == "multiple_choice":  # the whole continuation, delimiter included
        expected = [slowly(model, w, len(w) - len(c))[0] for c, w in texts]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert evaluate_task(model, TOKENIZER, task) == [scores.index(min(scores)) == gold]


def test_the_first_option_does_not_win_by_being_short():
    "The model continues with b; offered first, the prefix was right whatever it said."
    item = {"query": "x", "choices": ["a", "ab"], "gold": 0}
    task = CoreTask("mc", "multiple_choice", [item], 0, "", 0.5)
    assert evaluate_task(Fluent("ab"), TOKENIZER, task) == [False]


def test_an_empty_option_is_named():
    items = {
        "multiple_choice": {"query": "who", "choices": ["", "me"], "gold": 0},
        "schema": {"context_options": ["a", "b"], "continuation": "", "gold": 0},
        "language_modeling": {"context": "who", "continuation": ""},
    }
    for kind, item in items.items():
        task = CoreTask("odd one", kind, [item], 0, "", 0.0)
        with pytest.raises(UserError, match="'odd one' has an empty option after"):
            evaluate_task(tiny_model(), TOKENIZER, task)


def test_nan_never_chooses():
    model = tiny_model()
    model.lm_head.weight.data[:] = float("nan")
    for task in core_tasks():
        with pytest.raises(UserError, match="scores are NaN"):
            evaluate_task(model, TOKENIZER, task)
    with pytest.raises(UserError, match="scores are NaN"):
        grade_categorical(Letters(), range(3), TOKENIZER, model)


def test_chance_is_that_of_the_samples():
    for task in core_eval.load_samples():
        if task.label == "boolq":  # DCLM's: what always saying yes would earn
            yes = sum(item["gold"] for item in task.items) / len(task.items)
            assert task.chance == pytest.approx(yes, abs=0.01)
        elif task.kind == "multiple_choice":
            sizes = [len(item["choices"]) for item in task.items]
            assert task.chance == pytest.approx(1 / statistics.median(sizes))


def test_language_modeling_needs_every_token():
    items = [
        {"context": "ab", "continuation": "cd"},
        {"context": "ab", "continuation": "ce"},
    ]
    task = CoreTask("lm", "language_modeling", items, 0, "", 0.0)
    right = evaluate_task(Fluent("abcd"), TOKENIZER, task)
    assert sorted(right) == [False, True]


def test_core_is_the_mean_of_centred_accuracies():
    seen = []
    result = evaluate_core(
        tiny_model(), TOKENIZER, core_tasks(), report=lambda k, r: seen.append(k)
    )
    values = [
        (r["accuracy"] - r["chance"]) / (1 - r["chance"])
        for r in result["tasks"].values()
    ]
    assert result["core"] == pytest.approx(sum(values) / 3)
    assert seen == ["mc", "schema", "lm"]


def test_prompts_that_do_not_fit_are_cut_on_the_left():
    items = [{"query": "x" * 300 + "?", "choices": ["yes", "no"], "gold": 0}] * 2
    task = CoreTask("long", "multiple_choice", items, 1, " ", 0.5)
    texts, _ = core_eval.render_options(task, 0)
    for span in core_eval.option_spans(task, texts, TOKENIZER, 64):
        assert len(span.ids) == 64 and 0 < span.start < span.end == 64
    assert len(evaluate_task(tiny_model(sequence_len=64), TOKENIZER, task)) == 2


def test_embedded_samples_all_render():
    tasks = core_eval.load_samples()
    assert len(tasks) >= 12
    for task in tasks:
        for i in range(len(task.items)):
            texts, gold = core_eval.render_options(task, i)
            assert 0 <= gold < len(texts)
            assert all(whole.startswith(context) for context, whole in texts)
    result = evaluate_core(tiny_model(), TOKENIZER, tasks, max_items=2)
    assert all(r["n"] == 2 for r in result["tasks"].values())


def write_bundle(folder):
    (folder / "eval_data/x").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n- label: toy\n  dataset_uri: x/toy.jsonl\n  num_fewshot: [1]\n"
        "  icl_task_type: multiple_choice\n  continuation_delimiter: ': '\n"
    )
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\ntoy,none,50\n"
    )
    items = [{"query": f"q{i}", "choices": ["a", "b"], "gold": 0} for i in range(3)]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "eval_data/x/toy.jsonl").write_text(lines)


def test_the_real_bundle_is_read(tmp_path):
    pytest.importorskip("yaml")
    write_bundle(tmp_path)
    (task,) = core_eval.load_bundle(tmp_path)
    assert (task.label, task.num_fewshot, task.delimiter, task.chance) == (
        "toy",
        1,
        ": ",
        0.5,
    )
    with pytest.raises(UserError, match="not an evaluation bundle"):
        core_eval.load_bundle(tmp_path / "nowhere")
    real = os.environ.get("NANOCHAT_EVAL_BUNDLE")  # DCLM's own, where it is at hand
    assert not real or len(core_eval.load_bundle(real)) == 22


# ---- statistics


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize("n", [20, 100, 400])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_wilson_covers_about_95_percent(n, p):
    inside = sum(
        binomial(n, k, p)
        for k in range(n + 1)
        if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert inside > 0.89


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50)[0] == 0 and wilson(50, 50)[1] == 1
    low, high = wilson(45, 50)  # worked in the chapter
    assert low == pytest.approx(0.7864, abs=1e-3) and high == pytest.approx(
        0.9565, abs=1e-3
    )


@pytest.mark.parametrize(
    "n, c, k", [(5, 0, 3), (5, 2, 1), (6, 2, 3), (6, 6, 2), (7, 3, 7)]
)
def test_pass_at_k_equals_enumeration(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError):
        pass_at_k(n, c, n + 1)


def test_pairing_sees_what_two_intervals_hide():
    before = [1.0] * 50 + [0.0] * 50
    after = [1.0] * 50 + [1.0] * 8 + [0.0] * 42
    mean, low, high = paired_difference(before, after, resamples=4000)
    spread = math.sqrt(0.08 * 0.92 / 100)
    assert mean == pytest.approx(0.08)
    assert low == pytest.approx(0.08 - 1.96 * spread, abs=0.015) and low > 0
    assert high == pytest.approx(0.08 + 1.96 * spread, abs=0.015)
    assert wilson(58, 100)[0] < 0.5  # the two intervals overlap
    with pytest.raises(UserError):
        paired_difference([1.0], [])


# ---- chat


class Letters(ChoiceTask):
    "Multiple choice without files; questions of different lengths."

    def __init__(self):
        Task.__init__(self)
        self.rows = [{"q": "x" * (3 * i + 1)} for i in range(9)]
        self.order = range(9)

    def parse(self, row):
        return row["q"], ["A", "B", "C"], ["one", "two", "three"], "B"


def test_exams_make_logits_for_the_wanted_positions_only():
    rows = 20_000  # of the head, nearly all of them padding
    model = GPT(GPTConfig(128, V, 1, 2, 1, 32, pad_vocab_to=rows))
    model.init_weights(0)
    task = Letters()
    row = 4 * rows  # bytes of the logits of one position
    task.rows = [{"q": "x" * 300}] * 9  # prompts that fill the context

    def grade():
        return grade_categorical(task, range(9), TOKENIZER, model)

    assert peak_bytes(grade) < 2 * 9 * row + 2**22
    spans = [Span([5] * 128, 125, 128)] * 9
    assert peak_bytes(lambda: score_spans(model, spans)) < 5 * 9 * 3 * row + 2**22


def test_batched_choice_equals_one_by_one():
    model = tiny_model()
    engine = Engine(model, TOKENIZER)
    scores = [
        run_chat_eval(
            Letters(), model, TOKENIZER, engine, ChatEvalConfig(batch_size=b)
        )["scores"]
        for b in (1, 4, 9)
    ]
    assert scores[0] == scores[1] == scores[2]
    expected = []
    for example in Letters():
        ids = TOKENIZER.render_for_completion(example)[-128:]
        logits = model(torch.tensor([ids]))[0, -1]
        best = max("ABC", key=lambda c: logits[ord(c)].item())
        expected.append(float(best == "B"))
    assert scores[0] == expected


def test_letters_of_several_tokens_are_refused():
    with pytest.raises(UserError, match="2 tokens"):
        letter_ids(TOKENIZER, ["A", "BB"])


class Scripted:
    "An engine that answers every arithmetic question correctly and stops."

    def __init__(self, model, reply):
        self.model, self.reply = model, reply

    def generate_many(self, prompts, max_tokens, temperature, top_k, seed, num_samples):
        text = TOKENIZER.encode(self.reply)
        return [types_row(p, text) for p in prompts for _ in range(num_samples)]


def types_row(prompt, text):
    from nanochat.engine import Row

    mask = [0] * len(prompt) + [1] * len(text)
    return Row([*prompt, *text], mask, len(prompt), limit=10**6, end=1)


def test_scores_ended_and_samples_are_recorded():
    task = Arithmetic("test", 30)
    answers = [x["answer"] for x in task]
    engine = Scripted(tiny_model(sequence_len=1024), f"The answer is {answers[0]}.")
    result = run_chat_eval(
        task, engine.model, TOKENIZER, engine, ChatEvalConfig(batch_size=7)
    )
    assert result["scores"] == [float(a == answers[0]) for a in answers]
    assert result["n"] == 30 and result["ended"] == 1.0 and len(result["samples"]) == 5
    assert result["low"] <= result["accuracy"] <= result["high"]
    assert json.loads(json.dumps(result)) == result


def test_prompts_longer_than_the_context_count_as_wrong():
    model = tiny_model(sequence_len=40)
    task = Arithmetic("test", 12)
    lengths = [len(TOKENIZER.render_for_completion(x)) for x in task]
    assert min(lengths) < 40 < max(lengths)
    engine = Engine(model, TOKENIZER)
    result = run_chat_eval(
        task, model, TOKENIZER, engine, ChatEvalConfig(max_new_tokens=3)
    )
    assert result["n"] == 12 and len(result["scores"]) == 12


def test_chatcore_needs_all_its_tasks():
    result = {"accuracy": 0.625, "chance": 0.25}
    everything = dict.fromkeys(chat_eval.CHATCORE, result)
    assert chat_core(everything) == pytest.approx(0.5)
    everything.pop("MMLU")
    assert chat_core(everything) is None


def test_unknown_task_is_named():
    model = tiny_model()
    with pytest.raises(UserError, match="no task 'Chess'"):
        chat_eval.evaluate_chat(
            model, TOKENIZER, Engine(model, TOKENIZER), ChatEvalConfig(tasks="Chess")
        )


@pytest.mark.parametrize(
    "kind, options, said",
    [
        (ChatEvalConfig, {"batch_size": 0}, "--batch-size is 0: use at least 1"),
        (ChatEvalConfig, {"batch_size": -4}, "--batch-size is -4: use at least 1"),
        (ChatEvalConfig, {"max_new_tokens": 0}, "--max-new-tokens is 0: use at least"),
        (ChatEvalConfig, {"num_samples": 0}, "--num-samples is 0: use at least 1"),
        (
            ChatEvalConfig,
            {"max_problems": 0},
            "--max-problems is 0: use at least 1, or",
        ),
        (ChatEvalConfig, {"max_problems": -2}, "--max-problems is -2: use at least 1"),
        (ChatEvalConfig, {"top_k": -1}, "--top-k is -1: use at least 0"),
        (ChatEvalConfig, {"temperature": -0.5}, "--temperature is -0.5: use 0 or more"),
        (ChatEvalConfig, {"temperature": float("nan")}, "--temperature is nan"),
        (BaseEvalConfig, {"device_batch_size": 0}, "--device-batch-size is 0"),
        (BaseEvalConfig, {"eval_tokens": -1}, "--eval-tokens is -1: use at least 1"),
        (BaseEvalConfig, {"bigram_chars": -5}, "--bigram-chars is -5: use at least 0"),
        (BaseEvalConfig, {"core_items": 0}, "--core-items is 0: use at least 1, or -1"),
        (BaseEvalConfig, {"core_items": -4}, "--core-items is -4: use at least 1"),
    ],
)
def test_counts_that_examine_nothing_are_refused(
    kind, options, said, monkeypatch, capsys
):
    with pytest.raises(UserError, match=f"^{said}"):
        kind(**options)
    words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    stage = {ChatEvalConfig: "chat_eval", BaseEvalConfig: "base_eval"}[kind]
    monkeypatch.setattr(sys, "argv", [stage, "--preset", "cpu", *words])
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda config: None, kind, stage)
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stopped.value.code == 2 and said in told


@pytest.mark.posix
def test_the_room_is_asked_for_before_anything_is_computed(monkeypatch, capsys):
    monkeypatch.setattr(execution, "room_problem", lambda: "no room")
    with pytest.raises(UserError, match="no room"):
        chat_eval.open_tasks(ChatEvalConfig(tasks="Arithmetic|HumanEval"))
    names = list(chat_eval.open_tasks(ChatEvalConfig()))
    assert names == [name for name in chat_eval.TASKS if name != "HumanEval"]
    assert capsys.readouterr().out.endswith("skipping HumanEval: no room\n")
    unsafe = chat_eval.open_tasks(ChatEvalConfig(tasks="HumanEval", unsafe_code=True))
    assert unsafe["HumanEval"].unsafe
    monkeypatch.setattr(execution, "room_problem", lambda: "")
    safe = chat_eval.open_tasks(ChatEvalConfig(tasks="HumanEval"))
    assert not safe["HumanEval"].unsafe


def test_the_option_is_spelled_as_the_refusal_says(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["chat_eval", "--preset", "cpu", "--unsafe-code"])
    run_cli(lambda config: seen.append(config), ChatEvalConfig, "chat_eval")
    assert seen[0].unsafe_code and not ChatEvalConfig().unsafe_code


def test_the_chapter_names_the_recorded_run():
    record = json.loads((ROOT / "dev/records/speedrun_cpu.json").read_text("utf-8"))
    sums = [
        100 * record["sections"][f"chat_eval_{s}"]["tasks"]["Arithmetic"]["accuracy"]
        for s in ("sft", "rl")
    ]
    steps = record["sections"]["chat_rl"]["steps"]
    text = (ROOT / "nbs/09_evaluation.ipynb").read_text("utf-8")
    assert steps == 80 and "eighty steps at 10 %, and its recorded run" in text
    assert f"went from {sums[0]:.1f} to {sums[1]:.1f} %" in text


# ---- report


def write_run(base):
    (base / "report").mkdir(parents=True)
    (base / "runs/base_train").mkdir(parents=True)
    task = {
        "n": 40,
        "chance": 0.0,
        "ended": 1.0,
        "low": 0.1,
        "high": 0.3,
        "samples": [],
    }
    for stage, right in (("sft", 8), ("rl", 20)):
        scores = [1.0] * right + [0.0] * (40 - right)
        shown = [{"question": "<b>1+1</b>|?", "reply": "2 & 3", "score": 1.0}]
        result = task | {"accuracy": right / 40, "scores": scores, "samples": shown}
        section = {"tasks": {"Arithmetic": result}, "chatcore": None, "seconds": 61}
        (base / f"report/chat_eval_{stage}.json").write_text(json.dumps(section))
    (base / "report/base_eval.json").write_text('{"val_bpb": 1.9, "bigram_bpb": 2.4}')
    (base / "report/broken.json").write_text("{")
    lines = [json.dumps({"step": i, "loss": 5 / (i + 1)}) for i in range(700)]
    (base / "runs/base_train/d2.jsonl").write_text("\n".join(lines) + '\n{"step": 70')


def test_report_of_a_run(tmp_path):
    write_run(tmp_path)
    markdown, page = (p.read_text() for p in report.write_report(tmp_path))
    assert "| validation text, bits per byte | 1.900 |" in markdown
    assert "20.0 % [10.0, 30.0] | 50.0 %" in markdown
    assert "Arithmetic, RL minus SFT: +30.0 points" in markdown
    assert "<svg" in page and "polyline" in page
    assert "&lt;b&gt;1+1&lt;/b&gt;|?" in page and "2 &amp; 3" in page
    for outside in ("http:", "https:", "<script", "<link", "src="):
        assert outside not in page


def test_a_report_says_each_number_of_questions_where_they_differ():
    few = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "n": 8, "chance": 0.25}
    chats = [{}, {"tasks": {"T": few}}, {"tasks": {"T": few | {"n": 90}}}]
    label, *cells = report.task_row("T", chats)
    assert label == "T (chance 25.0 %)" and "n =" not in cells[0]
    assert cells[1].endswith("(n = 8)") and cells[2].endswith("(n = 90)")
    label, *cells = report.task_row("T", [chats[1], chats[1]])
    assert label == "T (n = 8, chance 25.0 %)" and "n =" not in "".join(cells)


def test_report_of_nothing(tmp_path):
    markdown, page = report.write_report(tmp_path)
    assert "No stage has saved anything" in markdown.read_text()
    assert "Machine and versions" in page.read_text()


def test_curves_survive_one_value_and_flat_lines():
    assert "<svg" in report.svg_curve([(0, 1.0), (1, 1.0)], "flat")
    points = report.smooth([(i, 1.0) for i in range(1001)], 200)
    assert len(points) <= 200 and all(y == 1 for _, y in points)


def test_a_line_of_chat_eval_has_its_uncertainty_twice():
    result = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "stderr": 0.049, "n": 104}
    line = chat_eval.task_line("T", result | {"chance": 0.25, "ended": None})
    assert "95 % interval [40.0, 60.0]  stderr 4.9  n 104  chance 25 %" in line


def test_chat_eval_says_what_it_leaves_out_and_guesses_a_name(capsys):
    config = chat_eval.ChatEvalConfig(tasks="Capitals|Arithmetic")
    assert list(chat_eval.open_tasks(config)) == ["Capitals", "Arithmetic"]
    said = capsys.readouterr().out
    assert "left out: ARC-Easy, " in said and "Capitals" not in said
    with pytest.raises(UserError, match="did you mean Capitals\\?"):
        chat_eval.open_tasks(chat_eval.ChatEvalConfig(tasks="capital"))


def test_a_misspelled_task_is_refused_before_a_model_is_looked_for(base_dir):
    with pytest.raises(UserError, match="no task 'typo'"):
        chat_eval.examine_chat(chat_eval.ChatEvalConfig(tasks="typo"))
