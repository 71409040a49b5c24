"""The README says what is recorded, its links lead somewhere, its commands exist."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from nanochat.cli import COMMANDS, SHORT
from nanochat.common import parse_config
from nanochat.config import ChatConfig
from nanochat.tasks.mixtures import open_mixture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
APPENDIX = json.loads((ROOT / "nbs/appendix_commands.ipynb").read_text("utf-8"))
PROSE = [
    "".join(c["source"]) for c in APPENDIX["cells"] if c["cell_type"] == "markdown"
]
ROWS = {
    "sums, with the calculator": "Arithmetic",
    "capitals in a new wording": "Capitals",
    "spelling of unseen words": "Spelling",
    "definitions in a new wording": "Definitions",
    "ARC-Easy, school exams": "ARC-Easy",
}


def cells(title: str) -> list[str]:
    "Return the cells of the table's row that begins like this."
    line = next(x for x in README.splitlines() if x.startswith(f"| {title}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_the_recorded_run():
    record = json.loads((ROOT / "dev/records/speedrun_cpu.json").read_text("utf-8"))
    sections = record["sections"]
    base = sections["base_eval"]
    text = cells("validation text")
    assert text[1] == f"{base['val_bpb']:.3f}"
    assert f"bigram model: {base['bigram_bpb']:.3f}" in text[0]
    for title, task in ROWS.items():
        row = cells(title)
        for column, stage in enumerate(("mid", "sft", "rl"), 2):
            result = sections[f"chat_eval_{stage}"]["tasks"][task]
            assert row[column] == f"{100 * result['accuracy']:.1f} %", (title, stage)
            assert f"{result['n']:,}" in row[0]
    minutes = [
        sections["base_train"]["train_seconds"],
        sections["mid_train"]["train_seconds"],
        sections["chat_sft"]["train_seconds"],
        sections["chat_rl"]["seconds"],
    ]
    assert cells("training, minutes")[1:5] == [f"{m / 60:.1f}" for m in minutes]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(file):
    text = (ROOT / file).read_text("utf-8")
    prose = re.sub(r"`[^`\n]*`", "", text)  # a link in backticks is an example
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", prose)
    missing = [k for k in links if "://" not in k and not (ROOT / k).exists()]
    assert missing == []


@pytest.mark.slow
def test_commands_and_their_options_exist(monkeypatch):
    text = "\n\n".join([README, *PROSE])
    lines = re.findall(r"`(nanochat \w[^`\n]*)`", README)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines += [x for x in block.splitlines() if x.startswith("nanochat ")]
    assert len(lines) > 20
    for line in lines:
        name, *words = shlex.split(line, comments=True)[1:]
        if name == "download":
            continue  # its options are those of `python -m nanochat.dataset`
        command = COMMANDS[SHORT.get(name, name)]
        kind = getattr(import_module(command.module), command.config)
        monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
        parse_config(kind, command.preset_of or SHORT.get(name, name), words)


def test_the_changelog_knows_the_version():
    version = re.search(
        r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert version and f"## [{version[1]}]" in changes


def test_the_readme_counts_the_conversations_of_the_mixture():
    "A mixture that grew or shrank belongs to another run than the recorded one."
    training, _ = open_mixture("sft", ChatConfig())
    said = int(re.search(r"trained on ([\d,]+) short", README)[1].replace(",", ""))
    assert said <= len(training) < said + 1000
