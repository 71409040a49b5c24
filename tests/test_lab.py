"""The chapters in JupyterLab: nothing raw in the text, links that work, cells that run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("jupyterlab", reason="the extra `lab` is missing")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.build,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))
import markup

CHAPTERS = [file.stem for file in markup.pages() if file.suffix == ".ipynb"]
# Those whose cells run here. The others take minutes; `make check` executes them.
RUN = [name for name in ("appendix_notation", "01_introduction") if name in CHAPTERS]

# What a reader should not see in rendered text, outside code and formulas.
RAW = {
    "a role": r"\{(?:ref|numref|eq|doc|term|cite:\w)\}",
    "a directive": r":::",
    "a label": r"(?m)^\([\w-]+\)=",
    "mathematics": r"\$\$|\\begin\{|\\tag|\\frac",
    "HTML": r"</?(?:a|details|summary)\b",
    "a link": r"\]\([\w.#]",
    "an emphasis": r"\*\*",
}
TEXT = """() => [...document.querySelectorAll('.jp-Notebook .jp-RenderedMarkdown')].map(
    cell => {
      const copy = cell.cloneNode(true);
      copy.querySelectorAll('code, pre, mjx-container').forEach(x => x.remove());
      return copy.textContent;
    })"""
OUTPUTS = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
  return cells.filter(cell => cell.type == 'code').map(cell => ({
    id: cell.id, count: cell.executionCount, outputs: cell.outputs.toJSON()}));
}"""
OPEN_CODE = """() => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
  const start = cells.findIndex(x => x.querySelector('h2')?.innerText.startsWith('Solutions'));
  const after = start < 0 ? [] : cells.slice(start);
  const seen = '.jp-InputArea-editor, .jp-OutputArea-child';
  const code = after.filter(x => x.classList.contains('jp-CodeCell'));
  return code.filter(x => [...x.querySelectorAll(seen)].some(y => y.offsetHeight)).length;
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the chapters; its address."
    home = tmp_path_factory.mktemp("lab")
    for name in ("nbs", "book/widgets", "dev/records"):
        shutil.copytree(ROOT / name, home / name)
    (home / "nanochat").symlink_to(ROOT / "nanochat")  # chapter 1 counts its lines

    # A page of news would cover the text, and cells out of sight would not be rendered.
    settings = home / "settings" / "@jupyterlab"
    for name, value in {
        "apputils-extension/notification": {"fetchNews": "false"},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "NANOCHAT_BASE_DIR": str(home / "runs"),
        "PYTHONPATH": str(ROOT),
    }
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    # fmt: off
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser",
        f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={home}",
        "--allow-root",
    ]
    # fmt: on
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def wait_for_server(address: str, server: subprocess.Popen) -> None:
    for _ in range(120):
        assert server.poll() is None, "JupyterLab ended"
        try:
            urlopen(f"{address}/api", timeout=5)
            return
        except URLError:
            time.sleep(0.5)
    raise AssertionError("JupyterLab does not answer")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_chapter(browser, lab):
    "Open a notebook and wait until all of its text is rendered."
    context = browser.new_context(viewport={"width": 1300, "height": 900})

    def open_it(name: str):
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{lab}/lab/tree/nbs/{name}.ipynb?reset")
        file = ROOT / "nbs" / f"{name}.ipynb"
        cells = sum(cell["cell_type"] == "markdown" for cell in markup.cells(file))
        rendered = (
            "document.querySelectorAll('.jp-Notebook .jp-RenderedMarkdown').length"
        )
        page.wait_for_function(f"{rendered} >= {cells}")
        page.wait_for_function("!document.querySelector('mjx-container:empty')")
        page.wait_for_timeout(1000)
        if folder := os.environ.get("NANOCHAT_SHOTS"):
            page.screenshot(path=Path(folder) / f"lab-{name}.png")
        return page

    yield open_it
    context.close()


def raw(texts: list[str]) -> list[str]:
    "Return what is raw in rendered texts."
    found = []
    for text in texts:
        for kind, pattern in RAW.items():
            for match in re.finditer(pattern, text):
                found.append(f"{kind}: {text[max(0, match.start() - 30) :][:80]!r}")
    return found


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_reads_well_and_its_solutions_are_closed(open_chapter, name):
    page = open_chapter(name)
    assert raw(page.evaluate(TEXT)) == []
    errors = page.locator(".jp-Notebook mjx-merror, .jp-Notebook [data-mjx-error]")
    assert errors.count() == 0
    assert page.locator(".jp-Notebook details[open]").count() == 0
    assert page.evaluate(OPEN_CODE) == 0


@pytest.mark.parametrize("name", RUN)
def test_all_cells_run(open_chapter, name):
    page = open_chapter(name)
    page.wait_for_function(
        "jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"
    )
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    for _ in range(480):
        cells = page.evaluate(OUTPUTS)
        failed = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not failed, (failed[0]["ename"], failed[0]["evalue"])
        if all(cell["count"] for cell in cells):
            break
        time.sleep(0.5)
    assert all(cell["count"] for cell in cells)
    assert page.evaluate(OPEN_CODE) == 0  # running shows no solution


def test_a_link_leads_to_its_heading_and_to_its_anchor(open_chapter):
    page = open_chapter("07_optimization")
    place = "document.querySelector('.jp-WindowedPanel-outer').scrollTop"
    for link, goal in [("equation 7.1", "#eq-adam"), ("Solution 7.7", "#sol-opt-lion")]:
        page.evaluate(place + " = 0")
        page.locator(f".jp-Notebook a[href='{goal}']", has_text=link).first.click()
        page.wait_for_timeout(1500)
        target = page.locator(f".jp-Notebook [data-jupyter-id='{goal[1:]}']")
        assert -50 < target.bounding_box()["y"] < 900, link
    page.locator("a", has_text="Polyak, 1964").first.click()
    page.locator(".jp-MarkdownViewer", has_text="USSR Computational").wait_for()
