#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: builds for the card, runs the correctness tests on it, runs
# compute-sanitizer on a few, times, and prints a short table last. Rows go to bench/results/<card>.jsonl.
#
#   bench/gpu_check.sh                          # all parts
#   bench/gpu_check.sh --part build,tests       # some of build,tests,sanitizer,linear,graphs,kernels,sweep,model,table
#   bench/gpu_check.sh --part linear --wide     # float16, E = 512 and T = 16384, in place of the cells timed else
#   bench/gpu_check.sh --device cpu --tiny      # a dry run of the same steps without a GPU: a minute or two
#   bench/gpu_check.sh --results FOLDER         # where the rows go (bench/results)
#   bench/gpu_check.sh --triton-peers DIR       # time vLLM's and SGLang's kernels too, imported from DIR
#
# Where a call may take ten minutes at most: build,tests; then sanitizer; linear,table; graphs,table; kernels,table;
# model. A call of a timed part that was cut off goes on where it ended when it is given again.
# Needs python ($PYTHON, else that of .venv, else the one on PATH) with torch (CUDA), pybind11, pytest, transformers
# and peft; cmake, ninja, nvcc. It installs and downloads nothing, and leaves out what does not work here by its name.
# MAX_JOBS bounds the compilers that run at once.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=build,tests,sanitizer,linear,graphs,kernels,sweep,model,table
device=cuda
tiny=""
size=--gpu
results=bench/results
triton_peers=()
python=${PYTHON:-}
[ -z "$python" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
python=$(command -v "${python:-python}" || command -v python3)
if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then export PATH="/usr/local/cuda/bin:$PATH"; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --part) parts=$2; shift ;;
    --device) device=$2; shift ;;
    --tiny) tiny=--tiny ;;
    --wide) size=--gpu-wide ;;
    --results) results=$2; shift ;;
    --triton-peers) triton_peers=(--triton-peers "$2"); shift ;;
    -h | --help) sed -n '2,16p' "$0" | cut -c3-; exit 0 ;;
    *) echo "gpu_check: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
if ! "$python" -c "import torch" 2>/dev/null; then
  echo "gpu_check: $python has no torch; PYTHON=<a python that has it> $0 ... chooses another" >&2
  exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
size=${tiny:-$size}
failed=""

wanted() { case ",$parts," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }
step() { # step NAME COMMAND...: runs it, goes on when it fails, remembers
  local name=$1 begin=$SECONDS
  shift
  echo "== $name"
  if "$@"; then echo "== $name: ok ($((SECONDS - begin)) s)"; else
    failed="$failed $name"
    echo "== $name: FAILED ($((SECONDS - begin)) s)"
  fi
}

# Straight through CMake: setuptools may not be there.
build() {
  local cuda=OFF card=() suffix library
  if [ "$device" = cuda ]; then
    cuda=ON
    card=("-DCMAKE_CUDA_ARCHITECTURES=$("$python" -c \
      "import torch; print('%d%d-real' % torch.cuda.get_device_capability())")") || return 1
  elif "$python" -m moerge_ext doctor; then
    return
  fi
  cmake -S . -B build/check -G Ninja "-DPython_EXECUTABLE=$python" "-DMOERGE_CUDA=$cuda" "${card[@]}" || return 1
  cmake --build build/check --parallel "${MAX_JOBS:-$(nproc)}" --target _kernels _C || return 1
  suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))") || return 1
  for library in _kernels _C; do
    cp "build/check/out/$library.so" "moerge_ext/.$library.new" || return 1
    mv "moerge_ext/.$library.new" "moerge_ext/$library$suffix" || return 1
  done
  "$python" -m moerge_ext doctor
}

tests() {
  local on=()
  [ "$device" = cuda ] && on=(--cuda)
  "$python" -c "import xdist" 2>/dev/null && on+=(-n "${MAX_JOBS:-$(nproc)}" --dist worksteal)
  local files=(python_tests/ops/test_{route,lora,16bit,16bit_gradients,linear,many_tokens,mix,autograd,cuda,grid}.py)
  files+=(python_tests/ops/test_cuda_graphs.py python_tests/routing/test_patch_compiled.py)
  [ -n "$tiny" ] && files=(python_tests/ops/test_mix.py)
  "$python" -m pytest "${on[@]}" -m "not slow" --maxfail=40 "${files[@]}"
}

# A first small program tells whether the tool works here at all. Torch's cache of memory would hide a bad access.
sanitizer() {
  if [ "$device" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "skipped: needs a GPU and compute-sanitizer"
    return 0
  fi
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool run=(timeout 280 compute-sanitizer --error-exitcode 9)
  if ! "${run[@]}" "$python" -c "import torch; torch.ones(1000).cuda().sum().item()"; then
    echo "skipped: compute-sanitizer does not work on this machine"
    return 0
  fi
  for tool in memcheck racecheck; do
    "${run[@]}" --tool "$tool" "$python" bench/sanitize.py || return 1
  done
}

suite() { "$python" bench/run.py "$1" --device "$device" $size --results "$results" "${triton_peers[@]}" "${@:2}"; }
linear() { suite linear; }
graphs() { suite linear --graphs && suite linear --graphs --warm; }
kernels() { suite kernels; }
# A build of its own, put back afterwards.
sweep() {
  local suffix kept status=0
  [ "$device" = cuda ] || { echo "skipped: needs a GPU"; return 0; }
  suffix=$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))") || return 1
  kept=$(mktemp) && cp "moerge_ext/_kernels$suffix" "$kept" || return 1
  cmake -S . -B build/tune -G Ninja "-DPython_EXECUTABLE=$python" -DMOERGE_CUDA=ON -DMOERGE_TUNE=ON \
    "-DCMAKE_CUDA_ARCHITECTURES=$("$python" -c \
      "import torch; print('%d%d-real' % torch.cuda.get_device_capability())")" &&
    cmake --build build/tune --parallel "${MAX_JOBS:-$(nproc)}" --target _kernels || return 1
  cp build/tune/out/_kernels.so "moerge_ext/_kernels$suffix"
  "$python" bench/gpu_sweep.py --results "$results" || status=1
  mv "$kept" "moerge_ext/_kernels$suffix"
  return $status
}
model() { "$python" bench/run.py model --device "$device" $tiny --results "$results"; }

wanted build && step build build
wanted tests && step tests tests
wanted sanitizer && step sanitizer sanitizer
wanted linear && step linear linear
wanted graphs && step graphs graphs
wanted kernels && step kernels kernels
wanted sweep && step sweep sweep
wanted model && step model model
wanted table && step table "$python" bench/gpu_table.py --device "$device" --results "$results"
if [ -n "$failed" ]; then
  echo "gpu_check: failed:$failed" >&2
  exit 1
fi
echo "gpu_check: all parts passed"
