"""Export a trained model as a Hugging Face folder.

python -m scripts.export_hf --folder=my-model
"""

from nanochat.common import run_cli
from nanochat.interop import ExportHfConfig, export_model

if __name__ == "__main__":
    run_cli(export_model, ExportHfConfig, "export_hf")
