"""A tag is one plain name: whatever else is given, nothing is deleted, and one line says why."""

import runpy
import sys
from pathlib import Path

import pytest
from chat_model import tiny_model, tiny_tokenizer

from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.hf import export_hf

# Names that leave the folder, that Windows or a shell would take for something else, or
# that are too long.
ODD = ["..", ".", "a/b", "../sft_checkpoints", "ABSOLUTE", "a\\b", " ", "~", "-x", ".x"]
ODD += ["d20.", "d20/", "con", "NUL.txt", "com1", "a" * 65, "é", "a\nb", "*", "d 20"]
# The stages open their data before they look at the tag: seven names are enough there.
SLOW = ("mid_train", "chat_sft", "chat_rl")
PLAIN = ["d20", "d20-long", "run_1.2", "A", "7", "a" * 64, "console", "com10"]
QUICK = "--num-iterations=1 --device-batch-size=1 --total-batch-size=96"
COMMANDS = [  # script, option, and what it needs besides
    ("base_train", "tag", f"{QUICK} --depth=1 --max-seq-len=96"),
    ("mid_train", "tag", QUICK),
    ("mid_train", "source-tag", QUICK),
    ("chat_sft", "tag", QUICK),
    ("chat_sft", "source-tag", QUICK),
    ("chat_rl", "tag", ""),
    ("chat_rl", "source-tag", ""),
    ("base_eval", "tag", ""),
    ("chat_eval", "tag", "--source=sft"),
    ("chat_cli", "tag", "--source=sft -p hi"),
    ("chat_web", "tag", "--source=sft"),
    ("export_hf", "tag", "--source=sft --folder=OUT"),
    ("import_model", "tag", "--folder=HF"),
    ("import_model", "tag", "--folder=HF --overwrite=True"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A base folder with a model of each stage, and somebody's files around it."
    place = tmp_path_factory.mktemp("tags")
    home = place / "home"
    model = tiny_model()
    tiny_tokenizer().save(home / "tokenizer")
    for stage in ("base", "mid", "sft", "rl"):
        folder = home / f"{stage}_checkpoints"
        checkpoint.save(folder / "d2", 7, model, meta={"settings": "none"})
        (folder / "notes.txt").write_text("mine")
    for name in ("runs/old.jsonl", "report/base_train.json", "notes.txt"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("{}")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "thesis.txt").write_text("mine")
    export_hf(model, tiny_tokenizer(), place / "HF")
    return place


def contents(folder: Path) -> dict[Path, bytes | None]:
    "Read every file; None for a folder."
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("script, option, rest", COMMANDS)
def test_an_odd_tag_gives_one_line_and_touches_nothing(
    place, monkeypatch, capsys, script, option, rest
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place / "home"))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    monkeypatch.delenv("NANOCHAT_DEBUG", raising=False)
    monkeypatch.delitem(sys.modules, f"scripts.{script}", raising=False)
    before = contents(place)
    for tag in ODD[:7] if script in SLOW else ODD:
        if tag == "-x":  # the parser itself refuses what looks like another option
            continue
        tag = tag.replace("ABSOLUTE", str(place / "elsewhere"))
        flags = rest.replace("HF", str(place / "HF")).replace("OUT", str(place / "o"))
        monkeypatch.setattr(sys, "argv", ["x", *flags.split(), f"--{option}={tag}"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"scripts.{script}", run_name="__main__")
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2, (tag, lines)
        assert lines[-1].startswith("error: the tag"), (tag, lines)
        assert "is not a plain name" in lines[-1], (tag, lines)
        assert not [x for x in lines if "Traceback" in x], (tag, lines)
        assert contents(place) == before, tag


@pytest.mark.parametrize("tag", PLAIN)
def test_plain_names_are_tags(tag, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = checkpoint.checkpoint_folder("base", tag)
    assert folder == tmp_path / "base_checkpoints" / tag


@pytest.mark.parametrize("tag", ODD)
def test_odd_names_are_no_tags(tag):
    tag = tag.replace("ABSOLUTE", "/home")
    with pytest.raises(UserError, match="plain name") as error:
        checkpoint.checkpoint_folder("base", tag)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 240
