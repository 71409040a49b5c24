"""Compare the tokenizer's compression with GPT-2's and GPT-4's.

python -m scripts.tok_eval --reference-dir path/to/folder/with/tiktoken/files
"""

from nanochat.common import run_cli
from nanochat.tok_eval import TokEvalConfig, compare_tokenizers

if __name__ == "__main__":
    run_cli(compare_tokenizers, TokEvalConfig, "tok_eval")
