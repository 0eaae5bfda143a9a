#!/usr/bin/env bash
# F.linear of hidden[:, -1:] copies the whole weight once per row of the batch; in bfloat16 on the CPU it takes seconds.
#
# Versions: torch 2.13.0.
#
# Expected: the last position of 16 rows through an output head of 49152 words costs 16 rows of a product, whether the
#   16 vectors lie side by side in memory or are a slice of [16, T, 576].
# What happens: F.linear of a 3-D input that cannot be viewed as 2-D becomes bmm with the weight expanded to
#   [16, 576, 49152], which is laid out anew for every row. The values are the same. With a contiguous copy of the slice,
#   which is a few kilobytes, it is the product that one expects.
# Affected: transformers' causal models take lm_head(hidden[:, -logits_to_keep:]), so the first token of every batched
#   `generate` on the CPU, and training that keeps the logits of the answers alone. For a model of 135M parameters in
#   bfloat16 the head of one batch takes longer than everything before it.
# Way around: a hook that makes the head's input contiguous:
#   model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
#
# Output seen (one thread; the factors differ from machine to machine):
#   float32: the same values: True; the slice takes at least 2 times as long: True
#   bfloat16: the same values: True; the slice takes at least 2 times as long: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "numpy==2.4.6"
fi
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys, time
import torch
from torch.nn.functional import linear

torch.manual_seed(0)
hidden, weight = torch.randn(16, 40, 576), torch.randn(49152, 576) / 24


def seconds(call):
    call()
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


same = True
for dtype in (torch.float32, torch.bfloat16):
    last, head = hidden.to(dtype)[:, -1:], weight.to(dtype)
    alike = torch.allclose(linear(last, head).float(), linear(last.contiguous(), head).float(), atol=0.1)
    factor = seconds(lambda: linear(last, head)) / seconds(lambda: linear(last.contiguous(), head))
    name = str(dtype).removeprefix("torch.")
    print(f"{name}: the same values: {alike}; the slice takes at least 2 times as long: {factor >= 2}")
    print(f"  factor {factor:.0f}", file=sys.stderr)
    same = same and alike and factor >= 2
sys.exit(0 if same else "the behaviour has changed")
PYTHON
