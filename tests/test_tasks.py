"""Tasks: no leak between splits, graders that cannot be fooled, rows from anywhere."""

import json
import sys
import types
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataset import data_path
from nanochat.execution import room_problem
from nanochat.tasks import common, humaneval
from nanochat.tasks.arc import ARC
from nanochat.tasks.arithmetic import Arithmetic, in_test_split
from nanochat.tasks.common import (
    Task,
    TaskMixture,
    TaskSequence,
    final_text,
    last_number,
)
from nanochat.tasks.customjson import CustomJSON
from nanochat.tasks.facts import Capitals, Definitions, token_f1
from nanochat.tasks.gsm8k import GSM8K, hash_answer, split_calculations
from nanochat.tasks.humaneval import HumanEval, extract_code
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee

GRADED = {
    "arithmetic": lambda: Arithmetic("test", 200),
    "spoken arithmetic": lambda: Arithmetic("test", 200, tool=False),
    "spelling": lambda: SimpleSpelling("test"),
    "spelling bee": lambda: SpellingBee("test", 200),
    "capitals": lambda: Capitals("test"),
    "definitions": lambda: Definitions("test", stop=300),
    "gsm8k": lambda: GSM8K("test"),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DOWNLOAD", raising=False)


class Numbers(Task):
    def __init__(self, n, **view):
        super().__init__(**view)
        self.n = n

    def num_examples(self):
        return self.n

    def get_example(self, index):
        return index


def as_reply(message):
    "What decoding the reference answer gives."
    content = message["content"]
    if isinstance(content, str):
        return content
    wrap = {"python": "python", "python_output": "output"}
    return "".join(
        f"<|{wrap[p['type']]}_start|>{p['text']}<|{wrap[p['type']]}_end|>"
        if p["type"] in wrap
        else p["text"]
        for p in content
    )


# ---- views


@given(
    n=st.integers(0, 40),
    start=st.integers(0, 50),
    length=st.none() | st.integers(0, 50),
    step=st.integers(1, 7),
)
def test_a_view_is_a_slice(n, start, length, step):
    stop = None if length is None else start + length
    task = Numbers(n, start=start, stop=stop, step=step)
    assert [task[i] for i in range(len(task))] == list(range(n))[start:stop:step]


def test_a_view_says_where_it_ends():
    with pytest.raises(IndexError):
        Numbers(3)[3]
    with pytest.raises(UserError, match="step"):
        Numbers(3, step=0)


def test_mixture_holds_everything_once_and_sequence_keeps_order():
    tasks = [Numbers(5), Numbers(9, start=3)]
    everything = [*range(5), *range(3, 9)]
    mixture, again = TaskMixture(tasks), TaskMixture(tasks)
    assert sorted(mixture) == sorted(everything) and list(mixture) != everything
    assert list(mixture) == list(again) != list(TaskMixture(tasks, seed=7))
    assert list(TaskSequence(tasks)) == everything


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    quarters=st.lists(st.integers(0, 13), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
def test_epochs_count_each_example_as_often_as_asked(sizes, quarters, seed):
    epochs = [q / 4 for q in quarters[: len(sizes)]]
    tasks = [Numbers(100 * (t + 1), stop=n) for t, n in enumerate(sizes)]
    mixture = TaskMixture(tasks, seed, epochs)
    seen = Counter(mixture.index)
    for t, (n, times) in enumerate(zip(sizes, epochs)):
        counts = [seen[t, i] for i in range(n)]
        assert sum(counts) == round(times * n)
        assert max(counts, default=0) - min(counts, default=0) <= 1
    assert mixture.index == TaskMixture(tasks, seed, epochs).index


def test_epochs_that_make_no_sense_are_refused_and_whole_ones_are_copies():
    tasks = [Numbers(5), Numbers(9)]
    for epochs in ([1], [1, -0.5], [1, float("nan")]):
        with pytest.raises(UserError, match="one number, 0 or more"):
            TaskMixture(tasks, epochs=epochs)
    twice = TaskMixture([tasks[0], tasks[1], tasks[1]])
    assert list(TaskMixture(tasks, epochs=[1, 2])) == list(twice)
    halves = [TaskMixture([Numbers(40)], seed, [0.5]) for seed in (0, 1)]
    assert set(halves[0]) != set(halves[1])


def test_ranks_share_a_task_without_overlap():
    shares = [list(Numbers(23, start=r, step=4)) for r in range(4)]
    assert sorted(n for share in shares for n in share) == list(range(23))


# ---- no leak


def calculations(task):
    "What is asked for, with the smaller number first."
    found = set()
    for example in task:
        a, op, b = example["calculation"]
        found.add((min(a, b), op, max(a, b)))
    return found


@pytest.mark.slow
def test_arithmetic_splits_never_share_a_calculation():
    test = Arithmetic("test", 1000)
    assert len(calculations(test)) == 1000  # all different
    for seed in (0, 1, 2):
        train = Arithmetic("train", 5000, seed=seed)
        assert not calculations(train) & calculations(test)
        questions = {x["messages"][0]["content"] for x in train}
        assert not questions & {x["messages"][0]["content"] for x in test}


@given(a=st.integers(0, 999), b=st.integers(0, 999), op=st.sampled_from("+-*"))
def test_the_order_of_operands_does_not_move_a_calculation(a, b, op):
    assert in_test_split(a, b, op) == in_test_split(b, a, op)


def test_arithmetic_does_not_depend_on_how_many_are_asked_for():
    short, long = Arithmetic("test", 50), Arithmetic("test", 500)
    assert list(short) == [long[i] for i in range(50)]
    assert list(short) != list(Arithmetic("test", 50, seed=1))


def test_words_and_chats_of_the_splits_are_disjoint():
    words = [set(SimpleSpelling(split).words) for split in ("train", "test")]
    assert all(words) and not words[0] & words[1]
    for path in data_path("chat").glob("*_test.jsonl"):
        other = path.with_name(path.name.replace("_test", "_train"))

        def first(f):
            return {str(c["messages"][0]) for c in CustomJSON(f)}

        assert not first(path) & first(other), path.name


def test_no_benchmark_question_occurs_in_a_chat_for_training():
    trained = "\n".join(
        path.read_text(encoding="utf-8") for path in data_path("chat").glob("*_train*")
    )
    for task in (GSM8K("test"), MMLU(), ARC("ARC-Easy", "test")):
        for i in range(len(task)):
            question = json.dumps(task.row(i)["question"], ensure_ascii=False)
            assert len(question) < 40 or question.strip('"') not in trained


# ---- graders


@pytest.mark.parametrize("name", GRADED)
def test_the_reference_answer_is_right_and_others_are_wrong(name):
    task = GRADED[name]()
    for example in task:
        reply = as_reply(example["messages"][-1])
        assert task.evaluate(example, reply), reply
        assert task.evaluate(example, reply + "<|assistant_end|>")
        assert task.reward(example, reply) == 1.0
        for wrong in ("", "I do not know."):
            assert not task.evaluate(example, wrong)


@pytest.mark.parametrize("task", [Arithmetic("test", 50), SpellingBee("test", 50)])
def test_computing_is_not_answering(task):
    for example in task:
        n = example["answer"]
        silent = f"<|python_start|>1+1<|python_end|><|output_start|>{n}<|output_end|>"
        assert not task.evaluate(example, silent)
        assert not task.evaluate(example, f"<|output_start|>{n}")
        assert task.evaluate(example, f"{silent}It is {n}.")
        assert not task.evaluate(example, f"The answer is {n} or 100001.")


def test_a_copied_word_is_not_spelled():
    task = SimpleSpelling("test")
    word = task[0]["word"]
    assert not task.evaluate(task[0], word)
    assert not task.evaluate(task[0], " ".join(word[:-1]))
    assert task.evaluate(task[0], "-".join(word.upper()) + ".")


def test_capitals_ask_for_whole_words():
    pairs = [("What is the capital of Peru?", "The capital of Peru is Lima.")]
    pairs += [("Which country has the capital Lima?", "Lima is the capital of Peru.")]
    task = Capitals("test")
    verdicts = []
    for (question, answer), reply in zip(pairs, ("lima!", "in Peru")):
        roles = [("user", question), ("assistant", answer)]
        example = {"messages": [{"role": r, "content": c} for r, c in roles]}
        verdicts += [task.evaluate(example, t) for t in (reply, "Limassol, Peruvian")]
    assert verdicts == [True, False, True, False]


def test_copying_the_question_defines_nothing():
    task = Definitions("test", stop=500)
    passed = 0
    for example in task:
        word = example["messages"][-1]["content"].split()[2]
        empty = f"The word {word} means something."
        passed += task.evaluate(example, empty)
        assert not task.evaluate(example, example["messages"][0]["content"])
    assert passed / len(task) < 0.02


NUMBERS = {  # what stands in a reply -> the number that it is
    "5": "5",
    "-5": "-5",
    "+3": "3",
    "007": "7",
    "0": "0",
    "-0": "0",
    "5.": "5",
    ".5": "0.5",
    "-.50": "-0.5",
    "3.50": "3.5",
    "1,234": "1234",
    "1,000.50": "1000.5",
    "12,345,678": "12345678",
    "$5": "5",
    r"\$5": "5",
    "$ 5": "5",
    "-$5": "-5",
    "$-5": "-5",
    r"-\$1,250.00": "-1250",
    "€7": "7",
    "\N{MINUS SIGN}5": "-5",
    "\N{EN DASH}5": "-5",
    "\N{NON-BREAKING HYPHEN}$.5": "-0.5",
    "**42**": "42",
    "**42**.": "42",
    "`42`": "42",
    "$42$": "42",
    r"$\boxed{42}$": "42",
    r"\(42\)": "42",
    "(\N{MINUS SIGN}7)": "-7",
    "5 %": "5",
    "50%": "50",
    "1/2": "0.5",
    "-1/2": "-0.5",
    "8/4": "2",
    "1/3": "1/3",
    "2/6": "1/3",
    "1 1/2": "1.5",
    "5 apples": "5",
    "1.2.3": "1.2",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_however_it_is_written(text):
    assert hash_answer(f"thus\n#### {text}") == NUMBERS[text]
    assert hash_answer(f"####{text}\n") == NUMBERS[text]
    assert last_number(f"It is {text}") == NUMBERS[text]


def test_the_last_number_of_a_text():
    cases = {
        "12-7": "7",
        "12\N{MINUS SIGN}7": "7",
        "3\N{EN DASH}5": "5",
        "gpt-2": "2",
        "a - 5": "5",
        "f(3)-5": "5",
        "U.S.5": "5",
        "so...5": "5",
        "on 3/4/2024": "2024",
        "1, 2, 3": "3",
        "no number": None,
        "10/0": "0",
        "9" * 5000: "9" * 5000,
    }
    assert {text: last_number(text) for text in cases} == cases


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_equal_numbers_have_equal_spellings(value):
    plain = last_number(f"{value:f}")
    assert float(plain) == float(value)
    assert plain == last_number(f"{value:,f}") == last_number(f"is ${value:f}00.")
    assert plain == hash_answer(f"#### **{value:,f}**")


def test_gsm8k_takes_the_last_mark():
    assert hash_answer("#### 3\n#### 1,250.") == "1250"
    assert hash_answer("#### 3\n#### ") == "3" and hash_answer("##### 3") == "3"
    for nothing in ("5", "#### about 5", "#### ", "#### - 5"):  # a bullet or a minus?
        assert hash_answer(nothing) is None
    parts = split_calculations("a <<1+1=2>>2 b << open")
    assert "".join(p["text"] for p in parts) == "a 1+122 b << open"
    assert [p["type"] for p in parts] == ["text", "python", "python_output", "text"]


@given(st.text(max_size=60))
def test_final_text_never_fails_nor_keeps_a_tool_call(text):
    assert "<|python_start|>" not in final_text(text + "<|python_start|>" + text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_and_bounded(a, b):
    assert 0 <= token_f1(a, b) == token_f1(b, a) <= 1


@pytest.mark.slow
@pytest.mark.posix
def test_humaneval_grades_by_running():
    # The programs are known here, so a machine without a room can run them as well.
    task = HumanEval(unsafe=bool(room_problem()), stop=12)
    for example in task:
        good = example["messages"][1]["content"]
        assert task.evaluate(example, good)
        assert task.evaluate(example, good.replace("python", " Python3", 1))
        assert not task.evaluate(example, "```python\nimport sys; sys.exit(0)\n```")
        assert not task.evaluate(example, "```python\nimport os; os._exit(0)\n```")
        name = example["entry_point"]
        assert not task.evaluate(example, f"def {name}(*_): return None")


@pytest.mark.parametrize("unsafe", [False, True])
def test_humaneval_says_whether_the_room_is_left_away(monkeypatch, unsafe):
    asked = []

    def execute_code(program, timeout, unsafe):
        asked.append(unsafe)
        return types.SimpleNamespace(success=True)

    monkeypatch.setattr(humaneval, "execute_code", execute_code)
    task = HumanEval(unsafe=unsafe)
    assert task.evaluate(task[0], "x") and asked == [unsafe]
    assert not HumanEval().unsafe


CODE = 'def f(x):\n    """A fence:\n    ```\n    f(1)\n    ```\n    """\n    return x'
LANGUAGES = [
    "",
    "python",
    "py",
    "python3",
    "py3",
    "Python",
    "PYTHON",
    "python3.11",
    " python",
    "python title='a.py'",
    "{python}",
    "{.python .numberLines}",
    "python:a.py",
]
REPLIES = {
    "tildes": f"~~~python\n{CODE}\n~~~",
    "longer fence": f"````python\n{CODE}\n````",
    "text around": f"Sure!\n\n```python\n{CODE}\n```\nDone. ```x``` is code.",
    "no closing fence": f"```python\n{CODE}",
    "closing fence at the end of a line": f"```python\n{CODE}```\nGood luck.",
    "Windows line ends": f"```python\n{CODE}\n```".replace("\n", "\r\n"),
    "no fence": CODE,
    "inline code first": f"Use ```f```:\n```python\n{CODE}\n```",
    "a shell first": f"```bash\npip install x\n```\n```python\n{CODE}\n```",
    "output first": f"```\n1 2 3\n```\n```py\n{CODE}\n```",
    "an example behind": f"```python\n{CODE}\n```\n```python\nprint(f(2) + g())\n```",
    "a helper before": f"```python\nf_ = 3\n```\n```python\n{CODE}\n```",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_is_found_behind_every_spelling_of_python(language):
    assert extract_code(f"Here:\n```{language}\n{CODE}\n```\n", "f") == CODE


@pytest.mark.parametrize("reply", REPLIES)
def test_code_is_found_in_the_replies_of_models(reply):
    assert extract_code(REPLIES[reply], "f") == CODE


def test_code_below_a_list_item_loses_its_indentation():
    for indent in ("   ", "     ", "\t"):
        block = "\n".join(indent + line for line in f"```py\n{CODE}\n```".split("\n"))
        assert extract_code(f"1. First:\n\n{block}\n2. Then rest.", "f") == CODE


@given(st.text("`~ \n\tpyx", max_size=80))
def test_no_reply_breaks_the_search_for_code(text):
    assert isinstance(extract_code(text, "f"), str)


@pytest.mark.parametrize(
    "task",
    [lambda: ARC("ARC-Easy", "test"), lambda: ARC("ARC-Challenge", "test"), MMLU],
)
def test_choices_are_letters_with_one_right(task):
    task = task()
    for example in task:
        prompt, answer = (m["content"] for m in example["messages"])
        assert answer in example["letters"] and f"={answer}\n" in prompt
        assert task.evaluate(example, answer)
    with pytest.raises(UserError, match="not one of the letters"):
        task.evaluate(task[0], "maybe")


def test_mmlu_is_shuffled():
    task = MMLU()
    assert len({task.row(i)["subject"] for i in range(50)}) > 20


# ---- rows


def write_hub(folder, rows, split="train", parts=2):
    folder.mkdir(parents=True)
    for i in range(parts):
        table = pa.Table.from_pylist(rows[i::parts])
        pq.write_table(table, folder / f"{split}-{i:05d}-of-{parts:05d}.parquet")


def test_full_files_win_over_the_sample(tmp_path):
    row = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}
    assert len(GSM8K("test")) > 3
    write_hub(tmp_path / "base/hub/openai/gsm8k/main", [row] * 3, "test")
    task = GSM8K("test")
    assert len(task) == 3 and task.evaluate(task[2], "#### 2.0")


def test_auxiliary_train_of_mmlu_is_unwrapped(tmp_path):
    row = {"question": "?", "choices": list("wxyz"), "answer": 2, "subject": ""}
    folder = tmp_path / "base/hub/cais/mmlu/auxiliary_train"
    write_hub(folder, [{"train": row}] * 2)
    assert MMLU("auxiliary_train", "train")[1]["messages"][1]["content"] == "C"


def test_smoltalk_keeps_its_system_message(tmp_path):
    roles = ["system", "user", "assistant"]
    messages = [{"content": role, "role": role} for role in roles]
    folder = tmp_path / "base/hub/HuggingFaceTB/smol-smoltalk/data"
    write_hub(folder, [{"messages": messages, "source": "x"}] * 4)
    assert SmolTalk("train")[3]["messages"] == messages


def test_download_goes_through_the_hub_package(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo, repo_type, allow_patterns, local_dir):
        asked.update(repo=repo, patterns=allow_patterns)
        write_hub(local_dir / "main", [{"question": "q", "answer": "#### 1"}], parts=1)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(GSM8K("train")) == 1
    assert asked == {"repo": "openai/gsm8k", "patterns": "main/train-*.parquet"}


def test_what_is_nowhere_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(UserError, match=r"nanochat\[data\]"):
        GSM8K("train")


def test_a_damaged_file_is_named(tmp_path):
    folder = tmp_path / "base/hub/openai/gsm8k/main"
    folder.mkdir(parents=True)
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="test-00000-of-00001"):
        GSM8K("test")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ('{"messages": 3}', "list of messages"),
        ('[{"role": "user", "content": "a"}]', "end with 'assistant'"),
        (
            '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]',
            "message 0 has role 'assistant'",
        ),
        ('[["user", "a"]]', "message 0 needs the keys 'role' and 'content'"),
    ],
)
def test_bad_conversations_are_named_by_line(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps(good) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=f"line 3.*{message}"):
        CustomJSON(path)
    path.write_text(json.dumps({"messages": good}) + "\n")
    assert CustomJSON(path)[0]["messages"] == good


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_json_lines_end_at_line_feeds_only(tmp_path, separator):
    path = tmp_path / "mine.jsonl"
    turns = [("user", f"a{separator}b"), ("assistant", f"c{separator}")]
    good = [{"role": role, "content": text} for role, text in turns]
    line = json.dumps(good, ensure_ascii=False)
    assert separator in line
    path.write_text(f"{line}\r\n  \n{line}\n{line}", encoding="utf-8", newline="")
    task = CustomJSON(path)
    assert [task[i]["messages"] for i in range(len(task))] == [good] * 3


def test_unknown_names_are_user_errors(tmp_path):
    for make in (
        lambda: Arithmetic("dev"),
        lambda: SimpleSpelling("dev"),
        lambda: ARC("ARC-Hard", "test"),
        lambda: Capitals("dev"),
        lambda: CustomJSON(tmp_path / "nothing.jsonl"),
        lambda: common.render_mc("?", "AB", ["one"]),
    ):
        with pytest.raises(UserError):
            make()
