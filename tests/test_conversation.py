"""One check of conversations: whatever door they come through, the same are refused."""

import json

import pytest
from chat_model import tiny_engine, tiny_tokenizer
from fastapi.testclient import TestClient

from nanochat.common import UserError
from nanochat.conversation import (
    Coder,
    check_conversation,
    merge_system,
    render,
    render_prompt,
)
from nanochat.server import Service, create_app, fit_conversation
from nanochat.tasks.customjson import CustomJSON
from nanochat.tokenizer import RustBPETokenizer

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}


def say(role: object, content: object) -> dict:
    return {"role": role, "content": content}


def part(**fields: object) -> dict:
    return say("assistant", [{"type": "text", "text": "x"}, fields])


FAULTY: dict[str, tuple[list, str]] = {
    "nobody": ([], "at least one"),
    "no message": (["hello"], "message 0 needs the keys"),
    "no message later": ([USER, None], "message 1 needs the keys"),
    "no content": ([USER, {"role": "assistant"}], "message 1 needs the keys"),
    "answer first": ([ANSWER, USER], "message 0 has role 'assistant'"),
    "two questions": ([USER, USER], "message 1 has role 'user', expected 'assistant'"),
    "two answers": ([USER, ANSWER, ANSWER], "message 2 has role 'assistant'"),
    "counted with the system": ([SYSTEM, USER, USER], "message 2 has role 'user'"),
    "unknown role": ([USER, ANSWER, say("tool", "x")], "message 2 has role 'tool'"),
    "role of another type": ([say(["user"], "x")], "message 0 has role"),
    "system alone": ([SYSTEM], "followed by a user"),
    "two systems": ([SYSTEM, SYSTEM, USER], "message 1 has role 'system'"),
    "system late": ([USER, ANSWER, SYSTEM], "message 2 has role 'system'"),
    "system of parts": ([say("system", []), USER, ANSWER], "message 0: content must"),
    "user of parts": ([say("user", [{"type": "text", "text": "x"}]), ANSWER], "only"),
    "number": (
        [USER, say("assistant", 3)],
        "message 1: content .* list of parts, got 3",
    ),
    "null": ([USER, say("assistant", None)], "message 1: content"),
    "part of no kind": (
        [USER, part(type="image", text="x")],
        "message 1: a part needs",
    ),
    "kind of another type": (
        [USER, part(type=["text"], text="x")],
        "message 1: a part",
    ),
    "part without text": ([USER, part(type="python")], "message 1: a part needs"),
    "part is a string": ([USER, say("assistant", ["x"])], "message 1: a part needs"),
    "fault in a later turn": ([USER, ANSWER, USER, say("assistant", 3)], "message 3:"),
}


@pytest.fixture(scope="module")
def client():
    service = Service(tiny_engine(), max_tokens=4)
    return TestClient(create_app(service), base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", FAULTY)
def test_every_door_refuses_the_same(name, tmp_path, client):
    messages, says = FAULTY[name]
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=says):
        check_conversation({"messages": messages})
    with pytest.raises(UserError, match=says):
        tokenizer.render_conversation({"messages": messages})
    with pytest.raises(UserError, match=says):
        tokenizer.render_for_completion({"messages": messages})
    with pytest.raises(UserError, match=says):
        fit_conversation(tokenizer, messages, 1000)

    path = tmp_path / "mine.jsonl"
    path.write_text("\n" + json.dumps({"messages": messages}) + "\n", "utf-8")
    with pytest.raises(UserError, match=f"mine.jsonl, line 2: .*{says}"):
        CustomJSON(path)

    # The framework names the place in its own way where a message is no object at all.
    answer = client.post("/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    if all(isinstance(message, dict) for message in messages) and messages:
        assert answer.json()["detail"] in refusal(messages)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_complaint_is_short_however_deep_the_fault():
    for fault in (nested(5000), {"x": nested(5000)}, "x" * 100_000, [3] * 100_000):
        for messages in (
            [say("user", fault)] if not isinstance(fault, str) else [fault],
            [USER, say("assistant", [fault])],
            [say(fault, "x")],
            [{"role": fault}],
        ):
            assert len(refusal(messages)) < 400


def refusal(messages: list) -> str:
    with pytest.raises(UserError) as error:
        check_conversation({"messages": messages})
    return str(error.value)


@pytest.mark.parametrize("chat", [None, "hi", 3, [USER], {}, {"messages": (USER,)}])
def test_what_is_no_conversation(chat):
    with pytest.raises(UserError, match="list of messages under 'messages'"):
        check_conversation(chat)


def test_who_has_the_last_word():
    for messages, last, other in (
        ([USER], "user", "assistant"),
        ([SYSTEM, USER, ANSWER], "assistant", "user"),
    ):
        chat = {"messages": messages}
        assert check_conversation(chat) is messages
        assert check_conversation(chat, last) is messages
        place = f"message {len(messages) - 1}, the last, has role '{last}'"
        with pytest.raises(UserError, match=f"{place}: .* end with '{other}'"):
            check_conversation(chat, last=other)


def test_any_tokenizer_with_three_methods_will_do():
    class Letters:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def encode_special(self, name: str) -> int:
            return -len(name)

        def get_bos_token_id(self) -> int:
            return 0

    coder: Coder = Letters()
    user = [-len("<|user_start|>"), *b"S\n\nU", -len("<|user_end|>")]
    ids = [0, *user, -len("<|assistant_start|>")]
    assert render_prompt(coder, [SYSTEM, USER]) == ids
    full, mask = render(coder, [SYSTEM, USER, ANSWER])
    assert full == [*ids, *b"A", -len("<|assistant_end|>")]
    assert mask == [0] * len(ids) + [1, 1]


def test_merging_changes_nothing_that_was_given():
    messages = [SYSTEM, USER, ANSWER]
    assert merge_system(messages) == [say("user", "S\n\nU"), ANSWER]
    assert messages == [say("system", "S"), say("user", "U"), say("assistant", "A")]
    assert merge_system(messages[1:]) == messages[1:]


def test_the_methods_and_the_functions_agree():
    tokenizer = RustBPETokenizer([bytes([b]) for b in range(256)])
    chat = {"messages": [SYSTEM, USER, ANSWER]}
    ids, mask = render(tokenizer, chat["messages"])
    assert tokenizer.render_conversation(chat) == (ids, mask)
    assert tokenizer.render_conversation(chat, max_tokens=3) == (ids[:3], mask[:3])
    prompt = render_prompt(tokenizer, chat["messages"][:2])
    assert tokenizer.render_for_completion(chat) == prompt == ids[: len(prompt)]
