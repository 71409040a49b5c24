"""What is each optimisation of the crate worth? Take them out, one at a time, and measure.

python dev/ablate_crate.py                    the embedded training text, three minutes
python dev/ablate_crate.py --record FILE      keep the table as Markdown

Every variant is the crate's source with a line or two replaced; a line that is no longer
there stops the script. All variants must give the same ids. Each measurement is a process
on one thread; the variants take turns, and the table shows medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench_tokenizers import cpu_name

from nanochat.dataset import iter_documents

CRATE = Path(__file__).resolve().parents[1] / "rustbpe"
FX, SIP = "use rustc_hash::FxHashMap;", "use std::collections::HashMap as FxHashMap;"
VARIANTS = {  # name -> [(file, what stands there, what replaces it)]
    "as committed": [],
    "the regex engine instead of the scanner": [
        ("split.rs", "match Rules::of(pattern) {", 'match Rules::of("") {')
    ],
    "no blocks: every chunk by `scan`": [
        ("split.rs", "if i >= 64 {", "if i < usize::MAX {")
    ],
    "chunks as strings instead of numbers": [
        ("chunk.rs", "if n > LONGEST {", "if n < usize::MAX {")
    ],
    "the standard library's hash function": [
        ("chunk.rs", FX, SIP),
        ("train.rs", FX, SIP),
    ],
    "words in no order": [
        ("train.rs", "short.par_sort_unstable();", ""),
        ("train.rs", "long.par_sort_unstable();", ""),
    ],
    "all pairs in the heap": [
        ("train.rs", "(self.floor / 8).max(1)", "1"),
    ],
    "no table of recent chunks": [
        (
            "chunk.rs",
            "        self.0.get(key)\n",
            "        self.0.get(key).filter(|_| false)\n",
        )
    ],
    "a heap for short chunks too": [
        ("encode.rs", "None if chunk.len() <= SHORT", "None if chunk.len() <= 1"),
        (
            "encode.rs",
            "self.merge_short(chunk, out);\n        let new",
            "self.merge_long(chunk, out);\n        let new",
        ),
    ],
}
PHASES = ("split", "count", "merge", "encode", "encode, 2,048 tokens")


def build(changes: list, folder: Path) -> Path:
    "Compile a variant of the crate; return the program that times its phases."
    source = folder / "crate"
    shutil.rmtree(source, ignore_errors=True)
    ignore = shutil.ignore_patterns("target", "fuzz")
    shutil.copytree(CRATE, source, ignore=ignore)
    for name, old, new in changes:
        file = source / "src" / name
        text = file.read_text("utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{name} has {text.count(old)} times: {old}")
        file.write_text(text.replace(old, new), "utf-8")
    command = ["cargo", "build", "-q", "--release", "--example", "phases"]
    env = os.environ | {"CARGO_TARGET_DIR": str(folder / "target")}
    env["RUSTFLAGS"] = "-Awarnings"
    subprocess.run(command, cwd=source, env=env, check=True)
    return folder / "target" / "release" / "examples" / "phases"


def main(repeats: int, record: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = [text for text, _ in iter_documents("train", data="embedded")]
        text = folder / "text"
        text.write_text("\0".join(docs), "utf-8")
        programs = {}
        for i, (variant, changes) in enumerate(VARIANTS.items()):
            programs[variant] = shutil.copy(build(changes, folder), folder / str(i))
        env, results = (
            os.environ | {"RAYON_NUM_THREADS": "1"},
            {v: [] for v in VARIANTS},
        )
        for _ in range(repeats):
            for variant, program in programs.items():
                done = subprocess.run(
                    [program, text], env=env, capture_output=True, text=True, check=True
                )
                results[variant].append(json.loads(done.stdout))
        size = text.stat().st_size / 1e6
    hashes = {run["hash"] for runs in results.values() for run in runs}
    if len(hashes) > 1:
        raise SystemExit(f"the variants give different ids: {hashes}")
    middle = lambda runs, phase: statistics.median(run[phase] for run in runs)
    lines = [
        "# The crate without each of its optimisations\n",
        f"`python dev/ablate_crate.py`, {time.strftime('%d %B %Y')}: {size:.1f} MB of text, "
        f"32,768 tokens, one thread, {cpu_name()}. Milliseconds, medians of "
        f"{repeats} processes that took turns; all variants give the same ids.\n",
        f"| | {' | '.join(PHASES)} |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    for variant, runs in results.items():
        cells = []
        for phase in PHASES:
            base, now = middle(results["as committed"], phase), middle(runs, phase)
            times = f" ({now / base:.1f}×)" if now > 1.08 * base else ""
            cells.append(f"{1000 * now:.0f}{times}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if record:
        Path(record).write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=9, help="processes of each variant"
    )
    parser.add_argument("--record", default="", help="file for the table")
    options = parser.parse_args()
    main(options.repeats, options.record)
