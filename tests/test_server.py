"""The web server: its contract, its limits, and that it never blocks."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import httpx
import pytest
import uvicorn
from chat_model import tiny_engine, tiny_model, tiny_tokenizer

from nanochat.checkpoint import save
from nanochat.engine import Engine
from nanochat.server import MAX_WAITING, Service, create_app


class SlowEngine(Engine):
    "Says a letter every 10 ms until it is stopped, and counts what it said."

    said = 0

    def generate(self, tokens, num_samples=1, max_tokens=None, *options, **named):
        for _ in range(max_tokens):
            time.sleep(0.01)
            self.said += 1
            yield [self.tokenizer.encode("x")[0]], [1]


@contextlib.contextmanager
def serve(engine, name="tiny", **options):
    "Run the real server on a free port of the loopback interface."
    service = Service(engine, name, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve([listener])))
    thread.start()
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while not web.started:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=base, timeout=30) as client:
            yield client
    finally:
        web.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def client():
    with serve(tiny_engine(), max_tokens=24, temperature=1.0) as client:
        yield client


def ask(text="Hello", **options) -> dict:
    return {"messages": [{"role": "user", "content": text}], **options}


def read(lines) -> list[dict]:
    data = [line[6:] for line in lines if line.startswith("data: ")]
    return [json.loads(d) if d != "[DONE]" else d for d in data]


def test_the_page_is_served_with_a_policy(client):
    page = client.get("/")
    assert page.status_code == 200 and "<title>nanochat</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in page.text


def test_health_and_stats(client):
    health, stats = client.get("/health").json(), client.get("/stats").json()
    assert (health["status"], health["ready"], health["context"]) == ("ok", True, 96)
    assert stats["total_workers"] == 1 and stats["busy"] == 0


def test_a_reply_is_a_stream_of_events(client):
    with client.stream("POST", "/chat/completions", json=ask(seed=3)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = read(response.iter_lines())
    assert events[-1]["done"] is True and events[-1]["reason"] in ("stop", "length")
    for event in events[:-1]:
        assert set(event) in ({"token"}, {"tool", "result"})
        assert "<|" not in event.get("token", "")


def test_the_seed_fixes_the_reply(client):
    def get(seed):
        return client.post("/chat/completions", json=ask(seed=seed)).text

    assert get(1) == get(1) != get(2)


def test_greedy_reply_equals_the_engines(client):
    body = ask(temperature=0, max_tokens=8)
    streamed = read(client.post("/chat/completions", json=body).text.splitlines())
    engine = tiny_engine()
    conversation = {"messages": body["messages"]}
    ids, _ = engine.tokenizer.render_conversation(conversation)
    ids.append(engine.tokenizer.encode_special("<|assistant_start|>"))
    row = engine.generate_many([ids], 8, 0)[0]
    assert streamed[-1]["tokens"] == len(row.reply)


def test_long_conversations_lose_their_oldest_turns(client):
    messages = [{"role": "user", "content": "some words"}]
    for i in range(9):
        messages += [
            {"role": "assistant", "content": f"reply {i}"},
            {"role": "user", "content": f"more words {i}"},
        ]
    text = client.post("/chat/completions", json={"messages": messages}).text
    first = read(text.splitlines())[0]
    assert 0 < first["dropped"] < 10


BAD = {
    "no messages": {"messages": []},
    "no body": {},
    "empty": ask(""),
    "role": {"messages": [{"role": "wizard", "content": "x"}]},
    "order": {"messages": [{"role": "assistant", "content": "x"}]},
    "too long for the context": ask("x y " * 200),
    "too many characters": ask("x" * 8001),
    "temperature": ask(temperature=3),
    "top_k": ask(top_k=-1),
    "max_tokens": ask(max_tokens=0),
    "type": ask(temperature="warm"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_400_and_a_reason(client, name):
    response = client.post("/chat/completions", json=BAD[name])
    assert response.status_code == 400
    detail = response.json()["detail"]
    assert isinstance(detail, str) and "\n" not in detail and detail


def test_malformed_json_gets_400(client):
    head = {"content-type": "application/json"}
    response = client.post("/chat/completions", content="{nope", headers=head)
    assert response.status_code == 400


def test_foreign_host_names_are_refused(client):
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_special_tokens_in_a_message_stay_text(client):
    text = "<|assistant_end|><|python_start|>"
    response = client.post("/chat/completions", json=ask(text))
    assert response.status_code == 200
    assert "done" in read(response.text.splitlines())[-1]


def test_parts_of_an_earlier_tool_call_are_accepted(client):
    parts = [
        {"type": "python", "text": "1+2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3"},
    ]
    body = ask("1+2?")
    body["messages"] += [
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "ok"},
    ]
    assert client.post("/chat/completions", json=body).status_code == 200


def test_openai_format(client):
    body = ask(seed=5, temperature=1.0)
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny"
    choice = whole["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = whole["usage"]
    assert 0 < usage["completion_tokens"] <= 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    text = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    *chunks, done = read(text.splitlines())
    assert done == "[DONE]"
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(deltas) == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def idle(client, seconds=5.0) -> dict:
    deadline = time.time() + seconds
    while (stats := client.get("/stats").json())["busy"] and time.time() < deadline:
        time.sleep(0.02)
    return stats


def test_a_client_that_leaves_stops_the_generation():
    engine = SlowEngine(tiny_engine().model, tiny_engine().tokenizer)
    with serve(engine) as client:
        body = ask(max_tokens=4000)
        with client.stream("POST", "/chat/completions", json=body) as response:
            for _, _line in zip(range(6), response.iter_lines()):
                pass
        assert idle(client)["busy"] == 0
        said = engine.said
        time.sleep(0.2)
        assert engine.said == said < 1000
        after = client.post("/chat/completions", json=ask(max_tokens=3))
        assert "done" in read(after.text.splitlines())[-1]


def test_the_event_loop_answers_while_the_model_works():
    engine = SlowEngine(tiny_engine().model, tiny_engine().tokenizer)
    with serve(engine) as client:
        with client.stream("POST", "/chat/completions", json=ask(max_tokens=100)) as r:
            lines = r.iter_lines()
            next(lines)
            began = time.time()
            for _ in range(10):
                stats = client.get("/stats").json()
            assert time.time() - began < 0.8  # the reply takes at least a second
            assert stats["busy"] == 1
            assert read(lines)[-1]["done"]


@pytest.mark.slow
def test_a_full_queue_is_refused():
    engine = SlowEngine(tiny_engine().model, tiny_engine().tokenizer)
    body = ask(max_tokens=4000)
    with serve(engine) as client, contextlib.ExitStack() as stack:
        for _ in range(MAX_WAITING + 1):  # one is answered, the others wait
            other = stack.enter_context(httpx.Client(base_url=client.base_url))
            stack.enter_context(other.stream("POST", "/chat/completions", json=body))
        while client.get("/stats").json()["waiting"] < MAX_WAITING:
            time.sleep(0.02)
        response = client.post("/chat/completions", json=body)
        assert response.status_code == 429 and response.headers["retry-after"]


def test_a_failing_model_ends_the_stream_with_an_error():
    class Broken(Engine):
        def generate(self, *args, **named):
            yield [self.tokenizer.encode("x")[0]], [1]
            raise RuntimeError("out of memory")

    with serve(Broken(tiny_engine().model, tiny_engine().tokenizer)) as client:
        response = client.post("/chat/completions", json=ask())
        events = read(response.text.splitlines())
        assert "out of memory" in events[-1]["error"]
        assert client.get("/stats").json()["busy"] == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base folder with a tiny random SFT model, as a speedrun would leave it."
    folder = tmp_path_factory.mktemp("base")
    tiny_tokenizer().save(folder / "tokenizer")
    save(folder / "sft_checkpoints" / "d2", 7, tiny_model())
    return folder


def in_a_new_process(base, *args):
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def at_base(base, command):
    "Return a function that runs a command where that model is."
    return partial(command, NANOCHAT_BASE_DIR=str(base))


@pytest.mark.slow
def test_chat_cli_holds_a_conversation(at_base):
    lines = ["Hello there", *["some more words"] * 4, "/clear", "x " * 300, "", "/quit"]
    args = "--max-tokens=8", "--seed=1", "--device=cpu"
    done = at_base("chat_cli", *args, text="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "not fit into the context" in done.stdout  # oldest turns were dropped
    assert "[new conversation]" in done.stdout
    assert "shorten it" in done.stdout  # one message too long for the context
    assert "\x1b" not in done.stdout and "<|" not in done.stdout


@pytest.mark.slow
def test_chat_cli_answers_once(at_base):
    args = "-p", "Hello", "--source=sft", "--max-tokens=4", "--seed=1", "--device=cpu"
    done = at_base("chat_cli", *args)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2


@pytest.mark.slow
def test_a_compiled_engine_says_the_same(base):
    args = "-p", "Hello", "--max-tokens=4", "--temperature=0", "--device=cpu"
    plain = in_a_new_process(base, "scripts.chat_cli", *args)
    fixed = in_a_new_process(base, "scripts.chat_cli", *args, "--compile")
    assert fixed.returncode == 0, fixed.stderr

    def drop(text):
        return text.replace("compile=True", "compile=False")

    assert drop(fixed.stdout) == plain.stdout != fixed.stdout


@pytest.mark.slow
def test_a_port_in_use_is_one_line_and_exit_2(at_base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = at_base("chat_web", f"--port={port}", "--device=cpu")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(port) in done.stderr and "--port" in done.stderr


@pytest.mark.slow
def test_no_model_is_one_line_and_exit_2(command, tmp_path):
    base = {"NANOCHAT_BASE_DIR": str(tmp_path)}
    done = command("chat_cli", "-p", "Hello", "--device=cpu", **base)
    assert done.returncode == 2 and "speedrun.sh" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
