#!/usr/bin/env bash
# generate(num_return_sequences=10) reads the prompt ten times.
#
# Versions: torch 2.13.0, transformers 5.23.0.
#
# Expected: ten samples after one prompt have the prompt in common: it is read once, and its keys and values serve all
#   ten, as engines with an `n` of their own do it.
# What happens: the prompt is repeated before it is read. The first forward gets ten equal rows, so that ten samples of
#   a few words after a long prompt take ten times what one takes. The values are those of one reading.
# Affected: sampling several short answers to a long prompt (self-consistency, answer prompting, best of n), and beam
#   search, which repeats the prompt in the same way.
# Way around: let generate read all tokens but the last of one row (max_new_tokens=1, return_dict_in_generate=True),
#   repeat what its cache holds (past_key_values.batch_repeat_interleave(10)), and pass that with the repeated prompt.
#
# Output seen:
#   num_return_sequences=10: 4000 tokens of a prompt of 400 are read before the first answer
#   num_beams=10: 4000 tokens of a prompt of 400 are read before the first answer
#   the cache of one row, repeated: 399 tokens, then 10; the same samples: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "transformers==5.23.0" "numpy==2.4.6"
fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
).eval()
prompt, read = torch.randint(3, 128, (1, 400)), []
model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
common = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}


def sampled(ids, **options):
    read.clear()
    torch.manual_seed(1)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **common | options)


ten = sampled(prompt, do_sample=True, num_return_sequences=10)
first = read[0]
print(f"num_return_sequences=10: {first} tokens of a prompt of 400 are read before the first answer")
sampled(prompt, num_beams=10)
beams = read[0]
print(f"num_beams=10: {beams} tokens of a prompt of 400 are read before the first answer")

begun = sampled(prompt[:, :-1], max_new_tokens=1, min_new_tokens=1, return_dict_in_generate=True)
once, cache = read[0], begun.past_key_values
cache.batch_repeat_interleave(10)
again = sampled(prompt.repeat(10, 1), do_sample=True, past_key_values=cache)
same = torch.equal(ten, again)
print(f"the cache of one row, repeated: {once} tokens, then {read[0]}; the same samples: {same}")
expected = (first, beams, once, read[0], same) == (4000, 4000, 399, 10, True)
sys.exit(0 if expected else "the behaviour has changed")
PYTHON
