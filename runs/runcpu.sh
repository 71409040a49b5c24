#!/usr/bin/env bash
# nanochat's name for the run on a laptop: the speedrun with the preset for CPUs.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" --preset cpu "$@"
