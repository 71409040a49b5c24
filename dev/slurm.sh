#!/usr/bin/env bash
# Run a stage on several nodes:  sbatch --nodes=2 dev/slurm.sh scripts.base_train --preset gpu8
#
# NANOCHAT_BASE_DIR must be a folder that all nodes see: every rank writes its part of a
# checkpoint there. Two minutes before the time limit, Slurm sends SIGTERM, the run saves
# after its current step, and the same command resumes it.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
set -euo pipefail
: "${NANOCHAT_BASE_DIR:?set it to a folder that all nodes see}"
[ $# -gt 0 ] || { echo "usage: sbatch dev/slurm.sh scripts.base_train [OPTIONS...]" >&2; exit 2; }
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first:${MASTER_PORT:-29500}" \
    -m "$@"
