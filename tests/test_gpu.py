"""dev/gpu.py: all of it on the CPU, and what a broken section costs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "dev"))

import gpu_sections
from gpu_sections.pipeline import spread
from gpu_sections.speed import sort_kernels
from gpu_sections.waiting import overlap

# It runs its sections as groups of processes, for minutes.
pytestmark = [pytest.mark.posix, pytest.mark.slow, pytest.mark.build]

MAY_SKIP = {}  # section -> why; none has a reason to where the developer's packages are


def gpu(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    "Run dev/gpu.py as a user does."
    told = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"} | env
    command = [sys.executable, str(ROOT / "dev" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=told, cwd="/")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "What a run of everything on the CPU says and records."
    file = tmp_path_factory.mktemp("gpu") / "record.json"
    done = gpu("--tiny", "--record", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


def broken(names: str, tmp_path, *more: str):
    "Run sections of tests/gpu_broken.py; return exit code, what was said, the record."
    file = tmp_path / "broken.json"
    extra = ROOT / "tests" / "gpu_broken.py"
    arguments = ["--tiny", "--only", names, "--record", str(file), *more]
    done = gpu(*arguments, GPU_EXTRA_SECTIONS=str(extra))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, json.loads(file.read_text())["sections"]


# ---- Everything, small


@pytest.mark.timeout(900)
def test_every_section_runs_on_the_cpu(tiny):
    _, record = tiny
    asked = {name for name, section in gpu_sections.SECTIONS.items() if section.asked}
    assert record["sections"].keys() == gpu_sections.SECTIONS.keys() - asked
    for name, found in record["sections"].items():
        if found["status"] != "ok":
            assert found["status"] == "skipped", (name, found["why"])
            assert MAY_SKIP.get(name) == found["why"], name


@pytest.mark.timeout(900)
def test_the_record_says_where_and_what(tiny):
    _, record = tiny
    assert record["tiny"] is True and record["seconds"] > 0 and record["date"]
    assert record["environment"]["torch"] and record["device"]["name"] == "CPU"
    wanted = {"name", "memory_gib", "driver", "cuda", "capability", "key"}
    assert record["device"].keys() == wanted
    fields = {"status", "why", "key", "seconds", "kernels", "checks", "figures"}
    for name, found in record["sections"].items():
        assert found.keys() == fields, name
        for check in found["checks"]:
            assert check["ok"] and check["value"] <= check["bound"], (name, check)
        if gpu_sections.SECTIONS[name].right:
            assert found["checks"], name


@pytest.mark.timeout(900)
def test_the_figures_that_plan_and_book_read(tiny):
    figures = {name: s["figures"] for name, s in tiny[1]["sections"].items()}
    sizes = {"depth", "sequence_len", "vocab_size", "device_batch_size", "mfu"}
    sizes |= {"tokens_per_second", "peak_bytes", "counted_bytes", "compile_seconds"}
    sizes |= {"step_seconds", "optimizer_seconds", "optimizer_share"}
    assert sizes <= figures["training"].keys()
    row = {"lever", "tokens_per_second", "peak_bytes", "note"}
    assert all(row >= r.keys() for r in figures["levers"]["rows"])
    parts = {
        "matrix products",
        "attention",
        "loss",
        "element-wise",
        "optimizer",
        "idle",
    }
    assert figures["profile"]["parts"].keys() == parts
    row = {"how", "batch_size", "context", "tokens_per_second", "share_of_bound"}
    assert all(row <= r.keys() for r in figures["decoding"]["rows"])
    ways = {r["how"] for r in figures["decoding"]["rows"]}
    assert ways == {"eager", "graph", "compiled graph", "transformers"}
    fp8 = {"tokens_per_second", "ratio", "bpb_bf16", "bpb_fp8"}
    assert fp8 <= figures["fp8"].keys()


@pytest.mark.timeout(900)
def test_the_table_comes_last(tiny):
    said, record = tiny
    table = said[said.index("\nsection ") :].splitlines()
    shown = [line.split()[0] for line in table[2 : 2 + len(record["sections"])]]
    assert shown == list(record["sections"])
    assert table[-1].endswith("nothing is wrong")


# ---- What a broken section costs


def test_a_broken_section_costs_itself(tmp_path):
    names = "crash,fail,memory,wrong,skip,package,hang,fine"
    code, said, found = broken(names, tmp_path)
    status = {name: s["status"] for name, s in found.items()}
    assert status == {
        "crash": "failed",
        "fail": "failed",
        "memory": "failed",
        "wrong": "wrong",
        "skip": "skipped",
        "package": "skipped",
        "hang": "timeout",
        "fine": "ok",
    }
    assert code == 1 and "NOT RIGHT: crash, fail, memory, wrong, hang" in said
    why = {name: s["why"] for name, s in found.items()}
    assert "is broken" in why["fail"] and "out of memory" in why["memory"]
    assert why["wrong"] == "not a number, too large" and why["skip"] == "no reason"
    assert why["package"] == "needs the package no_such_package, which is not installed"
    assert "4 s" in why["hang"] and "signal 11" in why["crash"]
    logs = {name: s["log"] for name, s in found.items() if "log" in s}
    assert logs.keys() == {"crash", "fail", "memory", "hang"}
    assert "Segmentation fault" in logs["crash"] and str(Path.home()) not in str(logs)
    assert found["crash"]["checks"][0]["ok"], "what was known before the crash is kept"
    assert found["wrong"]["checks"][1]["value"] is None
    assert "WRONG wrong: too large: 3, at most 2" in said
    assert "all is well" in said and found["fine"]["figures"]["odd"] is None
    gone(found["hang"]["figures"]["child"])


def gone(pid: int) -> None:
    "Wait until a process is no more, or a zombie that nobody has asked about."
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_what_is_slow_is_not_wrong(tmp_path):
    code, said, found = broken("slow,fine", tmp_path)
    assert code == 0 and "nothing is wrong" in said
    assert found["slow"]["status"] == "failed" and "is broken" in said


def test_no_section_starts_when_the_time_is_used(tmp_path):
    code, _, found = broken("fine", tmp_path, "--seconds", "0")
    assert code == 0 and found["fine"]["status"] == "skipped"
    assert found["fine"]["why"].startswith("time used up")


def test_a_second_run_adds_to_the_record(tmp_path):
    broken("fine", tmp_path)
    _, said, found = broken("skip", tmp_path)
    assert list(found) == ["fine", "skip"]
    assert "all is well" not in said


# ---- The command line


def test_list_names_every_section():
    done = gpu("--list")
    assert done.returncode == 0
    shown = [line.split()[0] for line in done.stdout.splitlines()]
    assert shown == list(gpu_sections.SECTIONS)


def test_an_unknown_section_is_one_line():
    done = gpu("--tiny", "--only", "model,speed")
    assert done.returncode == 2
    assert done.stderr == "unknown section 'speed': --list shows them\n"


def test_no_card_is_one_line():
    done = gpu("--only", "model", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("no CUDA device: ") and "--tiny" in done.stdout


def test_no_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    done = gpu("--tiny", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "cannot start: needs the package torch, which is not installed\n"
    )


def test_the_baseline_of_the_cpu(tmp_path):
    file = tmp_path / "baseline.json"
    command = [sys.executable, "dev/gpu_baseline.py", "--tiny", "--record", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found = json.loads(file.read_text())
    assert len(set(found["val_bpb"])) == 3 and found["spread"] > 0
    kept = json.loads((ROOT / "dev" / "records" / "gpu_baseline.json").read_text())
    assert kept.keys() == found.keys() and kept["steps"] == 300


# ---- What only a card would show, on made-up traces


def event(kind: str, name: str, begin: float, seconds: float, stream: int) -> dict:
    return dict(cat=kind, name=name, ts=begin, dur=seconds, args={"stream": stream})


def test_copies_beside_kernels_are_counted():
    copy, kernel = "Memcpy HtoD (Pinned -> Device)", "gemm"
    events = [
        event("kernel", kernel, 0, 10, 7),
        event("gpu_memcpy", copy, 2, 1, 13),  # beside it
        event("gpu_memcpy", copy, 11, 1, 13),  # alone
        event("gpu_memcpy", copy, 4, 1, 7),  # of the same stream
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 4, 1, 13),
        {"ph": "M", "name": "process_name"},
    ]
    assert overlap(events) == (3, 1)


def test_kernels_are_sorted_by_their_names():
    spent = {
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopB_TNT": 1.0,
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": 2.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": 4.0,
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": 8.0,
        "triton_poi_fused_add_mul_7": 16.0,
        "void at::native::vectorized_elementwise_kernel<4>": 32.0,
    }
    parts = sort_kernels(spent)
    assert parts == {"attention": 12, "matrix products": 3, "element-wise": 48}


def test_the_spread_of_three_seeds_is_students():
    # 95 % of t with two degrees of freedom lie within 4.303.
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(4.303 * (4 / 3) ** 0.5)
