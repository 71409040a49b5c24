"""Reinforcement learning: the gradient, what is trained, ranks, and resuming."""

import itertools
import json
import os
import socket
from dataclasses import replace

import pytest
import torch
from rank_group import run_on_ranks

from nanochat import checkpoint, rl
from nanochat.common import UserError, compute_cleanup, compute_init
from nanochat.engine import Engine
from nanochat.functional import cross_entropy
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import setup_optimizer
from nanochat.rl import (
    PRACTICE,
    Questions,
    RLConfig,
    Rollout,
    accumulate_policy,
    group_advantages,
    pad_rows,
    policy_loss,
    policy_step,
    practice_questions,
    roll_out,
    tell_practice,
    train_rl,
)
from nanochat.tasks.common import Task
from nanochat.tokenizer import RustBPETokenizer

TOKENIZER = RustBPETokenizer([bytes([i]) for i in range(256)])
CONFIG = RLConfig(
    num_steps=4,
    examples_per_step=4,
    num_samples=4,
    max_new_tokens=6,
    eval_examples=4,
    eval_samples=2,
    eval_every=-1,
    init_lr_frac=1.0,
)


class Vowels(Task):
    "Reward replies by their share of small letters, which any model can raise."

    def num_examples(self):
        return 8

    def get_example(self, index):
        roles = [("user", "say " + "abc" * index), ("assistant", "a")]
        return {"messages": [{"role": r, "content": c} for r, c in roles]}

    def reward(self, conversation, completion):
        return sum("a" <= c <= "z" for c in completion.partition("<")[0]) / 6

    def evaluate(self, conversation, completion):
        return self.reward(conversation, completion) == 1


def tiny_model(seed=0):
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(sequence_len=64, vocab_size=265, **shape))
    model.init_weights(seed)
    return model


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


# ---- the gradient


class Table(torch.nn.Module):
    "A policy with one distribution per position: p(reply) is a product of softmaxes."

    def __init__(self, length, size):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(length, size, generator=generator))

    def get_device(self):
        return self.logits.device

    def forward(self, inputs, targets, loss_reduction):
        rows = self.logits[: targets.size(1)].expand(len(targets), -1, -1)
        return cross_entropy(rows, targets, loss_reduction)


def test_policy_gradient_equals_the_gradient_of_the_expected_reward():
    policy = Table(2, 3)
    reward = torch.tensor([[0, 1, 0], [2, 0, 5], [1, 0, 0.5]])
    replies = list(itertools.product(range(3), repeat=2))
    p = policy.logits.softmax(-1)
    probability = torch.stack([p[0, a] * p[1, b] for a, b in replies])
    rewards = torch.tensor([float(reward[a, b]) for a, b in replies])
    (probability * rewards).sum().backward()
    exact, policy.logits.grad = policy.logits.grad, None
    targets = torch.tensor(replies)
    for baseline in (0.0, rewards.mean().item(), 7.0):  # any constant will do
        weight = probability.detach() * (rewards - baseline)
        policy_loss(policy, targets, targets, weight, 1).backward()
        torch.testing.assert_close(-policy.logits.grad, exact, atol=1e-6, rtol=1e-5)
        policy.logits.grad = None


def test_sampled_gradient_approaches_the_exact_one():
    policy = Table(1, 3)
    generator = torch.Generator().manual_seed(1)
    reward = torch.tensor([0.0, 1.0, 3.0])
    p = policy.logits.softmax(-1)[0]
    (p * reward).sum().backward()
    exact, policy.logits.grad = policy.logits.grad, None
    groups, size = 4000, 8
    drawn = torch.multinomial(p.detach(), groups * size, True, generator=generator)
    advantages = group_advantages(reward[drawn].view(groups, size)).flatten()
    # The mean of a group contains the reply itself: the estimate shrinks by 1 - 1/S.
    count = groups * size * (1 - 1 / size)
    policy_loss(policy, drawn[:, None], drawn[:, None], advantages, count).backward()
    torch.testing.assert_close(-policy.logits.grad, exact, atol=0.02, rtol=0)


def test_advantages_compare_within_a_prompt():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    advantages = group_advantages(rewards)
    assert advantages.sum(1).abs().max() < 1e-6
    assert advantages[1].tolist() == [0, 0, 0, 0]
    assert advantages[2].tolist() == [-0.25, -0.25, -0.25, 0.75]


def toy_rollout():
    ids = [[9, 1, 2, 3], [9, 4, 5], [9, 6, 7, 8, 1, 2], [9, 2]]
    mask = [[0, 1, 1, 1], [0, 1, 1], [0, 0, 1, 1, 0, 1], [0, 1]]
    return Rollout(ids, mask, torch.tensor([[1.0, 0], [1, 1]]), 1.0)


def gradients(model, rollout, batch_size):
    model.zero_grad()
    accumulate_policy(model, rollout, batch_size, rollout.num_tokens)
    return [p.grad.clone() for p in model.parameters()]


def test_the_gradient_depends_neither_on_batches_nor_on_idle_groups():
    model, rollout = tiny_model(), toy_rollout()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05
    whole = gradients(model, rollout, 64)
    for a, b in zip(whole, gradients(model, rollout, 1)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    model.zero_grad()
    inputs, targets = pad_rows(rollout.ids, rollout.mask, torch.device("cpu"))
    weight = group_advantages(rollout.rewards).flatten()
    policy_loss(model, inputs, targets, weight, rollout.num_tokens).backward()
    for a, p in zip(whole, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


def test_only_chosen_tokens_are_targets():
    inputs, targets = pad_rows([[9, 1, 2], [9, 3]], [[0, 0, 1], [0, 1]], "cpu")
    assert inputs.tolist() == [[9, 1], [9, 3]] and targets.tolist() == [
        [-1, 2],
        [3, -1],
    ]


# ---- rollouts


def scripted(monkeypatch, engine, text):
    "Make the model choose this text, whatever it thinks."
    control = {
        "<c>": "<|python_start|>",
        "</c>": "<|python_end|>",
        "<e>": "<|assistant_end|>",
    }
    ids = []
    while text:
        name = next((n for n in control if text.startswith(n)), None)
        ids.append(TOKENIZER.encode_special(control[name]) if name else ord(text[0]))
        text = text[len(name or "x") :]
    steps = iter(ids)

    def following(logits, *_):
        return torch.full((len(logits), 1), next(steps))

    monkeypatch.setattr("nanochat.engine.sample_next", following)
    return ids


def test_forced_tokens_are_masked_and_the_end_is_trained(monkeypatch):
    engine = Engine(tiny_model(), TOKENIZER)
    # While the engine forces <|output_start|>12<|output_end|>, what is drawn is dropped.
    chosen = scripted(monkeypatch, engine, "<c>5+7</c>....ok<e>")
    config = replace(CONFIG, max_new_tokens=32)
    rollout = roll_out(engine, Vowels(), [2], config, seed=0)
    row = rollout.ids[0]
    mask = rollout.mask[0]
    trained = [token for token, flag in zip(row, mask) if flag]
    assert trained == chosen[:5] + chosen[9:]
    assert row[-1] == TOKENIZER.encode_special("<|assistant_end|>") and mask[-1] == 1
    assert "12" in TOKENIZER.decode([t for t, flag in zip(row, mask) if not flag])
    assert rollout.ended == 1.0 and rollout.num_tokens == 4 * len(trained)


def test_a_reply_cut_off_has_no_end_to_train():
    rollout = roll_out(
        Engine(tiny_model(), TOKENIZER), Vowels(), [0, 1], CONFIG, seed=3
    )
    for ids, mask in zip(rollout.ids, rollout.mask):
        assert len(ids) == len(mask) and 1 <= sum(mask) <= 6
    assert rollout.rewards.shape == (2, 4)


def test_rollouts_repeat_with_their_seed_and_samples_differ():
    engine = Engine(tiny_model(), TOKENIZER)
    runs = [roll_out(engine, Vowels(), [0, 1], CONFIG, seed) for seed in (5, 5, 6)]
    assert runs[0].ids == runs[1].ids != runs[2].ids
    first = {row[len(row) - sum(mask)] for row, mask in zip(runs[0].ids, runs[0].mask)}
    assert len(first) > 2  # the first tokens of the samples are not all the same


def test_steps_deal_all_prompts_before_repeating():
    questions = Questions(range(8), CONFIG)
    indices = questions.of_step(0) + questions.of_step(1)
    assert sorted(indices) == list(range(8))
    assert questions.of_step(2) == indices[:4]


# ---- learning, resuming, ranks


@pytest.mark.slow
def test_practice_raises_the_reward():
    model = tiny_model()
    config = replace(CONFIG, num_steps=16, num_samples=32)
    engine = Engine(model, TOKENIZER)
    optimizer = setup_optimizer(model)
    questions = Questions(Vowels(), config)
    records = [policy_step(engine, optimizer, questions, config, s) for s in range(16)]
    rewards = [r["reward"] for r in records]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert records[0]["lr_scale"] == 1.0 and records[-1]["lr_scale"] == 1 / 16


def test_the_gradient_is_measured_clipped_and_guarded(monkeypatch, tmp_path):
    norms = {}
    for limit in (0.0, 1e-3):
        model = tiny_model()
        config = replace(CONFIG, grad_clip=limit)
        engine = Engine(model, TOKENIZER)
        optimizer = setup_optimizer(model)
        questions = Questions(Vowels(), config)
        record = policy_step(engine, optimizer, questions, config, 0)
        norms[limit] = record["grad_norm"]
        average = optimizer.parts["adamw"].state[model.lm_head.weight]["exp_avg"]
        taken = average.norm() / (1 - 0.8)  # of the gradient that the first step saw
        assert taken < 1.001 * (limit or record["grad_norm"]) and taken > 0
    assert norms[0.0] == norms[1e-3] > 1e-3
    before = [p.clone() for p in model.parameters()]

    def poisoned(model, *args):
        accumulate_policy(model, *args)
        model.lm_head.weight.grad[0, 0] = float("nan")

    monkeypatch.setattr(rl, "accumulate_policy", poisoned)
    with pytest.raises(UserError, match="grad_norm nan: no weights were changed"):
        policy_step(engine, optimizer, questions, config, 1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    dump = json.loads(
        next(tmp_path.glob("base/runs/chat_rl_step_000001_*")).read_text()
    )
    assert dump["gradients"] == ["lm_head.weight"]
    assert len(dump["batches"][0]["inputs"]) == 16  # the replies of four prompts


def run(model, steps, save=None, *, start=0, results=None, optimizer=None):
    engine = Engine(model, TOKENIZER)
    optimizer = optimizer or setup_optimizer(model)
    save = save or (lambda step, results: None)
    config = replace(CONFIG, save_every=2)
    options = dict(start=start, results=results, save=save)
    return train_rl(engine, optimizer, Vowels(), Vowels(), config, **options)


def test_resuming_equals_not_stopping(tmp_path):
    whole = tiny_model()
    expected = run(whole, 4)
    half = tiny_model()
    folder = tmp_path / "rl"
    optimizer = setup_optimizer(half)

    class Stop(Exception):
        pass

    def save(step, results):
        checkpoint.save(folder, step, half, optimizer, meta={"results": results})
        raise Stop

    with pytest.raises(Stop):
        run(half, 4, save, optimizer=optimizer)
    fresh = tiny_model(seed=9)
    optimizer = setup_optimizer(fresh)
    path = folder / "step_000002"
    checkpoint.load_training_state(path, fresh, optimizer)
    results = checkpoint.read_meta(path)["results"]
    resumed = run(fresh, 4, start=2, results=results, optimizer=optimizer)
    assert (
        resumed["after"] == expected["after"]
        and resumed["before"] == expected["before"]
    )
    for a, b in zip(whole.parameters(), fresh.parameters()):
        assert torch.equal(a, b)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def become_rank(rank, world, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NANOCHAT_BASE_DIR=folder,
    )  # fmt: skip
    torch.set_num_threads(1)
    compute_init("cpu")


def rank_main(rank, world, port, folder):
    become_rank(rank, world, port, folder)
    model = tiny_model()
    engine = Engine(model, TOKENIZER)
    optimizer = setup_optimizer(model)
    mine = [Questions(range(8), CONFIG).of_step(step) for step in range(2)]
    questions = Questions(Vowels(), CONFIG)
    records = [policy_step(engine, optimizer, questions, CONFIG, s) for s in range(2)]
    for record in records:
        record.pop("seconds")  # the clocks of two ranks may differ
    total = sum(p.double().sum().item() for p in model.parameters())
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"records": records, "total": total, "mine": mine}, file)
    compute_cleanup()


@pytest.mark.slow
def test_two_ranks_share_the_prompts_and_stay_equal(tmp_path):
    run_on_ranks(rank_main, (2, free_port(), str(tmp_path)), 2)
    a, b = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert a["records"] == b["records"] and a["total"] == b["total"]
    for step in range(2):
        together = a["mine"][step] + b["mine"][step]
        assert sorted(together) == sorted(Questions(range(8), CONFIG).of_step(step))


def roll_out_each(engine, task, indices, config, seed, *, num_samples=0) -> Rollout:
    "Sample for each prompt with a seed of its own, whatever rank it is on."
    parts = [
        roll_out(engine, task, [i], config, i, num_samples=num_samples) for i in indices
    ]
    return Rollout(
        ids=[row for part in parts for row in part.ids],
        mask=[row for part in parts for row in part.mask],
        rewards=torch.cat([part.rewards for part in parts]),
        ended=sum(part.ended for part in parts) / len(parts),
    )


def policy_weights() -> tuple[list[dict], dict]:
    "Take three steps in float64 with the same replies on any number of ranks."
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    config = GPTConfig(sequence_len=64, vocab_size=265, **shape)
    model = GPT(config, torch.float64)
    model.init_weights(0)
    model = model.double()
    engine = Engine(model, TOKENIZER)
    optimizer = setup_optimizer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.rl.roll_out", roll_out_each)
        torch.set_default_dtype(torch.float64)  # the engine's tables follow it
        try:
            questions = Questions(Vowels(), CONFIG)

            def take(step):
                return policy_step(engine, optimizer, questions, CONFIG, step)

            records = [take(step) for step in range(3)]
        finally:
            torch.set_default_dtype(torch.float32)
    return records, model.state_dict()


def rank_weights(rank, world, port, folder):
    become_rank(rank, world, port, folder)
    torch.save(policy_weights(), f"{folder}/{rank}.pt")
    compute_cleanup()


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    records, weights = policy_weights()
    assert all(0 < r["informative"] for r in records)  # there is something to learn
    run_on_ranks(rank_weights, (2, free_port(), str(tmp_path)), 2)
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"{rank}.pt")
        for mine, other in zip(records, found):
            for name in mine.keys() - {"seconds"}:
                assert other[name] == pytest.approx(mine[name], rel=1e-6), name
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5, msg=name)
    fresh = tiny_model().state_dict()["transformer.h.0.mlp.c_fc.weight"]
    assert (weights["transformer.h.0.mlp.c_fc.weight"] - fresh).abs().max() > 1e-2


@pytest.mark.parametrize("field", ["num_steps", "num_samples", "max_new_tokens"])
def test_impossible_settings_are_user_errors(field):
    with pytest.raises(UserError):
        replace(CONFIG, **{field: 0})
    with pytest.raises(UserError, match="nothing to compare"):
        RLConfig(num_samples=1)


def test_practice_without_a_signal_says_so(capsys, base_dir):
    results = {"before": {"accuracy": 0.0}, "after": {"accuracy": 0.0}, "seconds": 1.0}
    tell_practice(results | {"informative": 0.0}, RLConfig(), "d1")
    assert "nothing was learned" in capsys.readouterr().out
    tell_practice(results | {"informative": 0.5}, RLConfig(), "d1")
    tell_practice(results, RLConfig(), "d1")  # of a run before this was counted
    assert "nothing was learned" not in capsys.readouterr().out


def test_what_can_be_practiced_is_one_table():
    for task in PRACTICE:
        if task != "GSM8K":  # whose questions are on the hub
            assert len(practice_questions(task, "test")) > 100
    with pytest.raises(UserError, match="use one of Arithmetic, GSM8K, SpellingBee"):
        practice_questions("arithmetic", "train")
