"""Commands and options as nanochat's README and scripts spell them."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nanochat import common, dataset, report
from nanochat.chat_cli import ChatCliConfig
from nanochat.chat_eval import ChatEvalConfig
from nanochat.cli import COMMANDS, main
from nanochat.common import ELSEWHERE, SAME, UserError, option_types, parse_config
from nanochat.config import BaseConfig, ChatConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRESET", "cpu")


def config_of(command: str) -> type:
    "Return the class of a command's options."
    entry = COMMANDS[command]
    return getattr(import_module(entry.module), entry.config)


def read(command: str, line: str):
    "Parse a line as the command does."
    return parse_config(config_of(command), command, line.split())


# What somebody types who knows nanochat, and the option of ours that it sets.
WORKS = [
    ("base_train", "-- --depth=24", "depth", 24),
    ("base_train", "--target-param-data-ratio=8", "param_data_ratio", 8.0),
    ("base_train", "--target_param_data_ratio=8", "param_data_ratio", 8.0),
    ("base_train", "--model-tag=d12", "tag", "d12"),
    ("base_train", "--model_tag d12", "tag", "d12"),
    ("base_train", "--device-type=cpu", "device", "cpu"),
    ("base_train", "--max_seq_len=512", "max_seq_len", 512),
    ("base_train", "--num-iterations=5000", "num_iterations", 5000),
    ("base_train", "--fp8 --depth=24", "fp8", True),
    ("base_train", "--run=dummy --depth=5", "depth", 5),
    ("base_train", "--core-metric-every=-1 --depth=5", "depth", 5),
    ("base_train", "--sample-every=-1 --save-every=-1", "save_every", -1),
    ("base_train", "--window-pattern=L --depth=5", "depth", 5),
    ("base_train", "--resume-from-step=-1 --target-flops=-1.0", "depth", 3),
    ("base_eval", "--max-per-task=16", "core_items", 16),
    ("base_eval", "--device-batch-size=1 --split-tokens=16384", "eval_tokens", 16384),
    ("base_eval", "--model-tag=d20 --step=10", "tag", "d20"),
    ("mid_train", "--device_batch_size=8 --run=dummy", "device_batch_size", 8),
    ("mid_train", "--model_tag=d20", "source_tag", "d20"),
    ("chat_sft", "--init-lr-frac=0.8", "lr_frac", 0.8),
    ("chat_sft", "--load-optimizer=1", "warm_start", True),
    ("chat_sft", "--load-optimizer 0", "warm_start", False),
    ("chat_sft", "--source=mid --num-iterations=1500", "num_iterations", 1500),
    ("chat_rl", "--model-tag=d20 --model-step=100", "step", 100),
    ("chat_rl", "--run=dummy --num-epochs=1 --top-k=50", "top_k", 50),
    ("chat_eval", "-i mid", "source", "mid"),
    ("chat_eval", "-a ARC-Easy -x 20 -m 128", "max_problems", 20),
    ("chat_eval", "--task-name GSM8K -n 4 -t 0.5 -k 10", "tasks", "GSM8K"),
    ("chat_eval", "-g d20 -s 650 -b 8", "step", 650),
    ("chat_cli", "-i sft -g d20 -s 650 -t 0.5 -k 40", "tag", "d20"),
    ("chat_web", "-n 1 -m 256 -p 9000", "max_tokens", 256),
    ("tok_train", "--max_chars=2000000000 --vocab_size=65536", "vocab_size", 65536),
]
for name in (
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "weight_decay",
):
    for stage in ("base_train", "chat_rl", "chat_sft"):
        WORKS.append((stage, f"--{name.replace('_', '-')}=0.5", name, 0.5))
        WORKS.append((stage, f"--{name}=0.5", name, 0.5))


@pytest.mark.parametrize("command, line, name, value", WORKS)
def test_nanochats_spelling_works(command, line, name, value):
    config = read(command, line)
    assert common.flat_values(config)[name] == value


# What asks for something else, and the words that help.
NAMES_OURS = [
    ("base_train", "--run=d12", "--tracker wandb"),
    ("base_train", "--core-metric-every=999999", "base_eval"),
    ("base_train", "--core_metric_every 2000", "base_eval"),
    ("base_train", "--core-metric-max-per-task=500", "--core-items"),
    ("base_train", "--sample-every=100", "base_eval"),
    ("base_train", "--head-dim=64", "leave it out"),
    ("base_train", "--window-pattern=SSSL", "--arch modern"),
    ("base_train", "--target-flops=1e18", "--num-iterations"),
    ("base_train", "--warmup-steps=40", "--warmup-ratio"),
    ("base_train", "--resume-from-step=100", "resumes by itself"),
    ("base_train", "--fp8-recipe=rowwise", "--fp8"),
    ("mid_train", "--max-seq-len=1024", "base_train"),
    ("mid_train", "--max_seq_len=1024", "base_train"),
    ("mid_train", "--model-step=100", "--source-tag"),
    ("mid_train", "--step=100", "--source-tag"),
    ("mid_train", "--dry_run=1", "base_train"),
    ("chat_sft", "--source=base", "--source-tag"),
    ("chat_sft", "-i base", "--source-tag"),
    ("chat_sft", "--mmlu-epochs=3", "--mixture"),
    ("chat_sft", "--gsm8k-epochs=4", "--mixture"),
    ("chat_sft", "--chatcore-every=200", "chat_eval"),
    ("chat_sft", "--chatcore-max-cat=20", "chat_eval"),
    ("chat_sft", "--chatcore-max-sample=24", "chat_eval"),
    ("chat_sft", "--eval_steps=100", "--eval-tokens"),
    ("chat_sft", "--eval_metrics_every=200", "chat_eval"),
    ("chat_sft", "--eval_metrics_max_problems=1024", "chat_eval"),
    ("chat_sft", "--target_examples_per_step=32", "--total-batch-size"),
    ("chat_rl", "--num-epochs=2", "--num-steps"),
    ("base_eval", "--hf-path openai-community/gpt2", "import_model"),
    ("base_eval", "--eval bpb", "--core none"),
    ("chat_web", "--num-gpus 4", "one GPU"),
    ("chat_web", "-n 4", "one GPU"),
    ("chat_cli", "-d float32", "NANOCHAT_DTYPE"),
    ("chat_eval", "--dtype float32", "NANOCHAT_DTYPE"),
]


@pytest.mark.parametrize("command, line, words", NAMES_OURS)
def test_what_is_different_here_is_named(command, line, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanochat", command, *line.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in said
    assert said.startswith("error: ") and "\n" not in said


def test_the_table_is_used_to_the_last_line_and_names_what_exists():
    tried = " ".join(f" {line}" for _, line, *_ in [*WORKS, *NAMES_OURS])
    tried = tried.replace("=", " ") + " "
    for name in [*SAME, *ELSEWHERE]:
        spelled = {f" {name} ", f" --{name} ", f" --{name.replace('_', '-')} "}
        assert any(word in tried for word in spelled), f"no line tries {name}"
    options = {o for command in COMMANDS for o in option_types(config_of(command))}
    assert {name for names in SAME.values() for name in names} <= options | {"num_gpus"}
    for _, instead in ELSEWHERE.values():
        for word in instead.replace(",", " ").replace(";", " ").split():
            if word.startswith("--"):
                assert word[2:].replace("-", "_") in options, instead


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError, match=r"--run is .*; --head-dim is .*"):
        read("base_train", "--run=d12 --depth=6 --head-dim=64")


def test_words_of_a_prompt_are_no_options():
    words = ["-p", "what does --run=x do?", "-t", "0.5"]
    config = parse_config(ChatCliConfig, "chat_cli", words)
    assert (config.prompt, config.temperature) == ("what does --run=x do?", 0.5)


def test_a_typo_is_still_explained_by_what_is_close(capsys):
    with pytest.raises(SystemExit):
        read("base_train", "--depht=6")
    assert "--depth" in capsys.readouterr().err


def test_a_refused_value_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanochat", "chat_eval", "--batch-size=0"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --batch-size is 0: use at least 1\n"
    with pytest.raises(UserError):
        ChatEvalConfig(batch_size=0)


def test_help_tells_what_each_option_is_for(capsys):
    with pytest.raises(SystemExit):
        parse_config(ChatConfig, "chat_sft", ["--help"])
    assert "a .jsonl file of your own conversations" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_config(BaseConfig, "base_train", ["--help"])
    assert "number of layers" in capsys.readouterr().out


def test_help_lists_a_commands_own_options_first(capsys):
    with pytest.raises(SystemExit):
        parse_config(BaseConfig, "base_train", ["--help"])
    shown = capsys.readouterr().out
    places = [shown.index(option) for option in ("--depth", "--data", "--seed")]
    assert places == sorted(places)


def test_the_module_of_the_report_generates_and_resets(monkeypatch, capsys):
    built = []
    monkeypatch.setattr(report, "show_report", built.append)
    for action in ("reset", "generate"):
        monkeypatch.setattr(sys, "argv", ["report", action])
        report.main()
        assert len(built) == (action == "generate")
    assert "nothing to reset" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report", "print"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("module", ["nanochat.report", "nanochat.dataset"])
def test_modules_that_nanochat_runs_do_something(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"python -m {module}" in done.stdout


@pytest.mark.parametrize("line", ["-n 240", "--num-files 240 --num-workers 4"])
def test_download_takes_nanochats_options(line, monkeypatch):
    asked = []
    monkeypatch.setattr(dataset, "download", lambda *given: asked.append(given))
    monkeypatch.setattr(sys, "argv", ["dataset", *line.split()])
    dataset.main()
    assert asked == [(240, 4, "")]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["nanochat", "scripts"])
def test_base_loss_is_base_eval_without_core(way, monkeypatch, capsys, base_model):
    words = ["--eval-tokens=256", "--bigram-chars=0"]
    if way == "nanochat":
        monkeypatch.setattr(sys, "argv", ["nanochat", "base_loss", *words])
        main()
        said = capsys.readouterr().out
    else:
        command = [sys.executable, "-m", "scripts.base_loss", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert "core=none" in said and "val_bpb" in said


@pytest.mark.posix
@pytest.mark.parametrize(
    "script, options", [("speedrun.sh", ""), ("runcpu.sh", "--preset cpu")]
)
def test_scripts_in_runs_call_the_speedrun(script, options, tmp_path):
    "With the real speedrun replaced by one that says how it was called."
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / script
    copy.write_text((ROOT / "runs" / script).read_text())
    (tmp_path / "speedrun.sh").write_text('echo "$*"\n')
    done = subprocess.run(
        ["bash", str(copy), "--depth=4"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{options} --depth=4".strip()
