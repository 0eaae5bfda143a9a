#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: builds for the card, runs the correctness tests on it, runs
# compute-sanitizer on a few, times, and prints a short table last. Rows go to bench/results/<card>.jsonl.
#
#   bench/gpu_check.sh                          # all parts, about ten minutes on a fast machine
#   bench/gpu_check.sh --part build,tests       # some: build, tests, sanitizer, linear, graphs, model, table
#   bench/gpu_check.sh --device cpu --tiny      # a dry run of the same steps without a GPU, in seconds to minutes
#
# Needs python with torch (CUDA), pybind11, cmake, ninja, pytest, transformers and peft, and nvcc; nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=build,tests,sanitizer,linear,graphs,model,table
device=cuda
tiny=""
results=bench/results
python=${PYTHON:-python}
while [ $# -gt 0 ]; do
  case "$1" in
    --part) parts=$2; shift ;;
    --device) device=$2; shift ;;
    --tiny) tiny=--tiny ;;
    --results) results=$2; shift ;;
    -h | --help) sed -n '2,9p' "$0" | cut -c3-; exit 0 ;;
    *) echo "gpu_check: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
size=${tiny:---gpu}
failed=""

wanted() { case ",$parts," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }
step() { # step NAME COMMAND...: runs it, goes on when it fails, remembers
  local name=$1
  shift
  echo "== $name"
  if "$@"; then echo "== $name: ok"; else
    failed="$failed $name"
    echo "== $name: FAILED"
  fi
}

build() {
  if [ "$device" = cpu ]; then
    "$python" -c "import moerge_ext" || "$python" setup.py -q build_ext --inplace
  else
    local card
    card=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    MOERGE_CUDA=1 CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$card-real" "$python" setup.py -q build_ext --inplace
  fi
  "$python" -m moerge_ext doctor
}

tests() {
  local on=()
  [ "$device" = cuda ] && on=(--cuda)
  local files=(python_tests/test_ops_{route,lora,16bit,mix,autograd}.py)
  [ -n "$tiny" ] && files=(python_tests/test_ops_mix.py)
  "$python" -m pytest "${on[@]}" -m "not slow" "${files[@]}"
}

sanitizer() {
  if [ "$device" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "skipped: needs a GPU and compute-sanitizer"
    return 0
  fi
  local tool
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest --cuda python_tests/test_ops_16bit.py -k "test_shapes and (33 or 129)" || return 1
  done
}

linear() { "$python" bench/run.py linear --device "$device" $size --results "$results" "$@"; }
graphs() { linear --graphs && linear --graphs --warm; }
model() { "$python" bench/run.py model --device "$device" $tiny --results "$results"; }

wanted build && step build build
wanted tests && step tests tests
wanted sanitizer && step sanitizer sanitizer
wanted linear && step linear linear
wanted graphs && step graphs graphs
wanted model && step model model
wanted table && step table "$python" bench/gpu_table.py --device "$device" --results "$results"
if [ -n "$failed" ]; then
  echo "gpu_check: failed:$failed" >&2
  exit 1
fi
echo "gpu_check: all parts passed"
