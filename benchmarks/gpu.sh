#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in under nine and a half minutes however many parts are named.
#   usage: benchmarks/gpu.sh OUT [PART...]
# Parts, in order of importance, all of them if none is named: tests sanitize optimizer wgrad step select sweep;
# and distill, which compiles for minutes, and sd, which needs diffusers; these run only if they are named, best alone.
# The native module is taken from an installed pecker_fast on PYTHONPATH, or built in place if it is missing or has no
# CUDA kernels (needs nvcc, cmake, ninja, pybind11).
# Writes OUT/machine.json, OUT/PART.log, for benchmarks OUT/PART.json after every row, and OUT/summary.txt. A part that
# fails or runs out of time is recorded and the next one runs; the exit status says whether all passed.
# Time limits share SECONDS_IN_ALL (560) by weight; what a part does not use is left to those after it.
# PECKER_FAST_REHEARSE=1 rehearses everything at tiny sizes on a CPU.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT [PART...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
IFS=: read -ra installed <<<"${PYTHONPATH:-}"
for folder in ${installed[@]+"${installed[@]}"}; do  # the checkout comes first on the path and would hide it
  compgen -G "$folder/pecker_fast/_C*.so" >/dev/null && cp -n "$folder"/pecker_fast/_C*.so pecker_fast/
done
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
rehearse=${PECKER_FAST_REHEARSE:-0}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-560}))
declare -A weight=([tests]=24 [sanitize]=16 [optimizer]=14 [wgrad]=26 [step]=18 [select]=9 [sweep]=17 [distill]=60 [sd]=60)
parts=("$@")
((${#parts[@]})) || parts=(tests sanitize optimizer wgrad step select sweep)
for part in "${parts[@]}"; do
  [[ -n ${weight[$part]:-} ]] || { echo "unknown part $part; expected some of ${!weight[*]}" >&2; exit 2; }
done
failed=0
: >"$out/summary.txt"

# Runs a command with a time limit; its output goes to OUT/NAME.log and the screen.
run() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 status started=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit_s" "$@" 2>&1 | tee -a "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "$name: exit status $status after $((SECONDS - started)) s of $limit_s" | tee -a "$out/summary.txt"
  ((status == 0)) || failed=1
}

skip() { # NAME WHY
  echo "$1: skipped, $2" | tee -a "$out/summary.txt"
}

# Seconds for the first of the parts that are left: its share by weight of the time that is left.
share() { # PART...
  local all=0 part
  for part in "$@"; do all=$((all + weight[$part])); done
  local left=$(((deadline - SECONDS) * weight[$1] / all))
  echo $((left > 10 ? left : 10))
}

describe_machine='
import json, os, platform, subprocess, sys
import torch
import pecker_fast
from pecker_fast import native

query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit", "--format=csv"]
try:
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
except (OSError, subprocess.CalledProcessError) as error:
    gpu = f"nvidia-smi: {error}"
machine = {
    "gpu": gpu,
    "rehearsal": os.environ.get("PECKER_FAST_REHEARSE") == "1",
    "processors": os.cpu_count(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(),
    "native": native.load().build_info() if native.available() else native.why_not(),
}
json.dump(machine, open(sys.argv[1], "w"), indent=2)
print(json.dumps(machine, indent=2))
'

has_kernels='
import sys
from pecker_fast import native
reason = native.why_not_cuda()
print(reason or "the native module is there")
sys.exit(reason is not None)
'

# As setup.py does it, for this machine's GPU alone; cmake and ninja may be those of Python packages.
build() {
  local tools
  tools=$("$python" -c 'import cmake, ninja; print(f"{cmake.CMAKE_BIN_DIR}:{ninja.BIN_DIR}")' 2>/dev/null)
  [[ -n ${CUDAARCHS:-} ]] || CUDAARCHS=$("$python" -c '
import torch
print("%d%d" % torch.cuda.get_device_capability())') || return
  export CUDAARCHS PATH="$PATH${tools:+:$tools}"
  cmake -S . -B build/gpu -G Ninja -DPECKER_FAST_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" \
    -DPECKER_FAST_VERSION="$("$python" -c 'import pecker_fast; print(pecker_fast.__version__)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/pecker_fast" && cmake --build build/gpu
}

# Every test that is marked gpu, and all of ops and kernels; those about a CPU, or about code compiled ahead of time, would
# find nothing new here. Compiling is most of the work, so several processes share the GPU if they can.
tests() { # LIMIT_S
  local marked files=() workers=() file
  for file in tests/ops/test_*.py tests/kernels/test_*.py; do
    case $file in *test_properties.py | *test_compiled.py | *on_host.py) ;; *) files+=("$file") ;; esac
  done
  mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
  "$python" -c 'import xdist' 2>/dev/null && ((rehearse == 0)) && workers=(-n 12)
  if ((rehearse)); then files=(tests/ops/test_costs.py) marked=(tests/ops/test_costs.py); fi
  local end=$((SECONDS + $1))
  run tests $(($1 * 2 / 3)) "$python" -m pytest -q -rs "${workers[@]}" --junitxml "$out/tests.xml" "${files[@]}"
  run tests $((end - SECONDS)) "$python" -m pytest -q -rs --junitxml "$out/tests_gpu.xml" $( ((rehearse)) || echo -m gpu) \
    "${marked[@]}"
}

sanitize() { # LIMIT_S
  if ((rehearse)); then
    run sanitize "$1" "$python" benchmarks/sanitize_driver.py
    return
  fi
  command -v compute-sanitizer >/dev/null || { skip sanitize "compute-sanitizer is not on PATH"; return; }
  local tool
  for tool in memcheck racecheck; do
    # Without torch's cache of allocations every buffer ends where it should; of other kernels nothing is asked.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitize $(($1 / 2)) compute-sanitizer --tool "$tool" --error-exitcode 7 \
      --kernel-name kns=pecker "$python" benchmarks/sanitize_driver.py
  done
}

benchmark() { # PART LIMIT_S FILE...
  local part=$1 limit_s=$2
  shift 2
  run "$part" "$limit_s" "$python" -m pytest -q -rs --benchmark-only --rows "$out/$part.json" "${@/#/benchmarks/gpu/}"
}

for part in build machine "${parts[@]}"; do rm -f "$out/$part.log"; done
if ((rehearse == 0)) && ! "$python" -c "$has_kernels"; then
  export -f build
  export python
  run build 150 bash -c build
fi
run machine 40 "$python" -c "$describe_machine" "$out/machine.json"
while ((${#parts[@]})); do
  part=${parts[0]} limit_s=$(share "${parts[@]}")
  case $part in
    tests | sanitize) "$part" "$limit_s" ;;
    optimizer) benchmark "$part" "$limit_s" bench_optimizer.py bench_host_time.py ;;
    wgrad) benchmark "$part" "$limit_s" bench_weight_grad.py ;;
    step) benchmark "$part" "$limit_s" bench_training_step.py ;;
    select) benchmark "$part" "$limit_s" bench_select.py ;;
    distill) benchmark "$part" "$limit_s" bench_distillation.py ;;
    sd)
      if missing=$("$python" -c 'from diffusers import UNet2DConditionModel' 2>&1); then
        benchmark "$part" "$limit_s" bench_text_to_image.py
      else
        skip sd "diffusers cannot be imported: ${missing##*$'\n'}"
        failed=1
      fi
      ;;
    sweep) benchmark "$part" "$limit_s" bench_tiles.py ;;
  esac
  parts=("${parts[@]:1}")
done
"$python" benchmarks/summary.py "$out" | tee -a "$out/summary.txt"
exit $failed
