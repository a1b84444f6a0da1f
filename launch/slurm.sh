#!/usr/bin/env bash
# Train under Slurm, one task a rank, and go on by itself after preemption or the time limit.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-task=1 launch/slurm.sh --save /shared/run1 --steps 100000
#   sbatch --nodes=2 --ntasks-per-node=4 launch/slurm.sh --save /shared/run1 --steps 100000       # CPUs
#
# Submit it from the repository. Arguments after the script are those of launch/train.py; --save is a folder that all
# nodes share. The Python of .venv is used if there is one, otherwise python3; set PYTHON to choose.
#
# * Preemption (PreemptMode=REQUEUE with a GraceTime), or 120 s before the time limit: Slurm sends SIGTERM to all ranks.
#   They agree on the step, save together, and end with status 75; this script then requeues the job, which goes on from
#   there. GraceTime and the 120 s below must be enough for one step and one save.
# * A node that fails: Slurm requeues the job, which goes on from the last checkpoint that was committed (--save-every).
# * scancel ends it for good, after a last checkpoint. A rank that fails ends it too: the error would repeat itself.
#
# srun starts the ranks itself: torchrun would stand between Slurm's signal and them, and kill after 30 s of its own.
#SBATCH --job-name=sharded_radam
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export MASTER_ADDR MASTER_PORT PYTHON OMP_NUM_THREADS

# One rank's GPU may be the only one that its task sees, so its number among the visible ones decides, not that on the node.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    case "${CUDA_VISIBLE_DEVICES:-}" in *,* | "") ;; *) LOCAL_RANK=0 ;; esac
    exec "$PYTHON" launch/train.py --auto-resume "$@"' train "$@"
status=$?

if [ "$status" -eq 75 ]; then
    echo "job $SLURM_JOB_ID saved and is requeued (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
