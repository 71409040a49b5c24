#!/usr/bin/env bash
# From raw text to a chat reply: the whole pipeline, sized for this machine.
#
#   bash speedrun.sh                  uses 8 GPUs, 1 GPU or the CPU, whichever is available
#   bash speedrun.sh --preset cpu     a preset of settings.ini: cpu, tiny, gpu-lab, gpu1 or gpu8
#   bash speedrun.sh --depth 12       accepts any option of base_train
#
# Ctrl-C stops between two optimizer steps; the same command resumes from there.
# If the package is installed, `nanochat speedrun` does the same without this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

bash dev/setup.sh run
exec .venv/bin/python -m scripts.speedrun "$@"
