#!/usr/bin/env bash
# LoRA on nn.TransformerEncoderLayer acts in training and is gone in eval.
#
# Versions: torch 2.13.0, peft 0.21.2.
#
# Expected: with dropout 0 a model gives the same output in train() and eval(), with an adapter as without.
# What happens: in eval() the layer (batch_first=True) takes a fused path that reads linear1.weight and linear2.weight
#   and never calls the modules. PEFT's wrapper of a linear has a .weight, the base's, so the check for the fused path
#   passes and LoRA is left out: it trains, and evaluation gives the base model. No error, no warning, with or without
#   torch.no_grad(), and with "all-linear". Merged, the adapter acts.
# Affected: LoRA on models built of nn.TransformerEncoder(Layer): vision and time-series models, own encoders.
# Way around: torch.backends.mha.set_fastpath_enabled(False), or merge before evaluating.
#
# Output seen (the largest difference of an output to the base's):
#   ['linear1', 'linear2']: train 1.0463; eval 0.0000, under no_grad 0.0000;
#     eval without the fast path 1.0463; merged 1.0463
#   all-linear: train 0.8288; eval 0.0000, under no_grad 0.0000;
#     eval without the fast path 0.8288; merged 1.0024
#   (the last two differ for "all-linear": the attention's out_proj is read by its weight in training, too)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "safetensors==0.8.0" \
    "accelerate==1.15.0" "numpy==2.4.6"
fi
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$python" - <<'PYTHON'
import sys, warnings
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(1)
x = torch.randn(3, 5, 16)


def base():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def effect(model, training):
    return (model.train(training)(x) - base().train(training)(x)).abs().max().item()


same = True
for targets in (["linear1", "linear2"], "all-linear"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*nested.*")  # of nn.TransformerEncoder, about padding
        torch.manual_seed(2)
        model = get_peft_model(base(), LoraConfig(target_modules=targets, init_lora_weights=False))
        training, evaluating = effect(model, True), effect(model, False)
        with torch.no_grad():
            without_grad = effect(model, False)
        torch.backends.mha.set_fastpath_enabled(False)
        slow = effect(model, False)
        torch.backends.mha.set_fastpath_enabled(True)
        merged = effect(model.merge_and_unload(), False)
    print(f"{targets}: train {training:.4f}; eval {evaluating:.4f}, under no_grad {without_grad:.4f};\n"
          f"  eval without the fast path {slow:.4f}; merged {merged:.4f}")
    same = (same and training > 0.1 and max(evaluating, without_grad) < 1e-5 and abs(slow - training) < 1e-4
            and merged > 0.1)
sys.exit(0 if same else "the behaviour has changed")
PYTHON
