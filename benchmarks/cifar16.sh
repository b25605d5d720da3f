#!/usr/bin/env bash
# Saliency, chance and every weight on four classes of CIFAR-10 at 16 x 16, on two cores, in about an hour:
# a teacher, a judge, and the comparison (docs/results/cifar16.md). What OUT has already is not done again.
#   usage: benchmarks/cifar16.sh CIFAR10_DIR OUT        (CIFAR10_DIR: anything that load_dataset reads)
set -euo pipefail
source=${1:?usage: benchmarks/cifar16.sh CIFAR10_DIR OUT}
out=${2:?usage: benchmarks/cifar16.sh CIFAR10_DIR OUT}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
command=("$python" -m pecker_fast)

[[ -d $out/data ]] || "$python" "$here/cifar16.py" "$source" "$out/data"
[[ -f $out/teacher/config.json ]] || "${command[@]}" pretrain --train_data_dir "$out/data" --width 24 --max_train_steps 5000 \
  --train_batch_size 64 --learning_rate 2e-3 --output_dir "$out/teacher"
[[ -f $out/judge/config.json ]] || "${command[@]}" judge --train_data_dir "$out/data" --width 16 --augment --max_train_steps 1000 \
  --train_batch_size 64 --output_dir "$out/judge"
OMP_NUM_THREADS=1 "${command[@]}" compare --pretrained_model_name_or_path "$out/teacher" --judge "$out/judge" \
  --train_data_dir "$out/data" --forget_class 0 --tuning_class 2 --methods sfd pecker random --seeds 0 1 2 \
  --learning_rate_factors 1 2 --max_train_steps 100 --num 100 --processes 2 --max_train_samples 4000 \
  --train_batch_size 32 --forget_batch_size 8 --generator_lr 1e-3 --forget_weight 0.05 --ema_decay 0.95 \
  --lr_warmup_steps 10 --output_dir "$out/compare"
