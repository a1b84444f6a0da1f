#!/usr/bin/env bash
# The main job: train a GPT on real text with ShardedRAdam, save, resume at another number of ranks, and compare the
# optimizer with ZeroRedundancyOptimizer. On a fresh machine it makes .venv first; scripts/venv.sh says
# which variables choose another Python, torch or environment. Files are left in runs/demo, or DEMO_OUTPUT; DEMO_FLAGS are
# more flags of launch/train.py, such as another size of the model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv train
out=${DEMO_OUTPUT:-runs/demo}
rm -rf "$out"
mkdir -p "$out"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then first=$gpus other=$(((gpus + 1) / 2)); else first=2 other=3; fi

train() { # ranks, metrics file, flags
    local ranks=$1 metrics=$2
    shift 2
    python -m torch.distributed.run --standalone --nproc-per-node="$ranks" launch/train.py --schedule-steps 130 --batch $((first * other * 4)) \
        --metrics "$out/$metrics" "$@" ${DEMO_FLAGS:-}
}

echo "== $first ranks, 100 steps, saved in the background after 40, 80 and 100"
train "$first" first.jsonl --steps 100 --save "$out/checkpoints" --save-every 40
echo "== resumed on $other ranks, 30 steps more"
train "$other" resumed.jsonl --steps 130 --resume "$out/checkpoints" --save "$out/checkpoints"
python -m sharded_radam checkpoint verify "$out/checkpoints/step_130"
echo "== the same by way of one consolidated file"
python -m sharded_radam checkpoint consolidate "$out/checkpoints/step_130" "$out/radam.pt"
train "$first" consolidated.jsonl --steps 5 --consolidated --save "$out/whole.pt"
train "$other" consolidated.jsonl --steps 8 --consolidated --resume "$out/whole.pt"
echo "== $first ranks with ZeroRedundancyOptimizer, 25 steps"
train "$first" zero.jsonl --steps 25 --optimizer zero
python scripts/demo_table.py "$out"
