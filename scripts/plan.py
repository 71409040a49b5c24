"""Print what a run will do, and what it needs, before it starts.

python -m scripts.plan                                      this machine
python -m scripts.plan --depth 20 --gpus 8 --gpu h100       GPUs you do not have yet
python -m scripts.plan --gpus 8 --gpu h100 --budget 100     the depth that a budget buys
python -m scripts.plan --gpu 4090 --hours 12 --json True    the depth for 12 hours, as JSON
"""

import sys

from nanochat.cli import run_command

if __name__ == "__main__":
    run_command("plan", sys.argv[1:], "python -m scripts.plan")
