"""Compare the tokenizer's compression with GPT-2's and GPT-4's.

python -m scripts.tok_eval --reference-dir path/to/folder/with/tiktoken/files
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanochat.common import UserError, get_base_dir, print0, run_cli, save_section
from nanochat.dataset import iter_documents
from nanochat.tokenizer import PRETRAINED, RustBPETokenizer, get_tokenizer

TITLES = {"ours": "ours", "gpt2": "GPT-2", "cl100k_base": "GPT-4"}
NEWS = """\
The town council voted on Tuesday to reopen the old railway bridge, which has been \
closed to walkers since the floods of 2019. The repairs will cost 1.4 million euros and \
are expected to take eight months. "People here have waited long enough," said the \
mayor after the meeting. Two members voted against, and asked for a cheaper plan.\
"""
KOREAN = """\
아침에 일어나면 먼저 창문을 열고 하늘을 봅니다. 오늘은 구름이 조금 있지만 바람이 따뜻합니다. \
동생은 학교에 가고, 나는 도서관에서 책을 읽습니다. 저녁에는 가족이 모두 모여 밥을 먹고 \
하루 동안 있었던 일을 이야기합니다.\
"""
CODE = '''\
def moving_average(values, width):
    """Average every window of `width` neighbouring values."""
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        if i >= width - 1:
            result.append(total / width)
    return result


if __name__ == "__main__":
    print(moving_average([1, 2, 3, 5, 8, 13], width=3))
'''
MATHS = r"""
\begin{theorem} For every $n \ge 1$ we have $\sum_{k=1}^{n} k = \frac{n(n+1)}{2}$.
\end{theorem}
\begin{proof} By induction. For $n = 1$ both sides are $1$. Suppose the claim holds for
$n$. Then \[ \sum_{k=1}^{n+1} k = \frac{n(n+1)}{2} + (n+1) = \frac{(n+1)(n+2)}{2}, \]
which is the claim for $n + 1$. For example $1 + 2 + \dots + 100 = 5050$. \end{proof}
"""
SCIENCE = """\
A leaf is green because chlorophyll absorbs red and blue light and reflects the rest. The \
absorbed energy splits water molecules into oxygen, protons and electrons; the electrons \
pass along a chain of proteins in the membrane and leave behind a difference in proton \
concentration, from which the cell makes ATP. A second set of reactions then uses that \
ATP to bind carbon dioxide into sugar.\
"""


@dataclass(frozen=True)
class TokEvalConfig:
    reference_dir: str = ""
    """Folder of r50k_base.tiktoken and cl100k_base.tiktoken; empty: <base>/tokenizers."""
    num_docs: int = 1_024
    """Documents to read from each split."""
    data: str = ""
    """Corpus: embedded, hub, or a path."""


def samples(config: TokEvalConfig) -> dict[str, list[str]]:
    "Collect the texts: five of our own, and the beginning of both splits."
    own = {"news": NEWS, "science": SCIENCE, "code": CODE}
    own |= {"maths": MATHS, "Korean": KOREAN}
    texts = {name: [text] for name, text in own.items()}
    for split in ("train", "val"):
        stream = islice(iter_documents(split, data=config.data), config.num_docs)
        texts[f"corpus, {split}"] = [text for text, _ in stream]
    return texts


def load_references(folder: str) -> dict[str, RustBPETokenizer]:
    "Load the reference tokenizers that are at hand, and say which are not."
    found = {}
    for name in PRETRAINED:
        file = Path(folder or get_base_dir() / "tokenizers") / PRETRAINED[name][0]
        if file.exists():
            found[name] = RustBPETokenizer.from_pretrained(name, file.parent)
        else:
            print0(f"no column for {TITLES[name]}: {file} does not exist")
    return found


def compare(texts: dict[str, list[str]], tokenizers: dict) -> list[dict]:
    "Measure bytes per token of every tokenizer on every text."
    rows = []
    for name, docs in texts.items():
        size = sum(len(doc.encode("utf-8", "replace")) for doc in docs)
        row = {"text": name, "bytes": size}
        for key, tokenizer in tokenizers.items():
            count = sum(map(len, tokenizer.encode(docs)))
            row[key] = size / max(1, count)
        rows.append(row)
    return rows


def show(rows: list[dict], tokenizers: dict) -> None:
    "Print the table; per cent of tokens that ours saves against each reference."
    table = Table(title="Bytes per token (more is better)")
    table.add_column("text", no_wrap=True)
    table.add_column("bytes", justify="right")
    for key, tokenizer in tokenizers.items():
        table.add_column(
            f"{TITLES[key]}\n{tokenizer.get_vocab_size():,}", justify="right"
        )
        if key != "ours":
            table.add_column("saves\ntokens", justify="right")
    for row in rows:
        cells = [row["text"], f"{row['bytes']:,}"]
        for key in tokenizers:
            cells.append(f"{row[key]:.2f}")
            if key != "ours":
                saved = 100 * (1 - row[key] / row["ours"])
                cells.append(f"[{'green' if saved > 0 else 'red'}]{saved:+.1f} %")
        table.add_row(*cells)
    Console().print(table)


def main(config: TokEvalConfig) -> None:
    if config.num_docs < 1:
        raise UserError(f"num_docs={config.num_docs} must be at least 1")
    tokenizers = {"ours": get_tokenizer(), **load_references(config.reference_dir)}
    rows = compare(samples(config), tokenizers)
    show(rows, tokenizers)
    sizes = {key: t.get_vocab_size() for key, t in tokenizers.items()}
    missing = [TITLES[name] for name in PRETRAINED if name not in tokenizers]
    values = {"vocab_sizes": sizes, "missing": missing, "bytes_per_token": rows}
    save_section("tok_eval", values)


if __name__ == "__main__":
    run_cli(main, TokEvalConfig, "tok_eval")
