"""Every script under dev/ runs its smallest case here, or in the file that `TESTED` names."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.conversation import check_conversation

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / "dev"
sys.path.insert(0, str(DEV))  # the scripts import each other
RECORDS = DEV / "records"
TESTED = {  # scripts whose smallest case has a test elsewhere
    "ablation": "test_ablation",
    "check": "test_house",
    "fuzz_tokenizer": "test_tokenizer",
    "gpu": "test_gpu",
    "gpu_baseline": "test_gpu",
    "kill_test": "test_checkpoint",
    "markup": "test_house",
    "ranks": "test_optim_ranks",
}


def load(name: str):
    "Import a script as a module."
    spec = importlib.util.spec_from_file_location(name, DEV / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script):
    "Return a function that runs a script as a user does and returns what it says."

    def call(name: str, *arguments) -> str:
        done = script(f"dev/{name}.py", *map(str, arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def outline(value):
    "Keep the keys of a record at every depth, and none of its numbers."
    if isinstance(value, dict):
        found = {key: outline(inner) for key, inner in value.items()}
        # What a machine and a model have to say grows with the project.
        return found | dict.fromkeys(found.keys() & {"environment", "config"})
    if isinstance(value, list):
        return [outline(value[0])] if value else []
    return None


def test_every_script_is_run_somewhere():
    here = Path(__file__).read_text("utf-8")
    for script in sorted(DEV.glob("*.py")):
        name = script.stem
        if name in TESTED:
            text = (ROOT / "tests" / f"{TESTED[name]}.py").read_text("utf-8")
            assert re.search(rf"\b{name}\b", text), f"{name}: not in {TESTED[name]}"
        else:
            calls = rf'(run|load)\("{name}"'
            assert re.search(calls, here), f"{script}: no test runs it"


@pytest.mark.slow
def test_cells_that_cannot_run_twice_are_found(tmp_path, run):
    assert "appendix_notation.ipynb: 0" in run("twice", "nbs/appendix_notation.ipynb")
    twice = load("twice")
    file = tmp_path / "a.ipynb"
    for code, told in [
        (["xs = [1]", "xs.pop()"], ["a.ipynb [c1] run 2: IndexError"]),
        (["1 / 0", "xs.pop()"], ["a.ipynb [c0] run 1: ZeroDivisionError"]),
        (["#| eval: false\n1 / 0", "#| notest\n1 / 0", "#| hide", "1"], []),
    ]:
        made = [
            {"cell_type": "code", "id": f"c{i}", "source": [text]}
            for i, text in enumerate(code)
        ]
        file.write_text(json.dumps({"cells": made}), "utf-8")
        found = [problem.rpartition(":")[0] for problem in twice.twice(file)]
        assert [x.partition("Error")[0] + "Error" for x in found] == told


@pytest.mark.parametrize(
    ("path", "argument", "told"),
    [
        ("dev/twice.py", "nbs/nope.ipynb", "there is no notebook nbs/nope.ipynb"),
        ("dev/markup.py", "nope", "unrecognized arguments: nope"),
        ("book/bibliography.py", "nope", "unrecognized arguments: nope"),
    ],
)
def test_a_wrong_argument_is_refused(script, path, argument, told):
    done = script(path, argument)
    assert (
        done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    )


def test_the_makefile_remakes_every_record():
    text = (ROOT / "Makefile").read_text("utf-8")
    table = dict(re.findall(r"^#   (\S+\.\w+) +((?:python|bash) \S+) ", text, re.M))
    present = {file.name for file in RECORDS.iterdir()}
    assert set(table) == present - {"gpu.json"}  # which only a card can make
    assert "gpu.json: python dev/gpu.py" in text
    recipe = re.search(r"^records:.*\n((?:\t.*\n)+(?:.*json\n)?)", text, re.M)[1]
    commands = recipe.replace("\\\n", " ").splitlines()
    for file, command in table.items():
        # The command of the table, and the one that writes the file, are in the recipe.
        assert any(command in line for line in commands), command
        (*_, writes) = [x for x in commands if x.endswith(f"$(RECORDS)/{file}")]
        script = re.search(r"python (dev/\w+\.py)", writes)[1]
        assert (ROOT / script).is_file()
        assert command == f"python {script}" or command == "bash speedrun.sh"
        source = (ROOT / script).read_text("utf-8")
        for option in re.findall(r" (--[a-z-]+)", writes):
            assert f'"{option}"' in source, f"{script} has no {option}"


@pytest.mark.slow
def test_the_compression_of_a_tokenizer(tmp_path, run):
    file = tmp_path / "record.json"
    run("tokenizer_compression", "--tiny", "--record", file)
    found = json.loads(file.read_text("utf-8"))
    kept = json.loads((RECORDS / "tokenizer_compression.json").read_text("utf-8"))
    assert found.keys() == kept.keys()
    assert [row["text"] for row in found["rows"]] == [
        row["text"] for row in kept["rows"]
    ]
    assert [*found["rows"][0]] == [*kept["rows"][0]][:3]
    assert all(1 <= row["ours 2,048"] < 5 for row in found["rows"])


@pytest.mark.slow
def test_the_model_bench(tmp_path, run):
    file = tmp_path / "record.json"
    said = run("bench_model", "--tiny", "--record", file)
    found = json.loads(file.read_text())
    kept = json.loads((RECORDS / "model_bench.json").read_text())
    assert outline(found) == outline(kept)
    assert found["training"][0]["how"] == "eager" and "| eager |" in said
    assert sum(found["shares"].values()) == pytest.approx(1)
    (loss,) = found["loss"]
    assert loss["plain_seconds"] > 0 and loss["chunked_peak_bytes"] > 0


@pytest.mark.slow
def test_the_optimizer_bench(tmp_path, run):
    file = tmp_path / "record.json"
    run("bench_optim", "--tiny", "--record", file)
    found = json.loads(file.read_text())
    kept = json.loads((RECORDS / "optim_bench.json").read_text())
    assert outline(found) == outline(kept)
    for threads in (1, 2):
        part = found[f"{threads} threads"]
        assert 0 < part["step"]["share with five steps"]["median"] < 1
        for method in part["iteration"].values():
            assert method["largest difference"] < 1e-3


@pytest.mark.slow
def test_the_tokenizer_bench_of_our_crate_alone(tmp_path, run):
    file = tmp_path / "record.md"
    run("bench_tokenizers", "--tiny", "--record", file)
    table = file.read_text("utf-8")
    kept = (RECORDS / "rustbpe.md").read_text("utf-8")
    heads = re.findall(r"\*\*(.+)\*\*", kept)
    assert re.findall(r"\*\*(.+)\*\*", table) == heads and len(heads) == 6
    rows = [line for line in table.splitlines() if line.startswith("| crate |")]
    assert len(rows) == 6 and "–" not in "".join(rows)
    hashes = {re.search(r"[0-9a-f]{12}", row)[0] for row in rows[1:5]}
    assert len(hashes) == 1, "lists and arrays, one thread and two: the same tokens"


def test_every_ablation_of_the_crate_still_finds_its_lines(tmp_path):
    ablate = load("ablate_crate")
    for changes in ablate.VARIANTS.values():
        ablate.copy_crate(changes, tmp_path / "crate")
        for name, old, new in changes:
            text = (tmp_path / "crate" / "src" / name).read_text("utf-8")
            assert old not in text or old in new


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.timeout(900)  # where `cargo test` has not compiled the dependencies yet
def test_two_variants_of_the_crate(tmp_path, run):
    file = tmp_path / "record.md"
    run("ablate_crate", "--tiny", "--record", file)
    lines = file.read_text("utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == [
        "| as committed",
        "| no table of recent chunks",
    ]


@pytest.mark.slow
def test_the_attention_maps(base_model, tmp_path, run):
    shutil.copytree(base_model.parent, tmp_path / "rl_checkpoints")
    file = tmp_path / "maps.json"
    assert f"{file}: " in run("attention_maps", file, "--tiny")
    found = json.loads(file.read_text("utf-8"))
    kept = json.loads((RECORDS / "attention_maps.json").read_text("utf-8"))
    assert found.keys() == kept.keys()
    assert found["habits"].keys() == kept["habits"].keys()
    heads = len(found["habits"]["heads"])
    for name in ("first", "self", "previous", "follower", "worth", "entropy"):
        assert len(found["habits"][name]) == heads
    rows = found["sentence"]["weights"][0]
    assert [len(row) for row in rows] == list(range(1, len(rows) + 1))
    assert all(abs(sum(row) - 1000) < 10 for row in rows)
    assert found["calls"]["questions"] == 3


@pytest.mark.slow
def test_the_record_of_a_speedrun(base_model, tmp_path, run):
    file = tmp_path / "record.json"
    run("record", file)
    found = json.loads(file.read_text("utf-8"))
    kept = json.loads((RECORDS / "speedrun_cpu.json").read_text("utf-8"))
    assert found.keys() == kept.keys() | {"chat"}  # the record may be older than that
    assert found["sections"].keys() == {"base_train"}
    assert len(found["curves"]["base_train"]) > 1
    assert str(tmp_path) not in file.read_text("utf-8")

    # Whole conversations, that another model can be shown, and how they were sampled.
    chat = found["chat"]
    assert chat.keys() == {
        "model", "temperature", "top_k", "max_tokens", "conversations"
    }  # fmt: skip
    assert chat["model"] == "nanochat-d1-base" and chat["temperature"] == 0
    asked = [
        check_conversation(said, last="assistant")[0]["content"]
        for said in chat["conversations"]
    ]
    assert asked == list(load("record").QUESTIONS)


@pytest.mark.slow
def test_the_scaling_law(tmp_path, run):
    file = tmp_path / "record.json"
    run("scaling", "--tiny", "--record", file)
    points = json.loads(file.read_text())["points"]
    kept = json.loads((RECORDS / "scaling.json").read_text())["points"]
    assert points[0].keys() == kept[0].keys() and len(points) == 2
    small, large = points
    assert small["N"] < large["N"] and small["D"] > large["D"]
    assert all(3 < loss < 7 for point in points for loss in point["losses"])


@pytest.mark.slow
def test_the_vocabulary_study(tmp_path, run):
    file = tmp_path / "record.json"
    run("vocab_study", "--tiny", "--record", file)
    found = json.loads(file.read_text())
    kept = json.loads((RECORDS / "vocab_study.json").read_text())
    assert outline(found) == outline(kept)
    (row,) = found["rows"]
    assert row["vocab_size"] == 512 and 1 < row["val_bpb"][0] < 6


@pytest.fixture
def short_race(monkeypatch, tmp_path, tokenizer):
    "Two steps of a tiny model for every run, all in this process."
    race = load("race")
    monkeypatch.setattr(race, "T", 16)
    monkeypatch.setattr(race, "VOCAB", tokenizer.get_vocab_size())
    monkeypatch.setattr(race, "STEPS", 2)
    monkeypatch.setattr(race, "SEEDS", (1,))
    monkeypatch.setattr(race, "VAL_BATCHES", 1)
    tokenizer.save(tmp_path / "tokenizer")
    return race


@pytest.mark.slow
def test_a_runner_of_the_race(short_race, tmp_path):
    for name, recipe in short_race.RECIPES.items():
        recipe = recipe | {"steps": 2, "rate": 0.004, "curve": True}
        row = short_race.train_one(recipe, 1, str(tmp_path / "tokenizer"))
        assert 1 < row["bpb"] < 9, name
        assert [step for step, _ in row["curve"]] == [0, 2]


def test_the_race_is_recorded(short_race, tmp_path, monkeypatch):
    def instead(recipe: dict, seed: int, work: Path) -> dict:
        "Stand in for a process: the best rate is in the middle."
        bits = 2.0 + abs(recipe.get("rate", 0.004) - 0.004)
        return {"recipe": recipe, "seed": seed, "bpb": bits}

    speed = {name: {"of AdamW's": 1.0} for name in short_race.RECIPES}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    monkeypatch.setattr(short_race, "run", instead)
    short_race.main(tmp_path, str(tmp_path / "race.json"), 1)
    found = json.loads((tmp_path / "race.json").read_text())
    kept = json.loads((RECORDS / "race.json").read_text())
    assert found.keys() == kept.keys()
    assert {row["name"] for row in found["runs"]} == set(short_race.RECIPES)
    assert {
        row["recipe"]["rate"] for row in found["runs"] if "AdamW" in row["name"]
    } == {0.004}


# ------------------------------------------------------------- the embedded text


def make(made: Path) -> None:
    "Write a folder as make_data.py does."
    make_data = load("make_data")
    (made / "chat").mkdir(parents=True)
    (made / "chat" / "identity.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n')
    make_data.make_manifest(made, {"validation": "none"}, {}, {})


def test_the_manifest_describes_the_files(tmp_path):
    make(tmp_path)
    found = json.loads((tmp_path / "manifest.json").read_text())
    kept = json.loads((ROOT / "nanochat" / "data" / "manifest.json").read_text("utf-8"))
    assert found.keys() == kept.keys()
    entry = found["files"]["chat/identity.jsonl"]
    assert entry["rows"] == 2 and entry["bytes"] == 18
    assert entry["source"] == kept["files"]["chat/identity_train.jsonl"]["source"]


def test_old_data_are_replaced(tmp_path):
    make_data = load("make_data")
    make(tmp_path / "new")
    for out in (tmp_path / "absent", tmp_path / "empty", tmp_path / "old"):
        if out.name == "old":
            make(out)
            (out / "chat" / "identity.jsonl").write_text("changed\n")
        elif out.name == "empty":
            out.mkdir()
        make_data.install(tmp_path / "new", out)
        assert (out / "chat" / "identity.jsonl").stat().st_size == 18
    assert make_data.is_replaceable(ROOT / "nanochat" / "data")


@pytest.mark.parametrize("kind", ["thesis", "mixed", "foreign manifest", "file"])
def test_somebody_elses_files_are_refused_before_anything_is_fetched(tmp_path, kind):
    out = tmp_path / "out"
    file = out / "thesis.txt"
    if kind == "file":
        file = out
    elif kind == "mixed":
        make(out)
    else:
        out.mkdir()
    if kind == "foreign manifest":
        (out / "manifest.json").write_text('{"name": "a web page"}')
    file.write_text("three years of work")
    flags = ["--cache", str(tmp_path / "cache"), "--out", str(out)]
    command = [sys.executable, str(DEV / "make_data.py"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did not write" in done.stderr
    assert file.read_text() == "three years of work"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(SystemExit, match="nothing there was touched"):
        load("make_data").install(tmp_path, out)
    assert file.read_text() == "three years of work"
