"""Save the results of a speedrun as evidence, in one JSON file without paths.

python dev/record.py dev/records/speedrun_cpu.json
"""

import json
import subprocess
import sys
from datetime import date

from nanochat.chat_cli import ChatCliConfig, reply
from nanochat.common import environment, get_base_dir, read_log
from nanochat.report import read_sections, stage_log
from nanochat.server import load_chat_model

# The three questions of chapter 1's opening bet, and the first that people ask.
QUESTIONS = (
    "What is 37 + 48?",
    "What is the capital of Estonia?",
    "How do you spell beauty?",
    "Who are you?",
)
SAMPLING = ChatCliConfig(temperature=0.0, top_k=50, max_tokens=48)  # greedy


def slim(section: dict) -> dict:
    "Drop per-item results, which are large, and paths, which are private."
    if not isinstance(section, dict):
        return section
    drop = {"checkpoint", "path", "items", "scores", "results"}
    kept = {k: slim(v) for k, v in section.items() if k not in drop}
    if "samples" in kept:
        kept["samples"] = kept["samples"][:4]
    return kept


def curve(path) -> list:
    "Reduce a log to about 150 points (step, loss or reward)."
    points = [(r["step"], r.get("loss", r.get("reward"))) for r in read_log(path)]
    points = [(step, round(y, 4)) for step, y in points if y is not None]
    return points[:: max(1, len(points) // 150)]


def interview() -> dict:
    "Ask the final model each question in a chat of its own; keep what it says."
    engine, name = load_chat_model()
    chats = []
    for question in QUESTIONS:
        asked = {"role": "user", "content": question}
        print(f"{question}  ->  ", end="")
        said = reply(engine, [asked], SAMPLING)
        chats.append({"messages": [asked, said]})
    names = ("temperature", "top_k", "max_tokens")
    sampling = {setting: getattr(SAMPLING, setting) for setting in names}
    return {"model": name, **sampling, "conversations": chats}


def main(target: str) -> None:
    "Collect the stages' results and logs."
    base = get_base_dir()

    # A stage that was not run has no section; one without a log has no curve.
    sections = read_sections(base)
    git = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "command": "bash speedrun.sh",
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "environment": environment(),
        "sections": {stage: slim(section) for stage, section in sections.items()},
        "curves": {
            stage: curve(stage_log(base, stage, section))
            for stage, section in sections.items()
            if stage_log(base, stage, section).is_file()
        },
        "chat": interview(),
    }
    with open(target, "w") as file:
        json.dump(record, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(f"{target}: {len(record['sections'])} sections of {base}")


if __name__ == "__main__":
    main(sys.argv[1])
