"""The workflows of GitHub: their form, and what two linters say where installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict:
    "Read a workflow; YAML 1.1 takes the key `on` for True."
    told = yaml.safe_load(path.read_text("utf-8"))
    return {("on" if key is True else key): value for key, value in told.items()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_little_and_pins_what_it_uses(path):
    workflow = load(path)
    assert {"name", "on", "jobs"} <= set(workflow)
    assert workflow["permissions"] == {}  # each job asks for what it needs
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for permission, level in job["permissions"].items():
            assert (permission, level) in {("contents", "read"), ("id-token", "write")}
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step
                assert not step["uses"].startswith("actions/checkout") or (
                    step["with"]["persist-credentials"] is False
                )


def test_what_the_workflows_cover():
    ci, wheels = (
        load(ROOT / ".github/workflows" / f"{n}.yml") for n in ("ci", "wheels")
    )
    matrix = ci["jobs"]["systems"]["strategy"]["matrix"]
    assert {s.split("-")[0] for s in matrix["system"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.10", "3.13"]
    assert any(s.get("run") == "bash .ci/run" for s in ci["jobs"]["all"]["steps"])
    for step in ci["jobs"]["systems"]["steps"]:
        for name in re.findall(r"tests/\w+\.py", step.get("run", "")):
            assert (ROOT / name).is_file(), name
    names = [
        t["name"] for t in wheels["jobs"]["build"]["strategy"]["matrix"]["include"]
    ]
    assert names == ["linux-x86_64", "linux-aarch64", "macos-arm64", "windows-x86_64"]
    publish = wheels["jobs"]["publish"]
    assert "refs/tags/v" in publish["if"] and publish["permissions"] == {
        "id-token": "write"
    }
    assert "secrets." not in (ROOT / ".github/workflows/wheels.yml").read_text("utf-8")


LINTERS = {"actionlint": [], "zizmor": ["--offline", "--no-progress", "--quiet"]}


@pytest.mark.parametrize("name", LINTERS)
def test_linters_have_nothing_to_say(name):
    program = os.environ.get(f"NANOCHAT_{name.upper()}") or shutil.which(name)
    if not program:
        pytest.skip(f"{name} is not installed")
    command = [program, *LINTERS[name], *map(str, WORKFLOWS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
