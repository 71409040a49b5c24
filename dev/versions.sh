#!/usr/bin/env bash
# Run tests with another version of PyTorch or Python, in a separate virtual environment.
#
#   bash dev/versions.sh 2.11.0                            tests that depend on PyTorch's internals
#   bash dev/versions.sh 2.9.0 tests/test_optim.py         selected tests
#   PYTHON=python3.13 bash dev/versions.sh 2.15.0 tests    all tests, with another Python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?say which version of torch, for example 2.11.0}
shift
bash dev/setup.sh dev
uv() { .venv/bin/python -m uv "$@"; }

# Compilers, kernels and collectives are where versions of PyTorch have differed.
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(
    tests/test_compile.py tests/test_fp8.py tests/test_attention.py
    tests/test_head.py tests/test_functional.py tests/test_optim_ranks.py
)

python=${PYTHON:-$PWD/.venv/bin/python}
folder=.venv-torch-$version-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp=$folder/.stamp
key=$(cat pyproject.toml requirements/*.txt dev/versions.sh rustbpe/src/*.rs | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    [ -x "$folder/bin/python" ] || uv venv -q --python "$python" "$folder"
    # The same pins as everywhere, but for those that belong to one PyTorch.
    uv pip install -q --python "$folder/bin/python" \
        --constraint requirements/constraints.txt "torch==$version" -e ".[dev]"
    echo "$key" >"$stamp"
fi
"$folder/bin/python" -c 'import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__)'
"$folder/bin/python" -m pytest -q -n 2 --dist loadfile "${tests[@]}"
