"""In a real browser: the chat page (send, stream, stop, themes, narrow screens, errors)
and the widgets of chapters 2 to 7."""

import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import regex
import torch
from chat_model import tiny_engine, tiny_model, tiny_tokenizer
from test_server import SlowEngine, serve

from nanochat.accounting import (
    BLOCK,
    flops_per_token,
    kv_cache_bytes,
    parameter_counts,
    training_memory,
)
from nanochat.adamw import adamw_update
from nanochat.attention import apply_rotary, precompute_rotary
from nanochat.bpe import SPLIT_PATTERN
from nanochat.checkpoint import save
from nanochat.dataloader import take_row
from nanochat.engine import Engine
from nanochat.functional import sample_next
from nanochat.gpt import ARCHITECTURES, GPTConfig
from nanochat.head import CHUNK
from nanochat.plan import model_config
from nanochat.server import load_chat_model

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: install it with `apt-get install chromium`",
    ),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page that fails the test if the browser reports an error or asks another host."
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    page = context.new_page()
    page.problems = []
    page.hosts = set()
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]))
    page.set_default_timeout(15_000)
    yield page
    assert not page.problems
    assert all(host.startswith("127.0.0.1:") or not host for host in page.hosts)
    context.close()


def picture(page, name: str) -> None:
    "Keep a picture where NANOCHAT_SHOTS says so."
    if folder := os.environ.get("NANOCHAT_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def send(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


class Talker(Engine):
    "Says a fixed reply with a tool call, one token every few milliseconds."

    def generate(self, tokens, *options, **named):
        special, encode = self.tokenizer.encode_special, self.tokenizer.encode
        words = (
            "**Köln** → ½ is `code` & <b>not bold</b> <img src=x onerror=alert(1)>. So "
        )
        ids = [
            *encode(words),
            special("<|python_start|>"),
            *encode("12*3"),
            special("<|python_end|>"),
            special("<|output_start|>"),
            *encode("36"),
            special("<|output_end|>"),
            *encode("\n\n```\nx = 1\nprint(x)\n```\nThat is all."),
            special("<|assistant_end|>"),
        ]
        for token in ids:
            time.sleep(0.004)
            yield [token], [1]


def test_a_trained_model_answers_in_the_browser(page, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    save(tmp_path / "sft_checkpoints" / "d2", 7, tiny_model())
    engine, name = load_chat_model(device="cpu")
    assert name == "nanochat-d2-sft"
    with serve(engine, name, max_tokens=20) as client:
        page.goto(str(client.base_url))
        sync_api.expect(page.locator("#model")).to_contain_text("nanochat-d2-sft")
        send(page, "Hello")
        sync_api.expect(page.locator("#status")).to_contain_text("complete")
        reply = page.locator("article.assistant .text").inner_text()
        assert reply.strip()
        assert "<|" not in reply


def test_text_is_shown_not_run(page):
    with serve(Talker(tiny_engine().model, tiny_engine().tokenizer)) as client:
        page.goto(str(client.base_url))
        send(page, "What is 12 * 3? <script>alert(1)</script>")
        reply = page.locator("article.assistant .text")
        sync_api.expect(reply).to_contain_text("That is all.")
        sync_api.expect(page.locator("#status")).to_contain_text("complete")
        assert "<b>not bold</b> <img src=x onerror=alert(1)>" in reply.inner_text()
        assert reply.locator("strong").inner_text() == "Köln"
        assert reply.locator(".tool").inner_text().split() == [
            "calculator",
            "12*3",
            "=",
            "36",
        ]
        assert page.locator("#log img, #log script").count() == 0
        question = page.locator("article.user .text").inner_text()
        assert question == "What is 12 * 3? <script>alert(1)</script>"
        picture(page, "light")
        page.get_by_role("button", name="Switch between").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        picture(page, "dark")
        page.set_viewport_size({"width": 360, "height": 640})
        wide = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(wide)
        picture(page, "narrow")
        page.reload()
        sync_api.expect(page.locator("article.assistant .tool")).to_be_visible()
        page.get_by_role("button", name="New chat").click()
        assert page.locator("article").count() == 0
        picture(page, "empty")


def test_stop_and_new_chat(page):
    engine = SlowEngine(tiny_engine().model, tiny_engine().tokenizer)
    with serve(engine, max_tokens=4000) as client:
        page.goto(str(client.base_url))
        send(page, "Go on for ever")
        reply = page.locator("article.assistant .text")
        sync_api.expect(reply).to_contain_text("xxx")
        page.get_by_role("button", name="Stop").click()
        sync_api.expect(page.locator(".note")).to_contain_text("Stopped")
        sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible()
        deadline = time.time() + 5
        while client.get("/stats").json()["busy"] and time.time() < deadline:
            time.sleep(0.02)
        assert client.get("/stats").json()["busy"] == 0
        page.get_by_role("button", name="Again").click()
        sync_api.expect(reply).to_contain_text("xx")
        page.keyboard.press("Escape")
        sync_api.expect(page.locator(".note")).to_contain_text("Stopped")
        page.get_by_role("button", name="Edit").click()
        assert page.get_by_label("Message").input_value() == "Go on for ever"


def test_dropped_turns_are_reported(page):
    with serve(tiny_engine(), max_tokens=20) as client:
        page.goto(str(client.base_url))
        for _ in range(4):
            send(page, "some words that fill the context of the model")
            sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible()
            sync_api.expect(page.locator("#status")).to_contain_text("complete")
            page.evaluate("document.getElementById('status').textContent = ''")
        sync_api.expect(page.locator(".note", has_text="left out")).to_be_visible()


def test_errors_are_shown(page):
    with serve(tiny_engine()) as client:
        page.goto(str(client.base_url))
        send(page, "long message " * 60)
        sync_api.expect(page.get_by_role("alert")).to_contain_text("shorten")
        picture(page, "error")
    send(page, "Is anybody there?")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    sync_api.expect(page.get_by_role("button", name="Try again")).to_be_visible()


WIDGETS = Path(__file__).resolve().parents[1] / "book" / "widgets"
SIGNS = str.maketrans({" ": "␣", "\t": "→", "\n": "↵"})
CONTRACTION = "'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
RULES = [CONTRACTION, *SPLIT_PATTERN.split(")|", 1)[1].split("|")]
RULES = [rule.replace("?+", "?").replace("++", "+") for rule in RULES]
TEXTS = [
    "She'll pay\t7 or 1234 $ (maybe)...\n\n  \n    if x:",
    "naïve 🙂 안녕, DON'T  stop — 3½ e\u0301",
    "   ",
    "",
]


def show_widget(page, name: str, data: dict) -> None:
    html = (WIDGETS / name).read_text("utf-8")
    page.set_content(html.replace("DATA", json.dumps(data)))


@pytest.mark.parametrize("text", TEXTS)
def test_split_widget_cuts_as_python_does(page, text):
    show_widget(page, "split.html", {"text": "", "rules": [[r, r] for r in RULES]})
    page.locator("textarea").fill(text)
    shown = page.locator(".chunks code").all_text_contents()
    assert shown == [c.translate(SIGNS) for c in regex.findall(SPLIT_PATTERN, text)]


def test_split_widget_strikes_out_what_nothing_matches(page):
    rules = [[rule, rule] for rule in RULES]
    show_widget(page, "split.html", {"text": "go 12!", "rules": rules})
    page.locator("input").nth(2).uncheck()
    lost = page.locator(".chunks code[title='not matched']")
    assert lost.all_text_contents() == ["12"]


@pytest.mark.parametrize("text", TEXTS)
def test_merges_widget_ends_with_the_tokens(page, text):
    tokenizer = tiny_tokenizer()
    tokens = [token.decode("latin-1") for token in tokenizer.ranks]
    data = {"text": "", "pattern": "|".join(RULES), "tokens": tokens}
    show_widget(page, "merges.html", data)
    page.locator("input[type=text]").fill(text)
    text = page.locator("input[type=text]").input_value()  # has no line ends
    assert page.locator(".tokens code").count() == len(text.encode())
    slider = page.locator("input[type=range]")
    slider.fill(slider.get_attribute("max"))
    shown = page.locator(".tokens code").all_text_contents()
    expected = [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]
    assert len(shown) == len(expected)
    whole = [(a, b) for a, b in zip(shown, expected) if "\ufffd" not in b]
    assert all(a == b.translate(SIGNS) for a, b in whole)


HEATS = ["0", "1e-7", "1e-5", "0.02", "0.37", "1", "2.5", "40", "100000"]
LOGITS = [2.0, 1.0, 0.0, -1.0, 0.999, -7.5]


def probabilities(logits: list, temperature: float, top_k: int) -> torch.Tensor:
    "What `sample_next` draws from, in float64."
    z = torch.tensor(logits, dtype=torch.float64)
    if temperature < 1e-6:
        return torch.eye(len(z), dtype=z.dtype)[z.argmax()]
    kept = torch.full_like(z, -math.inf)
    best = z.topk(top_k).indices
    kept[best] = (z[best] - z.max()) / temperature
    return kept.softmax(-1)


def check_temperature(page, logits: list, temperature: float, top_k: int) -> None:
    "Compare the bars and the two numbers of the widget with Python's."
    bars = page.locator(".bar").evaluate_all(
        "bars => bars.map(b => [+b.dataset.p, parseFloat(b.style.width) / 100])"
    )
    shown, width = torch.tensor(bars, dtype=torch.float64).T
    p = probabilities(logits, temperature, top_k)
    torch.testing.assert_close(shown, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(width, p, rtol=0, atol=1e-5)
    bits = torch.special.entr(p).sum().item() / math.log(2)
    assert float(page.locator(".bits").inner_text()) == pytest.approx(bits, abs=6e-4)
    choices = float(page.locator(".choices").inner_text())
    assert choices == pytest.approx(2**bits, abs=6e-3)


def show_temperature(page) -> None:
    names = [*"abcdef"]
    examples = [{"name": "one", "tokens": names, "logits": LOGITS}]
    examples += [{"name": "two", "tokens": names[:2], "logits": [0.0, 0.0]}]
    show_widget(page, "temperature.html", {"examples": examples})


@pytest.mark.parametrize("temperature", HEATS)
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_temperature_widget_computes_what_python_does(page, temperature, top_k):
    show_temperature(page)
    page.get_by_label("Tokens kept, top-k").fill(str(top_k))
    page.get_by_label("Temperature", exact=True).fill(temperature)
    check_temperature(page, LOGITS, float(temperature), top_k)


def test_temperature_widget_draws_from_what_sample_next_draws():
    z = torch.tensor(LOGITS)
    dice = torch.Generator().manual_seed(0)
    for temperature, top_k in [(0.37, 6), (2.5, 3)]:
        drawn = sample_next(z.expand(40_000, 6), temperature, top_k, dice).flatten()
        share = torch.bincount(drawn, minlength=6).double() / len(drawn)
        p = probabilities(LOGITS, temperature, top_k)
        torch.testing.assert_close(share, p, rtol=0, atol=0.015)


def test_temperature_widget_by_keyboard(page):
    show_temperature(page)
    page.get_by_label("Logit of b").focus()
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    moved = [*LOGITS]
    moved[1] = 2.5
    check_temperature(page, moved, 1.0, 6)
    page.get_by_label("Temperature, logarithmic").focus()
    page.keyboard.press("End")
    check_temperature(page, moved, 100.0, 6)
    page.keyboard.press("Home")
    check_temperature(page, moved, 0.01, 6)
    page.get_by_role("button", name="Reset").press("Enter")
    check_temperature(page, LOGITS, 1.0, 6)
    page.get_by_label("Logits to start from").select_option("two")
    check_temperature(page, [0.0, 0.0], 1.0, 2)
    page.get_by_label("Temperature", exact=True).fill("0")
    check_temperature(page, [0.0, 0.0], 0.0, 2)


def test_temperature_widget_refuses_what_sample_next_refuses(page):
    show_temperature(page)
    field = page.get_by_label("Temperature", exact=True)
    for wrong in ("-1", ""):
        field.fill(wrong)
        sync_api.expect(page.locator(".sum")).to_contain_text("0 (greedy) or more")
        assert field.get_attribute("aria-invalid") == "true"
    field.fill("1")
    check_temperature(page, LOGITS, 1.0, 6)


def check_rope(page, q: torch.Tensor, k: torch.Tensor, m: int, n: int) -> None:
    "Compare the scores of the wheels with those of rotated vectors."
    cos, sin = precompute_rotary(64, q.numel())
    one, two = (
        apply_rotary(x.view(1, 1, 1, -1), cos[t : t + 1], sin[t : t + 1]).flatten()
        for x, t in ((q, m), (k, n))
    )
    pairs = (one * two).view(2, -1).sum(0) / q.numel() ** 0.5
    scores = page.locator(".wheel").evaluate_all("w => w.map(x => +x.dataset.score)")
    torch.testing.assert_close(torch.tensor(scores), pairs, rtol=0, atol=1e-5)
    total = float(page.locator(".sum").get_attribute("data-total"))
    assert total == pytest.approx(pairs.sum().item(), abs=1e-5)
    shown = page.locator(".total").inner_text().replace("−", "-")
    assert float(shown) == pytest.approx(total, abs=6e-4)
    places = [page.get_by_label(who).input_value() for who in ("query, m", "key, n")]
    assert places == [str(m), str(n)]


def test_rope_widget_turns_as_python_does(page):
    dice = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=dice)
    speeds = (10_000.0 ** (-torch.arange(0, 8, 2) / 8)).tolist()

    def pair(x, i):
        return x[[i, i + 4]].tolist()

    pairs = [
        {"speed": w, "q": pair(q, i), "k": pair(k, i)} for i, w in enumerate(speeds)
    ]
    show_widget(page, "rope.html", {"last": 63, "head_dim": 8, "pairs": pairs})
    query, key = page.get_by_label("query, m"), page.get_by_label("key, n")
    check_rope(page, q, k, 7, 4)
    query.fill("40")
    check_rope(page, q, k, 40, 4)
    key.fill("33")
    before = float(page.locator(".sum").get_attribute("data-total"))
    page.get_by_label("Keep the distance").check()
    for place in ("63", "20", "0"):  # 0 is out of reach at a distance of 7
        query.fill(place)
        check_rope(page, q, k, max(7, int(place)), max(0, int(place) - 7))
        after = float(page.locator(".sum").get_attribute("data-total"))
        assert after == pytest.approx(before, abs=1e-9)
    key.focus()
    page.keyboard.press("End")
    check_rope(page, q, k, 63, 56)
    page.get_by_label("Keep the distance").uncheck()
    query.fill("10")  # takes the key along: it may not stand after its query
    check_rope(page, q, k, 10, 10)
    picture(page, "rope")


RECORD = Path(__file__).resolve().parents[1] / "dev" / "records" / "attention_maps.json"


def test_heatmap_widget_shows_the_record(page):
    record = json.loads(RECORD.read_text())
    maps = [record[name] for name in ("sentence", "sum")]
    show_widget(page, "heatmap.html", {"heads": 3, "maps": maps, "start": [1, 1, 2]})

    def reader(t):
        return page.get_by_role("button", name=f"Reader {t}:")

    def weights():
        return page.locator(".text code").evaluate_all(
            "words => words.map(w => +w.dataset.weight)"
        )

    def check(name: str, head: int, t: int) -> None:
        row = record[name]["weights"][head][t]
        padding = [0] * (len(record[name]["tokens"]) - t - 1)
        assert weights() == row + padding
        best = sorted(range(t + 1), key=lambda s: (-row[s], s))[:3]
        found = page.locator(".best").get_attribute("data-best")
        assert found == " ".join(map(str, best))
        p = torch.tensor(row) / 1000
        bits = f"Entropy {torch.special.entr(p).sum():.2f} of at most {math.log(t + 1):.2f}"
        sync_api.expect(page.locator(".best")).to_contain_text(bits)

    check("sum", 5, 44)
    reader(33).hover()
    check("sum", 5, 33)
    reader(33).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    check("sum", 5, 31)
    page.get_by_label("Layer").select_option("0")
    page.get_by_label("Head").select_option("1")
    check("sum", 1, 31)
    page.get_by_label("Text").select_option(index=0)
    check("sentence", 1, 24)
    reader(24).focus()
    page.keyboard.press("Home")
    check("sentence", 1, 0)
    shown = page.locator(".text").inner_text()
    assert shown == "".join(record["sentence"]["tokens"]).replace(" ", "␣")
    picture(page, "heatmap")


DESIGNS = ARCHITECTURES | {
    "windows": {"window_pattern": "SSSL"},
    "all": {**ARCHITECTURES["modern"], "window_pattern": "SL", "pad_vocab_to": 64},
}
DIALS = list(
    zip(  # depth, V, T, B, micro-batches, ranks, bytes per value, design
        (1, 3, 5, 6, 7, 8, 9, 12, 20, 26, 31, 40, 2, 4, 10, 13),
        (1, 256, 4097, 32_768, 65_536, 50_257, 65_536, 999_999) * 2,
        (2048, 64, 3, 1, 1024, 777, 2048, 32_768) * 2,
        (1, 4, 32, 7) * 4,
        (1, 1, 2) * 6,
        (1, 8, 3, 1, 64) * 4,
        (2, 4, 4, 2, 2) * 4,
        [*DESIGNS, *reversed(DESIGNS)] * 2,
    )
)


def set_dial(page, depth: int, vocab: int, context: int, rows: int, *rest) -> None:
    micro, ranks, value_bytes, design = rest
    page.get_by_label("Depth, number of layers").fill(str(depth))
    for label, value in [
        ("Vocabulary V", vocab),
        ("Context T", context),
        ("Rows per batch B", rows),
        ("Micro-batches", micro),
        ("Ranks", ranks),
    ]:
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_label("Bytes per value").select_option(str(value_bytes))
    page.get_by_label("Design").select_option(design)


def dial_says(config: GPTConfig, rows: int, *rest) -> dict:
    "What the accounting makes of the same choices."
    micro, ranks, value_bytes, _ = rest
    parameters, flops = parameter_counts(config), flops_per_token(config)
    # The dial offers no design with it.
    assert parameters.pop("smear_gate") == 0
    total = parameters["total"]
    seen = config.sequence_len
    windows = [min(config.window(i) or seen, seen) for i in range(config.n_layer)]
    return {
        "width": config.n_embd,
        "heads": config.n_head,
        "parameters": parameters,
        "flops_per_token": flops,
        "scores": 12 * config.n_embd * sum(windows),
        "tokens": 20 * total,
        "flops": float(20 * total * flops),
        "memory": training_memory(config, rows, value_bytes, ranks, micro),
        "summed": 4 * total if micro > 1 else 0,
        "cache": kv_cache_bytes(config, bytes_per_value=value_bytes),
    }


def show_dial(page) -> None:
    show_widget(
        page,
        "dial.html",
        {"depth": 20, "designs": DESIGNS, "chunk": CHUNK, "block": BLOCK},
    )


@pytest.mark.parametrize("dial", DIALS)
def test_dial_widget_counts_as_accounting_does(page, dial):
    depth, vocab, context, *rest = dial
    show_dial(page)
    set_dial(page, *dial)
    heads = model_config(depth, vocab, context).n_head
    fitting = [str(k) for k in range(heads, 0, -1) if heads % k == 0]
    offered = page.locator("select[aria-label='Key-value heads'] option")
    assert offered.evaluate_all("os => os.map(o => o.value)") == fitting
    for kv in fitting:
        page.get_by_label("Key-value heads").select_option(kv)
        config = model_config(depth, vocab, context, kv_heads=int(kv))
        config = replace(config, **DESIGNS[rest[-1]])
        shown = json.loads(page.locator(".dial-widget").get_attribute("data-result"))
        shown["flops"] = float(shown["flops"])  # JavaScript writes it with 21 digits
        assert shown == dial_says(config, *rest)


def test_dial_widget_shows_the_model_of_depth_20(page):
    show_dial(page)
    bills = page.locator(".bills")
    sync_api.expect(bills).to_contain_text("560,988,160")
    sync_api.expect(bills).to_contain_text("3.49 · 10⁹")
    sync_api.expect(bills).to_contain_text("MLP 262 million (47 %)")
    sync_api.expect(page.locator(".sum")).to_contain_text("11.2 billion tokens")
    sync_api.expect(page.locator(".sum")).to_contain_text("3.92 · 10¹⁹ operations")
    assert bills.get_by_text("the peak").count() == 1


def test_dial_widget_by_keyboard(page):
    show_dial(page)
    page.get_by_label("Depth, number of layers").focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(page.locator(".width")).to_have_text("width 1,280, 10 heads of 128")
    page.keyboard.press("Home")
    sync_api.expect(page.locator(".width")).to_have_text("width 64, 1 head of 64")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    shown = json.loads(page.locator(".dial-widget").get_attribute("data-result"))
    assert shown["parameters"]["wte"] == 65_537 * 64


def test_dial_widget_refuses_sizes_that_make_no_model(page):
    show_dial(page)
    field = page.get_by_label("Vocabulary V", exact=True)
    for wrong in ("0", "-5", "1.5", ""):
        field.fill(wrong)
        sync_api.expect(page.get_by_role("alert")).to_contain_text(
            "whole number from 1"
        )
        assert field.get_attribute("aria-invalid") == "true"
    field.fill("256")
    sync_api.expect(page.get_by_role("alert")).to_be_empty()


def test_dial_widget_keeps_shared_heads_where_they_fit(page):
    show_dial(page)
    heads = page.get_by_label("Key-value heads")
    heads.select_option("2")
    for depth, kept in (("24", "2"), ("26", "13"), ("8", "4")):
        page.get_by_label("Depth, number of layers").fill(depth)
        assert heads.input_value() == kept


RATES = {
    "gradient descent": [0.07, 0.0],
    "momentum": [0.2, 0.44],
    "Nesterov": [0.12, 0.67],
    "Adam": [0.5, 0.8],
}
RAVINE = {"kappa": 25, "steps": 40, "start": [10, 1], "beta2": 0.95, "rates": RATES}


def descend(walk: dict, method: str, kappa: float, steps: int, turn: int):
    "The same walk in tensors, with the AdamW and the `lerp` that train the models."
    rate = walk["rate"]
    beta = walk["beta"]
    a = math.radians(turn)
    # Its columns are the ravine's two directions.
    axes = [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]
    axes = torch.tensor(axes, dtype=torch.float64)
    bend = axes @ torch.tensor([1.0, kappa]).double().diag() @ axes.T
    p = axes @ torch.tensor(RAVINE["start"], dtype=torch.float64)
    average = torch.zeros_like(p)
    state = {}
    path = [p.clone()]
    group = {"lr": rate, "betas": (beta, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    for _ in range(steps):
        grad = bend @ p
        average.lerp_(grad, 1 - beta)
        if method == "Adam":
            adamw_update(p, grad, state, group)
        elif method == "Nesterov":
            p -= rate * grad.lerp(average, beta)
        else:
            p -= rate * (average if method == "momentum" else grad)
        path.append(p.clone())
    return torch.stack(path) @ axes


def check_ravine(page, kappa: int, steps: int, rates: dict, turn: int = 0) -> None:
    "Compare the four walks of the widget with Python's."
    shown = json.loads(page.locator(".ravine-widget").get_attribute("data-result"))
    assert list(shown) == list(RATES)
    for method, walk in shown.items():
        assert [walk["rate"], walk["beta"]] == pytest.approx(rates[method], rel=1e-12)
        path = descend(walk, method, kappa, steps, turn)
        seen = torch.tensor(walk["path"], dtype=torch.float64)
        torch.testing.assert_close(seen, path, rtol=1e-6, atol=1e-9)
        loss = (path.square() * torch.tensor([1.0, kappa])).sum(1) / 2
        losses = torch.tensor(walk["losses"], dtype=torch.float64)
        torch.testing.assert_close(losses, loss, rtol=1e-6, atol=1e-9)


def test_ravine_widget_walks_as_python_does(page):
    show_widget(page, "ravine.html", RAVINE)
    check_ravine(page, 25, 40, RATES)
    picture(page, "ravine")
    page.get_by_label("Condition number, logarithmic").fill("2.3")
    page.get_by_label("Steps", exact=True).fill("100")
    check_ravine(page, 200, 100, RATES)
    sync_api.expect(page.locator(".end").first).to_have_text("diverges")
    page.get_by_role("button", name="Best rates in theory").press("Enter")
    root = 200**0.5
    r = (root - 1) / (root + 1)
    best = {
        "gradient descent": [2 / 201, 0],
        "momentum": [4 / (1 + root) ** 2 / (1 - r * r), r * r],
        "Nesterov": [1 / 200 / (1 - r), r],
        "Adam": RATES["Adam"],
    }
    check_ravine(page, 200, 100, best)
    sync_api.expect(page.locator(".sum")).to_contain_text(
        "loss (bold) of Adam is lowest"
    )
    page.get_by_label("Degrees between the ravine and the parameters").fill("45")
    check_ravine(page, 200, 100, best, turn=45)
    sync_api.expect(page.locator(".sum")).to_contain_text(
        "loss (bold) of momentum is lowest"
    )


def test_a_walk_that_overflows_is_never_the_lowest(page):
    show_widget(page, "ravine.html", RAVINE)
    page.get_by_label("Condition number, logarithmic").fill("3")
    page.get_by_label("Steps", exact=True).fill("100")
    page.get_by_label("Degrees between the ravine and the parameters").fill("45")
    page.get_by_label("Learning rate of gradient descent").press("End")
    shown = json.loads(page.locator(".ravine-widget").get_attribute("data-result"))
    descent = shown["gradient descent"]
    assert descent["rate"] == 10 and descent["losses"][-1] is None  # JSON's NaN
    sync_api.expect(page.locator(".end").first).to_have_text("diverges")
    page.get_by_label("Learning rate of momentum").press("End")
    page.get_by_label("Learning rate of Nesterov").press("End")
    said = page.locator(".sum")
    sync_api.expect(said).to_contain_text("loss (bold) of Adam is lowest")
    page.get_by_label("Show Adam").uncheck()
    sync_api.expect(said).to_contain_text("every method shown diverges")
    assert "NaN" not in page.locator(".ravine-widget").inner_html()


def test_ravine_widget_by_keyboard(page):
    show_widget(page, "ravine.html", RAVINE)
    page.get_by_label("Momentum of momentum").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("Learning rate of Adam").focus()
    page.keyboard.press("End")
    page.get_by_label("Condition number, logarithmic").focus()
    page.keyboard.press("Home")
    page.get_by_label("Steps", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    rates = RATES | {"momentum": [0.2, 0.45], "Adam": [10, 0.8]}
    check_ravine(page, 1, 39, rates)
    lines = page.locator(".map polyline")
    assert lines.count() == 4
    page.get_by_label("Show Adam").press("Space")
    assert lines.count() == 3


def ribbon_says(lengths: list, T: int, most: int) -> dict:
    "What is in the rows that are cut from all documents laid end to end."
    owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    start = {sum(lengths[:i]) for i in range(len(lengths))}
    cut = [owner[at : at + T + 1] for at in range(0, len(owner) - T, T)][:most]

    rows = []
    for ids in cut:
        documents, counts = ids.unique(return_counts=True)
        parts = zip(documents.tolist(), counts.tolist())
        rows.append([[i, n, 0] for i, n in parts])
    inside = sum(r * T not in start for r in range(len(cut)))
    return {"rows": rows, "inside": inside}


def best_fit_says(lengths: list, T: int, most: int, places: int) -> dict:
    "What is in the rows that whole documents fill, and what is cropped."
    queue = [*enumerate(lengths)]
    waiting = []
    rows = []
    cropped = 0

    def size():
        return sum(len(ids) for _, ids in waiting)

    while len(rows) < most:
        while queue and (len(waiting) < places or size() < T + 1):
            i, n = queue.pop(0)
            waiting.append(((0, i), [i] * n))
        if size() < T + 1:
            break
        ids, lost = take_row(waiting, T + 1)
        cropped += lost
        order = [*dict.fromkeys(ids)]
        used = {i: ids.count(i) for i in order}
        rows.append([[i, used[i], lost and lengths[i] - used[i]] for i in order])
    share = cropped / max(1, cropped + len(rows) * (T + 1))
    return {"rows": rows, "cropped": cropped, "share": share}


def packing_says(lengths: list, T: int, most: int, places: int) -> list:
    "What ribbon and best fit make of documents of these lengths."
    ribbon = ribbon_says(lengths, T, most)
    return [ribbon, best_fit_says(lengths, T, most, places)]


def test_packing_widget_packs_as_the_loader_does(page):
    dice = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 1500, (30,), generator=dice).tolist()
    show_widget(page, "packing.html", {"lengths": lengths, "T": 1024})
    fields = ("Tokens per row, T", "Maximum rows", "Waiting documents")

    def check(*expected) -> None:
        assert [int(page.get_by_label(f).input_value()) for f in fields] == [*expected]
        shown = page.locator(".packing-widget").get_attribute("data-result")
        says = packing_says(lengths, *expected)
        assert json.loads(shown) == says
        assert page.locator(".packed").count() == sum(len(x["rows"]) for x in says)
        share = f"{100 * says[1]['share']:.1f} %"
        sync_api.expect(page.locator(".sum")).to_contain_text(share)

    check(1024, 8, 8)
    picture(page, "packing")
    for T, rows, places in [(128, 24, 1), (128, 24, 30), (640, 12, 4), (4096, 24, 30)]:
        for field, value in zip(fields, (T, rows, places)):
            page.get_by_label(field).fill(str(value))
        check(T, rows, places)
    page.get_by_label(fields[0]).focus()
    page.keyboard.press("ArrowLeft")
    check(3968, 24, 30)
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    check(128, 1, 30)
