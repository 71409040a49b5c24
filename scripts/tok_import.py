"""Take over the tokenizer of a nanochat checkpoint, without running its pickle.

python -m scripts.tok_import path/to/tokenizer.pkl
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat.common import UserError, get_base_dir, print0, run_cli
from nanochat.tokenizer import FILE_NAME, RustBPETokenizer, read_pickled


@dataclass(frozen=True)
class TokImportConfig:
    source: tyro.conf.Positional[str]
    """The file tokenizer.pkl."""
    overwrite: bool = False
    """Replace a tokenizer that is there already."""


def main(config: TokImportConfig) -> None:
    target = get_base_dir() / "tokenizer"
    if (target / FILE_NAME).exists() and not config.overwrite:
        raise UserError(f"{target} has a tokenizer: add --overwrite to replace it")
    tokenizer = RustBPETokenizer(*read_pickled(Path(config.source)))
    tokenizer.save(target)
    print0(f"{tokenizer.get_vocab_size():,} tokens, saved in {target}")


if __name__ == "__main__":
    run_cli(main, TokImportConfig, "tok_import")
