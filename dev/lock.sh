#!/usr/bin/env bash
# Pin the newest versions of everything in requirements/*.txt.
#
#   bash dev/lock.sh    after `make setup`; then run all tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH

# What belongs to one version of PyTorch is pinned apart, so that another can be had.
of_torch='^(torch==|triton==|setuptools==|nvidia-|cuda-)'
uv pip compile -q --upgrade --universal --python-version 3.10 --no-header --no-annotate \
    --extra dev --extra book --extra lab --extra data --extra trackers \
    -o requirements/constraints.txt pyproject.toml requirements/tools.in
grep -E "$of_torch" requirements/constraints.txt >requirements/torch.txt
sed -i -E "/$of_torch/d" requirements/constraints.txt
