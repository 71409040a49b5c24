"""Measure the tokenizer crate against its peers: one table, medians and ratios.

python dev/bench_tokenizers.py                    on the embedded training text
python dev/bench_tokenizers.py --data FOLDER      on your own Parquet or text files
python dev/bench_tokenizers.py --record FILE      also save the table as Markdown
python dev/bench_tokenizers.py --tiny             only our crate, once, on a few documents

Every measurement runs in a separate process, alternating between the rivals, so that a
noisy minute affects all of them. One of the peers has the same module name as our crate,
so they have their own environment, `rustbpe/target/peers`, created on the first run.
"""

import argparse
import base64
import gc
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "rustbpe" / "target" / "peers"
PINS = [
    "rustbpe==0.1.0",
    "tokenizers==0.23.3",
    "tiktoken==0.14.0",
    "gigatoken==0.10.0",
    "numpy<3",
]
PATTERN = (  # GPT-4's as first published, which all of them accept
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
VOCAB = 32_768
RUNS = {  # task -> rivals; the first is ours and the reference of the ratios
    "train, 2 threads": ["crate", "rustbpe", "tokenizers"],
    "encode, 1 thread, lists": ["crate", "tiktoken", "rustbpe", "tokenizers"],
    "encode, 1 thread, arrays": ["crate", "gigatoken"],
    "encode, 2 threads, lists": ["crate", "tiktoken", "rustbpe", "tokenizers"],
    "encode, 2 threads, arrays": ["crate", "gigatoken"],
}
WORST = {"a": "a", "^": "^", "space": " ", "newline": "\n", "ab": "ab", "CJK": "漢"}


# ---- In a measuring process


def status(key: str) -> float:
    "Return a memory size of this process from the kernel, in megabytes."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def train(rival: str, docs: list[str]):
    "Train on the documents; return the tokenizer."
    if rival == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(byte_fallback=True))

        # Use our split and alphabet, or the merges would differ.
        steps = [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, show_progress=False, initial_alphabet=letters
        )
        tokenizer.train_from_iterator(iter(docs), trainer)
        return tokenizer

    # Ours.
    import rustbpe

    ours = rustbpe.Tokenizer()
    ours.train_from_iterator(iter(docs), VOCAB, pattern=PATTERN)
    return ours


def load(rival: str, docs: list[str], folder: Path):
    "Build the rival's tokenizer from the common ranks."
    file = folder / "ranks.tiktoken"
    if rival == "rustbpe":
        return train(rival, docs)  # it does not accept ranks
    if rival == "tokenizers":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if rival == "gigatoken":
        import gigatoken

        return gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="cl100k")
    pairs = [line.split() for line in file.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if rival == "tiktoken":
        import tiktoken

        return tiktoken.Encoding(
            "bench", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
    import rustbpe

    return rustbpe.Tokenizer.from_ranks(list(ranks.items()), PATTERN)


def encoder(rival: str, task: str, tokenizer, docs: list[str]):
    "Return the call to time, and a function that converts its result to lists of ids."
    one = "1 thread" in task
    arrays = "arrays" in task

    def same(rows):
        return rows

    # Each has its own names for one text and for many, and its own type of result.
    if rival == "gigatoken":
        if one:
            return lambda: [tokenizer.encode(d) for d in docs], same
        return lambda: tokenizer.encode_batch(docs), lambda rows: rows.to_list()
    if rival == "crate" and arrays:
        return lambda: tokenizer.encode_to_numpy(docs), lambda r: [r[0]]
    if rival == "tokenizers":

        def ids(rows):
            return [row.ids for row in rows]

        if one:
            return lambda: [tokenizer.encode(d) for d in docs], ids
        return lambda: tokenizer.encode_batch_fast(docs), ids
    name = {"tiktoken": "encode_ordinary"}.get(rival, "encode")
    if one:
        call = getattr(tokenizer, name)
        return lambda: [call(d) for d in docs], same
    if rival == "tiktoken":
        return lambda: tokenizer.encode_ordinary_batch(docs, num_threads=2), same
    batch = {"crate": "encode_batch", "rustbpe": "batch_encode"}[rival]
    return lambda: getattr(tokenizer, batch)(docs), same


def digest(rows) -> str:
    "Hash ids, whatever container they come in."
    import numpy as np

    total = hashlib.sha256()
    for row in rows:
        total.update(np.asarray(row, dtype=np.uint32).tobytes())
    return total.hexdigest()[:12]


def measure(rival: str, task: str, folder: Path) -> dict:
    "Run one task, timing the first call and the following calls of an encoder."
    import numpy  # noqa: F401  import before timing: two rivals import it when called

    docs = json.loads((folder / "docs.json").read_text("utf-8"))
    if task.startswith("train"):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        start = time.perf_counter()
        tokenizer = train(rival, docs)
        seconds = time.perf_counter() - start
        peak = status("VmHWM") - before
        same = ""
        if rival != "tokenizers":
            ranks = [(bytes(t), r) for t, r in tokenizer.get_mergeable_ranks()]
            same = hashlib.sha256(repr(ranks).encode()).hexdigest()[:12]
        return {"cold": seconds, "warm": seconds, "peak_mb": peak, "digest": same}
    tokenizer = load(rival, docs, folder)
    call, rows = encoder(rival, task, tokenizer, docs)
    times = []
    gc.disable()  # as in the module timeit
    for _ in range(4):
        result = None  # free the last result outside the timing
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    warm = statistics.median(times[1:])
    return {"cold": times[0], "warm": warm, "digest": digest(rows(result))}


def worst(rival: str, name: str, folder: Path) -> dict:
    "Encode a million equal characters."
    tokenizer = load(rival, [], folder)
    text = (WORST[name] * 1_000_000)[:1_000_000]
    start = time.perf_counter()
    call = tokenizer.encode_ordinary if rival == "tiktoken" else tokenizer.encode
    call(text)
    return {"cold": time.perf_counter() - start}


# ---- In the main process


def prepare(folder: Path, data: str, tiny: bool) -> int:
    "Write documents, ranks and tokenizer.json for the rivals; return the text's size."
    from nanochat.dataset import iter_documents
    from nanochat.hf import hf_tokenizer
    from nanochat.tokenizer import RustBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    docs = [text for text, _ in iter_documents("train", data=data)]
    docs = docs[:30] if tiny else docs
    (folder / "docs.json").write_text(json.dumps(docs), "utf-8")

    # Our merges in the formats that the rivals read.
    ranks = train("crate", docs).get_mergeable_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
    (folder / "ranks.tiktoken").write_text("".join(lines))
    tokenizer = RustBPETokenizer([bytes(token) for token, _ in ranks], PATTERN, {})
    text = json.dumps(hf_tokenizer(tokenizer), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    return sum(len(doc.encode()) for doc in docs)


def make_peers() -> Path:
    "Install the peers, unless they are installed."
    python = PEERS / "bin" / "python"
    if not python.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run(
            [*uv, "venv", "-q", "-p", sys.executable, str(PEERS)], check=True
        )
        install = [*uv, "pip", "install", "-q", "--python", str(python), *PINS]
        subprocess.run(install, check=True)
    return python


def run(rival: str, task: str, folder: Path, limit: int = 600) -> dict:
    "Measure in a new process; a failure there is a result too."
    python = sys.executable if rival == "crate" else str(make_peers())

    # Each library reads its number of threads from a different variable.
    threads = "1" if "1 thread" in task else "2"
    names = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, threads)
    env |= {"TOKENIZERS_PARALLELISM": str(threads == "2").lower()}
    command = [python, __file__, "--worker", rival, task, str(folder)]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"> {limit} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["died"])[-1]
        return {"failed": "panics" if "Panic" in reason else reason[:60]}
    return json.loads(done.stdout.splitlines()[-1])


def table(task: str, results: dict[str, list[dict]], size: int) -> list[str]:
    "Format the medians of one task, with the ratio of our crate to each rival."

    def middle(key: str, runs: list[dict]) -> float:
        return statistics.median(run[key] for run in runs)

    lines = [f"\n**{task}**\n"]
    lines += [
        "| | MB/s warm | MB/s first call | ours is | result |",
        "|---|---|---|---|---|",
    ]

    # For seconds, the ratio says how many times faster ours is than the rival.
    ours = middle("warm", results["crate"])
    for rival, runs in results.items():
        if bad := [r["failed"] for r in runs if "failed" in r]:
            lines.append(f"| {rival} | – | – | – | {bad[0]} |")
            continue
        warm = middle("warm", runs)
        cold = middle("cold", runs)
        note = runs[0]["digest"]
        if "peak_mb" in runs[0]:
            note += f", peak +{middle('peak_mb', runs):.0f} MB"
        ratio = "1" if rival == "crate" else f"{warm / ours:.2f}×"
        speeds = f"{size / warm / 1e6:.1f} | {size / cold / 1e6:.1f}"
        lines.append(f"| {rival} | {speeds} | {ratio} | {note} |")
    return lines


def cpu_name() -> str:
    "Return the name of the CPU."
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def take_turns(task: str, rivals: list[str], repeats: int, folder: Path) -> dict:
    "Run the rivals of a task, one process after the other."
    results: dict[str, list] = {rival: [] for rival in rivals}
    for _ in range(repeats):
        for rival in rivals:
            results[rival].append(run(rival, task, folder))
    return results


def worst_cases(rivals: list[str], folder: Path) -> list[str]:
    "Format how long a million equal characters take."
    rows = ["\n**a million characters of one kind, seconds**\n"]
    rows += [f"| | {' | '.join(WORST)} |", "|---" * (len(WORST) + 1) + "|"]
    for rival in rivals:
        cells = []
        for name in WORST:
            result = run(rival, f"worst {name}", folder, limit=20)
            cells.append(result.get("failed") or f"{result['cold']:.3f}")
        rows.append(f"| {rival} | {' | '.join(cells)} |")
    return rows


def main(data: str, repeats: int, record: str, tiny: bool = False) -> None:
    "Measure task by task, print the tables and save them if asked to."
    folder = ROOT / "rustbpe" / "target" / ("bench_tiny" if tiny else "bench")
    size = prepare(folder, data, tiny)
    repeats = 1 if tiny else repeats
    lines = [
        "# The tokenizer crate and its peers",
        "",
        f"`python dev/bench_tokenizers.py`, {time.strftime('%d %B %Y')}: {size / 1e6:.1f} MB of "
        f"text, {VOCAB:,} tokens, {cpu_name()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; {', '.join(PINS[:-1])}. Medians of {repeats} processes "
        "each, taking turns. Equal hashes mean equal tokens.",
    ]

    # Printed task by task, because the whole takes long.
    for task, rivals in RUNS.items():
        results = take_turns(task, rivals[:1] if tiny else rivals, repeats, folder)
        lines += table(task, results, size)
        print("\n".join(table(task, results, size)), flush=True)
    rivals = ["crate", "tiktoken", "tokenizers"]
    rows = worst_cases(rivals[:1] if tiny else rivals, folder)
    print("\n".join(rows))
    if record:
        Path(record).write_text("\n".join(lines + rows) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="embedded", help="embedded, or a path")
    parser.add_argument("--repeats", type=int, default=5, help="processes per rival")
    parser.add_argument("--record", default="", help="file for the table")
    parser.add_argument("--tiny", action="store_true", help="our crate, little text")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rival, task, folder = options.worker
        if task.startswith("worst "):
            print(json.dumps(worst(rival, task[6:], Path(folder))))
        else:
            print(json.dumps(measure(rival, task, Path(folder))))
    else:
        try:
            main(options.data, options.repeats, options.record, options.tiny)
        except ValueError as error:  # no text there
            parser.error(str(error))
