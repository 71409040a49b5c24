"""The whole pipeline through its commands, tiny; and what each says to wrong input."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataset
from nanochat.cli import COMMANDS, run_command
from nanochat.common import (
    UserError,
    get_base_dir,
    parse_config,
    read_preset,
)
from nanochat.config import BaseConfig, ChatConfig
from nanochat.gpus import GPUS
from nanochat.plan import (
    base_plan,
    make_plan,
    training_seconds,
)

ROOT = Path(__file__).parents[1]
BASE = (
    "--depth=1 --max-seq-len=128 --device-batch-size=4 --total-batch-size=512 "
    "--num-iterations=4 --eval-every=2 --eval-tokens=512 --save-every=2"
)
CHAT = (
    "--device-batch-size=4 --total-batch-size=512 --num-iterations=3 --eval-every=-1 "
    "--eval-tokens=512"
)
EVAL = "--tasks Arithmetic|Capitals|ARC-Easy --max-problems=8 --max-new-tokens=8"
RL = (
    "--num-steps=2 --examples-per-step=2 --num-samples=2 --max-new-tokens=8 "
    "--eval-examples=4 --eval-samples=2 --eval-every=-1"
)
PIPELINE = [
    ("tok_train", "--vocab-size=600 --max-chars=200000"),
    ("tok_eval", ""),
    ("base_train", BASE),
    ("base_eval", "--eval-tokens=1024 --core-items=2"),
    ("mid_train", CHAT),
    ("chat_eval", f"--source=mid {EVAL}"),
    ("chat_sft", CHAT),
    ("chat_eval", f"--source=sft {EVAL}"),
    ("chat_rl", RL),
    ("chat_eval", f"--source=rl {EVAL}"),
    ("report", ""),
    ("export_hf", "--source=sft --folder=OUT"),
    ("import_model", "--folder=OUT --stage=base --tag=back"),
    ("chat_cli", "-p hello --max-tokens=4"),
]


def run(monkeypatch, stage: str, flags: str = "") -> None:
    "Call a command in this process as its file does."
    monkeypatch.setattr(sys, "argv", [stage])  # restored afterwards
    run_command(stage, flags.split(), f"python -m scripts.{stage}")


def fails(monkeypatch, capsys, stage: str, flags: str = "") -> str:
    "Expect exit code 2 and one clear line; return what was printed."
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, stage, flags)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return printed.err + printed.out


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    "An empty base folder, on the CPU preset."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    return tmp_path / "base"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_every_command_runs(fresh, monkeypatch, capsys, tmp_path):
    for stage, flags in PIPELINE:
        run(monkeypatch, stage, flags.replace("OUT", str(tmp_path / "hf")))
    for source in ("base", "mid", "sft", "rl"):
        assert list(
            (fresh / f"{source}_checkpoints").glob("d1/step_*/model.safetensors")
        )
    report = (fresh / "report" / "report.md").read_text()
    assert "Arithmetic" in report and "SFT" in report
    assert (fresh / "report" / "report.html").stat().st_size > 5000
    assert (tmp_path / "hf" / "config.json").is_file()
    capsys.readouterr()
    # A second time: nothing to do. The imported model has as many layers, so name one.
    run(monkeypatch, "mid_train", f"{CHAT} --source-tag=d1")
    assert "already finished" in capsys.readouterr().out


def test_commands_before_their_time(fresh, monkeypatch, capsys):
    assert "tok_train" in fails(monkeypatch, capsys, "base_train", BASE)
    assert "train one first" in fails(monkeypatch, capsys, "chat_sft", CHAT)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--depht=6", "--depth"),
        ("--depth=zero", "zero"),
        ("--depth=0", "at least 1"),
        ("--total-batch-size=500 --max-seq-len=128", "use 512"),
        ("--preset=gpu99", "gpu99"),
        ("--device=tpu", "cuda, mps or cpu"),
        ("--kv-heads=2 --depth=3", "must divide"),
        ("--data=/no/such/folder", "no text at"),
        ("--num-iterations=0", "0 steps"),
    ],
)
def test_base_train_refuses(base_dir, monkeypatch, capsys, flags, message):
    short = "--device-batch-size=4 --num-iterations=1 --total-batch-size=1024 "
    keep = [f for f in short.split() if f.split("=")[0] not in flags]
    printed = fails(monkeypatch, capsys, "base_train", " ".join([*keep, flags]))
    assert message in printed


def write_shard(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=4)


def read(split: str, data: Path, **options) -> list[str]:
    return [t for t, _ in dataset.iter_documents(split, data=str(data), **options)]


def test_own_parquet_and_text_files(tmp_path):
    texts = [f"document number {i}" for i in range(300)]
    write_shard(tmp_path / "a.parquet", texts[:150])
    (tmp_path / "b.txt").write_text("\n\n".join(t + " x" * 1500 for t in texts[150:]))
    train, val = read("train", tmp_path), read("val", tmp_path)
    assert len(train) + len(val) == 300 and 3 < len(val) < 40
    assert not set(train) & set(val)
    dealt = [read("train", tmp_path, start=i, step=3) for i in range(3)]
    assert sorted(t for part in dealt for t in part) == sorted(train)
    document, cursor = list(dataset.iter_documents("train", data=str(tmp_path)))[40]
    assert train[40] == document
    assert read("train", tmp_path, cursor=cursor) == train[41:]


def test_a_named_validation_file_is_pinned(tmp_path):
    write_shard(tmp_path / "train.parquet", ["a", "b"])
    write_shard(tmp_path / "val.parquet", ["c"])
    assert (read("train", tmp_path), read("val", tmp_path)) == (["a", "b"], ["c"])


def test_bad_text_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"no \.parquet or \.txt"):
        read("train", tmp_path)
    write_shard(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(UserError, match="no column 'text'"):
        read("train", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="download it again"):
        read("train", tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        read("train", tmp_path)
    (tmp_path / "a.txt").write_text("\n\n \n")
    with pytest.raises(UserError, match="no text"):
        read("train", tmp_path)


def test_an_empty_shard_is_passed_over_and_only_empty_ones_are_an_error(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"train split .*no text.*: add documents"):
        read("train", tmp_path)
    texts = [f"document number {i}" for i in range(40)]
    write_shard(tmp_path / "b.parquet", [*texts[:20], "", *texts[20:]])
    pq.write_table(empty, tmp_path / "c.parquet")
    assert sorted(read("train", tmp_path) + read("val", tmp_path)) == sorted(texts)
    documents = list(dataset.iter_documents("train", data=str(tmp_path), epochs=2))
    for (_, cursor), (text, _) in zip(documents, documents[1:]):
        rest = dataset.iter_documents("train", 0, 1, cursor, str(tmp_path), epochs=2)
        assert next(rest)[0] == text


def test_corrupt_row_group_is_named(tmp_path):
    write_shard(tmp_path / "a.parquet", [chr(97 + i) * 4000 for i in range(20)])
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[4:200] = b"\xff" * 196
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(UserError, match="row group 0"):
        read("train", tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A local server with the hub's layout; three shards and the validation shard."
    site = tmp_path / "site"
    for i in (0, 1, 2, dataset.HUB_SHARDS - 1):
        write_shard(
            site / f"shard_{i:05d}.parquet", [f"shard {i} text {j}" for j in range(9)]
        )

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NANOCHAT_DATA_URL", f"http://127.0.0.1:{server.server_port}")
    yield site
    server.shutdown()


def test_download_fetches_and_pins_validation(fresh, hub, capsys):
    dataset.download(2)
    names = sorted(f.name for f in (fresh / "base_data").iterdir())
    assert names == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_01822.parquet",
    ]
    assert read("val", Path("hub"))[0] == "shard 1822 text 0"
    assert len(read("train", Path("hub"))) == 18


def test_no_disk_space_is_one_line_and_loses_nothing(base_model, monkeypatch, capsys):
    before = sorted(base_model.iterdir())
    flags = BASE.replace("--num-iterations=4", "--num-iterations=5") + " --tag=full"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.checkpoint.save_file", full)
    assert "No space left" in fails(monkeypatch, capsys, "base_train", flags)
    assert sorted(base_model.iterdir()) == before


def test_prompt_longer_than_the_context(base_model, monkeypatch, capsys):
    printed = fails(monkeypatch, capsys, "chat_cli", "--source=base -p " + "word" * 500)
    assert "context" in printed or "tokens" in printed


def test_port_in_use(base_model, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in fails(
            monkeypatch, capsys, "chat_web", f"--source=base --port={port}"
        )


def test_flags_win_over_the_preset(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    assert parse_config(BaseConfig, "base_train", []).max_seq_len == 256
    assert parse_config(BaseConfig, "base_train", ["--depth=6"]).depth == 6
    gpu = parse_config(BaseConfig, "base_train", ["--preset", "gpu8"])
    assert (gpu.depth, gpu.total_batch_size) == (20, 524_288)
    alone = parse_config(BaseConfig, "base_train", ["--overwrite", "--depth=5"])
    assert alone.overwrite is True and alone.depth == 5


@pytest.mark.parametrize("preset", ["cpu", "gpu1", "gpu8", "gpu-lab"])
def test_presets_name_existing_options(preset, monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRESET", "")  # --preset sets it, for this process
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / "nanochat" / "settings.ini")
    stages = {key.split(".")[0] for key in settings[preset]}
    for stage in stages:
        command = COMMANDS[stage]
        kind = getattr(import_module(command.module), command.config)
        parse_config(kind, stage, ["--preset", preset])


def test_the_lab_fits_five_minutes_and_fetches_nothing(monkeypatch):
    "By the plan: pretraining takes under two minutes of an H100, on embedded text."
    monkeypatch.setenv("NANOCHAT_PRESET", "gpu-lab")
    base = parse_config(BaseConfig, "base_train", [])
    vocab = int(read_preset("tok_train", "gpu-lab")["vocab_size"])
    plan = base_plan(base, vocab, 1, 2)
    assert 20 < training_seconds(plan, GPUS["h100"], 1) < 120
    characters = sum(len(text) for text, _ in dataset.iter_documents("train"))
    assert 7 < plan.tokens / (characters / 4.15) < 9  # passes over the text
    assert base.data == "embedded"
    for stage in ("mid_train", "chat_sft"):
        chat = parse_config(ChatConfig, stage, [])
        assert chat.mixture == "small"
        make_plan(plan.model, chat.device_batch_size, chat.total_batch_size, 10)


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("preset", ["gpu-lab", "gpu1"])
def test_a_speedrun_for_gpus_says_that_there_is_none(tmp_path, preset):
    text = (ROOT / "speedrun.sh").read_text()
    text = text.replace("bash dev/setup.sh run", "true")
    text = text.replace('cd "$(dirname', f'cd "{ROOT}" # "$(dirname')
    text = text.replace(".venv/bin/python", sys.executable)
    script = tmp_path / "speedrun.sh"
    script.write_text(text)
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    env.pop("NANOCHAT_PRESET", None)
    done = subprocess.run(
        ["bash", str(script), "--preset", preset],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: preset {preset}")
    assert "needs a GPU" in done.stderr and not (tmp_path / "base").exists()


def test_embedded_manifest_is_complete():
    manifest = json.loads(dataset.data_path("manifest.json").read_text())
    assert (
        Path(manifest["validation"]).name
        == dataset.validation_file(dataset.list_files("embedded")).name
    )
    assert get_base_dir() and shutil.which("bash")
