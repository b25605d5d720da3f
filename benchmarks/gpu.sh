#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in under nine minutes; pecker_fast must be importable.
#   usage: benchmarks/gpu.sh OUT
# Writes OUT/machine.json, OUT/tests.{log,xml}, OUT/benchmarks.{log,json}, OUT/kernels.json and OUT/summary.txt. A step that fails is
# recorded and the next one runs; the exit status says whether all passed.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0
: >"$out/summary.txt"

# Runs a command with a time limit; its output goes to OUT/NAME.log and the screen.
run() { # NAME LIMIT_S COMMAND...
  local name=$1 limit_s=$2 status started=$SECONDS
  shift 2
  timeout --kill-after=10 "$limit_s" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "$name: exit status $status after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  ((status == 0)) || failed=1
}

describe_machine='
import json, platform, subprocess, sys
import torch
import pecker_fast
from pecker_fast import native

query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
machine = {
    "gpu": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "native": native.load().build_info() if native.available() else native.why_not(),
}
json.dump(machine, open(sys.argv[1], "w"), indent=2)
print(json.dumps(machine, indent=2))
'

run machine 40 "$python" -c "$describe_machine" "$out/machine.json"
run tests 200 "$python" -m pytest -q -m gpu --junitxml "$out/tests.xml"
run benchmarks 260 "$python" -m pytest benchmarks --benchmark-only --benchmark-json "$out/benchmarks.json" \
  --rows "$out/kernels.json"
exit $failed
