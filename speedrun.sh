#!/usr/bin/env bash
# From raw text to a chat reply: the whole pipeline, for the machine it finds.
#
#   bash speedrun.sh                  8 GPUs, 1 GPU or the CPU, whatever is there
#   bash speedrun.sh --preset cpu     a section of settings.ini; gpu-lab: five minutes on a GPU
#   bash speedrun.sh --depth 12       any option of base_train
#
# Ctrl-C stops between two optimizer steps; the same command goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

bash dev/setup.sh run
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
if [ "${1:-}" = "--preset" ]; then export NANOCHAT_PRESET="${2:?--preset needs a name}"; shift 2; fi
NANOCHAT_PRESET=$(python -m scripts.plan --name-only True)
export NANOCHAT_PRESET
if [ "$NANOCHAT_PRESET" != cpu ] &&
    ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "error: preset $NANOCHAT_PRESET needs a GPU, and torch sees none: use --preset cpu" >&2
    exit 2
fi
python -m scripts.plan "$@"

# ---- one stage: skipped when it is finished; whatever comes after it is then done again
done_dir="$NANOCHAT_BASE_DIR/done-$NANOCHAT_PRESET"
mkdir -p "$done_dir"
gpus=1
[ "$NANOCHAT_PRESET" = gpu8 ] && gpus=8
stage() { # stage NAME RANKS MODULE [OPTIONS...]
    local name=$1 ranks=$2 module=$3 key
    shift 3
    key="$module $* $(cksum <settings.ini)"
    if [ "$(cat "$done_dir/$name" 2>/dev/null)" = "$key" ]; then
        printf '== %-14s already done\n' "$name"
        return
    fi
    printf '\n== %-14s python -m %s %s\n' "$name" "$module" "$*"
    find "$done_dir" -type f -newer "$done_dir/$name" -delete 2>/dev/null || true
    if [ "$ranks" = 1 ]; then
        python -m "$module" "$@"
    else
        OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node="$ranks" -m "$module" "$@"
    fi
    echo "$key" >"$done_dir/$name"
    sleep 0.01 # markers are ordered by their time
}

# ---- text: the short runs use the corpus in the package, the long ones fetch shards
if [[ "$NANOCHAT_PRESET" != cpu && "$NANOCHAT_PRESET" != gpu-lab ]]; then
    export NANOCHAT_DOWNLOAD=1 # whole task sets from the hub, not the embedded samples
    python -m nanochat.dataset -n 8 # enough to train the tokenizer
    python -m nanochat.dataset -n 240 >"$NANOCHAT_BASE_DIR/download.log" 2>&1 &
    download=$!
    trap 'kill "$download" 2>/dev/null || true' EXIT
fi
stage tok_train 1 scripts.tok_train
stage tok_eval 1 scripts.tok_eval
if [ -n "${download:-}" ]; then
    echo "== waiting for the last of 240 shards (see $NANOCHAT_BASE_DIR/download.log)"
    wait "$download"
fi
stage base_train $gpus scripts.base_train "$@"
stage base_eval $gpus scripts.base_eval
stage mid_train $gpus scripts.mid_train
stage chat_eval_mid $gpus scripts.chat_eval --source mid
stage chat_sft $gpus scripts.chat_sft
stage chat_eval_sft $gpus scripts.chat_eval --source sft
stage chat_rl $gpus scripts.chat_rl
stage chat_eval_rl $gpus scripts.chat_eval --source rl
stage report 1 scripts.report

cat <<END

Finished. The report is in $NANOCHAT_BASE_DIR/report/report.md (and report.html).
Talk to your model:
    source .venv/bin/activate
    python -m scripts.chat_cli
    python -m scripts.chat_web        and open http://127.0.0.1:8000
END
