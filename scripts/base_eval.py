"""Evaluate a base model: bits per byte (and a bigram's), CORE tasks, samples.

python -m scripts.base_eval
python -m scripts.base_eval --core none             without the few-shot tasks
python -m scripts.base_eval --core eval_bundle      with DCLM's full bundle, from a folder
"""

from nanochat.base_eval import BaseEvalConfig, evaluate_base
from nanochat.common import run_cli

if __name__ == "__main__":
    run_cli(evaluate_base, BaseEvalConfig, "base_eval")
