"""Write a trained model as a Hugging Face folder.

python -m scripts.export_hf --folder=my-model
"""

from dataclasses import dataclass

from nanochat.common import run_cli
from nanochat.hf import export_hf
from nanochat.server import load_chat_model


@dataclass(frozen=True)
class ExportHfConfig:
    folder: str = "exported"
    """Where to write; created."""
    source: str = ""
    """The stage to export: base, mid, sft or rl; empty: the best that exists."""
    tag: str = ""
    """Model, such as d20; empty: the deepest."""
    step: int = -1
    """Checkpoint; -1: the last."""


def main(config: ExportHfConfig) -> None:
    where = config.tag, config.step
    engine, name = load_chat_model(config.source, "cpu", *where, frozen=False)
    folder = export_hf(engine.model, engine.tokenizer, config.folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(f"{name} exported; load it with transformers:")
    print(f'AutoModelForCausalLM.from_pretrained("{folder}")')


if __name__ == "__main__":
    run_cli(main, ExportHfConfig, "export_hf")
