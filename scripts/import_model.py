"""Take over a model from a Hugging Face folder or from nanochat's own files.

python -m scripts.import_model --folder=nanochat-d32
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, run_cli
from nanochat.interop import adopt, load_foreign


@dataclass(frozen=True)
class ImportModelConfig:
    folder: str = ""
    """Where the files are: config.json and *.safetensors, or model_*.pt and meta_*.json."""
    stage: str = "sft"
    """The stage that it counts as: base, mid, sft or rl."""
    tag: str = ""
    """Its name here; empty: d and the number of layers."""
    overwrite: bool = False
    """Replace another tokenizer, and a checkpoint of this name."""


def main(config: ImportModelConfig) -> None:
    if not config.folder:
        raise UserError("which model? Give its folder with --folder=PATH")
    model, tokenizer = load_foreign(Path(config.folder).expanduser())
    path = adopt(model, tokenizer, config.stage, config.tag, config.overwrite)
    print(f"{model.num_params():,} parameters, {tokenizer.get_vocab_size():,} tokens")
    print(f"saved in {path}; talk to it:")
    print(
        f"python -m scripts.chat_cli --source {config.stage} --tag {path.parent.name}"
    )


if __name__ == "__main__":
    run_cli(main, ImportModelConfig, "import_model")
