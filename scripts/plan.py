"""Print what a run would do and what it would need, before it starts.

python -m scripts.plan                                      for this machine
python -m scripts.plan --depth 20 --gpus 8 --gpu h100       for GPUs that you do not have yet
python -m scripts.plan --gpus 8 --gpu h100 --budget 100     the depth that 100 dollars buy
python -m scripts.plan --gpu 4090 --hours 12 --json True    the depth for 12 hours, as JSON
"""

import sys

from nanochat.cli import run_command

if __name__ == "__main__":
    run_command("plan", sys.argv[1:], "python -m scripts.plan")
