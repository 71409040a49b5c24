#!/usr/bin/env bash
# Where nanochat keeps its speedrun since January 2026; ours is one folder up.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../speedrun.sh" "$@"
