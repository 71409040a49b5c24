"""Import a model from a Hugging Face folder or from nanochat's own files.

python -m scripts.import_model --folder=nanochat-d32
"""

from nanochat.common import run_cli
from nanochat.interop import ImportModelConfig, import_model

if __name__ == "__main__":
    run_cli(import_model, ImportModelConfig, "import_model")
