#!/usr/bin/env bash
# An adapter with two overlapping alpha_pattern keys comes back with other scalings than it was trained with.
#
# Versions: torch 2.13.0, peft 0.21.2.
#
# Expected: alpha_pattern and rank_pattern are dicts of a name or pattern to a value. What get_peft_model makes of them
#   and save_pretrained writes, from_pretrained makes again.
# What happens: the first key that matches wins, in the order of the dict; save_pretrained sorts the keys. With the
#   general key first, {"q_proj": 8, "layers.0.q_proj": 32}, every layer trains with alpha 8; the file lists
#   "layers.0.q_proj" first, and layer 0 comes back with alpha 32, four times as strong. No warning. The same with
#   rank_pattern is an error of sizes on loading.
# Affected: adapters with a general and a special key where the order of training is not the alphabetical one. The
#   reverse happens too: special keys that sort behind the general one are written in the order that hides them.
# Way around: keys that do not overlap, or special keys first and the check that json.dumps(..., sort_keys=True) keeps
#   them there; a file already written is mended by taking the special key out.
#
# Output seen:
#   alpha, general key first: trained with scalings [2.0, 2.0, 2.0]; loaded with [8.0, 2.0, 2.0];
#     off by 10.8 of an effect of 8.3
#   alpha, special key first, sorts last: trained with scalings [8.0, 2.0, 2.0]; loaded with [2.0, 2.0, 2.0]
#   rank, general key first: written as {'layers.0.q_proj': 2, 'q_proj': 8}; loading: RuntimeError, size mismatch
#   alpha, keys that do not overlap: trained with scalings [8.0, 2.0, 2.0]; loaded with [8.0, 2.0, 2.0]
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
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

"$python" - "$work" <<'PYTHON'
import json, pathlib, sys, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

work = pathlib.Path(sys.argv[1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return x + self.q_proj(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def base():
    torch.manual_seed(0)
    return Model()


torch.manual_seed(3)
x = torch.randn(5, 16)


def layers(model):
    return [block.q_proj for block in model.base_model.model.layers]


@torch.no_grad()
def trip(folder, **patterns):
    made = get_peft_model(base(), LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False, **patterns))
    made.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = PeftModel.from_pretrained(base(), folder)
    effect = (made(x) - base()(x)).abs().max().item()
    return ([m.scaling["default"] for m in layers(made)], [m.scaling["default"] for m in layers(back)],
            (back(x) - made(x)).abs().max().item(), effect)


general = trip(work / "general", alpha_pattern={"q_proj": 8, "layers.0.q_proj": 32})
print(f"alpha, general key first: trained with scalings {general[0]}; loaded with {general[1]};\n"
      f"  off by {general[2]:.1f} of an effect of {general[3]:.1f}")
special = trip(work / "special", alpha_pattern={r"layers\.0\.q_proj": 32, ".*_proj": 8})
print(f"alpha, special key first, sorts last: trained with scalings {special[0]}; loaded with {special[1]}")
try:
    trip(work / "rank", rank_pattern={"q_proj": 8, "layers.0.q_proj": 2})
    refused = "nothing raised"
except RuntimeError as error:
    refused = "RuntimeError, size mismatch" if "size mismatch" in str(error) else "RuntimeError"
saved = json.loads((work / "rank" / "adapter_config.json").read_text())["rank_pattern"]
print(f"rank, general key first: written as {saved}; loading: {refused}")
apart = trip(work / "apart", alpha_pattern={r"layers\.0\.q_proj": 32, r"layers\.[12]\.q_proj": 8})
print(f"alpha, keys that do not overlap: trained with scalings {apart[0]}; loaded with {apart[1]}")

same = (general[0] == [2, 2, 2] and general[1] == [8, 2, 2] and general[2] > 0.1 * general[3]
        and special[0] == [8, 2, 2] and special[1] == [2, 2, 2] and refused.endswith("size mismatch")
        and apart[0] == apart[1] == [8, 2, 2] and apart[2] < 1e-6)
sys.exit(0 if same else "the behaviour has changed")
PYTHON
