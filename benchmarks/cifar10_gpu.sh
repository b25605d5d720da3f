#!/usr/bin/env bash
# The task of the publications, CIFAR-10, on one GPU, in calls of under ten minutes: the same command again goes on.
#   usage: CIFAR10_DIR=DATA benchmarks/cifar10_gpu.sh OUT [PART...]
# Parts, all of them in this order if none is named:
#   teacher  a class-conditional DDPM -> OUT/teacher     judge   a classifier -> OUT/judge
#   compare  methods on the same work -> OUT/compare     assets  both with a model card -> OUT/assets
# DATA/plain_text holds CIFAR-10 as parquet (train-*, test-*), or in another form that pecker-fast reads.
# Exit status: 0 all done, 5 nothing failed but work is left (call again), 1 something failed, 2 wrong usage.
# Writes OUT/PART.log (longer with each call) and OUT/summary.txt (of this call).
# OUT stays below 60 MiB and is all that a later call needs, on this machine or another. Training state is larger: it
# lies in SCRATCH (OUT.scratch), and where that is gone the teacher goes on from its averaged weights in OUT with a new
# optimizer and a warm-up, which OUT/teacher/pretrain.json and the model card record ("restarts").
# SECONDS_IN_ALL (560) is for all parts of a call, TEACHER_SECONDS for the teacher's steps in it. TEACHER_STEPS,
# JUDGE_STEPS, COMPARE_STEPS, METHODS, SEEDS and FACTORS change the work, and must be the same in every call
# (METHODS and SEEDS may grow).
# PECKER_FAST_REHEARSE=1 rehearses everything at tiny sizes on a CPU, with made-up images if CIFAR10_DIR is not set.
set -uo pipefail
out=$(mkdir -p "${1:?usage: CIFAR10_DIR=DATA benchmarks/cifar10_gpu.sh OUT [PART...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
IFS=: read -ra installed <<<"${PYTHONPATH:-}"
for folder in ${installed[@]+"${installed[@]}"}; do  # the checkout comes first on the path and would hide it
  compgen -G "$folder/pecker_fast/_C*.so" >/dev/null && cp -n "$folder"/pecker_fast/_C*.so pecker_fast/
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_MININTERVAL=20
scratch=${SCRATCH:-$out.scratch}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-560}))
declare -A weight=([teacher]=60 [judge]=30 [compare]=60 [assets]=15)
parts=("$@")
((${#parts[@]})) || parts=(teacher judge compare assets)
for part in "${parts[@]}"; do
  [[ -n ${weight[$part]:-} ]] && continue
  echo "unknown part $part; expected some of teacher judge compare assets" >&2
  exit 2
done

stored=(--save_dtype float16 --max_shard_size 16MB)
teacher=(--width 64 --num_res_blocks 2 --class_dropout 0.1 --max_train_steps "${TEACHER_STEPS:-30000}"
  --ema_decay 0.9995 --train_batch_size 256 --learning_rate 5e-4 --lr_warmup_steps 500 --mixed_precision bf16
  --num_inference_steps 50 --checkpointing_steps 2000)
judge=(--width 48 --max_train_steps "${JUDGE_STEPS:-8000}" --train_batch_size 256)
compare=(--max_train_steps "${COMPARE_STEPS:-1500}" --num 500 --train_batch_size 128 --forget_batch_size 16
  --lr_warmup_steps 20 --ema_decay 0.995)
images=500 reserve=100  # seconds for what surrounds the training: imports, reading images, writing
if [[ ${PECKER_FAST_REHEARSE:-0} == 1 ]]; then
  stored=(--save_dtype float16 --max_shard_size 96KB)
  teacher=(--width 8 --num_res_blocks 1 --class_dropout 0.1 --max_train_steps "${TEACHER_STEPS:-4}" --train_batch_size 4
    --lr_warmup_steps 1 --num_inference_steps 2)
  judge=(--width 4 --max_train_steps 2 --train_batch_size 8)
  compare=(--max_train_steps 1 --num 2 --train_batch_size 2 --forget_batch_size 2 --ema_decay 0.5)
  images=2 reserve=0 METHODS=${METHODS:-sfd pecker} SEEDS=${SEEDS:-0} FACTORS=${FACTORS:-1}
  if [[ -z ${CIFAR10_DIR:-} ]]; then
    CIFAR10_DIR=$scratch/data
    "$python" benchmarks/cifar10.py made_up "$CIFAR10_DIR/plain_text" || exit 1
  fi
fi
data=${CIFAR10_DIR:?is not set; expected a folder that holds plain_text/train-*.parquet and test-*.parquet}/plain_text
[[ -d $data ]] || { echo "$data: no such folder; set CIFAR10_DIR" >&2; exit 2; }
mkdir -p "$scratch"
failed=0 unfinished=0
: >"$out/summary.txt"

note() {
  echo "$*" | tee -a "$out/summary.txt"
}

left() { # TEXT...
  unfinished=1
  note "$*"
}

# Runs a command; its output goes to OUT/NAME.log and the screen, its status is returned and kept in the summary.
run() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 status started=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=20 "$limit_s" "$@" 2>&1 | tee -a "$out/$name.log"
  status=${PIPESTATUS[0]}
  note "$name: exit status $status after $((SECONDS - started)) s of $limit_s"
  return "$status"
}

pecker_fast() { # NAME LIMIT_S ARGUMENTS...
  run "$1" "$2" "$python" -m pecker_fast "${@:3}"
}

# Seconds for the first of the parts that are left: its share by weight of the time that is left.
share() { # PART...
  local all=0 part
  for part in "$@"; do all=$((all + weight[$part])); done
  local seconds=$(((deadline - SECONDS) * weight[$1] / all))
  echo $((seconds > 10 ? seconds : 10))
}

progress() { # teacher | judge; nothing but an exit status, or what is left
  "$python" benchmarks/cifar10.py left "$1" "$out"
}

# A model folder without what lies beside it, replacing the older one only once it is whole.
keep() { # FROM TO REPORT
  rm -rf "$2.new" && mkdir "$2.new" && cp "$1"/config.json "$1/$3" "$1"/diffusion_pytorch_model* "$2.new" &&
    rm -rf "$2" && mv "$2.new" "$2"
}

train_teacher() { # LIMIT_S
  local status limit=$(($1 > reserve ? $1 - reserve : 1)) from=() checkpoints=("$scratch"/teacher/checkpoint-*)
  progress teacher >/dev/null && { note "teacher: done already"; return; }
  if [[ -d ${checkpoints[0]} ]]; then
    from=(--resume_from_checkpoint latest)
  elif [[ -f $out/teacher/pretrain.json ]]; then
    from=(--init "$out/teacher")
    note "teacher: no checkpoint in SCRATCH; goes on from the weights in OUT with a new optimizer"
  fi
  [[ -n ${TEACHER_SECONDS:-} ]] && limit=$TEACHER_SECONDS
  pecker_fast teacher "$1" pretrain --train_data_dir "$data" --output_dir "$scratch/teacher" "${teacher[@]}" \
    "${stored[@]}" --checkpoints_total_limit 1 --max_train_seconds "$limit" "${from[@]}"
  status=$?
  case $status in
    0) ;;
    5) unfinished=1 ;;
    *) failed=1; return ;;
  esac
  keep "$scratch/teacher" "$out/teacher" pretrain.json || failed=1
  note "teacher: $(progress teacher)"
}

train_judge() { # LIMIT_S
  progress judge >/dev/null && { note "judge: done already"; return; }
  rm -rf "$scratch/judge"
  pecker_fast judge "$1" judge --train_data_dir "$data" --augment --output_dir "$scratch/judge" "${judge[@]}" \
    "${stored[@]}" &&
    keep "$scratch/judge" "$out/judge" judge.json || failed=1
}

run_compare() { # LIMIT_S
  local status command plan=$out/compare.plan.json
  progress teacher >/dev/null && progress judge >/dev/null || { left "compare: waits for teacher and judge"; return; }
  # shellcheck disable=SC2206
  command=(compare --pretrained_model_name_or_path "$out/teacher" --judge "$out/judge" --train_data_dir "$data"
    --methods ${METHODS:-sfd pecker random} --seeds ${SEEDS:-0 1} --learning_rate_factors ${FACTORS:-1 3}
    --null_class --forget_class 0 --tuning_class 5 --generator_lr 1e-4 --forget_weight 0.05 --output_dir "$out/compare"
    "${compare[@]}")
  "$python" -m pecker_fast "${command[@]}" --dry_run --json >"$plan" || { failed=1; note "compare: refused"; return; }
  pecker_fast compare "$1" "${command[@]}"
  status=$?
  case $status in
    0) ;;
    124 | 130 | 137) unfinished=1 ;;
    *) failed=1 ;;
  esac
  note "compare: $("$python" benchmarks/cifar10.py left compare "$out")"
}

make_assets() { # LIMIT_S
  progress teacher >/dev/null && progress judge >/dev/null || { left "assets: waits for teacher and judge"; return; }
  run assets "$1" "$python" benchmarks/cifar10_assets.py "$out" "$data" --images "$images" || failed=1
}

while ((${#parts[@]})); do
  part=${parts[0]} limit_s=$(share "${parts[@]}")
  case $part in
    teacher | judge) "train_$part" "$limit_s" ;;
    compare) run_compare "$limit_s" ;;
    assets) make_assets "$limit_s" ;;
  esac
  parts=("${parts[@]:1}")
done
note "$(du -sk "$out" | cut -f1) KiB in OUT"
((failed)) && exit 1
((unfinished)) && exit 5
exit 0
