#!/usr/bin/env bash
# A forward in eval() changes bitsandbytes' 4-bit layers on a CPU: no gradient passes them after it, and state_dict()
# gives other weights.
#
# Versions: torch 2.13.0, bitsandbytes 0.50.2. On a CPU with AVX-512 BF16 (Intel from Cooper Lake and Sapphire Rapids on, AMD from
# Zen 4 on); on others the script says that there is nothing to see.
#
# Expected: a forward in eval() mode under no_grad leaves a layer as it was. A loss that is measured between two steps of
#   a QLoRA training, or a text that is generated before it, has no say in the gradients that follow, and
#   save_pretrained writes the weights that the model computes with.
# What happens: the first such forward packs the weight for another kernel, for good, also when the layer is set to
#   train() again. From then on the output of the layer has a gradient function, but none for its input: backward
#   reaches nothing before the layer but what goes around it (a LoRA's own branch, a residual), with one UserWarning of
#   torch. state_dict() undoes the packing, but leaves the scales of the blocks transposed, as long as they are not
#   quantized themselves (bnb_4bit_use_double_quant, False by default): the layer computes with other weights from
#   then on, and so does what was saved.
# Cause, as read: nn/modules.py packs whenever the input is on the CPU, needs no gradient and the layer is not training;
#   its matmul then goes to an operator without an autograd formula; the inverse of the packing restores the nested
#   scales and forgets the plain ones, which packing turned into [blocks of a row, rows].
# Affected: 4-bit QLoRA on a CPU with an evaluation or generate() before or between its steps; saving such a model.
# Way around: set layer.support_avx512bf16_for_cpu = False on every Linear4bit before its first forward.
#
# Output seen:
#   gradient of the input before: 0.000 off; after an eval() forward, in train() mode: None
#   output after state_dict(): 0.235 off; with the scales put back in order: 0.002 off
#   with support_avx512bf16_for_cpu = False: gradient 0.000 off, output after state_dict() 0.000 off
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "bitsandbytes==0.50.2" "numpy==2.4.6"
fi
export OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys, warnings
import torch
import bitsandbytes as bnb

warnings.simplefilter("ignore")
rows, columns = 64, 128


def layer():
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32,
                             compress_statistics=False)
    torch.nn.init.normal_(made.weight)
    return made.to("cpu")


def off(got, want):
    return None if got is None else ((got - want).norm() / want.norm()).item()


def gradient(linear, weight):
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).requires_grad_()
    linear.train()(x).square().sum().backward()
    return off(x.grad, 2 * (x.detach() @ weight.T) @ weight)


@torch.no_grad()
def output(linear, weight):
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
    return off(linear.train()(x), x @ weight.T)


@torch.no_grad()
def look(linear):
    linear.eval()(torch.randn(2, columns))


def text(value):
    return "None" if value is None else f"{value:.3f} off"


one = layer()
if not one.support_avx512bf16_for_cpu:
    print("this CPU has no AVX-512 BF16: nothing is packed here")
    sys.exit(0)
weight = bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state)
before = gradient(one, weight)
look(one)
after = gradient(one, weight)
print(f"gradient of the input before: {text(before)}; after an eval() forward, in train() mode: {text(after)}")

scales = one.weight.quant_state.absmax
one.state_dict()
saved = output(one, weight)
one.weight.quant_state.absmax = scales.T.reshape(-1).float()
ordered = output(one, weight)
print(f"output after state_dict(): {text(saved)}; with the scales put back in order: {text(ordered)}")

other = layer()
other.support_avx512bf16_for_cpu = False
look(other)
kept = gradient(other, weight)
other.state_dict()
still = output(other, weight)
print(f"with support_avx512bf16_for_cpu = False: gradient {text(kept)}, output after state_dict() {text(still)}")
assert before < 1e-5 and after is None and saved > 0.1 and ordered < 0.01 and kept < 1e-5 and still < 1e-5, \
    "it is otherwise now"
PYTHON
