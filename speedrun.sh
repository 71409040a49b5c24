#!/usr/bin/env bash
# From raw text to a chat reply: the whole pipeline, for the machine it finds.
#
#   bash speedrun.sh                  8 GPUs, 1 GPU or the CPU, whatever is there
#   bash speedrun.sh --preset cpu     a section of settings.ini; gpu-lab: five minutes on a GPU
#   bash speedrun.sh --depth 12       any option of base_train
#
# Ctrl-C stops between two optimizer steps; the same command continues from there.
# Where the package is installed, `nanochat speedrun` does the same without this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

bash dev/setup.sh run
exec .venv/bin/python -m scripts.speedrun "$@"
