"""Measure what each optimization of the crate is worth by removing them one at a time.

python dev/ablate_crate.py                    on the embedded training text; three minutes
python dev/ablate_crate.py --record FILE      also save the table as Markdown
python dev/ablate_crate.py --tiny             two unoptimized variants on little text

Every variant is the crate's source with a line or two replaced; the script stops if such a
line no longer exists. All variants must give the same ids. Each measurement is a separate
single-threaded process; variants alternate, and the table shows medians.
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
BUILT = CRATE / "target"  # shared, so that only the crate itself is compiled again
FX = "use rustc_hash::FxHashMap;"
SIP = "use std::collections::HashMap as FxHashMap;"
VARIANTS = {  # name -> [(file, original text, replacement)]
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
TINY = ("as committed", "no table of recent chunks")
PHASES = ("split", "count", "merge", "encode", "encode, 2,048 tokens")


def copy_crate(changes: list, source: Path) -> None:
    "Copy the crate's source and apply a variant's replacements."
    shutil.rmtree(source, ignore_errors=True)
    ignore = shutil.ignore_patterns("target", "fuzz")
    shutil.copytree(CRATE, source, ignore=ignore)
    for name, old, new in changes:
        file = source / "src" / name
        text = file.read_text("utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{name} has {text.count(old)} times: {old}")
        file.write_text(text.replace(old, new), "utf-8")


def build(changes: list, folder: Path, profile: str) -> Path:
    "Compile a variant of the crate; return the program that times its phases."
    source = folder / "crate"
    copy_crate(changes, source)
    command = ["cargo", "build", "-q", "--profile", profile, "--example", "phases"]
    # No RUSTFLAGS, because other flags would recompile all dependencies.
    env = os.environ | {"CARGO_TARGET_DIR": str(BUILT)}
    subprocess.run(command, cwd=source, env=env, check=True)
    place = "debug" if profile == "dev" else profile
    return BUILT / place / "examples" / "phases"


def measure(
    variants: list[str],
    repeats: int,
    docs: list[str],
    profile: str = "release",  # cargo's
) -> dict[str, list]:  # variant -> results of its runs
    "Compile the variants and run their programs alternately."
    results: dict[str, list] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text"
        text.write_text("\0".join(docs), "utf-8")
        programs = {}
        for i, variant in enumerate(variants):
            built = build(VARIANTS[variant], folder, profile)
            programs[variant] = shutil.copy(built, folder / str(i))

        # Alternate, so that a noisy minute affects all of them.
        env = os.environ | {"RAYON_NUM_THREADS": "1"}
        for _ in range(repeats):
            for variant, program in programs.items():
                done = subprocess.run(
                    [program, text], env=env, capture_output=True, text=True, check=True
                )
                results[variant].append(json.loads(done.stdout))
    hashes = {run["hash"] for runs in results.values() for run in runs}
    if len(hashes) > 1:
        raise SystemExit(f"the variants give different ids: {hashes}")
    return results


def middle(runs: list[dict], phase: str) -> float:
    "Return the median seconds of a phase."
    return statistics.median(run[phase] for run in runs)


def table(results: dict[str, list], size: float) -> list[str]:
    "Format the medians as a table; a factor marks a slowdown of more than 8 %."
    plain = results["as committed"]
    lines = [
        "# The crate without each of its optimizations\n",
        f"`python dev/ablate_crate.py`, {time.strftime('%d %B %Y')}: {size:.1f} MB of text, "
        f"32,768 tokens, one thread, {cpu_name()}. Milliseconds, medians of "
        f"{len(plain)} processes that took turns; all variants give the same ids.\n",
        f"| | {' | '.join(PHASES)} |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    for variant, runs in results.items():
        cells = []
        for phase in PHASES:
            base = middle(plain, phase)
            now = middle(runs, phase)

            # A smaller difference is not worth a mark.
            times = f" ({now / base:.1f}×)" if now > 1.08 * base else ""
            cells.append(f"{1000 * now:.0f}{times}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    "Measure, print the table and save it if asked to."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="processes per variant")
    parser.add_argument("--record", default="", help="file for the table")
    parser.add_argument("--tiny", action="store_true", help="two variants, little text")
    options = parser.parse_args()

    # The embedded text, which every machine has.
    docs = [text for text, _ in iter_documents("train", data="embedded")]
    if options.tiny:
        docs = docs[:30]
        results = measure(list(TINY), 1, docs, "dev")
    else:
        results = measure(list(VARIANTS), options.repeats, docs)
    size = len("\0".join(docs).encode()) / 1e6
    lines = table(results, size)
    print("\n".join(lines))
    if options.record:
        Path(options.record).write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
