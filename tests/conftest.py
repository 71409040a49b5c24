"""A tiny tokenizer and a tiny trained model, made once for all tests."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# What is compiled, above all the headers of PyTorch, is compiled once for all tests. The
# cache of the user is not theirs: a killed run may have left half a library in it.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="nanochat-compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled  # the workers of xdist inherit it
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

# Deceive this process and its children, before anything of the package is imported.
collect_ignore = ["no_posix"]
if os.environ.get("NANOCHAT_HIDE_POSIX"):
    collect_ignore = []
    folder = str(Path(__file__).parent / "no_posix")
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, *before]))
    sys.path.insert(0, folder)
    sys.modules.pop("sitecustomize", None)  # the system's own
    import sitecustomize  # noqa: F401 (what it does is done when it is imported)

from functools import partial
from itertools import islice

import pytest

# What imports PyTorch is imported where it is used: the process that only hands tests to
# others need not wait for it.

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    depth=1,
    max_seq_len=64,
    device_batch_size=2,
    total_batch_size=256,
    num_iterations=8,
    eval_every=-1,
    eval_tokens=256,
    save_every=-1,
    data="embedded",
    device="cpu",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "A test that trains a model first is slow, whatever it does with it."
    for item in items:
        if "base_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tiny() -> dict:
    "Options of a pretraining run that takes about a second."
    return dict(TINY)


@pytest.fixture(scope="session")
def tokenizer():
    "A tokenizer of 400 tokens, trained on forty documents."
    from nanochat.dataset import iter_documents
    from nanochat.tokenizer import RustBPETokenizer

    texts = (text for text, _ in islice(iter_documents("train"), 40))
    return RustBPETokenizer.train_from_iterator(texts, 400)


@pytest.fixture
def base_dir(tmp_path, monkeypatch, tokenizer):
    "An empty run folder with the tiny tokenizer."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def base_model(base_dir, tiny):
    "The folder of a tiny pretrained model, `d1`."
    from nanochat.config import BaseConfig
    from nanochat.stage import pretrain

    pretrain(BaseConfig(**tiny))
    return base_dir / "base_checkpoints" / "d1"


@pytest.fixture(scope="session")
def fork_server():
    "Return a function that runs a job of fork_server.py and returns its exit code."
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_server.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(job: dict) -> int:
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        return int(child.stdout.readline())

    yield run
    child.stdin.close()
    child.wait()


@pytest.fixture
def command(request, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs `nanochat ARGV` as a user does, in a process of its own.

    Where the system can fork, that process has everything imported already, and takes a
    tenth of a second instead of three. Variables of NANOCHAT are those of the test.
    """
    if hasattr(os, "fork"):
        return partial(in_a_fork, request.getfixturevalue("fork_server"), tmp_path)
    return in_a_new_process


@pytest.fixture
def script(request, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    "Return a function that runs a Python script of the checkout, as `command` does."
    if hasattr(os, "fork"):
        return partial(
            script_in_a_fork, request.getfixturevalue("fork_server"), tmp_path
        )
    return script_in_a_new_process


def script_in_a_fork(
    serve: Callable[[dict], int], folder: Path, path: str, *argv: str
) -> subprocess.CompletedProcess:
    "Run a script in a fork of the server."
    return in_a_fork(serve, folder, *argv, program=str(ROOT / path))


def script_in_a_new_process(path: str, *argv: str) -> subprocess.CompletedProcess:
    "Run a script in a new interpreter."
    command = [sys.executable, path, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def in_a_fork(
    serve: Callable[[dict], int],
    folder: Path,
    *argv: str,
    text: str = "",
    ranks: int = 1,
    program: str = "",  # a script to run instead of `nanochat`
    **changes: str,
) -> subprocess.CompletedProcess:
    "Run a command in a fork of the server, or in one for each rank."
    files = {name: folder / f"command.{name}" for name in ("out", "err", "stdin")}
    files["stdin"].write_text(text)
    ours = {"NANOCHAT_BASE_DIR": str(folder / "base")}
    ours |= {k: v for k, v in os.environ.items() if k.startswith("NANOCHAT_")}
    job = {"argv": argv, "environment": ours | changes, "umask": 0o022}
    job |= {"folder": str(ROOT)} | {name: str(file) for name, file in files.items()}
    job |= {"program": program} if program else {}
    code = serve(job | {"ranks": ranks})
    names = [""] if ranks == 1 else [f".{rank}" for rank in range(ranks)]
    out = "".join((folder / f"command.out{n}").read_text("utf-8") for n in names)
    err = "".join((folder / f"command.err{n}").read_text("utf-8") for n in names)
    return subprocess.CompletedProcess(argv, code, out, err)


def in_a_new_process(
    *argv: str, text: str = "", ranks: int = 1, **changes: str
) -> subprocess.CompletedProcess:
    "Run a command in a new interpreter, or in one for each rank."
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    several = [*launch, "-m"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, "-m", *several, "nanochat", *argv],
        cwd=ROOT,
        env=os.environ | changes,
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
