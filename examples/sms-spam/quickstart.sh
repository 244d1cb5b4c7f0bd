#!/usr/bin/env bash
# The whole line on real data, through the commands that a cluster uses too: quickstart.sh RUN.yaml RUN_DIR
set -euo pipefail
run=$1 dir=$2
# Two processes need two GPUs or none.
[ "$(find /proc/driver/nvidia/gpus -mindepth 1 -maxdepth 1 2>/dev/null | wc -l)" -ge 2 ] || export CUDA_VISIBLE_DEVICES=

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say sft-dist prepare "$run"
say sft-dist train "$run" --nproc 2
# An export of an earlier training is kept beside the new one.
step=$(readlink "$dir/checkpoints/latest")
if ! grep -qs "\"step\": $((10#${step#step-}))," "$dir/export/sft_dist.json"; then
  [ ! -d "$dir/export" ] || mv "$dir/export" "$dir/export.old-$(date +%s)"
  say sft-dist export "$dir" "$dir/export"
fi
say python examples/sms-spam/reload.py "$dir/export"
say sft-dist eval "$dir/export"

cat <<END

The loss curve and the numbers before and after are above; TensorBoard shows more:
  tensorboard --logdir $dir/tensorboard

Three commands to try next, after: source $(dirname "$(command -v sft-dist)")/activate
  sft-dist chat $dir --prompt "Congratulations! You won a free cruise, call 0906 now to claim"
  sft-dist inspect $dir/shards --row 0
  sft-dist train $run --nproc 2 --fresh train.learning_rate=3e-3
END
