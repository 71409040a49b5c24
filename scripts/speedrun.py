"""Run the whole pipeline, from text to chat; `bash speedrun.sh` sets up and runs this.

python -m scripts.speedrun
python -m scripts.speedrun --preset cpu
"""

import sys

from nanochat.cli import run_command

if __name__ == "__main__":
    run_command("speedrun", sys.argv[1:], "python -m scripts.speedrun")
