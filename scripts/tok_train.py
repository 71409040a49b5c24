"""Train the tokenizer on the training text, the training conversations and numbers.

python -m scripts.tok_train --vocab-size 65536 --max-chars 2000000000
python -m scripts.tok_train --pickle tokenizer.pkl    import nanochat's, without executing it
"""

from nanochat.common import run_cli
from nanochat.tok_train import TokTrainConfig, train_tokenizer

if __name__ == "__main__":
    run_cli(train_tokenizer, TokTrainConfig, "tok_train")
