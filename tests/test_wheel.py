"""The package travels: a wheel, an empty folder, an empty home, and every command runs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = (
    "--depth=1 --max-seq-len=64 --device-batch-size=2 --total-batch-size=256 "
    "--num-iterations=2 --eval-every=-1 --eval-tokens=256"
)
CHAT = (
    "--device-batch-size=2 --total-batch-size=256 --num-iterations=2 --eval-every=-1 "
    "--eval-tokens=256"
)
# Each command, and a word that its output must have; the order is that of a run.
JOURNEY = [
    ("nanochat --help", "usage: nanochat COMMAND"),
    ("nanochat --version", "nanochat 0."),
    ("nanochat plan", "parameters"),
    ("nanochat plan --gpu h100 --gpus 8 --json", '"parameters"'),
    ("python -m nanochat plan --gpu h100 --gpus 8", "parameters"),
    ("nanochat tok_train --vocab-size=400 --max-chars=50000 --numbers=1", "tokens"),
    (f"nanochat base_train {BASE}", "step"),
    ("nanochat base_loss --eval-tokens=256 --bigram-chars=0", "val_bpb"),
    (f"nanochat mid_train {CHAT}", "step"),
    (f"nanochat chat_sft {CHAT}", "step"),
    ("nanochat chat -p hi --max-tokens=4", "chat"),
    ("nanochat report", "report.md"),
    ("python -m nanochat.report generate", "report.md"),
    ("nanochat export_hf --folder=out", "out"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.build,
    pytest.mark.skipif(not shutil.which("cargo"), reason="there is no cargo"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Build the wheel; the second time the compiled crate is there already."
    out = tmp_path_factory.mktemp("wheel")
    env = dict(os.environ)
    env.setdefault("CARGO_TARGET_DIR", str(ROOT / "rustbpe" / "target"))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    # Without isolation: maturin is installed, and nothing need be fetched.
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.timeout(900)
def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("settings.ini", "py.typed", "ui/index.html", "data/manifest.json"):
        assert f"nanochat/{needed}" in names, needed
    for needed in ("__init__.pyi", "py.typed"):  # types of the compiled crate
        assert f"rustbpe/{needed}" in names, needed
    unwanted = (
        "_nbdev",
        "_modidx",
        "__pycache__",
        "tests/",
        "scripts/",
        "dev/",
        "nbs/",
    )
    for word in unwanted:
        assert [name for name in names if word in name] == [], word
    assert {name.split("/")[0].split("-")[0] for name in names} <= {
        "nanochat",
        "rustbpe",
    }
    entries = next(n for n in names if n.endswith("entry_points.txt"))
    told = zipfile.ZipFile(wheel).read(entries).decode().split("\n")
    assert [line for line in told if "=" in line] == ["nanochat=nanochat.cli:main"]


@pytest.fixture(scope="module")
def traveller(wheel, tmp_path_factory):
    "Run a command of the installed wheel, far from the checkout."
    there = tmp_path_factory.mktemp("far away")
    site = there / "site"
    home = there / "home"
    place = there / "place"
    home.mkdir()
    place.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    # The dependencies come from this environment; its editable install of the checkout
    # does not, since a folder on PYTHONPATH has no .pth files read.
    packages = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    env = {
        "PATH": f"{site / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join([str(site), *sorted(packages)]),
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "NANOCHAT_PRESET": "cpu",
    }

    def run(line: str) -> subprocess.CompletedProcess:
        words = line.split()
        program = {
            "nanochat": [sys.executable, "-S", str(site / "bin" / "nanochat")],
            "python": [sys.executable, "-S"],
        }[words[0]]
        command = [*program, *words[1:]]
        return subprocess.run(
            command, env=env, cwd=place, capture_output=True, text=True
        )

    return run


@pytest.mark.timeout(600)
def test_the_code_comes_from_the_wheel(traveller):
    code = "python -c print(__import__('nanochat').__file__,__import__('rustbpe').__file__)"
    done = traveller(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("far away") == 2 and str(ROOT) not in done.stdout


@pytest.mark.timeout(900)
def test_every_command_runs_from_an_empty_folder(traveller):
    for line, word in JOURNEY:
        done = traveller(line)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{line}\n{said}"
        assert word in said, f"{line}\n{said}"
        assert str(ROOT) not in said, f"{line}\n{said}"
        if line.endswith("--json"):
            assert json.loads(done.stdout)["parameters"] > 5e8
